"""Chips are what a dull interpreter over rasterio makes of the records, for every pick, mask, unit and type."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from passing import BANDS, CELLS, SIDE, Asked, Passing, Scene, assert_interpreted, make

from rasteret_dask.rules.picks import PICKS, Composed, Scored

Array = np.ndarray[Any, Any]

DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "float32")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Passing]:
    folder = tmp_path_factory.mktemp("passing")
    return {dtype: make(folder, seed, dtype=dtype) for seed, dtype in enumerate(DTYPES)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Passing]:
    """Worlds of one scale, so that raw numbers can be mixed."""
    folder = tmp_path_factory.mktemp("plain")
    return {dtype: make(folder, 10 + n, dtype=dtype, one_scale=True) for n, dtype in enumerate(DTYPES)}


def cloud_of(own: Any) -> float:
    figures = [s.cloud for s in own if s.cloud is not None]
    return float(np.mean(figures)) if figures else np.inf


ORDERS: dict[str, Any] = {
    "closest": lambda own, distance: distance,
    "first": lambda own, distance: own[0].start,
    "last": lambda own, distance: -own[0].start.value,
    "newest": lambda own, distance: -own[0].start.value,
    "least_cloudy": lambda own, distance: cloud_of(own),
}


def commonest(values: list[float], ranks: list[int]) -> float:
    return min(Counter(values).items(), key=lambda one: (-one[1], one[0]))[0]


def middle(values: list[float], ranks: list[int]) -> float:
    return float(np.float32(statistics.median(values)))


def average(values: list[float], ranks: list[int]) -> float:
    return float(np.float32(sum(values) / len(values)))


BLENDS: dict[str, Any] = {"mean": average, "median": middle, "majority": commonest}
CLOUDS = (3, 8, 9, 10)


def unchanged(band: str, values: Array) -> tuple[Array, Array]:
    return values, np.zeros(values.shape, bool)


def whole(band: str, values: Array) -> tuple[Array, Array]:
    return np.rint(values), np.zeros(values.shape, bool)


def as_steps(low: int, high: int) -> Any:
    def encode(band: str, values: Array) -> tuple[Array, Array]:
        number = np.rint(np.nan_to_num(values.astype(np.float32).astype(np.float64)) * 1e4)
        return np.clip(number, low, high), ~np.isnan(values) & ((number < low) | (number > high))

    return encode


def scaled(band: str, stored: Array, scene: Scene) -> Array:
    if band == "cls":
        return stored
    scale, offset = scene.scaling
    return (stored.astype(np.float64) * scale + offset).astype(np.float32)


def decibels(values: Array) -> Array:
    power = np.where(values > 0, values, np.nan).astype(np.float32).astype(np.float64)
    return (10 * np.log10(power)).astype(np.float32)


STEPS = {"uint16": as_steps(0, 65534), "int16": as_steps(-32767, 32767)}


CASES = st.fixed_dictionaries(
    {
        "pick": st.sampled_from(sorted(PICKS)),
        "dtype": st.sampled_from(DTYPES),
        "masked": st.booleans(),
        "units": st.sampled_from(["physical", "raw", "reflectance", "decibel"]),
        "min_coverage": st.sampled_from([0.0, 0.4, 1.0]),
        "fill": st.sampled_from([None, True, False]),
        "bands": st.sampled_from([BANDS, ("cls",), ("b", "cls"), ("a",)]),
        "output": st.sampled_from([None, "uint16", "int16"]),
    }
)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CASES)
def test_chips_are_those_of_the_interpreter(
    worlds: Mapping[str, Passing], plain: Mapping[str, Passing], case: dict[str, Any]
) -> None:
    """All picks, filled or not, masked or not, in all units, of all types of numbers, into all types of output."""
    word, dtype, units = case["pick"], case["dtype"], case["units"]
    masked, min_coverage, output = case["masked"], case["min_coverage"], case["output"]
    pick, bands = PICKS[word], case["bands"]
    how: dict[str, Any] = {"pick": word, "time": "1MS", "units": units}
    if not isinstance(pick, Composed):
        how["fill"] = case["fill"]
    filled = pick.fills if how.get("fill") is None else bool(how["fill"])
    if units in ("reflectance", "decibel"):
        bands = ("a", "b")
    if units in ("physical", "raw", "decibel"):
        output = None
    world = (plain if units == "raw" else worlds)[dtype]
    fill: Any = np.nan
    encode: Any = unchanged
    stored = np.result_type(*(dtype if band != "cls" else "uint8" for band in bands))
    if units == "raw" or bands == ("cls",):
        fill, encode = (0, whole) if stored.kind in "iu" else (np.nan, encode)
    if output is not None:
        how["dtype"], fill, encode = output, {"uint16": 65535, "int16": -32768}[output], STEPS[output]
    own = BLENDS.get(word)
    asked = Asked(
        bands,
        order=ORDERS.get(word),
        score=(lambda clear: clear.sum()) if isinstance(pick, Scored) else None,
        blends={} if own is None else {b: commonest if b == "cls" else own for b in bands},
        fill=filled,
        hidden=(lambda read: np.isin(read["scl"], CLOUDS)) if masked else None,
        decode=(lambda band, stored, scene: stored) if units == "raw" else scaled,
        encode=encode,
        finish=decibels if units == "decibel" else (lambda values: values),
        min_coverage=min_coverage,
    )
    source = world.source.harmonize(bands, mask="clouds" if masked else None, **how)
    chips = source.chips(SIDE, min_coverage=min_coverage, **CELLS)
    assert assert_interpreted(world.scenes, chips, asked, fill) > 10 * SIDE * SIDE
