# SPDX-License-Identifier: Apache-2.0
"""Which records belong to one acquisition, and which slot of the time axis each acquisition competes for."""

from __future__ import annotations

import datetime as dt
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.table.facts import instant, version_of
from rasteret_dask.table.records import NS_RANGE, Records

__all__ = [
    "Acquisitions",
    "TimeAxis",
    "acquisitions",
    "half_open",
    "intervals",
    "narrowest",
    "regular",
    "stamp_of",
]

_PART = re.compile(r"-(sr|st)$")
"""USGS publishes a scene's reflectance and its temperature as two items, in ``landsat-c2l2-sr`` and ``-st``."""

SAME_PASS = pd.Timedelta(10, "min")
"""Records of one datatake whose starts lie further apart than this are different acquisitions."""


@dataclass(frozen=True)
class Acquisitions:
    """The records of one member, grouped by platform's pass."""

    of_record: NDArray[np.int64]
    """Shape (record,). Number of each record's acquisition, -1 for a record that a newer version replaces."""
    start: NDArray[np.datetime64]
    """Shape (acquisition,). Earliest start in UTC, ns."""
    end: NDArray[np.datetime64]
    """Shape (acquisition,). End of the interval; equal to ``start`` for instants."""
    platform: tuple[str, ...]
    """Shape (acquisition,). Platform in lower case, "" where unknown."""
    replaced: int
    """Records dropped because the same scene stands again with a newer baseline."""
    record_start: NDArray[np.datetime64]
    """Shape (record,), ns. Each record's own start: what is decided for one chip looks at its records only."""
    record_end: NDArray[np.datetime64]
    """Shape (record,), ns. End of the record's interval; equal to its start for an instant."""
    record_cloud: NDArray[np.float64]
    """Shape (record,). Cloud cover in percent, NaN where unknown."""

    @property
    def is_static(self) -> bool:
        """Whether all acquisitions hold at any time."""
        low, high = (edge.astype("datetime64[ns]") for edge in NS_RANGE)
        return bool(len(self.start)) and bool(np.all((self.start <= low) & (self.end >= high)))

    @property
    def is_interval(self) -> NDArray[np.bool_]:
        """Shape (acquisition,). True where the acquisition stands for an interval (a year)."""
        return np.asarray(self.end > self.start)


@dataclass(frozen=True)
class TimeAxis:
    """The slots of a source: half-open windows in UTC."""

    start: NDArray[np.datetime64]
    """Shape (slot,), ns. The coordinate."""
    end: NDArray[np.datetime64]
    """Shape (slot,), ns."""
    span: tuple[np.datetime64, np.datetime64]
    """The range asked for, half-open; the first slot may begin before it and the last may end after."""

    def __len__(self) -> int:
        return len(self.start)

    def middle(self, window: NDArray[np.int64], slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the middle of slots, ns since 1970 UTC: the same in every window of the ground."""
        middle = self.start.astype(np.int64) // 2 + self.end.astype(np.int64) // 2
        return np.asarray(middle[slot])


def half_open(date_range: Sequence[str | None] | str | None) -> tuple[str | None, str | None]:
    """Return (start, end) of a date range as ISO 8601 UTC, half-open; the last day, month or year included.

    Raises
    ------
    PlanError
        When a date cannot be understood or the range is empty.
    """
    if date_range is None:
        return None, None
    if isinstance(date_range, str):
        date_range = date_range.split("/") if "/" in date_range else (date_range, date_range)
    if not isinstance(date_range, Sequence) or len(date_range) != 2:
        raise PlanError("date_range", repr(date_range), "(start, end), either may be None")
    start, end = (None if part in (None, "", "..") else str(part) for part in date_range)
    low = None if start is None else _period(start)[0]
    high = None if end is None else _period(end)[1]
    if low is not None and high is not None and not low < high:
        raise PlanError("date_range", f"{start} to {end}", "a start before its end", "Swap the two dates.")
    return (None if low is None else low.isoformat()), (None if high is None else high.isoformat())


def _period(text: str) -> tuple[pd.Timestamp, pd.Timestamp]:
    try:
        stamp = stamp_of(text)
    except ValueError as error:
        raise PlanError("date_range", repr(text), "an ISO 8601 date or time") from error
    if pd.isna(stamp):
        raise PlanError("date_range", repr(text), "an ISO 8601 date or time")
    stamp = stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")
    lengths = {4: pd.DateOffset(years=1), 7: pd.DateOffset(months=1), 10: pd.DateOffset(days=1)}
    step = lengths.get(len(text.strip()))
    try:
        return stamp, stamp if step is None else stamp + step
    except (OverflowError, ValueError):  # the last day, month or year that there is
        return stamp, pd.Timestamp(dt.datetime.max.replace(tzinfo=dt.UTC))


def stamp_of(text: str) -> pd.Timestamp:
    """Return a time as :func:`facts.instant` reads it, else as pandas does (``"2024-06"``).

    Raises
    ------
    ValueError
        When it is no time.
    """
    try:
        return pd.Timestamp(instant(text) or text)
    except ValueError:
        return pd.Timestamp(text)


def narrowest(
    ranges: Sequence[tuple[str | None, str | None]],
) -> tuple[pd.Timestamp | None, pd.Timestamp | None]:
    """Return the intersection of half-open ranges."""
    starts = [pd.Timestamp(a) for a, _ in ranges if a is not None]
    ends = [pd.Timestamp(b) for _, b in ranges if b is not None]
    return max(starts, default=None), min(ends, default=None)


def regular(offset: str, start: pd.Timestamp, end: pd.Timestamp) -> TimeAxis:
    """Return the slots of length ``offset`` that overlap [start, end).

    Slots of calendar offsets (``"1MS"``) begin on the calendar, those of plain lengths (``"10D"``) at ``start``.

    Raises
    ------
    PlanError
        When pandas does not know the offset.
    """
    step = _offset(offset)
    utc_start, utc_end = (
        pd.Timestamp(
            np.clip(np.datetime64(t.tz_convert("UTC").tz_localize(None).to_pydatetime(), "us"), *NS_RANGE)
        )
        for t in (start, end)
    )
    first = utc_start
    if not isinstance(step, pd.tseries.offsets.Tick):
        first = utc_start.normalize()
        first = first if step.is_on_offset(first) else step.rollback(first)
    edges = [first]
    while edges[-1] < utc_end:
        following = edges[-1] + step
        if not following > edges[-1] or len(edges) > 100_000:
            raise PlanError(
                "harmonize(time=)", repr(offset), "an offset that moves forward, at most 100,000 slots"
            )
        edges.append(following)
    stamps = np.array(edges, dtype="datetime64[ns]")
    keep = stamps[1:] > np.datetime64(utc_start, "ns")
    span = np.datetime64(utc_start, "ns"), np.datetime64(utc_end, "ns")
    return TimeAxis(stamps[:-1][keep], stamps[1:][keep], span)


def _offset(offset: str) -> pd.tseries.offsets.BaseOffset:
    """Return the pandas offset of a text that says where slots begin; one that says where they end is refused."""
    wanted = "a pandas offset such as '1MS', 'QS', 'YS' or '10D'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # old spellings: "M" for month end
            step = pd.tseries.frequencies.to_offset(offset)
    except (ValueError, FutureWarning) as error:
        raise PlanError("harmonize(time=)", repr(offset), wanted) from error
    if step is None or type(step).__name__.endswith("End"):
        raise PlanError(
            "harmonize(time=)",
            f"{offset!r}, which names the ends of periods",
            wanted,
            "Use the form with S for start.",
        )
    return step


def intervals(groups: Sequence[Acquisitions]) -> TimeAxis:
    """Return the distinct intervals of records that stand for intervals, in order."""
    pairs = sorted({pair for g in groups for pair in zip(g.start.tolist(), g.end.tolist(), strict=True)})
    values = np.array(pairs, dtype="int64").reshape(-1, 2).astype("datetime64[ns]")
    return TimeAxis(values[:, 0], values[:, 1], (values[:, 0].min(), values[:, 1].max()))


def acquisitions(records: Records, static: bool = False) -> Acquisitions:
    """Group records into acquisitions: same collection, platform and datatake (or orbit), starts within 10 minutes.

    A datatake and tile that stands twice (reprocessed, or listed by two catalogs) keeps its newest baseline.

    Parameters
    ----------
    records
        The records. Those whose interval has no ends (``facts.ENDLESS``) hold at any time.
    static
        Whether all of them do, whatever time they have, if any.
    """
    keys = _RecordKeys.of(records, static)
    replaced = _replaced(keys)
    order = np.lexsort((keys.id, keys.start, keys.group))
    order = order[~replaced[order]]
    label = np.full(len(records), -1, dtype=np.int64)
    starts: list[int] = []
    ends: list[int] = []
    leads: list[int] = []
    group = -1
    rows = (v[order].tolist() for v in (keys.group, keys.start, keys.end))
    for at, key, start, end in zip(order.tolist(), *rows, strict=True):
        if key != group or start - starts[-1] > SAME_PASS.value:
            group = key
            starts.append(start)
            ends.append(start)
            leads.append(at)
        if end > start:  # granules of one pass that start seconds apart are no interval
            ends[-1] = max(ends[-1], end)
        label[at] = len(starts) - 1
    low, high = (int(edge.astype("datetime64[ns]").astype(np.int64)) for edge in NS_RANGE)
    for number in np.unique(label[keys.endless & (label >= 0)]).tolist():
        starts[number], ends[number] = low, high
    by_start = np.argsort(starts, kind="stable").astype(np.int64)
    rank = np.empty(len(starts) + 1, dtype=np.int64)
    rank[by_start], rank[-1] = np.arange(len(starts)), -1  # -1 stays -1
    return Acquisitions(
        rank[label],
        np.array(starts, dtype=np.int64)[by_start].astype("datetime64[ns]"),
        np.array(ends, dtype=np.int64)[by_start].astype("datetime64[ns]"),
        tuple(keys.platform[leads[i]] for i in by_start),
        int(replaced.sum()),
        np.where(keys.endless, low, keys.start).astype("datetime64[ns]"),
        np.where(keys.endless, high, keys.end).astype("datetime64[ns]"),
        np.asarray(records.table.column("eo:cloud_cover").to_numpy(), dtype=np.float64),
    )


@dataclass(frozen=True)
class _RecordKeys:
    """What records say of themselves; all have one entry per record. Texts are numbered in their order."""

    id: NDArray[np.int64]
    group: NDArray[np.int64]
    """Collection, platform and pass."""
    scene: NDArray[np.int64]
    """Platform, pass, tile and part of the product; -1 where pass or tile is unknown."""
    version: NDArray[np.int64]
    start: NDArray[np.int64]
    """ns since 1970 UTC."""
    end: NDArray[np.int64]
    """Equal to ``start`` for an instant."""
    endless: NDArray[np.bool_]
    """True where the record holds at any time; ``start`` then only tells passes apart."""
    created: NDArray[np.int64]
    """The smallest number where unknown."""
    platform: list[str]

    @classmethod
    def of(cls, records: Records, static: bool) -> _RecordKeys:
        def stamps(name: str) -> NDArray[np.datetime64]:
            times = np.asarray(records.table.column(name).cast(pa.timestamp("us", "UTC")).to_numpy())
            return np.asarray(np.clip(times, *NS_RANGE), dtype="datetime64[ns]")

        def text(name: str) -> list[str]:
            return ["" if v is None else str(v) for v in records.column(name)]

        instant, first, last = stamps("datetime"), stamps("start_datetime"), stamps("end_datetime")
        interval = last - first > np.timedelta64(1, "D")  # never true of a missing time
        low, high = (edge.astype("datetime64[ns]") for edge in NS_RANGE)
        endless = ((first <= low) & (last >= high)) | static
        start = np.where((interval & ~endless) | np.isnat(instant), first, instant)
        start = np.where(endless & np.isnat(start), low, start)
        if np.isnat(start).any():
            bad = [records.ids[i] for i in np.flatnonzero(np.isnat(start))[:5]]
            raise PlanError(
                f"records {', '.join(bad)}", "no datetime", "a datetime or an interval in every record",
                "Of what does not change, say harmonize(time='static').",
            )  # fmt: skip
        collection, baseline = text("collection"), text("baseline")  # few names, of many records
        platform = [p.lower() for p in text("platform")]  # catalogs spell "Sentinel-2B" and "sentinel-2b"
        passed = [d or f"orbit {o}" for d, o in zip(text("datatake"), text("orbit"), strict=True)]
        group = ["|".join(parts) for parts in zip(collection, platform, passed, strict=True)]
        tile = text("tile")
        known = np.array([t != "" and p != "orbit " for t, p in zip(tile, passed, strict=True)], dtype=bool)
        part = {c: m[0] if (m := _PART.search(c)) else "" for c in set(collection)}
        product = [part[c] for c in collection]
        scene = _numbered(["|".join(parts) for parts in zip(platform, passed, tile, product, strict=True)])
        version = {b: version_of(b) for b in set(baseline)}
        place = {v: i for i, v in enumerate(sorted(set(version.values())))}
        return cls(
            _numbered(records.ids),
            _numbered(group),
            np.where(known, scene, -1),
            np.array([place[version[b]] for b in baseline], dtype=np.int64),
            start.astype(np.int64),
            np.where(interval & ~endless, last, start).astype(np.int64),
            endless,
            stamps("created").astype(np.int64),
            platform,
        )


def _numbered(texts: list[str]) -> NDArray[np.int64]:
    """Shape (text,). The place of each among the distinct ones, sorted."""
    return np.unique(np.array(texts, dtype=str), return_inverse=True)[1].astype(np.int64)


def _replaced(keys: _RecordKeys) -> NDArray[np.bool_]:
    """Shape (record,). True where the same datatake and tile stands again with a newer baseline."""
    gone = np.zeros(len(keys.id), dtype=bool)
    twice = np.lexsort((keys.start, keys.scene))
    twice = twice[keys.scene[twice] >= 0]
    # A relative orbit comes back after days; the starts of one scene differ by seconds between catalogs.
    apart = np.diff(keys.start[twice], prepend=0) > SAME_PASS.value
    scene = np.cumsum(apart | (np.diff(keys.scene[twice], prepend=-1) != 0))
    newest = np.lexsort((keys.id[twice], keys.created[twice], keys.version[twice], scene))
    gone[twice[newest[:-1]]] = scene[newest[:-1]] == scene[newest[1:]]
    return gone
