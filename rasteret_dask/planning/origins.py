# SPDX-License-Identifier: Apache-2.0
"""The call that made a table of records, as plain values: how a recipe says it again."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasteret_dask.catalogs.credentials import cleaned
from rasteret_dask.crs import number, spelled
from rasteret_dask.errors import GridError

__all__ = ["BuildCall"]

_PASSING = ("progress", "force", "name")
"""Arguments that do not decide what is in the table; what it is called is in the plan."""

_PLACES = ("source", "files", "table", "path", "cache_dir", "workspace_dir")
"""Arguments that are paths: they are kept whole, as a recipe may lie elsewhere."""


@dataclass(frozen=True, slots=True)
class BuildCall:
    """A call that made a table: a function of this package, and the arguments that differ from its defaults."""

    function: str
    """``"build"``, ``"build_from_files"``, ..."""
    arguments: tuple[tuple[str, Any], ...]
    """Plain values: text, numbers, lists, dictionaries; URLs without credentials."""
    obstacle: str | None = None
    """The argument that no text can say, such as a DataFrame; None where all can be said."""

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Mapping[str, Any]) -> BuildCall:
        """Describe a call.

        Parameters
        ----------
        function
            What is called.
        arguments
            All of its parameters.
        """
        kept: list[tuple[str, Any]] = []
        for key, parameter in inspect.signature(function).parameters.items():
            value = arguments[key]
            if key in _PASSING or value is parameter.default or value is None:
                continue
            try:
                kept.append((key, cleaned(_places(value) if key in _PLACES else _plain(key, value))))
            except TypeError as error:
                return cls(function.__name__, (), f"{key}=, which is a {error}")
        return cls(function.__name__, tuple(kept))


def _places(value: Any) -> str | list[str]:
    """Return a path, or several; TypeError where it is something else, such as items, which are not kept."""
    if isinstance(value, str | os.PathLike):
        return _absolute(os.fspath(value))
    if isinstance(value, list | tuple) and value and all(isinstance(one, str | os.PathLike) for one in value):
        return [_absolute(os.fspath(one)) for one in value]
    raise TypeError(type(value).__name__)


def _plain(key: str, value: Any) -> Any:
    """Return a value as text, numbers, lists and dictionaries; TypeError, with its type, where it is something else."""
    if key == "crs":
        try:
            return spelled(number(value))
        except GridError as error:
            raise TypeError("CRS") from error
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain("", one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [_plain(key, one) for one in value]
    if hasattr(value, "tolist"):  # NumPy
        return _plain(key, value.tolist())
    raise TypeError(type(value).__name__)


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))
