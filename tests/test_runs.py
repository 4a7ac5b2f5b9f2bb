"""Neighbouring shards go to one worker process, in runs that any number of shards is sent in."""

from __future__ import annotations

import json
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
from part_processes import killed_in_the_middle
from servers import serving
from streams import assert_same, in_small_shards, until
from test_tiles_once import readme_chips
from test_write import layout_of, tries

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.show import fetching as explained
from rasteret_dask.show.fetching import fetching
from rasteret_dask.store import shardruns
from rasteret_dask.store.run import run_zarr
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.streams.stream import Batching
from rasteret_dask.tasks import runs as cutting
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.runs import LONGEST, SLACK, TILES_SHARE, Crew, Cuts, Workforce

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


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 6000))
def test_a_process_gets_its_share_in_one_piece(processes: int, threads: int, count: int) -> None:
    cuts = Cuts(np.full(count - 1, 10, dtype=np.int64), 100 * count)
    left = count
    for runs in cuts.rounds(range(count), Workforce(processes, threads)):
        share = min(-(-left // processes), LONGEST * threads)
        assert max(map(len, runs)) <= -(-(share + 2 * share // SLACK) // threads)
        assert len(runs) == min(left, processes * threads) or share < threads
        left -= sum(map(len, runs))


def test_a_run_ends_where_little_is_shared() -> None:
    borders = np.full(99, 100, dtype=np.int64)
    borders[4::5] = 1
    cuts = Cuts(borders, 100 * 100)
    for processes in (2, 4):
        (runs,) = cuts.rounds(range(100), Workforce(processes, 1))
        assert len(runs) == processes
        assert cuts.paid(runs) == processes - 1


many_shared = st.lists(st.integers(0, 400), min_size=1, max_size=120)


@given(many_shared, st.integers(1, 3), st.integers(0, 500), st.data())
def test_taking_over_pays(borders: list[int], threads: int, spare: int, data: st.DataObject) -> None:
    """What an idle process takes is the end of what waits; it is done sooner by more than tiles of both cost."""
    count = len(borders) + 1
    cuts = Cuts(np.array(borders, dtype=np.int64), 100 * count)
    first = data.draw(st.integers(0, count - 1))
    places = list(range(first, count))

    def gain(at: int) -> float:
        cost = TILES_SHARE * borders[places[at] - 1] / 100
        sooner = len(places) / threads - max(at / threads, len(places) - at + cost)
        return sooner if sooner >= cost and borders[places[at] - 1] <= spare else 0

    gains = [gain(at) for at in range(threads, len(places))]
    end = cuts.takeover(places, threads, spare)
    if end is None:
        assert max(gains, default=0) <= 0
    else:
        assert list(end.places) == places[len(places) - len(end.places) :]
        assert end.gain == pytest.approx(max(gains)) == pytest.approx(gains[-len(end.places)])


@given(many_shared, st.lists(st.integers(1, 9), min_size=2, max_size=5), st.booleans())
def test_processes_of_any_speed(borders: list[int], speeds: list[int], free: bool) -> None:
    """Nobody idles while a shard waits that costs nothing; what processes fetch once more is never above its limit."""
    count, force = len(borders) + 1, Workforce(len(speeds), 1)
    cuts = Cuts.free(count) if free else Cuts(np.array(borders, dtype=np.int64), 100 * count)
    (runs,) = cuts.rounds(range(count), force)
    paid, limit = cuts.paid(runs), cuts.allowance(range(count), force)
    left = [list(run) for run in [*runs, *[()] * (len(speeds) - len(runs))]]
    ends = [1 / speed if own else 0.0 for speed, own in zip(speeds, left, strict=True)]
    order: list[int] = []
    now = 0.0
    while any(left):
        now, number = min((end, at) for at, end in enumerate(ends) if left[at])
        order.append(left[number].pop(0))
        ends[number] = now + 1 / speeds[number]
        for idle in (at for at, own in enumerate(left) if not own):
            parts = [(cuts.takeover(own, 1, limit - paid), at) for at, own in enumerate(left) if own]
            best = max(((end, at) for end, at in parts if end), key=lambda part: part[0].gain, default=None)
            if best is not None:
                left[best[1]] = left[best[1]][: -len(best[0].places)]
                left[idle], ends[idle] = list(best[0].places), now + 1 / speeds[idle]
                paid += cuts.paid([best[0].places])
    assert sorted(order) == list(range(count))
    assert paid <= limit
    if free:
        assert now <= count / sum(speeds) + 1 / min(speeds) + 1e-9


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


def test_shards_that_wait_can_be_left_to_others() -> None:
    crew, done = Crew(), list[int]()
    begun, go = threading.Event(), threading.Event()

    def compute(place: int) -> None:
        begun.set()
        go.wait(60)
        done.append(place)

    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(crew.compute, "job", range(4, 12), compute, lambda: True)
        begun.wait(60)
        assert crew.give_up("another", range(20)) == ()
        assert crew.give_up("job", (2, 3, 4, 9, 10, 11)) == (9, 10, 11)  # 4 has begun, others it never had
        assert crew.places(lambda: "job") == frozenset(range(4, 9))
        assert crew.given_up("job") == {9, 10, 11}
        go.set()
        end.result()
    assert done == [4, 5, 6, 7, 8]
    assert crew.given_up("job") == frozenset()


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
    settings: dict[str, Any] = {"threads_per_worker": 1, "processes": True, "silence_logs": 50}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),  # each takes a new process
        LocalCluster(n_workers=2, dashboard_address=":0", **settings) as running,
    ):
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


@pytest.mark.parametrize("fill", [False, True])
def test_servers_send_no_more_bytes_than_explain_says(
    fill: bool, small_world: World, two: LocalCluster, tmp_path: Path
) -> None:
    """By one process, and by two that each compute a run or take over from each other; counted by the server."""
    root = Path(os.path.commonpath([small_world.sentinel2, small_world.landsat, small_world.embeddings]))
    with serving(root) as server:
        places = {"s2": small_world.sentinel2, "l8": small_world.landsat, "aef": small_world.embeddings}
        s2, l8, aef = (
            rd.build_from_stac(
                server.url(place.relative_to(root).as_posix()),
                name=name,
                date_range=("2024-04-01", "2024-06-30"),
            )
            for name, place in places.items()
        )
        chips = readme_chips(s2, l8, aef, fill=fill)
        layout = layout_of(chips, SHARD_BYTES)
        with Client(two, set_as_default=False) as client:
            for processes, running in ((1, None), (2, client)):
                most = fetching(layout.job, Workforce(processes, 1), 0, None)
                server.forget()
                run_zarr(layout, str(tmp_path / f"{processes}.zarr"), ReadContext(), running, progress=False)
                asked = server.asked("*.tif")
                sent = sum(one.nbytes for one in asked)
                assert 0 < len(asked) <= most.requests
                assert most.read_bytes is not None
                assert most.read_bytes / 4 < sent <= most.read_bytes


def test_what_a_run_has_written_is_not_read_again_where_its_worker_is_killed(
    chips: rd.Chips, two: LocalCluster, tmp_path: Path
) -> None:
    layout, store = layout_of(chips, SHARD_BYTES), tmp_path / "x.zarr"
    names = [shard.name for shard in layout.job.shards()]
    with (
        Client(two, set_as_default=False) as client,
        killed_in_the_middle(client, tmp_path / "notes", store, 3) as (_, noted),
    ):
        run_zarr(layout, str(store), ReadContext(), client, progress=False)
    before, tried = set(json.loads(noted.read_text())), tries(store)
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
        write_shards(
            runner(client), trivial(40, work), Exit("to_zarr", "x", 40), lambda: None, lambda *_: None
        )
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


@dataclass(frozen=True)
class Standing:
    """Work that leaves a file a shard and try; the first shard does not end before all others have."""

    folder: str
    others: int

    def __call__(self, item: int) -> None:
        folder = Path(self.folder)
        if item == 0:
            until(lambda: len({path.stem for path in folder.iterdir()}) == self.others)
        Path(folder, f"{item}.{os.getpid()}").touch()


def test_who_is_done_sooner_takes_over_what_another_has_left(two: LocalCluster, tmp_path: Path) -> None:
    """A process that stands still loses all that waits for it; nothing is computed twice."""
    shards, settled = trivial(40, Standing(str(tmp_path), 39), 0), list[str]()
    with Client(two, set_as_default=False) as client:
        write_shards(
            runner(client),
            shards,
            Exit("to_zarr", "x", 40),
            lambda: None,
            lambda names, _: settled.extend(names),
        )
    assert sorted(settled) == sorted(shards.names)
    process = {int(path.stem): path.suffix for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(process) == 40
    slow = [item for item in process if process[item] == process[0]]
    assert slow == [0]


class Ahead(SchedulerPlugin):
    """Counts the tasks that a scheduler has at any time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.most, self.finished = scheduler, 0, 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.most = max(self.most, len(self.scheduler.tasks))
        self.finished += finish == "memory"


def nothing(item: int) -> None:
    """Do nothing."""


@pytest.mark.parametrize("count", [2_000, pytest.param(6_000, marks=pytest.mark.slow)])
def test_any_number_of_shards_is_sent_in_windows(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardruns, "AHEAD", count // 20)
    monkeypatch.setattr(cutting, "LONGEST", 1)
    settings: dict[str, Any] = {"processes": False, "n_workers": 2, "threads_per_worker": 2}
    with (
        LocalCluster(**settings, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
    ):
        scheduler: Any = own.scheduler
        ahead = Ahead(scheduler)
        scheduler.add_plugin(ahead)
        write_shards(
            runner(client),
            trivial(count, nothing, 1),
            Exit("to_zarr", "x", count),
            lambda: None,
            lambda *_: None,
        )
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
