# SPDX-License-Identifier: Apache-2.0
"""A map as files: what each file says beside its pixels, which file holds which pixels, the VRT that joins them.

Nothing here touches pixels, and GDAL is not imported.

- :class:`MapHeader`: CRS, transform, nodata, classes and colours of one file, or of the whole map of a zone;
- :class:`CogTiles`: the public value of ``predict(to=rd.CogTiles(...))``;
- :func:`tiles_of`, :func:`tile_name`, :func:`tile_header`: its files, each a unit of work of its own; those at the
  edges of a map are padded (:func:`~rasteret_dask.prediction.cogs.pad`), those without a valid pixel are left out;
- :func:`vrt_bytes`, :func:`vrt_name`: the VRT of a zone, put when all of its files are there;
- :func:`sidecar`: the bytes of ``map.tif.aux.xml``, where GDAL looks for names of classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, TypeAlias
from xml.etree import ElementTree

import numpy as np
from affine import Affine

from rasteret_dask.crs import wkt2
from rasteret_dask.display.colours import class_colours
from rasteret_dask.errors import PlanError

__all__ = [
    "CogTiles", "MapHeader", "MapKind", "MapTile", "rgb", "sidecar", "tile_header", "tile_name", "tiles_of",
    "vrt_bytes", "vrt_name",
]  # fmt: skip

MapKind: TypeAlias = Literal["classes", "values"]

LEAST_PX, MOST_PX = 256, 32_768
"""Sides of a tile: below the first, files are many and nearly empty; above the second, one takes a worker's memory."""

_GDAL_TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "float32": "Float32", "float64": "Float64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What a file of a map says beside its pixels."""

    shape: tuple[int, int]
    """Pixels: y, x."""
    dtype: str
    crs: int
    """The number of the CRS (:mod:`rasteret_dask.crs`)."""
    transform: tuple[float, float, float, float, float, float]
    """a, b, c, d, e, f of pixel corner (column, row) -> (x, y), as affine and rasterio have them."""
    kind: MapKind
    """Codes, whose overviews have the most frequent one, or quantities, whose overviews have means."""
    bands: tuple[str, ...]
    """What each band is called, in their order."""
    nodata: float | None = None
    """What invalid pixels hold."""
    classes: tuple[tuple[int, str], ...] = ()
    """Code -> name of classes: of codes ascending, of quantities one a band, in their order."""
    colors: tuple[tuple[int, str], ...] = ()
    """Code -> ``"#rrggbb"``; classes that are not in it have a colour of the package's palette."""
    note: str | None = None
    """JSON text of what the file was made of, as a tag of it; None: it does not say."""

    def __post_init__(self) -> None:
        if self.dtype not in _GDAL_TYPES:
            raise PlanError(
                "a map as GeoTIFF", f"pixels of {self.dtype}", f"one of {', '.join(_GDAL_TYPES)}",
                "Let the model return another dtype, or write to Zarr.",
            )  # fmt: skip

    @property
    def affine(self) -> Affine:
        """Pixel corner (column, row) -> (x, y)."""
        return Affine(*self.transform)

    @property
    def palette(self) -> dict[int, str]:
        """Code -> colour of a map of classes in one byte; empty for anything else, as TIFF has no other palettes."""
        if self.kind != "classes" or self.dtype != "uint8":
            return {}
        return class_colours(code for code, _ in self.classes) | dict(self.colors)

    @property
    def numpy_nodata(self) -> Any:
        """What invalid pixels hold, and pixels that nobody writes: nodata, else 0, in the dtype of the pixels."""
        return np.dtype(self.dtype).type(self.nodata or 0)

    def window(self, row: int, column: int, shape: tuple[int, int]) -> MapHeader:
        """Return the header of a part of it, with its corner at a pixel; it may reach beyond the whole."""
        moved = self.affine @ Affine.translation(column, row)
        return replace(self, shape=shape, transform=tuple(moved)[:6])


@dataclass(frozen=True, slots=True)
class MapTile:
    """One file of a map: where it lies in the grid of files, and in the map's pixels."""

    row: int
    """Counts files southwards from the map's north-west corner."""
    column: int
    """Counts files eastwards from there."""
    y: slice
    """The map's rows in it; fewer than its side at the map's southern edge."""
    x: slice
    """The map's columns in it; fewer than its side at the map's eastern edge."""


@dataclass(frozen=True, slots=True)
class CogTiles:
    """A map as a folder of Cloud Optimized GeoTIFFs (COGs) of one size: ``chips.predict(model, to=CogTiles(...))``.

    Files are called ``<zone>_<row>_<column>.tif``; rows count southwards and columns eastwards from the north-west
    corner of the zone's map. At its southern and eastern edges the rest of a file is nodata. A file without any valid
    pixel is not written. ``map_<zone>.vrt``, put when all files are there, shows them as one: it is what to
    open in QGIS, with GDAL or with rasterio. The folder can be moved as a whole.

    Parameters
    ----------
    folder
        A local path, or a URL of scheme s3, gs or az.
    tile_px
        Side of a file, pixels, 256 to 32,768. A worker holds a file's pixels, all bands, in memory.

    Raises
    ------
    PlanError
        When ``tile_px`` is anything else.

    Examples
    --------
    >>> tiles = rd.CogTiles("map", tile_px=1024)
    >>> tiles.folder, tiles.tile_px
    ('map', 1024)
    """

    folder: str | os.PathLike[str]
    tile_px: int = 2048

    def __post_init__(self) -> None:
        try:
            side = index(self.tile_px)
        except TypeError:
            side = 0
        if not LEAST_PX <= side <= MOST_PX or isinstance(self.tile_px, bool):
            raise PlanError(
                "CogTiles", f"tile_px={self.tile_px!r}", f"a whole number from {LEAST_PX} to {MOST_PX:,}"
            )
        object.__setattr__(self, "folder", os.fspath(self.folder))
        object.__setattr__(self, "tile_px", side)


def tile_name(zone: str, row: int, column: int) -> str:
    """Return what a file of a folder is called."""
    return f"{zone}_{row}_{column}.tif"


def vrt_name(zone: str) -> str:
    """Return what the VRT of a zone is called."""
    return f"map_{zone}.vrt"


def tiles_of(grid: CogTiles, shape: tuple[int, int]) -> Iterator[MapTile]:
    """Yield the files of a zone's map of this shape (y, x), row by row."""
    side = grid.tile_px
    for row, y in enumerate(range(0, shape[0], side)):
        for column, x in enumerate(range(0, shape[1], side)):
            yield MapTile(row, column, slice(y, min(y + side, shape[0])), slice(x, min(x + side, shape[1])))


def tile_header(grid: CogTiles, whole: MapHeader, tile: MapTile) -> MapHeader:
    """Return the header of a file, of that of its zone's map."""
    return whole.window(tile.y.start, tile.x.start, (grid.tile_px, grid.tile_px))


def vrt_bytes(grid: CogTiles, zone: str, whole: MapHeader, tiles: Iterable[MapTile]) -> bytes:
    """Return the VRT of a zone's map: XML that names the files beside it.

    Parameters
    ----------
    grid
        The folder.
    zone
        What names of its files begin with.
    whole
        The header of the zone's map.
    tiles
        The files that were written; elsewhere the map is nodata.
    """
    root = ElementTree.Element("VRTDataset", rasterXSize=str(whole.shape[1]), rasterYSize=str(whole.shape[0]))
    ElementTree.SubElement(root, "SRS", dataAxisToSRSAxisMapping="1,2").text = wkt2(whole.crs)
    ElementTree.SubElement(root, "GeoTransform").text = ", ".join(map(repr, whole.affine.to_gdal()))
    places = sorted(tiles, key=lambda tile: (tile.row, tile.column))
    pixels = {"DataType": _GDAL_TYPES[whole.dtype], "BlockXSize": "512", "BlockYSize": "512"}
    file = {"RasterXSize": str(grid.tile_px), "RasterYSize": str(grid.tile_px), **pixels}
    for number, title in enumerate(whole.bands, 1):
        band = ElementTree.SubElement(
            root, "VRTRasterBand", dataType=_GDAL_TYPES[whole.dtype], band=str(number)
        )  # fmt: skip
        ElementTree.SubElement(band, "Description").text = title
        if whole.nodata is not None:
            ElementTree.SubElement(band, "NoDataValue").text = _number(whole.nodata)
        _put_palette(band, whole)
        _put_names(band, whole)
        for tile in places:
            source = ElementTree.SubElement(band, "SimpleSource")
            name = ElementTree.SubElement(source, "SourceFilename", relativeToVRT="1")
            name.text = tile_name(zone, tile.row, tile.column)
            ElementTree.SubElement(source, "SourceBand").text = str(number)
            ElementTree.SubElement(source, "SourceProperties", file)
            size = {"xSize": str(tile.x.stop - tile.x.start), "ySize": str(tile.y.stop - tile.y.start)}
            ElementTree.SubElement(source, "SrcRect", {"xOff": "0", "yOff": "0", **size})
            corner = {"xOff": str(tile.x.start), "yOff": str(tile.y.start)}
            ElementTree.SubElement(source, "DstRect", {**corner, **size})
    ElementTree.indent(root, " ")
    return bytes(ElementTree.tostring(root))


def sidecar(header: MapHeader) -> bytes | None:
    """Return the bytes of ``<file>.aux.xml``, where GDAL and QGIS look for names of classes; None without names.

    TIFF has no tag for names of classes. Tags of the band have them too, for whoever copies the file alone.
    """
    if not header.classes or header.kind != "classes":
        return None
    root = ElementTree.Element("PAMDataset")
    for number in range(1, len(header.bands) + 1):
        _put_names(ElementTree.SubElement(root, "PAMRasterBand", band=str(number)), header)
    ElementTree.indent(root, " ")
    return bytes(ElementTree.tostring(root))


def _put_names(band: ElementTree.Element, header: MapHeader) -> None:
    """Put the names of classes below a band: GDAL counts categories from 0, so codes between them have none."""
    if header.classes and header.kind == "classes":
        names = dict(header.classes)
        categories = ElementTree.SubElement(band, "CategoryNames")
        for code in range(max(names) + 1):
            ElementTree.SubElement(categories, "Category").text = names.get(code, "")


def _put_palette(band: ElementTree.Element, header: MapHeader) -> None:
    if not header.palette:
        return
    ElementTree.SubElement(band, "ColorInterp").text = "Palette"
    table = ElementTree.SubElement(band, "ColorTable")
    colours = header.palette
    for code in range(max(colours) + 1):
        red, green, blue = rgb(colours.get(code, "#000000"))
        alpha = 0 if code == header.nodata else 255
        ElementTree.SubElement(table, "Entry", c1=str(red), c2=str(green), c3=str(blue), c4=str(alpha))


def rgb(colour: str) -> tuple[int, int, int]:
    """Return the parts of ``"#rrggbb"``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _number(value: float) -> str:
    return "nan" if value != value else f"{value:g}" if value == int(value) else repr(float(value))
