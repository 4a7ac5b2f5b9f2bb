# SPDX-License-Identifier: Apache-2.0
"""What pixels must fulfil for their chip to be kept, as frozen values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.functions import Function

__all__ = ["Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A chip is kept where all hold that are said."""

    min_valid: float | None = None
    """Smallest share of valid pixels, over the slots that have records."""
    max_cloud: float | None = None
    """Largest share of clouds and their shadows among the pixels that a quality band knows, over all slots."""
    function: Function | None = None
    """Tells of pixels (chip, time, band, y, x) which chips to keep."""
    source: str | None = None
    """The joined source they speak of; None: each that they can be told of."""
    min_labelled: float | None = field(default=None, metadata={"later": True})
    """Smallest share of the mask's pixels that have a label."""

    def __post_init__(self) -> None:
        shares = ("min_valid", "max_cloud", "min_labelled")
        if self.function is None and all(getattr(self, name) is None for name in shares):
            expected = "a function, min_valid=, max_cloud= or min_labelled="
            raise PlanError("filter_pixels", "nothing to go by", expected)
        for name in shares:
            share = getattr(self, name)
            good = not isinstance(share, bool) and isinstance(share, int | float) and math.isfinite(share)
            if share is not None and not (good and 0 <= share <= 1):
                raise PlanError(f"filter_pixels({name}=)", repr(share), "a share from 0 to 1")

    @property
    def words(self) -> str:
        """The rule in words."""
        function = None if self.function is None else self.function.name
        parts = {
            "min_valid": self.min_valid, "max_cloud": self.max_cloud, "min_labelled": self.min_labelled,
            "function": function,
        }  # fmt: skip
        text = ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)
        return f"{text} of {self.source}" if self.source else text

    @classmethod
    def of(
        cls,
        function: Callable[..., Any] | None,
        min_valid: float | None,
        max_cloud: float | None,
        source: str | None,
        version: str | None,
        min_labelled: float | None = None,
    ) -> Rule:
        """Describe what a user gave to ``filter_pixels``.

        Raises
        ------
        PlanError
            When that is nothing, no share, or a function that cannot be told by its text.
        """
        if function is not None and not callable(function):
            raise PlanError("filter_pixels(predicate)", repr(function), "a function of a DataArray")
        known = None if function is None else Function.of(function, version)
        return cls(min_valid, max_cloud, known, source, min_labelled)
