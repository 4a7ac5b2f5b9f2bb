"""Nodata in the pixel's own dtype: as it is spelled, stored and met on every path to pixels."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds
from test_alpha import HERE, X0, Y0, chips_of, item, write

import rasteret_dask as rd
from rasteret_dask.errors import ReadError, UnreadableAssetsError
from rasteret_dask.headers.nodata import number_of, spelled, text_of
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.table.records import Records
from rasteret_dask.table.schema import ASSET_TYPE, conform

SIDE = 128
FLT_MAX = np.finfo(np.float32).max
DTYPES = (
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)
BOX = (X0, Y0 - 1280, X0 + 1280, Y0)


@settings(max_examples=200)
@given(st.data())
def test_every_number_of_a_dtype_comes_back(data: st.DataObject) -> None:
    """What a pixel can hold is spelled so that it is read as itself, to the last bit."""
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    if dtype.kind == "f":
        value = data.draw(st.floats(width=dtype.itemsize * 8))  # type: ignore[arg-type]
    else:
        limits = np.iinfo(dtype.name)
        value = data.draw(st.integers(int(limits.min), int(limits.max)))
    number = number_of(text_of(value), dtype.name)
    assert number is not None
    again = number_of(spelled(number), dtype.name)
    assert np.array_equal(dtype.type(again), dtype.type(value), equal_nan=True)
    assert isinstance(number, float if dtype.kind == "f" else int)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("-9999", "uint16"), ("256", "uint8"), ("0.5", "int16"), ("nan", "int32"), ("inf", "uint8"), ("-1", "uint64"),
     ("1e40", "float32"), ("70000", "float16"), ("9223372036854775808", "int64"), ("", "uint8"), ("none", "uint8"),
     (None, "float32")],
)  # fmt: skip
def test_no_pixel_is_what_its_dtype_cannot_hold(text: str | None, dtype: str) -> None:
    assert number_of(text, dtype) is None


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan", "-1.#IND", "1.#QNAN", " nan\0"])
def test_nan_has_many_spellings(text: str) -> None:
    number = number_of(text, "float32")
    assert isinstance(number, float)
    assert isnan(number)


def header(path: Path) -> Header:
    found = read_headers([str(path)])[str(path)]
    assert isinstance(found, Header), found
    return found


def retagged(path: Path, text: str) -> Path:
    """Spell a file's nodata otherwise: GDAL's own spelling fills as much of the tag as there is."""
    with rasterio.open(path) as file:
        before = b"-3.4028234663852886e+38"
        assert file.nodata == float(before)
    whole = path.read_bytes()
    assert whole.count(before) == 1
    path.write_bytes(whole.replace(before, text.encode().ljust(len(before), b"\0")))
    return path


def heights(seed: int = 0) -> Any:
    """Elevations with a hole of FLT_MAX, some specks of it, and NaN."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(100, 900, (SIDE, SIDE)).astype("float32")
    pixels[: SIDE // 2, : SIDE // 3] = -FLT_MAX
    pixels[rng.random(pixels.shape) < 0.05] = -FLT_MAX
    pixels[rng.random(pixels.shape) < 0.01] = np.nan
    return pixels


SPELLINGS = (
    "-3.4028234663852886e+38", "-3.40282346638529e+38", "-3.4028235e+38", "-3.40282347e+38", "-3.402823e+38",
    "-3.4e+38", "-3.403e+38", "-340282346638528859e21", "-3.4028234663852886E38",
)  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
@pytest.mark.parametrize("by", ["file", "item"])
@pytest.mark.parametrize("strips", [False, True])
def test_flt_max_in_any_spelling(tmp_path: Path, text: str, by: str, strips: bool) -> None:
    """As the tag, or as the item where the file has none; by ranges, and (strips) through GDAL."""
    pixels = heights()
    form: dict[str, Any] = {"tiled": False, "blockxsize": None, "blockysize": None} if strips else {}
    exact = write(tmp_path / "exact.tif", np.where(np.isnan(pixels), -FLT_MAX, pixels)[np.newaxis],
                  nodata=float(-FLT_MAX), **form)  # fmt: skip
    path = tmp_path / "a.tif"
    write(path, pixels[np.newaxis], nodata=float(-FLT_MAX) if by == "file" else None, **form)
    asset: dict[str, Any] = {}
    if by == "file":
        retagged(path, text)
    else:
        asset["raster:bands"] = [{"nodata": text}]
    made = rd.build_from_stac([item(path, asset=asset)], name="dem")
    seen = ~np.isnan(pixels) & (pixels > -1e38)
    plain = made.cube(bounds=BOX).isel(time=0, band=0).values
    assert np.array_equal(plain, np.where(seen, pixels, np.nan), equal_nan=True)
    for size, epsg, kernel in ((40, 32633, Resampling.average), (10, 32632, Resampling.bilinear)):
        xmin, _, _, ymax = BOX if epsg == 32633 else transform_bounds(32633, epsg, *BOX)
        grid = Affine(size, 0, xmin // size * size, 0, -size, ymax // size * size)
        n = 1280 // size
        box = (grid.c, grid.f - n * size, grid.c + n * size, grid.f)
        even = made.harmonize(units="raw", resolution=size, resampling=kernel.name)
        cube = even.cube(bounds=box, crs=epsg).isel(time=0, band=0).values
        with rasterio.open(exact) as file, WarpedVRT(
            file, crs=f"EPSG:{epsg}", transform=grid, width=n, height=n, resampling=kernel, tolerance=1e-6,
            XSCALE=10 / size, YSCALE=10 / size,
        ) as warped:  # fmt: skip
            expected = warped.read(1, masked=True)
        assert np.array_equal(np.isnan(cube), expected.mask)
        assert np.array_equal(cube[~expected.mask], expected.compressed())


def test_every_path_leaves_nodata_out(tmp_path: Path) -> None:
    """Chips, windows and points say of each pixel what the cube says."""
    path = retagged(write(tmp_path / "a.tif", heights()[np.newaxis], nodata=float(-FLT_MAX)), "-3.402823e+38")
    made = rd.build_from_stac([item(path)], name="dem")
    cube = made.cube(bounds=BOX).isel(time=0, band=0)
    chips = chips_of(made)
    for values, (xmin, ymin, xmax, ymax) in zip(
        chips["pixels"].values[:, 0, 0], chips["bounds"].values, strict=True
    ):
        same = cube.sel(x=slice(xmin, xmax), y=slice(ymax, ymin)).values
        assert np.array_equal(values, same, equal_nan=True)
    at = np.random.default_rng(3).integers(0, SIDE, (40, 2))
    xs, ys = transform(32633, 4326, *(HERE @ (at.T[::-1] + 0.5)))
    points = made.sample_points([shapely.Point(x, y) for x, y in zip(xs, ys, strict=True)])
    expected = [None if np.isnan(v) else v for v in cube.values[at[:, 0], at[:, 1]].tolist()]
    assert points.column("value").to_pylist() == expected


def tagged(path: Path, pixels: Any, text: str) -> Path:
    """Write a file whose nodata tag has any text."""
    with tifffile.TiffWriter(path) as to:
        keys = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633)
        extra = [
            (33550, "d", 3, (10.0, 10.0, 0.0)), (33922, "d", 6, (0.0, 0.0, 0.0, X0, Y0, 0.0)),
            (34735, "H", 12, keys), (42113, "s", 0, text),
        ]  # fmt: skip
        to.write(pixels, tile=(32, 32), extratags=[(*tag, True) for tag in extra], metadata=None)
    return path


def test_half_floats(tmp_path: Path) -> None:
    """-9999 is -10000 to a half float; GDAL gives such files as float32."""
    pixels = np.random.default_rng(0).uniform(0, 9, (SIDE, SIDE)).astype("float16")
    pixels[:20] = np.float16(-9999)
    path = tagged(tmp_path / "half.tif", pixels, "-9999")
    with rasterio.open(path) as file:
        assert file.dtypes == ("float32",)
    assert header(path).nodata == -10000
    cube = rd.build_from_stac([item(path)], name="x").cube(bounds=BOX).isel(time=0, band=0).values
    assert np.isnan(cube[:20]).all()
    assert np.array_equal(cube[20:], pixels[20:].astype("float32"))


@pytest.mark.parametrize(
    ("dtype", "number"), [("int64", -(2**63) + 1), ("uint64", 2**64 - 1), ("int64", 2**53 + 1)]
)
def test_large_integers(tmp_path: Path, dtype: str, number: int) -> None:
    """Beyond 2**53 a float takes neighbours for nodata; in tables the number is text."""
    pixels = np.full((SIDE, SIDE), number - 1, dtype)
    pixels[:20] = number
    path = tagged(tmp_path / "a.tif", pixels, str(number))
    made = rd.build_from_stac([item(path)], name="x")
    assert Records(made.to_table()).asset(0, "image").nodata == number
    assert dict(made.to_table().column("assets")[0].as_py())["image"]["nodata"] == str(number)
    chips = chips_of(made)
    with rasterio.open(path) as file:
        due = file.read(1) != number
    for valid, (xmin, _, _, ymax) in zip(chips["valid"].values[:, 0], chips["bounds"].values, strict=True):
        row, col = int(Y0 - ymax) // 10, int(xmin - X0) // 10
        assert np.array_equal(valid, due[row : row + 32, col : col + 32])
    cube = made.cube(bounds=BOX)
    assert np.array_equal(cube.isel(time=0, band=0).values, pixels)
    assert np.array_equal(cube["valid"].isel(time=0).values, due)


def test_bands_of_one_file_have_nodata_each(tmp_path: Path) -> None:
    """A TIFF's tag holds one for all; items give each band its own."""
    pixels = np.random.default_rng(0).integers(1, 50, (3, SIDE, SIDE)).astype("int16")
    path = write(tmp_path / "a.tif", pixels, nodata=3)
    bands: dict[str, Any] = {"eo:bands": [{"name": n} for n in "pqr"],
                             "raster:bands": [{"nodata": 7}, {"nodata": 9}, {}]}  # fmt: skip
    with pytest.warns(UserWarning, match="nodata is 3 in the file, 7 in the item; 7 holds"):
        made = rd.build_from_stac([item(path, asset=bands)], name="x")
    assert [Records(made.to_table()).asset(0, b).nodata for b in "pqr"] == [7, 9, 3]
    for band, number, own in zip("pqr", (7, 9, 3), pixels, strict=True):
        coarse = made.harmonize(bands=[band], units="raw", resolution=40, resampling="average")
        cube = coarse.cube(bounds=BOX).isel(time=0, band=0).values
        cells = np.where(own == number, np.nan, own.astype("float64")).reshape(32, 4, 32, 4)
        assert (np.abs(cube - np.nanmean(cells, axis=(1, 3))) < 0.5 + 1e-6).all()  # halves go either way


def test_records_of_one_collection_have_nodata_each(tmp_path: Path) -> None:
    """What is nodata in the upper image is filled from the lower, where another number is."""
    above, below = np.full((2, 1, SIDE, SIDE), 5, "int16")
    above[0, :60], below[0, 30:] = -1, -2
    above[0, 100:] = -2  # a number like any other there
    items = [item(write(tmp_path / f"{n}.tif", p, nodata=nodata), n)
             for n, p, nodata in (("a", above, -1), ("b", below, -2))]  # fmt: skip
    made = rd.build_from_stac(items, name="x")
    chips = chips_of(made, 64)
    valid, pixels = chips["valid"].values[:, 0], chips["pixels"].values[:, 0, 0]
    for seen, values, (_, _, _, ymax) in zip(valid, pixels, chips["bounds"].values, strict=True):
        rows = int(Y0 - ymax) // 10 + np.arange(64)[:, np.newaxis] + np.zeros(64, int)
        assert np.array_equal(seen, (rows < 30) | (rows >= 60))
        assert np.array_equal(values[seen], np.where(rows >= 100, -2, 5)[seen])


def test_what_no_pixel_can_be_is_said(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (1, SIDE, SIDE)).astype("uint16")
    path = write(tmp_path / "a.tif", pixels)
    asset = {"raster:bands": [{"nodata": -9999}]}
    words = r"band 'image': nodata -9999 of the item is no number of uint16: no pixel is it \(1 records\)"
    with pytest.warns(UserWarning, match=words):
        made = rd.build_from_stac([item(path, asset=asset)], name="x")
    assert chips_of(made)["valid"].values.all()
    note = dict(made.to_table().column("assets")[0].as_py())["image"]["note"]
    assert "no number of uint16" in note


def test_scale_tags_that_contradict_the_item_are_told(tmp_path: Path) -> None:
    """MYD13A1's files say 10000, a divisor, where the item says 0.0001."""
    path = write(tmp_path / "a.tif", np.full((1, SIDE, SIDE), 5000, "int16"), nodata=-28672)
    with rasterio.open(path, "r+") as to:
        to.scales, to.offsets = (10000.0,), (3.0,)
    with pytest.warns(UserWarning, match=r"the file's scale tag is 10000; 0.0001 holds \(item\)"):
        made = rd.build_from_stac([item(path, asset={"raster:bands": [{"scale": 0.0001}]})], name="x")
    asset = Records(made.to_table()).asset(0, "image")
    assert (asset.scale, asset.offset, asset.nodata) == (0.0001, 0.0, -28672)
    quiet = rd.build_from_stac(
        [item(path, asset={"raster:bands": [{"scale": 10000, "offset": 3}]})], name="x"
    )
    assert Records(quiet.to_table()).asset(0, "image").scale == 10000


def test_older_tables_have_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.ones((1, SIDE, SIDE), "float32"), nodata=float(-FLT_MAX))
    table = rd.build_from_stac([item(path)], name="x").to_table()
    row = table.to_pylist()
    for _, asset in row[0]["assets"]:
        asset["nodata"] = float(asset["nodata"])
        for name in ("alpha", "note"):
            del asset[name]
    fields = [f for f in ASSET_TYPE if f.name not in ("alpha", "note")]
    older = pa.struct([pa.field("nodata", pa.float64()) if f.name == "nodata" else f for f in fields])
    kinds = [
        pa.field("assets", pa.map_(pa.string(), older)) if f.name == "assets" else f for f in table.schema
    ]
    again = conform(pa.Table.from_pylist(row, schema=pa.schema(kinds)), "x")
    assert Records(again).asset(0, "image").nodata == -FLT_MAX


def placed(path: Path, shift: float = 0.0, epsg: int = 32633, size: float = 10.0) -> dict[str, Any]:
    made = item(path, asset={"raster:bands": [{"data_type": "float32"}]})
    made["properties"]["proj:epsg"] = epsg
    made["bbox"] = list(transform_bounds(epsg, 4326, *BOX))
    made["geometry"] = shapely.geometry.mapping(shapely.box(*made["bbox"]))
    made["assets"]["image"] |= {
        "proj:shape": [SIDE, SIDE], "proj:transform": [size, 0, X0 + shift, 0, -size, Y0 - shift],
    }  # fmt: skip
    return made


@pytest.mark.parametrize("where", [{"shift": 30.0}, {"size": 1.0}, {"epsg": 32632}])
def test_without_headers_a_file_must_lie_where_its_item_says(tmp_path: Path, where: dict[str, Any]) -> None:
    path = write(tmp_path / "a.tif", heights()[np.newaxis], nodata=float(-FLT_MAX))
    made = rd.build_from_stac([placed(path, **where)], name="x", headers=False)
    epsg = where.get("epsg", 32633)
    with pytest.raises(
        ReadError, match=r"asset 'image' of record 'a'.*as the item says.*headers=True"
    ) as raised:
        made.cube(bounds=BOX, crs=epsg).compute()
    said = str(raised.value)
    assert "north-west corner (500000, 5540000), pixels of 10 x 10 in EPSG:32633 in the file" in said
    assert f"in EPSG:{epsg}, as the item says" in said
    remedied = rd.build_from_stac([{**placed(path), "id": "b"}], name="x", headers=True)
    assert remedied.cube(bounds=BOX).compute().shape[2:] == (SIDE, SIDE)


def test_without_headers_the_file_s_own_nodata_and_masks_count(tmp_path: Path) -> None:
    """Nobody has asked what the file holds before its pixels are read."""
    pixels = heights()
    path = write(tmp_path / "a.tif", pixels[np.newaxis], nodata=float(-FLT_MAX))
    item_says = placed(path, shift=0.0004)  # rounded, as items do
    made = rd.build_from_stac([item_says], name="x", headers=False)
    cube = made.cube(bounds=BOX).isel(time=0, band=0).values
    seen = ~np.isnan(pixels) & (pixels > -1e38)
    assert np.array_equal(cube, np.where(seen, pixels, np.nan), equal_nan=True)


def test_complex_integers_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", "GTiff", SIDE, SIDE, 1, "EPSG:32633", HERE, dtype="complex_int16", tiled=True
    ) as to:
        to.write(np.ones((1, SIDE, SIDE), "complex64"))
    made = rd.build_from_stac([item(path)], name="x")
    with pytest.raises(UnreadableAssetsError, match=r"complex_int16.*gdal_translate -ot CFloat32"):
        made.cube(bounds=BOX)
    with rasterio.open(path) as file:
        profile = {**file.profile, "dtype": "complex64"}
        with rasterio.open(tmp_path / "b.tif", "w", **profile) as to:
            to.write(file.read(out_dtype="complex64"))
    cube = rd.build_from_stac([item(tmp_path / "b.tif")], name="x").cube(bounds=BOX)
    assert (cube.values == 1).all()
