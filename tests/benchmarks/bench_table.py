"""A table of 50,000 records: written, opened and filtered. ``bench_table.py [RECORDS] [FOLDER]``."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

import rasteret_dask as rd
from rasteret_dask.table.geoparquet import write_ordered

sys.path.append(str(Path(__file__).parents[1]))
from many_records import pages

BOX = (3.1, 42.1, 3.3, 42.3)
JUNE = ("2020-06", "2020-06")
STEPS: dict[str, Callable[[rd.Collection], Any]] = {
    "bbox + month + cloud, whole rows": lambda c: c.subset(
        bbox=BOX, date_range=JUNE, cloud_cover_lt=50
    ).to_table(),
    "the same, counted": lambda c: len(c.subset(bbox=BOX, date_range=JUNE, cloud_cover_lt=50)),
    "bbox, ids": lambda c: c.subset(bbox=BOX).to_table(["id"]),
    "month + cloud, ids": lambda c: c.subset(date_range=JUNE, cloud_cover_lt=50).to_table(["id"]),
    "month + cloud, whole rows": lambda c: c.subset(date_range=JUNE, cloud_cover_lt=50).to_table(),
    "count of all": len,
}


def main(count: int, folder: Path) -> None:
    """Print seconds, MB and row counts."""
    path = folder / "many.parquet"
    me, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], me.memory_info().rss)

    before = me.memory_info().rss
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    write_ordered(pages(count), path)
    print(f"made and written: {time.perf_counter() - start:.1f} s, {os.path.getsize(path) / 1e6:.0f} MB")
    done.set()
    print(f"memory: {before / 1e6:.0f} MB before, {peak[0] / 1e6:.0f} MB at most")
    start = time.perf_counter()
    collection = rd.load(path)
    print(f"opened: {time.perf_counter() - start:.3f} s")
    for name, step in STEPS.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            found = step(collection)
            seconds.append(time.perf_counter() - start)
        rows = found if isinstance(found, int) else found.num_rows
        print(f"{name}: first {seconds[0]:.3f} s, median {median(seconds):.3f} s, {rows} rows")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    if len(sys.argv) > 2:
        main(count, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(count, Path(folder))
