"""How fast chips come back from a store: 32 random ones against one shard, by sizes of shards and codecs.

Run: python tests/benchmarks/bench_open.py [folder]. Prints a Markdown table; ratios are of medians in one run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from zarr.codecs import ZstdCodec

import rasteret_dask as rd
from rasteret_dask.demo.world import WorldSize, make_world
from rasteret_dask.store import stored, storeread
from rasteret_dask.store.encode import Compression
from rasteret_dask.store.run import delayed_zarr
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import freeze

TAKE = 32
ROUNDS = 9


def main(folder: Path) -> None:
    """Make a world and a store for each case, and measure them."""
    world = make_world(folder / "world", size=WorldSize(960, 960, 600))
    s2 = rd.build_from_stac(world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))
    optical = s2.harmonize(bands=["red", "green", "blue", "nir"], units="reflectance", resolution=10)
    print("| chips a shard | codec | shard, ms | take(32), ms | ratio | first take(32), ms | load, MB/s |")
    print("|---|---|---|---|---|---|---|")
    for size, per in ((256, 16), (128, 64), (64, 256)):
        codecs: dict[str, Compression] = {"auto": "auto", "zstd-1": ZstdCodec(level=1)}
        for name, codec in codecs.items():
            chips = optical.chips(size=size, cell_km=5.12)
            store = folder / f"{per}-{name}"
            write(chips, store, per, codec)
            print(row(open_chips(store), size, name))


def write(chips: rd.Chips, store: Path, per: int, codec: Compression) -> None:
    """Write chips in shards of about so many."""
    nbytes = chips._layout.outputs[0].chip_bytes * per
    layout = replace(chips._layout, job=freeze(chips.planned, nbytes), compression=codec)
    delayed_zarr(layout, str(store), ReadContext()).compute(scheduler="threads")


def row(opened: StoredChips, size: int, name: str) -> str:
    """Measure one store."""
    ids, rng = np.array(list(opened)), np.random.default_rng(0)
    storeread.forget()
    first = seconds(lambda: opened.take(rng.choice(ids, TAKE, replace=False).tolist()), 1)
    whole = int(np.argmax(opened.stored.sizes))
    shard = seconds(lambda: stored.read_shard(opened.stored, whole), ROUNDS)
    some = seconds(lambda: opened.take(rng.choice(ids, TAKE, replace=False).tolist()), ROUNDS)
    nbytes = len(opened) * opened[ids[0]]["s2"].nbytes
    load = nbytes / 1e6 / seconds(opened.load, 3)
    return (
        f"| {max(opened.stored.sizes)} of {len(opened)}, {size} px | {name} | {shard * 1e3:.1f} | {some * 1e3:.1f} "
        f"| {some / shard:.2f} | {first * 1e3:.1f} | {load:.0f} |"
    )


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median wall time of some calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
