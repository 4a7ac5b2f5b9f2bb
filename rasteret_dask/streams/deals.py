# SPDX-License-Identifier: Apache-2.0
"""How an epoch's chips, or what is left of them, are dealt to ranks: pure arithmetic, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["Deal", "Pool"]


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
    """Chips of an epoch that are still to come, in the epoch's order of shards. All arrays have shape (chip,)."""

    shard: NDArray[np.int64]
    """Number of the shard; equal ones are neighbours."""
    row: NDArray[np.int64]
    """Row in it, rising within a shard."""
    copy: NDArray[np.int64]
    """How often the same chip stands before: 0 but where chips come several times an epoch."""
    draw: NDArray[np.float64]
    """A random number from 0 to 1, or none at all, shape (0,): then the order is that of the chips."""

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, chips: NDArray[Any]) -> Pool:
        draw = self.draw[chips] if len(self.draw) else self.draw
        return Pool(self.shard[chips], self.row[chips], self.copy[chips], draw)

    def order(self, deal: Deal, rank: int, parts: bool) -> NDArray[np.int64]:
        """Return the chips of a rank in the order in which it takes them.

        Parameters
        ----------
        deal
            How they are dealt.
        rank
            Which rank.
        parts
            Whether each rank gets a part of every shard; else it gets a run of neighbouring shards.
        """
        owner = self._owners(deal, parts)
        return self._mixed(np.flatnonzero(owner == rank), deal, parts)

    def without(self, deal: Deal, parts: bool) -> Pool:
        """Return what is left once each rank took its chips of a deal."""
        owner, kept = self._owners(deal, parts), np.ones(len(self), dtype=bool)
        for rank in range(deal.world_size):
            kept[self._mixed(np.flatnonzero(owner == rank), deal, parts)[: deal.taken]] = False
        return self[np.flatnonzero(kept)]

    def _mixed(self, chips: NDArray[np.int64], deal: Deal, parts: bool) -> NDArray[np.int64]:
        """Return a rank's chips in the order in which it takes them."""
        if not len(self.draw) or not len(chips):
            return chips
        shard = self.shard[chips]
        place = np.cumsum(np.diff(shard, prepend=shard[0]) != 0)
        begin, end = _spans(int(place[-1]) + 1, deal.buffer * (deal.world_size if parts else 1))
        keys = begin[place] + (end - begin)[place] * self.draw[chips]
        return chips[np.argsort(keys, kind="stable")]

    def _owners(self, deal: Deal, parts: bool) -> NDArray[np.int64]:
        """Return the rank of each chip; those that no rank gets have number ``world_size``."""
        number, ranks, chips = np.arange(len(self)), deal.world_size, len(self)
        if not (parts and ranks > 1 and len(self.draw)):
            ends = np.cumsum([deal.share(chips, rank) for rank in range(ranks)])
            return np.searchsorted(ends, number, side="right")
        # Counted off from rank to rank through all shards, so that shares are equal; inside a shard, chips of one rank
        # are then put together, so that they can be read together. Which rank begins a shard is drawn.
        first = np.flatnonzero(np.diff(self.shard, prepend=-1))
        sizes = np.diff(np.append(first, chips))
        turn = (number - np.repeat((self.draw[first] * ranks).astype(np.int64), sizes)) % ranks
        owner = number % ranks
        if not deal.pad:
            owner[chips - chips % ranks :] = turn[chips - chips % ranks :] = ranks
        return owner[np.lexsort((turn, np.repeat(first, sizes)))]


def _spans(shards: int, mixed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return from when to when chips of each shard come, where so many shards are mixed at any time.

    In the middle, shard p comes from p - mixed + 1 to p + 1. At the start and the end spans are cut off, and so are
    dense: from the first chip to the last one, as many shards are mixed, and never more.
    """
    place = np.arange(shards, dtype=np.float64)
    end = max(1.0, shards - mixed + 1.0)
    return np.maximum(0.0, place - mixed + 1), np.minimum(place + 1, end)
