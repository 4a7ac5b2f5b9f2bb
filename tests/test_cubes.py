"""Cubes, and the law that a chip is the cube over its own bounds, whatever is asked of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import made_records
import numpy as np
import pyproj
import pytest
import rasterio
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from shapely import Polygon, box
from shapely.geometry import mapping

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import GridError, PlanError, ReadError
from rasteret_dask.reader.cogreader import AssetHref
from rasteret_dask.rules.picks import PickName
from rasteret_dask.table import records
from rasteret_dask.table.records import Records
from rasteret_dask.words import Resampling as Kernel

Array = NDArray[Any]
PICKS: tuple[PickName, ...] = (
    "closest",
    "first",
    "last",
    "newest",
    "least_cloudy",
    "clearest",
    "median",
    "mean",
)


def dataset(chips: rd.Chips, source: str | None = None) -> xr.Dataset:
    """Return the computed chips of one source."""
    lazy = chips.to_xarray()
    node = lazy[source].to_dataset() if source is not None else lazy
    assert isinstance(node, xr.Dataset)
    return node.compute()


def cube_of(source: rd.Collection, chips: xr.Dataset, i: int) -> xr.DataArray:
    """Return the cube over one chip's bounds; the chip's own acquisition where there is no time axis."""
    bounds = chips["bounds"].values[i].tolist()
    cube = source.cube(bounds=tuple(bounds), crs=int(chips["epsg"][i]), min_coverage=1.0)
    if "time" in chips.coords:
        return cube
    return cube.sel(time=chips["datetime"].values[i])


def assert_law(source: rd.Collection, chips: xr.Dataset, at: Sequence[int]) -> None:
    for i in at:
        chip, cube = chips.isel(chip=i), cube_of(source, chips, i)
        found = cube.compute(scheduler="sync")
        np.testing.assert_array_equal(chip["pixels"].values, found.values)
        assert found.dtype == chip["pixels"].dtype
        assert found["band"].values.tolist() == chip["band"].values.tolist()
        if "time" in chips.coords:
            np.testing.assert_array_equal(found["time"].values, chip["time"].values)


def spread(chips: xr.Dataset, n: int = 3) -> list[int]:
    """Return the chips that are partly invalid, as far as there are any, and some others."""
    share = np.nan_to_num(chips["valid_fraction"].values).mean(axis=1)
    part = np.flatnonzero((share > 0.02) & (share < 0.98)).tolist()
    return [*part[:: max(len(part) // n, 1)][:n], len(share) // 2]


def merged(s2: rd.Collection, l8: rd.Collection, **how: Any) -> rd.Collection:
    asked = {"bands": ["red", "nir"], "resolution": 10, "time": "1MS", "mask": "clouds", **how}
    return rd.merge(s2, l8).harmonize(**asked)


@pytest.mark.parametrize("pick", PICKS)
def test_chip_is_cube_for_every_pick(
    s2: rd.Collection, l8: rd.Collection, small_world: World, pick: PickName
) -> None:
    source = merged(s2, l8, pick=pick)
    chips = dataset(source.chips(size=32, cell_km=0.96, aoi=small_world.bbox).sample(30))
    names = {name for names in chips["member"].values.ravel() for name in str(names).split("+") if name}
    assert names == (
        {"l8"} if pick == "closest" else {"s2", "l8"}
    )  # Landsat comes in the middle of each month
    assert_law(source, chips, spread(chips, 2))


@pytest.mark.parametrize(("dtype", "pick"), [("uint16", "clearest"), ("int16", "mean"), ("uint16", "first")])
def test_chip_is_cube_for_integers(s2: rd.Collection, l8: rd.Collection, dtype: str, pick: str) -> None:
    source = merged(s2, l8, dtype=dtype, pick=pick)
    chips = dataset(source.chips(size=48, cell_km=0.96).sample(30))
    assert set(chips.data_vars) == {"pixels", "valid"}
    assert_law(source, chips, spread(chips, 2))
    fill = chips["pixels"].attrs["_FillValue"]
    np.testing.assert_array_equal(chips["valid"].values, (chips["pixels"].values != fill).all(axis=2))


@pytest.mark.parametrize("pick", ["closest", "clearest", "median", "mean"])
def test_chip_is_cube_for_raw_values(l8: rd.Collection, pick: PickName) -> None:
    """Numbers are averaged, bits are not: they are those of the nearest acquisition."""
    source = l8.harmonize(bands=["red", "qa_pixel"], units="raw", time="3MS", mask="clouds", pick=pick)
    chips = dataset(source.chips(size=32, cell_km=0.96).sample(30))
    assert chips["pixels"].dtype == np.uint16
    assert_law(source, chips, spread(chips, 2))


def test_chip_is_cube_without_a_time_axis(s2: rd.Collection) -> None:
    """A chip is one acquisition: two granules of one datatake make one, filled from both."""
    source = s2.harmonize(bands=["blue", "nir"], mask="clouds")
    chips = dataset(source.chips(size=32, cell_km=0.96))
    assert len(np.unique(chips["chip_id"])) == chips.sizes["chip"]
    assert_law(source, chips, spread(chips, 4))


@pytest.mark.parametrize(
    ("resampling", "resolution"), [(None, 20), ("bilinear", 20), ("average", 20), ("cubic", 10)]
)
def test_chip_is_cube_for_embeddings(aef: rd.Collection, resampling: Kernel | None, resolution: int) -> None:
    source = aef.harmonize(
        bands=["A00", "A07", "A63"], units="embedding", resolution=resolution, resampling=resampling
    )
    chips = dataset(source.chips(size=24, cell_km=0.96).sample(10))
    lengths = np.sqrt((chips["pixels"].values.astype(np.float64) ** 2).sum(axis=2))
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    assert_law(source, chips, [0, 5])


def test_chip_is_cube_for_every_source_of_a_join(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection
) -> None:
    sources = {
        "optical": merged(s2, l8),
        "embeddings": aef.harmonize(bands=["A00", "A01"], units="embedding"),
    }
    planned = rd.join(**sources).chips(size=48, cell_km=0.96).sample(12)  # type: ignore[arg-type]
    for name, source in sources.items():
        chips = dataset(planned, name)
        assert_law(source, chips, [0, 7])


def test_wide_cube_s_window_is_the_chip_where_nothing_is_chosen(aef: rd.Collection) -> None:
    source = aef.harmonize(bands=["A03", "A04"], units="embedding")
    chips = dataset(source.chips(size=32, cell_km=0.96).sample(6))
    wide = source.cube().compute()
    for i in range(6):
        xmin, ymin, xmax, ymax = chips["bounds"].values[i]
        window = wide.sel(x=slice(xmin, xmax), y=slice(ymax, ymin))
        np.testing.assert_array_equal(window.values, chips["pixels"].values[i])


# An oracle of its own: a merge of two sensors, two tiles of one datatake, masks, offsets and a pick, in NumPy.


def scene(
    folder: Path,
    name: str,
    when: datetime,
    pixels: dict[str, Array],
    transform: Affine,
    tile_px: tuple[int, int] = (32, 16),
    **properties: Any,
) -> dict[str, Any]:
    """Write one scene's bands as tiled GeoTIFFs and return its STAC item; ``proj:epsg`` is its CRS."""
    properties = {"proj:epsg": 32633, **properties}
    folder.mkdir(exist_ok=True)
    assets = {}
    for key, values in pixels.items():
        path = folder / f"{name}_{key}.tif"
        profile: dict[str, Any] = {
            "driver": "GTiff", "crs": properties["proj:epsg"], "transform": transform, "nodata": 0, "count": 1,
            "tiled": True, "height": values.shape[0], "width": values.shape[1], "dtype": values.dtype,
            "compress": "deflate", "blockxsize": tile_px[0], "blockysize": tile_px[1],
        }  # fmt: skip
        with rasterio.open(path, "w", **profile) as file:
            file.write(values, 1)
        assets[key] = {"href": str(path), "type": "image/tiff; application=geotiff", "roles": ["data"]}
    height, width = next(iter(pixels.values())).shape
    x0, y1 = transform @ (0, 0)
    x1, y0 = transform @ (width, height)
    ground = lonlat(box(x0, y0, x1, y1), properties["proj:epsg"])
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": mapping(ground),
        "bbox": list(ground.bounds), "links": [], "assets": assets,
        "properties": {"datetime": when.isoformat(), **properties},
    }  # fmt: skip


def lonlat(shape: Polygon, epsg: int) -> Polygon:
    from rasterio.warp import transform

    x, y = shape.segmentize(50).exterior.coords.xy
    lon, lat = transform(f"EPSG:{epsg}", "EPSG:4326", list(x), list(y))
    return Polygon(zip(lon, lat, strict=True))


NOON = datetime(2024, 5, 10, 10, tzinfo=UTC)
X0, Y0 = 499_200.0, 5_001_600.0  # a corner of 960 m split cells


@dataclass(frozen=True)
class Pass:
    """The scenes of a hand-made area: two Sentinel-2 tiles of one pass, and one Landsat scene."""

    west: dict[str, Array]
    east: dict[str, Array]
    landsat: dict[str, Array]
    s2: rd.Collection
    l8: rd.Collection


WEST = Affine(10, 0, X0 - 40, 0, -10, Y0 + 60)
EAST = Affine(10, 0, X0 + 760, 0, -10, Y0 + 60)
LANDSAT = Affine(30, 0, X0 - 105, 0, -30, Y0 + 105)


@pytest.fixture(scope="module")
def two_tiles(tmp_path_factory: pytest.TempPathFactory) -> Pass:
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("scenes")

    def s2_tile(height: int, width: int) -> dict[str, Array]:
        red = rng.integers(1, 12_000, (height, width)).astype(np.uint16)
        red[rng.random(red.shape) < 0.05] = 0
        return {"red": red, "scl": rng.choice(np.array([4, 5, 8, 3], np.uint8), (height // 2, width // 2))}

    west, east = s2_tile(210, 130), s2_tile(210, 150)
    slant = np.add.outer(np.arange(210), np.arange(130)) > 280  # the swath's edge
    west["red"][slant] = 0
    landsat = {
        "red": rng.integers(1, 60_000, (74, 90)).astype(np.uint16),
        "qa_pixel": rng.choice(np.array([64, 8, 16, 2], np.uint16), (74, 90)),
    }
    take: dict[str, Any] = {
        "platform": "sentinel-2a",
        "s2:datatake_id": "GS2A_20240510T100000_04_N05.00",
        "s2:processing_baseline": "05.00",
    }
    items = [
        scene(folder, "west", NOON, west, WEST, **(take | {"s2:mgrs_tile": "33TWM"})),
        scene(folder, "east", NOON + timedelta(seconds=9), east, EAST, **(take | {"s2:mgrs_tile": "33TXM"})),
    ]
    for item, factor in ((items[0], WEST), (items[1], EAST)):
        path = Path(item["assets"]["scl"]["href"])
        with rasterio.open(path, "r+") as file:
            file.transform = factor @ Affine.scale(2)
    other = scene(folder, "l8", NOON - timedelta(days=3), landsat, LANDSAT, platform="landsat-8")
    return Pass(
        west, east, landsat,
        rd.build_from_stac(items, name="s2", dataset="sentinel-2-l2a"),
        rd.build_from_stac([other], name="l8", dataset="landsat-c2-l2"),
    )  # fmt: skip


def oracle_s2(scenes: Pass, x0: float, y0: float, size: int) -> Array:
    """Return red reflectance over a window: the granule whose centre is nearer, its holes from the other."""
    parts = []
    for pixels, t in ((scenes.west, WEST), (scenes.east, EAST)):
        rows = np.round((t.f - y0) / 10).astype(int) + np.arange(size)
        cols = np.round((x0 - t.c) / 10).astype(int) + np.arange(size)
        red, scl = pixels["red"], pixels["scl"].repeat(2, 0).repeat(2, 1)
        values = np.full((size, size), np.nan, dtype=np.float32)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                inside = 0 <= row < red.shape[0] and 0 <= col < red.shape[1]
                if inside and red[row, col] != 0 and scl[row, col] not in (3, 8):
                    values[i, j] = np.float32(float(red[row, col]) * 1e-4 - 0.1)
        centre = t @ (red.shape[1] / 2, red.shape[0] / 2)
        away = np.hypot(centre[0] - (x0 + 5 * size), centre[1] - (y0 - 5 * size))
        parts.append((away, values))
    near, far = (values for _, values in sorted(parts, key=lambda part: part[0]))
    return np.where(np.isnan(near), far, near)


def oracle_l8(path: str, quality: str, x0: float, y0: float, size: int) -> Array:
    """Return red reflectance of the Landsat file over a window, warped by GDAL as the package promises."""
    grid = {"crs": "EPSG:32633", "transform": Affine(10, 0, x0, 0, -10, y0), "width": size, "height": size}
    with rasterio.open(path) as file, WarpedVRT(
        file, resampling=Resampling.bilinear, tolerance=1e-6, XSCALE=3, YSCALE=3, **grid
    ) as warped:  # fmt: skip
        dn = warped.read(1).astype(np.float64)
    with (
        rasterio.open(quality) as file,
        WarpedVRT(file, resampling=Resampling.nearest, tolerance=1e-6, **grid) as warped,
    ):
        qa = warped.read(1)
    bad = (dn == 0) | ((qa & 0b11010) != 0)
    return np.where(bad, np.nan, dn * 2.75e-5 - 0.2).astype(np.float32)


@pytest.mark.parametrize("pick", ["closest", "first", "last", "mean"])
def test_merged_mosaicked_masked_and_picked_chips_equal_the_oracle(two_tiles: Pass, pick: PickName) -> None:
    source = rd.merge(two_tiles.s2, two_tiles.l8).harmonize(
        bands=["red"], resolution=10, time="1MS", mask="clouds", pick=pick, units="reflectance"
    )
    chips = dataset(source.chips(size=32, cell_km=0.96))
    files = two_tiles.l8.to_table()["assets"].to_pylist()[0]
    hrefs = {band: asset["href"] for band, asset in files}
    seams = 0
    assert chips.sizes["chip"] >= 18
    for i in range(chips.sizes["chip"]):
        xmin, _, _, ymax = chips["bounds"].values[i].tolist()
        mine = oracle_s2(two_tiles, xmin, ymax, 32)
        other = oracle_l8(hrefs["B4"], hrefs["qa_pixel"], xmin, ymax, 32)
        both = np.stack([other, mine])
        known = ~np.isnan(both)
        mean = np.where(known, both, 0).sum(axis=0, dtype=np.float64) / np.maximum(known.sum(axis=0), 1)
        if xmin + 320 > EAST.c + 10 * two_tiles.east["red"].shape[1]:
            mine = other  # an acquisition that covers the chip comes first
        wanted = {
            "closest": mine, "last": mine, "first": other,
            "mean": np.where(known.any(axis=0), mean, np.nan).astype(np.float32),
        }[pick]  # fmt: skip
        found = chips["pixels"].values[i, 0, 0]
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        # Landsat is resampled: a stored number may differ by one from GDAL over the whole file
        np.testing.assert_allclose(
            found, wanted, atol=2.8e-5 if mine is other or pick in ("first", "mean") else 0, rtol=1e-6
        )
        seams += bool(xmin < X0 + 1260 and xmin + 320 > X0 + 760)
        share = np.float32(np.isfinite(wanted).mean(dtype=np.float64))
        assert chips["valid_fraction"].values[i, 0] == share
    assert seams >= 6
    assert_law(source, chips, [0, 5, chips.sizes["chip"] - 1])


def test_acquisition_coordinates_say_when_and_which(two_tiles: Pass) -> None:
    chips = dataset(two_tiles.s2.harmonize(bands=["red"]).chips(size=32, cell_km=0.96))
    assert set(chips["member"].values.ravel()) == {"s2"}
    # of the acquisition, whichever granule lies nearer
    assert set(chips["datetime"].values.ravel()) == {np.datetime64("2024-05-10T10:00:00")}


def test_a_valid_zero_is_not_taken_for_missing(tmp_path: Path) -> None:
    """Without nodata every number is valid, 0 too: the nearer record's zeros stay."""
    transform = Affine(10, 0, X0, 0, -10, Y0)
    zeros, ones = np.zeros((96, 96), np.uint8), np.ones((96, 96), np.uint8)
    said: dict[str, Any] = {"platform": "p", "sat:relative_orbit": 1}
    items = [scene(tmp_path, n, NOON, {"class": v}, transform, **said)
             for n, v in (("a", zeros), ("b", ones))]  # fmt: skip
    for item in items:
        with rasterio.open(item["assets"]["class"]["href"], "r+") as file:
            file.nodata = None
    source = rd.build_from_stac(items, name="classes").harmonize(units="raw")
    chips = dataset(source.chips(size=32, cell_km=0.96))
    assert chips["valid"].values.all()
    assert not chips["pixels"].values.any()
    assert_law(source, chips, [0, 4])


# Embeddings


def test_embeddings_are_dequantized_before_the_kernel(aef: rd.Collection) -> None:
    """The oracle averages dequantized vectors with NumPy: 3 x 3 pixels of 10 m, then unit length."""
    bands = ["A00", "A01", "A02"]
    native = aef.harmonize(bands=bands, units="raw").cube().compute()
    source = aef.harmonize(bands=bands, units="embedding", resolution=30, resampling="average")
    chips = dataset(source.chips(size=16, cell_km=0.96).sample(5))
    assert chips["pixels"].dtype.kind == "f"
    for i in range(5):
        xmin, ymin, xmax, ymax = chips["bounds"].values[i]
        raw = native.sel(x=slice(xmin, xmax), y=slice(ymax, ymin)).values[0].astype(np.float64)
        vectors = np.sign(raw) * (np.abs(raw) / 127.5) ** 2
        means = vectors.reshape(3, 16, 3, 16, 3).mean(axis=(2, 4))
        wanted = means / np.sqrt((means**2).sum(axis=0))
        np.testing.assert_allclose(chips["pixels"].values[i, 0], wanted, atol=2e-6)


# Cubes as xarray objects


def test_landsat_keeps_its_own_pixels(l8: rd.Collection) -> None:
    cube = l8.cube(bands=["red"])
    record = l8.to_table().to_pylist()[0]
    href = dict(record["assets"])["B4"]["href"]
    with rasterio.open(href) as file:
        stored, own = file.read(1), file.transform
    assert (own.c % 30, own.f % 30) == (15, 15)
    assert cube.rio.transform() == own
    assert (cube["x"].values[0], cube["y"].values[0]) == own @ (0.5, 0.5)
    first = cube.isel(band=0).sel(time=np.datetime64(record["datetime"].replace(tzinfo=None)))
    np.testing.assert_array_equal(first.values, stored)


def test_rioxarray_reads_crs_and_grid(s2: rd.Collection) -> None:
    cube = s2.cube(bands=["red", "nir"], resolution=10)
    assert cube.rio.crs.to_epsg() == 32633
    assert cube.rio.resolution() == (10, -10)
    assert cube.dims == ("time", "band", "y", "x")
    assert cube.rio.nodata == 0


def test_cube_is_lazy_until_computed(s2: rd.Collection) -> None:
    assert s2.cube(bands=["red"]).chunks is not None


@pytest.mark.filterwarnings("ignore:Consolidated metadata")  # zarr-python says so of whatever xarray writes
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_a_cube_goes_to_zarr_as_it_is(
    s2: rd.Collection, l8: rd.Collection, small_world: World, tmp_path: Path, dtype: str
) -> None:
    west, south, _, _ = small_world.bounds
    source = merged(s2, l8, dtype=dtype)
    cube = source.cube(bounds=(west, south, west + 640, south + 640))
    cube.to_zarr(tmp_path / "cube.zarr")
    opened = xr.open_dataarray(tmp_path / "cube.zarr", engine="zarr", decode_coords="all")
    assert opened.rio.crs.to_epsg() == 32633
    assert opened["member"].values.tolist() == cube["member"].values.tolist()
    np.testing.assert_array_equal(opened["time"].values, cube["time"].values)
    wanted = cube.values
    if dtype == "uint16":  # decoded: reflectance, NaN where invalid
        wanted = np.where(wanted == 65535, np.nan, wanted * 1e-4)
        assert opened.dtype.kind == "f"
    np.testing.assert_allclose(opened.values, wanted, rtol=1e-6)


def test_merged_cube_is_in_time_order_with_its_sources(s2: rd.Collection, l8: rd.Collection) -> None:
    cube = rd.merge(s2, l8).harmonize(bands=["red", "nir"], resolution=10).cube()
    assert (np.diff(cube["time"].values) > np.timedelta64(0, "ns")).all()
    assert set(cube["member"].values) == {"s2", "l8"}
    assert cube.sizes["time"] == 7  # four datatakes and three Landsat scenes
    rules = json.loads(cube.attrs["radiometry"])
    assert {(r["member"], r["offset"]) for r in rules} == {("s2", -0.1), ("s2", 0.0), ("l8", -0.2)}


def test_empty_slots_are_invalid_throughout(s2: rd.Collection, small_world: World) -> None:
    """May has no Sentinel-2."""
    west, south, _, _ = small_world.bounds
    source = s2.harmonize(bands=["red"], time="1MS", units="reflectance")
    cube = source.cube(bounds=(west, south, west + 320, south + 320)).compute()
    assert cube["time"].dt.month.values.tolist() == [4, 5, 6]
    assert np.isnan(cube.values[1]).all()
    assert cube["member"].values.tolist()[1] == ""
    assert np.isnat(cube["datetime"].values[1])


@pytest.mark.filterwarnings("error")
def test_a_cube_of_missing_files_is_an_error(tmp_path: Path) -> None:
    """Not nodata, as stackstac would have it."""
    pixels = {"red": np.ones((64, 64), np.uint16)}
    item = scene(tmp_path, "gone", NOON, pixels, Affine(10, 0, X0, 0, -10, Y0))
    cube = rd.build_from_stac([item], name="gone").harmonize(bands=["red"], units="raw").cube()
    Path(item["assets"]["red"]["href"]).unlink()
    with pytest.raises(ReadError, match=r"asset 'red' of record 'gone' .*gone_red\.tif"):
        cube.compute()


def test_bounds_without_records_are_told(s2: rd.Collection, small_world: World) -> None:
    west, south, _, _ = small_world.bounds
    for time in (None, "1MS"):
        with pytest.raises(PlanError, match="no record in these bounds"):
            s2.harmonize(bands=["red"], time=time).cube(
                bounds=(west - 9000, south, west - 8000, south + 1000)
            )


def test_two_zones_make_two_cubes(two_tiles: Pass, tmp_path: Path) -> None:
    corner = Affine(10, 0, 899_960, 0, -10, 5_000_040)
    said: dict[str, Any] = {"proj:epsg": 32632}
    item = scene(tmp_path, "z32", NOON, {"red": two_tiles.west["red"]}, corner, **said)
    other = rd.build_from_stac([item], name="z32", dataset="sentinel-2-l2a")
    both = rd.merge(two_tiles.s2, other).harmonize(bands=["red"])
    with pytest.raises(GridError, match=r"EPSG:32632.*EPSG:32633.*cubes\(\)"):
        both.cube()
    tree = both.cubes()
    assert sorted(tree.children) == ["epsg_32632", "epsg_32633"]
    assert tree["epsg_32632/pixels"].rio.crs.to_epsg() == 32632
    one = both.cube(crs=32633, bounds=(X0, Y0 - 320, X0 + 320, Y0))
    assert one.rio.crs.to_epsg() == 32633


def test_building_a_cube_takes_a_header_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per item and band one asset and one href, made once; places of rasters in the same CRS are not projected."""

    def calls(items: int) -> Counter[str]:
        counted: Counter[str] = Counter()

        def counting(kind: Any, name: str) -> None:
            plain = getattr(kind, name)

            def function(*args: Any, **more: Any) -> Any:
                counted[name] += 1
                return plain(*args, **more)

            patch.setattr(kind, name, staticmethod(function) if name == "__new__" else function)

        rows = [
            made_records.record(f"r{n}", when=f"2024-04-{1 + n:02d}T10:00:00", datatake=str(n))
            for n in range(items)
        ]
        own = made_records.collection("s2", *rows).harmonize(["red", "nir"], mask="clouds")
        with monkeypatch.context() as patch:
            counting(Records, "_asset")
            counting(Records, "_described")
            counting(AssetHref, "__new__")
            counting(pyproj.Transformer, "transform")
            cube = own.cube(bounds_latlon=(15.0, 48.70, 15.02, 48.72))
        assert cube.sizes["time"] == items
        return counted

    monkeypatch.setattr(records, "KNOWN_ASSETS", 4)
    few, many = calls(3), calls(24)
    assert few["_described"] == few["__new__"] == 3 * 3
    assert many["_described"] == many["__new__"] == 24 * 3
    assert few["_asset"] == many["_asset"] <= 1
    assert few["transform"] == many["transform"]
