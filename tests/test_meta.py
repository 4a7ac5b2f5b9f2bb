"""What chips carry of each slot beside its pixels: what an item's own JSON says, the day, and shares of pixels."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, fed_by, record
from numpy.typing import NDArray
from small_stores import assert_same, nodes, rewrite_root, written

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.planning.calls import chain
from rasteret_dask.planning.meta import days_of_year
from rasteret_dask.planning.plan import from_json, to_json
from rasteret_dask.rules.masks import Classes
from rasteret_dask.tasks.jobfile import plan_json

CLOUDS = (3, 8, 9)
CELLS: dict[str, Any] = {"cell_km": 0.96}
ASKED = [
    "view:sun_elevation", "note", "calibrated", "eo:cloud_cover", "id", "created", "day_of_year", "valid_fraction",
    "masked_fraction",
]  # fmt: skip
TEXTS = ("note", "id", "created")
APRIL, ALL = ("2024-04-01", "2024-04-30"), ("2024-04-01", "2024-06-30")


@pytest.fixture(scope="module")
def items(small_world: World) -> dict[str, dict[str, Any]]:
    """Return the items of the made-up world, by id; some have further properties."""
    found: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(sorted(small_world.sentinel2.parent.glob("*/*.json"))):
        item = json.loads(path.read_text())
        for asset in item["assets"].values():
            asset["href"] = str(path.parent / asset["href"])
        if number != 2:
            item["properties"]["view:sun_elevation"] = 30 + 1.37 * number
        if number != 1:
            item["properties"]["note"] = f"note {number}"
        item["properties"]["calibrated"] = number % 3 == 0
        item.pop("links", None)
        found[item["id"]] = item
    return found


@pytest.fixture(scope="module")
def place(items: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return these items in one file."""
    path = tmp_path_factory.mktemp("items") / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items.values())}))
    return path


@pytest.fixture(scope="module")
def scenes(place: Path) -> rd.Collection:
    """Return the collection of these items."""
    return rd.build_from_stac(place, name="s2", date_range=ALL)


@pytest.fixture(scope="module")
def monthly(scenes: rd.Collection) -> rd.Chips:
    """Return chips with all of it."""
    return scenes.harmonize(["red"], time="1MS", mask="clouds", pick="clearest", meta=ASKED).chips(
        32, **CELLS
    )


@pytest.fixture(scope="module")
def loaded(monthly: rd.Chips) -> xr.Dataset:
    """Return these chips in memory."""
    return plain(monthly.load())


def plain(found: xr.Dataset | xr.DataTree) -> xr.Dataset:
    """Return the chips of one source."""
    assert isinstance(found, xr.Dataset)
    return found


# The oracle: plain JSON, and a quality band read by rasterio


def moment(item: dict[str, Any]) -> np.datetime64:
    """Return when an item was taken."""
    return np.datetime64(item["properties"]["datetime"].removesuffix("Z"), "us")


def begun(item: dict[str, Any], items: dict[str, dict[str, Any]]) -> np.datetime64:
    """Return when the first granule of an item's pass was taken."""
    take = item["properties"]["s2:datatake_id"]
    return min(moment(one) for one in items.values() if one["properties"]["s2:datatake_id"] == take)


def said(item: dict[str, Any] | None, name: str) -> Any:
    """Return what an item says, as a batch holds it."""
    value = None if item is None else item["id"] if name == "id" else item["properties"].get(name)
    if name in TEXTS:
        return value or ""
    return np.nan if value is None else float(value)


def masked_by(item: dict[str, Any], bounds: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """Return where an item's quality band has a class that is hidden, at the centres of a chip's pixels."""
    with rasterio.open(item["assets"]["scl"]["href"]) as file:
        classes, transform = file.read(1), file.transform
    west, _, east, north = bounds
    pixel = (east - west) / size
    x, y = np.meshgrid(west + pixel * (np.arange(size) + 0.5), north - pixel * (np.arange(size) + 0.5))
    col = np.floor((x - transform.c) / transform.a).astype(int)
    row = np.floor((y - transform.f) / transform.e).astype(int)
    inside = (row >= 0) & (row < classes.shape[0]) & (col >= 0) & (col < classes.shape[1])
    hidden = np.zeros((size, size), dtype=bool)
    hidden[inside] = np.isin(classes[row[inside], col[inside]], CLOUDS)
    return hidden


@settings(max_examples=9, deadline=None)
@given(
    st.sampled_from(
        [
            ("closest", None), ("closest", True), ("least_cloudy", None), ("clearest", None), ("clearest", True),
            ("median", None), ("newest", None), ("last", None),
        ]
    ),
    st.sampled_from(["1MS", "3MS", "acquisitions"]),
    st.integers(0, 99),
)  # fmt: skip
def test_slots_say_what_the_items_say(
    scenes: rd.Collection, items: dict[str, dict[str, Any]], pick: Any, time: str, seed: int
) -> None:
    """Whatever is picked, filled and composed: properties of its record, its day, and shares of its pixels."""
    how: dict[str, Any] = {"pick": pick[0], "fill": pick[1], "time": time}
    if time == "acquisitions":
        how = {"time": time, "max_acquisitions": 5}
    own = scenes.harmonize(["red", "nir"], mask=Classes("SCL", CLOUDS), meta=ASKED, **how)
    chips = own.chips(32, **CELLS).sample(3, seed=seed)
    found, feeds = (
        plain(chips.load()),
        dict(zip(chips.table["chip_id"].to_pylist(), fed_by(chips), strict=True)),
    )
    mixes = how.get("fill") or how.get("pick") in ("median", "newest")
    for chip, slot in np.ndindex(found["datetime"].shape):
        one = found.isel(chip=chip, time=slot)
        when, valid = one["datetime"].values, np.isfinite(one["pixels"].values).all(axis=0)
        fed = [items[name] for name in feeds[one["chip_id"].item()].get(("s2", slot), [])]
        own_pass = [item for item in fed if begun(item, items) == when]
        assert len(own_pass) > 0 or np.isnat(when)
        for name in ASKED[:6]:
            np.testing.assert_equal(one[name].item(), said(own_pass[0] if own_pass else None, name))
        day = np.nan if np.isnat(when) else int(f"{when.astype(dt.datetime):%j}")
        np.testing.assert_equal(one["day_of_year"].item(), day)
        assert one["valid_fraction"].item() == np.float32(valid.mean())
        hidden = np.zeros_like(valid)
        for item in fed if mixes else own_pass:
            hidden |= masked_by(item, one["bounds"].values, 32)
        assert one["masked_fraction"].item() == np.float32((hidden & ~valid).mean())


@given(st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2199, 12, 31)))
def test_days_are_those_of_the_calendar(when: dt.datetime) -> None:
    stamps = np.array([[np.datetime64(when, "us"), np.datetime64("NaT", "us")]])
    np.testing.assert_array_equal(days_of_year(stamps), [[when.timetuple().tm_yday, np.nan]])


# Exits


def of_slots(found: xr.Dataset) -> dict[str, NDArray[Any]]:
    """Return what was asked for, as arrays."""
    return {name: found[name].values for name in ASKED}


def assert_slots(mine: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> None:
    """Compare what was asked for, dtypes too."""
    for name in ASKED:
        wanted = (
            object if name in TEXTS else np.float32 if "_fraction" in name or "day" in name else np.float64
        )
        assert mine[name].dtype == theirs[name].dtype == wanted, name
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_every_exit_says_the_same(monthly: rd.Chips, loaded: xr.Dataset, tmp_path: Path) -> None:
    assert (loaded["masked_fraction"].values > 0).any()
    assert set(ASKED) <= set(loaded.coords)
    assert loaded["masked_fraction"].attrs["long_name"].startswith("share")
    store = written(monthly, tmp_path / "chips.zarr")
    stored = rd.open_chips(store)
    lazy = monthly.to_xarray()
    for other in (lazy, stored.load(), stored.to_xarray()):
        other = plain(other)
        assert {name: other[name].attrs for name in ASKED} == {name: loaded[name].attrs for name in ASKED}
        assert_slots(of_slots(other.compute()), of_slots(loaded))
    plainly = xr.open_zarr(store)
    assert set(ASKED) <= set(plainly.coords)
    assert plainly["note"].dims == ("chip", "time")
    np.testing.assert_array_equal(plainly["view:sun_elevation"].values, loaded["view:sun_elevation"].values)
    at = {chip: row for row, chip in enumerate(loaded["chip_id"].values)}
    monthly.save_plan(tmp_path / "plan")
    for stream in (
        monthly.stream(batch_size=17, shuffle=3),
        stored.stream(batch_size=17, shuffle=3),
        rd.stream_from(None, tmp_path / "plan", batch_size=17),
    ):
        seen = []
        for batch in stream:
            rows = [at[chip] for chip in batch["chip_id"]]
            seen += rows
            mine = {name: batch[f"s2/{name}"] for name in ASKED}
            assert_slots(mine, {name: values[rows] for name, values in of_slots(loaded).items()})
        assert sorted(seen) == list(range(len(at)))
    some = list(at)[5:1:-1]
    batch, rows = stored.take(some), [at[chip] for chip in some]
    mine = {name: batch[f"s2/{name}"] for name in ASKED}
    assert_slots(mine, {name: values[rows] for name, values in of_slots(loaded).items()})
    assert set(ASKED) <= set(rd.as_xarray(batch)["s2"].coords)
    one = stored[some[0]]
    assert one["s2/id"].tolist() == loaded["id"].values[at[some[0]]].tolist()
    report = rd.verify(store, sources=3)
    assert report.compared == 3
    rd.compact(store, str(tmp_path / "compact.zarr"))
    assert_same(rd.open_chips(tmp_path / "compact.zarr").load(), stored.load())


def test_torch_has_it_too(monthly: rd.Chips) -> None:
    torch = pytest.importorskip("torch")
    from rasteret_dask.torchdata import ChipDataset

    sample = next(iter(ChipDataset(monthly.stream(batch_size=4))))
    assert sample["s2/view:sun_elevation"].dtype == torch.float64
    assert sample["s2/masked_fraction"].shape == (4, 3)
    assert isinstance(sample["s2/id"][0][0], str)


def test_a_store_that_grew_and_stores_side_by_side_say_it_too(place: Path, tmp_path: Path) -> None:
    """A slot that a chip does not have is blank."""

    def plan(dates: tuple[str, str], meta: Sequence[str] = ASKED, **area: Any) -> rd.Chips:
        own = rd.build_from_stac(place, name="s2", date_range=dates)
        return own.harmonize(["red"], time="1MS", mask="clouds", meta=meta).chips(32, **CELLS, **area)

    whole, store = plan(ALL), tmp_path / "grown.zarr"
    plan(APRIL).to_zarr(store, progress=False)
    whole.to_zarr(store, progress=False, append=True)
    assert (store / "part-0001").is_dir()
    grown, wanted = plain(rd.open_chips(store).load()), plain(whole.load())
    order = [wanted["chip_id"].values.tolist().index(chip) for chip in grown["chip_id"].values]
    assert_slots(of_slots(grown), of_slots(wanted.isel(chip=order)))
    batch = next(rd.open_chips(store).stream(batch_size=len(order)))
    assert batch["s2/note"].shape == (len(order), 3)
    less = plan(ALL, ASKED[:3])
    with pytest.raises(rd.StoreError, match=r"harmonize\(meta=\) of s2"):
        less.to_zarr(store, progress=False, append=True)
    half = plan(("2024-06-01", "2024-06-30"), aoi=(14.975, 50.16, 15.0068, 50.193))
    half.to_zarr(tmp_path / "june.zarr", progress=False)
    plan(APRIL).to_zarr(tmp_path / "april.zarr", progress=False)
    both = plain(rd.open_chips([tmp_path / "april.zarr", tmp_path / "june.zarr"]).load())
    blank = np.isnat(both["datetime"].values)
    assert 0 < blank.sum() < blank.size
    assert (both["id"].values[blank] == "").all()
    assert (both["id"].values[~blank] != "").all()
    assert np.isnan(both["eo:cloud_cover"].values[blank]).all()
    assert np.isnan(both["day_of_year"].values[blank]).all()
    assert (both["masked_fraction"].values[blank] == 0).all()


def test_sources_have_their_own_and_none_where_they_are_absent(
    scenes: rd.Collection, l8: rd.Collection, aef: rd.Collection
) -> None:
    west = scenes.filter(
        "id", "in", [name for name in scenes.to_table()["id"].to_pylist() if "33UVR" in name]
    )
    landsat = l8.harmonize(["red"], resolution=10, time="1MS", meta=["landsat:wrs_path", "platform"])
    chips = rd.join(
        landsat=landsat,
        west=west.harmonize(["red"], time="1MS", meta=["s2:datatake_id", "day_of_year"]),
        aef=aef.harmonize(["A00"], meta=["day_of_year"]),
        still=west.harmonize(["red"], time="static", pick="median", meta=["day_of_year", "id"]),
        require=["landsat"],
    ).chips(32, **CELLS)
    found = nodes(chips.load())
    there = found["west"]["present"].values
    assert 0 < there.sum() < there.size
    assert (found["west"]["s2:datatake_id"].values[~there] == "").all()
    assert (found["west"]["s2:datatake_id"].values[there] != "").all()
    assert np.isnan(found["west"]["day_of_year"].values[~there]).all()
    assert not np.isnan(found["west"]["day_of_year"].values[there]).any()
    fed = ~np.isnat(found["landsat"]["datetime"].values)
    assert set(found["landsat"]["platform"].values[fed]) <= {"landsat-8", "landsat-9"}
    assert set(found["landsat"]["landsat:wrs_path"].values[fed].tolist()) == {
        json.loads(text)["landsat:wrs_path"] for text in l8.to_table()["properties"].to_pylist()
    }
    year = found["aef"]["day_of_year"].values[found["aef"]["present"].values]
    assert set(year.tolist()) == {1.0}  # it begins with its interval
    assert np.isnan(found["still"]["day_of_year"].values).all()  # holds at any time
    assert "day_of_year" not in found["landsat"]


def test_members_of_a_merge_say_it_each_in_its_own_way(scenes: rd.Collection, l8: rd.Collection) -> None:
    """One has it as a property, one as a column, and what one of them lacks is NaN."""
    table = l8.to_table()
    table = table.append_column("view:sun_elevation", pa.array(np.arange(len(table)) + 100))
    both = rd.merge(scenes, rd.as_collection(table, name="l8"))
    own = both.harmonize(
        ["red"], resolution=10, time="1MS", meta=["view:sun_elevation", "landsat:wrs_row", "id"]
    )
    found = plain(own.chips(32, **CELLS).sample(20).load())
    member, sun = found["member"].values, found["view:sun_elevation"].values
    assert (sun[member == "l8"] >= 100).all()
    assert (sun[(member == "s2") & ~np.isnan(sun)] < 100).all()
    np.testing.assert_array_equal(found["landsat:wrs_row"].values == "", member != "l8")


def test_a_function_over_chips_sees_it_and_a_rule_on_pixels_keeps_it(scenes: rd.Collection) -> None:
    def lit(pixels: xr.DataArray) -> xr.DataArray:
        sun = pixels["view:sun_elevation"].fillna(90)
        return pixels / xr.DataArray(np.sin(np.deg2rad(sun)), dims=sun.dims)

    own = scenes.harmonize(["red"], time="1MS", mask="clouds", meta=["view:sun_elevation", "masked_fraction"])
    plainly, turned = plain(own.chips(32, **CELLS).load()), plain(own.map(lit).chips(32, **CELLS).load())
    sun = plainly["view:sun_elevation"].values
    np.testing.assert_array_equal(turned["view:sun_elevation"].values, sun)
    divisor = np.sin(np.deg2rad(np.where(np.isnan(sun), 90, sun)))[:, :, None, None, None]
    np.testing.assert_array_equal(turned["pixels"].values, (plainly["pixels"] / divisor).values)
    chips = own.chips(32, **CELLS).filter_pixels(min_valid=0.8)
    some = plain(chips.load())
    rows = np.isin(plainly["chip_id"].values, some["chip_id"].values)
    assert 0 < rows.sum() < rows.size
    for name in ("view:sun_elevation", "masked_fraction"):
        np.testing.assert_array_equal(some[name].values, plainly[name].values[rows])
    first = own.map(lambda pixels: pixels.isel(time=[0]), version="1").chips(32, **CELLS).sample(2)
    assert "s2/view:sun_elevation" not in next(first.stream(batch_size=2))  # which slot it was nobody knows


# Plans


def test_nothing_changes_where_it_is_not_asked_for(scenes: rd.Collection, tmp_path: Path) -> None:
    """And nothing is read for it; what records say is part of what shards are known by."""
    own: dict[str, Any] = {"time": "1MS", "mask": "clouds", "pick": "clearest"}
    quiet = scenes.harmonize(["red"], **own).chips(32, **CELLS).sample(12)
    asked = scenes.harmonize(["red"], meta=ASKED, **own).chips(32, **CELLS).sample(12)
    assert "meta" not in json.dumps(to_json(quiet.plan))
    assert "meta" not in plan_json(quiet.job.sources[0])
    assert from_json(json.loads(json.dumps(to_json(asked.plan)))) == asked.plan
    assert asked.job.digest != quiet.job.digest
    assert asked.table.equals(quiet.table)
    assert 'meta=["id", "day_of_year"]' in chain(scenes.harmonize(meta=["id", "day_of_year"]).plan)
    one, two = (
        chips.to_zarr(tmp_path / name, progress=False) for name, chips in (("a", quiet), ("b", asked))
    )
    assert (one.requests, one.bytes_fetched) == (two.requests, two.bytes_fetched)
    assert (
        not {f"s2/{name}" for name in ASKED} & next(rd.open_chips(tmp_path / "a").stream(batch_size=2)).keys()
    )
    for path in (tmp_path / "a").glob("*/c/**/*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    table = scenes.to_table()
    changed = table.set_column(
        table.column_names.index("eo:cloud_cover"), "eo:cloud_cover", pa.array([1.5] * len(table))
    )
    other = rd.as_collection(changed, name="s2")
    again = other.harmonize(["red"], meta=ASKED, **own).chips(32, **CELLS).sample(12)
    assert again.job.digest != asked.job.digest
    assert other.harmonize(["red"], **own).chips(32, **CELLS).sample(12).job.digest == quiet.job.digest


def test_blocks_plan_the_same(monthly: rd.Chips, loaded: xr.Dataset, tmp_path: Path) -> None:
    blocks = monthly.by_blocks(tmp_path / "blocks", progress=False, windows=16)
    blocks.to_zarr(tmp_path / "store.zarr", progress=False)
    assert_slots(of_slots(plain(rd.open_chips(tmp_path / "store.zarr").load())), of_slots(loaded))


def test_a_recipe_says_it_too(s2: rd.Collection, tmp_path: Path) -> None:
    s2.export(tmp_path / "s2.parquet")
    own = rd.load(tmp_path / "s2.parquet", "s2").harmonize(["red"], time="1MS", meta=["id", "day_of_year"])
    chips = own.chips(32, cell_km=0.96)
    (tmp_path / "recipe.toml").write_text(chips.to_recipe())
    assert 'meta = ["id", "day_of_year"]' in (tmp_path / "recipe.toml").read_text()
    assert rd.load_recipe(tmp_path / "recipe.toml").chips().plan == chips.plan


# Bad input

MADE = [
    record("a", datatake="a", cloud=3.0, properties={"sun": 3.5, "mixed": 1, "list": [1], "long": 2**60}),
    record("b", datatake="b", when="2024-05-01T10:00:00", properties={"sun": None, "mixed": "one"}),
]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (["sunn"], r"'sunn', which no record has.*Did you mean 'sun'\?"),
        (["EO:cloud_cover"], "Did you mean 'eo:cloud_cover'"),
        (["created"], "'created', which no record has"),
        (["mixed"], "int 1 and str 'one'"),
        (["list"], r"list \[1\]"),
        (["long"], "int 1152921504606846976"),
        (["geometry"], "numbers .* or text"),
        (["datetime"], "chips always have it"),
        (["masked_fraction"], "Say harmonize.mask='clouds'"),
        ([], "at least one name"),
        (["sun", "sun"], "none twice"),
        ([3], "as text"),
    ],
)
def test_what_cannot_be_told_is_refused(meta: list[Any], message: str) -> None:
    with pytest.raises(rd.PlanError, match=message):
        _ = collection("s2", *MADE).harmonize(["red"], meta=meta).chips(32, cell_km=0.64).job


def test_remedies_help() -> None:
    made = collection("s2", *MADE)
    cut: dict[str, Any] = {"cell_km": 0.64}
    assert made.harmonize(["red"], mask="clouds", meta=["masked_fraction"]).chips(32, **cut).job
    table = made.to_table()
    for name in ("pixels", "a name", "a/b"):
        wrong = rd.as_collection(table.append_column(name, pa.array([1, 2])), name="s2")
        with pytest.raises(rd.PlanError, match="Rename the column"):
            _ = wrong.harmonize(["red"], meta=[name]).chips(32, **cut).job
    right = rd.as_collection(table.append_column("as_text", pa.array(["1", "one"])), name="s2")
    job = right.harmonize(["red"], meta=["as_text", "sun"]).chips(32, **cut).job
    assert job.sources[0].meta == (("as_text", "str"), ("sun", "float64"))
    np.testing.assert_array_equal(job.meta[0]["sun"], [3.5, np.nan, np.nan])


def test_columns_of_chips_keep_their_names(scenes: rd.Collection, tmp_path: Path) -> None:
    at = gpd.GeoDataFrame({"platform": ["x"]}, geometry=[shapely.Point(15.0, 50.171)], crs=4326)
    own = scenes.harmonize(["red"], time="1MS", meta=["platform"])
    with pytest.raises(
        rd.PlanError, match=r"'platform', which is a column of the chips too.*Rename the column"
    ):
        own.chips(32, at=at).to_zarr(tmp_path / "a.zarr", progress=False)
    chips = own.chips(32, at=at.rename(columns={"platform": "mine"}))
    chips.to_zarr(tmp_path / "b.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "b.zarr")
    table = pa.table({"chip_id": list(stored), "platform": ["y"]})
    with pytest.raises(rd.SchemaError, match="a name that is taken"):
        stored.with_table(table)
    again = stored.with_table(table.rename_columns(["chip_id", "theirs"]))
    assert next(again.stream(batch_size=1))["labels/theirs"].tolist() == ["y"]


@pytest.mark.parametrize("meta", [5, "note", [5], [["note"]], ["no such array"]])
def test_a_damaged_list_of_names_is_a_store_error(monthly: rd.Chips, tmp_path: Path, meta: Any) -> None:
    store = Path(written(monthly.sample(1), tmp_path / "chips.zarr"))

    def change(document: Any) -> None:
        document["attributes"]["meta"] = meta

    rewrite_root(store, change)
    with pytest.raises(rd.StoreError):
        rd.open_chips(store)
