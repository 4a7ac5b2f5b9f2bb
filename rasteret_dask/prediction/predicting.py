# SPDX-License-Identifier: Apache-2.0
"""What a model says of chips goes where it was asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from rasteret_dask.errors import EmptyError, PlanError
from rasteret_dask.net import clusters, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.prediction.cogtiles import CogTiles
from rasteret_dask.prediction.mapfiles import write_cogs, write_tiles
from rasteret_dask.prediction.maps import checked
from rasteret_dask.prediction.mapstore import MapZarr
from rasteret_dask.prediction.modelchips import ModelChips
from rasteret_dask.prediction.models import ModelLike
from rasteret_dask.prediction.outputs import OutputsLike
from rasteret_dask.prediction.planmap import TRIAL_CHIPS, MapOptions, map_of, tried, tried_on
from rasteret_dask.prediction.storedjob import blank_stored
from rasteret_dask.prediction.targets import Target, VectorTable, target_of
from rasteret_dask.prediction.vectors import stored_plan, vector_plan
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.stored import Stored

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["embedded", "predicted", "stored_answers"]


def predicted(
    chips: ModelChips,
    model: ModelLike,
    outputs: OutputsLike,
    options: MapOptions,
    to: Target | None,
    client: ClientLike,
    progress: bool,
    bounds: Bounds,
) -> JobReport | xr.Dataset | xr.DataTree:
    """Run a model over chips: see :meth:`Chips.predict`."""
    checked(options.blend, options.batch_size, options.min_inputs)
    check_kept(to, "predict", bounds)
    target = None if to is None else target_of(to)
    trial = tried(chips, model, outputs, options.batch_size, client)
    if isinstance(target, VectorTable):
        table = vector_plan(chips, trial.parcel, trial.output, trial.outputs, options.on_error)
        return table.to_parquet(Place.of(target.path).url, client, progress, bounds)
    if isinstance(target, MapZarr):
        options = replace(options, block_px=target.block_px)
    elif isinstance(target, CogTiles):
        options = replace(options, block_px=target.tile_px)
    plan = map_of(chips, trial, options)
    match target:
        case None:
            return plan.load(client, progress)
        case MapZarr():
            url = Place.of(target.store).folder("a folder, or nothing yet", "Choose another place.")
            return plan.to_zarr(url, client, progress, bounds, target.multiscales)
        case CogTiles():
            return write_tiles(plan, target, client, progress, bounds)
        case _:
            return write_cogs(plan, target.path, client, progress, bounds)


def check_kept(to: object, caller: str, bounds: Bounds) -> None:
    """Raise PlanError where a run has limits, and what it does within them would be lost."""
    if to is None and bounds.limits:
        raise PlanError(
            f"{caller}(to=None, limits=)", "limits of a run that keeps nothing", "a place for what is done by then",
            "Give to=: a rerun then does the rest.",
        )  # fmt: skip


def embedded(
    chips: ModelChips,
    model: ModelLike,
    options: MapOptions,
    to: str | os.PathLike[str] | None,
    client: ClientLike,
    progress: bool,
    bounds: Bounds,
) -> JobReport | pa.Table:
    """Run a model with one vector a chip: see :meth:`Chips.embed`."""
    checked(options.blend, options.batch_size, options.min_inputs)
    check_kept(to, "embed", bounds)
    target = None if to is None else target_of(to)
    if not isinstance(target, VectorTable | None):
        raise PlanError(
            "embed(to=)", repr(to), "a path that ends in .parquet",
            "A map whose pixels are vectors is predict(model, 'values', to='vectors.tif').",
        )  # fmt: skip
    trial = tried(chips, model, "values", options.batch_size, client)
    table = vector_plan(chips, trial.parcel, trial.output, trial.outputs, options.on_error, is_vector=True)
    if target is None:
        return table.load(client, progress)
    return table.to_parquet(Place.of(target.path).url, client, progress, bounds)


def stored_answers(
    stored: Stored,
    model: ModelLike,
    outputs: OutputsLike,
    batch_size: int,
    to: str | os.PathLike[str] | None,
    client: ClientLike,
    progress: bool,
    bounds: Bounds,
    is_vector: bool,
) -> JobReport | pa.Table:
    """Run a model with one answer a chip over stored chips: see :meth:`StoredChips.predict`."""
    caller = "embed" if is_vector else "predict"
    checked("hann", batch_size, 1)
    check_kept(to, caller, bounds)
    target = None if to is None else target_of(to)
    if not isinstance(target, VectorTable | None):
        raise PlanError(
            f"{caller}(to=)", repr(to), "a path that ends in .parquet: of stored chips, models give a row a chip",
            "A map is made of planned chips that cover the area: chips(cover=True).predict(model, to='map.zarr').",
        )  # fmt: skip
    if not len(stored.rows):
        raise EmptyError(caller, "no chip", "at least one", "Ask for less in filter or select.")
    pixels = stored.map.pixels
    with clusters.using(client) as cluster:
        signatures.send_place(cluster, *stored.places)
        blanks = blank_stored(stored, TRIAL_CHIPS)
        parcel, output = tried_on(blanks, pixels, model, outputs, batch_size, cluster)
        table = stored_plan(stored, parcel, output, is_vector)
        if target is None:
            return table.load(cluster, progress)
        return table.to_parquet(Place.of(target.path).url, cluster, progress, bounds)
