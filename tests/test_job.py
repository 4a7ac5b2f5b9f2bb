"""A frozen plan: its shards, where they lie, and how they follow the source's tiles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cells:UserWarning")

CELLS: dict[str, Any] = {"cell_km": 1.28}


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
