# SPDX-License-Identifier: Apache-2.0
"""Which tiles a batch of readings wants, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rasteret_dask.errors import ReadError
from rasteret_dask.reader.layout import Layouts, TilePart
from rasteret_dask.reader.levels import is_chunky, sparse_tiles
from rasteret_dask.reader.pixelgrid import Rect, union
from rasteret_dask.reader.placing import LandedTile, PendingRead, place
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
    readings: list[tuple[PendingRead, int, TilePart]] = field(default_factory=list)
    """Reading, which sample of the tile, and what its windows take of it."""

    def need(self) -> Rect:
        """Return the part that is wanted, rows in the file's order."""
        parts = {id(part): part for _, _, part in self.readings}
        return union(part.need for part in parts.values())

    def add(self, reading: PendingRead, sample: int, part: TilePart) -> None:
        """Want the tile for one more reading."""
        self.readings.append((reading, sample, part))
        reading.pending += 1

    def paste(self, pixels: Pixels) -> None:
        """Copy every window's part of the tile to its place: window by window, all bands of each."""
        together: dict[int, list[tuple[PendingRead, int, TilePart]]] = {}
        for entry in self.readings:
            together.setdefault(id(entry[2]), []).append(entry)
        for entries in together.values():
            part = entries[0][2]
            tile = LandedTile(pixels, part.need, len(entries))
            place(
                [reading for reading, _, _ in entries],
                part,
                [tile.band(r, sample) for r, sample, _ in entries],
            )

    def void(self) -> None:
        """Make every window's part of the tile invalid."""
        for reading, _, part in self.readings:
            reading.void(part)

    def landed(self) -> list[PendingRead]:
        """Note that the tile has come, or will not; return the readings for which it was the last."""
        return [reading for reading, _, _ in self.readings if reading.landed()]


def wanted(readings: Sequence[PendingRead], layouts: Layouts) -> dict[Key, Want]:
    """Return the tiles that readings want; tiles that are not in the file are filled in on the way.

    Parameters
    ----------
    readings
        Of one batch.
    layouts
        Those of the batch.

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
        for tile, part in layouts.layout(reading.request, plan).items():
            if tile in sparse:
                place([reading], part, [reading.absent(part.need)])
                continue
            key = key_of(asset, plan.level, tile)
            want = wants.get(key)
            if want is None:
                want = wants[key] = Want(asset, plan.level, part.rect)
            want.add(reading, sample, part)
    return wants


def key_of(asset: Asset, level: int, tile: int) -> Key:
    """Return what tells a tile apart from all others: bands that lie together in it share it."""
    plane = 0 if is_chunky(asset.levels[level]) else asset.band_index
    return asset.href, asset.size, asset.etag, level, plane, tile
