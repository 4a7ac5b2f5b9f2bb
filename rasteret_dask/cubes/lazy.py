"""A collection as a lazy, harmonized xarray cube; its bounds are treated as one chip."""

from __future__ import annotations

import functools
import json
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import rioxarray  # noqa: F401  (registers the .rio accessor)
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.chipping.feeds import DATA_PICKS, Feeds, covered, enough, pick, slots_of, source_outlines
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.cubes.recordlayers import (
    CubePlace,
    RecordLayer,
    is_valid,
    missing,
    of_unit_length,
    record_layers,
)
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import northern
from rasteret_dask.net.signatures import send_to_current
from rasteret_dask.planning.radiometry import radiometry_of
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.reader import harmonize
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.table.barehrefs import hosts_of, hrefs_of

__all__ = ["harmonized_cube"]


def harmonized_cube(
    source: ResolvedSource, grid: Grid, shape: tuple[int, int], min_coverage: float, chunks: int
) -> xr.DataArray:
    """Return the lazy cube (time, band, y, x) of a source: scaled, masked, mosaicked, put on its time axis.

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
    rows = np.unique(feeds.record)
    layers = record_layers(source, rows, CubePlace(grid, shape, chunks))
    if not layers:
        raise PlanError(f"cube of {source.plan.name!r}", "no record in these bounds", "at least one")
    slots = range(len(source.axis)) if source.axis is not None else np.unique(feeds.slot).tolist()
    steps, times, whens, names = [], [], [], []
    for slot in slots:
        own = feeds.take(feeds.slot == slot)
        step, when, name = _slot(source, own, layers)
        if step is None:
            step = xr.full_like(next(iter(layers.values())).values, missing(source))
        start = source.passes.start if source.axis is None else source.axis.start
        steps.append(step)
        times.append(start[slot])
        whens.append(when)
        names.append(name)
    cube = xr.concat(steps, dim="time", coords="minimal", compat="override", join="override")
    cube = cube.assign_coords(time=("time", np.array(times, dtype="datetime64[ns]")))
    if source.axis is not None:
        cube = cube.assign_coords(datetime=("time", np.array(whens, dtype="datetime64[ns]")))
    cube = cube.assign_coords(member=("time", np.array(names, dtype=object)))
    return _finished(source, cube.transpose("time", "band", "y", "x"), grid, rows)


def _feeds(source: ResolvedSource, grid: Grid, shape: tuple[int, int], min_coverage: float) -> Feeds:
    epsg, shift = northern(grid.epsg)
    y0 = grid.y0 + shift
    box = [grid.x0, y0 - shape[0] * grid.yres, grid.x0 + shape[1] * grid.xres, y0]
    zero = np.zeros(1, dtype=np.int64)
    frame = Frame(np.array([epsg]), np.array([box]), zero, zero, None, None, pa.array([""]))
    found = source_outlines(source)
    feeds = covered(source, found, frame)
    if source.axis is not None:
        feeds = slots_of(source, feeds, source.axis)
    feeds, _, _ = enough(feeds, frame, found, min_coverage)
    return pick(source, feeds, frame, found, source.axis)


@dataclass(frozen=True)
class _Candidate:
    """One acquisition, mosaicked."""

    values: xr.DataArray
    seen: xr.DataArray
    number: int
    """Of the acquisition, by its start."""
    member: str


def _slot(
    source: ResolvedSource, feeds: Feeds, layers: dict[int, RecordLayer]
) -> tuple[xr.DataArray | None, np.datetime64, str]:
    """Return the layer of one slot, when its picked acquisition starts, and which members it is made of."""
    how = source.plan.pick if source.axis is not None else "first"
    candidates = []
    for order in np.unique(feeds.order).tolist():
        records = [int(r) for r in feeds.record[feeds.order == order] if int(r) in layers]
        if records:
            candidates.append(_mosaic(source, records, layers))
    nothing = np.datetime64("NaT", "ns")
    if not candidates:
        return None, nothing, ""
    first = candidates[0]
    chosen = first.values if how not in DATA_PICKS else _chosen(source, candidates, how)
    if len(candidates) == 1 or how not in DATA_PICKS:
        return chosen, source.passes.start[first.number], first.member
    return chosen, nothing, "+".join(sorted({c.member for c in candidates}))


def _mosaic(source: ResolvedSource, records: list[int], layers: dict[int, RecordLayer]) -> _Candidate:
    """Fill the invalid pixels of the nearest record from the others."""
    values = layers[records[0]].values
    for row in records[1:]:
        values = values.where(is_valid(source, values), layers[row].values)
    seen = [
        is_valid(source, own.values).isel(band=0, drop=True) if own.seen is None else own.seen
        for own in (layers[row] for row in records)
    ]
    first = records[0]
    name = source.plan.members[source.member[first]].name
    return _Candidate(values, functools.reduce(operator.or_, seen), int(source.passes.of_record[first]), name)


def _chosen(source: ResolvedSource, candidates: list[_Candidate], how: str) -> Any:
    if how == "clearest":
        seen = xr.concat([c.seen for c in candidates], dim="candidate", coords="minimal", compat="override")
        best = seen.sum(("y", "x")).argmax("candidate")
        result = candidates[0].values
        for i, candidate in enumerate(candidates[1:], start=1):
            result = xr.where(best == i, candidate.values, result)
        return result
    by_start = sorted(candidates, key=lambda c: c.number)
    dtype = harmonize.composite_dtype(source.plan.dtype)
    stacked = xr.concat(
        [c.values.where(is_valid(source, c.values)).astype(dtype) for c in by_start],
        dim="candidate", coords="minimal", compat="override",
    )  # fmt: skip
    made = xr.apply_ufunc(
        lambda v: harmonize.composite(np.moveaxis(v, -1, 0), how), stacked.chunk({"candidate": -1}),
        input_core_dims=[["candidate"]], dask="parallelized", output_dtypes=[dtype],
    )  # fmt: skip
    if source.plan.units == "embedding":
        return of_unit_length(made)
    return made.round() if source.plan.units == "raw" and np.dtype(source.plan.dtype).kind in "iu" else made


def _stored(values: xr.DataArray, source: ResolvedSource) -> Any:
    """Return a cube in the source's dtype, its fill where invalid."""
    plan = source.plan
    dtype = np.dtype(plan.dtype)
    if plan.units == "reflectance" and dtype.kind in "iu":
        return xr.apply_ufunc(
            lambda v: harmonize.to_dtype(v, plan.dtype, plan.fill)[0], values, dask="parallelized",
            output_dtypes=[dtype],
        )  # fmt: skip
    if values.dtype.kind == "f" and dtype.kind in "iu":
        return values.fillna(plan.fill).astype(dtype)
    return values.astype(dtype)


def _finished(source: ResolvedSource, cube: xr.DataArray, grid: Grid, rows: NDArray[Any]) -> xr.DataArray:
    plan = source.plan
    cube = _stored(cube, source)
    keep = {"time", "band", "y", "x", "member", "datetime"}
    cube = cube.drop_vars([c for c in cube.coords if c not in keep]).rename(plan.name)
    cube = cube.rio.write_crs(f"EPSG:{grid.epsg}").rio.write_transform(
        grid.transform(Window(0, 0, *cube.shape[-2:]))
    )
    attrs: dict[str, Any] = {"units": plan.units, "radiometry": json.dumps(radiometry_of(source, rows))}
    if plan.units == "reflectance" and plan.dtype != "float32":
        scale = 1 / harmonize.DN_PER_REFLECTANCE
        attrs |= {"scale_factor": scale, "add_offset": 0.0, "_FillValue": int(plan.fill)}
    elif not np.isnan(plan.fill):
        attrs["nodata"] = int(plan.fill)
    cube.attrs = attrs
    return cube
