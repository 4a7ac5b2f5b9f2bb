# SPDX-License-Identifier: Apache-2.0
"""Chips come back from a finished store: whole shards, or any chips by single gets at the same time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from rasteret_dask.planning.plan import (
    FilterChips,
    Folds,
    Node,
    Sample,
    Select,
    Source,
    Split,
    SplitSpec,
    digest,
    step_name,
)
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.store.storemap import StoredShard, StoreMap, open_map
from rasteret_dask.store.union import Parts, StoreUnion, open_union, read_variables
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Stored", "facts", "read_shard", "take"]

_log = logging.getLogger(__name__)

_ROW = "__row__"
_CHOOSING = Lock()


@dataclass(frozen=True, slots=True)
class Stored:
    """Chips of a finished store: which store, and which steps choose its chips. Pickles small; opens when used."""

    url: str
    plan: Node
    """Select, filter, sample, split and folds steps over a source whose token is the store's digest."""
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
            assert isinstance(node, _STEPS)
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

    def rows_in(self, number: int, rows: slice | None = None) -> slice:
        """Return which rows of ``table`` a shard's chips are, or some of these."""
        first, end = int(self.offsets[number]), int(self.offsets[number + 1])
        return slice(first, end) if rows is None else slice(first + rows.start, min(first + rows.stop, end))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the chip table for the chosen chips.

        Raises
        ------
        PlanError
            When there is none of this name.
        """
        return _columns(self.map, "stream", [name], chosen(self.map, self.plan)).column(name)

    @property
    def table(self) -> pa.Table:
        """What batches have of the chip table: kept and chosen chips only."""
        return self.rows_of_table(slice(None))

    def rows_of_table(self, rows: NDArray[np.int64] | slice) -> pa.Table:
        """Return some rows of ``table``, in the order asked for."""
        table, own = self.map.chips.table, chosen(self.map, self.plan)
        chosen_rows = own.rows[rows]
        one = len(chosen_rows) == 1  # a view
        table = table.slice(int(chosen_rows[0]), 1) if one else table.take(pa.array(chosen_rows))
        if not own.columns:
            return table
        places = pa.array(np.arange(len(own.rows))[rows])
        return with_own(table, {name: column.take(places) for name, column in own.columns.items()})

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Return some columns of the chips; only these are read."""
        own = chosen(self.map, self.plan)
        table = self.map.chips.columns([name for name in names if name in self.map.chips.names])
        columns = {name: column for name, column in own.columns.items() if name in names}
        return with_own(table.take(pa.array(own.rows)), columns)

    def whole(self) -> pa.Table:
        """Return all columns of the chips."""
        own = chosen(self.map, self.plan)
        return with_own(self.map.chips.whole().take(pa.array(own.rows)), own.columns)

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> chips, ``""`` for none."""
        own = chosen(self.map, self.plan)
        counts: dict[str, int] = {}
        column = _dealt(self.map, own)
        if column is not None:
            return {one["values"] or "": one["counts"] for one in pc.value_counts(column).to_pylist()}
        for shard, size in zip(own.shards, own.sizes, strict=True):
            counts[shard.split or ""] = counts.get(shard.split or "", 0) + size
        return counts

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
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    """Columns that steps put over those of the store, shape (chip,) each."""


def with_own(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Return a chip table with columns put over its own, or behind them."""
    for name, column in columns.items():
        own = pa.field(name, column.type, nullable=name == "split" or bool(column.null_count))
        at = table.schema.get_field_index(name)
        table = table.append_column(own, column) if at < 0 else table.set_column(at, own, column)
    return table


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
    rows, columns = _carried_out(store, plan)
    ends = rows.searchsorted(np.append(store.starts, store.planned))
    splits = {shard.split for shard, size in zip(store.shards, np.diff(ends), strict=True) if size}
    own = [n for n, shard in enumerate(store.shards) if shard.split in splits]
    offsets = np.array([0, *(ends[n + 1] for n in own)], dtype=np.int64)
    return Chosen(
        rows, tuple(store.shards[n] for n in own), offsets, tuple(np.diff(offsets).tolist()), columns
    )


@lru_cache(maxsize=64)
def _digest(plan: Node) -> str:
    return digest(plan)


_STEPS = FilterChips | Select | Sample | Split | Folds


def _carried_out(
    store: StoreMap | StoreUnion, node: Node
) -> tuple[NDArray[np.int64], Mapping[str, pa.Array]]:
    """Return what the last step of a plan leaves of what the others do: rows of the store, and columns over its own."""
    if not isinstance(node, _STEPS):
        return np.flatnonzero(store.kept), {}
    below = _chosen(store, node.child)
    why, columns = "", dict(below.columns)
    match node:
        case Split(_, spec):
            columns["split"] = _split_column(store, spec, below)
            found = below.rows[np.asarray(columns["split"].is_valid())]
        case Folds(_, spec):
            columns["fold"] = _fold_column(store, spec, below)
            found = below.rows
        case FilterChips(_, where):
            from rasteret_dask.planning.scan import (
                alone,
                filter_table,
            )  # pandas: training workers start without it

            table = _columns(store, "filter", [column for column, *_ in where], below)
            found = filter_table(table, where, "chips").column(_ROW).to_numpy()
            why = "" if len(found) else f" ({alone(table, where, 'chips')})"
        case Select(_, splits):
            column = _dealt(store, below)
            there = (s.split for s in below.shards) if column is None else column.unique().to_pylist()
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
                inside = np.asarray(pc.is_in(column, value_set=pa.array(list(splits))))
            found = below.rows[inside]
        case Sample(_, n, seed, by):
            table = _columns(store, "sample(by=)", ["chip_id", *([] if by is None else [by])], below)
            found = below.rows[sample_rows(table, "chip_id", n, seed, by)]
    if not len(found):
        raise PlanError(
            step_name(node), f"no chip left of {len(below.rows):,}{why}", "at least one",
            "Ask for less, or remove the step.",
        )  # fmt: skip
    places = pa.array(np.searchsorted(below.rows, found))
    return np.asarray(found), {name: column.take(places) for name, column in columns.items()}


def _split_column(store: StoreMap | StoreUnion, spec: SplitSpec, below: Chosen) -> pa.Array:
    from rasteret_dask.store.storefolds import split_column  # shapely: training workers start without it

    return split_column(_columns(store, "split(by=)", [spec.by], below).column(spec.by), spec)


def _fold_column(store: StoreMap | StoreUnion, spec: SplitSpec, below: Chosen) -> pa.Array:
    from rasteret_dask.store.storefolds import (
        NEEDED,
        fold_column,
    )  # shapely: training workers start without it

    if "fold" in (*store.chips.names, *below.columns):
        raise PlanError(
            "folds",
            "a column fold that is there already",
            "chips without one",
            "chips.fold(0) takes it as it is.",
        )
    sides = [group.attrs.get("context_m", 0.0) for group in next(iter(store.groups.values()))]
    return fold_column(_columns(store, "folds", NEEDED, below), spec, max(sides))


def _dealt(store: StoreMap | StoreUnion, below: Chosen) -> pa.Array | None:
    """Return the split of each chip where that is not its shard's: dealt by a step, or in columns beside the store."""
    if "split" in below.columns:
        return below.columns["split"]
    if isinstance(store, StoreUnion) and store.has_splits_beside:
        return store.chips.columns(["split"]).column("split").take(pa.array(below.rows)).combine_chunks()
    return None


def _columns(store: StoreMap | StoreUnion, subject: str, names: Sequence[str], below: Chosen) -> pa.Table:
    """Return columns that a step asks for, and which rows of the store they are of."""
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in store.chips.names and name not in below.columns]
    if unknown:
        raise PlanError(
            f"{subject} on chip column {unknown[0]!r}",
            "no such column",
            f"one of {', '.join(store.chips.names)}",
            "chips.folds(5) makes it." if unknown[0] == "fold" else "",
        )
    own = {name: column for name, column in below.columns.items() if name in names}
    there = [name for name in names if name in store.chips.names]
    table = with_own(store.chips.columns(there).take(pa.array(below.rows)), own) if there else pa.table(own)
    return table.append_column(_ROW, pa.array(below.rows))


def read_shard(
    store: Stored, number: int, rows: slice | None = None, only: tuple[str, ...] | None = None
) -> Arrays:
    """Read the chosen chips of one shard.

    Parameters
    ----------
    store
        The chips.
    number
        Place of the shard among ``store.shards``.
    rows
        Which of the chosen chips; None: all.
    only
        The sources to read; None: all.
    """
    begun, own = time.perf_counter(), store.rows_in(number, rows)
    chips = take(store, np.arange(own.start, own.stop), only)
    _log.debug("shard %s: read and decoded in %.2f s", store.shards[number].name, time.perf_counter() - begun)
    return chips


def take(store: Stored, rows: NDArray[np.int64], only: tuple[str, ...] | None = None) -> Arrays:
    """Read some chips, in the order asked for; whole shards where most of their chips are wanted.

    Parameters
    ----------
    store
        The chips.
    rows
        Rows of ``store.table``.
    only
        The sources to read; None: all.

    Raises
    ------
    StoreError
        When an object is missing, damaged, or of another size than the manifest says.
    """
    opened = store.map
    groups = [g for g in opened.first if only is None or g.source in only]
    names = {g.source: [*dict.fromkeys(("pixels", "valid", *g.sampled))] for g in groups}
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
