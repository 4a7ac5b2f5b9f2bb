# SPDX-License-Identifier: Apache-2.0
"""Chips come back from a finished store: whole shards, or any chips by single gets at the same time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of, label_columns
from rasteret_dask.errors import PlanError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import FilterChips, Node, Sample, Select, Source, digest, step_name
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.store.storemap import StoredShard, StoreMap, open_map
from rasteret_dask.store.union import Parts, StoreUnion, open_union, read_variables
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Stored", "facts", "read_shard", "splits_of", "take"]

_log = logging.getLogger(__name__)

_ROW = "__row__"
_CHOOSING = Lock()


@dataclass(frozen=True, slots=True)
class Stored:
    """Chips of a finished store: which store, and which steps choose its chips. Pickles small; opens when used."""

    url: str
    plan: Node
    """Select, filter and sample steps over a source whose token is the store's digest."""
    parts: Parts | None = None
    """What the chips lie in, where that is more than one store that never grew and has no added columns."""

    @classmethod
    def of(cls, url: str, digest: str) -> Stored:
        """Return all kept chips of a store."""
        return cls(url, Source("store", digest))

    @classmethod
    def over(cls, parts: Parts) -> Stored:
        """Return all kept chips of several parts."""
        return cls(parts.stores[0][0], Source("store", parts.digest), None if parts.is_plain else parts)

    @property
    def map(self) -> StoreMap | StoreUnion:
        """What the store holds."""
        if self.parts is not None:
            return open_union(self.parts)
        node = self.plan
        while not isinstance(node, Source):
            assert isinstance(node, FilterChips | Select | Sample)
            node = node.child
        return open_map(self.url, node.token)

    @property
    def places(self) -> tuple[str, ...]:
        """Where the chips lie: the store, the parts that were appended, further stores."""
        return (self.url,) if self.parts is None else tuple(url for url, _ in self.parts.stores)

    @property
    def digest(self) -> str:
        """What the chips are known by: the store's digest and the steps."""
        return _digest(self.plan)

    @property
    def bands(self) -> Mapping[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        return self.map.bands

    @property
    def rows(self) -> NDArray[np.int64]:
        """Shape (chip,). Row of each chip among all of the store, rising."""
        return chosen(self.map, self.plan).rows

    @property
    def shards(self) -> tuple[StoredShard, ...]:
        """The shards of the splits that chips were chosen of; those whose chips were all dropped too."""
        return chosen(self.map, self.plan).shards

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Shape (shard + 1,). Chips of shard i are rows offsets[i] to offsets[i + 1] of ``table``."""
        return chosen(self.map, self.plan).offsets

    @property
    def sizes(self) -> tuple[int, ...]:
        """Chosen chips of each shard, in the order of the chip table."""
        return chosen(self.map, self.plan).sizes

    @property
    def counts(self) -> dict[str, int]:
        """Split -> chosen chips, ``""`` for none, in the store's order."""
        found: dict[str, int] = {}
        if isinstance(self.map, StoreUnion):
            column = splits_of(self.map, self.rows).dictionary_decode()
            return {one["values"] or "": one["counts"] for one in pc.value_counts(column).to_pylist()}
        for shard, size in zip(self.shards, self.sizes, strict=True):
            found[shard.split or ""] = found.get(shard.split or "", 0) + size
        return found

    @property
    def table(self) -> pa.Table:
        """What batches have of the chip table: kept and chosen chips only."""
        return self.rows_of_table(slice(None))

    def rows_of_table(self, rows: NDArray[np.int64] | slice) -> pa.Table:
        """Return some rows of ``table``, in the order asked for."""
        table, chosen_rows = self.map.chips.table, self.rows[rows]
        if len(chosen_rows) == 1:  # a view
            return table.slice(int(chosen_rows[0]), 1)
        return table.take(pa.array(chosen_rows))

    @property
    def place(self) -> Mapping[str, int]:
        """Id of each chip -> its row in ``table``."""
        return _Places(self.map, self.rows)

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of ``table`` that some ids name, in their order.

        Raises
        ------
        PlanError
            When the store has no such chip, it was dropped, or it was not chosen.
        """
        place = self.place
        found = [place.get(i) for i in ids]
        unknown = [i for i, row in zip(ids, found, strict=True) if row is None]
        if unknown:
            raise PlanError(
                f"chips of store {remote.redact(self.url)}", self._why_not(unknown[0], len(unknown)),
                f"ids of its {len(self.rows)} chips", "They stand in column chip_id of .table.",
            )  # fmt: skip
        return np.array(found, dtype=np.int64)

    def _why_not(self, chip: str, others: int) -> str:
        more = f" (and {others - 1} more)" if others > 1 else ""
        for shard in self.map.shards:
            if chip in shard.dropped:
                return f"chip {chip!r}{more}, which filter_pixels() dropped: {shard.dropped[chip]}"
        is_there = self.map.chips.row_of(chip) is not None
        return f"chip {chip!r}{more}, " + ("which was not selected" if is_there else "which it never had")


@dataclass(frozen=True, slots=True, eq=False)
class _Places(Mapping[str, int]):
    """Id of each chip -> its place among the chosen ones."""

    store: StoreMap | StoreUnion
    rows: NDArray[np.int64]

    def __getitem__(self, chip: str) -> int:
        row = self.store.chips.row_of(chip) if isinstance(chip, str) else None
        place = len(self.rows) if row is None else int(self.rows.searchsorted(row))
        if place == len(self.rows) or self.rows[place] != row:
            raise KeyError(chip)
        return place

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.chips.table.column("chip_id").take(pa.array(self.rows)).to_pylist())

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The chips that a plan's steps choose, among all of a store."""

    rows: NDArray[np.int64]
    """As in :class:`Stored`, like the others."""
    shards: tuple[StoredShard, ...]
    offsets: NDArray[np.int64]
    sizes: tuple[int, ...]


def chosen(store: StoreMap | StoreUnion, plan: Node) -> Chosen:
    """Carry out a plan's steps, each once per process whatever the number of threads and tasks.

    Raises
    ------
    PlanError
        When a step names a split or a column that the store has not, or leaves no chip.
    """
    with _CHOOSING:
        return _chosen(store, plan)


@lru_cache(maxsize=8)
def _chosen(store: StoreMap | StoreUnion, plan: Node) -> Chosen:
    rows = _carried_out(store, plan)
    ends = rows.searchsorted(np.append(store.starts, store.planned))
    splits = {shard.split for shard, size in zip(store.shards, np.diff(ends), strict=True) if size}
    own = [n for n, shard in enumerate(store.shards) if shard.split in splits]
    offsets = np.array([0, *(ends[n + 1] for n in own)], dtype=np.int64)
    return Chosen(rows, tuple(store.shards[n] for n in own), offsets, tuple(np.diff(offsets).tolist()))


@lru_cache(maxsize=64)
def _digest(plan: Node) -> str:
    return digest(plan)


def _carried_out(store: StoreMap | StoreUnion, node: Node) -> NDArray[np.int64]:
    """Return the rows, among all of the store, that the last step of a plan leaves of what the others do."""
    if not isinstance(node, FilterChips | Select | Sample):
        return np.flatnonzero(store.kept)
    below = _chosen(store, node.child)
    why = ""
    match node:
        case FilterChips(_, where):
            from rasteret_dask.planning.scan import (
                alone,
                filter_table,
            )  # pandas: training workers start without it

            table = _columns(store, "filter", [column for column, *_ in where], below.rows)
            found = filter_table(table, where, "chips").column(_ROW).to_numpy()
            why = "" if len(found) else f" ({alone(table, where, 'chips')})"
        case Select(_, splits):
            dealt = isinstance(store, StoreUnion) and store.added is not None and store.added.has("split")
            column = splits_of(store, below.rows) if dealt else None
            there = (s.split for s in below.shards) if column is None else column.dictionary.to_pylist()
            names = list(dict.fromkeys(split for split in there if split))
            unknown = [s for s in splits if s not in names]
            if unknown:
                raise PlanError(
                    "select", f"split {', '.join(map(repr, unknown))}",
                    f"one of {', '.join(names)}" if names else "a store with splits",
                )  # fmt: skip
            if column is None:
                inside = np.repeat([s.split in splits for s in below.shards], below.sizes)
            else:
                inside = pc.is_in(column.dictionary_decode(), value_set=pa.array(splits)).to_numpy(False)
            found = below.rows[inside]
        case Sample(_, n, seed, by):
            table = _columns(store, "sample(by=)", ["chip_id", *([] if by is None else [by])], below.rows)
            found = below.rows[sample_rows(table, "chip_id", n, seed, by)]
    if not len(found):
        raise PlanError(
            step_name(node), f"no chip left of {len(below.rows):,}{why}", "at least one",
            "Ask for less, or remove the step.",
        )  # fmt: skip
    return np.asarray(found)


def splits_of(store: StoreMap | StoreUnion, rows: NDArray[np.int64]) -> pa.Array:
    """Return the split of each of some rows, as a dictionary column."""
    column = store.chips.table.column("split").take(pa.array(rows)).combine_chunks()
    return column.dictionary_encode()


def _columns(
    store: StoreMap | StoreUnion, subject: str, names: Sequence[str], rows: NDArray[np.int64]
) -> pa.Table:
    """Return columns that a step asks for, and which rows of the store they are of."""
    unknown = [name for name in names if name not in store.chips.names]
    if unknown:
        raise PlanError(
            f"{subject} on chip column {unknown[0]!r}",
            "no such column",
            f"one of {', '.join(store.chips.names)}",
        )
    table = store.chips.columns(list(dict.fromkeys(names)))
    return table.take(pa.array(rows)).append_column(_ROW, pa.array(rows))


def read_shard(store: Stored, number: int) -> Arrays:
    """Read the chosen chips of one shard.

    Parameters
    ----------
    store
        The chips.
    number
        Place of the shard among ``store.shards``.
    """
    begun = time.perf_counter()
    chips = take(store, np.arange(store.offsets[number], store.offsets[number + 1]))
    _log.debug("shard %s: read and decoded in %.2f s", store.shards[number].name, time.perf_counter() - begun)
    return chips


def take(store: Stored, rows: NDArray[np.int64]) -> Arrays:
    """Read some chips, in the order asked for; whole shards where most of their chips are wanted.

    Parameters
    ----------
    store
        The chips.
    rows
        Rows of ``store.table``.

    Raises
    ------
    StoreError
        When an object is missing, damaged, or of another size than the manifest says.
    """
    opened = store.map
    names = {g.source: [*dict.fromkeys(("pixels", "valid", *g.sampled))] for g in opened.first}
    read = read_variables(opened, store.rows[rows], names)
    arrays = {
        source if name == "pixels" else f"{source}/{name}": read[source, name]
        for source, variables in names.items()
        for name in variables
    }
    return {**arrays, **facts(store.rows_of_table(rows))}


def facts(table: pa.Table) -> Arrays:
    """Return what the chip table knows of each chip, as arrays of a batch."""
    found: Arrays = {
        "chip_id": _texts(table, "chip_id"),
        "split": _texts(table, "split"),
        "epsg": table.column("epsg").to_numpy().astype(np.int32),
        "bbox": bounds_of(table),
    }
    return found | {f"labels/{name}": values for name, values in label_columns(table).items()}


def _texts(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array([v or "" for v in table.column(name).to_pylist()], dtype=object)
