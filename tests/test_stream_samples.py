"""Streams that choose, change and share out samples: weights, augmentation, other ranks, parts of shards, memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from dask.system import CPU_COUNT
from small_stores import written
from streams import Shards, ids_of
from waiting import until

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.net import localfile
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.streams.stream import Stream
from rasteret_dask.tasks.batches import Arrays, InMemory

SIZE = 16


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    planned = (
        s2.harmonize(bands=["red", "nir"], time="3MS", dtype="uint16").chips(SIZE, cell_km=0.64).sample(90)
    )
    n = len(planned.table)
    crop = pa.array(["wheat" if at % 9 else "rye" for at in range(n)])
    table = planned.table.append_column("crop", crop)
    table = table.append_column("share", pa.array(np.arange(n) % 3 / 2.0))
    return planned.with_table(table.append_column("number", pa.array(range(n))))


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> StoredChips:
    """Return the chips in several shards."""
    opened = open_chips(written(chips, tmp_path_factory.mktemp("samples") / "chips.zarr", 20_000))
    assert len(opened.stored.sizes) >= 5
    return opened


def names(stream: Any) -> list[str]:
    return [chip for batch in stream for chip in batch["chip_id"].tolist()]


# Parts of shards


def test_ranks_of_a_store_read_their_parts_and_nothing_else(store: StoredChips) -> None:
    wanted = store.take(list(store))
    place = {chip: at for at, chip in enumerate(wanted["chip_id"].tolist())}
    seen: Counter[str] = Counter()
    for rank in range(3):
        for batch in store.stream(8, shuffle=3, rank=rank, world_size=3, pad=True):
            padded = batch.pop("padded")
            at = [place[chip] for chip in batch["chip_id"].tolist()]
            for name, values in batch.items():
                np.testing.assert_array_equal(values, wanted[name][at], name)
            seen.update(batch["chip_id"][~padded].tolist())
    assert seen == Counter(list(store))


def test_two_ranks_read_about_as_many_bytes_as_one(
    store: StoredChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    begin = localfile.read

    def counted(*arguments: Any, **more: Any) -> Any:
        found = begin(*arguments, **more)
        read.append(memoryview(found.data).nbytes)
        return found

    monkeypatch.setattr(localfile, "read", counted)
    names(store.stream(8, shuffle=1))
    alone = sum(read)
    read.clear()
    for rank in range(4):
        names(store.stream(8, shuffle=1, rank=rank, world_size=4))
    assert (
        0.7 * alone < sum(read) < 1.5 * alone
    )  # nobody reads a whole shard, which would be four times as many


# Other ranks and batches


@pytest.mark.parametrize("of", ["store", "chips"])
def test_a_job_goes_on_with_other_ranks_and_batches(of: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(of)
    found: Counter[str] = Counter()
    state: dict[str, Any] | None = None
    for ranks, size, taken in ((2, 5, 3), (3, 4, 2), (1, 7, 2), (4, 3, None)):
        states = []
        for rank in range(ranks):
            stream = source.stream(size, shuffle=9, rank=rank, world_size=ranks, pad=True)
            if state is not None:
                stream.load_state_dict(state)
            with stream:
                batches = list(stream) if taken is None else [next(stream) for _ in range(taken)]
                states.append(json.loads(json.dumps(stream.state_dict())))
            for batch in batches:
                found.update(batch["chip_id"][~batch["padded"]].tolist())
        assert all(one == states[0] for one in states)
        state = states[0]
    assert found == Counter(list(store_ids(source)))
    assert state is not None
    assert (state["epoch"], state["batch"], state["dealt"]) == (1, 0, [])


def store_ids(source: Any) -> list[str]:
    ids: list[str] = source.table.column("chip_id").to_pylist()
    return ids


def test_a_resumed_stream_knows_how_many_batches_there_are(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "log")  # 72 chips
    first = shards.stream(10, shuffle=1, epochs=3)
    for _ in range(3):
        next(first)
    state = first.state_dict()
    first.close()
    later = shards.stream(5, shuffle=1, epochs=3)
    later.load_state_dict(state)
    assert len(later) == 3 + 9 + 2 * 15  # taken before, 42 chips left, and two epochs
    found = [(later.epoch, ids_of(batch)) for batch in later]
    assert len(found) == 9 + 2 * 15
    assert sorted(chip for _, batch in found[9:] for chip in batch) == sorted(2 * shards.ids())
    assert later.epoch == 3
    assert later.state_dict()["epoch"] == 3


# Weights


@pytest.mark.parametrize("of", ["store", "chips"])
def test_weights_and_balance(of: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(of)
    n = len(source)
    crops = Counter(crop for b in source.stream(16, shuffle=1, balance="crop") for crop in b["labels/crop"])
    assert sum(crops.values()) == n
    assert abs(crops["rye"] - crops["wheat"]) <= 2
    numbers = [int(n) for b in source.stream(16, shuffle=1, weights="share") for n in b["labels/number"]]
    assert Counter(number % 3 for number in numbers) == Counter({2: n // 3 * 2, 1: n // 3})
    weights = np.zeros(n)
    weights[7] = 3
    assert {int(x) for b in source.stream(16, shuffle=1, weights=weights) for x in b["labels/number"]} == {7}


def test_weighted_streams_are_the_same_on_all_ranks_and_go_on(store: StoredChips) -> None:
    wanted = Counter(names(store.stream(8, shuffle=2, balance="crop")))
    first = [store.stream(4, shuffle=2, balance="crop", rank=rank, world_size=2) for rank in (0, 1)]
    found = Counter(chip for stream in first for _ in range(3) for chip in next(stream)["chip_id"].tolist())
    (state, other) = (stream.state_dict() for stream in first)
    assert state == other
    for stream in first:
        stream.close()
    for rank in range(3):
        later = store.stream(5, shuffle=2, balance="crop", rank=rank, world_size=3, pad=True)
        later.load_state_dict(state)
        found.update(chip for b in later for chip in b["chip_id"][~b["padded"]].tolist())
    assert found == wanted
    for column in (None, "share"):
        with pytest.raises(PlanError, match="weights="):
            store.stream(4, shuffle=2, weights=column).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"weights": "share"}, "shuffle=0"),
        ({"weights": "nothing", "shuffle": 0}, "no such column"),
        ({"balance": "share", "shuffle": 0}, "classes"),
        ({"weights": [1.0], "shuffle": 0}, "1 weights.*90 chips"),
        ({"augment": 7}, "a function of a sample"),
    ],
)
def test_what_cannot_be_is_told_at_once(
    chips: rd.Chips, store: StoredChips, arguments: dict[str, Any], told: str
) -> None:
    for source in (chips, store):
        with pytest.raises(PlanError, match=told):
            source.stream(8, **arguments)


def test_a_plan_that_filters_pixels_asks_for_a_store(chips: rd.Chips) -> None:
    from rasteret_dask.streams.planned import planned
    from rasteret_dask.streams.stream import Batching

    kept = chips.filter_pixels(min_valid=0.0)
    reading = planned(kept.job, kept._layout.outputs, kept._context("raise"))
    with pytest.raises(PlanError, match=r"to_zarr\(store\)"):
        Batching(8, shuffle=0, balance="crop").stream(reading)


# Augmentation


def noisy(sample: Arrays, random: np.random.Generator) -> Arrays:
    """Turn and crop pixels and their validity alike, and say what was drawn."""
    turns, at = int(random.integers(4)), int(random.integers(3))
    some = slice(at, at + 12)
    for name in ("s2", "s2/valid"):
        sample[name] = np.rot90(sample[name], turns, axes=(-2, -1))[..., some, some]
    return {**sample, "drawn": np.array([turns, at])}


def drawn(stream: Stream) -> dict[str, list[int]]:
    with stream:
        return {
            chip: own.tolist()
            for batch in stream
            for chip, own in zip(batch["chip_id"], batch["drawn"], strict=True)
        }


def test_a_sample_is_augmented_alike_on_any_rank_in_any_batch(chips: rd.Chips, store: StoredChips) -> None:
    wanted = drawn(store.stream(7, shuffle=5, augment=noisy))
    assert len({tuple(own) for own in wanted.values()}) == 12
    assert drawn(chips.stream(11, shuffle=5, augment=noisy)) == wanted
    found: dict[str, list[int]] = {}
    for rank in range(3):
        found |= drawn(store.stream(4, shuffle=5, augment=noisy, rank=rank, world_size=3))
    assert found == wanted
    second = store.stream(90, shuffle=5, augment=noisy, epochs=2)
    next(second)
    assert drawn(second) != wanted  # another epoch
    assert drawn(store.stream(7, shuffle=6, augment=noisy)) != wanted


def test_augmentation_is_paired_over_sources_and_comes_last(store: StoredChips) -> None:
    def halved(batch: Arrays) -> Arrays:
        return {**batch, "s2": batch["s2"] * np.float32(0.5)}

    plain = {k: v for b in store.stream(90, shuffle=5) for k, v in b.items()}
    place = {chip: at for at, chip in enumerate(plain["chip_id"].tolist())}
    for batch in store.stream(16, shuffle=5, normalize=halved, augment=noisy):
        assert batch["s2"].shape[1:] == (*plain["s2"].shape[1:3], 12, 12)
        assert batch["s2"].dtype == np.float32
        assert batch["s2"].flags.c_contiguous
        for at, chip in enumerate(batch["chip_id"].tolist()):
            turns, first = batch["drawn"][at].tolist()
            some = slice(first, first + 12)
            for name, factor in (("s2", 0.5), ("s2/valid", 1)):
                turned = np.rot90(plain[name][place[chip]], turns, axes=(-2, -1))[..., some, some]
                np.testing.assert_array_equal(batch[name][at], turned * factor)


def test_copies_of_a_sample_are_augmented_otherwise(store: StoredChips) -> None:
    weights = np.zeros(len(store))
    weights[5] = 1
    (batch,) = store.stream(90, shuffle=1, weights=weights, augment=noisy)
    assert len(set(batch["chip_id"].tolist())) == 1
    assert len(np.unique(batch["drawn"], axis=0)) == 12


def nothing(sample: Arrays, random: np.random.Generator) -> Any:
    random.random()
    sample["s2"] += 1


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (nothing, "returned a NoneType.*must return it"),
        (
            lambda sample, random: {"s2": np.zeros(int(random.integers(1, 9999)))},
            "'s2' of shape.*crop has one size",
        ),
        (lambda sample, random: {str(random.random()): 1}, "in some samples only|only"),
    ],
)
def test_what_augment_must_return(store: StoredChips, function: Any, told: str) -> None:
    with store.stream(8, shuffle=1, augment=function) as stream, pytest.raises(PlanError, match=told):
        next(stream)


# Memory


def test_sixty_epochs_hold_as_much_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: shards that are held at the same time, and batches that are left."""
    shards = Shards(tmp_path / "log", (6,) * 12, pixels=2)
    live: list[int] = []
    most: list[int] = []
    made = InMemory.__init__

    class Watched(dict[str, Any]):
        """Weakly referable arrays of a shard."""

    def watched(self: InMemory, arrays: Any) -> None:
        held = Watched(arrays)
        live.append(1)
        weakref.finalize(held, live.pop)
        made(self, held)

    monkeypatch.setattr(InMemory, "__init__", watched)
    monkeypatch.setattr(Shards, "read", lambda _, shard: in_memory(shard))
    stream = shards.stream(6, shuffle=1, epochs=60)
    batches: list[weakref.ref[Any]] = []
    seen = 0
    for batch in stream:
        most.append(len(live))
        batches.append(weakref.ref(batch["s2"]))
        seen += len(batch["chip_id"])
    del batch
    assert seen == 60 * 72
    first, rest = most[:12], most[12:]
    bound = 4 + 1 + 2 + CPU_COUNT  # mixed, one that begins, made ahead, read ahead
    assert max(first) <= bound
    assert max(rest) <= bound
    stream.close()
    gc.collect()
    until(lambda: not len(live) and not [one for one in batches if one() is not None])


def in_memory(shard: int) -> Arrays:
    n = 6
    return {
        "s2": np.full((n, 1, 2, 2, 2), shard, dtype=np.float32),
        "s2/valid": np.ones((n, 1, 2, 2), dtype=bool),
        "s2/datetime": np.full((n, 1), np.datetime64("2024-05-01", "us")),
        "chip_id": np.array([f"{shard}/{row}" for row in range(n)], dtype=object),
        "bbox": np.zeros((n, 4)),
        "epsg": np.full(n, 32633, dtype=np.int32),
        "split": np.array(["train"] * n, dtype=object),
    }
