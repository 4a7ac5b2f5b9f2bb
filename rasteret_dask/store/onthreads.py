# SPDX-License-Identifier: Apache-2.0
"""A job's shards on threads of this process, where there is no cluster: nothing is started or imported for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

import dask.config
from dask.system import CPU_COUNT

from rasteret_dask.activity import Tally, live, watched
from rasteret_dask.lists import first_of
from rasteret_dask.progress import Progress, seconds
from rasteret_dask.store.limits import Deadline
from rasteret_dask.store.runtasks import Run, ShardNews, Shards, Work
from rasteret_dask.tasks.runs import Workforce
from rasteret_dask.tasks.workermemory import MOST_TASK_BYTES, memory_here, needed_bytes

__all__ = ["ThreadTasks", "threads_that_fit"]

_log = logging.getLogger(__name__)

MAX_NAMED = 5
"""Tasks that a line names."""


class ThreadTasks:
    """Threads that compute shards: decoding, warping and compressing leave Python's lock alone.

    Each thread computes one shard at a time, in the order in which they were sent.

    Parameters
    ----------
    count
        How many threads.
    deadline
        Until when shards may begin.
    """

    def __init__(self, count: int, deadline: Deadline | None = None) -> None:
        self.count = count
        self._deadline = deadline or Deadline()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="rasteret-shard")
        self._waiting = 0
        self._ended: SimpleQueue[tuple[str, Future[bool]] | None] = SimpleQueue()
        self._running: dict[str, float] = {}
        self._settled: list[str] = []
        self._subject, self._progress = "", Progress("shards", shown=False)
        self._token = uuid4().hex
        self._tallies: dict[str, Tally] = {}
        """What was done for shards that have just ended."""

    @property
    def force(self) -> Workforce:
        """Return this process, with its threads."""
        return Workforce(1, self.count)

    @property
    def unfinished(self) -> int:
        """Number of shards that were sent and have not ended."""
        return self._waiting

    @property
    def stopped(self) -> bool:
        """Whether no further shard begins."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Begin no further shard: those that were sent and have not begun end at once, without news."""
        self._stopped.set()

    @contextmanager
    def watched(self, work: Work, run: Run, subject: str, progress: Progress) -> Iterator[None]:
        """Say what stands still for the length of a block; at its end nothing runs any more, and nothing waits."""
        self._subject, self._progress = subject, progress
        progress.live = self._live
        try:
            yield
        finally:
            # also when it is interrupted: nothing is written once the call has returned
            self._pool.shutdown(wait=True, cancel_futures=True)

    def send(self, work: Work, runs: Sequence[Run]) -> None:
        """Have runs computed, in this order, behind those that were sent before."""
        roots = tuple(work.roots.values())
        for name, item in (pair for run in runs for pair in zip(run.names, run.items, strict=True)):
            self._waiting += 1
            future = self._pool.submit(self._compute, name, work, item, roots)
            future.add_done_callback(lambda done, name=name: self._ended.put((name, done)))  # type: ignore[misc]

    def spread(self, shards: Shards, paid: int) -> None:
        """Do nothing: threads of one process take shard after shard."""

    def left(self) -> Sequence[str]:
        """Return nothing: no shard is left to others."""
        return ()

    def _live(self) -> Tally:
        """Return what is under way, for who draws it."""
        self._progress.running = f"{len(self._running)} running on {self.count} threads"
        return sum((tally for (token, _), tally in live().items() if token == self._token), Tally())

    def _compute(self, name: str, work: Work, item: Any, roots: tuple[Any, ...]) -> bool:
        """Compute a shard, and return True; False where it is not begun any more."""
        if self._deadline.is_over:
            self._stopped.set()
        if self._stopped.is_set():
            return False
        self._running[name] = begun = time.monotonic()
        try:
            if not self._progress.shown:
                work.compute(item, *roots)
            else:
                with watched(self._token, name) as activity:
                    try:
                        work.compute(item, *roots)
                    finally:
                        self._tallies[name] = activity.tally()
        finally:
            self._running.pop(name, None)
        self._deadline.took(time.monotonic() - begun)
        return True

    def wake(self) -> None:
        """Have who waits for news go on without any; a signal's handler may call it."""
        self._ended.put(None)

    def news(self) -> Sequence[ShardNews]:
        """Wait until a shard has ended; none is told where one was not begun any more."""
        moved = warned = time.monotonic()
        while True:
            try:
                ended = self._ended.get(timeout=seconds("watch.look", "5s"))
            except Empty:
                now, patience = time.monotonic(), seconds("watch.no-progress", "60s")
                if now - moved >= patience and now - warned >= patience:
                    warned = now
                    self._say(now, now - moved)
                continue
            if ended is None:
                return []
            name, future = ended
            self._waiting -= 1
            error = future.exception()
            if error is None and not future.result():
                return []
            if error is None:
                self._settled.append(name)
            tally = self._tallies.pop(name, Tally())
            return [ShardNews(name, error, isinstance(error, Exception), tally=tally)]

    def settled(self) -> Sequence[str]:
        """Return the shards that were written since this was asked last."""
        settled, self._settled = self._settled, []
        return settled

    def _say(self, now: float, passed: float) -> None:
        oldest = sorted(self._running.items(), key=lambda item: item[1])
        text = first_of((f"{name} for {now - since:.0f} s" for name, since in oldest), MAX_NAMED)
        line = f"nothing has begun or ended for {passed:.0f} s; running: {text}"
        _log.warning("%s: %s", self._subject, line)
        self._progress.note(f"{self._subject}: {line}")


def threads_that_fit() -> int:
    """Return as many threads as Dask's ``num_workers`` says; else one a core, but no more than memory allows."""
    configured = dask.config.get("num_workers", None)
    if configured is not None:
        return max(1, int(configured))
    return max(1, min(CPU_COUNT, (memory_here() - needed_bytes(0)) // MOST_TASK_BYTES))
