"""What every contender on a map has in common: the model, the windows, and a dull way to blend them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from jobs import MapJob
from numpy.typing import NDArray

WEIGHTS = tuple(np.float32(w * 1e-4) for w in (0.5, -0.25, 0.375, 0.75))
"""Of the bands; raw numbers of up to 12,000 become about -0.3 to 1.9."""


def score(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Return the model's output: a weighted sum of bands, then the mean of 3 x 3 pixels.

    Parameters
    ----------
    pixels
        Shape (chip, band, y, x), of any dtype.

    Returns
    -------
    ndarray
        Shape (chip, 1, y, x). At the edges of a window the outermost pixels are repeated, so that windows differ there,
        and a wrong blend shows.
    """
    result = np.empty((len(pixels), 1, *pixels.shape[2:]), np.float32)
    for bands, (output,) in zip(
        pixels, result, strict=True
    ):  # a window's numbers stay in the processor's cache
        line = bands[0].astype(np.float32)
        line *= WEIGHTS[0]
        for band, weight in zip(bands[1:], WEIGHTS[1:], strict=False):
            line += band.astype(np.float32) * weight
        wide = np.pad(line, 1, mode="edge")
        rows = wide[:-2] + wide[1:-1]
        rows += wide[2:]
        np.add(rows[:, :-2], rows[:, 1:-1], out=output)
        output += rows[:, 2:]
        output *= np.float32(1 / 9)
    return result


def corners(job: MapJob) -> list[tuple[int, int]]:
    """Return the north-west pixel (row, column) of every window; their last ones end at the area's edges."""
    rows, columns = (range(0, side - job.size_px + 1, job.stride_px) for side in job.shape)
    if rows[-1] + job.size_px != job.shape[0] or columns[-1] + job.size_px != job.shape[1]:
        raise SystemExit(f"windows of {job.size_px} every {job.stride_px} px do not end at {job.shape}")
    return list(product(rows, columns))


def weights(job: MapJob) -> NDArray[np.float32]:
    """Return the weight of each pixel of a window, shape (y, x)."""
    if job.blend == "mean":
        return np.ones((job.size_px, job.size_px), np.float32)
    ramp = np.sin(np.pi * (np.arange(job.size_px) + 0.5) / job.size_px) ** 2
    return np.outer(ramp, ramp).astype(np.float32)


def cut(job: MapJob, cube: NDArray[Any]) -> Iterator[tuple[list[tuple[int, int]], NDArray[Any]]]:
    """Yield batches of windows of a cube (band, y, x): their corners, and their pixels (chip, band, y, x)."""
    size, places = job.size_px, corners(job)
    for first in range(0, len(places), job.batch):
        some = places[first : first + job.batch]
        yield some, np.stack([cube[:, y : y + size, x : x + size] for y, x in some])


class Sum:
    """A map in the making: weighted outputs and weights of all windows so far."""

    def __init__(self, job: MapJob) -> None:
        self._job, self._weights = job, weights(job)
        self._total = np.zeros(job.shape, np.float32)
        self._weight = np.zeros(job.shape, np.float32)

    def add(self, row: int, column: int, output: NDArray[np.float32]) -> None:
        """Add the output (y, x) of the window at a corner."""
        window = (slice(row, row + self._job.size_px), slice(column, column + self._job.size_px))
        self._total[window] += output * self._weights
        self._weight[window] += self._weights

    def map(self) -> NDArray[np.float32]:
        """Return the map, shape (y, x)."""
        return self._total / self._weight


class Trim:
    """A map in the making: each window gives the pixels that are nearer to its middle than to any other's."""

    def __init__(self, job: MapJob) -> None:
        self._job, self._half = job, (job.size_px - job.stride_px) // 2
        self._map = np.zeros(job.shape, np.float32)

    def add(self, row: int, column: int, output: NDArray[np.float32]) -> None:
        """Put the output (y, x) of the window at a corner; later ones lie south and east of earlier ones."""
        y, x = (self._half if corner else 0 for corner in (row, column))
        size = self._job.size_px
        self._map[row + y : row + size, column + x : column + size] = output[y:, x:]

    def map(self) -> NDArray[np.float32]:
        """Return the map, shape (y, x)."""
        return self._map


def blender(job: MapJob) -> Sum | Trim:
    """Return what blends the windows of a job."""
    return Trim(job) if job.blend == "centre" else Sum(job)


def slide(
    job: MapJob, cube: NDArray[Any], model: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[np.float32]:
    """Return a job's map of a whole cube (band, y, x)."""
    blend = blender(job)
    for some, pixels in cut(job, cube):
        for (y, x), output in zip(some, model(pixels), strict=True):
            blend.add(y, x, output[0])
    return blend.map()
