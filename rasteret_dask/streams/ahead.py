# SPDX-License-Identifier: Apache-2.0
"""Batches made ahead by a thread, and the shelf from which they are taken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import tee
from typing import Any

from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.net.lending import Lender
from rasteret_dask.streams.augmenting import Augmenting
from rasteret_dask.streams.epochs import Batch, Epoch
from rasteret_dask.streams.shardsource import ShardSource
from rasteret_dask.tasks.batches import Arrays, Part, assembled

__all__ = ["Shelf", "fill"]

POLL_S = 0.5


def fill(
    plan: Iterator[Epoch],
    pad: bool,
    source: ShardSource,
    shelf: Shelf,
    normalize: Callable[[Arrays], Arrays] | None,
    augment: Augmenting | None = None,
) -> None:
    """Read shards just far enough ahead, and put batches on the shelf while there is room.

    Parameters
    ----------
    plan
        Epochs from the first batch on that is wanted.
    pad
        Whether batches say which of their chips are repeated.
    source
        Who reads; closed at the end.
    shelf
        Where batches go, and whatever goes wrong.
    normalize
        What is done to each batch.
    augment
        What is done to each sample, after that.
    """
    try:
        handles: dict[tuple[int, int], list[Any]] = {}
        memory = Lender()  # of batches that the consumer let go of
        sent = wanted = 0
        # shards of an epoch are read while the last batches of the one before are made
        now, ahead = tee(plan)
        visits = ((epoch.number, at, visit) for epoch in ahead for at, visit in enumerate(epoch.visits))
        for epoch in now:
            for batch in epoch.batches:
                while sent < wanted + batch.visits + source.ahead and (found := next(visits, None)):
                    number, at, visit = found
                    if visit.rows:
                        handles[number, at] = source.submit(visit.shard, visit.rows)
                    sent += 1
                if not shelf.room():
                    return
                parts = []
                for at, part, _ in batch.parts:
                    held = handles[epoch.number, at]
                    parts.append(held[part])
                    held[part] = None  # what is collected is let go of
                while (found_parts := source.collect(parts, POLL_S)) is None:
                    if shelf.stopped:
                        return
                del parts
                made = _made(batch, found_parts, pad, memory)
                del found_parts
                if normalize is not None:
                    made = _normalized(made, normalize)
                if augment is not None:
                    made = augment(made, epoch.number, batch.copies)
                shelf.put(made)
                del made
            wanted += len(epoch.visits)
            for at in range(len(epoch.visits)):
                handles.pop((epoch.number, at), None)
    except BaseException as error:  # the consumer's thread raises it
        shelf.fail(error)
    finally:
        source.close()


def _made(batch: Batch, parts: list[Part], pad: bool, memory: Lender) -> Arrays:
    places = [places for _, _, places in batch.parts]
    made = assembled(list(zip(places, parts, strict=True)), batch.size, memory)
    return {**made, "padded": batch.padded} if pad else made


def _normalized(batch: Arrays, normalize: Callable[[Arrays], Arrays]) -> Arrays:
    found = normalize(batch)
    if not isinstance(found, Mapping):
        raise PlanError(
            "stream(normalize=)", f"a function that returned a {type(found).__name__}", "one that returns the batch",
            "A function that changes a batch in place must return it too.",
        )  # fmt: skip
    return found


class Shelf:
    """Batches that are ready, between the thread that makes them and the one that takes them.

    Parameters
    ----------
    size
        How many may be ready beside the one that was taken last.
    first
        Number of the first batch.
    """

    def __init__(self, size: int, first: int) -> None:
        self.size = size
        self.stopped = False
        self.failed = False
        self._ready: deque[Arrays] = deque()
        self._first = first  # number of _ready[0]
        self._taken = first  # what is before this number was taken
        self._error: BaseException | None = None
        # a finalizer may run while its own thread holds the lock
        self._changed = threading.Condition(threading.RLock())

    def room(self) -> bool:
        """Wait until one more batch may be made; False where none is wanted any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.stopped or len(self._ready) - (self._taken - self._first) < self.size
            )
            return not self.stopped

    def put(self, batch: Arrays) -> None:
        """Hand the next batch over."""
        with self._changed:
            self._ready.append(batch)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that no more batches come, and why."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self, number: int) -> Arrays:
        """Wait for a batch, or raise what went wrong once all before it are taken.

        It stays here until the next one is asked for: who is interrupted before he has it asks for it again.
        """
        with self._changed:
            while self._first < number and self._ready:
                self._ready.popleft()
                self._first += 1
            self._changed.wait_for(lambda: self.stopped or self._ready or self._error is not None)
            if self._ready:
                self._taken = number + 1
                self._changed.notify_all()
                return self._ready[0]
            self.failed = True
            if self._error is not None:
                raise self._error
            raise JobError(
                "stream", "close() by another thread while a batch was waited for", "an open stream",
                "next() goes on at this batch.",
            )  # fmt: skip

    def stop(self) -> None:
        """Want no more batches."""
        with self._changed:
            self.stopped = True
            self._ready.clear()
            self._changed.notify_all()
