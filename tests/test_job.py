"""A frozen plan: its shards, where they lie, and how they follow the source's tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.grid import transformer
from rasteret_dask.tasks import job as module
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

CELLS: dict[str, Any] = {"cell_km": 1.28}


@cache
def over_the_border() -> rd.Chips:
    """Chips of two zones, in three splits."""
    rows = [
        record("east", west=288_000.0, north=5_400_000.0, px=(400, 400), epsg=32633),
        record("west", west=708_000.0, north=5_400_000.0, px=(400, 400), epsg=32632),
    ]
    return (
        collection("s2", *rows).harmonize(["red"], time="1MS").chips(32, **CELLS).split(0.5, 0.3, 0.2, seed=2)
    )


def small_shards(chips: rd.Chips, count: int) -> Job:
    """Freeze with at most ``count`` chips a shard: one float32 band."""
    return freeze(chips.planned, shard_bytes=count * 32 * 32 * 4)


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("val",), ("test", "train")])
def test_chips_know_the_place_of_their_shard(splits: tuple[str, ...]) -> None:
    job = small_shards(over_the_border(), 7).select(splits)
    wanted = np.full(job.chips.num_rows, -1)
    along = {h.number: h.per_shard / h.chips for h in job.hierarchies}
    shards = sorted(job.shards(), key=lambda s: ((s.number + 0.5) * along[s.hierarchy], s.hierarchy))
    for place, shard in enumerate(shards):
        wanted[shard.start : shard.stop] = place
    np.testing.assert_array_equal(job.running, wanted)
    assert set(job.epsg[job.running >= 0].tolist()) == {32632, 32633}


@pytest.mark.parametrize("first", [0, 3])
def test_a_shard_is_told_by_its_place_alone(first: int) -> None:
    job = small_shards(over_the_border(), 7).select({"train", "test"})
    job = replace(job, hierarchies=tuple(replace(h, first=first) for h in job.hierarchies))
    shards = list(job.shards())
    assert job.shard_count == len(shards) > 2
    assert [job.nth_shard(place) for place in range(len(shards))] == shards


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bounds_in_another_zone_are_those_of_each_chip_and_a_corner_is_moved_once(
    data: st.DataObject,
) -> None:
    job = over_the_border().job
    chips = np.array(data.draw(st.lists(st.integers(0, job.chips.num_rows - 1))), dtype=np.int64)
    moved = list[int]()

    def counted(source: int, target: int) -> Any:
        def transform(x: Any, y: Any) -> Any:
            assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == len(x)
            moved.append(len(x))
            return transformer(source, target).transform(x, y)

        return SimpleNamespace(transform=transform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "transformer", counted)
        found = job.bounds_in(chips, 32633)
    corners = set()
    for chip, box in zip(chips.tolist(), found.tolist(), strict=True):
        west, south, east, north = job.bounds[chip].tolist()
        move = transformer(int(job.epsg[chip]), 32633).transform
        places = [(x, y) for x in (west, east) for y in (south, north)]
        if job.epsg[chip] == 32633:
            assert box == [west, south, east, north]
            continue
        corners |= set(places)
        xs, ys = zip(*(move(x, y) for x, y in places), strict=True)
        assert box == [min(xs), min(ys), max(xs), max(ys)]
    assert sum(moved) == len(corners)


@pytest.mark.parametrize(
    ("budget", "per_shard"), [(5, 5), (15, 15), (16, 16), (31, 16), (47, 32), (300, 256)]
)
@pytest.mark.parametrize("dates", [1, 2])
def test_shards_hold_whole_tiles(budget: int, per_shard: int, dates: int) -> None:
    """Tiles of 4 x 4 chips: where one fits a shard, no two shards need the same tile."""
    rows = [record(f"a{i}", px=(512, 384), when=f"2024-0{i + 4}-10T10:00:00") for i in range(dates)]
    chips = collection("s2", *rows).harmonize(["red"], time="1MS").chips(32, grid="tiles")
    job = freeze(chips.planned, shard_bytes=budget * 32 * 32 * 4 * dates)
    assert {h.per_shard for h in job.hierarchies} == {per_shard}
    shards = [(shard.number, slice(shard.start, shard.stop)) for shard in job.shards()]
    place = np.stack([chips.table.column(n).to_numpy() // 4 for n in ("row", "col")], -1)
    needed = {(number, tuple(tile)) for number, own in shards for tile in place[own].tolist()}
    tiles = {tile for _, tile in needed}
    assert len(tiles) == 12
    assert (len(needed) == len(tiles)) == (per_shard >= 16)


def test_without_a_time_axis_a_tile_s_acquisitions_follow_each_other() -> None:
    rows = [record(f"a{i}", px=(512, 384), when=f"2024-04-{i + 4:02d}T10:00:00") for i in range(3)]
    chips = collection("s2", *rows).harmonize(["red"]).chips(32, grid="tiles")
    job = freeze(chips.planned, shard_bytes=100 * 32 * 32 * 4)
    assert job.hierarchies[0].per_shard == 96  # six tiles of 4 x 4 chips
    tile = [
        [r // 4, c // 4]
        for r, c in zip(*(chips.table.column(n).to_pylist() for n in ("row", "col")), strict=True)
    ]
    runs = [(*t, when) for t, when in zip(tile, chips.table.column("datetime").to_pylist(), strict=True)]
    assert [len(list(group)) for _, group in itertools.groupby(runs)] == [16] * 36
    assert [t for t, _ in itertools.groupby(runs, key=lambda run: run[:2])] == [run[:2] for run in runs[::48]]
    assert all(runs[i][2] < runs[i + 16][2] for i in range(0, len(runs), 48))
