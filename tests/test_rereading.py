"""Stores compared with their scenes: nothing is found where nothing has changed, and each change is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.transform import from_origin

import rasteret_dask as rd
from rasteret_dask.net import remote
from rasteret_dask.store.rereading import differing
from rasteret_dask.tasks import freezing

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

SIDE, TILE = 128, 64


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freezing, "BLOCK_PX", 64)
        patch.setattr(freezing, "SHARD_CHIPS", 3)
        yield


def scene(path: Path, seed: int) -> Path:
    """Write an uncompressed scene, whose bytes are its pixels: a changed pixel changes no size."""
    pixels = np.random.default_rng(seed).integers(1, 4000, (SIDE, SIDE), dtype=np.uint16)
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16", "crs": 32633,
               "transform": from_origin(499_200, 5_200_000, 10, 10), "tiled": True, "blockxsize": TILE,
               "blockysize": TILE}  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels, 1)
    return path


def change(path: Path, tile: int, add: int) -> None:
    """Add something to the first pixel of a tile."""
    with rasterio.open(path) as file:
        place = int(file.get_tag_item(f"BLOCK_OFFSET_{tile % 2}_{tile // 2}", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    value = int.from_bytes(data[place : place + 2], "little")
    data[place : place + 2] = (value + add).to_bytes(2, "little")
    path.write_bytes(data)


@pytest.fixture
def scenes(tmp_path: Path) -> list[Path]:
    return [scene(tmp_path / f"s_{day}.tif", day) for day in (20240401, 20240402)]


@pytest.fixture
def store(scenes: list[Path], tmp_path: Path) -> Path:
    """Return a store of 32 chips, 16 of each day."""
    files = rd.build_from_files(
        [str(path) for path in scenes], name="mine", bands=["red"], filename_regex=r"s_(?P<date>\d{8})"
    )
    files.harmonize(["red"]).chips(32, cell_km=0.32).to_zarr(tmp_path / "x.zarr", progress=False)
    return tmp_path / "x.zarr"


# Nothing has changed


def test_a_store_is_what_its_scenes_give(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, tmp_path: Path
) -> None:
    """Of several sources, sensors, kinds of units, masks, splits, and with chips that a rule drops."""
    optical = rd.merge(s2, l8).harmonize(
        ["red", "nir"], resolution=10, time="1MS", units="reflectance", mask="clouds"
    )
    chips = rd.join(optical=optical, aef=aef.harmonize(time="static")).chips(32, cell_km=0.96)
    chips = chips.split(0.6, 0.2, 0.2).filter_pixels(min_valid=0.9, source="optical")
    chips.to_zarr(tmp_path / "x.zarr", progress=False)
    kept = len(rd.open_chips(tmp_path / "x.zarr"))
    assert 0 < kept < len(chips)
    report = rd.verify(tmp_path / "x.zarr", sources=10**6)
    assert report.ok, report
    assert report.compared == len(chips)
    assert re.search(rf"read again:? +{len(chips)} chips, as they are stored", str(report))


def test_a_sample_is_drawn_by_its_seed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [rd.verify(store, sources=3, seed=seed) for seed in (0, 0, 1)]
    assert [report.compared for report in reports] == [3] * 3
    assert all(reports)
    assert rd.verify(store).compared == 0


# Scenes that have changed


def test_a_pixel_that_was_changed_after_the_run(store: Path, scenes: list[Path]) -> None:
    """Its file has the size that it had: only its pixels tell."""
    change(scenes[0], tile=3, add=7)
    report = rd.verify(store, sources=10**6)
    assert not report.ok
    assert not report.damaged
    (difference,) = report.differences
    assert (difference.source, difference.variable) == ("mine", "pixels")
    assert (difference.pixels, difference.largest, difference.changed) == (1, 7, ())
    assert str(difference) == f"chip {difference.chip}, source mine: 1 of pixels differ, by at most 7"
    assert report.verdict == "differs from its scenes"
    assert re.search(r"read again:? +32 chips, 1 of which differ from what is stored\n", str(report))
    assert difference.chip in str(report)


def test_a_scene_that_is_another_file_by_now(store: Path, scenes: list[Path]) -> None:
    size = scenes[1].stat().st_size
    scenes[1].write_bytes(scenes[1].read_bytes() + b"more")
    report = rd.verify(store, sources=10**6)
    assert len({difference.chip for difference in report.differences}) == 16
    for difference in report.differences:
        (text,) = difference.changed
        assert f"(red): {size + 4:,} bytes instead of {size:,}" in text
        assert difference.error


def test_a_scene_that_is_gone(store: Path, scenes: list[Path]) -> None:
    scenes[0].unlink()
    report = rd.verify(store, sources=10**6)
    assert report.compared == 32
    assert len(report.differences) == 16
    for difference in report.differences:
        assert difference.changed[0].endswith("(red): gone")
        assert "gone" in str(difference)
    assert "16 of which differ from what is stored; the first 5 differences" in str(report)
    assert len(str(report).splitlines()) <= 12


def test_a_file_that_its_server_says_is_another(
    store: Path, scenes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(scenes[0], tile=0, add=1)
    head = remote.head
    monkeypatch.setattr(remote, "head", lambda href: remote.Head(head(href).size + 1, "other"))
    (difference,) = rd.verify(store, sources=10**6).differences
    assert "bytes instead of" in difference.changed[0]


def test_what_is_stored_is_damaged(store: Path) -> None:
    """Chips of a damaged object are told of, and the others are compared all the same."""
    (shard,) = list((store / "pixels/c/0").rglob("0"))[-1:]
    shard.write_bytes(b"\0" * shard.stat().st_size)
    report = rd.verify(store, sources=10**6)
    assert report.damaged
    assert 0 < len(report.differences) < 32
    assert all("pixels/c/0" in difference.error for difference in report.differences)


# Plans that cannot be read again


def brighter(pixels: xr.DataArray) -> xr.DataArray:
    return pixels + 1


def test_functions_of_this_process_are_called(scenes: list[Path], tmp_path: Path) -> None:
    files = rd.build_from_files(
        [str(scenes[0])], name="mine", bands=["red"], filename_regex=r"s_(?P<date>\d{8})"
    )
    chips = files.harmonize(["red"]).chips(32, cell_km=0.32)
    chips.map(brighter).to_zarr(tmp_path / "x.zarr", progress=False)
    assert rd.verify(tmp_path / "x.zarr", sources=4).ok
    chips.map(lambda pixels: pixels + 2).to_zarr(tmp_path / "y.zarr", progress=False)
    with pytest.raises(
        rd.PlanError,
        match=r"the function .*<lambda>, which this process does not have.*import test_rereading",
    ):
        rd.verify(tmp_path / "y.zarr", sources=4)


def test_functions_that_say_something_else_by_now(
    scenes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = rd.build_from_files(
        [str(scenes[0])], name="mine", bands=["red"], filename_regex=r"s_(?P<date>\d{8})"
    )
    files.harmonize(["red"]).chips(32, cell_km=0.32).map(brighter).to_zarr(
        tmp_path / "x.zarr", progress=False
    )

    def other(pixels: xr.DataArray) -> xr.DataArray:
        return pixels + 3

    monkeypatch.setitem(globals(), "brighter", other)
    with pytest.raises(rd.PlanError, match="says something else by now"):
        rd.verify(tmp_path / "x.zarr", sources=4)


def test_stores_without_a_plan(store: Path, scenes: list[Path], tmp_path: Path) -> None:
    rd.compact(store, tmp_path / "compact.zarr")
    with pytest.raises(rd.StoreError, match="Verify the store that it was compacted from"):
        rd.verify(tmp_path / "compact.zarr", sources=1)
    shutil.copytree(store, tmp_path / "unfinished.zarr")
    (tmp_path / "unfinished.zarr/zarr.json").unlink()
    with pytest.raises(rd.StoreError):
        rd.verify(tmp_path / "unfinished.zarr", sources=1)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "all"])
def test_samples_that_cannot_be(store: Path, count: Any) -> None:
    with pytest.raises(rd.PlanError, match=r"verify\(sources=\)"):
        rd.verify(store, sources=count)


# How two arrays differ


@given(
    array=hnp.arrays(
        st.sampled_from([np.uint16, np.float32, np.bool_]), st.tuples(*[st.integers(1, 4)] * 3),
    ),
    data=st.data(),
)  # fmt: skip
def test_pixels_that_differ_are_counted_once(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    assert differing(array, array.copy()) == (0, 0.0)
    other = array.copy()
    places = data.draw(st.sets(st.tuples(*(st.integers(0, n - 1) for n in array.shape)), min_size=1))
    for place in places:
        other[place] = ~array[place] if array.dtype == bool else (7 if array[place] != 7 else 9)
    count, largest = differing(array, other)
    assert count == len({place[1:] for place in places})
    apart = [abs(float(array[p]) - float(other[p])) for p in places]
    expected = max((one for one in apart if np.isfinite(one)), default=np.nan)
    assert largest == expected or (np.isnan(largest) and np.isnan(expected))


def test_numbers_that_only_look_alike() -> None:
    assert differing(np.array([0.0]), np.array([-0.0])) == (1, 0.0)
    assert differing(np.array([np.nan]), np.array([np.nan]))[0] == 0
    assert differing(np.array(["NaT"], "M8[us]"), np.array(["NaT"], "M8[ns]"))[0] == 0
    assert differing(np.zeros(3), np.zeros(4))[0] == 4
