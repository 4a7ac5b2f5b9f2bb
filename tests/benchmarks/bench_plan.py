"""How long the client plans, how much memory it takes, and what a task costs the scheduler.

``python tests/benchmarks/bench_plan.py`` runs both cases, each in a process of its own; ``--case`` runs one here.

- small: 6 scenes of 5120 px x 4 bands, 8 boxes of 1024 px: 128 chips of 256 px on the scenes' own tiles.
- large: 700 Sentinel-2 granules in ten zones x 15 dates in 6 months = 10,500 records: a million chips of 256 px at
  10 m (6.6 million km2, the Iberian peninsula to the Caspian Sea), 6 monthly slots x 4 bands, of which 70 % are train.
- blocks: the same granules on 2 dates: ten million chips of 80 px, planned by blocks on two worker processes, and then
  written as 200,000 shards whose tasks put a few bytes and a report each. It takes half an hour of CPU, and only runs
  where it is asked for; ``--granules 20`` takes a part of the ground, ``--write`` puts the table into the docs.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import report
import shapely
from dask._task_spec import Task
from distributed import Client, LocalCluster, wait
from synthetic import BANDS, sentinel2_records

import rasteret_dask as rd
from rasteret_dask.grid import transformer
from rasteret_dask.net import remote
from rasteret_dask.net.sums import crc32_of
from rasteret_dask.store import run, shardreports, unitruns, workunits
from rasteret_dask.store.run import _WritingParts
from rasteret_dask.store.write import write_shard
from rasteret_dask.tasks import freezing
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
    parser.add_argument("--granules", type=int, default=700)
    parser.add_argument("--no-shards", action="store_true", help="end where the first shard would be written")
    parser.add_argument(
        "--write", action="store_true", help="put the table of blocks into docs/benchmarks.md"
    )
    arguments = parser.parse_args()
    chosen = arguments.case
    if chosen is None:
        for case in ("small", "large"):
            _table(case)  # made here, so that it is not part of the case's memory
            subprocess.run([sys.executable, __file__, "--case", case], check=True)
        return
    table = _table(chosen)
    if chosen == "blocks":
        told = _by_blocks(table.slice(0, 2 * arguments.granules), not arguments.no_shards)
        print(told)
        if arguments.write:
            report.put("plan-blocks", told)
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


class _Steps:
    """What the client has done, each with its seconds since the one before, and the largest memory so far."""

    def __init__(self) -> None:
        self._rows: list[str] = []
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, what: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        row = f"| {what} | {wall - self._wall:.1f} | {cpu - self._cpu:.1f} | {_peak_mb():,.0f} |"
        print(row, file=sys.stderr, flush=True)
        self._rows.append(row)
        self._wall, self._cpu = wall, cpu

    def table(self) -> str:
        """Return them as a Markdown table."""
        heads = "| what | wall s | CPU s of the client | its peak MB |", "|---|---|---|---|"
        return "\n".join([*heads, *self._rows])


def _by_blocks(table: pa.Table, shards: bool) -> str:
    """Plan ten million chips by blocks, and choose from them; return what the client takes."""
    records = rd.as_collection(table, name="s2")
    chips = records.harmonize(BANDS, units="reflectance", dtype="uint16", time="1MS").chips(80).split(seed=1)
    step = _Steps()
    step(f"{table.num_rows:,} records, and imports")
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        step("two worker processes")
        blocks = chips.by_blocks(folder, client=client, progress=False)
        step(f"{len(blocks):,} chips planned")
        nbytes = sum(file.stat().st_size for file in Path(folder).iterdir())
        sample = blocks.select("train").sample(10_000).to_chips()
        step(f"a sample of {len(sample):,} chips")
        with suppress(_EndError):
            _write_nothing(blocks, Path(folder, "store"), client, step, shards)
    files = f"{nbytes / 1e6:,.0f} MB of files, {nbytes / len(blocks):.0f} bytes a chip"
    return f"By blocks, `bench_plan.py --case blocks`: chips of 80 px; {files}.\n\n{step.table()}"


@dataclass(frozen=True)
class _Trivial(_WritingParts):
    """What a task does beside reading: it looks for the shard's report, and puts a mark, an object and a report."""

    def __call__(self, block: Any, *shipped: Any) -> None:
        _, (hierarchy, number) = block
        url, split = self.ref.url.removesuffix("/_job"), ("train", "val", "test")[hierarchy]
        name, path = f"{split}-{number:05d}", f"{split}/pixels/c/{number}/0/0/0/0"
        if shardreports.valid_report(url, name, self.ref.digest) is not None:
            return
        mark = shardreports.tried(url, name, self.ref.digest)
        remote.put(remote.join(url, path), b"pixels")
        counts = {"requests": 12, "bytes_fetched": 3_000_000, "tiles_read": 12, "gdal_fallback": 0}
        told = {
            "process": "worker:1", "chips": 50, "dropped": {}, "counts/s2": counts, "clipped/s2": {},
            "unreadable/s2": [], "objects": [{"path": path, "size": 6, "crc32": crc32_of(b"pixels")}],
        }  # fmt: skip
        shardreports.done(url, name, self.ref.digest, mark, told)


class _EndError(Exception):
    """Nothing more is asked for."""


def _write_nothing(
    blocks: rd.ChipBlocks[rd.Chips], store: Path, client: Client, step: _Steps, shards: bool
) -> None:
    """Write all shards with trivial bodies."""
    begin = workunits.begin

    def told(*arguments: Any) -> Any:
        done = begin(*arguments)
        step(f"to_zarr: {len(arguments[2]):,} shards planned and prepared")
        if not shards:
            raise _EndError
        return done

    with (
        mock.patch.object(run, "_WritingParts", _Trivial),
        mock.patch.object(unitruns, "begin", told),
        mock.patch.object(freezing, "SHARD_CHIPS", 50),
    ):
        blocks.to_zarr(store, client=client, progress=False)
    small = sum(1 for path in (store / "_job").rglob("*") if path.is_file())
    step(f"written, with trivial bodies; {small:,} objects in `_job`")


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
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
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
