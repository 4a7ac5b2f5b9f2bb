"""Colours are told apart by everybody, on every page."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rasteret_dask.display.colours import (
    CLASSES,
    INK,
    LINES,
    NO_SPLIT,
    SPLIT_COLOURS,
    class_colours,
    colours_of,
    mixed,
)

WHITE, BLACK = "#ffffff", "#14181d"

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "trichromat": np.eye(3),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> NDArray[np.float64]:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, relative luminance."""
    low, high = sorted(float(linear(colour) @ XYZ[1]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, eye: str) -> NDArray[np.float64]:
    """CIELAB, D65."""
    ratio = XYZ @ np.clip(np.array(SEEN[eye]) @ linear(colour), 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colours: list[str], eye: str) -> float:
    return min(float(np.linalg.norm(lab(a, eye) - lab(b, eye))) for a, b in combinations(colours, 2))


@pytest.mark.parametrize("eye", SEEN)
def test_splits_are_told_apart(eye: str) -> None:
    """A difference of 2 is just seen side by side; small patches on a map need some 15."""
    assert nearest([*SPLIT_COLOURS.values(), NO_SPLIT], eye) > 15
    assert nearest(list(CLASSES[:9]), eye) > 10


@pytest.mark.parametrize("colour", [*SPLIT_COLOURS.values(), NO_SPLIT, INK, *LINES])
def test_colours_stand_out_of_light_and_dark_pages(colour: str) -> None:
    """3 is what graphics need (WCAG 2.1, 1.4.11)."""
    assert min(contrast(colour, WHITE), contrast(colour, BLACK)) >= 3


@given(st.sets(st.integers(-(2**31), 2**31), max_size=40))
def test_a_class_has_one_colour_whatever_the_order(values: set[int]) -> None:
    colours = class_colours(values)
    assert colours == class_colours(sorted(values, reverse=True))
    assert list(colours) == sorted(values)
    assert len(set(colours.values())) == min(len(values), len(set(class_colours(range(40)).values())))


def test_labels_keep_the_usual_order() -> None:
    assert list(colours_of(["x", "", "test", "train", "a"])) == ["train", "test", "a", "x", ""]
    assert colours_of([""]) == {"": SPLIT_COLOURS["train"]}


def test_mixed() -> None:
    assert mixed("#000000", "#ffffff", 0.5) == "#808080"
    assert mixed("#123456", "#ffffff", 0) == "#123456"
