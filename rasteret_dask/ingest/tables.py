# SPDX-License-Identifier: Apache-2.0
"""Any Arrow or Parquet table of scenes becomes records; further columns stay."""

from __future__ import annotations

import datetime as dt
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import shapely
from shapely.errors import ShapelyError

from rasteret_dask.catalogs.bands import Dataset
from rasteret_dask.catalogs.signing import keep_apart
from rasteret_dask.errors import RasteretDaskError, SchemaError, SourceError
from rasteret_dask.extent import misplaced
from rasteret_dask.footprint import box_of, placed_wkb
from rasteret_dask.headers.nodata import number_of, spelled, text_of
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.ingest.describe import Described, contradictions, contradictions_note, describe
from rasteret_dask.ingest.sources import (
    BROKEN,
    check_href,
    is_from_afar,
    read_table,
    reason_of,
    rename_columns,
    short,
)
from rasteret_dask.ingest.stac import LeftOut, facts_of, instant, known_dataset, rows_to_table
from rasteret_dask.net.remote import redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.rules.kinds import KINDS, KindName, quality_kind
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.itemcrs import crs_columns, stated_crs
from rasteret_dask.table.layers import Layer, layers_of
from rasteret_dask.table.rasteretio import header_columns, level_of
from rasteret_dask.table.records import ASSET_TYPE, LEVEL_TYPE, RECORD_SCHEMA, conform
from rasteret_dask.table.schema import check_columns, plain

__all__ = ["check_hrefs", "table_to_records"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DERIVED = ("eo:cloud_cover", "platform", "datatake", "orbit", "tile", "baseline", "created")


def table_to_records(
    table_or_path: Any,
    *,
    name: str,
    dataset: str | None = None,
    column_map: Mapping[str, str] | None = None,
    headers: bool | Mapping[str, Header | str] = True,
    workers: int = 16,
    broken: LeftOut | None = None,
    crs: int | None = None,
) -> pa.Table:
    """Turn a table of scenes into a record table.

    Parameters
    ----------
    table_or_path
        What :func:`anytable.as_arrow` takes, or the path or URL of a Parquet file, with ``id``, ``datetime``,
        ``geometry`` (WKB or WKT, lon/lat) and ``assets``: a map or struct of {band: {href, band_index, ...}}.
        Tables that rasteret wrote are of that kind.
    name
        What the table is called in messages.
    dataset
        Name of a known dataset, where the ``collection`` column does not say it.
    column_map
        {name in the table: name in RECORD_SCHEMA}.
    headers
        Read the headers of assets that have none in the table; or {href: header, or why it is unreadable}, where they
        were read before. Without, rasteret's header columns serve, which tell of the full resolution only: no
        overviews, no masks.
    workers
        Requests in flight.
    broken
        Takes the broken rows, where they are to be left out; None: the first one is an error.
    crs
        The CRS of files that have none, where the table states none.

    Returns
    -------
    pyarrow.Table
        Of RECORD_SCHEMA, with the table's further columns behind it. A table that has all its headers passes
        as it is. rasteret's ``<band>_metadata`` columns are left out.

    Raises
    ------
    SchemaError
        When a required column is missing or has another type.
    SourceError
        When a row is broken (see ``broken``), or none is left.
    TrustError
        When a table from a URL names local paths (see ``broken``).
    """
    broken = LeftOut(False) if broken is None else broken
    place = os.fspath(table_or_path) if isinstance(table_or_path, str | os.PathLike) else None
    found_table = read_table(place) if place is not None else as_arrow(table_or_path, name)
    table = found_table if isinstance(found_table, pa.Table) else found_table.to_table()
    table = rename_columns(table, column_map, name)
    check_columns(
        table,
        name,
        "Say what yours are called: column_map={'my_name': 'name'}; build_from_files takes a table of one file a row.",
    )
    if _is_complete(table) or (not headers and "headers_metadata" in table.column_names):
        check_hrefs(table.column("assets"), place)
        return conform(table, name)
    kind = table.schema.field("assets").type
    if not (pa.types.is_map(kind) or pa.types.is_struct(kind)):
        wanted = "a map or struct of {band: {href, band_index}}"
        raise SchemaError(f"column 'assets' of {name!r}", f"type {kind}", wanted)
    theirs = header_columns(table.schema)
    told = None if headers or not theirs else table.select(theirs).to_pylist()
    table = _with_plain_types(table.drop_columns(list(theirs)), name)
    rows, outlines = _rows(table), table.column("geometry").to_pylist()
    layers: dict[int, list[Layer]] = {}
    for n, row in enumerate(rows):
        with broken.of(str(row["id"])), _told_of(row):
            layers[n] = _layers(row, dataset, place)
    found = headers if isinstance(headers, Mapping) else None
    if headers is True:
        found = read_headers([x.href for own in layers.values() for x in own], workers)
    cells: dict[int, dict[str, Any]] = {}
    for n, own in layers.items():
        with broken.of(str(rows[n]["id"])), _told_of(rows[n]):
            described = describe(own, rows[n], found, _stated(rows[n]) or crs)
            described = described if told is None else _served(described, told[n])
            cells[n] = _cells(rows[n], outlines[n], described)
    counts = sum((contradictions(cell["assets"]) for cell in cells.values()), Counter[str]())
    if counts:
        warnings.warn(contradictions_note(name, counts), UserWarning, stacklevel=4)
    if told is not None:
        warnings.warn(
            f"{name}: rasteret's header columns tell of the full resolution only, so overviews and masks are not "
            "used. build_from_table(...) and load(...) read the files' headers once and know all of them.",
            UserWarning,
            stacklevel=4,
        )
    filled = _filled(table, cells, broken)
    if broken.items and not filled.num_rows:
        raise broken.all_of(name)
    return conform(filled, name)


@contextmanager
def _told_of(row: Mapping[str, Any]) -> Iterator[None]:
    """Say of which record it is that something does not become a row."""
    try:
        yield
    except RasteretDaskError:
        raise
    except BROKEN as error:
        raise SourceError(
            f"record {short(str(row['id']))!r}", reason_of(error), "assets, times and numbers of a scene"
        ) from error


def check_hrefs(assets: pa.ChunkedArray, place: str | None) -> None:
    """Refuse assets of a table from a URL that name places which it must not name.

    Raises
    ------
    TrustError
        When one names a local path, say; see :func:`trust.checked`.
    """
    if _is_here(place):
        return
    for chunk in assets.chunks:
        hrefs = pc.struct_field(chunk.flatten() if not pa.types.is_map(chunk.type) else chunk.items, "href")
        hosts = pc.replace_substring_regex(hrefs, r"^(\w+://[^/]*).*", r"\1")  # few, of very many hrefs
        for host in hosts.unique().drop_null().to_pylist():
            checked(host, local=False, subject=f"table {redact(place or '')}")


def _served(described: Described, row: Mapping[str, Any]) -> Described:
    """Return what rasteret's header columns tell, in place of headers that were not read."""
    assets, levels = [], []
    for (band, asset), (_, own) in zip(described.assets, described.levels, strict=True):
        level = level_of(row, [band, str(asset["asset"])])
        if level is not None:
            header = next(
                h for n in (band, str(asset["asset"])) if (h := row.get(f"{n}_metadata")) is not None
            )
            nodata = spelled(number_of(text_of(header.get("nodata")), level["dtype"]))
            reason = misplaced(
                described.epsg or _stated(row) or 0, level["transform"], level["width"], level["height"]
            )
            refused = asset["error"] if str(asset["error"]).startswith("refused") else None
            refused = refused or (reason and f"refused: {reason}")
            asset = {**asset, "dtype": level["dtype"], "error": refused}
            asset["nodata"] = asset["nodata"] if nodata is None else nodata
            own = () if refused else (level,)
        assets.append((band, asset))
        levels.append((band, own))
    return replace(described, assets=tuple(assets), levels=tuple(levels))


def _is_complete(table: pa.Table) -> bool:
    """Return whether every asset has its levels, or the reason why it has none."""
    if "headers_metadata" not in table.column_names:
        return False
    assets, levels = table.schema.field("assets").type, table.schema.field("headers_metadata").type
    if not pa.types.is_map(assets) or not pa.types.is_map(levels) or not _is_ours(assets.item_type):
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


def _is_ours(kind: pa.DataType) -> bool:
    """Return whether assets are of ``ASSET_TYPE``, or of an older one, which had fewer fields."""
    known = {f.name: f.type for f in ASSET_TYPE}
    names = {f.name for f in kind} if pa.types.is_struct(kind) else set()
    return names >= {"href", "rule", "dtype", "error"} and all(known.get(f.name) == f.type for f in kind)


def _with_plain_types(table: pa.Table, name: str) -> pa.Table:
    """Return the table with ids as text, geometry as WKB and aware times."""
    table = table.drop_columns([c for c in ("headers_metadata",) if c in table.column_names])
    for field in list(table.schema):
        column = plain(table.column(field.name))
        if field.name == "id" and pa.types.is_integer(column.type):
            column = column.cast(pa.string())
        if field.name == "geometry" and _is_text(column.type):
            column = _wkb(column, name)
        if field.name == "datetime" and pa.types.is_integer(column.type):
            table, column = _with_years(table, column), _new_year(column)
        if field.name in ("datetime", "start_datetime", "end_datetime", "created"):
            column = _times(column, field.name, name)
        table = table.set_column(table.schema.get_field_index(field.name), field.name, column)
    return table


def _with_years(table: pa.Table, years: pa.ChunkedArray) -> pa.Table:
    """Return a table of annual scenes with their intervals, unless it tells its own."""
    following = pc.min_element_wise(
        pc.add(years, 1), pa.scalar(dt.MAXYEAR)
    )  # which no column of times passes
    for column, first in (("start_datetime", years), ("end_datetime", following)):
        if column not in table.column_names:
            table = table.append_column(column, _new_year(first))
    return table


def _new_year(years: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.binary_join_element_wise(pc.utf8_lpad(years.cast(pa.string()), 4, "0"), "01-01", "-")
    return pc.strptime(text, format="%Y-%m-%d", unit="us")


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
            return pa.chunked_array([pa.array([instant(t) for t in column.to_pylist()], kind)])
        if pa.types.is_timestamp(column.type):  # finer than microseconds is cut, not refused
            return column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(kind)
        return column.cast(pa.timestamp("us")).cast(kind)
    except (ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SchemaError(f"column {field!r} of {name!r}", str(error), "times") from error


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the columns that describe a scene, without its geometry, as STAC properties."""
    rows = list(table.drop_columns(["geometry"]).to_pylist())
    if "properties" not in table.column_names or not _is_text(table.schema.field("properties").type):
        return rows
    return [{**_json(row["properties"]), **row} for row in rows]


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}  # a column of that name with something else in it
    return found if isinstance(found, dict) else {}


def _layers(row: Mapping[str, Any], dataset: str | None, place: str | None) -> list[Layer]:
    """Return all bands of a row, named by the dataset where it knows them, else as the table does."""
    assets = row["assets"]
    cells = dict(assets) if isinstance(assets, list) else dict(assets or {})
    cells = {band: cell for band, cell in cells.items() if cell is not None and cell.get("href")}
    known = known_dataset(dataset, row.get("collection"))
    local = _is_here(place) and (place is not None or not is_from_afar(row))
    layers = []
    for band, cell in cells.items():
        subject = f"record {short(str(row['id']))!r}, asset {short(band)!r}"
        check_href(cell["href"], subject)
        href = checked(resolve(cell["href"], place), local=local, subject=subject)
        layer = _layer(row, band, cell, known)
        layers.append(replace(layer, href=keep_apart(href), band_index=int(cell.get("band_index") or 0)))
    return layers


def _layer(row: Mapping[str, Any], band: str, cell: Mapping[str, Any], dataset: Dataset | None) -> Layer:
    # a table's band is one band of its file, whatever the file is called
    asset = {**cell, "type": "image/tiff", "bands": [{"name": band}]}
    # and in records Landsat's numbers are OLI's, whatever the platform
    item = {"assets": {band: asset}, "properties": {**row, "platform": None, "eo:platform": None}}
    layer = next(iter(layers_of(item, dataset).values()), None)
    if layer is None:
        layer = replace(next(iter(layers_of(item, None).values())), band=band)
    return replace(layer, asset=cell.get("asset") or band, kind=_kind(band, cell) or layer.kind)


def _kind(band: str, cell: Mapping[str, Any]) -> KindName | None:
    """Return the kind that a table says of a band, or that an older ``role`` tells: it held both."""
    stated = str(cell.get("kind") or cell.get("role"))
    if stated == "quality":
        return quality_kind(band)
    if cell.get("kind") is not None and stated not in KINDS:
        raise SchemaError(
            f"kind of asset {short(band)!r}", repr(stated), f"one of {', '.join(KINDS)}, or null"
        )
    return KINDS[stated].name if stated in KINDS else None


def _is_here(place: str | None) -> bool:
    return place is None or "://" not in place or place.startswith("file://")


def _cells(row: Mapping[str, Any], outline: bytes | None, described: Described) -> dict[str, Any]:
    """Return a row's id, and the columns that it and its files' headers settle."""
    outline = described.footprint if not outline else placed_wkb(outline)
    box = box_of(outline, row.get("scene_bbox") or _corners(row.get("bbox")))
    facts = _facts(row)
    return {
        "id": str(row["id"]),
        "assets": list(described.assets),
        "headers_metadata": list(described.levels),
        **crs_columns(described.epsg or _stated(row)),
        "geometry": outline,
        "scene_bbox": box,
        "bbox": None if box is None else dict(zip(_CORNERS, box, strict=True)),
        **{
            field: facts.get(field) if row.get(field) is None or field == "platform" else row[field]
            for field in _DERIVED
        },
    }


_SETTLED = (
    "assets",
    "headers_metadata",
    "proj:epsg",
    "proj:wkt2",
    "geometry",
    "scene_bbox",
    "bbox",
    *_DERIVED,
)
"""Columns of RECORD_SCHEMA that a row and the headers of its files settle."""


def _filled(table: pa.Table, cells: Mapping[int, Mapping[str, Any]], broken: LeftOut) -> pa.Table:
    """Return the rows of a table that have cells, with these as columns."""
    schema = pa.schema([RECORD_SCHEMA.field(name) for name in ("id", *_SETTLED)])
    numbers = list(cells)
    made, kept = rows_to_table(list(cells.values()), broken, schema)
    if len(kept) < table.num_rows:
        table = table.take(pa.array([numbers[n] for n in kept], pa.int64()))
    for name in _SETTLED:
        at, column = table.schema.get_field_index(name), made.column(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    return table


def _stated(row: Mapping[str, Any]) -> int | None:
    """Return the CRS that a row states: as STAC does, or as rasteret's ``crs`` column."""
    return stated_crs(row) or stated_crs({"proj:code": row.get("crs")})


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
