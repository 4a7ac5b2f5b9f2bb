# SPDX-License-Identifier: Apache-2.0
"""The stored form of a source: its type, what invalid pixels hold, and how values become integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.values import RuleValue

__all__ = ["StoredForm"]


@dataclass(frozen=True, slots=True)
class StoredForm(RuleValue):
    """How a source's values are stored."""

    dtype: str
    """NumPy name."""
    fill: Any
    """What invalid pixels hold; None: NaN."""
    steps: float | None = None
    """Integers a unit: stored = round(value x steps); None: values are stored as they are."""

    @property
    def fill_value(self) -> Any:
        """What invalid pixels hold, a NumPy scalar of the type."""
        dtype = np.dtype(self.dtype)
        return dtype.type(np.nan if self.fill is None else self.fill)

    @property
    def scale_factor(self) -> float | None:
        """Value of one stored integer; None where values are stored as they are."""
        return None if self.steps is None else 1.0 / self.steps

    @property
    def span(self) -> tuple[int, int]:
        """The least and the greatest integer that a valid pixel becomes."""
        limits = np.iinfo(self.dtype)
        low, high = int(limits.min), int(limits.max)
        return (low + 1, high) if self.fill == low else (low, high - 1) if self.fill == high else (low, high)

    def encode(self, values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """Return values in their stored form; same shape.

        Parameters
        ----------
        values
            Values in the band's unit.
        valid
            Where they are valid; None: where they are not NaN. Other pixels become the fill.
        """
        dtype = np.dtype(self.dtype)
        whole = dtype.kind in "iu" and values.dtype.kind == "f"
        if valid is None and values.dtype.kind == "f" and self.fill is not None:
            valid = ~np.isnan(values)
        if whole:
            span = _floats_in(dtype) if self.steps is None else self.span
            values = np.clip(self._rounded(values if valid is None else np.where(valid, values, 0)), *span)
        if valid is None:
            return values.astype(dtype, copy=False)
        return np.where(valid, values, self.fill_value).astype(dtype, copy=False)

    def clips(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where values lie outside of what can be stored; same shape."""
        if self.steps is None:
            return np.zeros(values.shape, dtype=bool)
        numbers, (low, high) = self._rounded(values), self.span
        return np.asarray((numbers < low) | (numbers > high))

    def _rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.steps is None:
            return np.asarray(np.rint(values))
        return np.asarray(np.rint(values.astype(np.float64) * self.steps))


def _floats_in(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the least and the greatest float that an integer type holds: 2**63 - 1 is none."""
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    top = float(high)
    return float(low), top if int(top) <= high else float(np.nextafter(top, 0.0))
