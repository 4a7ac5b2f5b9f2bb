"""Builds the record tables of a job, headers read from its server: ``build_tables.py JOB.json``.

A script of its own, for another checkout builds its tables with its own code.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import readme_world
from jobs import ReadmeJob, read_job

import rasteret_dask as rd


def main() -> None:
    """Build what the job names."""
    job = read_job(Path(sys.argv[1]))
    if not isinstance(job, ReadmeJob):
        name = job.name.split("-")[0].lower()
        rd.build_from_stac(job.load_items(), name=name, bands=list(job.bands)).export(job.table)
        return
    for name, items in job.load_items().items():
        path = Path(job.tables) / f"{name}.parquet"
        rd.build_from_stac(items, name=name).export(path)
        if job.wide:
            pq.write_table(readme_world.widened(pq.read_table(path)), path)


if __name__ == "__main__":
    main()
