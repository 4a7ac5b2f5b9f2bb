# SPDX-License-Identifier: Apache-2.0
"""join(require=): chips live where the required sources are; the others are invalid where absent, and say so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, record
from numpy.typing import NDArray
from small_stores import assert_same, nodes, small, written

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import Join, from_json, leaves, to_json
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.jobfile import plan_json
from rasteret_dask.tasks.shards import read_chips

GRID: dict[str, Any] = {"size": 32, "cell_km": 0.96}
CUT: dict[str, Any] = {"size": 64, "cell_km": 1.28}
SHARD_BYTES = 1_000_000
"""Some eight chips."""


@pytest.fixture(scope="module")
def optical(l8: rd.Collection) -> rd.Collection:
    """Return Landsat's scenes, which lie everywhere."""
    return l8.harmonize(["red"], resolution=10, time="1MS", dtype="uint16")


@pytest.fixture(scope="module")
def west(s2: rd.Collection) -> rd.Collection:
    """Return Sentinel-2's western granules: a part of the ground has none."""
    return s2.filter(tile="MGRS-33UVR").harmonize(["nir", "SCL"], time="1MS", kinds={"SCL": "class"})


@pytest.fixture(scope="module")
def some(optical: rd.Collection, west: rd.Collection) -> rd.Chips:
    """Return chips that all have the optical source, and of which some lack the other."""
    return rd.join(optical=optical, west=west, require=["optical"]).chips(**CUT)


@pytest.fixture(scope="module")
def loaded(some: rd.Chips) -> dict[str, xr.Dataset]:
    """Return what some.load() gives, by source."""
    return nodes(some.load())


def ids(chips: rd.Chips) -> list[str]:
    """Return the ids of chips, in order."""
    result: list[str] = chips.table.column("chip_id").to_pylist()
    return result


def fed(chips: rd.Chips, source: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return chip -> (slot, order, record) of each entry of one source, by the table's own columns."""
    rows = chips.table.select(["chip_id", "feeds"]).to_pylist()
    return {
        row["chip_id"]: [(f["slot"], f["order"], f["record"]) for f in row["feeds"] if f["source"] == source]
        for row in rows
    }


RASTERS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(4, 6), st.booleans()),
    min_size=1, max_size=5,
)  # fmt: skip
"""(400 m east, 400 m south, month, whether all of the ground is covered) of each record."""


def scenes(name: str, rasters: list[tuple[int, int, int, bool]]) -> rd.Collection:
    """Return records of made-up rasters of 1.28 km, on ground of 2.48 km."""
    rows = []
    for at, (east, south, month, whole) in enumerate(rasters):
        west, north, px = (
            (500_000.0, 5_400_000.0, 256)
            if whole
            else (500_000.0 + 400 * east, 5_400_000.0 - 400 * south, 128)
        )
        when = f"2024-{month:02d}-{3 + at:02d}T10:00:00"
        rows.append(record(f"{name}-{at}", west=west, north=north, px=(px, px), when=when, bands=("B04",)))
    return collection(name, *rows)


@settings(max_examples=20, deadline=None)
@given(RASTERS, RASTERS, st.booleans(), st.sampled_from([0.3, 1.0]), st.integers(0, 3), st.booleans())
def test_required_sources_alone_decide_on_chips(
    mine: list[tuple[int, int, int, bool]],
    theirs: list[tuple[int, int, int, bool]],
    slots: bool,
    min_coverage: float,
    min_slots: int,
    optional_first: bool,
) -> None:
    time = "1MS" if slots else None
    dates = ("2024-04-01", "2024-06-30")
    own = scenes("own", mine).subset(date_range=dates).harmonize(["red"], time=time)
    other = scenes("other", theirs).subset(date_range=dates).harmonize(["red"], time=time)
    sources = {"other": other, "own": own} if optional_first else {"own": own, "other": other}
    cut: dict[str, Any] = {**GRID, "min_coverage": min_coverage, "min_slots": min_slots if slots else 0}
    wanted, feeds = planned(rd.join(own=own).chips(**cut), "own")
    chips = rd.join(require=["own"], **sources).chips(**cut)
    found, same = planned(chips, "own")
    assert found == wanted
    assert same == feeds
    if not wanted:
        return
    inner, of_both = planned(rd.join(**sources).chips(**cut, reference="own"), "other")  # type: ignore[arg-type]
    of_chips = fed(chips, "other")
    assert {chip for chip, entries in of_chips.items() if entries} == set(inner)
    assert {chip: of_chips[chip] for chip in inner} == of_both
    assert chips.explain()["present"] == {
        name: len(wanted) if name == "own" else len(inner) for name in sources
    }


def planned(chips: rd.Chips, source: str) -> tuple[list[str], dict[str, list[tuple[Any, ...]]]]:
    """Return the ids of chips and what feeds a source of them; nothing where there is no chip."""
    try:
        return ids(chips), fed(chips, source)
    except PlanError:
        return [], {}


def test_a_source_may_lie_far_from_the_area() -> None:
    here = collection("here", record("h", bands=("B04",))).harmonize(["red"], time="1MS")
    away = collection("away", record("a", north=6_400_000.0, bands=("B04",), when="2024-05-10T10:00:00"))
    join = rd.join(here=here, away=away.harmonize(["red"], time="1MS"), require=["here"])
    chips = join.chips(**GRID, aoi=(15.0, 48.73, 15.03, 48.75))
    assert chips.explain()["present"] == {"here": len(chips), "away": 0}
    inner = rd.join(here=here, away=away.harmonize(["red"], time="1MS"))
    with pytest.raises(PlanError, match="source 'away'"):
        len(inner.chips(**GRID, aoi=(15.0, 48.73, 15.03, 48.75)))


def test_all_required_is_the_join_of_before(optical: rd.Collection, west: rd.Collection) -> None:
    plain = rd.join(optical=optical, west=west)
    for require in (["optical", "west"], ("west", "optical")):
        named = rd.join(optical=optical, west=west, require=require)
        assert named.plan == plain.plan
        assert named.chips(**CUT).job.digest == plain.chips(**CUT).job.digest
    assert "require" not in to_json(plain.plan)  # hashes of plans that were made before stay
    assert "optional" not in plan_json(plain.chips(**CUT).job.sources[0])
    some = rd.join(optical=optical, west=west, require="optical")
    assert some.chips(**CUT).job.digest != plain.chips(**CUT).job.digest
    assert from_json(to_json(some.plan)) == some.plan


def test_pixels_are_those_of_the_inner_join_where_there_are_any(
    some: rd.Chips, loaded: dict[str, xr.Dataset], optical: rd.Collection, west: rd.Collection
) -> None:
    own = nodes(rd.join(optical=optical).chips(**CUT).load())[""]
    xr.testing.assert_equal(loaded["optical"]["pixels"].drop_vars("units"), own["pixels"].drop_vars("units"))
    assert "present" not in loaded["optical"]
    inner = nodes(rd.join(optical=optical, west=west).chips(**CUT, reference="optical").load())["west"]
    mine = loaded["west"]
    there = np.asarray(mine["present"].values.any(axis=1))
    assert 0 < there.sum() < len(there)
    assert mine["chip_id"].values[there].tolist() == inner["chip_id"].values.tolist()
    for name in ("pixels", "valid_fraction", "datetime", "member"):
        np.testing.assert_array_equal(mine[name].values[there], inner[name].values)
    feeds = fed(some, "west")  # the oracle: slots that any record feeds
    slots = [[any(slot == at for slot, *_ in feeds[chip]) for at in range(3)] for chip in ids(some)]
    np.testing.assert_array_equal(mine["present"].values, slots)


def test_absent_is_invalid(loaded: dict[str, xr.Dataset]) -> None:
    mine = loaded["west"]
    empty = ~mine["present"].values
    assert np.isnan(mine["pixels"].values[empty]).all()
    assert (mine["valid_fraction"].values[empty] == 0).all()
    assert (mine["member"].values[empty] == "").all()
    assert np.isnat(mine["datetime"].values[empty]).all()


def test_integers_hold_the_fill_where_absent(l8: rd.Collection, s2: rd.Collection) -> None:
    other = s2.filter(tile="MGRS-33UVR").harmonize(["nir"], dtype="uint16", pick="median", time="3MS")
    chips = rd.join(a=l8.harmonize(["red"], resolution=10, time="3MS"), b=other, require=["a"]).chips(**CUT)
    b = nodes(chips.load())["b"]
    empty = ~b["present"].values
    assert empty.any()
    assert (b["pixels"].values[empty] == b["pixels"].attrs["_FillValue"]).all()
    assert not b["valid"].values[empty].any()


def test_nothing_is_asked_for_where_absent(some: rd.Chips, loaded: dict[str, xr.Dataset]) -> None:
    there = dict(
        zip(
            loaded["west"]["chip_id"].values,
            loaded["west"]["present"].any("time").values,
            strict=True,
        )
    )
    layout = small(some, SHARD_BYTES // 8)
    seen = {True: 0, False: 0}
    for shard in layout.job.shards():
        made = read_chips(layout.job, shard, ReadContext())
        any_there = any(there[chip] for chip in made["west"]["chip_id"].values)
        seen[any_there] += 1
        counts = made["west"].attrs["counts"]  # tiles that another shard brought count as wanted too
        assert (counts["tiles_wanted"] > 0) == any_there
        assert any_there or not any(counts.values())
    assert min(seen.values()) > 0


def test_every_exit_gives_the_same(some: rd.Chips, loaded: dict[str, xr.Dataset], tmp_path: Path) -> None:
    assert_same(some.to_xarray().load(), xr.DataTree.from_dict({f"/{n}": d for n, d in loaded.items()}))
    stored = rd.open_chips(written(some, tmp_path / "store.zarr", SHARD_BYTES))
    for found in (nodes(stored.load()), nodes(stored.to_xarray().load())):
        for name, dataset in loaded.items():
            for variable in (
                "pixels",
                "datetime",
                "member",
                "valid_fraction",
                *(["present"] * (name == "west")),
            ):
                np.testing.assert_array_equal(found[name][variable].values, dataset[variable].values)
    plain = xr.open_zarr(tmp_path / "store.zarr", group="west")
    np.testing.assert_array_equal(plain["present"].values, loaded["west"]["present"].values)
    assert "present" in plain.coords
    at = {chip: row for row, chip in enumerate(loaded["west"]["chip_id"].values)}
    some.save_plan(tmp_path / "plan")
    streams = (
        some.stream(batch_size=7),
        stored.stream(batch_size=7),
        rd.stream_from(None, tmp_path / "plan", batch_size=7),
    )
    for stream in streams:
        seen = []
        for batch in stream:
            rows = [at[chip] for chip in batch["chip_id"]]
            seen += rows
            assert "optical/present" not in batch
            assert batch["west/present"].dtype == bool
            np.testing.assert_array_equal(batch["west/present"], loaded["west"]["present"].values[rows])
            np.testing.assert_array_equal(batch["west"], loaded["west"]["pixels"].values[rows])
            assert not batch["west/valid"][~batch["west/present"]].any()
        assert sorted(seen) == list(range(len(at)))
    batch = stored.take(ids(some)[:3])
    assert "present" in rd.as_xarray(batch)["west"].coords


def test_torch_has_it_too(some: rd.Chips) -> None:
    torch = pytest.importorskip("torch")
    from rasteret_dask.torchdata import as_tensors

    batch = next(some.stream(batch_size=8))
    assert as_tensors(batch)["west/present"].dtype == torch.bool
    assert as_tensors(batch, image="west")["present"].shape == (8, 3)


def test_blocks_plan_the_same(some: rd.Chips, tmp_path: Path) -> None:
    dealt = some.split(train=0.7, val=0.15, test=0.15, seed=1)
    blocks = dealt.by_blocks(tmp_path / "blocks", progress=False, windows=16)
    assert blocks.to_chips().table.equals(dealt.table)
    assert blocks.explain()["present"] == dealt.explain()["present"]
    assert blocks.audit() == dealt.audit()
    report = blocks.to_zarr(tmp_path / "store.zarr", progress=False)
    assert report.chips == len(dealt)
    there = nodes(rd.open_chips(str(tmp_path / "store.zarr")).load())["west"]
    mine = nodes(dealt.load())["west"]
    np.testing.assert_array_equal(there["present"].values, mine["present"].values)


def test_reports_say_who_has_what(some: rd.Chips, loaded: dict[str, xr.Dataset]) -> None:
    there = np.asarray(loaded["west"]["present"].values.any(axis=1))
    count, total = int(there.sum()), len(there)
    told = some.explain()
    assert told["present"] == {"optical": total, "west": count}
    assert f"chips with        optical {total}, west {count}" in str(told)
    audit = some.split(train=0.7, val=0.15, test=0.15).audit()
    assert sum(audit.present["west"].values()) == count
    assert f"with west: {audit.present['west']['train']} of {audit.chips['train']} train" in str(audit)
    lacking = some.why(ids(some)[int(np.flatnonzero(~there)[0])])
    (line,) = (one for one in lacking.reasons if one.startswith("west: absent"))
    assert "of west" in line or "by west" in line
    having = some.why(ids(some)[int(np.flatnonzero(there)[0])])
    assert not any("absent" in one for one in having.reasons)
    assert 'join(optical, west, require=["optical"])' in repr(some)


def test_a_rule_judges_what_a_chip_has(some: rd.Chips, loaded: dict[str, xr.Dataset]) -> None:
    there = np.asarray(loaded["west"]["present"].values.any(axis=1))
    kept = nodes(some.filter_pixels(min_valid=0.999, source="west").load())["west"]["chip_id"].values.tolist()
    seen = np.isfinite(loaded["west"]["pixels"].values).all(axis=2)
    wanted = []
    for at, chip in enumerate(ids(some)):
        slots = loaded["west"]["present"].values[at]
        if not there[at] or seen[at][slots].mean() >= 0.999:
            wanted.append(chip)
    assert kept == wanted
    none = some.filter_pixels(_nothing, source="west").load()
    assert nodes(none)["west"]["chip_id"].values.tolist() == [
        c for c, t in zip(ids(some), there, strict=True) if not t
    ]


def _nothing(chips: xr.DataArray) -> NDArray[np.bool_]:
    return np.zeros(chips.sizes["chip"], dtype=bool)


def test_a_source_may_be_nowhere(optical: rd.Collection, west: rd.Collection, tmp_path: Path) -> None:
    east = (15.03, 50.165, 15.036, 50.18)
    chips = rd.join(optical=optical, west=west, require=["optical"]).chips(**CUT, aoi=east)
    assert chips.explain()["present"]["west"] == 0
    loaded = nodes(chips.load())["west"]
    assert not loaded["present"].values.any()
    assert np.isnan(loaded["pixels"].values).all()
    stored = rd.open_chips(written(chips, tmp_path / "store.zarr", SHARD_BYTES))
    batch = stored.take(ids(chips)[:2])
    assert not batch["west/present"].any()


def test_a_recipe_says_it(some: rd.Chips, small_world: Any, tmp_path: Path) -> None:
    text = some.to_recipe(tmp_path / "train.toml")
    assert 'require = ["optical"]' in text
    again = rd.load_recipe(tmp_path / "train.toml").chips()
    assert again.job.digest == some.job.digest


def test_what_cannot_be_required(optical: rd.Collection, west: rd.Collection) -> None:
    join = partial(rd.join, optical=optical, west=west)
    with pytest.raises(PlanError, match=r"'sar'; expected one or several of optical, west"):
        join(require=["sar"])
    with pytest.raises(PlanError, match="an empty list"):
        join(require=[])
    with pytest.raises(PlanError, match=r"chips\(reference='west'\)") as error:
        join(require=["optical"]).chips(**CUT, reference="west").table  # noqa: B018
    assert "chips(reference='optical')" in str(error.value)
    assert "join(require=['optical', 'west'])" in str(error.value)
    three = join(require=["optical"]).join(third=west)
    assert three.plan.require == ("optical", "third")  # type: ignore[union-attr]
    assert (optical & join(require=["west"])).plan.require == ("l8", "west")  # type: ignore[union-attr]
    both = join(require=["optical", "west"]).chips(**CUT, reference="west")
    assert len(both)
    plan = join(require=["west"]).plan
    assert isinstance(plan, Join)
    assert [source.name for source in leaves(plan)] == ["l8", "s2"]
    assert join(require=["west"]).chips(**CUT).planned.reference == 1
