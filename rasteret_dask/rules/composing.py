# SPDX-License-Identifier: Apache-2.0
"""From stored numbers of records to the pixels of one slot: the steps that chips and cubes take in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.masks import Mask
from rasteret_dask.rules.picks import Scored
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.radiometry import Radiometry

__all__ = [
    "DecodedLayer",
    "Front",
    "StoredBand",
    "by_score",
    "clear",
    "composed",
    "decoded",
    "filled",
    "hidden",
    "picked",
]


@dataclass(frozen=True, slots=True)
class StoredBand:
    """One band of one record over one window, as a reader gives it."""

    values: NDArray[Any]
    """Shape (y, x). Stored numbers; decoded ones where ``is_decoded``."""
    valid: NDArray[np.bool_]
    """Shape (y, x)."""
    scaling: Radiometry
    """The record's own."""
    is_decoded: bool = False
    """Whether the reader has decoded it, before its kernel."""


@dataclass(frozen=True, slots=True)
class DecodedLayer:
    """Decoded pixels of one record over one window, or of several records that fill each other."""

    values: NDArray[Any]
    """Shape (band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (band, y, x). True where the pixel is valid and not hidden."""
    filled: NDArray[np.bool_] | None = None
    """Same shape. True where another acquisition than the best gave the pixel; None: nowhere."""


@dataclass(frozen=True, slots=True)
class Front:
    """Pixels of one window while layers are laid behind each other: what is valid in front stays."""

    values: NDArray[Any]
    """Shape (band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (band, y, x)."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing behind it is to be seen."""
        return bool(self.valid.all())

    def behind(self, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Lay a layer behind, in place: it fills, band by band, what is invalid. Return where it is seen.

        Bands that only have a meaning together are taken together: they are valid together in each layer.
        """
        take = np.asarray(valid & ~self.valid)
        np.copyto(self.values, values, where=take, casting="unsafe")
        np.logical_or(self.valid, take, out=self.valid)
        return take


def decoded(
    rules: PixelRules,
    bands: Sequence[StoredBand | None],
    shape: tuple[int, int],
    hidden_at: NDArray[np.bool_] | None = None,
) -> DecodedLayer:
    """Decode and mask one record.

    Parameters
    ----------
    bands
        Per band of the rules; None: the record has nothing there.
    shape
        (y, x).
    hidden_at
        Shape (y, x). True where the record's mask hides; see :func:`hidden`.
    """
    values = np.zeros((len(bands), *shape), dtype=rules.decoded_dtype())
    valid = np.zeros(values.shape, dtype=bool)
    for at, (unit, band) in enumerate(zip(rules.units, bands, strict=True)):
        if band is None:
            continue
        made = band.values if band.is_decoded else unit.decode(band.values, band.scaling)
        values[at] = made
        valid[at] = band.valid
        if made.dtype.kind in "fc":  # a number may have no value in a unit
            valid[at] &= ~np.isnan(made)
    if hidden_at is not None:
        valid &= ~hidden_at
    rules.joint(valid)
    return DecodedLayer(values, valid)


def hidden(
    mask: Mask, stored: Sequence[NDArray[Any]], valid: Sequence[NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Return where a mask hides a record's pixels; shapes (y, x), one array for each band that the mask needs.

    A quality band's invalid pixels hide nothing.
    """
    return np.asarray(np.logical_and.reduce(valid) & mask.hidden(*stored))


def clear(
    mask: Mask | None, stored: Sequence[NDArray[Any]], valid: Sequence[NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Return where a record is valid and not hidden as far as some of its bands tell; shapes (y, x).

    Parameters
    ----------
    mask
        None: nothing is hidden.
    stored, valid
        The bands that the mask needs, else those that an acquisition is scored by.
    """
    known = np.asarray(np.logical_and.reduce(valid))
    return known if mask is None else known & ~mask.hidden(*stored)


def by_score(pick: Scored, shown: Sequence[NDArray[np.bool_]]) -> tuple[int, ...]:
    """Return the numbers of acquisitions, the best first; of equals the earlier.

    Parameters
    ----------
    shown
        Per acquisition, shape (y, x): where any of its records is clear, over all of the ground that is scored.
    """
    scores = np.array([pick.score(one) for one in shown])
    return tuple(np.argsort(-scores, kind="stable").tolist())


def filled(rules: PixelRules, layers: Iterable[DecodedLayer], finish: bool) -> Front | None:
    """Return layers laid one behind the other, as far as they are to be seen.

    Parameters
    ----------
    layers
        Decoded, the first in front; its arrays may be written to.
    finish
        Whether to finish each layer first. Then a number that has no value in its unit is filled too.

    Returns
    -------
    Front or None
        None where there is no layer.
    """
    front: Front | None = None
    for layer in layers:
        values, valid = rules.finish(layer.values, layer.valid) if finish else (layer.values, layer.valid)
        if front is None:
            front = Front(np.require(values, requirements="W"), valid)
        else:
            front.behind(values, valid)
        if front.is_complete:
            break
    return front


def picked(
    rules: PixelRules, best: Iterable[DecodedLayer], others: Iterable[DecodedLayer] = ()
) -> DecodedLayer | None:
    """Return the finished pixels of a slot that takes them as they stand.

    Parameters
    ----------
    best
        Of the best acquisition, the record that is nearest to the window first; its arrays may be written to.
    others
        Those of the next best, where the pick fills: they lie behind.
    """
    front = filled(rules, best, finish=True)
    if front is None:
        return None
    filled_at: NDArray[np.bool_] | None = None
    rest = iter(others)
    while not front.is_complete and (layer := next(rest, None)) is not None:
        take = front.behind(*rules.finish(layer.values, layer.valid))
        filled_at = take if filled_at is None else np.logical_or(filled_at, take, out=filled_at)
    return DecodedLayer(front.values, front.valid, filled_at)


def composed(
    rules: PixelRules, acquisitions: Iterable[tuple[int, Iterable[DecodedLayer]]]
) -> DecodedLayer | None:
    """Return the finished pixels of a slot that are made of all its acquisitions.

    Parameters
    ----------
    acquisitions
        In order of their start: (rank, layers). Rank 0 is the nearest to the slot's middle; the record that is
        nearest to the window comes first among the layers.
    """
    composition, is_empty = rules.begin(), True
    for rank, layers in acquisitions:
        one = filled(rules, layers, finish=False)
        if one is not None:
            composition.add(one.values, one.valid, rank)
            is_empty = False
    return None if is_empty else DecodedLayer(*rules.finish(*composition.result()))
