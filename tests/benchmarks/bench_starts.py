"""How long a DataLoader with two workers takes to its first batch: ``bench_starts.py [STORE] [--starts N]``.

Each start must bring every batch. A worker imports torch and what this script imports before it reads, so nothing
else is imported here; ``--context forkserver`` has one process import them once for all workers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from torch.utils.data import DataLoader

import rasteret_dask as rd
from rasteret_dask.torchdata import ChipDataset, forkserver

BATCH = 32


def main() -> None:
    """Start, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    store = Path(tempfile.gettempdir()) / "bench-train" / "chips-128.zarr"
    parser.add_argument("store", nargs="?", default=store, help="one that bench_train.py wrote")
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--context", default="spawn", choices=["forkserver", "spawn"])
    given = parser.parse_args()
    opened = rd.open_chips(given.store)
    context = forkserver() if given.context == "forkserver" else given.context
    wanted = len(opened.stream(BATCH))
    waits = []
    for seed in range(given.starts):
        dataset = ChipDataset(opened.stream(BATCH, shuffle=seed))
        begun = time.perf_counter()
        loader = iter(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context))
        next(loader)
        waits.append(time.perf_counter() - begun)
        # to the end: workers of torch's own whose loader is abandoned abort now and then while they exit
        assert 1 + sum(1 for _ in loader) == wanted
        print(f"start {seed + 1}: first batch after {waits[-1]:.2f} s", flush=True)
    print(
        f"{given.starts} starts of 2 workers ({given.context}) on {os.cpu_count()} cores: first batch after "
        f"{statistics.median(waits):.2f} s (median), {max(waits):.2f} s (longest)"
    )


if __name__ == "__main__":
    main()
