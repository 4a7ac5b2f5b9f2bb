"""A job's tasks on threads of this process, where there is no cluster: nothing has to be started or imported for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil
from dask.system import CPU_COUNT

from rasteret_dask.net import signatures
from rasteret_dask.progress import Progress, seconds
from rasteret_dask.tasks.freezing import SHARD_BYTES
from rasteret_dask.tasks.job import Job

__all__ = ["ThreadTasks", "threads_that_fit"]

_log = logging.getLogger(__name__)

PROCESS_BYTES = 800e6
"""A process's memory beside its shards, kept tiles among it: each thread takes three times a shard on top."""
MAX_NAMED = 5
"""Tasks that a line names."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class ThreadTasks:
    """Threads that compute tasks: decoding, warping and compressing leave Python's lock alone.

    Each thread calls one fused task at a time, in the order in which they were sent.

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
        self._names: Mapping[str, str] = {}
        self._subject, self._progress = "", Progress("tasks", shown=False)

    @contextmanager
    def watched(
        self, graph: Mapping[Hashable, Any], names: Mapping[str, str], subject: str, progress: Progress
    ) -> Iterator[None]:
        """Say what stands still for the length of a block; at its end nothing runs any more, and nothing waits."""
        self._names, self._subject, self._progress = names, subject, progress
        try:
            yield
        finally:
            # also when it is interrupted: nothing is written once the call has returned
            self._pool.shutdown(wait=True, cancel_futures=True)

    def sign(self, job: Job, url: str) -> None:
        """Look whether this process can sign what a job reads and writes."""
        signatures.send(None, job.hrefs(), job.signed)
        signatures.send_place(None, url)

    def send(self, tasks: Mapping[Hashable, Any], keys: Sequence[str]) -> None:
        """Have some keys computed, in this order, behind those that were sent before."""
        for key in keys:
            self._waiting += 1
            future = self._pool.submit(self._compute, key, tasks)
            future.add_done_callback(lambda done, key=key: self._ended.put((key, done)))  # type: ignore[misc]

    def _compute(self, key: str, tasks: Mapping[Hashable, Any]) -> None:
        self._running[key] = time.monotonic()
        try:
            _result(tasks, key)
        finally:
            self._running.pop(key, None)

    def ended(self) -> Iterator[tuple[str, BaseException | None]]:
        """Yield each key as it ends, with its error."""
        moved = said = time.monotonic()
        while self._waiting:
            try:
                key, future = self._ended.get(timeout=seconds("watch.look", "5s"))
            except Empty:
                self._progress.tick(f", {len(self._running)} running on {self.count} threads")
                now, patience = time.monotonic(), seconds("watch.no-progress", "60s")
                if now - moved >= patience and now - said >= patience:
                    said = now
                    self._say(now, now - moved)
                continue
            self._waiting -= 1
            moved = time.monotonic()
            yield key, future.exception()

    def _say(self, now: float, passed: float) -> None:
        oldest = sorted(self._running.items(), key=lambda item: item[1])
        text = ", ".join(
            f"{self._names.get(key, key)} for {now - since:.0f} s" for key, since in oldest[:MAX_NAMED]
        )
        more = f", and {len(oldest) - MAX_NAMED} more" if len(oldest) > MAX_NAMED else ""
        line = f"nothing has begun or ended for {passed:.0f} s; running: {text}{more}"
        _log.warning("%s: %s", self._subject, line)
        self._progress.note(f"{self._subject}: {line}")

    def may_pass(self, error: BaseException) -> bool:
        """Tell whether a task is worth another try."""
        return isinstance(error, Exception)


def _result(tasks: Mapping[Hashable, Any], key: Hashable) -> Any:
    """Return what a task computes, of those below it: a user's functions, each behind an alias."""
    task = tasks[key]
    return task({name: _result(tasks, name) for name in task.dependencies})


def threads_that_fit() -> int:
    """Return a thread a core, but no more than there is memory for."""
    limit = float(psutil.virtual_memory().total)
    for path in _LIMITS:
        try:
            limit = min(limit, float(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(1, min(CPU_COUNT, int((limit - PROCESS_BYTES) // (3 * SHARD_BYTES))))
