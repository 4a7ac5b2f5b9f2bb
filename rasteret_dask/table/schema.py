# SPDX-License-Identifier: Apache-2.0
"""The schema that every record table has, and any table with scenes brought to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from rasteret_dask.crs import number, wkt2
from rasteret_dask.errors import GridError, SchemaError
from rasteret_dask.table.assetkinds import derived

__all__ = [
    "ASSET_TYPE",
    "LEVEL_TYPE",
    "RECORD_SCHEMA",
    "REQUIRED",
    "check_columns",
    "conform",
    "luggage_of",
    "plain",
]

CLASS_TYPE = pa.struct([pa.field("value", pa.int64()), pa.field("name", pa.string())])

ASSET_TYPE = pa.struct(
    [
        pa.field("href", pa.string()),
        pa.field("band_index", pa.int32()),  # position in the file, from 0
        pa.field("asset", pa.string()),  # the provider's key
        pa.field("dataset", pa.string()),  # name in bands.DATASETS, or null
        pa.field("common_name", pa.string()),
        pa.field("scale", pa.float64()),
        pa.field("offset", pa.float64()),
        pa.field("rule", pa.string()),  # where scale and offset come from
        pa.field("nodata", pa.string()),  # as headers.nodata spells it: a float would lose large integers
        pa.field("valid_min", pa.float64()),  # numbers below it are nodata too; null: none
        pa.field("valid_max", pa.float64()),
        pa.field("alpha", pa.int32()),  # position of the file's alpha channel, from 0, or null
        pa.field(
            "placement", pa.string()
        ),  # headers.page.Placement: "rotated" or "gcps"; null: along the CRS axes
        pa.field("dtype", pa.string()),  # NumPy name
        pa.field("role", pa.string()),  # bands.Role: "data", or "quality" of a band that serves the others
        pa.field("kind", pa.string()),  # kinds.KindName, null where unknown
        pa.field(
            "classes", pa.list_(CLASS_TYPE)
        ),  # what the codes of a class band stand for; null where unknown
        pa.field("size", pa.int64()),  # bytes of the file when its header was read
        pa.field("etag", pa.string()),
        pa.field("error", pa.string()),  # why the header could not be read, or null
        pa.field("note", pa.string()),  # where the file and the item contradict each other, or null
    ]
)

LEVEL_TYPE = pa.struct(
    [
        pa.field(
            "kind", pa.string()
        ),  # "image", "overview", and "mask", "overview_mask", "alpha", "overview_alpha"
        pa.field("driver", pa.string()),  # GDAL's short name: "GTiff", "JP2OpenJPEG"
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("tile_width", pa.int32()),
        pa.field("tile_height", pa.int32()),
        pa.field("dtype", pa.string()),
        pa.field("byteorder", pa.string()),  # "<" or ">"
        pa.field("compression", pa.int32()),  # TIFF tag 259
        pa.field("predictor", pa.int32()),  # TIFF tag 317
        pa.field("planar", pa.int32()),  # TIFF tag 284: 1 chunky, 2 a plane a band
        pa.field("samples", pa.int32()),
        pa.field("transform", pa.list_(pa.float64(), 6)),  # a, b, c, d, e, f of this level: pixel -> CRS
        pa.field("tile_offsets", pa.list_(pa.int64())),  # of this band's tiles, row by row; empty: unknown
        pa.field("tile_byte_counts", pa.list_(pa.int64())),
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("collection", pa.string()),
        pa.field("datetime", pa.timestamp("us", tz="UTC")),
        pa.field("start_datetime", pa.timestamp("us", tz="UTC")),
        pa.field("end_datetime", pa.timestamp("us", tz="UTC")),
        pa.field("geometry", pa.binary()),  # WKB, lon/lat
        pa.field("bbox", pa.struct([(n, pa.float64()) for n in ("xmin", "ymin", "xmax", "ymax")])),
        pa.field("scene_bbox", pa.list_(pa.float64())),
        pa.field("proj:epsg", pa.int32()),  # as crs.number counts: an EPSG code, negative where there is none
        pa.field("proj:wkt2", pa.string()),  # of a CRS without an EPSG code, else null
        pa.field("eo:cloud_cover", pa.float64()),
        pa.field("platform", pa.string()),
        pa.field("datatake", pa.string()),  # without its processing baseline
        pa.field("sat:orbit_state", pa.string()),  # "ascending" or "descending"
        pa.field("orbit", pa.int32()),  # sat:relative_orbit, or the WRS path
        pa.field("tile", pa.string()),  # grid:code and its like
        pa.field("baseline", pa.string()),
        pa.field("created", pa.timestamp("us", tz="UTC")),
        pa.field("assets", pa.map_(pa.string(), ASSET_TYPE)),
        pa.field("headers_metadata", pa.map_(pa.string(), pa.list_(LEVEL_TYPE))),
        pa.field("properties", pa.string()),  # JSON of STAC properties without a column
    ]
)
"""What every record table has, whatever its source. Users' further columns come behind these."""

REQUIRED = ("id", "datetime", "geometry", "assets")
"""What any table of scenes must have."""
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def check_columns(table: pa.Table, name: str, remedy: str) -> None:
    """Raise a SchemaError, with a remedy, where a table lacks what any table of scenes must have."""
    missing = [c for c in REQUIRED if c not in table.column_names]
    if missing:
        raise SchemaError(
            f"records of {name!r}",
            f"no column {', '.join(missing)} (columns: {', '.join(table.column_names)})",
            f"at least {', '.join(REQUIRED)}",
            remedy,
        )


def conform(table: pa.Table, name: str) -> pa.Table:
    """Bring any table with ``id, datetime, geometry, assets`` to RECORD_SCHEMA; further columns stay behind it.

    Parameters
    ----------
    table
        An Arrow table. Columns of RECORD_SCHEMA are cast to its types; missing optional ones become null.
    name
        What the table is called in messages.

    Notes
    -----
    What a table lost that its other columns tell is there again: boxes by each other or by the outline, and the
    collection by the dataset in ``assets``.

    Raises
    ------
    SchemaError
        When a required column is missing, has another type, an id is null, or an id stands twice.
    """
    check_columns(
        table, name, "Rename your columns, or build the table with build_from_table(column_map=...)."
    )
    columns: dict[str, pa.ChunkedArray] = {}
    for field in RECORD_SCHEMA:
        if field.name not in table.column_names:
            columns[field.name] = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
            continue
        try:
            columns[field.name] = _cast(plain(table.column(field.name)), field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise SchemaError(
                f"column {field.name!r} of the records of {name!r}",
                f"type {table.schema.field(field.name).type} ({error})",
                f"type {field.type}",
                "Cast the column, or build the table with build_from_table.",
            ) from error
    columns["assets"] = derived(columns["assets"], name)
    columns["proj:epsg"], columns["proj:wkt2"] = _crs_columns(columns["proj:epsg"], columns["proj:wkt2"])
    _derive(columns)
    extra = [c for c in table.column_names if c not in RECORD_SCHEMA.names]
    result = pa.Table.from_arrays(
        [*columns.values(), *(table.column(c) for c in extra)],
        schema=pa.schema([*RECORD_SCHEMA, *(table.schema.field(c) for c in extra)]),
    )
    _check_ids(result.column("id"), name)
    return result


def _crs_columns(codes: pa.ChunkedArray, wkts: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return ``proj:epsg`` and ``proj:wkt2`` that agree: each CRS by its number, the WKT2 of those without a code."""
    stated = wkts.unique().drop_null().to_pylist()
    if not stated:
        return codes, wkts
    numbers = {wkt: _number_or_none(wkt) for wkt in stated}
    said = codes.to_pylist()
    both = [
        numbers[wkt] if wkt is not None and (code is None or code < 0) else code
        for code, wkt in zip(said, wkts.to_pylist(), strict=True)
    ]
    kept = [wkt2(code) if code is not None and code < 0 else None for code in both]
    return pa.chunked_array([pa.array(both, pa.int32())]), pa.chunked_array([pa.array(kept, pa.string())])


def luggage_of(table: pa.Table) -> dict[int, str]:
    """Return {number: WKT2} of the CRSs in a record table that have no EPSG code."""
    if "proj:wkt2" not in table.column_names or table.column("proj:wkt2").null_count == table.num_rows:
        return {}
    both = table.select(["proj:epsg", "proj:wkt2"])
    pairs = both.filter(pc.is_valid(both.column("proj:wkt2"))).group_by(both.column_names).aggregate([])
    return {code: wkt for code, wkt in zip(*(c.to_pylist() for c in pairs.columns), strict=True) if code < 0}


def _number_or_none(wkt: str) -> int | None:
    try:
        return number(wkt)
    except GridError:
        return None


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of an extension type (GeoArrow's, say) as what it is stored as."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([c.storage for c in column.chunks], type=column.type.storage_type)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast a column; a list of (key, value) pairs, which is how Polars keeps a map, becomes one."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (pa.types.is_map(kind) and lists and _is_pair(column.type.value_type)):
        return column.cast(kind)
    chunks = []
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        keys, items = (pc.struct_field(chunk.flatten(), i) for i in range(2))
        keys, items = keys.cast(kind.key_type), items.cast(kind.item_type)
        chunks.append(pa.MapArray.from_arrays(pa.array(offsets), keys, items, kind, mask=chunk.is_null()))
    return pa.chunked_array(chunks, type=kind)


def _is_pair(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and kind.num_fields == 2


def _check_ids(ids: pa.ChunkedArray, name: str) -> None:
    if ids.null_count:
        raise SchemaError(f"records of {name!r}", f"{ids.null_count} rows without id", "an id in every row")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0].as_py()
        raise SchemaError(
            f"records of {name!r}",
            f"id {first['values']!r} {first['counts']} times ({len(twice)} ids stand more than once)",
            "unique ids within one collection",
            "Drop the repeated rows, or merge two collections with rd.merge, which keeps them apart.",
        )


def _derive(columns: dict[str, pa.ChunkedArray]) -> None:
    _fill(columns, "scene_bbox", lambda rows: _box_lists(columns, rows))
    _fill(columns, "bbox", lambda rows: _box_structs(columns["scene_bbox"].take(rows)))
    _fill(columns, "collection", lambda rows: _datasets(columns["assets"].take(rows)))


def _fill(
    columns: dict[str, pa.ChunkedArray], name: str, values_of: Callable[[pa.Array], pa.ChunkedArray]
) -> None:
    """Put what a function finds for the rows without a value in their places."""
    column = columns[name].combine_chunks()
    if not column.null_count:
        return
    rows = np.flatnonzero(column.is_null())
    at = np.arange(len(column))
    at[rows] = len(column) + np.arange(len(rows))
    both = pa.chunked_array([column, *values_of(pa.array(rows)).chunks], type=column.type)
    columns[name] = both.combine_chunks().take(pa.array(at))


def _box_lists(columns: dict[str, pa.ChunkedArray], rows: pa.Array) -> pa.ChunkedArray:
    """Return [xmin, ymin, xmax, ymax] of rows, by their ``bbox``, else by their outline."""
    box = columns["bbox"].take(rows).combine_chunks()
    corners = [pc.struct_field(box, c).to_numpy(zero_copy_only=False) for c in _CORNERS]
    said = np.stack(corners, axis=1).astype(float)
    outlines = columns["geometry"].take(rows).to_numpy(zero_copy_only=False)
    drawn = shapely.bounds(shapely.from_wkb(outlines)).reshape(-1, 4)
    found = np.where(np.isfinite(said).all(axis=1, keepdims=True), said, drawn)
    lists = [list(row) if np.isfinite(row).all() else None for row in found]
    return pa.chunked_array([pa.array(lists, RECORD_SCHEMA.field("scene_bbox").type)])


def _box_structs(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return boxes as structs; those of other than four numbers are unknown."""
    values = [v if v is not None and len(v) == 4 else None for v in lists.to_pylist()]
    structs = [None if v is None else dict(zip(_CORNERS, v, strict=True)) for v in values]
    return pa.chunked_array([pa.array(structs, RECORD_SCHEMA.field("bbox").type)])


def _datasets(assets: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the dataset of each row's first asset that names one."""
    found = []
    for own in assets.to_pylist():
        names = [asset["dataset"] for _, asset in own or () if asset and asset["dataset"]]
        found.append(names[0] if names else None)
    return pa.chunked_array([pa.array(found, pa.string())])
