# SPDX-License-Identifier: Apache-2.0
"""Chips become what a model is called with, and what it was called with becomes text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.lists import listed
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Inputs", "ModelInputs", "chips_of", "described", "joined", "repeated", "rows_of", "tree_map"]

Inputs: TypeAlias = Any
"""An array with chips along axis 0; or a dict, tuple or list of such, and of values that all chips share."""


@dataclass(frozen=True)
class ModelInputs:
    """What is done to a batch before the model gets it, on the thread that has read its chips."""

    normalize: Callable[[Arrays], Arrays] | None = None
    """As a stream's: gets and returns a batch."""
    fill: float = 0.0
    """What invalid pixels become, after that."""
    function: Callable[[Arrays], Inputs] | None = None
    """Makes the model's inputs of the batch; None: the sources' pixels."""
    bands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Source -> its bands, for messages; those that are lacking are not named."""

    def __call__(self, arrays: Arrays) -> Inputs:
        """Return what the model is called with, of some chips.

        Raises
        ------
        PlanError
            When ``fill`` is no number of the pixels' type, or the inputs have another number of chips.
        """
        batch = dict(arrays) if self.normalize is None else dict(self.normalize(arrays))
        sources = sources_of(batch)
        for name in sources:
            batch[name] = self._filled(name, batch)
        if self.function is not None:
            inputs = tree_map(_array, self.function(batch))
            self._check(inputs, len(arrays["chip_id"]))
            return inputs
        pixels = {name: _without_time(batch[name]) for name in sources}
        return pixels if len(pixels) > 1 else next(iter(pixels.values()))

    def _filled(self, name: str, batch: Arrays) -> NDArray[Any]:
        """Return the pixels of a source with ``fill`` where they are invalid."""
        pixels = batch[name]
        if pixels.dtype.kind in "iu" and not _holds(pixels.dtype, self.fill):
            raise PlanError(
                f"Model(fill={self.fill:g}) of source {name!r}", f"pixels of {pixels.dtype}, which has no such number",
                f"a number of {pixels.dtype}", "Choose another one, or have floats: harmonize(dtype='float32').",
            )  # fmt: skip
        valid = batch[f"{name}/valid"]
        floats = pixels.dtype.kind == "f"
        # a sum is finite where all numbers are: one pass without memory of its own
        if valid.all() and (not floats or np.isfinite(pixels.sum())):
            return pixels
        invalid = ~valid[:, :, None]
        if floats:
            invalid = invalid | ~np.isfinite(pixels)
        if not invalid.any():
            return pixels
        return np.where(invalid, pixels.dtype.type(self.fill), pixels)

    def _check(self, inputs: Inputs, chips: int) -> None:
        for values in leaves(inputs):
            if values.ndim and len(values) != chips:
                raise PlanError(
                    "Model(inputs=)", f"an array of shape {values.shape} for {chips} chips", "chips along axis 0",
                    "What all chips share is a number or a text, or belongs into the model.",
                )  # fmt: skip

    def words(self, inputs: Inputs, arrays: Arrays) -> str:
        """Return what the model was called with: types, shapes, and what the sources' bands are."""
        sources = [
            f"{name} with bands {listed(self.bands[name], 'bands')}" if name in self.bands else name
            for name in sources_of(arrays)
        ]
        return f"{described(inputs)} of {'; '.join(sources)}"


def sources_of(arrays: Arrays) -> list[str]:
    """Return the names of the sources whose pixels a batch has."""
    return [name for name, values in arrays.items() if values.ndim == 5 and "/" not in name]


def _without_time(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    span = np.iinfo(dtype)
    return bool(value == round(value) and span.min <= value <= span.max) if np.isfinite(value) else False


def _array(value: Any) -> Any:
    """Return a tensor as an array; what has no axes stays what it is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return value


# Trees of arrays


def tree_map(function: Callable[[Any], Any], tree: Inputs) -> Inputs:
    """Return a tree of what a function makes of each leaf."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return tuple(tree_map(function, value) for value in tree)
    return function(tree)


def leaves(tree: Inputs) -> Iterator[NDArray[Any]]:
    """Yield the arrays of a tree."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
    elif isinstance(tree, np.ndarray):
        yield tree


def chips_of(tree: Inputs) -> int:
    """Return how many chips a tree's arrays have."""
    return next(len(values) for values in leaves(tree) if values.ndim)


def rows_of(tree: Inputs, start: int, stop: int) -> Inputs:
    """Return some of the chips, as views."""
    return tree_map(lambda leaf: leaf[start:stop] if _is_of_chips(leaf) else leaf, tree)


def joined(trees: Sequence[Inputs]) -> Inputs:
    """Return the chips of several trees of the same kind, one after another."""
    if len(trees) == 1:
        return trees[0]
    first = trees[0]
    if isinstance(first, dict):
        return {key: joined([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(column) for column in zip(*trees, strict=True))
    return np.concatenate(trees) if _is_of_chips(first) else first


def repeated(tree: Inputs, count: int) -> Inputs:
    """Return a tree with its last chip repeated, so that there are ``count``."""
    return tree_map(
        lambda leaf: (
            np.concatenate([leaf, np.repeat(leaf[-1:], count - len(leaf), axis=0)])
            if _is_of_chips(leaf) and len(leaf) < count
            else leaf
        ),
        tree,
    )


def _is_of_chips(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.ndim > 0


def described(tree: Inputs) -> str:
    """Return the types and shapes of a tree: ``float32 (16, 2, 256, 256)``."""
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "(" + ", ".join(described(value) for value in tree) + ")"
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    return f"{tree!r:.40}" if isinstance(tree, int | float | str) or tree is None else type(tree).__name__
