# SPDX-License-Identifier: Apache-2.0
"""Exact arithmetic between cells, bounds and pixel edges of a zone's lattice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor, isfinite, log10
from typing import TypeAlias

import numpy as np
import pyproj
from numpy.typing import ArrayLike, NDArray
from pyproj.exceptions import ProjError

from rasteret_dask.crs import crs_of, text
from rasteret_dask.errors import GridError

__all__ = [
    "FALSE_NORTHING_M",
    "UPS_NORTH",
    "UPS_SOUTH",
    "Bounds",
    "Lattice",
    "bounds_in",
    "digits",
    "is_utm",
    "northern",
    "snap",
    "transformer",
    "utm_zone",
    "zone_epsg",
]

Bounds: TypeAlias = tuple[float, float, float, float]
"""xmin, ymin, xmax, ymax."""

FALSE_NORTHING_M = 10_000_000.0
"""Northing of the equator in a southern UTM zone (327zz); 0 in a northern one (326zz). EPSG guidance note 7-2."""

UPS_NORTH, UPS_SOUTH = 32661, 32761
"""EPSG codes of the polar stereographic maps that go on where UTM ends."""

_EDGE = 1e-6
"""Pixels. Two edges nearer than this are the same edge."""


def digits(resolution: float) -> int:
    """Return the decimals to which places are told apart: a millionth of a unit, or of a pixel where that is less."""
    return 6 + max(0, -floor(log10(resolution)))


@dataclass(frozen=True, slots=True)
class Lattice:
    """A fixed grid: split cells from an origin on, chip cells inside each from its north-west corner.

    All lengths are metres in the CRS of a zone. Rows count southwards and columns eastwards.
    """

    cell_m: float
    """Side of a split cell."""
    chip_m: float
    """Side of a chip cell."""
    stride_m: float
    """From one chip cell to the next."""
    origin: tuple[float, float] = (0.0, 0.0)
    """North-west corner (x, y) of split cell (0, 0)."""

    def __post_init__(self) -> None:
        if not 0 < self.chip_m <= self.cell_m + _EDGE:
            raise GridError(
                "chip size",
                f"{self.chip_m:g} m",
                f"more than 0 and at most a split cell, {self.cell_m:g} m",
                "Choose a smaller size or a larger cell_km.",
            )
        if not self.stride_m > 0:
            raise GridError("stride", f"{self.stride_m:g} m", "more than 0")

    @property
    def per_side(self) -> int:
        """Chip cells along one side of a split cell."""
        return int((self.cell_m - self.chip_m) / self.stride_m + _EDGE) + 1

    @property
    def unused_m(self) -> float:
        """Width of the strip of a split cell that no chip cell reaches."""
        return max(0.0, self.cell_m - (self.per_side - 1) * self.stride_m - self.chip_m)

    def windows_in(self, bounds: Bounds) -> float:
        """Return how many chip cells the split cells that touch ``bounds`` hold, without making any."""
        row0, row1, col0, col1 = self._range(bounds)
        return (row1 - row0) * (col1 - col0) * float(self.per_side) ** 2

    def split_cells(self, bounds: tuple[float, float, float, float]) -> NDArray[np.int64]:
        """Return the split cells that touch ``bounds`` (xmin, ymin, xmax, ymax), shape (cell, 2) as row, col."""
        row0, row1, col0, col1 = self._range(bounds)
        rows, cols = np.arange(row0, row1, dtype=np.int64), np.arange(col0, col1, dtype=np.int64)
        return np.stack(np.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)

    def _range(self, bounds: Bounds) -> tuple[float, float, float, float]:
        """Return the first row of split cells that bounds touch, the one behind the last, and the same of columns."""
        (xmin, ymin, xmax, ymax), (x0, y0), side = bounds, self.origin, self.cell_m
        rows = np.floor((y0 - ymax) / side), np.ceil((y0 - ymin) / side)
        cols = np.floor((xmin - x0) / side), np.ceil((xmax - x0) / side)
        return float(rows[0]), float(rows[1]), float(cols[0]), float(cols[1])

    def split_cells_at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the split cell (row, col) that holds each place, shape (place, 2)."""
        x0, y0 = self.origin
        cells = np.stack([np.floor((y0 - y) / self.cell_m), np.floor((x - x0) / self.cell_m)], -1)
        return cells.astype(np.int64)

    def chip_cells(self, split_cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the chip cells inside split cells, shape (cell x per_side^2, 2) as row, col."""
        inner = np.arange(self.per_side, dtype=np.int64)
        offsets = np.stack(np.meshgrid(inner, inner, indexing="ij"), -1).reshape(1, -1, 2)
        return (split_cells[:, None, :] * self.per_side + offsets).reshape(-1, 2)

    def split_cell_of(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the split cell (row, col) each chip cell lies in; same shape."""
        return np.floor_divide(cells, self.per_side)

    def bounds(self, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return xmin, ymin, xmax, ymax of chip cells, shape (cell, 4)."""
        split, inner = np.divmod(cells, self.per_side)
        ymax = self.origin[1] - (split[:, 0] * self.cell_m + inner[:, 0] * self.stride_m)
        xmin = self.origin[0] + (split[:, 1] * self.cell_m + inner[:, 1] * self.stride_m)
        return np.stack([xmin, ymax - self.chip_m, xmin + self.chip_m, ymax], -1).astype(np.float64)

    def split_bounds(self, split_cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return xmin, ymin, xmax, ymax of split cells, shape (cell, 4)."""
        ymax = self.origin[1] - split_cells[:, 0] * self.cell_m
        xmin = self.origin[0] + split_cells[:, 1] * self.cell_m
        return np.stack([xmin, ymax - self.cell_m, xmin + self.cell_m, ymax], -1).astype(np.float64)


def snap(bounds: NDArray[np.float64], phase: tuple[float, float], resolution: float) -> NDArray[np.float64]:
    """Move bounds east and south by less than a pixel onto pixel edges.

    Parameters
    ----------
    bounds
        Shape (n, 4): xmin, ymin, xmax, ymax.
    phase
        (x, y) of any pixel corner of the grid.
    resolution
        Pixel size, in the same unit.
    """
    east = phase[0] + np.ceil((bounds[:, 0] - phase[0]) / resolution - _EDGE) * resolution - bounds[:, 0]
    south = phase[1] + np.floor((bounds[:, 3] - phase[1]) / resolution + _EDGE) * resolution - bounds[:, 3]
    moved: NDArray[np.float64] = bounds + np.stack([east, south, east, south], -1)
    # Edges of centimetre grids come out exact to the nanometre, so that equal ground gives equal numbers.
    return np.asarray(np.round(moved, 9), dtype=np.float64)


def utm_zone(lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
    """Return the UTM zone of points, with the exceptions of south-west Norway and Svalbard.

    Parameters
    ----------
    lon, lat
        Degrees, WGS 84.

    Raises
    ------
    GridError
        North of 84 N or south of 80 S, where UTM ends.
    """
    x = np.mod(np.asarray(lon, dtype=np.float64) + 180.0, 360.0) - 180.0
    y = np.asarray(lat, dtype=np.float64)
    polar = (y > 84.0) | (y < -80.0)
    if np.any(polar):
        worst = y[polar].flat[0] if y.ndim else float(y)
        raise GridError(
            "lattice",
            f"latitude {worst:.4f}",
            "between 80 S and 84 N, where UTM zones exist",
            "Leave such records out with subset(bbox=...).",
        )
    zone = np.clip(np.floor((x + 180.0) / 6.0).astype(np.int64) + 1, 1, 60)
    zone = np.where((y >= 56) & (y < 64) & (x >= 3) & (x < 12), 32, zone)
    svalbard = (y >= 72) & (x >= 0) & (x < 42)
    special = np.select([x < 9, x < 21, x < 33], [31, 33, 35], 37)
    return np.asarray(np.where(svalbard, special, zone), dtype=np.int64)


def zone_epsg(zone: int) -> int:
    """Return EPSG 326zz of a zone: the lattice's CRS on both hemispheres."""
    return 32600 + zone


def is_utm(code: int) -> bool:
    """Return whether a CRS is a UTM zone on WGS 84, EPSG 326zz or 327zz; their neighbours 32661 to 32667 are none."""
    return 1 <= code - 32600 <= 60 or 1 <= code - 32700 <= 60


def northern(epsg: int) -> tuple[int, float]:
    """Return (EPSG 326zz, metres to add to northings) for a UTM code, and (code, 0) for any other."""
    if is_utm(epsg) and epsg > 32700:
        return epsg - 100, -FALSE_NORTHING_M
    return epsg, 0.0


@lru_cache(maxsize=256)
def transformer(source: int, target: int) -> pyproj.Transformer:
    """Return the x/y-ordered transformer between two CRSs (:mod:`rasteret_dask.crs`), made once a process.

    Raises
    ------
    GridError
        When PROJ does not know one of them, or no way between them: the Moon, say, and the Earth.
    """
    try:
        return pyproj.Transformer.from_crs(crs_of(source), crs_of(target), always_xy=True)
    except ProjError as error:
        raise GridError(f"{text(source)} in {text(target)}", str(error), "two CRSs of one planet") from None


def bounds_in(bounds: Sequence[float] | NDArray[np.float64], source: int, target: int) -> Bounds:
    """Return the bounds in another CRS that hold all of ``bounds``.

    Raises
    ------
    GridError
        When the other CRS cannot show them.
    """
    xmin, ymin, xmax, ymax = (float(v) for v in bounds)
    if source != target:
        try:
            moved = transformer(source, target).transform_bounds(xmin, ymin, xmax, ymax, densify_pts=21)
        except ProjError:
            moved = (np.nan,) * 4
        if not all(map(isfinite, moved)):  # NumPy takes as long for four numbers as PROJ
            raise GridError(
                f"bounds ({xmin:.7g}, {ymin:.7g}, {xmax:.7g}, {ymax:.7g}) of {text(source)}",
                f"no such place in {text(target)}", "bounds that both can show",
            )  # fmt: skip
        xmin, ymin, xmax, ymax = (float(v) for v in moved)
    return xmin, ymin, xmax, ymax
