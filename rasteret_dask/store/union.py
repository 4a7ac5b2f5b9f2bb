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

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.crs import unpack
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
    "datetime": np.datetime64("NaT", "us"),
    "member": "",
    "present": False,
}
"""What a slot that a chip does not have holds; pixels hold their fill."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which stores chips lie in: what another process opens. It pickles small."""

    stores: tuple[tuple[str, str], ...]
    """Place and digest of each part, in order."""
    origin: tuple[int, ...]
    """Per part, the number of the store that it is a part of."""
    duplicates: Duplicates = "raise"
    """What becomes of a slot of a chip that stands in two stores."""
    columns: str | None = None
    """The added columns that are seen, as ``place#checksum``; None: there are none."""

    @property
    def digest(self) -> str:
        """What they are known by together."""
        if len(self.stores) == 1 and self.columns is None:
            return self.stores[0][1]
        seen = None if self.columns is None else self.columns.rpartition("#")[2]
        return digest("parts", [token for _, token in self.stores], seen)

    @property
    def is_plain(self) -> bool:
        """Whether this is one store that never grew, and has no added columns."""
        return len(self.stores) == 1 and self.columns is None


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
        Version of the added columns to see; None: the latest, where there are any. 0: none.

    Raises
    ------
    StoreError
        When there is no such version.
    """
    every = tuple((part.url, part.digest) for store in stores for part in store.parts)
    origin = tuple(number for number, store in enumerate(stores) for _ in store.parts)
    columns = None
    if len(stores) == 1:
        first = stores[0].parts[0]
        columns = read_columns(first.url, first.digest, version, stores[0].version)
    return Parts(every, origin, duplicates, None if columns is None else columns.mark)


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
    columns = None if parts.columns is None else AddedColumns.at(parts.columns)
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
    added: AddedColumns | None = field(default=None, repr=False)
    """Further columns of chips, or other splits."""

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

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """Shape (part + 1,). Row of each part's first chip; then how many there are."""
        return np.cumsum([0, *(part.planned for part in self.parts)])

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
        return self._same[0]

    @cached_property
    def _same(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which rows are kept; and (row, further row) of chips that several parts have, shape (pair, 2)."""
        kept = np.concatenate([part.kept for part in self.parts])
        rows = np.flatnonzero(kept)
        ids = self.chips.table.column("chip_id").take(pa.array(rows)).combine_chunks().dictionary_encode()
        codes = ids.indices.to_numpy()
        if len(ids.dictionary) == len(rows):
            return kept, np.zeros((0, 2), dtype=np.int64)
        first = np.full(len(ids.dictionary), len(rows), dtype=np.int64)
        np.minimum.at(first, codes, np.arange(len(rows)))
        again = first[codes] != np.arange(len(rows))
        kept[rows[again]] = False
        return kept, np.stack([rows[first[codes[again]]], rows[again]], -1)

    @cached_property
    def chips(self) -> UnionColumns:
        """The chip tables one after another, rows that are not kept included."""
        return UnionColumns(self)

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

    @cached_property
    def groups(self) -> Mapping[str | None, tuple[StoredGroup, ...]]:
        """Split -> a group a source."""
        if self.added is not None and self.added.has("split"):
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
        pairs = self._same[1]
        return all(axis.is_whole(part) for axis in self.axes.values()) and not (
            len(pairs) and bool(np.isin(rows, pairs[:, 0]).any())
        )

    def read(
        self, rows: NDArray[np.int64], names: Mapping[str, Collection[str]]
    ) -> dict[tuple[str, str], NDArray[Any]]:
        """Read variables of some chips, as :func:`read_rows` does: slots that a chip does not have are blank."""
        pairs = self._same[1]
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
        if not self._has_time(source, name):
            return np.empty(shape, like.dtype)
        shape[1] = self.axes[source].length
        group = next(group for group in self.parts[0].first if group.source == source)
        fill = group.arrays[name].encoding.fill if name == "pixels" else _BLANKS[name]
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
        if not self._has_time(source, name):
            into[rows] = values
            return
        for place, slot in enumerate(self.axes[source].places[part].tolist()):
            into[rows, slot] = values[:, place]

    def _has_time(self, source: str, name: str) -> bool:
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
        pairs = self._same[1]
        if not len(pairs):
            return
        table = self.chips.parted.select(["chip_id", "split"])
        one, two = (table.take(pa.array(pairs[:, side])) for side in (0, 1))
        unlike = pc.not_equal(pc.fill_null(one["split"], ""), pc.fill_null(two["split"], ""))
        if pc.any(unlike).as_py():
            at = pc.index(unlike, True).as_py()
            self._refuse(
                int(pairs[at, 1]), f"chip {one['chip_id'][at]} in split {two['split'][at].as_py()!r}",
                f"split {one['split'][at].as_py()!r}, as in the other store",
                "Write both with the same split(...).",
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
                "Only stores of the same sources, bands, sizes, dtypes, units and columns are opened together.",
            )  # fmt: skip


def likeness(store: StoreMap) -> dict[str, str]:
    """Return what parts have in common, by name: all that batches are made of but chips and dates."""
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
    fields = store.chips.table.schema
    names = sorted(f"{field.name} ({field.type})" for field in fields if field.name not in CHIP_SCHEMA.names)
    return found | {"columns": ", ".join(names) or "none"}


class UnionColumns:
    """The chip table of several stores: what :class:`ChipColumns` is of one.

    Parameters
    ----------
    union
        The stores.
    """

    def __init__(self, union: StoreUnion) -> None:
        self._union = union
        self._lock = Lock()

    @property
    def parted(self) -> pa.Table:
        """What batches have of each chip, as the parts say it: without added columns."""
        with self._lock:
            return self._parted

    @cached_property
    def _parted(self) -> pa.Table:
        return _stacked([part.chips.table for part in self._union.parts])

    @property
    def table(self) -> pa.Table:
        """What batches have of each chip."""
        parted = self.parted
        with self._lock:
            if self._union.added is None:
                return parted
            if self._with_added is None:
                self._with_added = self._union.added.joined(parted).combine_chunks()
            return self._with_added

    _with_added: pa.Table | None = None

    @property
    def names(self) -> Sequence[str]:
        """All columns but ``feeds``: those that steps may name."""
        own = list(self._union.parts[0].chips.names)
        return (
            own
            if self._union.added is None
            else [*own, *(n for n in self._union.added.names if n not in own)]
        )

    def columns(self, wanted: Collection[str]) -> pa.Table:
        """Return some columns of all rows; those that batches do not have are read for this."""
        table = self.table
        more = [name for name in wanted if name not in table.column_names]
        found = table.select([name for name in wanted if name not in more])
        if more:
            read = _stacked([part.chips.columns(more) for part in self._union.parts])
            for name in more:
                found = found.append_column(name, read.column(name))
        return found

    def whole(self) -> pa.Table:
        """Read all columns."""
        table = _stacked([part.chips.whole() for part in self._union.parts])
        return table if self._union.added is None else self._union.added.joined(table)

    def row_of(self, chip: str) -> int | None:
        """Return the row of the chip with this id that is kept; else one that is not, else None."""
        begins, last = self._union.begins, None
        for number, part in enumerate(self._union.parts):
            row = part.chips.row_of(chip)
            if row is None:
                continue
            last = int(begins[number]) + row
            if self._union.kept[last]:
                return last
        return last


def _stacked(tables: Sequence[pa.Table]) -> pa.Table:
    """Return tables one below the other, with the CRSs of all."""
    if len(tables) == 1:
        return tables[0]
    tables = [_plain(table) for table in tables]
    wkts = [unpack(table.schema.metadata) for table in tables]
    packed = {key: value for table in tables for key, value in (table.schema.metadata or {}).items()}
    table = pa.concat_tables(
        [table.select(tables[0].column_names) for table in tables], promote_options="default"
    )
    if any(wkts):
        from rasteret_dask.crs import luggage

        packed |= luggage(int(number) for own in wkts for number in own)
    return table.replace_schema_metadata(packed or None).combine_chunks()


def _plain(table: pa.Table) -> pa.Table:
    """Return a table whose feeds name records in full: Arrow cannot unite nested dictionaries."""
    if "feeds" not in table.column_names:
        return table
    lists = table.column("feeds").combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    flat = lists.flatten()
    fields = [flat.field(number) for number in range(flat.type.num_fields)]
    names = [flat.type.field(number).name for number in range(flat.type.num_fields)]
    fields = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in fields]
    offsets = pa.array(np.asarray(lists.offsets) - lists.offsets[0].as_py(), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, names=names))
    return table.set_column(table.column_names.index("feeds"), "feeds", column)
