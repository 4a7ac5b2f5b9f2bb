# SPDX-License-Identifier: Apache-2.0
"""Who reads shards for a stream where there is a Dask cluster: tasks, whose chips travel straight to the consumer."""

from __future__ import annotations

import asyncio
import math
import time
import warnings
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import numpy as np
from dask._task_spec import Task, TaskRef
from distributed import Client, as_completed, get_worker, secede
from distributed import Future as DaskFuture
from distributed.comm.core import CommClosedError, connect
from distributed.scheduler import KilledWorker
from distributed.threadpoolexecutor import thread_state
from numpy.typing import NDArray

from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.net.clusters import workers_of
from rasteret_dask.net.watch import Watch
from rasteret_dask.progress import Progress
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.streams.shardsource import span_of
from rasteret_dask.tasks.batches import Arrays, InMemory, Part

__all__ = ["OnCluster"]

TRAIN = "train"
"""The Dask resource that consumers hold: workers that have it read nothing."""

CONNECT_S = 3.0
"""Seconds until a worker counts as out of reach."""

AGAIN_S = 30.0
"""Seconds that a scheduler may be away."""

LOOK_S = 2.0
"""Seconds between looks at which workers there are."""

TRANSFER_S = 60.0
"""Seconds for the parts of one batch to travel; then they are asked for again."""

TRIES = 5
"""How often shards that a cluster has forgotten are asked for again."""


@dataclass(slots=True, eq=False)
class _Part:
    """A part of a shard on the cluster."""

    shard: int
    rows: NDArray[np.int64]
    future: DaskFuture[Arrays] | None = field(default=None, repr=False)


class OnCluster:
    """Reads on a Dask cluster: a task a shard, and one for each part of it; parts travel straight to this process.

    Where shards come in their order, neighbours need the result of one tiny task, and so are read by the worker that
    has it: as many as it has threads, at least two. A worker restriction would switch Dask's queueing off.

    Parameters
    ----------
    reading
        What can be read.
    client
        The cluster.
    share
        This stream's share of the cluster's threads: one of how many.
    owned
        Whether to close the client in the end.
    in_order
        Whether shards come in their order: then neighbours are read by one worker, which fetches what they share once.

    Raises
    ------
    JobError
        When every worker holds the resource ``train``, so that none may read.

    Warns
    -----
    UserWarning
        When workers cannot be reached from here, so that all data passes the scheduler.
    """

    def __init__(
        self, reading: ChipShards, client: Client, share: int = 1, owned: bool = False, in_order: bool = False
    ) -> None:
        if client.asynchronous:
            raise PlanError(
                "stream(client=)", "an asynchronous client", "one that waits: Client(asynchronous=False)"
            )
        reading.send_signatures(client)
        self.client, self._owned = client, owned
        self._token, self._numbers = uuid4().hex[:12], count()  # parts are this stream's own
        self._reading, self._part = reading, reading.part
        self._roots, self._tasks = reading.tasks()
        self._held: list[DaskFuture[Any]] = []
        self._seat: tuple[str, DaskFuture[Any]] | None = None
        self._open: dict[int, _Part] = {}
        self._restricted, self._generation, self._lost = frozenset[str](), 0, 0
        self._threads = self._readers = 1
        self._looked = self._bare = self._watched = (
            0.0  # when workers were looked at; since when none of them may read
        )
        self._shards: dict[Hashable, str] = {}  # the shards' tasks that were sent
        self._watch = Watch(
            client,
            f"stream from {self._address}",
            self._shards,
            Progress("shards", shown=False),
            reading.memory,
        )
        with self._watch.looking():
            self._watch.admit({**self._roots, **dict(self._tasks[:1]), "part": Task("part", self._part)})
        self._settle()
        _leave_pool(self._restricted)
        # shards of a store have no tiles in common
        self._beside = (
            max(-(-self._threads // self._readers), 2) if in_order and reading.job is not None else 1
        )
        self.ahead = -(-max(self._threads, self._readers * self._beside) // share) + 1
        self.direct = self._reachable()
        self._hold_roots()

    def submit(self, shard: int, rows: Sequence[NDArray[np.int64]]) -> list[Any]:
        """Send a shard's task and those of its parts."""
        parts = [_Part(shard, own) for own in rows]
        self._watch.moved()  # whoever consumed meanwhile waited for nothing
        self._look()
        self._open.update((id(part), part) for part in parts)
        if self.client.status == "running":
            self._send(shard, parts)
        else:
            self._ask_again()
        return parts

    def collect(self, handles: Sequence[Any], timeout: float) -> list[Part] | None:
        """Return parts, or None where they are not there in time; what the cluster has forgotten is asked for again."""
        futures = [part.future for part in handles]
        try:
            found = self._gathered(futures, timeout) if self._there(futures, timeout) else None
            if found is None:
                return None
        except (CancelledError, CommClosedError):
            self._lost += 1
            self._ask_again()
            return None
        except KilledWorker as error:
            raise self._error(
                str(error), "workers that outlive a shard",
                "Look at their logs, and at explain() for the memory that a task needs. ",
            ) from error  # fmt: skip
        except Exception as error:
            # a client that closes loses part after part, and fails by whichever is gone
            if self.client.status not in ("closing", "closed"):
                raise
            raise self._gone() from error
        self._lost = 0
        self._watch.moved()
        for part in handles:
            del self._open[id(part)]
            part.future.release()
        return [(InMemory(arrays), None) for arrays in found]

    def _there(self, futures: Sequence[Any], timeout: float) -> bool:
        # not by wait(): its client would have to be made current, which sets the scheduler of the whole process
        try:
            for _ in as_completed(futures, loop=self.client.loop, timeout=timeout):
                pass
        except TimeoutError:
            self._look()
            return False
        return True

    def _gathered(self, futures: Sequence[Any], timeout: float) -> list[Arrays] | None:
        """Return the futures' results; None where they do not come, as whoever has them is gone."""
        generation, now = self._generation, time.monotonic()
        end, doubt = now + TRANSFER_S, now + 2 * CONNECT_S
        loop: Any = self.client.loop
        coming: Any = asyncio.run_coroutine_threadsafe(
            self.client.gather(futures, direct=self.direct, asynchronous=True), loop.asyncio_loop
        )
        while time.monotonic() < end and self._generation == generation:
            try:
                return list(coming.result(timeout))
            except TimeoutError:
                if coming.done():  # it is what reading ended with
                    raise
                self._look()
            if self.direct and time.monotonic() > doubt:
                doubt = math.inf
                self.direct = self._reachable(start=False)
                if not self.direct:
                    break
        coming.cancel()
        return None

    def _gone(self) -> JobError:
        return self._error(
            f"a scheduler that is gone (the client is {self.client.status})", "a scheduler that answers"
        )

    def _error(self, state: str, expected: str, remedy: str = "") -> JobError:
        resume = "Load this stream's state_dict() into a new stream: it goes on at the next batch."
        return JobError(f"stream from {self._address}", state, expected, remedy + resume)

    def close(self) -> None:
        """Let the cluster forget everything, and close the client where it is this stream's own."""
        for part in self._open.values():
            if part.future is not None:
                part.future.release()
        self._open.clear()
        for root in self._held:
            root.release()
        self._held.clear()
        if self._seat is not None:
            self._seat[1].release()
            self._seat = None
        self._watch.leave()
        if self._owned:
            self.client.close()

    @property
    def _address(self) -> str:
        return str(getattr(self.client.scheduler, "address", "a cluster that is gone"))

    def _hold_roots(self) -> None:
        """Have the roots computed once, and kept."""
        names = self._names()
        roots = {names[key]: task.substitute(names, key=names[key]) for key, task in self._roots.items()}
        if roots:
            self._held = self.client.get(roots, list(roots), sync=False, workers=self._workers)

    def _names(self) -> dict[Hashable, Hashable]:
        """Return the roots' names; those that may wait for workers that are gone are left alone."""
        return {key: f"{key}-{self._generation}" if self._generation else key for key in self._roots}

    @property
    def _workers(self) -> list[str] | None:
        return sorted(self._restricted) or None

    def _send(self, shard: int, parts: Sequence[_Part]) -> None:
        key: Hashable
        key, task = self._tasks[shard]
        span = span_of(self._reading, shard, [part.rows for part in parts])
        if span is not None and self._reading.parts is not None:
            key, task = self._reading.parts.task(shard, span)
        first = 0 if span is None else span.start
        graph: dict[Hashable, Any] = {}
        if self._beside > 1:
            seat = f"seat-{self._tasks[shard - shard % self._beside][0]}-{self._beside}-{self._generation}"
            self._sit(seat)
            # a group of its own: in a large one Dask would take them for roots, and spread them over all workers
            key = (f"{key}-seated-{self._beside}-{self._generation}", 0)
            graph[seat] = self._seat_task(seat)
            graph[key] = Task(key, _seated, TaskRef(seat), _Apart(task))
        elif self._generation:
            key = f"{key}-{self._generation}"
            graph[key] = task.substitute(self._names(), key=key)
        else:
            graph[key] = task
        self._shards[key] = f"shard {shard}"
        names = {}
        for part in parts:
            name = f"part-{self._token}-{next(self._numbers)}"
            graph[name] = Task(name, self._part, TaskRef(key), part.rows - first)
            names[name] = part
        futures = self.client.get(
            graph, list(names), sync=False, retries=1, fifo_timeout=0, workers=self._workers
        )
        for future in futures:
            names[future.key].future = future

    def _seat_task(self, seat: str) -> Task:
        """Return the task that has all roots where it is computed: where neighbours are read then."""
        names: dict[Any, Any] = dict(self._names())
        return Task(seat, _sit, tuple(names), *(TaskRef(name) for name in names.values()))

    def _sit(self, seat: str) -> None:
        """Hold what neighbours need, until the next ones are sent: some of them may be long done."""
        if self._seat is not None and self._seat[0] == seat:
            return
        before = self._seat
        graph = {seat: self._seat_task(seat)}
        (future,) = self.client.get(graph, [seat], sync=False, fifo_timeout=0, workers=self._workers)
        self._seat = seat, future
        if before is not None:
            before[1].release()

    def _ask_again(self) -> None:
        """Wait until the scheduler is there, and send all that is still wanted."""
        if self._lost > TRIES:
            raise self._error(
                f"a cluster that has forgotten the same shards {TRIES} times", "one that keeps what it reads"
            )
        end = time.monotonic() + AGAIN_S
        while True:
            self._generation += 1
            try:
                if self.client.status == "running":
                    return self._send_open()
            except CommClosedError:  # it has not noticed yet, or again
                pass
            if time.monotonic() > end or self.client.status in ("closing", "closed"):
                raise self._gone()
            time.sleep(0.2)

    def _send_open(self) -> None:
        self._settle()
        self._hold_roots()
        by_shard: dict[int, list[_Part]] = {}
        for part in self._open.values():
            by_shard.setdefault(part.shard, []).append(part)
        for shard, parts in by_shard.items():
            self._send(shard, parts)

    def _look(self) -> None:
        """See from time to time which workers may read; where all that tasks wait for are gone, ask again."""
        every_s = min(LOOK_S, self._watch.patience.look_s)
        if time.monotonic() - self._looked < every_s or self.client.status != "running":
            return
        before = self._restricted
        try:
            workers = self._settle()
            if self._looked - self._watched > self._watch.patience.look_s:
                self._watched = self._looked
                self._watch.look()
        except CommClosedError:
            return  # whoever waits for parts will hear of it
        if workers and before and not before & workers and not self._bare:
            self._ask_again()

    def _settle(self) -> set[str]:
        """Settle which workers may read; return all there are. Readers under way may be gone for a moment."""
        self._looked = time.monotonic()
        workers = workers_of(self.client)
        readers = {a for a, own in workers.items() if TRAIN not in own.get("resources", {})}
        if workers and not readers:
            self._bare = self._bare or self._looked
            if not self._open or self._looked - self._bare > AGAIN_S:
                raise JobError(
                    f"stream from {self._address}",
                    f"{len(workers)} workers that all hold the resource {TRAIN!r}",
                    "workers without it, to read",
                    "Start further workers without --resources.",
                )
            return set(workers)
        self._bare = 0.0
        self._restricted = frozenset(readers) if len(readers) < len(workers) else frozenset()
        self._readers = max(1, len(readers))
        self._threads = max(1, sum(int(workers[a]["nthreads"]) for a in readers))
        return set(workers)

    def _reachable(self, start: bool = True) -> bool:
        """Tell whether workers can be reached from here; later on, one that does not answer may just be dying."""
        workers: list[str] = list(workers_of(self.client))
        lost = self.client.sync(_unreachable, self.client, workers)
        if lost and (start or len(lost) == len(workers)):
            warnings.warn(
                f"{len(lost)} of {len(workers)} workers cannot be reached from here ({lost[0]}): chips come through "
                "the scheduler, which every byte passes twice (measured: half to three quarters of the speed). "
                "Consume where the workers are: rd.stream_from.",
                stacklevel=2,
            )
            return False
        return True


@dataclass(frozen=True)
class _Apart:
    """A task as data, so that Dask does not look into it."""

    task: Task


def _sit(names: tuple[Hashable, ...], *roots: Any) -> dict[Hashable, Any]:
    """Hold all roots: what needs this result is computed where it is, without a restriction to that worker."""
    return dict(zip(names, roots, strict=True))


def _seated(roots: dict[Hashable, Any], read: _Apart) -> Any:
    return read.task(roots)


def _leave_pool(readers: frozenset[str]) -> None:
    """Where a Dask task streams on a worker that reads too, let its thread go: reads would wait for it for ever."""
    try:
        own = get_worker().address
    except ValueError:  # no task
        return
    if (not readers or own in readers) and getattr(thread_state, "proceed", False):
        secede()


async def _unreachable(client: Client, addresses: Iterable[str]) -> list[str]:
    """Return the addresses that do not answer."""

    async def answers(address: str) -> bool:
        try:
            comm = await connect(address, timeout=CONNECT_S, **client.connection_args)
        except (OSError, ValueError):  # nobody answers, or it is an address that only the cluster understands
            return False
        await comm.close()
        return True

    known = list(addresses)
    found = await asyncio.gather(*(answers(address) for address in known))
    return [address for address, ok in zip(known, found, strict=True) if not ok]
