# SPDX-License-Identifier: Apache-2.0
"""Splits by time, and regions by name: laws over drawn spans and boxes, told again by plain loops."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.chipping.regions import check_regions, names_of
from rasteret_dask.chipping.splittimes import BETWEEN, by_time, length_ns, too_soon
from rasteret_dask.errors import PlanError

DAY = 86_400 * 10**9
FIRST = pd.Timestamp("2020-01-01", tz="UTC").value


def day(number: int | None) -> str | None:
    return (
        None
        if number is None
        else (pd.Timestamp("2020-01-01", tz="UTC") + pd.Timedelta(days=number)).isoformat()
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-10, 110), st.integers(0, 12)), min_size=1, max_size=20),
    st.lists(st.integers(0, 100), min_size=4, max_size=4, unique=True),
    st.booleans(),
)
def test_a_chip_is_in_the_range_that_holds_all_of_it(
    drawn: list[tuple[int, int]], cuts: list[int], rest: bool
) -> None:
    a, b, c, d = sorted(cuts)
    ranges = [
        ("train", None if rest else (None, day(a))),
        ("val", (day(b), day(c))),
        ("test", (day(d), None)),
    ]
    span = np.array([(FIRST + s * DAY, FIRST + (s + n) * DAY) for s, n in drawn], dtype=np.int64)
    found = by_time(span, ranges)
    for (start, length), number in zip(drawn, found.tolist(), strict=True):
        moments = {start + step / 2 for step in range(2 * length)} or {start}  # half-open, but for an instant
        named: dict[str, Any] = {
            "val": lambda t: b <= t < c,
            "test": lambda t: t >= d,
            "train": lambda t: t < a,
        }
        if rest:
            named["train"] = lambda t: not (b <= t < c or t >= d)
        where = {next((n for n, holds in named.items() if holds(t)), None) for t in moments}
        if len(where) == 1:
            name = where.pop()
            assert number == (BETWEEN if name is None else ("train", "val", "test").index(name))
        else:
            assert number == -1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9), st.integers(-1, 2)), min_size=1, max_size=20),
    st.integers(0, 30),
)
def test_a_gap_is_kept_around_train(drawn: list[tuple[int, int, int]], gap: int) -> None:
    span = np.array([(FIRST + s * DAY, FIRST + (s + n) * DAY) for s, n, _ in drawn], dtype=np.int64)
    split = np.array([number for *_, number in drawn])
    near = too_soon(span, split, 0, f"{gap}D")
    for at, (start, length, number) in enumerate(drawn):
        apart = [max(start - (s + n), s - (start + length)) for s, n, own in drawn if own == 0]
        assert near[at] == (number > 0 and bool(apart) and min(apart) < gap)


def test_a_gap_is_a_length_of_time() -> None:
    assert length_ns("30D") == 30 * DAY
    for wrong in ("soon", "-3D", "NaT"):
        with pytest.raises(PlanError, match="as '30D'"):
            length_ns(wrong)


def regions(seed: int) -> pa.Table:
    """Return four regions of a square of 4 x 4 degrees, one of them in two pieces."""
    x = np.random.default_rng(seed).uniform(1.0, 3.0)
    boxes = [
        (0, 0, x, 2),
        (x, 0, 4, 2),
        (0, 2, 4, 3),
        (0, 3, x, 4),
    ]  # above the third, east of the fourth: nothing
    return pa.table(
        {
            "geometry": shapely.to_wkb([shapely.box(*b) for b in boxes]),
            "state": ["west", "east", "north", "west"],
        }
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_chip_belongs_to_the_region_that_holds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = regions(seed)
    corner = rng.uniform(-0.2, 3.9, (200, 2))
    chips = shapely.box(corner[:, 0], corner[:, 1], corner[:, 0] + 0.3, corner[:, 1] + 0.3)
    names = names_of(table, "state", pa.chunked_array([shapely.to_wkb(chips)])).to_pylist()
    shapes = shapely.from_wkb(table.column("geometry").to_pylist())
    for chip, name in zip(chips, names, strict=True):
        share: dict[str, float] = {}
        for shape, state in zip(shapes, table.column("state").to_pylist(), strict=True):
            share[state] = share.get(state, 0.0) + chip.intersection(shape).area / chip.area
        held = [state for state, part in share.items() if part > 1 - 1e-6]
        alone = [state for state, part in share.items() if part > 1e-6]
        assert name == (held[0] if len(held) == 1 == len(alone) else None)
    assert set(names) == {"west", "east", "north", None}


def test_regions_have_one_name_each() -> None:
    table = regions(0)
    assert check_regions(table) == "state"
    with pytest.raises(PlanError, match=r"2 columns beside the geometry.*regions\[\['state', 'geometry'\]\]"):
        check_regions(table.append_column("area", pa.array([1, 2, 3, 4])))
    with pytest.raises(PlanError, match="0 columns"):
        check_regions(table.select(["geometry"]))
    with pytest.raises(PlanError, match="without a name"):
        check_regions(table.set_column(1, "state", pa.array(["a", None, "c", "d"])))
    points = shapely.to_wkb(shapely.points(np.zeros((4, 2))))
    with pytest.raises(PlanError, match="no polygons"):
        check_regions(table.set_column(0, "geometry", pa.array(points)))


def monthly() -> rd.Chips:
    """Return chips of twelve passes over the same ground, on the tenth of each month."""
    rows = [
        record(
            f"r{month}",
            px=(400, 400),
            west=500_000.0,
            north=5_600_000.0,
            when=f"2023-{month:02d}-10T00:00:00",
        )
        for month in range(1, 13)
    ]
    return collection("s2", *rows).chips(100, cell_km=1.0)


def test_chips_of_passes_are_split_by_their_time(tmp_path: Path) -> None:
    ranges: dict[str, Any] = {
        "train": (None, "2023-06-30"),
        "val": ("2023-08", "2023-09"),
        "test": ("2023-11-01", None),
    }
    chips = monthly().split(by="time", **ranges)
    expected = {7: None, 8: "val", 9: "val", 10: None, 11: "test", 12: "test"}
    for row in chips.table.select(["datetime", "split"]).to_pylist():
        assert row["split"] == expected.get(row["datetime"].month, "train")
    lost = sum(when.month in (7, 10) for when in chips.table["datetime"].to_pylist())
    assert chips.planned.dropped["chip whose time is in no split"] == lost
    apart = monthly().split(by="time", train=(None, "2023-06-30"), test=("2023-07-01", None), gap="45D")
    split = {
        row["datetime"].month: row["split"] for row in apart.table.select(["datetime", "split"]).to_pylist()
    }
    assert split == {**dict.fromkeys(range(1, 7), "train"), 7: None, **dict.fromkeys(range(8, 13), "test")}
    assert apart.planned.dropped["chip nearer than 45D in time to train"] > 0
    rest = monthly().split(by="time", test=("2023-11-01", None))
    assert rest.table["split"].to_pylist().count("test") == chips.table["split"].to_pylist().count("test")
    assert not rest.table["split"].null_count
    apart.to_recipe(tmp_path / "time.toml")
    assert rd.load_recipe(tmp_path / "time.toml").chips().table["split"].equals(apart.table["split"])
    assert 'test=("2023-07-01", None), gap="45D"' in repr(apart)


def test_times_that_cannot_be() -> None:
    chips = monthly()
    for arguments, words in [
        ({"test": 0.2}, r"test=0.2.*\(start, end\)"),
        ({}, "no range"),
        (
            {"val": ("2023-01-01", "2023-05-01"), "test": ("2023-05-01", None)},
            "ranges of val and test that overlap",
        ),
        ({"test": ("2023-05-01", "2023-01-01")}, "test: "),
        ({"test": ("2023", None), "gap": "soon"}, "length of time"),
        ({"val": ("1999", "2000"), "train": ("2001", "2002")}, "no chip in any range.*2023-01-10"),
    ]:
        with pytest.raises(PlanError, match=words):
            _ = chips.split(by="time", **arguments).table  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="by='time'"):
        chips.split(gap="3D")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"date": "sown"}, r"no such column.*a column of dates: datetime"),
        ({"date": "chip_id"}, r"values of type string.*pd.to_datetime"),
        (
            {"date": "datetime", "test": ("1990", "1991"), "train": ("1992", "1993")},
            "column datetime are of 2023-01-10",
        ),
    ]
    for dates, words in wrong:
        with pytest.raises(PlanError, match=words):
            _ = chips.split(by="time", **({"test": ("2023", None)} | dates)).table
    with pytest.raises(PlanError, match=r"split\(by='time', date='datetime'"):
        chips.split(date="datetime")


def dated(seed: int, count: int = 60, nulls: int = 3) -> gpd.GeoDataFrame:
    """Return places with a date each, some without."""
    rng = np.random.default_rng(seed)
    days = pd.Timestamp("2022-01-01") + pd.to_timedelta(rng.integers(0, 700, count), unit="D")
    event = pd.Series(days)
    event = event.where(np.arange(count) >= nulls)
    xy = rng.uniform(200, 3800, (count, 2))
    points = gpd.points_from_xy(500_000 + xy[:, 0], 5_600_000 - xy[:, 1])
    return gpd.GeoDataFrame(
        {"event": event, "name": [f"p{n}" for n in range(count)]}, geometry=points, crs=32633
    )


@pytest.mark.parametrize("kind", ["timestamp", "utc", "date"])
def test_a_chip_is_in_the_split_of_its_own_date(kind: str, tmp_path: Path) -> None:
    """Records of one month, dates of two years: the row's date decides, and the gap lies around train's dates."""
    table = dated(1)
    scene = collection("s2", record("a", px=(400, 400), west=500_000.0, north=5_600_000.0))
    if kind == "utc":
        table["event"] = table["event"].dt.tz_localize("UTC")
    if kind == "date":
        table["event"] = table["event"].dt.date
    ranges: dict[str, Any] = {"val": ("2022-10-01", "2022-12-31"), "test": ("2023-03-01", None)}
    chips = scene.harmonize(["red"], time="1MS").chips(8, at=table, cell_km=1.0, min_coverage=0.0)
    split = chips.split(by="time", date="event", gap="40D", **ranges)
    name_of = dict(zip(split.table["name"].to_pylist(), split.table["split"].to_pylist(), strict=True))
    days = {
        n: None if pd.isna(d) else pd.Timestamp(d).tz_localize(None)
        for n, d in zip(table.name, table.event, strict=True)
    }

    def home(day: pd.Timestamp | None) -> str | None:
        if day is None:
            return None
        if pd.Timestamp("2022-10-01") <= day < pd.Timestamp("2023-01-01"):
            return "val"
        return "test" if day >= pd.Timestamp("2023-03-01") else "train"

    train = [day for day in days.values() if day is not None and home(day) == "train"]
    near = {
        name
        for name, day in days.items()
        if day is not None and home(day) != "train" and min(abs(day - t) for t in train) < pd.Timedelta("40D")
    }
    assert name_of == {
        name: None if name in near else home(day) for name, day in days.items() if name in name_of
    }
    assert len(name_of) == len(table)
    audit = split.audit()
    assert audit.lost["chip without a date in column event"] == 3
    assert audit.lost["chip nearer than 40D in time to train"] == len(near) > 0
    assert min(audit.apart_days["train-val"], audit.apart_days["train-test"]) >= 40.0
    for part, (first, last) in audit.times.items():
        own = sorted(str(days[name])[:10] for name, place in name_of.items() if place == part)
        assert (first, last) == (own[0], own[-1])
    assert "apart in time: train-val" in str(audit)
    split.to_recipe(tmp_path / "dates.toml")
    assert 'date = "event"' in (tmp_path / "dates.toml").read_text()
    assert rd.load_recipe(tmp_path / "dates.toml").chips().table["split"].equals(split.table["split"])
    assert 'date="event"' in repr(split)


def test_an_audit_of_passes_tells_their_times() -> None:
    chips = monthly().split(by="time", val=("2023-08", "2023-09"), test=("2023-11-01", None))
    audit = chips.audit()
    assert audit.times == {
        "train": ("2023-01-10", "2023-10-10"), "val": ("2023-08-10", "2023-09-10"),
        "test": ("2023-11-10", "2023-12-10"),
    }  # fmt: skip
    assert audit.apart_days == {"train-val": 30.0, "train-test": 31.0, "val-test": 61.0}
    assert monthly().split(by="epsg").audit().times == {}


def test_regions_are_splits(tmp_path: Path) -> None:
    edges = [499_000.0, 501_900.0, 502_400.0, 505_000.0]
    regions = gpd.GeoDataFrame(
        {"state": ["west", "middle", "east"]},
        geometry=[shapely.box(a, 5_590_000.0, b, 5_601_000.0) for a, b in pairwise(edges)],
        crs=32633,
    )
    chips = monthly().split(by=regions, test=["west"])
    for row in chips.table.select(["xmin", "xmax", "state", "split"]).to_pylist():
        held = [
            n
            for n, (a, b) in zip(regions.state, pairwise(edges), strict=True)
            if a <= row["xmin"] and row["xmax"] <= b
        ]
        assert row["state"] == (held[0] if held else None)
        assert row["split"] == (None if not held else "test" if held[0] == "west" else "train")
    assert chips.audit().ok
    assert chips.planned.dropped["chip that lies in no state as a whole, or in one of no split"] > 0
    regions.to_crs(4326).to_parquet(tmp_path / "regions.parquet")
    filed = monthly().split(by=tmp_path / "regions.parquet", test=["west"])
    assert filed.table["split"].equals(chips.table["split"])
    chips.to_recipe(tmp_path / "regions.toml")
    assert rd.load_recipe(tmp_path / "regions.toml").chips().table["split"].equals(chips.table["split"])
    assert "split(by=<a table of 3 rows>" in repr(chips)
    with pytest.raises(PlanError, match="'north'"):
        _ = monthly().split(by=regions, test=["north"]).table
    with pytest.raises(PlanError, match=r"regions\.rename"):
        _ = monthly().split(by=regions.rename(columns={"state": "cell"}), test=["west"]).table
