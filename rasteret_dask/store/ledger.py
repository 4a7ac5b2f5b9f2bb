# SPDX-License-Identifier: Apache-2.0
"""The ledger of a store that is being written: who writes it, what is in place, and what the commit vouches for."""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rasteret_dask.errors import StoreError
from rasteret_dask.formats import MEANING, STORE
from rasteret_dask.net import remote
from rasteret_dask.net.sums import (
    Summing,
    Sums,
    closed,
    crc32_of,
    document_of,
    fault_of,
    is_closed,
    root_checksum,
    sealed,
)

__all__ = [
    "BEGUN",
    "CARD",
    "CHIPS",
    "CLIENTS",
    "COMPACT",
    "CROISSANT",
    "DIGEST",
    "GROUPS",
    "JOB",
    "LAW",
    "LEDGER",
    "MANIFEST",
    "OBJECTS",
    "PAGES",
    "PAGE_REPORTS",
    "PARTED",
    "PROVENANCE",
    "RECIPE",
    "TO_ZARR",
    "Content",
    "ReportPlace",
    "Maker",
    "Owner",
    "Report",
    "Root",
    "at_once",
    "begin",
    "begun",
    "check_owner",
    "commit",
    "done",
    "on_pages",
    "part_path",
    "reports",
    "requests",
    "restored",
    "root_of",
    "stated",
    "tried",
    "tries",
    "turn_page",
    "unreported",
    "valid_report",
    "whole",
]

T = TypeVar("T")

JOB = "_job"
"""Folder of the job itself and of what its tasks report."""
CHIPS = "chips.parquet"
MANIFEST = "manifest.parquet"
BEGUN = f"{JOB}/begun.json"
"""Who writes the store: put before anything else."""
LEDGER = f"{JOB}/ledger.json"
"""Sums of every object but those of shards: put once they are all in place."""
CLIENTS = f"{JOB}/clients"
"""Folder of the traces that clients leave while they write."""
PAGES = f"{JOB}/pages"
"""Folder of pages: reports of shards which no task asks for any more, many in an object."""
RECIPE = f"{JOB}/recipe.toml"
"""The recipe that was run, where one was; it decides nothing of what the store holds."""
GROUPS = f"{JOB}/groups.json"
"""The groups' own metadata, put in place by the commit."""
PROVENANCE = f"{JOB}/provenance.json"
"""The steps of the plan, the records used and their terms: for people, no task reads it."""
CARD = "README.md"
"""The card of the data set, for people; written by the commit."""
CROISSANT = "croissant.json"
"""The same for tools, JSON-LD."""
LAW = f"{JOB}/law.json"
"""What all parts of a store share, for whoever appends to it: no task reads it."""
PARTED = re.compile(r"part-\d{4,}/.*|_tables/\d{4,}\.parquet")
"""What lies in a store's folder and is not of its first part: parts that were appended, and added columns."""
OBJECTS = b"rasteret_dask:objects"
"""Key of the manifest's schema metadata: the sums of every object that is in no row of it."""

DIGEST = b"rasteret_dask:digest"
"""Key of the manifest's schema metadata: the digest of what the store holds."""

TO_ZARR = "to_zarr"
COMPACT = "compact"

PAGE_REPORTS = 1024
"""Reports of a page, about: so many shards' reports lie in objects of their own, and some that are under way."""

REQUESTS = 16
"""Small objects under way at the same time."""

MOST_BYTES = 64 * 2**20
"""Bytes of made objects that wait to be put."""

STALE_S = 600.0
"""After so long without a change, an unfinished local put is given up: its process would have ended it."""

_TEMPORARY = re.compile(
    r"(.+)#\d+"
)  # obstore writes a local object beside its place, under its name and a number
_MARK = re.compile(rf"{JOB}/tried/([^/]+)/([0-9a-f]+)\.(.+)\.(\d+)\.[0-9a-f]{{32}}")
_PAGE = re.compile(rf"{PAGES}/(\d+)\.[0-9a-f]{{32}}\.json")


Maker: TypeAlias = "Callable[[], Iterator[bytes]]"
"""Makes an object's bytes, in pieces: a large one is never in memory as a whole."""


def part_path(number: int) -> str:
    """Return the folder of an appended part, below its store; they count from 1."""
    return f"part-{number:04d}"


def whole(data: bytes) -> Maker:
    """Return the maker of bytes that are there."""
    return lambda: iter((data,))


@dataclass(frozen=True, slots=True)
class Owner:
    """Who writes a store: a rerun of the same goes on, everybody else is refused."""

    digest: str
    """Of everything that decides what the store will hold."""
    compression: str
    """As JSON text."""
    writer: str = TO_ZARR
    """:data:`TO_ZARR` or :data:`COMPACT`."""


class Content(Protocol):
    """What is to be written."""

    @property
    def owner(self) -> Owner:
        """Who writes it."""

    @property
    def keys(self) -> Mapping[str, str]:
        """For each shard's name, the key that its valid report has."""

    def objects(self) -> Mapping[str, Maker]:
        """Return every object but those of shards: path -> what makes it, :data:`GROUPS` among them.

        They are made in this order, so that neighbours may share what they are made of.
        """

    def places(self) -> Mapping[str, str]:
        """Return the path of every object that shards may have -> the shard's name."""


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
        return _PAGE.fullmatch(self.path) is not None

    def attempts(self, marks: Collection[str]) -> int:
        """Return how often the shard was begun; ``marks`` are those that lie there."""
        return len({self.mark, *marks})


@dataclass(frozen=True, slots=True)
class Report:
    """What the task of a shard reports, and how the report itself is stored."""

    values: Mapping[str, Any]
    place: ReportPlace


@dataclass(frozen=True, slots=True)
class Root:
    """The root's metadata document of a finished store."""

    document: Mapping[str, Any]
    note: Mapping[str, Any]
    """What this package has put into its attributes."""


# What tasks call


def tried(url: str, shard: str, key: str) -> str:
    """Mark that a shard is begun, before any object of it is put; return the mark's path.

    The mark's name says for which key, and in which process: a later run knows the shard's objects for its own by it,
    and can tell whether the process is still there.
    """
    path = f"{JOB}/tried/{shard}/{key[:16]}.{_node()}.{os.getpid()}.{uuid.uuid4().hex}"
    remote.put(remote.join(url, path), b"")
    return path


def done(url: str, shard: str, key: str, mark: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Put the report of a shard whose objects are all in place, and return it.

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
    whole = {"shard": shard, "key": key, "mark": mark, **report}
    remote.put(remote.join(url, _report_path(shard)), sealed(whole))
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
        report = document_of(remote.get(remote.join(url, _report_path(shard))))
        if report is None or report.get("shard") != shard or report.get("key") != key:
            return None
        sizes = at_once(lambda o: remote.head(remote.join(url, o["path"])).size, report["objects"])
    except remote.MissingError:
        return None
    return report if sizes == [o["size"] for o in report["objects"]] else None


def _report_path(shard: str) -> str:
    return f"{JOB}/done/{shard}.json"


# What the client calls: begin, turn_page, reports, commit


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
    data = at_once(lambda shard: _data(url, _report_path(shard)), shards)
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
    left = [path for shard, report in there.items() for path in (_report_path(shard), report["mark"])]
    with suppress(StoreError):  # whoever may not delete leaves them: the same is said twice
        remote.delete_all(url, left)


def on_pages(url: str, others: Collection[str], keys: Mapping[str, str]) -> set[str]:
    """Return the shards of all pages but some ``others``, as far as they are of these keys."""
    folder = remote.join(url, PAGES)
    paths = [path for name in remote.listing(folder) if (path := f"{PAGES}/{name}") not in others]
    pages = (_page(_data(url, path)) for path in paths if _PAGE.fullmatch(path))
    return {shard for page in pages for shard, report in page.items() if keys.get(shard) == report["key"]}


def _report_in(text: bytes | None, shard: str, keys: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the report of a shard where this is one, of this key."""
    report = None if text is None else document_of(text)
    if report is None or (report.get("shard"), report.get("key")) != (shard, keys[shard]):
        return None
    return {name: value for name, value in report.items() if name != "checksum"}


def _page(data: bytes | None) -> Mapping[str, Mapping[str, Any]]:
    """Return shard -> its report, of a page; nothing where it is damaged."""
    document = None if data is None else document_of(data)
    return {} if document is None else document["reports"]


def begin(url: str, content: Content) -> Mapping[str, int]:
    """Take a place for a store, or know it for one's own, and put in place whatever is missing or damaged.

    Who writes it is put first: whatever stops later, a rerun knows the store.

    Returns
    -------
    mapping
        Path -> bytes of every object that lay there before.

    Raises
    ------
    StoreError
        When the store holds something else, another plan's leftovers, or the same chips in another compression.
    FormatError
        When a newer version of the package writes it.
    """
    found = remote.listing(url)
    owner, mark = content.owner, begun(url)
    if mark is None:
        _check_leftovers(url, found, content)
        data = sealed({**STORE.note, "meaning": MEANING, **_values(owner)})
        if BEGUN in found:  # damaged
            remote.put(remote.join(url, BEGUN), data)
        elif not remote.put_new(remote.join(url, BEGUN), data):  # another process begins at the same moment
            mark = begun(url)
    if mark is not None:
        check_owner(url, mark, owner)
    _in_place(url, content, found)
    return found


def begun(url: str) -> dict[str, Any] | None:
    """Return what :data:`BEGUN` says of who writes a store; None where there is none, or it is damaged."""
    try:
        mark = document_of(remote.get(remote.join(url, BEGUN)))
    except remote.MissingError:
        return None
    return mark if mark is not None and {*_values(Owner("", "")), "meaning"} <= mark.keys() else None


def check_owner(url: str, mark: Mapping[str, Any], owner: Owner) -> None:
    """Raise where a store is another one's.

    Parameters
    ----------
    url
        The store.
    mark
        What the store says of who writes, or wrote, it: format, version, meaning, writer, digest and compression.
    owner
        Who wants to write it.
    """
    subject = f"store {remote.redact(url)}"
    STORE.check(subject, mark)
    if mark["meaning"] != MEANING:
        raise StoreError(
            subject,
            f"chips as rasteret_dask {mark.get('version')} makes them (meaning {mark['meaning']})",
            f"those of this version (meaning {MEANING}), whose pixels or layout differ",
            f"Finish it with rasteret_dask {mark.get('version')}, choose another store, or delete this one.",
        )
    if mark["writer"] != owner.writer:
        raise StoreError(
            subject, f"what {mark['writer']} writes", f"what {owner.writer} writes, or an empty place",
            "Choose another store, or delete this one.",
        )  # fmt: skip
    if mark["digest"] != owner.digest:
        raise StoreError(
            subject,
            f"chips of another plan ({mark['digest'][:12]})",
            f"this plan's ({owner.digest[:12]}), or nothing",
            "Choose another store, or delete this one.",
        )
    if mark["compression"] != owner.compression:
        raise StoreError(
            subject,
            f"these chips with compression {mark['compression']}",
            f"compression {owner.compression}",
            "Give to_zarr the store's compression, choose another store, or delete this one.",
        )


def _values(owner: Owner) -> dict[str, str]:
    return {"writer": owner.writer, "digest": owner.digest, "compression": owner.compression}


def _check_leftovers(url: str, paths: Mapping[str, int], content: Content) -> None:
    """Raise StoreError unless every object was put for this very store, before what says so was deleted.

    That is: it is what would be put there now, byte for byte; or it is a report or a mark of this key; or it is an
    object of a shard that has such a mark, which is put before the shard's objects.
    """
    left = set(paths)
    if not left:
        return
    keys = content.keys
    marked = {m[1] for path in left if (m := _mark(path, keys)) is not None}
    for path in [path for path in left if _PAGE.fullmatch(path)]:
        page = _page(_data(url, path))
        if page and all(keys.get(shard) == report["key"] for shard, report in page.items()):
            marked.update(page)  # in place of their marks
            left.discard(path)
    left -= {path for path in left if _mark(path, keys) is not None}
    left -= {BEGUN}  # damaged: an empty digest is nobody's
    digest = content.owner.digest.encode()
    left -= {path for path in left & {CARD, CROISSANT} if digest in (_data(url, path) or b"")}
    left -= {RECIPE, PROVENANCE, LAW}  # the same job may be told in another text, and by other steps
    left -= {
        path for path in left if PARTED.fullmatch(path)
    }  # they are finished stores, with ledgers of their own
    left -= {
        path for path in left if path.startswith(f"{CLIENTS}/")
    }  # they renew their traces, whatever is deleted
    places = content.places()
    left -= {path for path in left if places.get(path) in marked}
    names = {_report_path(shard): shard for shard in keys}
    data = dict(zip(rest := sorted(left & names.keys()), at_once(lambda p: _data(url, p), rest), strict=True))
    for path, text in data.items():
        report = None if text is None else document_of(text)
        if names[path] in marked or (report is not None and report.get("key") == keys[names[path]]):
            left.discard(path)
    if left:
        objects = dict(content.objects())
        groups = b"".join(objects[GROUPS]())
        objects |= {path: whole(text.encode()) for path, text in json.loads(groups).items()}
        if LEDGER in left:
            made = {path: _summed(make) for path, make in content.objects().items()}
            objects[LEDGER] = whole(_ledger(made))
        left -= {
            path
            for path, make in objects.items()
            if path in left and fault_of(remote.join(url, path), _summed(make)) is None
        }
    if MANIFEST in left and _digest_of(_data(url, MANIFEST)) == content.owner.digest:
        left.discard(MANIFEST)
    if left:
        some = ", ".join(sorted(left)[:3])
        raise StoreError(
            f"store {remote.redact(url)}",
            f"{len(left)} objects of something else ({some})",
            "an empty place",
            "Choose another store; if nobody needs what lies there, delete all of it.",
        )


def _mark(path: str, keys: Mapping[str, str]) -> re.Match[str] | None:
    """Return the parts of a mark's name where it is one of these shards, in this content."""
    parts = _MARK.fullmatch(path)
    return parts if parts is not None and keys.get(parts[1], "").startswith(parts[2]) else None


def stated(url: str) -> dict[str, Sums] | None:
    """Return the sums of every object but those of shards, as :data:`LEDGER` has them; None: none, or damaged."""
    data = _data(url, LEDGER)
    document = None if data is None else document_of(data)
    if document is None:
        return None
    return {path: Sums.again(value) for path, value in document["objects"].items()}


def _in_place(url: str, content: Content, sizes: Mapping[str, int]) -> bool:
    """Put every object in place that is missing or differs; tell whether any was.

    Parts of an array job do so at the same time: what another one has put is looked at, and left as it is.
    """
    sums = stated(url)
    right = {} if sums is None else {path: one for path, one in sums.items() if sizes.get(path) == one.size}
    faults = at_once(lambda path: fault_of(remote.join(url, path), right[path]), right)
    right = {path: one for (path, one), fault in zip(right.items(), faults, strict=True) if fault is None}
    if sums is not None and len(right) == len(sums):
        return False
    made: dict[str, Sums | Future[Sums]] = {}
    under_way: deque[tuple[Future[Sums], int]] = deque()
    for path, make in content.objects().items():
        if path in right:
            made[path] = right[path]
            continue
        pieces = make()
        some = list(islice(pieces, 2))
        place = remote.join(url, path)
        if len(some) > 1:
            there = path in sizes or remote.exists(place)
            whole = _summed(make) if there else None
            same = whole is not None and fault_of(place, whole) is None
            made[path] = whole if whole is not None and same else _streamed(place, make, chain(some, pieces))
            continue
        while under_way and sum(nbytes for _, nbytes in under_way) > MOST_BYTES:
            under_way.popleft()[0].result()
        data = b"".join(some)
        made[path] = future = requests().submit(_put, place, data, path in sizes)
        under_way.append((future, len(data)))
    done = {path: one if isinstance(one, Sums) else one.result() for path, one in made.items()}
    if done != sums:
        _put(remote.join(url, LEDGER), _ledger(done), LEDGER in sizes)
    return True


def _put(url: str, data: bytes, there: bool) -> Sums:
    """Put an object, unless it is there as it should be; ``there``: something lay there before."""
    sums = Sums.of(data)
    there = there or not remote.put_new(url, data)
    if there and fault_of(url, sums) is not None:
        remote.put(url, data)
    return sums


def _streamed(url: str, make: Maker, first: Iterator[bytes]) -> Sums:
    """Put a large object as it is made; ``first`` is what is being made already."""
    sums = Summing()
    again = iter((first,))

    def pieces() -> Iterator[bytes]:
        nonlocal sums
        sums = Summing()
        for piece in next(again, None) or make():
            sums.add(piece)
            yield piece

    remote.put_stream(url, pieces)
    return sums.sums


def _summed(make: Maker) -> Sums:
    sums = Summing()
    for piece in make():
        sums.add(piece)
    return sums.sums


def _ledger(sums: Mapping[str, Sums]) -> bytes:
    return sealed({**STORE.note, "objects": {path: one.text for path, one in sums.items()}})


def _digest_of(manifest: bytes | None) -> str | None:
    """Return the digest that a manifest names; None where it is none, or damaged."""
    if manifest is None or not is_closed(manifest):
        return None
    metadata = pq.read_schema(pa.BufferReader(manifest)).metadata or {}
    return str(metadata.get(DIGEST, b""), "ascii", "replace")


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
        shard for shard in keys if _report_path(shard) in objects
    ]  # written after any page that has the shard
    for at in range(0, len(own), PAGE_REPORTS):
        some = own[at : at + PAGE_REPORTS]
        read = zip(some, at_once(lambda shard: _data(url, _report_path(shard)), some), strict=True)
        found = ((shard, data, _report_in(data, shard, keys)) for shard, data in read)
        yield valid(
            (shard, values, ReportPlace(values["mark"], _report_path(shard), len(data), crc32_of(data)))
            for shard, data, values in found
            if data is not None and values is not None
        )
    for path in sorted((path for path in objects if _PAGE.fullmatch(path)), reverse=True):
        page = _page(_data(url, path)).items()
        yield valid((s, v, ReportPlace(v["mark"], path)) for s, v in page if keys.get(s) == v["key"])


def unreported(url: str, objects: Collection[str], keys: Mapping[str, str]) -> set[str]:
    """Return the shards that have no report yet, neither of their own nor on a page: a look, not a check."""
    left = {shard for shard in keys if _report_path(shard) not in objects}
    for path in objects if left else ():
        if _PAGE.fullmatch(path):
            left.difference_update(_page(_data(url, path)))
    return left


def tries(objects: Iterable[str]) -> dict[str, list[str]]:
    """Return shard -> the marks of its tries."""
    result: dict[str, list[str]] = {}
    for path in sorted(objects):
        if path.startswith(f"{JOB}/tried/"):
            result.setdefault(path.split("/")[2], []).append(path)
    return result


def restored(url: str, content: Content | None) -> Mapping[str, int]:
    """Hold every object but those of shards against its sums, by content, before a commit; return what lies there.

    Parameters
    ----------
    url
        The store.
    content
        What is written, from which is put again what is missing or damaged. None where it is not at hand.

    Raises
    ------
    StoreError
        When objects are missing or damaged, and ``content`` is None.
    """
    found = remote.listing(url)
    if content is not None:
        if begun(url) is None:
            begin(url, content)
        elif not _in_place(url, content, found):
            return found
        del found  # there may be a million
        return remote.listing(url)
    sums = stated(url)
    wrong = [BEGUN] if begun(url) is None else []
    if sums is None:
        wrong.append(LEDGER)
    else:
        faults = at_once(lambda path: fault_of(remote.join(url, path), sums[path]), sums)
        wrong += [path for path, fault in zip(sums, faults, strict=True) if fault is not None]
    if wrong:
        raise StoreError(
            f"store {remote.redact(url)}",
            f"{len(wrong)} objects missing or damaged: {', '.join(wrong[:3])}",
            "what was put there before the shards",
            "It was changed meanwhile: call to_zarr again with the same plan, which puts them in place.",
        )
    return found


def commit(
    url: str,
    objects: Mapping[str, int],
    manifest: pa.Table,
    written: Mapping[str, ReportPlace],
    more: Mapping[str, bytes],
) -> pa.Table:
    """Write what is known when all shards are: the manifest, then the groups' metadata; the root comes last.

    Parameters
    ----------
    url
        The store.
    objects
        What :func:`restored` gave.
    manifest
        A row a shard, with the objects of each.
    written
        How the report of each shard is stored.
    more
        Objects that are known only now: path -> bytes.

    Returns
    -------
    pyarrow.Table
        The manifest, with what it vouches for.
    """
    mark, sums = begun(url) or {}, stated(url) or {}
    documents: dict[str, str] = json.loads(remote.get(remote.join(url, GROUPS)))
    root = json.loads(documents.pop("zarr.json"))
    groups = {path: text.encode() for path, text in documents.items()}
    sums |= {path: Sums.of(data) for path, data in {**more, **groups}.items()}
    pages = sorted({place.path for place in written.values() if place.on_page})
    sums |= {path: Sums.of(remote.get(remote.join(url, path))) for path in (BEGUN, LEDGER, *pages)}
    attempts = tries(objects)
    notes = [_notes(written[shard], attempts.get(shard, [])) for shard in manifest["shard"].to_pylist()]
    manifest = manifest.append_column("notes", pa.array(notes, _NOTES)).replace_schema_metadata(
        {
            OBJECTS: json.dumps({path: one.text for path, one in sorted(sums.items())}),
            DIGEST: str(mark.get("digest")),
        }
    )
    table = _parquet(manifest)
    at_once(lambda path: remote.put(remote.join(url, path), more[path]), more)
    remote.put(remote.join(url, MANIFEST), table)
    for path in sorted(groups, key=lambda p: -p.count("/")):  # deepest first
        remote.put(remote.join(url, path), groups[path])
    _sweep(url, objects, manifest, written, {*sums, MANIFEST, "zarr.json"})
    root["attributes"]["rasteret_dask"]["checksum"] = root_checksum(root)
    remote.put(remote.join(url, "zarr.json"), json.dumps(root).encode())
    return manifest


_NOTES = pa.list_(pa.struct([("path", pa.string()), ("size", pa.int64()), ("crc32", pa.int64())]))


def _notes(place: ReportPlace, marks: Iterable[str]) -> list[dict[str, Any]]:
    """Return what the manifest says of a shard's report and of the marks of its tries, which hold no bytes."""
    own = [] if place.on_page else [{"path": place.path, "size": place.size, "crc32": place.crc32}]
    return [*own, *({"path": mark, "size": 0, "crc32": 0} for mark in marks)]


def _parquet(table: pa.Table) -> bytes:
    """Return a manifest as Parquet with a checksum of its own: the root would differ from run to run with it there."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return closed(bytes(sink.getvalue()))


def root_of(url: str) -> Root:
    """Read the root's metadata document of a finished store.

    Raises
    ------
    remote.MissingError
        When there is none.
    StoreError
        When it is damaged, or a store of something else.
    FormatError
        When it was written in a format that this version does not read.
    """
    subject = f"store {remote.redact(url)}"
    try:
        document = json.loads(remote.get(remote.join(url, "zarr.json")))
    except (ValueError, RecursionError) as error:
        raise StoreError(
            subject, "a zarr.json that is no JSON", "a store that to_zarr wrote", DAMAGED
        ) from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    note = attributes.get("rasteret_dask") if isinstance(attributes, dict) else None
    if not isinstance(note, dict):
        raise StoreError(
            subject, "a Zarr store of something else", "one that to_zarr wrote", "Open it with xarray."
        )
    if "checksum" in note and note["checksum"] != root_checksum(document):  # the same rule in every format
        raise StoreError(
            subject, "a zarr.json that does not match its checksum", "the one that to_zarr wrote", DAMAGED
        )
    STORE.check(subject, note)
    if "checksum" not in note:
        raise StoreError(subject, "a zarr.json without its checksum", "the one that to_zarr wrote", DAMAGED)
    kinds = {
        "writer": str,
        "digest": str,
        "compression": str,
        "meaning": int,
        "sources": list,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(note.get(name), kind)]
    if wrong or not all(isinstance(name, str) for name in note["sources"]):
        raise StoreError(
            subject, f"a zarr.json whose {', '.join(wrong) or 'sources'} cannot be", "one that to_zarr wrote"
        )
    return Root(document, note)


DAMAGED = (
    "It was changed or damaged after it was written: copy the store again, or delete its zarr.json and call to_zarr "
    "with the same plan, which puts it in place."
)


# What stopped processes left


def _sweep(
    url: str,
    objects: Iterable[str],
    manifest: pa.Table,
    written: Mapping[str, ReportPlace],
    others: Collection[str],
) -> None:
    """Remove what tries that came to nothing left inside the store's own arrays, and beside its own objects.

    Objects: a shard that was begun, and then written without this object, as all of it is fill; pages all of whose
    shards have later reports. Temporary files of local puts that were killed (``name#1``): only beside a name that is
    the store's own, and never while the put may still be under way (see :func:`_is_given_up`).
    """
    names = _paths(manifest)  # in Arrow: there may be a million
    others = set(others)
    there = pa.array(objects, pa.string())
    unknown = there.filter(pc.invert(pc.is_in(there, value_set=names))).to_pylist()
    stale = [
        path for path in unknown if path not in others and (_is_chunk(path, others) or _PAGE.fullmatch(path))
    ]
    at_once(lambda path: remote.delete(remote.join(url, path)), stale)
    if not remote.is_local(url):
        return
    base = Path(remote.local_path(url))
    left = {
        file: parts[1]
        for file in base.rglob("*#*")
        if (parts := _TEMPORARY.fullmatch(file.relative_to(base).as_posix())) is not None
    }
    if not left:
        return
    shard_of = _shards_of(manifest, pa.array(left.values(), pa.string()))
    # after the files were seen: whose put is under way has its mark by now
    marks = tries(remote.listing(url))
    for file, place in left.items():
        shard = shard_of.get(place)
        if shard is None and place not in others and not _may_be_left(place, others):
            continue
        unfinished = None
        if shard is not None:
            unfinished = [mark for mark in marks.get(shard, []) if mark != written[shard].mark]
        if _is_given_up(file, unfinished):
            file.unlink(missing_ok=True)


def _may_be_left(place: str, others: Collection[str]) -> bool:
    """Tell whether a path that the manifest does not have is one that only this package writes."""
    return _is_chunk(place, others) or any(one.fullmatch(place) for one in (_MARK, _PAGE))


def _paths(manifest: pa.Table) -> pa.Array:
    """Return the paths of all objects that are in rows of the manifest."""
    lists = [manifest.column(name).combine_chunks().flatten().field("path") for name in ("objects", "notes")]
    return pa.concat_arrays(lists)


def _shards_of(manifest: pa.Table, paths: pa.Array) -> dict[str, str]:
    """Return path -> shard of those of some paths that are in rows of the manifest."""
    result: dict[str, str] = {}
    for name in ("objects", "notes"):
        lists = manifest.column(name).combine_chunks()
        path = lists.flatten().field("path")
        chosen = pc.is_in(path, value_set=paths)
        rows = pc.list_parent_indices(lists).filter(chosen)
        shards = manifest.column("shard").take(rows).to_pylist()
        result.update(zip(path.filter(chosen).to_pylist(), shards, strict=True))
    return result


def _is_chunk(path: str, names: Collection[str]) -> bool:
    """Tell whether a path is that of a chunk of one of the store's own arrays."""
    parts = re.fullmatch(r"(.+)/c(/\d+)+", path)
    return parts is not None and f"{parts[1]}/zarr.json" in names


def _is_given_up(file: Path, marks: Iterable[str] | None) -> bool:
    """Tell whether no put writes a temporary file any more.

    Parameters
    ----------
    file
        The file.
    marks
        Those of the shard's tries that have not finished; None: it is of no shard.
    """
    try:
        old = time.time() - file.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return True
    return old or (marks is not None and all(_is_dead(mark) for mark in marks))


def _is_dead(mark: str) -> bool:
    """Tell whether the process that put a mark is certainly gone: it ran on this machine, and does not any more."""
    parts = _MARK.fullmatch(mark)
    return parts is not None and parts[3] == _node() and not psutil.pid_exists(int(parts[4]))


def _node() -> str:
    """Return this machine's name, as part of an object's."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())


# Small objects


def at_once(function: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
    """Call a function for many small objects, several at the same time: a request waits, it does not work."""
    return list(requests().map(function, values))


def requests() -> ThreadPoolExecutor:
    """Return the threads of this process that wait for a store."""
    return _requests(os.getpid())


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    """Return the threads of one process: a fork has its own."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="rasteret-store")


def _data(url: str, path: str) -> bytes | None:
    """Return an object; None where there is none."""
    try:
        return remote.get(remote.join(url, path))
    except remote.MissingError:
        return None
