# SPDX-License-Identifier: Apache-2.0
"""Split cells dealt by what they hold: laws over drawn cells, counted by plain loops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rasteret_dask.chipping.dealing import Stock, deal, kept_amounts, spread

SHARES = np.array([0.7, 0.15, 0.15])
LAWS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def worst(
    groups: Sequence[tuple[int, NDArray[Any]]], split: Sequence[int], shares: NDArray[np.float64]
) -> float:
    """Return the largest deviation of any split, in plain loops: of a class's share in it, or of its size."""
    classes = len(groups[0][1])
    whole = [sum(float(amounts[c]) for _, amounts in groups) for c in range(classes)]
    kept = [[0.0] * classes for _ in shares]
    for cell, amounts in groups:
        for c in range(classes):
            kept[split[cell]][c] += float(amounts[c])
    result = 0.0
    for s, share in enumerate(shares):
        if share > 0:
            size = sum(kept[s])
            if not size:
                return 1.0
            result = max(result, abs(size / sum(map(sum, kept)) - share))
            for c in range(classes):
                result = max(result, abs(kept[s][c] / size - whole[c] / sum(whole)))
    return result


def points(seed: int, cells: int = 60, count: int = 500, classes: int = 6) -> NDArray[np.int64]:
    """Draw points whose classes and numbers differ from cell to cell, as crops do; shape (cell, class)."""
    rng = np.random.default_rng(seed)
    mix, size = rng.dirichlet(np.full(classes, 0.5), size=cells), rng.dirichlet(np.full(cells, 2.0))
    amounts = np.zeros((cells, classes), dtype=np.int64)
    for cell in rng.choice(cells, size=count, p=size):
        amounts[cell, rng.choice(classes, p=mix[cell])] += 1
    return amounts


def more(seed: int, amounts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Draw further points where there are some, of the classes that are there."""
    rng = np.random.default_rng(seed)
    places = rng.choice(amounts.size, size=count, p=amounts.ravel() / amounts.sum())
    return amounts + np.bincount(places, minlength=amounts.size).reshape(amounts.shape)


@pytest.mark.parametrize("seed", range(6))
def test_shares_hold_within_two_points_and_four_when_points_are_added(seed: int) -> None:
    amounts, unit = points(seed), np.random.default_rng(seed + 100).random(60)
    split = deal(Stock.of_cells(amounts), SHARES, unit)
    assert worst(list(enumerate(amounts)), split.tolist(), SHARES) <= 0.02
    grown = np.concatenate([more(seed, amounts, 45), points(seed + 50, cells=3, count=5)])
    before = np.concatenate([split, [-1, -1, -1]])
    later = deal(Stock.of_cells(grown), SHARES, np.append(unit, [0.1, 0.5, 0.9]), before)
    assert later[:60].tolist() == split.tolist()
    assert worst(list(enumerate(grown)), later.tolist(), SHARES) <= 0.04


def test_a_hash_alone_is_far_from_it() -> None:
    off = []
    for seed in range(6):
        hashed = np.searchsorted([0.7, 0.85], np.random.default_rng(seed + 100).random(60), side="right")
        off.append(worst(list(enumerate(points(seed))), hashed.tolist(), SHARES))
    assert min(off) > 0.05


@st.composite
def stocks(draw: st.DrawFn) -> tuple[Stock, NDArray[np.float64], NDArray[np.float64]]:
    """Draw cells, some chips that lie on several or near others, and shares."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    splits, classes, cells = draw(st.integers(2, 4)), draw(st.integers(1, 5)), draw(st.integers(4, 24))
    several = draw(st.integers(0, 12))
    amounts = rng.integers(0, 9, (cells + several, classes)) * rng.integers(0, 2, (cells + several, 1))
    amounts[:cells, 0] += 1
    group = [np.arange(cells)]
    cell, near = [np.arange(cells)], [np.zeros(cells, dtype=bool)]
    for number in range(several):
        count = int(rng.integers(1, min(4, cells)))
        group.append(np.full(count, cells + number))
        cell.append(rng.choice(cells, count, replace=False))
        near.append(np.arange(count) >= rng.integers(1, count + 1))
    shares = rng.dirichlet(np.full(splits, 3.0))
    scale = np.pi if draw(st.booleans()) else 1.0  # areas
    return (
        Stock(amounts * scale, np.concatenate(group), np.concatenate(cell), np.concatenate(near)),
        shares,
        rng.random(cells),
    )


def kept_by_loops(stock: Stock, split: NDArray[np.int64], splits: int) -> NDArray[np.float64]:
    result = np.zeros((splits, stock.amounts.shape[1]))
    for group in range(len(stock.amounts)):
        links = [n for n in range(len(stock.group)) if stock.group[n] == group]
        own = {int(split[stock.cell[n]]) for n in links if not stock.near[n]}
        beside = {int(split[stock.cell[n]]) for n in links if stock.near[n]}
        if len(own) == 1 and (0 in own or 0 not in beside):
            result[own.pop()] += stock.amounts[group]
    return result


@LAWS
@given(stocks())
def test_never_worse_than_hashing_alone(
    drawn: tuple[Stock, NDArray[np.float64], NDArray[np.float64]],
) -> None:
    stock, shares, unit = drawn
    split = deal(stock, shares, unit)
    assert split.min() >= 0
    assert split.max() < len(shares)
    hashed = np.minimum(np.searchsorted(np.cumsum(shares), unit, side="right"), len(shares) - 1)
    whole = stock.amounts.sum(axis=0)
    ours, theirs = (kept_by_loops(stock, one, len(shares)) for one in (split, hashed))
    np.testing.assert_allclose(kept_amounts(stock, split, len(shares)), ours)
    assert spread(ours, whole, shares) <= spread(theirs, whole, shares) + 1e-5  # amounts were rounded


@LAWS
@given(stocks(), st.randoms(use_true_random=False))
def test_order_of_cells_and_classes_does_not_matter(
    drawn: tuple[Stock, NDArray[np.float64], NDArray[np.float64]], random: Any
) -> None:
    stock, shares, unit = drawn
    cells, classes = len(unit), stock.amounts.shape[1]
    place, column = list(range(cells)), list(range(classes))
    random.shuffle(place)
    random.shuffle(column)
    new = np.argsort(place)  # old cell -> new cell
    moved = Stock(stock.amounts[:, column], stock.group, new[stock.cell], stock.near)
    assert deal(moved, shares, unit[place])[new].tolist() == deal(stock, shares, unit).tolist()


@LAWS
@given(stocks(), st.data())
def test_a_cell_that_has_a_split_keeps_it(
    drawn: tuple[Stock, NDArray[np.float64], NDArray[np.float64]], data: st.DataObject
) -> None:
    stock, shares, unit = drawn
    cells = len(unit)
    before = np.array(data.draw(st.lists(st.integers(-1, len(shares) - 1), min_size=cells, max_size=cells)))
    split = deal(stock, shares, unit, before)
    assert (split[before >= 0] == before[before >= 0]).all()
    assert split.min() >= 0
    again = deal(stock, shares, unit, split)
    assert again.tolist() == split.tolist()  # nothing is left to deal


def test_every_split_gets_a_cell_where_cells_are_large() -> None:
    split = deal(Stock.of_cells(np.full((3, 1), 10)), SHARES, np.array([0.1, 0.2, 0.3]))
    assert sorted(split.tolist()) == [0, 1, 2]
    split = deal(Stock.of_cells(np.array([[1000], [1], [1], [1]])), SHARES, np.array([0.1, 0.2, 0.3, 0.4]))
    assert set(split.tolist()) == {0, 1, 2}


def test_a_split_that_wants_nothing_gets_nothing() -> None:
    split = deal(Stock.of_cells(points(3)), np.array([0.5, 0.0, 0.5]), np.random.default_rng(1).random(60))
    assert set(split.tolist()) == {0, 2}


def test_a_rare_class_is_shared_out() -> None:
    """Six points of 600, each in another cell: the shares of a split hardly show them."""
    amounts = np.concatenate([np.full((60, 1), 10), np.zeros((60, 1), dtype=np.int64)], axis=1)
    amounts[::10, 1] = 1
    kept = kept_amounts(
        stock := Stock.of_cells(amounts),
        deal(stock, np.array([0.5, 0.25, 0.25]), np.random.default_rng(2).random(60)),
        3,
    )
    assert kept[:, 1].tolist() in ([3, 2, 1], [3, 1, 2], [2, 2, 2])


def test_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import numpy as np\n"
        "from test_dealing import SHARES, points\n"
        "from rasteret_dask.chipping.dealing import Stock, deal\n"
        "print(*deal(Stock.of_cells(points(9)), SHARES, np.random.default_rng(9).random(60)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = deal(Stock.of_cells(points(9)), SHARES, np.random.default_rng(9).random(60))
    assert done.stdout.split() == [str(number) for number in here.tolist()]


def test_many_cells_take_one_deal() -> None:
    amounts = points(1, cells=4000, count=40_000)
    split = deal(Stock.of_cells(amounts), SHARES, np.random.default_rng(4).random(4000))
    assert worst(list(enumerate(amounts)), split.tolist(), SHARES) <= 0.002
