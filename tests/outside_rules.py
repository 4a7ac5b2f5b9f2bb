"""Rules that are nobody's but a user's: one of each, in a module that every process can import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.masks import Mask
from rasteret_dask.rules.picks import Candidates, Composed, Ranked, Scored
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.units import Unit

Array = NDArray[Any]


@dataclass(frozen=True)
class Medoid(Composed):
    """The acquisition's pixel that is nearest to the median of each band: bands stay together."""

    def blend(self, stack: Array, valid: Array) -> tuple[Array, Array]:
        """Return the chosen pixels; only those count that are valid in all bands."""
        whole: Array = np.asarray(valid.all(axis=1))
        seen = np.where(whole[:, None], stack.astype(np.float64), np.nan)
        some = whole.any(axis=0)
        middle = np.nanmedian(np.where(some, seen, 0.0), axis=0)
        far = np.where(whole, np.square(seen - middle).sum(axis=1), np.inf)
        chosen = far.argmin(axis=0)[None, None]
        return np.take_along_axis(stack, chosen, axis=0)[0], np.broadcast_to(some, stack.shape[1:])


@dataclass(frozen=True)
class CloudThenLast(Ranked):
    """The latest of those with at most so many clouds, then the others by cloud."""

    most: float = 20.0
    fill: bool = False

    def order(self, candidates: Candidates) -> Array:
        """Return the place in that order."""
        cloudy = candidates.cloud > self.most
        place = np.empty(len(cloudy))
        place[np.lexsort((-candidates.start, np.where(cloudy, candidates.cloud, 0.0), cloudy))] = np.arange(
            len(cloudy)
        )
        return place


@dataclass(frozen=True)
class ClearMiddle(Scored):
    """The one with the most clear pixels in the middle of the chip."""

    fill: bool = False

    def score(self, clear: Array) -> float:
        """Count clear pixels of the inner half."""
        rows, cols = clear.shape
        return float(clear[rows // 4 : -(rows // 4), cols // 4 : -(cols // 4)].sum())


@dataclass(frozen=True)
class DarkWater(Mask):
    """Water by one band where another is dark: needs two bands."""

    below: int = 2000

    @property
    def needs(self) -> tuple[str, ...]:
        """The class band and the measured one."""
        return ("scl", "b")

    def hidden(self, *stored: Array) -> Array:
        """Return where it is water and dark."""
        classes, dark = stored
        return np.asarray((classes == 6) & (dark < self.below))


@dataclass(frozen=True)
class Feet(Unit):
    """Heights that are stored in tenths of a foot, as metres."""

    name = "metres"
    steps = 10.0
    per_foot: float = 0.3048

    def decode(self, stored: Array, scaling: Radiometry) -> Array:
        """Return metres; heights below -250 feet mean nothing."""
        feet = stored.astype(np.float64) / 10
        return np.where(feet < -250, np.nan, feet * self.per_foot).astype(np.float32)


@dataclass(frozen=True)
class Share(Unit):
    """Each band's share of the sum of all: needs all bands at once."""

    name = "share"
    elementwise = False

    def decode(self, stored: Array, scaling: Radiometry) -> Array:
        """Return the numbers, none below zero."""
        return np.maximum(stored, 0).astype(np.float32)

    def finish(self, values: Array) -> Array:
        """Return shares; NaN where the sum is zero."""
        total = values.sum(axis=0, dtype=np.float64)
        return (values / np.where(total > 0, total, np.nan)).astype(np.float32)
