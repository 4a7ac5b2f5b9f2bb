"""Runs a lowered job on Dask: submits what is missing, shows progress, commits at the end."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, as_completed
from distributed.system import MEMORY_LIMIT

from rasteret_dask.errors import JobError, RasteretDaskError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.progress import Progress
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.manifest import losses
from rasteret_dask.store.write import commit, is_committed, prepare, write_shard
from rasteret_dask.tasks.freezing import SHARD_BYTES
from rasteret_dask.tasks.job import Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job
from rasteret_dask.tasks.mapping import Functions
from rasteret_dask.tasks.shards import lower, renamed

__all__ = ["delayed_zarr", "run_zarr"]

MAX_LISTED = 10
PROCESS_BYTES = 600e6
"""A worker's memory beside its shards: each thread takes three times a shard on top."""


def run_zarr(
    layout: Layout,
    url: str,
    functions: Functions,
    client: Client | str | None,
    progress: bool,
    on_error: str = "raise",
) -> None:
    """Write a job's chips to a store; a rerun does what is missing.

    Parameters
    ----------
    layout
        The job and its layout.
    url
        The store.
    functions
        The user's functions that the job names.
    client
        A Dask client or a scheduler's address; None: the current client, else a cluster of this machine's size.
    progress
        Whether to show how far it is.
    on_error
        See :func:`rasteret_dask.tasks.shards.lower`.

    Raises
    ------
    StoreError
        When the store holds something else.
    JobError
        When shards failed; the others are written, and a rerun does only those.
    """
    clusters.check(client, "to_zarr(client=)")
    if is_committed(url, layout.job.digest, layout.said):
        return
    done = prepare(layout, url)
    tasks, shards = _tasks(layout, url, functions, on_error)
    wanted = {key: shard for key, shard in shards.items() if shard.name not in done}
    if wanted:
        graph = {k: t for k, t in tasks.items() if k not in shards or k in wanted}
        with clusters.using(client) as found, _or_local(found) as running:
            signatures.send(running, layout.job.hrefs(), layout.job.signed)
            signatures.send_place(running, url)
            _submit(running, graph, wanted, progress, len(shards), url)
    lost = losses(commit(url, layout.job))
    if progress and lost:
        sys.stderr.write(f"{lost}\n")


def _tasks(
    layout: Layout, url: str, functions: Functions, on_error: str
) -> tuple[dict[Any, Any], dict[str, Shard]]:
    place = _place(layout, url, on_error)
    write = functools.partial(write_shard, mark=place)
    graph = lower(layout.job, functions, JobRef(remote.join(url, JOB), layout.job.digest), write, on_error)
    return renamed(graph, layout.job, f"-{place}")


def _place(layout: Layout, url: str, on_error: str) -> str:
    """Digest where a task writes, and how: its name says that beside shard and content."""
    return hashlib.sha256(f"zarr {url} {layout.said} {on_error}".encode()).hexdigest()[:8]


def _submit(
    client: Client, graph: dict[Any, Any], wanted: Mapping[str, Shard], progress: bool, total: int, url: str
) -> None:
    futures: list[Future[Any]] = client.get(graph, sorted(wanted), sync=False, retries=1)
    failed: dict[str, BaseException] = {}
    try:
        with Progress("shards", progress, total) as shown:
            shown.step(total - len(wanted))
            for future in as_completed(futures, loop=client.loop):
                if future.status == "error":
                    failed[wanted[future.key].name] = future.exception()
                elif future.status != "finished":
                    failed[wanted[future.key].name] = RuntimeError(f"task {future.status}")
                shown.step(1, f", {len(failed)} failed" if failed else "")
    finally:
        # A traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever.
        for future in futures:
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


def delayed_zarr(layout: Layout, url: str, functions: Functions, on_error: str = "raise") -> Delayed:
    """Return the whole job as one lazy object: ``.compute()`` on any scheduler writes and commits the store."""
    signatures.send_to_current(layout.job.hrefs(), layout.job.signed)
    done = prepare(layout, url)
    tasks, shards = _tasks(layout, url, functions, on_error)
    wanted = [key for key, shard in shards.items() if shard.name not in done]
    roots = {k: t for k, t in tasks.items() if k not in shards} if wanted else {}
    digest = layout.job.digest
    name = f"commit-{digest[:12]}-{_place(layout, url, on_error)}"
    task = Task(name, _commit, url, digest, layout.said, *(TaskRef(k) for k in wanted))
    return Delayed(
        name, HighLevelGraph.from_collections(name, {**roots, **{k: tasks[k] for k in wanted}, name: task})
    )


def _commit(url: str, digest: str, compression: str, *_reports: Any) -> str:
    if not is_committed(url, digest, compression):
        commit(url, open_job(remote.join(url, JOB), digest))
    return url
