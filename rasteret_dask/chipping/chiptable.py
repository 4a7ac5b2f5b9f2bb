# SPDX-License-Identifier: Apache-2.0
"""The chip table: one row per chip, its schema, and the records that feed it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = [
    "CHIP_SCHEMA",
    "FEED_TYPE",
    "FeedTable",
    "FILLED",
    "FOLD",
    "MASK",
    "META",
    "PRESENT",
    "bounds_of",
    "is_label",
    "is_mask",
    "is_name",
    "joined",
    "label_columns",
    "label_fields",
    "replaced",
    "texts",
    "with_columns",
]

FILLED = "filled_fraction"
"""Name of the coordinate (chip, time): the share of pixels that other acquisitions than the picked one gave."""

PRESENT = "present"
"""Name of the coordinate (chip, time) of a source that may be empty somewhere: whether any record feeds that slot."""

META = "meta"
"""Attribute of a source: names of the coordinates (chip, time) that ``harmonize(meta=)`` asks for."""

MASK = "mask"
"""Name of the variable (chip, y, x) of rasterized labels; of several columns, what their names begin with."""

FOLD = "fold"
"""The column that says which fold a chip is in."""

FEED_TYPE = pa.struct(
    [
        pa.field("source", pa.dictionary(pa.int8(), pa.string())),
        pa.field("slot", pa.int16()),  # place on the source's time axis
        pa.field("order", pa.int16()),  # place of the acquisition among the slot's candidates
        pa.field("record", pa.dictionary(pa.int32(), pa.string())),  # the record's id
        pa.field("row", pa.int32()),  # the record's row among the source's records
        pa.field("coverage", pa.float32()),  # share of the chip this record covers
    ]
)

CHIP_SCHEMA = pa.schema(
    [
        pa.field("chip_id", pa.string(), nullable=False),
        pa.field("epsg", pa.int32(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("col", pa.int64()),
        pa.field("cell", pa.string()),  # split cell: zone/row/col; null where windows are laid out freely
        pa.field("xmin", pa.float64()),
        pa.field("ymin", pa.float64()),
        pa.field("xmax", pa.float64()),
        pa.field("ymax", pa.float64()),
        pa.field("datetime", pa.timestamp("us", tz="UTC")),  # of the acquisition; null with a time axis
        pa.field("acquisition", pa.string()),
        pa.field("slots", pa.int32()),  # slots of the reference source that have records
        pa.field(
            "coverage", pa.float32()
        ),  # smallest covered share among all sources' slots that have records
        pa.field("split", pa.string()),
        pa.field("geometry", pa.binary()),  # WKB, lon/lat
        pa.field("feeds", pa.list_(FEED_TYPE)),
    ]
)
"""What every chip table has. Columns of ``at=`` and of ``with_table`` come behind these."""


def is_mask(name: str) -> bool:
    """Return whether a variable (chip, y, x) of this name holds rasterized labels: ``mask``, ``mask_<column>``."""
    return name == MASK or name.startswith(f"{MASK}_")


@dataclass(frozen=True)
class FeedTable:
    """The ``feeds`` column as flat arrays, one entry per (chip, source, slot, record).

    There are millions of entries, so they are views of Arrow's own memory, as narrow as FEED_TYPE says.
    """

    offsets: NDArray[Any]
    """Shape (chip + 1,), int32. Entries of chip i are offsets[i] to offsets[i + 1]."""
    source: NDArray[Any]
    """Place of the source among ``names``, int8."""
    slot: NDArray[Any]
    """int16."""
    order: NDArray[Any]
    """int16."""
    row: NDArray[Any]
    """int32."""
    share: NDArray[np.float32]
    names: tuple[str, ...]
    """Names of the sources."""
    ids: tuple[tuple[str, ...], ...]
    """For each source, the ids of its records."""

    @classmethod
    def of(cls, table: pa.Table) -> FeedTable:
        """Take the column of a chip table apart."""
        column = table.column("feeds").combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        flat = column.flatten()
        source, record = flat.field("source"), flat.field("record")
        offsets = np.asarray(column.offsets)
        number, row = source.indices.to_numpy(), flat.field("row").to_numpy()
        names = tuple(source.dictionary.to_pylist())
        return cls(
            offsets - offsets[0],
            number,
            flat.field("slot").to_numpy(),
            flat.field("order").to_numpy(),
            row,
            flat.field("coverage").to_numpy(),
            names,
            _ids(record, number, row, len(names)),
        )

    @property
    def chip(self) -> NDArray[np.int64]:
        """Shape (entry,). The chip of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @cached_property
    def alike(self) -> NDArray[np.int64]:
        """Shape (run + 1,). Where runs of chips begin whose entries are the same but for their shares; then all chips.

        Neighbours mostly are: what depends on records alone is worked out once a run.
        """
        count = np.diff(self.offsets)
        same = np.append(False, count[1:] == count[:-1])[: len(count)]
        entry = np.arange(len(self.row), dtype=self.offsets.dtype)
        before = entry - np.repeat(np.where(same, count, 0), count)
        differ = self.row != self.row[before]
        for field in (self.slot, self.order, *([self.source] if len(self.names) > 1 else [])):
            differ |= field != field[before]
        same[np.searchsorted(self.offsets, np.flatnonzero(differ), side="right") - 1] = False
        return np.append(np.flatnonzero(~same), len(count))

    def present(self, source: int, times: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Return whether any record of a source feeds each slot of some chips, shape (chip, slot).

        Parameters
        ----------
        source
            Number of the source.
        times
            How many slots it has.
        start, stop
            The chips; None: to the last one.
        """
        offsets = self.offsets[start : None if stop is None else stop + 1]
        own = slice(offsets[0], offsets[-1])
        chip = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        result = np.zeros((len(offsets) - 1, times), dtype=bool)
        mine = self.source[own] == source
        result[chip[mine], self.slot[own][mine]] = True
        return result

    def rows_of(self, source: int) -> NDArray[np.int64]:
        """Return the rows of a source's records that feed any chip, rising."""
        row = self.row[self.source == source] if len(self.names) > 1 else self.row
        there = np.zeros(int(row.max(initial=-1)) + 1, dtype=bool)
        there[row] = True
        return np.flatnonzero(there)

    def wanted(self, source: int, group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each record of a source with the first chip of every group that it feeds: rows, and chips.

        Parameters
        ----------
        source
            Number of the source.
        group
            Shape (chip,). A number for each chip.
        """
        first = np.zeros(len(group), dtype=bool)
        first[self.alike[:-1]] = True
        first[1:] |= group[1:] != group[:-1]
        chip = np.flatnonzero(first)
        count = self.offsets[chip + 1] - self.offsets[chip]
        entry = np.arange(int(count.sum())) + np.repeat(
            self.offsets[chip] - (np.cumsum(count) - count), count
        )
        chip = np.repeat(chip, count)
        if len(self.names) > 1:
            own = self.source[entry] == source
            entry, chip = entry[own], chip[own]
        row = self.row[entry].astype(np.int64)
        pair = row * (int(group.max(initial=0)) + 1) + group[chip]
        once = np.sort(np.unique(pair, return_index=True)[1])
        return row[once], chip[once]

    def to_arrow(self) -> pa.ListArray:
        """Return the column."""
        base = np.cumsum([0, *(len(i) for i in self.ids)], dtype=np.int32)
        ids = pa.array([i for ids in self.ids for i in ids], pa.string())
        row = pa.array(self.row.astype(np.int32, copy=False))
        place = row if len(self.ids) == 1 else pa.array(self.row + base[self.source])
        fields = [
            pa.DictionaryArray.from_arrays(
                pa.array(self.source.astype(np.int8, copy=False)), pa.array(self.names, pa.string())
            ),
            pa.array(self.slot.astype(np.int16, copy=False)),
            pa.array(self.order.astype(np.int16, copy=False)),
            pa.DictionaryArray.from_arrays(place, ids),
            row,
            pa.array(self.share.astype(np.float32, copy=False)),
        ]
        struct = pa.StructArray.from_arrays(fields, fields=list(FEED_TYPE))
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32, copy=False)), struct)


def _ids(
    record: pa.DictionaryArray, source: NDArray[Any], row: NDArray[Any], sources: int
) -> tuple[tuple[str, ...], ...]:
    """Return the ids that rows stand for, per source; rows that feed nothing get an empty id."""
    known = np.array([*record.dictionary.to_pylist(), ""], dtype=object)
    index = record.indices.to_numpy()
    result = []
    for number in range(sources):
        own = source == number if sources > 1 else slice(None)
        place = np.full(int(row[own].max(initial=-1)) + 1, -1)
        place[row[own]] = index[own]  # all entries of a row say the same
        result.append(tuple(known[place].tolist()))
    return tuple(result)


def with_columns(table: pa.Table, more: pa.Table) -> pa.Table:
    """Return a chip table with the further columns of another table of as many rows, their dictionaries decoded.

    Their fields say whether there is a null in any row, which settles dtypes once: shards, splits, samples and stores
    of these chips keep the schema, wherever their own nulls lie.

    Warns
    -----
    UserWarning
        When columns stay in the chip table only: see :func:`label_columns`.
    """
    left_out = []
    for name in more.column_names:
        if name in table.column_names or name in ("geometry", "__index__"):
            continue
        column = _plain(more.column(name))
        field = pa.field(name, column.type, nullable=bool(column.null_count))
        table = table.append_column(field, column)
        if why := _unfit(field):
            left_out.append(f"{name} ({why})")
    if left_out:
        warnings.warn(
            f"columns that stay in the chip table and are no labels of batches, arrays and stores: "
            f"{', '.join(left_out)}. Rename or convert those that you train with.",
            UserWarning,
            stacklevel=2,
        )
    return table


RESERVED = frozenset(
    {
        *("chip", "time", "band", "y", "x", "corner"),  # dimensions
        *(
            "pixels",
            "valid",
            MASK,
            "valid_fraction",
            FILLED,
            PRESENT,
            "datetime",
            "member",
            "bounds",
            "units",
            "band_kind",
            "kept",
            "padded",
        ),
        *(
            "_job",
            "_tables",
            "chips.parquet",
            "manifest.parquet",
            "zarr.json",
            "README.md",
            "croissant.json",
        ),  # what else lies beside a store's arrays
    }
)
"""Names that are taken beside those of CHIP_SCHEMA; a user's column of such a name stays in the chip table only."""


def is_label(name: str) -> bool:
    """Return whether a coordinate (chip,) of this name is a column of the user's."""
    return name not in RESERVED and name not in CHIP_SCHEMA.names


def is_name(name: str) -> bool:
    """Return whether an array can have a name: no path, and one word in a list of names."""
    return bool(name.strip(".")) and not any(c in "/\\" or c.isspace() for c in name)


def label_fields(schema: pa.Schema) -> list[pa.Field]:
    """Return the fields of a chip table that :func:`label_columns` returns."""
    return [field for field in schema if field.name not in CHIP_SCHEMA.names and not _unfit(field)]


def label_columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the user's columns as arrays, shape (chip,), of dtypes that the schema alone settles.

    =======================================  =====================================================================
    text                                     object, null: ``""``
    integers, booleans without a null        their own dtype
    the same with nulls in any row           float64, null: NaN
    floats                                   their own dtype, null: NaN
    decimals                                 float64, null: NaN
    dates and times                          datetime64[us], UTC where a time zone is given, null: NaT
    =======================================  =====================================================================

    Others (lists, structs, bytes, durations, ...) and those whose names are taken stay in the chip table only.
    """
    return {field.name: _array(field, table.column(field.name)) for field in label_fields(table.schema)}


def _unfit(field: pa.Field) -> str:
    """Say why a column cannot be a label; empty where it can."""
    name, kind = field.name, field.type
    if not is_label(name):
        return "its name is taken"
    if not name.strip(".") or "/" in name or "\\" in name:
        return "no name of an array"
    of = pa.types
    known = (of.is_boolean, of.is_integer, of.is_floating, of.is_decimal, of.is_date, of.is_timestamp)
    return "" if _is_text(kind) or any(is_kind(kind) for is_kind in known) else f"of type {kind}"


def _array(field: pa.Field, values: pa.ChunkedArray) -> NDArray[Any]:
    kind = field.type
    if _is_text(kind):
        return np.array([v or "" for v in values.to_pylist()], dtype=object)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):  # of UTC; NumPy rounds nanoseconds down
        return np.asarray(values.to_numpy().astype("datetime64[us]"))
    if pa.types.is_decimal(kind) or (field.nullable and not pa.types.is_floating(kind)):
        values = values.cast(pa.float64(), safe=False)
    return np.asarray(values.to_numpy())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column (such as pandas' categorical) with its dictionary decoded, where Parquet would refuse nulls."""
    if not pa.types.is_dictionary(column.type):
        return column
    return pa.chunked_array([c.dictionary_decode() for c in column.chunks], column.type.value_type)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def bounds_of(table: pa.Table) -> NDArray[np.float64]:
    """Return xmin, ymin, xmax, ymax of chips, shape (chip, 4)."""
    return np.stack([table.column(n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax")], -1)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return a chip table with another column of CHIP_SCHEMA."""
    field = CHIP_SCHEMA.field(name)
    return table.set_column(table.schema.get_field_index(name), field, values)


def texts(values: Sequence[str | None]) -> pa.Array:
    """Return text as an Arrow column."""
    return pa.array(values, pa.string())


def joined(*parts: Any, by: str = "_") -> pa.Array:
    """Return texts and whole numbers (Arrow, NumPy, or one text for all rows) joined row by row; nulls are left out."""
    columns = [pa.scalar(p) if isinstance(p, str) else pc.cast(pa.array(p), pa.string()) for p in parts]
    return pc.binary_join_element_wise(*columns, by, null_handling="skip")
