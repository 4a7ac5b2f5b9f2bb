# SPDX-License-Identifier: Apache-2.0
"""Reads pixels of assets onto grids, in one batch, from cached headers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from types import TracebackType
from typing import Any

from rasterio.env import set_gdal_config

from rasteret_dask import activity
from rasteret_dask.errors import PlanError, ReadError
from rasteret_dask.net.allocator import settle
from rasteret_dask.net.limits import workers
from rasteret_dask.reader.keeping import Keeping, Later, needed_soon
from rasteret_dask.reader.layout import Layouts
from rasteret_dask.reader.pixelgrid import Rect
from rasteret_dask.reader.placing import Block, Out, PendingRead
from rasteret_dask.reader.ranges import named
from rasteret_dask.reader.rasterfile import RasterFile
from rasteret_dask.reader.readplan import ReadPlan, Request
from rasteret_dask.reader.sharing import SHARED, Flight, Key, Pixels, Wish
from rasteret_dask.reader.tilefile import bring, is_fast
from rasteret_dask.reader.turnedfile import TurnedRead
from rasteret_dask.reader.wants import Want, wanted
from rasteret_dask.table.records import Asset

__all__ = ["Counts", "Session", "bound_gdal_cache"]

SOURCE_BYTES = 32 * 2**20
"""Source pixels that one call holds to be warped, unless one window alone has more."""

GDAL_CACHE_BYTES = 16 * 2**20
"""GDAL's own cache of tiles: none is asked for twice, so it needs only those being decoded."""


@dataclass(slots=True)
class Counts:
    """What a session has done so far."""

    files_opened: int = 0
    """Levels of files that GDAL has opened; the fast path opens none."""
    requests: int = 0
    """Ranges fetched by the fast path."""
    bytes_fetched: int = 0
    """Bytes of those ranges."""
    tiles_wanted: int = 0
    """Tiles that calls have asked for so far: read, reused, masked, or still on their way."""
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
        self.seconds = 0.0
        """How long its calls took, which read and decode and paste."""
        if (shard := activity.current()) is not None:
            shard.sessions.append(self.counts)
        self.unreadable: list[str] = []
        self._mask = on_error == "mask"
        self._keeping = Keeping(later)
        self._files: dict[tuple[Any, ...], RasterFile] = {}
        self._lock = Lock()

    def __enter__(self) -> Session:
        bound_gdal_cache()
        settle()
        self._reading = SHARED.session(self._keeping.nbytes)
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
        self._keeping.finish()

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
        begun = time.perf_counter()
        try:
            self._read_into(requests, outs, keep)
        finally:
            self.seconds += time.perf_counter() - begun

    def _read_into(self, requests: Sequence[Request], outs: Sequence[Out], keep: Sequence[Request]) -> None:
        layouts = Layouts()
        readings = [
            PendingRead(request, layouts.plan(request), out)
            if request.asset.placement is None
            else TurnedRead(request, layouts.plan(request), out, file=self._file(request.asset))
            for request, out in zip(requests, outs, strict=True)
        ]
        self._count(
            warped_requests=sum(r.bent or r.plan.level > 0 for r in readings),
            gdal_fallback=sum(not is_fast(r.request.asset, r.plan.level) for r in readings),
        )
        turned = [reading for reading in readings if isinstance(reading, TurnedRead)]
        groups = _groups([reading for reading in readings if not isinstance(reading, TurnedRead)], layouts)
        kept = [(request, layouts.plan(request)) for request in keep]
        for at, group in enumerate(groups):
            rest = [(r.request, r.plan) for later in groups[at + 1 :] for r in later]
            self._read(group, [*rest, *kept], layouts)
        self._read_turned(turned)

    def _file(self, asset: Asset) -> RasterFile:
        return self._files.setdefault((asset.href, asset.size, asset.etag, 0), RasterFile(asset, 0))

    def _read_turned(self, readings: Sequence[TurnedRead]) -> None:
        """Read files that GDAL warps window by window, several at the same time."""
        for reading in readings:
            reading.prepare()
        under_way = [workers().submit(reading.finish) for reading in readings]
        wait(under_way)
        for reading, done in zip(readings, under_way, strict=True):
            error = done.exception()
            if error is None:
                continue
            if not (self._mask and isinstance(error, ReadError)):
                raise error
            reading.lose()
            self.unreadable.append(str(error))
            self._count(tiles_masked=1)

    def _read(
        self, readings: Sequence[PendingRead], rest: Sequence[tuple[Request, ReadPlan]], layouts: Layouts
    ) -> None:
        """Read some of a batch; what the rest needs of the same tiles is kept."""
        call = _Call()
        try:
            # One reader at a time: under Python's lock two would take turns here, and both send their requests late.
            with SHARED.departure:
                for reading in readings:
                    reading.prepare()
                wants = wanted(readings, layouts)
                for reading in readings:
                    if not reading.pending:
                        call.ready(reading)
                waiting, there = self._depart(wants, needed_soon(rest, wants, layouts), call)
            for wish, pixels in there:  # while the rest is on its way, and others depart
                wish.paste(pixels)
            for flight, wish, want in waiting:
                self._await(flight, wish, want, call)
            for warp in call.warps:
                warp.result()
        finally:
            call.alive = False
            wait(call.warps)

    def _depart(
        self, wants: dict[Key, Want], soon: dict[Key, Rect], call: _Call
    ) -> tuple[list[tuple[Flight, Wish, Want]], list[tuple[Wish, Pixels]]]:
        """Take what the process has, join what is under way, and send for the rest, file by file.

        Returns
        -------
        tuple
            What has to be waited for, and the pixels that are there.
        """
        waiting: list[tuple[Flight, Wish, Want]] = []
        there: list[tuple[Wish, Pixels]] = []
        files: dict[tuple[Any, ...], list[Key]] = {}
        for key in wants:
            files.setdefault(key[:4], []).append(key)  # one version of one file, one level of it
        new: list[Flight] = []  # nobody but us brings these
        self._count(tiles_wanted=len(wants))
        try:
            for (*_, level), keys in files.items():
                first = len(new)
                for key in keys:
                    want = wants[key]
                    keep = self._keeping.keep(want, soon.get(key))
                    wish = Wish(want.need(), partial(_land, want, call), keep, lambda: call.alive)
                    pixels, flight, fresh = SHARED.join(key, want.asset, wish)
                    if pixels is not None:
                        there.append((wish, pixels))
                    if flight is not None:
                        waiting.append((flight, wish, want))
                    if flight is not None and fresh:
                        new.append(flight)
                own = new[first:]
                if own:
                    file = self._files.setdefault(own[0].key[:4], RasterFile(own[0].asset, level))
                    bring(own[0].asset, level, own, file, self._count)
            if len(wants) > len(new):
                self._count(tiles_reused=len(wants) - len(new))
        except BaseException as error:  # an interrupt, say: who has joined these must not wait for ever
            for flight in new:
                SHARED.fail(flight, error)
            raise
        return waiting, there

    def _await(self, flight: Flight, wish: Wish, want: Want, call: _Call) -> None:
        error = wish.done.error()  # not raised: its traceback would tie this call's memory to the flight
        if error is None:
            return
        if not isinstance(error, ReadError):
            raise error
        if not self._mask:
            said = error.subject.replace(named(flight.asset), named(want.asset))
            raise ReadError(said, error.found, error.expected, error.remedy)
        want.void()
        call.landed(want)
        for who in dict.fromkeys(named(reading.request.asset) for reading, _, _ in want.readings):
            own = error.subject.replace(named(flight.asset), who)
            line = str(ReadError(own, error.found, error.expected, error.remedy))
            if line not in self.unreadable:
                self.unreadable.append(line)
        self._count(tiles_masked=1)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)


class _Call:
    """One call of read_block under way."""

    def __init__(self) -> None:
        self.alive = True
        self.warps: list[Future[None]] = []

    def ready(self, reading: PendingRead) -> None:
        """Go on with a reading whose tiles are all there."""
        if reading.bent:
            self.warps.append(workers().submit(reading.finish))

    def landed(self, want: Want) -> None:
        """Go on with the readings for which this was the last tile."""
        for reading in want.landed():
            self.ready(reading)


def _land(want: Want, call: _Call, pixels: Pixels) -> None:
    want.paste(pixels)
    call.landed(want)


def _groups(readings: Sequence[PendingRead], layouts: Layouts) -> list[list[PendingRead]]:
    """Put readings into groups whose source pixels fit SOURCE_BYTES; those that are copied need none."""
    groups: list[list[PendingRead]] = [[]]
    held = 0
    for reading in (part for whole in readings for part in whole.split(SOURCE_BYTES, layouts)):
        cost = reading.source_bytes
        if held and held + cost > SOURCE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(reading)
        held += cost
    return groups


@cache
def bound_gdal_cache() -> None:
    """Bound GDAL's block cache, by default 5 % of all memory, once per process unless GDAL_CACHEMAX is set."""
    if "GDAL_CACHEMAX" not in os.environ:
        set_gdal_config("GDAL_CACHEMAX", GDAL_CACHE_BYTES)
