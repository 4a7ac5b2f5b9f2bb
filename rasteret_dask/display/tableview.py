# SPDX-License-Identifier: Apache-2.0
"""An Arrow table that reads like a table, at a prompt and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from rasteret_dask.display.html import Markup, markup, table

__all__ = ["Columns", "TableView"]

Columns: TypeAlias = Mapping[str, Sequence[object]]
"""Header -> a value a row: numbers, text or None."""

MOST_ROWS = 40
"""Rows that are printed."""


class TableView:
    """An Arrow table that prints as a table: what :func:`datasets`, ``head``, ``left_out`` and others return.

    All methods and columns of ``pyarrow.Table`` are here (``to_pandas()``, ``to_pylist()``, ``column("id")``,
    ``num_rows``, ``select([...])``), and whatever takes Arrow (pandas, Polars, DuckDB, ``pyarrow.table``) takes it.
    What is printed are the columns that people look at; ``column_names`` says which others there are.

    Parameters
    ----------
    arrow
        The table.
    looks
        Makes the columns that are printed of some rows of it; None: all columns as they are.

    Examples
    --------
    >>> import pyarrow as pa
    >>> view = TableView(pa.table({"id": ["a", "b"], "count": [1, 2000]}))
    >>> view
    id  count
    a       1
    b   2,000
    >>> view.column("count").to_pylist(), len(view), pa.table(view).column_names
    ([1, 2000], 2, ['id', 'count'])
    """

    __slots__ = ("_looks", "arrow")

    def __init__(self, arrow: pa.Table, looks: Callable[[pa.Table], Columns] | None = None) -> None:
        self.arrow = arrow
        """The table itself, a ``pyarrow.Table``."""
        self._looks = looks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "arrow":  # while it is unpickled there is no table yet
            raise AttributeError(name)
        return getattr(self.arrow, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.arrow)})

    def __getitem__(self, key: Any) -> Any:
        return self.arrow[key]

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    def __eq__(self, other: object) -> bool:
        same = other.arrow if isinstance(other, TableView) else other
        return isinstance(same, pa.Table) and bool(self.arrow.equals(same))

    __hash__ = None  # type: ignore[assignment]

    def equals(self, other: TableView | pa.Table, check_metadata: bool = False) -> bool:
        """Tell whether another table, or one that prints, has the same columns and values.

        Examples
        --------
        >>> import pyarrow as pa
        >>> TableView(pa.table({"id": ["a"]})).equals(TableView(pa.table({"id": ["a"]})))
        True
        """
        same = other.arrow if isinstance(other, TableView) else other
        return bool(self.arrow.equals(same, check_metadata))

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.arrow.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        head, rows, last = self._printed()
        texts = [[_text(value) for value in row] for row in rows]
        right = [all(_is_number(row[at]) for row in rows) for at in range(len(head))]
        wide = [max(map(len, column)) for column in zip(head, *texts, strict=True)]
        lines = [
            "  ".join(
                text.rjust(width) if number else text.ljust(width)
                for text, width, number in zip(line, wide, right, strict=True)
            ).rstrip()
            for line in (head, *texts)
        ]
        return "\n".join([*lines, *([f"({last})"] if last else [])])

    def _repr_html_(self) -> str:
        head, rows, last = self._printed()
        note = f"<div class=rd-dim>{markup(last)}</div>" if last else ""
        return Markup(table(head, rows) + note)

    def _printed(self) -> tuple[list[str], list[list[object]], str]:
        """Return the header, the rows that are printed, and what is said of all others."""
        some = self.arrow.slice(0, MOST_ROWS)
        names = (
            {name: some.column(name).to_pylist() for name in some.column_names} if self._looks is None else {}
        )
        columns = names if self._looks is None else self._looks(some)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        notes = []
        if len(self) > len(some):
            notes.append(f"{len(self):,} rows, the first {len(some)} shown")
        elif not len(self):
            notes.append("no rows")
        if self._looks is not None:
            notes.append(f"all {self.arrow.num_columns} columns: .column_names, .to_pandas()")
        return list(columns), rows, "; ".join(notes)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(value))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
