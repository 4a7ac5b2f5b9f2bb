"""Any number of shards through a real scheduler: seconds and memory of the client, for shards whose work is nothing.

``bench_tasks.py [SHARDS ...]``: so many shards each, on two worker processes of two threads. What a shard costs beside
its own work: its task, and what the client keeps of it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from distributed import Client, LocalCluster
from usage import usage

from rasteret_dask.store.runtasks import Work
from rasteret_dask.store.shardruns import Exit, Shards, runner, write_shards
from rasteret_dask.tasks.runs import Cuts

SHARDS = (20_000, 200_000)


def nothing(block: tuple[int, int]) -> None:
    """Do nothing."""


def shards(count: int, shared: bool) -> Shards:
    """Return shards that share half of their tiles with the next, or none."""
    cuts = Cuts(np.full(count - 1, 50, dtype=np.int64), 100 * count) if shared else Cuts.free(count)
    names = [f"train-{number:05d}" for number in range(count)]
    blocks = [(0, number) for number in range(count)]
    return Shards(Work(nothing, "digest", {}), names, blocks, names, range(count), cuts, "tail")


def main() -> None:
    """Send them, and print what it took."""
    counts = [int(word) for word in sys.argv[1:]] or list(SHARDS)
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0", silence_logs=40) as cluster,
        Client(cluster) as client,
    ):
        for count in counts:
            for shared in (True, False):
                before, begun = usage(), time.perf_counter()
                write_shards(
                    runner(client), shards(count, shared), Exit("to_zarr", "nowhere", count), lambda: None
                )
                took, after = time.perf_counter() - begun, usage()
                words = "runs of neighbours" if shared else "a task a shard"
                print(
                    f"{count:,} shards, {words}: {took:.0f} s, {1e3 * took / count:.2f} ms a shard; client and "
                    f"scheduler {after.cpu_s - before.cpu_s:.0f} s of CPU, peak {after.peak_mb:.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
