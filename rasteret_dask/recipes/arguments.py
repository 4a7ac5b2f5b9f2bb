# SPDX-License-Identifier: Apache-2.0
"""Arguments of the Python API as fields of a recipe's tables: their names, types and words come from the functions."""

from __future__ import annotations

import inspect
import os
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model

from rasteret_dask.rules.values import RuleValue

__all__ = ["RuleTable", "Table", "documented", "fields_of", "parameters", "table_of", "toml_type"]


class Table(BaseModel):
    """A table of a recipe: no other keys, and no value of another type than TOML's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RuleTable(BaseModel):
    """A rule by its class, with its fields: ``{ rule = "Classes", band = "SCL", classes = [3, 8] }``."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    rule: str = Field(description="A class of rd.masks, rd.picks or rd.units, or your own as 'module:Class'.")


def table_of(
    name: str,
    function: Callable[..., Any],
    *,
    omit: Collection[str] = (),
    others: Mapping[str, Any] | None = None,
    base: type[BaseModel] = Table,
    optional: Collection[str] = (),
    further: Mapping[str, Any] | None = None,
) -> type[BaseModel]:
    """Return the table whose keys are a function's arguments.

    Parameters
    ----------
    name
        What the table is called in the schema.
    function
        Whose keyword arguments become keys; what takes any number of arguments is left out.
    omit
        Arguments that no recipe gives.
    others
        Types of arguments that take what TOML cannot say, or anything.
    base
        What the table is a subclass of.
    optional
        Arguments that have a default in a recipe only.
    further
        Fields that are no arguments, as pydantic's ``create_model`` takes them.
    """
    fields = fields_of(name, function, omit=omit, others=others, optional=optional)
    made: type[BaseModel] = create_model(
        name, __base__=base, __doc__=_first_sentence(function), **{**fields, **(further or {})}
    )
    return made


def fields_of(
    name: str,
    function: Callable[..., Any],
    *,
    omit: Collection[str] = (),
    others: Mapping[str, Any] | None = None,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Return a function's arguments as fields, as pydantic's ``create_model`` takes them; see :func:`table_of`."""
    words = documented(function)
    fields: dict[str, Any] = {}
    for key, parameter in parameters(function).items():
        if key in omit:
            continue
        hint = (others or {}).get(key)
        if hint is None:
            hint = toml_type(_hint_of(function, parameter), f"{name}.{key}")
        needed = parameter.default is inspect.Parameter.empty and key not in optional
        fields[key] = (hint, Field(... if needed else None, description=words.get(key)))
    return fields


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a function or method, without ``self``."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    every = inspect.signature(function).parameters
    return {name: one for name, one in every.items() if name != "self" and one.kind in plain}


def toml_type(hint: Any, subject: str) -> Any:
    """Return what TOML has for a type of Python: lists for sequences, text for paths, tables for rules; no None.

    Raises
    ------
    TypeError
        When it takes anything: the table must say what a recipe may give.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = tuple(dict.fromkeys(toml_type(one, subject) for one in inner if one is not type(None)))
        return Union[kinds]  # noqa: UP007  # of a tuple
    if origin is Literal or hint in (str, int, float, bool):
        return hint
    if origin is not None and issubclass(origin, Mapping):
        value = inner[1]
        return dict[str, Any if value is Any else toml_type(value, subject)]  # type: ignore[misc]
    if origin is not None and issubclass(origin, Sequence):
        return list[toml_type(inner[0], subject)]  # type: ignore[misc]
    if (origin or hint) is os.PathLike:
        return str
    if isinstance(hint, type) and issubclass(hint, RuleValue):
        return RuleTable
    raise TypeError(f"{subject}: no type of TOML for {hint!r}; name one in others=")


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring's ``Parameters`` section says of each, as Markdown."""
    _, _, section = (inspect.getdoc(function) or "").partition("Parameters\n----------\n")
    section = re.split(r"\n\n?\w[\w ]*\n-{3,}\n", section)[0]
    words: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            names = [name.strip().lstrip("*") for name in line.split(",")]
        for name in names if line.startswith(" ") else ():
            words[name] = f"{words.get(name, '')} {line.strip()}".strip()
    return {name: _markdown(text) for name, text in words.items()}


def _markdown(text: str) -> str:
    return re.sub(r":\w+:`[~.]?([^`]+)`", r"`\1`", text).replace("``", "`")


def _first_sentence(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")


def _hint_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return a parameter's type; one by one, as a module may name types that it imports for mypy only."""
    hint = parameter.annotation
    module = inspect.getmodule(inspect.unwrap(function))
    return eval(hint, vars(module)) if isinstance(hint, str) else hint
