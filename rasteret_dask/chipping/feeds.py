# SPDX-License-Identifier: Apache-2.0
"""Which records feed which slot of which window: coverage, time and pick, decided while planning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.coverage import FULL, Outlines, Windows, cover, outlines, union_cover
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.grid import transformer
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.rules.picks import Candidates, Ranked
from rasteret_dask.table.timing import TimeAxis

__all__ = [
    "Feeds",
    "SlotTimes",
    "WindowPasses",
    "covered",
    "enough",
    "nearest_intervals",
    "passes_in",
    "pick",
    "slots_of",
    "source_outlines",
]

Ints: TypeAlias = "NDArray[np.integer[Any]]"

SAGITTA_DEG = 0.01
"""Degrees that the edge of a window of 100 km bends out of the box of its corners, at most (72 N)."""


POLAR_DEG = 80.0
"""Latitude from which meridians run together so fast that a window's edges may leave the box of its corners."""

METRES_PER_DEGREE = 111_000.0
"""A degree of latitude, rounded down."""


class SlotTimes(Protocol):
    """When slots are: of an axis that all windows of the ground share, or of each window's own."""

    def middle(self, window: NDArray[np.int64], slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the middle of slots, ns since 1970 UTC."""


@dataclass(frozen=True)
class Feeds:
    """Records that feed slots; all arrays have one entry per (window, slot, record).

    There are millions of entries, so they are kept at 4 bytes a field.
    """

    window: Ints
    slot: Ints
    order: Ints
    """Place of the record's acquisition among the slot's candidates, the best first."""
    record: Ints
    share: NDArray[np.float32]
    """Covered share of the window by this record."""

    @classmethod
    def of(cls, window: Any, slot: Any, order: Any, record: Any, share: Any) -> Feeds:
        """Make entries from arrays of any integer type."""
        a, b, c, d = (np.asarray(v).astype(np.int32, copy=False) for v in (window, slot, order, record))
        return cls(a, b, c, d, np.asarray(share).astype(np.float32, copy=False))

    @classmethod
    def joined(cls, parts: Sequence[Feeds]) -> Feeds:
        """Return the entries of all parts, one behind the other."""
        names = ("window", "slot", "order", "record", "share")
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    def take(self, at: NDArray[np.bool_] | NDArray[np.int64]) -> Feeds:
        """Return some entries."""
        return Feeds(self.window[at], self.slot[at], self.order[at], self.record[at], self.share[at])


def source_outlines(source: ResolvedSource) -> Outlines:
    """Return the outlines of a source's records, by the first band of each member."""
    bands = np.array([m.bands[0] for m in source.plan.members], dtype=object)
    return outlines(source.records, bands[source.member])


def covered(source: ResolvedSource, footprints: Outlines, frame: Frame) -> Feeds:
    """Return every (window, record) that share ground, one slot for each of the source's acquisitions.

    The slot is the acquisition's number; :func:`slots_of` maps it to the time axis.
    """
    window, outline, share = [], [], []
    for epsg in np.unique(frame.epsg):
        here = np.flatnonzero(frame.epsg == epsg)
        windows = Windows(int(epsg), frame.bounds[here])
        part = cover(windows, footprints, _candidates(windows, footprints))
        window.append(here[part.window])
        outline.append(part.outline)
        share.append(part.share)
    if not window:
        return Feeds.of([], [], [], [], [])
    return _by_record(
        source, footprints, np.concatenate(window), np.concatenate(outline), np.concatenate(share)
    )


def _candidates(windows: Windows, footprints: Outlines) -> dict[int, NDArray[np.int64]]:
    """Return for each outline the windows it may touch: by bounds in the same CRS, in degrees elsewhere."""
    own = footprints.epsg == windows.epsg
    pairs = _touching(windows.bounds, footprints.bounds, own)
    if not own.all():  # degrees hold everywhere; the far side of the globe has no northing in a zone
        pairs |= _touching(_degrees(windows), footprints.degrees, ~own)
    return dict(sorted(pairs.items()))


def _touching(
    boxes: NDArray[np.float64], outlines: NDArray[np.float64], among: NDArray[np.bool_]
) -> dict[int, NDArray[np.int64]]:
    """Return outline -> boxes that touch its bounds, both as xmin, ymin, xmax, ymax; NaN touches nothing."""
    low, high = boxes[:, :2].min(0, initial=np.inf), boxes[:, 2:].max(0, initial=-np.inf)
    near = among & (outlines[:, :2] <= high).all(axis=1) & (outlines[:, 2:] >= low).all(axis=1)
    xmin, ymin, xmax, ymax = np.ascontiguousarray(boxes.T)
    result = {}
    for number in np.flatnonzero(near).tolist():
        west, south, east, north = outlines[number]
        touch = (xmin <= east) & (xmax >= west) & (ymin <= north) & (ymax >= south)
        result[number] = np.flatnonzero(touch)
    return result


def _degrees(windows: Windows) -> NDArray[np.float64]:
    """Return a box in degrees around each window, with room for edges that bend; shape (window, 4)."""
    x, y = windows.bounds[:, [0, 2, 2, 0]], windows.bounds[:, [3, 3, 1, 1]]
    corners = np.stack(transformer(windows.epsg, 4326).transform(x, y), -1)
    boxes = np.concatenate([corners.min(1) - SAGITTA_DEG, corners.max(1) + SAGITTA_DEG], axis=1)
    polar = np.flatnonzero(np.abs(corners[..., 1]).max(axis=1, initial=0.0) > POLAR_DEG)
    if len(
        polar
    ):  # edges bend farther there, and a window may hold the pole, where corners tell no longitudes
        reach = np.hypot(*(windows.bounds[polar, 2:] - windows.bounds[polar, :2]).T) / METRES_PER_DEGREE
        boxes[polar, 1] -= reach
        boxes[polar, 3] += reach
        near = (boxes[polar, 3] >= 90.0) | (boxes[polar, 1] <= -90.0)
        boxes[polar[near], 0], boxes[polar[near], 2] = -180.0, 180.0
    return boxes


def _by_record(
    source: ResolvedSource,
    footprints: Outlines,
    window: NDArray[np.int64],
    outline: NDArray[np.int64],
    share: NDArray[np.float64],
) -> Feeds:
    """Spread the pairs of outlines over the records that share them."""
    records = np.flatnonzero(source.passes.of_record >= 0)
    by_outline = records[np.argsort(footprints.of_record[records], kind="stable")]
    count = np.bincount(footprints.of_record[records], minlength=len(footprints.shape))
    first = np.cumsum(count) - count
    repeat = count[outline]
    pair = np.repeat(np.arange(len(outline)), repeat)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    record = by_outline[first[outline[pair]] + within]
    return Feeds.of(
        window[pair],
        source.passes.of_record[record],
        np.zeros(len(pair), dtype=np.int64),
        record,
        share[pair],
    )


def slots_of(source: ResolvedSource, feeds: Feeds, axis: TimeAxis) -> Feeds:
    """Put each acquisition in its slot: instants by their start, intervals in every slot they overlap."""
    passes = source.passes
    first, last = _slots_between(axis, passes.record_start, passes.record_end)
    first, last = first[feeds.record], last[feeds.record]
    # Where midnight falls between two records of one pass, the first of those that feed the window decides.
    apart = _starts_apart(source, axis)[feeds.slot]
    if apart.any():
        at = np.flatnonzero(apart)
        own = passes_in(source, feeds.take(at))
        first[at], last[at] = (v[own.of_entry] for v in _slots_between(axis, own.start, own.end))
    count = np.maximum(last - first + 1, 0)
    at = np.repeat(np.arange(len(feeds.window)), count)
    within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    spread = feeds.take(at)
    return Feeds.of(spread.window, first[at] + within, spread.order, spread.record, spread.share)


def nearest_intervals(source: ResolvedSource, feeds: Feeds, axis: TimeAxis) -> Feeds:
    """Put into each slot of a window the interval that holds the slot's middle, else the nearest within tolerance."""
    assert source.tolerance is not None
    start, end, slot_start, slot_end = (
        times.astype("datetime64[us]").astype(
            np.int64
        )  # nanoseconds over centuries would take more than 64 bits
        for times in (source.passes.record_start, source.passes.record_end, axis.start, axis.end)
    )
    most = source.tolerance.astype("timedelta64[us]").astype(np.int64)
    record, windows = feeds.record, int(feeds.window.max(initial=-1)) + 1
    parts = []
    for slot, middle in enumerate((slot_start + (slot_end - slot_start) // 2).tolist()):
        gap = np.maximum(np.maximum(start - middle, middle - (end - 1)), 0)[record]
        nearest = np.full(windows, np.iinfo(np.int64).max)
        np.minimum.at(nearest, feeds.window, gap)
        kept = feeds.take(np.flatnonzero((gap == nearest[feeds.window]) & (gap <= most)))
        parts.append(
            Feeds.of(kept.window, np.full(len(kept.window), slot), kept.order, kept.record, kept.share)
        )
    return Feeds.joined(parts)


def _slots_between(
    axis: TimeAxis, start: NDArray[np.datetime64], end: NDArray[np.datetime64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last slot that each instant or interval overlaps; last < first where none."""
    first = np.searchsorted(axis.end, start, side="right")
    interval = np.searchsorted(axis.start, end, side="left") - 1
    last = np.where(end > start, interval, np.searchsorted(axis.start, start, side="right") - 1)
    return first.astype(np.int64), last.astype(np.int64)


def _starts_apart(source: ResolvedSource, axis: TimeAxis) -> NDArray[np.bool_]:
    """Shape (acquisition,). True where its records alone would lie in different slots."""
    passes = source.passes
    known = passes.of_record >= 0
    number = passes.of_record[known]
    result = np.zeros(len(passes.start), dtype=bool)
    for slot in _slots_between(axis, passes.record_start[known], passes.record_end[known]):
        low = np.full(len(result), np.iinfo(np.int64).max)
        high = np.full(len(result), np.iinfo(np.int64).min)
        np.minimum.at(low, number, slot)
        np.maximum.at(high, number, slot)
        result |= low < high
    return result


@dataclass(frozen=True)
class WindowPasses:
    """The acquisitions of each (window, slot), by the records that feed this window: no other record matters."""

    key: NDArray[np.int64]
    """Shape (pass,), sorted. window * slots + slot."""
    acquisition: NDArray[np.int64]
    start: NDArray[np.datetime64]
    end: NDArray[np.datetime64]
    cloud: NDArray[np.float64]
    """Mean of the records' own figures, percent; inf where none is known."""
    first_id: NDArray[np.int64]
    """The smallest place of an id in alphabetical order."""
    count: NDArray[np.int64]
    """Records."""
    of_entry: NDArray[np.int64]
    """Shape (entry,). The pass of each entry."""


def passes_in(source: ResolvedSource, feeds: Feeds) -> WindowPasses:
    """Gather entries by window, slot and acquisition, in this order."""
    passes = source.passes
    slots, number = int(feeds.slot.max(initial=0)) + 1, max(len(passes.start), 1)
    own = passes.of_record[feeds.record]
    name = (feeds.window.astype(np.int64) * slots + feeds.slot) * number + own
    order = np.argsort(name, kind="stable")
    change = _changes(name[order])
    begin = np.flatnonzero(change)
    of_entry = np.empty(len(order), dtype=np.int64)
    of_entry[order] = np.cumsum(change) - 1
    record = feeds.record[order]
    # Granules of one pass that start seconds apart are no interval.
    until = np.where(passes.record_end > passes.record_start, passes.record_end, passes.record_start.min())
    cloud = passes.record_cloud[record]
    known = ~np.isnan(cloud)

    def over(operation: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(operation.reduceat(values, begin) if len(begin) else values[:0])

    figures = over(np.add, known.astype(np.int64))
    total = over(np.add, np.where(known, cloud, 0.0))
    mean = np.where(figures > 0, total / np.maximum(figures, 1), np.inf)
    start = over(np.minimum, passes.record_start[record])
    return WindowPasses(
        name[order][begin] // number,
        name[order][begin] % number,
        start,
        np.maximum(start, over(np.maximum, until[record])),
        mean,
        over(np.minimum, source.id_rank[record]),
        np.diff(np.append(begin, len(order))),
        of_entry,
    )


def enough(
    feeds: Feeds, frame: Frame, footprints: Outlines, min_coverage: float
) -> tuple[Feeds, NDArray[np.int64], NDArray[np.float64]]:
    """Empty the slots whose records together cover too little of the window.

    Returns
    -------
    feeds, key, share
        The entries of slots that are covered; and for each slot with any record, sorted: its window and slot as
        one number (window * slots + slot) and its covered share.
    """
    if not len(feeds.window):
        return feeds, np.zeros(0, dtype=np.int64), np.zeros(0)
    slots = int(feeds.slot.max()) + 1
    key = feeds.window.astype(np.int64) * slots + feeds.slot
    unique, share = _shares_of(feeds, frame, footprints, key)
    good = share >= min(min_coverage, FULL) if min_coverage > 0 else share > 0
    keep = good[np.searchsorted(unique, key)]
    return feeds.take(keep), unique[good], share[good]


def _shares_of(
    feeds: Feeds, frame: Frame, footprints: Outlines, key: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the distinct keys of entries, sorted, and the share of its window that each covers."""
    order = np.argsort(key, kind="stable")
    unique, first = np.unique(key[order], return_index=True)
    best = np.maximum.reduceat(feeds.share[order], first)
    total = np.add.reduceat(feeds.share[order], first)
    count = np.diff(np.append(first, len(order)))
    unsure = (best < FULL) & (count > 1) & (total > best)
    share = best.astype(np.float64)
    for numbers, at in _together(footprints, feeds, order, first[unsure], count[unsure]):
        place = np.flatnonzero(unsure)[at]
        share[place] = _shares(frame, footprints, feeds.window[order[first[place]]].astype(np.int64), numbers)
    return unique, share


def _together(
    footprints: Outlines,
    feeds: Feeds,
    order: NDArray[np.int64],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield for slots of several outlines: these, shape (slot, outlines), and the slots; by the number of outlines.

    Slot i has the entries order[first[i] : first[i] + count[i]].
    """
    slot = np.repeat(np.arange(len(first)), count)
    entry = order[np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(slot))]
    pair = np.unique(slot * len(footprints.shape) + footprints.of_record[feeds.record[entry]])
    slot, outline = np.divmod(pair, len(footprints.shape))
    size = np.bincount(slot, minlength=len(first))
    begin = np.cumsum(size) - size
    for several in np.unique(size[size > 1]):
        at = np.flatnonzero(size == several)
        yield outline[begin[at][:, None] + np.arange(several)], at


def _shares(
    frame: Frame, footprints: Outlines, window: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of windows that outlines cover together, each distinct question asked once."""
    asked, back = np.unique(np.column_stack([window, numbers]), axis=0, return_inverse=True)
    share = np.empty(len(asked))
    for epsg in np.unique(frame.epsg[asked[:, 0]]):
        at = np.flatnonzero(frame.epsg[asked[:, 0]] == epsg)
        alone = Windows(int(epsg), frame.bounds[asked[at, 0]])
        share[at] = union_cover(alone, footprints, np.arange(len(at)), asked[at, 1:])
    return share[np.reshape(back, -1)]


def pick(
    source: ResolvedSource,
    feeds: Feeds,
    frame: Frame,
    footprints: Outlines,
    axis: SlotTimes | None,
    min_coverage: float,
) -> Feeds:
    """Order the acquisitions of each slot by the pick, and the records of each acquisition by nearness.

    An acquisition whose records together cover the window (at least ``min_coverage`` of it, all of it where that
    is 0) comes before one whose records do not. Of picks that planning can decide only the first stays, unless the
    others are to fill what it leaves invalid. The result is sorted by (window, slot, acquisition, distance of the
    raster's centre, id).
    """
    own = passes_in(source, feeds)
    covers = np.ones(len(own.key), dtype=bool)
    ranked = isinstance(source.plan.pick, Ranked)
    if (
        isinstance(source.plan.pick, Ranked)
        and source.plan.pick.coverage_first
        and len(own.key) > len(np.unique(own.key))
    ):
        _, share = _shares_of(feeds, frame, footprints, own.of_entry)
        covers = share >= min(min_coverage or 1.0, FULL)
    best = np.lexsort(_preference(source, own, covers, int(feeds.slot.max(initial=0)) + 1, axis))
    place = np.empty(len(best), dtype=np.int64)
    change = _changes(own.key[best])
    start = np.maximum.accumulate(np.where(change, np.arange(len(best)), 0))
    place[best] = np.arange(len(best)) - start
    rank = place[own.of_entry]
    if ranked and not source.plan.pick.fills:
        keep = np.flatnonzero(rank == 0)
        feeds, rank, of_entry = feeds.take(keep), rank[keep], own.of_entry[keep]
    else:
        of_entry = own.of_entry
    nearness = _nearness(frame, footprints, feeds, own.count[of_entry] > 1)
    order = np.lexsort((source.id_rank[feeds.record], nearness, rank, own.key[of_entry]))
    feeds = feeds.take(order)
    return Feeds.of(feeds.window, feeds.slot, rank[order], feeds.record, feeds.share)


def _preference(
    source: ResolvedSource,
    passes: WindowPasses,
    covers: NDArray[np.bool_],
    slots: int,
    axis: SlotTimes | None,
) -> tuple[NDArray[Any], ...]:
    """Return sort keys of passes, the last counts most: slot, coverage, the pick, nearness to the slot's middle, id."""
    begin, end = passes.start.astype(np.int64), passes.end.astype(np.int64)
    centre = begin // 2 + end // 2
    distance = np.zeros(len(centre), dtype=np.int64)
    if axis is not None:
        distance = np.abs(centre - axis.middle(passes.key // slots, passes.key % slots))
    by_pick = distance
    if isinstance(source.plan.pick, Ranked):
        by_pick = source.plan.pick.order(Candidates(begin, end, passes.cloud, distance))
    return passes.first_id, distance, by_pick, ~covers, passes.key


def _changes(*columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    changed = np.zeros(len(columns[0]), dtype=bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _nearness(
    frame: Frame, footprints: Outlines, feeds: Feeds, shared: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Shape (entry,). Distance from the chip's centre to the raster's, metres to the centimetre; 0 where not shared."""
    result = np.zeros(len(feeds.window))
    at = np.flatnonzero(shared)
    outline = footprints.of_record[feeds.record[at]]
    window = feeds.window[at]
    centre = np.stack([frame.bounds[window][:, [0, 2]].mean(1), frame.bounds[window][:, [1, 3]].mean(1)], -1)
    pairs = np.stack([frame.epsg[window], footprints.epsg[outline]], -1)
    for source, target in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
        foreign = (pairs[:, 0] == source) & (pairs[:, 1] == target)
        moved = transformer(int(source), int(target)).transform(centre[foreign, 0], centre[foreign, 1])
        centre[foreign] = np.stack(moved, -1)
    result[at] = np.round(np.hypot(*(centre - footprints.centre[outline]).T), 2)
    return result
