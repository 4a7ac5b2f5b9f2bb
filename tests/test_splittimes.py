# SPDX-License-Identifier: Apache-2.0
"""Splits by time, and regions by name: laws over drawn spans and boxes, told again by plain loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

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
        named = {"val": lambda t: b <= t < c, "test": lambda t: t >= d, "train": lambda t: t < a}
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
