# SPDX-License-Identifier: Apache-2.0
"""Which table of a recipe an error of the API comes from: where it was called, or what the error names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rasteret_dask.collection import Collection
from rasteret_dask.errors import (
    BandError,
    GridError,
    PlanError,
    RasteretDaskError,
    RecipeError,
    SchemaError,
    SourceError,
    UnreadableAssetsError,
)
from rasteret_dask.recipes.arguments import parameters
from rasteret_dask.recipes.lines import KeyPath
from rasteret_dask.recipes.source import RecipeSource, nearest

__all__ = ["blamed", "blamed_by_words"]

_OF_INPUT = (BandError, GridError, PlanError, SchemaError, SourceError, UnreadableAssetsError)
"""What a recipe may be the cause of; that a file cannot be read, or a store be written, stays the error it is."""


@contextmanager
def blamed(source: RecipeSource, path: KeyPath, key: str | None = None) -> Iterator[None]:
    """Say of the API's errors inside that they come from a table, or from that key of it which they name.

    Parameters
    ----------
    source
        The recipe.
    path
        The table.
    key
        Its key that errors come from which name none.

    Raises
    ------
    RecipeError
        Instead of any other error of this package, which is its cause.
    """
    try:
        yield
    except RecipeError:
        raise
    except RasteretDaskError as error:
        place = _place_of(source, error, path)
        raise _error(source, (*path, key) if place == path and key is not None else place, error) from error


@contextmanager
def blamed_by_words(source: RecipeSource) -> Iterator[None]:
    """Say of errors that arise when a plan is made, after all calls, which line has the word that they quote.

    Raises
    ------
    RecipeError
        Instead of an error that the recipe can be the cause of; others pass.
    """
    try:
        yield
    except RecipeError:
        raise
    except _OF_INPUT as error:
        raise _error(source, _place_of(source, error, ()), error) from error


def _error(source: RecipeSource, path: KeyPath, error: RasteretDaskError) -> RecipeError:
    remedy = error.remedy
    if "subset" in path[-2:-1]:
        remedy = f"{nearest(str(path[-1]), parameters(Collection.subset))} {remedy}".strip()
    return source.error(path, f"{error.found}, in {error.subject}", error.expected, remedy)


def _place_of(source: RecipeSource, error: RasteretDaskError, table: KeyPath) -> KeyPath:
    """Return the one key or value inside a table that an error quotes or calls an argument.

    Else the table itself; of the whole recipe the collection that the error names, or the chips.
    """
    words = re.findall(r"'([^']+)'", f"{error.subject} {error.found}")
    argument = re.search(r"(\w+)\((\w+)=", error.subject)
    places = list(_places(source.at(table), table))
    collections = source.document["collections"]
    for word in words:
        hits = [path for path, value in places if word in (path[-1], value) and not _is_name(path)]
        if len(hits) == 1 and word not in collections:
            return hits[0]
    step, key = argument.groups() if argument is not None else ("", error.subject)
    hits = [
        path for path, _ in places if path[-1] == key and (step in ("", *path[-2:-1]) or path[:-1] == table)
    ]
    if len(hits) == 1:
        return hits[0]
    return table or next((("collections", word) for word in words if word in collections), ("chips",))


def _is_name(path: KeyPath) -> bool:
    """Tell whether a path is that of a collection: a name, no argument."""
    return len(path) == 2 and path[0] == "collections"


def _places(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key and element with its value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key), one
        yield from _places(one, (*path, key))
