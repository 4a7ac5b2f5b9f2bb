"""A job that is watched: on a cluster by few small messages, in a batch job's log, and in the page that tells how."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from test_write import layout_of
from waiting import until

import rasteret_dask as rd
from rasteret_dask import activity
from rasteret_dask.activity import Tally
from rasteret_dask.demo.world import World
from rasteret_dask.progress import nbytes_text
from rasteret_dask.store.oncluster import METRIC
from rasteret_dask.store.run import run_zarr
from rasteret_dask.tasks.context import ReadContext


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Return a cluster of two workers in this process: what its scheduler knows can be looked at."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=False,
            dashboard_address=":0",
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def stages_of(scheduler: Any) -> dict[str, float]:
    """Return what the scheduler knows of each stage of tasks that write: what the dashboard draws."""
    found = dict[str, float]()
    for key, value in dict(scheduler.cumulative_worker_metrics).items():
        if (
            isinstance(key, tuple)
            and key[0] == "execute"
            and str(key[1]).startswith("write-")
            and key[3] == "seconds"
        ):
            found[key[2]] = found.get(key[2], 0.0) + value
    return found


def messages(scheduler: Any) -> dict[str, int]:
    """Return how many messages each of the package's topics has had."""
    topics = scheduler._broker._topics
    return {
        name: topic.count for name, topic in topics.items() if str(name).startswith("rasteret-dask-shards")
    }


def test_a_cluster_tells_stages_apart_and_gets_few_messages(
    client: Client, s2: rd.Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = client.cluster.scheduler  # type: ignore[union-attr]
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(40)
    layout = layout_of(chips, 40_000)
    shards = layout.job.shard_count
    before = messages(scheduler)

    silent = run_zarr(layout, str(tmp_path / "silent"), ReadContext(), client, False)
    assert not capsys.readouterr().err
    unwatched = messages(scheduler)
    assert all(METRIC not in worker.metrics for worker in client.cluster.workers.values())  # type: ignore[union-attr]
    until(lambda: {"read", "compose", "encode", "put"} <= stages_of(scheduler).keys())
    read = sum(value for stage, value in silent.stages.items() if stage.startswith("read/"))
    until(lambda: stages_of(scheduler)["read"] == pytest.approx(read, abs=0.01 * shards))
    assert stages_of(scheduler)["encode"] == pytest.approx(silent.stages["encode"], abs=0.01 * shards)
    spans = {span.name for span in scheduler.extensions["spans"].spans.values()}
    assert (f"to_zarr {tmp_path / 'silent'}",) in spans

    with dask.config.set({"rasteret_dask.progress.refresh": "20ms", "rasteret_dask.watch.look": "50ms"}):
        report = run_zarr(layout, str(tmp_path / "shown"), ReadContext(), client, True)
    watched = messages(scheduler)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"{shards}/{shards} shards, 40 of 40 chips, .* read.*, .* written, \d+ s", last), (
        last
    )
    assert set(report.table["worker"].to_pylist()) <= {str(w.name) for w in client.cluster.workers.values()}  # type: ignore[union-attr]

    (topic,) = unwatched.keys() - before.keys()
    runs = unwatched[topic] - shards
    assert 0 <= runs <= 2 * shards, "one message a shard, and one a run of shards"
    (topic,) = watched.keys() - unwatched.keys()
    assert watched[topic] <= shards + max(2 * shards, runs), "being watched costs no message of its own"


def test_what_a_worker_has_under_way_travels_with_its_heartbeats(client: Client) -> None:
    """The tally of a shard that is not done reaches the client by what the watch asks anyway."""
    from rasteret_dask.store.oncluster import _live_shards

    worker = next(iter(client.cluster.workers.values()))  # type: ignore[union-attr]
    worker.metrics[METRIC] = _live_shards
    try:
        with activity.watched("topic", "train-00000") as shard:
            shard.sources, shard.done, shard.written = 4, 1, 1_000

            def heard() -> Any:
                facts = client.scheduler_info(n_workers=-1)["workers"][worker.address]
                return facts["metrics"].get(METRIC, {}).get("topic", {})

            until(lambda: "train-00000" in heard())
            assert Tally(*heard()["train-00000"]) == Tally(0, 0, 1_000, 0.25)
        until(lambda: not heard())
    finally:
        del worker.metrics[METRIC]


def test_a_shard_is_seen_only_while_it_is_worked_on() -> None:
    assert activity.current() is None
    with activity.watched("job", "a") as first:
        assert activity.current() is first
        with activity.watched("job", "a") as again:  # a second try, in another thread, say
            assert activity.live() == {("job", "a"): again.tally()}
        assert activity.live() == {}
    assert activity.current() is None
    assert activity.live() == {}


BATCH = """
import sys, logging
import dask
from distributed import Client
import rasteret_dask as rd
if __name__ == "__main__":
    dask.config.set({"rasteret_dask.progress.every": "200ms", "rasteret_dask.watch.look": "200ms"})
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distributed").setLevel("ERROR")
    s2 = rd.build_from_stac(sys.argv[1], name="s2", date_range=("2024-04-01", "2024-06-30"), progress=False)
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).split()
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True) as client:
        report = chips.to_zarr(sys.argv[2], client)
    print(report)
"""


def numbers(line: str) -> tuple[int, int, int]:
    """Return the shards, chips and seconds of a line of progress."""
    shards = int(line.split("/")[0])
    chips = re.search(r"([\d,]+) of [\d,]+ chips", line)
    passed = re.search(r", (\d+) s", line)
    assert passed is not None
    return shards, int(chips[1].replace(",", "")) if chips else 0, int(passed[1])


@pytest.mark.slow  # three processes begin
def test_a_person_can_follow_the_log_of_a_batch_job_on_two_processes(
    small_world: World, tmp_path: Path
) -> None:
    store, log = tmp_path / "train.zarr", tmp_path / "log.txt"
    script = tmp_path / "batch.py"
    script.write_text(BATCH)
    with log.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, str(script), str(small_world.sentinel2), str(store)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, env=os.environ.copy(),
        )  # fmt: skip
    text = log.read_text()
    assert done.returncode == 0, text
    lines = text.splitlines()
    # a busy machine may not hear of a worker for a moment, which is said, too
    beside = re.compile(r"INFO |(WARNING rasteret_dask\.net\.watch: )?to_zarr .* is gone; it had ")
    shown = [line for line in lines if not beside.match(line)]
    assert len(shown) >= 2, text
    for line in shown:
        assert re.fullmatch(
            r"\d+/(\d+) shards(, [\d,]+ of [\d,]+ chips)?(, [\d.]+ [kM]?B read( \([\d.]+ [kM]?B/s\))?)?"
            r"(, [\d.]+ [kM]?B written)?, \d+ s(, about [\w ]+ left)?"
            r"(, \d+ running on \d workers?|, asking scheduler and workers for their versions)?",
            line,
        ), text
    told = [numbers(line) for line in shown]
    assert told == sorted(told), "no count ever falls"
    report = rd.job_report(store)
    last = shown[-1]
    assert last.startswith(
        f"{report.shards}/{report.shards} shards, {report.chips} of {report.chips} chips, "
    ), last
    assert f", {nbytes_text(report.bytes_fetched)} read" in last
    assert f", {nbytes_text(report.bytes_written)} written" in last
    phases = [line for line in lines if f"to_zarr {store}" in line]
    assert [re.sub(r".*: ", "", line) for line in phases[-1:]] == ["committed"] or "median" in phases[-1]
    assert done.stdout.startswith(f"<JobReport: committed\n store:           {store}\n")
