# SPDX-License-Identifier: Apache-2.0
"""The same ground always lands in the same split; what touches two splits belongs to none."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from rasteret_dask.extent import metres
from rasteret_dask.grid import Lattice, transformer
from rasteret_dask.lists import listed
from rasteret_dask.planning.functions import plain
from rasteret_dask.planning.names import check_split_names, in_order
from rasteret_dask.planning.plan import Scalar, SplitSpec
from rasteret_dask.planning.sampling import hash_unit
from rasteret_dask.zones import Zones

__all__ = [
    "SplitCells",
    "by_geometry",
    "cell_units",
    "cells_at",
    "cells_touched",
    "choose",
    "column_splits",
    "split_numbers",
    "split_of_cells",
    "too_near",
    "touch_area",
]

FEW_CELLS = 20
"""Below this many split cells the achieved ratios are a matter of luck."""

TRAIN = "train"
"""The split that ``buffer_m`` keeps the others away from."""

MOST_SPLITS = 100
"""Values of a column that may each be a split."""

NOWHERE = shapely.Polygon()
"""Stands for what a zone's CRS cannot say: ground on the far side of the globe, near to nothing."""

SHARED_M2 = 1e-3
"""Windows and cells that share less ground than this only touch."""


def touch_area(code: int) -> float:
    """Return the same in the units of a CRS, which may be degrees, squared."""
    return SHARED_M2 / metres(code) ** 2


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
    """Return the split number of split cells (row, col) of a zone: a hash of (salt, seed, zone's name, row, col)."""
    _, first, back = np.unique(cells[:, 0] * 2**32 + cells[:, 1], return_index=True, return_inverse=True)
    return choose(cell_units(zone, cells[first], spec), spec)[back]


def cell_units(zone: str, cells: NDArray[np.int64], spec: SplitSpec) -> NDArray[np.float64]:
    """Return the hash of each split cell (row, col) of a zone, in [0, 1)."""
    return hash_unit([f"{zone}|{row}|{col}" for row, col in cells.tolist()], spec.salt, spec.seed)


def split_numbers(column: pa.ChunkedArray, spec: SplitSpec) -> NDArray[np.int64]:
    """Return the number of each split's name, -1 for null and any other text; shape (chip,)."""
    place = pc.index_in(column, value_set=pa.array(spec.names, pa.string()))
    return np.asarray(pc.fill_null(place, -1).to_numpy(), dtype=np.int64)


def cells_at(
    code: int, bounds: NDArray[np.float64], cells: SplitCells
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the split cell that the centre of each window lies in.

    Parameters
    ----------
    code, bounds
        CRS of the windows, and xmin, ymin, xmax, ymax of each, shape (window, 4).
    cells
        The split cells.

    Returns
    -------
    zones, cells
        Shapes (window,) and (window, 2): the zone's number, 0 where no zone holds the centre; row and col.
    """
    lon, lat = transformer(code, 4326).transform(bounds[:, [0, 2]].mean(1), bounds[:, [1, 3]].mean(1))
    zones, found = cells.zones.codes(lon, lat), np.zeros((len(bounds), 2), dtype=np.int64)
    for zone in np.unique(zones[zones != 0]).tolist():
        at = np.flatnonzero(zones == zone)
        x, y = transformer(4326, zone).transform(lon[at], lat[at])
        found[at] = cells.lattice.split_cells_at(np.asarray(x), np.asarray(y))
    return zones, found


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
    """Tell which chips of other splits lie closer to a train chip than ``buffer_m`` on the ground; shape (chip,).

    Parameters
    ----------
    epsg, bounds
        CRS and xmin, ymin, xmax, ymax of each chip.
    split
        Split numbers, -1 for none.
    spec
        Gives ``buffer_m`` and the number of train.
    wkb
        Shape (chip,). Each chip's polygon in lon/lat, to compare chips of different zones.
    """
    near = np.zeros(len(bounds), dtype=bool)
    if spec.buffer_m <= 0 or TRAIN not in spec.names:
        return near
    number = spec.names.index(TRAIN)
    for code in np.unique(epsg):
        here = shapely.box(*bounds[epsg == code].T)
        train = np.flatnonzero(split == number)
        shapes = _into(int(code), train, epsg, bounds, wkb)
        tree = shapely.STRtree(shapes)
        others = np.flatnonzero((epsg == code) & (split >= 0) & (split != number))
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
    part = "split" if spec.salt == "ground" else "fold"
    warnings.warn(
        f"only {cells} split cell{'s' * (cells != 1)} of {lattice.cell_m / 1000:g} km: the chance that some {part} "
        f"stays empty is {min(max(empty, 0.0), 1.0):.0%}, and ratios will be rough; {advice}.",
        UserWarning,
        stacklevel=4,
    )


def column_splits(
    column: pa.ChunkedArray, spec: SplitSpec, whole: bool = True
) -> tuple[SplitSpec, NDArray[np.int64]]:
    """Return which split each value of a column is in: -1 for null and for values that no split takes.

    Parameters
    ----------
    column
        The column ``spec.by`` of the chip table.
    spec
        The values of each split. Without any, each value is a split of that name.
    whole
        Whether these are all chips, so that a value which a split asks for has to be there.

    Returns
    -------
    spec, number
        The same with the values that each split takes, and the number of each chip's split.

    Raises
    ------
    PlanError
        When values have no order (lists, structs, bytes), one that a split asks for is not there, or is no name.
    """
    step = f"split(by={spec.by!r})"
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise PlanError(
            step, f"a column of type {column.type}", "a column of texts, numbers, dates, True and False",
            "Make such a column of it, and join that by with_table().",
        )  # fmt: skip
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    keys = [plain(value) for value in encoded.dictionary.to_pylist()]
    there = [key for key in keys if key == key]  # NaN, which pandas writes for null
    full = _with_values(spec, there, step) if whole or not spec.values else spec
    number = _numbers(full, there)
    of_key = np.array([number.get(key, -1) if key == key else -1 for key in keys] + [-1], dtype=np.int64)
    return full, of_key[np.asarray(pc.fill_null(encoded.indices, len(keys)))]


def _numbers(spec: SplitSpec, there: Sequence[Scalar]) -> dict[Scalar, int]:
    """Return value -> the number of the split that takes it."""
    number = {value: place for place, (_, own) in enumerate(spec.values) for value in own or ()}
    for place, (_, own) in enumerate(spec.values):
        if own is None:
            number |= {value: place for value in there if value not in number}
    return number


def _with_values(spec: SplitSpec, there: Sequence[Scalar], step: str) -> SplitSpec:
    """Return a split with the values that each name takes, held against those that a column has."""
    known: list[Any] = list(there)  # of one type, as the column is
    known.sort()
    shown = listed([repr(value) for value in known], "values")
    if not spec.values:
        if not 0 < len(there) <= MOST_SPLITS:
            raise PlanError(
                step, f"{len(there):,} values that each would be a split" if there else "no value that is not null",
                f"1 to {MOST_SPLITS}", f"Name the splits with their values: split(by={spec.by!r}, test=[...]).",
            )  # fmt: skip
        name_of = {value: _name(value) for value in there}
        value_of = {name: value for value, name in name_of.items()}
        check_split_names(value_of, step)
        return replace(spec, values=tuple((name, (value_of[name],)) for name in in_order(value_of)))
    unknown = [(name, value) for name, own in spec.values for value in own or () if value not in there]
    if unknown and there:
        name, value = unknown[0]
        raise PlanError(step, f"{name}=[{value!r}]", f"values of column {spec.by}: {shown}")
    return spec


def _name(value: Scalar) -> str:
    """Return what a split of a value is called; whole floats are what pandas makes of whole numbers beside a null."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
