# SPDX-License-Identifier: Apache-2.0
"""Where a raster may lie: a code that is a map, pixels that have a size, and no more ground than the map holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, hypot, inf, isfinite, nan, pi, sqrt
from typing import Any

from numpy.typing import NDArray

from rasteret_dask.crs import crs_of, text
from rasteret_dask.errors import GridError
from rasteret_dask.grid import Bounds, bounds_in

__all__ = ["MOST_PX", "is_geographic", "metres", "misplaced", "north_up", "unit_of"]

MERIDIAN_M = 10_001_966.0
"""From the equator to a pole along the WGS 84 ellipsoid, metres."""

EQUATOR_M = 40_075_017.0
"""Once round the WGS 84 ellipsoid, metres."""

_FINEST_M = 1e-4  # a tenth of a millimetre: drones give centimetres
_FINEST_TURN = 1e-12  # the same, as a share of a full turn
_STRAY_TURN = 1 / 72  # 5 degrees: grids of points at every 10 degrees stick out by half a pixel
MOST_PX = 2**31 - 1
"""Along a side of a raster: TIFF counts further, GDAL and the records' columns do not."""


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far rasters of a CRS may reach, in its own units."""

    bounds: Bounds
    span: float
    """Width and height of the largest raster."""
    stray: float
    """How far it may stick out, at most; never by more than a pixel."""
    finest: float
    """Side of the smallest pixel."""
    unit: str
    geographic: bool


def misplaced(epsg: int, transform: Sequence[float] | NDArray[Any], width: int, height: int) -> str | None:
    """Return why no raster lies there, or None where one may.

    Parameters
    ----------
    epsg
        The CRS, as :func:`rasteret_dask.crs.number` counts it.
    transform
        (a, b, c, d, e, f): pixel to CRS.
    width, height
        Pixels.

    Notes
    -----
    A projected CRS may be used as far as a quarter of the Earth beyond its area of use: southern Landsat scenes lie
    in northern UTM zones, and mosaics of a continent in one zone. Longitudes may count from -360 to 360 degrees. A
    raster may stick out by a pixel, as global grids of points do.
    """
    if not (1 <= width <= MOST_PX and 1 <= height <= MOST_PX):
        return f"size of {width:.7g} x {height:.7g} pixels"
    a, b, c, d, e, f = (float(v) for v in transform)
    if not all(isfinite(v) for v in (a, b, c, d, e, f)) or a * e - b * d == 0:
        return f"transform {(a, b, c, d, e, f)}, whose pixels have no size"
    reach = _reach(int(epsg))
    if isinstance(reach, str):
        return reach
    pixel = max(hypot(a, d), hypot(b, e))
    if min(hypot(a, d), hypot(b, e)) < reach.finest:
        return f"pixels of {abs(a):.4g} x {abs(e):.4g} {reach.unit}"
    x = [c + i * a + j * b for i in (0, width) for j in (0, height)]
    y = [f + i * d + j * e for i in (0, width) for j in (0, height)]
    stray = min(pixel, reach.stray)
    xmin, ymin, xmax, ymax = reach.bounds
    wide = max(max(x) - min(x), max(y) - min(y)) > reach.span + 2 * stray
    far = min(x) < xmin - stray or max(x) > xmax + stray or min(y) < ymin - stray or max(y) > ymax + stray
    if wide or far:
        return (
            f"{width} x {height} pixels of {hypot(a, d):.6g} x {hypot(b, e):.6g} {reach.unit}, from "
            f"({min(x):.7g}, {min(y):.7g}) to ({max(x):.7g}, {max(y):.7g}), which is beyond {text(epsg)}"
        )
    return None


def north_up(transform: Sequence[float], shape: tuple[int, int]) -> tuple[tuple[float, ...], tuple[int, int]]:
    """Return the north-up raster around a turned one: its transform and (height, width), with pixels as large."""
    a, b, c, d, e, f = (float(v) for v in transform[:6])
    height, width = shape
    x = [c + i * a + j * b for i in (0, width) for j in (0, height)]
    y = [f + i * d + j * e for i in (0, width) for j in (0, height)]
    side = sqrt(abs(a * e - b * d))
    size = ceil((max(y) - min(y)) / side - 1e-9), ceil((max(x) - min(x)) / side - 1e-9)
    return (side, 0.0, min(x), 0.0, -side, max(y)), size


def is_geographic(epsg: int) -> bool:
    """Return whether a CRS counts in degrees (or grads); of an unknown one, it does not."""
    reach = _reach(int(epsg))
    return isinstance(reach, _Reach) and reach.geographic


def metres(epsg: int) -> float:
    """Return how many metres a unit of a CRS is; of a degree, at the equator; of an unknown CRS, NaN."""
    reach = _reach(int(epsg))
    return nan if isinstance(reach, str) else EQUATOR_M / reach.span


def unit_of(epsg: int) -> str:
    """Return what the unit of a CRS is called: ``"m"``, ``"degrees"``; ``"units"`` of an unknown CRS."""
    reach = _reach(int(epsg))
    return "units" if isinstance(reach, str) else reach.unit


@lru_cache(maxsize=1024)
def _reach(epsg: int) -> _Reach | str:
    """Return the reach of a CRS, or why it has none."""
    try:
        crs = crs_of(epsg)
    except GridError as error:
        return f"{text(epsg)}, a code that PROJ does not know" if epsg > 0 else error.found
    if crs.is_geographic:
        turn = 2 * pi / _factor(crs)
        bounds = (-turn, -turn / 4, turn, turn / 4)
        return _Reach(bounds, turn, turn * _STRAY_TURN, turn * _FINEST_TURN, _unit(crs), True)
    if not crs.is_projected:
        return f"{text(epsg)} ({crs.name}), which is no map"
    unit = _factor(crs)
    round_earth, quarter = EQUATOR_M / unit, MERIDIAN_M / unit
    bounds = _used(crs, epsg) or (-inf, -inf, inf, inf)
    bounds = (bounds[0] - quarter, bounds[1] - quarter, bounds[2] + quarter, bounds[3] + quarter)
    return _Reach(bounds, round_earth, quarter, _FINEST_M / unit, _unit(crs), False)


def _used(crs: Any, epsg: int) -> Bounds | None:
    """Return the area of use in the CRS itself, None where EPSG tells of none that can be projected."""
    if crs.area_of_use is None:
        return None
    try:
        return bounds_in(crs.area_of_use.bounds, 4326, epsg)
    except GridError:
        return None


def _factor(crs: Any) -> float:
    """Return metres, or radians, a unit."""
    return float(crs.axis_info[0].unit_conversion_factor)


def _unit(crs: Any) -> str:
    name = str(crs.axis_info[0].unit_name)
    return {"metre": "m", "degree": "degrees"}.get(name, name)
