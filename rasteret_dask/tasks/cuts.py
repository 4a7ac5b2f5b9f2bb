# SPDX-License-Identifier: Apache-2.0
"""One shard's cubes, cut into chips: which window of which record each chip needs, before any pixel is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.cubes.cube import GroupCube, compact_groups, group_cube
from rasteret_dask.planning.resolve import Member
from rasteret_dask.reader.pixelgrid import Window
from rasteret_dask.tasks.job import Job, Shard

__all__ = ["Feed", "Group", "MemberCubes", "cubes", "groups"]


@dataclass(frozen=True)
class Feed:
    """One shard's feed entries of one source; all arrays have one entry per (chip, slot, record)."""

    chip: NDArray[np.int64]
    """Place of the chip in the shard."""
    slot: NDArray[np.int64]
    order: NDArray[np.int64]
    row: NDArray[np.int64]

    @classmethod
    def of(cls, job: Job, shard: Shard, source: int) -> Feed:
        """Take a shard's entries from the job's chip table."""
        feeds = job.feeds
        span = slice(feeds.offsets[shard.start], feeds.offsets[shard.stop])
        count = np.diff(feeds.offsets[shard.start : shard.stop + 1])
        chip = np.repeat(np.arange(shard.stop - shard.start), count)
        own = feeds.source[span] == source
        return cls(chip[own], feeds.slot[span][own], feeds.order[span][own], feeds.row[span][own])

    def take(self, at: NDArray[Any]) -> Feed:
        """Return some entries."""
        return Feed(self.chip[at], self.slot[at], self.order[at], self.row[at])


@dataclass(frozen=True)
class MemberCubes:
    """The cubes of one member over one shard, cut into chips: nothing is read yet."""

    member: Member
    number: int
    groups: tuple[GroupCube, ...]
    group_of: Mapping[int, int]
    """Chip -> its group."""

    @classmethod
    def of(cls, member: Member, number: int, groups: Sequence[GroupCube]) -> MemberCubes:
        """Note which group each chip lies in."""
        group_of = {chip: at for at, group in enumerate(groups) for chip in group.windows}
        return cls(member, number, tuple(groups), group_of)

    def window(self, chip: int) -> tuple[GroupCube, Window]:
        """Return a chip's cube and its window in it."""
        group = self.groups[self.group_of[chip]]
        return group, group.windows[chip]


@dataclass(frozen=True, slots=True)
class Group:
    """A compact group of a shard's chips, with what one member of a source feeds them."""

    epsg: int
    chips: NDArray[np.int64]
    """Places in the shard, rising."""
    bounds: NDArray[np.float64]
    """Shape (chip, 4): xmin, ymin, xmax, ymax, of ``chips``."""
    feed: Feed
    pixel: tuple[float, float]
    """Width and height of a pixel."""


def groups(job: Job, shard: Shard, source: int, member: int) -> Iterator[Group]:
    """Yield the compact groups of the shard's chips that this member feeds."""
    feed = Feed.of(job, shard, source)
    if len(job.sources[source].members) > 1:
        feed = feed.take(job.members[source][feed.row] == member)
    chips = np.flatnonzero(np.bincount(feed.chip))
    own = slice(shard.start, shard.stop)
    bounds, epsg = job.windows(source, own), job.epsg[own]
    for run in _parts(job, source, epsg[chips], bounds[chips]):
        inside = chips[run]
        some = feed if len(inside) == len(chips) else feed.take(np.isin(feed.chip, inside))
        pixel = job.pixel(source, bounds[inside[0]])
        yield Group(int(epsg[inside[0]]), inside, bounds[inside], some, pixel)


def _parts(
    job: Job, source: int, epsg: NDArray[np.int64], bounds: NDArray[np.float64]
) -> Iterator[NDArray[np.int64]]:
    """Yield compact groups of chips; those that are files each alone, as no two share a pixel grid for sure."""
    if job.sources[source].by_file:
        yield from np.arange(len(epsg)).reshape(-1, 1)
    else:
        yield from compact_groups(epsg, bounds)


def cubes(job: Job, shard: Shard, source: int, member: int) -> MemberCubes:
    """Make a stackstac cube per compact group of the shard's chips that this member feeds."""
    plan, records = job.sources[source], job.records[source]
    own, parts = plan.members[member], list(groups(job, shard, source, member))
    for group in parts:
        records.look_up(np.unique(group.feed.row).tolist(), own.reads)
    made = [
        group_cube(
            records, np.unique(group.feed.row).tolist(), own.reads, group.epsg, group.chips, group.bounds,
            group.pixel,
        )
        for group in parts
    ]  # fmt: skip
    return MemberCubes.of(own, member, made)
