# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: answers on stdout, as tables or JSON; everything else on stderr."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["answer", "console", "details", "listing", "plain", "tell", "tell_written"]

PIPE_WIDTH = 1000
"""Characters of a line in a pipe, a file or a batch job's log: nothing is wrapped there, so that it can be searched."""


def console(*, stderr: bool = False) -> Console:
    """Return where to print: in colour on a terminal alone (NO_COLOR and TERM=dumb are respected).

    Parameters
    ----------
    stderr
        For what is no answer: messages, warnings, how far something is.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False)


def tell(message: str, style: str = "") -> None:
    """Write a message on stderr, after the program's name: a line, however wide the terminal is."""
    from rich.text import Text

    text = Text.assemble(("rasteret-dask:", style), " ", message)
    console(stderr=True).print(text, soft_wrap=True)


def answer(document: Any, shown: RenderableType, as_json: bool) -> None:
    """Print a command's answer on stdout.

    Parameters
    ----------
    document
        The answer as plain values, dataclasses or numbers of NumPy: what ``--json`` prints.
    shown
        The same for people.
    as_json
        Whether a script wants it.
    """
    if as_json:
        sys.stdout.write(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    here = console()
    if here.is_terminal:
        here.print(shown)
        return
    with here.capture() as text:
        here.print(shown)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def tell_written(message: str, document: Mapping[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Say that a file is written: on stderr, with ``--json`` as JSON on stdout instead; with ``--quiet`` nothing."""
    if as_json:
        answer(document, "", as_json)
    elif not quiet:
        tell(message)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses as objects, times as ISO 8601, NaN and infinite numbers as null."""
    match value:
        case None | bool() | int() | str():
            return value.value if isinstance(value, Enum) else value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case datetime.datetime() | datetime.date():
            return value.isoformat()
        case Path():
            return str(value)
        case bytes():
            return value.hex()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def details(rows: Iterable[tuple[str, Any]], title: str = "") -> RenderableType:
    """Return names with their values, a line each; lines without a value are left out.

    Parameters
    ----------
    rows
        (name, value): a value may be a text, a number or something that Rich renders.
    title
        Stands above them.
    """
    table = _bare_table()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value != "":
            table.add_row(name, _cell(value))
    return _titled(title, table)


def listing(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> RenderableType:
    """Return a table with a header; numbers stand right, and neither they nor the first column are wrapped.

    Parameters
    ----------
    columns
        The names of its columns.
    rows
        Values of each row, in the columns' order.
    title
        Stands above it.
    """
    content = [tuple(row) for row in rows]
    table = _bare_table(header=True)
    for number, name in enumerate(columns):
        numbers = all(isinstance(row[number], int | float) for row in content)
        whole = numbers or number == 0  # a number or a name in two lines is none
        table.add_column(name, justify="right" if numbers else "left", overflow="fold", no_wrap=whole)
    for row in content:
        table.add_row(*map(_cell, row))
    return _titled(title, table)


def _bare_table(header: bool = False) -> Table:
    from rich.table import Table

    return Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))


def _titled(title: str, table: Table) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(Text(title, style="bold underline"), table) if title else table


def _cell(value: Any) -> RenderableType:
    from rich.text import Text

    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if math.isfinite(value) else "-"
        case None:
            return "-"
        case str():
            return Text(value)
    return value  # type: ignore[no-any-return]
