# SPDX-License-Identifier: Apache-2.0
"""A request to end this process becomes a clean stop: what is under way ends, then it goes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["deferred", "ended_by_a_second_interrupt", "terminable"]


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM, for the length of a block, unwind the main thread as Ctrl-C does: it raises SystemExit(143).

    Queues, Kubernetes and ``kill`` send it before they kill. By default it ends a Python process where it stands: then
    other clients would be told for a while that this one still writes. Whoever has a handler of their own keeps it, and
    so does a call in another thread, which cannot set one.
    """
    takes = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not takes:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deferred(wake: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Have Ctrl-C and SIGTERM wait, for the length of a block, until it asks for them.

    Python runs the handler of a signal between any two steps of the main thread: an exception raised there loses what a
    queue has just handed over, and then nobody counts it, or waits for it for ever. A second signal does not wait, as
    the main thread may be held up by something that never ends. Whatever handlers there are stay in charge: they are
    called later.

    Parameters
    ----------
    wake
        Called when a signal has come, so that the block asks soon. It runs inside the handler.

    Yields
    ------
    Callable
        Calls the handlers of the signals that have come; these may raise.
    """
    handlers: dict[int, Any] = {}
    asked: list[int] = []

    def come(number: int, frame: FrameType | None) -> None:
        if asked:
            handlers[number](number, frame)
        asked.append(number)
        wake()

    def answer() -> None:
        came = asked[:]
        asked.clear()
        for number in came:
            handlers[number](number, None)

    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers.update((number, handler) for number, handler in found.items() if callable(handler))
    for number in handlers:
        signal.signal(number, come)
    try:
        yield answer
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    answer()


@contextmanager
def ended_by_a_second_interrupt(say: Callable[[], None]) -> Iterator[None]:
    """Have a second Ctrl-C, for the length of a block, end this process where it stands, with code 130.

    The first one raises KeyboardInterrupt, as ever: what is under way ends first, which may take as long as a shard.
    For processes of their own, as a command is; a notebook's would be lost. Whoever has a handler keeps it.

    Parameters
    ----------
    say
        Called before the process ends.
    """
    takes = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not takes:
        yield
        return
    asked = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            say()
            os._exit(128 + number)  # threads that compute shards would be waited for by sys.exit
        asked = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
