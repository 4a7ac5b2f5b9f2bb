"""A cluster by one word: sized by the plan, always taken down, and refused where its memory cannot do."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from dask.utils import parse_bytes
from distributed import Client, LocalCluster, WorkerPlugin, get_client
from hypothesis import given
from hypothesis import strategies as st
from launching_processes import clustered
from pages import ROOT
from part_processes import SHRUNK, hold, planned, shrink
from processes import NEW_PROCESSES
from waiting import until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.launching.cluster import KINDS, MOST_WORKERS
from rasteret_dask.launching.request import WORKER_ENVIRONMENT
from rasteret_dask.tasks.workermemory import (
    MOST_TASK_BYTES,
    TaskMemory,
    limit_bytes,
    memory_here,
    needed_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

MIB = 2**20


@pytest.fixture(scope="module")
def chips(small_world: World) -> rd.Chips:
    """Return chips of 17 shards, as the processes of tests plan them too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHRUNK.items():
            patch.setattr(f"rasteret_dask.{name}", value)
        made = planned(str(small_world.sentinel2))
        assert made.job.shard_count == 17
        return made


def children() -> set[int]:
    """Return the processes of this one, but those that Python keeps for starting others."""
    me, kept = psutil.Process(), ("resource_tracker", "forkserver")
    starters = {one.pid for one in me.children() if any(word in " ".join(one.cmdline()) for word in kept)}
    return {one.pid for one in me.children(recursive=True)} - starters


# Sizes


@given(st.integers(1, 64), st.integers(1, 2**32), st.integers(0, 2**29))
def test_a_limit_holds_what_is_needed_and_dask_begins_tasks_until_then(
    threads: int, task: int, kept: int
) -> None:
    limit, needed = limit_bytes(threads, task, kept), needed_bytes(threads, task, kept)
    assert limit % (256 * MIB) == 0
    assert needed <= 0.8 * limit <= needed + 0.8 * 256 * MIB
    assert needed_bytes(threads + 1, task, kept) - needed == task


def test_without_a_plan_a_worker_has_what_any_job_needs() -> None:
    assert needed_bytes(2) == 800 * 10**6 + 2 * MOST_TASK_BYTES
    assert MOST_TASK_BYTES == 3 * 128 * MIB


def test_explain_tells_the_size_of_a_worker(chips: rd.Chips) -> None:
    told = chips.explain()
    assert (told["worker_threads"], told["worker_bytes"]) == (2, told.worker_bytes(2))
    assert "worker            a memory limit of " in str(told)
    told = chips.explain(workers=3, threads=4)
    assert (told["worker_threads"], told["worker_bytes"]) == (4, told.worker_bytes(4))
    assert told.worker_bytes(4) <= limit_bytes(4)


# A cluster of this machine


def test_workers_are_as_the_plan_wants_them(chips: rd.Chips, tmp_path: Path) -> None:
    before, environment = children(), dict(os.environ)
    size = rd.WorkerSize(threads=3, environment={"GDAL_CACHEMAX": "64", "MINE": "1"})
    configured = {**NEW_PROCESSES, "distributed.nanny.environ": {"THEIRS": "2"}}
    with dask.config.set(configured), rd.cluster("local", chips=chips, workers=2, size=size) as client:
        client.wait_for_workers(2)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert {(w["nthreads"], w["memory_limit"]) for w in workers} == {(3, chips.explain().worker_bytes(3))}
        wanted = {**WORKER_ENVIRONMENT, "GDAL_CACHEMAX": "64", "MINE": "1", "THEIRS": "2"}
        for there in client.run(lambda: dict(os.environ)).values():
            assert there.items() >= wanted.items()
        assert get_client() is client
        chips.to_zarr(tmp_path / "x.zarr", progress=False)  # on the current client
        assert len(client.run(os.getpid)) == 2
        assert not [name for name in os.environ.keys() - environment if name.startswith(("GDAL_", "MINE"))]
    kept = {name: os.environ.get(name) for name in wanted}  # other libraries of this process read them too
    assert kept == {name: environment.get(name) for name in wanted}
    assert not children() - before
    assert rd.job_report(tmp_path / "x.zarr").committed


def test_chips_are_planned_before_the_cluster_starts(chips: rd.Chips) -> None:
    """A cluster counts the time of planning as idle."""
    some = chips.sample(3)
    assert "planned" not in vars(some)
    rd.cluster("local", chips=some)  # it starts with the block
    assert "planned" in vars(some)


@pytest.mark.slow
def test_there_are_as_many_workers_as_the_plan_and_the_machine_have_room_for(chips: rd.Chips) -> None:
    with rd.cluster("local", chips=chips, size=rd.WorkerSize(threads=1)) as client:
        cluster: Any = client.cluster
        assert len(cluster.plan) == min(MOST_WORKERS, os.cpu_count() or 1, memory_here() // (512 * MIB))
    with rd.cluster("local", chips=[chips.sample(1), chips.sample(1)]) as client:
        cluster = client.cluster
        assert len(cluster.plan) == 1


def test_an_address_is_only_connected_to(chips: rd.Chips, tmp_path: Path) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as running:
        with rd.cluster(running.scheduler_address) as client:
            assert get_client() is client
            chips.to_zarr(tmp_path / "x.zarr", progress=False)
        assert client.status == "closed"
        assert running.status.name == "running"
        assert len(running.scheduler.workers) == 1
        for arguments in ({"workers": 3}, {"size": rd.WorkerSize()}, {"options": {"queue": "short"}}):
            with pytest.raises(rd.PlanError, match="the cluster at an address has its workers"):
                rd.cluster(running.scheduler_address, **arguments)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "address": ("head:8786", {}, "'head:8786'; expected .*Did you mean 'tcp://head:8786'"),
    "word": ("kubernets", {}, "'kubernets'; expected one of .*Did you mean 'kubernetes'"),
    "none": ("local", {"workers": 0}, r"workers=\): found 0; expected how many"),
    "turned": ("local", {"workers": (4, 1)}, r"found \(4, 1\); expected how many"),
    "half": ("local", {"workers": 1.5}, r"found 1.5; expected how many"),
    "option": ("local", {"options": {"idle_timeuot": 3}}, "'idle_timeuot'.*Did you mean 'idle_timeout'"),
    "time": ("local", {"options": {"idle_timeout": "soon"}}, "idle_timeout: found 'soon'; expected seconds"),
    "failures": ("local", {"options": {"allowed_failures": -1}}, "allowed_failures: found -1"),
    "image": (
        "slurm",
        {"size": rd.WorkerSize(image="a/b:1")},
        r"image='a/b:1'\); expected no image.*Leave image out",
    ),
    "chips": ("local", {"chips": 5}, r"chips=\): found 5; expected chips"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_told_before_anything_is_started(case: str) -> None:
    place, arguments, words = REFUSED[case]
    with pytest.raises(rd.PlanError, match=words):
        rd.cluster(place, **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [("threads", 0), ("threads", 1.0), ("memory", "much"), ("memory", 1024), ("lifetime", "soon"), ("lifetime", -1)],
)  # fmt: skip
def test_a_size_is_one(field: str, value: Any) -> None:
    with pytest.raises(rd.PlanError, match=rf"WorkerSize\({field}=\): found {value!r}"):
        rd.WorkerSize(**{field: value})


def test_every_kind_says_what_it_takes() -> None:
    for kind in KINDS:
        with pytest.raises(rd.PlanError, match=rf"cluster\('{kind}', options=\): found 'nonsense'"):
            rd.cluster(kind, options={"nonsense": 1})


def test_the_page_has_every_option_of_every_kind() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text().splitlines()
    for kind in KINDS:
        for name, words in import_module(f"rasteret_dask.launching.{kind}").OPTIONS.items():
            assert f'| `{name}` | `"{kind}"` | {words} |' in page


# It is always taken down


def alive(pids: list[int]) -> list[int]:
    """Return which processes run; those that have ended and wait for whoever adopted them do not."""
    there = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                there.append(pid)
        except psutil.NoSuchProcess:
            continue
    return there


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "SIGKILL", "error"])
def test_nothing_is_left_however_the_client_ends(
    small_world: World, chips: rd.Chips, tmp_path: Path, end: str
) -> None:
    store, notes = tmp_path / "x.zarr", tmp_path / "notes"
    notes.mkdir()
    arguments = (str(small_world.sentinel2), str(store), str(notes), end)
    process = multiprocessing.get_context("forkserver").Process(target=clustered, args=arguments)
    process.start()
    until((notes / "pids.json").exists)
    pids = json.loads((notes / "pids.json").read_text())
    assert len(pids) >= 3  # a worker each, and what Python starts them by
    if end != "error":
        until(lambda: list(notes.glob("begun.*")))
        os.killpg(pids[0], getattr(signal, end)) if end == "SIGINT" else os.kill(
            pids[0], getattr(signal, end)
        )
        (notes / "go").touch()
    process.join()
    assert process.exitcode == {"SIGTERM": 143, "SIGINT": 1, "SIGKILL": -9, "error": 1}[end]
    until(lambda: not alive(pids))
    assert (notes / "left").exists() == (end != "SIGKILL")
    chips.to_zarr(store, progress=False)
    assert rd.verify(store).ok


@contextmanager
def once(happened: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Act as soon as something has happened during a block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            if happened():
                action()
                return

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


class Held(WorkerPlugin):
    """Has each worker wait for a file, but for a few shards."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, worker: Any) -> None:
        shrink()
        hold(self.folder)


@pytest.mark.slow
def test_its_number_of_workers_follows_the_work(chips: rd.Chips, tmp_path: Path) -> None:
    store, notes = tmp_path / "x.zarr", tmp_path / "notes"
    notes.mkdir()
    size = rd.WorkerSize(threads=1)
    with rd.cluster(
        "local", chips=chips, workers=(1, 3), size=size, options={"allowed_failures": 0}
    ) as client:
        cluster: Any = client.cluster
        scheduler: Any = cluster.scheduler
        client.wait_for_workers(1)
        assert len(scheduler.workers) == 1
        client.register_plugin(Held(str(notes)))
        most = [0]

        def grown() -> bool:
            most[0] = max(most[0], len(scheduler.workers))
            return most[0] == 3

        with once(grown, (notes / "go").touch):
            report = chips.to_zarr(store, progress=False)
        assert report.committed
        assert most == [3]
        until(lambda: len(scheduler.workers) == 1)  # and down again
        assert len(scheduler.workers) == 1
    assert rd.verify(store).ok


def test_a_thread_is_asked_for_each_task_before_any_has_ended(chips: rd.Chips) -> None:
    """By itself, Dask takes half a second a task: ten of them are asked one worker for."""
    splits = chips.explain()["splits"]
    assert splits
    with (
        dask.config.set({"distributed.adaptive.interval": "1 hour"}),  # no worker ever comes
        rd.cluster("local", chips=chips, workers=(0, 50)) as client,
    ):
        cluster: Any = client.cluster
        for prefix in ("stats", "mine", *(f"write-{name}" for name in splits)):
            keys = [f"{prefix}-{number:05d}" for number in range(10)]
            futures = [client.submit(abs, -1, key=key, pure=False) for key in keys]
            until(lambda: cluster.scheduler.tasks.keys() >= set(keys))  # noqa: B023
            assert client.sync(target, cluster) == (1 if prefix == "mine" else 10), prefix
            client.cancel(futures, force=True)
            until(lambda: not cluster.scheduler.tasks)


FRESH = """
import dask, rasteret_dask as rd
key = "distributed.scheduler.default-task-durations"
with rd.cluster("local", workers=(0, 1)):
    assert dask.config.get(key)["write-train"] == "60s"
assert dask.config.get("distributed.scheduler.allowed-failures") == 3
assert dask.config.get(key).keys() >= {"rechunk-split"}
assert "write-train" not in dask.config.get(key)
"""


def test_dask_s_configuration_is_afterwards_what_it_was() -> None:
    """In a process that has not imported distributed before."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def target(cluster: Any) -> int:
    """Return how many workers a scheduler wants."""
    return int(cluster.scheduler.adaptive_target())


# Memory


@pytest.fixture(scope="module")
def large(small_world: World) -> rd.Chips:
    """Return chips of full shards: tasks of 126 MiB output each."""
    s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))
    return s2.harmonize(["red", "nir"], time="1MS").chips(256, stride=8, cell_km=20.48)


def test_a_job_that_cannot_run_is_refused_before_its_first_shard(large: rd.Chips, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    settings: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": ":0"}
    with (
        dask.config.set(NEW_PROCESSES),
        LocalCluster(memory_limit="320MiB", **settings) as own,
        Client(own, set_as_default=False) as client,
    ):
        for call in (
            lambda: large.to_zarr(store, client=client, progress=False),
            lambda: next(large.stream(4, client=client)),
            lambda: large.stats(client=client, progress=False),
        ):
            with pytest.raises(
                rd.JobError, match=r"2 workers of 320MiB for 2 threads.*memory limit of"
            ) as told:
                call()
        assert not list((store / "_job").glob("done/*"))
    # the sizes that the message names would do
    limits = re.findall(r"([\d.]+[MG]iB) for (\d)", told.value.expected)
    assert [int(threads) for _, threads in limits] == [2, 1]
    for limit, threads in limits:
        assert parse_bytes(limit) == large.explain().worker_bytes(int(threads))
        assert not need(large).check("x", workers([(parse_bytes(limit), int(threads))]))


def need(chips: rd.Chips) -> TaskMemory:
    return TaskMemory(chips.job, chips._layout.outputs, together=False)


def workers(sizes: list[tuple[int | None, int]]) -> dict[str, dict[str, Any]]:
    """Return what a scheduler says of workers of so much memory, and so many threads."""
    return {
        f"tcp://{number}": {"memory_limit": memory, "nthreads": threads}
        for number, (memory, threads) in enumerate(sizes)
    }


def test_nobody_is_refused_for_what_is_not_certain(large: rd.Chips) -> None:
    memory = need(large)
    assert memory.least_bytes < memory.most_of(1)
    enough: list[list[tuple[int | None, int]]] = [
        [(None, 8)], [(0, 8)], [(None, 1), (2**20, 1)], [(2**20, 1), (2**34, 1)],
    ]  # fmt: skip
    for sizes in enough:
        memory.check("x", workers(sizes))  # some have enough, or do not tell
    least = memory.least_of(2, 1)
    assert "may run out of memory" in memory.check("x", workers([(least, 2)]))
    with pytest.raises(rd.JobError, match="expected workers with a memory limit of"):
        memory.check("x", workers([(least - 1, 2)]))
    assert memory.check("x", workers([(memory.most_of(2), 2)])) == ""


def test_no_more_tasks_are_counted_than_there_are(large: rd.Chips) -> None:
    """One shard never holds what eight threads could; and shards are shared by workers."""
    memory = need(large)
    full = large.job.shard_count - 1
    assert memory.least_of(1000, 1) == memory.least_of(full, 1)
    assert memory.least_of(1000, full) == memory.least_of(1, 1)
    one = need(large.sample(1))
    assert one.least_of(8, 1) == one.least_of(1, 1) < memory.least_of(1, 1)
