# SPDX-License-Identifier: Apache-2.0
"""Reports of a store's shards: a mark when one is begun, a report when it is in place, a page of many of them."""

from __future__ import annotations

import os
import platform
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from rasteret_dask.errors import StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.net import remote
from rasteret_dask.net.sums import crc32_of, document_of, sealed
from rasteret_dask.store.smallobjects import at_once, data_of

__all__ = [
    "JOB",
    "PAGES",
    "PAGE_REPORTS",
    "Report",
    "ReportPlace",
    "done",
    "is_dead",
    "is_mark",
    "is_page",
    "mark_of",
    "on_pages",
    "page_of",
    "report_path",
    "reports",
    "tried",
    "tries",
    "turn_page",
    "unreported",
    "valid_report",
]

JOB = "_job"
"""Folder of the job itself and of what its tasks report."""


PAGES = f"{JOB}/pages"
"""Folder of pages: reports of shards which no task asks for any more, many in an object."""


PAGE_REPORTS = 1024
"""Reports of a page, about: so many shards' reports lie in objects of their own, and some that are under way."""


_MARK = re.compile(rf"{JOB}/tried/([^/]+)/([0-9a-f]+)\.(.+)\.(\d+)\.[0-9a-f]{{32}}")


_PAGE = re.compile(rf"{PAGES}/(\d+)\.[0-9a-f]{{32}}\.json")


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """How the report of a shard is stored: all that a commit keeps of it in memory."""

    mark: str
    """Of the try that put it."""
    path: str
    """Of the report, or of the page that it is on."""
    size: int = 0
    crc32: int = 0
    """Of a report that is an object of its own."""

    @property
    def on_page(self) -> bool:
        """Whether it lies among others."""
        return is_page(self.path)

    def attempts(self, marks: Collection[str]) -> int:
        """Return how often the shard was begun; ``marks`` are those that lie there."""
        return len({self.mark, *marks})


@dataclass(frozen=True, slots=True)
class Report:
    """What the task of a shard reports, and how the report itself is stored."""

    values: Mapping[str, Any]
    place: ReportPlace


def tried(url: str, shard: str, key: str) -> str:
    """Mark that a shard is begun, before any object of it is put; return the mark's path.

    The mark's name says for which key, and in which process: a later run knows the shard's objects for its own by it,
    and can tell whether the process is still there.
    """
    path = f"{JOB}/tried/{shard}/{key[:16]}.{_node()}.{os.getpid()}.{uuid.uuid4().hex}"
    remote.put(remote.join(url, path), b"")
    return path


def done(url: str, shard: str, key: str, mark: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Put the report of a shard whose objects are all in place, and return the one that lies there.

    A report of the same objects stays as it is: a worker that was cut off and comes back when the store is finished
    would else put other times in place of those that the commit vouches for.

    Parameters
    ----------
    url
        The store.
    shard
        The shard's name.
    key
        What decides the shard's content: a report of another key is none.
    mark
        What :func:`tried` returned for this try.
    report
        JSON values; ``objects`` lists path, size and crc32 of each object.
    """
    whole, place = {"shard": shard, "key": key, "mark": mark, **report}, remote.join(url, report_path(shard))
    data = sealed(whole)
    if not remote.put_new(place, data):
        there = _report_in(data_of(url, report_path(shard)), shard, {shard: key})
        if there is not None and there["objects"] == whole["objects"]:
            return there
        remote.put(place, data)
    return whole


def valid_report(url: str, shard: str, key: str) -> dict[str, Any] | None:
    """Return the report of a shard that is written: its objects are all there, in their sizes; else None.

    Parameters
    ----------
    url
        The store.
    shard
        The shard's name.
    key
        What decides the shard's content; of ``to_zarr`` the job's digest.
    """
    try:
        report = document_of(remote.get(remote.join(url, report_path(shard))))
        if report is None or report.get("shard") != shard or report.get("key") != key:
            return None
        sizes = at_once(lambda o: remote.head(remote.join(url, o["path"])).size, report["objects"])
    except remote.MissingError:
        return None
    return report if sizes == [o["size"] for o in report["objects"]] else None


def report_path(shard: str) -> str:
    """Return the path of a shard's own report."""
    return f"{JOB}/done/{shard}.json"


def turn_page(url: str, shards: Sequence[str], keys: Mapping[str, str]) -> None:
    """Put the reports of finished shards into one object, a page, and then remove theirs, and the marks of these tries.

    A shard of which there is no valid report by now stays as it is. Stopped in between, some reports lie there twice.

    Parameters
    ----------
    url
        The store.
    shards
        Shards that no task asks for any more: their tasks have ended, and are not computed again.
    keys
        As in :class:`Content`.
    """
    data = at_once(lambda shard: data_of(url, report_path(shard)), shards)
    documents = {shard: _report_in(text, shard, keys) for shard, text in zip(shards, data, strict=True)}
    there = {shard: report for shard, report in documents.items() if report is not None}
    if not there:
        return
    numbers = [
        int(m[1])
        for path in remote.listing(remote.join(url, PAGES))
        if (m := _PAGE.fullmatch(f"{PAGES}/{path}"))
    ]
    path = f"{PAGES}/{max(numbers, default=0) + 1:06d}.{uuid.uuid4().hex}.json"
    remote.put(remote.join(url, path), sealed({**STORE.note, "reports": there}))
    left = [path for shard, report in there.items() for path in (report_path(shard), report["mark"])]
    with suppress(StoreError):  # whoever may not delete leaves them: the same is said twice
        remote.delete_all(url, left)


def on_pages(url: str, others: Collection[str], keys: Mapping[str, str]) -> set[str]:
    """Return the shards of all pages but some ``others``, as far as they are of these keys."""
    folder = remote.join(url, PAGES)
    paths = [path for name in remote.listing(folder) if (path := f"{PAGES}/{name}") not in others]
    pages = (page_of(data_of(url, path)) for path in paths if _PAGE.fullmatch(path))
    return {shard for page in pages for shard, report in page.items() if keys.get(shard) == report["key"]}


def _report_in(text: bytes | None, shard: str, keys: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the report of a shard where this is one, of this key."""
    report = None if text is None else document_of(text)
    if report is None or (report.get("shard"), report.get("key")) != (shard, keys[shard]):
        return None
    return {name: value for name, value in report.items() if name != "checksum"}


def page_of(data: bytes | None) -> Mapping[str, Mapping[str, Any]]:
    """Return shard -> its report, of a page; nothing where it is damaged."""
    document = None if data is None else document_of(data)
    return {} if document is None else document["reports"]


def reports(url: str, objects: Mapping[str, int], keys: Mapping[str, str]) -> Iterator[dict[str, Report]]:
    """Yield the valid reports, some at a time: of these keys, and of shards whose objects are all there in their sizes.

    Parameters
    ----------
    url
        The store.
    objects
        Path -> bytes of what lies there.
    keys
        As in :class:`Content`.

    Yields
    ------
    dict
        Shard -> its report; each shard once, with the latest one.
    """
    seen: set[str] = set()

    def valid(some: Iterable[tuple[str, Mapping[str, Any], ReportPlace]]) -> dict[str, Report]:
        result = {
            shard: Report(values, entry)
            for shard, values, entry in some
            if shard not in seen and all(objects.get(o["path"]) == o["size"] for o in values["objects"])
        }
        seen.update(result)
        return result

    own = [
        shard for shard in keys if report_path(shard) in objects
    ]  # written after any page that has the shard
    for at in range(0, len(own), PAGE_REPORTS):
        some = own[at : at + PAGE_REPORTS]
        read = zip(some, at_once(lambda shard: data_of(url, report_path(shard)), some), strict=True)
        found = ((shard, data, _report_in(data, shard, keys)) for shard, data in read)
        yield valid(
            (shard, values, ReportPlace(values["mark"], report_path(shard), len(data), crc32_of(data)))
            for shard, data, values in found
            if data is not None and values is not None
        )
    for path in sorted((path for path in objects if _PAGE.fullmatch(path)), reverse=True):
        page = page_of(data_of(url, path)).items()
        yield valid((s, v, ReportPlace(v["mark"], path)) for s, v in page if keys.get(s) == v["key"])


def unreported(url: str, objects: Collection[str], keys: Mapping[str, str]) -> set[str]:
    """Return the shards that have no report yet, neither of their own nor on a page: a look, not a check."""
    left = {shard for shard in keys if report_path(shard) not in objects}
    for path in objects if left else ():
        if _PAGE.fullmatch(path):
            left.difference_update(page_of(data_of(url, path)))
    return left


def tries(objects: Iterable[str]) -> dict[str, list[str]]:
    """Return shard -> the marks of its tries."""
    result: dict[str, list[str]] = {}
    for path in sorted(objects):
        if path.startswith(f"{JOB}/tried/"):
            result.setdefault(path.split("/")[2], []).append(path)
    return result


def mark_of(path: str, keys: Mapping[str, str]) -> re.Match[str] | None:
    """Return the parts of a mark's name where it is one of these shards, in this content."""
    parts = _MARK.fullmatch(path)
    return parts if parts is not None and keys.get(parts[1], "").startswith(parts[2]) else None


def is_dead(mark: str) -> bool:
    """Tell whether the process that put a mark is certainly gone: it ran on this machine, and does not any more."""
    parts = _MARK.fullmatch(mark)
    return parts is not None and parts[3] == _node() and not psutil.pid_exists(int(parts[4]))


def _node() -> str:
    """Return this machine's name, as part of an object's."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())


def is_mark(path: str) -> bool:
    """Tell whether a path is that of a mark."""
    return _MARK.fullmatch(path) is not None


def is_page(path: str) -> bool:
    """Tell whether a path is that of a page."""
    return _PAGE.fullmatch(path) is not None
