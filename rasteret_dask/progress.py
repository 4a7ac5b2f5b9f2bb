"""One line on stderr that says how far something is."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

import dask.config
from dask.utils import parse_timedelta

__all__ = ["Progress", "seconds"]

_WIDTH = 30
_EVERY_S = 5.0
"""Between lines, where they cannot be written over each other."""


def seconds(key: str, default: str) -> float:
    """Return a time from Dask's configuration, such as ``rasteret_dask.watch.no-workers``: ``"30s"``."""
    return float(parse_timedelta(dask.config.get(f"rasteret_dask.{key}", default), default="s"))


class Progress:
    """A line that says how many of something are done; it ends with its context.

    On a terminal the line is written over itself. In a log it is a new line: when something is done, but no more than
    one in 5 s, and otherwise every ``rasteret_dask.progress.every`` (Dask's configuration, 30 s) where somebody calls
    :meth:`tick`.

    Parameters
    ----------
    unit
        What is counted: ``"items"``.
    shown
        False: no line is written, and only :meth:`note` is.
    total
        How many there will be, or None where nobody knows.
    """

    def __init__(self, unit: str, shown: bool, total: int | None = None) -> None:
        self.unit, self.shown, self.total = unit, shown, total
        self.done = 0
        self._tail = ""
        self._start = time.monotonic()
        self._written = -_EVERY_S
        self._open = False  # the cursor stands behind a line that is not ended
        self._lock = threading.RLock()  # of the thread that counts and the one that watches

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tail = ""
        self._line("", 0, last=True)

    def step(self, count: int, tail: str = "") -> None:
        """Count some more as done."""
        with self._lock:
            self.done += count
            self._tail = tail
            self._line("", _EVERY_S)

    def tick(self, running: str) -> None:
        """Say that it goes on, and what runs, though nothing more is done."""
        self._line(running, seconds("progress.every", "30s"))

    def note(self, text: str) -> None:
        """Write a line of its own."""
        with self._lock:
            sys.stderr.write(("\n" if self._open else "") + f"{text}\n")
            sys.stderr.flush()
            self._open = False

    def _line(self, running: str, every_s: float, last: bool = False) -> None:
        if not self.shown:
            return
        with self._lock:
            terminal = sys.stderr.isatty()
            passed = time.monotonic() - self._start
            if not terminal and not last and passed - self._written < every_s:
                return
            self._written = passed
            bar, of = "", ""
            if self.total:
                full = min(_WIDTH, _WIDTH * self.done // self.total)
                bar, of = f"[{'#' * full}{'.' * (_WIDTH - full)}] ", f"/{self.total}"
            text = f"{bar}{self.done}{of} {self.unit}, {passed:.0f} s{self._tail}{running}"
            sys.stderr.write(f"\r{text:<100}" + ("\n" if last else "") if terminal else f"{text}\n")
            sys.stderr.flush()
            self._open = terminal and not last
