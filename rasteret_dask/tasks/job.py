# SPDX-License-Identifier: Apache-2.0
"""A frozen plan with its tables: the values that tasks share."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.catalogs.signing import check_signatures, host_of
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FeedTable, bounds_of
from rasteret_dask.chipping.frame import grown
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.crs import unpack
from rasteret_dask.grid import transformer
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.planning.meta import OF_SLOTS, VALID, Meta, record_values
from rasteret_dask.planning.plan import Function, Rule, digest
from rasteret_dask.planning.resolve import SourcePlan, SourceRecords
from rasteret_dask.table.barehrefs import hosts_of, hrefs_of
from rasteret_dask.table.filelayouts import FileLayouts
from rasteret_dask.table.records import Records

__all__ = ["Hierarchy", "Job", "Output", "Shard", "ipc_bytes", "job_digest", "shard_keys"]

_DECIDING = (
    "href",
    "band_index",
    "size",
    "etag",
    "scale",
    "offset",
    "nodata",
    "valid_min",
    "valid_max",
    "alpha",
    "placement",
    "kind",
)
"""What of an asset decides its pixels' values."""

_JOBS = count()


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
    first: int = 0
    """Number of its first shard: above 0 in a part of a job."""

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


def _shard(part: Hierarchy, number: int) -> Shard:
    start = part.start + (number - part.first) * part.per_shard
    return Shard(part.split, part.number, number, start, min(start + part.per_shard, part.stop))


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
    kinds: tuple[BandKind, ...] = ()
    """What the numbers of each band are; () where nobody knows, as after a user's function."""
    masks: tuple[tuple[str, str], ...] = ()
    """(name, dtype) of each variable (chip, y, x) of labels: ``mask``, or ``mask_<column>``."""
    units: tuple[str, ...] = ()
    """Per band, its unit; () where nobody knows, as after a user's function."""
    filled: bool = False
    """Whether acquisitions fill each other, so that ``filled_fraction`` (chip, time) is told."""
    present: bool = False
    """Whether slots or chips may have no record, so that ``present`` (chip, time) is told."""
    meta: Meta = ()
    """What is told of each slot beside its pixels."""

    @classmethod
    def of(cls, plan: SourcePlan, size: int) -> Output:
        """Describe a source's output before any map."""
        whole = np.dtype(plan.dtype).kind not in "fc"
        scale = plan.rules.store.scale_factor
        attrs = (*((("units", plan.unit),) if plan.unit else ()), ("long_name", plan.name))
        return cls(plan.bands, plan.dtype, plan.fill, plan.times, plan.slots, size, size, whole, scale, attrs,
                   kinds=plan.kinds, units=plan.units, filled=plan.pick.fills,
                   present=plan.sparse, meta=plan.meta)  # fmt: skip

    @property
    def meta_names(self) -> tuple[str, ...]:
        """Names of what is told of each slot."""
        return tuple(name for name, _ in self.meta)

    @property
    def meta_arrays(self) -> Meta:
        """The arrays that there are only because they are asked for."""
        return tuple(pair for pair in self.meta if pair[0] != VALID)

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
    def kind_names(self) -> tuple[str, ...]:
        """The kind of each band, ``"unknown"`` where nobody knows."""
        kinds = self.kinds or (BandKind(),) * len(self.bands)
        return tuple(band.kind or "unknown" for band in kinds)

    @property
    def classes(self) -> dict[str, list[dict[str, Any]]]:
        """Band -> its classes, as STAC's classification extension writes them, of bands whose classes have names."""
        return {
            band: [{"value": value, "name": name} for value, name in own.classes]
            for band, own in zip(self.bands, self.kinds, strict=False)
            if own.classes
        }

    @property
    def chip_bytes(self) -> int:
        """Bytes of one chip."""
        pixels = self.times * self.height * self.width
        masks = self.height * self.width * sum(np.dtype(dtype).itemsize for _, dtype in self.masks)
        return pixels * (len(self.bands) * np.dtype(self.dtype).itemsize + int(self.valid)) + masks


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
    pixel_rules: tuple[Rule, ...] = ()
    """What pixels must fulfil for their chip to be kept."""
    labels: tuple[Labels, ...] = ()
    """Polygons that one source's pixels carry as masks."""
    split_cells: pa.Table | None = None
    """Split cells and the split that each got (``cell``, ``split``), where they were dealt by more than a hash."""
    fold_cells: pa.Table | None = None
    """Likewise their folds (``cell``, ``fold``)."""
    part_of: str = ""
    """Digest of the job that this is a part of: some of its shards, under their own numbers. Empty: it is whole."""
    reaches_m: tuple[float, ...] = ()
    """Per source, how far windows reach beyond the chips' bounds on each side; (): windows are the chips."""
    in_turn: bool = True
    """Whether the shards of all hierarchies take turns, as those of splits over the same ground."""

    def __getstate__(self) -> dict[str, Any]:
        state = {f.name: getattr(self, f.name) for f in fields(self)}  # not what was cached on the way
        return state | {"records": tuple(Records(r.table) for r in self.records)}

    def labels_on(self, source: int) -> tuple[Labels, ...]:
        """Return the labels that are burned on one source's pixels."""
        return tuple(labels for labels in self.labels if labels.source == source)

    def functions(self, source: int) -> tuple[Function, ...]:
        """Return the user's functions over one source's pixels, in the order in which they are called."""
        plan = self.sources[source]
        return (*plan.maps, *(function for name, function in self.maps if name in (None, plan.name)))

    def record_rows(self) -> list[tuple[SourceRecords, NDArray[np.int64]]]:
        """Return each source with the rows of its records that feed a chip of the job's splits."""
        feeds = FeedTable.of(self.chosen_chips())
        own = map(SourceRecords, self.sources, self.records, self.members)
        return [(source, feeds.rows_of(number)) for number, source in enumerate(own)]

    @property
    def all_functions(self) -> tuple[Function, ...]:
        """The user's functions of all sources and of rules on pixels, each once."""
        steps = [function for number in range(len(self.sources)) for function in self.functions(number)]
        rules = [rule.function for rule in self.pixel_rules if rule.function is not None]
        return tuple(dict.fromkeys([*steps, *rules]))

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
    def layouts(self) -> tuple[FileLayouts, ...]:
        """Per source, which of its files are laid out alike."""
        return tuple(map(FileLayouts, self.records))

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
    def meta(self) -> tuple[Mapping[str, NDArray[Any]], ...]:
        """Per source, each property that chips carry, shape (record + 1,): the last is what has no record."""
        return tuple(
            {name: record_values(r.table, name, dtype) for name, dtype in plan.meta if name not in OF_SLOTS}
            for plan, r in zip(self.sources, self.records, strict=True)
        )

    @cached_property
    def feeds(self) -> FeedTable:
        """The feed entries of all chips, flat."""
        return FeedTable.of(self.chips)

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """Shape (chip, 4): xmin, ymin, xmax, ymax."""
        return bounds_of(self.chips)

    def names(self, chips: slice) -> list[str]:
        """Return the ids of some chips."""
        return [str(name) for name in self.chips.column("chip_id")[chips].to_pylist()]

    def reach_m(self, source: int) -> float:
        """Return how far beyond its bounds a chip's window in a source reaches on each side."""
        return self.reaches_m[source] if self.reaches_m else 0.0

    def windows(self, source: int, chips: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.float64]:
        """Return the windows of chips in a source, shape (chip, 4): their bounds, or wider ones around the centres."""
        return grown(self.bounds[chips], self.reach_m(source))

    def pixel(self, source: int, window: NDArray[np.float64]) -> tuple[float, float]:
        """Return the width and height of a pixel of a chip's window in a source, in units of its CRS."""
        plan, size = self.sources[source], self.size_px[source]
        if not plan.by_file:
            return plan.resolution, plan.resolution
        xmin, ymin, xmax, ymax = window.tolist()
        return (xmax - xmin) / size, (ymax - ymin) / size

    @cached_property
    def epsg(self) -> NDArray[np.int64]:
        """Shape (chip,), as :func:`rasteret_dask.crs.number` counts CRSs."""
        unpack(self.chips.schema.metadata)
        return np.asarray(self.chips.column("epsg").to_numpy(), dtype=np.int64)

    def shards(self) -> Iterator[Shard]:
        """Yield all shards, split by split."""
        for h in self.hierarchies:
            for number in range(h.first, h.first + h.shards):
                yield _shard(h, number)

    @property
    def shard_count(self) -> int:
        """How many shards :meth:`shards` yields."""
        return sum(h.shards for h in self.hierarchies)

    def nth_shard(self, place: int) -> Shard:
        """Return the shard that :meth:`shards` yields at a place, counted from 0, without the others."""
        stops = np.cumsum([h.shards for h in self.hierarchies])
        part = int(np.searchsorted(stops, place, side="right"))
        h = self.hierarchies[part]
        return _shard(h, h.first + h.shards + place - int(stops[part]))

    def shard(self, hierarchy: int, number: int) -> Shard:
        """Return one shard."""
        return _shard(self._by_number[hierarchy], number)

    @cached_property
    def _by_number(self) -> dict[int, Hierarchy]:
        return {h.number: h for h in (*self.hierarchies, *self.others)}

    @cached_property
    def running(self) -> NDArray[np.int64]:
        """Shape (chip,). When each chip's shard runs, counted from 0; -1 where its split is not selected.

        All splits lie on the same ground in the same order: their shards take turns, so that a tile is soon used up.
        """
        place = np.full(self.chips.num_rows, -1, dtype=np.int64)
        parts = [h for h in self.hierarchies if h.chips]
        if not parts:
            return place
        if not self.in_turn:
            begun = 0
            for h in parts:
                place[h.start : h.stop] = begun + np.arange(h.chips) // h.per_shard
                begun += h.shards
            return place
        along = np.concatenate([(np.arange(h.shards) + 0.5) * (h.per_shard / h.chips) for h in parts])
        of_part = np.repeat([h.number for h in parts], [h.shards for h in parts])
        when = np.empty(len(along), dtype=np.int64)
        when[np.lexsort((of_part, along))] = np.arange(len(along))
        begun = 0
        for h in parts:
            place[h.start : h.stop] = np.repeat(when[begun : begun + h.shards], h.per_shard)[: h.chips]
            begun += h.shards
        return place

    @cached_property
    def _chips_by_record(
        self,
    ) -> tuple[tuple[dict[str, list[int]], NDArray[np.int64], NDArray[np.int64]], ...]:
        """Per source: the rows of each id, the chips sorted by the row that feeds them, and where each row's begin."""
        result = []
        for number, records in enumerate(self.records):
            own = np.flatnonzero(self.feeds.source == number)
            row = self.feeds.row[own]
            order = np.argsort(row, kind="stable")
            first = np.searchsorted(row[order], np.arange(len(records) + 1))
            rows: dict[str, list[int]] = {}
            for at, name in enumerate(records.ids):
                rows.setdefault(name, []).append(at)
            result.append((rows, self.feeds.chip[own[order]], first))
        return tuple(result)

    def chips_of(self, source: int, record: str) -> NDArray[np.int64]:
        """Return the chips that a record of a source feeds, in the order of the chip table."""
        rows, chips, first = self._chips_by_record[source]
        parts = [chips[first[row] : first[row + 1]] for row in rows.get(record, ())]
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))

    def bounds_in(self, chips: NDArray[np.int64], epsg: int, reach_m: float = 0.0) -> NDArray[np.float64]:
        """Return bounds of some chips in a CRS, shape (chip, 4), inf where that does not show them.

        ``reach_m`` is how much farther they reach on each side, in the CRS of the chips.
        """
        bounds, codes = grown(self.bounds[chips], reach_m).copy(), self.epsg[chips]
        for code in np.unique(codes).tolist():
            if code != epsg:
                own = np.flatnonzero(codes == code)
                again, some = pd.factorize(chips[own])
                bounds[own] = _corners_in(grown(self.bounds[some], reach_m), code, epsg)[again]
        return bounds

    @cached_property
    def first_number(self) -> int:
        """What the numbers of this job's shards begin with in this process, so that no two jobs share any."""
        return next(_JOBS) << 40

    @cached_property
    def finished(self) -> set[int]:
        """What this process has read of the job, so that it keeps nothing for it: no part of the job itself."""
        return set()

    @cached_property
    def kept(self) -> dict[int, int]:
        """Threads -> the bytes of pixels that a process keeps at most: no part of the job itself."""
        return {}

    @cached_property
    def keys(self) -> dict[str, str]:
        """For each shard's name, the sha256 of what decides its pixels."""
        return shard_keys(self)

    @cached_property
    def signed(self) -> tuple[str, ...]:
        """Hosts whose hrefs arrived with signatures, which are not in the job."""
        return tuple(sorted({host for r in self.records for host in hosts_of(r.table.schema) or ()}))

    def hrefs(self) -> Iterator[str]:
        """Yield the hrefs of hosts that want a signature."""
        if self.signed:
            for records in self.records:
                yield from (href for href in hrefs_of(records.table) if host_of(href) in self.signed)

    @cached_property
    def _is_signable(self) -> bool:
        check_signatures(self.hrefs(), self.signed)
        return True

    def check_signatures(self) -> None:
        """Raise PlanError where this process cannot sign the hrefs that arrived signed; looked at until it can."""
        _ = self._is_signable

    @cached_property
    def digest(self) -> str:
        """Digest of all shards: two jobs of one digest write the same store."""
        return self.part_of or job_digest(self.phase, self.keys, _labels(self))

    def chip_tables(self) -> Iterator[pa.Table]:
        """Yield the rows of :meth:`chosen_chips`, as many at a time as are at hand."""
        yield self.chosen_chips()

    def coordinates(self, hierarchy: Hierarchy, start: int, stop: int) -> pa.Table:
        """Return what a store's coordinates say of some chips, counted within their split: columns of CHIP_SCHEMA."""
        return self.chips.slice(hierarchy.start + start, stop - start)

    def chosen_chips(self) -> pa.Table:
        """Return the rows of the chip table that the job's splits hold, in their order."""
        parts = [self.chips.slice(h.start, h.chips) for h in self.hierarchies]
        return pa.concat_tables(parts)


def _corners_in(bounds: NDArray[np.float64], code: int, epsg: int) -> NDArray[np.float64]:
    """Return bounds of the corners of chips in another CRS, shape (chip, 4); one of several chips is moved once."""
    x, xs = pd.factorize(bounds[:, [0, 2]].T.ravel())
    y, ys = pd.factorize(bounds[:, [1, 3]].T.ravel())
    (west, east), (south, north) = np.split(x, 2), np.split(y, 2)
    corner, corners = pd.factorize(
        np.concatenate([west, east, east, west]) * len(ys) + np.concatenate([north, north, south, south])
    )
    moved = transformer(code, epsg).transform(xs[corners // max(len(ys), 1)], ys[corners % max(len(ys), 1)])
    east_of, north_of = (np.asarray(values)[corner].reshape(4, -1) for values in moved)
    return np.stack([east_of.min(0), north_of.min(0), east_of.max(0), north_of.max(0)], -1)


def job_digest(phase: str, keys: Mapping[str, str], labels: str = "") -> str:
    """Return the digest of a job's shards: of their keys, and of the user's own columns."""
    return digest(phase, sorted(keys.items()), labels)


def shard_keys(job: Job) -> dict[str, str]:
    """Return for each shard's name the sha256 of what decides its pixels."""
    feeds = job.feeds
    marks = [
        _marks(records, members, source)
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
    return hashlib.sha256(ipc_bytes(job.chosen_chips().select(own))).hexdigest() if own else ""


def _marks(records: Records, members: NDArray[np.int64], plan: SourcePlan) -> NDArray[Any]:
    """Digest each record's assets that its member reads, and what chips carry of it; shape (record,), 32 bytes each."""
    result = np.zeros(len(records), dtype="V32")
    told = [record_values(records.table, name, kind) for name, kind in plan.meta if name not in OF_SLOTS]
    for number, member in enumerate(plan.members):
        rows = np.flatnonzero(members == number)
        if not len(rows):
            continue
        own = records if len(rows) == len(records) else records.take(rows)
        fields = {name: own.asset_fields(member.reads, name).to_pylist() for name in _DECIDING}
        columns = [
            fields[name][band * len(own) : (band + 1) * len(own)]
            for band in range(len(member.reads))
            for name in _DECIDING
        ] + [values[rows].tolist() for values in told]
        digests = b"".join(hashlib.sha256(repr(v).encode()).digest() for v in zip(*columns, strict=True))
        result[rows] = np.frombuffer(digests, dtype="V32")
    return result


def ipc_bytes(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC file, compressed by zstd."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()
