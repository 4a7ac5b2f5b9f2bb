# SPDX-License-Identifier: Apache-2.0
"""Pixels of geometries, read at once: as one array, as a Dataset, or as a frame of arrays of any shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import rioxarray  # noqa: F401  (registers the .rio accessor)
import shapely
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import geometry_mask

from rasteret_dask.chipping.chips import phases
from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.feeds import source_outlines
from rasteret_dask.crs import crs_of, spelled, text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.extras import needs
from rasteret_dask.geometries.rows import Rows, laid, run, settled, squares, window_job
from rasteret_dask.geometries.windows import (
    Geometries,
    PixelGrids,
    codes_of,
    epsg_of,
    frame_of,
    geometries_of,
    own_bounds,
    square_bounds,
)
from rasteret_dask.planning.plan import is_number
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.rules.picks import Scored
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filling import ChipPixels
from rasteret_dask.tasks.job import Shard

__all__ = [
    "WindowRequest",
    "ROW_SCHEMA",
    "RowsToRead",
    "as_dataset",
    "as_frame",
    "as_numpy",
    "band_names",
    "prepared",
    "read",
]

ROW_SCHEMA = pa.schema(
    [
        pa.field("geometry_number", pa.int64()),  # place among the geometries given
        pa.field(
            "record_ids", pa.list_(pa.string())
        ),  # the nearest record first, others fill; none: all is fill
        pa.field("member", pa.string()),  # the member of a merge; several of a composite are joined by +
        pa.field("datetime", pa.timestamp("us", tz="UTC")),  # start of the acquisition; null where composed
        pa.field("slot", pa.timestamp("us", tz="UTC")),  # start of the slot; null without a time axis
        pa.field("epsg", pa.int32()),  # UTM zones as 326zz on both hemispheres
        pa.field("bounds", pa.list_(pa.float64(), 4)),  # xmin, ymin, xmax, ymax
        pa.field("transform", pa.list_(pa.float64(), 6)),  # a, b, c, d, e, f: pixel -> CRS
        pa.field("valid_fraction", pa.float32()),  # of the pixels inside the geometry
    ]
)
"""What the index of :func:`as_numpy` says of each row; columns of the geometries' own table come behind."""


_DIMS = ("geometry", "time", "y", "x")


@dataclass(frozen=True)
class WindowRequest:
    """The windows that a user wants to read: the arguments of ``get_numpy``, ``get_xarray`` and ``get_gdf``.

    Raises
    ------
    PlanError
        Where a size or resolution cannot be.
    """

    geometries: Any
    """In lon/lat, in any form."""
    bands: str | Sequence[str] | None
    resolution: float | None = None
    size: int | None = None
    target_crs: Any = None
    all_touched: bool = False
    context: ReadContext = field(default_factory=ReadContext)

    def __post_init__(self) -> None:
        size = self.size
        if size is not None and (
            isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1
        ):
            raise PlanError("size=", repr(size), "a positive whole number of pixels")
        if self.resolution is not None and not (is_number(self.resolution) and self.resolution > 0):
            raise PlanError("resolution=", repr(self.resolution), "a positive pixel size")


@dataclass(frozen=True)
class RowsToRead:
    """Rows to read, and what they are cut from."""

    rows: Rows
    outlines: Outlines
    geometries: Geometries
    mask: NDArray[Any] | None
    """Shape (geometry,). Outlines in their windows' CRS, outside of which all is fill; None for squares."""
    request: WindowRequest


@dataclass(frozen=True)
class Values:
    """What was read: a list entry a row."""

    pixels: Sequence[NDArray[Any]]
    """Each of shape (band, y, x)."""
    valid: Sequence[NDArray[np.bool_]]
    """Each of shape (y, x)."""
    index: pa.Table
    """ROW_SCHEMA and the geometries' own columns."""


def band_names(bands: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return bands as a tuple; None: all."""
    return None if bands is None else (bands,) if isinstance(bands, str) else tuple(bands)


def prepared(query: Query, request: WindowRequest) -> RowsToRead:
    """Plan which rows a reading has, before any pixel is read.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out.
    """
    geometries = geometries_of(request.geometries)
    taken = [n for n in geometries.labels.column_names if n in ROW_SCHEMA.names]
    if taken:
        raise PlanError("geometries", f"columns {', '.join(taken)}, which every index has", "other names",
                        "Give them other names: gdf.rename(columns=...).")  # fmt: skip
    near = shapely.total_bounds(geometries.shape)
    source = settled(query, band_names(request.bands), request.resolution, near)
    outlines = source_outlines(source)
    target = None if request.target_crs is None else epsg_of(request.target_crs)
    codes = codes_of(geometries, source.records.epsg, target, request.resolution is not None)
    pixels = PixelGrids(source.plan.resolution, {} if request.resolution else phases(source, outlines))
    if target is not None and request.resolution is None:
        _same_unit(target, source)
    mask = None
    if request.size is not None:
        bounds = square_bounds(geometries, codes, pixels, int(request.size))
    elif isinstance(source.plan.pick, Scored) and source.axis is not None:
        pick = source.plan.pick.name
        raise PlanError(f"reading windows with pick={pick!r}", "windows of any shape", "chips of one size",
                        "Say size=, or choose another pick.")  # fmt: skip
    else:
        mask = geometries.projected(codes)
        bounds = own_bounds(mask, codes, pixels)
    return RowsToRead(
        laid(source, outlines, frame_of(codes, bounds, pixels.size)), outlines, geometries, mask, request
    )


def _same_unit(target: int, source: ResolvedSource) -> None:
    own = int(source.records.epsg[0])
    units = [crs_of(code).axis_info[0].unit_name for code in (target, own)]
    if units[0] != units[1]:
        raise GridError(f"target_crs={text(target)}", f"pixels of {source.plan.resolution:g} {units[1]}",
                        f"a pixel size in {units[0]}", "Say it with resolution=.")  # fmt: skip


def read(what: RowsToRead) -> Values:
    """Read all rows; a window of one shape is a part of one array."""
    rows, plan = what.rows, what.rows.source.plan
    shape = rows.shape
    pixels, valid = _room(shape, len(plan.bands), plan.dtype, plan.fill)
    when = np.full(len(rows), np.datetime64("NaT", "us"))
    name = np.full(len(rows), None, dtype=object)
    side, square = squares(rows, what.request.size)
    job, of_chip = window_job(rows, what.outlines, side, square), rows.of_chip

    def take(shard: Shard, chips: ChipPixels) -> None:
        for at, (chip, y, x) in enumerate(square[shard.start : shard.stop].tolist()):
            own = of_chip[chip]
            when[own], name[own] = chips.datetime[at], chips.member[at]
            for slot, row in enumerate(own.tolist()):
                h, w = shape[row] - (y, x)
                pixels[row][:, y : y + side, x : x + side] = chips.values[at, slot][:, :h, :w]
                valid[row][y : y + side, x : x + side] = chips.valid[at, slot][:h, :w]

    run(job, take, what.request.context)
    share = _masked(what, pixels, valid)
    return Values(pixels, valid, _index(what, when, name, share))


def _room(
    shape: NDArray[np.int64], bands: int, dtype: str, fill: float
) -> tuple[Sequence[NDArray[Any]], Sequence[NDArray[np.bool_]]]:
    """Return memory for the rows, one array where they are of one shape."""
    if (shape == shape[0]).all():
        whole = np.full((len(shape), bands, *shape[0].tolist()), fill, dtype=dtype)
        return whole, np.zeros((len(shape), *shape[0].tolist()), dtype=bool)  # type: ignore[return-value]
    return (
        [np.full((bands, h, w), fill, dtype=dtype) for h, w in shape.tolist()],
        [np.zeros((h, w), dtype=bool) for h, w in shape.tolist()],
    )


def _masked(
    what: RowsToRead, pixels: Sequence[NDArray[Any]], valid: Sequence[NDArray[np.bool_]]
) -> NDArray[np.float32]:
    """Make what lies outside the geometries fill; return the share of each row's pixels that are valid."""
    rows, fill = what.rows, what.rows.source.plan.fill
    share = np.array([v.mean() for v in valid], dtype=np.float32)
    if what.mask is None:
        return share
    geometry, last = rows.geometry, -1
    for row, window in enumerate(rows.window.tolist()):
        if window != last:  # rows of one geometry follow each other
            outline = [what.mask[geometry[row]]]
            outside = geometry_mask(
                outline, valid[row].shape, _transform(rows, row), what.request.all_touched
            )
            last, size = window, max(int((~outside).sum()), 1)
        valid[row][outside] = False
        pixels[row][:, outside] = fill
        share[row] = valid[row].sum() / size
    return share


def _transform(rows: Rows, row: int) -> Affine:
    pixel = rows.source.plan.resolution
    xmin, _, _, ymax = rows.frame.bounds[rows.window[row]].tolist()
    return Affine(pixel, 0.0, xmin, 0.0, -pixel, ymax)


def _index(
    what: RowsToRead, when: NDArray[np.datetime64], name: NDArray[Any], share: NDArray[np.float32]
) -> pa.Table:
    rows, source = what.rows, what.rows.source
    first, last = rows.fed()
    entry = np.arange((last - first).sum()) + np.repeat(last - np.cumsum(last - first), last - first)
    ids = pa.array(source.records.ids, pa.string()).take(pa.array(rows.laid.feeds[0].record[entry]))
    bounds, pixel = rows.frame.bounds[rows.window], source.plan.resolution
    zero = np.zeros(len(rows))
    transform = np.stack([zero + pixel, zero, bounds[:, 0], zero, zero - pixel, bounds[:, 3]], -1)
    slots = None if source.axis is None else source.axis.start.astype("datetime64[us]")[rows.slot]
    stamp = ROW_SCHEMA.field("datetime").type
    columns = {
        "geometry_number": pa.array(rows.geometry),
        "record_ids": pa.ListArray.from_arrays(
            pa.array(np.append(0, np.cumsum(last - first)), pa.int32()), ids
        ),
        "member": pa.array([n or None for n in name], pa.string()),
        "datetime": pa.array(when).cast(stamp),
        "slot": pa.nulls(len(rows), stamp) if slots is None else pa.array(slots).cast(stamp),
        "epsg": pa.array(rows.frame.epsg[rows.window].astype(np.int32)),
        "bounds": pa.FixedSizeListArray.from_arrays(pa.array(bounds.ravel()), 4),
        "transform": pa.FixedSizeListArray.from_arrays(pa.array(transform.ravel()), 6),
        "valid_fraction": pa.array(share),
    }
    table = pa.table(columns, schema=ROW_SCHEMA)
    for one, column in zip(what.geometries.labels.schema, what.geometries.labels.columns, strict=True):
        table = table.append_column(one, column.take(pa.array(rows.geometry)))
    return table


def as_numpy(what: RowsToRead) -> tuple[NDArray[Any], pa.Table]:
    """Return the pixels of all rows, shape (row, band, y, x), and their index."""
    _one_shape(what, "get_numpy")
    values = read(what)
    return np.asarray(values.pixels), values.index


def _one_shape(what: RowsToRead, verb: str) -> None:
    shapes = Counter(f"{h} x {w}" for h, w in what.rows.shape.tolist())
    if len(shapes) > 1:
        shown = ", ".join(f"{shape} ({n} rows)" for shape, n in shapes.most_common(5))
        raise PlanError(
            f"{verb} of {len(what.geometries)} geometries", f"windows of {len(shapes)} shapes: {shown}",
            "one shape, so that they are one array",
            "Say size= for windows of one size, or take get_gdf(), where each has its own.",
        )  # fmt: skip


def as_dataset(what: RowsToRead) -> xr.Dataset:
    """Return a Dataset with a variable a band, dims (geometry, time, y, x); without ``geometry`` where there is one."""
    _one_shape(what, "get_xarray")
    values = read(what)
    rows, source = what.rows, what.rows.source
    plan, n = source.plan, len(what.geometries)
    times, step = _steps(rows)
    pixels, valid = np.asarray(values.pixels), np.asarray(values.valid)
    shape = (n, len(times), *valid.shape[1:])
    known = step >= 0
    place = (rows.geometry[known], step[known])
    variables: dict[str, Any] = {}
    for number, (band, unit) in enumerate(zip(plan.bands, plan.units, strict=True)):
        whole = np.full(shape, plan.fill, dtype=plan.dtype)
        whole[place] = pixels[known, number]
        attrs = {} if plan.fill != plan.fill else {"nodata": int(plan.fill)}
        variables[band] = (_DIMS, whole, {"units": unit, **attrs})
    seen = np.zeros(shape, dtype=bool)
    seen[place] = valid[known]
    ids = np.full(shape[:2], "", dtype=object)
    ids[place] = ["+".join(v) for v in values.index.column("record_ids").filter(pa.array(known)).to_pylist()]
    window = rows.window[np.searchsorted(rows.geometry, np.arange(n))]
    bounds = rows.frame.bounds[window]
    labels = {
        c: ("geometry", what.geometries.labels.column(c).to_pandas().to_numpy())
        for c in what.geometries.labels.schema.names
    }
    coordinates = {
        "geometry": np.arange(n),
        "time": times,
        "x_centre": (("geometry", "x"), bounds[:, :1] + (np.arange(shape[3]) + 0.5) * plan.resolution),
        "y_centre": (("geometry", "y"), bounds[:, 3:] - (np.arange(shape[2]) + 0.5) * plan.resolution),
        "epsg": ("geometry", rows.frame.epsg[window].astype(np.int32)),
        "record_ids": (("geometry", "time"), ids),
        **labels,
    }
    dataset = xr.Dataset({**variables, "valid": (_DIMS, seen)}, coordinates)
    return dataset if n > 1 else _alone(dataset)


def _alone(dataset: xr.Dataset) -> xr.Dataset:
    """Return the Dataset of the one geometry, whose x and y are axes."""
    one = dataset.isel(geometry=0)
    one = one.assign_coords(x=("x", one["x_centre"].values), y=("y", one["y_centre"].values))
    code = int(one["epsg"])
    one = one.drop_vars(["geometry", "x_centre", "y_centre", "epsg"])
    return one.rio.write_crs(spelled(code))  # type: ignore[no-any-return]


def _steps(rows: Rows) -> tuple[NDArray[np.datetime64], NDArray[np.int64]]:
    """Return the time coordinate, and each row's place on it; -1 for a row that stands for no acquisition."""
    if rows.source.axis is not None:
        return rows.source.axis.start, rows.slot
    own = np.unique(rows.laid.acquisition)
    number = np.append(rows.laid.acquisition, -1)[rows.chip]
    return rows.source.passes.start[own], np.where(number >= 0, np.searchsorted(own, number), -1)


def as_frame(what: RowsToRead) -> Any:
    """Return a GeoDataFrame in lon/lat with a row for each row and band."""
    with needs("geo", "a GeoDataFrame of pixels"):
        import geopandas

    values = read(what)
    plan, index = what.rows.source.plan, values.index
    frame = index.to_pandas()
    frame["transform"] = [_transform(what.rows, row) for row in range(len(frame))]
    frame["bounds"] = [tuple(b) for b in frame["bounds"]]
    frame["record_ids"] = [list(ids) for ids in frame["record_ids"]]
    lead = what.rows.lead
    for at, (name, column) in enumerate(
        {"record_id": "id", "cloud_cover": "eo:cloud_cover", "collection": "collection"}.items()
    ):
        own = what.rows.source.records.column(column)
        frame.insert(2 + at, name, [None if row < 0 else own[row] for row in lead.tolist()])
    frame = frame.loc[frame.index.repeat(len(plan.bands))].reset_index(drop=True)
    frame["band"] = list(plan.bands) * len(index)
    frame["data"] = [band for row in values.pixels for band in row]
    shapes = what.geometries.shape[frame["geometry_number"].to_numpy()]
    return geopandas.GeoDataFrame(frame, geometry=shapes, crs=4326)
