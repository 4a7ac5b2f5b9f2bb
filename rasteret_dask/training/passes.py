# SPDX-License-Identifier: Apache-2.0
"""Which epoch a pass over a dataset begins with, whichever processes make it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from typing import Any

from rasteret_dask.extras import needs

with needs("torch", "passes of a DataLoader"):
    import torch
    from torch.utils.data import get_worker_info

__all__ = ["Passes"]

MOST_WORKERS = 1024
NEXT, ASKED, JUMPS = range(3)


@dataclass
class _Sender:
    """What a DataLoader's worker knows of the process that started it."""

    shared: Any
    """Its NEXT, ASKED and JUMPS, in memory that both see."""
    sent: tuple[int, ...]
    """Its NEXT at the time of each copy that it sent, the last one being this worker's; () once that has been used."""
    jumps: int
    """How many of its jumps are known here."""


class Passes:
    """Counts the epochs of all passes over a dataset, in the main process and in the workers of its DataLoaders.

    A DataLoader says nothing of passes. It sends the dataset to its workers, one after the other, at each pass, or
    only at the first one where workers stay alive. So each copy has with it what was known when it and the copies
    before it were sent, and worker k begins with what worker 0 got, k copies back: workers of a pass agree, even where
    one is done before the next one is started. In shared memory they tell the main process where their pass ends;
    it tells them there of jumps.

    Parameters
    ----------
    first
        The epoch that the next pass begins with.
    """

    def __init__(self, first: int = 0, sender: _Sender | None = None) -> None:
        # NEXT: begins the next pass. ASKED: where the last jump went. JUMPS: how many there were. torch moves it
        # to shared memory when it is first sent.
        self._shared = torch.tensor([first, first, 0])
        self._sent: deque[int] = deque(maxlen=MOST_WORKERS)
        self._sender = sender

    @property
    def next(self) -> int:
        """The epoch that the next pass begins with."""
        return int(self._shared[NEXT])

    def begin(self, epochs: int) -> int:
        """Count a pass of so many epochs; return the first of them."""
        first, sender, worker = self.next, self._sender, get_worker_info()
        if worker is None or sender is None:
            self._shared[NEXT] = first + epochs
            return first
        if sender.sent:
            first, sender.sent = sender.sent[-1 - worker.id], ()
        elif sender.jumps != sender.shared[JUMPS]:
            _, first, sender.jumps = sender.shared.tolist()
        self._shared[NEXT] = first + epochs
        if sender.jumps == sender.shared[JUMPS]:  # else it is late, and its pass was given up
            sender.shared[NEXT] = max(first + epochs, int(sender.shared[NEXT]))
        return first

    def jump(self, epoch: int) -> None:
        """Let the next pass begin with an epoch, in workers that are alive too."""
        self._shared[:2] = epoch
        self._shared[JUMPS] += 1
        if self._sender is not None and get_worker_info() is not None:
            self._sender.sent, self._sender.shared[NEXT] = (), epoch

    def __reduce__(self) -> tuple[type[Passes], tuple[Any, ...]]:
        if get_spawning_popen() is None:
            return Passes, (self.next,)  # a copy that goes its own way
        self._sent.append(self.next)
        return Passes, (self.next, _Sender(self._shared, tuple(self._sent), int(self._shared[JUMPS])))
