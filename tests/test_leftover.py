"""The ground that no chip covers, counted pixel by pixel; and what is said to do better does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from made_records import collection, record
from odc.geo.geobox import GeoBox

from rasteret_dask.chipping.leftover import leftover, whole_cell_km
from rasteret_dask.planning.plan import ChipSpec
from rasteret_dask.zones import BoxGrid

CELLS: dict[str, Any] = {"cell_km": 1.28}


def open_share(side: tuple[int, int], size: int, stride: int) -> float:
    """Lay windows that end within a rectangle and count the pixels that none holds."""
    seen = np.zeros(side, dtype=bool)
    for row in range(0, side[0] - size + 1, stride):
        for col in range(0, side[1] - size + 1, stride):
            seen[row : row + size, col : col + size] = True
    return float(1 - seen.mean())


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 90), st.integers(0, 90))
def test_what_is_left_of_a_geobox_is_counted(size: int, stride: int, wide: int, high: int) -> None:
    width, height = size + wide, size + high
    spec = ChipSpec(size, stride, grid=BoxGrid("EPSG:32633", 5e5, 5.4e6, 10.0, width, height))
    left = leftover(spec, 10.0)
    share = open_share((height, width), size, stride)
    assert (left is None) == (share == 0)
    if left is not None:
        assert left.share == pytest.approx(share)
        assert f"{share:.1%}" in left.text
        if stride <= size:
            better = [int(n) for n in left.text.split("one of ")[1].split(" is")[0].split(" x ")]
            assert open_share((better[1], better[0]), size, stride) == 0
            assert 0 <= better[0] - width < stride
            assert 0 <= better[1] - height < stride


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 150))
def test_the_strips_of_a_split_cell_are_counted(size: int, stride: int, more: int) -> None:
    side = size + more
    left = leftover(ChipSpec(size, stride, cell_km=side / 100), 10.0)
    share = open_share((side, side), size, stride)
    assert (left is None) == (share == 0)
    if left is not None:
        assert left.share == pytest.approx(share)
        assert (left.cell_km is None) == (stride > size)
        if left.cell_km is not None:
            assert leftover(ChipSpec(size, stride, cell_km=left.cell_km), 10.0) is None
            assert abs(left.cell_km - side / 100) <= stride / 100


@given(st.floats(10, 5000), st.floats(10, 5000), st.floats(0, 20_000))
def test_a_whole_cell_has_room_and_no_strip(length: float, stride: float, least: float) -> None:
    side = whole_cell_km(length, stride, least)
    assert side is not None
    steps = (side * 1000 - length) / stride
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert side * 1000 >= least - 1e-3
    assert side * 1000 - stride < max(least, length) + 1e-3
    assert whole_cell_km(length, stride, 200_000.0) is None


def test_explain_and_audit_tell_it() -> None:
    own = collection("s2", record("a", px=(300, 260)))
    box = GeoBox((250, 300), Affine(10, 0, 500_000, 0, -10, 5_400_000), "EPSG:32633")
    chips = own.chips(64, grid=box, min_coverage=0.001).split(seed=1)
    covered = len(chips) * 64 * 64 / (250 * 300)
    for report in (str(chips.explain()), str(chips.audit())):
        assert f"{1 - covered:.1%} of the GeoBox" in report
        assert "320 x 256" in report
    assert chips.explain()["uncovered"]["share"] == pytest.approx(1 - covered)
    strips = own.chips(48, **CELLS)
    assert strips.explain()["uncovered"]["cell_km"] == 1.44
    assert "cell_km=1.44 has none" in str(strips.explain())
    assert own.chips(48, cell_km=1.44).explain()["uncovered"] == {}
    assert "of each split cell" not in str(own.chips(32, **CELLS).explain())
    assert own.chips(32, at=[(15.01, 48.74)]).explain()["uncovered"] == {}
