# SPDX-License-Identifier: Apache-2.0
"""Rasters as chips see them: their numbers on the pixels of a chip, and where they have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.crs import text
from rasteret_dask.errors import GridError, PlanError, ReadError
from rasteret_dask.extent import is_geographic
from rasteret_dask.grid import Bounds, bounds_in, transformer
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.hrefs import is_local, redact
from rasteret_dask.prediction.openmap import zarr_place

__all__ = [
    "INVALID",
    "OUTSIDE",
    "VALID",
    "ArrayPixels",
    "FilePixels",
    "RasterPixels",
    "PixelGrid",
    "PixelPlaces",
    "Raster",
    "Rasters",
    "ChipView",
    "ZarrPixels",
]

OUTSIDE, INVALID, VALID = 0, 1, 2
"""Of a pixel of a chip: no raster is there; one is, and has no number; one has."""

ON_GRID = 1e-3
"""Pixels whose corners are less than this part of a pixel away from another grid's are that grid's."""

ON_EDGE = 1e-6
"""A place this part of a pixel before the edge of a pixel is on the edge, and in the pixel behind it: rounding."""


class RasterPixels(Protocol):
    """What reads the numbers of one raster."""

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return numbers, shape (band, y, x), and where they are valid, shape (y, x)."""


@dataclass(frozen=True, slots=True)
class FilePixels:
    """Pixels of a file that GDAL opens."""

    href: str
    nodata: float | None
    """Stands for what the file says; None: the file's own nodata, mask and alpha hold."""
    bands: tuple[int, ...]
    """Numbers of bands, from 1 on."""

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return numbers, shape (band, y, x), and where they are valid, shape (y, x)."""
        import rasterio
        from rasterio.windows import Window

        window = Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        bands = list(self.bands)

        def both(file: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            values = file.read(bands, window=window)
            if self.nodata is None:
                masks = file.read_masks(bands, window=window)
                return values, _finite(values) & (masks != 0).all(axis=0)
            return values, _finite(values) & (values != self.nodata).all(axis=0)

        try:
            if is_local(self.href):
                with rasterio.open(self.href) as file:
                    return both(file)
            place = GdalFile(self.href)
            try:
                opened = place.open("GTiff")
                return place.call(lambda: both(opened))
            finally:
                place.close()
        except rasterio.errors.RasterioError as error:
            raise ReadError(
                f"reading {redact(self.href)}", str(error), "a GeoTIFF that GDAL reads",
                "It is damaged or was replaced: write it again.",
            ) from error  # fmt: skip


@dataclass(frozen=True, slots=True)
class ZarrPixels:
    """Pixels of a Zarr array (y, x) or (band, y, x)."""

    url: str
    path: str
    """Of the array, below the store."""
    nodata: float | None
    """None: whatever is finite is valid."""
    bands: tuple[int, ...] | None
    """Places of bands; None: the array has no axis of bands."""

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return numbers, shape (band, y, x), and where they are valid, shape (y, x)."""
        array = _zarr(self.url, self.path)
        if self.bands is None:
            values = np.asarray(array[rows, columns])[None]
        elif len(self.bands) == array.shape[0]:
            values = np.asarray(array[:, rows, columns])
        else:
            values = np.stack([np.asarray(array[band, rows, columns]) for band in self.bands])
        return values, _valid(values, self.nodata)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayPixels:
    """Pixels of an xarray array (y, x) or (band, y, x), in memory or of Dask."""

    array: Any
    nodata: float | None
    bands: tuple[int, ...] | None

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return numbers, shape (band, y, x), and where they are valid, shape (y, x)."""
        part = self.array[..., rows, columns]
        values = np.asarray(part.compute(scheduler="synchronous") if part.chunks else part.values)
        values = values[None] if self.bands is None else values[list(self.bands)]
        return values, _valid(values, self.nodata)


@lru_cache(maxsize=64)
def _zarr(url: str, path: str) -> Any:
    import zarr

    return zarr.open_array(zarr_place(url), path=path, mode="r")


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    if values.dtype.kind != "f":
        return np.ones(values.shape[1:], dtype=bool)
    return np.asarray(np.isfinite(values).all(axis=0))


def _valid(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    return _finite(values) if nodata is None else _finite(values) & (values != nodata).all(axis=0)


@dataclass(frozen=True, slots=True)
class PixelPlaces:
    """Which pixels of a raster the pixels of a chip are."""

    rows: NDArray[np.int64]
    """Shape (y, 1) or (y, x)."""
    columns: NDArray[np.int64]
    """Shape (1, x) or (y, x)."""
    exact: bool
    """Whether the chip's pixels are pixels of the raster."""


@dataclass(frozen=True, slots=True)
class PixelGrid:
    """Where the pixels of a raster lie."""

    epsg: int
    """As :func:`rasteret_dask.crs.number` counts CRSs."""
    x: float
    """West edge of column 0."""
    y: float
    """Edge of row 0 where rows begin."""
    dx: float
    dy: float
    """From a row to the next; below 0 where rows go south."""
    height: int
    width: int

    @property
    def bounds(self) -> Bounds:
        """Xmin, ymin, xmax, ymax."""
        ends = self.y, self.y + self.height * self.dy
        return self.x, min(ends), self.x + self.width * self.dx, max(ends)

    def places(self, epsg: int, bounds: Sequence[float], shape: tuple[int, int]) -> PixelPlaces:
        """Return which pixels the pixels of a chip are, beyond the raster's edges too: those that hold their centres.

        Parameters
        ----------
        epsg, bounds
            The chip's CRS, and its xmin, ymin, xmax, ymax.
        shape
            Its (height, width) in pixels.
        """
        (xmin, ymin, xmax, ymax), (height, width) = bounds, shape
        east, south = (xmax - xmin) / width, (ymax - ymin) / height
        x = xmin + (np.arange(width) + 0.5) * east
        y = ymax - (np.arange(height) + 0.5) * south
        if epsg != self.epsg:
            return self._places_of_others(epsg, x, y)
        column, row = (xmin - self.x) / self.dx, (ymax - self.y) / self.dy
        off = (
            column - round(column),
            row - round(row),
            (east / self.dx - 1) * width,
            (-south / self.dy - 1) * height,
        )
        if max(map(abs, off)) < ON_GRID:
            rows = round(row) + np.arange(height, dtype=np.int64)
            return PixelPlaces(
                rows[:, None], round(column) + np.arange(width, dtype=np.int64)[None], exact=True
            )
        return PixelPlaces(
            _floor((y - self.y) / self.dy)[:, None], _floor((x - self.x) / self.dx)[None], exact=False
        )

    def _places_of_others(self, epsg: int, x: NDArray[Any], y: NDArray[Any]) -> PixelPlaces:
        xs, ys = (np.asarray(v) for v in transformer(epsg, self.epsg).transform(*np.meshgrid(x, y)))
        if is_geographic(self.epsg):
            whole = 360.0  # degrees: a raster may count longitudes from 0, or beyond 180
            xs = self.x + np.mod(xs - self.x + ON_EDGE * self.dx, whole) - ON_EDGE * self.dx
        there = np.isfinite(xs) & np.isfinite(ys)
        columns = np.where(there, (xs - self.x) / self.dx, -1.0)
        rows = np.where(there, (ys - self.y) / self.dy, -1.0)
        return PixelPlaces(_floor(rows), _floor(columns), exact=False)


def _floor(values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return the pixel that holds each place; places far beyond a raster stay where an integer can say them."""
    return np.asarray(np.floor(np.clip(values + ON_EDGE, -(2.0**40), 2.0**40)), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Raster:
    """One raster: where it lies, and its numbers."""

    name: str
    """What it is called in messages, and the file of its errors."""
    grid: PixelGrid
    pixels: RasterPixels
    codes: tuple[int, ...] | None = None
    """Of bands that hold how likely each class is: their classes. None: a pixel has one number."""

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the number or likeliest class of each pixel, and where it is valid; shape (y, x) each."""
        values, valid = self.pixels.read(rows, columns)
        if self.codes is None:
            return values[0], valid
        likely = np.argmax(np.where(valid, values, 0), axis=0)
        return np.asarray(self.codes, dtype=np.int64)[likely], valid


@dataclass(frozen=True, slots=True)
class ChipView:
    """What rasters say on the pixels of one chip."""

    values: NDArray[Any]
    """Shape (y, x). int64 of classes, float64 of measured numbers."""
    state: NDArray[np.uint8]
    """Shape (y, x). OUTSIDE, INVALID or VALID."""
    raster: NDArray[np.int32]
    """Shape (y, x). Number of the raster that it is from, -1 outside of all."""
    exact: bool
    """Whether all numbers are of pixels that are the chip's own."""


@dataclass(frozen=True, eq=False)
class Rasters:
    """Some rasters, of any grids."""

    name: str
    """What the user called them."""
    rasters: tuple[Raster, ...]
    is_class: bool
    """Whether their numbers are classes."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Class -> its name, as far as names are known."""

    @cached_property
    def _bounds(self) -> Mapping[int, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """CRS -> numbers of its rasters, and their bounds, shape (raster, 4)."""
        codes = np.array([one.grid.epsg for one in self.rasters], dtype=np.int64)
        boxes = np.array([one.grid.bounds for one in self.rasters], dtype=np.float64).reshape(-1, 4)
        return {
            code: (np.flatnonzero(codes == code), boxes[codes == code]) for code in np.unique(codes).tolist()
        }

    def touching(self, epsg: int, bounds: Sequence[float]) -> list[int]:
        """Return which rasters a chip is read from: those of its own CRS, else all that it touches."""
        own = self._touching(epsg, epsg, bounds)
        return own or [n for code in self._bounds if code != epsg for n in self._touching(code, epsg, bounds)]

    def _touching(self, code: int, epsg: int, bounds: Sequence[float]) -> list[int]:
        if code not in self._bounds:
            return []
        numbers, boxes = self._bounds[code]
        try:
            xmin, ymin, xmax, ymax = bounds_in(bounds, epsg, code)
        except GridError:  # the raster's CRS does not show this ground
            return []
        there = (boxes[:, 1] < ymax) & (boxes[:, 3] > ymin)
        if is_geographic(
            code
        ):  # across the antimeridian xmax is the smaller one; and who counts from 0 to 360
            return [int(one) for one in numbers[there]]
        there &= (boxes[:, 0] < xmax) & (boxes[:, 2] > xmin)
        return [int(one) for one in numbers[there]]

    def on(self, epsg: int, bounds: Sequence[float], shape: tuple[int, int]) -> ChipView:
        """Return what the rasters say on the pixels of a chip; where several do, the first that has a number.

        Parameters
        ----------
        epsg, bounds, shape
            As of :meth:`PixelGrid.places`.

        Raises
        ------
        PlanError
            When numbers are no classes where classes are request.
        """
        values = np.zeros(shape, dtype=np.int64 if self.is_class else np.float64)
        state, origin = np.full(shape, OUTSIDE, dtype=np.uint8), np.full(shape, -1, dtype=np.int32)
        exact = True
        for number in self.touching(epsg, bounds):
            raster = self.rasters[number]
            places = raster.grid.places(epsg, bounds, shape)
            read = self._read(raster, places, shape)
            if read is None:
                continue
            numbers, level = read
            new = level > state
            values[new], state[new], origin[new] = numbers[new], level[new], number
            exact &= places.exact
            if (state == VALID).all():
                break
        return ChipView(values, state, origin, exact)

    def _read(
        self, raster: Raster, places: PixelPlaces, shape: tuple[int, int]
    ) -> tuple[NDArray[Any], NDArray[np.uint8]] | None:
        """Return numbers of one raster and its levels at places; None where all of them lie beyond it."""
        grid = raster.grid
        rows, columns = places.rows, places.columns
        along, across = (rows >= 0) & (rows < grid.height), (columns >= 0) & (columns < grid.width)
        inside: Any = along & across
        if not inside.any():
            return None
        if rows.shape[1] == 1:  # rows and columns run along the raster's: rectangles, many times as fast
            inside = np.ix_(along[:, 0], across[0])
            row, column = rows[along[:, 0]], columns[:, across[0]]
        else:
            row, column = rows[inside], columns[inside]
        top, left = int(row.min()), int(column.min())
        window = slice(top, int(row.max()) + 1), slice(left, int(column.max()) + 1)
        numbers, valid = raster.read(*window)
        if not places.exact:
            numbers, valid = numbers[row - top, column - left], valid[row - top, column - left]
        level = np.full(shape, OUTSIDE, dtype=np.uint8)
        level[inside] = np.where(valid, VALID, INVALID)
        result = np.zeros(shape, dtype=np.int64 if self.is_class else np.float64)
        result[inside] = self._numbers(raster, np.where(valid, numbers, 0))
        return result, level

    def _numbers(self, raster: Raster, values: NDArray[Any]) -> NDArray[Any]:
        if not self.is_class or values.dtype.kind in "iub":
            return values
        whole = np.rint(values)
        if (whole != values).any():
            raise PlanError(
                f"evaluate: {raster.name}", f"the number {values[whole != values][0]:g}", "classes, whole numbers",
                "Compare measured numbers with labels that are measured: a column of floats, a band of such a kind.",
            )  # fmt: skip
        return np.asarray(whole.astype(np.int64))

    @property
    def grids(self) -> str:
        """The CRSs of the rasters, for messages."""
        return ", ".join(text(code) for code in self._bounds)
