"""Runs a lowered job on Dask: submits what is missing, shows progress, commits at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, as_completed
from distributed.scheduler import KilledWorker
from distributed.system import MEMORY_LIMIT

from rasteret_dask.errors import JobError, RasteretDaskError, UnwritableStoreError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.awaiting import out_of_pool, why_cancelled
from rasteret_dask.net.clusters import ClientLike, address_of
from rasteret_dask.net.watch import watched
from rasteret_dask.progress import Progress
from rasteret_dask.store import ledger
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.manifest import losses
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.write import commit, is_committed, prepare, write_shard
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import SHARD_BYTES
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job
from rasteret_dask.tasks.shards import lower, renamed

__all__ = ["delayed_zarr", "run_zarr"]

_log = logging.getLogger(__name__)

MAX_LISTED = 10
AGAIN = "-again"
"""What the name of a shard's second task ends in."""
PROCESS_BYTES = 600e6
"""A worker's memory beside its shards: each thread takes three times a shard on top."""


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
        A Dask client or cluster, or a scheduler's address; None: the current client, else a cluster of this machine's
        size.
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
            with clusters.using(client) as found, _or_local(found) as running:
                _submit(running, graph, wanted, progress, layout.job, url)
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


def _submit(
    client: Client, graph: dict[Any, Any], wanted: Mapping[str, Shard], progress: bool, job: Job, url: str
) -> None:
    """Wait for the tasks of all shards; what is written needs no future any more, as its report is in the store."""
    scheduler = address_of(client)
    roots = {key: task for key, task in graph.items() if key not in wanted}
    shards = dict(wanted)
    names = {key: shard.name for key, shard in wanted.items()}
    futures: dict[str, Future[Any]] = {}
    failed: dict[str, BaseException] = {}
    total = sum(1 for _ in job.shards())
    done = total - len(wanted)

    def send(tasks: dict[Any, Any], keys: Sequence[str]) -> list[Future[Any]]:
        sent: list[Future[Any]] = client.get(tasks, list(keys), sync=False)
        futures.update((str(future.key), future) for future in sent)
        return sent

    try:
        with (
            Progress("shards", progress, total) as shown,
            watched(client, graph, names, f"to_zarr {remote.redact(url)}", shown),
            out_of_pool(),
        ):
            shown.step(done)
            signatures.send(client, job.hrefs(), job.signed)
            signatures.send_place(client, url)
            waiting = as_completed(send(graph, sorted(wanted)), loop=client.loop)
            _log.info("to_zarr %s: %d shards submitted", remote.redact(url), len(wanted))
            for future in waiting:
                shard = shards[future.key]
                if future.status == "cancelled":
                    raise JobError(
                        f"store {remote.redact(url)}",
                        f"{why_cancelled(future, scheduler)}; {done} of {total} shards are written",
                        "a scheduler that stays, with its tasks, until the end",
                        "Call to_zarr again once there is a scheduler: it does the rest.",
                    )
                if future.status == "error":
                    error = future.exception()
                    if isinstance(error, UnwritableStoreError):  # the others would end so too
                        raise _unwritable(url, error, done, total)
                    if _may_pass(error) and not future.key.endswith(AGAIN):
                        # not by Dask's retries, which cannot tell errors apart; the new key runs behind the others
                        key = f"{future.key}{AGAIN}"
                        shards[key], names[key] = shard, shard.name
                        waiting.update(send({**roots, key: graph[future.key].substitute({}, key=key)}, [key]))
                    else:
                        failed[shard.name] = error
                else:  # finished; or lost since, with a worker that held the result
                    done += 1
                futures.pop(future.key).release()
                shown.step(done + len(failed) - shown.done, f", {len(failed)} failed" if failed else "")
    finally:
        # A traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever.
        for future in futures.values():
            future.release()
    if failed:
        lines = [f"{name}: {error}" for name, error in sorted(failed.items())[:MAX_LISTED]]
        more = f"\nand {len(failed) - MAX_LISTED} more" if len(failed) > MAX_LISTED else ""
        raise JobError(
            f"store {remote.redact(url)}",
            f"{len(failed)} of {total} shards failed:\n" + "\n".join(lines) + more + "\n",
            "every shard written",
            "The others are written and the store is not committed: mend the cause and call to_zarr again.",
        ) from next((e for e in failed.values() if isinstance(e, RasteretDaskError)), None)


def _may_pass(error: BaseException) -> bool:
    """Tell whether a shard is to be tried once more; that a shard kills its workers, Dask has tried several times."""
    return not isinstance(error, KilledWorker)


def _unwritable(url: str, error: UnwritableStoreError, done: int, total: int) -> JobError:
    failure = JobError(
        f"store {remote.redact(url)}",
        f"that it takes no more, {done} of {total} shards being written:\n{error.subject}: {error.found}\n",
        error.expected,
        f"No further shard was tried. {error.remedy}",
    )
    failure.__cause__ = error
    return failure


@contextmanager
def _or_local(client: Client | None) -> Iterator[Client]:
    """Use a client; where there is none, one of a cluster of this machine's size."""
    if client is not None:
        yield client
        return
    with _local_cluster() as cluster, Client(cluster, set_as_default=False) as own:
        yield own


def _local_cluster() -> LocalCluster:
    """One process: decoding, warping and compressing leave Python's lock alone, and scripts need no main guard.

    A thread a core, but no more than the machine has memory for.
    """
    fit = int((MEMORY_LIMIT - PROCESS_BYTES) // (3 * SHARD_BYTES))
    return LocalCluster(
        n_workers=1,
        threads_per_worker=max(1, min(CPU_COUNT, fit)),
        processes=False,
        dashboard_address=":0",
        silence_logs=40,
    )


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
