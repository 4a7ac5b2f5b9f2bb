# SPDX-License-Identifier: Apache-2.0
"""Splits by time: each split has a range, and what straddles two belongs to none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import Scalar
from rasteret_dask.table.records import NS_RANGE

__all__ = ["BETWEEN", "by_time", "spans", "too_soon"]

Ranges: TypeAlias = Sequence[tuple[str, tuple[Scalar, ...] | None]]
"""(split, (start, end)): ISO 8601, half-open, None for an open end; None: whatever meets no other range."""

BETWEEN = -2
"""Number of chips whose time is in no range."""


def spans(chips: PlannedChips) -> NDArray[np.int64]:
    """Return when the records begin and end that feed each chip, shape (chip, 2), ns since 1970.

    Records that hold at any time have no part in it; a chip that has no others gets an empty span at the end of time.
    """
    feeds = chips.feeds
    start, end = np.empty(len(feeds.row), dtype=np.int64), np.empty(len(feeds.row), dtype=np.int64)
    low, high = (int(edge.astype("datetime64[ns]").astype(np.int64)) for edge in NS_RANGE)
    for number, source in enumerate(chips.sources):
        own = feeds.source == number
        at = source.passes.of_record[feeds.row[own]]
        start[own] = source.passes.start[at].astype("datetime64[ns]").astype(np.int64)
        end[own] = source.passes.end[at].astype("datetime64[ns]").astype(np.int64)
    endless = (start <= low) & (end >= high)
    start[endless], end[endless] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    if not len(chips.table):
        return np.zeros((0, 2), dtype=np.int64)
    begin = feeds.offsets[:-1]
    return np.stack([np.minimum.reduceat(start, begin), np.maximum.reduceat(end, begin)], -1)


def by_time(span: NDArray[np.int64], ranges: Ranges) -> NDArray[np.int64]:
    """Return the number of the split whose range holds each span; -1 where it straddles, BETWEEN where none meets it.

    Parameters
    ----------
    span
        Shape (chip, 2): start and end, ns; an instant has both the same.
    ranges
        The range of each split.
    """
    edges = [None if own is None else _edges(own) for _, own in ranges]
    inside = np.zeros((len(ranges), len(span)), dtype=bool)
    met = np.zeros((len(ranges), len(span)), dtype=bool)
    for number, own in enumerate(edges):
        if own is not None:
            low, high = own
            instant = span[:, 0] == span[:, 1]
            inside[number] = (span[:, 0] >= low) & np.where(instant, span[:, 1] < high, span[:, 1] <= high)
            met[number] = (span[:, 0] < high) & np.where(instant, span[:, 1] >= low, span[:, 1] > low)
    result = np.where(met.any(axis=0), -1, BETWEEN)
    for number, own in enumerate(edges):
        result[inside[number] if own is not None else ~met.any(axis=0)] = number
    return np.asarray(result, dtype=np.int64)


def _edges(ends: tuple[Scalar, ...]) -> tuple[int, int]:
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    start, end = ends
    return (
        low if start is None else pd.Timestamp(str(start)).as_unit("ns").value,
        high if end is None else pd.Timestamp(str(end)).as_unit("ns").value,
    )


def too_soon(span: NDArray[np.int64], split: NDArray[np.int64], train: int, gap: str) -> NDArray[np.bool_]:
    """Tell which chips of other splits lie nearer in time to a train chip than a gap; shape (chip,).

    Parameters
    ----------
    span
        Shape (chip, 2): start and end, ns.
    split
        Shape (chip,). Split numbers, below 0 for none.
    train
        The number of train.
    gap
        A length of time, as ``"30D"``.
    """
    least = length_ns(gap)
    near = np.zeros(len(span), dtype=bool)
    ours = span[split == train]
    others = np.flatnonzero((split >= 0) & (split != train))
    if not len(ours) or not len(others):
        return near
    order = np.argsort(ours[:, 0], kind="stable")
    start, latest = ours[order, 0], np.maximum.accumulate(ours[order, 1])
    after = np.searchsorted(
        start, span[others, 1], side="left"
    )  # train chips that begin after the chip's end
    later = np.where(after < len(start), start[np.minimum(after, len(start) - 1)], np.iinfo(np.int64).max)
    begun = np.searchsorted(start, span[others, 1], side="right")
    earlier = np.where(begun > 0, latest[np.maximum(begun, 1) - 1], np.iinfo(np.int64).min)
    gone = np.minimum(
        later.astype(np.float64) - span[others, 1], span[others, 0].astype(np.float64) - earlier
    )
    near[others[gone < least]] = True
    return near


def length_ns(gap: str) -> int:
    """Return a length of time in ns.

    Raises
    ------
    PlanError
        When it is none, or below 0.
    """
    try:
        length = pd.Timedelta(gap)
    except ValueError as error:
        raise PlanError("split(gap=)", repr(gap), "a length of time, as '30D' or '12h'") from error
    if pd.isna(length) or length < pd.Timedelta(0):
        raise PlanError("split(gap=)", repr(gap), "a length of time of 0 or more, as '30D'")
    return int(length.as_unit("ns").value)
