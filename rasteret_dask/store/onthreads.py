"""A job's shards on threads of this process, where there is no cluster: nothing is started or imported for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil
from dask.system import CPU_COUNT

from rasteret_dask.progress import Progress, seconds
from rasteret_dask.store.runtasks import Run, ShardNews, Work
from rasteret_dask.tasks.freezing import SHARD_BYTES
from rasteret_dask.tasks.runs import Workforce

__all__ = ["ThreadTasks", "threads_that_fit"]

_log = logging.getLogger(__name__)

PROCESS_BYTES = 800e6
"""A process's memory beside its shards, kept tiles among it: each thread takes three times a shard on top."""
MAX_NAMED = 5
"""Tasks that a line names."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class ThreadTasks:
    """Threads that compute shards: decoding, warping and compressing leave Python's lock alone.

    Each thread computes one shard at a time, in the order in which they were sent.

    Parameters
    ----------
    count
        How many threads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="rasteret-shard")
        self._waiting = 0
        self._ended: SimpleQueue[tuple[str, Future[Any]]] = SimpleQueue()
        self._running: dict[str, float] = {}
        self._subject, self._progress = "", Progress("shards", shown=False)

    @property
    def force(self) -> Workforce:
        """Return this process, with its threads."""
        return Workforce(1, self.count)

    @property
    def unfinished(self) -> int:
        """Number of shards that were sent and have not ended."""
        return self._waiting

    @contextmanager
    def watched(self, work: Work, run: Run, subject: str, progress: Progress) -> Iterator[None]:
        """Say what stands still for the length of a block; at its end nothing runs any more, and nothing waits."""
        self._subject, self._progress = subject, progress
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

    def _compute(self, name: str, work: Work, item: Any, roots: tuple[Any, ...]) -> None:
        self._running[name] = time.monotonic()
        try:
            work.compute(item, *roots)
        finally:
            self._running.pop(name, None)

    def news(self) -> Sequence[ShardNews]:
        """Wait until a shard has ended."""
        moved = warned = time.monotonic()
        while True:
            try:
                name, future = self._ended.get(timeout=seconds("watch.look", "5s"))
            except Empty:
                self._progress.tick(f", {len(self._running)} running on {self.count} threads")
                now, patience = time.monotonic(), seconds("watch.no-progress", "60s")
                if now - moved >= patience and now - warned >= patience:
                    warned = now
                    self._say(now, now - moved)
                continue
            self._waiting -= 1
            error = future.exception()
            return [ShardNews(name, error, isinstance(error, Exception))]

    def _say(self, now: float, passed: float) -> None:
        oldest = sorted(self._running.items(), key=lambda item: item[1])
        text = ", ".join(f"{name} for {now - since:.0f} s" for name, since in oldest[:MAX_NAMED])
        more = f", and {len(oldest) - MAX_NAMED} more" if len(oldest) > MAX_NAMED else ""
        line = f"nothing has begun or ended for {passed:.0f} s; running: {text}{more}"
        _log.warning("%s: %s", self._subject, line)
        self._progress.note(f"{self._subject}: {line}")


def threads_that_fit() -> int:
    """Return a thread a core, but no more than there is memory for."""
    limit = float(psutil.virtual_memory().total)
    for path in _LIMITS:
        try:
            limit = min(limit, float(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(1, min(CPU_COUNT, int((limit - PROCESS_BYTES) // (3 * SHARD_BYTES))))
