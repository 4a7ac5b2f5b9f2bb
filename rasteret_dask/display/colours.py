# SPDX-License-Identifier: Apache-2.0
"""The one palette of plots, maps, pages and reprs: told apart by colour-blind readers, on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CLASSES", "INK", "INVALID", "LINES", "NO_LABEL", "NO_SPLIT", "SPLIT_COLOURS", "class_colours", "colours_of",
    "mixed",
]  # fmt: skip

SPLIT_COLOURS = {"train": "#2f7fc1", "val": "#c07c00", "test": "#c2284b"}
"""Each has a contrast of 3 to a white and to a nearly black page (WCAG 2.1, 1.4.11), and keeps its distance to the
others as people with protanopia, deuteranopia and tritanopia see them."""

NO_SPLIT = "#808080"
"""Chips that have no split, beside others that have one."""

_FURTHER = ("#2c8c74", "#8a63c4", "#9a6a4a", "#5f8a2e", "#b3609b")
"""Splits with names of the user's; beyond five they come again, paler."""

NO_LABEL = "#b3b3b3"
"""Pixels that no polygon of labels covers."""

INK = "#7d7d7d"
"""Text and axes of pictures without a background: it has a contrast of 4 to white and to black pages."""

INVALID = ("#8c8c8c33", "#8c8c8c99")
"""Ground and stripes of the hatch where pixels are invalid: both let the page through."""

CLASSES = (
    "#117733", "#ddcc77", "#88ccee", "#cc6677", "#332288", "#999933", "#44aa99", "#882255", "#aa4499", "#dd8452",
    "#4477aa", "#ee8866",
)  # fmt: skip
"""Classes in pixels: Paul Tol's "muted" scheme (Colour Schemes, SRON/EPS/TN/09-002, issue 3.2), and three further."""

LINES = ("#2f7fc1", "#c07c00", "#c2284b", "#2c8c74", "#8a63c4", "#9a6a4a")
"""Lines of a plot, one a member or a series."""


def colours_of(names: Iterable[str | None]) -> dict[str, str]:
    """Return a colour for each split, source or platform: splits first, then by name, ``""`` (none) last and grey.

    Where nothing has a name, that is the first split's colour.

    Examples
    --------
    >>> from rasteret_dask.display.colours import colours_of
    >>> list(colours_of(["test", None, "train"]))
    ['train', 'test', '']
    """
    there = {name or "" for name in names}
    result = {name: colour for name, colour in SPLIT_COLOURS.items() if name in there}
    others = sorted(there - set(result) - {""}, key=lambda name: (len(name) if name.isdecimal() else 0, name))
    many = len(_FURTHER)
    result |= {
        name: mixed(_FURTHER[i % many], "#ffffff", min(0.25 * (i // many), 0.75))
        for i, name in enumerate(others)
    }
    if "" in there:
        result[""] = NO_SPLIT if len(there) > 1 else SPLIT_COLOURS["train"]
    return result


def class_colours(values: Iterable[int]) -> dict[int, str]:
    """Return a colour for each class, in the order of the values; beyond twelve classes colours come again, paler.

    Examples
    --------
    >>> from rasteret_dask.display.colours import class_colours
    >>> class_colours([20, 10])
    {10: '#117733', 20: '#ddcc77'}
    """
    count = len(CLASSES)
    return {
        value: mixed(CLASSES[i % count], "#ffffff", min(0.45 * (i // count), 0.9))
        for i, value in enumerate(sorted(set(values)))
    }


def mixed(colour: str, other: str, share: float) -> str:
    """Return a colour with a share of another one in it."""
    parts = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)
