# SPDX-License-Identifier: Apache-2.0
"""Records in the slots of windows: on an axis that all share, or in slots of each window's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.feeds import (
    Feeds,
    SlotTimes,
    WindowPasses,
    nearest_intervals,
    passes_in,
    slots_of,
)
from rasteret_dask.planning.chiptimes import ChipTimes, Dates
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.table.records import NS_RANGE

__all__ = ["WindowTimes", "chip_dates", "chosen", "in_slots", "slot_times"]


@dataclass(frozen=True)
class WindowTimes:
    """Slots of each window of the ground's own: windows of time, half-open."""

    start: NDArray[np.datetime64]
    """Shape (window, slot), ns."""
    end: NDArray[np.datetime64]

    def middle(self, window: NDArray[np.int64], slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the middle of slots, ns since 1970 UTC."""
        own = window, slot
        return np.asarray(self.start[own].astype(np.int64) // 2 + self.end[own].astype(np.int64) // 2)


def chip_dates(chips: pa.Table, columns: Sequence[str]) -> Dates:
    """Return the dates of chips that are planned, from the columns that they took from ``at=``."""
    times = {c: np.asarray(chips.column(c).to_numpy()).astype("datetime64[us]") for c in columns}
    return {c: np.clip(v, *NS_RANGE).astype("datetime64[ns]") for c, v in times.items()}


def slot_times(source: ResolvedSource, dates: Dates) -> SlotTimes | None:
    """Return when the slots of a source are; None: each is an acquisition, or there are none.

    Parameters
    ----------
    source
        The source.
    dates
        Of each window of the ground.
    """
    times = source.chip_times
    if times is None:
        return source.axis
    windows = None if times.most else times.windows(dates)
    return None if windows is None else WindowTimes(*windows)


def in_slots(source: ResolvedSource, touched: Feeds, dates: Dates, by_file: bool = False) -> Feeds:
    """Put each record that covers a part of a window in the slots that its time falls in.

    Where each slot is one acquisition, the slot still is the acquisition's number: :func:`chosen` chooses among them.

    Parameters
    ----------
    source
        A source with slots.
    touched
        Records that cover a part of each window, by acquisition.
    dates
        Of each window.
    by_file
        Whether windows are files, whose records may say which slot they fill.
    """
    if by_file and source.files is not None and source.files.slot is not None:
        return _with_slot(touched, source.files.slot[touched.record])
    times = source.chip_times
    if times is None:
        assert source.axis is not None
        if source.tolerance is None:
            return slots_of(source, touched, source.axis)
        return nearest_intervals(source, touched, source.axis)
    windows = times.windows(dates)
    inside = touched if windows is None else _inside(source, touched, *windows)
    if times.most and windows is not None:
        return _with_slot(inside, source.passes.of_record[inside.record])
    return inside


def _with_slot(feeds: Feeds, slot: NDArray[np.int64]) -> Feeds:
    return Feeds.of(feeds.window, slot, feeds.order, feeds.record, feeds.share)


def _inside(
    source: ResolvedSource, feeds: Feeds, start: NDArray[np.datetime64], end: NDArray[np.datetime64]
) -> Feeds:
    """Put each acquisition in the windows of time that its start lies in; intervals in all that they overlap."""
    own = passes_in(source, feeds)
    window = feeds.window.astype(np.int64)
    begin, until = own.start[own.of_entry], own.end[own.of_entry]
    parts = []
    for slot in range(start.shape[1]):
        first, last = start[window, slot], end[window, slot]
        hit = (begin < last) & np.where(until > begin, until > first, begin >= first)
        some = feeds.take(np.flatnonzero(hit))
        parts.append(_with_slot(some, np.full(len(some.window), slot)))
    return Feeds.joined(parts)


def chosen(
    source: ResolvedSource, times: ChipTimes, feeds: Feeds, dates: Dates
) -> tuple[Feeds, NDArray[np.bool_]]:
    """Give each window a slot for each of its acquisitions, by time; where there are too many, for some of them.

    Parameters
    ----------
    source, times, dates
        The source, which slots it has, and the dates of each window.
    feeds
        Acquisitions that cover enough of their windows, as :func:`in_slots` returns them.

    Returns
    -------
    feeds, kept
        Those that are chosen, in their slots; and shape (window and acquisition,), sorted: which are chosen.
    """
    if not len(feeds.window):
        return feeds, np.zeros(0, dtype=bool)
    passes = passes_in(source, feeds)
    window = passes.key // (int(feeds.slot.max()) + 1)
    order = np.lexsort((passes.first_id, passes.start, window))
    kept = _chosen(passes, window, order, times, dates)
    order = order[kept[order]]
    slot = np.full(len(kept), -1)
    slot[order] = _places(window[order])
    own = slot[passes.of_entry]
    there = np.flatnonzero(own >= 0)
    return _with_slot(feeds.take(there), own[there]), kept


def _places(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place of each entry in its group; entries are sorted by group."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    count = np.diff(np.append(first, len(group)))
    return np.arange(len(group)) - np.repeat(first, count)


def _chosen(
    passes: WindowPasses,
    window: NDArray[np.int64],
    by_time: NDArray[np.int64],
    times: ChipTimes,
    dates: Dates,
) -> NDArray[np.bool_]:
    """Return which acquisitions become slots, shape (pass,); ``by_time``: all of them by window, then time."""
    if times.choose == "spread":
        return _spread(window, by_time, times.most)
    start, until = passes.start.astype(np.int64), passes.end.astype(np.int64)
    key: NDArray[Any]
    if times.choose == "clearest":
        key = passes.cloud
    elif times.choose == "latest":
        key = -start
    else:
        assert times.relative_to is not None
        moment = dates[times.relative_to][window].astype(np.int64)
        key = np.maximum(np.maximum(start - moment, moment - np.maximum(until - 1, start)), 0)
    best = np.lexsort((passes.first_id, start, key, window))
    kept = np.zeros(len(window), dtype=bool)
    kept[best] = _places(window[best]) < times.most
    return kept


def _spread(window: NDArray[np.int64], by_time: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
    """Return every n-th date of each window, the first and the last among them; of one the middle."""
    first = np.flatnonzero(np.diff(window[by_time], prepend=-1))
    count = np.diff(np.append(first, len(by_time)))
    few = np.repeat(count <= most, count)
    kept = np.zeros(len(window), dtype=bool)
    kept[by_time[few]] = True
    many = np.flatnonzero(count > most)
    steps, last = np.arange(most), count[many, None] - 1
    gaps = max(most - 1, 1)
    place = (2 * steps * last + gaps) // (2 * gaps) if most > 1 else last // 2
    kept[by_time[(first[many, None] + place).ravel()]] = True
    return kept
