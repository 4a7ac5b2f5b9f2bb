"""Streams when things break, each for real: workers killed, the scheduler restarted, consumers that vanish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster
from ports import free_port
from streams import Shards, flat, ids_of
from waiting import PATIENCE_S, until

from rasteret_dask.errors import JobError, PlanError, ReadError

HERE = str(Path(__file__).parent)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / tmp_path.name, (6,) * 40, delay_s=0.02)


@contextmanager
def own_cluster() -> Iterator[tuple[LocalCluster, Client]]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


@pytest.mark.parametrize("shuffle", [None, 5])
def test_workers_killed_in_the_middle(shards: Shards, shuffle: int | None) -> None:
    """One after the other, each while it holds parts of shards that are not delivered yet."""
    wanted = [ids_of(b) for b in shards.stream(7, shuffle=shuffle, epochs=2)]
    with own_cluster() as (cluster, client):
        stream = shards.stream(7, shuffle=shuffle, epochs=2, client=client)
        found = []
        for number, batch in enumerate(stream):
            found.append(ids_of(batch))
            if number in (8, 30):
                victims = client.run(os.getpid)
                os.kill(victims[max(victims, key=lambda w: len(client.has_what()[w]))], signal.SIGKILL)
        assert found == wanted
        until(lambda: not cluster.scheduler.tasks)  # type: ignore[union-attr]


def test_a_cluster_restarted_in_the_middle(shards: Shards) -> None:
    """``client.restart()`` forgets every future that anybody holds."""
    wanted = flat(shards.stream(7, shuffle=1))
    with own_cluster() as (_, client):
        stream = shards.stream(7, shuffle=1, client=client)
        found = flat(next(stream) for _ in range(6))
        client.restart(wait_for_workers=False)
        assert found + flat(stream) == wanted


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": HERE}
    with subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def scheduler(port: int) -> tuple[str, ...]:
    return "dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"


def worker(port: int, folder: Path) -> tuple[str, ...]:
    return (
        "dask_worker", f"tcp://127.0.0.1:{port}", "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard",
        "--local-directory", str(folder), "--no-nanny",
    )  # fmt: skip


@pytest.mark.slow
def test_the_scheduler_killed_and_started_again(shards: Shards, tmp_path: Path) -> None:
    wanted = [ids_of(b) for b in shards.stream(7, shuffle=1)]
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(process(*scheduler(port)))
        stack.enter_context(process(*worker(port, tmp_path)))
        stream = shards.stream(7, shuffle=1, client=f"tcp://127.0.0.1:{port}")
        found = [ids_of(next(stream)) for _ in range(5)]
        first.kill()
        first.wait()
        stack.enter_context(process(*scheduler(port)))
        stack.enter_context(process(*worker(port, tmp_path)))
        found += [ids_of(batch) for batch in stream]
    assert found == wanted


@pytest.mark.slow
def test_a_scheduler_that_stays_away_is_an_error_and_a_state_goes_on_elsewhere(
    shards: Shards, tmp_path: Path
) -> None:
    wanted = [ids_of(b) for b in shards.stream(7, shuffle=1)]
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(process(*scheduler(port)))
        stack.enter_context(process(*worker(port, tmp_path)))
        stream = shards.stream(7, shuffle=1, client=f"tcp://127.0.0.1:{port}")
        found = [ids_of(next(stream)) for _ in range(5)]
        first.kill()
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),  # nobody is there to be slow
            pytest.raises(JobError, match=r"a scheduler that is gone.*state_dict"),
        ):
            found.extend(ids_of(batch) for batch in stream)
    assert found == wanted[: len(found)]
    elsewhere = shards.stream(7, shuffle=1)
    elsewhere.load_state_dict(stream.state_dict())
    assert found + [ids_of(batch) for batch in elsewhere] == wanted


def test_a_shard_that_kills_its_workers(tmp_path: Path) -> None:
    deadly = Deadly(tmp_path / tmp_path.name)
    with own_cluster() as (_, client):
        stream = deadly.stream(6, client=client)
        found: list[list[str]] = []
        with pytest.raises(JobError, match=r"shard|read-3.*state_dict"):
            found.extend(ids_of(batch) for batch in stream)
        assert len(found) == 3


class Deadly(Shards):
    def read(self, shard: int) -> dict[str, object]:  # type: ignore[override]
        if shard == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(shard)  # type: ignore[return-value]


@pytest.mark.parametrize("error", [ReadError, TimeoutError])
def test_a_shard_that_cannot_be_read_on_the_cluster(tmp_path: Path, error: type[Exception]) -> None:
    """What is mended is read again: no error is remembered once the stream has let go of it."""
    shards = Shards(tmp_path / tmp_path.name, broken=(3,), error=error)
    with own_cluster() as (cluster, client):
        stream = shards.stream(6, client=client)
        found = flat(next(stream) for _ in range(3))
        with pytest.raises(error, match="shard 3"):
            next(stream)
        assert shards.reads[3] == 2  # a task is tried twice
        until(lambda: not cluster.scheduler.tasks)  # type: ignore[union-attr]
        (shards.log / "mended").touch()
        stream.close()
        assert found + flat(stream) == shards.ids()


def test_more_ranks_than_shards(tmp_path: Path) -> None:
    shards = Shards(tmp_path / tmp_path.name, (6, 6))
    with own_cluster() as (_, client):
        found = [flat(shards.stream(1, shuffle=3, rank=r, world_size=5, client=client)) for r in range(5)]
    assert {len(own) for own in found} == {2}
    assert len({chip for own in found for chip in own}) == 10
    with pytest.raises(PlanError, match=r"12 chips for 13 ranks.*pad=True"):
        shards.stream(1, rank=0, world_size=13)


def test_a_batch_larger_than_the_split(tmp_path: Path) -> None:
    shards = Shards(tmp_path / tmp_path.name, (6, 6))
    assert flat(shards.stream(100)) == shards.ids()
    with pytest.raises(PlanError, match=r"batches of 100 chips.*12.*drop_last=False"):
        shards.stream(100, drop_last=True)
    (batch,) = shards.stream(100, pad=True)
    assert batch["padded"].sum() == 88
    assert ids_of(batch)[:12] == shards.ids()


def test_a_cluster_without_workers_is_waited_for_and_that_is_said(
    shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    patience = {"rasteret_dask.watch.look": "100ms", "rasteret_dask.watch.no-workers": "500ms"}
    with ExitStack() as stack, dask.config.set(patience):
        stack.enter_context(process(*scheduler(port)))
        stream = shards.stream(6, client=f"tcp://127.0.0.1:{port}")
        taking = threading.Thread(target=lambda: found.append(ids_of(next(stream))))
        found: list[list[str]] = []
        taking.start()
        until(lambda: "no workers for" in caplog.text)
        stack.enter_context(process(*worker(port, tmp_path)))
        taking.join(PATIENCE_S)
        stream.close()
    assert found == [shards.ids()[:6]]
