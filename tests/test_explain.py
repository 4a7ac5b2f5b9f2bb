"""explain() tells what the plan has and what its tasks will ask for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import shapely
from made_records import collection, project, record

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.show import explain as module
from rasteret_dask.show.explain import explain
from rasteret_dask.table.records import Records
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.mapping import outputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
]

CELLS: dict[str, Any] = {"cell_km": 1.28}


def plan(**more: Any) -> rd.Chips:
    rows = [
        record(f"r{m}{t}", when=f"2024-{m:02d}-10T10:00:00", west=500_000.0 + 3000 * t, datatake=str(m), tile=str(t))
        for m in (4, 5, 6) for t in (0, 1)
    ]  # fmt: skip
    own = collection("s2", *rows, record("far", north=5_000_000.0, when="2024-04-11T10:00:00"))
    chips = own.harmonize(["red", "nir"], units="reflectance", time="1MS", **more).chips(32, **CELLS)
    return chips.filter(("ymin", ">", 5_200_000.0)).split(0.5, 0.25, 0.25, seed=3)


def test_figures_are_the_plan_s() -> None:
    chips = plan(mask="clouds", pick="last")
    said = chips.explain()
    table = chips.table.column("split").to_pylist()
    assert said["splits"] == {n: table.count(n) for n in set(table)}
    assert said["chips"] == len(chips)
    assert said["records"] == {"s2": {"scanned": 7, "used": 6}}
    assert said["shards"] == said["tasks"] == len(list(chips.job.shards()))
    assert said["chip_shape"] == {"s2": [3, 2, 32, 32]}
    assert said["write_bytes"] == len(chips) * 3 * 2 * 32 * 32 * 4
    assert said["times"] == {"s2": ["2024-04-01T00:00:00", "2024-05-01T00:00:00", "2024-06-01T00:00:00"]}
    assert said["bands"] == {"s2": ["red", "nir"]}
    assert said["pick"] == {"s2": "last"}
    assert said["mask"] == {"s2": ["clouds"]}
    assert said["resolution"] == {"s2": 10.0}
    assert said["pixels"] == {"s2": {"native": 6, "translated": 0, "resampled": 0}}
    assert said["dropped"] == dict(chips.planned.dropped)
    assert said["peak_task_bytes"] >= said["write_bytes"] / said["shards"]
    (rule,) = {(r["scale"], r["offset"]) for r in said["radiometry"]["s2"]}
    assert rule == (1e-4, 0.0)
    part = chips.select("train").explain()
    assert part["chips"] == said["splits"]["train"]
    assert part["requests"] <= said["requests"]


def test_no_list_of_all_shards_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has tens of thousands: their number is a sum, and those that are looked at have known places."""

    def listed(job: Any) -> None:
        raise AssertionError(f"all {job.shard_count} shards are listed")

    chips = plan()
    shards = len(list(chips.job.shards()))
    monkeypatch.setattr(type(chips.job), "shards", listed)
    assert chips.explain()["shards"] == shards


def test_a_layout_s_header_is_looked_up_once_and_never_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the count of tiles and by the kernels together, however many records and bands have it."""
    looked_up: list[int] = []
    plain = Records.look_up

    def look_up(records: Records, rows: Any, bands: Any) -> None:
        looked_up.append(len(rows) * len(bands))
        plain(records, rows, bands)

    def alone(records: Records, row: int, band: str) -> None:
        raise AssertionError(f"{band} of record {row} is looked up alone")

    chips = plan()
    assert len(chips.job.layouts[0].records) > 2
    monkeypatch.setattr(Records, "look_up", look_up)
    monkeypatch.setattr(Records, "_asset", alone)
    chips.explain()
    assert sum(looked_up) == 2  # places of granules


def test_it_is_text_html_and_json() -> None:
    said = plan().explain()
    assert json.loads(json.dumps(said.to_dict())) == said.to_dict()
    text, page = str(said), said._repr_html_()
    for part in ("records", "to read", "peak per task", "dropped", "window not covered to 100% by s2"):
        assert part in text
        assert part in page
    assert page.startswith("<div class=rd-card>")
    assert "<script" not in page
    assert repr(said) == text


def test_names_are_escaped_in_html() -> None:
    said = collection("<b>s2<b>", record("a")).chips(32, **CELLS).explain()
    assert "<b>" not in said._repr_html_()


def test_requests_of_few_shards_are_counted_and_of_many_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(f"a{i}", px=(2000, 2000), west=500_000.0 + 20_000 * i, datatake=str(i)) for i in range(2)]
    chips = collection("s2", *rows).chips(32, **CELLS)
    exact = chips.explain()
    assert exact["requests_counted_on_shards"] == exact["shards"] > 8
    assert "(estimated)" not in str(exact)
    assert exact["read_bytes"] == 1000 * exact["requests"]
    tiles = 2 * 16 * 16  # of each of the three bands, as far as chips reach
    assert exact["requests"] <= 3 * tiles < exact["requests_by_shard"]
    monkeypatch.setattr(module, "EXACT_SHARDS", 5)
    rough = chips.explain()
    assert rough["requests_counted_on_shards"] == 5
    assert "(estimated)" in str(rough)
    for figure in ("requests", "requests_by_shard", "read_bytes"):
        assert rough[figure] == pytest.approx(exact[figure], rel=0.3)
    assert rough["requests"] < rough["requests_by_shard"]


def test_shards_of_whole_tiles_share_none() -> None:
    chips = collection("s2", record("a", px=(512, 512))).harmonize(["red"]).chips(32, grid="tiles")
    said = explain(chips.planned, job := freeze(chips.planned, 40 * 32 * 32 * 4), outputs_of(job, {}))
    assert said["chips_per_shard"] == 32
    assert said["requests"] == said["requests_by_shard"] == 16
    assert "no two shards share one" in str(said)


def test_all_that_is_dropped_is_told_with_its_reason() -> None:
    once: dict[str, Any] = {"datatake": "d", "tile": "t"}
    rows = [
        record("old", baseline="05.00", **once),
        record("new", baseline="05.10", **once),
        record("broken", datatake="x", unreadable=("B04",), when="2024-05-01T10:00:00"),
    ]
    own = collection("s2", *rows).where(readable=True).harmonize(["red"])
    year = record(
        "y", west=502_000.0, when="2024-01-01T00:00:00", until="2025-01-01T00:00:00", bands=("data",)
    )
    chips = (
        rd.join(s2=own, y=collection("y", year)).chips(32, **CELLS).split(0.4, 0.3, 0.3, seed=1, buffer_m=300)
    )
    dropped = chips.explain()["dropped"]
    assert dropped["record replaced by a newer baseline (s2)"] == 1
    assert any("unreadable" in why and n == 1 for why, n in dropped.items())
    assert dropped["window not covered to 100% by s2"] > 0
    assert dropped["chip of s2 without an acquisition of y"] > 0
    assert dropped["val or test chip nearer than 300 m to train"] > 0
    for why, count in dropped.items():
        assert f"{count:,}: {why}" in str(chips.explain())


# The made-up world: what is said is what is asked for


def tiles_read(chips: rd.Chips) -> int:
    """Read every shard of a plan and add up what its sessions took from files."""
    SHARED.clear()  # a job that was stopped a moment ago leaves the parts of tiles that its next shards wanted
    total = 0
    for shard in chips.job.shards():
        for number in range(len(chips.job.sources)):
            members = pixels.members_of(chips.job, shard, number)
            total += pixels.merged(chips.job, shard, number, members).attrs["counts"]["tiles_read"]
    return total


@pytest.mark.parametrize("grid", ["zone", "tiles"])
@pytest.mark.parametrize("time", [None, "1MS"])
def test_requests_are_the_tiles_that_are_read(small_world: World, grid: str, time: str | None) -> None:
    """One granule, so no invalid pixel is filled from another record; a process may share tiles between shards."""
    own = rd.build_from_stac(str(small_world.sentinel2), name="s2", date_range=small_world.date_range)
    tile = own.to_table().column("tile").to_pylist()[0]
    harmonized = own.where(tile=tile).harmonize(["red", "nir"], mask="clouds", time=time)
    chips = harmonized.chips(32, grid=grid, **CELLS)
    said = chips.explain()
    assert 0 < said["requests"] <= tiles_read(chips) <= said["requests_by_shard"]


def test_requests_are_at_most_what_filling_may_need(small_world: World) -> None:
    own = rd.build_from_stac(str(small_world.sentinel2), name="s2", date_range=small_world.date_range)
    chips = own.harmonize(["red"], time="1MS").chips(32, **CELLS)
    assert tiles_read(chips) <= chips.explain()["requests_by_shard"]


@pytest.mark.parametrize(
    ("how", "stride"),
    [
        ({"resolution": 10.0}, 32), ({"resolution": 30.0}, 11), ({"resolution": 7.5, "resampling": "cubic"}, 11),
        ({"resolution": 90.0, "resampling": "nearest"}, 32), ({"resolution": 120.0}, 32),
    ],
)  # fmt: skip
def test_no_more_than_all_pixels_of_the_tiles_are_used(how: dict[str, Any], stride: int) -> None:
    own = collection(
        "l8", record("a", pixel=30.0), record("b", pixel=30.0, epsg=32634, when="2024-04-11T10:00:00")
    )
    size = how["resolution"] * 32
    near = shapely.box(14.98, 48.7, 15.06, 48.76)
    chips = own.harmonize(["red", "nir"], **how).chips(
        32, stride, cell_km=4 * size / 1000, min_coverage=0.2, aoi=near
    )
    said = chips.explain()
    assert 0 < said["tile_fit"] <= 1
    assert f"{said['tile_fit']:.0%} of the pixels" in str(said)


def test_the_fit_is_the_share_of_pixels_that_chips_lie_on() -> None:
    """A native chip of 32 px in the corner of a tile of 128, and one whose ground lies in four tiles."""
    own = collection("s2", record("a", px=(512, 512))).harmonize(["red"])
    tile = collection("s2", record("a", px=(512, 512))).harmonize(["red"]).chips(128, grid="tiles")
    assert tile.explain()["tile_fit"] == 1
    west, north = 500_000.0, 5_400_000.0
    for offset, fit in ((0, 32 * 32 / 128**2), (112, 32 * 32 / (4 * 128**2))):
        place = project(shapely.Point(west + 10 * (offset + 16), north - 10 * (offset + 16)), 32633, 4326)
        assert own.chips(32, at=[place]).explain()["tile_fit"] == pytest.approx(fit, abs=1e-4)


def test_chips_with_a_slot_that_is_not_covered_are_counted() -> None:
    """May's only scene lies over the western half; June has two records of one pass that meet in the middle."""
    half: dict[str, Any]
    quarter: dict[str, Any]
    half, quarter = {"px": (200, 400)}, {"px": (200, 400), "west": 502_000.0, "tile": "e"}
    rows = [
        record("april", when="2024-04-10T10:00:00", datatake="a"),
        record("may", when="2024-05-10T10:00:00", datatake="b", **half),
        record("june-w", when="2024-06-10T10:00:00", datatake="c", tile="w", **half),
        record("june-e", when="2024-06-10T10:00:05", datatake="c", **quarter),
    ]
    own = collection("s2", *rows).harmonize(["red"], time="1MS")
    chips = own.chips(32, cell_km=0.32, min_coverage=0.01)
    table = chips.table
    share = []
    for box in zip(*(table.column(n).to_pylist() for n in ("xmin", "ymin", "xmax", "ymax")), strict=True):
        window = shapely.box(*box)
        for ground in ((500_000.0, 502_000.0), (500_000.0, 504_000.0), (500_000.0, 504_000.0)):
            part = window.intersection(shapely.box(ground[0], 5_396_000.0, ground[1], 5_400_000.0))
            share.append(part.area / window.area)
    # an outline is a pixel larger than its raster: neighbours meet, and edges are not lost
    by_chip = np.array(share).reshape(len(chips), 3)
    said = chips.explain()["coverage"]["s2"]
    partly = (by_chip > 0.05) & (by_chip < 0.95)
    assert partly.any()
    assert said["chips"] == int(partly.any(axis=1).sum())
    assert said["slots"] == int(partly.sum())
    assert said["least"] == pytest.approx(by_chip[partly].min(), abs=0.05)
    assert f"{said['chips']} chips with a slot under 100% covered by its main acquisition" in str(
        chips.explain()
    )
    whole = own.chips(32, cell_km=0.32, min_coverage=1.0)
    assert whole.explain()["coverage"]["s2"]["slots"] == 0
    assert "under 100% covered" not in str(whole.explain())
