"""Decoded pixels go to their places: straight into the output where grids are aligned, else through a warp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from rasteret_dask.errors import ReadError
from rasteret_dask.headers.nodata import INEXACT, Number
from rasteret_dask.reader.levels import flipped, has_mask
from rasteret_dask.reader.pixelgrid import Rect
from rasteret_dask.reader.ranges import subject
from rasteret_dask.reader.rasterfile import read_error
from rasteret_dask.reader.readplan import ReadPlan, Request, plan_read
from rasteret_dask.reader.sharing import Pixels
from rasteret_dask.reader.warp import SourceBlock, valid_pixels, warp_block
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.tables import Turn

__all__ = ["Block", "Clipped", "Out", "PendingRead"]


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
    """What an invalid pixel holds; None: anything."""
    turn: Turn | None = None
    """Turns stored numbers into what the output holds; None: as they stand."""
    common: Sequence[bool] = ()
    """Per window: whether several requests share its ``valid``, which is True at first and stays so where all of
    them are valid. By default none does."""

    lost: set[int] | None = None
    """Takes the numbers of windows of which a part could not be read."""
    clipped: list[Clipped] | None = None
    """Takes what was clipped."""
    first: int = 0
    """Number of the first window, where this is a part of an Out."""

    def part(self, some: slice) -> Out:
        """Return some windows."""
        common = self.common[some] if self.common else ()
        first = self.first + some.start
        return Out(
            self.values[some], self.valid[some], self.fill, self.turn, common, self.lost, self.clipped, first
        )

    def shares(self, window: int) -> bool:
        """Tell whether a window's validity is shared."""
        return bool(self.common) and self.common[window]


class Clipped(NamedTuple):
    """Valid pixels of one window that were outside of what the output can hold."""

    window: int
    rows: slice
    cols: slice
    pixels: NDArray[np.bool_]
    """Shape (rows, cols)."""


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
    nodata: Number | None
    blocks: list[_Target] = field(default_factory=list)
    """Per window, the source pixels that are to be warped; none where pixels are copied."""
    pending: int = 0
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def planned(cls, request: Request, out: Out) -> PendingRead:
        """Plan a request."""
        return cls(request, plan_read(request), out, request.asset.nodata)

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
        alpha = self.request.asset.alpha
        if alpha is not None and len(pixels.values) > 1:  # all bands lie in the tile
            seen = pixels.values[alpha, rows, cols] != 0
            mask = seen if mask is None else mask & seen
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
                    decoded = _decoded(request, source.values, known)
                    source = SourceBlock(decoded, source.mask, rect, np.nan)
                self._check_exact(source)
                values, valid = warp_block(source, plan, request.grid, window)
                if request.decode is None:
                    marked = self._store(i, _WHOLE, out.values[i], values, valid)
                elif out.turn is not None:
                    marked = self._note(i, _WHOLE, *out.turn.write_decoded(out.values[i], values, valid))
                else:
                    out.values[i][...], marked = values, valid
                _mark(out.valid[i], marked, out.shares(i))
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

    def _check_exact(self, source: SourceBlock) -> None:
        """Raise a ReadError where a kernel would weigh integers that a double does not hold."""
        if source.values.dtype.name not in INEXACT or self.plan.kernel == "nearest":
            return
        valid = valid_pixels(source.values, source.nodata)
        numbers = source.values[valid if source.mask is None else valid & source.mask]
        if numbers.size and (numbers.max() > 2**53 or numbers.min() < -(2**53)):
            raise ReadError(
                subject(self.request.asset, f"resampling it by {self.plan.kernel}"),
                f"{source.values.dtype} numbers beyond 2**53, which it would round",
                "numbers that a double holds",
                "Use harmonize(resampling='nearest'), or the grid of the file.",
            )

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
        if not self.bent:
            plain = self.out.turn is None and self.request.decode is None and values.dtype.kind in "iub"
            holds = plain and mask is None and self.nodata == self.out.fill  # what is invalid holds the fill
            if holds:
                target.values[at] = values
            else:
                known = self._store(number, at, target.values[at], values, known)
        if target.valid is not None:
            _mark(target.valid[at], known, target.common)
        if not self.bent:
            return
        target.values[at] = values
        if target.valid is None and values.dtype.kind in "fc" and self.nodata is not None:
            # or NaN, and other spellings of FLT_MAX, would spread through the kernel
            target.values[at][~valid_pixels(values, self.nodata)] = self.nodata

    def _store(
        self,
        number: int,
        at: tuple[slice, slice],
        place: NDArray[Any],
        values: NDArray[Any],
        valid: NDArray[np.bool_] | None,
    ) -> NDArray[np.bool_] | None:
        """Write stored numbers in the output's terms to a part of a window; return where they are valid, None: all."""
        if self.out.turn is not None:
            return self._note(number, at, *self.out.turn.write(place, values, valid))
        if self.request.decode is not None:
            place[...] = _decoded(self.request, values, valid)
            return valid
        place[...] = values
        if self.out.fill is not None and valid is not None:
            np.copyto(place, place.dtype.type(self.out.fill), where=~valid)
        return valid

    def _note(
        self,
        number: int,
        at: tuple[slice, slice],
        valid: NDArray[np.bool_] | None,
        clipped: NDArray[np.bool_] | None,
    ) -> NDArray[np.bool_] | None:
        """Note what of a part of a window was clipped; return where it is valid."""
        if clipped is not None and self.out.clipped is not None:
            self.out.clipped.append(Clipped(self.out.first + number, *at, clipped))
        return valid


_WHOLE = np.s_[:, :]


def _decoded(request: Request, values: NDArray[Any], valid: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return values decoded before their kernel, NaN where invalid (None: nowhere)."""
    assert request.decode is not None
    asset = request.asset
    decoded = request.decode.decode(values, Radiometry(asset.scale, asset.offset, asset.rule))
    if valid is not None and not valid.all():
        decoded[~valid] = np.nan
    return decoded


_COMMON = Lock()
"""Held while shared validity is narrowed: bands of one chip come on several threads."""


def _renew() -> None:
    global _COMMON
    _COMMON = Lock()


os.register_at_fork(after_in_child=_renew)


def _known(
    values: NDArray[Any], nodata: Number | None, mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """Return where stored numbers are valid; None: everywhere."""
    if values.dtype.kind in "iub" and not _reaches(values, nodata):
        return mask
    known = valid_pixels(values, nodata)
    return known if mask is None else known & mask


def _reaches(values: NDArray[Any], number: Number | None) -> bool:
    """Tell whether a number lies between the least and the greatest value: a fraction of the price of comparing all."""
    return number is not None and values.size > 0 and bool(values.min() <= number <= values.max())


def _mark(valid: NDArray[np.bool_], known: NDArray[np.bool_] | None, common: bool) -> None:
    """Note which pixels are valid; None: all."""
    if not common:
        valid[...] = True if known is None else known
    elif known is not None and not known.all():
        with _COMMON:
            np.logical_and(valid, known, out=valid)
