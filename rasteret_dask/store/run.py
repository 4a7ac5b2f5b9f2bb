# SPDX-License-Identifier: Apache-2.0
"""Runs a lowered job on Dask: submits what is missing, shows progress, commits at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from rasteret_dask.errors import ReadError, StoreError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.store import shardreports
from rasteret_dask.store.jobreport import JobReport, job_report, slow_shards
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.manifest import losses
from rasteret_dask.store.paging import Paging
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.store.stopping import terminable
from rasteret_dask.store.write import (
    commit,
    is_committed,
    is_whole,
    prepare,
    write_shard,
    write_sources,
    written_rows,
)
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job, opened
from rasteret_dask.tasks.jobparts import JobOfParts, part_job
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.shards import Shipped, lower, read_sources, renamed
from rasteret_dask.tasks.workermemory import TaskMemory
from rasteret_dask.words import OnError

__all__ = ["delayed_zarr", "run_zarr"]

_log = logging.getLogger(__name__)


def run_zarr(
    layout: Layout,
    url: str,
    context: ReadContext,
    client: ClientLike,
    progress: bool,
    bounds: Bounds | None = None,
) -> JobReport:
    """Write a job's chips to a store; a rerun does what is missing.

    Parameters
    ----------
    layout
        The job and its layout.
    url
        The store.
    context
        What its shards are read with.
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
        What this took, and what became of the chips. A part of an array job that ends while others still write tells
        of its own shards, and that the store is not committed.

    Raises
    ------
    StoreError
        When the store holds something else.
    JobError
        When shards failed; the others are written, and a rerun does only those.
    IncompleteError
        When time was over before all shards were written.
    """
    clusters.check(client, "to_zarr(client=)")
    start = time.monotonic()
    bounds, job, place = bounds or Bounds(), layout.job, remote.redact(url)
    part = bounds.limits.part
    if is_committed(url, job.digest, layout.codec_text):
        bounds.heartbeat.step(job.shard_count, job.shard_count)
        with suppress(ReadError, StoreError):  # traces of clients that were killed right behind its commit
            forget_clients(url)
        if progress:
            sys.stderr.write(f"store {place} is finished: nothing to do\n")
        return job_report(url)
    names = [shard.name for shard in job.shards()] if part is None else part_of(job, *part)
    done = prepare(layout, url, names)
    _log.info("to_zarr %s: prepared; %d of %d shards are written", place, len(done), len(names))
    with terminable(), present(url, part) as presence:
        paging = Paging(presence, dict.fromkeys(names, job.digest))
        there = done.keys() | paging.since(done)
        bounds.heartbeat.step(len(there), len(names))
        if len(there) < len(names):
            paging.settle([shard for shard, place in done.items() if not place.on_page], more=True)
            plans = [job.parts[0].ref.url] if isinstance(job, JobOfParts) else []
            with clusters.using(client) as cluster:
                missing = set(names) - there
                shards = _shards(layout, url, context, missing, alone=cluster is None)

                def sign() -> None:
                    signatures.send(cluster, job.hrefs(), job.signed)
                    signatures.send_place(cluster, url, *plans)

                own = set(names)
                chips = sum(shard.stop - shard.start for shard in job.shards() if shard.name in own)
                caller = Exit("to_zarr", place, len(names), chips, progress, bounds)
                write_shards(runner(cluster, bounds.deadline), shards, caller, sign, paging.settle)
        whole = part is None or is_whole(url, job)
        manifest = commit(url, job, layout) if whole else written_rows(url, job, names)
        if whole:
            forget_clients(url)
    _log.info(
        "to_zarr %s: %s", place, "committed" if whole else f"{bounds.limits.name} is written; others are not"
    )
    if slow := slow_shards(manifest):
        _log.info("to_zarr %s: %s", place, slow)
    if progress and whole and (lost := losses(manifest)):
        sys.stderr.write(f"{lost}\n")
    return JobReport.of_manifest(
        place,
        manifest,
        None if whole else job.shard_count,
        written=len(names) - len(there),
        seconds=round(time.monotonic() - start, 3),
    )


def part_of(job: Job, number: int, count: int) -> list[str]:
    """Return the shards of one of so many parts of a job: neighbours, cut where little is fetched twice.

    Every process that has the same job cuts it at the same places, whatever is written by then.

    Parameters
    ----------
    job
        The whole job.
    number
        Of the part, from 1.
    count
        How many parts there are.
    """
    if isinstance(job, JobOfParts):
        order = [shard.name for part in job.parts for shard in part.shards]
        cuts = Cuts.free(len(order))
    else:
        order = [s.name for s in sorted(job.shards(), key=lambda s: int(job.running[s.start]))]
        cuts = Cuts.of(job)
    places = cuts.parts(count)[number - 1]
    return order[places.start : places.stop]


def _tasks(layout: Layout, url: str, context: ReadContext) -> tuple[dict[Any, Any], dict[str, Shard]]:
    place = _place(layout, url, context)
    write = functools.partial(write_shard, mark=place)
    ref = JobRef(remote.join(url, JOB), layout.job.digest)
    graph = lower(layout.job, context, ref, write)
    return renamed(graph, layout.job, f"-{place}", look=functools.partial(_report, ref))


def _report(ref: JobRef, shard: str) -> dict[str, Any] | None:
    """Return the report of a shard that is written; None, at the price of one small request, where it is not."""
    return shardreports.valid_report(ref.url.removesuffix(f"/{JOB}"), shard, ref.digest)


def _place(layout: Layout, url: str, context: ReadContext) -> str:
    """Digest where a task writes, and how: its name says that beside shard and content."""
    return hashlib.sha256(f"zarr {url} {layout.codec_text} {context.on_error}".encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Writing:
    """What a task does with each shard of its run."""

    ref: JobRef
    on_error: OnError
    mark: str
    """Tells stores apart, as :func:`write_sources` wants it."""
    functions: tuple[Function, ...]
    """The user's, whose code comes as roots."""

    def __call__(self, block: tuple[int, int], *shipped: Shipped) -> None:
        """Write a shard, unless it is written: what is computed again, as a worker was lost, costs no pixels."""
        self._write(opened(self.ref), block, shipped)

    def _write(self, job: Job, block: tuple[int, int], shipped: Sequence[Shipped]) -> None:
        shard = job.shard(*block)
        if _report(self.ref, shard.name) is not None:
            return
        calls = {function: one.call for function, one in zip(self.functions, shipped, strict=True)}
        # its manifest lists what is unreadable
        sources = read_sources(job, shard, ReadContext(calls, self.on_error), warns=False)
        write_sources(job, block, self.ref.url, sources, self.mark)


@dataclass(frozen=True)
class _WritingParts(_Writing):
    """The same with shards of a job that is read part by part; ``ref`` says only what the whole is known by."""

    def __call__(self, block: Any, *shipped: Shipped) -> None:
        part, number = block
        self._write(part_job(part, self.ref.digest), number, shipped)


def _part_shards(
    job: JobOfParts, layout: Layout, url: str, context: ReadContext, missing: Collection[str]
) -> Shards:
    """Return the shards that are not written, part by part."""
    place, ref = _place(layout, url, context), JobRef(remote.join(url, JOB), job.digest)
    every = [(part.ref, shard) for part in job.parts for shard in part.shards]
    todo = [(at, part, shard) for at, (part, shard) in enumerate(every) if shard.name in missing]
    functions = job.all_functions
    memory = TaskMemory(job, layout.outputs, together=False)
    roots = {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions}
    return Shards(
        # not the job's digest: places count over all parts, and those of one part over its own shards
        Work(_WritingParts(ref, context.on_error, place, functions), f"{job.digest}-parts", roots, memory),
        [shard.name for _, _, shard in todo],
        [(part, (shard.hierarchy, shard.number)) for _, part, shard in todo],
        [job.keys[shard.name] for _, _, shard in todo],
        [at for at, _, _ in todo],
        Cuts.free(len(every)),
        place,
        chips=[shard.stop - shard.start for _, _, shard in todo],
    )


def _shards(
    layout: Layout, url: str, context: ReadContext, missing: Collection[str], *, alone: bool
) -> Shards:
    """Return the shards that are to be written; one process alone need not know what two of them have in common."""
    if isinstance(layout.job, JobOfParts):
        return _part_shards(layout.job, layout, url, context, missing)
    job, place = layout.job, _place(layout, url, context)
    order = sorted(
        (shard for shard in job.shards() if shard.name in missing), key=lambda s: int(job.running[s.start])
    )
    functions, memory = job.all_functions, TaskMemory(job, layout.outputs, together=False)
    ref = JobRef(remote.join(url, JOB), job.digest)
    roots = {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions}
    return Shards(
        Work(_Writing(ref, context.on_error, place, functions), job.digest, roots, memory),
        [shard.name for shard in order],
        [(shard.hierarchy, shard.number) for shard in order],
        [job.keys[shard.name] for shard in order],
        [int(job.running[shard.start]) for shard in order],
        Cuts.free(int(job.running.max(initial=-1)) + 1) if alone else Cuts.of(job),
        place,
        chips=[shard.stop - shard.start for shard in order],
    )


def delayed_zarr(layout: Layout, url: str, context: ReadContext) -> Delayed:
    """Return the whole job as one lazy object: ``.compute()`` on any scheduler writes and commits the store."""
    signatures.send_to_current(layout.job.hrefs(), layout.job.signed)
    done = prepare(layout, url)
    tasks, shards = _tasks(layout, url, context)
    wanted = [key for key, shard in shards.items() if shard.name not in done]
    roots = {k: t for k, t in tasks.items() if k not in shards} if wanted else {}
    content = layout.job.digest
    name = f"commit-{content[:12]}-{_place(layout, url, context)}"
    task = Task(name, _commit, url, content, layout.codec_text, *(TaskRef(k) for k in wanted))
    return Delayed(
        name, HighLevelGraph.from_collections(name, {**roots, **{k: tasks[k] for k in wanted}, name: task})
    )


def _commit(url: str, content: str, compression: str, *_reports: Any) -> str:
    if not is_committed(url, content, compression):
        commit(url, open_job(remote.join(url, JOB), content))
    return url
