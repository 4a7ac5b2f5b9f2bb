"""Stores behind S3 and plain HTTP: the chips of the same store on disk, few requests, faults told or outlived."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from processes import NEW_PROCESSES
from servers import Asked, Fault, RangeServer, serving
from small_stores import assert_same, small, written

import rasteret_dask as rd
from rasteret_dask.compacting import compact
from rasteret_dask.errors import PlanError, ReadError, StoreError
from rasteret_dask.net import gate, remote
from rasteret_dask.net.hrefs import host_of
from rasteret_dask.store.run import delayed_zarr
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.streams.stream import Stream
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext

SHARD_BYTES = 200_000


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts are short; how many there are stays as it is."""
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def chips(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    """Return chips of two sources, one of which has a variable ``valid``."""
    optical = s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds", dtype="uint16")
    joined = rd.join(optical=optical, embeddings=aef.harmonize(bands=["A00", "A63"], units="embedding"))
    return joined.chips(size=32, cell_km=0.96).split(train=0.6, val=0.4, test=0, seed=42).sample(70)


@pytest.fixture(scope="module")
def folder(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the store, and another one with a single shard a split."""
    at = tmp_path_factory.mktemp("stores")
    written(chips, at / "small", SHARD_BYTES)
    written(chips, at / "big", 100_000_000)
    return at


@pytest.fixture(scope="module")
def disk(folder: Path) -> StoredChips:
    opened = open_chips(folder / "small")
    assert len(opened.stored.sizes) > 6
    return opened


class Bucket:
    """An S3 server on loopback, which notes every request."""

    def __init__(self) -> None:
        moto, serving = pytest.importorskip("moto.server"), pytest.importorskip("werkzeug.serving")
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.log: list[Asked] = []
        self._lock = Lock()
        handler = type("Quiet", (serving.WSGIRequestHandler,), {"log": lambda *_: None})
        self._server = serving.make_server(
            "127.0.0.1", 0, self._noted, threaded=True, request_handler=handler
        )
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/chips", method="PUT")):
            pass
        self.log.clear()

    def _noted(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        ranged = environ.get("HTTP_RANGE")
        first, last = map(int, ranged.removeprefix("bytes=").split("-")) if ranged else (None, None)
        path = environ["PATH_INFO"] + ("?list" if "list-type" in environ["QUERY_STRING"] else "")

        def begin(status: str, *more: Any) -> Any:
            with self._lock:
                self.log.append(Asked(environ["REQUEST_METHOD"], path, first, last, int(status[:3])))
            return start(status, *more)

        return self._app(environ, begin)

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """Return an S3 server, to which ``s3://chips`` leads."""
    running = Bucket()
    keys = {
        "ENDPOINT_URL": running.address,
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(f"AWS_{name}", value)
        yield running
    running.stop()


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[RangeServer]:
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def in_bucket(chips: rd.Chips, bucket: Bucket) -> str:
    """Return the store, written to a bucket."""
    url = "s3://chips/some where/small"
    delayed_zarr(small(chips, SHARD_BYTES), url, ReadContext()).compute(scheduler="threads")
    return url


@pytest.fixture(scope="module", params=["s3", "http"])
def there(request: pytest.FixtureRequest) -> str:
    """Return the URL of the same store elsewhere."""
    if request.param == "s3":
        url: str = request.getfixturevalue("in_bucket")
        return url
    web: RangeServer = request.getfixturevalue("web")
    return web.url("small")


def same(found: Arrays, wanted: Arrays) -> None:
    """Compare two batches bit for bit."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def objects(url: str) -> dict[str, bytes]:
    """Return the objects of a store, but for those of the job that wrote it."""
    return {p: remote.get(remote.join(url, p)) for p in remote.listing(url) if not p.startswith("_job/")}


# The law: wherever a store lies, its chips are the same


def test_what_a_bucket_holds_is_what_a_folder_holds(in_bucket: str, disk: StoredChips) -> None:
    found, wanted = objects(in_bucket), objects(disk.stored.url)
    assert found.keys() == wanted.keys()
    tables = {"manifest.parquet", "chips.parquet"}  # the one has times in it; the other is compared below
    assert {p: data for p, data in found.items() if p not in tables} == {
        p: data for p, data in wanted.items() if p not in tables
    }


def test_the_chips_are_those_on_disk(there: str, disk: StoredChips) -> None:
    opened = open_chips(there)
    assert opened.table.equals(disk.table)
    assert opened.digest == disk.digest
    ids = list(disk)
    picked = [*ids[5::17], ids[3], ids[3], ids[-1]]
    same(opened.take(picked), disk.take(picked))
    same(opened.take(ids), disk.take(ids))
    one, wanted = opened[ids[7]], disk[ids[7]]
    assert one.keys() == wanted.keys()
    np.testing.assert_array_equal(one["optical"], wanted["optical"])
    for mine, theirs in (
        (opened, disk),
        (open_chips(there, split="val"), disk.select("val")),
        (opened.filter(("coverage", ">", 0.5)).sample(9), disk.filter(("coverage", ">", 0.5)).sample(9)),
    ):
        assert_same(mine.load(), theirs.load())
        assert_same(mine.to_xarray().compute(scheduler="threads"), theirs.load())


def test_streams_are_those_from_disk_and_states_pass_from_one_to_the_other(
    there: str, disk: StoredChips
) -> None:

    def stream_of(chips: StoredChips) -> Stream:
        return chips.select("train").stream(7, shuffle=5, epochs=2)

    wanted = list(stream_of(disk))
    stream = stream_of(open_chips(there))
    begun = [next(stream) for _ in range(len(wanted) // 2 + 1)]
    state = stream.state_dict()
    stream.close()
    rest = stream_of(open_chips(there))
    rest.load_state_dict(state)
    found = [*begun, *rest]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        same(one, other)
    elsewhere = stream_of(disk)
    elsewhere.load_state_dict(state)
    same(next(elsewhere), wanted[len(begun)])


def test_a_cluster_streams_from_a_bucket(in_bucket: str, disk: StoredChips) -> None:
    """Its workers open the store themselves, with the keys of their environment."""
    with (
        dask.config.set(NEW_PROCESSES),
        LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
    ):
        there = stream_from(
            cluster.scheduler_address, in_bucket, 9, shuffle=2, rank=1, world_size=2, split="train"
        )
        here = disk.select("train").stream(9, shuffle=2, rank=1, world_size=2)
        for one, other in zip(there, here, strict=True):
            same(one, other)
        with Client(cluster, set_as_default=False) as client:
            assert (
                open_chips(in_bucket).sample(30).stats(client=client).to_json()
                == disk.sample(30).stats().to_json()
            )


def test_statistics_stay_with_a_bucket_s_store(in_bucket: str, bucket: Bucket, disk: StoredChips) -> None:
    opened = open_chips(in_bucket).select("train")
    wanted = disk.select("train").stats().to_json()
    assert opened.stats().to_json() == wanted
    bucket.log.clear()
    assert opened.stats().to_json() == wanted
    assert [a.method for a in bucket.log] == ["GET"]
    assert "/_job/stats/" in bucket.log[0].path


def test_who_cannot_write_measures_all_the_same(web: RangeServer, disk: StoredChips) -> None:
    opened = open_chips(web.url("small")).select("val")
    wanted = disk.select("val").stats().to_json()
    shutil.rmtree(Path(disk.stored.url) / "_job" / "stats")
    assert opened.stats().to_json() == wanted
    assert not (Path(disk.stored.url) / "_job" / "stats").exists()


def test_verify_compares_a_store_elsewhere_with_what_was_written(there: str, disk: StoredChips) -> None:
    report = rd.verify(there)
    assert report.ok
    assert report.objects == rd.verify(disk.stored.url).objects
    assert not report.unexpected


def test_a_damaged_object_in_a_bucket_is_named(in_bucket: str) -> None:
    path = next(p for p in remote.listing(in_bucket) if "/pixels/c/" in f"/{p}")
    whole = remote.get(remote.join(in_bucket, path))
    remote.put(remote.join(in_bucket, path), whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        report = rd.verify(in_bucket)
        assert (report.missing, report.damaged) == ((), (path,))
    finally:
        remote.put(remote.join(in_bucket, path), whole)
    assert rd.verify(in_bucket)


def test_what_a_server_does_not_know_is_asked_for_once(web: RangeServer) -> None:
    """Many static file servers answer a PUT, such as that of statistics, with 501."""
    web.fault("big/chips.parquet", Fault(status=501))
    web.forget()
    with pytest.raises(ReadError, match="501"):
        remote.get(web.url("big/chips.parquet"))
    web.heal()
    assert len(web.asked("big/chips.parquet")) == 1
    with pytest.raises(StoreError, match="a web server"):
        remote.put(web.url("big/new"), b"")


def test_a_compact_store_is_the_same_wherever_it_comes_from(
    there: str, bucket: Bucket, disk: StoredChips, tmp_path: Path
) -> None:
    targets = [str(tmp_path / "compact"), f"s3://chips/compact-{there.partition(':')[0]}"]
    compact(disk.stored.url, targets[0])
    compact(there, targets[1])
    for split in ("train", "val"):
        assert_same(open_chips(targets[1], split).load(), open_chips(targets[0], split).load())
    assert_same(open_chips(targets[1]).load(), disk.load())


# Requests


@pytest.fixture(params=["s3", "http"])
def counted(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> tuple[str, list[Asked]]:
    """Return the store of big shards at a place where nobody has read it, and the requests that it will see."""
    if request.param == "http":
        web: RangeServer = request.getfixturevalue("server")
        shutil.copytree(folder / "big", tmp_path / "big")
        return web.url("big"), web.log
    bucket: Bucket = request.getfixturevalue("bucket")
    url = f"s3://chips/{request.node.name}"
    for path, data in objects(str(folder / "big")).items():
        remote.put(remote.join(url, path), data)
    bucket.log.clear()
    return url, bucket.log


def heard(log: list[Asked]) -> Counter[str]:
    """Return how often each variable, or file, was asked for; all by GET, and answered, but for what may be there."""
    assert {(a.method, a.status) for a in log if a.path.rsplit("/", 2)[-2] not in ("part-0001", "_tables")} <= {
        ("GET", 200), ("GET", 206),
    }  # fmt: skip
    found = Counter(a.path.split("/c/")[0].split("/zarr.json")[0].rpartition("/")[2] for a in log)
    log.clear()
    return found


def test_opening_reads_what_is_known_of_all_chips(counted: tuple[str, list[Asked]]) -> None:
    """The root's metadata twice: the store's digest first, and the rest if this process has not opened it yet."""
    url, log = counted
    name = url.rpartition("/")[2]
    opened = open_chips(url)
    # whether it has grown: a server that does not list is asked for the next part, and for added columns
    lists = {"part-0001": 1, "0001.parquet": 1} if url.startswith("http") else {"chips?list": 1}
    assert heard(log) == {name: 2, "manifest.parquet": 1, **lists}
    ids = list(opened)
    assert heard(log) == {"chips.parquet": 1}
    assert len(opened.select("val")) < len(ids) == len(opened)
    assert not log
    assert len(open_chips(url)) == len(ids)  # again: whether it is still the same, and whole
    assert heard(log).keys() <= {name, "manifest.parquet", "chips.parquet", *lists}


def test_a_chip_is_a_get_an_array_and_a_shard_is_a_get_an_object(
    counted: tuple[str, list[Asked]], folder: Path
) -> None:
    url, log = counted
    opened = open_chips(url, split="train")
    ids = list(opened)
    assert len(opened.stored.sizes) == 1
    assert opened.stored.bands.keys() == {"optical", "embeddings"}
    objects = {f: f.stat().st_size for f in (folder / "big" / "train").glob("*/*/c/0/**/0") if f.is_file()}
    sizes = {"/".join(f.parts[f.parts.index("train") + 1 :][:2]): size for f, size in objects.items()}

    def asked() -> dict[tuple[str, str], int]:
        """Return how often each array was asked for, in whole or in parts."""
        found: Counter[tuple[str, str]] = Counter()
        for one in log:
            array = "/".join(one.path.split("/c/")[0].rsplit("/", 2)[1:])
            found[array, "whole" if one.nbytes == sizes[array] else "part"] += 1
        heard(log)
        return dict(found)

    heard(log)
    arrays = ("optical/pixels", "optical/valid", "embeddings/pixels")
    opened.take([ids[2], ids[9], ids[4]])
    times = {("optical/datetime", "whole"): 1, ("embeddings/datetime", "whole"): 1}
    store = folder / "big" / "train"
    group = json.loads((store / "optical" / "zarr.json").read_text())
    full = group["attributes"]["chips_per_shard"]

    def spans(name: str, chips: list[int]) -> Counter[int]:
        """Return the bytes of each request that chosen chips need, as the shard's own index says."""
        (path,) = (f for f in (store / name / "c" / "0").glob("**/0") if f.is_file())
        index = np.frombuffer(path.read_bytes()[-16 * full - 4 : -4], "<u8").reshape(-1, 2)
        stored = sorted(index[c].tolist() for c in chips if index[c, 0] != 2**64 - 1)
        runs: list[list[int]] = []
        for start, length in stored:
            if runs and start - runs[-1][1] <= 32 * 1024:
                runs[-1][1] = start + length
            else:
                runs.append([start, start + length])
        return Counter(stop - start for start, stop in runs)

    def heard_bytes(name: str) -> Counter[int]:
        """Return the bytes of each request for an array, its index apart."""
        tail = 16 * full + 4
        sent = Counter(a.nbytes for a in log if f"/{name}/c/" in a.path)
        sent.pop(tail, None)
        return +sent

    for name in arrays:
        assert heard_bytes(name) == spans(name, [2, 9, 4]), name
        assert len(spans(name, [2, 3, 4])) == 1
    assert times.items() <= asked().items()
    opened.take([ids[2], ids[len(ids) - 3], ids[4]])
    for name in arrays:
        assert heard_bytes(name) == spans(name, [2, len(ids) - 3, 4]), name
    assert sum(spans("optical/pixels", [2, len(ids) - 3, 4]).values()) == 2  # too far apart for one request
    assert asked().keys() == {(name, "part") for name in arrays}
    opened.take(ids)
    assert asked() == {(name, "whole"): 1 for name in arrays}
    list(opened.stream(7, shuffle=1, epochs=2))
    assert asked() == {(name, "whole"): 2 for name in arrays}


# Faults


@pytest.fixture
def served(folder: Path, server: RangeServer) -> RangeServer:
    """Return a server of a store of one's own: ``small``."""
    shutil.copytree(folder / "small", server.folder / "small")
    return server


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, times=3),
        Fault(status=429, times=2),
        Fault(cut=True, times=3),
        Fault(cut=True, share=0.3),
    ],
    ids=["503", "429", "cut", "cut at random"],
)
def test_what_passes_is_outlived(served: RangeServer, disk: StoredChips, fault: Fault) -> None:
    opened = open_chips(served.url("small"))
    some = list(opened)[::5]
    served.fault("*/c/*", fault)
    same(opened.take(some), disk.take(some))
    for one, other in zip(opened.stream(9, shuffle=3), disk.stream(9, shuffle=3), strict=True):
        same(one, other)
    assert max(served.attempts("*/pixels/c/*").values()) > 1


def test_a_host_that_takes_one_request_at_a_time(
    served: RangeServer, disk: StoredChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that a thread has under way hold the only turn, for which others wait that this thread waits for."""
    url = served.url("small")
    opened, some = open_chips(url), list(disk)[::5]
    same(
        opened.take(some[:1]), disk.take(some[:1])
    )  # the index of one shard is known now, and a connection open
    monkeypatch.setitem(gate._GATES, host_of(url), gate.Gate(1))
    same(opened.take(some), disk.take(some))
    assert gate.at(host_of(url))._under == 0


def test_a_server_that_stays_away_is_an_error_and_the_stream_goes_on_where_it_stood(
    served: RangeServer, disk: StoredChips
) -> None:
    wanted = list(disk.stream(5, shuffle=3))
    stream = open_chips(served.url("small")).stream(5, shuffle=3, prefetch=1)
    found = [next(stream)]
    served.forget()
    served.fault("*", Fault(status=503))
    with pytest.raises(ReadError, match=r"/c/.*503"):
        found.extend(stream)
    assert len(found) < len(wanted)
    assert max(served.attempts().values()) <= 2 * remote.ATTEMPTS  # by threads that read ahead
    served.heal()
    stream.close()
    found.extend(stream)
    for one, other in zip(found, wanted, strict=True):
        same(one, other)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_an_object_that_is_gone_in_the_middle_of_a_stream(
    served: RangeServer, disk: StoredChips, shuffle: int | None
) -> None:
    """What comes before it is delivered; it is asked for once; a state goes on once it is back."""
    wanted = list(disk.stream(5, shuffle=shuffle))
    stream = open_chips(served.url("small")).stream(5, shuffle=shuffle)
    last = wanted[-1]["chip_id"][-1]
    number = int(np.searchsorted(disk.stored.offsets, disk.stored.place[last], side="right")) - 1
    shard = disk.stored.shards[number]
    path = next(p for p in shard.sizes if "optical/pixels" in p)
    served.fault(f"small/{path}", Fault(status=404))
    found: list[Arrays] = []
    with pytest.raises(StoreError, match=rf"{path}.*found nothing; expected the \d+ bytes that the manifest"):
        found.extend(stream)
    assert len(served.asked(f"small/{path}")) == 1
    assert 0 < len(found) < len(wanted)
    served.heal()
    again = open_chips(served.url("small")).stream(5, shuffle=shuffle)
    again.load_state_dict(stream.state_dict())
    found.extend(again)
    for one, other in zip(found, wanted, strict=True):
        same(one, other)


def test_a_store_that_is_written_anew_while_a_stream_runs(
    served: RangeServer, chips: rd.Chips, disk: StoredChips, tmp_path: Path
) -> None:
    """The same chips again are no change; others are told as soon as one of their objects is read."""
    url, store = served.url("small"), served.folder / "small"

    def show(version: str) -> None:
        """Let a folder take the place of the store in one step: threads read ahead all the time."""
        (served.folder / "next").symlink_to(version)
        (served.folder / "next").replace(store)

    store.rename(served.folder / "first")
    show("first")
    written(chips, served.folder / "again", SHARD_BYTES)
    written(chips.sample(40), served.folder / "other", SHARD_BYTES)
    wanted = list(disk.stream(5, shuffle=3, epochs=2))
    stream = open_chips(url).stream(5, shuffle=3, epochs=2, prefetch=1)
    found = [next(stream) for _ in range(2)]
    show("again")
    found += [next(stream) for _ in range(2)]
    state = stream.state_dict()
    show("other")
    with pytest.raises(StoreError, match=r"that the manifest names.*open it again"):
        found.extend(stream)
    for one, other in zip(found, wanted, strict=False):
        same(one, other)
    anew = open_chips(url)
    assert len(anew) == 40
    with pytest.raises(PlanError, match=r"a state of other chips"):
        anew.stream(5, shuffle=3, epochs=2).load_state_dict(state)
