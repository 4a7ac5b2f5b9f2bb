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

from rasteret_dask.table.records import Asset, Level, Records


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of one band, and the chips it touches."""

    path: str
    start: int
    length: int
    level: Level
    time: int
    band: int
    parts: tuple[tuple[int, tuple[slice, slice], tuple[slice, slice]], ...]
    """Per chip: its number, its rows and columns, and those of the tile, as the file has them."""
    table: NDArray[Any] | None = None
    """What each stored number becomes; None: itself."""


def read(job: Job, threads: int) -> Prepared:
    """Prepare reading into one array (chip, time, band, y, x); which byte is where is known before the clock runs."""
    tiles, store = _tiles(job, list(job.chips())), store_of(job.load_items()[0])

    def run() -> NDArray[Any]:
        out = _empty(job)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(placing(store, lambda tile: out[:, tile.time, tile.band]), tiles))
        return out

    return Prepared(run, iter)


def write(job: Job, threads: int) -> Prepared:
    """Prepare the same, and writing the shards of the store ``job.layout`` with its codec."""
    layout = Path(job.layout)
    group = zarr.open_group(layout, mode="r")
    bounds = np.asarray(zarr.open_array(layout / "bounds", mode="r"))
    tiles, store = _tiles(job, [tuple(box) for box in bounds.tolist()]), store_of(job.load_items()[0])
    arrays = [Sharded.of(layout, name) for name in ("pixels", "valid") if name in group]

    def run() -> Path:
        target = Path(job.store)
        pixels = _empty(job)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(placing(store, lambda tile: pixels[:, tile.time, tile.band]), tiles))
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


def store_of(item: dict[str, Any]) -> HTTPStore:
    """Return the server of an item's files."""
    url = urlsplit(next(iter(item["assets"].values()))["href"])
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
            table = None if job.units == "raw" else reflectance(asset.scale, asset.offset, "uint16")
            found += tiles_of(asset, corners(asset.image, chips), job.chip_px, (time, band), table)
    return found


def reflectance(scale: float | None, offset: float | None, dtype: str) -> NDArray[Any]:
    """Return what each number of 16 bits becomes: float32, NaN for 0; or x 1e4 as uint16, 65535 for 0."""
    values = (np.arange(2**16) * (1.0 if scale is None else scale) + (offset or 0.0)).astype(np.float32)
    if dtype == "uint16":
        values = np.clip(np.rint(values.astype(np.float64) * 1e4), 0, 65534).astype(np.uint16)
    values[0] = 65535 if dtype == "uint16" else np.nan
    return values


def corners(level: Level, chips: list[Any]) -> list[tuple[int, int]]:
    """Return (column, row) of each chip's first pixel; rows of a south-up file are counted from the north."""
    a, _, x0, _, _, _ = level.transform
    return [(round((west - x0) / a), round((north_of(level) - top) / a)) for west, _, _, top in chips]


def north_of(level: Level) -> float:
    """Return the northern edge, metres."""
    e, y0 = level.transform[4:]
    return y0 if e < 0 else y0 + e * level.height


def tiles_of(
    asset: Asset,
    chips: list[tuple[int, int]],
    size: int,
    place: tuple[int, int],
    table: NDArray[Any] | None = None,
) -> list[Tile]:
    """Return the tiles of a band under chips of ``size`` pixels, given by their first (column, row)."""
    path, image = urlsplit(asset.href).path.lstrip("/"), asset.image
    return [
        Tile(path, image.tile_offsets[n], image.tile_byte_counts[n], image, *place, tuple(parts), table)
        for n, parts in sorted(_touched(image, chips, size).items())
    ]


def _touched(level: Level, chips: list[tuple[int, int]], size: int) -> dict[int, list[Any]]:
    """Return {tile: its parts} of one level; tiles of a south-up file begin in the south."""
    south_up = level.transform[4] > 0
    across = -(-level.width // level.tile_width)
    found: dict[int, list[Any]] = {}
    for chip, (col, north) in enumerate(chips):
        row = level.height - north - size if south_up else north
        last_row, last_col = min(row + size, level.height) - 1, min(col + size, level.width) - 1
        for j in range(max(row, 0) // level.tile_height, last_row // level.tile_height + 1):
            for i in range(max(col, 0) // level.tile_width, last_col // level.tile_width + 1):
                (rows, cols), theirs = zip(
                    _overlap(row, last_row + 1, j * level.tile_height, level.tile_height),
                    _overlap(col, last_col + 1, i * level.tile_width, level.tile_width),
                    strict=True,
                )
                rows = slice(size - rows.stop, size - rows.start) if south_up else rows
                found.setdefault(j * across + i, []).append((chip, (rows, cols), theirs))
    return found


def _overlap(start: int, stop: int, tile: int, side: int) -> tuple[slice, slice]:
    """Return what pixels ``start`` to ``stop`` share with a tile, counted from ``start`` and from the tile."""
    low, high = max(start, tile), min(stop, tile + side)
    return slice(low - start, high - start), slice(low - tile, high - tile)


def placing(store: HTTPStore, target: Callable[[Tile], NDArray[Any]]) -> Callable[[Tile], None]:
    """Return what fetches a tile, decodes it and copies its parts to ``target(tile)``, shape (chip, y, x)."""
    scratch = local()

    def place(tile: Tile) -> None:
        data: Any = obstore.get_range(store, tile.path, start=tile.start, length=tile.length)
        level = tile.level
        shape = (level.tile_height, level.tile_width)
        if getattr(scratch, "made", None) != (shape, level.dtype):
            scratch.made = shape, level.dtype
            scratch.raw, scratch.pixels = np.empty(shape, level.dtype), np.empty(shape, level.dtype)
        pixels = scratch.raw
        flat = pixels.reshape(-1).view(np.uint8)
        decode = imagecodecs.zstd_decode if level.compression == 50000 else imagecodecs.deflate_decode
        decode(data, out=flat)
        if level.predictor == 2:
            imagecodecs.delta_decode(pixels, axis=-1, out=scratch.pixels)
            pixels = scratch.pixels
        out, down = target(tile), -1 if level.transform[4] > 0 else 1
        for chip, ours, theirs in tile.parts:
            part = pixels[theirs][::down]
            out[chip][ours] = part if tile.table is None else tile.table[part]

    return place


@dataclass(frozen=True)
class Sharded:
    """How an array's chunks become the bytes of its shards (Zarr v3, ``sharding_indexed``)."""

    name: str
    """Path below the store."""
    axes: int
    per_shard: int
    compressor: Any
    checked: bool
    """Whether each chunk ends with its checksum."""

    @classmethod
    def of(cls, store: Path, name: str) -> Sharded:
        """Read how the array of a store is written."""
        meta = json.loads((store / name / "zarr.json").read_text())
        (sharding,) = meta["codecs"]
        codecs = sharding["configuration"]["codecs"]
        checked = codecs[-1]["name"] == "crc32c"
        last = codecs[-2 if checked else -1]
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
        shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
        return cls(name, len(shape), shape[0], compressor, checked)

    def encode(self, chunk: NDArray[Any]) -> bytes:
        """Return one chip's bytes."""
        stored = bytes(self.compressor.encode(np.ascontiguousarray(chunk)))
        return stored + struct.pack("<I", google_crc32c.value(stored)) if self.checked else stored

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
        path = target / self.name / f"c/{number}{'/0' * (self.axes - 1)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join((*own, bytes(index), crc)))


def copy_metadata(layout: Path, target: Path) -> None:
    """Give a store of shards the metadata of another one."""
    for meta in layout.rglob("zarr.json"):
        place = target / meta.relative_to(layout)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(meta, place)


def _stored(job: Job, layout: Path, target: Path, bounds: NDArray[Any]) -> Iterator[NDArray[Any]]:
    copy_metadata(layout, target)
    pixels = zarr.open_array(target / "pixels", mode="r")
    at = {(round(b[0]), round(b[3])): i for i, b in enumerate(bounds.tolist())}
    for west, _, _, north in job.chips():
        yield np.asarray(pixels[at[round(west), round(north)]])
