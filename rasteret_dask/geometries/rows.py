# SPDX-License-Identifier: Apache-2.0
"""Windows become rows, one a window and acquisition (or slot), and rows a job that the engine reads."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.threaded
import numpy as np
import pyarrow as pa
import shapely
from dask._task_spec import Task
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FeedTable
from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.chipping.laying import Laid, lay
from rasteret_dask.cubes.cube import GroupCube
from rasteret_dask.errors import PlanError, UnreadableTilesWarning
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import (
    ChipSpec,
    Filter,
    Harmonize,
    HarmonizeSpec,
    Join,
    near_area,
    spec_field,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource, resolve_source
from rasteret_dask.reader.keeping import Later
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.cuts import Feed, MemberCubes
from rasteret_dask.tasks.filling import ChipPixels
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobkernels import warn_of_job
from rasteret_dask.tasks.picking import Picking

__all__ = ["NoRecordError", "Rows", "laid", "picked", "run", "settled", "squares", "window_job"]


class NoRecordError(PlanError):
    """No record covers any of the windows."""


MAX_MARGIN_KM = 100.0
"""Records farther from all geometries than this cannot touch a window."""

SIDES = tuple(2**n for n in range(4, 11))
"""Sides of the squares that windows of many shapes are read in, pixels."""

SQUARE_PX = 64 * 64
"""Pixels that are read in the time that a square takes beside its pixels."""


def settled(
    query: Query,
    bands: tuple[str, ...] | None,
    resolution: float | None,
    near: Any,
) -> ResolvedSource:
    """Settle the one source of a plan for reading.

    Parameters
    ----------
    query
        The plan.
    bands, resolution
        As in ``harmonize``; None: as the plan says.
    near
        (west, south, east, north) in degrees: records far from it matter only where they set the time axis.

    Raises
    ------
    PlanError, BandError, UnreadableAssetsError
        When there is more than one source, or it cannot be settled.
    """
    plan = query.plan
    if isinstance(plan, Join):
        raise PlanError("reading windows", f"a join of {', '.join(plan.names)}", "one source",
                        "Read each of them, or take join(...).chips(...).")  # fmt: skip
    box = shapely.to_wkb(shapely.box(*near), hex=True)
    predicate = near_area(ChipSpec(1, 1, aoi=box, cell_km=MAX_MARGIN_KM))
    if predicate is not None and spec_field(plan, "time") is None:
        plan = Filter(plan, (predicate,))
    if bands is not None or resolution is not None:
        plan = Harmonize(plan, HarmonizeSpec(bands=bands, resolution=resolution))
    members = query.members(optimize(plan))
    source = resolve_source(members[0].name if len(members) == 1 else "merged", members)
    source.check_chipless("reading windows")
    if source.plan.maps:
        raise PlanError("reading windows", "a map step, which works on chips", "no map",
                        "Apply the function to what is read, or take chips(...).")  # fmt: skip
    return source


@dataclass(frozen=True)
class Rows:
    """What is read, in order: geometry by geometry; in each by time; at the same time by id."""

    source: ResolvedSource
    frame: Frame
    laid: Laid
    window: NDArray[np.int64]
    """Shape (row,). ChipPlace of the row's window in ``frame``."""
    chip: NDArray[np.int64]
    """Shape (row,). ChipPlace in ``laid``; -1 where no record covers the window, so that all is fill."""
    slot: NDArray[np.int64]
    """Shape (row,). 0 without a time axis."""

    def __len__(self) -> int:
        return len(self.window)

    @property
    def geometry(self) -> NDArray[np.int64]:
        """Shape (row,). Number of the geometry."""
        assert self.frame.index is not None
        return self.frame.index[self.window]

    @property
    def shape(self) -> NDArray[np.int64]:
        """Shape (row, 2). Height and width in pixels."""
        bounds = self.frame.bounds[self.window]
        sides = bounds[:, [3, 2]] - bounds[:, [1, 0]]
        return np.rint(sides / self.source.plan.resolution).astype(np.int64)

    @property
    def of_chip(self) -> NDArray[np.int64]:
        """Shape (chip, slot). The row of each."""
        result = np.empty((len(self.laid.window), self.source.plan.times), dtype=np.int64)
        known = np.flatnonzero(self.chip >= 0)
        result[self.chip[known], self.slot[known]] = known
        return result

    @property
    def lead(self) -> NDArray[np.int64]:
        """Shape (row,). Among the source's records, the one that is nearest to the window; -1 where there is none."""
        first, last = self.fed()
        return np.where(first < last, np.append(self.laid.feeds[0].record, -1)[first], -1)

    def fed(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the entries of each row begin and end in ``laid.feeds[0]``, shape (row,) each."""
        feeds, times = self.laid.feeds[0], self.source.plan.times
        key = feeds.window.astype(np.int64) * times + feeds.slot
        wanted = self.chip * times + self.slot
        return np.searchsorted(key, wanted, side="left"), np.searchsorted(key, wanted, side="right")


def laid(source: ResolvedSource, outlines: Outlines, frame: Frame) -> Rows:
    """Lay rows over windows: all that any record covers, and one for each window (and slot) that none does.

    Raises
    ------
    NoRecordError
        When no window is covered.
    """
    spec = ChipSpec(1, 1, at="windows", min_coverage=0.0)
    own = lay(spec, [source], 0, [outlines], frame)
    if not len(own.window):
        raise NoRecordError(
            f"windows of {source.plan.name!r}", f"no record that covers any of {len(frame):,}", "at least one",
            "Are the geometries in lon/lat, and the filters not too narrow?",
        )  # fmt: skip
    times = source.plan.times
    bare = np.setdiff1d(np.arange(len(frame)), own.window)
    window = np.repeat(np.append(own.window, bare), times)
    chip = np.repeat(np.append(np.arange(len(own.window)), np.full(len(bare), -1)), times)
    slot = np.tile(np.arange(times), len(own.window) + len(bare))
    rows = Rows(source, frame, own, window, chip, slot)
    ids = np.append(source.id_rank, -1)[rows.lead]
    start = np.append(own.start.astype(np.int64), -1)[chip]
    order = np.lexsort((ids, start, slot, rows.geometry))
    return Rows(source, frame, own, window[order], chip[order], slot[order])


def squares(rows: Rows, side: int | None = None) -> tuple[int, NDArray[np.int64]]:
    """Cut the windows that records cover into squares of one side, which is what the engine reads.

    Parameters
    ----------
    rows
        The rows.
    side
        Pixels; None: what costs least.

    Returns
    -------
    side, square
        ``square`` has shape (square, 3): chip of ``rows.laid``, and row and column of its corner in the window.
        The last of a window ends with it; where the window is smaller than a square, that reaches beyond it.
    """
    bounds = rows.frame.bounds[rows.laid.window]
    shape = np.rint((bounds[:, [3, 2]] - bounds[:, [1, 0]]) / rows.source.plan.resolution).astype(np.int64)
    if side is None:
        cost = {s: int(np.prod(-(-shape // s), axis=1).sum()) * (s * s + SQUARE_PX) for s in SIDES}
        side = min(cost, key=lambda s: cost[s])
    count = -(-shape // side)
    chip = np.repeat(np.arange(len(shape)), count.prod(axis=1))
    within = np.arange(len(chip)) - np.repeat(
        np.cumsum(count.prod(axis=1)) - count.prod(axis=1), count.prod(axis=1)
    )
    corner = np.stack(np.divmod(within, count[chip, 1]), -1) * side
    corner = np.minimum(corner, np.maximum(shape[chip] - side, 0))
    return side, np.column_stack([chip, corner])


def window_job(
    rows: Rows, outlines: Outlines, side: int, square: NDArray[np.int64], per_shard: int = 0
) -> Job:
    """Freeze squares of windows as a job of the engine: a chip each, in their order.

    Parameters
    ----------
    rows, outlines
        The rows, and the outlines of their source's records.
    side, square
        See :func:`squares`.
    per_shard
        Chips that are read together, at most; 0: as many as any job's.
    """
    source, own = rows.source, rows.laid
    pixel = source.plan.resolution
    chip = square[:, 0]
    window = own.window[chip]
    west = rows.frame.bounds[window, 0] + square[:, 2] * pixel
    north = rows.frame.bounds[window, 3] - square[:, 1] * pixel
    box = np.round(np.stack([west, north - side * pixel, west + side * pixel, north], -1), 9)
    feeds = own.feeds[0]
    count = np.bincount(feeds.window, minlength=len(own.window))
    first, repeat = np.cumsum(count) - count, count[chip]
    entry = np.arange(repeat.sum()) + np.repeat(first[chip] - np.cumsum(repeat) + repeat, repeat)
    named = FeedTable(
        np.append(0, np.cumsum(repeat)), np.zeros(len(entry), np.int8), feeds.slot[entry], feeds.order[entry],
        feeds.record[entry], feeds.share[entry], (source.plan.name,), (tuple(source.records.ids),),
    )  # fmt: skip
    columns: dict[str, Any] = {field.name: pa.nulls(len(square), field.type) for field in CHIP_SCHEMA}
    columns |= {
        "chip_id": pa.array(np.arange(len(square))).cast(pa.string()),
        "epsg": pa.array(rows.frame.epsg[window].astype(np.int32)),
        **{name: pa.array(box[:, i]) for i, name in enumerate(("xmin", "ymin", "xmax", "ymax"))},
        "feeds": named.to_arrow(),
    }
    spec = ChipSpec(side, side, at="windows", min_coverage=0.0)
    chips = PlannedChips(
        pa.table(columns, schema=CHIP_SCHEMA), (source,), 0, spec, None, pixel, outlines=(outlines,)
    )  # fmt: skip
    job = freeze(chips)
    warn_of_job(job)
    if per_shard:
        (whole,) = job.hierarchies
        job = dataclasses.replace(job, hierarchies=(dataclasses.replace(whole, per_shard=per_shard),))
    return job


def run(job: Job, take: Callable[[Shard, ChipPixels], None], context: ReadContext) -> None:
    """Read a job's shards on Dask's threads in this process; ``take`` gets each of them as it comes."""

    def one(shard: Shard) -> None:
        take(shard, picked(job, shard, context))

    tasks = {shard.name: Task(shard.name, one, shard) for shard in job.shards()}
    dask.threaded.get(tasks, list(tasks))


def picked(job: Job, shard: Shard, context: ReadContext, later: Later | None = None) -> ChipPixels:
    """Read a shard of a job of one source.

    Windows may lie anywhere: each member's are windows of one grid a CRS, so that a record's band is one request
    however many they are.
    """
    plan, records = job.sources[0], job.records[0]
    feed = Feed.of(job, shard, 0)
    epsg, bounds = job.epsg[shard.start : shard.stop], job.bounds[shard.start : shard.stop]
    codes = np.unique(epsg).tolist()
    group_of = {chip: codes.index(code) for chip, code in enumerate(epsg.tolist())}
    members = []
    for number, member in enumerate(plan.members):
        rows = np.unique(feed.row[job.members[0][feed.row] == number]).tolist()
        assets = {(row, band): records.asset(row, band) for row in rows for band in member.reads}
        groups = []
        for code in codes:
            at = np.flatnonzero(epsg == code)
            x0, y0 = float(bounds[at, 0].min()), float(bounds[at, 3].max())
            grid = Grid(code, x0, y0, plan.resolution, plan.resolution)
            place = np.rint((bounds[at][:, [3, 0]] - [y0, x0]) / [-plan.resolution, plan.resolution])
            side = job.size_px[0]
            windows = {
                chip: Window(row, col, side, side)
                for chip, (row, col) in zip(at.tolist(), place.astype(np.int64).tolist(), strict=True)
            }
            groups.append(GroupCube(grid, assets, windows))
        members.append(MemberCubes(member, number, tuple(groups), group_of))
    chips = Picking(job, shard, 0, members).read(context.on_error, later=later)
    if chips.unreadable:
        warnings.warn(
            f"{len(chips.unreadable)} tiles could not be read; their pixels are invalid:\n"
            + "\n".join(chips.unreadable),
            UnreadableTilesWarning,
            stacklevel=2,
        )
    return chips
