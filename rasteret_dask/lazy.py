"""A collection as a lazy, harmonized xarray cube; its bounds are treated as one chip."""

from __future__ import annotations

import functools
import json
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import rioxarray  # noqa: F401  (registers the .rio accessor)
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask import harmonize
from rasteret_dask.bands import Radiometry
from rasteret_dask.cogreader import NATURAL, Kernel
from rasteret_dask.cube import stack
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.feeds import DATA_PICKS, Feeds, covered, enough, pick, slots_of, source_outlines
from rasteret_dask.frame import Frame
from rasteret_dask.grid import northern, transformer
from rasteret_dask.reader import Grid, Window
from rasteret_dask.resolve import ResolvedSource

__all__ = ["harmonized_cube", "native_grid", "radiometry_of"]


def native_grid(
    source: ResolvedSource,
    epsg: int | None,
    bounds: tuple[float, float, float, float] | None,
    bounds_latlon: tuple[float, float, float, float] | None,
) -> tuple[Grid, tuple[int, int]]:
    """Return the grid of a cube and its shape (height, width).

    Explicit ``bounds`` are taken exactly; otherwise the grid is that of the first member's records, so that no
    pixel is shifted.

    Raises
    ------
    GridError
        When the records have several CRSs and none is asked for, or bounds hold no whole number of pixels.
    """
    found = source_outlines(source)
    resolution = source.plan.resolution
    codes = np.unique(source.records.epsg)
    if epsg is None:
        if len(codes) > 1:
            raise GridError(
                f"cube of {source.plan.name!r}", f"records in {', '.join(f'EPSG:{c}' for c in codes)}", "one CRS",
                "Choose one with epsg=, or use cubes() for one cube a zone.",
            )  # fmt: skip
        epsg = int(codes[0])
    if bounds is not None:
        return _exact(epsg, bounds, resolution)
    first = int(np.flatnonzero(source.records.epsg == epsg)[0]) if epsg in codes else None
    corner = (0.0, 0.0)
    if first is not None:
        transform = source.records.level_field(
            source.plan.members[source.member[first]].bands[0], "transform"
        )
        _, _, x, _, _, y = transform[first].as_py()
        corner = (x, y)
    if bounds_latlon is not None:
        box = transformer(4326, epsg).transform_bounds(*bounds_latlon, densify_pts=21)
    else:
        box = _hull(source, found, epsg)
    x0 = corner[0] + np.floor((box[0] - corner[0]) / resolution + 1e-6) * resolution
    y0 = corner[1] + np.ceil((box[3] - corner[1]) / resolution - 1e-6) * resolution
    width = int(np.ceil((box[2] - x0) / resolution - 1e-6))
    height = int(np.ceil((y0 - box[1]) / resolution - 1e-6))
    return Grid(epsg, float(x0), float(y0), resolution, resolution), (height, width)


def _exact(
    epsg: int, bounds: tuple[float, float, float, float], resolution: float
) -> tuple[Grid, tuple[int, int]]:
    if len(bounds) != 4:
        raise GridError("cube(bounds=)", repr(bounds), "(xmin, ymin, xmax, ymax) in the cube's CRS")
    xmin, ymin, xmax, ymax = bounds
    if not (xmin < xmax and ymin < ymax):
        raise GridError("cube(bounds=)", repr(bounds), "xmin < xmax and ymin < ymax")
    width, height = (xmax - xmin) / resolution, (ymax - ymin) / resolution
    if max(abs(width - round(width)), abs(height - round(height))) > 1e-6:
        raise GridError(
            "cube(bounds=)", f"{width:.6g} x {height:.6g} pixels of {resolution:g}", "whole pixels"
        )
    return Grid(epsg, xmin, ymax, resolution, resolution), (round(height), round(width))


def _hull(source: ResolvedSource, found: Any, epsg: int) -> tuple[float, float, float, float]:
    boxes = []
    for row in range(len(source.records)):
        band = source.plan.members[source.member[row]].bands[0]
        level = source.records.asset(row, band).image
        a, _, c, _, e, f = level.transform
        own = int(source.records.epsg[row])
        x, y = sorted((c, c + a * level.width)), sorted((f, f + e * level.height))
        box = (x[0], y[0], x[1], y[1])
        if own != epsg:
            code, shift = northern(own)
            if code == epsg:
                box = (x[0], y[0] + shift, x[1], y[1] + shift)
            else:
                box = transformer(own, epsg).transform_bounds(*box, densify_pts=21)
        boxes.append(box)
    array = np.array(boxes)
    return (*array[:, :2].min(0).tolist(), *array[:, 2:].max(0).tolist())


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
    feeds = _feeds(source, grid, shape, min_coverage)
    rows = np.unique(feeds.record)
    layers = _record_layers(source, rows, _Place(grid, shape, chunks))
    if not layers:
        raise PlanError(f"cube of {source.plan.name!r}", "no record in these bounds", "at least one")
    slots = range(len(source.axis)) if source.axis is not None else np.unique(feeds.slot).tolist()
    steps, times, whens, names = [], [], [], []
    for slot in slots:
        own = feeds.take(feeds.slot == slot)
        step, when, name = _slot(source, own, layers)
        if step is None:
            step = xr.full_like(next(iter(layers.values())).values, _missing(source))
        start = source.passes.start if source.axis is None else source.axis.start
        steps.append(step)
        times.append(start[slot])
        whens.append(when)
        names.append(name)
    cube = xr.concat(steps, dim="time", coords="minimal", compat="override", join="override")
    cube = cube.assign_coords(time=("time", np.array(times, dtype="datetime64[ns]")))
    if source.axis is not None:
        cube = cube.assign_coords(datetime=("time", np.array(whens, dtype="datetime64[ns]")))
    cube = cube.assign_coords(source=("time", np.array(names, dtype=object)))
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
class _Place:
    """Where layers are laid out."""

    grid: Grid
    shape: tuple[int, int]
    chunks: int

    def stack(
        self, source: ResolvedSource, rows: Sequence[int], bands: Sequence[str], dtype: Any, fill: float,
        kernel: Kernel = NATURAL,
    ) -> xr.DataArray:  # fmt: skip
        """Return the stackstac cube of some records; its ``id`` is the record's number."""
        return stack(
            source.records, rows, bands, self.grid, self.shape, np.dtype(dtype), fill, kernel, self.chunks
        )


@dataclass(frozen=True)
class _Layer:
    """One record, lazily."""

    values: xr.DataArray
    """Dims (band, y, x), in the source's units; see ``_missing`` for what stands in invalid pixels."""
    seen: xr.DataArray | None
    """Dims (y, x). True where its quality band sees the ground; None where it has none, or none is asked."""


def _record_layers(source: ResolvedSource, rows: NDArray[Any], place: _Place) -> dict[int, _Layer]:
    """Return the layer of each record that touches the place."""
    plan = source.plan
    result: dict[int, _Layer] = {}
    dtype = _layer_dtype(source) if plan.units == "raw" else np.dtype("float64")
    kernel = Kernel(plan.resampling, "embedding" if plan.units == "embedding" else None)
    for number, member in enumerate(plan.members):
        own = [int(r) for r in rows if source.member[r] == number]
        if not own:
            continue
        bands, fill = list(dict.fromkeys(member.bands)), _missing(source) if plan.units == "raw" else np.nan
        raw = place.stack(source, own, bands, dtype, fill, kernel)
        raw = raw.reindex(band=bands, fill_value=fill) if raw.sizes["band"] < len(bands) else raw
        raw = raw.sel(band=list(member.bands)).assign_coords(band=np.array(plan.bands, dtype=object))
        quality = _quality_layers(source, own, number, place)
        for at, row in enumerate(raw["id"].values.astype(int).tolist()):
            values = _in_units(
                source, raw.isel(time=at, drop=True).drop_vars("id", errors="ignore"), row, number
            )
            seen = None
            if row in quality:
                bad, known = quality[row]
                seen = known & ~bad
                values = values.where(~bad, np.asarray(_missing(source)).astype(values.dtype))
            result[row] = _Layer(values, seen)
    return result


def _in_units(source: ResolvedSource, raw: xr.DataArray, row: int, number: int) -> Any:
    plan = source.plan
    if plan.units == "raw":
        return raw
    if plan.units == "embedding":
        return _unit_length(raw)
    parts = []
    for i, band in enumerate(plan.members[number].bands):
        asset = source.records.asset(row, band)
        rule = Radiometry(asset.scale, asset.offset, asset.rule)
        parts.append(
            xr.apply_ufunc(
                lambda v, rule=rule: harmonize.to_float(v, np.isfinite(v), rule),
                raw.isel(band=[i]),
                dask="parallelized",
                output_dtypes=[np.float32],
            )
        )
    return xr.concat(parts, dim="band")


def _unit_length(values: xr.DataArray) -> Any:
    return xr.apply_ufunc(
        lambda v: harmonize.unit_length(v.astype(np.float32), axis=-1), values.chunk({"band": -1}),
        input_core_dims=[["band"]], output_core_dims=[["band"]], dask="parallelized", output_dtypes=[np.float32],
    ).transpose("band", "y", "x")  # fmt: skip


def _quality_layers(
    source: ResolvedSource, rows: list[int], number: int, place: _Place
) -> dict[int, tuple[xr.DataArray, xr.DataArray]]:
    """Return where each record's quality band says bad, and where it says anything; dims (y, x)."""
    member, mask = source.plan.members[number], source.plan.mask
    if member.quality is None:
        return {}
    kind = str(member.quality_kind)
    quality = place.stack(source, rows, [member.quality], "float64", np.nan)
    bad = xr.apply_ufunc(
        lambda v: harmonize.bad_pixels(np.nan_to_num(v), kind, mask) & np.isfinite(v), quality,
        dask="parallelized", output_dtypes=[bool],
    )  # fmt: skip
    layers = [
        x.isel(band=0, drop=True).drop_vars("id", errors="ignore")
        for x in (bad, quality.notnull())
    ]  # fmt: skip
    ids = quality["id"].values.astype(int).tolist()
    return {
        row: (layers[0].isel(time=n, drop=True), layers[1].isel(time=n, drop=True))
        for n, row in enumerate(ids)
    }


def _layer_dtype(source: ResolvedSource) -> np.dtype[Any]:
    """Return the type of raw layers: the output's, unless its fill may stand for a valid pixel too."""
    plan = source.plan
    nodata = {
        value
        for member in plan.members
        for band in member.bands
        for value in source.records.asset_field(band, "nodata").unique().to_pylist()
    }
    if np.dtype(plan.dtype).kind == "f" or nodata <= {plan.fill}:
        return np.dtype(plan.dtype)
    return np.dtype("float64")


def _missing(source: ResolvedSource) -> float:
    """Return what stands in invalid pixels of layers."""
    if source.plan.units != "raw" or _layer_dtype(source).kind == "f":
        return float("nan")
    return source.plan.fill


def _is_valid(source: ResolvedSource, layer: xr.DataArray) -> xr.DataArray:
    return (
        layer.notnull()
        if layer.dtype.kind == "f"
        else layer != np.asarray(_missing(source)).astype(layer.dtype)
    )


@dataclass(frozen=True)
class _Candidate:
    """One acquisition, mosaicked."""

    values: xr.DataArray
    seen: xr.DataArray
    number: int
    """Of the acquisition, by its start."""
    member: str


def _slot(
    source: ResolvedSource, feeds: Feeds, layers: dict[int, _Layer]
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


def _mosaic(source: ResolvedSource, records: list[int], layers: dict[int, _Layer]) -> _Candidate:
    """Fill the invalid pixels of the nearest record from the others."""
    values = layers[records[0]].values
    for row in records[1:]:
        values = values.where(_is_valid(source, values), layers[row].values)
    seen = [
        _is_valid(source, own.values).isel(band=0, drop=True) if own.seen is None else own.seen
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
        [c.values.where(_is_valid(source, c.values)).astype(dtype) for c in by_start],
        dim="candidate", coords="minimal", compat="override",
    )  # fmt: skip
    made = xr.apply_ufunc(
        lambda v: harmonize.composite(np.moveaxis(v, -1, 0), how), stacked.chunk({"candidate": -1}),
        input_core_dims=[["candidate"]], dask="parallelized", output_dtypes=[dtype],
    )  # fmt: skip
    if source.plan.units == "embedding":
        return _unit_length(made)
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
    keep = {"time", "band", "y", "x", "source", "datetime"}
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


_RULES = {"raw": "raw: none applied", "embedding": "embedding: sign(v) x (|v| / 127.5)^2, then unit length"}


def radiometry_of(source: ResolvedSource, rows: NDArray[Any]) -> list[dict[str, Any]]:
    """Return each distinct (member, band, scale, offset, rule) of some records, and how many of them it applies to."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for number, member in enumerate(source.plan.members):
        own = rows[source.member[rows] == number]
        for name, band in zip(source.plan.bands, member.bands, strict=True):
            fields = [source.records.asset_field(band, f).to_pylist() for f in ("scale", "offset", "rule")]
            for row in own.tolist():
                counted[(member.name, name, band, *(f[row] for f in fields))] += 1
    applied = source.plan.units == "reflectance"
    return [
        {
            "member": m, "band": n, "code": b, "scale": s if applied else None, "offset": o if applied else None,
            "rule": r if applied else _RULES[source.plan.units], "records": count,
        }
        for (m, n, b, s, o, r), count in counted.items()
    ]  # fmt: skip
