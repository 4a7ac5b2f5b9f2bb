# SPDX-License-Identifier: Apache-2.0
"""What a STAC API is asked for, and which items fulfil a query."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rasteret_dask.errors import SourceError
from rasteret_dask.net.remote import public

__all__ = ["Box", "Search", "boxes_of", "conditions", "fits"]

Box = tuple[float, float, float, float]

_TESTS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "neq": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
    "in": lambda value, wanted: value in wanted,
    "startsWith": lambda value, wanted: str(value).startswith(wanted),
    "endsWith": lambda value, wanted: str(value).endswith(wanted),
    "contains": lambda value, wanted: wanted in value,
}
"""Operators of the API's query extension (v1.0.0)."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a STAC API is asked for."""

    api: str
    """Root of the API."""
    collection: str
    boxes: tuple[Box, ...] = ()
    """(west, south, east, north) in degrees, none across the antimeridian; none at all: everywhere."""
    span: tuple[str | None, str | None] = (None, None)
    """Half-open range of time, ISO 8601 UTC."""
    query: str | None = None
    """JSON of the query extension: ``{"eo:cloud_cover": {"lt": 20}}``."""
    filter: str | None = None
    """CQL2, as text or as JSON."""

    @property
    def subject(self) -> str:
        """What messages call it."""
        return f"search of {self.collection!r} at {public(self.api)}"


def boxes_of(box: Box) -> tuple[Box, ...]:
    """Return a box as one, or as two where it crosses the antimeridian, with longitudes from -180 to 180.

    West of its east, or beyond 180, it crosses; a width of 360 is the whole circle.
    """
    west, south, east, north = box
    if east - west >= 360:
        return ((-180.0, south, 180.0, north),)
    # exactly as given where nothing has to move: a search is known by its box to the last digit
    low = west if -180 <= west <= 180 else (west + 180) % 360 - 180
    high = east if -180 <= east <= 180 else (east + 180) % 360 - 180
    if low < high:
        return ((low, south, high, north),)
    halves = ((low, south, 180.0, north), (-180.0, south, high, north))
    return tuple(half for half in halves if half[0] < half[2])


def fits(item: Any, query: str | None, subject: str) -> bool:
    """Return whether an item fulfils a query, as an API would say; without a property it does not.

    Raises
    ------
    SourceError
        When values of other types are compared.
    """
    properties = item.get("properties") if isinstance(item, Mapping) else None
    if query is None or not isinstance(properties, Mapping):
        return True  # broken: who makes rows of them says so
    tests = conditions(query, subject)
    try:
        return all(
            properties.get(name) is not None and bool(_TESTS[op](properties[name], wanted))
            for name, op, wanted in tests
        )
    except TypeError as error:
        raise SourceError(
            f"{subject}, query {query}", str(error), "values of the properties' types"
        ) from error


@lru_cache(maxsize=8)
def conditions(query: str, subject: str) -> tuple[tuple[str, str, Any], ...]:
    """Return (property, operator, value) of a query; an operator that nobody knows is a SourceError."""
    found = []
    for name, tests in json.loads(query).items():
        unknown = [op for op in tests if op not in _TESTS] if isinstance(tests, Mapping) else ["no operator"]
        if unknown:
            raise SourceError(
                f"{subject}, query of {name!r}",
                ", ".join(map(str, unknown)),
                f"one of {', '.join(_TESTS)}",
                'Write it as {"eo:cloud_cover": {"lt": 20}}.',
            )
        found += [(name, op, wanted) for op, wanted in tests.items()]
    return tuple(found)
