# SPDX-License-Identifier: Apache-2.0
"""Windows that leave no pixel of an area out: which there are, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.mapground import MapGround
from rasteret_dask.grid import Bounds

__all__ = ["CoverGrid", "starts"]

EDGE_PX = 1e-4
"""An edge that reaches less far into a pixel does not touch it: rounding of maps."""

MANY = 1_000_000
"""Windows of the rectangle around the ground; beyond, its pieces are looked at one by one."""

BATCH = 65_536
"""Windows that are compared with an area together."""


@dataclass(frozen=True, slots=True)
class CoverGrid:
    """A map's pixels, counted from a corner of its lattice: rows southwards, columns eastwards."""

    ground: MapGround
    anchor: tuple[float, float]
    """The pixel corner (x, y) that windows lie at multiples of the stride from."""
    pixel: float
    size: int
    """Of a window, pixels."""
    stride: int
    shift: bool
    """Whether windows are shifted inwards at the edges of the area; else they reach beyond."""

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """The first row and the one behind the last that the area touches, and the same of columns."""
        (xmin, ymin, xmax, ymax), (x, y) = self.ground.edges, self.anchor
        return self._between(y - ymax, y - ymin) + self._between(xmin - x, xmax - x)

    @property
    def bounds(self) -> Bounds:
        """The area's edges on edges of pixels: xmin, ymin, xmax, ymax."""
        top, bottom, left, right = self.edges
        xmin, ymin, xmax, ymax = self.boxes(
            np.array([[top, left]]), np.array([[bottom - top, right - left]])
        )[0]
        return float(xmin), float(ymin), float(xmax), float(ymax)

    def windows(self) -> NDArray[np.int64]:
        """Return row and column of the first pixel of each window, shape (window, 2), row by row.

        Neighbours share their overlap: each window answers for what lies nearer to its middle, at the area's edges up
        to them. A window is there where its own part touches the ground. So every pixel is in the window that answers
        for it.
        """
        top, bottom, left, right = self.edges
        rows = _parts(starts(top, bottom, self.size, self.stride, self.shift), top, bottom, self.size)
        cols = _parts(starts(left, right, self.size, self.stride, self.shift), left, right, self.size)
        found = [np.zeros((0, 2), dtype=np.int64)]
        for shape in self._pieces():
            xmin, ymin, xmax, ymax = (float(v) for v in shapely.bounds(shape))
            x, y = self.anchor
            down = _near(rows, *self._between(y - ymax, y - ymin))
            across = _near(cols, *self._between(xmin - x, xmax - x))
            shapely.prepare(shape)
            per_batch = max(BATCH // max(len(across), 1), 1)
            found += [
                self._touching(shape, down[n : n + per_batch], across) for n in range(0, len(down), per_batch)
            ]
        return np.unique(np.concatenate(found), axis=0)

    def count(self) -> int:
        """Return how many windows are compared with the ground, about, before any is made."""
        return sum(self._count_in(shape) for shape in self._pieces())

    def _pieces(self) -> list[Any]:
        """Return the ground in one piece, or in several where they lie far apart."""
        shape = self.ground.shape
        return [shape] if self._count_in(shape) <= MANY else list(shapely.get_parts(shape))

    def _count_in(self, shape: Any) -> int:
        xmin, ymin, xmax, ymax = (float(v) for v in shapely.bounds(shape))
        step = self.stride * self.pixel
        return (floor((ymax - ymin) / step) + 2) * (floor((xmax - xmin) / step) + 2)

    def boxes(self, corner: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return xmin, ymin, xmax, ymax of rectangles of pixels, shape (n, 4).

        Parameters
        ----------
        corner
            Shape (n, 2). Row and column of their first pixels.
        size
            Shape (n, 2). How many rows and columns they have.
        """
        (x, y), last = self.anchor, corner + size
        sides = [x + corner[:, 1] * self.pixel, y - last[:, 0] * self.pixel]
        sides += [x + last[:, 1] * self.pixel, y - corner[:, 0] * self.pixel]
        return np.asarray(np.round(np.stack(sides, -1), 9))

    def _between(self, start: float, stop: float) -> tuple[int, int]:
        """Return the first pixel that a length touches, and the one behind the last."""
        return floor(start / self.pixel + EDGE_PX), ceil(stop / self.pixel - EDGE_PX)

    def _touching(self, shape: Any, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows whose own parts touch a piece of the ground."""
        row, col = (
            np.reshape(v, -1) for v in np.meshgrid(np.arange(len(rows)), np.arange(len(cols)), indexing="ij")
        )
        own = np.stack([rows[row], cols[col]], -1)
        corner, last = own[:, 1], own[:, 2]
        box = self.boxes(corner, last - corner) + np.array([1, 1, -1, -1]) * EDGE_PX * self.pixel
        return np.asarray(own[:, 0][shapely.intersects(shape, shapely.box(*box.T))])


def starts(first: int, stop: int, size: int, stride: int, shift: bool) -> NDArray[np.int64]:
    """Return where windows begin that hold all pixels of a line, rising.

    Parameters
    ----------
    first, stop
        The line's first pixel, and the one behind its last.
    size, stride
        Pixels of a window, and from one to the next; windows begin at multiples of the stride.
    shift
        Whether those that would reach beyond the line are shifted inwards. A line that is shorter than a window has one
        window around its middle.
    """
    if shift and stop - first <= size:
        return np.array([first - (size - (stop - first)) // 2])
    last = max(floor(first / stride), ceil((stop - size) / stride))
    begin = np.arange(floor(first / stride), last + 1, dtype=np.int64) * stride
    return np.unique(np.clip(begin, first, stop - size)) if shift else begin


def _parts(begin: NDArray[np.int64], first: int, stop: int, size: int) -> NDArray[np.int64]:
    """Return for each window of a line where it begins, and its own part: the first pixel and the one behind the last.

    Shape (window, 3).
    """
    overlap = begin[:-1] + size - begin[1:]
    middle = begin[1:] + overlap // 2
    return np.stack([begin, np.append(first, middle), np.append(middle, stop)], -1)


def _near(parts: NDArray[np.int64], first: int, stop: int) -> NDArray[np.int64]:
    """Return the windows of a line whose own part touches a stretch of it."""
    return np.asarray(parts[(parts[:, 2] > first) & (parts[:, 1] < stop)])
