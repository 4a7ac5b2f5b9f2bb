# SPDX-License-Identifier: Apache-2.0
"""How far a job is, for whoever waits for it: a bar on a terminal, a bar in a notebook, or lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

import dask.config
from dask.utils import parse_timedelta

from rasteret_dask.activity import Tally

__all__ = ["Face", "Progress", "Standing", "nbytes_text", "seconds", "seconds_text"]

RATE_S = 30.0
"""Seconds over which bytes a second are measured."""
LEAST_S, LEAST_SHARE = 2.0, 0.01
"""Seconds, and share of a job, after which its rate and the time that is left are told."""


def seconds(key: str, default: str) -> float:
    """Return a time from Dask's configuration, such as ``rasteret_dask.watch.no-workers``: ``"30s"``."""
    return float(parse_timedelta(dask.config.get(f"rasteret_dask.{key}", default), default="s"))


def nbytes_text(nbytes: float) -> str:
    """Return ``1.2 GB``: two to four digits, in powers of 1,000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            value = nbytes / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{nbytes:.0f} B"


def seconds_text(duration: float) -> str:
    """Return ``40 s``, ``3 min`` or ``2 h 10 min``."""
    if duration < 90:
        return f"{duration:.0f} s"
    minutes = round(duration / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is at one moment: what a face draws."""

    unit: str
    """What is counted: ``"shards"``."""
    done: int
    total: int | None
    """None where nobody knows."""
    detail: str
    """What else is counted: ``"310 of 1,024 chips"``."""
    tally: Tally
    rate: float
    """Bytes read a second, over the last half minute."""
    passed_s: float
    left_s: float | None
    """None where it cannot be told yet."""
    failed: int
    running: str
    """What runs at this moment: ``"2 running on 2 threads"``."""
    share: float | None
    """Share of the job that is done, what is under way included; None where the total is unknown."""
    ended: bool = False
    interrupted: bool = False
    """Whether it ended with an error, or was stopped."""

    @property
    def count(self) -> str:
        """``12/40 shards``."""
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.done}{of} {self.unit}"

    @property
    def left(self) -> str:
        """``about 3 min left``; empty where it cannot be told."""
        return "" if self.left_s is None or self.ended else f"about {seconds_text(max(self.left_s, 1))} left"

    @property
    def failures(self) -> str:
        """``1 failed``; empty where nothing has."""
        return f"{self.failed} failed" if self.failed else ""

    @property
    def parts(self) -> tuple[str, ...]:
        """What there is to say, the count first."""
        tally = self.tally
        rate = f" ({nbytes_text(self.rate)}/s)" if self.rate else ""
        every = (
            self.count,
            self.detail,
            f"{nbytes_text(tally.bytes_read)} read{rate}" if tally.bytes_read else "",
            f"{nbytes_text(tally.bytes_written)} written" if tally.bytes_written else "",
            f"{self.passed_s:.0f} s",
            self.left,
            self.failures,
            "" if self.ended else self.running,
            "stopped" if self.interrupted else "",
        )
        return tuple(part for part in every if part)

    @property
    def text(self) -> str:
        """One line."""
        return ", ".join(self.parts)


class Face(Protocol):
    """Shows a job to somebody; only one thread draws at a time."""

    def draw(self, standing: Standing) -> None:
        """Show how far it is, or that it has ended; called twice a second."""

    def note(self, text: str) -> None:
        """Show a line of its own."""


class Progress:
    """How far something is, shown until its context ends.

    A thread draws it twice a second: a bar on a terminal (rich) or in a notebook, and where there is neither a line
    every ``rasteret_dask.progress.every`` (Dask's configuration, 30 s). Whoever works only sets what has changed.

    Parameters
    ----------
    unit
        What is counted: ``"items"``.
    shown
        False: nothing is drawn, no thread begins, and only :meth:`note` is written.
    total
        How many there will be, or None where nobody knows.
    """

    def __init__(self, unit: str, shown: bool, total: int | None = None) -> None:
        self.unit, self.shown, self.total = unit, shown, total
        self.done = self.failed = 0
        self.detail = ""
        """What else is counted, such as ``"310 of 1,024 chips"``."""
        self.running = ""
        """What runs at this moment, where :attr:`live` does not tell."""
        self.live: Callable[[], Tally] = Tally
        """Returns what is under way; called by the thread that draws."""
        self._ended = Tally()
        self._before = 0  # done by an earlier run: no measure of how quick this one is
        self._furthest = Tally()
        self._moved: tuple[float, float] | None = None  # when it was seen to move first, and how far it was
        self._face: Face | None = None
        self._start = time.monotonic()
        self._read: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()  # of the threads that work, and the one that draws
        self._drawing = threading.RLock()  # apart: who works does not wait for a slow terminal
        self._over = threading.Event()
        self._drawer: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self.shown:
            self._drawer = threading.Thread(target=self._keep_drawing, name="rasteret-progress", daemon=True)
            self._drawer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawer is None:
            return
        self._over.set()
        self._drawer.join()
        self._draw(ended=True, interrupted=kind is not None)

    def begin(self, done: int) -> None:
        """Count what an earlier run has done."""
        with self._lock:
            self._before += done
            self.done += done

    def step(self, count: int, detail: str = "", tally: Tally | None = None) -> None:
        """Count some more as done.

        Parameters
        ----------
        count
            How many.
        detail
            Takes the place of :attr:`detail`.
        tally
            What was read and written for them.
        """
        with self._lock:
            self.done += count
            self.detail = detail
            if tally is not None:
                self._ended += tally.ended

    def add(self, tally: Tally) -> None:
        """Count what was read and written, though nothing more is done."""
        with self._lock:
            self._ended += tally.ended

    def note(self, text: str) -> None:
        """Write a line of its own."""
        with self._drawing:
            if self._face is not None:
                self._face.note(text)
            else:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

    def standing(self, ended: bool = False, interrupted: bool = False) -> Standing:
        """Return how far it is now. Neither bytes nor the share ever fall, though what was under way may be lost."""
        under_way = Tally() if ended else self.live()
        with self._lock:
            now, high = time.monotonic(), self._furthest
            tally = self._ended + under_way
            passed, count = now - self._start, self.done + under_way.share
            share = None
            if self.total:
                over = ended and not interrupted and not self.failed  # some totals are only estimates
                share = 1.0 if over else max(high.share, min(count / self.total, 1.0))
            self._furthest = Tally(
                max(tally.tiles, high.tiles),
                max(tally.bytes_read, high.bytes_read),
                max(tally.bytes_written, high.bytes_written),
                share or 0.0,
            )
            self._read.append((now, self._furthest.bytes_read))
            while len(self._read) > 2 and now - self._read[0][0] > RATE_S:
                self._read.popleft()
            first, nbytes = self._read[0]
            rate = (self._furthest.bytes_read - nbytes) / (now - first) if now - first > LEAST_S else 0.0
            if ended:
                rate = self._furthest.bytes_read / passed if passed > LEAST_S else 0.0
            left = None
            if share is not None and self.total and share > self._before / self.total:
                self._moved = self._moved or (now, share)
                since, begun = self._moved  # who waits for workers is not slow
                if now - since > LEAST_S and share - begun > LEAST_SHARE:
                    left = (1 - share) * (now - since) / (share - begun)
            return Standing(
                self.unit, self.done, self.total, self.detail, self._furthest, rate, passed, left, self.failed,
                self.running, share, ended, interrupted,
            )  # fmt: skip

    def _keep_drawing(self) -> None:
        while not self._over.wait(seconds("progress.refresh", "500ms")):
            self._draw()

    def _draw(self, ended: bool = False, interrupted: bool = False) -> None:
        with self._drawing:
            standing = self.standing(ended, interrupted)
            try:
                self._face = self._face or face(ended)
                self._face.draw(standing)
            except (OSError, ValueError):  # nobody reads it any more: the job goes on
                self._over.set()


def face(brief: bool = False) -> Face:
    """Return what shows progress where this process runs.

    Parameters
    ----------
    brief
        Whether there is only an end to show: then rich need not be imported for a bar.
    """
    shell = _shell()
    if getattr(shell, "kernel", None) is not None:
        return InNotebook()
    if not brief and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        return OnTerminal()
    return InLog()


def _shell() -> Any:
    """Return IPython's shell; None where this process has none."""
    loaded = sys.modules.get("IPython")
    return loaded.get_ipython() if loaded is not None else None


class InLog:
    """A line when it begins, one every ``rasteret_dask.progress.every``, and one when it ends."""

    def __init__(self) -> None:
        self._written: float | None = None

    def draw(self, standing: Standing) -> None:
        """Write a line where it is time for one."""
        now, every = time.monotonic(), seconds("progress.every", "30s")
        if self._written is None or standing.ended or now - self._written >= every:
            self._written = now
            self.note(standing.text)

    def note(self, text: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class OnTerminal:
    """A bar and a line below it, drawn by rich; it leaves the last of them, and the cursor below."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # what is printed or logged meanwhile goes above the bar
        self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._live.start()

    def draw(self, standing: Standing) -> None:
        """Draw the bar anew."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = standing.share
        total, pulse = (None, not standing.ended) if share is None else (1.0, False)
        bar = ProgressBar(total=total, completed=share or 0.0, width=30, pulse=pulse, complete_style="blue")
        line = Table.grid(padding=(0, 1))
        percent = "" if share is None else f"{100 * share:.0f}%"
        line.add_row(bar, Text(percent), Text(standing.count, style="bold"), Text(standing.left))
        rest = [part for part in standing.parts if part not in (standing.count, standing.left)]
        below = Text(", ".join(rest), style="dim", no_wrap=True, overflow="ellipsis")
        if standing.failures:
            below.highlight_words([standing.failures], style="bold red not dim")
        self._live.update(Group(line, below), refresh=True)
        if standing.ended:
            self._live.stop()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)


class InNotebook:
    """A bar below the cell, which is updated in place; lines of their own go to the cell's stderr."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, standing: Standing) -> None:
        """Draw the bar anew."""
        shown: Any = import_module("IPython.display")  # which the kernel has imported
        html = shown.HTML(bar_html(standing))
        if self._handle is None:
            self._handle = shown.display(html, display_id=True)
        else:
            self._handle.update(html)

    def note(self, text: str) -> None:
        """Write a line below the cell."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def bar_html(standing: Standing) -> str:
    """Return a bar and its text; it takes the page's colours, and so is light or dark as the page is."""
    count, *rest = standing.parts
    tone = (
        "#c62828" if standing.failed or standing.interrupted else "#2e7d32" if standing.ended else "#4878a8"
    )
    share = standing.share
    bar = ""
    if share is not None:
        bar = (
            "<div style='flex:0 0 240px;max-width:240px;height:10px;border-radius:5px;overflow:hidden;"
            "position:relative'>"
            "<div style='position:absolute;inset:0;background:currentColor;opacity:.18'></div>"
            f"<div style='position:absolute;inset:0;width:{100 * share:.1f}%;background:{tone}'></div></div>"
        )
    percent = "" if share is None else f"{100 * share:.0f}% "
    return (
        "<div role='status' style='font:13px system-ui,sans-serif;line-height:1.5'>"
        f"<div style='display:flex;gap:10px;align-items:center;flex-wrap:wrap'>{bar}<b>{percent}{escape(count)}</b>"
        f"<span style='opacity:.75'>{escape(', '.join(rest))}</span></div></div>"
    )
