"""Where something lies is decided once: paths of this machine in any spelling, and URLs without credentials."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.errors import StoreError, TrustError
from rasteret_dask.net.places import Place

NAMES = st.text("abcXYZ019._- ", min_size=1, max_size=8).filter(lambda name: name.strip(". ") == name)


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_every_spelling_of_a_path_is_one_place(names: list[str]) -> None:
    path = Path("/data", *names)
    spellings: list[str | Path] = [path, str(path), path.as_uri(), f"{path}/", os.path.relpath(path)]
    assert {Place.of(spelling) for spelling in spellings} == {Place(str(path), True)}
    assert {Place.of(Place.of(spelling).url) for spelling in spellings} == {Place(str(path), True)}


@given(
    st.sampled_from(["https", "s3", "gs", "az"]),
    st.lists(NAMES.map(lambda n: n.replace(" ", "")), max_size=3),
)
def test_a_url_stays_what_it_is(scheme: str, names: list[str]) -> None:
    url = "/".join([f"{scheme}://bucket.test", *names])
    assert Place.of(url) == Place(url, False) == Place.at(url)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Place.of("~/train.zarr") == Place(str(tmp_path / "train.zarr"), True)


def test_a_url_is_known_without_its_credentials() -> None:
    place = Place.of("https://me:secret@places.test/train.zarr?sig=secret")
    assert "secret" not in place.url
    assert not place.is_local


def test_a_file_is_no_folder_however_it_is_spelled(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for spelling in (file, str(file), file.as_uri()):
        with pytest.raises(StoreError, match="found a file; expected a folder"):
            Place.of(spelling).folder("a folder", "Take another.")
    assert Place.of(tmp_path).folder("a folder", "") == str(tmp_path)


def test_a_path_of_gdal_s_is_refused() -> None:
    with pytest.raises(TrustError, match="virtual file systems"):
        Place.of("/vsizip/archive.zip/x.tif")
