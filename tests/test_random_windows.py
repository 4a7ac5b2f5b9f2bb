# SPDX-License-Identifier: Apache-2.0
"""Random windows: on whole pixels of planned ground, in one split; by class, as many as counting says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import from_bounds

import rasteret_dask as rd
from rasteret_dask.planning.sampling import unit_sequence

SIZE = 32
CROPS = ["maize", "rape", "wheat"]


@pytest.fixture(scope="module")
def optical(s2: rd.Collection) -> rd.Collection:
    return s2.harmonize(["red", "nir"], time="3MS", pick="median")


@pytest.fixture(scope="module")
def fields(optical: rd.Collection) -> gpd.GeoDataFrame:
    """Return fields of three crops: maize everywhere, wheat on a third as much ground, rape in one corner."""
    west, south, east, north = optical.chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633).total_bounds
    rng = np.random.default_rng(3)
    points = shapely.points(rng.uniform(west, east, 40), rng.uniform(south, north, 40))
    corner = shapely.box(west + 500, south + 500, west + 620, south + 560)
    return gpd.GeoDataFrame(
        {"crop": [*(["maize", "maize", "maize", "wheat"] * 10), "rape"], "number": [*range(1, 41), 7]},
        geometry=[*shapely.buffer(points, 150), corner],
        crs=32633,
    )


@pytest.fixture(scope="module")
def chips(optical: rd.Collection, fields: gpd.GeoDataFrame) -> rd.Chips:
    made = optical.chips(SIZE, cell_km=0.96, labels=fields, rasterize="crop").split(0.5, 0.25, 0.25, seed=1)
    assert len(made)
    return made


def bounds(table: pa.Table) -> NDArray[np.float64]:
    return np.stack([table.column(name).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")], -1)


def pixels(table: pa.Table, pixel: float = 10.0) -> list[set[tuple[int, int]]]:
    """Return the pixels of each chip, counted from the CRS's origin; of one CRS."""
    found = []
    for west, south, east, north in np.round(bounds(table) / pixel).astype(int).tolist():
        found.append({(y, x) for y in range(south, north) for x in range(west, east)})
    return found


def ids(chips: rd.Chips) -> list[str]:
    return list(chips.table.column("chip_id").to_pylist())


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 60), st.integers(0, 5), st.sampled_from([8, 20, SIZE, 48]), st.booleans())
def test_windows_lie_on_whole_pixels_of_planned_ground_in_one_split(
    chips: rd.Chips, n: int, seed: int, size: int, holes: bool
) -> None:
    ground = chips.filter(("row", "!=", chips.table.column("row")[0].as_py())) if holes else chips
    windows = ground.random(n, seed=seed, size=size)
    table = windows.table
    assert table.num_rows == n == len(set(ids(windows)))
    np.testing.assert_allclose(bounds(table) / 10, np.round(bounds(table) / 10), atol=1e-9)
    assert (np.diff(bounds(table)[:, [0, 2]]) == size * 10).all()
    covered: dict[tuple[str, str], set[tuple[int, int]]] = {}
    rows = ground.table.select(["cell", "split"]).to_pylist()
    for row, own in zip(rows, pixels(ground.table), strict=True):
        covered.setdefault((row["cell"], row["split"]), set()).update(own)
    for row, own in zip(table.select(["cell", "split"]).to_pylist(), pixels(table), strict=True):
        assert own <= covered[row["cell"], row["split"]]
    assert ids(ground.random(n, seed=seed, size=size)) == ids(windows)
    assert set(ids(ground.random(max(n // 2, 1), seed=seed, size=size))) <= set(ids(windows))
    assert windows.audit().ok


def test_seeds_draw_other_windows_and_every_place_is_as_likely(chips: rd.Chips) -> None:
    first, second = chips.random(300, seed=1, size=8), chips.random(300, seed=2, size=8)
    assert len(set(ids(first)) & set(ids(second))) < 5
    # of windows that are far smaller than cells, each chip holds about as many middles
    centre = bounds(first.table).reshape(-1, 2, 2).mean(1)
    box = bounds(chips.table)
    held = ((box[:, None, :2] <= centre) & (centre < box[:, None, 2:])).all(-1).sum(1)
    assert held.sum() == 300
    assert held.max() < 12 * 300 / len(chips)
    unit = unit_sequence("law", np.arange(20_000, dtype=np.uint64))
    counts = np.histogram(unit, 20, (0, 1))[0]
    assert (
        (counts - 1000) ** 2 / 1000
    ).sum() < 45  # chi-squared of 19 degrees of freedom: 1 in 1,000 above 43.8
    assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("size", [SIZE - 3, SIZE])
def test_far_more_windows_than_there_are_end_with_nearly_all_of_them(chips: rd.Chips, size: int) -> None:
    """How many are tried follows from the ground: an n of a typing error does not go on for hours."""
    few = chips.filter(("row", "==", chips.table.column("row")[0].as_py()))
    ground: dict[tuple[str, str], set[tuple[int, int]]] = {}
    rows = few.table.select(["cell", "split"]).to_pylist()
    for row, own in zip(rows, pixels(few.table), strict=True):
        ground.setdefault((row["cell"], row["split"]), set()).update(own)
    places = 0
    for own in ground.values():
        for north, west in own:
            window = ((north + y, west + x) for y in range(size) for x in range(size))
            places += all(pixel in own for pixel in window)
    with pytest.warns(UserWarning, match="hardly any more different windows"):
        windows = ids(few.random(10**9, size=size))
    assert len(set(windows)) == len(windows)
    assert 0.97 * places <= len(windows) <= places
    with pytest.warns(UserWarning, match="hardly any"):
        assert ids(few.random(10**8, size=size)) == windows


def test_pixels_are_those_of_the_cube_at_that_place(s2: rd.Collection, optical: rd.Collection) -> None:
    windows = optical.chips(SIZE, cell_km=0.96).random(5, seed=4, size=20)
    loaded = windows.load()
    assert isinstance(loaded, xr.Dataset)
    for at, own in enumerate(bounds(windows.table).tolist()):
        cube = optical.cube(bounds=tuple(own), crs=32633).compute()
        np.testing.assert_array_equal(loaded["pixels"].values[at], cube.values)
    single = s2.harmonize(["red"]).chips(SIZE, cell_km=0.96).random(6, seed=4, size=20)
    assert len(single) == 6
    assert not single.table.column("acquisition").null_count
    loaded = single.load()
    assert isinstance(loaded, xr.Dataset)
    for at, own in enumerate(bounds(single.table).tolist()):
        cube = s2.harmonize(["red"]).cube(bounds=tuple(own), crs=32633, min_coverage=1.0).compute()
        when = loaded["datetime"].values[at, 0]
        own_slot = np.flatnonzero(cube["time"].values.astype("datetime64[us]") == when)
        assert len(own_slot) == 1
        np.testing.assert_array_equal(loaded["pixels"].values[at], cube.values[own_slot])


def test_joined_sources_keep_their_own_pixels(s2: rd.Collection) -> None:
    joined = rd.join(
        optical=s2.harmonize(["red"], time="3MS"), cover=s2.harmonize(["scl"], time="3MS", resolution=20)
    )
    chips = joined.chips(SIZE, cell_km=0.96)
    windows = chips.random(12, seed=2, size=20)
    corner = bounds(chips.table)[0, :2]
    assert not np.mod(bounds(windows.table)[:, :2] - corner, 20).any()  # whole pixels of 20 m
    tree: Any = windows.load()
    assert tree["cover"]["pixels"].shape[-2:] == (10, 10)
    for at, own in enumerate(bounds(windows.table).tolist()):
        cube = s2.harmonize(["scl"], time="3MS", resolution=20).cube(bounds=tuple(own), crs=32633).compute()
        np.testing.assert_array_equal(tree["cover"]["pixels"].values[at], cube.values)
    with pytest.raises(rd.GridError, match="Nearest sizes that fit: 20, 22"):
        len(chips.random(3, size=21))


def masks_of(windows: rd.Chips, fields: gpd.GeoDataFrame, values: list[int]) -> NDArray[np.uint8]:
    """Return what rasterio burns into windows, by way of the CRS that fields travel in."""
    made = []
    travelled = fields.to_crs(4326).to_crs(32633).geometry
    for box in bounds(windows.table).tolist():
        size = round((box[2] - box[0]) / 10)
        grid = from_bounds(*box, size, size)
        made.append(
            rasterize(zip(travelled, values, strict=True), (size, size), transform=grid, dtype="uint8")
        )
    return np.stack(made)


def test_burned_classes_get_equally_many_windows_with_their_pixels_in_the_middle(
    chips: rd.Chips, fields: gpd.GeoDataFrame
) -> None:
    windows = chips.random(61, seed=3, balance="crop", size=20)
    drawn = windows.table.column("centre_class").to_pylist()
    assert Counter(drawn) == {"maize": 21, "rape": 20, "wheat": 20}
    masks = masks_of(windows, fields, [1 + CROPS.index(crop) for crop in fields["crop"]])
    loaded = windows.load()
    assert isinstance(loaded, xr.Dataset)
    order = [ids(windows).index(one) for one in loaded["chip_id"].values.tolist()]  # split by split
    np.testing.assert_array_equal(loaded["mask"].values, masks[order])
    assert [CROPS[value - 1] for value in masks[:, 10, 10]] == drawn
    assert loaded["centre_class"].values.tolist() == [drawn[at] for at in order]
    fewer = chips.random(30, seed=3, balance="crop", size=20)
    assert set(ids(fewer)) < set(ids(windows))
    plain = masks_of(chips.random(61, seed=3, size=20), fields, [c == "rape" for c in fields["crop"]])
    assert plain[:, 10, 10].sum() <= 2  # without balance, the rare class is hardly ever there


def test_columns_of_classes_and_shares_are_balanced(chips: rd.Chips) -> None:
    names = np.where(np.arange(len(chips)) < 4, "rare", "common")
    table = pa.table({"chip_id": chips.table.column("chip_id"), "kind": names})
    wide = chips.with_table(table)
    windows = wide.random(40, seed=1, size=16, balance="kind")
    assert Counter(windows.table.column("centre_class").to_pylist()) == {"rare": 20, "common": 20}
    assert windows.table.column("kind").equals(windows.table.column("centre_class"))
    shares = chips.class_shares("s2/mask", progress=False)
    columns = [f"share_{crop}" for crop in CROPS]
    drawn = chips.with_table(shares).random(60, seed=1, size=16, balance=columns).table
    assert Counter(drawn.column("centre_class").to_pylist()) == dict.fromkeys(columns, 20)
    for row in drawn.select([*columns, "centre_class"]).to_pylist():
        assert row[row["centre_class"]] > 0  # the chip that it was drawn on has some of it


def test_where_chips_lie_apart_windows_stay_inside_of_them(optical: rd.Collection) -> None:
    ground = optical.chips(SIZE, cell_km=0.96).to_geopandas()
    places = gpd.GeoDataFrame(
        {"crop": ["a", "b", "a"]},
        geometry=ground.geometry.iloc[[20, 60, 100]].representative_point().array,
        crs=4326,
    )
    chips = optical.chips(SIZE, at=places, min_coverage=0.5)
    windows = chips.random(9, seed=1, size=24)
    homes = dict(zip(chips.table.column("crop").to_pylist(), pixels(chips.table), strict=True))
    assert len(homes) == 2
    every = pixels(chips.table)
    for row, own in zip(windows.table.to_pylist(), pixels(windows.table), strict=True):
        (home,) = [at for at, whole in enumerate(every) if own <= whole]
        assert row["crop"] == chips.table.column("crop")[home].as_py()
    with pytest.warns(UserWarning, match="than 3 of 9"):
        assert len(chips.random(9, seed=1)) == 3  # each place has one window of that size
    with pytest.raises(rd.PlanError, match="no window of that size"):
        len(chips.random(9, size=SIZE + 1))


def test_every_exit_and_step_takes_them(chips: rd.Chips, tmp_path: Path) -> None:
    windows = chips.random(40, seed=7, size=24, balance="crop")
    some = windows.filter(("centre_class", "!=", "rape")).select("train").sample(8)
    loaded = some.load()
    assert isinstance(loaded, xr.Dataset)
    place = str(tmp_path / "windows.zarr")
    some.to_zarr(place, progress=False)
    stored = rd.open_chips(place)
    again = stored.load()
    assert isinstance(again, xr.Dataset)
    for name in ("pixels", "mask", "chip_id"):
        np.testing.assert_array_equal(again[name].values, loaded[name].values)
    assert rd.verify(place, sources=4).compared == 4
    batch = next(some.stream(8))
    np.testing.assert_array_equal(np.sort(batch["chip_id"]), np.sort(loaded["chip_id"].values.astype(str)))
    assert windows.explain()["chips"] == 40
    assert not windows.explain()["uncovered"]
    dealt = windows.split(0.5, 0.5, test=0.0, seed=9)
    with pytest.warns(UserWarning, match="split cells"):
        assert ids(dealt) == ids(windows)
    assert dealt.audit().ok
    folds = chips.folds(4).random(40, seed=1)
    fold_of = {row["cell"]: row["fold"] for row in chips.folds(4).table.select(["cell", "fold"]).to_pylist()}
    assert all(
        fold_of[row["cell"]] == row["fold"] for row in folds.table.select(["cell", "fold"]).to_pylist()
    )
    twice = windows.random(10, seed=1, size=8)
    assert len(twice) == 10
    more = chips.random(20, seed=8, size=24, balance="crop").select("train")
    with pytest.raises(rd.StoreError):  # windows of another size are another law
        chips.random(20, seed=8).select("train").to_zarr(place, progress=False, append=True)
    assert more.to_zarr(place, progress=False, append=True).chips
    assert len(rd.open_chips(place)) > len(some)


def test_a_place_says_what_random_leaves_there(chips: rd.Chips) -> None:
    windows = chips.random(3, seed=1, size=8)
    there = windows.to_geopandas().geometry.iloc[0].representative_point()
    assert str(windows.table.column("chip_id")[0]) in str(windows.why(lon=there.x, lat=there.y))
    ground, drawn = chips.to_geopandas().geometry, windows.to_geopandas().geometry.union_all()
    far = ground[~ground.intersects(drawn)].iloc[0].representative_point()
    assert "random(3, seed=1, size=8) drew" in str(windows.why(lon=far.x, lat=far.y))


def test_what_cannot_be_drawn_is_refused(chips: rd.Chips, tmp_path: Path) -> None:
    for n in (0, -1, 2.5, True):
        with pytest.raises(rd.PlanError, match="random"):
            chips.random(n)  # type: ignore[arg-type]
    with pytest.raises(rd.PlanError, match=r"random\(size=\)"):
        chips.random(3, size=0)
    with pytest.raises(rd.PlanError, match=r"random\(balance='corp'\).*no column 'corp'"):
        len(chips.random(3, balance="corp"))
    with pytest.raises(rd.PlanError, match=r"3 classes.*Say random\(3\)"):
        len(chips.random(2, balance="crop"))
    assert len(chips.random(3, balance="crop")) == 3
    with pytest.raises(rd.PlanError, match="a random step before it"):
        chips.random(3).by_blocks(tmp_path / "plan")
    assert len(chips.by_blocks(tmp_path / "plan", progress=False).to_chips().random(3)) == 3


def test_windows_are_drawn_around_the_pixels_of_a_class_raster(s2: rd.Collection, tmp_path: Path) -> None:
    joined = rd.join(
        optical=s2.harmonize(["red"], time="3MS"), cover=s2.harmonize(["scl"], time="3MS", resolution=20)
    )
    chips = joined.chips(SIZE, cell_km=0.96).sample(40)
    places = chips.class_places("cover", per_chip=4, progress=False)
    tree: Any = chips.load()
    values, valid = tree["cover"]["pixels"].values[:, 0, 0], tree["cover"]["valid"].values[:, 0]
    number = {one: at for at, one in enumerate(tree["cover"]["chip_id"].values.tolist())}
    for row in places.to_pylist():
        at = number[row["chip_id"]]
        y, x = int(row["y"] * 16), int(row["x"] * 16)
        assert str(values[at, y, x]) == row["class"]
        assert row["pixels"] == ((values[at] == values[at, y, x]) & valid[at]).sum()
    pairs = {(n, str(v)) for n, at in number.items() for v in np.unique(values[at][valid[at]])}
    assert {(row["chip_id"], row["class"]) for row in places.to_pylist()} == pairs
    classes = sorted(set(places.column("class").to_pylist()))
    windows = chips.random(6 * len(classes), seed=1, size=8, balance=places)
    counts = Counter(windows.table.column("centre_class").to_pylist())
    assert counts == dict.fromkeys(classes, 6)
    drawn: Any = windows.load()
    near = drawn["cover"]["pixels"].values[:, 0, 0]
    names = drawn["cover"]["centre_class"].values.tolist()
    assert all(name in own.astype(str) for own, name in zip(near, names, strict=True))
    exact = [str(own[2, 2]) == name for own, name in zip(near, names, strict=True)]
    assert np.mean(exact) > 0.6  # but at the edges of the sampled ground, the middle is of the class
    read = rd.load_recipe(_written(windows, tmp_path)).chips()
    assert read.table.column("chip_id").equals(windows.table.column("chip_id"))
    with pytest.raises(rd.SchemaError, match="pixels"):
        chips.random(3, balance=places.drop_columns(["pixels"]))
    with pytest.raises(rd.PlanError, match="per_chip"):
        chips.class_places("cover", per_chip=0)


def _written(chips: rd.Chips, folder: Path) -> Path:
    chips.to_recipe(folder / "windows.toml")
    return folder / "windows.toml"
