# SPDX-License-Identifier: Apache-2.0
"""Long lists in a line of text: the first and the last of them, or the first ones and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["MOST_LISTED", "first_of", "listed"]

MOST_LISTED = 8
"""Values that are listed one by one."""


def listed(values: Iterable[object], noun: str = "values", most: int = MOST_LISTED) -> str:
    """Return values as text, those of long lists summed up: ``64 bands: A00 ... A63``."""
    texts = [str(value) for value in values]
    if len(texts) <= most:
        return ", ".join(texts)
    return f"{len(texts):,} {noun}: {texts[0]} ... {texts[-1]}"


def first_of(values: Iterable[object], most: int, between: str = ", ") -> str:
    """Return the first of some values as text, and how many more there are: ``a, b and 3 more``.

    Parameters
    ----------
    values
        The values, those to be shown first.
    most
        How many are shown.
    between
        What stands between two of them.
    """
    texts = [str(value) for value in values]
    shown = between.join(texts[:most])
    if len(texts) <= most:
        return shown
    return f"{shown}{' ' if between == ', ' else between}and {len(texts) - most:,} more"
