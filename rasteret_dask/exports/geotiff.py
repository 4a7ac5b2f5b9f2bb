# SPDX-License-Identifier: Apache-2.0
"""The arrays of a chip as the bytes of GeoTIFFs, the same bytes on each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, TypeAlias

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from rasteret_dask.display.colours import NO_LABEL, class_colours
from rasteret_dask.exports.sheets import Box, MaskSheet, SourceSheet
from rasteret_dask.reader.pixelgrid import crs_of

__all__ = [
    "Georeference",
    "Order",
    "category_names",
    "mask_geotiff",
    "pixels_geotiff",
    "tells_validity",
    "validity_geotiff",
    "wants_validity",
]

Order: TypeAlias = Literal["slots", "bands"]
"""Whose bands follow each other in a file."""

TILE_PX = 256
"""Side of a tile, at most."""

ZLEVEL = 6
"""Of deflate."""

_STORED = {"bool": "uint8", "float16": "float32"}
"""What GDAL has no type for, and the one that holds all of its values."""


@dataclass(frozen=True, slots=True)
class Georeference:
    """Where the pixels of a file lie."""

    epsg: int
    """As :func:`rasteret_dask.crs.number` counts CRSs."""
    window: Box

    def transform(self, height: int, width: int) -> Affine:
        """Return what brings a pixel's column and row to x and y of its north-west corner."""
        west, south, east, north = self.window
        return Affine((east - west) / width, 0.0, west, 0.0, (south - north) / height, north)


@dataclass(frozen=True, slots=True)
class _Tags:
    """What a file says of its bands."""

    descriptions: tuple[str, ...]
    scale: float | None = None
    units: tuple[str, ...] = ()
    of_bands: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    colours: Mapping[int, tuple[int, int, int, int]] | None = None


def pixels_geotiff(
    pixels: NDArray[Any],
    valid: NDArray[np.bool_],
    sheet: SourceSheet,
    place: Georeference,
    dates: Sequence[str],
    order: Order = "slots",
) -> bytes:
    """Return the pixels of one source of a chip as a GeoTIFF, a band for each slot and band.

    Nodata, or NaN, says which pixels are invalid. Where a valid pixel has the number that stands for nodata, there is
    no such tag: all pixels are valid, or of one slot an internal mask says which, or of several what
    :func:`validity_geotiff` returns, which is written beside it.

    Parameters
    ----------
    pixels
        Shape (time, band, y, x).
    valid
        Shape (time, y, x).
    sheet
        What the pixels are.
    place
        Where they lie.
    dates
        What each slot is called.
    order
        What follows each other: the bands of a slot (``"slots"``), or the slots of a band (``"bands"``).
    """
    times, bands, height, width = pixels.shape
    places = np.arange(times * bands).reshape(times, bands)
    at = (places if order == "slots" else places.T).ravel()
    flat = pixels.reshape(times * bands, height, width)
    plain = tells_validity(pixels, valid, sheet)
    called, units, classes = sheet.descriptions(dates), sheet.units * times, dict(sheet.classes)
    tags = _Tags(
        tuple(called[n] for n in at),
        sheet.scale,
        tuple(units[n] for n in at) if any(units) else (),
        {
            1 + band: _class_tags(named)
            for band, n in enumerate(at)
            if (named := classes.get(sheet.bands[n % bands]))
        },
    )
    nodata = (np.nan if sheet.fill is None else sheet.fill) if plain else None
    ordered = flat if order == "slots" else flat[at]
    return _encoded(ordered, place, tags, nodata, None if plain or times > 1 or valid.all() else valid[0])


def wants_validity(pixels: NDArray[Any], valid: NDArray[np.bool_], sheet: SourceSheet) -> bool:
    """Tell whether the pixels' own file cannot say which of them are valid; arguments as :func:`tells_validity`."""
    return len(pixels) > 1 and not tells_validity(pixels, valid, sheet) and not valid.all()


def tells_validity(pixels: NDArray[Any], valid: NDArray[np.bool_], sheet: SourceSheet) -> bool:
    """Tell whether pixels say themselves which of them are valid: those of which no band is nodata, or not finite.

    Parameters
    ----------
    pixels
        Shape (time, band, y, x).
    valid
        Shape (time, y, x).
    sheet
        What the pixels are.
    """
    if pixels.dtype.kind == "f":
        seen = np.isfinite(pixels).all(axis=1)
    elif sheet.fill is None:  # complex numbers
        seen = ~np.isnan(pixels).any(axis=1)
    else:
        seen = (pixels != pixels.dtype.type(sheet.fill)).all(axis=1)
    return bool(np.array_equal(seen, valid))


def validity_geotiff(valid: NDArray[np.bool_], place: Georeference, dates: Sequence[str]) -> bytes:
    """Return where pixels are valid, shape (time, y, x), as a GeoTIFF of 0 and 1, a band a slot."""
    tags = _Tags(tuple(f"{date} valid".strip() for date in dates))
    return _encoded(valid.astype(np.uint8), place, tags, None, None)


def mask_geotiff(mask: NDArray[Any], sheet: MaskSheet, place: Georeference) -> bytes:
    """Return burned labels, shape (y, x), as a GeoTIFF with a colour for each class that has a name.

    Whole numbers have no nodata: 0 is the ground that no polygon covers, which is a class of its own.
    """
    colours = None
    if sheet.classes and mask.dtype in (np.uint8, np.uint16):
        names = class_colours(range(1, len(sheet.classes)))
        colours = {value: _rgba(colour) for value, colour in {0: NO_LABEL, **names}.items()}
    tags = _Tags((sheet.name,), of_bands={1: _class_tags(sheet.named)}, colours=colours)
    return _encoded(mask[None], place, tags, np.nan if mask.dtype.kind == "f" else None, None)


def category_names(sheet: MaskSheet) -> bytes:
    """Return the names of classes as GDAL reads them beside a file, in ``<file>.aux.xml``: a GeoTIFF has no place."""
    lines = "".join(f"      <Category>{escape(name, quote=False)}</Category>\n" for _, name in sheet.named)
    text = (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{lines}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )
    return text.encode()


def _class_tags(named: Sequence[tuple[int, str]]) -> dict[str, str]:
    return {f"class_{value}": name for value, name in named}


def _rgba(colour: str) -> tuple[int, int, int, int]:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue, 255


def _encoded(
    bands: NDArray[Any],
    place: Georeference,
    tags: _Tags,
    nodata: float | None,
    mask: NDArray[np.bool_] | None,
) -> bytes:
    """Return bands, shape (band, y, x), as a tiled and deflated GeoTIFF."""
    count, height, width = bands.shape
    dtype = _STORED.get(bands.dtype.name, bands.dtype.name)
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": count, "height": height, "width": width, "dtype": dtype,
        "crs": crs_of(place.epsg), "transform": place.transform(height, width), "nodata": nodata,
        "tiled": True, "blockxsize": _tile(width), "blockysize": _tile(height), "interleave": "band",
        "compress": "deflate", "zlevel": ZLEVEL, "num_threads": 1,
        "photometric": "palette" if tags.colours else "minisblack",
    }  # fmt: skip
    if count > 1:
        profile["alpha"] = "unspecified"  # a fourth band of bytes is no alpha
    kind = np.dtype(dtype).kind
    if kind in "iuf":
        profile["predictor"] = 3 if kind == "f" else 2
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(bands.astype(dtype, copy=False))
            file.descriptions = tags.descriptions
            if tags.scale is not None:
                file.scales, file.offsets = (tags.scale,) * count, (0.0,) * count
            if tags.units:
                file.units = tags.units
            for band, values in tags.of_bands.items():
                file.update_tags(band, **values)
            if tags.colours:
                file.write_colormap(1, dict(tags.colours))
            if mask is not None:
                file.write_mask(mask)
        return bytes(memory.getbuffer())


def _tile(side: int) -> int:
    """Return the side of a tile: a multiple of 16, as TIFF asks for."""
    return min(TILE_PX, -(-side // 16) * 16)
