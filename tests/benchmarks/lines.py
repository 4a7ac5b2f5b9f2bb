"""Counts lines of code: those with a token of a statement on them; no comments, docstrings, imports or blank lines."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def count(parts: Sequence[str]) -> int:
    """Count the lines of parts.

    Parameters
    ----------
    parts
        ``module`` beside this one, ``module:name`` for one function or class, or ``README``: its first block.
    """
    return sum(len(_lines(part)) for part in parts)


def _lines(part: str) -> set[int]:
    module, _, name = part.partition(":")
    if part == "README":
        source = README.read_text().split("```python\n", 1)[1].split("```", 1)[0]
    else:
        source = Path(__file__).with_name(f"{module}.py").read_text()
    tree = ast.parse(source)
    tops = [n for n in tree.body if not name or getattr(n, "name", "") == name]
    if not tops:
        raise SystemExit(f"no {name} in {module}.py, whose lines are to be counted")
    found: set[int] = set()
    for top in tops:
        for node in ast.walk(top):
            if isinstance(node, ast.stmt | ast.expr) and not _is_silent(node):
                found |= {node.lineno, node.end_lineno or node.lineno}
    return found - _silent_lines(tops)


def _is_silent(node: ast.AST) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def _silent_lines(tops: Sequence[ast.stmt]) -> set[int]:
    silent = [n for top in tops for n in ast.walk(top) if isinstance(n, ast.stmt) and _is_silent(n)]
    return {line for n in silent for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
