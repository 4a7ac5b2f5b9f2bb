"""Bad input: retried where that can help, else one typed error that names all, or masked where asked for by name."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from numpy.typing import NDArray
from servers import Fault, RangeServer, serving
from test_engine import indexed, noise
from test_reader import X0, Y0, assert_same, own_grid, read, write
from test_real_data import table_of
from waiting import PATIENCE_S, held_for

import rasteret_dask as rd
from rasteret_dask.errors import JobError, PlanError, ReadError, UnreadableTilesWarning
from rasteret_dask.net import remote, web
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.pixelgrid import Grid, Window
from rasteret_dask.reader.placing import Block
from rasteret_dask.reader.readplan import Request
from rasteret_dask.rules.units import Embedding
from rasteret_dask.table.records import Asset

HEIGHT, WIDTH = 64, 96  # 4 x 3 tiles of 16 x 32
WHOLE = (Window(0, 0, HEIGHT, WIDTH),)
BAD = 5  # rows 16..31, columns 64..95
BAD_PIXELS = np.s_[16:32, 64:96]
PIXELS = noise(HEIGHT, WIDTH)
VALID = np.ones((HEIGHT, WIDTH), bool)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts are short; how many there are stays as it is."""
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


def place(asset: Asset, tile: int) -> tuple[int, int]:
    """Return the first and last byte of a tile."""
    first = asset.image.tile_offsets[tile]
    return first, first + asset.image.tile_byte_counts[tile] - 1


def spoil(path: Path, share: float = 0.5) -> Path:
    """Overwrite the last share of the bad tile's bytes."""
    first, last = place(indexed(path)[0], BAD)
    data = bytearray(path.read_bytes())
    count = round(share * (last + 1 - first))
    data[last + 1 - count : last + 1] = b"\xff" * count
    path.write_bytes(data)
    return path


def file(folder: Path, name: str = "a.tif", pixels: NDArray[Any] = PIXELS, **profile: Any) -> Path:
    return write(folder / name, pixels, **{"compress": "deflate", **profile})


def request(asset: Asset, windows: tuple[Window, ...] = WHOLE) -> Request:
    return Request(asset, own_grid(asset), windows)


def one_tile(asset: Asset, tile: int = BAD) -> Request:
    """Return a request that needs this tile only."""
    row, col = divmod(tile, 3)
    return request(asset, (Window(16 * row + 2, 32 * col + 3, 8, 8),))


def failure(*requests: Request) -> ReadError:
    """Return the error that reading ends in; it survives pickling, and chains nothing that does not."""
    with pytest.raises(ReadError) as caught:
        read(*requests)
    error = caught.value
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def assert_names(error: ReadError, asset: Asset, tile: int = BAD) -> None:
    """The message has record, band, tile and range, and something to do; and nothing secret."""
    first, last = place(asset, tile)
    text = str(error)
    for fact in (repr(asset.record_id), repr(asset.band), f"bytes {first}-{last}"):
        assert fact in text
    assert re.search(rf"\btile {tile}\b", text), text
    assert error.found
    assert error.remedy
    for said in (text, repr(error), repr(error.__cause__), repr(error.__context__)):
        assert "secret" not in said


# Tiles that do not decode


@pytest.mark.parametrize(("compress", "share"), [("deflate", 0.5), ("deflate", 1), ("lzw", 0.5), ("zstd", 1)])
@pytest.mark.parametrize("predictor", [1, 2])
def test_a_corrupt_tile_is_an_error_that_names_it(
    tmp_path: Path, compress: str, share: float, predictor: int
) -> None:
    """GDAL's ZSTD has no checksum: what is overwritten in the middle of it may decode to something."""
    (asset,) = indexed(spoil(file(tmp_path, compress=compress, predictor=predictor), share))
    assert_names(failure(request(asset)), asset)
    (good,) = read(one_tile(asset, BAD - 1))
    np.testing.assert_array_equal(good.values[0], PIXELS[0, 18:26, 35:43])


@pytest.mark.parametrize("compress", ["none", "deflate", "zstd"])
def test_a_tile_whose_table_says_too_few_bytes(tmp_path: Path, compress: str) -> None:
    (asset,) = indexed(file(tmp_path, compress=compress))
    counts = list(asset.image.tile_byte_counts)
    counts[BAD] -= 11
    asset = replace(asset, levels=(replace(asset.image, tile_byte_counts=tuple(counts)),))
    assert_names(failure(request(asset)), asset)


@pytest.mark.parametrize(
    "options", [{"tiled": False, "blockysize": 16, "blockxsize": WIDTH}, {"compress": "lerc"}]
)
def test_a_corrupt_block_of_a_file_that_gdal_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    """Headers of such files have no tile table: the tile is named, its bytes are not known."""
    path = file(tmp_path, **options)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    (asset,) = indexed(path)
    error = str(failure(request(asset)))
    assert re.search(r"'B1' of record 'rec'.*\btile \d+", error), error


# A server that refuses, or breaks off


@pytest.fixture
def asset(server: RangeServer) -> Asset:
    """Return a served file, with a signature and a password in its href."""
    file(server.folder)
    found = indexed(f"http://user:secret@{server.host}/a.tif?signature=secret")[0]
    server.forget()
    return found


HEALING = {
    "429": Fault(status=429, retry_after="0", times=2),
    "503": Fault(status=503, retry_after="0", times=2),
    "500": Fault(status=500, times=2),
    "502": Fault(status=502, times=2),
    "504": Fault(status=504, times=2),
    "408": Fault(status=408, times=2),
    "cut": Fault(cut=True, times=2),
}
LASTING = {
    "429": Fault(status=429, retry_after="0"),
    "503": Fault(status=503, retry_after="0"),
    "500": Fault(status=500),
    "cut": Fault(cut=True),
    "short": Fault(short=True),
    "whole": Fault(whole=True),
}


@pytest.mark.parametrize("fault", HEALING.values(), ids=HEALING)
def test_what_passes_is_tried_again(server: RangeServer, asset: Asset, fault: Fault) -> None:
    server.fault("*", fault)
    (block,) = read(request(asset))
    assert_same(block, PIXELS[0], VALID)
    assert set(server.attempts().values()) == {3}


@pytest.mark.parametrize("fault", HEALING.values(), ids=HEALING)
def test_headers_outlast_what_passes(server: RangeServer, asset: Asset, fault: Fault) -> None:
    server.fault("*", fault)
    assert indexed(asset.href) == [asset]


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_what_lasts_is_one_error_after_a_bounded_number_of_attempts(
    server: RangeServer, asset: Asset, fault: Fault
) -> None:
    server.fault("*", fault)
    assert_names(failure(one_tile(asset)), asset)
    assert 1 <= len(server.log) <= remote.ATTEMPTS


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_will_not_pass_is_asked_for_once(server: RangeServer, asset: Asset, status: int) -> None:
    server.fault("*", Fault(status=status))
    error = failure(one_tile(asset))
    assert_names(error, asset)
    assert re.search(r"40[134]|410|denied|nothing there", error.found)
    assert len(server.log) == 1


@pytest.fixture
def strips(server: RangeServer) -> Asset:
    """Return a served file that GDAL reads for us."""
    file(server.folder, tiled=False, blockxsize=WIDTH, blockysize=16)
    found = indexed(server.url("a.tif?signature=secret"))[0]
    server.forget()
    return found


def test_gdal_tries_again_too(server: RangeServer, strips: Asset) -> None:
    server.fault("*", Fault(status=503, times=2))
    (block,) = read(request(strips))
    assert_same(block, PIXELS[0], VALID)


@pytest.mark.parametrize("status", [403, 404, 503])
def test_what_lasts_is_an_error_of_gdals_that_names_all(
    server: RangeServer, strips: Asset, status: int
) -> None:
    """GDAL asks for what it likes: there is no one range to name."""
    server.fault("*", Fault(status=status))
    error = failure(request(strips))
    for said in (str(error), repr(error.__cause__), repr(error.__context__)):
        assert "secret" not in said
    assert "'B1' of record 'rec'" in str(error)
    assert error.remedy
    assert 1 <= max(server.attempts().values()) <= remote.ATTEMPTS
    (block,), _ = masked(request(strips))
    assert not block.valid.any()


def test_a_file_that_is_gone(server: RangeServer, asset: Asset) -> None:
    (server.folder / "a.tif").unlink()
    error = failure(one_tile(asset))
    assert_names(error, asset)
    assert "404" in error.found


def test_a_host_that_does_not_answer(tmp_path: Path) -> None:
    file(tmp_path)
    with serving(tmp_path) as server:
        (asset,) = indexed(server.url("a.tif?signature=secret"))
    assert_names(failure(one_tile(asset)), asset)


def test_a_body_that_stalls_is_given_up_and_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "READ_S", 3.0)  # a busy machine answers sooner
    file(tmp_path)
    with serving(tmp_path) as server:
        (asset,) = indexed(server.url("a.tif"))
        server.forget()
        server.fault("*", Fault(stall_s=PATIENCE_S, times=1))
        (block,) = read(request(asset))
        assert set(server.attempts().values()) == {2}
    assert_same(block, PIXELS[0], VALID)


def test_random_faults_heal(server: RangeServer) -> None:
    """A tenth of answers refused, a tenth cut, of 40 files: every pixel is right all the same."""
    pixels = {f"{n}.tif": noise(16, 32 + n) for n in range(40)}
    for name, values in pixels.items():
        file(server.folder, name, values)
    assets = [indexed(server.url(name))[0] for name in pixels]
    server.fault("*[02468].tif", Fault(cut=True, share=0.2, seed=1))
    server.fault("*[13579].tif", Fault(status=503, share=0.2, seed=1))
    server.forget()
    windows = [(Window(0, 0, 16, 32 + n),) for n in range(40)]
    blocks = read(*(request(a, w) for a, w in zip(assets, windows, strict=True)))
    for block, values in zip(blocks, pixels.values(), strict=True):
        assert_same(block, values[0], np.ones(values.shape[1:], bool))
    assert len(server.log) > len(server.attempts()) >= 40


def test_one_bad_file_of_many_fails_the_batch_and_leaves_the_process_well(server: RangeServer) -> None:
    assets = [indexed(str(file(server.folder, f"{n}.tif")))[0] for n in range(20)]
    served = [replace(a, href=server.url(f"{n}.tif")) for n, a in enumerate(assets)]
    served = [replace(a, etag=None, record_id=f"r{n}") for n, a in enumerate(served)]
    server.fault("7.tif", Fault(status=403))
    error = failure(*(request(a) for a in served))
    assert "'r7'" in str(error)
    server.heal()
    for block in read(*(request(a) for a in served)):
        assert_same(block, PIXELS[0], VALID)


# A file that is not the one that was indexed


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(1000))


def cut_inside(path: Path) -> None:
    first, last = place(indexed(path)[0], BAD)
    path.write_bytes(path.read_bytes()[: (first + last) // 2])


def cut_before(path: Path) -> None:
    first, _ = place(indexed(path)[0], BAD)
    path.write_bytes(path.read_bytes()[: first - 100])


def rewritten(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


CHANGES = (grown, cut_inside, cut_before, rewritten)


@pytest.mark.parametrize("change", CHANGES)
def test_a_served_file_that_changed(
    server: RangeServer, asset: Asset, change: Callable[[Path], None]
) -> None:
    change(server.folder / "a.tif")
    error = failure(one_tile(asset))
    assert_names(error, asset)
    assert re.search(r"changed since it was indexed|cut short", error.remedy), error
    assert len(server.log) <= remote.ATTEMPTS


@pytest.mark.parametrize("change", CHANGES[:3])
def test_a_local_file_that_changed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = file(tmp_path)
    (asset,) = indexed(path)
    change(path)
    error = failure(one_tile(asset))
    assert_names(error, asset)
    assert re.search(r"changed since it was indexed|cut short", error.remedy), error


@pytest.mark.parametrize("change", [grown, rewritten])
def test_a_served_file_of_strips_that_changed(
    server: RangeServer, strips: Asset, change: Callable[[Path], None]
) -> None:
    """GDAL would read it, its size in pixels being the same."""
    change(server.folder / "a.tif")
    error = failure(request(strips))
    assert "'B1' of record 'rec'" in str(error)
    assert "changed since it was indexed" in error.remedy


def test_a_local_file_of_strips_that_changed(tmp_path: Path) -> None:
    path = file(tmp_path, tiled=False, blockxsize=WIDTH, blockysize=16)
    (asset,) = indexed(path)
    grown(path)
    assert "changed since it was indexed" in failure(request(asset)).remedy


def test_a_version_that_the_index_does_not_know_is_no_change(server: RangeServer, asset: Asset) -> None:
    rewritten(server.folder / "a.tif")
    (block,) = read(request(replace(asset, etag=None)))
    assert_same(block, PIXELS[0], VALID)


# Masked, where asked for


def masked(*requests: Request) -> tuple[list[Block], int]:
    with Session(on_error="mask") as session:
        blocks = session.read_block(requests)
        return blocks, session.counts.tiles_masked


KINDS: dict[str, dict[str, Any]] = {
    "uint16": {},
    "nodata": {"nodata": 7},
    "float32": {"pixels": PIXELS.astype("float32")},
    "mask": {"mask": np.ones((HEIGHT, WIDTH), bool)},
}


def without(tile: tuple[slice, slice]) -> NDArray[np.bool_]:
    valid = VALID.copy()
    valid[tile] = False
    return valid


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_tile_is_invalid_and_the_others_are_as_they_were(tmp_path: Path, kind: str) -> None:
    pixels = KINDS[kind].get("pixels", PIXELS)
    (asset,) = indexed(spoil(file(tmp_path, **KINDS[kind])))
    (block,), count = masked(request(asset))
    assert_same(block, pixels[0], without(BAD_PIXELS))
    assert count == 1


def test_a_corrupt_tile_of_two_bands(tmp_path: Path) -> None:
    """A chunky tile is one tile of all its bands."""
    path = file(tmp_path, pixels=noise(HEIGHT, WIDTH, 2), interleave="pixel")
    assets = indexed(spoil(path))
    blocks, count = masked(*(request(a) for a in assets))
    for band, block in enumerate(blocks):
        assert_same(block, noise(HEIGHT, WIDTH, 2)[band], without(BAD_PIXELS))
    assert count == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
def test_a_corrupt_tile_under_a_warp(tmp_path: Path, kind: str, kernel: str) -> None:
    """Pixels that the tile feeds are invalid or made of the others; those out of the kernel's reach are equal."""
    clean, spoiled = file(tmp_path, "clean.tif", **KINDS[kind]), file(tmp_path, "a.tif", **KINDS[kind])
    (good,), (bad,) = indexed(clean), indexed(spoil(spoiled))
    grid = Grid(32633, X0 + 3, own_grid(good).y0 - 4, 10, 10)
    (wanted,) = read(Request(good, grid, WHOLE, kernel))
    (found,), count = masked(Request(bad, grid, WHOLE, kernel))
    assert count == 1
    inner, outer = without(np.s_[18:30, 66:94]), without(np.s_[14:34, 62:96])
    assert not found.valid[0][~inner].any()
    np.testing.assert_array_equal(found.valid[0][outer], wanted.valid[0][outer])
    same = outer & wanted.valid[0]
    np.testing.assert_array_equal(found.values[0][same], wanted.values[0][same])


def test_a_corrupt_tile_of_embeddings(tmp_path: Path) -> None:
    """Decoded values are NaN where the tile was, with and without a kernel."""
    pixels = noise(HEIGHT, WIDTH, 3, "int8")
    path = file(tmp_path, pixels=pixels, interleave="band", compress="zstd", nodata=-128)
    first, *others = indexed(spoil(path, 1), kind="embedding")
    own = own_grid(first)
    for grid in (own, replace(own, x0=X0 + 3)):
        blocks, count = masked(*(Request(a, grid, WHOLE, None, Embedding()) for a in (first, *others)))
        assert count == 1
        assert not blocks[0].valid[0, 17:31, 65:94].any()
        for band, block in enumerate(blocks):
            np.testing.assert_array_equal(np.isnan(block.values), ~block.valid)
            if grid is own:
                valid = without(BAD_PIXELS) if band == 0 else VALID
                number = pixels[band].astype(np.float64)
                vectors = (np.sign(number) * (np.abs(number) / 127.5) ** 2).astype(np.float32)
                assert_same(block, np.where(valid, vectors, np.float32(np.nan)), valid)


def test_corrupt_strips_are_invalid(tmp_path: Path) -> None:
    """GDAL reads strips one at a time here as well; only the rows of the broken one are lost."""
    path = file(tmp_path, tiled=False, blockxsize=WIDTH, blockysize=16)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    (block,), count = masked(request(indexed(path)[0]))
    rows = block.valid[0].all(axis=1)
    assert count == 1
    np.testing.assert_array_equal(rows, block.valid[0].any(axis=1))
    np.testing.assert_array_equal(np.diff(np.flatnonzero(~rows)), 1)
    assert (~rows).sum() == 16
    np.testing.assert_array_equal(block.values[0][rows], PIXELS[0][rows])


def test_two_sessions_may_differ_about_one_tile(server: RangeServer, asset: Asset) -> None:
    """Both wait for the same answer: one raises, the other masks."""
    with held_for(2, server, fault=Fault(status=403)), ThreadPoolExecutor(2) as threads:
        raising, masking = threads.submit(failure, one_tile(asset)), threads.submit(masked, one_tile(asset))
        assert_names(raising.result(), asset)
        assert not masking.result()[0][0].valid.any()


def test_a_missing_file_is_invalid_throughout(server: RangeServer, asset: Asset) -> None:
    other = replace(asset, href=server.url("gone.tif"), etag=None)
    (good, bad), count = masked(request(asset), request(other))
    assert_same(good, PIXELS[0], VALID)
    assert not bad.valid.any()
    assert count == 12


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_what_lasts_is_masked(server: RangeServer, asset: Asset, fault: Fault) -> None:
    server.fault("*", fault)
    (block,), count = masked(one_tile(asset))
    assert not block.valid.any()
    assert count == 1
    assert 1 <= len(server.log) <= remote.ATTEMPTS


def test_a_changed_file_is_masked_too(server: RangeServer, asset: Asset) -> None:
    grown(server.folder / "a.tif")
    (block,), count = masked(request(asset))
    assert not block.valid.any()
    assert count == 12


def test_on_error_is_one_of_two_words() -> None:
    with pytest.raises(PlanError, match="ignore"):
        Session(on_error="ignore")


# A whole job

SIDE, CHIP = 192, 16
SPOILED = 4
"""The tile in the middle of 3 x 3 that does not decode, of month 0 and band 0; of month 1, band 1 is gone."""


@pytest.fixture(params=["raw", "reflectance"])
def chips(server: RangeServer, request: pytest.FixtureRequest) -> rd.Chips:
    """Return 144 chips of two months and two bands, a served file each."""
    rows = {}
    for month in range(2):
        bands = {}
        for b, band in enumerate(("red", "nir")):
            name = f"{month}-{b}.tif"
            write(
                server.folder / name,
                noise(SIDE, SIDE),
                blockxsize=64,
                blockysize=64,
                compress="deflate",
                nodata=0,
            )
            bands[band] = {
                "href": server.url(name),
                "band_index": 0,
                "scale": 1e-4,
                "offset": 0.0,
                "nodata": 0.0,
            }
        rows[f"s{month}"] = (f"2024-{month + 1:02}-10T10:00:00", bands)
    source = rd.build_from_table(table_of(rows), name="s2")
    even = source.harmonize(bands=["red", "nir"], units=request.param, resolution=10, time="1MS")
    server.forget()
    return even.chips(size=CHIP, grid="tiles")


@pytest.fixture
def clean(chips: rd.Chips) -> xr.Dataset:
    """Return the chips as they are before anything goes wrong."""
    return computed(chips.to_xarray())


@pytest.fixture
def broken(server: RangeServer, chips: rd.Chips, clean: xr.Dataset) -> Callable[[], None]:
    """Spoil one tile and take one file away; return what puts both back."""
    spoiled, gone = server.folder / "0-0.tif", server.folder / "1-1.tif"
    before, kept = spoiled.read_bytes(), gone.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (spoiled, gone)}
    first, last = place(indexed(spoiled)[0], SPOILED)
    spoiled.write_bytes(before[:first] + b"\xff" * (last + 1 - first) + before[last + 1 :])
    os.utime(spoiled, ns=(0, times[spoiled]))  # its ETag says that nothing has changed
    gone.unlink()
    server.forget()

    def mend() -> None:
        for path, data in ((spoiled, before), (gone, kept)):
            path.write_bytes(data)
            os.utime(path, ns=(0, times[path]))

    return mend


def computed(lazy: xr.Dataset | xr.DataTree) -> xr.Dataset:
    assert isinstance(lazy, xr.Dataset)
    return lazy.compute(scheduler="threads")


def assert_same_chips(found: xr.Dataset, wanted: xr.Dataset) -> None:
    assert found["chip_id"].values.tolist() == wanted["chip_id"].values.tolist()
    for name in {"pixels", "valid", "valid_fraction"} & set(wanted.variables):
        np.testing.assert_array_equal(found[name].values, wanted[name].values)


def with_holes(clean: xr.Dataset) -> xr.Dataset:
    """Return the chips as they should be where one tile and one file cannot be read."""
    wanted = clean.copy(deep=True)
    fill = np.nan if wanted["pixels"].dtype.kind == "f" else 0
    west, north = clean["bounds"].values[:, 0], clean["bounds"].values[:, 3]
    row, col = (Y0 - north) / 10, (west - X0) / 10
    inside = (row >= 64) & (row < 128) & (col >= 64) & (col < 128)
    assert inside.sum() == 16
    wanted["pixels"].values[inside, 0, 0] = fill
    wanted["pixels"].values[:, 1, 1] = fill
    wanted["valid_fraction"].values[inside, 0] = wanted["valid_fraction"].values[:, 1] = 0
    if "valid" in wanted:
        wanted["valid"].values[inside, 0] = wanted["valid"].values[:, 1] = False
    return wanted


def test_lazy_chips_raise_and_never_hold_zeros(chips: rd.Chips, broken: Callable[[], None]) -> None:
    with pytest.raises(ReadError, match=r"'s[01]'.*tile \d, bytes \d+-\d+"):
        computed(chips.to_xarray())


def test_lazy_chips_are_invalid_where_asked_for(
    chips: rd.Chips, clean: xr.Dataset, broken: Callable[[], None]
) -> None:
    with pytest.warns(UnreadableTilesWarning, match="10 tiles"):
        found = computed(chips.to_xarray(on_error="mask"))
    assert_same_chips(found, with_holes(clean))
    broken()
    assert_same_chips(computed(chips.to_xarray(on_error="mask")), clean)  # nothing of it is remembered


def test_a_store_says_what_is_masked(
    chips: rd.Chips, clean: xr.Dataset, broken: Callable[[], None], tmp_path: Path
) -> None:
    store = tmp_path / "chips.zarr"
    with pytest.warns(UnreadableTilesWarning, match="10 tiles"):
        chips.to_zarr(store, progress=False, on_error="mask")
    assert_same_chips(xr.open_zarr(store, mask_and_scale=False).load(), with_holes(clean))
    manifest = pq.read_table(store / "manifest.parquet")
    assert sum(manifest.column("unreadable").to_pylist()) == 10
    lines = [line for text in manifest.column("unreadable_tiles").to_pylist() for line in json.loads(text)]
    assert len(lines) == len(set(lines)) == 10
    assert all(re.search(r"'(red|nir)' of record 's[01]'.*tile \d, bytes \d+-\d+", line) for line in lines)


def test_a_job_that_fails_is_not_committed_and_a_rerun_mends_it(
    server: RangeServer, chips: rd.Chips, clean: xr.Dataset, broken: Callable[[], None], tmp_path: Path
) -> None:
    store = tmp_path / "chips.zarr"
    with pytest.raises(JobError, match=r"'s[01]'.*tile \d, bytes \d+-\d+"):
        chips.to_zarr(store, progress=False)
    assert not (store / "zarr.json").exists()
    assert max(server.attempts("1-1.tif").values(), default=0) <= 2  # a task is tried twice, a 404 is not
    broken()
    chips.to_zarr(store, progress=False)
    assert_same_chips(xr.open_zarr(store, mask_and_scale=False).load(), clean)


def test_a_job_outlasts_a_server_that_stumbles(
    server: RangeServer, chips: rd.Chips, clean: xr.Dataset
) -> None:
    server.fault("*", Fault(status=503, retry_after="0", times=2))
    server.forget()
    assert_same_chips(computed(chips.to_xarray()), clean)
    assert {a.status for a in server.log} == {206, 503}
