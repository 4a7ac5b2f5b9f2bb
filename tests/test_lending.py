"""Memory that is lent: whoever holds an array has it alone, and no more is kept than was held at once."""

from __future__ import annotations

import gc
import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rasteret_dask.net.lending import LARGE, Lender

STEPS = st.lists(
    st.tuples(st.sampled_from(["lend", "view", "drop"]), st.integers(1, 6), st.integers(0, 9)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_an_array_is_its_holder_s_alone(steps: list[tuple[str, int, int]]) -> None:
    lender = Lender()
    held: list[tuple[int, np.ndarray]] = []
    most = 0
    for number, (step, size, which) in enumerate(steps):
        if step == "lend":
            array = lender.array((size, LARGE // 4), np.float32)
            assert array.shape == (size, LARGE // 4)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.flags.aligned
            array[...] = number
            held.append((number, array))
            del array
        elif step == "view" and held:
            number_of, array = held.pop(which % len(held))
            held.append((number_of, array[-1:, 5:].T))  # the rest of it is out of reach, and still lent
            del array
        elif held:
            held.pop(which % len(held))
        most = max(most, sum(block_nbytes(array) for _, array in held))
        for number_of, array in held:
            assert (array == number_of).all()
        assert lender.nbytes <= 2 * most  # a block may be twice as large as what lies in it


def block_nbytes(array: np.ndarray) -> int:
    """Return the bytes of the array that a view is of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes


def test_what_comes_back_is_lent_again() -> None:
    lender, places = Lender(), set()
    for _ in range(10):
        array = lender.array((LARGE,), np.uint8)
        places.add(array.__array_interface__["data"][0])
        del array
        gc.collect()
    assert len(places) == 1


def test_small_arrays_and_objects_lie_elsewhere() -> None:
    lender = Lender()
    assert lender.array((LARGE - 1,), np.uint8).base is None
    assert lender.array((LARGE,), object).base is None
    assert lender.nbytes == 0


def test_an_array_outlives_its_lender_and_a_copy_of_a_lender_is_a_new_one() -> None:
    lender = Lender()
    array = lender.array((LARGE,), np.uint8)
    array[:] = 7
    other = pickle.loads(pickle.dumps(lender))
    assert other.nbytes == 0 < lender.nbytes
    del lender
    gc.collect()
    assert (array == 7).all()
