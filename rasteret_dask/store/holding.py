# SPDX-License-Identifier: Apache-2.0
"""Shards of a store held as they are stored: a batch's chips are decoded to their places in it, and nowhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.net.lending import Lender
from rasteret_dask.store import decode
from rasteret_dask.store.stored import Stored, facts, read_shard
from rasteret_dask.store.storeread import Packed, Target, fetch
from rasteret_dask.store.union import StoreUnion
from rasteret_dask.tasks.batches import Arrays, InMemory

__all__ = ["HeldShard", "hold"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldShard:
    """Chosen chips of one shard, compressed."""

    packed: dict[str, Packed]
    """Name in a batch -> its chips."""
    shapes: dict[str, tuple[int, ...]]
    """Name in a batch -> shape of a chip."""
    facts: Arrays
    """What the chip table says of them."""

    def empty(self, size: int, memory: Lender) -> Arrays:
        """Return memory for a batch of so many such chips."""
        out: Arrays = {}
        for name, packed in self.packed.items():
            out[name] = decode.array_of(packed.encoding, (size, *self.shapes[name]), memory)
            if name.endswith("/datetime"):
                out[name] = out[name].view("datetime64[us]")
            if self._is_pixels_only(name):
                time, _, y, x = self.shapes[name]
                out[f"{name}/valid"] = memory.array((size, time, y, x), bool)
        for name, values in self.facts.items():
            out[name] = np.empty((size, *values.shape[1:]), dtype=values.dtype)
        return out

    def put(
        self, rows: NDArray[np.int64] | None, out: Arrays, places: NDArray[np.int64]
    ) -> Sequence[Callable[[], None]]:
        """Put what the chip table says of some chips (rows; None: all) to their places; each is still to be decoded."""
        own = np.arange(len(places)) if rows is None else rows
        for name, values in self.facts.items():
            out[name][places] = values[own]
        decoded: list[tuple[Packed, Target]] = []
        for name, packed in self.packed.items():
            values = out[name].view(np.int64) if name.endswith("/datetime") else out[name]
            if packed.values is not None:
                values[places] = packed.values[own]
            else:
                valid = out[f"{name}/valid"] if self._is_pixels_only(name) else None
                decoded.append((packed, Target(values, valid)))
        return [
            partial(_decode, decoded, row, place)
            for row, place in zip(own.tolist(), places.tolist(), strict=True)
        ]

    def _is_pixels_only(self, name: str) -> bool:
        return "/" not in name and f"{name}/valid" not in self.packed


def _decode(decoded: Sequence[tuple[Packed, Target]], row: int, place: int) -> None:
    for packed, target in decoded:
        target.put(packed, row, place)


def hold(
    store: Stored,
    number: int,
    memory: Lender,
    rows: slice | None = None,
    only: tuple[str, ...] | None = None,
) -> HeldShard | InMemory:
    """Fetch the chosen chips of one shard, or some neighbours of them.

    Those with slots in other parts, or blank ones, are decoded at once.

    Parameters
    ----------
    store
        The chips.
    number
        Place of the shard among ``store.shards``.
    memory
        Where the bytes of a store on disk lie.
    rows
        Which of the chosen chips; None: all.
    only
        The sources to read; None: all.

    Raises
    ------
    StoreError
        When an object is missing, damaged, or of another size than the manifest says.
    """
    begun = time.perf_counter()
    opened, shard = store.map, store.shards[number]
    own = store.rows_in(number, rows)
    places = store.rows[own] - shard.start
    if isinstance(opened, StoreUnion):
        place = int(opened.starts.searchsorted(shard.start))
        if not opened.is_whole(place, store.rows[own]):
            return InMemory(read_shard(store, number, rows, only))
        opened, shard = opened.locate(place)
    groups = [g for g in opened.groups_of(shard) if only is None or g.source in only]
    found = fetch(opened, shard, places, {g.source: g.sampled for g in groups}, memory)
    _log.debug("shard %s: fetched in %.2f s", shard.name, time.perf_counter() - begun)
    arrays = {g.source: g.arrays for g in groups}
    names = {key: key[0] if key[1] == "pixels" else "/".join(key) for key in found}
    return HeldShard(
        {names[key]: packed for key, packed in found.items()},
        {names[key]: arrays[key[0]][key[1]].shape[1:] for key in found},
        facts(store.rows_of_table(own)),
    )
