"""One shard's cubes, cut into chips: which window of which record each chip needs, before any pixel is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.cubes.cube import GroupCube, compact_groups, group_cube
from rasteret_dask.planning.resolve import Member, SourcePlan
from rasteret_dask.reader.pixelgrid import Window
from rasteret_dask.tasks.job import Job, Shard

__all__ = ["Cut", "Feed", "Harmonized", "MemberCubes", "cubes", "cut", "harmonized"]


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
    """The cubes of one member over one shard: nothing is read yet."""

    member: Member
    number: int
    groups: tuple[GroupCube, ...]


@dataclass(frozen=True)
class Cut:
    """Lazy windows: where each (record, band) of a chip is read, and in which cube."""

    member: Member
    number: int
    group_of: Mapping[int, int]
    """Chip -> its group."""
    groups: tuple[GroupCube, ...]

    def window(self, chip: int) -> tuple[GroupCube, Window]:
        """Return a chip's cube and its window in it."""
        group = self.groups[self.group_of[chip]]
        return group, group.windows[chip]


@dataclass(frozen=True)
class Harmonized:
    """Lazy windows with the rules that make their values comparable."""

    cut: Cut
    plan: SourcePlan


def cubes(job: Job, shard: Shard, source: int, member: int) -> MemberCubes:
    """Make a stackstac cube per compact group of the shard's chips that this member feeds."""
    plan, records = job.sources[source], job.records[source]
    own = plan.members[member]
    feed = Feed.of(job, shard, source)
    feed = feed.take(job.members[source][feed.row] == member)
    chips = np.unique(feed.chip)
    bounds, epsg = job.bounds[shard.start : shard.stop], job.epsg[shard.start : shard.stop]
    bands = [b for b in dict.fromkeys((*own.bands, own.quality)) if b is not None]
    groups = []
    for run in compact_groups(epsg[chips], bounds[chips]):
        inside = chips[run]
        rows = np.unique(feed.row[np.isin(feed.chip, inside)]).tolist()
        code = int(epsg[inside[0]])
        groups.append(group_cube(records, rows, bands, code, inside, bounds[inside], plan.resolution))
    return MemberCubes(own, member, tuple(groups))


def cut(found: MemberCubes) -> Cut:
    """Cut the cubes into chips."""
    group_of = {chip: number for number, group in enumerate(found.groups) for chip in group.windows}
    return Cut(found.member, found.number, group_of, found.groups)


def harmonized(found: Cut, plan: SourcePlan) -> Harmonized:
    """Attach the source's rules: units, masks and kernels are applied where pixels are read."""
    return Harmonized(found, plan)
