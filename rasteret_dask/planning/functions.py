# SPDX-License-Identifier: Apache-2.0
"""A user's function, known by where it is written and what it says, the same in every process."""

from __future__ import annotations

import datetime as dt
import dis
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from rasteret_dask.errors import PlanError

__all__ = ["Function", "plain"]


@dataclass(frozen=True, slots=True)
class Function:
    """A user's function, known by where it is written and what it says; never by its address."""

    module: str
    name: str
    source: str
    """sha256 of its source text, or the version the user gave."""

    @classmethod
    def of(cls, function: Callable[..., Any], version: str | None = None) -> Function:
        """Describe ``function``.

        Raises
        ------
        PlanError
            When it closes over data or its source cannot be found, and no ``version`` was given.
        """
        name = getattr(function, "__qualname__", type(function).__qualname__)
        module = getattr(function, "__module__", type(function).__module__)
        if version is not None:
            return cls(module, name, f"version {version}")
        if not callable(function):
            raise PlanError("map(function)", repr(function), "a function of a DataArray")
        held = _held(function, f"{module}.{name}")
        try:
            text = textwrap.dedent(inspect.getsource(function))
        except OSError as error:
            raise PlanError(
                f"function {module}.{name}",
                "no source text",
                "a function whose source can be read",
                "Say which version it is: map(function, version='1').",
            ) from error
        return cls(
            module, name, hashlib.sha256((text + _place_in_line(function) + held).encode()).hexdigest()
        )


def _held(function: Callable[..., Any], name: str) -> str:
    """Return what a function refers to besides its text: defaults, and the globals it names.

    Raises
    ------
    PlanError
        When that is data other than plain values: what it will be on a worker cannot be told from here.
    """
    found: dict[str, Any] = {}
    if inspect.isfunction(function):
        around = inspect.getclosurevars(function)
        found = {str(i): value for i, value in enumerate(function.__defaults__ or ())}
        found |= function.__kwdefaults__ or {}
        found |= {**_inner_globals(function), **around.globals}
        found |= dict.fromkeys(around.nonlocals, NotImplemented)
    else:  # an object with data of its own, or compiled
        found = {"self": NotImplemented}
    said = []
    for key, value in sorted(found.items(), key=lambda pair: str(pair[0])):
        if inspect.ismodule(value) or _is_code(value):
            said.append(f"{key}={getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}")
        elif _is_plain(value):
            said.append(f"{key}={plain(value)!r}")
        else:
            raise PlanError(
                f"function {name}",
                _data_words(key, value),
                "a function of its arguments and plain values",
                "Say which version it is: map(function, version='1').",
            )
    return "|".join(said)


def _data_words(name: str, value: Any) -> str:
    if value is NotImplemented:
        return (
            "an object with data of its own, or compiled code" if name == "self" else f"a closure over {name}"
        )
    return f"a global or default {name}, a {type(value).__name__}"


def _is_code(value: Any) -> bool:
    """Tell whether a value is a function or a class; any other object that can be called has data of its own."""
    if inspect.ismethod(value) and not inspect.isclass(value.__self__):
        return False
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    return callable(value) and isinstance(name, str)


def _inner_globals(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the data that functions and comprehensions inside a function name: inspect does not look into these."""
    around: dict[str, Any] = getattr(function, "__globals__", {})
    code: CodeType = function.__code__
    names = {name for part in _inner_code(code) for name in _global_names(part) if name in around}
    return {
        name: around[name]
        for name in names
        if not inspect.ismodule(around[name]) and not _is_code(around[name])
    }


def _inner_code(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner_code(constant)


def _global_names(code: CodeType) -> Iterator[str]:
    return (
        str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def _place_in_line(function: Callable[..., Any]) -> str:
    """Tell lambdas of one line apart, whose source text is that line: the columns from first to last."""
    if getattr(function, "__name__", "") != "<lambda>":
        return ""
    columns = [
        column for place in function.__code__.co_positions() for column in place[2:] if column is not None
    ]
    return f"{min(columns)}-{max(columns)}" if columns else ""


def _is_plain(value: Any) -> bool:
    """Tell whether a value is written the same in every process."""
    if isinstance(value, tuple | frozenset):
        return all(_is_plain(v) for v in value)
    return isinstance(value, bool | int | float | str | bytes | None)


def plain(value: Any) -> Any:
    """Return a value as what compares, hashes and becomes JSON the same in every process."""
    if isinstance(value, set | frozenset):
        return tuple(sorted((plain(v) for v in value), key=lambda v: (str(type(v)), str(v))))
    if hasattr(value, "tolist"):  # NumPy
        value = str(value) if value.dtype.kind == "M" else value.tolist()
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    return value.isoformat() if isinstance(value, dt.date) else value
