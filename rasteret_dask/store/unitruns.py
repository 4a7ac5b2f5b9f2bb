# SPDX-License-Identifier: Apache-2.0
"""Anything that is written in units, on the ledger of a store: a rerun does what is missing, the root comes last."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import pyarrow as pa

from rasteret_dask import activity
from rasteret_dask.errors import ReadError, StoreError
from rasteret_dask.formats import MEANING, STORE
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.plan import digest
from rasteret_dask.store import ledger, shardreports, smallobjects
from rasteret_dask.store.encode import Piece, crc32
from rasteret_dask.store.jobreport import JobReport, manifest_of_parts, slow_shards
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.manifest import stamp, warn_of_masked
from rasteret_dask.store.paging import Paging
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.store.stopping import terminable
from rasteret_dask.store.workunits import Commit, WorkUnit, begin, is_finished
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = ["LedgerJob", "Making", "UnitJob", "UnitWork", "Visible", "WorkUnit", "write_job", "write_units"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LedgerJob:
    """What is to lie at a place, in units: chips as Zarr shards, copies of shards, blocks of a map, files."""

    content: ledger.Content
    units: Sequence[WorkUnit]
    """In running order: neighbours follow each other."""
    work: Work
    """What a task does with each: it writes the unit's objects, then its report."""
    commit: Commit
    tail: str
    """What the keys of the tasks end in: where, and how, they write."""
    verb: str
    """What the keys begin with."""
    cuts: Callable[[], Cuts] | None = None
    """Returns where neighbours may be cut; None: they have nothing in common."""
    hrefs: Callable[[], Iterable[str]] = tuple
    """Returns the hrefs that tasks read of hosts that want a signature."""
    signed: tuple[str, ...] = ()
    """These hosts."""
    stores: tuple[str, ...] = ()
    """Stores and plans that tasks read."""
    end: Callable[[pa.Table], None] = field(default=lambda manifest: None)
    """Called with the manifest once everything is visible: it warns."""

    def part(self, number: int, count: int) -> Sequence[WorkUnit]:
        """Return the units of one of so many parts, neighbours: every process that has the job cuts it alike.

        Parameters
        ----------
        number
            Of the part, from 1.
        count
            How many parts there are.
        """
        places = self._cuts(alone=False).parts(count)[number - 1]
        return self.units[places.start : places.stop]

    def shards(self, missing: Sequence[WorkUnit], *, alone: bool) -> Shards:
        """Return units as they are to be written; one process alone need not know what two of them have in common."""
        place = {unit.name: at for at, unit in enumerate(self.units)}
        return Shards(
            self.work,
            [unit.name for unit in missing],
            [unit.item for unit in missing],
            [unit.content for unit in missing],
            [place[unit.name] for unit in missing],
            self._cuts(alone=alone),
            self.tail,
            self.verb,
            chips=[unit.chips for unit in missing],
        )

    def _cuts(self, *, alone: bool) -> Cuts:
        return Cuts.free(len(self.units)) if alone or self.cuts is None else self.cuts()


def write_job(
    url: str, job: LedgerJob, client: ClientLike, progress: bool, bounds: Bounds | None = None
) -> JobReport:
    """Write what is missing of a job, then what makes it visible.

    Parameters
    ----------
    url
        The store, or folder.
    job
        What is to lie there.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this
        process, as many as cores and memory allow.
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
    writer = job.commit.writer
    clusters.check(client, f"{writer}(client=)")
    start = time.monotonic()
    bounds, place = bounds or Bounds(), remote.redact(url)
    part = bounds.limits.part
    if is_finished(url, job.content.owner, job.commit.root):
        bounds.heartbeat.step(len(job.units), len(job.units))
        with suppress(ReadError, StoreError):  # traces of clients that were killed right behind its commit
            forget_clients(url)
        if progress:
            sys.stderr.write(f"store {place} is finished: nothing to do\n")
        return JobReport.of_manifest(place, manifest_of_parts(url))
    own = job.units if part is None else job.part(*part)
    keys = {unit.name: unit.key for unit in own}
    done = begin(url, job.content, keys)
    _log.info("%s %s: prepared; %d of %d shards are written", writer, place, len(done), len(own))
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
                    signatures.send_place(cluster, url, *job.stores)

                shards = job.shards(missing, alone=cluster is None)
                caller = Exit(writer, place, len(own), sum(unit.chips for unit in own), progress, bounds)
                write_shards(runner(cluster, bounds.deadline), shards, caller, sign, paging.settle)
        whole = part is None or job.commit.is_due(url)
        if whole:
            _log.info("%s %s: %d shards written; committing", writer, place, len(job.units))
            manifest = job.commit.put(url, job.content)
            forget_clients(url)
        else:
            manifest = job.commit.rows(url, keys)
    _log.info(
        "%s %s: %s",
        writer,
        place,
        "committed" if whole else f"{bounds.limits.name} is written; others are not",
    )
    if slow := slow_shards(manifest):
        _log.info("%s %s: %s", writer, place, slow)
    if whole:
        job.end(manifest)
    return JobReport.of_manifest(
        place,
        manifest,
        None if whole else len(job.units),
        written=len(missing),
        seconds=round(time.monotonic() - start, 3),
    )


Making: TypeAlias = "Generator[tuple[str, Sequence[Piece]], None, Mapping[str, Any]]"
"""Yields path and pieces of each object of a unit; returns what its report says besides.

A report may have ``dropped`` (chip -> why), and per source ``counts/<source>`` (``requests``, ``bytes_fetched``,
``tiles_read``, ``gdal_fallback``), ``masked/<source>`` (share of invalid pixels), ``clipped/<source>``,
``unreadable/<source>`` (tiles), and ``seconds`` (stage -> seconds); see :mod:`rasteret_dask.store.manifest`.
"""

PUTS = 4
"""Objects of a unit that are on their way at the same time: the next is made meanwhile."""


@dataclass(frozen=True)
class UnitWork:
    """What a task does with each unit of its run, where the unit is a generator of objects."""

    url: str
    work: Callable[..., Making]

    def __call__(self, unit: WorkUnit, *roots: Any) -> None:
        """Write a unit, unless it is written: what is computed again, as a worker was lost, costs nothing."""
        name, key = unit.name, unit.key
        if shardreports.valid_report(self.url, name, key) is not None:
            return
        start = time.perf_counter()
        mark = shardreports.tried(self.url, name, key)
        shown, making = activity.current(), self.work(unit.item, *roots)
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
        report = {"chips": unit.chips, "dropped": {}, **values, "objects": [put.result() for put in puts]}
        seconds = values.get("seconds", {})
        report |= stamp(time.perf_counter() - start, seconds)
        shardreports.done(self.url, name, key, mark, report)


def _put(url: str, path: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    remote.put(remote.join(url, path), pieces)
    return {"path": path, "size": sum(map(len, pieces)), "crc32": crc32(pieces)}


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
    cuts: Callable[[], Cuts] | None = None
    """Returns where neighbours may be cut; None: they have nothing in common."""
    memory: TaskMemory | None = None
    resource: str | None = None
    """The Dask resource that workers must declare; None: any worker."""
    hrefs: Callable[[], Iterable[str]] = tuple
    """Returns the hrefs that tasks read of hosts that want a signature."""
    signed: tuple[str, ...] = ()
    """These hosts."""
    stores: tuple[str, ...] = ()
    """Stores that tasks read."""

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each unit's name, the key that its valid report has."""
        return {unit.name: unit.key for unit in self.units}

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        return ledger.Owner(self.digest, self.options, self.writer)

    def below(self, url: str) -> LedgerJob:
        """Return it as what is to lie below a folder."""
        return LedgerJob(
            _Content(self),
            [replace(unit, item=unit) for unit in self.units],
            Work(UnitWork(url, self.work), self.digest, self.roots, self.memory, self.resource),
            Commit(self.writer, self.units, self.more, root=self.root.path),
            digest(self.writer, self.digest, url)[:16],
            self.writer,
            self.cuts,
            self.hrefs,
            self.signed,
            self.stores,
            partial(warn_of_masked, url),
        )


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


def write_units(
    url: str, job: UnitJob, client: ClientLike = None, progress: bool = True, bounds: Bounds | None = None
) -> JobReport:
    """Write what an exit writes below a folder; see :func:`write_job`."""
    return write_job(url, job.below(url), client, progress, bounds)
