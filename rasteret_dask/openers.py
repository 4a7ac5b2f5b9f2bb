# SPDX-License-Identifier: Apache-2.0
"""Tables and files become collections: tables of this package's schema, rasteret's, STAC GeoParquet, any of scenes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from rasteret_dask.catalogs.signing import is_ready_made
from rasteret_dask.collection import Collection
from rasteret_dask.crs import number
from rasteret_dask.errors import (
    PlanError,
    ReadError,
    SchemaError,
    SignedHrefsWarning,
    SourceError,
    user_level,
)
from rasteret_dask.formats import check_table
from rasteret_dask.ingest.filelist import URLS, call_for
from rasteret_dask.ingest.filenames import Naming
from rasteret_dask.ingest.files import FileScenes, Footprints, files_to_records
from rasteret_dask.ingest.sources import read_items, read_table
from rasteret_dask.ingest.stac import LeftOut, items_to_table
from rasteret_dask.ingest.tables import check_hrefs, table_to_records
from rasteret_dask.net.places import Place
from rasteret_dask.net.remote import redact
from rasteret_dask.net.remotefs import filesystem
from rasteret_dask.planning.origins import BuildCall
from rasteret_dask.planning.plan import Source
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.rules.kinds import KindName, checked_kinds
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.assetkinds import check_kind_names, with_kinds
from rasteret_dask.table.barehrefs import holds_credentials, hosts_of, marked, stripped
from rasteret_dask.table.facts import ENDLESS
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.rasteretio import header_columns
from rasteret_dask.table.records import RECORD_SCHEMA, conform
from rasteret_dask.table.rowgroups import hrefs
from rasteret_dask.table.schema import REQUIRED
from rasteret_dask.words import OnBroken

__all__ = ["as_collection", "build_from_files", "build_from_table", "load", "warn_signed"]


def build_from_table(
    table: Any,
    *,
    name: str,
    data_source: str | None = None,
    dataset: str | None = None,
    column_map: Mapping[str, str] | None = None,
    headers: bool = True,
    on_error: OnBroken = "raise",
    kinds: Mapping[str, KindName] | None = None,
    static: bool = False,
    crs: Any = None,
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
        {your column: our column}. Tables of one file a row are taken by :func:`build_from_files`.
    headers
        Read the headers of assets that have none in the table.
    on_error
        ``"raise"`` stops at the first broken row; ``"skip"`` leaves broken rows out, with one warning that counts
        and names them. A file without a readable header breaks no row: its bands keep the reason, and cannot be used.
    kinds
        What bands are, where nothing tells, or something else does: ``{"map": "class"}``; see
        :meth:`Collection.harmonize`. A table may tell it in ``assets``, as ``kind`` of a band.
    static
        Whether records hold at any time, whatever time they have, if any: elevation, soil. They join with anything.
    crs
        The CRS of files that have none, where the table states none (``proj:code``, ``proj:wkt2``, ...): a code, WKT,
        PROJJSON or a CRS object.

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

    Examples
    --------
    >>> table = collection.to_table(["id", "datetime", "geometry", "assets"])
    >>> again = rd.build_from_table(table, name="again")
    >>> len(again) == len(collection)
    True
    """
    origin = BuildCall.of(build_from_table, locals())
    named = checked_kinds(kinds, "build_from_table(kinds=)")
    broken = LeftOut(_skips(on_error))
    if isinstance(table, str | os.PathLike):
        _refuse_other("build_from_table of", os.fspath(table), name)
    records = table_to_records(
        table, name=name, dataset=dataset, column_map=column_map, headers=headers, broken=broken,
        crs=None if crs is None else number(crs),
    )  # fmt: skip
    if broken.items:
        warnings.warn(broken.note(name), UserWarning, stacklevel=2)
    check_kind_names([records], named, "build_from_table(kinds=)")
    records = with_kinds(records, named)
    made = as_collection(_without_ends(records) if static else records, name=name, data_source=data_source)
    return Collection(made.query.made_by(origin))


def _without_ends(records: pa.Table) -> pa.Table:
    """Return records that hold at any time."""
    for name, edge in zip(("start_datetime", "end_datetime"), ENDLESS, strict=True):
        field = RECORD_SCHEMA.field(name)
        column = pa.repeat(pa.scalar(edge, field.type), records.num_rows)
        records = records.set_column(records.schema.get_field_index(name), field, column)
    return records


def build_from_files(
    files: Any,
    *,
    name: str,
    bands: Sequence[str] | Mapping[str, int] | None = None,
    filename_regex: str | None = None,
    date_format: str = "%Y%m%d",
    date_tag: str | None = None,
    static: bool = False,
    dataset: str | None = None,
    footprints: Footprints = "header",
    column_map: Mapping[str, str] | None = None,
    kinds: Mapping[str, KindName] | None = None,
    on_error: OnBroken = "raise",
    crs: Any = None,
) -> Collection:
    r"""Build a collection from files of your own; place, CRS, nodata and dtype come from their headers.

    Parameters
    ----------
    files
        A file's path or URL; a pattern (``"ortho/**/*.tif"``); a folder or a bucket's prefix (``"s3://bucket/ortho"``),
        with all TIFF and JPEG 2000 files below it; a list of these; or a table with a column ``href``, and
        ``datetime``, ``band``, ``id``, ``geometry`` where there are any: the path or URL of a CSV or Parquet file, a
        DataFrame, anything of Arrow's. Its further columns stay, to filter by.
    name
        What the collection is called.
    bands
        Names of the bands of each file, in order (an alpha channel may be left out); or {band: position in the file,
        from 0}. Where names or rows tell the band, those to keep. None: as the files describe their bands, else
        ``band``, or ``band_1``, ``band_2``, ...
    filename_regex
        A pattern with named groups, searched for in each file's name; one with a slash, in its path below the folder.
        As in TorchGeo, it is verbose: blanks in it do not count. ``date``, or ``start`` and ``stop``, tell the time;
        ``band`` tells the band, and files whose names differ in nothing else are one scene; ``id`` names the scene;
        further groups become columns. Files without it are left out, with a warning.
    date_format
        How the groups date, start and stop are written, as ``strptime`` says it; a year or month is an interval.
    date_tag
        The tag of the files that holds their time: ``"TIFFTAG_DATETIME"``, or an item of GDAL's metadata.
    static
        Whether the files hold at any time (elevation, soil): then they need none, and join with anything.
    dataset
        Name of a known dataset, for scale, kinds and masks of its bands: ``"sentinel-2-l2a"``.
    footprints
        ``"header"``: each scene covers its raster; ``"valid"``: its valid pixels, of which a coarse overview is read.
    column_map
        {your column: our column} of a table.
    kinds
        What bands are: ``{"landuse": "class"}``; see :meth:`Collection.harmonize`.
    on_error
        ``"raise"`` stops at the first file that cannot be read or placed; ``"skip"`` leaves such files out, with one
        warning that counts and names them.
    crs
        The CRS of files that have none: a code, WKT, PROJJSON or a CRS object. What a file states is never replaced.

    Raises
    ------
    SourceError
        When there are no files, nothing tells their time, or files contradict each other.
    SchemaError
        When a table has no column ``href``.
    BandError
        When no file has a band that is asked for.
    PlanError
        When a pattern or another argument makes no sense.

    Notes
    -----
    A file's time is its row's, else its name's, else its tag's. Each file is opened once. Files in long strips work;
    one :class:`UntiledFilesWarning` tells what a chip reads of them.

    Examples
    --------
    >>> l8 = rd.build_from_files(
    ...     "demo/world/landsat-c2-l2/**/*_SR_B[45].TIF",
    ...     name="l8",
    ...     filename_regex=r"_(?P<date>\d{8})_02_T1_(?P<band>SR_B\d)",
    ... )
    >>> len(l8), l8.bands
    (3, ('SR_B4', 'SR_B5'))
    """
    origin = BuildCall.of(build_from_files, locals())
    broken = LeftOut(_skips(on_error))
    named = checked_kinds(kinds, "build_from_files(kinds=)")
    kept = dict(bands) if isinstance(bands, Mapping) else (bands,) if isinstance(bands, str) else bands
    how = FileScenes(
        Naming.of(filename_regex, date_format, date_tag),
        tuple(kept) if isinstance(kept, Sequence) else kept,
        dataset,
        footprints,
        static,
        None if crs is None else number(crs),
    )
    records = files_to_records(files, how, name=name, column_map=column_map, broken=broken)
    if broken.items:
        warnings.warn(broken.note(name), UserWarning, stacklevel=2)
    check_kind_names([records], named, "build_from_files(kinds=)")
    made = as_collection(with_kinds(records, named), name=name)
    return Collection(made.query.made_by(origin))


def as_collection(table: Any, *, name: str | None = None, data_source: str | None = None) -> Collection:
    """Wrap a record table or dataset; no file is read.

    Parameters
    ----------
    table
        An Arrow table or dataset, a GeoDataFrame, or anything with ``__arrow_c_stream__`` (Polars, DuckDB). Optional
        columns may be missing; what others tell is derived (see ``table.schema.conform``). Acquisitions of a table
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

    Examples
    --------
    >>> table = collection.to_table()  # or a Polars, DuckDB or GeoPandas table with these columns
    >>> clear = table.filter(table["eo:cloud_cover"].to_numpy() < 20)
    >>> len(rd.as_collection(clear, name="clear"))
    6
    """
    if isinstance(table, str | os.PathLike):
        _refuse_other("as_collection of", os.fspath(table), name or _stem(os.fspath(table)))
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


def _skips(on_error: str) -> bool:
    if on_error not in ("skip", "raise"):
        raise PlanError("on_error", repr(on_error), "'skip' or 'raise'")
    return on_error == "skip"


def _refuse_other(doing: str, place: str, name: str) -> None:
    """Raise SourceError where another call opens what lies at a place; it names that call."""
    other = call_for(place, name)
    if other is not None:
        raise SourceError(f"{doing} {redact(place)}", other[0], "a Parquet table of scenes", other[1])


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

    Examples
    --------
    >>> collection.export("scenes.parquet")
    >>> len(rd.load("scenes.parquet")) == len(collection)
    True
    """
    origin = BuildCall.of(load, locals())
    here = Place.of(path)
    place = here.url
    called = name or _stem(place)
    _refuse_other("load of", place, called)
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
        return Collection(as_collection(data, name=called).query.made_by(origin))
    if "stac_version" in schema.names:
        left = LeftAssets()
        table = items_to_table(read_items(place), name=called, headers=headers, left=left)
        return Collection(as_collection(left.marked(table), name=called).query.made_by(origin))
    if {"id", "datetime", "geometry", "assets"} <= set(schema.names):
        return build_from_table(place, name=called, headers=headers)
    raise SchemaError(f"table {redact(place)}", *_unknown(schema, called))


def _stem(place: str) -> str:
    return os.path.splitext(os.path.basename(place.partition("?")[0].rstrip("/")))[0]


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
    urls = [c for c in names if c.lower() in ("href", *URLS)]
    if urls and "assets" in missing:
        mapped = "" if urls[0] == "href" else f", column_map={{{urls[0]!r}: 'href'}}"
        remedy = f"build_from_files(path, name={name!r}{mapped}) takes a table of one file a row."
    elif "geometry" in names and "assets" in missing:
        remedy = "Geometries without scenes are an aoi=, at= or geometries= of other calls."
    else:
        remedy = f"build_from_table(path, name={name!r}, column_map={{'yours': 'ours'}}) renames columns."
    return f"no column {', '.join(missing)} ({columns})", expected, remedy
