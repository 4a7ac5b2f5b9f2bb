"""stackstac, odc-stac and plain rasterio on a job, tuned as their users would."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import dask
import numpy as np
import rasterio
from contender import Prepared
from dask.base import compute
from jobs import Box, Job
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

GDAL_SETTINGS: dict[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "CPL_VSIL_CURL_USE_HEAD": "NO",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "VSI_CACHE": "TRUE",
}
"""What guides to reading COGs over HTTP recommend."""


def stackstac_boxes(job: Job, chunks: list[int], threads: int) -> Prepared:
    """Prepare one cube over all boxes; the chunks of every box are computed together."""
    tune()
    items = job.load_items()

    def run() -> tuple[NDArray[Any], ...]:
        cube, bounds = _cube(job, items, chunks)
        wanted = [cube[(slice(None), slice(None), *_window(job, bounds, box))].data for box in job.boxes]
        return tuple(compute(*wanted, scheduler="threads", num_workers=threads))

    return Prepared(run, lambda boxes: cut_boxes(job, boxes))


def stackstac_chips(job: Job, chunks: list[int], threads: int) -> Prepared:
    """Prepare a lazy cube of which one chip after another is computed, as a loop over training samples does."""
    tune()
    items = job.load_items()

    def run() -> list[NDArray[Any]]:
        cube, bounds = _cube(job, items, chunks)
        with dask.config.set(scheduler="threads", num_workers=threads):
            return [
                cube[(slice(None), slice(None), *_window(job, bounds, chip))].values for chip in job.chips()
            ]

    return Prepared(run, iter)


def odc_boxes(job: Job, chunks: int, threads: int) -> Prepared:
    """Prepare one lazy load over all boxes (``chunks`` > 0), or an eager load a box with a pool of threads."""
    tune()
    import odc.stac
    import pystac
    from odc.geo.geobox import GeoBox

    odc.stac.configure_rio(cloud_defaults=True, **GDAL_SETTINGS)
    items = [pystac.Item.from_dict(item) for item in job.load_items()]
    names = [f"data.{i + 1}" for i in range(len(job.bands))] if job.planar else list(job.bands)
    asked: dict[str, Any] = {
        "bands": names,
        "dtype": job.dtype,
        "resampling": job.resampling,
        "nodata": job.nodata,
    }

    def load(bounds: Box, **how: Any) -> Any:
        box = GeoBox.from_bbox(bounds, f"EPSG:{job.epsg}", resolution=job.resolution)
        return odc.stac.load(items, geobox=box, **asked, **how)

    def run() -> list[Any]:
        if not chunks:
            return [[d.values for d in load(b, pool=threads).data_vars.values()] for b in job.boxes]
        bounds = _around(job)
        whole = load(bounds, chunks={"x": chunks, "y": chunks})
        windows = [_window(job, bounds, box) for box in job.boxes]
        wanted = [[whole[n].data[(slice(None), *window)] for n in names] for window in windows]
        return list(compute(*wanted, scheduler="threads", num_workers=threads))

    return Prepared(run, lambda boxes: cut_boxes(job, [np.stack(box, 1) for box in boxes]))


def rasterio_chips(job: Job) -> Prepared:
    """Prepare the oracle: every chip of every file read by rasterio alone, warped exactly where it must be."""
    tune()
    items = job.load_items()
    kernel = Resampling[job.resampling]

    def run() -> list[NDArray[Any]]:
        chips = list(job.chips())
        size = job.chip_px
        out = np.empty((len(chips), len(items), len(job.bands), size, size), job.dtype)
        for time, item in enumerate(items):
            for band, name in enumerate(job.bands):
                href, index = (item["assets"]["data"]["href"], band + 1) if job.planar else (
                    item["assets"][name]["href"], 1
                )  # fmt: skip
                with rasterio.open(href) as file:
                    for number, (west, _, _, north) in enumerate(chips):
                        to = rasterio.Affine(job.resolution, 0, west, 0, -job.resolution, north)
                        with WarpedVRT(
                            file, crs=f"EPSG:{job.epsg}", transform=to, width=size, height=size,
                            resampling=kernel, tolerance=1e-6, nodata=job.nodata,
                        ) as warped:  # fmt: skip
                            out[number, time, band] = warped.read(index)
        return list(out)

    return Prepared(run, iter)


def cut_boxes(job: Job, boxes: Sequence[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Cut boxes (time, band, y, x) into chips."""
    size = job.chip_px
    for box in boxes:
        for row in range(0, box.shape[2], size):
            for col in range(0, box.shape[3], size):
                yield box[:, :, row : row + size, col : col + size]


def tune() -> None:
    """Set GDAL up before it is imported."""
    os.environ.update(GDAL_SETTINGS, GDAL_CACHEMAX="512")


def _cube(job: Job, items: list[dict[str, Any]], chunks: list[int]) -> tuple[Any, Box]:
    import stackstac

    bounds = _around(job)
    cube = stackstac.stack(
        one_band_assets(job.bands, items) if job.planar else items,
        assets=list(job.bands),
        epsg=job.epsg,
        resolution=job.resolution,
        bounds=bounds,
        snap_bounds=False,
        resampling=Resampling[job.resampling],
        dtype=np.dtype(job.dtype),
        fill_value=np.dtype(job.dtype).type(job.nodata),
        rescale=False,
        properties=False,
        band_coords=False,
        chunksize=tuple(chunks),
    )
    return cube, bounds


def one_band_assets(bands: Sequence[str], items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items with an asset a band, which is all that stackstac reads."""
    made = []
    for item in items:
        asset = item["assets"]["data"]
        own = {
            name: {
                **asset,
                "href": f"vrt:///vsicurl/{asset['href']}?bands={number}",
                "raster:bands": asset["raster:bands"][:1],
                "eo:bands": [{"name": name}],
            }
            for number, name in enumerate(bands, 1)
        }
        made.append({**item, "assets": own})
    return made


def _around(job: Job) -> Box:
    west, south, east, north = zip(*job.boxes, strict=True)
    return min(west), min(south), max(east), max(north)


def _window(job: Job, bounds: Box, box: Box) -> tuple[slice, slice]:
    rows = [round((bounds[3] - y) / job.resolution) for y in (box[3], box[1])]
    cols = [round((x - bounds[0]) / job.resolution) for x in (box[0], box[2])]
    return slice(*rows), slice(*cols)
