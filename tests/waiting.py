"""Waiting in tests: for a condition, never for a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Event
from typing import Any

from servers import Fault, RangeServer

from rasteret_dask.reader.sharing import SHARED

__all__ = ["PATIENCE_S", "PATIENT", "held_for", "until"]

PATIENCE_S = 600.0
"""After so long a test is stuck, on however busy a machine."""

PATIENT: dict[str, Any] = dict.fromkeys(("timeout", "startup_timeout", "iopub_timeout"), int(PATIENCE_S))
"""The same for a notebook: until its kernel is there, for a cell, and for what a cell has shown to arrive."""


def until(what: Callable[[], Any]) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@contextmanager
def held_for(
    wishes: int, server: RangeServer, pattern: str = "*", fault: Fault | None = None
) -> Iterator[None]:
    """Hold a server's answers back, in a block, until so many wishes of sessions for its tiles wait for them.

    Parameters
    ----------
    wishes
        Of each session, one a tile.
    server, pattern
        Whose answers for which files; wishes for tiles of files of another name are not counted.
    fault
        What is wrong with the answers besides.
    """
    gate, over = Event(), Event()
    server.fault(pattern, replace(fault or Fault(), hold=gate))
    name = pattern.lstrip("*")

    def waiting() -> int:
        return sum(len(f.wishes) for f in [*SHARED._flying.values()] if f.key[0].endswith(name))

    def let_go() -> None:
        try:
            until(lambda: over.is_set() or waiting() >= wishes)
        finally:
            gate.set()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(let_go)
        try:
            yield
            assert gate.is_set(), f"it was over before {wishes} wishes waited together"
        finally:
            over.set()
            done.result()
