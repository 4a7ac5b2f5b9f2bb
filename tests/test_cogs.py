"""Maps as COGs: GDAL calls them so, pixels come back bit for bit, and blocks of any cut give the same bytes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from bucket_host import Control, serving_bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.crs import number
from rasteret_dask.net import remote
from rasteret_dask.prediction.cogs import Block, array_blocks, cog_bytes, is_empty, pad, write_cog
from rasteret_dask.prediction.cogtiles import (
    CogTiles,
    MapHeader,
    sidecar,
    tile_header,
    tile_name,
    tiles_of,
    vrt_bytes,
    vrt_name,
)

CLASSES = ((1, "water"), (2, "forest & co"), (7, "town"))
TRANSFORM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def codes(shape: tuple[int, int], dtype: str = "uint8", **changes: Any) -> MapHeader:
    fields: dict[str, Any] = {
        "shape": shape, "dtype": dtype, "crs": 32633, "transform": TRANSFORM, "kind": "classes",
        "bands": ("classes",), "nodata": 0, "classes": CLASSES, "colors": ((1, "#0000ff"), (2, "#00aa00")),
    }  # fmt: skip
    return MapHeader(**(fields | changes))


def quantities(shape: tuple[int, int], bands: int = 2, **changes: Any) -> MapHeader:
    fields: dict[str, Any] = {
        "shape": shape, "dtype": "float32", "crs": 32633, "transform": TRANSFORM, "kind": "values",
        "bands": tuple(f"p{n}" for n in range(bands)), "nodata": float("nan"),
    }  # fmt: skip
    return MapHeader(**(fields | changes))


def code_pixels(shape: tuple[int, int], dtype: str = "uint8") -> NDArray[Any]:
    """Return large patches of classes 0, 1, 2 and 7."""
    rng = np.random.default_rng(1)
    coarse = rng.choice(np.array([0, 1, 2, 7], dtype), [-(-side // 16) for side in shape])
    return coarse.repeat(16, 0).repeat(16, 1)[: shape[0], : shape[1]]


def quantity_pixels(shape: tuple[int, int], bands: int = 2) -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    pixels = rng.random((bands, *shape), np.float32)
    pixels[:, rng.random(shape) < 0.2] = np.nan
    pixels[:, : shape[0] // 3] = np.nan
    return pixels


@pytest.mark.parametrize("shape", [(1, 1), (300, 511), (513, 512), (1100, 1500)])
@pytest.mark.parametrize(
    "header", [codes, lambda shape: codes(shape, "uint16"), quantities], ids=["u1", "u2", "f4"]
)
def test_pixels_and_what_is_said_of_them_come_back(
    shape: tuple[int, int], header: Any, tmp_path: Path
) -> None:
    written: MapHeader = header(shape)
    classes = written.kind == "classes"
    pixels = code_pixels(shape, written.dtype) if classes else quantity_pixels(shape)
    (path := tmp_path / "map.tif").write_bytes(cog_bytes(pixels, written))
    with rasterio.open(path) as raster:
        np.testing.assert_array_equal(raster.read(), pixels if pixels.ndim == 3 else pixels[None])
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (raster.crs.to_epsg(), tuple(raster.transform)[:6]) == (32633, TRANSFORM)
        assert raster.descriptions == written.bands
        np.testing.assert_equal(raster.nodata, written.nodata)
        assert raster.compression.value == "DEFLATE"
        assert max(shape) / max(raster.overviews(1), default=1) <= 512  # the coarsest is one tile
        if classes:
            assert {f"CLASS_{code}": name for code, name in CLASSES}.items() <= raster.tags(1).items()
        if written.dtype == "uint8":
            table = raster.colormap(1)
            assert (table[1], table[2], table[0][3]) == ((0, 0, 255, 255), (0, 170, 0, 255), 0)
            assert table[7] != (0, 0, 0, 255)  # of the palette: nobody chose one


def test_overviews_are_the_most_frequent_code_and_the_mean_of_valid_pixels(tmp_path: Path) -> None:
    """Against arithmetic on 2 x 2 pixels; where codes are as frequent as each other, any of them will do."""
    shape = (600, 800)
    rng = np.random.default_rng(3)
    flat = rng.choice(np.array([0, 1, 2, 7], np.uint8), shape)
    (tmp_path / "codes.tif").write_bytes(cog_bytes(flat, codes(shape)))
    smooth = quantity_pixels(shape, 1)
    (tmp_path / "values.tif").write_bytes(cog_bytes(smooth, quantities(shape, 1)))
    with rasterio.open(tmp_path / "codes.tif", overview_level=0) as raster:
        coarse = raster.read(1)
    quads = flat.reshape(300, 2, 400, 2).swapaxes(1, 2).reshape(300, 400, 4)
    for y, x in itertools.product(range(0, 300, 7), range(0, 400, 7)):
        votes = [int(np.sum(quads[y, x] == code)) for code in (1, 2, 7)]
        best = [code for code, count in zip((1, 2, 7), votes, strict=True) if count == max(votes) > 0]
        assert coarse[y, x] in (best or [0])
    with rasterio.open(tmp_path / "values.tif", overview_level=0) as raster:
        means = raster.read(1)
    with np.errstate(invalid="ignore"):
        quads = smooth[0].reshape(300, 2, 400, 2).swapaxes(1, 2).reshape(300, 400, 4).astype(float)
        there = ~np.isnan(quads)
        expected = np.where(there, quads, 0).sum(-1) / there.sum(-1)
    np.testing.assert_allclose(means, expected, rtol=1e-6)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_any_cut_into_blocks_gives_the_bytes_of_one_block(tmp_path_factory: Any, data: st.DataObject) -> None:
    """So a map is the same file whatever the workers and their memory; blocks come in any order."""
    shape = (data.draw(st.integers(1, 700)), data.draw(st.integers(1, 700)))
    header, pixels = (codes(shape), code_pixels(shape)) if data.draw(st.booleans()) else (
        quantities(shape), quantity_pixels(shape)
    )  # fmt: skip
    cuts = [sorted({0, side, *data.draw(st.lists(st.integers(0, side), max_size=3))}) for side in shape]
    blocks: list[Block] = [
        (y, x, pixels[..., y:below, x:right])
        for (y, below), (x, right) in itertools.product(*(itertools.pairwise(cut) for cut in cuts))
    ]
    path = tmp_path_factory.mktemp("cut") / "map.tif"
    write_cog(str(path), header, data.draw(st.permutations(blocks)))
    assert path.read_bytes() == cog_bytes(pixels, header)


def test_pixels_that_nobody_writes_are_nodata(tmp_path: Path) -> None:
    path = str(tmp_path / "map.tif")
    write_cog(path, codes((600, 600), nodata=255), [(100, 200, np.ones((10, 20), np.uint8))])
    with rasterio.open(path) as raster:
        pixels = raster.read(1)
    expected = np.full((600, 600), 255, np.uint8)
    expected[100:110, 200:220] = 1
    np.testing.assert_array_equal(pixels, expected)


def test_names_of_classes_lie_beside_the_file(tmp_path: Path) -> None:
    """As GDAL itself reads them: into a VRT of the file."""
    for dtype in ("uint8", "uint16"):
        path = tmp_path / f"{dtype}.tif"
        header = codes((64, 64), dtype)
        write_cog(str(path), header, [(0, 0, code_pixels((64, 64), dtype))])
        with rasterio.open(path) as raster:
            rasterio.shutil.copy(raster, tmp_path / "seen.vrt", driver="VRT")
        names = [e.text or "" for e in ElementTree.parse(tmp_path / "seen.vrt").iter("Category")]
        assert names == ["", "water", "forest & co", "", "", "", "", "town"]
    assert sidecar(quantities((4, 4))) is None
    assert sidecar(codes((4, 4), classes=())) is None


def test_a_crs_without_a_code_comes_back(tmp_path: Path) -> None:
    crs = number("+proj=laea +lat_0=47 +lon_0=11 +ellps=GRS80 +units=m")
    (path := tmp_path / "map.tif").write_bytes(cog_bytes(code_pixels((8, 8)), codes((8, 8), crs=crs)))
    with rasterio.open(path) as raster:
        assert number(raster.crs) == crs


def test_blocks_of_an_array_are_all_of_it() -> None:
    pixels = np.arange(3 * 50 * 70).reshape(3, 50, 70)
    again = np.zeros_like(pixels)
    for y, x, block in array_blocks(pixels, 16):
        again[:, y : y + block.shape[1], x : x + block.shape[2]] += block
    np.testing.assert_array_equal(again, pixels)


def test_a_map_goes_to_a_bucket_and_replaces_what_is_there(bucket: str) -> None:
    url, header = f"{bucket}/maps/map.tif", codes((700, 700))
    for pixels in (np.ones((700, 700), np.uint8), code_pixels((700, 700))):
        write_cog(url, header, array_blocks(pixels))
        assert remote.get(url) == cog_bytes(pixels, header)
    assert b"forest &amp; co" in remote.get(f"{url}.aux.xml")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_bucket(Control(tmp_path), "mine") as port:
        keys = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
        for name, value in {**keys, "ACCESS_KEY_ID": "k"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield "s3://mine"


def test_an_iterator_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def blocks() -> Iterator[Block]:
        yield 0, 0, np.ones((600, 600), np.uint8)
        raise KeyError("a chip")

    with pytest.raises(KeyError, match="a chip"):
        write_cog(str(tmp_path / "out" / "map.tif"), codes((600, 600)), blocks(), scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_of_temporary_files_is_told(tmp_path: Path) -> None:
    code = f"""
    import resource, signal, numpy as np
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from test_cogs import quantities
    from rasteret_dask.errors import UnwritableStoreError
    from rasteret_dask.prediction.cogs import write_cog
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    noise = np.random.default_rng(0).random((1, 1000, 1000), np.float32)
    try:
        write_cog({str(tmp_path / "map.tif")!r}, quantities((1000, 1000), 1), [(0, 0, noise)], {str(tmp_path)!r})
    except UnwritableStoreError as error:
        print(error)
    """
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=here, capture_output=True, text=True, check=True
    )
    assert "TMPDIR" in done.stdout
    assert not list(tmp_path.iterdir())


def test_memory_holds_a_block_and_not_the_map(tmp_path: Path) -> None:
    """A map of 300 MB, in blocks of 25 MB."""
    code = f"""
    import resource, numpy as np
    from test_cogs import quantities
    from rasteret_dask.prediction.cogs import write_cog
    def blocks():
        for row in range(0, 6144, 512):
            yield row, 0, np.full((2, 512, 6144), row, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_cog({str(tmp_path / "map.tif")!r}, quantities((6144, 6144)), blocks(), {str(tmp_path)!r})
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 150


# A grid of files


@given(shape=st.tuples(st.integers(1, 900), st.integers(1, 900)), side=st.integers(256, 400))
@settings(max_examples=10, deadline=None)
def test_a_folder_of_files_is_one_map(tmp_path_factory: Any, shape: tuple[int, int], side: int) -> None:
    """All of one size, of other ground each, and the VRT gives the map, with files that hold nothing left out."""
    folder = tmp_path_factory.mktemp("tiles")
    grid, whole, pixels = CogTiles(folder, tile_px=side), codes(shape), code_pixels(shape)
    pixels[:side, :side] = 0
    kept = []
    for tile in tiles_of(grid, shape):
        header = tile_header(grid, whole, tile)
        part = pad(pixels[tile.y, tile.x], header)
        assert part.shape == (side, side)
        if not is_empty(part, header):
            kept.append(tile)
            (folder / tile_name("33", tile.row, tile.column)).write_bytes(cog_bytes(part, header))
    assert (0, 0) not in {(tile.row, tile.column) for tile in kept}
    (path := folder / vrt_name("33")).write_bytes(vrt_bytes(grid, "33", whole, reversed(kept)))
    with rasterio.open(path) as raster:
        np.testing.assert_array_equal(raster.read(1), pixels)
        assert (raster.crs.to_epsg(), tuple(raster.transform)[:6], raster.nodata) == (32633, TRANSFORM, 0)
        assert raster.colormap(1)[2] == (0, 170, 0, 255)
        assert raster.descriptions == ("classes",)
    for tile in kept:
        with rasterio.open(folder / tile_name("33", tile.row, tile.column)) as raster:
            assert raster.transform @ (0, 0) == (
                500_000 + 10 * side * tile.column, 5_000_000 - 10 * side * tile.row
            )  # fmt: skip


def test_a_folder_of_files_with_bands_is_one_map(tmp_path: Path) -> None:
    grid, whole, pixels = CogTiles(tmp_path, 256), quantities((300, 520)), quantity_pixels((300, 520))
    tiles = list(tiles_of(grid, whole.shape))
    for tile in tiles:
        header = tile_header(grid, whole, tile)
        data = cog_bytes(pad(pixels[:, tile.y, tile.x], header), header)
        (tmp_path / tile_name("z", tile.row, tile.column)).write_bytes(data)
    (tmp_path / "map_z.vrt").write_bytes(vrt_bytes(grid, "z", whole, tiles))
    with rasterio.open(tmp_path / "map_z.vrt") as raster:
        np.testing.assert_array_equal(raster.read(), pixels)
        assert np.isnan(raster.nodata)


@pytest.mark.parametrize("side", [0, 255, 40_000, 512.5, "512", True, None])
def test_a_side_that_is_none_is_refused(side: Any) -> None:
    with pytest.raises(rd.PlanError, match="tile_px"):
        CogTiles("map", tile_px=side)


def test_a_dtype_that_tiff_lacks_is_refused() -> None:
    with pytest.raises(rd.PlanError, match="float16"):
        quantities((4, 4), dtype="float16")
