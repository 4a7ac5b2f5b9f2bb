# SPDX-License-Identifier: Apache-2.0
"""On which line of a TOML text each key and each element stands; TOML libraries of Python do not tell."""

from __future__ import annotations

import re
import tomllib
from typing import TypeAlias

__all__ = ["KeyPath", "key_of", "lines_of", "spelled"]

KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Keys and positions from the top: ``("collections", "s2", "dataset")``, ``("steps", 0, "sample")``."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'  # up to two quotes may stand before the closing three
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PLAIN = re.compile(r"[^\s,\]}#]+(?: [0-9][^\s,\]}#]*)?")  # a date and a time may have a blank between them


def lines_of(text: str) -> dict[KeyPath, int]:
    r"""Return the line, from 1, of every table, key and element of an array.

    Parameters
    ----------
    text
        TOML that ``tomllib`` reads: of anything else the answer means nothing.

    Examples
    --------
    >>> from rasteret_dask.recipes.lines import lines_of
    >>> lines_of("[chips]\nsize = 128\n")
    {('chips',): 1, ('chips', 'size'): 2}
    """
    return _Scanner(text).document()


def key_of(text: str) -> tuple[str, ...]:
    """Return the parts of a dotted key, as TOML writes it.

    Raises
    ------
    ValueError
        When it is none.
    """
    value = tomllib.loads(f"{text} = 0")
    parts: list[str] = []
    node: object = value
    while isinstance(node, dict):
        if len(node) != 1:
            raise ValueError(text)
        ((part, node),) = node.items()
        parts.append(part)
    return tuple(parts)


def spelled(path: KeyPath) -> str:
    """Return a path as a dotted key: ``collections.s2.dataset``, ``steps[0].sample``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if _BARE.fullmatch(part) else f'"{part}"'
            text += f".{word}" if text else word
    return text


class _Scanner:
    """Goes through a text once; it need not look for errors, as the text was read before."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self._counted = (0, 1)

    def document(self) -> dict[KeyPath, int]:
        """Go through all tables."""
        table: KeyPath = ()
        lengths: dict[KeyPath, int] = {}
        while self._skip_blank():
            if self.text.startswith("[[", self.at):
                self.at += 2
                array = self._inside(self._keys(), lengths, last=False)
                number = lengths[array] = lengths.get(array, 0) + 1
                table = (*array, number - 1)
                self.lines.setdefault(array, self._line())
                self.lines[table] = self._line()
                self._expect("]]")
            elif self.text.startswith("[", self.at):
                self.at += 1
                table = self._inside(self._keys(), lengths, last=True)
                self.lines[table] = self._line()
                self._expect("]")
            else:
                self._pair(table)
        return self.lines

    def _inside(self, keys: list[tuple[str, int]], lengths: dict[KeyPath, int], *, last: bool) -> KeyPath:
        """Return a header's path: a key of an array of tables means its last element."""
        path: KeyPath = ()
        for number, (key, line) in enumerate(keys):
            path = (*path, key)
            self.lines.setdefault(path, line)
            if path in lengths and (last or number < len(keys) - 1):
                path = (*path, lengths[path] - 1)
        return path

    def _pair(self, table: KeyPath) -> None:
        path = table
        for key, line in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._expect("=")
        self._skip_blank()
        self._value(path)

    def _keys(self) -> list[tuple[str, int]]:
        """Read a dotted key: each part with its line."""
        keys: list[tuple[str, int]] = []
        while True:
            self._skip_blank()
            line = self._line()
            bare = _BARE.match(self.text, self.at)
            match = bare or _STRING.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            keys.append((match[0] if bare else key_of(match[0])[0], line))
            self._skip_blank()
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        if self.text[self.at] == "[":
            self.at += 1
            number = 0
            while self._more("]"):
                self.lines[(*path, number)] = self._line()
                self._value((*path, number))
                number += 1
        elif self.text[self.at] == "{":
            self.at += 1
            while self._more("}"):
                self._pair(path)
        else:
            match = _STRING.match(self.text, self.at) or _PLAIN.match(self.text, self.at)
            assert match is not None
            self.at = match.end()

    def _more(self, end: str) -> bool:
        """Go to the next element of an array or inline table; False, behind its end, where there is none."""
        self._skip_blank()
        if self.text[self.at] == ",":
            self.at += 1
            self._skip_blank()
        if self.text[self.at] != end:
            return True
        self.at += 1
        return False

    def _skip_blank(self) -> bool:
        """Go on behind blanks, line ends and comments; return whether anything follows."""
        match = _BLANK.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at < len(self.text)

    def _expect(self, mark: str) -> None:
        self._skip_blank()
        assert self.text.startswith(mark, self.at)
        self.at += len(mark)

    def _line(self) -> int:
        at, line = self._counted
        line += self.text.count("\n", at, self.at)
        self._counted = (self.at, line)
        return line
