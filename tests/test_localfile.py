"""Ranges of local files: the bytes, sizes, versions and refusals that obstore has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import LocalStore

from rasteret_dask.errors import ReadError
from rasteret_dask.net import localfile, remote

DATA = bytes(range(256)) * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local file") / "ä %20.bin"
    path.write_bytes(DATA)
    return path


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.none() | st.integers(1, 2 * len(DATA)))
def test_a_range_is_the_file_s(place: Path, start: int, length: int | None) -> None:
    wanted = DATA[start:] if length is None else DATA[start : start + length]
    found = remote.fetch(str(place), start, length)
    assert bytes(found.data) == wanted
    assert found.head.size == len(DATA)
    if length is not None:
        memory = np.zeros(length + 3, np.uint8)
        into = remote.fetch(place.as_uri(), start, length, memory=memory)
        assert bytes(into.data) == wanted == memory[: len(wanted)].tobytes()
        assert not memory[len(wanted) :].any()
        assert np.shares_memory(np.frombuffer(into.data, np.uint8), memory)


def test_the_version_is_obstore_s(place: Path) -> None:
    os.utime(place, ns=(10**18 + 123456789, 10**18 + 123456789))
    meta = obstore.head(LocalStore(place.parent), place.name)
    assert localfile.read(str(place), 0, None).head == remote.Head(meta["size"], meta["e_tag"])
    assert remote.head(str(place)) == remote.fetch(str(place), 3, 1).head


def test_what_is_not_there_is_told(place: Path, tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "none", place / "below"):
        with pytest.raises(remote.MissingError, match="nothing there"):
            remote.fetch(str(missing))
    for start, length in ((len(DATA), 1), (len(DATA) + 7, None)):
        with pytest.raises(ReadError, match="416"):
            remote.fetch(str(place), start, length)
    (tmp_path / "empty").touch()
    assert bytes(remote.fetch(str(tmp_path / "empty")).data) == b""


def test_no_file_stays_open(place: Path) -> None:
    for _ in range(20):
        remote.fetch(str(place), 3, 5)
        with pytest.raises(ReadError):
            remote.fetch(str(place), len(DATA), 5)
    assert not [entry for entry in Path("/proc/self/fd").iterdir() if os.path.realpath(entry) == str(place)]
