# SPDX-License-Identifier: Apache-2.0
"""Waits for tasks of a cluster: each result is taken once it is there, and a lost scheduler is an error at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from distributed import Client, Future, as_completed, rejoin, secede
from distributed.threadpoolexecutor import thread_state

from rasteret_dask.errors import JobError
from rasteret_dask.net.clusters import address_of, resource_mark

__all__ = ["as_they_end", "out_of_pool", "results", "why_cancelled"]


def results(client: Client, graph: Mapping[Hashable, Any], keys: Sequence[str], subject: str) -> list[Any]:
    """Return the results of some keys: see :func:`as_they_end`."""
    taken = dict(as_they_end(client, graph, keys, subject))
    return [taken[key] for key in keys]


def as_they_end(
    client: Client,
    graph: Mapping[Hashable, Any],
    keys: Sequence[str],
    subject: str,
    resource: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield some keys with their results as they end. The cluster forgets each as soon as it is here.

    A worker that is lost later takes nothing of it along, so that it is not computed again.

    Parameters
    ----------
    client
        The cluster.
    graph
        All tasks.
    keys
        Those whose results are wanted.
    subject
        What is being done, for messages.
    resource
        The Dask resource that workers must declare; None: any worker.

    Raises
    ------
    JobError
        When the scheduler is lost.
    """
    scheduler = address_of(client)
    done = 0
    futures: list[Future[Any]] = []
    try:
        with out_of_pool():
            futures = client.get(dict(graph), list(keys), sync=False, resources=resource_mark(resource))
            for future, result in as_completed(futures, loop=client.loop, with_results=True):
                if isinstance(result, CancelledError):
                    raise JobError(
                        subject,
                        f"{why_cancelled(future, scheduler)}; {done} of {len(keys)} parts were done",
                        "a scheduler that stays, with its tasks, until the end",
                        "Call it again once there is a scheduler.",
                    ) from result
                done += 1
                yield future.key, result
                future.release()
    finally:
        # a traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever
        for future in futures:
            future.release()


def why_cancelled(future: Future[Any], scheduler: str) -> str:
    """Say why a task that nobody here has cancelled is: its scheduler was lost, or what that said."""
    reason = ""
    try:
        future.result()
    except CancelledError as error:
        reason = str(getattr(error, "reason", ""))
    if reason in ("", "unknown", "scheduler-connection-lost"):
        return f"the scheduler {scheduler} lost"
    return f"all tasks cancelled at {scheduler} ({reason})"


@contextmanager
def out_of_pool() -> Iterator[None]:
    """Where a Dask task waits for other tasks, leave its worker's pool meanwhile: they may need its thread."""
    if not getattr(thread_state, "proceed", False):  # not a task, or it has left already
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()
