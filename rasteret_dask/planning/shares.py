# SPDX-License-Identifier: Apache-2.0
"""What ``split`` is given for each split: a share of the ground, or values of a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.functions import plain
from rasteret_dask.planning.names import in_order
from rasteret_dask.planning.plan import TIME, Scalar, SplitSpec, is_number

__all__ = ["DEFAULT", "REST", "Share", "dealt_spec", "fold_spec", "split_spec"]

Share: TypeAlias = "float | Sequence[Scalar]"
"""A share of the ground, or the values of a column that make a split."""

DEFAULT = (("train", 0.7), ("val", 0.15), ("test", 0.15))
"""The shares where none is given."""

REST = "train"
"""The split of all values that no list names."""


def split_spec(parts: Mapping[str, Any], seed: int, by: str, buffer_m: float, boundary: str) -> SplitSpec:
    """Return how the ground is shared out, from what each split was given.

    Parameters
    ----------
    parts
        Split -> a share, a list of values of the column ``by``, or None where nothing was given.
    seed, by, buffer_m, boundary
        As in :meth:`Chips.split`.

    Raises
    ------
    PlanError
        When shares do not sum to 1, or a split has a share where ``by`` is a column, or values where it is none.
    """
    parts = {name: parts[name] for name in in_order(parts) if parts[name] is not None}
    if by == TIME:
        spec = SplitSpec((), seed, by, buffer_m, boundary, _ranges(parts))
    elif not isinstance(by, str) or by in ("ground", "geometry"):
        ratios = _shares(parts)
        spec = SplitSpec(ratios, seed, by, buffer_m, boundary)
    else:
        spec = SplitSpec((), seed, by, buffer_m, boundary, _values(parts, by))
    if buffer_m > 0 and spec.names and REST not in spec.names:
        raise PlanError(
            f"split(buffer_m={buffer_m:g})", f"splits {', '.join(spec.names)}",
            "a split called train, as the buffer is around its chips",
            "Call the split to keep away from train, or leave buffer_m out.",
        )  # fmt: skip
    return spec


def dealt_spec(spec: SplitSpec, stratify: str | Sequence[str] | None, cells: str | None) -> SplitSpec:
    """Return the same splits or folds, dealt by what cells hold, or from a table of cells.

    Parameters
    ----------
    spec
        The splits.
    stratify
        The column of classes, or several of amounts; None: none.
    cells
        Token of the table; None: there is none.

    Raises
    ------
    PlanError
        When columns are no names, or splits are not by ground.
    """
    named = isinstance(stratify, list | tuple) and all(isinstance(name, str) for name in stratify)
    columns = (stratify,) if isinstance(stratify, str) else tuple(stratify) if named and stratify else ()
    if (not columns and stratify is not None) or len(set(columns)) != len(columns):
        raise PlanError(
            f"{spec.step}(stratify=)", repr(stratify),
            "the name of a column, a list of different ones, or a raster of classes",
        )  # fmt: skip
    return replace(spec, stratify=columns, cells=cells)


def fold_spec(k: int, seed: int, boundary: str) -> SplitSpec:
    """Return the deal of split cells to k equal folds.

    Raises
    ------
    PlanError
        When k is no whole number of at least 2.
    """
    if isinstance(k, bool) or not is_number(k) or k != int(k) or k < 2:
        raise PlanError("folds(k=)", repr(k), "a whole number of at least 2")
    return SplitSpec(
        tuple((str(fold), 1 / k) for fold in range(k)), seed, "ground", 0.0, boundary, salt="folds"
    )


def _shares(parts: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    for name, share in parts.items():
        if isinstance(share, list | tuple):
            raise PlanError(
                "split", f"{name}={share!r} without a column", "a share, as 0.15",
                f"Values are of a column: split(by='fold', {name}={list(share)!r}).",
            )  # fmt: skip
        if not is_number(share):
            raise PlanError(
                "split", f"{name}={share!r}", f"a share, as {name}=0.15",
                "Arguments of split that are no options are splits.",
            )  # fmt: skip
    if not parts:
        return DEFAULT
    if tuple(parts) == (REST,) and 0 < parts[REST] < 1:  # what is left is for val and test
        half = round((1 - parts[REST]) / 2, 12)
        return ((REST, parts[REST]), ("val", half), ("test", half))
    return tuple(parts.items())


def _ranges(parts: Mapping[str, Any]) -> tuple[tuple[str, tuple[Scalar, ...] | None], ...]:
    """Return the range of each split, half-open; train is the rest where it has none."""
    from rasteret_dask.table.timing import half_open  # pandas: training workers start without it

    step = "split(by='time')"
    result: dict[str, tuple[Scalar, ...] | None] = {}
    for name, own in parts.items():
        if is_number(own) or not isinstance(own, str | list | tuple):
            raise PlanError(
                step, f"{name}={own!r}", "(start, end), either may be None, or one period such as '2023'",
                f"Write {name}=('2023-01-01', '2023-12-31').",
            )  # fmt: skip
        try:
            result[name] = half_open(own)
        except PlanError as error:
            raise PlanError(step, f"{name}: {error.found}", error.expected) from error
    if not result:
        raise PlanError(step, "no range", "one for each split, as test=('2023-01-01', None)")
    edges = sorted(
        (start or "", name, end) for name, own in result.items() if own is not None for start, end in [own]
    )
    for (_, one, end), (start, other, _) in pairwise(edges):
        if end is None or str(start) < str(end):
            raise PlanError(step, f"ranges of {one} and {other} that overlap", "ranges apart from each other")
    if REST not in result:
        result[REST] = None
    return tuple((name, result[name]) for name in in_order(result))


def _values(parts: Mapping[str, Any], by: str) -> tuple[tuple[str, tuple[Scalar, ...] | None], ...]:
    owner: dict[Scalar, str] = {}
    result: dict[str, tuple[Scalar, ...] | None] = {}
    for name, given in parts.items():
        values = plain(given)
        if not isinstance(values, tuple):
            raise PlanError(
                f"split(by={by!r})", f"{name}={given!r}", f"a list of values of column {by}",
                f"One value: {name}=[{given!r}]. Without any list, each value is a split of that name.",
            )  # fmt: skip
        for value in values:
            if value is None or isinstance(value, tuple | Mapping):
                raise PlanError(f"split(by={by!r})", f"{name}=[{value!r}]", "texts, numbers, True and False")
            if owner.setdefault(value, name) != name:
                raise PlanError(
                    f"split(by={by!r})", f"{value!r} in {owner[value]} and in {name}", "each value once"
                )
        result[name] = values
    if result and REST not in result:
        result[REST] = None
    return tuple((name, result[name]) for name in in_order(result))
