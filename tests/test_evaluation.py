# SPDX-License-Identifier: Apache-2.0
"""Predictions beside labels: every count equals what plain NumPy counts, pixel by pixel, whoever counts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import rioxarray  # noqa: F401
import shapely
import xarray as xr
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, record
from numpy.typing import NDArray
from rasterio.transform import Affine

import rasteret_dask as rd
from rasteret_dask.evaluation.confusion import Pairs, class_scores, overall
from rasteret_dask.evaluation.evaluation import Evaluation
from rasteret_dask.evaluation.rasters import MapRequest, rasters_of
from rasteret_dask.grid import transformer

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

CROPS = ["wheat", "maize", "oats"]
NODATA = 255
SIZE = 32
REASONS = ("repeated", "unlabelled", "unpredicted", "invalid")


@dataclass(frozen=True)
class Canvas:
    """A map of one zone."""

    epsg: int
    west: float
    north: float
    values: NDArray[np.uint8]
    pixel: float = 10.0

    @property
    def array(self) -> xr.DataArray:
        height, width = self.values.shape
        y = self.north - self.pixel * (np.arange(height) + 0.5)
        x = self.west + self.pixel * (np.arange(width) + 0.5)
        found = xr.DataArray(self.values, {"y": y, "x": x}, ("y", "x"), attrs={"_FillValue": NODATA})
        written: xr.DataArray = found.rio.write_crs(self.epsg)
        return written

    def at(self, x: float, y: float) -> int | None:
        """Return the pixel that holds a place; None outside."""
        row, column = math.floor((self.north - y) / self.pixel), math.floor((x - self.west) / self.pixel)
        inside = 0 <= row < self.values.shape[0] and 0 <= column < self.values.shape[1]
        return int(self.values[row, column]) if inside else None


def canvases(chips: rd.Chips, seed: int = 0, short: float = 300.0) -> dict[int, Canvas]:
    """Draw a map of the chips' ground in each zone, whose eastern end is missing; a tenth of it is invalid."""
    rng = np.random.default_rng(seed)
    result = {}
    table = chips.table
    for epsg in sorted(set(table["epsg"].to_pylist())):
        own = table.filter(np.asarray(table["epsg"]) == epsg)
        west, south, east, north = (
            function(own[name].to_pylist())
            for name, function in (("xmin", min), ("ymin", min), ("xmax", max), ("ymax", max))
        )
        shape = (round((north - south) / 10) + 12, round((east - west - short) / 10) + 7)
        values = rng.integers(1, 5, shape).astype(np.uint8)
        values[rng.random(shape) < 0.1] = NODATA
        result[epsg] = Canvas(epsg, west - 70, north + 50, values)
    return result


def stored(maps: Mapping[int, Canvas], folder: Path) -> str:
    """Write a map as ``predict`` does: a Zarr store, the root where there is one zone, else a group a zone."""
    for epsg, one in maps.items():
        dataset = one.array.to_dataset(name="classes")
        dataset["count"] = (("y", "x"), np.ones(one.values.shape, np.uint16))
        group = None if len(maps) == 1 else str(epsg - 32600)
        dataset.to_zarr(folder, group=group, mode="a", zarr_format=3, consolidated=False)
    return str(folder)


@dataclass(frozen=True)
class Counted:
    """What the oracle counts, a Counter a chip."""

    pairs: list[Counter[tuple[int, int]]]
    lost: list[Counter[str]]


def counted(chips: rd.Chips, truth: NDArray[Any], maps: Mapping[int, Canvas], once: bool = True) -> Counted:
    """Count pixel by pixel: chips in their order, each place of ground once; truth 0 is no label."""
    table, seen = chips.job.chosen_chips(), set[tuple[int, int, int]]()
    result = Counted([], [])
    for at, row in enumerate(table.drop_columns(["feeds", "geometry"]).to_pylist()):
        pairs, lost = Counter[tuple[int, int]](), Counter[str]()
        for i in range(SIZE):
            for j in range(SIZE):
                x, y = row["xmin"] + 10 * (j + 0.5), row["ymax"] - 10 * (i + 0.5)
                place = (row["epsg"], round(x), round(y))
                true, guess = int(truth[at, i, j]), maps[row["epsg"]].at(x, y)
                if once and place in seen:
                    lost["repeated"] += 1
                elif true == 0:
                    lost["unlabelled"] += 1
                elif guess is None:
                    lost["unpredicted"] += 1
                elif guess == NODATA:
                    lost["invalid"] += 1
                else:
                    pairs[true, guess] += 1
                seen.add(place)
        result.pairs.append(pairs)
        result.lost.append(lost)
    return result


def agree(found: Evaluation, expected: Counted) -> None:
    """Compare the counts of all chips."""
    for row, pairs, lost in zip(found.chips.to_pylist(), expected.pairs, expected.lost, strict=True):
        assert {(c["truth"], c["predicted"]): c["pixels"] for c in row["counts"]} == dict(pairs)
        assert {name: row[name] for name in REASONS if row[name]} == dict(lost)
        assert row["pixels"] == pairs.total()
        assert row["errors"] == sum(n for (true, guess), n in pairs.items() if true != guess)
        assert sum(row[name] for name in ("pixels", *REASONS)) == SIZE * SIZE


def matrix_of(pairs: list[Counter[tuple[int, int]]], codes: list[int]) -> NDArray[np.int64]:
    result = np.zeros((len(codes), len(codes)), dtype=np.int64)
    for (true, guess), pixels in sum(pairs, Counter[tuple[int, int]]()).items():
        result[codes.index(true), codes.index(guess)] += pixels
    return result


def scored(matrix: NDArray[np.int64]) -> dict[str, float | None]:
    """Return the scores of a matrix by their definitions."""
    total, classes = matrix.sum(), range(len(matrix))

    def ratio(a: Any, b: Any) -> float | None:
        return float(a) / float(b) if b else None

    def mean(values: list[float | None]) -> float | None:
        own = [one for one in values if one is not None]
        return float(np.mean(own)) if own else None

    precision = [ratio(matrix[k, k], matrix[:, k].sum()) for k in classes]
    recall = [ratio(matrix[k, k], matrix[k].sum()) for k in classes]
    f1 = [ratio(2 * matrix[k, k], matrix[k].sum() + matrix[:, k].sum()) for k in classes]
    iou = [ratio(matrix[k, k], matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in classes]
    agreed = np.trace(matrix) / total if total else None
    chance = float((matrix.sum(0) / total) @ (matrix.sum(1) / total)) if total else 1.0
    kappa = (agreed - chance) / (1 - chance) if agreed is not None and chance < 1 else None
    return {
        "accuracy": agreed, "kappa": kappa, "precision": mean(precision), "recall": mean(recall), "f1": mean(f1),
        "iou": mean(iou),
    }  # fmt: skip


def fields_of(chips: rd.Chips, seed: int = 8, count: int = 40) -> gpd.GeoDataFrame:
    """Return round fields on the ground of chips."""
    rng = np.random.default_rng(seed)
    ground = chips.to_geopandas()
    west, south, east, north = ground.total_bounds
    points = shapely.points(rng.uniform(west, east, count), rng.uniform(south, north, count))
    frame = gpd.GeoDataFrame(
        {"crop": rng.choice(CROPS, count), "yield": rng.random(count)}, geometry=points, crs=4326
    )
    return frame.set_geometry(frame.to_crs(3035).buffer(rng.uniform(200, 600, count)).to_crs(4326))


def boxed(chips: rd.Chips) -> NDArray[Any]:
    table = chips.table
    return np.asarray(shapely.box(*(table[name].to_numpy() for name in ("xmin", "ymin", "xmax", "ymax"))))


@pytest.fixture(scope="module")
def across() -> rd.Chips:
    """Chips of two zones that meet at 12 degrees east, overlapping by a half, with labels; no pixel is ever read."""
    rows = []
    for epsg in (32632, 32633):
        x, y = transformer(4326, epsg).transform(12.0, 48.0)
        corner = {"west": round(x, -1) - 2000.0, "north": round(y, -1) + 2000.0}
        rows.append(record(str(epsg), **corner, epsg=epsg, px=(400, 400)))
    scenes = collection("s2", *rows).harmonize(["red"])
    fields = fields_of(scenes.chips(SIZE, cell_km=0.64))
    chips = scenes.chips(SIZE, stride=16, cell_km=0.64, labels=fields, rasterize="crop", classes=CROPS)
    assert len(set(chips.table["epsg"].to_pylist())) == 2
    return chips


@pytest.fixture(scope="module")
def dealt(across: rd.Chips) -> rd.Chips:
    return across.split(0.5, 0.2, 0.3, seed=4)


def masks_of(chips: rd.Chips) -> NDArray[Any]:
    """Return the masks of chips in the order of their job."""
    table = chips.job.chosen_chips()
    bounds = np.stack([table[name].to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")], -1)
    return chips.job.labels[0].burned(bounds, table["epsg"].to_numpy().astype(np.int64), SIZE)


def test_counts_of_two_zones_are_numpy_s(dealt: rd.Chips, tmp_path: Path) -> None:
    maps = canvases(dealt)
    found = dealt.evaluate(stored(maps, tmp_path / "map.zarr"), "mask", splits=dealt, progress=False)
    expected = counted(dealt, masks_of(dealt), maps)
    agree(found, expected)
    assert all(found.left_out.values()), "every reason is met"
    codes = [1, 2, 3, 4]
    assert found.classes == {1: "wheat", 2: "maize", 3: "oats", 4: "4"}
    whole = matrix_of(expected.pairs, codes)
    assert (found.confusion.values == whole).all()
    assert found.confusion.sel(truth="maize", predicted="4") == whole[1, 3]
    assert found.overall == pytest.approx(scored(whole), abs=1e-14)
    assert found.scores.column("truth").to_pylist() == whole.sum(1).tolist()
    assert found.scores.column("predicted").to_pylist() == whole.sum(0).tolist()
    assert found.only_in_predictions == ("4",)
    assert not found.only_in_labels
    split = found.chips["split"].to_pylist()
    for row in found.by_split.to_pylist():
        own = [pairs for pairs, name in zip(expected.pairs, split, strict=True) if name == row["split"]]
        assert row["chips"] == len(own)
        assert {k: row[k] for k in found.overall} == pytest.approx(scored(matrix_of(own, codes)), abs=1e-14)
    assert sum(found.by_split["pixels"].to_pylist()) == found.pixels


def test_threads_and_a_cluster_count_the_same(dealt: rd.Chips, tmp_path: Path) -> None:
    path = stored(canvases(dealt), tmp_path / "map.zarr")
    few = dealt.sample(30, seed=2)
    here = few.evaluate(path, "mask", splits=dealt, progress=False)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        there = few.evaluate(path, "mask", splits=dealt, client=client, progress=False)
        there.error_map(tmp_path / "errors", progress=False)
    assert there.table.equals(here.table)
    assert there.to_json() == here.to_json()
    for name in here.error_map(tmp_path / "again", progress=False):
        with rasterio.open(name) as one, rasterio.open(tmp_path / "errors" / name.name) as other:
            assert (one.read() == other.read()).all()


@settings(max_examples=6)
@given(seed=st.integers(0, 99), once=st.booleans(), n=st.integers(3, 40))
def test_counts_of_drawn_chips(dealt: rd.Chips, seed: int, once: bool, n: int) -> None:
    chips = dealt.sample(n, seed=seed)
    maps = canvases(dealt, seed)
    tree = xr.DataTree.from_dict({str(k): one.array.to_dataset(name="classes") for k, one in maps.items()})
    found = chips.evaluate(tree, "mask", once=once, progress=False)
    agree(found, counted(chips, masks_of(chips), maps, once))


def test_distances_are_shapely_s_on_the_zone(across: rd.Chips, dealt: rd.Chips, tmp_path: Path) -> None:
    path = stored(canvases(across), tmp_path / "map.zarr")
    train = dealt.select("train").sample(6, seed=3)  # some of both zones
    found = across.sample(80).evaluate(path, "mask", splits=train, distances_m=(0, 300, 1500), progress=False)
    rows = found.chips.to_pylist()
    epsg, boxes = train.table["epsg"].to_pylist(), boxed(train)
    assert len(set(epsg)) == 2
    for row in rows:
        own = shapely.box(row["xmin"], row["ymin"], row["xmax"], row["ymax"])
        apart = []
        for code, box in zip(epsg, boxes.tolist(), strict=True):
            if code != row["epsg"]:
                move = transformer(code, row["epsg"]).transform
                box = shapely.transform(box, lambda p, move=move: np.stack(move(p[:, 0], p[:, 1]), -1))
            apart.append(own.distance(box))
        assert row["distance_m"] == pytest.approx(min(apart), abs=0.01)
    for bin_, low, high in zip(
        found.by_distance.to_pylist(), (0, 300, 1500), (300, 1500, np.inf), strict=True
    ):
        own_rows = [row for row in rows if low <= row["distance_m"] < high]
        assert (bin_["from_m"], bin_["chips"]) == (low, len(own_rows))
        assert bin_["pixels"] == sum(row["pixels"] for row in own_rows)


def test_chips_without_a_split_get_that_of_their_ground(
    across: rd.Chips, dealt: rd.Chips, tmp_path: Path
) -> None:
    path = stored(canvases(across), tmp_path / "map.zarr")
    found = across.evaluate(path, "mask", splits=dealt, progress=False)
    own = dict(zip(dealt.table["chip_id"].to_pylist(), dealt.table["split"].to_pylist(), strict=True))
    for row in found.chips.to_pylist():
        if own.get(row["chip_id"]) is not None:
            assert row["split"] in ("train", own[row["chip_id"]])  # another zone's train chip may share some
        assert (row["split"] == "train") >= (own.get(row["chip_id"]) == "train")
    assert {"train", "val", "test"} <= set(found.chips["split"].to_pylist())


def test_regions_are_those_that_hold_the_whole_chip(dealt: rd.Chips, tmp_path: Path) -> None:
    maps = canvases(dealt)
    west, south, east, north = dealt.to_geopandas().total_bounds
    middle = (south + north) / 2
    regions = gpd.GeoDataFrame(
        {"name": ["south", "north"]},
        geometry=[shapely.box(west, south, east, middle), shapely.box(west, middle, east, north)],
        crs=4326,
    )
    found = dealt.evaluate(stored(maps, tmp_path / "map.zarr"), "mask", regions=regions, progress=False)
    shapes = shapely.from_wkb(found.chips["geometry"].to_pylist())
    region = found.chips["region"].to_pylist()
    for shape, name in zip(shapes, region, strict=True):
        held = [n for n, own in zip(regions["name"], regions.geometry, strict=True) if own.contains(shape)]
        assert name == (held[0] if held else None)
    expected = counted(dealt, masks_of(dealt), maps)
    for row in found.by_region.to_pylist():
        own = [pairs for pairs, name in zip(expected.pairs, region, strict=True) if name == row["region"]]
        assert row["accuracy"] == pytest.approx(scored(matrix_of(own, [1, 2, 3, 4]))["accuracy"])
    assert found.by("region") == found.by_region
    by_column = dealt.evaluate(str(tmp_path / "map.zarr"), "mask", regions="cell", progress=False)
    assert sum(by_column.by_region["pixels"].to_pylist()) == found.pixels


# Whatever the map is

Made = dict[str, Any]


@pytest.fixture(scope="module")
def one_zone(across: rd.Chips) -> rd.Chips:
    return across.filter(epsg=32633).sample(25)


def test_any_form_of_a_map_counts_the_same(one_zone: rd.Chips, tmp_path: Path) -> None:
    (canvas,) = canvases(one_zone).values()
    array = canvas.array
    array.rio.to_raster(tmp_path / "map.tif", tiled=True, blockxsize=64, blockysize=64)
    (tmp_path / "tiles").mkdir()
    for at in range(0, canvas.values.shape[1], 100):
        part = array.isel(x=slice(at, at + 100))
        part.rio.to_raster(tmp_path / "tiles" / f"{at}.tif")
    likely = xr.concat([xr.where(array == k, 0.6, 0.1).where(array != NODATA) for k in (1, 2, 3, 4)], "band")
    likely = likely.assign_coords(band=[1, 2, 3, 4]).rio.write_crs(canvas.epsg).astype("float32")
    likely.to_dataset(name="probabilities").to_zarr(
        tmp_path / "likely.zarr", zarr_format=3, consolidated=False
    )
    named = likely.assign_coords(band=["wheat", "maize", "oats", "rye"])
    southward = array.isel(y=slice(None, None, -1))
    floats = array.astype("float32").where(array != NODATA)
    floats.attrs = {}
    forms: Made = {
        "store": stored({canvas.epsg: canvas}, tmp_path / "map.zarr"), "file": tmp_path / "map.tif",
        "tiles": tmp_path / "tiles", "array": array, "dataset": array.to_dataset(name="any"),
        "lazy": array.chunk({"y": 50, "x": 50}), "likely": tmp_path / "likely.zarr", "floats": floats,
        "south up": southward,
    }  # fmt: skip
    expected = counted(one_zone, masks_of(one_zone), {canvas.epsg: canvas})
    for name, form in forms.items():
        found = one_zone.evaluate(form, "mask", progress=False)
        assert found.note.nearest == (len(one_zone) if name == "south up" else 0)
        agree(found, expected)
    with pytest.raises(rd.PlanError, match="a band 'rye'"):
        one_zone.evaluate(named, "mask", progress=False)
    agree(one_zone.evaluate(array.fillna(0), "mask", nodata=NODATA, progress=False), expected)


@pytest.mark.parametrize(("crs", "pixel"), [(32633, 15.0), (3035, 10.0), (4326, 0.0001), (32632, 20.0)])
def test_maps_of_another_grid_are_read_by_nearest(one_zone: rd.Chips, crs: int, pixel: float) -> None:
    chips = one_zone.sample(6)
    rng = np.random.default_rng(5)
    west, south, east, north = chips.to_geopandas().to_crs(crs).total_bounds
    shape = (math.ceil((north - south) / pixel) + 5, math.ceil((east - west) / pixel) - 20)
    values = rng.choice(np.array([1, 2, 3, NODATA], np.uint8), shape)
    canvas = Canvas(crs, west - 2.3 * pixel, north + 1.7 * pixel, values, pixel)
    found = chips.evaluate(canvas.array, "mask", once=False, progress=False)
    assert "read by nearest" in repr(found)
    truth, move = masks_of(chips), transformer(32633, crs).transform
    touching = 0
    for at, row in enumerate(found.chips.to_pylist()):
        pairs, outside = Counter[tuple[int, int]](), 0
        steps = 10 * (np.arange(SIZE) + 0.5)
        places = [move(row["xmin"] + x, row["ymax"] - y) for y in steps.tolist() for x in steps.tolist()]
        touching += any(canvas.at(*place) is not None for place in places)
        for i, j in np.argwhere(truth[at] != 0).tolist():
            guess = canvas.at(*move(row["xmin"] + 10 * (j + 0.5), row["ymax"] - 10 * (i + 0.5)))
            outside += guess is None
            if guess not in (None, NODATA):
                pairs[int(truth[at, i, j]), guess] += 1
        assert {(c["truth"], c["predicted"]): c["pixels"] for c in row["counts"]} == dict(pairs)
        assert row["unpredicted"] == outside
    assert found.note.nearest == touching > 0


# Whatever the labels are


@pytest.fixture(scope="module")
def scl(s2: rd.Collection) -> rd.Chips:
    """Chips whose labels are a joined source of classes; pixels are read."""
    joined = rd.join(
        optical=s2.harmonize(["red"], time="3MS"),
        cover=s2.harmonize(["scl"], time="6MS", resolution=20, units="raw"),
    )
    chips = joined.chips(SIZE, stride=24, cell_km=0.64)
    return chips.with_table(chips.table.slice(0, 24))  # neighbours, which overlap


def land(chips: rd.Chips, source: str) -> tuple[NDArray[Any], list[str]]:
    """Return classes of a source, 0 where they are invalid, and the chips' ids."""
    loaded: Any = chips.load()
    own = loaded[source] if source in getattr(loaded, "children", ()) else loaded
    values = np.where(own["valid"].values[:, 0], own["pixels"].values[:, 0, 0], 0)
    return values, own["chip_id"].values.tolist()


@pytest.mark.parametrize("label", ["cover", "cover/scl"])
def test_a_joined_source_of_classes_is_truth(scl: rd.Chips, label: str) -> None:
    truth, ids = land(scl, "cover")
    table = scl.job.chosen_chips()
    assert ids == table["chip_id"].to_pylist()
    canvas = canvases(scl)[32633]
    half = Canvas(canvas.epsg, canvas.west, canvas.north, canvas.values[::2, ::2], 20.0)
    rule = scl.filter_pixels(min_valid=0.0, source="optical")  # decides by pixels, drops none
    found = scl.evaluate(half.array, label, once=False, progress=False)
    again = rule.evaluate(half.array, label, once=False, progress=False)
    assert again.chips.equals(found.chips)
    for at, row in enumerate(found.chips.to_pylist()):
        pairs = Counter[tuple[int, int]]()
        for i, j in np.argwhere(truth[at] != 0).tolist():
            guess = half.at(row["xmin"] + 20 * (j + 0.5), row["ymax"] - 20 * (i + 0.5))
            if guess not in (None, NODATA):
                pairs[int(truth[at, i, j]), guess] += 1
        assert {(c["truth"], c["predicted"]): c["pixels"] for c in row["counts"]} == dict(pairs)
        assert sum(row[name] for name in ("pixels", *REASONS)) == 16 * 16


def is_dark(pixels: xr.DataArray) -> xr.DataArray:
    """Return which chips are dark: about half of them."""
    return pixels.mean(("time", "band", "y", "x")) < 0.0885


def test_chips_that_rules_drop_hide_nothing_of_others(scl: rd.Chips) -> None:
    kept = scl.filter_pixels(is_dark, source="optical")
    truth, ids = land(kept, "cover")
    assert 0 < len(ids) < len(scl)
    canvas = canvases(scl, short=0.0)[32633]
    half = Canvas(canvas.epsg, canvas.west, canvas.north, np.ones_like(canvas.values[::2, ::2]), 20.0)
    found = kept.evaluate(half.array, "cover", progress=False)
    assert found.chips["chip_id"].to_pylist() == ids
    places = set()
    for at, row in enumerate(found.chips.to_pylist()):
        places |= {
            (round(row["xmin"]) + 20 * int(j), round(row["ymax"]) - 20 * int(i))
            for i, j in np.argwhere(truth[at] != 0)
        }
    overlap = found.left_out["repeated"]
    assert found.pixels == len(places)
    assert overlap > 0


def test_polygons_and_rasters_given_here_are_truth(one_zone: rd.Chips, tmp_path: Path) -> None:
    maps = canvases(one_zone)
    (canvas,) = maps.values()
    fields = fields_of(one_zone, seed=3)
    named = dict(enumerate(sorted(CROPS), 1))
    array = canvas.array.assign_attrs(flag_values=[1, 2, 3], flag_meanings=" ".join(named.values()))
    burned = one_zone.job.labels[0].of(pa.table({
        "geometry": pa.array(shapely.to_wkb(fields.geometry), pa.binary()), "crop": fields["crop"].tolist(),
    }), "crop")  # fmt: skip
    table = one_zone.job.chosen_chips()
    bounds = np.stack([table[name].to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")], -1)
    masks = burned.burned(bounds, table["epsg"].to_numpy().astype(np.int64), SIZE)
    expected = counted(one_zone, masks, maps)
    found = one_zone.evaluate(array, fields, column="crop", progress=False)
    agree(found, expected)
    assert found.classes == {**named, 4: "4"}
    fields[["crop", "geometry"]].to_parquet(tmp_path / "fields.parquet")
    again = one_zone.evaluate(canvas.array, str(tmp_path / "fields.parquet"), classes=named, progress=False)
    agree(again, expected)
    third = sorted(CROPS)[
        2
    ]  # a predicted 3 that nobody names is not the labels' third class, nor another number
    two = {code: name for code, name in named.items() if name != third}
    fewer = one_zone.evaluate(canvas.array, str(tmp_path / "fields.parquet"), classes=two, progress=False)
    assert set(fewer.only_in_predictions) == {"3", "4"}
    for own, other in (("3", third), ("4", "4")):
        for true in CROPS:
            here, there = fewer.confusion.sel(truth=true), again.confusion.sel(truth=true)
            assert here.sel(predicted=own) == there.sel(predicted=other)
    assert fewer.confusion.sel(predicted=third).sum() == 0
    with pytest.raises(rd.PlanError, match="a map whose classes have no names"):
        one_zone.evaluate(canvas.array, fields, column="crop", progress=False)
    with pytest.raises(rd.PlanError, match="polygons with 2 columns"):
        one_zone.evaluate(array, fields, progress=False)
    truth = canvases(one_zone, seed=7)[32633]
    truth.array.rio.to_raster(tmp_path / "truth.tif")
    found = one_zone.evaluate(canvas.array, tmp_path / "truth.tif", progress=False)
    height, width = canvas.values.shape
    total = found.pixels + sum(found.left_out.values())
    assert total == len(one_zone) * SIZE * SIZE
    assert 0.15 < (found.overall["accuracy"] or 0) < 0.35, "two draws of four classes"
    assert min(height, width) > SIZE


def test_measured_numbers_have_differences(across: rd.Chips, tmp_path: Path) -> None:
    scenes = rd.Chips(across.query)  # the same ground with labels that are measured
    chips = scenes.filter(epsg=32632).sample(20)
    fields = fields_of(chips, seed=5)[["yield", "geometry"]]
    (canvas,) = canvases(chips).values()
    values = np.where(canvas.values == NODATA, np.nan, canvas.values / np.float32(4))
    array = canvas.array.copy(data=values.astype(np.float32)).drop_attrs(deep=False)
    found = chips.evaluate(array, fields, once=False, progress=False)
    burned = chips.job.labels[0].of(pa.table({
        "geometry": pa.array(shapely.to_wkb(fields.geometry), pa.binary()), "yield": fields["yield"].to_numpy(),
    }), "yield")  # fmt: skip
    table = chips.job.chosen_chips()
    bounds = np.stack([table[name].to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")], -1)
    truth = burned.burned(bounds, table["epsg"].to_numpy().astype(np.int64), SIZE).astype(np.float64)
    trues, guesses = [], []
    for at, row in enumerate(found.chips.to_pylist()):
        top, left = round((canvas.north - row["ymax"]) / 10), round((row["xmin"] - canvas.west) / 10)
        guess = np.full((SIZE, SIZE), np.nan)
        part = values[top : top + SIZE, left : left + SIZE]
        guess[: part.shape[0], : part.shape[1]] = part
        there = ~np.isnan(guess) & ~np.isnan(truth[at])
        assert row["pixels"] == there.sum()
        trues.append(truth[at][there])
        guesses.append(guess[there])
    t, d = np.concatenate(trues), np.concatenate(guesses) - np.concatenate(trues)
    wanted = {
        "bias": d.mean(), "rmse": np.sqrt((d**2).mean()), "mae": np.abs(d).mean(),
        "r2": 1 - (d**2).sum() / ((t - t.mean()) ** 2).sum(),
    }  # fmt: skip
    assert found.overall == pytest.approx(wanted, rel=1e-9)
    assert found.scores.column_names == ["pixels", "bias", "rmse", "mae", "r2"]
    with pytest.raises(rd.PlanError, match="measured numbers"):
        _ = found.confusion
    (path,) = found.error_map(tmp_path / "errors.tif", progress=False)
    with rasterio.open(path) as file:
        errors = file.read(1)
    assert np.isclose(np.nanmax(np.abs(errors)), np.abs(d).max(), rtol=1e-6)
    assert "rmse" in repr(found)
    with pytest.raises(rd.PlanError, match=r"the number 0\.[257]"):
        chips.evaluate(array, "mask", progress=False)


def test_predictions_of_whole_chips(dealt: rd.Chips, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = dealt.table["chip_id"]
    truth = [None if n % 11 == 0 else CROPS[n % 3] for n in range(len(ids))]
    chips = dealt.with_table(pa.table({"chip_id": ids, "truth": truth}))
    guess = rng.choice(CROPS[:2], len(ids)).tolist()
    table = pa.table({"chip_id": ids, "class": guess}).slice(5)
    order = {one: n for n, one in enumerate(ids.to_pylist())}
    found = chips.evaluate(table, "truth", splits=dealt, progress=False)
    own = [order[one] for one in chips.job.chosen_chips()["chip_id"].to_pylist()]
    pairs = Counter((truth[n], guess[n]) for n in own if truth[n] is not None and n >= 5)
    for (true, other), chips_ in pairs.items():
        assert found.confusion.sel(truth=true, predicted=other) == chips_
    assert found.pixels == pairs.total()
    assert found.left_out["unlabelled"] == sum(truth[n] is None for n in own)
    assert found.left_out["unpredicted"] == sum(n < 5 and truth[n] is not None for n in own)
    codes = pa.table({"chip_id": ids, "value": [CROPS.index(one) for one in guess]}).slice(5)
    numbered = chips.evaluate(codes, "truth", classes=dict(enumerate(CROPS)), progress=False)
    assert (numbered.confusion.values == found.confusion.values).all()
    both = codes.rename_columns(["chip_id", "class"]).append_column(
        "class_name", table["class"]
    )  # as predict has it
    assert chips.evaluate(both, "truth", progress=False).confusion.equals(found.confusion)
    with pytest.raises(rd.PlanError, match="labels that are texts, predictions that are numbers"):
        chips.evaluate(codes, "truth", progress=False)
    with pytest.raises(rd.PlanError, match="twice"):
        chips.evaluate(pa.concat_tables([table, table]), "truth", progress=False)
    with pytest.raises(rd.PlanError, match="a class for each chip, and a map"):
        chips.evaluate(canvases(dealt)[32632].array, "truth", progress=False)
    with pytest.raises(rd.PlanError, match="an evaluation that was loaded"):
        found.error_map(tmp_path / "errors.tif")


# What comes of it


def test_the_map_of_errors_is_pixel_by_pixel(dealt: rd.Chips, tmp_path: Path) -> None:
    maps = canvases(dealt)
    found = dealt.evaluate(stored(maps, tmp_path / "map.zarr"), "mask", progress=False)
    written = found.error_map(tmp_path / "errors", progress=False)
    assert len(written) == 2
    masks, table, totals = masks_of(dealt), dealt.job.chosen_chips(), Counter[int]()
    for path in written:
        with rasterio.open(path) as file:
            values, grid, epsg = file.read(1), file.transform, file.crs.to_epsg()
            assert (file.nodata, file.colormap(1)[2]) == (0, (0xC2, 0x28, 0x4B, 255))
        canvas = maps[epsg]
        assert (grid.c - canvas.west) % 10 == 0
        expected = np.zeros(values.shape, np.uint8)
        for at, row in enumerate(table.select(["epsg", "xmin", "ymax"]).to_pylist()):
            for i, j in np.argwhere(masks[at] != 0).tolist() if row["epsg"] == epsg else ():
                x, y = row["xmin"] + 10 * (j + 0.5), row["ymax"] - 10 * (i + 0.5)
                guess = canvas.at(x, y)
                if guess not in (None, NODATA):
                    place = math.floor((grid.f - y) / 10), math.floor((x - grid.c) / 10)
                    expected[place] = 1 if guess == masks[at, i, j] else 2
        assert (values == expected).all()
        totals += Counter(values[values > 0].tolist())
    assert totals[1] + totals[2] == found.pixels
    assert totals[2] == sum(found.chips["errors"].to_pylist())
    with pytest.raises(rd.PlanError, match="a map of 2 rasters"):
        found.error_map(tmp_path / "errors.tif", progress=False)


def test_it_is_saved_shown_and_drawn(dealt: rd.Chips, tmp_path: Path) -> None:
    chips = dealt.sample(30)
    found = chips.evaluate(
        stored(canvases(dealt), tmp_path / "map.zarr"), "mask", splits=dealt, progress=False
    )
    found.save(tmp_path / "scores.parquet")
    again = Evaluation.load(tmp_path / "scores.parquet")
    assert again.to_dict() == found.to_dict() == json.loads(found.to_json())
    assert again.chips.equals(found.chips)
    assert len(gpd.read_parquet(tmp_path / "scores.parquet")) == len(found.chips) > 0
    chips.save(tmp_path / "chips.parquet")
    with pytest.raises(rd.SchemaError, match="another Parquet file"):
        Evaluation.load(tmp_path / "chips.parquet")
    text = repr(found)
    for part in (
        "accuracy",
        "wheat",
        "where the map does not reach",
        "splits:",
        "to train:",
        "only in map: 4",
    ):
        assert part in text, text
    assert "<table" in found._repr_html_()
    axes = found.plot()
    assert "Errors" in axes.figure.axes[1].get_ylabel()
    import matplotlib.pyplot as plt

    plt.close(axes.figure)


def test_training_plans_are_taken_from_wherever_they_lie(dealt: rd.Chips, tmp_path: Path) -> None:
    few = dealt.select("val").sample(8)
    path = stored(canvases(dealt), tmp_path / "map.zarr")
    expected = few.evaluate(path, "mask", splits=dealt, progress=False)
    dealt.save_plan(tmp_path / "plan")
    dealt.save(tmp_path / "chips.parquet")
    for form in (tmp_path / "plan", tmp_path / "chips.parquet", dealt.table, dealt.select("train")):
        found = few.evaluate(path, "mask", splits=form, progress=False)
        assert found.chips["distance_m"].to_pylist() == expected.chips["distance_m"].to_pylist()


def test_stores_are_training_plans(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["scl"], time="6MS", units="raw").chips(SIZE, cell_km=0.64).split(seed=1)
    chips.select("train").to_zarr(tmp_path / "train.zarr", progress=False)
    test, guess = chips.select("test"), canvases(chips)[32633].array
    for splits in (tmp_path / "train.zarr", rd.open_chips(tmp_path / "train.zarr"), chips):
        found = test.evaluate(guess, "s2", splits=splits, progress=False)
        assert min(found.chips["distance_m"].to_pylist()) == 0  # cells touch
        assert set(found.chips["split"].to_pylist()) == {"test"}


# Bad input


def test_chips_on_train_ground_are_refused(across: rd.Chips, dealt: rd.Chips) -> None:
    other = across.split(0.5, 0.2, 0.3, seed=5)
    guess = canvases(dealt)[32633].array
    with pytest.raises(rd.PlanError, match="on ground of the plan's train chips") as caught:
        other.evaluate(guess, "mask", splits=dealt, progress=False)
    assert "before split()" in caught.value.remedy
    found = across.evaluate(guess, "mask", splits=dealt, progress=False)  # as the remedy says
    assert "train" in found.by_split["split"].to_pylist()


def test_mistakes_are_told_before_anything_is_read(
    one_zone: rd.Chips, dealt: rd.Chips, tmp_path: Path
) -> None:
    (canvas,) = canvases(one_zone).values()
    array = canvas.array
    far = array.assign_coords(x=array.x + 90_000)
    bare = xr.DataArray(array.values, {"y": array.y, "x": array.x}, ("y", "x"))
    many = array.copy(data=np.arange(array.size).reshape(array.shape) % 5000).drop_attrs(deep=False)
    blank = array.copy(data=np.full(array.shape, NODATA, np.uint8))
    array.rio.to_raster(tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif", "r+") as file:
        file.transform = file.transform @ Affine.rotation(10)
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (far, "mask", {}, rd.GridError, "on the ground of no chip"),
        (bare, "mask", {}, rd.GridError, "no CRS"),
        (tmp_path / "map.tif", "mask", {}, rd.GridError, "no axes of its CRS"),
        (array.assign_coords(x=array.x**2), "mask", {}, rd.GridError, "not evenly spaced"),
        (many, "mask", {}, rd.PlanError, r"\d,\d+ different classes"),
        (blank, "mask", {}, rd.PlanError, "nothing to compare"),
        (array, "masks", {}, rd.PlanError, "no 'masks'; expected one of mask"),
        (array, "mask", {"classes": {1: "rye"}}, rd.PlanError, "a name that no label has"),
        (array, "mask", {"band": 3}, rd.PlanError, "no band 3"),
        (array, "mask", {"splits": dealt.select("test")}, rd.PlanError, "no chip of split 'train'"),
        (array, "mask", {"splits": dealt, "distances_m": (5, 1)}, rd.PlanError, "each larger"),
        (array, "mask", {"splits": 3}, rd.PlanError, "a int"),
        (array, "mask", {"splits": pa.table({"split": ["train"]})}, rd.SchemaError, "without column chip_id"),
        (array, "mask", {"regions": "state"}, rd.PlanError, "a column of the chip table"),
        (array, "mask", {"regions": fields_of(one_zone)}, rd.PlanError, r"evaluate\(regions=\).*2 columns"),
        (tmp_path / "none.zarr", "mask", {}, rd.StoreError, "nothing at"),
        (tmp_path, "mask", {}, rd.GridError, "no axes"),
        (7, "mask", {}, rd.PlanError, "a int"),
        (pa.table({"class": [1]}), "mask", {}, rd.SchemaError, "without column chip_id"),
        (array.expand_dims(time=2), "mask", {}, rd.PlanError, "2 bands|time"),
    ]  # fmt: skip
    for guess, labels, more, error, message in cases:
        with pytest.raises(error, match=message):
            one_zone.evaluate(guess, labels, progress=False, **more)
    found = one_zone.evaluate(array, "mask", progress=False)
    for name in ("by_region", "by_distance"):
        with pytest.raises(rd.PlanError, match="an evaluation without"):
            getattr(found, name)
    with pytest.raises(rd.PlanError, match="one of chip_id, split"):
        found.by("crop")


def test_labels_that_hold_several_times_are_refused(s2: rd.Collection) -> None:
    chips = s2.harmonize(["scl"], time="1MS", units="raw").chips(SIZE, cell_km=0.64).sample(2)
    with pytest.raises(rd.PlanError, match="3 slots of time"):
        chips.evaluate(canvases(chips)[32633].array, "s2", progress=False)


# Pure counts


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 5), st.integers(-70_000, 70_000) | st.integers(0, 4)), max_size=60))
def test_pairs_are_counted_once_each(pairs: list[tuple[int, int]]) -> None:
    values = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    found = Pairs.of(values[:, 0], values[:, 1])
    rows = zip(found.truth.tolist(), found.predicted.tolist(), strict=True)
    assert dict(zip(rows, found.pixels.tolist(), strict=True)) == dict(Counter(pairs))


@settings(max_examples=60)
@given(st.integers(1, 5), st.data())
def test_scores_follow_their_definitions(classes: int, data: st.DataObject) -> None:
    cells = st.lists(st.integers(0, 10**12) | st.just(0), min_size=classes**2, max_size=classes**2)
    matrix = np.array(data.draw(cells), dtype=np.int64).reshape(classes, classes)
    for name, score in scored(matrix).items():
        found = overall(matrix)[name]
        assert found == score or found == pytest.approx(score, rel=1e-6, abs=1e-9)
    for k, iou in enumerate(class_scores(matrix)["iou"]):
        whole = matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]
        assert iou == (matrix[k, k] / whole if whole else None)


# From predict


def scores_of(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return a score for each of three classes, of pixels (chip, band, y, x)."""
    red, nir = np.clip(np.nan_to_num(pixels[:, 0]), 0, 1), np.clip(np.nan_to_num(pixels[:, 1]), 0, 1)
    scores = np.stack([red * 6, nir * 2, 0.5 + 0 * red], 1)
    share: NDArray[Any] = scores / scores.sum(axis=1, keepdims=True)
    return share


def test_maps_of_predict_are_read_by_the_names_of_their_classes(s2: rd.Collection, tmp_path: Path) -> None:
    scenes = s2.harmonize(["red", "nir"], time="3MS")
    fields = fields_of(scenes.chips(SIZE, cell_km=0.64))
    chips = scenes.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop", classes=CROPS).sample(20)
    names = {7: "oats", 3: "wheat", 5: "maize"}  # other numbers, in another order, than the mask's
    loaded: Any = chips.load()
    pixels, valid = loaded["pixels"].values[:, 0], np.isfinite(loaded["pixels"].values[:, 0]).all(axis=1)
    codes = np.array([CROPS.index(name) + 1 for name in names.values()])
    guess = codes[np.argmax(scores_of(pixels.astype(np.float32)), axis=1)]
    mask = loaded["mask"].values
    expected = Counter(
        zip(mask[(mask != 0) & valid].tolist(), guess[(mask != 0) & valid].tolist(), strict=True)
    )
    classes, likely = rd.Outputs("classes", classes=names), rd.Outputs("probabilities", classes=names)
    for outputs, to in (
        (classes, "map.zarr"),
        (likely, "likely.zarr"),
        (classes, "map.tif"),
        (likely, "likely.tif"),
    ):
        chips.predict(scores_of, outputs, to=tmp_path / to, progress=False)
        found = chips.evaluate(tmp_path / to, "mask", progress=False)
        assert found.note.nearest == 0
        assert found.left_out["unpredicted"] == 0
        assert found.left_out["invalid"] == ((mask != 0) & ~valid).sum()
        assert {k: v for k, v in found.classes.items() if k in (1, 2, 3)} == dict(enumerate(CROPS, 1))
        for (true, other), count in expected.items():
            assert found.confusion.values[true - 1, other - 1] == count, to
    likely_ones = [
        rasters_of(tmp_path / to, MapRequest("test", is_class=True)) for to in ("likely.tif", "likely.zarr")
    ]
    assert [one.rasters[0].codes for one in likely_ones] == [(7, 3, 5)] * 2, (
        "codes do not depend on names of labels"
    )
    assert [one.names for one in likely_ones] == [names] * 2
    found = chips.evaluate(chips.predict(scores_of, classes, progress=False), "mask", progress=False)
    assert found.confusion.values.sum() == expected.total()
    assert found.confusion.sel(truth="oats", predicted="maize") == expected[3, 2]
