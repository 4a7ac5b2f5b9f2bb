"""Chips leave to a sharded Zarr store: metadata first, one put a shard, the commit last."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.errors import JobError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.store.encode import Encoding, Piece, crc32c
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.manifest import manifest_of, warn_of_masked
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, opened, write_job
from rasteret_dask.tasks.screening import KEPT

T = TypeVar("T")

__all__ = ["commit", "is_committed", "prepare", "write_shard"]

GROUPS = "groups.json"
"""The groups' own metadata, put in place by the commit."""

REQUESTS = 16
"""Small objects under way at the same time."""

_log = logging.getLogger(__name__)

AUTO = json.dumps("auto")


def prepare(layout: Layout, url: str) -> set[str]:
    """Make a store ready for its shards and return the names of those that are already there.

    The plan's digest is written first: whatever stops later, a rerun knows the store for its own.

    Raises
    ------
    StoreError
        When the store holds something else, another plan's leftovers, or these chips in another compression.
    """
    job = layout.job
    found = remote.listing(url)
    if f"{JOB}/digest" not in found:
        if found:
            some = ", ".join(sorted(found)[:3])
            raise StoreError(
                f"store {remote.redact(url)}",
                f"{len(found)} objects of something else ({some})",
                "an empty place",
            )
        remote.put(remote.join(url, JOB, "digest"), f"{job.digest}\n{layout.said}".encode())
    theirs, _, compression = remote.get(remote.join(url, JOB, "digest")).decode().partition("\n")
    if theirs != job.digest:
        raise StoreError(
            f"store {remote.redact(url)}",
            f"chips of another plan ({theirs[:12]})",
            f"this plan's ({job.digest[:12]}), or nothing",
            "Choose another store, or delete this one.",
        )
    _same_compression(url, compression, layout.said)
    if f"{JOB}/ready" in found:
        return set(_finished(url, found))
    built = layout.build()
    groups = {path: data.decode() for path, data in built.items() if _kind(path, data) == "group"}
    objects = {path: data for path, data in built.items() if path not in groups}
    objects["chips.parquet"] = geoparquet.to_bytes(job.chosen_chips())
    objects[f"{JOB}/{GROUPS}"] = json.dumps(groups).encode()
    _at_once(lambda path: remote.put(remote.join(url, path), objects[path]), objects)
    write_job(job, remote.join(url, JOB))
    remote.put(remote.join(url, JOB, "ready"), b"1")
    return set(_finished(url, found))


def is_committed(url: str, digest: str, compression: str = AUTO) -> bool:
    """Tell whether the store is finished, by a job of this digest.

    Parameters
    ----------
    url
        The store.
    digest
        The job's digest.
    compression
        What :attr:`Layout.said` says.

    Raises
    ------
    StoreError
        When it is, in another compression.
    """
    try:
        root = json.loads(remote.get(remote.join(url, "zarr.json")))
    except remote.MissingError:
        return False
    said = root.get("attributes", {}).get("rasteret_dask", {})
    if said.get("digest") != digest:
        return False
    _same_compression(url, said.get("compression", ""), compression)
    return True


def _same_compression(url: str, found: str, expected: str) -> None:
    if found != expected:
        raise StoreError(
            f"store {remote.redact(url)}",
            f"these chips with compression {found}",
            f"compression {expected}",
            "Give to_zarr the store's compression, choose another store, or delete this one.",
        )


def _finished(url: str, found: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the reports of the shards whose objects are all there with the sizes their reports name."""
    paths = [path for path in found if path.startswith(f"{JOB}/done/")]
    reports = _at_once(lambda path: json.loads(remote.get(remote.join(url, path))), paths)
    return {r["shard"]: r for r in reports if all(found.get(o["path"]) == o["size"] for o in r["objects"])}


def _at_once(function: Callable[[str], T], paths: Iterable[str]) -> list[T]:
    """Call a function for many small objects, several at the same time: a request waits, it does not work."""
    return list(_requests(os.getpid()).map(function, paths))


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    """Return the threads that wait for the store; a fork has its own."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="rasteret-store")


@lru_cache(maxsize=256)
def _encoding(url: str, path: str, mark: str) -> Encoding:
    """Return how an array is encoded; ``mark`` tells stores apart that were at the same place in turn."""
    return Encoding.of(remote.get(remote.join(url, path, "zarr.json")))


def write_shard(
    job: Job | JobRef, block: tuple[int, int], url: str, joined: dict[str, xr.Dataset], mark: str = ""
) -> dict[str, Any]:
    """Encode a shard's chips and put each object once, then the report; return the report.

    Parameters
    ----------
    job
        The job, or where it was written.
    block
        Number of the split, and of the shard in it.
    url
        Where the job was written.
    joined
        Source -> its chips.
    mark
        Tells stores apart that were at the same place in turn: workers remember how arrays are encoded.
    """
    own = opened(job)
    base, shard = url.removesuffix(f"/{JOB}"), own.shard(*block)
    requests, begun = _requests(os.getpid()), time.perf_counter()
    tried: Future[Any] = requests.submit(
        remote.put, remote.join(url, "tried", shard.name, uuid.uuid4().hex), b"1"
    )
    # an object is on its way while the next one is encoded
    objects: list[Future[Any]] = [
        requests.submit(_put, base, path, pieces) for path, pieces in _encoded(base, own, shard, joined, mark)
    ]
    encoded = time.perf_counter()
    wait([tried, *objects])  # nothing of this attempt is on its way when the next one begins
    tried.result()
    report: dict[str, Any] = {
        "process": f"{platform.node()}:{os.getpid()}",
        "shard": shard.name,
        "chips": shard.stop - shard.start,
        "dropped": next(iter(joined.values())).attrs.get("dropped", {}),
        "objects": [put.result() for put in objects],
    }
    for name, dataset in joined.items():
        report[f"counts/{name}"] = dataset.attrs.get("counts", {})
        report[f"clipped/{name}"] = dataset.attrs.get("clipped", {})
        report[f"unreadable/{name}"] = dataset.attrs.get("unreadable", [])
    report["seconds"] = _seconds(joined, encoded - begun, time.perf_counter() - encoded)
    _log.debug("shard %s: %d chips, seconds %s", shard.name, report["chips"], report["seconds"])
    remote.put(remote.join(url, "done", f"{shard.name}.json"), json.dumps(report).encode())
    return report


def _encoded(
    base: str, job: Job, shard: Shard, joined: Mapping[str, xr.Dataset], mark: str
) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the Zarr objects of a shard: path and pieces; what is fill throughout is left out."""
    hierarchy = next(h for h in job.hierarchies if h.number == shard.hierarchy)
    layout, number = Layout(job, (), {}), f"c/{shard.number}"
    for source, dataset in enumerate(joined.values()):
        group = layout.group(hierarchy, source)
        for name in ("pixels", "valid", MASK, "valid_fraction", "datetime", "source"):
            if name not in dataset.variables:
                continue
            values = dataset[name].values
            if name == "datetime":
                values = values.astype("datetime64[us]").astype(np.int64)
            path = f"{group}/{name}" if group else name
            pieces = _encoding(base, path, f"{job.digest} {mark}").encode(values)
            if pieces:
                yield "/".join((path, number, *["0"] * (values.ndim - 1))), pieces


def _seconds(joined: Mapping[str, xr.Dataset], encode: float, put: float) -> dict[str, float]:
    """Return how long a shard's stages took; ``put`` is what the last objects took beyond the encoding."""
    read = {f"read/{name}": dataset.attrs.get("seconds", 0.0) for name, dataset in joined.items()}
    return {**read, "encode": round(encode, 3), "put": round(put, 3)}


def _put(base: str, path: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Put an object without joining its pieces; return what the report says of it."""
    remote.put(remote.join(base, path), pieces)
    return {"path": path, "size": sum(map(len, pieces)), "crc32c": crc32c(pieces)}


def commit(url: str, job: Job) -> pa.Table:
    """Write the manifest, then the groups' metadata; the root comes last. Return the manifest.

    Raises
    ------
    JobError
        When a shard has no report.

    Warns
    -----
    UnreadableTilesWarning
        When tiles could not be read and their pixels are invalid, as ``on_error="mask"`` allows.
    """
    found = remote.listing(url)
    reports = _finished(url, found)
    missing = [s.name for s in job.shards() if s.name not in reports]
    if missing:
        raise JobError(
            f"store {remote.redact(url)}",
            f"{len(missing)} shards missing: {', '.join(missing[:10])}",
            "all shards",
        )
    tries = Counter(path.split("/")[2] for path in found if path.startswith(f"{JOB}/tried/"))
    manifest = manifest_of(job, reports, tries)
    remote.put(remote.join(url, "manifest.parquet"), _parquet(manifest))
    if job.screens:
        _put_kept(url, job, reports)
    groups = json.loads(remote.get(remote.join(url, JOB, GROUPS)))
    for path in sorted(groups, key=lambda p: -p.count("/")):  # deepest first, "zarr.json" last
        remote.put(remote.join(url, path), groups[path].encode())
    warn_of_masked(url, manifest)
    return manifest


def _put_kept(url: str, job: Job, reports: Mapping[str, dict[str, Any]]) -> None:
    """Write which chips are kept, into each group."""
    dropped = {chip for report in reports.values() for chip in report["dropped"]}
    layout = Layout(job, (), {})
    for hierarchy in job.hierarchies:
        ids = job.chips.column("chip_id").slice(hierarchy.start, hierarchy.chips).to_pylist()
        kept = np.array([chip not in dropped for chip in ids])
        for source in range(len(job.sources)):
            group = layout.group(hierarchy, source)
            path = remote.join(url, f"{group}/{KEPT}" if group else KEPT)
            pieces = Encoding.of(remote.get(remote.join(path, "zarr.json"))).encode(kept)
            if pieces:
                remote.put(remote.join(path, "c", "0"), pieces)


def _kind(path: str, data: bytes) -> str:
    return str(json.loads(data)["node_type"]) if path.endswith("zarr.json") else "chunk"


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
