# SPDX-License-Identifier: Apache-2.0
"""Shards of chips as the units of an exit: of a plan, or of a finished store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.chipping.chiptable import bounds_of, label_columns
from rasteret_dask.exports.filenames import ALL
from rasteret_dask.exports.sheets import SourceSheet, sheets_of_job, sheets_of_store
from rasteret_dask.exports.stacitems import Extent, extent_of
from rasteret_dask.footprint import box_around
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.store import ledger
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.layout import JOB, Layout
from rasteret_dask.store.provenance import Provenance, provenance_of_parts
from rasteret_dask.store.stored import Stored, read_shard
from rasteret_dask.store.unitruns import Making, UnitJob, Visible, WorkUnit
from rasteret_dask.tasks.batches import Arrays, arrays_of
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.jobfile import JobRef, check_writable, job_objects, opened
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.shards import Shipped, read_chips
from rasteret_dask.tasks.workermemory import TaskMemory
from rasteret_dask.words import OnError

__all__ = [
    "ChipUnit",
    "Encoder",
    "ExitChips",
    "chips_of_plan",
    "chips_of_store",
    "dropped_chips",
    "kept_chips",
    "unit_job",
]


class Encoder(Protocol):
    """Makes the objects of a format."""

    def objects(self, number: int, arrays: Arrays) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and pieces of each object of a shard's chips; ``number`` counts shards within their split."""

    def paths(self, number: int, split: str, chips: Sequence[str]) -> Iterable[str]:
        """Return the path of every object that these chips of a shard may have."""


class _Shards(Protocol):
    """Reads shards of chips in a task."""

    def read(self, item: Any, shipped: Sequence[Shipped]) -> tuple[Arrays, dict[str, Any]]:
        """Return the kept chips of a shard, and what its report says."""


@dataclass(frozen=True, slots=True)
class ChipUnit:
    """A shard, and which chips it has."""

    unit: WorkUnit
    splits: Callable[[], Mapping[str, Sequence[str]]]
    """Returns folder -> ids of its chips, dropped ones among them."""


@dataclass(frozen=True)
class ExitChips:
    """Chips that leave to files."""

    sheets: tuple[SourceSheet, ...]
    labels: Mapping[str, str]
    """Label column -> NumPy dtype."""
    extent: Extent
    bounds: NDArray[np.float64]
    """Shape (chip, 4): xmin, ymin, xmax, ymax, each in its own CRS."""
    splits: Mapping[str, int]
    """Folder -> chips, as planned."""
    provenance: Provenance
    digest: str
    units: Sequence[ChipUnit]
    """In running order."""
    shards: Callable[[str], _Shards]
    """Returns what reads them in a task, for the folder that is written."""
    functions: Mapping[str, Shipped] = field(default_factory=dict)
    """Key -> a user's function."""
    objects: Mapping[str, ledger.Maker] = field(default_factory=dict)
    """What tasks need in the folder."""
    cuts: Callable[[], Cuts] | None = None
    """Returns where neighbours may be cut; None: they have nothing in common."""
    memory: TaskMemory | None = None
    hrefs: Callable[[], Iterable[str]] = tuple
    signed: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    """Stores that tasks read."""


@dataclass(frozen=True)
class _PlannedShards:
    """Reads shards of a plan."""

    ref: JobRef
    on_error: OnError
    functions: tuple[Function, ...]

    def read(self, item: tuple[int, int], shipped: Sequence[Shipped]) -> tuple[Arrays, dict[str, Any]]:
        job = opened(self.ref)
        calls = {function: one.call for function, one in zip(self.functions, shipped, strict=True)}
        sources = read_chips(job, job.shard(*item), ReadContext(calls, self.on_error), warns=False)
        first = next(iter(sources.values()))
        rows = np.flatnonzero(first[KEPT].values) if KEPT in first.coords else None
        report: dict[str, Any] = {"dropped": first.attrs.get("dropped", {}), "seconds": {}}
        for name, dataset in sources.items():
            shares = (
                dataset["valid_fraction"].values if rows is None else dataset["valid_fraction"].values[rows]
            )
            report[f"masked/{name}"] = (
                round(1 - float(shares.mean(dtype=np.float64)), 6) if shares.size else 0.0
            )
            for fact, nothing in (("counts", {}), ("clipped", {}), ("unreadable", [])):
                report[f"{fact}/{name}"] = dataset.attrs.get(fact, nothing)
            report["seconds"] |= {f"{kind}/{name}": s for kind, s in dataset.attrs.get("seconds", {}).items()}
        return arrays_of(sources, rows), report


@dataclass(frozen=True)
class _StoredShards:
    """Reads shards of a store."""

    stored: Stored

    def read(self, item: int, shipped: Sequence[Shipped]) -> tuple[Arrays, dict[str, Any]]:
        begun = time.perf_counter()
        arrays = read_shard(self.stored, item)
        return arrays, {"seconds": {"read": time.perf_counter() - begun}}


def chips_of_plan(layout: Layout, context: ReadContext) -> ExitChips:
    """Return the chips of a plan.

    Parameters
    ----------
    layout
        The job, and what its sources become.
    context
        What shards are read with.

    Raises
    ------
    PlanError
        When a rule of the plan cannot be imported by another process.
    """
    job = layout.job
    check_writable(job)
    sheets = sheets_of_job(job, layout.outputs)
    order = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
    functions = job.all_functions
    chosen = job.chosen_chips()

    def ids(start: int, stop: int, folder: str) -> dict[str, list[str]]:
        return {folder: job.chips.slice(start, stop - start).column("chip_id").to_pylist()}

    units = [
        ChipUnit(
            WorkUnit(s.name, (s.hierarchy, s.number), s.stop - s.start, job.keys[s.name], s.split, s.number),
            partial(ids, s.start, s.stop, s.split or ALL),
        )
        for s in order
    ]
    objects = {f"{JOB}/{name}": ledger.whole(data) for name, data in job_objects(job).items()}
    return ExitChips(
        sheets, _label_dtypes(job.chips), extent_of(_boxes(chosen), sheets, layout.provenance), bounds_of(chosen),
        {h.split or ALL: h.chips for h in job.hierarchies if h.chips}, layout.provenance,
        job.digest, units,
        lambda url: _PlannedShards(JobRef(remote.join(url, JOB), job.digest), context.on_error, functions),
        {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions},
        objects | {ledger.PROVENANCE: ledger.whole(layout.provenance.to_bytes())},
        partial(Cuts.of, job), TaskMemory(job, layout.outputs, together=True), job.hrefs, job.signed,
    )  # fmt: skip


def chips_of_store(stored: Stored) -> ExitChips:
    """Return the chips of a finished store, with the splits that they have by now."""
    sheets = sheets_of_store(stored)
    table = stored.columns(["chip_id", "split", "geometry", "xmin", "ymin", "xmax", "ymax"])
    provenance = provenance_of_parts(stored.places)
    folders = [split or ALL for split in table.column("split").to_pylist()]
    ids = table.column("chip_id").to_pylist()
    units: list[ChipUnit] = []

    def of_rows(first: int, end: int) -> dict[str, list[str]]:
        result: dict[str, list[str]] = {}
        for row in range(first, end):
            result.setdefault(folders[row], []).append(ids[row])
        return result

    for number, size in enumerate(stored.sizes):
        if size:
            first = int(stored.offsets[number])
            key = digest(stored.digest, number)
            unit = WorkUnit(f"shard-{number:05d}", number, size, key, None, number)
            units.append(ChipUnit(unit, partial(of_rows, first, first + size)))
    counts: dict[str, int] = {}
    for folder in folders:
        counts[folder] = counts.get(folder, 0) + 1
    return ExitChips(
        sheets, _label_dtypes(stored.rows_of_table(slice(0, 1))), extent_of(_boxes(table), sheets, provenance),
        bounds_of(table),
        counts, provenance, stored.digest, units, lambda url: _StoredShards(stored),
        objects={ledger.PROVENANCE: ledger.whole(provenance.to_bytes())},
        stores=stored.places,
    )  # fmt: skip


def _label_dtypes(chips: pa.Table) -> dict[str, str]:
    columns = label_columns(chips.slice(0, 0))
    return {name: "str" if values.dtype == object else values.dtype.name for name, values in columns.items()}


def _boxes(chips: pa.Table) -> NDArray[np.float64]:
    """Return west, south, east, north of chips, shape (chip, 4); west of its east across the antimeridian."""
    outlines = shapely.from_wkb(chips.column("geometry").to_numpy(zero_copy_only=False))
    boxes = np.asarray(shapely.bounds(outlines))
    for row in np.flatnonzero(boxes[:, 2] - boxes[:, 0] > 180):
        boxes[row] = box_around(outlines[row])
    return boxes


def dropped_chips(manifest: pa.Table) -> set[str]:
    """Return the ids of the chips that a manifest says were dropped."""
    texts = manifest.column("dropped_chips").unique().to_pylist()
    return {chip for text in texts for chip in json.loads(text)}


def kept_chips(chips: ExitChips, manifest: pa.Table) -> dict[str, list[str]]:
    """Return folder -> ids of its chips, but those that the manifest says were dropped.

    Parameters
    ----------
    chips
        The chips.
    manifest
        A row a shard.
    """
    dropped = dropped_chips(manifest)
    result: dict[str, list[str]] = {folder: [] for folder in chips.splits}
    for one in sorted(chips.units, key=lambda own: own.unit.number):
        for folder, ids in one.splits().items():
            result[folder] += [chip for chip in ids if chip not in dropped]
    return result


@dataclass(frozen=True)
class _Writing:
    """What a task does with a shard."""

    shards: _Shards

    def __call__(self, item: tuple[int, Any], encoder: Encoder, *shipped: Shipped) -> Making:
        number, place = item
        arrays, report = self.shards.read(place, shipped)
        spent, begun = 0.0, time.perf_counter()
        for path, pieces in encoder.objects(number, arrays):
            spent += time.perf_counter() - begun
            yield path, pieces
            begun = time.perf_counter()
        spent += time.perf_counter() - begun
        activity.spent("encode", spent)
        return {**report, "seconds": {**report["seconds"], "encode": spent}}


def unit_job(
    writer: str,
    url: str,
    chips: ExitChips,
    encoder: Encoder,
    root: Visible,
    ends: Callable[[pa.Table], Mapping[str, bytes]],
    last: Mapping[str, str],
    options: str = "",
) -> UnitJob:
    """Return what an exit writes below a folder.

    Parameters
    ----------
    writer
        What the user calls.
    url
        The folder.
    chips
        The chips.
    encoder
        Makes their objects.
    root
        What makes all of them visible.
    ends
        Returns what is known when all shards are written, from the manifest: path -> bytes.
    last
        Folder -> the path that ``ends`` returns for it.
    options
        What decides the objects beside the chips.
    """
    whole = digest(writer, chips.digest, [sheet.facts for sheet in chips.sheets], options)

    def places() -> dict[str, str]:
        result: dict[str, str] = {}
        for one in chips.units:
            for folder, ids in one.splits().items():
                result.setdefault(last[folder], one.unit.name)
                result |= dict.fromkeys(encoder.paths(one.unit.number, folder, ids), one.unit.name)
        return result

    units = [
        WorkUnit(
            one.unit.name, (one.unit.number, one.unit.item), one.unit.chips,
            digest(whole, one.unit.key), one.unit.split, one.unit.number,
        )
        for one in chips.units
    ]  # fmt: skip
    return UnitJob(
        writer, whole, units, _Writing(chips.shards(url)), root, chips.objects, places, ends,
        {f"encoder-{whole[:16]}": encoder, **chips.functions},
        cuts=chips.cuts, memory=chips.memory, hrefs=chips.hrefs, signed=chips.signed, stores=chips.stores,
    )  # fmt: skip
