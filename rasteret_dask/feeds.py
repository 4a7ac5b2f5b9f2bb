"""Which records feed which slot of which window: coverage, time and pick, decided while planning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.coverage import FULL, Outlines, Windows, cover, outlines, union_cover
from rasteret_dask.frame import Frame
from rasteret_dask.grid import bounds_in, transformer
from rasteret_dask.resolve import ResolvedSource
from rasteret_dask.timing import TimeAxis

__all__ = ["DATA_PICKS", "Feeds", "covered", "enough", "pick", "slots_of", "source_outlines"]

DATA_PICKS = ("clearest", "median", "mean")
"""Picks that need pixels: all acquisitions of a slot stay candidates."""


@dataclass(frozen=True)
class Feeds:
    """Records that feed slots; all arrays have one entry per (window, slot, record)."""

    window: NDArray[np.int64]
    slot: NDArray[np.int64]
    order: NDArray[np.int64]
    """Place of the record's acquisition among the slot's candidates, the best first."""
    record: NDArray[np.int64]
    share: NDArray[np.float64]
    """Covered share of the window by this record."""

    def take(self, at: NDArray[np.bool_] | NDArray[np.int64]) -> Feeds:
        """Return some entries."""
        return Feeds(self.window[at], self.slot[at], self.order[at], self.record[at], self.share[at])


def source_outlines(source: ResolvedSource) -> Outlines:
    """Return the outlines of a source's records, by the first band of each member."""
    bands = np.array([m.bands[0] for m in source.plan.members], dtype=object)
    return outlines(source.records, bands[source.member])


def covered(source: ResolvedSource, found: Outlines, frame: Frame) -> Feeds:
    """Return every (window, record) that share ground, one slot for each of the source's acquisitions.

    The slot is the acquisition's number; :func:`slots_of` maps it to the time axis.
    """
    window, outline, share = [], [], []
    for epsg in np.unique(frame.epsg):
        here = np.flatnonzero(frame.epsg == epsg)
        windows = Windows(int(epsg), frame.bounds[here])
        tree = shapely.STRtree(shapely.box(*windows.bounds.T))
        pairs = {}
        for number in range(len(found.shape)):
            own = int(found.epsg[number])
            box = shapely.box(*bounds_in(shapely.bounds(found.shape[number]), own, int(epsg)))
            pairs[number] = np.sort(tree.query(box)).astype(np.int64)
        part = cover(windows, found, pairs)
        window.append(here[part.window])
        outline.append(part.outline)
        share.append(part.share)
    return _by_record(source, found, np.concatenate(window), np.concatenate(outline), np.concatenate(share))


def _by_record(
    source: ResolvedSource,
    found: Outlines,
    window: NDArray[np.int64],
    outline: NDArray[np.int64],
    share: NDArray[np.float64],
) -> Feeds:
    """Spread the pairs of outlines over the records that share them."""
    records = np.flatnonzero(source.passes.of_record >= 0)
    by_outline = records[np.argsort(found.of_record[records], kind="stable")]
    count = np.bincount(found.of_record[records], minlength=len(found.shape))
    first = np.cumsum(count) - count
    repeat = count[outline]
    pair = np.repeat(np.arange(len(outline)), repeat)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    record = by_outline[first[outline[pair]] + within]
    return Feeds(
        window[pair],
        source.passes.of_record[record],
        np.zeros(len(pair), dtype=np.int64),
        record,
        share[pair],
    )


def slots_of(source: ResolvedSource, feeds: Feeds, axis: TimeAxis) -> Feeds:
    """Put each acquisition in its slot: instants by their start, intervals in every slot they overlap."""
    passes = source.passes
    first = np.searchsorted(axis.end, passes.start, side="right")
    last = np.where(
        passes.is_interval, np.searchsorted(axis.start, passes.end, side="left") - 1,
        np.searchsorted(axis.start, passes.start, side="right") - 1,
    )  # fmt: skip
    count = np.maximum(last - first + 1, 0)[feeds.slot]
    at = np.repeat(np.arange(len(feeds.window)), count)
    within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    spread = feeds.take(at)
    return Feeds(spread.window, first[spread.slot] + within, spread.order, spread.record, spread.share)


def enough(
    feeds: Feeds, frame: Frame, found: Outlines, min_coverage: float
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
    key = feeds.window * slots + feeds.slot
    order = np.argsort(key, kind="stable")
    unique, first = np.unique(key[order], return_index=True)
    best = np.maximum.reduceat(feeds.share[order], first)
    total = np.add.reduceat(feeds.share[order], first)
    count = np.diff(np.append(first, len(order)))
    unsure = np.flatnonzero((best < FULL) & (count > 1) & (total > best))
    share = best.copy()
    cache: dict[tuple[int, bytes], float] = {}
    for at in unsure:
        rows = order[first[at] : first[at] + count[at]]
        numbers = np.unique(found.of_record[feeds.record[rows]])
        window = int(feeds.window[rows[0]])
        mark = (window, numbers.tobytes())
        if mark not in cache:
            alone = Windows(int(frame.epsg[window]), frame.bounds[window : window + 1])
            cache[mark] = union_cover(alone, found, 0, numbers) if len(numbers) > 1 else best[at]
        share[at] = cache[mark]
    good = share >= min(min_coverage, FULL) if min_coverage > 0 else share > 0
    keep = good[np.searchsorted(unique, key)]
    return feeds.take(keep), unique[good], share[good]


def pick(source: ResolvedSource, feeds: Feeds, frame: Frame, found: Outlines, axis: TimeAxis | None) -> Feeds:
    """Order the acquisitions of each slot by the pick, and the records of each acquisition by nearness.

    Picks that planning can decide keep the best acquisition only. The result is sorted by (window, slot, order,
    distance of the raster's centre, id).
    """
    passes, plan = source.passes, source.plan
    acquisition = passes.of_record[feeds.record]
    begin = passes.start.astype(np.int64)
    middle = (
        begin if axis is None else ((axis.start.astype(np.int64) // 2) + (axis.end.astype(np.int64) // 2))
    )
    at_middle = middle[acquisition] if axis is None else middle[feeds.slot]
    centre_of_pass = begin // 2 + passes.end.astype(np.int64) // 2
    distance = np.abs(centre_of_pass[acquisition] - at_middle)
    score = {
        "first": begin[acquisition],
        "last": -begin[acquisition],
        "least_cloudy": np.nan_to_num(passes.cloud, nan=np.inf)[acquisition],
    }.get(plan.pick, distance)
    best_id = _rank_of_first_id(source)
    nearness = _nearness(frame, found, feeds)
    id_rank = _id_rank(source)
    order = np.lexsort(
        (
            id_rank[feeds.record], nearness, acquisition, best_id[acquisition], distance, score,
            feeds.slot, feeds.window,
        )
    )  # fmt: skip
    feeds, acquisition = feeds.take(order), acquisition[order]
    slot_change = _changes(feeds.window, feeds.slot)
    pass_change = slot_change | _changes(acquisition)
    number = np.cumsum(pass_change) - 1
    start_of_slot = np.maximum.accumulate(np.where(slot_change, number, 0))
    ordered = Feeds(feeds.window, feeds.slot, number - start_of_slot, feeds.record, feeds.share)
    return ordered if plan.pick in DATA_PICKS else ordered.take(ordered.order == 0)


def _changes(*columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    changed = np.zeros(len(columns[0]), dtype=bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _id_rank(source: ResolvedSource) -> NDArray[np.int64]:
    """Shape (record,). Place of each record's id in alphabetical order; equal ids of two members by member."""
    order = np.lexsort((source.member, np.array(source.records.ids)))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _rank_of_first_id(source: ResolvedSource) -> NDArray[np.int64]:
    """Shape (acquisition,). The smallest id rank among each acquisition's records."""
    best = np.full(len(source.passes.start), np.iinfo(np.int64).max)
    known = source.passes.of_record >= 0
    np.minimum.at(best, source.passes.of_record[known], _id_rank(source)[known])
    return best


def _nearness(frame: Frame, found: Outlines, feeds: Feeds) -> NDArray[np.float64]:
    """Shape (entry,). Distance from the chip's centre to the raster's centre, metres, to the centimetre."""
    outline = found.of_record[feeds.record]
    centre = np.stack([frame.bounds[:, [0, 2]].mean(1), frame.bounds[:, [1, 3]].mean(1)], -1)[feeds.window]
    foreign = frame.epsg[feeds.window] != found.epsg[outline]
    if np.any(foreign):
        pairs = np.stack([frame.epsg[feeds.window], found.epsg[outline]], -1)
        for source, target in np.unique(pairs[foreign], axis=0):
            at = foreign & (pairs[:, 0] == source) & (pairs[:, 1] == target)
            moved = transformer(int(source), int(target)).transform(centre[at, 0], centre[at, 1])
            centre[at] = np.stack(moved, -1)
    return np.asarray(np.round(np.hypot(*(centre - found.centre[outline]).T), 2))
