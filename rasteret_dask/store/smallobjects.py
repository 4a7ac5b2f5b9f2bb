# SPDX-License-Identifier: Apache-2.0
"""Small objects of a store, several at the same time: a request waits, it does not work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from rasteret_dask.net import remote

__all__ = ["at_once", "data_of", "requests"]

T = TypeVar("T")


REQUESTS = 16
"""Small objects under way at the same time."""


def at_once(function: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
    """Call a function for many small objects, several at the same time: a request waits, it does not work."""
    return list(requests().map(function, values))


def requests() -> ThreadPoolExecutor:
    """Return the threads of this process that wait for a store."""
    return _requests(os.getpid())


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    """Return the threads of one process: a fork has its own."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="rasteret-store")


def data_of(url: str, path: str) -> bytes | None:
    """Return an object; None where there is none."""
    try:
        return remote.get(remote.join(url, path))
    except remote.MissingError:
        return None
