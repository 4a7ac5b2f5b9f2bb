"""Shards of a store, computed in runs of neighbours: sent in windows, told of one by one, tried once more."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
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
    number = {name: at for at, name in enumerate(shards.names)}
    failed: dict[str, BaseException] = {}
    again: deque[str] = deque()
    alone: deque[str] = deque()
    tried: set[str] = set()
    tried_alone: set[str] = set()
    done = caller.total - len(number)
    with (
        Progress("shards", caller.progress, caller.total) as shown,
        running.watched(shards.work, shards.run([0], whole=False), f"{caller.name} {caller.place}", shown),
    ):
        shown.step(done)
        sign()
        _log.info("%s %s: %d shards to write", caller.name, caller.place, len(number))
        at_place = {place: at for at, place in enumerate(shards.places)}
        begun = 0
        while True:
            if running.unfinished <= AHEAD // 2:
                window: list[Run] = []
                force = running.force  # workers come and go
                for places in shards.cuts.rounds(shards.places[begun:], force):
                    window += [shards.run([at_place[p] for p in run], force.processes == 1) for run in places]
                    begun += sum(map(len, places))
                    if running.unfinished + len(window) >= AHEAD:
                        break
                # by itself, and not by Dask's retries, which cannot tell errors apart; behind all others
                while again and begun == len(shards.places):
                    window.append(shards.run([number[again.popleft()]], whole=False, mark=AGAIN))
                # at the very end, one at a time: only what kills its worker with nothing beside it has done so
                if alone and not window and not running.unfinished:
                    window.append(shards.run([number[alone.popleft()]], whole=False, mark=ALONE))
                if window:
                    running.send(shards.work, window)
            if not running.unfinished:
                break
            try:
                news = running.news()
            except CancelledError as error:
                raise JobError(
                    f"store {caller.place}",
                    f"{error}; {done} of {caller.total} shards are written",
                    "a scheduler that stays, with its tasks, until the end",
                    f"Call {caller.name} again once there is a scheduler: it does the rest.",
                ) from error
            for shard in news:
                if isinstance(shard.error, UnwritableStoreError):  # the others would end so too
                    raise _unwritable(caller, shard.error, done)
                if shard.error is None:
                    done += 1
                elif shard.may_pass and shard.name not in tried:
                    tried.add(shard.name)
                    again.append(shard.name)
                elif shard.killed and shard.name not in tried_alone:
                    tried_alone.add(shard.name)
                    alone.append(shard.name)
                else:
                    failed[shard.name] = shard.error
            shown.step(done + len(failed) - shown.done, f", {len(failed)} failed" if failed else "")
    if failed:
        lines = [f"{name}: {error}" for name, error in sorted(failed.items())[:MAX_LISTED]]
        more = f"\nand {len(failed) - MAX_LISTED} more" if len(failed) > MAX_LISTED else ""
        raise JobError(
            f"store {caller.place}",
            f"{len(failed)} of {caller.total} shards failed:\n" + "\n".join(lines) + more + "\n",
            "every shard written",
            f"The others are written and the store is not committed: mend the cause and call {caller.name} again.",
        ) from next((e for e in failed.values() if isinstance(e, RasteretDaskError)), None)


def _unwritable(caller: Exit, error: UnwritableStoreError, done: int) -> JobError:
    failure = JobError(
        f"store {caller.place}",
        f"that it takes no more, {done} of {caller.total} shards being written:\n{error.subject}: {error.found}\n",
        error.expected,
        f"No further shard was tried. {error.remedy}",
    )
    failure.__cause__ = error
    return failure
