"""The chip table: what a join keeps, sizes, columns that travel, saving and loading, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from made_records import boxes, collection, fed_by, ids, project, record

import rasteret_dask as rd
from rasteret_dask.chipping import laying
from rasteret_dask.chipping.chiptable import FeedTable
from rasteret_dask.planning.sampling import sample_unit

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

CELLS: dict[str, Any] = {"cell_km": 1.28}


def s2(**more: Any) -> rd.Collection:
    return collection("s2", record("s2", **more))


def cells_of(chips: rd.Chips) -> set[str]:
    return {c.rsplit("_", 1)[0] for c in ids(chips)}


def test_the_table_has_its_schema() -> None:
    table = s2().chips(32, **CELLS).table
    assert table.schema == rd.CHIP_SCHEMA
    for row, wkb in zip(table.to_pylist(), table.column("geometry").to_pylist(), strict=True):
        box = shapely.box(row["xmin"], row["ymin"], row["xmax"], row["ymax"])
        assert project(shapely.from_wkb(wkb), 4326, 32633).symmetric_difference(box).area < 1e-3
        assert row["split"] is None


def test_a_join_keeps_what_every_source_covers() -> None:
    one = collection("a", record("a"))
    other = collection("b", record("b", west=502_000.0, north=5_401_000.0))
    both = rd.join(one=one, other=other).chips(32, **CELLS)
    alone = [cells_of(c.chips(32, **CELLS)) for c in (one, other)]
    assert cells_of(both) == alone[0] & alone[1] != set()
    assert all(set(f) == {("one", 0), ("other", 0)} for f in fed_by(both))
    lost = both.planned.dropped["chip of one without an acquisition of other"]
    assert lost == len(alone[0] - alone[1])


@pytest.mark.parametrize("place", [{"west": 600_000.0}, {"epsg": 32610}, {"north": -5_000_000.0}])
def test_sources_apart_are_told(place: dict[str, Any]) -> None:
    other = collection("b", record("b", **place))
    with pytest.raises(rd.PlanError, match="without an acquisition of b"):
        _ = rd.join(a=s2(), b=other).chips(32, **CELLS).table
    timed = [c.harmonize(["red"], time="1MS") for c in (s2(), other)]
    with pytest.raises(rd.PlanError, match=r"candidate windows .*by b"):
        _ = rd.join(a=timed[0], b=timed[1]).chips(32, **CELLS).table


def test_min_slots_of_a_join_asks_a_yearly_source_for_its_year() -> None:
    dates = ("2024-04-10", "2024-05-10")
    own = collection("s2", *(record(d, when=f"{d}T10:00:00", datatake=d) for d in dates))
    year = record("y", when="2024-01-01T00:00:00", until="2025-01-01T00:00:00", bands=("data",))
    both = rd.join(s2=own.harmonize(["red"], time="1MS"), year=collection("year", year))
    assert len(both.chips(32, **CELLS, min_slots=2)) == len(both.chips(32, **CELLS))
    with pytest.raises(rd.PlanError, match="2 slots of source 's2'"):
        _ = both.chips(32, **CELLS, min_slots=3).table


def test_more_slots_than_there_are_are_refused() -> None:
    own = collection("s2", record("a"), record("b", when="2024-05-10T10:00:00"))
    for source, slots in (
        (own, 1),
        (own.harmonize(["red"], time="1MS"), 2),
        (own.harmonize(["red"], time="1YS"), 1),
    ):
        assert len(source.chips(32, **CELLS, min_slots=slots))
        with pytest.raises(rd.PlanError, match=f"min_slots={slots + 1}.*{slots} slot.*Lower min_slots"):
            _ = source.chips(32, **CELLS, min_slots=slots + 1).table
    year = record("y", when="2024-01-01T00:00:00", until="2025-01-01T00:00:00", bands=("data",))
    with pytest.raises(rd.PlanError, match="1 slot of source 'y'"):
        _ = collection("y", year).chips(32, **CELLS, min_slots=2).table


def test_an_empty_filter_tells_what_each_condition_leaves() -> None:
    chips = collection("s2", record("a")).chips(32, **CELLS)
    with pytest.raises(
        rd.PlanError, match=r"left of 144 \(xmin > 0 alone leaves 144, ymin > 99999999 alone leaves 0"
    ):
        _ = chips.filter(("xmin", ">", 0), ("ymin", ">", 99_999_999)).table


# Sizes


def pair(coarse: float = 30.0) -> rd.Collection:
    ours = collection("s2", record("s2", px=(4000, 4000)))
    return rd.join(
        s2=ours, l8=collection("l8", record("l8", pixel=coarse, px=(1500, 1500), bands=("B4", "B5")))
    )


def test_a_size_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(rd.GridError) as caught:
        _ = pair().chips(256).table
    text = str(caught.value)
    for number in ("85.33 pixels of 30 m", "240, 264", "384"):
        assert number in text
    for size in (240, 264, 384):
        chips = pair().chips(size)
        assert len(chips)
        assert (chips.explain()["uncovered"] == {}) == (size == 384)


def test_the_reference_s_pixels_count() -> None:
    chips = pair().chips(128, reference="l8")
    assert chips.planned.size_m == 3840.0
    shapes = chips.explain()["chip_shape"]
    assert shapes["s2"][2:] == [384, 384]
    assert shapes["l8"][2:] == [128, 128]


def test_a_size_larger_than_a_split_cell_is_refused() -> None:
    with pytest.raises(rd.GridError, match="larger cell_km"):
        _ = s2().chips(256, cell_km=1.28).table


# Columns that travel


def fields() -> geopandas.GeoDataFrame:
    places = shapely.points([(501_000 + 500 * i, 5_398_000) for i in range(5)])
    return geopandas.GeoDataFrame(
        {"crop": list("abcde"), "weight": [1, 2, 3, 4, None]}, geometry=places, crs=32633
    ).iloc[[3, 1, 4, 0, 2]]


def test_labels_travel_through_every_step() -> None:
    chips = s2().chips(16, at=fields())
    said = {r["chip_id"]: (r["crop"], r["weight"]) for r in chips.table.to_pylist()}
    assert sorted(said.values(), key=str) == [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", None)]
    for chip, (crop, _) in said.items():
        assert chip.split("_")[5] == str("abcde".index(crop))
    step = chips.split(0.5, 0.5, 0.0, by="ground").filter(("weight", ">", 1)).sample(2, by="split")
    for r in step.table.to_pylist():
        assert said[r["chip_id"]] == (r["crop"], r["weight"])
    assert [r["crop"] for r in chips.filter(crop=["b", "d"]).table.to_pylist()] == ["b", "d"]


def test_a_filter_names_its_columns() -> None:
    chips = s2().chips(32, **CELLS)
    with pytest.raises(rd.PlanError, match=r"'ndvi'.*no such column"):
        _ = chips.filter(("ndvi", ">", 0)).table
    with pytest.raises(rd.PlanError, match="no chip left"):
        _ = chips.filter(("row", ">", 10**6)).table


# Save, load, choose


@pytest.mark.parametrize("at", [None, "fields"])
def test_a_saved_table_comes_back_and_chooses_chips(tmp_path: Path, at: str | None) -> None:
    chips = s2().chips(32, at=None if at is None else fields(), **CELLS).split(0.5, 0.25, 0.25, seed=2)
    chips.save(tmp_path / "chips.parquet")
    again = pq.read_table(tmp_path / "chips.parquet")
    assert again.drop_columns(["feeds"]).equals(chips.table.drop_columns(["feeds"]))
    assert again.column("feeds").to_pylist() == chips.table.column("feeds").to_pylist()
    frame = geopandas.read_parquet(tmp_path / "chips.parquet")
    assert frame.crs.to_epsg() == 4326 or frame.crs.to_authority() == ("OGC", "CRS84")
    part = again.take(pa.array(range(0, again.num_rows, 2))).append_column(
        "weather", pa.array(["sunny"] * len(range(0, again.num_rows, 2)))
    )
    chosen = chips.with_table(part)
    assert ids(chosen) == ids(chips)[::2]
    assert chosen.table.column("weather").to_pylist() == ["sunny"] * len(chosen)
    reverse = chips.with_table(part.take(pa.array(range(part.num_rows))[::-1]))
    assert ids(reverse) == ids(chosen)


def test_a_saved_table_is_taken_by_its_path_and_may_not_change_the_plan(tmp_path: Path) -> None:
    chips = s2().chips(32, **CELLS).split(0.5, 0.25, 0.25, seed=2)
    chips.save(tmp_path / "chips.parquet")
    assert ids(chips.with_table(tmp_path / "chips.parquet")) == ids(chips)
    at = chips.table.schema.get_field_index("split")
    mine = chips.table.set_column(at, "split", pa.array(["test"] * len(chips)))
    with pytest.raises(rd.SchemaError, match="split"):
        _ = chips.with_table(mine).table
    with pytest.raises(rd.SchemaError, match="Arrow table"):
        chips.with_table(42)


def test_a_table_of_other_chips_is_refused() -> None:
    chips = s2().chips(32, **CELLS)
    for bad, word in (
        (chips.table.drop_columns(["chip_id"]), "chip_id"),
        (pa.concat_tables([chips.table.slice(0, 1)] * 2), "twice"),
        (s2().chips(16, **CELLS).table, "does not have"),
    ):
        with pytest.raises(rd.SchemaError, match=word):
            _ = chips.with_table(bad).table


def test_samples_of_chips_grow() -> None:
    chips = s2().chips(32, **CELLS).split(0.5, 0.25, 0.25, seed=1)
    before: set[str] = set()
    for n in (0, 5, 17, 10**6):
        if not n:
            continue
        found = ids(chips.sample(n, seed=4))
        assert before <= set(found)
        assert found == [i for i in ids(chips) if i in set(found)]
        assert set(found) == set(
            sorted(ids(chips), key=lambda i: float(sample_unit(pa.array([i]), 4)[0]))[:n]
        )
        before = set(found)
    strata = chips.sample(3, by="split").table.column("split").to_pylist()
    assert {s: strata.count(s) for s in strata} == dict.fromkeys(set(chips.table["split"].to_pylist()), 3)
    with pytest.raises(rd.PlanError, match="by="):
        _ = chips.sample(3, by="nothing").table


def test_geopandas_has_the_same_rows() -> None:
    chips = s2().chips(32, **CELLS)
    frame = chips.to_geopandas()
    assert frame["chip_id"].tolist() == ids(chips)
    assert (
        frame.to_crs(32633)
        .geometry.symmetric_difference(geopandas.GeoSeries(boxes(chips), crs=32633))
        .area.max()
        < 1e-3
    )


def test_the_feed_column_comes_apart_and_together() -> None:
    chips = rd.join(a=s2(), b=collection("b", record("b1"), record("b2", datatake="x"))).chips(32, **CELLS)
    column = chips.table.column("feeds")
    assert FeedTable.of(chips.table).to_arrow().to_pylist() == column.to_pylist()
    part = chips.table.slice(3, 4)
    own = FeedTable.of(part)
    assert np.bincount(own.chip).tolist() == [len(f) for f in part.column("feeds").to_pylist()]
    assert own.to_arrow().to_pylist() == part.column("feeds").to_pylist()


@pytest.mark.parametrize("time", [None, "1MS"])
@pytest.mark.parametrize("size", [32, 48])
def test_windows_are_looked_at_in_batches_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, time: str | None, size: int
) -> None:
    def planned() -> tuple[Any, dict[str, int]]:
        rows = [
            record(
                f"{name}{i}", west=500_000.0 + 1700 * i, when=f"2024-04-{10 + i % 2}T10:0{i}:00", tile=str(i)
            )
            for name in "ab"
            for i in range(4)
        ]
        own = [
            collection(n, *(r for r in rows if r["id"][0] == n)).harmonize(["red"], time=time) for n in "ab"
        ]
        chips = rd.join(a=own[0], b=own[1]).chips(size, cell_km=1.28, min_coverage=0.7)
        return chips.table, dict(chips.planned.dropped)

    whole, lost = planned()
    monkeypatch.setattr(laying, "BATCH", 13)
    parts, lost_in_parts = planned()
    assert len(whole) > 5 * 13
    assert parts.equals(whole)
    assert lost_in_parts == lost
