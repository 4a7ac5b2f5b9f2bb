"""Long lists in a line: nothing is left out silently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.lists import first_of, listed

TEXTS = st.lists(st.text(alphabet="abc", min_size=1), max_size=30)


@given(TEXTS, st.integers(1, 12), st.sampled_from([", ", "; ", "\n"]))
def test_what_is_shown_and_what_is_counted_is_all(texts: list[str], most: int, between: str) -> None:
    shown, *rest = first_of(texts, most, between).rsplit("and ", 1)
    first = [part for part in shown.strip(f"{between} ").split(between.strip(" ") or between) if part.strip()]
    assert [part.strip() for part in first] == texts[:most]
    assert rest == ([f"{len(texts) - most} more"] if len(texts) > most else [])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (2, "A0, A1"), (3, "3 bands: A0 ... A2"), (1200, "1,200 bands: A0 ... A1199")],
)
def test_long_lists_are_summed_up_by_their_ends(count: int, text: str) -> None:
    assert listed([f"A{n}" for n in range(count)], "bands", 2) == text


def test_a_list_reads_as_a_sentence() -> None:
    assert first_of("abcde", 2) == "a, b and 3 more"
    assert first_of("abcde", 2, "; ") == "a; b; and 3 more"
    assert first_of("abcde", 2, "\n") == "a\nb\nand 3 more"
