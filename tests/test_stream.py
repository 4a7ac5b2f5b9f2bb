"""Streams: the same chips as everywhere else, resumed anywhere, read no further ahead than asked for."""

from __future__ import annotations

import gc
import inspect
import json
import multiprocessing
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import dask.config
import numpy as np
import pytest
import xarray as xr
from streams import Shards, assert_same, concat, flat, ids_of, in_small_shards, rows_of, train_chips
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.errors import FormatError, JobError, PlanError, ReadError
from rasteret_dask.storeset import StoredChips
from rasteret_dask.streams.ahead import Shelf
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.streams.datasets import as_xarray
from rasteret_dask.streams.stream import Batching, Stream
from rasteret_dask.tasks.batches import Arrays, arrays_of, take


@pytest.mark.parametrize("stream", [rd.Chips.stream, StoredChips.stream, rd.stream_from])
def test_every_stream_takes_the_arguments_of_batching(stream: Any) -> None:
    wanted = inspect.signature(Batching).parameters
    shown = inspect.signature(stream).parameters
    assert {name: shown[name].default for name in wanted if name != "client"} == {
        name: one.default for name, one in wanted.items() if name != "client"
    }
    assert shown.keys() - wanted.keys() <= {"self", "plan", "functions", "split", "on_error"}
    assert "client" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"batch_size": 0}, "batch_size"), ({"batch_size": 2, "rank": 3, "world_size": 2}, "rank 3 of"),
     ({"batch_size": 2, "pad": True, "drop_last": True}, "pad"), ({"batch_size": 2, "client": 7}, "client"),
     ({"batch_size": 2, "shuffle": -1}, "a seed"), ({"batch_size": 10**9, "drop_last": True}, "")],
)  # fmt: skip
def test_arguments_are_refused_before_any_chip_is_looked_at(arguments: dict[str, Any], told: str) -> None:
    if not told:
        Batching(**arguments)  # that depends on the chips
        return
    with pytest.raises(PlanError, match=told):
        Batching(**arguments)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / "log")


OTHERS: set[threading.Thread] = set()
"""Readers of streams that tests before this one have left."""


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(readers())


def readers() -> set[threading.Thread]:
    """Return the threads that read for this test."""
    names = ("rasteret-batches", "rasteret-stream")
    return {t for t in threading.enumerate() if t.name.startswith(names)} - OTHERS


# Real chips


@pytest.fixture(scope="module")
def train(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    return train_chips(s2, aef)


@pytest.fixture(scope="module")
def reading(train: rd.Chips) -> ChipShards:
    return in_small_shards(train)


@pytest.fixture(scope="module")
def loaded(train: rd.Chips) -> Arrays:
    """Return all train chips as ``load`` has them, which never saw a stream."""
    tree = train.load()
    return arrays_of({name: tree[name].to_dataset() for name in ("optical", "embeddings")})


def test_without_shuffle_batches_are_what_load_returns(train: rd.Chips, loaded: Arrays) -> None:
    stream = train.stream(16)
    assert len(stream) == -(-len(train) // 16)
    found = list(stream)
    assert len(found) == len(stream)
    assert_same(concat(found), loaded)
    assert found[0]["chip_id"].tolist() == train.table.column("chip_id").to_pylist()[:16]


def test_small_shards_shuffled_over_ranks_and_epochs(reading: ChipShards, loaded: Arrays) -> None:
    seen: list[list[str]] = [[], []]
    for rank in range(3):
        stream = Batching(8, shuffle=5, epochs=2, rank=rank, world_size=3, pad=True).stream(reading)
        for number, batch in enumerate(stream):
            padded = batch.pop("padded")
            assert_same(batch, take(loaded, rows_of(loaded, batch["chip_id"].tolist())))
            seen[number // stream.order.batches] += batch["chip_id"][~padded].tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(loaded["chip_id"].tolist())
    assert seen[0] != seen[1]


def test_batches_are_the_reader_s_to_keep_and_change(reading: ChipShards, loaded: Arrays) -> None:
    for batch in Batching(6).stream(reading):
        for values in batch.values():
            assert values.flags.writeable
            assert values.flags.c_contiguous
            assert values.base is None
        batch["optical"][:] = 0
        batch["embeddings"][:] = 7
    again = concat(list(Batching(6).stream(reading)))
    assert_same(again, loaded)


def test_a_batch_as_xarray(train: rd.Chips) -> None:
    stream = train.stream(10)
    found = as_xarray(next(stream), stream.bands)
    tree = train.to_xarray()
    for name, dataset in found.items():
        wanted = tree[name].to_dataset().isel(chip=slice(10)).compute()
        assert dataset["pixels"].dims == wanted["pixels"].dims
        for variable in ("pixels", "datetime", "chip_id", "bounds", "band", "epsg"):
            xr.testing.assert_equal(dataset[variable].variable, wanted[variable].variable)


def doubled(chips: xr.DataArray) -> xr.DataArray:
    return chips * 2


def test_functions_of_the_user_s(train: rd.Chips, loaded: Arrays) -> None:
    (batch,) = train.map(doubled, source="embeddings").stream(1000)
    np.testing.assert_array_equal(batch["embeddings"], loaded["embeddings"] * 2)
    np.testing.assert_array_equal(batch["optical"], loaded["optical"])


def test_labels_travel(s2: rd.Collection) -> None:
    chips = s2.harmonize(bands=["red"], time="3MS").chips(size=32, cell_km=0.96).sample(9)
    numbers = np.arange(9) * 11
    table = chips.table.append_column("crop", [numbers]).append_column("farm", [[f"f{n}" for n in numbers]])
    (batch,) = chips.with_table(table).stream(9)
    assert batch["labels/crop"].tolist() == numbers.tolist()
    assert batch["labels/farm"].tolist() == [f"f{n}" for n in numbers]


# States


@pytest.mark.parametrize(
    "arguments", [{}, {"shuffle": 3}, {"shuffle": 3, "rank": 1, "world_size": 2, "pad": True}]
)
def test_a_state_goes_on_at_the_very_next_batch(shards: Shards, arguments: dict[str, Any]) -> None:
    wanted = [ids_of(b) for b in shards.stream(7, epochs=2, **arguments)]
    for stop in range(len(wanted) + 1):
        first = shards.stream(7, epochs=2, **arguments)
        found = [ids_of(next(first)) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = shards.stream(7, epochs=2, **arguments)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert found + [ids_of(b) for b in second] == wanted


def test_what_is_made_ahead_is_not_in_the_state(shards: Shards) -> None:
    stream = shards.stream(7, prefetch=5)
    first = ids_of(next(stream))
    until(lambda: sum(shards.reads.values()) >= 5)
    again = shards.stream(7)
    again.load_state_dict(stream.state_dict())
    assert ids_of(next(again)) == ids_of(next(stream)) != first


def consume(shards: Shards, state: Path, orders: Connection) -> None:
    """Take a batch whenever told to: write the state, and then send the batch's chips."""
    stream = shards.stream(5, shuffle=8)
    if state.exists():
        stream.load_state_dict(json.loads(state.read_text()))
    while orders.recv():
        batch = ids_of(next(stream))
        state.with_suffix(".new").write_text(json.dumps(stream.state_dict()))
        state.with_suffix(".new").rename(state)
        orders.send(batch)


def test_a_consumer_killed_again_and_again_misses_nothing(shards: Shards, tmp_path: Path) -> None:
    wanted = [ids_of(b) for b in shards.stream(5, shuffle=8)]
    found: list[list[str]] = []
    forks = multiprocessing.get_context("forkserver")
    for steps in (3, 1, 4, len(wanted) - 8):
        ours, theirs = forks.Pipe()
        running = forks.Process(target=consume, args=(shards, tmp_path / "state", theirs))
        running.start()
        for _ in range(steps):
            ours.send(True)
            assert ours.poll(PATIENCE_S)
            found.append(ours.recv())
        running.kill()
        running.join()
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chips": "0" * 32}, "of other chips.*the plan, the split and the store"),
        ({"seed": 4}, "shuffle=4.*shuffle=3"),
        ({"weights": "0" * 32}, "weights='0+'.*weights=None"),
        ({"format": 99}, "format 99"),
        ({"format": 1}, "format 1.*Begin the epoch again"),
        ({"epoch": 7}, "epoch 7.*2 epochs of 72 chips"),
        ({"epoch": 2}, "epoch 2, batch 1"),
        ({"batch": 0}, "batch 0, 7 chips taken"),
        ({"dealt": []}, "batch 1, 0 chips taken"),
        ({"dealt": {}}, "batch 1, 0 chips taken"),
        ({"dealt": [7]}, "what state_dict"),
        ({"dealt": [{"world_size": 1, "buffer": 4, "pad": False, "taken": True}]}, "what state_dict"),
        ({"dealt": [{"world_size": 1, "buffer": 4, "pad": False, "taken": 72}]}, "72 chips taken"),
        ({"batch": "x"}, "batch 'x'"),
        ({"epoch": -1}, "epoch -1"),
    ],
)
def test_a_state_of_another_stream_is_refused(shards: Shards, change: dict[str, Any], said: str) -> None:
    stream = shards.stream(7, shuffle=3, epochs=2)
    next(stream)
    before = stream.state_dict()
    with pytest.raises((PlanError, FormatError), match=said):
        stream.load_state_dict({**before, **change})
    assert stream.state_dict() == before
    nothing: list[Any] = [{}, [], "state"]
    for other in nothing:
        with pytest.raises(PlanError, match="what state_dict"):
            stream.load_state_dict(other)


def test_a_state_of_another_plan_is_refused(train: rd.Chips) -> None:
    state = train.stream(8).state_dict()
    with pytest.raises(PlanError, match="of other chips"):
        train.filter(("chip_id", "!=", train.table["chip_id"][0].as_py())).stream(8).load_state_dict(state)


# No further ahead than asked for


def test_who_takes_nothing_stops_the_reading(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "log", (6,) * 200)
    with dask.config.set(num_workers=2):
        stream = shards.stream(6, prefetch=3)
        assert not readers()
        next(stream)
        until(lambda: sum(shards.reads.values()) >= 4)
        before = -1
        while sum(shards.reads.values()) != before:  # time to read too much; more of it finds no other end
            before = sum(shards.reads.values())
            time.sleep(0.3)
        # one taken, three ready, one waited for, and two that the readers are ahead
        assert 4 <= before <= 1 + 3 + 1 + 2
        assert set(shards.reads.values()) == {1}
        for _ in range(20):
            next(stream)
        until(lambda: sum(shards.reads.values()) >= 24)
        assert sum(shards.reads.values()) <= 21 + 3 + 1 + 2
        stream.close()


@pytest.mark.parametrize("shuffle", [None, 4])
def test_a_shard_is_read_once_an_epoch(shards: Shards, shuffle: int | None) -> None:
    assert sorted(flat(shards.stream(5, shuffle=shuffle, epochs=3))) == sorted(3 * shards.ids())
    assert set(shards.reads.values()) == {3}


def test_a_rank_reads_its_own_shards(shards: Shards) -> None:
    flat(shards.stream(4, shuffle=1, rank=1, world_size=4))
    assert len(shards.reads) == 3
    assert set(shards.reads.values()) == {1}


def test_what_a_state_has_behind_it_is_not_read_again(shards: Shards) -> None:
    stream = shards.stream(6)
    dealt = [{"world_size": 1, "buffer": 4, "pad": False, "taken": 54}]
    stream.load_state_dict({**stream.state_dict(), "batch": 9, "dealt": dealt})
    assert flat(stream) == shards.ids()[54:]
    assert set(shards.reads) == {9, 10, 11}


# The end


def test_an_abandoned_stream_stops(shards: Shards) -> None:
    stream = shards.stream(2, shuffle=1, epochs=1000)
    next(stream)
    assert readers()
    del stream
    gc.collect()
    until(lambda: not readers())


def interrupted(stream: Stream) -> None:
    for number, _ in enumerate(stream):
        if number == 3:
            raise KeyboardInterrupt


def test_a_loop_that_is_left_and_a_with_block_stop(shards: Shards) -> None:
    stream = shards.stream(2, epochs=1000)
    with pytest.raises(KeyboardInterrupt), stream:
        interrupted(stream)
    until(lambda: not readers())
    assert stream.state_dict()["batch"] == 4
    assert flat([next(stream)]) == shards.ids()[8:10]  # it can go on
    stream.close()
    stream.close()


def test_an_exhausted_stream_stays_so_and_leaves_nothing(shards: Shards) -> None:
    stream = shards.stream(7)
    list(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.epoch == 1
    until(lambda: not readers())


def test_who_is_interrupted_loses_nothing(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come when the batch has been taken and is not yet handed over, or when reading begins."""
    stream, take_one, begin = shards.stream(5, shuffle=1), Shelf.take, threading.Thread.start
    wanted = [ids_of(batch) for batch in shards.stream(5, shuffle=1)]

    def stopped(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", begin)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    until(lambda: not readers())

    def late(shelf: Shelf, number: int) -> Arrays:
        batch = take_one(shelf, number)
        if number % 3 == 0 and number not in seen:
            seen.add(number)
            raise KeyboardInterrupt
        return batch

    seen: set[int] = set()
    monkeypatch.setattr(Shelf, "take", late)
    found: list[list[str]] = []
    while len(found) < len(stream):
        try:
            found.append(ids_of(next(stream)))
        except KeyboardInterrupt:
            assert stream.state_dict()["batch"] == len(found)
    assert found == wanted
    assert len(seen) == 5


def test_threads_take_turns(shards: Shards) -> None:
    stream = shards.stream(2, shuffle=1)
    found: list[list[str]] = []
    takers = [threading.Thread(target=lambda: found.extend(ids_of(b) for b in stream)) for _ in range(3)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(PATIENCE_S)
    assert sorted(chip for batch in found for chip in batch) == sorted(shards.ids())


def test_close_by_another_thread_ends_the_wait(shards: Shards) -> None:
    begun, slow = threading.Event(), threading.Event()

    def held(batch: Arrays) -> Arrays:
        begun.set()
        slow.wait(PATIENCE_S)
        return batch

    def close() -> None:
        begun.wait(PATIENCE_S)
        stream.close()

    stream = shards.stream(6, normalize=held)
    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(JobError, match="another thread"):
        next(stream)
    slow.set()
    closing.join()
    assert flat(stream) == shards.ids()


def test_a_begun_stream_goes_on_in_another_process(shards: Shards) -> None:
    stream = shards.stream(5, shuffle=1)
    first = flat(next(stream) for _ in range(4))
    again = cloudpickle.loads(cloudpickle.dumps(stream))
    assert first + flat(again) == flat(shards.stream(5, shuffle=1))
    stream.close()


def test_a_process_ends_with_a_stream_half_read(tmp_path: Path) -> None:
    """Shards that are queued do not hold it up: here each takes a second."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom streams import Shards\n"
        "stream = Shards(Path(sys.argv[2]), (6,) * 500, delay_s=1).stream(6, shuffle=1, buffer=40)\nnext(stream)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "log").iterdir())) < 40


@pytest.mark.parametrize("error", [ReadError, TimeoutError])  # the second must not pass for "not yet"
def test_a_shard_that_cannot_be_read(tmp_path: Path, error: type[Exception]) -> None:
    shards = Shards(tmp_path / "log", broken=(3,), error=error)
    stream = shards.stream(6)
    found = flat(next(stream) for _ in range(3))
    for _ in range(2):
        with pytest.raises(error, match="shard 3"):
            next(stream)
    until(lambda: not readers())
    (shards.log / "mended").touch()
    stream.close()
    assert [*found, *flat(stream)] == shards.ids()


def test_normalize(shards: Shards) -> None:
    class Stats:
        def normalize(self, arrays: Arrays) -> Arrays:
            return {**arrays, "s2": arrays["s2"] * 0.5}

    for given in (Stats(), Stats().normalize):
        batch = next(shards.stream(6, normalize=given))
        np.testing.assert_array_equal(batch["s2"][:, 0, 0, 0, 0], np.arange(6) / 2)


def test_normalize_that_fails_once(shards: Shards) -> None:
    failed: list[int] = []

    def flaky(batch: Arrays) -> Arrays:
        if len(failed) < 2 and batch["chip_id"][0] == "2/0":
            failed.append(1)
            raise ValueError("no luck")
        return batch

    stream = shards.stream(6, normalize=flaky)
    found = [next(stream) for _ in range(2)]
    for _ in range(2):
        with pytest.raises(ValueError, match="no luck") as caught:
            next(stream)
        assert len(traceback.extract_tb(caught.tb)) < 12  # not the same error, grown
    assert flat([*found, *stream]) == shards.ids()
    assert len(failed) == 2
    with pytest.raises(PlanError, match=r"returned a NoneType.*return it"):
        next(shards.stream(6, normalize=lambda batch: None))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"epochs": 0}, "epochs.*0"),
        ({"prefetch": 0}, "prefetch"),
        ({"client": 7}, "client.*7"),
        ({"normalize": 7}, "normalize.*stats"),
        ({"world_size": 100}, "72 chips for 100 ranks"),
    ],
)
def test_what_cannot_be_is_said_at_once(shards: Shards, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        shards.stream(6, **arguments)


def test_it_says_what_it_is(shards: Shards) -> None:
    stream: Stream = shards.stream(6, shuffle=2, rank=1, world_size=3, epochs=4)
    assert str(stream) == (
        "<Stream of 72 chips, shuffled by seed 2, 4 x 4 batches of 6, rank 1 of 3; next: epoch 0, batch 0>"
    )
    assert len(stream) == 16
