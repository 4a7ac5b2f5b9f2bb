from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine
from servers import Fault, RangeServer
from waiting import until

from rasteret_dask.crs import crs_of
from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.headers.reader import Header, HeaderReader, read_headers
from rasteret_dask.net import remote
from rasteret_dask.table.records import LEVEL_TYPE

Serve = Callable[[Path], tuple[str, list[tuple[str, str | None]]]]

UNREADABLE = {
    "gdal_cog_sparse_strile_arrays_zeroified_when_possible.tif": "no geotransform",
    "odcgeo_au-3577-rotated.tif": "rotated",
    "odcgeo_au-gcp.tif": "ground control points",
}
"""Of the real files, those that are not read, and why."""


def rasters(data: Path) -> list[str]:
    return sorted(str(p) for p in data.rglob("*") if p.suffix.lower() in (".tif", ".jp2"))


def header(path: Path | str) -> Header:
    found = read_headers([str(path)])[str(path)]
    assert isinstance(found, Header), found
    return found


def reason(path: Path | str) -> str:
    found = read_headers([str(path)])[str(path)]
    assert isinstance(found, str)
    return found


def write(path: Path, array: Any, **profile: Any) -> Path:
    bands, height, width = array.shape
    options = {"driver": "GTiff", "crs": "EPSG:32631", "transform": Affine(10, 0, 600000, 0, -10, 5700000)}
    options |= {"tiled": True, "blockxsize": 64, "blockysize": 64} | profile
    with rasterio.open(
        path, "w", count=bands, height=height, width=width, dtype=array.dtype, **options
    ) as to:
        to.write(array)
    return path


def test_every_file_agrees_with_gdal(data: Path) -> None:
    found = read_headers(rasters(data))
    assert len(found) > 100
    refused = set()
    for path, ours in found.items():
        name = Path(path).name
        if isinstance(ours, str):
            assert UNREADABLE[name] in ours
            refused.add(name)
            continue
        if ours.placement is not None:  # the header tells of the raster that GDAL warps it to: test_turned.py
            continue
        with rasterio.open(path) as gdal:
            for n in range(gdal.count):
                level = ours.levels_of(n)[0]
                assert (level["width"], level["height"]) == (gdal.width, gdal.height), name
                assert (level["tile_height"], level["tile_width"]) == gdal.block_shapes[n], name
                assert ours.dtype == gdal.dtypes[n], name
                np.testing.assert_allclose(level["transform"], tuple(gdal.transform)[:6], rtol=1e-12)
                assert ours.scale_of(n) in (None, gdal.scales[n])
                assert ours.offset_of(n) in (None, gdal.offsets[n])
            assert ours.epsg is not None, name
            assert crs_of(ours.epsg).equals(pyproj.CRS(gdal.crs), ignore_axis_order=True), name
            assert gdal.crs.to_epsg() in (ours.epsg, None), name
            assert str(None if ours.nodata is None else float(ours.nodata)) == str(gdal.nodata), name
            assert ours.samples == gdal.count
            assert ours.size == Path(path).stat().st_size
            overviews = [p for p in ours.levels_of(0) if p["kind"] == "overview"]
            assert len(overviews) == len(gdal.overviews(1)), name
        for n, overview in enumerate(overviews):
            with rasterio.open(path, overview_level=n) as gdal:
                assert (overview["width"], overview["height"]) == (gdal.width, gdal.height), name
                np.testing.assert_allclose(overview["transform"], tuple(gdal.transform)[:6], rtol=1e-12)
    assert refused <= set(UNREADABLE)


def levels_by_tifffile(path: str) -> list[tuple[Any, ...]]:
    """Return what another parser tells of the levels that have tile tables, as ``levels_by_us`` does."""
    with tifffile.TiffFile(path) as file:
        pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
        levels = [
            (
                p.imagewidth, p.imagelength, p.tilewidth, p.tilelength, int(p.compression), int(p.predictor),
                int(p.planarconfig), p.samplesperpixel, file.byteorder, tuple(p.dataoffsets), tuple(p.databytecounts),
            )
            for p in pages
        ]  # fmt: skip
    return sorted(levels)


def levels_by_us(header: Header) -> list[tuple[Any, ...]]:
    return sorted(
        (
            p.width, p.height, p.tile_width, p.tile_height, p.compression, p.predictor, p.planar, p.samples,
            p.byteorder, p.tile_offsets, p.tile_byte_counts,
        )
        for p in header.pages
        if p.tile_offsets
    )  # fmt: skip


def test_tile_tables_of_every_file_agree_with_tifffile(data: Path) -> None:
    compared = 0
    for path, ours in read_headers(rasters(data)).items():
        if isinstance(ours, Header) and (told := levels_by_us(ours)):
            compared += len(told)
            assert set(told) <= set(levels_by_tifffile(path)), path
            unlisted = [page for page in ours.pages if not page.tile_offsets and page.compression]
            assert unlisted or len(told) == len(levels_by_tifffile(path)), path
    assert compared > 150


@given(
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int32", "float32", "float64", "complex64", "uint64"]),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    bands=st.integers(1, 5),
    tiled=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "interleave": st.sampled_from(["pixel", "band"]),
            "BIGTIFF": st.sampled_from(["YES", "NO"]),
            "ENDIANNESS": st.sampled_from(["LITTLE", "BIG"]),
            "compress": st.sampled_from(["none", "deflate", "lzw", "zstd"]),
            "SPARSE_OK": st.sampled_from(["TRUE", "FALSE"]),
            "nodata": st.sampled_from([None, 0, 7]),
            "crs": st.sampled_from(["EPSG:32631", "EPSG:3035"]),
        }
    ),
)
@settings(max_examples=25, deadline=None)
def test_whatever_gdal_writes_agrees_with_two_other_parsers(
    dtype: str, size: tuple[int, int], bands: int, tiled: bool, options: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder:
        blocks = {"tiled": True, "blockxsize": 32, "blockysize": 16} if tiled else {"tiled": False}
        path = write(Path(folder) / "a.tif", np.ones((bands, *size), dtype), **blocks, **options)
        ours = header(path)
        assert levels_by_us(ours) == levels_by_tifffile(str(path))
        with rasterio.open(path) as gdal:
            assert [ours.dtype] * bands == list(gdal.dtypes)
            assert (ours.samples, ours.epsg, ours.nodata) == (gdal.count, gdal.crs.to_epsg(), gdal.nodata)
            assert (ours.pages[0].height, ours.pages[0].width) == gdal.shape
            if tiled:  # of strips without compression GDAL makes others
                assert (ours.pages[0].tile_height, ours.pages[0].tile_width) == gdal.block_shapes[0]


def test_levels_have_the_fields_of_the_schema(data: Path) -> None:
    level = header(data / "edge_cases" / "gdal_byte_ZSTD_tiled.tif").levels_of(0)[0]
    assert list(level) == [field.name for field in LEVEL_TYPE]


def test_tile_tables_point_at_the_tiles(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, (3, 150, 130), dtype="uint8")
    path = write(tmp_path / "planar.tif", array, interleave="band")
    whole, ours = path.read_bytes(), header(path)
    for band in range(3):
        level = ours.levels_of(band)[0]
        assert level["planar"] == 2
        assert len(level["tile_offsets"]) == len(level["tile_byte_counts"]) == 3 * 3
        at, count = level["tile_offsets"][4], level["tile_byte_counts"][4]
        tile = np.frombuffer(whole[at : at + count], "uint8").reshape(64, 64)
        assert (tile == array[band, 64:128, 64:128]).all()
    with pytest.raises(ReadError, match="3 bands"):
        ours.levels_of(3)


def test_masks_and_masks_of_overviews(data: Path) -> None:
    levels = header(data / "edge_cases" / "riotiler_cog_uint8_rgb_mask.tif").levels_of(0)
    kinds = [(level["kind"], level["width"]) for level in levels]
    assert kinds == [
        ("image", 256), ("overview", 128), ("overview", 64),
        ("mask", 256), ("overview_mask", 128), ("overview_mask", 64),
    ]  # fmt: skip
    assert [level["dtype"] for level in levels] == ["uint8"] * 3 + ["bool"] * 3
    assert all(level["tile_offsets"] for level in levels)


def test_strips_and_odd_bits_have_no_tile_tables(data: Path) -> None:
    for name in ("gdal_byte_bigtiff_strip5lines.tif", "mapchete_s2_band.tif", "mapchete_s2_band.jp2"):
        assert header(data / "edge_cases" / name).levels_of(0)[0]["tile_offsets"] == ()


@pytest.mark.parametrize(
    "profile",
    [
        {"BIGTIFF": "YES"},
        {"ENDIANNESS": "BIG"},
        {"nodata": math.nan, "dtype": "float32"},
        {"transform": Affine(10, 0, 600000, 0, 10, 5600000)},
        {"transform": Affine(0.5, 0, -3, 0, -0.25, 7), "crs": "EPSG:4326"},
        {"crs": "EPSG:3035"},
    ],
)
def test_what_gdal_writes(tmp_path: Path, profile: dict[str, Any]) -> None:
    array = np.zeros((1, 70, 90), profile.pop("dtype", "uint16"))
    path = write(tmp_path / "a.tif", array, **profile)
    ours = header(path)
    with rasterio.open(path) as gdal:
        assert ours.levels_of(0)[0]["transform"] == pytest.approx(tuple(gdal.transform)[:6])
        assert (ours.epsg, str(ours.nodata)) == (gdal.crs.to_epsg(), str(gdal.nodata))
    assert ours.levels_of(0)[0]["byteorder"] == (">" if "ENDIANNESS" in profile else "<")


def test_one_request_a_file_and_each_file_once(data: Path, serve: Serve) -> None:
    base, seen = serve(data / "edge_cases")
    href = f"{base}/gdal_byte_ZSTD_tiled.tif"
    found = read_headers([href, href, f"{base}/gdal_int8.tif"])
    assert len(found) == 2
    assert all(isinstance(h, Header) for h in found.values())
    assert sorted(path for path, _ in seen) == ["/gdal_byte_ZSTD_tiled.tif", "/gdal_int8.tif"]


def sparse(path: Path, width: int, count: int, tile: int, **profile: Any) -> Path:
    """Write a file of one colour: tile tables as long as a real one's, hardly any pixels."""
    options = {"driver": "GTiff", "tiled": True, "blockxsize": tile, "blockysize": tile, "SPARSE_OK": "TRUE"}
    options |= {"crs": "EPSG:32633", "transform": Affine(10, 0, 399960, 0, -10, 5700000)} | profile
    with rasterio.open(path, "w", width=width, height=width, count=count, **options) as to:
        to.write(
            np.ones((tile, tile), str(options["dtype"])), 1, window=rasterio.windows.Window(0, 0, tile, tile)
        )
    return path


def test_one_request_a_file_for_files_as_published(tmp_path: Path, server: RangeServer) -> None:
    # 10 m of Sentinel-2, a WorldCover tile, and a Landsat band
    sparse(tmp_path / "s2.tif", 10980, 1, 1024, dtype="uint16", compress="deflate", predictor=2)
    sparse(tmp_path / "map.tif", 36000, 1, 1024, dtype="uint8", compress="deflate", BIGTIFF="YES")
    sparse(tmp_path / "l8.tif", 7801, 1, 256, dtype="uint16", compress="deflate")
    found = read_headers([server.url(name) for name in ("s2.tif", "map.tif", "l8.tif")])
    assert all(isinstance(header, Header) for header in found.values())
    assert len(server.log) == 3


def test_large_tile_tables_take_one_request_each_once_the_first_are_known(
    tmp_path: Path, server: RangeServer
) -> None:
    # 64 bands band by band: 66 kB of tile tables, as AlphaEarth's files have
    first = sparse(
        tmp_path / "0.tif", 8192, 64, 1024, dtype="int8", compress="zstd", interleave="band", BIGTIFF="YES"
    )
    hrefs = [server.url(f"{n}.tif") for n in range(20)]
    for n in range(1, 20):
        (tmp_path / f"{n}.tif").write_bytes(first.read_bytes())
    with HeaderReader(workers=4) as reader:
        assert isinstance(reader.submit(hrefs[0]).result(), Header)
        opened = len(server.log)
        assert opened == 2
        found = reader.read(hrefs)
    assert len(server.log) - opened == 19
    tables = {one.levels_of(63)[0]["tile_offsets"] for one in found.values() if isinstance(one, Header)}
    assert tables == {header(first).levels_of(63)[0]["tile_offsets"]}


def test_one_large_header_does_not_make_the_others_first_requests_large(
    tmp_path: Path, server: RangeServer
) -> None:
    options: dict[str, Any] = {"dtype": "int8", "compress": "zstd", "interleave": "band", "BIGTIFF": "YES"}
    large = sparse(tmp_path / "large.tif", 8192, 600, 1024, **options)  # as much of tile tables
    assert large.stat().st_size > 400_000
    small = sparse(tmp_path / "0.tif", 1024, 1, 1024, dtype="int8", compress="zstd").read_bytes()
    for n in range(40):
        (tmp_path / f"{n}.tif").write_bytes(small + bytes(100_000))
    with HeaderReader(workers=1) as reader:
        reader.read([server.url(f"{n}.tif") for n in range(20)])
        assert isinstance(reader.submit(server.url("large.tif")).result(), Header)
        reader.read([server.url(f"{n}.tif") for n in range(20, 40)])
    assert [len(server.asked(f"{n}.tif")) for n in range(40)] == [1] * 40
    assert {asked.nbytes for n in range(40) for asked in server.asked(f"{n}.tif")} == {32 * 1024}


def test_a_directory_far_away_does_not_make_others_first_requests_large(
    tmp_path: Path, server: RangeServer
) -> None:
    late = write(tmp_path / "late.tif", np.random.default_rng(0).integers(0, 9999, (1, 512, 512), "uint16"))
    with rasterio.open(late, "r+") as to:
        to.update_tags(note="x" * 500)
    write(tmp_path / "plain.tif", np.random.default_rng(0).integers(0, 9999, (1, 512, 512), "uint16"))
    with HeaderReader(workers=1) as reader:
        reader.read([server.url("late.tif"), server.url("plain.tif")])
    (asked,) = server.asked("plain.tif")
    assert asked.nbytes == 32 * 1024


def test_a_reader_reads_each_file_once_and_remembers_within_bounds(
    tmp_path: Path, server: RangeServer
) -> None:
    for n in range(6):
        write(tmp_path / f"{n}.tif", np.ones((1, 128, 128), "uint8"))  # 4 tiles each
    with HeaderReader(workers=2, keep_tiles=12) as reader:
        for _ in range(2):  # two of them fit: an image of 4 tiles counts as 5
            reader.read([server.url("0.tif"), server.url("1.tif")])
        assert len(server.log) == 2
        assert reader.submit(server.url("0.tif")) is reader.submit(server.url("0.tif"))
        reader.read([server.url(f"{n}.tif") for n in range(2, 6)])
        reader.read([server.url("5.tif")])
        assert len(server.log) == 6
        reader.read([server.url("0.tif")])
        assert len(server.log) == 7


def test_a_failure_is_not_remembered(tmp_path: Path, server: RangeServer) -> None:
    with HeaderReader() as reader:
        assert "404" in str(reader.submit(server.url("a.tif")).result())
        until(lambda: not reader._coming)
        write(tmp_path / "a.tif", np.ones((1, 16, 16), "uint8"))
        assert isinstance(reader.submit(server.url("a.tif")).result(), Header)


def test_a_reader_left_by_an_error_drops_what_has_not_begun(tmp_path: Path, server: RangeServer) -> None:
    write(tmp_path / "a.tif", np.ones((1, 16, 16), "uint8"))
    first, second = Event(), Event()
    server.fault("*", Fault(hold=first))
    waiting: list[Future[Header | str]] = []

    def stopped() -> None:
        with HeaderReader(workers=1) as reader:
            waiting.extend(reader.submit(server.url(f"a.tif?copy={n}")) for n in range(50))
            until(lambda: len(server.log) == 1)
            server.fault("*", Fault(hold=second))
            first.set()
            waiting[0].result()
            until(lambda: len(server.log) == 2)
            raise KeyboardInterrupt

    def let_go() -> None:
        until(lambda: waiting and waiting[-1].cancelled())
        second.set()

    with ThreadPoolExecutor(1) as pool:
        letting_go = pool.submit(let_go)
        with pytest.raises(KeyboardInterrupt):
            stopped()
        letting_go.result()
    assert len(server.log) == 2
    assert [future.cancelled() for future in waiting] == [False] * 2 + [True] * 48


def test_requests_are_in_flight_together(tmp_path: Path, server: RangeServer) -> None:
    write(tmp_path / "a.tif", np.ones((1, 16, 16), "uint8"))
    server.fault("*", Fault(together=16))
    found = read_headers([server.url(f"a.tif?copy={n}") for n in range(64)], workers=16)
    assert all(isinstance(header, Header) for header in found.values())
    assert server.most == 16


def test_a_header_at_the_end_of_the_file_is_found(tmp_path: Path, serve: Serve) -> None:
    # libtiff rewrites the directory at the end when it has grown
    path = write(tmp_path / "late.tif", np.zeros((1, 1024, 1024), "uint16") + 7)
    with rasterio.open(path, "r+") as to:
        to.update_tags(note="x" * 500)
    base, seen = serve(tmp_path)
    assert (
        header(f"{base}/late.tif").levels_of(0)[0]["tile_offsets"]
        == header(path).levels_of(0)[0]["tile_offsets"]
    )
    assert len(seen) < 8


def test_reasons_hold_no_signature(tmp_path: Path, serve: Serve) -> None:
    base, _ = serve(tmp_path)
    for path in ("nothing.tif", "forbidden.tif"):
        said = reason(f"{base}/{path}?sig=geheim&se=2030")
        assert "geheim" not in said
        assert "404" in said or "403" in said


def test_a_signed_href_keeps_its_signature(data: Path, serve: Serve) -> None:
    base, seen = serve(data / "edge_cases")
    header(f"{base}/gdal_int8.tif?sig=a%2Bb")
    assert seen[0][0] == "/gdal_int8.tif?sig=a%2Bb"


def test_what_is_no_raster_is_told(tmp_path: Path) -> None:
    text = tmp_path / "a.tif"
    text.write_text("<VRTDataset rasterXSize='1'></VRTDataset>")
    assert "neither a TIFF nor a JPEG 2000" in reason(text)
    assert "404" in reason(tmp_path / "nothing.tif")
    assert "vrt" in reason("vrt://a.tif?bands=1")
    text.write_bytes(b"II*\0")
    assert reason(text)


def tiff(width: int, height: int, tile: int) -> bytes:
    """Return a TIFF that claims a size, with one tile in its tables."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8), (325, 1)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    doubles = struct.pack("<9d", 1, 1, 0, 0, 0, 0, 0, 0, 0)
    keys = struct.pack("<12H", 1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32631)
    at = 8 + 2 + 12 * (len(tags) + 3) + 4
    body += struct.pack("<HHII", 33550, 12, 3, at) + struct.pack("<HHII", 33922, 12, 6, at + 24)
    body += struct.pack("<HHII", 34735, 3, 12, at + 72)
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 3) + body + b"\0" * 4 + doubles + keys


@pytest.mark.parametrize(
    ("width", "height", "tile"), [(65536, 65536, 32768), (2**31, 16, 16), (1_000_000, 1_000_000, 16)]
)
def test_absurd_sizes_are_refused_before_allocation(
    tmp_path: Path, width: int, height: int, tile: int
) -> None:
    path = tmp_path / "huge.tif"
    path.write_bytes(tiff(width, height, tile))
    assert "refused" in reason(path)


# rasterio fails to log what GDAL tells in bytes that are no text
@pytest.mark.filterwarnings("ignore:Exception ignored in. 'rasterio._env.log_error'")
def test_cut_and_scrambled_headers_never_escape(data: Path, tmp_path: Path) -> None:
    sources = (
        "gdal_byte_ZSTD_tiled.tif",
        "riotiler_cog_uint8_rgb_mask.tif",
        "gdal_byte_bigtiff_strip5lines.tif",
    )
    wholes = [(data / "edge_cases" / name).read_bytes()[:20_000] for name in sources]
    noise = np.random.default_rng(0)
    paths = []
    for n in range(300):
        whole = wholes[n % 3]
        broken = bytearray(whole[: noise.integers(4, len(whole))])
        for at in noise.integers(4, len(broken), 8) if len(broken) > 4 else ():
            broken[at] = noise.integers(256)
        paths.append(tmp_path / f"{n}.tif")
        paths[-1].write_bytes(bytes(broken))
    assert len(read_headers([str(p) for p in paths], workers=2)) == 300


def test_a_directory_that_gdal_cannot_read_either_is_a_reason(tmp_path: Path) -> None:
    # GDAL opens such a file, and fails when it is asked for more: by an error without a public name in rasterio
    path = write(tmp_path / "a.tif", np.ones((1, 64, 64), "uint8"), blockxsize=16, blockysize=16)
    with rasterio.open(path, "r+") as to:
        to.build_overviews([2])
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    (second,) = struct.unpack_from("<I", data, first + 2 + 12 * count)
    data[second : second + 2] = b"\xff\xff"
    path.write_bytes(bytes(data))
    assert "TIFFReadDirectory" in reason(path)


def test_a_warning_of_gdal_stays_inside(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8") as to:
            to.write(np.ones((1, 9, 9), "uint8"))
    assert "no geotransform" in reason(path)


def test_remote_round_trip(tmp_path: Path) -> None:
    url = f"{tmp_path}/new/folder"
    remote.put(remote.join(url, "a/b c.bin"), b"0123456789")
    assert remote.get(f"{url}/a/b c.bin", 2, 3) == b"234"
    assert remote.get(f"file://{url}/a/b%20c.bin", 8) == b"89"
    assert remote.listing(url) == {"a/b c.bin": 10}
    assert remote.head(f"{url}/a/b c.bin").size == 10
    assert remote.exists(f"{url}/a/b c.bin")
    assert not remote.exists(f"{url}/a/nothing")
    assert remote.listing(f"{url}/nothing") == {}
    remote.delete(f"{url}/a/b c.bin")
    assert not remote.exists(f"{url}/a/b c.bin")
    with pytest.raises(TrustError):
        remote.open_href("/vsicurl/http://example.com/a.tif")
    with pytest.raises(TrustError):
        remote.open_href("ftp://example.com/a.tif")


def test_redact() -> None:
    assert remote.redact("https://u:p@h/a.tif?sig=x failed") == "https://h/a.tif?... failed"
