# SPDX-License-Identifier: Apache-2.0
"""What the kept chips of a store, or of all parts of one that grew, would be, had they been written at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import FeedTable, bounds_of, label_columns, replaced
from rasteret_dask.chipping.frame import space_order
from rasteret_dask.net import remote
from rasteret_dask.store import decode
from rasteret_dask.store.encode import ABSENT, CHIPS_PER_SHARD, Encoding, Piece
from rasteret_dask.store.law import read_law
from rasteret_dask.store.storemap import StoredArray, StoredGroup, group_path
from rasteret_dask.store.storeread import StoreObject
from rasteret_dask.store.union import StoreUnion
from rasteret_dask.tasks.filtering import KEPT

__all__ = ["AtOnce", "pieces_of"]


@dataclass(frozen=True, eq=False)
class AtOnce:
    """The kept chips of a store with the slots of all parts, as arrays of one hierarchy."""

    union: StoreUnion

    @cached_property
    def rows(self) -> Mapping[str | None, NDArray[np.int64]]:
        """Split -> rows of its kept chips, in their order of space; of one part, in its own order."""
        union = self.union
        found: dict[str | None, list[NDArray[np.int64]]] = {}
        for shard in union.shards:
            rows = np.arange(shard.start, shard.start + shard.chips)
            found.setdefault(shard.split, []).append(rows[union.kept[rows]])
        rows_of = {split: np.concatenate(rows) for split, rows in found.items()}
        law = read_law(union.url) if len(union.parts) > 1 else None
        if law is not None:
            names = (None,) if law.split is None else law.split.names
            rows_of = {
                split: self._in_space(rows_of[split], law.resolution) for split in names if split in rows_of
            }
        return {split: rows for split, rows in rows_of.items() if len(rows)}

    def _in_space(self, rows: NDArray[np.int64], resolution: float | None) -> NDArray[np.int64]:
        names = ["epsg", "xmin", "ymin", "xmax", "ymax", "row", "col", "datetime"]
        table = self.union.chips.columns(names).take(pa.array(rows))
        epsg, row, col, when = (
            table.column(name).cast(pa.int64()).fill_null(0).to_numpy()
            for name in ("epsg", "row", "col", "datetime")
        )
        return rows[space_order(epsg, bounds_of(table), row, col, resolution or 1.0, when)]

    @cached_property
    def per_shard(self) -> int:
        """Chips of a shard: as many bytes as a shard of the first part has."""
        first, union = self.union.parts[0].first, self.union.first
        per: int = first[0].arrays["pixels"].encoding.chunk[0]
        return max(1, per * _chip_bytes(first) // _chip_bytes(union))

    def with_further(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and those of the same chips in other parts; and of each, its place among ``rows``."""
        pairs = self.union.chips.pairs
        place = np.full(self.union.planned, -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        own = pairs[place[pairs[:, 0]] >= 0]
        return np.append(rows, own[:, 1]), np.append(np.arange(len(rows)), place[own[:, 0]])

    # Metadata, and what the plan knew

    def documents(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
        """Return path -> metadata, the root's attributes, and path -> chunks of what the plan knew."""
        documents: dict[str, Any] = {}
        chunks: dict[str, bytes] = {}
        root: dict[str, Any] = {}
        for split, rows in self.rows.items():
            if len(self.rows) > 1 and split and len(self.union.sources) > 1:
                documents[split] = self._group_document({})
            for group in self.union.first:
                at = group_path(split, len(self.rows), group.source, len(self.union.sources))
                attrs = self._attrs(group)
                if at:
                    documents[at] = self._group_document(attrs)
                else:
                    root = attrs
                for name, array in group.arrays.items():
                    if name != KEPT:
                        path = f"{at}/{name}" if at else name
                        documents[path], chunk = self._array(group, name, array, rows)
                        if chunk:
                            chunks["/".join((path, "c", *["0"] * len(array.shape)))] = chunk
        return documents, root, chunks

    def _group_document(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        for part in self.union.parts:
            nodes = part.root["consolidated_metadata"]["metadata"]
            for node in nodes.values():
                if node["node_type"] == "group":
                    return {**node, "attributes": dict(attrs)}
        return {"attributes": dict(attrs), "zarr_format": 3, "node_type": "group"}

    def _attrs(self, group: StoredGroup) -> dict[str, Any]:
        """Return a group's attributes without what speaks of dropped chips, or of the store."""
        attrs = {k: v for k, v in group.attrs.items() if k != "rasteret_dask"}
        attrs["coordinates"] = " ".join(name for name in attrs["coordinates"].split() if name != KEPT)
        if len(self.union.parts) > 1:
            attrs[CHIPS_PER_SHARD] = self.per_shard
            attrs["radiometry"] = self._radiometry(group.source)
        return attrs

    def _radiometry(self, source: str) -> list[dict[str, Any]]:
        """Return what all parts say of scales and offsets; records that several parts have count in each."""
        counts: dict[str, dict[str, Any]] = {}
        for part in self.union.parts:
            group = next(group for group in part.first if group.source == source)
            for one in group.attrs.get("radiometry", ()):
                key = json.dumps({name: value for name, value in one.items() if name != "records"})
                records = counts[key]["records"] if key in counts else 0
                counts[key] = {**one, "records": records + one["records"]}
        return list(counts.values())

    def _array(
        self, group: StoredGroup, name: str, array: StoredArray, rows: NDArray[np.int64]
    ) -> tuple[dict[str, Any], bytes]:
        """Return an array's document for the kept chips of a split, and its chunk where the plan knew it."""
        if not array.of_plan:
            return self._document(array, len(rows)), b""
        if array.dims[0] != "chip":
            times = self.union.times(group.source) if name == "time" else None
            values = self.union.values(array) if times is None else times
        else:
            values = self._values(name, rows)
            array = self._like(group.source, name, array, values)
        document = self._document(array, len(rows))
        if name == "epsg":
            self._add_crs(document)
        values = values.view(np.int64) if values.dtype.kind == "M" else values
        pieces = Encoding.of(json.dumps(document).encode()).encode(values)
        return document, b"".join(map(bytes, pieces))

    def _document(self, array: StoredArray, chips: int) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(json.dumps(array.node))
        chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
        inner = document["codecs"][0]["configuration"]["chunk_shape"] if array.encoding.sharded else chunk
        for at, (dim, length) in enumerate(zip(array.dims, array.shape, strict=True)):
            if dim == "time":
                document["shape"][at] = chunk[at] = inner[at] = length
            elif dim == "chip":
                document["shape"][at] = chips
                chunk[at] = chips if array.of_plan else self.per_shard
        return document

    def _values(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return a coordinate of some chips, or a column of the user's."""
        table = self.union.chips.table.take(pa.array(rows))
        if name == "bounds":
            return bounds_of(table)
        if name == "epsg":
            return np.asarray(table.column(name).to_numpy(), dtype=np.int32)
        if name in ("chip_id", "split"):
            return np.array([value or "" for value in table.column(name).to_pylist()], dtype=object)
        return label_columns(table.select([name]))[name]

    def _like(self, source: str, name: str, array: StoredArray, values: NDArray[Any]) -> StoredArray:
        """Return the array of the first part that holds values of this dtype: nulls of one part make a column float."""
        kind = (
            None if values.dtype == object else np.dtype("i8") if values.dtype.kind == "M" else values.dtype
        )
        for part in self.union.parts:
            (own,) = (group.arrays[name] for group in part.first if group.source == source)
            if own.encoding.dtype == kind:
                return own
        return array

    def _add_crs(self, document: dict[str, Any]) -> None:
        """Put what the parts say of CRSs without an EPSG code into an array's attributes."""
        wkts = {
            number: text
            for part in self.union.parts
            for own in part.groups.values()
            for number, text in own[0].arrays["epsg"].attrs.get("crs_wkt", {}).items()
        }
        if wkts:
            document["attributes"]["crs_wkt"] = wkts

    # The chip table

    def chip_table(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return all columns of some chips, with the feeds of all their slots."""
        whole = self.union.chips.whole()
        table = whole.take(pa.array(rows))
        if len(self.union.parts) == 1:
            return table
        every, place = self.with_further(rows)
        both = whole.select(["feeds", "slots", "coverage"]).take(pa.array(every))
        slots = np.bincount(place, both.column("slots").to_numpy(), len(rows)).astype(np.int32)
        coverage = np.full(len(rows), np.inf, dtype=np.float32)
        np.minimum.at(coverage, place, both.column("coverage").to_numpy())
        table = replaced(replaced(table, "slots", pa.array(slots)), "coverage", pa.array(coverage))
        return replaced(table, "feeds", self._feeds(both.column("feeds"), every, place, len(rows)).to_arrow())

    def _feeds(
        self, feeds: pa.ChunkedArray, rows: NDArray[np.int64], place: NDArray[np.int64], chips: int
    ) -> FeedTable:
        """Return the feed entries of all rows, each at its chip, its slots counted among those of all parts."""
        lists = feeds.combine_chunks()
        flat = lists.flatten()
        entry = np.repeat(np.arange(len(rows)), lists.value_lengths().to_numpy(zero_copy_only=False))
        sources = self.union.sources
        source = pc.index_in(flat.field("source"), value_set=pa.array(sources)).to_numpy(zero_copy_only=False)
        slot, order, share = (flat.field(name).to_numpy() for name in ("slot", "order", "coverage"))
        part = np.searchsorted(self.union.begins, rows, side="right")[entry] - 1
        ids, row, slot = [], np.zeros(len(slot), dtype=np.int32), slot.astype(np.int16)
        for number, name in enumerate(sources):
            own = np.flatnonzero(source == number)
            records = flat.field("record").take(pa.array(own))
            names = pc.unique(records).sort()
            row[own] = pc.index_in(records, value_set=names).to_numpy(zero_copy_only=False)
            ids.append(tuple(names.to_pylist()))
            for at, places in enumerate(self.union.axes[name].places):
                inside = own[part[own] == at]
                slot[inside] = places[slot[inside]]
        chip = place[entry]
        rank = np.lexsort((np.arange(len(chip)), order, slot, source, chip))
        offsets = np.append(0, np.cumsum(np.bincount(chip, minlength=chips)))
        return FeedTable(
            offsets,
            source[rank].astype(np.int8),
            slot[rank],
            order[rank],
            row[rank],
            share[rank],
            sources,
            tuple(ids),
        )  # fmt: skip

    # Shards

    def arrays(self, split: str | None, splits: int) -> Iterator[tuple[str, str, StoredArray]]:
        """Yield source, name, and the array as it will be, of those that shards' tasks write.

        Parameters
        ----------
        split
            The split.
        splits
            How many there are.
        """
        for group in self.union.first:
            at = group_path(split, splits, group.source, len(self.union.sources))
            for name, array in group.arrays.items():
                if not array.of_plan:
                    encoding = Encoding.of(json.dumps(self._document(array, 0)).encode())
                    yield (
                        group.source,
                        name,
                        replace(array, path=f"{at}/{name}" if at else name, encoding=encoding),
                    )


def _chip_bytes(groups: Sequence[StoredGroup]) -> int:
    """Return the bytes of a chip's pixels, over all sources."""
    arrays = [group.arrays["pixels"] for group in groups]
    return sum(int(np.prod(a.shape[1:])) * (a.encoding.dtype or np.dtype("u1")).itemsize for a in arrays)


def pieces_of(
    union: StoreUnion, source: str, name: str, encoding: Encoding, rows: NDArray[np.int64]
) -> list[Piece]:
    """Return the object of one array that holds some chips, in pieces.

    Chips that lie as a whole in one part are copied as they are stored; others are decoded, put together and encoded.
    """
    if not encoding.sharded:
        return encoding.encode(_read(union, source, name, rows))
    in_parts = (
        np.isin(rows, union.chips.pairs[:, 0]) if union.has_time(source, name) else np.zeros(len(rows), bool)
    )
    part = np.searchsorted(union.begins, rows, side="right") - 1
    if union.has_time(source, name):
        axis = union.axes[source]
        in_parts |= ~np.array([axis.is_whole(number) for number in range(len(union.parts))])[part]
    chips: list[list[Piece]] = [[] for _ in rows]
    for number in np.unique(part[~in_parts]).tolist():
        own = np.flatnonzero((part == number) & ~in_parts)
        _copy(union, number, source, name, rows[own] - union.begins[number], own, chips)
    rest = np.flatnonzero(in_parts)
    if len(rest):
        values = _read(union, source, name, rows[rest])
        for place, pieces in zip(rest.tolist(), encoding.chips(values), strict=True):
            chips[place] = pieces
    return encoding.shard_of(chips)


def _read(union: StoreUnion, source: str, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    values = union.read(rows, {source: [name]})[source, name]
    return values.view(np.int64) if values.dtype.kind == "M" else values


def _copy(
    union: StoreUnion,
    part: int,
    source: str,
    name: str,
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    chips: list[list[Piece]],
) -> None:
    """Put the bytes of some chips of a part, as they are stored with their checksums, to their places."""
    old = union.parts[part]
    folder = remote.Folder.of(old.url)
    shard_of = np.searchsorted(old.starts, rows, side="right") - 1
    for number in np.unique(shard_of).tolist():
        shard, own = old.shards[number], np.flatnonzero(shard_of == number)
        array = next(group.arrays[name] for group in old.groups_of(shard) if group.source == source)
        item = StoreObject.of(old, folder, shard, array)
        if item is None:  # all of it is fill
            continue
        per = array.encoding.chunk[0]
        data = np.frombuffer(memoryview(item.get(0, item.size)), np.uint8)
        index = decode.index_of(per, data[-decode.index_nbytes(per) :], item.size, str(item))
        for place, (start, length) in zip(
            places[own].tolist(), index[rows[own] - shard.start].tolist(), strict=True
        ):
            if start != ABSENT:
                chips[place] = [data[start : start + length]]
