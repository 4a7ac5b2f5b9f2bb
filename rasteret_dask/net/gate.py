# SPDX-License-Identifier: Apache-2.0
"""Who may ask a host, and when: one gate a host, which all threads of the process pass, and which a refusal narrows."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from threading import Condition, Lock

__all__ = ["HOST_CONNECTIONS", "RETRY_AFTER_MOST_S", "ROUNDS", "Gate", "ThrottledError", "at", "seconds"]

HOST_CONNECTIONS = 48
"""Requests that a process has under way at one host, at most, whatever for, and connections that it holds there.

At 30 ms to the first byte, 48 read 15 % more headers a second than 32; 64 only get in each other's way.
"""

ROUNDS = 6
"""Times in a row that a host may refuse everything before who asked is told."""

RETRY_AFTER_MOST_S = 120.0
"""However long a host asks us to wait."""

_IN_A_ROW = 3
"""503s without Retry-After and without a success in between, from which on they mean the host and not one answer."""


class ThrottledError(Exception):
    """A host said: not so much, or not now (429, 503, SlowDown).

    Parameters
    ----------
    text
        What it said, for messages.
    wait_s
        What its Retry-After asked for; None where there was none.
    sure
        Whether that can mean nothing else; a single 503 may be about one answer only.
    """

    def __init__(self, text: str, wait_s: float | None = None, sure: bool = True) -> None:
        super().__init__(text, wait_s, sure)
        self.text, self.wait_s, self.sure = text, wait_s, sure


class Gate:
    """How many requests may be under way at one host, and from when on.

    A refusal closes the gate for all threads, for as long as the host asks or for growing random pauses; then one
    request goes ahead, the one that was refused most often, and with each answer twice as many, up to half of what was
    too much; from there on one more at a time. Refusals of requests that were under way when the gate closed count as
    one. After ROUNDS in a row, everybody who was refused is told so without another request.

    Parameters
    ----------
    most
        Requests under way, at most.
    clock
        Seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.width: float = most
        """Requests that may be under way now."""
        self.rounds = 0
        """Times in a row that the gate was closed, without an answer in between."""
        self._most, self._enough = most, most
        self._under = 0
        self._waiting: list[int] = []
        self._row = 0
        self._closed_at = -1.0
        self._opens_at = 0.0
        self._changed = Condition(Lock())
        self._clock = clock

    @contextmanager
    def turn(self, backoff_s: float, refusals: Sequence[ThrottledError] = ()) -> Iterator[None]:
        """Wait for a turn, and take it for the length of a block; a ThrottledError that leaves it closes the gate.

        Parameters
        ----------
        backoff_s
            How long it is closed where the host does not say; each time in a row twice as long, times 1 to 1.5.
        refusals
            Those that the same request has had before.

        Raises
        ------
        ThrottledError
            The last of the refusals, when the host has refused everybody ROUNDS times in a row.
        """
        began = self._enter(refusals)
        try:
            yield
        except ThrottledError as refusal:
            self.leave(began, refusal, backoff_s)
            raise
        except BaseException:
            self.leave(began, None, backoff_s, answered=False)
            raise
        self.leave(began, None, backoff_s)

    def _enter(self, refusals: Sequence[ThrottledError]) -> float:
        rank = len(refusals)
        with self._changed:
            self._waiting.append(rank)
            try:
                while True:
                    if refusals and self.rounds >= ROUNDS:
                        raise refusals[-1]
                    now = self._clock()
                    pause = self._opens_at - now
                    if pause <= 0 and self._under < max(1, int(self.width)) and rank >= max(self._waiting):
                        self._under += 1
                        return now
                    self._changed.wait(pause if pause > 0 else None)
            finally:
                self._waiting.remove(rank)
                if self._waiting:
                    self._changed.notify_all()

    def free_turn(self) -> float | None:
        """Take a turn where one is free at once, and return when, for :meth:`leave`; None where one had to wait."""
        with self._changed:
            now = self._clock()
            if self._waiting or now < self._opens_at or self._under >= max(1, int(self.width)):
                return None
            self._under += 1
            return now

    def leave(
        self, began: float, refusal: ThrottledError | None, backoff_s: float, answered: bool = True
    ) -> None:
        """End a turn that began then: with an answer, a refusal, or neither."""
        with self._changed:
            self._under -= 1
            if refusal is not None:
                self._row += 1
                if refusal.sure or refusal.wait_s is not None or self._row >= _IN_A_ROW:
                    self._close(began, refusal, backoff_s)
            elif answered:
                self._row = self.rounds = 0
                grown = self.width * 2 if self.width < self._enough else self.width + 1 / self.width
                self.width = min(self._most, grown)
            if self._waiting:
                self._changed.notify_all()

    def _close(self, began: float, refusal: ThrottledError, backoff_s: float) -> None:
        now = self._clock()
        pause = backoff_s * 2 ** min(self.rounds, ROUNDS) * random.uniform(1, 1.5)
        if refusal.wait_s is not None:
            pause = min(refusal.wait_s, RETRY_AFTER_MOST_S)
        if began > self._closed_at:  # else it was under way when the gate closed, and says nothing new
            self._enough = max(1, int(self.width) // 2)
            self.width = 1
            self.rounds += 1
            self._closed_at = now
        elif refusal.wait_s is None:
            return
        # a host that has refused so often is not waited for again: who comes new asks once, and at once
        self._opens_at = max(self._opens_at, now + pause) if self.rounds < ROUNDS else now


_GATES: dict[str, Gate] = {}


def at(host: str) -> Gate:
    """Return the process's gate of a host; see :func:`rasteret_dask.net.hrefs.host_of`."""
    gate = _GATES.get(host)
    return _GATES.setdefault(host, Gate(HOST_CONNECTIONS)) if gate is None else gate


def seconds(retry_after: str | None) -> float | None:
    """Return how long a Retry-After asks to wait: seconds or an HTTP date (RFC 9110, 10.2.3); None where it is none."""
    text = (retry_after or "").strip()
    if text.isdecimal():
        return float(min(int(text[:9]), RETRY_AFTER_MOST_S))
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


os.register_at_fork(after_in_child=_GATES.clear)  # who held a turn stayed in the parent
