# SPDX-License-Identifier: Apache-2.0
"""A folder of GeoTIFFs: rasterio reads what the chips hold, pystac what was said of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyproj
import pystac
import pytest
import rasterio
import shapely
import xarray as xr
from distributed import Client, Scheduler, SpecCluster, Worker
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pystac.validation import stac_validator
from test_polar import ITS_OWN, mosaic, tiles_at

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.exports.filenames import check_clashes, file_name, sample_key
from rasteret_dask.exports.geotiff import (
    Georeference,
    category_names,
    mask_geotiff,
    pixels_geotiff,
    validity_geotiff,
    wants_validity,
)
from rasteret_dask.exports.sheets import MaskSheet, SourceSheet
from rasteret_dask.exports.stacitems import _box, json_value

OF_RUNS = ("_job", "manifest.parquet")
"""What tells of a run: times and processes."""

PLACE = Georeference(32633, (500_000.0, 5_000_000.0, 500_400.0, 5_000_200.0))


def files(folder: Path) -> dict[str, bytes]:
    """Return the files that a reader sees."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in OF_RUNS
    }


def items(folder: Path) -> dict[str, pystac.Item]:
    """Return the Items of a folder by id, each of them valid by the schemas that pystac carries."""
    root = pystac.Collection.from_file(str(folder / "collection.json"))
    validator = stac_validator.JsonSchemaSTACValidator()
    for own in (root, *root.get_children(), *root.get_items(recursive=True)):
        validator.validate_core(own.to_dict(), own.STAC_OBJECT_TYPE, "1.1.0")
    found = list(root.get_items(recursive=True))
    assert all(item.get_collection() is root for item in found)
    return {item.id: item for item in found}


def loaded(chips: rd.Chips | rd.StoredChips, sources: list[str]) -> dict[str, xr.Dataset]:
    """Return the pixels of each source."""
    whole = chips.load()
    if isinstance(whole, xr.Dataset):
        return {sources[0]: whole}
    return {name: whole[name].to_dataset() for name in sources}


def kept(dataset: xr.Dataset) -> xr.Dataset:
    """Return the chips that rules on pixels keep."""
    return dataset.isel(chip=dataset["kept"].values) if "kept" in dataset.coords else dataset


def read(path: str | None) -> tuple[NDArray[Any], NDArray[np.bool_], dict[str, Any]]:
    """Return bands, where each is valid, and what the file says of itself."""
    assert path is not None
    with rasterio.open(path) as file:
        facts = {
            "descriptions": file.descriptions, "scales": file.scales, "units": file.units, "crs": file.crs,
            "bounds": tuple(file.bounds), "transform": file.transform, "tags": file.tags(1), **file.profile,
        }  # fmt: skip
        return file.read(), file.read_masks() != 0, facts


def check(chips: rd.Chips, folder: Path) -> None:
    """Compare every file with what ``load()`` returns, bit for bit."""
    there, sources = items(folder), [plan.name for plan in chips.job.sources]
    for number, (source, dataset) in enumerate(loaded(chips, sources).items()):
        dataset = kept(dataset)
        assert set(there) == set(dataset["chip_id"].values)
        windows = dict(zip(chips.job.chips["chip_id"].to_pylist(), chips.job.windows(number), strict=True))
        for row, chip in enumerate(dataset["chip_id"].values):
            item = there[chip]
            asset = item.assets[source]
            bands, seen, facts = read(asset.get_absolute_href())
            want = dataset["pixels"].values[row]
            np.testing.assert_array_equal(bands.reshape(want.shape), want)
            assert bands.dtype == want.dtype
            valid = dataset["valid"].values[row] if "valid" in dataset else np.isfinite(want).all(axis=1)
            told = seen.reshape(want.shape).all(axis=1)
            if f"{source}_valid" in item.assets:
                told = read(item.assets[f"{source}_valid"].get_absolute_href())[0].astype(bool)
            np.testing.assert_array_equal(told, valid)
            fractions = [slot["valid_fraction"] for slot in asset.extra_fields["slots"]]
            np.testing.assert_allclose(fractions, dataset["valid_fraction"].values[row], atol=1e-6)
            box = tuple(dataset["bounds"].values[row].tolist())
            assert facts["crs"].to_epsg() == dataset["epsg"].values[row]
            np.testing.assert_allclose(facts["bounds"], windows[chip], atol=1e-6)
            assert list(facts["transform"])[:6] == asset.extra_fields["proj:transform"]
            assert [band["name"] for band in asset.extra_fields["bands"]] == list(facts["descriptions"])
            if dataset["split"].values[row]:
                assert item.properties["split"] == dataset["split"].values[row]
                assert Path(asset.get_absolute_href() or "").parent.name == dataset["split"].values[row]
            for name in [str(n) for n in dataset.data_vars if str(n).startswith("mask")]:
                mask, _, place = read(item.assets[name].get_absolute_href())
                np.testing.assert_array_equal(mask[0], dataset[name].values[row])
                assert place["bounds"] == box
            lonlat = pyproj.Transformer.from_crs(facts["crs"], 4326, always_xy=True)
            x, y = lonlat.transform(np.array(box)[[0, 2, 2, 0]], np.array(box)[[1, 1, 3, 3]])
            np.testing.assert_allclose(item.bbox or (), (x.min(), y.min(), x.max(), y.max()), atol=2e-7)
            assert shapely.geometry.shape(item.geometry).exterior.is_ccw


@pytest.fixture
def optical(s2: rd.Collection) -> rd.Chips:
    chips = s2.harmonize(["red", "nir"], time="1MS", mask="clouds", dtype="uint16")
    return chips.chips(32, cell_km=0.96).split(train=0.6, val=0.4, seed=2).sample(12, by="split")


def labels_of(chips: rd.Chips) -> geopandas.GeoDataFrame:
    """Return two polygons over the ground of chips, with a text and a number each."""
    west, south, east, north = chips.to_geopandas().total_bounds
    middle = (west + east) / 2
    shapes = [shapely.box(west, south, middle, north), shapely.box(middle, south, east, (south + north) / 2)]
    return geopandas.GeoDataFrame(
        {"crop": ["maize & co", "rye"], "height": [0.5, 1.5]}, geometry=shapes, crs=4326
    )


def test_rasterio_reads_what_the_chips_hold(optical: rd.Chips, tmp_path: Path) -> None:
    report = optical.to_geotiff(tmp_path, progress=False)
    assert (report.committed, report.kept) == (True, len(optical))
    check(optical, tmp_path)
    chip = optical.table.slice(0, 1).to_pylist()[0]
    _, _, facts = read(str(tmp_path / chip["split"] / f"{chip['chip_id']}_s2.tif"))
    assert facts["descriptions"][:3] == ("2024-04-01 red", "2024-04-01 nir", "2024-05-01 red")
    assert (facts["compress"], facts["scales"][0], facts["nodata"]) == ("deflate", 1e-4, 65535)
    root = json.loads((tmp_path / "collection.json").read_text())
    assert root["rasteret_dask"]["layout"]["sources"]["s2"]["bands"] == ["red", "nir"]
    assert root["extent"]["temporal"]["interval"][0][0].startswith("2024-04-")


def test_several_sources_and_masks_and_wider_windows(s2: rd.Collection, tmp_path: Path) -> None:
    near = s2.harmonize(["red"], time="3MS", resolution=10)
    wide = s2.harmonize(["nir"], time="1MS", resolution=20, meta=["eo:cloud_cover"])
    plain = rd.join(near=near, wide=wide).chips(16, cell_km=0.96).sample(6)
    chips = rd.join(near=near, wide=wide).chips(
        16, cell_km=0.96, context_m={"wide": 640.0}, labels=labels_of(plain), rasterize=["crop", "height"],
    ).sample(6)  # fmt: skip
    chips.to_geotiff(tmp_path, progress=False)
    check(chips, tmp_path)
    item = next(iter(items(tmp_path).values()))
    assert set(item.assets) == {"near", "wide", "mask_crop", "mask_height"}
    classes = item.assets["mask_crop"].extra_fields["classification:classes"]
    assert [one["title"] for one in classes] == ["background", "maize & co", "rye"]
    path = item.assets["mask_crop"].get_absolute_href()
    _, _, facts = read(path)
    assert facts["tags"]["class_1"] == "maize & co"
    with rasterio.open(path) as file:
        assert file.colormap(1)[1][3] == 255
    assert "<Category>maize &amp; co</Category>" in Path(f"{path}.aux.xml").read_text()
    slots = item.assets["wide"].extra_fields["slots"]
    assert len(slots) == 3
    assert set(slots[0]) >= {"datetime", "valid_fraction", "slot", "meta"}


def test_floats_are_not_a_number_where_they_are_invalid(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red", "nir"], time="1MS", mask="clouds").chips(32, cell_km=0.96).sample(4)
    chips.to_geotiff(tmp_path, progress=False)
    check(chips, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["_job", "all"]


def test_acquisitions_without_a_time_axis_are_called_by_their_dates(
    s2: rd.Collection, tmp_path: Path
) -> None:
    chips = s2.harmonize(["scl", "red"], units="raw").chips(16, cell_km=0.96).sample(6)
    chips.to_geotiff(tmp_path, progress=False)
    check(chips, tmp_path)
    item = next(iter(items(tmp_path).values()))
    name = item.assets["s2"].extra_fields["bands"][0]["name"]
    assert name == f"{item.datetime:%Y-%m-%d} scl"


def test_what_filter_pixels_drops_is_counted_and_not_written(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"], time="1MS", mask="clouds", dtype="uint16").chips(32, cell_km=0.96)
    chips = chips.sample(30).filter_pixels(min_valid=0.6)
    report = chips.to_geotiff(tmp_path, progress=False)
    assert 0 < report.kept < report.chips
    assert len(list((tmp_path / "all").glob("*_s2.tif"))) == report.kept
    check(chips, tmp_path)


def saturated(pixels: xr.DataArray) -> xr.DataArray:
    """Give many valid pixels the number that stands for nodata."""
    return pixels.where(pixels < 600, 65535).astype("uint16")


@pytest.mark.parametrize("time", ["1MS", "3MS"])
def test_validity_is_kept_where_nodata_cannot_say_it(s2: rd.Collection, tmp_path: Path, time: str) -> None:
    chips = s2.harmonize(["red"], time=time, mask="clouds", dtype="uint16").map(saturated)
    some = chips.chips(32, cell_km=0.96).sample(8)
    some.to_geotiff(tmp_path, progress=False)
    check(some, tmp_path)
    beside = [item for item in items(tmp_path).values() if "s2_valid" in item.assets]
    assert bool(beside) == (time == "1MS")


def test_a_grown_store_and_two_stores_leave_as_one(s2: rd.Collection, tmp_path: Path) -> None:
    plan = s2.harmonize(["red"], time="3MS", dtype="uint16").chips(16, cell_km=0.96)
    chips = plan.split(train=0.5, val=0.5, seed=2).sample(4, by="split")
    chips.to_geotiff(tmp_path / "whole", progress=False)
    for split in ("train", "val"):
        chips.select(split).to_zarr(tmp_path / split, progress=False)
        chips.select(split).to_zarr(tmp_path / "grown", progress=False, append=True)
    want = files(tmp_path / "whole")
    want.pop("collection.json")
    for name, stores in (("grown", tmp_path / "grown"), ("two", [tmp_path / "train", tmp_path / "val"])):
        rd.open_chips(stores).to_geotiff(tmp_path / f"{name}-tifs", progress=False)
        mine = files(tmp_path / f"{name}-tifs")
        mine.pop("collection.json")
        assert mine == want


def test_a_run_that_could_not_read_goes_on_with_another_on_error(small: rd.Chips, tmp_path: Path) -> None:
    small.to_geotiff(tmp_path, progress=False)
    assert small.to_geotiff(tmp_path, progress=False, on_error="mask").shards_written == 0


def test_no_chips_are_no_folder(small: rd.Chips, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no chip"):
        small.filter("ymax", ">", 1e12).to_geotiff(tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_labels_become_json() -> None:
    values = [
        np.float32("nan"),
        np.datetime64("2024-04-09T10:04:05.250"),
        np.datetime64("NaT"),
        np.int16(3),
        "",
        True,
    ]
    assert [json_value(value) for value in values] == [None, "2024-04-09T10:04:05.25Z", None, 3, "", True]


@settings(max_examples=8)
@given(data=st.data())
def test_whatever_is_missing_a_rerun_gives_the_same_bytes(
    data: st.DataObject, small: rd.Chips, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    # without it, marks of tries are all that tells whose objects these are
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "begun.json")
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=6, unique=True)):
        path.unlink()
    (folder / "collection.json").unlink(missing_ok=True)
    small.to_geotiff(folder, progress=False)
    assert files(folder) == files(whole)


@pytest.fixture(scope="module")
def small(s2: rd.Collection) -> rd.Chips:
    chips = s2.harmonize(["red"], time="3MS", dtype="uint16").chips(16, cell_km=0.96)
    return chips.split(train=0.5, val=0.5, seed=2).sample(4, by="split")


@pytest.fixture(scope="module")
def whole(small: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    small.to_geotiff(folder, progress=False)
    return folder


def test_a_cluster_writes_the_same_bytes(small: rd.Chips, whole: Path, tmp_path: Path) -> None:
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    worker = {"cls": Worker, "options": {"nthreads": 1, "dashboard_address": ":0"}}
    with SpecCluster({0: worker, 1: worker}, scheduler) as cluster, Client(cluster) as client:
        report = small.to_geotiff(tmp_path, client, progress=False)
    assert report.committed
    assert files(tmp_path) == files(whole)


def test_a_store_leaves_as_its_plan_does(small: rd.Chips, whole: Path, tmp_path: Path) -> None:
    small.to_zarr(tmp_path / "store", progress=False)
    stored = rd.open_chips(tmp_path / "store")
    stored.to_geotiff(tmp_path / "tifs", progress=False)
    mine, theirs = files(tmp_path / "tifs"), files(whole)
    for one in (mine, theirs):
        one.pop("collection.json")
    assert mine == theirs
    check(small, tmp_path / "tifs")


def test_stored_chips_leave_with_the_splits_they_have_by_now(small: rd.Chips, tmp_path: Path) -> None:
    small.to_zarr(tmp_path / "store", progress=False)
    again = rd.open_chips(tmp_path / "store").split(by="row", test=small.table["row"].to_pylist()[:3])
    report = again.to_geotiff(tmp_path / "tifs", progress=False)
    assert report.kept == len(again)
    found = {item.id: item.properties["split"] for item in items(tmp_path / "tifs").values()}
    assert found == dict(
        zip(again.table["chip_id"].to_pylist(), again.table["split"].to_pylist(), strict=True)
    )


def test_a_folder_that_holds_something_else_is_refused(small: rd.Chips, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="1 objects of something else"):
        small.to_geotiff(tmp_path, progress=False)
    with pytest.raises(StoreError, match="another plan"):
        small.select("val").to_geotiff(whole, progress=False)
    with pytest.raises(StoreError, match="to_geotiff"):
        small.to_webdataset(whole, progress=False)
    assert small.to_geotiff(whole, progress=False).shards_written == 0


def test_ids_with_any_letters_become_files(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"], time="3MS").chips(16, cell_km=0.96).sample(3)
    points = chips.to_geopandas().representative_point().to_frame("geometry").set_crs(4326)
    points.index = ["a/b c", "größe:1", "x" * 300]
    points["date"] = pa.array([0, 1, None], pa.int64()).to_pandas().to_numpy()
    own = s2.harmonize(["red"], time="3MS").chips(16, at=points)
    own.to_geotiff(tmp_path, progress=False)
    check(own, tmp_path)
    there = items(tmp_path)
    assert any(chip.endswith("a/b c") for chip in there)
    assert all(item.properties["labels"].keys() == {"date"} for item in there.values())


@pytest.mark.parametrize(
    ("place", "grid"), [("the pole", "utm"), ("the antimeridian", "utm"), ("85 N", ITS_OWN)]
)
def test_chips_of_polar_grids_and_of_a_crs_without_a_code(place: str, grid: str, tmp_path: Path) -> None:
    chips = mosaic(tiles_at(tmp_path, place)).chips(32, grid=grid, cell_km=6.4)
    across = chips.table.filter(pa.array([len(wkb) > 100 for wkb in chips.table["geometry"].to_pylist()]))
    ids = [*chips.table["chip_id"].to_pylist()[:5], *across["chip_id"].to_pylist()[:3]]
    some = chips.filter("chip_id", "in", ids)
    some.to_geotiff(tmp_path / "out", progress=False)
    there = items(tmp_path / "out")
    dataset = loaded(some, ["ice"])["ice"]
    for row, chip in enumerate(dataset["chip_id"].values):
        item = there[chip]
        bands, _, facts = read(item.assets["ice"].get_absolute_href())
        np.testing.assert_array_equal(
            bands.reshape(dataset["pixels"].values[row].shape), dataset["pixels"].values[row]
        )
        np.testing.assert_allclose(facts["bounds"], dataset["bounds"].values[row], atol=1e-3)
        code, wkt = item.properties["proj:code"], item.properties.get("proj:wkt2")
        assert (code is None) == (grid == ITS_OWN)
        mine = pyproj.CRS.from_user_input(wkt or code)
        theirs = pyproj.CRS.from_user_input(facts["crs"].to_wkt())
        between = pyproj.Transformer.from_crs(mine, theirs, always_xy=True)
        corner = facts["bounds"][:2]
        np.testing.assert_allclose(between.transform(*corner), corner, atol=1e-3)
        middle = pyproj.Transformer.from_crs(mine, 4326, always_xy=True).transform(
            *(np.array(facts["bounds"])[[0, 2]].mean(), np.array(facts["bounds"])[[1, 3]].mean())
        )
        assert shapely.geometry.shape(item.geometry).buffer(1e-3).contains(shapely.Point(*middle))


def test_names_that_would_clash_are_refused(s2: rd.Collection, tmp_path: Path) -> None:
    one = s2.harmonize(["red"], time="3MS")
    chips = rd.join(image_a=one, IMAGE_A=one).chips(16, cell_km=0.96).sample(2)
    with pytest.raises(PlanError, match="names that differ by more than case"):
        chips.to_geotiff(tmp_path, progress=False)
    with pytest.raises(PlanError, match="both be called"):
        check_clashes("to_geotiff", ["b", "a_b"], ["c", "c_a"])
    check_clashes("to_geotiff", ["b", "a_b"], ["c", "d"])
    with pytest.raises(PlanError, match="two of its sources, masks and their validity called 'mask'"):
        check_clashes("to_geotiff", ["mask", "mask"], [])
    beside = rd.join(s2=one, s2_valid=one).chips(16, cell_km=0.96).sample(2)
    with pytest.raises(PlanError, match="names that differ"):
        beside.to_webdataset(tmp_path, progress=False)
    with pytest.raises(PlanError, match="on_error"):
        one.chips(16, cell_km=0.96).sample(2).to_geotiff(tmp_path, progress=False, on_error="skip")  # type: ignore[arg-type]


@given(st.text(), st.text())
def test_two_ids_never_get_one_name(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) == (one == other)
    assert (sample_key(one) == sample_key(other)) == (one == other)
    assert "." not in sample_key(one)
    assert len(file_name(one)) <= 160


# The files themselves


DTYPES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64",
    "complex64",
)  # fmt: skip


@settings(max_examples=40)
@given(
    st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 300),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_any_array_comes_back(
    dtype: str, times: int, bands: int, height: int, width: int, seed: int, holes: bool
) -> None:
    random = np.random.default_rng(seed)
    pixels = (random.random((times, bands, height, width)) * 250).astype(dtype)
    fill = None if pixels.dtype.kind in "fc" else 0
    valid = random.random((times, height, width)) < 0.7
    if fill is None or holes:  # as the package stores them
        pixels = np.where(valid[:, None], pixels, np.asarray(np.nan if fill is None else fill)).astype(dtype)
    if pixels.dtype.kind == "c" and fill is None:
        valid = ~np.isnan(pixels).any(axis=1)
    sheet = SourceSheet("s", tuple("abcd"[:bands]), dtype, times, fill)
    data = pixels_geotiff(pixels, valid, sheet, PLACE, [""] * times)
    assert data == pixels_geotiff(pixels, valid, sheet, PLACE, [""] * times)
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        found = file.read().reshape(pixels.shape)
        np.testing.assert_array_equal(found.astype(dtype), pixels)
        seen = (file.read_masks() != 0).reshape(pixels.shape).all(axis=1)
        assert tuple(file.bounds) == pytest.approx(PLACE.window, abs=1e-6)
    if wants_validity(pixels, valid, sheet):
        with (
            rasterio.MemoryFile(validity_geotiff(valid, PLACE, [""] * times)) as memory,
            memory.open() as file,
        ):
            seen = file.read().astype(bool)
    np.testing.assert_array_equal(seen, valid)


def test_a_fourth_band_of_bytes_is_no_alpha() -> None:
    sheet = SourceSheet("s", tuple("abcd"), "uint8", 1, 0)
    data = pixels_geotiff(np.ones((1, 4, 9, 9), "uint8"), np.ones((1, 9, 9), bool), sheet, PLACE, [""])
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        assert rasterio.enums.ColorInterp.alpha not in file.colorinterp
        assert rasterio.enums.ColorInterp.red not in file.colorinterp


def test_gdal_reads_the_names_of_classes(tmp_path: Path) -> None:
    sheet = MaskSheet("mask", "uint8", ("", "water", "<wood> & co"))
    (tmp_path / "mask.tif").write_bytes(mask_geotiff(np.eye(9, dtype="uint8"), sheet, PLACE))
    (tmp_path / "mask.tif.aux.xml").write_bytes(category_names(sheet))
    with rasterio.open(tmp_path / "mask.tif") as file:
        assert len({file.colormap(1)[value] for value in range(3)}) == 3
        assert [Path(name).name for name in file.files] == ["mask.tif", "mask.tif.aux.xml"]
        assert file.tags(1)["class_2"] == "<wood> & co"


def test_the_box_of_all_takes_the_short_way_round() -> None:
    boxes = np.array([[179.5, 10.0, -179.9, 11.0], [-179.0, 12.0, -178.0, 13.0], [178.0, 9.0, 179.0, 10.0]])
    assert _box(boxes) == (178.0, 9.0, -178.0, 13.0)
    assert _box(np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 6.0, 3.0]])) == (1.0, 1.0, 6.0, 4.0)
