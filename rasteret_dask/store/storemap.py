"""What a finished store holds, as its own metadata and manifest say: arrays, shards, and the size of each object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import digest
from rasteret_dask.store.decode import chunk_of
from rasteret_dask.store.encode import Encoding
from rasteret_dask.store.storetables import MANIFEST, ChipColumns, open_table
from rasteret_dask.tasks.batches import Kind

__all__ = [
    "StoreMap",
    "StoredArray",
    "StoredGroup",
    "StoredShard",
    "check_sizes",
    "digest_of",
    "group_path",
    "open_map",
]

JOB = "_job"
COMPACT = "compact"
"""Third line of ``_job/digest`` where :func:`rasteret_dask.compact` writes, not ``to_zarr``."""

_OF_SHARDS = ("shard", "split", "number", "chips", "dropped_chips", "objects")

_OPENING = Lock()
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class StoredArray:
    """One Zarr array of a group."""

    path: str
    """Below the store: ``train/optical/pixels``."""
    encoding: Encoding
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    node: Mapping[str, Any] = field(repr=False)
    """Its metadata document."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Its attributes."""
        found: Mapping[str, Any] = self.node["attributes"]
        return found

    @property
    def known(self) -> bool:
        """Whether the plan knew it: one chunk for all chips of the split, which no shard's task wrote."""
        return self.dims[0] != "chip" or len(self.dims) == 1 or self.path.endswith("bounds")

    def object(self, number: int) -> str:
        """Return the path of the chunk or shard that holds shard ``number`` of the chips."""
        return "/".join((self.path, "c", str(number), *["0"] * (len(self.shape) - 1)))


@dataclass(frozen=True)
class StoredGroup:
    """One source of one split."""

    source: str
    path: str
    arrays: Mapping[str, StoredArray]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredShard:
    """Consecutive chips of one split that were written together."""

    name: str
    split: str | None
    number: int
    """Counts within the split."""
    start: int
    """Row of its first chip in ``chips.parquet``."""
    chips: int
    dropped: Mapping[str, str]
    """Id of each chip that ``keep`` left out -> the reason."""
    row: int
    """Counts all shards."""
    objects: pa.ListArray = field(repr=False)
    """The manifest's column, of all shards: no object's path is a Python value before it is read."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Path -> bytes and CRC-32C of each object; what is not here is fill throughout."""
        return {o["path"]: (o["size"], o["crc32c"]) for o in self.objects[self.row].as_py()}


@dataclass(frozen=True, eq=False)
class StoreMap:
    """A finished store, without its pixels: one a process, so that it is known by being this one."""

    url: str
    digest: str
    sources: tuple[str, ...]
    groups: Mapping[str | None, tuple[StoredGroup, ...]]
    """Split -> a group a source."""
    shards: tuple[StoredShard, ...]
    root: Mapping[str, Any] = field(repr=False)
    """The root's metadata document."""

    @cached_property
    def chips(self) -> ChipColumns:
        """The chip table, dropped chips included."""
        return ChipColumns(self.url, self.planned)

    @property
    def planned(self) -> int:
        """How many chips were planned: those that are kept, and those that were dropped."""
        return sum(s.chips for s in self.shards)

    def objects(self) -> Iterator[tuple[str, int]]:
        """Yield path and bytes of each object of all shards."""
        flat = pa.array([]) if not self.shards else self.shards[0].objects.flatten()
        if len(flat):
            yield from zip(flat.field("path").to_pylist(), flat.field("size").to_pylist(), strict=True)

    def manifest(self) -> pa.Table:
        """Read the manifest with all of its columns: a row a shard."""
        with open_table(self.url, MANIFEST) as file:
            return file.read()

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Source -> what its pixels are."""
        return {g.source: self._kind(g) for g in self.first}

    def _kind(self, group: StoredGroup) -> Kind:
        pixels = group.arrays["pixels"]
        bands = tuple(self.values(group.arrays["band"]).tolist())
        classes = tuple(group.arrays[MASK].attrs.get("classes", ())) if MASK in group.arrays else ()
        return Kind(bands, str(pixels.encoding.dtype), str(pixels.attrs.get("units", "")), classes)

    @property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        return {name: kind.bands for name, kind in self.kinds.items()}

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Shape (shard,). Row of each shard's first chip."""
        return np.array([s.start for s in self.shards], dtype=np.int64)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Shape (chip,). False for the chips that ``keep`` left out."""
        kept = np.ones(self.planned, dtype=bool)
        for shard in self.shards:
            if shard.dropped:
                ids = self.chips.table.column("chip_id").slice(shard.start, shard.chips).to_pylist()
                kept[shard.start : shard.start + shard.chips] = [i not in shard.dropped for i in ids]
        return kept

    def groups_of(self, shard: StoredShard) -> tuple[StoredGroup, ...]:
        """Return the groups that a shard's chips lie in, a source each."""
        return self.groups[shard.split]

    def values(self, array: StoredArray) -> NDArray[Any]:
        """Read an array of a single chunk that the plan knew (bands, times): a copy."""
        url = remote.join(self.url, array.path, *["c", *["0"] * len(array.shape)])
        try:
            data: bytes | None = remote.get(url)
        except remote.MissingError:
            data = None  # all of it is fill
        return chunk_of(array.encoding, data, f"reading {remote.redact(url)}").copy()

    @property
    def first(self) -> tuple[StoredGroup, ...]:
        """The groups of the first split: those of all splits look the same."""
        return next(iter(self.groups.values()))


def digest_of(url: str) -> str:
    """Return what a finished store is known by: a digest of its plan's digest and of how it is stored.

    Raises
    ------
    StoreError
        When there is none, it is not finished, or something else lies there.
    """
    return digest(_said(url)[1])


def open_map(url: str, token: str) -> StoreMap:
    """Open a finished store, once per process whatever the number of threads.

    Parameters
    ----------
    url
        A local path or a URL.
    token
        What :func:`digest_of` said when the store was first looked at.

    Raises
    ------
    StoreError
        When it is not there, not finished, or another store by now.
    """
    with _OPENING:
        return _opened(url, token)


@lru_cache(maxsize=8)
def _opened(url: str, token: str) -> StoreMap:
    root, said = _said(url)
    if (found := digest(said)) != token:
        raise StoreError(
            f"store {remote.redact(url)}", f"another store ({found[:12]})",
            f"the one that was opened ({token[:12]})", "It was written anew meanwhile: open it again with open_chips.",
        )  # fmt: skip
    with open_table(url, MANIFEST) as file:
        shards = _shards(file.read([n for n in file.schema_arrow.names if n in _OF_SHARDS]))
    splits = list(dict.fromkeys(s.split for s in shards))
    sources = tuple(said["sources"])
    nodes = root["consolidated_metadata"]["metadata"]
    groups = {
        split: tuple(
            _group(root, nodes, name, group_path(split, len(splits), name, len(sources))) for name in sources
        )
        for split in splits
    }
    return StoreMap(url, token, sources, groups, shards, root)


def check_sizes(store: StoreMap) -> None:
    """Compare the size of every object with the manifest, where the store can be listed.

    Plain HTTP servers cannot: there each object is compared when it is read, as it is everywhere.

    Raises
    ------
    StoreError
        When objects are missing or have other sizes; names some.
    """
    if store.url.partition("://")[0] in ("http", "https"):
        return
    found = remote.listing(store.url)
    wrong = [
        f"{path} ({found.get(path, 'no')} bytes, not {size})"
        for path, size in store.objects()
        if found.get(path) != size
    ]
    if wrong:
        raise StoreError(
            f"store {remote.redact(store.url)}",
            f"{len(wrong)} objects missing or of another size: {', '.join(wrong[:3])}",
            "what its manifest says",
            "It was changed or copied in part: delete its zarr.json, and to_zarr writes what is missing.",
        )


def _said(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the root's metadata, and what this package has put into it."""
    subject = f"store {remote.redact(url)}"
    try:
        root = json.loads(remote.get(remote.join(url, "zarr.json")))
    except remote.MissingError as error:
        writer = _writer(url)
        if writer == COMPACT:
            raise StoreError(
                subject, "an unfinished store", "one that compact has committed",
                "Call compact with the same store and this target again: it does what is missing.",
            ) from error  # fmt: skip
        if writer is not None:
            raise StoreError(
                subject, "an unfinished store", "one that to_zarr has committed",
                "Call to_zarr with the same plan again: it does what is missing.",
            ) from error  # fmt: skip
        raise StoreError(subject, "no zarr.json", "a store that to_zarr wrote", "Check the path.") from error
    except ValueError as error:
        raise StoreError(subject, "a zarr.json that is no JSON", "a store that to_zarr wrote") from error
    said = root.get("attributes", {}).get("rasteret_dask", {}) if isinstance(root, dict) else {}
    if not {"digest", "sources"} <= said.keys():
        raise StoreError(
            subject, "a Zarr store of something else", "one that to_zarr of this package's version wrote",
            "Open it with xarray, or write it again.",
        )  # fmt: skip
    return root, said


def _writer(url: str) -> str | None:
    """Return who writes a store: "compact", "" for to_zarr, None for nobody."""
    try:
        lines = remote.get(remote.join(url, JOB, "digest")).decode().split("\n")
    except remote.MissingError:
        return None
    return lines[2] if len(lines) > 2 else ""


def group_path(split: str | None, splits: int, source: str, sources: int) -> str:
    """Return where one source of one split lies; both are left out of the path where there is one only."""
    return "/".join(part for part in (split if splits > 1 else None, source if sources > 1 else None) if part)


def _group(root: Mapping[str, Any], nodes: Mapping[str, Any], source: str, path: str) -> StoredGroup:
    arrays = {}
    for name, node in nodes.items():
        above, _, own = name.rpartition("/")
        if above == path and node["node_type"] == "array":
            arrays[own] = StoredArray(
                name, Encoding.of(json.dumps(node).encode()), tuple(node["shape"]),
                tuple(node["dimension_names"]), node,
            )  # fmt: skip
    return StoredGroup(source, path, arrays, (nodes[path] if path else root)["attributes"])


def _shards(manifest: pa.Table) -> tuple[StoredShard, ...]:
    objects = manifest.column("objects").combine_chunks()
    facts = manifest.drop_columns(["objects"]).to_pylist()
    starts = np.cumsum([0, *(row["chips"] for row in facts)]).tolist()
    return tuple(
        StoredShard(
            row["shard"], row["split"], row["number"], starts[at], row["chips"], _dropped(row), at, objects
        )
        for at, row in enumerate(facts)
    )  # fmt: skip


def _dropped(row: Mapping[str, Any]) -> Mapping[str, str]:
    text = row.get("dropped_chips", "{}")
    return _NOTHING if text == "{}" else json.loads(text)
