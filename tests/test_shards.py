"""The graph: one named layer per step, one small task a shard, names that say what is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import xarray as xr
from dask.base import compute
from dask.blockwise import Blockwise
from dask.core import flatten
from dask.utils import key_split

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import PlanError
from rasteret_dask.store.write import write_shard
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.jobfile import JobRef, write_job
from rasteret_dask.tasks.shards import lower, renamed

SHARD_BYTES = 2_000_000
TASK_BYTES = 2048


def ndvi(chips: xr.DataArray) -> xr.DataArray:
    red, nir = chips.sel(band="red"), chips.sel(band="nir")
    return ((nir - red) / (nir + red)).expand_dims(band=["ndvi"]).astype("float32")


def brighter(chips: xr.DataArray) -> xr.DataArray:
    return chips * np.float32(2)


def flat(chips: xr.DataArray) -> xr.DataArray:
    return chips.mean(("y", "x"))


def fewer(chips: xr.DataArray) -> xr.DataArray:
    return chips.isel(chip=slice(1, None))


def no_array(chips: xr.DataArray) -> Any:
    return chips.values


@pytest.fixture(scope="module")
def optical(s2: rd.Collection, l8: rd.Collection) -> rd.Collection:
    return rd.merge(s2, l8).harmonize(
        bands=["red", "nir"], resolution=10, time="1MS", mask="clouds", units="reflectance"
    )


@pytest.fixture(scope="module")
def chips(optical: rd.Collection, aef: rd.Collection) -> rd.Chips:
    return split(rd.join(optical=optical, embeddings=aef).chips(size=32, cell_km=0.96))


def dataset(chips: rd.Chips) -> xr.Dataset:
    lazy = chips.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    return lazy.compute()


READ = ReadContext()


def split(chips: rd.Chips) -> rd.Chips:
    return chips.split(train=0.6, val=0.2, test=0.2, seed=42)


def small_job(chips: rd.Chips) -> Job:
    """Freeze with small shards, so that there are several."""
    job = freeze(chips._unselected.planned, SHARD_BYTES)
    return job.select({h.split for h in chips.job.hierarchies})


def fused(job: Job, url: str, context: ReadContext = READ) -> dict[Hashable, Any]:
    ref = JobRef(f"{url}/_job", job.digest)
    return renamed(lower(job, context, ref, write_shard), job, "-01234567")[0]


def test_one_named_blockwise_layer_per_step(chips: rd.Chips) -> None:
    graph = lower(small_job(chips.map(ndvi, source="optical")), ReadContext(chips.map(ndvi).query.functions))
    kinds = {name.rsplit("-", 1)[0]: type(layer) for name, layer in graph.graph.layers.items()}
    roots = {name for name, kind in kinds.items() if kind is not Blockwise}
    assert set(kinds) - roots == {
        "cube-s2", "cube-l8", "merge-optical", "map-ndvi-optical", "cube-aef", "merge-embeddings", "join",
    }  # fmt: skip
    assert roots == {"job", "function-ndvi"}


def test_chips_dask_shows_the_layers(chips: rd.Chips) -> None:
    steps = {name.split("-")[0] for name in chips.select("train").dask.layers}
    assert steps == {"job", "cube", "merge", "join"}


def test_tasks_are_shards_and_one_root(chips: rd.Chips) -> None:
    job = small_job(chips)
    shards = list(job.shards())
    assert len(shards) > 10
    tasks = lower(job, ReadContext()).fused()
    assert len(tasks) == len(shards) + 1


def test_tasks_of_a_store_are_shards_alone_and_small(chips: rd.Chips) -> None:
    """Three members and a join, with real headers: a task carries where the job is, and a shard number."""
    job = small_job(chips)
    tasks = fused(job, "s3://a-bucket-with-a-name/some/where/deep/in/a/tree/train.zarr")
    assert len(tasks) == len(list(job.shards()))
    sizes = [len(cloudpickle.dumps(task)) for task in tasks.values()]
    assert max(sizes) <= TASK_BYTES, max(sizes)


def test_a_merge_of_three_joined_with_embeddings_stays_small(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, small_world: World
) -> None:
    again = rd.build_from_stac(
        small_world.landsat, name="landsat-again", date_range=("2024-04-01", "2024-05-31")
    )
    source = rd.merge(s2, l8, again).harmonize(
        bands=["red", "nir"], resolution=10, time="1MS", units="reflectance"
    )
    planned = split(rd.join(optical=source, embeddings=aef).chips(size=32, cell_km=0.96))
    job = small_job(planned)
    assert len(job.sources[0].members) == 3
    sizes = [len(cloudpickle.dumps(t)) for t in fused(job, "s3://bucket/some/where/train.zarr").values()]
    assert max(sizes) <= TASK_BYTES, max(sizes)


def test_keys_read_well_on_the_dashboard(chips: rd.Chips) -> None:
    tasks = fused(small_job(chips), "/scratch/x.zarr")
    assert {key_split(key) for key in tasks} == {"write-train", "write-val", "write-test"}


def test_the_train_graph_is_the_full_graph_culled(chips: rd.Chips) -> None:
    full, train = (
        lower(small_job(chips), ReadContext()),
        lower(small_job(chips.select("train")), ReadContext()),
    )
    own = [s for s in full.shards if s.split == "train"]
    assert train.keys == [full.key(s) for s in own]
    wanted = dict(full.graph.cull([full.key(s) for s in own]))
    found = dict(train.culled())
    assert found.keys() == wanted.keys()
    for key, task in wanted.items():
        if key[0].startswith("job-"):
            assert task.value.whole.digest == found[key].value.whole.digest
        else:
            assert found[key] == task


def test_a_graph_in_a_store_is_culled_the_same_way(chips: rd.Chips) -> None:
    """Written tables and all: tasks of one store differ between train and all in nothing."""
    full, train = small_job(chips), small_job(chips.select("train"))
    ref = JobRef("/scratch/_job", full.digest)
    every = renamed(lower(full, ReadContext(), ref, write_shard), full, "-0")[0]
    some = renamed(lower(train, ReadContext(), ref, write_shard), train, "-0")[0]
    assert some == {key: every[key] for key in some}
    assert 0 < len(some) < len(every)


# Keys


def keys_by_content(chips: rd.Chips) -> dict[str, tuple[str, ...]]:
    """Return {shard key: the chips in it}."""
    job = small_job(chips)
    ids = job.chips.column("chip_id").to_pylist()
    return {job.keys[s.name]: tuple(ids[s.start : s.stop]) for s in job.shards()}


def test_plans_that_keep_other_rows_share_the_keys_of_equal_shards(chips: rd.Chips) -> None:
    every, train = keys_by_content(chips), keys_by_content(chips.select("train"))
    assert train.items() <= every.items()
    first = small_job(chips)
    rows = next(first.shards())
    ids = first.chips.column("chip_id").to_pylist()[rows.start : rows.stop]
    some = keys_by_content(chips.filter("chip_id", "in", tuple(ids)))
    assert some.items() <= every.items()
    assert len(some) == 1


@pytest.mark.parametrize(
    "how",
    [
        {"mask": None}, {"mask": "snow"}, {"pick": "first"}, {"dtype": "uint16"}, {"bands": ["nir", "red"]},
        {"bands": ["red", "green"]}, {"resampling": "cubic"}, {"time": "2MS"}, {"units": "reflectance", "pick": "mean"},
    ],
)  # fmt: skip
def test_plans_that_treat_rows_differently_share_no_key(
    s2: rd.Collection, l8: rd.Collection, how: dict[str, Any]
) -> None:
    asked = {
        "bands": ["red", "nir"],
        "resolution": 10,
        "time": "1MS",
        "mask": "clouds",
        "units": "reflectance",
    }

    def planned(**said: Any) -> rd.Chips:
        return split(rd.merge(s2, l8).harmonize(**said).chips(size=32, cell_km=0.96))

    one, other = planned(**asked), planned(**(asked | how))
    assert not keys_by_content(one).keys() & keys_by_content(other).keys()


def test_functions_change_keys_and_versions_do_too(chips: rd.Chips) -> None:
    plans = [
        chips, chips.map(ndvi, source="optical"), chips.map(brighter, source="optical"),
        chips.map(brighter, source="embeddings"), chips.map(brighter, source="optical", version="2"),
        chips.map(brighter, source="optical").map(brighter, source="optical"),
    ]  # fmt: skip
    seen = [set(keys_by_content(p)) for p in plans]
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert not one & other


SCRIPT = """
import json, sys
import rasteret_dask as rd
from rasteret_dask.tasks.freezing import freeze
dates = ("2024-04-01", "2024-06-30")
s2, l8 = (rd.build_from_stac(path, name=name, date_range=dates) for name, path in zip(("s2", "l8"), sys.argv[1:]))
source = rd.merge(s2, l8).harmonize(bands=["red", "nir"], resolution=10, time="1MS", units="reflectance")
chips = source.chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)
print(json.dumps(freeze(chips.planned, 2_000_000).keys))
"""


def test_keys_are_the_same_in_every_process(s2: rd.Collection, l8: rd.Collection, small_world: World) -> None:
    source = rd.merge(s2, l8).harmonize(bands=["red", "nir"], resolution=10, time="1MS", units="reflectance")
    here = freeze(split(source.chips(size=32, cell_km=0.96)).planned, SHARD_BYTES).keys
    paths = [str(small_world.sentinel2), str(small_world.landsat)]
    for seed in ("17",):  # this process has one of its own
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *paths], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout) == here


def test_chips_of_two_plans_computed_together_stay_apart(chips: rd.Chips) -> None:
    """Dask takes equal names for equal arrays: blocks of other rows must be called otherwise."""
    picked = [chips.select(name).to_xarray() for name in ("train", "val")]
    middle = int(np.median(chips.table.column("row").to_numpy()))
    picked += [chips.filter("row", "<", middle).to_xarray(), chips.sample(7).to_xarray()]
    lazy = [tree["optical"].ds["pixels"] for tree in picked]
    together = compute(*lazy, scheduler="threads")
    for one, array in zip(together, lazy, strict=True):
        xr.testing.assert_equal(one, array.compute(scheduler="sync"))


def test_one_source_of_a_join_reads_nothing_of_the_others(chips: rd.Chips) -> None:
    pixels = chips.select("val").to_xarray()["embeddings"].ds["pixels"].data
    culled = pixels.__dask_graph__().cull(list(flatten(pixels.__dask_keys__())))
    names = {name for name in culled.layers if name.startswith("cube-")}
    assert len(names) == 1
    assert next(iter(names)).startswith("cube-aef-")


# Functions of one's own


def test_map_gives_each_group_of_chips(optical: rd.Collection) -> None:
    plain = split(optical.chips(size=32, cell_km=0.96)).select("test")
    found = dataset(plain.map(ndvi))
    pixels = dataset(plain)["pixels"]
    assert found["pixels"].dims == ("chip", "time", "band", "y", "x")
    assert found["band"].values.tolist() == ["ndvi"]
    red, nir = pixels.values[:, :, :1], pixels.values[:, :, 1:]
    np.testing.assert_array_equal(found["pixels"].values, ((nir - red) / (nir + red)).astype(np.float32))
    assert found["chip_id"].values.tolist() == plain.table.column("chip_id").to_pylist()


def test_map_of_a_collection_and_of_chips_are_the_same(optical: rd.Collection) -> None:
    one = dataset(optical.map(brighter).chips(size=32, cell_km=0.96).sample(5))
    other = dataset(optical.chips(size=32, cell_km=0.96).map(brighter).sample(5))
    xr.testing.assert_equal(one, other)


def test_a_function_is_shipped_once(optical: rd.Collection) -> None:
    ballast = np.zeros(50_000, dtype=np.uint8)

    def heavy(chips: xr.DataArray) -> xr.DataArray:
        return chips + np.float32(ballast[0])

    planned = split(optical.chips(size=32, cell_km=0.96)).map(heavy, version="1")
    job = small_job(planned)
    tasks = fused(job, "/scratch/x.zarr", ReadContext(planned.query.functions))
    shards = len(list(job.shards()))
    assert len(tasks) == shards + 1
    sizes = sorted(len(cloudpickle.dumps(task)) for task in tasks.values())
    assert sizes[-1] > 50_000
    assert sizes[-2] <= TASK_BYTES


@pytest.mark.parametrize(
    ("function", "message"),
    [(flat, r"map\(flat\).*dims"), (fewer, r"map\(fewer\).*chips"), (no_array, r"map\(no_array\).*ndarray")],
)
def test_wrong_results_are_told(optical: rd.Collection, function: Any, message: str) -> None:
    planned = optical.chips(size=32, cell_km=0.96).sample(4).map(function)
    with pytest.raises(PlanError, match=message):
        planned.to_xarray().compute(scheduler="sync")


def test_closures_need_a_version(optical: rd.Collection) -> None:
    factor = 3

    def scaled(chips: xr.DataArray) -> xr.DataArray:
        return chips * np.float32(factor)

    with pytest.raises(PlanError, match=r"scaled.*closure over factor.*version="):
        optical.map(scaled)
    source = optical.map(scaled, version="three")
    assert dataset(source.chips(size=32, cell_km=0.96).sample(2))["pixels"].shape[2] == 2


# The frozen job


def test_a_written_job_opens_as_it_was(chips: rd.Chips, tmp_path: Path) -> None:
    from rasteret_dask.tasks.jobfile import open_job

    job = small_job(chips.select("val"))
    write_job(job, str(tmp_path))
    opened = open_job(str(tmp_path), job.digest)
    assert opened.digest == job.digest
    assert opened.keys == job.keys
    assert [s.name for s in opened.shards()] == [s.name for s in job.shards()]


def test_another_job_at_the_same_place_is_not_taken_for_it(chips: rd.Chips, tmp_path: Path) -> None:
    """Same steps, other rows: what a worker has cached of the first must not serve the second."""
    from rasteret_dask.tasks.jobfile import open_job

    jobs = [small_job(chips.select(name)) for name in ("val", "test")]
    assert jobs[0].phase == jobs[1].phase
    for job in jobs:
        write_job(job, str(tmp_path))
        opened = open_job(str(tmp_path), job.digest)
        assert [s.name for s in opened.shards()] == [s.name for s in job.shards()]
    with pytest.raises(rd.StoreError, match="another plan"):
        open_job(f"{tmp_path}/.", jobs[0].digest)


def test_a_job_is_pickled_without_what_it_has_cached(chips: rd.Chips) -> None:
    job = small_job(chips)
    before = len(cloudpickle.dumps(job))
    assert job.digest
    assert len(job.feeds.row)
    assert len(cloudpickle.dumps(job)) == before


def test_shards_are_numbered_before_select(chips: rd.Chips) -> None:
    every, val = small_job(chips), small_job(chips.select("val"))
    assert [s.name for s in val.shards()] == [s.name for s in every.shards() if s.split == "val"]


def test_labels_are_part_of_the_identity_of_a_store(chips: rd.Chips) -> None:
    import pyarrow as pa

    ids = chips.table.column("chip_id")
    one, two = (
        chips.with_table(pa.table({"chip_id": ids, "label": [word] * len(ids)})).job
        for word in ("wheat", "maize")
    )
    assert one.keys == two.keys
    assert one.digest != two.digest
