# SPDX-License-Identifier: Apache-2.0
"""Facts about a value, said once: as text of at most twelve lines, and as a card in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rasteret_dask.display import html
from rasteret_dask.display.html import Markup

__all__ = ["Card", "Fact", "counted"]

MOST_LINES = 12
"""Lines of a card's text."""

LINE = 100
"""Characters of a line that goes on in another one, where there is room for that."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact."""

    name: str
    """"" goes on with the fact above; such rows are the first to go where there are too many."""
    text: str
    markup: Callable[[], Markup] | None = None
    """Makes what a notebook shows in place of the text."""


@dataclass(frozen=True, slots=True)
class Card:
    """A title and facts, with pictures where there is room for them.

    Markup and pictures are functions: a prompt, which shows neither, does not wait for them.
    """

    title: str
    rows: Sequence[Fact]
    """A row's steps (``" > "``) and parts (``"; "``) get lines of their own where it is long and there is room."""
    pictures: Sequence[Callable[[], Markup]] = ()
    ok: bool | None = None
    """Of a verdict, which a notebook shows green or red; None: this is none."""

    @property
    def text(self) -> str:
        """The facts, at most ``MOST_LINES`` lines; nothing is cut off, what has no room is named."""
        rows = [Fact(_line(row.name), _line(row.text)) for row in self.rows]
        room = MOST_LINES - 1
        while len(rows) > room and (further := [at for at, row in enumerate(rows) if not row.name]):
            del rows[further[-1]]
        if len(rows) > room:
            names = [row.name for row in rows[room - 1 :]]
            shown = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])} ... {names[-1]}"
            rows = [*rows[: room - 1], Fact(f"{len(names)} more", shown)]
        wide = max((len(row.name) + 1 for row in rows), default=0)
        lines: list[str] = []
        for at, row in enumerate(rows):
            own = _folded(row.text, LINE - wide)
            if len(lines) + len(own) + len(rows) - at - 1 > room:
                own = [row.text]
            lines += [
                f"{row.name + ':' if row.name and not further else '':<{wide}} {text}".rstrip()
                for further, text in enumerate(own)
            ]
        return "<" + "\n ".join([_line(self.title), *lines]) + ">"

    @property
    def html(self) -> Markup:
        """The facts with their pictures."""
        rows = [(row.name, row.text if row.markup is None else row.markup()) for row in self.rows]
        title = self.title if self.ok is None else html.verdict(self.ok, self.title)
        return html.card(title, rows, [picture() for picture in self.pictures])


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 chip`` or ``1,200 chips``."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def _folded(text: str, width: int) -> list[str]:
    """Return text in lines of some width, broken only before a step or after a part, outside of brackets."""
    if len(text) <= width:
        return [text]
    ends, depth = [], 0
    for at, one in enumerate(text):
        depth += (one in "([") - (one in ")]")
        if depth == 0 and (text.startswith(" > ", at) or text.startswith("; ", at)):
            ends.append(at if one == " " else at + 1)
    lines, start = [], 0
    for end, following in pairwise([*ends, len(text)]):
        if following - start > width:
            lines.append(text[start:end].strip())
            start = end
    return [*lines, text[start:].strip()]


def _line(text: str) -> str:
    """Return text as one line that any terminal can print."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
