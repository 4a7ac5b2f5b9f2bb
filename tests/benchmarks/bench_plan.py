"""How long the client plans, how much memory it takes, and what a task costs the scheduler.

``python tests/benchmarks/bench_plan.py`` runs both cases, each in a process of its own; ``--case`` runs one here.

- small: 6 scenes of 5120 px x 4 bands, 8 boxes of 1024 px: 128 chips of 256 px on the scenes' own tiles.
- large: 700 Sentinel-2 granules in ten zones x 15 dates in 6 months = 10,500 records: a million chips of 256 px at
  10 m (6.6 million km2, the Iberian peninsula to the Caspian Sea), 6 monthly slots x 4 bands, of which 70 % are train.
- blocks: the same granules on 2 dates: ten million chips of 80 px, planned by blocks on two worker processes. It takes
  three minutes of CPU, and only runs where it is asked for.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from dask._task_spec import Task
from distributed import Client, LocalCluster, wait
from synthetic import BANDS, sentinel2_records

import rasteret_dask as rd
from rasteret_dask.grid import transformer
from rasteret_dask.store.write import write_shard
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.jobfile import JobRef
from rasteret_dask.tasks.shards import lower, renamed

CORNER = 250_020.0, 5_760_000.0
"""North-west corner of the first granule, EPSG:32632."""


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=("small", "large", "blocks"))
    chosen = parser.parse_args().case
    if chosen is None:
        for case in ("small", "large"):
            _table(case)  # made here, so that it is not part of the case's memory
            subprocess.run([sys.executable, __file__, "--case", case], check=True)
        return
    table = _table(chosen)
    if chosen == "blocks":
        _by_blocks(table)
        return
    if chosen == "small":
        _plan("small, the first time", _small(table))
        _plan("small, again", _small(table))
        return
    tasks = _plan("large", _large(table))
    _schedule(tasks)


def _table(case: str) -> pa.Table:
    shape = {
        "small": (1, 6, 1, 186, 5120),
        "large": (700, 15, 10, 180, 10980),
        "blocks": (700, 2, 10, 24, 10980),
    }[case]
    path = Path(tempfile.gettempdir()) / f"rasteret-dask-records-{'-'.join(map(str, shape))}.parquet"
    if not path.exists():
        pq.write_table(sentinel2_records(*shape), path)
    return pq.read_table(path)


def _small(table: pa.Table) -> rd.Chips:
    def lonlat(xy: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.stack(transformer(32632, 4326).transform(xy[:, 0], xy[:, 1]), -1)

    side, (west, north) = 10_240.0, CORNER
    tiles = [(west + i * side, north - j * side) for i in range(4) for j in range(2)]
    boxes = [shapely.box(x + 1, y - side + 1, x + side - 1, y - 1) for x, y in tiles]
    area = shapely.union_all([shapely.transform(b, lonlat) for b in boxes])
    records = rd.as_collection(table, name="s2").harmonize(BANDS, units="raw", time="1MS")
    return records.chips(256, grid="tiles", aoi=area)


def _large(table: pa.Table) -> rd.Chips:
    records = rd.as_collection(table, name="s2")
    harmonized = records.harmonize(BANDS, units="reflectance", dtype="uint16", time="1MS")
    return harmonized.chips(256).split(seed=1).select("train")


def _by_blocks(table: pa.Table) -> None:
    """Plan ten million chips by blocks, and choose from them; say what the client takes."""
    records = rd.as_collection(table, name="s2")
    chips = records.harmonize(BANDS, units="reflectance", dtype="uint16", time="1MS").chips(80).split(seed=1)
    before = _peak_mb()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        blocks = chips.by_blocks(folder, client=client, progress=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        nbytes = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"blocks: {len(blocks):,} chips planned in {wall:.0f} s ({cpu:.1f} s CPU of the client)")
        print(f"  peak {_peak_mb():,.0f} MB ({before:,.0f} MB before), {nbytes / 1e6:,.0f} MB of files")
        sample = blocks.select("train").sample(10_000).to_chips()
        print(f"  a sample of {len(sample):,} chips: peak {_peak_mb():,.0f} MB")


def _plan(name: str, chips: rd.Chips) -> Mapping[Hashable, Any]:
    """Plan, freeze and lower; say what it took."""
    before, wall, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    job = chips.job
    graph = lower(job, ReadContext(), JobRef("s3://bucket/prefix/train.zarr/_job", job.digest), write_shard)
    tasks, shards = renamed(graph, job, "-00000000")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name}: {job.chips.num_rows:,} chips, {len(chips):,} of them chosen, {len(shards):,} shards")
    print(f"  planned, frozen and lowered in {wall:.3f} s ({cpu:.3f} s CPU)")
    print(f"  peak {_peak_mb():,.0f} MB ({before:,.0f} MB with the records read)")
    print(
        f"  {len(tasks):,} tasks, the largest {max(len(pickle.dumps(t)) for t in tasks.values())} bytes pickled"
    )
    return tasks


def _schedule(tasks: Mapping[Hashable, Any]) -> None:
    """Run as many tasks of the same weight that do nothing; say what client and scheduler spend on each."""
    idle = {key: Task(key, _nothing, pickle.dumps(task)) for key, task in tasks.items()}
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.get({"warm": Task("warm", _nothing, b"")}, ["warm"])
        wall, cpu = time.perf_counter(), time.process_time()
        wait(client.get(idle, list(idle), sync=False))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"  {len(idle):,} such tasks that do nothing, two worker processes: {wall:.1f} s; client and scheduler"
    )
    print(f"  spend {cpu / len(idle) * 1e6:,.0f} us of CPU a task")


def _nothing(task: bytes) -> int:
    return len(task)


def _peak_mb() -> float:
    """Return the process's largest resident memory; a child's ru_maxrss would begin at its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    main()
