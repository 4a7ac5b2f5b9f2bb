# SPDX-License-Identifier: Apache-2.0
"""What a process does at the same time: threads a host, workers a core, and bytes under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Event, Lock, local

import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from rasteret_dask.net.hrefs import host_of

__all__ = ["BUDGET", "ByteBudget", "host_of", "on_cores", "pool", "scratch", "workers"]

HOST_REQUESTS = 32
"""Requests that a process has under way at one host."""

_SCRATCH_BYTES = 8 * 2**20
"""Memory to decode into that a thread keeps, at most."""


class ByteBudget:
    """Bytes that all threads of a process together may hold for reads under way; who asks for more waits in line.

    Parameters
    ----------
    nbytes
        The budget. One demand above it is let in alone, so that nothing waits for ever.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free = nbytes
        self._lock = Lock()
        self._line: deque[tuple[int, Event]] = deque()

    def take(self, nbytes: int) -> None:
        """Take a part of the budget, to be given back by whoever is done with the bytes."""
        share = min(nbytes, self.nbytes)
        with self._lock:
            if not self._line and self._free >= share:
                self._free -= share
                return
            turn = Event()
            self._line.append((share, turn))
        turn.wait()

    def give(self, nbytes: int) -> None:
        """Give it back."""
        with self._lock:
            self._free += min(nbytes, self.nbytes)
            while self._line and self._free >= self._line[0][0]:
                share, turn = self._line.popleft()
                self._free -= share
                turn.set()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Hold a part of the budget for the length of a block."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.give(nbytes)


BUDGET = ByteBudget(max(48, 24 * CPU_COUNT) * 2**20)
"""The process's budget for bytes asked for and not yet decoded: a core decodes some 200 tiles of 1.4 MB a second."""


@cache
def pool(host: str) -> ThreadPoolExecutor:
    """Return the process's threads for one host ("" for local files); see :func:`rasteret_dask.net.hrefs.host_of`."""
    threads = HOST_REQUESTS if host else 2 * CPU_COUNT
    return ThreadPoolExecutor(threads, thread_name_prefix=f"rasteret-read-{host or 'local'}")


@cache
def workers() -> ThreadPoolExecutor:
    """Return the process's threads for work on pixels: one a core."""
    return ThreadPoolExecutor(CPU_COUNT, thread_name_prefix="rasteret-work")


def on_cores(works: Sequence[Callable[[], None]]) -> None:
    """Do all works: a share of them on this thread, and one on a worker of each further core.

    A batch is waited for as a whole, so that it takes one handover a core, however many parts it is made of.
    """
    others = [workers().submit(_each, share) for n in range(1, CPU_COUNT) if (share := works[n::CPU_COUNT])]
    _each(works[::CPU_COUNT])
    for other in others:
        other.result()


def _each(works: Sequence[Callable[[], None]]) -> None:
    for work in works:
        work()


_SCRATCH = local()


def scratch(nbytes: int) -> NDArray[np.uint8]:
    """Return this thread's memory to decode into, at least ``nbytes`` long; what it held is gone."""
    memory: NDArray[np.uint8] | None = getattr(_SCRATCH, "memory", None)
    if memory is None or len(memory) < nbytes:
        memory = np.empty(nbytes, np.uint8)
        if nbytes <= _SCRATCH_BYTES:
            _SCRATCH.memory = memory
    return memory


def _renew() -> None:
    """Start anew in a forked child: threads and whoever held a lock stayed in its parent."""
    pool.cache_clear()
    workers.cache_clear()
    ByteBudget.__init__(BUDGET, BUDGET.nbytes)


os.register_at_fork(after_in_child=_renew)
