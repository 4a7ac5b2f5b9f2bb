"""What is known of one source's pixels: NumPy's numbers, however the pixels are divided."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rasteret_dask.statistics.sketch import SourceStats
from rasteret_dask.statistics.stats import Stats, measure, merged
from rasteret_dask.tasks.batches import Arrays, SourcePixels

FLOATS = ("float16", "float32", "float64")
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
PERCENT = (0, 0.1, 1, 2, 25, 50, 75, 98, 99.9, 100)
OFF = 2.0**-8


def of(*bands: str) -> dict[str, SourcePixels]:
    """Return what source ``a`` is; its dtype is that of the pixels."""
    return {"a": SourcePixels(bands, "")}


def chips_of(pixels: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> Arrays:
    """Return pixels (chip, time, band, y, x) as a batch of source ``a``."""
    shape = (*pixels.shape[:2], *pixels.shape[3:])
    ids = np.arange(len(pixels)).astype(str).astype(object)
    return {"a": pixels, "a/valid": np.ones(shape, bool) if valid is None else valid, "chip_id": ids}


def agree(own: SourceStats, band: int, values: NDArray[Any], total: int) -> None:
    """Compare one band with NumPy."""
    few = values.dtype.kind in "iub" and len(np.unique(values)) <= 65_536 and int(values.max()) < 2**63
    assert own.by_value[band] == few
    if few and len(np.unique(values)) <= 256:
        numbers, pixels = np.unique(values, return_counts=True)
        assert own.classes[own.bands[band]] == dict(zip(numbers.tolist(), pixels.tolist(), strict=True))
    else:
        assert own.bands[band] not in own.classes
    assert own.count[band] == values.size
    assert own.valid_fraction[band] == pytest.approx(values.size / total)
    assert (own.min[band], own.max[band]) == (values.min(), values.max())
    if own.coded[band]:  # codes have counts only
        assert np.isnan([own.mean[band], own.std[band], own.percentile(50)[band]]).all()
        return
    assert own.mean[band] == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)
    assert own.std[band] == pytest.approx(values.std(dtype=np.float64), rel=1e-9)
    for q in PERCENT:
        wanted = float(np.percentile(values, q, method="inverted_cdf"))
        assert own.percentile(q)[band] == pytest.approx(wanted, rel=1e-15 if few else OFF, abs=1e-12)


def same(one: Stats, other: Stats) -> None:
    assert one.chips == other.chips
    for name, own in one.sources.items():
        theirs = other[name]
        for field in ("bands", "dtype", "units", "total", "by_value"):
            assert getattr(own, field) == getattr(theirs, field)
        for field in ("count", "min", "max"):
            np.testing.assert_array_equal(getattr(own, field), getattr(theirs, field))
        for field in ("mean", "std"):
            np.testing.assert_allclose(getattr(own, field), getattr(theirs, field), rtol=1e-12)
        for (numbers, counts), (others, theirs_) in zip(own.buckets, theirs.buckets, strict=True):
            np.testing.assert_array_equal(numbers, others)
            np.testing.assert_array_equal(counts, theirs_)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*FLOATS, *INTEGERS]),
    st.sampled_from([3, 300, None]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_parts_add_up_to_the_whole(dtype: str, distinct: int | None, seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        pixels = (rng.normal(size=(12, 2, 3, 4, 5)) * 10.0 ** rng.integers(-6, 4)).astype(dtype)
        pixels[rng.random(pixels.shape) < 0.1] = np.nan
        pixels[rng.random(pixels.shape) < 0.05] = rng.choice([np.inf, -np.inf])
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        pixels = rng.integers(low, high, (12, 2, 3, 4, 5), dtype=dtype, endpoint=True)
        if distinct is not None:
            pixels = rng.choice(pixels.ravel()[:distinct], pixels.shape)
    valid = rng.random((12, 2, 4, 5)) < 0.7
    arrays = {"a": pixels, "a/valid": valid, "chip_id": np.arange(12).astype(str).astype(object)}
    bands = of("x", "y", "z")
    whole = measure(arrays, bands)
    edges = [0, *sorted(cuts), 12]
    parts = [measure({k: v[a:b] for k, v in arrays.items()}, bands) for a, b in itertools.pairwise(edges)]
    same(whole, merged(parts))
    same(whole, merged(parts[::-1]))
    good = valid & np.isfinite(pixels).all(axis=2)
    for band in range(3):
        agree(whole["a"], band, pixels[:, :, band][good], good.size)


def test_bands_without_a_valid_pixel_say_so() -> None:
    arrays = {
        "a": np.full((2, 1, 1, 3, 3), np.nan, np.float32),
        "a/valid": np.zeros((2, 1, 3, 3), bool),
        "chip_id": np.array(["p", "q"], dtype=object),
    }
    own = measure(arrays, of("x"))["a"]
    assert own.count.tolist() == [0]
    assert own.valid_fraction.tolist() == [0]
    assert np.isnan([own.mean, own.std, own.min, own.max, own.percentile(50)]).all()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "bool", "uint8"])
def test_classes_of_any_integer_are_counted(dtype: str) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 2 if dtype == "bool" else 5, (6, 1, 1, 8, 8)).astype(dtype)
    own = measure(chips_of(pixels), of("x"))["a"]
    agree(own, 0, pixels.ravel(), pixels.size)
    assert own.exact
    assert own.percentile(50).tolist() == [np.percentile(pixels.astype(int), 50, method="inverted_cdf")]


@pytest.mark.parametrize(("distinct", "counted"), [(65_536, True), (65_537, False)])
def test_distinct_values_are_counted_up_to_a_number(distinct: int, counted: bool) -> None:
    values = 1_000_003 * np.arange(distinct, dtype=np.int64) - 10**10
    rest = -distinct % 64
    pixels = np.concatenate([values, values[:rest]]).reshape(8, 1, 1, 8, -1)
    arrays = chips_of(np.random.default_rng(2).permuted(pixels))
    parts = [measure({k: v[n : n + 1] for k, v in arrays.items()}, of("x")) for n in range(8)]
    assert all(part["a"].exact for part in parts)
    whole = measure(arrays, of("x"))
    assert whole["a"].exact == counted
    agree(whole["a"], 0, pixels.ravel(), pixels.size)
    same(whole, merged(parts))
    same(whole, merged(parts[::-1]))
    same(whole, merged([merged(parts[:3]), merged(parts[3:])]))
    same(whole, Stats.from_json(whole.to_json()))


@pytest.mark.parametrize("dtype", [*FLOATS, "int64"])
def test_the_median_of_zeros_is_zero(dtype: str) -> None:
    pixels = np.zeros((1, 1, 1, 8, 9), dtype=dtype)
    pixels[..., 0, 0] = 1000
    pixels[..., 0, 1] = -1000
    own = measure(chips_of(pixels), of("x"))["a"]
    assert [own.percentile(q).item() for q in (0, 2, 50, 98, 100)] == [-1000, 0, 0, 0, 1000]


def test_numbers_beyond_float32_stay_numbers() -> None:
    pixels = np.array([-1e150, -1.0, 0.0, 1e-42, 2.0, 1e150]).reshape(1, 1, 1, 2, 3)
    own = measure(chips_of(pixels), of("x"))["a"]
    found = [own.percentile(q).item() for q in (0, 20, 40, 60, 80, 100)]
    assert np.isfinite(found).all()
    assert found == sorted(found)
    assert found[2] == found[3] == 0


# Normalizing


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*FLOATS, *INTEGERS]),
    st.sampled_from([0, 5.5e6, 1.7e9, 1e12]),
    st.integers(0, 2**32 - 1),
)
def test_normalized_pixels_are_numpy_s_in_float64(dtype: str, base: float, seed: int) -> None:
    most = float(np.finfo(dtype).max) / 4 if dtype in FLOATS else np.iinfo(dtype).max / 2
    pixels = (min(base, most) + np.random.default_rng(seed).normal(0, 20, (4, 2, 2, 8, 8))).astype(dtype)
    wide = pixels.astype(np.float64)
    mean = wide.mean(axis=(0, 1, 3, 4), keepdims=True)
    spread = wide.std(axis=(0, 1, 3, 4), keepdims=True)
    wanted = np.divide(wide - mean, spread, out=np.zeros_like(wide), where=spread > 0)
    arrays = chips_of(pixels)
    stats = measure(arrays, of("x", "y"))
    found = stats.normalize(arrays)["a"]
    assert found.dtype == np.float32
    # The mean is rounded, in float32 by as much as such pixels themselves.
    narrow = np.result_type(dtype, np.float32) == np.float32
    step = (
        np.spacing(np.abs(mean).astype(np.float32)).astype(float) if narrow else 2 * np.spacing(np.abs(mean))
    )
    allowed = 2 * step / np.where(spread > 0, spread, 1)
    assert (np.abs(found - wanted) <= 1e-5 + 1e-6 * np.abs(wanted) + allowed).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1234567.1, 5e-324, 1.7e18, -7.77])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_what_never_varies_becomes_0(dtype: str, value: float) -> None:
    arrays = [chips_of(np.full((n, 1, 1, 37 + n, 41), value).astype(dtype)) for n in (1, 2, 5)]
    stats = merged(measure(a, of("x")) for a in arrays)
    for own in arrays:
        assert not stats.normalize(own)["a"].any()


def test_what_varies_by_rounding_becomes_0() -> None:
    pixels = np.full((2, 1, 1, 8, 8), 1e9)
    pixels[0] = np.nextafter(pixels[0], 2e9)
    stats = measure(chips_of(pixels), of("x"))
    assert not stats.normalize(chips_of(pixels))["a"].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("constant", [False, True])
def test_pixels_are_valid_in_one_sense(bad: float, constant: bool) -> None:
    rng = np.random.default_rng(3)
    pixels = np.ones((3, 2, 2, 8, 8), np.float32) if constant else rng.normal(size=(3, 2, 2, 8, 8))
    pixels = pixels.astype(np.float32)
    pixels[rng.random(pixels.shape) < 0.1] = bad
    said = rng.random((3, 2, 8, 8)) < 0.8
    good = said & np.isfinite(pixels).all(axis=2)
    arrays = chips_of(pixels, ~np.isnan(pixels).any(axis=2) & said)
    stats = measure(arrays, of("x", "y"))
    assert stats["a"].count.tolist() == [good.sum()] * 2
    for fill in (np.nan, 0.0):
        made = stats.normalize(arrays, nan=fill)
        np.testing.assert_array_equal(made["a/valid"], good)
        np.testing.assert_array_equal(made["a"][~good.repeat(2, 1).reshape(3, 2, 2, 8, 8)], fill)
        assert np.isfinite(made["a"].transpose(0, 1, 3, 4, 2)[good]).all()
    assert arrays["a/valid"].sum() >= good.sum()
    assert np.isinf(pixels).any() == np.isinf(bad)


def test_histograms_of_parts_in_one_range_add_up() -> None:
    """Splits are drawn on one axis."""
    numbers = np.random.default_rng(3).normal(100, 60, 800).astype("int16").reshape(2, 1, 1, 20, 20)
    ends = np.array([[-20.0, 180.0]])
    whole, *parts = (measure(chips_of(some), of("red"))["a"] for some in (numbers, numbers[:1], numbers[1:]))
    found = whole.histogram(10, ends)
    np.testing.assert_array_equal(found, sum(part.histogram(10, ends) for part in parts))
    np.testing.assert_array_equal(found[0], np.histogram(numbers, 10, (-20.0, 180.0))[0])
    assert not whole.histogram(10, np.array([[np.nan, np.nan]])).any()
