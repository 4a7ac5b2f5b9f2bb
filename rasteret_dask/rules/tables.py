# SPDX-License-Identifier: Apache-2.0
"""What stored numbers become, worked out once for all numbers of 8 and 16 bits: look-up tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.units import Unit

__all__ = ["Turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What turns the stored numbers of one asset into what one band of the output holds."""

    unit: Unit
    scaling: Radiometry
    store: StoredForm

    def write(
        self,
        place: NDArray[Any],
        stored: NDArray[Any],
        valid: NDArray[np.bool_] | None,
        span: tuple[float, float] | None = None,
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """Write stored numbers as the output holds them.

        Parameters
        ----------
        place
            Where they go, shape (y, x); of a unit that is finished over all bands at once, decoded values.
        stored
            Same shape, as they stand in the file.
        valid
            Same shape; None: all are. Other pixels become the fill.
        span
            A least and a greatest number between which the stored ones lie, where somebody has looked.

        Returns
        -------
        valid, clipped
            The validity (a number may have no value in a unit), None: all are; and where valid pixels were clipped,
            None: nowhere.
        """
        table = _table(
            self.unit, Radiometry(self.scaling.scale, self.scaling.offset, ""), self.store, stored.dtype.str
        )
        if table is None:
            return self._write(place, stored, valid)
        number = stored.view(f"u{stored.dtype.itemsize}")
        if place.flags.c_contiguous:
            np.take(table.values, number, out=place, mode="clip")
        else:
            place[...] = np.take(table.values, number, mode="clip")
        clipped = None
        if not table.is_plain(stored, span):
            if table.void is not None and (void := table.void[number]).any():
                valid = ~void if valid is None else valid & ~void
            if table.clipped is not None:
                clipped = table.clipped[number]
        return self._blanked(place, valid, clipped)

    def write_decoded(
        self, place: NDArray[Any], values: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """Write values that were decoded before their kernel, as :meth:`write` does."""
        if not self.unit.elementwise:
            place[...] = values
            return self._blanked(place, valid, None)
        values = self.unit.finish(values[None])[0]
        valid = valid & ~np.isnan(values)
        place[...] = self.store.encode(values, valid)
        return valid, self.store.clips(values) & valid

    def _write(
        self, place: NDArray[Any], stored: NDArray[Any], valid: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        values = self.unit.decode(stored, self.scaling)
        if self.unit.elementwise:
            values = self.unit.finish(values[None])[0]
        if values.dtype.kind == "f" and np.isnan(values).any():
            known = ~np.isnan(values)
            valid = known if valid is None else valid & known
        clipped = None
        if self.unit.elementwise:
            clipped = self.store.clips(values) if self.store.steps is not None else None
            values = self.store.encode(values, valid)
        place[...] = values
        return self._blanked(place, valid, clipped)

    def _blanked(
        self, place: NDArray[Any], valid: NDArray[np.bool_] | None, clipped: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        if valid is not None and not valid.all():
            fill = self.store.fill_value if self.unit.elementwise else np.nan
            np.copyto(place, place.dtype.type(fill), where=~valid)
        if clipped is not None and valid is not None:
            clipped = clipped & valid
        return valid, clipped if clipped is not None and clipped.any() else None


@dataclass(frozen=True, slots=True)
class _Table:
    """What every number of a stored type becomes."""

    values: NDArray[Any]
    """Shape (256,) or (65536,), by the number's bits read as unsigned."""
    clipped: NDArray[np.bool_] | None
    """Which numbers are clipped; None: none."""
    void: NDArray[np.bool_] | None
    """Which numbers have no value; None: none."""
    low: float
    """From here to ``high`` no number is clipped or void."""
    high: float

    def is_plain(self, stored: NDArray[Any], span: tuple[float, float] | None) -> bool:
        """Tell whether none of some numbers is clipped or void: two passes that cost a tenth of looking them up."""
        if self.clipped is None and self.void is None:
            return True
        if span is not None and self.low <= span[0] and span[1] <= self.high:
            return True
        return stored.size == 0 or bool(self.low <= stored.min() and stored.max() <= self.high)


@lru_cache(maxsize=512)
def _table(unit: Unit, scaling: Radiometry, store: StoredForm, stored: str) -> _Table | None:
    """Return the table of a rule, made by its own functions; None for types of more than 16 bits."""
    dtype = np.dtype(stored)
    if dtype.kind not in "iu" or dtype.itemsize > 2 or not dtype.isnative:
        return None
    numbers = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    values = unit.decode(numbers[None, None], scaling)
    if unit.elementwise:
        values = unit.finish(values)
    void = np.isnan(values[0, 0])
    clipped = store.clips(values)[0, 0] & ~void
    made = store.encode(values)[0, 0] if unit.elementwise else values[0, 0].astype(np.float32)
    order = np.argsort(numbers)
    odd = (clipped | void)[order]
    low, high = _longest_run(odd)
    ordered = numbers[order]
    bounds = (float(ordered[low]), float(ordered[high - 1])) if high > low else (np.inf, -np.inf)
    made.flags.writeable = False
    return _Table(made, clipped if clipped.any() else None, void if void.any() else None, *bounds)


def _longest_run(odd: NDArray[np.bool_]) -> tuple[int, int]:
    """Return begin and end of the longest run of False."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], odd, [True]]).astype(np.int8)))
    begin, end = edges[::2], edges[1::2]
    if not len(begin):
        return 0, 0
    best = int(np.argmax(end - begin))
    return int(begin[best]), int(end[best])
