# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a dataset that a filter keeps; wide columns only of the row groups that have such rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Late", "batches", "count", "hrefs"]

Late = Callable[[pa.Table], NDArray[np.bool_]]
"""Decides for rows, by some of their columns, what an expression cannot."""


def batches(
    data: pa.Table | pads.Dataset,
    where: pc.Expression | None,
    columns: Sequence[str] | None = None,
    late: Late | None = None,
    late_columns: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:
    """Yield the rows that fulfil an expression and a function, in their order.

    Parameters
    ----------
    data
        A table or dataset.
    where
        None: all rows.
    columns
        None: all columns.
    late
        Gets the rows that ``where`` keeps, with ``late_columns``, and returns which of them to keep.

    Notes
    -----
    A filtered scan of Parquet reads every column it returns of all row groups whose statistics do not rule the
    filter out, and tile tables are a hundred times as wide as what filters ask for. So the filter's own columns
    are read first, and the others only of row groups with at least one row that stays.
    """
    names = list(data.schema.names if columns is None else columns)
    if where is None and late is None:
        yield from data.select(names).to_batches() if isinstance(data, pa.Table) else data.to_batches(names)
        return
    dataset = pads.dataset(data) if isinstance(data, pa.Table) else data
    everything = pc.scalar(True) if where is None else where
    pieces = _pieces(dataset, everything)
    if pieces is None:  # no row groups: all in memory, or another format
        wanted = list(dict.fromkeys([*names, *late_columns]))
        for batch in dataset.to_batches(wanted, filter=everything):
            kept = batch if late is None else batch.filter(pa.array(late(pa.Table.from_batches([batch]))))
            yield kept.select(names)
        return
    keep = _kept(dataset, pieces, everything, late, late_columns)
    own = np.split(keep, np.cumsum([piece.row_groups[0].num_rows for piece in pieces])[:-1])
    hits = [i for i, mask in enumerate(own) if mask.any()]
    if hits:
        mask = np.concatenate([own[i] for i in hits])
        for batch in _dataset(dataset, [pieces[i] for i in hits]).to_batches(names):
            yield batch.filter(pa.array(mask[: len(batch)]))
            mask = mask[len(batch) :]


def count(data: pa.Table | pads.Dataset, where: pc.Expression | None) -> int:
    """Return how many rows fulfil an expression; only its columns are read."""
    dataset = pads.dataset(data) if isinstance(data, pa.Table) else data
    return int(dataset.count_rows(filter=where))


def _pieces(data: pads.Dataset, where: pc.Expression) -> list[pads.ParquetFileFragment] | None:
    """Return the row groups that statistics do not rule out, or None where the data has none."""
    fragments = list(data.get_fragments(filter=where))
    if not all(isinstance(f, pads.ParquetFileFragment) for f in fragments):
        return None
    return [piece for f in fragments for piece in f.split_by_row_group(where, schema=data.schema)]


def _kept(
    data: pads.Dataset,
    pieces: list[pads.ParquetFileFragment],
    where: pc.Expression,
    late: Late | None,
    late_columns: Sequence[str],
) -> NDArray[np.bool_]:
    """Shape (row of the pieces,). True where a row stays."""
    if not pieces:
        return np.zeros(0, dtype=bool)
    wanted = {"\0keep": where} | {name: pc.field(name) for name in late_columns}
    found = _dataset(data, pieces).to_table(columns=wanted)
    keep = np.array(pc.fill_null(found.column("\0keep"), False).to_numpy(), dtype=bool)
    if late is not None and keep.any():
        keep[keep] = late(found.drop_columns(["\0keep"]).filter(pa.array(keep)))
    return keep


def _dataset(data: pads.Dataset, pieces: list[pads.ParquetFileFragment]) -> pads.Dataset:
    return pads.FileSystemDataset(pieces, data.schema, data.format, data.filesystem)


def hrefs(data: pa.Table | pads.Dataset) -> pa.ChunkedArray:
    """Return ``assets`` with nothing but each band's ``href``; of Parquet, little else is read."""
    if isinstance(data, pa.Table) or not all(
        isinstance(f, pads.ParquetFileFragment) for f in data.get_fragments()
    ):
        return (data if isinstance(data, pa.Table) else data.to_table(["assets"])).column("assets")
    chunks = []
    for fragment in data.get_fragments():
        with data.filesystem.open_input_file(fragment.path) as source:
            leaves = ["assets.key_value.key", "assets.key_value.value.href"]
            chunks += pq.ParquetFile(source).read(columns=leaves).column("assets").chunks
    return pa.chunked_array(chunks, type=chunks[0].type if chunks else data.schema.field("assets").type)
