"""The chip table: one row per chip, its schema, and the records that feed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = [
    "CHIP_SCHEMA",
    "FEED_TYPE",
    "FeedTable",
    "bounds_of",
    "label_columns",
    "replaced",
    "texts",
    "with_columns",
]

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


@dataclass(frozen=True)
class FeedTable:
    """The ``feeds`` column as flat arrays, one entry per (chip, source, slot, record)."""

    offsets: NDArray[np.int64]
    """Shape (chip + 1,). Entries of chip i are offsets[i] to offsets[i + 1]."""
    source: NDArray[np.int64]
    """Place of the source among ``names``."""
    slot: NDArray[np.int64]
    order: NDArray[np.int64]
    row: NDArray[np.int64]
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
        offsets = np.asarray(column.offsets).astype(np.int64)
        number = source.indices.to_numpy().astype(np.int64)
        row = flat.field("row").to_numpy().astype(np.int64)
        names = tuple(source.dictionary.to_pylist())
        return cls(
            offsets - offsets[0],
            number,
            flat.field("slot").to_numpy().astype(np.int64),
            flat.field("order").to_numpy().astype(np.int64),
            row,
            flat.field("coverage").to_numpy(),
            names,
            _ids(record, number, row, len(names)),
        )

    @property
    def chip(self) -> NDArray[np.int64]:
        """Shape (entry,). The chip of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def to_arrow(self) -> pa.ListArray:
        """Return the column."""
        base = np.cumsum([0, *(len(i) for i in self.ids)])
        ids = pa.array([i for ids in self.ids for i in ids], pa.string())
        fields = [
            pa.DictionaryArray.from_arrays(pa.array(self.source.astype(np.int8)), pa.array(self.names)),
            pa.array(self.slot.astype(np.int16)),
            pa.array(self.order.astype(np.int16)),
            pa.DictionaryArray.from_arrays(pa.array((self.row + base[self.source]).astype(np.int32)), ids),
            pa.array(self.row.astype(np.int32)),
            pa.array(self.share.astype(np.float32)),
        ]
        struct = pa.StructArray.from_arrays(fields, fields=list(FEED_TYPE))
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), struct)


def _ids(
    record: pa.DictionaryArray, source: NDArray[np.int64], row: NDArray[np.int64], sources: int
) -> tuple[tuple[str, ...], ...]:
    """Return the ids that rows stand for, per source; rows that feed nothing get an empty id."""
    known = record.dictionary.to_pylist()
    index = record.indices.to_numpy()
    result = []
    for number in range(sources):
        own = np.flatnonzero(source == number)
        ids = [""] * (int(row[own].max(initial=-1)) + 1)
        rows, first = np.unique(row[own], return_index=True)
        for r, at in zip(rows.tolist(), own[first].tolist(), strict=True):
            ids[r] = known[index[at]]
        result.append(tuple(ids))
    return tuple(result)


def with_columns(table: pa.Table, more: pa.Table) -> pa.Table:
    """Return a chip table with the further columns of another table of as many rows."""
    for name in more.column_names:
        if name not in table.column_names and name not in ("geometry", "__index__"):
            table = table.append_column(more.schema.field(name), more.column(name))
    return table


RESERVED = frozenset(
    {"pixels", "valid", "valid_fraction", "datetime", "source", "time", "band", "y", "x", "bounds"}
)
"""Names of an output's own variables; a user's column of such a name stays in the chip table only."""


def label_columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the user's columns that can be coordinates: text (null: ""), numbers (null: NaN) and booleans."""
    result: dict[str, NDArray[Any]] = {}
    for field in table.schema:
        if field.name in CHIP_SCHEMA.names or field.name in RESERVED:
            continue
        column = table.column(field.name)
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            result[field.name] = np.array([v or "" for v in column.to_pylist()], dtype=object)
        elif pa.types.is_boolean(field.type) and not column.null_count:
            result[field.name] = column.to_numpy().astype(bool)
        elif pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            result[field.name] = column.to_numpy()
    return result


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
