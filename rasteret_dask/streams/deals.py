# SPDX-License-Identifier: Apache-2.0
"""How an epoch's chips, or what is left of them, are dealt to ranks: pure arithmetic, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["Deal", "Pool", "ranges"]


@dataclass(frozen=True, slots=True)
class Deal:
    """One way to deal an epoch's chips to ranks, and how many of them each rank took."""

    world_size: int
    """Among how many ranks."""
    buffer: int
    """Shards that each rank mixes."""
    pad: bool
    """Whether ranks repeat chips, so that none is left out."""
    taken: int
    """Chips that each rank took, repeated ones too."""

    @classmethod
    def of(cls, value: Any) -> Deal:
        """Return what :attr:`note` once was.

        Raises
        ------
        PlanError
            When it is nothing of the kind.
        """
        if isinstance(value, Mapping) and value.keys() == cls.__dataclass_fields__.keys():
            numbers = [value["world_size"], value["buffer"], value["taken"]]
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
            if whole and isinstance(value["pad"], bool):
                return cls(**value)
        raise PlanError(
            "load_state_dict", f"'dealt' of {value!r:.100}", "what state_dict() of a stream returned"
        )

    @property
    def note(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def alike(self, other: Deal) -> bool:
        """Whether both deal alike, however many were taken."""
        return (self.world_size, self.buffer, self.pad) == (other.world_size, other.buffer, other.pad)

    def share(self, chips: int, rank: int = 0) -> int:
        """Return how many of so many chips a rank has, its repeated ones not counted."""
        return chips // self.world_size + (self.pad and rank < chips % self.world_size)

    def left(self, chips: int) -> int:
        """Return how many of so many chips nobody took."""
        least, longer = self.share(chips, self.world_size - 1), self.pad * (chips % self.world_size)
        return chips - self.world_size * min(self.taken, least) - longer * (self.taken > least)


@dataclass(frozen=True, slots=True)
class Pool:
    """Chips of an epoch that are still to come, in the epoch's order of shards."""

    sizes: NDArray[np.int64]
    """Shape (shard,). How many each shard has; none of them is 0."""
    chip: NDArray[np.int64]
    """Shape (chip,). Their numbers, rising within a shard."""
    draw: NDArray[np.float64]
    """Shape (number,). A random number from 0 to 1 for each, or none at all: then the order is that of the chips."""

    def __len__(self) -> int:
        return len(self.chip)

    def order(self, deal: Deal, rank: int, parts: bool) -> NDArray[np.int64]:
        """Return the places of a rank's chips in the pool, in the order in which it takes them.

        Parameters
        ----------
        deal
            How they are dealt.
        rank
            Which rank.
        parts
            Whether each rank gets a part of every shard; else it gets a run of neighbouring shards.
        """
        first, sizes = self._share(deal, rank, parts)
        places = ranges(first, sizes)
        if not len(self.draw):
            return places
        own = sizes[sizes > 0]
        begin, end = _spans(len(own), deal.buffer * (deal.world_size if parts else 1))
        keys = np.repeat(begin, own) + np.repeat(end - begin, own) * self.draw[self.chip[places]]
        return places[np.argsort(keys, kind="stable")]

    def without(self, deal: Deal, parts: bool) -> Pool:
        """Return what is left once each rank took its chips of a deal."""
        left = np.ones(len(self), dtype=np.int64)
        for rank in range(deal.world_size):
            left[self.order(deal, rank, parts)[: deal.taken]] = 0
        sizes = np.add.reduceat(left, np.cumsum(self.sizes) - self.sizes)
        return Pool(sizes[sizes > 0], self.chip[left > 0], self.draw)

    def _share(self, deal: Deal, rank: int, parts: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where a rank's chips of each shard begin in the pool, and how many they are: neighbours."""
        chips, ranks = len(self), deal.world_size
        end = np.cumsum(self.sizes)
        begin = end - self.sizes
        if not (parts and ranks > 1 and len(self.draw)):
            shares = [deal.share(chips, each) for each in range(rank + 1)]
            begin, end = (np.clip(places, sum(shares[:-1]), sum(shares)) for places in (begin, end))
            return begin, end - begin
        # Counted off from rank to rank through all shards, so that shares are equal; inside a shard, chips of one rank
        # are then put together, so that they can be read together. Which rank begins a shard is drawn.
        starter = (self.draw[self.chip[begin]] * ranks).astype(np.int64)
        counted = chips if deal.pad else chips - chips % ranks
        low, high = np.minimum(begin, counted) - starter, np.minimum(end, counted) - starter
        turn = (rank - starter) % ranks
        before, after = (_below(high, ranks, n) - _below(low, ranks, n) for n in (turn, turn + 1))
        return begin + before, after - before


def ranges(first: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return so many whole numbers from each first one on, one range behind the other."""
    numbers = np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    numbers += np.arange(len(numbers))
    return numbers


def _below(stop: NDArray[np.int64], ranks: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the whole numbers before ``stop`` whose remainder by ``ranks`` is below ``turns``, from a multiple on."""
    return np.asarray(stop // ranks * turns + np.minimum(stop % ranks, turns))


def _spans(shards: int, mixed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return from when to when chips of each shard come, where so many shards are mixed at any time.

    In the middle, shard p comes from p - mixed + 1 to p + 1. At the start and the end spans are cut off, and so are
    dense: from the first chip to the last one, as many shards are mixed, and never more.
    """
    place = np.arange(shards, dtype=np.float64)
    end = max(1.0, shards - mixed + 1.0)
    return np.maximum(0.0, place - mixed + 1), np.minimum(place + 1, end)
