"""The bar: threads that fetch a tile, decode it and put it in its place; and the same, compressed and written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any
from urllib.parse import urlsplit

import google_crc32c
import imagecodecs
import numcodecs
import numpy as np
import obstore
import pyarrow.parquet as pq
import zarr
from contender import Prepared
from jobs import Job
from numpy.typing import NDArray
from obstore.store import HTTPStore

from rasteret_dask.table.records import Level, Records


@dataclass(frozen=True)
class Tile:
    """One tile of one band, and the chips it touches."""

    path: str
    start: int
    length: int
    level: Level
    time: int
    band: int
    parts: tuple[tuple[int, tuple[slice, slice], tuple[slice, slice]], ...]
    """Per chip: its number, its rows and columns, and those of the tile (north-up)."""


def read(job: Job, threads: int) -> Prepared:
    """Prepare reading into one array (chip, time, band, y, x); which byte is where is known before the clock runs."""
    tiles, store = _tiles(job, list(job.chips())), _store(job)

    def run() -> NDArray[Any]:
        out = _empty(job)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_placing(store, out), tiles))
        return out

    return Prepared(run, iter)


def write(job: Job, threads: int) -> Prepared:
    """Prepare the same, and writing the shards of the store ``job.layout`` with its codec."""
    layout = Path(job.layout)
    group = zarr.open_group(layout, mode="r")
    bounds = np.asarray(zarr.open_array(layout / "bounds", mode="r"))
    tiles, store = _tiles(job, [tuple(box) for box in bounds.tolist()]), _store(job)
    arrays = [_Sharded.of(layout, name) for name in ("pixels", "valid") if name in group]

    def run() -> Path:
        target = Path(job.store)
        pixels = _empty(job)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_placing(store, pixels), tiles))
        with ThreadPoolExecutor(job.threads) as pool:
            for array in arrays:
                encode: Callable[[int], bytes] = (
                    (lambda i, a=array: a.encode(pixels[i]))  # type: ignore[misc]
                    if array.name == "pixels"
                    else (lambda i, a=array: a.encode((pixels[i] != job.nodata).all(1)))  # type: ignore[misc]
                )
                chunks = list(pool.map(encode, range(len(pixels))))
                list(
                    pool.map(
                        lambda n, a=array, c=chunks: a.put(target, n, c), range(array.shards(len(chunks)))
                    )
                )
        return target

    return Prepared(run, lambda target: _stored(job, layout, target, bounds))


def _store(job: Job) -> HTTPStore:
    href = job.load_items()[0]["assets"]
    url = urlsplit(next(iter(href.values()))["href"])
    return HTTPStore.from_url(f"{url.scheme}://{url.netloc}", client_options={"allow_http": True})


def _empty(job: Job) -> NDArray[Any]:
    times = len(job.load_items())
    return np.empty((job.count, times, len(job.bands), job.chip_px, job.chip_px), job.dtype)


def _tiles(job: Job, chips: list[Any]) -> list[Tile]:
    records = Records(pq.read_table(job.table))
    order = np.argsort(records.starts)
    found = []
    for time, row in enumerate(order.tolist()):
        for band, name in enumerate(job.bands):
            asset = records.asset(row, name)
            path = urlsplit(asset.href).path.lstrip("/")
            touched = _touched(asset.image, chips, job.chip_px)
            for number, parts in sorted(touched.items()):
                start, length = asset.image.tile_offsets[number], asset.image.tile_byte_counts[number]
                found.append(Tile(path, start, length, asset.image, time, band, tuple(parts)))
    return found


def _touched(level: Level, chips: list[Any], size: int) -> dict[int, list[Any]]:
    """Return {tile: its parts} of one level; rows of a south-up file are counted from the north."""
    a, _, x0, _, e, y0 = level.transform
    north = y0 if e < 0 else y0 + e * level.height
    across, down = -(-level.width // level.tile_width), -(-level.height // level.tile_height)
    found: dict[int, list[Any]] = {}
    for chip, (west, _, _, top) in enumerate(chips):
        col, row = round((west - x0) / a), round((north - top) / a)
        for j in range(row // level.tile_height, (row + size - 1) // level.tile_height + 1):
            for i in range(col // level.tile_width, (col + size - 1) // level.tile_width + 1):
                ours, theirs = zip(
                    _overlap(row, size, j * level.tile_height, level.tile_height),
                    _overlap(col, size, i * level.tile_width, level.tile_width),
                    strict=True,
                )
                tile = (j if e < 0 else down - 1 - j) * across + i
                found.setdefault(tile, []).append((chip, ours, theirs))
    return found


def _overlap(start: int, size: int, tile: int, side: int) -> tuple[slice, slice]:
    low, high = max(start, tile), min(start + size, tile + side)
    return slice(low - start, high - start), slice(low - tile, high - tile)


def _placing(store: HTTPStore, out: NDArray[Any]) -> Callable[[Tile], None]:
    scratch = local()

    def place(tile: Tile) -> None:
        data: Any = obstore.get_range(store, tile.path, start=tile.start, length=tile.length)
        level = tile.level
        shape = (level.tile_height, level.tile_width)
        if not hasattr(scratch, "raw"):
            scratch.raw, scratch.pixels = np.empty(shape, level.dtype), np.empty(shape, level.dtype)
        pixels = scratch.raw
        flat = pixels.reshape(-1).view(np.uint8)
        decode = imagecodecs.zstd_decode if level.compression == 50000 else imagecodecs.deflate_decode
        decode(data, out=flat)
        if level.predictor == 2:
            imagecodecs.delta_decode(pixels, axis=-1, out=scratch.pixels)
            pixels = scratch.pixels
        if level.transform[4] > 0:
            pixels = pixels[::-1]
        for chip, ours, theirs in tile.parts:
            out[chip, tile.time, tile.band][ours] = pixels[theirs]

    return place


@dataclass(frozen=True)
class _Sharded:
    """How an array's chunks become the bytes of its shards (Zarr v3, ``sharding_indexed``)."""

    name: str
    per_shard: int
    compressor: Any

    @classmethod
    def of(cls, store: Path, name: str) -> _Sharded:
        meta = json.loads((store / name / "zarr.json").read_text())
        (sharding,) = meta["codecs"]
        *_, last = sharding["configuration"]["codecs"]
        with_settings = last.get("configuration", {})
        if last["name"] == "blosc":
            shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[with_settings["shuffle"]]
            compressor = numcodecs.Blosc(
                with_settings["cname"], with_settings["clevel"], shuffle, typesize=with_settings["typesize"]
            )
        elif last["name"] == "zstd":
            compressor = numcodecs.Zstd(with_settings["level"], with_settings.get("checksum", False))
        else:
            raise SystemExit(f"the bare loop cannot write {last['name']!r}, which {store}/{name} has")
        if sharding["configuration"].get("index_location", "end") != "end":
            raise SystemExit(
                f"the bare loop writes a shard's index at its end, {store}/{name} has it elsewhere"
            )
        return cls(name, meta["chunk_grid"]["configuration"]["chunk_shape"][0], compressor)

    def encode(self, chunk: NDArray[Any]) -> bytes:
        """Return one chip's bytes."""
        return bytes(self.compressor.encode(np.ascontiguousarray(chunk)))

    def shards(self, chips: int) -> int:
        """Return how many shards hold so many chips."""
        return -(-chips // self.per_shard)

    def put(self, target: Path, number: int, chunks: list[bytes]) -> None:
        """Write one shard: its chunks, then (offset, length) of each, then their crc32c."""
        own = chunks[number * self.per_shard : (number + 1) * self.per_shard]
        index, at = bytearray(), 0
        for chunk in own:
            index += struct.pack("<QQ", at, len(chunk))
            at += len(chunk)
        index += b"\xff" * 16 * (self.per_shard - len(own))
        crc = struct.pack("<I", google_crc32c.value(bytes(index)))
        rest = "/0" * (4 if self.name == "pixels" else 3)
        path = target / self.name / f"c/{number}{rest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join((*own, bytes(index), crc)))


def _stored(job: Job, layout: Path, target: Path, bounds: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for meta in layout.rglob("zarr.json"):
        place = target / meta.relative_to(layout)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(meta, place)
    pixels = zarr.open_array(target / "pixels", mode="r")
    at = {(round(b[0]), round(b[3])): i for i, b in enumerate(bounds.tolist())}
    for west, _, _, north in job.chips():
        yield np.asarray(pixels[at[round(west), round(north)]])
