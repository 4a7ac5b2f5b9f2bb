# SPDX-License-Identifier: Apache-2.0
"""The reading engine behind stackstac's public ``reader=`` protocol."""

from __future__ import annotations

import inspect
import json
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioIOError

from rasteret_dask.errors import GridError, RasteretDaskError, ReadError
from rasteret_dask.net.remote import is_local
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.reader.placing import Block
from rasteret_dask.reader.plainhref import HEADERS, assets_at
from rasteret_dask.reader.readplan import Request, tiles_of
from rasteret_dask.rules.units import Unit
from rasteret_dask.table.records import Asset

__all__ = ["NATURAL", "AssetHref", "CogReader", "Kernel", "ValidityReader", "grid_of", "named_by_text"]

AHEAD_BYTES = 64 * 2**20
"""Pixels, and their validity, that one read may fetch for those after it."""

_STATUS = re.compile(r"(?:\(|or |status code: )([45]\d\d)\b")
"""The store's answer in what a ReadError found: ``nothing there (404)``, ``access denied (401 or 403)``."""


class Kernel(NamedTuple):
    """How pixels are brought onto a grid that is not their own."""

    resampling: str | None = None
    """GDAL's name; None: by the band's kind."""
    decode: Unit | None = None
    """Decodes the stored numbers before; see Request."""

    def __str__(self) -> str:
        unit = None if self.decode is None else json.dumps(self.decode.to_json(), sort_keys=True)
        return f"{self.resampling}, {unit}"


NATURAL = Kernel()


class AssetHref(str):
    """An href that carries the asset it names, cached header and all, through stackstac's asset table."""

    asset: Asset
    kernel: Kernel
    """Used in place of the kernel that stackstac gives."""

    def __new__(cls, asset: Asset, kernel: Kernel) -> AssetHref:
        """Make the href of one asset."""
        # Text decides Dask's token of the table, so it tells apart whatever reads other pixels.
        parts = [
            asset.band_index,
            asset.size,
            asset.etag,
            asset.dtype,
            asset.nodata,
            asset.alpha,
            asset.kind,
            kernel,
        ]
        if kernel.decode is not None:
            parts += [asset.scale, asset.offset]
        read = "/".join(str(part) for part in parts)
        return cls._of(f"{asset.href}#{asset.record_id}/{asset.band}/{read}", asset, kernel)

    @classmethod
    def _of(cls, text: str, asset: Asset, kernel: Kernel) -> AssetHref:
        self = super().__new__(cls, text)
        self.asset, self.kernel = asset, kernel
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if _BY_TEXT.get():
            return str, (str(self),)
        # with its text: the source of a unit's methods, which is in it, may not be readable where this is opened
        return AssetHref._of, (str(self), self.asset, self.kernel)


_BY_TEXT = ContextVar("_BY_TEXT", default=False)


@contextmanager
def named_by_text() -> Iterator[None]:
    """Let Dask make tokens of hrefs by their text, which tells apart what is read: not by all that a header says."""
    token = _BY_TEXT.set(True)
    try:
        yield
    finally:
        _BY_TEXT.reset(token)


class CogReader:
    """Reads the assets of any ``stackstac.stack`` with this package's engine: give the class as ``reader=``.

    Other than stackstac's own reader it asks for a file's header once per process, has all requests of a read in
    flight together, and reads the assets of one Dask chunk in one batch. So let a chunk hold several of them, as
    ``chunksize=(-1, -1, 1024, 1024)`` does.

    Pixels are those of stackstac's own reader, bit for bit, where grids are aligned and for the nearest kernel
    within one CRS; but NaN counts as nodata. Elsewhere they are GDAL's, true to 1e-6 pixel, so that they do not
    depend on chunks; kernels other than nearest take overviews as ``gdalwarp`` does.

    Parameters
    ----------
    url
        A local path, or a URL of scheme file, http, https, s3, gs or az; credentials come from the environment.
        ``vrt://<one of these>?bands=<n>`` names band n, from 1, of a file of several. Other VRT text, GDAL's
        virtual file systems and addresses of cloud metadata are refused. Local paths are taken from any item:
        know where yours come from.
    spec
        stackstac's RasterSpec: the grid.
    resampling
        The kernel where grids are not aligned.
    dtype
        Of the result. On their way into integers numbers are rounded and clamped, as GDAL does.
    fill_value
        What pixels hold that are nodata, NaN, masked, transparent (alpha 0), or outside the raster.
    scale_offset
        The others become ``value * scale + offset``.
    gdal_env
        Without effect: the engine does not read through GDAL but for what only GDAL can (JPEG 2000, strips, LERC,
        ...), with settings of its own.
    errors_as_nodata
        Exceptions whose types and texts, regular expressions matched from the start, name errors that become a
        warning and a block of ``fill_value``. An error of this package is compared as itself, and as the
        ``RasterioIOError`` that users of stackstac know: ``HTTP response code: 404`` (stackstac's default) and
        the like for what a store refuses, else the text of what was found.

    Raises
    ------
    ReadError
        By :meth:`read`, when a header or pixels cannot be read, also of files without a CRS, and of
        files of several bands none of which is named.
    TrustError
        By :meth:`read`, when the URL is one of those refused.

    Examples
    --------
    >>> import pystac
    >>> import stackstac
    >>> scenes = pystac.Collection.from_file("demo/world/sentinel-2-l2a/collection.json").get_items()
    >>> cube = stackstac.stack(
    ...     [item.make_asset_hrefs_absolute() for item in scenes], assets=["red", "nir"], epsg=32633, resolution=10,
    ...     rescale=False, chunksize=(-1, -1, 1024, 1024), reader=rd.CogReader,
    ... )
    >>> cube.dims, cube[0, :, :4, :4].compute().shape
    (('time', 'band', 'y', 'x'), (2, 4, 4))
    """

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Resampling,
        dtype: Any,
        fill_value: Any,
        scale_offset: tuple[float, float],
        gdal_env: Any = None,
        errors_as_nodata: tuple[Exception, ...] = (),
    ) -> None:
        self.url = url
        self.dtype = np.dtype(dtype)
        self.fill_value = fill_value
        self.scale_offset = scale_offset
        self.errors_as_nodata = errors_as_nodata
        frame = inspect.currentframe()
        self._chunk = _chunk_of(frame.f_back if frame else None, grid_of(spec), resampling)
        self._index = self._chunk.add(url)

    def read(self, window: Any) -> NDArray[Any]:
        """Return the pixels of one window of the grid.

        Parameters
        ----------
        window
            rasterio's Window, of whole pixels, counted from the grid's north-west corner.

        Returns
        -------
        numpy.ndarray
            Shape (y, x), of the reader's dtype.

        Examples
        --------
        >>> import pystac
        >>> import stackstac
        >>> scenes = pystac.Collection.from_file("demo/world/sentinel-2-l2a/collection.json").get_items()
        >>> item = next(scenes).make_asset_hrefs_absolute()
        >>> cube = stackstac.stack([item], ["red"], epsg=32633, resolution=10, rescale=False, reader=rd.CogReader)
        >>> cube[0, 0, :2, :2].compute().shape  # one window is read
        (2, 2)
        """
        block = self._block(_whole(window))
        if block is None:
            return np.full((int(window.height), int(window.width)), self.fill_value, self.dtype)
        scale, offset = self.scale_offset
        with np.errstate(over="ignore", invalid="ignore"):  # in pixels that are not valid
            values = _cast(block.values[0], self.dtype)
            if scale != 1:
                values *= scale
            if offset != 0:
                values += offset
        if not block.valid.all():
            values[~block.valid[0]] = self.fill_value
        return values

    def _block(self, window: Window) -> Block | None:
        """Return the pixels of a window; None where an error stands for nodata."""
        _making.last = None
        try:
            return self._chunk.read(self._index, window)
        except RasteretDaskError as error:
            if not any(_matches(face, self.errors_as_nodata) for face in _faces(error, self.url)):
                raise
            warnings.warn(f"Read as nodata: {error}", stacklevel=3)
            return None

    def close(self) -> None:
        """Drop the pixels that were read ahead for this reader; no file is kept open.

        Examples
        --------
        >>> import pystac
        >>> import stackstac
        >>> scenes = pystac.Collection.from_file("demo/world/sentinel-2-l2a/collection.json").get_items()
        >>> item = next(scenes).make_asset_hrefs_absolute()
        >>> cube = stackstac.stack([item], ["red"], epsg=32633, resolution=10, rescale=False, reader=rd.CogReader)
        >>> mean = float(cube.mean())  # stackstac opens, reads and closes
        """
        self._chunk.drop(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class ValidityReader(CogReader):
    """Reads where the pixels of :class:`CogReader` are valid: 1, else the fill value.

    For types that have no number to spare for what is invalid.
    """

    def read(self, window: Any) -> NDArray[Any]:
        """Return the validity of one window of the grid; shape (y, x), of the reader's dtype."""
        validity = np.full((int(window.height), int(window.width)), self.fill_value, self.dtype)
        block = self._block(_whole(window))
        if block is not None:
            validity[block.valid[0]] = 1
        return validity


def grid_of(spec: Any) -> Grid:
    """Return the pixel grid of a stackstac RasterSpec."""
    xmin, _, _, ymax = spec.bounds
    xres, yres = spec.resolutions_xy
    return Grid(spec.epsg, float(xmin), float(ymax), float(xres), float(yres))


class _Promise(NamedTuple):
    """A window of one asset that a thread has read ahead, or is reading."""

    thread: int
    block: Future[Block | None]
    """None where the batch failed."""


class _Chunk:
    """The assets of one chunk of stackstac's asset table.

    stackstac calls ``read`` of one after the other, with one window. The first reads for those after it; each
    takes what is its own, and what is not taken goes when the thread that read it reads another window.
    """

    def __init__(self, grid: Grid, resampling: str) -> None:
        self.grid = grid
        self.resampling = resampling
        self.urls: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._assets = {i: url.asset for i, url in enumerate(self.urls) if isinstance(url, AssetHref)}
        self._asked = False
        self._asking = threading.Lock()
        self._ahead: dict[tuple[int, Window], _Promise] = {}
        self._taking = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"grid": self.grid, "resampling": self.resampling, "urls": self.urls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def add(self, url: str) -> int:
        """Return the number of a further asset."""
        index = len(self.urls)
        self.urls.append(url)
        if isinstance(url, AssetHref):
            self._assets[index] = url.asset
        return index

    def drop(self, index: int) -> None:
        """Forget what was read ahead of one asset."""
        with self._taking:
            self._ahead = {key: promise for key, promise in self._ahead.items() if key[0] != index}

    def read(self, index: int, window: Window) -> Block:
        """Return one window of one asset: as it was read ahead, else read now, ahead for the assets after it."""
        with self._taking:
            promise = self._ahead.pop((index, window), None)
        block = promise.block.result() if promise is not None else self._read_batch(index, window)
        return block if block is not None else self._read_alone(index, window)

    def _read_alone(self, index: int, window: Window) -> Block:
        asset = self._asset(index)
        try:
            with Session() as session:
                return session.read_block([self._request(index, asset, window)])[0]
        except ReadError:
            if not isinstance(self.urls[index], AssetHref):
                # perhaps the file has changed since: another attempt asks for its header anew
                self._assets.pop(index, None)
                HEADERS.forget(asset.href)
            raise

    def _read_batch(self, index: int, window: Window) -> Block | None:
        """Return the window, and promise that of the following assets; None where any fails or there is none."""
        own = self._request(index, self._asset(index), window)
        following = self._following(index, window)
        thread = threading.get_ident()
        with self._taking:
            others = {key: promise for key, promise in self._ahead.items() if promise.thread != thread}
            mine = {key: _Promise(thread, Future()) for key in following if key not in others}
            self._ahead = others | mine
        if not mine:
            return None
        blocks: Sequence[Block | None] = [None] * (1 + len(mine))
        try:
            with Session() as session:
                blocks = session.read_block([own, *(following[key] for key in mine)])
        except RasteretDaskError:
            pass  # of any of them: each reads again for itself, and meets none but its own error
        finally:
            for promise, block in zip(mine.values(), blocks[1:], strict=True):
                promise.block.set_result(block)
        return blocks[0]

    def _following(self, index: int, window: Window) -> dict[tuple[int, Window], Request]:
        """Return requests for the next assets that the window touches, as many as may be read ahead."""
        found, nbytes = {}, 0
        for i in range(index + 1, len(self.urls)):
            asset = self._assets.get(i)
            if asset is None:
                continue  # its header cannot be read, which its own read says
            try:
                request = self._request(i, asset, window)
                touched = tiles_of(request)[1]
            except RasteretDaskError:
                continue  # likewise: PROJ cannot bring its pixels here, for instance
            if touched:
                nbytes += window.height * window.width * (np.dtype(asset.dtype).itemsize + 1)
                if nbytes > AHEAD_BYTES:
                    break
                found[i, window] = request
        return found

    def _request(self, index: int, asset: Asset, window: Window) -> Request:
        url = self.urls[index]
        kernel = url.kernel if isinstance(url, AssetHref) else Kernel(self.resampling)
        return Request(asset, self.grid, (window,), *kernel)

    def _asset(self, index: int) -> Asset:
        """Return an asset; whoever comes first asks for the headers of all."""
        with self._asking:
            if index not in self._assets:
                wanted = (
                    [index] if self._asked else [i for i in range(len(self.urls)) if i not in self._assets]
                )
                self._asked = True
                found = dict(zip(wanted, assets_at([self.urls[i] for i in wanted]), strict=True))
                self._assets |= {i: asset for i, asset in found.items() if isinstance(asset, Asset)}
                own = found[index]
                if not isinstance(own, Asset):
                    raise own
            return self._assets[index]


_making = threading.local()


def _chunk_of(caller: FrameType | None, grid: Grid, resampling: Resampling) -> _Chunk:
    """Return the chunk that a reader belongs to: readers made by the same call of a function share one.

    stackstac makes the readers of a chunk of its asset table in one call, but tells them nothing of each other,
    and the next call may make those of another chunk. The frame is held until this thread makes another chunk or
    reads, so that no other call can be taken for it.
    """
    last: tuple[FrameType, _Chunk] | None = getattr(_making, "last", None)
    if (
        last is not None
        and last[0] is caller
        and (last[1].grid, last[1].resampling) == (grid, resampling.name)
    ):
        return last[1]
    chunk = _Chunk(grid, resampling.name)
    _making.last = None if caller is None else (caller, chunk)
    return chunk


def _whole(window: Any) -> Window:
    """Return rasterio's window as ours."""
    parts = window.row_off, window.col_off, window.height, window.width
    if any(part != int(part) for part in parts):
        raise GridError("reading a window", repr(window), "whole pixels")
    return Window(*map(int, parts))


def _cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert numbers as GDAL does: into integers they are rounded, half away from zero, and clamped; NaN is 0."""
    if dtype.kind not in "iu" or np.can_cast(values.dtype, dtype):
        return values.astype(dtype, copy=False)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if values.dtype.kind in "iu":
        own = np.iinfo(values.dtype)
        return values.clip(max(low, own.min), min(high, own.max)).astype(dtype)
    exact = np.nan_to_num(values.astype(np.float64), nan=0.0)
    rounded = np.trunc(exact + np.copysign(0.5, exact))
    top = float(high) if int(float(high)) == high else np.nextafter(float(high), 0.0)  # 2**63 - 1 is no float
    return np.asarray(rounded.clip(float(low), top).astype(dtype))


def _faces(error: RasteretDaskError, url: str) -> Iterator[Exception]:
    """Yield an error as itself, then as rasterio would have raised it."""
    yield error
    href = url.asset.href if isinstance(url, AssetHref) else url
    codes = [] if is_local(href.removeprefix("vrt://")) else _STATUS.findall(error.found)
    yield from (RasterioIOError(f"HTTP response code: {code}") for code in codes)
    if isinstance(error, ReadError):
        yield RasterioIOError(error.found)


def _matches(error: Exception, patterns: Sequence[Exception]) -> bool:
    return any(isinstance(error, type(p)) and re.match(str(p), str(error)) for p in patterns)
