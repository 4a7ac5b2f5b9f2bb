# SPDX-License-Identifier: Apache-2.0
"""Steps on planned chips: split, filter, select, sample, random windows, a user's table, a user's function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import CellTable, cell_places
from rasteret_dask.chipping.chips import ChipSources, PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FOLD, FeedTable, bounds_of, replaced, with_columns
from rasteret_dask.chipping.ground import Links, cells_under, splits_under
from rasteret_dask.chipping.leftover import whole_cell_km
from rasteret_dask.chipping.randomwindows import random_windows
from rasteret_dask.chipping.regions import names_of
from rasteret_dask.chipping.rulesteps import with_rule
from rasteret_dask.chipping.splits import (
    FEW_CELLS,
    TRAIN,
    SplitCells,
    by_geometry,
    cells_at,
    column_splits,
    too_near,
    warn_if_few,
)
from rasteret_dask.chipping.splittimes import (
    BETWEEN,
    FAR_FUTURE,
    NO_DATE,
    by_time,
    dates,
    none_in_range,
    spans,
    too_soon,
)
from rasteret_dask.chipping.strata import table_of_cells
from rasteret_dask.errors import EmptyError, PlanError, SchemaError
from rasteret_dask.grid import Lattice
from rasteret_dask.planning.plan import (
    TIME,
    CutChips,
    FilterChips,
    FilterPixels,
    Folds,
    Join,
    Map,
    Node,
    Random,
    Sample,
    Select,
    Split,
    SplitSpec,
    WithTable,
    children,
    step_name,
)
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.planning.scan import Table, alone, as_table, filter_table

__all__ = [
    "FOLD",
    "apply_step",
    "carried_out",
    "check_fold_cells",
    "check_splits",
    "ground_of",
    "none_left",
    "steps_of",
    "warn_of_few",
]

_PLANNED_COLUMNS = (
    "epsg",
    "row",
    "col",
    "cell",
    "xmin",
    "ymin",
    "xmax",
    "ymax",
    "datetime",
    "acquisition",
    "split",
)
"""Columns that the plan decides: a user's table may not say otherwise."""

FEW_LABELS = 20
"""Losses are reported per value of a user's column that has at most this many."""

TWO_FOLDS = "chip on the ground of two folds"
"""Why a chip is in no fold."""


def steps_of(plan: Node) -> tuple[CutChips, tuple[Node, ...]]:
    """Return the ``chips`` step of a plan, and the steps on chips in the order in which they are carried out.

    Raises
    ------
    PlanError
        When there is no ``chips`` step.
    """
    node, steps = plan, list[Node]()
    while not isinstance(node, CutChips):
        if isinstance(node, Join) or not children(node):
            raise PlanError("plan", "no chips step", "chips(size) before this", "Call .chips(size) first.")
        steps.append(node)
        node = children(node)[0]
    return node, tuple(reversed(steps))


def apply_step(chips: PlannedChips, step: Node, tables: Mapping[str, Table]) -> PlannedChips:
    """Carry out the last step of a plan on the chips that the steps before it made.

    Raises
    ------
    PlanError
        When it cannot be carried out, or leaves no chip.

    Warns
    -----
    UserWarning
        When there are so few split cells that ratios are a matter of luck.
    """
    result = carried_out(chips, step, tables, whole=True)
    on_cells = not chips.table.column("cell").null_count
    if isinstance(step, Split | Folds) and step.spec.by == "ground" and not step.spec.stratify and on_cells:
        warn_of_few(pc.count_distinct(chips.table.column("cell")).as_py(), chips, step.spec)
    if not result.table.num_rows and not isinstance(step, Split):
        where = step.where if isinstance(step, FilterChips) else ()
        counted = pc.value_counts(chips.table.column("split")).to_pylist()
        splits = {e["values"]: e["counts"] for e in counted if e["values"]}
        reason = alone(chips.table, where, "chips") if where else ""
        raise none_left(step, chips.table.num_rows, splits, reason)
    return result


def carried_out(
    chips: PlannedChips, step: Node, tables: Mapping[str, Table], whole: bool = False
) -> PlannedChips:
    """Carry out a step; it may leave no chip.

    Parameters
    ----------
    chips
        The chips that the steps before it made.
    step
        The step.
    tables
        The tables that its tokens name.
    whole
        Whether these are all chips of the plan: only then can values, cells or times be missing.

    Raises
    ------
    PlanError
        When it cannot be carried out.
    """
    match step:
        case Split(_, spec):
            return _split(chips, spec, tables, whole)
        case Folds(_, spec):
            return _with_folds(chips, spec, tables, whole)
        case FilterChips(_, where):
            for column, *_rest in where:
                if column not in chips.table.column_names:
                    known = ", ".join(chips.table.column_names)
                    raise PlanError(f"filter on chip column {column!r}", "no such column", f"one of {known}")
            return replace(chips, table=filter_table(chips.table, where, "chips"))
        case Select(_, splits):
            check_splits(splits, chips.split)
            chosen = pc.is_in(chips.table.column("split"), value_set=pa.array(list(splits)))
            return replace(chips, table=chips.table.filter(chosen))
        case Sample(_, n, seed, by):
            rows = sample_rows(chips.table, "chip_id", n, seed, by)
            return replace(chips, table=chips.table.take(pa.array(rows)))
        case WithTable(_, token):
            return _with_table(chips, as_table(tables[token]))
        case Map(_, function, source):
            names = [s.plan.name for s in chips.sources]
            if (source is None and len(names) > 1) or (source is not None and source not in names):
                raise PlanError("map(source=)", repr(source), f"one of {', '.join(names)}")
            if chips.pixel_rules:
                raise PlanError(
                    "map", "a filter_pixels before it", "every map before it", "Chips are kept as they leave."
                )
            return replace(chips, maps=(*chips.maps, (source, function)))
        case FilterPixels(_, rule):
            return with_rule(chips, rule)
        case Random() if chips.spec.by_file:
            raise PlanError(
                "random", "chips that are files, as they are", "chips whose windows are cut out of scenes",
                "Cut windows out of files: rd.build_from_files(files, name=...).chips(64).random(100).",
            )  # fmt: skip
        case Random():
            places = None if step.places is None else as_table(tables[step.places])
            return random_windows(chips, step, places)
    raise PlanError("plan", f"a {step_name(step)} step after chips", "a step on chips")


def none_left(step: Node, chips: int, splits: Mapping[str, int], reason: str = "") -> PlanError:
    """Return the error of a step that leaves no chip.

    Parameters
    ----------
    step
        The step.
    chips, splits
        How many chips it was given, and of which splits.
    reason
        Which of its rules leave how many, where that is known.
    """
    name = f"select({', '.join(step.splits)})" if isinstance(step, Select) else step_name(step)
    counted = reason or ", ".join(f"{split} {count:,}" for split, count in splits.items())
    return EmptyError(
        name, f"no chip left of {chips:,}" + (f" ({counted})" if counted else ""), "at least one",
        "Ask for less, or remove the step.",
    )  # fmt: skip


def check_splits(splits: tuple[str, ...], spec: SplitSpec | None) -> None:
    """Refuse to select splits that a plan does not have.

    Raises
    ------
    PlanError
        When there are some.
    """
    names = spec.names if spec else ()
    unknown = [s for s in splits if s not in names]
    if unknown or not names:
        found = f"split {', '.join(map(repr, unknown or splits))}"
        raise PlanError("select", found, f"one of {', '.join(names)}" if names else "a split step before it")


def warn_of_few(cells: int, chips: PlannedChips | ChipSources, spec: SplitSpec) -> None:
    """Warn when there are so few split cells that a split's ratios are a matter of luck."""
    if cells >= FEW_CELLS:
        return
    length = chips.spec.size * chips.resolution
    ground = None
    if isinstance(chips, PlannedChips):  # many acquisitions may show the same ground
        ground = len(np.unique(bounds_of(chips.table), axis=0)) * length**2
    warn_if_few(cells, spec, Lattice(chips.spec.cell_km * 1000.0, length, length), ground)


def _split(chips: PlannedChips, spec: SplitSpec, tables: Mapping[str, Table], whole: bool) -> PlannedChips:
    table = chips.table
    losses: dict[str, int] = {}
    cells = None
    if spec.by == "ground":
        number, cells = _by_ground(chips, spec, tables)
        reason = "chip on the ground of two splits"
    elif spec.by == "geometry":
        number = _by_geometry(chips, spec)
        reason = "chip fed by records of two splits"
    elif spec.by == TIME:
        number, losses = _by_time(chips, spec, tables, whole)
        reason = ""
    else:
        if spec.regions is not None:
            table = _with_regions(table, spec.by, as_table(tables[spec.regions]))
        if spec.by not in table.column_names:
            raise PlanError(
                "split(by=)", repr(spec.by), f"'ground', 'geometry' or one of {', '.join(table.column_names)}",
                f"chips.folds(5) makes a column {FOLD}." if spec.by == FOLD else "",
            )  # fmt: skip
        spec, number = column_splits(table.column(spec.by), spec, whole)
        reason = f"column {spec.by} names no split"
        if spec.regions is not None:
            reason = f"chip that lies in no {spec.by} as a whole, or in one of no split"
    before = {why: count for why, count in chips.dropped.items() if why not in chips.split_losses}
    lost = number < 0
    if spec.by == FOLD and any(why.startswith(TWO_FOLDS) for why in chips.dropped):
        before = {why: count for why, count in before.items() if not why.startswith(TWO_FOLDS)}
        # folds() has counted these: now they are lost, once
        foldless = np.asarray(table.column(FOLD).is_null())
        losses = _lost(table.drop_columns([FOLD]), lost & foldless, TWO_FOLDS)
        lost = lost & ~foldless
    if reason:
        losses |= _lost(table, lost, reason)
    epsg = table.column("epsg").to_numpy().astype(np.int64)
    outlines = chips.outlines_lonlat if spec.buffer_m > 0 else table.column("geometry")
    near = too_near(epsg, chips.ground, number, spec, outlines)
    if near.any():
        others = [name for name in spec.names if name != TRAIN]
        words = " or ".join(others) if len(others) <= 3 else "other"
        losses[f"{words} chip nearer than {spec.buffer_m:g} m to train"] = int(near.sum())
        _warn_of_empty(chips, spec, number, near)
        number = np.where(near, -1, number)
    names = pa.array(spec.names, pa.string()).take(pa.array(number, mask=number < 0))
    return replace(
        chips, table=replaced(table, "split", names), split=spec, dropped=before | losses, cells=cells,
        split_losses=tuple(losses),
    )  # fmt: skip


def _by_time(
    chips: PlannedChips, spec: SplitSpec, tables: Mapping[str, Table], whole: bool
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Return the number of the split whose range holds each chip's time, -1 for none; what is lost, and why."""
    if TIME in chips.table.column_names and spec.date is None:
        raise PlanError(
            "split(by='time')", "a column time, too", "a column of another name",
            "by='time' splits by the time of chips' records, or of a column: split(by='time', date='time').",
        )  # fmt: skip
    span = spans(chips) if spec.date is None else dates(chips.table, spec.date)
    number = by_time(span, spec.values)
    lost: dict[str, int] = {}
    if spec.date is not None:
        dateless = span[:, 0] == NO_DATE
        lost = _lost(chips.table, dateless, f"chip without a date in column {spec.date}")
        number = np.where(dateless, -1, number)
        span = np.where(dateless[:, None], FAR_FUTURE, span)
    else:
        lost |= _lost(chips.table, number == -1, "chip whose time is of two splits")
    lost |= _lost(chips.table, number == BETWEEN, "chip whose time is in no split")
    number = np.maximum(number, -1)
    if spec.gap is not None and TRAIN in spec.names:
        ours = None if spec.moments is None else as_table(tables[spec.moments])
        moments = None if ours is None else np.stack([ours[name].to_numpy() for name in ("start", "end")], -1)
        soon = too_soon(span, number, spec.names.index(TRAIN), spec.gap, moments)
        lost |= _lost(chips.table, soon, f"chip nearer than {spec.gap} in time to train")
        number = np.where(soon, -1, number)
    if whole and len(number) and not np.any(number >= 0):
        raise none_in_range(spec, span)
    return number, lost


def _with_regions(table: pa.Table, column: str, regions: pa.Table) -> pa.Table:
    """Add the column that names the region which each chip lies in."""
    if column in table.column_names:
        raise PlanError(
            "split(by=<regions>)", f"a column {column!r} that chips have already", "another name",
            f"Rename it: regions.rename(columns={{{column!r}: 'region'}}).",
        )  # fmt: skip
    names = names_of(regions, column, table.column("geometry"))
    return table.append_column(pa.field(column, names.type, nullable=bool(names.null_count)), names)


def _with_folds(
    chips: PlannedChips, spec: SplitSpec, tables: Mapping[str, Table], whole: bool
) -> PlannedChips:
    """Add the column that says which fold each chip is in; null where its ground is in two."""
    table = chips.table
    if FOLD in table.column_names:
        raise PlanError(
            "folds", f"a column {FOLD} that is there already", "chips without one",
            "chips.fold(0) takes it as it is; with_table() joins it under another name, for split(by=...).",
        )  # fmt: skip
    if whole:
        check_fold_cells(_cell_count(chips), spec, chips.spec.cell_km)
    number, cells = _by_ground(chips, spec, tables)
    column = pa.array(number, pa.int64(), mask=number < 0)
    field = pa.field(FOLD, column.type, nullable=bool(column.null_count))
    dropped = {**chips.dropped, **_lost(table, number < 0, TWO_FOLDS)}
    return replace(chips, table=table.append_column(field, column), dropped=dropped, fold_cells=cells)


def check_fold_cells(cells: int, spec: SplitSpec, cell_km: float) -> None:
    """Raise PlanError where there are fewer split cells than folds."""
    if len(spec.ratios) > cells:
        fewer = f"folds({cells}) or fewer, or " if cells > 1 else ""
        raise PlanError(
            f"folds({len(spec.ratios)})", f"{cells} split cell{'s' * (cells != 1)} of {cell_km:g} km",
            "a split cell for each fold at least", f"Ask for {fewer}smaller cells: chips(cell_km=...).",
        )  # fmt: skip


def _by_ground(
    chips: PlannedChips, spec: SplitSpec, tables: Mapping[str, Table]
) -> tuple[NDArray[np.int64], CellTable | None]:
    """Return the number of the split or fold whose ground each chip lies on, -1 for those on two; the table of cells.

    There is a table where more than a hash deals cells.
    """
    cells, links = ground_of(chips, spec)
    if spec.stratify or spec.cells is not None:
        earlier = None if spec.cells is None else CellTable.again(as_table(tables[spec.cells]))
        raster = None if spec.raster is None else as_table(tables[spec.raster])
        cells = replace(cells, table=table_of_cells(chips, spec, cells, links, earlier, raster))
    return splits_under(links, chips.table.num_rows, cells, spec), cells.table


def ground_of(chips: PlannedChips, spec: SplitSpec) -> tuple[SplitCells, Links]:
    """Return the split cells, and those that decide the split of each chip."""
    inside = cell_places(chips.table)
    # 1.5 pixels: chips lie up to a pixel east and south of their cells, which may be turned against this zone's
    wider = np.array([-1, -1, 1, 1]) * 1.5 * chips.resolution * (inside is not None)
    epsg = chips.table.column("epsg").to_numpy().astype(np.int64)
    cells = _split_cells(chips)
    beyond = chips.reach_m > 0
    bounds = chips.ground if beyond else bounds_of(chips.table) + wider
    return cells, cells_under(epsg, bounds, cells, spec.boundary, inside, beyond)


def _split_cells(chips: PlannedChips) -> SplitCells:
    return SplitCells(chips.spec.grid.zones, chips.spec.cell_km * 1000.0)


def _cell_count(chips: PlannedChips) -> int:
    """Return how many split cells have chips: those that windows were laid out in, or whose centre they hold."""
    table = chips.table
    if not table.column("cell").null_count:
        return int(pc.count_distinct(table.column("cell")).as_py())
    epsg, bounds, count = table.column("epsg").to_numpy(), bounds_of(table), set[tuple[int, ...]]()
    for code in np.unique(epsg).tolist():
        zones, cells = cells_at(int(code), bounds[epsg == code], _split_cells(chips))
        count |= {(zone, *cell) for zone, cell in zip(zones.tolist(), cells.tolist(), strict=True) if zone}
    return len(count)


def _warn_of_empty(
    chips: PlannedChips, spec: SplitSpec, number: NDArray[np.int64], near: NDArray[np.bool_]
) -> None:
    """Warn where the buffer leaves a split without a chip, with the split cell that has room for one inside of it."""
    gone = {
        name: int(np.sum(number == at))
        for at, name in enumerate(spec.names)
        if np.any(number == at) and not np.any((number == at) & ~near)
    }
    if not gone:
        return
    length, stride = chips.size_m, chips.spec.stride * chips.resolution
    step = stride if chips.spec.in_cells else chips.resolution
    # chips begin at whole strides from the cell's corner, and train may come up to its edge on either side
    reach = chips.reach_m
    inside = math.ceil((spec.buffer_m + 2 * reach) / step - 1e-9) * step + length + spec.buffer_m + 2 * reach
    larger = whole_cell_km(length, stride, inside) if spec.by == "ground" else None
    advice = f"chips(cell_km={larger:g}) has room for one inside of it, or lower" if larger else "Lower"
    warnings.warn(
        f"split(buffer_m={spec.buffer_m:g}) drops every chip of {', '.join(f'{n} ({c:,})' for n, c in gone.items())}: "
        f"each is nearer than that to a chip of train. {advice} buffer_m.",
        UserWarning,
        stacklevel=4,
    )


def _lost(table: pa.Table, rows: NDArray[np.bool_], reason: str) -> dict[str, int]:
    """Count the chips that a step leaves without a split, and those of each value of the user's own columns."""
    if not rows.any():
        return {}
    result, gone = {reason: int(rows.sum())}, table.filter(pa.array(rows))
    for name in table.column_names:
        if name in CHIP_SCHEMA.names or pa.types.is_nested(table.column(name).type):
            continue
        if pc.count_distinct(table.column(name)).as_py() <= FEW_LABELS:
            for entry in pc.value_counts(gone.column(name)).to_pylist():
                result[f"{reason}, {name} = {entry['values']}"] = int(entry["counts"])
    return result


def _by_geometry(chips: PlannedChips, spec: SplitSpec) -> NDArray[np.int64]:
    """Return the split of the records that feed each chip, -1 where they differ."""
    feeds = FeedTable.of(chips.table)
    label = np.empty(len(feeds.row), dtype=np.int64)
    for number, resolved in enumerate(chips.sources):
        own = feeds.source == number
        wkb = resolved.records.table.column("geometry").to_pylist()
        label[own] = by_geometry(wkb, spec)[feeds.row[own]]
    low = np.minimum.reduceat(label, feeds.offsets[:-1])
    high = np.maximum.reduceat(label, feeds.offsets[:-1])
    return np.where(low == high, low, -1)


def _with_table(chips: PlannedChips, more: pa.Table) -> PlannedChips:
    if "chip_id" not in more.column_names:
        raise SchemaError("with_table", f"columns {', '.join(more.column_names)}", "a column chip_id")
    wanted = more.column("chip_id").to_pylist()
    place = {c: i for i, c in enumerate(wanted)}
    if len(place) != len(wanted):
        raise SchemaError("with_table", "a chip_id that stands twice", "each chip_id once")
    known = chips.table.column("chip_id").to_pylist()
    unknown = set(place) - set(known)
    if unknown:
        raise SchemaError(
            "with_table", f"{len(unknown)} chip_ids this plan does not have ({sorted(unknown)[:3]})",
            "chips of the same plan", "Use the plan the table was saved from.",
        )  # fmt: skip
    rows = np.array([i for i, c in enumerate(known) if c in place], dtype=np.int64)
    at = pa.array([place[known[i]] for i in rows], pa.int64())
    own, theirs = chips.table.take(pa.array(rows)), more.take(at)
    changed = [
        n
        for n in _PLANNED_COLUMNS
        if n in theirs.column_names and own.column(n).to_pylist() != theirs.column(n).to_pylist()
    ]
    if changed:
        raise SchemaError(
            "with_table", f"other values in column {', '.join(changed)} than the plan's",
            "the plan's own values", "Put yours in a column of another name, such as split(by='my_split').",
        )  # fmt: skip
    return replace(chips, table=with_columns(own, theirs))
