"""An optimized plan and its records become the chip table: one row per chip, with the records that feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.coverage import Outlines
from rasteret_dask.errors import GridError, PlanError, SchemaError
from rasteret_dask.feeds import Feeds, covered, enough, pick, slots_of, source_outlines
from rasteret_dask.frame import Frame, Phase, candidates, lonlat
from rasteret_dask.grid import Lattice, northern
from rasteret_dask.optimize import optimize
from rasteret_dask.plan import (
    Chips,
    ChipSpec,
    Function,
    Join,
    Keep,
    Map,
    Node,
    Sample,
    Select,
    Split,
    SplitSpec,
    WithTable,
    children,
)
from rasteret_dask.records import Records
from rasteret_dask.resolve import ResolvedSource, evaluate, resolve_source
from rasteret_dask.scan import Table, filter_table, sample_rows
from rasteret_dask.splits import by_geometry, by_ground, column_splits, too_near, warn_if_few
from rasteret_dask.timing import TimeAxis

__all__ = ["CHIP_SCHEMA", "FEED_TYPE", "ChipSet", "plan_chips"]

FEED_TYPE = pa.struct(
    [
        pa.field("source", pa.dictionary(pa.int8(), pa.string())),
        pa.field("slot", pa.int16()),  # place on the source's time axis
        pa.field("order", pa.int16()),  # place of the acquisition among the slot's candidates
        pa.field("record", pa.dictionary(pa.int32(), pa.string())),  # the record's id
        pa.field("row", pa.int32()),  # the record's row among the source's records
        pa.field("coverage", pa.float32()),  # share of the chip this record covers
    ]
)

CHIP_SCHEMA = pa.schema(
    [
        pa.field("chip_id", pa.string(), nullable=False),
        pa.field("epsg", pa.int32(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("col", pa.int64()),
        pa.field("cell", pa.string()),  # split cell: zone/row/col; null where windows are laid out freely
        pa.field("xmin", pa.float64()),
        pa.field("ymin", pa.float64()),
        pa.field("xmax", pa.float64()),
        pa.field("ymax", pa.float64()),
        pa.field("datetime", pa.timestamp("us", tz="UTC")),  # of the acquisition; null with a time axis
        pa.field("acquisition", pa.string()),
        pa.field("slots", pa.int32()),  # slots of the reference source that have records
        pa.field(
            "coverage", pa.float32()
        ),  # smallest covered share among all sources' slots that have records
        pa.field("split", pa.string()),
        pa.field("geometry", pa.binary()),  # WKB, lon/lat
        pa.field("feeds", pa.list_(FEED_TYPE)),
    ]
)
"""What every chip table has. Columns of ``at=`` and of ``with_table`` come behind these."""


@dataclass(frozen=True)
class ChipSet:
    """A planned set of chips."""

    table: pa.Table
    """CHIP_SCHEMA and the user's further columns, in the order of shards."""
    sources: tuple[ResolvedSource, ...]
    reference: int
    spec: ChipSpec
    split: SplitSpec | None
    resolution: float
    """Pixel size of the reference source."""
    maps: tuple[tuple[str | None, Function], ...] = ()
    """Functions over chips after the join, with the source each applies to."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many chips (or records) were left out, by reason."""
    notes: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    """For each source, a pixel corner of its grid in each zone."""
    outlines: tuple[Outlines, ...] = ()

    @property
    def size_m(self) -> float:
        """Side of a chip on the ground, metres."""
        return self.spec.size * self.resolution


def plan_chips(plan: Node, tables: Mapping[str, Table], *, optimized: bool = True) -> ChipSet:
    """Turn a plan that has a ``chips`` step into its chip table.

    Parameters
    ----------
    plan
        The plan.
    tables
        The tables that its tokens name.
    optimized
        False carries the plan out as it is written; the result is the same.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out, before any pixel is read.
    """
    node = optimize(plan) if optimized else plan
    steps: list[Node] = []
    while not isinstance(node, Chips):
        if isinstance(node, Join) or not children(node):
            raise PlanError("plan", "no chips step", "chips(size) before this", "Call .chips(size) first.")
        steps.append(node)
        node = children(node)[0]
    result = _lay_chips(node, tables)
    for step in reversed(steps):
        result = _apply(result, step, tables)
    return result


def _lay_chips(node: Chips, tables: Mapping[str, Table]) -> ChipSet:
    child, maps = node.child, []
    while isinstance(child, Map) and isinstance(child.child, Join):
        maps.append((child.source, child.function))
        child = child.child
    if isinstance(child, Join):
        sources = [
            resolve_source(n, evaluate(c, tables)) for n, c in zip(child.names, child.children, strict=True)
        ]
    else:
        members = evaluate(child, tables)
        sources = [resolve_source(members[0].name if len(members) == 1 else "merged", members)]
    names = [s.plan.name for s in sources]
    if node.spec.reference is not None and node.spec.reference not in names:
        raise PlanError("chips(reference=)", repr(node.spec.reference), f"one of {', '.join(names)}")
    reference = names.index(node.spec.reference) if node.spec.reference else 0
    sources = _shared_time(sources)
    resolution = sources[reference].plan.resolution
    _check_sizes(node.spec, sources, reference)
    found = [source_outlines(s) for s in sources]
    phases = tuple(_phases(s, o, node.spec) for s, o in zip(sources, found, strict=True))
    points = None if node.spec.at is None else _as_table(tables[node.spec.at])
    frame = candidates(node.spec, found[reference], resolution, phases[reference], points)
    return _fill(node.spec, sources, reference, found, phases, frame, points, tuple(reversed(maps)))


def _as_table(table: Table) -> pa.Table:
    return table if isinstance(table, pa.Table) else table.to_table()


def _shared_time(sources: list[ResolvedSource]) -> list[ResolvedSource]:
    """Give sources of intervals their own slots where another source has a time axis."""
    axes = [s.axis for s in sources if s.axis is not None]
    if not axes:
        return sources
    start, end = min(a.start.min() for a in axes), max(a.end.max() for a in axes)
    result = []
    for source in sources:
        if source.axis is None:
            if not bool(source.passes.is_interval.all()):
                raise PlanError(
                    f"source {source.plan.name!r}", "records of instants and no time=",
                    "a time axis of its own, since another joined source has one",
                    "Add harmonize(time=...) to it.",
                )  # fmt: skip
            pairs = sorted(set(zip(source.passes.start.tolist(), source.passes.end.tolist(), strict=True)))
            stamps = np.array(pairs, dtype=np.int64).reshape(-1, 2).astype("datetime64[ns]")
            keep = (stamps[:, 0] < end) & (stamps[:, 1] > start)
            if not keep.any():
                raise PlanError(f"source {source.plan.name!r}", f"intervals {stamps.min()} to {stamps.max()}",
                                f"one that overlaps {start} to {end}")  # fmt: skip
            axis = TimeAxis(stamps[keep, 0], stamps[keep, 1])
            slots = tuple(int(t) for t in axis.start.astype(np.int64))
            source = replace(source, axis=axis, plan=replace(source.plan, slots=slots))
        result.append(source)
    return result


def _check_sizes(spec: ChipSpec, sources: list[ResolvedSource], reference: int) -> None:
    resolution = sources[reference].plan.resolution
    length = spec.size * resolution
    if spec.grid == "zone" and spec.at is None:
        Lattice(1, spec.cell_km * 1000.0, length, spec.stride * resolution)
    others = [s.plan.resolution for s in sources]
    for source in sources:
        pixels = length / source.plan.resolution
        if abs(pixels - round(pixels)) < 1e-6 and round(pixels) > 0:
            continue
        fits = [n for n in range(8, 4 * spec.size + 64, 8) if _fits(n * resolution, others)]
        below = [n for n in fits if n < spec.size][-1:]
        above = [n for n in fits if n > spec.size][:1]
        cell = spec.cell_km * 1000.0
        fills = [n for n in fits if abs(cell / (n * resolution) - round(cell / (n * resolution))) < 1e-9]
        best = min(fills, key=lambda n: abs(n - spec.size), default=None)
        raise GridError(
            f"chips(size={spec.size}) with source {source.plan.name!r}",
            f"{length:g} m = {pixels:.4g} pixels of {source.plan.resolution:g} m",
            "a whole number of every source's pixels",
            f"Nearest sizes that fit: {', '.join(map(str, below + above)) or 'none'}"
            + (f"; {best} also fills a split cell." if best else "."),
        )


def _fits(length: float, resolutions: list[float]) -> bool:
    return all(abs(length / r - round(length / r)) < 1e-6 for r in resolutions)


def _phases(source: ResolvedSource, found: Outlines, spec: ChipSpec) -> Phase:
    """Return a pixel corner in each CRS: the first member's that has records there, that of most of them."""
    resolution = source.plan.resolution
    outline = found.of_record
    counted: dict[int, dict[tuple[float, float], int]] = {}
    settled: dict[int, int] = {}
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    near = None
    if area is not None:
        boxes = source.records.table.column("bbox").combine_chunks()
        if not boxes.null_count:
            sides = [
                pc.struct_field(boxes, n).to_numpy(zero_copy_only=False)
                for n in ("xmin", "ymin", "xmax", "ymax")
            ]
            near = shapely.intersects(shapely.box(*sides), shapely.buffer(area, 0.1))
    for row in range(len(outline)):
        if near is not None and not near[row]:
            continue
        number = int(outline[row])
        epsg, member = int(found.epsg[number]), int(source.member[row])
        if settled.setdefault(epsg, member) != member:
            continue
        corner = tuple(np.round(np.mod(found.transform[number][[2, 5]], resolution), 6) % resolution)
        votes = counted.setdefault(epsg, {})
        votes[corner] = votes.get(corner, 0) + 1
    return {e: max(sorted(v), key=lambda c, v=v: v[c]) for e, v in counted.items()}  # type: ignore[misc]


def _fill(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    found: list[Outlines],
    phases: tuple[Phase, ...],
    frame: Frame,
    points: pa.Table | None,
    maps: tuple[tuple[str | None, Function], ...],
) -> ChipSet:
    """Find what feeds each candidate window and keep the windows that every source covers."""
    dropped = {f"record replaced by a newer baseline ({s.plan.name})": s.passes.replaced for s in sources}
    dropped = {k: v for k, v in dropped.items() if v}
    touched = [covered(s, o, frame) for s, o in zip(sources, found, strict=True)]
    timed = sources[reference].axis is not None
    if timed:
        feeds, alive, share, slots = _with_slots(spec, sources, found, frame, touched)
        chip_window = np.flatnonzero(alive)
        acquisition = np.full(len(chip_window), -1, dtype=np.int64)
    else:
        feeds, chip_window, acquisition, share = _by_acquisition(
            spec, sources, reference, found, frame, touched
        )
        slots = np.ones(len(chip_window), dtype=np.int64)
    lost = len(frame) - len(np.unique(chip_window))
    if lost:
        names = " and ".join(s.plan.name for s in sources)
        dropped[f"window not covered to {spec.min_coverage:.0%} by {names}"] = lost
    if not len(chip_window):
        raise PlanError(
            "chips", f"none of {len(frame)} candidate windows is covered to {spec.min_coverage:.0%} by every source",
            "at least one chip", "Lower min_coverage, change the area, or check that the sources overlap in time.",
        )  # fmt: skip
    order = _order(frame, chip_window, acquisition, sources[reference])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    feeds = [replace(f, window=place[f.window]) for f in feeds]
    table = _table(
        sources, reference, frame, chip_window[order], acquisition[order], slots[order], share[order], feeds
    )
    if points is not None:
        table = _with_columns(table, points.take(pa.array(frame.index[chip_window[order]])))  # type: ignore[index]
    result = ChipSet(table, tuple(sources), reference, spec, None, sources[reference].plan.resolution, maps)
    return replace(result, dropped=dropped, phases=phases, outlines=tuple(found))


def _with_slots(
    spec: ChipSpec, sources: list[ResolvedSource], found: list[Outlines], frame: Frame, touched: list[Feeds]
) -> tuple[list[Feeds], NDArray[np.bool_], NDArray[np.float64], NDArray[np.int64]]:
    alive = np.ones(len(frame), dtype=bool)
    share = np.ones(len(frame))
    result, reference_slots = [], np.zeros(len(frame), dtype=np.int64)
    for number, (source, outline, feeds) in enumerate(zip(sources, found, touched, strict=True)):
        assert source.axis is not None
        slotted = slots_of(source, feeds, source.axis)
        good, key, part = enough(slotted, frame, outline, spec.min_coverage)
        slots = int(slotted.slot.max()) + 1 if len(slotted.slot) else 1
        filled = np.bincount(key // slots, minlength=len(frame))
        alive &= filled >= max(spec.min_slots, 1)
        np.minimum.at(share, key // slots, part)
        reference_slots = filled if number == 0 else reference_slots
        result.append((source, outline, good))
    feeds = [pick(s, f.take(alive[f.window]), frame, o, s.axis) for s, o, f in result]
    number = np.cumsum(alive) - 1
    feeds = [replace(f, window=number[f.window]) for f in feeds]
    return feeds, alive, share[alive], reference_slots[alive]


def _by_acquisition(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    found: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
) -> tuple[list[Feeds], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Make a chip of each (window, acquisition of the reference); others give their nearest acquisition."""
    passes = sources[reference].passes
    good, key, share = enough(touched[reference], frame, found[reference], spec.min_coverage)
    slots = int(touched[reference].slot.max()) + 1 if len(touched[reference].slot) else 1
    window, acquisition = key // slots, key % slots
    alive = np.ones(len(key), dtype=bool)
    feeds: list[Feeds] = []
    for number, (source, outline, own) in enumerate(zip(sources, found, touched, strict=True)):
        if number == reference:
            chip = np.searchsorted(key, good.window * slots + good.slot)
            feeds.append(replace(good, window=chip))
            continue
        ready, other_key, other_share = enough(own, frame, outline, spec.min_coverage)
        other_slots = int(own.slot.max()) + 1 if len(own.slot) else 1
        chosen = _nearest(
            source, passes.start[acquisition], window, other_key // other_slots, other_key % other_slots
        )
        alive &= chosen >= 0
        at = np.searchsorted(other_key, window * other_slots + np.maximum(chosen, 0))
        share = np.where(
            chosen >= 0, np.minimum(share, other_share[np.minimum(at, len(other_share) - 1)]), 0.0
        )
        feeds.append(_chosen(ready, other_slots, window, chosen))
    number = np.cumsum(alive) - 1
    kept = []
    for source, outline, f in zip(sources, found, feeds, strict=True):
        f = f.take(alive[f.window])
        in_window = replace(f, window=window[f.window])
        chip = number[f.window]
        # One slot per chip: the chip's number stands in for the window while the pick sorts.
        ordered = pick(source, replace(in_window, window=chip, slot=np.zeros_like(f.slot)),
                       frame.take(window[alive]), outline, None)  # fmt: skip
        kept.append(ordered)
    return kept, window[alive], acquisition[alive], share[alive]


def _nearest(
    source: ResolvedSource,
    when: NDArray[np.datetime64],
    window: NDArray[np.int64],
    other_window: NDArray[np.int64],
    other_pass: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return for each chip the other source's acquisition: the interval that contains it, else the nearest."""
    start = source.passes.start[other_pass].astype(np.int64)
    end = source.passes.end[other_pass].astype(np.int64)
    moment = when.astype(np.int64)
    first = np.searchsorted(other_window, window, side="left")
    last = np.searchsorted(other_window, window, side="right")
    result = np.full(len(window), -1, dtype=np.int64)
    for chip in np.flatnonzero(last > first):
        own = slice(first[chip], last[chip])
        gap = np.maximum(
            0, np.maximum(start[own] - moment[chip], moment[chip] - (end[own] - (end[own] > start[own])))
        )
        if bool(source.passes.is_interval.all()) and gap.min() > 0:
            continue
        result[chip] = other_pass[own][np.lexsort((start[own], gap))[0]]
    return result


def _chosen(ready: Feeds, slots: int, window: NDArray[np.int64], chosen: NDArray[np.int64]) -> Feeds:
    """Return the entries of the chosen (window, acquisition) of each chip, with the chip's number as window."""
    order = np.lexsort((ready.slot, ready.window))
    ready = ready.take(order)
    key = ready.window * slots + ready.slot
    wanted = window * slots + np.maximum(chosen, 0)
    first = np.searchsorted(key, wanted, side="left")
    count = np.where(chosen >= 0, np.searchsorted(key, wanted, side="right") - first, 0)
    chip = np.repeat(np.arange(len(window)), count)
    within = np.arange(len(chip)) - np.repeat(np.cumsum(count) - count, count)
    return replace(ready.take(first[chip] + within), window=chip)


def _order(
    frame: Frame, window: NDArray[np.int64], acquisition: NDArray[np.int64], source: ResolvedSource
) -> NDArray[np.int64]:
    """Return the chips in space: by CRS, split cell, row, column; then by time."""
    when = np.where(acquisition >= 0, acquisition, 0)
    row, col = frame.row[window], frame.col[window]
    if frame.cell is None:
        coarse = (frame.bounds[window][:, [3, 0]] // 15360).astype(np.int64)
        cell_row, cell_col = -coarse[:, 0], coarse[:, 1]
    else:
        cell_row, cell_col = frame.cell[window].T
    return np.lexsort((when, col, row, cell_col, cell_row, frame.epsg[window]))


def _table(
    sources: list[ResolvedSource],
    reference: int,
    frame: Frame,
    window: NDArray[np.int64],
    acquisition: NDArray[np.int64],
    slots: NDArray[np.int64],
    share: NDArray[np.float64],
    feeds: list[Feeds],
) -> pa.Table:
    passes = sources[reference].passes
    prefix = [frame.prefix[w] for w in window]
    known = acquisition >= 0
    ids = [f"{p}_{passes.names[a]}" if a >= 0 else p for p, a in zip(prefix, acquisition, strict=True)]
    when = pa.array(passes.start[np.maximum(acquisition, 0)].astype("datetime64[us]"), mask=~known)
    cell = None
    if frame.cell is not None:
        zone = frame.epsg[window] - 32600
        cell = [f"{z}/{r}/{c}" for z, (r, c) in zip(zone, frame.cell[window].tolist(), strict=True)]
    columns = {
        "chip_id": pa.array(ids),
        "epsg": pa.array(frame.epsg[window].astype(np.int32)),
        "row": pa.array(frame.row[window]),
        "col": pa.array(frame.col[window]),
        "cell": pa.nulls(len(window), pa.string()) if cell is None else pa.array(cell),
        **{n: pa.array(frame.bounds[window, i]) for i, n in enumerate(("xmin", "ymin", "xmax", "ymax"))},
        "datetime": when.cast(pa.timestamp("us", tz="UTC")),
        "acquisition": pa.array([passes.names[a] if a >= 0 else None for a in acquisition], pa.string()),
        "slots": pa.array(slots.astype(np.int32)),
        "coverage": pa.array(share.astype(np.float32)),
        "split": pa.nulls(len(window), pa.string()),
        "geometry": pa.array(shapely.to_wkb(lonlat(frame.take(window))), pa.binary()),
        "feeds": _feed_column(sources, feeds, len(window)),
    }
    return pa.table(columns, schema=CHIP_SCHEMA)


def _feed_column(sources: list[ResolvedSource], feeds: list[Feeds], chips: int) -> pa.ListArray:
    number = np.concatenate([np.full(len(f.window), i, dtype=np.int8) for i, f in enumerate(feeds)])
    window = np.concatenate([f.window for f in feeds])
    order = np.argsort(window, kind="stable")  # within a chip: by source, slot, order, nearness
    base = np.cumsum([0, *(len(s.records) for s in sources)])
    row = np.concatenate([f.record for f in feeds])[order]
    ids = pa.array([i for s in sources for i in s.records.ids])
    record = pa.DictionaryArray.from_arrays(pa.array((row + base[number[order]]).astype(np.int32)), ids)
    names = pa.array([s.plan.name for s in sources])
    fields = [
        pa.DictionaryArray.from_arrays(pa.array(number[order]), names),
        pa.array(np.concatenate([f.slot for f in feeds])[order].astype(np.int16)),
        pa.array(np.concatenate([f.order for f in feeds])[order].astype(np.int16)),
        record,
        pa.array(row.astype(np.int32)),
        pa.array(np.concatenate([f.share for f in feeds])[order].astype(np.float32)),
    ]
    count = np.bincount(window, minlength=chips)
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    struct = pa.StructArray.from_arrays(fields, fields=list(FEED_TYPE))
    return pa.ListArray.from_arrays(pa.array(offsets), struct)


def _with_columns(table: pa.Table, more: pa.Table) -> pa.Table:
    for name in more.column_names:
        if name not in table.column_names and name not in ("geometry", "__index__"):
            table = table.append_column(more.schema.field(name), more.column(name))
    return table


def _apply(chips: ChipSet, step: Node, tables: Mapping[str, Table]) -> ChipSet:
    """Carry out one step on the chip table."""
    match step:
        case Split(_, spec):
            return _split(chips, spec)
        case Keep(_, where):
            for column, *_rest in where:
                if column not in chips.table.column_names:
                    known = ", ".join(chips.table.column_names)
                    raise PlanError(f"filter on chip column {column!r}", "no such column", f"one of {known}")
            return _kept(chips, filter_table(chips.table, where, "chips"), "filter")
        case Select(_, splits):
            return _select(chips, splits)
        case Sample(_, n, seed, by):
            rows = sample_rows(chips.table, "chip_id", n, seed, by)
            return _kept(chips, chips.table.take(pa.array(rows)), "sample")
        case WithTable(_, token):
            return _with_table(chips, _as_table(tables[token]))
        case Map(_, function, source):
            names = [s.plan.name for s in chips.sources]
            if (source is None and len(names) > 1) or (source is not None and source not in names):
                raise PlanError("map(source=)", repr(source), f"one of {', '.join(names)}")
            return replace(chips, maps=(*chips.maps, (source, function)))
    raise PlanError("plan", f"a {type(step).__name__} step after chips", "a step on chips")


def _kept(chips: ChipSet, table: pa.Table, step: str) -> ChipSet:
    if not table.num_rows:
        raise PlanError(step, f"no chip left of {chips.table.num_rows}", "at least one", "Loosen the step.")
    return replace(chips, table=table)


def _select(chips: ChipSet, splits: tuple[str, ...]) -> ChipSet:
    known = chips.split.names if chips.split else ()
    unknown = [s for s in splits if s not in known]
    if unknown or not known:
        found = f"split {', '.join(map(repr, unknown or splits))}"
        raise PlanError("select", found, f"one of {', '.join(known)}" if known else "a split step before it")
    table = chips.table.filter(pc.is_in(chips.table.column("split"), value_set=pa.array(list(splits))))
    return _kept(chips, table, f"select({', '.join(splits)})")


def _split(chips: ChipSet, spec: SplitSpec) -> ChipSet:
    table = chips.table
    epsg = table.column("epsg").to_numpy().astype(np.int64)
    bounds = np.stack([table.column(n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax")], -1)
    cell_m = chips.spec.cell_km * 1000.0
    dropped = dict(chips.dropped)
    if spec.by == "ground":
        inside = _cells(table)
        number = by_ground(epsg, bounds, cell_m, spec, inside)
        if inside is not None:
            warn_if_few(
                len(set(table.column("cell").to_pylist())),
                spec,
                Lattice(1, cell_m, chips.size_m, chips.size_m),
            )
        reason = "chip on the ground of two splits"
    elif spec.by == "geometry":
        number = _by_geometry(chips, spec)
        reason = "chip fed by records of two splits"
    else:
        if spec.by not in table.column_names:
            raise PlanError(
                "split(by=)", repr(spec.by), f"'ground', 'geometry' or one of {', '.join(table.column_names)}"
            )
        number = column_splits(table.column(spec.by).to_pylist(), spec, spec.by)
        reason = f"column {spec.by} names no split"
    if np.any(number < 0):
        dropped[reason] = int(np.sum(number < 0))
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    near = too_near(epsg, bounds, number, spec, shapes)
    if near.any():
        dropped[f"val or test chip nearer than {spec.buffer_m:g} m to train"] = int(near.sum())
        number = np.where(near, -1, number)
    names = np.array([*spec.names, None], dtype=object)
    column = pa.array(names[number], pa.string())
    at = table.schema.get_field_index("split")
    table = table.set_column(at, CHIP_SCHEMA.field("split"), column)
    return replace(chips, table=table, split=spec, dropped=dropped)


def _cells(table: pa.Table) -> NDArray[np.int64] | None:
    if table.column("cell").null_count:
        return None
    parts = pc.split_pattern(table.column("cell").combine_chunks(), "/")
    flat = np.array(parts.flatten().to_pylist()).reshape(-1, 3)
    return np.asarray(flat[:, 1:].astype(np.int64))


def _by_geometry(chips: ChipSet, spec: SplitSpec) -> NDArray[np.int64]:
    """Return the split of the records that feed each chip, -1 where they differ."""
    feeds = chips.table.column("feeds").combine_chunks()
    feeds = feeds.chunk(0) if isinstance(feeds, pa.ChunkedArray) else feeds
    flat = feeds.flatten()
    source = flat.field("source").indices.to_numpy()
    row = flat.field("row").to_numpy()
    label = np.empty(len(row), dtype=np.int64)
    for number, resolved in enumerate(chips.sources):
        wkb = resolved.records.table.column("geometry").to_pylist()
        label[source == number] = by_geometry(wkb, spec)[row[source == number]]
    offsets = np.asarray(feeds.offsets) - feeds.offsets[0].as_py()
    low = np.minimum.reduceat(label, offsets[:-1])
    high = np.maximum.reduceat(label, offsets[:-1])
    return np.where(low == high, low, -1)


def _with_table(chips: ChipSet, more: pa.Table) -> ChipSet:
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
    table = _with_columns(chips.table.take(pa.array(rows)), more.take(at))
    if "split" in more.column_names and chips.split is None:
        pass
    return _kept(chips, table, "with_table")


def used_records(chips: ChipSet) -> tuple[list[Records], pa.Table]:
    """Return each source's records that feed at least one chip, and the chip table with rows counted in those."""
    table = chips.table.combine_chunks()
    feeds = table.column("feeds").chunk(0)
    flat = feeds.flatten()
    source = flat.field("source").indices.to_numpy()
    row = flat.field("row").to_numpy().copy()
    kept = []
    for number, resolved in enumerate(chips.sources):
        own = source == number
        used, back = np.unique(row[own], return_inverse=True)
        row[own] = back
        kept.append(resolved.records.take(used))
    fields = [flat.field(f.name) for f in FEED_TYPE]
    fields[4] = pa.array(row.astype(np.int32))
    offsets = np.asarray(feeds.offsets) - feeds.offsets[0].as_py()
    column = pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.StructArray.from_arrays(fields, fields=list(FEED_TYPE))
    )
    at = table.schema.get_field_index("feeds")
    return kept, table.set_column(at, CHIP_SCHEMA.field("feeds"), column)


def native_share(chips: ChipSet) -> dict[str, dict[str, int]]:
    """Return per source how many used records keep native pixels, are only translated, or are resampled."""
    result: dict[str, dict[str, int]] = {}
    feeds = chips.table.column("feeds").combine_chunks()
    feeds = feeds.chunk(0) if isinstance(feeds, pa.ChunkedArray) else feeds
    owner = np.repeat(np.arange(len(feeds)), np.asarray(pc.list_value_length(feeds)))
    flat = feeds.flatten()
    source = flat.field("source").indices.to_numpy()
    epsg = chips.table.column("epsg").to_numpy()[owner]
    west = chips.table.column("xmin").to_numpy()[owner]
    north = chips.table.column("ymax").to_numpy()[owner]
    for number, (resolved, found) in enumerate(zip(chips.sources, chips.outlines, strict=True)):
        own = source == number
        record = flat.field("row").to_numpy()[own]
        outline = found.of_record[record]
        size = resolved.plan.resolution
        shift = (np.stack([west[own], north[own]], -1) - found.transform[outline][:, [2, 5]]) / size
        same = (np.abs(shift - np.round(shift)).max(1, initial=0.0) < 1e-4) & (
            epsg[own] == found.epsg[outline]
        )
        same &= np.abs(np.abs(found.transform[outline][:, 0]) - size) < 1e-9 * size
        resampled = np.unique(record[~same])
        moved = np.array([northern(int(e))[1] != 0 for e in resolved.records.epsg])
        native = np.setdiff1d(np.unique(record), resampled)
        result[resolved.plan.name] = {
            "native": int(np.sum(~moved[native])),
            "translated": int(np.sum(moved[native])),
            "resampled": len(resampled),
        }
    return result


def summary_of_times(chips: ChipSet) -> dict[str, list[str]]:
    """Return the start of each slot, per source with a time axis."""
    return {
        s.plan.name: [pd.Timestamp(t).isoformat() for t in s.plan.slots]
        for s in chips.sources
        if s.plan.slots is not None
    }
