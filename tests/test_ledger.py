"""The ledger: whatever is lost or damaged before a commit is put in place, and after it named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from small_stores import contents, small, written
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask import formats
from rasteret_dask.compacting import compact
from rasteret_dask.errors import FormatError, JobError, StoreError
from rasteret_dask.net.sums import sealed
from rasteret_dask.store import shardreports
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.run import delayed_zarr
from rasteret_dask.store.verifying import Verification, verify
from rasteret_dask.store.write import commit, prepare
from rasteret_dask.tasks.context import ReadContext

SHARD_BYTES = 12_000


def deleted(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    """Change one bit, somewhere in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


DAMAGES: list[Callable[[Path], None]] = [deleted, truncated, flipped]


def files(store: Path) -> list[str]:
    return sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())


def cases(store: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield every object of a store, with every way to lose it; a mark holds no byte that could change."""
    for path in files(store):
        for damage in DAMAGES:
            if damage is deleted or (store / path).stat().st_size:
                yield path, damage


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", dtype="uint16", time="3MS")
    return optical.chips(size=32, cell_km=0.96).sample(5).filter_pixels(min_valid=0.01)


@pytest.fixture(scope="module")
def layout(chips: rd.Chips) -> Layout:
    return small(chips, SHARD_BYTES)


@pytest.fixture(scope="module")
def finished(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("ledger") / "store"
    written(chips, store, SHARD_BYTES)
    assert len(list((store / "_job" / "done").iterdir())) == 3
    return store


@pytest.fixture(scope="module")
def unfinished(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same store, stopped with two shards of three."""
    store = tmp_path_factory.mktemp("ledger") / "store"
    shutil.copytree(finished, store)
    for path in ("zarr.json", "manifest.parquet", "kept/c/0", "_job/done/all-00001.json", "member/c/1/0"):
        (store / path).unlink()
    return store


def rerun(layout: Layout, store: Path) -> None:
    delayed_zarr(layout, str(store), ReadContext()).compute(scheduler="sync")


# Before the commit


@pytest.mark.parametrize(
    "how", [deleted, *(pytest.param(way, marks=pytest.mark.slow) for way in (truncated, flipped))]
)
def test_whatever_is_lost_before_a_rerun_is_put_in_place(
    layout: Layout, finished: Path, unfinished: Path, tmp_path: Path, how: Callable[[Path], None]
) -> None:
    """The law, of every single object. A shard is compared by its size only: verify, and readers, tell more."""
    wanted = contents(finished)
    store = tmp_path / "store"
    for path, damage in cases(unfinished):
        if damage is not how:
            continue
        shutil.copytree(unfinished, store)
        damage(store / path)
        rerun(layout, store)
        case = f"{path} {damage.__name__}"
        number = path.partition("/c/")[2].partition("/")[0]
        of_a_shard = path in layout.places() and number != "1"
        if of_a_shard and damage is flipped:
            assert verify(store).damaged == (path,), case
        else:
            assert contents(store) == wanted, case
            assert verify(store).ok, case
        shutil.rmtree(store)


@pytest.mark.parametrize("path", ["band", "epsg", "pixels", "_job", "chip_id"])
def test_a_folder_lost_before_a_rerun_is_put_in_place(
    layout: Layout, finished: Path, unfinished: Path, tmp_path: Path, path: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(unfinished, store)
    shutil.rmtree(store / path)
    if path == "_job":  # nothing says any more that these shards are ours
        before = contents(store)
        with pytest.raises(StoreError, match=r"objects of something else .*delete all of it"):
            rerun(layout, store)
        assert contents(store) == before
        shutil.rmtree(store)
    rerun(layout, store)
    assert contents(store) == contents(finished)
    xr.testing.assert_identical(xr.open_zarr(store).load(), xr.open_zarr(finished).load())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "path", ["band/c/0", "pixels/zarr.json", "chips.parquet", "_job/job.json", "_job/begun.json"]
)
def test_what_is_lost_while_shards_are_written_is_put_in_place(
    layout: Layout, finished: Path, tmp_path: Path, path: str, damage: Callable[[Path], None]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    (store / "zarr.json").unlink()
    prepare(layout, str(store))
    damage(store / path)
    with pytest.raises(StoreError, match=r"missing or damaged: .*call to_zarr again"):
        commit(str(store), layout.job)
    assert not (store / "zarr.json").exists()
    commit(str(store), layout.job, layout)
    assert contents(store) == contents(finished)
    assert verify(store).ok


def test_a_shard_that_is_lost_while_others_are_written_is_told(
    layout: Layout, finished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    (store / "zarr.json").unlink()
    (store / "pixels/c/2/0/0/0/0").unlink()
    with pytest.raises(JobError, match=r"1 shards missing: all-00002.*call to_zarr again"):
        commit(str(store), layout.job, layout)
    rerun(layout, store)
    assert contents(store) == contents(finished)


# A folder deleted as a whole in the middle, while tasks go on to write


def leftovers(finished: Path, store: Path) -> None:
    """Leave what tasks put after a store was deleted: shard 0, and shard 2 without its report."""
    for path in files(finished):
        number = path.partition("/c/")[2].partition("/")[0]
        of_shards = path.split("/")[0] in ("pixels", "valid", "valid_fraction", "datetime", "member")
        notes = path.startswith(("_job/tried/all-00000", "_job/tried/all-00002", "_job/done/all-00000"))
        if notes or (of_shards and number in ("0", "2")):
            (store / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(finished / path, store / path)


def test_what_was_written_after_a_store_was_deleted_is_known_again(
    layout: Layout, finished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    leftovers(finished, store)
    before = {p: p.stat().st_mtime_ns for p in store.rglob("c/0/**/*") if p.is_file()}
    assert before
    rerun(layout, store)
    assert contents(store) == contents(finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished shard was written again"


@pytest.mark.parametrize(
    "theirs", ["notes.txt", "pixels/c/1/0/0/0/0", "zarr.json", "_job/begun2.json", "band/c/0"]
)
def test_what_is_somebody_else_s_is_never_written_over(
    layout: Layout, finished: Path, tmp_path: Path, theirs: str
) -> None:
    store = tmp_path / "store"
    leftovers(finished, store)
    (store / theirs).parent.mkdir(parents=True, exist_ok=True)
    (store / theirs).write_text("mine")
    before = {path: (store / path).read_bytes() for path in files(store)}
    with pytest.raises(StoreError, match=rf"1 objects of something else \({theirs}\)"):
        rerun(layout, store)
    assert {path: (store / path).read_bytes() for path in files(store)} == before


def test_another_job_s_leftovers_are_somebody_else_s(
    layout: Layout, chips: rd.Chips, finished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    leftovers(finished, store)
    before = contents(store)
    with pytest.raises(StoreError, match="objects of something else"):
        rerun(small(chips.sample(4), SHARD_BYTES), store)
    assert contents(store) == before


# Reports


def test_a_valid_report_is_of_this_key_and_its_objects_are_there(
    layout: Layout, finished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    url, key = str(store), layout.job.digest
    report = shardreports.valid_report(url, "all-00000", key)
    assert report is not None
    assert report == json.loads((store / "_job/done/all-00000.json").read_bytes())
    assert shardreports.valid_report(url, "all-00000", "0" * 32) is None
    assert shardreports.valid_report(url, "all-00009", key) is None
    truncated(store / report["objects"][0]["path"])
    assert shardreports.valid_report(url, "all-00000", key) is None
    deleted(store / report["objects"][0]["path"])
    assert shardreports.valid_report(url, "all-00000", key) is None
    flipped(store / "_job/done/all-00001.json")
    assert shardreports.valid_report(url, "all-00001", key) is None


def test_a_report_of_the_same_objects_stays_as_it_is(layout: Layout, finished: Path, tmp_path: Path) -> None:
    """A worker that was cut off returns after the commit: what it reports late is what the store holds, or is put."""
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    url, key, shards = str(store), layout.job.digest, [shard.name for shard in layout.job.shards()]
    before = {name: (store / "_job/done" / f"{name}.json").read_bytes() for name in shards}
    for name in shards:
        report = json.loads(before[name])
        mark = shardreports.tried(url, name, key)  # of the late try
        (store / mark).unlink()
        late = {**report, "elapsed": 1e6, "started": "2030-01-01T00:00:00+00:00"}
        for field in ("shard", "key", "mark", "checksum"):
            del late[field]
        told = shardreports.done(url, name, key, mark, late)
        assert told == {field: value for field, value in report.items() if field != "checksum"}
    assert before == {name: (store / "_job/done" / f"{name}.json").read_bytes() for name in shards}
    assert verify(url).ok
    flipped(store / "_job/done" / f"{shards[0]}.json")
    other = {**late, "objects": [{**late["objects"][0], "crc32": 1}]}
    for name, report in ((shards[0], late), (shards[1], other)):  # a damaged one, one of other objects
        shardreports.done(url, name, key, mark, report)
        there = json.loads((store / "_job/done" / f"{name}.json").read_bytes())
        assert (there["elapsed"], there["objects"]) == (1e6, report["objects"])


# What killed local puts leave: obstore writes beside the object, under its name and a number


PUTTING = """
import os, signal, sys
from pathlib import Path
from rasteret_dask.net import remote
from rasteret_dask.store import shardreports
store, shard, key, path = sys.argv[1:]
shardreports.tried(store, shard, key)

class Piece(bytes):
    pass

# the put has begun when its temporary file is there: killed just then
import threading
def kill():
    while not list(Path(store).rglob("*#*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
while True:
    remote.put(remote.join(store, path), [bytes(1 << 20)] * 64)
"""


def killed_put(store: Path, key: str, path: str) -> Path:
    """Have a process begin a shard and be killed while it puts an object; return what it leaves."""
    place = store / path
    data, marks = place.read_bytes(), set((store / "_job/tried").rglob("*"))
    command = [sys.executable, "-c", PUTTING, str(store), "all-00001", key, path]
    while True:
        done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == -signal.SIGKILL, done.stderr
        place.write_bytes(data)
        if left := list(store.rglob("*#*")):
            return left[0]
        for mark in set((store / "_job/tried").rglob("*")) - marks:  # between two puts: once more
            shutil.rmtree(mark) if mark.is_dir() else mark.unlink(missing_ok=True)


def test_what_killed_puts_left_is_removed(layout: Layout, finished: Path, tmp_path: Path) -> None:
    """With the commit, if nobody can be at it any more; whatever else has such a name stays."""
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    for path in ("zarr.json", "_job/done/all-00001.json"):
        (store / path).unlink()
    shutil.rmtree(store / "_job/tried/all-00001")  # by this process, which is alive
    left = killed_put(store, layout.job.digest, "pixels/c/1/0/0/0/0")
    theirs = store / "pixels" / "c" / "notes#1"
    theirs.write_text("mine")
    rerun(layout, store)
    assert not left.exists()
    assert theirs.read_text() == "mine"
    theirs.unlink()
    assert {p: data for p, data in contents(store).items() if "#" not in p} == contents(finished)
    attempts = pq.read_table(store / "manifest.parquet")["attempts"].to_pylist()
    assert attempts == [1, 2, 1]
    assert verify(store).ok


@pytest.mark.parametrize("whose", ["alive", "elsewhere", "old", "of no shard"])
def test_a_put_that_may_be_under_way_is_left_alone(
    layout: Layout, finished: Path, tmp_path: Path, whose: str
) -> None:
    """A process that is alive, or on another machine, may still be at it; after ten minutes it is not."""
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    (store / "zarr.json").unlink()
    if whose in ("alive", "old"):
        shardreports.tried(
            str(store), "all-00001", layout.job.digest
        )  # by this very process, and never finished
    if whose == "elsewhere":
        mark = f"{layout.job.digest[:16]}.another-machine.1.{'0' * 32}"
        (store / "_job/tried/all-00001" / mark).touch()
    left = store / ("chips.parquet#1" if whose == "of no shard" else "pixels/c/1/0/0/0/0#1")
    left.write_bytes(b"half")
    if whose == "old":
        os.utime(left, (0, 0))
    rerun(layout, store)
    assert left.exists() == (whose != "old")


def test_an_object_of_a_try_that_came_to_nothing_is_removed(
    layout: Layout, finished: Path, tmp_path: Path
) -> None:
    """A try that was killed had pixels to put; the next one found nothing but fill, as a tile became unreadable."""
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    (store / "zarr.json").unlink()
    report = json.loads((store / "_job/done/all-00001.json").read_bytes())
    del report["checksum"]
    report["objects"] = [o for o in report["objects"] if not o["path"].startswith("pixels/")]
    (store / "_job/done/all-00001.json").write_bytes(sealed(report))
    rerun(layout, store)
    assert not (store / "pixels/c/1/0/0/0/0").exists()
    assert (xr.open_zarr(store, mask_and_scale=False)["pixels"][2:4] == 65535).all()
    assert verify(store).ok


# After the commit


def test_verify_names_exactly_what_is_lost(finished: Path, tmp_path: Path) -> None:
    """The law, of every single object."""
    report = verify(finished)
    assert (report.ok, report.finished, bool(report)) == (True, True, True)
    assert (report.missing, report.damaged, report.unexpected) == ((), (), ())
    assert report.objects == len(files(finished))
    assert report.nbytes == sum((finished / path).stat().st_size for path in files(finished))
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    for path, damage in cases(finished):
        damage(store / path)
        found = verify(store)
        case = f"{path} {damage.__name__}: {found!r}"
        assert not found.ok, case
        assert (found.missing, found.damaged) == (((path,), ()) if damage is deleted else ((), (path,))), case
        assert found.unexpected == (), case
        assert path in repr(found)
        shutil.copyfile(finished / path, store / path)
    assert verify(store).ok


def test_verify_tells_unfinished_stores_and_extra_objects_apart(
    finished: Path, unfinished: Path, tmp_path: Path
) -> None:
    found = verify(unfinished)
    assert (found.ok, found.finished, found.missing, found.damaged) == (False, False, (), ())
    assert "unfinished" in repr(found)
    assert "does what is missing" in repr(found)
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    (store / "notes.txt").write_text("mine")
    (store / "_job" / "stats").mkdir()
    (store / "_job" / "stats" / "x.json").write_text("{}")
    found = verify(store)
    assert found.ok
    assert found.unexpected == ("notes.txt",)
    for place, error in (
        (tmp_path, "no store"),
        (tmp_path / "nowhere", "no store"),
        (store / "zarr.json", "a file"),
    ):
        with pytest.raises(StoreError, match=error):
            verify(place)


def test_verify_reads_what_it_can_list_and_what_it_cannot(
    finished: Path, tmp_path: Path, serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    url, _ = serve(store)
    assert verify(url).ok
    assert verify(url).objects == verify(store).objects
    flipped(store / "pixels/c/1/0/0/0/0")
    deleted(store / "band/c/0")
    found = verify(url)
    assert (found.missing, found.damaged) == (("band/c/0",), ("pixels/c/1/0/0/0/0",))


@pytest.mark.slow
def test_a_compact_store_obeys_the_same_laws(finished: Path, tmp_path: Path) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    compact(finished, whole)
    assert verify(whole).ok
    wanted = contents(whole)
    for number, (path, damage) in enumerate(cases(whole)):
        if damage is truncated or number % 2:
            continue
        shutil.copytree(whole, store)
        damage(store / path)
        found = verify(store)
        assert (*found.missing, *found.damaged) == (path,)
        if (store / "zarr.json").exists():
            (store / "zarr.json").unlink()
        compact(finished, store)
        if not (
            damage is flipped and "/c/" in path and path.startswith(("pixels", "valid", "member", "datetime"))
        ):
            assert contents(store) == wanted, f"{path} {damage.__name__}"
        shutil.rmtree(store)


# Versions


def test_another_package_version_goes_on(
    layout: Layout,
    finished: Path,
    unfinished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chips: rd.Chips,
) -> None:
    """Whether or not something that names the version has to be put again."""
    monkeypatch.setattr(formats, "__version__", "7.1.0")
    again = small(rd.Chips(chips.query, chips._parent), SHARD_BYTES)
    assert again.job.digest == layout.job.digest
    for lost in (None, "band/c/0", "_job/job.json", "pixels/zarr.json"):
        store = tmp_path / str(lost).replace("/", "-")
        shutil.copytree(unfinished, store)
        if lost:
            (store / lost).unlink()
        before = {p: p.stat().st_mtime_ns for p in store.rglob("pixels/c/[02]/**/*") if p.is_file()}
        rerun(again, store)
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert verify(store).ok
        np.testing.assert_array_equal(xr.open_zarr(store)["pixels"], xr.open_zarr(finished)["pixels"])


def test_another_meaning_is_refused_by_name(
    layout: Layout, unfinished: Path, finished: Path, tmp_path: Path
) -> None:
    mark = json.loads((unfinished / "_job/begun.json").read_bytes())
    del mark["checksum"]
    for source, found in ((unfinished, "begun"), (finished, "begun")):
        store = tmp_path / source.parent.name
        shutil.copytree(source, store)
        (store / f"_job/{found}.json").write_bytes(
            sealed({**mark, "meaning": formats.MEANING + 1, "digest": "0" * 32, "version": "9.9"})
        )
        (store / "zarr.json").unlink(missing_ok=True)
        before = contents(store)
        with pytest.raises(
            StoreError,
            match=rf"as rasteret_dask 9.9 makes them \(meaning {formats.MEANING + 1}\).*Finish it with",
        ):
            rerun(layout, store)
        assert contents(store) == before


def test_a_store_that_a_newer_version_writes_is_refused_by_name(
    layout: Layout, unfinished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(unfinished, store)
    mark = json.loads((store / "_job/begun.json").read_bytes())
    del mark["checksum"]
    (store / "_job/begun.json").write_bytes(sealed({**mark, "format": 99, "version": "9.9"}))
    with pytest.raises(
        FormatError, match=r"a store of format 99, written by rasteret_dask 9.9.*'rasteret-dask>=9.9'"
    ):
        rerun(layout, store)
    with pytest.raises(FormatError, match="format 99"):
        verify(store)


def test_a_report_of_verify_is_a_value(finished: Path) -> None:
    assert verify(finished) == verify(finished)
    assert isinstance(rd.verify(finished), Verification)
