"""Pages become a table while they arrive: a few at a time, whatever their size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stac_api import Dict, changed, generated

from rasteret_dask.errors import SourceError
from rasteret_dask.ingest import pages as module
from rasteret_dask.ingest.pages import EarlierTable, ItemBatch, TableSpec, ahead, ingest
from rasteret_dask.ingest.sources import remote_item
from rasteret_dask.ingest.stac import Rules, completed
from rasteret_dask.progress import Progress

ITEMS = generated(40)


def batches(*pages: list[Dict]) -> Iterator[ItemBatch]:
    return (ItemBatch([remote_item(i) for i in page]) for page in pages)


def table(path: Path, *pages: list[Dict], known: EarlierTable | None = None, **options: Any) -> Any:
    spec = TableSpec("test", Rules(), **{"headers": False, **options})
    report = ingest(batches(*pages), spec, path, Progress("items", False), known)
    return report, {row["id"]: row for row in pq.read_table(path).to_pylist()}


@given(st.lists(st.integers()), st.integers(1, 4))
def test_ahead_changes_nothing(values: list[int], count: int) -> None:
    assert list(ahead(iter(values), count)) == values


def test_ahead_takes_a_few_more_and_no_others() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for n in itertools.count():
            taken.append(n)
            yield n

    walk = ahead(source(), 2)
    assert [next(walk) for _ in range(5)] == [0, 1, 2, 3, 4]
    walk.close()
    assert len(taken) <= 5 + 2


def test_ahead_raises_where_its_source_does() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise SourceError("page 2", "nothing", "a page")

    walk = ahead(source())
    assert next(walk) == 1
    with pytest.raises(SourceError, match="page 2"):
        next(walk)


@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_it_does_not_matter_how_items_are_cut_into_pages(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    _, one = table(tmp_path / "one.parquet", ITEMS)
    _, many = table(tmp_path / "many.parquet", ITEMS[:3], [], ITEMS[3:30], ITEMS[30:])
    assert one == many
    assert sorted(one) == sorted(i["id"] for i in ITEMS)


def test_no_more_pages_are_held_than_are_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    asked, done, most = 0, 0, 0

    def counted(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        return completed(*arguments)

    def pages() -> Iterator[ItemBatch]:
        nonlocal asked, most
        for n in range(0, 40, 2):
            asked += 2
            most = max(most, asked - done)
            yield ItemBatch([remote_item(i) for i in ITEMS[n : n + 2]])

    monkeypatch.setattr(module, "completed", counted)
    ingest(pages(), TableSpec("test", Rules(), False), tmp_path / "t.parquet", Progress("items", False))
    assert done == 40
    # pages that were asked for in advance, those whose headers are awaited, and the one at hand
    assert most <= 2 * (2 * module.AHEAD + 2)


def test_order_of_arrival_does_not_decide_which_duplicate_stays(tmp_path: Path) -> None:
    versions = [
        changed(ITEMS[0], created=created, **{"s2:processing_baseline": baseline, "eo:cloud_cover": cloud})
        for baseline, created, cloud in (
            ("05.09", "2024-01-02T00:00:00Z", 1.0),
            ("10.00", "2024-01-01T00:00:00Z", 2.0),
            ("9.10", "2025-01-01T00:00:00Z", 3.0),
            ("10.00", "2023-01-01T00:00:00Z", 4.0),
        )
    ]
    for order in itertools.permutations(versions):
        report, rows = table(tmp_path / "t.parquet", list(order[:2]), list(order[2:]))
        assert report.twice == 3
        assert [r["eo:cloud_cover"] for r in rows.values()] == [2.0]


def test_known_rows_are_kept_and_newer_ones_replace_them(tmp_path: Path) -> None:
    table(tmp_path / "old.parquet", ITEMS[:10])
    known = EarlierTable.of(tmp_path / "old.parquet")
    assert sorted(known.age) == sorted(i["id"] for i in ITEMS[:10])
    newer = changed(ITEMS[2], updated="2030-01-01T00:00:00Z", **{"eo:cloud_cover": 99.0})
    report, rows = table(tmp_path / "new.parquet", [*ITEMS[:2], newer, *ITEMS[3:12]], known=known)
    assert (report.added, report.rows) == (3, 12)
    assert rows[newer["id"]]["eo:cloud_cover"] == 99.0
    assert known.holds({"id": ITEMS[0]["id"], "baseline": "05.09", "created": None, "properties": None})


def test_progress_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("items", True, 10) as shown:
        shown.step(4)
        shown.step(6, "1 headers failed")
    assert capsys.readouterr().err.splitlines()[-1].startswith("10/10 items, 1 headers failed, ")
    with Progress("items", True) as shown:
        shown.step(4)
    assert capsys.readouterr().err.splitlines()[-1].startswith("4 items")
    with Progress("items", False) as shown:
        shown.step(4)
    assert capsys.readouterr().err == ""
