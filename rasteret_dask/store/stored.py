"""Chips come back from a finished store: whole shards, or any chips by single gets at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of, label_columns
from rasteret_dask.errors import PlanError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import Keep, Node, Sample, Select, Source, digest
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.store.storemap import StoredArray, StoredShard, StoreMap, open_map
from rasteret_dask.store.storeread import read_rows
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Stored", "facts", "no_nan", "read_shard", "sampled", "take"]

OWN = ("valid_fraction", "source")
"""Variables that shards' tasks write and samples do not carry."""

_ROW = "__row__"


@dataclass(frozen=True)
class Stored:
    """Chips of a finished store: which store, and which steps choose its chips. Pickles small; opens when used."""

    url: str
    plan: Node
    """Select, filter and sample steps over a source whose token is the store's digest."""

    @classmethod
    def of(cls, url: str, digest: str) -> Stored:
        """Return all kept chips of a store."""
        return cls(url, Source("store", digest))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not what was read on the way

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def map(self) -> StoreMap:
        """What the store holds."""
        node = self.plan
        while not isinstance(node, Source):
            assert isinstance(node, Keep | Select | Sample)
            node = node.child
        return open_map(self.url, node.token)

    @cached_property
    def digest(self) -> str:
        """What the chips are known by: the store's digest and the steps."""
        return digest(self.plan)

    @cached_property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        opened = self.map
        return {g.source: tuple(opened.values(g.arrays["band"]).tolist()) for g in opened.first}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Shape (chip,). Row of each chip among all of the store, rising."""
        return np.asarray(self._chosen.column(_ROW).to_numpy())

    @cached_property
    def table(self) -> pa.Table:
        """The chip table, without ``feeds``: kept and chosen chips only."""
        return self._chosen.drop_columns([_ROW])

    @cached_property
    def _chosen(self) -> pa.Table:
        opened = self.map
        rows = np.flatnonzero(opened.kept)
        table = opened.chips if opened.kept.all() else opened.chips.take(pa.array(rows))
        return _carried_out(self.plan, table.append_column(_ROW, pa.array(rows)))

    @cached_property
    def shards(self) -> tuple[StoredShard, ...]:
        """The shards of the splits that chips were chosen of; those whose chips were all dropped too."""
        opened = self.map
        chosen = {opened.shards[n].split for n in np.unique(self._shard_of(self.rows)).tolist()}
        return tuple(s for s in opened.shards if s.split in chosen)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Shape (shard + 1,). Chips of shard i are rows offsets[i] to offsets[i + 1] of ``table``."""
        ends = [self.rows.searchsorted(s.start + s.chips) for s in self.shards]
        return np.array([0, *ends], dtype=np.int64)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Chosen chips of each shard, in the order of the chip table."""
        return tuple(np.diff(self.offsets).tolist())

    @cached_property
    def place(self) -> Mapping[str, int]:
        """Id of each chip -> its row in ``table``."""
        return {chip: row for row, chip in enumerate(self.table.column("chip_id").to_pylist())}

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of ``table`` that some ids name, in their order.

        Raises
        ------
        PlanError
            When the store has no such chip, it was dropped, or it was not chosen.
        """
        unknown = [i for i in ids if i not in self.place]
        if unknown:
            raise PlanError(
                f"chips of store {remote.redact(self.url)}", self._why_not(unknown[0], len(unknown)),
                f"ids of its {len(self.rows)} chips", "They stand in column chip_id of .table.",
            )  # fmt: skip
        return np.array([self.place[i] for i in ids], dtype=np.int64)

    def _why_not(self, chip: str, others: int) -> str:
        more = f" (and {others - 1} more)" if others > 1 else ""
        for shard in self.map.shards:
            if chip in shard.dropped:
                return f"chip {chip!r}{more}, which keep() dropped: {shard.dropped[chip]}"
        known = chip in set(self.map.chips.column("chip_id").to_pylist())
        return f"chip {chip!r}{more}, " + ("which was not selected" if known else "which it never had")

    def _shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.map.starts, rows, side="right") - 1


def _carried_out(node: Node, table: pa.Table) -> pa.Table:
    """Return the rows that a plan's steps choose."""
    match node:
        case Keep(child, where):
            below = _carried_out(child, table)
            unknown = [column for column, *_ in where if column not in below.column_names]
            if unknown:
                raise PlanError(
                    f"filter on chip column {unknown[0]!r}", "no such column",
                    f"one of {', '.join(n for n in below.column_names if n != _ROW)}",
                )  # fmt: skip
            from rasteret_dask.planning.scan import filter_table  # pandas: training workers start without it

            found = filter_table(below, where, "chips")
        case Select(child, splits):
            below = _carried_out(child, table)
            known = [s for s in below.column("split").unique().to_pylist() if s]
            unknown = [s for s in splits if s not in known]
            if unknown:
                raise PlanError(
                    "select", f"split {', '.join(map(repr, unknown))}",
                    f"one of {', '.join(known)}" if known else "a store with splits",
                )  # fmt: skip
            found = below.filter(pc.is_in(below.column("split"), value_set=pa.array(splits)))
        case Sample(child, n, seed, by):
            below = _carried_out(child, table)
            found = below.take(pa.array(sample_rows(below, "chip_id", n, seed, by)))
        case _:
            return table
    if not found.num_rows:
        raise PlanError(type(node).__name__.lower(), f"no chip left of {below.num_rows}", "at least one")
    return found


def read_shard(store: Stored, number: int) -> Arrays:
    """Read the chosen chips of one shard.

    Parameters
    ----------
    store
        The chips.
    number
        Place of the shard among ``store.shards``.
    """
    return take(store, np.arange(store.offsets[number], store.offsets[number + 1]))


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
    names = {g.source: sampled(g.arrays) for g in opened.first}
    read = read_rows(opened, store.rows[rows], names)
    arrays: Arrays = {}
    for source, variables in names.items():
        pixels = arrays[source] = read[source, "pixels"]
        arrays[f"{source}/valid"] = read[source, "valid"] if "valid" in variables else no_nan(pixels)
        for name in variables:
            if name not in ("pixels", "valid"):
                arrays[f"{source}/{name}"] = read[source, name]
    return {**arrays, **facts(store.table.take(pa.array(rows)))}


def no_nan(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where pixels (..., time, band, y, x) of an array without ``valid`` are valid: shape (..., time, y, x)."""
    valid: NDArray[np.bool_] = ~np.isnan(pixels).any(axis=-3)
    return valid


def facts(table: pa.Table) -> Arrays:
    """Return what the chip table knows of each chip, as arrays of a batch."""
    found: Arrays = {
        "chip_id": _texts(table, "chip_id"),
        "split": _texts(table, "split"),
        "epsg": table.column("epsg").to_numpy().astype(np.int32),
        "bbox": bounds_of(table),
    }
    return found | {f"labels/{name}": values for name, values in label_columns(table).items()}


def sampled(arrays: Mapping[str, StoredArray]) -> list[str]:
    """Return the variables of a group that a sample carries: those of its own, a value or more a chip."""
    return [name for name, array in arrays.items() if name not in OWN and not array.known]


def _texts(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array([v or "" for v in table.column(name).to_pylist()], dtype=object)
