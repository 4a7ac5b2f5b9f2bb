"""An opened plan gives what its chips give, object by object, wherever it is opened; what it lacks is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from bucket_host import Control, serving_bucket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_stores import contents
from test_formats import rewritten
from test_ledger import deleted, flipped, truncated

import rasteret_dask as rd
from rasteret_dask.net import remote
from rasteret_dask.planset import SavedPlan
from rasteret_dask.store.provenance import read_provenance
from rasteret_dask.tasks.jobfile import _read


def halved(pixels: xr.DataArray) -> xr.DataArray:
    return pixels * 0.5


def bright(pixels: xr.DataArray) -> xr.DataArray:
    """Keep chips of which some pixel is bright."""
    return (pixels > 0.05).any(("time", "band", "y", "x"))


def means(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(pixels.mean(axis=(2, 3)))


def scores(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([pixels, 3 - pixels], axis=1)


def made(s2: rd.Collection, aef: rd.Collection, kind: str) -> rd.Chips:
    """Return chips of one kind of plan."""
    optical = s2.harmonize(["red", "nir"], mask="clouds", time="3MS", meta=["eo:cloud_cover"])
    match kind:
        case "two sources, splits, labels, a function":
            ground = shapely.box(
                *shapely.total_bounds(shapely.from_wkb(s2.to_table()["geometry"].to_pylist()))
            )
            crops = pa.table({"geometry": [ground.buffer(-0.005).wkb], "crop": ["maize"]})
            both = rd.join(optical=optical, embeddings=aef.harmonize(time="static"))
            chips = both.chips(32, cell_km=0.96, labels=crops, rasterize="crop").map(halved, source="optical")
            table = pa.table({"chip_id": chips.table["chip_id"], "yield_t": np.arange(len(chips)) / 7})
            return chips.with_table(table).split(train=0.5, val=0.3, test=0.2, seed=1).sample(3, by="split")
        case "rules on pixels":
            chips = optical.chips(32, cell_km=0.96).split(train=0.5, val=0.5, seed=1)
            return chips.sample(8, by="split").filter_pixels(bright).filter_pixels(min_valid=0.3)
        case "each acquisition":
            return s2.harmonize(["red"], dtype="uint16").chips(32, cell_km=0.96).sample(9)
        case "windows anywhere, dealt cells":
            table = optical.chips(32, cell_km=0.96)
            half = pa.table({"chip_id": table.table["chip_id"], "half": ["a", "b"] * (len(table) // 2)})
            dealt = table.with_table(half).split(train=0.5, val=0.5, seed=1, stratify="half")
            return dealt.random(12, seed=2, size=16)
        case _:
            return optical.chips(64, stride=48, cover=True)


KINDS = (
    "two sources, splits, labels, a function",
    "rules on pixels",
    "each acquisition",
    "windows anywhere, dealt cells",
    "cover",
)
FUNCTIONS = [halved, bright]


@pytest.fixture(scope="module", params=KINDS)
def chips(request: pytest.FixtureRequest, s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    return made(s2, aef, request.param)


@pytest.fixture(scope="module")
def saved(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "plan"
    chips.save_plan(place)
    return place


@pytest.fixture(scope="module")
def plan(saved: Path) -> SavedPlan:
    return rd.open_plan(saved, FUNCTIONS)


def splits_of(chips: rd.Chips) -> list[str]:
    return sorted({split for split in chips.table["split"].to_pylist() if split})


def test_a_store_of_an_opened_plan_is_that_of_its_chips(
    chips: rd.Chips, plan: SavedPlan, tmp_path: Path
) -> None:
    wanted = chips.to_zarr(tmp_path / "chips", progress=False)
    report = plan.to_zarr(tmp_path / "plan", progress=False)
    assert (report.chips, report.kept) == (wanted.chips, wanted.kept)
    assert contents(tmp_path / "plan") == contents(tmp_path / "chips")
    assert not plan.to_zarr(tmp_path / "chips", progress=False).shards_written  # it is this very store
    for split in splits_of(chips)[:1]:
        chips.select(split).to_zarr(tmp_path / "some chips", progress=False)
        plan.select(split).to_zarr(tmp_path / "some", progress=False)
        assert contents(tmp_path / "some") == contents(tmp_path / "some chips")
        assert read_provenance(str(tmp_path / "some")).steps[-1] == f"select({split!r})".replace("'", '"')


def test_a_table_of_an_opened_plan_is_that_of_a_store(chips: rd.Chips, plan: SavedPlan) -> None:
    assert (len(plan), plan.digest) == (len(chips), chips.job.digest)
    assert plan.table.equals(chips.job.chosen_chips())
    order = pa.compute.index_in(plan.table["chip_id"], value_set=chips.table["chip_id"].combine_chunks())
    assert plan.table.drop_columns(["feeds"]).equals(chips.table.take(order).drop_columns(["feeds"]))
    for split in splits_of(chips):
        assert plan.select(split).table["chip_id"].equals(chips.select(split).job.chosen_chips()["chip_id"])


@given(data=st.data())
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_of_an_opened_plan_are_those_of_its_chips(
    chips: rd.Chips, saved: Path, plan: SavedPlan, data: st.DataObject
) -> None:
    options: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 3)),
        "shuffle": data.draw(st.none() | st.integers(0, 9)),
        "world_size": data.draw(st.integers(1, 2)),
    }
    names = data.draw(st.sets(st.sampled_from(splits_of(chips)), min_size=1)) if splits_of(chips) else set()
    some, own = (chips.select(*names), plan.select(*names)) if names else (chips, plan)
    wanted = list(some.stream(**options))
    for stream in (
        own.stream(**options),
        *([] if names else [rd.stream_from(None, saved, functions=FUNCTIONS, **options)]),
    ):
        for batch, other in zip(stream, wanted, strict=True):
            assert batch.keys() == other.keys()
            for name, values in batch.items():
                np.testing.assert_array_equal(values, other[name])


def test_statistics_of_a_stream_are_measured_of_the_plan(chips: rd.Chips, plan: SavedPlan) -> None:
    batch, wanted = (next(one.stream(2, normalize=True)) for one in (plan, chips))
    for name, values in batch.items():
        np.testing.assert_array_equal(values, wanted[name])


@pytest.mark.parametrize("chips", ["two sources, splits, labels, a function"], indirect=True)
def test_files_of_an_opened_plan_are_those_of_its_chips(
    chips: rd.Chips, plan: SavedPlan, tmp_path: Path
) -> None:
    for exit_name in ("to_geotiff", "to_webdataset", "to_rslearn"):
        getattr(chips, exit_name)(tmp_path / exit_name / "chips", progress=False)
        getattr(plan, exit_name)(tmp_path / exit_name / "plan", progress=False)
        assert contents(tmp_path / exit_name / "plan") == contents(tmp_path / exit_name / "chips")


@pytest.mark.parametrize("chips", ["cover", "windows anywhere, dealt cells"], indirect=True)
def test_a_map_and_a_table_of_an_opened_plan_are_those_of_its_chips(
    chips: rd.Chips, plan: SavedPlan, tmp_path: Path
) -> None:
    pairs = [(chips, plan)]
    pairs += [(chips.select(split), plan.select(split)) for split in splits_of(chips)[:1]]
    for number, (some, own) in enumerate(pairs):
        wanted = some.plan_map(scores, batch_size=5)
        told = own.plan_map(scores, batch_size=5)
        assert (told.digest, told.explain()) == (wanted.digest, wanted.explain())
        places = [tmp_path / f"{number} {name}" for name in ("chips", "plan")]
        both: tuple[rd.Chips | SavedPlan, ...] = (some, own)
        for one, place in zip(both, places, strict=True):
            one.predict(scores, to=place / "map.zarr", progress=False)
            one.embed(means, to=place / "vectors.parquet", progress=False)
        maps, tables = ([place / name for place in places] for name in ("map.zarr", "vectors.parquet"))
        assert contents(maps[1]) == contents(maps[0])
        assert tables[1].read_bytes() == tables[0].read_bytes()
        assert own.embed(means).equals(some.embed(means))


@pytest.fixture(scope="module")
def simple(s2: rd.Collection) -> rd.Chips:
    chips = s2.harmonize(["red"], time="3MS", dtype="uint16").chips(32, cell_km=0.96)
    return chips.split(train=0.5, val=0.5, seed=1).sample(3, by="split")


ELSEWHERE = """
import sys
import rasteret_dask as rd

plan = rd.open_plan(sys.argv[1])
print(len(plan.select("val")), plan.digest)
plan.to_zarr(sys.argv[2], progress=False)
"""


def test_another_process_writes_the_same_store(simple: rd.Chips, tmp_path: Path) -> None:
    simple.save_plan(tmp_path / "plan")
    simple.to_zarr(tmp_path / "wanted", progress=False)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "plan"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(len(simple.select("val"))), simple.job.digest]
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted")


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    control = Control(tmp_path)
    with serving_bucket(control, "mine") as port, pytest.MonkeyPatch.context() as patch:
        keys = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
        for name, value in {**keys, "ACCESS_KEY_ID": "new"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield "s3://mine"


def test_a_plan_in_a_bucket_is_opened_there(simple: rd.Chips, bucket: str, tmp_path: Path) -> None:
    simple.save_plan(f"{bucket}/plan")
    plan = rd.open_plan(f"{bucket}/plan")
    assert plan.table.equals(simple.job.chosen_chips())
    for chips, place in ((simple, "wanted"), (plan, "store")):
        chips.to_zarr(tmp_path / place, progress=False)
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted")
    with pytest.raises(rd.StoreError, match=r"s3://mine/none: found no job.json"):
        rd.open_plan(f"{bucket}/none")


def test_the_recipe_that_was_run_goes_with_the_plan(s2: rd.Collection, tmp_path: Path) -> None:
    s2.export(tmp_path / "s2.parquet")
    (tmp_path / "job.toml").write_text(
        '[collections.s2]\nrecords = "s2.parquet"\nharmonize = { bands = ["red"], time = "3MS" }\n'
        "[chips]\nsize = 32\ncell_km = 0.96\n[[steps]]\nsample = { n = 4 }\n"
        '[[outputs]]\nplan = "plan"\n[[outputs]]\nzarr = "store"\n'
    )
    rd.load_recipe(tmp_path / "job.toml").run(progress=False)
    rd.open_plan(tmp_path / "plan").to_zarr(tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "store")
    assert (tmp_path / "again" / "_job" / "recipe.toml").read_text().startswith("[collections.s2]")


def test_what_is_shown_of_a_plan_is_what_is_in_it(simple: rd.Chips, tmp_path: Path) -> None:
    simple.save_plan(tmp_path / "plan")
    plan = rd.open_plan(tmp_path / "plan")
    shown = repr(plan)
    assert shown.startswith("<SavedPlan: 6 of 32 px")
    assert all(
        words in shown for words in ("train 3, val 3", "red", str(tmp_path / "plan"), plan.digest[:12])
    )
    assert len(shown.splitlines()) < 12
    assert "<svg" in plan._repr_html_()


# What is wrong is told, and the remedy helps


def test_where_no_plan_lies_it_says_who_writes_one(simple: rd.Chips, tmp_path: Path) -> None:
    place = tmp_path / "plan"
    with pytest.raises(rd.StoreError, match=r"no job\.json.*chips\.save_plan\(path\) saves a plan"):
        rd.open_plan(place)
    simple.save_plan(place)
    assert len(rd.open_plan(place)) == len(simple)
    simple.to_zarr(tmp_path / "store", progress=False)
    with pytest.raises(rd.StoreError, match=r"rd\.open_chips\(path\) opens a store"):
        rd.open_plan(tmp_path / "store")
    assert len(rd.open_chips(tmp_path / "store")) == len(simple)
    (tmp_path / "file").write_text("x")
    with pytest.raises(rd.StoreError, match=r"no job\.json"):
        rd.open_plan(tmp_path / "file")


def use(place: Path, to: Path) -> None:
    """Open a plan, and ask for all that lies there."""
    _read.cache_clear()
    plan = rd.open_plan(place, FUNCTIONS)
    list(plan.stream(4))
    assert plan._model_chips.ground.zones
    plan.to_zarr(to, progress=False)


@pytest.mark.parametrize(
    ("chips", "damage"),
    [
        ("rules on pixels", deleted),
        ("rules on pixels", flipped),
        ("windows anywhere, dealt cells", truncated),
    ],
    indirect=["chips"],
)
def test_a_damaged_plan_is_told_and_saved_again(
    chips: rd.Chips, saved: Path, damage: Any, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(saved, tmp_path / "plan"))
    use(place, tmp_path / "store")
    for file in sorted(saved.iterdir()):
        damage(place / file.name)
        with pytest.raises(
            rd.StoreError, match=r"[Ss]ave the plan again|write it again|saves a plan"
        ) as told:
            use(place, tmp_path / "store")
        if "in the same place" not in told.value.remedy and file.name == "job.json":
            shutil.rmtree(place)  # "Delete it, and write it again."
        chips.save_plan(place)
        assert {p.name: p.read_bytes() for p in place.iterdir()} == {
            p.name: p.read_bytes() for p in saved.iterdir()
        }
    use(place, tmp_path / "store")


def test_a_save_that_was_killed_is_done_again(simple: rd.Chips, s2: rd.Collection, tmp_path: Path) -> None:
    """Whatever it had put by then, also where it was of another plan."""
    puts, real, whole = list[str](), remote.put, tmp_path / "whole"

    def killed(url: str, *args: Any, **more: Any) -> None:
        if len(puts) == most:
            raise KeyboardInterrupt
        puts.append(url)
        real(url, *args, **more)

    simple.save_plan(whole)
    count = len(list(whole.iterdir()))
    others = s2.harmonize(["red"], time="3MS").chips(32, cell_km=0.96).sample(5)
    for most in range(1, count):
        place = tmp_path / str(most)
        puts.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "put", killed)
            with pytest.raises(KeyboardInterrupt):
                (simple, others)[most % 2].save_plan(place)
        assert len(list(place.iterdir())) == most
        with pytest.raises(rd.StoreError, match=r"no job\.json"):
            rd.open_plan(place)
        simple.save_plan(place)
        assert {p.name: p.read_bytes() for p in place.iterdir()} == {
            p.name: p.read_bytes() for p in whole.iterdir()
        }
    (tmp_path / "1" / "job.json").unlink()
    (tmp_path / "1" / "notes.txt").touch()
    with pytest.raises(rd.StoreError, match="something else"):
        simple.save_plan(tmp_path / "1")


def test_a_plan_of_an_earlier_version_is_told_and_saved_again(simple: rd.Chips, tmp_path: Path) -> None:
    place = tmp_path / "plan"
    simple.save_plan(place)
    (place / "law.json").unlink()  # what that version did not write
    plan = rd.open_plan(place)
    assert len(list(plan.stream(6))) == 1
    with pytest.raises(
        rd.StoreError, match=r"no law\.json beside it.*Save the plan again, in the same place"
    ):
        plan.to_zarr(tmp_path / "store", progress=False)
    simple.save_plan(place)
    assert rd.open_plan(place).to_zarr(tmp_path / "store", progress=False).committed
    rewritten(place, lambda text: text.update(format=1, version="0.0.1"))
    with pytest.raises(rd.FormatError, match=r"format 1, written by rasteret_dask 0\.0\.1.*Save it again"):
        rd.open_plan(place)
    simple.save_plan(tmp_path / "new")
    assert len(rd.open_plan(tmp_path / "new")) == len(simple)


def test_a_plan_asks_for_its_functions(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"], time="3MS").chips(32, cell_km=0.96).sample(4).map(halved)
    chips.save_plan(tmp_path / "plan")
    with pytest.raises(rd.PlanError, match=r"no test_savedplan\.halved.*Give it: functions=\[halved\]"):
        rd.open_plan(tmp_path / "plan")
    assert len(rd.open_plan(tmp_path / "plan", functions=[halved])) == 4

    def other(pixels: xr.DataArray) -> xr.DataArray:
        return pixels * 2

    other.__qualname__ = "halved"
    with pytest.raises(rd.PlanError, match=r"says something else.*Save the plan again"):
        rd.open_plan(tmp_path / "plan", functions=[other])
    s2.harmonize(["red"], time="3MS").chips(32, cell_km=0.96).sample(4).map(other).save_plan(tmp_path / "new")
    assert len(rd.open_plan(tmp_path / "new", functions=[other])) == 4


def test_only_splits_of_the_plan_are_selected(simple: rd.Chips, tmp_path: Path) -> None:
    simple.select("train").save_plan(tmp_path / "train")
    train = rd.open_plan(tmp_path / "train")
    assert len(train) == len(train.select("train")) == 3
    with pytest.raises(
        rd.PlanError, match=r"split 'val': expected|split 'val'.*one of train.*before select\(\)"
    ):
        train.select("val")
    simple.save_plan(tmp_path / "all")
    assert len(rd.open_plan(tmp_path / "all").select("val")) == 3
    with pytest.raises(rd.PlanError, match="no split"):
        train.select()
