"""Ground outlines in lon/lat, also across the antimeridian and at the poles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from shapely.geometry import shape

__all__ = ["area_of", "corners_of", "outline_of"]


def outline_of(geometry: Any, bbox: Any, epsg: int | None = None) -> bytes | None:
    """Return an item's outline as WKB with longitudes from -180 to 180, in two parts where it crosses there.

    Parameters
    ----------
    geometry
        GeoJSON, or None: then the bbox is the outline.
    bbox
        (west, south, east, north), or six numbers with heights, or None; west of its east it crosses.
    epsg
        The record's CRS: no raster of a UTM zone is wider than half the world.

    Raises
    ------
    ValueError
        When coordinates are not degrees.
    """
    corners = corners_of(bbox)
    if not isinstance(geometry, Mapping) or not geometry.get("type"):
        return None if corners is None else bytes(shapely.to_wkb(area_of([corners])))
    outline = shapely.force_2d(shape(geometry))
    if outline.is_empty:
        return None if corners is None else bytes(shapely.to_wkb(area_of([corners])))
    points = shapely.get_coordinates(outline)
    if not np.isfinite(points).all() or np.abs(points[:, 0]).max() > 360 or np.abs(points[:, 1]).max() > 90:
        raise ValueError(f"a geometry that reaches to {_extremes(points)}, which are no degrees of lon/lat")
    if _crosses(points[:, 0], corners, epsg):
        outline = shapely.transform(outline, _eastwards)
    return bytes(shapely.to_wkb(_wrapped(outline)))


def corners_of(bbox: Any) -> tuple[float, float, float, float] | None:
    """Return (west, south, east, north) of a STAC bbox of four or six numbers, None where there is none.

    Raises
    ------
    ValueError
        When it holds no numbers.
    """
    if not isinstance(bbox, list | tuple) or len(bbox) not in (4, 6):
        return None
    flat = bbox if len(bbox) == 4 else (bbox[0], bbox[1], bbox[3], bbox[4])
    west, south, east, north = (float(v) for v in flat)
    if not np.isfinite([west, south, east, north]).all():
        return None
    return west, south, east, north


def area_of(boxes: Sequence[Sequence[float]]) -> Any:
    """Return (west, south, east, north) boxes as one shape; west of its east a box crosses the antimeridian."""
    parts = []
    for west, south, east, north in boxes:
        parts.append(_wrapped(shapely.box(west, south, east + 360 if west > east else east, north)))
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _crosses(lon: Any, corners: tuple[float, ...] | None, epsg: int | None) -> bool:
    """Return whether an outline written with jumps from 180 to -180 means the short way round."""
    width = lon.max() - lon.min()
    if width <= 180:
        return False
    if corners is not None and corners[0] > corners[2]:
        return True
    utm = epsg is not None and (32601 <= epsg <= 32660 or 32701 <= epsg <= 32760)
    return utm or bool(width < 360 and np.abs(lon).min() > 90)


def _eastwards(points: Any) -> Any:
    return np.column_stack([np.where(points[:, 0] < 0, points[:, 0] + 360, points[:, 0]), points[:, 1]])


def _wrapped(outline: Any) -> Any:
    """Return a shape with what lies beyond 180 degrees moved to where it is."""
    west, _, east, _ = outline.bounds
    if west >= -180 and east <= 180:
        return outline
    outline = shapely.make_valid(outline)
    parts = []
    for turn in (-360.0, 0.0, 360.0):
        part = shapely.intersection(outline, shapely.box(turn - 180, -90, turn + 180, 90))
        pieces = shapely.get_parts(shapely.transform(part, lambda p, t=turn: p - np.array([t, 0.0])))
        # a shape that only touches the meridian leaves a line there
        parts += [p for p in pieces if shapely.get_dimensions(p) == shapely.get_dimensions(outline)]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _extremes(points: Any) -> str:
    west, south = np.nanmin(points, axis=0)
    east, north = np.nanmax(points, axis=0)
    return f"({west:g}, {south:g}, {east:g}, {north:g})"
