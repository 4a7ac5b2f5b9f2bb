"""What writing a store took: the sums of its manifest, as text, as a card, and read back."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_write import layout_of

import rasteret_dask as rd
from rasteret_dask.store.jobreport import FEW, SLOW, SLOWEST, JobReport, _stage_bars, slow_shards
from rasteret_dask.store.manifest import stamp, table_of, timing
from rasteret_dask.store.run import run_zarr
from rasteret_dask.tasks.context import ReadContext

LATER = ["host", "worker", "started", "seconds", "stages", "masked"]
"""Columns that manifests of earlier versions do not have."""

names = st.sampled_from(["read/s2", "read/<l8>", "compose/s2", "encode", "put"])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a row of a manifest."""
    chips = draw(st.integers(1, 500))
    return {
        "shard": draw(st.text("abc<&", min_size=1, max_size=5)),
        "split": draw(st.none() | st.just("train")),
        "number": draw(st.integers(0, 9)),
        "chips": chips,
        "kept": draw(st.integers(0, chips)),
        "attempts": draw(st.integers(1, 4)),
        "process": draw(st.sampled_from(["a:1", "a:2", "<b>:3"])),
        "seconds": draw(st.none() | st.floats(0, 1e4)),
        "stages": list(draw(st.dictionaries(names, st.floats(0, 1e4))).items()),
        "bytes": draw(st.integers(0, 2**40)),
        "requests": draw(st.integers(0, 10**6)),
        "bytes_fetched": draw(st.integers(0, 2**40)),
        "masked": list(draw(st.dictionaries(st.sampled_from(["s2", "l8"]), st.floats(0, 1))).items()),
        "clipped": json.dumps(
            draw(st.dictionaries(st.sampled_from(["s2/red", "s2/nir"]), st.integers(1, 99)))
        ),
        "unreadable": draw(st.integers(0, 9)),
    }


class Seen(HTMLParser):
    """Counts elements that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = Counter[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.open[tag] -= 1


@settings(max_examples=60)
@given(st.lists(rows(), max_size=30), st.booleans())
def test_a_report_is_the_sum_of_its_rows(drawn: list[dict[str, Any]], committed: bool) -> None:
    table = table_of(drawn)
    total = None if committed else len(drawn) + 3
    report = JobReport.of_manifest("s3://x/<train>.zarr", table, total, written=len(drawn), seconds=75.0)
    assert (report.committed, report.shards) == (committed, total or len(drawn))
    for field, column in (
        ("chips", "chips"), ("kept", "kept"), ("bytes_written", "bytes"), ("bytes_fetched", "bytes_fetched"),
        ("requests", "requests"), ("unreadable", "unreadable"),
    ):  # fmt: skip
        assert getattr(report, field) == sum(row[column] for row in drawn), field
    assert report.retries == sum(row["attempts"] - 1 for row in drawn)
    assert sum(report.processes.values()) == len(drawn)
    assert sum(report.stages.values()) == pytest.approx(
        sum(value for row in drawn for _, value in row["stages"]), abs=0.01
    )
    assert sum(report.clipped.values()) == sum(sum(json.loads(row["clipped"]).values()) for row in drawn)
    assert all(0 <= share <= 1 + 1e-9 for share in report.masked.values())
    taken = sorted((row["seconds"] for row in drawn if row["seconds"] is not None), reverse=True)
    assert [value for _, value, _ in report.slowest] == taken[:SLOWEST]
    assert pickle.loads(pickle.dumps(report)) == report
    assert set(json.loads(json.dumps(report.to_dict()))) == {f.name for f in fields(report)} - {"table"}
    assert len(repr(report).splitlines()) <= 12
    html, seen = report._repr_html_(), Seen()
    seen.feed(html)
    assert not any(seen.open.values())
    assert "<b>:3" not in html
    assert "<train>" not in html
    assert "read/<l8>" not in html


@given(st.dictionaries(st.text("imw", min_size=1, max_size=60), st.floats(0, 1e4), min_size=1, max_size=6))
def test_bars_begin_right_of_the_longest_name(stages: dict[str, float]) -> None:
    picture = str(_stage_bars(stages))
    begins = {float(x) for x in re.findall(r"<rect x='([\d.]+)'", picture)}
    assert len(begins) == 1
    assert begins.pop() >= 7 * max(map(len, stages))  # a letter of 12 px is some 7 px wide


@given(st.lists(rows(), min_size=1, max_size=5))
def test_a_manifest_of_an_earlier_version_has_a_report_too(drawn: list[dict[str, Any]]) -> None:
    table = table_of(drawn)
    report = JobReport.of_manifest("x", table.drop_columns(LATER))
    whole = JobReport.of_manifest("x", table)
    later = {name: getattr(whole, name) for name in ("stages", "masked", "slowest", "worker_hours")}
    assert replace(report, **later) == whole
    assert (report.stages, report.masked, report.slowest, report.worker_hours) == ({}, {}, (), None)
    assert "slowest" not in repr(report)
    assert "<svg" not in report._repr_html_()
    assert "stages" not in repr(report)
    assert not slow_shards(report.table)


def test_a_shard_s_report_of_an_earlier_version_goes_into_a_manifest() -> None:
    assert timing({"process": "host:1", "seconds": {"read/s2": 1.0}}) == {"process": "host:1"}


@given(st.floats(0, 1e5))
def test_when_a_shard_began_is_when_it_ended_less_its_seconds(passed: float) -> None:
    row = timing(json.loads(json.dumps(stamp(passed, {"put": passed}))))
    assert abs(datetime.now(UTC) - row["started"] - timedelta(seconds=passed)) < timedelta(minutes=1)
    assert row["seconds"] == pytest.approx(passed, abs=1e-3)
    assert row["process"].startswith(row["host"])
    assert row["worker"] is None


@pytest.fixture(scope="module")
def written(s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobReport, str, Any]:
    """Return what writing a store of several shards returned, the store and its layout."""
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(40)
    layout, store = layout_of(chips, 40_000), str(tmp_path_factory.mktemp("report") / "store")
    return run_zarr(layout, store, ReadContext(), None, False), store, layout


def test_what_to_zarr_returns_is_what_lies_there(written: tuple[JobReport, str, Any]) -> None:
    report, store, layout = written
    assert report.committed
    assert report.shards == report.shards_written == layout.job.shard_count > 2
    assert (report.chips, report.kept, report.retries, report.unreadable) == (40, 40, 0, 0)
    sizes = {p.relative_to(store).as_posix(): p.stat().st_size for p in Path(store).rglob("*") if p.is_file()}
    objects = [o for row in report.table["objects"].to_pylist() for o in row]
    assert report.bytes_written == sum(sizes[o["path"]] for o in objects)
    assert report.bytes_fetched > 0
    assert report.requests > 0
    assert set(report.stages) == {"read/s2", "compose/s2", "encode", "put"}
    assert report.table.equals(pq.read_table(f"{store}/manifest.parquet"))
    fractions = rd.open_chips(store).take(list(rd.open_chips(store)))["s2/valid"]
    assert report.masked["s2"] == pytest.approx(1 - fractions.mean(), abs=1e-4)


def test_stages_are_parts_of_a_shard_s_seconds(written: tuple[JobReport, str, Any]) -> None:
    report, _, _ = written
    assert report.seconds is not None
    for row in report.table.to_pylist():
        assert sum(value for _, value in row["stages"]) <= row["seconds"] + 0.01
        assert row["seconds"] <= report.seconds
        assert all(value >= 0 for _, value in row["stages"])
        assert timedelta(0) <= datetime.now(UTC) - row["started"] < timedelta(hours=1)


def test_a_report_is_read_back_and_a_rerun_says_so_in_one_line(
    written: tuple[JobReport, str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report, store, layout = written
    again = rd.job_report(store)
    assert again == replace(report, shards_written=0, seconds=None)
    assert run_zarr(layout, store, ReadContext(), None, True) == again
    assert capsys.readouterr().err == f"store {store} is finished: nothing to do\n"


def test_a_compacted_store_has_a_report_of_its_own(
    written: tuple[JobReport, str, Any], tmp_path: Path
) -> None:
    report, store, _ = written
    compact = rd.compact(store, tmp_path / "compact")
    assert set(compact.stages) == {"copy"}
    assert (compact.chips, compact.bytes_fetched) == (40, report.bytes_fetched)
    assert rd.job_report(tmp_path / "compact") == replace(compact, shards_written=0, seconds=None)


def test_every_job_says_how_far_it_is_or_nothing_at_all(
    written: tuple[JobReport, str, Any], s2: rd.Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, store, _ = written
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(8)
    picky = chips.filter_pixels(min_valid=0.1)
    shards = {"stored": f"{report.shards}/{report.shards} shards, ", "planned": "1/1 shards, "}
    for wanted, job in (
        (shards["stored"], lambda shown: rd.open_chips(store).sample(39).stats(progress=shown)),
        (shards["planned"], lambda shown: chips.stats(progress=shown)),
        (
            ", 40 of 40 chips, ",
            lambda shown: rd.compact(store, tmp_path / f"compact-{shown}", progress=shown),
        ),
        (" objects, ", lambda shown: rd.verify(store, progress=shown)),
    ):
        job(False)
        assert not capsys.readouterr().err
        for path in (Path(store) / "_job" / "stats").glob("*"):
            path.unlink()  # what was measured is not measured again
        job(True)
        assert wanted in capsys.readouterr().err.splitlines()[-1]
    picky.stream(4)
    assert capsys.readouterr().err.splitlines()[-1].startswith("1/1 shards, ")  # the first look at all pixels
    picky.stream(4)
    assert not capsys.readouterr().err


def test_the_page_names_every_column(written: tuple[JobReport, str, Any]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "watching.md").read_text()
    firsts = re.findall(r"^\| (`[^|]*) \|", page.split("| column |")[1], re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(firsts)))
    assert set(written[0].table.column_names) - named == {"dropped_chips", "unreadable_tiles", "key", "notes"}
    assert named <= set(written[0].table.column_names)


def test_what_is_no_finished_store_has_no_report(written: tuple[JobReport, str, Any], tmp_path: Path) -> None:
    with pytest.raises(rd.StoreError, match="no finished store"):
        rd.job_report(tmp_path)


@pytest.mark.parametrize("slow", [0, 1, 4])
def test_shards_that_are_slower_than_the_others_are_named(slow: int) -> None:
    seconds = [1.0] * 9 + [SLOW + 1.0 + at for at in range(slow)]
    shards = [f"s{at}" for at in range(len(seconds))]
    table = pa.table({"shard": shards, "seconds": seconds, "process": ["a:1"] * len(seconds)})
    text = slow_shards(table)
    assert bool(text) == bool(slow)
    if slow:
        assert text.startswith(
            f"{slow} of {9 + slow} shards took over 5 times the median of 1.0 s: s{8 + slow} "
        )
        assert (" and 1 more" in text) == (slow == 4)
    assert not slow_shards(table.slice(0, FEW - 1))


def test_slow_shards_are_logged_once(
    s2: rd.Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = count()

    def slowed(seconds: float, stages: dict[str, float]) -> dict[str, Any]:
        return stamp(99.0 if next(taken) == 3 else 1.0, stages)

    monkeypatch.setattr("rasteret_dask.store.write.stamp", slowed)
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(40)
    with caplog.at_level(logging.INFO, "rasteret_dask"):
        run_zarr(layout_of(chips, 40_000), str(tmp_path / "store"), ReadContext(), None, False)
    (line,) = (line for line in caplog.messages if "times the median" in line)
    assert re.search(
        r"1 of \d+ shards took over 5 times the median of 1\.0 s: all-\d+ 99\.0 s on \S+:\d+$", line
    )
