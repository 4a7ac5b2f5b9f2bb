# SPDX-License-Identifier: Apache-2.0
"""Tiles on their way and parts of tiles kept: what the tasks of one process share, so that none is fetched twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, Timer
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.reader.pixelgrid import Rect, union
from rasteret_dask.table.records import Asset

__all__ = ["SHARED", "Arrival", "Flight", "Keep", "Key", "Pixels", "Sharing", "Wish"]

KEPT_BYTES = 320 * 2**20
"""Decoded pixels that a process keeps for later reads where no plan tells of more."""

IDLE_S = 60.0
"""Seconds after the last session until nothing is kept any more."""

Key: TypeAlias = tuple[str, int | None, str | None, int, int, int]
"""A tile: href, size and ETag of its file, level, plane (0 where bands lie together), number."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """Decoded pixels of a tile, or of a part of it."""

    values: NDArray[Any]
    """Shape (sample, row, col), rows in the file's order."""
    mask: NDArray[np.bool_] | None
    """Shape (row, col) or (sample, row, col): True where valid; None where the file has no mask."""
    rect: Rect
    """Where they lie in the level."""

    def copy(self, rect: Rect) -> Pixels:
        """Return a part in memory of its own."""
        own = self.rect
        at = (..., slice(rect.row0 - own.row0, rect.row1 - own.row0),
              slice(rect.col0 - own.col0, rect.col1 - own.col0))  # fmt: skip
        mask = None if self.mask is None else self.mask[at].copy()
        return Pixels(self.values[at].copy(), mask, rect)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + (0 if self.mask is None else self.mask.nbytes)


@dataclass(frozen=True, slots=True)
class Keep:
    """A part of a tile that later reads need."""

    rect: Rect
    needs: frozenset[int]
    """Who will read it: running numbers of tasks, or a session's own negative number."""
    done: AbstractSet[int] = frozenset()
    """Who has read by the time the tile comes."""
    now: int = 0
    """Running number of the task that reads now: those near it come first."""


class Arrival:
    """The end of one wish for a tile: it can be waited for, and has the error where there was one.

    A lock instead of a Future: every batch makes one a tile, and a Future's condition alone would take a tenth of the
    CPU time that a read spends in Python.
    """

    __slots__ = ("_error", "_gate")

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._gate = Lock()
        self._gate.acquire()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return not self._gate.locked()

    def end(self, error: BaseException | None = None) -> None:
        """End it."""
        self._error = error
        self._gate.release()

    def error(self) -> BaseException | None:
        """Wait for its end; return the error that it ended with."""
        with self._gate:
            return self._error


@dataclass(frozen=True, slots=True)
class Wish:
    """What one reader wants of a tile."""

    need: Rect
    paste: Callable[[Pixels], None]
    """Takes the pixels to their places; called once, on any thread."""
    keep: Keep | None
    alive: Callable[[], bool]
    """False once the reader has given up."""
    done: Arrival = field(default_factory=Arrival)
    """Ends when the pixels are in their places, or with the error why they are not."""


@dataclass(slots=True)
class Flight:
    """One tile on its way."""

    key: Key
    asset: Asset
    """An asset that wants it, for messages."""
    wishes: list[Wish]
    over: bool = False
    """Whether it has landed, failed or been given up."""

    @property
    def tile(self) -> int:
        """Number of the tile in its level."""
        return self.key[-1]


@dataclass(slots=True)
class _Kept:
    pixels: Pixels
    needs: set[int]

    def wait(self, now: int) -> int:
        """Return how many tasks come before the first that needs it."""
        return min(0 if n < 0 else abs(n - now) for n in self.needs)


class Sharing:
    """A process's tiles in flight, and the parts of tiles it keeps within a budget.

    Parameters
    ----------
    nbytes
        Of pixels kept, at most. What is needed last goes first.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = self._least = nbytes
        self._lock = Lock()
        self._flying: dict[Key, Flight] = {}
        self._kept: dict[Key, _Kept] = {}
        self._held = 0
        self._sessions = 0
        self._left = 0.0
        self._timer: Timer | None = None
        self.departure = Lock()
        """Held while a reader works out its tiles and sends for them: who comes first has all of its own first, and can
        go on while others wait for theirs; in turn they would all end, and begin anew, at the same time."""

    def join(self, key: Key, asset: Asset, wish: Wish) -> tuple[Pixels | None, Flight | None, bool]:
        """Find a tile: kept pixels that cover the wish, or the flight that will bring it and whether that is new.

        A new flight is the caller's to bring home, by :meth:`land` or :meth:`fail`.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and kept.pixels.rect.covers(wish.need):
                if wish.keep is not None and kept.pixels.rect.covers(wish.keep.rect):
                    kept.needs |= wish.keep.needs - wish.keep.done
                return kept.pixels, None, False
            flight = self._flying.get(key)
            if flight is not None:
                flight.wishes.append(wish)
                return None, flight, False
            flight = self._flying[key] = Flight(key, asset, [wish])
            return None, flight, True

    def land(self, flight: Flight, pixels: Pixels) -> None:
        """Hand a decoded tile to all who wish for it; keep what later reads need."""
        with self._lock:
            keeps = [wish.keep for wish in flight.wishes if wish.keep is not None and wish.alive()]
            if keeps:
                self._put(flight.key, pixels, keeps)
            wishes = self._end(flight)
        for wish in wishes:
            try:
                if wish.alive():
                    wish.paste(pixels)
            except BaseException as error:  # its own: the others have theirs
                wish.done.end(error)
            else:
                wish.done.end()

    def fail(self, flight: Flight, error: BaseException) -> None:
        """Tell all who wish for a tile that it does not come, unless it has come."""
        with self._lock:
            wishes = self._end(flight)
        for wish in wishes:
            wish.done.end(error)

    def abandoned(self, flight: Flight) -> bool:
        """Give a tile up that nobody waits for any more; return whether that is so."""
        with self._lock:
            if any(wish.alive() for wish in flight.wishes):
                return False
            self._end(flight)
            return True

    def finish(self, *numbers: int) -> None:
        """Forget what was kept for these tasks or sessions alone."""
        with self._lock:
            for key, kept in list(self._kept.items()):
                kept.needs.difference_update(numbers)
                if not kept.needs:
                    self._drop(key)

    @contextmanager
    def session(self, nbytes: int = 0) -> Iterator[None]:
        """Note that somebody reads who keeps so many bytes; once nobody does for a while, nothing is kept any more."""
        with self._lock:
            self._sessions += 1
            self.nbytes = max(self.nbytes, nbytes)
        try:
            yield
        finally:
            with self._lock:
                self._sessions -= 1
                self._left = time.monotonic()
                if not self._sessions and self._kept and self._timer is None:
                    self._look_in(IDLE_S)

    def _look_in(self, seconds: float) -> None:
        """Start the one thread that looks whether anybody still reads; hold the lock."""
        self._timer = Timer(seconds, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        with self._lock:
            self._timer = None
            left = self._left + IDLE_S - time.monotonic()
            if not self._sessions and left > 0:
                self._look_in(left)
            elif not self._sessions:
                self._empty()

    def clear(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._empty()

    def _empty(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._kept.clear()
        self._held, self.nbytes = 0, self._least

    def _end(self, flight: Flight) -> list[Wish]:
        """Take a flight off the list; return who waits for it, none where it was over before."""
        if self._flying.get(flight.key) is flight:
            del self._flying[flight.key]
        wishes = [] if flight.over else flight.wishes
        flight.over = True
        return wishes

    def _put(self, key: Key, pixels: Pixels, keeps: list[Keep]) -> None:
        needs = set[int]().union(*(keep.needs - keep.done for keep in keeps))
        rects = [keep.rect for keep in keeps]
        if not needs:
            return
        before = self._kept.get(key)
        if before is not None:
            needs |= before.needs
            rects.append(before.pixels.rect)
            self._drop(key)
        made = self._kept[key] = _Kept(pixels.copy(union(rects)), needs)
        self._held += made.pixels.nbytes
        while self._held > self.nbytes:
            self._drop(max(self._kept, key=lambda k: self._kept[k].wait(keeps[0].now)))

    def _drop(self, key: Key) -> None:
        self._held -= self._kept.pop(key).pixels.nbytes


SHARED = Sharing(KEPT_BYTES)
"""The process's tiles."""

os.register_at_fork(after_in_child=lambda: Sharing.__init__(SHARED, KEPT_BYTES))
