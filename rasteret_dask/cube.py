"""Records on a grid become a stackstac cube; the one module that touches stackstac."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import stackstac
import xarray as xr
from numpy.typing import NDArray
from rasterio.enums import Resampling
from stackstac.prepare import prepare_items

from rasteret_dask.errors import GridError
from rasteret_dask.grid import northern
from rasteret_dask.reader import Grid, Request, Session, Window
from rasteret_dask.records import Asset, Records

__all__ = [
    "AssetHref",
    "NATURAL",
    "GroupCube",
    "Kernel",
    "RecordReader",
    "compact_groups",
    "group_cube",
    "stack",
]

SPREAD = 1.5
"""A group's common bounds hold at most this many times the pixels of its chips."""


class Kernel(NamedTuple):
    """How pixels are brought onto a grid that is not their own."""

    resampling: str | None = None
    """GDAL's name; None: by the band's role."""
    decode: str | None = None
    """What is done to the stored numbers before; see Request."""


NATURAL = Kernel()


class AssetHref(str):
    """An href that carries the asset it names, cached header and all, through stackstac's asset table."""

    asset: Asset
    kernel: Kernel

    def __new__(cls, asset: Asset, kernel: Kernel) -> AssetHref:
        """Make the href of one asset."""
        # Text decides Dask's token of the table, so it tells apart whatever reads other pixels.
        read = "/".join(str(part) for part in (asset.band_index, asset.size, asset.etag, kernel))
        self = super().__new__(cls, f"{asset.href}#{asset.record_id}/{asset.band}/{read}")
        self.asset = asset
        self.kernel = kernel
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return AssetHref, (self.asset, self.kernel)


class RecordReader:
    """stackstac's reader protocol over cached headers: no header is requested again.

    Each read gives the pixels of one asset inside one window of the cube, warped only where the grids differ.
    """

    def __init__(
        self,
        *,
        url: AssetHref,
        spec: Any,
        resampling: Resampling,
        dtype: np.dtype[Any],
        fill_value: Any,
        scale_offset: tuple[float, float],
        gdal_env: Any = None,
        errors_as_nodata: tuple[Exception, ...] = (),
    ) -> None:
        self.url = url
        self.grid = grid_of(spec)
        self.dtype = np.dtype(dtype)
        self.fill_value = fill_value

    def read(self, window: Any, **_kwargs: Any) -> NDArray[Any]:
        """Return the window's pixels, shape (y, x), in the cube's dtype; invalid ones hold its fill value."""
        own = Window(int(window.row_off), int(window.col_off), int(window.height), int(window.width))
        with Session(threads=1) as session:
            request = Request(self.url.asset, self.grid, (own,), *self.url.kernel)
            block = session.read_block([request])[0]
        values = block.values[0].astype(self.dtype, copy=False)
        return np.asarray(np.where(block.valid[0], values, self.dtype.type(self.fill_value)))

    def close(self) -> None:
        """Do nothing: files are closed after each read."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def grid_of(spec: Any) -> Grid:
    """Return the pixel grid of a stackstac RasterSpec."""
    xmin, _, _, ymax = spec.bounds
    xres, yres = spec.resolutions_xy
    return Grid(int(spec.epsg), float(xmin), float(ymax), float(xres), float(yres))


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
            a, b, c, d, e, f = asset.image.transform
            assets[band] = {
                "href": AssetHref(asset, kernel),
                "proj:epsg": own,
                "proj:transform": [a, b, c, d, e, f + moved],
                "proj:shape": [asset.image.height, asset.image.width],
            }
        stamp = records.starts[int(row)]
        items.append({"id": str(int(row)), "properties": {"datetime": stamp}, "assets": assets})
    return items


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
    cube = stackstac.stack(
        plain_items(records, rows, bands, grid.epsg, kernel),
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
        reader=RecordReader,
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

    Parameters
    ----------
    epsg
        Shape (chip,).
    bounds
        Shape (chip, 4): xmin, ymin, xmax, ymax.
    """
    first = 0
    for chip in range(1, len(epsg) + 1):
        if chip < len(epsg) and epsg[chip] == epsg[first] and _compact(bounds[first : chip + 1]):
            continue
        yield np.arange(first, chip)
        first = chip


def _compact(bounds: NDArray[np.float64]) -> bool:
    low, high = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    own = np.unique(bounds, axis=0)
    area = float(np.sum((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])))
    return bool(np.prod(high - low) <= SPREAD * area * (1 + 1e-9))


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
