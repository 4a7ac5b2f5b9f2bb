# SPDX-License-Identifier: Apache-2.0
"""A plan's shards, numbered over all, in parts of neighbours: each part is a job of its own, with chips of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock

import numpy as np
import pyarrow as pa

from rasteret_dask.tasks.job import Hierarchy, Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, open_job

__all__ = ["JobOfParts", "JobPart", "PartSpan", "part_job", "parts_of"]


@dataclass(frozen=True, slots=True)
class PartSpan:
    """The shards of one split in one part."""

    split: str | None
    first: int
    """Number of the first shard."""
    start: int
    """First chip, counted within the split."""
    stop: int


def parts_of(counts: Mapping[str | None, int], per_shard: int, chips: int) -> Sequence[tuple[PartSpan, ...]]:
    """Cut the shards of all splits into parts, each over the same ground as far as splits are spread evenly.

    Parameters
    ----------
    counts
        Split -> its chips, in the order of splits.
    per_shard
        Chips of a shard.
    chips
        About how many chips a part has.

    Returns
    -------
    sequence
        For each part, a span of every split; it may be empty.
    """
    number = max(1, round(sum(counts.values()) / chips))
    parts: list[list[PartSpan]] = [[] for _ in range(number)]
    for split, count in counts.items():
        edges = np.round(np.arange(number + 1) * (-(-count // per_shard) / number)).astype(int).tolist()
        for part, first, last in zip(parts, edges[:-1], edges[1:], strict=True):
            part.append(PartSpan(split, first, min(first * per_shard, count), min(last * per_shard, count)))
    return [tuple(part) for part in parts if any(span.stop > span.start for span in part)]


@dataclass(frozen=True)
class JobPart:
    """Where a part of a job lies, and its shards in the order in which they run."""

    ref: JobRef
    shards: tuple[Shard, ...]


def _no_tables() -> Iterator[pa.Table]:
    return iter(())


def _no_rows(split: str | None, start: int, stop: int) -> pa.Table:
    return pa.table({})


@dataclass(frozen=True)
class JobOfParts(Job):
    """A job of more chips than are in memory: its table of chips has no rows."""

    parts: tuple[JobPart, ...] = ()
    part_keys: Mapping[str, str] = field(default_factory=dict)
    """Shard -> its key."""
    tables: Callable[[], Iterator[pa.Table]] = _no_tables
    """Returns the whole table of chips, split by split, some rows at a time."""
    rows: Callable[[str | None, int, int], pa.Table] = _no_rows
    """``rows(split, start, stop)`` returns what a store's coordinates say of some chips of a split."""

    @property
    def keys(self) -> Mapping[str, str]:  # type: ignore[override]
        """For each shard's name, the sha256 of what decides its pixels."""
        return self.part_keys

    def coordinates(self, hierarchy: Hierarchy, start: int, stop: int) -> pa.Table:
        """Return what a store's coordinates say of some chips."""
        return self.rows(hierarchy.split, start, stop)

    def chip_tables(self) -> Iterator[pa.Table]:
        """Yield the rows of the table of chips."""
        return self.tables()


_OPENING = Lock()


def part_job(ref: JobRef, whole: str) -> Job:
    """Open a part of a job, once per process; ``whole`` is the digest of the job that it is a part of."""
    with _OPENING:
        return _part(ref, whole)


@lru_cache(maxsize=4)
def _part(ref: JobRef, whole: str) -> Job:
    return replace(open_job(ref.url, ref.digest), part_of=whole)
