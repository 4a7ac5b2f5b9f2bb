"""An optimized plan and its records become the planned chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.chiptable import CHIP_SCHEMA, FeedTable, replaced, texts, with_columns
from rasteret_dask.coverage import Outlines
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.feeds import Feeds, covered, enough, pick, slots_of, source_outlines
from rasteret_dask.frame import Frame, Phase, candidates, lonlat
from rasteret_dask.grid import Lattice
from rasteret_dask.plan import Chips, ChipSpec, Function, Join, Map, Node, SplitSpec
from rasteret_dask.records import Records
from rasteret_dask.resolve import ResolvedSource, evaluate, resolve_source
from rasteret_dask.scan import Table, as_table
from rasteret_dask.timing import TimeAxis

__all__ = ["ChipSet", "lay_chips", "used_records"]


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
    """How many chips, windows or records were left out, by reason."""
    outlines: tuple[Outlines, ...] = ()
    """For each source, the covered ground of its records."""

    @property
    def size_m(self) -> float:
        """Side of a chip on the ground, metres."""
        return self.spec.size * self.resolution


def lay_chips(node: Chips, tables: Mapping[str, Table]) -> ChipSet:
    """Carry out a ``chips`` step: resolve its sources, lay windows, keep those that every source covers.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out, before any pixel is read.
    """
    child: Node = node.child
    maps: list[tuple[str | None, Function]] = []
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
    phase = _phases(sources[reference], found[reference], node.spec)
    points = None if node.spec.at is None else as_table(tables[node.spec.at])
    frame = candidates(node.spec, found[reference], resolution, phase, points)
    return _fill(node.spec, sources, reference, found, frame, points, tuple(reversed(maps)))


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
    frame: Frame,
    points: pa.Table | None,
    maps: tuple[tuple[str | None, Function], ...],
) -> ChipSet:
    """Find what feeds each candidate window and keep the windows that every source covers."""
    dropped = {f"record replaced by a newer baseline ({s.plan.name})": s.passes.replaced for s in sources}
    dropped |= {f"record with an unreadable asset ({s.plan.name})": s.unreadable for s in sources}
    dropped = {k: v for k, v in dropped.items() if v}
    touched = [covered(s, o, frame) for s, o in zip(sources, found, strict=True)]
    timed = sources[reference].axis is not None
    if timed:
        feeds, alive, share, slots = _with_slots(spec, sources, reference, found, frame, touched)
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
        table = with_columns(table, points.take(pa.array(frame.index[chip_window[order]])))  # type: ignore[index]
    resolution = sources[reference].plan.resolution
    return ChipSet(table, tuple(sources), reference, spec, None, resolution, maps, dropped, tuple(found))


def _with_slots(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    found: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
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
        reference_slots = filled if number == reference else reference_slots
        result.append((source, outline, good))
    picked = [pick(s, f.take(alive[f.window]), frame, o, s.axis) for s, o, f in result]
    place = np.cumsum(alive) - 1
    return [replace(f, window=place[f.window]) for f in picked], alive, share[alive], reference_slots[alive]


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
            chip = np.searchsorted(key, good.window.astype(np.int64) * slots + good.slot)
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
    place = np.cumsum(alive) - 1
    kept = []
    for source, outline, f in zip(sources, found, feeds, strict=True):
        f = f.take(alive[f.window])
        in_window = replace(f, window=window[f.window])
        chip = place[f.window]
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
    key = ready.window.astype(np.int64) * slots + ready.slot
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
    cell: list[str] | None = None
    if frame.cell is not None:
        zone = frame.epsg[window] - 32600
        cell = [f"{z}/{r}/{c}" for z, (r, c) in zip(zone, frame.cell[window].tolist(), strict=True)]
    columns = {
        "chip_id": pa.array(ids),
        "epsg": pa.array(frame.epsg[window].astype(np.int32)),
        "row": pa.array(frame.row[window]),
        "col": pa.array(frame.col[window]),
        "cell": texts([None] * len(window) if cell is None else cell),
        **{n: pa.array(frame.bounds[window, i]) for i, n in enumerate(("xmin", "ymin", "xmax", "ymax"))},
        "datetime": when.cast(pa.timestamp("us", tz="UTC")),
        "acquisition": texts([passes.names[a] if a >= 0 else None for a in acquisition]),
        "slots": pa.array(slots.astype(np.int32)),
        "coverage": pa.array(share.astype(np.float32)),
        "split": texts([None] * len(window)),
        "geometry": pa.array(shapely.to_wkb(lonlat(frame.take(window))), pa.binary()),
        "feeds": _feed_column(sources, feeds, len(window)),
    }
    return pa.table(columns, schema=CHIP_SCHEMA)


def _feed_column(sources: list[ResolvedSource], feeds: list[Feeds], chips: int) -> pa.ListArray:
    source = np.concatenate([np.full(len(f.window), i) for i, f in enumerate(feeds)])
    window = np.concatenate([f.window for f in feeds])
    order = np.argsort(window, kind="stable")  # within a chip: by source, slot, order, nearness
    slot, place, row, share = (
        np.concatenate([getattr(f, n) for f in feeds])[order] for n in ("slot", "order", "record", "share")
    )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(window, minlength=chips))])
    names = tuple(s.plan.name for s in sources)
    ids = tuple(tuple(s.records.ids) for s in sources)
    return FeedTable(offsets, source[order], slot, place, row, share, names, ids).to_arrow()


def used_records(chips: ChipSet) -> tuple[list[Records], list[NDArray[np.int64]], pa.Table]:
    """Return each source's records that feed a chip, their members, and the chip table with rows counted in those."""
    feeds = FeedTable.of(chips.table)
    row, kept, members, ids = feeds.row.copy(), [], [], []
    for number, resolved in enumerate(chips.sources):
        own = feeds.source == number
        used, back = np.unique(row[own], return_inverse=True)
        row[own] = back
        kept.append(resolved.records.take(used))
        members.append(resolved.member[used])
        ids.append(tuple(kept[-1].ids))
    column = replace(feeds, row=row, ids=tuple(ids)).to_arrow()
    return kept, members, replaced(chips.table, "feeds", column)
