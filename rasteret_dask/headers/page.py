# SPDX-License-Identifier: Apache-2.0
"""What a header says: the levels of a file with their tile tables, within bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from rasteret_dask.errors import ReadError
from rasteret_dask.headers.nodata import Number
from rasteret_dask.rules.kinds import KindName

__all__ = [
    "LONGEST_TAG",
    "Header",
    "HeaderRefusedError",
    "Page",
    "Placement",
    "Transform",
    "UnsupportedError",
    "checked",
    "reading_order",
    "unlisted_mask",
]

_MAX_TILE = 256 * 1024 * 1024  # bytes of a decoded tile
_MAX_TILES = 10_000_000
_MAX_SAMPLES = 65_535
LONGEST_TAG = 100
"""Characters of a tag that is kept: dates and names, no documents."""

Placement = Literal["rotated", "gcps"]
"""How a file lies whose rows and columns are no axes of its CRS: by a turned transform, or by ground control points."""

Transform: TypeAlias = tuple[float, float, float, float, float, float]


class UnsupportedError(Exception):
    """The TIFF path does not serve this file; GDAL may."""


class HeaderRefusedError(Exception):
    """The file asks for more memory than a header may, or for pixels that are not read."""


@dataclass(frozen=True, slots=True)
class Page:
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
        fields = {name: getattr(self, name) for name in Page.__slots__}
        fields["tile_offsets"] = self.tile_offsets[own]
        fields["tile_byte_counts"] = self.tile_byte_counts[own]
        return fields


@dataclass(frozen=True, slots=True)
class Header:
    """All that reading needs to know of a file, without its pixels."""

    pages: tuple[Page, ...]
    """The image, its overviews from fine to coarse, then masks."""
    epsg: int | None
    """The CRS, as :func:`rasteret_dask.crs.number` counts it; None: the file has none."""
    nodata: Number | None
    """What pixels hold that are nodata, a number of their own dtype; see :mod:`rasteret_dask.headers.nodata`."""
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
    thematic: tuple[bool, ...] = ()
    """Whether each band holds classes, by a colour table, category names or an attribute table; empty: none does."""
    categories: tuple[tuple[tuple[int, str], ...], ...] = ()
    """(code, name) of the classes of each band; empty where the file has none."""
    nodata_tag: str | None = None
    """How the file spells its nodata; also what no pixel of its dtype can hold."""
    alpha: int | None = None
    """Position of the band that is the file's alpha channel, from 0: pixels are valid where it is more than 0."""
    placement: Placement | None = None
    """None: rows and columns run along the axes of the CRS. Else the image page tells of the north-up raster that GDAL
    would warp the file to, and each window of another grid is warped from the file itself."""
    outline: tuple[tuple[float, float], ...] = ()
    """(x, y) of the corners in the CRS, where ``placement`` says that they are no rectangle's."""
    descriptions: tuple[str | None, ...] = ()
    """What the file calls each band; empty where it names none."""
    tags: tuple[tuple[str, str], ...] = ()
    """(name, text) of the file's own metadata, as GDAL names it: ``TIFFTAG_DATETIME``, items of GDAL_METADATA."""

    def levels_of(self, band_index: int) -> tuple[dict[str, Any], ...]:
        """Return one dict per level, matching ``records.LEVEL_TYPE``, with the tile tables of one band.

        Tile tables are empty where the reader must ask GDAL: strips, JPEG 2000, odd bit depths. An alpha channel
        whose tiles lie apart from the band's (planar 2) is among the levels, of kinds ``"alpha"`` and
        ``"overview_alpha"``.

        Raises
        ------
        ReadError
            When the file has fewer bands.
        """
        if not 0 <= band_index < self.samples:
            raise ReadError(
                f"band index {band_index}", f"{self.samples} bands in the file", "an index below that"
            )
        levels = [page.level(band_index) for page in self.pages]
        if self.alpha not in (None, band_index):
            kinds = {"image": "alpha", "overview": "overview_alpha"}
            levels += [
                {**page.level(self.alpha), "kind": kinds[page.kind], "samples": 1}
                for page in self.pages
                if page.kind in kinds and page.planar == 2
            ]
        return tuple(levels)

    def scale_of(self, band_index: int) -> float | None:
        """Return the file's own scale of a band, or None."""
        return self.scales[band_index] if band_index < len(self.scales) else None

    def offset_of(self, band_index: int) -> float | None:
        """Return the file's own offset of a band, or None."""
        return self.offsets[band_index] if band_index < len(self.offsets) else None

    def kind_of(self, band_index: int) -> KindName | None:
        """Return the kind that the file itself tells of a band: ``"class"``, or None."""
        return "class" if band_index < len(self.thematic) and self.thematic[band_index] else None

    def classes_of(self, band_index: int) -> tuple[tuple[int, str], ...]:
        """Return (code, name) of a band's classes, as far as the file tells."""
        return self.categories[band_index] if band_index < len(self.categories) else ()


def checked(page: Page) -> Page:
    """Return the page; RefusedError where its sizes ask for more memory than a file may, or its pixels are not read."""
    try:
        itemsize = np.dtype(page.dtype).itemsize
    except TypeError:  # GDAL's CInt16 and CInt32 have no type in NumPy
        raise HeaderRefusedError(
            f"pixels of {page.dtype}, a type that NumPy does not have; convert the file, e.g. with "
            "gdal_translate -ot CFloat32"
        ) from None
    if min(page.width, page.height, page.tile_width, page.tile_height, page.samples) < 1:
        raise HeaderRefusedError(
            f"size {page.width} x {page.height}, tile {page.tile_width} x {page.tile_height}"
        )
    if (
        max(page.width, page.height, page.tile_width, page.tile_height) >= 2**31
        or page.samples > _MAX_SAMPLES
    ):
        raise HeaderRefusedError(f"{page.width} x {page.height} pixels, {page.samples} bands")
    chunky = page.samples if page.planar == 1 else 1
    nbytes = page.tile_width * page.tile_height * itemsize * chunky
    strip = page.driver == "GTiff" and not page.tile_offsets and page.tile_width == page.width
    if not strip and nbytes > _MAX_TILE:
        raise HeaderRefusedError(f"tiles of {nbytes / 2**20:.0f} MiB; at most {_MAX_TILE >> 20} MiB")
    if page.tiles * (page.samples if page.planar == 2 else 1) > _MAX_TILES:
        raise HeaderRefusedError(f"more than {_MAX_TILES:,} tiles")
    return page


def unlisted_mask(image: Page) -> Page:
    """Return the page of a mask of which only GDAL knows where it is: it has no tile table."""
    return replace(
        image,
        kind="mask",
        dtype="uint8",
        samples=1,
        planar=1,
        predictor=1,
        tile_offsets=(),
        tile_byte_counts=(),
    )


def reading_order(page: Page) -> tuple[int, int]:
    """Return the sort key that puts the image first, then overviews from fine to coarse, then masks."""
    return ("image", "overview", "mask", "overview_mask").index(page.kind), -page.width
