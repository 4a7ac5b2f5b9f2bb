"""Clusters that cannot do a job say so: workers without the package, no workers, workers that stand still."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
from dask._task_spec import DataNode, Task
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from streams import Shards, flat, until
from test_write import layout_of

import rasteret_dask as rd
from rasteret_dask._version import __version__
from rasteret_dask.compacting import compact
from rasteret_dask.errors import JobError
from rasteret_dask.net import probe
from rasteret_dask.net.readiness import LIBRARIES, Readiness, by_value
from rasteret_dask.net.watch import Watch
from rasteret_dask.progress import Progress
from rasteret_dask.statistics.measuring import Pass, computed
from rasteret_dask.store.run import run_zarr
from rasteret_dask.tasks.context import ReadContext

ROOT = Path(__file__).parents[1]
QUICK = {
    "rasteret_dask.watch.look": "200ms",
    "rasteret_dask.watch.no-workers": "1s",
    "rasteret_dask.watch.no-progress": "1s",
    "rasteret_dask.watch.no-heartbeat": "2s",
    "rasteret_dask.progress.every": "500ms",
}

START_S = 300
"""Seconds that a process may take to start on a machine that is busy."""


@pytest.fixture(scope="module")
def scheduler() -> Iterator[LocalCluster]:
    """Return a scheduler without workers; one lost worker is as much as a task may outlive."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=0, processes=True, dashboard_address=":0") as running,
    ):
        yield running


@pytest.fixture
def client(scheduler: LocalCluster) -> Iterator[Client]:
    with Client(scheduler, set_as_default=False) as running, dask.config.set(QUICK):
        yield running


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder that hides the package, as an image without it does."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "rasteret_dask").mkdir()
    (folder / "rasteret_dask" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'rasteret_dask'\", name='rasteret_dask')\n"
    )
    return str(folder)


@contextmanager
def worker(cluster: LocalCluster, folder: Path, *path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker process that imports from a path; end it, and wait until the scheduler knows."""
    command = [
        "distributed.cli.dask_worker",
        cluster.scheduler_address,
        "--host",
        "127.0.0.1",
        "--nthreads",
        "1",
    ]
    command += ["--no-dashboard", "--no-nanny", "--local-directory", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT), str(ROOT / "tests")])},
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        before = set(scheduler_of(cluster).workers)
        try:
            yield running
        finally:
            running.kill()
            running.wait()
            until(lambda: set(scheduler_of(cluster).workers) <= before)


def scheduler_of(cluster: LocalCluster) -> Any:
    return cluster.scheduler


def shards(folder: Path, count: int, **more: Any) -> Shards:
    return Shards(folder / folder.name, (2,) * count, **more)


def compute(made: Shards, client: Client) -> list[int]:
    """Compute made-up shards as statistics are; return the chips of each."""
    _, tasks = made.reading.tasks()
    parts = {key: (key,) for key, _ in tasks}
    return [len(found["chip_id"]) for found in computed(dict(tasks), parts, client, Pass())]


class Computing(threading.Thread):
    """Computes made-up shards on a thread."""

    def __init__(self, made: Shards, client: Client) -> None:
        super().__init__()
        self.made, self.client, self.found = made, client, list[int]()
        self.error: JobError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.found = compute(self.made, self.client)
        except JobError as error:
            self.error = error


# Who cannot do it


def test_workers_without_the_package_are_named_by_every_exit_and_replaced_it_goes_on(
    s2: rd.Collection, scheduler: LocalCluster, client: Client, without: str, tmp_path: Path
) -> None:
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(20)
    finished = tmp_path / "finished"
    chips.to_zarr(finished, progress=False)
    stored = rd.open_chips(finished)
    exits: list[Callable[[], Any]] = [
        lambda: chips.to_zarr(tmp_path / "store", client=client, progress=False),
        lambda: chips.stats(client=client),
        lambda: next(chips.stream(4, client=client)),
        lambda: next(stored.stream(4, client=client)),
        lambda: compact(finished, tmp_path / "compact", client=client),
    ]
    with worker(scheduler, tmp_path, without):
        client.wait_for_workers(1, timeout=START_S)
        (address,) = client.scheduler_info(n_workers=-1)["workers"]
        for leave in exits:
            with pytest.raises(JobError) as raised:
                leave()
            message = str(raised.value)
            assert f"worker {address} ({socket.gethostname()}): ModuleNotFoundError" in message
            assert "1 of 2 hosts" in message
            assert f"rasteret_dask {__version__}" in message
        assert list(client.scheduler_info(n_workers=-1)["workers"]) == [address], "it was sent something"
    with worker(scheduler, tmp_path):
        client.wait_for_workers(1, timeout=START_S)
        for leave in exits:
            leave()
    assert rd.open_chips(tmp_path / "store").stored.sizes == stored.stored.sizes


def test_a_module_of_the_user_s_that_workers_lack_is_named(
    s2: rd.Collection,
    scheduler: LocalCluster,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "only_here.py").write_text("def half(chips):\n    return chips / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    from only_here import half  # type: ignore[import-not-found]

    chips = s2.harmonize(bands=["red"], time="1MS").chips(32, cell_km=0.96).sample(20).map(half)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with worker(scheduler, elsewhere):
        client.wait_for_workers(1, timeout=START_S)
        with pytest.raises(JobError, match=r"(?s)No module named 'only_here'.*modules of your own functions"):
            chips.to_zarr(tmp_path / "store", client=client, progress=False)


def test_a_worker_that_joins_without_the_package_is_named_and_costs_no_shard_a_try(
    scheduler: LocalCluster, client: Client, without: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With no failure allowed, a worker that ended at a task would fail it for good."""
    made = shards(tmp_path, 12, waits=True)
    with worker(scheduler, tmp_path):
        client.wait_for_workers(1, timeout=START_S)
        running = Computing(made, client)
        until(lambda: guarded(scheduler))
        with worker(scheduler, tmp_path, without) as bad:
            until(lambda: "was sent away" in caplog.text or not running.is_alive())
            assert bad.wait(START_S) == 0
        (made.log / "go").touch()
        running.join(START_S)
    assert running.found == [2] * 12
    (line,) = [own.getMessage() for own in caplog.records if "was sent away" in own.getMessage()]
    assert "ModuleNotFoundError: No module named 'rasteret_dask'" in line
    assert socket.gethostname() in line
    assert line in capsys.readouterr().err
    assert set(made.reads.values()) == {1}
    assert not guarded(scheduler)


def guarded(cluster: LocalCluster) -> bool:
    """Tell whether workers that join are asked."""
    return any(name.startswith("rasteret") for name in scheduler_of(cluster).worker_plugins)


def test_where_only_such_workers_come_the_job_ends(
    scheduler: LocalCluster, client: Client, without: str, tmp_path: Path
) -> None:
    running = Computing(shards(tmp_path, 4), client)
    until(lambda: guarded(scheduler))
    with worker(scheduler, tmp_path, without):
        running.join(START_S)
    assert re.search(r"(?s)no worker for .* but 1 that cannot.*ModuleNotFoundError", str(running.error))
    until(lambda: not scheduler_of(scheduler).tasks)


def test_a_guard_that_outlives_its_client_lets_everybody_in(
    scheduler: LocalCluster, client: Client, without: str, tmp_path: Path
) -> None:
    question = Readiness.of(client, "x", {"a": Task("a", rd.build, "x")}).question
    by_value()
    gate = probe.HostGate(question, str(MEANING), "Client-that-was-killed", "topic", frozenset())
    client.register_plugin(gate, name="left")
    with worker(scheduler, tmp_path, without):
        client.wait_for_workers(1, timeout=START_S)
        until(lambda: scheduler_of(scheduler).workers and all(
            own.status.name == "running" for own in scheduler_of(scheduler).workers.values()))  # fmt: skip
        assert list(client.run(os.getpid).values())
    assert not client.get_events("topic")
    client.unregister_worker_plugin("left")


# What stands still


def test_without_workers_a_line_says_so_and_it_goes_on_once_there_is_one(
    s2: rd.Collection, scheduler: LocalCluster, client: Client, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(20)
    layout = layout_of(chips)
    writing = threading.Thread(
        target=run_zarr, args=(layout, str(tmp_path / "store"), ReadContext(), client, True)
    )
    writing.start()
    until(lambda: "no workers for" in caplog.text)
    with worker(scheduler, tmp_path):
        writing.join(START_S)
    assert len(rd.open_chips(tmp_path / "store")) == len(chips)
    err = capsys.readouterr().err
    assert f"to_zarr {tmp_path / 'store'}: no workers for" in err
    assert scheduler.scheduler_address in err
    assert f"0/{len(list(layout.job.shards()))} shards" in err
    assert "0 running on 0 workers" in err


def test_a_worker_that_is_stopped_is_named_with_what_it_has(
    scheduler: LocalCluster, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = shards(tmp_path, 12, waits=True)
    with worker(scheduler, tmp_path) as process:
        client.wait_for_workers(1, timeout=START_S)
        (address,) = client.scheduler_info(n_workers=-1)["workers"]
        running = Computing(made, client)
        until(lambda: made.log.exists() and made.reads)
        process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: "it has read-" in caplog.text and "; running: read-" in caplog.text)
        finally:
            (made.log / "go").touch()
            process.send_signal(signal.SIGCONT)
        running.join(START_S)
    assert running.found == [2] * 12
    silent = next(own.getMessage() for own in caplog.records if "it has read-" in own.getMessage())
    assert f"worker {address}" in silent
    assert "no sign of life" in silent
    standing = next(own.getMessage() for own in caplog.records if "; running: read-" in own.getMessage())
    assert "nothing has begun or ended for" in standing
    assert f" on {address}" in standing


def test_a_worker_that_is_lost_is_named_with_what_it_had(caplog: pytest.LogCaptureFixture) -> None:
    """Once; one that had nothing is not."""
    workers = {address: {"name": f"w{address}", "host": "h"} for address in ("a", "b", "c")}
    processing = {"a": ["k"], "b": ["other"], "c": []}
    answers: Any = SimpleNamespace(
        scheduler_info=lambda n_workers: {"workers": dict(workers)}, processing=lambda: dict(processing)
    )
    watch = Watch(answers, "to_zarr x", {"k": "train-00003"}, Progress("shards", shown=False))
    watch.look()
    for address in ("a", "b"):
        del workers[address], processing[address]
    watch.look()
    watch.look()
    assert caplog.messages == [
        "to_zarr x: worker a (wa at h) is gone; it had train-00003, which another one does"
    ]


# Versions, with answers of a cluster that is made up

VERSIONS, MEANING = probe.versions_here(LIBRARIES)
DASK = {"python": "3.11.7.final.0", "dask": "2026.8.0", "distributed": "2026.8.0", "cloudpickle": "3.1.2"}


class Made:
    """A client of hosts whose versions are made up."""

    def __init__(self, answers: dict[str, dict[str, Any]], packages: dict[str, dict[str, str]]) -> None:
        self.answers, self.packages, self.calls = answers, packages, Counter[str]()
        self.scheduler = SimpleNamespace(address="tcp://scheduler")

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {a: {} for a in self.answers if a != "tcp://scheduler"}}

    def get_versions(self) -> dict[str, Any]:
        self.calls["get_versions"] += 1
        hosts = {a: {"packages": DASK | self.packages.get(a, {})} for a in self.answers}
        return {"client": {"packages": DASK}, "scheduler": hosts.pop("tcp://scheduler"), "workers": hosts}

    def run(self, *_: Any, on_error: str) -> dict[str, Any]:
        assert on_error == "return"
        return {a: own for a, own in self.answers.items() if a != "tcp://scheduler"}

    def run_on_scheduler(self, *_: Any) -> dict[str, Any]:
        return self.answers["tcp://scheduler"]


def answer(**more: Any) -> dict[str, Any]:
    versions = VERSIONS | more.pop("versions", {})
    return {"host": "node", "versions": versions, "meaning": MEANING, "obstacle": "", **more}


def hosts(**workers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"tcp://scheduler": answer(), **{f"tcp://{name}": own for name, own in workers.items()}}


def readiness(made: Made) -> Readiness:
    return Readiness(made, "to_zarr x", (b"task",))  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.sampled_from("abcde"), st.sampled_from([None, "numpy", "zarr", "rasterio"]), min_size=1
    )
)
def test_versions_that_need_not_matter_are_one_warning(other: dict[str, str | None]) -> None:
    workers = {name: answer(versions={lib: "0.0.1"} if lib else {}) for name, lib in other.items()}
    made = Made(hosts(**workers), {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        addresses = readiness(made).check()
        assert readiness(made).check() == addresses
    assert addresses == {f"tcp://{name}" for name in other}
    assert made.calls["get_versions"] == 1, "hosts that have answered are not asked again"
    assert len(seen) == bool(set(other.values()) - {None})
    for name, library in other.items():
        if library:
            text = str(seen[0].message)
            assert f"{library} 0.0.1 at" in text
            assert f"tcp://{name}" in text
            assert f"(here {VERSIONS[library]})" in text


@pytest.mark.parametrize(
    ("answers", "packages", "words"),
    [
        (hosts(a=answer(), b=answer(meaning="0")), {}, ["1 of 3 hosts", "worker tcp://b (node)", "other pixels"]),
        (hosts(a=answer(obstacle="ImportError: x")), {}, ["worker tcp://a (node): ImportError: x"]),
        (hosts(a=answer()), {"tcp://a": {"python": "3.12.1.final.0"}}, ["tcp://a: Python 3.12, here 3.11"]),
        (hosts(a=answer(obstacle="TypeError: x")), {"tcp://a": {"dask": "2025.1.0"}}, ["dask 2025.1.0 at tcp://a"]),
        ({**hosts(a=answer()), "tcp://scheduler": answer(obstacle="ImportError: x")}, {},
         ["scheduler tcp://scheduler (node): ImportError: x"]),
    ],
)  # fmt: skip
def test_what_matters_is_an_error(
    answers: dict[str, dict[str, Any]], packages: dict[str, dict[str, str]], words: list[str]
) -> None:
    with pytest.raises(JobError) as raised:
        readiness(Made(answers, packages)).check()
    for word in [*words, "same environment or image"]:
        assert word in str(raised.value)


def test_the_patch_of_python_does_not_matter() -> None:
    made = Made(hosts(a=answer()), {"tcp://a": {"python": "3.11.2.final.0"}})
    assert readiness(made).check() == {"tcp://a"}


def test_a_cluster_in_this_process_is_asked_nothing(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        asked = Counter[str]()
        handlers: dict[str, Any] = scheduler_of(cluster).handlers
        for name in ("versions", "broadcast", "register_worker_plugin", "run_function"):

            def counting(*args: Any, _name: str = name, _handler: Any = handlers[name], **kwargs: Any) -> Any:
                asked[_name] += 1
                return _handler(*args, **kwargs)

            handlers[name] = counting
        assert compute(shards(tmp_path, 4), client) == [2] * 4
        assert flat(shards(tmp_path, 4).stream(2, client=client)) == shards(tmp_path, 4).ids()
    assert not asked


def test_bulky_roots_are_not_sent_to_be_opened() -> None:
    graph = {
        "big": DataNode("big", np.zeros(2**20)),
        "small": DataNode("small", len),
        "t-1": Task("t-1", len, "x"),
    }
    tasks = Readiness.of(None, "x", graph).tasks  # type: ignore[arg-type]
    assert len(tasks) == 2
    assert sum(map(len, tasks)) < 10_000
