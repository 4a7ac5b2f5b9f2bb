"""A plan and its optimized self give the same chips, and the optimized one touches less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
import shapely
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from made_records import collection, project, record

import rasteret_dask as rd
from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.drawing import plan_chips
from rasteret_dask.planning import plan as p
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.resolve import evaluate
from rasteret_dask.planning.scan import expression, scan
from rasteret_dask.table.records import Records

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

FAR_M = 200_000.0
"""East of the others: beyond what an area of interest reaches."""
GRANULES = {
    "T1": (500_000.0, 5_400_000.0),
    "T2": (503_000.0, 5_400_000.0),
    "T3": (500_000.0 + FAR_M, 5_400_000.0),
}


def member(name: str, days: tuple[int, ...], pixel: float = 10.0, scale: float = 1e-4) -> rd.Collection:
    """Three granules a day that start seconds apart, the far one first; cloud, properties and errors vary."""
    rows = []
    for i, day in enumerate(days):
        for j, (tile, (west, north)) in enumerate(reversed(GRANULES.items())):
            number = i * 3 + j
            rows.append(
                record(
                    f"{name}-{day:03d}-{tile}",
                    west=west,
                    north=north,
                    pixel=pixel,
                    px=(round(4000 / pixel), round(4000 / pixel)),
                    when=f"2024-{4 + day // 30:02d}-{1 + day % 30:02d}T10:00:{20 * j:02d}",
                    datatake=f"{name}{day}",
                    tile=tile,
                    platform=name,
                    baseline="05.10",
                    scale=scale,
                    unreadable=("B08",) if number % 7 == 3 else ("SCL",) if number % 7 == 5 else (),
                    properties={"view": number % 3},
                    cloud=float(number * 37 % 100),
                    season=("wet", "dry")[number % 2],
                )
            )
    rows += [{**r, "id": r["id"] + "-old", "baseline": "05.09"} for r in rows[:2]]  # the same scene again
    return collection(name, *rows)


S2 = member("s2", (2, 12, 31, 45))
L8 = member("l8", (5, 40), pixel=20.0, scale=2e-4)
YEAR = collection(
    "year",
    *(
        record(f"y-{year}-{n}", west=498_000.0 + n * FAR_M, north=5_402_000.0, px=(1000, 800),
               when=f"{year}-01-01T00:00:00", until=f"{year + 1}-01-01T00:00:00", bands=("data",))
        for year in (2022, 2023, 2024) for n in (0, 1) if (year, n) != (2022, 0)
    ),
)  # fmt: skip
NEAR = project(shapely.box(500_500, 5_397_000, 503_500, 5_399_000), 32633, 4326)


def same(a: PlannedChips, b: PlannedChips) -> None:
    """Assert that two planned sets are one, but for where records stand in their pruned tables."""
    assert a.table.drop_columns(["feeds"]).equals(b.table.drop_columns(["feeds"]))
    for left, right in zip(
        a.table.column("feeds").to_pylist(), b.table.column("feeds").to_pylist(), strict=True
    ):
        assert [{**f, "row": 0} for f in left] == [{**f, "row": 0} for f in right]
    assert [s.plan for s in a.sources] == [s.plan for s in b.sources]
    for one, other in zip(a.sources, b.sources, strict=True):
        assert one.records.ids == other.records.ids
    assert (a.split, a.spec, a.resolution, a.maps) == (b.split, b.spec, b.resolution, b.maps)
    unlike = {k for k in {*a.dropped, *b.dropped} if a.dropped.get(k) != b.dropped.get(k)}
    assert all("unreadable" in k for k in unlike)  # of those in the area, or of all


def carried_out(plan: p.Node, tables: Any, optimized: bool) -> PlannedChips | type[Exception]:
    try:
        return plan_chips(plan, tables, optimized=optimized)
    except rd.RasteretDaskError as error:
        return type(error)


BBOX = (14.5, 48.0, 15.045, 49.0)
on_records = st.sampled_from(
    [
        lambda c: c.subset(cloud_cover_lt=75),
        lambda c: c.subset(date_range=("2024-04-03", "2024-05-20")),
        lambda c: c.subset(date_range=("2024-04", None)),
        lambda c: c.subset(bbox=BBOX),
        lambda c: c.subset(geometries=NEAR),
        lambda c: c.where(("view", "!=", 1)),
        lambda c: c.where(season=["wet"]),
        lambda c: c.where(readable=True),
        lambda c: c.sample(7, seed=3),
        lambda c: c.sample(3, seed=1, by="tile"),
        lambda c: c.map(abs, version="1"),
    ]
)
on_chips = st.sampled_from(
    [
        lambda c: c.filter(("row", "<", -1680)),
        lambda c: c.filter(("coverage", ">", 0.5), ("slots", ">=", 1)),
        lambda c: c.sample(40, seed=2),
        lambda c: c.sample(25, seed=2),
        lambda c: c.sample(9, by="split"),
        lambda c: c.split(0.5, 0.25, 0.25, seed=4),
        lambda c: c.split(0.5, 0.25, 0.25, by="geometry", buffer_m=100),
        lambda c: c.split(0.4, 0.3, 0.3, seed=9).select("train", "val"),
        lambda c: c.split(0.6, 0.4, 0.0).select("train", "val").select("train"),
        lambda c: c.map(abs, version="2"),
    ]
)


@st.composite
def plans(draw: st.DrawFn) -> rd.Chips:
    """Draw a plan that mostly can be carried out."""
    members = []
    for own in draw(st.lists(st.sampled_from([S2, L8]), min_size=1, max_size=2, unique_by=id)):
        for step in draw(st.lists(on_records, max_size=2)):
            own = step(own)
        members.append(own)
    whole = rd.merge(*members) if draw(st.booleans()) or len(members) > 1 else members[0]
    for step in draw(st.lists(on_records, max_size=2)):
        whole = step(whole)
    time = draw(st.sampled_from([None, "1MS", "14D"]))
    picks = ["closest", "first", "last", "least_cloudy", "clearest"] + ["median"] * (time is not None)
    whole = whole.harmonize(
        draw(st.sampled_from([["red"], ["B04", "B08"], None])) if len(members) == 1 else ["red"],
        units="reflectance",
        resolution=20,
        time=time,
        pick=draw(st.sampled_from(picks)),
        mask=draw(st.sampled_from([None, "clouds"])),
    )
    for step in draw(st.lists(on_records, max_size=1)):
        whole = step(whole)
    if draw(st.booleans()):
        whole = rd.join(optical=whole, year=YEAR)
        whole = draw(
            st.sampled_from([lambda c: c, lambda c: c.subset(bbox=BBOX), lambda c: c.map(abs, version="3")])
        )(whole)
    aoi = draw(st.sampled_from([None, NEAR, NEAR]))
    chips = whole.chips(
        draw(st.sampled_from([16, 20])),
        draw(st.sampled_from([None, 12])),
        aoi=aoi,
        at=None
        if aoi is None
        else draw(st.sampled_from([None, None, [NEAR.centroid, (15.0, 48.74), (17.7, 48.7)]])),
        cell_km=1.28,
        min_coverage=draw(st.sampled_from([1.0, 0.3])),
        min_slots=draw(st.sampled_from([1, 2])),
    )
    for step in draw(st.lists(on_chips, max_size=3)):
        chips = step(chips)
    return chips


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_optimized_plans_give_the_same_chips(chips: rd.Chips) -> None:
    better = optimize(chips.plan)
    assert optimize(better) == better
    plain = carried_out(chips.plan, chips.query.tables, optimized=False)
    quick = carried_out(chips.plan, chips.query.tables, optimized=True)
    if isinstance(plain, type) or isinstance(quick, type):
        assert plain == quick
        event(f"refused: {plain}")
        return
    same(plain, quick)
    event("planned")


def test_stepwise_planning_is_planning_the_whole() -> None:
    chips = S2.harmonize(["red"], time="1MS").chips(32, cell_km=1.28).split(seed=1)
    for step in (
        chips,
        chips.select("train"),
        chips.filter(("slots", "==", 2)),
        chips.sample(12).select("train"),
    ):
        whole = rd.Chips(step.query).planned
        same(whole, step.planned)


def test_filters_arrive_in_the_scan() -> None:
    chips = (
        rd.merge(S2, L8)
        .harmonize(["red"])
        .map(abs, version="1")
        .subset(cloud_cover_lt=50)
        .where(platform="s2")
        .chips(16)
    )
    leaves = list(p.leaves(optimize(chips.plan)))
    assert [s.name for s in leaves] == ["s2", "l8"]
    for source in leaves:
        assert source.where == (("eo:cloud_cover", "<", 50.0), ("platform", "==", "s2"))
        assert all(expression(w, rd.RECORD_SCHEMA) is not None for w in source.where)


def test_filters_of_a_parquet_dataset_are_its_scan(tmp_path: Path) -> None:
    path = tmp_path / "s2.parquet"
    S2.export(path)
    lazy = rd.load(path)
    assert isinstance(lazy.dataset, pads.Dataset)
    chosen = lazy.subset(cloud_cover_lt=30, date_range=("2024-04-01", "2024-04-30"))
    source = optimize(chosen.plan)
    assert isinstance(source, p.Source)
    expected = [
        r["id"] for r in S2.to_table().to_pylist() if r["eo:cloud_cover"] < 30 and r["datetime"].month == 4
    ]
    table = scan(source, lazy.query.tables)
    assert sorted(table.column("id").to_pylist()) == sorted(expected)  # a file's rows lie along the ground
    assert 0 < table.num_rows < len(S2)
    where = expression(("eo:cloud_cover", "<", 30.0), rd.RECORD_SCHEMA)
    assert lazy.dataset.count_rows(filter=where) < len(S2)
    assert sorted(chosen.to_table().column("id").to_pylist()) == sorted(expected)


def test_filters_stay_above_a_sample() -> None:
    sampled = S2.sample(5, seed=1).subset(cloud_cover_lt=50)
    assert isinstance(optimize(sampled.plan), p.Filter)
    assert len(sampled) == sum(r["eo:cloud_cover"] < 50 for r in S2.sample(5, seed=1).to_table().to_pylist())


def test_headers_of_unused_bands_are_dropped() -> None:
    plain = S2.harmonize(["nir"]).to_table()
    masked = S2.harmonize(["nir"], mask="clouds").to_table()
    assert Records(plain).bands == ("B08",)
    assert Records(masked).bands == ("B08", "SCL")
    for row in plain.column("headers_metadata").to_pylist():
        assert {k for k, _ in row} <= {"B08"}
    assert len(plain) == len(S2.to_table())


def test_an_unknown_band_is_told_with_all_that_there_are() -> None:
    with pytest.raises(rd.BandError, match=r"B04.*Did you mean red"):
        _ = S2.harmonize(["redd"]).chips(16, cell_km=1.28).table


def test_an_area_prunes_records() -> None:
    chips = S2.harmonize(["red"]).chips(16, cell_km=1.28, aoi=NEAR)
    (source,) = p.leaves(optimize(chips.plan))
    assert [w[:2] for w in source.where] == [("bbox", "near")]
    assert {r.split("-")[2] for r in chips.planned.sources[0].records.ids} == {"T1", "T2"}
    plain = plan_chips(chips.plan, chips.query.tables, optimized=False)
    same(plain, chips.planned)


def test_an_area_keeps_records_whose_bbox_is_not_known() -> None:
    row = record("a")
    whole = collection("x", row).chips(16, cell_km=1.28, aoi=NEAR)
    unknown = collection("x", {**row, "bbox": None}).chips(16, cell_km=1.28, aoi=NEAR)
    assert whole.table.equals(unknown.table)


def test_predicates_above_a_join_hold_for_every_source() -> None:
    both = rd.join(a=S2, b=L8).subset(date_range="2024-04")
    node = optimize(both.plan)
    assert isinstance(node, p.Join)
    assert all(isinstance(c, p.Source) and len(c.where) == 1 for c in node.children)


def test_neighbouring_samples_and_selects_melt() -> None:
    chips = S2.chips(16)
    assert optimize(chips.sample(5).sample(3).plan) == optimize(chips.sample(3).plan)
    assert optimize(chips.split().select("train", "val").select("val").plan) == optimize(
        chips.split().select("val").plan
    )
    twice = S2.subset(cloud_cover_lt=5).subset(cloud_cover_lt=5)
    assert optimize(twice.plan) == optimize(S2.subset(cloud_cover_lt=5).plan)


def test_records_of_evaluate_are_those_of_a_dull_interpreter() -> None:
    chosen = rd.merge(S2, L8).where(("view", ">=", 1)).subset(cloud_cover_lt=60)
    expected = [
        r["id"]
        for c in (S2, L8)
        for r in c.to_table().to_pylist()
        if r["eo:cloud_cover"] < 60 and '"view": 0' not in r["properties"]
    ]
    for plan in (chosen.plan, optimize(chosen.plan)):
        assert [
            i for m in evaluate(plan, chosen.query.tables) for i in m.table.column("id").to_pylist()
        ] == expected
