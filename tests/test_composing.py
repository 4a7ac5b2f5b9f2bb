"""The steps from records to a slot, against loops over single pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rasteret_dask.rules import composing
from rasteret_dask.rules.masks import Bits, Classes
from rasteret_dask.rules.picks import FEW, Clearest, Closest, Mean, Median, Pick
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.units import Decibel, Embedding, Raw, Reflectance, Unit

Array = NDArray[Any]
SHAPE = (2, 3)
SCALED = Radiometry(1e-4, -0.1, "")
PLAIN = Radiometry(1.0, 0.0, "")


def rules_of(*units: Unit, pick: Pick | None = None, kinds: tuple[str | None, ...] = ()) -> PixelRules:
    return PixelRules(
        units, kinds or (None,) * len(units), pick or Closest(fill=True), StoredForm("float32", None)
    )


@st.composite
def records(draw: st.DrawFn, bands: int) -> list[tuple[Array, Array]]:
    """Return stored numbers and validity of some records, shapes (band, y, x)."""
    shape = (bands, *SHAPE)
    numbers = hnp.arrays(np.int16, shape, elements=st.integers(-3, 3))
    return draw(st.lists(st.tuples(numbers, hnp.arrays(bool, shape)), min_size=1, max_size=4))


def layers(
    rules: PixelRules, some: list[tuple[Array, Array]], scaling: Radiometry = PLAIN
) -> list[composing.DecodedLayer]:
    return [
        composing.decoded(
            rules,
            [composing.StoredBand(v, k, scaling) for v, k in zip(values, valid, strict=True)],
            SHAPE,
        )
        for values, valid in some
    ]


@given(records(2))
def test_each_band_is_filled_by_the_next_record_that_has_it(some: list[tuple[Array, Array]]) -> None:
    rules = rules_of(Reflectance(), Raw())
    found = composing.picked(rules, layers(rules, some, SCALED))
    assert found is not None
    for band, y, x in np.ndindex(2, *SHAPE):
        there = [values[band, y, x] for values, valid in some if valid[band, y, x]]
        assert found.valid[band, y, x] == bool(there)
        if there:
            stored = float(there[0])
            assert found.values[band, y, x] == np.float32(stored * 1e-4 - 0.1 if band == 0 else stored)


@given(records(3))
def test_a_vector_is_taken_whole(some: list[tuple[Array, Array]]) -> None:
    """From the first record that has all of its elements, and a length."""
    rules = rules_of(Embedding(), Raw(), Embedding())
    found = composing.picked(rules, layers(rules, some))
    assert found is not None
    for y, x in np.ndindex(*SHAPE):
        whole = [v[[0, 2], y, x] for v, k in some if k[0, y, x] and k[2, y, x] and v[[0, 2], y, x].any()]
        assert found.valid[[0, 2], y, x].tolist() == [bool(whole)] * 2
        if whole:
            vector = np.sign(whole[0]) * (whole[0] / 127.5) ** 2
            wanted = vector / np.sqrt((vector**2).sum())
            np.testing.assert_allclose(found.values[[0, 2], y, x], wanted, rtol=1e-6)
        assert found.valid[1, y, x] == any(k[1, y, x] for _, k in some)


@given(records(1))
def test_a_number_without_a_value_in_its_unit_is_filled(some: list[tuple[Array, Array]]) -> None:
    """Where pixels stand as they are; a mean of powers takes what is not positive too."""
    rules = rules_of(Decibel())
    found = composing.picked(rules, layers(rules, some))
    assert found is not None
    for y, x in np.ndindex(*SHAPE):
        powers = [float(v[0, y, x]) for v, k in some if k[0, y, x] and v[0, y, x] > 0]
        assert found.valid[0, y, x] == bool(powers)
        if powers:
            assert found.values[0, y, x] == np.float32(10 * np.log10(powers[0]))


@pytest.mark.parametrize("how", ["mean", "median"])
@given(some=records(2))
def test_composites_take_each_acquisition_once(
    how: Literal["mean", "median"], some: list[tuple[Array, Array]]
) -> None:
    """Its records fill each other first. Bits are those of the nearest acquisition."""
    rules = rules_of(
        Decibel(), Raw(), pick=Mean() if how == "mean" else Median(), kinds=("backscatter", "bitfield")
    )
    pairs = [some[i : i + 2] for i in range(0, len(some), 2)]
    found = composing.composed(rules, [(rank, layers(rules, pair)) for rank, pair in enumerate(pairs)])
    assert found is not None
    for y, x in np.ndindex(*SHAPE):
        mosaics = [
            [next((float(v[band, y, x]) for v, k in pair if k[band, y, x]), None) for band in range(2)]
            for pair in pairs
        ]
        powers, bits = ([value for m in mosaics if (value := m[band]) is not None] for band in range(2))
        made = (np.mean if how == "mean" else np.median)(powers) if powers else 0.0
        assert found.valid[0, y, x] == (np.float32(made) > 0)
        if found.valid[0, y, x]:
            np.testing.assert_allclose(found.values[0, y, x], 10 * np.log10(made), rtol=1e-5, atol=1e-6)
        assert found.valid[1, y, x] == bool(bits)
        if bits:
            assert found.values[1, y, x] == bits[0]


@given(st.data(), st.integers(1, FEW + 3), st.sampled_from(["float32", "float64"]))
def test_a_median_is_the_middle_of_valid_numbers(data: st.DataObject, candidates: int, dtype: str) -> None:
    """Bit for bit, infinite ones too: the mean, as doubles, of the two that Python finds in the middle."""
    some = [0.0, 1.5, -2.25, 0.1, 1e-30, 3e38, np.inf, -np.inf]
    numbers = st.sampled_from(some) | st.floats(-1e6, 1e6, width=32)
    shape = (candidates, 2, 2, 3)
    stack = data.draw(hnp.arrays(dtype, shape, elements=numbers.map(lambda v: v + 0.0)), "stack")
    valid = data.draw(hnp.arrays(bool, shape), "valid")
    with np.errstate(invalid="ignore"):
        middle, known = Median().blend(stack, valid)
    np.testing.assert_array_equal(known, valid.any(axis=0))
    for band, y, x in np.argwhere(known).tolist():
        own = sorted(stack[valid[:, band, y, x], band, y, x].tolist())
        wanted = np.array((own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2, dtype=dtype)
        np.testing.assert_array_equal(middle[band, y, x], wanted)


def test_invalid_quality_hides_nothing_and_is_not_clear() -> None:
    codes, valid = np.array([[3, 3, 4]], np.uint8), np.array([[True, False, True]])
    mask = Classes("scl", (3,))
    assert composing.hidden(mask, [codes], [valid]).tolist() == [[True, False, False]]
    assert composing.clear(mask, [codes], [valid]).tolist() == [[False, False, True]]
    assert composing.clear(None, [codes], [valid]).tolist() == [[True, False, True]]
    bits = Bits("qa", (1,))
    assert composing.hidden(bits, [np.array([[2, 2, 4]], np.uint16)], [valid]).tolist() == [
        [True, False, False]
    ]


def test_the_earlier_of_equal_scores_comes_first() -> None:
    shown = [np.array([[True, False]]), np.array([[True, True]]), np.array([[True, True]])]
    assert composing.by_score(Clearest(), shown) == (1, 2, 0)


@given(records(2), st.integers(1, 3))
def test_what_other_acquisitions_gave_is_told(some: list[tuple[Array, Array]], first: int) -> None:
    """Band by band: valid in the end, and not valid in any record of the best acquisition."""
    rules = rules_of(Reflectance(), Raw())
    own = layers(rules, some, SCALED)
    found = composing.picked(rules, own[:first], own[first:])
    assert found is not None
    best = np.logical_or.reduce([valid for _, valid in some[:first]])
    wanted = np.logical_or.reduce([valid for _, valid in some]) & ~best
    given_by = np.zeros(wanted.shape, dtype=bool) if found.filled is None else found.filled
    np.testing.assert_array_equal(given_by, wanted)


@pytest.mark.parametrize("rest", ["best", "others"])
def test_what_is_hidden_is_not_decoded_and_what_is_in_front_not_copied(rest: str) -> None:
    rules = rules_of(Raw())
    values, holes = np.ones((1, *SHAPE), np.int16), np.ones((1, *SHAPE), dtype=bool)
    holes[0, 0, 0] = False
    every = np.ones(holes.shape, dtype=bool)
    decoded: list[composing.DecodedLayer] = []

    def coming() -> Iterator[composing.DecodedLayer]:
        for valid in (holes, every, holes, every):
            decoded.extend(layers(rules, [(values, valid)]))
            yield decoded[-1]

    some = coming()
    best = some if rest == "best" else [next(some)]
    found = composing.picked(rules, best, some if rest == "others" else ())
    assert found is not None
    assert len(decoded) == 2
    assert found.values is decoded[0].values
    assert found.valid is decoded[0].valid


def test_nothing_makes_nothing() -> None:
    assert composing.picked(rules_of(Raw()), []) is None
    assert composing.composed(rules_of(Raw(), pick=Mean()), []) is None
    assert composing.composed(rules_of(Raw(), pick=Mean()), [(0, [])]) is None
