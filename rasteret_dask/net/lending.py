# SPDX-License-Identifier: Apache-2.0
"""Memory for large arrays that is used again once nobody holds them any more."""

from __future__ import annotations

import math
import weakref
from collections import deque
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Lender"]

LARGE = 256 * 1024
"""Bytes from which on memory is lent: the system gives and takes memory of this size page by page, each of which it
clears first."""


class Lender:
    """Lends memory for arrays. What comes back is lent again; with what is lent it is never more than was lent at once.

    An array is as good as a new one: it stays what it is for as long as it, a view of it or a tensor on it is held.
    When nobody has the lender any more, memory that comes back goes to the system. A copy in another process is a new
    one.
    """

    def __init__(self) -> None:
        self._back: deque[NDArray[np.uint8]] = deque()  # finalizers run anywhere, so they take no lock
        self._free: list[NDArray[np.uint8]] = []
        self._lent = self._most = 0
        self._lock = Lock()

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a contiguous array, not initialized; small ones, and those of objects, lie in memory of their own."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < LARGE or kind.hasobject:
            return np.empty(shape, kind)
        block = self._block(nbytes)
        return np.asarray(_Loan(block, nbytes, weakref.ref(self))).view(kind).reshape(shape)

    def _block(self, nbytes: int) -> NDArray[np.uint8]:
        with self._lock:
            while self._back:
                block = self._back.popleft()
                self._lent -= len(block)
                self._free.append(block)
            fitting = [n for n, block in enumerate(self._free) if nbytes <= len(block) <= 2 * nbytes]
            if fitting:
                block = self._free.pop(min(fitting, key=lambda n: len(self._free[n])))
            else:
                block = np.empty(nbytes, np.uint8)
            self._lent += len(block)
            self._most = max(self._most, self._lent)
            while self._free and self._lent + sum(map(len, self._free)) > self._most:
                self._free.pop(0)
            return block

    @property
    def nbytes(self) -> int:
        """Bytes that are lent, and those that are kept to be lent again."""
        with self._lock:
            return self._lent + sum(map(len, self._free))

    def take_back(self, block: NDArray[np.uint8]) -> None:
        """Have a block back that was lent."""
        self._back.append(block)

    def __reduce__(self) -> tuple[type[Lender], tuple[()]]:
        return Lender, ()


class _Loan:
    """What an array holds for as long as it is held itself."""

    __slots__ = ("__array_interface__", "_block", "_lender")

    def __init__(self, block: NDArray[np.uint8], nbytes: int, lender: weakref.ref[Lender]) -> None:
        self._block, self._lender = block, lender
        self.__array_interface__ = {**block[:nbytes].__array_interface__}

    def __del__(self) -> None:
        lender = self._lender()
        if lender is not None:
            lender.take_back(self._block)
