# SPDX-License-Identifier: Apache-2.0
"""Chips of a finished store, as those of a plan are asked for one answer each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.planning.plan import digest
from rasteret_dask.store.stored import Stored, facts, take
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.job import Shard

__all__ = ["StoredJob", "StoredSource", "blank_stored"]


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A source of stored chips."""

    name: str
    bands: tuple[str, ...]


@dataclass(frozen=True)
class StoredJob:
    """Stored chips with the words of a :class:`~rasteret_dask.tasks.job.Job`: a shard is one of the store."""

    stored: Stored

    @cached_property
    def digest(self) -> str:
        """What the chips are known by."""
        return digest("stored", self.stored.digest)

    @cached_property
    def chips(self) -> pa.Table:
        """CHIP_SCHEMA but for what feeds them, and the user's columns."""
        table = self.stored.whole()
        names = [name for name in CHIP_SCHEMA.names if name in table.column_names and name != "feeds"]
        own = [name for name in table.column_names if name not in CHIP_SCHEMA.names]
        return table.select([*names, *own])

    def chosen_chips(self) -> pa.Table:
        """Return all of them."""
        return self.chips

    @property
    def sources(self) -> tuple[StoredSource, ...]:
        """Names and bands."""
        return tuple(StoredSource(name, tuple(bands)) for name, bands in self.stored.bands.items())

    def shard(self, hierarchy: int, number: int) -> Shard:
        """Return a shard; ``hierarchy`` is 0."""
        offsets = self.stored.offsets
        return Shard(None, hierarchy, number, int(offsets[number]), int(offsets[number + 1]))

    def shards(self) -> Iterator[Shard]:
        """Yield the shards that have chips."""
        for number, size in enumerate(self.stored.sizes):
            if size:
                yield self.shard(0, number)

    @property
    def keys(self) -> Mapping[str, str]:
        """Shard -> what its chips are known by."""
        return {shard.name: digest(self.digest, shard.number) for shard in self.shards()}

    @property
    def running(self) -> NDArray[np.int64]:
        """Shape (chip,). In which order chips are read: as they lie."""
        return np.arange(len(self.stored.rows))


def blank_stored(stored: Stored, count: int) -> Arrays:
    """Return made-up chips with the shapes and types of stored ones: pixels are 0 and valid."""
    rows = np.zeros(count, dtype=np.int64)
    named = facts(stored.rows_of_table(rows))
    result: Arrays = {}
    for name, values in take(stored, rows).items():
        if name in named:
            result[name] = values
        elif name.endswith("/valid"):
            result[name] = np.ones_like(values)
        else:
            result[name] = values if values.dtype.kind in "OUM" else np.zeros_like(values)
    return result | {"chip_id": np.array([f"zeros {n}" for n in range(count)], dtype=object)}
