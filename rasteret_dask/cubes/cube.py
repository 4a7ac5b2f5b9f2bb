# SPDX-License-Identifier: Apache-2.0
"""Records on a grid become a stackstac cube; the one module that touches stackstac."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import GridError
from rasteret_dask.grid import Bounds, bounds_in, northern
from rasteret_dask.reader.cogreader import NATURAL, AssetHref, CogReader, Kernel, grid_of, named_by_text
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.table.records import Asset, Records

if TYPE_CHECKING:
    import dask.array as da

__all__ = [
    "CubePlace",
    "Form",
    "GroupCube",
    "Read",
    "Reads",
    "Stack",
    "compact_groups",
    "group_box",
    "group_cube",
    "stack",
    "touches",
    "windows_of",
]

SPREAD = 1.5
"""A group's common bounds hold at most this many times the pixels of its chips."""


class Read(NamedTuple):
    """One band of one record, and how its pixels are brought onto the grid."""

    band: str
    """The record's own code."""
    kernel: Kernel = NATURAL

    def dtype(self, asset: Asset) -> np.dtype[Any]:
        """Return the type of the pixels that are read."""
        return np.dtype(asset.dtype if self.kernel.decode is None else np.float32)


Reads: TypeAlias = "Mapping[int, Mapping[str, Read]]"
"""Record row -> {name in the stack: read}."""


def plain_items(records: Records, reads: Reads, epsg: int) -> list[dict[str, Any]]:
    """Return the STAC items, as plain dicts, that stackstac needs to know of some records; ids are row numbers.

    Their bounds are told in the cube's CRS, which stackstac could not bring them to from a CRS without EPSG code.
    """
    items = []
    for row, own in reads.items():
        assets = {}
        for name, (band, kernel) in own.items():
            asset = records.asset(row, band)
            box = _box_in(asset.image.transform, asset.image.width, asset.image.height, asset.epsg, epsg)
            assets[name] = {"href": AssetHref(asset, kernel), "proj:epsg": epsg, "proj:bbox": box}
        items.append({"id": str(row), "properties": {}, "assets": assets})
    return items


@lru_cache(maxsize=4096)
def _box_in(transform: tuple[float, ...], width: int, height: int, source: int, epsg: int) -> Bounds:
    """Return the bounds of a raster in the CRS of a cube; without ends where that cannot show all of it.

    UTM south and its northern twin are one but for a translation, so that bounds stay exact.
    """
    code, shift = northern(source)
    moved = shift if code == epsg else 0.0
    a, b, c, d, e, f = transform
    xs = [c + a * col + b * row for col in (0, width) for row in (0, height)]
    ys = [f + d * col + e * row + moved for col in (0, width) for row in (0, height)]
    box = min(xs), min(ys), max(xs), max(ys)
    if epsg in (source, code):
        return box
    try:
        xmin, ymin, xmax, ymax = bounds_in(box, source, epsg)
    except GridError:
        return -inf, -inf, inf, inf
    return (-inf, ymin, inf, ymax) if xmax < xmin else (xmin, ymin, xmax, ymax)


@dataclass(frozen=True, slots=True)
class CubePlace:
    """Where a cube lies, and how it is cut into chunks."""

    grid: Grid
    shape: tuple[int, int]
    """(height, width), pixels."""
    chunks: int
    """Side of a Dask chunk, pixels."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(xmin, ymin, xmax, ymax) in the grid's CRS."""
        (height, width), grid = self.shape, self.grid
        return grid.x0, grid.y0 - height * grid.yres, grid.x0 + width * grid.xres, grid.y0


@dataclass(frozen=True, slots=True)
class Form:
    """How a stack holds pixels of one type."""

    dtype: np.dtype[Any]
    fill: Any
    """What invalid pixels hold."""
    reader: type[CogReader] = CogReader


@dataclass(frozen=True)
class Stack:
    """A stackstac cube of some reads, before any pixel is read."""

    pixels: da.Array
    """Dims (record, read, y, x)."""
    x: NDArray[np.float64]
    """Centres of pixels."""
    y: NDArray[np.float64]
    at: Mapping[tuple[int, str], tuple[int, int]]
    """(record row, name) -> (record, read), for those that touch the place."""

    def chunk(self, row: int, name: str) -> tuple[tuple[str, int, int], int] | None:
        """Return which chunks along (y, x) hold a read, as the first part of their keys, and its number in them.

        None: it does not touch the place.
        """
        if (row, name) not in self.at:
            return None
        record, read = self.at[row, name]
        per_chunk = self.pixels.chunks[1][0]
        return (self.pixels.name, record, read // per_chunk), read % per_chunk


def stack(records: Records, reads: Reads, place: CubePlace, form: Form, reads_per_chunk: int = 1) -> Stack:
    """Return the lazy stack of some reads on a grid, in order of the rows.

    Parameters
    ----------
    records, reads
        What is read: names are those of places in the stack, which records share.
    place
        The grid and its chunks, each of one record.
    form
        How pixels are held.
    reads_per_chunk
        -1: all of a record are read together.
    """
    import stackstac  # where Jupyter is installed, it brings along all of it: widgets, a dashboard

    names = tuple(dict.fromkeys(name for own in reads.values() for name in own))
    items = plain_items(records, reads, place.grid.epsg)
    for item, row in zip(items, reads, strict=True):
        item["properties"]["datetime"] = records.starts[row]
    with named_by_text():
        cube = stackstac.stack(
            items,
            assets=list(names),
            epsg=place.grid.epsg,
            resolution=(place.grid.xres, place.grid.yres),
            bounds=place.bounds,
            snap_bounds=False,
            rescale=False,
            dtype=form.dtype,
            fill_value=form.dtype.type(form.fill),
            sortby_date=False,
            xy_coords="center",
            properties=False,
            band_coords=False,
            chunksize=(1, reads_per_chunk, place.chunks, place.chunks),
            errors_as_nodata=(),  # stackstac's default makes nodata of what is not there
            reader=form.reader,
        )
    if cube.shape[2:] != place.shape:
        raise GridError(
            "cube", f"{cube.shape[2:]} pixels from stackstac", f"{place.shape} on the grid asked for"
        )
    at = {
        (int(row), str(name)): (record, read)
        for record, row in enumerate(cube["id"].values)
        for read, name in enumerate(cube["band"].values)
    }
    return Stack(cube.data, cube["x"].values, cube["y"].values, at)


@dataclass(frozen=True)
class GroupCube:
    """The stackstac cube of a compact group of chips, before any pixel is read."""

    grid: Grid
    assets: dict[tuple[int, str], Asset]
    """(record row, band) -> asset, for those that touch the group."""
    windows: dict[int, Window]
    """Chip -> its window in the cube."""


def compact_groups(epsg: NDArray[np.int64], bounds: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
    """Yield runs of consecutive chips of one CRS whose common bounds hold at most SPREAD times their own area.

    A run that does not is cut where the bounds of its two parts become smallest.

    Parameters
    ----------
    epsg
        Shape (chip,).
    bounds
        Shape (chip, 4): xmin, ymin, xmax, ymax.
    """
    for run in np.split(np.arange(len(epsg)), np.flatnonzero(np.diff(epsg)) + 1):
        if len(run):
            yield from _compact(run, bounds)


def _compact(run: NDArray[np.int64], bounds: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
    own = np.unique(bounds[run], axis=0)
    area = np.sum((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]))
    left, right = _areas(bounds[run]), _areas(bounds[run[::-1]])[::-1]
    if left[-1] <= SPREAD * area * (1 + 1e-9):
        yield run
        return
    cut = int(np.argmin(left[:-1] + right[1:])) + 1
    yield from _compact(run[:cut], bounds)
    yield from _compact(run[cut:], bounds)


def _areas(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area of the common bounds of the first 1, 2, 3, ... boxes."""
    low = np.minimum.accumulate(bounds[:, :2], axis=0)
    high = np.maximum.accumulate(bounds[:, 2:], axis=0)
    return np.asarray(np.prod(high - low, axis=1))


def group_cube(
    records: Records,
    rows: Sequence[int],
    bands: Sequence[str],
    epsg: int,
    chips: NDArray[np.int64],
    bounds: NDArray[np.float64],
    pixel: tuple[float, float],
) -> GroupCube:
    """Lay the records of a compact group out as a stackstac cube over the chips' common bounds.

    Parameters
    ----------
    records, rows, bands
        The records that feed any of the chips, and the bands to read.
    epsg
        CRS of the chips.
    chips
        Shape (chip,). Their numbers.
    bounds
        Shape (chip, 4), in the same order.
    pixel
        Width and height of a pixel of the source.
    """
    from stackstac.prepare import prepare_items

    table, spec, _, items = prepare_items(
        plain_items(records, {int(row): {band: Read(band) for band in bands} for row in rows}, epsg),
        assets=list(bands),
        epsg=epsg,
        resolution=pixel,
        bounds=group_box(bounds),
        snap_bounds=False,
        rescale=False,
    )
    assets = {
        (int(items[i]["id"]), href.asset.band): href.asset
        for (i, _), href in np.ndenumerate(table["url"])
        if href is not None
    }
    grid = grid_of(spec)
    windows = windows_of(bounds, grid, pixel).tolist()
    return GroupCube(
        grid, assets, {chip: Window(*own) for chip, own in zip(chips.tolist(), windows, strict=True)}
    )


def group_box(bounds: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return the common bounds of a group's chips, those of its cube."""
    low, high = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
    return (*low.tolist(), *high.tolist())


def windows_of(bounds: NDArray[np.float64], grid: Grid, pixel: tuple[float, float]) -> NDArray[np.int64]:
    """Return the window of each chip in its group's cube, shape (chip, 4): row, col, height, width."""
    width, height = pixel
    offset = (bounds[:, [3, 0]] - [grid.y0, grid.x0]) / [-height, width]
    size = (bounds[:, [3, 2]] - bounds[:, [1, 0]]) / [height, width]
    return np.asarray(np.rint(np.concatenate([offset, size], axis=1)), dtype=np.int64)


def touches(asset: Asset, epsg: int, box: tuple[float, float, float, float]) -> bool:
    """Tell whether a raster shares ground with a cube, as stackstac does: by its bounds in the cube's CRS."""
    from stackstac.geom_utils import bounds_overlap

    image = asset.image
    return bool(bounds_overlap(_box_in(image.transform, image.width, image.height, asset.epsg, epsg), box))
