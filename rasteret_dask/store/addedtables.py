# SPDX-License-Identifier: Apache-2.0
"""Columns that were added to the chips of a finished store: versions beside it, each one whole table."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rasteret_dask.errors import StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.net import remote
from rasteret_dask.net.sums import closed, crc32_of, is_closed

__all__ = ["FOLDER", "AddedColumns", "put_columns", "read_columns", "table_path", "versions"]

FOLDER = "_tables"
"""Folder of the versions, below the store."""

_NOTE = b"rasteret_dask:columns"
_PATH = re.compile(rf"{FOLDER}/(\d{{4,}})\.parquet")


@dataclass(frozen=True, eq=False)
class AddedColumns:
    """One version: every column that was added to a store so far, with a row for each chip that has one."""

    place: str
    """Where it lies."""
    checksum: int
    """CRC-32 of its bytes."""
    table: pa.Table = field(repr=False)
    """Column ``chip_id``, and the added ones."""

    @classmethod
    def at(cls, mark: str) -> AddedColumns:
        """Open the version that :attr:`mark` names.

        Raises
        ------
        StoreError
            When it is gone, or another one by now.
        """
        place, _, checksum = mark.rpartition("#")
        return _read(place, int(checksum))

    @property
    def mark(self) -> str:
        """What another process opens it by."""
        return f"{self.place}#{self.checksum}"

    @property
    def names(self) -> tuple[str, ...]:
        """The added columns."""
        return tuple(name for name in self.table.column_names if name != "chip_id")

    @property
    def fields(self) -> list[pa.Field]:
        """Names and types of the added columns, as :meth:`joined` gives them."""
        schema = self.table.schema
        return [pa.field(name, _text_type(schema.field(name).type)) for name in self.names if name != "split"]

    def has(self, name: str) -> bool:
        """Tell whether a column was added."""
        return name in self.names

    @property
    def version(self) -> int:
        """The number of the version."""
        return int(self.place.rpartition("/")[2].partition(".")[0])

    @cached_property
    def note(self) -> Mapping[str, object]:
        """What is written beside the columns: which store they are of, and by which rule splits were dealt."""
        note: Mapping[str, object] = json.loads(self.table.schema.metadata[_NOTE])
        return note

    def joined(self, chips: pa.Table) -> pa.Table:
        """Return a chip table with the added columns: null for chips that the version does not have."""
        ids = self.table.column("chip_id").combine_chunks()
        at = pc.index_in(chips.column("chip_id"), value_set=ids)
        for name in self.names:
            column = self.table.column(name).take(at)
            column = column.cast(_text_type(column.type))
            own = pa.field(name, column.type, nullable=name == "split" or bool(column.null_count))
            if name in chips.column_names:
                chips = chips.set_column(chips.column_names.index(name), own, column)
            else:
                chips = chips.append_column(own, column)
        return chips


def _text_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column, with one type for text: pandas has long ones."""
    return pa.string() if pa.types.is_large_string(kind) else kind


def table_path(version: int) -> str:
    """Return where a version lies, below the store."""
    return f"{FOLDER}/{version:04d}.parquet"


def versions(paths: Collection[str]) -> list[int]:
    """Return the versions among some paths below a store, rising."""
    return sorted(int(match[1]) for path in paths if (match := _PATH.fullmatch(path)))


def read_columns(url: str, digest: str, version: int | None, last: int) -> AddedColumns | None:
    """Return a version of the columns that were added to a store.

    Parameters
    ----------
    url
        The store.
    digest
        What the store is known by: the table must be of it.
    version
        None: the latest; 0: no columns.
    last
        The latest version that lies there; 0: there is none.

    Raises
    ------
    StoreError
        When it is not there, damaged, or was made for another store at this place.
    """
    subject = f"store {remote.redact(url)}"
    if version is not None and not (isinstance(version, int) and 0 <= version <= last):
        there = f"a version from 1 to {last}, or 0 for none" if last else "0: no columns were added"
        raise StoreError(subject, f"no version {version!r} of added columns", there)
    wanted = last if version is None else version
    if wanted == 0:
        return None
    place = remote.join(url, table_path(wanted))
    columns = _read(place, None)
    if columns.note["store"] != digest:
        raise StoreError(
            subject, f"{table_path(wanted)} of another store ({str(columns.note['store'])[:12]})",
            f"columns of this one ({digest[:12]})", f"The store was written anew: delete its {FOLDER}/.",
        )  # fmt: skip
    return columns


def put_columns(
    url: str, digest: str, table: pa.Table, version: int, note: Mapping[str, object]
) -> AddedColumns | None:
    """Write a version, whole or not at all; None where somebody else has written this version meanwhile.

    Parameters
    ----------
    url, digest
        The store, and what it is known by.
    table
        Column ``chip_id``, and all that were added.
    version
        Its number.
    note
        JSON values that are kept with it.
    """
    text = json.dumps({**STORE.note, "store": digest, **note}, sort_keys=True)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_NOTE: text}), sink, compression="zstd")
    data = closed(bytes(sink.getvalue()))
    place = remote.join(url, table_path(version))
    return _read(place, crc32_of(data)) if remote.put_new(place, data) else None


@lru_cache(maxsize=16)
def _kept(place: str, checksum: int) -> AddedColumns:
    return _fetched(place)


def _read(place: str, checksum: int | None) -> AddedColumns:
    """Open a version, and hold it against its checksum where that is known."""
    columns = _fetched(place) if checksum is None else _kept(place, checksum)
    if checksum is not None and columns.checksum != checksum:
        raise StoreError(
            f"reading {remote.redact(place)}", "other bytes", "the columns that were opened",
            "They were written anew meanwhile: open the store again with open_chips.",
        )  # fmt: skip
    return columns


def _fetched(place: str) -> AddedColumns:
    subject = f"reading {remote.redact(place)}"
    try:
        data = remote.get(place)
    except remote.MissingError as error:
        raise StoreError(subject, "nothing", "columns that were added to the store") from error
    if not is_closed(data):
        raise StoreError(
            subject, f"{len(data)} bytes that do not match their checksum", "what with_table wrote",
            "Open an older version (open_chips(columns=)), or add the columns again.",
        )  # fmt: skip
    table = pq.read_table(pa.BufferReader(data)).combine_chunks()
    columns = AddedColumns(place, crc32_of(data), table)
    STORE.check(subject, columns.note)
    return columns
