"""A run that is stopped before its end, by a signal or as its time is over: nothing is left half done or behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import part_processes
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from part_processes import FREE, SHRUNK, planned, stoppable
from small_stores import contents
from waiting import until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.net import remote
from rasteret_dask.runlimits import RunLimits
from rasteret_dask.store import shardreports
from rasteret_dask.store.limits import Deadline
from rasteret_dask.store.stopping import deferred, terminable

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")


OURS = ("rasteret-shard", "rasteret-presence", "rasteret-heartbeat")
"""Threads of a run; others serve the process."""


@pytest.fixture(autouse=True, scope="module")
def shrunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHRUNK.items():
            patch.setattr(f"rasteret_dask.{name}", value)
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Return two worker processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as running:
        yield running


@pytest.fixture(scope="module")
def chips(small_world: World) -> rd.Chips:
    return planned(str(small_world.sentinel2))


@pytest.fixture(scope="module")
def plain(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the store of one plain run."""
    store = tmp_path_factory.mktemp("plain") / "x.zarr"
    chips.to_zarr(store, progress=False)
    return store


def written(store: Path) -> set[str]:
    return {path.stem for path in (store / "_job/done").glob("*.json")}


def tries(store: Path) -> dict[str, int]:
    return {shard: len(marks) for shard, marks in shardreports.tries(remote.listing(str(store))).items()}


@pytest.mark.parametrize("place", ["threads", "cluster"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle(
    small_world: World, chips: rd.Chips, plain: Path, tmp_path: Path, request: pytest.FixtureRequest,
    number: signal.Signals, place: str,
) -> None:  # fmt: skip
    store, folder = tmp_path / "x.zarr", tmp_path / "notes"
    folder.mkdir()
    address, tasks = None, {}
    if place == "cluster":
        running = request.getfixturevalue("cluster")
        address, tasks = running.scheduler_address, running.scheduler.tasks
        with Client(running, set_as_default=False) as client:
            client.run(part_processes.hold, str(folder))
    arguments = (str(small_world.sentinel2), str(store), str(folder), address)
    process = multiprocessing.get_context("forkserver").Process(target=stoppable, args=arguments)
    process.start()

    def begun() -> int:
        return len(list(folder.glob("begun.*")))

    until(lambda: len(written(store)) >= FREE and begun() > len(written(store)))
    assert process.pid is not None
    os.kill(process.pid, number)
    until((folder / "stopping").exists)
    assert process.is_alive(), "it has not waited for the shards under way"
    count = begun()
    (folder / "go").touch()
    process.join()
    end = json.loads((folder / "end.json").read_text())
    assert end["type"] == {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "SystemExit"}[number]
    assert process.exitcode == {signal.SIGINT: 1, signal.SIGTERM: 143}[number]
    assert begun() == count == len(written(store)), "a shard was begun after the signal, or not put whole"
    assert end["notes"] == [f"{count} of 17 shards are written: run the same again, which does the rest"]
    assert not [name for name in end["threads"] if name.startswith(OURS)]
    assert not list((store / "_job/clients").glob("*"))
    assert not (store / "zarr.json").exists()
    until(lambda: not tasks)
    chips.to_zarr(store, progress=False)  # a trace of the other client would be a warning
    assert contents(store) == contents(plain)
    assert set(tries(store).values()) == {1}, "what was written is not written again"


class _Signalling(SimpleQueue[Any]):
    """A queue that hands one thing over at the very moment at which a signal comes."""

    number: signal.Signals
    left: int

    def get(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get(*args, **kwargs)
        type(self).left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return found


@pytest.mark.parametrize("place", ["threads", "cluster"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_signal_just_as_a_shard_is_told_of(
    chips: rd.Chips, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
    number: signal.Signals, place: str, at: int,
) -> None:  # fmt: skip
    client = request.getfixturevalue("cluster") if place == "cluster" else None
    store = tmp_path / "x.zarr"
    queue = type("Queue", (_Signalling,), {"number": number, "left": at})
    kind = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    with monkeypatch.context() as patch:
        patch.setattr(f"rasteret_dask.store.on{place}.SimpleQueue", queue)
        with pytest.raises(kind) as caught:
            chips.to_zarr(store, client=client, progress=False)
    count = len(written(store))
    assert caught.value.__notes__ == [
        f"{count} of 17 shards are written: run the same again, which does the rest"
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    chips.to_zarr(store, progress=False)
    assert contents(store) == contents(plain)
    assert set(tries(store).values()) == {1}


def _signalled(times: int, came: list[str]) -> None:
    with deferred(lambda: came.append("woken")):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
            came.append("went on")


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_signal_waits_and_the_second_does_not(times: int) -> None:
    came: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _signalled(times, came)
    assert came == ["woken", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("place", ["threads", "cluster"])
def test_no_shard_is_begun_once_time_is_over(
    chips: rd.Chips, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
    place: str,
) -> None:  # fmt: skip
    """Time is over once five shards have ended; those under way end too."""
    client = request.getfixturevalue("cluster") if place == "cluster" else None
    store, ended = tmp_path / "x.zarr", list[float]()
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "left_s", property(lambda _: 100.0 if len(ended) < 5 else -1.0))
        patch.setattr(Deadline, "took", lambda _, seconds: ended.append(seconds))
        with pytest.raises(
            rd.IncompleteError, match=r"(\d+) of 17 shards are written.*Run the same again"
        ) as caught:
            chips.to_zarr(store, client=client, progress=False, limits=RunLimits(max_time="1h"))
    assert isinstance(caught.value, rd.JobError)
    count = int(re.search(r"(\d+) of 17", str(caught.value))[1])  # type: ignore[index]
    assert 5 <= count == len(written(store)) == len(tries(store)) < 17
    assert not list((store / "_job/clients").glob("*"))
    chips.to_zarr(store, progress=False)
    assert contents(store) == contents(plain)
    assert set(tries(store).values()) == {1}


def test_time_that_is_over_before_the_first_shard(chips: rd.Chips, tmp_path: Path) -> None:
    bounds = RunLimits(max_time=1e-9, part=(1, 2))
    with pytest.raises(rd.IncompleteError, match=r"0 of 9 shards of part 1/2 are written"):
        chips.to_zarr(tmp_path / "x.zarr", progress=False, limits=bounds)
    assert not tries(tmp_path / "x.zarr")


@given(took=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 300))
def test_whatever_is_begun_ends_in_time_unless_it_is_slower_than_all_before(
    took: list[int], limit: int
) -> None:
    now = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rasteret_dask.store.limits.time.monotonic", lambda: now)
        deadline, slowest = Deadline(float(limit)), 0
        for seconds in took:
            if deadline.is_over:
                assert now + slowest >= limit
                break
            now += seconds
            assert now <= limit or seconds > slowest
            deadline.took(seconds)
            slowest = max(slowest, seconds)


def test_a_run_without_a_limit_has_time_for_ever() -> None:
    deadline = Deadline()
    deadline.took(1e9)
    assert deadline.left_s is None
    assert not deadline.is_over


# Who handles SIGTERM


def test_a_handler_of_the_application_stays() -> None:
    seen: list[int] = []
    before: Any = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: seen)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated() -> None:
    with terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: False)


def test_the_default_is_there_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="143"):
            _terminated()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
