"""Values at points: each the one pixel that it lies in, of every acquisition and band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import phases
from rasteret_dask.chipping.feeds import source_outlines
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.reading import band_names
from rasteret_dask.geometries.rows import Rows, laid, run, said, settled, squares, window_job
from rasteret_dask.geometries.windows import (
    Geometries,
    PixelGrids,
    codes_of,
    frame_of,
    geometries_of,
    own_bounds,
)
from rasteret_dask.planning.plan import Node
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.planning.scan import Table
from rasteret_dask.tasks.filling import ChipPixels
from rasteret_dask.tasks.job import Shard

__all__ = ["POINT_SCHEMA", "sample_points"]

POINT_SCHEMA = pa.schema(
    [
        pa.field("point_index", pa.int64()),  # place among the points given
        pa.field("point_x", pa.float64()),  # degrees
        pa.field("point_y", pa.float64()),
        pa.field("point_crs", pa.int32()),
        pa.field("record_id", pa.string()),  # the acquisition's nearest record; null where there is none
        pa.field("datetime", pa.timestamp("us", tz="UTC")),  # start of the acquisition; null where composed
        pa.field("collection", pa.string()),
        pa.field("band", pa.string()),
        pa.field("value", pa.float64()),  # null where invalid
        pa.field("raster_crs", pa.int32()),  # of the pixel grid; UTM zones as 326zz
    ]
)
"""What :func:`sample_points` gives; further columns of the points' own table come behind."""

_ORDER = ("__when__", "__pass__", "__band__")

POINTS_A_SHARD = 8192
"""Pixels that are read together: few enough to hold, enough that a tile serves many of them."""


def sample_points(
    plan: Node, tables: Mapping[str, Table], points: Any, bands: str | Sequence[str] | None, on_error: str
) -> pa.Table:
    """Return a table of POINT_SCHEMA: point by point, then by time, then by band; see ``Collection.sample_points``."""
    given = geometries_of(points)
    if set(shapely.get_type_id(given.shape).tolist()) != {0}:
        at = int(np.flatnonzero(shapely.get_type_id(given.shape) != 0)[0])
        raise PlanError(f"point {at}", f"a {given.shape[at].geom_type}", "a point",
                        "Take get_numpy() or get_gdf() for areas, or their centroids.")  # fmt: skip
    taken = [n for n in given.labels.column_names if n in POINT_SCHEMA.names]
    if taken:
        raise PlanError("points", f"columns {', '.join(taken)}, which the result has", "other names",
                        "Give them other names: gdf.rename(columns=...).")  # fmt: skip
    near = shapely.total_bounds(given.shape)
    whole = settled(plan, tables, band_names(bands), None, near)
    parts = []
    same = said(plan, "resolution") is not None or whole.plan.units == "embedding"
    for own in [whole.plan.bands] if same else _alike(whole):  # each band on its own pixels
        source = whole if len(own) == len(whole.plan.bands) else settled(plan, tables, own, None, near)
        parts.append(_sampled(source, given, on_error, [whole.plan.bands.index(b) for b in own]))
    table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in ("point_index", *_ORDER)])
    table = table.drop_columns(list(_ORDER))
    for field, column in zip(given.labels.schema, given.labels.columns, strict=True):
        table = table.append_column(field, column.take(table.column("point_index")))
    return table


def _alike(source: ResolvedSource) -> list[tuple[str, ...]]:
    """Return the bands, those of one native pixel size together."""
    plan, member = source.plan, source.plan.members[0]
    finest: dict[str, float] = {}
    for name, band in zip(plan.bands, member.bands, strict=True):
        transform = source.records.level_field(band, "transform").filter(pa.array(source.member == 0))
        finest[name] = float(np.median(np.abs(np.stack(transform.to_numpy())[:, 0])))
    sizes = dict.fromkeys(round(v, 6) for v in finest.values())
    return [tuple(n for n, v in finest.items() if round(v, 6) == size) for size in sizes]


def _sampled(source: ResolvedSource, given: Geometries, on_error: str, places: list[int]) -> pa.Table:
    """Read one pixel a point; ``places`` says where the bands stand among those asked for."""
    plan = source.plan
    found = source_outlines(source)
    codes = codes_of(given, source.records.epsg, None, False)
    pixels = PixelGrids(plan.resolution, phases(source, found))
    bounds = own_bounds(given.projected(codes), codes, pixels)
    rows = laid(source, found, frame_of(codes, bounds, pixels.size))
    side, square = squares(rows, 1)
    job, of_chip = window_job(rows, found, side, square, POINTS_A_SHARD), rows.of_chip
    values = np.full((len(rows), len(plan.bands)), plan.fill, dtype=plan.dtype)
    valid = np.zeros((len(rows), 1), dtype=bool)
    when = np.full(len(rows), np.datetime64("NaT", "us"))

    def take(shard: Shard, chips: ChipPixels) -> None:
        own = of_chip[square[shard.start : shard.stop, 0]]
        values[own], valid[own] = chips.values[..., 0, 0], chips.valid[..., 0]
        when[own] = chips.datetime

    run(job, take, on_error)
    said = ~np.isnan(values) if np.isnan(plan.fill) else values != plan.fill
    return _table(given, rows, values, valid | said, when, places)


def _table(
    given: Geometries,
    rows: Rows,
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    when: NDArray[np.datetime64],
    places: list[int],
) -> pa.Table:
    """Return a row for each (row, band), with what they are sorted by."""
    source, bands = rows.source, len(places)
    row, band = np.divmod(np.arange(len(rows) * bands), bands)
    point, lead = rows.geometry[row], rows.lead[row]
    record = pa.array(lead, mask=lead < 0)
    records, stamp = source.records.table, POINT_SCHEMA.field("datetime").type
    if source.axis is None:
        order = source.passes.start[source.passes.of_record[lead]]
    else:
        order = source.axis.start[rows.slot[row]]
    columns = {
        "point_index": pa.array(point),
        "point_x": pa.array(shapely.get_x(given.shape)[point]),
        "point_y": pa.array(shapely.get_y(given.shape)[point]),
        "point_crs": pa.array(np.full(len(row), 4326, dtype=np.int32)),
        "record_id": records.column("id").take(record),
        "datetime": pa.array(when[row]).cast(stamp),
        "collection": records.column("collection").take(record),
        "band": pa.array(source.plan.bands, pa.string()).take(pa.array(band)),
        "value": pa.array(values.ravel().astype(np.float64), mask=~valid.ravel()),
        "raster_crs": pa.array(rows.frame.epsg[rows.window[row]].astype(np.int32)),
    }
    return (
        pa.table(columns, schema=POINT_SCHEMA)
        .append_column("__when__", pa.array(order))
        .append_column("__pass__", pa.array(source.passes.of_record[lead]))
        .append_column("__band__", pa.array(np.array(places)[band]))
    )
