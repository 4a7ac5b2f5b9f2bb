"""Runs a lowered job on Dask: submits what is missing, shows progress, commits at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.store import ledger
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.manifest import losses
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.runtasks import Work
from rasteret_dask.store.shardruns import Exit, Shards, runner, write_shards
from rasteret_dask.store.write import commit, is_committed, prepare, write_shard
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job, opened
from rasteret_dask.tasks.jobparts import JobOfParts, part_job
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.shards import Shipped, lower, read_chips, renamed
from rasteret_dask.words import OnError

__all__ = ["delayed_zarr", "run_zarr"]

_log = logging.getLogger(__name__)


def run_zarr(
    layout: Layout,
    url: str,
    context: ReadContext,
    client: ClientLike,
    progress: bool,
) -> None:
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

    Raises
    ------
    StoreError
        When the store holds something else.
    JobError
        When shards failed; the others are written, and a rerun does only those.
    """
    clusters.check(client, "to_zarr(client=)")
    if is_committed(url, layout.job.digest, layout.codec_text):
        if progress:
            sys.stderr.write(f"store {remote.redact(url)} is finished: nothing to do\n")
        return
    done = prepare(layout, url)
    place, total = remote.redact(url), sum(1 for _ in layout.job.shards())
    _log.info("to_zarr %s: prepared; %d of %d shards are written", place, len(done), total)
    with present(url):
        if len(done) < total:
            job = layout.job
            plans = [job.parts[0].ref.url] if isinstance(job, JobOfParts) else []
            with clusters.using(client) as cluster:
                shards = _shards(layout, url, context, done, alone=cluster is None)

                def sign() -> None:
                    signatures.send(cluster, layout.job.hrefs(), layout.job.signed)
                    signatures.send_place(cluster, url, *plans)

                write_shards(runner(cluster), shards, Exit("to_zarr", place, total, progress), sign)
        lost = losses(commit(url, layout.job, layout))
        forget_clients(url)
    _log.info("to_zarr %s: committed", place)
    if progress and lost:
        sys.stderr.write(f"{lost}\n")


def _tasks(layout: Layout, url: str, context: ReadContext) -> tuple[dict[Any, Any], dict[str, Shard]]:
    place = _place(layout, url, context)
    write = functools.partial(write_shard, mark=place)
    ref = JobRef(remote.join(url, JOB), layout.job.digest)
    graph = lower(layout.job, context, ref, write)
    return renamed(graph, layout.job, f"-{place}", look=functools.partial(_report, ref))


def _report(ref: JobRef, shard: str) -> dict[str, Any] | None:
    """Return the report of a shard that is written; None, at the price of one small request, where it is not."""
    return ledger.valid_report(ref.url.removesuffix(f"/{JOB}"), shard, ref.digest)


def _place(layout: Layout, url: str, context: ReadContext) -> str:
    """Digest where a task writes, and how: its name says that beside shard and content."""
    return hashlib.sha256(f"zarr {url} {layout.codec_text} {context.on_error}".encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Writing:
    """What a task does with each shard of its run."""

    ref: JobRef
    on_error: OnError
    mark: str
    """Tells stores apart, as :func:`write_shard` wants it."""
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
        chips = read_chips(job, shard, ReadContext(calls, self.on_error), warns=False)
        write_shard(job, block, self.ref.url, chips, self.mark)


@dataclass(frozen=True)
class _WritingParts(_Writing):
    """The same with shards of a job that is read part by part; ``ref`` says only what the whole is known by."""

    def __call__(self, block: Any, *shipped: Shipped) -> None:
        part, number = block
        self._write(part_job(part, self.ref.digest), number, shipped)


def _part_shards(
    job: JobOfParts, layout: Layout, url: str, context: ReadContext, done: Collection[str]
) -> Shards:
    """Return the shards that are not written, part by part."""
    place, ref = _place(layout, url, context), JobRef(remote.join(url, JOB), job.digest)
    every = [(part.ref, shard) for part in job.parts for shard in part.shards]
    todo = [(at, part, shard) for at, (part, shard) in enumerate(every) if shard.name not in done]
    functions = job.all_functions
    roots = {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions}
    return Shards(
        # not the job's digest: places count over all parts, and those of one part over its own shards
        Work(_WritingParts(ref, context.on_error, place, functions), f"{job.digest}-parts", roots),
        [shard.name for _, _, shard in todo],
        [(part, (shard.hierarchy, shard.number)) for _, part, shard in todo],
        [job.keys[shard.name] for _, _, shard in todo],
        [at for at, _, _ in todo],
        Cuts.free(len(every)),
        place,
    )


def _shards(layout: Layout, url: str, context: ReadContext, done: Collection[str], *, alone: bool) -> Shards:
    """Return the shards that are not written; one process alone need not know what two of them have in common."""
    if isinstance(layout.job, JobOfParts):
        return _part_shards(layout.job, layout, url, context, done)
    job, place = layout.job, _place(layout, url, context)
    order = sorted(
        (shard for shard in job.shards() if shard.name not in done), key=lambda s: int(job.running[s.start])
    )
    functions = job.all_functions
    ref = JobRef(remote.join(url, JOB), job.digest)
    roots = {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions}
    return Shards(
        Work(_Writing(ref, context.on_error, place, functions), job.digest, roots),
        [shard.name for shard in order],
        [(shard.hierarchy, shard.number) for shard in order],
        [job.keys[shard.name] for shard in order],
        [int(job.running[shard.start]) for shard in order],
        Cuts.free(int(job.running.max(initial=-1)) + 1) if alone else Cuts.of(job),
        place,
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
