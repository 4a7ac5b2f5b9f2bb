"""Decoded pixels go to their places: straight into the output where grids are aligned, else through a warp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from rasteret_dask.bands import Radiometry
from rasteret_dask.errors import ReadError
from rasteret_dask.harmonize import dequantize, to_float
from rasteret_dask.rasterfile import read_error
from rasteret_dask.readplan import Frame, ReadPlan, Rect, Request, has_mask, nodata_of, plan_read
from rasteret_dask.sharing import Pixels
from rasteret_dask.warp import SourceBlock, valid_pixels, warp_block

__all__ = ["Block", "Out", "Piece", "Reading"]


@dataclass(slots=True)
class Block:
    """The pixels of one request."""

    values: NDArray[Any]
    """Shape (window, y, x), the asset's dtype: kernels of integer bands are rounded to it, as GDAL does; float32
    where the request decodes. What stands where ``valid`` is False means nothing."""
    valid: NDArray[np.bool_]
    """Shape (window, y, x). True where the raster covers the pixel, which is neither nodata, NaN nor masked."""

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


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tile that lies in a target."""

    target: _Target
    source: Rect
    """Rows in the file's order."""
    at: tuple[slice, slice]


@dataclass(slots=True)
class Reading:
    """One request on its way: its plan, where its pixels go, and how many tiles are still to come."""

    request: Request
    plan: ReadPlan
    out: Out
    nodata: float | None
    targets: list[_Target]
    pending: int = 0
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def start(cls, request: Request, out: Out) -> Reading:
        """Plan a request and prepare what tiles are pasted into."""
        reading = cls(request, plan_read(request), out, nodata_of(request.asset), [])
        reading._prepare()
        return reading

    @property
    def bent(self) -> bool:
        """Whether pixels are resampled, not copied."""
        return self.plan.corner is None

    def piece(self, number: int, tile: Rect) -> Piece | None:
        """Return the part of a tile that the window of this number wants; None where there is none."""
        frame, target = self.plan.frame, self.targets[number]
        rect = flipped(tile, frame)
        height, width = target.values.shape
        row0, row1 = max(rect.row0, target.row), min(rect.row1, target.row + height)
        col0, col1 = max(rect.col0, target.col), min(rect.col1, target.col + width)
        if row0 >= row1 or col0 >= col1:
            return None
        at = np.s_[row0 - target.row : row1 - target.row, col0 - target.col : col1 - target.col]
        return Piece(target, flipped(Rect(row0, row1, col0, col1), frame), at)

    def paste(self, piece: Piece, pixels: Pixels, sample: int) -> None:
        """Copy a piece to its place, turned northwards, with its validity."""
        own, rect = piece.source, pixels.rect
        rows = slice(own.row0 - rect.row0, own.row1 - rect.row0)
        cols = slice(own.col0 - rect.col0, own.col1 - rect.col0)
        values, mask = pixels.values[sample, rows, cols], pixels.mask
        if mask is not None:
            mask = mask[rows, cols] if mask.ndim == 2 else mask[sample, rows, cols]
        if self.plan.frame.flipped:
            values, mask = values[::-1], None if mask is None else mask[::-1]
        if self.bent:
            self._gather(piece, values, mask)
        else:
            self._put(piece, values, mask)

    def absent(self, piece: Piece) -> None:
        """Fill a piece whose tile is not in the file: nodata, or zeros where the file has none."""
        dtype = np.dtype(self.request.asset.dtype)
        values = np.full(piece.source.shape, 0 if self.nodata is None else self.nodata, dtype)
        if self.bent:
            self._gather(piece, values, None)
        else:
            self._put(piece, values, None)

    def void(self, piece: Piece) -> None:
        """Make a piece invalid whose tile cannot be read."""
        target = piece.target
        with self._lock:
            if target.valid is None and self.nodata is None and target.values.dtype.kind not in "fc":
                target.valid = np.ones(target.values.shape, np.bool_)
        if target.valid is not None:
            _mark(target.valid[piece.at], np.zeros(piece.source.shape, np.bool_), target.common)
        target.values[piece.at] = self._empty(target.values.dtype)

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
                zip(request.windows, plan.rects, self.targets, strict=True)
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
            raise failure
        self.targets.clear()

    def _prepare(self) -> None:
        """Make one target a window: its own place in the output, or a block of source pixels to warp."""
        asset, plan, out = self.request.asset, self.plan, self.out
        for i, (window, rect) in enumerate(zip(self.request.windows, plan.rects, strict=True)):
            if plan.corner is None:
                mask = np.zeros(rect.shape, dtype=np.bool_) if has_mask(asset) else None
                values = np.empty(rect.shape, asset.dtype)
                self.targets.append(_Target(values, mask, rect.row0, rect.col0))
                continue
            row, col = window.row - plan.corner[0], window.col - plan.corner[1]
            self.targets.append(_Target(out.values[i], out.valid[i], row, col, out.shares(i)))
            if rect.shape != (window.height, window.width):
                inside = np.zeros((window.height, window.width), dtype=np.bool_)
                inside[rect.row0 - row : rect.row1 - row, rect.col0 - col : rect.col1 - col] = not rect.empty
                out.values[i][...] = self._empty(out.values[i].dtype)
                _mark(out.valid[i], inside, out.shares(i))

    def _empty(self, dtype: np.dtype[Any]) -> Any:
        """Return what a pixel holds that is not there to read."""
        if not self.bent and self.out.fill is not None:
            return dtype.type(self.out.fill)
        if self.nodata is not None and dtype == np.dtype(self.request.asset.dtype):
            return dtype.type(self.nodata)
        return dtype.type(np.nan if dtype.kind in "fc" else 0)

    def _gather(self, piece: Piece, values: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        """Put stored numbers into a block that is going to be warped."""
        target = piece.target
        place = target.values[piece.at]
        place[...] = values
        if target.valid is not None:
            known = valid_pixels(values, self.nodata)
            target.valid[piece.at] = known if mask is None else known & mask
        elif values.dtype.kind in "fc" and self.nodata is not None:
            place[np.isnan(values)] = self.nodata  # or NaN would spread through the kernel

    def _put(self, piece: Piece, values: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        """Put stored numbers to their place in the output."""
        known = None
        if self.nodata is not None or values.dtype.kind not in "iub":
            known = valid_pixels(values, self.nodata)
        if mask is not None:
            known = mask if known is None else known & mask
        assert piece.target.valid is not None
        _mark(piece.target.valid[piece.at], known, piece.target.common)
        plain = self.out.rule is None and self.request.decode is None and values.dtype.kind in "iub"
        if plain and mask is None and self.nodata == self.out.fill:
            known = None  # what is invalid holds the fill already
        self._store(piece.target.values[piece.at], values, known)

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


def _mark(valid: NDArray[np.bool_], known: NDArray[np.bool_] | None, common: bool) -> None:
    """Note which pixels are valid; None: all."""
    if not common:
        valid[...] = True if known is None else known
    elif known is not None and not known.all():
        with _COMMON:
            np.logical_and(valid, known, out=valid)


def flipped(rect: Rect, frame: Frame) -> Rect:
    """Turn a rectangle between rows from the north and rows in the file's order."""
    if not frame.flipped:
        return rect
    return Rect(frame.height - rect.row1, frame.height - rect.row0, rect.col0, rect.col1)
