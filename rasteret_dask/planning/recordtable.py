# SPDX-License-Identifier: Apache-2.0
"""The records that a plan chooses, as Arrow: only the columns asked for, some rows at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from rasteret_dask.crs import text
from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.display.tableview import Columns
from rasteret_dask.errors import SchemaError
from rasteret_dask.lists import listed
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import Harmonize, Map, Merge, Node, Source, leaves
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, expression, filter_batches, keep_whole, pushed_filter, scan
from rasteret_dask.table import rowgroups
from rasteret_dask.table.barehrefs import hosts_of
from rasteret_dask.table.records import Records

__all__ = [
    "Summary",
    "batches",
    "count",
    "data_source",
    "dataset",
    "looks",
    "schema",
    "signed_hosts",
    "stream",
    "stream_schema",
    "summary",
    "table",
]

_GEOARROW = {
    b"ARROW:extension:name": b"geoarrow.wkb",
    b"ARROW:extension:metadata": json.dumps({"crs": "OGC:CRS84", "crs_type": "authority_code"}).encode(),
}


def table(query: Query, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the records of a plan, all columns or some.

    Raises
    ------
    SchemaError
        When there is no such column.
    """
    whole = _checked(schema(query), columns, query.plan)
    return pa.Table.from_batches(batches(query, columns), whole)


def schema(query: Query) -> pa.Schema:
    """Return the schema of a plan's records: that of its table, or what the tables of a merge have together."""
    found = [query.tables[source.token].schema for source in leaves(query.plan)]
    return found[0] if len(found) == 1 else pa.unify_schemas(found, promote_options="default")


def batches(query: Query, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the records of a plan, source by source; a column that one source lacks is null there."""
    whole = _checked(schema(query), columns, query.plan)
    sources = _scans(optimize(query.plan))
    if sources is None:
        for member in query.members(optimize(query.plan)):
            own = member.table.select([c for c in whole.names if c in member.table.column_names])
            yield from _alike(own, whole).to_batches()
        return
    for source in sources:
        known = query.tables[source.token].schema.names
        own_columns = [c for c in whole.names if c in known]
        for part in _parts(source, query.tables, own_columns):
            yield from _alike(part, whole).to_batches()


def head(query: Query, n: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the first ``n`` records of a plan; no more are read than come with them."""
    found: list[pa.RecordBatch] = []
    left = n
    for batch in batches(query, columns):
        found.append(batch.slice(0, left))
        left -= len(found[-1])
        if left <= 0:
            break
    return pa.Table.from_batches(found, _checked(schema(query), columns, query.plan))


def stream(query: Query) -> pa.RecordBatchReader:
    """Return the records of a plan as a reader of :func:`stream_schema`."""
    marked = stream_schema(query)
    found = batches(query)
    first = list(itertools.islice(found, 1))  # what is wrong with the plan is raised here, as it is
    rows = (pa.RecordBatch.from_arrays(b.columns, schema=marked) for b in itertools.chain(first, found))
    return pa.RecordBatchReader.from_batches(marked, rows)


def stream_schema(query: Query) -> pa.Schema:
    """Return the schema of a plan's records, ``geometry`` marked as GeoArrow's WKB in OGC:CRS84."""
    whole = schema(query)
    at = whole.get_field_index("geometry")
    return whole.set(at, whole.field(at).with_metadata(_GEOARROW))


def dataset(query: Query) -> pads.Dataset:
    """Return the records of a plan as a Dataset: lazy where a scan can decide all that was asked for."""
    sources = _scans(optimize(query.plan))
    if sources is None or len(sources) != 1 or not _is_pushed(sources[0], query.tables) or sources[0].bands:
        return pads.dataset(table(query))
    data = query.tables[sources[0].token]
    base = data if isinstance(data, pads.Dataset) else pads.dataset(data)
    where = pushed_filter(sources[0].where, data.schema)
    return base if where is None else base.filter(where)


def count(query: Query) -> int:
    """Return how many records a plan chooses; only the columns that decide it are read."""
    sources = _scans(optimize(query.plan))
    if sources is None or not all(_is_pushed(s, query.tables) for s in sources):
        return sum(batch.num_rows for batch in batches(query, ["id"]))
    return sum(
        rowgroups.count(query.tables[s.token], pushed_filter(s.where, query.tables[s.token].schema))
        for s in sources
    )


def looks(records: pa.Table) -> Columns:
    """Return what is printed of records: their headers and assets are counted, not shown."""
    rows = records.select(["id", "datetime", "platform", "eo:cloud_cover", "bbox"]).to_pylist()
    codes = Records(records).epsg.tolist()
    bands = [count for chunk in records.column("assets").chunks for count in np.diff(chunk.offsets).tolist()]
    return {
        "id": [row["id"] for row in rows],
        "datetime": [
            None if row["datetime"] is None else f"{row['datetime']:%Y-%m-%d %H:%M}" for row in rows
        ],
        "platform": [row["platform"] for row in rows],
        "bands": bands,
        "cloud, %": [row["eo:cloud_cover"] for row in rows],
        "CRS": [text(code) if code else None for code in codes],
        "bounds": [None if row["bbox"] is None else _degrees(row["bbox"].values()) for row in rows],
    }


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """What a collection holds."""

    name: str
    data_source: str
    records: int
    start: str | None
    """ISO 8601 in UTC: the first record's datetime."""
    end: str | None
    """The last record's."""
    bounds: tuple[float, float, float, float] | None
    """(west, south, east, north) in degrees, of all records' boxes."""
    crs: tuple[str, ...]
    """What the records' CRSs are called: ``"EPSG:32633"``, or the name of one without a code."""
    bands: tuple[str, ...]
    columns: tuple[str, ...]
    """Those that not every record table has."""

    @property
    def _card(self) -> Card:
        dates = "none" if self.start is None else f"{self.start} to {self.end}"
        rows = [
            Fact("source", self.data_source or "unknown"),
            Fact("dates", dates),
            Fact(
                "bounds",
                "none" if self.bounds is None else f"{_degrees(self.bounds)} (west, south, east, north)",
            ),
            Fact("CRS", listed(self.crs, "CRSs") or "none"),
            Fact("bands", listed(self.bands, "bands", 16) or "none"),
        ]
        if self.columns:
            rows.append(
                Fact("columns", f"{listed(self.columns, 'columns')}, beside those of every record table")
            )
        return Card(f"{self.name}: {counted(self.records, 'record')}", rows)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def _degrees(bounds: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in bounds)


def summary(query: Query, name: str, further: Sequence[str]) -> Summary:
    """Return what the records of a plan hold; tile tables are not read."""
    found = table(query, ["datetime", "collection", "bbox", "proj:epsg", "proj:wkt2", "assets"])
    time = pc.min_max(found.column("datetime")).as_py()
    boxes = found.column("bbox").combine_chunks()
    edges = [pc.struct_field(boxes, n) for n in ("xmin", "ymin", "xmax", "ymax")]
    bounds = [f(e).as_py() for f, e in zip((pc.min, pc.min, pc.max, pc.max), edges, strict=True)]
    codes = np.unique(Records(found).epsg)
    return Summary(
        name=name,
        data_source=data_source(found),
        records=len(found),
        start=None if time["min"] is None else time["min"].isoformat(),
        end=None if time["max"] is None else time["max"].isoformat(),
        bounds=None if None in bounds else (bounds[0], bounds[1], bounds[2], bounds[3]),
        crs=tuple(text(c) for c in codes.tolist() if c),
        bands=Records(found).bands if len(found) else (),
        columns=tuple(further),
    )


def signed_hosts(query: Query) -> tuple[str, ...]:
    """Return the hosts whose hrefs arrived signed, as the tables of a plan name them."""
    schemas = (query.tables[source.token].schema for source in leaves(query.plan))
    return tuple(sorted({host for one in schemas for host in hosts_of(one) or ()}))


def data_source(records: pa.Table) -> str:
    """Return what a table's metadata says its records come from, else its collections, joined by ``+``."""
    said = (records.schema.metadata or {}).get(b"data_source")
    if said:
        return str(said.decode())
    names = records.column("collection").unique().drop_null().to_pylist()
    return "+".join(names)


def _checked(whole: pa.Schema, columns: Sequence[str] | None, plan: Node) -> pa.Schema:
    unknown = [c for c in columns or () if c not in whole.names]
    if unknown:
        name = "+".join(dict.fromkeys(source.name for source in leaves(plan)))
        known = f"among {', '.join(whole.names)}"
        raise SchemaError(f"records of {name!r}", f"no column {', '.join(unknown)}", known)
    return whole if columns is None else pa.schema([whole.field(c) for c in columns], whole.metadata)


def _scans(node: Node) -> tuple[Source, ...] | None:
    """Return the sources whose rows, one after another, are a plan's; None where other steps choose rows."""
    match node:
        case Source():
            return (node,)
        case Harmonize(child) | Map(child):
            return _scans(child)
        case Merge(below):
            found = [_scans(child) for child in below]
            names = [s.name for own in found for s in own or ()]
            if None in found or len(set(names)) != len(names):  # evaluate says what is wrong with the names
                return None
            return tuple(s for own in found for s in own or ())
    return None


def _parts(source: Source, tables: Mapping[str, Table], columns: list[str]) -> Iterator[pa.Table]:
    on_assets = any(p[0] in ("readable", "has_bands") for p in source.where)
    if not on_assets and (source.bands is None or not {"assets", "headers_metadata"} & set(columns)):
        for batch in filter_batches(tables[source.token], source.where, source.name, columns):
            yield pa.Table.from_batches([batch])
        return
    found = scan(source, tables, list(dict.fromkeys([*columns, "assets"])))
    yield keep_whole(found, source.where, source.bands).select(columns)


def _is_pushed(source: Source, tables: Mapping[str, Table]) -> bool:
    return all(expression(p, tables[source.token].schema) is not None for p in source.where)


def _alike(part: pa.Table, whole: pa.Schema) -> pa.Table:
    if part.schema.names == whole.names:
        return part.cast(whole)
    return pa.concat_tables([whole.empty_table(), part], promote_options="default").cast(whole)
