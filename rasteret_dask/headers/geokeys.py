# SPDX-License-Identifier: Apache-2.0
"""The CRS of a TIFF's GeoKeys: a registered code as it stands, and what is written out as GDAL understands it."""

from __future__ import annotations

import struct
from functools import lru_cache

from rasteret_dask.crs import number
from rasteret_dask.errors import GridError
from rasteret_dask.headers.directories import Directory
from rasteret_dask.headers.page import UnsupportedError

__all__ = ["crs_of_keys", "geokeys"]

_KEYS, _DOUBLES, _TEXT = 34735, 34736, 34737
"""GeoKeyDirectoryTag, GeoDoubleParamsTag, GeoAsciiParamsTag (GeoTIFF 1.1, 7.1.1)."""

_USER = 32767
"""A key's value for what further keys define."""


def geokeys(ifd: Directory) -> dict[int, int]:
    """Return the GeoKeys that are single numbers (GeoTIFF 1.1, 7.1.2)."""
    words = ifd.integers(_KEYS)
    if len(words) < 4:
        return {}
    entries = (words[4 + 4 * n : 8 + 4 * n] for n in range(words[3]))
    return {e[0]: e[3] for e in entries if len(e) == 4 and e[1] == 0}


def crs_of_keys(ifd: Directory) -> int | None:
    """Return the number of a file's CRS, None where its keys name none.

    Raises
    ------
    UnsupportedError
        When neither PROJ nor GDAL makes a map of the keys.
    """
    keys = geokeys(ifd)
    code = keys.get({1: 3072, 2: 2048}.get(keys.get(1024, 0), 0), _USER)
    # units other than a code's own make it another CRS, which GDAL works out
    units = keys.get(3076, 9001) != 9001 or keys.get(2054, 9102) != 9102
    try:
        if 1024 <= code < _USER and not units:
            return number(code)
        if not keys:
            return None
        return _by_gdal(ifd.integers(_KEYS), ifd.numbers(_DOUBLES), ifd.text(_TEXT) or "")
    except GridError as error:
        raise UnsupportedError(f"{error.subject}: {error.found}") from error


@lru_cache(maxsize=256)
def _by_gdal(words: tuple[int, ...], doubles: tuple[float, ...], text: str) -> int | None:
    """Return the number of the CRS that GDAL sees in a file of one pixel with these keys, None where it sees none."""
    import rasterio  # few files need it here
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import CRSError, RasterioError
    from rasterio.io import MemoryFile
    from rasterio.session import DummySession

    try:
        with (
            rasterio.Env(DummySession()),
            MemoryFile(_one_pixel(words, doubles, text), ext=".tif") as file,
            file.open(driver="GTiff") as raster,
        ):
            crs = raster.crs
    except (CPLE_BaseError, RasterioError, CRSError) as error:
        raise UnsupportedError(f"GeoKeys of which GDAL says: {error}") from None
    return number(crs) if crs and (crs.is_projected or crs.is_geographic) else None  # a LOCAL_CS is nowhere


def _one_pixel(words: tuple[int, ...], doubles: tuple[float, ...], text: str) -> bytes:
    """Return a little-endian TIFF (TIFF 6.0, section 2) of one pixel: tags in ascending order, values behind them."""
    packed: dict[int, tuple[int, int, bytes]] = {
        code: (3, 1, struct.pack("<H", value))
        for code, value in ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1), (279, 1))
    }
    packed[273] = (4, 1, struct.pack("<I", 8))  # the pixel lies between the file's header and its directory
    packed[33550] = (12, 3, struct.pack("<3d", 1, 1, 0))
    packed[33922] = (12, 6, struct.pack("<6d", 0, 0, 0, 0, 0, 0))
    packed[_KEYS] = (3, len(words), struct.pack(f"<{len(words)}H", *words))
    if doubles:
        packed[_DOUBLES] = (12, len(doubles), struct.pack(f"<{len(doubles)}d", *doubles))
    if text:
        ascii_bytes = text.encode("latin-1", "replace") + b"\0"
        packed[_TEXT] = (2, len(ascii_bytes), ascii_bytes)
    begin = 10
    beyond = begin + 2 + 12 * len(packed) + 4
    entries, values = b"", b""
    for code in sorted(packed):
        kind, count, data = packed[code]
        field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", beyond + len(values))
        values += b"" if len(data) <= 4 else data + b"\0" * (len(data) % 2)
        entries += struct.pack("<HHI4s", code, kind, count, field)
    directory = struct.pack("<H", len(packed)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI2x", b"II", 42, begin) + directory + values
