# SPDX-License-Identifier: Apache-2.0
"""Predictions beside labels: every count equals what plain NumPy counts, pixel by pixel, whoever counts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
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
    ratio = lambda a, b: float(a) / float(b) if b else None  # noqa: E731
    precision = [ratio(matrix[k, k], matrix[:, k].sum()) for k in classes]
    recall = [ratio(matrix[k, k], matrix[k].sum()) for k in classes]
    f1 = [ratio(2 * matrix[k, k], matrix[k].sum() + matrix[:, k].sum()) for k in classes]
    iou = [ratio(matrix[k, k], matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in classes]
    mean = lambda v: float(np.mean(own)) if (own := [x for x in v if x is not None]) else None  # noqa: E731
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
