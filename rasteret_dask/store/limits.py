# SPDX-License-Identifier: Apache-2.0
"""A run under way, within its limits: its clock, and the file that shows it is alive."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.store.heartbeat import Heartbeat

__all__ = ["Bounds", "Deadline", "begun"]


@contextmanager
def begun(limits: RunLimits) -> Iterator[Bounds]:
    """Show that a run is alive for the length of a block, from before its chips are planned."""
    with Heartbeat(None if limits.heartbeat is None else os.fspath(limits.heartbeat)) as heartbeat:
        yield Bounds(limits, Deadline(limits.ends), heartbeat)


class Deadline:
    """Tells whether one more shard may begin: one that takes as long as the slowest so far must end in time.

    Parameters
    ----------
    ends
        When the time is over, by ``time.monotonic``; None: never.
    """

    def __init__(self, ends: float | None = None) -> None:
        self._ends, self._slowest = ends, 0.0
        self._lock = threading.Lock()

    @property
    def left_s(self) -> float | None:
        """Seconds during which shards may begin; None: for ever."""
        return None if self._ends is None else self._ends - self._slowest - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether no further shard is to begin."""
        left = self.left_s
        return left is not None and left <= 0

    def took(self, seconds: float) -> None:
        """Note how long a shard has taken."""
        with self._lock:
            self._slowest = max(self._slowest, seconds)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A run under way: its limits, its clock, and the file that shows it is alive."""

    limits: RunLimits = NO_LIMITS
    deadline: Deadline = field(default_factory=Deadline)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
