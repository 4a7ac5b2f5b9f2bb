"""Steps of a plan are printed as calls: typed again, they make the same plan; and any plan can be printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import collection, record
from test_plan import PLANS

import rasteret_dask as rd
from rasteret_dask.lists import listed
from rasteret_dask.planning import plan as p
from rasteret_dask.planning.calls import calls, chain, condition, quoted
from rasteret_dask.rules.masks import Bits, Classes

S2, L8 = collection("s2", record("a")), collection("l8", record("b"))
NAMES = {"s2": S2, "l8": L8, "merge": rd.merge, "join": rd.join, "Bits": Bits, "Classes": Classes}

DATES = st.sampled_from([
    ("2024-04-01", "2024-06-30"), ("2024-02", "2024-02"), (None, "2023-12-31"), ("2024-04-01T10:30:00", None),
    ("2024-04-01T10:30:00.25", "2024-04-02T00:00:00"), "2024", "2024-02-29",
])  # fmt: skip
BOXES = st.sampled_from([(14.9, 50.0, 15.25, 50.2), (177.0, -20.5, -177.0, -10.0), (-1e-05, 0.0, 1.0, 1e-05)])
VALUES = st.text(max_size=5) | st.integers(-9, 9) | st.floats(-1e6, 1e6) | st.booleans() | st.none()
COLUMNS = st.sampled_from(
    ["platform", "class", "eo:cloud_cover", "tile", "bbox", "self", "split", "date_range"]
)
STEPS: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    DATES.map(lambda dates: lambda c: c.subset(date_range=dates)),
    BOXES.map(lambda box: lambda c: c.subset(bbox=box)),
    st.builds(lambda n, s: lambda c: c.subset(cloud_cover_lt=n, platform=s), st.integers(0, 100), VALUES),
    st.builds(lambda a, b: lambda c: c.filter((a, "<", b), tile=b), COLUMNS, VALUES),
    st.builds(lambda a, b: lambda c: c.filter((a, "in", (b, "x"))), COLUMNS, VALUES),
    st.builds(lambda n, s, by: lambda c: c.sample(n, s, by), st.integers(0, 9), st.integers(0, 3),
              st.sampled_from([None, "tile"])),
    st.builds(
        lambda bands, mask, time, units, more: lambda c: c.harmonize(bands, mask=mask, time=time, units=units, **more),
        st.sampled_from([None, ["red"], ["red", "nir"], "nir"]),
        st.sampled_from([None, "clouds", ["clouds", "snow"], Bits("qa", (1, 5)), ["water", Classes("SCL", (3, 8))]]),
        st.sampled_from([None, "1MS", "static"]),
        st.sampled_from(["physical", "raw", "decibel", {"red": "raw", "nir": "scaled"}]),
        st.sampled_from([{}, {"resolution": 20}, {"resolution": 2.5, "resampling": "cubic"}, {"pick": "median"},
                         {"pick": "first", "fill": True}, {"fill": False, "dtype": "uint16"},
                         {"kinds": {"red": "class"}, "tolerance": "400D"}]),
    ),
)  # fmt: skip
CHIPPED: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    st.builds(
        lambda size, more: lambda c: c.chips(size, **more),
        st.sampled_from([16, 128]),
        st.sampled_from([{}, {"stride": 8}, {"cell_km": 5.12}, {"grid": "EPSG:3035"}, {"grid": "tiles"},
                         {"min_coverage": 0.5, "min_slots": 2}, {"aoi": (14.9, 50.0, 15.25, 50.2)},
                         {"reference": "s2"}]),
    ),
)  # fmt: skip
AFTER: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    st.builds(
        lambda shares, more: lambda c: c.split(**shares, **more),
        st.sampled_from(
            [
                {},
                {"train": 1, "val": 0, "test": 0},
                {"train": 0.7, "val": 0.3},
                {"train": 0.6},
                {"train": 0.5, "my part": 0.25, "class": 0.25},
            ]
        ),
        st.sampled_from([{}, {"seed": 42}, {"by": "geometry"}, {"buffer_m": 320.5, "boundary": "centre"}]),
    ),
    st.builds(
        lambda values, more: lambda c: c.split(by="fold", **values, **more),
        st.sampled_from([{}, {"test": [0], "val": [1, 2]}, {"train": ["a"], "my part": [2.5, True]}]),
        st.sampled_from([{}, {"buffer_m": 320.5}]),
    ),
    st.builds(
        lambda k, more: lambda c: c.folds(k, **more), st.integers(2, 20), st.sampled_from([{}, {"seed": 3}])
    ),
    st.just(lambda c: c.fold(1)),
    st.builds(
        lambda n, more: lambda c: c.random(n, **more),
        st.integers(1, 9),
        st.sampled_from([{}, {"seed": 3, "size": 8}, {"balance": "crop"}, {"balance": ["a", "b"]}]),
    ),
    st.just(lambda c: c.select("train", "val")),
    st.just(lambda c: c.filter(split="train")),
    st.just(lambda c: c.filter_pixels(min_valid=0.5, source="s2")),
    st.just(lambda c: c.sample(5, by="split")),
)


def meaning(node: p.Node) -> Any:
    """Return a plan with the predicates of neighbouring filters as one set: two calls keep what one does."""
    if isinstance(node, p.Filter | p.FilterChips):
        below = meaning(node.child)
        where = {*node.where}
        if isinstance(below, tuple) and below[0] == type(node).__name__:
            where, below = where | below[1], below[2]
        return (type(node).__name__, where, below)
    own = [getattr(node, f) for f in node.__dataclass_fields__ if f not in ("child", "children")]
    return (type(node).__name__, own, [meaning(child) for child in p.children(node)])


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=3), st.lists(STEPS, max_size=2), st.sampled_from(["one", "merge", "join"]),
       CHIPPED, st.lists(AFTER, max_size=3), st.booleans())  # fmt: skip
def test_what_is_printed_makes_the_same_plan_when_it_is_typed(
    steps: list[Any], others: list[Any], how: str, chipped: Any, after: list[Any], chips: bool
) -> None:
    made, other = S2, L8
    for step in steps:
        made = step(made)
    for step in others:
        other = step(other)
    whole: Any = {
        "one": lambda: made,
        "merge": lambda: made | other,
        "join": lambda: rd.join(a=made, b=other),
    }[how]()
    for step in [chipped, *after] if chips else []:
        whole = step(whole)
    typed = ".".join(calls(whole.plan))
    assert meaning(eval(typed, dict(NAMES)).plan) == meaning(whole.plan), typed


@settings(max_examples=200, deadline=None)
@given(PLANS)
def test_any_plan_prints_in_one_line(plan: p.Node) -> None:
    text = chain(plan, lambda token: 7)
    assert text.isprintable()
    assert text
    for leaf in p.leaves(plan):
        assert leaf.name in text


def test_areas_print_as_degrees_and_long_lists_as_what_they_hold() -> None:
    circle = shapely.Point(15.0, 50.0).buffer(0.5)
    chips = S2.subset(geometries=circle).filter(id=[f"r{i}" for i in range(2000)]).chips(16, aoi=circle)
    assert chain(chips.plan) == (
        "s2 > subset(geometries=<Polygon in 14.5, 49.5, 15.5, 50.5>) > filter(id=[2,000 values: r0 ... r1999])"
        " > chips(16, aoi=<Polygon in 14.5, 49.5, 15.5, 50.5>)"
    )
    assert "[64 bands: A00 ... A63]" in chain(S2.harmonize([f"A{i:02d}" for i in range(64)]).plan)
    assert "at=<a table of 3 rows>" in chain(
        S2.chips(16, at=[(15, 50), (15, 51), (15, 52)]).plan, lambda token: 3
    )


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (("eo:cloud_cover", "<", 30), "eo:cloud_cover < 30"),
        (("datetime", "overlaps", ("2024-04-01T00:00:00+00:00", "2024-05-01T00:00:00+00:00")),
         "from 2024-04-01 to 2024-04-30"),
        (("datetime", "overlaps", (None, None)), "from the beginning to the end"),
        (("bbox", "near", (1.0, 2.0, 3.5, 4.0)), "near (1, 2, 3.5, 4)"),
        (("id", "in", ("a", "b")), 'id in ["a", "b"]'),
    ],
)  # fmt: skip
def test_predicates_in_words(predicate: p.Predicate, words: str) -> None:
    assert condition(predicate) == words


def test_values_as_they_are_typed() -> None:
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9), "bands") == "9 bands: 0 ... 8"
    for value in ("a", 'a"b', "a\nb", "\\", [1, "x"], {"a": [2.5, None]}, True):
        assert eval(quoted(value)) == value
