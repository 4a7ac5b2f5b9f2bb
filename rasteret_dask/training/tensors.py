# SPDX-License-Identifier: Apache-2.0
"""Chips as torch tensors, under the names that TorchGeo knows where these are asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs

with needs("torch", "chips as tensors"):
    import torch

__all__ = ["Sample", "as_tensors", "check_image"]

Sample: TypeAlias = "dict[str, Any]"

_WIDER = {"uint16": "int32", "uint32": "int64", "datetime64[us]": "int64"}
"""NumPy's dtypes that torch cannot compute with -> the narrowest that holds all values."""


def as_tensors(arrays: Mapping[str, Any], image: str | None = None) -> Sample:
    """Return chips as torch tensors, which share the arrays' memory where they have the same dtype.

    Parameters
    ----------
    arrays
        A batch of a stream, or one chip of it. uint16 becomes int32 (as TorchGeo does), uint32 int64, and times
        int64 microseconds since 1970 (the smallest int64 where there is none); text becomes lists.
    image
        The source whose pixels TorchGeo's transforms and trainers are to find: ``<source>`` is called ``image``,
        without its time axis where that has one entry, and ``<source>/<name>`` just ``<name>``. Whole numbers of
        ``mask``, rasterized or joined as a source of that name, become int64, as ``cross_entropy`` asks; a joined
        one loses its time and its band axis where they have one entry. None: names and shapes stay.

    Raises
    ------
    PlanError
        When there is no such source, or two entries would have the same name.

    Examples
    --------
    >>> from rasteret_dask.torchdata import as_tensors
    >>> batch = next(chips.stream(batch_size=8))
    >>> as_tensors(batch, image="s2")["image"].shape
    torch.Size([8, 3, 2, 32, 32])
    """
    if image is None:
        return {name: _tensor(values) for name, values in arrays.items()}
    check_image(image, [name for name, values in arrays.items() if np.ndim(values) >= 4 and "/" not in name])
    sample: Sample = {}
    for name, values in arrays.items():
        group, _, variable = name.partition("/")
        known = name if group != image else variable or "image"
        if known in sample:
            raise _twice(known, image)
        tensor = _tensor(values)
        # axes are counted from the last one, as a chip axis may stand before them
        if name == image:
            tensor = _without(tensor, -4)
        elif name == "mask":
            tensor = _without(_without(tensor, -4), -3)
        elif known == "valid" != name:
            tensor = _without(tensor, -3)
        burned = known == "mask" or (group == image and known.startswith("mask_"))
        whole = burned and not tensor.is_floating_point()
        sample[known] = tensor.long() if whole else tensor
    return sample


def check_image(image: str, sources: Collection[str]) -> None:
    """Raise PlanError where ``image`` is none of the sources, or another one has the name that it gets."""
    if image not in sources:
        raise PlanError("image=", repr(image), f"one of {', '.join(sources)}")
    if image != "image" and "image" in sources:
        raise _twice("image", image)


def _twice(name: str, image: str) -> PlanError:
    return PlanError(
        f"image={image!r}", f"two entries named {name!r}", "one",
        f"Give the source {name!r} another name in rd.join(...), or leave image= out and name them by transforms=.",
    )  # fmt: skip


def _without(tensor: Any, axis: int) -> Any:
    return tensor.squeeze(axis) if tensor.shape[axis] == 1 else tensor


def _tensor(values: Any) -> Any:
    array = np.asarray(values)
    if array.dtype.kind in "OU":
        return array.tolist()
    # one copy at most, whatever is wrong with it: torch warns of memory that cannot be written to
    return torch.from_numpy(np.require(array, _WIDER.get(array.dtype.name), ["C", "W"]))
