# SPDX-License-Identifier: Apache-2.0
"""How much of each chip its quality band calls cloud, as it stands in the files."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import Member, SourcePlan
from rasteret_dask.rules.picks import Closest, Ranked
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.units import Raw
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.picking import Picking

__all__ = ["cloud_fractions", "has_clouds"]

_UNKNOWN = -1
_QUALITY = "bitfield"
"""What quality bands are here: neither averaged nor scaled."""


def has_clouds(plan: SourcePlan) -> bool:
    """Tell whether every member of a source has a quality band."""
    return all(m.clouds is not None for m in plan.members)


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
    members = tuple(Member(m.name, _needed(m)) for m in plan.members)
    number = max(len(m.bands) for m in members)
    members = tuple(replace(m, bands=(*m.bands, *m.bands[:1] * (number - len(m.bands)))) for m in members)
    pick = plan.pick if isinstance(plan.pick, Ranked) else Closest()
    rules = PixelRules((Raw(),) * number, (_QUALITY,) * number, pick, StoredForm("int32", _UNKNOWN))
    bands = tuple(f"quality {at}" for at in range(number))
    bare = replace(plan, members=members, bands=bands, rules=rules, resampling=None, maps=(), meta=())
    own = replace(job, sources=(*job.sources[:source], bare, *job.sources[source + 1 :]))
    read = Picking(own, shard, source, pixels.members_of(own, shard, source)).read(on_error, later=_Alone())
    cloudy = np.zeros(len(read.values), dtype=np.int64)
    for member in plan.members:
        picked = read.member == member.name
        assert member.clouds is not None
        for chip, slot in np.argwhere(picked).tolist():
            bad = member.clouds.hidden(*read.values[chip, slot, : len(_needed(member))])
            cloudy[chip] += np.count_nonzero(bad & read.valid[chip, slot])
    known = np.count_nonzero(read.valid, axis=(1, 2, 3))
    return np.asarray(cloudy / np.maximum(known, 1)), read.unreadable


def _needed(member: Member) -> tuple[str, ...]:
    return () if member.clouds is None else member.clouds.needs


class _Alone:
    """No other task needs parts of these tiles."""

    number = -1
    finished: AbstractSet[int] = frozenset()

    kept_bytes = 0

    def meeting(
        self, record: str, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return nothing."""
        return np.zeros(0, dtype=np.int64), np.zeros((0, 4))

    def finish(self) -> list[int]:
        """Return nothing."""
        return []
