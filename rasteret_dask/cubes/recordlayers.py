"""One record as a lazy layer of a cube: in the source's units, masked, on the cube's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.catalogs.bands import Radiometry
from rasteret_dask.cubes.cube import stack
from rasteret_dask.errors import PlanError
from rasteret_dask.headers.nodata import INEXACT
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.reader import harmonize
from rasteret_dask.reader.cogreader import NATURAL, Kernel
from rasteret_dask.reader.pixelgrid import Grid

__all__ = ["CubePlace", "RecordLayer", "is_valid", "missing", "of_unit_length", "record_layers"]


@dataclass(frozen=True)
class CubePlace:
    """Where layers are laid out."""

    grid: Grid
    shape: tuple[int, int]
    """(height, width), pixels."""
    chunks: int
    """Side of a Dask chunk, pixels."""

    def stack(
        self, source: ResolvedSource, rows: Sequence[int], bands: Sequence[str], dtype: Any, fill: float,
        kernel: Kernel = NATURAL,
    ) -> xr.DataArray:  # fmt: skip
        """Return the stackstac cube of some records; its ``id`` is the record's number."""
        return stack(
            source.records, rows, bands, self.grid, self.shape, np.dtype(dtype), fill, kernel, self.chunks
        )


@dataclass(frozen=True)
class RecordLayer:
    """One record, lazily."""

    values: xr.DataArray
    """Dims (band, y, x), in the source's units; see :func:`missing` for what stands in invalid pixels."""
    seen: xr.DataArray | None
    """Dims (y, x). True where its quality band sees the ground; None where it has none, or none is asked."""


def record_layers(source: ResolvedSource, rows: NDArray[Any], place: CubePlace) -> dict[int, RecordLayer]:
    """Return the layer of each record that touches the place."""
    plan = source.plan
    result: dict[int, RecordLayer] = {}
    dtype = _layer_dtype(source) if plan.units == "raw" else np.dtype("float64")
    kernel = Kernel(plan.resampling, "embedding" if plan.units == "embedding" else None)
    for number, member in enumerate(plan.members):
        own = [int(r) for r in rows if source.member[r] == number]
        if not own:
            continue
        bands, fill = list(dict.fromkeys(member.bands)), missing(source) if plan.units == "raw" else np.nan
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
                values = values.where(~bad, np.asarray(missing(source)).astype(values.dtype))
            result[row] = RecordLayer(values, seen)
    return result


def _in_units(source: ResolvedSource, raw: xr.DataArray, row: int, number: int) -> Any:
    plan = source.plan
    if plan.units == "raw":
        return raw
    if plan.units == "embedding":
        return of_unit_length(raw)
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


def _quality_layers(
    source: ResolvedSource, rows: list[int], number: int, place: CubePlace
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


def of_unit_length(values: xr.DataArray) -> Any:
    """Return vectors along ``band`` scaled to length 1; see :func:`rasteret_dask.reader.harmonize.unit_length`."""
    return xr.apply_ufunc(
        lambda v: harmonize.unit_length(v.astype(np.float32), axis=-1), values.chunk({"band": -1}),
        input_core_dims=[["band"]], output_core_dims=[["band"]], dask="parallelized", output_dtypes=[np.float32],
    ).transpose("band", "y", "x")  # fmt: skip


def _layer_dtype(source: ResolvedSource) -> np.dtype[Any]:
    """Return the type of raw layers: the output's, unless its fill may stand for a valid pixel too."""
    plan = source.plan
    nodata = {
        value for member in plan.members for band in member.bands for value in source.records.nodata_of(band)
    }
    if np.dtype(plan.dtype).kind in "fc" or nodata <= {plan.fill}:
        return np.dtype(plan.dtype)
    if plan.dtype in INEXACT:
        raise PlanError(
            f"cube of {plan.name!r}",
            f"pixels of {plan.dtype}, of which {plan.fill} may be one, or a gap",
            "one nodata for all bands and records, or numbers that float64 holds",
            "Take chips(...).load(), which keeps where pixels are valid apart.",
        )
    return np.dtype("float64")


def missing(source: ResolvedSource) -> float:
    """Return what stands in invalid pixels of layers."""
    if source.plan.units != "raw" or _layer_dtype(source).kind in "fc":
        return float("nan")
    return source.plan.fill


def is_valid(source: ResolvedSource, layer: xr.DataArray) -> xr.DataArray:
    """Return where a layer holds something, of the layer's shape."""
    return (
        layer.notnull()
        if layer.dtype.kind in "fc"
        else layer != np.asarray(missing(source)).astype(layer.dtype)
    )
