# SPDX-License-Identifier: Apache-2.0
"""Chips become a Zarr store: their shards are written by the one loop on the ledger, or by any Dask scheduler."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from rasteret_dask.net import remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.store import shardreports
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.manifest import losses, warn_of_masked
from rasteret_dask.store.runtasks import Work
from rasteret_dask.store.unitruns import LedgerJob, write_job
from rasteret_dask.store.write import (
    ChipContent,
    chip_commit,
    chip_units,
    commit,
    is_committed,
    prepare,
    write_shard,
    write_sources,
)
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, check_writable, open_job, opened
from rasteret_dask.tasks.jobparts import JobOfParts, part_job
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.shards import Shipped, lower, read_sources, renamed
from rasteret_dask.tasks.workermemory import TaskMemory
from rasteret_dask.words import OnError

__all__ = ["chip_job", "delayed_zarr", "run_zarr"]


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
    check_writable(layout.job)
    job = chip_job(layout, url, context, progress)
    return write_job(url, job, client, progress, bounds)


def chip_job(layout: Layout, url: str, context: ReadContext, progress: bool) -> LedgerJob:
    """Return the chips of a layout as what is to lie in a store; other arguments as of :func:`run_zarr`."""
    job, place, functions = layout.job, _place(layout, url, context), layout.job.all_functions
    ref, units = JobRef(remote.join(url, JOB), job.digest), chip_units(job)
    plans = tuple(part.ref.url for part in job.parts[:1]) if isinstance(job, JobOfParts) else ()
    work = _WritingParts if plans else _Writing

    def end(manifest: pa.Table) -> None:
        warn_of_masked(url, manifest)
        if progress and (lost := losses(manifest)):
            sys.stderr.write(f"{lost}\n")

    return LedgerJob(
        ChipContent(layout),
        units,
        Work(
            work(ref, context.on_error, place, functions),
            # not the job's digest: places count over all parts, and those of one part over its own shards
            f"{job.digest}-parts" if plans else job.digest,
            {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions},
            TaskMemory(job, layout.outputs, together=False),
        ),
        chip_commit(url, job, units),
        place,
        "write",
        None if plans else partial(Cuts.of, job),
        job.hrefs,
        job.signed,
        plans,
        end,
    )


def _tasks(layout: Layout, url: str, context: ReadContext) -> tuple[dict[Any, Any], dict[str, Shard]]:
    place = _place(layout, url, context)
    write = partial(write_shard, mark=place)
    ref = JobRef(remote.join(url, JOB), layout.job.digest)
    graph = lower(layout.job, context, ref, write)
    return renamed(graph, layout.job, f"-{place}", look=partial(_report, ref))


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
