# SPDX-License-Identifier: Apache-2.0
"""TorchGeo and TerraTorch read a folder of GeoTIFFs as it is, where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from test_geotiffs import labels_of, loaded

import rasteret_dask as rd

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries that they are made of


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    one = s2.harmonize(["red", "nir"], time="1MS", dtype="uint16")
    area = labels_of(one.chips(32, cell_km=0.96))
    plain = one.chips(32, cell_km=0.96, labels=area, rasterize="crop")
    return plain.split(train=0.6, val=0.4, seed=2).sample(8, by="split")


@pytest.fixture(scope="module")
def folder(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tifs")
    chips.to_geotiff(place, progress=False)
    return place


def of_split(chips: rd.Chips, split: str) -> xr.Dataset:
    dataset = loaded(chips, ["s2"])["s2"]
    return dataset.isel(chip=dataset["split"].values == split)


def test_torchgeo_reads_images_and_masks(chips: rd.Chips, folder: Path) -> None:
    datasets = pytest.importorskip("torchgeo.datasets", reason="torchgeo is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    want = of_split(chips, "train")

    class Images(datasets.RasterDataset):  # type: ignore[misc,name-defined]
        filename_glob = "*_s2.tif"
        is_image = True

    class Masks(datasets.RasterDataset):  # type: ignore[misc,name-defined]
        filename_glob = "*_mask.tif"
        is_image = False

    both = Images(str(folder / "train")) & Masks(str(folder / "train"))
    assert len(both) == want.sizes["chip"]
    with rasterio.open(next((folder / "train").glob("*_s2.tif"))) as file:
        assert both.crs.to_epsg() == file.crs.to_epsg()
    for row in range(want.sizes["chip"]):
        west, south, east, north = want["bounds"].values[row].tolist()
        sample = both[west:east, south:north]
        pixels = want["pixels"].values[row].reshape(-1, 32, 32)
        assert torch.equal(sample["image"], torch.from_numpy(pixels.astype("float32")))
        np.testing.assert_array_equal(sample["mask"].squeeze().numpy(), want["mask"].values[row])


def test_terratorch_reads_images_and_masks(chips: rd.Chips, folder: Path) -> None:
    terratorch: Any = pytest.importorskip(
        "terratorch.datasets", reason="terratorch is not installed", exc_type=ImportError
    )
    dataset = terratorch.GenericNonGeoSegmentationDataset(
        folder / "train", num_classes=3, image_grep="*_s2.tif", label_grep="*_mask.tif",
        dataset_bands=["red", "nir"], output_bands=["red", "nir"], rgb_indices=[0, 1, 1],
        expand_temporal_dimension=True,
    )  # fmt: skip
    want = of_split(chips, "train")
    place = {chip: row for row, chip in enumerate(want["chip_id"].values)}
    assert len(dataset) == len(place)
    for number in range(len(dataset)):
        sample = dataset[number]
        row = place[Path(sample["filename"]).name.removesuffix("_s2.tif")]
        pixels = np.where(want["valid"].values[row][:, None], want["pixels"].values[row], np.nan)
        np.testing.assert_array_equal(sample["image"].numpy(), pixels.swapaxes(0, 1))
        np.testing.assert_array_equal(sample["mask"].numpy(), want["mask"].values[row])
