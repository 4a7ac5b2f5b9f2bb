"""Writing shards: which codec, how much beside compressing, how fast it reads back: ``bench_write.py``.

1. Codecs, one thread: MB/s of pixels and ratio, on the made-up world's scenes, and on real ones where they are.
2. ``write_shard`` against a bare loop that compresses each chip with the same codec on as many threads, adds an
   index and writes one file an array, and against zarr-python; runs in turn, wall and CPU.
3. Reading back what was written: one chip, 32 chips, a whole shard.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import rasterio
import xarray as xr
import zarr
from dask.system import CPU_COUNT
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

import rasteret_dask as rd
from rasteret_dask.demo.world import World, WorldSize, make_world
from rasteret_dask.net import remote
from rasteret_dask.store.encode import codec_of
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.write import commit, prepare, write_shard
from rasteret_dask.tasks.job import Hierarchy

BANDS = ("B02", "B03", "B04", "B08")
SIZE_PX = 256
TIMES = 6
DATA = Path(os.environ.get("RASTERET_DASK_DATA", Path(__file__).parents[3] / "shared" / "data"))

CODECS: dict[str, Any] = {
    "none": None,
    "zstd 1": ZstdCodec(level=1),
    "zstd 3": ZstdCodec(level=3),
    "Blosc lz4, shuffle": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "Blosc lz4, bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "Blosc lz4hc 5, shuffle": BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle"),
    "Blosc lz4hc 5, bitshuffle": BloscCodec(cname="lz4hc", clevel=5, shuffle="bitshuffle"),
    "Blosc zstd 1": BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle"),
    "Blosc zstd 1, shuffle": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
    "Blosc zstd 1, bitshuffle": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "Blosc zstd 3, bitshuffle": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
}


# Pixels


def tiled(image: NDArray[Any], size: int = SIZE_PX) -> NDArray[Any]:
    """Cut (band, y, x) into chips (chip, 1, band, size, size)."""
    bands, height, width = image.shape
    rows, cols = height // size, width // size
    cut = image[:, : rows * size, : cols * size].reshape(bands, rows, size, cols, size)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4).reshape(-1, 1, bands, size, size))


def opened(path: Path) -> NDArray[Any]:
    """Return a raster, shape (band, y, x)."""
    with rasterio.open(path) as file:
        return np.asarray(file.read())


def scene(folder: Path) -> NDArray[np.uint16]:
    """Return the DN of one Sentinel-2 scene, shape (band, y, x)."""
    return np.concatenate([opened(folder / f"{band}.tif") for band in BANDS])


def clear(folder: Path) -> NDArray[np.bool_]:
    """Return where a Sentinel-2 scene shows the ground, shape (1, y, x) at 10 m."""
    classes = opened(folder / "SCL.tif").repeat(2, axis=1).repeat(2, axis=2)
    return ~np.isin(classes, (0, 1, 3, 8, 9, 10))


def samples(world: World) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield pixels by kind, shape (chip, time, band, y, x)."""
    scenes = sorted(p for p in world.sentinel2.parent.iterdir() if p.is_dir())
    dn = [tiled(scene(s)) for s in scenes[:6]]
    masks = [tiled(clear(s)) for s in scenes[:6]]
    yield "uint16 DN, made up", np.concatenate(dn)
    if DATA.is_dir():
        mol = DATA / "s2_l8_same_place_mol_belgium"
        bands = [opened(mol / f"S2_20190411_icor_SR_{band}.tif") for band in BANDS]
        yield "uint16 DN, real", np.concatenate([tiled(np.concatenate(bands))] * 8)
    floats = [np.where(m, d * np.float32(1e-4), np.float32(np.nan)) for d, m in zip(dn, masks, strict=True)]
    yield "float32 reflectance, made up", np.concatenate(floats).astype(np.float32)
    (file,) = world.embeddings.parent.glob("*/*.tif*")
    with rasterio.open(file) as raster:
        window = rasterio.windows.Window(0, 0, 4 * SIZE_PX, SIZE_PX)
        yield "int8 embeddings, made up", tiled(raster.read(window=window))
    if DATA.is_dir():
        real = opened(DATA / "aef_annual_2024_16N" / "aef_v1_annual_2024_wi_west.tif")
        yield "int8 embeddings, real", np.concatenate([tiled(real, 60)] * 16)
    yield "bool masks, made up", np.concatenate(masks).repeat(TIMES, axis=1)


# 1. Codecs


def plain(codec: Any, itemsize: int) -> Any:
    """Return the numcodecs codec behind a Zarr codec."""
    match codec:
        case ZstdCodec():
            return numcodecs.Zstd(codec.level)
        case GzipCodec():
            return numcodecs.GZip(codec.level)
        case BloscCodec():
            shuffle = ("noshuffle", "shuffle", "bitshuffle").index(codec.shuffle.value)
            return numcodecs.Blosc(codec.cname.value, codec.clevel, shuffle, codec.blocksize, itemsize)
        case _:
            return None


def cpu_seconds(run: Callable[[], Any], runs: int) -> float:
    """Return the least CPU seconds of this thread: others share the machine."""
    found = []
    for _ in range(runs):
        start = time.thread_time()
        run()
        found.append(time.thread_time() - start)
    return min(found)


def speeds(codec: Any, values: NDArray[Any], runs: int) -> tuple[list[bytes], float, float]:
    """Return each chip's bytes, and the seconds it takes to encode and to decode all."""
    out = np.empty(values[0].nbytes, np.uint8)
    pieces = [codec.encode(chip) for chip in values]
    encode = cpu_seconds(lambda: [codec.encode(chip) for chip in values], runs)
    return pieces, encode, cpu_seconds(lambda: [codec.decode(piece, out) for piece in pieces], runs)


def codec_table(world: World, runs: int) -> str:
    """Return a table in Markdown: pixels x codec."""
    lines = [
        "| pixels | codec | encode, MB/s a core | decode, MB/s a core | bytes stored |",
        "|---|---|---:|---:|---:|",
    ]
    for kind, values in samples(world):
        size, own = values.dtype.itemsize, codec_of("auto", values.dtype)
        for name, codec in CODECS.items():
            if size == 1 and ", shuffle" in name:
                continue  # there is nothing to shuffle
            chosen = " (default)" if codec is not None and plain(codec, size) == plain(own, size) else ""
            if codec is None:
                lines.append(f"| {kind} | {name} | - | - | 100 % |")
                continue
            pieces, encode, decode = speeds(plain(codec, size), values, runs)
            stored = sum(map(len, pieces)) / values.nbytes
            mb = values.nbytes / 1e6
            lines.append(
                f"| {kind} | {name}{chosen} | {mb / encode:.0f} | {mb / decode:.0f} | {stored:.1%} |"
            )
    return "\n".join(lines)


# 2. Against a bare loop


@dataclass(frozen=True)
class Work:
    """Shards in memory, and the layout they are written by."""

    layout: Layout
    shards: list[dict[str, xr.Dataset]]

    @property
    def nbytes(self) -> int:
        """Bytes of pixels and masks."""
        return sum(d[n].nbytes for s in self.shards for d in s.values() for n in ("pixels", "valid"))


def work(world: World, shards: int, chips: int, compression: Any) -> Work:
    """Return shards of (chips, 6, 4, 256, 256) uint16 with their masks."""
    s2 = rd.build_from_stac(world.sentinel2, name="s2").harmonize(list(BANDS), units="raw")
    planned = s2.chips(SIZE_PX, cell_km=SIZE_PX / 50, stride=SIZE_PX // 4)
    layout = planned._layout
    job = replace(layout.job, hierarchies=(Hierarchy(None, 0, 0, shards * chips, chips),))
    assert shards * chips <= len(planned), f"the world holds {len(planned)} chips"
    output = replace(layout.outputs[0], times=TIMES)
    folders = sorted(p for p in world.sentinel2.parent.iterdir() if p.is_dir())
    pixels = np.concatenate([tiled(scene(f)) for f in folders])
    valid = np.concatenate([tiled(clear(f)) for f in folders])[:, :, 0]
    rng = np.random.default_rng(1)
    made = []
    for _ in range(shards):
        take = rng.integers(0, len(pixels), (chips, TIMES))
        mask = valid[take, 0]
        two = ("chip", "time")
        made.append(
            {
                "s2": xr.Dataset(
                    {
                        "pixels": (("chip", "time", "band", "y", "x"), pixels[take, 0]),
                        "valid": (("chip", "time", "y", "x"), mask),
                    },
                    {
                        "valid_fraction": (two, mask.mean(axis=(2, 3), dtype=np.float64).astype(np.float32)),
                        "datetime": (two, np.full(take.shape, np.datetime64("2024-04-01T10:00", "us"))),
                        "member": (two, np.full(take.shape, "s2", dtype=object)),
                    },
                )
            }
        )
    return Work(replace(layout, job=job, outputs=(output,), compression=compression), made)


def ours(task: Work, store: Path) -> None:
    """Write all shards, one after another."""
    for number, datasets in enumerate(task.shards):
        write_shard(
            task.layout.job, (0, number), remote.join(str(store), JOB), datasets, task.layout.said[:8]
        )


def bare(task: Work, store: Path, threads: ThreadPoolExecutor) -> None:
    """Compress each chip on the threads, add an index, write a file."""
    for number, datasets in enumerate(task.shards):
        for name in ("pixels", "valid"):
            values = datasets["s2"][name].values
            codec = plain(codec_of(task.layout.compression, values.dtype), values.dtype.itemsize)
            pieces = list(values.view(np.uint8) if codec is None else threads.map(codec.encode, values))
            ends = np.cumsum([0, *(memoryview(piece).nbytes for piece in pieces)])
            index = np.stack([ends[:-1], np.diff(ends)], -1).astype("<u8").tobytes()
            checksum = struct.pack("<I", google_crc32c.value(index))
            path = store / name / str(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as file:
                for piece in (*pieces, index, checksum):
                    file.write(piece)


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def by_zarr(task: Work, store: Path) -> None:
    """Write the same arrays through zarr-python."""
    at = 0
    for datasets in task.shards:
        chips = datasets["s2"].sizes["chip"]
        for name in ("pixels", "valid"):
            zarr.open_array(store / name, mode="r+")[at : at + chips] = datasets["s2"][name].values
        at += chips


def compare(task: Work, folder: Path, runs: int) -> str:
    """Return what ours takes, as multiples of the bare loop."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": [], "zarr-python": []}
    with ThreadPoolExecutor(CPU_COUNT) as threads:
        ways: dict[str, Callable[[Path], None]] = {
            "ours": lambda store: ours(task, store),
            "bare": lambda store: bare(task, store, threads),
            "zarr-python": lambda store: by_zarr(task, store),
        }
        for run in range(runs + 1):  # the first one warms up
            for name in random.Random(run).sample(list(found), len(found)):
                store = folder / name
                shutil.rmtree(store, ignore_errors=True)
                if name != "bare":
                    prepare(task.layout, str(store))
                wall, cpu = time.perf_counter(), time.process_time()
                ways[name](store)
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    lines = []
    for at, what in enumerate(("wall", "CPU")):
        bare_s = [t[at] for t in found["bare"][1:]]
        for name in found:
            own = [t[at] for t in found[name][1:]]
            ratios = [a / b for a, b in zip(own, bare_s, strict=True)]
            lines.append(
                f"| {name} | {what} | {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f}) "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    stored = sum(p.stat().st_size for p in (folder / "ours").rglob("c/**/*") if p.is_file())
    return "\n".join(
        [
            f"{task.nbytes / 1e6:.0f} MB of pixels and masks, {stored / 1e6:.0f} MB stored",
            "",
            "| | | seconds | of the bare loop |",
            "|---|---|---|---|",
            *lines,
        ]
    )


# 3. Reading back


class Counting(LocalStore):
    """A local store that notes what is asked of it."""

    seen: list[tuple[str, Any]]

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        self.seen.append((key, byte_range))
        return await super().get(key, prototype, byte_range)


def reads(task: Work, store: Path, runs: int) -> Iterable[str]:
    """Yield how long chips take, the file cache warm."""
    array = zarr.open_array(store / "pixels", mode="r")
    lazy = xr.open_zarr(store, chunks=None, mask_and_scale=False)["pixels"]
    rng = np.random.default_rng(2)
    picked = rng.choice(array.shape[0], 32, replace=False).tolist()
    per = task.layout.job.hierarchies[0].per_shard
    noting = Counting(store, read_only=True)
    noting.seen = []
    noted = zarr.open_array(noting, path="pixels", mode="r")
    noting.seen.clear()
    noted[picked[0]]
    asked = ", ".join(type(byte_range).__name__ for _, byte_range in noting.seen)
    yield f"requests for a chip: {len(noting.seen)} ({asked})"

    def each(read: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: [read(chip) for chip in picked]

    with ThreadPoolExecutor(16) as threads:
        ways: dict[str, Callable[[], Any]] = {
            "32 random chips, zarr array[i], in turn": each(lambda i: array[i]),
            "32 random chips, zarr array[i], 16 threads": lambda: list(
                threads.map(lambda i: array[i], picked)
            ),
            "32 random chips, xarray isel(chip=i), in turn": each(lambda i: lazy.isel(chip=i).values),
            "a whole shard, zarr array[a:b]": lambda: array[:per],
            "a whole shard, array[i] on 16 threads": lambda: list(
                threads.map(lambda i: array[i], range(per))
            ),
        }
        for name, read in ways.items():
            walls = [timed(read)[0] for _ in range(runs + 1)][1:]
            yield f"{name}: {statistics.median(walls) * 1e3:.0f} ms"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rasteret-dask-write")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--chips", type=int, default=32, help="chips a shard")
    parser.add_argument("--only", choices=["codecs", "bare"])
    arguments = parser.parse_args(argv)
    world = make_world(arguments.folder / "world", size=WorldSize(1200, 1440, 792))
    if arguments.only != "bare":
        print(codec_table(world, arguments.runs))
    if arguments.only == "codecs":
        return
    for compression in ("auto", None):
        task = work(world, arguments.shards, arguments.chips, compression)
        print(f"\ncompression={compression!r}: {compare(task, arguments.folder, arguments.runs)}")
        store = arguments.folder / "ours"
        commit(str(store), task.layout.job)
        print("\n".join(reads(task, store, arguments.runs)))
        shutil.rmtree(store)
        shutil.rmtree(arguments.folder / "bare")
        shutil.rmtree(arguments.folder / "zarr-python")


if __name__ == "__main__":
    main()
