# SPDX-License-Identifier: Apache-2.0
"""Ground outlines in lon/lat, also across the antimeridian and over the poles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil, floor
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import shape

from rasteret_dask.grid import is_utm

__all__ = [
    "area_of",
    "box_around",
    "box_of",
    "corners_of",
    "outline_of",
    "outline_of_ring",
    "placed",
    "placed_wkb",
    "within_world",
]

HALF_TURN = 180.0
"""Degrees. An edge that is longer can be the short way round, across the antimeridian."""

POLAR_DEG = 45.0
"""Outlines wholly beyond this latitude go round the pole the short way; nobody draws half the world there."""


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
    crosses = (epsg is not None and is_utm(epsg)) or (corners is not None and corners[0] > corners[2])

    def short(ring: NDArray[np.float64]) -> bool:
        return crosses or _goes_round(ring)

    return bytes(shapely.to_wkb(_placed(outline, short)))


def outline_of_ring(lonlat: NDArray[np.float64]) -> bytes:
    """Return the ground inside of a closed line of many points, shape (point, 2), as WKB like an item's outline."""
    return bytes(shapely.to_wkb(_placed(shapely.Polygon(lonlat), lambda ring: True)))


def within_world(area: Any) -> Any:
    """Return a shape in lon/lat with longitudes from -180 to 180, whichever way they are counted.

    Edges longer than half the world are the short way round where all longitudes lie beyond 90 degrees, or all
    latitudes beyond 45; a rectangle is then taken at its word unless it is wound clockwise, which in GeoJSON
    (RFC 7946, 3.1.6) only the outside of a polygon is.
    """

    def short(ring: NDArray[np.float64]) -> bool:
        far = np.abs(ring).min(axis=0)
        if _is_rectangle(ring):
            return bool(far[0] > HALF_TURN / 2) and not shapely.is_ccw(shapely.LinearRing(ring))
        return bool(far[0] > HALF_TURN / 2 or far[1] >= POLAR_DEG)

    return _placed(area, short)


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
        parts.append(_cut(shapely.box(west, south, east + 360 if west > east else east, north)))
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def placed(outlines: NDArray[Any]) -> NDArray[Any]:
    """Return outlines of records, shape (record,), within the world; most of them are there already."""
    box = shapely.bounds(outlines)
    beyond = np.flatnonzero(
        (box[:, 0] < -HALF_TURN) | (box[:, 2] > HALF_TURN) | (box[:, 2] - box[:, 0] > HALF_TURN)
    )
    if not len(beyond):
        return outlines
    result = outlines.copy()
    for number in beyond:
        result[number] = _placed(outlines[number], _goes_round)
    return result


def placed_wkb(outline: bytes) -> bytes:
    """Return one outline within the world; the same bytes where it is there already."""
    (before,) = given = np.array([shapely.from_wkb(outline)], dtype=object)
    (after,) = placed(given)
    return outline if after is before else bytes(shapely.to_wkb(after))


def box_around(area: Any) -> tuple[float, float, float, float]:
    """Return (west, south, east, north) of a shape within the world; west of its east across the antimeridian."""
    west, south, east, north = (float(v) for v in shapely.bounds(area))
    parts = shapely.bounds(shapely.get_parts(area))
    eastern = parts[:, 0] >= 0
    if east - west > HALF_TURN and np.all(eastern | (parts[:, 2] <= 0)):
        west, east = float(parts[eastern, 0].min()), float(parts[~eastern, 2].max())
    return west, south, east, north


def box_of(outline: bytes | None, corners: Sequence[float] | None) -> list[float] | None:
    """Return west, south, east, north of a record: its own corners, where they lie around its outline.

    Parameters
    ----------
    outline
        As :func:`outline_of` returns it. Across the antimeridian its box is the whole circle, so that no filter of
        boxes overlooks it; outlines then decide.
    corners
        What the record gives as its box, or None.
    """
    if outline is None:
        return None if corners is None else [float(v) for v in corners]
    bounds = [float(v) for v in shapely.from_wkb(outline).bounds]
    if corners is None or len(corners) != 4 or corners[0] < -HALF_TURN or corners[2] > HALF_TURN:
        return bounds
    west, south, east, north = (float(v) for v in corners)
    around = west <= bounds[0] and south <= bounds[1] and east >= bounds[2] and north >= bounds[3]
    return [west, south, east, north] if around else bounds


def _goes_round(ring: NDArray[np.float64]) -> bool:
    return not _is_rectangle(ring) or bool(np.abs(ring[:, 0]).min() > HALF_TURN / 2)


def _placed(outline: Any, short: Callable[[NDArray[np.float64]], bool]) -> Any:
    """Return an outline within -180 to 180 degrees; ``short`` tells which rings go the short way round."""
    parts = shapely.get_parts(outline)
    while np.any(shapely.get_type_id(parts) >= 4):  # parts of a collection may have parts
        parts = shapely.get_parts(parts)
    moved = [_cut(_unrolled(part, short) if part.geom_type == "Polygon" else part) for part in parts]
    if all(after is before for after, before in zip(moved, parts, strict=True)):
        return outline
    return moved[0] if len(moved) == 1 else shapely.union_all(moved)


def _unrolled(polygon: Any, short: Callable[[NDArray[np.float64]], bool]) -> Any:
    """Return a polygon whose edges that are meant to go the short way do, past 180 degrees or up to a pole."""
    ring = shapely.get_coordinates(polygon.exterior)
    steps = np.abs(np.diff(ring[:, 0]))
    if steps.max(initial=0.0) <= HALF_TURN or steps.max() >= 2 * HALF_TURN or not short(ring):
        return polygon
    ground = shapely.make_valid(_along(ring))
    holes = [shapely.make_valid(_along(shapely.get_coordinates(hole))) for hole in polygon.interiors]
    turned = [_shifted(hole, turn) for hole, turn in product(holes, (-360.0, 0.0, 360.0))]
    return shapely.difference(ground, shapely.union_all(turned)) if turned else ground


def _along(ring: NDArray[np.float64]) -> Any:
    """Return the polygon of a ring whose longitudes count on beyond 180; round a pole it reaches up to it."""
    steps = np.diff(ring[:, 0])
    steps = np.where(np.abs(steps) > HALF_TURN, steps - 360.0 * np.round(steps / 360.0), steps)
    lon = ring[0, 0] + np.append(0.0, np.cumsum(steps))
    points = np.column_stack([lon, ring[:, 1]])
    if abs(lon[-1] - lon[0]) > HALF_TURN:
        pole = np.copysign(90.0, ring[:, 1].mean())
        points = np.vstack([points, [(lon[-1], pole), (lon[0], pole)]])
    return shapely.Polygon(points)


def _is_rectangle(ring: NDArray[np.float64]) -> bool:
    return all(len(np.unique(column)) == 2 for column in ring.T)


def _cut(outline: Any) -> Any:
    """Return a shape with what lies beyond 180 degrees moved to where it is."""
    west, _, east, _ = outline.bounds
    if west >= -180 and east <= 180:
        return outline
    outline = shapely.make_valid(outline)
    parts = []
    for number in range(floor((west + 180) / 360), ceil((east + 180) / 360)):
        turn = 360.0 * number
        part = shapely.intersection(outline, shapely.box(turn - 180, -90, turn + 180, 90))
        pieces = shapely.get_parts(_shifted(part, -turn))
        # a shape that only touches the meridian leaves a line there
        parts += [p for p in pieces if shapely.get_dimensions(p) == shapely.get_dimensions(outline)]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _shifted(outline: Any, degrees: float) -> Any:
    return shapely.transform(outline, lambda p: p + np.array([degrees, 0.0]))


def _extremes(points: Any) -> str:
    west, south = np.nanmin(points, axis=0)
    east, north = np.nanmax(points, axis=0)
    return f"({west:g}, {south:g}, {east:g}, {north:g})"
