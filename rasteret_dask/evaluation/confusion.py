# SPDX-License-Identifier: Apache-2.0
"""Counts of true and predicted classes, sums of differences, and the scores that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CLASS_SCORES",
    "DIFFERENCES",
    "OVERALL",
    "Pairs",
    "DifferenceSums",
    "class_scores",
    "differences",
    "overall",
]

CLASS_SCORES = ("precision", "recall", "f1", "iou")
"""Scores of one class."""

DENSE = 2**16
"""Pairs of classes that are counted in an array; of more, only those that occur."""

OVERALL = ("accuracy", "kappa", *CLASS_SCORES)
"""Scores of all classes together; those that classes have are means over the classes."""

DIFFERENCES = ("bias", "rmse", "mae", "r2")
"""Scores of measured numbers."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """How many pixels of a chip have a pair of classes; a row a chip and pair, only pairs that occur."""

    chip: NDArray[np.int64]
    """Shape (row,). Place of the chip."""
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    pixels: NDArray[np.int64]

    @classmethod
    def of(cls, truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> Pairs:
        """Count the pairs of one chip, whose place is 0.

        Parameters
        ----------
        truth, predicted
            Shape (pixel,). Classes.
        """
        none = np.zeros(0, dtype=np.int64)
        if not len(truth):
            return cls(none, none, none, none)
        low, other = int(truth.min()), int(predicted.min())
        height, width = int(truth.max()) - low + 1, int(predicted.max()) - other + 1
        if height * width <= DENSE:
            counts = np.bincount((truth - low) * width + (predicted - other))
            pair = np.flatnonzero(counts)
            first, second = pair // width + low, pair % width + other
            return cls(np.zeros(len(pair), dtype=np.int64), first, second, counts[pair].astype(np.int64))
        pairs, count = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
        return cls(np.zeros(len(count), dtype=np.int64), pairs[0], pairs[1], count.astype(np.int64))

    @classmethod
    def together(cls, parts: Sequence[Pairs], firsts: Sequence[int]) -> Pairs:
        """Return the rows of several parts; the places of the chips of each begin with one of ``firsts``."""
        none = np.zeros(0, dtype=np.int64)
        chip = [part.chip + first for part, first in zip(parts, firsts, strict=True)]
        return cls(
            np.concatenate([none, *chip]),
            np.concatenate([none, *(part.truth for part in parts)]),
            np.concatenate([none, *(part.predicted for part in parts)]),
            np.concatenate([none, *(part.pixels for part in parts)]),
        )

    def matrix(self, classes: Sequence[int], chips: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Return the confusion matrix, shape (truth, predicted), of some chips (None: all).

        Parameters
        ----------
        classes
            Rising; every class that occurs is one of them.
        chips
            Shape (chip,). Which chips count.
        """
        own = slice(None) if chips is None else chips[self.chip]
        codes = np.asarray(classes, dtype=np.int64)
        result = np.zeros((len(codes), len(codes)), dtype=np.int64)
        row, column = (np.searchsorted(codes, v[own]) for v in (self.truth, self.predicted))
        np.add.at(result, (row, column), self.pixels[own])
        return result


@dataclass(frozen=True, slots=True)
class DifferenceSums:
    """Sums over the pixels of each chip, shape (chip,) each, from which scores of any set of chips follow."""

    pixels: NDArray[np.int64]
    bias: NDArray[np.float64]
    """Of predicted - true."""
    square: NDArray[np.float64]
    """Of (predicted - true) ** 2."""
    absolute: NDArray[np.float64]
    """Of abs(predicted - true)."""
    mean: NDArray[np.float64]
    """Mean of the true values; 0 where there is none."""
    spread: NDArray[np.float64]
    """Of (true - mean) ** 2."""

    @classmethod
    def of(cls, truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> DifferenceSums:
        """Sum up the pixels of one chip, shape (pixel,), by itself: no sum depends on which chips are read together."""
        apart = predicted - truth
        mean = float(truth.mean()) if len(truth) else 0.0
        sums = (apart.sum(), (apart * apart).sum(), np.abs(apart).sum(), mean, ((truth - mean) ** 2).sum())
        return cls(
            np.array([len(truth)], dtype=np.int64), *(np.array([one], dtype=np.float64) for one in sums)
        )

    @classmethod
    def together(cls, parts: Sequence[DifferenceSums]) -> DifferenceSums:
        """Return the chips of several parts."""
        fields = ("bias", "square", "absolute", "mean", "spread")
        pixels = np.concatenate([np.zeros(0, dtype=np.int64), *(part.pixels for part in parts)])
        return cls(
            pixels, *(np.concatenate([np.zeros(0), *(getattr(p, name) for p in parts)]) for name in fields)
        )

    def of_chips(self, chips: NDArray[np.bool_]) -> DifferenceSums:
        """Return some chips, shape (chip,)."""
        return DifferenceSums(*(getattr(self, name)[chips] for name in self.__slots__))


def class_scores(matrix: NDArray[np.int64]) -> dict[str, list[float | None]]:
    """Return the scores of each class: precision, recall, F1 and IoU; None where one is 0 / 0.

    Parameters
    ----------
    matrix
        Shape (truth, predicted).
    """
    right, true, guessed = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return {
        "precision": _shares(right, guessed),
        "recall": _shares(right, true),
        "f1": _shares(2 * right, true + guessed),
        "iou": _shares(right, true + guessed - right),
    }


def overall(matrix: NDArray[np.int64]) -> dict[str, float | None]:
    """Return the scores of all classes together; None where one is 0 / 0.

    ``accuracy`` is the share of pixels whose class is right; ``kappa`` is Cohen's (1960): how much more that is than
    two maps would share by chance that have as many pixels of each class. The others are means of
    :func:`class_scores`, over the classes that have one: a class that only the predictions have counts with an F1 of 0.
    """
    total, right = int(matrix.sum()), int(np.trace(matrix))
    rows, columns = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    chance = sum(a * b for a, b in zip(rows, columns, strict=True))  # Python's integers: exact
    kappa = (right * total - chance) / (total * total - chance) if total * total > chance else None
    result: dict[str, float | None] = {"accuracy": right / total if total else None, "kappa": kappa}
    for name, values in class_scores(matrix).items():
        some = [value for value in values if value is not None]
        result[name] = math.fsum(some) / len(some) if some else None
    return result


def differences(sums: DifferenceSums) -> dict[str, float | None]:
    """Return the scores of measured numbers over all chips: bias, RMSE, MAE and R2; None where one is 0 / 0.

    Sums are rounded once (:func:`math.fsum`), so that they are the same in any order of chips.
    """
    n = int(sums.pixels.sum())
    if not n:
        return dict.fromkeys(DIFFERENCES)
    square = math.fsum(sums.square)
    mean = math.fsum(sums.pixels * sums.mean) / n
    spread = math.fsum(sums.spread) + math.fsum(sums.pixels * (sums.mean - mean) ** 2)
    return {
        "bias": math.fsum(sums.bias) / n,
        "rmse": math.sqrt(square / n),
        "mae": math.fsum(sums.absolute) / n,
        "r2": 1.0 - square / spread if spread else None,
    }


def _shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
    return [a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]
