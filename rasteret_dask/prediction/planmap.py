# SPDX-License-Identifier: Apache-2.0
"""Chips and a model become the plan of a map: what is wrong with them is told before pixels are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from dask._task_spec import DataNode, Task
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import PRESENT
from rasteret_dask.errors import EmptyError
from rasteret_dask.net import clusters
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.meta import TEXT
from rasteret_dask.prediction.blending import Blend
from rasteret_dask.prediction.mapjob import map_job
from rasteret_dask.prediction.maps import MapPlan, checked, gpu_resource
from rasteret_dask.prediction.mapwork import BlockWork
from rasteret_dask.prediction.modelchips import ModelChips
from rasteret_dask.prediction.models import ModelLike, ModelParcel, model_of, parcel_of
from rasteret_dask.prediction.modelsending import root_of
from rasteret_dask.prediction.outputs import ModelOutput, OutputsLike, outputs_of, settled
from rasteret_dask.statistics.measuring import Pass, computed
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks import mapping
from rasteret_dask.tasks.batches import Arrays, SourcePixels
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.words import OnError

__all__ = ["MapOptions", "Trial", "blank_chips", "plan_map", "tried", "tried_on"]

TRIAL_CHIPS = 2
"""Chips of zeros that a model is tried on: of one, an axis of chips that is lost would not show."""


@dataclass(frozen=True, slots=True)
class MapOptions:
    """How a map is made of what a model gives."""

    blend: Blend = "hann"
    batch_size: int = 16
    min_inputs: int = 1
    on_error: OnError = "raise"
    block_px: int | None = None


@dataclass(frozen=True)
class Trial:
    """A model that was tried on chips of zeros."""

    parcel: ModelParcel
    output: ModelOutput
    outputs: tuple[Output, ...]
    """What each source becomes."""


def tried(
    chips: ModelChips, model: ModelLike, outputs: OutputsLike, batch_size: int, client: ClientLike = None
) -> Trial:
    """Try a model on made-up chips, where chips will be read: by a worker of the cluster, or in this process.

    Raises
    ------
    ModelError
        When the model cannot be loaded, raises, or gives something else than ``outputs`` says.
    EmptyError
        When there is no chip.
    """
    job, functions = chips.job, chips.functions
    if not any(h.chips for h in job.hierarchies):
        raise EmptyError("predict", "no chip", "at least one", "Ask for less in filter, select or chips().")
    sources = mapping.outputs_of(job, functions)
    pixels = planned(job, sources, ReadContext(functions)).pixels
    asked = outputs_of(outputs)
    parcel = parcel_of(model_of(model), batch_size, pixels)
    shape, dtype = _answer(parcel, blank_chips(job, sources, TRIAL_CHIPS), client)
    return Trial(parcel, settled(asked, shape, dtype, chips.ground.size, parcel.name), sources)


def tried_on(
    blanks: Arrays,
    pixels: Mapping[str, SourcePixels],
    model: ModelLike,
    outputs: OutputsLike,
    batch_size: int,
    client: ClientLike = None,
) -> tuple[ModelParcel, ModelOutput]:
    """Try a model on made-up chips that are at hand; errors as of :func:`tried`."""
    asked, parcel = outputs_of(outputs), parcel_of(model_of(model), batch_size, pixels)
    shape, dtype = _answer(parcel, blanks, client)
    size = next(iter(pixels.values())).shape[-1]
    return parcel, settled(asked, shape, dtype, size, parcel.name)


def _answer(parcel: ModelParcel, arrays: Arrays, client: ClientLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    clusters.check(client, "predict(client=)")
    blanks = {name: _blank(values) for name, values in arrays.items()}
    with clusters.using(client) as cluster, root_of(parcel, cluster) as (graph, root):
        key = f"trial-{parcel.digest[:16]}"
        graph[key] = Task(key, _trial, root, DataNode(None, blanks))
        look = Pass("trying the model", resource=gpu_resource(cluster, parcel))
        (answer,) = computed(graph, {key: (key,)}, cluster, look)
        return answer  # type: ignore[no-any-return]


_Blank = tuple[tuple[int, ...], NDArray[Any]]


def _blank(values: NDArray[Any]) -> _Blank:
    """Return the shape of an array, and its one value where all are the same: chips of zeros are no large message."""
    first = values.reshape(-1)[:1]
    return values.shape, first if values.dtype.kind in "biuf" and bool((values == first).all()) else values


def _trial(parcel: ModelParcel, blanks: Mapping[str, _Blank]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return parcel.trial(
        {name: np.broadcast_to(values, shape).copy() for name, (shape, values) in blanks.items()}
    )


def blank_chips(job: Job, outputs: Sequence[Output], count: int) -> Arrays:
    """Return made-up chips with the shapes and types of a job's: pixels are 0 and valid."""
    result: Arrays = {}
    for plan, out in zip(job.sources, outputs, strict=True):
        flat, name = (count, out.times), plan.name
        result[name] = np.zeros((*flat, len(out.bands), out.height, out.width), dtype=out.dtype)
        result[f"{name}/valid"] = np.ones((*flat, out.height, out.width), dtype=bool)
        result[f"{name}/datetime"] = np.full(flat, np.datetime64("2000-01-01", "us"))
        if out.present:
            result[f"{name}/{PRESENT}"] = np.ones(flat, dtype=bool)
        for told, kind in out.meta:
            result[f"{name}/{told}"] = (
                np.full(flat, "", dtype=object) if kind == TEXT else np.zeros(flat, dtype=kind)
            )
        for mask, dtype in out.masks:
            result[f"{name}/{mask}"] = np.zeros((count, out.height, out.width), dtype=dtype)
    first = next(h for h in job.hierarchies if h.chips)
    rows = np.full(count, first.start)
    result["chip_id"] = np.array([f"zeros {n}" for n in range(count)], dtype=object)
    result["bbox"] = job.bounds[rows]
    result["epsg"] = job.epsg[rows].astype(np.int32)
    result["split"] = np.array([first.split or ""] * count, dtype=object)
    return result


def plan_map(
    chips: ModelChips,
    model: ModelLike,
    outputs: OutputsLike,
    options: MapOptions,
    client: ClientLike = None,
) -> MapPlan:
    """Return the plan of a map.

    Parameters
    ----------
    chips
        The chips.
    model
        The model.
    outputs
        What its numbers are.
    options
        How the map is made of them.
    client
        Where the model is tried on chips of zeros.

    Raises
    ------
    ModelError
        As :func:`tried`; or when the model gives one answer a chip.
    PlanError
        When options are none, several chips lie at one place, or chips lie beside the map's pixels.
    """
    checked(options.blend, options.batch_size, options.min_inputs)
    return map_of(chips, tried(chips, model, outputs, options.batch_size, client), options)


def map_of(chips: ModelChips, trial: Trial, options: MapOptions) -> MapPlan:
    """Return the plan of a map with a model that was tried; one answer a chip makes pixels that are chips."""
    output = trial.output
    if output.side is None:  # a pixel is as large as a chip
        output = replace(output, side=1)
    job, ground = chips.job, chips.ground
    maps = map_job(
        job,
        trial.outputs,
        output,
        ground.size_m,
        ground.zones,
        (options.block_px, options.batch_size),
    )
    work = BlockWork(
        maps.grids,
        output,
        options.blend,
        options.min_inputs,
        maps.block_px,
        options.on_error,
        job.all_functions,
    )
    return MapPlan(maps, output, trial.outputs, trial.parcel, work, chips.functions, chips.provenance)
