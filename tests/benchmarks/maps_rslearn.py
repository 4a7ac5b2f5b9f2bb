"""rslearn on a map: a window prepared and materialized, then ``model predict`` with crops that overlap.

Crops are trimmed by half of what they share, which is how its RasterMerger merges; nothing is blended.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import absences  # noqa: F401 - before rslearn, which imports torchvision
import lightning
import numpy as np
import rasterio
import torch
from contender import Prepared
from jobs import MapJob
from maps import score
from peers_rslearn import LAYER
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.dataset.manage import materialize_dataset_windows, prepare_dataset_windows
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.lightning_module import RslearnLightningModule
from rslearn.train.model_context import ModelOutput
from rslearn.train.prediction_writer import RasterMerger, RslearnWriter
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.utils import Projection
from upath import UPath

OUTPUT = "output"


class Trivial(torch.nn.Module):
    """The model as rslearn takes it."""

    def forward(self, context: Any, targets: Any = None) -> ModelOutput:
        """Return the outputs of a batch, shape (y, x) each."""
        pixels = np.stack([one["image"].image[:, 0].numpy() for one in context.inputs])
        return ModelOutput([torch.from_numpy(output[0]) for output in score(pixels)], {})


def predict(job: MapJob, torch_threads: int) -> Prepared:
    """Prepare the three steps that rslearn's users run: prepare, materialize, predict."""
    root = UPath(job.store)
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(_config(job)))
    dataset = Dataset(root)
    west, south, east, north = job.box
    pixel = job.resolution
    window = Window(
        storage=dataset.storage,
        group="default",
        name="area",
        projection=Projection(CRS.from_epsg(job.epsg), pixel, -pixel),
        bounds=(round(west / pixel), round(-north / pixel), round(east / pixel), round(-south / pixel)),
        time_range=(datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)),
    )
    window.save()
    torch.set_num_threads(torch_threads)

    def run() -> Path:
        windows = dataset.load_windows()
        prepare_dataset_windows(dataset, windows)
        materialize_dataset_windows(dataset, windows)
        _predict(job)
        return Path(job.store)

    return Prepared(run, lambda place: iter([_read(place)]))


def _predict(job: MapJob) -> None:
    overlap = job.size_px - job.stride_px
    task = PerPixelRegressionTask()
    split = SplitConfig(crop_size=job.size_px, overlap_pixels=overlap, load_all_crops=True, skip_targets=True)
    data = RslearnDataModule(
        inputs={"image": DataInput("raster", [LAYER], bands=list(job.bands), passthrough=True)},
        task=task, path=job.store, batch_size=job.batch, predict_config=split,
    )  # fmt: skip
    writer = RslearnWriter(OUTPUT, merger=RasterMerger(overlap_pixels=overlap))
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[writer],
    )
    trainer.predict(RslearnLightningModule(Trivial(), task), data, return_predictions=False)


def _config(job: MapJob) -> dict[str, Any]:
    source = {
        "class_path": "peers_rslearn.Scenes",
        "init_args": {"items": job.items, "bands": list(job.bands), "sort_by": "datetime"},
        "query_config": {"space_mode": "INTERSECTS", "max_matches": 1},
        "ingest": False,
    }
    bands = [{"dtype": "uint16", "bands": list(job.bands)}]
    output = {"type": "raster", "band_sets": [{"dtype": "float32", "bands": [OUTPUT]}]}
    return {"layers": {LAYER: {"type": "raster", "band_sets": bands, "data_source": source}, OUTPUT: output}}


def _read(place: Path) -> Any:
    (path,) = (place / "windows" / "default" / "area" / "layers" / OUTPUT).rglob("*.tif")
    with rasterio.open(path) as file:
        return np.asarray(file.read(1))
