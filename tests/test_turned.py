"""Rotated files and those with ground control points, against GDAL's warp of the whole file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine
from rasterio.warp import reproject, transform_bounds

import rasteret_dask as rd
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.reader.levels import LevelFrame
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.table.records import Records

SIDE = 96
X0, Y0 = 500_000.0, 5_540_000.0
Kernel = Literal[
    "nearest", "bilinear", "average"
]  # of cubic ones, GDAL weighs edges by how many columns are asked for
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def turned(degrees: float, shear: float = 0.0) -> Affine:
    return Affine.translation(X0, Y0) @ Affine.rotation(degrees) @ Affine.shear(shear) @ Affine.scale(10, -10)


def points(place: Affine, bend: float) -> list[GroundControlPoint]:
    """Control points of a raster that is bent by some pixels in its middle."""
    steps = np.linspace(0, SIDE, 5)
    made = []
    for row in steps:
        for col in steps:
            off = bend * 4 * (col / SIDE) * (1 - col / SIDE)
            x, y = place @ (col + off, row)
            made.append(GroundControlPoint(row, col, x, y))
    return made


def write(
    path: Path, pixels: NDArray[Any], place: Affine, gcps: list[GroundControlPoint] | None, **options: Any
) -> Path:
    count, height, width = pixels.shape
    profile: dict[str, Any] = {"crs": "EPSG:32633", "transform": place} if gcps is None else {}
    warnings.filterwarnings(
        "ignore", category=NotGeoreferencedWarning
    )  # a file that is being written has no points
    with rasterio.open(
        path, "w", "GTiff", width, height, count, dtype=pixels.dtype.name, tiled=True, blockxsize=32, blockysize=32,
        **profile, **options,
    ) as file:  # fmt: skip
        file.write(pixels)
        if gcps is not None:
            file.gcps = (gcps, rasterio.CRS.from_epsg(32633))
    return path


def collection(
    path: Path, box: tuple[float, float, float, float] = (12, 47, 18, 53), bands: int = 1
) -> rd.Collection:
    one = item_at(path, box)
    return rd.build_from_stac([one], name="turned", kinds={"image": "continuous"} if bands == 1 else None)


def item_at(path: Path, box: tuple[float, float, float, float]) -> dict[str, Any]:
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "a", "collection": "photos", "bbox": list(box), "links": [],
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"datetime": "2023-06-01T10:00:00Z"},
        "assets": {"image": {"href": str(path), "type": "image/tiff", "roles": ["data"]}},
    }  # fmt: skip


def expected(
    path: Path, cube: Any, made: rd.Collection, kernel: str
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return what GDAL makes of the whole file on the grid of a cube, band 1, and where it is valid."""
    place, (height, width) = cube.rio.transform(), cube.shape[2:]
    asset = Records(made.to_table()).asset(0, made.bands[0])
    grid = Grid(int(cube.rio.crs.to_epsg()), place.c, place.f, place.a, -place.e)
    scale = LevelFrame.of(asset, 0, grid.epsg).scale(grid)
    with rasterio.open(path) as file:
        stored = file.read(1)
        valid = file.read_masks(1) != 0
        numbers = np.where(valid, stored.astype("f8"), np.nan)
        where = (
            {"gcps": file.gcps[0], "src_crs": file.gcps[1]}
            if file.gcps[0]
            else {"src_transform": file.transform, "src_crs": file.crs}
        )
    columns = []  # one by one: of several, GDAL approximates where they lie, by up to an eighth of a pixel
    for column in range(width):
        one = np.full((height, 1), np.nan)
        reproject(
            numbers, one, **where, dst_transform=place @ Affine.translation(column, 0), dst_crs=cube.rio.crs,
            src_nodata=np.nan, dst_nodata=np.nan, resampling=Resampling[kernel], XSCALE=scale[0], YSCALE=scale[1],
        )  # fmt: skip
        columns.append(one)
    result = np.hstack(columns)
    seen = ~np.isnan(result)
    if stored.dtype.kind in "iu":
        limits = np.iinfo(stored.dtype)
        result = np.clip(np.floor(np.where(seen, result, 0) + 0.5), limits.min, limits.max)
    return result, seen


def check(path: Path, made: rd.Collection, cube: Any, kernel: str) -> None:
    values = cube.isel(time=0, band=0).values
    seen = cube["valid"].isel(time=0).values if "valid" in cube.coords else ~np.isnan(values)
    due, valid = expected(path, cube, made, kernel)
    assert valid.any()
    assert np.array_equal(seen, valid)
    off = np.abs(values[seen].astype("f8") - due[seen]) > 1e-6 * max(1.0, np.abs(due[seen]).max())
    assert not off.any()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_turned_file_is_what_gdal_warps(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """dtype x nodata x angle x shear or control points x kernel x CRS of the grid."""
    dtype = np.dtype(data.draw(st.sampled_from(["uint8", "int16", "uint16", "float32"])))
    nodata = data.draw(st.sampled_from([None, 0]))
    kernel: Kernel = data.draw(st.sampled_from(KERNELS))
    place = turned(data.draw(st.integers(-170, 170)) + 0.5, data.draw(st.sampled_from([0.0, 12.0])))
    gcps = points(place, data.draw(st.sampled_from([0.0, 3.0]))) if data.draw(st.booleans()) else None
    pixels = (
        np.random.default_rng(data.draw(st.integers(0, 99))).integers(1, 255, (2, SIDE, SIDE)).astype(dtype)
    )
    pixels[:, 20:40, 30:70] = 0
    path = write(tmp_path_factory.mktemp("turned") / "a.tif", pixels, place, gcps, nodata=nodata)
    made = collection(path, bands=2)
    raw = made.harmonize([made.bands[0]], units="raw", resampling=kernel)
    check(path, raw, raw.cube(), kernel)
    west, south, east, north = transform_bounds(32633, 32632, *raw.cube().rio.bounds())
    box = tuple(np.round(np.array([west, south, east, north]) / 20) * 20)
    check(path, raw, raw.harmonize(resolution=20).cube(bounds=box, crs=32632), kernel)


@pytest.mark.parametrize("way", ["rotated", "gcps"])
def test_every_path_reads_it(tmp_path: Path, way: str) -> None:
    """Chips and a store say of each pixel what the cube says."""
    place = turned(17.0)
    pixels = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype("uint16")
    path = write(tmp_path / "a.tif", pixels, place, points(place, 2.0) if way == "gcps" else None, nodata=0)
    header = read_headers([str(path)])[str(path)]
    assert isinstance(header, Header)
    assert header.placement == way
    made = collection(path).harmonize(units="raw", resolution=10, resampling="bilinear")
    chips = made.chips(16, cell_km=0.16)
    assert len(chips) > 10
    assert chips.explain().facts["pixels"]["turned"] == {"native": 0, "translated": 0, "resampled": 1}
    loaded: Any = chips.load()
    for values, bounds in zip(loaded["pixels"].values, loaded["bounds"].values, strict=True):
        cube = made.cube(bounds=tuple(bounds.tolist()), crs=32633)
        assert np.array_equal(values[0], cube.isel(time=0).values)
    box = transform_bounds(32633, 32632, *made.cube().rio.bounds())
    whole = made.cube(bounds=tuple(np.round(box, -1)), crs=32632)  # of another zone
    part = (whole.x.values[10] - 5, whole.y.values[40] - 5, whole.x.values[30] + 5, whole.y.values[20] + 5)
    some = made.cube(bounds=part, crs=32632)
    assert np.array_equal(some.isel(time=0).values, whole.isel(time=0).values[:, 20:41, 10:31])
    chips.to_zarr(str(tmp_path / "store"), progress=False)
    again: Any = rd.open_chips(str(tmp_path / "store")).load()
    assert np.array_equal(again["pixels"].values, loaded["pixels"].values)


@pytest.mark.parametrize("name", ["int64", "uint64"])
def test_numbers_that_no_double_holds_stay_exact(tmp_path: Path, name: str) -> None:
    """Names of fields, say: nearest takes them as they are, as it does of files that are not turned."""
    pixels = (2**53 + np.arange(1, SIDE * SIDE + 1).reshape(1, SIDE, SIDE)).astype(name)
    path = write(tmp_path / "ids.tif", pixels, turned(17.0), None, nodata=0)
    made = collection(path).harmonize(units="raw", resampling="nearest")
    cube = made.cube()[0, 0].to_numpy()
    seen = cube[cube != 0]
    assert seen.size > SIDE * SIDE / 2
    assert np.isin(seen, pixels).all()
    assert len(np.unique(seen % 2)) == 2


@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
def test_complex_numbers_keep_both_parts(tmp_path: Path, kernel: Kernel) -> None:
    """Single-look radar images are complex, and placed by control points."""
    parts = np.random.default_rng(0).normal(size=(2, 1, SIDE, SIDE)).astype("float32")
    for name, pixels in (("real", parts[0]), ("imag", parts[1]), ("complex", parts[0] + 1j * parts[1])):
        write(tmp_path / f"{name}.tif", pixels, turned(17.0), points(turned(17.0), 2.0))
    cubes = {
        name: collection(tmp_path / f"{name}.tif")
        .harmonize(units="raw", resampling=kernel)
        .cube()[0, 0]
        .to_numpy()
        for name in ("real", "imag", "complex")
    }
    for name in ("real", "imag"):
        seen = np.isfinite(cubes[name])
        np.testing.assert_allclose(getattr(cubes["complex"], name)[seen], cubes[name][seen], rtol=1e-5)
    assert seen.sum() > SIDE * SIDE / 2


@pytest.mark.parametrize("way", ["rotated", "gcps"])
def test_files_of_the_south_lie_on_the_northern_twin_s_lattice(tmp_path: Path, way: str) -> None:
    """Chips of EPSG:32733 are laid out in EPSG:32633, where its northings are less by ten million metres."""
    pixels = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype("uint16")
    place = turned(17.0)
    path = write(tmp_path / "a.tif", pixels, place, points(place, 2.0) if way == "gcps" else None, nodata=0)
    with rasterio.open(path, "r+") as file:
        if way == "gcps":
            file.gcps = (points(place, 2.0), rasterio.CRS.from_epsg(32733))
        else:
            file.crs = rasterio.CRS.from_epsg(32733)
    made = collection(path, (12, -43, 18, -37)).harmonize(units="raw", resampling="nearest", resolution=10)
    loaded: Any = made.chips(16, cell_km=0.16).load()
    assert len(loaded["chip"]) > 10
    assert set(loaded["epsg"].values.tolist()) == {32633}
    for values, bounds in zip(loaded["pixels"].values, loaded["bounds"].values, strict=True):
        own = tuple(bounds + np.array([0, 10_000_000, 0, 10_000_000]))
        np.testing.assert_array_equal(values[0, 0], made.cube(bounds=own, crs=32733)[0, 0])
    assert (loaded["pixels"].values != 0).mean() > 0.5


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_and_the_raster_it_was_warped_to_are_read_together(tmp_path: Path, first: int) -> None:
    """Both have the same north-up raster in their headers; only one has its pixels."""
    pixels = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype("uint16")
    path = write(tmp_path / "a.tif", pixels, turned(17.0), None, nodata=0)
    page = Records(collection(path).to_table()).asset(0, "image").levels[0]
    north_up = np.arange(1, page.height * page.width + 1).reshape(1, page.height, page.width).astype("uint16")
    copy = write(tmp_path / "b.tif", north_up, Affine(*page.transform), None, nodata=0)
    one = item_at(path, (12, 47, 18, 53))
    names = [("turned", path), ("north_up", copy)]
    one["assets"] = {
        name: {**one["assets"]["image"], "href": str(place)}
        for name, place in (names[first], names[1 - first])
    }
    kinds: Any = {name: "continuous" for name, _ in names}
    both = rd.build_from_stac([one], name="both", kinds=kinds)
    rules: Any = {"units": "raw", "resampling": "nearest", "resolution": 10}
    chips: Any = both.harmonize(list(one["assets"]), **rules).chips(16, cell_km=0.16).load()
    assert len(chips["chip"]) > 10
    for name, place in names:
        alone: Any = collection(place).harmonize(**rules).chips(16, cell_km=0.16).load()
        np.testing.assert_array_equal(chips["pixels"].sel(band=name), alone["pixels"].isel(band=0))


def test_the_footprint_is_the_file_s_own(tmp_path: Path) -> None:
    """Without an outline of the item's, chips lie on the turned file and not on the rectangle around it."""
    place = turned(45.0)
    pixels = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype("uint16")
    path = write(tmp_path / "a.tif", pixels, place, None, nodata=0)
    one = item_at(path, (12, 47, 18, 53)) | {"geometry": None, "bbox": None}
    made = rd.build_from_stac([one], name="turned")
    ground = made.to_geopandas().to_crs(32633).geometry.iloc[0]
    assert ground.area == pytest.approx((SIDE * 10) ** 2, rel=1e-3)


def test_a_mask_and_an_unreadable_file(tmp_path: Path) -> None:
    """on_error="mask" makes what cannot be read invalid, and names it; else the error names the record."""
    place = turned(17.0)
    pixels = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype("uint16")
    path = write(tmp_path / "a.tif", pixels, place, None, nodata=0)
    made = collection(path).harmonize(units="raw", resolution=10)
    chips = made.chips(16, cell_km=0.16)
    first: Any = chips.load()
    assert first["valid"].values.any()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(rd.ReadError, match="record 'a'"):
        chips.load()
    with pytest.warns(UserWarning, match="record 'a'"):
        lost: Any = chips.load(on_error="mask")
    assert not lost["valid"].values.any()


@pytest.mark.parametrize(
    "name", ["edge_cases/odcgeo_au-3577-rotated.tif", "edge_cases/odcgeo_au-gcp.tif",
             "more_sensors/sentinel1_grd/rasters/S1A_S1_GRDH_1SDV_20230809T020729_s1-vh.tiff"],
)  # fmt: skip
def test_real_files(data: Path, name: str) -> None:
    path = data / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    for kernel in KERNELS[:2]:
        rows = pa.table({"href": [str(path)], "datetime": ["2024-06-01"]})
        made = rd.build_from_files(rows, name="turned", kinds={"band": "continuous"})
        raw = made.harmonize(made.bands[0], units="raw", resampling=kernel)
        check(path, raw, raw.cube(), kernel)


def test_control_points_without_a_crs_are_refused(tmp_path: Path) -> None:
    place = turned(3.0)
    path = tmp_path / "a.tif"
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    with rasterio.open(path, "w", "GTiff", SIDE, SIDE, 1, dtype="uint8") as file:
        file.write(np.ones((1, SIDE, SIDE), np.uint8))
        file.gcps = (points(place, 0.0), rasterio.CRS())
    header = read_headers([str(path)])[str(path)]
    assert isinstance(header, str)
    assert "control points without a CRS" in header or "no geotransform" in header
