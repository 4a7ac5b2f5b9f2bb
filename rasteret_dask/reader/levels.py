# SPDX-License-Identifier: Apache-2.0
"""What the cached header tells of one level of a file: where its pixels lie, and its tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import hypot, inf

import numpy as np
from affine import Affine

from rasteret_dask.crs import text
from rasteret_dask.errors import GridError, ReadError
from rasteret_dask.grid import is_utm, northern
from rasteret_dask.reader.pixelgrid import Grid, Rect, transformed
from rasteret_dask.table.records import Asset, Level

__all__ = [
    "LevelFrame",
    "flipped",
    "has_file_mask",
    "has_mask",
    "is_aligned",
    "is_chunky",
    "masks_of",
    "rect_tiles",
    "sparse_tiles",
    "tile_rect",
]

ALIGNED_PX = 1e-4
"""Pixel edges this close, at both ends of the raster, are the same edges."""


@dataclass(frozen=True, slots=True)
class LevelFrame:
    """One level laid out northwards, in the grid's CRS where only a false northing lies between."""

    epsg: int
    transform: Affine
    """Pixel -> CRS; rows run southwards unless the file is rotated."""
    flipped: bool
    """Whether the file's first row is its southernmost."""
    height: int
    width: int

    @classmethod
    def of(cls, asset: Asset, index: int, epsg: int) -> LevelFrame:
        """Lay a level out on its way to a grid.

        Parameters
        ----------
        asset
            The asset, with its cached header.
        index
            Index into ``asset.levels``.
        epsg
            The grid's CRS.

        Raises
        ------
        ReadError
            When the asset has no CRS or no usable transform.
        """
        level = asset.levels[index]
        t = Affine(*level.transform)
        if asset.epsg == 0 or t.determinant == 0:
            raise ReadError(
                f"asset {asset.band!r} of record {asset.record_id!r}",
                f"{text(asset.epsg)} and transform {level.transform}",
                "a known CRS and a transform with an area",
                "Leave records without georeferencing out.",
            )
        shift = _northing(asset.epsg, epsg)
        if shift is not None:
            t = Affine(t.a, t.b, t.c, t.d, t.e, t.f + shift)
        flipped = bool(t.b == 0 and t.d == 0 and t.e > 0)
        if flipped:
            t = Affine(t.a, 0.0, t.c, 0.0, -t.e, t.f + t.e * level.height)
        return cls(asset.epsg if shift is None else epsg, t, flipped, level.height, level.width)

    @property
    def upright(self) -> bool:
        """Whether rows run due south and columns due east."""
        t = self.transform
        return bool(t.b == 0 and t.d == 0 and t.a > 0 and t.e < 0)

    def corner(self, grid: Grid) -> tuple[int, int] | None:
        """Return the grid's (row, col) of the north-west pixel; None where its pixels are not pixels of the grid."""
        if self.epsg != grid.epsg or not self.upright:
            return None
        t = self.transform
        west, east = (t.c - grid.x0) / grid.xres, (t.c + t.a * self.width - grid.x0) / grid.xres
        north, south = (grid.y0 - t.f) / grid.yres, (grid.y0 - t.f - t.e * self.height) / grid.yres
        if any(abs(edge - round(edge)) > ALIGNED_PX for edge in (west, east, north, south)):
            return None
        if (round(south) - round(north), round(east) - round(west)) != (self.height, self.width):
            return None
        return round(north), round(west)

    def scale(self, grid: Grid) -> tuple[float, float]:
        """Return grid pixels per pixel, (x, y): a ratio of sizes within UTM, else as measured at the raster's centre.

        Raises
        ------
        GridError
            When the two CRSs are not both defined there.
        """
        t = self.transform
        x, y = hypot(t.a, t.d), hypot(t.b, t.e)
        if self.epsg != grid.epsg and not (is_utm(self.epsg) and is_utm(grid.epsg)):
            cols = self.width / 2 + np.array([0.0, 1.0, 0.0])
            rows = self.height / 2 + np.array([0.0, 0.0, 1.0])
            places = (t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f)
            xs, ys = transformed(self.epsg, grid.epsg, *places)
            x, y = hypot(xs[1] - xs[0], ys[1] - ys[0]), hypot(xs[2] - xs[0], ys[2] - ys[0])
            if not (0 < x < inf and 0 < y < inf):
                raise GridError(
                    f"pixel size of a raster in {text(self.epsg)} on a grid in {text(grid.epsg)}",
                    f"({x}, {y}) at the raster's centre",
                    "a place where both systems are defined",
                )
        return x / grid.xres, y / grid.yres


def _northing(source: int, target: int) -> float | None:
    """Return what to add to y to come from one CRS to the other, or None where that is no translation."""
    (zone, shift), (other, back) = northern(source), northern(target)
    return shift - back if zone == other else None


def is_aligned(asset: Asset, grid: Grid) -> bool:
    """Tell whether the image's own pixels are pixels of the grid: they are then copied, never resampled.

    True with the same CRS, or 326zz and 327zz of one zone (a translation by 10,000,000 m), the same pixel
    size and pixel edges that meet within 1e-4 pixel at both ends of the raster. South-up files can be aligned.

    Raises
    ------
    ReadError
        When the asset has no CRS or no usable transform.
    """
    return LevelFrame.of(asset, 0, grid.epsg).corner(grid) is not None


def flipped(rect: Rect, frame: LevelFrame) -> Rect:
    """Turn a rectangle between rows from the north and rows in the file's order."""
    if not frame.flipped:
        return rect
    return Rect(frame.height - rect.row1, frame.height - rect.row0, rect.col0, rect.col1)


def rect_tiles(level: Level, frame: LevelFrame, rect: Rect) -> Iterable[int]:
    """Yield the numbers of the tiles that a rectangle touches, in file order."""
    if rect.empty:
        return
    own = flipped(rect, frame)
    across = -(-level.width // level.tile_width)
    for i in range(own.row0 // level.tile_height, (own.row1 - 1) // level.tile_height + 1):
        for j in range(own.col0 // level.tile_width, (own.col1 - 1) // level.tile_width + 1):
            yield i * across + j


def tile_rect(level: Level, tile: int) -> Rect:
    """Return a tile's pixels in the file's own row order, cut at the raster's edge."""
    row, col = divmod(tile, -(-level.width // level.tile_width))
    row, col = row * level.tile_height, col * level.tile_width
    return Rect(row, row + level.tile_height, col, col + level.tile_width).clip(level.height, level.width)


def is_chunky(level: Level) -> bool:
    """Tell whether a tile holds all bands."""
    return level.planar == 1 and level.samples > 1


def sparse_tiles(asset: Asset, level: int) -> set[int]:
    """Return the tiles that the header says are not in the file; none where a mask may call them valid."""
    if has_mask(asset):
        return set()
    offsets, counts = asset.levels[level].tile_offsets, asset.levels[level].tile_byte_counts
    return {i for i, (offset, count) in enumerate(zip(offsets, counts, strict=False)) if offset == count == 0}


def has_mask(asset: Asset) -> bool:
    """Tell whether more than nodata may say which pixels are valid: a mask of the file, or its alpha channel.

    A file whose header nobody has read may have either.
    """
    return asset.alpha is not None or has_file_mask(asset)


def has_file_mask(asset: Asset) -> bool:
    """Tell whether the file has a mask beside its bands, or may have one, as nobody has read its header."""
    return not asset.described or "mask" in [level.kind for level in asset.levels]


def masks_of(asset: Asset, level: int) -> tuple[Level, ...] | None:
    """Return the levels that say which pixels of a level are valid and whose tiles lie apart from its own.

    None where one is missing: nobody but GDAL knows where it is, or what the file holds at all.
    """
    if not has_mask(asset):
        return ()
    own = asset.levels[level]
    kinds = {"mask", "alpha"} & {other.kind for other in asset.levels}
    if own.kind == "overview":
        kinds = {f"overview_{kind}" for kind in kinds}
    same = [
        other
        for other in asset.levels
        if other.kind in kinds and (other.width, other.height) == (own.width, own.height)
    ]
    apart = asset.alpha is not None and not is_chunky(own) and not any(x.kind.endswith("alpha") for x in same)
    return None if not asset.described or apart or len(same) != len(kinds) else tuple(same)
