# SPDX-License-Identifier: Apache-2.0
"""More of the made-up world: radar, heights and land cover of the same ground, in grids and types of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.warp import reproject

from rasteret_dask.demo.world.files import JSON, CogStyle, asset, item, write_cog, write_collection
from rasteret_dask.demo.world.ground import Ground, hills_of, make_ground
from rasteret_dask.demo.world.layout import EPSG, Grid, Layout, WorldSize, lonlat_bbox, make_layout
from rasteret_dask.demo.world.spectra import Cover

__all__ = ["MoreSensors", "make_more_sensors"]

_CREDIT = "Made up by rasteret_dask; no real place was measured."
_RADAR, _HEIGHTS, _COVER = "sentinel-1-rtc", "cop-dem-glo-30", "esa-worldcover"
_PASSES = (("2024-04-06", "ascending"), ("2024-05-05", "descending"), ("2024-06-11", "ascending"))
_LOOKS = 4.4
"""Looks of a ground range detected image: speckle is a gamma distribution of this shape."""
_BORDER_M = 400
_VOID = -32768

_POWER_DB: Mapping[Cover, tuple[float, float]] = {
    Cover.WATER: (-22, -29), Cover.LAKE: (-21, -28), Cover.BROADLEAF: (-9, -15), Cover.CONIFER: (-9.5, -15.5),
    Cover.MEADOW: (-12.5, -19.5), Cover.WINTER_CEREAL: (-13.5, -20), Cover.RAPESEED: (-11, -16.5),
    Cover.MAIZE: (-11, -18), Cover.BEET: (-11.5, -18), Cover.FALLOW: (-13, -21), Cover.GARDEN: (-8, -15),
    Cover.RED_ROOF: (-3, -12), Cover.GREY_ROOF: (-3, -12), Cover.HALL: (0, -10), Cover.ASPHALT: (-17, -25),
    Cover.TRACK: (-15, -23),
}  # fmt: skip
"""Decibels of VV and VH."""

_CLASSES: Mapping[Cover, int] = {
    Cover.WATER: 80, Cover.LAKE: 80, Cover.BROADLEAF: 10, Cover.CONIFER: 10, Cover.MEADOW: 30, Cover.GARDEN: 50,
    Cover.RED_ROOF: 50, Cover.GREY_ROOF: 50, Cover.HALL: 50, Cover.ASPHALT: 50, Cover.TRACK: 60,
}  # fmt: skip
"""ESA WorldCover's codes; what is not listed is cropland, 40."""
_NAMES = {10: "Tree cover", 30: "Grassland", 40: "Cropland", 50: "Built-up", 60: "Bare", 80: "Water"}


@dataclass(frozen=True, slots=True)
class MoreSensors:
    """Where the catalogs of the further collections are."""

    radar: Path
    """``collection.json`` of ``sentinel-1-rtc``: power of VV and VH in UTM, float32."""
    heights: Path
    """``collection.json`` of ``cop-dem-glo-30``: metres in degrees of longitude and latitude, float32."""
    cover: Path
    """``collection.json`` of ``esa-worldcover``: classes in degrees, of one year."""


def make_more_sensors(folder: Path, *, seed: int = 7, size: WorldSize | None = None) -> MoreSensors:
    """Make radar scenes, heights and land cover over the ground of :func:`rasteret_dask.demo.world.make_world`.

    Parameters
    ----------
    folder
        Where they go, a folder a collection; the world's own folder will do.
    seed, size
        Those of the world.

    Returns
    -------
    MoreSensors
        The paths of the three catalogs.
    """
    folder, layout = Path(folder), make_layout(size or WorldSize())
    ground = make_ground(seed, layout.canvas)
    tile_px = (size or WorldSize()).tile_px
    return MoreSensors(
        _write_radar(folder / _RADAR, seed, layout, ground.window(layout.optical), tile_px),
        _write_heights(folder / _HEIGHTS, seed, layout, tile_px),
        _write_cover(folder / _COVER, layout, ground, tile_px),
    )


def _write_radar(folder: Path, seed: int, layout: Layout, ground: Ground, tile_px: int) -> Path:
    """Write a scene a pass; along the edges some files hold zeros instead of nodata, as real ones do."""
    grid, items = layout.optical, []
    margin = np.ones((grid.height, grid.width), np.bool_)
    inside = _BORDER_M // grid.pixel_m
    margin[:, inside:-inside] = False
    for number, (day, direction) in enumerate(_PASSES):
        name = f"S1A_IW_GRDH_1SDV_{day.replace('-', '')}T165812_rtc"
        assets = {}
        (folder / name).mkdir(parents=True, exist_ok=True)
        for band, key in enumerate(("vv", "vh")):
            table = np.array([10 ** (_POWER_DB[cover][band] / 10) for cover in Cover], np.float32)
            rng = np.random.default_rng([seed, 80 + number, band])
            power = table[ground.cover] * rng.gamma(_LOOKS, 1 / _LOOKS, margin.shape).astype(np.float32)
            power[margin] = _VOID if number % 2 else 0
            write_cog(folder / name / f"{key}.tif", power, grid, CogStyle(tile_px, "AVERAGE", _VOID))
            raster = {"nodata": _VOID, "data_type": "float32"}
            assets[key] = asset(f"{key}.tif", grid, raster, {"name": key.upper()}, ("data",))
        properties = {
            "datetime": f"{day}T16:58:12Z", "platform": "SENTINEL-1A", "constellation": "Sentinel-1",
            "sat:orbit_state": direction, "sat:relative_orbit": 44 + 51 * number, "sar:product_type": "GRD",
            "sar:instrument_mode": "IW", "sar:polarizations": ["VV", "VH"],
        }  # fmt: skip
        west, south, east, north = grid.bounds
        corners = ((west, north), (west, south), (east, south), (east, north))
        items.append(item(_RADAR, name, corners, properties, assets))
    return write_collection(folder, _RADAR, _CREDIT, items)


def _write_heights(folder: Path, seed: int, layout: Layout, tile_px: int) -> Path:
    """Write heights in one-arcsecond rows and 1.5-arcsecond columns, as Copernicus DEM has them at 50 N."""
    canvas = layout.canvas
    coarse = Grid(canvas.x0, canvas.y0, 30, canvas.height // 3, canvas.width // 3)
    metres = (310 + 45 * hills_of(seed, canvas).along(coarse.x).at(coarse.y)).astype(np.float32)
    values, place = _in_degrees(metres, coarse, layout.optical, (1.5 / 3600, 1 / 3600), Resampling.bilinear)
    properties = {"datetime": "2021-04-22T00:00:00Z", "platform": "TanDEM-X", "gsd": 30}
    item_ = _degrees_item(
        _HEIGHTS, "DSM", properties, (values.shape, place), {"data_type": "float32", "unit": "metre"}, "data"
    )
    _write_degrees(folder / "DSM" / "data.tif", values, place, tile_px, {})
    return write_collection(folder, _HEIGHTS, _CREDIT, [item_])


def _write_cover(folder: Path, layout: Layout, ground: Ground, tile_px: int) -> Path:
    """Write classes in pixels of 1/12000 degree, as ESA WorldCover has them."""
    table = np.array([_CLASSES.get(cover, 40) for cover in Cover], np.uint8)
    values, place = _in_degrees(
        table[ground.cover], ground.grid, layout.optical, (1 / 12000, 1 / 12000), Resampling.nearest
    )
    classes = [{"value": code, "description": name} for code, name in _NAMES.items()]
    properties = {
        "datetime": None, "start_datetime": "2021-01-01T00:00:00Z", "end_datetime": "2021-12-31T23:59:59Z",
    }  # fmt: skip
    name = "ESA_WorldCover_10m_2021"
    item_ = _degrees_item(
        _COVER, name, properties, (values.shape, place), {"nodata": 0, "data_type": "uint8"}, "map"
    )
    item_["assets"]["map"]["classification:classes"] = classes
    _write_degrees(folder / name / "map.tif", values, place, tile_px, {"nodata": 0})
    return write_collection(folder, _COVER, _CREDIT, [item_])


def _in_degrees(
    values: NDArray[Any], grid: Grid, area: Grid, pixel: tuple[float, float], kernel: Resampling
) -> tuple[NDArray[Any], Affine]:
    """Return values of the UTM grid around an area in pixels of degrees (x, y), and their transform."""
    west, south, east, north = lonlat_bbox(area)
    spare = 0.005
    x0, y0 = floor((west - spare) / pixel[0]) * pixel[0], ceil((north + spare) / pixel[1]) * pixel[1]
    shape = ceil((y0 - south + spare) / pixel[1]), ceil((east + spare - x0) / pixel[0])
    place = Affine(pixel[0], 0, x0, 0, -pixel[1], y0)
    result = np.zeros(shape, values.dtype)
    reproject(
        values, result, src_transform=grid.transform, src_crs=f"EPSG:{EPSG}", dst_transform=place,
        dst_crs="EPSG:4326", resampling=kernel,
    )  # fmt: skip
    return result, place


def _write_degrees(
    path: Path, values: NDArray[Any], place: Affine, tile_px: int, options: Mapping[str, Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = values.shape
    with rasterio.open(
        path, "w", "COG", width, height, 1, "EPSG:4326", place, values.dtype.name, blocksize=tile_px,
        compress="DEFLATE", predictor="YES", overview_resampling="NEAREST", **options,
    ) as file:  # fmt: skip
        file.write(values, 1)


def _degrees_item(
    collection: str, name: str, properties: Mapping[str, Any], raster: tuple[Sequence[int], Affine],
    band: Mapping[str, Any], key: str,
) -> JSON:  # fmt: skip
    """Return the STAC item of one file in degrees."""
    (height, width), place = raster
    west, north = place @ (0, 0)
    east, south = place @ (width, height)
    ring = [[west, north], [west, south], [east, south], [east, north], [west, north]]
    made = item(collection, name, ((0, 0),) * 4, properties, {})
    made |= {"geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [west, south, east, north]}
    made["properties"]["proj:epsg"] = 4326
    made["assets"] = {
        key: {
            "href": f"./{key}.tif", "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "roles": ["data"], "proj:shape": [height, width], "proj:transform": list(place)[:6],
            "raster:bands": [dict(band)],
        }
    }  # fmt: skip
    return made
