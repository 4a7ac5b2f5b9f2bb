"""A TIFF's header, parsed by tifffile from the bytes at its beginning."""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import tifffile

from rasteret_dask.headers.page import (
    Header,
    HeaderRefusedError,
    Page,
    Transform,
    UnsupportedError,
    checked,
    reading_order,
)
from rasteret_dask.net.remote import fetch

__all__ = ["BROKEN", "FIRST", "RangeFile", "from_tiff"]

FIRST = 32 * 1024
"""Bytes of a first request: the header of nearly every COG (Landsat 15 kB, WorldCover 27 kB)."""

_CAP = 16 * 1024 * 1024  # bytes of header a file may make us fetch
_MAX_IFDS = 128
_MAGIC = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "GTiff"),
    **dict.fromkeys((b"\0\0\0\x0c", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
}
"""First four bytes -> the one GDAL driver that may open the file, whatever its name says."""
# what tifffile raises on broken or hostile bytes
BROKEN = (tifffile.TiffFileError, struct.error, ValueError, LookupError, TypeError, ArithmeticError, OSError)


class _Parsing(logging.Filter):
    """Keeps what tifffile logs of our files from the user: a broken header is hundreds of lines, and ours tells it.

    What it logs of other files, on other threads, passes as the user configured it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()
        self._log = logging.getLogger(__name__)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Take the lines that this thread makes tifffile log."""
        logging.getLogger("tifffile").addFilter(self)  # once, however often: logging may be configured anew
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is none of ours; ours goes to this module's log."""
        if not getattr(self._thread, "inside", False):
            return True
        self._log.debug("tifffile: %s", record.getMessage())
        return False


_PARSING = _Parsing()


class RangeFile(io.RawIOBase):
    """A seekable file over the first bytes of an href, which fetches more as they are asked for."""

    def __init__(self, href: str, first_bytes: int = FIRST) -> None:
        self._href = href
        first = fetch(href, 0, first_bytes)
        self.head = first.head
        self._blocks: list[tuple[int, bytes]] = [(0, bytes(first.data))]
        self._fetched = len(first.data)
        self._at = 0
        self._end = 0

    @property
    def driver(self) -> str | None:
        """GDAL's name of the format that the first four bytes tell, None for any but TIFF and JPEG 2000."""
        return _MAGIC.get(self._blocks[-1][1][:4])

    @property
    def needed(self) -> int:
        """Bytes, from the file's beginning, that one request would have had to bring; 0 where they lie apart."""
        return self._end if self._fetched >= self._end else 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to another place."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.head.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes, as far as they are there or one request brings them; return how many."""
        data = self._bytes(self._at, min(len(buffer), max(0, self.head.size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        self._end = max(self._end, self._at)
        return len(data)

    def _bytes(self, start: int, size: int) -> bytes:
        """Return some of the bytes from a place on: a buffer reads ahead, and must not cause a request for it."""
        if size == 0:
            return b""
        for at, block in self._blocks:
            if at <= start < at + len(block):
                return block[start - at : start - at + size]
        wanted = min(max(size, min(4 * self._fetched, 1024 * 1024)), self.head.size - start)
        if self._fetched + wanted > _CAP:
            raise HeaderRefusedError(f"a header of more than {_CAP >> 20} MiB")
        block = bytes(fetch(self._href, start, wanted).data)
        if not block:
            raise ValueError("the file ends before its header")
        self._fetched += len(block)
        self._blocks.insert(0, (start, block))
        return block[:size]


def from_tiff(file: RangeFile) -> Header:
    """Parse all levels; UnsupportedError or one of BROKEN where tifffile does not make sense of them."""
    with _PARSING.here(), tifffile.TiffFile(io.BufferedReader(file)) as tiff:
        ifds = list(_ifds(tiff))
        first = ifds[0]
        epsg = _epsg(first)
        transform = _transform(first)
        pages = [checked(_page(ifd, "image" if n == 0 else _kind(ifd), tiff.byteorder, transform, first))
                 for n, ifd in enumerate(ifds) if n == 0 or _kind(ifd)]  # fmt: skip
        scales, offsets = _scale_offset(first)
        return Header(
            pages=tuple(sorted(pages, key=reading_order)),
            epsg=epsg,
            nodata=_nodata(first),
            dtype=pages[0].dtype,
            samples=int(first.samplesperpixel),
            size=file.head.size,
            etag=file.head.etag,
            scales=scales,
            offsets=offsets,
        )


def _ifds(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for n in range(_MAX_IFDS):
        try:
            yield tiff.pages[n]
        except IndexError:
            if n == 0:
                raise UnsupportedError("no image in the file") from None
            return
    raise HeaderRefusedError(f"more than {_MAX_IFDS} images in one file")


def _kind(ifd: Any) -> str:
    """Return what NewSubfileType (TIFF 6.0, tag 254) says of an IFD; "": a further page, not read."""
    reduced, mask = bool(ifd.subfiletype & 1), bool(ifd.subfiletype & 4)
    return {(0, 0): "", (1, 0): "overview", (0, 1): "mask", (1, 1): "overview_mask"}[reduced, mask]


def _page(ifd: Any, kind: str, byteorder: str, transform: Transform, first: Any) -> Page:
    width, height = int(ifd.imagewidth), int(ifd.imagelength)
    if min(width, height) < 1:
        raise HeaderRefusedError(f"size {width} x {height}")
    sx, sy = first.imagewidth / width, first.imagelength / height
    a, b, c, d, e, f = transform
    tile_width = int(ifd.tilewidth) if ifd.is_tiled else width
    tile_height = int(ifd.tilelength) if ifd.is_tiled else min(int(ifd.rowsperstrip) or height, height)
    page = checked(
        Page(
            kind=kind,
            driver="GTiff",
            width=width,
            height=height,
            tile_width=tile_width,
            tile_height=tile_height,
            dtype=_dtype(ifd),
            byteorder=byteorder,
            compression=int(ifd.compression),
            predictor=int(ifd.predictor),
            planar=int(ifd.planarconfig),
            samples=int(ifd.samplesperpixel),
            transform=(a * sx, b * sy, c, d * sx, e * sy, f),
            tile_offsets=(),
            tile_byte_counts=(),
        )
    )
    if not ifd.is_tiled or not _plain_bits(ifd) or ifd.fillorder != 1:
        return page
    offsets, counts = ifd.dataoffsets, ifd.databytecounts
    due = page.tiles * (page.samples if page.planar == 2 else 1)
    if len(offsets) != due or len(counts) != due:
        raise UnsupportedError(f"{len(offsets)} tile offsets and {len(counts)} byte counts for {due} tiles")
    return checked(replace(page, tile_offsets=offsets, tile_byte_counts=counts))


def _bits(ifd: Any) -> tuple[int, ...]:
    bits = ifd.bitspersample
    return tuple(bits) if isinstance(bits, tuple) else (int(bits),)


def _plain_bits(ifd: Any) -> bool:
    bits = _bits(ifd)
    one_bit_mask = bits == (1,) and ifd.subfiletype & 4
    whole = _dtype(ifd) != "bool" and set(bits) == {8 * np.dtype(_dtype(ifd)).itemsize}
    return whole or bool(one_bit_mask)


def _dtype(ifd: Any) -> str:
    """Return the NumPy type in which GDAL gives the pixels; "bool" for masks of one bit, eight to a byte."""
    if _bits(ifd) == (1,) and ifd.subfiletype & 4:
        return "bool"
    bits = max(_bits(ifd))
    if bits > 128:
        raise HeaderRefusedError(f"{bits} bits per sample")
    size = next(n for n in (8, 16, 32, 64, 128) if bits <= n)
    kinds = ifd.sampleformat if isinstance(ifd.sampleformat, tuple) else (ifd.sampleformat,)
    match int(kinds[0]):
        case 1 | 4:
            return f"uint{size}" if size <= 64 else f"complex{size}"
        case 2:
            return f"int{size}"
        case 3:
            return f"float{max(size, 32)}"
        case 6:
            return f"complex{max(size, 64)}"
        case other:
            raise UnsupportedError(f"sample format {other}")


def _transform(ifd: Any) -> Transform:
    """Return pixel -> CRS from ModelPixelScale + ModelTiepoint or ModelTransformation (GeoTIFF 1.1, 7.1)."""
    scale = _numbers(ifd, 33550)
    tie = _numbers(ifd, 33922)
    matrix = _numbers(ifd, 34264)
    if len(scale) >= 2 and scale[0] and scale[1] and len(tie) >= 6:
        a, b, d, e = scale[0], 0.0, 0.0, -abs(scale[1])
        c, f = tie[3] - tie[0] * a, tie[4] - tie[1] * e
    elif len(matrix) == 16:
        a, b, c, d, e, f = matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7]
    else:
        raise UnsupportedError(
            "ground control points instead of a geotransform" if len(tie) > 6 else "no geotransform"
        )
    if _geokeys(ifd).get(1025) == 2:  # RasterPixelIsPoint: the tiepoint is the centre of a pixel
        c, f = c - 0.5 * (a + b), f - 0.5 * (d + e)
    if not np.all(np.isfinite((a, b, c, d, e, f))) or a * e - b * d == 0:
        raise UnsupportedError(f"no invertible geotransform: {(a, b, c, d, e, f)}")
    return a, b, c, d, e, f


def _numbers(ifd: Any, tag: int) -> tuple[float, ...]:
    value = ifd.tags.valueof(tag)
    return tuple(map(float, value)) if isinstance(value, tuple) else ()


def _geokeys(ifd: Any) -> dict[int, int]:
    """Return the GeoKeys that are single numbers (GeoTIFF 1.1, 7.1.2)."""
    words = ifd.tags.valueof(34735)
    if not isinstance(words, tuple) or len(words) < 4:
        return {}
    entries = (words[4 + 4 * n : 8 + 4 * n] for n in range(words[3]))
    return {int(e[0]): int(e[3]) for e in entries if len(e) == 4 and e[1] == 0}


def _epsg(ifd: Any) -> int:
    keys = _geokeys(ifd)
    code = keys.get({1: 3072, 2: 2048}.get(keys.get(1024, 0), 0), 32767)
    # units other than a code's own make it another CRS, which GDAL works out
    units = keys.get(3076, 9001) != 9001 or keys.get(2054, 9102) != 9102
    if not 1024 <= code < 32767 or units:
        raise UnsupportedError("no EPSG code")
    return code


def _nodata(ifd: Any) -> float | None:
    text = ifd.tags.valueof(42113)
    return _number(text.strip("\0 \n")) if isinstance(text, str) else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return float("nan") if "nan" in str(text).lower() else None


def _scale_offset(ifd: Any) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Return scale and offset of each band from the GDAL_METADATA tag."""
    text = ifd.tags.valueof(42112)
    if not isinstance(text, str) or "<!" in text:  # no document types: they can expand without bound
        return (), ()
    try:
        items = ElementTree.fromstring(text.strip("\0 \n")).findall("Item")
    except ElementTree.ParseError:
        return (), ()
    found: dict[str, list[float | None]] = {}
    for item in items:
        sample = item.get("sample", "0")
        role = item.get("role", "")
        if role in ("scale", "offset") and sample.isdigit() and int(sample) < ifd.samplesperpixel:
            values = found.setdefault(role, [None] * int(ifd.samplesperpixel))
            values[int(sample)] = _number(item.text)
    return tuple(found.get("scale", ())), tuple(found.get("offset", ()))
