# SPDX-License-Identifier: Apache-2.0
"""What ground planned chips cover, and how far a map of them reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.boxes import apart
from rasteret_dask.chipping.chips import PlannedChips, phases
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.frame import cover_grids
from rasteret_dask.chipping.mapground import MapGround, box_in_degrees, map_grounds, moved, polygons
from rasteret_dask.extent import is_geographic, metres
from rasteret_dask.grid import Bounds
from rasteret_dask.zones import TileGrid

__all__ = ["GroundShare", "extents_of", "ground_share", "map_extents"]

PER_PIXEL = 16
"""Steps that a pixel's side is divided into where edges of chips are compared as whole numbers."""

BATCH = 65_536
"""Rectangles that are compared with the ground together."""

SQUARES = 64
"""Along each side of a map: most chips lie in squares that are within the ground, or beside it, as a whole."""

ROUNDING = 1e-5
"""A share of ground below this is rounding of maps."""


@dataclass(frozen=True, slots=True)
class GroundShare:
    """How much of the ground that a plan asks for lies in a chip."""

    share: float
    """Of the ground of the reference's records in the area, from 0 to 1."""
    ground_km2: float
    """That ground, on its maps."""
    recorded: float | None
    """How much of the area, ``aoi`` or a GeoBox, records lie on; None where no area is asked for."""


def map_extents(chips: PlannedChips) -> dict[int, Bounds]:
    """Return how far a map of chips reaches: number of the CRS -> xmin, ymin, xmax, ymax, on edges of pixels.

    Of chips that cover an area these are the area's edges, which chips may reach beyond, whichever chips were selected;
    of others, those of all chips together. Maps without a chip are left out.

    Parameters
    ----------
    chips
        The planned chips.
    """
    if chips.spec.cover and not chips.spec.drawn:
        codes = chips.table.column("epsg").unique().to_pylist()
        reference = chips.outlines[chips.reference]
        phase = phases(chips.sources[chips.reference], reference)
        grids = cover_grids(chips.spec, reference, chips.resolution, phase)
        return {grid.ground.code: grid.bounds for grid in grids if grid.ground.code in codes}
    return extents_of(chips.table)


def extents_of(table: pa.Table) -> dict[int, Bounds]:
    """Return how far the chips of a table reach on each map: number of the CRS -> xmin, ymin, xmax, ymax."""
    epsg, bounds = table.column("epsg").to_numpy(), bounds_of(table)
    result: dict[int, Bounds] = {}
    for code in np.unique(epsg).tolist():
        own = bounds[epsg == code]
        low, high = own[:, :2].min(0).tolist(), own[:, 2:].max(0).tolist()
        result[code] = (low[0], low[1], high[0], high[1])
    return result


def ground_share(chips: PlannedChips) -> GroundShare:
    """Return how much of the ground that a plan asks for lies in at least one chip.

    That ground is what of the area (``aoi``, a GeoBox; else everywhere) the reference's records lie on. It is measured
    on the map of each zone; chips of a neighbouring zone count where they reach over the border.

    Parameters
    ----------
    chips
        The planned chips.
    """
    epsg, bounds = chips.table.column("epsg").to_numpy(), bounds_of(chips.table)
    unit = chips.resolution / PER_PIXEL
    laid = {int(code): _Rectangles(int(code), bounds[epsg == code], unit) for code in np.unique(epsg)}
    whole = covered = area = 0.0
    areas = True
    for ground in _disjoint(map_grounds(chips.spec, chips.outlines[chips.reference]), chips):
        scale = _square_m(ground)
        own = laid.get(ground.code)
        inside = 0.0 if own is None else own.shared(ground.shape)
        foreign = [other.seen_from(ground) for code, other in laid.items() if code != ground.code]
        beyond = polygons(shapely.intersection(shapely.union_all(foreign), ground.shape))
        if own is not None and not shapely.is_empty(beyond):
            beyond = shapely.difference(beyond, own.near(beyond))
        whole += scale * float(shapely.area(ground.shape))
        covered += scale * (inside + float(shapely.area(beyond)))
        areas &= ground.area is not None
        area += scale * float(shapely.area(ground.shape if ground.area is None else ground.area))
    recorded = _share(whole, area) if areas and area else None
    return GroundShare(_share(covered, whole) if whole else 0.0, whole / 1e6, recorded)


def _share(part: float, whole: float) -> float:
    return 1.0 if part > whole * (1.0 - ROUNDING) else part / whole


def _disjoint(grounds: list[MapGround], chips: PlannedChips) -> Iterator[MapGround]:
    """Yield the ground of each map without that of maps before it: records of several CRSs may lie on the same."""
    before: list[MapGround] = []
    for ground in grounds:
        shape = ground.shape
        if isinstance(chips.spec.grid, TileGrid) and chips.spec.at is None:
            here = box_in_degrees(shapely.bounds(shape), ground.code)
            for other in before:
                if shapely.intersects(here, box_in_degrees(shapely.bounds(other.shape), other.code)):
                    shape = polygons(shapely.difference(shape, moved(other.shape, other.code, ground.code)))
            before.append(ground)
        yield MapGround(ground.code, shape, ground.area, ground.edges)


def _square_m(ground: MapGround) -> float:
    """Return how many square metres a square unit of a map is."""
    unit = metres(ground.code)
    if not is_geographic(ground.code):
        return unit**2
    _, south, _, north = shapely.bounds(ground.shape) * unit / metres(4326)
    return float(unit**2 * np.cos(np.radians((south + north) / 2)))


@dataclass(frozen=True)
class _Rectangles:
    """The chips of one map."""

    code: int
    bounds: NDArray[np.float64]
    """Shape (chip, 4)."""
    unit: float

    @cached_property
    def apart(self) -> NDArray[np.float64]:
        """Shape (n, 4). Rectangles with the same ground that do not overlap."""
        corner = np.tile(self.bounds[:, :2].min(0), 2)
        whole = apart(np.rint((self.bounds - corner) / self.unit).astype(np.int64))
        return np.asarray(whole * self.unit + corner, dtype=np.float64)

    def shared(self, shape: Any) -> float:
        """Return the area of a shape of this map that chips cover."""
        inside, partly = self._meeting(shape)
        box = self.apart[inside]
        whole = float(((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).sum())
        return whole + sum(float(shapely.area(part).sum()) for part in self._cut(shape, partly))

    def near(self, shape: Any) -> Any:
        """Return the ground of the chips that touch a shape of this map."""
        xmin, ymin, xmax, ymax = shapely.bounds(shape)
        box = self.apart
        touch = (box[:, 0] <= xmax) & (box[:, 2] >= xmin) & (box[:, 1] <= ymax) & (box[:, 3] >= ymin)
        boxes = shapely.box(*box[touch].T)
        shapely.prepare(shape)
        return shapely.union_all(boxes[shapely.intersects(shape, boxes)])

    def seen_from(self, ground: MapGround) -> Any:
        """Return what of the ground of another map chips cover, on that map."""
        low, high = self.bounds[:, :2].min(0), self.bounds[:, 2:].max(0)
        here = box_in_degrees(np.concatenate([low, high]), self.code)
        if not shapely.intersects(here, box_in_degrees(shapely.bounds(ground.shape), ground.code)):
            return shapely.Polygon()
        there = moved(ground.shape, ground.code, self.code)
        inside, partly = self._meeting(there)
        box = self.apart[inside]
        parts = [shapely.union_all(part) for part in self._cut(there, partly)]
        shape = polygons(shapely.union_all([*parts, shapely.union_all(shapely.box(*box.T))]))
        return shape if shapely.is_empty(shape) else moved(shape, self.code, ground.code)

    def _meeting(self, shape: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rectangles that lie within a shape of this map, and those that may lie on its edge."""
        box = self.apart
        shapely.prepare(shape)
        low, high = box[:, :2].min(0), box[:, 2:].max(0)
        side = (high - low) / SQUARES
        place = np.arange(SQUARES)
        x, y = low[0] + place * side[0], (low[1] + place * side[1])[:, None]
        squares = shapely.box(x, y, x + side[0], y + side[1])
        inside, beside = shapely.covers(shape, squares), ~shapely.intersects(shape, squares)
        first = np.clip(np.floor((box[:, :2] - low) / side).astype(np.int64), 0, SQUARES - 1)
        last = np.clip(np.floor((box[:, 2:] - low) / side).astype(np.int64), 0, SQUARES - 1)
        count = (last - first + 1).prod(axis=1)
        whole = _count_in(inside, first, last) == count
        return np.flatnonzero(whole), np.flatnonzero(~whole & (_count_in(beside, first, last) < count))

    def _cut(self, shape: Any, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Yield what some rectangles share with a shape of this map, a batch at a time."""
        for begin in range(0, len(rows), BATCH):
            box = shapely.box(*self.apart[rows[begin : begin + BATCH]].T)
            whole = shapely.covers(shape, box)
            partly = box[~whole & shapely.intersects(shape, box)]
            yield np.concatenate([box[whole], shapely.intersection(shape, partly)])


def _count_in(
    squares: NDArray[np.bool_], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many squares (row, column) are True in rectangles from a first to a last place (x, y) of theirs."""
    sums = np.zeros((len(squares) + 1, len(squares) + 1), dtype=np.int64)
    sums[1:, 1:] = squares.cumsum(axis=0).cumsum(axis=1)
    (x0, y0), (x1, y1) = first.T, last.T + 1
    return np.asarray(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0])
