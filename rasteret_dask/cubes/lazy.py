# SPDX-License-Identifier: Apache-2.0
"""A collection as a lazy xarray cube; its bounds are treated as one chip."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import rioxarray  # noqa: F401  (registers the .rio accessor)
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.chipping.feeds import Feeds, covered, enough, pick, slots_of, source_outlines
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.crs import spelled
from rasteret_dask.cubes.cube import CubePlace
from rasteret_dask.cubes.slotgraph import SlotGraph, SlotRecords
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import northern
from rasteret_dask.net.signatures import send_to_current
from rasteret_dask.planning.radiometry import radiometry_of
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.reader.kernels import Places, warn_averaged
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.rules.picks import Ranked
from rasteret_dask.table.barehrefs import hosts_of, hrefs_of
from rasteret_dask.table.filelayouts import FileLayouts

__all__ = ["harmonized_cube"]


def harmonized_cube(
    source: ResolvedSource, grid: Grid, shape: tuple[int, int], min_coverage: float, chunks: int
) -> xr.DataArray:
    """Return the lazy cube (time, band, y, x) of a source: what a chip over its bounds would hold.

    Parameters
    ----------
    source
        The source.
    grid, shape
        Where.
    min_coverage
        Slots (or acquisitions) whose records cover less of the bounds are left empty (or out).
    chunks
        Side of a Dask chunk, pixels.
    """
    hosts = hosts_of(source.records.table.schema) or ()
    send_to_current(hrefs_of(source.records.table), hosts)
    feeds = _feeds(source, grid, shape, min_coverage)
    if not len(feeds.record):
        raise PlanError(f"cube of {source.plan.name!r}", "no record in these bounds", "at least one")
    rows = np.unique(feeds.record).astype(np.int64)
    corner = np.tile([grid.x0, grid.y0], (len(rows), 1))
    places = Places(rows, source.member[rows], np.full(len(rows), grid.epsg), corner, (grid.xres, grid.yres))
    warn_averaged(source.plan, FileLayouts(source.records), places)
    numbers = range(len(source.axis)) if source.axis is not None else np.unique(feeds.slot).tolist()
    slots = [_records_of(source, feeds.take(feeds.slot == number)) for number in numbers]
    graph = SlotGraph(source, CubePlace(grid, shape, chunks), slots)
    starts = source.passes.start if source.axis is None else source.axis.start
    y, x = graph.centres
    coords: dict[str, Any] = {
        "time": ("time", starts[list(numbers)].astype("datetime64[ns]")),
        "band": ("band", np.array(source.plan.bands, dtype=object)),
        "y": ("y", y),
        "x": ("x", x),
        "member": ("time", np.array([_members(source, slot) for slot in slots], dtype=object)),
        "units": ("band", np.array(source.plan.units, dtype=object)),
        "band_kind": ("band", np.array([kind.kind or "unknown" for kind in source.plan.kinds], dtype=object)),
    }
    if source.axis is not None:
        whens = np.array([_start(source, slot) for slot in slots], dtype="datetime64[ns]")
        coords["datetime"] = ("time", whens)
    is_whole, ground = np.dtype(source.plan.dtype).kind not in "fc", ("time", "y", "x")
    if source.plan.pick.fills:
        pixels, valid, filled = graph.pixels_valid_filled()
        coords |= {"valid": (ground, valid)} if is_whole else {}
        coords["filled"] = (ground, filled)
    elif is_whole and _is_told_by_fill(source, rows):
        pixels = graph.pixels()
        coords["valid"] = (ground, graph.told_by_fill(pixels))
    elif is_whole:
        pixels, valid, _ = graph.pixels_valid_filled()
        coords["valid"] = (ground, valid)
    else:
        pixels = graph.pixels()
    cube: xr.DataArray = xr.DataArray(pixels, coords, ("time", "band", "y", "x"), source.plan.name)
    transform = grid.transform(Window(0, 0, *shape))
    cube = cube.rio.write_crs(spelled(grid.epsg)).rio.write_transform(transform)
    cube.attrs = _attributes(source, rows)
    return cube


def _feeds(source: ResolvedSource, grid: Grid, shape: tuple[int, int], min_coverage: float) -> Feeds:
    epsg, shift = northern(grid.epsg)
    y0 = grid.y0 + shift
    box = [grid.x0, y0 - shape[0] * grid.yres, grid.x0 + shape[1] * grid.xres, y0]
    zero = np.zeros(1, dtype=np.int64)
    frame = Frame(np.array([epsg]), np.array([box]), zero, zero, None, None, pa.array([""]))
    ground = source_outlines(source)
    feeds = covered(source, ground, frame)
    if source.axis is not None:
        feeds = slots_of(source, feeds, source.axis)
    feeds, _, _ = enough(feeds, frame, ground, min_coverage)
    return pick(source, feeds, frame, ground, source.axis, min_coverage)


def _records_of(source: ResolvedSource, feeds: Feeds) -> SlotRecords:
    """Return the records of one slot, by acquisition."""
    return tuple(
        tuple(int(row) for row in feeds.record[feeds.order == order])
        for order in np.unique(feeds.order).tolist()
    )


def _is_settled(source: ResolvedSource, slot: SlotRecords) -> bool:
    """Tell whether the plan knows which acquisition gives the slot its pixels."""
    return len(slot) == 1 or (len(slot) > 0 and isinstance(source.plan.pick, Ranked))


def _members(source: ResolvedSource, slot: SlotRecords) -> str:
    chosen = slot[:1] if _is_settled(source, slot) else slot
    return "+".join(sorted({source.plan.members[source.member[rows[0]]].name for rows in chosen}))


def _start(source: ResolvedSource, slot: SlotRecords) -> np.datetime64:
    if not _is_settled(source, slot):
        return np.datetime64("NaT", "ns")
    start: np.datetime64 = source.passes.start[source.passes.of_record[slot[0][0]]]
    return start


def _attributes(source: ResolvedSource, rows: NDArray[Any]) -> dict[str, Any]:
    plan = source.plan
    attrs: dict[str, Any] = {"radiometry": json.dumps(radiometry_of(source, rows))}
    if plan.unit:
        attrs["units"] = plan.unit
    if plan.rules.store.scale_factor is not None:
        scale = plan.rules.store.scale_factor
        attrs |= {"scale_factor": scale, "add_offset": 0.0, "_FillValue": int(plan.fill)}
    elif np.dtype(plan.dtype).kind in "iu" and _is_told_by_fill(source, rows):
        attrs["nodata"] = int(plan.fill)
    return attrs


def _is_told_by_fill(source: ResolvedSource, rows: NDArray[Any]) -> bool:
    """Tell whether no valid pixel can hold the fill.

    So it is where values are stored in steps, or where all files call that number nodata and no kernel makes it of
    others. Composites may make any number.
    """
    plan = source.plan
    if plan.rules.store.steps is not None:
        return True
    if plan.rules.composes:
        return False
    assets = [
        source.records.asset(int(row), band)
        for row in rows
        for band in plan.members[source.member[row]].bands
    ]
    if any(asset.nodata is None or asset.nodata != plan.fill for asset in assets):
        return False
    kinds = [plan.rules.kind(band) for band in range(len(plan.bands))]
    if plan.resampling in _AS_STORED or all(kind.kernels is not None for kind in kinds):
        return True
    limits = [np.iinfo(asset.dtype) for asset in assets]
    outermost = all(plan.fill == own.min for own in limits) or all(plan.fill == own.max for own in limits)
    return outermost and plan.resampling in (None, *_BETWEEN)


_AS_STORED = ("nearest", "mode", "overview")
"""Kernels that give numbers that the files hold."""

_BETWEEN = ("bilinear", "average")
"""Kernels whose numbers lie between those of the file."""
