"""Parts of an array job: processes that know nothing of each other write one store, even where some are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from part_processes import SHRUNK, planned, write
from small_stores import contents
from waiting import until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.net import remote
from rasteret_dask.runlimits import RunLimits
from rasteret_dask.store import ledger, shardreports
from rasteret_dask.store.committing import commit
from rasteret_dask.store.limits import begun
from rasteret_dask.store.presence import present
from rasteret_dask.store.run import chip_job
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.runs import Cuts

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

SHARDS = 17
"""Of :func:`part_processes.planned`."""


@pytest.fixture(autouse=True, scope="module")
def shrunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHRUNK.items():
            patch.setattr(f"rasteret_dask.{name}", value)
        yield


def part(
    world: World, store: str, number: int, count: int, folder: str | None = None, **environment: str
) -> BaseProcess:
    """Start the process of a part."""
    arguments = (str(world.sentinel2), store, number, count, folder, environment)
    process = multiprocessing.get_context("forkserver").Process(target=write, args=arguments)
    process.start()
    return process


def part_of(chips: rd.Chips, number: int, count: int) -> list[str]:
    """Return the shards of a part."""
    job = chip_job(chips._layout, "x.zarr", ReadContext(), progress=False)
    return [unit.name for unit in job.part(number, count)]


def ended(*processes: BaseProcess) -> list[int | None]:
    """Wait for processes; return their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def tries(paths: Iterator[str] | dict[str, Any]) -> dict[str, int]:
    """Return shard -> how often it was begun."""
    return {shard: len(marks) for shard, marks in shardreports.tries(paths).items()}


@pytest.fixture(scope="module")
def chips(small_world: World) -> rd.Chips:
    chips = planned(str(small_world.sentinel2))
    assert chips.job.shard_count == SHARDS
    return chips


@pytest.fixture(scope="module")
def plain(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the store of one plain run."""
    store = tmp_path_factory.mktemp("plain") / "x.zarr"
    chips.to_zarr(store, progress=False)
    return store


# The law


@pytest.mark.parametrize("examples", [2, pytest.param(10, marks=pytest.mark.slow)], ids=["some", "many"])
def test_parts_write_the_store_of_one_plain_run(
    small_world: World, plain: Path, tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    """In any order, some together, some killed and run again; where none is killed, each shard is begun once."""

    @settings(max_examples=examples, deadline=None, phases=[Phase.generate])
    @given(data=st.data())
    def law(data: st.DataObject) -> None:
        check_parts(small_world, plain, tmp_path_factory.mktemp("parts") / "x.zarr", data)

    law()


def check_parts(small_world: World, plain: Path, store: Path, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7), "parts")
    order = data.draw(st.permutations(range(1, count + 1)), "order")
    together = data.draw(st.integers(1, 3), "at the same time")
    kills = data.draw(
        st.dictionaries(st.integers(1, count), st.integers(0, 60), max_size=2), "killed at objects"
    )

    def objects() -> int:
        return sum(1 for path in store.rglob("*") if path.is_file())

    rounds = [order[at : at + together] for at in range(0, count, together)]
    for some in rounds:
        running = {number: part(small_world, str(store), number, count) for number in some}
        for number, process in running.items():
            if number in kills:
                before = objects()
                wanted = before + kills[number]
                while process.is_alive() and objects() < wanted:
                    time.sleep(0.002)
                process.kill()
        codes = dict(zip(running, ended(*running.values()), strict=True))
        assert all(code == 0 or (number in kills and code == -9) for number, code in codes.items()), codes
    again = [part(small_world, str(store), number, count) for number in kills]
    assert set(ended(*again)) <= {0}
    assert contents(store) == contents(plain)
    counts = tries(remote.listing(str(store)))
    assert len(counts) == SHARDS
    if not kills:
        assert set(counts.values()) == {1}
    assert not list((store / "_job/clients").glob("*"))
    assert rd.verify(store).ok


def test_parts_at_the_same_moment_in_a_bucket(small_world: World, plain: Path, tmp_path: Path) -> None:
    """Of a store by URL: nobody waits for anybody, and each shard is put by one of them."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }
    with ExitStack() as stack:
        stack.callback(server.stop)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in keys.items():
            patch.setenv(name, value)
        with urllib.request.urlopen(urllib.request.Request(f"{address}/chips", method="PUT")):
            pass
        url = "s3://chips/x.zarr"
        assert ended(*[part(small_world, url, number, 4, **keys) for number in range(1, 5)]) == [0] * 4
        found = remote.listing(url)
        assert tries(found) == dict.fromkeys(tries(found), 1)
        for path in found:
            file = tmp_path / "x.zarr" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(remote.get(remote.join(url, path)))
    assert contents(tmp_path / "x.zarr") == contents(plain)
    assert rd.verify(tmp_path / "x.zarr").ok


def test_parts_of_a_plan_by_blocks(small_world: World, chips: rd.Chips, tmp_path: Path) -> None:
    folder = str(tmp_path / "plan")
    blocks = planned(str(small_world.sentinel2)).by_blocks(folder, progress=False, windows=40)
    blocks.to_zarr(tmp_path / "one.zarr", progress=False)
    store = tmp_path / "x.zarr"
    assert ended(*[part(small_world, str(store), number, 3, folder) for number in (3, 1, 2)]) == [0] * 3
    assert contents(store) == contents(tmp_path / "one.zarr")
    assert set(tries(remote.listing(str(store))).values()) == {1}


# What each part writes


@given(shards=st.integers(1, 60), count=st.integers(1, 80), data=st.data())
def test_each_shard_is_in_one_part(shards: int, count: int, data: st.DataObject) -> None:
    """Parts are neighbours, in order, of about the same length, whatever borders cost."""
    costs = data.draw(st.lists(st.integers(0, 9), min_size=shards - 1, max_size=shards - 1))
    parts = Cuts(np.array(costs, dtype=np.int64), max(sum(costs), 1)).parts(count)
    assert len(parts) == count
    assert [place for part in parts for place in part] == list(range(shards))
    assert max(map(len, parts)) <= -(-shards // count) * 4 / 3 + 1


def test_parts_of_a_job_are_cut_alike_by_everybody(chips: rd.Chips) -> None:
    other = chips.sample(len(chips))  # the same rows, planned again
    names = [shard.name for shard in chips.job.shards()]
    for count in (1, 2, 3, 7, 40):
        parts = [part_of(chips, number, count) for number in range(1, count + 1)]
        assert sorted(name for part in parts for name in part) == sorted(names)
        assert parts == [part_of(other, number, count) for number in range(1, count + 1)]


# Who else is there


def test_parts_are_no_second_clients(tmp_path: Path) -> None:
    with present(str(tmp_path), (1, 3)) as first, present(str(tmp_path), (2, 3)) as second:
        assert first.is_alone()
        assert second.is_alone()


@pytest.mark.parametrize("other", [(1, 3), (2, 4), None])
def test_whoever_writes_the_same_shards_is_told_of(tmp_path: Path, other: tuple[int, int] | None) -> None:
    with (
        present(str(tmp_path), (1, 3)) as first,
        pytest.warns(rd.ConcurrentWriteWarning, match=str(os.getpid())),
        present(str(tmp_path), other),
    ):
        assert not first.is_alone()


def test_a_part_of_another_plan_is_refused(chips: rd.Chips, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    report = chips.to_zarr(store, progress=False, limits=RunLimits(part=(1, 2)))
    assert isinstance(report, rd.JobReport)
    assert not report.committed
    with pytest.raises(rd.StoreError, match="another plan"):
        chips.sample(20).to_zarr(store, progress=False, limits=RunLimits(part=(2, 2)))


def test_two_that_begin_at_the_same_moment_with_other_plans(
    chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one looks before the first has put anything, and is refused all the same."""
    store, put = tmp_path / "x.zarr", remote.put_new

    def late(href: str, data: bytes) -> bool:
        monkeypatch.setattr(remote, "put_new", put)
        chips.to_zarr(store, progress=False, limits=RunLimits(part=(1, 2)))
        return put(href, data)

    monkeypatch.setattr(remote, "put_new", late)
    with pytest.raises(rd.StoreError, match="another plan"):
        chips.sample(20).to_zarr(store, progress=False, limits=RunLimits(part=(2, 2)))
    assert chips.to_zarr(store, progress=False, limits=RunLimits(part=(2, 2))).committed


# The commit


def test_the_part_that_ends_last_commits(chips: rd.Chips, plain: Path, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    reports = [chips.to_zarr(store, progress=False, limits=RunLimits(part=(n, 3))) for n in (2, 3, 1)]
    assert [report.committed for report in reports if isinstance(report, rd.JobReport)] == [
        False,
        False,
        True,
    ]
    assert sum(report.shards_written for report in reports if isinstance(report, rd.JobReport)) == SHARDS
    assert contents(store) == contents(plain)


def test_a_store_whose_last_part_was_stopped_before_the_commit(
    chips: rd.Chips, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("rasteret_dask.store.workunits.Commit.is_due", lambda *_: False)
        for number in (1, 2):
            chips.to_zarr(store, progress=False, limits=RunLimits(part=(number, 2)))
    assert not (store / "zarr.json").exists()
    report = commit(store)
    assert report.committed
    assert report.shards == SHARDS
    assert contents(store) == contents(plain)
    assert rd.verify(store).ok
    assert commit(store) == report


def test_commit_says_what_is_missing(chips: rd.Chips, tmp_path: Path) -> None:
    with pytest.raises(rd.StoreError, match="no store"):
        commit(tmp_path / "x.zarr")
    chips.to_zarr(tmp_path / "x.zarr", progress=False, limits=RunLimits(part=(1, 2)))
    with pytest.raises(rd.JobError, match=r"shards missing.*not written yet.*let the parts"):
        commit(tmp_path / "x.zarr")


def test_two_that_end_at_the_same_moment_commit_twice_and_damage_nothing(
    chips: rd.Chips, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one commits between any two requests of this one's commit."""
    real, store = ledger.commit, tmp_path / "x.zarr"
    for at in range(2):

        def twice(*args: Any, at: int = at) -> Any:
            before, after = (real, None) if at == 0 else (None, real)
            if before:
                before(*args)
            result = real(*args)
            if after:
                after(*args)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "commit", twice)
            target = store.with_name(f"{at}.zarr")
            for number in (1, 2):
                chips.to_zarr(target, progress=False, limits=RunLimits(part=(number, 2)))
        assert contents(target) == contents(plain)
        assert rd.verify(target).ok


def test_pages_are_turned_only_while_a_part_has_shards_to_begin(
    chips: rd.Chips, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever commits has looked at all reports: none of them may go into a page at that moment."""
    monkeypatch.setattr(shardreports, "PAGE_REPORTS", 2)
    monkeypatch.setattr("rasteret_dask.store.shardruns.AHEAD", 2)
    monkeypatch.setattr("rasteret_dask.tasks.runs.ROUND", 2)
    turn, left = shardreports.turn_page, list[int]()
    store = tmp_path / "x.zarr"

    def noted(url: str, shards: Any, keys: Any) -> None:
        left.append(len(shardreports.unreported(url, remote.listing(url), keys)))
        turn(url, shards, keys)

    monkeypatch.setattr(shardreports, "turn_page", noted)
    for number in (1, 2):
        chips.to_zarr(store, progress=False, limits=RunLimits(part=(number, 2)))
    assert left
    assert min(left) > 0
    assert contents(store) == contents(plain)
    assert rd.verify(store).ok


# Objects that are put only where there is none


def test_an_object_is_put_only_where_there_is_none(tmp_path: Path) -> None:
    place = str(tmp_path / "folder" / "x")
    assert remote.put_new(place, b"first")
    assert not remote.put_new(place, b"second")
    assert remote.get(place) == b"first"


def test_a_store_that_cannot_look_and_put_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def simple(*args: Any, mode: str | None = None, **kwargs: Any) -> Any:
        if mode == "create":
            raise obstore.exceptions.NotSupportedError("conditional put")
        return put(*args, **kwargs)

    monkeypatch.setattr(obstore, "put", simple)
    test_an_object_is_put_only_where_there_is_none(tmp_path)


def test_what_another_part_has_put_is_not_put_again(
    chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "x.zarr"
    chips.to_zarr(store, progress=False, limits=RunLimits(part=(1, 2)))
    (store / "_job/ledger.json").unlink()  # the other one is not that far
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    chips.to_zarr(store, progress=False, limits=RunLimits(part=(2, 2)))
    assert {path: path.stat().st_mtime_ns for path in times} == times


# Limits as values


@pytest.mark.parametrize("value", [(0, 3), (4, 3), (1,), "1/3", (1.0, 3), (True, 3), (1, 2, 3)])
def test_parts_that_cannot_be(value: Any) -> None:
    with pytest.raises(rd.PlanError, match=r"RunLimits\(part=\)"):
        RunLimits(part=value)


@pytest.mark.parametrize("value", [0, -1, "soon", "", float("inf"), float("nan"), True, "1:99:00"])
def test_times_that_cannot_be(value: Any) -> None:
    with pytest.raises(rd.PlanError, match=r"RunLimits\(max_time=\)"):
        RunLimits(max_time=value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(90, 90), ("90", 90), ("2h", 7200), ("90 min", 5400), ("1:30:00", 5400), ("1-00:00:01", 86401)],
)
def test_times(value: Any, seconds: float) -> None:
    assert RunLimits(max_time=value).max_time == seconds


def test_a_heartbeat_in_no_folder(tmp_path: Path) -> None:
    for value in (tmp_path, tmp_path / "no" / "x", "s3://bucket/x"):
        with pytest.raises(rd.PlanError, match=r"RunLimits\(heartbeat=\)"):
            RunLimits(heartbeat=value)


def test_limits_of_a_lazy_job(chips: rd.Chips, tmp_path: Path) -> None:
    with pytest.raises(rd.PlanError, match="compute=False"):
        chips.to_zarr(tmp_path / "x.zarr", compute=False, limits=RunLimits(part=(1, 2)))


def test_a_heartbeat_says_how_far_it_is(
    chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "beat.json", list[dict[str, Any]]()
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target) == str(file):
            seen.append(json.loads(file.read_text()))

    monkeypatch.setattr(os, "replace", noted)
    chips.to_zarr(tmp_path / "x.zarr", progress=False, limits=RunLimits(part=(1, 2), heartbeat=file))
    assert (seen[0]["done"], seen[0]["total"]) == (None, None)  # nothing is planned yet
    total = len(part_of(chips, 1, 2))
    assert sorted({beat["done"] for beat in seen[1:]}) == list(range(total + 1))
    assert {beat["total"] for beat in seen[1:]} == {total}
    assert [beat["time"] for beat in seen] == sorted(beat["time"] for beat in seen)
    assert os.listdir(tmp_path) == ["x.zarr", "beat.json"] or sorted(os.listdir(tmp_path)) == [
        "beat.json",
        "x.zarr",
    ]


def test_a_heartbeat_is_renewed_though_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rasteret_dask.store.heartbeat.RENEWED_S", 0.01)
    file = tmp_path / "beat.json"
    with begun(RunLimits(heartbeat=file)):
        first = file.stat().st_mtime_ns
        until(lambda: file.stat().st_mtime_ns > first)


def test_a_manifest_of_parts_says_who_wrote_what(chips: rd.Chips, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    for number in (1, 2):
        chips.to_zarr(store, progress=False, limits=RunLimits(part=(number, 2)))
    rows = pq.read_table(store / "manifest.parquet")
    assert rows["attempts"].to_pylist() == [1] * SHARDS
