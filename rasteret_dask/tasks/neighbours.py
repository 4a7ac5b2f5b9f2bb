"""What other shards of a job still need of the tiles that one shard reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.tasks.job import Job, Shard

__all__ = ["Neighbours"]

NEAR = 16
"""Shards before and behind, in running order, for which a shard looks after parts of its tiles."""


class Neighbours:
    """The chips of the shards near one in running order, which this process may read too.

    Parameters
    ----------
    job, shard, source
        What is read now.
    """

    def __init__(self, job: Job, shard: Shard, source: int) -> None:
        sources, place = len(job.sources), int(job.running[shard.start])
        first = job.first_number + source
        self.number, self.finished = first + place * sources, job.finished
        if self.number in self.finished:  # it is all done anew
            self.finished.clear()
        near = np.flatnonzero(
            (np.abs(job.running - place) <= NEAR) & (job.running >= 0) & (job.running != place)
        )
        self._number = first + job.running[near] * sources
        self._epsg, self._bounds = job.epsg[near], job.bounds[near]

    def meeting(
        self, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the chips of unfinished shards that meet a box: their shards' numbers, and bounds (chip, 4)."""
        bounds = self._bounds
        meets = np.flatnonzero(
            (bounds[:, :2] < box[2:]).all(axis=1)
            & (bounds[:, 2:] > box[:2]).all(axis=1)
            & (self._epsg == epsg)
        )
        todo = [at for at in meets.tolist() if int(self._number[at]) not in self.finished]
        return self._number[todo], bounds[todo]

    def finish(self) -> None:
        """Note that this shard is read."""
        self.finished.add(self.number)
