# SPDX-License-Identifier: Apache-2.0
"""The same ground always lands in the same split; what touches two splits belongs to none."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import CellTable
from rasteret_dask.chipping.distances import apart_m, stretch
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import Lattice, transformer
from rasteret_dask.planning.plan import SplitSpec
from rasteret_dask.planning.sampling import hash_unit
from rasteret_dask.zones import Zones

__all__ = [
    "SplitCells",
    "by_geometry",
    "cell_units",
    "cells_touched",
    "choose",
    "split_numbers",
    "split_of_cells",
    "too_near",
]

FEW_CELLS = 20
"""Below this many split cells the achieved ratios are a matter of luck."""

NOWHERE = shapely.Polygon()
"""Stands for what a zone's CRS cannot say: ground on the far side of the globe, near to nothing."""

SHARED_M2 = 1e-3
"""Windows and cells that share less ground than this only touch."""


@dataclass(frozen=True, slots=True)
class SplitCells:
    """The squares of ground that get one split each."""

    zones: Zones
    side_m: float
    table: CellTable | None = None
    """Cells that have got their split, whatever the hash says."""

    @property
    def lattice(self) -> Lattice:
        """The lattice that has nothing but split cells."""
        return Lattice(self.side_m, self.side_m, self.side_m, self.zones.origin)

    def splits(self, code: int, cells: NDArray[np.int64], spec: SplitSpec) -> NDArray[np.int64]:
        """Return the split number of cells (row, col) of a zone."""
        zone = self.zones.cell_name(code)
        hashed = split_of_cells(zone, cells, spec)
        if self.table is None:
            return hashed
        number = self.table.numbers(zone, cells, spec.names)
        return np.where(number >= 0, number, hashed)


def choose(unit: NDArray[np.float64], spec: SplitSpec) -> NDArray[np.int64]:
    """Return the number of the split that each value of [0, 1) falls in, by cumulative ratios."""
    edges = np.cumsum([float(share) for _, share in spec.ratios])
    edges[-1] = np.inf
    return np.asarray(np.searchsorted(edges, unit, side="right"), dtype=np.int64)


def split_of_cells(zone: str, cells: NDArray[np.int64], spec: SplitSpec) -> NDArray[np.int64]:
    """Return the split number of split cells (row, col) of a zone: a hash of (seed, the zone's name, row, col)."""
    _, first, back = np.unique(cells[:, 0] * 2**32 + cells[:, 1], return_index=True, return_inverse=True)
    return choose(cell_units(zone, cells[first], spec), spec)[back]


def cell_units(zone: str, cells: NDArray[np.int64], spec: SplitSpec) -> NDArray[np.float64]:
    """Return the hash of each split cell (row, col) of a zone, in [0, 1)."""
    return hash_unit([f"{zone}|{row}|{col}" for row, col in cells.tolist()], "ground", spec.seed)


def split_numbers(column: pa.ChunkedArray, spec: SplitSpec) -> NDArray[np.int64]:
    """Return the number of each split's name, -1 for null and any other text; shape (chip,)."""
    place = pc.index_in(column, value_set=pa.array(spec.names, pa.string()))
    return np.asarray(pc.fill_null(place, -1).to_numpy(), dtype=np.int64)


def cells_touched(code: int, bounds: NDArray[np.float64], zone: int, cells: SplitCells) -> NDArray[np.int64]:
    """Return the split cells (row, col) of a zone's lattice that share ground with one window.

    Parameters
    ----------
    code, bounds
        The window's CRS, and its xmin, ymin, xmax, ymax.
    zone
        The zone.
    cells
        The split cells.
    """
    box = shapely.box(*bounds)
    if zone != code:
        dense = shapely.segmentize(box, float(bounds[2] - bounds[0]) / 8)
        move = transformer(code, zone).transform
        box = shapely.transform(dense, lambda p: np.stack(move(p[:, 0], p[:, 1]), -1))
    lattice = cells.lattice
    xmin, ymin, xmax, ymax = shapely.bounds(box)
    near = lattice.split_cells((xmin, ymin, xmax, ymax))
    shared = shapely.area(shapely.intersection(box, shapely.box(*lattice.split_bounds(near).T)))
    return np.asarray(near[shared > SHARED_M2])


def by_geometry(geometries: Sequence[bytes], spec: SplitSpec) -> NDArray[np.int64]:
    """Return the split number of records by md5(WKB) / 2**128 against the cumulative ratios.

    The seed is not used. Footprints of different sensors over the same ground get different splits, so this leaks
    between sensors and dates; it exists because published guides split so.
    """
    unit = np.array([int.from_bytes(hashlib.md5(g or b"").digest(), "big") / 2**128 for g in geometries])
    return choose(unit, spec)


def too_near(
    epsg: NDArray[np.int64],
    bounds: NDArray[np.float64],
    split: NDArray[np.int64],
    spec: SplitSpec,
    wkb: pa.ChunkedArray,
) -> NDArray[np.bool_]:
    """Tell which val and test chips lie closer to a train chip than ``buffer_m`` on the ground; shape (chip,).

    Parameters
    ----------
    epsg, bounds
        CRS and xmin, ymin, xmax, ymax of each chip.
    split
        Split numbers, -1 for none; number 0 is train.
    spec
        Gives ``buffer_m``.
    wkb
        Shape (chip,). Each chip's polygon in lon/lat, to compare chips of different zones.
    """
    near = np.zeros(len(bounds), dtype=bool)
    if spec.buffer_m <= 0:
        return near
    for code in np.unique(epsg):
        here = shapely.box(*bounds[epsg == code].T)
        train = np.flatnonzero(split == 0)
        shapes = _into(int(code), train, epsg, bounds, wkb)
        tree = shapely.STRtree(shapes)
        others = np.flatnonzero((epsg == code) & (split > 0))
        position = np.searchsorted(np.flatnonzero(epsg == code), others)
        on_map = spec.buffer_m * stretch(int(code), bounds[epsg == code])
        hits = tree.query(here[position], predicate="dwithin", distance=on_map * (1 - 1e-12))
        touched = np.unique(hits[0])
        distance = apart_m(int(code), here[position[hits[0]]], shapes[hits[1]])
        closer = np.unique(hits[0][distance < spec.buffer_m])
        near[others[np.intersect1d(touched, closer)]] = True
    return near


def _into(
    code: int,
    at: NDArray[np.int64],
    epsg: NDArray[np.int64],
    bounds: NDArray[np.float64],
    wkb: pa.ChunkedArray,
) -> NDArray[Any]:
    shapes = np.asarray(shapely.box(*bounds[at].T), dtype=object)
    foreign = np.flatnonzero(epsg[at] != code)
    if len(foreign):

        def move(p: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack(transformer(4326, code).transform(p[:, 0], p[:, 1]), -1)

        lonlat = shapely.from_wkb(wkb.take(pa.array(at[foreign])).to_numpy(zero_copy_only=False))
        moved = shapely.transform(lonlat, move)
        shapes[foreign] = np.where(np.isfinite(shapely.bounds(moved)).all(axis=1), moved, NOWHERE)
    return shapes


def warn_if_few(cells: int, spec: SplitSpec, lattice: Lattice, ground_m2: float | None = None) -> None:
    """Warn when there are so few split cells that the ratios are a matter of luck; propose a smaller cell.

    Parameters
    ----------
    cells
        How many there are.
    spec, lattice
        The splits' ratios, and the sizes of cells and chips.
    ground_m2
        Ground that chips lie on, m², where it is counted: a field may fill but a corner of its cell.
    """
    if cells >= FEW_CELLS:
        return
    shares = [share for _, share in spec.ratios if share > 0]
    # Inclusion and exclusion over the sets of splits that no cell falls in.
    empty = sum(
        (-1) ** (n + 1) * (1.0 - sum(missed)) ** cells
        for n in range(1, len(shares) + 1)
        for missed in combinations(shares, n)
    )
    smaller = [
        k
        for k in (7.68, 5.12, 3.84, 2.56, 1.92, 1.28, 0.96, 0.64)
        if lattice.chip_m / 1000 <= k < lattice.cell_m / 1000
    ]
    whole = [k for k in smaller if abs(k * 1000 / lattice.chip_m - round(k * 1000 / lattice.chip_m)) < 1e-9]
    smaller = whole or smaller  # without a strip that no chip reaches
    wanted = lattice.cell_m / 1000 * math.sqrt(max(cells, 1) / FEW_CELLS)
    if ground_m2 is not None:
        wanted = min(wanted, math.sqrt(ground_m2 / FEW_CELLS) / 1000)
    # where no round number is small enough: whole chips
    chips_km = max(1, int(wanted * 1000 / lattice.chip_m + 1e-9)) * lattice.chip_m / 1000
    least = chips_km if chips_km * 1000 < lattice.cell_m * (1 - 1e-9) else None
    proposed = next((k for k in smaller if k <= wanted), least)
    advice = (
        f"chips(cell_km={proposed:.10g}) gives more of them"
        if proposed
        else "use smaller chips or a larger area"
    )
    warnings.warn(
        f"only {cells} split cell{'s' * (cells != 1)} of {lattice.cell_m / 1000:g} km: the chance that some split "
        f"stays empty is {min(max(empty, 0.0), 1.0):.0%}, and ratios will be rough; {advice}.",
        UserWarning,
        stacklevel=4,
    )


def column_splits(values: Sequence[Any], spec: SplitSpec, column: str) -> NDArray[np.int64]:
    """Return split numbers from a column whose values are the splits' names; null or other values give -1.

    Raises
    ------
    PlanError
        When no value is the name of a split.
    """
    number = {name: i for i, name in enumerate(spec.names)}
    result = np.array([number.get(str(v), -1) if v is not None else -1 for v in values], dtype=np.int64)
    if len(result) and not np.any(result >= 0):
        found = ", ".join(sorted({str(v) for v in values})[:10])
        raise PlanError(f"split(by={column!r})", f"values {found}", f"among {', '.join(spec.names)}")
    return result
