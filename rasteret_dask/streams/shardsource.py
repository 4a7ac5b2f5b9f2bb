# SPDX-License-Identifier: Apache-2.0
"""Who reads shards for a stream: the protocol, and threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import dask.config
import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from rasteret_dask.net.lending import Lender
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Held, Part

__all__ = ["OnThreads", "ShardSource", "span_of"]


class ShardSource(Protocol):
    """Reads shards for one stream; all calls come from one thread."""

    ahead: int
    """Shards that should be under way beyond those that are wanted now, to keep all readers busy."""

    def submit(self, shard: int, rows: Sequence[NDArray[np.int64]]) -> list[Any]:
        """Begin to read a shard; return a handle for each part of it. Parts nobody holds or collects cost nothing."""

    def collect(self, handles: Sequence[Any], timeout: float) -> list[Part] | None:
        """Return these parts and let go of them, or None where they are not all there in time (seconds)."""

    def close(self) -> None:
        """Let go of everything."""


class OnThreads:
    """Reads on threads of this process, as many as Dask's ``num_workers`` says."""

    def __init__(self, reading: ChipShards) -> None:
        threads = int(dask.config.get("num_workers", None) or CPU_COUNT)
        self.ahead = threads
        self._reading = reading
        self._memory = Lender()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rasteret-stream")

    def submit(self, shard: int, rows: Sequence[NDArray[np.int64]]) -> list[Any]:
        """Begin to read a shard, or the part of it that all rows lie in, once for all of them."""
        span = span_of(self._reading, shard, rows)
        read = self._pool.submit(self._read, shard, span)
        return [_Rows(read, own if span is None else own - span.start) for own in rows]

    def _read(self, shard: int, span: slice | None) -> Held:
        if not threading.main_thread().is_alive():  # the process ends: it need not wait for what is queued
            raise CancelledError
        if span is None or self._reading.parts is None:
            return self._reading.read(shard, self._memory)
        return self._reading.parts.read(shard, span, self._memory)

    def collect(self, handles: Sequence[Any], timeout: float) -> list[Part] | None:
        """Return parts, or None where a shard is not read in time."""
        waiting = {handle.read for handle in handles if not handle.read.done()}
        # not by result(timeout): a TimeoutError may be what reading ended with
        if waiting and wait(waiting, timeout).not_done:
            return None
        return [(handle.read.result(), handle.rows) for handle in handles]

    def close(self) -> None:
        """Read nothing more; what is being read ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def span_of(reading: ChipShards, shard: int, rows: Sequence[NDArray[np.int64]]) -> slice | None:
    """Return the part of a shard that has to be read for some of its rows; None: all of it."""
    if reading.parts is None:
        return None
    every = np.concatenate(rows)
    start, stop = int(every.min()), int(every.max()) + 1
    return None if stop - start == reading.sizes[shard] else slice(start, stop)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A part of a shard that a thread reads; the shard is held for as long as one of its parts is."""

    read: Future[Held]
    rows: NDArray[np.int64]
