"""Decoded pixels go to their places: straight into the output where grids are aligned, else through a warp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from rasteret_dask.catalogs.bands import Radiometry
from rasteret_dask.errors import ReadError
from rasteret_dask.reader.harmonize import dequantize, to_float
from rasteret_dask.reader.levels import flipped, has_mask, nodata_of
from rasteret_dask.reader.pixelgrid import Rect
from rasteret_dask.reader.rasterfile import read_error
from rasteret_dask.reader.readplan import ReadPlan, Request, plan_read
from rasteret_dask.reader.sharing import Pixels
from rasteret_dask.reader.warp import SourceBlock, valid_pixels, warp_block

__all__ = ["Block", "Out", "PendingRead"]


@dataclass(slots=True)
class Block:
    """The pixels of one request."""

    values: NDArray[Any]
    """Shape (window, y, x), the asset's dtype: kernels of integer bands are rounded to it, as GDAL does; float32
    where the request decodes. What stands where ``valid`` is False means nothing."""
    valid: NDArray[np.bool_]
    """Shape (window, y, x). True where the raster covers the pixel, which is neither nodata, NaN nor masked."""

    lost: set[int] = field(default_factory=set)
    """Numbers of windows of which a part could not be read; only where such tiles are masked."""

    def out(self) -> Out:
        """Return the block as the place where its pixels go."""
        return Out(list(self.values), list(self.valid), None, lost=self.lost)

    @classmethod
    def empty(cls, request: Request) -> Block:
        """Make a block for a request."""
        first = request.windows[0]
        shape = (len(request.windows), first.height, first.width)
        dtype = np.dtype(request.asset.dtype if request.decode is None else np.float32)
        return cls(np.empty(shape, dtype), np.empty(shape, np.bool_))


@dataclass(frozen=True, slots=True)
class Out:
    """Memory that a request's pixels go to; every pixel of it is written."""

    values: Sequence[NDArray[Any]]
    """Per window, shape (y, x)."""
    valid: Sequence[NDArray[np.bool_]]
    """Per window, shape (y, x)."""
    fill: float | None
    """What an invalid pixel holds; None: anything. Float values that are decoded or scaled hold NaN."""
    rule: Radiometry | None = None
    """Turns stored numbers into float32; None: as they stand."""
    common: Sequence[bool] = ()
    """Per window: whether several requests share its ``valid``, which is True at first and stays so where all of
    them are valid. By default none does."""

    lost: set[int] | None = None
    """Takes the numbers of windows of which a part could not be read."""
    first: int = 0
    """Number of the first window, where this is a part of an Out."""

    def part(self, some: slice) -> Out:
        """Return some windows."""
        common = self.common[some] if self.common else ()
        first = self.first + some.start
        return Out(self.values[some], self.valid[some], self.fill, self.rule, common, self.lost, first)

    def shares(self, window: int) -> bool:
        """Tell whether a window's validity is shared."""
        return bool(self.common) and self.common[window]


@dataclass(slots=True)
class _Target:
    """An array that tiles are pasted into; its first pixel is (row, col) of the level, rows from the north."""

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None
    """True where valid; None where the array is only to be warped and has no mask."""
    row: int
    col: int
    common: bool = False
    """Whether others narrow ``valid`` too."""

    def at(self, rect: Rect) -> tuple[slice, slice]:
        """Return where a rectangle of the level lies in the array."""
        return np.s_[rect.row0 - self.row : rect.row1 - self.row, rect.col0 - self.col : rect.col1 - self.col]


@dataclass(slots=True)
class PendingRead:
    """One request on its way: its plan, where its pixels go, and how many tiles are still to come."""

    request: Request
    plan: ReadPlan
    out: Out
    nodata: float | None
    blocks: list[_Target] = field(default_factory=list)
    """Per window, the source pixels that are to be warped; none where pixels are copied."""
    pending: int = 0
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def planned(cls, request: Request, out: Out) -> PendingRead:
        """Plan a request."""
        return cls(request, plan_read(request), out, nodata_of(request.asset))

    @property
    def source_bytes(self) -> int:
        """Bytes of the source pixels that are to be warped."""
        if not self.bent:
            return 0
        size = np.dtype(self.request.asset.dtype).itemsize + int(has_mask(self.request.asset))
        return sum(height * width for height, width in (rect.shape for rect in self.plan.rects)) * size

    def split(self, nbytes: int) -> Iterator[PendingRead]:
        """Yield the reading in parts of some windows, whose source pixels fit; one window is the least."""
        windows = len(self.request.windows)
        most = max(1, windows * nbytes // max(self.source_bytes, 1))
        if most >= windows:
            yield self
            return
        for at in range(0, windows, most):
            some = slice(at, at + most)
            request = replace(self.request, windows=self.request.windows[some])
            plan = replace(self.plan, rects=self.plan.rects[some])
            yield PendingRead(request, plan, self.out.part(some), self.nodata)

    @property
    def bent(self) -> bool:
        """Whether pixels are resampled, not copied."""
        return self.plan.corner is None

    def need(self, number: int, tile: Rect) -> Rect:
        """Return the part of a tile that the window of this number wants, rows in the file's order."""
        return flipped(self.plan.rects[number], self.plan.frame).cut(tile)

    def paste(self, number: int, tile: Rect, pixels: Pixels, sample: int) -> None:
        """Copy a window's part of a tile to its place, turned northwards, with its validity."""
        own, rect = self.need(number, tile), pixels.rect
        rows = slice(own.row0 - rect.row0, own.row1 - rect.row0)
        cols = slice(own.col0 - rect.col0, own.col1 - rect.col0)
        values, mask = pixels.values[sample, rows, cols], pixels.mask
        if mask is not None:
            mask = mask[rows, cols] if mask.ndim == 2 else mask[sample, rows, cols]
        if self.plan.frame.flipped:
            values, mask = values[::-1], None if mask is None else mask[::-1]
        self._put(number, own, values, mask)

    def absent(self, number: int, tile: Rect) -> None:
        """Fill a window's part of a tile that is not in the file: nodata, or zeros where the file has none."""
        own = self.need(number, tile)
        absent = 0 if self.nodata is None else self.nodata
        self._put(number, own, np.full(own.shape, absent, self.request.asset.dtype), None)

    def void(self, number: int, tile: Rect) -> None:
        """Make a window's part of a tile invalid that cannot be read."""
        if self.out.lost is not None:
            self.out.lost.add(self.out.first + number)
        own, target = self.need(number, tile), self._target(number)
        at = target.at(flipped(own, self.plan.frame))
        with self._lock:
            if target.valid is None and self.nodata is None and target.values.dtype.kind not in "fc":
                target.valid = np.ones(target.values.shape, np.bool_)
        if target.valid is not None:
            _mark(target.valid[at], np.zeros(own.shape, np.bool_), target.common)
        target.values[at] = self._empty(target.values.dtype)

    def landed(self) -> bool:
        """Note that a tile has come, or will not; return whether it was the last."""
        with self._lock:
            self.pending -= 1
            return self.pending == 0

    def finish(self) -> None:
        """Warp the gathered pixels, window by window, into their places.

        Raises
        ------
        ReadError
            When GDAL has no transformation between the two grids.
        """
        request, plan, out = self.request, self.plan, self.out
        failure: ReadError | None = None
        try:
            for i, (window, rect, target) in enumerate(
                zip(request.windows, plan.rects, self.blocks, strict=True)
            ):
                source = SourceBlock(target.values, target.valid, rect, self.nodata)
                if request.decode is not None:
                    known = valid_pixels(source.values, source.nodata)
                    source = SourceBlock(dequantize(source.values, known), source.mask, rect, np.nan)
                values, valid = warp_block(source, plan, request.grid, window)
                _mark(out.valid[i], valid, out.shares(i))
                if request.decode is not None:
                    out.values[i][...] = values
                else:
                    self._store(out.values[i], values, valid)
        except (RasterioError, CPLE_BaseError) as error:
            doing = f"warping it to EPSG:{request.grid.epsg}"
            remedy = "Check the record's CRS and the grid's bounds."
            failure = read_error(request.asset, doing, error, "a transformation GDAL can do", remedy)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # a frame that holds its own error is a cycle, and this one leads to the output
        self.blocks.clear()

    def prepare(self) -> None:
        """Make a block of source pixels a window to be warped; else note what of it lies outside of the raster."""
        asset, plan, out = self.request.asset, self.plan, self.out
        for i, (window, rect) in enumerate(zip(self.request.windows, plan.rects, strict=True)):
            if self.bent:
                mask = np.zeros(rect.shape, dtype=np.bool_) if has_mask(asset) else None
                self.blocks.append(_Target(np.empty(rect.shape, asset.dtype), mask, rect.row0, rect.col0))
            elif rect.shape != (window.height, window.width):
                inside = np.zeros((window.height, window.width), dtype=np.bool_)
                inside[self._target(i).at(rect)] = not rect.empty
                out.values[i][...] = self._empty(out.values[i].dtype)
                _mark(out.valid[i], inside, out.shares(i))

    def _target(self, number: int) -> _Target:
        if self.plan.corner is None:
            return self.blocks[number]
        window, out, (row, col) = self.request.windows[number], self.out, self.plan.corner
        return _Target(
            out.values[number], out.valid[number], window.row - row, window.col - col, out.shares(number)
        )

    def _empty(self, dtype: np.dtype[Any]) -> Any:
        """Return what a pixel holds that is not there to read."""
        if not self.bent and self.out.fill is not None:
            return dtype.type(self.out.fill)
        if self.nodata is not None and dtype == np.dtype(self.request.asset.dtype):
            return dtype.type(self.nodata)
        return dtype.type(np.nan if dtype.kind in "fc" else 0)

    def _put(self, number: int, own: Rect, values: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        """Put stored numbers to their place in the output, or into a block that is going to be warped."""
        target = self._target(number)
        at = target.at(flipped(own, self.plan.frame))
        known = mask
        if not self.bent or target.valid is not None:
            known = _known(values, self.nodata, mask)
        if target.valid is not None:
            _mark(target.valid[at], known, target.common)
        if not self.bent:
            plain = self.out.rule is None and self.request.decode is None and values.dtype.kind in "iub"
            holds = plain and mask is None and self.nodata == self.out.fill  # what is invalid holds the fill
            self._store(target.values[at], values, None if holds else known)
            return
        target.values[at] = values
        if target.valid is None and values.dtype.kind in "fc" and self.nodata is not None:
            target.values[at][np.isnan(values)] = self.nodata  # or NaN would spread through the kernel

    def _store(self, place: NDArray[Any], values: NDArray[Any], valid: NDArray[np.bool_] | None) -> None:
        """Write values in the output's terms; ``valid`` None: none of them has to become the fill."""
        if self.request.decode is not None:
            place[...] = dequantize(values, valid)
        elif self.out.rule is not None:
            place[...] = to_float(values, valid, self.out.rule)
        else:
            place[...] = values
            if self.out.fill is not None and valid is not None:
                np.copyto(place, place.dtype.type(self.out.fill), where=~valid)


_COMMON = Lock()
"""Held while shared validity is narrowed: bands of one chip come on several threads."""


def _renew() -> None:
    global _COMMON
    _COMMON = Lock()


os.register_at_fork(after_in_child=_renew)


def _known(
    values: NDArray[Any], nodata: float | None, mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """Return where stored numbers are valid; None: everywhere."""
    if values.dtype.kind in "iub" and not _reaches(values, nodata):
        return mask
    known = valid_pixels(values, nodata)
    return known if mask is None else known & mask


def _reaches(values: NDArray[Any], number: float | None) -> bool:
    """Tell whether a number lies between the least and the greatest value: a fraction of the price of comparing all."""
    return number is not None and values.size > 0 and bool(values.min() <= number <= values.max())


def _mark(valid: NDArray[np.bool_], known: NDArray[np.bool_] | None, common: bool) -> None:
    """Note which pixels are valid; None: all."""
    if not common:
        valid[...] = True if known is None else known
    elif known is not None and not known.all():
        with _COMMON:
            np.logical_and(valid, known, out=valid)
