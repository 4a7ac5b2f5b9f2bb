"""Tables become collections: of this package's own schema, rasteret's, STAC GeoParquet, or any other of scenes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as pads

from rasteret_dask.catalogs.signing import is_ready_made
from rasteret_dask.collection import Collection
from rasteret_dask.errors import (
    PlanError,
    ReadError,
    SchemaError,
    SignedHrefsWarning,
    SourceError,
    user_level,
)
from rasteret_dask.formats import check_table
from rasteret_dask.ingest.sources import read_items, read_table
from rasteret_dask.ingest.stac import LeftOut, items_to_table
from rasteret_dask.ingest.tables import check_hrefs, table_to_records
from rasteret_dask.net.places import Place
from rasteret_dask.net.remote import redact
from rasteret_dask.net.remotefs import filesystem
from rasteret_dask.planning.plan import Source
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.rules.kinds import KindName, checked_kinds
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.assetkinds import check_kind_names, with_kinds
from rasteret_dask.table.barehrefs import holds_credentials, hosts_of, marked, stripped
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.rasteretio import header_columns
from rasteret_dask.table.records import RECORD_SCHEMA, conform
from rasteret_dask.table.rowgroups import hrefs
from rasteret_dask.table.schema import REQUIRED

__all__ = ["as_collection", "build_from_table", "load", "warn_signed"]


def build_from_table(
    table: Any,
    *,
    name: str,
    data_source: str | None = None,
    dataset: str | None = None,
    column_map: Mapping[str, str] | None = None,
    href_column: str | None = None,
    band_index_map: Mapping[str, int] | None = None,
    headers: bool = True,
    on_error: Literal["skip", "raise"] = "raise",
    kinds: Mapping[str, KindName] | None = None,
) -> Collection:
    """Build a collection from any Arrow or Parquet table with ``id, datetime, geometry, assets``.

    Parameters
    ----------
    table
        An Arrow table, the path or URL of a Parquet file, or what :func:`as_collection` takes.
    name
        What the collection is called.
    data_source
        As in :func:`as_collection`.
    dataset
        Name of a known dataset where the ``collection`` column does not say it.
    column_map
        {your column: our column}.
    href_column, band_index_map
        For tables of one file a row: the column with its URL, and {band: position in the file, from 0}.
    headers
        Read the headers of assets that have none in the table.
    on_error
        ``"raise"`` stops at the first broken row; ``"skip"`` leaves broken rows out, with one warning that counts
        and names them. A file without a readable header breaks no row: its bands keep the reason, and cannot be used.
    kinds
        What bands are, where nothing tells, or something else does: ``{"map": "class"}``; see
        :meth:`Collection.harmonize`. A table may tell it in ``assets``, as ``kind`` of a band.

    Raises
    ------
    SchemaError
        When a required column is missing or has another type.
    SourceError
        When a row is broken and ``on_error="raise"``, or none is left.
    TrustError
        When a table from a URL names local paths.
    PlanError
        When ``on_error`` is none of these.
    """
    if on_error not in ("skip", "raise"):
        raise PlanError("on_error", repr(on_error), "'skip' or 'raise'")
    named = checked_kinds(kinds, "build_from_table(kinds=)")
    broken = LeftOut(on_error == "skip")
    records = table_to_records(
        table, name=name, dataset=dataset, column_map=column_map,
        href_column=href_column, band_index_map=band_index_map, headers=headers, broken=broken,
    )  # fmt: skip
    if broken.items:
        warnings.warn(broken.note(name), UserWarning, stacklevel=2)
    check_kind_names([records], named, "build_from_table(kinds=)")
    records = with_kinds(records, named)
    return as_collection(records, name=name, data_source=data_source)


def as_collection(table: Any, *, name: str | None = None, data_source: str | None = None) -> Collection:
    """Wrap a record table or dataset; no file is read.

    Parameters
    ----------
    table
        An Arrow table or dataset, a GeoDataFrame, or anything with ``__arrow_c_stream__`` (Polars, DuckDB). Optional
        columns may be missing; what others tell is derived (see :func:`schema.conform`). Acquisitions of a table
        without ``platform`` and ``datatake`` are records of one collection that start within ten minutes, and
        intervals need ``start_datetime`` and ``end_datetime``. rasteret's own tables serve their full resolution.
    name
        What the collection is called; None: what the table's metadata says.
    data_source
        What the records come from, in words: kept in the schema's metadata, told by :meth:`Collection.describe`,
        written by :meth:`Collection.export`. It decides nothing: bands, scales and masks are in ``assets``.

    Raises
    ------
    SchemaError
        When required columns are missing or of another type, or the headers are not in the table.
    """
    data = as_arrow(table, name or "table")
    check_table(f"records of {name or 'a table'!r}", data.schema.metadata)
    told = {k.decode(): v.decode() for k, v in (data.schema.metadata or {}).items() if k in _KEPT}
    called = name or told.get("name") or "table"
    records: Table
    if isinstance(data, pads.Dataset) and _has_schema(data.schema) and not _is_signed(data):
        records = data
    else:
        whole = data if isinstance(data, pa.Table) else data.to_table()
        if header_columns(whole.schema):
            whole = table_to_records(whole, name=called, headers=False)
        elif "headers_metadata" not in whole.column_names and set(REQUIRED) <= set(whole.column_names):
            raise SchemaError(
                f"records of {called!r}",
                "no column headers_metadata, which holds the files' headers",
                "a table that was built before",
                f"build_from_table(table, name={called!r}) reads the headers, once.",
            )
        before = hosts_of(whole.schema) or ()
        records = LeftAssets.of(whole.schema).marked(marked(stripped(conform(whole, called)), before))
        warn_signed(called, [host for host in hosts_of(records.schema) or () if host not in before])
    source = data_source or told.get("data_source")
    if source:
        records = _named_source(records, source)
    token = token_of(records)
    return Collection(Query(Source(called, token), {token: records}))


def warn_signed(name: str, hosts: Iterable[str]) -> None:
    """Warn of hosts for which only this process has a signature: it came with the hrefs."""
    ready = [host for host in hosts if is_ready_made(host)]
    if ready:
        warnings.warn(
            f"{name}: hrefs of {', '.join(ready)} arrived with signatures or passwords. They stay in this process's "
            "memory, also for the Dask workers that read for it; no table, plan or store holds them. Other processes "
            "need a signer: rd.sign('https://host', 'module:name'), see docs/credentials.md.",
            SignedHrefsWarning,
            stacklevel=user_level(),
        )


def _is_signed(data: pads.Dataset) -> bool:
    """Return whether hrefs hold credentials; tables that name their signed hosts were looked through before."""
    return hosts_of(data.schema) is None and holds_credentials(hrefs(data))


_KEPT = (b"name", b"data_source")


def _named_source(records: Table, source: str) -> Table:
    metadata = {**(records.schema.metadata or {}), b"data_source": source.encode()}
    if isinstance(records, pa.Table):
        return records.replace_schema_metadata(metadata)
    return records.replace_schema(records.schema.with_metadata(metadata))


def _has_schema(schema: pa.Schema) -> bool:
    return all(f.name in schema.names and schema.field(f.name).type == f.type for f in RECORD_SCHEMA)


def load(path: str | os.PathLike[str], name: str | None = None, *, headers: bool = True) -> Collection:
    """Open a Parquet file, a directory of them, or the URL of either.

    Parameters
    ----------
    path
        A local path, or a URL of scheme file, http, https, s3, gs or az (of http, a file's). What
        :meth:`Collection.export` and :func:`build` wrote stays where it is: filters go to its scan, and only row
        groups and columns that a plan needs are read. Tables of rasteret, STAC GeoParquet and others with ``id``,
        ``datetime``, ``geometry`` and ``assets`` are read whole, and the headers of their files once.
    name
        What the collection is called; None: the file's name.
    headers
        Of tables without this package's headers: whether to read them from the files.

    Raises
    ------
    SourceError
        When there is nothing, or no Parquet.
    SchemaError
        When it is a table of something else; the message says of what, and who takes it.
    TrustError
        When a table from a URL names local paths.
    """
    here = Place.of(path)
    place = here.url
    called = name or os.path.splitext(os.path.basename(place.partition("?")[0].rstrip("/")))[0]
    data = _opened(here)
    schema = data.schema
    check_table(f"table {redact(place)}", schema.metadata)
    if isinstance(data, pads.Dataset) and not data.files:
        raise SourceError(
            f"table {redact(place)}", "a directory with no file of records", "Parquet files in it"
        )
    if _has_schema(schema):
        if not here.is_local:
            check_hrefs(hrefs(data), place)
        return as_collection(data, name=called)
    if "stac_version" in schema.names:
        left = LeftAssets()
        table = items_to_table(read_items(place), name=called, headers=headers, left=left)
        return as_collection(left.marked(table), name=called)
    if {"id", "datetime", "geometry", "assets"} <= set(schema.names):
        return build_from_table(place, name=called, headers=headers)
    raise SchemaError(f"table {redact(place)}", *_unknown(schema, called))


def _opened(here: Place) -> Table:
    """Return a local or remote file or directory, lazily where it can be."""
    place, expected = here.url, "a Parquet file, or a directory of them"
    if not here.is_local and "?" in place:  # a signature, which must not be kept in what is sent about
        return read_table(place)
    try:
        if here.is_local:
            return pads.dataset(place, partitioning="hive" if os.path.isdir(place) else None)
        return pads.dataset(place, filesystem=filesystem(), partitioning="hive")
    except FileNotFoundError as error:
        raise SourceError(f"table {redact(place)}", "nothing there", expected) from error
    except ReadError:  # a server that knows no ranges: all of it, or the error that tells why not
        return read_table(place)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"table {redact(place)}", redact(str(error))[:300], expected) from None


def _unknown(schema: pa.Schema, name: str) -> tuple[str, str, str]:
    """Return what a table is instead of one of scenes, what was expected, and who takes it."""
    names = schema.names
    expected = "a table of scenes: id, datetime, geometry, assets"
    columns = f"columns {', '.join(names[:12])}" + (", ..." if len(names) > 12 else "")
    if "chip_id" in names:
        return f"a table of chips ({columns})", expected, "chips.with_table(path) takes it."
    missing = [c for c in ("id", "datetime", "geometry", "assets") if c not in names]
    urls = [c for c in names if c.lower() in ("href", "url", "path", "location", "filename", "file")]
    if urls and "assets" in missing:
        remedy = (
            f"build_from_table(path, name={name!r}, href_column={urls[0]!r}, band_index_map={{'band': 0}}, "
            "column_map={'yours': 'ours'}) takes a table of one file a row."
        )
    elif "geometry" in names and "assets" in missing:
        remedy = "Geometries without scenes are an aoi=, at= or geometries= of other calls."
    else:
        remedy = f"build_from_table(path, name={name!r}, column_map={{'yours': 'ours'}}) renames columns."
    return f"no column {', '.join(missing)} ({columns})", expected, remedy
