"""odc-stac and stackstac on the README's job, as an expert writes it: one lazy load a source, all computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import readme_by_hand
import readme_store
from contender import Prepared
from dask.base import compute
from jobs import ReadmeJob
from numpy.typing import NDArray
from peers import GDAL_SETTINGS, one_band_assets, tune
from readme_by_hand import ASSETS, Ground
from readme_plan import sources

Load = Callable[[Ground, Sequence[dict[str, Any]], Sequence[str], str], Any]
"""(ground, items of one sensor, asset keys, kernel) -> lazy pixels, shape (item, key, y, x)."""


def write_odc(job: ReadmeJob, threads: int) -> Prepared:
    """Prepare odc-stac."""
    return _prepared(partial(odc, job, threads), job)


def write_stackstac(job: ReadmeJob, threads: int) -> Prepared:
    """Prepare stackstac."""
    return _prepared(partial(stackstac, job, threads), job)


def _prepared(run: Callable[[], Path], job: ReadmeJob) -> Prepared:
    return Prepared(run, partial(readme_store.aligned, job), partial(readme_store.resampled, job))


def odc(job: ReadmeJob, threads: int) -> Path:
    """Do the whole job with odc-stac."""
    tune()
    import odc.stac
    import pystac
    from odc.geo.geobox import GeoBox

    odc.stac.configure_rio(cloud_defaults=True, **GDAL_SETTINGS)

    def load(ground: Ground, items: Sequence[dict[str, Any]], keys: Sequence[str], kernel: str) -> Any:
        planar = keys[0] not in items[0]["assets"]
        names = [f"data.{n + 1}" for n in range(len(keys))] if planar else list(keys)
        box = GeoBox.from_bbox(ground.bounds, f"EPSG:{job.epsg}", resolution=job.resolution)
        lazy = odc.stac.load(
            [pystac.Item.from_dict(item) for item in items],
            bands=names,
            geobox=box.flipy()
            if planar
            else box,  # embeddings are south-up: read as they lie, nothing is warped
            groupby="id",
            resampling=kernel,
            chunks={"x": ground.shape[1], "y": ground.shape[0]},  # whole bands: no tile is fetched twice
        )
        # odc-stac sorts by time, then by id
        order = sorted(
            range(len(items)), key=lambda n: (items[n]["properties"]["datetime"] or "", items[n]["id"])
        )
        at = [order.index(n) for n in range(len(items))]
        return [[lazy[name].data[n, ::-1] if planar else lazy[name].data[n] for name in names] for n in at]

    return _written(job, threads, load)


def stackstac(job: ReadmeJob, threads: int) -> Path:
    """Do the whole job with stackstac."""
    tune()
    import numpy as np
    import stackstac
    from rasterio.enums import Resampling

    def load(ground: Ground, items: Sequence[dict[str, Any]], keys: Sequence[str], kernel: str) -> Any:
        planar = keys[0] not in items[0]["assets"]
        told = next(iter(items[0]["assets"].values()) if planar else iter([items[0]["assets"][keys[0]]]))
        dtype, nodata = (told["raster:bands"][0][key] for key in ("data_type", "nodata"))
        cube = stackstac.stack(
            one_band_assets(keys, items) if planar else list(items),
            assets=list(keys),
            epsg=job.epsg,
            resolution=job.resolution,
            bounds=ground.bounds,
            snap_bounds=False,
            resampling=Resampling[kernel],
            dtype=np.dtype(dtype),
            fill_value=np.dtype(dtype).type(nodata),
            rescale=False,  # its own rescaling takes 0.1 from items that have no offset any more
            sortby_date=False,
            properties=False,
            band_coords=False,
            chunksize=(1, 1, -1, -1),
        )
        return [list(record) for record in cube.data]

    return _written(job, threads, load)


def _written(job: ReadmeJob, threads: int, load: Load) -> Path:
    """Choose records, read all of them whole, then cut, mask, fill and write the chips."""
    items = job.load_items()
    chips = readme_store.bounds(Path(job.layout))
    plan = sources(job, chips)
    ground = Ground.around(chips, job.resolution)
    feeding = sorted(
        {s for slots in plan for slot in slots for s in slot}, key=lambda s: (s.sensor, s.number)
    )
    wanted: list[Any] = []
    for sensor, keys in ASSETS.items():
        own = [items[sensor][s.number] for s in feeding if s.sensor == sensor]
        *bands, quality = keys
        bands_of = load(ground, own, bands, "bilinear" if sensor == "l8" else "nearest")
        quality_of = load(ground, own, [quality], "nearest")
        wanted += [[*b, *q] for b, q in zip(bands_of, quality_of, strict=True)]
    (vectors,) = load(ground, items["aef"], [f"A{i:02d}" for i in range(64)], "nearest")
    read: tuple[list[list[NDArray[Any]]], list[NDArray[Any]]]
    read = compute(wanted, vectors, scheduler="threads", num_workers=threads)
    by_sensor = sorted(feeding, key=lambda s: list(ASSETS).index(s.sensor))
    layers = dict(zip(by_sensor, read[0], strict=True))
    readme_by_hand.write(job, plan, items, layers, read[1], ground)
    return Path(job.store)
