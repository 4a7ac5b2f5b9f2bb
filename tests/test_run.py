"""The job on every scheduler: the same chips, killed anywhere, in any store, within its memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
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
from distributed import Client, LocalCluster, get_client
from processes import NEW_PROCESSES
from test_cubes import NOON, X0, Y0, merged, scene
from test_write import layout_of, stamps, tries

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError
from rasteret_dask.grid import transformer
from rasteret_dask.reader import engine as reader
from rasteret_dask.reader import tilefile
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.store.run import run_zarr
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
    return rd.join(**sources).chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)


@pytest.fixture(scope="module")
def wanted(joined: rd.Chips) -> dict[str, xr.Dataset]:
    """Return the train chips of each source, computed by one thread."""
    tree = joined.select("train").to_xarray()
    return {n: tree[n].to_dataset().compute(scheduler="sync") for n in ("optical", "embeddings")}


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    for name in ("pixels", "valid", "valid_fraction", "datetime", "bounds"):
        if name in expected:
            np.testing.assert_array_equal(found[name].values, expected[name].values)
    for name in ("chip_id", "source", "band"):
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
        run_zarr(layout, str(tmp_path / "x.zarr"), {}, client, progress=False)
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


def test_without_a_client_a_cluster_comes_and_goes(
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


def test_a_worker_killed_in_the_middle(
    joined: rd.Chips, wanted: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    store = tmp_path / "x.zarr"
    layout = layout_of(joined.select("train"), 40_000)
    shards = len(list(layout.job.shards()))
    assert shards > 20
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as own,
        Client(own, set_as_default=False) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))
        stopped = threading.Event()

        def kill() -> None:
            while not stopped.wait(0.02):
                if len(list((store / "_job" / "tried").glob("*"))) >= 3:
                    os.kill(victim, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        run_zarr(layout, str(store), {}, client, progress=False)
        stopped.set()
        killer.join()
        assert victim not in client.run(os.getpid).values()
    assert_store(store, wanted)
    assert len(pq.read_table(store / "manifest.parquet")) == shards


CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
import rasteret_dask as rd
from rasteret_dask.store.run import run_zarr
from test_write import layout_of
dates = ("2024-04-01", "2024-06-30")
s2 = rd.build_from_stac(sys.argv[2], name="s2", date_range=dates)
chips = s2.harmonize(bands=["red", "nir"], time="1MS", units="reflectance", mask="clouds").chips(size=32, cell_km=0.96)
run_zarr(layout_of(chips.sample(60), 50_000), sys.argv[3], {}, None, progress=False)
"""


def client(world: World, store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CLIENT, str(Path(__file__).parent), str(world.sentinel2), str(store)]
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
        running = client(small_world, store)
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
            finished[shard] = {p: m for p, m in now.items() if p.startswith(f"pixels/c/{number}/")}
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
    from obstore.store import S3Store

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
    run_zarr(layout, url, {}, None, progress=False)
    bucket = S3Store("chips", client_options={"allow_http": True}, virtual_hosted_style_request=False)
    store = zarr.storage.ObjectStore(
        S3Store("chips", prefix="some/where/train.zarr", client_options={"allow_http": True}), read_only=True
    )
    assert_store(store, wanted)

    # one shard lost, the commit too
    lost = "some/where/train.zarr/optical/pixels/c/1/0/0/0/0"
    obstore.delete(bucket, [lost, "some/where/train.zarr/zarr.json"])
    run_zarr(layout, url, {}, None, progress=False)
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
    job = layout_of(rd.join(**sources).chips(size=32, cell_km=0.96), 1_500_000).job
    graph = lower(job, {})
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
    assert found["source"].values.tolist() == [["s2"]]


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
        run_zarr(layout, str(tmp_path / "x.zarr"), {}, client, progress=False)
        (peak,) = client.run(peak_bytes).values()
    assert task_bytes(layout.job, layout.outputs) <= 3 * 128 * MB  # what explain() says
    allowed = 600e6 + threads * 3 * 128 * MB
    print(f"{how} {threads} threads: {peak / MB:.0f} MiB of {allowed / MB:.0f}")
    assert peak <= allowed
