# SPDX-License-Identifier: Apache-2.0
"""Invalid pixels of class bands become the number that a loss ignores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import is_number
from rasteret_dask.tasks.batches import Arrays, SourcePixels

__all__ = ["Ignoring"]


@dataclass(frozen=True, slots=True)
class Ignoring:
    """Puts a number in the place of invalid pixels of class bands; measured bands and bit fields stay."""

    index: int
    bands: tuple[tuple[str, tuple[int, ...]], ...]
    """(source, numbers of its class bands)."""

    @classmethod
    def of(cls, index: int, pixels: Mapping[str, SourcePixels]) -> Ignoring:
        """Return what ``ignore_index=`` asks for.

        Parameters
        ----------
        index
            The number, such as torch's -100.
        pixels
            Source -> what its pixels are.

        Raises
        ------
        PlanError
            When it is no whole number, no source has a band of classes, or none of NumPy's types holds it beside the
            codes of one.
        """
        if not is_number(index) or int(index) != index:
            raise PlanError("ignore_index=", repr(index), "a whole number, such as -100 or 255")
        bands = {
            name: tuple(n for n, kind in enumerate(own.rules()) if kind.ignored)
            for name, own in pixels.items()
        }
        if not any(bands.values()):
            stated = [
                f"{name}: {', '.join(k.kind or 'unknown' for k in own.kinds) or 'unknown'}"
                for name, own in pixels.items()
            ]
            raise PlanError(
                f"ignore_index={index}",
                f"no band of kind class ({'; '.join(stated)})",
                "at least one",
                "Say which hold classes: harmonize(kinds={'map': 'class'}).",
            )
        for name in (name for name, own in bands.items() if own):
            dtype = np.dtype(pixels[name].dtype)
            if dtype.kind in "iu" and _with(index, dtype).kind == "f":
                raise PlanError(
                    f"ignore_index={index}", f"classes of {dtype} in source {name!r}, which floats would round",
                    f"a number that {dtype} holds", f"Choose one that no class has: {np.iinfo(dtype).max}.",
                )  # fmt: skip
        return cls(int(index), tuple((name, own) for name, own in bands.items() if own))

    def __call__(self, arrays: Arrays) -> Arrays:
        """Return chips with the number in place; a dtype that cannot hold it becomes the narrowest that can."""
        result = dict(arrays)
        for name, bands in self.bands:
            if name not in arrays:
                continue
            values, valid = arrays[name], arrays[f"{name}/valid"]
            dtype = _with(self.index, values.dtype)
            filled = values.astype(dtype, copy=False)  # a batch is new: nobody else has it
            for band in bands:
                np.copyto(filled[:, :, band], dtype.type(self.index), where=~valid)
            result[name] = filled
        return result


def _with(index: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the narrowest type that holds a number beside those of a type."""
    return np.result_type(dtype, np.min_scalar_type(int(index)))
