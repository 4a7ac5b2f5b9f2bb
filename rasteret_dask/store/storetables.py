# SPDX-License-Identifier: Apache-2.0
"""The tables of a finished store, ``chips.parquet`` and the manifest: only the columns that are asked for are read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.crs import unpack
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.sums import Sums, changed, checked_file, is_closed
from rasteret_dask.store.ledger import CHIPS, MANIFEST

__all__ = ["ChipColumns", "open_manifest", "open_table"]

IN_BATCHES = frozenset({"chip_id", "epsg", "xmin", "ymin", "xmax", "ymax", "split"})
"""Columns of CHIP_SCHEMA that batches are made of; they have all of the user's columns, too."""

WHOLE = 4 * 2**20
"""Tables up to so many bytes come by one request; of others, the ranges that hold the columns asked for."""

_READING = Lock()
"""Threads that begin at the same time read a table once."""


@dataclass(frozen=True, eq=False)
class ChipColumns:
    """The chip table of a store as it was planned, dropped chips included."""

    url: str
    """The store."""
    chips: int
    """How many its manifest says there are."""
    sums: Sums
    """What the table must be."""

    @property
    def table(self) -> pa.Table:
        """What batches have of each chip; one chunk a column, of which rows are taken in no time.

        Raises
        ------
        StoreError
            When it is not the table of the manifest's shards.
        """
        return self._content[0]

    @property
    def names(self) -> Sequence[str]:
        """All columns but ``feeds``: those that steps may name."""
        return self._content[1]

    @property
    def _content(self) -> tuple[pa.Table, Sequence[str]]:
        with _READING:
            return self._read

    @cached_property
    def _read(self) -> tuple[pa.Table, Sequence[str]]:
        with open_table(self.url, CHIPS, self.sums) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if rows != self.chips:
                raise StoreError(
                    f"store {remote.redact(self.url)}", f"{rows} rows in {CHIPS}",
                    f"{self.chips}, as the manifest says", "The store was changed: write it again.",
                )  # fmt: skip
            own = [n for n in names if n in IN_BATCHES or n not in CHIP_SCHEMA.names]
            return file.read(own).combine_chunks(), [n for n in names if n != "feeds"]

    def columns(self, wanted: Collection[str]) -> pa.Table:
        """Return some columns of all chips; those that batches do not have are read for this."""
        more = [n for n in wanted if n not in self.table.column_names]
        found = self.table.select([n for n in wanted if n not in more])
        if more:
            with open_table(self.url, CHIPS, self.sums) as file:
                read = file.read(more)
            for name in more:
                found = found.append_column(name, read.column(name))
        return found

    def whole(self) -> pa.Table:
        """Read all columns."""
        with open_table(self.url, CHIPS, self.sums) as file:
            return file.read()

    def row_of(self, chip: str) -> int | None:
        """Return the row of the chip with this id; None where there is none."""
        ids, order = self.table.column("chip_id"), self._by_id
        place = bisect_left(order, chip, key=lambda row: ids[int(row)].as_py())
        if place == len(order) or ids[int(order[place])].as_py() != chip:
            return None
        return int(order[place])

    @cached_property
    def _by_id(self) -> NDArray[np.uint64]:
        """Shape (chip,). Rows in the order of their ids: 8 bytes a chip, where a dictionary takes 140."""
        return np.asarray(pc.sort_indices(self.table.column("chip_id")).to_numpy())


@contextmanager
def open_table(url: str, name: str, sums: Sums) -> Iterator[pq.ParquetFile]:
    """Open a table of a store; each block of it that is read is compared with its checksum first.

    Parameters
    ----------
    url
        The store.
    name
        Name of its file.
    sums
        What it must be.

    Raises
    ------
    StoreError
        When it is missing, or another than was written; also while it is read.
    """
    with _reported(url, name), pq.ParquetFile(_source(remote.join(url, name), sums), pre_buffer=True) as file:
        unpack(file.schema_arrow.metadata)
        yield file


@contextmanager
def open_manifest(url: str) -> Iterator[tuple[pq.ParquetFile, str | None]]:
    """Open the manifest of a store, which holds its own checksum; give it and its ETag.

    Raises
    ------
    StoreError
        When it is missing, or another than was written.
    """
    with _reported(url, MANIFEST):
        place = remote.join(url, MANIFEST)
        found = remote.fetch(place)
        if not is_closed(found.data):
            size = len(memoryview(found.data))
            raise changed(
                f"reading {remote.redact(place)}", f"{size} bytes that do not match their checksum", None
            )
        with pq.ParquetFile(pa.BufferReader(found.data)) as file:
            yield file, found.head.etag


@contextmanager
def _reported(url: str, name: str) -> Iterator[None]:
    try:
        yield
    except remote.MissingError as error:
        raise StoreError(
            f"store {remote.redact(url)}", f"no {name}", "a store as to_zarr wrote it",
            "It was changed or copied in part: copy it whole, or write it again.",
        ) from error  # fmt: skip
    except (
        pa.ArrowException,
        OSError,
    ) as error:  # its checksums hold: something else was written as this table
        raise StoreError(f"store {remote.redact(url)}", f"a damaged {name} ({error})", "Parquet") from error


def _source(place: str, sums: Sums) -> Any:
    if sums.size > WHOLE:
        return checked_file(place, sums)
    found = remote.fetch(place, 0, WHOLE)
    if not sums.is_of(found.data):
        raise changed(f"reading {remote.redact(place)}", f"{found.head.size} other bytes", sums.size)
    return pa.BufferReader(found.data)
