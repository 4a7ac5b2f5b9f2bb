"""Whatever bytes say: a record table that records what is wrong, or a typed error; never anything else."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tiffs import NORTH, WEST, Values, item, tiff

import rasteret_dask as rd
from rasteret_dask.chipping import frame
from rasteret_dask.headers.reader import read_headers
from rasteret_dask.net import remote

# told as warnings: broken items, unreadable headers and tiles, pixels out of proportion
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SOON = settings(
    max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
LONG = settings(SOON, max_examples=300, derandomize=not os.environ.get("RASTERET_DASK_FUZZ"))
"""The same examples each time; any value of ``RASTERET_DASK_FUZZ`` draws others."""


@contextmanager
def typed() -> Iterator[None]:
    """Expect success or a typed error that says what it is about."""
    found: rd.RasteretDaskError | None = None
    try:
        yield
    except rd.RasteretDaskError as error:
        found = error
    if found is not None:
        assert found.subject
        assert found.found
        assert len(str(found).encode()) < 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one good file."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "good.tif").write_bytes(tiff({}))
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(frame, "MOST_WINDOWS", 20_000)


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
        rows = {r["id"]: dict(r["assets"]) for r in made.to_table(["id", "assets"]).to_pylist()}
        assert rows["good"]["x"]["error"] is None
        chips = None
        with typed():
            chips = made.chips(16, cell_km=0.64)
            assert len(chips) <= 20_000
            chips.load(on_error="mask")
        if chips is None or any(asset["error"] for asset in rows.get("any", {}).values()):
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


# --- items -----------------------------------------------------------------------------------------------------

DEEP: list[Any] = []
for _ in range(20_000):
    DEEP = [DEEP]

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([
        None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, math.inf, -math.inf, math.nan, "", "a", "\0", "\ud800",
        "9" * 400, "EPSG:99999", "EPSG:" + "9" * 30, "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00", [], {},
        [None], "\x1b[2J",
        {"href": 1}, [[1, 2], [3]], [1e300] * 6, [math.nan] * 9, [0] * 4, [2**40, 2**40], "2024-02-30", -32633,
        "N9" * 50,
    ]),
    st.text(max_size=8), st.floats(), st.integers(),
)  # fmt: skip

PLACES = (
    ("id",), ("type",), ("collection",), ("geometry",), ("bbox",), ("links",), ("properties",), ("assets",),
    ("geometry", "coordinates"), ("geometry", "type"), ("properties", "datetime"), ("properties", "start_datetime"),
    ("properties", "end_datetime"), ("properties", "created"), ("properties", "eo:cloud_cover"),
    ("properties", "platform"), ("properties", "proj:epsg"), ("properties", "proj:code"),
    ("properties", "proj:transform"), ("properties", "proj:shape"), ("properties", "s2:processing_baseline"),
    ("properties", "s2:datatake_id"), ("properties", "sat:relative_orbit"), ("properties", "landsat:wrs_path"),
    ("properties", "landsat:wrs_row"), ("properties", "grid:code"), ("properties", "any"), ("assets", "x"),
    ("assets", "x", "href"), ("assets", "x", "type"), ("assets", "x", "roles"), ("assets", "x", "bands"),
    ("assets", "x", "eo:bands"), ("assets", "x", "raster:bands"), ("assets", "x", "raster:bands", 0),
    ("assets", "x", "raster:bands", 0, "scale"), ("assets", "x", "raster:bands", 0, "offset"),
    ("assets", "x", "raster:bands", 0, "nodata"), ("assets", "x", "raster:bands", 0, "data_type"),
    ("assets", "x", "eo:bands", 0, "name"), ("assets", "x", "eo:bands", 0, "common_name"),
    ("assets", "x", "proj:epsg"), ("assets", "x", "proj:transform"), ("assets", "x", "proj:shape"),
    ("assets", "x", "gsd"),
)  # fmt: skip


def whole(href: str) -> dict[str, Any]:
    """Return an item that says all that items say."""
    found = item("any", href, platform="sentinel-2a", created="2024-01-02T00:00:00Z", any={"a": [1]})
    found["properties"] |= {"eo:cloud_cover": 5, "proj:epsg": 32633, "s2:processing_baseline": "05.09"}
    found["properties"] |= {"proj:transform": [10, 0, WEST, 0, -10, NORTH], "proj:shape": [64, 64]}
    found["bbox"] = [14.9, 46.9, 15.1, 47.0]
    ring = [[14.9, 46.9], [15.1, 46.9], [15.1, 47.0], [14.9, 47.0], [14.9, 46.9]]
    found["geometry"] = {"type": "Polygon", "coordinates": [ring]}
    found["assets"]["x"]["raster:bands"] = [
        {"scale": 0.0001, "offset": -0.1, "nodata": 0, "data_type": "uint16"}
    ]
    found["assets"]["x"]["eo:bands"] = [{"name": "B04", "common_name": "red"}]
    return found


def put(document: Any, place: tuple[Any, ...], value: Any) -> None:
    """Put a value into a document, as far as there still is such a place."""
    for key in place[:-1]:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(document, dict) or (isinstance(document, list) and isinstance(place[-1], int) and document):
        document[place[-1]] = value


def law_of_items(folder: Path, changes: list[tuple[tuple[Any, ...], Any]], headers: bool) -> None:
    """A broken item is left out and named where that is asked for; it is never anything but a typed error."""
    broken = whole(str(folder / "good.tif"))
    for place, value in changes:
        put(broken, place, copy.copy(value))
    good = item("good", folder / "good.tif")
    put(good, ("assets", "x"), whole(str(folder / "good.tif"))["assets"]["x"])
    put(good, ("properties",), {"datetime": "2024-01-01T00:00:00Z", "proj:epsg": 32633,
                                "proj:transform": [10, 0, WEST, 0, -10, NORTH], "proj:shape": [64, 64]})  # fmt: skip
    with typed():
        rd.build_from_stac([broken], name="fuzz", headers=headers)
    made = rd.build_from_stac([good, broken], name="fuzz", headers=headers, on_error="skip")
    assert "good" in made.to_table(["id"]).column("id").to_pylist()
    with typed():
        len(made.harmonize(units="reflectance").chips(16, cell_km=0.64))


CHANGES = st.tuples(st.sampled_from(PLACES), SCALARS)


@SOON
@given(CHANGES, st.booleans())
def test_fields_of_an_item(folder: Path, change: tuple[tuple[Any, ...], Any], headers: bool) -> None:
    law_of_items(folder, [change], headers)


@pytest.mark.parametrize("when", ["9999-12-31T23:59:59Z", "1066-10-14T00:00:00Z"])
def test_times_that_no_nanosecond_tells(folder: Path, when: str) -> None:
    """Intervals without an end are often written as one in the year 9999."""
    law_of_items(folder, [(("properties", "datetime"), when)], headers=False)


@pytest.mark.slow
@LONG
@given(st.lists(CHANGES, min_size=1, max_size=4), st.booleans())
def test_any_fields_of_an_item(
    folder: Path, changes: list[tuple[tuple[Any, ...], Any]], headers: bool
) -> None:
    law_of_items(folder, changes, headers)


def test_an_item_that_is_deeper_than_python(folder: Path) -> None:
    law_of_items(folder, [(("properties", "any"), DEEP)], False)


# --- hrefs -----------------------------------------------------------------------------------------------------

HREFS = [
    "", " ", "\0", "a\0b.tif", "/" + "a" * 200_000, "http://127.0.0.1:9/" + "a" * 200_000,
    "http://127.0.0.1:9/a?" + "a" * 70_000, "http://127.0.0.1:9/" + "a" * 65_530, "http://" + "a" * 200_000 + "/x.tif",
    "s3://b/" + "a" * 200_000, "/" + "a/" * 8_000, "http://127.0.0.1:9/\ud800.tif", "/x/\ud800.tif", "http://\ud800/a.tif",
    "http://127.0.0.1:99999/a.tif", "http://127.0.0.1:x/a.tif", "http://127.0.0.1:-1/a.tif", "http://[::1/a.tif",
    "http://[v1.a]/a.tif", "http://a[b/a.tif", "file://[/a.tif", "http:///a.tif", "http://", "http:/a.tif", "http://@/",
    "http://127.0.0.1:9/a\r\nHost: b", "http://127.0.0.1:9/%", "http://127.0.0.1:9/%00", "http://127.0.0.1:9/%ff%fe",
    "http://127.0.0.1:9/../../a.tif", "ftp://a/b.tif", "data:image/tiff;base64,AAAA", "javascript:1", "vrt://a.tif",
    "/vsicurl/http://a/b.tif", "<VRTDataset/>", "C:\\a.tif", "c://a.tif", "~", ".", "/", "s3://", "gs://", "http://*/a.tif",
    "http://./a.tif", "http://xn--/a.tif", "\x01\x7f", "😀.tif", "http:\\\\127.0.0.1\\a.tif", "//[x/a.tif",
]  # fmt: skip
ANY_HREF = st.sampled_from(HREFS) | st.text(max_size=30) | st.builds(
    "http://127.0.0.1:9/{}".format, st.text(max_size=30)
) | st.builds("http://127.0.0.1{}/a.tif".format, st.text(alphabet=":[]@%/?#\\ \t\n0a", max_size=8))  # fmt: skip


def law_of_hrefs(folder: Path, href: str) -> None:
    """An href that names nothing is an asset with a reason, or an item left out and named."""
    items = [item("good", folder / "good.tif"), item("bad", href)]
    with typed():
        rd.build_from_stac(items[1:], name="fuzz")
    made = rd.build_from_stac(items, name="fuzz", on_error="skip")
    assert made.to_table(["id"]).column("id").to_pylist()[0] == "good"
    with typed():
        found = read_headers([href])[href]
        assert isinstance(found, str)
        assert len(found) < 1000


@pytest.mark.parametrize("href", HREFS, ids=range(len(HREFS)))
def test_hrefs(folder: Path, href: str) -> None:
    law_of_hrefs(folder, href)


@pytest.mark.slow
@LONG
@given(ANY_HREF)
def test_any_hrefs(folder: Path, href: str) -> None:
    law_of_hrefs(folder, href)
