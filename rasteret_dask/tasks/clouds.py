"""How much of each chip its quality band calls cloud, as it stands in the files."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import SourcePlan
from rasteret_dask.reader import harmonize
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.picking import Picking

__all__ = ["cloud_fractions", "has_clouds"]

_UNKNOWN = -1


def has_clouds(plan: SourcePlan) -> bool:
    """Tell whether every member of a source has a quality band."""
    return all(m.quality is not None for m in plan.members)


def cloud_fractions(
    job: Job, shard: Shard, source: int, on_error: str = "raise"
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the share of clouds and their shadows among the pixels that are known, over all slots.

    The quality bands of the very records are read that the source's own pixels come from, unmasked.

    Parameters
    ----------
    job, shard, source
        What to look at: a source whose picks are decided by the plan.
    on_error
        See :func:`rasteret_dask.tasks.shards.lower`.

    Returns
    -------
    shares, unreadable
        Shape (chip,), 0 where nothing is known; and one line a tile that could not be read.
    """
    plan = job.sources[source]
    members = tuple(
        replace(m, bands=(str(m.quality),), quality=None, quality_kind=None) for m in plan.members
    )
    bare = replace(
        plan, members=members, bands=("quality",), units="raw", dtype="int32", fill=float(_UNKNOWN),
        resampling=None, mask=(), maps=(),
    )  # fmt: skip
    own = replace(job, sources=(*job.sources[:source], bare, *job.sources[source + 1 :]))
    read = Picking(own, shard, source, pixels.members_of(own, shard, source)).read(on_error, later=_Alone())
    cloudy = np.zeros(len(read.values), dtype=np.int64)
    for member in plan.members:
        picked = read.member == member.name
        for chip, slot in np.argwhere(picked).tolist():
            bad = harmonize.bad_pixels(read.values[chip, slot, 0], str(member.quality_kind), ("clouds",))
            cloudy[chip] += np.count_nonzero(bad & read.valid[chip, slot])
    known = np.count_nonzero(read.valid, axis=(1, 2, 3))
    return np.asarray(cloudy / np.maximum(known, 1)), read.unreadable


class _Alone:
    """No other task needs parts of these tiles."""

    number = -1
    finished: AbstractSet[int] = frozenset()

    def meeting(
        self, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return nothing."""
        return np.zeros(0, dtype=np.int64), np.zeros((0, 4))

    def finish(self) -> None:
        """Do nothing."""
