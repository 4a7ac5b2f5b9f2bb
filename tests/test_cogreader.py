"""CogReader against stackstac's own reader: the same pixels, headers asked for once, chunks read in one batch."""

from __future__ import annotations

import pickle
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import stackstac
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioIOError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from stackstac.raster_spec import RasterSpec
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.errors import GridError, ReadError, TrustError
from rasteret_dask.headers.reader import Header
from rasteret_dask.reader.plainhref import HeaderCache, assets_at
from rasteret_dask.table.records import Asset

Array = NDArray[Any]
X0, Y0 = 500_040.0, 5_000_010.0


def write(path: Path, pixels: Array, transform: Affine | None = None, **profile: Any) -> Path:
    """Write a tiled GeoTIFF; pixels have shape (y, x) or (band, y, x)."""
    stack = pixels if pixels.ndim == 3 else pixels[None]
    overviews = profile.pop("overviews", [])
    options = {
        "crs": "EPSG:32633",
        "tiled": True,
        "blockxsize": 32,
        "blockysize": 16,
        "compress": "deflate",
        **profile,
    }
    with rasterio.open(
        path, "w", driver="GTiff", count=len(stack), height=stack.shape[1], width=stack.shape[2], dtype=stack.dtype,
        transform=transform or Affine(10, 0, X0, 0, -10, Y0), **options,
    ) as file:  # fmt: skip
        file.write(stack)
        file.build_overviews(overviews, Resampling.average)
    return path


def pixels_of(seed: int, dtype: str = "uint16", shape: tuple[int, ...] = (90, 110)) -> Array:
    """Return noise with a corner of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 50, shape) if np.dtype(dtype).kind == "f" else rng.integers(0, 120, shape)
    values[..., :20, :30] = 0
    return values.astype(dtype)


def item_of(
    number: int, paths: dict[str, Path], hrefs: dict[str, str] | None = None, **raster: Any
) -> dict[str, Any]:
    """Return the STAC item of some files, as rasterio describes them; hrefs may say otherwise where they are."""
    assets = {}
    for key, path in paths.items():
        with rasterio.open(path) as file:
            assets[key] = {
                "href": str(path) if hrefs is None else hrefs[key], "type": "image/tiff",
                "proj:epsg": file.crs.to_epsg(), "proj:transform": list(file.transform)[:6],
                "proj:shape": list(file.shape),
            }  # fmt: skip
        if raster:
            assets[key]["raster:bands"] = [raster]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": f"scene-{number}", "geometry": None, "links": [],
        "properties": {"datetime": f"2024-05-{number + 1:02}T10:00:00Z"}, "assets": assets,
    }  # fmt: skip


def stacked(items: Sequence[dict[str, Any]], **how: Any) -> xr.DataArray:
    cube: xr.DataArray = stackstac.stack(
        items, **{"snap_bounds": False, "xy_coords": "center", "reader": rd.CogReader, **how}
    )
    return cube


def assert_as_stock(items: Sequence[dict[str, Any]], **how: Any) -> Array:
    """Assert that both readers make the same cube, and return its pixels."""
    with rasterio.Env(GDAL_CACHEMAX=2**26):
        wanted = stackstac.stack(items, snap_bounds=False, xy_coords="center", **how).compute(
            scheduler="sync"
        )
    found = stacked(items, **how).compute(scheduler="threads", num_workers=3)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found.values, wanted.values)
    assert list(found.coords) == list(wanted.coords)
    return np.asarray(found.values)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    """Return three dates of two bands; each date lies elsewhere on the common grid."""
    folder = tmp_path_factory.mktemp("scenes")
    return [
        {
            band: write(
                folder / f"{n}_{band}.tif", pixels_of(10 * n + m), Affine(10, 0, X0 + 150 * n, 0, -10, Y0 - 80 * n),
                nodata=0, predictor=2, overviews=[2],
            )
            for m, band in enumerate(("red", "nir"))
        }
        for n in range(3)
    ]  # fmt: skip


@pytest.fixture
def items(scenes: list[dict[str, Path]]) -> list[dict[str, Any]]:
    return [item_of(n, paths) for n, paths in enumerate(scenes)]


# Pixels


@pytest.mark.parametrize("chunks", [1024, (1, 1, 40, 40), (-1, -1, 50, 64), (2, 1, 33, 200)])
def test_the_same_cube_whatever_the_chunks(items: list[dict[str, Any]], chunks: Any) -> None:
    values = assert_as_stock(items, assets=["red", "nir"], chunksize=chunks)
    assert values.shape == (3, 2, 106, 140)
    assert 0.1 < np.isnan(values).mean() < 0.6


@pytest.mark.parametrize(
    "stored", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
)
@pytest.mark.parametrize("nodata", [None, 0, 7])
@pytest.mark.parametrize(
    ("dtype", "fill"), [("float64", np.nan), ("float32", np.float32(-5)), ("int16", np.int16(-99))]
)
def test_the_same_cube_of_every_dtype(
    tmp_path: Path, stored: str, nodata: float | None, dtype: str, fill: Any
) -> None:
    paths = {"a": write(tmp_path / "a.tif", pixels_of(1, stored), nodata=nodata)}
    bounds = (X0 - 200, Y0 - 700, X0 + 900, Y0 + 100)
    values = assert_as_stock(
        [item_of(0, paths)], assets=["a"], bounds=bounds, dtype=np.dtype(dtype), fill_value=fill, rescale=False,
        chunksize=37,
    )  # fmt: skip
    assert values.shape == (1, 1, 80, 110)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"])
@pytest.mark.parametrize("stored", ["uint16", "int16", "int32", "float32", "float64"])
def test_numbers_are_converted_as_gdal_converts_them(tmp_path: Path, stored: str, dtype: str) -> None:
    values = np.array(
        [-7e4, -300.5, -129, -1.5, -0.5, -0.2, 0, 0.2, 0.5, 1.5, 2.5, 127, 255.4, 300, 6.6e4, 1e9]
    )
    if np.dtype(stored).kind in "iu":
        values = values.clip(np.iinfo(stored).min, np.iinfo(stored).max)
    paths = {"a": write(tmp_path / "a.tif", values.astype(stored).reshape(4, 4))}
    how: dict[str, Any] = {"dtype": np.dtype(dtype), "fill_value": np.dtype(dtype).type(9), "rescale": False}
    assert_as_stock([item_of(0, paths)], assets=["a"], **how)


@pytest.mark.parametrize("fill", [-1.0, np.nan])
@pytest.mark.parametrize(("scale", "offset"), [(2.75e-5, -0.2), (1, -0.1), (0.0001, 0), (3.0, 1.0)])
def test_the_same_cube_rescaled(tmp_path: Path, fill: float, scale: float, offset: float) -> None:
    """Only to float64: stackstac refuses other types."""
    paths = {"a": write(tmp_path / "a.tif", pixels_of(1, "int16") * 77, nodata=0)}
    item = item_of(0, paths, scale=scale, offset=offset)
    values = assert_as_stock([item], assets=["a"], fill_value=fill)
    raw = assert_as_stock([item], assets=["a"], fill_value=fill, rescale=False)
    known = (raw != fill) & ~np.isnan(raw)
    assert 0.05 < (~known).mean() < 0.5
    np.testing.assert_array_equal(values[known], raw[known] * scale + offset)


@pytest.mark.parametrize("factor", [2, 3, 0.5, 0.2])
def test_the_same_cube_at_other_resolutions(items: list[dict[str, Any]], factor: float) -> None:
    """Nearest takes the image itself, as stackstac's reader does; ties go south-east."""
    assert_as_stock(items, assets=["red"], resolution=10 * factor, chunksize=50)


def test_nan_is_nodata(tmp_path: Path) -> None:
    """Other than in stackstac's reader, which hands it on."""
    pixels = pixels_of(1, "float32")
    pixels[40:60, 40:70] = np.nan
    item = item_of(0, {"a": write(tmp_path / "a.tif", pixels)})
    assert_as_stock([item], assets=["a"])
    found = stacked([item], assets=["a"], fill_value=-1.0).values[0, 0]
    np.testing.assert_array_equal(found, np.where(np.isnan(pixels), -1, pixels))


@pytest.mark.parametrize("kernel", ["bilinear", "cubic", "average", "nearest"])
@pytest.mark.parametrize(
    ("epsg", "size", "corner", "level"),
    [
        (32633, 30.0, (X0 + 15, Y0 - 15), 1),
        (32633, 4.0, (X0 + 3, Y0 - 3), 0),
        (32634, 10.0, (29_000.0, 5_016_000.0), 0),
    ],
)
def test_unaligned_grids_are_warped_true_to_gdal(
    tmp_path: Path, kernel: str, epsg: int, size: float, corner: tuple[float, float], level: int
) -> None:
    """The oracle is WarpedVRT at our tolerance, over the overview that gdalwarp would take."""
    path = write(tmp_path / "a.tif", pixels_of(1, "int16", (200, 210)) + 300, nodata=0, overviews=[2])
    width, height = 41, 35
    x, y = corner
    found = stacked(
        [item_of(0, {"a": path})], assets=["a"], epsg=epsg, resolution=size, chunksize=20, dtype="int16",
        bounds=(x, y - height * size, x + width * size, y), fill_value=np.int16(0), rescale=False,
        resampling=Resampling[kernel],
    ).values[0, 0]  # fmt: skip
    options = {"OVERVIEW_LEVEL": level - 1} if level and kernel != "nearest" else {}
    with rasterio.open(path, **options) as file, WarpedVRT(
        file, crs=f"EPSG:{epsg}", transform=Affine(size, 0, x, 0, -size, y), width=width, height=height,
        resampling=Resampling[kernel], tolerance=1e-6, XSCALE=file.res[0] / size, YSCALE=file.res[1] / size,
    ) as warped:  # fmt: skip
        wanted = warped.read(1)
    assert (wanted != 0).mean() > 0.5
    assert np.abs(found.astype(int) - wanted).max() <= (0 if kernel == "nearest" else 1)


def test_one_band_of_several(tmp_path: Path) -> None:
    stack = pixels_of(3, shape=(3, 60, 70))
    path = write(tmp_path / "a.tif", stack, nodata=0)
    item = item_of(
        0, {f"b{n}": path for n in (1, 2, 3)}, {f"b{n}": f"vrt://{path}?bands={n}" for n in (1, 2, 3)}
    )
    values = assert_as_stock([item], assets=["b3", "b1", "b2"], chunksize=(1, -1, 64, 64))
    np.testing.assert_array_equal(np.nan_to_num(values[0]), stack[[2, 0, 1]])


def real_files(data: Path) -> dict[str, list[Path]]:
    """Return real files of one grid each, and the odd ones that stackstac's reader and EPSG serve."""
    found = {}
    for folder in sorted(data.glob("s2_l2a_*/*")):
        found[f"{folder.parent.name}/{folder.name}"] = sorted(folder.glob("*.tif"))
    for folder in sorted(data.glob("landsat_c2l2_native_*/*")):
        found[folder.name] = sorted(folder.glob("*.TIF"))
    found["greenland"] = sorted(data.glob("landsat_c2l2_scene_greenland/*.TIF"))
    found["mol"] = sorted(data.glob("s2_l8_same_place_mol_belgium/*.tif"))
    return {name: paths for name, paths in found.items() if paths}


def test_real_scenes(data: Path) -> None:
    groups = real_files(data)
    assert len(groups) >= 15
    for n, paths in enumerate(groups.values()):
        with rasterio.open(paths[0]) as file:
            own = [p for p in paths if _grid(p) == _grid(paths[0])]
            size = file.res
        item = item_of(n % 28, {p.stem: p for p in own})
        names = [p.stem for p in own]
        chunks = [(-1, -1, 256, 300), 1024][n % 2]
        assert_as_stock([item], assets=names, resolution=size, chunksize=chunks)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_odd_real_files(data: Path) -> None:
    """JPEG 2000, strips, LERC, JPEG, WebP, masks, planar, sparse, south-up, BigTIFF: all that has an EPSG code."""
    read = []
    for path in sorted([*data.glob("edge_cases/*.tif"), *data.glob("edge_cases/*.jp2")]):
        (asset,) = assets_at([f"vrt://{path}?bands=1"])
        if not isinstance(asset, Asset) or path.with_suffix(".tif.aux.xml").exists():
            continue  # stackstac's reader does not look for sidecars
        if asset.placement is not None:
            continue  # rotated, or placed by control points: compared with GDAL's warp in test_turned.py
        with rasterio.open(path) as file:
            bands, broken = file.count, False
            try:
                file.read()
            except RasterioIOError:
                broken = True
        item = item_of(0, {"a": path}, {"a": str(path) if bands == 1 else f"vrt://{path}?bands={bands}"})
        how: dict[str, Any] = {"assets": ["a"], "resolution": asset.resolution, "chunksize": 100}
        if broken:
            with pytest.raises(ReadError):
                stacked([item], **how).compute()
            continue
        assert_as_stock([item], **how)
        read.append(path.name)
    assert len(read) >= 14, read


def _grid(path: Path) -> tuple[Any, ...]:
    with rasterio.open(path) as file:
        return file.crs.to_epsg(), file.transform, file.shape


# One reader


def chunk(urls: Iterable[str | Path], dtype: str = "uint16", fill: Any = 0, **how: Any) -> list[rd.CogReader]:
    """Make readers in one call, as stackstac does for one chunk of its table."""
    spec = RasterSpec(32633, (X0, Y0 - 900, X0 + 1100, Y0), (10, 10))
    how = {"spec": spec, "resampling": Resampling.nearest, "scale_offset": (1, 0), "gdal_env": None, **how}
    return [
        rd.CogReader(url=str(url), dtype=np.dtype(dtype), fill_value=np.dtype(dtype).type(fill), **how)
        for url in urls
    ]


def reader(url: str | Path, **how: Any) -> rd.CogReader:
    (one,) = chunk([url], **how)
    return one


def test_windows_are_whole_pixels(scenes: list[dict[str, Path]]) -> None:
    one = reader(scenes[0]["red"])
    with rasterio.open(scenes[0]["red"]) as file:
        np.testing.assert_array_equal(
            one.read(Window(3, 20, 50, 40)), file.read(1, window=Window(3, 20, 50, 40))
        )
    with pytest.raises(GridError, match="whole pixels"):
        one.read(Window(0.5, 0, 10, 10))
    assert one.read(Window(300, -10, 7, 5)).shape == (5, 7)


@pytest.mark.parametrize(
    "url",
    ["/vsicurl/http://host/a.tif", "<VRTDataset/>", "vrt:///a.tif?bands=1&unscale=true", "vrt:///a.tif?bands=0",
     "vrt://a.tif", "vrt:///vsicurl/http://host/a.tif?bands=1", "vrt://vrt:///a.tif?bands=2?bands=1",
     "http://169.254.169.254/latest/a.tif", "vrt://http://metadata.google.internal/a.tif?bands=1", "ftp://host/a.tif"],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(TrustError):
        reader(url).read(Window(0, 0, 5, 5))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    several = write(tmp_path / "several.tif", pixels_of(1, shape=(2, 20, 20)))
    with pytest.raises(ReadError, match=r"2 bands in the file; expected one band\. Name one as vrt://"):
        reader(several).read(Window(0, 0, 5, 5))
    with pytest.raises(ReadError, match="2 bands in the file; expected band 3"):
        reader(f"vrt://{several}?bands=3").read(Window(0, 0, 5, 5))
    with pytest.raises(ReadError, match="nothing there"):
        reader(tmp_path / "none.tif").read(Window(0, 0, 5, 5))
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ReadError, match="neither a TIFF"):
        reader(tmp_path / "text.tif").read(Window(0, 0, 5, 5))


def test_rotated_files_are_warped_as_gdal_does(tmp_path: Path) -> None:
    place = Affine(9, 3, X0, 3, -9, Y0)
    path = write(tmp_path / "turned.tif", pixels_of(1), place)
    values = reader(path).read(Window(0, 0, 40, 40))
    rows, cols = np.mgrid[:40, :40] + 0.5
    at = np.floor(~place @ (X0 + 10 * cols, Y0 - 10 * rows)).astype(int)
    height, width = pixels_of(1).shape[-2:]
    inside = (at[0] >= 0) & (at[0] < width) & (at[1] >= 0) & (at[1] < height)
    assert inside.sum() > 500
    np.testing.assert_array_equal(values[inside], np.squeeze(pixels_of(1))[at[1][inside], at[0][inside]])


def test_a_file_written_anew_is_read_at_the_second_attempt(tmp_path: Path) -> None:
    """The first meets the old header's etag, size or shape; it is not retried with what would be another file."""
    path = write(tmp_path / "a.tif", pixels_of(1))
    one, window = reader(path), Window(0, 0, 110, 90)
    np.testing.assert_array_equal(one.read(window), pixels_of(1))
    larger = pixels_of(2, shape=(120, 130))
    write(path, larger)
    with pytest.raises(ReadError):
        one.read(window)
    np.testing.assert_array_equal(one.read(window), larger[:90, :110])


# Errors as nodata


@pytest.mark.parametrize(
    ("pattern", "href", "forgiven"),
    [
        (RasterioIOError("HTTP response code: 404"), "{base}/none.tif", True),
        (RasterioIOError("HTTP response code: 404"), "{base}/forbidden/a.tif", False),
        (RasterioIOError(r"HTTP response code: 40\d"), "{base}/forbidden/a.tif", True),
        (RasterioIOError("HTTP response code: 403"), "vrt://{base}/forbidden/a.tif?bands=1", True),
        (RasterioIOError("HTTP response code: 404"), "/nowhere/none.tif", False),
        (RasterioIOError("HTTP response code: 404"), "vrt:///nowhere/none.tif?bands=1", False),
        (RasterioIOError("nothing there"), "/nowhere/none.tif", True),
        (ReadError("asset .*none.tif", "nothing there"), "/nowhere/none.tif", True),
        (TrustError(".*", ""), "/vsimem/none.tif", True),
        (ReadError(".*", ""), "/vsimem/none.tif", False),
        (RasterioIOError(""), "/vsimem/none.tif", False),
        (Exception(""), "/vsimem/none.tif", True),
    ],
)
def test_errors_become_nodata_where_named(
    tmp_path: Path,
    serve: Callable[[Path], tuple[str, list[Any]]],
    pattern: Exception,
    href: str,
    forgiven: bool,
) -> None:
    one = reader(href.format(base=serve(tmp_path)[0]), fill=7, errors_as_nodata=(ValueError("x"), pattern))
    if forgiven:
        with pytest.warns(UserWarning, match="Read as nodata: asset"):
            values = one.read(Window(0, 0, 4, 3))
        np.testing.assert_array_equal(values, np.full((3, 4), 7))
        return
    with pytest.raises((ReadError, TrustError)):
        one.read(Window(0, 0, 4, 3))


def test_what_is_missing_is_nodata_in_both_cubes(
    scenes: list[dict[str, Path]], serve: Callable[[Path], tuple[str, list[Any]]]
) -> None:
    base, _ = serve(scenes[0]["red"].parent)
    hrefs = [{band: f"{base}/{path.name}" for band, path in paths.items()} for paths in scenes]
    hrefs[1]["red"] = f"{base}/none.tif"
    items = [item_of(n, paths, hrefs[n]) for n, paths in enumerate(scenes)]
    with pytest.warns(UserWarning, match="404"):
        values = assert_as_stock(items, assets=["red", "nir"], chunksize=(-1, -1, 64, 64))
    assert np.isnan(values[1, 0]).all()
    assert not np.isnan(values[1, 1]).all()


# A chunk's readers


def as_read(scenes: list[dict[str, Path]], window: Window) -> list[Array]:
    """Return each file's own pixels of a window that counts from the first scene's corner."""
    wanted = []
    for path in (path for paths in scenes for path in paths.values()):
        with rasterio.open(path) as file:
            shift = int((file.transform.c - X0) / 10), int((Y0 - file.transform.f) / 10)
            own = Window(window.col_off - shift[0], window.row_off - shift[1], window.width, window.height)
            wanted.append(file.read(1, window=own, boundless=True, fill_value=0))
    return wanted


def test_a_chunk_is_read_in_one_batch(scenes: list[dict[str, Path]]) -> None:
    """The server answers for pixels only when as many requests wait as there are files: one reads for all."""
    paths = [path for paths in scenes for path in paths.values()]
    with meeting(paths[0].parent, len(paths)) as (base, _):
        items = [
            item_of(n, own, {band: f"{base}/{path.name}" for band, path in own.items()})
            for n, own in enumerate(scenes)
        ]
        how: dict[str, Any] = {"assets": ["red", "nir"], "bounds": (X0 + 300, Y0 - 300, X0 + 310, Y0 - 290)}
        found = stacked(items, chunksize=(-1, -1, 64, 64), **how).compute(scheduler="sync")
    wanted = [pixels[0, 0] for pixels in as_read(scenes, Window(30, 29, 1, 1))]
    np.testing.assert_array_equal(np.nan_to_num(found.values.ravel()), wanted)


def test_headers_are_asked_for_once(
    scenes: list[dict[str, Path]], serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    base, seen = serve(scenes[0]["red"].parent)
    items = [
        item_of(n, own, {band: f"{base}/{path.name}" for band, path in own.items()})
        for n, own in enumerate(scenes)
    ]
    for chunks in (20, (-1, -1, 50, 50)):
        stacked(items, assets=["red", "nir"], chunksize=chunks).compute(scheduler="threads", num_workers=4)
    headers = Counter(path for path, asked in seen if asked is not None and asked.startswith("bytes=0-"))
    assert headers == {f"/{path.name}": 1 for own in scenes for path in own.values()}


def test_a_cube_of_records_asks_for_no_header(
    scenes: list[dict[str, Path]], serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    """Only for tiles, and for none of them twice; a file has 24."""
    base, seen = serve(scenes[0]["red"].parent)
    items = [
        item_of(n, own, {band: f"{base}/{path.name}" for band, path in own.items()})
        for n, own in enumerate(scenes)
    ]
    for item in items:
        item["bbox"] = [14, 44, 16, 46]
        item["geometry"] = {
            "type": "Polygon",
            "coordinates": [[[14, 44], [16, 44], [16, 46], [14, 46], [14, 44]]],
        }
    cube = rd.build_from_stac(items, name="scenes").harmonize(units="raw").cube()
    seen.clear()
    cube.compute(scheduler="threads", num_workers=2)
    first = {path.name: assets_at([str(path)])[0] for own in scenes for path in own.values()}
    for path, asked in seen:
        asset = first[path.lstrip("/")]
        assert isinstance(asset, Asset)
        low = int(str(asked).removeprefix("bytes=").partition("-")[0])
        assert low in asset.image.tile_offsets
    assert 0 < len(set(seen)) == len(seen) <= 6 * 24


@pytest.mark.parametrize("order", [range(6), (5, 4, 3, 2, 1, 0), (2, 2, 0, 5, 0, 5, 1, 3, 4, 4)])
def test_readers_of_a_chunk_in_any_order(scenes: list[dict[str, Path]], order: Sequence[int]) -> None:
    readers = chunk([path for paths in scenes for path in paths.values()])
    for window in (Window(0, 0, 60, 50), Window(20, 10, 80, 70), Window(0, 0, 60, 50)):
        wanted = as_read(scenes, window)
        for i in order:
            np.testing.assert_array_equal(readers[i].read(window), wanted[i])


def test_readers_of_a_chunk_in_many_threads(scenes: list[dict[str, Path]]) -> None:
    readers = chunk([path for paths in scenes for path in paths.values()])
    windows = [Window(5 * n, 3 * n, 40, 30) for n in range(6)]
    jobs = [(i, window) for window in windows for i in range(6)]
    shuffled = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs) * 3) % len(jobs)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: readers[job[0]].read(job[1]), shuffled))
    for (i, window), values in zip(shuffled, found, strict=True):
        np.testing.assert_array_equal(values, as_read(scenes, window)[i])


def test_a_chunk_s_readers_travel(scenes: list[dict[str, Path]]) -> None:
    """Without what was read ahead; and each of them may go alone."""
    readers = chunk([path for paths in scenes for path in paths.values()], scale_offset=(1, 3))
    window = Window(10, 10, 50, 40)
    here = [readers[0].read(window)]
    sent = pickle.dumps(readers)
    assert len(sent) < 4000
    here += [one.read(window) for one in readers[1:]]
    for there in (pickle.loads(sent), [pickle.loads(pickle.dumps(one)) for one in readers]):
        for one, values in zip(there, here, strict=True):
            np.testing.assert_array_equal(one.read(window), values)


def test_cubes_are_read_in_other_processes(items: list[dict[str, Any]]) -> None:
    cube = stacked(items, assets=["red", "nir"], chunksize=(-1, -1, 64, 64))
    here = cube.compute(scheduler="sync")
    np.testing.assert_array_equal(cube.compute(scheduler="processes", num_workers=2).values, here.values)


def test_a_broken_sibling_breaks_no_other(scenes: list[dict[str, Path]], tmp_path: Path) -> None:
    paths = [path for paths in scenes for path in paths.values()]
    broken = write(tmp_path / "broken.tif", pixels_of(7))
    whole = broken.read_bytes()
    first = whole.find(b"\x78\x9c")  # zlib's: the header lies before the tiles
    broken.write_bytes(whole[: first + 2] + b"\xff" * (len(whole) - first - 2))
    nowhere = write(
        tmp_path / "nowhere.tif", pixels_of(8), Affine(1e-4, 0, 15, 0, -1e-4, 300), crs="EPSG:4326"
    )
    urls: list[str | Path] = [*paths[:2], broken, tmp_path / "none.tif", nowhere, *paths[2:]]
    errors = {2: "broken.*decoding tile", 3: "none.*nothing there", 4: "EPSG:4326|latitude|domain"}
    window = Window(0, 0, 60, 50)
    wanted = as_read(scenes, window)
    for order in (range(9), reversed(range(9))):
        readers = chunk(urls)
        for i in order:
            if i in errors:
                with pytest.raises((ReadError, GridError), match=errors[i]):
                    readers[i].read(window)
                continue
            np.testing.assert_array_equal(readers[i].read(window), wanted[i - 3 * (i > 4)])


def test_what_nobody_takes_is_not_kept(tmp_path: Path) -> None:
    """A reader alone reads 40 windows; its siblings' pixels of one of them, at most, stay."""
    pixels = pixels_of(1, shape=(512, 512))
    paths = [write(tmp_path / f"{n}.tif", pixels, blockxsize=256, blockysize=256) for n in range(8)]
    readers = chunk(paths)
    readers[0].read(Window(0, 0, 200, 200))
    tracemalloc.start()
    try:
        for n in range(40):
            readers[0].read(Window(n, n, 200, 200))
        held, _ = tracemalloc.get_traced_memory()
        for one in readers:
            one.close()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batch = 7 * 200 * 200 * 3
    assert 0.9 * batch < held < 1.5 * batch
    assert after < held - 0.9 * batch


# Headers


def test_headers_are_asked_for_once_by_many_threads(
    tmp_path: Path, serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    for n in range(4):
        write(tmp_path / f"{n}.tif", pixels_of(n))
    base, seen = serve(tmp_path)
    cache = HeaderCache(1000)
    hrefs = [f"{base}/{n}.tif" for n in range(4)] + [f"{base}/none.tif"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: cache.headers([hrefs[n % 5], hrefs[(n + 1) % 5]]), range(40)))
    assert {path: n for path, n in Counter(path for path, _ in seen).items() if path != "/none.tif"} == {
        f"/{n}.tif": 1 for n in range(4)
    }
    for answer in answers:
        for href, header in answer.items():
            assert (
                header == "nothing there (404)" if href.endswith("none.tif") else isinstance(header, Header)
            )


def test_headers_used_least_recently_are_dropped(
    tmp_path: Path, serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    for n in range(4):
        write(tmp_path / f"{n}.tif", pixels_of(n, shape=(160, 320)))  # 100 tiles
    base, seen = serve(tmp_path)
    cache = HeaderCache(250)
    for n in (0, 1, 0, 2, 0, 3, 0, 1):
        cache.headers([f"{base}/{n}.tif"])
    assert [path for path, _ in seen] == [f"/{n}.tif" for n in (0, 1, 2, 3, 1)]
    cache.forget(f"{base}/0.tif")
    cache.forget(f"{base}/0.tif")
    cache.headers([f"{base}/0.tif"])
    assert [path for path, _ in seen][-1] == "/0.tif"


class meeting:  # noqa: N801
    """A server of ranges that answers for pixels only once ``due`` requests for them wait together.

    Entered, it gives its base URL and the ranges it was asked for; whoever waits in vain is refused.
    """

    def __init__(self, folder: Path, due: int) -> None:
        asked: list[tuple[str, int]] = []
        together = threading.Barrier(due)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                low, high = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
                asked.append((self.path, low))
                if low:
                    try:
                        together.wait(PATIENCE_S)
                    except threading.BrokenBarrierError:
                        self.send_error(400)
                        return
                whole = (folder / self.path.lstrip("/")).read_bytes()
                part = whole[low : high + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {low}-{low + len(part) - 1}/{len(whole)}")
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Last-Modified", "Mon, 06 May 2024 10:00:00 GMT")
                self.end_headers()
                self.wfile.write(part)

        self.asked = asked
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> tuple[str, list[tuple[str, int]]]:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.asked

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
