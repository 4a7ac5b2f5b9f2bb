"""Rasters of any CRS, with an EPSG code or without, read as GDAL warps them, on every way out."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyproj
import pytest
import rasterio
import xarray as xr
from affine import Affine
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from test_crs import HLS, MODIS, MORE_SENSORS

import rasteret_dask as rd
from rasteret_dask.crs import crs_of, number, wkt2
from rasteret_dask.errors import GridError, UnreadableAssetsError
from rasteret_dask.grid import transformer
from rasteret_dask.table.records import RECORD_SCHEMA, Records

LAEA = "+proj=laea +lat_0=48 +lon_0=11 +R=6371007.181 +units=m +type=crs"
LON, LAT = 11.35, 47.92
"""Where all rasters of this module lie."""

CRSS = {
    "EPSG:32632": ("EPSG:32632", 30.0),
    "hls": (HLS.replace("-69", "9").replace("Zone 19", "Zone 32"), 30.0),
    "modis": (MODIS, 120.0),
    "laea": (LAEA, 30.0),
    "albers": ("ESRI:102013", 30.0),
    "EPSG:3035": ("EPSG:3035", 30.0),
    "EPSG:4326": ("EPSG:4326", 0.0003),
    "compound": ("EPSG:25832+7837", 30.0),
}
SIDE = 160


def _write(path: Path, crs: str | None, pixel: float, projected: str | None = None) -> Path:
    """Write a raster of smooth numbers round the place, in any CRS."""
    to = pyproj.Transformer.from_crs(4326, projected or crs, always_xy=True)
    x, y = to.transform(LON, LAT)
    transform = Affine(pixel, 0, x - SIDE / 2 * pixel, 0, -pixel, y + SIDE / 2 * pixel)
    rows, cols = np.mgrid[:SIDE, :SIDE]
    values = (1000 + 3 * rows + 5 * cols + 40 * np.sin(rows / 9) * np.cos(cols / 7)).astype("float32")
    profile = {
        "driver": "GTiff",
        "width": SIDE,
        "height": SIDE,
        "count": 1,
        "dtype": "float32",
        "nodata": -9999.0,
    }
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile, **tiles) as file:
        file.write(values, 1)
    return path


def _item(path: Path, **fields: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": path.stem, "collection": "any", "links": [],
        "geometry": None, "properties": {"datetime": "2024-06-01T10:00:00Z", **fields},
        "assets": {"height": {"href": str(path), "type": "image/tiff; application=geotiff", "roles": ["data"]}},
    }  # fmt: skip


def _collection(path: Path, name: str = "any", **fields: Any) -> rd.Collection:
    return rd.build_from_stac([_item(path, **fields)], name=name, kinds={"height": "continuous"})


def _warped(path: Path, crs: Any, bounds: Any, shape: tuple[int, ...]) -> Any:
    """Return what GDAL makes of a file on a grid, NaN where nothing is."""
    west, _, _, north = bounds
    xres, yres = (bounds[2] - bounds[0]) / shape[1], (bounds[3] - bounds[1]) / shape[0]
    with rasterio.open(path) as file:
        to = pyproj.Transformer.from_crs(file.crs, crs, always_xy=True)
        t = file.transform
        a, c, f = t.a, t.c + SIDE / 2 * t.a, t.f + SIDE / 2 * t.e
        x, y = to.transform(np.array([c, c + a, c]), np.array([f, f, f - a]))
        scale = np.hypot(x[1] - x[0], y[1] - y[0]) / xres, np.hypot(x[2] - x[0], y[2] - y[0]) / yres
    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file,
            crs=crs,
            XSCALE=scale[0],
            YSCALE=scale[1],
            transform=Affine(xres, 0, west, 0, -yres, north),
            width=shape[1],
            height=shape[0],
            resampling=Resampling.bilinear,
            tolerance=1e-6,
            src_nodata=-9999.0,
            nodata=-9999.0,
        ) as warped,
    ):
        values = warped.read(1)
    return np.where(values == -9999, np.nan, values)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A raster of each CRS, over the same ground."""
    folder = tmp_path_factory.mktemp("any-crs")
    return {name: _write(folder / f"{name.replace(':', '-')}.tif", *crs) for name, crs in CRSS.items()}


@pytest.mark.parametrize("name", CRSS)
def test_a_cube_on_its_own_grid_is_the_file(files: dict[str, Path], name: str) -> None:
    cube = _collection(files[name]).cube().isel(time=0, band=0)

    with rasterio.open(files[name]) as file:
        np.testing.assert_array_equal(cube.values, file.read(1))
        flat = crs_of(number(file.crs))
    assert pyproj.CRS(cube.rio.crs).equals(flat, ignore_axis_order=True)


@pytest.mark.parametrize(("name", "crs"), [
    ("modis", 32632), ("EPSG:32632", MODIS), ("laea", "ESRI:102013"), ("EPSG:4326", LAEA), ("albers", "EPSG:4326"),
    ("modis", "EPSG:4326"), ("compound", "EPSG:3035"), ("hls", LAEA),
])  # fmt: skip
def test_a_cube_in_any_crs_is_gdals(files: dict[str, Path], name: str, crs: Any) -> None:
    cube = _collection(files[name]).harmonize(resampling="bilinear").cube(crs=crs).isel(time=0, band=0)

    assert 100 < cube.sizes["x"] < 400
    assert 100 < cube.sizes["y"] < 400
    assert pyproj.CRS(cube.rio.crs).equals(crs_of(number(crs)), ignore_axis_order=True)
    expected = _warped(files[name], crs_of(number(crs)).to_wkt(), cube.rio.bounds(), cube.shape)
    np.testing.assert_allclose(cube.values, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["hls", "modis", "albers", "EPSG:4326", "compound"])
def test_chips_stores_and_streams_are_gdals(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    source = _collection(files[name]).harmonize(resolution=30, resampling="bilinear")
    chips = source.chips(size=32, cell_km=0.96)

    chips.to_zarr(tmp_path / "store")

    stored = xr.open_zarr(tmp_path / "store").load()
    assert stored.sizes["chip"] > 3
    for i in range(0, stored.sizes["chip"], 3):
        one = stored.isel(chip=i)
        expected = _warped(files[name], f"EPSG:{int(one['epsg'])}", one["bounds"].values, (32, 32))
        np.testing.assert_allclose(one["pixels"].values[0, 0], expected, rtol=1e-6)
    streamed = {
        str(chip): pixels
        for batch in chips.stream(batch_size=4)
        for chip, pixels in zip(batch["chip_id"], batch["any"], strict=True)
    }
    for chip, pixels in zip(stored["chip_id"].values, stored["pixels"].values, strict=True):
        np.testing.assert_array_equal(streamed[str(chip)], pixels)


def test_chips_on_a_grid_without_a_code_know_it_in_another_process(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """Tiles of MODIS's own map: the store and the plan carry what their numbers mean."""
    chips = _collection(files["modis"]).chips(size=64, grid="tiles")
    chips.to_zarr(tmp_path / "store")
    chips.save_plan(tmp_path / "plan")

    stored = xr.open_zarr(tmp_path / "store").load()
    code = number(MODIS)
    assert set(stored["epsg"].values.tolist()) == {code}
    assert stored["epsg"].attrs["crs_wkt"] == {str(code): wkt2(code)}
    with rasterio.open(files["modis"]) as file:
        for one, bounds in zip(stored["pixels"].values[:, 0, 0], stored["bounds"].values, strict=True):
            np.testing.assert_array_equal(
                one, file.read(1, window=file.window(*bounds).round_offsets(), boundless=True)
            )
    script = (
        "import sys; import rasteret_dask as rd; from rasteret_dask.crs import text\n"
        "store = rd.open_chips(sys.argv[1] + '/store')\n"
        "batch = next(iter(store.stream(batch_size=2)))\n"
        "print(text(batch['epsg'][0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Sinusoidal" in done.stdout


@pytest.mark.parametrize("name", ["hls", "modis", "EPSG:4326", "compound"])
def test_points_and_geometries_are_rasterios(files: dict[str, Path], name: str) -> None:
    source = _collection(files[name])
    places = [(LON + dx, LAT + dy) for dx in (-0.01, 0.00041, 0.012) for dy in (-0.008, 0.0004)]

    values = source.sample_points(places)["value"].to_numpy()
    window = source.get_xarray([(LON, LAT)], size=16, target_crs=LAEA, resolution=40.0)

    with rasterio.open(files[name]) as file:
        to = pyproj.Transformer.from_crs(4326, file.crs, always_xy=True)
        expected = [v[0] for v in file.sample([to.transform(*place) for place in places])]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert pyproj.CRS(window.rio.crs).equals(pyproj.CRS(LAEA), ignore_axis_order=True)


# What items, tables and users state


def _epsg_and_wkt(made: rd.Collection) -> tuple[Any, Any]:
    row = made.to_table(["proj:epsg", "proj:wkt2"]).to_pylist()[0]
    return row["proj:epsg"], row["proj:wkt2"]


@pytest.mark.parametrize(("fields", "asset_level", "headers"), [
    ({"proj:wkt2": MODIS}, False, False), ({"proj:wkt2": MODIS}, True, True),
    ({"proj:projjson": pyproj.CRS(MODIS).to_json_dict()}, True, False),
    ({"proj:wkt2": pyproj.CRS(MODIS).to_wkt()}, False, True),
    ({"proj:epsg": None, "proj:code": None, "proj:wkt2": MODIS}, False, False),
])  # fmt: skip
def test_items_state_a_crs_without_a_code(
    files: dict[str, Path], fields: dict[str, Any], asset_level: bool, headers: bool
) -> None:
    with rasterio.open(files["modis"]) as file:
        shape = {"proj:shape": list(file.shape), "proj:transform": list(file.transform)[:6]}
        wanted = file.read(1)
    item = _item(files["modis"])
    (item["assets"]["height"] if asset_level else item["properties"]).update(fields)
    item["properties"].update(shape)
    item["assets"]["height"]["raster:bands"] = [{"data_type": "float32", "nodata": -9999}]

    made = rd.build_from_stac([item], name="any", headers=headers, kinds={"height": "continuous"})

    assert _epsg_and_wkt(made) == (number(MODIS), wkt2(number(MODIS)))
    np.testing.assert_array_equal(made.cube().values[0, 0], wanted)


@pytest.mark.parametrize(("fields", "code"), [
    ({"proj:code": "EPSG:3035"}, 3035), ({"proj:code": "ESRI:102013"}, number("ESRI:102013")),
    ({"proj:code": "IAU_2015:30100"}, number("IAU_2015:30100")), ({"proj:epsg": "3035"}, 3035),
    ({"proj:projjson": json.dumps(pyproj.CRS(3035).to_json_dict())}, 3035),
    ({"proj:wkt2": "nonsense", "proj:projjson": pyproj.CRS(3035).to_json_dict()}, 3035),
    ({"proj:wkt2": "nonsense"}, None),
])  # fmt: skip
def test_items_state_a_crs_in_any_form(fields: dict[str, Any], code: int | None) -> None:
    item = _item(Path("far.tif"), **fields) | {"geometry": {"type": "Point", "coordinates": [LON, LAT]}}

    made = rd.build_from_stac([item], name="any", headers=False)

    assert _epsg_and_wkt(made)[0] == code


def test_a_file_in_another_crs_than_its_item_says_is_unreadable(files: dict[str, Path]) -> None:
    other: dict[str, Any] = {"proj:projjson": pyproj.CRS(LAEA).to_json_dict()}
    made = _collection(files["modis"], **other)

    with pytest.raises(
        UnreadableAssetsError, match=r"the file is in CRS .*Sinusoidal.*the item says CRS .*Lambert"
    ):
        made.cube()
    same: dict[str, Any] = {"proj:epsg": 25832}
    twin = _collection(files["compound"], **same)
    assert twin.cube().shape == (1, 1, SIDE, SIDE)


def test_a_file_without_crs_lies_where_its_item_or_the_user_says(tmp_path: Path) -> None:
    bare = _write(tmp_path / "bare.tif", None, 120.0, MODIS)
    with rasterio.open(bare) as file:
        wanted = file.read(1)

    with pytest.warns(UserWarning, match=r"no CRS in the file: it lies in .*Sinusoidal.* as the item says"):
        by_item = _collection(bare, **{"proj:wkt2": MODIS})
    with pytest.warns(UserWarning, match=r"no CRS in the file: it lies in .*Sinusoidal.* as crs= says"):
        by_user = rd.build_from_stac([_item(bare)], name="any", crs=MODIS, kinds={"height": "continuous"})
    with pytest.warns(UserWarning, match="as crs= says"):
        by_table = rd.build_from_table(_table(bare), name="any", crs=MODIS, kinds={"height": "continuous"})

    for made in (by_item, by_user, by_table):
        np.testing.assert_array_equal(made.cube().values[0, 0], wanted)
        assert "no CRS in the file" in str(
            made.harmonize(resolution=30).chips(size=16, cell_km=0.48).explain()
        )
    nowhere = _collection(bare)
    with pytest.raises(UnreadableAssetsError, match=r"no CRS in the file, and the item states none.*crs="):
        nowhere.cube()
    with pytest.raises(UnreadableAssetsError, match="proj:wkt2: none that PROJ knows"):
        _collection(bare, **{"proj:wkt2": "nonsense"}).cube()
    with pytest.raises(GridError, match="nonsense"):
        rd.build_from_stac([_item(bare)], name="any", crs="nonsense")


def _table(path: Path, band: str = "height") -> pa.Table:
    assets = pa.map_(pa.string(), pa.struct([("href", pa.string())]))
    return pa.table({
        "id": [path.stem], "datetime": pa.array([dt.datetime(2024, 6, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC")),
        "geometry": pa.nulls(1, pa.binary()), "assets": pa.array([[(band, {"href": str(path)})]], assets),
    })  # fmt: skip


def test_without_headers_an_item_that_states_no_crs_is_told(files: dict[str, Path]) -> None:
    item = _item(files["modis"], **{"proj:shape": [SIDE, SIDE], "proj:transform": [120, 0, 0, 0, -120, 0]})
    item["geometry"] = {"type": "Point", "coordinates": [LON, LAT]}

    made = rd.build_from_stac([item], name="any", headers=False)

    with pytest.raises(UnreadableAssetsError, match="no header was read, and the item states no CRS"):
        made.cube()


def test_tables_keep_and_carry_what_their_numbers_mean(files: dict[str, Path], tmp_path: Path) -> None:
    made = _collection(files["modis"])
    made.export(tmp_path / "records.parquet")
    script = (
        "import sys; import rasteret_dask as rd\n"
        "made = rd.load(sys.argv[1])\n"
        "print(made.describe().crs[0], made.cube().shape, made.cube().rio.crs.to_dict()['proj'])\n"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "records.parquet")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.split("\n")[0].endswith(f"(1, 1, {SIDE}, {SIDE}) sinu")
    assert "Sinusoidal" in done.stdout


def test_older_tables_load(files: dict[str, Path], tmp_path: Path) -> None:
    table = _collection(files["EPSG:3035"]).to_table()

    old = rd.as_collection(table.drop_columns(["proj:wkt2"]), name="old")

    assert old.to_table().schema.field("proj:wkt2").type == RECORD_SCHEMA.field("proj:wkt2").type
    assert _epsg_and_wkt(old) == (3035, None)
    foreign = table.set_column(
        table.schema.get_field_index("proj:epsg"), "proj:epsg", pa.nulls(1, pa.int32())
    )
    foreign = foreign.set_column(table.schema.get_field_index("proj:wkt2"), "proj:wkt2", pa.array([MODIS]))
    assert Records(rd.as_collection(foreign, name="foreign").to_table()).epsg.tolist() == [number(MODIS)]


# Geographic sources


def test_chips_of_degrees_ask_for_metres_or_take_the_items_gsd(files: dict[str, Path]) -> None:
    silent = _collection(files["EPSG:4326"])
    with pytest.raises(GridError, match=r"record 'EPSG-4326'.*0\.0003 degrees.*resolution=.*33\.4 m"):
        silent.chips(size=32, cell_km=0.96).table  # noqa: B018

    told = _collection(files["EPSG:4326"], gsd=30)

    chips = told.chips(size=32, cell_km=0.96)
    assert len(chips.table) > 3
    assert (np.diff(np.array(chips.table.column("xmax")) - np.array(chips.table.column("xmin"))) < 1e-9).all()


def test_a_zone_in_feet_is_resampled_by_its_own_pixel_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPSG:32664 is a zone of the Gulf of Mexico in US survey feet, not one of UTM: 100 of them are 30.48 m."""
    monkeypatch.setitem(globals(), "LON", -99.0)
    path = _write(tmp_path / "gulf.tif", "EPSG:32664", 100.0)
    made = _collection(path).harmonize(resolution=60, resampling="bilinear")
    cube = made.cube(crs=32614)
    expected = _warped(path, "EPSG:32614", cube.rio.bounds(), cube.shape[2:])
    np.testing.assert_allclose(cube[0, 0], expected, rtol=1e-6)


def test_a_geographic_source_joins_one_in_metres(files: dict[str, Path]) -> None:
    optical = _collection(files["EPSG:32632"], "optical")
    dem = _collection(files["EPSG:4326"], "dem", gsd=30).harmonize(resampling="bilinear")

    chips = rd.join(optical=optical, dem=dem).chips(size=32, cell_km=0.96)
    one = next(iter(chips.stream(batch_size=1)))

    expected = _warped(files["EPSG:4326"], f"EPSG:{int(one['epsg'][0])}", one["bbox"][0], (32, 32))
    np.testing.assert_allclose(one["dem"][0, 0, 0], expected, rtol=1e-6)


def test_a_cube_of_more_pixels_than_a_raster_has_is_refused_at_once(files: dict[str, Path]) -> None:
    with pytest.raises(GridError, match=r"pixels of 1e-09 x 1e-09 m .*resolution="):
        _collection(files["EPSG:32632"]).cube(resolution=1e-9)


def test_records_of_one_other_crs_take_one_transformer(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many records and chips there are; within a zone none at all is made for a cube."""
    made: list[Any] = []
    original = pyproj.Transformer.from_crs

    def counted(*crs: Any, **options: Any) -> pyproj.Transformer:
        made.append(crs)
        return original(*crs, **options)

    monkeypatch.setattr(pyproj.Transformer, "from_crs", counted)
    items = [_item(files["modis"]) | {"id": f"m{n}"} for n in range(6)]
    source = rd.build_from_stac(items, name="any", kinds={"height": "continuous"}).harmonize(resolution=60)
    transformer.cache_clear()
    made.clear()

    source.chips(size=16, cell_km=0.96).explain()

    pairs = [tuple(str(crs) for crs in pair) for pair in made]
    assert len(pairs) == len(set(pairs)) <= 8
    made.clear()
    _collection(files["EPSG:32632"]).cube(bounds=None)
    assert len(made) <= 2


REAL = {
    "modis/rasters/MCD43A4.A2017006.h21v11_B01.tif": 500,
    "modis/rasters/MOD10A2.A2022033.h09v05_max_snow_crop.tif": 500,
    "modis/rasters/MYD13A1.A2020153.h30v10_NDVI.tif": 500, "usda_cdl/2021_30m_cdls_-106095_1807575_15000.tif": 30,
    "hls/rasters/HLS.L30.T15UWP.2024283T165135.v2.0.Fmask.tif": 30,
    "cop_dem/rasters/Copernicus_DSM_COG_10_N00_00_E006_00_DEM_crop.tif": 30,
    "esa_worldcover/ESA_WorldCover_10m_2021_v200_N00E006_Map_crop.tif": 10,
    "naip/rasters/m_3008501_ne_16_1_20110815.tif": 30,
}  # fmt: skip
"""{file: metres a pixel}"""


@pytest.mark.skipif(not MORE_SENSORS.is_dir(), reason="real files lie outside of the repository")
@pytest.mark.parametrize("path", REAL)
def test_real_rasters_are_gdals(path: str) -> None:
    made = rd.build_from_table(_table(MORE_SENSORS / path), name="real", kinds={"height": "class"})

    with rasterio.open(MORE_SENSORS / path) as file:
        np.testing.assert_array_equal(made.cube().values[0, 0], file.read(1))
        to = pyproj.Transformer.from_crs(file.crs, 4326, always_xy=True)
        place = to.transform(*file.xy(file.height // 2, file.width // 2))
        resolution = REAL[path]
        chips = made.harmonize(resolution=resolution).chips(size=16, at=[place])
        one = next(iter(chips.stream(batch_size=1)))
        grid = Affine(resolution, 0, one["bbox"][0][0], 0, -resolution, one["bbox"][0][3])
        crs = f"EPSG:{int(one['epsg'][0])}"
        with WarpedVRT(file, crs=crs, transform=grid, width=16, height=16, tolerance=1e-6) as warped:
            np.testing.assert_array_equal(one["real"][0, 0, 0], warped.read(1))


@pytest.mark.skipif(not MORE_SENSORS.is_dir(), reason="real files lie outside of the repository")
@pytest.mark.parametrize(("path", "band", "dataset", "metres"), [
    ("cop_dem/rasters/Copernicus_DSM_COG_10_N00_00_E006_00_DEM_crop.tif", "data", "cop-dem-glo-30", 30),
    ("esa_worldcover/ESA_WorldCover_10m_2021_v200_N00E006_Map_crop.tif", "map", "esa-worldcover", 10),
])  # fmt: skip
def test_real_maps_in_degrees_take_the_catalogs_metres(
    path: str, band: str, dataset: str, metres: int
) -> None:
    made = rd.build_from_table(_table(MORE_SENSORS / path, band), name="map", dataset=dataset)

    chips = made.chips(size=64, cell_km=1.92)

    sides = np.array(chips.table.column("xmax")) - np.array(chips.table.column("xmin"))
    np.testing.assert_allclose(sides, 64 * metres)
