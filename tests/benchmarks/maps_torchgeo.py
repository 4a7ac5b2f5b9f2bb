"""TorchGeo on a map: RasterDataset, GridGeoSampler, a DataLoader, and a merge by hand into a GeoTIFF.

The files are read from this machine's disk, as TorchGeo's users have them. TorchGeo imports packages of models and of
augmentation, which need not be there: what a data set and a sampler need of them is nothing.
"""

from __future__ import annotations

from typing import Any

import absences  # noqa: F401 - before TorchGeo, which imports torchvision
import numpy as np
import rasterio
import shapely
import torch
from affine import Affine
from contender import Prepared
from jobs import MapJob
from maps import blender, score
from torch.utils.data import DataLoader


def predict(job: MapJob, workers: int, torch_threads: int) -> Prepared:
    """Prepare a data set of the folder, and what is done with it."""
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    class Scene(RasterDataset):  # type: ignore[misc]
        filename_glob = f"{job.bands[0]}.tif"
        filename_regex = r"(?P<band>B\d\d)\.tif"
        separate_files = True
        all_bands = job.bands
        resampling = rasterio.enums.Resampling.nearest

    torch.set_num_threads(torch_threads)
    west, _, _, north = job.box

    def run() -> str:
        scene = Scene(job.folder)
        sampler = GridGeoSampler(scene, job.size_px, job.stride_px, roi=shapely.box(*job.box))
        batches: DataLoader[Any] = DataLoader(
            scene,
            batch_size=job.batch,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_collate(stack_samples),
        )
        blend = blender(job)
        for batch in batches:
            for (x, y), output in zip(batch["corner"], score(batch["image"].numpy()), strict=True):
                blend.add(round((north - y) / job.resolution), round((x - west) / job.resolution), output[0])
        profile = {
            "driver": "GTiff", "height": job.shape[0], "width": job.shape[1], "count": 1, "dtype": "float32",
            "crs": job.epsg, "transform": Affine(job.resolution, 0, west, 0, -job.resolution, north), "tiled": True,
        }  # fmt: skip
        path = f"{job.store}.tif"
        with rasterio.open(path, "w", **profile) as file:
            file.write(blend.map(), 1)
        return path

    return Prepared(run, lambda path: iter([_read(path)]))


def _collate(stack: Any) -> Any:
    """Return a function that makes a batch of samples: images by TorchGeo's own, beside each one's west and north."""

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        corners = [(s["bounds"][0].start, s["bounds"][1].stop) for s in samples]
        return {"image": stack([{"image": s["image"]} for s in samples])["image"], "corner": corners}

    return collate


def _read(path: str) -> Any:
    with rasterio.open(path) as file:
        return np.asarray(file.read(1))
