# SPDX-License-Identifier: Apache-2.0
"""Values at points: each the file's own pixel that it lies in, of every acquisition and band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.feeds import source_outlines
from rasteret_dask.chipping.frame import BLOCK_PX
from rasteret_dask.errors import PlanError
from rasteret_dask.extent import is_geographic, metres
from rasteret_dask.geometries.reading import band_names
from rasteret_dask.geometries.rows import Rows, laid, run, settled, squares, window_job
from rasteret_dask.geometries.windows import Geometries, frame_of, geometries_of
from rasteret_dask.grid import northern, transformer
from rasteret_dask.headers.nodata import INEXACT
from rasteret_dask.planning.plan import Harmonize, HarmonizeSpec
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filling import ChipPixels
from rasteret_dask.tasks.job import Shard
from rasteret_dask.zones import UTM

__all__ = ["POINT_SCHEMA", "sample_points"]

POINT_SCHEMA = pa.schema(
    [
        pa.field("point_index", pa.int64()),  # place among the points places
        pa.field("point_x", pa.float64()),  # degrees
        pa.field("point_y", pa.float64()),
        pa.field("point_crs", pa.int32()),
        pa.field("record_id", pa.string()),  # the acquisition's nearest record; null where there is none
        pa.field("datetime", pa.timestamp("us", tz="UTC")),  # start of the acquisition; null where composed
        pa.field("collection", pa.string()),
        pa.field("band", pa.string()),
        pa.field("value", pa.float64()),  # null where invalid
        pa.field("raster_crs", pa.int32()),  # of the record's raster; UTM zones as 326zz
    ]
)
"""What :func:`sample_points` gives; further columns of the points' own table come behind."""

_ORDER = ("__when__", "__pass__", "__band__")

POINTS_A_SHARD = 8192
"""Pixels that are read together: few enough to hold, enough that a tile serves many of them."""

LOOK_M = 15_360.0
"""Side of the squares of ground that points are ordered by, metres."""

GRAIN_PX = 2.0**-16
"""Side of the window that is read at a point, in pixels of the finest band."""

GRAIN_M = 4e-6
"""The same, metres, at least: planning takes windows that share less than a micrometre for neighbours."""


def sample_points(
    query: Query, points: Any, bands: str | Sequence[str] | None, context: ReadContext
) -> pa.Table:
    """Return a table of POINT_SCHEMA: point by point, then by time, then by band; see ``Collection.sample_points``."""
    places = geometries_of(points)
    if set(shapely.get_type_id(places.shape).tolist()) != {0}:
        at = int(np.flatnonzero(shapely.get_type_id(places.shape) != 0)[0])
        raise PlanError(f"point {at}", f"a {places.shape[at].geom_type}", "a point",
                        "Take get_numpy() or get_gdf() for areas, or their centroids.")  # fmt: skip
    taken = [n for n in places.labels.column_names if n in POINT_SCHEMA.names]
    if taken:
        raise PlanError("points", f"columns {', '.join(taken)}, which the result has", "other names",
                        "Give them other names: gdf.rename(columns=...).")  # fmt: skip
    near = shapely.total_bounds(places.shape)
    size = _grain(settled(query, band_names(bands), None, near))
    exact = Harmonize(query.plan, HarmonizeSpec(resampling="nearest"))
    source = settled(query.then(exact), band_names(bands), size, near)
    table = _sampled(source, places, context).sort_by([(n, "ascending") for n in ("point_index", *_ORDER)])
    table = table.drop_columns(list(_ORDER))
    for field, column in zip(places.labels.schema, places.labels.columns, strict=True):
        table = table.append_column(field, column.take(table.column("point_index")))
    return table


def _grain(source: ResolvedSource) -> float:
    """Return the side of the window that is read at a point, metres: far smaller than any pixel.

    The nearest pixel of a file to the window's centre is then the one that the point lies in, in whatever CRS the
    window is laid out, and whatever the size and shape of each band's pixels.
    """
    finest = np.inf
    for member in source.plan.members:
        for band in member.bands:
            transform = source.records.level_field(band, "transform")
            unit = np.array([metres(int(code)) for code in source.records.epsg])
            present = np.asarray(transform.is_valid())
            sides = np.abs(np.stack(transform.drop_null().to_numpy())[:, [0, 4]]).min(axis=1)
            finest = min(finest, float(np.min(sides * unit[present])))
    return max(finest * GRAIN_PX, GRAIN_M)


def _codes(places: Geometries, source: ResolvedSource) -> NDArray[np.int64]:
    """Return the CRS in metres of each point's window: the records' own where there is one, else the point's zone."""
    own = sorted({northern(int(code))[0] for code in np.unique(source.records.epsg)})
    lon, lat = shapely.get_x(places.shape), shapely.get_y(places.shape)
    zone = UTM.codes(lon, lat)
    if len(own) > 1 or is_geographic(own[0]):
        return zone
    there = np.isfinite(transformer(4326, own[0]).transform(lon, lat)).all(axis=0)
    return np.asarray(np.where(there, own[0], zone))


def _windows(places: Geometries, codes: NDArray[np.int64], size: float) -> NDArray[np.float64]:
    """Return the window of each point: its centre lies by less than two sides of it east and south of the point.

    A point on the edge of two pixels so belongs to the one right and below, as in rasterio, though degrees and metres
    do not convert to the last digit.
    """
    xy = shapely.get_coordinates(places.projected(codes))
    col, row = np.floor(xy[:, 0] / size) + 1, np.floor(-xy[:, 1] / size) + 1
    edges = np.stack([col * size, -(row + 1) * size, (col + 1) * size, -row * size], -1)
    return np.asarray(np.round(edges, 9), dtype=np.float64)


def _sampled(source: ResolvedSource, places: Geometries, context: ReadContext) -> pa.Table:
    """Read one pixel a point."""
    plan = source.plan
    found = source_outlines(source)
    codes = _codes(places, source)
    rows = laid(source, found, frame_of(codes, _windows(places, codes, plan.resolution), LOOK_M / BLOCK_PX))
    side, square = squares(rows, 1)
    job, of_chip = window_job(rows, found, side, square, POINTS_A_SHARD), rows.of_chip
    values = np.full((len(rows), len(plan.bands)), plan.fill, dtype=plan.dtype)
    valid = np.zeros((len(rows), 1), dtype=bool)
    when = np.full(len(rows), np.datetime64("NaT", "us"))

    def take(shard: Shard, chips: ChipPixels) -> None:
        own = of_chip[square[shard.start : shard.stop, 0]]
        values[own], valid[own] = chips.values[..., 0, 0], chips.valid[..., 0]
        when[own] = chips.datetime

    run(job, take, context)
    said = ~np.isnan(values) if plan.fill != plan.fill else values != plan.fill
    return _table(places, rows, values, valid | said, when)


def _table(
    places: Geometries,
    rows: Rows,
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    when: NDArray[np.datetime64],
) -> pa.Table:
    """Return a row for each (row, band), with what they are sorted by."""
    source, bands = rows.source, len(rows.source.plan.bands)
    row, band = np.divmod(np.arange(len(rows) * bands), bands)
    point, lead = rows.geometry[row], rows.lead[row]
    record = pa.array(lead, mask=lead < 0)
    own = np.array([northern(int(code))[0] for code in source.records.epsg])
    records, stamp = source.records.table, POINT_SCHEMA.field("datetime").type
    if source.axis is None:
        order = source.passes.start[source.passes.of_record[lead]]
    else:
        order = source.axis.start[rows.slot[row]]
    columns = {
        "point_index": pa.array(point),
        "point_x": pa.array(shapely.get_x(places.shape)[point]),
        "point_y": pa.array(shapely.get_y(places.shape)[point]),
        "point_crs": pa.array(np.full(len(row), 4326, dtype=np.int32)),
        "record_id": records.column("id").take(record),
        "datetime": pa.array(when[row]).cast(stamp),
        "collection": records.column("collection").take(record),
        "band": pa.array(source.plan.bands, pa.string()).take(pa.array(band)),
        "value": pa.array(_doubles(source.plan.name, values, valid).ravel(), mask=~valid.ravel()),
        "raster_crs": pa.array(
            np.where(lead < 0, rows.frame.epsg[rows.window[row]], own[lead]).astype(np.int32)
        ),
    }
    return (
        pa.table(columns, schema=POINT_SCHEMA)
        .append_column("__when__", pa.array(order))
        .append_column("__pass__", pa.array(source.passes.of_record[lead]))
        .append_column("__band__", pa.array(band))
    )


def _doubles(name: str, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return values as float64; PlanError where that would lose what they say."""
    exact = values[valid] if values.dtype.name in INEXACT else values[:0]
    if values.dtype.kind == "c" or (exact.size and (exact.max() > 2**53 or exact.min() < -(2**53))):
        raise PlanError(
            f"sample_points of source {name!r}",
            f"pixels of {values.dtype}" + ("" if values.dtype.kind == "c" else " beyond 2**53"),
            "numbers that the column value (float64) holds",
            "Take get_numpy(points, chip_size=1), which keeps the dtype.",
        )
    return values.astype(np.float64)
