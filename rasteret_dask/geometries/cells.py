# SPDX-License-Identifier: Apache-2.0
"""The cells of the lattice over an area, numbered row by row, and one source's pixels in any of them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import warnings
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.feeds import Feeds, source_outlines
from rasteret_dask.chipping.frame import Frame, candidates
from rasteret_dask.errors import MixedScalesWarning, PlanError, ReadError, user_level
from rasteret_dask.geometries.areas import as_area
from rasteret_dask.geometries.reading import RowsToRead, WindowRequest, read
from rasteret_dask.geometries.rows import (
    NoRecordError,
    laid,
    picked,
    settled,
    squares,
    window_job,
)
from rasteret_dask.geometries.windows import Geometries
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import ChipSpec, Filter, Node, Predicate, spec_field
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource, in_metres
from rasteret_dask.rules.picks import pick_named
from rasteret_dask.table.timing import TimeAxis, half_open
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filling import ChipPixels
from rasteret_dask.tasks.job import Hierarchy, Job, Shard

__all__ = ["Area", "Cells", "cells_of"]


@dataclass(frozen=True)
class Cells:
    """Lattice cells and what feeds them; pickles, and reads nothing before :meth:`read`."""

    frame: Frame
    """The cells: zone by zone, row by row southwards, in a row eastwards. A function of the area, ``size`` and the
    pixel size alone."""
    source: ResolvedSource
    """With one slot."""
    outlines: Outlines
    size: int
    """Side of a cell, pixels."""
    job: Job
    """A chip for each cell that records cover."""
    chip: NDArray[np.int64]
    """Shape (cell,). Its chip in the job, -1 where no record covers it."""
    context: ReadContext

    def __len__(self) -> int:
        return len(self.frame)

    def __getstate__(self) -> dict[str, Any]:
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }  # not what it noted while reading

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["_home"] = os.getpid()

    def name(self, cell: int) -> str:
        """Return a cell's id: zone, side of split cells, size, pixel size, row and column."""
        return str(self.frame.prefix[cell].as_py())

    @property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """Begin and end of the slot, UTC."""
        assert self.source.axis is not None
        return self.source.axis.start[0], self.source.axis.end[0]

    def read(self, cells: Sequence[int]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read some cells in one batch.

        Returns
        -------
        pixels, valid
            Shapes (cell, band, y, x) and (cell, y, x); fill and False where nothing is.
        """
        plan, n = self.source.plan, len(cells)
        pixels = np.full((n, len(plan.bands), self.size, self.size), plan.fill, dtype=plan.dtype)
        valid = np.zeros((n, self.size, self.size), dtype=bool)
        chip = self.chip[np.asarray(cells, dtype=np.int64)]
        at = np.flatnonzero(chip >= 0)
        if len(at):
            self._safe()
            read = self._picked(np.unique(chip[at]))
            place = np.searchsorted(np.unique(chip[at]), chip[at])
            pixels[at], valid[at] = read.values[place, 0], read.valid[place, 0]
        return pixels, valid

    def read_window(
        self, epsg: int, bounds: Sequence[float], span: tuple[np.datetime64, np.datetime64] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read any window of the cells' pixel grid, shapes (band, y, x) and (y, x).

        Parameters
        ----------
        epsg, bounds
            Its CRS; xmin, ymin, xmax, ymax.
        span
            Only records of this half-open range of the slot.
        """
        pixel, source = self.source.plan.resolution, self.source
        box = np.round(np.asarray(bounds, dtype=np.float64) / pixel) * pixel
        height, width = np.rint((box[[3, 2]] - box[[1, 0]]) / pixel).astype(int).tolist()
        if height < 1 or width < 1:
            raise PlanError("window of a dataset", f"{height} x {width} pixels", "at least one each way")
        if span is not None:
            axis = TimeAxis(np.array([span[0]]), np.array([span[1]]), span)
            source = dataclasses.replace(source, axis=axis)
        zero = np.zeros(1, dtype=np.int64)
        frame = Frame(np.array([epsg]), box[None], zero, zero, None, zero, pa.array([""]))
        self._safe()
        try:
            rows = laid(source, self.outlines, frame)
        except NoRecordError:
            fill = np.full((len(source.plan.bands), height, width), source.plan.fill, source.plan.dtype)
            return fill, np.zeros((height, width), dtype=bool)
        given = Geometries(np.array([shapely.box(*box)], dtype=object), pa.table({}))
        values = read(
            RowsToRead(rows, self.outlines, given, None, WindowRequest(None, None, context=self.context))
        )
        return values.pixels[0], values.valid[0]

    def _picked(self, chip: NDArray[np.int64]) -> ChipPixels:
        whole = Hierarchy(None, 0, 0, len(chip), len(chip))
        own = dataclasses.replace(self.job, chips=self.job.chips.take(pa.array(chip)), hierarchies=(whole,))
        shard = Shard(None, 0, 0, 0, len(chip))
        return picked(own, shard, self.context, _Rest(self.job, self._done, chip))

    @cached_property
    def _done(self) -> set[int]:
        """What this process has read since it last began anew: no part of the cells themselves."""
        return set()

    @cached_property
    def _home(self) -> int:
        """The process that these cells were made in, or sent to."""
        return os.getpid()

    @cached_property
    def _is_local(self) -> bool:
        assets = self.job.records[0].table.column("assets").combine_chunks()
        return all(remote.is_local(href) for href in assets.items.field("href").unique().to_pylist() if href)

    def _safe(self) -> None:
        """Refuse to hang: the store's threads stay in the parent of a fork, and wait for nobody."""
        if os.getpid() != self._home and not self._is_local:
            raise ReadError(
                "reading cells in a forked worker", "a process forked from one that may have read already",
                "workers that start on their own", "Say DataLoader(..., multiprocessing_context='spawn').",
            )  # fmt: skip


class _Rest:
    """The cells that a process has still to read: what of their tiles is at hand is kept for them.

    Parameters
    ----------
    job
        Of all cells.
    finished
        Numbers of the chips that have been read; emptied when one of them is read again, since all are then.
    chips
        Those that are read now.
    """

    def __init__(self, job: Job, finished: set[int], chips: NDArray[np.int64]) -> None:
        self._job, self._first = job, job.first_number
        self._now = set((self._first + chips).tolist())
        if not self._now.isdisjoint(finished):
            finished.clear()
        self._finished = finished
        self.number = int(self._first + chips[0])

    @property
    def finished(self) -> AbstractSet[int]:
        return self._finished

    @property
    def kept_bytes(self) -> int:
        return 0

    def meeting(
        self, record: str, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        bounds, fed = self._job.bounds, self._job.chips_of(0, record)
        fed = fed[self._job.epsg[fed] == epsg]
        meets = (bounds[fed, :2] < box[2:]).all(axis=1) & (bounds[fed, 2:] > box[:2]).all(axis=1)
        rest = [n for n in fed[meets].tolist() if n + self._first not in self._finished | self._now]
        return self._first + np.array(rest, dtype=np.int64), bounds[rest]

    def finish(self) -> list[int]:
        self._finished |= self._now
        return sorted(self._now)


@dataclass(frozen=True, slots=True)
class Area:
    """What cells depend on, and nothing else."""

    geometries: Any
    """In lon/lat, in any form; None: the records' footprints."""
    size: int
    """Side of a cell, pixels."""
    resolution: float | None
    """Metres a pixel; None: the source's own."""
    cell_km: float


def cells_of(
    query: Query,
    where: Area,
    bands: tuple[str, ...] | None,
    time: Any,
    context: ReadContext,
) -> Cells:
    """Lay cells over an area; see ``Collection.to_torchgeo_dataset``.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out, before any pixel is read.
    """
    size, resolution = where.size, where.resolution
    wkb = _footprints(query) if where.geometries is None else as_area(where.geometries)
    spec = ChipSpec(size, size, cell_km=where.cell_km, aoi=wkb)
    area = shapely.from_wkb(bytes.fromhex(wkb))
    if time is None or spec_field(query.plan, "time") is not None:
        source = settled(query, bands, resolution, area.bounds)
    else:
        source = settled(query.then(Filter(query.plan, (_until(time),))), bands, resolution, area.bounds)
    source = in_metres(_one_slot(source, query.plan, time), f"cells of {size} pixels")
    frame = candidates(spec, _ground(area), source.plan.resolution, {}, None)
    if not len(frame):
        raise PlanError("cells of the area", "none", "at least one", "Is the area smaller than a pixel?")
    frame = frame.take(np.lexsort((frame.col, frame.row, frame.epsg)))
    frame = dataclasses.replace(frame, index=np.arange(len(frame)))
    found = source_outlines(source)
    rows = laid(source, found, frame)
    _warn_of_scales(source, rows.laid.feeds[0])
    side, square = squares(rows, size)
    chip = np.full(len(frame), -1, dtype=np.int64)
    chip[rows.laid.window] = np.arange(len(rows.laid.window))
    cells = Cells(frame, source, found, size, window_job(rows, found, side, square), chip, context)
    cells._home  # noqa: B018  (noted now: a fork keeps it, a pickle does not)
    return cells


def _warn_of_scales(source: ResolvedSource, feeds: Feeds) -> None:
    """Warn where records whose raw numbers mean different things by scale or offset feed one cell."""
    rules = source.plan.rules
    for at, (band, unit) in enumerate(zip(source.plan.bands, rules.units, strict=True)):
        if unit.scales or rules.kind(at).is_coded:
            continue
        scaling = np.zeros((len(source.member), 2))
        for number, member in enumerate(source.plan.members):
            rows = np.flatnonzero(source.member == number)
            for column, (field, usual) in enumerate((("scale", 1.0), ("offset", 0.0))):
                values = source.records.asset_field(member.bands[at], field).take(pa.array(rows))
                scaling[rows, column] = pc.fill_null(values, usual).to_numpy()
        pairs, code = np.unique(scaling, axis=0, return_inverse=True)
        fed = np.unique(np.stack([feeds.window, code.ravel()[feeds.record]]), axis=1)
        cells, counts = np.unique(fed[0], return_counts=True)
        if np.any(counts > 1):
            shown = ", ".join(f"{scale:g} x DN + {offset:g}" for scale, offset in pairs.tolist())
            warnings.warn(
                f"{int(np.sum(counts > 1)):,} of {len(cells):,} cells of {source.plan.name!r} hold raw numbers of band "
                f"{band!r} by several scales ({shown}): one number means different things there. "
                "Call harmonize() first, which scales each record by its own.",
                MixedScalesWarning,
                stacklevel=user_level(),
            )
            return


def _footprints(query: Query) -> str:
    wkb = [v for m in query.members() for v in m.table.column("geometry").to_pylist() if v is not None]
    return as_area(wkb)


def _ground(area: Any) -> Outlines:
    """Return an area as if it were a record's outline: cells are laid over that alone."""
    one = np.empty(1, dtype=object)
    one[0] = area
    zero = np.zeros(1, dtype=np.int64)
    nothing = np.zeros((1, 2)), np.ones((1, 2), int), np.zeros((1, 6))
    return Outlines(zero, zero + 4326, one, np.zeros((1, 4)), *nothing, ("the area",))


def _one_slot(source: ResolvedSource, plan: Node, time: Any) -> ResolvedSource:
    """Return a source with the one slot that cells show."""
    axis = source.axis
    if axis is None:  # all of its records compete, or what time= left of them
        start, end = (
            source.passes.record_start.min(),
            source.passes.record_end.max() + np.timedelta64(1, "us"),
        )
        axis = TimeAxis(np.array([start]), np.array([end]), (start, end))
        rules = dataclasses.replace(source.plan.rules, pick=spec_field(plan, "pick") or pick_named("newest"))
        source = dataclasses.replace(source, plan=dataclasses.replace(source.plan, rules=rules))
    else:
        low, high = _range(time)
        own = np.ones(len(axis), dtype=bool)
        own &= True if low is None else axis.end > np.datetime64(low)
        own &= True if high is None else axis.start < np.datetime64(high)
        if own.sum() != 1:
            shown = ", ".join(np.datetime_as_string(axis.start[own][:6], unit="D"))
            raise PlanError(
                f"cells of {source.plan.name!r}", f"{own.sum()} slots ({shown})", "one slot",
                "Choose it with time=, a moment or a period inside it.",
            )  # fmt: skip
        axis = TimeAxis(axis.start[own], axis.end[own], axis.span)
    slots = tuple(int(t) for t in axis.start.astype("datetime64[ns]").astype(np.int64))
    return dataclasses.replace(source, axis=axis, plan=dataclasses.replace(source.plan, slots=slots))


def _range(time: Any) -> tuple[str | None, str | None]:
    """Return what ``time=`` says as a half-open range in UTC, without zone."""
    moment = _instant(time)
    if moment is not None:
        return _plain(moment), _plain(moment + pd.Timedelta(1, "us"))
    low, high = half_open(time)
    return (None if low is None else _plain(low)), (None if high is None else _plain(high))


def _plain(moment: Any) -> str:
    return pd.Timestamp(moment).tz_convert("UTC").tz_localize(None).isoformat()


def _instant(time: Any) -> pd.Timestamp | None:
    """Return the moment that ``time=`` names, or None where it names a period."""
    text = isinstance(time, str) and "T" in time and "/" not in time
    if not (text or isinstance(time, dt.datetime | np.datetime64)):
        return None
    try:
        stamp = pd.Timestamp(time)
    except ValueError as error:
        raise PlanError("time=", repr(time), "an ISO 8601 moment or period") from error
    return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")


def _until(time: Any) -> Predicate:
    """Return which records ``time=`` admits: those of a period, or all until a moment."""
    moment = _instant(time)
    if moment is None:
        return ("datetime", "overlaps", half_open(time))
    return ("datetime", "overlaps", (None, (moment + pd.Timedelta(1, "us")).isoformat()))
