"""Chips leave to a sharded Zarr store: metadata first, one put a shard, the commit last."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr

from rasteret_dask.errors import JobError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.sums import Sums
from rasteret_dask.store import ledger
from rasteret_dask.store.encode import Encoding, Piece, crc32
from rasteret_dask.store.layout import JOB, OF_SHARDS, Layout
from rasteret_dask.store.manifest import manifest_of, warn_of_masked
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, check_writable, job_objects, opened
from rasteret_dask.tasks.jobparts import JobOfParts

__all__ = ["commit", "is_committed", "prepare", "write_shard"]

_log = logging.getLogger(__name__)

AUTO = json.dumps("auto")


@dataclass(frozen=True)
class _Chips:
    """A job's chips, as the ledger asks for what is to be written."""

    layout: Layout

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        return ledger.Owner(self.layout.job.digest, self.layout.codec_text)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each shard's name, the key of its valid report."""
        return keys_of(self.layout.job)

    def objects(self) -> dict[str, bytes]:
        """Make the arrays' metadata, the chunks that the plan knows, the tables, and the job itself."""
        job, built = self.layout.job, self.layout.build()
        groups = {path: data.decode() for path, data in built.items() if _kind(path, data) == "group"}
        objects = {path: data for path, data in built.items() if path not in groups}
        schema = next(job.chip_tables()).schema
        objects[ledger.CHIPS] = geoparquet.joined_bytes(schema, job.chip_tables)
        objects[ledger.GROUPS] = json.dumps(groups).encode()
        if isinstance(job, JobOfParts):  # they lie with the plan
            return objects
        return objects | {f"{JOB}/{name}": data for name, data in job_objects(job).items()}

    def places(self) -> dict[str, str]:
        """Return the path of every object that shards may have -> the shard's name."""
        return self.layout.places()


def keys_of(job: Job) -> dict[str, str]:
    """Return for each shard's name the key that its valid report has: the job's digest, which every task carries."""
    return dict.fromkeys((shard.name for shard in job.shards()), job.digest)


def prepare(layout: Layout, url: str) -> set[str]:
    """Make a store ready for its shards and return the names of those that are already there.

    What a rerun finds is compared with the ledger; what is missing or damaged is put again.

    Raises
    ------
    PlanError
        When a rule of the plan cannot be imported by another process.
    StoreError
        When the store holds something else, another plan's leftovers, or these chips in another compression.
    FormatError
        When a newer version of the package writes it.
    """
    check_writable(layout.job)
    chips = _Chips(layout)
    found = ledger.begin(url, chips)
    return set(ledger.reports(url, found, chips.keys))


def is_committed(url: str, digest: str, compression: str = AUTO) -> bool:
    """Tell whether the store is finished, by a job of this digest.

    Parameters
    ----------
    url
        The store.
    digest
        The job's digest.
    compression
        What :attr:`Layout.codec_text` says.

    Raises
    ------
    StoreError
        When it is, in another compression.
    FormatError
        When a newer version of the package wrote it.
    """
    try:
        note = ledger.root_of(url).note
    except (remote.MissingError, StoreError):  # unfinished, damaged, or something else: prepare() tells
        return False
    if note["digest"] != digest:
        return False
    ledger.check_owner(url, note, ledger.Owner(digest, compression))
    return True


@lru_cache(maxsize=256)
def _encoding(url: str, path: str, mark: str) -> Encoding:
    """Return how an array is encoded; ``mark`` tells stores apart that were at the same place in turn.

    Raises
    ------
    StoreError
        When the array's metadata is no longer what the ledger says: chips would be stored as nobody can read them.
    """
    name = f"{path}/zarr.json"
    data, sums = remote.get(remote.join(url, name)), _sums(url, mark).get(name)
    subject = f"writing to {remote.redact(remote.join(url, path))}"
    if sums is None or not sums.is_of(data):
        raise StoreError(
            subject, "metadata that was changed or damaged", "what was put there before the shards",
            "Call to_zarr again with the same plan: it puts it in place.",
        )  # fmt: skip
    return Encoding.of(data, subject)


@lru_cache(maxsize=8)
def _sums(url: str, mark: str) -> Mapping[str, Sums]:
    return ledger.stated(url) or {}


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
    frozen = opened(job)
    base, shard = url.removesuffix(f"/{JOB}"), frozen.shard(*block)
    requests, begun = ledger.requests(), time.perf_counter()
    attempt = requests.submit(ledger.tried, base, shard.name, frozen.digest)
    puts: list[Future[Any]] = []
    try:
        # an object is on its way while the next one is encoded
        for path, pieces in _encoded(base, frozen, shard, joined, mark):
            attempt.result()  # later runs know the objects by it
            puts.append(requests.submit(_put, base, path, pieces))
        encoded = time.perf_counter()
    finally:
        wait([attempt, *puts])  # nothing of this attempt is on its way when the next one begins
    report: dict[str, Any] = {
        "process": f"{platform.node()}:{os.getpid()}",
        "chips": shard.stop - shard.start,
        "dropped": next(iter(joined.values())).attrs.get("dropped", {}),
        "objects": [put.result() for put in puts],
    }
    for name, dataset in joined.items():
        report[f"counts/{name}"] = dataset.attrs.get("counts", {})
        report[f"clipped/{name}"] = dataset.attrs.get("clipped", {})
        report[f"unreadable/{name}"] = dataset.attrs.get("unreadable", [])
    report["seconds"] = _seconds(joined, encoded - begun, time.perf_counter() - encoded)
    _log.debug("shard %s: %d chips, seconds %s", shard.name, report["chips"], report["seconds"])
    return ledger.done(base, shard.name, frozen.digest, attempt.result(), report)


def _encoded(
    base: str, job: Job, shard: Shard, joined: Mapping[str, xr.Dataset], mark: str
) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the Zarr objects of a shard: path and pieces; what is fill throughout is left out."""
    hierarchy = next(h for h in job.hierarchies if h.number == shard.hierarchy)
    layout, number = Layout(job, (), {}), f"c/{shard.number}"
    for source, dataset in enumerate(joined.values()):
        group = layout.group(hierarchy, source)
        for name in OF_SHARDS:
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
    return {"path": path, "size": sum(map(len, pieces)), "crc32": crc32(pieces)}


def commit(url: str, job: Job, layout: Layout | None = None) -> pa.Table:
    """Hold all that was written against the ledger, and finish the store: its root's metadata comes last.

    Parameters
    ----------
    url
        The store.
    job
        The job.
    layout
        From which is put again what is missing or damaged meanwhile. None: that is an error.

    Returns
    -------
    pyarrow.Table
        The manifest.

    Raises
    ------
    JobError
        When a shard has no report.
    StoreError
        When something else is missing or damaged, and there is no layout.

    Warns
    -----
    UnreadableTilesWarning
        When tiles could not be read and their pixels are invalid, as ``on_error="mask"`` allows.
    """
    found = ledger.restored(url, None if layout is None else _Chips(layout))
    reports = ledger.reports(url, found, keys_of(job))
    missing = [s.name for s in job.shards() if s.name not in reports]
    if missing:
        raise JobError(
            f"store {remote.redact(url)}",
            f"{len(missing)} shards missing: {', '.join(missing[:10])}",
            "all shards",
            "They were deleted or damaged meanwhile: call to_zarr again, which does these.",
        )
    values = {name: report.values for name, report in reports.items()}
    tries = {name: len(marks) for name, marks in ledger.tries(found).items()}
    manifest = manifest_of(job, values, tries)
    manifest = ledger.commit(
        url, found, manifest, reports, _kept(url, job, values) if job.pixel_rules else {}
    )
    warn_of_masked(url, manifest)
    return manifest


def _kept(url: str, job: Job, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Return the chunk of each group that says which chips are kept."""
    dropped = {chip for report in reports.values() for chip in report["dropped"]}
    layout, chunks = Layout(job, (), {}), {}
    for hierarchy in job.hierarchies:
        ids = job.chips.column("chip_id").slice(hierarchy.start, hierarchy.chips).to_pylist()
        kept = np.array([chip not in dropped for chip in ids])
        for source in range(len(job.sources)):
            group = layout.group(hierarchy, source)
            path = f"{group}/{KEPT}" if group else KEPT
            pieces = Encoding.of(remote.get(remote.join(url, path, "zarr.json"))).encode(kept)
            if pieces:
                chunks[f"{path}/c/0"] = b"".join(map(bytes, pieces))
    return chunks


def _kind(path: str, data: bytes) -> str:
    return str(json.loads(data)["node_type"]) if path.endswith("zarr.json") else "chunk"
