"""Runs of neighbouring shards, one task each: how long they are, and what the threads of a process do of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.keptbytes import shared_bytes

__all__ = ["CREW", "Crew", "Cuts", "Workforce"]

REPEATED = 0.1
"""Share of the bytes that is fetched a second time at the borders of runs: longer ones would gain little."""


ROUND = 64
"""Single shards of a round, where one process computes all."""


@dataclass(frozen=True, slots=True)
class Workforce:
    """Who computes the shards of a job."""

    processes: int
    threads: int
    """Of each process."""


@dataclass(frozen=True)
class Cuts:
    """Where shards in running order may be cut into runs, and what that costs."""

    shared: NDArray[np.int64]
    """Shape (shard - 1,). Bytes of tiles that both sides of a border need; see :func:`shared_bytes`."""
    total: int
    """Bytes of all tiles."""

    @classmethod
    def of(cls, job: Job) -> Cuts:
        """Return those of a job."""
        return cls(*shared_bytes(job))

    @classmethod
    def free(cls, shards: int) -> Cuts:
        """Return those of shards that have nothing in common."""
        return cls(np.zeros(max(shards - 1, 0), dtype=np.int64), 0)

    @cached_property
    def enough(self) -> int:
        """Shards of a run at whose border no more than :data:`REPEATED` of its bytes are fetched again."""
        if not self.shared.any():
            return 1
        new = self.total / (len(self.shared) + 1)
        return int(np.ceil(self.shared.mean() / (REPEATED * new)))

    def rounds(self, places: Sequence[int], force: Workforce) -> Iterator[list[tuple[int, ...]]]:
        """Cut shards into runs, round by round, in the order in which they are to begin.

        In each round every process gets half of its share of what is left, so that runs get shorter towards the end.
        One process gets single shards: it has all neighbours anyway. The threads of a process begin next to each
        other, on parts of what would be the run of one: see :class:`Crew`.

        Parameters
        ----------
        places
            The shards to compute, by their places in running order, rising.
        force
            Who computes them.

        Yields
        ------
        list
            Runs of neighbours, which together are the next of the shards.
        """
        if force.processes == 1:
            for begin in range(0, len(places), ROUND):
                yield [(place,) for place in places[begin : begin + ROUND]]
            return
        begin = 0
        while begin < len(places):
            parts = []
            left = len(places) - begin
            share = left / force.processes
            if left > 2 * force.processes * force.threads:
                share /= 2
            length = min(int(np.ceil(share)), max(self.enough, force.threads))
            for _ in range(force.processes):
                end = self._cheapest(places, begin, length)
                parts.append(_pieces(places[begin:end], force.threads))
                begin = end
            yield [
                pieces[thread] for thread in range(force.threads) for pieces in parts if thread < len(pieces)
            ]

    def _cheapest(self, places: Sequence[int], begin: int, length: int) -> int:
        """Return where to end a run of about a length: where the least is shared."""
        slack = length // 4
        ends = range(min(begin + length - slack, len(places)), min(begin + length + slack, len(places)) + 1)
        inside = [end for end in ends if begin < end < len(places)]
        if not inside or ends[-1] == len(places):
            return min(begin + length, len(places))
        return min(inside, key=lambda end: (int(self.shared[places[end - 1]]), abs(end - begin - length)))


def _pieces(places: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Cut neighbours into so many pieces, as equal as can be."""
    cuts = [len(places) * at // count for at in range(count + 1)]
    return [tuple(places[a:b]) for a, b in pairwise(cuts) if a < b]


@dataclass(slots=True, eq=False)
class _Duty:
    """A run that a task of this process has."""

    job: str
    waiting: deque[int]
    places: tuple[int, ...]
    whole: bool
    compute: Callable[[int], None]
    goes_on: Callable[[], bool]
    busy: int = 0
    """Of its shards, how many are being computed."""
    finished: set[int] = field(default_factory=set)
    error: BaseException | None = None


class Crew:
    """The threads of this process which compute runs: they share them, and so work side by side on the same tiles."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._duties: list[_Duty] = []

    def compute(
        self,
        job: str,
        places: Sequence[int],
        compute: Callable[[int], None],
        goes_on: Callable[[], bool],
        whole: bool = False,
    ) -> None:
        """Compute a run's shards, with the other threads' help and helping them: what comes first is done first.

        Parameters
        ----------
        job
            Digest of the job whose shards they are.
        places
            The run, by places in running order.
        compute
            Computes the shard at a place.
        goes_on
            Tells whether the run is still wanted: asked before each shard.
        whole
            Whether this process computes all of the job.

        Raises
        ------
        BaseException
            What computing one of them ended with; the rest of the run is then left.
        """
        duty = _Duty(job, deque(places), tuple(places), whole, compute, goes_on)
        with self._changed:
            self._duties.append(duty)
        try:
            while (turn := self._next(duty)) is not None:
                self._do(*turn)
        finally:
            with self._changed:
                self._duties.remove(duty)
        if duty.error is not None:
            raise duty.error

    def places(self, job: Callable[[], str]) -> frozenset[int] | None:
        """Return which shards of a job this process still computes, by their places; None: it may be all of them."""
        with self._changed:
            duties = list(self._duties)
        if not duties:
            return None
        digest = job()
        duties = [duty for duty in duties if duty.job == digest]
        if not duties or any(duty.whole for duty in duties):
            return None
        return frozenset(place for duty in duties for place in duty.places) - frozenset(
            place for duty in duties for place in duty.finished
        )

    def _next(self, duty: _Duty) -> tuple[_Duty, int] | None:
        """Return what to compute next, or None once a run is over; wait for its shards that others compute."""
        with self._changed:
            while duty.waiting or duty.busy:
                for other in sorted(self._duties, key=lambda one: one.places[0]):
                    if other.waiting and (other.error is not None or not other.goes_on()):
                        other.waiting.clear()
                    if other.waiting:
                        other.busy += 1
                        return other, other.waiting.popleft()
                if duty.busy:
                    self._changed.wait()
            return None

    def _do(self, duty: _Duty, place: int) -> None:
        error: BaseException | None = None
        try:
            duty.compute(place)
        except BaseException as reason:  # the thread that has the run raises it
            error = reason
        with self._changed:
            duty.busy -= 1
            duty.finished.add(place)
            duty.error = duty.error or error
            self._changed.notify_all()


CREW = Crew()
"""This process's."""
