"""Slots of each chip's own: single acquisitions, padded; windows of time about the chip's dates."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, fed_by, project, record
from small_stores import nodes

import rasteret_dask as rd
from rasteret_dask.planning.plan import Harmonize, HarmonizeSpec, from_json, to_json
from rasteret_dask.words import Choose

CELLS: dict[str, Any] = {"cell_km": 0.64}
DAY = dt.timedelta(days=1)
ANYWHERE = project(shapely.Point(502_000.0, 5_398_000.0), 32633, 4326)
"""A place that every record of ``made_records`` covers."""

# Which acquisitions

PASSES = st.lists(
    st.tuples(st.integers(0, 60), st.one_of(st.none(), st.integers(0, 100))),
    min_size=1, max_size=9, unique_by=lambda pair: pair[0],
)  # fmt: skip


def rows_of(passes: list[tuple[int, int | None]]) -> list[dict[str, Any]]:
    """One record a pass, on the day, with that cloud cover."""
    return [
        record(
            f"r{at:02d}", cloud=cloud, datatake=f"d{at}",
            when=f"{dt.datetime(2024, 4, 1, 10) + day * DAY:%Y-%m-%dT%H:%M:%S}",
        )
        for at, (day, cloud) in enumerate(passes)
    ]  # fmt: skip


def choice(rows: list[dict[str, Any]], most: int, choose: str, moment: dt.datetime) -> list[str]:
    """What a chip should have, by hand: ids by time."""
    rows = sorted(rows, key=lambda r: r["datetime"])
    if choose == "spread" and len(rows) > most:
        places = (
            [(len(rows) - 1) // 2]
            if most == 1
            else [int(k * (len(rows) - 1) / (most - 1) + 0.5) for k in range(most)]
        )
        rows = [rows[place] for place in places]
    best: dict[str, Callable[[dict[str, Any]], Any]] = {
        "spread": lambda r: 0,
        "clearest": lambda r: np.inf if r["eo:cloud_cover"] is None else r["eo:cloud_cover"],
        "latest": lambda r: -r["datetime"].timestamp(),
        "nearest": lambda r: abs(r["datetime"] - moment),
    }
    kept = sorted(rows, key=lambda r: (best[choose](r), r["datetime"]))[:most]
    return [r["id"] for r in sorted(kept, key=lambda r: r["datetime"])]


def places(**columns: Any) -> gpd.GeoDataFrame:
    """As many points at one place as there are dates."""
    count = len(next(iter(columns.values())))
    made: dict[str, Any] = {name: pd.to_datetime(v, format="ISO8601") for name, v in columns.items()}
    return gpd.GeoDataFrame(made, geometry=[ANYWHERE] * count, crs=4326)


@settings(max_examples=25, deadline=None)
@given(
    PASSES,
    st.integers(1, 6),
    st.sampled_from(["spread", "clearest", "latest", "nearest"]),
    st.integers(-5, 65),
)
def test_acquisitions_are_those_of_the_oracle(passes: list[Any], most: int, choose: Choose, day: int) -> None:
    rows = rows_of(passes)
    moment = dt.datetime(2024, 4, 1, tzinfo=dt.UTC) + day * DAY
    own = collection("s2", *rows).harmonize(
        ["red"], time="acquisitions", max_acquisitions=most, choose=choose,
        relative_to="event" if choose == "nearest" else None,
    )  # fmt: skip
    chips = own.chips(32, at=places(event=[moment.replace(tzinfo=None)]))
    wanted = choice(rows, most, choose, moment)
    (fed,) = fed_by(chips)
    assert fed == {("s2", slot): [name] for slot, name in enumerate(wanted)}
    assert chips.table.column("slots").to_pylist() == [len(wanted)]


def test_granules_of_a_pass_are_one_slot_and_clouds_those_of_the_ground() -> None:
    """Two tiles of a pass fill one slot; a tile that is elsewhere tells nothing of the clouds here."""
    rows = [
        record("a1", tile="1", datatake="a", cloud=50.0),
        record("a2", tile="2", datatake="a", cloud=40.0, west=500_500.0),
        record("b1", tile="1", datatake="b", cloud=46.0, when="2024-04-15T10:00:00"),
        record("b2", tile="2", datatake="b", cloud=0.0, when="2024-04-15T10:00:05", west=540_000.0),
    ]
    own = collection("s2", *rows).harmonize(
        ["red"], time="acquisitions", max_acquisitions=1, choose="clearest"
    )
    (fed,) = fed_by(own.chips(32, at=places(day=["2024-01-01"])))
    assert {slot: sorted(ids) for slot, ids in fed.items()} == {("s2", 0): ["a1", "a2"]}


def test_acquisitions_that_cover_too_little_are_no_candidates() -> None:
    rows = [record("whole"), record("half", datatake="h", when="2024-05-01T10:00:00", west=502_050.0)]
    make = collection("s2", *rows).harmonize(["red"], time="acquisitions", max_acquisitions=3)
    points = places(day=["2024-01-01"])
    assert fed_by(make.chips(32, at=points)) == [{("s2", 0): ["whole"]}]
    assert len(fed_by(make.chips(32, at=points, min_coverage=0.2))[0]) == 2
    with pytest.raises(rd.EmptyError, match="in 2 slots"):
        _ = make.chips(32, at=points, min_slots=2).table


# Windows of time

EDGES = st.lists(st.integers(-40, 40), min_size=2, max_size=5, unique=True).map(sorted)


@settings(max_examples=25, deadline=None)
@given(PASSES, EDGES, st.integers(0, 60), st.sampled_from(["closest", "first", "median"]))
def test_windows_hold_what_lies_between_their_edges(
    passes: list[Any], edges: list[int], day: int, pick: Any
) -> None:
    rows = rows_of(passes)
    date = dt.datetime(2024, 4, 1, tzinfo=dt.UTC) + day * DAY
    expected = {}
    for slot, (first, last) in enumerate(pairwise(edges)):
        inside = [r for r in rows if date + first * DAY <= r["datetime"] < date + last * DAY]
        middle = date + (first + last) / 2 * DAY
        order = sorted(
            inside,
            key=lambda r: (0 if pick == "first" else abs(r["datetime"] - middle), r["datetime"], r["id"]),
        )
        if inside:
            expected["s2", slot] = [r["id"] for r in (order if pick == "median" else order[:1])]
    make = collection("s2", *rows).harmonize(
        ["red"], time=[f"{e}D" for e in edges], relative_to="event", pick=pick
    )
    chips = make.chips(32, at=places(event=[date.replace(tzinfo=None)]), min_slots=1)
    if not expected:
        with pytest.raises(rd.EmptyError):
            _ = chips.table
        return
    (fed,) = fed_by(chips)
    assert {slot: sorted(ids) if pick == "median" else ids for slot, ids in fed.items()} == {
        slot: sorted(ids) if pick == "median" else ids for slot, ids in expected.items()
    }


def test_columns_are_edges_and_the_last_one_is_not_inside() -> None:
    rows = rows_of([(0, 10), (10, 20), (20, 30), (30, 0)])  # on April 1, 11, 21 and May 1, at 10
    points = places(
        start=["2024-04-01", "2024-04-01 10:00", "2024-04-01 10:00:01"],
        end=["2024-04-22", "2024-05-01 10:00", "2024-05-01 10:00:01"],
    )
    own = collection("s2", *rows)
    each = own.harmonize(["red"], time=["start", "end"], max_acquisitions=9).chips(32, at=points)
    found = [[name for ids in fed.values() for name in ids] for fed in fed_by(each)]
    assert found == [["r00", "r01", "r02"], ["r00", "r01", "r02"], ["r01", "r02", "r03"]]
    two = own.harmonize(["red"], time=["start", "end"], max_acquisitions=2, choose="clearest").chips(
        32, at=points
    )
    found = [[name for ids in fed.values() for name in ids] for fed in fed_by(two)]
    assert found == [["r00", "r01"], ["r00", "r01"], ["r01", "r03"]]
    one = own.harmonize(["red"], time=["start", "end"], pick="last").chips(32, at=points)
    assert fed_by(one) == [{("s2", 0): [name]} for name in ("r02", "r02", "r03")]


def test_time_zones_and_plain_dates_are_utc() -> None:
    rows = rows_of([(0, None)])  # April 1 at 10, UTC
    aware = places(event=["2024-04-01T11:00:00+02:00"])  # 9 UTC
    days = places(event=["2024-04-01"])
    days["event"] = [dt.date(2024, 4, 1)]
    for points, edges in ((aware, ["0h", "1h"]), (aware, ["1h", "2h"]), (days, ["9h", "11h"])):
        make = (
            collection("s2", *rows).harmonize(["red"], time=edges, relative_to="event").chips(32, at=points)
        )
        if edges == ["0h", "1h"]:
            with pytest.raises(rd.EmptyError):
                _ = make.table
        else:
            assert len(make.table) == 1


# Pixels


@pytest.fixture(scope="module")
def points(s2: rd.Collection) -> gpd.GeoDataFrame:
    """Two places and a date each, and a class."""
    cells = s2.harmonize(["red"]).chips(32, cell_km=0.96).sample(2, seed=1).to_geopandas()
    return gpd.GeoDataFrame(
        {"event": pd.to_datetime(["2024-04-20", "2024-06-10"]), "crop": ["oats", "rye"], "part": ["train", "val"]},
        geometry=list(shapely.centroid(cells.geometry.to_numpy())), crs=4326,
    )  # fmt: skip


def plain(found: xr.Dataset | xr.DataTree) -> xr.Dataset:
    """Return the chips of one source."""
    assert isinstance(found, xr.Dataset)
    return found


def alone(s2: rd.Collection, points: gpd.GeoDataFrame, bands: list[str]) -> dict[Any, Any]:
    """(place, time) -> pixels of the chip that is this acquisition."""
    chips = plain(s2.harmonize(bands).chips(32, at=points).load())
    keys = zip(map(tuple, chips["bounds"].values.tolist()), chips["datetime"].values[:, 0], strict=True)
    return dict(zip(keys, chips["pixels"].values[:, 0], strict=True))


def test_each_slot_is_the_chip_of_that_acquisition_and_each_exit_says_so(
    s2: rd.Collection, points: gpd.GeoDataFrame, tmp_path: Path
) -> None:
    own = s2.harmonize(["red", "nir"], time="acquisitions", max_acquisitions=9)
    chips = own.chips(32, at=points).split(by="part")
    loaded, single = plain(chips.load()), alone(s2, points, ["red", "nir"])
    there = loaded["present"].values
    assert loaded["pixels"].dims == ("chip", "time", "band", "y", "x")
    assert "time" not in loaded.coords
    assert there.sum() == len(single)
    assert (~there).any()
    for chip, slot in np.ndindex(there.shape):
        when, pixels = loaded["datetime"].values[chip, slot], loaded["pixels"].values[chip, slot]
        if there[chip, slot]:
            np.testing.assert_array_equal(pixels, single[tuple(loaded["bounds"].values[chip].tolist()), when])
        else:
            assert np.isnat(when)
            assert np.isnan(pixels).all()
            assert loaded["member"].values[chip, slot] == ""
    assert (np.diff(there.astype(int), axis=1) <= 0).all()  # what is absent comes last
    times = np.where(there, loaded["datetime"].values.astype("int64"), np.iinfo("int64").max)
    assert (np.diff(times, axis=1) >= 0).all()
    chips.to_zarr(tmp_path / "chips.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "chips.zarr")
    for other in (chips.to_xarray().compute(), stored.load(), stored.to_xarray().compute()):
        for name in ("pixels", "present", "datetime", "valid_fraction"):
            np.testing.assert_array_equal(plain(other)[name].values, loaded[name].values)
    assert "present" in xr.open_zarr(tmp_path / "chips.zarr", group="train").coords
    for source in (chips, stored):
        batch = next(source.stream(batch_size=2))
        place = [loaded["chip_id"].values.tolist().index(name) for name in batch["chip_id"]]
        np.testing.assert_array_equal(batch["s2/present"], there[place])
        np.testing.assert_array_equal(batch["s2/valid"].any(axis=(2, 3)), there[place])
        as_datasets = rd.as_xarray(batch)["s2"]
        assert as_datasets["present"].dims == ("chip", "time")
        assert "present" in as_datasets.coords
    rye = plain(stored.filter("crop", "==", "rye").load())
    np.testing.assert_array_equal(
        rye["present"].values, loaded["present"].values[loaded["crop"].values == "rye"]
    )
    assert rd.verify(tmp_path / "chips.zarr", sources=2) is not None


def test_sources_keep_their_own_slots(
    s2: rd.Collection, aef: rd.Collection, points: gpd.GeoDataFrame
) -> None:
    optical = s2.harmonize(
        ["red"], time="acquisitions", max_acquisitions=2, choose="nearest", relative_to="event"
    )
    monthly = s2.harmonize(["nir"], time="1MS")
    near = s2.harmonize(["green"], time=["-30D", "0D", "30D"], relative_to="event", pick="median")
    joined = rd.join(optical=optical, monthly=monthly, near=near, aef=aef.harmonize(["A00"]))
    found = nodes(joined.chips(32, at=points).load())
    assert [found[name].sizes["time"] for name in ("optical", "monthly", "near", "aef")] == [2, 3, 2, 1]
    assert ["present" in found[name] for name in found] == [True, False, True, False]
    whens = found["optical"]["datetime"].values
    far = np.abs(whens - points["event"].to_numpy()[:, None])
    every = np.array(sorted({when for _, when in alone(s2, points, ["red"])}))
    for chip, event in enumerate(points["event"].to_numpy()):
        assert far[chip].max() <= np.sort(np.abs(every - event))[1]


def test_explain_preview_and_why_speak_of_own_slots(s2: rd.Collection, points: gpd.GeoDataFrame) -> None:
    chips = s2.harmonize(["red"], time=["-20D", "0D", "20D"], relative_to="event").chips(32, at=points)
    report = chips.explain()
    assert "2 slots of each chip's own from -20D to 20D of event" in str(report)
    assert report.facts["chip_slots"]["s2"]["slots"] == 2
    assert "slot -20D to 0D" in str(chips.why(chips.table.column("chip_id")[0].as_py()))
    assert "each chip's own" in repr(chips) or "slots of each chip" in repr(chips)
    each = s2.harmonize(["red"], time="acquisitions", max_acquisitions=1).chips(32, at=points)
    table = str(each.why(each.table.column("chip_id")[0].as_py()))
    assert "one of the chip's acquisitions (at most 1, spread)" in table
    assert "not used" in table
    far = places(event=["2010-01-01"])
    far.geometry = points.geometry.iloc[:1].to_list()
    lost = s2.harmonize(["red"], time=["-20D", "0D"], relative_to="event").chips(32, at=far)
    place = far.geometry.iloc[0]
    assert "lie in none of its slots (event 2010-01-01)" in str(lost.why(lon=place.x, lat=place.y))


def test_composites_and_clouds_and_masks_work_in_windows(s2: rd.Collection, points: gpd.GeoDataFrame) -> None:
    make = s2.harmonize(["red"], time=["-60D", "60D"], relative_to="event", pick="median", mask="clouds")
    found = plain(make.chips(32, at=points).load())
    layers = plain(s2.harmonize(["red"], mask="clouds").chips(32, at=points).load())
    for chip in range(2):
        same = (layers["bounds"].values == found["bounds"].values[chip]).all(axis=1)
        near = np.abs(layers["datetime"].values[:, 0] - points["event"].to_numpy()[chip]) < np.timedelta64(
            60, "D"
        )
        with np.errstate(all="ignore"):
            wanted = np.nanmedian(layers["pixels"].values[same & near, 0], axis=0)
        np.testing.assert_allclose(found["pixels"].values[chip, 0], wanted, rtol=1e-6)
    each = s2.harmonize(["red"], time="acquisitions", max_acquisitions=3).chips(32, at=points)
    assert each.filter_pixels(max_cloud=1.0).load().sizes["chip"] == 2


# What is said, kept, and refused


def test_plans_of_before_keep_their_hash_and_new_ones_say_all() -> None:
    plain = to_json(HarmonizeSpec(time="1MS"))
    assert not {"max_acquisitions", "choose", "relative_to"} & plain.keys()
    own = HarmonizeSpec(time=("-30D", "0D"), max_acquisitions=3, choose="latest", relative_to="event")
    assert from_json(json.loads(json.dumps(to_json(own)))) == own
    make = collection("s2", record("a")).harmonize(
        ["red"], time=["-30D", "0D"], max_acquisitions=3, choose="latest", relative_to="event"
    )
    assert isinstance(make.plan, Harmonize)
    shown = repr(make)
    for part in ('time=["-30D", "0D"]', "max_acquisitions=3", 'choose="latest"', 'relative_to="event"'):
        assert part in shown, shown


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"time": "acquisitions"}, "max_acquisitions=12"),
        ({"time": "acquisitions", "max_acquisitions": 0}, "from 1 to"),
        ({"time": "acquisitions", "max_acquisitions": 1.5}, "from 1 to"),
        ({"time": "acquisitions", "max_acquisitions": 3, "choose": "best"}, "clearest.*nearest"),
        ({"time": "acquisitions", "max_acquisitions": 3, "choose": "nearest"}, "relative_to='date'"),
        ({"time": "acquisitions", "max_acquisitions": 3, "relative_to": "event"}, "choose='nearest'"),
        ({"time": "acquisitions", "max_acquisitions": 3, "pick": "median"}, "choose= says which"),
        ({"time": "acquisitions", "max_acquisitions": 3, "fill": True}, "choose= says which"),
        ({"time": "1MS", "max_acquisitions": 3}, "time='acquisitions'"),
        ({"max_acquisitions": 3}, "time='acquisitions'"),
        ({"time": "1MS", "relative_to": "event"}, "relative_to='date'"),
        ({"time": ["-3D"], "relative_to": "event"}, "two or more"),
        ({"time": ["-3D", "0D", "3D"], "relative_to": "event", "max_acquisitions": 3}, "Windows lie between"),
        ({"time": ["3D", "0D"], "relative_to": "event"}, "do not rise"),
        ({"time": ["-3D", "0D"], "relative_to": "event", "choose": "latest"}, "pick="),
        ({"time": ["-1M", "0D"], "relative_to": "event"}, "say days"),
        ({"time": ["-3D", "0D"], "relative_to": "evnt"}, "no such column of at=: event"),
        ({"time": ["-3D", "0D"], "relative_to": "event", "tolerance": "3D"}, "intervals"),
        ({"time": ["event", "event"]}, "end before they begin"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(step: dict[str, Any], message: str) -> None:
    def plan() -> None:
        make = collection("s2", record("a")).harmonize(["red"], **step)
        _ = make.chips(32, at=places(event=["2024-04-10"])).table

    with pytest.raises(rd.PlanError, match=message):
        plan()


def test_dates_must_be_there() -> None:
    make = collection("s2", record("a")).harmonize(["red"], time=["-3D", "3D"], relative_to="event")
    points = places(event=["2024-04-10", None])
    with pytest.raises(rd.PlanError, match=r"1 nulls: rows 1.*notna"):
        _ = make.chips(32, at=points).table
    assert len(make.chips(32, at=points[points["event"].notna()]).table) == 1
    texts = points.assign(event=["2024-04-10", "2024-04-11"])
    with pytest.raises(rd.PlanError, match="to_datetime"):
        _ = make.chips(32, at=texts).table
    assert len(make.chips(32, at=texts.assign(event=pd.to_datetime(texts["event"]))).table) == 2
    with pytest.raises(rd.PlanError, match="at=table"):
        _ = make.chips(32, **CELLS).table
    named = collection("s2", record("a")).harmonize(["red"], time=["-3D", "3D"], relative_to="datetime")
    with pytest.raises(rd.PlanError, match="rename"):
        _ = named.chips(32, at=places(datetime=["2024-04-10"])).table


def test_what_has_no_chips_has_no_dates_of_chips(s2: rd.Collection) -> None:
    windows = s2.harmonize(["red"], time=["-3D", "3D"], relative_to="event")
    for read in (windows.cube, lambda: windows.get_numpy([ANYWHERE])):
        with pytest.raises(rd.PlanError, match=r"chips\(size, at="):
            read()
    each = s2.harmonize(["red"], time="acquisitions", max_acquisitions=2)
    assert each.cube().sizes["time"] == s2.harmonize(["red"]).cube().sizes["time"]
    still = (
        collection("dem", record("a"))
        .harmonize(time="static")
        .harmonize(time="acquisitions", max_acquisitions=1)
    )
    assert len(still.chips(32, **CELLS).table)  # the outer step says what holds


def test_intervals_beside_own_slots_have_slots_of_their_own(s2: rd.Collection, aef: rd.Collection) -> None:
    own = s2.harmonize(["red"], time="acquisitions", max_acquisitions=2)
    far = aef.harmonize(["A00"], tolerance="400D")
    with pytest.raises(rd.PlanError, match="Leave tolerance out"):
        _ = rd.join(s2=own, aef=far).chips(32, **CELLS).table


def test_a_recipe_says_it_too(s2: rd.Collection, tmp_path: Path) -> None:
    """Read again, it is the same plan; with edges too."""
    s2.export(tmp_path / "s2.parquet")
    read = rd.load(tmp_path / "s2.parquet", "s2")
    steps: list[dict[str, Any]] = [
        {"time": "acquisitions", "max_acquisitions": 3, "choose": "clearest"},
        {"time": ["-30D", "0D"], "relative_to": "event"},
    ]
    for step in steps:
        chips = read.harmonize(["red"], **step).chips(32, cell_km=0.96)
        (tmp_path / "recipe.toml").write_text(chips.to_recipe())
        assert rd.load_recipe(tmp_path / "recipe.toml").chips().plan == chips.plan
