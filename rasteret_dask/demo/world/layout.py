# SPDX-License-Identifier: Apache-2.0
"""Where everything of the made-up world lies: its grids in one UTM zone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, floor, radians, sin

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer

from rasteret_dask.errors import GridError

__all__ = ["EPSG", "GRANULES", "Grid", "Layout", "WorldSize", "lonlat_bbox", "lonlat_ring", "make_layout"]

EPSG = 32633
"""CRS of every raster: WGS 84 / UTM zone 33N."""
GRANULES = ("33UVR", "33UWR")
"""MGRS names of the western and the eastern Sentinel-2 granule."""

_EAST_X0, _Y0 = 499_980, 5_560_020  # the real 33UWR starts at x = 499,980 as well
_LANDSAT_TURN = radians(13)  # how far a Landsat scene leans at 50 degrees north
_LANDSAT_SPARE_M = 600
_EMBEDDING_SPARE_M = 320


@dataclass(frozen=True, slots=True)
class WorldSize:
    """How large the world is; everything else follows from it.

    The default is 36.2 x 34.2 km. Real Sentinel-2 granules are 10,980 pixels wide; two of those would take
    gigabytes, so these are smaller, on the same 60 m origins and with the same internal tiles.
    """

    granule_width_px: int = 2316
    """Width of each Sentinel-2 granule in pixels of 10 m; a multiple of 6 (60 m)."""
    granule_height_px: int = 3420
    """Height of each Sentinel-2 granule in pixels of 10 m; a multiple of 6 (60 m)."""
    granule_step_px: int = 1308
    """From the western to the eastern granule's west edge, in pixels of 10 m; a multiple of 6 (60 m)."""
    tile_px: int = 1024
    """Internal tiles of the 10 m files; those of SCL are a half of it, Landsat's a quarter, at least 128."""

    def __post_init__(self) -> None:
        sizes = (self.granule_width_px, self.granule_height_px, self.granule_step_px)
        if (
            min(sizes) < 60
            or any(size % 6 for size in sizes)
            or self.granule_step_px >= self.granule_width_px
        ):
            raise GridError(
                "size of the made-up world",
                f"granules of {sizes[0]} x {sizes[1]} px, {sizes[2]} px apart",
                "multiples of 6 px from 60 up, and a step below the width",
            )
        if self.tile_px < 128 or self.tile_px % 16:
            raise GridError(
                "size of the made-up world", f"tile_px={self.tile_px}", "a multiple of 16 from 128 up"
            )


@dataclass(frozen=True, slots=True)
class Grid:
    """A north-up raster grid in EPSG:32633."""

    x0: int
    """West edge, metres."""
    y0: int
    """North edge, metres."""
    pixel_m: int
    """Side of a pixel, metres."""
    height: int
    """Rows."""
    width: int
    """Columns."""

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """West, south, east and north edge, metres."""
        return (
            self.x0,
            self.y0 - self.height * self.pixel_m,
            self.x0 + self.width * self.pixel_m,
            self.y0,
        )

    @property
    def transform(self) -> Affine:
        """Pixel (column, row) to CRS (x, y)."""
        return Affine(self.pixel_m, 0, self.x0, 0, -self.pixel_m, self.y0)

    @property
    def x(self) -> NDArray[np.float64]:
        """Shape (width,). Easting of pixel centres, metres."""
        return self.x0 + self.pixel_m * np.arange(0.5, self.width, dtype=np.float64)

    @property
    def y(self) -> NDArray[np.float64]:
        """Shape (height,). Northing of pixel centres, metres, from north to south."""
        return self.y0 - self.pixel_m * np.arange(0.5, self.height, dtype=np.float64)

    def rows(self, start: int, stop: int) -> Grid:
        """Return the grid of rows ``start`` to ``stop`` (excluded), cut at the last row."""
        stop = min(stop, self.height)
        return Grid(self.x0, self.y0 - start * self.pixel_m, self.pixel_m, stop - start, self.width)

    def within(self, outer: Grid) -> tuple[slice, slice]:
        """Return where this grid lies in ``outer`` (rows, columns), both of the same pixels."""
        row, col = (outer.y0 - self.y0) // self.pixel_m, (self.x0 - outer.x0) // self.pixel_m
        return slice(row, row + self.height), slice(col, col + self.width)


@dataclass(frozen=True, slots=True)
class Layout:
    """The grids of all files, and the canvas the ground is painted on."""

    canvas: Grid
    """10 m; contains all others with a margin."""
    optical: Grid
    """10 m; what the two Sentinel-2 granules cover together: the world's area."""
    granules: tuple[Grid, Grid]
    """10 m; the western and the eastern granule."""
    landsat: Grid
    """30 m, with edges at 15 mod 30 m as Landsat's are."""
    landsat_corners: tuple[tuple[float, float], ...]
    """(x, y) of the turned rectangle that Landsat sees, metres; outside it pixels are fill."""
    embeddings: Grid
    """10 m; the file itself is stored south-up."""


def make_layout(size: WorldSize) -> Layout:
    """Lay out the world of this size."""
    west_x0 = _EAST_X0 - 10 * size.granule_step_px
    shape = (size.granule_height_px, size.granule_width_px)
    granules = (Grid(west_x0, _Y0, 10, *shape), Grid(_EAST_X0, _Y0, 10, *shape))
    optical = Grid(west_x0, _Y0, 10, shape[0], size.granule_step_px + shape[1])
    corners = _turned_rectangle(optical)
    landsat = _landsat_grid(corners)
    west, south, east, north = landsat.bounds
    x0, y0 = floor((west - 30) / 60) * 60, ceil((north + 30) / 60) * 60
    canvas = Grid(x0, y0, 10, 6 * ceil((y0 - south + 30) / 60), 6 * ceil((east + 30 - x0) / 60))
    spare = _EMBEDDING_SPARE_M // 10
    embeddings = Grid(
        optical.x0 - _EMBEDDING_SPARE_M,
        optical.y0 + _EMBEDDING_SPARE_M,
        10,
        optical.height + 2 * spare,
        optical.width + 2 * spare,
    )
    return Layout(canvas, optical, granules, landsat, corners, embeddings)


def lonlat_ring(corners: tuple[tuple[float, float], ...]) -> list[list[float]]:
    """Return the closed ring of (longitude, latitude), degrees, of corners (x, y) in metres."""
    to_lonlat = Transformer.from_crs(EPSG, 4326, always_xy=True)
    ring = [[round(v, 7) for v in to_lonlat.transform(x, y)] for x, y in corners]
    return [*ring, ring[0]]


def lonlat_bbox(grid: Grid) -> tuple[float, float, float, float]:
    """Return west, south, east, north in degrees of the smallest lon/lat box around a grid."""
    to_lonlat = Transformer.from_crs(EPSG, 4326, always_xy=True)
    west, south, east, north = to_lonlat.transform_bounds(*grid.bounds)
    return (round(west, 6), round(south, 6), round(east, 6), round(north, 6))


def _turned_rectangle(area: Grid) -> tuple[tuple[float, float], ...]:
    west, south, east, north = area.bounds
    half_w, half_h = (east - west) / 2 + _LANDSAT_SPARE_M, (north - south) / 2 + _LANDSAT_SPARE_M
    c, s = cos(_LANDSAT_TURN), sin(_LANDSAT_TURN)
    a, b = half_w * c + half_h * s, half_w * s + half_h * c  # the turned rectangle that contains the area
    mid_x, mid_y = (west + east) / 2, (south + north) / 2
    return tuple(
        (mid_x + u * a * c + v * b * s, mid_y - u * a * s + v * b * c)
        for u, v in ((-1, 1), (-1, -1), (1, -1), (1, 1))
    )


def _landsat_grid(corners: tuple[tuple[float, float], ...]) -> Grid:
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    x0 = floor((min(xs) - 15) / 30) * 30 + 15
    y0 = ceil((max(ys) - 15) / 30) * 30 + 15
    return Grid(x0, y0, 30, ceil((y0 - min(ys)) / 30), ceil((max(xs) - x0) / 30))
