"""Results of tasks: taken once they are there, a lost scheduler is told, and a task may wait for tasks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dask._task_spec import Task
from distributed import Client, LocalCluster, get_client
from soak import stage
from streams import Shards
from waiting import until

from rasteret_dask.errors import JobError
from rasteret_dask.net.awaiting import results
from rasteret_dask.statistics import measuring


@dataclass(frozen=True)
class Held(Shards):
    """Shards of which the last are read only once there is a file ``go``."""

    def read(self, shard: int) -> Any:
        while len(list(self.log.glob("*-*"))) >= 40 and not (self.log / "go").exists():
            time.sleep(0.01)
        return super().read(shard)


def test_a_killed_worker_has_not_measured_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "FAN", 2)
    shards = Held(tmp_path / tmp_path.name, sizes=(6,) * 60)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as own,
        Client(own, set_as_default=False) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))
        scheduler: Any = own.scheduler

        def settled() -> bool:
            """Tell whether both workers wait, and the client has taken all that was put together."""
            tasks = [*scheduler.tasks.values()]
            ready = {"released", "waiting", "no-worker", "queued"}
            computing = [t for t in tasks if t.state not in ready and t.state != "memory"]
            taken = not [t for t in tasks if t.state == "memory" and not t.waiters]
            return len(list(shards.log.glob("*-*"))) >= 40 and len(computing) <= 4 and taken

        def kill() -> None:
            until(settled)
            os.kill(victim, signal.SIGKILL)
            (shards.log / "go").touch()

        shards.log.mkdir()
        killer = threading.Thread(target=kill)
        killer.start()
        stats = measuring.measured(shards.reading, client)
        killer.join()
        assert victim not in client.run(os.getpid).values()
    again = sum(shards.reads.values()) - 60
    assert again <= 8, (
        "of some 20 that the victim had measured"
    )  # what it held that was not put together and taken
    assert stats.to_json() == measuring.measured(shards.reading).to_json()


def test_a_lost_scheduler_is_told(tmp_path: Path) -> None:
    with stage(tmp_path) as playing:
        playing.start("scheduler")
        with Client(playing.address, set_as_default=False) as client:

            def count(dask_scheduler: Any) -> int:
                return len(dask_scheduler.tasks)

            def kill() -> None:
                until(lambda: client.run_on_scheduler(count))
                playing.kill("scheduler")

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(JobError) as caught:  # there is no worker, so it waits
                results(client, {"x": Task("x", int)}, ["x"], "counting")
            killer.join()
    text = str(caught.value)
    assert text.startswith(f"counting: found the scheduler {playing.address} lost; 0 of 1 parts were done")


def within() -> list[int]:
    """Wait for tasks, in a task."""
    graph: dict[Hashable, Any] = {f"one-{n}": Task(f"one-{n}", int, n) for n in range(3)}
    return results(get_client(), graph, [str(key) for key in graph], "counting")


def test_a_task_waits_for_tasks_on_the_only_thread() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
    ):
        assert client.submit(within).result() == [0, 1, 2]


def test_errors_are_those_of_the_task() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
        pytest.raises(ValueError, match="invalid literal"),
    ):
        results(client, {"x": Task("x", int, "no")}, ["x"], "counting")
