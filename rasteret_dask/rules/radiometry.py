# SPDX-License-Identifier: Apache-2.0
"""How stored numbers become physical values in one record: a scale and an offset."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Radiometry"]


@dataclass(frozen=True, slots=True)
class Radiometry:
    """How DN become physical values in one record: ``value = DN x scale + offset``."""

    scale: float
    offset: float
    rule: str
    """Where the two numbers come from, in words; shown by ``explain()`` and kept in the output's attributes."""
