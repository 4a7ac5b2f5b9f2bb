# SPDX-License-Identifier: Apache-2.0
"""Chips and the classes that they hold become split cells with a split each: stratified by ground."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import CellTable, cell_texts
from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.dealing import Stock, deal
from rasteret_dask.chipping.ground import Links, cells_near
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.chipping.splits import TRAIN, SplitCells, cell_units, cells_at
from rasteret_dask.errors import PlanError, StrataWarning
from rasteret_dask.lists import listed
from rasteret_dask.planning.plan import SplitSpec, is_number

__all__ = [
    "Holding",
    "Strata",
    "classes_of",
    "classes_of_raster",
    "dealt_cells",
    "holding_of",
    "table_of_cells",
]

MOST_CLASSES = 256
"""Values of a column that are classes; more are ids, or measurements."""

RARE_GROUND = 0.01
"""Of a raster's classes, those on less of the ground are not told where they lie in few cells."""

BURNED_PX = 64
"""Polygons are burned on so many pixels of a chip's side at most, to tell how much of each class a chip has."""

BURNED_PIXELS = 4096 * BURNED_PX**2
"""Pixels that are burned at once."""


@dataclass(frozen=True)
class Strata:
    """How much of each class chips hold."""

    names: tuple[str, ...]
    amounts: NDArray[Any]
    """Shape (chip, class). 1 and 0 where a chip has one class; else pixels, or what columns of numbers say."""
    column: str
    """What the classes are of, for messages."""
    one: bool
    """Whether each chip has one class, which a filter on the column can leave out."""
    labels: Labels | None = None
    """The labels that are burned, where the classes are theirs."""
    values: tuple[int, ...] = ()
    """What they burn for each class."""


def classes_of(
    chips: PlannedChips, columns: Sequence[str], subject: str | None = None, most_px: int | None = None
) -> Strata:
    """Return how much of each class chips hold.

    Parameters
    ----------
    chips
        The chips.
    columns
        One column of the chip table with a class for each chip (text, whole numbers, booleans); or the column that
        ``chips(labels=, rasterize=)`` burns; or several columns of numbers: how much of a class each chip has.
    subject
        Who asks, for errors; None: ``split(stratify=)``.
    most_px
        Labels are burned on so many pixels of a chip's side at most; None: on few, which tell about how much there is.

    Raises
    ------
    PlanError
        When there is no such column, a value is missing, negative or a list, or there are too many classes.
    """
    subject = subject or _stratify_text(columns)
    burned = {labels.column: labels for labels in chips.labels}
    if len(columns) == 1 and columns[0] in burned and columns[0] not in chips.table.column_names:
        return _burned(chips, burned[columns[0]], subject, most_px or BURNED_PX)
    for name in columns:
        if name not in chips.table.column_names:
            own = [*chips.table.column_names, *burned]
            raise PlanError(
                subject, f"no column {name!r}", f"one of {', '.join(own)}",
                "A raster of classes is a GeoTIFF's path, a Collection, or the name of a joined source of classes.",
            )  # fmt: skip
    if len(columns) > 1:
        return _numbers(chips, columns, subject)
    return _values(chips.table.column(columns[0]), columns[0], subject)


def _stratify_text(columns: Sequence[str], step: str = "split") -> str:
    """Return the argument that asks for classes, as errors name it."""
    return f"{step}(stratify={columns[0] if len(columns) == 1 else list(columns)!r})"


def _values(column: pa.ChunkedArray, name: str, subject: str) -> Strata:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    plain = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    plain = plain or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not plain:
        raise PlanError(
            subject, f"a column of {kind}", "a class for each chip: text, whole numbers, True or False",
            f"Make classes of it first, such as gdf['{name}_class'] = pandas.cut(gdf[{name!r}], 5).astype(str).",
        )  # fmt: skip
    if column.null_count:
        raise PlanError(
            subject, f"no value in {column.null_count:,} of {len(column):,} chips", "a class for each chip",
            f"Leave them out before: filter(({name!r}, '!=', None)); or fill them: gdf[{name!r}].fillna('none').",
        )  # fmt: skip
    texts = column.cast(pa.string()).combine_chunks().dictionary_encode()
    names = texts.dictionary.to_pylist()
    if len(names) > MOST_CLASSES:
        raise PlanError(
            subject, f"{len(names):,} different values", f"at most {MOST_CLASSES} classes",
            "Give a column of classes, not of ids; group rare ones.",
        )  # fmt: skip
    order = np.argsort(np.array(names, dtype=object), kind="stable")
    rank = np.argsort(order)[texts.indices.to_numpy()]
    amounts = np.zeros((len(column), len(names)), dtype=np.int64)
    amounts[np.arange(len(column)), rank] = 1
    return Strata(tuple(names[at] for at in order), amounts, name, True)


def _numbers(chips: PlannedChips, columns: Sequence[str], subject: str) -> Strata:
    parts = []
    for name in columns:
        column = chips.table.column(name)
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise PlanError(
                subject, f"column {name!r} of {kind} among several", "numbers: how much of the class each chip has",
                "Of a column of class names give that one alone.",
            )  # fmt: skip
        values = column.cast(pa.float64()).to_numpy()
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            raise PlanError(
                subject, f"{name} = {values[wrong][0]:g} in {int(wrong.sum()):,} of {len(values):,} chips",
                "numbers of 0 or more", f"Leave such chips out before: filter(({name!r}, '>=', 0)).",
            )  # fmt: skip
        parts.append(values)
    return Strata(tuple(columns), np.stack(parts, -1), ", ".join(columns), False)


def _target(chips: PlannedChips, labels: Labels) -> str:
    return f"{chips.sources[labels.source].plan.name}/{labels.name}"


def _burned(chips: PlannedChips, labels: Labels, subject: str, most_px: int) -> Strata:
    """Return how many pixels of each class polygons burn into each chip, on so many pixels a side at most."""
    if labels.dtype.kind == "f":
        raise PlanError(
            subject, "labels of floating-point numbers", "classes: text or whole numbers",
            "Burn a column of classes.",
        )  # fmt: skip
    if "value" not in labels.table.column_names:
        raise PlanError(
            subject, "a mask of files, which planning does not read", "columns of the chip table",
            f"Count the classes first: shares = chips.class_shares({_target(chips, labels)!r}); then "
            "chips.with_table(shares).split(stratify=[...]) takes its columns.",
        )  # fmt: skip
    values = np.unique(labels.table.column("value").to_numpy())
    if len(values) > MOST_CLASSES:
        raise PlanError(subject, f"{len(values):,} different labels", f"at most {MOST_CLASSES} classes")
    bounds, epsg = bounds_of(chips.table), chips.table.column("epsg").to_numpy().astype(np.int64)
    both = np.concatenate([bounds, epsg[:, None]], axis=1)
    _, first, back = np.unique(both, axis=0, return_index=True, return_inverse=True)
    amounts = np.zeros((len(first), len(values)), dtype=np.int64)
    size = min(chips.spec.size, most_px)
    batch = max(BURNED_PIXELS // size**2, 1)
    for start in range(0, len(first), batch):
        some = first[start : start + batch]
        masks = labels.burned(bounds[some], epsg[some], size).reshape(len(some), -1)
        for number, value in enumerate(values.tolist()):
            amounts[start : start + len(some), number] = (masks == value).sum(axis=1)
    names = tuple(labels.classes[int(v) - 1] if labels.classes else str(v) for v in values.tolist())
    return Strata(names, amounts[back.ravel()], labels.column, False, labels, tuple(map(int, values)))


def classes_of_raster(chips: PlannedChips, name: str, raster: pa.Table) -> Strata:
    """Return how much of each class of a raster chips hold: what the split cell has that a chip's centre lies in.

    Parameters
    ----------
    chips
        The chips.
    name
        What the raster is called.
    raster
        ``cell``, and a column of pixels for each class. A cell that is not there has none.
    """
    names = [column for column in raster.column_names if column != "cell"]
    row = pc.index_in(_home_cells(chips), value_set=raster.column("cell").combine_chunks())
    row = np.asarray(pc.fill_null(row, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    amounts = np.zeros((len(row), len(names)), dtype=np.int64)
    for number, column in enumerate(names if raster.num_rows else ()):
        amounts[:, number] = np.where(row >= 0, raster.column(column).to_numpy()[row], 0)
    return Strata(tuple(names), amounts, name, False)


def _home_cells(chips: PlannedChips) -> pa.Array:
    """Return the name of the split cell that each chip was laid out in, or that holds its centre; null for none."""
    column = chips.table.column("cell").combine_chunks()
    if not column.null_count:
        return column
    cells = SplitCells(chips.spec.grid.zones, chips.spec.cell_km * 1000.0)
    epsg, bounds = chips.table.column("epsg").to_numpy(), bounds_of(chips.table)
    texts = np.full(len(epsg), None, dtype=object)
    for code in np.unique(epsg).tolist():
        at = np.flatnonzero(epsg == code)
        zones, places = cells_at(int(code), bounds[at], cells)
        for zone in np.unique(zones[zones != 0]).tolist():
            texts[at[zones == zone]] = cell_texts(cells.zones.cell_name(zone), places[zones == zone])
    return pa.array(texts, pa.string())


@dataclass(frozen=True)
class Holding:
    """What split cells hold, of all chips or of some: parts of a plan add up."""

    classes: tuple[str, ...]
    column: str
    """What the classes are of, for messages."""
    one: bool
    """Whether each chip has one class."""
    places: NDArray[np.int64]
    """Shape (cell, 3). Zone, row and column of each cell that a chip lies on, rising."""
    held: NDArray[Any]
    """Shape (cell, class). Of the chips that lie on one cell, and near no other."""
    several: NDArray[Any]
    """Shape (chip, class). Of each chip that lies on or near several cells."""
    group: NDArray[np.int64]
    """Shape (link,), rising. The number of such a chip, for each cell that it lies on or near; those on come first."""
    cell: NDArray[np.int64]
    """Shape (link,). The number of that cell."""
    near: NDArray[np.bool_]
    """Shape (link,). Whether the chip is only near the cell."""

    def stock(self, spec: SplitSpec) -> Stock:
        """Return what is dealt."""
        guarded = spec.names.index(TRAIN) if TRAIN in spec.names else -1
        if not len(self.several):
            return Stock.of_cells(self.held)
        number = np.arange(len(self.places), dtype=np.int64)
        return Stock(
            np.concatenate([self.held, self.several]),
            np.concatenate([number, len(number) + self.group]),
            np.concatenate([number, self.cell]),
            np.concatenate([np.zeros(len(number), dtype=bool), self.near]),
            guarded,
        )

    @property
    def cells_of_classes(self) -> list[NDArray[np.int64]]:
        """For each class, the cells where chips lie that have some of it."""
        first = np.flatnonzero(np.append(True, np.diff(self.group) != 0)) if len(self.group) else self.group
        home = self.cell[first]
        return [
            np.unique(np.append(np.flatnonzero(self.held[:, n] > 0), home[self.several[:, n] > 0]))
            for n in range(len(self.classes))
        ]

    @classmethod
    def together(cls, parts: Sequence[Holding]) -> Holding:
        """Return what cells hold of all parts."""
        places = np.unique(np.concatenate([part.places for part in parts]), axis=0)
        names = tuple(sorted({name for part in parts for name in part.classes}))
        if len({part.classes for part in parts}) == 1:
            names = parts[0].classes
        key = {tuple(place): at for at, place in enumerate(places.tolist())}
        held = np.zeros((len(places), len(names)), dtype=parts[0].held.dtype)
        several, group, cell, near = [], [], [], []
        count = 0
        for part in parts:
            at = np.array([key[tuple(place)] for place in part.places.tolist()], dtype=np.int64)
            to = np.array([names.index(name) for name in part.classes], dtype=np.int64)
            held[np.ix_(at, to)] += part.held
            own = np.zeros((len(part.several), len(names)), dtype=part.several.dtype)
            own[:, to] = part.several
            several.append(own)
            group.append(part.group + count)
            cell.append(at[part.cell])
            near.append(part.near)
            count += len(own)
        return cls(
            names, parts[0].column, parts[0].one, places, held, np.concatenate(several),
            np.concatenate(group), np.concatenate(cell), np.concatenate(near),
        )  # fmt: skip


def holding_of(
    chips: PlannedChips, spec: SplitSpec, cells: SplitCells, links: Links, raster: pa.Table | None
) -> Holding:
    """Return what the split cells of chips hold.

    Parameters
    ----------
    chips, spec, cells, links, raster
        As in :func:`table_of_cells`.
    """
    both = np.concatenate([links.zone[:, None], links.cell], axis=1)
    places, cell = np.unique(both, axis=0, return_inverse=True)
    cell = cell.ravel()
    if raster is not None:
        classes = classes_of_raster(chips, spec.stratify[0], raster)
    elif spec.stratify:
        classes = classes_of(chips, spec.stratify, _stratify_text(spec.stratify, spec.step))
    else:
        classes = Strata((), np.zeros((chips.table.num_rows, 0), dtype=np.int64), "", False)
    count = np.bincount(links.chip, minlength=chips.table.num_rows)
    near_chip, near_cell = _beside(chips, spec, cells, links, places, cell)
    alone = (count == 1) & (np.bincount(near_chip, minlength=len(count)) == 0)
    several = np.flatnonzero((count > 0) & ~alone)
    held = np.zeros((len(places), len(classes.names)), dtype=classes.amounts.dtype)
    own = alone[links.chip]
    np.add.at(held, cell[own], classes.amounts[links.chip[own]])
    group = np.full(len(count), -1, dtype=np.int64)
    group[several] = np.arange(len(several))
    number = np.concatenate([group[links.chip[~own]], group[near_chip]])
    near = np.concatenate([np.zeros(int((~own).sum()), dtype=bool), np.ones(len(near_chip), dtype=bool)])
    order = np.argsort(number, kind="stable")  # own cells before near ones
    return Holding(
        classes.names, classes.column, classes.one, places, held, classes.amounts[several], number[order],
        np.concatenate([cell[~own], near_cell])[order], near[order],
    )  # fmt: skip


def table_of_cells(
    chips: PlannedChips,
    spec: SplitSpec,
    cells: SplitCells,
    links: Links,
    earlier: CellTable | None,
    raster: pa.Table | None,
) -> CellTable:
    """Return the split of every cell that a chip lies on, and of those of an earlier table.

    Parameters
    ----------
    chips
        The chips.
    spec
        The splits; with ``stratify``, cells are dealt by what they hold, else by a hash.
    cells, links
        The split cells, and those that each chip lies on.
    earlier
        Cells that keep their split.
    raster
        How much of each class of a raster cells hold, where ``spec`` names one.

    Raises
    ------
    PlanError
        When strata cannot hold, or the earlier table is of other cells or splits.
    """
    return dealt_cells(holding_of(chips, spec, cells, links, raster), spec, cells, chips, earlier, raster)


def dealt_cells(
    holding: Holding,
    spec: SplitSpec,
    cells: SplitCells,
    chips: PlannedChips,
    earlier: CellTable | None,
    raster: pa.Table | None,
) -> CellTable:
    """Return the same, of what cells hold.

    Parameters
    ----------
    holding
        What they hold.
    spec, cells, earlier, raster
        As in :func:`table_of_cells`.
    chips
        What the plan says of chips; of those that are there, advice is taken.
    """
    if earlier is not None:
        earlier.check(chips.spec, spec.names, f"{spec.step}(cells=)")
    places = holding.places
    unit, before = np.zeros(len(places)), np.full(len(places), -1, dtype=np.int64)
    texts = np.empty(len(places), dtype=object)
    hashed = np.full(len(places), -1, dtype=np.int64)
    for zone in np.unique(places[:, 0]).tolist():
        here, name = places[:, 0] == zone, cells.zones.cell_name(zone)
        texts[here] = cell_texts(name, places[here, 1:])
        unit[here] = cell_units(name, places[here, 1:], spec)
        hashed[here] = cells.splits(zone, places[here, 1:], spec)
        if earlier is not None:
            before[here] = earlier.numbers(name, places[here, 1:], spec.names)
    if spec.stratify:
        shares = np.array([float(share) for _, share in spec.ratios])
        _check(chips, spec, holding, before)
        number = deal(holding.stock(spec), shares, unit, before)
    else:
        number = np.where(before >= 0, before, hashed)
    names = dict(zip(texts.tolist(), (spec.names[n] for n in number.tolist()), strict=True))
    if earlier is not None:
        old = earlier.table
        names |= dict(zip(old.column("cell").to_pylist(), old.column("split").to_pylist(), strict=True))
    table = CellTable.of(list(names), list(names.values()), chips.spec)
    return table if raster is None else replace(table, raster=spec.stratify[0], classes=raster)


def _beside(
    chips: PlannedChips, spec: SplitSpec, cells: SplitCells, links: Links,
    places: NDArray[np.int64], cell: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Return pairs of a chip and a cell that has chips, which lies nearer than the buffer and not under the chip."""
    nothing = np.zeros(0, dtype=np.int64)
    if spec.buffer_m <= 0:
        return nothing, nothing
    epsg = chips.table.column("epsg").to_numpy().astype(np.int64)
    near = cells_near(epsg, chips.ground, cells, spec.buffer_m + chips.reach_m)
    known = {tuple(place): at for at, place in enumerate(places.tolist())}
    wanted, back = np.unique(
        np.concatenate([near.zone[:, None], near.cell], axis=1), axis=0, return_inverse=True
    )
    number = np.array([known.get(tuple(place), -1) for place in wanted.tolist()], dtype=np.int64)
    number = number[back.ravel()] if len(number) else nothing
    pair = near.chip * len(places) + number
    fresh = (number >= 0) & ~np.isin(pair, links.chip * len(places) + cell)
    return near.chip[fresh], number[fresh]


def _check(chips: PlannedChips, spec: SplitSpec, holding: Holding, before: NDArray[np.int64]) -> None:
    """Refuse strata that cannot hold; warn of those that cannot hold in every split."""
    subject, km = f"{spec.step}(stratify={holding.column!r})", chips.spec.cell_km
    part = "fold" if spec.step == "folds" else "split"
    wanted = [name for name, share in spec.ratios if share > 0]
    there = holding.cells_of_classes
    cells = np.unique(np.concatenate(there)) if there else before[:0]
    if len(cells) < len(wanted):
        raise PlanError(
            subject, f"{len(cells)} split cell{'s' * (len(cells) != 1)} of {km:g} km that hold some class",
            f"at least {len(wanted)}, one for each {part}",
            _advice(chips, np.arange(chips.table.num_rows), len(wanted)) or "Use smaller cells: chips(cell_km=), or a "
            "larger area.",
        )  # fmt: skip
    whole = holding.held.sum(axis=0) + holding.several.sum(axis=0)
    least = RARE_GROUND * whole.sum() if spec.raster is not None else 0  # a map has specks of many classes
    few = [n for n, own in enumerate(there) if 0 < len(own) < len(wanted) and whole[n] >= least]
    one = [n for n in few if len(there[n]) == 1]
    if one and spec.raster is None and not np.any(before >= 0):
        rows = _rows_with(chips, spec, holding, one[0])
        name = holding.classes[one[0]]
        remedies = [_advice(chips, rows, len(wanted)) or "Use smaller cells: chips(cell_km=)."]
        if holding.one and len(rows):
            value = _typed(chips, holding, name)
            remedies.append(f"Leave it out before: filter(({holding.column!r}, '!=', {value})).")
        raise PlanError(
            subject, f"class {name!r} in one split cell of {km:g} km" + _others(holding, one),
            f"cells for each of {', '.join(wanted)}", " Or: ".join(remedies),
        )  # fmt: skip
    if few:
        counted = ", ".join(f"{holding.classes[n]} ({len(there[n])})" for n in few[:10])
        advice = _advice(chips, _rows_with(chips, spec, holding, few[0]), len(wanted))
        warnings.warn(
            f"{subject}: classes in fewer split cells of {km:g} km than there are {part}s ({len(wanted)}): {counted}. "
            f"Some {part}s have none of them. {advice or 'Group them with others, or leave them out.'}",
            StrataWarning,
            stacklevel=7,
        )


def _rows_with(chips: PlannedChips, spec: SplitSpec, holding: Holding, number: int) -> NDArray[np.int64]:
    """Return the chips that have some of a class; none where the class is of a raster, or chips are elsewhere."""
    if spec.raster is not None or not chips.table.num_rows:
        return np.zeros(0, dtype=np.int64)
    classes = classes_of(chips, spec.stratify, _stratify_text(spec.stratify, spec.step))
    return np.flatnonzero(classes.amounts[:, classes.names.index(holding.classes[number])] > 0)


def _others(classes: Holding, one: Sequence[int]) -> str:
    return f" (and {listed([classes.classes[n] for n in one[1:]], 'others')})" if len(one) > 1 else ""


def _typed(chips: PlannedChips, classes: Holding, name: str) -> str:
    value = next(
        v
        for v in pc.unique(chips.table.column(classes.column)).to_pylist()
        if str(v) == name or (isinstance(v, bool) and str(v).lower() == name)
    )
    return repr(value) if is_number(value) or isinstance(value, bool) else repr(str(value))


def _advice(chips: PlannedChips, rows: NDArray[np.int64], wanted: int) -> str:
    """Return the largest smaller cell of which some chips lie on as many as are wanted; nothing where none does."""
    bounds = bounds_of(chips.table)[rows]
    epsg = chips.table.column("epsg").to_numpy()[rows]
    middle = np.stack([bounds[:, [1, 3]].mean(axis=1), bounds[:, [0, 2]].mean(axis=1)], -1)
    length = chips.size_m
    most = int(chips.spec.cell_km * 1000.0 / length + 1e-9)
    for chips_a_side in range(most - 1, 0, -1):
        side = chips_a_side * length
        places = np.concatenate([epsg[:, None], np.floor(middle / side)], axis=1)
        if len(np.unique(places, axis=0)) >= wanted:
            return f"chips(cell_km={side / 1000.0:.10g}) gives it {len(np.unique(places, axis=0))}."
    return ""
