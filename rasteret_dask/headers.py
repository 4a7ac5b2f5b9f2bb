"""COG headers, parsed once, concurrently."""

from __future__ import annotations

import io
import os
import struct
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import rasterio
import tifffile
from rasterio.enums import MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RasterioIOError

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.remote import fetch, is_local, redact

__all__ = ["Header", "read_headers"]

_FIRST = 64 * 1024  # bytes of the first request; holds the header of nearly every COG
_CAP = 16 * 1024 * 1024  # bytes of header a file may make us fetch
_MAX_TILE = 256 * 1024 * 1024  # bytes of a decoded tile
_MAX_TILES = 10_000_000
_MAX_IFDS = 128
_MAX_SAMPLES = 65_535
_MAGIC = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "GTiff"),
    **dict.fromkeys((b"\0\0\0\x0c", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
}
"""First four bytes -> the one GDAL driver that may open the file, whatever its name says."""
# what tifffile raises on broken or hostile bytes
_BROKEN = (tifffile.TiffFileError, struct.error, ValueError, LookupError, TypeError, ArithmeticError, OSError)

Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class _Page:
    """One level of a file, with the tile tables of all its bands."""

    kind: str
    driver: str
    width: int
    height: int
    tile_width: int
    tile_height: int
    dtype: str
    byteorder: str
    compression: int
    predictor: int
    planar: int
    samples: int
    transform: Transform
    tile_offsets: tuple[int, ...]
    tile_byte_counts: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """Tiles of one plane."""
        return -(-self.width // self.tile_width) * -(-self.height // self.tile_height)

    def level(self, band_index: int) -> dict[str, Any]:
        """Return the fields of ``records.LEVEL_TYPE`` for one band."""
        own = slice(None)
        if self.planar == 2 and self.samples > 1:
            own = slice(band_index * self.tiles, (band_index + 1) * self.tiles)
        fields = {name: getattr(self, name) for name in _Page.__slots__}
        fields["tile_offsets"] = self.tile_offsets[own]
        fields["tile_byte_counts"] = self.tile_byte_counts[own]
        return fields


@dataclass(frozen=True, slots=True)
class Header:
    """All that reading needs to know of a file, without its pixels."""

    pages: tuple[_Page, ...]
    """The image, its overviews from fine to coarse, then masks."""
    epsg: int
    nodata: float | None
    dtype: str
    """NumPy name."""
    samples: int
    """Bands in the file."""
    size: int | None
    """Bytes of the file."""
    etag: str | None
    scales: tuple[float | None, ...] = ()
    """GDAL's scale of each band, where the file has any."""
    offsets: tuple[float | None, ...] = ()
    """GDAL's offset of each band, where the file has any."""

    def levels_of(self, band_index: int) -> tuple[dict[str, Any], ...]:
        """Return one dict per level, matching ``records.LEVEL_TYPE``, with the tile tables of one band.

        Tile tables are empty where the reader must ask GDAL: strips, JPEG 2000, odd bit depths.

        Raises
        ------
        ReadError
            When the file has fewer bands.
        """
        if not 0 <= band_index < self.samples:
            raise ReadError(
                f"band index {band_index}", f"{self.samples} bands in the file", "an index below that"
            )
        return tuple(page.level(band_index) for page in self.pages)

    def scale_of(self, band_index: int) -> float | None:
        """Return the file's own scale of a band, or None."""
        return self.scales[band_index] if band_index < len(self.scales) else None

    def offset_of(self, band_index: int) -> float | None:
        """Return the file's own offset of a band, or None."""
        return self.offsets[band_index] if band_index < len(self.offsets) else None


def read_headers(hrefs: Sequence[str], workers: int = 16) -> dict[str, Header | str]:
    """Read the header of every distinct href.

    Parameters
    ----------
    hrefs
        Local paths, or URLs of scheme file, http, https, s3, gs or az.
    workers
        Requests in flight.

    Returns
    -------
    dict
        {href: its Header, or the reason why it is unreadable}. Reasons hold no query strings or keys.
    """
    distinct = list(dict.fromkeys(hrefs))
    if not distinct:
        return {}
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, min(workers, len(distinct)))) as pool:
        # said in the reason instead; set here because catch_warnings is not safe inside threads
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return dict(zip(distinct, pool.map(_read_header, distinct), strict=True))


class _UnsupportedError(Exception):
    """The TIFF path does not serve this file; GDAL may."""


class _RefusedError(Exception):
    """The file asks for more memory than a header may."""


class _RangeFile(io.RawIOBase):
    """A seekable file over the first bytes of an href, which fetches more as they are asked for."""

    def __init__(self, href: str) -> None:
        self._href = href
        first = fetch(href, 0, _FIRST)
        self.head = first.head
        self._blocks: list[tuple[int, bytes]] = [(0, first.data)]
        self._fetched = len(first.data)
        self._at = 0

    @property
    def driver(self) -> str | None:
        """GDAL's name of the format that the first four bytes tell, None for any but TIFF and JPEG 2000."""
        return _MAGIC.get(self._blocks[-1][1][:4])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.head.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.head.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        data = self._bytes(self._at, size)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _bytes(self, start: int, size: int) -> bytes:
        if size == 0:
            return b""
        for at, block in self._blocks:
            if at <= start and start + size <= at + len(block):
                return block[start - at : start - at + size]
        wanted = min(max(size, min(self._fetched, 1024 * 1024)), self.head.size - start)
        if self._fetched + wanted > _CAP:
            raise _RefusedError(f"a header of more than {_CAP >> 20} MiB")
        block = fetch(self._href, start, wanted).data
        self._fetched += len(block)
        self._blocks.insert(0, (start, block))
        return block[:size]


def _read_header(href: str) -> Header | str:
    try:
        file = _RangeFile(href)
    except (ReadError, TrustError) as error:
        return error.found
    if file.driver is None:
        return "neither a TIFF nor a JPEG 2000 file"
    header: Header | str
    try:
        if file.driver != "GTiff":
            raise _UnsupportedError("not a TIFF file")
        header = _from_tiff(file)
    except ReadError as error:
        return error.found
    except _RefusedError as error:
        return f"refused: {error}"
    except (_UnsupportedError, *_BROKEN) as error:
        # a broken or georeferenceless TIFF may still be one to GDAL, with its sidecar files
        header = _from_gdal(href, file.driver, redact(str(error)) or type(error).__name__)
        if isinstance(header, Header):
            header = replace(header, size=file.head.size, etag=file.head.etag)
    if isinstance(header, Header):
        return _objection(header) or header
    return header


def _objection(header: Header) -> str | None:
    _, b, _, d, _, _ = header.pages[0].transform
    if b or d:
        return f"rotated: transform {header.pages[0].transform}; only north-up and south-up grids are served"
    return None


def _check(page: _Page) -> _Page:
    if min(page.width, page.height, page.tile_width, page.tile_height, page.samples) < 1:
        raise _RefusedError(f"size {page.width} x {page.height}, tile {page.tile_width} x {page.tile_height}")
    if (
        max(page.width, page.height, page.tile_width, page.tile_height) >= 2**31
        or page.samples > _MAX_SAMPLES
    ):
        raise _RefusedError(f"{page.width} x {page.height} pixels, {page.samples} bands")
    chunky = page.samples if page.planar == 1 else 1
    itemsize = np.dtype(page.dtype).itemsize
    nbytes = page.tile_width * page.tile_height * itemsize * chunky
    strip = page.driver == "GTiff" and not page.tile_offsets and page.tile_width == page.width
    if not strip and nbytes > _MAX_TILE:
        raise _RefusedError(f"tiles of {nbytes / 2**20:.0f} MiB; at most {_MAX_TILE >> 20} MiB")
    if page.tiles * (page.samples if page.planar == 2 else 1) > _MAX_TILES:
        raise _RefusedError(f"more than {_MAX_TILES:,} tiles")
    return page


# --- TIFF, by tifffile -------------------------------------------------------------------------------------


def _from_tiff(file: _RangeFile) -> Header:
    with tifffile.TiffFile(io.BufferedReader(file)) as tiff:
        ifds = list(_ifds(tiff))
        first = ifds[0]
        epsg = _epsg(first)
        transform = _transform(first)
        pages = [_check(_page(ifd, "image" if n == 0 else _kind(ifd), tiff.byteorder, transform, first))
                 for n, ifd in enumerate(ifds) if n == 0 or _kind(ifd)]  # fmt: skip
        scales, offsets = _scale_offset(first)
        return Header(
            pages=tuple(sorted(pages, key=_reading_order)),
            epsg=epsg,
            nodata=_nodata(first),
            dtype=pages[0].dtype,
            samples=int(first.samplesperpixel),
            size=file.head.size,
            etag=file.head.etag,
            scales=scales,
            offsets=offsets,
        )


def _reading_order(page: _Page) -> tuple[int, int]:
    return ("image", "overview", "mask", "overview_mask").index(page.kind), -page.width


def _ifds(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for n in range(_MAX_IFDS):
        try:
            yield tiff.pages[n]
        except IndexError:
            if n == 0:
                raise _UnsupportedError("no image in the file") from None
            return
    raise _RefusedError(f"more than {_MAX_IFDS} images in one file")


def _kind(ifd: Any) -> str:
    """Return what NewSubfileType (TIFF 6.0, tag 254) says of an IFD; "": a further page, not read."""
    reduced, mask = bool(ifd.subfiletype & 1), bool(ifd.subfiletype & 4)
    return {(0, 0): "", (1, 0): "overview", (0, 1): "mask", (1, 1): "overview_mask"}[reduced, mask]


def _page(ifd: Any, kind: str, byteorder: str, transform: Transform, first: Any) -> _Page:
    width, height = int(ifd.imagewidth), int(ifd.imagelength)
    if min(width, height) < 1:
        raise _RefusedError(f"size {width} x {height}")
    sx, sy = first.imagewidth / width, first.imagelength / height
    a, b, c, d, e, f = transform
    tile_width = int(ifd.tilewidth) if ifd.is_tiled else width
    tile_height = int(ifd.tilelength) if ifd.is_tiled else min(int(ifd.rowsperstrip) or height, height)
    page = _check(
        _Page(
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
    offsets, counts = tuple(map(int, ifd.dataoffsets)), tuple(map(int, ifd.databytecounts))
    due = page.tiles * (page.samples if page.planar == 2 else 1)
    if len(offsets) != due or len(counts) != due:
        raise _UnsupportedError(f"{len(offsets)} tile offsets and {len(counts)} byte counts for {due} tiles")
    return _check(replace(page, tile_offsets=offsets, tile_byte_counts=counts))


def _bits(ifd: Any) -> tuple[int, ...]:
    bits = ifd.bitspersample
    return tuple(bits) if isinstance(bits, tuple) else (int(bits),)


def _plain_bits(ifd: Any) -> bool:
    bits = _bits(ifd)
    one_bit_mask = bits == (1,) and ifd.subfiletype & 4
    return len(set(bits)) == 1 and (bits[0] in (8, 16, 32, 64, 128) or bool(one_bit_mask))


def _dtype(ifd: Any) -> str:
    """Return the NumPy type in which GDAL gives the pixels; "bool" for masks of one bit, eight to a byte."""
    if _bits(ifd) == (1,) and ifd.subfiletype & 4:
        return "bool"
    bits = max(_bits(ifd))
    if bits > 128:
        raise _RefusedError(f"{bits} bits per sample")
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
            raise _UnsupportedError(f"sample format {other}")


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
        raise _UnsupportedError(
            "ground control points instead of a geotransform" if len(tie) > 6 else "no geotransform"
        )
    if _geokeys(ifd).get(1025) == 2:  # RasterPixelIsPoint: the tiepoint is the centre of a pixel
        c, f = c - 0.5 * (a + b), f - 0.5 * (d + e)
    if not np.all(np.isfinite((a, b, c, d, e, f))) or a * e - b * d == 0:
        raise _UnsupportedError(f"no invertible geotransform: {(a, b, c, d, e, f)}")
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
        raise _UnsupportedError("no EPSG code")
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


# --- everything else, by GDAL ------------------------------------------------------------------------------


def _from_gdal(href: str, driver: str, because: str) -> Header | str:
    """Read what GDAL knows of a file that the TIFF path does not serve; tile tables stay empty."""
    path = href
    if href.startswith("az://"):
        path = "/vsiaz/" + href.removeprefix("az://")
    options: dict[str, Any] = {
        # sidecar files (.aux.xml) count beside local files; far away each would be a request
        "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE" if is_local(href) else "EMPTY_DIR",
        "GDAL_HTTP_CONNECTTIMEOUT": "10",
        "GDAL_HTTP_TIMEOUT": "60",
        "GDAL_HTTP_MAX_RETRY": "2",
    }
    try:
        with rasterio.Env(**options), rasterio.open(path, driver=driver) as source:
            return _gdal_header(path, source, because)
    except (RasterioError, RasterioIOError, CRSError, OSError, ValueError) as error:
        return f"{because}; GDAL: {redact(str(error))[:200]}"
    except _RefusedError as error:
        return f"refused: {error}"


def _gdal_header(path: str, source: Any, because: str) -> Header | str:
    epsg = source.crs.to_epsg() if source.crs else None
    if epsg is None:
        return f"no EPSG code ({'another CRS' if source.crs else 'no CRS'}); {because}"
    if source.gcps[0] or source.transform.is_identity:
        return f"no geotransform{' but ground control points' if source.gcps[0] else ''}; {because}"
    masks = MaskFlags.per_dataset in source.mask_flag_enums[0]
    pages = [_gdal_page(source, source, "image")]
    for n in range(len(source.overviews(1))):
        with rasterio.open(path, driver=source.driver, overview_level=n) as overview:
            pages.append(_gdal_page(source, overview, "overview"))
    if masks:
        pages.append(replace(pages[0], kind="mask", dtype="uint8", samples=1))
    return Header(
        pages=tuple(sorted(pages, key=_reading_order)),
        epsg=int(epsg),
        nodata=None if source.nodata is None else float(source.nodata),
        dtype=source.dtypes[0],
        samples=source.count,
        size=None,
        etag=None,
        scales=tuple(source.scales) if any(s != 1 for s in source.scales) else (),
        offsets=tuple(source.offsets) if any(o != 0 for o in source.offsets) else (),
    )


def _gdal_page(source: Any, level: Any, kind: str) -> _Page:
    tile_height, tile_width = level.block_shapes[0]
    a, b, c, d, e, f = tuple(source.transform)[:6]
    sx, sy = source.width / level.width, source.height / level.height
    return _check(
        _Page(
            kind=kind,
            driver=source.driver,
            width=level.width,
            height=level.height,
            tile_width=tile_width,
            tile_height=tile_height,
            dtype=source.dtypes[0],
            byteorder="<",
            compression=0,  # unknown: GDAL decodes
            predictor=1,
            planar=2 if source.interleaving and source.interleaving.name == "band" else 1,
            samples=source.count,
            transform=(a * sx, b * sy, c, d * sx, e * sy, f),
            tile_offsets=(),
            tile_byte_counts=(),
        )
    )
