"""Where the records of a job are wanted, and with which kernels they are read."""

from __future__ import annotations

import numpy as np

from rasteret_dask.reader.kernels import BandReading, RecordWindow, band_readings, warn_averaged
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.tasks.job import Job

__all__ = ["job_readings", "warn_of_job"]


def job_readings(job: Job) -> dict[str, dict[str, BandReading]]:
    """Return source -> band -> how it is read."""
    return {
        plan.name: band_readings(plan, records, _places(job, number))
        for number, (plan, records) in enumerate(zip(job.sources, job.records, strict=True))
    }


def warn_of_job(job: Job) -> None:
    """Warn of bands of integers that are averaged although nobody says what they are."""
    for number, (plan, records) in enumerate(zip(job.sources, job.records, strict=True)):
        if any(band.kind is None for band in plan.kinds):
            warn_averaged(plan, records, _places(job, number))


def _places(job: Job, number: int) -> list[RecordWindow]:
    """Return where a source's records are wanted: of equal grids one chip."""
    feeds, plan, side = job.feeds, job.sources[number], job.size_px[number]
    own = feeds.source == number
    row, chip = feeds.row[own], feeds.chip[own]
    corner = job.bounds[chip][:, [0, 3]]
    phase = np.round(corner / plan.resolution % 1.0, 6) % 1.0
    key = np.column_stack([row, job.epsg[chip], phase])
    _, first = np.unique(key, axis=0, return_index=True)
    members = job.members[number]
    window = Window(0, 0, side, side)
    return [
        RecordWindow(
            int(row[i]),
            int(members[row[i]]),
            Grid(
                int(job.epsg[chip[i]]),
                float(corner[i, 0]),
                float(corner[i, 1]),
                plan.resolution,
                plan.resolution,
            ),
            window,
        )
        for i in np.sort(first)
    ]
