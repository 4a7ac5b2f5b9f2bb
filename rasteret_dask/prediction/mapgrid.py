# SPDX-License-Identifier: Apache-2.0
"""The pixel grids of a map, one for each CRS of its chips, and the blocks that they are computed and stored in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.crs import text
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import Bounds

__all__ = ["MapBlock", "MapGrid", "BlockChips", "block_side", "grid_of", "owned", "placed"]

BLOCK_SIDES = (2048, 1536, 1024, 512, 256)
"""Sides of a block, pixels."""

CANVAS_BYTES = 256 * 2**20
"""What the canvas of a block may hold."""

PHASE = 1e-4
"""Pixel edges nearer than this share of a pixel are the same edge."""

STRIP = 2
"""Rows of blocks of a strip: blocks follow each other column by column of it, so that neighbours share tiles."""


@dataclass(frozen=True, slots=True)
class MapGrid:
    """The pixels of one CRS."""

    code: int
    """Number of the CRS (:mod:`rasteret_dask.crs`)."""
    name: str
    """Of the zone: a group of a store, the beginning of a file's name."""
    west: float
    north: float
    pixel: float
    """Side of a pixel, in the unit of the CRS."""
    height: int
    width: int

    @property
    def transform(self) -> tuple[float, float, float, float, float, float]:
        """a, b, c, d, e, f of pixel corner (column, row) -> (x, y)."""
        return (self.pixel, 0.0, self.west, 0.0, -self.pixel, self.north)

    @property
    def bounds(self) -> Bounds:
        """The outer edges: xmin, ymin, xmax, ymax."""
        south, east = self.north - self.height * self.pixel, self.west + self.width * self.pixel
        return (self.west, south, east, self.north)

    @property
    def y(self) -> NDArray[np.float64]:
        """Shape (y,). Centres of rows, from the north."""
        return self.north - (np.arange(self.height, dtype=np.float64) + 0.5) * self.pixel

    @property
    def x(self) -> NDArray[np.float64]:
        """Shape (x,). Centres of columns, from the west."""
        return self.west + (np.arange(self.width, dtype=np.float64) + 0.5) * self.pixel


@dataclass(frozen=True, slots=True)
class MapBlock:
    """A part of a grid: what one task computes."""

    grid: int
    """Number of the grid."""
    row: int
    col: int
    height: int
    """Pixels; fewer than the side at the southern edge."""
    width: int

    def name(self, grids: Sequence[MapGrid]) -> str:
        """Return ``33_0002_0005``; ``0002_0005`` where there is one grid."""
        zone = f"{grids[self.grid].name}_" if len(grids) > 1 else ""
        return f"{zone}{self.row:04d}_{self.col:04d}"


@dataclass(frozen=True, slots=True)
class BlockChips:
    """Where chips lie in blocks: a row for each chip of each block, block by block in running order."""

    blocks: tuple[MapBlock, ...]
    chip: NDArray[np.int64]
    """Shape (row,). The chip, by its place among all; those of a block in rising order."""
    offsets: NDArray[np.int64]
    """Shape (block + 1,). Where the rows of each block begin."""


def block_side(pixel_bytes: int) -> int:
    """Return the side of a block, in pixels, whose canvas fits into memory.

    Parameters
    ----------
    pixel_bytes
        What the canvas holds for a pixel.
    """
    return next((side for side in BLOCK_SIDES if side * side * pixel_bytes <= CANVAS_BYTES), BLOCK_SIDES[-1])


def grid_of(code: int, name: str, edges: Bounds, corner: tuple[float, float], pixel: float) -> MapGrid:
    """Return the grid of a CRS: the smallest that holds the map's bounds, on the pixels of the chips.

    Parameters
    ----------
    code
        Number of the CRS.
    name
        Of its zone.
    edges
        The map's bounds.
    corner
        The north-west corner (x, y) of a chip: of a pixel of the map.
    pixel
        Side of the map's pixels.
    """
    west, south, east, north = edges
    x, y = corner
    left, right = _outward(west - x, east - x, pixel)
    down, up = _outward(south - y, north - y, pixel)
    return MapGrid(code, name, x + left * pixel, y + up * pixel, pixel, up - down, right - left)


def _outward(low: float, high: float, pixel: float) -> tuple[int, int]:
    """Return the whole pixels that hold a stretch: those that it touches by less than rounding are none."""
    return floor(low / pixel + PHASE), ceil(high / pixel - PHASE)


def corners(grid: MapGrid, bounds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pixel (row, col) of chips' north-west corners in their grid, shape (chip, 2); negative beyond it.

    Raises
    ------
    PlanError
        When chips do not lie on the grid's pixel edges.
    """
    place = np.stack([grid.north - bounds[:, 3], bounds[:, 0] - grid.west], -1) / grid.pixel
    whole = np.round(place)
    away = np.abs(place - whole).max(axis=1, initial=0.0)
    if (away > PHASE).any():
        raise PlanError(
            f"predict, map in {text(grid.code)}",
            f"{int((away > PHASE).sum()):,} of {len(bounds):,} chips whose corner lies up to {away.max():.3g} of a "
            "pixel beside the map's pixel edges", "chips on one grid of pixels",
            "Where the model gives coarser pixels, let stride= and edge='pad' keep chips on these; windows of at= or "
            "of several phases need predict for each by itself.",
        )  # fmt: skip
    return whole.astype(np.int64)


def placed(
    grids: Sequence[MapGrid],
    codes: NDArray[np.int64],
    bounds: NDArray[np.float64],
    side: int,
    block_px: int,
) -> BlockChips:
    """Return which chips lie in which blocks; blocks without a chip are left out.

    Parameters
    ----------
    grids
        One for each CRS of the chips.
    codes
        Shape (chip,). Their CRS.
    bounds
        Shape (chip, 4).
    side
        Side of a chip, in the map's pixels.
    block_px
        Side of a block.
    """
    parts = []
    for number, grid in enumerate(grids):
        own = np.flatnonzero(codes == grid.code)
        first = corners(grid, bounds[own])
        limit = np.array([grid.height, grid.width])
        inside = ((first < limit) & (first + side > 0)).all(axis=1)
        own, first = own[inside], first[inside]
        low = np.maximum(first, 0) // block_px
        high = (np.minimum(first + side, limit) - 1) // block_px
        spans = high - low + 1
        for down in range(int(spans[:, 0].max(initial=0))):
            for across in range(int(spans[:, 1].max(initial=0))):
                some = (spans[:, 0] > down) & (spans[:, 1] > across)
                place = low[some] + [down, across]
                parts.append(np.column_stack([np.full(len(place), number), place, own[some]]))
    rows = np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int64)
    rows = rows[np.lexsort((rows[:, 3], rows[:, 1], rows[:, 2], rows[:, 1] // STRIP, rows[:, 0]))]
    begins = np.flatnonzero(np.diff(rows[:, :3], axis=0, prepend=rows[:1, :3] - 1).any(axis=1))
    blocks = tuple(_block(grids, rows[at, :3].tolist(), block_px) for at in begins)
    return BlockChips(blocks, rows[:, 3].astype(np.int64), np.append(begins, len(rows)).astype(np.int64))


def owned(grid: MapGrid, bounds: NDArray[np.float64], block: MapBlock, block_px: int) -> NDArray[np.bool_]:
    """Return which chips count to a block of those that reach it: each counts to the block of its north-west pixel."""
    corner = np.maximum(corners(grid, bounds), 0) // block_px
    return np.asarray((corner == [block.row, block.col]).all(axis=1))


def _block(grids: Sequence[MapGrid], place: Sequence[int], block_px: int) -> MapBlock:
    number, row, col = place
    grid = grids[number]
    height = min(block_px, grid.height - row * block_px)
    width = min(block_px, grid.width - col * block_px)
    return MapBlock(number, row, col, height, width)


def blocks_of(grid: MapGrid, block_px: int) -> Iterator[tuple[int, int]]:
    """Yield row and column of every block of a grid, those without chips too."""
    for row in range(-(-grid.height // block_px)):
        for col in range(-(-grid.width // block_px)):
            yield row, col
