"""A job on a real scheduler and real workers that are killed at random, as is the client: rounds until time is up."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ports import free_port

from rasteret_dask.tasks.context import ReadContext

STILL_S = float(os.environ.get("RASTERET_DASK_SOAK_STILL_S", "180"))
"""Seconds without any movement after which the round counts as stuck."""

SHARD_BYTES = 50_000
SHARDS = 30

MODULES = ["distributed.cli.dask_scheduler", "distributed.cli.dask_worker", "rasteret_dask.building",
           "rasteret_dask.chipset", "rasteret_dask.store.run", "soak"]  # fmt: skip
"""Imported once: forks of a process that has done nothing else start at once, and as from the command line."""


class StuckError(AssertionError):
    """Nothing moved any more; says where every thread stood."""


def scheduler_main(log: str, port: int) -> None:
    """Be ``dask scheduler``."""
    _begin(log)
    from distributed.cli.dask_scheduler import main

    main(["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"])


def worker_main(log: str, port: int, name: str, threads: int) -> None:
    """Be ``dask worker``."""
    _begin(log)
    from distributed.cli.dask_worker import main

    main(
        [
            f"tcp://127.0.0.1:{port}",
            "--no-nanny",
            "--nthreads",
            str(threads),
            "--name",
            name,
            "--no-dashboard",
        ]
    )


def client_main(log: str, port: int, source: str, store: str) -> None:
    """Write the job's store; the exit status is 0, 3 after a JobError, and 1 after anything else."""
    _begin(log)
    from rasteret_dask.errors import JobError

    try:
        write(source, store, f"tcp://127.0.0.1:{port}")
    except JobError:
        traceback.print_exc()
        sys.exit(3)


def write(source: str, store: str, address: str | None) -> None:
    """Write the chips of a STAC catalog, in small shards."""
    from test_write import layout_of

    import rasteret_dask as rd
    from rasteret_dask.store.run import run_zarr

    s2 = rd.build_from_stac(source, name="s2", date_range=("2024-04-01", "2024-06-30"))
    harmonized = s2.harmonize(bands=["red", "nir"], time="1MS", units="reflectance", mask="clouds")
    chips = harmonized.chips(size=32, cell_km=0.96).sample(60)
    run_zarr(layout_of(chips, SHARD_BYTES), store, ReadContext(), address, progress=False)


def _begin(log: str) -> None:
    """Write to a file from now on, and into it where all threads stand when SIGUSR1 comes."""
    os.setpgrp()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, file=2)


@dataclass
class Soak:
    """Rounds of one job, each on a scheduler and workers of its own.

    Parameters
    ----------
    folder
        For stores and logs; those of good rounds are removed.
    source
        The STAC catalog of the chips.
    expected
        A store that was written undisturbed.
    seed
        Decides who is killed when, as far as the machine's speed allows.
    """

    folder: Path
    source: str
    expected: Path
    seed: int
    kills: int = 0
    rounds: int = 0
    repeated: int = 0
    """Shards that were written although their report was there."""
    errors: list[str] = field(default_factory=list)
    """How clients ended other than by an error of the package's own."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(MODULES)

    def round(self) -> None:
        """Write the job once, whatever is killed; compare the store.

        Raises
        ------
        StuckError
            When nothing moves.
        AssertionError
            When the store is not the expected one.
        """
        folder = self.folder / f"round-{self.rounds:03d}"
        folder.mkdir()
        stage = Stage(self, folder)
        try:
            stage.play(self.random.randint(0, 6))
        finally:
            stage.close()
        differences = different(self.expected, stage.store)
        assert not differences, f"seed {self.seed}, round {self.rounds}: {differences[:10]}"
        shutil.rmtree(folder)
        self.rounds += 1

    def __str__(self) -> str:
        return (f"seed {self.seed}: {self.rounds} rounds, {self.kills} kills, {self.repeated} shards written again, "
                f"{len(self.errors)} untyped errors")  # fmt: skip


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Give a scheduler's address and the means to start and kill, for the length of a block."""
    playing = Stage(Soak(folder, "", folder, 0), folder)
    try:
        yield playing
    finally:
        playing.close()


class Stage:
    """One round's processes."""

    def __init__(self, soak: Soak, folder: Path) -> None:
        self.soak, self.folder, self.store = soak, folder, folder / "x.zarr"
        self.port = free_port()
        self.threads = {name: soak.random.randint(1, 2) for name in ("w1", "w2")}
        self.running: dict[str, BaseProcess] = {}
        self.started = 0
        self.story: list[str] = []
        self.reports: dict[str, tuple[int, int]] = {}

    def play(self, kills: int) -> None:
        """Keep everybody going, and kill, until the client says that the store is finished."""
        choose, moved, state = self.soak.random, time.monotonic(), ""
        next_kill = time.monotonic() + choose.uniform(0.2, 6)
        while True:
            time.sleep(0.02)
            if self._keep_going():
                return
            if kills and time.monotonic() > next_kill:
                self._hurt(
                    choose.choice(["w1", "w1", "w2", "w2", "client", "scheduler"]), choose.random() < 0.2
                )
                kills -= 1
                next_kill = time.monotonic() + choose.choice(
                    [0.0, choose.uniform(0.05, 1), choose.uniform(1, 8)]
                )
            now = f"{self._count()} {self.started} {kills}"
            if now != state:
                moved, state = time.monotonic(), now
            elif time.monotonic() - moved > STILL_S:
                raise StuckError(self._where())

    def _keep_going(self) -> bool:
        """Start whoever is not there; return whether the client has finished the store."""
        client = self.running.get("client")
        if client is not None and client.exitcode is not None:
            self.story.append(f"client ended with {client.exitcode}")
            if client.exitcode == 0:
                return True
            if client.exitcode == 1:
                self.soak.errors.append((self.folder / "client.log").read_text()[-3000:])
        for name in ("scheduler", "w1", "w2", "client"):
            process = self.running.get(name)
            if process is None or process.exitcode is not None:
                self.start(name)
        return False

    def start(self, name: str) -> None:
        """Start somebody."""
        log = str(self.folder / f"{name}.log")
        main: Callable[..., None]
        more: tuple[Any, ...]
        match name:
            case "scheduler":
                main, more = scheduler_main, ()
            case "client":
                main, more = client_main, (self.soak.source, str(self.store))
            case _:
                main, more = worker_main, (name, self.threads[name])
        process = self.soak.context.Process(target=main, args=(log, self.port, *more), daemon=True)
        process.start()
        self.running[name] = process
        self.started += 1

    def _hurt(self, name: str, pause: bool) -> None:
        """Kill somebody, or let them stand still for a while."""
        process = self.running[name]
        if process.exitcode is not None or process.pid is None:
            return
        self.story.append(f"{len(self.reports)} of {SHARDS}: {'paused' if pause else 'killed'} {name}")
        if pause:
            os.kill(process.pid, signal.SIGSTOP)
            threading.Timer(
                self.soak.random.uniform(0.1, 3), process_signal, [process.pid, signal.SIGCONT]
            ).start()
        else:
            self.kill(name)

    def kill(self, name: str) -> None:
        """Kill somebody."""
        self.running[name].kill()
        self.running[name].join()
        self.soak.kills += 1

    @property
    def address(self) -> str:
        """The scheduler's."""
        return f"tcp://127.0.0.1:{self.port}"

    def _count(self) -> int:
        """Return how many reports there are; note those that were written again."""
        for path in (self.store / "_job" / "done").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                seen = path.stat()
                state = (seen.st_ino, seen.st_mtime_ns)
                if self.reports.get(path.name, state) != state:
                    self.soak.repeated += 1
                    self.story.append(f"{path.name} again")
                self.reports[path.name] = state
        return len(self.reports)

    def _where(self) -> str:
        """Say where everybody stands; the logs stay."""
        for process in self.running.values():
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        (self.folder / "cluster.log").write_text(cluster_state(self.address))
        time.sleep(2)
        logs = "\n".join(
            f"--- {path.name}\n{path.read_text()[-20_000:]}" for path in sorted(self.folder.glob("*.log"))
        )
        return f"{self.soak}: nothing moved for {STILL_S:.0f} s; {self.story}\n{logs}"

    def close(self) -> None:
        """End everybody."""
        for process in self.running.values():
            if process.exitcode is None:
                process.kill()
            process.join()


def process_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def cluster_state(address: str) -> str:
    """Return what scheduler and workers know of each task."""
    from distributed import Client

    def told(dask_scheduler: Any) -> list[str]:
        tasks = dask_scheduler.tasks.values()
        lines = [f"{t.key} {t.state} on {t.processing_on} {t.who_has} for {t.who_wants}" for t in tasks]
        lines += [str(event) for t in tasks if t.state != "memory" for event in dask_scheduler.story(t.key)]
        return lines

    def of_worker(dask_worker: Any) -> list[str]:
        return [f"{t.key} {t.state}" for t in dask_worker.state.tasks.values()] + [
            str(event) for t in dask_worker.state.tasks.values() for event in dask_worker.state.story(t.key)
        ]

    try:
        with Client(address, timeout=5, set_as_default=False) as client:
            lines = client.run_on_scheduler(told)
            for worker, own in client.run(of_worker).items():
                lines += [worker, *own]
            return "\n".join([*lines, str(client.call_stack())])
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def objects(store: Path) -> dict[str, bytes]:
    """Return the objects of a store that do not tell how often or by whom it was written."""
    files = (path for path in store.rglob("*") if path.is_file())
    named = {str(path.relative_to(store)): path for path in files}
    told = ("_job/tried/", "_job/done/", "_job/pages/", "manifest.parquet")
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if not name.startswith(told) and "#" not in name
    }


def different(expected: Path, found: Path) -> list[str]:
    """Return the objects that differ, or that only one store has, and the columns of the manifests that do."""
    a, b = objects(expected), objects(found)
    names = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    rows = [pq.read_table(store / "manifest.parquet") for store in (expected, found)]
    columns = (
        "shard",
        "split",
        "number",
        "chips",
        "kept",
        "bytes",
        "objects",
        "clipped",
        "unreadable",
        "key",
    )
    return sorted(names) + [
        name for name in columns if rows[0][name].to_pylist() != rows[1][name].to_pylist()
    ]


def rounds(soak: Soak, seconds: float) -> Iterator[Soak]:
    """Yield after each round until time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        soak.round()
        yield soak
