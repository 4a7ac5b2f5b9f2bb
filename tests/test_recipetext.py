"""A plan as a recipe: read again, it is the same plan."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.gridspec import GridSpec
from odc.geo.types import XY
from outside_rules import ClearMiddle, CloudThenLast

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.rules.masks import BitValues, Classes
from rasteret_dask.rules.picks import Closest, Median
from rasteret_dask.rules.units import Raw


def doubled(pixels: xr.DataArray) -> xr.DataArray:
    return pixels * 2


def bright(pixels: xr.DataArray) -> Any:
    return pixels.mean(("time", "band", "y", "x")) > 0.1


@pytest.fixture(scope="module")
def tables(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, rd.Collection]:
    """Return the world's three collections as tables on disk, which open without reading a header."""
    folder = tmp_path_factory.mktemp("records")
    for collection in (s2, l8, aef):
        collection.export(folder / f"{collection.name}.parquet")
    return {name: rd.load(folder / f"{name}.parquet", name) for name in ("s2", "l8", "aef")}


def again(chips: rd.Chips, folder: Path) -> rd.Chips:
    """Return the chips of the recipe that chips write."""
    (folder / "again.toml").write_text(chips.to_recipe())
    return rd.load_recipe(folder / "again.toml").chips()


triples = st.sampled_from(
    [
        ("eo:cloud_cover", "<", 60), ("platform", "!=", None), ("platform", "in", ("sentinel-2a", "landsat-8")),
        ("datetime", "overlaps", (None, "2024-06-01T00:00:00+00:00")), ("id", "not in", ("x", 'a"b\\c\n')),
        ("bbox", "intersects", (14.0, 50.0, 16.0, 51.0)),
    ]
)  # fmt: skip
masks = st.sampled_from(
    [
        "clouds",
        ["clouds", "snow"],
        Classes("SCL", (3, 8)),
        ["water", Classes("SCL", (3,)), Classes("SCL", (8, 9))],
    ]
)
harmonizing = st.fixed_dictionaries(
    {},
    optional={
        "bands": st.sampled_from([["red"], ["red", "nir"]]),
        "units": st.sampled_from(["raw", "physical", {"red": "raw"}, {"nir": Raw()}]),
        "resolution": st.sampled_from([10, 20.0]),
        "resampling": st.sampled_from(["nearest", "average"]),
        "mask": masks,
        "time": st.sampled_from(["1MS", "30D", "static"]),
        "tolerance": st.just("400D"),
        "pick": st.sampled_from(["first", "median", Closest(), Median(), ClearMiddle(), CloudThenLast(35.5)]),
        "dtype": st.sampled_from(["float32", "uint16"]),
        "kinds": st.just({"red": "reflectance"}),
        "fill": st.booleans(),
    },
)


@st.composite
def collections(draw: st.DrawFn, depth: int = 2) -> Any:
    """Return a function of the tables that makes a collection."""
    name = draw(st.sampled_from(["s2", "l8"]))
    steps = draw(st.lists(st.sampled_from(["filter", "subset", "sample", "harmonize", "map"]), max_size=4))
    others = draw(st.lists(collections(depth - 1), max_size=2)) if depth else []
    arguments: list[Any] = []
    for step in steps:
        match step:
            case "filter":
                arguments.append(draw(st.lists(triples, max_size=2)))
            case "subset":
                arguments.append(
                    {"cloud_cover_lt": 70, "date_range": ("2024-04", None), "platform": ["a", "b"]}
                )
            case "sample":
                arguments.append(
                    (draw(st.integers(1, 5)), draw(st.integers(0, 2)), draw(st.sampled_from([None, "tile"])))
                )
            case "harmonize":
                arguments.append(draw(harmonizing))
            case _:
                arguments.append(draw(st.sampled_from([None, "2"])))

    def make(tables: dict[str, rd.Collection]) -> rd.Collection:
        made = tables[name]
        if others:
            made = rd.merge(made, *(other(tables) for other in others))
        for step, value in zip(steps, arguments, strict=True):
            match step:
                case "filter":
                    made = made.filter(*value) if value else made.filter()
                case "subset":
                    made = made.subset(**value)
                case "sample":
                    made = made.sample(*value)
                case "harmonize":
                    made = made.harmonize(**value)
                case _:
                    made = made.map(doubled, version=value)
        return made

    return make


BOX = GeoBox((300, 360), Affine(10, 0, 499980.0, 0, -10, 5560000.0), "EPSG:32633")
grids = st.sampled_from(
    ["utm", "tiles", "EPSG:3035", GridSpec("EPSG:3035", (128, 128), resolution=10, origin=XY(5.0, -7.5)), BOX]
)
areas = st.sampled_from(
    [
        (14.9, 50.1, 15.1, 50.2), (179.0, -10.0, -179.0, 10.0), shapely.Point(15, 50.15).buffer(0.01),
        shapely.box(0, 0, 1, 1) | shapely.box(5, 5, 6, 6.5), None,
    ]
)  # fmt: skip
cutting = st.fixed_dictionaries(
    {"size": st.sampled_from([32, 64]), "grid": grids, "aoi": areas},
    optional={
        "stride": st.just(16), "cell_km": st.sampled_from([0.64, 15.36]), "min_coverage": st.just(0.5),
        "min_slots": st.just(2), "at": st.just([(15.0, 50.17), (14.99, 50.175)]),
    },
)  # fmt: skip
steps = st.lists(
    st.sampled_from(
        [
            ("split", {}), ("split", {"train": 0.5, "val": 0.5, "test": 0.0, "seed": 3, "buffer_m": 10.5}),
            ("split", {"train": 0.5, "my part": 0.5}), ("split", {"by": "epsg", "test": [32633], "val": ["x", True]}),
            ("split", {"by": "epsg"}), ("folds", {"k": 4}), ("folds", {"k": 3, "seed": 2}), ("fold", {"i": 1}),
            ("filter", (("slots", ">", 0),)), ("sample", (3, 1)), ("random", {"n": 9}),
            ("random", {"n": 9, "seed": 4, "size": 8, "balance": "crop"}), ("random", {"n": 9, "balance": ["a", "b"]}),
            ("select", ("train", "val")), ("map", doubled),
            ("filter_pixels", {"min_valid": 0.5}), ("filter_pixels", {"function": bright, "max_cloud": 0.2}),
        ]
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(collections(), min_size=1, max_size=2), cutting, steps)
def test_a_plan_written_as_a_recipe_is_the_same_plan(
    tables: dict[str, rd.Collection], tmp_path: Path, made: list[Any], cut: dict[str, Any], further: Any
) -> None:
    parts = [make(tables) for make in made]
    collection = parts[0] if len(parts) == 1 else rd.join(optical=parts[0], other=parts[1], aef=tables["aef"])
    chips = collection.chips(**cut)
    for name, value in further:
        if isinstance(value, dict):
            chips = getattr(chips, name)(**value)
        else:
            chips = getattr(chips, name)(*(value if isinstance(value, tuple) else (value,)))
    read = again(chips, tmp_path)
    assert read.plan == chips.plan
    assert read.to_recipe() == chips.to_recipe()


def test_calls_of_all_kinds_are_said_again(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    monkeypatch.chdir(tmp_path)
    files = sorted(small_world.sentinel2.parent.glob("*/B04.tif"))
    sources = {
        "built": rd.build("demo/sentinel-2-l2a", date_range=("2024-04-01", None), bands=["B04", "SCL"]),
        "stac": rd.build_from_stac(
            Path("demo/world/landsat-c2-l2/collection.json"), name="odd name", kinds={"B4": "reflectance"}
        ),
        "files": rd.build_from_files(
            [str(files[0])], name="own", bands=["red"], static=True, kinds={"red": "continuous"},
        ),
    }  # fmt: skip
    resolved = {name: one.harmonize(["red"], resolution=10) for name, one in sources.items()}
    chips = rd.join(**resolved).chips(32, cell_km=0.64, min_coverage=0.5).split(seed=2)  # type: ignore[arg-type]
    text = chips.to_recipe()
    assert tomllib.loads(text)["collections"]["odd_name"]["name"] == "odd name"
    read = again(chips, tmp_path)
    assert read.plan == chips.plan
    assert read.job.digest == chips.job.digest
    assert read.table.equals(chips.table)


def test_what_only_memory_holds_goes_into_files_beside_the_recipe(s2: rd.Collection, tmp_path: Path) -> None:
    table = rd.as_collection(s2.to_table(), name="mine")
    centre = [shapely.Point(15.0, 50.17).buffer(0.002), shapely.Point(14.99, 50.175).buffer(0.001)]
    fields = geopandas.GeoDataFrame({"crop": ["rye", "oats"]}, geometry=centre, index=["a", "b"], crs=4326)
    chips = table.harmonize(["red"], time="1MS").chips(32, at=fields, rasterize="crop", min_coverage=0.1)
    chips = chips.with_table(chips.table.append_column("mine", pa.array(np.arange(len(chips)))))
    with pytest.raises(rd.PlanError, match=r"a table.* which no text can say") as told:
        chips.to_recipe()
    assert "chips.to_recipe('train.toml')" in told.value.remedy

    path = tmp_path / "train.toml"
    assert chips.to_recipe(path) == path.read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "train-at.parquet", "train-chips.parquet", "train-labels.parquet", "train-mine.parquet", "train.toml",
    ]  # fmt: skip
    read = rd.load_recipe(path).chips()
    assert read.table.equals(chips.table)
    assert read.table.column("mine").to_pylist() == [0, 1]
    for name, values in chips.load().items():
        np.testing.assert_array_equal(values, read.load()[str(name)])


@pytest.mark.parametrize("kind", ["lambda", "locals"])
def test_functions_that_no_file_names_are_refused_by_name(
    tables: dict[str, rd.Collection], kind: str
) -> None:
    def local(pixels: xr.DataArray) -> xr.DataArray:
        return pixels

    function = local if kind == "locals" else lambda pixels: pixels
    chips = tables["s2"].map(function).chips(32)
    with pytest.raises(rd.PlanError, match=f"function test_recipetext:.*<{kind}>"):
        chips.to_recipe()


def test_credentials_stay_out_of_a_recipe(small_world: World, serve: Any, tmp_path: Path) -> None:
    url, _ = serve(small_world.landsat.parent)
    secret = url.replace("http://", "http://ann:pass@") + f"/{small_world.landsat.name}?token=secret"
    with pytest.warns(rd.SignedHrefsWarning):
        made = rd.build_from_stac(secret, name="x", headers=False)
    text = made.chips(32).to_recipe()
    assert "secret" not in text
    assert "pass" not in text
    assert small_world.landsat.name in text


def test_masks_of_bits_are_written_field_by_field(tables: dict[str, rd.Collection]) -> None:
    mask = BitValues("QA_PIXEL", 8, 2, (2, 3))
    chips = tables["l8"].harmonize(mask=mask).chips(32)
    values = tomllib.loads(chips.to_recipe())["collections"]["l8"]["harmonize"]
    assert values["mask"] == {
        "rule": "BitValues",
        "band": "QA_PIXEL",
        "first": 8,
        "length": 2,
        "values": [2, 3],
    }
