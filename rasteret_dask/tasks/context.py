# SPDX-License-Identifier: Apache-2.0
"""What a process has for a job beside its tables: the user's functions, and what becomes of tiles it cannot read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

import xarray as xr

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.functions import Function
from rasteret_dask.words import OnError

__all__ = ["Functions", "ReadContext"]

Functions: TypeAlias = "Mapping[Function, Callable[[xr.DataArray], xr.DataArray]]"
"""What a plan's functions are in this process."""


@dataclass(frozen=True, slots=True)
class ReadContext:
    """What every shard of a job is read with.

    Raises
    ------
    PlanError
        When ``on_error`` is none of its words.
    """

    functions: Functions = field(default_factory=dict)
    """The user's functions that the job's maps and rules name."""
    on_error: OnError = "raise"
    """What becomes of a tile that cannot be read: an error, or (``"mask"``) invalid pixels."""

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise PlanError("on_error=", repr(self.on_error), "'raise' or 'mask'")

    @property
    def suffix(self) -> str:
        """What keys of tasks end in, where tiles are not read as usual: other pixels need other keys."""
        return "" if self.on_error == "raise" else f"-{self.on_error}"
