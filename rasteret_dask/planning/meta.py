# SPDX-License-Identifier: Apache-2.0
"""What chips carry of each slot beside its pixels: properties of its record, its day of the year, shares of pixels."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.lists import first_of
from rasteret_dask.table.records import NS_RANGE

__all__ = [
    "DAY_OF_YEAR",
    "MASKED",
    "OF_SLOTS",
    "TEXT",
    "VALID",
    "Meta",
    "days_of_year",
    "meta_attrs",
    "record_values",
    "with_meta",
]

Meta: TypeAlias = "tuple[tuple[str, str], ...]"
"""(name, dtype) of each array (chip, time) that was asked for, in that order; the dtype is ``"str"`` for text."""

DAY_OF_YEAR = "day_of_year"
VALID = "valid_fraction"
MASKED = "masked_fraction"

OF_SLOTS: Mapping[str, str] = {
    DAY_OF_YEAR: "day of the year of the slot's datetime, UTC",
    VALID: "share of the pixels that are valid in all bands",
    MASKED: "share of the pixels that are invalid and that the mask hides",
}
"""Names that are no property of a record -> what they are; a property of the same name is not to be had."""

NUMBER, TEXT, SHARE = "float64", "str", "float32"
_MAX_LISTED = 20
_EXACT = 2**53  # beyond it float64 skips whole numbers


def meta_attrs(name: str) -> dict[str, str]:
    """Return the attributes of an array that was asked for."""
    return {"long_name": OF_SLOTS.get(name) or f"{name} of the record that member and datetime name"}


def with_meta(
    source: str, names: Sequence[str], members: Sequence[pa.Table], tables: Sequence[pa.Table]
) -> tuple[Meta, list[pa.Table]]:
    """Settle what ``harmonize(meta=)`` asks for.

    Parameters
    ----------
    source
        Name of the source, for messages.
    names
        What is asked for.
    members
        The records of each member, with all of their columns.
    tables
        The same rows, to which a column is added for each property.

    Returns
    -------
    meta, tables
        The dtype of each name, over all members; and the tables.

    Raises
    ------
    PlanError
        When no record has such a property, or it is neither numbers alone nor text alone.
    """
    own = [name for name in names if name not in OF_SLOTS]
    if not names:
        return (), list(tables)
    values = [dict(_values(table, own)) for table in members]
    kinds = {name: _kind(source, name, [v for member in values for v in member[name]]) for name in own}
    missing = [name for name, kind in kinds.items() if kind is None]
    if missing:
        raise _unknown(source, missing[0], members)
    result = []
    for table, member in zip(tables, values, strict=True):
        for name in own:
            text = kinds[name] == TEXT
            cells = [None if v is None else _text(v) if text else float(v) for v in member[name]]
            column = pa.array(cells, pa.string() if text else pa.float64())
            table = table.append_column(_column_name(name), column)
        result.append(table)
    return tuple((name, kinds.get(name) or SHARE) for name in names), result


def record_values(table: pa.Table, name: str, dtype: str) -> NDArray[Any]:
    """Return a property of records, shape (record + 1,): NaN or "" where one has none, and as the last.

    Parameters
    ----------
    table
        Records as :func:`with_meta` returns them.
    name, dtype
        Which property, and what it is.
    """
    column = table.column(_column_name(name))
    if dtype == TEXT:
        return np.array([*(v or "" for v in column.to_pylist()), ""], dtype=object)
    return np.append(np.asarray(column.to_numpy(), dtype=dtype), np.nan)


def days_of_year(times: NDArray[np.datetime64]) -> NDArray[np.float32]:
    """Return the day of the year of times, 1 to 366; NaN where there is no time, or any time is meant."""
    days = times.astype("datetime64[D]")
    count = (days - days.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) + 1
    return np.where(times > NS_RANGE[0], count, np.nan).astype(np.float32)


def _column_name(name: str) -> str:
    return f"__meta__{name}"


def _values(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield each name with its values: those of the column, where the table has one, else of the property."""
    late = [name for name in names if name not in table.column_names]
    for name in names:
        if name not in late:
            yield name, table.column(name).to_pylist()
    rows = [[own.get(name) for name in late] for own in _properties(table)] if late else []
    for at, name in enumerate(late):
        yield name, [row[at] for row in rows]


def _properties(table: pa.Table) -> Iterator[dict[str, Any]]:
    texts = table.column("properties").to_pylist() if "properties" in table.column_names else []
    for text in texts:
        yield json.loads(text) if text else {}
    for _ in range(table.num_rows - len(texts)):
        yield {}


def _kind(source: str, name: str, values: Sequence[Any]) -> str | None:
    """Return the dtype that holds the values of a property; None where there is none.

    Raises
    ------
    PlanError
        When they are of several types, or none that an array holds.
    """
    kinds: dict[str, Any] = {}
    for value in values:
        if value is not None:
            kinds.setdefault(_word(value), value)
    if not kinds:
        return None
    if len(kinds) > 1 or not kinds.keys() <= {NUMBER, TEXT}:
        shown = " and ".join(f"{type(one).__name__} {one!r:.60}" for one in kinds.values())
        raise PlanError(
            f"harmonize(meta=) of source {source!r}, {name!r}", shown,
            "numbers (float64 holds them exactly) or text, the same in every record",
            "Leave it out, or give the records a column of one type: as_collection(table).",
        )  # fmt: skip
    return next(iter(kinds))


def _word(value: Any) -> str:
    """Return the dtype that holds a value, or its own type where none does."""
    if isinstance(value, str | dt.date):
        return TEXT
    if isinstance(value, float | Decimal) or (isinstance(value, int) and abs(value) <= _EXACT):
        return NUMBER
    return type(value).__name__


def _text(value: str | dt.date) -> str:
    """Return text; a time as ISO 8601 in UTC."""
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")
    return value if isinstance(value, str) else value.isoformat()


def _unknown(source: str, name: str, tables: Sequence[pa.Table]) -> PlanError:
    names = dict.fromkeys(OF_SLOTS)
    for table in tables:
        names |= {
            field.name: None
            for field in table.schema
            if not pa.types.is_nested(field.type) and not pa.types.is_binary(field.type)
            and field.name not in ("datetime", "properties") and table.column(field.name).null_count < len(table)
        }  # fmt: skip
        for own in _properties(table):
            names |= {k: None for k, v in own.items() if isinstance(v, str | int | float)}
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    return PlanError(
        f"harmonize(meta=) of source {source!r}", f"{name!r}, which no record has",
        f"one of {first_of(sorted(names), _MAX_LISTED)}",
        f"Did you mean {' or '.join(map(repr, near))}?" if near else "",
    )  # fmt: skip
