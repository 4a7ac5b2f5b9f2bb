# SPDX-License-Identifier: Apache-2.0
"""Where the records of a job are wanted, and with which kernels they are read."""

from __future__ import annotations

import numpy as np

from rasteret_dask.reader.kernels import BandReading, Places, band_readings, grids_alike, warn_averaged
from rasteret_dask.tasks.job import Job

__all__ = ["job_readings", "warn_of_job"]


def job_readings(job: Job) -> dict[str, dict[str, BandReading]]:
    """Return source -> band -> how it is read."""
    return {
        plan.name: band_readings(plan, layouts, _places(job, number))
        for number, (plan, layouts) in enumerate(zip(job.sources, job.layouts, strict=True))
    }


def warn_of_job(job: Job) -> None:
    """Warn of bands of integers that are averaged although nobody says what they are."""
    for number, (plan, layouts) in enumerate(zip(job.sources, job.layouts, strict=True)):
        if any(band.kind is None for band in plan.kinds):
            warn_averaged(plan, layouts, _places(job, number))


def _places(job: Job, number: int) -> Places:
    """Return where a source's records are wanted: of equal grids one chip."""
    windows = job.windows(number)
    first = windows[0] if len(windows) else np.array([0.0, 0.0, 1.0, 1.0])
    corner, pixel = windows[:, [0, 3]], job.pixel(number, first)
    row, chip = job.feeds.wanted(number, grids_alike(job.epsg, corner, pixel))
    if job.sources[number].by_file:  # pixels of files differ in size: told of those with the first one's
        sides = windows[chip, 2:] - windows[chip, :2]
        alike = np.isclose(sides, first[2:] - first[:2], rtol=1e-9).all(axis=1)
        row, chip = row[alike], chip[alike]
    return Places(row, job.members[number][row], job.epsg[chip], corner[chip], pixel)
