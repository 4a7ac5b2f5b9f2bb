"""Shards of a store, computed in runs of neighbours: sent in windows, told of one by one, tried once more."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rasteret_dask.errors import JobError, RasteretDaskError, UnwritableStoreError
from rasteret_dask.progress import Progress
from rasteret_dask.store.onthreads import ThreadTasks, threads_that_fit
from rasteret_dask.store.runtasks import Run, ShardNews, Work
from rasteret_dask.tasks.runs import Cuts, Workforce

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Exit", "Shards", "runner", "write_shards"]

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
    """Its shards, those that are there among them."""
    progress: bool = False
    """Whether to show how far it is."""


@dataclass(frozen=True)
class Shards:
    """Shards that are to be written, in running order, and how."""

    work: Work
    names: Sequence[str]
    """Of the shards that are to be written."""
    items: Sequence[Any]
    """What ``work`` is called with, one a shard."""
    contents: Sequence[str]
    """A digest a shard, of what it will hold: part of its task's key."""
    places: Sequence[int]
    """Among all shards of the job, in running order."""
    cuts: Cuts
    tail: str
    """What the keys of the tasks end in: where, and how, they write."""
    verb: str = "write"
    """What the keys begin with."""

    def run(self, at: Sequence[int], whole: bool, mark: str = "") -> Run:
        """Return the run of some of the shards."""
        names, contents = [self.names[n] for n in at], "".join(self.contents[n] for n in at)
        content = contents[:16] if len(at) == 1 else hashlib.sha256(contents.encode()).hexdigest()[:16]
        key = f"{self.verb}-{names[0]}-{content}-{self.tail}{mark}"
        return Run(
            key, tuple(names), tuple(self.items[n] for n in at), tuple(self.places[n] for n in at), whole
        )


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

    def news(self) -> Sequence[ShardNews]: ...


def runner(client: Client | None) -> _Runner:
    """Return the cluster of a client, or where there is none threads of this process: scripts need no main guard."""
    if client is None:
        return ThreadTasks(threads_that_fit())
    from rasteret_dask.store.oncluster import ClusterTasks  # it imports distributed

    return ClusterTasks(client)


def write_shards(running: _Runner, shards: Shards, caller: Exit, sign: Callable[[], None]) -> None:
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

    Raises
    ------
    JobError
        When shards failed, the store takes no more, or the scheduler was lost.
    """
    state = _State(shards, caller.total - len(shards.names))
    with (
        Progress("shards", caller.progress, caller.total) as shown,
        running.watched(shards.work, shards.run([0], whole=False), f"{caller.name} {caller.place}", shown),
    ):
        shown.step(state.done)
        sign()
        _log.info("%s %s: %d shards to write", caller.name, caller.place, len(shards.names))
        while True:
            window = state.window(running)
            if window:
                running.send(shards.work, window)
            if not running.unfinished:
                break
            try:
                news = running.news()
            except CancelledError as error:
                raise JobError(
                    f"store {caller.place}",
                    f"{error}; {state.done} of {caller.total} shards are written",
                    "a scheduler that stays, with its tasks, until the end",
                    f"Call {caller.name} again once there is a scheduler: it does the rest.",
                ) from error
            for shard in news:
                if isinstance(shard.error, UnwritableStoreError):  # the others would end so too
                    raise _unwritable(caller, shard.error, state.done)
                state.take(shard)
            failed = len(state.failed)
            shown.step(state.done + failed - shown.done, f", {failed} failed" if failed else "")
    if state.failed:
        raise _failures(caller, state.failed)


class _State:
    """Which shards are to be sent next, and what became of those that were."""

    def __init__(self, shards: Shards, done: int) -> None:
        self.done = done
        """Shards that are written."""
        self.failed: dict[str, BaseException] = {}
        self._shards = shards
        self._number = {name: at for at, name in enumerate(shards.names)}
        self._at_place = {place: at for at, place in enumerate(shards.places)}
        self._begun = 0
        self._again: deque[str] = deque()
        self._alone: deque[str] = deque()
        self._tried = {AGAIN: set[str](), ALONE: set[str]()}

    def window(self, running: _Runner) -> list[Run]:
        """Return the runs to send now: none while so many are under way."""
        shards, window = self._shards, list[Run]()
        if running.unfinished > AHEAD // 2:
            return window
        force = running.force  # workers come and go
        for places in shards.cuts.rounds(shards.places[self._begun :], force):
            window += [shards.run([self._at_place[p] for p in run], force.processes == 1) for run in places]
            self._begun += sum(map(len, places))
            if running.unfinished + len(window) >= AHEAD:
                break
        # by itself, and not by Dask's retries, which cannot tell errors apart; behind all others
        while self._again and self._begun == len(shards.places):
            window.append(self._by_itself(self._again.popleft(), AGAIN))
        # at the very end, one at a time: only what kills its worker with nothing beside it has done so
        if self._alone and not window and not running.unfinished:
            window.append(self._by_itself(self._alone.popleft(), ALONE))
        return window

    def _by_itself(self, name: str, mark: str) -> Run:
        return self._shards.run([self._number[name]], whole=False, mark=mark)

    def take(self, shard: ShardNews) -> None:
        """Note how a shard has ended, and whether it is tried once more."""
        if shard.error is None:
            self.done += 1
        elif shard.may_pass and shard.name not in self._tried[AGAIN]:
            self._tried[AGAIN].add(shard.name)
            self._again.append(shard.name)
        elif shard.killed and shard.name not in self._tried[ALONE]:
            self._tried[ALONE].add(shard.name)
            self._alone.append(shard.name)
        else:
            self.failed[shard.name] = shard.error


def _failures(caller: Exit, failed: Mapping[str, BaseException]) -> JobError:
    lines = [f"{name}: {error}" for name, error in sorted(failed.items())[:MAX_LISTED]]
    more = f"\nand {len(failed) - MAX_LISTED} more" if len(failed) > MAX_LISTED else ""
    failure = JobError(
        f"store {caller.place}",
        f"{len(failed)} of {caller.total} shards failed:\n" + "\n".join(lines) + more + "\n",
        "every shard written",
        f"The others are written and the store is not committed: mend the cause and call {caller.name} again.",
    )
    failure.__cause__ = next((e for e in failed.values() if isinstance(e, RasteretDaskError)), None)
    return failure


def _unwritable(caller: Exit, error: UnwritableStoreError, done: int) -> JobError:
    failure = JobError(
        f"store {caller.place}",
        f"that it takes no more, {done} of {caller.total} shards being written:\n{error.subject}: {error.found}\n",
        error.expected,
        f"No further shard was tried. {error.remedy}",
    )
    failure.__cause__ = error
    return failure
