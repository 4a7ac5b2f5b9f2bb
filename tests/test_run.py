"""The job on every scheduler: the same chips, killed anywhere, in any store, within its memory."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import xarray as xr
import zarr
from affine import Affine
from bucket_host import Control, Rule, serving_bucket
from distributed import Client, LocalCluster, Scheduler, SchedulerPlugin, get_client
from obstore.store import S3Store
from part_processes import hold, killed_in_the_middle, reports
from processes import NEW_PROCESSES
from soak import stage
from streams import until
from test_cubes import NOON, X0, Y0, merged, scene
from test_write import layout_of, stamps, tries
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import ConcurrentWriteWarning, CredentialsError, JobError, UnwritableStoreError
from rasteret_dask.grid import transformer
from rasteret_dask.net import remote
from rasteret_dask.reader import engine as reader
from rasteret_dask.reader import tilefile
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.store import presence
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.oncluster import ClusterTasks
from rasteret_dask.store.presence import FRESH_S, present
from rasteret_dask.store.run import delayed_zarr, run_zarr
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import task_bytes
from rasteret_dask.tasks.shards import lower

MB = 2**20


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    """Forget the tiles that earlier tests have kept: here they are counted."""
    SHARED.clear()


@pytest.fixture(scope="module")
def joined(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> rd.Chips:
    sources = {
        "optical": merged(s2, l8, dtype="uint16", pick="clearest"),
        "embeddings": aef.harmonize(bands=["A00", "A63"], units="embedding"),
    }
    return rd.join(**sources).chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted(joined: rd.Chips) -> dict[str, xr.Dataset]:
    """Return the train chips of each source, computed by one thread."""
    tree = joined.select("train").to_xarray()
    return {n: tree[n].to_dataset().compute(scheduler="sync") for n in ("optical", "embeddings")}


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    for name in ("pixels", "valid", "valid_fraction", "datetime", "bounds"):
        if name in expected:
            np.testing.assert_array_equal(found[name].values, expected[name].values)
    for name in ("chip_id", "member", "band"):
        assert found[name].values.tolist() == expected[name].values.tolist()


def assert_store(store: Any, wanted: dict[str, xr.Dataset]) -> None:
    for name, expected in wanted.items():
        assert_same(xr.open_zarr(store, group=name, mask_and_scale=False, decode_times=True), expected)


# Everywhere the same


@pytest.mark.parametrize("scheduler", ["threads", "spawn", "forkserver"])
def test_to_xarray_is_the_same_on_every_scheduler(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], scheduler: str
) -> None:
    optical = joined.select("train").to_xarray()["optical"].to_dataset()
    if scheduler == "threads":
        assert_same(optical.compute(scheduler="threads"), wanted["optical"])
        return
    with dask.config.set({"multiprocessing.context": scheduler, "num_workers": 2}):
        assert_same(optical.compute(scheduler="processes"), wanted["optical"])


def test_load_is_the_same_in_memory(joined: rd.Chips, wanted: dict[str, xr.Dataset]) -> None:
    """Shards write into one array a source, whatever the number of threads."""
    train = joined.select("train")
    for threads in (1, 3):
        with dask.config.set(num_workers=threads):
            found = train.load()
        assert isinstance(found, xr.DataTree)
        assert set(found.children) == set(wanted)
        for name, dataset in wanted.items():
            loaded = found[name].to_dataset()
            assert isinstance(loaded["pixels"].data, np.ndarray)
            assert_same(loaded, dataset)


def test_load_applies_functions(joined: rd.Chips) -> None:
    """What a user's function returns has another shape: it is copied into place."""
    ratio = joined.select("train").map(first_two_bands, source="optical")
    found, lazy = ratio.load(), ratio.to_xarray()
    for name in ("optical", "embeddings"):
        xr.testing.assert_identical(
            found[name].to_dataset(), lazy[name].to_dataset().compute(scheduler="threads")
        )
    assert found["optical"].sizes["band"] == 2


def first_two_bands(chips: xr.DataArray) -> xr.DataArray:
    return chips.isel(band=slice(2))


@pytest.mark.parametrize("scheduler", ["threads", "sync"])
def test_a_lazy_job_writes_and_commits_on_any_scheduler(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], tmp_path: Path, scheduler: str
) -> None:
    lazy = joined.select("train").to_zarr(tmp_path / "x.zarr", compute=False)
    assert lazy is not None
    assert not (tmp_path / "x.zarr" / "zarr.json").exists()
    lazy.compute(scheduler=scheduler)
    assert_store(tmp_path / "x.zarr", wanted)
    again = joined.select("train").to_zarr(tmp_path / "x.zarr", compute=False)
    assert again is not None
    before = stamps(tmp_path)
    again.compute(scheduler=scheduler)
    assert stamps(tmp_path) == before


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as running:
        yield running


def test_to_zarr_on_a_cluster_of_processes(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], cluster: LocalCluster, tmp_path: Path
) -> None:
    with Client(cluster, set_as_default=False) as client:
        layout = layout_of(joined.select("train"))
        run_zarr(layout, str(tmp_path / "x.zarr"), ReadContext(), client, progress=False)
        tree = joined.select("train").to_xarray()
        assert_same(tree["embeddings"].to_dataset().compute(scheduler=client), wanted["embeddings"])
    assert_store(tmp_path / "x.zarr", wanted)
    assert set(tries(tmp_path / "x.zarr").values()) == {1}


def test_to_zarr_takes_a_scheduler_s_address(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], cluster: LocalCluster, tmp_path: Path
) -> None:
    joined.select("train").to_zarr(tmp_path / "x.zarr", client=cluster.scheduler_address, progress=False)
    assert_store(tmp_path / "x.zarr", wanted)


def test_to_zarr_takes_the_current_client(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], cluster: LocalCluster, tmp_path: Path
) -> None:
    with Client(cluster) as client:
        before = client.nthreads()
        joined.select("train").to_zarr(tmp_path / "x.zarr", progress=False)
        assert client.nthreads() == before
    assert_store(tmp_path / "x.zarr", wanted)


def test_without_a_client_threads_of_this_process_write(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joined.select("train").to_zarr(tmp_path / "x.zarr")
    assert_store(tmp_path / "x.zarr", wanted)
    assert "1/1 shards" in capsys.readouterr().err
    with pytest.raises(ValueError, match="client"):
        get_client()


def test_a_mended_job_runs_again_on_the_same_cluster(
    small_world: World, cluster: LocalCluster, tmp_path: Path
) -> None:
    """The scheduler remembers errors for as long as somebody holds their futures, as a notebook's traceback does."""
    folder = tmp_path / "s2"
    shutil.copytree(small_world.sentinel2.parent, folder)
    s2 = rd.build_from_stac(folder / "collection.json", name="s2")
    chips = s2.harmonize(bands=["red"], units="reflectance").chips(size=32, cell_km=0.96).sample(40)
    path = sorted(folder.rglob("B04.tif"))[1]
    hidden = path.rename(path.with_suffix(".gone"))
    with Client(cluster, set_as_default=False) as client:
        try:
            chips.to_zarr(tmp_path / "x.zarr", client=client, progress=False)
        except JobError as error:
            held = error  # and with it every frame below
        hidden.rename(path)
        chips.to_zarr(tmp_path / "x.zarr", client=client, progress=False)
    assert path.parent.name in str(held)
    assert xr.open_zarr(tmp_path / "x.zarr").sizes["chip"] == 40


# Killed


@pytest.fixture(scope="module")
def small_shards(joined: rd.Chips) -> Layout:
    """Return the train chips in some 20 shards."""
    layout = layout_of(joined.select("train"), 150_000)
    assert 15 < len(list(layout.job.shards())) < 40
    return layout


@contextmanager
def once(happened: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Act as soon as something has happened during a block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
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


def test_what_a_killed_worker_has_written_is_not_done_again(
    small_shards: Layout, wanted: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    store = tmp_path / "x.zarr"
    shards = len(list(small_shards.job.shards()))
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as own,
        Client(own, set_as_default=False) as client,
    ):
        with killed_in_the_middle(client, tmp_path / "notes", store, shards // 2) as (victim, noted):
            run_zarr(small_shards, str(store), ReadContext(), client, progress=False)
        assert victim not in client.run(os.getpid).values()
    assert_store(store, wanted)
    manifest = pq.read_table(store / "manifest.parquet")
    assert len(manifest) == shards
    assert any(name.endswith(f":{victim}") for name in manifest["process"].to_pylist())
    before = json.loads(noted.read_text())
    assert shards // 2 <= len(before) < shards
    now, tried = reports(store), tries(store)
    assert {shard: now[shard] for shard in before} == before
    assert {shard for shard, count in tried.items() if count > 1}.isdisjoint(before)
    assert sum(tried.values()) <= shards + 1  # what the victim had under way


def test_a_task_that_runs_again_looks_before_it_reads(
    small_shards: Layout, wanted: dict[str, xr.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask runs what it has lost again: results on workers that are gone, and whole graphs that are computed twice."""
    lazy = delayed_zarr(small_shards, str(tmp_path / "x.zarr"), ReadContext())
    lazy.compute(scheduler="threads")
    (tmp_path / "x.zarr" / "zarr.json").unlink()
    lost = next((tmp_path / "x.zarr" / "optical" / "pixels" / "c" / "3").rglob("0"))
    while lost.is_dir():
        lost = next(lost.iterdir())
    lost.unlink()
    before, seen = stamps(tmp_path / "x.zarr" / "_job"), Seen(monkeypatch)
    SHARED.clear()
    lazy.compute(scheduler="threads")
    tried = tries(tmp_path / "x.zarr")
    assert {shard for shard, count in tried.items() if count > 1} == {"train-00003"}
    assert set(tried.values()) == {1, 2}
    assert seen.tiles
    rewritten = {p for p, m in stamps(tmp_path / "x.zarr" / "_job").items() if before.get(p) != m}
    assert not {
        p for p in rewritten if p.startswith("done/")
    }  # its objects are what they were: the report stays
    assert_store(tmp_path / "x.zarr", wanted)


class Held(SchedulerPlugin):
    """Counts the results that a scheduler's workers hold."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.most, self.finished = scheduler, 0, 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.finished += finish == "memory"
        self.most = max(self.most, sum(t.state == "memory" for t in self.scheduler.tasks.values()))


def test_a_written_shard_is_forgotten_by_the_cluster(small_shards: Layout, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with (
        LocalCluster(**settings, dashboard_address=":0") as own,
        Client(own, set_as_default=False) as client,
    ):
        scheduler: Any = own.scheduler
        held = Held(scheduler)
        scheduler.add_plugin(held)
        run_zarr(small_shards, str(tmp_path / "x.zarr"), ReadContext(), client, progress=False)
        until(lambda: not scheduler.tasks)
    shards = len(list(small_shards.job.shards()))
    assert held.finished == shards
    assert held.most < shards


def test_a_lost_scheduler_is_one_error_that_says_what_is_written(
    small_shards: Layout, wanted: dict[str, xr.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, total = tmp_path / "x.zarr", len(list(small_shards.job.shards()))
    (notes := tmp_path / "notes").mkdir()
    heard, take = list[Any](), ClusterTasks.news

    def news(tasks: ClusterTasks) -> Any:
        some = take(tasks)
        heard.extend(some)
        return some

    monkeypatch.setattr(ClusterTasks, "news", news)
    with stage(tmp_path) as playing:
        playing.start("scheduler")
        playing.start("w1")
        with Client(playing.address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=PATIENCE_S)
            client.run(hold, str(notes))  # after some shards
        with (
            once(lambda: len(heard) >= 2, lambda: playing.kill("scheduler")),
            pytest.raises(JobError) as caught,
        ):
            run_zarr(small_shards, str(store), ReadContext(), playing.address, progress=False)
        before = reports(store)
    text = str(caught.value)
    assert playing.address in text
    (written,) = re.findall(rf"(\d+) of {total} shards are written", text)
    assert 0 < int(written) <= len(before)
    assert "cancelled" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    run_zarr(small_shards, str(store), ReadContext(), None, progress=False)  # as it says
    assert_store(store, wanted)
    now = reports(store)
    assert {shard: now[shard] for shard in before} == before


# A place that takes no more


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def test_a_full_disk_ends_the_job_at_once(
    small_shards: Layout, wanted: dict[str, xr.Dataset], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 1e6)  # whoever waits for it to pass is never heard of again
    store, total = tiny / "x.zarr", len(list(small_shards.job.shards()))
    with pytest.raises(JobError) as caught:
        run_zarr(small_shards, str(store), ReadContext(), None, progress=False)
    text = str(caught.value)
    for part in ("no space left on device (ENOSPC)", "of 614,400 bytes are free at", str(store), "Make room"):
        assert part in text
    before = reports(store)
    (written,) = re.findall(rf"(\d+) of {total} shards", text)
    assert 0 < int(written) <= len(before)
    tried = tries(store)
    assert set(tried.values()) <= {0, 1}  # none: its mark did not fit
    assert len(tried.keys() - before.keys()) < total - len(tried)  # most were not begun
    remount(tiny, "size=20m")
    run_zarr(small_shards, str(store), ReadContext(), None, progress=False)
    assert_store(store, wanted)
    now = reports(store)
    assert {shard: now[shard] for shard in before} == before


def test_a_disk_that_must_not_be_written(small_shards: Layout, tiny: Path) -> None:
    remount(tiny, "ro")
    with pytest.raises(UnwritableStoreError, match="read-only file system"):
        run_zarr(small_shards, str(tiny / "x.zarr"), ReadContext(), None, progress=False)


@pytest.mark.parametrize("where", ["threads", "cluster"])
def test_keys_that_expire_in_mid_job_end_it_at_once(
    joined: rd.Chips,
    wanted: dict[str, xr.Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    layout, control, url = layout_of(joined.select("train"), 400_000), Control(tmp_path), f"s3://mine/{where}"
    total = len(list(layout.job.shards()))
    assert total > 5
    with ExitStack() as stack:
        port = stack.enter_context(serving_bucket(control, "mine"))
        keys = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
        for name, value in {**keys, "ACCESS_KEY_ID": "old"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        options: Any = {
            "n_workers": 2,
            "threads_per_worker": 1,
            "processes": False,
            "dashboard_address": ":0",
        }
        cluster = stack.enter_context(LocalCluster(**options)) if where == "cluster" else None
        control.rule(where, Rule(after=2, status=400, code="ExpiredToken", key="old"))
        with pytest.raises(JobError) as caught:
            run_zarr(layout, url, ReadContext(), cluster, progress=False)
        assert isinstance(caught.value.__cause__, CredentialsError)
        text, before = str(caught.value), control.done(where)
        assert text.count("keys that have expired (ExpiredToken)") == 1
        for part in (
            f"of {total} shards are written",
            "No further shard was tried. Start this process",
            "fresh",
        ):
            assert part in text
        assert 2 <= before.total() < total
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
        run_zarr(layout, url, ReadContext(), cluster, progress=False)
        assert control.done(where) == Counter({shard.name: 1 for shard in layout.job.shards()})
        s3 = S3Store("mine", prefix=where, client_options={"allow_http": True})
        assert_store(zarr.storage.ObjectStore(s3, read_only=True), wanted)


# Two clients


def trace_of(store: Path, host: str, pid: int, since: float) -> Path:
    path = store / "_job" / "clients" / f"{host}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": host, "pid": pid, "since": since}))
    return path


def traces(store: Path) -> list[Path]:
    return list((store / "_job" / "clients").glob("*.json"))


@pytest.mark.parametrize("end", ["goes on", "is killed"])
def test_a_second_client_is_told_of_the_first(
    small_world: World, s2: rd.Collection, tmp_path: Path, end: str
) -> None:
    store = tmp_path / "x.zarr"
    with client(small_world, store, 40) as first:
        try:
            check_second(first, s2, store, end)
        finally:
            first.kill()


def check_second(first: subprocess.Popen[bytes], s2: rd.Collection, store: Path, end: str) -> None:
    until(lambda: objects(store) >= 40 or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    assert traces(store)
    first.send_signal(signal.SIGSTOP)  # in the middle, for as long as the second runs
    assert not (store / "zarr.json").exists()
    if end == "is killed":
        first.kill()
        first.communicate()
    source = s2.harmonize(bands=["red", "nir"], time="1MS", units="reflectance", mask="clouds")
    chips = source.chips(size=32, cell_km=0.96).sample(60)
    layout = layout_of(chips, 50_000)
    if end == "is killed":
        run_zarr(layout, str(store), ReadContext(), None, progress=False)  # a warning would be an error
    else:
        with pytest.warns(ConcurrentWriteWarning, match=f"process {first.pid} at {platform.node()}"):
            run_zarr(layout, str(store), ReadContext(), None, progress=False)
        store.with_name("go").touch()
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate()
        assert first.returncode == 0, err.decode()
    assert not traces(store)
    expected = chips.to_xarray()
    assert isinstance(expected, xr.Dataset)
    assert_same(xr.open_zarr(store), expected.compute())


def test_a_client_elsewhere_is_told_of_while_its_trace_is_fresh(small_shards: Layout, tmp_path: Path) -> None:
    delayed_zarr(small_shards, str(tmp_path / "x.zarr"), ReadContext())  # an unfinished store
    trace = trace_of(tmp_path / "x.zarr", "elsewhere", 17, 0.0)
    with (
        pytest.warns(ConcurrentWriteWarning, match="process 17 at elsewhere"),
        present(str(tmp_path / "x.zarr")),
    ):
        assert len(traces(tmp_path / "x.zarr")) == 2
    assert traces(tmp_path / "x.zarr") == [trace]
    old = time.time() - 2 * FRESH_S
    os.utime(trace, (old, old))
    with present(str(tmp_path / "x.zarr")):
        assert trace not in traces(tmp_path / "x.zarr")
    assert not traces(tmp_path / "x.zarr")


def test_a_trace_is_renewed_while_its_client_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "RENEWED_S", 0.01)
    with present(str(tmp_path)):
        (trace,) = traces(tmp_path)
        first = trace.stat().st_mtime_ns
        until(lambda: trace.stat().st_mtime_ns > first)


def test_a_trace_that_a_killed_client_left_in_a_finished_store_goes(
    small_shards: Layout, tmp_path: Path
) -> None:
    store = tmp_path / "x.zarr"
    run_zarr(small_shards, str(store), ReadContext(), None, progress=False)
    trace_of(store, "elsewhere", 17, 0.0)
    run_zarr(small_shards, str(store), ReadContext(), None, progress=False)
    assert not traces(store)


def test_a_finished_store_says_so(
    joined: rd.Chips, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = joined.select("train")
    train.to_zarr(tmp_path / "x.zarr", progress=False)
    assert not capsys.readouterr().err
    train.to_zarr(tmp_path / "x.zarr")
    assert capsys.readouterr().err.splitlines() == [f"store {tmp_path / 'x.zarr'} is finished: nothing to do"]


CLIENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import rasteret_dask as rd
from rasteret_dask.net import remote
from rasteret_dask.store.run import run_zarr
from rasteret_dask.tasks.context import ReadContext
from test_write import layout_of
dates = ("2024-04-01", "2024-06-30")
s2 = rd.build_from_stac(sys.argv[2], name="s2", date_range=dates)
chips = s2.harmonize(bands=["red", "nir"], time="1MS", units="reflectance", mask="clouds").chips(size=32, cell_km=0.96)
store, most = Path(sys.argv[3]), int(sys.argv[4])

def held(put):
    def call(*args, **more):
        while sum(p.is_file() for p in store.rglob("*")) >= most and not store.with_name("go").exists():
            time.sleep(0.01)
        return put(*args, **more)
    return call

remote.put, remote.put_new = held(remote.put), held(remote.put_new)
run_zarr(layout_of(chips.sample(60), 50_000), str(store), ReadContext(), None, progress=False)
"""


def client(world: World, store: Path, most: int = 10**6) -> subprocess.Popen[bytes]:
    """Start a process that writes a store; with so many objects there it waits, for a file ``go`` or its end."""
    command = [
        sys.executable, "-c", CLIENT, str(Path(__file__).parent), str(world.sentinel2), str(store), str(most)
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def objects(store: Path) -> int:
    return sum(1 for p in store.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "stops", [(40,), pytest.param((2, 9, 40, 80), marks=pytest.mark.slow)], ids=["once", "four times"]
)
def test_the_client_killed_again_and_again(
    small_world: World, s2: rd.Collection, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """While it prepares, while it writes, and just before it commits: nothing finished is done again."""
    store = tmp_path / "x.zarr"
    finished: dict[str, dict[str, int]] = {}
    for stop_at in stops:
        running = client(small_world, store, stop_at)
        while running.poll() is None and objects(store) < stop_at:
            time.sleep(0.002)
        running.kill()
        running.communicate()
        assert not (store / "zarr.json").exists(), "not killed in time"
        with pytest.raises((FileNotFoundError, ValueError)):
            xr.open_zarr(store)
        now = stamps(store)
        done = {p.stem for p in (store / "_job" / "done").glob("*.json")}
        for shard, seen in finished.items():
            assert {p: now.get(p) for p in seen} == seen, f"{shard} was written again"
        for shard in done:
            number = int(shard[-5:])
            objects_of = {p: m for p, m in now.items() if p.startswith(f"pixels/c/{number}/")}
            # "#" stands in what a killed put has left behind: no object, and swept by the next run.
            finished[shard] = {p: m for p, m in objects_of.items() if "#" not in p}
    assert finished
    _, err = (last := client(small_world, store)).communicate()
    assert last.returncode == 0, err.decode()
    now = stamps(store)
    for seen in finished.values():
        assert {p: now[p] for p in seen} == seen
    source = s2.harmonize(bands=["red", "nir"], time="1MS", units="reflectance", mask="clouds")
    expected = source.chips(size=32, cell_km=0.96).sample(60).to_xarray()
    assert isinstance(expected, xr.Dataset)
    assert_same(xr.open_zarr(store), expected.compute())


# Object stores


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Return the address of an S3 server."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_an_object_store_by_url(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    keys = {
        "AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(f"{s3}/chips", method="PUT")):
        pass
    url = "s3://chips/some/where/train.zarr"
    train = joined.select("train")
    layout = layout_of(train, 300_000)
    run_zarr(layout, url, ReadContext(), None, progress=False)
    bucket = S3Store("chips", client_options={"allow_http": True}, virtual_hosted_style_request=False)
    store = zarr.storage.ObjectStore(
        S3Store("chips", prefix="some/where/train.zarr", client_options={"allow_http": True}), read_only=True
    )
    assert_store(store, wanted)

    # one shard lost, the commit too
    lost = "some/where/train.zarr/optical/pixels/c/1/0/0/0/0"
    obstore.delete(bucket, [lost, "some/where/train.zarr/zarr.json"])
    run_zarr(layout, url, ReadContext(), None, progress=False)
    assert_store(store, wanted)
    rows = pq.read_table(memory(obstore.get(bucket, "some/where/train.zarr/manifest.parquet").bytes()))
    attempts = dict(zip(rows["shard"].to_pylist(), rows["attempts"].to_pylist(), strict=True))
    assert {shard for shard, n in attempts.items() if n == 2} == {"train-00001"}
    with pytest.raises(rd.StoreError, match="another plan"):
        joined.select("val").to_zarr(url, progress=False)


def memory(data: Any) -> Any:
    import io

    return io.BytesIO(bytes(data))


# Counting


class Seen:
    """Notes which tiles are sent for, in the place where all of them pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: Counter[tuple[str, int, int, int]] = Counter()
        """(href, level, plane, tile) -> how often."""
        bringing, lock = tilefile.bring, threading.Lock()

        def bring(asset: Any, level: int, flights: Any, *more: Any) -> None:
            with lock:
                self.tiles.update((href, *rest) for href, _, _, *rest in (f.key for f in flights))
            bringing(asset, level, flights, *more)

        monkeypatch.setattr(reader, "bring", bring)

    @property
    def files(self) -> set[str]:
        """The files that tiles were taken from."""
        return {href for href, *_ in self.tiles}


@pytest.mark.parametrize("pick", ["closest", "least_cloudy", "clearest", "median", "mean"])
def test_a_task_reads_a_tile_once_and_only_of_scenes_that_feed_it(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, monkeypatch: pytest.MonkeyPatch, pick: str
) -> None:
    sources = {"optical": merged(s2, l8, pick=pick), "embeddings": aef.harmonize(bands=["A00", "A01"])}
    job = layout_of(rd.join(**sources).chips(size=32, cell_km=0.96), 1_500_000).job  # type: ignore[arg-type]
    graph = lower(job, ReadContext())
    assert len(graph.shards) > 2
    tasks = graph.fused()
    root = next(key for key in tasks if str(key[0]).startswith("job-"))  # type: ignore[index]
    files: set[str] = set()
    for shard in graph.shards:
        seen = Seen(monkeypatch)
        tasks[graph.key(shard)]({root: job})
        monkeypatch.undo()
        assert set(seen.tiles.values()) <= {1}
        span = slice(job.feeds.offsets[shard.start], job.feeds.offsets[shard.stop])
        feeding = {
            asset["href"]
            for source, row in zip(job.feeds.source[span].tolist(), job.feeds.row[span].tolist(), strict=True)
            for _, asset in job.records[source].table["assets"][row].as_py()
        }
        assert seen.files <= feeding
        files |= seen.files
    assert len(files) > 5


def test_clearest_reads_only_the_quality_band_of_losers(
    s2: rd.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = s2.harmonize(bands=["red"], time="3MS", mask="clouds", units="reflectance", pick="clearest")
    one = source.chips(size=32, cell_km=0.96).sample(1).to_xarray()
    assert isinstance(one, xr.Dataset)
    seen = Seen(monkeypatch)
    found = one.compute(scheduler="sync")
    bands = Counter(Path(path).stem for path in seen.files)
    assert bands["SCL"] >= 4
    assert bands["B04"] <= 2  # the winner's: one granule, or two
    assert found["member"].values.tolist() == [["s2"]]


@pytest.fixture(scope="module")
def county(tmp_path_factory: pytest.TempPathFactory) -> rd.Collection:
    """Return one scene of 100 x 100 km at 10 m, whose pixels say where they are."""
    folder = tmp_path_factory.mktemp("county")
    rows, cols = np.ogrid[:10_240, :10_240]
    values = (1 + (rows // 8 * 7 + cols // 8) % 60_000).astype(np.uint16)
    item = scene(
        folder, "county", NOON, {"red": values}, Affine(10, 0, X0, 0, -10, Y0), (512, 512), platform="p"
    )
    return rd.build_from_stac([item], name="county")


def test_scattered_points_read_only_the_tiles_they_touch(
    county: rd.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 points over 100 km: one shard, never its bounding box."""
    rng = np.random.default_rng(1)
    east, south = X0 + rng.uniform(1_000, 101_000, 100), Y0 - rng.uniform(1_000, 101_000, 100)
    lon, lat = transformer(32633, 4326).transform(east, south)
    import geopandas

    points = geopandas.GeoDataFrame(
        {"label": [f"p{i}" for i in range(100)]}, geometry=shapely.points(lon, lat), crs=4326
    )
    chips = county.harmonize(units="raw").chips(size=64, at=points)
    assert len(list(chips.job.shards())) == 1
    lazy = chips.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    seen = Seen(monkeypatch)
    found = lazy.compute(scheduler="sync")
    touched = set()
    for i in range(100):
        xmin, _, _, ymax = found["bounds"].values[i]
        row, col = round((Y0 - ymax) / 10), round((xmin - X0) / 10)
        touched |= {(r // 512) * 20 + c // 512 for r in (row, row + 63) for c in (col, col + 63)}
        at = 1 + (np.add.outer(np.arange(row, row + 64) // 8 * 7, np.arange(col, col + 64) // 8)) % 60_000
        np.testing.assert_array_equal(found["pixels"].values[i, 0, 0], at)
    assert {tile for *_, tile in seen.tiles} == touched
    assert set(seen.tiles.values()) == {1}
    assert len(touched) < 200
    assert sorted(chips.table.column("label").to_pylist()) == sorted(points["label"])


# Memory


def peak_bytes() -> int:
    """Return the most memory this process has held; ru_maxrss would count the parent it was forked from."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> rd.Collection:
    """Return four passes of four bands that no codec makes smaller."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("noise")
    items = []
    for day in range(4):
        pixels = {
            k: rng.integers(1, 10_000, (2048, 2048)).astype(np.uint16)
            for k in ("blue", "green", "red", "nir")
        }
        pixels["scl"] = rng.choice(np.array([4, 8], np.uint8), (2048, 2048))
        said: dict[str, Any] = {
            "platform": "sentinel-2a",
            "s2:datatake_id": f"GS2A_{day}",
            "s2:processing_baseline": "05.00",
        }
        said["tile_px"] = (512, 512)
        when = NOON + timedelta(days=day)
        items.append(scene(folder, f"d{day}", when, pixels, Affine(10, 0, X0, 0, -10, Y0), **said))
    return rd.build_from_stac(items, name="noise", dataset="sentinel-2-l2a")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("threads", "how"),
    [(1, {"dtype": "uint16"}), (4, {"dtype": "uint16"}), (1, {"time": "1YS", "pick": "median"}),
     (4, {"time": "1YS", "pick": "mean"})],
    ids=["mosaic-1", "mosaic-4", "median-1", "mean-4"],
)  # fmt: skip
def test_a_worker_keeps_within_its_memory(
    noise: rd.Collection, tmp_path: Path, threads: int, how: dict[str, Any]
) -> None:
    source = noise.harmonize(bands=["blue", "green", "red", "nir"], units="reflectance", mask="clouds", **how)
    chips = source.chips(size=256, stride=96 if "dtype" in how else 192, cell_km=20.48)
    layout = chips._layout
    if "dtype" in how:  # full shards of 128 MiB, one a thread
        per = layout.job.hierarchies[0].per_shard
        assert per * layout.outputs[0].chip_bytes > 120 * MB
        stop = per * threads
        assert stop <= len(chips)
        hierarchy = replace(layout.job.hierarchies[0], stop=stop)
        layout = replace(layout, job=replace(layout.job, hierarchies=(hierarchy,)))
    settings: dict[str, Any] = {
        "n_workers": 1,
        "processes": True,
        "memory_limit": 0,
        "dashboard_address": ":0",
    }
    with (
        dask.config.set(NEW_PROCESSES),
        LocalCluster(threads_per_worker=threads, **settings) as own,
        Client(own, set_as_default=False) as client,
    ):
        run_zarr(layout, str(tmp_path / "x.zarr"), ReadContext(), client, progress=False)
        (peak,) = client.run(peak_bytes).values()
    assert task_bytes(layout.job, layout.outputs) <= 3 * 128 * MB  # what explain() says
    allowed = 600e6 + threads * 3 * 128 * MB
    print(f"{how} {threads} threads: {peak / MB:.0f} MiB of {allowed / MB:.0f}")
    assert peak <= allowed
