"""How long the client plans, and how much memory it takes: ``python tests/benchmarks/bench_plan.py``."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from synthetic import sentinel2_records

import rasteret_dask as rd
from rasteret_dask.shards import JobRef, lower, renamed
from rasteret_dask.write import write_shard


def main() -> None:
    """Plan tiles x dates records into monthly chips of four bands, split them, and lower the train split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=80)
    parser.add_argument("--dates", type=int, default=25)
    arguments = parser.parse_args()
    path = Path(tempfile.gettempdir()) / f"rasteret-dask-records-{arguments.tiles}-{arguments.dates}.parquet"
    if not path.exists():
        pq.write_table(sentinel2_records(arguments.tiles, arguments.dates), path)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # making the table is not part of the memory
    table = pq.read_table(path)
    begin, wall, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    chips = (
        rd.as_collection(table, name="s2")
        .harmonize(["B02", "B03", "B04", "B08"], units="reflectance", time="1MS")
        .chips(256)
        .split(seed=1)
    )
    train = chips.select("train")
    job = train.job
    graph = lower(job, {}, JobRef("s3://bucket/prefix/train.zarr/_job", job.phase), write_shard)
    tasks, shards = renamed(graph, job, "-00000000")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    largest = max(len(pickle.dumps(t)) for t in tasks.values())
    print(
        f"{table.num_rows:,} records, {len(chips):,} chips, {len(train):,} in train, {len(shards):,} shards"
    )
    print(
        f"planned and lowered in {wall:.1f} s ({cpu:.1f} s CPU), peak {_peak_mb():,.0f} MB (before: {begin:,.0f})"
    )
    print(f"{len(tasks):,} tasks, the largest {largest} bytes pickled")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
