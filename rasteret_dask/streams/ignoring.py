"""Invalid pixels of class bands become the number that a loss ignores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
            When it is no whole number, or no source has a band of classes.
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
        return cls(int(index), tuple((name, own) for name, own in bands.items() if own))

    def __call__(self, arrays: Arrays) -> Arrays:
        """Return chips with the number in place; a dtype that cannot hold it becomes the narrowest that can."""
        result = dict(arrays)
        for name, bands in self.bands:
            if name not in arrays:
                continue
            values, valid = arrays[name], arrays[f"{name}/valid"]
            dtype = np.result_type(values.dtype, np.min_scalar_type(self.index))
            filled = values.astype(dtype, copy=False)  # a batch is new: nobody else has it
            for band in bands:
                np.copyto(filled[:, :, band], dtype.type(self.index), where=~valid)
            result[name] = filled
        return result
