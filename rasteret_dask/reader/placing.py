# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels go to their places: straight into the output where grids are aligned, else through a warp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from rasteret_dask.crs import text
from rasteret_dask.errors import ReadError
from rasteret_dask.headers.nodata import INEXACT, Number
from rasteret_dask.reader.layout import Cut, Layouts, TilePart
from rasteret_dask.reader.levels import has_mask
from rasteret_dask.reader.pixelgrid import Rect, Window
from rasteret_dask.reader.ranges import subject
from rasteret_dask.reader.rasterfile import read_error
from rasteret_dask.reader.readplan import ReadPlan, Request
from rasteret_dask.reader.sharing import Pixels
from rasteret_dask.reader.warp import SourceBlock, valid_pixels, warp_block
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.tables import Turn
from rasteret_dask.table.records import Asset

__all__ = ["BandTile", "Block", "Clipped", "LandedTile", "Out", "PendingRead", "decoded", "place", "within"]


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
class _Source:
    """Source pixels of a window that is to be warped, rows from the north."""

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None
    """True where valid; None where the file has no mask."""


class BandTile(NamedTuple):
    """What windows need of one band of a tile that has come, rows in the file's order."""

    values: NDArray[Any]
    """Stored numbers, shape (row, col)."""
    mask: NDArray[np.bool_] | None
    """Same shape: True where the file's mask says so; None: everywhere."""
    has_nodata: bool
    """Whether some of them may be nodata or NaN."""
    span: tuple[float, float] | None
    """A least and a greatest number between which all of them lie; None: nobody has looked."""


class LandedTile:
    """What windows need of all bands of a tile that has come; nodata and masks are looked for once, not once a window.

    Parameters
    ----------
    pixels
        The tile, or a part of it.
    need
        What windows need of it.
    bands
        How many bands are going to be asked for.
    """

    def __init__(self, pixels: Pixels, need: Rect, bands: int) -> None:
        row, col = pixels.rect.row0, pixels.rect.col0
        at = (slice(need.row0 - row, need.row1 - row), slice(need.col0 - col, need.col1 - col))
        self._values = pixels.values[:, *at]
        self._mask = None if pixels.mask is None else pixels.mask[..., *at]
        self._shared = 2 * bands > len(self._values)
        """Whether one look at all bands, which lie together, is cheaper than a look at each that is wanted."""
        self._spans: dict[int | None, tuple[float, float]] = {}
        self._ended: dict[tuple[int | None, Number], bool] = {}
        self._masks: dict[tuple[int, int | None], NDArray[np.bool_] | None] = {}

    def band(self, reading: PendingRead, sample: int) -> BandTile:
        """Return one band for a reading."""
        values, mask = self._values[sample], self._seen(sample, reading.request.asset.alpha)
        if reading.request.asset.valid_range is not None:
            return BandTile(within(values, reading.request.asset), mask, reading.looks, None)
        if not reading.looks or values.dtype.kind not in "iub":
            return BandTile(values, mask, reading.looks, None)
        if reading.nodata is None or not values.size:
            return BandTile(values, mask, False, None)
        if reading.out.turn is None and values.dtype.kind != "b" and reading.nodata in _ends(values.dtype):
            return BandTile(values, mask, self._touches(sample, reading.nodata), None)
        span = self._span(sample)
        return BandTile(values, mask, bool(span[0] <= reading.nodata <= span[1]), span)

    def _span(self, sample: int) -> tuple[float, float]:
        at = None if self._shared else sample
        if at not in self._spans:
            self._spans[at] = extremes(self._values if at is None else self._values[at])
        return self._spans[at]

    def _touches(self, sample: int, end: Number) -> bool:
        """Tell whether the least or the greatest number of a dtype is among a band's: one look instead of two."""
        at = None if self._shared else sample
        if (at, end) not in self._ended:
            values = self._values if at is None else self._values[at]
            self._ended[at, end] = bool((values.max() if end > 0 else values.min()) == end)
        return self._ended[at, end]

    def _seen(self, sample: int, alpha: int | None) -> NDArray[np.bool_] | None:
        """Return where the file's mask and its alpha channel call pixels valid; None: everywhere."""
        mask = self._mask if self._mask is None or self._mask.ndim == 2 else self._mask[sample]
        key = (0 if mask is self._mask else sample, alpha)
        if key not in self._masks:
            if alpha is not None and len(self._values) > 1:  # all bands lie in the tile
                opaque = self._values[alpha] != 0
                mask = opaque if mask is None else mask & opaque
            self._masks[key] = None if mask is None or mask.all() else mask
        return self._masks[key]


@dataclass(slots=True)
class PendingRead:
    """One request on its way: its plan, where its pixels go, and how many tiles are still to come."""

    request: Request
    plan: ReadPlan
    out: Out
    blocks: list[_Source] = field(default_factory=list)
    """Per window, the source pixels that are to be warped; none where pixels are copied."""
    pending: int = 0
    masked: bool = field(init=False)
    """Whether more than nodata may say which pixels are valid."""
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.masked = has_mask(self.request.asset)

    @property
    def nodata(self) -> Number | None:
        """The number that stands for nothing."""
        return self.request.asset.nodata

    @property
    def source_bytes(self) -> int:
        """Bytes of the source pixels that are to be warped."""
        if not self.bent:
            return 0
        size = np.dtype(self.request.asset.dtype).itemsize + int(self.masked)
        return sum(height * width for height, width in (rect.shape for rect in self.plan.rects)) * size

    def split(self, nbytes: int, layouts: Layouts) -> Iterator[PendingRead]:
        """Yield the reading in parts of some windows, whose source pixels fit; one window is the least."""
        windows = len(self.request.windows)
        most = max(1, windows * nbytes // max(self.source_bytes, 1))
        if most >= windows:
            yield self
            return
        for at in range(0, windows, most):
            some = slice(at, at + most)
            request, plan = layouts.part(self.request, self.plan, some)
            yield PendingRead(request, plan, self.out.part(some))

    @property
    def bent(self) -> bool:
        """Whether pixels are resampled, not copied."""
        return self.plan.corner is None

    @property
    def looks(self) -> bool:
        """Whether nodata is looked for as tiles come; without a mask a warp finds it by itself."""
        return not self.bent or self.masked

    def absent(self, need: Rect) -> BandTile:
        """Return the pixels of a tile that is not in the file: nodata, or zeros where the file has none."""
        absent = np.dtype(self.request.asset.dtype).type(0 if self.nodata is None else self.nodata)
        return BandTile(
            np.broadcast_to(absent, need.shape), None, self.nodata is not None and self.looks, None
        )

    def void(self, part: TilePart) -> None:
        """Make every window's part of a tile invalid that cannot be read."""
        for number, _, at in part.cuts:
            if self.out.lost is not None:
                self.out.lost.add(self.out.first + number)
            if not self.bent:
                values = self.out.values[number][at]
                _mark(self.out.valid[number][at], np.zeros(values.shape, np.bool_), self.out.shares(number))
            else:
                source = self.blocks[number]
                values = source.values[at]
                with self._lock:
                    if source.valid is None and self.nodata is None and values.dtype.kind not in "fc":
                        source.valid = np.ones(source.values.shape, np.bool_)
                if source.valid is not None:
                    source.valid[at] = False
            values[...] = self._empty(values.dtype)

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
                values, valid = self._warped(
                    SourceBlock(target.values, target.valid, rect, self.nodata), window
                )
                if request.decode is None:
                    marked = self._store(i, _WHOLE, out.values[i], values, valid)
                elif out.turn is not None:
                    marked = self._note(i, _WHOLE, *out.turn.write_decoded(out.values[i], values, valid))
                else:
                    out.values[i][...], marked = values, valid
                _mark(out.valid[i], marked, out.shares(i))
        except (RasterioError, CPLE_BaseError) as error:
            doing = f"warping it to {text(request.grid.epsg)}"
            remedy = "Check the record's CRS and the grid's bounds."
            failure = read_error(request.asset, doing, error, "a transformation GDAL can do", remedy)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # a frame that holds its own error is a cycle, and this one leads to the output
        self.blocks.clear()

    def _warped(self, source: SourceBlock, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values and validity of one window, of the source pixels gathered for it."""
        request = self.request
        if request.decode is not None:
            known = valid_pixels(source.values, source.nodata)
            source = SourceBlock(decoded(request, source.values, known), source.mask, source.rect, np.nan)
        self._check_exact(source)
        return warp_block(source, self.plan, request.grid, window)

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
        windows, plan, out = self.request.windows, self.plan, self.out
        if plan.corner is None:
            for rect in plan.rects:
                mask = np.zeros(rect.shape, dtype=np.bool_) if self.masked else None
                self.blocks.append(_Source(np.empty(rect.shape, self.request.asset.dtype), mask))
            return
        for i in plan.beyond:
            window, rect = windows[i], plan.rects[i]
            inside = np.zeros((window.height, window.width), dtype=np.bool_)
            row, col = window.row - plan.corner[0], window.col - plan.corner[1]
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

    def copies(self, tile: BandTile) -> bool:
        """Tell whether a band's pixels go to the output as they stand, and all of them are valid."""
        as_stored = self.out.turn is None and self.request.decode is None and not self.bent
        return as_stored and tile.mask is None and not tile.has_nodata

    def put(self, cut: Cut, tile: BandTile) -> NDArray[np.bool_] | None:
        """Put a window's part of a band to its place in the output, or into a block that is going to be warped.

        Returns
        -------
        numpy.ndarray or None
            Where its pixels are valid, rows from the north; None: everywhere, or nobody has looked.
        """
        number, inside, at = cut
        values, known = tile.values[inside], None if tile.mask is None else tile.mask[inside]
        if tile.has_nodata:
            numbers = valid_pixels(values, self.nodata)
            known = numbers if known is None else known & numbers
        if known is not None and known.all():
            known = None
        if self.plan.frame.flipped:
            values, known = values[::-1], None if known is None else known[::-1]
        if self.bent:
            self._gather(number, at, values, known)
            return known
        place = self.out.values[number][at]
        plain = self.out.turn is None and self.request.decode is None and values.dtype.kind in "iub"
        if plain and tile.mask is None and self.nodata == self.out.fill:  # what is invalid holds the fill
            place[...] = values
            return known
        return self._store(number, at, place, values, known, tile.span)

    def _gather(
        self, number: int, at: tuple[slice, slice], values: NDArray[Any], valid: NDArray[np.bool_] | None
    ) -> None:
        """Put stored numbers into a block that is going to be warped."""
        source = self.blocks[number]
        source.values[at] = values
        if source.valid is not None:
            if not self.looks:  # its validity was made because another tile cannot be read
                valid = valid_pixels(values, self.nodata)
            source.valid[at] = True if valid is None else valid
        elif values.dtype.kind in "fc" and self.nodata is not None:
            # or NaN, and other spellings of FLT_MAX, would spread through the kernel
            source.values[at][~valid_pixels(values, self.nodata)] = self.nodata

    def _store(
        self,
        number: int,
        at: tuple[slice, slice],
        place: NDArray[Any],
        values: NDArray[Any],
        valid: NDArray[np.bool_] | None,
        span: tuple[float, float] | None = None,
    ) -> NDArray[np.bool_] | None:
        """Write stored numbers in the output's terms to a part of a window; return where they are valid, None: all."""
        if self.out.turn is not None:
            return self._note(number, at, *self.out.turn.write(place, values, valid, span))
        if self.request.decode is not None:
            place[...] = decoded(self.request, values, valid)
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


def decoded(request: Request, values: NDArray[Any], valid: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return values decoded before their kernel, NaN where invalid (None: nowhere)."""
    assert request.decode is not None
    asset = request.asset
    numbers = request.decode.decode(values, Radiometry(asset.scale, asset.offset, asset.rule))
    if valid is not None and not valid.all():
        numbers[~valid] = np.nan
    return numbers


@cache
def _ends(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and the greatest number of an integer type."""
    kind = np.iinfo(dtype)
    return int(kind.min), int(kind.max)


def within(values: NDArray[Any], asset: Asset) -> NDArray[Any]:
    """Return stored numbers with nodata for those beyond the asset's valid range."""
    if asset.valid_range is None or asset.nodata is None:  # all numbers of the type lie in the range
        return values
    least, most = asset.valid_range
    return np.where((values < least) | (values > most), values.dtype.type(asset.nodata), values)


def extremes(values: NDArray[Any]) -> tuple[float, float]:
    """Return the least and the greatest number: a fraction of the price of comparing all with nodata."""
    return values.min(), values.max()


_COMMON = Lock()
"""Held while shared validity is narrowed: bands of one chip come on several threads."""


def _renew() -> None:
    global _COMMON
    _COMMON = Lock()


os.register_at_fork(after_in_child=_renew)


def place(readings: Sequence[PendingRead], part: TilePart, tiles: Sequence[BandTile]) -> None:
    """Put what windows take of a tile to its places: window by window, all bands of each.

    Parameters
    ----------
    readings
        Bands that are read for the same windows.
    part
        What the windows take.
    tiles
        Per reading, its band.

    Notes
    -----
    Bands that lie together in a tile are taken from the same lines of memory, so the window is the outer loop. Bands
    that share a window's validity narrow it together, once.
    """
    plain: list[tuple[Out, NDArray[Any]]] = []
    others: list[tuple[PendingRead, BandTile]] = []
    for reading, tile in zip(readings, tiles, strict=True):
        if reading.copies(tile):
            plain.append((reading.out, tile.values))
        else:
            others.append((reading, tile))
    flipped = readings[0].plan.frame.flipped
    for cut in part.cuts:
        number, inside, at = cut
        for out, values in plain:  # most of a job's pieces: 64 bands of embeddings for each chip
            out.values[number][at] = values[inside][::-1] if flipped else values[inside]
            if not out.shares(number):
                out.valid[number][at] = True
        narrowed: dict[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
        for reading, tile in others:
            known = reading.put(cut, tile)
            if reading.bent:
                continue
            valid = reading.out.valid[number]
            if not reading.out.shares(number):
                valid[at] = True if known is None else known
            elif known is not None:
                before = narrowed.get(id(valid))
                narrowed[id(valid)] = valid, known if before is None else before[1] & known
        for valid, known in narrowed.values():
            _mark(valid[at], known, common=True)


def _mark(valid: NDArray[np.bool_], part: NDArray[np.bool_] | None, common: bool) -> None:
    """Note which pixels are valid; None: all."""
    if not common:
        valid[...] = True if part is None else part
    elif part is not None and not part.all():
        with _COMMON:
            np.logical_and(valid, part, out=valid)
