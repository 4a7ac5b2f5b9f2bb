# SPDX-License-Identifier: Apache-2.0
"""Tars of chips: Python's tarfile and WebDataset read what the chips hold, and the bytes are the same on each run."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pystac.validation import stac_validator
from test_geotiffs import files, kept, labels_of, loaded

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.exports.tarshards import npy_pieces, tar_pieces


def members(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of what all tars of a folder hold."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.mode) == (0, 0, 0, "", 0o644)
                found[info.name] = (tar.extractfile(info) or io.BytesIO()).read()
    return found


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    one = s2.harmonize(["red", "nir"], time="1MS", mask="clouds", dtype="uint16")
    two = s2.harmonize(["nir"], time="3MS", resolution=20)
    area = labels_of(one.chips(32, cell_km=0.96).sample(30))
    plain = rd.join(s2=one, B=two).chips(32, cell_km=0.96, labels=area, rasterize="crop")
    return plain.split(train=0.5, val=0.5, seed=2).sample(5, by="split").filter_pixels(min_valid=0.1)


@pytest.fixture(scope="module")
def whole(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    chips.to_webdataset(folder, progress=False)
    return folder


def test_tars_hold_what_the_chips_hold(chips: rd.Chips, whole: Path) -> None:
    there = members(whole)
    items = [json.loads(data) for name, data in there.items() if name.endswith(".json")]
    validator = stac_validator.JsonSchemaSTACValidator()
    by_id = {item["id"]: item for item in items}
    for source, every in loaded(chips, ["s2", "B"]).items():
        dataset = kept(every)
        assert set(by_id) == set(dataset["chip_id"].values)
        assert dataset.sizes["chip"]
        for row, chip in enumerate(dataset["chip_id"].values):
            item = by_id[chip]
            validator.validate_core(item, pystac.STACObjectType.ITEM, "1.1.0")
            key = chip.replace(".", ",")
            assert item["assets"][source]["href"] == f"{key}.{source.lower()}.npy"
            pixels = np.load(io.BytesIO(there[item["assets"][source]["href"]]))
            np.testing.assert_array_equal(pixels, dataset["pixels"].values[row])
            assert pixels.dtype == dataset["pixels"].dtype
            if "valid" in dataset:
                valid = np.load(io.BytesIO(there[f"{key}.{source}.valid.npy"]))
                np.testing.assert_array_equal(valid, dataset["valid"].values[row])
            if "mask" in dataset:
                mask = np.load(io.BytesIO(there[f"{key}.mask.npy"]))
                np.testing.assert_array_equal(mask, dataset["mask"].values[row])
            assert item["properties"]["split"] == dataset["split"].values[row]


def test_the_index_counts_what_is_there(chips: rd.Chips, whole: Path) -> None:
    root = json.loads((whole / "dataset.json").read_text())
    total = 0
    for split, own in root["splits"].items():
        index = json.loads((whole / own["index"]).read_text())
        assert own["planned"] == 5
        for shard in index["shardlist"]:
            path = whole / shard["url"]
            assert shard["filesize"] == path.stat().st_size
            assert path.name.startswith(f"{split}-")
            with tarfile.open(path) as tar:
                names = [name for name in tar.getnames() if name.endswith(".json")]
            assert shard["nsamples"] == len(names)
            total += shard["nsamples"]
    assert total == sum(1 for name in members(whole) if name.endswith(".json"))
    assert root["rasteret_dask"]["layout"]["sources"]["s2"]["bands"] == ["red", "nir"]


def test_geotiffs_in_tars_are_those_of_a_folder(chips: rd.Chips, tmp_path: Path) -> None:
    chips.to_webdataset(tmp_path / "tars", progress=False, pixels="tif")
    chips.to_geotiff(tmp_path / "tifs", progress=False)
    there = members(tmp_path / "tars")
    tifs = {path.name: path.read_bytes() for path in (tmp_path / "tifs").glob("*/*.tif")}
    assert sorted(data for name, data in there.items() if name.endswith(".tif")) == sorted(tifs.values())
    item = json.loads(next(data for name, data in there.items() if name.endswith(".json")))
    assert {asset["href"] for asset in item["assets"].values()} <= there.keys()
    with rasterio.MemoryFile(there[item["assets"]["s2"]["href"]]) as memory, memory.open() as file:
        assert file.count == 6


def test_a_rerun_gives_the_same_bytes(chips: rd.Chips, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "again")
    for name in ("dataset.json", "_job/begun.json", "train-00000.tar"):
        (tmp_path / "again" / name).unlink()
    assert chips.to_webdataset(tmp_path / "again", progress=False).shards_written == 1
    assert files(tmp_path / "again") == files(whole)
    chips.to_webdataset(tmp_path / "new", progress=False)
    assert files(tmp_path / "new") == files(whole)


def test_a_store_leaves_as_its_plan_does(chips: rd.Chips, whole: Path, tmp_path: Path) -> None:
    chips.to_zarr(tmp_path / "store", progress=False)
    rd.open_chips(tmp_path / "store").to_webdataset(tmp_path / "tars", progress=False)
    assert members(tmp_path / "tars") == members(whole)


def test_wrong_arguments_and_other_folders_are_refused(chips: rd.Chips, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'npy' or 'tif'"):
        chips.to_webdataset(tmp_path / "a", progress=False, pixels="png")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="another plan"):
        chips.to_webdataset(whole, progress=False, pixels="tif")
    (tmp_path / "b").write_text("a file")
    with pytest.raises(StoreError, match="a folder"):
        chips.to_webdataset(tmp_path / "b", progress=False)


def test_webdataset_reads_them(chips: rd.Chips, whole: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    paths = sorted(str(path) for path in whole.glob("*.tar"))
    with warnings.catch_warnings():  # it leaves its files to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
        gc.collect()
    dataset = kept(loaded(chips, ["s2", "B"])["s2"])
    place = {chip: row for row, chip in enumerate(dataset["chip_id"].values)}
    assert len(samples) == dataset.sizes["chip"]
    for sample in samples:
        row = place[sample["json"]["id"]]
        np.testing.assert_array_equal(sample["s2.npy"], dataset["pixels"].values[row])
        np.testing.assert_array_equal(sample["s2.valid.npy"], dataset["valid"].values[row])
        np.testing.assert_array_equal(sample["mask.npy"], dataset["mask"].values[row])
        assert sample["b.npy"].shape == (1, 1, 16, 16)


# The bytes themselves


@given(
    st.lists(
        st.tuples(st.text("ab.", min_size=1, max_size=200), st.binary(max_size=2000)),
        unique_by=lambda p: p[0],
    )
)
def test_tars_are_those_of_tarfile(parts: list[tuple[str, bytes]]) -> None:
    mine = b"".join(map(bytes, tar_pieces((f"k{name}", [data]) for name, data in parts)))
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in parts:
            info = tarfile.TarInfo(f"k{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert mine == theirs.getvalue()


@given(npst.arrays(npst.scalar_dtypes().filter(lambda d: d.kind in "biufc"), npst.array_shapes(max_side=5)))
def test_arrays_are_those_of_numpy(values: Any) -> None:
    mine = b"".join(map(bytes, npy_pieces(values)))
    theirs = io.BytesIO()
    np.save(theirs, values)
    assert mine == theirs.getvalue()
