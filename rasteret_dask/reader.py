"""Reads pixels of assets onto a grid, in one batch, from cached headers."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.env import set_gdal_config
from rasterio.errors import RasterioError

from rasteret_dask.errors import ReadError
from rasteret_dask.harmonize import dequantize
from rasteret_dask.rasterfile import RasterFile, gdal_env, read_error
from rasteret_dask.readplan import (
    Frame,
    Grid,
    ReadPlan,
    Rect,
    Request,
    Window,
    has_mask,
    is_aligned,
    plan_read,
    rect_tiles,
    sparse_tiles,
    tile_rect,
    tiles_of,
)
from rasteret_dask.records import Asset, Level
from rasteret_dask.warp import SourceBlock, valid_pixels, warp_block

__all__ = ["Block", "Counts", "Grid", "Request", "Session", "Window", "is_aligned", "tiles_of"]

GDAL_CACHE_BYTES = 64 * 2**20
"""GDAL's own cache of tiles: none is asked for twice, so it needs only those being decoded."""

_FAST_COMPRESSION = frozenset({1, 5, 8, 32946, 50000})  # none, LZW, deflate twice, ZSTD: TIFF tag 259


@dataclass(slots=True)
class Block:
    """The pixels of one request."""

    values: NDArray[Any]
    """Shape (window, y, x), the asset's dtype: kernels of integer bands are rounded to it, as GDAL does; float32
    where the request decodes. What stands where ``valid`` is False means nothing."""
    valid: NDArray[np.bool_]
    """Shape (window, y, x). True where the raster covers the pixel, which is neither nodata, NaN nor masked."""


@dataclass(slots=True)
class Counts:
    """What a session has done so far."""

    files_opened: int = 0
    """Levels of files; an overview is a dataset of its own."""
    tiles_read: int = 0
    """A tile of a chunky file counts once, whatever the number of bands taken from it."""
    tiles_reused: int = 0
    """Tiles (per band) that were kept from an earlier call."""
    bytes_decoded: int = 0
    """Bytes of the pixels taken from tiles."""
    warped_requests: int = 0
    """Requests whose pixels are not the file's own."""
    gdal_fallback: int = 0
    """Requests of files that take GDAL: JPEG 2000, strips, rotated, masked or unusually compressed."""


@dataclass(slots=True)
class _Target:
    """An array that tiles are pasted into; its first pixel is (row, col) of the level."""

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None
    """True where valid; None where the array is only to be warped and has no mask."""
    row: int
    col: int


@dataclass(slots=True)
class _Reading:
    """One request on its way: its plan, its result, and the blocks to warp into it."""

    request: Request
    plan: ReadPlan
    block: Block
    nodata: float | None
    targets: list[_Target]


@dataclass(slots=True)
class _Job:
    """What is wanted of one level of one file."""

    href: str
    level: int
    file: RasterFile
    readings: list[_Reading] = field(default_factory=list)
    wanted: dict[int, dict[int, list[tuple[_Target, _Reading]]]] = field(default_factory=dict)
    """tile -> band index -> where it goes."""
    kept: dict[int, set[int]] = field(default_factory=dict)
    """tile -> band indexes that later calls will ask for."""
    assets: dict[int, Asset] = field(default_factory=dict)
    """band index -> asset."""

    def key(self, band: int, tile: int) -> _TileKey:
        """Name one band of one tile within a session."""
        return self.href, self.level, band, tile


_TileKey = tuple[str, int, int, int]  # href, level, band index, tile
_Pixels = tuple[NDArray[Any], NDArray[np.bool_] | None]


class Session:
    """Reads for one task: each file is opened at most once, each tile decoded at most once.

    Parameters
    ----------
    threads
        Files read and blocks warped at the same time. A file is read by one thread at a time.

    Notes
    -----
    A tile is decoded again only when a later call wants it and no earlier call had it in ``keep``. The bytes
    being decoded at the same time are bounded over all sessions of a process.
    """

    def __init__(self, threads: int = 4) -> None:
        self.counts = Counts()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rasteret-read")
        self._files: dict[tuple[str, int], RasterFile] = {}
        self._retained: dict[_TileKey, _Pixels] = {}
        self._lock = Lock()

    def __enter__(self) -> Session:
        _bound_gdal_cache()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files and forget all tiles."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._retained.clear()

    def forget(self) -> None:
        """Forget the tiles that were kept for calls that did not come."""
        self._retained.clear()

    def read_block(self, requests: Sequence[Request], keep: Sequence[Request] = ()) -> list[Block]:
        """Read all requests in one batch.

        Parameters
        ----------
        requests
            What to read. Requests of one file share its tiles.
        keep
            Requests likely to follow in this session: decoded tiles that they touch are kept for them, until
            they are read or the session ends.

        Returns
        -------
        list of Block
            One per request, in their order. Pixels do not depend on how windows and requests are grouped.

        Raises
        ------
        ReadError
            When a file cannot be read or is not what its cached header says; never zeros instead.
        """
        readings = [_start(request) for request in requests]
        jobs = self._jobs(readings, keep)
        files = {self._pool.submit(self._read_tiles, job): job for job in jobs}
        warps: list[Future[None]] = []
        try:
            for done in as_completed(files):
                done.result()
                bent = [r for r in files[done].readings if r.plan.corner is None]
                warps += [self._pool.submit(_finish, reading) for reading in bent]
            for warp in warps:
                warp.result()
        finally:
            for future in (*files, *warps):
                future.cancel()
            wait((*files, *warps))
        for reading in readings:
            if reading.request.decode is not None and reading.plan.corner is not None:
                reading.block.values = dequantize(reading.block.values, reading.block.valid)
        self.counts.warped_requests += sum(_resampled(r.plan) for r in readings)
        self.counts.gdal_fallback += sum(_takes_gdal(r.request.asset, r.plan) for r in readings)
        return [reading.block for reading in readings]

    def _jobs(self, readings: Sequence[_Reading], keep: Sequence[Request]) -> list[_Job]:
        jobs: dict[tuple[str, int], _Job] = {}
        for reading in readings:
            asset, level = reading.request.asset, reading.plan.level
            key = (asset.href, level)
            if key not in jobs:
                jobs[key] = _Job(*key, self._files.setdefault(key, RasterFile(asset, level)))
            job = jobs[key]
            job.readings.append(reading)
            job.assets[asset.band_index] = asset
            sparse = sparse_tiles(asset, level)
            for rect, target in zip(reading.plan.rects, reading.targets, strict=True):
                for tile in rect_tiles(job.file.level, reading.plan.frame, rect):
                    if tile not in sparse:
                        places = job.wanted.setdefault(tile, {}).setdefault(asset.band_index, [])
                        places.append((target, reading))
        for request in keep:
            level, tiles = tiles_of(request)
            later = jobs.get((request.asset.href, level))
            if later is not None:
                later.assets.setdefault(request.asset.band_index, request.asset)
                for tile in tiles & later.wanted.keys():
                    later.kept.setdefault(tile, set()).add(request.asset.band_index)
        return list(jobs.values())

    def _read_tiles(self, job: _Job) -> None:
        if not job.wanted:
            return
        with job.file.lock, gdal_env(job.href):
            for tile in sorted(job.wanted):
                kept = job.kept.get(tile, set())
                for band, pixels in self._tile(job, tile, job.wanted[tile].keys(), kept):
                    for target, reading in job.wanted[tile].get(band, ()):
                        _paste(target, pixels, tile_rect(job.file.level, tile), reading)
                    if band in kept:
                        self._retained[job.key(band, tile)] = pixels

    def _tile(
        self, job: _Job, tile: int, wanted: Collection[int], kept: set[int]
    ) -> Iterator[tuple[int, _Pixels]]:
        """Yield a tile's bands: those kept earlier, then those decoded now (chunky: all at once)."""
        missing = []
        for band in sorted(wanted):
            pixels = self._retained.pop(job.key(band, tile), None)
            if pixels is None:
                missing.append(band)
            else:
                self._count(tiles_reused=1)
                yield band, pixels
        if missing and job.file.chunky:
            more = {band for band in kept if job.key(band, tile) not in self._retained}
            missing = sorted({*missing, *(more - set(wanted))})
        for bands in [missing] if job.file.chunky and missing else [[band] for band in missing]:
            self._count(files_opened=int(job.file.open()))
            values, mask = job.file.read(tile, [job.assets[band] for band in bands])
            self._count(tiles_read=1, bytes_decoded=values.nbytes)
            for i, band in enumerate(bands):
                yield band, (values[i], None if mask is None else mask[i])

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)


def _start(request: Request) -> _Reading:
    """Plan a request and allocate what tiles are pasted into: its own block, or one source block a window."""
    asset, plan = request.asset, plan_read(request)
    nodata, dtype = _nodata(asset), np.dtype(asset.dtype)
    first = request.windows[0]
    shape = (len(request.windows), first.height, first.width)
    bent = plan.corner is None and request.decode is not None
    block = Block(np.empty(shape, np.float32 if bent else dtype), np.zeros(shape, dtype=np.bool_))
    reading = _Reading(request, plan, block, nodata, [])
    fill = dtype.type(0 if nodata is None else nodata)
    gaps = bool(sparse_tiles(asset, plan.level))
    for i, (window, rect) in enumerate(zip(request.windows, plan.rects, strict=True)):
        if plan.corner is None:
            values = np.full(rect.shape, fill) if gaps else np.empty(rect.shape, dtype)
            mask = np.zeros(rect.shape, dtype=np.bool_) if has_mask(asset) else None
            reading.targets.append(_Target(values, mask, rect.row0, rect.col0))
            continue
        row, col = window.row - plan.corner[0], window.col - plan.corner[1]
        target = _Target(block.values[i], block.valid[i], row, col)
        if gaps or rect.shape != (window.height, window.width):
            target.values[:] = fill
        if gaps and nodata is None and not rect.empty:
            block.valid[i, rect.row0 - row : rect.row1 - row, rect.col0 - col : rect.col1 - col] = True
        reading.targets.append(target)
    return reading


def _paste(target: _Target, pixels: _Pixels, tile: Rect, reading: _Reading) -> None:
    """Copy the part of a tile that lies in a target, turned northwards."""
    values, mask = pixels
    frame: Frame = reading.plan.frame
    if frame.flipped:
        tile = Rect(frame.height - tile.row1, frame.height - tile.row0, tile.col0, tile.col1)
        values, mask = values[::-1], None if mask is None else mask[::-1]
    height, width = target.values.shape
    row0, row1 = max(tile.row0, target.row), min(tile.row1, target.row + height)
    col0, col1 = max(tile.col0, target.col), min(tile.col1, target.col + width)
    source = np.s_[row0 - tile.row0 : row1 - tile.row0, col0 - tile.col0 : col1 - tile.col0]
    place = np.s_[row0 - target.row : row1 - target.row, col0 - target.col : col1 - target.col]
    part = values[source]
    target.values[place] = part
    if target.valid is not None:
        valid = valid_pixels(part, reading.nodata)
        target.valid[place] = valid if mask is None else valid & mask[source]
    elif part.dtype.kind in "fc" and reading.nodata is not None:
        target.values[place][np.isnan(part)] = reading.nodata  # or NaN would spread through the kernel


def _finish(reading: _Reading) -> None:
    """Warp a request's source blocks, window by window, into its block."""
    request, plan = reading.request, reading.plan
    failure: ReadError | None = None
    try:
        for i, (window, rect, target) in enumerate(
            zip(request.windows, plan.rects, reading.targets, strict=True)
        ):
            source = SourceBlock(target.values, target.valid, rect, reading.nodata)
            if request.decode is not None:
                known = valid_pixels(source.values, source.nodata)
                source = SourceBlock(dequantize(source.values, known), source.mask, rect, np.nan)
            reading.block.values[i], reading.block.valid[i] = warp_block(source, plan, request.grid, window)
    except (RasterioError, CPLE_BaseError) as error:
        doing = f"warping it to EPSG:{request.grid.epsg}"
        remedy = "Check the record's CRS and the grid's bounds."
        failure = read_error(request.asset, doing, error, "a transformation GDAL can do", remedy)
    if failure is not None:
        raise failure
    reading.targets.clear()


def _nodata(asset: Asset) -> float | None:
    """Return the asset's nodata, or None where its dtype cannot hold it (-9999 in a uint16)."""
    nodata, dtype = asset.nodata, np.dtype(asset.dtype)
    if nodata is None or dtype.kind not in "iu":
        return nodata
    limits = np.iinfo(dtype)
    return nodata if nodata == nodata and limits.min <= nodata <= limits.max and nodata % 1 == 0 else None


def _resampled(plan: ReadPlan) -> bool:
    return plan.corner is None or plan.level > 0


def _takes_gdal(asset: Asset, plan: ReadPlan) -> bool:
    level: Level = asset.levels[plan.level]
    tiled = level.tile_width < level.width or level.tile_height >= level.height
    plain = level.driver == "GTiff" and level.compression in _FAST_COMPRESSION and tiled
    return not plain or has_mask(asset) or not plan.frame.upright


@cache
def _bound_gdal_cache() -> None:
    """Bound GDAL's block cache, by default 5 % of all memory, once per process unless GDAL_CACHEMAX is set."""
    if "GDAL_CACHEMAX" not in os.environ:
        set_gdal_config("GDAL_CACHEMAX", GDAL_CACHE_BYTES)
