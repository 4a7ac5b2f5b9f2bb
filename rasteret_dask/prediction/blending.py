# SPDX-License-Identifier: Apache-2.0
"""Predictions of overlapping chips become one map: sums of one block at a time, in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.net.lending import Lender

__all__ = ["Blend", "Canvas", "check_blend", "pixel_bytes", "weights"]

Blend: TypeAlias = Literal["hann", "mean", "max", "centre"]
"""What becomes of several predictions of a pixel: their mean, weighted by a Hann window over each chip; their plain
mean; the highest of each class or value; or the one of the chip whose centre is nearest."""


def check_blend(blend: str) -> None:
    """Raise PlanError where a word is none of :data:`Blend`."""
    if blend not in get_args(Blend):
        raise PlanError("predict(blend=)", repr(blend), ", ".join(map(repr, get_args(Blend))))


@lru_cache(maxsize=8)
def weights(blend: Blend, side: int) -> NDArray[np.float32]:
    """Return what each pixel of a chip counts, shape (y, x).

    ``"hann"``: the product of two Hann windows, sin^2(pi (i + 1/2) / side), which no pixel leaves without weight.
    ``"centre"``: the nearer to the chip's centre, the more: minus the squared distance, in quarters of pixels, exact.
    """
    if blend == "hann":
        line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
        result = np.outer(line, line)
    elif blend == "centre":
        steps = (2 * np.arange(side) - (side - 1)) ** 2
        result = -(steps[:, None] + steps[None, :])
    else:
        result = np.ones((side, side))
    result = result.astype(np.float32)
    result.flags.writeable = False
    return result


def pixel_bytes(channels: int, is_flat: bool) -> int:
    """Return the bytes that a canvas holds for each pixel, with what it becomes: all channels, or one class."""
    return 4 * channels + 4 + 2 + 2 + (4 + 2 + 2 if is_flat else 4 * channels)


class Canvas:
    """One block of a map, while predictions of chips are put onto it.

    Chips are put in the order of the chip table, whatever the blocks: so a pixel's sum is the same in any block.

    Parameters
    ----------
    blend
        What becomes of several predictions of a pixel.
    channels
        Numbers of a pixel.
    shape
        Pixels of the block: y, x.
    memory
        Where the numbers lie.
    """

    def __init__(self, blend: Blend, channels: int, shape: tuple[int, int], memory: Lender) -> None:
        self._blend, self._shape = blend, shape
        self._total = memory.array((channels, *shape), np.float32)
        self._total.fill(-np.inf if blend == "max" else 0.0)
        self._weight = np.full(shape, -np.inf if blend == "centre" else 0.0, dtype=np.float32)
        self._scratch = np.empty(0, dtype=np.float32)
        self.count = np.zeros(shape, dtype=np.uint16)
        """Shape (y, x). Chips that a pixel's number is made of."""
        self.inputs = np.zeros(shape, dtype=np.uint16)
        """Shape (y, x). Valid inputs (source, slot) of the chip that has most of them."""

    def put(
        self, values: NDArray[np.float32], inputs: NDArray[np.uint16], least: int, row: int, col: int
    ) -> None:
        """Put the prediction of one chip.

        Parameters
        ----------
        values
            Shape (channel, y, x).
        inputs
            Shape (y, x). Valid inputs of each pixel.
        least
            Valid inputs that a pixel must have; what the model says of others does not count.
        row, col
            Of its north-west corner in the block; a chip may reach beyond the block on all sides.
        """
        high, wide = inputs.shape
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + high, self._shape[0]), min(col + wide, self._shape[1])
        if top >= bottom or left >= right:
            return
        here = (slice(top, bottom), slice(left, right))
        own = (slice(top - row, bottom - row), slice(left - col, right - col))
        own_inputs = inputs[own]
        valid = own_inputs >= least
        np.maximum(self.inputs[here], own_inputs, out=self.inputs[here])
        self.count[here] += valid
        part, total = values[(slice(None), *own)], self._total[(slice(None), *here)]
        weight = weights(self._blend, high)[own]
        if self._blend == "max":
            np.maximum(total, part, out=total, where=valid)
        elif self._blend == "centre":
            nearer = valid & (weight > self._weight[here])
            np.copyto(total, part, where=nearer)
            np.copyto(self._weight[here], weight, where=nearer)
        else:
            if not valid.all():
                weight = np.where(valid, weight, np.float32(0.0))
                part = np.where(valid, part, np.float32(0.0))
            if (
                self._scratch.size < part.size
            ):  # memory that is there costs less than new memory for each chip
                self._scratch = np.empty(part.size, dtype=np.float32)
            weighted = self._scratch[: part.size].reshape(part.shape)
            np.multiply(part, weight, out=weighted)
            total += weighted
            self._weight[here] += weight

    def blended(self) -> NDArray[np.float32]:
        """Return the numbers, shape (channel, y, x), NaN where no chip has said any; the canvas is used up."""
        missing = self.count == 0
        if self._blend not in ("max", "centre"):
            np.divide(self._total, self._weight, out=self._total, where=~missing)
        self._total[:, missing] = np.nan
        return self._total
