# SPDX-License-Identifier: Apache-2.0
"""The grid of a cube: where the records' own pixels lie, so that none is shifted."""

from __future__ import annotations

from math import isclose

import numpy as np
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.warp import calculate_default_transform

from rasteret_dask.crs import text
from rasteret_dask.errors import GridError
from rasteret_dask.extent import MOST_PX, metres, unit_of
from rasteret_dask.grid import Bounds, bounds_in, northern
from rasteret_dask.net.remote import redact
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.reader.pixelgrid import Grid, crs_of
from rasteret_dask.table.records import Level

__all__ = ["native_grid"]


def native_grid(
    source: ResolvedSource,
    epsg: int | None,
    bounds: tuple[float, float, float, float] | None,
    bounds_latlon: tuple[float, float, float, float] | None,
    *,
    square: bool,
) -> tuple[Grid, tuple[int, int]]:
    """Return the grid of a cube and its shape (height, width).

    Explicit ``bounds`` are taken exactly, in squares, as those of a chip; otherwise the grid is that of the first
    member's records, so that no pixel is shifted. Pixels of another shape then stay as they are, unless ``square``.
    In a CRS of another unit than the records' own, pixels are as large as GDAL would make them, unless the plan says
    a size.

    Raises
    ------
    GridError
        When the records have several CRSs and none is asked for, bounds hold no whole number of pixels, or there would
        be more pixels than a raster may have.
    """
    resolution = source.plan.resolution
    codes = np.unique(source.records.epsg)
    if epsg is None:
        if len(codes) > 1:
            raise GridError(
                f"cube of {source.plan.name!r}", f"records in {', '.join(map(text, codes.tolist()))}", "one CRS",
                "Choose one with crs=, or use cubes() for one cube a zone.",
            )  # fmt: skip
        epsg = int(codes[0])
    if source.native and not any(isclose(metres(epsg), metres(int(code)), rel_tol=1e-9) for code in codes):
        resolution = _resolution_in(source, epsg)
    if bounds is not None:
        return _exact(epsg, bounds, resolution)
    corner, size = (0.0, 0.0), (resolution, resolution)
    if epsg in codes:
        first = int(np.flatnonzero(source.records.epsg == epsg)[0])
        bands = source.plan.members[source.member[first]].bands
        corner = north_west(source.records.asset(first, bands[0]).image)
        size = size if square else _shape_of_pixels(source, first, bands)
    box = _hull(source, epsg) if bounds_latlon is None else _projected(bounds_latlon, epsg)
    xres, yres = size
    x0 = corner[0] + np.floor((box[0] - corner[0]) / xres + 1e-6) * xres
    y0 = corner[1] + np.ceil((box[3] - corner[1]) / yres - 1e-6) * yres
    width = int(np.ceil((box[2] - x0) / xres - 1e-6))
    height = int(np.ceil((y0 - box[1]) / yres - 1e-6))
    _countable(source, epsg, (height, width), size)
    return Grid(epsg, float(x0), float(y0), xres, yres), (height, width)


def _countable(source: ResolvedSource, epsg: int, shape: tuple[int, int], size: tuple[float, float]) -> None:
    """Refuse more pixels than a raster may have, before anything is made of them."""
    if not 0 < max(shape) <= MOST_PX:
        raise GridError(
            f"cube of {source.plan.name!r}",
            f"{shape[1]:,} x {shape[0]:,} pixels of {size[0]:g} x {size[1]:g} {unit_of(epsg)} ({text(epsg)})",
            f"at most {MOST_PX:,} a side",
            "Say a pixel size in that unit, resolution=, or less ground, bounds=.",
        )


def _resolution_in(source: ResolvedSource, epsg: int) -> float:
    """Return how large GDAL would make the pixels of the first record in a CRS of another unit."""
    image = source.records.asset(0, source.plan.members[source.member[0]].bands[0]).image
    a, _, c, _, e, f = image.transform
    (west, east), (south, north) = sorted((c, c + a * image.width)), sorted((f, f + e * image.height))
    crs = crs_of(int(source.records.epsg[0])), crs_of(epsg)
    try:
        transform, _, _ = calculate_default_transform(
            *crs, image.width, image.height, west, south, east, north
        )
    except (RasterioError, CPLE_BaseError) as error:
        failure = GridError(
            f"cube of {source.plan.name!r} in {text(epsg)}", redact(str(error)), "a CRS that shows the records",
            "Say bounds= and resolution= in it.",
        )  # fmt: skip
    else:
        return float(transform.a)
    raise failure  # outside of the except block: what rasterio chains to its errors does not unpickle


def north_west(image: Level) -> tuple[float, float]:
    """Return the corner (x, y) that a raster's rows and columns begin at when they are counted from the north-west."""
    a, _, c, _, e, f = image.transform
    return min(c, c + a * image.width), max(f, f + e * image.height)


def _shape_of_pixels(source: ResolvedSource, row: int, bands: tuple[str, ...]) -> tuple[float, float]:
    """Return width and height of a record's pixels whose finer side is the source's resolution; else a square."""
    resolution = source.plan.resolution
    for band in bands:
        a, _, _, _, e, _ = source.records.asset(row, band).image.transform
        sides = (abs(a), abs(e))
        if abs(min(sides) - resolution) <= 1e-9 * resolution:
            return tuple(resolution if s == min(sides) else s for s in sides)  # type: ignore[return-value]
    return resolution, resolution


def _projected(bounds_latlon: tuple[float, float, float, float], epsg: int) -> Bounds:
    """Return a box in degrees as one of a CRS; beyond 180 degrees where the CRS counts in them too."""
    if len(bounds_latlon) != 4 or not bounds_latlon[1] < bounds_latlon[3]:
        raise GridError(
            "cube(bounds_latlon=)", repr(bounds_latlon), "(west, south, east, north), south < north"
        )
    return _unwrapped(bounds_in(bounds_latlon, 4326, epsg))


def _unwrapped(box: Bounds) -> Bounds:
    return (box[0], box[1], box[2] + 360.0, box[3]) if box[2] < box[0] else box


def _exact(
    epsg: int, bounds: tuple[float, float, float, float], resolution: float
) -> tuple[Grid, tuple[int, int]]:
    if len(bounds) != 4:
        raise GridError("cube(bounds=)", repr(bounds), "(xmin, ymin, xmax, ymax) in the cube's CRS")
    xmin, ymin, xmax, ymax = bounds
    if not (xmin < xmax and ymin < ymax):
        raise GridError("cube(bounds=)", repr(bounds), "xmin < xmax and ymin < ymax")
    width, height = (xmax - xmin) / resolution, (ymax - ymin) / resolution
    if max(abs(width - round(width)), abs(height - round(height))) > 1e-6:
        raise GridError(
            "cube(bounds=)", f"{width:.6g} x {height:.6g} pixels of {resolution:g}", "whole pixels"
        )
    return Grid(epsg, xmin, ymax, resolution, resolution), (round(height), round(width))


def _hull(source: ResolvedSource, epsg: int) -> tuple[float, float, float, float]:
    """Return the bounds of all records in a CRS: xmin, ymin, xmax, ymax."""
    boxes = []
    for row in range(len(source.records)):
        band = source.plan.members[source.member[row]].bands[0]
        level = source.records.asset(row, band).image
        a, _, c, _, e, f = level.transform
        own = int(source.records.epsg[row])
        x, y = sorted((c, c + a * level.width)), sorted((f, f + e * level.height))
        box = (x[0], y[0], x[1], y[1])
        if own != epsg:
            code, shift = northern(own)
            moved = (x[0], y[0] + shift, x[1], y[1] + shift)
            box = moved if code == epsg else _unwrapped(bounds_in(box, own, epsg))
        boxes.append(box)
    array = np.array(boxes)
    return (*array[:, :2].min(0).tolist(), *array[:, 2:].max(0).tolist())
