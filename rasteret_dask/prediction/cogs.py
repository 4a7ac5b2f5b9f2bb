# SPDX-License-Identifier: Apache-2.0
"""Pixels of a map become Cloud Optimized GeoTIFFs (COGs): blocks in memory, or whole zones in bounded memory.

- :func:`cog_bytes`: one block of a map, in memory -> the bytes of a COG;
- :func:`write_cog`: the blocks of a zone's map, in any order, one at a time -> one COG at a path or URL;
- :func:`array_blocks`: the blocks of an array that is read in parts (a Zarr array of a finished map);
- :func:`cog_note`: what a file says that it was made of.

GDAL's COG driver lays the files out: tiles of 512 x 512, deflate, internal overviews down to one tile, headers first.
Codes are stored as they are, since a predictor would make their runs longer; quantities have the predictor of their
dtype (2 for integers, 3 for floats). Overviews of codes have the most frequent valid code, those of quantities the
mean of valid pixels. Equal pixels and headers give equal bytes, however the map is cut into blocks.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rasterio import Env
from rasterio import open as open_raster
from rasterio import shutil as rasterio_shutil
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetWriter, MemoryFile
from rasterio.session import DummySession
from rasterio.windows import Window

from rasteret_dask.errors import StoreError, UnwritableStoreError
from rasteret_dask.formats import MAP_FILE
from rasteret_dask.net import remote
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.prediction.cogtiles import MapHeader, rgb, sidecar
from rasteret_dask.reader.engine import bound_gdal_cache
from rasteret_dask.reader.pixelgrid import crs_of

__all__ = ["BLOCK_PX", "Block", "array_blocks", "cog_bytes", "cog_note", "is_empty", "pad", "write_cog"]

Block: TypeAlias = "tuple[int, int, NDArray[Any]]"
"""(row, column, pixels): the map's pixel at the block's north-west corner; pixels have shape (y, x) or (band, y, x)."""

BLOCK_PX = 512
"""Side of a COG's internal tiles. Blocks of :func:`write_cog` whose edges are multiples of it are written once."""

NOTE = "RASTERET_DASK"
"""The tag that holds :attr:`~rasteret_dask.prediction.cogtiles.MapHeader.note`."""

_PIECE = 8 << 20
_STEP_PX = 4 * BLOCK_PX


class Sliced(Protocol):
    """An array that is read in parts: Zarr's, a memory map, NumPy's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (y, x) or (band, y, x)."""

    def __getitem__(self, key: Any) -> Any:
        """Return a part as a NumPy array."""


def cog_bytes(pixels: NDArray[Any], header: MapHeader) -> bytes:
    """Return one block of a map as the bytes of a COG; equal arguments give equal bytes.

    Parameters
    ----------
    pixels
        Shape (y, x) or (band, y, x), of the header's dtype; invalid pixels hold its nodata.
    header
        What the file says beside its pixels.
    """
    with _gdal("encoding a map"), MemoryFile() as plain, MemoryFile() as finished:
        with plain.open(driver="GTiff", **_profile(header)) as raster:
            _describe(raster, header)
            raster.write(_bands(pixels, header))
        rasterio_shutil.copy(plain.name, finished.name, driver="COG", **_layout(header))
        return bytes(finished.getbuffer())


def write_cog(
    url: str, header: MapHeader, blocks: Iterable[Block], scratch: str | os.PathLike[str] | None = None
) -> None:
    """Write the blocks of a map as one COG; it is there as a whole, or not at all.

    Blocks go into a temporary file, GDAL copies it into a COG beside it, and that is sent piece by piece: memory holds
    one block and GDAL's cache. Where classes have names, ``<url>.aux.xml`` is put first (see
    :func:`~rasteret_dask.prediction.cogtiles.sidecar`).

    Parameters
    ----------
    url
        A local path, or a URL of scheme s3, gs or az; what is there is replaced.
    header
        What the file says beside its pixels.
    blocks
        In any order; where there is none, pixels are nodata (0 where there is no nodata).
    scratch
        Directory for the temporary files: up to twice the map's compressed bytes. None: ``TMPDIR``.

    Raises
    ------
    UnwritableStoreError
        When the directory of temporary files is full.
    StoreError
        When the store refuses.
    """
    with tempfile.TemporaryDirectory(prefix="rasteret_dask-", dir=scratch) as folder:
        plain, finished = Path(folder, "blocks.tif"), Path(folder, "cog.tif")
        with _gdal(f"writing {remote.public(url)}", folder):
            with open_raster(plain, "w", driver="GTiff", **_profile(header), **_QUICK) as raster:
                _describe(raster, header)
                for row, column, pixels in blocks:
                    bands = _bands(pixels, header)
                    raster.write(bands, window=Window(column, row, bands.shape[2], bands.shape[1]))
            rasterio_shutil.copy(plain, finished, driver="COG", **_layout(header))
        plain.unlink()
        names = sidecar(header)
        if names is not None:
            remote.put(f"{url}.aux.xml", names)
        remote.put_stream(url, lambda: _pieces(finished))


def cog_note(url: str) -> Mapping[str, Any] | None:
    """Return what a file says that it was made of; {} of any other file, None where there is none.

    Parameters
    ----------
    url
        A local path, or a URL of scheme s3, gs or az.

    Raises
    ------
    FormatError
        When a newer version of the package wrote it.
    ReadError
        When its bytes do not come.
    """
    if not remote.exists(url):
        return None
    file = GdalFile(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # of somebody else's file
            raster = file.open("GTiff")
        text = file.call(raster.tags).get(NOTE)
        note = {} if text is None else json.loads(text)
    except (RasterioError, ValueError):
        if file.failure is not None:
            raise file.failure from None
        return {}
    finally:
        file.close()
    if not isinstance(note, dict):
        return {}
    if note:
        MAP_FILE.check(f"map {remote.redact(url)}", note)
    return note


def array_blocks(array: Sliced, step_px: int = _STEP_PX) -> Iterator[Block]:
    """Yield the blocks of an array of shape (y, x) or (band, y, x), read one after another, row by row."""
    height, width = array.shape[-2:]
    for y in range(0, height, step_px):
        for x in range(0, width, step_px):
            yield y, x, np.asarray(array[..., y : y + step_px, x : x + step_px])


def pad(pixels: NDArray[Any], header: MapHeader) -> NDArray[Any]:
    """Return pixels of the header's shape: nodata southwards and eastwards of those that are there."""
    missing = [(0, whole - part) for whole, part in zip(header.shape, pixels.shape[-2:], strict=True)]
    if not any(after for _, after in missing):
        return pixels
    before = [(0, 0)] * (pixels.ndim - 2)
    return np.pad(pixels, [*before, *missing], constant_values=header.numpy_nodata)


def is_empty(pixels: NDArray[Any], header: MapHeader) -> bool:
    """Tell whether no pixel is valid, so that a file of a grid of them need not be written."""
    if header.nodata is None:
        return False
    return bool(np.all(np.isnan(pixels) if np.isnan(header.nodata) else pixels == header.numpy_nodata))


_QUICK = {"compress": "deflate", "zlevel": 1, "sparse_ok": True}


def _profile(header: MapHeader) -> dict[str, Any]:
    return {
        "height": header.shape[0], "width": header.shape[1], "count": len(header.bands), "dtype": header.dtype,
        "crs": crs_of(header.crs), "transform": header.affine, "nodata": header.nodata, "tiled": True,
        "blockxsize": BLOCK_PX, "blockysize": BLOCK_PX, "bigtiff": "if_safer", "interleave": "band",
        "photometric": "palette" if header.palette else "minisblack",
    }  # fmt: skip


def _layout(header: MapHeader) -> dict[str, Any]:
    """Return the options of GDAL's COG driver."""
    codes = header.kind == "classes"
    return {
        "compress": "DEFLATE", "predictor": "NO" if codes else "YES", "blocksize": BLOCK_PX, "bigtiff": "IF_SAFER",
        "overviews": "IGNORE_EXISTING", "overview_resampling": "MODE" if codes else "AVERAGE", "num_threads": 1,
        "statistics": "NO",
    }  # fmt: skip


def _describe(raster: DatasetWriter, header: MapHeader) -> None:
    if header.note is not None:
        raster.update_tags(**{NOTE: header.note})
    if header.palette:
        clear = {} if header.nodata is None else {int(header.nodata): (0, 0, 0, 0)}
        raster.write_colormap(1, {code: rgb(colour) for code, colour in header.palette.items()} | clear)
    own = [header.classes] if header.kind == "classes" else [(one,) for one in header.classes]
    for number, title in enumerate(header.bands, 1):
        raster.set_band_description(number, title)
        for classes in own[number - 1 : number]:
            raster.update_tags(number, **{f"CLASS_{code}": name for code, name in classes})


def _bands(pixels: NDArray[Any], header: MapHeader) -> NDArray[Any]:
    bands = pixels if pixels.ndim == 3 else pixels[None]
    if bands.dtype != header.dtype or len(bands) != len(header.bands):
        raise ValueError(
            f"pixels of {bands.dtype}, {len(bands)} bands, for a file of {header.dtype}, {len(header.bands)} bands"
        )
    return bands


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


@contextmanager
def _gdal(subject: str, folder: str | None = None) -> Iterator[None]:
    """Run GDAL without credentials and sidecars of its own; its errors, which do not unpickle, become ours."""
    bound_gdal_cache()
    failure: StoreError | None = None
    try:
        with Env(session=DummySession(), GDAL_PAM_ENABLED="NO", GDAL_NUM_THREADS="1"):
            yield
    except (RasterioError, CPLE_BaseError) as error:
        text = " ".join(str(error.__cause__ or error).split())[:300]
        failure = _failure(subject, text, folder)
    if failure is not None:
        raise failure


def _failure(subject: str, text: str, folder: str | None) -> StoreError:
    if folder is None:
        return StoreError(subject, f"an error of GDAL, {text}")
    free = shutil.disk_usage(folder).free
    return UnwritableStoreError(
        subject, f"an error of GDAL on a temporary file, {text}, with {free / 1e6:,.0f} MB free there",
        "room for twice the map", "Make room, or set TMPDIR to a directory that has it, and call it again.",
    )  # fmt: skip
