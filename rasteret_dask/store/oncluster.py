"""A job's shards on a Dask cluster, in runs; each shard is told of as it ends. It imports distributed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from statistics import median_low
from typing import Any
from uuid import uuid4

from dask._task_spec import DataNode, Task, TaskRef
from distributed import Client, Future, get_worker
from distributed.scheduler import KilledWorker

from rasteret_dask.errors import JobError, UnwritableStoreError
from rasteret_dask.net.awaiting import out_of_pool, why_cancelled
from rasteret_dask.net.clusters import address_of, workers_of
from rasteret_dask.net.watch import watched
from rasteret_dask.progress import Progress
from rasteret_dask.store.runtasks import Run, ShardNews, Work
from rasteret_dask.tasks.runs import CREW, Workforce

__all__ = ["ClusterTasks"]

_log = logging.getLogger(__name__)

MANY_WORKERS = 64
"""Processes that a cluster may grow to where it adapts, and says no most."""

_GOING_ON = ("executing", "long-running")


@dataclass(slots=True)
class _Sent:
    run: Run
    future: Future[Any]
    left: list[str] = field(init=False)
    """Shards that have not been heard of."""

    def __post_init__(self) -> None:
        self.left = list(self.run.names)


class ClusterTasks:
    """A cluster that computes runs of shards.

    Parameters
    ----------
    client
        The cluster's client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._scheduler = address_of(client)
        self._topic = f"rasteret-dask-shards-{uuid4().hex[:12]}"
        self._sent: dict[str, _Sent] = {}
        self._names: dict[str, str] = {}
        """Key of each run under way -> the shard it is at."""
        self._count = 0
        self._heard: SimpleQueue[tuple[str, str, str | None] | Future[Any]] = SimpleQueue()

    @property
    def force(self) -> Workforce:
        """The workers that there are, or will be soon."""
        workers = workers_of(self._client)
        threads = [int(worker["nthreads"]) for worker in workers.values()]
        cluster: Any = getattr(self._client, "cluster", None)
        coming = len(getattr(cluster, "plan", ()))
        adaptive = getattr(cluster, "_adaptive", None)
        if adaptive is not None:
            coming = adaptive.maximum if adaptive.maximum < math.inf else MANY_WORKERS
        return Workforce(max(len(workers), coming, 1), median_low(threads) if threads else 1)

    @property
    def unfinished(self) -> int:
        """Number of runs that were sent and have not ended."""
        return len(self._sent)

    @contextmanager
    def watched(self, work: Work, run: Run, subject: str, progress: Progress) -> Iterator[None]:
        """Watch the cluster for the length of a block, at whose end it forgets all tasks."""
        self._client.subscribe_topic(self._topic, self._hear)
        try:
            with (
                watched(self._client, self._graph(work, [run]), self._names, subject, progress),
                out_of_pool(),
            ):
                yield
        finally:
            # A traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever.
            while self._sent:
                self._sent.popitem()[1].future.release()
            if self._client.status == "running":
                self._client.unsubscribe_topic(self._topic)

    def _hear(self, event: tuple[float, tuple[str, str, str | None]]) -> None:
        key, name, failure = event[1]
        self._heard.put((key, name, failure))

    def _graph(self, work: Work, runs: Sequence[Run]) -> dict[Hashable, Any]:
        roots: dict[Hashable, Any] = {key: DataNode(key, value) for key, value in work.roots.items()}
        values = [TaskRef(key) for key in work.roots]
        tasks: dict[Hashable, Any] = {
            run.key: Task(run.key, _compute, work.compute, work.job, run, self._topic, *values)
            for run in runs
        }
        return {**roots, **tasks}

    def send(self, work: Work, runs: Sequence[Run]) -> None:
        """Have runs computed, in this order, behind those that were sent before."""
        when = {run.key: -(self._count + at) for at, run in enumerate(runs)}
        self._count += len(runs)
        futures: list[Future[Any]] = self._client.get(
            self._graph(work, runs), list(when), sync=False, priority=lambda key: when.get(key, 0)
        )
        for run, future in zip(runs, futures, strict=True):
            self._sent[run.key] = _Sent(run, future)
            self._names[run.key] = run.names[0]
            future.add_done_callback(self._heard.put)

    def news(self) -> Sequence[ShardNews]:
        """Wait until something has happened; return the shards that have ended, none where only a run has.

        Raises
        ------
        CancelledError
            When the scheduler was lost.
        """
        event = self._heard.get()
        if isinstance(event, Future):
            return self._end(event)
        key, name, failure = event
        sent = self._sent.get(key)
        if sent is None or name not in sent.left:  # a worker was lost, and its run is computed again
            return []
        sent.left.remove(name)
        if sent.left:
            self._names[key] = sent.left[0]
        return [ShardNews(name, None if failure is None else _failure(name, failure), may_pass=True)]

    def _end(self, future: Future[Any]) -> Sequence[ShardNews]:
        sent = self._sent.pop(str(future.key), None)
        if sent is None:
            return []
        self._names.pop(sent.run.key, None)
        error: BaseException | None = None
        if future.status == "cancelled":
            raise CancelledError(why_cancelled(future, self._scheduler))
        if future.status == "error":  # else finished; or lost since, with a worker that held the result
            error = future.exception()
        future.release()
        if len(sent.run.names) == 1 or isinstance(error, UnwritableStoreError):
            killed = isinstance(error, KilledWorker)  # Dask has tried it several times
            return [ShardNews(name, error, not killed, killed) for name in sent.left[:1]]
        # by themselves, so that only those fail that must
        failure = "its run ended without it" if error is None else f"its run ended with {error}"
        return [ShardNews(name, _failure(name, failure), may_pass=True) for name in sent.left]


def _failure(name: str, failure: str) -> JobError:
    return JobError(f"shard {name}", failure, "that it is written", "It is tried once more, by itself.")


def _compute(compute: Callable[..., None], job: str, run: Run, topic: str, *roots: Any) -> None:
    """Compute a run in a Dask task, and say of each shard that it has ended."""
    worker = get_worker()
    key = worker.get_current_task()
    at = {place: number for number, place in enumerate(run.places)}
    alone = len(run.names) == 1

    def goes_on() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state in _GOING_ON

    def one(place: int) -> None:
        name = run.names[at[place]]
        failure = None
        try:
            compute(run.items[at[place]], *roots)
        except BaseException as error:  # of this shard: the others of its run are written
            if alone or not isinstance(error, Exception) or isinstance(error, UnwritableStoreError):
                raise
            failure = f"{type(error).__name__}: {error}"
            _log.info("shard %s failed, and is tried once more: %s", name, failure, exc_info=True)
        if not alone:  # else its task says so
            worker.log_event(topic, (str(key), name, failure))

    CREW.compute(job, run.places, one, goes_on, run.whole)
