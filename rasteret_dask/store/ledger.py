# SPDX-License-Identifier: Apache-2.0
"""The ledger of a store that is being written: who writes it, what is in place, and what the commit vouches for."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rasteret_dask.errors import StoreError
from rasteret_dask.formats import MEANING, STORE
from rasteret_dask.net import remote
from rasteret_dask.net.sums import (
    Summing,
    Sums,
    closed,
    document_of,
    fault_of,
    is_closed,
    root_checksum,
    sealed,
)
from rasteret_dask.store.remains import sweep
from rasteret_dask.store.shardreports import JOB, ReportPlace, is_page, mark_of, page_of, report_path, tries
from rasteret_dask.store.smallobjects import at_once, data_of, requests

__all__ = [
    "BEGUN",
    "CARD",
    "CHIPS",
    "CLIENTS",
    "COMPACT",
    "CROISSANT",
    "DIGEST",
    "GROUPS",
    "LAW",
    "LEDGER",
    "MANIFEST",
    "OBJECTS",
    "PARTED",
    "PROVENANCE",
    "RECIPE",
    "SUPERSEDES",
    "TO_ZARR",
    "Content",
    "Maker",
    "Owner",
    "Root",
    "begin",
    "begun",
    "check_owner",
    "commit",
    "part_path",
    "restored",
    "root_of",
    "stated",
    "whole",
]


CHIPS = "chips.parquet"
MANIFEST = "manifest.parquet"
BEGUN = f"{JOB}/begun.json"
"""Who writes the store: put before anything else."""
LEDGER = f"{JOB}/ledger.json"
"""Sums of every object but those of shards: put once they are all in place."""
CLIENTS = f"{JOB}/clients"
"""Folder of the traces that clients leave while they write."""
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
SUPERSEDES = "supersedes"
"""In the root of a part: whether its chips stand in place of the same chips in earlier parts."""
PARTED = re.compile(r"part-\d{4,}/.*|_tables/\d{4,}\.parquet")
"""What lies in a store's folder and is not of its first part: parts that were appended, and added columns."""
OBJECTS = b"rasteret_dask:objects"
"""Key of the manifest's schema metadata: the sums of every object that is in no row of it."""

DIGEST = b"rasteret_dask:digest"
"""Key of the manifest's schema metadata: the digest of what the store holds."""

TO_ZARR = "to_zarr"
COMPACT = "compact"


MOST_BYTES = 64 * 2**20
"""Bytes of made objects that wait to be put."""


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
class Root:
    """The root's metadata document of a finished store."""

    document: Mapping[str, Any]
    note: Mapping[str, Any]
    """What this package has put into its attributes."""


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
    marked = {m[1] for path in left if (m := mark_of(path, keys)) is not None}
    for path in [path for path in left if is_page(path)]:
        page = page_of(data_of(url, path))
        if page and all(keys.get(shard) == report["key"] for shard, report in page.items()):
            marked.update(page)  # in place of their marks
            left.discard(path)
    left -= {path for path in left if mark_of(path, keys) is not None}
    left -= {BEGUN}  # damaged: an empty digest is nobody's
    digest = content.owner.digest.encode()
    left -= {path for path in left & {CARD, CROISSANT} if digest in (data_of(url, path) or b"")}
    left -= {RECIPE, PROVENANCE, LAW}  # the same job may be told in another text, and by other steps
    left -= {
        path for path in left if PARTED.fullmatch(path)
    }  # they are finished stores, with ledgers of their own
    left -= {
        path for path in left if path.startswith(f"{CLIENTS}/")
    }  # they renew their traces, whatever is deleted
    places = content.places()
    left -= {path for path in left if places.get(path) in marked}
    names = {report_path(shard): shard for shard in keys}
    data = dict(
        zip(rest := sorted(left & names.keys()), at_once(lambda p: data_of(url, p), rest), strict=True)
    )
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
    if MANIFEST in left and _digest_of(data_of(url, MANIFEST)) == content.owner.digest:
        left.discard(MANIFEST)
    if left:
        some = ", ".join(sorted(left)[:3])
        raise StoreError(
            f"store {remote.redact(url)}",
            f"{len(left)} objects of something else ({some})",
            "an empty place",
            "Choose another store; if nobody needs what lies there, delete all of it.",
        )


def stated(url: str) -> dict[str, Sums] | None:
    """Return the sums of every object but those of shards, as :data:`LEDGER` has them; None: none, or damaged."""
    data = data_of(url, LEDGER)
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
    root_path: str = "zarr.json",
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
    root_path
        The document that makes the store visible.

    Returns
    -------
    pyarrow.Table
        The manifest, with what it vouches for.
    """
    mark, sums = begun(url) or {}, stated(url) or {}
    documents: dict[str, str] = json.loads(remote.get(remote.join(url, GROUPS)))
    root = json.loads(documents.pop(root_path))
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
    sweep(url, objects, manifest, written, {*sums, MANIFEST, root_path})
    root.get("attributes", root)["rasteret_dask"]["checksum"] = root_checksum(root)
    remote.put(remote.join(url, root_path), json.dumps(root).encode())
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
