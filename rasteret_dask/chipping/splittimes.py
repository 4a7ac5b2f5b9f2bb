# SPDX-License-Identifier: Apache-2.0
"""Splits by time: each split has a range, and what straddles two belongs to none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.errors import PlanError
from rasteret_dask.lists import listed
from rasteret_dask.planning.plan import Scalar, SplitSpec
from rasteret_dask.table.records import NS_RANGE

__all__ = [
    "BETWEEN",
    "FAR_FUTURE",
    "NO_DATE",
    "SplitTimes",
    "by_time",
    "dates",
    "length_ns",
    "none_in_range",
    "spans",
    "split_spans",
    "times_of",
    "too_soon",
]

Ranges: TypeAlias = Sequence[tuple[str, tuple[Scalar, ...] | None]]
"""(split, (start, end)): ISO 8601, half-open, None for an open end; None: whatever meets no other range."""

BETWEEN = -2
"""Number of chips whose time is in no range."""

NO_DATE = np.iinfo(np.int64).min
"""Stands for a date that is null."""

FAR_FUTURE = np.iinfo(np.int64).max
"""Later than anything."""


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


def dates(table: pa.Table, column: str) -> NDArray[np.int64]:
    """Return each chip's own date as a span of no length, shape (chip, 2), ns since 1970; ``NO_DATE`` where it is null.

    Parameters
    ----------
    table
        The chip table, with the columns of ``at=``.
    column
        A column of dates, or of times; those without a time zone are UTC.

    Raises
    ------
    PlanError
        When there is no such column, or it holds no dates.
    """
    subject = f"split(by='time', date={column!r})"
    if column not in table.column_names:
        some = listed(
            [name for name in table.column_names if _is_dates(table.schema.field(name).type)], "columns"
        )
        raise PlanError(
            subject, "no such column", f"a column of dates: {some}",
            "Columns of chips(at=) are columns of chips; with_table() adds others.",
        )  # fmt: skip
    values = table.column(column)
    if not _is_dates(values.type):
        raise PlanError(
            subject, f"values of type {values.type}", "dates or times",
            f"Convert them: table[{column!r}] = pd.to_datetime(table[{column!r}]).",
        )  # fmt: skip
    times = np.asarray(values.to_numpy()).astype("datetime64[us]")
    moment = np.clip(times, *NS_RANGE).astype("datetime64[ns]").astype(np.int64)
    return np.stack([moment, moment], -1)


def _is_dates(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def none_in_range(spec: SplitSpec, span: NDArray[np.int64]) -> PlanError:
    """Return the error of a split by time without a chip in any range."""
    there = span[(span[:, 0] != FAR_FUTURE) & (span[:, 0] != NO_DATE)]
    days = there.astype("datetime64[ns]").astype("datetime64[D]")
    what = "records of chips" if spec.date is None else f"column {spec.date}"
    when = f"{what} are of {days[:, 0].min()} to {days[:, 1].max()}" if len(days) else f"{what} have no date"
    if spec.date is not None:
        return PlanError(
            f"split(by='time', date={spec.date!r})", f"no chip in any range; {when}",
            "chips whose date lies in a range", "Change the ranges.",
        )  # fmt: skip
    return PlanError(
        "split(by='time')", f"no chip in any range; {when}",
        "chips whose records all lie in the range of one split",
        "A chip of slots has the time of all its slots: leave out harmonize(time=), so that each acquisition is a "
        "chip, or change the ranges.",
    )  # fmt: skip


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


def too_soon(
    span: NDArray[np.int64],
    split: NDArray[np.int64],
    train: int,
    gap: str,
    ours: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
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
    ours
        Shape (span, 2). The times of all train chips; None: they are among these.
    """
    least = length_ns(gap)
    near = np.zeros(len(span), dtype=bool)
    others = np.flatnonzero((split >= 0) & (split != train))
    ours = span[split == train] if ours is None else ours
    near[others[_apart(ours, span[others]) < least]] = True
    return near


def _apart(ours: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how far each of some spans is from the nearest of ours, ns, below 0 where they overlap; shape (other,)."""
    if not len(ours) or not len(others):
        return np.full(len(others), np.inf)
    order = np.argsort(ours[:, 0], kind="stable")
    start, latest = ours[order, 0], np.maximum.accumulate(ours[order, 1])
    after = np.searchsorted(start, others[:, 1], side="left")  # our spans that begin after the other's end
    later = np.where(after < len(start), start[np.minimum(after, len(start) - 1)], np.iinfo(np.int64).max)
    begun = np.searchsorted(start, others[:, 1], side="right")
    earlier = np.where(begun > 0, latest[np.maximum(begun, 1) - 1], np.iinfo(np.int64).min)
    return np.asarray(
        np.minimum(later.astype(np.float64) - others[:, 1], others[:, 0].astype(np.float64) - earlier)
    )


@dataclass(frozen=True, slots=True)
class SplitTimes:
    """When the chips of splits are."""

    ends: dict[str, tuple[str, str]]
    """Split -> its first and last day, ISO 8601; splits without a chip that has a time are left out."""
    apart_days: dict[str, float]
    """Pair of splits, ``"train-val"`` -> days between the two chips that are nearest in time; 0 where they meet."""


def split_spans(chips: PlannedChips) -> dict[str, NDArray[np.int64]]:
    """Return the different spans of the chips of each split, shape (span, 2); of chips that have a time."""
    spec = chips.split
    assert spec is not None
    span = spans(chips) if spec.date is None else dates(chips.table, spec.date)
    timed = (span[:, 0] <= span[:, 1]) & (span[:, 0] != NO_DATE)
    names = np.array(chips.table.column("split").to_pylist(), dtype=object)
    return {name: np.unique(span[timed & (names == name)], axis=0) for name in spec.names}


def times_of(parts: Sequence[dict[str, NDArray[np.int64]]]) -> SplitTimes:
    """Return when the chips of each split are, of parts as :func:`split_spans` returns them."""
    names = dict.fromkeys(name for part in parts for name in part)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
    of = {name: own for name, own in whole.items() if len(own)}
    ends = {name: (_day(own[:, 0].min()), _day(own[:, 1].max())) for name, own in of.items()}
    apart = {
        f"{a}-{b}": round(max(float(_apart(of[a], of[b]).min()), 0.0) / length_ns("1D"), 6)
        for a, b in combinations(of, 2)
    }
    return SplitTimes(ends, apart)


def _day(moment: int) -> str:
    return str(np.datetime64(int(moment), "ns").astype("datetime64[D]"))


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
