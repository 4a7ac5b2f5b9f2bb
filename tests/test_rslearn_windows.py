# SPDX-License-Identifier: Apache-2.0
"""Windows of rslearn: its layout by hand, and where it is installed, by its own reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from test_geotiffs import files, labels_of, loaded

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.exports.filenames import file_name
from rasteret_dask.exports.rslearn import _bands_folder


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    one = s2.harmonize(["red", "nir"], time="1MS", mask="clouds", dtype="uint16")
    two = s2.harmonize(["nir"], time="3MS", resolution=20)
    area = labels_of(one.chips(32, cell_km=0.96).sample(30))
    plain = rd.join(s2=one, wide=two).chips(32, cell_km=0.96, labels=area, rasterize="crop")
    return plain.split(train=0.5, val=0.5, seed=2).sample(3, by="split")


@pytest.fixture(scope="module")
def whole(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    chips.to_rslearn(folder, progress=False)
    return folder


def windows(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    found = {}
    for path in folder.glob("windows/*/*/metadata.json"):
        text = json.loads(path.read_text())
        assert (text["group"], text["name"]) == (path.parent.parent.name, path.parent.name)
        found[text["options"]["chip_id"]] = (path.parent, text)
    return found


def raster(folder: Path, shape: tuple[int, ...]) -> Any:
    """Return a layer's pixels, shape (time, band, y, x), from its bands, whose slots follow each other."""
    (path,) = folder.glob("*/geotiff.tif")
    assert (folder / "completed").exists()
    with rasterio.open(path) as file:
        return file.read().reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1), file.profile


def test_layers_hold_what_the_chips_hold(chips: rd.Chips, whole: Path) -> None:
    there = windows(whole)
    config = json.loads((whole / "config.json").read_text())
    assert config["layers"]["mask"]["band_sets"][0]["class_names"] == [["background", "maize & co", "rye"]]
    for source, dataset in loaded(chips, ["s2", "wide"]).items():
        assert set(there) == set(dataset["chip_id"].values)
        for row, chip in enumerate(dataset["chip_id"].values):
            folder, text = there[chip]
            want = dataset["pixels"].values[row]
            pixels, profile = raster(folder / "layers" / source, want.shape)
            np.testing.assert_array_equal(pixels, want)
            (layer,) = config["layers"][source]["band_sets"]
            assert (layer["dtype"], layer["bands"]) == (profile["dtype"], dataset["band"].values.tolist())
            pixel = text["projection"]["x_resolution"]
            west, north, east, south = (np.array(text["bounds"]) * [1, -1, 1, -1] * pixel).tolist()
            np.testing.assert_allclose([west, south, east, north], dataset["bounds"].values[row])
            assert text["options"]["split"] == text["group"] == dataset["split"].values[row]
            assert file_name(chip) == text["name"]
            (about,) = (folder / "layers" / source).glob("*/metadata.json")
            times = json.loads(about.read_text())["timestamps"]
            assert len(times) == want.shape[0]
            if "mask" in dataset:
                mask, _ = raster(folder / "layers" / "mask", (1, 1, 32, 32))
                np.testing.assert_array_equal(mask[0, 0], dataset["mask"].values[row])


def test_a_rerun_and_a_store_give_the_same_bytes(chips: rd.Chips, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "again")
    (tmp_path / "again" / "dataset.json").unlink()
    (tmp_path / "again" / "config.json").unlink()
    next((tmp_path / "again").glob("windows/*/*/metadata.json")).unlink()
    assert chips.to_rslearn(tmp_path / "again", progress=False).shards_written == 1
    assert files(tmp_path / "again") == files(whole)
    chips.to_zarr(tmp_path / "store", progress=False)
    rd.open_chips(tmp_path / "store").to_rslearn(tmp_path / "stored", progress=False)
    mine, theirs = files(tmp_path / "stored"), files(whole)
    assert mine.keys() == theirs.keys()
    assert [path for path in mine if mine[path] != theirs[path]] == ["dataset.json"]


def test_what_windows_cannot_say_is_refused(s2: rd.Collection, l8: rd.Collection, tmp_path: Path) -> None:
    thermal = l8.harmonize(["red"], time="3MS").chips(16, cell_km=0.96).sample(2)
    with pytest.raises(PlanError, match="a pixel corner at"):  # Landsat's corners lie at 15 m
        thermal.to_rslearn(tmp_path, progress=False)
    one = s2.harmonize(["red"], time="3MS")
    with pytest.raises(PlanError, match="float64"):
        one.map(doubled).chips(16, cell_km=0.96).sample(2).to_rslearn(tmp_path, progress=False)
    wide = rd.join(a=one, b=s2.harmonize(["red"], time="3MS", resolution=20))
    with pytest.raises(PlanError, match="larger than the chips"):
        wide.chips(16, cell_km=0.96, context_m={"b": 640.0}).sample(2).to_rslearn(tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def doubled(pixels: xr.DataArray) -> xr.DataArray:
    return pixels.astype("float64") * 2


@pytest.mark.filterwarnings("ignore")  # its own, of the libraries that it is made of
def test_rslearn_reads_them(chips: rd.Chips, whole: Path) -> None:
    pytest.importorskip("rslearn", reason="rslearn is not installed")
    from rslearn.dataset import Dataset
    from rslearn.utils.raster_format import GeotiffRasterFormat, get_bandset_dirname
    from upath import UPath

    for bands in (["red"], ["red", "nir"], ["a_b"], [f"band{n:02d}" for n in range(20)]):
        assert get_bandset_dirname(bands) == _bands_folder(bands)
    dataset = Dataset(UPath(whole))
    found = {window.options["chip_id"]: window for window in dataset.load_windows()}
    every = loaded(chips, ["s2", "wide"])["s2"]
    assert set(found) == set(every["chip_id"].values)
    for row, chip in enumerate(every["chip_id"].values):
        window = found[chip]
        assert {layer for layer, _ in window.list_completed_layers()} == {"s2", "wide", "mask"}
        array = window.data.read_raster("s2", ["red", "nir"], GeotiffRasterFormat())
        want = every["pixels"].values[row].swapaxes(0, 1)
        np.testing.assert_array_equal(array.array, want)
        assert len(array.timestamps) == 3
        assert array.metadata.nodata_value == 65535
        assert window.time_range[0].year == 2024
