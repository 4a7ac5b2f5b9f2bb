# SPDX-License-Identifier: Apache-2.0
"""Pixel grids in a CRS, and rectangles of their pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points

from rasteret_dask.crs import spelled, text, travelling
from rasteret_dask.errors import GridError

__all__ = ["Grid", "Rect", "Window", "crs_of", "transformed", "union"]


@dataclass(frozen=True, slots=True)
class Grid:
    """A north-up pixel grid: its CRS, north-west corner and pixel size."""

    epsg: int
    """As :func:`rasteret_dask.crs.number` counts it."""
    x0: float
    """West edge of pixel column 0, in units of the CRS."""
    y0: float
    """North edge of pixel row 0, in units of the CRS."""
    xres: float
    """Width of a pixel, positive."""
    yres: float
    """Height of a pixel, positive."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsg", travelling(self.epsg))
        if not (self.xres > 0 and self.yres > 0 and isfinite(self.xres + self.yres + self.x0 + self.y0)):
            raise GridError(
                f"grid of {text(self.epsg)}",
                f"corner ({self.x0}, {self.y0}), pixel size ({self.xres}, {self.yres})",
                "finite numbers and a positive pixel size",
            )

    def transform(self, window: Window) -> Affine:
        """Return the affine transform (pixel -> CRS) of one window."""
        x, y = self.x0 + window.col * self.xres, self.y0 - window.row * self.yres
        return Affine(self.xres, 0.0, x, 0.0, -self.yres, y)


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of a grid's pixels; it may be negative or beyond any raster."""

    row: int
    """Counts southwards from the grid's corner."""
    col: int
    """Counts eastwards from the grid's corner."""
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise GridError("window", f"{self.height} x {self.width} pixels", "at least one pixel each way")


class Rect(NamedTuple):
    """Half-open rectangle of a level's pixels, rows counted from the north in unrotated files."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns); zero where the rectangle is empty."""
        return max(self.row1 - self.row0, 0), max(self.col1 - self.col0, 0)

    @property
    def empty(self) -> bool:
        """Whether no pixel is inside."""
        return 0 in self.shape

    def clip(self, height: int, width: int) -> Rect:
        """Return the part inside a raster of this size."""
        return self.cut(Rect(0, height, 0, width))

    def cut(self, other: Rect) -> Rect:
        """Return the part inside another rectangle."""
        return Rect(
            max(self.row0, other.row0),
            min(self.row1, other.row1),
            max(self.col0, other.col0),
            min(self.col1, other.col1),
        )

    def covers(self, other: Rect) -> bool:
        """Tell whether another rectangle lies inside."""
        return other.cut(self) == other


def union(rects: Iterable[Rect]) -> Rect:
    """Return the bounds of some rectangles."""
    found = list(rects)
    return Rect(
        min(r.row0 for r in found),
        max(r.row1 for r in found),
        min(r.col0 for r in found),
        max(r.col1 for r in found),
    )


def transformed(
    source: int, target: int, xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return places of one CRS in another, shape (place,) each.

    Parameters
    ----------
    source, target
        CRSs, as :func:`rasteret_dask.crs.number` counts them.
    xs, ys
        Shape (place,), in units of ``source``.

    Raises
    ------
    GridError
        When PROJ does not know a code, or refuses the places.
    """
    try:
        x, y = transform_points(crs_of(source), crs_of(target), xs.tolist(), ys.tolist())
    except (RasterioError, CPLE_BaseError) as error:
        failure = GridError(
            f"places of {text(source)} in {text(target)}", str(error), "places where both systems are defined"
        )
    else:
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    raise failure  # outside of the except block: what rasterio chains to its errors does not unpickle


@lru_cache(maxsize=256)
def crs_of(epsg: int) -> CRS:
    """Return GDAL's form of a CRS, parsed once per process.

    Raises
    ------
    GridError
        When PROJ does not know the code, or nobody brought its WKT2 to this process.
    """
    try:
        return CRS.from_user_input(spelled(epsg))
    except CRSError as error:
        raise GridError(text(epsg), str(error), "a CRS that GDAL knows") from error
