"""explain() tells what the plan has and what its tasks will ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.show import explain as module
from rasteret_dask.show.explain import explain
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.mapping import outputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cells:UserWarning"),
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


def test_it_is_text_html_and_json() -> None:
    said = plan().explain()
    assert json.loads(json.dumps(said.to_dict())) == said.to_dict()
    text, page = str(said), said._repr_html_()
    for part in ("records", "to read", "peak per task", "dropped", "window not covered to 100% by s2"):
        assert part in text
        assert part in page
    assert page.startswith("<table>")
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
