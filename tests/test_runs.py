"""Neighbouring shards go to one worker process, in runs that any number of shards is sent in."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster, Scheduler, SchedulerPlugin
from hypothesis import given
from hypothesis import strategies as st
from streams import assert_same, in_small_shards, until
from test_tiles_once import readme_chips
from test_write import layout_of, tries

import rasteret_dask as rd
from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.show import fetching as explained
from rasteret_dask.show.fetching import fetching
from rasteret_dask.store import shardruns
from rasteret_dask.store.run import run_zarr
from rasteret_dask.store.runtasks import Work
from rasteret_dask.store.shardruns import Exit, Shards, runner, write_shards
from rasteret_dask.streams.stream import Batching
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.runs import Crew, Cuts, Workforce

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")


# Where runs are cut


forces = st.builds(Workforce, st.integers(1, 9), st.integers(1, 4))
shared = st.lists(st.integers(0, 1000), min_size=0, max_size=300)


@given(shared, st.integers(1, 2000), forces, st.data())
def test_every_shard_is_in_one_run_of_neighbours(
    borders: list[int], new: int, force: Workforce, data: st.DataObject
) -> None:
    cuts = Cuts(np.array(borders, dtype=np.int64), new * (len(borders) + 1))
    places = [p for p in range(len(borders) + 1) if data.draw(st.booleans())] if len(borders) < 20 else list(
        range(0, len(borders) + 1, data.draw(st.integers(1, 3))))  # fmt: skip
    begin = 0
    for runs in cuts.rounds(places, force):
        for run in runs:
            assert len(run) > 0
            at = places.index(run[0])
            assert list(run) == places[at : at + len(run)]
        count = sum(map(len, runs))
        assert sorted(p for run in runs for p in run) == places[begin : begin + count]
        begin += count
        if force.processes == 1:
            assert {len(run) for run in runs} == {1}
    assert begin == len(places)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 2000))
def test_nobody_idles_at_the_end(processes: int, threads: int, count: int) -> None:
    """No run is longer than half a share of what was left, but for the last shards, a run or two for each thread."""
    cuts = Cuts(np.full(count - 1, 10, dtype=np.int64), count)
    left = count
    for runs in cuts.rounds(range(count), Workforce(processes, threads)):
        longest, last = max(map(len, runs)), left <= 2 * processes * threads
        share = -(-left // (processes * threads))
        assert longest <= (share if last else -(-share * 3 // 4) + 1)
        left -= sum(map(len, runs))


def test_runs_are_as_long_as_tiles_need_and_no_longer() -> None:
    force = Workforce(4, 1)
    nothing_shared = [len(run) for runs in Cuts.free(500).rounds(range(500), force) for run in runs]
    assert set(nothing_shared) == {1}
    a_shard_more = Cuts(np.full(499, 100, dtype=np.int64), 500 * 100)
    lengths = [len(run) for runs in a_shard_more.rounds(range(500), force) for run in runs]
    assert a_shard_more.enough == max(lengths) == 10
    assert lengths[-4:] <= [2] * 4


def test_a_run_ends_where_little_is_shared() -> None:
    borders = np.full(99, 100, dtype=np.int64)
    borders[9::11] = 1
    cuts = Cuts(borders, 100 * 100)
    ends = {run[-1] for runs in cuts.rounds(range(100), Workforce(2, 1)) for run in runs}
    assert {9, 20, 31} <= ends


# Threads of a process


def test_threads_of_a_process_share_its_runs() -> None:
    crew, order, lock = Crew(), [], threading.Lock()
    begun, go = threading.Barrier(2), threading.Event()

    def compute(place: int) -> None:
        with lock:
            order.append(place)
        go.wait(60)

    def run(places: list[int]) -> None:
        begun.wait()
        crew.compute("job", places, compute, lambda: True)

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(run, list(range(10, 20))), pool.submit(run, list(range(10)))]
        until(lambda: len(order) == 2)
        assert crew.places(lambda: "job") == frozenset(range(20))
        assert crew.places(lambda: "another") is None
        go.set()
        for end in ends:
            end.result()
    assert sorted(order) == list(range(20))
    assert order[2:10] == sorted(order[2:10])
    assert max(order[:9]) <= 10  # side by side on the first run
    assert crew.places(lambda: "job") is None


def test_what_a_run_ends_with_is_raised_where_the_run_is() -> None:
    crew, done = Crew(), []

    def compute(place: int) -> None:
        if place == 3:
            raise OSError("three")
        done.append(place)

    with pytest.raises(OSError, match="three"):
        crew.compute("job", range(8), compute, lambda: True)
    assert done == [0, 1, 2]
    crew.compute("job", range(8, 16), done.append, lambda: len(done) < 5)
    assert done == [0, 1, 2, 8, 9]


# On a cluster


@pytest.fixture(scope="module")
def chips(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> rd.Chips:
    return readme_chips(s2, l8, aef, fill=True)


SHARD_BYTES = 250_000


@pytest.fixture(scope="module")
def four() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=4, threads_per_worker=1, processes=True, dashboard_address=":0") as running:
        yield running


@pytest.fixture
def two() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as running:
        yield running


def read_by(store: Path) -> tuple[int, int, dict[str, str]]:
    """Return the tiles and bytes that a store's shards took, and the process of each shard."""
    manifest = pq.read_table(store / "manifest.parquet")
    rows = manifest.select(["shard", "process"]).to_pylist()
    return (
        sum(manifest["tiles_read"].to_pylist()),
        sum(manifest["bytes_fetched"].to_pylist()),
        {row["shard"]: row["process"] for row in rows},
    )


def test_processes_fetch_no_more_than_explain_says(
    chips: rd.Chips, four: LocalCluster, tmp_path: Path
) -> None:
    layout = layout_of(chips, SHARD_BYTES)
    job = layout.job
    shards = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
    once = fetching(job, Workforce(1, 1), 0, None)
    with Client(four, set_as_default=False) as client:
        run_zarr(layout, str(tmp_path / "x.zarr"), ReadContext(), client, progress=False)
    tiles, nbytes, process = read_by(tmp_path / "x.zarr")
    most = fetching(job, Workforce(4, 1), 0, None)
    single = fetching(job, Workforce(len(shards), 1), 0, None)
    assert most.exact
    assert most.read_bytes is not None
    assert once.read_bytes is not None
    assert once.requests * 0.9 <= tiles <= most.requests < single.requests
    assert once.read_bytes * 0.9 <= nbytes <= most.read_bytes
    assert len(set(process.values())) == 4
    borders = sum(process[a.name] != process[b.name] for a, b in pairwise(shards))
    assert borders < most.tasks < len(shards)


def test_what_a_run_has_written_is_not_read_again_where_its_worker_is_killed(
    chips: rd.Chips, two: LocalCluster, tmp_path: Path
) -> None:
    layout, store = layout_of(chips, SHARD_BYTES), tmp_path / "x.zarr"
    names = [shard.name for shard in layout.job.shards()]
    reports = store / "_job" / "done"
    before: set[str] = set()
    with Client(two, set_as_default=False) as client:
        victim = next(iter(client.run(os.getpid).values()))

        def kill() -> None:
            """Kill a worker that has written some shards of its first run, and not yet all."""
            until(lambda: len(list(reports.glob("*.json"))) >= 3)
            os.kill(victim, signal.SIGKILL)
            before.update(path.stem for path in reports.glob("*.json"))

        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(kill)
            run_zarr(layout, str(store), ReadContext(), client, progress=False)
            killing.result()
    tried = tries(store)
    assert 3 <= len(before) < len(names)
    assert {name for name in before if tried[name] > 1} == set()
    assert sum(tried.values()) <= len(names) + 1  # what it had under way
    by_threads = tmp_path / "threads.zarr"
    run_zarr(layout, str(by_threads), ReadContext(), None, progress=False)
    for one, other in zip(objects(store), objects(by_threads), strict=True):
        assert (one[0], one[1]) == (other[0], other[1])


def objects(store: Path) -> list[tuple[str, bytes]]:
    """Return path and bytes of every object but those that say who wrote the store, and when."""
    return [
        (path.relative_to(store).as_posix(), path.read_bytes())
        for path in sorted(store.rglob("*"))
        if path.is_file() and "_job" not in path.parts and path.name not in ("manifest.parquet", "zarr.json")
    ]


@dataclass(frozen=True)
class Noted:
    """Work that leaves a file a shard; some fail, at first or always."""

    folder: str
    once: tuple[int, ...] = ()
    always: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()

    def __call__(self, item: int) -> None:
        path = Path(self.folder, str(item))
        tried = len(list(path.parent.glob(f"{item}.*")))
        if path.exists():
            return
        path.with_suffix(f".{tried}").touch()
        if item in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if item in self.always or (item in self.once and not tried):
            raise OSError(f"shard {item}")
        path.touch()


def trivial(count: int, compute: Any, enough: int = 10) -> Shards:
    cuts = Cuts(np.full(count - 1, enough, dtype=np.int64), 10 * count)
    names = [f"all-{number:05d}" for number in range(count)]
    return Shards(Work(compute, "digest", {}), names, range(count), names, range(count), cuts, "tail")


def test_shards_that_fail_do_so_by_themselves(two: LocalCluster, tmp_path: Path) -> None:
    """A failing shard is tried once more, by itself; one lost with its worker once more at the end, alone."""
    work = Noted(str(tmp_path), once=(5, 6), always=(9,), deadly=(30,))
    with Client(two, set_as_default=False) as client, pytest.raises(JobError) as caught:
        write_shards(runner(client), trivial(40, work), Exit("to_zarr", "x", 40), lambda: None)
    text = str(caught.value)
    assert "2 of 40 shards failed" in text
    assert "all-00009: shard 9" in text
    assert "all-00030" in text
    assert {path.name for path in tmp_path.iterdir() if not path.suffix} == {
        str(n) for n in range(40) if n not in (9, 30)
    }
    tries_of = Counter(int(path.stem) for path in tmp_path.iterdir() if path.suffix)
    deaths = tries_of[30]  # which may each take a shard along that is under way
    assert all(2 <= tries_of[n] <= 2 + deaths for n in (5, 6, 9))


class Ahead(SchedulerPlugin):
    """Counts the tasks that a scheduler has at any time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.most, self.finished = scheduler, 0, 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.most = max(self.most, len(self.scheduler.tasks))
        self.finished += finish == "memory"


def nothing(item: int) -> None:
    """Do nothing."""


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_number_of_shards_is_sent_in_windows(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardruns, "AHEAD", count // 20)
    settings: dict[str, Any] = {"processes": False, "n_workers": 2, "threads_per_worker": 2}
    with (
        LocalCluster(**settings, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
    ):
        scheduler: Any = own.scheduler
        ahead = Ahead(scheduler)
        scheduler.add_plugin(ahead)
        write_shards(runner(client), trivial(count, nothing, 1), Exit("to_zarr", "x", count), lambda: None)
        until(lambda: not scheduler.tasks)
    assert ahead.finished == count
    assert ahead.most <= count // 20 + 8  # a round of four runs may begin below it


# Streams


class Readers(SchedulerPlugin):
    """Notes which worker has read each shard."""

    name = "readers"

    def __init__(self) -> None:
        self.worker: dict[str, str] = {}

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if finish == "memory" and "read-" in str(key)[:8]:
            self.worker[str(key).strip("('")] = kwargs["worker"]


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_of_a_stream_in_order_are_read_by_one_worker(chips: rd.Chips, threads: int) -> None:
    """A shuffled one has none; batches are those of threads."""
    reading = in_small_shards(chips.select("train"))
    settings: dict[str, Any] = {"processes": False, "n_workers": 2, "threads_per_worker": threads}
    together: dict[int | None, int] = {}
    with (
        dask.config.set(
            {"distributed.scheduler.work-stealing": False}
        ),  # it gives idle workers something to do
        LocalCluster(**settings, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
    ):
        for shuffle in (None, 4):
            readers = Readers()
            scheduler: Any = own.scheduler
            scheduler.add_plugin(readers)
            here, there = (
                list(Batching(16, client=c, shuffle=shuffle).stream(reading)) for c in (None, client)
            )
            scheduler.remove_plugin(readers.name)
            assert len(here) == len(there)
            for one, other in zip(here, there, strict=True):
                assert_same(one, other)
            workers = [readers.worker[key] for key in sorted(readers.worker)]
            assert len(workers) == len(reading.sizes) > 8
            together[shuffle] = sum(a == b for a, b in zip(workers[::2], workers[1::2], strict=False))
            pairs = len(workers) // 2
        until(lambda: not scheduler.tasks)
    assert together[None] == pairs > together[4]


# What explain() says


def test_explain_tells_what_workers_fetch(chips: rd.Chips) -> None:
    alone, two, many = chips.explain(), chips.explain(workers=2, threads=1), chips.explain(workers=500)
    assert "workers" not in alone.to_dict()
    assert two["workers"]["processes"] == 2
    assert two["workers"]["threads"] == 1
    assert alone["requests"] <= two["workers"]["requests"] <= many["workers"]["requests"]
    assert many["workers"]["requests"] == alone["requests_by_shard"]
    assert many["workers"]["tasks"] == alone["shards"]
    assert "by 2 processes of 1 threads" in str(two)
    for workers, threads in ((0, 1), (2, 0)):
        with pytest.raises(PlanError, match="at least 1 of each"):
            chips.explain(workers=workers, threads=threads)


def test_what_many_shards_fetch_is_estimated_from_what_borders_share(
    chips: rd.Chips, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, force = layout_of(chips, SHARD_BYTES).job, Workforce(4, 1)
    once, exact = (fetching(job, f, 0, None) for f in (Workforce(1, 1), force))
    monkeypatch.setattr(explained, "EXACT_SHARDS", 1)
    estimate = fetching(job, force, once.requests, once.read_bytes)
    assert not estimate.exact
    assert estimate.tasks == exact.tasks
    assert exact.requests * 0.8 <= estimate.requests <= exact.requests * 1.5
