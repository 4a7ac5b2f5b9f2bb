"""Epochs go on with other ranks and batches, are mixed from end to end, and have chips as often as weights say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rasteret_dask.errors import PlanError
from rasteret_dask.streams.deals import Deal
from rasteret_dask.streams.epochs import BatchOrder, Begun
from rasteret_dask.streams.weights import Weights

Chip = tuple[int, int]

LAW = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def chips_of(order: BatchOrder, begun: Begun, until: int | None = None) -> list[list[Chip]]:
    """Return the chips of each batch, padded ones left out."""
    found = order.epoch(begun.epoch, 0, begun, until)
    result = []
    for batch in found.batches:
        at = [
            (place, (found.visits[visit].shard, row))
            for visit, part, places in batch.parts
            for place, row in zip(places.tolist(), found.visits[visit].rows[part].tolist(), strict=True)
        ]
        result.append([chip for place, chip in sorted(at) if not batch.padded[place]])
    return result


@st.composite
def runs(draw: Any) -> tuple[BatchOrder, list[tuple[BatchOrder, int]]]:
    """Return shards, and in turn: how they are dealt, and how many batches of all that are left are taken."""
    sizes = tuple(draw(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)))
    whole = BatchOrder(sizes, 1, draw(st.sampled_from([None, 3, 2**33])), parts=draw(st.booleans()))
    if whole.seed is not None and draw(st.booleans()):
        numbers = draw(st.lists(st.integers(0, 3), min_size=whole.chips, max_size=whole.chips).filter(any))
        whole = replace(whole, weights=Weights(np.array(numbers), "test"))
    worlds = draw(st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 5)),
        min_size=1, max_size=4,
    ))  # fmt: skip
    parts = []
    for world, size, buffer, pad, taken in worlds:
        try:
            order = replace(whole, world_size=world, batch_size=size, buffer=buffer, pad=pad)
        except PlanError:
            assume(False)
            raise
        parts.append((order, taken))
    return whole, parts


@LAW
@given(runs(), st.integers(0, 3))
def test_ranks_of_any_number_go_on_and_nobody_comes_twice_or_never(
    run: tuple[BatchOrder, list[tuple[BatchOrder, int]]], epoch: int
) -> None:
    """A job that is stopped, and started on other machines, over and over: its state is all that it takes along."""
    whole, parts = run
    wanted = Counter(chip for batch in chips_of(whole, Begun(epoch)) for chip in batch)
    assert sum(wanted.values()) == whole.chips
    found: Counter[Chip] = Counter()
    begun, deals = Begun(epoch), list[dict[str, Any]]()
    for number, (order, some) in enumerate(parts):
        begun = order.begun(epoch, begun.batch, tuple(map(Deal.of, json.loads(json.dumps(deals)))))
        left = order.left(begun)
        taken = left if number == len(parts) - 1 else min(some, left)
        for rank in range(order.world_size):
            own = chips_of(replace(order, rank=rank), begun, taken)
            assert len(own) == taken
            found.update(chip for batch in own for chip in batch)
        deals = [deal.note for deal in order.taken(begun, taken)]
        begun = replace(begun, batch=begun.batch + taken)
        left_out = order.chips - sum(found.values())
    assert not found - wanted
    assert left_out == 0 if parts[-1][0].pad else left_out < parts[-1][0].world_size


@LAW
@given(runs(), st.integers(0, 2), st.data())
def test_a_batch_size_of_its_own_does_not_change_the_order(
    run: tuple[BatchOrder, list[tuple[BatchOrder, int]]], epoch: int, data: Any
) -> None:
    """Ranks of the same number take the very same chips in turn, however many to a batch."""
    order, _ = run[1][0]
    assume(order.chips >= order.world_size)
    order = replace(order, pad=False)
    assume(order.batches)
    taken = data.draw(st.integers(0, order.batches - 1))
    other = replace(order, batch_size=data.draw(st.integers(1, 9)))
    begun = other.begun(epoch, taken, order.taken(Begun(epoch), taken))
    flat = [chip for batch in chips_of(order, Begun(epoch)) for chip in batch]
    rest = [chip for batch in chips_of(other, begun) for chip in batch]
    assert rest == flat[taken * order.batch_size :]


def by_counting(order: BatchOrder, epoch: int, rank: int) -> list[Chip]:
    """Return a rank's chips as the rules tell them: chip by chip, in no hurry."""

    def draws(n: int, kind: int) -> list[float]:
        assert order.seed is not None
        bits = np.random.PCG64(np.random.SeedSequence((order.seed, epoch, kind))).random_raw(n)
        return [(int(one) >> 11) * 2.0**-53 for one in np.asarray(bits)]

    draw = iter(draws(order.chips, 1))
    shards = [[(next(draw), (shard, row)) for row in range(n)] for shard, n in enumerate(order.sizes)]
    by_draw = sorted(range(len(shards)), key=draws(len(shards), 0).__getitem__)
    ranks, own, number = order.world_size, list[list[tuple[float, Chip]]](), 0
    left_out = 0 if order.pad else order.chips % ranks
    for shard in (shards[at] for at in by_draw if shards[at]):
        starter = int(shard[0][0] * ranks)
        places = range(number, number + len(shard))
        number += len(shard)
        # who counts which place; the last places of all are nobody's
        owners = sorted(
            ((place - starter) % ranks, place % ranks) if place < order.chips - left_out else (ranks, ranks)
            for place in places
        )
        mine = [chip for chip, (_, owner) in zip(shard, owners, strict=True) if owner == rank]
        own += [mine] if mine else []
    mixed = order.buffer * ranks
    end = max(1, len(own) - mixed + 1)
    keys = [
        (max(0, at - mixed + 1) + (min(at + 1, end) - max(0, at - mixed + 1)) * draw, at, chip)
        for at, mine in enumerate(own)
        for draw, chip in mine
    ]
    return [chip for _, _, chip in sorted(keys)]


@settings(LAW, max_examples=25)
@given(runs(), st.integers(0, 2), st.data())
def test_parts_of_shards_are_dealt_as_the_rules_say(
    run: tuple[BatchOrder, list[tuple[BatchOrder, int]]], epoch: int, data: Any
) -> None:
    order = replace(run[1][0][0], parts=True, weights=None, seed=data.draw(st.integers(0, 9)))
    assume(order.chips >= order.world_size > 1)
    for rank in range(order.world_size):
        flat = [chip for batch in chips_of(replace(order, rank=rank), Begun(epoch)) for chip in batch]
        assert flat == by_counting(order, epoch, rank)


def test_the_order_of_ranks_and_weights_is_the_same_for_ever() -> None:
    """What a state of last year names must still be so: these were written down once."""
    ranks = BatchOrder((3, 2, 4), 2, seed=42, buffer=1, world_size=2, parts=True)
    assert [chips_of(replace(ranks, rank=rank, pad=True), Begun(1)) for rank in (0, 1)] == [
        [[(1, 0), (2, 3)], [(0, 1), (2, 2)], [(0, 2)]],
        [[(2, 1), (1, 1)], [(2, 0), (0, 0)], []],
    ]
    deals = ranks.taken(Begun(1), 1)
    more = replace(ranks, world_size=3, batch_size=1)
    left = [chips_of(replace(more, rank=rank), more.begun(1, 1, deals)) for rank in range(3)]
    assert left == [[[(2, 0)]], [[(2, 2)]], [[(0, 0)]]]
    weights = Weights(np.array([1, 0, 2, 3, 0, 0, 1, 1, 1]), "test")
    assert chips_of(BatchOrder((3, 2, 4), 3, seed=42, weights=weights), Begun(1)) == [
        [(2, 1), (1, 0), (0, 2)], [(0, 0), (2, 3), (1, 0)], [(0, 2), (1, 0), (2, 2)],
    ]  # fmt: skip


# Mixing


def mixed(order: BatchOrder) -> list[float]:
    """Return the mean number of shards in a batch: in the first tenth of an epoch, its middle, and its last tenth."""
    counts = []
    for rank in range(order.world_size):
        batches = replace(order, rank=rank).epoch(0).batches
        counts.append([len(batch.parts) for batch in batches if batch.size == order.batch_size])
    ranks = np.array(counts)
    tenth = max(1, ranks.shape[1] // 10)
    return [float(some.mean()) for some in (ranks[:, :tenth], ranks[:, tenth:-tenth], ranks[:, -tenth:])]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("size", [64, 128, 160])
def test_the_ends_of_an_epoch_are_as_mixed_as_its_middle(ranks: int, size: int, parts: bool) -> None:
    begin, middle, end = mixed(BatchOrder((size,) * 20, 32, seed=1, world_size=ranks, parts=parts))
    assert min(begin, end) >= 0.8 * middle
    if parts and ranks > 1:  # each rank has a part of all shards
        assert middle > 12


def test_eight_shards_on_eight_ranks_are_mixed() -> None:
    begin, middle, end = mixed(BatchOrder((128,) * 8, 32, seed=1, world_size=8, parts=True))
    assert min(begin, middle, end) > 7


@pytest.mark.parametrize(("ranks", "parts"), [(1, False), (1, True), (8, True), (3, True), (2, False)])
def test_a_rank_holds_as_many_chips_as_a_buffer_of_shards(ranks: int, parts: bool) -> None:
    """And one more shard, or part of one, where one ends and the next begins in the same batch."""
    size, batch, buffer = 96, 8, 4
    for rank in range(ranks):
        epoch = BatchOrder((size,) * 24, batch, seed=5, rank=rank, world_size=ranks, parts=parts).epoch(1)
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, one in enumerate(epoch.batches):
            for visit, _, _ in one.parts:
                first.setdefault(visit, number)
                last[visit] = number
        chips = {at: sum(map(len, visit.rows)) for at, visit in enumerate(epoch.visits)}
        held = [
            sum(chips[v] for v in first if first[v] <= number <= last[v])
            for number in range(len(epoch.batches))
        ]
        assert max(held) <= buffer * size + (size // ranks if parts else size)


def test_parts_of_a_shard_are_neighbours_in_it() -> None:
    order = BatchOrder((50, 7, 64, 3, 1, 40), 4, seed=2, world_size=5, parts=True)
    for rank in range(5):
        for visit in replace(order, rank=rank).epoch(3).visits:
            rows = np.sort(np.concatenate(visit.rows))
            assert rows.tolist() == list(range(rows[0], rows[-1] + 1))


# Weights


@LAW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any), st.integers(0, 2**53 - 1))
def test_chips_come_as_often_as_their_weights_say(numbers: list[int], draw: int) -> None:
    counts = Weights(np.array(numbers), "test").counts(draw * 2.0**-53)
    assert counts.sum() == len(numbers)
    for count, weight in zip(counts.tolist(), numbers, strict=True):
        exact = Fraction(weight * len(numbers), sum(numbers))
        assert abs(count - exact) < 1 + Fraction(1, 10**9)
        assert weight or not count


def test_the_mean_over_epochs_is_the_weights_own() -> None:
    numbers = np.array([0.1, 2.0, 0.7, 0.0, 5.2] * 8)
    order = BatchOrder((20, 20), 40, seed=4, weights=Weights(numbers, "test"))
    found = Counter(
        20 * shard + row
        for epoch in range(400)
        for batch in chips_of(order, Begun(epoch))
        for shard, row in batch
    )
    means = np.array([found[chip] / 400 for chip in range(40)])
    np.testing.assert_allclose(means, numbers / numbers.sum() * 40, atol=0.1)


def test_copies_are_counted() -> None:
    order = BatchOrder((3, 5), 8, seed=4, weights=Weights(np.array([6, 0, 0, 0, 0, 2, 0, 0]), "test"))
    (batch,) = order.epoch(0).batches
    by_chip = {visit: sorted(batch.copies[places].tolist()) for visit, _, places in batch.parts}
    assert sorted(by_chip.values()) == [[0, 1], [0, 1, 2, 3, 4, 5]]


def column_of(**columns: Any) -> Any:
    table = pa.table(columns)
    return lambda name: table.column(name)


@pytest.mark.parametrize("classes", [["a", "b", "a", "a"], [True, False, True, True], [3, 1, 3, 3]])
def test_classes_in_balance_come_equally_often(classes: list[Any]) -> None:
    for column in (pa.array(classes), pa.array(classes).dictionary_encode()):
        weights = Weights.of(None, "crop", 4, column_of(crop=column))
        assert weights is not None
        assert weights.values.tolist() == [1 / 3, 1, 1 / 3, 1 / 3]
        assert weights.counts(0.5).tolist()[1] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([1, -1, 1, 1], None), "1 negative weights, the first of chip 1: -1"),
        (([1, float("nan"), 1, 1], None), "not finite"),
        (([1, 1, 1, float("inf")], None), "not finite"),
        (([0, 0, 0, 0], None), "all 0"),
        (([1, 1], None), "2 weights.*each of the 4 chips"),
        ((np.ones((4, 1)), None), "shape"),
        ((["a"] * 4, None), "a number for each chip"),
        (("area", None), "1 nulls in 4 chips"),
        (("crop", None), "a column of string.*numbers"),
        ((None, "area"), "a column of double.*classes"),
        ((None, "farm"), "1 nulls in 4 chips.*filter"),
        ((None, "tags"), "a column of list"),
        ((None, 7), "name of a column"),
        (([1, 1, 1, 1], "crop"), "both"),
    ],
)
def test_weights_that_cannot_be_are_refused(arguments: tuple[Any, Any], told: str) -> None:
    column = column_of(
        crop=["a", "b", "a", "a"], farm=["x", None, "y", "y"], area=[1.0, None, 2.0, 3.0], tags=[["p"]] * 4
    )
    with pytest.raises(PlanError, match=told):
        Weights.of(*arguments, 4, column)
