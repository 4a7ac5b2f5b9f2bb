# SPDX-License-Identifier: Apache-2.0
"""A job's shards on a Dask cluster, in runs; each shard is told of as it ends. It imports distributed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from statistics import median_low
from typing import Any, NamedTuple
from uuid import uuid4

from dask._task_spec import DataNode, Task, TaskRef
from distributed import Client, Future, get_worker, span
from distributed.scheduler import KilledWorker

from rasteret_dask.activity import Tally, live
from rasteret_dask.activity import watched as watched_shard
from rasteret_dask.errors import JobError, UnwritableStoreError
from rasteret_dask.net.awaiting import out_of_pool, why_cancelled
from rasteret_dask.net.clusters import address_of, resource_mark, workers_of
from rasteret_dask.net.watch import Watch, watched
from rasteret_dask.progress import Progress
from rasteret_dask.store.limits import Deadline
from rasteret_dask.store.runtasks import Run, ShardNews, Shards, Work
from rasteret_dask.tasks.runs import CREW, Cuts, Workforce

__all__ = ["ClusterTasks"]

_log = logging.getLogger(__name__)

MANY_WORKERS = 64
"""Processes that a cluster may grow to where it adapts, and says no most."""

METRIC = "rasteret_dask"
"""What the scheduler calls what a worker has under way, among the metrics of its heartbeats."""

_GOING_ON = ("executing", "long-running")


LOOK_S = 1.0
"""Seconds between looks whether a worker is idle, where none has ended a run."""

STOP_S = 10.0
"""Seconds that workers have to answer that they begin no further shard; whoever does not is waited for all the same."""

_STOPPED: set[str] = set()
"""Of this worker process: topics of clients that want no further shard begun."""


@dataclass(slots=True)
class _Sent:
    run: Run
    future: Future[Any]
    left: dict[int, str] = field(init=False)
    """Place -> shard that has not been heard of, rising."""
    worker: str = ""
    """Who computes it; empty: it waits for a thread."""

    def __post_init__(self) -> None:
        self.left = dict(zip(self.run.places, self.run.names, strict=True))


class _Event(NamedTuple):
    """What a worker says of a run: that it begins, or that a shard of it has ended. It travels as a plain tuple."""

    key: str
    """Of the run's task."""
    shard: str
    """Empty: the run begins."""
    text: str | None
    """What a shard failed with, or the worker that has begun a run."""
    seconds: float = 0.0
    """How long a shard has taken."""
    tally: tuple[int, int, int] = (0, 0, 0)
    """Of the shard, where somebody watches: :class:`Tally` without its share."""


@dataclass(frozen=True, slots=True)
class _Answer:
    places: Sequence[int]
    """What it leaves to others."""


class ClusterTasks:
    """A cluster that computes runs of shards.

    Parameters
    ----------
    client
        The cluster's client.
    deadline
        Until when shards may begin.
    """

    def __init__(self, client: Client, deadline: Deadline | None = None) -> None:
        self._client = client
        self._deadline = deadline or Deadline()
        self._stopped = False
        self._scheduler = address_of(client)
        self._topic = f"rasteret-dask-shards-{uuid4().hex[:12]}"
        self._sent: dict[str, _Sent] = {}
        self._names: dict[str, str] = {}
        """Key of each run under way -> the shard it is at."""
        self._count = 0
        self._heard: SimpleQueue[_Event | Future[Any] | _Answer | None] = SimpleQueue()
        self._runs = Counter[str]()
        """Shard -> runs under way that have it: two, where one has left it to another."""
        self._written = set[str]()
        self._settled: list[str] = []
        self._question: dict[int, tuple[str, str]] | None = None
        """Place -> shard, and the run that has it, of what a worker is asked to leave to others."""
        self._left: list[str] = []
        self._progress = Progress("shards", shown=False)
        self._seen = set[str]()
        """Shards of which a tally has come: what workers last said of them is counted in it."""
        self._look = 0.0
        """When to look for idle workers again."""
        self._resource: str | None = None
        """What workers of the work under way must declare."""

    @property
    def force(self) -> Workforce:
        """The workers that there are, or will be soon."""
        workers = self._workers()
        threads = [int(worker["nthreads"]) for worker in workers.values()]
        cluster: Any = getattr(self._client, "cluster", None)
        coming = len(getattr(cluster, "plan", ()))
        adaptive = getattr(cluster, "_adaptive", None)
        if adaptive is not None:
            coming = adaptive.maximum if adaptive.maximum < math.inf else MANY_WORKERS
        return Workforce(max(len(workers), coming, 1), median_low(threads) if threads else 1)

    def _workers(self) -> dict[str, Any]:
        """Return the workers that may compute the work under way."""
        workers = workers_of(self._client).items()
        needed = self._resource
        return {a: facts for a, facts in workers if needed is None or facts.get("resources", {}).get(needed)}

    @property
    def unfinished(self) -> int:
        """Number of runs that were sent and have not ended, and of workers that are asked for a part of theirs."""
        return len(self._sent) + (self._question is not None)

    @contextmanager
    def watched(self, work: Work, run: Run, subject: str, progress: Progress) -> Iterator[None]:
        """Watch the cluster for the length of a block, at whose end it forgets all tasks."""
        self._client.subscribe_topic(self._topic, self._hear)
        self._progress, self._resource = progress, work.resource
        try:
            with (
                watched(
                    self._client, self._graph(work, [run]), self._names, subject, progress, work.memory
                ) as watch,
                out_of_pool(),
                span(subject),  # the dashboard then tells this job's figures from those of others
            ):
                progress.live = partial(self._live, watch)
                yield
        finally:
            # A traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever.
            while self._sent:
                self._sent.popitem()[1].future.release()
            if self._client.status == "running":
                self._client.unsubscribe_topic(self._topic)

    @property
    def stopped(self) -> bool:
        """Whether no further shard begins."""
        return self._stopped

    def stop(self) -> None:
        """Begin no further shard: runs end with the shard that they are at, and those that wait are cancelled."""
        self._stopped = True
        loop: Any = self._client.loop
        asked = asyncio.run_coroutine_threadsafe(_all_stop(self._client, self._topic), loop.asyncio_loop)
        try:
            begun = asked.result(STOP_S)
        except TimeoutError:
            return
        waiting = [sent.future for key, sent in self._sent.items() if key not in begun]
        if waiting:
            self._client.cancel(waiting)

    def _live(self, watch: Watch) -> Tally:
        """Return what workers have under way, as they said with their last heartbeats: no message of its own."""
        reports = [worker.get("metrics", {}).get(METRIC) or {} for worker in watch.workers.values()]
        shards = {name: tally for report in reports for name, tally in report.get(self._topic, {}).items()}
        return sum((Tally(*tally) for name, tally in shards.items() if name not in self._seen), Tally())

    def _hear(self, event: tuple[float, _Event]) -> None:
        self._heard.put(_Event(*event[1]))

    def _graph(self, work: Work, runs: Sequence[Run]) -> dict[Hashable, Any]:
        roots: dict[Hashable, Any] = {key: DataNode(key, value) for key, value in work.roots.items()}
        values = [TaskRef(key) for key in work.roots]
        timed = self._deadline.left_s is not None
        tasks: dict[Hashable, Any] = {
            run.key: Task(
                run.key,
                _compute,
                work.compute,
                work.job,
                run,
                self._topic,
                self._progress.shown,
                timed,
                *values,
            )
            for run in runs
        }
        return {**roots, **tasks}

    def send(self, work: Work, runs: Sequence[Run]) -> None:
        """Have runs computed, in this order, behind those that were sent before."""
        when = {run.key: -(self._count + at) for at, run in enumerate(runs)}
        self._count += len(runs)
        futures: list[Future[Any]] = self._client.get(
            self._graph(work, runs),
            list(when),
            sync=False,
            priority=lambda key: when.get(key, 0),
            resources=resource_mark(work.resource),
        )
        for run, future in zip(runs, futures, strict=True):
            self._sent[run.key] = _Sent(run, future)
            self._names[run.key] = run.names[0]
            self._runs.update(run.names)
            future.add_done_callback(self._heard.put)

    def spread(self, shards: Shards, paid: int) -> None:
        """Ask a busy process for a part of what it has left, where another one idles; see :meth:`left`."""
        waits = any(not sent.worker for sent in self._sent.values())
        if waits or self._question is not None or time.monotonic() < self._look or not self._sent:
            return
        self._look = time.monotonic() + LOOK_S
        busy = Counter(sent.worker for sent in self._sent.values())
        idle = [
            address
            for address, facts in self._workers().items()
            if facts.get("status", "running") == "running" and int(facts["nthreads"]) > busy[address]
        ]
        if not idle:
            return
        theirs: dict[str, dict[int, tuple[str, str]]] = {}
        for key, sent in self._sent.items():
            theirs.setdefault(sent.worker, {}).update(
                (place, (name, key)) for place, name in sent.left.items()
            )
        # threads of one process take parts from each other for nothing
        spare = max(shards.cuts.allowance(shards.places, self.force) - paid, 0)
        free = Cuts.free(shards.places[-1] + 1)
        for cuts, workers in ((free, [a for a in idle if a in theirs]), (shards.cuts, list(theirs))):
            ends = [(cuts.takeover(sorted(theirs[a]), busy[a], spare), a) for a in workers]
            parts = [(end, worker) for end, worker in ends if end is not None]
            if parts:
                end, worker = max(parts, key=lambda part: part[0].gain)
                self._ask(shards.work.job, worker, {place: theirs[worker][place] for place in end.places})
                return

    def _ask(self, job: str, worker: str, shards: dict[int, tuple[str, str]]) -> None:
        for place, (_, key) in shards.items():  # nobody waits for them until the worker has answered
            del self._sent[key].left[place]
        self._question = shards
        loop: Any = self._client.loop
        answer = asyncio.run_coroutine_threadsafe(
            _given_up(self._client, worker, job, tuple(shards)), loop.asyncio_loop
        )
        answer.add_done_callback(
            lambda done: self._heard.put(
                _Answer(() if done.cancelled() or done.exception() else done.result())
            )
        )

    def _settle(self, answer: _Answer) -> Sequence[ShardNews]:
        """Take shards that a worker left to others; the rest goes back to its runs."""
        asked, self._question = self._question, None
        news = []
        for place, (name, key) in (asked or {}).items():
            sent = self._sent.get(key)
            if place in answer.places:
                self._left.append(name)
            elif sent is not None:
                sent.left = dict(sorted({**sent.left, place: name}.items()))
            elif not self._stopped:
                news.append(ShardNews(name, _failure(name, "its run ended without it"), may_pass=True))
        if self._left:
            self._look = 0.0  # there may be more idle ones
        return news

    def left(self) -> Sequence[str]:
        """Return neighbours that a process has left to others, once."""
        left, self._left = self._left, []
        return left

    def wake(self) -> None:
        """Have who waits for news go on without any; a signal's handler may call it."""
        self._heard.put(None)

    def news(self) -> Sequence[ShardNews]:
        """Wait until something has happened; return the shards that have ended, none where only a run has.

        Raises
        ------
        CancelledError
            When the scheduler was lost.
        """
        if self._deadline.is_over and not self._stopped:
            self.stop()
        wait_s = STOP_S if self._stopped else self._deadline.left_s
        try:
            event = self._heard.get(timeout=None if wait_s is None else max(wait_s, 0))
        except Empty:
            if self._stopped:  # workers may have joined since
                self.stop()
            return []
        if event is None:
            return []
        if isinstance(event, _Answer):
            return self._settle(event)
        if isinstance(event, Future):
            return self._end(event)
        key, name, text, took, tally = event
        sent = self._sent.get(key)
        if sent is not None and not name:  # it begins; again, where a worker was lost
            sent.worker = text or ""
            return []
        place = next((place for place, one in sent.left.items() if one == name), None) if sent else None
        if sent is not None and place is not None:
            del sent.left[place]
            self._names[key] = next(iter(sent.left.values()), name)
        elif not self._is_in_question(key, name):  # a worker was lost, and its run is computed again
            return []
        if text is None:
            self._written.add(name)
            self._deadline.took(took)
        self._seen.add(name)
        return [
            ShardNews(
                name,
                None if text is None else _failure(name, text),
                may_pass=True,
                tally=Tally(*tally),
            )
        ]

    def _is_in_question(self, key: str, name: str) -> bool:
        """Tell whether a shard ends while its worker is asked to leave it to others; then it need not."""
        shards = self._question or {}
        place = next((place for place, shard in shards.items() if shard == (name, key)), None)
        if place is not None:
            del shards[place]
        return place is not None

    def _end(self, future: Future[Any]) -> Sequence[ShardNews]:
        sent = self._sent.pop(str(future.key), None)
        if sent is None:
            return []
        self._look = 0.0
        self._names.pop(sent.run.key, None)
        error: BaseException | None = None
        if future.status == "cancelled" and self._stopped:
            return []
        if future.status == "cancelled":
            raise CancelledError(why_cancelled(future, self._scheduler))
        if future.status == "error":  # else finished; or lost since, with a worker that held the result
            error = future.exception()
        stopped = self._stopped and not isinstance(error, UnwritableStoreError)
        written = future.result() if stopped and future.status == "finished" else ()
        future.release()
        if stopped:  # a run may end before its last shard is told of; the rest is left for another time
            return [ShardNews(name, None) for place, name in sent.left.items() if place in written]
        if error is None and len(sent.run.names) == 1:
            self._written.update(sent.left.values())
        self._runs.subtract(sent.run.names)
        for name in sent.run.names:
            if self._runs[name]:
                continue
            del self._runs[name]
            if error is None and name in self._written:
                self._written.discard(name)
                self._settled.append(name)
        if len(sent.run.names) == 1 or isinstance(error, UnwritableStoreError):
            killed = isinstance(error, KilledWorker)  # Dask has tried it several times
            return [ShardNews(name, error, not killed, killed) for name in list(sent.left.values())[:1]]
        # by themselves, so that only those fail that must
        failure = "its run ended without it" if error is None else f"its run ended with {error}"
        return [ShardNews(name, _failure(name, failure), may_pass=True) for name in sent.left.values()]

    def settled(self) -> Sequence[str]:
        """Return shards of runs that have ended since this was asked last: no task asks for their reports any more."""
        settled, self._settled = self._settled, []
        return settled


async def _all_stop(client: Client, topic: str) -> frozenset[str]:
    """Ask all workers to begin no further shard of a client; return the keys of runs that a worker has."""
    call: Any = client.run
    processing: Any = client.processing
    try:
        await call(_begin_no_more, topic, on_error="return")
        begun = await processing()
    except (OSError, RuntimeError, ValueError):  # the scheduler is gone, and with it every task
        return frozenset()
    return frozenset(str(key) for keys in begun.values() for key in keys)


def _begin_no_more(topic: str) -> None:
    _STOPPED.add(topic)


async def _given_up(client: Client, worker: str, job: str, places: tuple[int, ...]) -> tuple[int, ...]:
    """Ask a worker to leave shards to others; return which it does: none where it does not answer."""
    call: Any = client.run
    try:
        answers = await call(_give_up, job, places, workers=[worker], on_error="return")
    except (OSError, RuntimeError, ValueError):  # whoever is gone, its run is computed again
        return ()
    answer = answers.get(worker)
    return answer if isinstance(answer, tuple) else ()


def _give_up(job: str, places: tuple[int, ...]) -> tuple[int, ...]:
    return CREW.give_up(job, frozenset(places))


def _failure(name: str, failure: str) -> JobError:
    return JobError(f"shard {name}", failure, "that it is written", "It is tried once more, by itself.")


def _live_shards(worker: Any) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return what a worker's process has under way, as a metric that its heartbeats carry: call -> shard -> tally."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for (topic, shard), tally in live().items():
        found.setdefault(topic, {})[shard] = astuple(tally)
    return found


def _compute(
    compute: Callable[..., None], job: str, run: Run, topic: str, is_watched: bool, timed: bool, *roots: Any
) -> tuple[int, ...]:
    """Compute a run in a Dask task, and say of each shard that it has ended; return the places of those written.

    Where one process computes all, its tasks say so: shards are told of where somebody watches them, or their time.
    """
    worker = get_worker()
    if is_watched:
        worker.metrics.setdefault(METRIC, _live_shards)
    key = worker.get_current_task()
    at = {place: number for number, place in enumerate(run.places)}
    written: list[int] = []
    alone = len(run.names) == 1

    def goes_on() -> bool:
        task = worker.state.tasks.get(key)
        return topic not in _STOPPED and task is not None and task.state in _GOING_ON

    def one(place: int) -> None:
        name = run.names[at[place]]
        failure, activity, begun = None, None, time.monotonic()
        try:
            if is_watched:
                with watched_shard(topic, name) as activity:
                    compute(run.items[at[place]], *roots)
            else:
                compute(run.items[at[place]], *roots)
        except BaseException as error:  # of this shard: the others of its run are written
            if alone or not isinstance(error, Exception) or isinstance(error, UnwritableStoreError):
                raise
            failure = f"{type(error).__name__}: {error}"
            _log.info("shard %s failed, and is tried once more: %s", name, failure, exc_info=True)
        if failure is None:
            written.append(place)
        counts = (0, 0, 0) if activity is None else astuple(activity.tally())[:3]
        if timed or is_watched or not run.whole:  # else its task says so
            worker.log_event(topic, (str(key), name, failure, time.monotonic() - begun, counts))

    if timed or not run.whole:
        worker.log_event(topic, (str(key), "", worker.address))
    CREW.compute(job, run.places, one, goes_on, run.whole)
    return tuple(written)
