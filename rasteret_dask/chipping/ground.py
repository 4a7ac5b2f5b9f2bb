# SPDX-License-Identifier: Apache-2.0
"""Which split cells the ground of chips lies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.distances import stretch
from rasteret_dask.chipping.splits import SHARED_M2, SplitCells, cells_at, cells_touched
from rasteret_dask.planning.plan import SplitSpec

__all__ = ["Links", "by_ground", "cells_near", "cells_under", "splits_under"]


@dataclass(frozen=True)
class Links:
    """Pairs of a chip and a split cell."""

    chip: NDArray[np.int64]
    """Shape (link,), rising."""
    zone: NDArray[np.int64]
    """Shape (link,). Number of the CRS of the cell's zone."""
    cell: NDArray[np.int64]
    """Shape (link, 2). Row and column of the cell; the first one of a chip is where its centre lies, if one does."""

    @classmethod
    def of(cls, parts: list[tuple[Any, Any, Any]]) -> Links:
        """Put together parts (chips, zone, cells); those of a chip stay in their order."""
        chip = np.concatenate([np.zeros(0, dtype=np.int64), *(part[0] for part in parts)])
        zone = np.concatenate([np.zeros(0, dtype=np.int64), *(np.full(len(p[0]), p[1]) for p in parts)])
        cell = np.concatenate([np.zeros((0, 2), dtype=np.int64), *(part[2] for part in parts)])
        rising = np.argsort(chip, kind="stable")
        return cls(chip[rising], zone[rising], cell[rising])

    def splits(self, number: NDArray[np.int64], chips: int) -> NDArray[np.int64]:
        """Return the split of each chip where ``number`` is that of each link's cell; -1 where they differ.

        Shape (chip,).
        """
        result = np.full(chips, -1, dtype=np.int64)
        if len(number):
            begin = np.flatnonzero(np.append(True, np.diff(self.chip) != 0))
            low, high = np.minimum.reduceat(number, begin), np.maximum.reduceat(number, begin)
            result[self.chip[begin]] = np.where(low == high, low, -1)
        return result


def cells_under(
    epsg: NDArray[np.int64],
    bounds: NDArray[np.float64],
    cells: SplitCells,
    boundary: str,
    inside: NDArray[np.int64] | None,
    beyond: bool = False,
) -> Links:
    """Return the split cells whose split decides that of chips.

    Parameters
    ----------
    epsg
        Shape (chip,). CRS of each chip's bounds.
    bounds
        Shape (chip, 4): xmin, ymin, xmax, ymax.
    cells
        The split cells.
    boundary
        ``"drop"``: all cells that share ground with a chip; ``"centre"``: the one that holds its centre.
    inside
        Shape (chip, 2). The split cell each chip was laid out in, or None for windows that were laid out freely.
        Chips of the neighbouring zone may stick out of their cells by a pixel: give bounds that are so much wider.
    beyond
        Whether bounds reach beyond these cells: windows of a source that are larger than the chips.
    """
    parts: list[tuple[Any, Any, Any]] = []
    for code in np.unique(epsg).tolist():
        at = np.flatnonzero(epsg == code)
        if inside is not None and cells.zones.has(code):
            parts.append((at, code, inside[at]))
            if boundary == "drop":
                parts += (_under if beyond else _of_other_zones)(code, at, bounds, cells)
            continue
        parts += _at_centre(code, at, bounds, cells)
        if boundary == "drop":
            parts += _under(code, at, bounds, cells)
    links = Links.of(parts)
    if boundary == "drop" and (beyond or inside is None):
        links = _without_doubles(links)
    return links


def by_ground(
    epsg: NDArray[np.int64],
    bounds: NDArray[np.float64],
    cells: SplitCells,
    spec: SplitSpec,
    inside: NDArray[np.int64] | None,
    beyond: bool = False,
) -> NDArray[np.int64]:
    """Return the split number of chips, -1 for those whose ground lies in two splits.

    Parameters
    ----------
    epsg, bounds, cells, inside, beyond
        As in :func:`cells_under`.
    spec
        The shares, the seed and what to do at a boundary.
    """
    links = cells_under(epsg, bounds, cells, spec.boundary, inside, beyond)
    return splits_under(links, len(bounds), cells, spec)


def splits_under(links: Links, chips: int, cells: SplitCells, spec: SplitSpec) -> NDArray[np.int64]:
    """Return the split number of chips by the cells that they lie on, as :func:`by_ground`."""
    number = np.full(len(links.chip), -1, dtype=np.int64)
    for zone in np.unique(links.zone).tolist():
        here = links.zone == zone
        number[here] = cells.splits(zone, links.cell[here], spec)
    return links.splits(number, chips)


def cells_near(
    epsg: NDArray[np.int64], bounds: NDArray[np.float64], cells: SplitCells, distance_m: float
) -> Links:
    """Return the split cells of a chip's own zone that lie under it, or nearer to it than a distance on the ground."""
    parts: list[tuple[Any, Any, Any]] = []
    for code in np.unique(epsg).tolist():
        at = np.flatnonzero(epsg == code)
        if cells.zones.has(code):
            reach = distance_m * stretch(code, bounds[at])
            parts.append(_boxed(code, at, bounds[at] + np.array([-1, -1, 1, 1]) * reach, cells))
    return Links.of(parts)


def _of_other_zones(
    code: int, at: NDArray[np.int64], bounds: NDArray[np.float64], cells: SplitCells
) -> list[tuple[Any, Any, Any]]:
    """Return the cells of neighbouring zones that chips reach into."""
    parts: list[tuple[Any, Any, Any]] = []
    zones = cells.zones.touched(code, bounds[at])
    for chip in np.flatnonzero((zones != code).any(axis=1)):
        for other in sorted(set(zones[chip].tolist()) - {code}):
            touched = cells_touched(code, bounds[at[chip]], other, cells)
            parts.append((np.full(len(touched), at[chip]), other, touched))
    return parts


def _under(
    code: int, at: NDArray[np.int64], bounds: NDArray[np.float64], cells: SplitCells
) -> list[tuple[Any, Any, Any]]:
    """Return all cells that share ground with windows."""
    zones = cells.zones.touched(code, bounds[at])
    plain = (zones == code).all(axis=1)
    parts = [_boxed(code, at[plain], bounds[at[plain]], cells)]
    for chip in np.flatnonzero(~plain):
        for zone in sorted(set(zones[chip].tolist())):
            touched = cells_touched(code, bounds[at[chip]], zone, cells)
            parts.append((np.full(len(touched), at[chip]), zone, touched))
    return parts


def _boxed(
    code: int, at: NDArray[np.int64], bounds: NDArray[np.float64], cells: SplitCells
) -> tuple[Any, Any, Any]:
    """Return the cells of a zone's own lattice that share ground with boxes."""
    (x0, y0), side = cells.zones.origin, cells.side_m
    start = np.stack([y0 - bounds[:, 3], bounds[:, 0] - x0], -1)  # southwards, eastwards
    stop = np.stack([y0 - bounds[:, 1], bounds[:, 2] - x0], -1)
    first = np.floor(start / side).astype(np.int64)
    count = np.floor(stop / side).astype(np.int64) - first + 1
    each = count.prod(axis=1)
    box = np.repeat(np.arange(len(at)), each)
    within = np.arange(len(box)) - np.repeat(np.cumsum(each) - each, each)
    cell = first[box] + np.stack([within // count[box, 1], within % count[box, 1]], -1)
    shared = np.minimum(stop[box], (cell + 1) * side) - np.maximum(start[box], cell * side)
    some = (shared > 0).all(axis=1) & (shared.prod(axis=1) > SHARED_M2)
    return at[box[some]], code, cell[some]


def _at_centre(
    code: int, at: NDArray[np.int64], bounds: NDArray[np.float64], cells: SplitCells
) -> list[tuple[Any, Any, Any]]:
    zones, found = cells_at(code, bounds[at], cells)
    there = np.unique(zones[zones != 0]).tolist()
    return [(at[zones == zone], zone, found[zones == zone]) for zone in there]


def _without_doubles(links: Links) -> Links:
    """Return each pair once: the first of several."""
    keys = np.concatenate([links.chip[:, None], links.zone[:, None], links.cell], axis=1)
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    return Links(links.chip[first], links.zone[first], links.cell[first])
