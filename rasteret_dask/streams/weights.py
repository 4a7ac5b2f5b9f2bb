# SPDX-License-Identifier: Apache-2.0
"""How often each chip comes in an epoch, where some are to come more often than others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Column", "WeightsLike", "Weights"]

WeightsLike: TypeAlias = "str | NDArray[Any] | list[float]"
"""A column of numbers of the chip table, or a number for each chip in its order."""

Column: TypeAlias = "Callable[[str], pa.ChunkedArray]"
"""Returns a column of the chip table, in the order of the chips; raises PlanError where there is none."""


class Weights:
    """Numbers that say how often each chip comes, compared with the others.

    An epoch has as many chips as before. Chip i comes ``n * weight / sum`` times: rounded down or up, by systematic
    sampling (one random number an epoch, and the running sum of the weights). So the mean over epochs is exact, and the
    counts of each epoch are as close to it as whole numbers can be. Chips of one weight, or one class, follow each
    other in that sum: they are thinned evenly, and all of them together come as often as they should, but for one.

    Parameters
    ----------
    values
        Shape (chip,). Finite, not negative, and not all zero.
    subject
        What gave them, for errors.
    groups
        Shape (chip,). The class of each chip; None: those of one weight belong together.

    Raises
    ------
    PlanError
        Where they are no such numbers.
    """

    def __init__(self, values: NDArray[Any], subject: str, groups: NDArray[np.int64] | None = None) -> None:
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise PlanError(subject, f"{values.dtype} of shape {values.shape}", "a number for each chip")
        self.values = values.astype(np.float64)
        self._order = np.argsort(values if groups is None else groups, kind="stable")
        for wrong, text in (
            (~np.isfinite(self.values), "weights that are not finite (nan, inf or null)"),
            (self.values < 0, "negative weights"),
        ):
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise PlanError(
                    subject, f"{int(wrong.sum())} {text}, the first of chip {at}: {self.values[at]}",
                    "finite numbers from 0 on", "A chip of weight 0 never comes.",
                )  # fmt: skip
        if not self.values.any():
            raise PlanError(
                subject, "weights that are all 0", "at least one above 0", "Without weights every chip comes once."
            )  # fmt: skip

    @classmethod
    def of(
        cls, weights: WeightsLike | None, balance: str | None, chips: int, column: Column
    ) -> Weights | None:
        """Return what ``weights=`` or ``balance=`` asks for; None where neither asks for anything.

        Parameters
        ----------
        weights
            A column's name, or numbers.
        balance
            A column of classes: each of them comes equally often.
        chips
            How many chips there are.
        column
            Returns columns of the chip table.

        Raises
        ------
        PlanError
            When both are given, the column is none, has nulls or no such values, or numbers of other chips.
        """
        if weights is not None and balance is not None:
            raise PlanError(
                "stream(weights=, balance=)", "both", "one of them",
                "Multiply your weights by 1 / the count of the chip's class.",
            )  # fmt: skip
        if balance is not None:
            classes = _classes(_text(balance, "balance"), column(balance))
            return cls(1.0 / np.bincount(classes)[classes], f"stream(balance={balance!r})", classes)
        if weights is None:
            return None
        if isinstance(weights, str):
            return cls(_numbers(weights, column(weights)), f"stream(weights={weights!r})")
        values = np.asarray(weights)
        if values.ndim == 1 and len(values) != chips:
            raise PlanError(
                "stream(weights=)", f"{len(values)} weights", f"one for each of the {chips} chips",
                "They follow the order of .table.",
            )  # fmt: skip
        return cls(values, "stream(weights=)")

    @cached_property
    def digest(self) -> str:
        """Tells these weights from others; goes into states."""
        return hashlib.sha256(self.values.astype("<f8").tobytes()).hexdigest()[:32]

    def counts(self, draw: float) -> NDArray[np.int64]:
        """Return how often each chip comes in one epoch, shape (chip,): as many in all as there are chips.

        Parameters
        ----------
        draw
            The epoch's random number, from 0 on and below 1.
        """
        n = len(self.values)
        ends = np.cumsum(self.values[self._order] / self.values.max())
        marks = np.floor(ends / ends[-1] * n + draw).astype(np.int64)
        # nothing is rounded past a chip of weight 0: where the sum does not grow, neither do the marks
        marks[ends == ends[-1]] = n
        counts = np.empty(n, dtype=np.int64)
        counts[self._order] = np.diff(marks, prepend=0)
        return counts


def _text(name: Any, argument: str) -> str:
    if not isinstance(name, str):
        raise PlanError(f"stream({argument}=)", repr(name), "the name of a column of the chip table")
    return name


def _numbers(name: str, column: pa.ChunkedArray) -> NDArray[Any]:
    import pyarrow as pa

    subject = f"stream(weights={name!r})"
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise PlanError(subject, f"a column of {column.type}", "numbers")
    _refuse_nulls(subject, column)
    return np.asarray(column.to_numpy())


def _classes(name: str, column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the number of each chip's class."""
    import pyarrow as pa

    subject = f"stream(balance={name!r})"
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    of = pa.types
    if not (of.is_integer(column.type) or of.is_boolean(column.type) or of.is_string(column.type)
            or of.is_large_string(column.type)):  # fmt: skip
        raise PlanError(
            subject, f"a column of {column.type}", "classes: text, whole numbers or booleans",
            "Give weights= numbers of your own.",
        )  # fmt: skip
    _refuse_nulls(subject, column)
    _, classes = np.unique(np.asarray(column.to_pylist()), return_inverse=True)
    return np.asarray(classes, dtype=np.int64)


def _refuse_nulls(subject: str, column: pa.ChunkedArray) -> None:
    if column.null_count:
        raise PlanError(
            subject, f"{column.null_count} nulls in {len(column)} chips", "a value for each chip",
            "Leave these chips out with filter(), or give weights= an array with 0 for them.",
        )  # fmt: skip
