# SPDX-License-Identifier: Apache-2.0
"""A rule is a frozen value, known by its type, its plain fields, and what a user's own type says."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from rasteret_dask.errors import PlanError

__all__ = ["RuleValue", "check_importable", "from_json", "one_of"]

_PACKAGE = __name__.partition(".")[0]


class RuleValue:
    """A part of what pixels mean: a unit, a mask, a pick, a stored form.

    A rule of your own is a frozen dataclass with plain fields (numbers, text, tuples of them) in a module that
    workers can import. A plan knows it by its type, its fields and the source of its methods, so a job is done
    anew where any of them changes, and two processes agree.
    """

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the value as plain JSON values.

        Examples
        --------
        >>> from rasteret_dask.rules.masks import Classes
        >>> Classes("SCL", (3, 8)).to_json()["fields"]
        {'band': 'SCL', 'classes': [3, 8]}
        """
        cls = type(self)
        if not getattr(getattr(cls, "__dataclass_params__", None), "frozen", False):
            raise PlanError(
                f"rule {cls.__qualname__}", "a type that can change", "a frozen dataclass",
                "Write @dataclasses.dataclass(frozen=True) above it.",
            )  # fmt: skip
        fields = {f.name: _plain(cls, f.name, getattr(self, f.name)) for f in _fields(self)}
        return {"rule": f"{cls.__module__}:{cls.__qualname__}", "source": _source(cls), "fields": fields}

    def __str__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in _fields(self)}
        shown = ", ".join(
            f"{name}={value}" for name, value in fields.items() if value not in (False, None, ())
        )
        return f"{type(self).__name__}({shown})"


def check_importable(written: Any) -> None:
    """Refuse rules whose type lies inside a function: nobody who reads them again could import it.

    Parameters
    ----------
    written
        JSON values, with what :meth:`RuleValue.to_json` wrote anywhere among them.

    Raises
    ------
    PlanError
        When one of them is such a rule.
    """
    if isinstance(written, Mapping):
        module, _, path = str(written.get("rule", "")).partition(":")
        function, inside, name = path.rpartition(".<locals>.")
        if inside:
            raise PlanError(
                f"writing a plan with rule {module}:{path}",
                f"a type inside the function {function}, which no other process can import",
                "a type that stands in a module",
                f"Move the class {name} out of {function}, to the top of its module. "
                "load(), stream() and to_xarray() in this process take it as it is.",
            )
        written = list(written.values())
    if isinstance(written, list):
        for part in written:
            check_importable(part)


def from_json(value: Mapping[str, Any]) -> RuleValue:
    """Return the rule that :meth:`RuleValue.to_json` wrote.

    Raises
    ------
    PlanError
        When its type cannot be imported here, is no rule, or says something else than it did.
    """
    name = str(value["rule"])
    module, _, path = name.partition(":")
    try:
        cls: Any = importlib.import_module(module)
        for part in path.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"rule {name}", f"no such type in this process ({error})", "a type that every process can import",
            "Put it into a module that is installed here and on every worker.",
        ) from error  # fmt: skip
    if not (isinstance(cls, type) and issubclass(cls, RuleValue)):
        raise PlanError(f"rule {name}", "a type that is no rule", "a subclass of RuleValue")
    if _source(cls) != value["source"]:
        raise PlanError(
            f"rule {name}", "methods other than those of the plan", "the same source text in every process",
            "Install the version that the plan was made with, or make the plan anew.",
        )  # fmt: skip
    fields = {k: _again(v) for k, v in value["fields"].items()}
    rule: RuleValue = cls(**fields)
    return rule


def one_of(words: Mapping[str, Any], name: str, word: Any) -> Any:
    """Return what a word stands for.

    Raises
    ------
    PlanError
        When it stands for nothing; the message lists the words.
    """
    if not isinstance(word, str) or word not in words:
        raise PlanError(f"{name}=", repr(word), f"one of {', '.join(map(repr, words))}")
    return words[word]


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields that a rule is made of."""
    return tuple(f for f in dataclasses.fields(value) if f.init)


def _plain(cls: type, name: str, value: Any) -> Any:
    if isinstance(value, RuleValue):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(cls, name, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PlanError(
        f"field {name!r} of rule {cls.__qualname__}", f"a {type(value).__name__}",
        "a number, text, None, a rule, or a tuple of them",
    )  # fmt: skip


def _again(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_again(v) for v in value)
    return from_json(value) if isinstance(value, Mapping) else value


def _source(cls: type) -> str:
    """Return a digest of what a user's own type says; "" for this package's, whose meaning has a version."""
    own = [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in (_PACKAGE, "abc", "builtins")]
    if not own:
        return ""
    try:
        text = "\n".join(textwrap.dedent(inspect.getsource(c)) for c in own)
    except (OSError, TypeError) as error:
        raise PlanError(
            f"rule {cls.__module__}:{cls.__qualname__}", "no source text", "a type whose source can be read",
            "Write it in a module.",
        ) from error  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()
