# SPDX-License-Identifier: Apache-2.0
"""Variables of any chips of a finished store: whole shards, or ranges of neighbouring chips at the same time."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.allocator import settle
from rasteret_dask.net.lending import Lender
from rasteret_dask.net.limits import BUDGET, HOST_REQUESTS, host_of, pool, scratch, workers
from rasteret_dask.net.sums import CHECKSUM, crc32_of
from rasteret_dask.reader.ranges import Part, Span, coalesced
from rasteret_dask.store import decode
from rasteret_dask.store.bytecache import ByteCache
from rasteret_dask.store.encode import ABSENT, Encoding
from rasteret_dask.store.storemap import StoredArray, StoredGroup, StoredShard, StoreMap, digest_of

__all__ = ["Packed", "StoreObject", "Target", "fetch", "forget", "read_rows"]

ALONE = 2**20
"""Bytes of chips on a disk up to which the thread that asks reads them itself: to wake another one takes as long."""

AHEAD_BYTES = 32 * 2**20
"""Bytes that one call has under way at a host, at most."""

INDEX_BYTES = 32 * 2**20
"""Indexes of shards that a process keeps, at most: 16 bytes a chip and array, so those of two million."""

SMALL_BYTES = 16 * 2**20
"""Small arrays (times) that a process keeps, at most."""


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
        Source -> variables with a first dimension ``chip``, whose chunks are shards or parts of as many chips; and
        ``valid``, whether it is stored or follows from the pixels beside it.

    Returns
    -------
    dict
        (source, variable) -> values, shape (row, ...); ``datetime`` as datetime64[us].
    """
    settle()
    targets = {
        (group.source, name): Target.new(group, name, len(rows), "valid" in names[group.source])
        for group in store.first
        for name in names.get(group.source, ())
        if name in group.arrays
    }
    shard_of = np.searchsorted(store.starts, rows, side="right") - 1
    pieces: list[_Piece] = []
    folder = remote.Folder.of(store.url)
    for number in np.unique(shard_of).tolist():
        at = np.flatnonzero(shard_of == number)
        shard = store.shards[number]
        parts = _parts(store, folder, shard, rows[at] - shard.start, names)
        pieces += [_Piece(part, targets[key], at) for key, part in parts.items()]
    if remote.is_local(store.url):
        _from_disk(pieces)
    else:
        _from_host(folder, pieces)
    read: dict[tuple[str, str], NDArray[Any]] = {}
    for (source, name), target in targets.items():
        read[source, name] = target.values.view("datetime64[us]") if name == "datetime" else target.values
        if target.valid is not None:
            read[source, "valid"] = target.valid
    return read


def fetch(
    store: StoreMap,
    shard: StoredShard,
    chips: NDArray[np.int64],
    names: Mapping[str, Collection[str]],
    memory: Lender,
) -> dict[tuple[str, str], Packed]:
    """Read variables of some chips of one shard, and leave them as they are stored.

    Parameters
    ----------
    store, shard
        Where they lie.
    chips
        Places in the shard.
    names
        As in :func:`read_rows`; what is not stored is left out.
    memory
        Where whole shards of a disk lie.

    Returns
    -------
    dict
        (source, variable) -> the chips.
    """
    parts = _parts(store, remote.Folder.of(store.url), shard, chips, names)
    if remote.is_local(store.url):  # nothing to wait for
        return {key: part.packed_of(part.begin(memory)) for key, part in parts.items()}
    threads = pool(host_of(store.url))
    begun = {key: part.at_hand() or threads.submit(part.begin) for key, part in parts.items()}
    packed: dict[tuple[str, str], Packed] = {}
    rest: dict[tuple[str, str], list[Future[list[tuple[int, Any]]]]] = {}
    for key, future in begun.items():
        first = future.result() if isinstance(future, Future) else future
        if isinstance(first, Packed):
            packed[key] = first
        else:
            rest[key] = [threads.submit(parts[key].get, first, span) for span in first.spans()]
    for key, spans in rest.items():
        bodies: list[Any] = [None] * len(chips)
        for one in spans:
            for number, data in one.result():
                bodies[number] = data
        packed[key] = parts[key].packed(bodies)
    return packed


def forget() -> None:
    """Keep nothing of what was read: indexes of shards and small arrays."""
    _INDEXES.clear()
    _SMALL.clear()


def _parts(
    store: StoreMap,
    folder: remote.Folder,
    shard: StoredShard,
    chips: NDArray[np.int64],
    names: Mapping[str, Collection[str]],
) -> dict[tuple[str, str], _Part]:
    parts: dict[tuple[str, str], _Part] = {}
    for group in store.groups_of(shard):
        for name in names.get(group.source, ()):
            if name in group.arrays:
                array = group.arrays[name]
                item = StoreObject.of(store, folder, shard, array)
                parts[group.source, name] = _Part(item, array.encoding, chips, shard.chips)
    return parts


@dataclass(frozen=True, slots=True)
class Target:
    """Where chips of one array go."""

    values: NDArray[Any]
    """Shape (row, ...), dtype as stored."""
    valid: NDArray[np.bool_] | None
    """Shape (row, time, y, x). Where pixels are finite in all bands; None where that is stored, or not asked for."""

    @classmethod
    def new(cls, group: StoredGroup, name: str, size: int, valid: bool) -> Target:
        """Return memory for so many chips of a variable, and for validity that follows from pixels."""
        array = group.arrays[name]
        values = decode.array_of(array.encoding, (size, *array.shape[1:]))
        if name != "pixels" or not valid or "valid" in group.arrays:
            return cls(values, None)
        time, _, y, x = array.shape[1:]
        return cls(values, np.empty((size, time, y, x), bool))

    def put(self, packed: Packed, number: int, row: int) -> None:
        """Decode one chip to its row."""
        packed.into(number, self.values, row)
        if self.valid is not None:  # now, while the core still has the pixels at hand
            decode.finite_into(self.values[row], self.valid[row])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some chips of one array in one shard, and where they go."""

    part: _Part
    target: Target
    rows: NDArray[np.int64]

    def settle(self, first: Packed | _Index) -> list[_Bite]:
        """Put what is there to its rows; return what is still to be read."""
        if isinstance(first, Packed):
            self._put_small(first)
            return []
        target = self.target
        for row in self.rows[first.absent].tolist():
            target.put(self.part.packed([None]), 0, row)
        return [_Bite(self, first, span) for span in first.spans()]

    def read_whole(self) -> None:
        """Read all of the shard, and decode the chips on the process's threads for such work."""
        with BUDGET.hold(self.part.nbytes):
            packed = self.part.begin()
            assert isinstance(packed, Packed)
            groups = np.array_split(np.arange(len(self.rows)), CPU_COUNT)
            for _ in workers().map(self._decode, [packed] * CPU_COUNT, groups):
                pass

    def _decode(self, packed: Packed, numbers: NDArray[np.int64]) -> None:
        for number in numbers.tolist():
            self.target.put(packed, number, int(self.rows[number]))

    def _put_small(self, packed: Packed) -> None:
        if packed.values is not None:
            self.target.values[self.rows] = packed.values
        else:
            self._decode(packed, np.arange(len(self.rows)))


_Bodies: TypeAlias = "Sequence[tuple[int, Any]]"
"""The place of each chip among those asked for, and its bytes."""


@dataclass(frozen=True, slots=True)
class _Bite:
    """Neighbouring chips of one array in one shard, which one read brings."""

    piece: _Piece
    index: _Index
    span: Span[int]

    @property
    def path(self) -> str:
        """Its object."""
        item = self.piece.part.item
        assert item is not None
        return item.path

    @property
    def nbytes(self) -> int:
        """Bytes of its chips, decoded."""
        return int(self.piece.target.values[:1].nbytes) * len(self.span.parts)

    def from_disk(self) -> None:
        """Read it into memory that this thread keeps, and decode it from there."""
        self._decode(scratch(self.span.length))

    def fetched(self) -> _Bodies:
        """Fetch it: the place of each chip among those asked for, and its bytes."""
        with BUDGET.hold(self.span.length):
            return self.piece.part.get(self.index, self.span)

    def is_of(self, body: remote.Fetched) -> bool:
        """Tell whether bytes are of the object whose index is known; else the store has to be asked what it is now."""
        return body.head.etag == self.index.etag

    def cut(self, body: remote.Fetched) -> _Bodies:
        """Return the same of what a wave brought."""
        part, span = self.piece.part, self.span
        assert part.item is not None
        return part.cut(self.index, span, part.item.checked(body, span.length))

    def _decode(self, memory: NDArray[np.uint8] | None) -> None:
        self.settle(self.piece.part.get(self.index, self.span, memory))

    def settle(self, chips: _Bodies) -> None:
        """Decode what was fetched."""
        part, target = self.piece.part, self.piece.target
        for number, data in chips:
            target.put(part.packed([data]), 0, int(self.piece.rows[number]))


def _from_disk(pieces: Sequence[_Piece]) -> None:
    """Read pieces from files: little by this thread alone, else a run of bites by a thread a core."""
    threads = pool("")
    under_way: list[Future[None]] = []
    bites: list[_Bite] = []
    for piece in pieces:
        if piece.part.nbytes:
            under_way.append(threads.submit(piece.read_whole))
        else:
            bites += piece.settle(piece.part.begin())
    first, *others = _runs(bites)
    under_way += [threads.submit(_read_all, run) for run in others]
    _read_all(first)
    for one in under_way:
        one.result()


def _runs(bites: Sequence[_Bite]) -> list[Sequence[_Bite]]:
    """Return a run of bites for each thread, of about as many bytes."""
    ends = list(accumulate(bite.nbytes for bite in bites))
    if CPU_COUNT == 1 or not ends or ends[-1] <= ALONE:
        return [bites]
    cuts = [bisect_left(ends, ends[-1] * n / CPU_COUNT) for n in range(1, CPU_COUNT)]
    return [bites[start:stop] for start, stop in pairwise([0, *cuts, len(bites)])]


def _read_all(bites: Sequence[_Bite]) -> None:
    for bite in bites:
        bite.from_disk()


def _from_host(folder: remote.Folder, pieces: Sequence[_Piece]) -> None:
    """Read pieces from a server, requests at the same time; those of shards whose index is at hand go first."""
    threads = pool(host_of(folder.url))
    under_way: list[Future[None]] = []
    begun: list[tuple[_Piece, Future[Packed | _Index]]] = []
    fetching = _Fetching(folder)
    try:
        for piece in pieces:
            first = piece.part.at_hand()
            if first is not None:
                fetching.ask(piece.settle(first))
            elif piece.part.nbytes:
                under_way.append(threads.submit(piece.read_whole))
            else:
                begun.append((piece, threads.submit(piece.part.begin)))
        for piece, future in begun:
            if not future.done():
                fetching.drain()
            fetching.ask(piece.settle(future.result()))
        fetching.end()
    finally:
        fetching.close()
    for one in under_way:
        one.result()


class _Fetching:
    """Bites that are fetched from a server at the same time, and decoded as they come.

    Connections that are open are waited for together, by this thread; where they do not suffice, threads open more.
    Little is decoded by this thread alone, else some bites at a time by the threads for such work.
    """

    def __init__(self, folder: remote.Folder) -> None:
        self._folder = folder
        self._wave = folder.wave()
        self._threads = pool(host_of(folder.url))
        self._waiting: deque[_Bite] = deque()
        self._in_wave: dict[int, _Bite] = {}
        self._in_threads = 0
        self._done: SimpleQueue[Future[tuple[_Bite, _Bodies]]] = SimpleQueue()
        self._nbytes = 0  # under way
        self._fetched: list[tuple[_Bite, _Bodies]] = []
        self._decoding: deque[Future[None]] = deque()

    def ask(self, bites: Sequence[_Bite]) -> None:
        """Ask for bites, so many as may be under way; the others follow."""
        self._waiting.extend(bites)
        while self._waiting and len(self._in_wave) + self._in_threads < HOST_REQUESTS:
            span = self._waiting[0].span
            if self._nbytes and self._nbytes + span.length > AHEAD_BYTES:
                return
            bite = self._waiting.popleft()
            self._nbytes += span.length
            url = remote.join(self._folder.url, bite.path)
            if self._wave is not None and self._wave.begin(id(bite), url, span.start, span.length):
                self._in_wave[id(bite)] = bite
            else:
                self._by_thread(bite)

    def drain(self) -> None:
        """Wait for what this thread has under way: that holds turns at the host's gate, which other threads wait for.

        Whoever waits for these threads has to do it first: where a host refuses, there may be one turn for all.
        """
        while self._in_wave:
            assert self._wave is not None
            for number, found in self._wave.answers():
                bite = self._in_wave.pop(number)
                if found is None or not bite.is_of(found):
                    self._by_thread(bite)
                else:
                    self._settle(bite, bite.cut(found))

    def end(self) -> None:
        """Wait for all of them."""
        while self._in_wave or self._in_threads:
            self.drain()
            if self._in_threads:
                bite, bodies = self._done.get().result()
                self._in_threads -= 1
                self._settle(bite, bodies)
        if self._decoding:
            self._decoding.append(workers().submit(_settle_all, self._fetched))
        else:
            _settle_all(self._fetched)
        for future in self._decoding:
            future.result()

    def close(self) -> None:
        """Let go of what is under way."""
        if self._wave is not None:
            self._wave.close()

    def _by_thread(self, bite: _Bite) -> None:
        self._in_threads += 1
        self._threads.submit(lambda: (bite, bite.fetched())).add_done_callback(self._done.put)

    def _settle(self, bite: _Bite, bodies: _Bodies) -> None:
        self._nbytes -= bite.span.length
        self.ask(())
        self._fetched.append((bite, bodies))
        if sum(bite.nbytes for bite, _ in self._fetched) > ALONE:
            self._decoding.append(workers().submit(_settle_all, self._fetched))
            self._fetched = []
            if len(self._decoding) > 2 * CPU_COUNT:
                self._decoding.popleft().result()


def _settle_all(fetched: Sequence[tuple[_Bite, _Bodies]]) -> None:
    for bite, bodies in fetched:
        bite.settle(bodies)


@dataclass(frozen=True, slots=True)
class StoreObject:
    """One object of a store, as its manifest names it."""

    folder: remote.Folder = field(compare=False, repr=False)
    """The store, as it is asked in this call."""
    url: str
    digest: str
    path: str
    size: int
    checksum: int
    """CRC-32C."""

    @classmethod
    def of(
        cls, store: StoreMap, folder: remote.Folder, shard: StoredShard, array: StoredArray
    ) -> StoreObject | None:
        """Return the object of a shard's chips, or None where all of them are fill, and there is none."""
        path = array.object(shard.number)
        sums = store.sizes_of(shard).get(path)
        return None if sums is None else cls(folder, store.url, store.digest, path, *sums)

    def __str__(self) -> str:
        """Return what is read, for errors."""
        return f"reading {remote.redact(remote.join(self.url, self.path))}"

    def get(self, start: int, length: int, memory: NDArray[np.uint8] | None = None) -> Any:
        """Return bytes of it, held against the manifest: its size, and all of it by its checksum."""
        return self.fetch(start, length, memory).data

    def fetch(self, start: int, length: int, memory: NDArray[np.uint8] | None = None) -> remote.Fetched:
        """Return the same, with what the store says of the object; a local file's bytes lie in ``memory``."""
        try:
            found = self.folder.fetch(self.path, start, length, memory=memory)
        except remote.MissingError as error:
            raise self._changed("nothing") from error
        return self.checked(found, length)

    def checked(self, body: remote.Fetched, length: int) -> remote.Fetched:
        """Return so many bytes of it, held against the manifest."""
        if body.head.size != self.size:
            raise self._changed(f"{body.head.size} bytes")
        if length == self.size and crc32_of(body.data) != self.checksum:
            raise self._changed(f"{self.size} other bytes")
        return body

    def check_store(self) -> None:
        """Raise StoreError where the store is another one by now, which sizes and an index alone may not tell."""
        if digest_of(self.url) != self.digest:
            raise self._changed("an object of another store")

    def _changed(self, content: str) -> StoreError:
        return StoreError(
            str(self), content, f"the {self.size} bytes that the manifest names",
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


def _index_nbytes(index: _Index) -> int:
    return index.entries.nbytes + 512  # with the objects around it


def _values_nbytes(values: NDArray[Any]) -> int:
    return values.nbytes + 512


_INDEXES: ByteCache[StoreObject, _Index] = ByteCache(INDEX_BYTES, _index_nbytes)
"""Indexes of shards. Of a store written anew in the same place, the sizes of compressed objects tell; of one without
compression they are the same, and so is the index."""

_SMALL: ByteCache[StoreObject, NDArray[Any]] = ByteCache(SMALL_BYTES, _values_nbytes)
"""Arrays that are no shards, decoded."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Some chips of one array, as they are stored."""

    encoding: Encoding
    item: StoreObject | None
    """What was read, for errors; None where there is none."""
    pieces: Sequence[Any]
    """Bytes of each, None where all of it is fill; empty where ``values`` has them."""
    values: NDArray[Any] | None = None
    """The chips of an array whose chunks are not made of single ones."""
    verified: bool = False
    """Whether the whole object was compared with the manifest: then no chip's own checksum is looked at."""

    def into(self, number: int, out: NDArray[Any], place: int) -> None:
        """Decode one chip to its place in an array."""
        if self.values is not None:
            out[place] = self.values[number]
        elif self.verified:
            decode.body_into(self.encoding, self.pieces[number], out[place], self.item)
        else:
            decode.chip_into(self.encoding, self.pieces[number], out[place], self.item)


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

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`begin` brings and keeps: 0 where only some chips of the shard are wanted."""
        single = self.item is None or not self.encoding.sharded or self._few
        return 0 if single or self.item is None else self.item.size

    @property
    def _few(self) -> bool:
        """Whether to leave the others out: less than half of all, or neighbours, which are one range of bytes."""
        count = len(self.chips)
        return 2 * count < self.of or (
            4 * count <= 3 * self.of and self.chips[-1] - self.chips[0] == count - 1
        )

    def at_hand(self) -> Packed | _Index | None:
        """Return what :meth:`begin` would, where it has nothing to read; else None."""
        item = self.item
        if item is None:
            return self.packed([None] * len(self.chips))
        if not self.encoding.sharded:
            values = _SMALL.get(item)
            return None if values is None else Packed(self.encoding, item, (), values[self.chips])
        whole = None if self.nbytes else _INDEXES.get(item)
        return None if whole is None else _Index(whole.entries[self.chips], whole.etag)

    def begin(self, memory: Lender | None = None) -> Packed | _Index:
        """Read what one get brings: all of it, into memory that is lent, or the index that single chips need."""
        first, item = self.at_hand(), self.item
        if first is not None or item is None:
            assert first is not None
            return first
        if not self.encoding.sharded:
            values = decode.chunk_of(self.encoding, item.get(0, item.size), item)
            return Packed(self.encoding, item, (), _SMALL.put(item, values)[self.chips])
        per = self.encoding.chunk[0]
        tail = decode.index_nbytes(per)
        if not self.nbytes:
            found = item.fetch(max(0, item.size - tail), tail)
            if self.encoding.codec is None:
                item.check_store()
            entries = decode.index_of(per, found.data, item.size, str(item))
            whole = _INDEXES.put(item, _Index(entries, found.head.etag))
            return _Index(whole.entries[self.chips], whole.etag)
        data = memoryview(
            item.get(0, item.size, None if memory is None else memory.array((item.size,), np.uint8))
        )
        index = decode.index_of(per, data[-tail:], item.size, str(item))[self.chips]
        bodies = [None if s == ABSENT else data[s : s + n - CHECKSUM] for s, n in index.tolist()]
        return self.packed(bodies, verified=True)

    def get(
        self, index: _Index, span: Span[int], memory: NDArray[np.uint8] | None = None
    ) -> list[tuple[int, Any]]:
        """Read neighbouring chips by one get: the place of each among the chips asked for, and its bytes."""
        assert self.item is not None
        return self.cut(index, span, self.item.fetch(span.start, span.length, memory))

    def cut(self, index: _Index, span: Span[int], body: remote.Fetched) -> list[tuple[int, Any]]:
        """Return the same from bytes that are there."""
        assert self.item is not None
        if body.head.etag != index.etag:  # copied anew, or something else
            _INDEXES.clear()
            self.item.check_store()
        data = memoryview(body.data)
        return [(p.what, data[p.start - span.start : p.stop - span.start]) for p in span.parts]

    def packed(self, pieces: Sequence[Any], verified: bool = False) -> Packed:
        """Return chips of it whose bytes are there."""
        return Packed(self.encoding, self.item, pieces, None, verified)

    def packed_of(self, first: Packed | _Index) -> Packed:
        """Return chips of it after what :meth:`begin` returned."""
        if isinstance(first, Packed):
            return first
        bodies: list[Any] = [None] * len(self.chips)
        for span in first.spans():
            for number, data in self.get(first, span):
                bodies[number] = data
        return self.packed(bodies)
