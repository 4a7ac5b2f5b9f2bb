# SPDX-License-Identifier: Apache-2.0
"""Sentinel-2-like scenes of the made-up world, as Earth Search publishes them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.clouds import Clouds, add_clouds, make_clouds
from rasteret_dask.demo.world.files import JSON, CogStyle, asset, item, write_cog
from rasteret_dask.demo.world.ground import Ground
from rasteret_dask.demo.world.layout import GRANULES, Grid, Layout
from rasteret_dask.demo.world.spectra import Cover, spectra_on

__all__ = ["COLLECTION", "DATATAKES", "Datatake", "write_scenes"]

COLLECTION = "sentinel-2-l2a"

_BASELINE = "05.10"
_STRIP_ROWS = 256
_NOISE = 0.0012
_FILES = (("blue", "B02", 0.49), ("green", "B03", 0.56), ("red", "B04", 0.665), ("nir", "B08", 0.842))


@dataclass(frozen=True, slots=True)
class Datatake:
    """One overpass, of which both granules have pictures."""

    start: datetime
    """Sensing start, UTC."""
    platform: str
    """``sentinel-2a`` or ``sentinel-2b``."""
    orbit: int
    """Absolute orbit number."""
    cloud_share: float
    """Share of each granule under clouds, 0..1."""
    offset_applied: bool
    """True: the pixels have the offset of baseline 04.00 removed; False: DN = 1e4 x reflectance + 1000."""
    swath_edge: bool = False
    """True: the western granule lies partly outside the swath."""


DATATAKES = (
    Datatake(datetime(2024, 4, 9, 10, 0, 31), "sentinel-2a", 45953, 0.07, False),
    Datatake(datetime(2024, 4, 24, 10, 0, 29), "sentinel-2b", 37259, 0.36, True),
    Datatake(datetime(2024, 6, 8, 10, 0, 31), "sentinel-2a", 46811, 0.14, True),
    Datatake(datetime(2024, 6, 23, 10, 0, 29), "sentinel-2b", 38117, 0.05, True, swath_edge=True),
)
"""Two in April and two in June of 2024; none in May."""


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    """The pixels of one granule of a datatake."""

    bands: NDArray[np.uint16]
    """Shape (4, y, x) in the order of ``_FILES``. DN, 0 outside the swath."""
    scl: NDArray[np.uint8]
    """Shape (y / 2, x / 2). Scene classification, 0 outside the swath."""


def write_scenes(
    folder: Path, seed: int, layout: Layout, ground: Ground, tile_px: int
) -> Iterator[list[JSON]]:
    """Write the COGs of each datatake and yield its two items.

    Parameters
    ----------
    folder
        Of the collection; each scene gets a folder in it.
    seed
        The world's seed.
    layout, ground
        The world.
    tile_px
        Internal tiles of the 10 m bands; SCL's are half as large, at least 128.
    """
    for number, take in enumerate(DATATAKES):
        items = []
        for index, (granule, grid) in enumerate(zip(GRANULES, layout.granules, strict=True)):
            name = f"S{take.platform[-2:].upper()}_{granule}_{take.start:%Y%m%d}_0_L2A"
            picture = _take_picture((seed, 20 + number, index), take, layout.optical, ground.window(grid))
            _write_files(folder / name, picture, grid, tile_px)
            items.append(_item(name, take, index, layout, picture.scl))
        yield items


def _take_picture(seed: tuple[int, int, int], take: Datatake, area: Grid, ground: Ground) -> _Picture:
    """Picture a granule's ground, under clouds and noise of its own; ``area`` is what both granules cover.

    Real granules of a pass are corrected and classified apart. Here they differ all over, so that it shows whose
    pixels fill whose gaps.
    """
    grid = ground.grid
    clouds = make_clouds((*seed, 1), grid, take.cloud_share)
    spectra = spectra_on(take.start.timetuple().tm_yday)
    picture = _Picture(
        np.empty((len(_FILES), grid.height, grid.width), np.uint16),
        np.empty((grid.height // 2, grid.width // 2), np.uint8),
    )

    def paint(start: int) -> None:
        strip = grid.rows(start, start + _STRIP_ROWS)
        stop = start + strip.height
        part = _Picture(picture.bands[:, start:stop], picture.scl[start // 2 : stop // 2])
        rng = np.random.default_rng((*seed, 2, start))
        _paint(part, take, ground.window(strip), clouds, (rng, spectra))
        if take.swath_edge:
            outside = _outside_swath(area, strip)
            part.bands[:, outside] = 0
            part.scl[outside[::2, ::2]] = 0

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(paint, range(0, grid.height, _STRIP_ROWS)))
    return picture


def _paint(
    part: _Picture,
    take: Datatake,
    ground: Ground,
    clouds: Clouds,
    light: tuple[np.random.Generator, NDArray[np.float32]],
) -> None:
    """Fill the arrays of a strip; ``light`` is the source of noise and the day's spectra."""
    rng, spectra = light
    opacity = clouds.opacity(ground.grid.y)
    shadow = clouds.shadow(ground.grid.y)
    sums = np.zeros((2, *part.scl.shape), np.float32)  # red and nir, for NDVI
    for band in range(len(_FILES)):
        value = ground.reflectance(spectra, band)
        if band >= 2:
            sums[band - 2] = _quads(value).sum(axis=(1, 3))
        value = add_clouds(value, band, opacity, shadow)
        value += np.float32(_NOISE) * rng.standard_normal(value.shape, np.float32)
        dn = np.rint(value * 1e4) + (0 if take.offset_applied else 1000)
        part.bands[band] = np.clip(dn, 1, 65535)
    ndvi = (sums[1] - sums[0]) / (sums[1] + sums[0])
    part.scl[:] = np.where(ndvi > 0.4, 4, 5)
    part.scl[_quads(ground.cover <= Cover.LAKE).sum(axis=(1, 3)) >= 2] = 6
    part.scl[_quads(shadow).max(axis=(1, 3)) > 0] = 3
    thick = _quads(opacity).max(axis=(1, 3))
    for least, label in ((0.0, 10), (0.25, 8), (0.65, 9)):
        part.scl[thick > least] = label


def _quads(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return a view of shape (y / 2, 2, x / 2, 2): the four 10 m pixels of each 20 m pixel."""
    return values.reshape(values.shape[0] // 2, 2, values.shape[1] // 2, 2)


def _edge_x(area: Grid, y: NDArray[np.float64], bow: float) -> NDArray[np.float64]:
    """Return the easting (m) of the swath's west edge, which leans as the orbit does and bows a little."""
    _, south, _, north = area.bounds
    down = (north - y) / (north - south)
    width = area.width * area.pixel_m
    edge: NDArray[np.float64] = area.x0 + width * (0.22 - 0.17 * down + bow * down * (1 - down))
    return edge


def _outside_swath(area: Grid, strip: Grid) -> NDArray[np.bool_]:
    """Return True where a pixel of the strip is outside, in whole 20 m pixels; shape of the strip."""
    y20 = strip.y.reshape(-1, 2).mean(axis=1).repeat(2)
    x20 = strip.x.reshape(-1, 2).mean(axis=1).repeat(2)
    outside: NDArray[np.bool_] = x20 < _edge_x(area, y20, 0.012)[:, None]
    return outside


def _write_files(folder: Path, part: _Picture, grid: Grid, tile_px: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    style, half = CogStyle(tile_px, "AVERAGE"), CogStyle(max(128, tile_px // 2), "NEAREST")
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(write_cog, folder / f"{code}.tif", pixels, grid, style)
            for (_, code, _), pixels in zip(_FILES, part.bands, strict=True)
        ]
        jobs.append(pool.submit(write_cog, folder / "SCL.tif", part.scl, _half(grid), half))
    for job in jobs:
        job.result()


def _footprint(take: Datatake, number: int, layout: Layout) -> tuple[tuple[float, float], ...]:
    """Return (x, y) of a granule's outline; along a swath edge it is a straight line, as in real items."""
    west, south, east, north = layout.granules[number].bounds
    if not (take.swath_edge and number == 0):
        return ((west, north), (west, south), (east, south), (east, north))
    top, bottom = _edge_x(layout.optical, np.array([north, south], np.float64), 0.0)
    return ((float(top), north), (float(bottom), south), (east, south), (east, north))


def _item(name: str, take: Datatake, number: int, layout: Layout, scl: NDArray[np.uint8]) -> JSON:
    granule, grid = GRANULES[number], layout.granules[number]
    share = np.bincount(scl.ravel(), minlength=12) / scl.size
    seen = max(1 - share[0], 1e-9)
    sensed = take.start + timedelta(seconds=251.4 + 3.2 * number)
    properties = {
        "datetime": f"{sensed:%Y-%m-%dT%H:%M:%S.%f}Z",
        "created": f"{take.start + timedelta(hours=9):%Y-%m-%dT%H:%M:%SZ}",
        "platform": take.platform,
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": round(float(100 * share[8:11].sum() / seen), 6),
        "mgrs:utm_zone": int(granule[:2]),
        "mgrs:latitude_band": granule[2],
        "mgrs:grid_square": granule[3:],
        "grid:code": f"MGRS-{granule}",
        "s2:mgrs_tile": granule,
        "s2:processing_baseline": _BASELINE,
        "s2:datatake_id": f"G{name[:3]}_{take.start:%Y%m%dT%H%M%S}_{take.orbit:06d}_N{_BASELINE}",
        "s2:sequence": "0",
        "s2:nodata_pixel_percentage": round(float(100 * share[0]), 6),
        "s2:cloud_shadow_percentage": round(float(100 * share[3]), 6),
        "s2:vegetation_percentage": round(float(100 * share[4]), 6),
        "s2:not_vegetated_percentage": round(float(100 * share[5]), 6),
        "s2:water_percentage": round(float(100 * share[6]), 6),
        "earthsearch:boa_offset_applied": take.offset_applied,
    }
    raster = {"nodata": 0, "data_type": "uint16", "bits_per_sample": 15, "scale": 1e-4, "offset": -0.1}
    assets = {
        key: asset(
            f"{code}.tif",
            grid,
            raster,
            {"name": key, "common_name": key, "center_wavelength": wavelength},
            ("data", "reflectance"),
        )
        for key, code, wavelength in _FILES
    }
    assets["scl"] = asset("SCL.tif", _half(grid), {"nodata": 0, "data_type": "uint8"}, None, ("data",))
    return item(COLLECTION, name, _footprint(take, number, layout), properties, assets)


def _half(grid: Grid) -> Grid:
    return Grid(grid.x0, grid.y0, 20, grid.height // 2, grid.width // 2)
