"""rslearn on a job: a window a chip, prepared and materialized to GeoTIFFs; it runs in an environment that has it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from contender import Prepared
from jobs import Job
from numpy.typing import NDArray
from rasterio.crs import CRS
from rslearn.data_sources.aws_sentinel2_element84 import Sentinel2
from rslearn.dataset import Dataset, Window
from rslearn.dataset.manage import materialize_dataset_windows, prepare_dataset_windows
from rslearn.utils import Projection
from rslearn.utils.stac import StacItem
from upath import UPath

LAYER = "scenes"


class _Items:
    """What rslearn asks of a STAC API, answered from a file: nobody is timed with searches."""

    def __init__(self, path: str) -> None:
        items = json.loads(Path(path).read_text())
        self._items = [(shapely.geometry.shape(item["geometry"]), StacItem.from_dict(item)) for item in items]

    def search(self, *, intersects: dict[str, Any], **_: Any) -> list[StacItem]:
        shape = shapely.geometry.shape(intersects)
        return [item for outline, item in self._items if outline.intersects(shape)]


class Scenes(Sentinel2):  # type: ignore[misc]
    """rslearn's own source of Sentinel-2 COGs, over the items and bands of a job."""

    def __init__(self, items: str, bands: list[str], **options: Any) -> None:
        self.ASSET_BANDS = {band: [band] for band in bands}
        super().__init__(**options)
        self.client = _Items(items)


def windows(job: Job, processes: int) -> Prepared:
    """Prepare the two steps that rslearn's users run, ``dataset prepare`` and ``dataset materialize``."""
    root = UPath(job.store)
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(_config(job)))
    dataset = Dataset(root)
    asked = [_window(job, dataset, n) for n in range(job.count)]
    for window in asked:
        window.save()
    blocks = [asked[n::processes] for n in range(processes)]

    def run() -> Path:
        pool = multiprocessing.get_context("fork").Pool(processes)
        with pool:
            pool.map(_made, [(str(root), [w.name for w in block]) for block in blocks], chunksize=1)
            pool.close()
            pool.join()
        return Path(job.store)

    return Prepared(run, lambda place: (_pixels(job, place, n) for n in range(job.count)))


def _made(work: tuple[str, list[str]]) -> None:
    root, names = work
    dataset = Dataset(UPath(root))
    some = dataset.load_windows(groups=["default"], names=names)
    prepare_dataset_windows(dataset, some)
    materialize_dataset_windows(dataset, some)


def _config(job: Job) -> dict[str, Any]:
    dates = len(job.load_items())
    source = {
        "class_path": "peers_rslearn.Scenes",
        "init_args": {"items": job.items, "bands": list(job.bands), "sort_by": "datetime"},
        "query_config": {"space_mode": "INTERSECTS", "max_matches": dates},
        "ingest": False,
    }
    bands = [{"dtype": job.dtype, "bands": list(job.bands)}]
    return {"layers": {LAYER: {"type": "raster", "band_sets": bands, "data_source": source}}}


def _window(job: Job, dataset: Dataset, number: int) -> Window:
    west, south, east, north = tuple(job.chips())[number]
    pixel = job.resolution
    return Window(
        storage=dataset.storage,
        group="default",
        name=f"chip-{number}",
        projection=Projection(CRS.from_epsg(job.epsg), pixel, -pixel),
        bounds=(round(west / pixel), round(-north / pixel), round(east / pixel), round(-south / pixel)),
        time_range=(datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)),
    )


def _pixels(job: Job, place: Path, number: int) -> NDArray[Any]:
    """Return one chip, shape (time, band, y, x)."""
    folder = place / "windows" / "default" / f"chip-{number}" / "layers"
    return np.stack([_raster(path) for path in _in_order(folder, len(job.load_items()))])


def _in_order(folder: Path, dates: int) -> Iterator[Path]:
    for n in range(dates):
        (path,) = (folder / (f"{LAYER}.{n}" if n else LAYER)).rglob("*.tif")
        yield path


def _raster(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        return np.asarray(file.read())
