"""A script starts soon: what is imported, step by step, and that a job of one process starts no cluster."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import dask
import psutil
import pytest
from waiting import PATIENCE_S

from rasteret_dask.demo.world import World
from rasteret_dask.progress import Progress
from rasteret_dask.store import onthreads
from rasteret_dask.store.onthreads import ThreadTasks, threads_that_fit
from rasteret_dask.store.runtasks import Run, Work
from rasteret_dask.tasks import workermemory
from rasteret_dask.tasks.freezing import SHARD_BYTES

# Half a second of CPU and more together; where Jupyter is installed, some bring along all of it.
SEARCH = ["pystac_client", "jsonschema"]
CLUSTER = ["distributed", "bokeh"]
PIXELS = [
    "stackstac", "rioxarray", "rasterio", "boto3", "xarray", "imagecodecs", "dask.array", "zarr", "IPython",
    "urllib3",
]  # fmt: skip
ROOMS = ["reader", "cubes", "tasks", "store", "streams", "statistics", "show", "training", "demo"]
"""Rooms of the package that a plan of chips has no use for."""
EVERY = [*SEARCH, *CLUSTER, *PIXELS, *(f"rasteret_dask.{room}" for room in ROOMS)]

SCRIPT = """
import sys
import rasteret_dask as rd

def loaded(step):
    print(step, *(name for name in sys.argv[3:] if name in sys.modules))

if __name__ == "__main__":
    loaded("bare")
    print("modules", sum(name.startswith("rasteret_dask.") for name in sys.modules))
    rd.build, rd.build_from_table, rd.load
    loaded("import")
    s2 = rd.build_from_stac(sys.argv[1], name="s2")
    loaded("build")
    s2.export(sys.argv[2] + ".parquet")
    rd.load(sys.argv[2] + ".parquet")
    loaded("load")
    chips = s2.harmonize(bands=["red"], units="reflectance").chips(size=32, cell_km=0.96).sample(20)
    len(chips)
    loaded("plan")
    chips.explain()
    loaded("explain")
    chips.to_zarr(sys.argv[2], progress=False)
    loaded("to_zarr")
"""


def test_each_step_imports_what_it_needs(small_world: World, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, small_world.sentinel2, tmp_path / "x.zarr", *EVERY],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    steps = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert steps["modules"] == {"1"}  # _version
    for step in ("bare", "import", "build", "load", "plan"):
        assert steps[step] == set(), step
    assert steps["explain"].isdisjoint([*SEARCH, *CLUSTER])
    assert steps["to_zarr"].isdisjoint(["jsonschema", *CLUSTER])


# Threads of this process


def runs_of(count: int) -> list[Run]:
    return [Run(f"t{n}", (f"train-{n:05d}",), (n,), (n,), True) for n in range(count)]


def ended(threads: ThreadTasks) -> dict[str, BaseException | None]:
    """Return what each shard has ended with, in the order of their ends."""
    result: dict[str, BaseException | None] = {}
    while threads.unfinished:
        result |= {news.name: news.error for news in threads.news()}
    return result


def test_threads_compute_in_order_and_each_shard_ends_once() -> None:
    begun: list[int] = []

    def compute(number: int, function: Callable[[int], int]) -> None:
        begun.append(function(number))
        if number == 3:
            raise OSError("three")

    work, runs = Work(compute, "digest", {"double": lambda number: 2 * number}), runs_of(20)
    threads = ThreadTasks(1)
    with threads.watched(work, runs[0], "a job", Progress("shards", shown=False)):
        threads.send(work, runs)
        ends = ended(threads)
    assert list(ends) == [run.names[0] for run in runs]
    assert begun == list(range(0, 40, 2))
    assert {name: str(error) for name, error in ends.items() if error is not None} == {"train-00003": "three"}


def test_who_interrupts_waits_for_what_runs_and_begins_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    done: list[int] = []
    go = threading.Event()

    def compute(number: int) -> None:
        begun.append(number)
        if number > 0:
            go.wait(PATIENCE_S)
        done.append(number)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            go.set()  # what runs goes on only now
            super().shutdown(wait=wait)

    monkeypatch.setattr(onthreads, "ThreadPoolExecutor", Pool)
    work, runs = Work(compute, "digest", {}), runs_of(50)
    threads = ThreadTasks(2)

    def interrupted() -> None:
        with threads.watched(work, runs[0], "a job", Progress("shards", shown=False)):
            threads.send(work, runs)
            threads.news()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(begun) == sorted(done)  # nothing goes on behind the caller's back
    assert len(begun) <= 3


def test_what_stands_still_is_named(caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()

    def compute(number: int) -> None:
        told.wait(PATIENCE_S)

    work, runs = Work(compute, "digest", {}), runs_of(1)
    threads = ThreadTasks(1)

    class Told(Progress):
        def note(self, text: str) -> None:
            told.set()

    patience = {"rasteret_dask.watch.look": "5ms", "rasteret_dask.watch.no-progress": "20ms"}
    with (
        dask.config.set(patience),
        caplog.at_level("WARNING", "rasteret_dask"),
        threads.watched(work, runs[0], "to_zarr x", Told("shards", shown=False)),
    ):
        threads.send(work, runs)
        assert ended(threads) == {"train-00000": None}
    text = r"to_zarr x: nothing has begun or ended for \d+ s; running: train-00000 for \d+ s"
    assert re.search(text, caplog.text)


def test_there_are_no_more_threads_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onthreads, "CPU_COUNT", 64)
    monkeypatch.setattr(workermemory, "CGROUPS", tmp_path)  # no limit of a container
    for total, count in ((2**28, 1), (800e6 + 7 * 3 * SHARD_BYTES, 7), (2**50, 64)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert threads_that_fit() == count


def test_whoever_says_how_many_threads_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onthreads, "CPU_COUNT", 64)
    for count in (1, 3):
        with dask.config.set(num_workers=count):
            assert threads_that_fit() == count


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{int(800e6 + 2 * 3 * SHARD_BYTES)}\n")
    monkeypatch.setattr(onthreads, "CPU_COUNT", 64)
    monkeypatch.setattr(workermemory, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**50))
    assert threads_that_fit() == 2
