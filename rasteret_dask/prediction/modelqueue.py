# SPDX-License-Identifier: Apache-2.0
"""Chips of several threads fill the batches of one model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["ModelQueue", "Piece", "Share"]

PATIENCE_S = 1.0
"""Seconds after which a batch goes as it is: whoever may still bring chips may be waiting for those that wait here."""


@dataclass(eq=False)
class Share:
    """The chips that one thread waits for."""

    value: Any
    """Whatever the model's side knows them by."""
    chips: int
    begun: int = 0
    """How many of them are in batches already."""
    ended: int = 0
    results: list[tuple[int, NDArray[Any]]] = field(default_factory=list)
    """(first of its chips, what the model made of them)."""
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done for it."""
        return self.error is not None or self.ended == self.chips


Piece: TypeAlias = tuple[Share, int, int]
"""A share, and which of its chips: the first, and the one behind the last."""


class ModelQueue:
    """Threads bring chips and wait; one of those that wait computes each batch.

    A batch goes when there are chips enough for it, or when nobody can bring more: each thread that said it is
    reading waits here itself. Chips go in the order in which they came.

    Parameters
    ----------
    compute
        Called with the pieces of a batch; returns a row for each of its chips.
    size
        Chips of a full batch.
    lanes
        How many batches may be computed at the same time.
    patience_s
        Seconds after which a batch goes though it is not full.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Piece]], NDArray[Any]],
        size: int,
        lanes: int = 1,
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        self._compute, self._size, self._lanes, self._patience_s = compute, size, lanes, patience_s
        self._changed = threading.Condition()
        self._line: deque[Share] = deque()
        self._callers = self._waiting = self._running = 0
        self._here = threading.local()

    @property
    def callers(self) -> int:
        """How many threads may still bring chips."""
        return self._callers

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say for the length of a block that this thread may bring chips."""
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        if not depth:
            with self._changed:
                self._callers += 1
        try:
            yield
        finally:
            self._here.depth = depth
            if not depth:
                with self._changed:
                    self._callers -= 1
                    self._changed.notify_all()

    def results(self, value: Any, chips: int) -> NDArray[Any]:
        """Wait until the model has seen some chips, and return a row for each.

        Raises
        ------
        Exception
            What ``compute`` raised for these chips: where a batch of several threads' chips fails, each thread's are
            tried alone, so that nobody fails because of another's.
        """
        share = Share(value, chips)
        with self.reading():
            with self._changed:
                self._line.append(share)
                self._waiting += 1
                self._changed.notify_all()
            try:
                self._wait(share)
            finally:
                with self._changed:
                    self._waiting -= 1
        if share.error is not None:
            raise share.error
        parts = [rows for _, rows in sorted(share.results, key=lambda pair: pair[0])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _wait(self, share: Share) -> None:
        in_time = True
        while True:
            with self._changed:
                if share.is_over:
                    return
                batch = self._next(in_time)
                if not batch:
                    in_time = self._changed.wait(self._patience_s)
                    continue
                self._running += 1
            in_time = True
            try:
                self._run(batch)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def _next(self, in_time: bool) -> list[Piece]:
        """Take the next batch out of the line; nothing where it is not to go yet."""
        if self._running >= self._lanes or not self._line:
            return []
        waiting = sum(share.chips - share.begun for share in self._line)
        if waiting < self._size and in_time and self._waiting < self._callers:
            return []
        batch: list[Piece] = []
        room = self._size
        while room and self._line:
            share = self._line[0]
            stop = min(share.chips, share.begun + room)
            batch.append((share, share.begun, stop))
            room -= stop - share.begun
            share.begun = stop
            if stop == share.chips:
                self._line.popleft()
        return batch

    def _run(self, batch: Sequence[Piece]) -> None:
        try:
            rows = self._compute(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch, error)
            else:
                for piece in batch:
                    self._run([piece])
            return
        except BaseException as error:  # Ctrl-C reaches one thread: the others must not wait for it
            self._fail(batch, error)
            raise
        first = 0
        with self._changed:
            for share, start, stop in batch:
                share.results.append((start, rows[first : first + stop - start]))
                share.ended += stop - start
                first += stop - start

    def _fail(self, batch: Sequence[Piece], error: BaseException) -> None:
        with self._changed:
            for share, _, _ in batch:
                share.error = error
                if share in self._line:
                    self._line.remove(share)
