# SPDX-License-Identifier: Apache-2.0
"""How many chips have each value of a label column: counts that add up over shards and stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_VALUES", "LabelCounts", "Value", "add", "count"]

Value: TypeAlias = "str | int | float | bool"

MOST_VALUES = 10_000
"""A column of more distinct values (names of places, say, or measured numbers) is no column of classes."""


@dataclass(frozen=True)
class LabelCounts:
    """The values of one label column, each with the number of chips that have it."""

    counts: Mapping[Value, int] | None
    """Value -> chips, rising; None where there are more than :data:`MOST_VALUES`."""
    missing: int = 0
    """Chips without a value: null, NaN or empty text."""


def count(values: NDArray[Any]) -> LabelCounts | None:
    """Count the values of a column, shape (chip,); None of a column of times, which are no classes."""
    if values.dtype.kind == "M":
        return None
    if values.dtype.kind == "f":
        there = values[~np.isnan(values)]
    else:
        there = values[values != ""] if values.dtype.kind in "OU" else values
    counts = Counter(_plain(value) for value in there.tolist())
    return _few(counts, len(values) - len(there))


def add(a: LabelCounts | None, b: LabelCounts | None, chips: tuple[int, int]) -> LabelCounts:
    """Return what a column's values are in two parts together; in a part that lacks it, all ``chips`` miss a value."""
    one, two = a or LabelCounts({}, chips[0]), b or LabelCounts({}, chips[1])
    missing = one.missing + two.missing
    if one.counts is None or two.counts is None:
        return LabelCounts(None, missing)
    return _few(Counter(one.counts) + Counter(two.counts), missing)


def _few(counts: Counter[Value], missing: int) -> LabelCounts:
    if len(counts) > MOST_VALUES:
        return LabelCounts(None, missing)
    return LabelCounts({value: counts[value] for value in sorted(counts, key=_rising)}, missing)


def _rising(value: Value) -> tuple[bool, Value]:
    """Numbers first: a column may be text in one store and numbers in another."""
    return isinstance(value, str), value


def _plain(value: Any) -> Value:
    """Return a number as an integer where it is one: columns with nulls are floats."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, bool | int | float) else str(value)
