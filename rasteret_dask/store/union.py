# SPDX-License-Identifier: Apache-2.0
"""Several finished stores, or the parts of one that grew, as one: a chip is one row, with the slots of all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import digest
from rasteret_dask.store.addedtables import AddedColumns, read_columns, table_path
from rasteret_dask.store.ledger import part_path
from rasteret_dask.store.storemap import (
    StoredArray,
    StoredGroup,
    StoredShard,
    StoreMap,
    check_sizes,
    open_map,
    open_store,
)
from rasteret_dask.store.storeread import read_rows
from rasteret_dask.store.uniontables import UnionColumns
from rasteret_dask.tasks.batches import SourcePixels
from rasteret_dask.words import Duplicates

__all__ = [
    "Grown",
    "Parts",
    "StoreUnion",
    "grown_store",
    "likeness",
    "open_parts",
    "open_union",
    "read_variables",
]

_OPENING = Lock()

_BLANKS: Mapping[str, Any] = {
    "valid": False,
    "valid_fraction": 0.0,
    "filled_fraction": 0.0,
    "masked_fraction": 0.0,
    "datetime": np.datetime64("NaT", "us"),
    "member": "",
    "present": False,
}
"""What a slot that a chip does not have holds; pixels, and what was asked for of slots, hold their fill."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which stores chips lie in: what another process opens. It pickles small."""

    stores: tuple[tuple[str, str], ...]
    """Place and digest of each part, in order."""
    origin: tuple[int, ...]
    """Per part, the number of the store that it is a part of."""
    duplicates: Duplicates = "raise"
    """What becomes of a slot of a chip that stands in two stores."""
    columns: tuple[str | None, ...] = ()
    """Per store, the added columns that are seen, as ``place#checksum``; None: it has none."""

    @property
    def digest(self) -> str:
        """What they are known by together."""
        if self.is_plain:
            return self.stores[0][1]
        seen = [None if mark is None else mark.rpartition("#")[2] for mark in self.columns]
        return digest("parts", [token for _, token in self.stores], seen if any(seen) else None)

    @property
    def is_plain(self) -> bool:
        """Whether this is one store that never grew, and has no added columns."""
        return len(self.stores) == 1 and not any(self.columns)


@dataclass(frozen=True)
class Grown:
    """A finished store as it lies there now."""

    parts: tuple[StoreMap, ...]
    """The store, and what was appended to it, in order."""
    version: int
    """The latest version of added columns; 0: there is none."""
    paths: Mapping[str, int] | None
    """Path -> bytes of all that lies there; None where the server does not list."""

    def check_sizes(self) -> None:
        """Compare the objects of all parts with their manifests, where they were listed."""
        for number, part in enumerate(self.parts):
            folder = f"{part_path(number)}/" if number else ""
            if self.paths is not None:
                own = {p.removeprefix(folder): n for p, n in self.paths.items() if p.startswith(folder)}
                check_sizes(part, own)


def grown_store(url: str) -> Grown:
    """Open a finished store and all parts that were appended to it: those up to the first that is not finished.

    Raises
    ------
    StoreError
        As :func:`open_store` does.
    """
    opened = [open_store(url)]
    paths = None if url.startswith(("http://", "https://")) else remote.listing(url)
    while _is_there(url, f"{part_path(len(opened))}/zarr.json", paths):
        opened.append(open_store(remote.join(url, part_path(len(opened)))))
    version = 0
    while _is_there(url, table_path(version + 1), paths):
        version += 1
    return Grown(tuple(opened), version, paths)


def _is_there(url: str, path: str, paths: Mapping[str, int] | None) -> bool:
    return remote.exists(remote.join(url, path)) if paths is None else path in paths


def open_parts(
    stores: Sequence[Grown], duplicates: Duplicates = "raise", version: int | None = None
) -> Parts:
    """Return what is seen of some stores that were looked at.

    Parameters
    ----------
    stores
        The stores.
    duplicates
        As in :func:`open_chips`.
    version
        Version of the added columns to see; None: the latest of each store that has some. 0: none.

    Raises
    ------
    StoreError
        When there is no such version.
    """
    every = tuple((part.url, part.digest) for store in stores for part in store.parts)
    origin = tuple(number for number, store in enumerate(stores) for _ in store.parts)
    seen = [read_columns(one.parts[0].url, one.parts[0].digest, version, one.version) for one in stores]
    return Parts(every, origin, duplicates, tuple(None if one is None else one.mark for one in seen))


def open_union(parts: Parts) -> StoreUnion:
    """Open parts as one, once per process whatever the number of threads.

    Raises
    ------
    StoreError
        When one of them is not there, or another store by now; or they do not fit together.
    """
    with _OPENING:
        return _opened(parts)


@lru_cache(maxsize=4)
def _opened(parts: Parts) -> StoreUnion:
    stores = tuple(open_map(url, token) for url, token in parts.stores)
    columns = tuple(None if mark is None else AddedColumns.at(mark) for mark in parts.columns)
    union = StoreUnion(stores, parts, columns)
    union.check()
    return union


def read_variables(
    store: StoreMap | StoreUnion, rows: NDArray[np.int64], names: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Read variables of some chips: as :func:`read_rows`, of several stores too."""
    return store.read(rows, names) if isinstance(store, StoreUnion) else read_rows(store, rows, names)


@dataclass(frozen=True)
class _Axis:
    """The slots of one source in all parts."""

    slots: NDArray[np.int64] | None
    """Shape (slot,), us since 1970: of all parts, rising; None where chips have no slots that are named."""
    length: int
    places: tuple[NDArray[np.int64], ...]
    """Per part, the place of each of its slots among all."""

    def is_whole(self, part: int) -> bool:
        """Whether a part has all slots."""
        return len(self.places[part]) == self.length


@dataclass(frozen=True, eq=False)
class StoreUnion:
    """What several stores hold together, without pixels: it has what a :class:`StoreMap` has, and is read like one.

    Rows are those of all parts one after another. Of a chip that several parts have, the row of the first one that
    kept it is kept, and stands for the others.
    """

    parts: tuple[StoreMap, ...]
    key: Parts
    added: tuple[AddedColumns | None, ...] = field(default=(), repr=False)
    """Per store, further columns of its chips, or other splits."""

    @property
    def url(self) -> str:
        """The first store."""
        return self.parts[0].url

    @property
    def digest(self) -> str:
        """What they are known by together."""
        return self.key.digest

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return self.parts[0].sources

    @property
    def note(self) -> Mapping[str, Any]:
        """What this package has put into the first root's attributes."""
        return self.parts[0].note

    @property
    def begins(self) -> NDArray[np.int64]:
        """Shape (part + 1,). Row of each part's first chip; then how many there are."""
        return self.chips.begins

    @property
    def planned(self) -> int:
        """How many rows there are: chips that were dropped, or stand in an earlier part, are among them."""
        return int(self.begins[-1])

    @cached_property
    def shards(self) -> tuple[StoredShard, ...]:
        """The shards of all parts; those of further ones are named after their part."""
        found: list[StoredShard] = []
        for number, part in enumerate(self.parts):
            begin, name = int(self.begins[number]), f"{part.url.rpartition('/')[2]}/" if number else ""
            found += [replace(s, start=s.start + begin, name=f"{name}{s.name}") for s in part.shards]
        return tuple(found)

    @cached_property
    def shard_parts(self) -> NDArray[np.int64]:
        """Shape (shard,). The part that each shard is of."""
        return np.repeat(np.arange(len(self.parts)), [len(part.shards) for part in self.parts])

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Shape (shard,). Row of each shard's first chip."""
        return np.array([s.start for s in self.shards], dtype=np.int64)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Shape (row,). True once for each chip: where it stands first, and no rule on pixels dropped it."""
        return self.chips.kept

    @cached_property
    def chips(self) -> UnionColumns:
        """The chip tables one after another, rows that are not kept included."""
        return UnionColumns(self.parts, self.key.origin, self.added)

    @cached_property
    def axes(self) -> dict[str, _Axis]:
        """Source -> its slots in all parts."""
        return {name: _axis([_slots(part, name) for part in self.parts]) for name in self.sources}

    @cached_property
    def first(self) -> tuple[StoredGroup, ...]:
        """A group a source, as those of the first part, with the slots of all parts."""
        return tuple(self._padded(group) for group in self.parts[0].first)

    def _padded(self, group: StoredGroup) -> StoredGroup:
        length = self.axes[group.source].length

        def grown(array: StoredArray) -> StoredArray:
            sizes = zip(array.dims, array.shape, strict=True)
            return replace(array, shape=tuple(length if dim == "time" else size for dim, size in sizes))

        return replace(group, arrays={name: grown(array) for name, array in group.arrays.items()})

    @property
    def has_splits_beside(self) -> bool:
        """Whether chips of some store were dealt anew."""
        return any(one is not None and one.has("split") for one in self.added)

    @cached_property
    def groups(self) -> Mapping[str | None, tuple[StoredGroup, ...]]:
        """Split -> a group a source."""
        if self.has_splits_beside:
            names = self.chips.table.column("split").unique().to_pylist()
            return dict.fromkeys(names, self.first)
        return dict.fromkeys((split for part in self.parts for split in part.groups), self.first)

    @cached_property
    def pixels(self) -> Mapping[str, SourcePixels]:
        """Source -> what its pixels are."""
        shapes = {group.source: group.arrays["pixels"].shape[1:] for group in self.first}
        return {name: replace(own, shape=shapes[name]) for name, own in self.parts[0].pixels.items()}

    @property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        return self.parts[0].bands

    def times(self, source: str) -> NDArray[np.int64] | None:
        """Return the start of each slot, us since 1970; None where chips have no slots that are named."""
        return self.axes[source].slots

    def values(self, array: StoredArray) -> NDArray[Any]:
        """Read an array that all parts have alike: names of bands, units."""
        return self.parts[0].values(array)

    def objects(self) -> Iterator[tuple[str, int]]:
        """Yield path and bytes of each object of all shards."""
        for part in self.parts:
            yield from part.objects()

    def locate(self, shard: int) -> tuple[StoreMap, StoredShard]:
        """Return the part that a shard is of, and the shard as it is known there."""
        part = int(self.shard_parts[shard])
        store = self.parts[part]
        return store, store.shards[shard - int(np.searchsorted(self.shard_parts, part))]

    def is_whole(self, shard: int, rows: NDArray[np.int64]) -> bool:
        """Whether rows of a shard are all there is of their chips: all slots, and in no other part."""
        part = int(self.shard_parts[shard])
        pairs = self.chips.pairs
        return all(axis.is_whole(part) for axis in self.axes.values()) and not (
            len(pairs) and bool(np.isin(rows, pairs[:, 0]).any())
        )

    def read(
        self, rows: NDArray[np.int64], names: Mapping[str, Collection[str]]
    ) -> dict[tuple[str, str], NDArray[Any]]:
        """Read variables of some chips, as :func:`read_rows` does: slots that a chip does not have are blank."""
        pairs = self.chips.pairs
        places, wanted = np.arange(len(rows)), rows
        if len(pairs):
            order = np.argsort(rows, kind="stable")
            first = np.searchsorted(rows[order], pairs[:, 0], side="left")
            last = np.searchsorted(rows[order], pairs[:, 0], side="right")
            more = [
                (order[at], pairs[n, 1])
                for n in np.flatnonzero(last > first)
                for at in range(first[n], last[n])
            ]
            places = np.append(places, np.array([at for at, _ in more], dtype=np.int64))
            wanted = np.append(wanted, np.array([row for _, row in more], dtype=np.int64))
        part_of = np.searchsorted(self.begins, wanted, side="right") - 1
        own = np.unique(part_of).tolist()
        if len(own) == 1 and all(axis.is_whole(own[0]) for axis in self.axes.values()):
            return read_rows(self.parts[own[0]], wanted - self.begins[own[0]], names)
        result: dict[tuple[str, str], NDArray[Any]] = {}
        for part in reversed(own):  # so that what stands in two of them is the first one's
            inside = part_of == part
            found = read_rows(self.parts[part], wanted[inside] - self.begins[part], names)
            for (source, name), values in found.items():
                if (source, name) not in result:
                    result[source, name] = self._blank(source, name, values, len(rows))
                self._put(result[source, name], places[inside], part, source, name, values)
        if not own:
            return read_rows(self.parts[0], wanted, names)
        return result

    def _blank(self, source: str, name: str, like: NDArray[Any], size: int) -> NDArray[Any]:
        shape = [size, *like.shape[1:]]
        if not self.has_time(source, name):
            return np.empty(shape, like.dtype)
        shape[1] = self.axes[source].length
        group = next(group for group in self.parts[0].first if group.source == source)
        fill = _BLANKS[name] if name in _BLANKS else group.arrays[name].encoding.fill
        return np.full(shape, fill, like.dtype)

    def _put(
        self,
        into: NDArray[Any],
        rows: NDArray[np.int64],
        part: int,
        source: str,
        name: str,
        values: NDArray[Any],
    ) -> None:
        if not self.has_time(source, name):
            into[rows] = values
            return
        for place, slot in enumerate(self.axes[source].places[part].tolist()):
            into[rows, slot] = values[:, place]

    def has_time(self, source: str, name: str) -> bool:
        """Whether a variable of a source has a value or more a slot."""
        group = next(group for group in self.parts[0].first if group.source == source)
        return name == "valid" or "time" in group.arrays[name].dims

    # Whether they fit

    def check(self) -> None:
        """Raise where parts are not alike, chips have two splits, or a slot of a chip stands twice.

        Raises
        ------
        StoreError
            It names the store and what differs.
        """
        for part in self.parts[1:]:
            _check_alike(self.parts[0], part)
        self.chips.check()
        pairs = self.chips.pairs
        if not len(pairs):
            return
        table = self.chips.table.select(["chip_id", "split"])
        one, two = (table.take(pa.array(pairs[:, side])) for side in (0, 1))
        unlike = pc.not_equal(pc.fill_null(one["split"], ""), pc.fill_null(two["split"], ""))
        if pc.any(unlike).as_py():
            at = pc.index(unlike, True).as_py()
            self._refuse(
                int(pairs[at, 1]), f"chip {one['chip_id'][at]} in split {two['split'][at].as_py()!r}",
                f"split {one['split'][at].as_py()!r}, as in the other store",
                "Write, or deal, both with the same split(...); columns=0 sees the splits that they were written with.",
            )  # fmt: skip
        if self.key.duplicates == "raise":
            self._check_slots(pairs)

    def _check_slots(self, pairs: NDArray[np.int64]) -> None:
        """Refuse chips that stand in two stores with the same slot."""
        part_of = np.searchsorted(self.begins, pairs, side="right") - 1
        origin = np.array(self.key.origin)
        apart = origin[part_of[:, 0]] != origin[part_of[:, 1]]
        for a, b in np.unique(part_of[apart], axis=0).tolist():
            for source, axis in self.axes.items():
                both = np.intersect1d(axis.places[a], axis.places[b])
                if not len(both):
                    continue
                here = np.flatnonzero(apart & (part_of == (a, b)).all(axis=1))
                ids = self.chips.table.column("chip_id").take(pa.array(pairs[here, 0])).to_pylist()
                slot = "" if axis.slots is None else f" with slot {_stamp(axis.slots[both[0]])}"
                self._refuse(
                    int(pairs[here[0], 1]), f"{len(ids)} chips of another store{slot} of source {source!r} "
                    f"({first_of(ids, 3)})", "each slot of a chip once",
                    'Leave one of the stores out, or say duplicates="first": then the first store\'s slot is taken.',
                )  # fmt: skip

    def _refuse(self, row: int, fault: str, expected: str, remedy: str) -> None:
        part = self.parts[int(np.searchsorted(self.begins, row, side="right")) - 1]
        raise StoreError(f"store {remote.redact(part.url)}", fault, expected, remedy)


def _stamp(slot: np.int64) -> str:
    return str(slot.view("datetime64[us]").astype("datetime64[s]"))


def _slots(part: StoreMap, source: str) -> tuple[int, NDArray[np.int64] | None]:
    """Return how many slots a source has in a part, and their starts."""
    group = next(group for group in part.first if group.source == source)
    return group.arrays["pixels"].shape[1], part.times(source)


def _axis(parts: Sequence[tuple[int, NDArray[np.int64] | None]]) -> _Axis:
    stamps = [slots for _, slots in parts if slots is not None]
    if len(stamps) < len(parts):  # not named: the shorter ones end earlier
        length = max(count for count, _ in parts)
        return _Axis(None, length, tuple(np.arange(count) for count, _ in parts))
    every = np.unique(np.concatenate(stamps))
    return _Axis(every, len(every), tuple(np.searchsorted(every, slots) for slots in stamps))


def _check_alike(one: StoreMap, two: StoreMap) -> None:
    """Raise StoreError where the chips of two stores are of different kinds."""
    mine, theirs = likeness(one), likeness(two)
    for name in dict.fromkeys([*mine, *theirs]):
        if mine.get(name) != theirs.get(name):
            raise StoreError(
                f"store {remote.redact(two.url)}", f"{name}: {theirs.get(name, 'none')}",
                f"{mine.get(name, 'none')}, as in {remote.redact(one.url)}",
                "Only stores of the same sources, bands, sizes, dtypes and units are opened together.",
            )  # fmt: skip


def likeness(store: StoreMap) -> dict[str, str]:
    """Return what parts have in common, by name: all that batches are made of but chips, their columns and dates."""
    found = {"sources": ", ".join(store.sources)}
    for group in store.first:
        own, array = store.pixels[group.source], group.arrays["pixels"]
        name, (_, _, _, height, width) = f"source {group.source!r}", array.shape
        found |= {
            f"bands of {name}": ", ".join(own.bands),
            f"dtype of {name}": own.dtype,
            f"size of {name}": f"{height} x {width} pixels",
            f"units of {name}": own.units or "none",
            f"kinds of {name}": ", ".join(band.kind or "unknown" for band in own.kinds),
            f"scale of {name}": str(array.attrs.get("scale_factor", 1)),
            f"time axis of {name}": "none" if store.times(group.source) is None else "slots",
            f"variables of {name}": ", ".join(sorted({*group.sampled})),
            f"classes of {name}": "; ".join(", ".join(names) for names in own.classes.values()) or "none",
        }
        if group.meta:
            kinds = (group.arrays[one].encoding.dtype or "text" for one in group.meta)
            told = [f"{one} ({kind})" for one, kind in zip(group.meta, kinds, strict=True)]
            found[f"meta of {name}"] = ", ".join(told)
    return found
