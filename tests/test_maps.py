"""A map of what a model says equals a dull sliding window over the whole cube, whatever the blocks and workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import rasterio
import xarray as xr
import zarr
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.demo.world import World
from rasteret_dask.prediction import mapfiles, multiscales
from rasteret_dask.prediction.cogs import array_blocks
from rasteret_dask.prediction.mapstore import MapZarr
from rasteret_dask.prediction.mapwork import BlockWork


def texture(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give two numbers a pixel that hang on the pixel's neighbours and on its place in the chip."""
    first = pixels[:, :, 0].mean(axis=1) if pixels.ndim == 5 else pixels[:, 0]
    side = first.shape[-1]
    ramp = np.linspace(0.0, 1.0, side, dtype=np.float32)
    blurred = first + np.roll(first, 1, axis=-1) + np.roll(first, -1, axis=-2)
    return np.stack([blurred * (1 + ramp), first * (2 - ramp[:, None])], axis=1)


def weight_of(blend: str, side: int) -> NDArray[np.float64]:
    if blend == "hann":
        line = np.array([np.sin(np.pi * (i + 0.5) / side) ** 2 for i in range(side)])
        return np.outer(line, line)
    return np.ones((side, side))


def dull_map(
    chips: rd.Chips, cube: Any, grid: Any, blend: str, least: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Slide over a cube that is in memory, chip by chip, and blend with float64: (channel, y, x), and chips a pixel."""
    height, width = grid["shape"]
    west, _, _, north = grid["bounds"]
    pixel = 10.0
    values = np.asarray(cube.values, dtype=np.float32)
    cube_north, cube_west = float(cube.y[0]) + pixel / 2, float(cube.x[0]) - pixel / 2
    side = chips.planned.spec.size
    total = np.full((2, height, width), -np.inf if blend == "max" else 0.0)
    weight, count = np.zeros((height, width)), np.zeros((height, width), dtype=np.int64)
    nearest = np.full((height, width), np.inf)
    weights = weight_of(blend, side)
    steps = (np.arange(side) - (side - 1) / 2) ** 2
    from_centre = steps[:, None] + steps
    zone = chips.table.filter(pc.equal(chips.table.column("epsg"), cube.rio.crs.to_epsg()))
    for west_m, _, _, north_m in bounds_of(zone):
        row, col = round((cube_north - north_m) / pixel), round((west_m - cube_west) / pixel)
        padded = np.full((*values.shape[:2], side, side), np.nan, dtype=np.float32)
        y0, x0 = max(row, 0), max(col, 0)
        y1, x1 = min(row + side, values.shape[2]), min(col + side, values.shape[3])
        if y0 < y1 and x0 < x1:
            padded[:, :, y0 - row : y1 - row, x0 - col : x1 - col] = values[:, :, y0:y1, x0:x1]
        valid = np.isfinite(padded).all(axis=1).sum(axis=0) >= least
        answer = texture(np.nan_to_num(padded, nan=0.0)[None])[0].astype(np.float64)
        top, left = round((north - north_m) / pixel), round((west_m - west) / pixel)
        y0, x0 = max(-top, 0), max(-left, 0)
        y1, x1 = min(side, height - top), min(side, width - left)
        inside = (slice(y0, y1), slice(x0, x1))
        here = (slice(top + y0, top + y1), slice(left + x0, left + x1))
        own, part = valid[inside], answer[:, *inside]
        count[here] += own
        if blend == "max":
            total[:, *here] = np.where(own, np.maximum(total[:, *here], part), total[:, *here])
        elif blend == "centre":
            nearer = own & (from_centre[inside] < nearest[here])
            nearest[here] = np.where(nearer, from_centre[inside], nearest[here])
            total[:, *here] = np.where(nearer, part, total[:, *here])
        else:
            total[:, *here] += np.where(own, part * weights[inside], 0.0)
            weight[here] += np.where(own, weights[inside], 0.0)
    if blend in ("hann", "mean"):
        total = total / np.where(count > 0, weight, 1.0)
    total[:, count == 0] = np.nan
    return total, count


@pytest.fixture(scope="module")
def optical(s2: rd.Collection) -> rd.Collection:
    """One tile, and a pick that looks at pixels only: of chips as of a cube."""
    return s2.where(tile="MGRS-33UVR").harmonize(["red", "nir"], time="3MS", pick="median")


@pytest.fixture(scope="module")
def cube(optical: rd.Collection) -> Any:
    """The whole ground as one cube in memory: (time, band, y, x)."""
    return optical.cube().load()


AREA = (0.1, 0.35, 0.75, 0.7)


def area_of(cube: Any, shares: tuple[float, float, float, float]) -> Any:
    """Return a part of a cube's ground as a polygon in degrees."""
    import geopandas as gpd
    from shapely.geometry import box

    left, bottom, right, top = (
        float(v) for v in (cube.x[0] - 5, cube.y[-1] - 5, cube.x[-1] + 5, cube.y[0] + 5)
    )
    wide, high = right - left, top - bottom
    w, s, e, n = shares
    shape = box(left + w * wide, bottom + s * high, left + e * wide, bottom + n * high)
    return gpd.GeoSeries([shape], crs=32633).to_crs(4326)


@dataclass(frozen=True)
class Ground:
    """Where a map is drawn."""

    collection: rd.Collection
    cubes: dict[str, Any]
    """Name of a zone -> its cube in memory, which reaches beyond all chips."""
    aoi: Any = None


@pytest.fixture(scope="module")
def grounds(optical: rd.Collection, cube: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ground]:
    """Part of a zone; and a scene that lies on both sides of the border of two."""
    scene = across_zones(tmp_path_factory.mktemp("two")).harmonize(time="static")
    cubes = {}
    for name, (west, south, east, north) in scene_bounds(scene).items():
        bounds = (west - 480, south - 480, east + 480, north + 480)
        cubes[name] = scene.cube(bounds=bounds, crs=f"EPSG:326{name}").load()
    return {
        "one": Ground(optical, {"33": cube}, area_of(cube, AREA)),
        "two": Ground(scene, cubes),
    }


def scene_bounds(scene: rd.Collection) -> dict[str, Any]:
    grids = scene.chips(32, stride=32, cover=True).plan_map(texture).explain()["grids"]
    return {name: grid["bounds"] for name, grid in grids.items()}


@pytest.fixture(scope="module")
def workers() -> Iterator[Client]:
    """Two processes of two threads."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([16, 24, 32, 48]),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
    edge=st.sampled_from(["shift", "pad"]),
    blend=st.sampled_from(["hann", "mean", "max", "centre"]),
    block_px=st.sampled_from([None, 256]),
    batch_size=st.sampled_from([1, 5, 16]),
    zones=st.sampled_from(["one", "two"]),
    on_cluster=st.booleans(),
)
def test_a_map_is_a_sliding_window_over_the_cube(
    grounds: dict[str, Ground],
    workers: Client,
    size: int,
    overlap: float,
    edge: Any,
    blend: Any,
    block_px: Any,
    batch_size: int,
    zones: str,
    on_cluster: bool,
) -> None:
    ground = grounds[zones]
    stride = max(int(size * (1 - overlap)), 1)
    chips = ground.collection.chips(size, stride=stride, cover=True, edge=edge, aoi=ground.aoi)
    plan = chips.plan_map(texture, blend=blend, batch_size=batch_size, block_px=block_px)
    seen: Any = plan.load(workers if on_cluster else None)
    grids = plan.explain()["grids"]
    assert set(grids) == set(ground.cubes)
    for name, grid in grids.items():
        own = seen if len(grids) == 1 else seen[name]
        want, count = dull_map(chips, ground.cubes[name], grid, blend)
        np.testing.assert_array_equal(own["count"].values, count)
        np.testing.assert_allclose(own["values"].values, want, rtol=1e-6, atol=1e-6)
        assert (count > 0).mean() > (0.9 if zones == "one" else 0.3)


@pytest.fixture(scope="module")
def area(optical: rd.Collection) -> rd.Chips:
    """Chips over a whole tile: 2 x 2 blocks of 256 pixels."""
    return optical.chips(32, stride=24, cover=True)


@pytest.fixture(scope="module")
def in_memory(area: rd.Chips) -> Any:
    return area.predict(texture)


def objects(folder: Path) -> dict[str, bytes]:
    """Return what a store holds beside its ledger's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("_job", "manifest.parquet")
    }


def same_maps(one: Any, other: Any) -> None:
    assert set(one.data_vars) == set(other.data_vars)
    for name in one.data_vars:
        np.testing.assert_allclose(one[name].values, other[name].values, rtol=1e-6, atol=1e-6)


def test_a_store_holds_what_memory_does_whoever_writes_it(
    area: rd.Chips, in_memory: Any, workers: Client, tmp_path: Path
) -> None:
    to = MapZarr(tmp_path / "here.zarr", block_px=256)
    report = area.predict(texture, to=to, progress=False)
    assert (report.committed, report.chips, report.kept) == (True, len(area), len(area))
    same_maps(rd.open_map(to.store), in_memory)
    there = MapZarr(tmp_path / "there.zarr", block_px=256)
    area.predict(texture, to=there, client=workers, progress=False)
    same_maps(rd.open_map(there.store), in_memory)
    again = area.predict(texture, to=to, progress=False)
    assert again.shards_written == 0
    with pytest.raises(rd.StoreError, match=r"what predict wrote.*rd\.open_map"):
        rd.open_chips(to.store)


def test_what_is_kept_in_memory_is_computed_where_gpus_are(
    optical: rd.Collection, cube: Any, tmp_path: Path
) -> None:
    """As what is written: a worker that does not declare the resource computes nothing."""
    chips = optical.chips(32, stride=32, cover=True, aoi=area_of(cube, AREA))
    maps, vectors = chips.predict(texture), chips.embed(brightness)
    workers = {"with": {"cls": Worker, "options": {"nthreads": 2, "resources": {"GPU": 1}}}}
    workers["without"] = {"cls": Worker, "options": {"nthreads": 2}}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0", "port": 0}}
    with SpecCluster(workers, scheduler) as cluster, Client(cluster) as client:
        same_maps(chips.predict(texture, client=client), maps)
        assert chips.embed(brightness, client=client).equals(vectors)
        chips.predict(texture, to=tmp_path / "map.tif", client=client, progress=False)
        counts = {name: worker.state.executed_count for name, worker in cluster.workers.items()}
    assert counts["with"] > 0
    assert counts["without"] == 0


def brightness(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(pixels.mean(axis=(2, 3)))


def test_a_map_opens_in_rioxarray_and_rasterio_s_words(area: rd.Chips, in_memory: Any) -> None:
    assert in_memory.rio.crs.to_epsg() == 32633
    left, bottom, right, top = in_memory.rio.bounds()
    assert in_memory.rio.resolution() == (10.0, -10.0)
    (grid,) = area.plan_map(texture).explain()["grids"].values()
    assert [left, bottom, right, top] == grid["bounds"]


def test_what_fails_is_all_that_a_rerun_computes(area: rd.Chips, in_memory: Any, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    (faults / "on").touch()
    east = float(in_memory.x[0]) + 2600

    def brittle(batch: Any) -> NDArray[Any]:
        pixels = batch["s2"][:, 0]
        if (faults / "on").exists() and (batch["bbox"][:, 0] > east).any():
            raise ValueError("a fault east of here")
        return np.asarray(pixels)

    model = rd.Model(texture, inputs=brittle, version="1")
    to = MapZarr(tmp_path / "map.zarr", block_px=256)
    with pytest.raises(rd.JobError, match="a fault east of here"):
        area.predict(model, to=to, progress=False)
    assert not (tmp_path / "map.zarr" / "zarr.json").exists()
    with pytest.raises(rd.StoreError, match="no finished map"):
        rd.open_map(to.store)
    (faults / "on").unlink()
    report = area.predict(model, to=to, progress=False)
    assert 0 < report.shards_written < report.shards == 4
    same_maps(rd.open_map(to.store), in_memory)
    with pytest.raises(rd.StoreError, match="another plan"):
        area.predict(rd.Model(texture, fill=1.0), to=to, progress=False)


def deadly(batch: Any) -> NDArray[Any]:
    """Kill the process at chips east of where a file says, while that file is there."""
    file = Path(os.environ["DEADLY"])
    if file.exists() and (batch["bbox"][:, 0] > float(file.read_text())).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(batch["s2"][:, 0])


def mapped_by_a_process(stac: str, store: str) -> None:
    """Write the map of a process that is to be killed."""
    s2 = rd.build_from_stac(stac, name="s2", date_range=("2024-04-01", "2024-06-30"))
    one = s2.where(tile="MGRS-33UVR").harmonize(["red", "nir"], time="3MS", pick="median")
    model = rd.Model(texture, inputs=deadly, version="1")
    one.chips(32, stride=24, cover=True).predict(model, to=MapZarr(store, block_px=256), progress=False)


def test_a_process_that_is_killed_repeats_no_finished_block(
    small_world: World, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, store = tmp_path / "east", tmp_path / "map.zarr"
    file.write_text(str(float(in_memory.x[0]) + 2600))
    monkeypatch.setenv("DEADLY", str(file))
    code = f"import test_maps; test_maps.mapped_by_a_process({str(small_world.sentinel2)!r}, {str(store)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (store / "zarr.json").exists()
    finished = {path.stem for path in (store / "_job" / "done").iterdir()}
    assert finished
    file.unlink()
    mapped_by_a_process(str(small_world.sentinel2), str(store))
    same_maps(rd.open_map(store), in_memory)
    tries = {path.name: len(list(path.iterdir())) for path in (store / "_job" / "tried").iterdir()}
    assert {tries[name] for name in finished} == {1}


def test_classes_keep_the_highest_of_the_blended_scores(area: rd.Chips, in_memory: Any) -> None:
    named = rd.Outputs("classes", classes={3: "bright", 7: "dark"}, colors={"dark": "#112233"})
    seen: Any = area.predict(texture, named)
    want = np.where(in_memory["values"].values.argmax(axis=0) == 0, 3, 7)
    want[in_memory["count"].values == 0] = 0
    assert seen["classes"].dtype == "uint8"
    np.testing.assert_array_equal(seen["classes"].values, want)
    assert seen["classes"].attrs["flag_values"] == [3, 7]
    assert seen["classes"].rio.nodata == 0


def test_codes_that_a_model_gives_are_votes(area: rd.Chips, tmp_path: Path) -> None:
    def code(pixels: NDArray[Any]) -> NDArray[Any]:
        return (pixels[:, 0] > 0.1).astype(np.int64) + 1

    seen: Any = area.predict(code, rd.Outputs("classes", classes={1: "dark", 2: "bright"}), blend="mean")
    red: Any = area.predict(lambda pixels: pixels[:, 0], "values", blend="mean")
    there = seen["count"].values > 0
    np.testing.assert_array_equal(
        seen["classes"].values[there], np.where(red["values"].values[0][there] > 0.1, 2, 1)
    )
    with pytest.raises(rd.ModelError, match="codes of classes"):
        area.predict(code, "classes")
    with pytest.raises(rd.JobError, match="class 2; expected one of the codes 0, 1"):
        area.predict(
            code, rd.Outputs("classes", classes=["a", "b"]), to=tmp_path / "map.zarr", progress=False
        )


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_model_may_give_other_pixels(optical: rd.Collection, cube: Any, factor: float) -> None:
    """A coarser or finer output lies on a grid of its own, whose mean over pixels is that of the chips' pixels."""

    def other(pixels: NDArray[Any]) -> NDArray[Any]:
        red = pixels[:, 0]
        if factor > 1:
            return np.asarray(red.repeat(2, axis=1).repeat(2, axis=2))
        n, side, _ = red.shape
        return np.asarray(red.reshape(n, side // 2, 2, side // 2, 2).mean(axis=(2, 4)))

    chips = optical.chips(32, stride=16, cover=True, edge="pad", aoi=area_of(cube, (0.2, 0.4, 0.6, 0.7)))
    seen: Any = chips.predict(rd.Model(other, version=str(factor)), blend="mean")
    assert seen.rio.resolution() == (10 / factor, -10 / factor)
    plain: Any = chips.predict(lambda pixels: pixels[:, 0], blend="mean")
    fine = plain["values"][0]
    if factor > 1:
        want = fine.values.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_allclose(seen["values"].values[0], want, rtol=1e-5)
        return
    inner = seen.isel(y=slice(1, -1), x=slice(1, -1))
    for down in range(0, inner.sizes["y"], 7):
        for across in range(0, inner.sizes["x"], 5):
            y, x = float(inner.y[down]), float(inner.x[across])
            four = fine.sel(y=slice(y + 10, y - 10), x=slice(x - 10, x + 10))
            assert four.shape == (2, 2)
            np.testing.assert_allclose(inner["values"].values[0, down, across], four.mean(), rtol=1e-5)


def zeros_only(pixels: NDArray[Any]) -> NDArray[Any]:
    assert not pixels.any(), "no chip is read"
    return np.asarray(pixels[:, 0] if pixels.ndim == 4 else pixels[:, 0, 0])


@pytest.mark.parametrize("name", ["map.tif", "answers.parquet"])
def test_a_folder_where_a_file_is_to_be_is_told_before_anything_is_computed(
    area: rd.Chips, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    model = rd.Model(zeros_only if name == "map.tif" else lambda pixels: zeros_only(pixels)[:, 0, :2])
    for to, found in ((name, "a folder"), (f"file/below/{name}", "a file in place of the folder")):
        with pytest.raises(rd.StoreError, match=rf"{found}.*Choose another path"):
            area.predict(model, to=tmp_path / to, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {name, "file"}


@pytest.mark.parametrize(("size", "stride"), [(8, 2), (16, 8)])
def test_a_map_in_degrees_has_a_chip_every_few_pixels(tmp_path: Path, size: int, stride: int) -> None:
    """Corners that lie less than a thousandth of a degree apart are different places."""
    pixel, (height, width) = 1e-4, (48, 64)
    numbers = np.random.default_rng(0).random((height, width), dtype=np.float32) + 1
    profile = {"width": width, "height": height, "count": 1, "dtype": "float32", "crs": 4326}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", transform=rasterio.Affine(pixel, 0, 15.0, 0, -pixel, 50.0),
        tiled=True, blockxsize=16, blockysize=16, **profile,
    ) as file:  # fmt: skip
        file.write(numbers, 1)
    degrees = rd.build_from_files(tmp_path, name="a", static=True).harmonize()
    chips = degrees.chips(size, stride=stride, grid="tiles", cover=True)
    seen: Any = chips.predict(lambda pixels: pixels[:, 0] * 2, blend="mean", progress=False)
    np.testing.assert_allclose(seen["values"].values[0], numbers * 2, rtol=1e-6)
    assert int(seen["count"].max()) == (size // stride) ** 2


def test_invalid_input_stays_invalid(s2: rd.Collection, cube: Any) -> None:
    masked = s2.where(tile="MGRS-33UVR").harmonize(["red"], time="1MS", mask="clouds", pick="median")
    chips = masked.chips(32, stride=24, cover=True)
    ground: Any = masked.cube().load()
    seen: Any = chips.predict(lambda pixels: pixels.max(axis=(1, 2)), blend="mean")
    ground = ground.sel(x=seen.x, y=seen.y)
    slots = np.isfinite(ground.values[:, 0]).sum(axis=0)
    np.testing.assert_array_equal(seen["inputs"].values, slots)
    np.testing.assert_array_equal(np.isnan(seen["values"].values[0]), slots == 0)
    strict: Any = chips.predict(lambda pixels: pixels.max(axis=(1, 2)), blend="mean", min_inputs=2)
    np.testing.assert_array_equal(np.isnan(strict["values"].values[0]), slots < 2)
    assert 0 < (slots < 2).mean() < 1


def test_what_cannot_be_a_map_is_told_before_pixels_are_read(
    area: rd.Chips, s2: rd.Collection, cube: Any, tmp_path: Path
) -> None:
    def at_once(
        model: Any, *args: Any, match: str, error: type[Exception] = rd.ModelError, **options: Any
    ) -> None:
        with pytest.raises(error, match=match):
            area.predict(model, *args, to=tmp_path / "never.zarr", progress=False, **options)
        assert not (tmp_path / "never.zarr").exists()

    at_once(lambda pixels: pixels[:, :, :10], match="a square whose side divides")
    at_once(lambda pixels: pixels[:, :, :7, :7], match="a square whose side divides the chip's 32 pixels")
    at_once(lambda pixels: pixels @ np.zeros((5, 5)), match="float32")
    at_once(texture, rd.Outputs("classes", classes=["a", "b", "c"]), match="3 scores")
    at_once(lambda pixels: pixels.mean(axis=(2, 3)), match="beside the map's pixel edges", error=rd.PlanError)
    at_once(texture, blend="sum", match="'hann', 'mean'", error=rd.PlanError)
    at_once(texture, batch_size=0, match="above 0", error=rd.PlanError)
    with pytest.raises(rd.PlanError, match=r"predict\(to=None, limits=\).*Give to="):
        area.predict(texture, limits=rd.RunLimits(max_time="1h"))
    with pytest.raises(rd.PlanError, match="a path that ends in"):
        area.predict(texture, to=tmp_path / "map.png")
    with pytest.raises(rd.PlanError, match=r"chips at one place"):
        s2.harmonize(["red"]).chips(32, cover=True, aoi=area_of(cube, AREA)).predict(texture)


def test_nan_for_a_valid_pixel_is_an_error_that_names_the_chip(area: rd.Chips) -> None:
    with pytest.raises(rd.ModelError, match=r"chip 33_.*NaN from the model for [\d,]+ of 1,024 pixels"):
        area.predict(
            lambda pixels: np.where(pixels[:, 0] > 0.05, np.nan, pixels[:, 0]) * np.ones_like(pixels[:, 0])
        )


def test_a_probability_lies_between_0_and_1(area: rd.Chips) -> None:
    with pytest.raises(rd.ModelError, match=r"probabilities from 0 to 1.*activation='softmax'"):
        area.predict(lambda pixels: pixels * 100, "probabilities")
    seen: Any = area.predict(rd.Model(lambda pixels: pixels * 100, activation="softmax"), "probabilities")
    np.testing.assert_allclose(seen["probabilities"].sum("class").values, 1.0, rtol=1e-5)


def read_raster(path: Path) -> tuple[Any, Any]:
    with rasterio.open(path) as raster:
        return raster.read(), raster.profile | {"layout": raster.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")}


def test_a_cog_of_a_zone_and_a_folder_of_them_hold_the_same(
    area: rd.Chips, in_memory: Any, tmp_path: Path
) -> None:
    area.predict(texture, to=tmp_path / "map.tif", progress=False)
    pixels, profile = read_raster(tmp_path / "map.tif")
    assert (profile["layout"], profile["crs"], profile["count"]) == ("COG", in_memory.rio.crs, 2)
    assert profile["transform"] == in_memory.rio.transform()
    np.testing.assert_allclose(pixels, in_memory["values"].values, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "map_count.tif", "map_inputs.tif"]
    for extra in ("count", "inputs"):
        beside, _ = read_raster(tmp_path / f"map_{extra}.tif")
        np.testing.assert_array_equal(beside[0], in_memory[extra].values)
    area.predict(texture, to=rd.CogTiles(tmp_path / "tiles", tile_px=256), progress=False)
    for name, array in {
        "map_33.vrt": "values",
        "count/map_33.vrt": "count",
        "inputs/map_33.vrt": "inputs",
    }.items():
        tiled, _ = read_raster(tmp_path / "tiles" / name)
        np.testing.assert_allclose(tiled.squeeze(), in_memory[array].values.squeeze(), rtol=1e-6)


def test_a_map_as_cogs_that_is_there_is_left_as_it_is(
    optical: rd.Collection, cube: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file says which chips and model it is of: the same is finished, another one is refused."""
    chips = optical.chips(32, stride=32, cover=True, aoi=area_of(cube, AREA))
    out = tmp_path / "map.tif"
    report = chips.predict(texture, to=out, progress=False)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert len(files) == 3

    def unchanged() -> bool:
        return files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(BlockWork, "compute", None)  # nothing is computed
        again = chips.predict(texture, to=out, progress=False)
    assert (again.committed, again.shards_written, again.store) == (True, 0, str(out))
    assert (again.shards, again.chips, again.kept) == (report.shards, report.chips, report.kept)
    assert unchanged()
    for other in (rd.Model(texture, fill=1.0), brightness_map):
        with pytest.raises(
            rd.StoreError, match=r"a map of texture, of other chips or another model already.*map"
        ):
            chips.predict(other, to=out, progress=False)
    with pytest.raises(rd.StoreError, match="or another model already"):
        chips.predict(texture, to=out, blend="mean", progress=False)
    assert unchanged()
    # of a map that lacks a file, all is made again, byte for byte; a work folder that was left goes
    count = tmp_path / "map_count.tif"
    count.unlink()
    chips.predict(texture, to=out, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {
        p: data for p, (data, _) in files.items()
    }
    (tmp_path / "map.tif.job").mkdir()
    chips.predict(texture, to=out, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {
        p: data for p, (data, _) in files.items()
    }
    # what somebody else put there is left alone, beside the map too
    for own in (out, count):
        own.write_text("mine")
        with pytest.raises(rd.StoreError, match=rf"a file already: \S*{own.name}.*Delete it"):
            chips.predict(texture, to=out, progress=False)
        assert own.read_text() == "mine"
        own.write_bytes(files[own][0])
    plain = {"driver": "GTiff", "width": 1, "height": 1, "count": 1, "dtype": "uint8"}
    with warnings.catch_warnings(action="ignore"), rasterio.open(out, "w", **plain) as raster:
        raster.write(np.ones((1, 1, 1), dtype="uint8"))
    with pytest.raises(rd.StoreError, match="a file already"):
        chips.predict(texture, to=out, progress=False)


def brightness_map(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels[:, 0]


def test_a_store_that_is_removed_while_files_are_made_of_it_makes_none(
    optical: rd.Collection, cube: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts of an array job may see the end: the slower one reads a store that the faster one removes."""
    chips, out = optical.chips(32, stride=32, cover=True, aoi=area_of(cube, AREA)), tmp_path / "map.tif"

    def late(array: Any) -> Any:
        shutil.rmtree(tmp_path / "map.tif.job")
        return array_blocks(array)

    monkeypatch.setattr(mapfiles, "array_blocks", late)
    with pytest.raises(rd.ReadError):
        chips.predict(texture, to=out, progress=False)
    assert not list(tmp_path.glob("*.tif"))
    monkeypatch.undo()
    report = chips.predict(texture, to=tmp_path / "want.tif", progress=False)

    def other(array: Any) -> Any:
        monkeypatch.undo()
        chips.predict(texture, to=out, progress=False)
        return array_blocks(array)

    monkeypatch.setattr(mapfiles, "array_blocks", other)
    assert chips.predict(texture, to=out, progress=False).kept == report.kept
    assert out.read_bytes() == (tmp_path / "want.tif").read_bytes()


def across_zones(folder: Path) -> rd.Collection:
    """Return one scene of zone 33 that lies on both sides of its border with zone 34."""
    rng = np.random.default_rng(3)
    values = rng.random((1, 200, 300), dtype=np.float32) + 1
    profile = {
        "driver": "GTiff",
        "dtype": "float32",
        "count": 1,
        "height": 200,
        "width": 300,
        "crs": "EPSG:32633",
    }
    transform = rasterio.Affine(10, 0, 713_000, 0, -10, 5_545_000)
    with rasterio.open(folder / "scene.tif", "w", transform=transform, tiled=True, blockxsize=64, blockysize=64,
                       nodata=0, **profile) as raster:  # fmt: skip
        raster.write(values)
    return rd.build_from_files(str(folder / "scene.tif"), name="own", static=True)


def test_each_zone_has_a_map_of_its_own(tmp_path: Path) -> None:
    """Records at 18 degrees east, on both sides of the border of zones 33 and 34."""
    records = across_zones(tmp_path)
    chips = records.harmonize(time="static").chips(32, stride=24, cover=True)
    to = tmp_path / "map.zarr"
    plan = chips.plan_map(lambda pixels: pixels[:, 0].astype(np.float32), blend="mean")
    assert set(plan.explain()["grids"]) == {"33", "34"}
    chips.predict(lambda pixels: pixels[:, 0].astype(np.float32), blend="mean", to=to, progress=False)
    tree: Any = rd.open_map(to)
    for name, grid in plan.explain()["grids"].items():
        zone = tree[name].ds
        west, south, east, north = grid["bounds"]
        window = records.harmonize(time="static").cube(
            bounds=(west, south, east, north), crs=f"EPSG:326{name}"
        )
        want = window.load().values[0, 0].astype(float)
        seen = zone["values"].values[0]
        there = zone["count"].values > 0
        np.testing.assert_allclose(seen[there], want[there], rtol=1e-6)


def test_coarser_levels_lie_below_the_map(
    area: rd.Chips, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = MapZarr(tmp_path / "map.zarr", block_px=256, multiscales=True)
    monkeypatch.setattr(multiscales.levels, "__defaults__", (200,))  # of a map of 360 x 300 pixels
    area.predict(texture, to=to, progress=False)
    same_maps(rd.open_map(to.store), in_memory)
    coarse = xr.open_zarr(to.store, group="2x", mask_and_scale=False, consolidated=False)
    fine = in_memory["values"].values
    want = fine.reshape(2, fine.shape[1] // 2, 2, fine.shape[2] // 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(coarse["values"].values, want, rtol=1e-5)
    layout: Any = zarr.open_group(to.store, mode="r").attrs["multiscales"]
    assert [level["asset"] for level in layout["layout"]] == [".", "2x"]
    assert float(coarse.x[0]) == float(in_memory.x[0]) + 5


def test_a_map_asks_for_each_tile_once(area: rd.Chips, tmp_path: Path) -> None:
    """As a store of the same chips does: a chip that reaches several blocks brings no tile twice."""
    chips = area.to_zarr(tmp_path / "chips.zarr", progress=False)
    mapped = area.predict(texture, to=MapZarr(tmp_path / "map.zarr", block_px=256), progress=False)
    assert mapped.shards == 4
    tiles = [sum(report.table["tiles_read"].to_pylist()) for report in (mapped, chips)]
    assert tiles[0] == tiles[1]
