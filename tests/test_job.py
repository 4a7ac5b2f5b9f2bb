"""A frozen plan: its shards, where they lie, and how they follow the source's tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.job import Job, freeze

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
def test_bounds_of_shards_hold_their_chips(splits: tuple[str, ...]) -> None:
    job = small_shards(over_the_border(), 7).select(splits)
    wanted = []
    for running, shard in enumerate(job.shards()):
        own = slice(shard.start, shard.stop)
        for epsg in np.unique(job.epsg[own]):
            box = job.bounds[own][job.epsg[own] == epsg]
            low, high = box[:, :2].min(0).tolist(), box[:, 2:].max(0).tolist()
            wanted.append([running, shard.hierarchy, shard.number, int(epsg), *low, *high])
    found = job.shard_bounds
    columns = (found.running, found.hierarchy, found.number, found.epsg)
    assert [
        [*n, *b] for *n, b in zip(*(c.tolist() for c in columns), found.bounds.tolist(), strict=True)
    ] == wanted
    assert set(found.epsg.tolist()) == {32632, 32633}


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


def test_without_a_time_axis_a_tile_s_acquisitions_stay_together() -> None:
    rows = [record(f"a{i}", px=(512, 384), when=f"2024-04-{i + 4:02d}T10:00:00") for i in range(3)]
    chips = collection("s2", *rows).harmonize(["red"]).chips(32, grid="tiles")
    job = freeze(chips.planned, shard_bytes=100 * 32 * 32 * 4)
    assert job.hierarchies[0].per_shard == 96  # two tiles of 4 x 4 chips, three times each
    cells = [c.rsplit("_", 1)[0] for c in chips.table.column("chip_id").to_pylist()]
    assert all(len(set(cells[i : i + 3])) == 1 for i in range(0, len(cells), 3))
    when = chips.table.column("datetime").to_pylist()
    assert all(when[i : i + 3] == sorted(when[:3]) for i in range(0, len(when), 3))
