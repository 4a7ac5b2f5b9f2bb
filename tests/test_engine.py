"""Laws of the reading engine over real headers: rasterio's pixels whatever the file, each byte asked for once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Barrier, Thread, current_thread, main_thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pyproj
import pytest
import rasterio
import rasterio.shutil
import shapely
import xarray as xr
from affine import Affine
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioIOError
from servers import Asked, Fault, RangeServer
from test_reader import X0, Y0, assert_same, coordinates, oracle, own_grid, padded, read, write
from test_real_data import table_of
from test_write import layout_of
from waiting import PATIENCE_S, held_for

import rasteret_dask as rd
from rasteret_dask.errors import ReadError
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.net.limits import HOST_REQUESTS
from rasteret_dask.reader import engine, layout, placing, tilefile, warp
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.levels import is_aligned
from rasteret_dask.reader.pixelgrid import Grid, Rect, Window
from rasteret_dask.reader.placing import Block, Out
from rasteret_dask.reader.ranges import GAP_BYTES, SPAN_BYTES, Part, coalesced
from rasteret_dask.reader.readplan import Request, plan_read, tiles_of
from rasteret_dask.reader.sharing import SHARED, Keep, Key, Pixels, Sharing, Wish
from rasteret_dask.reader.wants import Want
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.tables import Turn
from rasteret_dask.rules.units import Scaled
from rasteret_dask.store.run import run_zarr
from rasteret_dask.table.records import Asset, Level
from rasteret_dask.tasks.context import ReadContext

Array = NDArray[Any]
ONE_FILE = HealthCheck.function_scoped_fixture  # every example overwrites the test's one file


def indexed(href: str | Path, kind: str | None = "reflectance", record: str = "rec") -> list[Asset]:
    """Return a file's bands as a record table has them: with what its header, read once, says."""
    header = read_headers([str(href)])[str(href)]
    assert isinstance(header, Header), header
    return [
        Asset(
            record, f"B{i + 1}", str(href), i, header.epsg or 0, 1.0, 0.0, "identity", header.nodata, header.dtype,
            "data", kind, header.size, header.etag, tuple(Level(**fields) for fields in header.levels_of(i)),
        )
        for i in range(header.samples)
    ]  # fmt: skip


def level_grid(asset: Asset, level: int) -> Grid:
    """Return the grid whose pixels are those of one level."""
    return own_grid(replace(asset, levels=(asset.levels[level],)))


def whole(path: Path, level: int = 0) -> tuple[Array, Array]:
    """Return what rasterio reads of a level, (band, y, x), northwards: pixels, and which are valid."""
    with rasterio.open(path) as ds:
        nodata = ds.nodata if MaskFlags.nodata in ds.mask_flag_enums[0] else None
    with rasterio.open(path, **({"OVERVIEW_LEVEL": level - 1} if level else {})) as ds:
        pixels, valid = ds.read(), ds.read_masks() > 0
        up = slice(None, None, -1 if ds.transform.e > 0 else 1)
    if nodata is not None:  # a JPEG 2000's overviews do not know it
        valid = pixels != nodata
    return pixels[:, up], (valid & (pixels == pixels))[:, up]


def part(block: Block, window: int) -> Block:
    return Block(block.values[window : window + 1], block.valid[window : window + 1])


def assert_level_is_rasterios(
    path: Path, assets: Sequence[Asset], windows: tuple[Window, ...], level: int = 0
) -> int:
    """All bands of a level, read in one batch on the level's own grid, are rasterio's bit for bit.

    Returns how many of the requests GDAL had to read.
    """
    pixels, valid = whole(path, level)
    requests = [Request(a, level_grid(a, level), windows, "average" if level else None) for a in assets]
    assert {tiles_of(r)[0] for r in requests} == {level}
    with Session() as session:
        blocks = session.read_block(requests)
    for band, block in enumerate(blocks):
        for i, window in enumerate(windows):
            assert_same(part(block, i), *padded(pixels[band], valid[band], window))
    return session.counts.gdal_fallback


# Any file, any window


PLAIN = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
DTYPES = (*PLAIN, "uint64", "int64", "complex64")
PREDICTING = ("lzw", "deflate", "zstd")
CODECS = ("none", *PREDICTING)
ODD_CODECS = ("packbits", "lzma", "lerc", "lerc_deflate", "jpeg", "webp")


@dataclass(frozen=True)
class Raster:
    """A GeoTIFF to be made; its options are GDAL's."""

    dtype: str
    height: int
    width: int
    bands: int
    options: tuple[tuple[str, Any], ...]
    nodata: float | None = None
    masked: bool = False
    sparse: bool = False
    south_up: bool = False
    overviews: tuple[int, ...] = ()
    seed: int = 0

    @property
    def pixels(self) -> Array:
        """Shape (band, y, x). Places and noise; nodata and, where sparse, a large hole of what is not stored."""
        rng = np.random.default_rng(self.seed)
        dtype = np.dtype(self.dtype)
        pixels = coordinates(self.height, self.width, "float64", self.bands)
        pixels += rng.integers(0, 1000, pixels.shape)
        if dtype.kind in "iu":
            top = min(2 ** int(dict(self.options).get("nbits", 62)) - 1, np.iinfo(dtype).max)
            pixels = pixels % top + max(np.iinfo(dtype).min, -500) * (dtype.kind == "i")
        else:
            pixels = pixels / 7
        made = pixels.astype(dtype)
        if self.nodata is not None:
            made[rng.random(made.shape) < 0.1] = self.nodata
        if self.sparse:
            made[:, self.height // 3 :, : self.width * 2 // 3] = 0 if self.nodata is None else self.nodata
        return made

    def write(self, path: Path) -> Path:
        path.unlink(missing_ok=True)
        Path(f"{path}.aux.xml").unlink(missing_ok=True)
        pixels = self.pixels
        mask = None
        if self.masked:
            mask = np.ones(pixels.shape[1:], bool)
            mask[self.height // 4 : self.height // 2 + 1, : self.width // 2] = False
        up = Affine(10, 0, X0, 0, 10, Y0 - 10 * self.height)
        options: dict[str, Any] = {
            "tiled": True,
            "blockxsize": None,
            "blockysize": None,
            **dict(self.options),
        }
        options = {k: v for k, v in options.items() if v is not None}
        with rasterio.open(
            path, "w", driver="GTiff", crs="EPSG:32633", count=self.bands, height=self.height,
            width=self.width, dtype=self.dtype, nodata=self.nodata,
            transform=up if self.south_up else Affine(10, 0, X0, 0, -10, Y0), **options,
        ) as ds:  # fmt: skip
            ds.write(pixels)
            if mask is not None:
                ds.write_mask(mask)
        if (
            self.overviews and options.get("endianness") != "big"
        ):  # GDAL 3.10 once looped for ever over such a file
            with rasterio.open(path, "r+") as ds:
                ds.build_overviews(self.overviews, Resampling.average)
        return path


@st.composite
def rasters(draw: st.DrawFn, odd: bool = False, overviews: bool = False) -> Raster:
    """Draw a file: of the kinds that are decoded here, or (odd) of those that only GDAL reads."""
    codec = draw(st.sampled_from(ODD_CODECS if odd else CODECS))
    dtype, bands = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 4))
    size = st.integers(1, 12).map(lambda n: 8 * n) if overviews else st.integers(1, 100)
    options: dict[str, Any] = {
        "compress": codec,
        "interleave": draw(st.sampled_from(["pixel", "band"])),
        "photometric": "minisblack",
        "bigtiff": draw(st.sampled_from(["yes", "no"])),
        "endianness": draw(st.sampled_from(["little", "big"])),
    }
    if codec == "jpeg":
        dtype = "uint8"
    elif codec == "webp":
        dtype, bands = "uint8", 3
        options |= {"interleave": "pixel", "photometric": "rgb", "webp_lossless": True}
    elif codec.startswith("lerc"):
        dtype = draw(st.sampled_from(PLAIN))
    predictors = [1] if codec not in PREDICTING or dtype.startswith("complex") else [1, 2]
    if codec in PREDICTING and dtype.startswith("float"):
        predictors.append(3)
    options["predictor"] = draw(st.sampled_from(predictors))
    if odd and codec not in ("webp", "jpeg") and draw(st.booleans()):
        options |= {"tiled": False, "blockysize": draw(st.integers(1, 30))}
    else:
        side = st.sampled_from([16, 32, 48, 64])
        options |= {"blockxsize": draw(side), "blockysize": draw(side)}
    if options["predictor"] == 1:
        del options["predictor"]
    masked = draw(st.booleans())
    nodata: float | None = None
    if not masked and not dtype.startswith("complex"):
        special = [np.nan] if dtype.startswith("float") else []
        nodata = draw(st.sampled_from([None, 0.0, 7.0, *special]))
    sparse = draw(st.booleans())
    if sparse:
        options["sparse_ok"] = True
    return Raster(
        dtype, draw(size), draw(size), bands, tuple(sorted(options.items())), nodata, masked, sparse,
        draw(st.booleans()), draw(st.sampled_from([(2,), (2, 4)])) if overviews else (),
        draw(st.integers(0, 5)),
    )  # fmt: skip


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, ...]:
    """Draw windows of one shape that may hang over any edge."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    corner = st.integers(-40, 110)
    places = draw(st.lists(st.tuples(corner, corner), min_size=1, max_size=4))
    return tuple(Window(row, col, height, width) for row, col in places)


@pytest.fixture(autouse=True)
def internal_masks() -> Any:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        yield


@settings(max_examples=150, deadline=None, suppress_health_check=[ONE_FILE])
@given(raster=rasters(), wanted=windows())
def test_any_aligned_window_of_any_tiled_file(
    tmp_path: Path, raster: Raster, wanted: tuple[Window, ...]
) -> None:
    path = raster.write(tmp_path / "a.tif")
    by_gdal = assert_level_is_rasterios(path, indexed(path), wanted)
    differences_of_floats = dict(raster.options).get("predictor") == 2 and raster.dtype.startswith("float")
    assert by_gdal == (raster.bands if differences_of_floats else 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[ONE_FILE])
@given(raster=rasters(odd=True), wanted=windows())
def test_any_aligned_window_of_files_that_gdal_reads_for_us(
    tmp_path: Path, raster: Raster, wanted: tuple[Window, ...]
) -> None:
    path = raster.write(tmp_path / "a.tif")
    assert assert_level_is_rasterios(path, indexed(path), wanted) == raster.bands


@settings(max_examples=60, deadline=None, suppress_health_check=[ONE_FILE])
@given(raster=rasters(overviews=True), wanted=windows(), data=st.data())
def test_any_aligned_window_of_any_overview(
    tmp_path: Path, raster: Raster, wanted: tuple[Window, ...], data: st.DataObject
) -> None:
    path = raster.write(tmp_path / "a.tif")
    assets = indexed(path)
    kinds = [level.kind for level in assets[0].levels]
    assume("overview" in kinds)  # GDAL makes none of what fits one block
    level = data.draw(st.sampled_from([i for i, kind in enumerate(kinds) if kind == "overview"]))
    assert_level_is_rasterios(path, assets, wanted, level)


@pytest.mark.parametrize(
    ("dtype", "nbits"), [("uint8", 1), ("uint8", 4), ("uint16", 12), ("uint32", 20), ("float32", 16)]
)
def test_odd_bit_depths(tmp_path: Path, dtype: str, nbits: int) -> None:
    """``nbits=16`` of float32 is a file of half-precision floats, whose pixels GDAL gives as float32."""
    options = (("blockxsize", 32), ("blockysize", 16), ("compress", "deflate"), ("nbits", nbits))
    path = Raster(dtype, 70, 90, 2, options).write(tmp_path / "a.tif")
    assert_level_is_rasterios(path, indexed(path), (Window(-3, 5, 40, 60), Window(30, 40, 40, 60)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_files_of_the_cog_driver(tmp_path: Path, masked: bool, sparse: bool, interleave: str) -> None:
    """Its overviews come first, masks lie between tiles, and a tile has its length before and after it."""
    options = (("blockxsize", 64), ("blockysize", 64))
    plain = Raster("uint16", 300, 280, 2, options, masked=masked, sparse=sparse).write(tmp_path / "plain.tif")
    path = tmp_path / "cog.tif"
    profile: dict[str, Any] = {
        "blocksize": 64,
        "compress": "zstd",
        "predictor": "yes",
        "interleave": interleave,
    }
    rasterio.shutil.copy(plain, path, driver="COG", sparse_ok=sparse, **profile)
    assets = indexed(path)
    assert [level.kind for level in assets[0].levels].count("overview") == 3
    for level in range(4):
        size = 300 >> level
        places = (Window(-3, 5, size, size), Window(size // 2, size // 2, size, size))
        assert_level_is_rasterios(path, assets, places, level)


# Any grid


grids = st.one_of(
    st.builds(
        lambda x, y, r: Grid(32633, x, y, r, r),
        st.floats(X0 - 50, X0 + 50), st.floats(Y0 - 50, Y0 + 50), st.sampled_from([3.3, 10.0, 15.0, 30.0, 41.0]),
    ),
    st.builds(
        lambda x, y, r: Grid(32634, x, y, r, r),
        st.floats(28_200, 28_400), st.floats(5_017_300, 5_017_600), st.sampled_from([10.0, 20.0]),
    ),
)  # fmt: skip
WARPED = ("uint8", "int8", "int16", "uint16", "int32", "float32", "float64")


@settings(max_examples=80, deadline=None, suppress_health_check=[ONE_FILE])
@given(
    raster=rasters(overviews=True),
    dtype=st.sampled_from(WARPED),
    grid=grids,
    wanted=windows(),
    kernel=st.sampled_from(["nearest", "bilinear", "cubic", "average"]),
)
def test_any_warped_window_is_gdals_over_the_whole_file(
    tmp_path: Path, raster: Raster, dtype: str, grid: Grid, wanted: tuple[Window, ...], kernel: str
) -> None:
    assume(raster.nodata is None or raster.nodata == raster.nodata)
    options = tuple(o for o in raster.options if o[0] != "predictor")
    bands = raster.bands if raster.nodata is None else 1  # of several, GDAL drops what is nodata in all
    raster = replace(raster, dtype=dtype, bands=bands, options=options)
    path = raster.write(tmp_path / "a.tif")
    assets = indexed(path)
    assume(not is_aligned(assets[0], grid))
    assume(not (raster.south_up and kernel == "average"))  # there GDAL calls pixels beyond the edge valid
    requests = [Request(a, grid, wanted, kernel) for a in assets]
    level = tiles_of(requests[0])[0]
    scale = assets[0].levels[level].transform[0] / grid.xres
    for band, block in enumerate(read(*requests)):
        for i, window in enumerate(wanted):
            values, valid = oracle(path, grid, window, kernel, scale, level - 1, band + 1)
            values = values.astype(dtype)  # beside an alpha band GDAL widens int8
            assert_same(part(block, i), values, valid, exact=kernel == "nearest")


@settings(max_examples=80, deadline=None, suppress_health_check=[ONE_FILE])
@given(
    raster=rasters(),
    grid=st.one_of(st.none(), grids),
    wanted=windows(),
    fill=st.sampled_from([0.0, 9.0, None]),
    scaled=st.booleans(),
    garbage=st.sampled_from([0, 77]),
)
def test_every_pixel_of_given_memory_is_written(
    tmp_path: Path,
    raster: Raster,
    grid: Grid | None,
    wanted: tuple[Window, ...],
    fill: float | None,
    scaled: bool,
    garbage: int,
) -> None:
    """Whatever the memory held: what is valid has its value, in the output's terms, what is not has the fill."""
    assume(grid is None or raster.dtype in WARPED)
    assets = indexed(raster.write(tmp_path / "a.tif"))
    requests = [Request(a, grid or own_grid(a), wanted) for a in assets]
    rule = None
    if scaled and raster.dtype != "complex64":
        rule = Turn(Scaled(), Radiometry(1e-4, -0.1, "item"), StoredForm("float32", None))
    dtype, fill = ("float32", np.nan) if rule else (raster.dtype, fill)
    shape = (len(assets), len(wanted), wanted[0].height, wanted[0].width)
    values, valid = np.full(shape, garbage, dtype), np.full(shape, bool(garbage))
    with Session() as session:
        session.read_into(
            requests, [Out(list(v), list(k), fill, rule) for v, k in zip(values, valid, strict=True)]
        )
    for band, block in enumerate(read(*requests)):
        np.testing.assert_array_equal(valid[band], block.valid)
        expected = block.values
        if rule is not None:
            expected = (expected.astype(np.float64) * 1e-4 - 0.1).astype(np.float32)
        if fill is not None:
            expected = np.where(block.valid, expected, np.array(fill, dtype))
        known = block.valid if fill is None else np.ones(block.valid.shape, bool)
        np.testing.assert_array_equal(values[band][known], expected[known])


@settings(max_examples=80, deadline=None, suppress_health_check=[ONE_FILE])
@given(raster=rasters(), wanted=windows(), grid=st.one_of(st.none(), grids))
def test_bands_that_share_their_validity_narrow_it_together(
    tmp_path: Path, raster: Raster, wanted: tuple[Window, ...], grid: Grid | None
) -> None:
    """A chip's validity is where all bands are valid, whether their tiles hold one band or all."""
    assume(grid is None or raster.dtype in WARPED)
    assets = indexed(raster.write(tmp_path / "a.tif"))
    requests = [Request(a, grid or own_grid(a), wanted) for a in assets]
    shape = (len(wanted), wanted[0].height, wanted[0].width)
    values, valid = np.empty((len(assets), *shape), raster.dtype), np.ones(shape, bool)
    common = [True] * len(wanted)
    with Session() as session:
        session.read_into(requests, [Out(list(v), list(valid), 9, None, common) for v in values])
    blocks = read(*requests)
    np.testing.assert_array_equal(valid, np.logical_and.reduce([block.valid for block in blocks]))
    for made, block in zip(values, blocks, strict=True):
        np.testing.assert_array_equal(made, np.where(block.valid, block.values, np.array(9, raster.dtype)))


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Return a list that takes the arguments of every call of a function."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(owner, name, noted)
    return calls


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("grid", ["own", "shifted"])
def test_windows_are_laid_out_once_for_all_bands_and_nodata_is_looked_for_once_a_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interleave: str, grid: str
) -> None:
    """Eight bands over 36 windows and some tiles: one plan, one layout, one look a tile, none a window."""
    write(tmp_path / "a.tif", coordinates(64, 64, bands=8), nodata=60_000, interleave=interleave)
    assets = indexed(tmp_path / "a.tif")
    wanted = tuple(Window(row, col, 10, 10) for row in range(0, 60, 10) for col in range(0, 60, 10))
    aligned = own_grid(assets[0])
    pixels = aligned if grid == "own" else replace(aligned, x0=aligned.x0 + 5)
    plans, layouts = calls_of(monkeypatch, layout, "plan_read"), calls_of(monkeypatch, layout, "layout")
    looks = calls_of(monkeypatch, placing, "extremes")
    scans = calls_of(monkeypatch, placing, "valid_pixels")
    puts = calls_of(monkeypatch, placing.PendingRead, "put")
    warp._pairs.cache_clear()
    read(*[Request(asset, pixels, wanted) for asset in assets])
    assert len(plans) == len(layouts) == 1
    tiles = layout.layout(plan_read(plans[0][0]), wanted, assets[0].levels[0])
    # what is copied as it stands needs no look at all
    assert len(puts) == (0 if grid == "own" else 8 * sum(len(part.cuts) for part in tiles.values()))
    if grid == "own":
        assert len(looks) == len(tiles) * (1 if interleave == "pixel" else 8)
    assert scans == []
    assert warp._pairs.cache_info().currsize == (
        0 if grid == "own" else len(wanted)
    )  # a kernel's weights, a window


@pytest.mark.parametrize("nodata", [0, 65535])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_nodata_at_the_end_of_a_dtype_takes_one_look_at_a_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interleave: str, nodata: int
) -> None:
    """The least and the greatest number are asked for only where both can tell something."""
    pixels = coordinates(64, 64, bands=3)
    pixels[1, 20:30] = nodata
    write(tmp_path / "a.tif", pixels, nodata=nodata, interleave=interleave)
    assets = indexed(tmp_path / "a.tif")
    windows = tuple(Window(row, 0, 16, 64) for row in range(0, 64, 16))
    masked = calls_of(monkeypatch, placing, "has_mask")
    both, one = (
        calls_of(monkeypatch, placing, "extremes"),
        calls_of(monkeypatch, placing.LandedTile, "_touches"),
    )
    blocks = read(*[Request(asset, own_grid(asset), windows) for asset in assets])
    assert both == []
    assert len(masked) == len(assets)  # not for every tile and window again
    tiles = len(
        layout.layout(plan_read(Request(assets[0], own_grid(assets[0]), windows)), windows, assets[0].image)
    )
    assert len(one) == tiles * len(assets)
    for block, band in zip(blocks, pixels, strict=True):
        np.testing.assert_array_equal(block.valid.reshape(64, 64), band != nodata)
        np.testing.assert_array_equal(block.values.reshape(64, 64), band)


def test_a_file_is_sent_for_before_the_next_ones_tiles_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already is put to its places after all have been sent for, and when others may depart again."""
    requests, order = [], list[str]()
    for name in "ab":
        write(tmp_path / f"{name}.tif", coordinates(64, 64))
        (asset,) = indexed(tmp_path / f"{name}.tif")
        requests.append(Request(asset, own_grid(asset), (Window(0, 0, 64, 64),)))
    tiles = len(tiles_of(requests[0])[1])
    asked, sent, put = Sharing.join, tilefile.bring, Want.paste

    def join(self: Sharing, key: Key, *rest: Any) -> Any:
        order.append(Path(key[0]).stem)
        return asked(self, key, *rest)

    def bring(asset: Asset, *rest: Any) -> None:
        order.append(f"send for {Path(asset.href).stem}")
        sent(asset, *rest)

    def paste(self: Want, pixels: Pixels) -> None:
        departing.append(SHARED.departure.locked() and current_thread() is main_thread())
        put(self, pixels)

    departing: list[bool] = []
    monkeypatch.setattr(Sharing, "join", join)
    monkeypatch.setattr(engine, "bring", bring)
    monkeypatch.setattr(Want, "paste", paste)
    with Session() as session:
        session.read_block(requests, keep=requests)
        assert order == [*["a"] * tiles, "send for a", *["b"] * tiles, "send for b"]
        order.clear()
        session.read_block(requests)
    assert order == [*["a"] * tiles, *["b"] * tiles]  # all of it had been kept
    assert len(departing) == 4 * tiles
    assert not any(departing)


# Real files with every oddity


EDGE_CASES = Path(
    os.environ.get("RASTERET_DASK_DATA", Path(__file__).parents[2] / "shared" / "data"), "edge_cases"
)
NOT_SERVED = {
    "odcgeo_au-3577-rotated.tif": "placement='rotated'",
    "odcgeo_au-gcp.tif": "placement='gcps'",
    "gdal_cog_sparse_strile_arrays_zeroified_when_possible.tif": "no geotransform",
}
"""Files whose pixels are on no north-up grid, and how the header says so; of the first two, see test_turned.py."""


@pytest.mark.parametrize("path", sorted(EDGE_CASES.glob("*.[tj][ip][f2]")), ids=lambda p: p.name)
def test_every_level_of_odd_files_is_rasterios(path: Path) -> None:
    if path.name in NOT_SERVED:
        assert NOT_SERVED[path.name] in str(read_headers([str(path)])[str(path)])
        return
    assets = indexed(path)
    for number, level in enumerate(assets[0].levels):
        if level.kind not in ("image", "overview"):
            continue
        height, width = level.height, level.width
        places = (
            Window(-2, -3, height + 5, width + 5),
            Window(height // 3, width // 2, height + 5, width + 5),
        )
        try:
            whole(path, number)
        except RasterioIOError:
            with pytest.raises(ReadError, match=r"tile \d+"):
                read(*(Request(a, level_grid(a, number), places) for a in assets))
        else:
            assert_level_is_rasterios(path, assets, places, number)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_tile_tables_that_are_mostly_zeros(data: Path, tmp_path: Path) -> None:
    """The file has no CRS; given one, its tiles stay where they were."""
    path = tmp_path / "sparse.tif"
    path.write_bytes((data / "edge_cases" / f"{next(n for n in NOT_SERVED if 'sparse' in n)}").read_bytes())
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as ds:
        ds.crs, ds.transform = "EPSG:32633", Affine(10, 0, X0, 0, -10, Y0)
    assets = indexed(path)
    assert_level_is_rasterios(path, assets, (Window(-2, -3, assets[0].image.height + 5, 300),))


# What is asked for, over HTTP


def served(server: RangeServer, name: str, **kinds: Any) -> list[Asset]:
    """Return the assets of a served file; reading its header does not count."""
    assets = indexed(server.url(name), **kinds)
    server.forget()
    return assets


def needed(requests: Iterable[Request]) -> dict[str, set[tuple[int, int]]]:
    """Return {href: (first, last) byte of every tile that the requests touch}, from the headers alone."""
    found: dict[str, set[tuple[int, int]]] = {}
    for request in requests:
        number, tiles = tiles_of(request)
        level = request.asset.levels[number]
        places = {
            (level.tile_offsets[t], level.tile_offsets[t] + level.tile_byte_counts[t] - 1) for t in tiles
        }
        found.setdefault(request.asset.href, set()).update(places)
    return found


def assert_each_tile_is_asked_for_once(server: RangeServer, requests: Sequence[Request]) -> list[Asked]:
    """Every request is a range from the first byte of a needed tile to the last of one; every tile is in one."""
    asked = server.asked()
    assert {(a.method, a.status) for a in asked} <= {("GET", 206)}
    for href, tiles in needed(requests).items():
        spans = [(a.first, a.last) for a in asked if server.url(a.path.lstrip("/")) == href]
        firsts, lasts = ({t[end] for t in tiles} for end in (0, 1))
        for first, last in spans:
            assert first in firsts
            assert last in lasts
        for low, high in tiles:
            assert (
                sum(first <= low and high <= last for first, last in spans if first is not None and last) == 1
            )
    assert {server.url(a.path.lstrip("/")) for a in asked} <= {
        h for h, tiles in needed(requests).items() if tiles
    }
    return asked


def read_counted(server: RangeServer, requests: Sequence[Request], calls: int = 1) -> tuple[list[Block], Any]:
    """Read in one session, in so many calls, and hold its counts against the server's log."""
    with Session() as session:
        size = -(-len(requests) // calls)
        steps = [requests[i : i + size] for i in range(0, len(requests), size)]
        blocks = []
        for i, step in enumerate(steps):
            blocks += session.read_block(step, keep=[r for later in steps[i + 1 :] for r in later])
        counts = session.counts
    asked = server.asked()
    assert counts.requests == len(asked)
    assert counts.bytes_fetched == sum(a.nbytes for a in asked)
    return blocks, counts


def together(*batches: Sequence[Request]) -> list[list[Block] | BaseException]:
    """Read batches at the same time, each in a session of its own."""

    start = Barrier(len(batches))

    def one(batch: Sequence[Request]) -> list[Block] | BaseException:
        start.wait(PATIENCE_S)
        try:
            return read(*batch)
        except ReadError as error:
            return error

    with ThreadPoolExecutor(len(batches)) as threads:
        return list(threads.map(one, batches))


def noise(height: int, width: int, bands: int = 1, dtype: str = "uint16") -> Array:
    """Shape (band, y, x). Numbers that no codec makes smaller."""
    return np.random.default_rng(1).integers(1, np.iinfo(dtype).max, (bands, height, width)).astype(dtype)


SCATTERED = (Window(-5, -5, 40, 40), Window(10, 3, 40, 40), Window(60, 20, 40, 40), Window(12, 5, 40, 40))


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_each_tile_is_asked_for_once(server: RangeServer, interleave: str, calls: int) -> None:
    """Windows that overlap, bands, an aligned and a shifted grid, one call or several: one session."""
    pixels = coordinates(bands=2)
    requests = []
    for name in ("a.tif", "b.tif"):
        write(server.folder / name, pixels, compress="deflate", predictor=2, interleave=interleave)
        for asset in indexed(server.url(name)):
            grid = own_grid(asset)
            requests += [Request(asset, g, SCATTERED) for g in (grid, replace(grid, x0=grid.x0 + 5))]
    server.forget()
    blocks, counts = read_counted(server, requests, calls)
    assert_each_tile_is_asked_for_once(server, requests)
    assert counts.gdal_fallback == 0
    assert_same(part(blocks[0], 1), *padded(pixels[0], np.ones(pixels.shape[1:], bool), SCATTERED[1]))


def test_the_overview_is_asked_for_and_not_the_image(server: RangeServer) -> None:
    write(server.folder / "a.tif", noise(128, 128), overviews=[2, 4])
    (asset,) = served(server, "a.tif")
    requests = [Request(asset, level_grid(asset, 2), (Window(0, 0, 32, 32),), "average")]
    read_counted(server, requests)
    assert assert_each_tile_is_asked_for_once(server, requests)
    assert tiles_of(requests[0])[0] == 2


def test_neighbouring_tiles_come_together(server: RangeServer) -> None:
    write(server.folder / "a.tif", coordinates(160, 160), blockxsize=16, blockysize=16, compress="deflate")
    (asset,) = served(server, "a.tif")
    requests = [Request(asset, own_grid(asset), (Window(0, 0, 160, 160),))]
    read_counted(server, requests)
    assert len(tiles_of(requests[0])[1]) == 100
    assert len(assert_each_tile_is_asked_for_once(server, requests)) == 1


def test_no_request_is_longer_than_its_bound(server: RangeServer) -> None:
    pixels = noise(1280, 2048)
    write(server.folder / "a.tif", pixels, blockxsize=128, blockysize=128)  # 160 tiles of 32 kB
    (asset,) = served(server, "a.tif")
    requests = [Request(asset, own_grid(asset), (Window(0, 0, 1280, 2048),))]
    (block,), _ = read_counted(server, requests)
    asked = assert_each_tile_is_asked_for_once(server, requests)
    assert max(a.nbytes for a in asked) <= SPAN_BYTES
    assert len(asked) <= -(-pixels.nbytes // (SPAN_BYTES - 32768))
    assert_same(block, pixels[0], np.ones(pixels.shape[1:], bool))


def test_tiles_far_apart_are_asked_for_apart(server: RangeServer) -> None:
    write(server.folder / "a.tif", noise(512, 512), blockxsize=64, blockysize=64)  # 64 tiles of 8 kB
    (asset,) = served(server, "a.tif")
    requests = [Request(asset, own_grid(asset), (Window(0, 0, 8, 8), Window(500, 500, 8, 8)))]
    _, counts = read_counted(server, requests)
    assert len(assert_each_tile_is_asked_for_once(server, requests)) == 2
    assert counts.bytes_fetched == 2 * 64 * 64 * 2


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=30),
    gap=st.integers(0, 40),
    most=st.integers(1, 120),
)
def test_ranges_put_together_hold_every_part_and_keep_their_bounds(
    places: list[tuple[int, int]], gap: int, most: int
) -> None:
    parts = [Part(start, length, number) for number, (start, length) in enumerate(places)]
    spans = list(coalesced(parts, gap, most))
    assert sorted(p.what for s in spans for p in s.parts) == list(range(len(parts)))
    for span in spans:
        own = sorted(span.parts, key=lambda p: p.start)
        assert span.start == own[0].start
        assert span.start + span.length == max(p.stop for p in own)
        assert len(own) == 1 or span.length <= most
        reach = np.maximum.accumulate([p.stop for p in own])
        assert all(p.start - stop <= gap for p, stop in zip(own[1:], reach, strict=False))


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_bands_of_one_file_share_requests(server: RangeServer, interleave: str) -> None:
    """A chunky tile holds all bands; planes that lie near each other in the file are read over the gap."""
    write(server.folder / "a.tif", noise(16, 32, 4), interleave=interleave)
    requests = [Request(a, own_grid(a), (Window(0, 0, 16, 32),)) for a in served(server, "a.tif")]
    blocks, counts = read_counted(server, requests)
    assert len(server.asked()) == 1
    assert counts.tiles_read == (1 if interleave == "pixel" else 4)
    for band, block in enumerate(blocks):
        np.testing.assert_array_equal(block.values[0], noise(16, 32, 4)[band])


@pytest.mark.parametrize("nodata", [None, 7])
def test_sparse_tiles_are_not_asked_for(server: RangeServer, nodata: float | None) -> None:
    write(server.folder / "a.tif", coordinates(64, 64), SPARSE_OK=True, nodata=nodata)  # one tile of 8
    (asset,) = served(server, "a.tif")
    grid = own_grid(asset)
    (block,), _ = read_counted(server, [Request(asset, grid, (Window(20, 40, 30, 20),))])
    assert server.log == []
    assert block.valid.all() == (nodata is None)
    assert not block.valid.any() or (block.values == 0).all()
    requests = [Request(asset, grid, (Window(0, 0, 64, 64),))]
    read_counted(server, requests)
    assert len(assert_each_tile_is_asked_for_once(server, requests)) == 1


def test_windows_beyond_the_raster_ask_for_nothing(server: RangeServer) -> None:
    write(server.folder / "a.tif", coordinates())
    (asset,) = served(server, "a.tif")
    (block,), _ = read_counted(server, [Request(asset, own_grid(asset), (Window(500, 500, 9, 9),))])
    assert not block.valid.any()
    assert server.log == []


@pytest.mark.parametrize("sessions", [1, 4])
def test_requests_are_under_way_together_but_not_too_many(server: RangeServer, sessions: int) -> None:
    """100 tiles of 100 files, answered no sooner than many wait; the bound is the process's, not the session's."""
    write(server.folder / "a.tif", coordinates(16, 32))
    (asset,) = served(server, "a.tif")
    requests = []
    for n in range(100):
        os.link(server.folder / "a.tif", server.folder / f"{n}.tif")
        href = server.url(f"{n}.tif")
        requests.append(Request(replace(asset, href=href), own_grid(asset), (Window(0, 0, 16, 32),)))
    server.fault("*", Fault(together=HOST_REQUESTS // 2, delay_s=0.2))
    for blocks in together(*(requests[n::sessions] for n in range(sessions))):
        assert isinstance(blocks, list)
    assert len(server.log) == 100
    assert HOST_REQUESTS // 2 <= server.most <= HOST_REQUESTS
    assert server.connections <= HOST_REQUESTS


@pytest.mark.parametrize(
    "options", [{"compress": "lerc"}, {"tiled": False, "blockysize": 8}], ids=["lerc", "strips"]
)
def test_what_gdal_reads_is_counted(server: RangeServer, options: dict[str, Any]) -> None:
    pixels = coordinates()
    profile = {"blockxsize": None, "blockysize": None, **options} if "tiled" in options else options
    write(server.folder / "a.tif", pixels, **{k: v for k, v in profile.items() if v is not None})
    (asset,) = served(server, "a.tif")
    with Session() as session:
        (block,) = session.read_block([Request(asset, own_grid(asset), (Window(3, 4, 60, 50),))])
        assert session.counts.gdal_fallback == 1
    assert_same(block, *padded(pixels[0], np.ones(pixels.shape[1:], bool), Window(3, 4, 60, 50)))
    assert {a.path for a in server.log} == {"/a.tif"}


def test_a_bucket_is_read_like_a_web_server(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers s3:// too: unsigned requests for ``/<bucket>/<key>``."""
    (server.folder / "bucket").mkdir()
    pixels = coordinates(bands=2)
    write(server.folder / "bucket" / "a.tif", pixels, compress="zstd", predictor=2)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url().rstrip("/"))
    assets = indexed("s3://bucket/a.tif")
    server.forget()
    requests = [Request(a, own_grid(a), (Window(3, 4, 60, 50),)) for a in assets]
    blocks, counts = read_counted(server, requests)
    assert counts.gdal_fallback == 0
    assert {a.path for a in server.asked()} == {"/bucket/a.tif"}
    for band, block in enumerate(blocks):
        assert_same(block, *padded(pixels[band], np.ones(pixels.shape[1:], bool), Window(3, 4, 60, 50)))


# A whole job


MONTHS, BANDS, TILE, CHIP = 6, ("blue", "green", "red", "nir"), 64, 16
CELLS = ((0, 0), (0, 4), (1, 1), (2, 1), (2, 2), (3, 4), (4, 0), (4, 3))
"""(row, col) of the tiles that the job wants, of 5 x 5."""


@cache
def scene(month: int, band: int) -> Array:
    """Shape (1, y, x)."""
    return np.random.default_rng([month, band]).integers(1, 5000, (1, 5 * TILE, 5 * TILE)).astype("uint16")


@pytest.fixture
def series(server: RangeServer) -> rd.Collection:
    """Return six dates of four bands, a file each, indexed over HTTP."""
    rows = {}
    for month in range(MONTHS):
        assets = {}
        for b, band in enumerate(BANDS):
            name = f"{month}-{band}.tif"
            options: dict[str, Any] = {"compress": "deflate", "predictor": 2, "nodata": 0}
            write(server.folder / name, scene(month, b), blockxsize=TILE, blockysize=TILE, **options)
            assets[band] = {
                "href": server.url(name),
                "band_index": 0,
                "scale": 1.0,
                "offset": 0.0,
                "nodata": 0.0,
            }
        rows[f"s{month}"] = (f"2024-{month + 1:02}-10T10:00:00", assets)
    made = rd.build_from_table(table_of(rows), name="s2")
    server.forget()
    return made


def boxes() -> list[shapely.Geometry]:
    """Return the wanted tiles in lon/lat, a little smaller than they are."""
    metres = [
        shapely.box(X0 + 640 * col + 20, Y0 - 640 * row - 620, X0 + 640 * col + 620, Y0 - 640 * row - 20)
        for row, col in CELLS
    ]
    move = pyproj.Transformer.from_crs(32633, 4326, always_xy=True).transform
    return [shapely.transform(box, lambda p: np.stack(move(p[:, 0], p[:, 1]), -1)) for box in metres]


def assert_series(chips: xr.Dataset) -> None:
    """Every chip's pixels are those that were written."""
    for pixels, bounds in zip(chips["pixels"].values, chips["bounds"].values, strict=True):
        row, col = round((Y0 - bounds[3]) / 10), round((bounds[0] - X0) / 10)
        for month in range(MONTHS):
            for band in range(len(BANDS)):
                wanted = scene(month, band)[0, row : row + CHIP, col : col + CHIP]
                np.testing.assert_array_equal(pixels[month, band], wanted)


def chips_of(series: rd.Collection) -> rd.Chips:
    raw = series.harmonize(bands=list(BANDS), units="raw", resolution=10, time="1MS")
    return raw.chips(size=CHIP, grid="tiles", aoi=boxes())


def tile_ranges(series: rd.Collection) -> dict[str, list[tuple[int, int]]]:
    """Return {href: (first, last) byte of each wanted tile}."""
    table = series.to_table()
    found = {}
    for assets, headers in zip(
        *(table.column(c).to_pylist() for c in ("assets", "headers_metadata")), strict=True
    ):
        for band, (level,) in headers:
            ends = [
                (level["tile_offsets"][t], level["tile_byte_counts"][t])
                for t in (5 * r + c for r, c in CELLS)
            ]
            found[dict(assets)[band]["href"]] = [(first, first + count - 1) for first, count in ends]
    return found


def assert_one_request_a_tile(server: RangeServer, series: rd.Collection) -> None:
    """192 tiles, at most a request each; no header, nothing twice."""
    asked, tiles = server.asked(), tile_ranges(series)
    assert {(a.method, a.status) for a in asked} == {("GET", 206)}
    assert sum(map(len, tiles.values())) == 192 >= len(asked)
    for href, wanted in tiles.items():
        spans = [(a.first, a.last) for a in asked if server.url(a.path.lstrip("/")) == href]
        assert {low for low, _ in spans} <= {first for first, _ in wanted}
        assert {high for _, high in spans} <= {last for _, last in wanted}
        for first, last in wanted:
            assert sum(low <= first and last <= high for low, high in spans if low is not None and high) == 1


def test_a_job_asks_for_each_tile_once(server: RangeServer, series: rd.Collection, tmp_path: Path) -> None:
    chips = chips_of(series)
    assert len(chips) == 128
    lazy = chips.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    assert server.log == []  # planning reads nothing
    assert_series(lazy.compute(scheduler="threads"))
    assert_one_request_a_tile(server, series)
    server.forget()
    chips.to_zarr(tmp_path / "chips.zarr", progress=False)
    assert_one_request_a_tile(server, series)
    assert_series(xr.open_zarr(tmp_path / "chips.zarr", mask_and_scale=False).load())


# What sessions of one process share


def test_sessions_at_the_same_time_ask_for_a_tile_once(server: RangeServer) -> None:
    """Each of 16 tiles is wanted by up to four sessions; a tile has more bytes than are read over as a gap."""
    pixels = noise(512, 576)
    write(server.folder / "a.tif", pixels, blockxsize=144, blockysize=128)
    (asset,) = served(server, "a.tif")
    assert min(asset.image.tile_byte_counts) > GAP_BYTES
    places = [Window(128 * row, 144 * col, 256, 288) for row in range(3) for col in range(3)]
    batches = [[Request(asset, own_grid(asset), (window,))] for window in places]
    with held_for(9 * 4, server):
        found = together(*batches)
    assert_each_tile_is_asked_for_once(server, [request for batch in batches for request in batch])
    for window, blocks in zip(places, found, strict=True):
        assert isinstance(blocks, list)
        assert_same(blocks[0], *padded(pixels[0], np.ones(pixels.shape[1:], bool), window))


def test_a_session_that_fails_leaves_the_others_their_tiles(server: RangeServer) -> None:
    """One of two sessions fails at once on another file; the other gets what both had asked for."""
    pixels = noise(64, 64)
    for name in ("a.tif", "b.tif"):
        write(server.folder / name, pixels)
    good, bad = indexed(server.url("a.tif"))[0], indexed(server.url("b.tif"))[0]
    server.fault("b.tif", Fault(status=403))
    wanted = Request(good, own_grid(good), (Window(0, 0, 64, 64),))
    with held_for(3 * len(tiles_of(wanted)[1]), server, "a.tif"):
        failed, *others = together(
            [wanted, Request(bad, own_grid(bad), (Window(0, 0, 64, 64),))], [wanted], [wanted]
        )
    assert isinstance(failed, ReadError)
    for blocks in others:
        assert isinstance(blocks, list)
        assert_same(blocks[0], pixels[0], np.ones((64, 64), bool))


def test_a_tile_table_that_is_too_short_is_an_error_every_time(tmp_path: Path) -> None:
    """What fails before a tile is under way leaves nobody waiting for it."""
    (asset,) = indexed(write(tmp_path / "a.tif", coordinates()))
    offsets, counts = asset.image.tile_offsets[:3], asset.image.tile_byte_counts[:3]
    short = replace(asset, levels=(replace(asset.image, tile_offsets=offsets, tile_byte_counts=counts),))
    request = Request(short, own_grid(short), (Window(0, 0, 100, 90),))
    found: list[BaseException] = []

    def once() -> None:
        try:
            read(request)
        except Exception as error:
            found.append(error)

    for _ in range(2):
        thread = Thread(target=once, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the second read waits for what the first had given up"
    assert [type(error) for error in found] == [ReadError, ReadError]


NOBODY = Asset(
    "rec", "B1", "a.tif", 0, 32633, 1.0, 0.0, "identity", None, "uint16", "data", None, None, None, ()
)
FULL = Rect(0, 8, 0, 8)
parts = st.builds(
    lambda row, col, height, width: Rect(row, min(row + height, 8), col, min(col + width, 8)),
    st.integers(0, 7), st.integers(0, 7), st.integers(1, 8), st.integers(1, 8),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), parts, parts, st.integers(1, 5)), max_size=12),
    st.sets(st.integers(1, 5)),
)
def test_what_is_kept_for_a_task_is_there_until_the_task_ends(
    steps: list[tuple[int, Rect, Rect, int]], ended: set[int]
) -> None:
    """Whoever reads a tile, and whatever is kept for others: within the budget nothing announced is fetched again."""
    sharing = Sharing(10**9)
    promised: dict[tuple[int, int], list[Rect]] = {}
    for tile, need, later, task in steps:
        key = ("a.tif", None, None, 0, 0, tile)
        values = np.arange(64).reshape(1, 8, 8) + 100 * tile
        kept, flight, fresh = sharing.join(key, NOBODY, wish(need, Keep(later, frozenset([task]))))
        assert kept is not None or fresh
        if flight is not None:
            sharing.land(flight, Pixels(values, None, FULL))
            promised.setdefault((tile, task), []).append(later)
    if ended:
        sharing.finish(*ended)
    for (tile, task), rects in promised.items():
        for rect in rects if task not in ended else ():
            kept, _, _ = sharing.join(("a.tif", None, None, 0, 0, tile), NOBODY, wish(rect, None))
            assert kept is not None
            rows, cols = np.mgrid[rect.row0 : rect.row1, rect.col0 : rect.col1]
            np.testing.assert_array_equal(kept.copy(rect).values[0], rows * 8 + cols + 100 * tile)


def wish(need: Rect, keep: Keep | None) -> Wish:
    return Wish(need, lambda _: None, keep, lambda: True)


def test_neighbouring_shards_share_tiles(series: rd.Collection, tmp_path: Path) -> None:
    """On the zone lattice chips cut through tiles; one process fetches each tile about once all the same."""
    raw = series.harmonize(bands=list(BANDS), units="raw", resolution=10, time="1MS")
    layout = layout_of(raw.chips(size=CHIP, cell_km=0.96), shard_bytes=1_000_000)
    run_zarr(layout, str(tmp_path / "chips.zarr"), ReadContext(), client=None, progress=False)
    manifest = pq.read_table(tmp_path / "chips.zarr" / "manifest.parquet")
    touched = MONTHS * len(BANDS) * len(tiles_under(layout.job.bounds))
    assert manifest.num_rows > 4
    assert touched <= sum(manifest.column("tiles_read").to_pylist()) <= 1.15 * touched


def tiles_under(bounds: Array) -> set[tuple[int, int]]:
    """Return the (row, col) of tiles that chips touch; bounds of shape (chip, 4)."""
    side = 10.0 * TILE
    found = set()
    for west, south, east, north in bounds:
        rows = range(int((Y0 - north) // side), int((Y0 - south - 1) // side) + 1)
        cols = range(int((west - X0) // side), int((east - X0 - 1) // side) + 1)
        found |= {(row, col) for row in rows for col in cols}
    return found
