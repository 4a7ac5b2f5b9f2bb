"""rasteret_dask on a map: from a loaded table, planning included, on threads of this process.

What is imported late is imported here: the clock of every contender begins behind its imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import stackstac.prepare  # noqa: F401
import xarray as xr
import zarr  # noqa: F401
from affine import Affine
from contender import Prepared
from jobs import MapJob
from maps import score
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

import rasteret_dask as rd
import rasteret_dask.chipset
import rasteret_dask.prediction.predicting
import rasteret_dask.store.run
import rasteret_dask.streams.stream
import rasteret_dask.tasks.jobkernels


def predict(job: MapJob) -> Prepared:
    """Prepare ``chips.predict`` of the model."""
    return _mapped(job, score)


def copy(job: MapJob) -> Prepared:
    """Prepare ``chips.predict`` of a model that gives back its bands."""
    return _mapped(job, _as_they_are)


def first(job: MapJob) -> Prepared:
    """Prepare ``chips.predict`` of a model that gives back its first band."""
    return _mapped(job, _first)


def write(job: MapJob) -> Prepared:
    """Prepare ``to_zarr`` of chips that share no ground."""
    records = _records(job)

    def run() -> str:
        _chips(job, records, job.size_px).to_zarr(job.store, progress=False)
        return job.store

    return Prepared(run, lambda store: iter([np.zeros(1)]))


def _mapped(job: MapJob, model: Callable[[NDArray[Any]], NDArray[Any]]) -> Prepared:
    records = _records(job)

    def run() -> str:
        chips = _chips(job, records, job.stride_px)
        chips.predict(
            rd.Model(model, version="1"), "values", blend=job.blend, batch_size=job.batch, to=job.store, progress=False
        )  # fmt: skip
        return job.store

    return Prepared(run, lambda store: iter([_read(store)]))


def _first(pixels: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(pixels[:, :1], np.float32)


def _as_they_are(pixels: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(pixels, np.float32)


def _records(job: MapJob) -> rd.Collection:
    return rd.as_collection(pq.read_table(job.table), name="map")


def _chips(job: MapJob, records: rd.Collection, stride: int) -> rd.Chips:
    west, _, _, north = job.box
    box = GeoBox(job.shape, Affine(job.resolution, 0, west, 0, -job.resolution, north), f"EPSG:{job.epsg}")
    source = records.harmonize(list(job.bands), units="raw")
    return source.chips(job.size_px, stride=stride, grid=box, cover=True)


def _read(store: str) -> NDArray[np.float32]:
    values = xr.open_zarr(store, chunks=None)["values"].values
    return np.asarray(values[0] if values.ndim == 3 else values)
