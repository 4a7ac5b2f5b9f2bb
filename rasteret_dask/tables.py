"""Any Arrow or Parquet table of scenes becomes records; further columns stay."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import shapely
from shapely.errors import ShapelyError

from rasteret_dask.bands import Dataset
from rasteret_dask.describe import Described, describe
from rasteret_dask.errors import RasteretDaskError, SchemaError
from rasteret_dask.headers import read_headers
from rasteret_dask.layers import Layer, layers_of
from rasteret_dask.records import ASSET_TYPE, LEVEL_TYPE, RECORD_SCHEMA, conform
from rasteret_dask.sources import read_table
from rasteret_dask.stac import facts_of, known_dataset
from rasteret_dask.trust import checked, resolve

__all__ = ["table_to_records"]

_REQUIRED = ("id", "datetime", "geometry", "assets")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DERIVED = ("eo:cloud_cover", "platform", "datatake", "orbit", "tile", "baseline", "created")


def table_to_records(
    table_or_path: Any,
    *,
    name: str,
    dataset: str | None = None,
    column_map: Mapping[str, str] | None = None,
    headers: bool = True,
    workers: int = 16,
) -> pa.Table:
    """Turn a table of scenes into a record table.

    Parameters
    ----------
    table_or_path
        An Arrow table, or the path or URL of a Parquet file, with ``id``, ``datetime``, ``geometry`` (WKB or
        WKT, lon/lat) and ``assets``: a map or struct of {band: {href, band_index, ...}}. Tables that rasteret
        wrote are of that kind.
    name
        What the table is called in messages.
    dataset
        Name of a known dataset, where the ``collection`` column does not say it.
    column_map
        {name in the table: name in RECORD_SCHEMA}.
    headers
        Read the headers of assets that have none in the table.
    workers
        Requests in flight.

    Returns
    -------
    pyarrow.Table
        Of RECORD_SCHEMA, with the table's further columns behind it. A table that has all its headers passes
        as it is. rasteret's ``<band>_metadata`` columns are left out: the headers are read anew.

    Raises
    ------
    SchemaError
        When a required column is missing or has another type.
    TrustError
        When a table from a URL names local paths.
    """
    place = os.fspath(table_or_path) if isinstance(table_or_path, str | os.PathLike) else None
    table = read_table(place) if place is not None else table_or_path
    if not isinstance(table, pa.Table):
        raise SchemaError(f"records of {name!r}", f"a {type(table).__name__}", "an Arrow table or a path")
    table = _renamed(table, column_map, name)
    if _is_complete(table) or (not headers and "headers_metadata" in table.column_names):
        return conform(table, name)
    kind = table.schema.field("assets").type
    if not (pa.types.is_map(kind) or pa.types.is_struct(kind)):
        wanted = "a map or struct of {band: {href, band_index}}"
        raise SchemaError(f"column 'assets' of {name!r}", f"type {kind}", wanted)
    table = _with_plain_types(table, name)
    rows = _rows(table)
    layers = [_layers(row, dataset, place) for row in rows]
    found = read_headers([x.href for own in layers for x in own], workers) if headers else None
    described = [describe(own, row, found) for own, row in zip(layers, rows, strict=True)]
    return conform(_filled(table, rows, described), name)


def _renamed(table: pa.Table, column_map: Mapping[str, str] | None, name: str) -> pa.Table:
    names = dict(column_map or {})
    unknown = [c for c in names if c not in table.column_names]
    if unknown:
        raise SchemaError(
            f"column_map of {name!r}",
            f"no column {', '.join(unknown)} (columns: {', '.join(table.column_names)})",
            "{name in the table: name in the records}",
        )
    table = table.rename_columns([names.get(c, c) for c in table.column_names])
    missing = [c for c in _REQUIRED if c not in table.column_names]
    if missing:
        raise SchemaError(
            f"records of {name!r}",
            f"no column {', '.join(missing)} (columns: {', '.join(table.column_names)})",
            f"at least {', '.join(_REQUIRED)}",
            "Say what yours are called: column_map={'my_name': 'name'}.",
        )
    return table


def _is_complete(table: pa.Table) -> bool:
    """Return whether every asset has its levels, or the reason why it has none."""
    if "headers_metadata" not in table.column_names:
        return False
    assets, levels = table.schema.field("assets").type, table.schema.field("headers_metadata").type
    if not pa.types.is_map(assets) or not pa.types.is_map(levels) or assets.item_type != ASSET_TYPE:
        return False
    if levels.item_type != pa.list_(LEVEL_TYPE):
        return False
    own, headers = table.column("assets").combine_chunks(), table.column("headers_metadata").combine_chunks()
    if table.num_rows == 0:
        return True
    lacking = pc.equal(pc.fill_null(pc.list_value_length(headers.items), 0), 0)
    silent = pc.is_null(pc.struct_field(own.items, "error"))
    same = len(lacking) == len(silent)
    return same and not pc.any(pc.and_(lacking, silent)).as_py()


def _with_plain_types(table: pa.Table, name: str) -> pa.Table:
    """Return the table with geometry as WKB, aware times, and without rasteret's header columns."""
    gone = [f.name for f in table.schema if f.name.endswith("_metadata") and pa.types.is_struct(f.type)]
    gone += [c for c in ("headers_metadata",) if c in table.column_names]
    table = table.drop_columns(gone)
    for field in list(table.schema):
        column = table.column(field.name)
        if isinstance(field.type, pa.BaseExtensionType):
            column = pa.chunked_array([c.storage for c in column.chunks], type=field.type.storage_type)
        if field.name == "geometry" and _is_text(column.type):
            column = _wkb(column, name)
        if field.name in ("datetime", "start_datetime", "end_datetime", "created"):
            column = _times(column, field.name, name)
        table = table.set_column(table.schema.get_field_index(field.name), field.name, column)
    return table


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _wkb(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        shapes = shapely.from_wkt(column.to_pylist())
    except ShapelyError as error:
        raise SchemaError(f"column 'geometry' of {name!r}", str(error), "WKB, or WKT") from error
    return pa.chunked_array([pa.array(list(shapely.to_wkb(shapes)), pa.binary())])


def _times(column: pa.ChunkedArray, field: str, name: str) -> pa.ChunkedArray:
    kind = pa.timestamp("us", tz="UTC")
    try:
        if _is_text(column.type):
            texts = [None if t is None else dt.datetime.fromisoformat(t) for t in column.to_pylist()]
            aware = [t if t is None or t.tzinfo else t.replace(tzinfo=dt.UTC) for t in texts]
            return pa.chunked_array([pa.array(aware, kind)])
        if pa.types.is_timestamp(column.type):  # finer than microseconds is cut, not refused
            return column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(kind)
        return column.cast(pa.timestamp("us")).cast(kind)
    except (ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SchemaError(f"column {field!r} of {name!r}", str(error), "times") from error


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the columns that describe a scene, without its geometry, as STAC properties."""
    return list(table.drop_columns(["geometry"]).to_pylist())


def _layers(row: Mapping[str, Any], dataset: str | None, place: str | None) -> list[Layer]:
    """Return all bands of a row, named by the dataset where it knows them, else as the table does."""
    assets = row["assets"]
    cells = dict(assets) if isinstance(assets, list) else dict(assets or {})
    cells = {band: cell for band, cell in cells.items() if cell is not None and cell.get("href")}
    known = known_dataset(dataset, row.get("collection"))
    layers = []
    for band, cell in cells.items():
        subject = f"record {row['id']!r}, asset {band!r}"
        href = checked(resolve(cell["href"], place), local=_is_here(place), subject=subject)
        layer = _layer(row, band, cell, known)
        layers.append(replace(layer, href=href, band_index=int(cell.get("band_index") or 0)))
    return layers


def _layer(row: Mapping[str, Any], band: str, cell: Mapping[str, Any], known: Dataset | None) -> Layer:
    # a table's band is one band of its file, whatever the file is called
    asset = {**cell, "type": "image/tiff", "bands": [{"name": band}]}
    item = {"assets": {band: asset}, "properties": row}
    layer = next(iter(layers_of(item, known).values()), None) or layers_of(item, None)[band]
    return replace(layer, asset=cell.get("asset") or band)


def _is_here(place: str | None) -> bool:
    return place is None or "://" not in place or place.startswith("file://")


def _filled(table: pa.Table, rows: list[dict[str, Any]], described: list[Described]) -> pa.Table:
    """Return the table with every column of RECORD_SCHEMA that rows and headers settle."""
    columns: dict[str, list[Any]] = {
        "assets": [list(d.assets) for d in described],
        "headers_metadata": [list(d.levels) for d in described],
        "proj:epsg": [d.epsg or row.get("proj:epsg") for d, row in zip(described, rows, strict=True)],
    }
    outlines = table.column("geometry").to_pylist()
    outlines = [g or d.footprint for g, d in zip(outlines, described, strict=True)]
    columns["geometry"] = outlines
    bounds = [None if g is None else list(map(float, shapely.from_wkb(g).bounds)) for g in outlines]
    boxes = [
        row.get("scene_bbox") or _corners(row.get("bbox")) or b for row, b in zip(rows, bounds, strict=True)
    ]
    columns["scene_bbox"] = boxes
    columns["bbox"] = [None if b is None else dict(zip(_CORNERS, b, strict=True)) for b in boxes]
    facts = [_facts(row) for row in rows]
    for field in _DERIVED:
        columns[field] = [
            fact.get(field) if row.get(field) is None or field == "platform" else row[field]
            for row, fact in zip(rows, facts, strict=True)
        ]
    for field, values in columns.items():
        column = pa.array(values, RECORD_SCHEMA.field(field).type)
        at = table.schema.get_field_index(field)
        table = table.append_column(field, column) if at < 0 else table.set_column(at, field, column)
    return table


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return facts_of(row)
    except (ValueError, TypeError, RasteretDaskError) as error:
        raise SchemaError(
            f"record {row.get('id')!r}", str(error), "STAC properties in their own types"
        ) from error


def _corners(bbox: Any) -> list[float] | None:
    if isinstance(bbox, Mapping) and all(bbox.get(c) is not None for c in _CORNERS):
        return [float(bbox[c]) for c in _CORNERS]
    if isinstance(bbox, list) and len(bbox) == 4:
        return [float(v) for v in bbox]
    return None
