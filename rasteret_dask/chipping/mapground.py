# SPDX-License-Identifier: Apache-2.0
"""The ground that a plan asks for, on each map that its chips may lie on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.extent import EQUATOR_M, is_geographic, metres
from rasteret_dask.footprint import area_of
from rasteret_dask.grid import Bounds, bounds_in, transformer
from rasteret_dask.planning.plan import ChipSpec
from rasteret_dask.zones import BoxGrid, CrsGrid, TileGrid, Zones

__all__ = ["MapGround", "box_in_degrees", "map_grounds", "moved", "polygons"]

STEP_DEG = 0.01
"""Between points of an edge that is brought to another map: it then bends by less than 2 cm between two of them."""

STEP_M = 1000.0
"""The same in metres."""

MARGIN_DEG = 0.05
"""Around a shape's box in degrees, so that nothing is cut off where edges bend between corners."""

NEAR_180 = 1e-7
"""Degrees: a centimetre."""

Shapes = Mapping[int, Any]


@dataclass(frozen=True)
class MapGround:
    """The ground that a plan asks for, on one map."""

    code: int
    """Number of the CRS."""
    shape: Any
    """What of the area records of the reference source lie on, in the CRS; not empty."""
    area: Any
    """What is asked for, ``aoi`` or a GeoBox, whether records lie there or not; None: wherever there are records."""
    edges: Bounds
    """Bounds of the area, whether records lie there or not; of the shape where no area is asked for, and of tiles."""


def map_grounds(spec: ChipSpec, reference: Outlines) -> list[MapGround]:
    """Return the ground that a plan asks for, map by map, by rising number of their CRS.

    Of zones, each has the ground that is its own, so that no place is on two maps. Of tiles, each CRS has the ground of
    its own records.

    Parameters
    ----------
    spec
        Grid and area.
    reference
        Outlines of the reference source's records.
    """
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    records = {code: _on_records(reference, code) for code in np.unique(reference.epsg).tolist()}
    records = {code: shape for code, shape in records.items() if not shapely.is_empty(shape)}
    found: Iterable[MapGround | None]
    match spec.grid:
        case TileGrid() if spec.at is None:
            found = [_on_map(code, area, {code: shape}, whole=True) for code, shape in records.items()]
        case BoxGrid() as box if spec.at is None:
            found = [_in_box(box, area, records)]
        case grid:
            found = _in_zones(grid.zones, area, records)
    return sorted((one for one in found if one is not None), key=lambda one: one.code)


def _on_records(reference: Outlines, code: int) -> Any:
    """Return the ground of all records of a CRS, on its map; without the pixel of tolerance around their rasters."""
    own = np.flatnonzero((reference.epsg == code) & ~np.isnan(reference.bounds).any(axis=1))
    return shapely.union_all(
        shapely.intersection(reference.shape[own], shapely.box(*reference.raster[own].T))
    )


def _in_zones(zones: Zones, area: Any, records: Shapes) -> Iterator[MapGround | None]:
    """Yield the ground of each zone."""
    near: set[int] = set()
    for code, shape in records.items():
        west, south, east, north = bounds_in(shapely.bounds(shape), code, 4326)
        near |= set(zones.near((west, south, east + 360.0 * (east < west), north)))
    for zone in near:
        ground = zones.ground(zone)
        ground = _off_the_antimeridian(ground) if isinstance(zones, CrsGrid) else ground
        limit = ground if area is None else shapely.intersection(ground, area)
        if not shapely.is_empty(limit):
            yield _on_map(zone, limit, records, whole=area is None)


def _in_box(box: BoxGrid, area: Any, records: Shapes) -> MapGround | None:
    """Return the ground of a rectangle."""
    edges = (box.x0, box.y0 - box.height * box.pixel, box.x0 + box.width * box.pixel, box.y0)
    rectangle = shapely.box(*edges)
    limit = _off_the_antimeridian(box_in_degrees(edges, box.code))
    limit = limit if area is None else shapely.intersection(limit, area)
    found = _on_map(box.code, limit, records)
    if found is None:
        return None
    shape = polygons(shapely.intersection(found.shape, rectangle))
    if shapely.is_empty(shape):
        return None
    asked = rectangle if area is None else shapely.intersection(rectangle, _of_degrees(limit, box.code))
    return MapGround(box.code, shape, asked, edges)


def _on_map(code: int, limit: Any, records: Shapes, whole: bool = False) -> MapGround | None:
    """Return the ground of records on a map, as far as it lies within a limit in degrees; None where there is none.

    Parameters
    ----------
    code
        The map's CRS.
    limit
        In degrees; None: there is none.
    records
        CRS -> ground of records on its map.
    whole
        Whether the area is wherever records are: then the limit is no edge of it.
    """
    parts = [_carried(shape, source, limit, code) for source, shape in records.items()]
    shape = polygons(shapely.union_all(parts))
    if shapely.is_empty(shape):
        return None
    asked = None if whole or limit is None else _of_degrees(limit, code)
    xmin, ymin, xmax, ymax = (float(v) for v in shapely.bounds(shape if asked is None else asked))
    return MapGround(code, shape, asked, (xmin, ymin, xmax, ymax))


def _carried(shape: Any, source: int, limit: Any, target: int) -> Any:
    """Return what of a shape lies within a limit in degrees, on another map."""
    if limit is not None:
        near = polygons(shapely.intersection(limit, box_in_degrees(shapely.bounds(shape), source)))
        if source != target:  # what lies on both sides of 180 degrees may be far apart on the other map
            pieces = [
                shapely.intersection(shape, _of_degrees(part, source)) for part in shapely.get_parts(near)
            ]
            return shapely.union_all([moved(piece, source, target) for piece in pieces])
        shape = shapely.intersection(shape, _of_degrees(near, source))
    return shape if source == target else moved(shape, source, target)


def _off_the_antimeridian(shape: Any) -> Any:
    """Return a shape in degrees without what is so near to 180 that rounding decides on which side of a map it lies."""
    east = 180.0 - NEAR_180
    return polygons(shapely.intersection(shape, shapely.box(-east, -90.0, east, 90.0)))


def box_in_degrees(bounds: Sequence[float] | NDArray[np.float64], code: int) -> Any:
    """Return a shape in degrees, from -180 to 180, that holds what lies within bounds of a map."""
    west, south, east, north = bounds_in(bounds, code, 4326)
    south, north = max(south - MARGIN_DEG, -90.0), min(north + MARGIN_DEG, 90.0)
    west, east = west - MARGIN_DEG, east + MARGIN_DEG
    if east - west >= 360.0 or west < -180.0 or east > 180.0:
        west, east = -180.0, 180.0
    return area_of([(west, south, east, north)])


def _of_degrees(shape: Any, code: int) -> Any:
    """Return a shape in degrees on a map."""
    if not is_geographic(code):
        return moved(shape, 4326, code)
    once, turn = moved(shape, 4326, code), EQUATOR_M / metres(code)  # a raster may count from 0 to 360

    def turned(points: NDArray[np.float64], by: float) -> NDArray[np.float64]:
        return np.asarray(points + np.array([by, 0.0]), dtype=np.float64)

    return shapely.union_all([shapely.transform(once, partial(turned, by=t)) for t in (-turn, 0.0, turn)])


def moved(shape: Any, source: int, target: int) -> Any:
    """Return a shape on another map; its edges bend as they do on the ground.

    Parameters
    ----------
    shape
        Polygons.
    source, target
        CRS that they are in, and CRS of the map.
    """
    step = STEP_DEG if source == 4326 else STEP_M / metres(source)
    move = transformer(source, target).transform

    def on_map(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.stack(move(points[:, 0], points[:, 1]), -1), dtype=np.float64)

    parts = shapely.get_parts(shapely.transform(shapely.segmentize(shape, step), on_map))
    parts = parts[np.isfinite(shapely.bounds(parts)).all(axis=1)]
    return shapely.union_all(shapely.make_valid(parts))


def polygons(shape: Any) -> Any:
    """Return what of a shape has an area."""
    parts = shapely.get_parts(shape)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])
