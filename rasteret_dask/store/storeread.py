"""Variables of any chips of a finished store: whole shards, or single gets at the same time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.limits import BUDGET, host_of, pool, workers
from rasteret_dask.store import decode
from rasteret_dask.store.encode import ABSENT, Encoding
from rasteret_dask.store.storemap import StoredArray, StoredShard, StoreMap

__all__ = ["StoreObject", "read_rows"]


def read_rows(
    store: StoreMap, rows: NDArray[np.int64], names: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Read variables of some chips.

    Parameters
    ----------
    store
        The store.
    rows
        Rows among all chips of the store, in any order.
    names
        Source -> variables with a first dimension ``chip``, whose chunks are shards or parts of as many chips.

    Returns
    -------
    dict
        (source, variable) -> values, shape (row, ...); ``datetime`` as datetime64[us].
    """
    shard_of = np.searchsorted(store.starts, rows, side="right") - 1
    out = {
        (g.source, name): decode.array_of(g.arrays[name].encoding, (len(rows), *g.arrays[name].shape[1:]))
        for g in store.first
        for name in names.get(g.source, ())
    }
    parts: list[_Part] = []
    for number in np.unique(shard_of).tolist():
        shard, at = store.shards[number], np.flatnonzero(shard_of == number)
        for group in store.groups_of(shard):
            for name in names.get(group.source, ()):
                target = out[group.source, name]
                parts.append(_Part.make(store, shard, group.arrays[name], rows[at] - shard.start, at, target))
    threads = pool(host_of(store.url))
    first = [threads.submit(part.begin) for part in parts]
    rest: list[Future[None]] = []
    for part, begun in zip(parts, first, strict=True):
        index = begun.result()
        if index is not None:
            rest += [threads.submit(part.single, index, n) for n in range(len(part.chips))]
    for one in rest:
        one.result()
    return {key: v.view("datetime64[us]") if key[1] == "datetime" else v for key, v in out.items()}


@dataclass(frozen=True, slots=True)
class StoreObject:
    """One object of a store, as its manifest names it."""

    url: str
    digest: str
    path: str
    size: int
    checksum: int
    """CRC-32C."""

    @classmethod
    def of(cls, store: StoreMap, shard: StoredShard, array: StoredArray) -> StoreObject | None:
        """Return the object of a shard's chips, or None where all of them are fill, and there is none."""
        path = array.object(shard.number)
        known = shard.sizes.get(path)
        return None if known is None else cls(store.url, store.digest, path, *known)

    @property
    def subject(self) -> str:
        """What is read, for errors."""
        return f"reading {remote.redact(remote.join(self.url, self.path))}"

    def get(self, start: int, length: int) -> Any:
        """Return bytes of it, held against the manifest: its size, and all of it by its checksum."""
        try:
            found = remote.fetch(remote.join(self.url, self.path), start, length)
        except remote.MissingError as error:
            raise self._changed("nothing") from error
        if found.head.size != self.size:
            raise self._changed(f"{found.head.size} bytes")
        if (
            length == self.size
            and google_crc32c.extend(0, np.frombuffer(memoryview(found.data), np.uint8)) != self.checksum
        ):
            raise self._changed(f"{self.size} other bytes")
        return found.data

    def _changed(self, found: str) -> StoreError:
        return StoreError(
            self.subject, found, f"the {self.size} bytes that the manifest names",
            "The store was changed after it was written: write it again, or open it again if that was done.",
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _index(item: StoreObject, chips: int) -> NDArray[np.uint64]:
    tail = decode.index_nbytes(chips)
    return decode.index_of(chips, item.get(item.size - tail, tail), item.subject)


@lru_cache(maxsize=4096)
def _small(item: StoreObject) -> bytes:
    return bytes(item.get(0, item.size))


@dataclass(frozen=True)
class _Part:
    """Some chips of one array in one shard, and their places in memory."""

    item: StoreObject | None
    """Where they lie; None: all of the shard is fill, and there is no object."""
    encoding: Encoding
    chips: NDArray[np.int64]
    """Places in the shard."""
    of: int
    """Chips of the shard."""
    at: NDArray[np.int64]
    """Places in ``out``, one a chip."""
    out: NDArray[Any]

    @classmethod
    def make(
        cls, store: StoreMap, shard: StoredShard, array: StoredArray, chips: NDArray[np.int64],
        at: NDArray[np.int64], out: NDArray[Any],
    ) -> _Part:  # fmt: skip
        """Find the object of some chips."""
        return cls(StoreObject.of(store, shard, array), array.encoding, chips, shard.chips, at, out)

    def begin(self) -> NDArray[np.uint64] | None:
        """Read what one get brings: all of it, or the index that single chips need, which is returned."""
        if self.item is None:
            self.out[self.at] = self.encoding.fill
        elif not self.encoding.sharded:
            self.out[self.at] = decode.chunk_of(self.encoding, _small(self.item), self.item.subject)[
                self.chips
            ]
        elif 2 * len(self.chips) < self.of:
            return _index(self.item, self.encoding.chunk[0])
        else:
            self._whole(self.item)
        return None

    def single(self, index: NDArray[np.uint64], number: int) -> None:
        """Read one chip by a get of its own."""
        assert self.item is not None
        start, length = index[self.chips[number]].tolist()
        self._put(number, None if start == ABSENT else self.item.get(start, length), self.item)

    def _whole(self, item: StoreObject) -> None:
        """Read the whole shard by one get, and decode its chips on the process's threads for such work."""
        with BUDGET.hold(item.size):
            data = memoryview(item.get(0, item.size))
            per = self.encoding.chunk[0]
            index = decode.index_of(per, data[-decode.index_nbytes(per) :], item.subject)[self.chips]

            def one(number: int, start: int, length: int) -> None:
                self._put(number, None if start == ABSENT else data[start : start + length], item)

            for _ in workers().map(one, range(len(index)), *index.T.tolist()):
                pass

    def _put(self, number: int, data: Any, item: StoreObject) -> None:
        decode.chip_into(self.encoding, data, self.out[self.at[number]], item.subject)
