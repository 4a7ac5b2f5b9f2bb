"""Where the records of a job are wanted, and with which kernels they are read."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rasteret_dask.reader.kernels import BandReading, RecordGrid, band_readings, warn_averaged
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.tasks.job import Job

__all__ = ["grids_alike", "job_readings", "warn_of_job"]


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


def grids_alike(epsg: NDArray[np.int64], corner: NDArray[np.float64], resolution: float) -> NDArray[np.int64]:
    """Return a number for each chip, the same where pixel edges of a CRS meet, to a millionth of a pixel.

    Parameters
    ----------
    epsg
        Shape (chip,).
    corner
        Shape (chip, 2). x and y of one corner of each.
    resolution
        Pixel size, in units of the CRS.
    """
    phase = np.round(corner / resolution % 1.0, 6) % 1.0
    group = np.zeros(len(epsg), dtype=np.int64)
    for values in (epsg, *phase.T):
        group = pd.factorize(group * len(epsg) + pd.factorize(values)[0])[0]
    return group


def _places(job: Job, number: int) -> list[RecordGrid]:
    """Return where a source's records are wanted: of equal grids one chip."""
    feeds, plan = job.feeds, job.sources[number]
    own = feeds.source == number if len(job.sources) > 1 else slice(None)
    row, chip = feeds.row[own], feeds.chip[own]
    corner = job.bounds[:, [0, 3]]
    group = grids_alike(job.epsg, corner, plan.resolution)
    key = row.astype(np.int64) * (int(group.max(initial=0)) + 1) + group[chip]
    first = np.flatnonzero(~pd.Series(key).duplicated().to_numpy())
    members = job.members[number]
    return [
        RecordGrid(
            int(row[i]),
            int(members[row[i]]),
            Grid(
                int(job.epsg[chip[i]]),
                float(corner[chip[i], 0]),
                float(corner[chip[i], 1]),
                plan.resolution,
                plan.resolution,
            ),
        )
        for i in first.tolist()
    ]
