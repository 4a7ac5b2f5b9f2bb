# SPDX-License-Identifier: Apache-2.0
"""Opens one level of one file through rasterio and reads its tiles, or says plainly why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from math import hypot
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from affine import Affine
from rasterio import Env
from rasterio import open as open_raster
from rasterio import windows as rasterio_windows
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.session import DummySession

from rasteret_dask.crs import number, same, text
from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.headers.gdal import placement_of
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.limits import BUDGET
from rasteret_dask.net.remote import SCHEMES, is_local, local_path, public, redact
from rasteret_dask.reader.levels import has_file_mask, is_chunky, tile_rect
from rasteret_dask.reader.ranges import check, subject
from rasteret_dask.reader.sharing import Pixels
from rasteret_dask.table.records import Asset

T = TypeVar("T")

__all__ = ["RasterFile", "gdal_env", "read_error"]

DRIVERS = ("GTiff", "JP2OpenJPEG")
"""The only drivers a cached header may name: never VRT, which opens other files. Only the one named is tried."""

SAME_PLACE_PX = 0.01
"""Corners this close are the same place: items round their transforms."""

MAX_TILE_BYTES = 256 * 2**20


class RasterFile:
    """One level of one file, opened once; hold ``lock`` while using it, and be inside :func:`gdal_env`.

    Parameters
    ----------
    asset
        Any band of the file.
    level
        Index into ``asset.levels``.

    Raises
    ------
    ReadError
        On :meth:`open`, when the file cannot be opened or is not the one whose header was cached.
    """

    def __init__(self, asset: Asset, level: int) -> None:
        self.lock = Lock()
        self.level = asset.levels[level]
        self.masked = has_file_mask(asset)
        self.chunky = is_chunky(self.level)
        self._asset = asset
        self._overview = level - 1
        self._dataset: DatasetReader | None = None
        self._remote: GdalFile | None = None

    def open(self) -> bool:
        """Open the file unless it is open; return whether it had to be."""
        if self._dataset is not None:
            return False
        asset = self._asset
        options = {"OVERVIEW_LEVEL": self._overview} if self._overview >= 0 else {}
        self._check_header()
        path = _checked_path(asset)
        check(asset)
        failure: ReadError | None = None
        try:
            if path is None:
                self._remote = GdalFile(asset.href)
                dataset = self._remote.open(self.level.driver, **options)
            else:
                dataset = open_raster(path, driver=self.level.driver, **options)
        except (RasterioError, OSError) as error:
            remedy = "Check that it exists and that this worker may read it."
            failure = self._failure("opening it", error, f"a {self.level.driver} file", remedy)
            self.close()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # a frame that holds its own error is a cycle
        if asset.placement is not None:
            self._dataset = dataset
            if placement_of(dataset) != asset.placement:
                self.close()
                raise _changed(asset, f"a file that is not {asset.placement}", "one, as in its cached header")
            return True
        if (dataset.width, dataset.height) != (self.level.width, self.level.height):
            found = f"{dataset.width} x {dataset.height} pixels"
            self._dataset = dataset
            self.close()
            raise _changed(asset, found, f"{self.level.width} x {self.level.height}, as in its cached header")
        self._dataset = dataset
        if not asset.described:
            self._check_place(dataset)
        return True

    def _check_place(self, dataset: DatasetReader) -> None:
        """Compare where the file lies with what its item says, as nobody has read its header before."""
        asset, level = self._asset, self.level
        found, due, crs = dataset.transform, Affine(*level.transform), dataset.crs
        corners = np.array([[0, 0, 1], [level.width, level.height, 1]])
        shift = corners @ (np.array(found) - np.array(due)).reshape(3, 3)[:2].T
        pixel = hypot(due.a, due.d), hypot(due.b, due.e)
        if np.all(np.abs(shift) <= SAME_PLACE_PX * np.array(pixel)) and (
            not crs or same(number(crs), asset.epsg)
        ):
            return
        self.close()
        raise ReadError(
            subject(asset, "comparing the place that its item says with the file's"),
            f"{_placed(found)} in {_named(crs)} in the file",
            f"{_placed(due)} in {text(asset.epsg)}, as the item says",
            "Build the table with headers=True, which takes the file's own place, or correct proj:transform and "
            "proj:code of the item.",
        )

    def read(self, tile: int, asset: Asset) -> Pixels:
        """Read one tile: all samples of a chunky file, else the band of ``asset``.

        Parameters
        ----------
        tile
            Its number, row by row.
        asset
            The band wanted, or one of them; named in messages.
        """
        rect = tile_rect(self.level, tile)
        (height, width), dtype = rect.shape, np.dtype(asset.dtype)
        window = rasterio_windows.Window(rect.col0, rect.row0, width, height)
        dataset = self._dataset
        if dataset is None:
            raise ValueError("the file is not open")
        self._check_band(dataset, asset)
        indexes = list(range(1, dataset.count + 1)) if self.chunky else [asset.band_index + 1]
        failure: ReadError | None = None
        with BUDGET.hold(len(indexes) * height * width * dtype.itemsize):
            try:
                values = self._call(lambda: dataset.read(indexes, window=window))
                mask = self._call(lambda: self._mask(dataset, indexes, window, asset))
            except (RasterioError, OSError) as error:
                where = f"reading tile {tile} ({width} x {height} pixels at row {rect.row0}, col {rect.col0})"
                remedy = "Try again; if it stays so, leave the record out or index it anew."
                failure = self._failure(where, error, "its pixels", remedy, asset)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # a frame that holds its own error is a cycle
        return Pixels(values, mask, rect)

    def warped(self, read: Callable[[DatasetReader], T], doing: str) -> T:
        """Return what a function makes of the open dataset; what GDAL says against it becomes a ReadError."""
        dataset = self._dataset
        if dataset is None:
            raise ValueError("the file is not open")
        self._check_band(dataset, self._asset)
        failure: ReadError | None = None
        try:
            return self._call(lambda: read(dataset))
        except (RasterioError, CPLE_BaseError, OSError) as error:
            failure = self._failure(
                doing, error, "a transformation GDAL can do", "Check where the file lies."
            )
        try:
            raise failure
        finally:
            del failure  # a frame that holds its own error is a cycle

    def _mask(self, dataset: DatasetReader, indexes: list[int], window: Any, asset: Asset) -> Any:
        """Return where the file's masks, and an alpha channel that lies apart, call pixels valid; None: no say."""
        mask = dataset.read_masks(indexes, window=window) != 0 if self.masked else None
        if (
            asset.alpha is None or self.chunky
        ):  # where bands lie together, whoever takes one looks at the alpha
            return mask
        seen = dataset.read(asset.alpha + 1, window=window) != 0
        return seen if mask is None else mask & seen

    def close(self) -> None:
        """Close the file if it is open."""
        if self._dataset is not None:
            self._call(self._dataset.close)
            self._dataset = None
        if self._remote is not None:
            self._remote.close()
            self._remote = None

    def _call(self, function: Callable[[], T]) -> T:
        return function() if self._remote is None else self._remote.call(function)

    def _failure(
        self, doing: str, error: Exception, expected: str, remedy: str, asset: Asset | None = None
    ) -> ReadError:
        """Return the error for what GDAL said, or for what kept it from its bytes."""
        behind = None if self._remote is None else self._remote.failure
        if isinstance(behind, ReadError | TrustError):
            return ReadError(
                subject(asset or self._asset, doing),
                behind.found,
                behind.expected or expected,
                behind.remedy or remedy,
            )
        return read_error(asset or self._asset, doing, error, expected, remedy)

    def _check_band(self, dataset: DatasetReader, asset: Asset) -> None:
        if asset.band_index >= dataset.count:
            raise _changed(asset, f"{dataset.count} bands", f"band {asset.band_index + 1}, counted from 1")
        if np.dtype(dataset.dtypes[asset.band_index]) != np.dtype(asset.dtype):
            raise _changed(asset, f"dtype {dataset.dtypes[asset.band_index]}", asset.dtype)

    def _check_header(self) -> None:
        level = self.level
        if level.driver not in DRIVERS:
            raise ReadError(
                subject(self._asset, "opening it"),
                f"driver {level.driver!r}",
                f"one of {', '.join(DRIVERS)}",
            )
        nbytes = level.tile_width * level.tile_height * np.dtype(self._asset.dtype).itemsize
        nbytes *= level.samples if self.chunky else 1
        if nbytes > MAX_TILE_BYTES:
            raise ReadError(
                subject(self._asset, "opening it"),
                f"tiles of {level.tile_width} x {level.tile_height} pixels, {nbytes / 2**20:.0f} MiB each",
                f"tiles of at most {MAX_TILE_BYTES // 2**20} MiB",
                "Convert the file to a cloud-optimized GeoTIFF.",
            )


def _placed(transform: Affine) -> str:
    """Return where a raster begins, and the size of its pixels."""
    if transform.is_identity:
        return "no geotransform"
    t = transform
    return f"north-west corner ({t.c:.10g}, {t.f:.10g}), pixels of {hypot(t.a, t.d):.10g} x {hypot(t.b, t.e):.10g}"


def _named(crs: CRS | None) -> str:
    return text(number(crs)) if crs else "no CRS"


def gdal_env(href: str) -> Env:
    """Return the GDAL settings for reading a href; they hold for the thread that enters them.

    Remote files have no sidecars; local folders are not listed, but sidecars (``.aux.xml``) are still looked for. GDAL
    has no threads of its own: ours read many files at once, and only ours can call back for bytes.
    """
    remote = not is_local(href)
    folders = "EMPTY_DIR" if remote else "TRUE"
    return Env(session=DummySession(), GDAL_DISABLE_READDIR_ON_OPEN=folders, GDAL_NUM_THREADS="1")


def _checked_path(asset: Asset) -> str | None:
    """Return the path of a local file, None for a remote one.

    Raises
    ------
    ReadError
        For schemes other than file, http, https, s3, gs and az, and for GDAL's own virtual paths.
    """
    href = asset.href
    scheme = urlsplit(href).scheme.lower()
    if scheme in SCHEMES:
        return None
    if scheme == "file" or (
        "://" not in href and not href.startswith("/vsi") and not href.lstrip().startswith("<")
    ):
        return local_path(href)
    raise ReadError(
        subject(asset, "opening it"),
        f"scheme {scheme!r}" if scheme else "a virtual path",
        "a local path, file://, http(s)://, s3://, gs:// or az://",
    )


def read_error(asset: Asset, doing: str, error: Exception, expected: str, remedy: str) -> ReadError:
    """Return the error for a failed read of an asset, without what must stay secret.

    Raise it outside of the ``except`` block: what rasterio chains to its own errors (``CPLE_AppDefinedError``) can
    be pickled but not unpickled, so an error that carries it along never reaches the client.
    """
    said = _redacted(str(error.__cause__ or error), asset.href)  # rasterio's own: "see previous exception"
    failure = ReadError(subject(asset, doing), said, expected, remedy)
    failure.__cause__ = RasterioIOError(said)
    return failure


def _changed(asset: Asset, difference: str, expected: str) -> ReadError:
    remedy = "The file has changed since it was indexed: build its record anew."
    return ReadError(subject(asset, "opening it"), difference, expected, remedy)


def _redacted(text: str, href: str) -> str:
    parts = urlsplit(href)
    text = text.replace(href, public(href))
    user = parts.netloc.rpartition("@")[0]
    for secret in (f"{user}@" if user else "", f"?{parts.query}" if parts.query else "", parts.query):
        text = text.replace(secret, "") if secret else text
    return redact(text)
