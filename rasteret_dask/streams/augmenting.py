# SPDX-License-Identifier: Apache-2.0
"""A user's random changes of samples, drawn anew each epoch and the same on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Augment", "Augmenting"]

Augment: TypeAlias = "Callable[[Arrays, np.random.Generator], Arrays]"
"""Gets a sample, the arrays of one chip without the chip axis, and random numbers of its own; returns the sample."""


@dataclass(frozen=True, slots=True)
class Augmenting:
    """Changes each sample of a batch by a function, with random numbers that its id, the epoch and a seed settle."""

    function: Augment
    seed: int

    def __call__(self, batch: Arrays, epoch: int, copies: NDArray[np.int64]) -> Arrays:
        """Return the batch of changed samples.

        Parameters
        ----------
        batch
            Chips as arrays.
        epoch
            Number of the epoch.
        copies
            Shape (chip,). How often each chip came before in this epoch: each time it is changed otherwise.

        Raises
        ------
        PlanError
            When the function returns no sample, or samples of a batch that differ in names, shapes or dtypes.
        """
        out: Arrays = {}
        for at, (chip, copy) in enumerate(zip(batch["chip_id"].tolist(), copies.tolist(), strict=True)):
            sample = {name: values[at] for name, values in batch.items()}
            changed = self.function(sample, self.random(chip, epoch, copy))
            if not isinstance(changed, Mapping):
                raise PlanError(
                    "stream(augment=)", f"a function that returned a {type(changed).__name__}",
                    "one that returns the sample", "A function that changes a sample in place must return it too.",
                )  # fmt: skip
            if not at:
                out = {name: _like(value, len(copies)) for name, value in changed.items()}
            _put(out, changed, at, chip)
        return out

    def random(self, chip: str, epoch: int, copy: int = 0) -> np.random.Generator:
        """Return the random numbers of a sample."""
        words = np.frombuffer(hashlib.sha256(chip.encode()).digest()[:16], "<u4").tolist()
        key = np.random.SeedSequence([self.seed, epoch, copy, *words])
        return np.random.Generator(np.random.PCG64(key))


def _like(value: Any, size: int) -> NDArray[Any]:
    one = np.asarray(value)
    return np.empty((size, *one.shape), dtype=object if one.dtype.kind in "OU" else one.dtype)


def _put(out: Arrays, sample: Mapping[str, Any], at: int, chip: str) -> None:
    if sample.keys() != out.keys():
        odd = sorted(sample.keys() ^ out.keys())
        raise PlanError(
            "stream(augment=)", f"{', '.join(map(repr, odd))} in some samples only, not in that of chip {chip}"
            if odd[0] not in sample else f"{', '.join(map(repr, odd))} in the sample of chip {chip} only",
            "the same names in each sample of a batch", "Return all arrays, changed or not.",
        )  # fmt: skip
    for name, value in sample.items():
        one, wanted = np.asarray(value), out[name]
        if one.shape != wanted.shape[1:] or (wanted.dtype != object and one.dtype != wanted.dtype):
            raise PlanError(
                "stream(augment=)", f"{name!r} of shape {one.shape} and {one.dtype} for chip {chip}",
                f"{wanted.shape[1:]} and {wanted.dtype}, as for the first chip of its batch",
                "A crop has one size; random changes must keep shape and dtype.",
            )  # fmt: skip
        wanted[at] = value
