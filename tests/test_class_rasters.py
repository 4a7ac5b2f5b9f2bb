# SPDX-License-Identifier: Apache-2.0
"""Splits and folds by the classes of a raster: shares counted again by rasterio and NumPy, requests counted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from made_records import collection, record
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import calculate_default_transform, reproject
from servers import serving

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import Split, from_json, to_json

WEST, NORTH, PIXEL, PX = 500_000.0, 5_600_000.0, 10.0, 2048
CLASSES = (10, 30, 40, 80)
CELL_KM = 2.56
RATIOS: dict[str, Any] = {"train": 0.6, "val": 0.2, "test": 0.2}
TILE = 256


def landscape() -> NDArray[np.uint8]:
    """Return fields of 320 m, each class mostly in one corner of the ground, and no class in a strip at the edge."""
    rng = np.random.default_rng(3)
    fields = PX // 32
    y, x = np.mgrid[0:fields, 0:fields] / fields
    weight = np.stack([1.1 - x, x * y, y * (1.1 - x), 0.15 * np.ones_like(x)], -1) + 0.05
    drawn = (rng.random((fields, fields, 1)) > np.cumsum(weight / weight.sum(-1, keepdims=True), -1)).sum(-1)
    pixels = np.kron(np.array(CLASSES, dtype=np.uint8)[drawn], np.ones((32, 32), dtype=np.uint8))
    pixels[:, :40] = 0
    return np.ascontiguousarray(pixels)


def geotiff(path: Path, overviews: bool = True, west: float = WEST) -> Path:
    profile = {
        "driver": "GTiff", "width": PX, "height": PX, "count": 1, "dtype": "uint8", "crs": 32633, "nodata": 0,
        "transform": from_origin(west, NORTH, PIXEL, PIXEL), "tiled": True, "blockxsize": TILE, "blockysize": TILE,
        "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(landscape(), 1)
        if overviews:
            file.build_overviews([2, 4, 8, 16], Resampling.nearest)
    return path


@pytest.fixture(scope="module")
def cover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return geotiff(tmp_path_factory.mktemp("cover") / "cover.tif")


@pytest.fixture(scope="module")
def chips() -> rd.Chips:
    scene = collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH)).harmonize(["red"], time="1MS")
    return scene.chips(64, cell_km=CELL_KM)


def shares(path: Path, bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each class on some boxes together, from every pixel of the file."""
    with rasterio.open(path) as file:
        pixels = file.read(1)
    inside = np.zeros(pixels.shape, dtype=bool)
    places = np.rint((bounds - [WEST, NORTH, WEST, NORTH]) / PIXEL).astype(int)
    for xmin, ymin, xmax, ymax in places.tolist():
        inside[max(-ymax, 0) : max(-ymin, 0), max(xmin, 0) : max(xmax, 0)] = True
    counts = np.array([(pixels[inside] == value).sum() for value in CLASSES], dtype=float)
    return np.asarray(counts / counts.sum())


def boxes(chips: rd.Chips, column: str, value: Any) -> NDArray[np.float64]:
    table = chips.table.filter(pa.compute.equal(chips.table[column], value))
    return np.asarray(table.select(["xmin", "ymin", "xmax", "ymax"]).to_pandas())


def off(chips: rd.Chips, path: Path, column: str, values: Any) -> float:
    """Return how far a class's share of any split's ground is from its share of all ground."""
    every = np.asarray(chips.table.select(["xmin", "ymin", "xmax", "ymax"]).to_pandas())
    whole = shares(path, every)
    return max(float(np.abs(shares(path, boxes(chips, column, value)) - whole).max()) for value in values)


def by_cell(table: pa.Table) -> dict[str, Any]:
    cell, what = table.column_names
    return dict(zip(table[cell].to_pylist(), table[what].to_pylist(), strict=True))


def counted(chips: rd.Chips) -> pa.Table:
    """Return what was counted for the last step, which lies in the plan."""
    assert isinstance(chips.plan, Split)
    table = chips.query.tables[str(chips.plan.spec.raster)]
    assert isinstance(table, pa.Table)
    return table


def test_counts_are_those_of_the_ground_of_cells(chips: rd.Chips, cover: Path) -> None:
    table = counted(chips.split(**RATIOS, stratify=cover))
    assert table.column_names == ["cell", *(str(value) for value in CLASSES)]
    ids = set(chips.table["cell"].to_pylist())
    assert ids <= set(table["cell"].to_pylist())
    for row in table.to_pylist():
        if row["cell"] in ids:
            _, r, c = (int(part) for part in row["cell"].split("/"))
            box = np.array([[c, -r - 1, c + 1, -r]]) * CELL_KM * 1000.0
            points = np.array([row[str(value)] for value in CLASSES])
            assert points.sum() <= 64 * 64
            np.testing.assert_allclose(points / points.sum(), shares(cover, box), atol=0.02)


def test_shares_hold_in_every_split_and_fold(chips: rd.Chips, cover: Path) -> None:
    split = chips.split(**RATIOS, seed=2, stratify=cover)
    assert (
        off(split, cover, "split", RATIOS)
        <= 0.02
        < 0.04
        < off(chips.split(**RATIOS, seed=2), cover, "split", RATIOS)
    )
    audit = split.audit()
    assert audit.ok
    assert audit.deviation("cover") <= 0.01
    assert set(audit.classes["cover"]) == {str(value) for value in CLASSES}
    folds = chips.folds(4, seed=2, stratify=cover)
    assert (
        off(folds, cover, "fold", range(4))
        <= 0.02
        < 0.04
        < off(chips.folds(4, seed=2), cover, "fold", range(4))
    )
    for i in range(4):
        fold = folds.fold(i).audit()
        assert fold.ok
        assert fold.deviation("cover") <= 0.02


def test_the_same_raster_named_in_four_ways(chips: rd.Chips, cover: Path, tmp_path: Path) -> None:
    own = chips.split(**RATIOS, seed=1, stratify=cover)
    classes = rd.build_from_files(str(cover), name="cover", static=True, kinds={"band": "class"})
    assert counted(chips.split(**RATIOS, stratify=classes)).equals(counted(own))
    scene = collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH)).harmonize(["red"], time="1MS")
    joined = rd.join(s2=scene, land=classes.harmonize(["band"], resolution=20)).chips(64, cell_km=CELL_KM)
    for name in ("land", "land/band"):
        dealt = joined.split(**RATIOS, seed=1, stratify=name)
        assert counted(dealt).equals(counted(own))
        assert dealt.split_cells.equals(own.split_cells)
    pq.write_table(counted(own), tmp_path / "counts.parquet")
    for table in (counted(own), tmp_path / "counts.parquet"):
        again = chips.split(**RATIOS, seed=1, stratify=table)
        assert again.split_cells.equals(own.split_cells)
        assert again.plan == own.plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "stratify=<classes of cover in" in repr(own)
    assert from_json(to_json(own.plan)) == own.plan


def test_no_cell_moves_when_the_ground_grows(chips: rd.Chips, cover: Path, tmp_path: Path) -> None:
    west = chips.filter("xmax", "<", WEST + 12_000)
    first = west.split(**RATIOS, seed=1, stratify=cover)
    first.save_plan(tmp_path / "plan")
    for cells in (first, tmp_path / "plan", first.split_cells):
        later = chips.split(**RATIOS, seed=5, stratify=cover, cells=cells)
        assert by_cell(first.split_cells).items() <= by_cell(later.split_cells).items()
        assert off(later, cover, "split", RATIOS) <= 0.04
    folded = west.folds(3, seed=1, stratify=cover)
    folded.save_plan(tmp_path / "folds")
    for folds in (folded, tmp_path / "folds", folded.fold_cells):
        more = chips.folds(3, seed=5, stratify=cover, cells=folds)
        assert by_cell(folded.fold_cells).items() <= by_cell(more.fold_cells).items()
    assert set(folded.fold_cells["fold"].to_pylist()) == {0, 1, 2}


def in_degrees(cover: Path, path: Path) -> Path:
    """Write the same raster in degrees, as land cover maps of the world are."""
    with rasterio.open(cover) as file:
        transform, width, height = calculate_default_transform(file.crs, 4326, PX, PX, *file.bounds)
        pixels = np.zeros((height, width), dtype=np.uint8)
        where = {"src_transform": file.transform, "src_crs": file.crs, "src_nodata": 0}
        reproject(
            file.read(1),
            pixels,
            **where,
            dst_transform=transform,
            dst_crs=4326,
            resampling=Resampling.nearest,
        )
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": "uint8", "crs": 4326, "nodata": 0,
        "transform": transform, "tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels, 1)
        file.build_overviews([2, 4], Resampling.nearest)
    return path


def test_a_raster_in_degrees_counts_the_same(chips: rd.Chips, cover: Path, tmp_path: Path) -> None:
    mine = counted(chips.split(**RATIOS, stratify=cover)).to_pandas().set_index("cell")
    theirs = counted(chips.split(**RATIOS, stratify=in_degrees(cover, tmp_path / "deg.tif")))
    both = mine.join(theirs.to_pandas().set_index("cell"), rsuffix=" deg", how="inner")
    whole = both[both[[str(value) for value in CLASSES]].sum(axis=1) > 4000]
    assert len(whole) >= 36
    for value in CLASSES:
        assert (whole[str(value)] - whole[f"{value} deg"]).abs().max() <= 0.03 * 64 * 64


def test_cells_of_a_grid_in_any_crs(cover: Path) -> None:
    scene = collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH)).harmonize(["red"], time="1MS")
    laea = scene.chips(64, cell_km=CELL_KM, grid="EPSG:3035")
    dealt = laea.split(**RATIOS, seed=2, stratify=cover)
    assert set(laea.table["cell"].to_pylist()) <= set(counted(dealt)["cell"].to_pylist())
    audit = dealt.audit()
    assert audit.ok
    assert audit.deviation("cover") <= 0.02


@pytest.mark.filterwarnings("ignore::rasteret_dask.errors.StrataWarning")
def test_windows_at_points_count_with_their_cells(cover: Path) -> None:
    rng = np.random.default_rng(4)
    xy = rng.uniform(600, PX * PIXEL - 600, (300, 2))
    at = gpd.GeoDataFrame(geometry=gpd.points_from_xy(WEST + xy[:, 0], NORTH - xy[:, 1]), crs=32633)
    scene = collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH)).harmonize(["red"], time="1MS")
    points = scene.chips(16, at=at, cell_km=CELL_KM)
    dealt = points.split(**RATIOS, seed=1, stratify=cover)
    assert dealt.audit().ok
    assert dealt.audit().deviation("cover") <= 0.02
    every = counted(dealt)
    assert set(dealt.split_cells["cell"].to_pylist()) >= set(every["cell"].to_pylist()) - {None}


def test_a_coarse_overview_is_all_that_is_read(chips: rd.Chips, cover: Path) -> None:
    """Cells of 2.56 km have points 40 m apart: of pixels of 10 m, the overview of a fourth, which has four tiles."""
    with serving(cover.parent) as server:
        url = server.url("cover.tif")
        rd.build_from_files(url, name="cover", static=True)
        header = len(server.log)
        server.log.clear()
        dealt = chips.split(**RATIOS, stratify=url)
        assert counted(dealt).num_rows >= 64
        tiles = [asked for asked in server.log if asked.method == "GET"]
        assert len(tiles) <= header + (PX // 4 // TILE) ** 2
        log = len(server.log)
        assert dealt.audit().ok
        assert len(dealt.folds(3)) == len(chips)
        assert len(server.log) == log  # counted once: planning asks for nothing


def test_without_overviews_each_tile_is_fetched_once(chips: rd.Chips, tmp_path: Path) -> None:
    plain = geotiff(tmp_path / "plain.tif", overviews=False)
    with serving(tmp_path) as server:
        dealt = chips.split(**RATIOS, stratify=server.url("plain.tif"))
        assert len(server.log) <= (PX // TILE) ** 2 + 4
    assert by_cell(dealt.split_cells) == by_cell(chips.split(**RATIOS, stratify=plain).split_cells)


def test_a_recipe_says_it(chips: rd.Chips, cover: Path, tmp_path: Path) -> None:
    dealt = chips.split(**RATIOS, seed=1, stratify=cover).folds(3, stratify=cover)
    dealt.to_recipe(tmp_path / "land.toml")
    text = (tmp_path / "land.toml").read_text()
    assert 'stratify = "land-split-classes.parquet"' in text
    again = rd.load_recipe(tmp_path / "land.toml").chips()
    assert again.table.select(["chip_id", "split", "fold"]).equals(
        dealt.table.select(["chip_id", "split", "fold"])
    )
    assert again.fold_cells.equals(dealt.fold_cells)


def test_a_recipe_by_hand(cover: Path, tmp_path: Path) -> None:
    text = f"""
[collections.s2]
files = "{cover}"
static = true
kinds = {{ band = "class" }}
[collections.land]
files = "{cover}"
static = true
[chips]
COLLECTION
size = 64
cell_km = {CELL_KM}
[split]
train = 0.6
val = 0.4
stratify = STRATA
[[steps]]
folds = {{ k = 3, stratify = STRATA }}
"""
    made = []
    for strata, cut in ((f'"{cover.name}"', 'collection = "s2"'), ('{ collection = "land" }', "")):
        (cover.parent / "own.toml").write_text(text.replace("STRATA", strata).replace("COLLECTION", cut))
        made.append(rd.load_recipe(cover.parent / "own.toml").chips())
    assert made[0].split_cells.equals(made[1].split_cells)
    assert made[0].fold_cells.equals(made[1].fold_cells)
    (cover.parent / "own.toml").write_text(
        text.replace("STRATA", '{ collection = "lamd" }').replace("COLLECTION", 'collection = "s2"')
    )
    with pytest.raises(rd.RasteretDaskError, match=r"lamd.*land"):
        rd.load_recipe(cover.parent / "own.toml").chips()


def test_bad_rasters(chips: rd.Chips, cover: Path, tmp_path: Path) -> None:
    far = geotiff(tmp_path / "far.tif", west=WEST + 90_000)
    measured = collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH))
    cases: list[tuple[Any, str]] = [
        ("soil", "no column 'soil'.*GeoTIFF"),
        (measured.harmonize(["red"]), "bands red, of which 0 hold classes"),
        (far, "no record of the raster on the ground of the chips"),
        (measured.harmonize(["red", "nir"]), r"bands red, nir, of which 0 hold classes.*kinds="),
        (pa.table({"cell": ["33/1/1"], "oats": ["x"]}), "column 'oats' with other values"),
        (pa.table({"cell": ["33/1/1"] * 2, "oats": [1, 2]}), "each split cell once"),
        (pa.table({"oats": [1, 2]}), "column cell"),
        (3, "a raster of classes"),
    ]
    for stratify, words in cases:
        with pytest.raises(PlanError, match=words):
            _ = chips.split(**RATIOS, stratify=stratify).table
    with pytest.raises(PlanError, match=r"folds\(stratify='far'\)"):
        chips.folds(3, stratify=far)
    with pytest.raises(PlanError, match="by='ground'"):
        chips.split(by="epsg", stratify=cover)


def test_an_overview_s_pixels_are_those_of_the_file(cover: Path) -> None:
    """``resampling="overview"`` on a grid of 40 m: the overview of a fourth, pixel by pixel; else the image's own."""
    classes = rd.build_from_files(str(cover), name="cover", static=True, kinds={"band": "class"})
    for resampling, options in (("overview", {"overview_level": 1}), (None, {})):
        coarse = classes.harmonize(["band"], resolution=40, resampling=resampling)  # type: ignore[arg-type]
        loaded: Any = coarse.chips(64, cell_km=CELL_KM).load()
        with rasterio.open(cover, **options) as file:
            whole = file.read(1)
        step = whole.shape[0] // (PX // 4)
        corner = np.stack([NORTH - loaded["bounds"].values[:, 3], loaded["bounds"].values[:, 0] - WEST], -1)
        for chip, (row, col) in zip(loaded["pixels"].values, (corner / 40).astype(int).tolist(), strict=True):
            mine = chip[0, 0]
            own = whole[row * step : (row + 64) * step, col * step : (col + 64) * step]
            if step == 1:
                np.testing.assert_array_equal(mine, own)
            else:  # nearest: one of the pixels around the middle
                assert {*np.unique(mine)} <= {*np.unique(own)}
