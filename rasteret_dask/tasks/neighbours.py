# SPDX-License-Identifier: Apache-2.0
"""What other shards of a job still need of the tiles that one shard reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.keptbytes import kept_bytes
from rasteret_dask.tasks.runs import CREW

__all__ = ["Neighbours"]

BEHIND = 16
"""Shards behind, in running order, that may still be under way; those before them run elsewhere, or failed."""


class Neighbours:
    """The chips of the job's other shards, which this process may read too.

    Parameters
    ----------
    job, shard, source
        What is read now.
    """

    def __init__(self, job: Job, shard: Shard, source: int) -> None:
        self._job, self._source, self._place = job, source, int(job.running[shard.start])
        self._first, self._sources = job.first_number + source, len(job.sources)
        self.number, self.finished = self._number(self._place), job.finished
        if self.number in self.finished:  # it is all done anew
            self.finished.clear()
        self._coming = CREW.places(lambda: job.digest)
        self._chips: dict[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    @property
    def kept_bytes(self) -> int:
        """Pixels that the process keeps at most for all shards of the job."""
        return kept_bytes(self._job)

    def meeting(
        self, record: str, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the chips of unfinished shards that a record feeds and that meet a box.

        Returns
        -------
        tuple
            Their shards' numbers, and their bounds in ``epsg``, shape (chip, 4).
        """
        number, bounds = self._fed_by(record, epsg)
        meets = np.flatnonzero((bounds[:, :2] < box[2:]).all(axis=1) & (bounds[:, 2:] > box[:2]).all(axis=1))
        todo = [at for at in meets.tolist() if int(number[at]) not in self.finished]
        return number[todo], bounds[todo]

    def finish(self) -> list[int]:
        """Note that this shard is read; return the numbers for which nothing need be kept any more."""
        behind = self._number(self._place - BEHIND)
        self.finished.add(self.number)
        others = [self._number(place) for place in CREW.given_up(self._job.digest)]
        return [self.number, *others, *([behind] if behind >= self._first else [])]

    def _number(self, place: int) -> int:
        return self._first + place * self._sources

    def _fed_by(self, record: str, epsg: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the chips of other shards, not far behind, that a record feeds: numbers of shards, and bounds."""
        key = (record, epsg)
        if key not in self._chips:
            job = self._job
            chip = job.chips_of(self._source, record)
            place = job.running[chip]
            here = (place >= max(self._place - BEHIND, 0)) & (place != self._place)
            if self._coming is not None:  # others are for other processes
                here &= np.isin(place, list(self._coming))
            chip = chip[here]
            self._chips[key] = self._number_of(chip), job.bounds_in(chip, epsg, job.reach_m(self._source))
        return self._chips[key]

    def _number_of(self, chip: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self._first + self._job.running[chip] * self._sources)
