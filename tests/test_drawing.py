"""What a sample or a filter leaves out is not planned, and what it keeps is what it keeps of the whole table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import collection, record
from shapely.affinity import translate

import rasteret_dask as rd
from rasteret_dask.chipping import drawing, frame
from rasteret_dask.chipping.chips import ChipSources, PlannedChips, chip_sources
from rasteret_dask.chipping.chiptable import joined
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import utm_zone
from rasteret_dask.zones import UTM

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

Step = Callable[[rd.Chips], rd.Chips]


@pytest.fixture(autouse=True)
def small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans of a few hundred windows be drawn from, too."""
    monkeypatch.setattr(drawing, "FEW_WINDOWS", 50)


class Looked:
    """Counts the windows for which records were looked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows = 0
        lay = ChipSources.lay

        def counting(ground: ChipSources, frame: Frame, points: pa.Table | None = None) -> PlannedChips:
            self.windows += len(frame)
            return lay(ground, frame, points)

        monkeypatch.setattr(ChipSources, "lay", counting)

    def during(self, make: Callable[[], Any]) -> int:
        """Return how many there were in a call."""
        before = self.windows
        make()
        return self.windows - before


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Looked:
    return Looked(monkeypatch)


def fresh(time: str | None = "1MS", **more: Any) -> rd.Chips:
    """Return chips that nobody has planned: scenes of two zones, one of which covers half of its raster."""
    half = shapely.Polygon([(500_000, 5_400_000), (504_000, 5_400_000), (500_000, 5_396_000)])
    rows = [
        record("a4", datatake="1"), record("a5", when="2024-05-10T10:00:00", datatake="2"),
        record("b4", west=503_000.0, ground=translate(half, 3000), datatake="3"),
        record("z4", epsg=32634, west=61_000.0, north=5_416_000.0, when="2024-04-11T10:00:00", datatake="4"),
        record("far", north=5_300_000.0, when="2024-04-12T10:00:00", datatake="5"),
    ]  # fmt: skip
    own = collection("s2", *rows).harmonize(["red"], time=time)
    return own.chips(16, **{"cell_km": 0.64, "min_coverage": 0.5, **more})


BEFORE: dict[str, Step] = {
    "nothing": lambda chips: chips,
    "split": lambda chips: chips.split(0.5, 0.25, 0.25, seed=3),
    "select": lambda chips: chips.split(0.5, 0.25, 0.25, seed=3).select("train", "test"),
    "centre": lambda chips: chips.split(0.5, 0.25, 0.25, boundary="centre").select("train"),
    "filter": lambda chips: chips.filter(("ymin", ">", 5_350_000.0)),
    "filter and split": lambda chips: (
        chips.filter(("xmin", "<", 502_500.0)).split(0.5, 0.25, 0.25).select("train")
    ),
    "filter of chips": lambda chips: chips.filter(("slots", ">=", 2)),
    "buffer": lambda chips: chips.split(0.5, 0.25, 0.25, buffer_m=200).select("val"),
    "rule": lambda chips: chips.filter_pixels(min_valid=0.5),
    "clouds": lambda chips: chips.split(0.5, 0.25, 0.25).filter_pixels(max_cloud=0.5).select("train"),
    "sample": lambda chips: chips.sample(60, seed=2),
}
BEHIND: dict[str, Step] = {
    "nothing": lambda chips: chips,
    "split": lambda chips: chips.split(0.5, 0.25, 0.25, seed=8),
    "filter": lambda chips: chips.filter(("slots", ">=", 1)),
    "sample": lambda chips: chips.sample(3, seed=1),
}
AREA = shapely.Polygon([(14.99, 48.70), (15.04, 48.70), (15.04, 48.76), (15.0, 48.745)])


def whole(chips: rd.Chips) -> rd.Chips:
    """Return the same chips, planned whole."""
    assert len(chips.table) > 0
    return chips


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from(sorted(BEFORE)), behind=st.sampled_from(sorted(BEHIND)), n=st.sampled_from([1, 7, 40, 5000]),
    seed=st.integers(0, 3), by=st.sampled_from([None, None, "epsg"]), time=st.sampled_from(["1MS", "1MS", None]),
    how=st.sampled_from([{}, {"aoi": AREA}, {"grid": "tiles", "size": 32}, {"stride": 8}]),
)  # fmt: skip
def test_a_sample_of_a_fresh_plan_is_that_of_the_whole_table(
    before: str, behind: str, n: int, seed: int, by: str | None, time: str | None, how: dict[str, Any]
) -> None:
    how = dict(how)
    size = how.pop("size", 16)

    def made() -> rd.Chips:
        if size == 16:
            return fresh(time, **how)
        one = collection(
            "s2", record("a", px=(512, 512)), record("b", px=(512, 512), when="2024-05-10T10:00:00")
        )
        return one.harmonize(["red"], time=time).chips(size, **how)

    def outcome(chips: rd.Chips) -> Any:
        try:
            return BEHIND[behind](BEFORE[before](chips).sample(n, seed, by)).table
        except PlanError as error:
            return str(error)

    expected, result = outcome(whole(made())), outcome(made())
    if isinstance(expected, str):
        assert result == expected
    else:
        assert result.equals(expected)


@pytest.mark.parametrize("before", ["nothing", "select", "filter", "filter and split", "clouds"])
def test_a_sample_looks_at_little_more_than_it_keeps(before: str, looked: Looked) -> None:
    """Windows: those that it keeps, a tenth and its own spread more, and what of them became no chip."""
    chips = BEFORE[before](fresh(stride=8)).sample(40)
    made = looked.during(lambda: len(chips))
    everything = looked.during(lambda: len(BEFORE[before](whole(fresh(stride=8)))))
    assert 40 <= made < 400
    assert made < everything / 10


def test_a_sample_says_how_many_windows_it_looked_at(looked: Looked) -> None:
    chips = fresh(stride=8).split(0.5, 0.25, 0.25, seed=3).sample(40)
    assert looked.during(lambda: chips.planned) > 0
    counts = {why: n for why, n in chips.planned.dropped.items() if "looked at" in why}
    (uncovered,) = {n for why, n in counts.items() if why.startswith("window not covered")}
    (number,) = {why.split(", of ")[-1] for why in counts}
    assert len(chips) == 40
    assert int(number.split()[0].replace(",", "")) >= 40 + uncovered > 40
    assert number in str(chips.explain())


def test_a_sample_does_not_tell_what_only_all_chips_tell() -> None:
    """Its docstring says so, and what to do."""
    chips = fresh(stride=8, cell_km=2.56).split(0.5, 0.25, 0.25, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = chips.sample(40).table
    with pytest.warns(UserWarning, match="only .* split cell"):
        assert len(chips) > 40
    assert chips.sample(40).table.equals(drawn)


def test_a_filter_on_windows_comes_before_records_are_looked_for(looked: Looked) -> None:
    part = fresh(stride=8).filter(("xmin", "<", 500_300.0), ("epsg", "==", 32633))
    everything = whole(fresh(stride=8))
    assert 0 < looked.during(lambda: len(part)) < looked.windows / 4
    assert part.table.equals(everything.filter(("xmin", "<", 500_300.0), ("epsg", "==", 32633)).table)
    split, theirs = (c.split(0.5, 0.25, 0.25, seed=1).select("train") for c in (part, everything))
    assert split.table.equals(theirs.filter(("xmin", "<", 500_300.0), ("epsg", "==", 32633)).table)
    assert part.job.digest == everything.filter(("xmin", "<", 500_300.0), ("epsg", "==", 32633)).job.digest


def test_what_is_planned_is_not_planned_again(looked: Looked) -> None:
    chips = fresh(stride=8).split(0.5, 0.25, 0.25, seed=3)
    assert looked.during(lambda: (repr(chips), len(chips), chips.table, chips.explain(), chips.audit())) == (
        looked.windows
    )
    for look in (
        lambda: len(chips), lambda: chips.explain(), lambda: chips.audit(), lambda: chips.job,
        lambda: len(chips.select("train")), lambda: chips.select("train").explain(), lambda: len(chips.sample(5)),
        lambda: len(chips.filter(("epsg", "==", 32633))), lambda: chips.sample(5).job,
    ):  # fmt: skip
        assert looked.during(look) == 0


def test_looking_at_a_fresh_plan_makes_the_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """repr() plans nothing; len, table, explain, audit and the job of chosen splits share one table."""
    plans = 0
    made = chip_sources

    def counting(*args: Any) -> Any:
        nonlocal plans
        plans += 1
        return made(*args)

    monkeypatch.setattr(drawing, "chip_sources", counting)
    chips = fresh().split(0.5, 0.25, 0.25, seed=3)
    train = chips.select("train")
    assert "split" in repr(train)
    assert plans == 0
    for _ in range(2):
        assert len(train) + len(train.table) + len(chips.table) > 0
        assert train.explain()["chips"] == len(train)
        assert train.audit().ok
        assert train.job.hierarchies
        train.plot()
    assert plans == 1


def test_windows_that_are_not_drawn_get_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = 0

    def counting(*parts: Any, by: str = "_") -> pa.Array:
        nonlocal texts
        result = joined(*parts, by=by)
        texts += len(result) if isinstance(result, pa.Array) else 1
        return result

    for module in (drawing, frame):
        monkeypatch.setattr(module, "joined", counting)
    windows = len(fresh().table)
    texts = 0
    assert len(fresh().sample(7).table) == 7
    assert 0 < texts < windows, "one for each row and column of cells, and for windows that are drawn"


@settings(max_examples=200, deadline=None)
@given(
    west=st.floats(-180, 180), wide=st.one_of(st.just(0.0), st.floats(0, 40)), south=st.floats(-80, 70),
    high=st.floats(0, 14),
)  # fmt: skip
def test_zones_of_a_box_are_those_of_its_points(west: float, wide: float, south: float, high: float) -> None:
    box = (west, south, west + wide, south + high)
    lon, lat = np.meshgrid(np.linspace(west, west + wide, 97), np.linspace(south, south + high, 97))
    assert set(np.unique(utm_zone(lon, lat)).tolist()) <= {code - 32600 for code in UTM.near(box)}
    ends = utm_zone(lon[[0, 0, -1, -1], [0, -1, 0, -1]], lat[[0, 0, -1, -1], [0, -1, 0, -1]])
    assert len(UTM.near(box)) <= wide // 3 + 2 + len(set(ends.tolist()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4, st.sampled_from([32633, 32634])), max_size=12))
def test_boxes_inside_others_are_not_looked_at(drawn: list[tuple[int, ...]]) -> None:
    numbers = np.array(drawn, dtype=np.int64).reshape(-1, 5)
    boxes = np.concatenate([numbers[:, :2], numbers[:, :2] + 1 + numbers[:, 2:4]], axis=1).astype(float)
    epsg = numbers[:, 4]
    kept = frame._widest(boxes, epsg)
    assert kept == sorted(set(kept))

    def within(one: int, other: int) -> bool:
        inside = (boxes[one, :2] >= boxes[other, :2]).all() and (boxes[one, 2:] <= boxes[other, 2:]).all()
        return bool(inside and epsg[one] == epsg[other])

    for number in range(len(boxes)):
        assert any(within(number, other) for other in kept)
    assert not any(within(one, other) for one in kept for other in kept if one != other)
