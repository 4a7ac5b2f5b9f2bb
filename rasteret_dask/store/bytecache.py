# SPDX-License-Identifier: Apache-2.0
"""Small things that were read once and are kept, the least recently used ones let go of."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakSet

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

__all__ = ["ByteCache"]


class ByteCache(Generic[K, V]):
    """A bounded mapping. Threads that miss the same thing at the same time each make it.

    Parameters
    ----------
    most
        Bytes of its values, at most; one that is larger is kept alone.
    nbytes
        Returns the bytes of a value.
    """

    def __init__(self, most: int, nbytes: Callable[[V], int]) -> None:
        self.most = most
        self.size = 0
        """Bytes of its values."""
        self._nbytes = nbytes
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = Lock()
        _CACHES.add(self)

    def get(self, key: K) -> V | None:
        """Return what is kept, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> V:
        """Keep a value, and return it."""
        with self._lock:
            self._drop(key)
            self._values[key] = value
            self.size += self._nbytes(value)
            while self.size > self.most and len(self._values) > 1:
                self._drop(next(iter(self._values)))
        return value

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._values.clear()
            self.size = 0

    def __len__(self) -> int:
        return len(self._values)

    def _drop(self, key: K) -> None:
        if (value := self._values.pop(key, None)) is not None:
            self.size -= self._nbytes(value)

    def renew(self) -> None:
        """Start anew in a forked child: who held the lock stayed in its parent."""
        self._lock = Lock()
        self.clear()


_CACHES: WeakSet[ByteCache[Any, Any]] = WeakSet()


def _renew() -> None:
    for cache in _CACHES:
        cache.renew()


os.register_at_fork(after_in_child=_renew)
