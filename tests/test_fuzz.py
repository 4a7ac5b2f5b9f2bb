"""Whatever bytes say: a record table that records what is wrong, or a typed error; never anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tiffs import Values, item, tiff

import rasteret_dask as rd
from rasteret_dask.chipping.frame import MOST_WINDOWS
from rasteret_dask.net import remote

SOON = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
LONG = settings(SOON, max_examples=1500, derandomize=False)


@contextmanager
def typed() -> Iterator[None]:
    """Expect success or a typed error that says what it is about."""
    try:
        yield
    except rd.RasteretDaskError as error:
        assert error.subject
        assert error.found
        assert len(str(error)) < 4000
        str(error).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one good file."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "good.tif").write_bytes(tiff({}))
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)


# --- headers ---------------------------------------------------------------------------------------------------

NUMBERS = (
    st.sampled_from(
        [
            0.0,
            -1.0,
            1e-300,
            1e-9,
            1e-3,
            0.1,
            10.0,
            30.0,
            1e3,
            1e5,
            1e6,
            1e9,
            1e17,
            1e300,
            math.inf,
            -math.inf,
            math.nan,
        ]
    )
    | st.floats()
)
SHORTS = st.integers(0, 65535)
LONGS = st.integers(0, 2**32 - 1) | st.sampled_from(
    [0, 1, 15, 16, 31, 33, 64, 65536, 2**31 - 1, 2**31, 2**32 - 1]
)
CODES = st.sampled_from([0, 1, 1024, 2056, 3031, 3413, 3857, 4326, 4807, 4978, 5041, 5703, 7415, 27700, 32600, 32615,
                         32661, 32733, 32766, 32767, 65535]) | SHORTS  # fmt: skip
XML = st.sampled_from(["inf", "nan", "1e999", "-32633", "0", "x", "", "1e-320"]).map(
    lambda v: (
        f'<GDALMetadata><Item name="s" sample="0" role="scale">{v}</Item></GDALMetadata>'.encode() + b"\0"
    )
)


def keys(code: int, model: int = 1) -> Values:
    return "H", [1, 1, 0, 2, 1024, 0, 1, model, 3072 if model == 1 else 2048, 0, 1, code]


TAG_CHANGES: st.SearchStrategy[dict[int, Values | None]] = st.one_of(
    st.tuples(NUMBERS, NUMBERS).map(lambda v: {33550: ("d", [*v, 0.0])}),
    st.tuples(NUMBERS, NUMBERS).map(lambda v: {33922: ("d", [0.0, 0.0, 0.0, *v, 0.0])}),
    st.tuples(NUMBERS, NUMBERS, NUMBERS).map(
        lambda v: {33550: ("d", [v[0], v[0], 0.0]), 33922: ("d", [0.0, 0.0, 0.0, v[1], v[2], 0.0])}
    ),
    st.lists(NUMBERS, min_size=16, max_size=16).map(lambda v: {33550: None, 34264: ("d", v)}),
    st.tuples(CODES, st.sampled_from([1, 2])).map(lambda v: {34735: keys(*v)}),
    st.tuples(CODES, NUMBERS, NUMBERS).map(
        lambda v: {34735: keys(v[0]), 33550: ("d", [v[1], v[1], 0.0]), 33922: ("d", [0.0, 0.0, 0.0, v[2], v[2], 0.0])}
    ),
    st.lists(SHORTS, max_size=16).map(lambda v: {34735: ("H", v or [0])}),
    st.tuples(st.sampled_from([256, 257, 322, 323]), LONGS).map(lambda v: {v[0]: ("I", [v[1]])}),
    st.tuples(LONGS, LONGS, LONGS).map(lambda v: {256: ("I", [v[0]]), 257: ("I", [v[1]]), 322: ("I", [v[2]])}),
    st.tuples(st.sampled_from([258, 259, 277, 284, 317, 339, 266, 262]), SHORTS).map(lambda v: {v[0]: ("H", [v[1]])}),
    st.sampled_from([(5, 32), (5, 64), (6, 64), (6, 128), (6, 32), (3, 16), (3, 24), (2, 7), (1, 128)]).map(
        lambda v: {339: ("H", [v[0]]), 258: ("H", [v[1]])}
    ),
    st.tuples(st.sampled_from([324, 325]), st.lists(LONGS, min_size=1, max_size=6)).map(
        lambda v: {v[0]: ("I", v[1])}
    ),
    st.binary(max_size=12).map(lambda v: {42113: ("s", v + b"\0")}),
    XML.map(lambda v: {42112: ("s", v)}),
    st.sampled_from([256, 258, 259, 277, 322, 324, 325, 33550, 33922, 34735]).map(lambda t: {t: None}),
)  # fmt: skip


def law_of_files(folder: Path, data: bytes) -> None:
    """A file beside a good one costs nobody else, and what it costs itself is told."""
    path = folder / "any.tif"
    path.write_bytes(data)
    items = [item("good", folder / "good.tif"), item("any", path), item("too", folder / "good.tif")]
    with typed():
        made = rd.build_from_stac(items, name="fuzz", on_error="skip" if len(data) % 2 else "raise")
        rows = {r["id"]: dict(r["assets"])["x"] for r in made.to_table(["id", "assets"]).to_pylist()}
        assert rows["good"]["error"] is None
        chips = None
        with typed():
            chips = made.chips(16, cell_km=0.64)
            assert len(chips) <= MOST_WINDOWS
            chips.load(on_error="mask")
        if chips is None or rows.get("any", {"error": ""})["error"] is not None:
            good = made.where("id", "in", ["good", "too"]).where(readable=True).chips(16, cell_km=0.64)
            assert int(good.load().pixels.max()) > 4000


@SOON
@given(TAG_CHANGES)
def test_tags_of_a_header(folder: Path, changes: dict[int, Values | None]) -> None:
    law_of_files(folder, tiff(changes))


@pytest.mark.slow
@LONG
@given(st.lists(TAG_CHANGES, min_size=1, max_size=3))
def test_any_tags_of_a_header(folder: Path, changes: list[dict[int, Values | None]]) -> None:
    law_of_files(folder, tiff({t: v for change in changes for t, v in change.items()}))


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


def flipped(data: bytes, flips: list[tuple[float, int]], most: int) -> bytes:
    broken = bytearray(data)
    for at, value in flips:
        broken[4 + int(at * (most - 4))] = value
    return bytes(broken)


@SOON
@given(FLIPS)
def test_flipped_bytes_of_a_header(folder: Path, flips: list[tuple[float, int]]) -> None:
    law_of_files(folder, flipped(tiff({}), flips, 420))


@pytest.mark.slow
@LONG
@given(FLIPS)
def test_any_flipped_bytes(folder: Path, flips: list[tuple[float, int]]) -> None:
    data = tiff({})
    law_of_files(folder, flipped(data, flips, len(data)))
