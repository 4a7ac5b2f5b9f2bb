"""Which tiles a batch of readings wants, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rasteret_dask.errors import ReadError
from rasteret_dask.reader.levels import is_chunky, rect_tiles, sparse_tiles, tile_rect
from rasteret_dask.reader.pixelgrid import Rect, union
from rasteret_dask.reader.placing import PendingRead
from rasteret_dask.reader.ranges import subject
from rasteret_dask.reader.sharing import Key, Pixels
from rasteret_dask.table.records import Asset

__all__ = ["Want", "key_of", "wanted"]


@dataclass(slots=True)
class Want:
    """What one batch wants of one tile."""

    asset: Asset
    level: int
    """Index into ``asset.levels``."""
    rect: Rect
    """The tile's pixels, rows in the file's order."""
    readings: list[tuple[PendingRead, int, list[int]]] = field(default_factory=list)
    """Reading, which sample of the tile, and the numbers of its windows."""

    def need(self) -> Rect:
        """Return the part that is wanted, rows in the file's order."""
        return union(reading.need(n, self.rect) for reading, _, numbers in self.readings for n in numbers)

    def add(self, reading: PendingRead, sample: int, number: int) -> None:
        """Want the tile for one more window."""
        if self.readings and self.readings[-1][0] is reading:
            self.readings[-1][2].append(number)
        else:
            self.readings.append((reading, sample, [number]))
            reading.pending += 1

    def paste(self, pixels: Pixels) -> None:
        """Copy every window's part of the tile to its place."""
        for reading, sample, numbers in self.readings:
            for number in numbers:
                reading.paste(number, self.rect, pixels, sample)

    def void(self) -> None:
        """Make every window's part of the tile invalid."""
        for reading, _, numbers in self.readings:
            for number in numbers:
                reading.void(number, self.rect)

    def landed(self) -> list[PendingRead]:
        """Note that the tile has come, or will not; return the readings for which it was the last."""
        return [reading for reading, _, _ in self.readings if reading.landed()]


def wanted(readings: Sequence[PendingRead]) -> dict[Key, Want]:
    """Return the tiles that readings want; tiles that are not in the file are filled in on the way.

    Raises
    ------
    ReadError
        When a file has fewer bands than its asset says.
    """
    wants: dict[Key, Want] = {}
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
                key = key_of(asset, plan.level, tile)
                want = wants.get(key)
                if want is None:
                    want = wants[key] = Want(asset, plan.level, tile_rect(level, tile))
                want.add(reading, sample, number)
    return wants


def key_of(asset: Asset, level: int, tile: int) -> Key:
    """Return what tells a tile apart from all others: bands that lie together in it share it."""
    plane = 0 if is_chunky(asset.levels[level]) else asset.band_index
    return asset.href, asset.size, asset.etag, level, plane, tile
