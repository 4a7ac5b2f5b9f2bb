"""A store rewritten with its kept chips only: bytes of chips are copied, not decoded."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dask._task_spec import Task
from distributed import Client
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.limits import host_of, pool
from rasteret_dask.net.places import place_of
from rasteret_dask.planning.plan import digest
from rasteret_dask.statistics.measuring import computed
from rasteret_dask.store import decode
from rasteret_dask.store.encode import ABSENT, Encoding, Piece, crc32c
from rasteret_dask.store.storemap import (
    COMPACT,
    JOB,
    StoredArray,
    StoredGroup,
    StoreMap,
    check_sizes,
    digest_of,
    group_path,
    open_map,
)
from rasteret_dask.store.storeread import StoreObject, read_rows
from rasteret_dask.store.storetables import CHIPS, MANIFEST
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.screening import KEPT

__all__ = ["compact"]

_COUNTS = ("requests", "bytes_fetched", "tiles_read", "gdal_fallback")
"""Columns of the manifest that say what reading cost."""


def compact(
    store: str | os.PathLike[str], target: str | os.PathLike[str], client: Client | str | None = None
) -> None:
    """Write the kept chips of a store to another place, as a store of its own.

    Chips keep their order; shards are filled up. A split of which nothing is kept is left out. Called again after it
    was stopped, it does what is missing; once it is finished, nothing. In the new manifest, what reading cost and
    clipped stands once, at the shard that has the first kept chip of an old one; tiles that could not be read stand at
    every shard that has chips of theirs.

    Parameters
    ----------
    store
        A finished store.
    target
        A local path or a URL: an empty place, or one where this was begun.
    client
        A Dask client or a scheduler's address; None: the current client, else threads of this process.

    Raises
    ------
    StoreError
        When the store is not finished or was changed, or something else lies at the target.
    PlanError
        When no chip is kept.
    """
    clusters.check(client, "compact(client=)")
    url, place = place_of(store), place_of(target)
    source = digest_of(url)
    opened = open_map(url, source)
    check_sizes(opened)
    if not opened.kept.any():
        raise PlanError(f"compact({remote.redact(url)})", "no kept chip", "at least one")
    own = digest("compact", source)
    found = _begun(opened, place, own)
    if "zarr.json" in found:
        return
    shards = _shards(opened)
    reports = _finished(place, found, shards)
    missing = {f"compact-{digest(own, place)[:16]}-{s.name}": s for s in shards if s.name not in reports}
    tasks: dict[Hashable, Any] = {k: Task(k, _copied, url, source, place, s) for k, s in missing.items()}
    with clusters.using(client) as cluster:
        if cluster is not None:
            signatures.send_place(cluster, url, place)
        reports |= {r["shard"]: r for r in computed(tasks, list(missing), cluster)}
    tries = Counter(path.split("/")[2] for path in remote.listing(place) if path.startswith(f"{JOB}/tried/"))
    _finish(opened, place, own, shards, _manifest(opened, shards, reports, tries))


def _begun(old: StoreMap, place: str, own: str) -> Mapping[str, int]:
    """Take a place for the new store, or know it for its own; return what lies there.

    The digest is written first: whatever stops later, the next call knows the place.
    """
    found = remote.listing(place)
    said = f"{own}\n{_said(old)['compression']}\n{COMPACT}".encode()
    if not found:
        remote.put(remote.join(place, JOB, "digest"), said)
    elif f"{JOB}/digest" not in found or remote.get(remote.join(place, JOB, "digest")) != said:
        raise StoreError(
            f"store {remote.redact(place)}", f"{len(found)} objects ({next(iter(found))}, ...) of something else",
            "an empty place, or one where compact of the same store was begun", "Choose another one.",
        )  # fmt: skip
    return found


def _finished(place: str, found: Mapping[str, int], shards: Sequence[_NewShard]) -> dict[str, dict[str, Any]]:
    """Return the reports of new shards, of these chips, whose objects are all there in their sizes: shard -> report."""
    keys = {f"{JOB}/done/{s.name}.json": s.key for s in shards}
    texts = pool(host_of(place)).map(lambda path: remote.get(remote.join(place, path)), keys.keys() & found)
    reports = [json.loads(text) for text in texts]
    return {
        r["shard"]: r
        for r in reports
        if r["key"] == keys[f"{JOB}/done/{r['shard']}.json"]
        and all(found.get(o["path"]) == o["size"] for o in r["objects"])
    }


@dataclass(frozen=True)
class _NewShard:
    """Consecutive kept chips of one split."""

    name: str
    split: str | None
    splits: int
    """How many splits there are in the new store."""
    number: int
    rows: NDArray[np.int64]
    """Rows among all chips of the old store."""
    key: str
    """Digest of what it is made of."""


def _shards(old: StoreMap) -> list[_NewShard]:
    per = old.first[0].arrays["pixels"].encoding.chunk[0]
    kept = {split: _rows(old, split) for split in old.groups}
    kept = {split: rows for split, rows in kept.items() if len(rows)}
    parts = [
        (s, n, rows[n * per : (n + 1) * per]) for s, rows in kept.items() for n in range(-(-len(rows) // per))
    ]
    return [
        _NewShard(f"{split or 'all'}-{number:05d}", split, len(kept), number, rows, _key(old, rows))
        for split, number, rows in parts
    ]


def _key(old: StoreMap, rows: NDArray[np.int64]) -> str:
    """Digest chips, and the objects that hold them: a store that was written again may have other pixels."""
    objects = [sorted(old.shards[n].sizes.items()) for n in _old_shards(old, rows)]
    return digest(old.digest, rows.tolist(), objects)


def _old_shards(old: StoreMap, rows: NDArray[np.int64]) -> list[int]:
    """Return the shards that chips lie in, rising."""
    found: list[int] = np.unique(np.searchsorted(old.starts, rows, side="right") - 1).tolist()
    return found


def _rows(old: StoreMap, split: str | None) -> NDArray[np.int64]:
    """Return the rows of a split's kept chips."""
    spans = [np.arange(s.start, s.start + s.chips) for s in old.shards if s.split == split]
    rows = np.concatenate(spans)
    return rows[old.kept[rows]]


def _copied(url: str, source: str, place: str, shard: _NewShard) -> dict[str, Any]:
    """Write one new shard, then its report; return the report."""
    old = open_map(url, source)
    remote.put(remote.join(place, JOB, "tried", shard.name, uuid.uuid4().hex), b"1")
    written = []
    for group in old.groups[shard.split]:
        at = group_path(shard.split, shard.splits, group.source, len(old.sources))
        for name, array in group.arrays.items():
            if array.known:
                continue
            pieces = _pieces(old, group, name, array, shard.rows)
            if pieces:
                path = replace(array, path=f"{at}/{name}" if at else name).object(shard.number)
                remote.put(remote.join(place, path), pieces)
                written.append({"path": path, "size": sum(map(len, pieces)), "crc32c": crc32c(pieces)})
    process = f"{platform.node()}:{os.getpid()}"
    report = {"shard": shard.name, "key": shard.key, "process": process, "objects": written}
    remote.put(remote.join(place, JOB, "done", f"{shard.name}.json"), json.dumps(report).encode())
    return report


def _pieces(
    old: StoreMap, group: StoredGroup, name: str, array: StoredArray, rows: NDArray[np.int64]
) -> list[Piece]:
    if array.encoding.sharded:
        return array.encoding.shard_of(_stored(old, array, rows))
    values = read_rows(old, rows, {group.source: [name]})[group.source, name]
    return array.encoding.encode(values.view(np.int64) if values.dtype.kind == "M" else values)


def _stored(old: StoreMap, array: StoredArray, rows: NDArray[np.int64]) -> list[Piece | None]:
    """Return the bytes of some chips as they are stored, None where they are not."""
    per = array.encoding.chunk[0]
    shard_of = np.searchsorted(old.starts, rows, side="right") - 1
    found: list[Piece | None] = []
    for number in np.unique(shard_of).tolist():
        shard = old.shards[number]
        chips = rows[shard_of == number] - shard.start
        item = StoreObject.of(old, shard, array)
        if item is None:
            found += [None] * len(chips)
            continue
        data = np.frombuffer(memoryview(item.get(0, item.size)), np.uint8)
        index = decode.index_of(per, data[-decode.index_nbytes(per) :], item.subject)
        for start, length in index[chips].tolist():
            found.append(None if start == ABSENT else data[start : start + length])
    return found


def _finish(old: StoreMap, place: str, own: str, shards: Sequence[_NewShard], manifest: pa.Table) -> None:
    """Write what is known of all chips, then the groups' metadata; the root comes last."""
    rows = np.concatenate([s.rows for s in shards])
    table = old.chips.whole().take(pa.array(rows))
    remote.put(remote.join(place, CHIPS), geoparquet.to_bytes(table))
    sink = pa.BufferOutputStream()
    pq.write_table(manifest, sink, compression="zstd")
    remote.put(remote.join(place, MANIFEST), bytes(sink.getvalue()))
    nodes = old.root["consolidated_metadata"]["metadata"]
    attrs: dict[str, Any] = {}
    documents: dict[str, Any] = {}
    for split in dict.fromkeys(s.split for s in shards):
        inside = np.concatenate([s.rows for s in shards if s.split == split])
        first = next(s.start for s in old.shards if s.split == split)
        if shards[0].splits > 1 and split:
            documents[split] = nodes[split]
        for group in old.groups[split]:
            at = group_path(split, shards[0].splits, group.source, len(old.sources))
            if at:
                documents[at] = {**nodes[group.path], "attributes": _uncovered(group.attrs)}
            else:
                attrs = _uncovered(group.attrs)
            for name, array in group.arrays.items():
                if name != KEPT:
                    path = f"{at}/{name}" if at else name
                    documents[path] = _array(old, array, inside - first, remote.join(place, path))
    for path, document in documents.items():
        remote.put(remote.join(place, path, "zarr.json"), json.dumps(document).encode())
    said = {**_said(old), "digest": own, "compacted_from": old.digest}
    root = {
        **old.root,
        "attributes": {**attrs, "rasteret_dask": said},
        "consolidated_metadata": {**old.root["consolidated_metadata"], "metadata": documents},
    }
    remote.put(remote.join(place, "zarr.json"), json.dumps(root).encode())


def _uncovered(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's attributes without what speaks of dropped chips, or of the store."""
    names = " ".join(n for n in attrs["coordinates"].split() if n != KEPT)
    return {**{k: v for k, v in attrs.items() if k != "rasteret_dask"}, "coordinates": names}


def _array(old: StoreMap, array: StoredArray, chips: NDArray[np.int64], url: str) -> dict[str, Any]:
    """Return an array's document for the kept chips of a split; write the array if the plan knew it."""
    document: dict[str, Any] = json.loads(json.dumps(array.node))
    of_chips = array.dims[0] == "chip"
    if of_chips:
        document["shape"][0] = len(chips)
    if array.known:
        values = old.values(array)
        if of_chips:
            values = values[chips]
            document["chunk_grid"]["configuration"]["chunk_shape"][0] = len(chips)
        pieces = Encoding.of(json.dumps(document).encode()).encode(values)
        if pieces:
            remote.put(remote.join(url, *["c", *["0"] * len(array.shape)]), pieces)
    return document


def _manifest(
    old: StoreMap,
    shards: Sequence[_NewShard],
    reports: Mapping[str, dict[str, Any]],
    tries: Mapping[str, int],
) -> pa.Table:
    """Return one row a shard, with the columns of the old manifest."""
    before = old.manifest().select([*_COUNTS, "clipped", "unreadable_tiles"]).to_pylist()
    told: set[int] = set()
    rows = []
    for shard in shards:
        report, parts = reports[shard.name], _old_shards(old, shard.rows)
        clipped: Counter[str] = Counter()
        counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        for number in set(parts) - told:
            clipped.update(json.loads(before[number]["clipped"]))
            counts.update({name: before[number][name] for name in _COUNTS})
        told.update(parts)
        lists = [json.loads(before[number]["unreadable_tiles"]) for number in parts]
        unreadable = list(dict.fromkeys(tile for own in lists for tile in own))
        rows.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "number": shard.number,
                "chips": len(shard.rows),
                "kept": len(shard.rows),
                "dropped_chips": "{}",
                "attempts": tries[shard.name],
                "process": report["process"],
                "bytes": sum(o["size"] for o in report["objects"]),
                "objects": report["objects"],
                **counts,
                "clipped": json.dumps(clipped),
                "unreadable": len(unreadable),
                "unreadable_tiles": json.dumps(unreadable),
                "key": shard.key,
            }
        )
    return pa.Table.from_pylist(rows)


def _said(old: StoreMap) -> dict[str, Any]:
    found: dict[str, Any] = old.root["attributes"]["rasteret_dask"]
    return found
