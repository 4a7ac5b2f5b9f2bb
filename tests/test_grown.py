"""Stores that grow and stores opened as one: what was written in steps is what would have been written at once."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import xarray as xr
from numpy.typing import NDArray
from part_processes import append

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError, PlanError, SchemaError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.storeset import StoredChips
from rasteret_dask.tasks.batches import Arrays

WEST = (14.975, 50.16, 15.0068, 50.193)
APRIL, MAY_ON, ALL = ("2024-04-01", "2024-04-30"), ("2024-05-01", "2024-06-30"), ("2024-04-01", "2024-06-30")


@pytest.fixture(autouse=True)
def _few_cells() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* split cell")
        yield


@pytest.fixture(scope="module")
def plan(small_world: World) -> Callable[..., rd.Chips]:
    scenes = {
        dates: (
            rd.build_from_stac(small_world.sentinel2, name="s2", date_range=dates),
            rd.build_from_stac(small_world.embeddings, name="aef", date_range=dates),
        )
        for dates in (APRIL, MAY_ON, ALL)
    }

    def planned(
        dates: tuple[str, str] = ALL,
        aoi: Any = None,
        seed: int = 42,
        size: int = 32,
        bands: Any = ("red", "nir"),
        **split: Any,
    ) -> rd.Chips:
        s2, aef = scenes[dates]
        optical = s2.harmonize(list(bands), time="1MS", mask="clouds", dtype="uint16")
        joined = rd.join(optical=optical, embeddings=aef.harmonize(["A00", "A01"]))
        chips = joined.chips(size, cell_km=0.96, aoi=aoi).split(0.7, 0.15, 0.15, seed=seed, **split)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few split cells, on so little ground
            _ = chips.planned
        return chips

    return planned


@pytest.fixture(scope="module")
def stores(plan: Callable[..., rd.Chips], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with stores of some dates and ground, one of all of it, and one that grew twice."""
    folder = tmp_path_factory.mktemp("grown")
    plan(APRIL).to_zarr(folder / "april", progress=False)
    plan(MAY_ON).to_zarr(folder / "may", progress=False)
    plan().to_zarr(folder / "all", progress=False)
    plan(APRIL, WEST).to_zarr(folder / "grown", progress=False, append=True)
    plan(APRIL).to_zarr(folder / "grown", progress=False, append=True)
    plan().to_zarr(folder / "grown", progress=False, append=True)
    return folder


@pytest.fixture
def grown(stores: Path, tmp_path: Path) -> Path:
    """Return a grown store of one's own."""
    return Path(shutil.copytree(stores / "grown", tmp_path / "store"))


def keys(store: Path) -> Counter[tuple[str, int]]:
    """Return each (chip, slot) of the optical source that some part's table says is fed, by plain Parquet."""
    found: Counter[tuple[str, int]] = Counter()
    for part in [store, *sorted(store.glob("part-*"))]:
        rows = pq.read_table(part / "chips.parquet", columns=["chip_id", "feeds"]).to_pylist()
        slots = next(part.rglob("optical"))
        times = xr.open_zarr(slots, consolidated=False)["time"].values.astype("datetime64[s]").astype(int)
        for row in rows:
            own = {feed["slot"] for feed in row["feeds"] if feed["source"] == "optical"}
            found.update((row["chip_id"], int(times[slot])) for slot in own)
    return found


def assert_equal(mine: Arrays, theirs: Arrays) -> None:
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (values.dtype, values.shape), name
        np.testing.assert_array_equal(mine[name], values, name)


# The law


@pytest.mark.parametrize("way", ["grown", "as one"])
def test_steps_give_what_is_written_at_once(way: str, stores: Path) -> None:
    whole = rd.open_chips(stores / "all")
    parts: Any = stores / "grown" if way == "grown" else [stores / "april", stores / "may"]
    found = rd.open_chips(parts, duplicates="first")
    ids = sorted(whole)
    assert sorted(found) == ids
    assert_equal(found.take(ids[::-1]), whole.take(ids[::-1]))
    assert_equal(
        {k: np.asarray(v) for k, v in found[ids[3]].items()},
        {k: np.asarray(v) for k, v in whole[ids[3]].items()},
    )
    for name in ("optical", "embeddings"):
        one, two = (chips.load()[name].to_dataset().sortby("chip_id") for chips in (found, whole))
        xr.testing.assert_equal(one, two)
        lazy = found.to_xarray()[name].to_dataset().compute().sortby("chip_id")
        xr.testing.assert_identical(lazy, one)
    ours, theirs = (chips.stats(progress=False).table.to_pandas() for chips in (found, whole))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9)  # sums of parts are added in another order
    some, same = (chips.select("train").filter(("ymax", "<", 5_558_000)) for chips in (found, whole))
    assert sorted(some) == sorted(same)
    assert found.audit().to_dict() == whole.audit().to_dict()
    assert found.stored.splits == whole.stored.splits


def test_a_stream_and_torch_see_the_same_samples(stores: Path) -> None:
    torchdata = pytest.importorskip("rasteret_dask.torchdata")
    whole, found = rd.open_chips(stores / "all", "train"), rd.open_chips(stores / "grown", "train")
    pixels = dict(zip(whole, whole.take(list(whole))["optical"], strict=True))
    seen: list[str] = []
    for batch in found.stream(batch_size=9, shuffle=3):
        seen += batch["chip_id"].tolist()
        for chip, values in zip(batch["chip_id"], batch["optical"], strict=True):
            np.testing.assert_array_equal(values, pixels[chip])
    assert sorted(seen) == sorted(whole)
    sample = torchdata.ChipStore(found)[5]
    np.testing.assert_array_equal(sample["optical"].numpy(), pixels[sample["chip_id"]])


def test_every_slot_of_a_chip_is_written_once(stores: Path) -> None:
    assert keys(stores / "grown") == keys(stores / "all")
    assert set(keys(stores / "grown").values()) == {1}


def test_what_the_store_has_is_not_read_again(stores: Path, plan: Callable[..., rd.Chips]) -> None:
    """An append costs the bytes of what is new: of new dates those of these alone, of nothing none."""
    new, alone = rd.job_report(stores / "grown" / "part-0002"), rd.job_report(stores / "may")
    assert new.bytes_fetched < alone.bytes_fetched  # which read the embeddings too
    report = plan().to_zarr(stores / "grown", progress=False, append=True)
    assert report.shards_written == 0
    assert not (stores / "grown" / "part-0003").exists()


def test_a_tenth_more_costs_a_tenth(tmp_path: Path) -> None:
    """The part is the job that these chips alone would be: each of its tiles once, of which the border's come again."""
    side, tile, size, resolution, west, north = 2560, 256, 128, 10.0, 300_000.0, 5_600_000.0
    path = tmp_path / "scene_20240401.tif"
    values = np.random.default_rng(1).integers(1, 60_000, (side, side), dtype=np.uint16)
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 1,
        "dtype": "uint16",
        "crs": "EPSG:32633",
    }
    transform = rasterio.transform.from_origin(west, north, resolution, resolution)
    with rasterio.open(
        path, "w", **profile, transform=transform, tiled=True, blockxsize=tile, blockysize=tile
    ) as file:
        file.write(values, 1)
    scenes = rd.build_from_files(
        path, name="scenes", bands=["red"], kinds={"red": "continuous"}, filename_regex=r"_(?P<date>\d{8})"
    )
    chips = scenes.harmonize(["red"]).chips(size)
    rows = chips.table["row"].to_numpy()
    edge = int(np.sort(np.unique(rows))[-(len(np.unique(rows)) // 10)])
    first = chips.filter(("row", "<", edge)).to_zarr(tmp_path / "store", progress=False)
    chips.to_zarr(tmp_path / "store", progress=False, append=True)
    alone = chips.filter(("row", ">=", edge)).to_zarr(tmp_path / "alone", progress=False)
    whole = chips.to_zarr(tmp_path / "whole", progress=False)
    part = rd.job_report(tmp_path / "store" / "part-0001")
    read = [sum(report.table["tiles_read"].to_pylist()) for report in (part, first, whole, alone)]
    assert part.chips + first.chips == whole.chips
    assert part.chips == alone.chips < 0.12 * whole.chips

    def tiles(mask: NDArray[np.bool_]) -> set[tuple[int, int]]:
        found = set()
        for row in chips.table.filter(pa.array(mask)).to_pylist():
            top, bottom = ((north - row[name]) / resolution for name in ("ymax", "ymin"))
            left, right = ((row[name] - west) / resolution for name in ("xmin", "xmax"))
            found |= {
                (y, x)
                for y in range(int(top // tile), int(np.ceil(bottom / tile)))
                for x in range(int(left // tile), int(np.ceil(right / tile)))
            }
        return found

    new, old = tiles(rows >= edge), tiles(rows < edge)
    assert read == [len(new), len(old), len(new | old), len(new)]
    assert (part.requests, part.bytes_fetched) == (alone.requests, alone.bytes_fetched)
    assert rd.open_chips(tmp_path / "store" / "part-0001").digest == rd.open_chips(tmp_path / "alone").digest
    share = part.chips / whole.chips
    assert len(new) <= 1.5 * share * len(new | old) + len(new & old)
    assert part.requests <= 1.5 * share * whole.requests + len(new & old)


def test_plain_xarray_opens_the_first_part_without_a_warning(stores: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xr.open_datatree(str(stores / "grown"), engine="zarr")
        first = xr.open_datatree(str(stores / "grown" / "part-0002"), engine="zarr")
    assert set(tree.children) <= {"train", "val", "test"}
    assert first["train/optical"].sizes["time"] == 2


def test_ground_that_is_new_with_dates_that_are_new(
    plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path
) -> None:
    """What lacks the same slots becomes one part: the new ground with all of them, the old with the new ones."""
    store = tmp_path / "store"
    plan(APRIL, WEST).to_zarr(store, progress=False)
    plan().to_zarr(store, progress=False, append=True)
    found, whole = rd.open_chips(store), rd.open_chips(stores / "all")
    groups = [next(part.rglob("optical")) for part in sorted(store.glob("part-*"))]
    assert [len(xr.open_zarr(group, consolidated=False)["time"]) for group in groups] == [3, 2]
    assert_equal(found.take(sorted(whole)), whole.take(sorted(whole)))
    assert keys(store) == keys(stores / "all")


def test_a_stratified_split_grows_with_its_store(s2: rd.Collection, tmp_path: Path) -> None:
    """Cells keep their split over three deals, each of which starts from the store as it then is."""
    rng = np.random.default_rng(3)
    x, y = rng.uniform((14.976, 50.161), (15.037, 50.191), (160, 2)).T
    points = gpd.GeoDataFrame(
        {"crop": np.where(rng.random(160) < 0.3, "rye", "oats")},
        geometry=gpd.points_from_xy(x, y),
        crs="EPSG:4326",
    )
    url = tmp_path / "store"

    def planned(upto: float, **cells: Any) -> rd.Chips:
        optical = s2.harmonize(["red"], time="1MS")
        chips = optical.chips(8, at=points[x < upto], cell_km=0.64)
        return chips.split(0.6, 0.4, 0, seed=1, stratify="crop", **cells)

    planned(14.999).to_zarr(url, progress=False)
    first = {row["cell"]: row["split"] for row in rd.open_chips(url).split_cells.to_pylist()}
    for upto in (15.02, 16):
        chips = planned(upto, cells=url)
        chips.to_zarr(url, progress=False, append=True)
        stored = rd.open_chips(url)
        mine, theirs = (
            {row["chip_id"]: row["split"] for row in table.to_pylist() if row["split"]}
            for table in (stored.table, chips.table)
        )
        assert mine == theirs
        cells = {row["cell"]: row["split"] for row in planned(upto, cells=url).split_cells.to_pylist()}
        assert cells.items() >= first.items()
        assert len(cells) > len(first)
        first = cells
    assert rd.open_chips(url).audit().ok
    with pytest.raises(StoreError, match=r"in split .*split\(stratify=, cells=<the store>\) keeps"):
        planned(16).to_zarr(url, progress=False, append=True)


# Slots of each chip's own


@pytest.fixture(scope="module")
def own_plan(small_world: World) -> Callable[..., rd.Chips]:
    """Return what plans chips with slots of their own, beside one that all share."""
    scenes = {
        dates: (
            rd.build_from_stac(small_world.sentinel2, name="s2", date_range=dates),
            rd.build_from_stac(small_world.embeddings, name="aef"),
        )
        for dates in (APRIL, MAY_ON, ALL)
    }

    def planned(
        dates: tuple[str, str] = ALL, aoi: Any = None, choose: Any = "spread", **rules: Any
    ) -> rd.Chips:
        s2, aef = scenes[dates]
        optical = s2.harmonize(
            ["red"], mask="clouds", dtype="uint16", time="acquisitions", max_acquisitions=3, choose=choose
        )
        joined = rd.join(optical=optical, embeddings=aef.harmonize(["A00"]))
        chips = joined.chips(32, cell_km=0.96, aoi=aoi)
        return chips.filter_pixels(**rules) if rules else chips

    return planned


def assert_same_chips(one: Path, two: Path) -> None:
    """Compare all that two stores have of each chip."""
    mine, theirs = rd.open_chips(one), rd.open_chips(two)
    ids = sorted(theirs)
    assert sorted(mine) == ids
    assert_equal(mine.take(ids), theirs.take(ids))
    seen = [chip for batch in mine.stream(batch_size=16, shuffle=1) for chip in batch["chip_id"]]
    assert sorted(seen) == ids


@pytest.mark.parametrize(("choose", "rules"), [("spread", {}), ("latest", {"min_valid": 0.7})])
def test_new_dates_of_a_chip_s_own_acquisitions(
    choose: str, rules: dict[str, Any], own_plan: Callable[..., rd.Chips], tmp_path: Path
) -> None:
    """Chips whose acquisitions change are written whole, in place of what was there; others are not read."""
    store = tmp_path / "store"
    own_plan(APRIL, WEST, choose, **rules).to_zarr(store, progress=False, append=True)
    west = len(rd.open_chips(store))
    own_plan(APRIL, None, choose, **rules).to_zarr(store, progress=False, append=True)  # new ground
    before = rd.open_chips(store)
    old = before.take(list(before))
    assert len(before) > west
    whole = own_plan(ALL, None, choose, **rules)
    whole.to_zarr(store, progress=False, append=True)  # new dates
    whole.to_zarr(tmp_path / "whole", progress=False)
    assert_same_chips(store, tmp_path / "whole")
    assert_equal(before.take(list(before)), old)  # whoever had it open goes on with what there was
    assert rd.verify(store, sources=2).ok
    assert whole.to_zarr(store, progress=False, append=True).shards_written == 0
    assert not (store / "part-0003").exists()


def test_chips_whose_acquisitions_stay_are_not_read_again(
    own_plan: Callable[..., rd.Chips], tmp_path: Path
) -> None:
    """The latest ones of a chip change where a later one covers it: read off the feeds of both tables."""
    store = tmp_path / "store"
    chips = {}
    for number, dates in enumerate((APRIL, ALL)):
        chips[number] = own_plan(dates, WEST, "latest")
        chips[number].to_zarr(store, progress=False, append=True)

    def feeds(table: pa.Table) -> dict[str, set[Any]]:
        rows = table.select(["chip_id", "feeds"]).to_pylist()
        return {r["chip_id"]: {(f["source"], f["slot"], f["record"]) for f in r["feeds"]} for r in rows}

    old, new = (feeds(chips[number].planned.table) for number in (0, 1))
    changed = {chip for chip in new if new[chip] != old.get(chip)}
    written = pq.read_table(store / "part-0001" / "chips.parquet", columns=["chip_id"])["chip_id"].to_pylist()
    assert set(written) == changed
    assert len(written) == len(changed)


def test_dates_that_leave_out_those_of_the_store_are_refused(
    own_plan: Callable[..., rd.Chips], tmp_path: Path
) -> None:
    own_plan(APRIL, WEST).to_zarr(tmp_path / "store", progress=False)
    with pytest.raises(StoreError, match=r"a plan without \d+ records that the store's chips are made of"):
        own_plan(MAY_ON, WEST).to_zarr(tmp_path / "store", progress=False, append=True)
    assert not (tmp_path / "store" / "part-0001").exists()
    own_plan(ALL, WEST).to_zarr(tmp_path / "store", progress=False, append=True)  # the remedy


def test_windows_about_a_date_fill_as_dates_come(small_world: World, tmp_path: Path) -> None:
    """A season after each chip's date: what was half empty is written whole once the scenes are there."""
    points = gpd.GeoDataFrame(
        {"day": pd.to_datetime(["2024-04-10", "2024-05-10"] * 6)},
        geometry=gpd.points_from_xy(
            *np.random.default_rng(2).uniform((14.978, 50.163), (15.03, 50.19), (12, 2)).T
        ),
        crs="EPSG:4326",
    )

    def planned(dates: tuple[str, str]) -> rd.Chips:
        s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=dates)
        windows = s2.harmonize(["red"], time=["-30D", "0D", "30D"], relative_to="day", pick="newest")
        return windows.chips(16, at=points, min_slots=1)

    for dates in (APRIL, ALL):
        planned(dates).to_zarr(tmp_path / "store", progress=False, append=True)
    planned(ALL).to_zarr(tmp_path / "whole", progress=False)
    assert (tmp_path / "store" / "part-0001").exists()
    assert_same_chips(tmp_path / "store", tmp_path / "whole")


def test_chips_that_are_acquisitions_are_each_written_once(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"]).chips(32, cell_km=0.96)
    half = chips.filter(("datetime", "<", "2024-05-01T00:00:00Z"))
    half.to_zarr(tmp_path / "store", progress=False)
    report = chips.to_zarr(tmp_path / "store", progress=False, append=True)
    assert report.chips == len(chips) > len(half)
    chips.to_zarr(tmp_path / "whole", progress=False)
    ids = sorted(rd.open_chips(tmp_path / "whole"))
    assert_equal(*(rd.open_chips(tmp_path / name).take(ids) for name in ("store", "whole")))


def test_labels_come_with_the_ground_they_are_of(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96)
    labels = [f"crop {n % 3}" for n in range(len(chips))]
    table = chips.table.append_column("crop", pa.array(labels))
    half = chips.with_table(table.slice(0, 70))
    half.to_zarr(tmp_path / "store", progress=False)
    chips.with_table(table.slice(60)).to_zarr(tmp_path / "store", progress=False, append=True)
    found = rd.open_chips(tmp_path / "store")
    assert found.take(table["chip_id"].to_pylist())["labels/crop"].tolist() == labels
    with pytest.raises(StoreError, match=r"found no column 'crop'; expected one of string"):
        chips.to_zarr(tmp_path / "store", progress=False, append=True)


def test_a_buffer_between_splits_holds_over_parts(plan: Callable[..., rd.Chips], tmp_path: Path) -> None:
    west, chips = plan(ALL, WEST, buffer_m=300.0), plan(ALL, buffer_m=300.0)
    west.to_zarr(tmp_path / "store", progress=False)
    chips.to_zarr(tmp_path / "store", progress=False, append=True)
    far = {
        pair: d for pair, d in rd.open_chips(tmp_path / "store").audit().distance_m.items() if "train" in pair
    }
    assert min(far.values()) >= 300.0


# What is refused


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"seed": 1}, r"split\(seed=\) 1"),
        ({"size": 16}, r"chips\(size=\) 16"),
        ({"bands": ("red",)}, r"harmonize\(bands=\) of optical"),
        ({"boundary": "centre"}, r"split\(boundary=\) centre"),
        ({"buffer_m": 100.0}, r"split\(buffer_m=\) 100"),
    ],
)
def test_another_plan_is_refused_by_what_differs(
    other: dict[str, Any], name: str, plan: Callable[..., rd.Chips], stores: Path
) -> None:
    before = sorted(path for path in (stores / "grown").rglob("*"))
    with pytest.raises(StoreError, match=f"found {name}.*only area, dates and labels may differ"):
        plan(**other).to_zarr(stores / "grown", progress=False, append=True)
    with pytest.raises(StoreError, match="compression"):
        plan().to_zarr(stores / "grown", progress=False, append=True, compression=None)
    assert sorted(path for path in (stores / "grown").rglob("*")) == before


def test_stores_that_differ_are_not_opened_as_one(
    plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        StoreError, match=r"154 chips of another store with slot 2024-01-01T00:00:00 of source 'embeddings'"
    ):
        rd.open_chips([stores / "april", stores / "may"])
    with pytest.raises(StoreError, match="with slot 2024-04-01T00:00:00 of source 'optical'"):
        rd.open_chips([stores / "all", stores / "april"])
    with pytest.raises(PlanError, match="a store twice"):
        rd.open_chips([stores / "all", stores / "all"])
    with pytest.raises(PlanError, match="no store"):
        rd.open_chips([])
    other = plan(seed=1)
    other.to_zarr(tmp_path / "seed", progress=False)
    with pytest.raises(StoreError, match=r"in split '.*'; expected split '.*', as in the other store"):
        rd.open_chips([stores / "all", tmp_path / "seed"], duplicates="first")
    plan(bands=["red"]).sample(9).to_zarr(tmp_path / "red", progress=False)
    with pytest.raises(StoreError, match="bands of source 'optical': red; expected red, nir"):
        rd.open_chips([stores / "all", tmp_path / "red"])


def test_an_append_wants_a_finished_store(plan: Callable[..., rd.Chips], grown: Path) -> None:
    (grown / "zarr.json").unlink()
    with pytest.raises(StoreError, match="an unfinished store"):
        plan().to_zarr(grown, progress=False, append=True)
    plan(APRIL, WEST).to_zarr(grown, progress=False, append=True)  # the plan that began it finishes it
    assert len(rd.open_chips(grown)) == 154


def test_an_append_is_carried_out_by_one_process(plan: Callable[..., rd.Chips], grown: Path) -> None:
    with pytest.raises(PlanError, match="compute=False"):
        plan().to_zarr(grown, compute=False, append=True)
    with pytest.raises(PlanError, match="part 1/2"):
        plan().to_zarr(grown, append=True, limits=rd.RunLimits(part=(1, 2)))


# Kills


class Killed(BaseException):
    """What ends an append as if its process had been killed: nothing tidies up."""


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many objects are still put before the process is killed."""
    left = [10**9]
    for name in ("put", "put_new"):
        call = getattr(remote, name)

        def put(*args: Any, call: Callable[..., Any] = call, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **options)

        monkeypatch.setattr(remote, name, put)
    return left


def killed_until_done(
    lives: list[int], drawn: random.Random, most: int, write: Callable[[], Any]
) -> Iterator[None]:
    """Carry something out again and again, killed at drawn puts until it is done; each time it was killed, yield."""
    while True:
        lives[0] = drawn.randrange(most)
        try:
            write()
        except (Killed, JobError, StoreError):
            assert lives[0] < 0
            lives[0] = 10**9
            yield
            continue
        lives[0] = 10**9
        break


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_append_goes_on(
    seed: int, plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path, lives: list[int]
) -> None:
    """It is killed at drawn puts until it is done: readers always see whole parts, and nothing comes twice."""
    store, chips, kills = tmp_path / "store", plan(), 0
    plan(APRIL, WEST).to_zarr(store, progress=False)
    begun = len(rd.open_chips(store))
    states = {begun}
    for _ in killed_until_done(
        lives, random.Random(seed), 60, lambda: chips.to_zarr(store, progress=False, append=True)
    ):
        kills += 1
        opened = rd.open_chips(store)
        states.add(len(opened))
        assert len(set(opened)) == len(opened)
    assert kills
    assert states <= {begun, len(chips)}
    whole = rd.open_chips(stores / "all")
    assert keys(store) == keys(stores / "all")
    assert_equal(rd.open_chips(store).take(sorted(whole)), whole.take(sorted(whole)))
    assert rd.verify(store).ok


def test_a_killed_append_of_new_dates_leaves_one_or_the_other(
    own_plan: Callable[..., rd.Chips], tmp_path: Path, lives: list[int]
) -> None:
    """Chips that are written anew are the old ones until the new ones are all there."""
    store, chips, kills = tmp_path / "store", own_plan(ALL, WEST), 0
    own_plan(APRIL, WEST).to_zarr(store, progress=False)
    chips.to_zarr(tmp_path / "whole", progress=False)
    new = rd.open_chips(tmp_path / "whole")
    ids = sorted(rd.open_chips(store))
    states = [rd.open_chips(store).take(ids), new.take(ids)]
    for _ in killed_until_done(
        lives, random.Random(7), 30, lambda: chips.to_zarr(store, progress=False, append=True)
    ):
        kills += 1
        assert_equal(rd.open_chips(store).take(ids), states[(store / "part-0001" / "zarr.json").exists()])
    assert kills
    assert_same_chips(store, tmp_path / "whole")


# Compact


@pytest.mark.parametrize("name", ["grown", "as acquisitions"])
def test_a_grown_store_is_compacted_to_what_one_run_writes(
    name: str, stores: Path, own_plan: Callable[..., rd.Chips], tmp_path: Path
) -> None:
    store, whole = stores / "grown", stores / "all"
    if name != "grown":
        store, whole = tmp_path / "store", tmp_path / "whole"
        for dates in (APRIL, ALL):
            own_plan(dates, WEST, "latest", min_valid=0.5).to_zarr(store, progress=False, append=True)
        own_plan(ALL, WEST, "latest", min_valid=0.5).to_zarr(tmp_path / "at once", progress=False)
        rd.compact(tmp_path / "at once", whole, progress=False)  # without what the rule dropped
    report = rd.compact(store, tmp_path / "compact", progress=False)
    assert report.chips == len(rd.open_chips(whole))
    assert_same_chips(tmp_path / "compact", whole)
    one, two = (
        xr.open_datatree(place, engine="zarr", mask_and_scale=False)
        for place in (tmp_path / "compact", whole)
    )
    assert {node.path for node in one.subtree} == {node.path for node in two.subtree}
    for node in two.subtree:
        mine, theirs = one[node.path].to_dataset(), node.to_dataset()
        assert mine.sizes == theirs.sizes
        if "pixels" in theirs:
            np.testing.assert_array_equal(mine["chip_id"], theirs["chip_id"])  # the order of one run
            # shards have as many bytes as the first part's; of records, those that two parts have count in both
            mine.attrs, theirs.attrs = (
                {
                    k: v
                    for k, v in d.attrs.items()
                    if k not in ("radiometry", "rasteret_dask", "chips_per_shard")
                }
                for d in (mine, theirs)
            )
            xr.testing.assert_identical(mine.load(), theirs.load())
            for variable in theirs.variables:
                assert mine[variable].encoding["dtype"] == theirs[variable].encoding["dtype"]
    tables = [pq.read_table(place / "chips.parquet") for place in (tmp_path / "compact", whole)]
    assert tables[0].schema.names == tables[1].schema.names

    def rows(table: pa.Table) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = table.to_pylist()
        for row in found:
            row["feeds"] = sorted((f["source"], f["slot"], f["order"], f["record"]) for f in row["feeds"])
        return found

    assert rows(tables[0]) == rows(tables[1])
    assert rd.verify(tmp_path / "compact").ok


def test_a_killed_compact_leaves_one_or_the_other(grown: Path, tmp_path: Path, lives: list[int]) -> None:
    """Readers of the old store see no difference, the new one opens when it is whole; then it can grow."""
    target, reader, kills = tmp_path / "compact", rd.open_chips(grown), 0
    ids, before = sorted(reader), {path: path.read_bytes() for path in grown.rglob("*") if path.is_file()}
    values = reader.take(ids)
    for _ in killed_until_done(
        lives, random.Random(3), 40, lambda: rd.compact(grown, target, progress=False)
    ):
        kills += 1
        assert_equal(rd.open_chips(grown).take(ids), values)
        with pytest.raises(StoreError):
            rd.open_chips(target)
    assert kills
    assert_equal(rd.open_chips(target).take(ids), values)
    assert_equal(reader.take(ids), values)
    assert {path: path.read_bytes() for path in grown.rglob("*") if path.is_file()} == before


def test_what_was_compacted_grows(plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for dates, aoi in ((APRIL, WEST), (APRIL, None)):
        plan(dates, aoi).to_zarr(store, progress=False, append=True)
    rd.compact(store, tmp_path / "compact", progress=False)
    plan().to_zarr(tmp_path / "compact", progress=False, append=True)
    assert_same_chips(tmp_path / "compact", stores / "all")
    assert keys(tmp_path / "compact") == keys(stores / "all")


def appending(*arguments: Any) -> BaseProcess:
    """Start a process that appends: a fork of one that has imported everything."""
    process = multiprocessing.get_context("forkserver").Process(target=append, args=arguments)
    process.start()
    return process


def appended(*arguments: Any) -> float:
    """Append in a process of its own; return the seconds that took."""
    begun, process = time.monotonic(), appending(*arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills_leave_no_duplicate(count: int, small_world: World, tmp_path: Path) -> None:
    """Processes that append are killed at random; a rerun goes on, and each chip is there once."""
    drawn, store, size = random.Random(count), tmp_path / "store", 5
    places = (str(small_world.sentinel2), str(store))
    usual, kills = appended(*places, size), 0
    while kills < count:
        size = min(size + 9, 154)
        process = appending(*places, size)
        process.join(usual * drawn.uniform(0.1, 1.1))
        if process.is_alive():
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        usual = appended(*places, size)
        rows = [
            row
            for part in [store, *store.glob("part-*")]
            for row in pq.read_table(part / "chips.parquet")["chip_id"].to_pylist()
        ]
        assert len(rows) == len(set(rows)) == len(rd.open_chips(store)) == size
        if size == 154:
            shutil.rmtree(store)
            size = 5
            appended(*places, size)
    assert rd.verify(store).ok


def test_two_appends_at_a_time(plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path) -> None:
    """The one that begins a part second is told so; once the first is done, it goes on, and nothing is lost."""
    store = tmp_path / "store"
    plan(APRIL, WEST).to_zarr(store, progress=False)
    other = store / "part-0001"
    first = plan(APRIL)
    first.to_zarr(tmp_path / "copy", progress=False, append=True)
    shutil.copytree(store, tmp_path / "twin")
    first.to_zarr(tmp_path / "twin", progress=False, append=True)
    shutil.copytree(tmp_path / "twin" / "part-0001", other)
    for last in ("zarr.json", "manifest.parquet"):  # as while it is being written
        (other / last).unlink()
    with pytest.raises(StoreError, match="an append of other chips, which is not finished"):
        plan().to_zarr(store, progress=False, append=True)
    assert rd.verify(store).verdict == "unfinished"
    assert len(rd.open_chips(store)) == len(plan(APRIL, WEST))
    first.to_zarr(store, progress=False, append=True)
    plan().to_zarr(store, progress=False, append=True)
    assert keys(store) == keys(stores / "all")


# Reports


def test_reports_tell_of_all_parts(grown: Path) -> None:
    report = rd.job_report(grown)
    assert report.shards == sum(rd.job_report(p).table.num_rows for p in sorted(grown.glob("part-*"))) + 3
    assert {name.split("/")[0] for name in report.table["shard"].to_pylist() if "/" in name} == {
        "part-0001",
        "part-0002",
    }
    assert rd.verify(grown, sources=1).compared == 3
    assert "grown" not in rd.report(grown, grown.parent / "page.html", progress=False)
    victim = next((grown / "part-0001").rglob("pixels/c/0/0/0/0/0"))
    victim.write_bytes(b"x")
    found = rd.verify(grown)
    assert found.damaged == (victim.relative_to(grown).as_posix(),)
    with pytest.raises(StoreError, match="part-0001"):
        rd.open_chips(grown)


# Columns that come later


def labels_of(chips: StoredChips) -> NDArray[Any]:
    return np.array([f"c{n % 4}" for n in range(len(chips))], dtype=object)


@pytest.mark.parametrize("name", ["all", "grown"])
def test_columns_are_seen_after_reopening(name: str, stores: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(stores / name, tmp_path / "store"))
    chips = rd.open_chips(store)
    table = pa.table({"id": list(chips), "crop": labels_of(chips).tolist()}).take(
        pa.array(range(len(chips))[::-1])
    )
    chips.with_table(table, on="id")
    pandas = pa.table({"chip_id": list(chips), "t": np.arange(len(chips), dtype=np.int16)}).to_pandas()
    rd.open_chips(store).with_table(pandas)
    again = rd.open_chips(store)
    arrays = again.take(list(chips))
    assert arrays["labels/crop"].tolist() == labels_of(chips).tolist()
    np.testing.assert_array_equal(arrays["labels/t"], np.arange(len(chips), dtype=np.int16))
    assert arrays["labels/t"].dtype == np.int16
    assert_equal({k: v for k, v in arrays.items() if "labels" not in k}, chips.take(list(chips)))
    assert len(again.filter(crop="c1").select("train")) <= len(again.filter(crop="c1"))
    assert "t" not in rd.open_chips(store, columns=1).table.column_names
    assert rd.open_chips(store, columns=0).digest == chips.digest != again.digest
    with pytest.raises(StoreError, match="no version 3 of added columns"):
        rd.open_chips(store, columns=3)
    batch = next(again.select("train").stream(batch_size=8))
    assert set(batch["labels/crop"]) <= {"c0", "c1", "c2", "c3"}
    assert rd.verify(store).ok
    (store / "_tables" / "0002.parquet").write_bytes(b"x")
    assert rd.verify(store).damaged == ("_tables/0002.parquet",)
    with pytest.raises(StoreError, match="0002"):
        rd.open_chips(store)
    assert "crop" in rd.open_chips(store, columns=1).table.column_names


def test_splits_are_dealt_anew(grown: Path, plan: Callable[..., rd.Chips]) -> None:
    chips = rd.open_chips(grown)
    dealt = chips.split(0.4, 0.3, 0.3, seed=9)
    wanted = plan(seed=42).split(0.4, 0.3, 0.3, seed=9).table  # the same rule, before there was a store
    assert dict(zip(*(dealt.table[n].to_pylist() for n in ("chip_id", "split")), strict=True)) == dict(
        zip(*(wanted[n].to_pylist() for n in ("chip_id", "split")), strict=True)
    )
    audit = rd.open_chips(grown).audit()
    assert audit.ok
    assert audit.targets == {"train": 0.4, "val": 0.3, "test": 0.3}
    test = rd.open_chips(grown, split="test")
    assert len(test) == audit.chips["test"]
    assert set(test.take(list(test))["split"]) == {"test"}
    seen = [chip for batch in test.stream(batch_size=5, shuffle=1) for chip in batch["chip_id"]]
    assert sorted(seen) == sorted(test)
    fold = pa.table(
        {"chip_id": list(chips), "fold": ["train" if n % 2 else "val" for n in range(len(chips))]}
    )
    by = dealt.with_table(fold).split(by="fold")
    assert by.stored.splits == {"val": 77, "train": 77}
    with pytest.raises(PlanError, match="footprints"):
        chips.split(by="geometry")
    with pytest.raises(PlanError, match="chosen ones"):
        chips.select("train").split()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "1 chips of the store that are missing"),
        (lambda t: pa.concat_tables([t, pa.table({"chip_id": ["x"], "k": [1]})]), r"1 ids of no chip of the store"),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "twice"),
        (lambda t: t.rename_columns(["chip_id", "split"]), "column 'split', which the plan decides"),
        (lambda t: t.rename_columns(["id", "k"]), "columns id, k"),
        (lambda t: t.set_column(0, "chip_id", pa.array(range(len(t)))), "found int64; expected the ids of chips"),
        (lambda t: t.set_column(1, "k", pa.array([[1]] * len(t))), "type list<item: int64>"),
        (lambda t: t.select(["chip_id"]), "no column but the ids"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_are_refused(
    change: Callable[[pa.Table], pa.Table], message: str, stores: Path
) -> None:
    chips = rd.open_chips(stores / "grown")
    table = pa.table({"chip_id": list(chips), "k": np.arange(len(chips))})
    with pytest.raises(SchemaError, match=message):
        chips.with_table(change(table))
    assert not (stores / "grown" / "_tables").exists()


def test_chips_that_come_after_columns_have_none(plan: Callable[..., rd.Chips], tmp_path: Path) -> None:
    store = tmp_path / "store"
    plan(APRIL, WEST).to_zarr(store, progress=False)
    chips = rd.open_chips(store)
    chips.with_table(pa.table({"chip_id": list(chips), "k": np.ones(len(chips))})).split(0.5, 0.25, 0.25)
    with pytest.warns(UserWarning, match="dealt anew"):
        plan(APRIL).to_zarr(store, progress=False, append=True)
    found = rd.open_chips(store)
    arrays = found.take(list(found))
    known = np.isin(arrays["chip_id"], list(chips))
    assert np.isnan(arrays["labels/k"][~known]).all()
    assert (arrays["labels/k"][known] == 1).all()
    assert (arrays["split"][~known] == "").all()


def test_columns_beside_several_stores_are_seen(stores: Path, tmp_path: Path) -> None:
    """Each chip has what any store says of it, the first one first; null where none does: dictionaries tell."""
    places = [Path(shutil.copytree(stores / name, tmp_path / name)) for name in ("april", "may")]
    told: list[dict[str, dict[str, Any]]] = []
    for number, place in enumerate(places):
        chips = rd.open_chips(place)
        ids = list(chips)
        own = pd.DataFrame(
            {"chip_id": ids, "crop": [f"{number} {i}" if i % 3 else None for i in range(len(ids))]}
        )
        if number:
            own["yield"] = np.arange(len(ids), dtype=np.float32)
        chips.with_table(own)
        told.append({str(name): dict(zip(ids, own[name], strict=True)) for name in own if name != "chip_id"})
    both = rd.open_chips(places, duplicates="first")
    ids = list(both)
    found = both.take(ids)
    for name, blank in (("crop", ""), ("yield", np.nan)):
        values = []
        for chip in ids:
            known = [one[name][chip] for one in told if name in one and chip in one[name]]
            values.append(next((value for value in known if value is not None), blank))
        assert [str(v) for v in found[f"labels/{name}"].tolist()] == [str(v) for v in values]
    crop = next(value for value in found["labels/crop"] if value)
    assert set(both.filter(crop=crop)) == {
        chip for chip, v in zip(ids, found["labels/crop"], strict=True) if v == crop
    }
    assert sum(map(len, (b["labels/crop"] for b in both.stream(batch_size=20)))) == len(ids)
    assert both.digest != rd.open_chips(places, duplicates="first", columns=0).digest
    plain = rd.open_chips(places, duplicates="first", columns=0)
    assert "labels/crop" not in plain.take(ids[:2])
    assert_equal({k: v for k, v in found.items() if "labels" not in k}, plain.take(ids))
    with pytest.raises(PlanError, match="version 1, of several stores"):
        rd.open_chips(places, duplicates="first", columns=1)
    chips = rd.open_chips(places[1])
    chips.with_table(pd.DataFrame({"chip_id": list(chips), "crop": range(len(chips))}))
    with pytest.raises(StoreError, match=r"column 'crop' of int64; expected one of string"):
        rd.open_chips(places, duplicates="first")


def test_splits_beside_several_stores_are_seen(
    plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path
) -> None:
    """Chips of a store that was dealt anew have its new splits, those of the other their own."""
    east = plan().filter(("xmin", ">", 0)).table
    middle = float(np.median(east["xmin"].to_numpy()))
    sides = [tmp_path / "west", tmp_path / "east"]
    for place, sign in zip(sides, ("<", ">="), strict=True):
        plan().filter(("xmin", sign, middle)).to_zarr(place, progress=False)
    fold = rd.open_chips(sides[0])
    table = pd.DataFrame({"chip_id": list(fold), "fold": ["a" if n % 2 else "b" for n in range(len(fold))]})
    dealt = fold.with_table(table).split(by="fold")
    both, other = rd.open_chips(sides), rd.open_chips(sides[1])
    splits = dict(zip(both, both.take(list(both))["split"], strict=True))
    for chips in (dealt, other):
        assert all(splits[c] == s for c, s in zip(chips, chips.take(list(chips))["split"], strict=True))
    assert both.stored.splits == {**dealt.stored.splits, **other.stored.splits}
    assert set(both.select("a", "val")) == {chip for chip, split in splits.items() if split in ("a", "val")}
    shutil.copytree(stores / "all", tmp_path / "all")
    with pytest.raises(StoreError, match=r"in split .*as in the other store"):
        rd.open_chips([sides[0], tmp_path / "all"], duplicates="first")


def test_a_column_of_one_plan_is_added_to_the_other_store(s2: rd.Collection, tmp_path: Path) -> None:
    """A store that was written without labels is opened with one that has them, once it has them too."""
    chips = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96)
    labels = [f"crop {n % 3}" for n in range(len(chips))]
    chips.with_table(chips.table.append_column("crop", pa.array(labels)).slice(0, 70)).to_zarr(
        tmp_path / "one", progress=False
    )
    rest = chips.filter(("chip_id", "in", chips.table["chip_id"].to_pylist()[70:]))
    rest.to_zarr(tmp_path / "two", progress=False)
    both = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(
        StoreError, match=r"no column 'crop'; expected one of string.*with_table\(\) adds a column"
    ):
        rd.open_chips(both)
    wanted = dict(zip(chips.table["chip_id"].to_pylist(), labels, strict=True))
    two = rd.open_chips(both[1])
    two.with_table(pd.DataFrame({"chip_id": list(two), "crop": [wanted[chip] for chip in two]}))
    found = rd.open_chips(both)
    assert found.take(list(found))["labels/crop"].tolist() == [wanted[chip] for chip in found]
