"""Rules of pixels: units, stored forms, masks and picks against formulas that are written out with NumPy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.rules.kinds import KINDS, Kind, KindName
from rasteret_dask.rules.masks import (
    MASKS,
    AnyOf,
    Bits,
    Classes,
    Mask,
    MaskName,
    Named,
    clouds_of,
    mask_named,
    settled,
    words_of,
)
from rasteret_dask.rules.picks import (
    PICKS,
    Closest,
    Composed,
    Last,
    Majority,
    Mean,
    Median,
    Nearest,
    PickName,
    Ranked,
    Scored,
    pick_named,
)
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.tables import Turn
from rasteret_dask.rules.units import (
    UNITS,
    Decibel,
    Embedding,
    Kelvin,
    Raw,
    Reflectance,
    Scaled,
    Unit,
    UnitName,
    unit_length,
    unit_named,
    units_named,
)
from rasteret_dask.rules.values import from_json

Array = NDArray[Any]

SMALL = ("int8", "uint8", "int16", "uint16")
SCALES = st.one_of(
    st.sampled_from([1.0, 1e-4, 2.75e-5, 0.00341802, 0.0, -1.0, 1e20]), st.floats(-1e6, 1e6, allow_nan=False)
)
OFFSETS = st.one_of(st.sampled_from([0.0, -0.1, -0.2, 149.0, -1e20]), st.floats(-1e6, 1e6, allow_nan=False))
STORES = st.sampled_from(
    [
        StoredForm("float32", None),
        StoredForm("uint16", 65535, 1e4),
        StoredForm("int16", -32768, 1e4),
        StoredForm("uint16", 65535, 100.0),
        StoredForm("int16", -32768, 1.0),
        StoredForm("uint16", 0, 1e4),
    ]
)


def every(dtype: str) -> Array:
    """Return all numbers of an 8 or 16-bit type, shape (y, x)."""
    size = np.dtype(dtype).itemsize
    numbers = np.arange(2 ** (8 * size), dtype=f"u{size}").view(dtype)
    return numbers.reshape(-1, 16)


def decoded(unit: Unit, stored: Array, scale: float, offset: float) -> Array:
    """Return what a built-in unit makes of stored numbers, float32, NaN where they have no value: the formulas."""
    number = stored.astype(np.float64)
    if isinstance(unit, Embedding):
        return (np.sign(number) * (np.abs(number) / 127.5) ** 2).astype(np.float32)
    value = (number * scale + offset).astype(np.float32)
    if not isinstance(unit, Decibel):
        return value
    result = np.full(value.shape, np.nan, np.float32)
    result[value > 0] = (10 * np.log10(value[value > 0].astype(np.float64))).astype(np.float32)
    return result


def held(store: StoredForm, values: Array) -> tuple[Array, Array]:
    """Return what the output holds of values, and which are clipped; NaN is invalid."""
    if store.steps is None:
        return values.astype(store.dtype), np.zeros(values.shape, bool)
    low, high = np.iinfo(store.dtype).min, np.iinfo(store.dtype).max
    low, high = (low + 1, high) if store.fill == low else (low, high - 1)
    void = np.isnan(values)
    number = np.rint(np.where(void, 0, values).astype(np.float64) * store.steps)
    clipped = ~void & ((number < low) | (number > high))
    number = np.minimum(np.maximum(number, low), high)
    return np.where(void, store.fill, number).astype(store.dtype), clipped


# Look-up tables


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_are_the_formulas_for_every_number(data: st.DataObject) -> None:
    """Of every unit but raw and the joint ones, into every stored form, in memory of any layout."""
    unit = data.draw(st.sampled_from([u for u in UNITS.values() if u.elementwise and not isinstance(u, Raw)]))
    scale, offset, store = data.draw(SCALES), data.draw(OFFSETS), data.draw(STORES)
    stored = every(data.draw(st.sampled_from(SMALL)))
    rows, cols = stored.shape
    seed = data.draw(st.integers(0, 9))
    valid = None if seed < 3 else np.random.default_rng(seed).random(stored.shape) < 0.7
    turn = Turn(unit, Radiometry(scale, offset, "some rule"), store)
    place = np.zeros((rows, cols), store.dtype)
    if data.draw(st.booleans()):
        place = np.zeros((2 * rows, 3 * cols), store.dtype)[::2, ::3]
        stored = np.repeat(stored, 2, axis=1)[:, ::2]
        assert not place.flags.c_contiguous
        assert not stored.flags.c_contiguous
    known, clipped = turn.write(place, stored, valid)

    values = decoded(unit, stored, scale, offset)
    if valid is not None:
        values = np.where(valid, values, np.float32(np.nan))
    expected, beyond = held(store, values)
    np.testing.assert_array_equal(place, expected)
    assert place.dtype == np.dtype(store.dtype)
    np.testing.assert_array_equal(~np.isnan(values) if known is None else known, ~np.isnan(values))
    np.testing.assert_array_equal(np.zeros_like(beyond) if clipped is None else clipped, beyond)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_larger_types_become_what_the_tables_hold(data: st.DataObject) -> None:
    """The same numbers as 32 bits, as floats, or in another byte order take the way without a table."""
    unit = data.draw(st.sampled_from([u for u in UNITS.values() if not isinstance(u, Raw)]))
    scaling = Radiometry(data.draw(SCALES), data.draw(OFFSETS), "")
    store = data.draw(STORES) if unit.elementwise else StoredForm("float32", None)
    stored = every(data.draw(st.sampled_from(SMALL)))
    valid = np.random.default_rng(data.draw(st.integers(0, 9))).random(stored.shape) < 0.7
    turn = Turn(unit, scaling, store)
    one = np.zeros(stored.shape, store.dtype)
    first = turn.write(one, stored, valid)
    for wider in (np.int32, np.float32, np.float64, stored.dtype.newbyteorder(">")):
        other = np.zeros(stored.shape, store.dtype)
        second = turn.write(other, stored.astype(wider), valid)
        np.testing.assert_array_equal(one, other)
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            np.testing.assert_array_equal(a, b) if a is not None else None


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("contiguous", [True, False])
def test_tables_of_joint_units_hold_decoded_values(dtype: str, contiguous: bool) -> None:
    stored = every(dtype)
    place = np.zeros((2 * stored.shape[0], stored.shape[1]), np.float32)[:: 1 if contiguous else 2]
    place = place[: stored.shape[0]]
    valid = stored != 3
    known, clipped = Turn(Embedding(), Radiometry(7.0, 5.0, ""), StoredForm("float32", None)).write(
        place, stored, valid
    )
    expected = decoded(Embedding(), stored, 1.0, 0.0)
    np.testing.assert_array_equal(place, np.where(valid, expected, np.nan))
    np.testing.assert_array_equal(known, valid)
    assert clipped is None


@dataclasses.dataclass(frozen=True)
class Sparse(Unit):
    """A unit in which some numbers have no value, and which returns float64."""

    name = "sparse"
    steps = 10.0

    def decode(self, stored: Array, scaling: Radiometry) -> Array:
        return np.where(stored % 3 == 0, np.nan, stored.astype(np.float64) / 8)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("store", [StoredForm("float32", None), StoredForm("int16", -32768, 10.0)], ids=str)
def test_numbers_without_a_value_are_invalid(dtype: str, store: StoredForm) -> None:
    stored = every(dtype)
    place = np.zeros(stored.shape, store.dtype)
    known, clipped = Turn(Sparse(), Radiometry(1.0, 0.0, ""), store).write(place, stored, None)
    void = stored.astype(int) % 3 == 0
    assert known is not None
    np.testing.assert_array_equal(known, ~void)
    expected, beyond = held(store, np.where(void, np.nan, stored.astype(np.float64) / 8))
    np.testing.assert_array_equal(place, expected)
    np.testing.assert_array_equal(np.zeros_like(void) if clipped is None else clipped, beyond)


def test_an_empty_part_of_a_tile_is_no_mistake() -> None:
    turn = Turn(Reflectance(), Radiometry(1e-4, -0.1, ""), StoredForm("uint16", 65535, 1e4))
    assert turn.write(np.zeros((0, 5), np.uint16), np.zeros((0, 5), np.uint16), None) == (None, None)


# Stored forms


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-10, 10, width=32) | st.just(np.float32(np.nan))),
    STORES,
)
def test_stored_forms_clip_count_and_fill(values: Array, store: StoredForm) -> None:
    expected, beyond = held(store, values)
    np.testing.assert_array_equal(store.encode(values), expected)
    np.testing.assert_array_equal(store.clips(values), beyond)
    valid = np.zeros(values.shape, bool)
    valid[0] = ~np.isnan(values[0])
    found = store.encode(values, valid)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], np.full(found[1].shape, store.fill_value))
    if store.steps is not None:
        low, high = store.span
        assert store.fill_value not in range(low, high + 1)
        assert high - low == 2**16 - 2
        assert ((low <= found[valid]) & (found[valid] <= high)).all()
        assert store.scale_factor == 1 / store.steps


@pytest.mark.parametrize(
    ("dtype", "low", "high", "fill"), [("uint16", 0, 65534, 65535), ("int16", -32767, 32767, -32768)]
)
def test_reflectance_as_integers(dtype: str, low: int, high: int, fill: int) -> None:
    values = np.array([0.1234, -0.05, -4.0, 7.0, np.nan, 0.0], dtype=np.float32)
    found = StoredForm(dtype, fill, 1e4).encode(values)
    assert found.tolist() == [1234, max(-500, low), max(-40000, low), min(70000, high), fill, 0]


def test_floats_are_not_copied() -> None:
    values = np.array([[0.1, np.nan]], dtype=np.float32)
    assert np.shares_memory(StoredForm("float32", None).encode(values), values)


# Units


def test_embeddings_have_length_one_and_need_all_bands() -> None:
    stored = np.array([[[-127, 1, 0, 5]], [[127, -128, 0, 5]]], dtype=np.int8)
    valid = np.array([[[True, True, True, False]], [[True, True, True, True]]])
    rules = PixelRules((Embedding(), Embedding()), ("embedding",) * 2, Closest(), StoredForm("float32", None))
    vectors, known = rules.finish(Embedding().decode(stored, Radiometry(1, 0, "")), valid)
    assert known.tolist() == [[[True, True, False, False]]] * 2  # a vector of length 0 has no direction
    length = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=0))
    np.testing.assert_allclose(length[known[0]], 1, rtol=1e-6)
    assert vectors[0, 0, 0] == -vectors[1, 0, 0]


@given(hnp.arrays(np.float32, (5, 3, 2), elements=st.floats(-1, 1, width=32)))
def test_unit_length_whatever_the_layout(vectors: Array) -> None:
    first = unit_length(vectors)
    last = unit_length(np.moveaxis(np.ascontiguousarray(np.moveaxis(vectors, 0, -1)), -1, 0))
    np.testing.assert_array_equal(first, last)  # to the last bit
    length = np.sqrt((first.astype(np.float64) ** 2).sum(axis=0))
    known = np.isfinite(length)
    np.testing.assert_allclose(length[known], 1, rtol=1e-6)
    np.testing.assert_array_equal(known, (vectors.astype(np.float64) ** 2).sum(axis=0) > 0)


def test_one_missing_element_makes_the_vector_missing() -> None:
    assert np.isnan(unit_length(np.array([[[3.0]], [[np.nan]]], dtype=np.float32))).all()


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["reflectance", "embedding", "decibel", "raw"]), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_bands_of_several_units_are_finished_apart(names: list[str], seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.normal(0, 1, (len(names), 3, 4)).astype(np.float32)
    valid = draw.random(values.shape) < 0.8
    rules = PixelRules(
        tuple(UNITS[n] for n in names), (None,) * len(names), Closest(), StoredForm("float32", None)
    )
    found, known = rules.finish(values, valid)
    joint = [i for i, n in enumerate(names) if n == "embedding"]
    together = valid[joint].all(axis=0)
    length = np.sqrt(sum(values[i].astype(np.float64) ** 2 for i in joint)) if joint else None
    for i, name in enumerate(names):
        shown = valid[i] & (values[i] > 0 if name == "decibel" else True)
        expected = values[i]
        if name == "embedding":
            shown, expected = together, (values[i] / length).astype(np.float32)
        if name == "decibel":
            with np.errstate(invalid="ignore", divide="ignore"):
                expected = (10 * np.log10(values[i].astype(np.float64))).astype(np.float32)
        np.testing.assert_array_equal(known[i], shown)
        np.testing.assert_array_equal(found[i][shown], expected[shown])


def test_words_stand_for_their_values() -> None:
    assert set(get_args(UnitName)) == {*UNITS, "physical", "auto"}
    assert set(get_args(PickName)) == set(PICKS)
    assert set(get_args(MaskName)) == set(MASKS)
    assert set(get_args(KindName)) == set(KINDS)
    for word, unit in UNITS.items():
        assert unit_named(word) is unit
        assert units_named(word).of({"x"}, KINDS["class"], False) is unit
        assert str(units_named(word)) == word
    for word, pick in PICKS.items():
        assert pick_named(word) is pick
        assert pick.name == str(pick) == word
    assert units_named("auto") == units_named("physical")
    assert str(units_named("auto")) == "physical"


@pytest.mark.parametrize("kind", [*KINDS.values()], ids=lambda kind: kind.name)
def test_every_kind_has_a_physical_unit_that_fits(kind: Kind) -> None:
    unit = units_named("physical").of({"x"}, kind, False)
    assert unit.name == kind.unit
    assert unit.fits(kind)
    assert Raw().fits(kind)
    if kind.name in ("class", "bitfield"):
        assert not any(u.fits(kind) for u in UNITS.values() if not isinstance(u, Raw))
    may_be_anything = kind.name == "continuous"
    assert Reflectance().fits(kind) == (kind.name == "reflectance" or may_be_anything)
    assert Kelvin().fits(kind) == (kind.name == "temperature" or may_be_anything)
    assert Embedding().fits(kind) == (kind.name == "embedding" or may_be_anything)


def test_units_by_band_take_any_name_of_it() -> None:
    units = units_named({"vv": "decibel", "red": "raw", "nir": "physical"})
    assert units.of({"B04", "red"}, KINDS["reflectance"], False) == Raw()
    assert units.of({"vv"}, KINDS["backscatter"], False) == Decibel()
    assert units.of({"B08", "nir"}, KINDS["reflectance"], False) == Reflectance()
    assert units.of({"B11"}, KINDS["reflectance"], False) == Reflectance()


def test_a_scale_that_changes_nothing_leaves_numbers_as_they_are() -> None:
    physical = units_named("physical")
    assert physical.of({"x"}, KINDS["continuous"], True) == Raw()
    assert physical.of({"x"}, KINDS["continuous"], False) == Scaled()
    assert units_named("scaled").of({"x"}, KINDS["continuous"], True) == Scaled()


@pytest.mark.parametrize("wrong", ["kelvins", "", 3, {"red": "kelvins"}, {"red": 3}])
def test_other_units_are_refused_with_the_words(wrong: Any) -> None:
    with pytest.raises(PlanError, match="'kelvin'"):
        units_named(wrong)


# Masks


@settings(deadline=None)
@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64"]),
    st.lists(st.integers(0, 63), max_size=4),
    st.integers(0, 9),
)
def test_bits_are_those_of_the_number(dtype: str, bits: list[int], seed: int) -> None:
    """Minus one has every bit of its type set, and no more."""
    limits = np.iinfo(dtype)
    field = np.random.default_rng(seed).integers(limits.min, limits.max, (4, 5), dtype, endpoint=True)
    field[0, :3] = (limits.min, limits.max, -1 if limits.min else 0)
    found = Bits("qa", tuple(bits)).hidden(field)
    width = limits.bits
    for number, hidden in zip(field.ravel().tolist(), found.ravel().tolist(), strict=True):
        pattern = format(number % 2**width, f"0{width}b")[::-1]
        assert hidden == any(b < width and pattern[b] == "1" for b in bits)


@settings(deadline=None)
@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16", "int32", "float32"]),
    st.lists(st.integers(-3, 300), max_size=5),
)
def test_classes_are_those_numbers(dtype: str, classes: list[int]) -> None:
    limits = np.iinfo(dtype) if dtype != "float32" else np.iinfo("int16")
    codes = np.clip(np.arange(-5, 305), limits.min, limits.max).astype(dtype).reshape(-1, 2)
    found = Classes("map", tuple(classes)).hidden(codes)
    assert found.dtype == bool
    assert found.ravel().tolist() == [int(c) in classes for c in codes.ravel().tolist()]


SCL_CLASS_IS_CLOUD = {3: True, 8: True, 9: True, 10: True} | dict.fromkeys((0, 1, 2, 4, 5, 6, 7, 11), False)


def of_words(words: Sequence[MaskName], band: str) -> Mask:
    mask = settled(mask_named(words), [band, "red"])
    assert mask is not None
    return mask


def test_scl_classes_that_are_clouds_or_their_shadows() -> None:
    found = of_words(["clouds"], "scl").hidden(np.arange(12, dtype=np.uint8))
    assert dict(enumerate(found.tolist())) == SCL_CLASS_IS_CLOUD
    assert clouds_of(["red", "scl"]) == of_words(["clouds"], "scl")


def test_masks_add_up() -> None:
    both = of_words(["snow", "water"], "SCL").hidden(np.arange(12, dtype=np.uint8))
    assert np.flatnonzero(both).tolist() == [6, 11]
    qa = np.array([0, 1 << 5, 1 << 7, 1 << 6], dtype=np.uint16)
    assert of_words(["snow", "water"], "qa_pixel").hidden(qa).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("bit", "bad"), [(0, False), (1, True), (2, False), (3, True), (4, True), (5, False), (6, False)]
)
def test_qa_pixel_bits_that_are_clouds_or_their_shadows(bit: int, bad: bool) -> None:
    assert bool(of_words(["clouds"], "qa_pixel").hidden(np.array([1 << bit], np.uint16))[0]) is bad


def test_a_fill_of_hls_has_every_bit_set() -> None:
    """255 is Fmask's fill: nodata hides it before the mask does, and the mask alone takes it for a cloud."""
    assert of_words(["clouds"], "Fmask").hidden(np.array([255, 1, 2, 64], np.uint8)).tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_no_mask_hides_nothing() -> None:
    assert mask_named(None) is None
    assert mask_named(()) is None
    every_class = np.arange(256, dtype=np.uint8)
    assert not Classes("scl", ()).hidden(every_class).any()
    assert not Bits("qa", ()).hidden(every_class).any()


def test_any_of_several_masks_reads_each_band_once() -> None:
    mask = mask_named(["clouds", Classes("map", (4,)), Bits("flags", (0,)), Classes("map", (5,))])
    assert words_of(mask) == ("clouds", "Classes(band=map, classes=(4,))", "Bits(band=flags, bits=(0,))",
                              "Classes(band=map, classes=(5,))")  # fmt: skip
    mine = settled(mask, ["scl", "map", "flags"])
    assert mine is not None
    assert mine.needs == ("scl", "map", "flags")
    scl, classes, flags = np.array([8, 0, 0, 0, 0]), np.array([0, 4, 5, 0, 0]), np.array([0, 0, 0, 1, 2])
    assert mine.hidden(scl, classes, flags).tolist() == [True, True, True, True, False]
    assert settled(mask, ["map", "flags"]) is None


def test_a_word_that_is_no_mask_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'smoke'.*'clouds', 'snow', 'water', or a Mask"):
        mask_named(["clouds", "smoke"])
    with pytest.raises(NotImplementedError):
        Named(("clouds",)).hidden(np.zeros(3))


# Composites


STACKS = st.tuples(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
        elements=st.sampled_from([0.0, 1.0, 2.0, 3.5]) | st.floats(-100, 100, width=32),
    ),
    st.integers(0, 99),
).map(lambda drawn: (drawn[0], np.random.default_rng(drawn[1]).random(drawn[0].shape) < 0.6))


def composed(
    pick: Composed, stack: Array, valid: Array, ranks: Sequence[int] | None = None
) -> tuple[Array, Array]:
    """Return what a composite makes of acquisitions that come one by one."""
    composition = pick.begin()
    for number, (values, known) in enumerate(zip(stack, valid, strict=True)):
        composition.add(values, known, number if ranks is None else ranks[number])
    return composition.result()


def by_pixel(stack: Array, valid: Array, made: Any) -> Array:
    """Return what a function of one pixel's valid values, with their places, makes of a stack; NaN of none."""
    result = np.full(stack.shape[1:], np.nan)
    for at in np.ndindex(stack.shape[1:]):
        own = [(i, stack[(i, *at)]) for i in range(len(stack)) if valid[(i, *at)]]
        if own:
            result[at] = made(own)
    return result


ORACLES: dict[Composed, Any] = {
    Mean(): lambda own: np.float32(sum(np.float64(v) for _, v in own) / len(own)),
    Median(): lambda own: np.float32(np.median(np.array([v for _, v in own], dtype=np.float64))),
    Majority(): lambda own: min({v for _, v in own}, key=lambda v: (-sum(w == v for _, w in own), v)),
}


@settings(deadline=None)
@given(STACKS, st.sampled_from(sorted(ORACLES, key=str)))
def test_composites_are_those_of_each_pixel(drawn: tuple[Array, Array], pick: Composed) -> None:
    stack, valid = drawn
    expected = by_pixel(stack, valid, ORACLES[pick])
    apart = np.moveaxis(np.ascontiguousarray(np.moveaxis(stack, 0, -1)), -1, 0)
    for own in (stack, apart):
        for values, known in (composed(pick, own, valid), pick.blend(own, valid)):
            np.testing.assert_array_equal(known, valid.any(axis=0))
            np.testing.assert_array_equal(values[known], expected[known])


@settings(deadline=None)
@given(STACKS, st.data())
def test_the_nearest_valid_value_whatever_the_order(drawn: tuple[Array, Array], data: st.DataObject) -> None:
    stack, valid = drawn
    ranks = data.draw(st.permutations(range(len(stack))))
    values, known = composed(Nearest(), stack, valid, ranks)
    expected = by_pixel(stack, valid, lambda own: min(own, key=lambda one: ranks[one[0]])[1])
    np.testing.assert_array_equal(known, valid.any(axis=0))
    np.testing.assert_array_equal(values[known], expected[known])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*KINDS, None]), min_size=1, max_size=5),
    st.sampled_from(sorted(ORACLES, key=str)),
    st.integers(0, 99),
)
def test_each_band_is_composed_as_its_kind_is(
    kinds: list[KindName | None], pick: Composed, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    stack = draw.integers(0, 4, (5, len(kinds), 2, 3)).astype(np.float32)
    valid = draw.random(stack.shape) < 0.7
    ranks = draw.permutation(5).tolist()
    rules = PixelRules((Raw(),) * len(kinds), tuple(kinds), pick, StoredForm("float32", None))
    assert rules.composes
    composition = rules.begin()
    for number, (one, shown) in enumerate(zip(stack, valid, strict=True)):
        composition.add(one, shown, ranks[number])
    values, known = composition.result()
    np.testing.assert_array_equal(known, valid.any(axis=0))
    for band, kind in enumerate(kinds):
        own, shown = stack[:, band : band + 1], valid[:, band : band + 1]
        made = ORACLES[pick]
        if kind == "class":
            made = ORACLES[Majority()]
        if kind in ("bitfield", "angle"):
            made = lambda own: min(own, key=lambda one: ranks[one[0]])[1]  # noqa: E731
        expected = by_pixel(own, shown, made)[0]
        np.testing.assert_array_equal(values[band][known[band]], expected[known[band]])


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("uint8", "float32"), ("uint16", "float32"), ("int32", "float64"), ("float64", "float64")],
)
def test_composites_hold_every_stored_number(dtype: str, wanted: str) -> None:
    rules = PixelRules((Raw(),), (None,), Median(), StoredForm(dtype, 0))
    assert rules.work_dtype() == np.dtype(wanted)


# Picks


def test_only_picks_of_one_acquisition_are_filled() -> None:
    for word, pick in PICKS.items():
        if isinstance(pick, Composed):
            with pytest.raises(PlanError, match="Leave fill out"):
                pick_named(word, True)
            assert pick_named(word, False) is pick
        else:
            assert isinstance(pick, Ranked | Scored)
            assert pick_named(word, True).fills
            assert not pick_named(word, False).fills
    assert pick_named("last", True) == Last(fill=True) != PICKS["newest"]
    with pytest.raises(PlanError, match=r"'newst'.*'newest'"):
        pick_named("newst")


# As JSON


@dataclasses.dataclass(frozen=True)
class Local(Mask):
    """A rule of this module."""

    band: str
    limits: tuple[float, ...] = (1.5, 2.0)
    other: Mask | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.band,)

    def hidden(self, *stored: Array) -> Array:
        return np.asarray(stored[0] > self.limits[0])


@pytest.mark.parametrize(
    "rule",
    [
        *UNITS.values(), *PICKS.values(), StoredForm("uint16", 65535, 1e4), StoredForm("float32", None), Nearest(),
        AnyOf((Named(("clouds", "snow")), Bits("qa", (1, 2)), Classes("SCL", (3,)))),
        units_named({"vv": "decibel", "red": "raw"}), units_named("physical"), Local("a", (3.0,), Local("b")),
        PixelRules((Raw(), Kelvin()), ("class", None), Last(fill=True), StoredForm("float32", None)),
    ],
    ids=lambda rule: f"{type(rule).__name__} {rule}",
)  # fmt: skip
def test_rules_come_back_from_their_json(rule: Any) -> None:
    text = json.dumps(rule.to_json())
    again = from_json(json.loads(text))
    assert again == rule
    assert type(again) is type(rule)
    assert hash(again) == hash(rule)
    assert json.dumps(again.to_json()) == text


def test_a_rule_that_can_change_is_refused() -> None:
    @dataclasses.dataclass
    class Loose(Mask):
        band: str

        @property
        def needs(self) -> tuple[str, ...]:
            return (self.band,)

        def hidden(self, *stored: Array) -> Array:
            return stored[0] > 1

    with pytest.raises(PlanError, match=r"frozen dataclass.*dataclass\(frozen=True\)"):
        Loose("a").to_json()


def test_a_field_that_is_no_plain_value_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'limits'.*a list"):
        Local("a", [1.0]).to_json()  # type: ignore[arg-type]


def test_a_rule_without_its_method_cannot_be_made() -> None:
    @dataclasses.dataclass(frozen=True)
    class Lame(Unit):
        name = "lame"

    with pytest.raises(TypeError, match="decode"):
        Lame()  # type: ignore[abstract]

    @dataclasses.dataclass(frozen=True)
    class Nameless(Unit):
        def decode(self, stored: Array, scaling: Radiometry) -> Array:
            return stored

    with pytest.raises(TypeError, match="name = "):
        Nameless()
