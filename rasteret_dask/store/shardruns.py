# SPDX-License-Identifier: Apache-2.0
"""Shards of a store, computed in runs of neighbours: sent in windows, told of one by one, tried once more."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rasteret_dask.errors import IncompleteError, JobError, RasteretDaskError, UnwritableStoreError
from rasteret_dask.lists import first_of
from rasteret_dask.progress import Progress
from rasteret_dask.store.limits import Bounds, Deadline
from rasteret_dask.store.onthreads import ThreadTasks, threads_that_fit
from rasteret_dask.store.runtasks import Run, ShardNews, Shards, Work
from rasteret_dask.store.stopping import deferred
from rasteret_dask.tasks.runs import Workforce

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Exit", "runner", "write_shards"]

_log = logging.getLogger(__name__)

AHEAD = 1024
"""Tasks that are sent and have not ended, at most; more are sent once half of them have."""

MAX_LISTED = 10
AGAIN, ALONE = "-again", "-alone"
"""What the name of a shard's second task ends in, and that of one which nothing runs beside."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Who writes shards, for progress and messages."""

    name: str
    """What the user calls: ``to_zarr``."""
    place: str
    """The store, without credentials."""
    total: int
    """Its shards, those that are there among them; of a part of an array job the part's."""
    chips: int = 0
    """Chips of all of them."""
    progress: bool = False
    """Whether to show how far it is."""
    bounds: Bounds = field(default_factory=Bounds)
    """The run's limits."""

    def count(self, done: int) -> str:
        """Say how many shards are written."""
        part = f" of {self.bounds.limits.name}" if self.bounds.limits.part else ""
        return f"{done} of {self.total} shards{part} are written"


class _Runner(Protocol):
    """Who computes runs: :class:`ClusterTasks` or :class:`ThreadTasks`."""

    @property
    def force(self) -> Workforce: ...

    @property
    def unfinished(self) -> int: ...

    def watched(
        self, work: Work, run: Run, subject: str, progress: Progress
    ) -> AbstractContextManager[None]: ...

    def send(self, work: Work, runs: Sequence[Run]) -> None: ...

    @property
    def stopped(self) -> bool: ...

    def stop(self) -> None: ...

    def spread(self, shards: Shards, paid: int) -> None: ...

    def left(self) -> Sequence[str]: ...

    def news(self) -> Sequence[ShardNews]: ...

    def settled(self) -> Sequence[str]: ...

    def wake(self) -> None: ...


def runner(client: Client | None, deadline: Deadline | None = None) -> _Runner:
    """Return the cluster of a client, or where there is none threads of this process: scripts need no main guard."""
    if client is None:
        return ThreadTasks(threads_that_fit(), deadline)
    from rasteret_dask.store.oncluster import ClusterTasks  # it imports distributed

    return ClusterTasks(client, deadline)


def write_shards(
    running: _Runner,
    shards: Shards,
    caller: Exit,
    sign: Callable[[], None],
    settle: Callable[[Sequence[str], bool], None],
) -> None:
    """Write shards, and wait until each has ended; what is written needs no result, as its report is in the store.

    Parameters
    ----------
    running
        Who computes them.
    shards
        What is to be written.
    caller
        Whose shards they are, for progress and messages.
    sign
        Sends whoever computes what is needed to sign requests.
    settle
        Takes shards whose tasks have ended, which do not ask for the shards' reports any more; and whether there are
        shards that nobody was sent yet.

    Raises
    ------
    JobError
        When shards failed, the store takes no more, or the scheduler was lost.
    IncompleteError
        When time was over before all shards were written.

    Notes
    -----
    Interrupted (by Ctrl-C, or whatever else unwinds the main thread), it begins no further shard, waits for those
    under way, and then lets the interruption go on. Interrupted once more, it waits for no worker of a cluster; threads
    of this process end their shards all the same.
    """
    state = _State(shards, caller.total - len(shards.names))
    with (
        Progress("shards", caller.progress, caller.total) as shown,
        running.watched(shards.work, shards.run([0], whole=False), f"{caller.name} {caller.place}", shown),
    ):
        shown.begin(state.done)
        shown.detail = state.chips_text(caller.chips)
        caller.bounds.heartbeat.step(state.done, caller.total)
        sign()
        _log.info("%s %s: %d shards to write", caller.name, caller.place, len(shards.names))

        def take(shard: ShardNews) -> None:
            state.take(shard)
            shown.add(shard.tally)
            shown.failed = len(state.failed)
            shown.step(state.done - shown.done, state.chips_text(caller.chips))
            caller.bounds.heartbeat.step(state.done, caller.total)

        try:
            with deferred(running.wake) as heed:
                while state.send(running):
                    for shard in running.news():
                        if isinstance(shard.error, UnwritableStoreError):  # the others would end so too
                            raise _unwritable(caller, shard.error, state.done)
                        take(shard)
                    settle(running.settled(), state.unsent and not running.stopped)
                    heed()
        except CancelledError as error:
            raise JobError(
                f"store {caller.place}",
                f"{error}; {caller.count(state.done)}",
                "a scheduler that stays, with its tasks, until the end",
                f"Call {caller.name} again once there is a scheduler: it does the rest.",
            ) from error
        except (KeyboardInterrupt, SystemExit) as request:
            shown.note(f"{caller.name} {caller.place}: stopping once the shards under way are written")
            running.stop()
            while running.unfinished:
                for shard in running.news():
                    take(shard)
            request.add_note(f"{caller.count(state.done)}: run the same again, which does the rest")
            raise
    if state.failed:
        raise _failures(caller, state.failed)
    if state.done < caller.total:
        raise IncompleteError(
            f"store {caller.place}",
            f"the end of max_time; {caller.count(state.done)}",
            "",
            "Run the same again: it does the rest.",
        )


class _State:
    """Which shards are to be sent next, and what became of those that were."""

    def __init__(self, shards: Shards, done: int) -> None:
        self.done = done
        """Shards that are written."""
        self._chips = dict(zip(shards.names, shards.chips, strict=False))
        self._left = sum(shards.chips)
        self.failed: dict[str, BaseException] = {}
        self._shards = shards
        self._number = {name: at for at, name in enumerate(shards.names)}
        self._at_place = {place: at for at, place in enumerate(shards.places)}
        self._begun = self._taken = self._paid = 0
        self._again: deque[str] = deque()
        self._alone: deque[str] = deque()
        self._tried = {AGAIN: set[str](), ALONE: set[str]()}

    @property
    def unsent(self) -> bool:
        """Whether there are shards that nobody was sent yet."""
        return self._begun < len(self._shards.places)

    def send(self, running: _Runner) -> bool:
        """Send what is to be computed now; tell whether there is anything to wait for."""
        if not running.stopped:
            window = self.window(running)
            if window:
                running.send(self._shards.work, window)
            else:
                self.spread(running)
        return running.unfinished > 0

    def window(self, running: _Runner) -> list[Run]:
        """Return the runs to send now: none while so many are under way."""
        shards, window = self._shards, list[Run]()
        left = running.left()
        if left:
            self._taken += 1
            window.append(shards.run([self._number[name] for name in left], False, f"-taken-{self._taken}"))
        if running.unfinished <= AHEAD // 2 and self.unsent:
            force = running.force  # workers come and go
            for places in shards.cuts.rounds(shards.places[self._begun :], force):
                window += [
                    shards.run([self._at_place[p] for p in run], force.processes == 1) for run in places
                ]
                self._begun += sum(map(len, places))
                if running.unfinished + len(window) >= AHEAD:
                    break
        self._paid += shards.cuts.paid(run.places for run in window)
        # by itself, and not by Dask's retries, which cannot tell errors apart; behind all others
        while self._again and not self.unsent:
            window.append(self._by_itself(self._again.popleft(), AGAIN))
        # at the very end, one at a time: only what kills its worker with nothing beside it has done so
        if self._alone and not window and not running.unfinished:
            window.append(self._by_itself(self._alone.popleft(), ALONE))
        return window

    def spread(self, running: _Runner) -> None:
        """Have idle processes take over parts of others' runs, once all are sent."""
        if not self.unsent:
            running.spread(self._shards, self._paid)

    def chips_text(self, total: int) -> str:
        """Return ``310 of 1,024 chips``: those that are written, of all; nothing where nobody counts them."""
        return f"{total - self._left:,} of {total:,} chips" if total else ""

    def _by_itself(self, name: str, mark: str) -> Run:
        return self._shards.run([self._number[name]], whole=False, mark=mark)

    def take(self, shard: ShardNews) -> None:
        """Note how a shard has ended, and whether it is tried once more."""
        if shard.error is None:
            self.done += 1
            self._left -= self._chips.get(shard.name, 0)
        elif shard.may_pass and shard.name not in self._tried[AGAIN]:
            self._tried[AGAIN].add(shard.name)
            self._again.append(shard.name)
        elif shard.killed and shard.name not in self._tried[ALONE]:
            self._tried[ALONE].add(shard.name)
            self._alone.append(shard.name)
        else:
            self.failed[shard.name] = shard.error


def _failures(caller: Exit, failed: Mapping[str, BaseException]) -> JobError:
    lines = first_of((f"{name}: {error}" for name, error in sorted(failed.items())), MAX_LISTED, "\n")
    failure = JobError(
        f"store {caller.place}",
        f"{len(failed)} of {caller.total} shards failed:\n{lines}\n",
        "every shard written",
        f"The others are written and the store is not committed: mend the cause and call {caller.name} again.",
    )
    failure.__cause__ = next((e for e in failed.values() if isinstance(e, RasteretDaskError)), None)
    return failure


def _unwritable(caller: Exit, error: UnwritableStoreError, done: int) -> JobError:
    failure = JobError(
        f"store {caller.place}",
        f"that no further shard can be written; {caller.count(done)}:\n{error.subject}: {error.found}\n",
        error.expected,
        f"No further shard was tried. {error.remedy}",
    )
    failure.__cause__ = error
    return failure
