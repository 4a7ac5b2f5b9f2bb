from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.features import geometry_mask
from rasterio.warp import reproject, transform_geom

from rasteret_dask.catalogs.bands import radiometry
from rasteret_dask.catalogs.catalog import dataset_of
from rasteret_dask.demo.world import World, WorldSize, make_world
from rasteret_dask.demo.world.ground import make_ground
from rasteret_dask.demo.world.layout import Grid, make_layout
from rasteret_dask.demo.world.spectra import Cover
from rasteret_dask.errors import GridError, StoreError

SMALL = WorldSize(granule_width_px=300, granule_height_px=360, granule_step_px=198, tile_px=128)
SEED = 5

Pixels = NDArray[Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), seed=SEED, size=SMALL)


def items(collection: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(collection.parent.glob("*/*.json"))
    return [(path, json.loads(path.read_text())) for path in paths]


def files(collection: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    for path, item in items(collection):
        for key, asset in item["assets"].items():
            yield key, item, path.parent / asset["href"]


def read(path: Path, item: dict[str, Any], key: str) -> Pixels:
    with rasterio.open(path.parent / item["assets"][key]["href"]) as file:
        return np.asarray(file.read(1))


def reflectance(path: Path, item: dict[str, Any], key: str) -> Pixels:
    dataset = dataset_of(item["collection"])
    raster = item["assets"][key]["raster:bands"][0]
    band = next(b for b in dataset.bands if b.asset == key) if dataset else None
    rule = radiometry(dataset, band, item["properties"], raster["scale"], raster["offset"])
    dn = read(path, item, key)
    return np.where(dn == 0, np.nan, dn * rule.scale + rule.offset)


def clear(path: Path, item: dict[str, Any]) -> Pixels:
    """Shape of the 10 m (Sentinel-2) or 30 m (Landsat) bands. True where nothing hides the ground."""
    if "scl" in item["assets"]:
        scl = read(path, item, "scl").repeat(2, axis=0).repeat(2, axis=1)
        return np.asarray(np.isin(scl, (4, 5, 6)))
    return np.asarray(read(path, item, "qa_pixel") & 0b11111 == 0)


def test_catalogs_are_read_by_pystac_and_every_asset_resolves(world: World) -> None:
    counts = {}
    for path in (world.sentinel2, world.landsat, world.embeddings):
        collection = pystac.Collection.from_file(str(path))
        found = list(collection.get_items(recursive=True))
        counts[collection.id] = len(found)
        for item in found:
            assert item.get_collection() is collection
            assert all(Path(str(a.get_absolute_href())).is_file() for a in item.assets.values())
            assert collection.extent.temporal.intervals[0] is not None
    assert counts == {"sentinel-2-l2a": 8, "landsat-c2-l2": 3, "aef-v1-annual": 1}


def test_catalogs_are_valid_stac(world: World) -> None:
    """Against the core schemas that pystac ships; those of extensions would need a network."""
    validation = pytest.importorskip("pystac.validation")
    for path in (world.sentinel2, world.landsat, world.embeddings):
        collection = pystac.Collection.from_file(str(path))
        for thing in (collection, *collection.get_items()):
            thing.stac_extensions.clear()
            validation.validate(thing)


def test_cogs_have_the_layout_of_the_real_ones(world: World) -> None:
    for key, item, path in [*files(world.sentinel2), *files(world.landsat)]:
        with rasterio.open(path) as file:
            image = file.tags(ns="IMAGE_STRUCTURE")
            assert (image["LAYOUT"], image["COMPRESSION"], image["PREDICTOR"]) == ("COG", "DEFLATE", "2")
            assert file.block_shapes == [(128, 128)]
            assert file.overviews(1)
            assert file.crs.to_epsg() == world.epsg == item["properties"]["proj:epsg"]
            step, x0, y0 = file.transform.a, file.transform.c, file.transform.f
            if item["collection"] == "sentinel-2-l2a":
                assert step == (20 if key == "scl" else 10)
                assert (x0 % 60, y0 % 60) == (0, 0)
                assert x0 % 2560
                assert y0 % 2560
                assert file.dtypes == (("uint8",) if key == "scl" else ("uint16",))
            else:
                assert (step, x0 % 30, y0 % 30) == (30, 15, 15)
                assert file.dtypes == ("uint16",)


def test_items_say_what_the_files_are(world: World) -> None:
    for key, item, path in [*files(world.sentinel2), *files(world.landsat), *files(world.embeddings)]:
        asset = item["assets"][key]
        with rasterio.open(path) as file:
            assert asset["proj:shape"] == [file.height, file.width]
            assert asset["proj:transform"] == list(file.transform)[:6]
            assert {band["data_type"] for band in asset["raster:bands"]} == set(file.dtypes)
            assert {band["nodata"] for band in asset["raster:bands"]} == {file.nodata}
            assert len(asset["raster:bands"]) == file.count


def test_footprints_contain_the_pixels_and_little_else(world: World) -> None:
    for path, item in [*items(world.sentinel2), *items(world.landsat)]:
        with rasterio.open(path.parent / item["assets"]["red"]["href"]) as file:
            valid = file.read(1) > 0
            outline = transform_geom("EPSG:4326", file.crs, item["geometry"])
            inside = ~geometry_mask([outline], valid.shape, file.transform, all_touched=True)
        assert not (valid & ~inside).any(), item["id"]
        assert (inside & ~valid).mean() < 0.05, item["id"]


def test_months_and_datatakes(world: World) -> None:
    takes: dict[str, list[datetime]] = {}
    for _, item in items(world.sentinel2):
        when = datetime.fromisoformat(item["properties"]["datetime"])
        takes.setdefault(item["properties"]["s2:datatake_id"], []).append(when)
    assert all(len(t) == 2 and 0 < abs((t[0] - t[1]).total_seconds()) < 60 for t in takes.values())
    assert sorted(t[0].month for t in takes.values()) == [4, 4, 6, 6]
    assert sorted(int(i["properties"]["datetime"][5:7]) for _, i in items(world.landsat)) == [4, 5, 6]
    start, stop = world.date_range
    every = [i["properties"]["datetime"] for _, i in [*items(world.sentinel2), *items(world.landsat)]]
    assert start < min(every) <= max(every) < stop
    applied = {i["properties"]["earthsearch:boa_offset_applied"] for _, i in items(world.sentinel2)}
    assert applied == {True, False}


def test_granules_of_a_pass_see_one_ground_under_clouds_and_noise_of_their_own(world: World) -> None:
    west, east = make_layout(SMALL).granules
    step = SMALL.granule_step_px
    assert east.x0 - west.x0 == 10 * step
    scenes = {i["id"]: (p, i) for p, i in items(world.sentinel2)}
    one_sided = 0
    for name in [n for n in scenes if "33UVR" in n]:
        neighbour = scenes[name.replace("33UVR", "33UWR")]
        shared = (slice(None), slice(step, None)), (slice(None), slice(0, west.width - step))
        usable = [clear(*s)[at] for s, at in zip((scenes[name], neighbour), shared, strict=True)]
        both, one_sided = usable[0] & usable[1], one_sided + int((usable[0] ^ usable[1]).sum())
        for key in ("red", "nir"):
            left, right = (
                reflectance(*s, key)[at] for s, at in zip((scenes[name], neighbour), shared, strict=True)
            )
            assert abs(float(np.mean(left[both] - right[both]))) < 1e-4, name
            assert np.std(left[both] - right[both]) == pytest.approx(0.0012 * 2**0.5, rel=0.05)
    assert one_sided > 10_000  # pixels that only one of two granules can fill


def test_one_swath_edge_and_no_other_nodata(world: World) -> None:
    partial = []
    for path, item in items(world.sentinel2):
        nodata = read(path, item, "scl") == 0
        for key in ("blue", "green", "red", "nir"):
            fine = read(path, item, key) == 0
            np.testing.assert_array_equal(fine, nodata.repeat(2, axis=0).repeat(2, axis=1))
        if nodata.any():
            partial.append(item["id"])
            firsts = np.argmin(nodata, axis=1)
            assert (np.diff(firsts) <= 0).all()
            assert firsts[0] > firsts[-1]  # it leans
    assert partial == ["S2B_33UVR_20240623_0_L2A"]


def test_reflectance_is_plausible_and_the_same_whatever_the_offset(world: World) -> None:
    layout = make_layout(SMALL)
    cover = make_ground(SEED, layout.canvas).cover
    constant = np.isin(cover, (Cover.CONIFER, Cover.ASPHALT, Cover.RED_ROOF, Cover.GREY_ROOF, Cover.LAKE))
    grids: dict[str, Grid] = dict(zip(("33UVR", "33UWR"), layout.granules, strict=True))
    steady: dict[str, list[Pixels]] = {}
    for path, item in items(world.sentinel2):
        red, usable = reflectance(path, item, "red"), clear(path, item)
        green = usable & (read(path, item, "scl").repeat(2, axis=0).repeat(2, axis=1) == 4)
        assert 0.01 < np.median(red[green]) < 0.06, item["id"]
        assert (red[usable] < 0).mean() < 0.01
        tile = item["properties"]["s2:mgrs_tile"]
        window = constant[grids[tile].within(layout.canvas)]
        steady.setdefault(tile, []).append(np.where(usable & window, red, np.nan))
    for stack in steady.values():
        first = stack[0]
        for other in stack[1:]:
            both = np.isfinite(first) & np.isfinite(other)
            assert both.sum() > 500
            assert abs(np.mean(first[both] - other[both])) < 0.001
            assert np.percentile(np.abs(first[both] - other[both]), 99) < 0.01


def test_sensors_agree_where_both_are_clear(world: World) -> None:
    """The oracle is GDAL: Sentinel-2 averaged onto Landsat's 30 m grid, five days apart."""
    path30, landsat = next((p, i) for p, i in items(world.landsat) if "20240618" in i["id"])
    path10, sentinel = next((p, i) for p, i in items(world.sentinel2) if "33UWR_20240623" in i["id"])
    for key, other in (("blue", "blue"), ("green", "green"), ("red", "red"), ("nir", "nir08")):
        fine = np.where(clear(path10, sentinel), reflectance(path10, sentinel, key), np.nan)
        coarse = np.where(clear(path30, landsat), reflectance(path30, landsat, other), np.nan)
        averaged = np.full(coarse.shape, np.nan)
        layout = make_layout(SMALL)
        reproject(
            fine,
            averaged,
            src_transform=layout.granules[1].transform,
            dst_transform=layout.landsat.transform,
            src_crs=world.epsg,
            dst_crs=world.epsg,
            src_nodata=np.nan,
            dst_nodata=np.nan,
            resampling=Resampling.average,
        )
        both = np.isfinite(coarse) & np.isfinite(averaged)
        assert both.sum() > 3000
        assert np.corrcoef(coarse[both], averaged[both])[0, 1] > 0.95
        assert np.median(np.abs(coarse[both] - averaged[both])) < 0.015
        for shift in ((0, 1), (1, 0)):
            moved = np.roll(averaged, shift, (0, 1))
            still = both & np.isfinite(moved)
            assert np.abs(coarse - averaged)[still].mean() < np.abs(coarse - moved)[still].mean()


def test_clouds_are_bright_shadows_dark_and_flagged(world: World) -> None:
    clouds = shadows = 0
    for path, item in items(world.sentinel2):
        scl = read(path, item, "scl").repeat(2, axis=0).repeat(2, axis=1)
        blue, usable = reflectance(path, item, "blue"), clear(path, item)
        share = 100 * np.isin(scl, (8, 9, 10)).sum() / (scl != 0).sum()
        assert item["properties"]["eo:cloud_cover"] == pytest.approx(share, abs=1e-4)
        assert set(np.unique(scl)) <= {0, 3, 4, 5, 6, 8, 9, 10}
        if (scl == 9).sum() > 400:
            clouds += 1
            assert np.percentile(blue[scl == 9], 1) > 0.4
        nir = reflectance(path, item, "nir")
        if (scl == 3).sum() > 400:
            shadows += 1
            assert np.median(nir[scl == 3]) < np.median(nir[usable])
    assert clouds >= 2
    assert shadows >= 2
    for path, item in items(world.landsat):
        qa, blue = read(path, item, "qa_pixel"), reflectance(path, item, "blue")
        np.testing.assert_array_equal(qa & 1 == 1, np.isnan(blue))
        cloud, shadow, hazy = qa & 8 > 0, qa & 16 > 0, qa & 2 > 0
        assert not (cloud & (shadow | hazy)).any()
        assert not (qa & 64 > 0)[cloud | hazy].any()
        share = 100 * cloud.sum() / (qa != 1).sum()
        assert item["properties"]["eo:cloud_cover"] == pytest.approx(share, abs=0.01)
        if cloud.sum() > 100:
            clouds += 1
            assert blue[cloud].mean() > 2 * np.median(blue[(qa & 31) == 0])
    assert clouds >= 4


def test_landsat_covers_the_world_and_has_fill_corners(world: World) -> None:
    layout = make_layout(SMALL)
    west, south, east, north = world.bounds
    for path, item in items(world.landsat):
        fill = read(path, item, "qa_pixel") == 1
        assert fill[0, 0]
        assert fill[-1, -1]
        x, y = layout.landsat.x, layout.landsat.y
        within = ((y > south) & (y < north))[:, None] & ((x > west) & (x < east))
        assert not fill[within].any()


def test_embeddings_are_unit_vectors_south_up(world: World) -> None:
    [(path, item)] = items(world.embeddings)
    with rasterio.open(path.parent / item["assets"]["data"]["href"]) as file:
        assert file.transform.e > 0
        assert (file.count, file.dtypes[0], file.nodata) == (64, "int8", -128)
        assert file.tags(ns="IMAGE_STRUCTURE") == {"COMPRESSION": "ZSTD", "INTERLEAVE": "BAND"}
        assert file.block_shapes[0] == (128, 128)
        assert file.descriptions[::63] == ("A00", "A63")
        west, south, east, north = world.bounds
        assert file.transform.c <= west
        assert file.transform.f <= south
        assert file.transform.c + 10 * file.width >= east
        assert file.transform.f + 10 * file.height >= north
        stored = file.read().astype(np.float64)
    vectors = np.sign(stored) * (np.abs(stored) / 127.5) ** 2
    lengths = np.sqrt((vectors**2).sum(axis=0))
    np.testing.assert_allclose(lengths, 1, atol=0.02)

    layout = make_layout(SMALL)
    cover = make_ground(SEED, layout.canvas).window(layout.embeddings).cover[::-1]
    crop, road = (vectors[:, cover == c].mean(axis=1) for c in (Cover.WINTER_CEREAL, Cover.ASPHALT))
    likeness = np.tensordot(crop, vectors, axes=1) - np.tensordot(road, vectors, axes=1)
    assert np.median(likeness[cover == Cover.WINTER_CEREAL]) > 0.2
    assert np.median(likeness[cover == Cover.ASPHALT]) < -0.2


def test_bounds_and_bbox_are_the_same_area(world: World) -> None:
    west, south, east, north = world.bounds
    assert (east - west, north - south) == (10 * (300 + 198), 3600)
    ring = [(west, south), (west, north), (east, north), (east, south), (west, south)]
    outline = transform_geom(f"EPSG:{world.epsg}", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    lons, lats = zip(*outline["coordinates"][0], strict=True)
    assert world.bbox == pytest.approx((min(lons), min(lats), max(lons), max(lats)), abs=2e-5)


def digest(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_finished_world_is_reused_unfinished_and_other_ones_are_made_anew(tmp_path: Path) -> None:
    tiny = WorldSize(granule_width_px=120, granule_height_px=120, granule_step_px=60, tile_px=128)
    told: list[float] = []
    first = make_world(tmp_path, seed=1, size=tiny, progress=lambda share, what: told.append(share))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    before = digest(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert make_world(tmp_path, seed=1, size=tiny) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps

    marker = tmp_path / "world.json"
    marker.write_text(marker.read_text().replace("true", "false"))
    next(first.landsat.parent.glob("*/*B4.TIF")).unlink()
    (first.sentinel2.parent / "stray.txt").write_text("left over")
    make_world(tmp_path, seed=1, size=tiny)
    assert digest(tmp_path) == before

    make_world(tmp_path, seed=2, size=tiny)
    assert digest(tmp_path) != before


@pytest.mark.parametrize("mine", ["landsat-c2-l2/mine.txt", "world.json"])
def test_foreign_files_are_left_alone(tmp_path: Path, mine: str) -> None:
    path = tmp_path / mine
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"precious": true}')
    with pytest.raises(StoreError, match=rf"{mine.split('/')[0]} of another origin"):
        make_world(tmp_path, size=SMALL)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == '{"precious": true}'


@pytest.mark.parametrize("wrong", [{"granule_width_px": 301}, {"granule_step_px": 3000}, {"tile_px": 100}])
def test_sizes_that_fit_no_grid_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(GridError, match="made-up world"):
        WorldSize(**wrong)


def test_default_size_is_what_the_demo_needs() -> None:
    layout = make_layout(WorldSize())
    west, south, east, north = layout.optical.bounds
    assert min(east - west, north - south) >= 32_000
    cells = ((east // 5120) - -(-west // 5120)) * ((north // 5120) - -(-south // 5120))
    assert cells >= 20
    for grid in layout.granules:
        assert (grid.x0 % 60, grid.y0 % 60) == (0, 0)
        assert grid.x0 % 2560
        assert grid.y0 % 2560
    overlap = layout.granules[0].bounds[2] - layout.granules[1].bounds[0]
    assert 9_000 <= overlap <= 11_000
