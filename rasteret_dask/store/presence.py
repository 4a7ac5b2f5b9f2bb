# SPDX-License-Identifier: Apache-2.0
"""Who else writes a store at this moment: each client leaves a small trace there, and renews it while it runs."""

from __future__ import annotations

import json
import platform
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from rasteret_dask.errors import ConcurrentWriteWarning, StoreError
from rasteret_dask.net import remote
from rasteret_dask.store.ledger import CLIENTS

__all__ = ["Presence", "forget_clients", "present"]

RENEWED_S = 30.0
"""Seconds between two puts of one client's trace."""

FRESH_S = 100.0
"""A trace that was renewed so long ago or less is a client's that runs: three puts may be late."""


@dataclass(frozen=True, slots=True)
class Presence:
    """The trace of this client in a store."""

    url: str
    """The store."""
    name: str
    """Of the trace."""
    part: tuple[int, int] | None = None
    """Which part of the shards it writes, of how many; None: all."""

    def is_alone(self) -> bool:
        """Tell whether no other client writes these shards: one that was killed counts for a while.

        Other parts of the same job have shards of their own.
        """
        return not any(True for _ in self.rivals())

    def rivals(self) -> Iterator[tuple[Mapping[str, Any], float]]:
        """Yield clients that write some of the same shards, and how many seconds ago each was seen."""
        for trace, age in _others(self.url, self.name):
            number, count = trace.get("part") or (0, 0)
            if self.part is None or count != self.part[1] or number == self.part[0]:
                yield trace, age


@contextmanager
def present(url: str, part: tuple[int, int] | None = None) -> Iterator[Presence]:
    """Leave a trace of this client in a store for the length of a block; warn of others' that are fresh.

    How old a trace is, the store's own clock tells: this client's is put first, and the times of both are compared
    as the store lists them. A trace of this machine whose process is gone is removed, and so is one that nobody has
    renewed for long: clients that were killed are not warned of for ever.

    Parameters
    ----------
    url
        The store.
    part
        Which part of the shards it writes, of how many; None: all.

    Warns
    -----
    ConcurrentWriteWarning
        When another client writes some of the same shards: other parts of one job do not.
    """
    path = remote.join(url, CLIENTS, f"{uuid.uuid4().hex}.json")
    process = psutil.Process()
    trace = {"host": platform.node(), "pid": process.pid, "since": process.create_time(), "part": part}
    data = json.dumps(trace).encode()
    presence = Presence(url, path.rpartition("/")[2], part)
    ended = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(path, data, ended), name="rasteret-presence", daemon=True
    )
    try:
        remote.put(path, data)
        _warn_of_rivals(presence)
        renewing.start()
        yield presence
    finally:
        ended.set()
        if renewing.is_alive():
            renewing.join()
        with suppress(StoreError):  # whoever may not delete leaves it to age
            remote.delete(path)


def forget_clients(url: str) -> None:
    """Remove all traces from a store: it is finished."""
    for name in remote.listing(remote.join(url, CLIENTS)):
        with suppress(StoreError):
            remote.delete(remote.join(url, CLIENTS, name))


def _renew(path: str, data: bytes, ended: threading.Event) -> None:
    while not ended.wait(RENEWED_S):
        with suppress(StoreError):  # a shard's put will tell, if it lasts
            remote.put(path, data)


def _warn_of_rivals(presence: Presence) -> None:
    for trace, age in presence.rivals():
        warnings.warn(
            f"store {remote.redact(presence.url)}: process {trace['pid']} at {trace['host']} writes it too (seen "
            f"{age:.0f} s ago). The store will be right, but shards that both have under way are done twice: stop one "
            f"of them. If that one was killed, this is said for at most {FRESH_S:.0f} s.",
            ConcurrentWriteWarning,
            stacklevel=7,
        )


def _others(url: str, name: str) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield the other clients that write a store, and how many seconds ago each was seen; remove what others left."""
    times = remote.modified(remote.join(url, CLIENTS))
    now = times.pop(name, None)
    if now is None:  # another client has finished the store meanwhile
        return
    for other, written in times.items():
        path = remote.join(url, CLIENTS, other)
        try:
            trace = json.loads(remote.get(path))
        except remote.MissingError:  # it has ended meanwhile
            continue
        age = max(0.0, now - written)
        if age > FRESH_S or _is_gone(trace):
            with suppress(StoreError):
                remote.delete(path)
            continue
        yield trace, age


def _is_gone(trace: dict[str, Any]) -> bool:
    """Tell whether a trace is of a process of this machine that has ended; its number may be another's by now."""
    if trace["host"] != platform.node():
        return False
    try:
        return bool(abs(psutil.Process(trace["pid"]).create_time() - trace["since"]) > 1)
    except psutil.NoSuchProcess:
        return True
