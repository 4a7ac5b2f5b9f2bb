"""What several worker processes fetch of a job: neighbours are computed by one, and what two need comes twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product

from rasteret_dask.reader.readplan import tiles_of
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.keptbytes import MOST_KEPT_BYTES, kept_bytes
from rasteret_dask.tasks.runs import Cuts, Workforce

__all__ = ["Fetching", "fetching"]

EXACT_SHARDS = 48
"""Tiles of this many shards are counted one by one; beyond, the borders of runs are weighed by what is shared there."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """What all processes together fetch, at most, where none is lost."""

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
        counted = [_tiles(job, [shards[at] for at in part]) for part in parts]
        sizes = [size for one in counted for size in one.values()]
        return Fetching(
            len(runs), len(sizes), None if None in sizes else sum(filter(None, sizes)), exact=True
        )
    borders = [part[0] - 1 for part in parts if part[0]]
    times = 1 + int(cuts.shared[borders].sum()) / max(cuts.total, 1)
    return Fetching(len(runs), round(tiles * times), nbytes and round(nbytes * times), exact=False)


def _tiles(job: Job, shards: Sequence[Shard]) -> dict[tuple[str, int, int, int], int | None]:
    """Return the tiles that shards need, by file, plane, level and number, and their compressed bytes."""
    result: dict[tuple[str, int, int, int], int | None] = {}
    for shard, source in product(shards, range(len(job.sources))):
        for request in pixels.requests_of(job, shard, source)[0]:
            level, tiles = tiles_of(request)
            asset = request.asset
            plane = asset.band_index if asset.image.planar == 2 else 0
            sizes = asset.levels[level].tile_byte_counts
            result |= {(asset.href, plane, level, tile): sizes[tile] if sizes else None for tile in tiles}
    return result
