"""Any number of shards through a real scheduler: seconds and memory of the client, for shards whose work is nothing.

``bench_tasks.py [SHARDS ...]``: so many shards each, on two worker processes of two threads. What a shard costs beside
its own work: its task, and what the client keeps of it. ``--store`` has them put a mark and a report each into a
folder, as files, which go into pages, and are read: what the ledger costs, and how many objects there
are.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from usage import usage

from rasteret_dask.net import remote
from rasteret_dask.net.sums import sealed
from rasteret_dask.store import shardreports
from rasteret_dask.store.manifest import table_of
from rasteret_dask.store.paging import Paging
from rasteret_dask.store.presence import present
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.tasks.runs import Cuts

SHARDS = (20_000, 200_000)
KEY = "ab" * 16


def nothing(block: tuple[int, int]) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Reporting:
    """Leaves what a written shard leaves in the ledger: its mark and its report; five objects are named, not put."""

    folder: str

    def __call__(self, block: tuple[int, int]) -> None:
        name = f"train-{block[1]:05d}"
        mark = f"{shardreports.JOB}/tried/{name}/{KEY[:16]}.node.{os.getpid()}.{uuid.uuid4().hex}"
        arrays = ("pixels", "valid", "valid_fraction", "datetime", "member")
        report = {
            "shard": name, "key": KEY, "mark": mark, "process": f"node:{os.getpid()}", "chips": 50, "dropped": {},
            "counts/s2": {"requests": 12, "bytes_fetched": 3_000_000, "tiles_read": 12, "gdal_fallback": 0},
            "clipped/s2": {}, "unreadable/s2": [], "seconds": {"read/s2": 1.234, "encode": 0.123, "put": 0.012},
            "objects": [{"path": f"train/{a}/c/{block[1]}/0/0/0/0", "size": 12345678, "crc32": 123} for a in arrays],
        }  # fmt: skip
        for path, data in ((mark, b""), (f"{shardreports.JOB}/done/{name}.json", sealed(report))):
            file = Path(self.folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def shards(count: int, shared: bool, work: Any = nothing) -> Shards:
    """Return shards that share half of their tiles with the next, or none."""
    cuts = Cuts(np.full(count - 1, 50, dtype=np.int64), 100 * count) if shared else Cuts.free(count)
    names = [f"train-{number:05d}" for number in range(count)]
    blocks = [(0, number) for number in range(count)]
    return Shards(Work(work, "digest", {}), names, blocks, names, range(count), cuts, "tail")


def count_of(folder: str) -> int:
    """Return how many objects lie in a folder."""
    return sum(len(names) for _, _, names in os.walk(folder))


def with_ledger(client: Client, count: int) -> str:
    """Have shards reported, and read all reports; say how many objects there were, and what is left."""
    looks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        todo = shards(count, shared=True, work=Reporting(folder))
        keys = dict.fromkeys(todo.names, KEY)
        with present(folder) as presence:
            paging = Paging(presence, keys)
            seen = 0

            def settle(names: Sequence[str], more: bool) -> None:
                nonlocal seen
                paging.settle(names, more)
                seen += len(names)
                if seen // 10_000 > len(looks):
                    looks.append(count_of(folder))

            write_shards(runner(client), todo, Exit("to_zarr", "nowhere", count), lambda: None, settle)
        left = count_of(folder)
        objects = remote.listing(folder)
        arrays = {
            f"train/{a}/c/{n}/0/0/0/0": 12345678
            for n in range(count)
            for a in ("pixels", "valid", "valid_fraction", "datetime", "member")
        }
        tables = [
            table_of([{"shard": name, "objects": report.values["objects"]} for name, report in some.items()])
            for some in shardreports.reports(folder, objects | arrays, keys)
        ]
        rows = sum(table.num_rows for table in tables)
    most = max(looks, default=left)
    return f"; at most {most:,} objects at a time, {left:,} at the end, of which {rows:,} reports are read"


def main() -> None:
    """Send them, and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=int, nargs="*", default=SHARDS)
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0", silence_logs=40) as cluster,
        Client(cluster) as client,
    ):
        for count in arguments.shards:
            for shared in (True,) if arguments.store else (True, False):
                before, begun = usage(), time.perf_counter()
                more = ""
                if arguments.store:
                    more = with_ledger(client, count)
                else:
                    caller = Exit("to_zarr", "nowhere", count)
                    write_shards(runner(client), shards(count, shared), caller, lambda: None, lambda *_: None)
                took, after = time.perf_counter() - begun, usage()
                words = "runs of neighbours" if shared else "a task a shard"
                print(
                    f"{count:,} shards, {words}: {took:.0f} s, {1e3 * took / count:.2f} ms a shard; client and "
                    f"scheduler {after.cpu_s - before.cpu_s:.0f} s of CPU, peak {after.peak_mb:.0f} MB{more}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
