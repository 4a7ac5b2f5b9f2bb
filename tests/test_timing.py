"""Acquisitions and slots: what belongs together, what competes, what is replaced."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, ids, record, table

import rasteret_dask as rd
from rasteret_dask.table import timing
from rasteret_dask.table.facts import version_of
from rasteret_dask.table.records import Records
from rasteret_dask.table.timing import Acquisitions, acquisitions, half_open, intervals, narrowest, regular

ONE: dict[str, Any] = {"datatake": "GS2A_1", "tile": "MGRS-33TWM", "baseline": "05.09"}


def groups(*rows: dict[str, Any]) -> tuple[Acquisitions, list[set[str]]]:
    """Return the acquisitions of rows, and the ids of each in time order; the order of rows changes nothing."""
    said = []
    for order in (list(rows), list(reversed(rows))):
        passes = acquisitions(Records(table(*order)))
        own: list[set[str]] = [set() for _ in passes.start]
        for row, number in zip(order, passes.of_record.tolist(), strict=True):
            if number >= 0:
                own[number].add(row["id"])
        said.append(own)
    assert said[0] == said[1]
    return passes, said[0]


def test_neighbouring_tiles_of_a_datatake_are_one_acquisition() -> None:
    passes, own = groups(
        record("a", when="2024-04-10T10:00:00", **{**ONE, "tile": "1"}),
        record("b", when="2024-04-10T10:09:59", **{**ONE, "tile": "2"}),
        record("c", when="2024-04-10T10:10:01", **{**ONE, "tile": "3"}),
        record("d", when="2024-04-10T10:00:00", **{**ONE, "tile": "4", "datatake": "GS2A_2"}),
        record("e", when="2024-04-10T10:00:00", platform="sentinel-2b", **{**ONE, "tile": "5"}),
        record("f", when="2024-04-10T10:00:00", collection="other", **{**ONE, "tile": "6"}),
    )
    assert sorted(map(sorted, own)) == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert not passes.is_interval.any()
    assert passes.start.tolist() == sorted(passes.start.tolist())


def test_midnight_does_not_part_a_pass_and_a_day_does_not_make_one() -> None:
    _, own = groups(
        record("before", when="2024-04-10T23:59:58", **{**ONE, "tile": "1"}),
        record("after", when="2024-04-11T00:00:03", **{**ONE, "tile": "2"}),
        record("morning", when="2024-04-11T10:00:00", **{**ONE, "tile": "2", "datatake": "GS2A_2"}),
        record("evening", when="2024-04-11T21:00:00", **{**ONE, "tile": "2", "datatake": "GS2A_2"}),
    )
    assert own == [{"before", "after"}, {"morning"}, {"evening"}]


def test_a_relative_orbit_stands_in_for_a_datatake() -> None:
    landsat: dict[str, Any] = {"platform": "landsat-8", "collection": "landsat-c2-l2", "orbit": 191}
    _, own = groups(
        record("p1", when="2024-04-10T09:50:00", tile="WRS2-191026", **landsat),
        record("p2", when="2024-04-10T09:50:24", tile="WRS2-191027", **landsat),
        record("p1-later", when="2024-04-26T09:50:00", tile="WRS2-191026", **landsat),
        record("q", when="2024-04-10T09:50:10", tile="WRS2-192026", **{**landsat, "orbit": 192}),
    )
    assert own == [{"p1", "p2"}, {"q"}, {"p1-later"}]


@pytest.mark.parametrize(
    ("old", "new"),
    [("05.09", "05.10"), ("02.14", "05.00"), ("9.1", "10.0"), (None, "02.04"), ("5.9", "05.10")],
)
def test_the_newest_baseline_of_a_scene_stays(old: str | None, new: str) -> None:
    passes, own = groups(
        record("z-old", when="2024-04-10T10:00:00", **{**ONE, "baseline": old}),
        record("a-new", when="2024-04-10T10:00:00", **{**ONE, "baseline": new}),
    )
    assert own == [{"a-new"}]
    assert passes.replaced == 1


def test_a_baseline_is_taken_apart_once_however_many_records_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def counting(text: str) -> Any:
        counted.append(text)
        return version_of(text)

    monkeypatch.setattr(timing, "version_of", counting)
    acquisitions(Records(table(*(record(f"r{n}", baseline=("05.09", "05.10")[n % 2]) for n in range(20)))))
    assert sorted(counted) == ["05.09", "05.10"]


def test_of_equal_baselines_the_last_made_stays() -> None:
    made = [dt.datetime(2024, 5, d, tzinfo=dt.UTC) for d in (1, 2)]
    passes, own = groups(
        record("z", created=made[0], **ONE), record("a", created=made[1], **ONE), record("x", **ONE)
    )
    assert own == [{"a"}]
    assert passes.replaced == 2


def test_two_catalogs_list_one_scene() -> None:
    """Planetary Computer says "Sentinel-2B", Earth Search "sentinel-2b"; their times differ by a second."""
    passes, own = groups(
        record("pc", when="2024-04-10T10:09:59", platform="Sentinel-2B", **ONE),
        record("es", when="2024-04-10T10:10:00", platform="sentinel-2b", **{**ONE, "baseline": "05.10"}),
        record(
            "es-east", when="2024-04-10T10:10:02", platform="sentinel-2b", **{**ONE, "tile": "MGRS-33UXP"}
        ),
        record(
            "pc-west", when="2024-04-10T10:09:50", platform="Sentinel-2B", **{**ONE, "tile": "MGRS-33UVP"}
        ),
    )
    assert own == [{"es", "es-east", "pc-west"}]
    assert passes.platform == ("sentinel-2b",)
    assert passes.replaced == 1


def test_across_the_members_of_a_merge_the_newest_baseline_stays() -> None:
    es = collection("es", record("es", platform="sentinel-2a", **{**ONE, "baseline": "05.10"}))
    pc = collection("pc", record("pc", platform="Sentinel-2A", **ONE))
    for pair in ((es, pc), (pc, es)):
        chips = rd.merge(*pair).chips(32, cell_km=1.28)
        assert {f["record"] for row in chips.table.column("feeds").to_pylist() for f in row} == {"es"}
        assert chips.planned.dropped["record replaced by a newer baseline (merged)"] == 1


def test_records_without_any_time_are_refused() -> None:
    with pytest.raises(rd.PlanError, match="no datetime"):
        acquisitions(Records(table({**record("a"), "datetime": None})))


# Ranges


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (("2024-04-01", "2024-04-30"), ("2024-04-01T00:00:00+00:00", "2024-05-01T00:00:00+00:00")),
        (("2024-04", "2024-05"), ("2024-04-01T00:00:00+00:00", "2024-06-01T00:00:00+00:00")),
        ("2024", ("2024-01-01T00:00:00+00:00", "2025-01-01T00:00:00+00:00")),
        ("2024-04-01/..", ("2024-04-01T00:00:00+00:00", None)),
        ((None, "2024-02-29"), (None, "2024-03-01T00:00:00+00:00")),
        (("2024-04-01T12:00+02:00", "2024-04-01T12:00Z"), ("2024-04-01T10:00:00+00:00", "2024-04-01T12:00:00+00:00")),
        (None, (None, None)),
    ],
)  # fmt: skip
def test_the_last_day_is_included(given_: Any, expected: tuple[str | None, str | None]) -> None:
    assert half_open(given_) == expected


@pytest.mark.parametrize(
    "given_", [("2024-05-01", "2024-04-01"), ("spring", None), ("2024-01-01",), 2024, ("2024-13-01", None)]
)
def test_a_bad_range_is_refused(given_: Any) -> None:
    with pytest.raises(rd.PlanError):
        half_open(given_)


def test_the_narrowest_range_counts() -> None:
    start, end = narrowest([("2024-04-01", None), ("2024-03-01", "2024-06-01"), (None, "2024-07-01")])
    assert (str(start), str(end)) == ("2024-04-01 00:00:00", "2024-06-01 00:00:00")


def stamp(text: str) -> pd.Timestamp:
    return pd.Timestamp(text, tz="UTC")


@pytest.mark.parametrize(
    ("offset", "start", "end", "first", "last", "count"),
    [
        ("1MS", "2024-04-01", "2024-07-01", "2024-04-01", "2024-07-01", 3),
        ("1MS", "2024-04-15", "2024-06-02", "2024-04-01", "2024-07-01", 3),
        ("1MS", "2024-04-30T23:59:59", "2024-05-01T00:00:01", "2024-04-01", "2024-06-01", 2),
        ("QS", "2024-02-10", "2024-08-01", "2024-01-01", "2024-10-01", 3),
        ("YS", "2023-12-31", "2024-01-01", "2023-01-01", "2024-01-01", 1),
        ("10D", "2024-04-03", "2024-04-30", "2024-04-03", "2024-05-03", 3),
        ("W-MON", "2024-04-03", "2024-04-10", "2024-04-01", "2024-04-15", 2),
    ],
)
def test_slots_stand_on_the_calendar(
    offset: str, start: str, end: str, first: str, last: str, count: int
) -> None:
    axis = regular(offset, stamp(start), stamp(end))
    assert len(axis) == count
    assert axis.start[0] == np.datetime64(first)
    assert axis.end[-1] == np.datetime64(last)
    assert (axis.start[1:] == axis.end[:-1]).all()
    assert axis.end[0] > np.datetime64(start)
    assert axis.start[-1] < np.datetime64(end)


@pytest.mark.parametrize("offset", ["month", "-1MS", "0D", "1ns"])
def test_an_offset_that_goes_nowhere_is_refused(offset: str) -> None:
    with pytest.raises(rd.PlanError, match="time="):
        regular(offset, stamp("2024-04-01"), stamp("2024-07-01"))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 700),
    st.integers(1, 400),
    st.sampled_from(["1MS", "QS", "7D", "YS", "2MS"]),
    st.integers(0, 400),
)
def test_every_instant_of_the_range_is_in_one_slot(start: int, length: int, offset: str, at: int) -> None:
    day = stamp("2023-01-01")
    axis = regular(offset, day + pd.Timedelta(start, "D"), day + pd.Timedelta(start + length, "D"))
    moment = np.datetime64((day + pd.Timedelta(24 * (start + at % length) + 3, "h")).tz_localize(None), "ns")
    assert ((axis.start <= moment) & (moment < axis.end)).sum() == 1


def year(name: str, first: int) -> dict[str, Any]:
    return record(name, when=f"{first}-01-01T00:00:00", until=f"{first + 1}-01-01T00:00:00", bands=("data",))


def test_intervals_are_their_own_slots() -> None:
    passes = acquisitions(Records(table(year("b", 2024), year("a", 2022), year("c", 2022))))
    axis = intervals([passes])
    assert axis.start.astype("datetime64[Y]").astype(str).tolist() == ["2022", "2024"]
    assert axis.end.astype("datetime64[Y]").astype(str).tolist() == ["2023", "2025"]


# What time means in a plan


def instants(*days: str, **columns: Any) -> rd.Collection:
    return collection("s2", *(record(f"r{d}", when=f"{d}T10:00:00", datatake=d, **columns) for d in days))


def axis_of(chips: rd.Chips) -> list[list[str]]:
    return [[str(t)[:10] for t in s.axis.start] if s.axis else [] for s in chips.planned.sources]


CELLS: dict[str, Any] = {"cell_km": 1.28}


def test_the_range_is_the_narrowest_of_build_and_subset_else_of_the_records() -> None:
    own = instants("2024-04-10", "2024-07-20")
    monthly = own.harmonize(["red"], time="1MS")
    assert axis_of(monthly.chips(32, **CELLS)) == [["2024-04-01", "2024-05-01", "2024-06-01", "2024-07-01"]]
    ranged = monthly.subset(date_range=("2024-03", "2024-09")).subset(date_range=("2024-04-05", "2024-05-31"))
    assert axis_of(ranged.chips(32, **CELLS)) == [["2024-04-01", "2024-05-01"]]
    open_end = monthly.subset(date_range=("2024-06-01", None))
    assert axis_of(open_end.chips(32, **CELLS)) == [["2024-06-01", "2024-07-01"]]
    assert axis_of(own.subset(date_range="2024-04").harmonize(["red"], time="10D").chips(32, **CELLS)) == [
        ["2024-04-01", "2024-04-11", "2024-04-21"]
    ]


def test_the_ranges_of_members_add_up() -> None:
    """Two seasons of two collections: neither is narrower than the other."""
    first = instants("2023-04-10").subset(date_range="2023-04")
    second = collection("later", record("x", when="2024-04-10T10:00:00")).subset(date_range="2024-04")
    chips = rd.merge(first, second).harmonize(["red"], time="1MS").chips(32, **CELLS)
    (axis,) = axis_of(chips)
    assert (axis[0], axis[-1], len(axis)) == ("2023-04-01", "2024-04-01", 13)
    assert set(chips.table.column("slots").to_pylist()) == {2}


def test_intervals_of_a_timed_join_are_those_that_overlap_the_range() -> None:
    own = instants("2023-12-31", "2024-04-10").harmonize(["red"], time="W-SUN")
    years = collection("year", *(year(f"y{y}", y) for y in range(2021, 2027)))

    def of(dates: Any) -> list[str]:
        return axis_of(rd.join(a=own.subset(date_range=dates), y=years).chips(32, **CELLS))[1]

    assert of(("2024-01-01", "2024-04-30")) == ["2024-01-01"]  # though its first week begins in 2023
    assert of(("2023-12-31", "2024-04-30")) == ["2023-01-01", "2024-01-01"]


def test_instants_beside_a_time_axis_need_one() -> None:
    both = rd.join(a=instants("2024-04-10").harmonize(["red"], time="1MS"), b=instants("2024-04-11"))
    with pytest.raises(rd.PlanError, match=r"'b'.*time="):
        _ = both.chips(32, **CELLS).table


def test_years_that_miss_the_range_are_told() -> None:
    years = collection("year", year("y", 2019))
    both = rd.join(a=instants("2024-04-10").harmonize(["red"], time="1MS"), y=years)
    with pytest.raises(rd.PlanError, match="2019"):
        _ = both.chips(32, **CELLS).table


def test_without_time_a_chip_is_one_acquisition_of_the_reference() -> None:
    ours = instants("2024-04-10", "2024-05-20")
    days = ("2024-04-01", "2024-04-14", "2024-05-21")
    passes = (record(f"l{d}", when=f"{d}T09:00:00", datatake=d, bands=("B4", "B5")) for d in days)
    theirs = collection("l8", *passes)
    years = collection("year", year("y23", 2023), year("y24", 2024))
    chips = rd.join(s2=ours, l8=theirs, year=years).chips(32, **CELLS)
    rows = chips.table.select(["chip_id", "datetime", "acquisition", "feeds", "row", "col"]).to_pylist()
    assert len({(r["row"], r["col"]) for r in rows}) * 2 == len(rows)
    for r in rows:
        fed = {f["source"]: f["record"] for f in r["feeds"]}
        day = str(r["datetime"].date())
        assert fed == {
            "s2": f"r{day}",
            "l8": {"2024-04-10": "l2024-04-14", "2024-05-20": "l2024-05-21"}[day],
            "year": "y24",
        }
        assert r["acquisition"] == f"sentinel-2a-{r['datetime']:%Y%m%dT%H%M%S}"
        assert r["chip_id"].endswith("_" + r["acquisition"])


def test_no_interval_holds_the_acquisition() -> None:
    both = rd.join(a=instants("2024-04-10", "2025-04-10"), y=collection("y", year("y24", 2024)))
    chips = both.chips(32, **CELLS)
    assert {t.year for t in chips.table.column("datetime").to_pylist()} == {2024}
    assert "without an acquisition of y" in " ".join(chips.planned.dropped)
    with pytest.raises(rd.PlanError, match="without an acquisition of y"):
        _ = rd.join(a=instants("2025-04-10"), y=collection("y", year("y24", 2024))).chips(32, **CELLS).table


def test_ids_of_acquisitions_do_not_depend_on_other_records() -> None:
    """A tile to the west starts five seconds earlier; one far away, eight minutes."""
    own = record("mid", when="2024-04-10T10:00:10", **{**ONE, "tile": "1"})
    west = record("west", west=480_000.0, when="2024-04-10T10:00:05", **{**ONE, "tile": "2"})
    far = record("far", north=5_000_000.0, when="2024-04-10T09:52:30", **{**ONE, "tile": "3"})
    other = record("other", when="2024-04-10T10:00:10", platform="b", **{**ONE, "tile": "1"})
    alone = collection("s2", own).chips(32, **CELLS)
    rows = [own, west, far, other]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        many = collection("s2", *rows).chips(32, **CELLS)
        assert set(ids(alone)) < set(ids(many))
    whole = many.table.to_pylist()
    assert [r["datetime"] for r in whole if r["chip_id"] == ids(alone)[0]] == [own["datetime"]]
    assert len(set(ids(many))) == len(many)


def test_acquisitions_of_one_second_are_counted() -> None:
    pair = [record(n, platform=None, collection=n, when="2024-04-10T10:00:00") for n in ("a", "b")]
    chips = collection("x", *pair).chips(32, **CELLS)
    assert len(set(ids(chips))) == len(chips)
    assert {c.split("_")[-1] for c in ids(chips)} == {"unknown-20240410T100000", "unknown-20240410T100000-2"}


@pytest.mark.parametrize("offset", ["1M", "1ME", "QE", "YE"])
def test_slots_begin_where_they_are_named(offset: str) -> None:
    day = pd.Timestamp("2024-04-01", tz="UTC")
    with pytest.raises(rd.PlanError, match="MS"):
        regular(offset, day, day + pd.Timedelta(91, "D"))
