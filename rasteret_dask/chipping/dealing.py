# SPDX-License-Identifier: Apache-2.0
"""Split cells are dealt to splits so that each split gets its share of every class.

Cells go to splits greedily, the largest first; then single cells move and pairs of cells change places as long as that
brings the shares nearer to what is wanted. All sums are of integers, so that no order of rows or classes, no number of
threads and no processor changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stock", "deal", "kept_amounts", "spread"]

Numbers: TypeAlias = "NDArray[np.int64]"

TOTAL = 2**20
"""What amounts add up to once they are integers."""

RARE = 0.01
"""Weight of a class's own shares beside its shares of a split: a rare class is shared out too."""

LEAST_SHARE = 0.02
"""Deviations of a split that wants less than this share weigh as if it wanted so much."""

FEW_CELLS = 256
"""So many cells are dealt again and again, for the best deal; of more, one deal is good enough."""

KICKS = 64
"""How often few cells are dealt anew, at most."""

GOOD = 0.01
"""Deviation (see :func:`spread`) at which few cells are not dealt anew."""

SWAPPED = 384
"""Cells that may change places, the smallest ones where there are more."""

LINKED = 32
"""Changes that are counted chip by chip before none is made, where chips lie on several cells."""

CHANGES = 2000
"""Changes after the first deal, at most."""

LOOKED = 20_000_000
"""Cells that are looked at for changes, all together: of many cells, the first deal is near enough."""

ENOUGH = 5e-4
"""Deviation of a class, as share of a split, at which nothing more is changed."""


@dataclass(frozen=True)
class Stock:
    """What split cells hold: groups of chips, with an amount of each class.

    A group is in a split where all cells that it lies on are, and no cell of train is near; else it is in none.
    """

    amounts: NDArray[Any]
    """Shape (group, class). 0 or more: counts, pixels, square metres."""
    group: Numbers
    """Shape (link,), rising. The group of each pair of a group and a cell."""
    cell: Numbers
    """Shape (link,). The pair's cell; a group's first one is where most of it lies."""
    near: NDArray[np.bool_]
    """Shape (link,). True: the group lies near the cell, closer than a buffer, and not on it."""
    guarded: int = 0
    """The split that near cells must not have, where the group is in another one: train."""

    @classmethod
    def of_cells(cls, amounts: NDArray[Any]) -> Stock:
        """Return the stock of cells whose chips lie on no other cell; ``amounts`` has shape (cell, class)."""
        number = np.arange(len(amounts), dtype=np.int64)
        return cls(np.asarray(amounts), number, number, np.zeros(len(amounts), dtype=bool))

    @cached_property
    def linked(self) -> bool:
        """Whether any group lies on or near several cells."""
        return len(self.group) > len(self.amounts)

    @cached_property
    def home(self) -> Numbers:
        """Shape (group,). The cell where most of each group lies."""
        return self.cell[np.searchsorted(self.group, np.arange(len(self.amounts)))]

    @cached_property
    def _by_cell(self) -> tuple[Numbers, Numbers]:
        """The links in the order of their cells, and those cells."""
        order = np.argsort(self.cell, kind="stable")
        return order, self.cell[order]

    def around(self, cells: Sequence[int]) -> Stock:
        """Return the groups that lie on or near some cells, with all their links."""
        order, rising = self._by_cell
        begin, end = np.searchsorted(rising, cells), np.searchsorted(rising, cells, side="right")
        own = [self.group[order[a:b]] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        groups = np.unique(np.concatenate(own))
        first, last = np.searchsorted(self.group, groups), np.searchsorted(self.group, groups, side="right")
        count = last - first
        number = np.repeat(np.arange(len(groups)), count)
        links = np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(number))
        return Stock(self.amounts[groups], number, self.cell[links], self.near[links], self.guarded)

    def in_splits(self, split: Numbers) -> Numbers:
        """Return the split of each group, -1 for none, where ``split`` is that of each cell."""
        own = np.flatnonzero(~self.near)
        begin = np.searchsorted(self.group[own], np.arange(len(self.amounts)))
        if not len(begin):
            return np.zeros(0, dtype=np.int64)
        low = np.minimum.reduceat(split[self.cell[own]], begin)
        high = np.maximum.reduceat(split[self.cell[own]], begin)
        result = np.where(low == high, low, -1)
        beside = self.group[self.near & (split[self.cell] == self.guarded)]
        result[beside[result[beside] != self.guarded]] = -1
        return np.asarray(result, dtype=np.int64)


def kept_amounts(stock: Stock, split: Numbers, splits: int) -> NDArray[Any]:
    """Return how much of each class is in each split, shape (split, class).

    Parameters
    ----------
    stock
        What the cells hold.
    split
        Shape (cell,). Each cell's split.
    splits
        How many splits there are.
    """
    number = stock.in_splits(split)
    result = np.zeros((splits, stock.amounts.shape[1]), dtype=stock.amounts.dtype)
    np.add.at(result, number[number >= 0], stock.amounts[number >= 0])
    return result


def spread(kept: NDArray[Any], whole: NDArray[Any], shares: NDArray[np.float64]) -> float:
    """Return the largest deviation of any split from what is wanted: of a class's share in it, or of its own size.

    Parameters
    ----------
    kept
        Shape (split, class). What each split has.
    whole
        Shape (class,). What there is of each class.
    shares
        Shape (split,). Wanted share of each split; those that want nothing are left out.
    """
    size, total, all_kept = kept.sum(axis=1), whole.sum(), kept.sum()
    worst = 0.0
    for at in np.flatnonzero(shares > 0).tolist():
        if not size[at]:
            return 1.0
        classes = float(np.abs(kept[at] / size[at] - whole / total).max())
        worst = max(worst, classes, abs(float(size[at] / all_kept) - float(shares[at])))
    return worst


def deal(
    stock: Stock, shares: NDArray[np.float64], unit: NDArray[np.float64], before: Numbers | None = None
) -> Numbers:
    """Return the split of each cell, so that classes are in every split as they are in the whole.

    Parameters
    ----------
    stock
        What the cells hold.
    shares
        Shape (split,). Wanted share of each split; they sum to 1. A split that wants nothing gets nothing.
    unit
        Shape (cell,). A number in [0, 1) of each cell, all different, that follows from the cell and a seed: the
        split that a hash alone would give, and the order of cells that hold equal amounts.
    before
        Shape (cell,). The split that a cell has already, which it keeps, and -1 for none; None: no cell has one.

    Returns
    -------
    NDArray
        Never further from what is wanted (:func:`spread`) than the splits that ``unit`` alone gives.
    """
    fixed = np.full(len(unit), -1, dtype=np.int64) if before is None else np.asarray(before, dtype=np.int64)
    table = _Table.of(stock, shares, unit, fixed)
    if not table.free.any():
        return fixed
    by_hash = np.where(table.free, _chosen(unit, shares), fixed)
    results = [table.improved(table.greedy()), table.improved(by_hash), by_hash]
    keys = [table.key(result) for result in results]
    best = results[keys.index(min(keys))]
    return table.again(best) if len(unit) <= FEW_CELLS else best


def _chosen(unit: NDArray[np.float64], shares: NDArray[np.float64]) -> Numbers:
    edges = np.cumsum(shares)
    edges[-1] = np.inf
    return np.asarray(np.searchsorted(edges, unit, side="right"), dtype=np.int64)


@dataclass(frozen=True)
class _Table:
    """Cells, what they hold as integers, and what splits want."""

    stock: Stock
    """Amounts as integers that add up to about TOTAL."""
    shares: NDArray[np.float64]
    unit: NDArray[np.float64]
    free: NDArray[np.bool_]
    fixed: Numbers
    held: Numbers
    """Shape (cell, class). What each cell is the home of."""
    wanted: Numbers
    """Shape (split, class)."""
    weight: Numbers
    """Shape (split, class). What the square of a deviation costs."""

    @classmethod
    def of(
        cls, stock: Stock, shares: NDArray[np.float64], unit: NDArray[np.float64], fixed: Numbers
    ) -> _Table:
        amounts = _whole_numbers(stock.amounts)
        whole = amounts.sum(axis=0)
        total = max(int(whole.sum()), 1)
        wanted = np.rint(shares[:, None] * whole).astype(np.int64)
        # In units in which a deviation of a whole split costs 128 * TOTAL**2: sums stay below 2**62.
        unit_cost = 128.0 * float(total) ** 2
        of_split = unit_cost / (np.maximum(shares, LEAST_SHARE) * total) ** 2
        of_class = RARE * unit_cost / np.maximum(whole, 1).astype(np.float64) ** 2
        weight = np.rint(of_split[:, None] + of_class).astype(np.int64)
        held = np.zeros((len(unit), amounts.shape[1]), dtype=np.int64)
        np.add.at(held, stock.home, amounts)
        own = Stock(amounts, stock.group, stock.cell, stock.near, stock.guarded)
        return cls(own, shares, unit, fixed < 0, fixed, held, wanted, weight)

    @property
    def takers(self) -> Numbers:
        """The splits that want something."""
        return np.flatnonzero(self.shares > 0)

    def again(self, split: Numbers) -> Numbers:
        """Deal few cells anew, by what a part of them had before, and return the best deal."""
        best = self.key(split)
        cells = np.flatnonzero(self.free)
        for number in range(KICKS):
            if best[0] <= GOOD:
                break
            rank = np.modf(self.unit[cells] * (2 * number + 3) * 7919.0)[0]  # another order of the same hash
            some = cells[np.lexsort((self.unit[cells], rank))][: max(3, len(cells) // 8)]
            kicked = split.copy()
            kicked[some] = np.roll(split[some], 1)
            result = self.improved(kicked)
            if (key := self.key(result)) < best:
                split, best = result, key
        return split

    def greedy(self) -> Numbers:
        """Give each cell in turn, the largest first, to the split that it brings nearest to what is wanted."""
        order = self._ranked(np.flatnonzero(self.free))
        split = self.fixed.copy()
        off = -self.wanted.copy()
        np.add.at(off, split[~self.free], self.held[~self.free])
        takers = self.takers
        for cell in order.tolist():
            own = self.held[cell]
            cost = (self.weight[takers] * own * (2 * off[takers] + own)).sum(axis=1)
            to = int(takers[int(np.argmin(cost))])
            split[cell] = to
            off[to] += own
        for to in takers.tolist():  # even where cells are so large that none is better
            if not np.any(split == to):
                count = np.bincount(split, minlength=len(self.shares))
                spare = [c for c in order.tolist()[::-1] if count[split[c]] > 1]
                if spare:
                    split[spare[0]] = to
        return split

    def improved(self, split: Numbers) -> Numbers:
        """Move cells and let them change places as long as that lowers the cost."""
        split = split.copy()
        kept = kept_amounts(self.stock, split, len(self.shares))
        cost = self.cost(kept)
        for _ in range(min(CHANGES, LOOKED // len(self.unit))):
            off = kept - self.wanted
            size = np.maximum(self.shares * self.wanted.sum(), 1.0)
            if np.all(np.abs(off[self.takers]).max(axis=1) <= ENOUGH * size[self.takers]):
                break
            for cells, to in self._changes(split, off):
                changed = split.copy()
                changed[cells] = to
                after = kept + self._difference(cells, split, changed)
                if (less := self.cost(after)) < cost:
                    split, kept, cost = changed, after, less
                    break
            else:
                break
        return split

    def _difference(self, cells: Sequence[int], before: Numbers, after: Numbers) -> Numbers:
        """Return what splits have more after some cells changed, shape (split, class)."""
        some, splits = self.stock.around(cells), len(self.shares)
        more = kept_amounts(some, after, splits) - kept_amounts(some, before, splits)
        return np.asarray(more, dtype=np.int64)

    def _changes(self, split: Numbers, off: Numbers) -> Iterator[tuple[list[int], list[int]]]:
        """Yield changes, the most promising first, as cells and their new splits; one, where that is the best."""
        deltas, changes = [], []
        for delta, cells, to in (*self._moves(split, off), *self._swaps(split, off)):
            few = np.argsort(delta, kind="stable")[: LINKED if self.stock.linked else 1]
            deltas.append(delta[few])
            changes += [(cells[at].tolist(), to[at].tolist()) for at in few]
        order = np.argsort(np.concatenate([*deltas, np.zeros(0, dtype=np.int64)]), kind="stable")
        for at in order[: LINKED if self.stock.linked else 1].tolist():
            yield changes[at]

    def _gain(self, off: Numbers) -> tuple[Numbers, Numbers]:
        """Return per cell and split the linear and the square part of what it costs to add the cell."""
        return 2 * (self.held @ (self.weight * off).T), self.held**2 @ self.weight.T

    def _moves(self, split: Numbers, off: Numbers) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Yield what it costs to move each free cell to each other split: cost, cell and split of each."""
        line, square = self._gain(off)
        alone = np.bincount(split[split >= 0], minlength=len(self.shares))[split] <= 1
        cells = self._ranked(np.flatnonzero(self.free & ~alone))
        own = split[cells]
        leave = square[cells, own] - line[cells, own]
        for to in self.takers.tolist():
            others = own != to
            some = cells[others]
            delta = leave[others] + line[some, to] + square[some, to]
            yield delta, some[:, None], np.full((len(some), 1), to, dtype=np.int64)

    def _swaps(self, split: Numbers, off: Numbers) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Yield what it costs to let two free cells of two splits change places."""
        line, _ = self._gain(off)
        cells = self._ranked(np.flatnonzero(self.free))[-SWAPPED:]
        for number, one in enumerate(self.takers.tolist()):
            for two in self.takers[number + 1 :].tolist():
                a, b = cells[split[cells] == one], cells[split[cells] == two]
                if not len(a) or not len(b):
                    continue
                both = self.weight[one] + self.weight[two]
                rise = line[:, one] - line[:, two]  # of what comes into ``one`` and leaves ``two``
                square = self.held**2 @ both
                delta = (
                    (rise[b] + square[b])[None, :]
                    + (square[a] - rise[a])[:, None]
                    - 2 * ((self.held[a] * both) @ self.held[b].T)
                )
                most = LINKED if self.stock.linked else 1
                few = np.argsort(delta, axis=None, kind="stable")[:most]
                at, other = np.unravel_index(few, delta.shape)
                pairs = np.stack([a[at], b[other]], -1)
                yield delta[at, other], pairs, np.tile(np.array([two, one]), (len(pairs), 1))

    def _ranked(self, cells: Numbers) -> Numbers:
        """Return cells in an order that follows from what they are, not from where they stand: the largest first."""
        order = np.lexsort((self.unit[cells], -self.held[cells].sum(axis=1)))
        return np.asarray(cells[order], dtype=np.int64)

    def cost(self, kept: Numbers) -> int:
        """Return how far splits are from what they want; far more than anything else where one has nothing."""
        empty = int(np.sum(kept[self.takers].sum(axis=1) == 0))
        return int((self.weight * (kept - self.wanted) ** 2).sum()) + (empty << 62)

    def key(self, split: Numbers) -> tuple[float, int]:
        """Return what deals are ordered by."""
        kept = kept_amounts(self.stock, split, len(self.shares))
        return spread(kept, self.stock.amounts.sum(axis=0), self.shares), self.cost(kept)


def _whole_numbers(amounts: NDArray[Any]) -> Numbers:
    """Return amounts as integers that add up to about TOTAL; what is above 0 stays so."""
    total = math.fsum(sorted(amounts.ravel().tolist()))
    if total <= 0:
        return np.zeros(amounts.shape, dtype=np.int64)
    scale = TOTAL / total
    if scale >= 1 and np.array_equal(amounts, np.rint(amounts)):
        return np.asarray(amounts, dtype=np.int64) * int(scale)
    return np.ceil(amounts * scale - 1e-9).astype(np.int64)
