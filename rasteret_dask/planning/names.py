# SPDX-License-Identifier: Apache-2.0
"""What sources may be called: their names stand among the entries of a batch and the nodes of a store."""

from __future__ import annotations

from collections.abc import Iterable

from rasteret_dask.errors import PlanError

__all__ = ["check_names"]

_TAKEN = ("bbox", "chip_id", "epsg", "image", "labels", "padded", "split")


def check_names(names: Iterable[str], step: str) -> None:
    """Raise PlanError where a source's name would hide something else of a batch, or is none for a node."""
    for name in names:
        if name in _TAKEN or not name or "/" in name or name.startswith("."):
            raise PlanError(
                step,
                f"a source called {name!r}",
                f"another name: not empty, without /, none of {', '.join(_TAKEN)}",
                "Say join(name=...), or give the collection another name.",
            )
