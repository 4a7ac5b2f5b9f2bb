# SPDX-License-Identifier: Apache-2.0
"""What a file's name, its tags and the row of a table that names it tell: the scene, the band, the time."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.ingest.filelist import FileRow
from rasteret_dask.table.facts import instant

__all__ = ["Naming", "Period", "period_of"]

Period = tuple[dt.datetime, dt.datetime | None]
"""Start in UTC, and the end where it is an interval, not part of it."""

USUAL_FORMATS = (
    "%Y%m%d", "%Y-%m-%d", "%Y_%m_%d", "%Y.%m.%d", "%Y%m%dT%H%M%S", "%Y-%m-%dT%H%M%S", "%Y%m%d_%H%M%S", "%Y-%m", "%Y",
)  # fmt: skip
"""How dates are mostly written in file names: what an error proposes."""
_TAG_FORMAT = "%Y:%m:%d %H:%M:%S"  # TIFF 6.0, tag 306
_TIMES = ("date", "start", "stop")
_SEPARATORS = "_-. /"
_FINE = re.compile(r"%-?[HIMSfpTXc]")
_DAILY = re.compile(r"%-?[djxDFuwaA]")
_MONTHLY = re.compile(r"%-?[mbBh]")


@dataclass(frozen=True, slots=True)
class Naming:
    """How files tell their scene, band and time."""

    regex: re.Pattern[str] | None = None
    """With named groups; see :func:`build_from_files`."""
    date_format: str = "%Y%m%d"
    """How the groups date, start and stop are written, and dates of a table that are no ISO 8601."""
    date_tag: str | None = None
    """The tag of the file that holds its time."""

    @classmethod
    def of(cls, filename_regex: str | None, date_format: str, date_tag: str | None) -> Naming:
        """Check what a user says of names.

        Raises
        ------
        PlanError
            When the pattern is none, has no named group, or the format is none.
        """
        regex = None
        if filename_regex is not None:
            try:
                regex = re.compile(filename_regex, re.VERBOSE)
            except (re.error, TypeError) as error:
                raise PlanError(
                    "filename_regex", f"{filename_regex!r} ({error})", "a regular expression"
                ) from error
            if not regex.groupindex:
                raise PlanError(
                    "filename_regex", f"{filename_regex!r}, which names no group", "named groups",
                    r"Name what the file's name tells: (?P<date>\d{8}), (?P<band>B\d\d).",
                )  # fmt: skip
        if not isinstance(date_format, str) or "%" not in date_format:
            raise PlanError("date_format", repr(date_format), "a format of strptime, such as '%Y%m%d'")
        return cls(regex, date_format, date_tag)

    def groups_of(self, row: FileRow) -> tuple[Mapping[str, str], str] | None:
        """Return what a file's name tells, by group, and the name of its scene; None where the pattern is not in it.

        Notes
        -----
        The scene is the name without its suffix and without the text of the group ``band``: files whose names differ
        in nothing else are one scene. A pattern with a slash is looked for in the path below the folder that was named.
        """
        folder, slash, base = row.path.rpartition("/")
        stem = folder + slash + (base.rpartition(".")[0] or base)
        if self.regex is None:
            return {}, stem
        text = row.path if "/" in self.regex.pattern else base
        match = self.regex.search(text)
        if match is None:
            return None
        groups = {group: value for group, value in match.groupdict().items() if value is not None}
        if "band" in groups:
            left = len(row.path) - len(text)
            first, last = (min(left + at, len(stem)) for at in match.span("band"))
            stem = without(stem, first, last)
        return groups, stem

    def period_of_groups(self, groups: Mapping[str, str], subject: str) -> Period | None:
        """Return the time that the groups date, or start and stop, tell."""
        told = {group: groups[group] for group in _TIMES if group in groups}
        try:
            periods = {group: period_of(text, self.date_format) for group, text in told.items()}
        except ValueError as error:
            raise SourceError(
                subject, f"{', '.join(f'{k} {v!r}' for k, v in told.items())} ({error})",
                f"dates as date_format={self.date_format!r} writes them", _format_of(told.values()),
            )  from error  # fmt: skip
        first, last = periods.get("start", periods.get("date")), periods.get("stop")
        if first is None or last is None:
            return first
        end = last[1] or (last[0] if _FINE.search(self.date_format) else last[0] + dt.timedelta(days=1))
        if not first[0] < end:
            raise SourceError(
                subject, f"start {first[0]:%Y-%m-%d} and stop {last[0]:%Y-%m-%d}", "a start before it"
            )
        return first[0], end

    def period_of_cell(self, value: Any, subject: str) -> Period | None:
        """Return the time that a cell of a table, or a tag, tells: a time, ISO 8601, ``date_format``, a year."""
        if value is None or value is pd.NaT:
            return None
        if isinstance(value, dt.datetime | dt.date):
            return _instant(value), None
        text = f"{value:04d}" if isinstance(value, int) else str(value).strip()
        for form in (self.date_format, _TAG_FORMAT, *(["%Y"] if re.fullmatch(r"\d{4}", text) else [])):
            try:
                return period_of(text, form)
            except ValueError:
                continue
        try:
            return _instant(text), None
        except ValueError as error:
            raise SourceError(
                subject,
                f"time {text!r}",
                "ISO 8601, a year, or what date_format= writes",
                "Give date_format=.",
            ) from error


def _format_of(texts: Iterable[str]) -> str:
    """Return what to do about dates: the format that writes all of them, where it is a usual one."""
    known = list(texts)
    fitting = (form for form in USUAL_FORMATS if all(_is_written(text, form) for text in known))
    return next((f"Give date_format={form!r}." for form in fitting), "Give date_format=.")


def _is_written(text: str, form: str) -> bool:
    try:
        period_of(text, form)
    except ValueError:
        return False
    return True


def period_of(text: str, form: str) -> Period:
    """Return what a text means in a format of strptime: a year or month as a whole, a day or time as its start.

    Raises
    ------
    ValueError
        When it is not written so.

    Examples
    --------
    >>> [str(t.date()) for t in period_of("2021", "%Y")], period_of("20210305", "%Y%m%d")[1]
    (['2021-01-01', '2022-01-01'], None)
    """
    start = _instant(dt.datetime.strptime(text, form))
    if _FINE.search(form) or _DAILY.search(form):
        return start, None
    if _MONTHLY.search(form):
        return start, (start.replace(day=1) + dt.timedelta(days=32)).replace(day=1)
    return start, start.replace(year=min(start.year + 1, dt.MAXYEAR))


def without(text: str, first: int, last: int) -> str:
    """Return a path without a part, and without the separator that is left over.

    Examples
    --------
    >>> without("S2_B04_2023", 3, 6), without("2023/B04", 5, 8), without("2023_B04", 5, 8)
    ('S2_2023', '2023', '2023')
    """
    before, after = text[:first], text[last:]
    if not before or before[-1] in _SEPARATORS:
        after = after.lstrip(_SEPARATORS)
    return before + after if after else before.rstrip(_SEPARATORS)


def _instant(value: Any) -> dt.datetime:
    moment = instant(value)
    assert moment is not None
    return moment
