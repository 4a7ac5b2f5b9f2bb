# SPDX-License-Identifier: Apache-2.0
"""Which chip comes when: epochs as pure arithmetic over the sizes of shards, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["Batch", "BatchOrder", "Epoch", "Visit"]


@dataclass(frozen=True, slots=True)
class Visit:
    """One shard in one epoch of one rank: it is read once, whatever the number of batches its chips go to."""

    shard: int
    """Place of the shard among the sizes."""
    rows: tuple[NDArray[np.int64], ...]
    """For each batch that takes chips of it, the rows it takes; nothing where no batch needs it any more."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The chips of one batch."""

    parts: tuple[tuple[int, int, NDArray[np.int64]], ...]
    """(visit, which of its ``rows``, the places in the batch that they go to)."""
    visits: int
    """How many of the epoch's visits have been needed once this batch is there."""
    size: int
    padded: NDArray[np.bool_]
    """Shape (size,). True where a chip is repeated only to fill the batch."""


@dataclass(frozen=True)
class BatchOrder:
    """What decides which chip comes when, and to which rank.

    An epoch puts the shards in order (a seeded one where there is a ``seed``) and deals their chips out to the ranks:
    each rank has one run of neighbouring shards, so that all but the shards at the ends of runs are read by one rank
    only, and more ranks than shards share shards. Without ``pad`` the runs are equally long and the last
    ``chips % world_size`` chips of the epoch's order are left out; each epoch of a seed leaves out others.

    With a seed the chips of a run's p-th shard get keys that are spread evenly from p to p + ``buffer``, and the run
    is sorted by them: at any time ``buffer`` shards are mixed, one more is needed each time a shard's worth of chips
    has left, and no chip leaves later than ``buffer`` shards behind its own.

    Parameters
    ----------
    sizes
        Chips of each shard.
    batch_size
        Chips of a batch.
    seed
        Shuffles; None keeps the order of the chips.
    drop_last
        Leave out an epoch's last batch where it is short.
    rank, world_size
        Which of how many parts.
    pad
        Fill each rank's last batch by repeating chips of the part, and repeat whole batches where another rank has
        one more; :attr:`Batch.padded` marks them.
    buffer
        Shards that are mixed at any time.

    Raises
    ------
    PlanError
        Where an argument cannot be, or some rank would have no batch at all.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int | None = None
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    pad: bool = False
    buffer: int = 4

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("world_size", 1), ("rank", 0), ("buffer", 1)):
            _whole(name, getattr(self, name), least)
        if self.seed is not None:
            _whole("shuffle", self.seed, 0, " (a seed), or None for the order of the chips")
        if self.rank >= self.world_size:
            raise PlanError(
                "stream(rank=)", f"rank {self.rank} of world_size={self.world_size}",
                f"0 to {self.world_size - 1}", "Ranks are counted from 0.",
            )  # fmt: skip
        if self.pad and self.drop_last:
            raise PlanError(
                "stream(pad=True, drop_last=True)", "both", "one of them",
                "pad fills the last batch, so there is none to drop.",
            )  # fmt: skip
        if not self.chips:
            raise PlanError("stream", "no chips", "at least one", "Look at explain() and at select.")
        if not self.batches:
            self._refuse_nothing()

    def _refuse_nothing(self) -> None:
        if self.chips < self.world_size:
            raise PlanError(
                "stream(world_size=)", f"{self.chips} chips for {self.world_size} ranks", "a chip for each rank",
                "Use fewer ranks, or pad=True, which repeats chips and marks them.",
            )  # fmt: skip
        raise PlanError(
            "stream(batch_size=)",
            f"batches of {self.batch_size} chips, of which each rank has {self.chips // self.world_size}",
            "at least one whole batch, as drop_last=True leaves nothing else",
            "Use a smaller batch_size, or drop_last=False.",
        )

    @property
    def chips(self) -> int:
        """Chips of all ranks."""
        return sum(self.sizes)

    @cached_property
    def batches(self) -> int:
        """Batches of an epoch, the same for every rank."""
        share = math.ceil(self.chips / self.world_size) if self.pad else self.chips // self.world_size
        return share // self.batch_size if self.drop_last else math.ceil(share / self.batch_size)

    def arguments(self) -> dict[str, Any]:
        """Return what two streams must have in common to yield the same batches, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sizes"}

    def epochs(self, first: int, batch: int, stop: int) -> Iterator[Epoch]:
        """Yield this rank's epochs before ``stop``, from one batch of the first of them on."""
        for number in range(first, stop):
            yield self.epoch(number, batch if number == first else 0)

    def epoch(self, number: int, first: int = 0, until: int | None = None) -> Epoch:
        """Return one epoch of this rank, from its batch ``first`` on, to the one before ``until``."""
        shards = np.arange(len(self.sizes))
        if self.seed is not None:
            shards = np.argsort(_draws(len(shards), self.seed, number, 0), kind="stable")
        sizes = np.asarray(self.sizes, dtype=np.int64)[shards]
        end = np.cumsum(sizes)
        start, stop = self._run(self.rank)
        own = np.flatnonzero((end > start) & (end - sizes < stop) & (sizes > 0))
        place, row = [], []
        for at, one in enumerate(own.tolist()):
            begins = int(end[one] - sizes[one])
            rows = np.arange(max(start - begins, 0), min(stop, int(end[one])) - begins)
            place.append(np.full(len(rows), at))
            row.append(rows)
        visit, rows = np.concatenate(place), np.concatenate(row)
        if self.seed is not None:
            keys = [
                at + self.buffer * (_draws(self.sizes[shard], self.seed, number, shard + 1)[r] / 2.0**64)
                for (at, shard), r in zip(enumerate(shards[own].tolist()), row, strict=True)
            ]
            order = np.argsort(np.concatenate(keys), kind="stable")
            visit, rows = visit[order], rows[order]
        marks = np.zeros(len(rows), dtype=bool)
        if self.pad:
            visit, rows, marks = self._padded(visit, rows, empty=not self._share(self.rank))
        last = self.batches if until is None else until
        left = slice(first * self.batch_size, last * self.batch_size)
        return Epoch.of(number, shards[own].tolist(), visit[left], rows[left], marks[left], self.batch_size)

    def _run(self, rank: int) -> tuple[int, int]:
        """Return where a rank's run begins and ends in the epoch's order; a padded rank has one chip at least."""
        share = self.chips // self.world_size
        if not self.pad:
            return rank * share, (rank + 1) * share
        start = min(rank * self.chips // self.world_size, self.chips - 1)
        return start, start + max(self._share(rank), 1)

    def _share(self, rank: int) -> int:
        return (rank + 1) * self.chips // self.world_size - rank * self.chips // self.world_size

    def _padded(
        self, visit: NDArray[np.int64], rows: NDArray[np.int64], empty: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Repeat the last chips, up to a batch of them, so that none is read a second time for it."""
        missing = self.batches * self.batch_size - len(rows)
        last = np.resize(np.arange(max(0, len(rows) - self.batch_size), len(rows)), missing)
        marks = np.arange(len(rows) + missing) >= (0 if empty else len(rows))
        at = np.concatenate([np.arange(len(rows)), last])
        return visit[at], rows[at], marks


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of one rank."""

    number: int
    visits: tuple[Visit, ...]
    """In the order in which they are first needed."""
    batches: tuple[Batch, ...]

    @classmethod
    def of(
        cls,
        number: int,
        shards: Sequence[int],
        visit: NDArray[np.int64],
        row: NDArray[np.int64],
        padded: NDArray[np.bool_],
        batch_size: int,
    ) -> Epoch:
        """Cut the chips, in their order, into batches.

        Parameters
        ----------
        number
            Counts epochs.
        shards
            The shard of each visit.
        visit, row, padded
            Shape (chip,). A chip's visit and row, and whether it is repeated.
        batch_size
            Chips of a batch.
        """
        number_of, place_in = np.divmod(np.arange(len(row)), batch_size)
        order = np.lexsort((visit, number_of))  # by batch, then visit, and else as they come
        number_of, visit, row, place_in = number_of[order], visit[order], row[order], place_in[order]
        begins = np.ones(len(row), dtype=bool)
        begins[1:] = (np.diff(number_of) != 0) | (np.diff(visit) != 0)
        first = np.flatnonzero(begins)
        rows: list[list[NDArray[np.int64]]] = [[] for _ in shards]
        parts: list[list[tuple[int, int, NDArray[np.int64]]]] = [[] for _ in range(0, len(row), batch_size)]
        ends = np.append(first, len(row))[1:]
        for start, end, batch, at in zip(
            first.tolist(), ends.tolist(), number_of[first].tolist(), visit[first].tolist(), strict=True
        ):
            parts[batch].append((at, len(rows[at]), place_in[start:end]))
            rows[at].append(row[start:end])
        batches, needed = [], 0
        for start, one in zip(range(0, len(row), batch_size), parts, strict=True):
            needed = max(needed, one[-1][0] + 1)
            marks = padded[start : start + batch_size]
            batches.append(Batch(tuple(one), needed, len(marks), marks))
        return cls(
            number,
            tuple(Visit(s, tuple(r)) for s, r in zip(shards, rows, strict=True)),
            tuple(batches),
        )


def _draws(n: int, *key: int) -> NDArray[np.uint64]:
    """Return n random numbers for a key; NumPy promises that raw bits stay the same from version to version."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.asarray(bits, dtype=np.uint64)


def _whole(name: str, value: Any, least: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise PlanError(f"stream({name}=)", repr(value), f"a whole number from {least} on{more}")
