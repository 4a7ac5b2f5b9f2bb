# SPDX-License-Identifier: Apache-2.0
"""A user's functions over a source's pixels: called, and tried on one chip to see what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.context import Functions
from rasteret_dask.tasks.job import Job, Output, Shard

__all__ = ["kept_by", "mapped", "outputs_of"]


def mapped(function: Callable[[xr.DataArray], xr.DataArray], dataset: xr.Dataset) -> xr.Dataset:
    """Put a user's function over a source's pixels; what no longer fits the result is dropped.

    Raises
    ------
    PlanError
        When the result is not a DataArray of the same chips with dims (chip, time, band, y, x).
    """
    before = dataset["pixels"]
    name = getattr(function, "__qualname__", repr(function))
    try:
        after = function(before)
    except Exception as error:  # the user's own: it goes on unchanged, but says where it came from
        error.add_note(f"raised by map({name}) on {before.sizes['chip']} chips")
        raise
    if not isinstance(after, xr.DataArray) or set(after.dims) != set(before.dims):
        found = f"dims {after.dims}" if isinstance(after, xr.DataArray) else type(after).__name__
        raise PlanError(
            f"map({name})", found, f"a DataArray with dims {before.dims}", "Keep all five dimensions."
        )
    after = after.transpose(*before.dims)
    if after.sizes["chip"] != before.sizes["chip"]:
        raise PlanError(
            f"map({name})",
            f"{after.sizes['chip']} chips",
            f"the same {before.sizes['chip']} chips",
            "Use filter.",
        )
    kept = {k: v for k, v in dataset.variables.items() if k != "pixels" and _fits(v, after)}
    coordinates = {k: v for k, v in kept.items() if k in dataset.coords and k != "units"}
    if "band" in after.coords:
        coordinates["band"] = after["band"].variable
    variables = {k: v for k, v in kept.items() if k not in dataset.coords}
    return xr.Dataset({"pixels": after.variable, **variables}, coordinates, dataset.attrs)


def _fits(variable: Any, after: xr.DataArray) -> bool:
    return all(after.sizes.get(d, n) == n for d, n in variable.sizes.items())


def kept_by(function: Callable[[xr.DataArray], Any], chips: xr.DataArray) -> NDArray[np.bool_]:
    """Ask a user's function which chips to keep; shape (chip,).

    Raises
    ------
    PlanError
        When the answer is not one True or False a chip.
    """
    name, n = getattr(function, "__qualname__", repr(function)), chips.sizes["chip"]
    try:
        answer = function(chips)
    except Exception as error:  # the user's own: it goes on unchanged, but says where it came from
        error.add_note(f"raised by filter_pixels({name}) on {n} chips")
        raise
    values = np.asarray(answer)
    if values.shape != (n,) or values.dtype != bool:
        dims = f", dims {answer.dims}" if isinstance(answer, xr.DataArray) else ""
        raise PlanError(
            f"filter_pixels({name})", f"{values.dtype} of shape {values.shape}{dims}",
            f"True or False for each of {n} chips",
            "Reduce the other dimensions, such as (chips > 0).all(('time', 'band', 'y', 'x')).",
        )  # fmt: skip
    return values


def outputs_of(job: Job, functions: Functions) -> tuple[Output, ...]:
    """Return what each source becomes; a user's functions are tried on one chip of zeros."""
    result = []
    for number, plan in enumerate(job.sources):
        output = Output.of(plan, job.size_px[number])
        output = replace(output, masks=tuple((own.name, own.dtype.name) for own in job.labels_on(number)))
        own = job.functions(number)
        rules = [r.function for r in job.pixel_rules if r.function and r.source in (None, plan.name)]
        if own or rules:
            dataset = _blank(job, number)
            for function in own:
                dataset = mapped(functions[function], dataset)
            for function in rules:
                kept_by(functions[function], dataset["pixels"])
            output = _described(dataset, output) if own else output
        result.append(output)
    return tuple(result)


def _blank(job: Job, source: int) -> xr.Dataset:
    plan, size = job.sources[source], job.size_px[source]
    shard = Shard(None, 0, 0, 0, 1)
    chips = pixels.ChipPixels(
        np.zeros((1, plan.times, len(plan.bands), size, size), dtype=plan.dtype),
        np.ones((1, plan.times, size, size), dtype=bool),
        np.full((1, plan.times), np.datetime64("2000-01-01", "us")),
        np.full((1, plan.times), plan.members[0].name, dtype=object),
        np.full((1, plan.times), -1, dtype=np.int64),
        np.zeros(len(plan.bands), dtype=np.int64),
        masked=np.zeros((1, plan.times), dtype=np.float32),
    )
    return pixels.dataset_of(job, shard, source, chips)


def _described(dataset: xr.Dataset, before: Output) -> Output:
    array = dataset["pixels"]
    _, times, bands, height, width = array.shape
    names = array["band"].values.tolist() if "band" in array.coords else [str(i) for i in range(bands)]
    fill = float("nan") if array.dtype.kind == "f" else before.fill if np.isfinite(before.fill) else 0.0
    slots = before.slots if before.slots is not None and len(before.slots) == times else None
    # a function that leaves names and type, a new numbering of classes say, leaves what they are
    alike = (tuple(map(str, names)), array.dtype.name) == (before.bands, before.dtype)
    kinds = before.kinds if alike else ()
    same = (times, height, width) == (before.times, before.height, before.width)
    return Output(
        tuple(str(n) for n in names), array.dtype.name, fill, times, slots, height, width,
        before.valid and same, None, tuple(pair for pair in before.attrs if pair[0] != "units"),
        kinds, tuple(pair for pair in before.masks if pair[0] in dataset), filled=before.filled,
        present=before.present and times == before.times, meta=before.meta if times == before.times else (),
    )  # fmt: skip
