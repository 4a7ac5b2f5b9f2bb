# SPDX-License-Identifier: Apache-2.0
"""Windows that the required sources cover become chips: one a window with a time axis, else one an acquisition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.chipslots import chosen, in_slots, slot_times
from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.feeds import Feeds, WindowPasses, covered, enough, passes_in, pick
from rasteret_dask.chipping.filewindows import file_feeds
from rasteret_dask.chipping.frame import Frame, blocks
from rasteret_dask.planning.chiptimes import Dates
from rasteret_dask.planning.plan import ChipSpec
from rasteret_dask.planning.resolve import ResolvedSource

__all__ = ["Laid", "lay"]

NO_DATES: Dates = {}

BATCH = 65_536
"""Windows that are looked at together: what is held meanwhile, some kB a window, does not grow with the plan."""


@dataclass(frozen=True)
class Laid:
    """Chips to be, block by block; in a block by time, then window. All arrays have one entry per chip."""

    window: NDArray[np.int64]
    slots: NDArray[np.int64]
    """Slots of the reference that have records."""
    share: NDArray[np.float64]
    start: NDArray[np.datetime64]
    """Start of the chip's acquisition; NaT with a time axis."""
    acquisition: NDArray[np.int64]
    """Number of the chip's acquisition; -1 with a time axis."""
    feeds: tuple[Feeds, ...]
    """Per source; ``window`` counts chips."""
    lost: Counter[str]
    """Windows and chips left out, by reason."""


def lay(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    footprints: list[Outlines],
    frame: Frame,
    dates: Dates = NO_DATES,
) -> Laid:
    """Find what feeds each window, and make chips of those that every required source covers.

    Where a source that chips may lack covers too little, or too few slots, nothing of it feeds the chip.

    Parameters
    ----------
    spec
        Gives ``min_coverage`` and ``min_slots``.
    sources
        The sources.
    reference
        Place of the one whose acquisitions are chips where there is no time axis.
    footprints
        For each source, the outlines of its records.
    frame
        The windows.
    dates
        Dates of each window, where sources ask for them.
    """
    laid, chips = [], 0
    block = blocks(frame, spec, footprints[reference], sources[reference].plan.resolution)
    for first, last in _batches(block):
        some = frame.take(np.arange(first, last))
        wide = _windows(spec, sources, reference, some)
        touched = [
            file_feeds(s, some) if spec.by_file and s.files is not None else covered(s, o, own)
            for s, o, own in zip(sources, footprints, wide, strict=True)
        ]
        own = {column: times[first:last] for column, times in dates.items()}
        make = partial(_with_slots, own) if sources[reference].has_slots else _by_acquisition
        part = make(spec, sources, reference, footprints, some, touched)
        feeds = tuple(replace(f, window=f.window + np.int32(chips)) for f in part.feeds)
        laid.append(replace(part, window=part.window + first, feeds=feeds))
        chips += len(part.window)
    if len(laid) == 1:
        return laid[0]
    feeds = tuple(Feeds.joined([part.feeds[n] for part in laid]) for n in range(len(sources)))
    lost = sum((part.lost for part in laid), Counter[str]())
    return Laid(
        np.concatenate([part.window for part in laid]),
        np.concatenate([part.slots for part in laid]),
        np.concatenate([part.share for part in laid]),
        np.concatenate([part.start for part in laid]),
        np.concatenate([part.acquisition for part in laid]),
        feeds,
        lost,
    )


def _windows(spec: ChipSpec, sources: Sequence[ResolvedSource], reference: int, frame: Frame) -> list[Frame]:
    """Return the windows of each source: those of chips, or wider ones around the same centres."""
    resolution = sources[reference].plan.resolution
    return [frame.grown(spec.reach_m(resolution, source.plan.name)) for source in sources]


def _batches(block: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield where batches of whole blocks begin and end; one that is empty where there are no windows."""
    ends = np.append(np.flatnonzero(np.diff(block)) + 1, len(block))
    first = 0
    while first < len(block):
        last = int(
            ends[
                max(np.searchsorted(ends, first + BATCH, side="right") - 1, np.searchsorted(ends, first + 1))
            ]
        )
        yield first, last
        first = last
    if not len(block):
        yield 0, 0


def _with_slots(
    dates: Dates,
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    footprints: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
) -> Laid:
    """Make a chip of each window that every required source fills enough slots of."""
    alive = np.ones(len(frame), dtype=bool)
    share = np.ones(len(frame))
    result, lost = [], Counter[str]()
    reference_slots = np.zeros(len(frame), dtype=np.int64)
    wide = _windows(spec, sources, reference, frame)
    for number, (source, outline, feeds) in enumerate(zip(sources, footprints, touched, strict=True)):
        slotted = in_slots(source, feeds, dates, spec.by_file)
        good, key, part = enough(slotted, wide[number], outline, spec.min_coverage)
        slots = int(slotted.slot.max()) + 1 if len(slotted.slot) else 1
        if source.chip_times is not None and source.chip_times.most:
            good, kept = chosen(source, source.chip_times, good, dates)
            key, part = key[kept], part[kept]
        filled = np.bincount(key // slots, minlength=len(frame))
        wanted = min(max(spec.min_slots, 1), source.plan.times)
        if source.plan.optional:
            there = filled >= wanted
            good, own = good.take(there[good.window]), there[key // slots]
            key, part = key[own], part[own]
        else:
            lost[_uncovered(spec, source, wanted)] = int(np.sum(alive & (filled < wanted)))
            alive &= filled >= wanted
        np.minimum.at(share, key // slots, part)
        reference_slots = filled if number == reference else reference_slots
        result.append((source, outline, good))
    picked = [
        pick(s, f.take(alive[f.window]), own, o, slot_times(s, dates), spec.min_coverage)
        for (s, o, f), own in zip(result, wide, strict=True)
    ]
    place = np.cumsum(alive) - 1
    window = np.flatnonzero(alive)
    nothing = np.full(len(window), np.datetime64("NaT", "ns"))
    return Laid(
        window, reference_slots[alive], share[alive], nothing, np.full(len(window), -1),
        tuple(replace(f, window=place[f.window].astype(np.int32)) for f in picked), lost,
    )  # fmt: skip


def _uncovered(spec: ChipSpec, source: ResolvedSource, slots: int) -> str:
    often = f" in {slots} slots" if slots > 1 else ""
    return f"window not covered to {spec.min_coverage:.0%} by {source.plan.name}{often}"


def _by_acquisition(
    spec: ChipSpec,
    sources: list[ResolvedSource],
    reference: int,
    footprints: list[Outlines],
    frame: Frame,
    touched: list[Feeds],
) -> Laid:
    """Make a chip of each (window, acquisition of the reference); others give their nearest acquisition."""
    good, key, share = enough(touched[reference], frame, footprints[reference], spec.min_coverage)
    slots = int(touched[reference].slot.max(initial=0)) + 1
    own = passes_in(sources[reference], good)
    window = key // slots
    alive = np.ones(len(key), dtype=bool)
    lost = Counter({_uncovered(spec, sources[reference], 1): len(frame) - len(np.unique(window))})
    feeds: list[Feeds] = []
    wide = _windows(spec, sources, reference, frame)
    for number, (source, outline, other) in enumerate(zip(sources, footprints, touched, strict=True)):
        if number == reference:
            chip = np.searchsorted(key, good.window.astype(np.int64) * slots + good.slot)
            feeds.append(replace(good, window=chip))
            continue
        ready, other_key, other_share = enough(other, wide[number], outline, spec.min_coverage)
        other_slots = int(other.slot.max(initial=0)) + 1
        theirs = passes_in(source, ready)
        most = np.timedelta64(0, "ns") if source.tolerance is None else source.tolerance
        limit = most if bool(source.passes.is_interval.all()) else None
        chosen = _nearest(theirs, own.start, window, other_key // other_slots, limit)
        if not source.plan.optional:
            lost[f"chip of {sources[reference].plan.name} without an acquisition of {source.plan.name}"] = (
                int(np.sum(alive & (chosen < 0)))
            )
            alive &= chosen >= 0
        if len(other_key):
            own_share = np.where(chosen >= 0, other_share[np.maximum(chosen, 0)], 1.0)
            share = np.minimum(share, own_share)
            chosen = np.where(chosen >= 0, other_key[np.maximum(chosen, 0)] % other_slots, -1)
        feeds.append(_chosen(ready, other_slots, window, chosen))
    place = np.cumsum(alive) - 1
    kept = []
    for source, outline, f, ground in zip(sources, footprints, feeds, wide, strict=True):
        f = f.take(alive[f.window])
        # One slot per chip: the chip's number stands in for the window while the pick sorts.
        alone = replace(f, window=place[f.window], slot=np.zeros_like(f.slot))
        kept.append(pick(source, alone, ground.take(window[alive]), outline, None, spec.min_coverage))
    window, start, acquisition = window[alive], own.start[alive], own.acquisition[alive]
    block = blocks(frame, spec, footprints[reference], sources[reference].plan.resolution)[window]
    order = np.lexsort(
        (own.first_id[alive], window, start, block)
    )  # an acquisition's tiles serve a whole block
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    feeds = [replace(f, window=place[f.window]) for f in kept]
    feeds = [f.take(np.argsort(f.window, kind="stable")) for f in feeds]
    return Laid(
        window[order], np.ones(len(order), dtype=np.int64), share[alive][order], start[order], acquisition[order],
        tuple(feeds), lost,
    )  # fmt: skip


def _nearest(
    theirs: WindowPasses,
    when: NDArray[np.datetime64],
    window: NDArray[np.int64],
    other_window: NDArray[np.int64],
    limit: np.timedelta64 | None,
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
    limit
        How far the pass may lie from the moment; None: as far as it does.

    Returns
    -------
    numpy.ndarray
        Shape (chip,). Number of the pass, -1 where there is none.
    """
    # in microseconds: of 64 bits, nanoseconds between 1678 and today would take more
    start, end, moment = (
        t.astype("datetime64[us]").astype(np.int64) for t in (theirs.start, theirs.end, when)
    )
    first = np.searchsorted(other_window, window, side="left")
    last = np.searchsorted(other_window, window, side="right")
    chip = np.repeat(np.arange(len(window)), last - first)
    other = np.arange(len(chip)) - np.repeat(np.cumsum(last - first) - last, last - first)
    gap = np.maximum(start[other] - moment[chip], moment[chip] - (end[other] - (end[other] > start[other])))
    gap = np.maximum(gap, 0)
    result = np.full(len(window), -1, dtype=np.int64)
    order = np.lexsort((theirs.first_id[other], start[other], gap, chip))
    best = order[np.flatnonzero(np.diff(chip[order], prepend=-1))]
    if limit is not None:
        best = best[gap[best] <= limit.astype("timedelta64[us]").astype(np.int64)]
    result[chip[best]] = other[best]
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
