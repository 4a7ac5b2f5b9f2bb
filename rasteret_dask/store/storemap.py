# SPDX-License-Identifier: Apache-2.0
"""What a finished store holds, as its own metadata and manifest say: arrays, shards, and the size of each object."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import FILLED, META, PRESENT, is_mask
from rasteret_dask.errors import PlanError, RasteretDaskError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.sums import Sums, changed
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.planning.plan import digest
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.store import ledger, shardreports
from rasteret_dask.store.bytecache import ByteCache
from rasteret_dask.store.decode import chunk_of
from rasteret_dask.store.encode import MALFORMED, Encoding, shape_of
from rasteret_dask.store.ledger import CHIPS, MANIFEST
from rasteret_dask.store.storetables import ChipColumns, open_manifest
from rasteret_dask.table.itemkinds import CLASSES
from rasteret_dask.tasks.batches import MaskPixels, SourcePixels

__all__ = [
    "StoreMap",
    "StoredArray",
    "StoredGroup",
    "StoredShard",
    "check_sizes",
    "digest_of",
    "group_path",
    "open_map",
    "open_store",
]

UNSAMPLED = ("valid_fraction", "member")
"""Variables that shards' tasks write and samples carry only where they are asked for."""

_OF_SHARDS = ["shard", "split", "number", "chips", "dropped_chips", "objects"]

_ARRAYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "pixels": (("chip", "time", "band", "y", "x"), None),
    "valid": (("chip", "time", "y", "x"), ("bool",)),
    "valid_fraction": (("chip", "time"), ("float32",)),
    FILLED: (("chip", "time"), ("float32",)),
    PRESENT: (("chip", "time"), ("bool",)),
    "datetime": (("chip", "time"), ("int64",)),
    "member": (("chip", "time"), ("None",)),
    "bounds": (("chip", "corner"), ("float64",)),
    "band": (("band",), ("None",)),
    "band_kind": (("band",), ("None",)),
    "units": (("band",), ("None",)),
    "time": (("time",), ("int64",)),
}
"""Dimensions of arrays, and their dtypes where they are known ("None": text); all others have one value a chip."""
_OF_SLOT = (("chip", "time"), ("float32", "float64", "None"))
"""The same of arrays that ``harmonize(meta=)`` asked for."""
_MASKS: tuple[tuple[str, ...], None] = (("chip", "y", "x"), None)
_NEEDED = {"pixels", "valid_fraction", "datetime", "member", "band"}

SIZES_BYTES = 8 * 2**20
"""Sizes and checksums of objects that are kept as Python values, at most."""

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
        attributes: Mapping[str, Any] = self.node["attributes"]
        return attributes

    @property
    def of_plan(self) -> bool:
        """Whether the plan knew it: no shard's task wrote it."""
        return self.dims[0] != "chip" or len(self.dims) == 1 or self.path.rpartition("/")[2] == "bounds"

    def object(self, number: int) -> str:
        """Return the path of a chunk, or of a shard: the one of its number in the first dimension."""
        return "/".join((self.path, "c", str(number), *["0"] * (len(self.shape) - 1)))


@dataclass(frozen=True)
class StoredGroup:
    """One source of one split."""

    source: str
    path: str
    arrays: Mapping[str, StoredArray]
    attrs: Mapping[str, Any]

    @property
    def meta(self) -> tuple[str, ...]:
        """Names of the arrays (chip, time) that ``harmonize(meta=)`` asked for."""
        return tuple(self.attrs.get(META, ()))

    @cached_property
    def masks(self) -> dict[str, StoredArray]:
        """The arrays of burned labels, by name."""
        return {
            name: array
            for name, array in self.arrays.items()
            if is_mask(name) and array.dims == ("chip", "y", "x")
        }

    @cached_property
    def sampled(self) -> tuple[str, ...]:
        """The variables that a sample carries: those with a value or more a chip that shards' tasks wrote."""
        left = [name for name in UNSAMPLED if name not in self.meta]
        return tuple(n for n, array in self.arrays.items() if n not in left and not array.of_plan)


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
    """Id of each chip that ``filter_pixels`` left out -> the reason."""
    row: int
    """Counts all shards."""
    objects: pa.ListArray = field(repr=False)
    """The manifest's column, of all shards: no object's path is a Python value before it is read."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Path -> bytes and CRC-32 of each object; what is not here is fill throughout."""
        return {o["path"]: (o["size"], o["crc32"]) for o in self.objects[self.row].as_py()}


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
    others: Mapping[str, Sums] = field(repr=False)
    """Path -> what it must be, of every object that is in no row of the manifest."""
    etag: str | None
    """The version of the manifest that was read."""

    @property
    def note(self) -> Mapping[str, Any]:
        """What this package has put into the root's attributes."""
        note: Mapping[str, Any] = self.root["attributes"]["rasteret_dask"]
        return note

    @cached_property
    def chips(self) -> ChipColumns:
        """The chip table, dropped chips included."""
        return ChipColumns(self.url, self.planned, self.others[CHIPS])

    @property
    def planned(self) -> int:
        """How many chips were planned: those that are kept, and those that were dropped."""
        return sum(s.chips for s in self.shards)

    def sizes_of(self, shard: StoredShard) -> Mapping[str, tuple[int, int]]:
        """Return the same as :attr:`StoredShard.sizes`, kept for shards that are read again."""
        sizes = self._sizes.get(shard.row)
        return self._sizes.put(shard.row, shard.sizes) if sizes is None else sizes

    @cached_property
    def _sizes(self) -> ByteCache[int, Mapping[str, tuple[int, int]]]:
        return ByteCache(SIZES_BYTES, _sizes_nbytes)

    def objects(self) -> Iterator[tuple[str, int]]:
        """Yield path and bytes of each object of all shards."""
        flat = pa.array([]) if not self.shards else self.shards[0].objects.flatten()
        if len(flat):
            yield from zip(flat.field("path").to_pylist(), flat.field("size").to_pylist(), strict=True)

    def manifest(self) -> pa.Table:
        """Read the manifest with all of its columns: a row a shard."""
        with open_manifest(self.url) as (file, _):
            return file.read()

    @cached_property
    def pixels(self) -> Mapping[str, SourcePixels]:
        """Source -> what its pixels are."""
        try:
            return {g.source: self._pixels(g) for g in self.first}
        except (*MALFORMED, PlanError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"store {remote.redact(self.url)}", f"attributes that cannot be ({error!r:.200})",
                "what to_zarr wrote", ledger.DAMAGED,
            ) from error  # fmt: skip

    def _pixels(self, group: StoredGroup) -> SourcePixels:
        pixels = group.arrays["pixels"]
        bands = tuple(self.values(group.arrays["band"]).tolist())
        masks = tuple(
            MaskPixels(name, str(one.encoding.dtype), tuple(one.attrs.get("classes", ())))
            for name, one in group.masks.items()
        )
        named: Mapping[str, Any] = group.attrs.get(CLASSES, {})
        codes = [tuple((int(c["value"]), str(c["name"])) for c in named.get(band, ())) for band in bands]
        names = group.attrs.get("kinds") or ["unknown"] * len(bands)
        kinds = tuple(
            BandKind(kind_of(None if name == "unknown" else name).name, own)
            for name, own in zip(names, codes, strict=True)
        )
        units = str(pixels.attrs.get("units", ""))
        dtype, shape = str(pixels.encoding.dtype), tuple(pixels.shape[1:])
        return SourcePixels(bands, dtype, units, masks, kinds, shape)

    @property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        return {name: own.bands for name, own in self.pixels.items()}

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Shape (shard,). Row of each shard's first chip."""
        return np.array([s.start for s in self.shards], dtype=np.int64)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Shape (chip,). False for the chips that ``filter_pixels`` left out."""
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
        """Read an array that the plan knew (bands, times, coordinates of chips): a copy.

        Raises
        ------
        StoreError
            When an object of it is missing or damaged.
        """
        count = -(-array.shape[0] // array.encoding.chunk[0])
        chunks = [self._planned_chunk(array, array.object(number)) for number in range(count)]
        return np.concatenate(chunks)[: array.shape[0]]

    def times(self, source: str) -> NDArray[np.int64] | None:
        """Return the start of each slot of a source, us since 1970; None where its slots have no names."""
        group = next(group for group in self.first if group.source == source)
        return self.values(group.arrays["time"]) if "time" in group.arrays else None

    def _planned_chunk(self, array: StoredArray, path: str) -> NDArray[Any]:
        place, sums = remote.join(self.url, path), self.others.get(path)
        subject = f"reading {remote.redact(place)}"
        data: bytes | None = None
        if sums is not None:  # else all of it is fill
            try:
                data = remote.get(place)
            except remote.MissingError as error:
                raise changed(subject, "nothing", sums.size) from error
            if not sums.is_of(data):
                raise changed(subject, f"{len(data)} other bytes", sums.size)
        return chunk_of(array.encoding, data, subject)

    @property
    def first(self) -> tuple[StoredGroup, ...]:
        """The groups of the first split: those of all splits look the same."""
        return next(iter(self.groups.values()))


def _sizes_nbytes(sizes: Mapping[str, tuple[int, int]]) -> int:
    return 300 * len(sizes)


def digest_of(url: str) -> str:
    """Return what a finished store is known by: a digest of its plan's digest and of how it is stored.

    Raises
    ------
    StoreError
        When there is none, it is not finished, or something else lies there.
    """
    return _token(_root(url))


def open_store(url: str) -> StoreMap:
    """Open a finished store as it is now.

    Raises
    ------
    StoreError
        As :func:`digest_of` does, and when its metadata or its manifest is damaged.
    """
    root = _root(url)
    token = _token(root)
    with _OPENING:
        before = _opened.cache_info().misses
        store = _opened(url, token)
        kept = _opened.cache_info().misses == before
        if kept and store.etag != remote.fetch(remote.join(url, MANIFEST), 0, 1).head.etag:
            _opened.cache_clear()  # the same chips, written again
            store = _opened(url, token)
    return store


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


@lru_cache(maxsize=64)  # a store that grew has many parts
def _opened(url: str, token: str) -> StoreMap:
    root = _root(url)
    if (now := _token(root)) != token:
        raise StoreError(
            f"store {remote.redact(url)}", f"another store ({now[:12]})",
            f"the one that was opened ({token[:12]})", "It was written anew meanwhile: open it again with open_chips.",
        )  # fmt: skip
    try:
        return _mapped(url, token, root)
    except (*MALFORMED, RecursionError, struct.error) as error:
        if isinstance(error, RasteretDaskError):
            raise
        raise StoreError(
            f"store {remote.redact(url)}", f"metadata or a manifest that cannot be ({error!r:.200})",
            "what to_zarr wrote", ledger.DAMAGED,
        ) from error  # fmt: skip


def _mapped(url: str, token: str, root: ledger.Root) -> StoreMap:
    with open_manifest(url) as (file, etag):
        metadata = file.schema_arrow.metadata
        if metadata[ledger.DIGEST].decode() != root.note["digest"]:
            raise StoreError(
                f"store {remote.redact(url)}",
                f"a {MANIFEST} of other chips",
                "that of its zarr.json",
                ledger.DAMAGED,
            )
        vouched = json.loads(metadata[ledger.OBJECTS])
        shards = _shards(file.read(_OF_SHARDS))
    splits = list(dict.fromkeys(s.split for s in shards))
    sources = tuple(root.note["sources"])
    if not sources:
        raise StoreError(
            f"store {remote.redact(url)}", "no source in its zarr.json", "at least one", ledger.DAMAGED
        )
    nodes = root.document["consolidated_metadata"]["metadata"]
    groups = {
        split: tuple(
            _group(root.document, nodes, name, group_path(split, len(splits), name, len(sources)))
            for name in sources
        )
        for split in splits
    }
    for split, own in groups.items():
        for group in own:
            _check_chips(url, group, sum(s.chips for s in shards if s.split == split))
    others = {path: Sums.again(value) for path, value in vouched.items()}
    return StoreMap(url, token, sources, groups, shards, root.document, others, etag)


def _check_chips(url: str, group: StoredGroup, chips: int) -> None:
    """Raise where arrays are not as to_zarr writes them: memory is asked for by what they say."""
    missing = {*_NEEDED, *group.meta} - group.arrays.keys()
    sizes: dict[str, int] = {"chip": chips}
    for name, array in group.arrays.items():
        shape, encoding = array.shape, array.encoding
        usual = _MASKS if name in group.masks else _OF_SLOT if name in group.meta else (("chip",), None)
        dims, dtypes = _ARRAYS.get(name) or usual
        fits = (
            array.dims == dims
            and len(shape) == len(encoding.chunk) == len(dims)
            and all(size > 0 for size in encoding.chunk)
            and encoding.chunk[1:] == shape[1:]
            and (encoding.chunk[0] <= shape[0] or not array.of_plan)
            and all(sizes.setdefault(dim, size) == size for dim, size in zip(dims, shape, strict=True))
            and (dtypes is None or str(encoding.dtype) in dtypes)
            and isinstance(array.node["attributes"], dict)
        )
        if not fits:
            raise StoreError(
                f"store {remote.redact(url)}",
                f"array {array.path} ({', '.join(array.dims)}) of shape {shape}, {encoding.dtype}, in chunks of "
                f"{encoding.chunk}",
                f"one of the {chips} chips that the manifest lists, as to_zarr writes it",
                ledger.DAMAGED,
            )
    if missing:
        raise StoreError(
            f"store {remote.redact(url)}", f"no array {', '.join(sorted(missing))} in group {group.path!r}",
            "those that to_zarr writes", ledger.DAMAGED,
        )  # fmt: skip


def check_sizes(store: StoreMap, objects: Mapping[str, int] | None = None) -> None:
    """Compare the size of every object that reading needs with the manifest, where the store can be listed.

    Plain HTTP servers cannot: there each object is compared when it is read, as it is everywhere.

    Parameters
    ----------
    store
        The store.
    objects
        Path -> bytes of what lies there, where that was listed already.

    Raises
    ------
    StoreError
        When objects are missing or have other sizes; names some.
    """
    if store.url.partition("://")[0] in ("http", "https"):
        return
    found = remote.listing(store.url) if objects is None else objects
    card = (ledger.CARD, ledger.CROISSANT)  # no reader needs it
    others = (
        (p, sums.size)
        for p, sums in store.others.items()
        if not p.startswith(f"{shardreports.JOB}/") and p not in card
    )
    wrong = [
        f"{path} ({found.get(path, 'no')} bytes, not {size})"
        for path, size in chain(store.objects(), others)
        if found.get(path) != size
    ]
    if wrong:
        raise StoreError(
            f"store {remote.redact(store.url)}",
            f"{len(wrong)} objects missing or of another size: {', '.join(wrong[:3])}",
            "what its manifest says",
            "It was changed or copied in part: delete its zarr.json, and to_zarr writes what is missing.",
        )


def _token(root: ledger.Root) -> str:
    """Digest what the chips are known by: not when and by whom they were written."""
    return digest(*(root.note[name] for name in ("meaning", "writer", "digest", "compression", "sources")))


def _root(url: str) -> ledger.Root:
    """Read the root's metadata; say what lies there where there is none."""
    subject = f"store {remote.redact(url)}"
    try:
        root = ledger.root_of(url)
    except remote.MissingError as error:
        mark = ledger.begun(url)
        if mark is None:
            raise StoreError(
                subject, "no zarr.json", "a store that to_zarr wrote", "Check the path."
            ) from error
        compact = mark["writer"] == ledger.COMPACT
        same = "the same store and this target" if compact else "the same plan"
        raise StoreError(
            subject, "an unfinished store", f"one that {mark['writer']} has committed",
            f"Call {mark['writer']} with {same} again, or where a recipe wrote it, rasteret-dask resume: "
            "it does what is missing.",
        ) from error  # fmt: skip
    if root.note["writer"] not in (ledger.TO_ZARR, ledger.COMPACT):
        raise StoreError(
            subject, f"what {root.note['writer']} wrote", "chips that to_zarr or compact wrote",
            "A map opens with rd.open_map.",
        )  # fmt: skip
    return root


def group_path(split: str | None, splits: int, source: str, sources: int) -> str:
    """Return where one source of one split lies; both are left out of the path where there is one only."""
    return "/".join(part for part in (split if splits > 1 else None, source if sources > 1 else None) if part)


def _group(root: Mapping[str, Any], nodes: Mapping[str, Any], source: str, path: str) -> StoredGroup:
    arrays = {}
    for name, node in nodes.items():
        above, _, own = name.rpartition("/")
        if above == path and node["node_type"] == "array":
            arrays[own] = StoredArray(
                name, Encoding.of(json.dumps(node).encode(), f"array {name}"), shape_of(node["shape"]),
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
    text = row["dropped_chips"]
    return _NOTHING if text == "{}" else json.loads(text)
