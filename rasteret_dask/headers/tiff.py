# SPDX-License-Identifier: Apache-2.0
"""A TIFF's header: what its directories say, brought to the levels of a record."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from rasteret_dask.headers.directories import Directory, directories
from rasteret_dask.headers.geokeys import crs_of_keys, geokeys
from rasteret_dask.headers.nodata import Number, number_of, spelled, text_of
from rasteret_dask.headers.page import (
    LONGEST_TAG,
    Header,
    HeaderRefusedError,
    Page,
    Transform,
    UnsupportedError,
    checked,
    reading_order,
    unlisted_mask,
)
from rasteret_dask.headers.rangefile import RangeFile

__all__ = ["BROKEN", "from_tiff"]

_MAX_IFDS = 128
_OLD_JPEG = 6  # compression whose other tags follow rules of their own
_PALETTE = 3  # PhotometricInterpretation, TIFF 6.0, tag 262
_COLOURS = 320  # ColorMap; files of USDA's have one under another interpretation, and GDAL takes it, too
_DATETIME = 306  # TIFF 6.0: "YYYY:MM:DD HH:MM:SS"
BROKEN = (struct.error, ValueError, LookupError, TypeError, ArithmeticError, OSError)
"""What broken or hostile bytes raise."""


def from_tiff(file: RangeFile) -> Header:
    """Parse all levels; UnsupportedError or one of BROKEN where they make no sense."""
    ifds = list(islice(directories(file), _MAX_IFDS + 1))
    if not ifds:
        raise UnsupportedError("no image in the file")
    if len(ifds) > _MAX_IFDS:
        raise HeaderRefusedError(f"more than {_MAX_IFDS} images in one file")
    first = ifds[0]
    epsg = crs_of_keys(first)
    transform = _transform(first)
    image = _page(first, "image", transform, None)
    pages = [image]
    pages += [_page(ifd, kind, transform, image) for ifd in ifds[1:] if (kind := _kind(ifd))]
    items = _metadata(first)
    if any(item.get("name") == "NODATA_VALUES" for item in items) and not any(
        p.kind == "mask" for p in pages
    ):
        pages.append(unlisted_mask(image))
    nodata = text_of(first.text(42113))
    return Header(
        pages=tuple(sorted(pages, key=reading_order)),
        epsg=epsg,
        nodata=_nodata(nodata, first, image.dtype),
        dtype=image.dtype,
        samples=image.samples,
        size=file.head.size,
        etag=file.head.etag,
        scales=_per_sample(items, "scale", image.samples),
        offsets=_per_sample(items, "offset", image.samples),
        nodata_tag=nodata,
        alpha=_alpha(first, items, image.samples),
        thematic=_thematic(first, items, image.samples),
        descriptions=_descriptions(items, image.samples),
        tags=_tags(first, items),
    )


def _subfile(ifd: Directory) -> int:
    """Return NewSubfileType (TIFF 6.0, tag 254), where it is 0 by the older tag 255: 1 reduced, 4 a mask."""
    return ifd.integer(254, 0) or {2: 1, 3: 2}.get(ifd.integer(255, 0), 0)


def _kind(ifd: Directory) -> str:
    """Return what the subfile's type says of an IFD; "": a further page, not read."""
    subfile = _subfile(ifd)
    reduced, mask = bool(subfile & 1), bool(subfile & 4)
    return {(0, 0): "", (1, 0): "overview", (0, 1): "mask", (1, 1): "overview_mask"}[reduced, mask]


def _page(ifd: Directory, kind: str, transform: Transform, image: Page | None) -> Page:
    """Return one level; ``transform`` is that of the image, which an overview is compared with."""
    width, height, samples = ifd.integer(256, 0), ifd.integer(257, 0), ifd.integer(277, 1)
    compression = ifd.integer(259, 1)
    if min(width, height) < 1:
        raise HeaderRefusedError(f"size {width} x {height}")
    if compression == _OLD_JPEG:
        raise UnsupportedError("compression 6, JPEG of old")
    sx, sy = (1.0, 1.0) if image is None else (image.width / width, image.height / height)
    a, b, c, d, e, f = transform
    tiled = 322 in ifd.tags
    bits = _bits(ifd, samples)
    one_bit_mask = bits == (1,) and bool(_subfile(ifd) & 4)
    dtype = "bool" if one_bit_mask else _dtype(ifd, bits, samples)
    page = checked(
        Page(
            kind=kind,
            driver="GTiff",
            width=width,
            height=height,
            tile_width=ifd.integer(322, 0) if tiled else width,
            tile_height=ifd.integer(323, 0) if tiled else _rows(ifd, height),
            dtype=dtype,
            byteorder=ifd.order,
            compression=compression,
            predictor=ifd.integer(317, 1),
            planar=ifd.integer(284, 1),
            samples=samples,
            transform=(a * sx, b * sy, c, d * sx, e * sy, f),
            tile_offsets=(),
            tile_byte_counts=(),
        )
    )
    plain = one_bit_mask or set(bits) == {8 * np.dtype(dtype).itemsize}
    if not tiled or not plain or ifd.integer(266, 1) != 1:
        return page
    offsets = ifd.integers(324 if 324 in ifd.tags else 273)
    counts = ifd.integers(325 if 325 in ifd.tags else 279)
    due = page.tiles * (samples if page.planar == 2 else 1)
    if len(offsets) != due or len(counts) != due:
        raise UnsupportedError(f"{len(offsets)} tile offsets and {len(counts)} byte counts for {due} tiles")
    return checked(replace(page, tile_offsets=offsets, tile_byte_counts=counts))


def _rows(ifd: Directory, height: int) -> int:
    """Return the rows of a strip."""
    rows = ifd.integers(278)
    return min(rows[0], height) or height if len(rows) == 1 else height


def _bits(ifd: Directory, samples: int) -> tuple[int, ...]:
    """Return BitsPerSample: one number where all samples have the same."""
    bits = ifd.integers(258)[:samples] or (1,)
    return bits[:1] if len(set(bits)) == 1 else bits


def _dtype(ifd: Directory, bits: tuple[int, ...], samples: int) -> str:
    """Return the NumPy type in which GDAL gives the pixels."""
    most = max(bits)
    if most > 128:
        raise HeaderRefusedError(f"{most} bits per sample")
    size = next(n for n in (8, 16, 32, 64, 128) if most <= n)
    formats = set(ifd.integers(339)[:samples] or (1,))
    if len(formats) > 1:
        raise UnsupportedError(f"sample formats {sorted(formats)} in one file")
    match formats.pop():
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


def _transform(ifd: Directory) -> Transform:
    """Return pixel -> CRS from ModelPixelScale + ModelTiepoint or ModelTransformation (GeoTIFF 1.1, 7.1)."""
    scale, tie, matrix = ifd.numbers(33550), ifd.numbers(33922), ifd.numbers(34264)
    if len(scale) >= 2 and scale[0] and scale[1] and len(tie) >= 6:
        a, b, d, e = scale[0], 0.0, 0.0, -abs(scale[1])
        c, f = tie[3] - tie[0] * a, tie[4] - tie[1] * e
    elif len(matrix) == 16:
        a, b, c, d, e, f = matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7]
    else:
        raise UnsupportedError(
            "ground control points instead of a geotransform" if len(tie) > 6 else "no geotransform"
        )
    if b or d:
        raise UnsupportedError("rows and columns that are turned")
    if geokeys(ifd).get(1025) == 2:  # RasterPixelIsPoint: the tiepoint is the centre of a pixel
        c, f = c - 0.5 * (a + b), f - 0.5 * (d + e)
    if not np.all(np.isfinite((a, b, c, d, e, f))) or a * e - b * d == 0:
        raise UnsupportedError(f"no invertible geotransform: {(a, b, c, d, e, f)}")
    return a, b, c, d, e, f


def _nodata(text: str | None, ifd: Directory, dtype: str) -> Number | None:
    half = dtype == "float32" and max(ifd.integers(258)) == 16  # GDAL gives such pixels as float32
    return number_of(spelled(number_of(text, "float16")) if half else text, dtype)


def _metadata(ifd: Directory) -> list[ElementTree.Element]:
    """Return the items of the GDAL_METADATA tag."""
    text = ifd.text(42112)
    if text is None or "<!" in text:  # no document types: they can expand without bound
        return []
    try:
        return ElementTree.fromstring(text.strip("\0 \n")).findall("Item")
    except ElementTree.ParseError:
        return []


def _per_sample(items: Sequence[ElementTree.Element], role: str, samples: int) -> tuple[float | None, ...]:
    """Return the number that items of a role give for each sample; none where there are no such items."""
    values: dict[int, float | None] = {}
    for item in items:
        sample = item.get("sample", "0")
        if item.get("role") == role and sample.isdigit() and int(sample) < samples:
            values[int(sample)] = _number(item.text)
    return tuple(values.get(n) for n in range(samples)) if values else ()


def _descriptions(items: Sequence[ElementTree.Element], samples: int) -> tuple[str | None, ...]:
    """Return what the file calls each sample; none where it names none."""
    names: dict[int, str | None] = {}
    for item in items:
        sample = item.get("sample", "0")
        if item.get("role") == "description" and sample.isdigit() and int(sample) < samples:
            names[int(sample)] = item.text
    return tuple(names.get(n) for n in range(samples)) if names else ()


def _tags(ifd: Directory, items: Sequence[ElementTree.Element]) -> tuple[tuple[str, str], ...]:
    """Return the file's own metadata, short texts only: they are kept while other headers are read."""
    tags = {item.get("name", ""): item.text or "" for item in items if item.get("sample") is None}
    try:
        tags["TIFFTAG_DATETIME"] = ifd.text(_DATETIME) or ""
    except (UnsupportedError, *BROKEN):
        pass  # a broken date breaks no image
    return tuple((name, text) for name, text in tags.items() if 0 < len(text) <= LONGEST_TAG)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return float("nan") if "nan" in str(text).lower() else None


def _thematic(ifd: Directory, items: Sequence[ElementTree.Element], samples: int) -> tuple[bool, ...]:
    """Return whether each band holds classes: a colour table, or a layer type as ERDAS tells it; empty: none does."""
    if ifd.integer(262, 0) == _PALETTE or _COLOURS in ifd.tags:
        return (True,) * samples
    thematic = [False] * samples
    for item in items:
        sample = item.get("sample", "0")
        named = item.get("name") == "LAYER_TYPE" and (item.text or "").strip().casefold() == "thematic"
        if named and sample.isdigit() and int(sample) < samples:
            thematic[int(sample)] = True
    return tuple(thematic) if any(thematic) else ()


def _alpha(ifd: Directory, items: Sequence[ElementTree.Element], samples: int) -> int | None:
    """Return the sample that is the alpha channel: by ExtraSamples (TIFF 6.0, tag 338), or GDAL's colour names.

    1 is associated and 2 unassociated alpha; 0 says nothing, as of the near infrared of an orthophoto. Files that
    call several samples alpha have none.
    """
    extra = ifd.integers(338)
    alphas = {n for n, what in enumerate(extra, samples - len(extra)) if what in (1, 2) and n >= 0}
    for item in items:
        sample = item.get("sample", "")
        if item.get("role") == "colorinterp" and sample.isdigit():
            named = (item.text or "").strip().lower() == "alpha"
            alphas = alphas | {int(sample)} if named else alphas - {int(sample)}
    return alphas.pop() if len(alphas) == 1 and samples > 1 and max(alphas) < samples else None
