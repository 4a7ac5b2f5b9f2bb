"""One broken file, item or row of many: told by name, and the rest of the build lives."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import rasterio
from rasterio.transform import Affine
from tiny_tiffs import NORTH, WEST, item, tiff

import rasteret_dask as rd
from rasteret_dask.catalogs.bands import Band, objection
from rasteret_dask.chipping import frame
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.rules.radiometry import Radiometry

CELL_KM = 0.64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    (place / "good.tif").write_bytes(tiff({}))
    (place / "huge.tif").write_bytes(tiff({33550: ("d", [1e5, 1e5, 0.0])}))
    (place / "large.tif").write_bytes(tiff({33550: ("d", [3e4, 3e4, 0.0])}))
    for kind in ("complex_int16", "complex64"):
        with rasterio.open(
            place / f"{kind}.tif", "w", driver="GTiff", width=64, height=64, count=1, dtype=kind, crs="EPSG:32633",
            transform=Affine(10, 0, WEST, 0, -10, NORTH), tiled=True, blockxsize=32, blockysize=32,
        ):  # fmt: skip
            pass
    return place


def errors(collection: rd.Collection) -> dict[str, str | None]:
    """Return {record: why its first asset cannot be used}."""
    rows = collection.to_table(["id", "assets"]).to_pylist()
    return {row["id"]: row["assets"][0][1]["error"] for row in rows}


def built(folder: Path, *names: str, **options: Any) -> rd.Collection:
    return rd.build_from_stac([item(n, folder / f"{n}.tif") for n in names], name="x", **options)


# --- headers ---------------------------------------------------------------------------------------------------


def test_a_raster_larger_than_its_crs_is_an_asset_with_a_reason(folder: Path) -> None:
    (folder / "256.tif").write_bytes(
        tiff(
            {
                33550: ("d", [1e5, 1e5, 0.0]),
                256: ("I", [256]),
                257: ("I", [256]),
                322: ("I", [128]),
                323: ("I", [128]),
            }
        )
    )
    made = built(folder, "good", "256")
    assert "256 x 256 pixels of 100000 x 100000 m" in (errors(made)["256"] or "")
    with pytest.raises(rd.UnreadableAssetsError, match=r"256/x.*beyond EPSG:32633"):
        len(made.chips(16, cell_km=CELL_KM))
    assert len(made.where(readable=True).chips(16, cell_km=CELL_KM)) == len(
        built(folder, "good").chips(16, cell_km=CELL_KM)
    )


def test_directories_that_go_in_a_circle(tmp_path: Path) -> None:
    data = bytearray(tiff({}))
    after = 10 + 12 * struct.unpack("<H", data[8:10])[0]
    data[after : after + 4] = struct.pack("<I", 8)
    (tmp_path / "loop.tif").write_bytes(bytes(data))
    assert errors(built(tmp_path, "loop")) == {"loop": "refused: more than 128 images in one file"}


def test_a_tile_that_swells_is_an_error_that_names_it(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(64 << 20))
    size = len(tiff({324: ("I", [0] * 4), 325: ("I", [0] * 4)}))
    (tmp_path / "bomb.tif").write_bytes(tiff({324: ("I", [size] * 4), 325: ("I", [len(bomb)] * 4)}) + bomb)
    with pytest.raises(rd.ReadError, match=r"record 'bomb'.*decoding tile 0"):
        built(tmp_path, "bomb").chips(16, cell_km=CELL_KM).load()


def test_complex_integers_cost_nobody_else(folder: Path) -> None:
    found = errors(built(folder, "good", "complex_int16", "complex64"))
    assert found == {
        "good": None,
        "complex_int16": "refused: pixels of complex_int16, a type that NumPy does not have; "
        "convert the file, e.g. with gdal_translate -ot CFloat32",
        "complex64": None,
    }


def test_a_plan_names_the_record_whose_pixels_are_out_of_proportion(folder: Path) -> None:
    made = built(folder, "good", "large")
    three = rd.build_from_stac(
        [
            item("good", folder / "good.tif"),
            item("large", folder / "large.tif"),
            item("too", folder / "good.tif"),
        ],
        name="x",
    )
    for collection in (made, three, three.harmonize(resolution=10)):
        with pytest.raises(
            rd.GridError, match=r"record 'large', band 'x'.*30000 m.*10 m.*\.where\(\"id\", \"!=\", 'large'"
        ):
            len(collection.chips(16, cell_km=CELL_KM))
    assert len(three.where("id", "!=", "large").chips(16, cell_km=CELL_KM))
    assert len(made.where("id", "==", "good").chips(16, cell_km=CELL_KM))


def test_kilometres_resampled_to_metres_are_told(tmp_path: Path) -> None:
    (tmp_path / "coarse.tif").write_bytes(tiff({33550: ("d", [12_000.0, 12_000.0, 0.0])}))
    coarse = built(tmp_path, "coarse").harmonize(resolution=10)
    with pytest.warns(
        UserWarning, match=r"source 'x': pixels of 12000 m \(x\) are resampled to 10 m, 1,200 times finer"
    ):
        assert len(
            coarse.subset(bbox=(14.0, 46.0, 16.0, 47.0)).chips(64, cell_km=10, aoi=(15.0, 46.8, 15.02, 46.82))
        )


def test_degrees_are_no_metres(tmp_path: Path) -> None:
    keys = ("H", [1, 1, 0, 2, 1024, 0, 1, 2, 2048, 0, 1, 4326])
    (tmp_path / "deg.tif").write_bytes(
        tiff({34735: keys, 33550: ("d", [1e-4, 1e-4, 0.0]), 33922: ("d", [0.0, 0.0, 0.0, 15.0, 46.9, 0.0])})
    )
    made = built(tmp_path, "deg")
    with pytest.raises(
        rd.GridError, match=r"record 'deg'.*0\.0001 degrees \(EPSG:4326\).*harmonize\(resolution="
    ):
        len(made.chips(16))
    assert len(made.harmonize(resolution=10).chips(16, cell_km=CELL_KM))


def test_windows_are_counted_before_they_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(folder, "good")
    chips = len(made.chips(16, cell_km=CELL_KM))
    monkeypatch.setattr(frame, "MOST_WINDOWS", chips // 2)

    def never(*_: object) -> None:
        raise AssertionError("windows were laid")

    monkeypatch.setattr(frame, "_lay_out", never)
    monkeypatch.setattr(frame, "_boxes", never)
    for grid in ("zone", "tiles"):
        with pytest.raises(rd.GridError, match=r"record 'good'.* windows of 160 m.*aoi="):
            len(made.chips(16, cell_km=CELL_KM, grid=grid))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
import rasteret_dask as rd
from tiny_tiffs import item
for name, resolution in (("huge", 10), ("large", 0.001)):
    made = rd.build_from_stac([item(name, f"{sys.argv[1]}/{name}.tif")], name="x").harmonize(resolution=resolution)
    try:
        print(len(made.chips(4, stride=1)))
    except (rd.GridError, rd.UnreadableAssetsError) as error:
        print(type(error).__name__, error.subject)
"""


def test_absurd_plans_ask_for_no_memory(folder: Path) -> None:
    code = LIMITED.replace("sys.argv[1]", repr(str(folder)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first.startswith(("UnreadableAssetsError", "GridError"))
    assert second == "GridError chips(size=4) over record 'large'"


# --- logs ------------------------------------------------------------------------------------------------------

QUIET = """
import sys
from rasteret_dask.headers.reader import read_headers
print(sum(isinstance(h, str) for h in read_headers(sys.argv[1:]).values()))
"""


def broken_headers(folder: Path) -> list[str]:
    """Return files whose tags make no sense, each in a way of its own."""
    paths = []
    for n, changes in enumerate(
        (
            {42113: ("s", b"32767\0"), 258: ("H", [8]), 339: ("H", [2])},
            {324: ("I", [2**31] * 9), 325: ("I", [2**31] * 9)},
            {34735: ("H", [65535] * 16)},
            {256: None, 258: None, 33550: None},
        )
    ):
        path = folder / f"broken-{n}.tif"
        data = bytearray(tiff(changes))  # type: ignore[arg-type]
        data[30:34] = b"\xff\xff\xff\x7f"
        path.write_bytes(bytes(data))
        paths.append(str(path))
    return paths


def test_broken_headers_write_nothing_to_the_terminal(tmp_path: Path) -> None:
    paths = broken_headers(tmp_path)
    done = subprocess.run([sys.executable, "-c", QUIET, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# --- scale and offset ------------------------------------------------------------------------------------------

RED = Band("B04", "red", "red", scale=1e-4, offset=-0.1)
HEAT = Band("B10", "lwir", "lwir11", "temperature", scale=0.00341802, offset=149.0)
ABSURD = [
    (float("inf"), 0.0, None, False), (float("nan"), 0.0, None, False), (0.0, 0.0, None, False),
    (1.0, float("-inf"), None, False), (1e-40, 0.0, None, False), (-32633.0, 0.0, None, True),
    (1.0, -32633.0, None, True),
    (-32633.0, 0.0, RED, True), (1e-4, -32633.0, RED, True), (1e-4, -1000.0, RED, True), (1.0, 149.0, RED, True),
    (-0.00341802, 149.0, HEAT, True), (0.00341802, 1e6, HEAT, True),
]  # fmt: skip
MEANT = [
    (1.0, 0.0, None, False), (-1.0, 0.0, None, False), (1e15, 0.0, None, False), (0.5, -1.0, None, True),
    (1e-4, -0.1, RED, True), (0.01, 0.0, RED, True), (2.75e-5, -0.2, RED, True), (0.00341802, 149.0, HEAT, True),
    (0.1, -273.15, HEAT, True),
]  # fmt: skip


@pytest.mark.parametrize(("scale", "offset", "band", "spectral"), ABSURD)
def test_absurd_scales(scale: float, offset: float, band: Band | None, spectral: bool) -> None:
    assert f"scale {scale:g} and offset {offset:g}" in str(
        objection(Radiometry(scale, offset, "x"), band, spectral)
    )


@pytest.mark.parametrize(("scale", "offset", "band", "spectral"), MEANT)
def test_scales_that_are_meant(scale: float, offset: float, band: Band | None, spectral: bool) -> None:
    assert objection(Radiometry(scale, offset, "x"), band, spectral) is None


@pytest.mark.parametrize(
    ("field", "value"), [("scale", float("inf")), ("scale", 10**400), ("offset", -32633)]
)
def test_an_item_with_an_absurd_scale_keeps_its_other_bands(folder: Path, field: str, value: Any) -> None:
    document = item("a", folder / "good.tif")
    bands = [{"name": "B04", "common_name": "red"}], [{"scale": 1e-4, "offset": 0}]
    good = {**document["assets"]["x"], "eo:bands": bands[0], "raster:bands": bands[1]}
    bad = {
        **good,
        "eo:bands": [{"name": "B08", "common_name": "nir"}],
        "raster:bands": [{**bands[1][0], field: value}],
    }
    document["assets"] = {"good": good, "bad": bad}
    made = rd.build_from_stac([document], name="x")
    assets = dict(made.to_table(["assets"]).to_pylist()[0]["assets"])
    assert assets["B04"]["error"] is None
    assert assets["B08"]["error"].startswith(
        f"refused: scale {'inf' if field == 'scale' else '0.0001'} and offset"
    )
    assert assets["B08"]["error"].endswith(
        "of a spectral band" if field == "offset" else "which give no values"
    )
    assert len(made.harmonize(bands=["red"], units="reflectance").chips(16, cell_km=CELL_KM))
    with pytest.raises(rd.UnreadableAssetsError, match=r"a/B08.*refused: scale"):
        len(made.harmonize(bands=["nir"]).chips(16, cell_km=CELL_KM))


# --- on_error --------------------------------------------------------------------------------------------------


def bad_items(folder: Path) -> list[Any]:
    good = item("good", folder / "good.tif")
    return [
        item("long", "http://127.0.0.1:9/" + "a" * 200_000),
        item("port", "http://127.0.0.1:x/a.tif"),
        item("bracket", "http://[::1/a.tif"),
        item("metadata", "http://169.254.169.254/a.tif"),
        {**good, "id": "timeless", "properties": {}},
        item("large-number", folder / "good.tif", **{"sat:relative_orbit": 2**40}),
        {**good, "id": "shapeless", "geometry": {"type": "Polygon", "coordinates": [[[1, 2]]]}},
        7,
    ]


def test_broken_items_in_memory_are_left_out_and_named_once(folder: Path) -> None:
    bad = bad_items(folder)
    items = [item("good", folder / "good.tif"), *bad, item("too", folder / "good.tif")]
    with pytest.warns(UserWarning, match="x: 8 broken items are left out: 'long'.*; and 3 more") as told:
        made = rd.build_from_stac(items, name="x", on_error="skip")
    assert [w.filename for w in told] == [__file__]
    assert made.to_table(["id"]).column("id").to_pylist() == ["good", "too"]
    with pytest.raises(rd.SourceError, match=r"'long'|found a int"):
        rd.build_from_stac(items, name="x")
    with pytest.raises(rd.SourceError, match=r"'long'|found a int"):
        rd.build_from_stac(items, name="x", on_error="raise")
    with pytest.raises(rd.SourceError, match=r"all 8 of them broken \('long': an href of 200,019 characters"):
        rd.build_from_stac(bad, name="x", on_error="skip")
    with pytest.raises(rd.PlanError, match="'skip' or 'raise'"):
        rd.build_from_stac(items, name="x", on_error="")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(7))
def test_each_of_them_is_one_error_that_names_it(folder: Path, number: int) -> None:
    one = bad_items(folder)[number]
    with pytest.raises(rd.SourceError, match=f"'{one['id']}'") as told:
        rd.build_from_stac([one], name="x")
    assert len(str(told.value)) < 500
    if number < 4:
        assert "asset 'x'" in told.value.subject


def test_a_static_catalog_with_a_broken_item(folder: Path, tmp_path: Path) -> None:
    names = ["good.json", "bad.json", "number.json", "gone.json"]
    links = [{"rel": "item", "href": name} for name in names] + [{"rel": "child", "href": "number.json"}, 5]
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "c", "links": links}))
    (tmp_path / "good.json").write_text(json.dumps(item("good", folder / "good.tif")))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "number.json").write_text("7")
    with pytest.warns(UserWarning, match="left out") as told:
        made = rd.build_from_stac(str(tmp_path / "catalog.json"), name="x", on_error="skip")
    assert made.to_table(["id"]).column("id").to_pylist() == ["good"]
    texts = [str(w.message) for w in told]
    assert sum("broken items are left out" in t and "bad.json" in t for t in texts) == 1
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(rd.SourceError, match=r"bad\.json.*no JSON"),
    ):
        rd.build_from_stac(str(tmp_path / "catalog.json"), name="x")


def test_a_table_with_broken_rows(folder: Path) -> None:
    hrefs = [
        str(folder / "good.tif"),
        "http://[::1/a.tif",
        "http://127.0.0.1:9/" + "a" * 20_000,
        str(folder / "good.tif"),
    ]
    table = pa.table(
        {
            "id": ["good", "bracket", "long", "too"],
            "datetime": pa.array([0] * 4, pa.timestamp("us", "UTC")),
            "geometry": pa.array([None, None, None, b"no WKB"], pa.binary()),
            "url": hrefs,
        }
    )
    options: dict[str, Any] = {"name": "x", "column_map": {"url": "href"}, "bands": ["x"]}
    with pytest.warns(UserWarning, match=r"x: 3 broken items are left out: 'a\.tif'.*a{90}.*'too'"):
        made = rd.build_from_files(table, on_error="skip", **options)
    assert made.to_table(["id"]).to_pylist() == [{"id": "good"}]
    with pytest.raises(rd.SourceError, match=r"file 'http://\[::1/a\.tif' of 'x'"):
        rd.build_from_files(table, **options)
    with pytest.raises(rd.SourceError, match="all 3 of them broken"):
        rd.build_from_files(table.slice(1), on_error="skip", **options)


def test_a_good_file_among_them(folder: Path) -> None:
    found = read_headers([str(folder / "good.tif")])[str(folder / "good.tif")]
    assert isinstance(found, Header)
    assert found.pages[0].transform == (10.0, 0.0, WEST, 0.0, -10.0, NORTH)
