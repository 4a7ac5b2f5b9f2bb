# SPDX-License-Identifier: Apache-2.0
"""Several sizes over one centre: windows of a source that reach beyond the chip, and splits that hold all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.chipping.drawing import plan_chips
from rasteret_dask.chipping.ground import Links, cells_under
from rasteret_dask.chipping.splits import SplitCells
from rasteret_dask.planning.calls import call
from rasteret_dask.planning.plan import ChipSpec, from_json, to_json
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.jobfile import job_objects
from rasteret_dask.zones import UTM

SIZE, WIDE_M, CELL_M = 16, 640.0, 960


@pytest.fixture(scope="module")
def joined(s2: rd.Collection) -> rd.Collection:
    near, wide = (s2.harmonize(["red"], time="3MS", resolution=pixel) for pixel in (10, 20))
    return rd.join(near=near, wide=wide)


@pytest.fixture(scope="module")
def chips(joined: rd.Collection) -> rd.Chips:
    return joined.chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M})


def windows(chips: rd.Chips, reach: float = 0.0) -> NDArray[np.float64]:
    names = ("xmin", "ymin", "xmax", "ymax")
    box = np.stack([chips.table.column(name).to_numpy() for name in names], -1)
    return np.asarray(box + np.array([-1, -1, 1, 1]) * reach)


def of_chips(table: pa.Table, column: str) -> dict[str, Any]:
    return dict(zip(*table.select(["chip_id", column]).to_pydict().values(), strict=True))


REACH = (WIDE_M - SIZE * 10) / 2


def test_each_source_has_the_pixels_of_its_own_window(
    chips: rd.Chips, joined: rd.Collection, s2: rd.Collection
) -> None:
    some = chips.sample(9)
    tree: Any = some.load()
    assert tree["near"]["pixels"].shape[-2:] == (SIZE, SIZE)
    assert tree["wide"]["pixels"].shape[-2:] == (32, 32)
    assert tree["wide"].attrs["context_m"] == WIDE_M
    for name, pixel, reach in (("near", 10, 0.0), ("wide", 20, REACH)):
        source = s2.harmonize(["red"], time="3MS", resolution=pixel)
        for at, box in enumerate(windows(some, reach).tolist()):
            cube = source.cube(bounds=tuple(box), crs=32633).compute()
            np.testing.assert_array_equal(tree[name]["pixels"].values[at], cube.values)
    plain = joined.chips(SIZE, cell_km=CELL_M / 1000)
    ids = chips.table.column("chip_id")
    same: Any = plain.filter(("chip_id", "in", some.table.column("chip_id").to_pylist())).load()
    assert same["near"]["pixels"].values.tobytes() == tree["near"]["pixels"].values.tobytes()
    np.testing.assert_array_equal(same["near"]["bounds"].values, tree["wide"]["bounds"].values)
    assert "context_m" not in same["wide"].attrs
    assert set(ids.to_pylist()) < set(
        plain.table.column("chip_id").to_pylist()
    )  # all of the window is covered


def test_no_window_shows_ground_of_two_splits(chips: rd.Chips, joined: rd.Collection) -> None:
    whole = joined.chips(SIZE, cell_km=CELL_M / 1000).split(0.5, 0.25, 0.25, seed=3)
    of_cell = dict(zip(*whole.table.select(["cell", "split"]).to_pydict().values(), strict=True))
    # cells that have no chip have a split too: told by chips that are free to lie anywhere
    dealt = chips.split(0.5, 0.25, 0.25, seed=3)
    kept = 0
    for split, box in zip(
        dealt.table.column("split").to_pylist(), windows(dealt, REACH).tolist(), strict=True
    ):
        west, south, east, north = box
        rows = range(int(np.floor(-north / CELL_M + 1e-9)), int(np.ceil(-south / CELL_M - 1e-9)))
        cols = range(int(np.floor(west / CELL_M + 1e-9)), int(np.ceil(east / CELL_M - 1e-9)))
        under = {of_cell.get(f"33/{row}/{col}") for row in rows for col in cols}
        if split is not None:
            assert under - {None} == {split}
            kept += 1
        elif None not in under:
            assert len(under) > 1
    assert 0 < kept < len(dealt)
    assert dealt.audit().ok
    centre = chips.split(0.5, 0.25, 0.25, seed=3, boundary="centre")
    assert not centre.table.column("split").null_count
    assert not centre.audit().ok  # pixels of one split's windows are in another's
    plain = dict(zip(*whole.table.select(["chip_id", "split"]).to_pydict().values(), strict=True))
    own = zip(*centre.table.select(["chip_id", "split"]).to_pydict().values(), strict=True)
    assert all(
        plain[name] == split for name, split in own
    )  # the same cells, dealt as they are without windows
    assert dealt.random(30, seed=1).audit().ok
    apart = chips.split(0.5, 0.25, 0.25, seed=3, buffer_m=200)
    boxes = {name: windows(apart.select(name), REACH) for name in ("train", "val") if len(apart.select(name))}
    for one in boxes.get("val", np.zeros((0, 4))).tolist():
        gaps = np.maximum(boxes["train"][:, :2] - one[2:], np.array(one[:2]) - boxes["train"][:, 2:])
        assert np.hypot(*np.maximum(gaps, 0).T).min() >= 199.5  # UTM's scale is 0.9996 at least
    assert {"train", "val"} <= set(boxes)
    assert chips.folds(4).fold(1).audit().ok


def test_exits_and_stored_splits_know_them(chips: rd.Chips, joined: rd.Collection, tmp_path: Path) -> None:
    some = chips.sample(30)
    place = str(tmp_path / "wide.zarr")
    some.to_zarr(place, progress=False)
    stored = rd.open_chips(place)
    mine: Any = some.load()
    theirs: Any = stored.load()
    for name in ("near", "wide"):
        np.testing.assert_array_equal(mine[name]["pixels"].values, theirs[name]["pixels"].values)
    assert rd.verify(place, sources=3).compared == 3
    assert next(some.stream(4))["wide"].shape == (4, 1, 1, 32, 32)
    assert "absent" not in str(some.why(some.table.column("chip_id")[0].as_py()))
    with pytest.warns(UserWarning, match="only 11 split cells"):
        dealt = some.split(0.5, 0.5, test=0.0, seed=2).table.select(["chip_id", "split"]).to_pydict()
    again = stored.split(0.5, 0.5, test=0.0, seed=2).table.select(["chip_id", "split"]).to_pydict()
    assert None in dealt["split"]
    with pytest.warns(UserWarning, match="only 11 split cells"):
        mine_of = of_chips(some.folds(3, seed=5).table, "fold")
    theirs_of = of_chips(rd.open_chips(place).folds(3, seed=5).table, "fold")
    assert mine_of == theirs_of
    assert None in mine_of.values()
    assert dict(zip(*dealt.values(), strict=True)) == dict(zip(*again.values(), strict=True))
    some.save_plan(tmp_path / "plan")
    assert next(rd.stream_from(None, str(tmp_path / "plan"), batch_size=4))["wide"].shape == (4, 1, 1, 32, 32)
    other = joined.chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M + 40})
    with pytest.raises(rd.StoreError, match="context_m"):
        other.to_zarr(place, append=True, progress=False)
    told = some.explain()
    assert told["chip_shape"] == {"near": [1, 1, SIZE, SIZE], "wide": [1, 1, 32, 32]}
    assert told["requests"]
    drawn = chips.random(10, seed=1, size=8)
    tree: Any = drawn.load()
    assert tree["wide"]["pixels"].shape[-2:] == (32, 32)


def test_each_acquisition_has_its_window(s2: rd.Collection) -> None:
    near, wide = (s2.harmonize(["red"], resolution=pixel) for pixel in (10, 20))
    joined = rd.join(near=near, wide=wide)
    chips = joined.chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M}).sample(20, seed=2)
    ids = chips.table.column("chip_id").to_pylist()
    plain = joined.chips(SIZE, cell_km=CELL_M / 1000).filter(("chip_id", "in", ids))
    assert len(plain) == len(chips) == 20
    large: Any = chips.load()["wide"]
    small: Any = plain.load()["wide"].sel(chip=np.argsort(plain.table.column("chip_id").to_pylist()))
    large = large.sel(chip=np.argsort(ids))
    assert large["chip_id"].values.tolist() == small["chip_id"].values.tolist()
    np.testing.assert_array_equal(large["datetime"].values, small["datetime"].values)
    middle = slice(12, 20)  # 240 m on each side are 12 pixels
    inside = large["pixels"].values[..., middle, middle]
    assert np.isfinite(inside).mean() > 0.5
    np.testing.assert_array_equal(inside, small["pixels"].values)


def test_a_sample_that_is_drawn_first_is_that_of_all_chips(chips: rd.Chips) -> None:
    asked = chips.split(0.5, 0.25, 0.25, seed=3).select("train").sample(7, seed=5)
    whole = plan_chips(asked.plan, asked.query.tables, optimized=False).table
    assert asked.table.select(["chip_id", "split"]).equals(whole.select(["chip_id", "split"]))


def test_what_a_chip_may_lack_needs_not_cover_its_window(joined: rd.Collection, s2: rd.Collection) -> None:
    near, wide = (s2.harmonize(["red"], time="3MS", resolution=pixel) for pixel in (10, 20))
    free = rd.join(near=near, wide=wide, require=["near"])
    chips = free.chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M})
    assert len(chips) == len(joined.chips(SIZE, cell_km=CELL_M / 1000))
    there = len(joined.chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M}))
    assert chips.explain()["present"] == {"near": len(chips), "wide": there}


def test_windows_that_cannot_be_are_refused(chips: rd.Chips, joined: rd.Collection, tmp_path: Path) -> None:
    def asked(**context: Any) -> rd.Chips:
        return joined.chips(SIZE, cell_km=CELL_M / 1000, context_m=context)

    with pytest.raises(rd.PlanError, match="above 0"):
        asked(wide=-1)
    with pytest.raises(rd.PlanError, match="no such source"):
        len(asked(wider=640))
    with pytest.raises(rd.PlanError, match="the reference"):
        len(asked(near=640))
    with pytest.raises(rd.GridError, match="Nearest sides that fit: 640, 660"):
        len(asked(wide=650))
    with pytest.raises(rd.GridError, match="Nearest sides"):
        len(asked(wide=100))
    with pytest.raises(rd.PlanError, match="context_m"):
        chips.by_blocks(tmp_path / "plan")
    with pytest.raises(rd.PlanError, match="a source with the side"):
        joined.chips(SIZE, context_m=640)  # type: ignore[arg-type]
    with pytest.raises(rd.PlanError, match="Draw them before they are dealt"):
        len(chips.split(0.5, 0.25, 0.25, seed=3).random(10, seed=1, size=8))
    drawn = chips.random(200, seed=1, size=8).split(0.5, 0.25, 0.25, seed=3)  # what that remedy says
    assert drawn.audit().ok


def test_requests_are_those_that_are_made(s2: rd.Collection) -> None:
    """One granule and one shard, so that nothing is filled or shared."""
    tile = s2.to_table().column("tile").to_pylist()[0]
    near, wide = (s2.where(tile=tile).harmonize(["red"], time="3MS", resolution=pixel) for pixel in (10, 60))
    chips = rd.join(near=near, wide=wide).chips(32, cell_km=1.28, context_m={"wide": 900}).sample(12)
    assert chips.job.size_px == (32, 15)  # 320 m are no whole number of pixels of 60 m, and 900 m are
    (shard,) = chips.job.shards()
    SHARED.clear()
    made = 0
    for source in range(2):
        read = pixels.merged(chips.job, shard, source, pixels.members_of(chips.job, shard, source))
        made += read.attrs["counts"]["tiles_read"]
    assert chips.explain()["requests"] == chips.explain()["requests_by_shard"] == made


def test_recipes_say_it(s2: rd.Collection, tmp_path: Path) -> None:
    s2.export(tmp_path / "s2.parquet")
    again = rd.load(tmp_path / "s2.parquet", name="s2")
    near, wide = (again.harmonize(["red"], time="3MS", resolution=pixel) for pixel in (10, 20))
    there = rd.join(near=near, wide=wide).chips(SIZE, cell_km=CELL_M / 1000, context_m={"wide": WIDE_M})
    text = there.to_recipe(tmp_path / "job.toml")
    assert "wide = 640.0" in text
    said: Any = rd.load_recipe(tmp_path / "job.toml").chips().plan
    assert said.spec.context_m == (("wide", WIDE_M),)


def test_plans_without_it_are_as_they_were(chips: rd.Chips, joined: rd.Collection) -> None:
    assert "context_m" not in to_json(ChipSpec(32, 32))
    assert call(chips.plan).endswith('context_m={"wide": 640.0})')
    assert from_json(to_json(chips.plan)) == chips.plan
    plain = joined.chips(SIZE, cell_km=CELL_M / 1000)
    assert joined.chips(SIZE, cell_km=CELL_M / 1000, context_m={}).plan == plain.plan
    assert plain.job.reaches_m == ()
    assert "reaches_m" not in json.loads(job_objects(plain.job)["job.json"])


def test_windows_across_the_edge_of_a_zone_lie_on_cells_of_both() -> None:
    """Cells of chips that were laid out in cells: those under their windows, as of windows that lie freely."""
    rng = np.random.default_rng(4)
    x, y = (
        285_200 + rng.uniform(-3000, 3000, 40),
        5_560_000 + rng.uniform(0, 9000, 40),
    )  # 12 degrees east, in 32633
    wide = np.stack([x - 700, y - 700, x + 700, y + 700], -1)
    epsg, cells = np.full(40, 32633), SplitCells(UTM, CELL_M)
    home = np.stack([np.floor(-y / CELL_M), np.floor(x / CELL_M)], -1).astype(np.int64)
    laid = cells_under(epsg, wide, cells, "drop", home, beyond=True)
    free = cells_under(epsg, wide, cells, "drop", None)

    def pairs(links: Links) -> set[tuple[int, ...]]:
        rows = np.concatenate([links.chip[:, None], links.zone[:, None], links.cell], axis=1)
        return set(map(tuple, rows.tolist()))

    own = {(at, 32633, *place) for at, place in enumerate(home.tolist())}
    assert pairs(laid) == pairs(free) | own
    assert {32632, 32633} <= set(laid.zone.tolist())
    centre = cells_under(epsg, wide, cells, "centre", home, beyond=True)
    assert pairs(centre) == own
