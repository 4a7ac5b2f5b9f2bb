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


def test_a_tenth_more_costs_a_tenth(plan: Callable[..., rd.Chips], tmp_path: Path) -> None:
    chips = plan()
    rows = np.sort(np.unique(chips.table["row"].to_numpy()))
    edge = int(rows[-(-len(rows) * 9 // 10)])
    store = tmp_path / "store"
    first = chips.filter(("row", "<", edge)).to_zarr(store, progress=False)
    chips.to_zarr(store, progress=False, append=True)
    part = rd.job_report(store / "part-0001")
    share = part.chips / len(chips)
    assert part.chips + first.chips == len(chips)
    # tiles at the border come twice: the world is a few tiles long, and one request brings all of a file's
    assert part.bytes_fetched <= 5 * share * first.bytes_fetched, (
        part.bytes_fetched,
        first.bytes_fetched,
        share,
    )


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


def test_new_dates_of_a_chip_s_own_acquisitions_are_refused(small_world: World, tmp_path: Path) -> None:
    """They would change which dates a chip has: nothing was written, and nothing said."""

    def planned(dates: tuple[str, str], aoi: Any = WEST) -> rd.Chips:
        s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=dates)
        return s2.harmonize(["red"], time="acquisitions", max_acquisitions=4).chips(64, aoi=aoi)

    planned(APRIL).to_zarr(tmp_path / "store", progress=False)
    with pytest.raises(StoreError, match="found dates of s2, whose slots are each chip's own acquisitions"):
        planned(ALL).to_zarr(tmp_path / "store", progress=False, append=True)
    planned(APRIL, None).to_zarr(tmp_path / "store", progress=False, append=True)  # new ground is welcome


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
    with pytest.raises(StoreError, match="a store that has grown"):
        rd.compact(grown, grown.parent / "compact")


# Kills


class Killed(BaseException):
    """What ends an append as if its process had been killed: nothing tidies up."""


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_append_goes_on(
    seed: int, plan: Callable[..., rd.Chips], stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed at drawn puts until it is done: readers always see whole parts, and nothing comes twice."""
    drawn = random.Random(seed)
    store, chips = tmp_path / "store", plan()
    plan(APRIL, WEST).to_zarr(store, progress=False)
    begun = len(rd.open_chips(store))
    states, lives = {begun}, [0]
    for name in ("put", "put_new"):
        left = getattr(remote, name)

        def put(*args: Any, call: Callable[..., Any] = left, **options: Any) -> Any:
            lives[0] -= 1
            if lives[0] < 0:
                raise Killed
            return call(*args, **options)

        monkeypatch.setattr(remote, name, put)
    kills = 0
    while True:
        lives[0] = drawn.randrange(60)
        try:
            chips.to_zarr(store, progress=False, append=True)
        except (Killed, JobError, StoreError):
            assert lives[0] < 0
            kills += 1
            lives[0] = 10**9
            opened = rd.open_chips(store)
            states.add(len(opened))
            assert len(set(opened)) == len(opened)
            continue
        break
    assert kills
    assert states <= {begun, len(chips)}
    whole = rd.open_chips(stores / "all")
    assert keys(store) == keys(stores / "all")
    assert_equal(rd.open_chips(store).take(sorted(whole)), whole.take(sorted(whole)))
    assert rd.verify(store).ok


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
