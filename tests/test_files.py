"""Files of a user's own become collections: names, tags, tables, bands; pixels equal rasterio's."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio
import rasterio.shutil
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine, from_origin
from servers import serving

import rasteret_dask as rd
from rasteret_dask.grid import transformer
from rasteret_dask.headers import rangefile, reader
from rasteret_dask.ingest.filenames import USUAL_FORMATS, period_of, without

X0, Y0, SIDE = 500_000.0, 5_200_000.0, 64


def tif(
    path: Path, pixels: NDArray[Any] | int = 1, *, west: float = X0, tags: Any = None, **profile: Any
) -> Path:
    """Write a GeoTIFF of 64 x 64 pixels of 10 m; an int means that many uint16 bands of numbers of their own."""
    if isinstance(pixels, int):
        pixels = (np.arange(pixels * SIDE * SIDE) % 5000 + 1).reshape(pixels, SIDE, SIDE).astype("uint16")
    names, colours = profile.pop("descriptions", None), profile.pop("colorinterp", None)
    options = {"crs": "EPSG:32633", "tiled": True, "blockxsize": 32, "blockysize": 32, **profile}
    options = {k: v for k, v in options.items() if v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=pixels.dtype,
        transform=from_origin(west, Y0, 10, 10), **options,
    ) as file:  # fmt: skip
        if colours:
            file.colorinterp = colours  # before pixels, else they go into a file beside it
        file.write(pixels)
        if names:
            file.descriptions = names
        if tags:
            file.update_tags(**tags)
    return path


def ids(collection: rd.Collection) -> list[str]:
    return sorted(collection.to_table(["id"]).column(0).to_pylist())


def times(collection: rd.Collection) -> dict[str, str]:
    rows = collection.to_table(["id", "datetime"]).to_pylist()
    return {row["id"]: f"{row['datetime']:%Y-%m-%d %H:%M}" for row in rows}


def pixels_of(collection: rd.Collection, bands: Sequence[str]) -> NDArray[Any]:
    """Return the only record's pixels, by the cube."""
    cube = collection.harmonize(list(bands), units="raw").cube()
    return np.asarray(cube.isel(time=0).to_numpy())


def test_the_user_s_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, day in enumerate(("20240305", "20240306")):
        tif(tmp_path / "ortho" / f"west_{day}.tif", 4, west=X0 + n * 640)
    (tmp_path / "ortho" / "notes.txt").write_text("no raster")
    monkeypatch.chdir(tmp_path)
    ortho = rd.build_from_files(
        "ortho/*.tif", name="ortho", bands=["red", "green", "blue", "nir"], filename_regex=r"_(?P<date>\d{8})"
    )
    assert ortho.bands == ("red", "green", "blue", "nir")
    assert times(ortho) == {"west_20240305": "2024-03-05 00:00", "west_20240306": "2024-03-06 00:00"}
    for files in ("ortho", Path("ortho"), sorted(Path("ortho").glob("*.tif")), "**/*.tif"):
        again = rd.build_from_files(
            files, name="ortho", bands=["red", "green", "blue", "nir"], filename_regex=r"_(?P<date>\d{8})"
        )
        assert again.to_table().equals(ortho.to_table())
    with rasterio.open("ortho/west_20240305.tif") as file:
        expected = file.read()
    one = ortho.where("id", "==", "west_20240305")
    np.testing.assert_array_equal(pixels_of(one, ortho.bands), expected)


def test_files_of_a_scene_are_bands(tmp_path: Path) -> None:
    for tile in ("T33TWM", "T33TXM"):
        for band in ("B02", "B03"):
            tif(tmp_path / f"{tile}_20240305_{band}.tif", np.full((1, SIDE, SIDE), int(band[1:]), "uint8"))
            tif(tmp_path / "deep" / f"{tile}_20240306" / f"{band}.tif")
    regex = r"(?P<tile>T\d\d\w{3})_(?P<date>\d{8}) [_/] (?P<band>B\d\d)"  # verbose, as TorchGeo's: blanks do not count
    made = rd.build_from_files(tmp_path, name="s2", filename_regex=regex)
    assert ids(made) == ["T33TWM_20240305", "T33TWM_20240306", "T33TXM_20240305", "T33TXM_20240306"]
    assert made.bands == ("B02", "B03")
    assert set(made.to_table(["tile"]).column(0).to_pylist()) == {"T33TWM", "T33TXM"}
    one = made.where("id", "==", "T33TXM_20240305")
    assert [int(v) for v in pixels_of(one, ["B03", "B02"])[:, 0, 0]] == [3, 2]
    kept = rd.build_from_files(tmp_path, name="s2", filename_regex=regex, bands=["B03"])
    assert kept.bands == ("B03",)
    with pytest.raises(rd.BandError, match=r"'B09'.*B02"):
        rd.build_from_files(tmp_path, name="s2", filename_regex=regex, bands=["B09"])
    known = rd.build_from_files(tmp_path, name="s2", filename_regex=regex, dataset="sentinel-2-l2a")
    assert dict(known.to_table(["assets"]).column(0)[0].as_py())["B02"]["common_name"] == "blue"


def test_names_of_files_that_lie_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tif(tmp_path / folder / "x_2020.tif")
    tif(tmp_path / "b" / "y_2021.tif")
    made = rd.build_from_files(tmp_path, name="years", filename_regex=r"_(?P<date>\d{4})", date_format="%Y")
    assert ids(made) == ["a/x_2020", "b/x_2020", "y_2021"]
    rows = {r["id"]: r for r in made.to_table(["id", "start_datetime", "end_datetime"]).to_pylist()}
    assert rows["y_2021"]["start_datetime"].year == 2021
    assert rows["y_2021"]["end_datetime"] == dt.datetime(2022, 1, 1, tzinfo=dt.UTC)


def test_times_by_every_way(tmp_path: Path) -> None:
    path = tif(
        tmp_path / "a_20240305T101112_20240306T000000.tif", tags={"TIFFTAG_DATETIME": "2019:07:08 09:10:11"}
    )
    tif(tmp_path / "b" / "a.tif", tags={"ACQUIRED": "2018-01-02T03:04:05Z"})
    by_tag = rd.build_from_files(path, name="x", date_tag="TIFFTAG_DATETIME")
    assert times(by_tag) == {path.stem: "2019-07-08 09:10"}
    assert list(times(rd.build_from_files(tmp_path / "b", name="x", date_tag="ACQUIRED")).values()) == [
        "2018-01-02 03:04"
    ]
    spans = rd.build_from_files(
        path, name="x", filename_regex=r"_(?P<start>\w{15})_(?P<stop>\w{15})", date_format="%Y%m%dT%H%M%S"
    )
    row = spans.to_table(["start_datetime", "end_datetime"]).to_pylist()[0]
    assert [f"{row[k]:%m-%d %H:%M}" for k in row] == ["03-05 10:11", "03-06 00:00"]
    table = pd.DataFrame({"href": [str(path)], "datetime": ["2020-05-06T07:08:09Z"]})
    assert times(rd.build_from_files(table, name="x", date_tag="TIFFTAG_DATETIME")) == {
        path.stem: "2020-05-06 07:08"
    }


@given(day=st.dates(dt.date(1970, 1, 1), dt.date(2100, 12, 31)))
def test_a_period_holds_its_days(day: dt.date) -> None:
    for form in ("%Y", "%Y%m", "%Y-%j", "%Y%m%d", "%d.%b.%Y"):
        start, end = period_of(day.strftime(form), form)
        assert start.date() <= day
        assert start.date() == day if end is None else day < end.date()


@given(st.lists(st.sampled_from("abc123_-"), min_size=1, max_size=8).map("".join), st.data())
def test_what_is_left_of_a_name_has_no_double_separator_that_it_had_not(
    name: str, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(name)))
    last = data.draw(st.integers(first, len(name)))
    left = without(name, first, last)
    assert left.replace("_", "").replace("-", "") == (name[:first] + name[last:]).replace("_", "").replace(
        "-", ""
    )
    assert len(left) <= len(name) - (last - first)


def tables_of(frame: pd.DataFrame, folder: Path) -> list[Any]:
    frame.to_csv(folder / "files.csv", index=False)
    frame.to_parquet(folder / "files.parquet")
    return [frame, pa.Table.from_pandas(frame), folder / "files.csv", str(folder / "files.parquet")]


def test_tables_of_files(tmp_path: Path) -> None:
    for n in range(2):
        tif(tmp_path / f"f{n}.tif", west=X0 + n * 640)
    frame = pd.DataFrame(
        {
            "href": [str(tmp_path / f"f{n}.tif") for n in range(2)],
            "datetime": ["2020-07-01", "2021-08-01"],
            "id": ["one", "two"],
            "season": ["summer", "autumn"],
            "label_year": [2018, 2019],
        }
    )
    made = [rd.build_from_files(files, name="own", bands=["x"]) for files in tables_of(frame, tmp_path)]
    for collection in made:
        assert times(collection) == {"one": "2020-07-01 00:00", "two": "2021-08-01 00:00"}
        assert ids(collection.where("season", "==", "summer").where("label_year", "<", 2019)) == ["one"]
        assert (
            collection.to_table().drop_columns(["season"]).equals(made[0].to_table().drop_columns(["season"]))
        )
    # a file's place is relative to the table that names it, and bands may be rows
    rows = pd.DataFrame(
        {"path": ["f0.tif", "f1.tif"], "band": ["red", "nir"], "id": "s", "when": [20200701] * 2}
    )
    rows.to_csv(tmp_path / "bands.csv", index=False)
    both = rd.build_from_files(
        tmp_path / "bands.csv", name="own", column_map={"path": "href", "when": "datetime"}
    )
    assert both.bands == ("red", "nir")
    assert times(both) == {"s": "2020-07-01 00:00"}


def test_a_data_frame_of_years_holds_years(tmp_path: Path) -> None:
    """Numbers in a column of times were taken for microseconds since 1970."""
    href = str(tif(tmp_path / "a.tif"))
    frame = pd.DataFrame({"href": [href, href], "id": ["a", "b"], "datetime": [2020, 2021]})
    made = rd.build_from_files(frame, name="x")
    assert [t[:10] for t in times(made).values()] == ["2020-01-01", "2021-01-01"]
    scenes = frame.assign(geometry=shapely.box(14, 46, 16, 48).wkt)
    scenes["assets"] = pd.Series([{"x": {"href": href}}] * 2)
    table = rd.build_from_table(scenes.drop(columns="href"), name="x")
    assert [t[:10] for t in times(table).values()] == ["2020-01-01", "2021-01-01"]


KINDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["uint8", "int16", "uint16", "float32"]),
        "count": st.integers(1, 4),
        "nodata": st.sampled_from([None, 0, 7]),
        "crs": st.sampled_from(["EPSG:32633", "EPSG:32733", "EPSG:3035"]),
        "tiled": st.booleans(),
        "interleave": st.sampled_from(["pixel", "band"]),
        "alpha": st.booleans(),
        "compress": st.sampled_from([None, "deflate"]),
    }
)


@pytest.mark.filterwarnings("ignore:The dataset's nodata attribute is shadowing")  # of the oracle
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, seed=st.integers(0, 99))
def test_pixels_and_records_equal_those_of_rasterio_and_stac(
    kind: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    count, alpha = kind["count"], kind["alpha"] and kind["count"] > 1
    pixels = np.random.default_rng(seed).integers(0, 200, (count, SIDE, SIDE)).astype(kind["dtype"])
    colours = [ColorInterp.undefined] * count
    if alpha:
        pixels[-1] = np.where(pixels[-1] < 50, 0, 255 if kind["dtype"] == "uint8" else 100)
        colours = [ColorInterp.gray, *[ColorInterp.undefined] * (count - 2), ColorInterp.alpha]
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    layout = tiles if kind["tiled"] else {"tiled": None, "blockxsize": None, "blockysize": 3}
    path = tif(
        tmp_path / "f_20240305.tif", pixels, nodata=kind["nodata"], crs=kind["crs"], colorinterp=colours,
        interleave=kind["interleave"], compress=kind["compress"], **layout,
    )  # fmt: skip
    made = rd.build_from_files(tmp_path, name="x", filename_regex=r"_(?P<date>\d{8})")
    measured = [f"band_{n + 1}" for n in range(count - alpha)] if count - alpha > 1 else ["band"]
    cube = made.harmonize(measured, units="raw").cube().isel(time=0).compute()
    with rasterio.open(path) as file:
        expected = file.read(list(range(1, len(measured) + 1)))
        valid = file.read_masks(list(range(1, len(measured) + 1))) > 0
        if alpha:  # of floats, and beside nodata, GDAL's masks do not look at it
            valid &= file.read(count) != 0
    np.testing.assert_array_equal(np.where(valid, cube.to_numpy(), 0), np.where(valid, expected, 0))
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": path.stem, "geometry": None,
        "properties": {"datetime": "2024-03-05T00:00:00Z"},
        "assets": {"band": {"href": str(path), "type": "image/tiff"}},
    }  # fmt: skip
    stac = rd.build_from_stac([item], name="x")
    columns = [c for c in stac.to_table().column_names if c not in ("assets", "properties")]
    assert made.to_table(columns).equals(stac.to_table(columns))
    own, theirs = (dict(c.to_table(["assets"]).column(0)[0].as_py()) for c in (made, stac))
    bare = [{b: {**a, "asset": None} for b, a in assets.items()} for assets in (own, theirs)]
    assert bare[0] == bare[1]


def test_the_alpha_channel_may_be_left_out_or_be_a_band(tmp_path: Path) -> None:
    colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = tif(tmp_path / "a.tif", 4, colorinterp=colours)
    three = rd.build_from_files(path, name="x", bands=["red", "green", "blue"], static=True)
    assert dict(three.to_table(["assets"]).column(0)[0].as_py())["red"]["alpha"] == 3
    four = rd.build_from_files(path, name="x", bands=["red", "green", "blue", "nir"], static=True)
    assert dict(four.to_table(["assets"]).column(0)[0].as_py())["red"]["alpha"] is None
    some = rd.build_from_files(path, name="x", bands={"nir": 3, "red": 0}, static=True)
    assert some.bands == ("nir", "red")
    colours.append(ColorInterp.undefined)  # near infrared behind the alpha channel
    behind = tif(tmp_path / "c.tif", 5, colorinterp=colours)
    names = ["red", "green", "blue", "nir"]
    made = rd.build_from_files(behind, name="x", bands=names, static=True)
    with rasterio.open(behind) as file:
        np.testing.assert_array_equal(pixels_of(made, names), file.read([1, 2, 3, 5]))
    described = tif(tmp_path / "b.tif", 2, descriptions=("ndvi", "evi"))
    assert rd.build_from_files(described, name="x", static=True).bands == ("ndvi", "evi")


def test_outlines_of_valid_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((1, SIDE, SIDE), "uint8")
    pixels[0, 16:48, :32] = 9
    path = tif(tmp_path / "a.tif", pixels, nodata=0)
    whole = rd.build_from_files(path, name="x", static=True)
    valid = rd.build_from_files(path, name="x", static=True, footprints="valid")
    areas = [shapely.from_wkb(c.to_table(["geometry"]).column(0)[0].as_py()) for c in (whole, valid)]
    assert areas[1].area / areas[0].area == pytest.approx(0.25, abs=1e-3)
    assert areas[0].buffer(1e-9).contains(areas[1])
    empty = tif(tmp_path / "b.tif", np.zeros((1, SIDE, SIDE), "uint8"), nodata=0)
    with pytest.raises(rd.SourceError, match=r"no valid pixel.*footprints='header'"):
        rd.build_from_files(empty, name="x", static=True, footprints="valid")


@pytest.mark.parametrize("nodata", [None, 0])
def test_outlines_of_files_with_an_alpha_channel(tmp_path: Path, nodata: int | None) -> None:
    """Beside a nodata value GDAL does not look at it, and rasterio warned."""
    pixels = np.zeros((4, SIDE, SIDE), "uint8")
    pixels[:, 16:48, :32] = 255
    colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = tif(tmp_path / "a.tif", pixels, nodata=nodata, colorinterp=colours)
    whole = rd.build_from_files(path, name="x", static=True)
    valid = rd.build_from_files(path, name="x", static=True, footprints="valid")
    areas = [shapely.from_wkb(c.to_table(["geometry"]).column(0)[0].as_py()).area for c in (whole, valid)]
    assert areas[1] / areas[0] == pytest.approx(0.25, abs=1e-3)


def test_bands_of_one_scene_may_spell_their_crs_by_either_of_two_codes(tmp_path: Path) -> None:
    """EPSG:3045 is EPSG:25833 with northings first, as GIS files never have them; other CRSs are refused."""
    for band, crs in (("a", "EPSG:25833"), ("b", "EPSG:3045"), ("c", "EPSG:32633")):
        tif(tmp_path / f"s_{band}.tif", crs=crs)
    regex = r"_(?P<band>[ab])"
    with pytest.warns(UserWarning, match="1 of 3 files"):
        made = rd.build_from_files(tmp_path, name="x", filename_regex=regex, static=True)
    assert made.where(readable=True).bands == ("a", "b")
    with pytest.raises(rd.SourceError, match="files in several CRS"):
        rd.build_from_files(tmp_path, name="x", filename_regex=r"_(?P<band>[abc])", static=True)


@pytest.mark.parametrize("way", ["north-up", "a quarter turn", "control points"])
def test_outlines_of_valid_pixels_lie_where_the_file_does(tmp_path: Path, way: str) -> None:
    """Of files whose rows and columns are no axes, too: their valid quarter has a quarter of the ground."""
    pixels = np.zeros((1, SIDE, SIDE), "uint8")
    pixels[0, :32, :32] = 9
    place = Affine(10, 0, X0, 0, -10, Y0) if way == "north-up" else Affine(0, 10, X0, 10, 0, Y0)
    path = tmp_path / "a.tif"
    profile = {} if way == "control points" else {"crs": "EPSG:32633", "transform": place}
    with (
        warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning),
        rasterio.open(path, "w", "GTiff", SIDE, SIDE, 1, dtype="uint8", nodata=0, **profile) as file,
    ):
        file.write(pixels)
        if way == "control points":
            corners = [(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]
            points = [GroundControlPoint(row, col, *(place @ (col, row))) for row, col in corners]
            file.gcps = (points, rasterio.CRS.from_epsg(32633))
    made = rd.build_from_files(path, name="x", static=True, footprints="valid")
    outline = shapely.from_wkb(made.to_table(["geometry"]).column(0)[0].as_py())
    x, y = place @ (np.array([0, 32, 32, 0]), np.array([0, 0, 32, 32]))
    expected = shapely.Polygon(np.column_stack(transformer(32633, 4326).transform(x, y)))
    assert outline.symmetric_difference(expected).area < 1e-3 * expected.area


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(20):
        tif(
            tmp_path / f"f{n}_20240101.tif",
            4,
            west=X0 + n * 640,
            tags={"TIFFTAG_DATETIME": "2020:01:01 00:00:00"},
        )
    opened: list[str] = []

    class Counted(rangefile.RangeFile):
        def __init__(self, href: str, first_bytes: int = rangefile.FIRST) -> None:
            opened.append(href)
            super().__init__(href, first_bytes)

    monkeypatch.setattr(reader, "RangeFile", Counted)
    rd.build_from_files(tmp_path, name="x", date_tag="TIFFTAG_DATETIME")
    assert len(opened) == 20 == len(set(opened))


def test_untiled_files_work_and_are_told(tmp_path: Path) -> None:
    wide = np.arange(8 * 4096, dtype="uint16").reshape(1, 8, 4096)
    path = tif(tmp_path / "w.tif", np.repeat(wide, 64, axis=1), tiled=None, blockxsize=None, blockysize=1)
    with pytest.warns(rd.UntiledFilesWarning, match=r"1 of 1 files.*16 times.*rio cogeo create w.tif"):
        made = rd.build_from_files(path, name="wide", static=True)
    assert len(made) == 1
    tiled = tmp_path / "t.tif"
    with rasterio.open(path) as file:
        rasterio.shutil.copy(file, tiled, driver="COG", blocksize=128)  # what rio cogeo makes
    rd.build_from_files(tiled, name="wide", static=True)  # and nothing is told: warnings are errors


GUESSES: dict[str, Any] = {
    "load a folder": (lambda d: rd.load(d / "f"), r"rd\.build_from_files\('.*/f', name='f', static=True\)"),
    "load a file": (lambda d: rd.load(d / "f" / "a_20240305.tif"), r"a raster.*build_from_files"),
    "a folder as table": (lambda d: rd.as_collection(str(d / "f")), r"a folder of rasters.*build_from_files"),
    "a folder as scenes": (lambda d: rd.build_from_table(d / "f", name="x"), r"build_from_files"),
    "a CSV as scenes": (lambda d: rd.build_from_table(str(d / "x.csv"), name="x"), r"rd\.build_from_files\('.*csv'"),
    "a CSV as records": (lambda d: rd.load(d / "x.csv"), r"rd\.build_from_files\('.*csv'"),
    "no such pattern": (
        lambda d: rd.build_from_files(str(d / "no/such/*.tif"), name="x"), r"nothing; .* has f, g, h and 2 more"
    ),
    "no such file": (lambda d: rd.build_from_files(d / "no.tif", name="x"), r"file .*no\.tif: found nothing"),
    "an empty list": (lambda d: rd.build_from_files([], name="x"), "an empty list"),
    "a regex without match": (
        lambda d: rd.build_from_files(d / "f", name="x", filename_regex=r"(?P<date>\d{9})"),
        r"no match \(a_20240305\.tif.*filename_regex=r'\(\?P<date>",
    ),
    "a regex without groups": (lambda d: rd.build_from_files(d / "f", name="x", filename_regex=r"\d"), r"\?P<date>"),
    "no time": (lambda d: rd.build_from_files(d / "f", name="x"), r"no time.*filename_regex=r'.*static=True"),
    "two files of one band": (
        lambda d: rd.build_from_files(d / "g", name="x", static=True, filename_regex=r"(?P<id>s)_\d(?P<band>b)"),
        r"scene 's', band 'b': found two files: s_1b\.tif and s_2b\.tif",
    ),
    "several CRS in a scene": (
        lambda d: rd.build_from_files(d / "h", name="x", static=True, filename_regex=r"(?P<band>b\d)"),
        r"EPSG:32633 \(s_b1\.tif\), EPSG:32634 \(s_b2\.tif\)",
    ),
    "names for other bands": (
        lambda d: rd.build_from_files(d / "f", name="x", static=True, bands=["red", "nir"]),
        r"1 band; expected 2 of them.*\(\?P<band>",
    ),
    "no CRS": (
        lambda d: rd.build_from_files(d / "nowhere.tif", name="x", static=True), r"no CRS in it.*crs='EPSG:32633'"
    ),
    "no column href": (
        lambda d: rd.build_from_files(pd.DataFrame({"url": ["a"]}), name="x"), r"column_map=\{'url': 'href'\}"
    ),
    "a web folder": (lambda d: rd.build_from_files("https://example.com/f/", name="x"), "list of its URLs"),
    "another date": (
        lambda d: rd.build_from_files(d / "f", name="x", filename_regex=r"(?P<date>\d{8})", date_format="%d%m%Y"),
        "Give date_format='%Y%m%d'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", USUAL_FORMATS[1:])
def test_the_format_that_an_error_proposes_reads_the_dates(tmp_path: Path, form: str) -> None:
    days = [dt.datetime(2023, 5, 17, 10, 30), dt.datetime(2024, 12, 3, 23, 5)]
    for day in days:
        tif(tmp_path / f"a_{day.strftime(form)}_x.tif")
    options: dict[str, Any] = {"name": "x", "filename_regex": "a_(?P<date>.+)_x"}
    with pytest.raises(rd.RasteretDaskError, match="Give date_format='") as told:
        rd.build_from_files(tmp_path, **options)
    proposal = str(told.value).split("date_format='")[-1].removesuffix("'.")
    made = rd.build_from_files(tmp_path, date_format=proposal, **options)
    expected = [dt.datetime.strptime(day.strftime(form), form).replace(tzinfo=dt.UTC) for day in days]
    starts = made.to_table(["datetime", "start_datetime"]).to_pylist()
    assert sorted(row["start_datetime"] or row["datetime"] for row in starts) == expected


@pytest.fixture(scope="module")
def guessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guesses")
    tif(folder / "f" / "a_20240305.tif")
    tif(folder / "nowhere.tif", crs=None)
    for n in (1, 2):
        tif(folder / "g" / f"s_{n}b.tif")
        tif(folder / "h" / f"s_b{n}.tif", crs=f"EPSG:{32632 + n}")
    pd.DataFrame({"href": ["f/a_20240305.tif"], "datetime": ["2024-03-05"]}).to_csv(
        folder / "x.csv", index=False
    )
    return folder


@pytest.mark.parametrize("guess", GUESSES)
def test_who_guesses_is_told(guessed: Path, guess: str) -> None:
    call, message = GUESSES[guess]
    with pytest.raises(rd.RasteretDaskError, match=message):
        call(guessed)


def test_the_remedies_hold(guessed: Path) -> None:
    """Each line that an error names is run as it stands."""
    tried = []
    for guess in ("load a folder", "a folder as table", "a CSV as scenes", "load a file"):
        with pytest.raises(rd.SourceError) as caught:
            GUESSES[guess][0](guessed)
        line = caught.value.remedy.partition(" takes it")[0]
        tried.append(eval(line, {"rd": rd}))
    assert [len(made) for made in tried] == [1, 1, 1, 1]
    assert len(rd.build_from_files(guessed / "f", name="x", filename_regex=r"(?P<date>\d{8})")) == 1
    with pytest.warns(UserWarning, match="it lies in EPSG:32633, as crs= says"):
        placed = rd.build_from_files(guessed / "nowhere.tif", name="x", static=True, crs="EPSG:32633")
    assert placed.to_table(["proj:epsg"]).column(0).to_pylist() == [32633]
    by_date = rd.build_from_files(
        guessed / "g", name="x", static=True, filename_regex=r"(?P<id>s_\d)(?P<band>b)"
    )
    assert ids(by_date) == ["s_1", "s_2"]


def test_broken_files_are_left_out_and_named(tmp_path: Path) -> None:
    tif(tmp_path / "good_20240305.tif")
    (tmp_path / "bad_20240305.tif").write_bytes(b"II*\0 no more")
    (tmp_path / "other.tif").write_bytes(b"GIF89a")
    options: dict[str, Any] = {"name": "x", "filename_regex": r"(?P<date>\d{8})"}
    with (
        pytest.warns(UserWarning, match="1 of 3 files do not match"),
        pytest.raises(rd.SourceError, match="bad_2024"),
    ):
        rd.build_from_files(tmp_path, **options)
    with pytest.warns(UserWarning, match="left out") as told:
        made = rd.build_from_files(tmp_path, on_error="skip", **options)
    assert ids(made) == ["good_20240305"]
    assert any("1 broken items are left out: 'bad_20240305.tif'" in str(w.message) for w in told)


def test_a_table_from_afar_names_no_file_of_this_machine(tmp_path: Path) -> None:
    path = tif(tmp_path / "a.tif")
    pd.DataFrame({"href": [str(path)], "datetime": ["2024-03-05"]}).to_csv(tmp_path / "x.csv", index=False)
    pd.DataFrame({"href": ["a.tif"], "datetime": ["2024-03-05"]}).to_csv(tmp_path / "y.csv", index=False)
    with serving(tmp_path) as server:
        with pytest.raises(rd.TrustError, match="local path"):
            rd.build_from_files(server.url("x.csv"), name="x")
        made = rd.build_from_files(server.url("y.csv"), name="x")
        np.testing.assert_array_equal(pixels_of(made, ["band"]), rasterio.open(path).read())


def test_the_real_folders(data: Path) -> None:
    """Every file of the edge cases is read equal to rasterio, or left out by its reason."""
    folder = data / "edge_cases"
    with pytest.warns(UserWarning, match="left out") as told:
        made = rd.build_from_files(folder, name="edges", static=True, on_error="skip")
    names = set(ids(made))
    listed = {p.stem for p in folder.iterdir() if p.suffix in (".tif", ".jp2")}
    broken = [str(w.message) for w in told if "left out" in str(w.message)]
    assert len(names) >= 15
    assert broken
    assert int(broken[0].split()[1]) + len(names) >= len(listed)
    read = 0
    for row in made.to_table(["id", "assets"]).to_pylist():
        broken_pixels = "truncated" in row["id"] or "corrupt" in row["id"]
        for band, asset in row["assets"]:
            if asset["error"] is not None or asset["role"] != "data" or broken_pixels:
                continue
            with rasterio.open(asset["href"]) as file:
                expected = file.read(asset["band_index"] + 1)
                valid = file.read_masks(asset["band_index"] + 1) > 0
                turned = bool(file.gcps[0]) or file.transform.b != 0 or file.transform.d != 0
            if turned:  # warped: tests of turned files look at their pixels
                continue
            cube = (
                made.where("id", "==", row["id"]).harmonize([band], units="raw").cube().isel(time=0, band=0)
            )
            found = cube.to_numpy()
            assert found.shape == expected.shape, row["id"]
            np.testing.assert_array_equal(np.where(valid, found, 0), np.where(valid, expected, 0), row["id"])
            read += 1
    assert read >= 15


def test_a_bucket_s_prefix_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{key}", value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        for n in range(3):
            path = tif(tmp_path / f"p_2024030{n + 1}.tif", west=X0 + n * 640)
            client.upload_file(str(path), "photos", f"2024/north/{path.name}")
        client.put_object(Bucket="photos", Key="2024/read me.txt", Body=b"x")
        options: dict[str, Any] = {"name": "x", "filename_regex": r"_(?P<date>\d{8})"}
        for files in (
            "s3://photos/2024",
            "s3://photos/2024/",
            "s3://photos/2024/*/*.tif",
            "s3://photos/**/p_*.tif",
        ):
            made = rd.build_from_files(files, **options)
            assert ids(made) == ["p_20240301", "p_20240302", "p_20240303"], files
        one = made.where("id", "==", "p_20240302")
        with rasterio.open(tmp_path / "p_20240302.tif") as file:
            np.testing.assert_array_equal(pixels_of(one, ["band"]), file.read())
        for files in ("s3://photos/2025", "s3://photos/2024/*.tif"):
            with pytest.raises(rd.SourceError, match="none among"):
                rd.build_from_files(files, **options)
    finally:
        server.stop()
