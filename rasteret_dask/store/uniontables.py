# SPDX-License-Identifier: Apache-2.0
"""The chip tables of several stores as one: which rows are the same chip, and what all stores say of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.crs import unpack
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.store.addedtables import AddedColumns
from rasteret_dask.store.ledger import SUPERSEDES
from rasteret_dask.store.storemap import StoreMap

__all__ = ["UnionColumns"]


class UnionColumns:
    """The chip table of several stores: what :class:`ChipColumns` is of one.

    Parameters
    ----------
    parts
        The stores, and the parts of those that grew, in order.
    origin
        Per part, the number of the store that it is a part of.
    added
        Per store, the columns that were added to it.
    """

    def __init__(
        self, parts: Sequence[StoreMap], origin: Sequence[int], added: Sequence[AddedColumns | None]
    ) -> None:
        self._parts, self._origin = parts, origin
        self._added = [added[number] if added else None for number in origin]
        self._lock = Lock()

    # Rows

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """Shape (part + 1,). Row of each part's first chip; then how many there are."""
        return np.cumsum([0, *(part.planned for part in self._parts)])

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Shape (row,). True once for each chip: where it stands first, and no rule on pixels dropped it."""
        return self._same[0]

    @property
    def pairs(self) -> NDArray[np.int64]:
        """Shape (pair, 2). Row that is kept, and further row of the same chip in another part."""
        return self._same[1]

    @cached_property
    def _same(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        kept = np.concatenate([part.kept for part in self._parts])
        ids = self.parted.column("chip_id").combine_chunks().dictionary_encode()
        codes, count = ids.indices.to_numpy(), len(ids.dictionary)
        if count == len(codes):
            return kept, np.zeros((0, 2), dtype=np.int64)
        kept &= ~self._rows_behind(codes)
        rows = np.flatnonzero(kept)
        first = np.full(count, len(rows), dtype=np.int64)
        np.minimum.at(first, codes[rows], np.arange(len(rows)))
        again = first[codes[rows]] != np.arange(len(rows))
        kept[rows[again]] = False
        return kept, np.stack([rows[first[codes[rows[again]]]], rows[again]], -1)

    def _rows_behind(self, codes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which rows a later part of the same store stands in place of, shape (row,)."""
        result = np.zeros(len(codes), dtype=bool)
        part_of = np.repeat(np.arange(len(self._parts)), np.diff(self.begins))
        origin = np.array(self._origin)
        for number, part in enumerate(self._parts):
            if part.note.get(SUPERSEDES):
                earlier = (part_of < number) & (origin[part_of] == origin[number])
                result |= earlier & np.isin(codes, codes[part_of == number])
        return result

    def row_of(self, chip: str) -> int | None:
        """Return the row of the chip with this id that is kept; else one that is not, else None."""
        last = None
        for number, part in enumerate(self._parts):
            row = part.chips.row_of(chip)
            if row is None:
                continue
            last = int(self.begins[number]) + row
            if self.kept[last]:
                return last
        return last

    # Columns

    @property
    def parted(self) -> pa.Table:
        """What batches have of each chip, as the parts say it: without added columns."""
        with self._lock:
            return self._parted

    @cached_property
    def _parted(self) -> pa.Table:
        return _stacked([part.chips.table for part in self._parts])

    @property
    def table(self) -> pa.Table:
        """What batches have of each chip."""
        if not any(self._added):
            return self.parted
        _ = self.kept  # which takes the lock
        with self._lock:
            if self._seen is None:
                self._seen = self._joined([part.chips.table for part in self._parts])
            return self._seen

    _seen: pa.Table | None = None

    @property
    def names(self) -> Sequence[str]:
        """All columns but ``feeds``: those that steps may name."""
        every = [*(part.chips.names for part in self._parts), *(one.names for one in self._added if one)]
        return list(dict.fromkeys(name for names in every for name in names))

    def columns(self, wanted: Collection[str]) -> pa.Table:
        """Return some columns of all rows; those that batches do not have are read for this."""
        table = self.table
        more = [name for name in wanted if name not in table.column_names]
        found = table.select([name for name in wanted if name not in more])
        if more:
            read = _stacked([part.chips.columns(more) for part in self._parts])
            for name in more:
                found = found.append_column(name, read.column(name))
        return found

    def whole(self) -> pa.Table:
        """Read all columns."""
        tables = [part.chips.whole() for part in self._parts]
        return self._joined(tables) if any(self._added) else _stacked(tables)

    def _joined(self, tables: Sequence[pa.Table]) -> pa.Table:
        """Return tables of the parts one below the other, each with the columns that were added to its store.

        A chip of several stores has the value of the first one that has any.
        """
        own = [
            table if one is None else one.joined(table)
            for table, one in zip(tables, self._added, strict=True)
        ]
        table = _stacked(own)
        if len(set(self._origin)) == 1:
            return table
        first, again = self._same[1].T
        for name in dict.fromkeys(
            name for one in self._added if one for name in one.names if name != "split"
        ):
            column, rows = table.column(name), np.arange(table.num_rows)
            there = np.asarray(column.is_valid())
            fill = np.flatnonzero(~there[first] & there[again])[::-1]
            rows[first[fill]] = again[fill]
            column = column.take(pa.array(rows))
            place = table.column_names.index(name)
            table = table.set_column(place, pa.field(name, column.type, bool(column.null_count)), column)
        return table.combine_chunks()

    # Whether they fit

    def check(self) -> None:
        """Raise where stores do not say the same columns of their chips.

        Columns that were added to a store may lack in another one.

        Raises
        ------
        StoreError
            It names the store and the column.
        """
        planned = [
            {field.name: str(field.type) for field in part.chips.table.schema if _is_own(field.name)}
            for part in self._parts
        ]
        seen = [
            own if one is None else own | {field.name: str(field.type) for field in one.fields}
            for own, one in zip(planned, self._added, strict=True)
        ]
        for number, part in enumerate(self._parts[1:], 1):
            here, there = seen[0], seen[number]
            for name in dict.fromkeys([*here, *there]):
                both = name in here and name in there
                fits = (
                    here[name] == there[name] if both else name not in planned[0 if name in here else number]
                )
                if fits:  # or it was added to one of them
                    continue
                like = f", as in {remote.redact(self._parts[0].url)}"
                raise StoreError(
                    f"store {remote.redact(part.url)}",
                    f"column {name!r} of {there[name]}" if name in there else f"no column {name!r}",
                    (f"one of {here[name]}" if name in here else "no such column") + like,
                    "open_chips(store).with_table() adds a column to all chips of a finished store.",
                )  # fmt: skip


def _is_own(name: str) -> bool:
    """Tell whether a column is the user's."""
    return name not in CHIP_SCHEMA.names


def _stacked(tables: Sequence[pa.Table]) -> pa.Table:
    """Return tables one below the other, with the CRSs of all; what one of them lacks is null there."""
    if len(tables) == 1:
        return tables[0]
    tables = [_plain(table) for table in tables]
    wkts = [unpack(table.schema.metadata) for table in tables]
    packed = {key: value for table in tables for key, value in (table.schema.metadata or {}).items()}
    table = pa.concat_tables(tables, promote_options="default")
    for at, field in enumerate(table.schema):
        if not field.nullable and table.column(at).null_count:
            table = table.set_column(at, field.with_nullable(True), table.column(at))
    if any(wkts):
        from rasteret_dask.crs import luggage

        packed |= luggage(int(number) for own in wkts for number in own)
    return table.replace_schema_metadata(packed or None).combine_chunks()


def _plain(table: pa.Table) -> pa.Table:
    """Return a table whose feeds name records in full: Arrow cannot unite nested dictionaries."""
    if "feeds" not in table.column_names:
        return table
    lists = table.column("feeds").combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    flat = lists.flatten()
    fields = [flat.field(number) for number in range(flat.type.num_fields)]
    names = [flat.type.field(number).name for number in range(flat.type.num_fields)]
    fields = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in fields]
    offsets = pa.array(np.asarray(lists.offsets) - lists.offsets[0].as_py(), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, names=names))
    return table.set_column(table.column_names.index("feeds"), "feeds", column)
