"""Reading geometries at once: every row is what rasterio, or a cube over its bounds, reads; none is lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyproj
import pytest
import rasterio
import rasterio.mask
import shapely
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import geometry_mask
from servers import RangeServer

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.rules.units import UnitName

Array = NDArray[Any]
UTC = pa.timestamp("us", "UTC")
X0, Y0 = 500_000, 5_560_000
RGBN = {"s2": ["B04", "B03", "B02", "B08"], "l8": ["B4", "B3", "B2", "B5"]}


def scene(
    path: Path,
    seed: int,
    px: int = 300,
    pixel: float = 10,
    x0: float = X0,
    y0: float = Y0,
    bands: int = 1,
    **profile: Any,
) -> Path:
    """Write noise that is valid everywhere, in tiles of 64 px."""
    dtype = profile.pop("dtype", "uint16")
    most = 9000 if np.dtype(dtype).itemsize > 1 else 250
    values = np.random.default_rng(seed).integers(1, most, (bands, px, px)).astype(dtype)
    options = {
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "compress": "deflate",
        "nodata": 0,
        "crs": "EPSG:32633",
    }
    with rasterio.open(
        path, "w", driver="GTiff", dtype=dtype, count=bands, width=px, height=px,
        transform=Affine(pixel, 0, x0, 0, -pixel, y0), **{**options, **profile},
    ) as file:  # fmt: skip
        file.write(values)
    return path


def collection(records: dict[str, tuple[str, dict[str, Any]]], **columns: list[str]) -> rd.Collection:
    """Return {id: (datetime, {band: href})} as a collection, its footprints those of the files."""
    table = pa.table(
        {
            "id": list(records),
            "datetime": pa.array(np.array([when for when, _ in records.values()], "datetime64[us]")).cast(
                UTC
            ),
            "geometry": pa.nulls(len(records), pa.binary()),
            "assets": pa.array(
                [
                    [(band, {"href": str(href)}) for band, href in bands.items()]
                    for _, bands in records.values()
                ],
                pa.map_(pa.string(), pa.struct([("href", pa.string())])),
            ),
            **columns,
        }
    )
    return rd.build_from_table(table, name="s2", dataset="sentinel-2-l2a")


def lonlat(x: Any, y: Any, epsg: int = 32633) -> tuple[Any, Any]:
    lon, lat = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True).transform(x, y)
    return lon, lat


def ground(shape: shapely.Geometry, epsg: int = 32633) -> Any:
    """Return a shape of a CRS in lon/lat."""
    return shapely.transform(shape, lambda xy: np.stack(lonlat(xy[:, 0], xy[:, 1], epsg), -1))


def bounds_of(index: pa.Table) -> dict[int, tuple[float, ...]]:
    """Return each geometry's bounds, which all of its rows share."""
    found: dict[int, tuple[float, ...]] = {}
    for row in index.to_pylist():
        assert found.setdefault(row["geometry_number"], tuple(row["bounds"])) == tuple(row["bounds"])
    return found


@pytest.fixture(scope="module")
def fields(small_world: World) -> list[Any]:
    """Return areas of different shapes in the small world: the second across both granules, the last half outside."""
    west, south, east, north = small_world.bounds
    shapes = [
        shapely.Polygon([(west + 205, south + 310), (west + 700, south + 402), (west + 420, south + 900)]),
        shapely.Point((west + east) / 2, (south + north) / 2).buffer(903),
        shapely.box(west - 153, north - 57, west + 93, north + 178),
    ]
    return [ground(shape) for shape in shapes]


# Windows of one size


@pytest.mark.parametrize("time", [None, "1MS"])
def test_windows_of_one_size_are_chips_at_the_geometries(
    s2: rd.Collection, fields: list[Any], time: str | None
) -> None:
    source = s2 if time is None else s2.harmonize(bands=["red", "nir"], time=time, pick="median")
    bands = None if time else ["B04", "B08"]
    pixels, index = source.get_numpy(fields, bands, size=48, return_index=True)
    at = pa.table({"geometry": shapely.to_wkb(fields), "number": [0, 1, 2]})
    plain = source if time else source.harmonize(bands=bands, units="raw")
    chips = plain.chips(48, at=at, min_coverage=0).load()
    assert isinstance(chips, xr.Dataset)
    order = np.lexsort((chips["datetime"].values[:, 0], chips["number"].values))
    wanted = chips["pixels"].values[order].reshape(-1, 2, 48, 48)
    np.testing.assert_array_equal(pixels, wanted)
    assert pixels.dtype == (np.float32 if time else np.uint16)
    np.testing.assert_array_equal(
        np.stack(index["bounds"].to_pylist())[:: 3 if time else 1], chips["bounds"].values[order]
    )
    np.testing.assert_array_equal(
        index["valid_fraction"].to_numpy(), chips["valid_fraction"].values[order].ravel()
    )


def test_rows_come_by_geometry_then_time_and_the_index_tells_each(
    s2: rd.Collection, fields: list[Any]
) -> None:
    pixels, index = s2.get_numpy(fields[::-1], ["B04"], size=32, return_index=True)
    keys = [(row["geometry_number"], row["datetime"]) for row in index.to_pylist()]
    assert keys == sorted(keys)
    assert len(pixels) == len(keys)
    starts = dict(zip(*(s2.to_table().column(n).to_pylist() for n in ("id", "datetime")), strict=True))
    for row in index.to_pylist():
        assert row["datetime"] == min(starts[name] for name in row["record_ids"])
        xmin, ymin, xmax, ymax = row["bounds"]
        assert row["transform"] == [10, 0, xmin, 0, -10, ymax]
        assert (xmax - xmin, ymax - ymin) == (320, 320)


def test_a_pass_of_two_tiles_is_one_row(s2: rd.Collection, fields: list[Any]) -> None:
    _, index = s2.get_numpy(fields[1], ["B04"], size=32, return_index=True)
    assert any(len(ids) == 2 for ids in index["record_ids"].to_pylist())
    passes = {
        (name.split("_")[0], name.split("_")[2]) for ids in index["record_ids"].to_pylist() for name in ids
    }
    assert len(index) == len(passes)


@pytest.mark.parametrize("size", [16, 64])
def test_two_sensors_give_the_same_ground_at_one_resolution(
    s2: rd.Collection, l8: rd.Collection, fields: list[Any], size: int
) -> None:
    """As in the guide: both (N, 4, H, W); their own pixels lie 15 m apart."""
    read = {
        name: source.get_numpy(
            geometries=fields, bands=RGBN[name], resolution=10, size=size, return_index=True
        )
        for name, source in (("s2", s2), ("l8", l8))
    }
    assert {pixels.shape[1:] for pixels, _ in read.values()} == {(4, size, size)}
    assert bounds_of(read["s2"][1]) == bounds_of(read["l8"][1])
    native = l8.get_numpy(fields, RGBN["l8"], size=size, return_index=True)[1]
    assert set(np.stack(native["bounds"].to_pylist())[:, 0] % 30) == {15}


def test_without_chip_size_each_sensor_gives_four_dimensions(
    s2: rd.Collection, l8: rd.Collection, fields: list[Any]
) -> None:
    for name, source in (("s2", s2), ("l8", l8)):
        pixels = source.get_numpy(geometries=fields[0], bands=RGBN[name])
        assert pixels.ndim == 4
        assert pixels.shape[1] == 4
    assert s2.get_numpy(geometries=fields[0], bands="B04").shape[1] == 1


# Each geometry's own window


@pytest.mark.parametrize("all_touched", [False, True])
def test_a_window_is_what_rasterio_masks(tmp_path: Path, all_touched: bool) -> None:
    file = scene(tmp_path / "a.tif", 1)
    one = collection({"a": ("2024-04-02T10:00:00", {"B04": file})})
    shape = shapely.Polygon([(X0 + 203, Y0 - 404), (X0 + 999, Y0 - 1207), (X0 + 55, Y0 - 2003)])
    pixels, index = one.get_numpy(ground(shape), ["B04"], all_touched=all_touched, return_index=True)
    with rasterio.open(file) as ds:
        wanted, transform = rasterio.mask.mask(ds, [shape], crop=True, all_touched=all_touched)
    np.testing.assert_array_equal(pixels[0], wanted)
    assert Affine(*index["transform"].to_pylist()[0]) == transform
    assert index["valid_fraction"].to_pylist() == [1.0]


def test_windows_of_any_shape_are_cubes_over_their_bounds(s2: rd.Collection, fields: list[Any]) -> None:
    """The areas are cut into squares on the way, of which none may show."""
    line = shapely.LineString([fields[0].centroid, fields[1].centroid]).buffer(0.0001)
    areas = [*fields, line, shapely.Point(fields[1].centroid)]
    frame = s2.get_gdf(areas, ["B04", "B08"])
    assert {f"{h} x {w}" for h, w in (data.shape for data in frame["data"])}
    own = s2.harmonize(bands=["B04", "B08"], units="raw")
    for (number, when), rows in frame.groupby(["geometry_number", "datetime"]):
        bounds, code = rows["bounds"].iloc[0], int(rows["epsg"].iloc[0])
        cube = own.cube(bounds=bounds, crs=code).sel(time=np.datetime64(when.tz_localize(None))).compute()
        there = pyproj.Transformer.from_crs(4326, code, always_xy=True).transform
        shape = shapely.transform(
            shapely.segmentize(areas[number], 0.001),
            lambda xy: np.stack(there(xy[:, 0], xy[:, 1]), -1),  # noqa: B023
        )
        inside = geometry_mask([shape], cube.shape[1:], rows["transform"].iloc[0], invert=True)
        for data, wanted in zip(rows["data"], cube.values, strict=True):
            np.testing.assert_array_equal(data, np.where(inside, wanted, 0))
    assert list(frame["band"]) == ["B04", "B08"] * (len(frame) // 2)


def test_a_long_window_reads_the_tiles_it_touches(server: RangeServer) -> None:
    file = scene(server.folder / "a.tif", 2, px=1024, blockxsize=256, blockysize=256)
    one = collection({"a": ("2024-04-02T10:00:00", {"B04": server.url("a.tif")})})
    strip = shapely.box(X0 + 5, Y0 - 1000, X0 + 10_000, Y0 - 940)
    server.forget()
    assert 5 < one.get_numpy(ground(strip), ["B04"]).shape[2] < 40
    assert sum(a.nbytes for a in server.asked("a.tif")) <= file.stat().st_size * 4 / 16 * 1.05


def test_windows_across_zones_and_beyond_records_keep_their_rows(
    s2: rd.Collection, fields: list[Any]
) -> None:
    """Labels stay with their geometries: what no record covers is a row of fill that says so."""
    areas = [shapely.Point(4.9, 52.3).buffer(0.01), fields[1], shapely.Point(151.2, -33.8).buffer(0.01)]
    frame = geopandas.GeoDataFrame({"crop": ["rye", "oats", "maize"]}, geometry=areas, crs=4326)
    pixels, index = s2.get_numpy(frame, ["B04"], size=16, return_index=True)
    assert index["geometry_number"].to_pylist() == [0, *[1] * (len(index) - 2), 2]
    assert index["crop"].to_pylist() == ["rye", *["oats"] * (len(index) - 2), "maize"]
    for row in (0, -1):
        assert not pixels[row].any()
        assert index["record_ids"].to_pylist()[row] == []
        assert index["datetime"].to_pylist()[row] is None
        assert index["valid_fraction"].to_pylist()[row] == 0
    assert pixels[1:-1].any(axis=(1, 2, 3)).all()
    assert index["epsg"].to_pylist()[0] == 32631
    gdf = s2.get_gdf(frame, ["B04"], size=16)
    assert gdf["crop"].tolist() == index["crop"].to_pylist()
    cube = s2.get_xarray(frame, ["B04"], size=16)
    assert cube["B04"].shape == (3, len(index) - 2, 16, 16)
    np.testing.assert_array_equal(cube["B04"].values[1], pixels[1:-1, 0])
    assert cube["valid"].any(("time", "y", "x")).values.tolist() == [False, True, False]
    assert cube["crop"].values.tolist() == ["rye", "oats", "maize"]


def test_geometries_of_any_form_are_the_same_windows(s2: rd.Collection, fields: list[Any]) -> None:
    box = shapely.box(*fields[0].bounds)
    forms: list[Any] = [
        box, [box], tuple(box.bounds), np.array(box.bounds), box.wkb, [box.wkb], pa.array([box.wkb]),
        shapely.geometry.mapping(box), {"type": "Feature", "geometry": shapely.geometry.mapping(box)},
        pa.table({"geometry": [box.wkb]}),
        geopandas.GeoSeries([box], crs=4326), geopandas.GeoSeries([box], crs=4326).to_crs(3857),
    ]  # fmt: skip
    first = s2.get_numpy(forms[0], ["B04"], date_range="2024-04")
    for form in forms[1:]:
        np.testing.assert_array_equal(s2.get_numpy(form, ["B04"], date_range="2024-04"), first)
    point = s2.get_numpy((fields[0].centroid.x, fields[0].centroid.y), ["B04"])
    assert point.shape[2:] == (1, 1)


def test_records_that_are_in_no_zone_keep_their_pixels(tmp_path: Path) -> None:
    """Their own grid, unless metres are asked for: then the zone's, as for any other collection."""
    file = scene(tmp_path / "dem.tif", 4, pixel=25, x0=4_600_000, y0=3_000_000, crs="EPSG:3035")
    dem = collection({"a": ("2024-04-02T10:00:00", {"B04": file})})
    shape = shapely.Point(4_603_003, 2_996_007).buffer(911)
    pixels, index = dem.get_numpy(ground(shape, 3035), ["B04"], return_index=True)
    points = np.array([[4_601_001.0, 2_999_003.0], [4_607_301.0, 2_993_333.0]])
    with rasterio.open(file) as ds:
        np.testing.assert_array_equal(pixels[0], rasterio.mask.mask(ds, [shape], crop=True)[0])
        wanted = [int(v[0]) for v in ds.sample(points)]
    assert index["epsg"].to_pylist() == [3035]
    lon, lat = lonlat(points[:, 0], points[:, 1], 3035)
    assert dem.sample_points(list(zip(lon, lat, strict=True)), ["B04"])["value"].to_pylist() == wanted
    metric, index = dem.get_numpy(ground(shape, 3035), ["B04"], resolution=30, size=16, return_index=True)
    assert metric.shape == (1, 1, 16, 16)
    assert index["epsg"].to_pylist() == [32633]
    assert index["valid_fraction"].to_pylist() == [1]


def test_a_crs_of_ones_own(s2: rd.Collection, fields: list[Any]) -> None:
    pixels, index = s2.get_numpy(
        fields[1], ["B04"], resolution=20, target_crs="EPSG:3035", size=32, return_index=True
    )
    assert set(index["epsg"].to_pylist()) == {3035}
    bounds = np.array(index["bounds"].to_pylist()[0])
    assert not (bounds % 20).any()
    own = s2.harmonize(bands=["B04"], units="raw", resolution=20)
    cube = own.cube(bounds=tuple(bounds.tolist()), crs=3035).compute()
    np.testing.assert_array_equal(pixels, cube.values)


def test_one_geometry_is_a_cube_of_time_and_place(s2: rd.Collection, fields: list[Any]) -> None:
    found = s2.get_xarray(fields[0], ["B04", "B08"])
    pixels, index = s2.get_numpy(fields[0], ["B04", "B08"], return_index=True)
    assert found["B04"].dims == ("time", "y", "x")
    np.testing.assert_array_equal(found["B04"].values, pixels[:, 0])
    np.testing.assert_array_equal(found["B08"].values, pixels[:, 1])
    assert found.rio.crs.to_epsg() == 32633
    assert found.rio.bounds() == tuple(index["bounds"].to_pylist()[0])
    assert found["valid"].dtype == bool


def test_slots_are_rows_too_the_empty_ones_as_well(s2: rd.Collection, fields: list[Any]) -> None:
    source = s2.harmonize(bands=["red"], time="10D", pick="closest", mask="clouds")
    pixels, index = source.get_numpy(fields[:2], size=16, return_index=True)
    slots = index["slot"].to_pylist()
    assert slots[: len(slots) // 2] == slots[len(slots) // 2 :]
    assert all(a < b for a, b in pairwise(slots[: len(slots) // 2]))
    empty = np.array([not ids for ids in index["record_ids"].to_pylist()])
    assert empty.any()
    assert np.isnan(pixels[empty]).all()
    assert source.get_xarray(fields[:2], size=16)["red"].shape[:2] == (2, len(slots) // 2)


def test_many_windows_fetch_a_tile_once(server: RangeServer) -> None:
    for n in range(3):
        scene(server.folder / f"{n}.tif", n, px=512)
    many = collection(
        {f"r{n}": (f"2024-04-0{n + 1}T10:00:00", {"B04": server.url(f"{n}.tif")}) for n in range(3)}
    )
    rng = np.random.default_rng(3)
    centres = rng.uniform(60, 5060, (150, 2))
    shapes = [ground(shapely.Point(X0 + x, Y0 - y).buffer(rng.uniform(10, 300))) for x, y in centres]
    server.forget()
    frame = many.get_gdf(shapes, ["B04"])
    assert len(frame) == 450
    asked = sum(server.attempts().values())
    assert asked <= 3 * 64, f"{asked} requests for 192 tiles"
    assert sum(a.nbytes for a in server.asked()) <= 1.05 * sum(
        p.stat().st_size for p in server.folder.iterdir()
    )


def test_real_scenes_on_the_southern_hemisphere(data: Path) -> None:
    """Landsat, native 30 m, with negative northings of 32623."""
    folder = data / "landsat_c2l2_native_brumadinho"
    files = sorted(folder.rglob("*SR_B4*"))
    assert files
    with rasterio.open(files[0]) as ds:
        epsg, box, pixels, transform = ds.crs.to_epsg(), ds.bounds, ds.read(1), ds.transform
    one = collection({"one": ("2019-01-14T12:00:00", {"B04": files[0]})})
    centre = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    found, index = one.get_numpy(lonlat(*centre, epsg), ["B04"], size=20, return_index=True)
    xmin, _, _, ymax = index["bounds"].to_pylist()[0]
    shift = 10_000_000 if 32700 < epsg < 32800 else 0
    col, row = (round(v) for v in ~transform * (xmin, ymax + shift))
    np.testing.assert_array_equal(found[0, 0], pixels[row : row + 20, col : col + 20])


# Points


def test_points_are_what_rasterio_samples(tmp_path: Path) -> None:
    """Bands of 10, 20 and 60 m, each on its own pixels; also where a point lies on an edge."""
    sizes = {"B04": 10, "B11": 20, "B01": 60}
    records = {
        name: (f"2024-04-0{n + 1}T10:00:00", {
            band: scene(tmp_path / f"{name}-{band}.tif", 10 * n + size, 3000 // size, size)
            for band, size in sizes.items()
        })
        for n, name in enumerate("ab")
    }  # fmt: skip
    rng = np.random.default_rng(0)
    x, y = X0 + rng.uniform(1, 2999, 200), Y0 - rng.uniform(1, 2999, 200)
    x[:10], y[:10] = np.round(x[:10], -2), np.round(y[:10], -2)
    lon, lat = lonlat(x, y)
    found = collection(records).sample_points(list(zip(lon, lat, strict=True)), list(sizes))
    assert found.num_rows == 200 * 2 * 3
    assert found["band"].to_pylist()[:6] == [*sizes] * 2
    assert found["point_index"].to_pylist() == sorted(found["point_index"].to_pylist())
    for name, (_, bands) in records.items():
        for band, path in bands.items():
            own = found.filter((pa.compute.field("record_id") == name) & (pa.compute.field("band") == band))
            with rasterio.open(path) as ds:
                wanted = [int(v[0]) for v in ds.sample(zip(x, y, strict=True))]
            assert own["value"].to_pylist() == wanted


def test_many_points_read_each_tile_once(server: RangeServer) -> None:
    for n in range(4):
        scene(server.folder / f"{n}.tif", n, px=256, bands=2, interleave="band")
    many = collection(
        {f"r{n}": (f"2024-04-0{n + 1}T10:00:00", {"B04": server.url(f"{n}.tif")}) for n in range(4)}
    )
    rng = np.random.default_rng(1)
    points = [lonlat(X0 + x, Y0 - y) for x, y in rng.uniform(0, 2560, (3000, 2))]
    server.forget()
    table = many.sample_points(points, ["B04"])
    assert table.num_rows == 12_000
    asked = sum(server.attempts().values())
    assert asked <= 4 * 16
    assert set(server.attempts().values()) == {1}


def test_points_where_nothing_is_valid_have_null_values(s2: rd.Collection, fields: list[Any]) -> None:
    inside = fields[0].centroid
    table = s2.sample_points(
        geopandas.GeoDataFrame({"plot": [7, 8]}, geometry=[shapely.Point(0, 0), inside], crs=4326),
        ["B04", "SCL"],
    )
    rows = table.to_pylist()
    assert [(r["point_index"], r["plot"], r["band"], r["value"], r["record_id"]) for r in rows[:2]] == [
        (0, 7, "B04", None, None), (0, 7, "SCL", None, None),
    ]  # fmt: skip
    assert all(r["plot"] == 8 and r["record_id"] for r in rows[2:])
    masked = s2.harmonize(bands=["red"], mask="clouds").sample_points([inside], cloud_cover_lt=100)
    clear = s2.sample_points([inside], ["SCL"], cloud_cover_lt=100)
    cloudy = [r["value"] in (0, 3, 8, 9, 10) for r in clear.to_pylist()]
    assert [r["value"] is None for r in masked.to_pylist()] == cloudy


def test_a_band_without_a_value_at_a_point_leaves_the_others(tmp_path: Path) -> None:
    whole, empty = scene(tmp_path / "a.tif", 1), scene(tmp_path / "b.tif", 2)
    with rasterio.open(empty, "r+") as ds:
        ds.write(np.zeros((300, 300), np.uint16), 1)
    one = collection({"a": ("2024-04-02T10:00:00", {"B04": whole, "B08": empty})})
    values = one.sample_points([lonlat(X0 + 55, Y0 - 55)], ["B04", "B08"])["value"].to_pylist()
    assert values[0] is not None
    assert values[1] is None


# The newest valid pixel


def ids_of_one_scale(s2: rd.Collection) -> list[str]:
    table = s2.to_table(["id", "assets"])
    offsets = [dict(assets)["B04"]["offset"] for assets in table.column("assets").to_pylist()]
    return [i for i, o in zip(table.column("id").to_pylist(), offsets, strict=True) if o == max(offsets)]


def test_raw_numbers_of_several_scales_are_not_put_together(s2: rd.Collection) -> None:
    slotted = s2.harmonize(bands=["B04"], units="raw", time="YS", pick="newest")
    with pytest.raises(rd.PlanError, match=r"different radiometry.*units='physical'"):
        _ = slotted.chips(64).table


@pytest.mark.parametrize("units", ["raw", "reflectance"])
def test_the_newest_valid_pixel_wins(s2: rd.Collection, fields: list[Any], units: UnitName) -> None:
    """One slot over all months, of acquisitions that are read one by one and put together by NumPy."""
    bands = ["B04", "B08"]
    if units == "raw":  # of one scale: numbers of several are not put together
        s2 = s2.where(("id", "in", ids_of_one_scale(s2)))
    each = s2.harmonize(bands=bands, units=units, mask="clouds").chips(64, at=fields, min_coverage=0).load()
    slotted = s2.harmonize(bands=bands, units=units, mask="clouds", time="YS", pick="newest").chips(
        64, at=fields, min_coverage=0
    )
    found = slotted.load()
    assert isinstance(each, xr.Dataset)
    assert isinstance(found, xr.Dataset)
    fill = 0 if units == "raw" else np.nan
    filled = 0
    for place in range(found.sizes["chip"]):
        own = np.flatnonzero((each["bounds"].values == found["bounds"].values[place]).all(axis=1))
        newest = own[np.argsort(each["datetime"].values[own, 0])[::-1]]
        wanted = np.full((2, 64, 64), fill, dtype=found["pixels"].dtype)
        for at in newest:
            pixels = each["pixels"].values[at, 0]
            take = (wanted == fill) if units == "raw" else np.isnan(wanted)
            filled += int(take.any() and at != newest[0])
            wanted = np.where(take, pixels, wanted)
        np.testing.assert_array_equal(found["pixels"].values[place, 0], wanted)
        assert found["datetime"].values[place, 0] == each["datetime"].values[newest[0], 0]
    assert filled
    chip = found.isel(chip=0)
    source = s2.harmonize(bands=bands, units=units, mask="clouds", time="YS", pick="newest")
    cube = source.cube(bounds=tuple(chip["bounds"].values.tolist()), crs=int(chip["epsg"])).compute()
    np.testing.assert_array_equal(cube.values, chip["pixels"].values)
    assert "newest" in str(slotted.explain())


def test_an_older_acquisition_is_read_only_where_the_newer_one_leaves_gaps(server: RangeServer) -> None:
    for n in range(3):
        scene(server.folder / f"{n}.tif", n, px=128)
    with rasterio.open(server.folder / "2.tif", "r+") as ds:  # the newest has a gap in one chip
        ds.write(np.zeros((32, 32), np.uint16), 1, window=((64, 96), (64, 96)))
    many = collection(
        {f"r{n}": (f"2024-04-0{n + 1}T10:00:00", {"B04": server.url(f"{n}.tif")}) for n in range(3)}
    )
    server.forget()
    source = many.harmonize(bands=["B04"], units="raw", time="1MS", pick="newest")
    chips = source.chips(64, grid="tiles", min_coverage=0).load()
    assert isinstance(chips, xr.Dataset)
    assert chips["valid_fraction"].min() == 1
    assert not server.asked("0.tif")
    assert len(server.asked("1.tif")) == 1


# Mistakes


def test_mistakes_are_told_before_anything_is_read(
    s2: rd.Collection, l8: rd.Collection, fields: list[Any]
) -> None:
    def said(
        error: type[Exception], *args: Any, source: Any = s2, verb: str = "get_numpy", **more: Any
    ) -> str:
        with pytest.raises(error) as caught:
            getattr(source, verb)(*args, **more)
        return str(caught.value)

    shapes = said(rd.PlanError, fields, ["B04"])
    assert "size=" in shapes
    assert "get_gdf" in shapes
    assert "get_xarray" in said(rd.PlanError, fields, ["B04"], verb="get_xarray")
    assert "lon/lat" in said(rd.PlanError, [(500_000, 5_500_000)], ["B04"])
    assert "geometry 1" in said(rd.PlanError, [fields[0], "here"], ["B04"])
    assert "geometry 0" in said(rd.PlanError, [shapely.Polygon()], ["B04"])
    assert "at least one" in said(rd.PlanError, [], ["B04"])
    assert "no record" in said(rd.PlanError, [(0.0, 0.0)], ["B04"], size=8)
    assert "no such band" in said(rd.BandError, fields, ["B44"], size=8)
    assert "whole number" in said(rd.PlanError, fields, ["B04"], size=0)
    assert "whole number" in said(rd.PlanError, fields, ["B04"], size=2.5)
    assert "positive" in said(rd.PlanError, fields, ["B04"], resolution=-10, size=8)
    assert "CRS" in said(rd.GridError, fields, ["B04"], target_crs="EPSG:none", size=8)
    assert "resolution=" in said(rd.GridError, fields, ["B04"], target_crs=4326, size=8)
    assert "one source" in said(rd.PlanError, fields, source=rd.join(a=s2, b=l8), size=8)
    assert "map" in said(rd.PlanError, fields, source=s2.map(lambda chips: chips), size=8)
    assert "on_error" in said(rd.PlanError, fields, ["B04"], size=8, on_error="ignore")
    assert "on_error" in said(rd.PlanError, [(0.0, 0.0)], ["B04"], verb="sample_points", on_error="ignore")
    assert "a point" in said(rd.PlanError, fields, ["B04"], verb="sample_points")
    labelled = geopandas.GeoDataFrame({"datetime": [1, 2, 3]}, geometry=fields, crs=4326)
    assert "rename" in said(rd.PlanError, labelled, ["B04"], size=8)
    assert "set_crs" in said(rd.PlanError, geopandas.GeoSeries(fields), ["B04"], size=8)
    clearest = s2.harmonize(bands=["red"], time="1MS", pick="clearest", mask="clouds")
    assert "size=" in said(rd.PlanError, fields, source=clearest)
    assert clearest.get_numpy(fields, size=8).shape[1:] == (1, 8, 8)
