# SPDX-License-Identifier: Apache-2.0
"""A source's predicates and bands, applied to its table: filters go to the Parquet scan where they can."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import shapely
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.footprint import area_of, box_around, placed
from rasteret_dask.net.remotefs import version_of
from rasteret_dask.planning.calls import condition
from rasteret_dask.planning.plan import Predicate, Source
from rasteret_dask.rules.masks import ANY_QUALITY, QUALITY
from rasteret_dask.table import rowgroups
from rasteret_dask.table.leftassets import without_left_assets
from rasteret_dask.table.records import RECORD_SCHEMA, Records
from rasteret_dask.table.timing import stamp_of

__all__ = [
    "Table",
    "alone",
    "as_table",
    "expression",
    "filter_batches",
    "filter_table",
    "keep_whole",
    "named_in",
    "nothing_left",
    "pushed_filter",
    "scan",
    "token_of",
]

Table: TypeAlias = "pa.Table | pads.Dataset"

IN_BOX = ("bbox", "intersects")
"""Of a predicate on a box: row groups are left out by the records' boxes, records by their outlines."""

_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def scan(source: Source, tables: Mapping[str, Table], columns: Sequence[str] | None = None) -> pa.Table:
    """Read the records of one source that fulfil its predicates, with the assets its bands name.

    Parameters
    ----------
    source
        A source of the plan.
    tables
        The tables that sources name.
    columns
        Read only these; None: all.

    Raises
    ------
    PlanError
        When a predicate names a column that is neither in the table nor among any record's properties.
    """
    data = tables[source.token]
    table = filter_table(data, source.where, source.name, columns)
    return table if source.bands is None else _only_bands(table, source.bands)


def as_table(data: Table) -> pa.Table:
    """Return a table or dataset as a table."""
    return data if isinstance(data, pa.Table) else data.to_table()


def filter_table(
    data: Table, where: Sequence[Predicate], name: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the rows of a table or dataset that fulfil all predicates but those on assets, and some columns."""
    if isinstance(data, pa.Table) and all(_is_on_assets(p, data.schema) for p in where):
        return data if columns is None else data.select(list(columns))
    schema = data.schema if columns is None else pa.schema([data.schema.field(c) for c in columns])
    return pa.Table.from_batches(filter_batches(data, where, name, columns), schema)


def alone(data: Table, where: Sequence[Predicate], name: str) -> str:
    """Say how many rows each predicate would leave alone, where all of them together leave none."""
    left = [filter_table(data, (predicate,), name).num_rows for predicate in where]
    words = (f"{column} {op} {value!r}" for column, op, value in where)
    return ", ".join(f"{word} alone leaves {n:,}" for word, n in zip(words, left, strict=True))


def nothing_left(data: Table, where: Sequence[Predicate], name: str) -> str:
    """Say in a user's words why predicates leave none of a table's records: which of them leaves none, of what.

    Those on assets are not asked.
    """
    count = filter_table(data, (), name, ["id"]).num_rows
    if not count:
        return "its table is empty"
    asked = [p for p in where if not _is_on_assets(p, data.schema)]
    left = [filter_table(data, (p,), name, ["id"]).num_rows for p in asked]
    alone = [p for p, n in zip(asked, left, strict=True) if not n]
    if alone:
        return "; ".join(_leaves_none(p, data, count) for p in alone)
    each = ", ".join(f"{condition(p)} leaves {n:,}" for p, n in zip(asked, left, strict=True))
    return f"of {count:,} records, alone {each}; together none" if each else f"of {count:,} records"


def _leaves_none(predicate: Predicate, data: Table, count: int) -> str:
    _, op, value = predicate
    if op == "overlaps":
        times = filter_table(data, (), "", ["datetime"]).column("datetime")
        ends = pc.min_max(times).as_py()
        known = (
            "" if ends["min"] is None else f"; theirs are {ends['min']:%Y-%m-%d} to {ends['max']:%Y-%m-%d}"
        )
        return f"no record {condition(predicate)}{known}"
    if op in ("intersects", "near"):
        boxes = filter_table(data, (), "", ["bbox"]).column("bbox").combine_chunks()
        sides = [pc.struct_field(boxes, side) for side in ("xmin", "ymin", "xmax", "ymax")]
        bounds = [f(side).as_py() for f, side in zip((pc.min, pc.min, pc.max, pc.max), sides, strict=True)]
        wanted = tuple(value) if isinstance(value, tuple) else box_around(_area(predicate))
        what = "the bbox" if predicate[:2] == IN_BOX else "the area" if op == "intersects" else "the AOI"
        around = f"{what} ({_degrees(wanted)}{', with a split cell around it' if op == 'near' else ''})"
        if None in bounds:
            return f"no record lies on {around}"
        outside = (
            wanted[2] < bounds[0] or wanted[0] > bounds[2] or wanted[3] < bounds[1] or wanted[1] > bounds[3]
        )
        lies = "lies outside" if outside else "touches no record, though it lies within"
        return f"{around} {lies} the records' bounds ({_degrees(bounds)})"
    return f"{condition(predicate)} leaves none of {count:,} records"


def _degrees(bounds: Sequence[Any]) -> str:
    return ", ".join(f"{value:.6g}" for value in bounds)


def filter_batches(
    data: Table, where: Sequence[Predicate], name: str, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of :func:`filter_table`, some at a time."""
    schema = data.schema
    pushed = pushed_filter(where, schema)
    outlined = "geometry" in schema.names
    late = [
        p for p in where
        if not _is_on_assets(p, schema) and (expression(p, schema) is None or (outlined and p[:2] == IN_BOX))
    ]  # fmt: skip
    if not late:
        yield from rowgroups.batches(data, pushed, columns)
        return
    wanted = {"geometry" if p[1] == "intersects" else "properties" for p in late}
    needed = [c for c in sorted(wanted) if c in schema.names]
    met = {p: p[1] == "intersects" for p in late}

    def keep(table: pa.Table) -> NDArray[np.bool_]:
        rows = np.ones(table.num_rows, dtype=bool)
        for predicate in late:
            hit, known = _late(predicate, table)
            rows &= hit
            met[predicate] |= known
        return rows

    yield from rowgroups.batches(data, pushed, columns, keep, needed)
    unknown = [p[0] for p, known in met.items() if not known]
    if unknown and rowgroups.count(data, pushed):
        raise PlanError(
            f"filter on column {unknown[0]!r} of {name!r}",
            "no such column and no record with such a property",
            f"one of {', '.join(schema.names)}, or a STAC property",
        )


def pushed_filter(where: Sequence[Predicate], schema: pa.Schema) -> pc.Expression | None:
    """Return what the scan itself can filter by: all it can decide, and boxes of geometries; None: nothing."""
    found = [expression(p, schema) for p in where]
    found += [_near(p) for p in where if p[:2] == ("geometry", "intersects") and "bbox" in schema.names]
    given = [e for e in found if e is not None]
    return functools.reduce(operator.and_, given) if given else None


def expression(predicate: Predicate, schema: pa.Schema) -> pc.Expression | None:
    """Return a predicate as a filter of the scan, or None when only Python can decide it."""
    column, op, value = predicate
    if op == "overlaps":
        return _overlaps(predicate)
    if op in ("intersects", "near") and column == "bbox":
        return _in_box(tuple(value), unknown=op == "near")  # type: ignore[arg-type]
    if op == "intersects" or column not in schema.names:
        return None
    kind = schema.field(column).type
    if op in ("in", "not in"):
        try:
            inside = pc.field(column).isin(pa.array([_typed(v, kind) for v in value], kind))  # type: ignore[union-attr]
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
            raise _misfit(predicate, f"a column of type {kind}", "values of it") from error
        return inside if op == "in" else ~inside
    if value is None:
        return pc.field(column).is_null() if op == "==" else ~pc.field(column).is_null()
    try:
        scalar = pa.scalar(_typed(value, kind), kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise _misfit(predicate, f"a column of type {kind}", "a value of it") from error
    return _COMPARE[op](pc.field(column), scalar)


def _typed(value: Any, kind: pa.DataType) -> Any:
    """Return ISO 8601 text as the time that a column of times is compared with."""
    if value is None or not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return value
    stamp = stamp_of(str(value))
    return stamp.date() if pa.types.is_date(kind) else stamp


def _misfit(predicate: Predicate, trouble: str, expected: str) -> PlanError:
    column, op, value = predicate
    return PlanError(f"where({column!r}, {op!r}, {value!r})"[:200], trouble, expected)


def _in_box(box: tuple[float, ...], *, unknown: bool) -> pc.Expression:
    """Return whether a record's box touches (west, south, east, north), however their degrees are counted.

    West of its east a box is taken as it is, else it crosses the antimeridian. A record's box across the
    antimeridian has its west east of its east: then it is positive, its east negative, which statistics of row
    groups can rule out, as they cannot a comparison of two columns.
    """
    west, south, east, north = box
    east += 360.0 if west > east else 0.0
    own = {n: pc.field("bbox", n) for n in ("xmin", "ymin", "xmax", "ymax")}
    across = (own["xmin"] > 0) & (own["xmax"] < 0)
    lon = pc.scalar(False)
    for turn in (-360.0, 0.0, 360.0):
        starts = own["xmin"] <= east + turn
        lon = lon | (starts & (own["xmax"] >= west + turn))
        lon = lon | (across & starts & (own["xmax"] >= west + turn - 360.0))
    inside = lon & (own["ymin"] <= north) & (own["ymax"] >= south)
    return inside | own["xmin"].is_null() if unknown else inside


def _near(predicate: Predicate) -> pc.Expression:
    return _in_box(box_around(_area(predicate)), unknown=True)


def _area(predicate: Predicate) -> Any:
    try:
        return shapely.from_wkb(bytes.fromhex(str(predicate[2])))
    except (ValueError, shapely.errors.ShapelyError) as error:
        wanted = "WKB in hex; subset(geometries=...) takes all other forms"
        raise _misfit(predicate, str(error), wanted) from error


def _overlaps(predicate: Predicate) -> pc.Expression:
    kind = pa.timestamp("us", "UTC")
    try:
        start, end = (None if v is None else pa.scalar(stamp_of(str(v)), kind) for v in predicate[2])  # type: ignore[union-attr]
    except (TypeError, ValueError, pa.ArrowInvalid) as error:
        raise _misfit(predicate, str(error), "(start, end) in ISO 8601, either may be None") from error
    begins = pc.coalesce(pc.field("start_datetime"), pc.field("datetime"))
    ends = pc.coalesce(pc.field("end_datetime"), pc.field("datetime"))
    instant = ends <= begins
    result = pc.scalar(True)
    if start is not None:
        result = result & ((ends > start) | (instant & (ends >= start)))
        result = result & _either("end_datetime", lambda time: time >= start)
    if end is not None:
        result = result & (begins < end) & _either("start_datetime", lambda time: time < end)
    return result


def _either(column: str, holds: Callable[[pc.Expression], pc.Expression]) -> pc.Expression:
    """Return whether a time holds, or ``datetime`` where it is unknown: unlike coalesce, statistics can tell."""
    known = pc.field(column).is_valid()
    return (known & holds(pc.field(column))) | (~known & holds(pc.field("datetime")))


def _late(predicate: Predicate, table: pa.Table) -> tuple[NDArray[np.bool_], bool]:
    """Return which rows fulfil a predicate, and whether any of them has what it names."""
    column, op, value = predicate
    if op == "intersects":
        in_box = predicate[:2] == IN_BOX
        area = area_of([value]) if in_box else _area(predicate)  # type: ignore[list-item]
        shapes = placed(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))
        hit = np.asarray(shapely.intersects(shapes, area), dtype=bool)
        return hit | shapely.is_missing(shapes) if in_box else hit, True
    found = False
    keep = np.zeros(table.num_rows, dtype=bool)
    properties = table.column("properties").to_pylist() if "properties" in table.column_names else []
    for i, text in enumerate(properties):
        values = json.loads(text) if text else {}
        if column not in values:
            continue
        found = True
        try:
            keep[i] = _compare(values[column], op, value)
        except TypeError as error:
            raise _misfit(
                predicate, f"a property such as {values[column]!r}", "a value of its type"
            ) from error
    return keep, found


def _compare(cell: Any, op: str, value: Any) -> bool:
    if op in ("in", "not in"):
        return bool((cell in value) == (op == "in"))
    if value is None:
        return bool((cell is None) == (op == "=="))
    return cell is not None and bool(_COMPARE[op](cell, value))


def _only_bands(table: pa.Table, wanted: tuple[str, ...]) -> pa.Table:
    """Drop the assets and headers of bands that no wanted name can mean."""
    records = Records(table)
    keep: list[str] = []
    met = {ANY_QUALITY}
    for band in records.bands:
        names = {band}
        for field in ("common_name", "asset"):
            names.update(v for v in records.distinct(band, field) if v)
        roles = records.distinct(band, "role")
        if names & set(wanted) or (ANY_QUALITY in wanted and "quality" in roles):
            keep.append(band)
            met |= names
    if len(keep) == len(records.bands) or not met.issuperset(wanted):  # an unknown name: the error lists all
        return table
    for name in ("assets", "headers_metadata"):
        if name not in table.column_names:
            continue
        at = table.schema.get_field_index(name)
        kept = _filter_map(records.table.column(name), keep, RECORD_SCHEMA.field(name).type)
        table = table.set_column(at, RECORD_SCHEMA.field(name), kept)
    return table


def _filter_map(column: pa.ChunkedArray, keys: list[str], kind: pa.MapType) -> pa.Array:
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    offsets = np.asarray(chunk.offsets)
    first, last = int(offsets[0]), int(offsets[-1])
    stored = chunk.keys  # of the whole buffer, also where the column is a slice of it
    keep = np.array(pc.is_in(stored, value_set=pa.array(keys, pa.string())).to_numpy(zero_copy_only=False))
    keep[:first] = keep[last:] = False
    counted = np.concatenate([[0], np.cumsum(keep)])
    chosen = pa.array(np.flatnonzero(keep))
    return pa.MapArray.from_arrays(
        pa.array(counted[offsets].astype(np.int32)),
        stored.take(chosen),
        chunk.items.take(chosen),
        type=kind,
    )


def _is_on_assets(predicate: Predicate, schema: pa.Schema) -> bool:
    """Return whether :func:`keep_whole` decides a predicate: of records, which have assets."""
    return predicate[0] in ("readable", "has_bands") and {"assets", "id"} <= set(schema.names)


def named_in(where: Sequence[Predicate]) -> tuple[str, ...]:
    """Return the bands that ``has_bands`` names among predicates."""
    names: dict[str, None] = {}
    for predicate in where:
        column, op, value = predicate
        if column == "has_bands":
            if op not in ("==", "in"):
                raise _misfit(predicate, f"the operator {op!r}", "has_bands=['nir', ...]")
            names |= dict.fromkeys((value,) if isinstance(value, str) else tuple(value))  # type: ignore[arg-type]
    return tuple(names)


def keep_whole(table: pa.Table, where: Sequence[Predicate], wanted: Sequence[str] | None = None) -> pa.Table:
    """Return the rows that predicates on assets keep; all where there is none.

    Parameters
    ----------
    table
        Records, with the assets of the bands that are needed.
    where
        ``("has_bands", "in", names)`` keeps records with all of these bands, each by code, common name or asset key;
        ``("readable", "==", True)`` those that have all bands that are wanted, and no asset with an error.
    wanted
        Names of the bands that are needed; None: those that each record has. One that no record has is no reason to
        leave all of them out: the error that it leads to names what there is.
    """
    named = named_in(where)
    if named:
        table = table.filter(pa.array(_has(table, named)))
    for column, _, value in where:
        if column == "readable":
            there = [name for name in wanted or () if _has(table, (name,)).any()]
            readable = _without_errors(table) & _has(table, there)
            table = table.filter(pa.array(readable == bool(value)))
    return table


def _entries(table: pa.Table) -> tuple[pa.MapArray, NDArray[np.int64]]:
    """Return the assets of a table as one array, and the offsets of its rows."""
    chunk = table.column("assets").combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0)
    return chunk, np.asarray(chunk.offsets, dtype=np.int64)


def _counted(flags: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shape (record,). How many entries of each record are True."""
    counted = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(counted[offsets[1:]] - counted[offsets[:-1]])


def _has(table: pa.Table, names: Sequence[str]) -> NDArray[np.bool_]:
    """Shape (record,). True where a record has all bands of these names."""
    chunk, offsets = _entries(table)
    result = np.ones(table.num_rows, dtype=bool)
    for name in names:
        if name == ANY_QUALITY:
            met = pc.is_in(
                pc.utf8_lower(chunk.keys), pa.array([quality.band.casefold() for quality in QUALITY])
            )
        else:
            places = [
                chunk.keys,
                *(pc.struct_field(chunk.items, field) for field in ("common_name", "asset")),
            ]
            met = functools.reduce(pc.or_, (pc.fill_null(pc.equal(own, name), False) for own in places))
        result &= _counted(met.to_numpy(zero_copy_only=False), offsets) > 0
    return result


def _without_errors(table: pa.Table) -> NDArray[np.bool_]:
    """Shape (record,). True where no asset left in the table has an error."""
    chunk, offsets = _entries(table)
    failed = pc.is_valid(pc.struct_field(chunk.items, "error")).to_numpy(zero_copy_only=False)
    return np.asarray(_counted(failed, offsets) == 0)


def token_of(data: Table) -> str:
    """Return what a table is known by: a digest of its content, or of its files' names, sizes and times."""
    if not isinstance(data, pa.Table):
        files = getattr(data, "files", [])
        if not files:
            return token_of(data.to_table())
        parts = [str(without_left_assets(data.schema))]
        for path in files:
            size = data.filesystem.get_file_info(path).size
            parts.append(f"{path}|{size}|{version_of(data.filesystem, path)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    sink = hashlib.sha256(str(without_left_assets(data.schema)).encode())
    for batch in data.to_batches():
        sink.update(batch.serialize())
    return sink.hexdigest()[:32]
