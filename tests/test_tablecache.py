"""Built tables on disk: whole or not at all, in their place, and known by what decides."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.ingest.tablecache import (
    SEARCH_FILE,
    TABLE,
    VARIABLE,
    TableShelf,
    cache_root,
    key_of,
    shelf,
    shelf_of,
)


def fill(folder: Path, text: str) -> None:
    (folder / TABLE).write_text(text)
    (folder / SEARCH_FILE).write_text(json.dumps({"what": text}))


def put(
    place: TableShelf, text: str, *, after: Path | None = None, replace: bool = False, keep: int = 0
) -> Path:
    with place.filling() as folder:
        fill(folder, text)
        return place.commit(folder, after=after, replace=replace, keep=keep)


def fail_half_way(place: TableShelf) -> None:
    with place.filling() as folder:
        fill(folder, "second")
        raise RuntimeError("in the middle")


def text(folder: Path | None) -> str | None:
    return None if folder is None else (folder / TABLE).read_text()


def test_the_folder_is_the_one_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable"))
    assert cache_root() == tmp_path / "variable"
    assert cache_root(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.chdir(tmp_path)
    assert cache_root("near") == tmp_path / "near"
    monkeypatch.setenv(VARIABLE, "")
    assert cache_root().is_absolute()
    assert "rasteret_dask" in str(cache_root())
    monkeypatch.setenv(VARIABLE, "s3://bucket/tables")
    with pytest.raises(PlanError, match=VARIABLE):
        cache_root()


def test_a_table_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = shelf(tmp_path, "s2", "0" * 64)
    assert place.newest() is None
    with place.filling() as folder:
        (folder / TABLE).write_text("half")
        assert place.newest() is None
    assert place.newest() is None
    assert not list(tmp_path.rglob("*.tmp"))
    put(place, "first")
    assert text(place.newest()) == "first"
    with pytest.raises(RuntimeError, match="middle"):
        fail_half_way(place)
    assert text(place.newest()) == "first"


def test_who_comes_second_takes_the_first_s_table_or_replaces_it(tmp_path: Path) -> None:
    place = shelf(tmp_path, "s2", "0" * 64)
    first = put(place, "first")
    assert text(put(place, "second")) == "first"
    assert [p.name for p in place.folder.iterdir()] == [first.name]
    assert text(put(place, "third", replace=True)) == "third"
    assert [text(p) for p in place.folder.iterdir()] == ["third"]


def test_older_tables_stay_as_long_as_asked(tmp_path: Path) -> None:
    place = shelf(tmp_path, "s2", "0" * 64)
    last: Path | None = None
    for n in range(4):
        last = put(place, str(n), after=last, keep=1)
    assert sorted(text(p) or "" for p in place.folder.iterdir()) == ["2", "3"]
    assert text(place.newest()) == "3"


def test_what_stopped_processes_left_is_removed(tmp_path: Path) -> None:
    place = shelf(tmp_path, "s2", "0" * 64)
    gone = 2**22 + 1  # beyond Linux's and macOS's process numbers
    names = {
        "dead": f".{socket.gethostname()}.{gone}.aa.tmp",
        "own": f".{socket.gethostname()}.{os.getpid()}.bb.tmp",
        "elsewhere": ".other.host.17.cc.tmp",
        "old elsewhere": ".other.host.18.dd.tmp",
    }
    for name in names.values():
        (place.folder / name).mkdir(parents=True)
    os.utime(place.folder / names["old elsewhere"], (0, 0))
    put(place, "first")
    left = {p.name for p in place.folder.glob(".*.tmp")}
    assert left == {names["own"], names["elsewhere"]}


@given(st.text(max_size=300))
def test_no_label_leaves_the_folder(label: str) -> None:
    root = Path("/cache")
    folder = shelf(root, label, key_of({"label": label})).folder
    assert folder.parent == root
    assert len(folder.name.encode()) < 120
    assert not folder.name.startswith(".")
    assert os.path.normpath(folder) == str(folder)


def test_keys_tell_everything_apart() -> None:
    base: dict[str, Any] = {"bbox": [6.0, 44.0], "dates": None, "bands": ["red"]}
    same = {"bands": ["red"], "dates": None, "bbox": [6.0, 44.0]}
    others: list[dict[str, Any]] = [
        {**base, "bbox": [6.0, 44.000000000000007]},
        {**base, "dates": "2024"},
        {**base, "bands": ["red", "nir"]},
        {**base, "bands": "red"},
        {**base, "more": None},
    ]
    assert key_of(base) == key_of(same)
    assert len({key_of(base), *map(key_of, others)}) == 1 + len(others)


def test_what_was_searched_for_is_found_beside_the_table(tmp_path: Path) -> None:
    place = shelf(tmp_path, "s2", "0" * 64)
    folder = put(place, "first")
    assert shelf_of(str(folder / TABLE)) == (place, folder, {"what": "first"})
    assert shelf_of(str(tmp_path / "other.parquet")) is None
    (folder / SEARCH_FILE).write_text("{")
    with pytest.raises(SourceError, match="no JSON"):
        shelf_of(str(folder / TABLE))
