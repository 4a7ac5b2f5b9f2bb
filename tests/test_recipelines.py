"""The line of every key of a TOML text: documents are drawn with the lines that they were written on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.recipes.lines import KeyPath, key_of, lines_of, spelled

KEYS = st.sampled_from(["a", "b-1", "c_2", "7", "two words", 'q"uote', "eo:cloud", "é.x", ""])
SCALARS = st.sampled_from(
    [
        "1", "-2.5e3", "true", '"x"', '"a # b"', "'it = [1]'", '"\\" ] }"', "2024-04-01", "2024-04-01 10:00:00",
        "10:00:00", '"""\none\n[two]\nthree = "" \\"""" four"""', "'''\n# x\n''y'''", '""', "''", '""""""',
        "inf", "0x1F",
    ]
)  # fmt: skip
BLANKS = st.sampled_from(["", "", "", "\n", "# [x] = 'y\n", '  # "\n\n'])


class Writer:
    """Writes TOML, and notes the line of each key and element as it does."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.text = draw, ""
        self.lines: dict[KeyPath, int] = {}

    def line(self) -> int:
        return self.text.count("\n") + 1

    def key(self, path: KeyPath) -> None:
        """Write the last part of a path."""
        self.lines.setdefault(path, self.line())
        word = str(path[-1])
        bare = word.isascii() and word.replace("-", "").replace("_", "").isalnum()
        quoted = '"' + word.replace('"', '\\"') + '"'
        literal = f"'{word}'"
        self.text += self.draw(st.sampled_from([word, quoted, literal] if bare else [quoted, literal]))

    def value(self, path: KeyPath, depth: int) -> None:
        kind = self.draw(st.sampled_from(["scalar", "scalar", "array", "table"] if depth else ["scalar"]))
        if kind == "scalar":
            self.text += self.draw(SCALARS)
        elif kind == "array":
            self.text += "["
            for number in range(self.draw(st.integers(0, 3))):
                self.text += ("," if number else "") + self.draw(BLANKS) + " "
                self.lines[(*path, number)] = self.line()
                self.value((*path, number), depth - 1)
            self.text += self.draw(BLANKS) + "]"
        else:
            self.text += "{"
            for number, key in enumerate(self.draw(st.lists(KEYS, max_size=3, unique=True))):
                self.text += ", " if number else " "
                self.pair((*path, key), depth - 1)
            self.text += " }"

    def pair(self, path: KeyPath, depth: int) -> None:
        self.key(path)
        below = path
        for key in self.draw(st.lists(KEYS, max_size=2)):  # a dotted key
            below = (*below, key)
            self.text += self.draw(st.sampled_from([".", " . "]))
            self.key(below)
        self.text += self.draw(st.sampled_from(["=", " =  "]))
        self.value(below, depth)

    def pairs(self, table: KeyPath, taken: set[str]) -> None:
        for key in self.draw(st.lists(KEYS, max_size=3, unique=True)):
            if key not in taken:
                self.text += self.draw(BLANKS)
                self.pair((*table, key), 2)
                self.text += self.draw(st.sampled_from(["\n", "  # a = [\n"]))


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, int]]:
    writer = Writer(draw)
    tables = draw(
        st.lists(st.sampled_from(["t", "u", "v.w", "v.x.y", "[s]", "[s]", "s.in", "[s.deep]"]), max_size=6)
    )
    writer.pairs((), set())
    lengths: dict[KeyPath, int] = {}
    seen: set[KeyPath] = set()
    for header in tables:
        array = header.startswith("[")
        parts = header.strip("[]").split(".")
        path: KeyPath = ()
        if array and parts[0] == "s" and len(parts) == 1:
            lengths[("s",)] = lengths.get(("s",), 0) + 1
        if parts[0] == "s" and ("s",) not in lengths:
            continue
        inside: list[KeyPath] = []
        for number, part in enumerate(parts):
            path = (*path, part)
            inside.append(path)
            if number < len(parts) - 1 and path in lengths:
                path = (*path, lengths[path] - 1)
        if array and len(parts) > 1:
            lengths[path] = lengths.get(path, 0) + 1
        if array:
            path = (*path, lengths[path] - 1)
        elif path in seen:
            continue
        seen.add(path)
        writer.text += draw(BLANKS)
        for one in inside:
            writer.lines.setdefault(one, writer.line())
        writer.lines[path] = writer.line()
        writer.text += ("[[" if array else "[ ") + ".".join(parts) + ("]]" if array else " ]") + "\n"
        writer.pairs(path, {"in", "deep", "x"})
    return writer.text, writer.lines


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from paths(one, (*path, key))


@given(documents())
def test_every_key_and_element_has_the_line_it_was_written_on(
    document: tuple[str, dict[KeyPath, int]],
) -> None:
    text, lines = document
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # a dotted key that goes through a value: no recipe
    assert lines_of(text) == lines
    assert lines.keys() == set(paths(values))


@given(st.lists(KEYS.filter(bool) | st.just("7"), min_size=1, max_size=4))
def test_a_key_is_read_as_it_is_spelled(parts: list[str]) -> None:
    text = ".".join(part if part.isascii() and part.isalnum() else f"'{part}'" for part in parts)
    assert key_of(text) == tuple(parts)


@pytest.mark.parametrize("text", ["", "a.", "a b", "a=1\nb", "[a]"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # tomllib's own
        key_of(text)


def test_paths_are_spelled_as_people_write_them() -> None:
    assert spelled(("outputs", 0, "zarr")) == "outputs[0].zarr"
    assert (
        spelled(("collections", "s2", "subset", "eo:cloud_cover")) == 'collections.s2.subset."eo:cloud_cover"'
    )
