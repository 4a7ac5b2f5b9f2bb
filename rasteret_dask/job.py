"""A frozen plan with its tables: what tasks share, written once and opened once per worker process."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask import remote
from rasteret_dask._version import __version__
from rasteret_dask.chips import ChipSet, used_records
from rasteret_dask.chiptable import CHIP_SCHEMA, FeedTable, bounds_of
from rasteret_dask.errors import StoreError
from rasteret_dask.frame import BLOCK_PX
from rasteret_dask.harmonize import DN_PER_REFLECTANCE
from rasteret_dask.plan import Function, digest, from_json, to_json
from rasteret_dask.records import Records
from rasteret_dask.resolve import Member, ResolvedSource, SourcePlan
from rasteret_dask.splits import split_numbers

__all__ = [
    "Hierarchy",
    "Job",
    "Output",
    "Shard",
    "freeze",
    "open_job",
    "task_bytes",
    "write_job",
]

SHARD_BYTES = 128 * 2**20
"""Output of one task over all sources, at most (a single chip may be larger)."""

SHARD_CHIPS = 256
"""Chips of one task, at most."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The chips of one split: one Zarr hierarchy."""

    split: str | None
    number: int
    """Place among the splits of the plan; 0 where there is no split."""
    start: int
    """First row in the job's chip table."""
    stop: int
    per_shard: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-(self.stop - self.start) // self.per_shard)

    @property
    def chips(self) -> int:
        """Number of chips."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive chips of one split, read and written by one task."""

    split: str | None
    hierarchy: int
    """Number of the split."""
    number: int
    """Counts within the split, before any select."""
    start: int
    """First row in the job's chip table."""
    stop: int

    @property
    def name(self) -> str:
        """``train-00003``; ``all-00003`` without splits."""
        return f"{self.split or 'all'}-{self.number:05d}"


@dataclass(frozen=True, slots=True)
class Output:
    """What one source looks like when it leaves a task."""

    bands: tuple[str, ...]
    dtype: str
    fill: float
    times: int
    slots: tuple[int, ...] | None
    height: int
    width: int
    valid: bool
    """Whether there is a ``valid`` variable (chip, time, y, x)."""
    scale: float | None
    """Physical value of one DN, where reflectance is stored as integers."""
    attrs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, plan: SourcePlan, size: int) -> Output:
        """Describe a source's output before any map."""
        whole = not plan.dtype.startswith("float")
        scale = 1.0 / DN_PER_REFLECTANCE if whole and plan.units != "raw" else None
        attrs = (("units", plan.units), ("long_name", plan.name))
        return cls(plan.bands, plan.dtype, plan.fill, plan.times, plan.slots, size, size, whole, scale, attrs)

    @property
    def pixel_attrs(self) -> dict[str, Any]:
        """Attributes of the pixels, from which plain xarray decodes them."""
        attrs: dict[str, Any] = dict(self.attrs)
        if self.scale is not None:
            attrs |= {"scale_factor": self.scale, "add_offset": 0.0, "_FillValue": int(self.fill)}
        elif not np.isnan(self.fill):
            attrs["nodata"] = int(self.fill)
        return attrs

    @property
    def chip_bytes(self) -> int:
        """Bytes of one chip."""
        pixels = self.times * self.height * self.width
        return pixels * (len(self.bands) * np.dtype(self.dtype).itemsize + int(self.valid))


@dataclass(frozen=True)
class Job:
    """Everything that tasks need, except the pixels."""

    sources: tuple[SourcePlan, ...]
    size_px: tuple[int, ...]
    """Side of a chip in pixels, per source."""
    hierarchies: tuple[Hierarchy, ...]
    records: tuple[Records, ...]
    """Per source: only the records that feed chips."""
    chips: pa.Table
    maps: tuple[tuple[str | None, Function], ...]
    phase: str
    """Digest of what decides the values, without the rows."""
    others: tuple[Hierarchy, ...] = ()
    """The splits of the plan that were not selected; their chips are in the table too."""

    def __getstate__(self) -> dict[str, Any]:
        state = {f.name: getattr(self, f.name) for f in fields(self)}  # not what was cached on the way
        return state | {"records": tuple(Records(r.table) for r in self.records)}

    @property
    def whole(self) -> Job:
        """The job before any select: tasks look their shard up in it."""
        if not self.others:
            return self
        every = sorted((*self.hierarchies, *self.others), key=lambda h: h.number)
        return replace(self, hierarchies=tuple(every), others=())

    def select(self, splits: Collection[str | None]) -> Job:
        """Return the job of these splits only."""
        own = tuple(h for h in self.hierarchies if h.split in splits)
        left = tuple(h for h in self.hierarchies if h.split not in splits)
        return replace(self, hierarchies=own, others=(*self.others, *left))

    @cached_property
    def members(self) -> tuple[NDArray[np.int64], ...]:
        """Per source, shape (record,): the member each record belongs to."""
        return tuple(
            np.asarray(r.table.column("__member__").to_numpy(), dtype=np.int64) for r in self.records
        )

    @cached_property
    def passes(self) -> tuple[NDArray[np.int64], ...]:
        """Per source, shape (record,): the acquisition each record belongs to, numbered by its start."""
        return tuple(np.asarray(r.table.column("__pass__").to_numpy(), dtype=np.int64) for r in self.records)

    @cached_property
    def starts(self) -> tuple[NDArray[np.datetime64], ...]:
        """Per source, shape (record,), us: when the record's acquisition starts, UTC."""
        return tuple(
            np.asarray(r.table.column("__start__").to_numpy(), dtype="datetime64[us]") for r in self.records
        )

    @cached_property
    def feeds(self) -> FeedTable:
        """The feed entries of all chips, flat."""
        return FeedTable.of(self.chips)

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """Shape (chip, 4): xmin, ymin, xmax, ymax."""
        return bounds_of(self.chips)

    @cached_property
    def epsg(self) -> NDArray[np.int64]:
        """Shape (chip,)."""
        return np.asarray(self.chips.column("epsg").to_numpy(), dtype=np.int64)

    def shards(self) -> Iterator[Shard]:
        """Yield all shards, split by split."""
        for h in self.hierarchies:
            for number in range(h.shards):
                yield self.shard(h.number, number)

    def shard(self, hierarchy: int, number: int) -> Shard:
        """Return one shard."""
        h = next(h for h in (*self.hierarchies, *self.others) if h.number == hierarchy)
        start = h.start + number * h.per_shard
        return Shard(h.split, hierarchy, number, start, min(start + h.per_shard, h.stop))

    @cached_property
    def running(self) -> NDArray[np.int64]:
        """Shape (chip,). Place of each chip's shard among :meth:`shards`, -1 where its split is not selected."""
        place = np.full(self.chips.num_rows, -1, dtype=np.int64)
        first = 0
        for h in self.hierarchies:
            place[h.start : h.stop] = first + np.arange(h.chips) // h.per_shard
            first += h.shards
        return place

    @cached_property
    def first_number(self) -> int:
        """What the numbers of this job's shards begin with in this process, so that no two jobs share any."""
        return next(_JOBS) << 40

    @cached_property
    def finished(self) -> set[int]:
        """What this process has read of the job, so that it keeps nothing for it: no part of the job itself."""
        return set()

    @cached_property
    def keys(self) -> dict[str, str]:
        """For each shard's name, the sha256 of what decides its pixels."""
        return shard_keys(self)

    @cached_property
    def digest(self) -> str:
        """Digest of all shards: two jobs of one digest write the same store."""
        return digest(self.phase, sorted(self.keys.items()), _labels(self))

    def chosen_chips(self) -> pa.Table:
        """Return the rows of the chip table that the job's splits hold, in their order."""
        parts = [self.chips.slice(h.start, h.chips) for h in self.hierarchies]
        return pa.concat_tables(parts)


def _working_bytes(source: SourcePlan, size: int, candidates: int) -> int:
    """Bytes that one slot of one chip needs beside its output, while its candidates are held or summed up."""
    bands = len(source.bands)
    held = {
        "median": 4 * candidates * bands,
        "mean": (8 + 4 + 4) * bands,  # a float64 sum, an int32 count, the candidate
        "clearest": 4 * candidates,  # of the quality band alone
    }
    return held.get(source.pick, 0) * size * size


def freeze(chips: ChipSet, shard_bytes: int = SHARD_BYTES) -> Job:
    """Settle shards and keep only what tasks need."""
    records, members, table = used_records(chips)
    feeds = FeedTable.of(chips.table)
    tasks_records = tuple(
        _with_passes(r, m, s, feeds.rows_of(n))
        for n, (r, m, s) in enumerate(zip(records, members, chips.sources, strict=True))
    )
    size_px = tuple(round(chips.size_m / s.plan.resolution) for s in chips.sources)
    plans = tuple(s.plan for s in chips.sources)
    table, parts = _by_split(chips, table)
    per_shard = _whole_blocks(chips, _per_shard(plans, size_px, feeds, shard_bytes))
    hierarchies = tuple(Hierarchy(s, n, a, b, per_shard) for s, n, a, b in parts)
    phase = digest(
        [_json(p) for p in plans],
        list(size_px),
        per_shard,
        [[s, to_json(f)] for s, f in chips.maps],
        __version__,
    )
    return Job(plans, size_px, hierarchies, tasks_records, table, chips.maps, phase)


def _with_passes(
    records: Records, member: NDArray[np.int64], source: ResolvedSource, used: NDArray[np.int64]
) -> Records:
    """Add each record's member, its acquisition, and when that starts."""
    number = source.passes.of_record[used]
    start = source.passes.start[number].astype("datetime64[us]").astype(np.int64)
    table = records.table
    for name, values in (("__member__", member), ("__pass__", number), ("__start__", start)):
        table = table.append_column(name, pa.array(values))
    return Records(table)


def _per_shard(plans: tuple[SourcePlan, ...], size_px: tuple[int, ...], feeds: FeedTable, budget: int) -> int:
    most = _most_candidates(feeds)
    cost = sum(Output.of(s, n).chip_bytes for s, n in zip(plans, size_px, strict=True))
    work = max(_working_bytes(s, n, c) for s, n, c in zip(plans, size_px, most, strict=True))
    return int(min(max(budget // max(cost, work), 1), SHARD_CHIPS))


def _whole_blocks(chips: ChipSet, per_shard: int) -> int:
    """Round down to the chips of whole tiles, which one shard then reads, or of whole blocks; at most half is lost."""
    if chips.spec.at is not None:
        return per_shard
    if chips.spec.grid != "tiles":
        block = (BLOCK_PX // chips.spec.stride) ** 2
        return per_shard // block * block if per_shard >= block > 0 else per_shard
    side = int(chips.outlines[chips.reference].tile_px.max()) // chips.spec.size
    row, col = (chips.table.column(name).to_numpy() // side for name in ("row", "col"))
    when = chips.table.column("datetime").cast(pa.int64()).fill_null(0).to_numpy()
    tile = np.stack([chips.table.column("epsg").to_numpy(), row, col, when], -1)
    change = np.flatnonzero(np.diff(tile, axis=0, prepend=tile[:1] - 1).any(axis=1))
    most = int(np.diff(np.append(change, len(tile))).max())  # tiles at an edge have fewer
    return per_shard if per_shard < most else per_shard // most * most


def task_bytes(job: Job, outputs: tuple[Output, ...]) -> int:
    """Return the bytes a task holds at most, beside what its process holds anyway.

    Its output, and with it either one slot as it stands in the files (16-bit numbers and two masks a pixel) and
    what its pick needs, or the chunks that the output becomes.
    """
    n = max((min(h.per_shard, h.chips) for h in job.hierarchies), default=1)
    largest = n * sum(o.chip_bytes for o in outputs)
    most = _most_candidates(job.feeds)
    slot = max(
        4 * size * size * len(plan.bands) + _working_bytes(plan, size, candidates)
        for plan, size, candidates in zip(job.sources, job.size_px, most, strict=True)
    )
    return largest + max(n * slot, largest)


def _most_candidates(feeds: FeedTable) -> list[int]:
    alone = len(feeds.names) == 1
    order = [feeds.order if alone else feeds.order[feeds.source == n] for n in range(len(feeds.names))]
    return [int(own.max(initial=0)) + 1 for own in order]


def _by_split(chips: ChipSet, table: pa.Table) -> tuple[pa.Table, list[tuple[str | None, int, int, int]]]:
    if chips.split is None:
        return table, [(None, 0, 0, table.num_rows)]
    label = split_numbers(table.column("split"), chips.split)
    order = np.argsort(label, kind="stable")
    count = np.bincount(label[label >= 0], minlength=len(chips.split.names)).tolist()
    stop = np.cumsum(count).tolist()
    parts: list[tuple[str | None, int, int, int]] = [
        (name, i, stop[i] - count[i], stop[i]) for i, name in enumerate(chips.split.names) if count[i]
    ]
    return table.take(pa.array(order[len(order) - sum(count) :])), parts


def shard_keys(job: Job) -> dict[str, str]:
    """Return for each shard's name the sha256 of what decides its pixels."""
    feeds = job.feeds
    marks = [
        _marks(records, members, source.members)
        for source, records, members in zip(job.sources, job.records, job.members, strict=True)
    ]
    base = np.cumsum([0, *(len(m) for m in marks)])
    mark = np.concatenate(marks)
    ids = job.chips.column("chip_id")
    result = {}
    for shard in job.shards():
        own = slice(feeds.offsets[shard.start], feeds.offsets[shard.stop])
        chips = slice(shard.start, shard.stop)
        text = hashlib.sha256(job.phase.encode())
        text.update("|".join(ids[chips].to_pylist()).encode())
        text.update(job.bounds[chips].tobytes())
        text.update(np.diff(feeds.offsets[shard.start : shard.stop + 1]).tobytes())
        for entries in (feeds.source, feeds.slot, feeds.order):
            text.update(entries[own].tobytes())
        text.update(mark[base[feeds.source[own]] + feeds.row[own]].tobytes())
        result[shard.name] = text.hexdigest()
    return result


def _labels(job: Job) -> str:
    """Digest the user's own columns: chips with other labels are another store."""
    own = [n for n in job.chips.column_names if n not in CHIP_SCHEMA.names]
    return hashlib.sha256(_ipc(job.chosen_chips().select(own))).hexdigest() if own else ""


def _marks(records: Records, members: NDArray[np.int64], known: tuple[Member, ...]) -> NDArray[Any]:
    """Digest each record's assets that its member reads; shape (record,), 32 bytes each."""
    result = np.zeros(len(records), dtype="V32")
    for number, member in enumerate(known):
        rows = np.flatnonzero(members == number)
        if not len(rows):
            continue
        own = records if len(rows) == len(records) else records.take(rows)
        bands = dict.fromkeys(b for b in (*member.bands, member.quality) if b is not None)
        said = [own.asset_field(band, name).to_pylist() for band in bands for name in _DECIDING]
        digests = b"".join(hashlib.sha256(repr(v).encode()).digest() for v in zip(*said, strict=True))
        result[rows] = np.frombuffer(digests, dtype="V32")
    return result


def _json(plan: SourcePlan) -> Any:
    values = {k: getattr(plan, k) for k in plan.__slots__}
    values["fill"] = None if np.isnan(plan.fill) else plan.fill
    values["members"] = [{k: getattr(m, k) for k in m.__slots__} for m in plan.members]
    values["maps"] = [to_json(f) for f in plan.maps]
    return json.loads(json.dumps(values))


def _plan(values: dict[str, Any]) -> SourcePlan:
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    lists["fill"] = float("nan") if values["fill"] is None else values["fill"]
    lists["members"] = tuple(Member(**{**m, "bands": tuple(m["bands"])}) for m in values["members"])
    lists["maps"] = tuple(from_json(f) for f in values["maps"])
    return SourcePlan(**lists)


def write_job(job: Job, url: str) -> None:
    """Write a job's tables as Arrow IPC and the rest as JSON below ``url``."""
    for number, records in enumerate(job.records):
        remote.put(remote.join(url, f"records-{number}.arrow"), _ipc(records.table))
    remote.put(remote.join(url, "chips.arrow"), _ipc(job.chips.drop_columns(["geometry"])))
    text = {
        "sources": [_json(s) for s in job.sources],
        "size_px": list(job.size_px),
        "hierarchies": [[h.split, h.number, h.start, h.stop, h.per_shard] for h in job.hierarchies],
        "maps": [[s, to_json(f)] for s, f in job.maps],
        "phase": job.phase,
        "digest": job.digest,
        "version": __version__,
    }
    remote.put(remote.join(url, "job.json"), json.dumps(text).encode())


def _ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


_DECIDING = ("href", "band_index", "size", "etag", "scale", "offset", "nodata")
"""What of an asset decides its pixels' values."""

_JOBS = count()
_OPENING = Lock()


def open_job(url: str, digest: str) -> Job:
    """Open a job, once per process whatever the number of threads.

    Parameters
    ----------
    url
        Where :func:`write_job` put it.
    digest
        The job's digest: tells jobs apart that were written to the same place in turn.

    Raises
    ------
    StoreError
        When there is another job by now.
    """
    with _OPENING:
        return _opened(url, digest)


@lru_cache(maxsize=8)
def _opened(url: str, digest: str) -> Job:
    text = json.loads(remote.get(remote.join(url, "job.json")))
    if text["digest"] != digest:
        raise StoreError(
            f"job {url}",
            f"another plan ({text['digest'][:12]})",
            f"this one ({digest[:12]})",
            "Something else was written to this store meanwhile: choose another one.",
        )
    tables = [
        pa.ipc.open_file(pa.py_buffer(remote.get(remote.join(url, f"records-{n}.arrow")))).read_all()
        for n in range(len(text["sources"]))
    ]
    chips = pa.ipc.open_file(pa.py_buffer(remote.get(remote.join(url, "chips.arrow")))).read_all()
    return Job(
        tuple(_plan(s) for s in text["sources"]),
        tuple(text["size_px"]),
        tuple(Hierarchy(*h) for h in text["hierarchies"]),
        tuple(Records(t) for t in tables),
        chips,
        tuple((s, from_json(f)) for s, f in text["maps"]),
        text["phase"],
    )
