"""Which records feed which slot of which window: coverage, time and pick, decided while planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.coverage import FULL, Outlines, Windows, cover, outlines, union_cover
from rasteret_dask.frame import Frame
from rasteret_dask.grid import bounds_in, transformer
from rasteret_dask.resolve import ResolvedSource
from rasteret_dask.timing import TimeAxis

__all__ = ["DATA_PICKS", "Feeds", "covered", "enough", "pick", "slots_of", "source_outlines"]

Ints: TypeAlias = "NDArray[np.integer[Any]]"

DATA_PICKS = ("clearest", "median", "mean")
"""Picks that need pixels: all acquisitions of a slot stay candidates."""


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
    first = np.searchsorted(axis.end, passes.start, side="right")
    last = np.where(
        passes.is_interval, np.searchsorted(axis.start, passes.end, side="left") - 1,
        np.searchsorted(axis.start, passes.start, side="right") - 1,
    )  # fmt: skip
    count = np.maximum(last - first + 1, 0)[feeds.slot]
    at = np.repeat(np.arange(len(feeds.window)), count)
    within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    spread = feeds.take(at)
    return Feeds.of(spread.window, first[spread.slot] + within, spread.order, spread.record, spread.share)


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
    key = feeds.window.astype(np.int64) * slots + feeds.slot
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
    acquisition = source.passes.of_record[feeds.record]
    rank = _rank(source, feeds.slot, acquisition, axis)
    slots = int(feeds.slot.max(initial=0)) + 1
    key = feeds.window.astype(np.int64) * slots + feeds.slot
    if source.plan.pick not in DATA_PICKS:
        best = _best(key, rank)
        feeds, acquisition, rank, key = feeds.take(best), acquisition[best], rank[best], key[best]
    nearness = _nearness(frame, found, feeds, _shared(key, rank))
    order = np.lexsort((_id_rank(source)[feeds.record], nearness, rank, key))
    feeds, rank, key = feeds.take(order), rank[order], key[order]
    slot_change = _changes(key)
    number = np.cumsum(slot_change | _changes(rank)) - 1
    start_of_slot = np.maximum.accumulate(np.where(slot_change, number, 0))
    return Feeds.of(feeds.window, feeds.slot, number - start_of_slot, feeds.record, feeds.share)


def _rank(
    source: ResolvedSource, slot: Ints, acquisition: NDArray[np.int64], axis: TimeAxis | None
) -> NDArray[np.int64]:
    """Return the place of each entry's (slot, acquisition) in the order of the pick; it is the same in all windows."""
    passes = source.passes
    pair = slot.astype(np.int64) * len(passes.start) + acquisition
    pairs, back = np.unique(pair, return_inverse=True)
    own_slot, own = np.divmod(pairs, len(passes.start))
    begin = passes.start.astype(np.int64)
    centre = begin // 2 + passes.end.astype(np.int64) // 2
    middle = centre if axis is None else axis.start.astype(np.int64) // 2 + axis.end.astype(np.int64) // 2
    distance = np.abs(centre[own] - middle[own if axis is None else own_slot])
    score = {
        "first": begin[own],
        "last": -begin[own],
        "least_cloudy": np.nan_to_num(passes.cloud, nan=np.inf)[own],
    }.get(source.plan.pick, distance)
    order = np.lexsort((_rank_of_first_id(source)[own], distance, score, own_slot))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[back]


def _best(key: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the entries whose rank is the smallest of their key."""
    order = np.lexsort((rank, key))
    first = np.flatnonzero(_changes(key[order]))
    smallest = np.repeat(rank[order[first]], np.diff(np.append(first, len(order))))
    return np.sort(order[rank[order] == smallest])


def _shared(key: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where several records of one acquisition feed one slot."""
    order = np.lexsort((rank, key))
    same = ~(_changes(key[order]) | _changes(rank[order]))
    shared = same.copy()
    shared[:-1] |= same[1:]
    result = np.empty(len(order), dtype=bool)
    result[order] = shared
    return result


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


def _nearness(frame: Frame, found: Outlines, feeds: Feeds, shared: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Shape (entry,). Distance from the chip's centre to the raster's, metres to the centimetre; 0 where not shared."""
    result = np.zeros(len(feeds.window))
    at = np.flatnonzero(shared)
    outline = found.of_record[feeds.record[at]]
    window = feeds.window[at]
    centre = np.stack([frame.bounds[window][:, [0, 2]].mean(1), frame.bounds[window][:, [1, 3]].mean(1)], -1)
    pairs = np.stack([frame.epsg[window], found.epsg[outline]], -1)
    for source, target in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
        foreign = (pairs[:, 0] == source) & (pairs[:, 1] == target)
        moved = transformer(int(source), int(target)).transform(centre[foreign, 0], centre[foreign, 1])
        centre[foreign] = np.stack(moved, -1)
    result[at] = np.round(np.hypot(*(centre - found.centre[outline]).T), 2)
    return result
