"""Which chip comes when: conservation laws of epochs, ranks and batches, over any sizes of shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rasteret_dask.errors import PlanError
from rasteret_dask.streams.epochs import BatchOrder

Chip = tuple[int, int]

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any).map(tuple)
SEEDS = st.one_of(st.none(), st.integers(0, 2**40))


@st.composite
def orders(draw: Any, /, **fixed: Any) -> BatchOrder:
    """Return an order that yields something; the parts of ``fixed`` are as they are given."""
    world = draw(st.integers(1, 5))
    pad = draw(st.booleans())
    drawn = {
        "sizes": draw(SIZES),
        "batch_size": draw(st.integers(1, 14)),
        "seed": draw(SEEDS),
        "drop_last": not pad and draw(st.booleans()),
        "rank": draw(st.integers(0, world - 1)),
        "world_size": world,
        "pad": pad,
        "buffer": draw(st.integers(1, 5)),
        "parts": draw(st.booleans()),
    }
    try:
        return BatchOrder(**{**drawn, **fixed})
    except PlanError:
        assume(False)
        raise


def batches(order: BatchOrder, epoch: int = 0, first: int = 0) -> list[list[tuple[Chip, bool]]]:
    """Return the chips of each batch, (shard, row), and whether they are padded; check the books on the way."""
    found = order.epoch(epoch, first)
    taken: Counter[tuple[int, int]] = Counter()
    result = []
    for batch in found.batches:
        chips: list[tuple[Chip, bool] | None] = [None] * batch.size
        for visit, part, places in batch.parts:
            assert visit < batch.visits
            taken[visit, part] += 1
            rows = found.visits[visit].rows[part]
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                assert chips[place] is None
                chips[place] = (found.visits[visit].shard, row), bool(batch.padded[place])
        result.append([chip for chip in chips if chip is not None])
        assert len(result[-1]) == batch.size
    # a part is taken once, and there is none that nobody takes: it would be read and held for ever
    assert set(taken.values()) <= {1}
    assert len(taken) == sum(len(v.rows) for v in found.visits)
    assert len({v.shard for v in found.visits}) == len(found.visits)
    return result


def ranks(order: BatchOrder, epoch: int = 0) -> list[list[list[tuple[Chip, bool]]]]:
    return [batches(replace(order, rank=rank), epoch) for rank in range(order.world_size)]


def every_chip(order: BatchOrder) -> list[Chip]:
    return [(shard, row) for shard, size in enumerate(order.sizes) for row in range(size)]


@LAW
@given(orders(), st.integers(0, 3))
def test_every_rank_has_the_same_number_of_batches_of_the_same_sizes(order: BatchOrder, epoch: int) -> None:
    sizes = [[len(batch) for batch in own] for own in ranks(order, epoch)]
    assert all(own == sizes[0] for own in sizes)
    assert len(sizes[0]) == order.batches >= 1
    assert all(n == order.batch_size for n in sizes[0][:-1])
    assert sizes[0][-1] == order.batch_size or not (order.drop_last or order.pad)


@LAW
@given(orders(), st.integers(0, 3))
def test_ranks_are_disjoint_and_no_chip_comes_twice(order: BatchOrder, epoch: int) -> None:
    found = Counter(
        chip for own in ranks(order, epoch) for batch in own for chip, padded in batch if not padded
    )
    assert set(found.values()) == {1}
    assert found.keys() <= set(every_chip(order))


@LAW
@given(orders(), st.integers(0, 3))
def test_what_is_left_out_is_less_than_a_batch_a_rank(order: BatchOrder, epoch: int) -> None:
    found = {chip for own in ranks(order, epoch) for batch in own for chip, padded in batch if not padded}
    left = order.chips - len(found)
    if order.pad:
        assert left == 0
    elif order.drop_last:
        assert left == order.chips - order.world_size * order.batch_size * order.batches
        assert left < order.world_size * (order.batch_size + 1)
    else:
        assert left == order.chips % order.world_size


@LAW
@given(orders(pad=True, drop_last=False))
def test_padded_chips_are_chips_of_the_rank_itself(order: BatchOrder) -> None:
    for own in ranks(order):
        real = {chip for batch in own for chip, padded in batch if not padded}
        repeated = [chip for batch in own for chip, padded in batch if padded]
        assert set(repeated) <= real or not real
        assert len(repeated) < 2 * order.batch_size or order.chips < order.world_size


@LAW
@given(orders(seed=None))
def test_without_a_seed_ranks_follow_each_other_in_the_order_of_the_chips(order: BatchOrder) -> None:
    found = [chip for own in ranks(order) for batch in own for chip, padded in batch if not padded]
    assert found == sorted(found)
    assert batches(order, 0) == batches(order, 7)
    if not order.drop_last:
        assert found == every_chip(order)[: len(found)]


@LAW
@given(orders(), st.integers(0, 2), st.data())
def test_from_any_batch_on_it_is_the_same_epoch(order: BatchOrder, epoch: int, data: Any) -> None:
    first = data.draw(st.integers(0, order.batches))
    assert batches(order, epoch, first) == batches(order, epoch)[first:]


@LAW
@given(orders(), st.integers(0, 2))
def test_no_more_than_a_buffer_of_shards_is_mixed(order: BatchOrder, epoch: int) -> None:
    """All chips of a shard leave before any of the shard that comes ``buffer`` later."""
    visits = [shard for b in batches(order, epoch) for (shard, _), padded in b if not padded]
    last = {shard: at for at, shard in enumerate(visits)}
    span = 1 if order.seed is None else order.buffer * (order.world_size if order.parts else 1)
    begun: set[int] = set()
    for at, shard in enumerate(visits):
        begun.add(shard)
        assert sum(last[one] >= at for one in begun) <= span


@LAW
@given(orders(seed=5, world_size=1, rank=0, pad=False, drop_last=False))
def test_seeds_and_epochs_shuffle_anew(order: BatchOrder) -> None:
    assume(order.chips >= 24)
    flat = [[chip for batch in batches(o, e) for chip, _ in batch] for o, e in
            [(order, 0), (order, 1), (replace(order, seed=6), 0)]]  # fmt: skip
    assert flat[0] != flat[1] != flat[2] != flat[0]
    assert sorted(flat[0]) == sorted(flat[1]) == sorted(flat[2])


def test_shuffled_chips_come_from_the_whole_buffer() -> None:
    order = BatchOrder((64,) * 40, 32, seed=3, buffer=4)
    found = order.epoch(0)
    mixed = [len({visit for visit, _, _ in batch.parts}) for batch in found.batches]
    assert min(mixed) >= 3
    assert max(mixed) <= 5
    within = [places for batch in found.batches[8:-8] for _, _, places in batch.parts]
    assert max(len(p) for p in within) < 24


def test_the_order_of_a_seed_is_the_same_for_ever() -> None:
    """What a state of last year names must still be so: these were written down once."""
    found = batches(BatchOrder((3, 2, 4), 4, seed=42, buffer=2), epoch=1)
    assert [[chip for chip, _ in batch] for batch in found] == WRITTEN


def test_more_ranks_than_shards_share_them() -> None:
    order = BatchOrder((10, 10), 2, world_size=5)
    found = ranks(order)
    assert [len(own) for own in found] == [2] * 5
    assert sorted(chip for own in found for batch in own for chip, _ in batch) == every_chip(order)


def test_most_shards_are_read_by_one_rank() -> None:
    order = BatchOrder((16,) * 100, 8, seed=1, world_size=4)
    seen = Counter(v.shard for rank in range(4) for v in replace(order, rank=rank).epoch(0).visits)
    assert sum(seen.values()) <= 100 + 3


def test_a_million_chips_need_no_million_of_anything() -> None:
    order = BatchOrder((38,) * 26_000, 64, seed=1)
    found = order.epoch(0)
    assert len(found.batches) == order.batches == -(-38 * 26_000 // 64)
    assert sum(len(v.rows) for v in found.visits) < 7 * 26_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size.*0.*from 1 on"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": True}, "shuffle=.*True.*seed"),
        ({"seed": -1}, "shuffle="),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size=2.*0 to 1"),
        ({"rank": -1}, "rank"),
        ({"pad": True, "drop_last": True}, "one of them"),
        ({"world_size": 8}, "7 chips for 8 ranks.*pad=True"),
        ({"batch_size": 8, "drop_last": True}, "batches of 8 chips.*each rank has 7.*smaller batch_size"),
        ({"sizes": (0, 0)}, "no chips"),
        ({"buffer": 0}, "buffer"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BatchOrder(**{"sizes": (3, 4), "batch_size": 2, **arguments})


def test_fewer_chips_than_ranks_with_pad() -> None:
    found = ranks(BatchOrder((2, 1), 2, world_size=5, pad=True))
    assert [len(own) for own in found] == [1] * 5
    assert sorted(chip for own in found for batch in own for chip, padded in batch if not padded) == [
        (0, 0), (0, 1), (1, 0),
    ]  # fmt: skip


def test_a_batch_larger_than_the_split_is_short() -> None:
    assert [len(b) for b in batches(BatchOrder((3, 4), 50))] == [7]
    assert [len(b) for b in batches(BatchOrder((3, 4), 50, pad=True))] == [50]


def test_draws_are_uniform() -> None:
    order = BatchOrder((1,) * 2000, 2000, seed=9)
    first = [chip[0] for chip, _ in batches(order)[0]]
    assert sorted(first) == list(range(2000))
    assert abs(np.corrcoef(first, range(2000))[0, 1]) < 0.1


WRITTEN = [[(2, 1), (1, 0), (1, 1), (2, 3)], [(2, 0), (0, 1), (0, 0), (2, 2)], [(0, 2)]]
