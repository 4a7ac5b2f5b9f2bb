"""Reads pixels of assets onto grids, in one batch, from cached headers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from math import ceil, floor
from threading import Lock
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rasterio.env import set_gdal_config

from rasteret_dask.errors import PlanError, ReadError
from rasteret_dask.limits import workers
from rasteret_dask.placing import Block, Out, Reading
from rasteret_dask.ranges import named, subject
from rasteret_dask.rasterfile import RasterFile
from rasteret_dask.readplan import (
    Frame,
    Grid,
    ReadPlan,
    Rect,
    Request,
    Window,
    flipped,
    is_aligned,
    plan_read,
    rect_tiles,
    sparse_tiles,
    tile_rect,
    tiles_of,
    union,
)
from rasteret_dask.records import Asset
from rasteret_dask.sharing import SHARED, Flight, Keep, Key, Pixels, Wish
from rasteret_dask.tilefile import bring, is_chunky, is_fast

__all__ = [
    "Block",
    "Counts",
    "Grid",
    "Later",
    "Out",
    "Request",
    "Session",
    "Window",
    "is_aligned",
    "tiles_of",
]

SOURCE_BYTES = 32 * 2**20
"""Source pixels that one call holds to be warped, unless one window alone has more."""

GDAL_CACHE_BYTES = 16 * 2**20
"""GDAL's own cache of tiles: none is asked for twice, so it needs only those being decoded."""

TIE = 1e-4
"""Grounds that meet in less than this share of a pixel do not meet."""

_SESSIONS = count(1)


@dataclass(slots=True)
class Counts:
    """What a session has done so far."""

    files_opened: int = 0
    """Levels of files that GDAL has opened; the fast path opens none."""
    requests: int = 0
    """Ranges fetched by the fast path."""
    bytes_fetched: int = 0
    """Bytes of those ranges."""
    tiles_read: int = 0
    """Tiles decoded; one of a chunky file counts once, whatever the number of bands taken from it."""
    tiles_reused: int = 0
    """Tiles that this process had kept, or was bringing for another session."""
    tiles_masked: int = 0
    """Tiles that could not be read and are invalid instead."""
    bytes_decoded: int = 0
    """Bytes of the pixels decoded."""
    warped_requests: int = 0
    """Requests whose pixels are not the file's own."""
    gdal_fallback: int = 0
    """Requests of files that take GDAL: JPEG 2000, strips, or unusually compressed."""


class Later(Protocol):
    """The ground that other tasks have still to read: parts of tiles that lie there are kept for them."""

    @property
    def number(self) -> int:
        """Number of the task that reads now: tasks of near numbers run one after another."""

    @property
    def finished(self) -> AbstractSet[int]:
        """Numbers of those that have read."""

    def meeting(
        self, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return what they read that meets a box: their numbers, and bounds of shape (number, 4)."""

    def finish(self) -> None:
        """Note that this task has read."""


@dataclass(slots=True)
class _Want:
    """What one call wants of one tile."""

    asset: Asset
    level: int
    rect: Rect
    readings: list[tuple[Reading, int, list[int]]] = field(default_factory=list)
    """Reading, which sample of the tile, and the numbers of its windows."""

    def need(self) -> Rect:
        """Return the part that is wanted, rows in the file's order."""
        return union(reading.need(n, self.rect) for reading, _, numbers in self.readings for n in numbers)

    def add(self, reading: Reading, sample: int, number: int) -> None:
        """Want the tile for one more window."""
        if self.readings and self.readings[-1][0] is reading:
            self.readings[-1][2].append(number)
        else:
            self.readings.append((reading, sample, [number]))
            reading.pending += 1

    def landed(self, call: _Call) -> None:
        """Go on with the readings for which this was the last tile."""
        for reading, _, _ in self.readings:
            if reading.landed():
                call.ready(reading)


class Session:
    """Reads for one task. Threads, connections and tiles under way are the process's.

    Parameters
    ----------
    on_error
        ``"raise"``, or ``"mask"``: a tile that cannot be read is invalid, counted, and named in ``unreadable``.
    later
        What other tasks of this process are going to read.

    Notes
    -----
    A tile is fetched and decoded once for all sessions that want it at the same time, and again later only when
    nobody had announced to need it (``keep``, ``later``) or the process's budget for kept pixels was too small.
    """

    def __init__(self, on_error: str = "raise", later: Later | None = None) -> None:
        if on_error not in ("raise", "mask"):
            raise PlanError("on_error", repr(on_error), "'raise' or 'mask'")
        self.counts = Counts()
        self.unreadable: list[str] = []
        self._mask = on_error == "mask"
        self._later = later
        self._number = -next(_SESSIONS)
        self._files: dict[tuple[Any, ...], RasterFile] = {}
        self._lock = Lock()
        self._ground: dict[tuple[object, ...], Keep | None] = {}

    def __enter__(self) -> Session:
        _bound_gdal_cache()
        self._reading = SHARED.session()
        self._reading.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._reading.__exit__(None, None, None)

    def close(self) -> None:
        """Close all files and forget what was kept for this session."""
        for file in self._files.values():
            with file.lock:
                file.close()
        self._files.clear()
        if self._later is not None:
            self._later.finish()  # first: a tile that lands meanwhile is not kept for it again
            SHARED.finish(self._later.number)
        SHARED.finish(self._number)

    def read_block(self, requests: Sequence[Request], keep: Sequence[Request] = ()) -> list[Block]:
        """Read all requests in one batch.

        Parameters
        ----------
        requests
            What to read. Requests of one file share its tiles.
        keep
            Requests likely to follow in this session: the pixels that they need of the tiles read now are kept
            for them.

        Returns
        -------
        list of Block
            One per request, in their order. Pixels do not depend on how windows and requests are grouped.

        Raises
        ------
        ReadError
            When a file cannot be read or is not what its cached header says; never zeros instead.
        """
        blocks = [Block.empty(request) for request in requests]
        self.read_into(requests, [block.out() for block in blocks], keep)
        return blocks

    def read_into(
        self, requests: Sequence[Request], outs: Sequence[Out], keep: Sequence[Request] = ()
    ) -> None:
        """Read all requests in one batch, each straight into memory of the caller's; see :meth:`read_block`."""
        readings = [Reading.planned(request, out) for request, out in zip(requests, outs, strict=True)]
        self._count(
            warped_requests=sum(r.bent or r.plan.level > 0 for r in readings),
            gdal_fallback=sum(not is_fast(r.request.asset, r.plan.level) for r in readings),
        )
        groups = _groups(readings)
        for at, group in enumerate(groups):
            rest = [reading for later in groups[at + 1 :] for reading in later]
            self._read(group, rest, keep)

    def _read(self, readings: Sequence[Reading], rest: Sequence[Reading], keep: Sequence[Request]) -> None:
        """Read some of a batch; what the rest of it and ``keep`` need of the same tiles is kept."""
        for reading in readings:
            reading.prepare()
        wants = _wants(readings)
        planned = [(r.request, r.plan) for r in rest] + [(request, plan_read(request)) for request in keep]
        keeps = _keeps(planned, wants)
        call = _Call()
        try:
            for reading in readings:
                if not reading.pending:
                    call.ready(reading)
            with SHARED.departure:
                waiting = self._depart(wants, keeps, call)
            for flight, wish, want in waiting:
                self._await(flight, wish, want, call)
            for warp in call.warps:
                warp.result()
        finally:
            call.alive = False
            wait(call.warps)

    def _depart(
        self, wants: dict[Key, _Want], keeps: dict[Key, Rect], call: _Call
    ) -> list[tuple[Flight, Wish, _Want]]:
        """Take what the process has, join what is under way, and send for the rest."""
        waiting: list[tuple[Flight, Wish, _Want]] = []
        new: dict[tuple[Any, ...], list[Flight]] = {}  # nobody but us brings these
        try:
            for key, want in wants.items():
                keep = self._keep(want, keeps.get(key))
                wish = Wish(want.need(), partial(_land, want, call), keep, lambda: call.alive)
                pixels, flight, fresh = SHARED.join(key, want.asset, wish)
                if flight is not None:
                    waiting.append((flight, wish, want))
                    if fresh:
                        new.setdefault(key[:4], []).append(flight)  # one version of one file, one level of it
                if pixels is not None:
                    wish.paste(pixels)
                if not fresh:
                    self._count(tiles_reused=1)
            for (*_, level), own in new.items():
                file = self._files.setdefault(own[0].key[:4], RasterFile(own[0].asset, level))
                bring(own[0].asset, level, own, file, self._count)
        except BaseException as error:  # an interrupt, say: who has joined these must not wait for ever
            for flight in (flight for own in new.values() for flight in own):
                SHARED.fail(flight, error)
            raise
        return waiting

    def _await(self, flight: Flight, wish: Wish, want: _Want, call: _Call) -> None:
        error = wish.done.exception()  # not raised: its traceback would tie this call's memory to the flight
        if error is None:
            return
        if not isinstance(error, ReadError):
            raise error
        if not self._mask:
            said = error.subject.replace(named(flight.asset), named(want.asset))
            raise ReadError(said, error.found, error.expected, error.remedy)
        for reading, _, numbers in want.readings:
            for number in numbers:
                reading.void(number, want.rect)
        want.landed(call)
        for who in dict.fromkeys(named(reading.request.asset) for reading, _, _ in want.readings):
            own = error.subject.replace(named(flight.asset), who)
            line = str(ReadError(own, error.found, error.expected, error.remedy))
            if line not in self.unreadable:
                self.unreadable.append(line)
        self._count(tiles_masked=1)

    def _keep(self, want: _Want, soon: Rect | None) -> Keep | None:
        """Say which part of a tile is to be kept, and for whom."""
        known = want.asset.size is not None or want.asset.etag is not None  # else it may change unseen
        found = self._needed_later(want, self._later) if self._later is not None and known else None
        if soon is None:
            return found
        if found is None:
            return Keep(soon, frozenset([self._number]))
        return Keep(union([found.rect, soon]), found.needs | {self._number}, found.done, found.now)

    def _needed_later(self, want: _Want, later: Later) -> Keep | None:
        reading = want.readings[0][0]
        frame, grid = reading.plan.frame, reading.request.grid
        reach = 0 if not reading.bent else ceil(3 / min(*reading.plan.scale, 1.0)) + 2
        known = (frame, want.rect, reach)
        if known not in self._ground:
            self._ground[known] = None
            if frame.epsg == grid.epsg and frame.upright:
                self._ground[known] = _needed(later, frame, want.rect, reach)
        return self._ground[known]

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)


class _Call:
    """One call of read_block under way."""

    def __init__(self) -> None:
        self.alive = True
        self.warps: list[Future[None]] = []

    def ready(self, reading: Reading) -> None:
        """Go on with a reading whose tiles are all there."""
        if reading.bent:
            self.warps.append(workers().submit(reading.finish))


def _land(want: _Want, call: _Call, pixels: Pixels) -> None:
    for reading, sample, numbers in want.readings:
        for number in numbers:
            reading.paste(number, want.rect, pixels, sample)
    want.landed(call)


def _wants(readings: Sequence[Reading]) -> dict[Key, _Want]:
    """Return the tiles that readings want, each once."""
    wants: dict[Key, _Want] = {}
    for reading in readings:
        asset, plan = reading.request.asset, reading.plan
        level, sparse = asset.levels[plan.level], sparse_tiles(asset, plan.level)
        sample = asset.band_index if is_chunky(level) else 0
        if asset.band_index >= max(level.samples, 1):
            raise ReadError(subject(asset, "planning its read"), f"band {asset.band_index + 1}, counted from 1",
                            f"one of the file's {level.samples}", "Build its record anew.")  # fmt: skip
        for number, rect in enumerate(plan.rects):
            for tile in rect_tiles(level, plan.frame, rect):
                if tile in sparse:
                    reading.absent(number, tile_rect(level, tile))
                    continue
                key = _key(asset, plan.level, tile)
                want = wants.get(key)
                if want is None:
                    want = wants[key] = _Want(asset, plan.level, tile_rect(level, tile))
                want.add(reading, sample, number)
    return wants


def _groups(readings: Sequence[Reading]) -> list[list[Reading]]:
    """Put readings into groups whose source pixels fit SOURCE_BYTES; those that are copied need none."""
    groups: list[list[Reading]] = [[]]
    held = 0
    for reading in (part for whole in readings for part in whole.split(SOURCE_BYTES)):
        cost = reading.source_bytes
        if held and held + cost > SOURCE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(reading)
        held += cost
    return groups


def _keeps(requests: Sequence[tuple[Request, ReadPlan]], wants: dict[Key, _Want]) -> dict[Key, Rect]:
    """Return which part of the wanted tiles further requests need."""
    found: dict[Key, Rect] = {}
    for request, plan in requests:
        asset = request.asset
        level = asset.levels[plan.level]
        for rect in plan.rects:
            for tile in rect_tiles(level, plan.frame, rect):
                key = _key(asset, plan.level, tile)
                if key in wants:
                    part = flipped(rect, plan.frame).cut(wants[key].rect)
                    found[key] = union([found[key], part]) if key in found else part
    return found


def _key(asset: Asset, level: int, tile: int) -> Key:
    plane = 0 if is_chunky(asset.levels[level]) else asset.band_index
    return asset.href, asset.size, asset.etag, level, plane, tile


def _needed(later: Later, frame: Frame, tile: Rect, reach: int) -> Keep | None:
    """Return the part of a tile that later tasks need, their grids being that of the file but for the phase."""
    t, rect = frame.transform, flipped(tile, frame)
    west, east = t.c + t.a * (rect.col0 - reach), t.c + t.a * (rect.col1 + reach)
    north, south = t.f + t.e * (rect.row0 - reach), t.f + t.e * (rect.row1 + reach)
    numbers, boxes = later.meeting(frame.epsg, (west, south, east, north))
    if not len(numbers):
        return None
    cols = (boxes[:, [0, 2]] - t.c) / t.a
    rows = (boxes[:, [3, 1]] - t.f) / t.e
    part = Rect(
        floor(rows[:, 0].min() + TIE) - reach, ceil(rows[:, 1].max() - TIE) + reach,
        floor(cols[:, 0].min() + TIE) - reach, ceil(cols[:, 1].max() - TIE) + reach,
    )  # fmt: skip
    return Keep(flipped(part.cut(rect), frame), frozenset(numbers.tolist()), later.finished, later.number)


@cache
def _bound_gdal_cache() -> None:
    """Bound GDAL's block cache, by default 5 % of all memory, once per process unless GDAL_CACHEMAX is set."""
    if "GDAL_CACHEMAX" not in os.environ:
        set_gdal_config("GDAL_CACHEMAX", GDAL_CACHE_BYTES)
