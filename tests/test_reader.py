"""The reader against rasterio over the whole file: the same pixels, each tile once, each file opened once."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from rasteret_dask.errors import GridError, PlanError, ReadError
from rasteret_dask.headers.reader import read_headers
from rasteret_dask.net import web
from rasteret_dask.net.limits import ByteBudget
from rasteret_dask.net.remote import public
from rasteret_dask.net.trust import check_host
from rasteret_dask.reader import tilefile
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.levels import is_aligned
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.reader.placing import Block
from rasteret_dask.reader.ranges import coalesced
from rasteret_dask.reader.rasterfile import RasterFile
from rasteret_dask.reader.readplan import Request, tiles_of
from rasteret_dask.table.records import Asset, Level

EDGE_CASES = Path(__file__).parents[1].parent / "shared" / "data" / "edge_cases"
ODD_FILES = [*sorted(EDGE_CASES.glob("*.tif")), *sorted(EDGE_CASES.glob("*.jp2"))]
X0, Y0 = 500_000.0, 5_000_000.0
Array = NDArray[Any]


def coordinates(height: int = 100, width: int = 90, dtype: str = "uint16", bands: int = 1) -> Array:
    """Shape (band, y, x): a pixel's value is its own place, as far as the dtype holds it."""
    rows, cols = np.mgrid[:height, :width]
    base = rows * 113 + cols + 1
    stack = np.stack([base + 7 * band for band in range(bands)])
    if np.dtype(dtype).kind in "iu":
        stack = stack % (np.iinfo(dtype).max - 1) + 1
    return stack.astype(dtype)


def write(path: Path, pixels: Array, transform: Affine | None = None, **profile: Any) -> Path:
    tiled: dict[str, Any] = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    options = {"driver": "GTiff", "crs": "EPSG:32633", **tiled, **profile}
    mask, overviews = options.pop("mask", None), options.pop("overviews", ())
    where = transform or Affine(10, 0, X0, 0, -10, Y0)
    count, height, width = pixels.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", count=count, height=height, width=width, dtype=pixels.dtype, transform=where, **options
        ) as ds,
    ):
        if options.get("SPARSE_OK"):
            ds.write(pixels[:, :16, :32], window=rasterio.windows.Window(0, 0, 32, 16))
        else:
            ds.write(pixels)
        if mask is not None:
            ds.write_mask(mask)
        if overviews:
            ds.build_overviews(overviews, Resampling.average)
    return path


@pytest.fixture(params=["ranges", "gdal"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read everything twice: by ranges, and through GDAL as if no header knew its tiles."""
    way = str(request.param)
    if way == "gdal":
        monkeypatch.setattr("rasteret_dask.reader.tilefile.is_fast", lambda asset, level: False)
        monkeypatch.setattr("rasteret_dask.reader.engine.is_fast", lambda asset, level: False)
    return way


def assets_of(path: Path, kind: str | None = "reflectance", **changes: Any) -> list[Asset]:
    """Make the assets of a file, one per band, from its header."""
    header = read_headers([str(path)])[str(path)]
    if isinstance(header, str):  # no georeferencing, say
        return _assets_by_gdal(path, kind, **changes)
    nodata, epsg = changes.get("nodata", header.nodata), changes.get("epsg", header.epsg or 0)
    result = []
    for band in range(header.samples):
        levels = tuple(_level(found) for found in header.levels_of(band))
        result.append(Asset("rec", f"B{band + 1}", str(path), band, epsg, 1.0, 0.0, "identity", nodata,
                            levels[0].dtype, "data", kind, header.size, header.etag, levels,
                            placement=header.placement))  # fmt: skip
    return result


def _assets_by_gdal(path: Path, kind: str | None, **changes: Any) -> list[Asset]:
    with rasterio.open(path) as ds:
        height, width = ds.block_shapes[0]
        planar = 1 if ds.interleaving is not None and ds.interleaving.name == "pixel" else 2
        level = Level("image", ds.driver, ds.width, ds.height, width, height, ds.dtypes[0], "<", 8, 1, planar,
                      ds.count, tuple(ds.transform)[:6], (), ())  # fmt: skip
        fields: dict[str, Any] = {"epsg": ds.crs.to_epsg() if ds.crs else 0, "nodata": ds.nodata, **changes}
        return [
            Asset("rec", f"B{i + 1}", str(path), i, fields["epsg"], 1.0, 0.0, "identity", fields["nodata"],
                  ds.dtypes[i], "data", kind, None, None, (level,))
            for i in range(ds.count)
        ]  # fmt: skip


def _level(found: dict[str, Any]) -> Level:
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in found.items()}
    return Level(**plain)


def own_grid(asset: Asset) -> Grid:
    a, _, c, _, e, f = asset.image.transform
    return Grid(asset.epsg, c, f if e < 0 else f + e * asset.image.height, a, abs(e))


def read(*requests: Request) -> list[Block]:
    with Session() as session:
        return session.read_block(requests)


def padded(pixels: Array, valid: Array, window: Window) -> tuple[Array, Array]:
    """Cut a window that may hang over the raster's edge, with NumPy alone."""
    rows = np.arange(window.row, window.row + window.height)
    cols = np.arange(window.col, window.col + window.width)
    inside = ((rows >= 0) & (rows < pixels.shape[0]))[:, None] & ((cols >= 0) & (cols < pixels.shape[1]))
    at = np.ix_(rows.clip(0, pixels.shape[0] - 1), cols.clip(0, pixels.shape[1] - 1))
    return pixels[at], valid[at] & inside


def assert_same(block: Block, values: Array, valid: Array, exact: bool = True) -> None:
    """Compare window 0 with an oracle, where it is valid."""
    np.testing.assert_array_equal(block.valid[0], valid)
    found, wanted = block.values[0][valid], values[valid]
    assert block.values.dtype == values.dtype
    if exact:
        np.testing.assert_array_equal(found, wanted)
    elif values.dtype.kind in "iu":
        assert np.abs(found.astype(np.int64) - wanted.astype(np.int64)).max(initial=0) <= 1
    else:
        np.testing.assert_allclose(found, wanted, rtol=2e-6)


def oracle(
    path: Path, grid: Grid, window: Window, kernel: str, scale: float, overview: int = -1, band: int = 1
) -> tuple[Array, Array]:
    """Return WarpedVRT over the whole original file, with the same tolerance and scale."""
    options = {"OVERVIEW_LEVEL": overview} if overview >= 0 else {}
    with rasterio.open(path, **options) as ds:
        nodata = ds.nodata
        if nodata is None and np.dtype(ds.dtypes[0]).kind == "f":
            nodata = np.nan
        with WarpedVRT(
            ds, crs=f"EPSG:{grid.epsg}", transform=grid.transform(window), width=window.width,
            height=window.height, resampling=Resampling[kernel], tolerance=1e-6, XSCALE=scale, YSCALE=scale,
            src_nodata=nodata, nodata=nodata, add_alpha=nodata is None,
        ) as warped:  # fmt: skip
            values = warped.read(band)
            if nodata is None:
                return values, warped.read(ds.count + 1) > 0
            return values, ~np.isnan(values) if np.isnan(nodata) else values != nodata


WINDOWS = (Window(0, 0, 40, 40), Window(30, 50, 40, 40), Window(-15, -20, 40, 40), Window(80, 70, 40, 40),
           Window(500, 500, 40, 40))  # fmt: skip

ENCODINGS: list[tuple[str, dict[str, Any]]] = [
    *((d, {"compress": "deflate"}) for d in ("int8", "uint8", "int16", "uint16", "int32", "uint32")),
    *((d, {"compress": "deflate", "predictor": 3}) for d in ("float32", "float64")),
    *(("uint16", {"compress": c, "predictor": 2}) for c in ("deflate", "lzw", "zstd")),
    ("uint16", {}),
    ("uint16", {"compress": "deflate", "BIGTIFF": "YES"}),
    ("uint16", {"compress": "deflate", "ENDIANNESS": "BIG"}),
    ("float32", {"compress": "lzw", "predictor": 3, "ENDIANNESS": "BIG"}),
    ("uint16", {"tiled": False, "blockxsize": 90, "blockysize": 7}),
    ("uint16", {"interleave": "band", "compress": "deflate"}),
    ("uint16", {"interleave": "pixel", "compress": "deflate", "predictor": 2}),
]


@pytest.mark.parametrize(("dtype", "profile"), ENCODINGS)
def test_aligned_windows_are_the_files_own_pixels(
    tmp_path: Path, dtype: str, profile: dict[str, Any]
) -> None:
    pixels = coordinates(dtype=dtype, bands=3)
    assets = assets_of(write(tmp_path / "a.tif", pixels, **profile))
    grid = own_grid(assets[0])
    for band, block in enumerate(read(*(Request(a, grid, WINDOWS) for a in assets))):
        for i, window in enumerate(WINDOWS):
            part = Block(block.values[i : i + 1], block.valid[i : i + 1])
            assert_same(part, *padded(pixels[band], np.ones(pixels.shape[1:], bool), window))


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", 0), ("int8", -128), ("float32", -9999), ("float32", np.nan)]
)
def test_nodata_is_invalid(tmp_path: Path, dtype: str, nodata: float) -> None:
    pixels = coordinates(dtype=dtype)
    pixels[0, 20:50, 10:40] = nodata
    (asset,) = assets_of(write(tmp_path / "a.tif", pixels, nodata=nodata))
    valid = np.ones(pixels.shape[1:], bool)
    valid[20:50, 10:40] = False
    window = Window(-3, -4, 60, 60)
    assert_same(read(Request(asset, own_grid(asset), (window,)))[0], *padded(pixels[0], valid, window))


def test_nan_is_invalid_and_stays_out_of_kernels_without_nodata(tmp_path: Path) -> None:
    pixels = coordinates(dtype="float32")
    pixels[0, 20:22, 20:22] = np.nan
    (asset,) = assets_of(write(tmp_path / "a.tif", pixels))
    window = Window(0, 0, 60, 60)
    (block,) = read(Request(asset, own_grid(asset), (window,)))
    assert (~block.valid).sum() == 4
    (block,) = read(Request(asset, Grid(32633, X0 + 5, Y0, 10, 10), (window,)))
    assert (~block.valid).sum() <= 4
    assert np.isfinite(block.values[block.valid]).all()


def test_nodata_that_the_dtype_cannot_hold_is_no_nodata(tmp_path: Path) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates()), nodata=-9999.0)
    (block,) = read(Request(asset, own_grid(asset), (Window(0, 0, 10, 10),)))
    assert block.valid.all()


@pytest.mark.parametrize("nodata", [None, 5])
@pytest.mark.parametrize("listed", [True, False])
def test_sparse_tiles_are_nodata_or_zero(tmp_path: Path, nodata: float | None, listed: bool) -> None:
    pixels = coordinates(64, 64)
    (asset,) = assets_of(write(tmp_path / "a.tif", pixels, SPARSE_OK=True, nodata=nodata))
    if not listed:
        asset = replace(asset, levels=(replace(asset.image, tile_offsets=(), tile_byte_counts=()),))
    with rasterio.open(asset.href) as ds:
        wanted = ds.read(1)
    window = Window(-5, 0, 64, 64)
    valid = np.ones((64, 64), bool) if nodata is None else wanted != nodata
    request = Request(asset, own_grid(asset), (window,))
    assert_same(read(request)[0], *padded(wanted, valid, window))
    assert len(tiles_of(request)[1]) == (1 if listed else 8)


def test_internal_mask(tmp_path: Path) -> None:
    pixels = coordinates(bands=2)
    mask = np.ones(pixels.shape[1:], bool)
    mask[10:60, 5:50] = False
    path = write(tmp_path / "a.tif", pixels, mask=mask, interleave="pixel")
    assets = assets_of(path)
    window = Window(-3, -4, 90, 60)
    for band, block in enumerate(read(*(Request(a, own_grid(a), (window,)) for a in assets))):
        assert_same(block, *padded(pixels[band], mask, window))
    half = Grid(32633, X0 + 5, Y0 - 5, 10, 10)
    for kernel in ("bilinear", "nearest"):
        for band, block in enumerate(read(*(Request(a, half, (window,), kernel) for a in assets))):
            values, valid = oracle(path, half, window, kernel, 1.0, band=band + 1)
            assert_same(block, values, valid, exact=kernel == "nearest")


def test_south_up_files_are_flipped(tmp_path: Path) -> None:
    pixels = coordinates(100, 90)
    path = write(tmp_path / "a.tif", pixels, Affine(10, 0, X0, 0, 10, Y0 - 1000))
    (asset,) = assets_of(path)
    grid, window = Grid(32633, X0, Y0, 10, 10), Window(13, -7, 60, 50)
    assert is_aligned(asset, grid)
    (block,) = read(Request(asset, grid, (window,)))
    assert_same(block, *padded(pixels[0, ::-1], np.ones((100, 90), bool), window))
    for kernel in ("nearest", "bilinear", "average"):
        coarse, window = Grid(32633, X0 + 3, Y0 - 4, 23, 23), Window(-3, 2, 30, 20)
        (block,) = read(Request(asset, coarse, (window,), kernel))
        assert_same(block, *oracle(path, coarse, window, kernel, 10 / 23), exact=kernel == "nearest")


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "average"])
def test_southern_zones_are_a_translation(tmp_path: Path, kernel: str) -> None:
    pixels = coordinates()
    south = write(tmp_path / "s.tif", pixels, Affine(10, 0, X0, 0, -10, 7_000_000), crs="EPSG:32733")
    north = write(tmp_path / "n.tif", pixels, Affine(10, 0, X0, 0, -10, -3_000_000))
    aligned = Grid(32633, X0 - 1000, -2_999_000, 10, 10)
    assert is_aligned(assets_of(south)[0], aligned)
    assert not is_aligned(assets_of(south)[0], replace(aligned, epsg=32634))
    assert is_aligned(assets_of(north)[0], replace(aligned, epsg=32733, y0=7_001_000))
    for grid in (aligned, Grid(32633, X0 + 5, -3_000_005, 30, 30)):
        one, other = (
            read(Request(assets_of(p)[0], grid, (Window(90, 90, 40, 40),), kernel))[0] for p in (south, north)
        )
        np.testing.assert_array_equal(one.valid, other.valid)
        np.testing.assert_array_equal(one.values, other.values)


WARPS = [
    ("30 m to 10 m, origin off by 15 m", 30.0, Grid(32633, X0 + 15, Y0 - 15, 10, 10), "bilinear", 3.0),
    ("10 m to 30 m", 10.0, Grid(32633, X0 + 15, Y0 - 15, 30, 30), "average", 1 / 3),
    ("10 m to 25 m", 10.0, Grid(32633, X0 + 3, Y0 - 4, 25, 25), "average", 10 / 25),
    ("half a pixel", 10.0, Grid(32633, X0 + 5, Y0 - 5, 10, 10), "bilinear", 1.0),
    ("next zone", 10.0, Grid(32634, 28_300, 5_017_500, 10, 10), "bilinear", 1.0),
    ("next zone, coarser", 10.0, Grid(32634, 28_300, 5_017_500, 30, 30), "average", 1 / 3),
]


@pytest.mark.parametrize(("_name", "size", "grid", "default", "scale"), WARPS)
@pytest.mark.parametrize("kernel", [None, "nearest", "cubic", "lanczos", "mode"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_warps_equal_gdal_over_the_whole_file(
    tmp_path: Path,
    _name: str,
    size: float,
    grid: Grid,
    default: str,
    scale: float,
    kernel: str | None,
    dtype: str,
) -> None:
    pixels = coordinates(200, 180, dtype=dtype)
    pixels[0, 40:70, 60:90] = 0
    path = write(tmp_path / "a.tif", pixels, Affine(size, 0, X0, 0, -size, Y0), nodata=0)
    (asset,) = assets_of(path)
    assert not is_aligned(asset, grid)
    windows = (Window(20, 10, 48, 40), Window(-10, -12, 48, 40), Window(30, 35, 48, 40))
    (block,) = read(Request(asset, grid, windows, kernel))
    used = kernel or default
    for i, window in enumerate(windows):
        part = Block(block.values[i : i + 1], block.valid[i : i + 1])
        assert_same(part, *oracle(path, grid, window, used, scale), exact=used in ("nearest", "mode"))
    assert block.valid.any()


@pytest.mark.parametrize("kind", ["class", "bitfield", "embedding"])
def test_codes_take_the_nearest_pixel(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.tif", coordinates(), overviews=[2, 4])
    (asset,) = assets_of(path, kind)
    grid, window = Grid(32633, X0 + 7, Y0, 40, 40), Window(0, 0, 20, 20)
    (block,) = read(Request(asset, grid, (window,)))
    assert_same(block, *oracle(path, grid, window, "nearest", 0.25))


def test_a_tie_takes_the_pixel_to_the_south_east_whatever_the_window(tmp_path: Path) -> None:
    pixels = coordinates()
    (asset,) = assets_of(write(tmp_path / "a.tif", pixels))
    grid = Grid(32633, X0 + 5, Y0 - 5, 10, 10)
    (block,) = read(Request(asset, grid, (Window(0, 0, 50, 50),), "nearest"))
    np.testing.assert_array_equal(block.values[0], pixels[0, 1:51, 1:51])


@pytest.mark.parametrize(
    ("size", "level", "corner"),
    [(20, 1, 0), (40, 2, 0), (39, 1, 0), (30, 1, 5), (100, 2, 3), (19, 0, 0), (40.3, 2, 0)],
)
def test_overviews_are_chosen_as_gdalwarp_does(tmp_path: Path, size: float, level: int, corner: int) -> None:
    path = write(tmp_path / "a.tif", coordinates(160, 160, "float32"), overviews=[2, 4])
    (asset,) = assets_of(path)
    grid, window = Grid(32633, X0 + corner, Y0, size, size), Window(-1, 1, 12, 13)
    request = Request(asset, grid, (window,))
    assert tiles_of(request)[0] == level
    native = 10 * 2**level
    (block,) = read(request)
    if size == native:
        with rasterio.open(path, OVERVIEW_LEVEL=level - 1) as ds:
            wanted = ds.read(1)
        assert_same(block, *padded(wanted, np.ones(wanted.shape, bool), window))
    else:
        kernel_scale = native / size
        assert_same(block, *oracle(path, grid, window, "average", kernel_scale, level - 1), exact=False)


def test_sparse_headers_do_not_hide_tiles_that_kernels_need(tmp_path: Path) -> None:
    pixels = coordinates(64, 64)
    path = write(tmp_path / "a.tif", pixels, SPARSE_OK=True)
    (asset,) = assets_of(path)
    assert asset.image.tile_offsets[1:] == (0,) * 7
    grid, window = Grid(32633, X0 + 5, Y0 - 5, 10, 10), Window(0, 0, 60, 60)
    assert_same(
        read(Request(asset, grid, (window,)))[0], *oracle(path, grid, window, "bilinear", 1.0), exact=False
    )


def counted(requests: Sequence[Request], keep: Sequence[Request] = ()) -> tuple[int, int]:
    with Session() as session:
        session.read_block(requests, keep)
        return session.counts.files_opened, session.counts.tiles_read


def test_far_windows_touch_only_their_own_tiles(tmp_path: Path, way: str) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates(320, 320)))
    request = Request(
        asset, own_grid(asset), (Window(0, 0, 8, 8), Window(300, 300, 8, 8), Window(2, 2, 8, 8))
    )
    assert tiles_of(request) == (0, {0, 18 * 10 + 9, 19 * 10 + 9})
    assert counted([request]) == (int(way == "gdal"), 3)
    warped = Request(asset, Grid(32633, X0 + 5, Y0, 10, 10), request.windows)
    assert len(tiles_of(warped)[1]) == counted([warped])[1] <= 6


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_each_file_is_opened_once_and_each_tile_read_once(tmp_path: Path, interleave: str, way: str) -> None:
    files = [write(tmp_path / f"{i}.tif", coordinates(bands=2), interleave=interleave) for i in range(3)]
    assets = [a for f in files for a in assets_of(f)]
    grid = own_grid(assets[0])
    aligned = [Request(a, grid, WINDOWS) for a in assets]
    shifted = [Request(a, replace(grid, x0=X0 + 4), WINDOWS[:2]) for a in assets]
    tiles: dict[tuple[str, int], set[int]] = {}
    for request in (*aligned, *shifted):
        plane = request.asset.band_index if interleave == "band" else 0
        tiles.setdefault((request.asset.href, plane), set()).update(tiles_of(request)[1])
    assert counted([*aligned, *shifted]) == (3 * (way == "gdal"), sum(map(len, tiles.values())))


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_kept_tiles_are_not_read_again(tmp_path: Path, interleave: str, way: str) -> None:
    assets = assets_of(write(tmp_path / "a.tif", coordinates(bands=2), interleave=interleave))
    grid = own_grid(assets[0])
    steps = [[Request(a, grid, (Window(row, 3, 30, 30),)) for a in assets] for row in (0, 20, 40)]
    alone = [block for step in steps for block in read(*step)]
    with Session() as session:
        together = []
        for i, step in enumerate(steps):
            together += session.read_block(step, keep=[r for later in steps[i + 1 :] for r in later])
        planes = 2 if interleave == "band" else 1
        union = set().union(*(tiles_of(r)[1] for step in steps for r in step))
        assert session.counts.tiles_read == planes * len(union)
        assert session.counts.files_opened == (way == "gdal")
        assert session.counts.tiles_reused > 0
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_counts_say_what_was_warped_and_what_takes_gdal(tmp_path: Path, way: str) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates()))
    (strips,) = assets_of(write(tmp_path / "b.tif", coordinates(), tiled=False, blockysize=8, blockxsize=90))
    grid = own_grid(asset)
    shifted = replace(grid, x0=X0 + 5)
    with Session() as session:
        session.read_block(
            [
                Request(a, g, (Window(0, 0, 4, 4),))
                for a, g in itertools.product([asset, strips], [grid, shifted])
            ]
        )
        assert session.counts.warped_requests == 2
        assert session.counts.gdal_fallback == (4 if way == "gdal" else 2)


sizes = st.integers(1, 40)
corners = st.integers(-30, 60)
grids = st.one_of(
    st.builds(
        Grid, st.just(32633), st.floats(X0 - 50, X0 + 50), st.floats(Y0 - 50, Y0 + 50),
        *[st.sampled_from([3.3, 10.0, 15.0, 30.0])] * 2,
    ),
    st.builds(
        Grid, st.just(32634), st.floats(28_200, 28_400), st.floats(5_017_300, 5_017_600),
        *[st.sampled_from([10.0, 20.0])] * 2,
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=grids,
    places=st.lists(st.tuples(corners, corners), min_size=1, max_size=4),
    height=sizes,
    width=sizes,
    kernel=st.sampled_from([None, "nearest", "bilinear", "cubic", "average"]),
    dtype=st.sampled_from(["uint8", "int16", "float32"]),
)
def test_pixels_do_not_depend_on_grouping(
    tmp_path: Path,
    grid: Grid,
    places: list[tuple[int, int]],
    height: int,
    width: int,
    kernel: str | None,
    dtype: str,
) -> None:
    path = tmp_path / f"{dtype}.tif"
    if not path.exists():
        write(path, coordinates(70, 60, dtype), overviews=[2])
    (asset,) = assets_of(path)
    windows = tuple(Window(row, col, height, width) for row, col in places)
    (together,) = read(Request(asset, grid, windows, kernel))
    for i, window in enumerate(windows):
        (alone,) = read(Request(asset, grid, (window,), kernel))
        np.testing.assert_array_equal(alone.valid[0], together.valid[i])
        np.testing.assert_array_equal(alone.values[0], together.values[i])
    request = Request(asset, grid, windows, kernel)
    assert counted([request])[1] == len(tiles_of(request)[1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=grids,
    split=st.integers(1, 39),
    row=corners,
    col=corners,
    kernel=st.sampled_from(["nearest", "bilinear", "cubic", "average"]),
    dtype=st.sampled_from(["uint8", "int16", "float32"]),
)
def test_a_window_is_its_two_halves(
    tmp_path: Path, grid: Grid, split: int, row: int, col: int, kernel: str, dtype: str
) -> None:
    path = tmp_path / f"{dtype}.tif"
    if not path.exists():
        write(path, coordinates(70, 60, dtype))
    (asset,) = assets_of(path)
    (whole,) = read(Request(asset, grid, (Window(row, col, 20, 40),), kernel))
    (west,) = read(Request(asset, grid, (Window(row, col, 20, split),), kernel))
    (east,) = read(Request(asset, grid, (Window(row, col + split, 20, 40 - split),), kernel))
    values = np.concatenate([west.values, east.values], axis=2)[0]
    valid = np.concatenate([west.valid, east.valid], axis=2)[0]
    assert_same(whole, values, valid, exact=kernel == "nearest")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(-90, 120), col=st.integers(-90, 120), height=sizes, width=sizes)
def test_any_aligned_window_is_numpys(tmp_path: Path, row: int, col: int, height: int, width: int) -> None:
    path, pixels = tmp_path / "a.tif", coordinates(70, 60)
    if not path.exists():
        write(path, pixels)
    (asset,) = assets_of(path)
    window = Window(row, col, height, width)
    (block,) = read(Request(asset, own_grid(asset), (window,)))
    assert_same(block, *padded(pixels[0], np.ones((70, 60), bool), window))


def test_rotated_files_are_warped(tmp_path: Path) -> None:
    turned = Affine(9.4, 3.4, X0, 3.4, -9.4, Y0)
    path = write(tmp_path / "a.tif", coordinates(), turned)
    (asset,) = assets_of(path)
    grid, window = Grid(32633, X0, Y0, 10, 10), Window(-10, 10, 70, 60)
    for kernel in ("nearest", "bilinear"):
        (block,) = read(Request(asset, grid, (window,), kernel))
        assert_same(
            block, *oracle(path, grid, window, kernel, np.hypot(9.4, 3.4) / 10), exact=kernel == "nearest"
        )


def test_degrees_onto_metres(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif", coordinates(200, 200), Affine(1e-4, 0, 15, 0, -1e-4, 45.01), crs="EPSG:4326"
    )
    (asset,) = assets_of(path)
    grid, window = Grid(32633, 500_000, 4_984_000, 10, 10), Window(0, 0, 50, 50)
    (block,) = read(Request(asset, grid, (window,), "nearest"))
    assert_same(block, *oracle(path, grid, window, "nearest", 1.0))
    assert block.valid.all()


@pytest.mark.parametrize("path", ODD_FILES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_odd_files_read_as_rasterio_reads_them(path: Path) -> None:
    assets = assets_of(path)
    if not assets[0].epsg:
        with pytest.raises(ReadError, match="no CRS"):
            read(Request(assets[0], Grid(32633, 0, 0, 10, 10), (Window(0, 0, 5, 5),)))
        return
    window = Window(-2, -3, assets[0].image.height + 5, assets[0].image.width + 5)
    upright = assets[0].placement is None  # the others are compared with GDAL's warp in test_turned.py
    requests = [Request(x, own_grid(x), (window,)) for x in assets] if upright else []
    try:
        with rasterio.open(path) as ds:
            pixels, masks = ds.read(), ds.read_masks() > 0
    except rasterio.errors.RasterioIOError:
        with pytest.raises(ReadError, match="reading tile"):
            read(*requests)
        return
    up = slice(None, None, -1 if assets[0].image.transform[4] > 0 else 1)
    for band, block in enumerate(read(*requests) if requests else []):
        valid = masks[band] & (pixels[band] == pixels[band])
        assert_same(block, *padded(pixels[band][up], valid[up], window))


def test_a_truncated_file_is_an_error_that_names_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", coordinates(), compress="deflate")
    (asset,) = assets_of(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReadError, match=r"'B1' of record 'rec' \(.*a\.tif\)") as caught:
        read(Request(asset, own_grid(asset), (Window(0, 0, 100, 90),)))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_file_that_changed_is_an_error(tmp_path: Path, way: str) -> None:
    path = write(tmp_path / "a.tif", coordinates())
    (asset,) = assets_of(path)
    grid = own_grid(asset)
    write(path, coordinates(120, 90))
    with pytest.raises(ReadError, match="changed since it was indexed"):
        read(Request(asset, grid, (Window(0, 0, 5, 5),)))
    write(path, coordinates(dtype="int16"))  # of the same size
    if way == "gdal":
        with pytest.raises(ReadError, match="dtype int16; expected uint16"):
            read(Request(asset, grid, (Window(0, 0, 5, 5),)))
    path.unlink()
    with pytest.raises(ReadError, match="nothing there"):
        read(Request(asset, grid, (Window(0, 0, 5, 5),)))


def test_one_bad_file_fails_the_batch_and_the_session_closes(tmp_path: Path) -> None:
    good = assets_of(write(tmp_path / "a.tif", coordinates()))[0]
    bad = replace(good, href=str(tmp_path / "missing.tif"))
    with pytest.raises(ReadError, match=r"missing\.tif"), Session() as session:
        session.read_block([Request(x, own_grid(good), WINDOWS) for x in (good, bad)])


@pytest.mark.parametrize(
    "href", ["/vsicurl/http://host/a.tif", "vrt:///tmp/a.tif", "ftp://host/a.tif", "<VRTDataset/>", "a://b"]
)
def test_other_hrefs_are_refused(tmp_path: Path, href: str) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates()))
    with pytest.raises(ReadError, match="expected a local path"):
        RasterFile(replace(asset, href=href), 0).open()


def test_a_vrt_is_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", coordinates())
    (asset,) = assets_of(path)
    rasterio.shutil.copy(path, tmp_path / "b.vrt", driver="VRT")
    with pytest.raises(ReadError):
        read(Request(replace(asset, href=str(tmp_path / "b.vrt")), own_grid(asset), (Window(0, 0, 5, 5),)))


def test_secrets_stay_out_of_errors(tmp_path: Path) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates()))
    href = "http://user:hidden@127.0.0.1:9/a.tif?sig=hidden"
    with pytest.raises(ReadError) as caught:
        read(Request(replace(asset, href=href), own_grid(asset), WINDOWS))
    assert "hidden" not in f"{caught.value} {caught.value.__cause__}"
    assert public(href) == "http://127.0.0.1:9/a.tif"


class Ranges(BaseHTTPRequestHandler):
    """Serves byte ranges of a folder and remembers who asked for what."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: ClassVar[list[str]] = []

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        data = (self.folder / self.path.partition("?")[0].lstrip("/")).read_bytes()
        low, high = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            low, high = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
        part = data[low : high + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {low}-{low + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)


def test_files_behind_http_are_read_without_looking_for_sidecars(tmp_path: Path) -> None:
    pixels = coordinates()
    (asset,) = assets_of(write(tmp_path / "a.tif", pixels, compress="deflate"))
    asked: list[str] = []
    handler = type("Handler", (Ranges,), {"folder": tmp_path, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            remote = replace(asset, href=f"http://127.0.0.1:{server.server_port}/a.tif?sig=1")
            (block,) = read(Request(remote, own_grid(asset), (Window(5, 6, 70, 60),)))
        finally:
            server.shutdown()
            thread.join()
    assert_same(block, *padded(pixels[0], np.ones(pixels.shape[1:], bool), Window(5, 6, 70, 60)))
    assert set(asked) == {"/a.tif?sig=1"}


def test_a_host_is_looked_at_once_for_all_ranges_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A file of 64 bands has a range a tile and band: looking anew for each was half of a request's CPU."""
    assets = assets_of(write(tmp_path / "a.tif", coordinates(bands=6), compress="deflate", interleave="band"))
    asked: list[str] = []
    looked: list[str] = []

    def counted(url: str, doing: str) -> None:
        looked.append(url)
        check_host(url, doing)

    monkeypatch.setattr(web, "check_host", counted)
    monkeypatch.setattr(tilefile, "coalesced", partial(coalesced, most=1))  # a request a tile
    handler = type("Handler", (Ranges,), {"folder": tmp_path, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            href = f"http://127.0.0.1:{server.server_port}/a.tif"
            window = Window(5, 6, 70, 60)
            read(*(Request(replace(a, href=href), own_grid(a), (window,)) for a in assets))
        finally:
            server.shutdown()
            thread.join()
    if way == "ranges":
        assert len(asked) >= 6 * 15
        assert len(looked) == 1


def test_values_are_checked_at_the_door(tmp_path: Path) -> None:
    (asset,) = assets_of(write(tmp_path / "a.tif", coordinates()))
    grid = own_grid(asset)
    with pytest.raises(GridError, match="positive"):
        Grid(32633, 0, 0, 10, -10)
    with pytest.raises(GridError, match="at least one pixel"):
        Window(0, 0, 0, 5)
    with pytest.raises(GridError, match="one shape"):
        Request(asset, grid, (Window(0, 0, 4, 4), Window(0, 0, 5, 5)))
    with pytest.raises(GridError, match="at least one window"):
        Request(asset, grid, ())
    with pytest.raises(PlanError, match="smooth"):
        Request(asset, grid, (Window(0, 0, 4, 4),), "smooth")


def test_a_demand_above_the_budget_is_let_in_alone() -> None:
    budget = ByteBudget(10)
    with budget.hold(1000):
        pass
    with budget.hold(4), budget.hold(6):
        pass
