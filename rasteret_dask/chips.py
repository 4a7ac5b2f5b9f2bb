"""An optimized plan and its records become the planned chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chiptable import CHIP_SCHEMA, FeedTable, replaced, texts, with_columns
from rasteret_dask.coverage import Outlines
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.feeds import (
    Feeds,
    WindowPasses,
    covered,
    enough,
    passes_in,
    pick,
    slots_of,
    source_outlines,
)
from rasteret_dask.frame import Frame, Phase, candidates, lonlat
from rasteret_dask.grid import Lattice
from rasteret_dask.plan import (
    Chips,
    ChipSpec,
    Filter,
    Function,
    Join,
    Map,
    Node,
    SplitSpec,
    is_filtered,
    near_area,
)
from rasteret_dask.records import Records
from rasteret_dask.resolve import ResolvedSource, evaluate, resolve_source
from rasteret_dask.scan import Table, as_table
from rasteret_dask.timing import TimeAxis

__all__ = ["ChipSet", "lay_chips", "used_records", "used_rows"]


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
    near = near_area(node.spec)
    settled = near is None or is_filtered(node.child, near)
    child: Node = _below_join(node.child if settled or near is None else Filter(node.child, (near,)))
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
    phase = _phases(sources[reference], found[reference])
    points = None if node.spec.at is None else as_table(tables[node.spec.at])
    frame = candidates(node.spec, found[reference], resolution, phase, points)
    return _fill(node.spec, sources, reference, found, frame, points, tuple(reversed(maps)))


def _below_join(node: Node) -> Node:
    """Return an equal plan whose filters of a join stand in each of its sources."""
    match node:
        case Filter(child, where) if isinstance(below := _below_join(child), Join):
            return replace(below, children=tuple(Filter(c, where) for c in below.children))
        case Filter(child, where) if isinstance(below := _below_join(child), Map):
            return replace(below, child=_below_join(Filter(below.child, where)))
        case Map(child):
            return replace(node, child=_below_join(child))
    return node


def _shared_time(sources: list[ResolvedSource]) -> list[ResolvedSource]:
    """Give sources of intervals their own slots where another source has a time axis."""
    axes = [s.axis for s in sources if s.axis is not None]
    if not axes:
        return sources
    start, end = min(a.span[0] for a in axes), max(a.span[1] for a in axes)
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
            axis = TimeAxis(stamps[keep, 0], stamps[keep, 1], (start, end))
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
        best = [n for n in fills if n < spec.size][-1:] + [n for n in fills if n > spec.size][:1]
        raise GridError(
            f"chips(size={spec.size}) with source {source.plan.name!r}",
            f"{length:g} m = {pixels:.4g} pixels of {source.plan.resolution:g} m",
            "a whole number of every source's pixels",
            f"Nearest sizes that fit: {', '.join(map(str, below + above)) or 'none'}"
            + (f"; filling a split cell: {', '.join(map(str, best))}." if best else "."),
        )


def _fits(length: float, resolutions: list[float]) -> bool:
    return all(abs(length / r - round(length / r)) < 1e-6 for r in resolutions)


def _phases(source: ResolvedSource, found: Outlines) -> Phase:
    """Return a pixel corner in each CRS: the first member's that has records there, that of most of them."""
    resolution = source.plan.resolution
    outline = found.of_record
    counted: dict[int, dict[tuple[float, float], int]] = {}
    settled: dict[int, int] = {}
    for row in range(len(outline)):
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
    lay = _with_slots if sources[reference].axis is not None else _by_acquisition
    laid = lay(spec, sources, reference, found, frame, touched)
    dropped |= {why: count for why, count in laid.lost.items() if count}
    if not len(laid.window):
        reasons = "; ".join(f"{count:,}: {why}" for why, count in dropped.items())
        raise PlanError(
            "chips", f"no chip of {len(frame):,} candidate windows ({reasons or 'no record is there'})",
            "at least one chip", "Lower min_coverage, change the area, or check that the sources overlap in time.",
        )  # fmt: skip
    laid = laid.take(_order(frame, laid))
    table = _table(sources, frame, laid)
    if points is not None:
        table = with_columns(table, points.take(pa.array(frame.index[laid.window])))  # type: ignore[index]
    resolution = sources[reference].plan.resolution
    return ChipSet(table, tuple(sources), reference, spec, None, resolution, maps, dropped, tuple(found))


@dataclass(frozen=True)
class _Laid:
    """Chips to be; all arrays have one entry per chip."""

    window: NDArray[np.int64]
    slots: NDArray[np.int64]
    """Slots of the reference that have records."""
    share: NDArray[np.float64]
    start: NDArray[np.datetime64]
    """Start of the chip's acquisition; NaT with a time axis."""
    platform: tuple[str, ...]
    """Of the chip's acquisition; empty with a time axis."""
    first_id: NDArray[np.int64]
    feeds: list[Feeds]
    """Per source; ``window`` counts chips."""
    lost: dict[str, int]

    def take(self, order: NDArray[np.int64]) -> _Laid:
        """Return the chips in another order."""
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return _Laid(
            self.window[order], self.slots[order], self.share[order], self.start[order],
            tuple(self.platform[i] for i in order) if self.platform else (), self.first_id[order],
            [replace(f, window=place[f.window]) for f in self.feeds], self.lost,
        )  # fmt: skip


def _with_slots(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    found: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
) -> _Laid:
    """Make a chip of each window that every source fills enough slots of."""
    alive = np.ones(len(frame), dtype=bool)
    share = np.ones(len(frame))
    result, lost = [], {}
    reference_slots = np.zeros(len(frame), dtype=np.int64)
    for number, (source, outline, feeds) in enumerate(zip(sources, found, touched, strict=True)):
        assert source.axis is not None
        slotted = slots_of(source, feeds, source.axis)
        good, key, part = enough(slotted, frame, outline, spec.min_coverage)
        slots = int(slotted.slot.max()) + 1 if len(slotted.slot) else 1
        filled = np.bincount(key // slots, minlength=len(frame))
        wanted = min(max(spec.min_slots, 1), len(source.axis))
        lost[_uncovered(spec, source, wanted)] = int(np.sum(alive & (filled < wanted)))
        alive &= filled >= wanted
        np.minimum.at(share, key // slots, part)
        reference_slots = filled if number == reference else reference_slots
        result.append((source, outline, good))
    picked = [pick(s, f.take(alive[f.window]), frame, o, s.axis) for s, o, f in result]
    place = np.cumsum(alive) - 1
    window = np.flatnonzero(alive)
    nothing = np.full(len(window), np.datetime64("NaT", "ns"))
    return _Laid(
        window, reference_slots[alive], share[alive], nothing, (), np.zeros(len(window), dtype=np.int64),
        [replace(f, window=place[f.window]) for f in picked], lost,
    )  # fmt: skip


def _uncovered(spec: ChipSpec, source: ResolvedSource, slots: int) -> str:
    often = f" in {slots} slots" if slots > 1 else ""
    return f"window not covered to {spec.min_coverage:.0%} by {source.plan.name}{often}"


def _by_acquisition(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    found: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
) -> _Laid:
    """Make a chip of each (window, acquisition of the reference); others give their nearest acquisition."""
    good, key, share = enough(touched[reference], frame, found[reference], spec.min_coverage)
    slots = int(touched[reference].slot.max(initial=0)) + 1
    own = passes_in(sources[reference], good)
    window = key // slots
    alive = np.ones(len(key), dtype=bool)
    lost = {_uncovered(spec, sources[reference], 1): len(frame) - len(np.unique(window))}
    feeds: list[Feeds] = []
    for number, (source, outline, other) in enumerate(zip(sources, found, touched, strict=True)):
        if number == reference:
            chip = np.searchsorted(key, good.window.astype(np.int64) * slots + good.slot)
            feeds.append(replace(good, window=chip))
            continue
        ready, other_key, other_share = enough(other, frame, outline, spec.min_coverage)
        other_slots = int(other.slot.max(initial=0)) + 1
        theirs = passes_in(source, ready)
        chosen = _nearest(theirs, own.start, window, other_key // other_slots)
        lost[f"chip of {sources[reference].plan.name} without an acquisition of {source.plan.name}"] = int(
            np.sum(alive & (chosen < 0))
        )
        alive &= chosen >= 0
        if len(other_key):
            share = np.minimum(share, other_share[np.maximum(chosen, 0)])
            chosen = np.where(chosen >= 0, other_key[np.maximum(chosen, 0)] % other_slots, -1)
        feeds.append(_chosen(ready, other_slots, window, chosen))
    place = np.cumsum(alive) - 1
    kept = []
    for source, outline, f in zip(sources, found, feeds, strict=True):
        f = f.take(alive[f.window])
        # One slot per chip: the chip's number stands in for the window while the pick sorts.
        alone = replace(f, window=place[f.window], slot=np.zeros_like(f.slot))
        kept.append(pick(source, alone, frame.take(window[alive]), outline, None))
    platform = tuple(sources[reference].passes.platform[a] for a in own.acquisition[alive])
    ones = np.ones(int(alive.sum()), dtype=np.int64)
    return _Laid(
        window[alive], ones, share[alive], own.start[alive], platform, own.first_id[alive], kept, lost
    )


def _nearest(
    theirs: WindowPasses,
    when: NDArray[np.datetime64],
    window: NDArray[np.int64],
    other_window: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return for each chip the other source's pass in its window: the interval that contains it, else the nearest.

    Parameters
    ----------
    theirs
        The other source's passes.
    when, window
        Shape (chip,). Start of each chip's acquisition, and its window.
    other_window
        Shape (pass,), sorted. Window of each pass.

    Returns
    -------
    numpy.ndarray
        Shape (chip,). Number of the pass, -1 where there is none.
    """
    start, end = theirs.start.astype(np.int64), theirs.end.astype(np.int64)
    moment = when.astype(np.int64)
    first = np.searchsorted(other_window, window, side="left")
    last = np.searchsorted(other_window, window, side="right")
    result = np.full(len(window), -1, dtype=np.int64)
    intervals_only = bool(np.all(end > start))
    for chip in np.flatnonzero(last > first):
        own = slice(first[chip], last[chip])
        gap = np.maximum(
            0, np.maximum(start[own] - moment[chip], moment[chip] - (end[own] - (end[own] > start[own])))
        )
        if intervals_only and gap.min() > 0:
            continue
        result[chip] = first[chip] + np.lexsort((theirs.first_id[own], start[own], gap))[0]
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


def _order(frame: Frame, laid: _Laid) -> NDArray[np.int64]:
    """Return the chips in space: by CRS, split cell, row, column; then by time."""
    window = laid.window
    row, col = frame.row[window], frame.col[window]
    if frame.cell is None:
        coarse = (frame.bounds[window][:, [3, 0]] // 15360).astype(np.int64)
        cell_row, cell_col = -coarse[:, 0], coarse[:, 1]
    else:
        cell_row, cell_col = frame.cell[window].T
    when = laid.start.astype(np.int64)
    return np.lexsort((laid.first_id, when, col, row, cell_col, cell_row, frame.epsg[window]))


def _table(sources: list[ResolvedSource], frame: Frame, laid: _Laid) -> pa.Table:
    window, share = laid.window, laid.share
    prefix = [frame.prefix[w] for w in window]
    names = _acquisition_names(laid)
    ids = [p if n is None else f"{p}_{n}" for p, n in zip(prefix, names, strict=True)]
    when = pa.array(laid.start.astype("datetime64[us]"), mask=np.isnat(laid.start))
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
        "acquisition": texts(names),
        "slots": pa.array(laid.slots.astype(np.int32)),
        "coverage": pa.array(share.astype(np.float32)),
        "split": texts([None] * len(window)),
        "geometry": pa.array(shapely.to_wkb(lonlat(frame.take(window))), pa.binary()),
        "feeds": _feed_column(sources, laid.feeds, len(window)),
    }
    return pa.table(columns, schema=CHIP_SCHEMA)


def _acquisition_names(laid: _Laid) -> list[str | None]:
    """Return platform and start of each chip's acquisition; a second one of that name in a window gets a number."""
    if not laid.platform:
        return [None] * len(laid.window)
    seconds, back = np.unique(laid.start.astype("datetime64[s]"), return_inverse=True)
    stamps = [f"{t:%Y%m%dT%H%M%S}" for t in pd.DatetimeIndex(seconds)]
    seen: dict[tuple[int, str], int] = {}
    names: list[str | None] = []
    for window, platform, second in zip(laid.window.tolist(), laid.platform, back.tolist(), strict=True):
        name = f"{platform or 'unknown'}-{stamps[second]}"
        count = seen[window, name] = seen.get((window, name), 0) + 1
        names.append(name if count == 1 else f"{name}-{count}")
    return names


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


def used_rows(chips: ChipSet) -> list[tuple[ResolvedSource, NDArray[np.int64]]]:
    """Return each source with the rows of its records that feed a chip."""
    feeds = FeedTable.of(chips.table)
    return [(s, np.unique(feeds.row[feeds.source == n])) for n, s in enumerate(chips.sources)]


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
