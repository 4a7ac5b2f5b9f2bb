"""Runs a lowered job on Dask: submits what is missing, shows progress, commits at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from rasteret_dask.errors import JobError, RasteretDaskError, UnwritableStoreError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.progress import Progress
from rasteret_dask.store import ledger
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.manifest import losses
from rasteret_dask.store.onthreads import ThreadTasks, threads_that_fit
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.write import commit, is_committed, prepare, write_shard
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job
from rasteret_dask.tasks.shards import lower, renamed

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["delayed_zarr", "run_zarr"]

_log = logging.getLogger(__name__)

MAX_LISTED = 10
AGAIN = "-again"
"""What the name of a shard's second task ends in."""


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
    tasks, shards = _tasks(layout, url, context)
    wanted = {key: shard for key, shard in shards.items() if shard.name not in done}
    place = remote.redact(url)
    _log.info("to_zarr %s: prepared; %d of %d shards are written", place, len(done), len(shards))
    with present(url):
        if wanted:
            graph = {k: t for k, t in tasks.items() if k not in shards or k in wanted}
            with clusters.using(client) as cluster:
                _submit(_runner(cluster), graph, wanted, progress, layout.job, url)
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


class _Runner(Protocol):
    """Who computes tasks: :class:`ClusterTasks` or :class:`ThreadTasks`."""

    def watched(
        self, graph: Mapping[Hashable, Any], names: Mapping[str, str], subject: str, progress: Progress
    ) -> AbstractContextManager[None]: ...

    def sign(self, job: Job, url: str) -> None: ...

    def send(self, tasks: Mapping[Hashable, Any], keys: Sequence[str]) -> None: ...

    def ended(self) -> Iterator[tuple[str, BaseException | None]]: ...

    def may_pass(self, error: BaseException) -> bool: ...


def _runner(client: Client | None) -> _Runner:
    """Return the cluster of a client, or where there is none threads of this process: scripts need no main guard."""
    if client is None:
        return ThreadTasks(threads_that_fit())
    from rasteret_dask.store.oncluster import ClusterTasks  # it imports distributed

    return ClusterTasks(client)


def _submit(
    running: _Runner, graph: dict[Any, Any], wanted: Mapping[str, Shard], progress: bool, job: Job, url: str
) -> None:
    """Wait for the tasks of all shards; what is written needs no result any more, as its report is in the store."""
    roots = {key: task for key, task in graph.items() if key not in wanted}
    shards = dict(wanted)
    names = {key: shard.name for key, shard in wanted.items()}
    failed: dict[str, BaseException] = {}
    total = sum(1 for _ in job.shards())
    done = total - len(wanted)
    with (
        Progress("shards", progress, total) as shown,
        running.watched(graph, names, f"to_zarr {remote.redact(url)}", shown),
    ):
        shown.step(done)
        running.sign(job, url)
        # neighbours one after another: keys alone would run split by split, each over all of the ground
        running.send(graph, sorted(wanted, key=lambda key: int(job.running[shards[key].start])))
        _log.info("to_zarr %s: %d shards submitted", remote.redact(url), len(wanted))
        for key, error in running.ended():
            shard = shards[key]
            if isinstance(error, CancelledError):
                raise JobError(
                    f"store {remote.redact(url)}",
                    f"{error}; {done} of {total} shards are written",
                    "a scheduler that stays, with its tasks, until the end",
                    "Call to_zarr again once there is a scheduler: it does the rest.",
                )
            if isinstance(error, UnwritableStoreError):  # the others would end so too
                raise _unwritable(url, error, done, total)
            if error is None:
                done += 1
            elif running.may_pass(error) and not key.endswith(AGAIN):
                # not by Dask's retries, which cannot tell errors apart; the new key runs behind the others
                again = f"{key}{AGAIN}"
                shards[again], names[again] = shard, shard.name
                running.send({**roots, again: graph[key].substitute({}, key=again)}, [again])
            else:
                failed[shard.name] = error
            shown.step(done + len(failed) - shown.done, f", {len(failed)} failed" if failed else "")
    if failed:
        lines = [f"{name}: {error}" for name, error in sorted(failed.items())[:MAX_LISTED]]
        more = f"\nand {len(failed) - MAX_LISTED} more" if len(failed) > MAX_LISTED else ""
        raise JobError(
            f"store {remote.redact(url)}",
            f"{len(failed)} of {total} shards failed:\n" + "\n".join(lines) + more + "\n",
            "every shard written",
            "The others are written and the store is not committed: mend the cause and call to_zarr again.",
        ) from next((e for e in failed.values() if isinstance(e, RasteretDaskError)), None)


def _unwritable(url: str, error: UnwritableStoreError, done: int, total: int) -> JobError:
    failure = JobError(
        f"store {remote.redact(url)}",
        f"that it takes no more, {done} of {total} shards being written:\n{error.subject}: {error.found}\n",
        error.expected,
        f"No further shard was tried. {error.remedy}",
    )
    failure.__cause__ = error
    return failure


def delayed_zarr(layout: Layout, url: str, context: ReadContext) -> Delayed:
    """Return the whole job as one lazy object: ``.compute()`` on any scheduler writes and commits the store."""
    signatures.send_to_current(layout.job.hrefs(), layout.job.signed)
    done = prepare(layout, url)
    tasks, shards = _tasks(layout, url, context)
    wanted = [key for key, shard in shards.items() if shard.name not in done]
    roots = {k: t for k, t in tasks.items() if k not in shards} if wanted else {}
    digest = layout.job.digest
    name = f"commit-{digest[:12]}-{_place(layout, url, context)}"
    task = Task(name, _commit, url, digest, layout.codec_text, *(TaskRef(k) for k in wanted))
    return Delayed(
        name, HighLevelGraph.from_collections(name, {**roots, **{k: tasks[k] for k in wanted}, name: task})
    )


def _commit(url: str, digest: str, compression: str, *_reports: Any) -> str:
    if not is_committed(url, digest, compression):
        commit(url, open_job(remote.join(url, JOB), digest))
    return url
