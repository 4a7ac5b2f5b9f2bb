"""What a finished store holds, as its own metadata and manifest say: arrays, shards, and the size of each object."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import digest
from rasteret_dask.store.decode import chunk_of
from rasteret_dask.store.encode import Encoding

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
CHIPS = "chips.parquet"


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
    sizes: Mapping[str, tuple[int, int]]
    """Path -> bytes and CRC-32C of each object; what is not here is fill throughout."""
    dropped: Mapping[str, str]
    """Id of each chip that ``keep`` left out -> the reason."""


@dataclass(frozen=True)
class StoreMap:
    """A finished store, without its pixels."""

    url: str
    digest: str
    sources: tuple[str, ...]
    groups: Mapping[str | None, tuple[StoredGroup, ...]]
    """Split -> a group a source."""
    shards: tuple[StoredShard, ...]
    manifest: pa.Table
    root: Mapping[str, Any] = field(repr=False)
    """The root's metadata document."""

    @cached_property
    def chips(self) -> pa.Table:
        """The chip table as it was planned, dropped chips included, without ``feeds``: most of its bytes.

        Raises
        ------
        StoreError
            When it is not the table of these shards.
        """
        table = _parquet(self.url, CHIPS, leave_out="feeds")
        expected = sum(s.chips for s in self.shards)
        if table.num_rows != expected:
            raise StoreError(
                f"store {remote.redact(self.url)}", f"{table.num_rows} rows in chips.parquet",
                f"{expected}, as the manifest says", "The store was changed: write it again.",
            )  # fmt: skip
        return table

    def whole_chips(self) -> pa.Table:
        """Read the chip table with all of its columns."""
        return _parquet(self.url, CHIPS)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Shape (shard,). Row of each shard's first chip."""
        return np.array([s.start for s in self.shards], dtype=np.int64)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Shape (chip,). False for the chips that ``keep`` left out."""
        kept = np.ones(self.chips.num_rows, dtype=bool)
        for shard in self.shards:
            if shard.dropped:
                ids = self.chips.column("chip_id").slice(shard.start, shard.chips).to_pylist()
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


@lru_cache(maxsize=8)
def open_map(url: str, token: str) -> StoreMap:
    """Open a finished store, once per process.

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
    root, said = _said(url)
    if (found := digest(said)) != token:
        raise StoreError(
            f"store {remote.redact(url)}", f"another store ({found[:12]})",
            f"the one that was opened ({token[:12]})", "It was written anew meanwhile: open it again with open_chips.",
        )  # fmt: skip
    manifest = _parquet(url, "manifest.parquet")
    shards = _shards(manifest)
    splits = list(dict.fromkeys(s.split for s in shards))
    sources = tuple(said["sources"])
    nodes = root["consolidated_metadata"]["metadata"]
    groups = {
        split: tuple(
            _group(root, nodes, name, group_path(split, len(splits), name, len(sources))) for name in sources
        )
        for split in splits
    }
    return StoreMap(url, token, sources, groups, shards, manifest, root)


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
        for shard in store.shards
        for path, (size, _) in shard.sizes.items()
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
        if remote.exists(remote.join(url, JOB, "digest")):
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
    shards = []
    start = 0
    for row in manifest.to_pylist():
        sizes = {o["path"]: (o["size"], o["crc32c"]) for o in row["objects"]}
        dropped = json.loads(row.get("dropped_chips", "{}"))
        shards.append(
            StoredShard(row["shard"], row["split"], row["number"], start, row["chips"], sizes, dropped)
        )
        start += row["chips"]
    return tuple(shards)


def _parquet(url: str, name: str, leave_out: str | None = None) -> pa.Table:
    try:
        file = pq.ParquetFile(io.BytesIO(remote.get(remote.join(url, name))))
        return file.read([c for c in file.schema_arrow.names if c != leave_out])
    except remote.MissingError as error:
        raise StoreError(
            f"store {remote.redact(url)}", f"no {name}", "a store as to_zarr wrote it",
            "It was changed or copied in part: copy it whole, or write it again.",
        ) from error  # fmt: skip
    except pa.ArrowInvalid as error:
        raise StoreError(f"store {remote.redact(url)}", f"a damaged {name}", "Parquet") from error
