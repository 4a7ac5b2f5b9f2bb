# SPDX-License-Identifier: Apache-2.0
"""What sources and splits may be called: their names stand in batches, and are nodes of a store."""

from __future__ import annotations

from collections.abc import Iterable

from rasteret_dask.errors import PlanError

__all__ = ["SPLIT_OPTIONS", "check_names", "check_split_names", "in_order"]

SPLIT_OPTIONS = ("seed", "by", "buffer_m", "boundary", "stratify", "cells", "gap", "date")
"""What ``Chips.split`` takes beside the names of splits."""

_FIRST = ("train", "val", "test")

_NO_NODE = r'\/:*?"<>|#%'
"""Zarr, file systems and URLs do without these in a name."""

_FILES = ("chips.parquet", "manifest.parquet", "zarr.json")
"""What else lies where a store has a group a split."""

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


def check_split_names(names: Iterable[str], step: str) -> None:
    """Raise PlanError where a split's name is none for a group of Zarr, an option of ``split``, or like another's."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if name in SPLIT_OPTIONS:
            why = f"another name: {', '.join(SPLIT_OPTIONS)} are options of split"
        elif name in _FILES or not _is_node(name):
            why = f"a name of a Zarr group: not empty, none of {' '.join(_NO_NODE)}, no _ and no dot in front"
        elif other != name:
            why = f"names that differ by more than case, as folders do: {other!r} is one too"
        else:
            continue
        of_column = f"Give it another one: split(by=..., part=[{name!r}])." if "by=" in step else ""
        raise PlanError(step, f"a split called {name!r}", why, of_column)


def _is_node(name: str) -> bool:
    return bool(name.strip()) and name[0] not in "_." and name.isprintable() and not set(_NO_NODE) & set(name)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of splits as every plan, table and map lists them: train, val, test, then numbers, then texts."""

    def place(name: str) -> tuple[int, int, str]:
        if name in _FIRST:
            return 0, _FIRST.index(name), ""
        return (1, int(name), name) if name.isdecimal() and name.isascii() else (2, 0, name)

    return tuple(sorted(set(names), key=place))
