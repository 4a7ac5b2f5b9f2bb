"""Variables of any chips of a finished store: whole shards, or ranges of neighbouring chips at the same time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.limits import BUDGET, host_of, pool, workers
from rasteret_dask.net.sums import crc32_of
from rasteret_dask.reader.ranges import Part, Span, coalesced
from rasteret_dask.store import decode
from rasteret_dask.store.encode import ABSENT, Encoding
from rasteret_dask.store.storemap import StoredArray, StoredShard, StoreMap, digest_of

__all__ = ["Packed", "StoreObject", "fetch", "read_rows"]


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
    threads = pool(host_of(store.url))
    under_way: list[tuple[_Part, Future[Any], NDArray[Any], NDArray[np.int64]]] = []
    for number in np.unique(shard_of).tolist():
        at = np.flatnonzero(shard_of == number)
        shard = store.shards[number]
        for (source, name), part in _parts(store, shard, rows[at] - shard.start, names).items():
            target = out[source, name]
            under_way.append((part, threads.submit(_begin_into, part, target, at), target, at))
    rest: list[Future[None]] = []
    for part, begun, target, at in under_way:
        index = begun.result()
        if index is not None:
            target[at[index.absent]] = part.encoding.fill
            rest += [threads.submit(_span_into, part, index, span, target, at) for span in index.spans()]
    for one in rest:
        one.result()
    return {key: v.view("datetime64[us]") if key[1] == "datetime" else v for key, v in out.items()}


def fetch(
    store: StoreMap, shard: StoredShard, chips: NDArray[np.int64], names: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], Packed]:
    """Read variables of some chips of one shard, and leave them as they are stored.

    Parameters
    ----------
    store, shard
        Where they lie.
    chips
        Places in the shard.
    names
        As in :func:`read_rows`.

    Returns
    -------
    dict
        (source, variable) -> the chips.
    """
    threads = pool(host_of(store.url))
    parts = _parts(store, shard, chips, names)
    begun = {key: threads.submit(part.begin) for key, part in parts.items()}
    found: dict[tuple[str, str], Packed] = {}
    rest: dict[tuple[str, str], list[Future[list[tuple[int, Any]]]]] = {}
    for key, future in begun.items():
        first = future.result()
        if isinstance(first, Packed):
            found[key] = first
        else:
            rest[key] = [threads.submit(parts[key].get, first, span) for span in first.spans()]
    for key, spans in rest.items():
        pieces: list[Any] = [None] * len(chips)
        for one in spans:
            for number, data in one.result():
                pieces[number] = data
        found[key] = parts[key].packed(pieces)
    return found


def _parts(
    store: StoreMap, shard: StoredShard, chips: NDArray[np.int64], names: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], _Part]:
    return {
        (group.source, name): _Part.make(store, shard, group.arrays[name], chips)
        for group in store.groups_of(shard)
        for name in names.get(group.source, ())
    }


def _begin_into(part: _Part, out: NDArray[Any], places: NDArray[np.int64]) -> _Index | None:
    """Read and decode what one get brings, on the process's threads for such work; else return the index."""
    with BUDGET.hold(part.nbytes):
        found = part.begin()
        if not isinstance(found, Packed):
            return found
        if part.nbytes:
            for _ in workers().map(found.into, range(len(places)), repeat(out), places.tolist()):
                pass
        elif found.values is not None:
            out[places] = found.values
        else:
            out[places] = part.encoding.fill
    return None


def _span_into(
    part: _Part, index: _Index, span: Span[int], out: NDArray[Any], places: NDArray[np.int64]
) -> None:
    with BUDGET.hold(span.length):
        for number, data in part.get(index, span):
            part.packed([data]).into(0, out, int(places[number]))


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
        return self.fetch(start, length).data

    def fetch(self, start: int, length: int) -> remote.Fetched:
        """Return the same, with what the store says of the object."""
        try:
            found = remote.fetch(remote.join(self.url, self.path), start, length)
        except remote.MissingError as error:
            raise self._changed("nothing") from error
        if found.head.size != self.size:
            raise self._changed(f"{found.head.size} bytes")
        if length == self.size and crc32_of(found.data) != self.checksum:
            raise self._changed(f"{self.size} other bytes")
        return found

    def check_store(self) -> None:
        """Raise StoreError where the store is another one by now, which sizes and an index alone may not tell."""
        if digest_of(self.url) != self.digest:
            raise self._changed("an object of another store")

    def _changed(self, content: str) -> StoreError:
        return StoreError(
            self.subject, content, f"the {self.size} bytes that the manifest names",
            "The store was changed after it was written: write it again, or open it again if that was done.",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Index:
    """Where chips of a shard lie."""

    entries: NDArray[np.uint64]
    """Shape (chip, 2): offset and length; ABSENT where a chip is not stored."""
    etag: str | None
    """The version of the object that they are true of."""

    @property
    def absent(self) -> NDArray[np.bool_]:
        """Shape (chip,). True for chips that are not stored: all of them is fill."""
        return np.equal(self.entries[:, 0], ABSENT)

    def spans(self) -> list[Span[int]]:
        """Return what to ask for: a request for chips whose bytes lie near each other."""
        parts = [
            Part(start, length, number)
            for number, (start, length) in enumerate(self.entries.tolist())
            if start != ABSENT
        ]
        return list(coalesced(parts))


@lru_cache(maxsize=4096)
def _index(item: StoreObject, chips: int, compressed: bool) -> _Index:
    """Read a shard's index, once per process.

    Of a store written anew in the same place, the sizes of compressed objects tell; of one without compression they
    are the same, and so is the index.
    """
    tail = decode.index_nbytes(chips)
    found = item.fetch(max(0, item.size - tail), tail)
    if not compressed:
        item.check_store()
    return _Index(decode.index_of(chips, found.data, item.size, item.subject), found.head.etag)


@lru_cache(maxsize=4096)
def _small(item: StoreObject) -> bytes:
    return bytes(item.get(0, item.size))


@dataclass(frozen=True, slots=True)
class Packed:
    """Some chips of one array, as they are stored."""

    encoding: Encoding
    subject: str
    """What was read, for errors."""
    pieces: Sequence[Any]
    """Bytes of each, None where all of it is fill; empty where ``values`` has them."""
    values: NDArray[Any] | None = None
    """The chips of an array whose chunks are not made of single ones."""

    def into(self, number: int, out: NDArray[Any], place: int) -> None:
        """Decode one chip to its place in an array."""
        if self.values is not None:
            out[place] = self.values[number]
        else:
            decode.chip_into(self.encoding, self.pieces[number], out[place], self.subject)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some chips of one array in one shard."""

    item: StoreObject | None
    """Where they lie; None: all of the shard is fill, and there is no object."""
    encoding: Encoding
    chips: NDArray[np.int64]
    """Places in the shard."""
    of: int
    """Chips of the shard."""

    @classmethod
    def make(cls, store: StoreMap, shard: StoredShard, array: StoredArray, chips: NDArray[np.int64]) -> _Part:
        """Find the object of some chips."""
        return cls(StoreObject.of(store, shard, array), array.encoding, chips, shard.chips)

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`begin` brings and keeps."""
        single = self.item is None or not self.encoding.sharded or 2 * len(self.chips) < self.of
        return 0 if single or self.item is None else self.item.size

    def begin(self) -> Packed | _Index:
        """Read what one get brings: all of it, or the index that single chips need."""
        item = self.item
        if item is None:
            return self.packed([None] * len(self.chips))
        if not self.encoding.sharded:
            values = decode.chunk_of(self.encoding, _small(item), item.subject)
            return Packed(self.encoding, item.subject, (), values[self.chips])
        per = self.encoding.chunk[0]
        if not self.nbytes:
            whole = _index(item, per, self.encoding.codec is not None)
            return _Index(whole.entries[self.chips], whole.etag)
        data = memoryview(item.get(0, item.size))
        tail = data[-decode.index_nbytes(per) :]
        index = decode.index_of(per, tail, item.size, item.subject)[self.chips]
        return self.packed([None if s == ABSENT else data[s : s + n] for s, n in index.tolist()])

    def get(self, index: _Index, span: Span[int]) -> list[tuple[int, Any]]:
        """Read neighbouring chips by one get: the place of each among the chips asked for, and its bytes."""
        assert self.item is not None
        found = self.item.fetch(span.start, span.length)
        if found.head.etag != index.etag:  # copied anew, or something else
            _index.cache_clear()
            self.item.check_store()
        data = memoryview(found.data)
        return [(p.what, data[p.start - span.start : p.stop - span.start]) for p in span.parts]

    def packed(self, pieces: Sequence[Any]) -> Packed:
        """Return chips of it whose bytes are known."""
        return Packed(self.encoding, "" if self.item is None else self.item.subject, pieces)
