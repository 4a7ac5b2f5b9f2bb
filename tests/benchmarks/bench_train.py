"""Feeding a training loop from a store: ``bench_train.py``.

Chips of the made-up world are written once, compressed by zstd; then each round takes all of them in every way once,
in turn. What is printed are medians of chips/s, and ratios to ours round by round.

- ``bare``: a loop over shards that reads each file whole and decompresses its chips on as many threads as ours have.
- ``stream``: ``open_chips(store).stream(32, shuffle=...)``; ``torch``: the same as tensors, by ``ChipDataset``.
- ``xbatcher``: batches of 32 chips of the same store opened by xarray, in order, without Dask and with it;
  ``xbatcher, shuffled``: chips in random order, 32 put together, on a sample. Chips are counted, as they are stored.
- ``xbatcher, lazy cube``: chip-sized patches of a lazy cube (``Collection.cube``), on a sample; ``stream, no store``
  is our stream of planned chips, and ``take 32`` the time of 32 random chips in shards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import xarray as xr
import xbatcher
from dask.system import CPU_COUNT
from store_made import HOW, made_store, planned_chips, scenes
from zarr.codecs import ZstdCodec

import rasteret_dask as rd
from rasteret_dask.storeset import open_chips
from rasteret_dask.torchdata import ChipDataset

BATCH = 32
EPOCHS = 4  # of the fast ways, so that what a start costs does not count
SAMPLE = 64  # chips of the ways that take a tenth of a second each


def bare(store: Path) -> int:
    """Read all shards of all arrays, decompress each chip, and keep a shard at a time."""
    codec = numcodecs.Zstd(1)
    names = [n for n in ("pixels", "valid") if (store / n).is_dir()]
    chips = 0
    with ThreadPoolExecutor(CPU_COUNT) as threads:
        count = len(list((store / "pixels" / "c").iterdir()))
        for number in range(count):
            held = []
            for name in names:
                meta = json.loads((store / name / "zarr.json").read_text())
                data = (
                    store / name / "c" / str(number) / Path(*["0"] * (len(meta["shape"]) - 1))
                ).read_bytes()
                per = meta["chunk_grid"]["configuration"]["chunk_shape"]
                index = np.frombuffer(data[-16 * per[0] - 4 : -4], "<u8").reshape(-1, 2)
                index = index[index[:, 0] != 2**64 - 1]
                out = np.empty((len(index), *per[1:]), dtype=meta["data_type"])

                def one(at: int, start: int, length: int, data: bytes = data, out: Any = out) -> None:
                    codec.decode(data[start : start + length], out=out[at].reshape(-1).view(np.uint8))

                list(threads.map(one, range(len(index)), *index.T.tolist()))
                held.append(out)
            chips += len(held[0])
    return chips


def streamed(batches: Any) -> int:
    """Take all batches, as a training loop would that costs nothing."""
    return sum(len(batch["chip_id"]) for batch in batches)


def by_xbatcher(store: Path, chunks: Any) -> int:
    """Take batches of neighbouring chips of the store, in order."""
    return sum(_chips_of(batch.load()) for batch in xbatched(store, chunks, BATCH))


def by_xbatcher_shuffled(store: Path, seed: int) -> int:
    """Take chips of the store in random order, 32 together."""
    made = xbatched(store, None, 1)
    order = np.random.default_rng(seed).permutation(len(made))[:SAMPLE]
    parts = np.array_split(order, -(-len(order) // BATCH))
    return sum(_chips_of(xr.concat([made[int(at)].load() for at in some], "chip")) for some in parts)


def xbatched(store: Path, chunks: Any, size: int) -> Any:
    """Return xbatcher's batches of so many chips, as they are stored: as all others here, no floats are made of them.

    Without the sizes of all dimensions xbatcher stacks what it was not told into one, a copy that nobody asked for.
    """
    whole = xr.open_zarr(store, chunks=chunks, mask_and_scale=False)[["pixels", "valid"]]
    whole = whole.drop_vars("time", errors="ignore")
    return xbatcher.BatchGenerator(whole, {**whole.sizes, "chip": size})


def _chips_of(batch: xr.Dataset) -> int:
    assert batch["pixels"].dims[0] == "chip", batch["pixels"].dims
    return batch["pixels"].sizes["chip"]


def by_xbatcher_lazily(cube: xr.DataArray, size: int, seed: int) -> int:
    """Take chip-sized patches of a lazy cube."""
    made = xbatcher.BatchGenerator(cube.rename("pixels"), {**cube.sizes, "y": size, "x": size})
    order = np.random.default_rng(seed).permutation(len(made))[: SAMPLE // 4]
    for at in order:
        patch = made[int(at)].load()
        assert patch.sizes == {**cube.sizes, "y": size, "x": size}, patch.sizes
    return len(order)


def check(store: Path, opened: rd.StoredChips) -> None:
    """Compare what xbatcher's first batches hold with the store's chips."""
    source, ids = opened.stored.map.sources[0], list(opened)[:BATCH]
    wanted = opened.take(ids)
    for size, number in ((BATCH, 0), (1, 5)):
        batch = xbatched(store, None, size)[number]
        rows = slice(number * size, (number + 1) * size)
        np.testing.assert_array_equal(batch["pixels"].values, wanted[source][rows])
        np.testing.assert_array_equal(batch["valid"].values, wanted[f"{source}/valid"][rows])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="pixels of a chip's side")
    parser.add_argument("--chips", type=int, help="chips of the store; all, where it is not given")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-train")
    given = parser.parse_args()
    s2 = scenes(given.folder)
    chips = planned_chips(s2, given.size)
    chips = chips if given.chips is None else chips.sample(given.chips)
    store = made_store(given.folder, given.size, ZstdCodec(level=1), given.chips)
    opened = open_chips(store)
    check(store, opened)
    sizes = opened.stored.sizes
    print(f"{len(opened)} chips of {given.size} px in {len(sizes)} shards of {max(sizes)}, {CPU_COUNT} cores")
    cube = s2.harmonize(**HOW).cube()
    seeds = itertools.count()
    ways: dict[str, Callable[[], int]] = {
        "bare": lambda: sum(bare(store) for _ in range(EPOCHS)),
        "stream": lambda: streamed(opened.stream(BATCH, shuffle=next(seeds), epochs=EPOCHS)),
        "stream, in order": lambda: streamed(opened.stream(BATCH, epochs=EPOCHS)),
        "torch": lambda: streamed(ChipDataset(opened.stream(BATCH, shuffle=next(seeds), epochs=EPOCHS))),
        "xbatcher": lambda: by_xbatcher(store, None),
        "xbatcher, Dask": lambda: by_xbatcher(store, {"chip": BATCH}),
        "xbatcher, shuffled": lambda: by_xbatcher_shuffled(store, next(seeds)),
        "xbatcher, lazy cube": lambda: by_xbatcher_lazily(cube, given.size, next(seeds)),
        "stream, no store": lambda: streamed(chips.stream(BATCH, shuffle=next(seeds))),
    }
    speed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            speed[name].append(way() / (time.perf_counter() - begun))
    for name, found in speed.items():
        ratio = statistics.median(ours / other for ours, other in zip(speed["stream"], found, strict=True))
        print(f"{name:22} {statistics.median(found):9.1f} chips/s   stream is {ratio:6.2f} x that")
    print(f"a random take(32) takes as long as {random_take(opened):.2f} shards")


def random_take(opened: rd.StoredChips) -> float:
    """Return the time of 32 random chips over that of a whole shard."""
    ids, rng = opened.table.column("chip_id").to_pylist(), np.random.default_rng(0)
    per = max(opened.stored.sizes)
    ratios = []
    for at in range(7):
        first = time.perf_counter()
        opened.take(rng.choice(ids, BATCH, replace=False).tolist())
        second = time.perf_counter()
        opened.take(ids[:per] if at % 2 else ids[per : 2 * per])
        ratios.append((second - first) / (time.perf_counter() - second))
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
