# SPDX-License-Identifier: Apache-2.0
"""Annual embeddings of the made-up world, stored as AlphaEarth's are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window

from rasteret_dask.demo.world.files import JSON, item
from rasteret_dask.demo.world.ground import Ground
from rasteret_dask.demo.world.layout import EPSG, Grid
from rasteret_dask.demo.world.noise import NoiseAlong, make_noise
from rasteret_dask.demo.world.spectra import PHASES, Cover

__all__ = ["COLLECTION", "DIMENSIONS", "NODATA", "make_item", "write_file"]

COLLECTION = "aef-v1-annual"
DIMENSIONS = 64
"""Number of bands, A00 to A63."""
NODATA = -128

_YEAR = 2024
_VIGOUR, _CLIMATE = 0.8, 0.12  # weights of parcel vigour and of a slow regional drift


def write_file(path: Path, seed: int, ground: Ground, tile_px: int) -> Iterator[float]:
    """Write one int8 file with 64 planar bands, ZSTD, south-up, and yield the share done (0..1).

    ``value = sign(v) * (|v| / 127.5) ** 2`` is the inverse of its quantization; the 64 values of a pixel have
    unit length but for rounding. There are no overviews: the bands of 64 planes would cost a third more.

    Parameters
    ----------
    path
        The new file.
    seed
        The world's seed.
    ground
        What is embedded; its grid becomes the file's, upside down.
    tile_px
        Internal tiles of each plane.
    """
    grid = ground.grid
    rng = np.random.default_rng([seed, 60])
    climate = make_noise(rng, grid, (12000, 5000)).along(grid.x)
    axes = _axes(rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **_profile(grid, tile_px)) as file:
        for band in range(DIMENSIONS):
            file.set_band_description(band + 1, f"A{band:02d}")
        for start in range(0, grid.height, tile_px):  # counted from the south, as the file's rows are
            height = min(tile_px, grid.height - start)
            strip = grid.rows(grid.height - start - height, grid.height - start)
            planes = _embed(ground.window(strip), climate, axes)
            for band, plane in enumerate(planes, start=1):
                file.write(plane[::-1], band, window=Window(0, start, grid.width, height))
            yield (start + height) / grid.height


def make_item(name: str, grid: Grid) -> JSON:
    """Return the STAC item of the file ``<name>.tiff`` on ``grid`` (north-up; the file is its mirror image)."""
    west, south, east, north = grid.bounds
    asset = {
        "href": f"./{name}.tiff",
        "type": "image/tiff; application=geotiff",
        "roles": ["data"],
        "gsd": 10,
        "proj:shape": [grid.height, grid.width],
        "proj:transform": list(_south_up(grid))[:6],
        "eo:bands": [{"name": f"A{band:02d}"} for band in range(DIMENSIONS)],
        "raster:bands": [{"nodata": NODATA, "data_type": "int8", "spatial_resolution": 10}] * DIMENSIONS,
    }
    properties = {
        "datetime": None,
        "start_datetime": f"{_YEAR}-01-01T00:00:00Z",
        "end_datetime": f"{_YEAR}-12-31T23:59:59Z",
    }
    corners = ((west, north), (west, south), (east, south), (east, north))
    return item(COLLECTION, name, corners, properties, {"data": asset})


def _profile(grid: Grid, tile_px: int) -> dict[str, Any]:
    return {
        "driver": "GTiff",
        "width": grid.width,
        "height": grid.height,
        "count": DIMENSIONS,
        "dtype": "int8",
        "crs": f"EPSG:{EPSG}",
        "transform": _south_up(grid),
        "nodata": NODATA,
        "tiled": True,
        "blockxsize": tile_px,
        "blockysize": tile_px,
        "interleave": "band",
        "compress": "ZSTD",
        "zstd_level": 3,
        "num_threads": 2,
    }


def _south_up(grid: Grid) -> Affine:
    west, south, _, _ = grid.bounds
    return Affine(grid.pixel_m, 0, west, 0, grid.pixel_m, south)


def _axes(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a direction for every cover, two for vigour and climate, and what phase adds: shape (c + 3, 64)."""
    directions = rng.standard_normal((len(Cover) + 3, DIMENSIONS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vegetation = directions[Cover.MEADOW].copy()
    directions[: Cover.FALLOW + 1] += 0.6 * vegetation  # relatives lie closer together
    return directions.astype(np.float32)


def _embed(ground: Ground, climate: NoiseAlong, axes: NDArray[np.float32]) -> Iterator[NDArray[np.int8]]:
    """Yield the 64 planes of a piece of ground, each of its shape, north-up.

    A pixel's vector is a sum of fixed directions, so its length follows from their inner products and no more
    than one plane is in memory at a time.
    """
    vigour_axis, climate_axis, phase_axis = (axes[len(Cover) + i] for i in range(3))
    phases = np.linspace(-0.25, 0.25, PHASES, dtype=np.float32)
    kinds = (axes[: len(Cover), None] + phases[:, None] * phase_axis).reshape(-1, DIMENSIONS)
    vigour = (ground.vigour.astype(np.float32) - 100) * np.float32(_VIGOUR / 100)
    drift = np.float32(_CLIMATE) * climate.at(ground.grid.y)

    square = (kinds**2).sum(axis=1)[ground.kind]
    square += vigour**2 * (vigour_axis @ vigour_axis) + drift**2 * (climate_axis @ climate_axis)
    square += 2 * (vigour * (kinds @ vigour_axis)[ground.kind] + drift * (kinds @ climate_axis)[ground.kind])
    square += 2 * vigour * drift * (vigour_axis @ climate_axis)
    scale = 1 / np.sqrt(square)
    for band in range(DIMENSIONS):
        value = kinds[:, band][ground.kind]
        value += vigour * vigour_axis[band]
        value += drift * climate_axis[band]
        value *= scale
        yield _quantize(value)


def _quantize(value: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return ``round(sign(v) * 127.5 * sqrt(|v|))`` within -127..127; overwrites nothing."""
    size = np.sqrt(np.abs(value))
    size *= np.float32(127.5)
    signed = np.copysign(size, value, out=size)
    np.rint(signed, out=signed)
    return np.clip(signed, -127, 127, out=signed).astype(np.int8)
