"""Values: units, masks, integers and composites, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rasteret_dask.catalogs.bands import Radiometry
from rasteret_dask.reader import harmonize

SCL_CLASS_IS_CLOUD = {3: True, 8: True, 9: True, 10: True} | dict.fromkeys((0, 1, 2, 4, 5, 6, 7, 11), False)


def test_scl_classes_that_are_clouds_or_their_shadows() -> None:
    found = harmonize.bad_pixels(np.arange(12, dtype=np.uint8), "scl", ("clouds",))
    assert dict(enumerate(found.tolist())) == SCL_CLASS_IS_CLOUD


def test_masks_add_up() -> None:
    scl = np.arange(12, dtype=np.uint8)
    both = harmonize.bad_pixels(scl, "scl", ("snow", "water"))
    assert np.flatnonzero(both).tolist() == [6, 11]
    qa = np.array([0, 1 << 5, 1 << 7, 1 << 6], dtype=np.uint16)
    assert harmonize.bad_pixels(qa, "qa_pixel", ("snow", "water")).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("bit", "bad"), [(0, False), (1, True), (2, False), (3, True), (4, True), (5, False), (6, False)]
)
def test_qa_pixel_bits_that_are_clouds_or_their_shadows(bit: int, bad: bool) -> None:
    assert bool(harmonize.bad_pixels(np.array([1 << bit], np.uint16), "qa_pixel", ("clouds",))[0]) is bad


def test_no_mask_hides_nothing() -> None:
    every = np.arange(256, dtype=np.uint8)
    assert not harmonize.bad_pixels(every, "scl", ()).any()
    assert not harmonize.bad_pixels(every, "qa_pixel", ()).any()


@given(
    hnp.arrays(np.uint16, (3, 4)), st.sampled_from([(1e-4, -0.1), (1e-4, 0.0), (2.75e-5, -0.2), (1.0, 0.0)])
)
def test_reflectance_is_computed_in_double_precision(dn: np.ndarray, rule: tuple[float, float]) -> None:
    scale, offset = rule
    found = harmonize.to_float(dn, dn != 0, Radiometry(scale, offset, "x"))
    for value, stored in zip(found.ravel(), dn.ravel(), strict=True):
        if stored == 0:
            assert np.isnan(value)
        else:
            assert value == np.float32(float(stored) * scale + offset)


def test_embeddings_are_dequantized_as_published() -> None:
    raw = np.array([-127, -1, 0, 1, 127, -128], dtype=np.int8)
    found = harmonize.dequantize(raw, raw != -128)
    wanted = [-((127 / 127.5) ** 2), -((1 / 127.5) ** 2), 0, (1 / 127.5) ** 2, (127 / 127.5) ** 2]
    np.testing.assert_array_equal(found[:5], np.array(wanted, np.float32))
    assert np.isnan(found[5])


@given(hnp.arrays(np.float32, (5, 3, 2), elements=st.floats(-1, 1, width=32)))
def test_unit_length_whatever_the_axis(vectors: np.ndarray) -> None:
    first = harmonize.unit_length(vectors, axis=0)
    last = harmonize.unit_length(np.ascontiguousarray(np.moveaxis(vectors, 0, -1)), axis=-1)
    np.testing.assert_array_equal(first, np.moveaxis(last, -1, 0))  # to the last bit
    length = np.sqrt((first.astype(np.float64) ** 2).sum(axis=0))
    known = np.isfinite(length)
    np.testing.assert_allclose(length[known], 1, rtol=1e-6)
    np.testing.assert_array_equal(known, (vectors.astype(np.float64) ** 2).sum(axis=0) > 0)


def test_one_missing_element_makes_the_vector_missing() -> None:
    vectors = np.array([[[3.0]], [[np.nan]]], dtype=np.float32)
    assert np.isnan(harmonize.unit_length(vectors, axis=0)).all()


@pytest.mark.parametrize(
    ("dtype", "low", "high", "fill"), [("uint16", 0, 65534, 65535), ("int16", -32767, 32767, -32768)]
)
def test_integers_clip_count_and_fill(dtype: str, low: int, high: int, fill: int) -> None:
    values = np.array([0.1234, -0.05, -4.0, 7.0, np.nan, 0.0], dtype=np.float32).reshape(1, 1, 6)
    stored, clipped = harmonize.to_dtype(np.repeat(values, 2, axis=0), dtype, fill)
    assert stored.dtype == np.dtype(dtype)
    wanted = [1234, max(-500, low), max(-40000, low), min(70000, high), fill, 0]
    assert stored[0, 0].tolist() == stored[1, 0].tolist() == wanted
    assert clipped.tolist() == [sum(w in (low, high) for w in wanted[1:4])] * 2


def test_float32_stays_as_it_is() -> None:
    values = np.array([[[0.1, np.nan]]], dtype=np.float32)
    stored, clipped = harmonize.to_dtype(values, "float32", np.nan)
    assert stored is values
    assert clipped.tolist() == [0]


stacks = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
    elements=st.one_of(st.just(np.float32(np.nan)), st.floats(0, 1, width=32)),
)


@given(stacks)
def test_composites_are_numpys(stack: np.ndarray) -> None:
    empty = np.isnan(stack).all(axis=0)
    some = np.where(empty, np.float32(0), stack)
    median = np.where(empty, np.nan, np.nanmedian(some.astype(np.float64), axis=0)).astype(np.float32)
    np.testing.assert_array_equal(harmonize.composite(stack, "median"), median)
    mean = np.where(empty, np.nan, np.nanmean(some, axis=0, dtype=np.float64))
    np.testing.assert_allclose(harmonize.composite(stack, "mean"), mean, rtol=2e-7)


@given(stacks)
def test_composites_do_not_depend_on_the_layout_in_memory(stack: np.ndarray) -> None:
    other = np.moveaxis(np.ascontiguousarray(np.moveaxis(stack, 0, -1)), -1, 0)
    for how in ("mean", "median"):
        np.testing.assert_array_equal(harmonize.composite(stack, how), harmonize.composite(other, how))


@given(stacks)
def test_a_mean_summed_up_is_the_mean_of_all(stack: np.ndarray) -> None:
    total, count = np.zeros(stack.shape[1:]), np.zeros(stack.shape[1:], dtype=np.int32)
    for layer in stack:
        harmonize.add(layer, total, count)
    np.testing.assert_array_equal(
        harmonize.divided(total, count, stack.dtype), harmonize.composite(stack, "mean")
    )


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("uint8", "float32"), ("uint16", "float32"), ("int32", "float64"), ("float64", "float64")],
)
def test_composites_hold_every_stored_number(dtype: str, wanted: str) -> None:
    assert harmonize.composite_dtype(dtype) == np.dtype(wanted)
