# SPDX-License-Identifier: Apache-2.0
"""A file that is renewed while a job is alive: for queues and whoever else watches it from outside."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from types import TracebackType

from rasteret_dask.errors import StoreError

__all__ = ["Heartbeat"]

_log = logging.getLogger(__name__)

RENEWED_S = 30.0
"""Seconds between two renewals where no shard ends."""


class Heartbeat:
    """A file that says how far a job is, as long as the process runs; it stays when the job has ended.

    JSON: ``time`` (seconds since 1970), ``done`` and ``total`` (shards; null until they are planned). It is replaced
    as a whole, so that nobody reads half of it.

    Parameters
    ----------
    path
        Of a local file; None: there is none.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = path
        self._done: int | None = None
        self._total: int | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="rasteret-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._path is not None:
            try:
                self._write()
            except OSError as error:
                raise StoreError(
                    f"heartbeat {self._path}", f"that it cannot be written ({error.strerror})", "a file that can",
                    "Give RunLimits(heartbeat=) a place where this process may write.",
                ) from error  # fmt: skip
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._ended.set()
            self._thread.join()

    def step(self, done: int, total: int) -> None:
        """Say how many shards are written, of how many."""
        self._done, self._total = done, total
        self._try()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            self._try()

    def _try(self) -> None:
        """Renew the file; that it cannot be written, once it could, does not end a job."""
        if self._path is None:
            return
        try:
            self._write()
        except OSError as error:
            _log.warning("heartbeat %s cannot be written: %s", self._path, error)

    def _write(self) -> None:
        assert self._path is not None
        text = json.dumps({"time": round(time.time(), 3), "done": self._done, "total": self._total})
        with self._lock:
            beside = f"{self._path}.{os.getpid()}"
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(beside, self._path)
