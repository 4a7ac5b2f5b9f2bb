# SPDX-License-Identifier: Apache-2.0
"""Which files a user means by a path, a pattern, a folder, a bucket's prefix, a list or a table of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from rasteret_dask.errors import ReadError, SchemaError, SourceError
from rasteret_dask.ingest.sources import read_table, rename_columns
from rasteret_dask.lists import first_of
from rasteret_dask.net.places import Place
from rasteret_dask.net.remote import get, is_local, join, listing, local_path, redact
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.rasters import SUFFIXES

__all__ = ["URLS", "FileRow", "FileRows", "call_for", "files_of", "table_at"]

TABLES = (".csv", ".parquet", ".geoparquet", ".pq")
"""How the name of a table of files ends."""

_WILD = re.compile(r"[*?\[]")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file that a user names."""

    href: str
    """A path or URL; relative to the table that names it, if one does."""
    path: str
    """Its path below the folder that was named, with ``/``; the file's name where no folder was."""
    cells: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of a table of files."""


@dataclass(frozen=True, slots=True)
class FileRows:
    """All files that a user names."""

    rows: tuple[FileRow, ...]
    place: str | None = None
    """Path or URL of the table that names them; None: the user names them."""
    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    """{further column of a table: its type}."""


def files_of(files: Any, name: str, column_map: Mapping[str, str] | None = None) -> FileRows:
    """Return the files that a user means.

    Parameters
    ----------
    files
        A path or URL of one file; a pattern (``*``, ``?``, ``[ab]``, ``**`` for any depth); a folder or a bucket's
        prefix, with all TIFF and JPEG 2000 files below it; a list of these; a table with a column ``href``: a
        CSV or Parquet file, a DataFrame, anything of Arrow's.
    name
        What the collection is called in messages.
    column_map
        {column of the table: name here}.

    Returns
    -------
    FileRows
        Sorted by path where files were looked for, else in the order given.

    Raises
    ------
    SourceError
        When there are none.
    SchemaError
        When a table has no column ``href``.
    """
    if isinstance(files, str | os.PathLike):
        text = os.fspath(files)
        if text.partition("?")[0].lower().endswith(TABLES) and not _WILD.search(text):
            return _from_table(table_at(text), name, column_map, Place.of(text).url)
        rows = tuple(_named(text))
    elif isinstance(files, list | tuple | set | frozenset) or (
        isinstance(files, Iterator) and not hasattr(files, "__arrow_c_stream__")
    ):
        ordered = sorted(files, key=str) if isinstance(files, set | frozenset) else files
        rows = tuple(row for one in ordered for row in _named(_text(one, name)))
    else:
        table = as_arrow(files, name)
        return _from_table(table if isinstance(table, pa.Table) else table.to_table(), name, column_map, None)
    if not rows:
        raise SourceError(f"files of {name!r}", "an empty list", "at least one file")
    return FileRows(tuple({row.href: row for row in rows}.values()))


def call_for(place: str, name: str) -> tuple[str, str] | None:
    """Return what lies at a place and the call that opens it, None where none is known.

    Parameters
    ----------
    place
        A path or URL; only its name is looked at where it is remote.
    name
        What the collection would be called.
    """
    bare = (place if is_local(place) else place.partition("?")[0]).rstrip("/")
    lower = bare.lower()
    files = f"rd.build_from_files({bare!r}, name={name!r}, static=True) takes it"
    dated = "filename_regex= or date_tag=, instead of static=True, tells when the files were taken."
    if lower.endswith(SUFFIXES):
        return "a raster", f"{files}; {dated}"
    if lower.endswith(".csv"):
        return (
            "a CSV file",
            f"rd.build_from_files({bare!r}, name={name!r}) takes it: columns href and datetime.",
        )
    if lower.endswith((".json", ".geojson")):
        return "a JSON file", f"rd.build_from_stac({bare!r}, name={name!r}) takes STAC items."
    if not is_local(place) or not os.path.isdir(local_path(place)):
        return None
    folder = local_path(place)
    if os.path.exists(os.path.join(folder, "zarr.json")):
        return "a Zarr store", f"rd.open_chips({bare!r}) opens it."
    catalogs = [n for n in ("catalog.json", "collection.json") if os.path.exists(os.path.join(folder, n))]
    if catalogs:
        root = os.path.join(bare, catalogs[0])
        return "a folder with a STAC catalog", f"rd.build_from_stac({root!r}, name={name!r}) takes it."
    if _holds_rasters(folder):
        return "a folder of rasters", f"{files}; {dated}"
    return None


def _holds_rasters(folder: str) -> bool:
    """Tell whether rasters lie below a folder, before any Parquet file does."""
    for _, _, names in os.walk(folder):
        if any(name.lower().endswith(TABLES) for name in names):
            return False
        if any(name.lower().endswith(SUFFIXES) for name in names):
            return True
    return False


def _text(one: Any, name: str) -> str:
    if not isinstance(one, str | os.PathLike):
        raise SourceError(f"files of {name!r}", f"a {type(one).__name__} in the list", "paths and URLs")
    return os.fspath(one)


def _named(text: str) -> Iterator[FileRow]:
    """Yield the files that one path, pattern, folder or prefix means."""
    if is_local(text):
        yield from _local(local_path(os.path.expanduser(text)))
        return
    bare = text.partition("?")[0]
    if bare.startswith(("http://", "https://")):
        if _WILD.search(bare) or not bare.lower().endswith(SUFFIXES):
            raise SourceError(
                f"files at {redact(text)}", "a web server, which lists no files", "the URL of a file",
                "Give the list of its URLs.",
            )  # fmt: skip
        yield FileRow(text, os.path.basename(bare))
        return
    if bare.lower().endswith(SUFFIXES) and not _WILD.search(bare):
        yield FileRow(text, os.path.basename(bare))
        return
    yield from _bucket(bare)


def _local(path: str) -> Iterator[FileRow]:
    if os.path.isfile(path):
        yield FileRow(path, os.path.basename(path))
    elif os.path.isdir(path):
        below = sorted(_below(path))
        if not below:
            raise SourceError(f"folder {path}", f"no raster ({_inside(path)})", f"files {_suffixes()}")
        yield from (FileRow(file, _relative(file, path)) for file in below)
    else:
        matching = [p for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        folder = _existing(path)
        if not matching:
            what = "pattern" if _WILD.search(path) else "file"
            raise SourceError(
                f"{what} {path}", f"nothing; {folder} has {_inside(folder)}", "a raster, or a folder of them",
                "Correct the path; ** stands for folders at any depth.",
            )  # fmt: skip
        yield from (FileRow(file, _relative(file, folder)) for file in matching)


def _bucket(url: str) -> Iterator[FileRow]:
    """Yield the objects below a prefix, or those that a pattern means."""
    wild = _WILD.search(url)
    base = url if wild is None else url[: url.rindex("/", 0, wild.start())]
    try:
        paths = sorted(listing(base))
    except ReadError as error:
        raise SourceError(f"files at {redact(url)}", error.found, "objects", error.remedy) from error
    wanted = None if wild is None else re.compile(_pattern(url[len(base) :].lstrip("/")))
    kept = [
        path
        for path in paths
        if (path.lower().endswith(SUFFIXES) if wanted is None else wanted.fullmatch(path))
    ]
    if not kept:
        shown = f"{len(paths):,} objects" + "".join(f", {p}" for p in paths[:_SHOWN])
        raise SourceError(
            f"files at {redact(url)}", f"none among {shown}", f"objects {_suffixes()}",
            "Correct the prefix; ** stands for folders at any depth.",
        )  # fmt: skip
    yield from (FileRow(join(base, path), path) for path in kept)


def _pattern(text: str) -> str:
    """Return a pattern of paths as a regular expression, as glob understands it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", text)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        words.get(part)
        or (part.replace("[!", "[^", 1) if part.startswith("[") and len(part) > 2 else re.escape(part))
        for part in parts
    )


def _below(folder: str) -> Iterator[str]:
    """Yield the rasters below a folder; hidden files and folders are none."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(root, name)


def _existing(path: str) -> str:
    """Return the deepest folder above a path or pattern that exists."""
    wild = _WILD.search(path)
    folder = os.path.dirname(path if wild is None else path[: wild.start()] + "x")
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _inside(folder: str) -> str:
    names = sorted(os.listdir(folder))
    return first_of(names, _SHOWN) or "nothing in it"


def _relative(path: str, folder: str) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _suffixes() -> str:
    return ", ".join(SUFFIXES)


def table_at(text: str) -> pa.Table:
    """Return the CSV or Parquet file at a path or URL."""
    if not text.partition("?")[0].lower().endswith(".csv"):
        return read_table(text)
    try:
        if is_local(text):
            return pacsv.read_csv(local_path(os.path.expanduser(text)))
        return pacsv.read_csv(pa.BufferReader(get(text)))
    except FileNotFoundError as error:
        raise SourceError(f"table {text}", "nothing there", "a CSV file") from error
    except ReadError as error:
        raise SourceError(f"table {redact(text)}", error.found, "a CSV file") from error
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"table {redact(text)}", str(error)[:200], "a CSV file with a line of names"
        ) from error


def _from_table(
    table: pa.Table, name: str, column_map: Mapping[str, str] | None, place: str | None
) -> FileRows:
    table = rename_columns(table, column_map, name)
    if "href" not in table.column_names:
        urls = [c for c in table.column_names if c.lower() in URLS] or ["yours"]
        raise SchemaError(
            f"files of {name!r}",
            f"a table without column href (columns: {', '.join(table.column_names)})",
            "href, and datetime, band, id where there are any",
            f"Say what yours is called: column_map={{{urls[0]!r}: 'href'}}.",
        )
    rows = []
    for cells in table.to_pylist():
        href = cells.pop("href")
        if not isinstance(href, str) or not href:
            raise SchemaError(f"files of {name!r}", f"href {href!r}", "a path or URL in every row")
        rows.append(
            FileRow(href, os.path.basename(href if is_local(href) else href.partition("?")[0]), cells)
        )
    if not rows:
        raise SourceError(f"files of {name!r}", "a table without rows", "at least one file")
    types = {field.name: field.type for field in table.schema if field.name != "href"}
    return FileRows(tuple(rows), place, types)


URLS = ("url", "path", "location", "filename", "file", "file_path", "filepath", "uri", "asset")
"""What a column of files is often called, in lower case."""
