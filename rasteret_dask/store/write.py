# SPDX-License-Identifier: Apache-2.0
"""Chips leave to a sharded Zarr store: metadata first, one put a shard, the commit last."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr

from rasteret_dask import activity
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.sums import Sums
from rasteret_dask.store import ledger, shardreports, smallobjects
from rasteret_dask.store.datacard import card_objects
from rasteret_dask.store.encode import Encoding, Piece, crc32
from rasteret_dask.store.layout import COORDINATE_CHIPS, JOB, Layout, of_shards
from rasteret_dask.store.manifest import stamp, warn_of_masked
from rasteret_dask.store.workunits import Commit, WorkUnit, begin, is_finished
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, check_writable, job_objects, opened
from rasteret_dask.tasks.jobparts import JobOfParts

__all__ = [
    "ChipContent", "chip_commit", "chip_units", "commit", "is_committed", "prepare", "write_shard",
    "write_sources",
]  # fmt: skip

_log = logging.getLogger(__name__)

AUTO = json.dumps("auto")


@dataclass(frozen=True)
class ChipContent:
    """A job's chips, as the ledger asks for what is to be written."""

    layout: Layout

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        return ledger.Owner(self.layout.job.digest, self.layout.codec_text)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each shard's name, the key of its valid report: the job's digest, which every task carries."""
        job = self.layout.job
        return dict.fromkeys((shard.name for shard in job.shards()), job.digest)

    def objects(self) -> dict[str, ledger.Maker]:
        """Return what makes the arrays' metadata, the chunks that the plan knows, the tables, and the job itself."""
        job = self.layout.job
        schema = next(job.chip_tables()).schema
        objects = self.layout.objects()
        objects[ledger.CHIPS] = partial(geoparquet.joined_pieces, schema, job.chip_tables)
        if self.layout.recipe is not None:
            objects[ledger.RECIPE] = ledger.whole(self.layout.recipe.encode())
        if isinstance(job, JobOfParts):  # they lie with the plan
            return objects
        return objects | {f"{JOB}/{name}": ledger.whole(data) for name, data in job_objects(job).items()}

    def places(self) -> dict[str, str]:
        """Return the path of every object that shards may have -> the shard's name."""
        return self.layout.places()


def chip_units(job: Job) -> list[WorkUnit]:
    """Return the shards of a job in running order, and where a task finds each: in its part, where there are parts."""
    order: list[tuple[Shard, Any]]
    if isinstance(job, JobOfParts):
        order = [(shard, (part.ref, _block(shard))) for part in job.parts for shard in part.shards]
    else:
        shards = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
        order = [(shard, _block(shard)) for shard in shards]
    keys, digest = job.keys, job.digest
    return [
        WorkUnit(s.name, item, s.stop - s.start, digest, s.split, s.number, keys[s.name]) for s, item in order
    ]


def _block(shard: Shard) -> tuple[int, int]:
    return shard.hierarchy, shard.number


def chip_commit(url: str, job: Job, units: Sequence[WorkUnit]) -> Commit:
    """Return how the shards of a job become a store: the manifest has them in the job's order."""
    by_name = {unit.name: unit for unit in units}
    return Commit(
        ledger.TO_ZARR, [by_name[shard.name] for shard in job.shards()], partial(_known_last, url, job)
    )


def prepare(layout: Layout, url: str) -> dict[str, shardreports.ReportPlace]:
    """Make a store ready for its shards; see :func:`rasteret_dask.store.workunits.begin`.

    Raises
    ------
    PlanError
        When a rule of the plan cannot be imported by another process.
    StoreError
        When the store holds something else, another plan's leftovers, or these chips in another compression.
    """
    check_writable(layout.job)
    return begin(url, ChipContent(layout))


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
    return is_finished(url, ledger.Owner(digest, compression))


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
    """Write a shard whose sources are all there; see :func:`write_sources`."""
    return write_sources(job, block, url, joined.items(), mark)


def write_sources(
    job: Job | JobRef,
    block: tuple[int, int],
    url: str,
    sources: Iterable[tuple[str, xr.Dataset]],
    mark: str = "",
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
    sources
        Source and its chips, in any order. None is held once it is encoded, so that the next can be read then.
    mark
        Tells stores apart that were at the same place in turn: workers remember how arrays are encoded.
    """
    frozen = opened(job)
    base, shard = url.removesuffix(f"/{JOB}"), frozen.shard(*block)
    start, waited = time.perf_counter(), 0.0
    requests, encoding = smallobjects.requests(), 0.0
    attempt = requests.submit(shardreports.tried, base, shard.name, frozen.digest)
    puts: dict[str, list[Future[Any]]] = {}
    attrs: dict[str, Mapping[Hashable, Any]] = {}
    masked: dict[str, float] = {}
    rest = iter(sources)
    shown = activity.current()
    if shown is not None:
        shown.sources = len(frozen.sources)
    try:
        while True:
            asked = time.perf_counter()
            pair = next(rest, None)  # which reads it, where it is not there
            begun = time.perf_counter()
            waited += begun - asked
            if pair is None:
                break
            if shown is not None:
                shown.done += 1
            name, dataset = pair
            attrs[name], puts[name], masked[name] = dataset.attrs, [], _invalid(dataset)
            del pair  # nothing here may hold the pixels while the next source is read
            # an object is on its way while the next one is encoded
            for path, pieces in _encoded(base, frozen, shard, name, dataset, mark):
                attempt.result()  # later runs know the objects by it
                puts[name].append(requests.submit(_put, base, path, pieces))
                if shown is not None:
                    shown.written += sum(map(len, pieces))
                del pieces
            del dataset
            encoding += time.perf_counter() - begun
        encoded = time.perf_counter()
    finally:
        # nothing of this attempt is on its way when the next one begins
        wait([attempt, *(put for those in puts.values() for put in those)])
    names = [source.name for source in frozen.sources]
    report: dict[str, Any] = {
        "chips": shard.stop - shard.start,
        "dropped": attrs[names[0]].get("dropped", {}),
        "objects": [put.result() for name in names for put in puts[name]],
    }
    for name in names:
        report[f"counts/{name}"] = attrs[name].get("counts", {})
        report[f"masked/{name}"] = masked[name]
        report[f"clipped/{name}"] = attrs[name].get("clipped", {})
        report[f"unreadable/{name}"] = attrs[name].get("unreadable", [])
    put = time.perf_counter() - encoded
    activity.spent("encode", encoding)
    activity.spent("put", put)
    reads = _reads(names, attrs)
    # where other tasks have read the sources, nothing was waited for here
    passed = time.perf_counter() - start - waited + max(waited, sum(reads.values()))
    report |= stamp(passed, {**reads, "encode": encoding, "put": put})
    _log.debug(
        "shard %s: %d chips in %.2f s, seconds %s",
        shard.name, report["chips"], report["elapsed"], report["seconds"],
    )  # fmt: skip
    return shardreports.done(base, shard.name, frozen.digest, attempt.result(), report)


def _invalid(dataset: xr.Dataset) -> float:
    """Return the share of invalid pixels among those of the chips that are kept."""
    fractions = dataset["valid_fraction"].values
    if KEPT in dataset.variables:
        fractions = fractions[dataset[KEPT].values]
    return round(1 - float(fractions.mean(dtype=np.float64)), 6) if fractions.size else 0.0


def _encoded(
    base: str, job: Job, shard: Shard, source: str, dataset: xr.Dataset, mark: str
) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the Zarr objects of a shard's source: path and pieces; what is fill throughout is left out."""
    hierarchy = next(h for h in job.hierarchies if h.number == shard.hierarchy)
    number = next(n for n, plan in enumerate(job.sources) if plan.name == source)
    group, at = Layout(job, (), {}).group(hierarchy, number), f"c/{shard.number}"
    for name in of_shards(job, number):
        if name not in dataset.variables:
            continue
        values = dataset[name].values
        if name == "datetime":
            values = values.astype("datetime64[us]").astype(np.int64)
        path = f"{group}/{name}" if group else name
        pieces = _encoding(base, path, f"{job.digest} {mark}").encode(values)
        if pieces:
            yield "/".join((path, at, *["0"] * (values.ndim - 1))), pieces
            del pieces


def _reads(names: Sequence[str], attrs: Mapping[str, Mapping[Hashable, Any]]) -> dict[str, float]:
    """Return how long the stages of each source took: ``read/s2`` and others -> seconds."""
    stages = {name: attrs[name].get("seconds", {}) for name in names}
    kinds = dict.fromkeys(kind for those in stages.values() for kind in those)
    return {f"{kind}/{name}": stages[name][kind] for kind in kinds for name in names if kind in stages[name]}


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
    content = None if layout is None else ChipContent(layout)
    manifest = chip_commit(url, job, chip_units(job)).put(url, content)
    warn_of_masked(url, manifest)
    return manifest


def _known_last(url: str, job: Job, manifest: pa.Table) -> dict[str, bytes]:
    """Return what is known when all shards are written: which chips are kept, and the card."""
    kept = _kept(url, job, manifest) if job.pixel_rules else {}
    return kept | card_objects(url, manifest)


def _kept(url: str, job: Job, manifest: pa.Table) -> dict[str, bytes]:
    """Return the chunk of each group that says which chips are kept."""
    texts = manifest.column("dropped_chips").unique().to_pylist()
    dropped = pa.array([chip for text in texts for chip in json.loads(text)], pa.string())
    layout, chunks = Layout(job, (), {}), {}
    for hierarchy in job.hierarchies:
        kept = np.ones(hierarchy.chips, dtype=bool)
        for start in range(0, hierarchy.chips, COORDINATE_CHIPS):
            stop = min(start + COORDINATE_CHIPS, hierarchy.chips)
            ids = job.coordinates(hierarchy, start, stop).column("chip_id")
            kept[start:stop] = ~pc.is_in(ids, value_set=dropped).to_numpy()
        for source in range(len(job.sources)):
            group = layout.group(hierarchy, source)
            path = f"{group}/{KEPT}" if group else KEPT
            pieces = Encoding.of(remote.get(remote.join(url, path, "zarr.json"))).encode(kept)
            if pieces:
                chunks[f"{path}/c/0"] = b"".join(map(bytes, pieces))
    return chunks
