"""Records on a grid become a stackstac cube; the one module that touches stackstac."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import stackstac
import xarray as xr
from numpy.typing import NDArray
from stackstac.prepare import prepare_items

from rasteret_dask.errors import GridError
from rasteret_dask.grid import northern
from rasteret_dask.reader.cogreader import NATURAL, AssetHref, CogReader, Kernel, grid_of
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.table.records import Asset, Level, Records

__all__ = ["GroupCube", "compact_groups", "group_cube", "stack"]

SPREAD = 1.5
"""A group's common bounds hold at most this many times the pixels of its chips."""


def plain_items(
    records: Records, rows: Sequence[int], bands: Sequence[str], epsg: int, kernel: Kernel
) -> list[dict[str, Any]]:
    """Return the STAC items, as plain dicts, that stackstac needs to know of some records; ids are row numbers.

    UTM south is told as its northern twin where the cube is in that, so that bounds stay exact.
    """
    items = []
    for row in rows:
        assets = {}
        for band in bands:
            asset = records.asset(int(row), band)
            code, shift = northern(asset.epsg)
            own, moved = (code, shift) if code == epsg else (asset.epsg, 0.0)
            assets[band] = {
                "href": AssetHref(asset, kernel),
                "proj:epsg": own,
                "proj:bbox": _outline(asset.image, moved),
            }
        items.append({"id": str(int(row)), "properties": {}, "assets": assets})
    return items


def _outline(image: Level, moved: float) -> tuple[float, float, float, float]:
    """Return the bounds of a raster; stackstac takes 4 times as long to make them of its transform and shape."""
    a, b, c, d, e, f = image.transform
    xs = [c + a * col + b * row for col in (0, image.width) for row in (0, image.height)]
    ys = [f + d * col + e * row + moved for col in (0, image.width) for row in (0, image.height)]
    return min(xs), min(ys), max(xs), max(ys)


def stack(
    records: Records,
    rows: Sequence[int],
    bands: Sequence[str],
    grid: Grid,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    fill: float,
    kernel: Kernel = NATURAL,
    chunks: int = 1024,
) -> xr.DataArray:
    """Return the lazy cube (time, band, y, x) of some records on a grid, one time step a record, in row order.

    Parameters
    ----------
    records, rows, bands
        Which assets.
    grid, shape
        The grid and its height and width in pixels.
    dtype, fill
        Type of the cube and value of invalid pixels.
    kernel
        How pixels of other grids are resampled.
    chunks
        Side of a Dask chunk, pixels.
    """
    height, width = shape
    bounds = (grid.x0, grid.y0 - height * grid.yres, grid.x0 + width * grid.xres, grid.y0)
    items = plain_items(records, rows, bands, grid.epsg, kernel)
    for item, row in zip(items, rows, strict=True):
        item["properties"]["datetime"] = records.starts[int(row)]
    cube = stackstac.stack(
        items,
        assets=list(bands),
        epsg=grid.epsg,
        resolution=(grid.xres, grid.yres),
        bounds=bounds,
        snap_bounds=False,
        rescale=False,
        dtype=dtype,
        fill_value=dtype.type(fill),
        sortby_date=False,
        xy_coords="center",
        properties=False,
        band_coords=False,
        chunksize=chunks,
        errors_as_nodata=(),  # stackstac's default makes nodata of what is not there
        reader=CogReader,
    )
    if cube.shape[2:] != shape:
        raise GridError("cube", f"{cube.shape[2:]} pixels from stackstac", f"{shape} on the grid asked for")
    plain: xr.DataArray = cube.drop_attrs()
    return plain


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
    resolution: float,
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
    resolution
        Pixel size of the source.
    """
    box = (bounds[:, 0].min(), bounds[:, 1].min(), bounds[:, 2].max(), bounds[:, 3].max())
    table, spec, _, items = prepare_items(
        plain_items(records, rows, bands, epsg, NATURAL),
        assets=list(bands),
        epsg=epsg,
        resolution=resolution,
        bounds=tuple(float(v) for v in box),
        snap_bounds=False,
        rescale=False,
    )
    assets = {
        (int(items[i]["id"]), href.asset.band): href.asset
        for (i, _), href in np.ndenumerate(table["url"])
        if href is not None
    }
    grid = grid_of(spec)
    offset = np.rint((bounds[:, [3, 0]] - [grid.y0, grid.x0]) / [-resolution, resolution]).astype(np.int64)
    size = np.rint((bounds[:, [3, 2]] - bounds[:, [1, 0]]) / resolution).astype(np.int64)
    windows = {
        int(chip): Window(int(r), int(c), int(h), int(w))
        for chip, (r, c), (h, w) in zip(chips, offset, size, strict=True)
    }
    return GroupCube(grid, assets, windows)
