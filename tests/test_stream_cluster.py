"""Streams from a Dask cluster: straight from the workers, bounded, let go of, and shared by ranks."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker
from streams import Shards, assert_same, flat, ids_of, in_small_shards, train_chips
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.errors import JobError, PlanError, StoreError
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.streams.stream import Batching
from rasteret_dask.tasks.batches import Arrays

HERE = str(Path(__file__).parent)
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def train(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    return train_chips(s2, aef)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as running:
        yield running


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / tmp_path.name)  # its name is in the tasks' keys


def tasks(cluster: Any) -> list[str]:
    return [str(key) for key in cluster.scheduler.tasks]


def nothing_left(cluster: Any) -> Callable[[], bool]:
    return lambda: not tasks(cluster)


@pytest.mark.parametrize(
    "arguments", [{}, {"shuffle": 4}, {"shuffle": 4, "rank": 1, "world_size": 3, "pad": True}], ids=str
)
def test_batches_are_those_of_threads(
    train: rd.Chips,
    client: Client,
    cluster: LocalCluster,
    arguments: dict[str, Any],
) -> None:
    reading = in_small_shards(train)
    streams = [Batching(16, epochs=2, client=c, **arguments).stream(reading) for c in (None, client)]
    here, there = map(list, streams)
    assert len(here) == len(there) == 2 * streams[0].order.batches
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)
    assert all(v.flags.writeable and v.flags.c_contiguous for v in there[0].values())
    until(nothing_left(cluster))


def test_the_current_client_and_an_address_serve(shards: Shards, cluster: LocalCluster) -> None:
    with Client(cluster):
        assert flat(shards.stream(5)) == shards.ids()
    assert flat(shards.stream(5, client=cluster.scheduler_address)) == shards.ids()
    assert set(shards.reads.values()) == {2}
    until(nothing_left(cluster))
    scheduler = cluster.scheduler
    assert scheduler is not None
    until(lambda: not [name for name in scheduler.clients if name.startswith("Client")])


def test_another_number_of_workers_is_the_same_order(shards: Shards, client: Client) -> None:
    wanted = [ids_of(b) for b in shards.stream(7, shuffle=3, client=client)]
    with LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=":0") as one:
        assert [ids_of(b) for b in shards.stream(7, shuffle=3, client=one.scheduler_address)] == wanted


def test_who_takes_nothing_stops_the_reading(tmp_path: Path, client: Client, cluster: LocalCluster) -> None:
    shards = Shards(tmp_path / tmp_path.name, (6,) * 300)
    stream = shards.stream(6, shuffle=2, client=client, prefetch=2)
    next(stream)
    until(lambda: sum(shards.reads.values()) >= 4)
    before = -1
    while sum(shards.reads.values()) != before:  # time to read too much
        before = sum(shards.reads.values())
        time.sleep(0.5)
    # batches 0 to 3 are made or waited for, from 4 shards each at most, and 3 shards are under way ahead of them
    most = 4 + 4 + 3
    assert 4 <= before <= most
    assert len([key for key in tasks(cluster) if key.startswith("read")]) <= most
    for _ in range(100):
        next(stream)
    assert sum(shards.reads.values()) <= most + 100
    assert set(shards.reads.values()) == {1}
    stream.close()
    until(nothing_left(cluster))


def test_an_abandoned_stream_lets_go(shards: Shards, client: Client, cluster: LocalCluster) -> None:
    stream = shards.stream(2, shuffle=1, epochs=1000, client=client)
    next(stream)
    assert tasks(cluster)
    del stream
    gc.collect()
    until(nothing_left(cluster))


def test_chips_do_not_pass_the_scheduler(shards: Shards, client: Client, cluster: LocalCluster) -> None:
    """It is asked where they are, and never for them."""
    asked: list[Any] = []
    assert cluster.scheduler is not None
    handlers, gather = cluster.scheduler.handlers, cluster.scheduler.handlers["gather"]

    async def counting(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return await gather(*args, **kwargs)

    handlers["gather"] = counting
    try:
        assert flat(shards.stream(5, client=client)) == shards.ids()
    finally:
        handlers["gather"] = gather
    assert not asked


def test_memory_is_two_batches_and_those_made_ahead(tmp_path: Path, client: Client) -> None:
    shards = Shards(tmp_path / tmp_path.name, (16,) * 24, pixels=256)
    batch = 16 * 2 * 256 * 256 * 4 + 16 * 256 * 256
    for prefetch in (1, 3):
        stream = shards.stream(16, shuffle=1, client=client, prefetch=prefetch)
        next(stream)
        tracemalloc.start()
        try:
            for _ in stream:
                time.sleep(0.05)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= (2 + prefetch) * batch * 1.1


def take_one(shards: Shards, address: str, out: Connection) -> None:
    """Take one batch of many, say which, and wait to be killed."""
    out.send(ids_of(next(shards.stream(2, shuffle=1, epochs=1000, client=address))))
    out.poll(None)


def test_a_consumer_that_dies_leaves_nothing(shards: Shards, cluster: LocalCluster) -> None:
    ours, theirs = FORKS.Pipe()
    consumer = FORKS.Process(target=take_one, args=(shards, cluster.scheduler_address, theirs))
    consumer.start()
    assert ours.poll(PATIENCE_S)
    assert len(ours.recv()) == 2
    assert tasks(cluster)
    consumer.kill()
    consumer.join()
    until(nothing_left(cluster))


# Out of reach


UNREACHABLE = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from streams import Shards, flat
if __name__ == "__main__":
    shards = Shards(Path(sys.argv[2]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert flat(shards.stream(5, shuffle=2, client=sys.argv[3])) == flat(shards.stream(5, shuffle=2))
    print(*(w.message for w in seen))
"""


def test_workers_that_cannot_be_reached_are_read_through_the_scheduler(shards: Shards) -> None:
    """Workers inside the scheduler's own process, which no other process can reach."""
    scheduler = {
        "cls": Scheduler,
        "options": {
            "protocol": ("tcp://", "inproc://"),
            "port": (0, 0),
            "dashboard": False,
            "dashboard_address": ":0",
        },
    }
    workers = {0: {"cls": Worker, "options": {"protocol": "inproc://", "nthreads": 2, "dashboard": False}}}
    with SpecCluster(workers=workers, scheduler=scheduler) as inside:
        address = next(a for a in inside.scheduler.listeners if a.contact_address.startswith("tcp"))
        command = [sys.executable, "-c", UNREACHABLE, HERE, str(shards.log), address.contact_address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 workers cannot be reached from here" in done.stdout
    assert "through the scheduler" in done.stdout


# Elsewhere


def batches_of(address: str, place: str, rank: int) -> list[list[Any]]:
    """Return what one of three ranks gets."""
    stream = stream_from(address, place, 4, shuffle=6, epochs=2, rank=rank, world_size=3)
    return [[b["chip_id"].tolist(), float(b["optical"].sum())] for b in stream]


@pytest.mark.parametrize("what", ["plan", "store"])
def test_three_processes_with_an_address_and_a_path(
    train: rd.Chips,
    cluster: LocalCluster,
    tmp_path: Path,
    what: str,
) -> None:
    place = str(tmp_path / what)
    if what == "plan":
        train.save_plan(place)
    else:
        train.to_zarr(place, progress=False)
    with ProcessPoolExecutor(3, FORKS) as ranks:
        running = [ranks.submit(batches_of, cluster.scheduler_address, place, rank) for rank in range(3)]
        found = [process.result(PATIENCE_S) for process in running]
    chips = train if what == "plan" else rd.open_chips(place)  # ranks of a store share out each shard
    wanted = [
        [
            [b["chip_id"].tolist(), float(b["optical"].sum())]
            for b in chips.stream(4, 6, 2, rank=r, world_size=3)
        ]
        for r in range(3)
    ]
    assert found == wanted
    assert len({len(own) for own in found}) == 1
    epoch = [chip for own in found for ids, _ in own[: len(own) // 2] for chip in ids]
    assert len(set(epoch)) == len(epoch) == len(train) // 3 * 3
    until(nothing_left(cluster))


def halved(chips: Any) -> Any:
    return chips * 0.5


def test_a_plan_s_functions_are_given_not_imported(train: rd.Chips, tmp_path: Path) -> None:
    chips = train.map(halved, source="embeddings")
    chips.save_plan(tmp_path / "plan")
    wanted = next(chips.stream(8))
    assert_same(next(stream_from(None, tmp_path / "plan", 8, functions=[halved])), wanted)
    with pytest.raises(PlanError, match=r"no test_stream_cluster.halved.*functions=\[halved\]"):
        stream_from(None, tmp_path / "plan", 8)

    def other(chips: Any) -> Any:
        return chips * 2

    other.__qualname__ = "halved"
    with pytest.raises(PlanError, match="says something else"):
        stream_from(None, tmp_path / "plan", 8, functions=[other])


def test_a_saved_plan_is_text_and_tables(train: rd.Chips, tmp_path: Path) -> None:
    train.save_plan(tmp_path / "plan")
    names = {path.name for path in (tmp_path / "plan").iterdir()}
    assert {Path(n).suffix for n in names} == {".json", ".arrow"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "plan").iterdir()}
    train.save_plan(tmp_path / "plan")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "plan").iterdir()} == before
    with pytest.raises(StoreError, match="another plan"):
        train.sample(5).save_plan(tmp_path / "plan")


def test_a_place_with_neither_is_refused(train: rd.Chips, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"neither a saved plan nor a finished store.*save_plan"):
        stream_from(None, tmp_path / "nothing", 8)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "job.json").write_text("{}")
    with pytest.raises(StoreError, match=r"job.json that does not match its checksum"):
        stream_from(None, tmp_path / "plan", 8)
    with pytest.raises(StoreError, match=r"something else|does not match its checksum"):
        train.save_plan(tmp_path / "plan")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="something else"):
        train.save_plan(tmp_path / "file")


def test_no_scheduler_answers(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        for address in ("tcp://127.0.0.1:1", "nonsense"):
            with pytest.raises(JobError, match=f"scheduler {address}.*a Dask scheduler that answers"):
                next(shards.stream(5, client=address))


# Consumers that are Dask workers


def consume(shards: Shards, address: str, rank: int) -> tuple[str, list[list[str]]]:
    from distributed import get_worker

    stream = shards.stream(4, shuffle=9, rank=rank, world_size=2, client=address)
    return get_worker().name, [ids_of(batch) for batch in stream]


def where(shards: Shards) -> Shards:
    """Return shards that fail on workers that train."""
    return Guarded(**{f: getattr(shards, f) for f in shards.__dataclass_fields__})


class Guarded(Shards):
    def read(self, shard: int) -> Arrays:
        from distributed import get_worker

        assert not get_worker().state.total_resources
        return super().read(shard)


@pytest.fixture
def mixed() -> Iterator[SpecCluster]:
    """Return a cluster of two workers that read and two that train."""
    workers = {
        name: {"cls": "distributed.Nanny", "options": {"nthreads": 1, "resources": own, "dashboard": False}}
        for name, own in {"read0": {}, "read1": {}, "train0": {"train": 1}, "train1": {"train": 1}}.items()
    }
    from distributed import Nanny

    for own in workers.values():
        own["cls"] = Nanny  # type: ignore[assignment]
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": ":0", "port": 0}}
    with SpecCluster(workers=workers, scheduler=scheduler) as running:
        yield running


def test_workers_that_train_do_not_read(tmp_path: Path, mixed: SpecCluster) -> None:
    shards = where(Shards(tmp_path / tmp_path.name))
    with Client(mixed, set_as_default=False) as client:
        client.wait_for_workers(4, timeout=PATIENCE_S)
        ranks = [
            client.submit(consume, shards, mixed.scheduler_address, rank, resources={"train": 1})
            for rank in range(2)
        ]
        found = client.gather(ranks)
        assert {str(name) for name, _ in found} == {"train0", "train1"}
        assert sorted(chip for _, own in found for batch in own for chip in batch) == sorted(shards.ids())
        assert len({len(own) for _, own in found}) == 1


def test_with_no_worker_left_to_read_it_says_so_at_once(tmp_path: Path, mixed: SpecCluster) -> None:
    shards = Shards(tmp_path / tmp_path.name)
    with Client(mixed, set_as_default=False) as client:
        client.wait_for_workers(4, timeout=PATIENCE_S)
        names = {w["name"]: address for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}
        client.retire_workers([names["read0"], names["read1"]])
        with pytest.raises(
            JobError, match=r"2 workers that all hold the resource 'train'.*without --resources"
        ):
            next(shards.stream(4, client=client))
    assert not shards.reads


@pytest.mark.slow
def test_readers_that_are_replaced(tmp_path: Path, mixed: SpecCluster) -> None:
    """The addresses that tasks wait for are gone for good; others have come."""
    shards = where(Shards(tmp_path / tmp_path.name, (6,) * 60, delay_s=0.05))
    with Client(mixed, set_as_default=False) as client:
        client.wait_for_workers(4, timeout=PATIENCE_S)
        stream = shards.stream(6, shuffle=1, client=client)
        found = flat(next(stream) for _ in range(5))
        names = {w["name"]: address for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}
        before = {names["read0"], names["read1"]}
        client.restart_workers(list(before), timeout=PATIENCE_S)
        client.wait_for_workers(4, timeout=PATIENCE_S)
        found += flat(stream)
        wanted = flat(shards.__class__(tmp_path / "other", shards.sizes).stream(6, shuffle=1, client=client))
        assert found == wanted


def test_a_client_that_is_closed(shards: Shards, cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as gone:
        begun = shards.stream(5, client=gone)
        next(begun)
    for stream in (begun, shards.stream(5, client=gone)):
        with pytest.raises(JobError, match=r"clos(ed|ing)"):
            list(stream)


def test_a_cluster_that_has_ended(shards: Shards) -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as gone,
    ):
        begun = shards.stream(5, client=gone)
        next(begun)
    for stream in (begun, shards.stream(5, client=gone)):
        with pytest.raises(JobError, match=r"clos(ed|ing)"):
            list(stream)


def test_the_process_s_own_scheduler_is_left_alone(shards: Shards, cluster: LocalCluster) -> None:
    """Nothing that a stream does in the background makes its client the scheduler of all computations."""
    seen = set()

    def look(batch: Arrays) -> Arrays:
        seen.add(dask.config.get("scheduler", None))
        return batch

    slow = replace(shards, delay_s=0.05)
    with Client(cluster, set_as_default=False) as own, ThreadPoolExecutor(1) as other:
        stream = slow.stream(3, client=own, normalize=look)
        taken = other.submit(flat, stream)
        while not taken.done():
            seen.add(dask.config.get("scheduler", None))
            time.sleep(0.005)
        assert taken.result() == shards.ids()
    assert seen == {None}
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as last, Client(last) as default:
        begun = slow.stream(5, client=default)
        next(begun)
    assert dask.config.get("scheduler", None) is None
    begun.close()


def _consumed(shards: Shards, rank: int) -> list[list[str]]:
    return [ids_of(batch) for batch in shards.stream(4, shuffle=9, rank=rank, world_size=2)]


def test_tasks_that_stream_on_workers_that_read(shards: Shards) -> None:
    """Every thread of the cluster holds a consumer; each leaves its place to the reads that it waits for."""
    wanted = [_consumed(shards, rank) for rank in (0, 1)]
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as cluster,
        Client(cluster, set_as_default=False) as own,
    ):
        futures = [own.submit(_consumed, shards, rank) for rank in (0, 1)]
        assert own.gather(futures) == wanted
