# SPDX-License-Identifier: Apache-2.0
"""Which chip comes when: epochs as pure arithmetic over the sizes of shards, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.streams.deals import Deal, Pool, ranges
from rasteret_dask.streams.weights import Weights

__all__ = ["Batch", "BatchOrder", "Begun", "Epoch", "View", "Visit"]

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, slots=True)
class Visit:
    """One shard in one epoch of one rank: it is read once, whatever the number of batches its chips go to."""

    shard: int
    """Place of the shard among the sizes."""
    rows: tuple[NDArray[np.int64], ...]
    """For each batch that takes chips of it, the rows it takes."""


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
    copies: NDArray[np.int64]
    """Shape (size,). How often the same chip came before in the epoch: 0 but where some come several times."""


@dataclass(frozen=True, slots=True)
class Begun:
    """An epoch of which batches were taken before, perhaps by other ranks, in batches of another size."""

    epoch: int = 0
    """Number of the epoch."""
    batch: int = 0
    """Batches that were taken of it."""
    deals: tuple[Deal, ...] = ()
    """How chips were dealt in turn, each time what was left, to ranks of another number."""
    offset: int = 0
    """Chips that each rank took since, by the deal that goes on."""


@dataclass(frozen=True)
class BatchOrder:
    """What decides which chip comes when, and to which rank.

    An epoch puts the shards in order (a seeded one where there is a ``seed``) and deals their chips to the ranks. A
    rank has one run of neighbouring shards, so that all but the shards at the ends of runs are read by one rank only;
    or, with ``parts``, its own part of every shard, neighbours in it, which it reads without the rest. Shares are
    equal: without ``pad`` the last ``chips % world_size`` chips of the epoch's order are left out, and each epoch of a
    seed leaves out others.

    With a seed, chips of ``buffer`` shards are mixed at any time, from the first batch to the last one: each shard has
    a span of the epoch over which its chips are spread evenly, and ``buffer`` spans overlap everywhere. With
    ``parts``, these are ``buffer * world_size`` parts, which are as many chips.

    A resumed epoch deals what is left of it anew where the number of ranks, ``buffer`` or ``pad`` are others than
    before: so no chip comes twice, and none is missed.

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
    parts
        Deal parts of each shard to the ranks; needs a seed.
    weights
        How often each chip comes; None: once. Needs a seed.

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
    parts: bool = False
    weights: Weights | None = None

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
        if self.weights is not None and self.seed is None:
            raise PlanError(
                "stream(weights=, balance=)", "no shuffle=", "a seed, which draws how often each chip comes",
                "Say shuffle=0.",
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

    @property
    def deal(self) -> Deal:
        """How chips are dealt, and none taken so far."""
        return Deal(self.world_size, self.buffer, self.pad, 0)

    @cached_property
    def batches(self) -> int:
        """Batches of an epoch, the same for every rank."""
        return self.left(Begun())

    def left(self, begun: Begun) -> int:
        """Return how many batches are left of an epoch that has begun."""
        chips = self.chips
        for deal in begun.deals:
            chips = deal.left(chips)
        share = self.deal.share(chips) - begun.offset
        return share // self.batch_size if self.drop_last else math.ceil(share / self.batch_size)

    def begun(self, epoch: int, batch: int, deals: tuple[Deal, ...]) -> Begun:
        """Return where an epoch stands, after chips were dealt and taken."""
        if deals and deals[-1].alike(self.deal):
            return Begun(epoch, batch, deals[:-1], deals[-1].taken)
        return Begun(epoch, batch, deals)

    def taken(self, begun: Begun, batches: int) -> tuple[Deal, ...]:
        """Return what was dealt and taken once so many more batches are there."""
        taken = begun.offset + batches * self.batch_size
        return (*begun.deals, replace(self.deal, taken=taken)) if taken else begun.deals

    def arguments(self) -> dict[str, Any]:
        """Return what two streams must have in common to share a state, as JSON values."""
        return {"seed": self.seed, "weights": None if self.weights is None else self.weights.digest}

    def epochs(self, begun: Begun, stop: int) -> Iterator[Epoch]:
        """Yield this rank's epochs before ``stop``, from where one of them stands."""
        for number in range(begun.epoch, stop):
            yield self.epoch(number, 0, begun if number == begun.epoch else None)

    def epoch(
        self, number: int, first: int = 0, begun: Begun | None = None, until: int | None = None
    ) -> Epoch:
        """Return one epoch of this rank, or what is left of it: its batches from ``first`` to before ``until``."""
        begun = begun or Begun(number)
        counts = None if self.weights is None else self.weights.counts(float(self._draws(1, number, 2)[0]))
        pool = self._pool(number, counts)
        for deal in begun.deals:
            pool = pool.without(deal, self.parts)
        batches = self.left(begun)
        end = begun.offset + batches * self.batch_size
        own = pool.order(self.deal, self.rank, self.parts)
        marks = np.zeros(len(own), dtype=bool)
        if self.pad and batches:
            own, marks = self._padded(own, end, len(pool))
        last = batches if until is None else until
        left = slice(begun.offset + first * self.batch_size, begun.offset + last * self.batch_size)
        return self._cut(number, pool.chip[own[left]], counts, marks[left])

    def _pool(self, number: int, counts: NDArray[np.int64] | None) -> Pool:
        """Return all chips of an epoch, in its order of shards; numbers follow the chip table, copy by copy."""
        sizes = np.asarray(self.sizes, dtype=np.int64)
        if counts is not None:
            sizes = np.diff(np.append(0, np.cumsum(counts))[np.append(0, np.cumsum(sizes))])
        order = np.arange(len(sizes))
        draw = np.empty(0)
        if self.seed is not None:
            order = np.argsort(self._draws(len(sizes), number, 0), kind="stable")
            draw = self._draws(int(sizes.sum()), number, 1)
        order = order[sizes[order] > 0]
        return Pool(sizes[order], ranges((np.cumsum(sizes) - sizes)[order], sizes[order]), draw)

    def _draws(self, n: int, *key: int) -> NDArray[np.float64]:
        """Return n random numbers from 0 to below 1 for a key: NumPy's raw bits stay the same for ever."""
        assert self.seed is not None
        raw = np.random.PCG64(np.random.SeedSequence((self.seed, *key))).random_raw(n)
        bits = np.asarray(raw, dtype=np.uint64)
        bits >>= np.uint64(11)
        return np.asarray(bits * 2.0**-53)

    def _cut(
        self,
        number: int,
        chip: NDArray[np.int64],
        counts: NDArray[np.int64] | None,
        padded: NDArray[np.bool_],
    ) -> Epoch:
        """Cut chips, known by their numbers, into batches."""
        copy = np.zeros(len(chip), dtype=np.int64)
        if counts is not None:
            first = np.cumsum(counts) - counts
            of = np.repeat(np.arange(len(counts)), counts)[chip]
            chip, copy = of, chip - first[of]
        sizes = np.asarray(self.sizes, dtype=np.int64)
        shard = np.repeat(np.arange(len(sizes)), sizes)[chip]
        row = chip - (np.cumsum(sizes) - sizes)[shard]
        return Epoch.of(number, shard, row, copy, padded, self.batch_size)

    def _padded(
        self, order: NDArray[np.int64], end: int, chips: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Repeat the last chips, up to a batch of them, so that none is read a second time for it."""
        empty = not len(order)
        if empty:  # fewer chips than ranks
            order = np.array([self.rank % chips])
        missing = end - len(order)
        last = np.resize(np.arange(max(0, len(order) - self.batch_size), len(order)), missing)
        marks = np.arange(end) >= (0 if empty else len(order))
        return np.append(order, order[last]), marks


class View(Sequence[T]):
    """Items that are made when they are asked for."""

    def __init__(self, count: int, item: Callable[[int], T]) -> None:
        self._places, self._item = range(count), item

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        places = self._places[at]
        return self._item(places) if isinstance(places, int) else list(map(self._item, places))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A number of each chip: the chips of a part follow each other, and so do the parts of an owner."""

    numbers: NDArray[np.int64]
    """Shape (chip,)."""
    parts: NDArray[np.int64]
    """Shape (part + 1,). Where the chips of each part begin, and where those of the last one end."""
    owners: NDArray[np.int64]
    """Shape (owner + 1,). The same of each owner's parts."""

    def of(self, owner: int) -> list[NDArray[np.int64]]:
        """Return the numbers of each part of an owner."""
        first, last = self.owners[owner : owner + 2].tolist()
        return [self.numbers[start:end] for start, end in pairwise(self.parts[first : last + 1].tolist())]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of one rank, as arrays: an epoch of a million chips has some 100,000 parts.

    A part is what one batch takes of one visit.
    """

    number: int
    shards: NDArray[np.int64]
    """Shape (visit,). In the order in which they are first needed."""
    rows: _Parts
    """Rows of chips in their shards, by visit and then batch."""
    places: _Parts
    """Places of chips in their batches, by batch and then visit."""
    part_visits: NDArray[np.int64]
    """Shape (part,). The visit of each of the parts of ``places``."""
    part_numbers: NDArray[np.int64]
    """Shape (part,). Which of its visit's parts it is."""
    copies: NDArray[np.int64]
    """Shape (chip,), in order. How often the same chip came before."""
    padded: NDArray[np.bool_]
    """Shape (chip,), in order. Whether a chip is repeated."""
    batch_size: int

    @property
    def visits(self) -> Sequence[Visit]:
        """In the order in which they are first needed."""
        return View(len(self.shards), lambda at: Visit(int(self.shards[at]), tuple(self.rows.of(at))))

    @property
    def batches(self) -> Sequence[Batch]:
        """In order."""
        needed = np.maximum.accumulate(self.part_visits) + 1

        def batch(at: int) -> Batch:
            first, last = self.places.owners[at : at + 2].tolist()
            visits, numbers = self.part_visits[first:last].tolist(), self.part_numbers[first:last].tolist()
            own = slice(at * self.batch_size, (at + 1) * self.batch_size)
            parts = tuple(zip(visits, numbers, self.places.of(at), strict=True))
            return Batch(
                parts, int(needed[last - 1]), len(self.padded[own]), self.padded[own], self.copies[own]
            )

        return View(len(self.places.owners) - 1, batch)

    @classmethod
    def of(
        cls,
        number: int,
        shard: NDArray[np.int64],
        row: NDArray[np.int64],
        copy: NDArray[np.int64],
        padded: NDArray[np.bool_],
        batch_size: int,
    ) -> Epoch:
        """Cut chips, in their order, into batches.

        Parameters
        ----------
        number
            Counts epochs.
        shard, row, copy, padded
            Shape (chip,). A chip's shard, its row there, how often it came before, and whether it is repeated.
        batch_size
            Chips of a batch.
        """
        shards, visit = _visits(shard)
        batch, place = np.divmod(np.arange(len(visit)), batch_size)
        key = batch * len(shards) + visit
        order = np.argsort(key, kind="stable")  # by batch, then visit, and else as they come
        key, row, place = key[order], row[order], place[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))  # chip of each part
        sizes = np.diff(first, append=len(key))
        part_batches, part_visits = np.divmod(key[first], len(shards))
        by_visit = np.argsort(part_visits, kind="stable")
        visit_parts = np.bincount(part_visits, minlength=len(shards))
        part_numbers = np.empty(len(first), dtype=np.int64)
        part_numbers[by_visit] = ranges(np.zeros_like(visit_parts), visit_parts)
        rows = _Parts(
            row[ranges(first[by_visit], sizes[by_visit])], _begins(sizes[by_visit]), _begins(visit_parts)
        )
        places = _Parts(place, _begins(sizes), _begins(np.bincount(part_batches)))
        return cls(number, shards, rows, places, part_visits, part_numbers, copy, padded, batch_size)


def _begins(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where runs of these sizes begin, and where the last one ends."""
    return np.append(0, np.cumsum(sizes))


def _visits(shard: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shards in the order in which they are first needed, and which of them each chip is of."""
    first = np.full(int(shard.max(initial=-1)) + 1, len(shard))
    first[shard[::-1]] = np.arange(len(shard))[
        ::-1
    ]  # of a shard's chips, the first one is put last, and stays
    shards = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(shard))]
    place = np.empty(len(first), dtype=np.int64)
    place[shards] = np.arange(len(shards))
    return shards, place[shard]


def _whole(name: str, value: Any, least: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise PlanError(f"stream({name}=)", repr(value), f"a whole number from {least} on{more}")
