# SPDX-License-Identifier: Apache-2.0
"""What pydantic finds wrong with a recipe, in words: the key and its line, what was expected, the nearest word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rasteret_dask.errors import RecipeError
from rasteret_dask.recipes.lines import KeyPath, spelled
from rasteret_dask.recipes.source import RecipeSource, nearest

__all__ = ["recipe_error"]

SHOWN = 5
"""Further faults that are told beside the first."""

_KINDS = {
    "string_type": "text", "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
    "list_type": "an array", "dict_type": "a table", "model_type": "a table", "model_attributes_type": "a table",
}  # fmt: skip


def recipe_error(source: RecipeSource, model: type[BaseModel], error: ValidationError) -> RecipeError:
    """Return the error of the first fault in the file; it names the lines of the others.

    Parameters
    ----------
    source
        What was checked.
    model
        What it was checked against.
    error
        What was found.
    """
    faults: dict[KeyPath, list[ErrorDetails]] = {}
    for one in error.errors(include_url=False):
        faults.setdefault(_path(source, one), []).append(one)
    # of a value that may be several things, the fault that is deepest in it is the one that is meant
    deepest = [
        path for path in faults if not any(len(o) > len(path) and o[: len(path)] == path for o in faults)
    ]
    order = sorted(deepest, key=lambda path: (source.line_of(path) or 0, spelled(path)))
    first = order[0]
    found, expected, remedy = _words(source, model, first, faults[first])
    others = order[1:]
    if others:
        more = [_briefly(source, model, one, faults[one]) for one in others[:SHOWN]]
        if len(others) > SHOWN:
            more.append(f"{len(others) - SHOWN} more")
        remedy = f"{remedy} See also {'; '.join(more)}.".strip()
    return source.error(first, found, expected, remedy)


def _briefly(
    source: RecipeSource, model: type[BaseModel], path: KeyPath, faults: Sequence[ErrorDetails]
) -> str:
    """Return a further fault in few words: its line, what was found, and the nearest word or what was expected."""
    found, expected, remedy = _words(source, model, path, faults)
    line = source.line_of(path)
    what = remedy.removesuffix("?").replace("Did you mean", "did you mean") or (
        f"expected {expected}" if len(expected) <= 60 else ""
    )
    return f"{'' if line is None else f'line {line}, '}{found}{f' ({what})' if what else ''}"


def _path(source: RecipeSource, fault: ErrorDetails) -> KeyPath:
    """Return the part of a fault's place that is in the file: pydantic names the branches of unions in between."""
    path: KeyPath = ()
    for part in fault["loc"]:
        value = source.at(path)
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            path = (*path, part)
    return path


def _words(
    source: RecipeSource, model: type[BaseModel], path: KeyPath, faults: Sequence[ErrorDetails]
) -> tuple[str, str, str]:
    """Return what was found at a path, what was expected, and what to do."""
    kinds = {fault["type"]: fault for fault in faults}
    table = spelled(path[:-1]) or "the recipe"
    value = source.at(path)
    if "extra_forbidden" in kinds:
        key, keys = str(path[-1]), _keys(model, kinds["extra_forbidden"]["loc"][:-1])
        return f"an unknown key {key!r} in {table}", f"one of {', '.join(keys)}", nearest(key, keys)
    if "beginning" in kinds:
        words = _quoted(kinds["beginning"])
        near = ((key, nearest(key, words)) for key in value if key not in words)
        remedy = next((f"{proposal[:-1]} instead of {key!r}?" for key, proposal in near if proposal), "")
        found = f"{kinds['beginning']['msg']} in {spelled(path)}"
        return found, f"exactly one of {', '.join(words)}", remedy
    if "missing" in kinds:
        absent = kinds["missing"]["loc"][-1]
        return (
            f"no key {absent!r} in {spelled(path) or 'the recipe'}",
            f"{spelled((*path, absent))} = ...",
            "",
        )
    words = [word for kind, fault in kinds.items() if kind == "literal_error" for word in _quoted(fault)]
    expected = [f"one of {', '.join(map(repr, words))}"] if words else []
    expected += [
        _KINDS.get(kind) or fault["msg"][0].lower() + fault["msg"][1:]
        for kind, fault in kinds.items()
        if kind != "literal_error"
    ]
    remedy = nearest(value, words) if isinstance(value, str) else ""
    return f"{spelled(path)} = {_shown(value)}", ", or ".join(dict.fromkeys(expected)), remedy


def _quoted(fault: ErrorDetails) -> list[str]:
    """Return the words that pydantic quotes as expected."""
    return re.findall(r"'([^']*)'", fault["ctx"]["expected"])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys(model: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """Return the keys that a table may have, which pydantic calls ``place``."""
    tables = [model]
    for part in place:
        inner = [
            one for table in tables if part in table.model_fields
            for one in _tables(table.model_fields[str(part)].annotation)
        ]  # fmt: skip
        tables = inner or [table for table in tables if _is_branch(part, table)] or tables
    return list(dict.fromkeys(key for table in tables for key in table.model_fields))


def _is_branch(part: str | int, table: type[BaseModel]) -> bool:
    """Tell whether a part of a place names this table among those of a union: by its name, or its tag."""
    return part == table.__name__ or (str(part).startswith("[") and str(part)[1:-1] in _required(table))


def _required(table: type[BaseModel]) -> set[str]:
    return {key for key, field in table.model_fields.items() if field.is_required()}


def _tables(hint: Any) -> Iterator[type[BaseModel]]:
    """Yield the tables that a type names."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for one in get_args(hint):
        yield from _tables(one)
