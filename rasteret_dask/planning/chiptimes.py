# SPDX-License-Identifier: Apache-2.0
"""Slots that each chip has of its own: one an acquisition, or one a window of time about the chip's own dates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.lists import first_of
from rasteret_dask.planning.plan import ACQUISITIONS, HarmonizeSpec
from rasteret_dask.table.records import NS_RANGE
from rasteret_dask.words import Choose

__all__ = ["ChipTimes", "Dates", "dates_of"]

Dates: TypeAlias = "Mapping[str, NDArray[np.datetime64]]"
"""Column of ``at=`` -> its dates, ns, UTC; of one window each."""

MOST_LISTED = 5

TAKEN = ("datetime",)
"""Columns of dates of the chip table."""


@dataclass(frozen=True, slots=True)
class ChipTimes:
    """Which slots each chip has of its own."""

    edges: tuple[str, ...] = ()
    """Ends of windows of time, each half-open: lengths from the date in ``relative_to``, else columns of ``at=``."""
    relative_to: str | None = None
    """The column of ``at=`` that lengths are counted from, or that acquisitions are near to."""
    most: int = 0
    """Acquisitions of a chip at most, each a slot; 0: each window of time is a slot."""
    choose: Choose = "spread"
    """Which acquisitions, where there are more."""

    @classmethod
    def of(cls, name: str, spec: HarmonizeSpec) -> ChipTimes | None:
        """Return what a harmonize step says of a source; None: its slots are the same for all chips.

        Raises
        ------
        PlanError
            When what it says does not go together.
        """
        subject = f"of source {name!r}"
        if spec.time != ACQUISITIONS and not isinstance(spec.time, tuple):
            for key in ("max_acquisitions", "choose", "relative_to"):
                if getattr(spec, key) is not None:
                    raise PlanError(
                        f"harmonize({key}={getattr(spec, key)!r}) {subject}", f"time={spec.time!r}",
                        "slots of each chip's own",
                        "Say time='acquisitions', max_acquisitions=12, or time=['-30D', '0D'], relative_to='date'.",
                    )  # fmt: skip
            return None
        edges = spec.time if isinstance(spec.time, tuple) else ()
        own = cls(edges, spec.relative_to, spec.max_acquisitions or 0, spec.choose or "spread")
        own._check_acquisitions(subject, spec)
        if edges:
            own._check_edges(subject)
        return own

    def _check_acquisitions(self, subject: str, spec: HarmonizeSpec) -> None:
        if not self.most:
            if not self.edges:
                raise PlanError(
                    f"harmonize(time='acquisitions') {subject}", "no max_acquisitions",
                    "how many slots chips have", "Say max_acquisitions=12, the most that a chip shall have.",
                )  # fmt: skip
            if spec.choose is not None:
                raise PlanError(
                    f"harmonize(choose={spec.choose!r}) {subject}", "no max_acquisitions", "a number to choose",
                    "Say max_acquisitions=12, or pick= for the one acquisition that each window takes.",
                )  # fmt: skip
            return
        if spec.pick is not None or spec.fill:
            said = "fill=True" if spec.pick is None else f"pick={spec.pick.name!r}"
            raise PlanError(
                f"harmonize({said}) {subject}", f"max_acquisitions={self.most}: a slot is one acquisition",
                "slots with several acquisitions",
                "Leave it out: choose= says which acquisitions; or say time='1MS', or windows without "
                "max_acquisitions, where slots have several.",
            )  # fmt: skip
        if self.choose == "nearest" and self.relative_to is None:
            raise PlanError(
                f"harmonize(choose='nearest') {subject}", "no relative_to", "the date that they are near to",
                "Say relative_to='date', a column of dates of chips(at=...).",
            )  # fmt: skip
        if not self.edges and self.choose != "nearest" and self.relative_to is not None:
            raise PlanError(
                f"harmonize(relative_to={self.relative_to!r}) {subject}",
                f"time='acquisitions' and choose={self.choose!r}, which ask for no date", "a use of it",
                "Say choose='nearest', or the acquisitions of a window of time: time=['-30D', '30D'].",
            )  # fmt: skip

    def _check_edges(self, subject: str) -> None:
        shown = f"harmonize(time={list(self.edges)}) {subject}"
        if len(self.edges) < 2 or (self.most and len(self.edges) > 2):
            raise PlanError(
                shown, f"{len(self.edges)} edges",
                "two, of the window that acquisitions lie in" if self.most else "two or more, of one window or more",
                "Windows lie between edges: time=['-30D', '0D', '30D'] are two.",
            )  # fmt: skip
        if self.relative_to is None:
            return
        if any(not early < late for early, late in pairwise(_lengths(shown, self.edges))):
            raise PlanError(shown, "edges that do not rise", "each later than the one before", "Sort them.")

    @property
    def count(self) -> int:
        """How many slots each chip has."""
        return self.most or len(self.edges) - 1

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of dates of ``at=`` that it needs."""
        return (self.relative_to,) if self.relative_to is not None else self.edges

    @property
    def words(self) -> str:
        """What it says, for people."""
        of = f" from {self.edges[0]} to {self.edges[-1]}" if self.edges else ""
        of += f" of {self.relative_to}" if self.edges and self.relative_to is not None else ""
        if not self.most:
            return f"{self.count} slot{'s' * (self.count > 1)} of each chip's own{of}"
        return f"each chip's own acquisitions{of}, {self.choice}"

    @property
    def choice(self) -> str:
        """Which acquisitions it chooses, for people."""
        near = f" to {self.relative_to}" if self.choose == "nearest" else ""
        return f"at most {self.most}, {self.choose}{near}"

    def windows(self, dates: Dates) -> tuple[NDArray[np.datetime64], NDArray[np.datetime64]] | None:
        """Return where windows of time begin and end, shape (window of the ground, window of time) each; None: all.

        Parameters
        ----------
        dates
            Of each window of the ground.
        """
        if not self.edges:
            return None
        if self.relative_to is None:
            times = np.stack([dates[column] for column in self.edges], -1)
        else:
            away = np.array(_lengths("harmonize(time=)", self.edges), dtype="timedelta64[ns]")
            times = dates[self.relative_to][:, None] + away
        return times[:, :-1], times[:, 1:]

    def check_dates(self, name: str, dates: Dates) -> None:
        """Raise a PlanError where windows of time of a source would end before they begin."""
        ends = self.windows(dates)
        if ends is None or self.relative_to is not None:
            return
        wrong = np.argwhere(~(ends[0] < ends[1]))
        if len(wrong):
            row, slot = wrong[0].tolist()
            raise PlanError(
                f"harmonize(time={list(self.edges)}) of source {name!r}",
                f"{len(np.unique(wrong[:, 0])):,} windows that end before they begin: row {row} of at= has "
                f"{self.edges[slot]} {_shown(ends[0][row, slot])}, {self.edges[slot + 1]} {_shown(ends[1][row, slot])}",
                f"{self.edges[slot]} before {self.edges[slot + 1]}, which is no part of the window",
                "Swap or correct the dates; of one day, let the end be the day after.",
            )  # fmt: skip


def _shown(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="auto"))


def _lengths(subject: str, edges: tuple[str, ...]) -> list[np.timedelta64]:
    """Return lengths of time."""
    found = []
    for edge in edges:
        try:
            length = pd.Timedelta(edge)
        except ValueError as error:
            raise PlanError(
                subject, f"{edge!r} ({error})", "lengths of time, such as '-30D', '0D' or '12h'",
                "Months have no fixed length: say days. Without relative_to, edges are columns of chips(at=...).",
            ) from error  # fmt: skip
        if pd.isna(length):
            raise PlanError(subject, repr(edge), "lengths of time, such as '-30D', '0D' or '12h'")
        found.append(length.to_timedelta64())
    return found


def dates_of(points: pa.Table | None, columns: Mapping[str, str]) -> Dates:
    """Return columns of dates of ``at=``.

    Parameters
    ----------
    points
        The table of ``at=``; None: windows are laid out by a grid, and have no dates.
    columns
        Each column, and the name of a source that asks for it.

    Raises
    ------
    PlanError
        When there is no such column, it holds no dates, or lacks some.
    """
    result: dict[str, NDArray[np.datetime64]] = {}
    for column, source in columns.items():
        subject = f"dates in column {column!r}, which harmonize() of source {source!r} asks for"
        if points is None:
            raise PlanError(
                subject, "chips of a grid, which have no columns", "chips(at=...)",
                "Say chips(size, at=table), a table of points or polygons with that column.",
            )  # fmt: skip
        if column not in points.column_names:
            there = [n for n in points.column_names if n not in ("geometry", "__index__")]
            raise PlanError(
                subject, f"no such column of at=: {first_of(there, 20) or 'no column at all'}", "a column of dates",
                "Name one of them, or add it to the table.",
            )  # fmt: skip
        if column in TAKEN:
            raise PlanError(
                subject, "a name that the chip table has itself", "a name of its own",
                f"Rename it: table.rename(columns={{{column!r}: 'date'}}).",
            )  # fmt: skip
        values = points.column(column)
        if not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type)):
            raise PlanError(
                subject, f"values of type {values.type}", "dates or times",
                f"Convert them: table[{column!r}] = pd.to_datetime(table[{column!r}]).",
            )  # fmt: skip
        if values.null_count:
            rows = np.flatnonzero(values.is_null().to_numpy())
            raise PlanError(
                subject, f"{len(rows):,} nulls: rows {first_of([str(r) for r in rows.tolist()], MOST_LISTED)}",
                "a date in every row",
                f"Leave those rows out: table[table[{column!r}].notna()].",
            )  # fmt: skip
        times = np.asarray(values.to_numpy()).astype("datetime64[us]")  # UTC, where there is a time zone
        result[column] = np.clip(times, *NS_RANGE).astype("datetime64[ns]")
    return result
