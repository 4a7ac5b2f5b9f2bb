# SPDX-License-Identifier: Apache-2.0
"""Shards of chips as the units of an exit: of a plan, or of a finished store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

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
from rasteret_dask.planning.plan import digest
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.stored import Stored
from rasteret_dask.store.unitchips import ShardReader, UnitChips, planned_units, stored_units
from rasteret_dask.store.unitruns import Making, UnitJob, Visible, WorkUnit
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.shards import Shipped

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
    digest: str
    units: Sequence[ChipUnit]
    """In running order."""
    reading: UnitChips
    """Who reads them, and what that needs."""


def chips_of_plan(layout: Layout, context: ReadContext) -> ExitChips:
    """Return the chips of a plan.

    Parameters
    ----------
    layout
        The job, and what its sources become.
    context
        What shards are read with.
    """
    job = layout.job
    sheets = sheets_of_job(job, layout.outputs)
    order = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
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
    return ExitChips(
        sheets, _label_dtypes(job.chips), extent_of(_boxes(chosen), sheets, layout.provenance), bounds_of(chosen),
        {h.split or ALL: h.chips for h in job.hierarchies if h.chips}, job.digest, units,
        planned_units(job, layout.outputs, context, layout.provenance),
    )  # fmt: skip


def chips_of_store(stored: Stored) -> ExitChips:
    """Return the chips of a finished store, with the splits that they have by now."""
    sheets = sheets_of_store(stored)
    table = stored.columns(["chip_id", "split", "geometry", "xmin", "ymin", "xmax", "ymax"])
    own = stored_units(stored)
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
            unit = WorkUnit(f"shard-{number:05d}", (0, number), size, key, None, number)
            units.append(ChipUnit(unit, partial(of_rows, first, first + size)))
    counts: dict[str, int] = {}
    for folder in folders:
        counts[folder] = counts.get(folder, 0) + 1
    return ExitChips(
        sheets, _label_dtypes(stored.rows_of_table(slice(0, 1))), extent_of(_boxes(table), sheets, own.provenance),
        bounds_of(table), counts, stored.digest, units, own,
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

    shards: ShardReader

    def __call__(self, item: tuple[int, tuple[int, int]], encoder: Encoder, *shipped: Shipped) -> Making:
        number, place = item
        chips = self.shards.read(place, shipped)
        spent, begun = 0.0, time.perf_counter()
        for path, pieces in encoder.objects(number, chips.arrays):
            spent += time.perf_counter() - begun
            yield path, pieces
            begun = time.perf_counter()
        spent += time.perf_counter() - begun
        activity.spent("encode", spent)
        return {**chips.report, "seconds": {**chips.report["seconds"], "encode": spent}}


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

    Raises
    ------
    PlanError
        When a rule of the plan cannot be imported by another process.
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
    own = chips.reading
    return UnitJob(
        writer, whole, units, _Writing(own.reader(url)), root, own.objects(), places, ends,
        {f"encoder-{whole[:16]}": encoder, **own.functions},
        cuts=own.cuts, memory=own.memory, hrefs=own.hrefs, signed=own.signed, stores=own.stores,
    )  # fmt: skip
