# SPDX-License-Identifier: Apache-2.0
"""Runs of neighbouring shards, one task each: how long they are, and what the threads of a process do of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.keptbytes import shared_bytes

__all__ = ["CREW", "REPEATED", "Crew", "Cuts", "Takeover", "Workforce"]

REPEATED = 0.1
"""Share of all bytes that processes may fetch once more because one takes over a part of another's run, in all."""

TILES_SHARE = 0.5
"""Share of a shard's time that fetching and decoding its tiles takes, about: what a border costs, in time."""

LONGEST = 256
"""Shards of a run, at most: of what is computed again, because a worker was lost, each asks for its report."""

SLACK = 6
"""A run may end this part of its length sooner or later, where less is shared there."""

ROUND = 64
"""Single shards of a round, where one process computes all."""


@dataclass(frozen=True, slots=True)
class Workforce:
    """Who computes the shards of a job."""

    processes: int
    threads: int
    """Of each process."""


@dataclass(frozen=True, slots=True)
class Takeover:
    """The end of a process's shards, for another one."""

    places: tuple[int, ...]
    gain: float
    """How much sooner all of them are done, in the time of a shard."""


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

    def rounds(self, places: Sequence[int], force: Workforce) -> Iterator[list[tuple[int, ...]]]:
        """Cut shards into runs, round by round, in the order in which they are to begin.

        Every process gets its share in one piece, at most :data:`LONGEST` shards for each of its threads in a round:
        what two processes both need is then as little as can be. Who is done sooner takes over a part of another's
        run: see :meth:`takeover`. One process gets single shards: it has all neighbours anyway. The threads of a
        process begin next to each other, on parts of what would be the run of one: see :class:`Crew`.

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
            count = min(len(places) - begin, LONGEST * force.threads * force.processes)
            ends = self._ends(places, begin, count, force.processes)
            pieces = [_pieces(places[a:b], force.threads) for a, b in pairwise(ends)]
            yield [part[thread] for thread in range(force.threads) for part in pieces if thread < len(part)]
            begin = ends[-1]

    def parts(self, count: int) -> list[range]:
        """Cut all shards into runs of neighbours, as equal as can be, for processes that know nothing of each other.

        Returns
        -------
        list
            So many runs of places, in order; where there are fewer shards, some are empty.
        """
        places = range(len(self.shared) + 1)
        return [places[a:b] for a, b in pairwise(self._ends(places, 0, len(places), count))]

    def _ends(self, places: Sequence[int], begin: int, count: int, pieces: int) -> list[int]:
        """Return where some shards begin, and where each of so many pieces of them ends."""
        ends = [begin + -(-count * number // pieces) for number in range(pieces + 1)]
        slack = count // (SLACK * pieces)
        return [begin, *(self._cheapest(places, end, slack) for end in ends[1:])]

    def _cheapest(self, places: Sequence[int], end: int, slack: int) -> int:
        """Return where to end a run that would end about here: where what is shared there costs less than waiting."""
        if end == len(places):
            return end
        at = np.arange(end - slack, min(end + slack, len(places) - 1) + 1)
        away = np.abs(at - end)
        return int(at[np.lexsort((away, self._cost(np.asarray(places)[at]) + away))[0]])

    def _cost(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the time, in that of a shard, for what is fetched once more where another process begins at places."""
        each = self.total / (len(self.shared) + 1)
        return np.asarray(TILES_SHARE * self.shared[places - 1] / max(each, 1))

    def paid(self, runs: Iterable[Sequence[int]]) -> int:
        """Return the bytes that are fetched once more where these runs begin, if each is another process's."""
        return sum(int(self.shared[run[0] - 1]) for run in runs if run[0] > 0)

    def allowance(self, places: Sequence[int], force: Workforce) -> int:
        """Return the bytes that so many processes may fetch once more, at the borders of all their runs."""
        return self.paid(chain.from_iterable(self.rounds(places, force))) + int(REPEATED * self.total)

    def takeover(self, places: Sequence[int], threads: int, spare: int) -> Takeover | None:
        """Find what of a process's shards an idle one had better compute.

        Parameters
        ----------
        places
            The shards that the busy process has left, those under way among them, rising.
        threads
            Its threads.
        spare
            Bytes that may be fetched once more for it, at most.

        Returns
        -------
        Takeover or None
            None where it would gain less time than the idle process spends on tiles that both need.
        """
        at = np.arange(threads, len(places))
        if not len(at):
            return None
        begins = np.asarray(places)[at]
        twice, cost = self.shared[begins - 1], self._cost(begins)
        gain = len(places) / threads - np.maximum(at / threads, len(places) - at + cost)
        gain[(gain < cost) | (gain <= 0) | (twice > spare)] = -1
        best = int(gain.argmax())
        return Takeover(tuple(places[int(at[best]) :]), float(gain[best])) if gain[best] > 0 else None


def _pieces(places: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Cut neighbours into so many pieces, as equal as can be."""
    cuts = [len(places) * at // count for at in range(count + 1)]
    return [tuple(places[a:b]) for a, b in pairwise(cuts) if a < b]


@dataclass(slots=True, eq=False)
class _Duty:
    """A run that a task of this process has."""

    job: str
    first: int
    waiting: deque[int]
    places: set[int]
    """Those that it has left: waiting, or being computed."""
    whole: bool
    compute: Callable[[int], None]
    goes_on: Callable[[], bool]
    busy: int = 0
    """Of its shards, how many are being computed."""
    error: BaseException | None = None


class Crew:
    """The threads of this process which compute runs: they share them, and so work side by side on the same tiles."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._duties: list[_Duty] = []
        self._others: dict[str, set[int]] = {}
        """Job -> shards that others compute, after all."""

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
        duty = _Duty(job, places[0], deque(places), set(places), whole, compute, goes_on)
        with self._changed:
            self._duties.append(duty)
            self._others.setdefault(job, set()).difference_update(places)
        try:
            while (turn := self._next(duty)) is not None:
                self._do(*turn)
        finally:
            with self._changed:
                self._duties.remove(duty)
                if all(other.job != job for other in self._duties):
                    del self._others[job]
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
        with self._changed:
            return frozenset(place for duty in duties for place in duty.places)

    def give_up(self, job: str, places: Collection[int]) -> tuple[int, ...]:
        """Leave shards that have not begun to others; return which, rising."""
        with self._changed:
            left = list[int]()
            for duty in (duty for duty in self._duties if duty.job == job):
                here = [place for place in duty.waiting if place in places]
                duty.waiting = deque(place for place in duty.waiting if place not in places)
                duty.places.difference_update(here)
                left += here
            if left:
                self._others[job].update(left)
                self._changed.notify_all()
            return tuple(sorted(left))

    def given_up(self, job: str) -> frozenset[int]:
        """Return the shards of a job that this process has left to others."""
        with self._changed:
            return frozenset(self._others.get(job, ()))

    def _next(self, duty: _Duty) -> tuple[_Duty, int] | None:
        """Return what to compute next, or None once a run is over; wait for its shards that others compute."""
        with self._changed:
            while duty.waiting or duty.busy:
                for other in sorted(self._duties, key=lambda one: one.first):
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
            duty.places.discard(place)
            duty.error = duty.error or error
            self._changed.notify_all()


CREW = Crew()
"""This process's."""
