"""rasteret_dask on a job: from a loaded table, planning included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import numpy as np

# What our exits and tasks import when they are first used: everyone's imports come before the clock.
import pyarrow.acero  # noqa: F401
import pyarrow.parquet as pq
import shapely
import stackstac  # noqa: F401
import xarray as xr
from contender import Prepared
from distributed import Client
from jobs import Job
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from pyproj import Transformer

import rasteret_dask as rd
import rasteret_dask.chipset
import rasteret_dask.net.web
import rasteret_dask.reader.kernels
import rasteret_dask.store.outputs
import rasteret_dask.store.run
import rasteret_dask.tasks.jobkernels

MARGIN_M = 20.0
"""An area's boxes are this much smaller than the chips they name, so that none touches a neighbour."""


def read(job: Job) -> Prepared:
    """Prepare ``load``, on Dask's threads."""
    records = collection(job)

    def run() -> xr.Dataset:
        with dask.config.set(scheduler="threads", num_workers=job.threads):
            made = chips(job, records).load()
        assert isinstance(made, xr.Dataset)
        return made

    return Prepared(run, lambda made: _ordered(job, made))


def write(job: Job) -> Prepared:
    """Prepare ``to_zarr`` on a client that is there already."""
    records = collection(job)
    client = Client(
        n_workers=1, threads_per_worker=job.threads, processes=False, dashboard_address=":0", silence_logs=40
    )
    client.submit(sum, (1, 2)).result()

    def run() -> str:
        chips(job, records).to_zarr(job.store, client=client, progress=False)
        return job.store

    return Prepared(run, lambda store: _ordered(job, xr.open_zarr(store, chunks=None)))


def collection(job: Job) -> rd.Collection:
    """Return the job's records, in memory."""
    return rd.as_collection(pq.read_table(job.table), name=job.name.split()[0].lower())


def chips(job: Job, records: rd.Collection) -> rd.Chips:
    """Say the job in our words."""
    warped: dict[str, Any] = {"units": job.units}
    if job.grid == "box":
        warped |= {"resolution": job.resolution, "resampling": job.resampling}
    if job.units == "reflectance":
        warped["dtype"] = "uint16"
    source = records.subset(date_range=job.date_range).harmonize(
        list(job.bands), time=job.slot or None, **warped
    )
    return source.chips(job.chip_px, grid=_geobox(job) if job.grid == "box" else job.grid, aoi=area(job))


def area(job: Job) -> Any:
    """Return the boxes in lon/lat, a little smaller."""
    boxes = shapely.box(*np.array(job.boxes).T).tolist()
    smaller = [shapely.buffer(box, -MARGIN_M, join_style="mitre") for box in boxes]
    return _lonlat(job.epsg, shapely.unary_union(smaller))


def _lonlat(epsg: int, shape: Any) -> Any:
    to = Transformer.from_crs(epsg, 4326, always_xy=True).transform
    return shapely.transform(shape, lambda p: np.stack(to(p[:, 0], p[:, 1]), -1))


def _geobox(job: Job) -> GeoBox:
    x = [box[0] for box in job.boxes] + [box[2] for box in job.boxes]
    y = [box[1] for box in job.boxes] + [box[3] for box in job.boxes]
    side = job.chip_px * job.resolution
    west = job.origin[0] + np.floor((min(x) - job.origin[0]) / side) * side
    north = job.origin[1] - np.floor((job.origin[1] - max(y)) / side) * side
    return GeoBox.from_bbox((west, min(y), max(x), north), f"EPSG:{job.epsg}", resolution=job.resolution)


def _ordered(job: Job, made: xr.Dataset) -> Iterator[NDArray[Any]]:
    """Yield the pixels of each window; chips of one window (one an acquisition) follow each other in time."""
    corners = np.round(made["bounds"].values[:, [0, 3]]).astype(int)
    when = made["datetime"].values[:, 0]
    at: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(when, kind="stable").tolist():
        at.setdefault((int(corners[i, 0]), int(corners[i, 1])), []).append(i)
    for west, _, _, north in job.chips():
        own = at.pop((round(west), round(north)))
        yield np.concatenate([made["pixels"][i].values for i in own])
    if at:
        raise SystemExit(f"{sum(map(len, at.values()))} chips that nobody asked for")
