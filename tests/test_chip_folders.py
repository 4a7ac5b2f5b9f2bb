"""Folders of GeoTIFFs that are chips: pixels, masks, splits and columns, file by file as rasterio reads them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from geopandas import GeoDataFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.transform import Affine
from shapely import box

import rasteret_dask as rd

SIDE = 16
SINUSOIDAL = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"

PLACES: dict[str, tuple[float, float, float, float]] = {
    "EPSG:32633": (500_000.0, 5_500_000.0, 10.0, 10.0),
    "EPSG:32733": (400_003.5, 7_000_005.0, 10.0, 10.0),
    "EPSG:4326": (15.0, 50.0, 8.983e-5, 9.1e-5),
    SINUSOIDAL: (1_111_950.5, 5_559_752.6, 463.3127165, 463.3127165),
}
"""CRS -> the first file's corner, and its pixel."""


def write(path: Path, pixels: NDArray[Any], crs: str | None, transform: Affine | None, **more: Any) -> None:
    """Write pixels, shape (band, y, x)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=bands, dtype=pixels.dtype, crs=crs,
            transform=transform, **more,
        ) as file,
    ):  # fmt: skip
        file.write(pixels)


def corner(crs: str, number: int, stretch: float = 0.0) -> Affine:
    """Return where the n-th file lies: apart from the others, its pixels as large or a little larger."""
    x, y, wide, high = PLACES[crs]
    wide, high = wide * (1 + stretch * number), high * (1 + stretch * number)
    return Affine(wide, 0.0, x + 3.3 * number * SIDE * wide, 0.0, -high, y - 1.7 * number * SIDE * high)


def landcover(
    root: Path, crs: str = "EPSG:32633", names: tuple[str, ...] = ("train/a", "train/b", "val/a")
) -> Path:
    """Write images and masks, a folder a split, as data sets of land cover are laid out."""
    random = np.random.default_rng(7)
    for number, name in enumerate(names):
        split, chip = name.split("/")
        image = random.integers(1, 4000, (3, SIDE, SIDE)).astype("uint16")
        mask = random.integers(0, 4, (1, SIDE, SIDE)).astype("uint8")
        write(root / split / "images" / f"{chip}.tif", image, crs, corner(crs, number))
        write(root / split / "masks" / f"{chip}.tif", mask, crs, corner(crs, number))
    return root


def as_read(root: Path, **more: Any) -> rd.Chips:
    """Return the chips of :func:`landcover`."""
    return rd.read_chips(root, images="*/images/*.tif", masks="*/masks/*.tif", **more)


def rows(chips: rd.Chips, names: tuple[str, ...] = ("pixels", "valid", "mask")) -> dict[str, dict[str, Any]]:
    """Return chip -> its arrays and its split."""
    data: Any = chips.load()
    return {
        str(chip): {
            "split": str(data["split"].values[at]),
            **{name: data[name].values[at] for name in names if name in data},
        }
        for at, chip in enumerate(data["chip_id"].values)
    }


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_chips_are_their_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("drawn")
    crs = data.draw(st.sampled_from(sorted(PLACES)))
    dtype = data.draw(st.sampled_from(["uint8", "int16", "uint16", "float32"]))
    bands, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    stretch = data.draw(st.sampled_from([0.0, 0.01]))
    nodata = data.draw(st.sampled_from([None, 0, 7]))
    masked = data.draw(st.booleans())
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels, masks = {}, {}
    for number in range(count):
        split = "train" if number % 2 else "test"
        pixels[f"{split}/c{number}"] = random.integers(0, 12, (bands, SIDE, SIDE)).astype(dtype)
        masks[f"{split}/c{number}"] = random.integers(0, 5, (1, SIDE, SIDE)).astype("int16")
        place = corner(crs, number, stretch)
        write(root / split / f"c{number}_image.tif", pixels[f"{split}/c{number}"], crs, place, nodata=nodata)
        if masked:
            write(root / split / f"c{number}_mask.tif", masks[f"{split}/c{number}"], crs, place, nodata=2)
    chips = rd.read_chips(
        root, images="**/*_image.tif", masks="**/*_mask.tif" if masked else None, kinds={"band_1": "class"} if
        bands > 1 else None,
    )  # fmt: skip
    found = rows(chips)
    assert found.keys() == pixels.keys()
    for chip, own in found.items():
        with rasterio.open(next(root.glob(f"{chip}_image.tif"))) as file:
            stored, valid = file.read(), file.read_masks().all(axis=0)
        assert own["split"] == chip.split("/")[0]
        if "valid" in own:
            np.testing.assert_array_equal(own["valid"][0], valid)
        shown = valid if dtype != "float32" else ~np.isnan(own["pixels"][0]).any(axis=0)
        np.testing.assert_array_equal(shown, valid)
        np.testing.assert_array_equal(own["pixels"][0][:, valid], stored[:, valid])
        if masked:
            np.testing.assert_array_equal(own["mask"], masks[chip][0])
            assert own["mask"].dtype == np.int16


def test_nothing_is_resampled_and_the_ground_is_the_files(tmp_path: Path) -> None:
    chips = as_read(landcover(tmp_path, "EPSG:4326"))
    plan = chips.explain()
    assert plan["pixels"]["images"]["resampled"] == 0
    assert chips.table["epsg"].to_pylist() == [4326] * 3
    for row in chips.table.to_pylist():
        split, chip = row["chip_id"].split("/")
        with rasterio.open(tmp_path / split / "images" / f"{chip}.tif") as file:
            np.testing.assert_allclose([row[n] for n in ("xmin", "ymin", "xmax", "ymax")], tuple(file.bounds))


def test_store_stream_and_arrays_are_the_same(tmp_path: Path) -> None:
    chips = as_read(landcover(tmp_path / "data"), classes=["none", "water", "wood", "town"])
    loaded = rows(chips)
    chips.to_zarr(tmp_path / "store", progress=False)
    stored = rd.open_chips(tmp_path / "store")
    for split in ("train", "val"):
        for batch in (
            next(iter(chips.select(split).stream(batch_size=8))),
            next(iter(stored.select(split).stream(batch_size=8))),
        ):
            for at, chip in enumerate(batch["chip_id"]):
                np.testing.assert_array_equal(batch["images"][at], loaded[str(chip)]["pixels"])
                np.testing.assert_array_equal(batch["images/mask"][at], loaded[str(chip)]["mask"])
    assert chips.load()["mask"].attrs["classes"] == ["", "water", "wood", "town"]
    assert rd.verify(tmp_path / "store", sources=2).ok


def test_a_saved_plan_is_the_same_chips(tmp_path: Path) -> None:
    chips = as_read(landcover(tmp_path / "data"))
    chips.to_zarr(tmp_path / "store", progress=False)
    again = as_read(tmp_path / "data")
    assert again.job.digest == chips.job.digest
    assert len(chips.select("val")) == 1
    assert "rd.read_chips" not in repr(chips)
    assert 'grid="files"' in repr(chips)


@pytest.mark.parametrize("crs", sorted(PLACES))
def test_audit_finds_an_overlap(tmp_path: Path, crs: str) -> None:
    root = landcover(tmp_path, crs)
    assert as_read(root).audit().ok
    image = np.ones((3, SIDE, SIDE), "uint16")
    x, y, wide, high = PLACES[crs]
    over = Affine(wide, 0, x + 5 * wide, 0, -high, y)  # on the ground of train/a
    write(root / "val" / "images" / "leak.tif", image, crs, over)
    write(root / "val" / "masks" / "leak.tif", image[:1].astype("uint8"), crs, over)
    leak = as_read(root).audit()
    assert not leak.ok
    assert leak.overlaps == {"train-val": 1}


def test_several_sources_masks_times_and_columns(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    crs = "EPSG:32633"
    want = {}
    for number in range(3):
        fine = random.integers(0, 99, (2, SIDE, SIDE)).astype("float32")
        coarse = random.integers(0, 99, (1, SIDE // 2, SIDE // 2)).astype("int16")
        water = random.integers(0, 2, (1, SIDE, SIDE)).astype("uint8")
        height = random.random((1, SIDE, SIDE)).astype("float32")
        place = corner(crs, number)
        write(tmp_path / "s2" / f"p{number}.tif", fine, crs, place)
        write(tmp_path / "s1" / f"p{number}.tif", coarse, crs, place * Affine.scale(2))
        write(tmp_path / "water" / f"p{number}.tif", water, crs, place)
        write(tmp_path / "height" / f"p{number}.tif", height, crs, place)
        want[f"p{number}"] = (fine, coarse, water, height)
    lines = [
        "name,date,part,biome",
        "p0.tif,2021-05-01,fit,taiga",
        "p1,2021-06-01,check,desert",
        "p2,2021-07-01,fit,taiga",
    ]
    (tmp_path / "chips.csv").write_text("\n".join(lines))
    chips = rd.read_chips(
        tmp_path, images={"s2": "s2/*.tif", "s1": "s1/*.tif"}, masks={"water": "water/*.tif", "height": "height/*.tif"},
        bands={"s2": ["vv", "vh"], "s1": ["c"]}, table="chips.csv", split="part",
        classes={"water": ["dry", "water"]},
    )  # fmt: skip
    tree: Any = chips.load()
    assert sorted(set(chips.table["split"].to_pylist())) == ["check", "fit"]
    s2, s1 = tree["s2"], tree["s1"]
    assert list(s2["band"].values) == ["vv", "vh"]
    for at, chip in enumerate(s2["chip_id"].values):
        fine, coarse, water, height = want[str(chip)]
        np.testing.assert_array_equal(s2["pixels"].values[at, 0], fine)
        np.testing.assert_array_equal(s1["pixels"].values[at, 0], coarse)
        np.testing.assert_array_equal(s2["mask_water"].values[at], water[0])
        np.testing.assert_array_equal(s2["mask_height"].values[at], height[0])
        month = 5 + int(str(chip)[1])
        assert str(s2["datetime"].values[at, 0])[:10] == f"2021-{month:02d}-01"
    assert dict(zip(s2["chip_id"].values, s2["biome"].values, strict=True))["p1"] == "desert"


def test_splits_by_lists_and_regular_expressions(tmp_path: Path) -> None:
    root = landcover(tmp_path, names=("x/a", "x/b", "x/c"))
    (root / "train.txt").write_text("a\nb.tif\n")
    chips = rd.read_chips(
        root, images=r"x/images/(?P<chip>\w+)\.tif", masks=r"x/masks/(?P<chip>\w+)\.tif",
        split={"train": "train.txt", "test": ["c"]},
    )  # fmt: skip
    assert dict(zip(chips.table["chip_id"].to_pylist(), chips.table["split"].to_pylist(), strict=True)) == {
        "a": "train", "b": "train", "c": "test",
    }  # fmt: skip
    own = rd.read_chips(root, images=r"x/images/(?P<chip>(?P<split>[ab])|.)\.tif", split=None)
    assert own.table["split"].to_pylist() == [None] * 3
    ground = as_read(root, split=None).split(0.5, 0.5, seed=1)  # others' chips can be split anew
    assert ground.table.num_rows == 3


def test_dates_in_names_make_times(tmp_path: Path) -> None:
    for day in ("20200105", "20200205"):
        write(
            tmp_path / f"a_{day}.tif",
            np.ones((1, SIDE, SIDE), "uint8"),
            "EPSG:32633",
            corner("EPSG:32633", 0),
        )
    chips = rd.read_chips(tmp_path, images=r"(?P<chip>a_(?P<date>\d{8}))\.tif")
    assert len(chips) == 2  # of one place: each is fed by its own file alone
    assert [str(t.date()) for t in chips.table["datetime"].to_pylist()] == ["2020-01-05", "2020-02-05"]


def test_another_collection_is_read_onto_the_chips(tmp_path: Path) -> None:
    crs = "EPSG:32633"
    x, y, wide, high = PLACES[crs]
    scene = np.arange(200 * 200, dtype="uint16").reshape(1, 200, 200)
    origin = Affine(wide, 0, x - 10 * wide, 0, -high, y + 10 * high)
    write(tmp_path / "scene" / "s_20200101.tif", scene, crs, origin)
    root = landcover(tmp_path / "data", names=("train/a", "val/b"))
    other = rd.build_from_files(str(tmp_path / "scene"), name="scene", static=True)
    chips = as_read(root, join={"scene": other.harmonize(resampling="nearest")})
    tree: Any = chips.load()
    for at, chip in enumerate(tree["scene"]["chip_id"].values):
        left, top = tree["scene"]["bounds"].values[at][[0, 3]]
        col, row = round((left - origin.c) / wide), round((origin.f - top) / high)
        want = scene[:, row : row + SIDE, col : col + SIDE]
        np.testing.assert_array_equal(tree["scene"]["pixels"].values[at, 0], want, err_msg=str(chip))


def test_mistakes(tmp_path: Path) -> None:
    root = landcover(tmp_path / "data")
    with pytest.raises(rd.SourceError, match="none of 6 files"):
        rd.read_chips(root, images="*/pictures/*.tif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(rd.SourceError):
        rd.read_chips(tmp_path / "empty")
    with pytest.raises(rd.SourceError, match=r"2 of 2 names are no chip's"):
        as_read(root, split={"train": ["zz", "yy"], "val": ["b"]})
    with pytest.raises(rd.SourceError, match="in the list of 'train' too"):
        as_read(root, split={"train": ["train/a"], "val": ["train/a"]})
    with pytest.raises(rd.SourceError, match="several chips are called"):
        as_read(root, split={"train": ["a"]})
    with pytest.raises(rd.SourceError, match="two files"):
        rd.read_chips(root, images=r".*/images/(?P<chip>\w+)\.tif")
    with pytest.raises(rd.PlanError, match=r"no such column|no table="):
        as_read(root, split="part")
    with pytest.raises(rd.PlanError, match="no images="):
        rd.read_chips(root, masks="*/masks/*.tif")
    with pytest.raises(rd.PlanError, match="no group chip"):
        rd.read_chips(root, images=r"(?P<name>.+)\.tif")
    with pytest.raises(rd.PlanError, match="no masks="):
        rd.read_chips(root, images="*/images/*.tif", classes=["a"])
    with pytest.raises(rd.PlanError, match="window"):
        as_read(root).random(3).table  # noqa: B018


def test_a_mask_that_lacks_is_named_and_left_out(tmp_path: Path) -> None:
    root = landcover(tmp_path)
    (root / "train" / "masks" / "b.tif").unlink()
    with pytest.raises(rd.SourceError, match=r"no file for 1 of 3 chips: train/images/b\.tif") as caught:
        as_read(root)
    assert "on_error='skip'" in str(caught.value)
    with pytest.warns(UserWarning, match="chip without a file of mask: 1"):
        chips = as_read(root, on_error="skip")
    assert sorted(chips.table["chip_id"].to_pylist()) == ["train/a", "val/a"]


def test_other_sizes_are_named_and_left_out(tmp_path: Path) -> None:
    root = landcover(tmp_path)
    big = np.ones((3, 2 * SIDE, 2 * SIDE), "uint16")
    write(root / "val" / "images" / "a.tif", big, "EPSG:32633", corner("EPSG:32633", 2))
    images = "*/images/*.tif"
    with pytest.raises(rd.SourceError, match=r"val/a \(32 x 32\)") as caught:
        rd.read_chips(root, images=images)
    assert "build_from_files" in str(caught.value)
    with pytest.warns(UserWarning, match="another size"):
        assert len(rd.read_chips(root, images=images, on_error="skip")) == 2
    scenes = rd.build_from_files(str(root / "*" / "images" / "*.tif"), name="images", static=True)
    assert len(scenes.chips(SIDE, cell_km=1.28)) >= 1  # what the message proposes
    write(root / "val" / "images" / "a.tif", big[:, :SIDE], "EPSG:32633", corner("EPSG:32633", 2))
    with pytest.raises(rd.SourceError, match="chips are squares"):
        rd.read_chips(root, images=images)


def test_files_without_a_place_are_refused(tmp_path: Path) -> None:
    root = landcover(tmp_path)
    image = np.ones((3, SIDE, SIDE), "uint16")
    write(root / "val" / "images" / "a.tif", image, None, None)
    with pytest.raises(rd.SourceError, match=r"a\.tif") as caught:
        rd.read_chips(root, images="*/images/*.tif")
    assert "rio edit-info" in str(caught.value)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert len(rd.read_chips(root, images="*/images/*.tif", on_error="skip")) == 2
    write(root / "val" / "images" / "a.tif", image, None, corner("EPSG:32633", 2))
    with pytest.raises(rd.SourceError, match="no CRS in it"):
        rd.read_chips(root, images="*/images/*.tif")
    with pytest.warns(UserWarning, match="as crs= says"):
        assert len(rd.read_chips(root, images="*/images/*.tif", crs="EPSG:32633")) == 3


@pytest.mark.parametrize("wrong", ["place", "bands", "dtype"])
def test_masks_unlike_their_images(tmp_path: Path, wrong: str) -> None:
    root = landcover(tmp_path)
    mask = np.ones((1 + (wrong == "bands"), SIDE, SIDE), "int32" if wrong == "dtype" else "uint8")
    write(root / "val" / "masks" / "a.tif", mask, "EPSG:32633", corner("EPSG:32633", 2 + (wrong == "place")))
    with pytest.raises(rd.SourceError, match=r"a\.tif"):
        as_read(root)


def test_a_table_keeps_types(tmp_path: Path) -> None:
    root = landcover(tmp_path)
    table = pa.table({"chip": ["train/a", "train/b", "val/a"], "count": [1, 2, 3], "share": [0.5, None, 1.5]})
    chips = as_read(root, table=table)
    data: Any = chips.load()
    assert data["count"].dtype == np.int64
    assert data["share"].dtype == np.float64
    with pytest.raises(rd.SourceError, match="are no chip's"):
        as_read(
            root,
            table=table.append_column("x", pa.array([1, 1, 1])).set_column(
                0, "chip", pa.array(["q", "r", "s"])
            ),
        )
    assert json.loads(json.dumps(chips.explain()["splits"])) == {"train": 2, "val": 1}


def by_chip(data: Any) -> dict[str, Any]:
    """Return source -> its Dataset, chips by name."""
    leaves = {node.name: node.to_dataset() for node in data.leaves} if hasattr(data, "leaves") else {"": data}
    return {str(name): one.sortby("chip_id") for name, one in leaves.items()}


@pytest.mark.parametrize("kind", ["slots", "acquisition", "own slots", "wide", "stored", "optional"])
def test_what_was_exported_comes_back(tmp_path: Path, s2: rd.Collection, kind: str) -> None:
    collection = s2
    monthly = collection.harmonize(["red", "nir"], mask="clouds", time="1MS")
    if kind == "slots":
        ground = box(*collection.to_geopandas().total_bounds)
        half = GeoDataFrame({"crop": ["rye", "maize"]}, geometry=[ground, ground.buffer(-0.01)], crs=4326)
        chips = (
            monthly.chips(32, cell_km=0.96, labels=half, rasterize="crop").split(0.5, 0.5, seed=1).sample(8)
        )
    elif kind == "acquisition":
        chips = collection.harmonize(["red", "SCL"]).chips(32, cell_km=0.96).sample(5)
    elif kind == "own slots":
        own = collection.harmonize(["red"], dtype="uint16", time="acquisitions", max_acquisitions=4)
        chips = own.chips(32, cell_km=0.96).sample(4)
    elif kind == "wide":
        wide = collection.harmonize(["red"], resolution=60, time="1MS")
        chips = rd.join(near=monthly, wide=wide).chips(32, cell_km=0.96, context_m={"wide": 1920}).sample(4)
    elif kind == "optional":
        west, south, _, _ = collection.to_geopandas().total_bounds
        some = collection.subset(bbox=(west, south, west + 1e-4, south + 1e-4)).harmonize(["red"], time="1MS")
        joined = rd.join(all=monthly, some=some, require=["all"])
        chips = joined.chips(32, cell_km=0.96).sample(6)
    else:
        chips = collection.harmonize(["nir"], dtype="int16").chips(32, cell_km=0.96).sample(4)
        ids = chips.table["chip_id"]
        columns = {
            "n": pa.array([1, 2, 3, 4]),
            "t": pa.array(["a", None, "c", "d"]),
            "w": pa.array([0.5, None, 1, 2]),
        }
        chips = chips.with_table(pa.table({"chip_id": ids, **columns}))
    chips.to_geotiff(tmp_path / "tifs", progress=False)
    back = rd.read_chips(tmp_path / "tifs")
    before, after = by_chip(chips.load()), by_chip(back.load())
    assert before.keys() == after.keys()
    for source, one in before.items():
        other = after[source]
        assert set(one.variables) == set(other.variables)
        for name in set(one.variables) - {"units", "member"}:  # raw numbers; of the source itself
            np.testing.assert_array_equal(one[name].values, other[name].values, err_msg=name)
            assert one[name].dtype == other[name].dtype
        if "mask" in one:
            assert other["mask"].attrs["classes"] == one["mask"].attrs["classes"]
