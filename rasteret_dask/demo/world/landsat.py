# SPDX-License-Identifier: Apache-2.0
"""Landsat-like scenes of the made-up world: Collection 2 Level 2 as Earth Search lists it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.clouds import add_clouds, make_clouds
from rasteret_dask.demo.world.files import JSON, CogStyle, asset, item, write_cog
from rasteret_dask.demo.world.ground import Ground
from rasteret_dask.demo.world.layout import Grid, Layout
from rasteret_dask.demo.world.spectra import Cover, spectra_on

__all__ = ["COLLECTION", "SCENES", "LandsatScene", "write_scenes"]

COLLECTION = "landsat-c2-l2"

_STRIP_ROWS = 128
_NOISE = 0.0008
_SCALE, _OFFSET = 2.75e-5, -0.2
_PATH, _ROW = "191", "025"
_FILES = (
    ("blue", "SR_B2", 0.48),
    ("green", "SR_B3", 0.56),
    ("red", "SR_B4", 0.65),
    ("nir08", "SR_B5", 0.87),
    ("swir16", "SR_B6", 1.61),
)
_FILL, _LAND, _DILATED, _CLOUD, _SHADOW = 1, 21824, 21762, 22280, 23888
"""QA_PIXEL values over land, from the bits of the Collection 2 Level 2 product guide (USGS LSDS-1619)."""
_CLOUD_BIT, _WATER_BIT = 8, 128


@dataclass(frozen=True, slots=True)
class LandsatScene:
    """One scene, which covers the whole world."""

    start: datetime
    """Scene centre time, UTC."""
    platform: str
    """``landsat-8`` or ``landsat-9``."""
    cloud_share: float
    """Share of the raster under clouds, 0..1."""


SCENES = (
    LandsatScene(datetime(2024, 4, 15, 9, 50, 12), "landsat-9", 0.16),
    LandsatScene(datetime(2024, 5, 9, 9, 49, 58), "landsat-8", 0.05),
    LandsatScene(datetime(2024, 6, 18, 9, 50, 21), "landsat-9", 0.11),
)
"""One in each of April, May and June of 2024."""


def write_scenes(folder: Path, seed: int, layout: Layout, ground: Ground, tile_px: int) -> Iterator[JSON]:
    """Write the COGs of each scene and yield its item.

    Parameters
    ----------
    folder
        Of the collection; each scene gets a folder in it.
    seed
        The world's seed.
    layout, ground
        The world.
    tile_px
        Internal tiles of the files.
    """
    seen = _inside(layout.landsat, layout.landsat_corners)
    for number, scene in enumerate(SCENES):
        bands, qa = _take_picture((seed, 40 + number), scene, layout.landsat, ground)
        bands[:, ~seen] = 0
        qa[~seen] = _FILL
        name = f"LC0{scene.platform[-1]}_L2SP_{_PATH}{_ROW}_{scene.start:%Y%m%d}_02_T1"
        _write_files(folder / name, name, (bands, qa), layout.landsat, tile_px)
        yield _item(name, scene, layout, 100 * float(np.mean(qa[seen] & _CLOUD_BIT > 0)))


def _take_picture(
    seed: tuple[int, int], scene: LandsatScene, grid: Grid, ground: Ground
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return the bands, shape (5, y, x), and QA_PIXEL, shape (y, x), as if the swath had no edges."""
    clouds = make_clouds((*seed, 1), grid, scene.cloud_share)
    spectra = spectra_on(scene.start.timetuple().tm_yday)
    opacity, shadow = clouds.opacity(grid.y), clouds.shadow(grid.y)
    bands = np.empty((len(_FILES), grid.height, grid.width), np.uint16)
    water = np.empty((grid.height, grid.width), np.bool_)

    def paint(start: int) -> None:
        strip = grid.rows(start, start + _STRIP_ROWS)
        rows = slice(start, start + strip.height)
        below = ground.window(_below(strip))
        rng = np.random.default_rng((*seed, 2, start))
        for band in range(len(_FILES)):
            value = _average(below.reflectance(spectra, band))
            value = add_clouds(value, band, opacity[rows], shadow[rows])
            value += np.float32(_NOISE) * rng.standard_normal(value.shape, np.float32)
            bands[band, rows] = np.clip(np.rint((value - _OFFSET) / _SCALE), 1, 65535)
        water[rows] = _average((below.cover <= Cover.LAKE).astype(np.float32)) > 0.5

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(paint, range(0, grid.height, _STRIP_ROWS)))
    return bands, _quality(opacity, shadow, water)


def _quality(
    opacity: NDArray[np.float32], shadow: NDArray[np.float32], water: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Return QA_PIXEL: every touched pixel is cloud, dilated cloud or shadow."""
    qa = np.full(opacity.shape, _LAND, np.uint16)
    qa[shadow > 0] = _SHADOW
    qa[_dilate(opacity > 0, 3)] = _DILATED
    qa[opacity > 0.12] = _CLOUD
    qa[water] |= _WATER_BIT
    return qa


def _dilate(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Return True within this many pixels (along rows and columns) of a True."""
    for axis in (0, 1):
        grown = mask.copy()
        for step in range(1, pixels + 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= mask[tuple(behind)]
            grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def _below(grid: Grid) -> Grid:
    """Return the 10 m grid under a 30 m grid whose edges lie in the middle of 10 m pixels: half a pixel more."""
    return Grid(grid.x0 - 5, grid.y0 + 5, 10, 3 * grid.height + 1, 3 * grid.width + 1)


def _average(fine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average 10 m pixels over 30 m ones that begin half a pixel in: weights 1/6, 1/3, 1/3, 1/6 in each axis."""
    rows = fine[0:-1:3] + 2 * fine[1::3] + 2 * fine[2::3] + fine[3::3]
    cols = rows[:, 0:-1:3] + 2 * rows[:, 1::3] + 2 * rows[:, 2::3] + rows[:, 3::3]
    average: NDArray[np.float32] = cols * np.float32(1 / 36)
    return average


def _inside(grid: Grid, corners: tuple[tuple[float, float], ...]) -> NDArray[np.bool_]:
    """Return True where a pixel's centre lies inside a convex polygon given anticlockwise, (x, y) in metres."""
    inside = np.ones((grid.height, grid.width), np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        inside &= (x1 - x0) * (grid.y[:, None] - y0) - (y1 - y0) * (grid.x[None, :] - x0) >= 0
    return inside


def _write_files(
    folder: Path, name: str, pixels: tuple[NDArray[np.uint16], NDArray[np.uint16]], grid: Grid, tile_px: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bands, qa = pixels
    style, quality = CogStyle(tile_px, "AVERAGE"), CogStyle(tile_px, "NEAREST", nodata=_FILL)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(write_cog, folder / f"{name}_{code}.TIF", band, grid, style)
            for (_, code, _), band in zip(_FILES, bands, strict=True)
        ]
        jobs.append(pool.submit(write_cog, folder / f"{name}_QA_PIXEL.TIF", qa, grid, quality))
    for job in jobs:
        job.result()


def _item(name: str, scene: LandsatScene, layout: Layout, cloud_pct: float) -> JSON:
    properties = {
        "datetime": f"{scene.start:%Y-%m-%dT%H:%M:%S.%f}Z",
        "created": f"{scene.start + timedelta(days=11):%Y-%m-%dT%H:%M:%SZ}",
        "platform": scene.platform,
        "instruments": ["oli", "tirs"],
        "gsd": 30,
        "eo:cloud_cover": round(cloud_pct, 2),
        "grid:code": f"WRS2-{_PATH}{_ROW}",
        "landsat:wrs_type": "2",
        "landsat:wrs_path": _PATH,
        "landsat:wrs_row": _ROW,
        "landsat:collection_category": "T1",
        "landsat:collection_number": "02",
        "landsat:correction": "L2SP",
        "proj:shape": [layout.landsat.height, layout.landsat.width],
        "proj:transform": list(layout.landsat.transform)[:6],
    }
    raster = {"nodata": 0, "data_type": "uint16", "scale": _SCALE, "offset": _OFFSET}
    assets = {
        key: asset(
            f"{name}_{code}.TIF",
            layout.landsat,
            raster,
            {"name": f"OLI_B{code[-1]}", "common_name": key, "center_wavelength": wavelength},
            ("data", "reflectance"),
        )
        for key, code, wavelength in _FILES
    }
    quality = {"nodata": _FILL, "data_type": "uint16"}
    file = f"{name}_QA_PIXEL.TIF"
    assets["qa_pixel"] = asset(file, layout.landsat, quality, None, ("cloud", "cloud-shadow", "water-mask"))
    return item(COLLECTION, name, layout.landsat_corners, properties, assets)
