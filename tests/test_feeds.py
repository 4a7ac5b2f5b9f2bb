"""Which records feed which slot, in which order: against a dull oracle in plain Python."""

from __future__ import annotations

import datetime as dt
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import boxes, collection, fed_by, project, record

import rasteret_dask as rd
from rasteret_dask.rules.picks import PickName

CELLS: dict[str, Any] = {"cell_km": 1.28}
SLOTS = [pd.Timestamp(f"2024-{m:02d}-01", tz="UTC") for m in (4, 5, 6)]
PASSES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 14.5, 15.0, 15.5, 29.99999, 30.0, 45.0, 46.0]),  # days after 1 April
        st.sampled_from([None, 0.0, 10.0, 80.0]),
        st.sampled_from(["a", "b"]),  # platform
    ),
    min_size=1,
    max_size=6,
)


def rows_of(passes: list[tuple[float, float | None, str]]) -> list[dict[str, Any]]:
    return [
        record(
            f"{'zyxwvu'[i]}",
            when=(dt.datetime(2024, 4, 1) + dt.timedelta(days=day)).isoformat(),
            platform=platform,
            datatake=f"d{i}",
            cloud=cloud,
        )
        for i, (day, cloud, platform) in enumerate(passes)
    ]


def preference(row: dict[str, Any], pick: str, slot: int) -> tuple[float, ...]:
    """What is compared, first things first; the id comes last."""
    middle = SLOTS[slot] + (SLOTS[slot + 1] - SLOTS[slot]) / 2
    distance = abs((pd.Timestamp(row["datetime"]) - middle).value)
    cloud = row["eo:cloud_cover"]
    own = {
        "first": row["datetime"].timestamp(),
        "last": -row["datetime"].timestamp(),
        "least_cloudy": np.inf if cloud is None else cloud,
    }
    return (own.get(pick, 0.0), distance)


@settings(max_examples=60, deadline=None)
@given(PASSES, st.sampled_from(["closest", "first", "last", "least_cloudy", "clearest", "median"]))
def test_picks_are_those_of_the_oracle(passes: list[Any], pick: PickName) -> None:
    rows = rows_of(passes)
    own = collection("s2", *rows).subset(date_range=("2024-04-01", "2024-05-31"))
    chips = own.harmonize(["red"], time="1MS", pick=pick).chips(64, **CELLS)
    expected: dict[tuple[str, int], list[str]] = {}
    for slot in (0, 1):
        inside = [r for r in rows if SLOTS[slot] <= r["datetime"] < SLOTS[slot + 1]]
        order = sorted(inside, key=lambda r: (*preference(r, pick, slot), r["id"]))
        if order:
            every = pick in ("clearest", "median")
            expected["s2", slot] = [r["id"] for r in (order if every else order[:1])]
    for fed, row in zip(fed_by(chips), chips.table.to_pylist(), strict=True):
        assert fed == expected
        assert row["slots"] == len(expected)
        places = [f["order"] for f in row["feeds"]]
        assert places == [i for s in sorted(expected) for i in range(len(expected[s]))]


def two_tiles(**columns: Any) -> list[dict[str, Any]]:
    """Two tiles of one pass that overlap by 2 km; the eastern one's id comes first."""
    return [
        record("west", tile="1", datatake="d", **columns),
        record("east", tile="2", datatake="d", west=502_000.0, **columns),
    ]


def test_in_overlaps_the_record_whose_raster_centre_is_nearest_comes_first() -> None:
    chips = collection("s2", *two_tiles()).chips(32, **CELLS)
    centre = {"west": (502_000.0, 5_398_000.0), "east": (504_000.0, 5_398_000.0)}
    seen = set()
    for fed, shape in zip(fed_by(chips), boxes(chips), strict=True):
        (own,) = fed.values()
        middle = shape.centroid
        far = {r: round(np.hypot(middle.x - x, middle.y - y), 2) for r, (x, y) in centre.items() if r in own}
        assert own == sorted(own, key=lambda r: (far[r], r))
        seen.add(tuple(own))
    assert seen == {("west",), ("east",), ("west", "east"), ("east", "west")}


def test_ties_in_nearness_go_to_the_id() -> None:
    rows = [record("b", tile="1", datatake="d"), record("a", tile="2", datatake="d", tile_px=256)]
    chips = collection("s2", *rows).chips(32, **CELLS)
    assert {tuple(next(iter(f.values()))) for f in fed_by(chips)} == {("a", "b")}


def test_nearness_counts_metres_across_zones() -> None:
    here = project(shapely.Point(12.0, 48.0), 4326, 32633)
    there = project(shapely.Point(12.0, 48.0), 4326, 32632)
    west, north = round(here.x, -2) - 4000, round(here.y, -2) + 2000
    rows = [record("z33", tile="1", datatake="d", west=west, north=north, px=(500, 400))]
    west, north = round(there.x, -2) - 1000, round(there.y, -2) + 2000
    rows.append(record("z32", tile="2", datatake="d", epsg=32632, west=west, north=north, px=(500, 400)))
    middle = {
        r["id"]: project(
            project(shapely.box(*r["bbox"].values()), 4326, r["proj:epsg"]).centroid, r["proj:epsg"], 32633
        )
        for r in rows
    }
    chips = collection("s2", *rows).chips(32, **CELLS)
    checked = 0
    for fed, shape, row in zip(fed_by(chips), boxes(chips), chips.table.to_pylist(), strict=True):
        (own,) = fed.values()
        place = project(shape.centroid, row["epsg"], 32633)
        if len(own) == 2 and abs(place.distance(middle["z33"]) - place.distance(middle["z32"])) > 30:
            assert own == sorted(own, key=lambda r: place.distance(middle[r]))
            checked += 1
    assert checked > 20


def test_cloud_cover_is_the_record_s_own_figure() -> None:
    """The pass whose other tile is clouded is still the clearest here, and other tiles change nothing."""
    clear = [
        record("a1", tile="1", datatake="a", cloud=5.0),
        record("a2", tile="2", datatake="a", west=540_000.0, cloud=95.0),
    ]
    hazy = [
        record("b1", tile="1", datatake="b", when="2024-04-15T10:00:00", cloud=30.0),
        record(
            "b2",
            tile="2",
            datatake="b",
            when="2024-04-15T10:00:05",
            west=540_000.0,
            cloud=0.0,
        ),
    ]
    chips = (
        collection("s2", *clear, *hazy).harmonize(["red"], time="1MS", pick="least_cloudy").chips(32, **CELLS)
    )
    west = [
        next(iter(f.values()))
        for f, b in zip(fed_by(chips), boxes(chips), strict=True)
        if b.bounds[0] < 530_000
    ]
    east = [
        next(iter(f.values()))
        for f, b in zip(fed_by(chips), boxes(chips), strict=True)
        if b.bounds[0] > 530_000
    ]
    assert west == [["a1"]] * len(west) != []
    assert east == [["b2"]] * len(east) != []


def test_a_pass_over_midnight_is_in_one_slot() -> None:
    """In the overlap of both tiles the first start decides; where only one is seen, its own."""
    rows = two_tiles()
    rows[0]["datetime"] = dt.datetime(2024, 4, 30, 23, 59, 58, tzinfo=dt.UTC)
    rows[1]["datetime"] = dt.datetime(2024, 5, 1, 0, 0, 3, tzinfo=dt.UTC)
    chips = collection("s2", *rows).harmonize(["red"], time="1MS", pick="median").chips(32, **CELLS)
    found = {(slot, tuple(sorted(own))) for fed in fed_by(chips) for (_, slot), own in fed.items()}
    assert found == {(0, ("west",)), (0, ("east", "west")), (1, ("east",))}
    assert all(len(fed) == 1 for fed in fed_by(chips))


@settings(max_examples=30, deadline=None)
@given(PASSES, st.integers(0, 2))
def test_chips_have_as_many_slots_as_asked_for(passes: list[Any], min_slots: int) -> None:
    rows = rows_of(passes)
    own = (
        collection("s2", *rows).subset(date_range=("2024-04-01", "2024-05-31")).harmonize(["red"], time="1MS")
    )
    filled = len({r["datetime"].month for r in rows})
    wanted = min(max(min_slots, 1), 2)
    if filled >= wanted:
        chips = own.chips(64, **CELLS, min_slots=min_slots)
        assert set(chips.table.column("slots").to_pylist()) == {filled}
    else:
        with pytest.raises(rd.PlanError, match=f"in {wanted} slots"):
            _ = own.chips(64, **CELLS, min_slots=min_slots).table


def test_feeds_are_sorted_by_source_slot_order_and_nearness() -> None:
    rows = [r for day in (1, 3, 20) for r in two_tiles(when=f"2024-04-{day:02d}T10:00:00")]
    for number, r in enumerate(rows):
        r["id"] += str(number)
        r["datatake"] = f"d{number // 2}"
    own = collection("s2", *rows).harmonize(["red"], time="10D", pick="clearest")
    chips = rd.join(b=own, a=own).chips(32, **CELLS)
    for row in chips.table.column("feeds").to_pylist():
        keys = [("ba".index(f["source"]), f["slot"], f["order"]) for f in row]
        assert keys == sorted(keys)
        for _, own_slot in groupby(row, key=lambda f: (f["source"], f["slot"])):
            orders = [f["order"] for f in own_slot]
            assert orders[0] == 0
            assert set(orders) == set(range(max(orders) + 1))
