"""Reports in pages: few objects, and what was true of reports that are objects of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import contents, small, written
from waiting import until

import rasteret_dask as rd
from rasteret_dask.net import remote
from rasteret_dask.net.sums import document_of
from rasteret_dask.store import paging, shardreports
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.presence import present
from rasteret_dask.store.run import delayed_zarr, run_zarr
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.store.verifying import verify
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.runs import Cuts

SHARD_BYTES = 12_000


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", dtype="uint16", time="3MS")
    return optical.chips(size=32, cell_km=0.96).sample(12).filter_pixels(min_valid=0.01)


@pytest.fixture(scope="module")
def layout(chips: rd.Chips) -> Layout:
    return small(chips, SHARD_BYTES)


@pytest.fixture(scope="module")
def plain(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished store whose reports are objects of their own."""
    store = tmp_path_factory.mktemp("paging") / "store"
    written(chips, store, SHARD_BYTES)
    assert len(list((store / "_job" / "done").iterdir())) == 6
    return store


@pytest.fixture(scope="module")
def paged(layout: Layout, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same store, stopped with five shards of six: four are on two pages."""
    store = tmp_path_factory.mktemp("paging") / "store"
    shutil.copytree(plain, store)
    for path in ("zarr.json", "manifest.parquet", "kept/c/0", "_job/done/all-00001.json", "member/c/1/0"):
        (store / path).unlink()
    for page in (("all-00000", "all-00001", "all-00002"), ("all-00003", "all-00004")):
        shardreports.turn_page(str(store), page, keys(layout))
    assert {path.name for path in (store / "_job" / "done").iterdir()} == {"all-00005.json"}
    assert marks(store) == {"all-00001": 1, "all-00005": 1}
    return store


def keys(layout: Layout) -> dict[str, str]:
    return dict.fromkeys((shard.name for shard in layout.job.shards()), layout.job.digest)


def pages(store: Path) -> list[Path]:
    return sorted((store / "_job" / "pages").glob("*.json"))


def marks(store: Path) -> dict[str, int]:
    return Counter(path.parent.name for path in (store / "_job" / "tried").rglob("*") if path.is_file())


def rerun(layout: Layout, store: Path) -> None:
    delayed_zarr(layout, str(store), ReadContext()).compute(scheduler="sync")


def shards_of(page: Path) -> set[str]:
    document = document_of(page.read_bytes())
    assert document is not None
    return set(document["reports"])


def attempts(store: Path) -> dict[str, int]:
    return {row["shard"]: row["attempts"] for row in pq.read_table(store / "manifest.parquet").to_pylist()}


def test_what_is_on_a_page_is_not_done_again(
    layout: Layout, plain: Path, paged: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(paged, store)
    assert all("/c/1/" in path for path in verify(store).unexpected)  # of the shard that has no report
    assert not verify(store).damaged
    before = {
        p: p.stat().st_mtime_ns
        for n in (0, 2, 3, 4, 5)
        for p in store.rglob(f"pixels/c/{n}/**/0")
        if p.is_file()
    }
    rerun(layout, store)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert contents(store) == contents(plain)
    assert attempts(store) == {f"all-{n:05d}": 2 if n == 1 else 1 for n in range(6)}
    report = verify(store)
    assert report.ok
    assert report.unexpected == ()
    for page in pages(store):  # the commit vouches for them
        name = page.relative_to(store).as_posix()
        data = page.read_bytes()
        page.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert verify(store).damaged == (name,)
        page.unlink()
        assert verify(store).missing == (name,)
        page.write_bytes(data)
    assert verify(store).ok


@pytest.mark.parametrize("loss", ["deleted", "truncated", "other"])
def test_shards_of_a_lost_page_are_done_again(
    layout: Layout, plain: Path, paged: Path, tmp_path: Path, loss: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(paged, store)
    page = pages(store)[0]
    lost, data = shards_of(page), page.read_bytes()
    assert lost == {"all-00000", "all-00002"}
    if loss == "deleted":
        page.unlink()
    else:
        page.write_bytes(data[:100] if loss == "truncated" else data.replace(b"all-00002", b"all-00009"))
    rerun(layout, store)
    assert contents(store) == contents(plain)
    assert set(marks(store)) == {*lost, "all-00001", "all-00005"}
    report = verify(store)
    assert report.ok
    assert report.unexpected == ()  # a page of which nothing holds is removed


def test_a_later_report_counts(layout: Layout, plain: Path, paged: Path, tmp_path: Path) -> None:
    """A shard on a page whose object is damaged is written anew: then its own report counts, and a page after it."""
    store = tmp_path / "store"
    shutil.copytree(paged, store)
    (store / "pixels/c/3/0/0/0/0").write_bytes(b"")
    rerun(layout, store)
    assert marks(store)["all-00003"] == 1
    assert contents(store) == contents(plain)
    (store / "zarr.json").unlink()
    shardreports.turn_page(str(store), ["all-00003", "all-00005"], keys(layout))
    assert len(pages(store)) == 3
    rerun(layout, store)
    assert verify(store).ok
    assert [sorted(shards_of(page))[0] for page in pages(store)] == ["all-00000", "all-00003", "all-00003"]


def test_pages_are_known_after_all_else_was_deleted(
    layout: Layout, plain: Path, paged: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(paged, store)
    for path in ("_job/begun.json", "_job/ledger.json", "chips.parquet"):
        (store / path).unlink()
    before = {
        p: p.stat().st_mtime_ns for n in (0, 2, 3, 4) for p in (store / "pixels" / "c" / str(n)).rglob("0")
    }
    rerun(layout, store)
    assert contents(store) == contents(plain)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    other = tmp_path / "other"
    shutil.copytree(paged, other)
    (other / "_job/begun.json").unlink()
    page = pages(other)[0]
    page.write_text(page.read_text().replace(layout.job.digest, "0" * len(layout.job.digest)))
    with pytest.raises(rd.StoreError, match="objects of something else"):
        rerun(layout, other)


@given(stop=st.sampled_from(["page", "deleting", "whole"]), count=st.integers(1, 6))
@settings(max_examples=6, deadline=None)
def test_a_page_that_was_stopped_loses_nothing(
    layout: Layout, plain: Path, tmp_path_factory: pytest.TempPathFactory, stop: str, count: int
) -> None:
    """Stopped between its put and what is deleted, or in the middle of this, reports lie there twice."""
    store = tmp_path_factory.mktemp("stopped") / "store"
    shutil.copytree(plain, store)
    (store / "zarr.json").unlink()
    before = {path: path.read_bytes() for path in (store / "_job").rglob("*") if path.is_file()}
    shardreports.turn_page(str(store), sorted(keys(layout))[:count], keys(layout))
    gone = [path for path in before if not path.exists()]
    assert len(gone) == 2 * count
    if stop != "whole":
        for path in gone if stop == "page" else gone[::2]:
            path.write_bytes(before[path])
    rerun(layout, store)
    assert contents(store) == contents(plain)
    assert attempts(store) == dict.fromkeys(keys(layout), 1)
    assert verify(store).ok
    assert verify(store).unexpected == ()


# While a store is written


def test_a_killed_worker_s_shards_are_not_done_again_whatever_is_on_pages(
    chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shardreports, "PAGE_REPORTS", 4)
    layout, store = small(chips, 2_500), tmp_path / "x.zarr"
    names = [shard.name for shard in layout.job.shards()]
    assert len(names) == 12
    before: set[str] = set()

    def there() -> set[str]:
        loose = {path.stem for path in (store / "_job" / "done").glob("*.json")}
        return loose.union(*map(shards_of, pages(store)))

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as own,
        Client(own, set_as_default=False) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))

        def kill() -> None:
            until(lambda: len(pages(store)) >= 1)
            os.kill(victim, signal.SIGKILL)
            before.update(there())

        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(kill)
            run_zarr(layout, str(store), ReadContext(), client, progress=False)
            killing.result()
    assert len(before) >= 4
    assert {name for name, count in attempts(store).items() if count > 1}.isdisjoint(before)
    assert sum(attempts(store).values()) <= len(names) + 1  # what it had under way
    assert len(pages(store)) >= 2
    assert there() == set(names)
    assert verify(store).ok
    assert verify(store).unexpected == ()


@dataclass(frozen=True)
class Puts:
    """Work that marks and reports a shard, as writing one does."""

    url: str
    key: str

    def __call__(self, name: str) -> None:
        if shardreports.valid_report(self.url, name, self.key) is None:
            mark = shardreports.tried(self.url, name, self.key)
            shardreports.done(self.url, name, self.key, mark, {"objects": []})


def job_of(store: Path, count: int) -> tuple[Shards, dict[str, str]]:
    names = [f"all-{number:05d}" for number in range(count)]
    work = Work(Puts(str(store), "ab" * 16), "digest", {})
    shards = Shards(work, names, names, names, range(count), Cuts.free(count), "tail")
    return shards, dict.fromkeys(names, "ab" * 16)


def objects(store: Path) -> int:
    return sum(path.is_file() for path in (store / "_job").rglob("*"))


def test_few_objects_lie_there_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards: two for each that has just ended, and one for each page."""
    monkeypatch.setattr(shardreports, "PAGE_REPORTS", 50)
    most, requests = 0, Counter[str]()
    for name in ("get", "put", "put_new", "delete_all", "listing"):
        call: Callable[..., object] = getattr(remote, name)

        def counted(*args: object, name: str = name, call: Callable[..., object] = call) -> object:
            requests[name] += "/clients" not in str(args[0])
            return call(*args)

        monkeypatch.setattr(remote, name, counted)
    shards, of = job_of(tmp_path, 300)
    with present(str(tmp_path)) as mine:
        pager = paging.Paging(mine, of)

        def settle(names: object, more: bool) -> None:
            nonlocal most
            pager.settle(names, more=True)  # type: ignore[arg-type]
            most = max(most, objects(tmp_path))

        monkeypatch.setattr("rasteret_dask.store.shardruns.AHEAD", 60)
        write_shards(runner(None), shards, Exit("to_zarr", "x", 300), lambda: None, settle)
    assert len(pages(tmp_path)) == 300 // 50
    assert objects(tmp_path) == 300 // 50
    assert most <= 2 * (50 + 60 + 64) + 300 // 50 + 1  # a round is 64 shards
    assert requests["put"] == 300 + 300 // 50  # marks, and pages
    assert requests["put_new"] == 300  # reports, where there is none
    assert requests["get"] == 2 * 300  # a task's look, and the page's
    assert requests["delete_all"] == 300 // 50
    assert requests["listing"] == 300 // 50
    read = [
        name
        for some in shardreports.reports(str(tmp_path), remote.listing(str(tmp_path)), of)
        for name in some
    ]
    assert sorted(read) == sorted(of)


def test_two_clients_turn_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of the other one look for reports; once it has ended, pages are turned."""
    monkeypatch.setattr(shardreports, "PAGE_REPORTS", 10)
    shards, of = job_of(tmp_path, 60)
    names = list(of)
    with present(str(tmp_path)) as mine:
        pager = paging.Paging(mine, of)
        for name in names:
            shards.work.compute(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rd.ConcurrentWriteWarning)
            with present(str(tmp_path)):
                pager.settle(names[:20], more=True)
                assert pages(tmp_path) == []
                assert all(shardreports.valid_report(str(tmp_path), name, of[name]) for name in names)
        pager.settle(names[20:40], more=True)
        assert len(pages(tmp_path)) == 4
        shardreports.turn_page(str(tmp_path), names[40:50], of)
        done = {
            name: shardreports.ReportPlace("", path.relative_to(tmp_path).as_posix())
            for path in pages(tmp_path)[:3]
            for name in shards_of(path)
        }
        assert pager.since(done) == set(names[30:50])
    assert json.loads(pages(tmp_path)[0].read_bytes())["format"] >= 1
