"""Whatever is written in units stands on one ledger: what is missing is written, the root comes last."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from distributed import Client, Scheduler, SpecCluster, Worker

from rasteret_dask.errors import IncompleteError, JobError, StoreError
from rasteret_dask.planning.plan import digest
from rasteret_dask.runlimits import RunLimits
from rasteret_dask.store.ledger import whole
from rasteret_dask.store.limits import Bounds, Deadline
from rasteret_dask.store.unitruns import Making, UnitJob, Visible, write_units
from rasteret_dask.store.workunits import WorkUnit, is_finished


def write_numbers(folder: str, item: int) -> Making:
    """Write two objects, and count in a folder how often this unit was computed."""
    with (Path(folder) / f"{item}.count").open("a") as file:
        file.write("x")
    if (Path(folder) / f"{item}.fault").exists():
        raise ValueError(f"number {item} is none")
    for name in ("a", "b"):
        yield f"numbers/{item}-{name}.txt", [str(item).encode(), name.encode()]
    return {"counts/s2": {"requests": 3}, "dropped": {f"chip {item}": "cloudy"}}


def numbers(folder: Path, count: int, name: str = "") -> UnitJob:
    whole_digest = digest("numbers", count, name)
    units = [WorkUnit(f"all-{n:05d}", n, 2, digest(whole_digest, n), None, n) for n in range(count)]
    places = {f"numbers/{n}-{letter}.txt": f"all-{n:05d}" for n in range(count) for letter in "ab"}
    return UnitJob(
        "to_numbers",
        whole_digest,
        units,
        partial(write_numbers, str(folder)),
        Visible("numbers.json", {"title": "numbers"}),
        {"about.txt": whole(b"numbers")},
        lambda: places,
        lambda manifest: {"sum.txt": str(manifest.num_rows).encode()},
    )


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    (tmp_path / "counts").mkdir()
    return tmp_path / "counts"


def computed(counts: Path) -> dict[str, int]:
    return {file.stem: len(file.read_text()) for file in counts.glob("*.count")}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parts[len(folder.parts)] not in ("_job", "manifest.parquet")
    }


def test_all_units_are_written_and_the_root_comes_last(counts: Path, tmp_path: Path) -> None:
    job, out = numbers(counts, 5), tmp_path / "out"
    report = write_units(str(out), job, progress=False)
    assert (report.committed, report.shards, report.shards_written) == (True, 5, 5)
    assert (report.chips, report.kept, report.requests) == (10, 5, 15)
    assert files(out) == {
        "about.txt": b"numbers",
        "sum.txt": b"5",
        "numbers.json": (out / "numbers.json").read_bytes(),
    } | {f"numbers/{n}-{letter}.txt": f"{n}{letter}".encode() for n in range(5) for letter in "ab"}
    assert json.loads((out / "numbers.json").read_text())["title"] == "numbers"
    assert is_finished(str(out), job.owner, job.root.path)
    assert not is_finished(str(out), numbers(counts, 6).owner, job.root.path)
    again = write_units(str(out), job, progress=False)
    assert (again.shards_written, again.chips) == (0, 10)
    assert set(computed(counts).values()) == {1}


def test_a_unit_that_fails_keeps_the_root_away_and_is_all_that_a_rerun_does(
    counts: Path, tmp_path: Path
) -> None:
    job, out = numbers(counts, 4), tmp_path / "out"
    (counts / "2.fault").touch()
    with pytest.raises(JobError, match=r"1 of 4 shards failed:\nall-00002: .*number 2 is none"):
        write_units(str(out), job, progress=False)
    assert not (out / "numbers.json").exists()
    (counts / "2.fault").unlink()
    before = computed(counts)
    assert write_units(str(out), job, progress=False).shards_written == 1
    changes = {name for name, count in computed(counts).items() if count > before[name]}
    assert changes == {"2"}


def test_another_job_is_refused_finished_or_not(counts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (counts / "1.fault").touch()
    with pytest.raises(JobError):
        write_units(str(out), numbers(counts, 2), progress=False)
    with pytest.raises(StoreError, match="another plan"):
        write_units(str(out), numbers(counts, 3), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="1 objects of something else"):
        write_units(str(tmp_path / "full"), numbers(counts, 3), progress=False)


def test_an_object_that_was_changed_is_written_again(counts: Path, tmp_path: Path) -> None:
    job, out = numbers(counts, 3), tmp_path / "out"
    write_units(str(out), job, progress=False)
    want = files(out)
    (out / "numbers.json").unlink()
    (out / "numbers" / "1-a.txt").write_text("longer")
    (out / "about.txt").write_text("nothing")
    assert write_units(str(out), job, progress=False).shards_written == 1
    assert files(out) == want


def test_parts_of_an_array_job_write_their_own_and_the_last_one_commits(counts: Path, tmp_path: Path) -> None:
    job, out = numbers(counts, 5), tmp_path / "out"

    def part(number: int) -> bool:
        bounds = Bounds(RunLimits(part=(number, 2)))
        return write_units(str(out), job, progress=False, bounds=bounds).committed

    assert (part(1), part(2)) == (False, True)
    assert set(computed(counts).values()) == {1}


def test_time_that_is_over_ends_a_run(counts: Path, tmp_path: Path) -> None:
    job, out = numbers(counts, 3), tmp_path / "out"
    with pytest.raises(IncompleteError, match="0 of 3"):
        write_units(str(out), job, progress=False, bounds=Bounds(deadline=Deadline(0.0)))
    assert write_units(str(out), job, progress=False).committed


def test_only_workers_that_declare_the_resource_compute(counts: Path, tmp_path: Path) -> None:
    write_units(str(tmp_path / "here"), numbers(counts, 6), progress=False)
    workers = {"with": {"cls": Worker, "options": {"nthreads": 2, "resources": {"GPU": 1}}}}
    workers["without"] = {"cls": Worker, "options": {"nthreads": 2}}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0", "port": 0}}
    with SpecCluster(workers, scheduler) as cluster, Client(cluster) as client:
        job = replace(numbers(counts, 6), resource="GPU")
        report = write_units(str(tmp_path / "there"), job, client, progress=False)
    assert set(report.table["worker"].to_pylist()) == {"with"}
    assert files(tmp_path / "there") == files(tmp_path / "here")
