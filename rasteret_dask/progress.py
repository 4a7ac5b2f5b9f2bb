"""One line on stderr that says how far something is."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress"]

_WIDTH = 30
_EVERY_S = 5.0
"""Between lines, where they cannot be written over each other."""


class Progress:
    """A line that says how many of something are done; it ends with its context.

    Parameters
    ----------
    unit
        What is counted: ``"items"``.
    shown
        False: nothing is written.
    total
        How many there will be, or None where nobody knows.
    """

    def __init__(self, unit: str, shown: bool, total: int | None = None) -> None:
        self.unit, self.shown, self.total = unit, shown, total
        self.done = 0
        self._start = time.monotonic()
        self._written = -_EVERY_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line("", last=True)

    def step(self, count: int, tail: str = "") -> None:
        """Count some more as done."""
        self.done += count
        self._line(tail)

    def _line(self, tail: str, last: bool = False) -> None:
        if not self.shown:
            return
        terminal = sys.stderr.isatty()
        passed = time.monotonic() - self._start
        if not terminal and not last and passed - self._written < _EVERY_S:
            return
        self._written = passed
        bar, of = "", ""
        if self.total:
            full = min(_WIDTH, _WIDTH * self.done // self.total)
            bar, of = f"[{'#' * full}{'.' * (_WIDTH - full)}] ", f"/{self.total}"
        text = f"{bar}{self.done}{of} {self.unit}, {passed:.0f} s{tail}"
        sys.stderr.write(f"\r{text:<70}" + ("\n" if last else "") if terminal else f"{text}\n")
        sys.stderr.flush()
