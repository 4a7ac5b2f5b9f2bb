# SPDX-License-Identifier: Apache-2.0
"""What several worker processes fetch of a job: neighbours are computed by one, and what two need comes twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import TypeAlias

from rasteret_dask.reader.readplan import tiles_of
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.keptbytes import MOST_KEPT_BYTES, kept_bytes
from rasteret_dask.tasks.runs import REPEATED, Cuts, Workforce

__all__ = ["Fetching", "fetching"]

_Tile: TypeAlias = tuple[str, int, int, int]
"""File, plane, level, number."""

EXACT_SHARDS = 48
"""Tiles of this many shards are counted one by one; beyond, the borders of runs are weighed by what is shared there."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """What all processes together fetch, at most, where none is lost.

    A tenth of all tiles is for processes that take over a part of another's run, as they are done sooner.
    """

    tasks: int
    """Runs of neighbouring shards."""
    requests: int
    """Tiles; neighbouring ones of a file become one request."""
    read_bytes: int | None
    """Compressed; None where files do not tell the sizes of their tiles."""
    exact: bool
    """Whether tiles were counted one by one."""


def fetching(job: Job, force: Workforce, tiles: int, nbytes: int | None) -> Fetching:
    """Count what processes fetch of a job.

    Parameters
    ----------
    job
        The job.
    force
        Its processes, all there from the beginning.
    tiles, nbytes
        All tiles of the job, and their bytes.
    """
    shards = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
    cuts = Cuts.of(job)
    runs = list(chain.from_iterable(cuts.rounds(range(len(shards)), force)))
    parts = [tuple(range(len(shards)))] if force.processes == 1 else runs
    if kept_bytes(job, force.threads) >= MOST_KEPT_BYTES:  # a process does not keep all that it needs again
        parts = [(at,) for at in range(len(shards))]
    if len(shards) <= EXACT_SHARDS:
        each = [_tiles(job, [shard]) for shard in shards]
        in_parts = [size for part in parts for size in _together(each, part).values()]
        once = list(_together(each, range(len(shards))).values())
        alone = [size for one in each for size in one.values()]
        extra = 0.0 if len(parts) == 1 else REPEATED
        return Fetching(
            len(runs),
            min(int(len(in_parts) + extra * len(once)), len(alone)),
            None if None in once else min(int(_sum(in_parts) + extra * _sum(once)), _sum(alone)),
            exact=True,
        )
    times = 1 + cuts.paid(parts) / max(cuts.total, 1) + (REPEATED if len(parts) > 1 else 0)
    return Fetching(len(runs), round(tiles * times), nbytes and round(nbytes * times), exact=False)


def _together(each: Sequence[Mapping[_Tile, int | None]], part: Iterable[int]) -> dict[_Tile, int | None]:
    """Return the tiles that some of the shards need, each once."""
    return {tile: size for at in part for tile, size in each[at].items()}


def _sum(sizes: Iterable[int | None]) -> int:
    return sum(filter(None, sizes))


def _tiles(job: Job, shards: Sequence[Shard]) -> dict[_Tile, int | None]:
    """Return the tiles that shards need, and their compressed bytes."""
    result: dict[_Tile, int | None] = {}
    for shard, source in product(shards, range(len(job.sources))):
        for request in pixels.requests_of(job, shard, source)[0]:
            level, tiles = tiles_of(request)
            asset = request.asset
            plane = asset.band_index if asset.image.planar == 2 else 0
            sizes = asset.levels[level].tile_byte_counts
            result |= {(asset.href, plane, level, tile): sizes[tile] if sizes else None for tile in tiles}
    return result
