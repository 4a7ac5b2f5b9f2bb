"""Planning by blocks: the chip table of a plan made in one piece, in files, chosen from lazily."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from distributed import Client, LocalCluster
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from made_records import collection, record
from waiting import until

import rasteret_dask as rd
from rasteret_dask import chipblocks
from rasteret_dask.tasks.jobfile import open_job, write_job

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

PX = (2600, 2600)
"""Of a record: two columns of a strip and more."""


def two_zones() -> rd.Collection:
    """Return records that overlap in part, in two zones that meet, and south of the equator's lattice."""
    dates = ("2024-04-10", "2024-04-20", "2024-05-10")
    rows = [
        record(
            f"{name}-{date}", west=west, north=north, epsg=epsg, px=PX, when=f"{date}T10:00:00", cloud=cloud
        )
        for date, cloud in zip(dates, (30.0, 10.0, 20.0), strict=True)
        for name, west, north, epsg in (
            ("a", 694_000.0, 5_400_000.0, 32632),
            ("b", 706_000.0, 5_420_000.0, 32632),
            ("c", 268_000.0, 5_405_000.0, 32633),
        )
    ]
    return collection("s2", *rows)


WORLD = two_zones()


@st.composite
def plans(draw: st.DrawFn) -> rd.Chips:
    """Draw chips of several blocks, with steps that look at one chip at a time."""
    time = draw(st.sampled_from([None, "1MS"]))
    source = WORLD.harmonize(["red", "nir"], time=time) if time else WORLD
    if draw(st.booleans()):
        west = collection(
            "l8", record("l8", west=694_000.0, epsg=32632, px=(870, 870), pixel=30.0, bands=("B4",))
        )
        other = west.harmonize(["red"], time=time) if time else west
        source = rd.join(s2=source, l8=other)
    chips = source.chips(
        draw(st.sampled_from([96, 192, 210])),
        stride=draw(st.sampled_from([None, 96])),
        cell_km=draw(st.sampled_from([5.76, 7.68, 15.36])),
        min_coverage=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    by = draw(st.sampled_from(["ground", "geometry", ""]))
    if by:
        chips = chips.split(0.5, 0.25, 0.25, seed=draw(st.integers(0, 3)), by=by)
    if draw(st.booleans()):
        chips = chips.filter("col", "not in", (draw(st.integers(0, 500)),), epsg=(32632, 32633))
    return chips


def refusal(call: Callable[[], Any]) -> rd.PlanError | None:
    """Return the error that a call ends with."""
    try:
        call()
    except rd.PlanError as error:
        return error
    return None


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    chips=plans(),
    windows=st.sampled_from([1, 200, 1000, 65_536]),
    size=st.sampled_from([1, 300, 1500, 100_000]),
)
def test_blocks_are_the_plan_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, chips: rd.Chips, windows: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    error = refusal(lambda: chips.table)
    if error is not None:
        raised = refusal(lambda: chips.by_blocks(folder, progress=False, windows=windows))
        assert raised is not None
        assert (raised.subject, raised.expected) == (error.subject, error.expected)
        return
    planned = chips.by_blocks(folder, progress=False, windows=windows)
    assert planned.table.equals(chips.table)
    assert len(planned) == len(chips)
    again = planned.to_chips()
    assert again.planned.dropped == chips.planned.dropped
    assert [(h.split, h.start, h.stop, h.per_shard) for h in again.job.hierarchies] == [
        (h.split, h.start, h.stop, h.per_shard) for h in chips.job.hierarchies
    ]
    assert again.job.keys == chips.job.keys
    assert again.job.digest == chips.job.digest
    parts = list(planned.job_parts(size))
    keys = [part.keys for part in parts]
    assert {name: key for part in keys for name, key in part.items()} == chips.job.keys
    assert sum(map(len, keys)) == len(chips.job.keys)
    assert all(part.phase == chips.job.phase for part in parts)
    for part in parts[-1:]:  # it is read where it was written
        place = tmp_path_factory.mktemp("part")
        write_job(part, str(place))
        reread = open_job(str(place), part.digest)
        assert reread.keys == part.keys
        assert list(reread.shards()) == list(part.shards())


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[rd.Chips, rd.ChipBlocks[rd.Chips]]:
    """Return the same chips, planned in one piece and by blocks."""
    chips = WORLD.chips(96, cell_km=5.76, min_coverage=0.5).split(0.5, 0.25, 0.25)
    return chips, chips.by_blocks(tmp_path_factory.mktemp("halves"), progress=False, windows=300)


STEPS = st.one_of(
    st.tuples(st.just("select"), st.sampled_from([("train",), ("val", "test"), ("train", "val", "test")]), st.none()),
    st.tuples(
        st.just("filter"),
        st.sampled_from(
            [("epsg", "==", 32632), ("col", ">", 300), ("coverage", "<", 0.9), ("cell", "!=", ""),
             ("datetime", "<", "2024-05-01"), ("geometry", "intersects", shapely.box(14.0, 48.0, 17.9, 48.7).wkb_hex)]
        ),
        st.none(),
    ),
    st.tuples(
        st.just("sample"), st.tuples(st.sampled_from([1, 20, 5_000]), st.integers(0, 2)),
        st.sampled_from([None, "split", "epsg", "chip_id"]),
    ),
)  # fmt: skip


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(steps=st.lists(STEPS, max_size=3))
def test_steps_choose_lazily_what_they_choose_in_memory(
    halves: tuple[rd.Chips, rd.ChipBlocks[rd.Chips]], steps: list[tuple[str, tuple[Any, ...], str | None]]
) -> None:
    chips, blocks = halves
    for name, values, by in steps:
        more = {"by": by} if by else {}
        chips, blocks = getattr(chips, name)(*values, **more), getattr(blocks, name)(*values, **more)
    error = refusal(lambda: chips.table)
    if error is not None:
        raised = refusal(blocks.to_chips)
        assert len(blocks) == 0
        assert raised is not None
        return
    assert len(blocks) == len(chips)
    assert blocks.table.equals(chips.table)
    assert pa.concat_tables(blocks.tables()).equals(chips.table)
    assert blocks.to_chips().job.keys == chips.job.keys


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    stride=st.sampled_from([None, 48]), boundary=st.sampled_from(["drop", "centre"]), seed=st.integers(0, 5),
    ratios=st.sampled_from([(0.5, 0.25, 0.25), (0.98, 0.01, 0.01), (0.9, 0.1, 0.0)]), south=st.booleans(),
)  # fmt: skip
def test_an_audit_by_blocks_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    stride: int | None,
    boundary: Any,
    seed: int,
    ratios: Any,
    south: bool,
) -> None:
    chips = WORLD.chips(96, stride=stride, cell_km=7.68, min_coverage=0.2)
    chips = chips.split(*ratios, seed=seed, boundary=boundary)
    if south:  # then no block meets those of the other zone
        chips = chips.filter("epsg", "==", 32633)
    blocks = chips.by_blocks(tmp_path_factory.mktemp("audit"), progress=False, windows=500)
    assert blocks.audit().to_dict() == chips.audit().to_dict()


def test_explain_counts_all_and_estimates_what_is_read(
    halves: tuple[rd.Chips, rd.ChipBlocks[rd.Chips]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chips, blocks = halves
    whole = chips.explain()
    assert blocks.explain().to_dict() == whole.to_dict()
    monkeypatch.setattr(chipblocks, "EXPLAINED", len(chips) // 3)
    told = blocks.explain()
    for name in (
        "chips",
        "splits",
        "shards",
        "tasks",
        "chips_per_shard",
        "records",
        "write_bytes",
        "dropped",
    ):
        assert told[name] == whole[name], name
    assert 0.5 < told["requests"] / whole["requests"] < 2
    assert told["estimated_from_chips"] < len(chips)
    assert "of these chips" in str(told)
    client = told["client"]
    assert client["to_chips_bytes"] == len(chips) * chipblocks.CHIP_BYTES
    assert client["to_zarr_bytes"] < 600e6
    assert "in this process" in str(told)
    assert blocks.select("train").explain()["chips"] == len(chips.select("train"))


def test_what_files_say_of_themselves_needs_no_rows(tmp_path: Path) -> None:
    chips = WORLD.chips(96, cell_km=5.76).split()
    blocks = chips.by_blocks(tmp_path / "plan", progress=False, windows=300)
    for file in (tmp_path / "plan").glob("*.arrow"):
        file.unlink()
    assert len(blocks) == len(chips)
    assert len(blocks.select("train")) == len(chips.select("train"))
    with pytest.raises(rd.StoreError, match="changed or deleted meanwhile"):
        _ = blocks.table


def test_any_reader_of_arrow_reads_the_plan(halves: tuple[rd.Chips, rd.ChipBlocks[rd.Chips]]) -> None:
    chips, blocks = halves
    found = blocks.dataset.to_table(["chip_id", "split"], filter=pc.field("split") == "val")
    assert found.equals(chips.select("val").table.select(["chip_id", "split"]))


def test_a_rerun_does_what_is_missing(tmp_path: Path) -> None:
    chips = WORLD.chips(96, cell_km=5.76).split()
    chips.by_blocks(tmp_path, progress=False, windows=300)
    files = sorted(tmp_path.glob("chips-*.arrow"))
    assert len(files) > 5
    (tmp_path / "blocks.json").unlink()
    Path(f"{files[1]}.json").unlink()  # written, but not whole
    Path(f"{files[3]}.json").write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in files}
    blocks = chips.by_blocks(tmp_path, progress=False, windows=300)
    assert [at for at, file in enumerate(files) if file.stat().st_mtime_ns != before[file]] == [1, 3]
    assert blocks.table.equals(chips.table)
    for file in files:
        file.unlink()  # a plan that is whole is not looked at again
    assert len(chips.by_blocks(tmp_path, progress=False, windows=300)) == len(chips)


def test_a_killed_planner_leaves_what_another_goes_on_with(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_blocks import WORLD
WORLD.chips(96, cell_km=5.76).split().by_blocks({str(tmp_path)!r}, progress=False, windows=1)
"""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) as planner:
        until(lambda: len(list(tmp_path.glob("*.arrow.json"))) >= 3)
        planner.kill()
    assert not (tmp_path / "blocks.json").exists()
    whole = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.arrow.json")}
    chips = WORLD.chips(96, cell_km=5.76).split()
    assert chips.by_blocks(tmp_path, progress=False, windows=1).table.equals(chips.table)
    assert {file: file.stat().st_mtime_ns for file in whole} == whole


def test_a_folder_holds_one_plan(tmp_path: Path) -> None:
    chips = WORLD.chips(96, cell_km=5.76)
    chips.by_blocks(tmp_path / "plan", progress=False)
    with pytest.raises(rd.StoreError, match="another plan"):
        chips.split().by_blocks(tmp_path / "plan", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(rd.StoreError, match="something else"):
        chips.by_blocks(tmp_path / "other", progress=False)


def test_what_needs_other_chips_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    chips = WORLD.chips(96, cell_km=5.76)
    for wrong, remedy in (
        (chips.sample(10), r"by_blocks\(folder\).sample"),
        (chips.with_table(chips.table), "to_chips"),
        (chips.split(by="epsg"), r"by='epsg', test=\[...\]"),
        (chips.split(buffer_m=100), "without a buffer"),
        (WORLD.chips(128, grid="tiles"), "without by_blocks"),
    ):
        with pytest.raises(rd.PlanError, match=remedy):
            wrong.by_blocks(tmp_path / "plan", progress=False)
    assert not (tmp_path / "plan").exists()
    blocks = chips.by_blocks(tmp_path / "plan", progress=False)
    assert blocks.sample(10).table.equals(chips.sample(10).table)
    some = blocks.filter("epsg", "==", 32632).to_chips()
    assert len(some.with_table(some.table)) == len(some)
    with pytest.raises(rd.PlanError, match="this step before by_blocks"):
        _ = some.filter_pixels(max_cloud=0.5).table


def fields() -> gpd.GeoDataFrame:
    """Return fields of three crops, each in a part of the ground."""
    rng = np.random.default_rng(2)
    x, y = rng.uniform(694_000, 732_000, 60), rng.uniform(5_376_000, 5_420_000, 60)
    crop = np.array(["oats", "rye", "maize"])[np.clip((x - 694_000) // 13_000, 0, 2).astype(int)]
    return gpd.GeoDataFrame({"crop": crop}, geometry=shapely.box(x, y, x + 3000, y + 3000), crs=32632)


DEALS: dict[str, Callable[[rd.Chips], rd.Chips]] = {
    "cells": lambda chips: chips.split(0.5, 0.25, 0.25, cells=table_of(chips)),
    "epsg": lambda chips: chips.split(0.5, 0.25, 0.25, seed=2, stratify="epsg"),
    "burned": lambda chips: chips.split(0.5, 0.25, 0.25, seed=2, stratify="crop").filter(
        split=("train", "val")
    ),
    "burned later": lambda chips: chips.filter("coverage", ">", 0.5).split(
        0.5, 0.25, 0.25, seed=2, stratify="crop", cells=table_of(chips)
    ),
    "time": lambda chips: chips.split(by="time", val=("2024-04-15", "2024-04-30"), test=("2024-05-01", None)),
    "gap": lambda chips: chips.split(
        by="time", val=("2024-04-15", "2024-04-30"), test=("2024-05-01", None), gap="12D"
    ),
    "values": lambda chips: chips.split(by="epsg", test=[32633]),
    "regions": lambda chips: chips.split(
        by=gpd.GeoDataFrame(
            {"half": ["west", "east"]},
            geometry=[shapely.box(10, 40, 11.75, 60), shapely.box(11.75, 40, 20, 60)],
            crs=4326,
        ),
        test=["east"],
    ),
    "folds": lambda chips: chips.folds(4, seed=3).fold(1),
    "folds of strata": lambda chips: chips.split(seed=1).folds(3, seed=3, stratify="crop"),
    "counts": lambda chips: chips.split(0.5, 0.25, 0.25, stratify=counts_of(chips)),
}
"""Deals that look at more than a hash of a cell, or at other things."""


def table_of(chips: rd.Chips) -> pa.Table:
    cells = sorted(set(chips.table["cell"].to_pylist()))[:4]
    return pa.table({"cell": cells, "split": ["val", "test", "val", "train"]})


def counts_of(chips: rd.Chips) -> pa.Table:
    cells = sorted(set(chips.table["cell"].to_pylist()))
    numbers = np.random.default_rng(1).integers(0, 4096, (2, len(cells)))
    return pa.table({"cell": cells, "forest": numbers[0], "crop": numbers[1]})


@pytest.mark.filterwarnings("ignore::rasteret_dask.errors.StrataWarning")
@pytest.mark.parametrize("deal", DEALS)
def test_deals_by_blocks_are_those_of_the_plan_in_one_piece(deal: str, tmp_path: Path) -> None:
    chips = DEALS[deal](WORLD.chips(192, cell_km=5.76, min_coverage=0.5, labels=fields(), rasterize="crop"))
    blocks = chips.by_blocks(tmp_path / "plan", progress=False, windows=300)
    assert blocks.table.equals(chips.table)
    whole = blocks.to_chips()
    assert whole.planned.dropped == chips.planned.dropped
    assert whole.planned.split == chips.planned.split
    for name in ("cells", "fold_cells"):
        mine, theirs = getattr(whole.planned, name), getattr(chips.planned, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.table.equals(theirs.table)
    if chips.planned.split is not None:
        facts = {**chips.audit().to_dict(), "classes": {}}
        assert {**blocks.audit().to_dict(), "classes": {}} == facts
    assert whole.job.digest == chips.job.digest
    for file in (tmp_path / "plan").glob("*.arrow*"):
        file.unlink()
    assert len(chips.by_blocks(tmp_path / "plan", progress=False, windows=300)) == len(chips)


def test_a_deal_that_cannot_be_is_told_by_blocks_too(tmp_path: Path) -> None:
    chips = WORLD.chips(192, cell_km=5.76, min_coverage=0.5)
    for number, (wrong, words) in enumerate(
        (
            (chips.split(by="epsg", test=[32601]), r"test=\[32601\].*values of column epsg"),
            (chips.folds(900), r"a split cell for each fold"),
            (chips.split(by="time", val=("1999", "2000"), train=("2001", "2002")), "no chip in any range"),
            (chips.split(stratify="soil"), "no column 'soil'"),
        )
    ):
        with pytest.raises(rd.PlanError, match=words):
            wrong.by_blocks(tmp_path / str(number), progress=False, windows=300)


def test_a_table_too_large_for_memory_is_refused(
    halves: tuple[rd.Chips, rd.ChipBlocks[rd.Chips]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chipblocks, "MOST_CHIPS", 100)
    with pytest.raises(rd.PlanError, match=r"select, filter, sample"):
        halves[1].to_chips()
    assert len(halves[1].sample(100).to_chips()) == 100


def test_a_cluster_plans_the_same(tmp_path: Path) -> None:
    laid = WORLD.harmonize(["red"], time="1MS").chips(192, cell_km=5.76)
    chips = laid.split(stratify="epsg").filter("coverage", ">", 0.5)  # a pass before the plan, and the plan
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        blocks = chips.by_blocks(tmp_path, client=client, progress=False, windows=300)
    assert blocks.table.equals(chips.table)
