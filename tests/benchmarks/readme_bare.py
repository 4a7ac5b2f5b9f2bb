"""The bar of the README's job: its arithmetic in loops, with the plan, the chips and every tile's place given."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import readme_store
import zarr
from bare import Sharded, Tile, copy_metadata, corners, north_of, placing, reflectance, store_of, tiles_of
from contender import Prepared
from jobs import Box, ReadmeJob
from numpy.typing import NDArray
from readme_plan import Source, sources

from rasteret_dask.table.records import Level, Records

ASSETS = {"s2": ("red", "green", "blue", "nir", "scl"), "l8": ("red", "green", "blue", "nir08", "qa_pixel")}
"""Asset keys."""
COARSE_PX = 45
"""Rows and columns of 30 m under a chip of 1280 m and half a pixel around it, whatever its place."""

CLOUD_CLASSES, CLOUD_BITS = (3, 8, 9, 10), 0b11010
"""SCL: shadow, cloud, cirrus. QA_PIXEL: dilated cloud, cloud, shadow."""


@dataclass(frozen=True, eq=False)
class _Taps:
    """Where the rows or columns of a chip lie among coarser ones."""

    low: NDArray[np.int64]
    """The first of the two that a bilinear kernel takes."""
    share: NDArray[np.float32]
    """Of the second."""
    nearest: NDArray[np.int64]

    @classmethod
    def of(cls, start: float, first: int, pixel_m: float) -> _Taps:
        """Place 128 pixels of 10 m that begin ``start`` pixels in, counted from pixel ``first``."""
        centre = start + (np.arange(128) + 0.5) * 10 / pixel_m - first
        low = np.floor(centre - 0.5).astype(np.int64)
        return cls(low, (centre - 0.5 - low).astype(np.float32), np.floor(centre).astype(np.int64))

    def between(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Interpolate along one of the last two axes."""
        share = self.share if axis == -1 else self.share[:, None]
        one, two = (np.take(values, at, axis) for at in (self.low, np.minimum(self.low + 1, COARSE_PX - 1)))
        return np.asarray(one + (two - one) * share)


@dataclass(frozen=True, eq=False)
class _Record:
    """One optical record, the chips it feeds, and what its numbers mean."""

    source: Source
    chips: dict[int, int]
    """Chip -> its place among this record's."""
    places: list[tuple[int, int]]
    """Per place the first column and row of its bands' windows."""
    levels: tuple[Level, Level]
    """Of bands and of the quality band."""
    tables: tuple[NDArray[Any], ...]
    """Per band: stored number -> output."""
    hidden: NDArray[np.bool_]
    """Number of the quality band -> whether it hides the ground."""
    tiles: list[Tile]
    """``time`` is the record's number, ``band`` 4 the quality band."""
    kernels: tuple[tuple[_Taps, _Taps], ...] = ()
    """Per place, of a coarse record: rows and columns."""

    def memory(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return room for the windows: bands (place, band, y, x) and quality (place, y, x)."""
        size = COARSE_PX if self.source.sensor == "l8" else 128
        quality = COARSE_PX if self.source.sensor == "l8" else 64
        return (
            np.zeros((len(self.chips), 4, size, size), np.uint16),
            np.zeros((len(self.chips), quality, quality), self.levels[1].dtype),
        )


def write(job: ReadmeJob, threads: int) -> Prepared:
    """Prepare reading, scaling, masking, filling, joining, and writing the shards of ``job.layout``."""
    layout = Path(job.layout)
    chips = readme_store.bounds(layout)
    plan = sources(job, chips)
    records = _records(job, chips, plan)
    items = job.load_items()
    annual = Records(pq.read_table(f"{job.tables}/aef.parquet"))
    vectors = [annual.asset(0, f"A{i:02d}") for i in range(64)]
    first = corners(vectors[0].image, chips)
    tiles = [t for i, v in enumerate(vectors) for t in tiles_of(v, first, job.chip_px, (len(records), i))]
    tiles += [t for record in records for t in record.tiles]
    store = store_of(items["aef"][0])
    group = zarr.open_group(layout, mode="r")
    names = [f"{source}/{array}" for source in ("optical", "embeddings") for array in ("pixels", "valid")]
    arrays = {n: Sharded.of(layout, n) for n in names if n in group}
    numbers = {record.source: n for n, record in enumerate(records)}

    def run() -> Path:
        memory = [record.memory() for record in records]
        embedded = np.empty((len(chips), 1, 64, job.chip_px, job.chip_px), np.int8)

        def target(tile: Tile) -> NDArray[Any]:
            if tile.time == len(records):
                return embedded[:, 0, tile.band]
            bands, quality = memory[tile.time]
            return quality if tile.band == 4 else bands[:, tile.band]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(placing(store, target), tiles))

        def encoded(chip: int) -> dict[str, bytes]:
            pixels = np.empty((3, 4, job.chip_px, job.chip_px), job.dtype)
            for slot, feeding in enumerate(plan[chip]):
                for rank, source in enumerate(feeding):
                    record, (bands, quality) = records[numbers[source]], memory[numbers[source]]
                    _put(record, bands, quality, chip, pixels[slot], rank > 0)
            chunks = {
                "optical/pixels": pixels,
                "optical/valid": (pixels != 65535).all(1) if job.dtype == "uint16" else None,
                "embeddings/pixels": embedded[chip],
                "embeddings/valid": (embedded[chip] != -128).all(1),
            }
            return {n: array.encode(chunks[n]) for n, array in arrays.items()}

        with ThreadPoolExecutor(job.threads) as pool:
            chunks = list(pool.map(encoded, range(len(chips))))
            for name, array in arrays.items():
                put = partial(_put_shard, Path(job.store), array, [c[name] for c in chunks])
                list(pool.map(put, range(array.shards(len(chips)))))
        copy_metadata(layout, Path(job.store))
        return Path(job.store)

    return Prepared(run, partial(readme_store.aligned, job), partial(readme_store.resampled, job))


def _put_shard(target: Path, array: Sharded, chunks: list[bytes], number: int) -> None:
    array.put(target, number, chunks)


def _put(
    record: _Record,
    bands: NDArray[Any],
    quality: NDArray[Any],
    chip: int,
    out: NDArray[Any],
    filling: bool,
) -> None:
    """Write a record's pixels of one chip, shape (band, y, x), or fill what is invalid there."""
    place = record.chips[chip]
    raw, hidden = bands[place], record.hidden[quality[place]]
    if record.kernels:
        rows, cols = record.kernels[place]
        raw = (cols.between(rows.between(raw.astype(np.float32), -2), -1) + np.float32(0.5)).astype(np.uint16)
        hidden = hidden[rows.nearest[:, None], cols.nearest]
    else:
        hidden = hidden.repeat(2, axis=0).repeat(2, axis=1)
    missing = np.nan if out.dtype.kind == "f" else 65535
    for band, table in enumerate(record.tables):
        values = table[raw[band]]
        values[hidden] = missing
        if not filling:
            out[band] = values
        else:
            empty = np.isnan(out[band]) if out.dtype.kind == "f" else out[band] == missing
            np.copyto(out[band], values, where=empty)


def _records(job: ReadmeJob, chips: list[Box], plan: list[tuple[tuple[Source, ...], ...]]) -> list[_Record]:
    fed: dict[Source, dict[int, int]] = {}
    for chip, slots in enumerate(plan):
        for source in (s for slot in slots for s in slot):
            fed.setdefault(source, {}).setdefault(chip, len(fed.get(source, ())))
    found = []
    items = job.load_items()
    tables = {n: Records(pq.read_table(f"{job.tables}/{n}.parquet")) for n in ("s2", "l8")}
    for number, (source, places) in enumerate(fed.items()):
        records = tables[source.sensor]
        row = records.table.column("id").to_pylist().index(items[source.sensor][source.number]["id"])
        names = {asset["asset"]: name for name, asset in records.table.column("assets")[row].as_py()}
        *bands, quality = (records.asset(row, names[key]) for key in ASSETS[source.sensor])
        boxes = [chips[chip] for chip in places]
        coarse = source.sensor == "l8"
        at = _coarse_corners(bands[0].image, boxes) if coarse else corners(bands[0].image, boxes)
        below = at if coarse else corners(quality.image, boxes)
        size = COARSE_PX if coarse else job.chip_px
        tiles = [t for b, asset in enumerate(bands) for t in tiles_of(asset, at, size, (number, b))]
        tiles += tiles_of(quality, below, COARSE_PX if coarse else size // 2, (number, 4))
        values = np.arange(2**16)
        found.append(
            _Record(
                source,
                places,
                at,
                (bands[0].image, quality.image),
                tuple(reflectance(a.scale, a.offset, job.dtype) for a in bands),
                values & CLOUD_BITS != 0 if coarse else np.isin(values, CLOUD_CLASSES),
                tiles,
                tuple(_kernels(bands[0].image, box, corner) for box, corner in zip(boxes, at, strict=True))
                if coarse
                else (),
            )
        )
    return found


def _coarse_corners(level: Level, chips: list[Box]) -> list[tuple[int, int]]:
    a, _, x0, _, _, _ = level.transform
    north = north_of(level)
    return [(int((west + 5 - x0) / a - 0.5), int((north - top + 5) / a - 0.5)) for west, _, _, top in chips]


def _kernels(level: Level, chip: Box, corner: tuple[int, int]) -> tuple[_Taps, _Taps]:
    """Return where the rows and the columns of a chip lie in its window."""
    a, _, x0, _, _, _ = level.transform
    west, _, _, top = chip
    return _Taps.of((north_of(level) - top) / a, corner[1], a), _Taps.of((west - x0) / a, corner[0], a)
