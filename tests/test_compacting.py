"""Compact stores: written again after a failure, and what their manifests still know."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import xarray as xr
from small_stores import assert_same, small

import rasteret_dask as rd
from rasteret_dask.compacting import compact
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError, StoreError, UnreadableTilesWarning
from rasteret_dask.store.run import run_zarr
from rasteret_dask.storeset import open_chips
from rasteret_dask.tasks.context import ReadContext

SHARD_BYTES = 25_000
COUNTS = ("requests", "bytes_fetched", "tiles_read", "gdal_fallback")


def bright(chips: xr.DataArray) -> xr.DataArray:
    """Keep about half of the chips."""
    return chips.mean(("time", "band", "y", "x")) > 31000


@pytest.fixture(scope="module")
def chips(small_world: World, tmp_path_factory: pytest.TempPathFactory) -> rd.Chips:
    """Return chips of a copy of the world, in which one tile is damaged and what is bright does not fit."""
    folder = tmp_path_factory.mktemp("spoilt") / "s2"
    shutil.copytree(small_world.sentinel2.parent, folder)
    for item in folder.rglob("*.json"):
        item.write_text(item.read_text().replace('"scale": 0.0001', '"scale": 0.001'))
    s2 = rd.build_from_stac(folder / "collection.json", name="s2")
    path = sorted(folder.rglob("B04.tif"))[3]
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, length = page.dataoffsets[1], page.databytecounts[1]
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", dtype="uint16", resolution=10)
    return optical.chips(size=32, cell_km=0.96).sample(60).filter_pixels(bright)


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of small shards, some of whose chips were dropped."""
    place = tmp_path_factory.mktemp("stores") / "store"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableTilesWarning)
        run_zarr(
            small(chips, SHARD_BYTES),
            str(place),
            ReadContext(chips.query.functions, "mask"),
            None,
            progress=False,
        )
    return place


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it compact, in one go."""
    place = tmp_path_factory.mktemp("stores") / "compact"
    compact(store, place)
    return place


def stamps(folder: Path) -> dict[str, int]:
    """Return path -> time of change of every file."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_failed_compact_is_resumed(store: Path, whole: Path, tmp_path: Path) -> None:
    """What was written stays as it is, and the result is that of one go."""
    source, target = tmp_path / "store", tmp_path / "compact"
    shutil.copytree(store, source)
    objects = sorted(source.glob("pixels/c/*/0/0/0/0"), key=lambda p: int(p.parts[-5]))
    broken = objects[len(objects) // 2]
    good = broken.read_bytes()
    broken.write_bytes(bytes([good[0] ^ 255]) + good[1:])
    with pytest.raises(JobError, match=r"(?s)[12] of \d+ shards failed.*other bytes"):
        compact(source, target)
    with pytest.raises(
        StoreError, match=r"unfinished store.*Call compact with the same store and this target"
    ):
        open_chips(target)
    reports = [json.loads(p.read_bytes()) for p in (target / "_job" / "done").iterdir()]
    assert 0 < len(reports) < len(open_chips(whole).stored.sizes)
    before = stamps(target)
    broken.write_bytes(good)
    compact(source, target)
    after = stamps(target)
    kept = {p for r in reports for p in (f"_job/done/{r['shard']}.json", *(o["path"] for o in r["objects"]))}
    assert {path: before[path] for path in kept} == {path: after[path] for path in kept}
    for path in stamps(whole):
        if path.startswith(("_job/tried", "_job/done", "manifest.parquet")):
            continue  # they say which process it was, and how often it tried
        assert (target / path).read_bytes() == (whole / path).read_bytes(), path
    attempts = pq.read_table(target / "manifest.parquet")["attempts"].to_pylist()
    assert set(attempts) == {1, 3}  # the broken one was tried twice before
    assert_same(open_chips(target).load(), open_chips(store).load())
    compact(source, target)  # finished: nothing is done again
    assert stamps(target) == after


def test_objects_that_are_gone_or_of_other_chips_are_written_again(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    target = tmp_path / "compact"
    shutil.copytree(whole, target)
    (target / "zarr.json").unlink()
    (target / "pixels/c/1/0/0/0/0").unlink()
    report = target / "_job" / "done" / "all-00000.json"
    report.write_text(json.dumps({**json.loads(report.read_bytes()), "key": "of other chips"}))
    before = stamps(target)
    compact(store, target)
    after = stamps(target)
    again = {
        path.split("/c/")[1].split("/")[0]
        for path in before
        if "pixels/c/" in path and before[path] != after[path]
    }
    assert again == {"0"}
    assert_same(open_chips(target).load(), open_chips(store).load())


def test_what_lies_there_is_left_alone(chips: rd.Chips, store: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableTilesWarning)
        layout = small(chips.sample(20), SHARD_BYTES)
        run_zarr(layout, str(other), ReadContext(chips.query.functions, "mask"), None, progress=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    for target in (whole, store, tmp_path / "notes"):
        before = stamps(target)
        with pytest.raises(
            StoreError, match=r"objects of something else|chips of another plan|what to_zarr writes"
        ):
            compact(other, target)
        assert stamps(target) == before


def test_the_manifest_keeps_what_reading_said(store: Path, whole: Path) -> None:
    before, after = (pq.read_table(place / "manifest.parquet") for place in (store, whole))
    assert after.schema.equals(before.schema)
    old: list[dict[str, Any]] = before.to_pylist()
    kept = [row for row in old if row["kept"]]
    new: list[dict[str, Any]] = after.to_pylist()
    assert len(new) < len(kept)
    assert (
        sum(row["kept"] for row in new) == sum(row["kept"] for row in old) < sum(row["chips"] for row in old)
    )
    for name in COUNTS:
        assert sum(row[name] for row in new) == sum(row[name] for row in kept)
    assert sum(row["tiles_read"] for row in new) > 0

    def clipped(rows: list[dict[str, Any]]) -> Counter[str]:
        found: Counter[str] = Counter()
        for row in rows:
            found.update(json.loads(row["clipped"]))
        return found

    assert clipped(new) == clipped(kept)
    assert clipped(new).total() > 0

    ids = pq.read_table(store / "chips.parquet")["chip_id"].to_pylist()
    starts = np.cumsum([0, *(row["chips"] for row in old)])
    shard_of = {chip: int(starts.searchsorted(place, side="right")) - 1 for place, chip in enumerate(ids)}
    rest = iter(open_chips(whole))
    hit = 0
    for row in new:
        own = {shard_of[next(rest)] for _ in range(row["chips"])}
        tiles = {tile for number in own for tile in json.loads(old[number]["unreadable_tiles"])}
        assert set(json.loads(row["unreadable_tiles"])) == tiles
        assert row["unreadable"] == len(tiles)
        assert all(n in own for n in range(min(own), max(own)) if old[n]["kept"])
        hit += bool(tiles)
    assert 0 < hit < len(new)
