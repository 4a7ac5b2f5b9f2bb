# SPDX-License-Identifier: Apache-2.0
"""A recipe's text with what was set beside it: values, and the line that each of them comes from."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from rasteret_dask.errors import RecipeError
from rasteret_dask.recipes.lines import KeyPath, key_of, lines_of, spelled

__all__ = ["RecipeSource", "differences", "nearest", "setting", "values_of"]


def setting(text: str) -> tuple[str, Any]:
    """Return key and value of ``"chips.size=64"``; what is no value of TOML is text.

    Raises
    ------
    RecipeError
        When there is no key.

    Examples
    --------
    >>> from rasteret_dask.recipes.source import setting
    >>> setting("chips.size=64"), setting("outputs.0.zarr=train.zarr")
    (('chips.size', 64), ('outputs.0.zarr', 'train.zarr'))
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text}", None, "no key and value", "--set chips.size=64")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """What a recipe says, and where."""

    path: str
    """The file, as the user named it."""
    text: str
    """As it is carried out: with the overrides."""
    document: Mapping[str, Any]
    """Its values; dates and times as text."""
    lines: Mapping[KeyPath, int]
    """Of the file, without overrides."""
    overrides: tuple[tuple[KeyPath, str], ...]
    """(path, key as it was given) of what was set beside the file."""

    @classmethod
    def read(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> RecipeSource:
        """Read a file.

        Raises
        ------
        RecipeError
            When there is no such file, it is no TOML, or an override names a place that cannot be.
        """
        place = os.fspath(path)
        try:
            data = Path(place).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            remedy = _beside(place)
            raise RecipeError(place, None, _reason(error), "a recipe: a TOML file", remedy) from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise RecipeError(
                place, line, f"bytes that are no UTF-8 ({error.reason})", "text in UTF-8"
            ) from error
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            words, line = _syntax(str(error), text)
            raise RecipeError(place, line, f"no TOML: {words}", "", _syntax_remedy(text, line)) from error
        lines = lines_of(text.replace("\r\n", "\n"))
        if not overrides:
            return cls(place, text, _texts(document), lines, ())
        changed = tomlkit.parse(text)
        paths = []
        for key, value in overrides.items():
            steps = _steps(key, document, place)
            _put(changed, steps, value, RecipeError(f"{place} with --set {key}", None, *_NO_PLACE))
            paths.append((steps, key))
        text = tomlkit.dumps(changed)
        return cls(place, text, values_of(text), lines, tuple(paths))

    @property
    def folder(self) -> Path:
        """The folder that relative paths are counted from."""
        return Path(self.path).expanduser().absolute().parent

    def error(self, path: KeyPath, fault: str, expected: str = "", remedy: str = "") -> RecipeError:
        """Return the error that names the line of a key, or the override that set it."""
        for steps, key in self.overrides:
            is_new = (
                path not in self.lines and steps[: len(path)] == path
            )  # a table that only the override names
            if path[: len(steps)] == steps or is_new:
                return RecipeError(f"{self.path} with --set {key}", None, fault, expected, remedy)
        return RecipeError(self.path, self.line_of(path), fault, expected, remedy)

    def line_of(self, path: KeyPath) -> int | None:
        """Return the line of a key; of one that is not there, of the table that should have it."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return 1 if self.lines else None

    def at(self, path: KeyPath) -> Any:
        """Return the value at a path; None where there is none."""
        value: Any = self.document
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a sentence that proposes the word that is meant; "" where none is near."""
    every = list(words)
    cutoff = 0.5 if len(word) < 4 else 0.6  # of two letters, one may be wrong
    near = get_close_matches(word, every, 1, cutoff) or get_close_matches(word.casefold(), every, 1, cutoff)
    return f"Did you mean {near[0]!r}?" if near else ""


def _steps(key: str, document: Mapping[str, Any], place: str) -> KeyPath:
    """Return the path that an override's key names: numbers count elements of arrays."""
    try:
        parts = key_of(key)
    except ValueError as error:
        raise RecipeError(f"{place} with --set {key}", None, *_NO_PLACE) from error
    steps: KeyPath = ()
    node: Any = document
    for part in parts:
        step: str | int = int(part) if isinstance(node, list) and part.isdecimal() else part
        steps = (*steps, step)
        if isinstance(node, list) and not (isinstance(step, int) and step <= len(node)):
            raise RecipeError(
                f"{place} with --set {key}", None, f"{part!r} in an array of {len(node)}",
                "the number of an element, from 0",
            )  # fmt: skip
        if isinstance(node, list):
            node = node[step] if isinstance(step, int) and step < len(node) else {}
        else:
            absent: Any = [] if steps in _ARRAYS else {}
            node = node.get(part, absent) if isinstance(node, Mapping) else None
    return steps


_ARRAYS = (("outputs",), ("steps",))
"""Keys whose numbers count elements also where the file has none."""


def _put(document: Any, steps: KeyPath, value: Any, error: RecipeError) -> None:
    node = document
    for number, step in enumerate(steps[:-1]):
        below: Any = [] if isinstance(steps[number + 1], int) else {}
        try:
            there = step < len(node) if isinstance(step, int) else step in node
            if not there and isinstance(step, int):
                node.append(below)
            elif not there:
                node[step] = below
            node = node[step]
        except (TypeError, KeyError, AttributeError, TOMLKitError):
            raise error from None
    last = steps[-1]
    try:
        if isinstance(last, int) and last == len(node):
            node.append(value)
        else:
            node[last] = value
    except (TypeError, KeyError, AttributeError, ValueError, TOMLKitError):
        raise error from None


_NO_PLACE = ("a key where no value can be", "a key of a table, such as chips.size")


def values_of(text: str) -> dict[str, Any]:
    """Return what a text of TOML says, with dates and times as text: the API takes both."""
    values: dict[str, Any] = _texts(tomllib.loads(text))
    return values


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _texts(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_texts(one) for one in value]
    return value.isoformat() if isinstance(value, dt.date | dt.time) else value


def differences(there: Any, here: Any, path: KeyPath = ()) -> list[str]:
    """Return in words where two recipes' values differ: ``"chips.size is 128 there and 64 here"``."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [one for key in keys for one in differences(there.get(key), here.get(key), (*path, key))]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [one for number, (a, b) in pairs for one in differences(a, b, (*path, number))]
    if there == here:
        return []
    a, b = ("not there" if one is None else json.dumps(one, ensure_ascii=False)[:60] for one in (there, here))
    return [f"{spelled(path)} is {a} in the store and {b} here"]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return {"No such file or directory": "no such file"}.get(error.strerror, error.strerror)
    return str(error)


def _beside(place: str) -> str:
    """Return which recipe of the same folder may be meant."""
    path = Path(place).expanduser()
    folder = path.parent
    if path.is_dir():
        found = sorted(one.name for one in path.glob("*.toml"))
        return f"It is a folder. Name a file in it: {', '.join(found[:5])}." if found else "It is a folder."
    names = [one.name for one in folder.glob("*.toml")] if folder.is_dir() else []
    return nearest(path.name, names) or (f"There are {', '.join(sorted(names)[:5])}." if names else "")


_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def _syntax(message: str, text: str) -> tuple[str, int]:
    """Return what tomllib says, without the line, and the line."""
    match = _PLACE.search(message)
    line = int(match[1]) if match and match[1] else text.rstrip().count("\n") + 1
    return _PLACE.sub("", message), line


def _syntax_remedy(text: str, line: int) -> str:
    """Return what is usually meant by a line that is no TOML."""
    lines = text.splitlines()
    shown = lines[line - 1].strip() if line <= len(lines) else ""
    _, sign, value = shown.partition("=")
    if re.match(r"\s*(True|False|None)\b", value):
        return f"In {shown!r}: TOML writes true and false; what is None is left out."
    if sign and re.match(r"\s*[A-Za-z_/.~]", value):
        return f"In {shown!r}: text stands in quotes."
    return f"The line is {shown!r}." if shown else ""
