# SPDX-License-Identifier: Apache-2.0
"""Tiles of one level of one file, brought home: ranges fetched and decoded, or read through GDAL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import ReadError
from rasteret_dask.net.limits import BUDGET, host_of, pool, scratch, workers
from rasteret_dask.reader import tilecodec
from rasteret_dask.reader.levels import masks_of, tile_rect
from rasteret_dask.reader.ranges import Part, Ranges, Span, coalesced, subject
from rasteret_dask.reader.rasterfile import RasterFile, gdal_env
from rasteret_dask.reader.sharing import SHARED, Flight, Pixels
from rasteret_dask.table.records import Asset, Level

__all__ = ["Count", "bring", "is_fast"]

Count = Callable[..., None]
"""Takes what has been done as keyword arguments, each a field of the reader's counts."""


def is_fast(asset: Asset, level: int) -> bool:
    """Tell whether a level's tiles are fetched and decoded here, not by GDAL."""
    own = asset.levels[level]
    served = tilecodec.decodes(own) and own.dtype == asset.dtype
    masks = masks_of(asset, level)
    return served and masks is not None and all(_fits(mask, own) for mask in masks)


def bring(asset: Asset, level: int, flights: Sequence[Flight], file: RasterFile, count: Count) -> None:
    """Bring tiles of one level home on the process's threads; every flight lands or fails.

    Parameters
    ----------
    asset
        Any band of the file.
    level
        Index into its levels.
    flights
        The tiles, of any bands of the file; nobody else brings them.
    file
        The same level for GDAL, opened only where the fast path does not serve it.
    count
        Told what has been done.
    """
    threads = pool(host_of(asset.href))
    if not is_fast(asset, level):
        threads.submit(_surely, flights, partial(_read_gdal, flights, file, count))
        return
    parts = []
    for flight in flights:
        try:
            parts.append(_part(flight, flight.asset.levels[level]))
        except ReadError as error:
            SHARED.fail(flight, error)
    for trip in _trips(asset, level, parts):
        threads.submit(_surely, trip.flights, partial(trip.fetch, count))


class _Trip:
    """Tiles whose bytes one request brings, with those of their masks."""

    def __init__(self, file: Ranges, span: Span[Flight], level: Level, masks: tuple[Level, ...]) -> None:
        self.file, self.span, self.level, self.masks = file, span, level, masks
        self.flights = [part.what for part in span.parts]
        parts = [_part(flight, mask) for flight in self.flights for mask in masks]
        self.beside = list(coalesced([part for part in parts if part.length]))

    def fetch(self, count: Count) -> None:
        """Fetch the bytes and hand them to a worker; where they do not come, all tiles fail."""
        spans = [span for span in (self.span, *self.beside) if span.length]
        held = sum(span.length for span in spans)
        BUDGET.take(held)
        try:
            bodies: dict[int, memoryview] = {}
            for span in spans:
                count(requests=1, bytes_fetched=span.length)
                data = memoryview(self.file.fetch(span.start, span.length))
                for part in span.parts:
                    bodies[part.start] = data[part.start - span.start : part.stop - span.start]
            workers().submit(self._decode, bodies, held, count)
        except ReadError as error:
            BUDGET.give(held)
            for part in self.span.parts:
                why = ReadError(_doing(part, "reading"), error.found, error.expected, error.remedy)
                SHARED.fail(part.what, why)
        except BaseException:
            BUDGET.give(held)
            raise

    def _decode(self, bodies: dict[int, memoryview], held: int, count: Count) -> None:
        """Decode and land all tiles."""
        try:
            for part in self.span.parts:
                if not part.what.over and not SHARED.abandoned(part.what):
                    self._land(part, bodies, count)
        except BaseException as error:
            for flight in self.flights:
                SHARED.fail(flight, error)
        finally:
            bodies.clear()
            BUDGET.give(held)

    def _land(self, part: Part[Flight], bodies: dict[int, memoryview], count: Count) -> None:
        flight, rect = part.what, tile_rect(self.level, part.what.tile)
        height, width = rect.shape
        try:
            memory = scratch(tilecodec.tile_bytes(self.level))
            values = _decode(self.level, part, bodies, memory)[:, :height, :width]
            mask = None
            for level in self.masks:
                seen = _decode(level, _part(flight, level), bodies, None)[0, :height, :width] != 0
                mask = seen if mask is None else mask & seen
        except tilecodec.BrokenTileError as error:
            remedy = "The file is damaged: replace it, or leave the record out."
            SHARED.fail(flight, ReadError(_doing(part, "decoding"), str(error), "a whole tile", remedy))
            return
        count(tiles_read=1, bytes_decoded=values.nbytes)
        SHARED.land(flight, Pixels(values, mask, rect))


def _decode(
    level: Level, part: Part[Flight], bodies: dict[int, memoryview], memory: NDArray[np.uint8] | None
) -> NDArray[Any]:
    if part.length:
        return tilecodec.decode(level, bodies[part.start], memory)
    shape = (level.samples if level.planar == 1 else 1, level.tile_height, level.tile_width)
    nodata = part.what.asset.nodata if level.kind in ("image", "overview") else None
    return np.full(shape, 0 if nodata is None else nodata, level.dtype)  # a tile that is not in the file


def _doing(part: Part[Flight], verb: str) -> str:
    return subject(part.what.asset, f"{verb} tile {part.what.tile}, bytes {part.start}-{part.stop - 1}")


def _trips(asset: Asset, index: int, parts: Sequence[Part[Flight]]) -> Iterator[_Trip]:
    file, level, masks = Ranges(asset), asset.levels[index], masks_of(asset, index) or ()
    for span in coalesced([part for part in parts if part.length]):
        yield _Trip(file, span, level, masks)
    for part in parts:
        if not part.length:
            yield _Trip(file, Span(0, 0, (part,)), level, masks)


def _part(flight: Flight, level: Level) -> Part[Flight]:
    known = min(len(level.tile_offsets), len(level.tile_byte_counts))
    if flight.tile >= known:
        raise ReadError(subject(flight.asset, f"reading tile {flight.tile}"), f"{known} tiles in its cached header",
                        "all tiles of the image", "Build its record anew.")  # fmt: skip
    return Part(level.tile_offsets[flight.tile], level.tile_byte_counts[flight.tile], flight)


def _fits(mask: Level, image: Level) -> bool:
    """Tell whether a mask has the tiles of its image, and a common codec."""
    same = (mask.tile_width, mask.tile_height) == (image.tile_width, image.tile_height)
    return same and mask.samples == 1 and tilecodec.decodes(mask)


def _surely(flights: Sequence[Flight], read: Callable[[], None]) -> None:
    """Read tiles that somebody still waits for; whatever is raised fails them, so that nobody waits for ever."""
    waited_for = [flight for flight in flights if not SHARED.abandoned(flight)]
    if not waited_for:
        return
    try:
        read()
    except BaseException as error:
        for flight in flights:
            SHARED.fail(flight, error)


def _read_gdal(flights: Sequence[Flight], file: RasterFile, count: Count) -> None:
    with file.lock, gdal_env(flights[0].asset.href):
        try:
            count(files_opened=int(file.open()))
        except ReadError as error:
            for flight in flights:
                SHARED.fail(flight, error)
            return
        for flight in sorted(flights, key=lambda f: f.tile):
            if flight.over or SHARED.abandoned(flight):
                continue
            try:
                pixels = file.read(flight.tile, flight.asset)
            except ReadError as error:
                SHARED.fail(flight, error)
                continue
            count(tiles_read=1, bytes_decoded=pixels.values.nbytes)
            SHARED.land(flight, pixels)
