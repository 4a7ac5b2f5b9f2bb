from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import xarray as xr
import zarr
from rasterio.windows import Window

from rasteret_dask.demo.checks import (
    Check,
    Pixels,
    check_emptiest,
    check_objects,
    check_pixels,
    check_splits,
    check_store,
)
from rasteret_dask.demo.run import SMALL, demo_chips, run_demo
from rasteret_dask.demo.world import World, make_world
from rasteret_dask.errors import StoreError
from rasteret_dask.show.audit import Audit
from rasteret_dask.store.verifying import verify

# stackstac multiplies transforms the way affine 3.1 discourages
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

Ran = tuple[Path, tuple[Check, ...], list[str]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Return the demo's folder, its checks and what it said."""
    folder, said = tmp_path_factory.mktemp("demo"), list[str]()
    checks = run_demo(folder, SMALL, say=said.append)
    return folder, checks, said


@pytest.fixture
def world(ran: Ran) -> World:
    return make_world(ran[0] / "world", size=SMALL.world)


@pytest.fixture
def store(ran: Ran, tmp_path: Path) -> Path:
    """Return a copy of the store, to be spoiled."""
    return Path(shutil.copytree(ran[0] / "train.zarr", tmp_path / "train.zarr"))


def opened(store: Path) -> xr.DataTree:
    return xr.open_datatree(store, engine="zarr")


def writable(store: Path, path: str) -> Any:
    return zarr.open_array(store, path=path, mode="r+")


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.what for check in checks if not check.ok]


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_every_check_is_passed_and_said(ran: Ran) -> None:
    folder, checks, said = ran
    assert len(checks) >= 10
    assert not failed(checks)
    text = "\n".join(said)
    assert all(check.what in text for check in checks)
    assert "none failed" in said[-1]
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_run_writes_nothing_and_says_so(ran: Ran) -> None:
    folder, _, _ = ran
    before, said = state(folder), list[str]()
    assert not failed(run_demo(folder, SMALL, say=said.append))
    assert state(folder) == before
    text = "\n".join(said)
    assert "there already, used again" in text
    assert "complete already, nothing is written" in text


def test_both_sensors_fill_slots_and_may_is_landsat_s(ran: Ran) -> None:
    with opened(ran[0] / "train.zarr") as tree:
        sources = tree["optical"].to_dataset()["member"].values.astype(object)
    assert "s2" in sources[:, 0]  # where its pass covers only a part of a chip, Landsat's comes first
    assert set(sources[:, 1]) == {"l8"}
    assert "s2" in sources[:, 2]


def test_the_world_is_split_without_leakage(ran: Ran, world: World) -> None:
    audit = demo_chips(world, SMALL).audit()
    assert audit.ok
    assert sum(audit.cells.values()) >= 20
    assert all(audit.chips.values())


@pytest.mark.parametrize(("source", "found"), [("optical", "Sentinel-2"), ("embeddings", "embeddings")])
def test_one_wrong_pixel_fails_the_check(store: Path, world: World, source: str, found: str) -> None:
    array = writable(store, f"{source}/pixels")
    with opened(store) as tree:
        members = tree[source].to_dataset()["member"].values[:, 0].tolist()
    number, slot = next(n for n, member in enumerate(members) if member in ("s2", "aef")), 0
    chip = array[number]
    y, x = np.argwhere(np.isfinite(chip[slot, 0]))[-1]
    chip[slot, 0, y, x] += 1
    array[number] = chip
    assert not check_objects(store).ok
    assert any(path.startswith(f"{source}/pixels/") for path in verify(store).damaged)
    with opened(store) as tree:
        (what,) = failed(check_pixels(tree, world))
    assert what.startswith(f"equal to rasterio ({found}")


def test_a_wrong_pixel_of_a_resampled_slot_fails_the_check(store: Path, world: World) -> None:
    array = writable(store, "optical/pixels")
    chip = array[0]
    y, x = np.argwhere(np.isfinite(chip[1, 2]))[0]
    chip[1, 2, y, x] += 3 * 2.75e-5
    array[0] = chip
    with opened(store) as tree:
        (what,) = failed(check_pixels(tree, world))
    assert what.startswith("equal to rasterio (Landsat")


def test_a_pixel_masked_too_much_fails_the_check(store: Path, world: World) -> None:
    array = writable(store, "optical/pixels")
    chip = array[0]
    y, x = np.argwhere(np.isfinite(chip[0, 0]))[0]
    chip[0, :, y, x] = np.nan
    array[0] = chip
    with opened(store) as tree:
        assert failed(check_pixels(tree, world))


def masked_after_filling(world: World, chip: xr.Dataset) -> Pixels:
    """Return a chip's April as a mosaic that is masked once it is made: the first granule's pixels win, clouds too."""
    west, south, east, north = chip["bounds"].values.tolist()
    size = chip.sizes["x"]
    mosaic, scl = np.zeros((4, size, size), np.uint16), np.zeros((size, size), np.uint8)
    layers: list[tuple[float, list[Any]]] = []
    for path in world.sentinel2.parent.glob("*_20240409_*/*.json"):
        item, pixels = json.loads(path.read_text()), []
        for key in (*chip["band"].values.tolist(), "scl"):
            with rasterio.open(path.parent / item["assets"][key]["href"]) as file:
                times, (left, bottom, right, top) = round(file.res[0] / 10), file.bounds
                col, row = (west - left) / file.res[0], (top - north) / file.res[1]
                window = Window(col, row, size // times, size // times)
                read = file.read(1, window=window, boundless=True, fill_value=0)
                pixels.append(read.repeat(times, axis=0).repeat(times, axis=1))
        apart = np.hypot((west + east - left - right) / 2, (south + north - bottom - top) / 2)
        layers.append((float(apart), pixels))
    for _, (*bands, quality) in sorted(layers, key=lambda layer: layer[0]):
        empty = mosaic[0] == 0
        mosaic[:, empty], scl[empty] = np.stack(bands)[:, empty], quality[empty]
    hidden = np.isin(scl, (0, 3, 8, 9, 10))
    return np.where(hidden, np.nan, mosaic * 1e-4 - 0.1).astype(np.float32)


def test_a_mosaic_that_is_masked_once_it_is_made_fails_the_check(store: Path, world: World) -> None:
    array, wrong = writable(store, "optical/pixels"), 0
    with opened(store) as tree:
        optical = tree["optical"].to_dataset().load()
    for number in np.flatnonzero(optical["member"].values[:, 0] == "s2").tolist():
        chip = optical.isel(chip=number)
        mosaic = masked_after_filling(world, chip)
        right = chip["pixels"].values[0]
        seen = np.isfinite(mosaic)
        np.testing.assert_array_equal(mosaic[seen], right[seen])  # nothing but fills is missing
        wrong += int(np.sum(np.isfinite(right) & ~seen))
        pixels = array[number]
        pixels[0] = mosaic
        array[number] = pixels
    assert wrong > 10_000
    with opened(store) as tree:
        what = failed(check_pixels(tree, world))
    assert [line[:31] for line in what] == [
        "equal to rasterio (Sentinel-2, ", "valid fractions are those of th", "one scene's gaps are filled by "
    ][: len(what)]  # fmt: skip


def test_an_emptiest_chip_that_lacks_what_a_scene_sees_fails_its_check(store: Path, world: World) -> None:
    """What is hidden in one scene of the month comes from the others: what is left nobody sees."""
    with opened(store) as tree:
        assert check_emptiest(tree, world).ok
        emptiest = int(tree["optical"].to_dataset()["valid_fraction"].values[:, 0].argmin())
    array = writable(store, "optical/pixels")
    chip = array[emptiest]
    chip[0] = np.nan
    array[emptiest] = chip
    with opened(store) as tree:
        check = check_emptiest(tree, world)
    assert not check.ok
    assert not check.what.endswith(": 0 values could be filled")


def test_a_wrong_valid_fraction_fails_the_check(store: Path, world: World) -> None:
    array = writable(store, "optical/valid_fraction")
    array[:] = 0.25
    with opened(store) as tree:
        assert failed(check_pixels(tree, world)) == ["valid fractions are those of the same pixels"]
        ids = tree["optical"].to_dataset()["chip_id"].values.tolist()
        assert [what[:21] for what in failed(check_store(tree, ids))] == ["median valid fraction"]


def test_a_flipped_byte_is_found(store: Path) -> None:
    shard = max((store / "optical" / "pixels").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "optical/pixels" in check_objects(store).what
    shard.unlink()
    assert not check_objects(store).ok


def test_chips_in_another_order_fail_the_check(store: Path) -> None:
    ids = pq.read_table(store / "chips.parquet", columns=["chip_id", "split"]).to_pylist()
    train = [row["chip_id"] for row in ids if row["split"] == "train"]
    with opened(store) as tree:
        assert not failed(check_store(tree, train))
        assert len(failed(check_store(tree, train[::-1]))) == 1
        assert len(failed(check_store(tree, train[:-1]))) == 1


def test_splits_that_leak_or_miss_their_shares_fail_the_check() -> None:
    names = ("train", "val", "test")
    asked = dict(zip(names, (0.7, 0.15, 0.15), strict=True))
    good = Audit(
        chips=dict(zip(names, (70, 15, 15), strict=True)), ratios=asked, targets=asked,
        cells=dict(zip(names, (70, 15, 15), strict=True)), lost={}, overlaps={"train-val": 0}, distance_m={},
    )  # fmt: skip
    assert not failed(check_splits(good, 70))
    assert len(failed(check_splits(good, 71))) == 1
    assert len(failed(check_splits(replace(good, overlaps={"train-val": 1}), 70))) == 1
    assert len(failed(check_splits(replace(good, ratios={**asked, "train": 0.9}), 70))) == 1
    assert len(failed(check_splits(replace(good, chips={**good.chips, "test": 0}), 70))) == 1


def test_fresh_starts_anew_but_removes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.zarr").mkdir()
    (tmp_path / "train.zarr" / "mine.txt").write_text("kept")
    with pytest.raises(StoreError, match=r"train.zarr without _job/begun.json"):
        run_demo(tmp_path, SMALL, fresh=True, say=lambda line: None)
    assert (tmp_path / "train.zarr" / "mine.txt").read_text() == "kept"


def test_a_store_of_another_plan_is_left_alone_and_fresh_is_named(ran: Ran, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ran[0], tmp_path / "demo"))  # other paths, hence another plan
    before = state(folder / "train.zarr")
    with pytest.raises(StoreError, match=r"chips of another plan.*rasteret-dask demo --fresh"):
        run_demo(folder, SMALL, say=lambda line: None)
    assert state(folder / "train.zarr") == before


@pytest.mark.slow
def test_another_world_replaces_its_store(ran: Ran, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ran[0], tmp_path / "demo"))
    wider = replace(SMALL, world=replace(SMALL.world, granule_width_px=330))
    assert not failed(run_demo(folder, wider, say=lambda line: None))
