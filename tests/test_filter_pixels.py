"""Filters on pixels: who is kept, what becomes of the others, and stores without them."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from small_stores import assert_same, nodes, small, written

import rasteret_dask as rd
from rasteret_dask.chipping.drawing import plan_chips
from rasteret_dask.compacting import compact
from rasteret_dask.errors import PlanError, ReadError, StoreError
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import from_json, to_json
from rasteret_dask.rules.masks import MaskName
from rasteret_dask.store import outputs
from rasteret_dask.store.decode import index_nbytes, index_of
from rasteret_dask.store.encode import ABSENT
from rasteret_dask.storeset import open_chips
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import tally
from rasteret_dask.tasks.jobfile import plan_json

LIMIT = 0.97


def bright(chips: xr.DataArray) -> xr.DataArray:
    """Keep what is bright."""
    return chips.mean(("time", "band", "y", "x")) > 0.15


def brighter(chips: xr.DataArray) -> xr.DataArray:
    """Keep what is brighter."""
    return chips.mean(("time", "band", "y", "x")) > 0.2


def nothing(chips: xr.DataArray) -> NDArray[np.bool_]:
    """Keep nothing."""
    return np.zeros(chips.sizes["chip"], dtype=bool)


@pytest.fixture(scope="module")
def joined(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> rd.Chips:
    optical = rd.merge(s2, l8).harmonize(
        bands=["red", "nir"], resolution=10, time="1MS", mask="clouds", pick="median", dtype="uint16"
    )
    chips = rd.join(optical=optical, embeddings=aef.harmonize(bands=["A00", "A01"], units="embedding"))
    return chips.chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)


@pytest.fixture(scope="module")
def single(s2: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", resolution=10)
    return optical.chips(size=32, cell_km=0.96).sample(41)


@pytest.fixture(scope="module")
def filtered(joined: rd.Chips) -> rd.Chips:
    return joined.filter_pixels(min_valid=LIMIT)


@pytest.fixture(scope="module")
def store(filtered: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(written(filtered, tmp_path_factory.mktemp("kept") / "store"))


def expected(joined: rd.Chips) -> NDArray[np.bool_]:
    """Return by NumPy which chips have enough valid pixels in each source."""
    found = nodes(outputs.load(small(joined), ReadContext()))
    seen = found["optical"]["valid"].values.mean(axis=(1, 2, 3)) >= LIMIT
    known = ~np.isnan(found["embeddings"]["pixels"].values).any(axis=2)
    return np.asarray(seen & (known.mean(axis=(1, 2, 3)) >= LIMIT))


# Who is kept


def test_load_gives_the_chips_that_pass(joined: rd.Chips, filtered: rd.Chips) -> None:
    kept = expected(joined)
    assert 0 < kept.sum() < len(kept)
    found = nodes(outputs.load(small(filtered), ReadContext()))
    for name, dataset in nodes(outputs.load(small(joined), ReadContext())).items():
        xr.testing.assert_identical(found[name], dataset.isel(chip=np.flatnonzero(kept)))


def test_slots_without_records_do_not_count(s2: rd.Collection) -> None:
    """June has scenes; December has none, and says nothing of June's pixels."""
    with_gaps = s2.harmonize(bands=["red"], resolution=10, time="1MS").subset(
        date_range=("2024-04-01", "2024-12-31")
    )
    for dtype in ("float32", "uint16"):
        chips = with_gaps.harmonize(units="reflectance", dtype=dtype).chips(size=32, cell_km=0.96).sample(20)
        whole = chips.load()
        assert isinstance(whole, xr.Dataset)
        fed = ~np.isnat(whole["datetime"].values)
        assert 0 < fed.sum() < fed.size
        seen = whole["valid_fraction"].values
        share = np.array([seen[chip][own].mean() for chip, own in enumerate(fed)])
        for limit in (0.5, float(np.median(share))):
            found = chips.filter_pixels(min_valid=limit).load()
            assert isinstance(found, xr.Dataset)
            assert found["chip_id"].values.tolist() == whole["chip_id"].values[share >= limit - 1e-9].tolist()
            assert found.sizes["chip"] > 0


def test_an_empty_result_says_which_rule_took_how_many(single: rd.Chips) -> None:
    count = len(single)
    with pytest.warns(
        UserWarning,
        match=rf"dropped {count} of {count} chips \({count}: filter_pixels\(nothing\)\).*remove it",
    ):
        empty = single.filter_pixels(nothing).load()
    assert empty.sizes["chip"] == 0
    reasons = [
        "valid 0.123, below 0.5",
        "valid 0.451, below 0.5",
        "cloud of a 0.900, above 0.1",
        "filter_pixels(f)",
    ]
    assert tally(reasons) == "2: valid, below 0.5; 1: cloud of a, above 0.1; 1: filter_pixels(f)"


def test_a_function_decides(single: rd.Chips) -> None:
    whole = single.load()
    assert isinstance(whole, xr.Dataset)
    kept = bright(whole["pixels"]).values
    assert 0 < kept.sum() < len(kept)
    found = single.filter_pixels(bright).load()
    xr.testing.assert_identical(found, whole.isel(chip=np.flatnonzero(kept)))
    both = single.filter_pixels(bright).filter_pixels(brighter, min_valid=0.5).load()
    assert both.sizes["chip"] == int(brighter(whole["pixels"]).sum())


@pytest.mark.parametrize("mask", [None, "clouds"])
def test_clouds_are_counted_in_the_quality_band_of_the_same_records(
    mask: MaskName | None, s2: rd.Collection
) -> None:
    optical = s2.harmonize(bands=["red"], units="reflectance", resolution=10, time="1MS", mask=mask)
    scl = s2.harmonize(bands=["scl"], resolution=10, time="1MS")
    both = rd.join(optical=optical, scl=scl).chips(size=32, cell_km=0.96).sample(60)
    classes = nodes(both.load())["scl"]
    seen = classes["valid"].values
    cloudy = (np.isin(classes["pixels"].values[:, :, 0], (3, 8, 9, 10)) & seen).sum(axis=(1, 2, 3))
    share = cloudy / np.maximum(seen.sum(axis=(1, 2, 3)), 1)
    limit = float(np.median(share))
    assert 0 < (share <= limit).sum() < len(share)
    alone = optical.chips(size=32, cell_km=0.96).with_table(both.table.select(["chip_id"]))
    found = alone.filter_pixels(max_cloud=limit).load()
    assert isinstance(found, xr.Dataset)
    assert found["chip_id"].values.tolist() == classes["chip_id"].values[share <= limit].tolist()
    whole = alone.load()
    assert isinstance(whole, xr.Dataset)
    xr.testing.assert_identical(found, whole.isel(chip=np.flatnonzero(share <= limit)))


def test_members_of_a_merge_are_told_by_their_own_quality_bands(s2: rd.Collection, l8: rd.Collection) -> None:
    optical = rd.merge(s2, l8).harmonize(bands=["red", "nir"], resolution=10, time="1MS", pick="closest")
    chips = optical.chips(size=32, cell_km=0.96).sample(30)
    limits = [0.0, 0.1, 0.5, 1.0]
    found = [nodes(chips.filter_pixels(max_cloud=limit).load())[""] for limit in limits]
    kept = [set(dataset["chip_id"].values.tolist()) for dataset in found]
    assert all(low <= high for low, high in itertools.pairwise(kept))
    assert len(kept[0]) < len(kept[-1]) == len(chips)


# What becomes of the others


def test_a_dropped_chip_keeps_its_place_unwritten(store: Path, joined: rd.Chips) -> None:
    kept = expected(joined)
    plain = xr.open_datatree(store, engine="zarr", mask_and_scale=False)
    planned = nodes(outputs.load(small(joined), ReadContext()))
    start = 0
    for split in ("train", "val", "test"):
        for source, whole in planned.items():
            node = plain[f"{split}/{source}"].to_dataset()
            own = kept[start : start + node.sizes["chip"]]
            np.testing.assert_array_equal(node["kept"].values, own)
            assert "kept" in node.coords
            values = whole["pixels"].values[start : start + len(own)]
            np.testing.assert_array_equal(node["pixels"].values[own], values[own])
            left = node["pixels"].values[~own]
            assert (np.isnan(left) if left.dtype.kind == "f" else left == 65535).all()
        start += len(own)
    absent = 0
    first = open_chips(store).stored.map.first[0].arrays["pixels"].encoding
    for shard in store.glob("*/optical/pixels/c/*/0/0/0/0"):
        data = shard.read_bytes()
        tail = data[-index_nbytes(first.chunk[0]) :]
        absent += int((index_of(first.chunk[0], tail, len(data), "test")[:, 0] == ABSENT).sum())
    empty = sum(s.chips for s in open_chips(store).stored.map.shards if len(s.dropped) == s.chips)
    short = sum(
        first.chunk[0] - s.chips for s in open_chips(store).stored.map.shards if len(s.dropped) < s.chips
    )
    assert absent + empty - short == (~kept).sum()


def test_the_manifest_says_why_and_the_store_sees_kept_chips_only(store: Path, filtered: rd.Chips) -> None:
    opened = open_chips(store)
    assert_same(opened.load(), outputs.load(small(filtered), ReadContext()))
    assert_same(opened.to_xarray().compute(), opened.load())
    manifest = pq.read_table(store / "manifest.parquet")
    assert sum(manifest["kept"].to_pylist()) == len(opened) == opened.stats().chips
    assert sum(manifest["chips"].to_pylist()) == len(filtered)
    dropped = opened.dropped.to_pylist()
    assert len(dropped) == len(filtered) - len(opened)
    assert all(row["reason"].startswith("valid of optical 0.") for row in dropped)
    with pytest.raises(
        PlanError, match=r"which filter_pixels\(\) dropped: valid of optical 0\.\d+, below 0\.97"
    ):
        opened[dropped[0]["chip_id"]]
    assert 0 in opened.stored.sizes  # a shard of which nothing is kept


def test_streams_and_statistics_see_kept_chips_only(store: Path, filtered: rd.Chips) -> None:
    opened, chips = open_chips(store).select("train"), filtered.select("train")
    assert len(opened) < len(chips)
    for shuffle in (None, 7):
        ids = [[*b["chip_id"]] for b in opened.stream(16, shuffle=shuffle)]
        assert sorted(i for batch in ids for i in batch) == sorted(opened)
    theirs = [i for batch in chips.stream(16) for i in batch["chip_id"]]
    assert theirs == list(opened)
    assert repr(chips.stats()) == repr(opened.stats())


def test_the_lazy_chips_of_a_plan_stay_in_place(single: rd.Chips) -> None:
    lazy = single.filter_pixels(bright).to_xarray()
    assert isinstance(lazy, xr.Dataset)
    found = lazy.compute()
    assert found.sizes["chip"] == len(single)
    kept = found["kept"].values
    assert np.isnan(found["pixels"].values[~kept]).all()
    xr.testing.assert_identical(
        found.isel(chip=np.flatnonzero(kept)).drop_vars("kept"), single.filter_pixels(bright).load()
    )


def test_a_run_says_how_many_it_dropped(
    single: rd.Chips, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    single.filter_pixels(bright).to_zarr(store)
    lost = len(single) - len(open_chips(store))
    assert f"{lost} of {len(single)} chips dropped by filter_pixels" in capsys.readouterr().err
    single.filter_pixels(bright).to_zarr(store)  # finished: nothing is done again
    with pytest.raises(StoreError, match="chips of another plan"):
        single.filter_pixels(brighter).to_zarr(store)


def test_a_store_of_which_nothing_is_kept_is_finished(single: rd.Chips, tmp_path: Path) -> None:
    opened = open_chips(written(single.filter_pixels(nothing), tmp_path / "store"))
    assert len(opened) == 0
    assert opened.dropped.num_rows == len(single)
    with pytest.raises(PlanError, match="no chip"):
        opened.stats()
    with pytest.raises(PlanError, match=r"0 of .* chips kept"):
        compact(tmp_path / "store", tmp_path / "other")
    plain = xr.open_zarr(tmp_path / "store")
    assert not plain["kept"].values.any()
    assert np.isnan(plain["pixels"].values).all()


# Identity


def test_the_rule_is_part_of_what_chips_are(single: rd.Chips, store: Path) -> None:
    digests = {
        name: chips.job.digest
        for name, chips in {
            "none": single,
            "bright": single.filter_pixels(bright),
            "brighter": single.filter_pixels(brighter),
            "valid": single.filter_pixels(min_valid=0.5),
            "more valid": single.filter_pixels(min_valid=0.6),
            "version": single.filter_pixels(bright, version="2"),
        }.items()
    }
    assert len(set(digests.values())) == len(digests)
    assert single.filter_pixels(bright).job.digest == digests["bright"]
    assert not set(single.job.keys.values()) & set(single.filter_pixels(bright).job.keys.values())


def test_mistakes_are_told_at_the_door(single: rd.Chips, joined: rd.Chips, aef: rd.Collection) -> None:
    def per_pixel(chips: xr.DataArray) -> xr.DataArray:
        return chips > 0

    def numbers(chips: xr.DataArray) -> xr.DataArray:
        return chips.mean(("time", "band", "y", "x"))

    wrong: dict[str, Callable[[], Any]] = {
        r"filter_pixels: found nothing to go by": lambda: single.filter_pixels(),
        r"filter_pixels\(min_valid=\): found 50; expected a share": lambda: single.filter_pixels(
            min_valid=50
        ),
        r"filter_pixels\(max_cloud=\): found True": lambda: single.filter_pixels(max_cloud=True),
        r"filter_pixels\(predicate\): found 'x'": lambda: single.filter_pixels("x"),  # type: ignore[arg-type]
        r"filter_pixels\(source=\): found 'radar'; expected one of optical, embeddings": lambda: (
            joined.filter_pixels(min_valid=0.5, source="radar").table
        ),
        r"a function for several joined sources": lambda: joined.filter_pixels(bright).table,
        r"filter_pixels\(max_cloud=\) of source 'optical': found pick='median'": lambda: (
            joined.filter_pixels(max_cloud=0.5, source="optical").table
        ),
        r"no quality band in aef": lambda: (
            aef.chips(size=32, cell_km=0.96).filter_pixels(max_cloud=0.5).table
        ),
        r"map: found a filter_pixels before it": lambda: (
            single.filter_pixels(bright).map(lambda c: c * 2).table
        ),
        r"per_pixel\): found bool of shape \(1, 1, 2, 32, 32\), dims": lambda: single.filter_pixels(
            per_pixel
        ).to_xarray(),
        r"numbers\): found float32 of shape \(1,\)": lambda: single.filter_pixels(numbers).to_xarray(),
    }
    for message, call in wrong.items():
        with pytest.raises(PlanError, match=message):
            call()


# Compact


def test_a_compact_store_is_the_kept_chips(store: Path, filtered: rd.Chips, tmp_path: Path) -> None:
    compact(store, tmp_path / "compact")
    before, after = open_chips(store), open_chips(tmp_path / "compact")
    assert_same(after.load(), before.load())
    assert after.table.equals(before.table)
    assert len(after.stored.sizes) < len(before.stored.sizes)
    some = list(after)[::-7]
    for key, values in before.take(some).items():
        np.testing.assert_array_equal(after.take(some)[key], values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_datatree(tmp_path / "compact", engine="zarr", mask_and_scale=False)
    for split in ("train", "val", "test"):
        loaded = nodes(open_chips(tmp_path / "compact", split=split).load())
        for source, dataset in loaded.items():
            node = plain[f"{split}/{source}"].to_dataset()
            assert "kept" not in node.variables
            for name in ("pixels", "chip_id", "bounds", "valid_fraction", "band"):
                np.testing.assert_array_equal(node[name].values, dataset[name].values)
    with pytest.raises(StoreError, match="what compact writes; expected what to_zarr writes"):
        filtered.to_zarr(tmp_path / "compact", progress=False)


def test_a_split_of_which_nothing_is_kept_is_left_out(single: rd.Chips, tmp_path: Path) -> None:
    chips = single.split(train=0.6, val=0.2, test=0.2, seed=1)
    with pytest.warns(UserWarning, match="split cells"):
        len(chips)
    ids = set(chips.select("train").table.column("chip_id").to_pylist())

    def only_train(px: xr.DataArray) -> NDArray[np.bool_]:
        return np.array([i in ids or i == "" for i in px["chip_id"].values])

    written(chips.filter_pixels(only_train, version="1"), tmp_path / "store")
    compact(tmp_path / "store", tmp_path / "compact")
    before, after = open_chips(tmp_path / "store"), open_chips(tmp_path / "compact")
    assert sorted(after) == sorted(ids)
    assert_same(after.load(), before.load())
    assert_same(after.load(), open_chips(tmp_path / "store", split="train").load())
    assert "pixels" in xr.open_zarr(tmp_path / "compact").variables


def test_a_cluster_keeps_and_compacts_the_same(filtered: rd.Chips, store: Path, tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        filtered.select("val").to_zarr(tmp_path / "val", client=client, progress=False)
        compact(tmp_path / "val", tmp_path / "compact", client=client)
        stream = filtered.select("val").stream(8, client=client)
        ids = [i for batch in stream for i in batch["chip_id"]]
    assert_same(open_chips(tmp_path / "val").load(), open_chips(store, split="val").load())
    assert_same(open_chips(tmp_path / "compact").load(), open_chips(store, split="val").load())
    assert ids == list(open_chips(store, split="val"))


# Plans, and real scenes


def test_an_optimized_plan_keeps_the_same(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> None:
    optical = rd.merge(s2, l8).subset(cloud_cover_lt=80).harmonize(bands=["red"], resolution=10, time="1MS")
    chips = rd.join(optical=optical, embeddings=aef.harmonize(bands=["A00"])).chips(size=32, cell_km=0.96)
    plan = chips.filter_pixels(max_cloud=0.3).sample(5).plan
    assert optimize(optimize(plan)) == optimize(plan)
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan
    mine, theirs = (plan_chips(plan, chips.query.tables, optimized=flag) for flag in (True, False))
    assert mine.table.equals(theirs.table)
    assert mine.pixel_rules == theirs.pixel_rules != ()
    assert [plan_json(s.plan) for s in mine.sources] == [plan_json(s.plan) for s in theirs.sources]


def test_a_saved_plan_streams_what_is_kept(single: rd.Chips, tmp_path: Path) -> None:
    chips = single.filter_pixels(bright)
    chips.save_plan(tmp_path / "plan")
    wanted = [i for batch in chips.stream(8) for i in batch["chip_id"]]
    found = stream_from(None, tmp_path / "plan", 8, functions=[bright])
    assert [i for batch in found for i in batch["chip_id"]] == wanted
    with pytest.raises(PlanError, match=r"no .*bright; expected every function that the plan calls"):
        stream_from(None, tmp_path / "plan", 8)


def test_clouds_of_a_real_cloudy_scene(data: Path) -> None:
    items = sorted(str(p) for p in (data / "s2_l2a_earthsearch_33TWM").glob("*/*.json"))
    scenes = rd.build_from_stac(items, name="s2", bands=["B04", "SCL"])
    chips = scenes.harmonize(bands=["red"], resolution=120).chips(size=64, cell_km=7.68)
    classes = scenes.harmonize(bands=["scl"], resolution=120).chips(size=64, cell_km=7.68)
    seen = nodes(classes.load())[""]
    inside = seen["pixels"].values[:, 0, 0] > 0
    cloudy = np.isin(seen["pixels"].values[:, 0, 0], (3, 8, 9, 10)).sum(axis=(1, 2))
    share = cloudy / np.maximum(inside.sum(axis=(1, 2)), 1)
    clear = set(seen["chip_id"].values[share <= 0.25].tolist())
    assert 0 < len(clear) < len(share)
    assert set(nodes(chips.filter_pixels(max_cloud=0.25).load())[""]["chip_id"].values.tolist()) == clear


def test_a_rule_that_changes_its_mind_is_an_error(single: rd.Chips) -> None:
    """Chips were counted by one answer; another must not deliver other chips, or hang."""
    kept_now: list[int] = []

    def moody(chips: Any) -> Any:
        return np.arange(chips.sizes["chip"]) >= len(kept_now)

    stream = single.filter_pixels(moody, version="1").stream(4)
    kept_now += [0, 0]
    with pytest.raises(ReadError, match=r"filter_pixels\(\) keeps.*as when they were counted"):
        list(stream)
