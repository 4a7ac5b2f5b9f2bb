"""A sliding window in NumPy over a whole cube of odc-stac's or stackstac's, written to Zarr by xarray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import stackstac
import xarray as xr
from affine import Affine
from contender import Prepared
from jobs import MapJob
from maps import score, slide
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.stac import load as odc_load
from peers import tune
from pystac import Item


def over_odc(job: MapJob) -> Prepared:
    """Prepare an eager load of the area by odc-stac."""
    return _prepared(job, _by_odc)


def over_stackstac(job: MapJob) -> Prepared:
    """Prepare a cube of the area by stackstac, in chunks of the files' tiles."""
    return _prepared(job, _by_stackstac)


def _prepared(job: MapJob, read: Callable[[MapJob], NDArray[Any]]) -> Prepared:
    tune()

    def run() -> str:
        values = slide(job, read(job), score)
        west, _, _, north = job.box
        y, x = ((np.arange(side) + 0.5) * job.resolution for side in job.shape)
        xr.Dataset({"values": (("y", "x"), values)}, {"y": north - y, "x": west + x}).to_zarr(job.store)
        return job.store

    return Prepared(run, lambda store: iter([xr.open_zarr(store, chunks=None)["values"].values]))


def _by_odc(job: MapJob) -> NDArray[Any]:
    west, _, _, north = job.box
    transform = Affine(job.resolution, 0, west, 0, -job.resolution, north)
    box = GeoBox(job.shape, transform, f"EPSG:{job.epsg}")
    cube = odc_load(
        [Item.from_dict(i) for i in job.load_items()], bands=job.bands, geobox=box, pool=job.threads
    )
    return np.stack([cube[band].values[0] for band in job.bands])


def _by_stackstac(job: MapJob) -> NDArray[Any]:
    cube = stackstac.stack(
        job.load_items(), assets=list(job.bands), epsg=job.epsg, resolution=job.resolution, bounds=job.box,
        dtype="uint16", fill_value=np.uint16(0), rescale=False, chunksize=(1, 1, 1024, 1024),
    )  # fmt: skip
    with dask.config.set(scheduler="threads", num_workers=job.threads):
        return np.asarray(cube[0].values)
