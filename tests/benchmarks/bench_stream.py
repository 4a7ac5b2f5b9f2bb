"""Streaming from a cluster against writing the same chips to Zarr without compression: ``bench_stream.py``.

Two worker processes with a thread each read the made-up world's chips: optical float32 (time 3, band 4) joined with
64 bands of int8 embeddings. Each round runs every way once, in turn, with nothing kept from the one before. Printed
are medians of chips/s, of their ratios to ``to_zarr`` round by round and of the CPU seconds of all processes (which say
more where others use the machine too), and the consumer's memory beside what it had. ``scheduler`` is what a stream
costs where workers cannot be reached, so that all chips pass the scheduler.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from distributed import Client, LocalCluster

import rasteret_dask as rd
from rasteret_dask.demo.run import DemoSize, demo_chips
from rasteret_dask.demo.world import make_world
from rasteret_dask.streams.clustersource import OnCluster
from rasteret_dask.streams.stream import Stream


def forget() -> None:
    """Keep no tiles of an earlier run, in this process."""
    from rasteret_dask.reader.sharing import SHARED  # here: a worker has its own

    SHARED.clear()


def cpu(client: Client) -> float:
    """Return the CPU seconds of all workers and this process so far."""
    return float(sum(client.run(time.process_time).values())) + time.process_time()


def consumed(stream: Stream) -> None:
    """Take all batches, as a training loop would that costs nothing."""
    for batch in stream:
        del batch


def through_scheduler(chips: rd.Chips, client: Client) -> None:
    """Stream as if no worker could be reached."""
    with patch.object(OnCluster, "_reachable", lambda _: False):
        consumed(chips.stream(32, client=client))


def ways(chips: rd.Chips, client: Client, folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is compared."""
    return {
        "to_zarr": lambda: chips.to_zarr(folder / "x.zarr", client=client, progress=False, compression=None),
        "stream": lambda: consumed(chips.stream(32, client=client)),
        "shuffled": lambda: consumed(chips.stream(32, shuffle=1, client=client)),
        "scheduler": lambda: through_scheduler(chips, client),
        "threads": lambda: consumed(chips.stream(32, client=None)),
    }


def memory(chips: rd.Chips, client: Client, prefetch: int) -> float:
    """Return the consumer's peak in batches."""
    stream = chips.stream(32, shuffle=1, client=client, prefetch=prefetch)
    nbytes = sum(values.nbytes for values in next(stream).values())
    tracemalloc.start()
    consumed(stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=["stream", "shuffled", "scheduler", "threads"])
    parser.add_argument("--world", type=Path, default=Path(tempfile.gettempdir()) / "bench-stream-world")
    given = parser.parse_args()
    size = DemoSize()
    chips = demo_chips(make_world(given.world, size=size.world), size)
    shards = len(list(chips.job.shards()))
    print(
        f"{len(chips)} chips in {shards} shards, {sum(o.chip_bytes for o in chips._layout.outputs) / 1e6:.2f} MB each"
    )
    rates: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        consumed(chips.stream(32, client=client))
        for _ in range(given.rounds):
            folder = Path(tempfile.mkdtemp())
            for name, way in ways(chips, client, folder).items():
                if name not in ("to_zarr", *given.ways):
                    continue
                client.run(forget)
                forget()
                started, busy = time.perf_counter(), cpu(client)
                way()
                rates.setdefault(name, []).append(len(chips) / (time.perf_counter() - started))
                used.setdefault(name, []).append(cpu(client) - busy)
            shutil.rmtree(folder)
        peaks = {prefetch: memory(chips, client, prefetch) for prefetch in (1, 2, 4)}
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, rates["to_zarr"], strict=True))
        seconds = statistics.median(used[name])
        print(
            f"{name:10} {statistics.median(own):7.1f} chips/s {ratio:5.2f} of to_zarr, {seconds:5.1f} s of CPU"
        )
    for prefetch, peak in peaks.items():
        print(f"prefetch={prefetch}: the consumer holds {peak:.2f} batches (allowed {2 + prefetch})")


if __name__ == "__main__":
    main()
