# SPDX-License-Identifier: Apache-2.0
"""Anything that is written in units, on the ledger of a store: a rerun does what is missing, the root comes last."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa

from rasteret_dask import activity
from rasteret_dask.errors import JobError
from rasteret_dask.formats import MEANING, STORE
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.sums import root_checksum
from rasteret_dask.planning.plan import digest
from rasteret_dask.store import ledger, shardreports, smallobjects
from rasteret_dask.store.encode import Piece, crc32
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.manifest import report_row, stamp, table_of, warn_of_masked
from rasteret_dask.store.paging import Paging
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.store.stopping import terminable
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = ["Making", "WorkUnit", "UnitJob", "Visible", "is_finished", "write_units"]

_log = logging.getLogger(__name__)

Making: TypeAlias = "Generator[tuple[str, Sequence[Piece]], None, Mapping[str, Any]]"
"""Yields path and pieces of each object of a unit; returns what its report says besides.

A report may have ``dropped`` (chip -> why), and per source ``counts/<source>`` (``requests``, ``bytes_fetched``,
``tiles_read``, ``gdal_fallback``), ``masked/<source>`` (share of invalid pixels), ``clipped/<source>``,
``unreadable/<source>`` (tiles), and ``seconds`` (stage -> seconds); see :mod:`rasteret_dask.store.manifest`.
"""

PUTS = 4
"""Objects of a unit that are on their way at the same time: the next is made meanwhile."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One part of what is written: a task of its own, or a place in the run of one."""

    name: str
    """As of a shard: ``train-00003``."""
    item: Any
    """What the job's work is called with; small, as it travels with the task."""
    chips: int
    key: str
    """Digest of what it will hold."""
    split: str | None = None
    number: int = 0
    """Counts within the split."""


@dataclass(frozen=True)
class Visible:
    """The document whose put makes everything visible."""

    path: str
    """``zarr.json``, ``collection.json``."""
    document: Mapping[str, Any]
    """JSON values. A Zarr group's has ``attributes``; the package's note goes there, else to the document itself."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Further documents that are put just before it: path -> text."""


@dataclass(frozen=True)
class UnitJob:
    """What an exit writes below one folder."""

    writer: str
    """What the user calls: ``to_geotiff``."""
    digest: str
    """Of everything that decides what will lie there."""
    units: Sequence[WorkUnit]
    """In running order: neighbours follow each other."""
    work: Callable[..., Making]
    """``work(item, *roots)``; picklable."""
    root: Visible
    objects: Mapping[str, ledger.Maker] = field(default_factory=dict)
    """What is known before any unit: path -> what makes it."""
    places: Callable[[], Mapping[str, str]] = dict
    """Returns the path of every object that units may have -> the unit's name."""
    more: Callable[[pa.Table], Mapping[str, bytes]] = field(default=lambda manifest: {})
    """Returns what is known when all units are written, from the manifest: path -> bytes."""
    roots: Mapping[str, Any] = field(default_factory=dict)
    """Key -> a value that all tasks need, sent once."""
    options: str = "{}"
    """JSON text of options that a rerun must repeat, though they change no content: compression."""
    cuts: Cuts | None = None
    """Where neighbours may be cut; None: they have nothing in common."""
    memory: TaskMemory | None = None
    resource: str | None = None
    """The Dask resource that workers must declare; None: any worker."""
    hrefs: Callable[[], Iterable[str]] = tuple
    """Returns the hrefs that tasks read of hosts that want a signature."""
    signed: tuple[str, ...] = ()
    """These hosts."""

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each unit's name, the key that its valid report has."""
        return {unit.name: unit.key for unit in self.units}

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        return ledger.Owner(self.digest, self.options, self.writer)


@dataclass(frozen=True)
class _Content:
    """A job of units, as the ledger asks for what is to be written."""

    job: UnitJob

    @property
    def owner(self) -> ledger.Owner:
        return self.job.owner

    @property
    def keys(self) -> Mapping[str, str]:
        return self.job.keys

    def objects(self) -> Mapping[str, ledger.Maker]:
        root, owner = self.job.root, self.job.owner
        note = {
            **STORE.note,
            "meaning": MEANING,
            "writer": owner.writer,
            "digest": owner.digest,
            "compression": owner.compression,
        }
        document = _noted(root.document, note)
        groups = json.dumps({**root.groups, root.path: json.dumps(document)})
        return {**self.job.objects, ledger.GROUPS: ledger.whole(groups.encode())}

    def places(self) -> Mapping[str, str]:
        return self.job.places()


def _noted(document: Mapping[str, Any], note: Mapping[str, Any]) -> dict[str, Any]:
    """Return a root's document with more in the package's note."""
    if "attributes" in document:
        return {**document, "attributes": _noted(document["attributes"], note)}
    return {**document, "rasteret_dask": {**document.get("rasteret_dask", {}), **note}}


@dataclass(frozen=True)
class _UnitWork:
    """What a task does with each unit of its run."""

    url: str
    work: Callable[..., Making]

    def __call__(self, unit: tuple[str, str, int, Any], *roots: Any) -> None:
        """Write a unit, unless it is written: what is computed again, as a worker was lost, costs nothing."""
        name, key, chips, item = unit
        if shardreports.valid_report(self.url, name, key) is not None:
            return
        start = time.perf_counter()
        mark = shardreports.tried(self.url, name, key)
        shown, making = activity.current(), self.work(item, *roots)
        puts: list[Future[dict[str, Any]]] = []
        try:
            while True:
                try:
                    path, pieces = next(making)
                except StopIteration as end:
                    values = dict(end.value or {})
                    break
                if shown is not None:
                    shown.written += sum(map(len, pieces))
                if len(puts) >= PUTS:
                    puts[-PUTS].result()
                puts.append(smallobjects.requests().submit(_put, self.url, path, pieces))
                del pieces
        finally:
            wait(puts)  # nothing of this attempt is on its way when the next one begins
        report = {"chips": chips, "dropped": {}, **values, "objects": [put.result() for put in puts]}
        seconds = values.get("seconds", {})
        report |= stamp(time.perf_counter() - start, seconds)
        shardreports.done(self.url, name, key, mark, report)


def _put(url: str, path: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    remote.put(remote.join(url, path), pieces)
    return {"path": path, "size": sum(map(len, pieces)), "crc32": crc32(pieces)}


def is_finished(url: str, job: UnitJob) -> bool:
    """Tell whether a folder holds all that a job writes.

    Raises
    ------
    StoreError
        When it is finished, with other options.
    FormatError
        When a newer version of the package wrote it.
    """
    text = smallobjects.data_of(url, job.root.path)
    try:
        document = {} if text is None else json.loads(text)
        note = _note_of(document)
        if note is None or note.get("checksum") != root_checksum(document):
            return False
    except (ValueError, RecursionError, AttributeError):  # something else: begin() tells
        return False
    if note.get("digest") != job.digest:
        return False
    ledger.check_owner(url, note, job.owner)
    return True


def _note_of(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    holder = document.get("attributes", document)
    note = holder.get("rasteret_dask")
    return note if isinstance(note, dict) else None


def write_units(
    url: str, job: UnitJob, client: ClientLike = None, progress: bool = True, bounds: Bounds | None = None
) -> JobReport:
    """Write what is missing of a job, then what makes it visible.

    Parameters
    ----------
    url
        The folder.
    job
        What is to lie there.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
    progress
        Whether to show how far it is.
    bounds
        The limits of this run; None: there are none.

    Returns
    -------
    JobReport
        What this took. A part of an array job that ends while others still write tells of its own units, and that
        nothing is committed.

    Raises
    ------
    StoreError
        When something else lies there.
    JobError
        When units failed; the others are written, and a rerun does only those.
    IncompleteError
        When time was over before all were written.
    """
    clusters.check(client, f"{job.writer}(client=)")
    start = time.monotonic()
    bounds, place, content = bounds or Bounds(), remote.redact(url), _Content(job)
    part = bounds.limits.part
    if is_finished(url, job):
        bounds.heartbeat.step(len(job.units), len(job.units))
        if progress:
            sys.stderr.write(f"{place} is finished: nothing to do\n")
        return JobReport.of_manifest(place, _rows(url, job, job.units), seconds=None)
    own = list(job.units) if part is None else _of_part(job, *part)
    keys = {unit.name: unit.key for unit in own}
    found = ledger.begin(url, content)
    done = {shard: r.place for some in shardreports.reports(url, found, keys) for shard, r in some.items()}
    with terminable(), present(url, part) as presence:
        paging = Paging(presence, keys)
        there = done.keys() | paging.since(done)
        bounds.heartbeat.step(len(there), len(own))
        missing = [unit for unit in own if unit.name not in there]
        if missing:
            paging.settle([name for name, entry in done.items() if not entry.on_page], more=True)
            with clusters.using(client) as cluster:

                def sign() -> None:
                    signatures.send(cluster, job.hrefs(), job.signed)
                    signatures.send_place(cluster, url)

                chips = sum(unit.chips for unit in own)
                caller = Exit(job.writer, place, len(own), chips, progress, bounds)
                shards = _shards(url, job, missing, alone=cluster is None)
                write_shards(runner(cluster, bounds.deadline), shards, caller, sign, paging.settle)
        whole = part is None or not shardreports.unreported(url, remote.listing(url), job.keys)
        if whole:
            manifest = _commit(url, job, content)
            forget_clients(url)
        else:
            manifest = _rows(url, job, own)
    _log.info("%s %s: %s", job.writer, place, "committed" if whole else "a part is written; others are not")
    return JobReport.of_manifest(
        place,
        manifest,
        None if whole else len(job.units),
        written=len(missing),
        seconds=round(time.monotonic() - start, 3),
    )


def _of_part(job: UnitJob, number: int, count: int) -> list[WorkUnit]:
    """Return the units of one of so many parts of a job: every process cuts it at the same places."""
    places = (job.cuts or Cuts.free(len(job.units))).parts(count)[number - 1]
    return list(job.units[places.start : places.stop])


def _shards(url: str, job: UnitJob, missing: Sequence[WorkUnit], alone: bool) -> Shards:
    place = {unit.name: at for at, unit in enumerate(job.units)}
    return Shards(
        Work(_UnitWork(url, job.work), job.digest, job.roots, job.memory, job.resource),
        [unit.name for unit in missing],
        [(unit.name, unit.key, unit.chips, unit.item) for unit in missing],
        [unit.key for unit in missing],
        [place[unit.name] for unit in missing],
        Cuts.free(len(job.units)) if alone or job.cuts is None else job.cuts,
        digest(job.writer, job.digest, url)[:16],
        job.writer,
        chips=[unit.chips for unit in missing],
    )


def _reports(
    url: str, objects: Mapping[str, int], units: Sequence[WorkUnit]
) -> tuple[pa.Table, dict[str, shardreports.ReportPlace]]:
    """Return the manifest's rows of units that are written, in their order, and how their reports are stored."""
    tries, there = shardreports.tries(objects), dict[str, shardreports.Report]()
    for some in shardreports.reports(url, objects, {unit.name: unit.key for unit in units}):
        there |= some
    rows = [
        report_row(unit.name, unit.split, unit.number, report.values)
        | {"attempts": report.place.attempts(tries.get(unit.name, ())), "key": unit.key}
        for unit in units
        if (report := there.get(unit.name)) is not None
    ]
    return table_of(rows), {name: report.place for name, report in there.items()}


def _rows(url: str, job: UnitJob, units: Sequence[WorkUnit]) -> pa.Table:
    return _reports(url, remote.listing(url), units)[0]


def _commit(url: str, job: UnitJob, content: _Content) -> pa.Table:
    found = ledger.restored(url, content)
    manifest, places = _reports(url, found, job.units)
    missing = [unit.name for unit in job.units if unit.name not in places]
    if missing:
        raise JobError(
            f"{job.writer} {remote.redact(url)}",
            f"{len(missing)} parts missing: {', '.join(missing[:10])}",
            "all parts",
            f"They were deleted or damaged meanwhile: call {job.writer} again, which does only these.",
        )
    manifest = ledger.commit(url, found, manifest, places, job.more(manifest), job.root.path)
    warn_of_masked(url, manifest)
    return manifest
