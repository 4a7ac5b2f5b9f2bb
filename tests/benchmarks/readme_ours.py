"""rasteret_dask on the README's job: from a loaded table, or from the items in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import readme_store
import shapely
from contender import Prepared
from jobs import ReadmeJob
from pyproj import Transformer
from usage import Usage, usage

import rasteret_dask as rd

THREADED: dict[str, Any] = {"dashboard_address": ":0", "silence_logs": 40}


def write(job: ReadmeJob) -> Prepared:
    """Prepare the job on threads of this process; in a fresh process its items are not yet read."""
    if job.fresh:
        found = job.load_items()
        return _prepared(job, lambda: _write(job, {n: rd.build_from_stac(found[n], name=n) for n in found}))
    for module in ("rasteret_dask.chipset", "rasteret_dask.store.run", "stackstac", "xarray"):
        import_module(module)  # everyone's imports come before the clock
    records = _collections(job)
    return _prepared(job, lambda: _write(job, records))


def write_on_workers(job: ReadmeJob, workers: int) -> Prepared:
    """Prepare the job on so many worker processes of a thread each, which have imported everything."""
    from distributed import Client

    client = Client(n_workers=workers, threads_per_worker=1, processes=True, **THREADED)
    client.run(import_module, "rasteret_dask.store.run")
    client.submit(sum, (1, 2)).result()
    records = _collections(job)
    prepared = _prepared(job, lambda: _write(job, records, client))

    def others() -> list[Usage]:
        return list(client.run(usage).values())

    return Prepared(prepared.run, prepared.chips, prepared.resampled, others)


def _collections(job: ReadmeJob) -> dict[str, rd.Collection]:
    """Return the records, in memory."""
    return {
        n: rd.as_collection(pq.read_table(f"{job.tables}/{n}.parquet"), name=n) for n in ("s2", "l8", "aef")
    }


def _prepared(job: ReadmeJob, run: Callable[[], Path]) -> Prepared:
    if job.wide:  # its items are those of one ground: nobody else's plain rules know the others
        return Prepared(run, readme_store.everything)
    return Prepared(run, partial(readme_store.aligned, job), partial(readme_store.resampled, job))


def _write(job: ReadmeJob, records: Mapping[str, rd.Collection], client: Any = None) -> Path:
    to_lonlat = Transformer.from_crs(job.epsg, 4326, always_xy=True).transform
    options: dict[str, Any] = {} if job.dtype == "float32" else {"units": "reflectance", "dtype": job.dtype}
    optical = (
        rd.merge(records["s2"], records["l8"])
        .subset(date_range=job.dates, cloud_cover_lt=job.cloud_cover_lt)
        .harmonize(
            list(job.bands), resolution=job.resolution, time="1MS", mask="clouds", pick="least_cloudy",
            fill=job.fill, **options,
        )
    )  # fmt: skip
    made = (
        rd.join(optical=optical, embeddings=records["aef"])
        .chips(
            job.chip_px,
            cell_km=job.cell_km,
            aoi=shapely.transform(shapely.box(*job.area), to_lonlat, interleaved=False),
        )
        .split(train=0.7, val=0.15, test=0.15, seed=42)
    )
    made.select("train").to_zarr(job.store, client=client, progress=False)
    return Path(job.store)
