"""chips(grid=): one lattice in a CRS of the user's, a GridSpec, a GeoBox; what they promise, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_records import collection, project, record
from odc.geo import xy_
from odc.geo.geobox import GeoBox
from odc.geo.gridspec import GridSpec
from test_zones import around

import rasteret_dask as rd
from rasteret_dask.chipping.distances import apart_m
from rasteret_dask.chipping.ground import by_ground
from rasteret_dask.chipping.splits import SplitCells
from rasteret_dask.demo.world import World
from rasteret_dask.grid import Lattice, transformer
from rasteret_dask.planning.plan import ChipSpec, CutChips, SplitSpec, from_json, to_json
from rasteret_dask.zones import UTM, CrsGrid, UtmGrid, chip_grid

ALBERS = "+proj=aea +lat_0=50 +lon_0=15 +lat_1=46 +lat_2=54 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
CRSS = ("EPSG:3035", "EPSG:3413", "EPSG:6933", "EPSG:3857", "EPSG:32633", "EPSG:32661", "EPSG:3031")
SPLIT = SplitSpec((("train", 0.5), ("val", 0.25), ("test", 0.25)), 3)


@st.composite
def places(draw: st.DrawFn) -> tuple[Any, tuple[float, float]]:
    """A grid and a place (lon, lat) on its ground."""
    lon, lat = draw(st.floats(-180, 180)), draw(st.floats(-90, 90))
    if draw(st.booleans()):
        return UTM, (lon, lat)
    origin = draw(st.sampled_from([(0.0, 0.0), (-17_367_500.0, 7_314_540.5), (123.0, -77.0)]))
    grid = CrsGrid(draw(st.sampled_from(CRSS)), origin)
    assume(int(grid.codes(lon, lat)) == grid.code)
    return grid, (lon, lat)


@settings(max_examples=150, deadline=None)
@given(places(), st.sampled_from([960.0, 15_360.0, 96_000.0]))
def test_a_place_is_in_one_cell_of_one_zone(place: tuple[Any, tuple[float, float]], side: float) -> None:
    """Place -> zone -> cell -> bounds -> the same zone and cell; no cell of another zone holds it too."""
    grid, (lon, lat) = place
    zones = grid.zones
    code = int(zones.codes(lon, lat))
    x, y = (np.atleast_1d(v) for v in transformer(4326, code).transform(lon, lat))
    lattice = Lattice(side, side / 4, side / 4, zones.origin)
    cell = lattice.split_cells_at(x, y)
    west, south, east, north = lattice.split_bounds(cell)[0]
    assert west <= x[0] <= east
    assert south <= y[0] <= north
    assert east - west == pytest.approx(side)
    assert (lattice.split_cells((west + 1, south + 1, east - 1, north - 1)) == cell).all()
    inner = lattice.chip_cells(cell)
    assert (lattice.split_cell_of(inner) == cell).all()
    bounds = lattice.bounds(inner)
    assert (bounds[:, :2] >= [west - 1e-6, south - 1e-6]).all()
    assert (bounds[:, 2:] <= [east + 1e-6, north + 1e-6]).all()
    held = bounds[zones.holds(code, bounds)]
    centre_lon, centre_lat = transformer(code, 4326).transform(
        held[:, [0, 2]].mean(1), held[:, [1, 3]].mean(1)
    )
    assert (zones.codes(centre_lon, centre_lat) == code).all()
    assert code in zones.near((lon - 1e-3, max(lat - 1e-3, -90.0), lon + 1e-3, min(lat + 1e-3, 90.0)))
    assert zones.has(code)
    assert "/" not in zones.cell_name(code)


@settings(max_examples=100, deadline=None)
@given(places(), st.integers(1, 60), st.integers(0, 5))
def test_the_same_ground_has_one_split(place: tuple[Any, tuple[float, float]], size: int, seed: int) -> None:
    """Windows of any size that lie freely, and those laid out in cells: where they share ground, one split."""
    grid, (lon, lat) = place
    zones, spec = grid.zones, SplitSpec(SPLIT.ratios, seed)
    cells = SplitCells(zones, 960.0)
    code = int(zones.codes(lon, lat))
    x, y = (np.atleast_1d(v)[0] for v in transformer(4326, code).transform(lon, lat))
    lattice = Lattice(960.0, 240.0, 240.0, zones.origin)
    inner = lattice.chip_cells(lattice.split_cells((x - 1000, y - 1000, x + 1000, y + 1000)))
    laid = lattice.bounds(inner)
    held = zones.holds(code, laid)
    laid, inner = laid[held], inner[held]
    rng = np.random.default_rng(seed)
    corner = np.array([x, y]) + rng.uniform(-1000, 1000, (20, 2))
    free = np.concatenate([corner, corner + size * 10.0], axis=1)
    free = free[zones.holds(code, free)]
    splits = [
        by_ground(np.full(len(laid), code), laid, cells, spec, lattice.split_cell_of(inner)),
        by_ground(np.full(len(free), code), free, cells, spec, None),
    ]
    split, box = np.concatenate(splits), shapely.box(*np.concatenate([laid, free]).T)
    box, split = box[split >= 0], split[split >= 0]
    a, b = shapely.STRtree(box).query(box, predicate="intersects")
    differ = split[a] != split[b]
    shared = shapely.area(shapely.intersection(box[a[differ]], box[b[differ]]))
    assert shared.max(initial=0.0) < 0.01


def places_of(chips: rd.Chips) -> dict[tuple[str, int, int], str | None]:
    return {
        (r["cell"], r["row"], r["col"]): r["split"]
        for r in chips.table.drop_columns(["feeds", "geometry"]).to_pylist()
    }


@pytest.mark.parametrize("grid", ["EPSG:3035", "EPSG:6933", ALBERS])
def test_sensors_of_any_crs_share_one_lattice(grid: str) -> None:
    """Ids, bounds and splits depend on the grid alone: not on records, their zones, sensors or sizes of areas."""
    options: dict[str, Any] = {"grid": grid, "cell_km": 1.28, "min_coverage": 0.2}
    one = collection("s2", around(12.0, 48.0, 32632), around(12.0, 48.02, 32633, name="b"))
    other = collection("l8", around(12.01, 48.0, 32633, px=500, name="c"))
    a, b = (places_of(c.chips(32, **options).split(0.5, 0.25, 0.25, seed=3)) for c in (one, other))
    shared = a.keys() & b.keys()
    assert len(shared) > 100
    assert all(a[cell] == b[cell] for cell in shared)
    assert {"train", "val", "test"} <= set(a.values())
    chips = one.chips(32, **options).split(0.5, 0.25, 0.25, seed=3)
    rows = chips.table.drop_columns(["feeds", "geometry"]).to_pylist()
    value = chip_grid(grid)
    assert isinstance(value, CrsGrid)
    assert {row["epsg"] for row in rows} == {value.code}
    assert len({row["chip_id"] for row in rows}) == len(rows)
    assert {row["split"] for row in rows} == {"train", "val", "test"}, "one zone: nothing lies between two"
    report = chips.audit()
    assert report.ok
    lattice = Lattice(1280.0, 320.0, 320.0)
    for row in rows[::17]:
        west, _, _, north = lattice.bounds(np.array([[row["row"], row["col"]]]))[0]
        assert (row["xmin"], row["ymax"]) == (west, north)
        assert row["chip_id"].startswith(
            f"{value.name(value.code)}_1.28km_32px_10m_{row['row']}_{row['col']}"
        )


def covered_cells(rows: list[dict[str, Any]], crs: Any, side: float) -> set[tuple[int, int]]:
    """Cells of a lattice at (0, 0) that some rasters hold whole, by pyproj and shapely alone."""
    there = pyproj.CRS.from_user_input(crs)
    result = set()
    for row in rows:
        a, _, west, _, _, north = dict(row["headers_metadata"])["B04"][0]["transform"]
        wide = a * dict(row["headers_metadata"])["B04"][0]["width"]
        ground = shapely.box(west, north - wide, west + wide, north)
        to = pyproj.Transformer.from_crs(row["proj:epsg"], there, always_xy=True)
        back = pyproj.Transformer.from_crs(there, row["proj:epsg"], always_xy=True)
        x, y = to.transform(*shapely.get_coordinates(shapely.segmentize(ground, 100.0)).T)
        for r in range(int(-max(y) // side), int(-min(y) // side) + 1):
            for c in range(int(min(x) // side), int(max(x) // side) + 1):
                box = shapely.box(c * side, -(r + 1) * side, (c + 1) * side, -r * side)
                if ground.contains(
                    shapely.Polygon(np.stack(back.transform(*shapely.get_coordinates(box).T), -1))
                ):
                    result.add((r, c))
    return result


@pytest.mark.parametrize(
    ("grid", "lon", "lat", "epsg"),
    [
        ("EPSG:3035", 24.0, 68.0, 32634), ("EPSG:6933", 24.0, 70.0, 32634), ("EPSG:3857", -70.0, -50.0, 32719),
        ("EPSG:3413", -45.0, 60.5, 32623), ("EPSG:3031", 60.0, -70.0, 32741), ("EPSG:5070", -100.0, 40.0, 32614),
    ],
)  # fmt: skip
def test_no_cell_of_a_record_is_overlooked(grid: str, lon: float, lat: float, epsg: int) -> None:
    row = around(lon, lat, epsg, px=700)
    wanted = covered_cells([row], grid, 320.0)
    assert len(wanted) > 100
    chips = collection("s2", row).chips(32, grid=grid, cell_km=0.64)
    places = {(r, c) for _, r, c in places_of(chips)}
    assert wanted <= places
    assert len(places) <= len(wanted) * 1.02 + 2  # a chip's edges are straight on the raster's own map


def test_the_edges_of_a_map_are_no_edges_of_the_ground() -> None:
    """Across the antimeridian a map of the world has two edges: chips lie on both sides, and none sticks out."""
    rows = [around(180.0, -17.0, 32660, px=1000), around(180.0, -17.0, 32601, px=1000, name="b")]
    chips = collection("s2", *rows).chips(32, grid="EPSG:6933", cell_km=0.96).split(0.5, 0.25, 0.25, seed=1)
    xmin = chips.table.column("xmin").to_numpy()
    assert (xmin < -17_360_000).any()
    assert (xmin > 17_350_000).any()
    assert np.abs(xmin).min() > 17_350_000
    edge = pyproj.Transformer.from_crs(4326, 6933, always_xy=True).transform(180.0, 0.0)[0]
    assert (chips.table.column("xmax").to_numpy() <= edge).all()
    assert chips.audit().ok


# GridSpec, GeoBox


def test_tiles_of_a_gridspec_are_split_cells() -> None:
    spec = GridSpec("EPSG:3035", (128, 128), 10, origin=xy_(4_321_005.0, 3_210_005.0))
    chips = collection("s2", around(12.0, 48.0, 32632)).chips(32, grid=spec).split(0.5, 0.25, 0.25, seed=1)
    for row in chips.table.drop_columns(["feeds", "geometry"]).to_pylist():
        _, r, c = row["cell"].split("/")
        tile = spec.tile_geobox((int(c), -1 - int(r))).boundingbox  # its rows count northwards
        assert tile.left <= row["xmin"] < row["xmax"] <= tile.right
        assert tile.bottom <= row["ymin"] < row["ymax"] <= tile.top
        assert row["chip_id"].startswith("epsg3035at4321005_3210005_1.28km_")
    finer = collection("s2", around(12.0, 48.0, 32632)).chips(32, grid=spec, cell_km=0.64)
    assert isinstance(finer.plan, CutChips)
    assert finer.plan.spec.cell_km == 0.64
    with pytest.raises(rd.GridError, match=r"pixels of 10 m.*harmonize\(resolution=10\)"):
        _ = (
            collection("s2", around(12.0, 48.0, 32632))
            .harmonize(["red"], resolution=20)
            .chips(16, grid=spec)
            .table
        )


# What is refused


FEET = "EPSG:2263"


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("EPSG:4326", ("degree", "'EPSG:3035'", "'utm'")),
        (pyproj.CRS(4326), ("EPSG:4326", "degree")),
        (FEET, ("US survey foot", "EPSG:2263", "metres")),
        ("EPSG:999999", ("999999",)),
        (GeoBox((100, 100), Affine(1e-4, 0, 15, 0, -1e-4, 48), "EPSG:4326"), ("degree", "GeoBox")),
        (GridSpec("EPSG:4326", (100, 100), 0.001), ("degree",)),
    ],
)
def test_grids_without_metres_are_refused(grid: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(rd.GridError) as caught:
        collection("s2", record("a")).chips(32, grid=grid)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("cells", ("'cells'", "'utm'", "'EPSG:3035'")),
        (GeoBox((100, 100), Affine(10, 1, 5e5, 1, -10, 5e6), "EPSG:32633"), ("rotated", "north-up")),
        (GeoBox((100, 100), Affine(10, 0, 5e5, 0, -20, 5e6), "EPSG:32633"), ("10 x -20", "square")),
        (GeoBox((100, 100), Affine(10, 0, 5e5, 0, -10, 5e6), None), ("without a CRS",)),
        (GridSpec("EPSG:3035", (100, 200), 10), ("200 x 100", "square")),
    ],
)
def test_what_is_no_grid_is_refused(grid: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(rd.PlanError) as caught:
        collection("s2", record("a")).chips(32, grid=grid)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_sources_beyond_the_extent_are_named() -> None:
    own = collection("s2", around(151.0, -33.0, 32756))
    for grid in (
        "EPSG:3035",
        "EPSG:3413",
        GeoBox((100, 100), Affine(10, 0, 5e5, 0, -10, 5.4e6), "EPSG:32633"),
    ):
        with pytest.raises(rd.RasteretDaskError, match=r"grid='(EPSG:3035|EPSG:3413|GeoBox.*)'.*s2"):
            _ = own.chips(32, grid=grid).table


# A plan carries its grid


BOX = GeoBox.from_bbox((5e5, 5e6, 6e5, 5.1e6), "EPSG:32633", resolution=10)
GRIDS: dict[str, Any] = {
    "utm": "utm", "zone": "zone", "tiles": "tiles", "a code": "EPSG:3035", "WKT": pyproj.CRS(ALBERS).to_wkt(),
    "pyproj": pyproj.CRS(3035), "rasterio": rasterio.CRS.from_epsg(6933),
    "a GridSpec": GridSpec("EPSG:6933", (512, 512), 30), "a GeoBox": BOX,
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_a_value_that_becomes_json(name: str) -> None:
    value = chip_grid(GRIDS[name])
    spec = ChipSpec(32, 32, grid=value)
    again = from_json(json.loads(json.dumps(to_json(spec))))
    assert again == spec
    assert hash(again) == hash(spec)
    assert chip_grid(value) is value


def test_two_words_for_one_grid() -> None:
    own = collection("s2", record("a"))
    assert own.chips(32, grid="zone").plan == own.chips(32).plan == own.chips(32, grid=UtmGrid()).plan
    assert own.chips(32, grid="EPSG:3035").plan == own.chips(32, grid=pyproj.CRS(3035)).plan
    assert own.chips(32, grid="EPSG:32733").plan == own.chips(32, grid="EPSG:32633").plan


# Distances


@pytest.mark.parametrize("grid", ["EPSG:6933", "EPSG:3857", "EPSG:3035"])
def test_a_buffer_is_as_wide_on_the_ground(grid: str) -> None:
    """At 62 N a metre of EPSG:6933 is 0.54 to 1.85 m of ground, one of EPSG:3857 0.47 m."""
    own = collection("s2", around(20.0, 62.0, 32634, px=1200))
    chips = own.chips(16, grid=grid, cell_km=1.28).split(0.5, 0.5, 0.0, seed=2, buffer_m=300.0)
    rows = chips.table.drop_columns(["feeds", "geometry"]).to_pylist()
    ground = {}
    for split in ("train", "val"):
        box = np.array(
            [[r[n] for n in ("xmin", "ymin", "xmax", "ymax")] for r in rows if r["split"] == split]
        )
        shapes = shapely.segmentize(shapely.box(*box.T), 40.0)
        ground[split] = shapely.union_all(np.asarray(project(shapes, rows[0]["epsg"], 32634)))
    gap = shapely.distance(ground["train"], ground["val"])
    assert 299.0 < gap < 650.0
    report = chips.audit()
    assert report.distance_m["train-val"] == pytest.approx(gap, rel=2e-3)
    assert ("of equal area" in report.measured) == (grid != "EPSG:3857")
    assert "on the ground" in report.measured


def test_distances_of_a_zone_are_its_map_s() -> None:
    a, b = (np.array([shapely.box(x, 0, x + 1, 1)], dtype=object) for x in (5e5, 6e5))
    assert apart_m(32633, a, b)[0] == 1e5 - 1
    assert apart_m(32661, a, b)[0] != 1e5 - 1


def test_the_page_s_blocks_run(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(tmp_path / "cache"))
    page = (Path(__file__).parents[1] / "docs" / "grids.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "grids.md", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("_")[0] for line in shown[:3]] == ["33", "epsg3035", "epsg6933"]
    assert shown[3].startswith("100.0% of ")
    shares = [float(line.split()[1].rstrip("%")) for line in shown[4:7]]
    assert shares[2] == 100 > max(shares[:2])
    assert "of each split cell" in shown[7]
    assert shown[8] == "metres on the ground; EPSG:3035 is a map of equal area"
    assert "counts in degree" in shown[9]
