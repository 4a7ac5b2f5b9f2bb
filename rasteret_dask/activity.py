# SPDX-License-Identifier: Apache-2.0
"""What this process does at this moment, for whoever watches a job: counters that move while shards are written.

Nothing is counted twice for it: sessions count what they read anyway, and a watched shard only refers to them. Stages
that have ended are told to Dask, whose dashboard shows them as fine performance metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

__all__ = ["NOTHING", "ReadCounts", "ShardActivity", "Tally", "current", "live", "spent", "watched"]

READ_SHARE = 0.95
"""Share of a source's time that its tiles take, about; what is composed afterwards takes the rest."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What was read and written, and how far what is under way has come."""

    tiles: int = 0
    """Tiles decoded."""
    bytes_read: int = 0
    """Bytes fetched."""
    bytes_written: int = 0
    """Bytes handed to the store, compressed."""
    share: float = 0.0
    """Shards under way, each as the share of it that is done."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.tiles + other.tiles,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.share + other.share,
        )

    @property
    def ended(self) -> Tally:
        """The same of what is not under way any more."""
        return Tally(self.tiles, self.bytes_read, self.bytes_written)


NOTHING = Tally()


class ReadCounts(Protocol):
    """Counts of one reading session, while it reads."""

    tiles_wanted: int
    tiles_read: int
    tiles_reused: int
    tiles_masked: int
    bytes_fetched: int


@dataclass(slots=True, eq=False)
class ShardActivity:
    """One shard that is watched: its own thread changes this, and any other may look."""

    sources: int = 1
    """How many the shard has."""
    done: int = 0
    """Sources that are read."""
    sessions: list[ReadCounts] = field(default_factory=list)
    """The counts of each session that reads for it, the latest last."""
    written: int = 0
    """Bytes handed to the store."""

    def tally(self) -> Tally:
        """Return what was done of it so far."""
        sessions = tuple(self.sessions)
        part = 0.0
        if sessions and self.done < self.sources:
            last = sessions[-1]
            landed = last.tiles_read + last.tiles_reused + last.tiles_masked
            part = READ_SHARE * min(landed / max(last.tiles_wanted, 1), 1.0)
        return Tally(
            sum(one.tiles_read for one in sessions),
            sum(one.bytes_fetched for one in sessions),
            self.written,
            (min(self.done, self.sources) + part) / self.sources,
        )


_current: ContextVar[ShardActivity | None] = ContextVar("rasteret_dask.activity", default=None)
_live: dict[tuple[str, str], ShardActivity] = {}
_lock = Lock()
"""Taken when a shard begins or ends, and by who looks."""


def current() -> ShardActivity | None:
    """Return the watched shard that this thread is busy with; None where nobody watches."""
    return _current.get()


@contextmanager
def watched(job: str, shard: str) -> Iterator[ShardActivity]:
    """Let others see what this thread does for a shard, for the length of a block.

    Parameters
    ----------
    job
        What :func:`live` is asked by: a name that no other call has.
    shard
        The shard's name.
    """
    activity = ShardActivity()
    with _lock:
        _live[job, shard] = activity
    token = _current.set(activity)
    try:
        yield activity
    finally:
        _current.reset(token)
        with _lock:
            if _live.get((job, shard)) is activity:  # not of another try, begun meanwhile
                del _live[job, shard]


def live() -> dict[tuple[str, str], Tally]:
    """Return what this process has under way: job and shard -> how far it is."""
    with _lock:
        shards = dict(_live)
    return {pair: activity.tally() for pair, activity in shards.items()}


def spent(stage: str, seconds: float) -> None:
    """Tell Dask how long a stage took, where a worker computes it: its dashboard then tells stages apart."""
    metrics = sys.modules.get("distributed.metrics")
    if metrics is not None:  # outside of a task, nobody listens
        metrics.context_meter.digest_metric(stage, seconds, "seconds")
