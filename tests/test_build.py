"""Collections by name, from a real STAC API: streamed, cached honestly, refreshed, and kind to what is broken."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import xarray as xr
from rasterio.transform import Affine
from servers import Fault, RangeServer, serving
from shapely.geometry import mapping
from stac_api import ApiFault, Dict, StacServer, changed, generated, serving_stac
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.building import build, build_from_stac, refresh
from rasteret_dask.demo.world import World
from rasteret_dask.errors import BandError, PlanError, SourceError
from rasteret_dask.ingest import pages as ingest
from rasteret_dask.ingest.sources import remote_item
from rasteret_dask.ingest.stac import items_to_table
from rasteret_dask.ingest.tablecache import SEARCH_FILE
from rasteret_dask.net import remote

ID = "earthsearch/sentinel-2-l2a"
S2 = "sentinel-2-l2a"
BOX = (6.0, 44.0, 12.2, 45.2)
DATES = ("2024-01-01", "2024-01-06")
ITEMS = generated(900)


@pytest.fixture(scope="module")
def api() -> Iterator[StacServer]:
    with serving_stac(ITEMS) as running:
        yield running


@pytest.fixture(autouse=True)
def own_cache(api: StacServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own, and waits that are short."""
    api.fault(ApiFault())
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def make(api: StacServer) -> Callable[..., rd.Collection]:
    """Return ``build`` of the test's API, without headers and progress unless asked for."""

    def call(**options: Any) -> rd.Collection:
        usual = {"bbox": BOX, "date_range": DATES, "stac_api": api.url, "headers": False, "progress": False}
        return build(ID, **{**usual, **options})

    return call


def ids(collection: rd.Collection) -> list[str]:
    return sorted(collection.to_table().column("id").to_pylist())


def tables(cache: Path) -> list[str]:
    """Return the folders of whole tables."""
    return sorted(
        str(p.parent.relative_to(cache))
        for p in cache.rglob(SEARCH_FILE)
        if not p.parent.name.startswith(".")
    )


def files_of(items: list[Dict], folder: Path) -> None:
    """Write a small raster for each asset of items."""
    for item in items:
        for key in item["assets"]:
            path = folder / item["id"] / f"{key}.tif"
            path.parent.mkdir(exist_ok=True)
            with rasterio.open(
                path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16", crs="EPSG:32632",
                transform=Affine(10, 0, 399960, 0, -10, 4900020), tiled=True, blockxsize=32, blockysize=32, nodata=0,
            ) as to:  # fmt: skip
                to.write(np.full((1, 64, 64), 7, "uint16"))


def served(server: RangeServer, count: int) -> list[Dict]:
    """Return items whose files a server of ranges has."""
    items = generated(count, href=server.url("{id}/{asset}.tif"))
    files_of(items, server.folder)
    return items


# --- the main path -------------------------------------------------------------------------------------------


def test_a_dataset_by_its_name(make: Callable[..., rd.Collection], api: StacServer) -> None:
    made = make(name="s2")
    assert made.name == "s2"
    assert len(made) == 800
    assert ids(made) == sorted(i["id"] for i in ITEMS[:800])
    assert made.bands == ("B04", "B08")
    asked = api.log[0]
    assert asked["collections"] == [S2]
    assert asked["bbox"] == list(BOX)
    assert asked["datetime"] == "2024-01-01T00:00:00Z/2024-01-07T00:00:00Z"


@pytest.mark.parametrize("name", ["sentinel-2-l2a", "landsat-c2-l2", "aef-v1-annual"])
def test_a_demo_without_its_world_says_how_to_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/test_install.py does what it says."""
    monkeypatch.chdir(tmp_path)
    place = re.escape(str(tmp_path / "demo" / "world" / name / "collection.json"))
    with pytest.raises(SourceError, match=rf"dataset 'demo/{name}': found nothing at {place}") as caught:
        build(f"demo/{name}")
    assert "`rasteret-dask demo`" in caught.value.remedy
    assert (
        '`from rasteret_dask.demo.world import make_world; make_world("demo/world")`' in caught.value.remedy
    )


def test_a_catalog_that_is_elsewhere_is_found_by_its_full_path(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's file may name a catalog relative to the working directory; the remedy is to register a full path."""
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / "catalog.toml"
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(settings))
    settings.write_text('[entry."me/s2"]\ndataset = "sentinel-2-l2a"\ncatalog = "world/collection.json"\n')
    with pytest.raises(
        SourceError, match=r"nothing at .*world/collection.json.* register .* with a full path"
    ):
        build("me/s2")
    rd.register("me/s2", like="sentinel-2-l2a", catalog=small_world.sentinel2)
    assert build("me/s2").to_table(["id"]).num_rows == 8


def test_streamed_and_in_memory_make_the_same_rows(make: Callable[..., rd.Collection]) -> None:
    streamed = make().to_table().sort_by("id")
    whole = items_to_table([remote_item(i) for i in ITEMS[:800]], name="x", headers=False).sort_by("id")
    assert streamed.replace_schema_metadata(None).equals(whole.replace_schema_metadata(None))


def test_rows_lie_in_the_order_of_the_ground(make: Callable[..., rd.Collection]) -> None:
    made = make()
    order = made.to_table().column("id").to_pylist()
    assert order != [i["id"] for i in ITEMS[:800]]
    file = pq.ParquetFile(made.dataset.files[0])
    assert file.num_row_groups > 1
    widths = []
    for n in range(file.num_row_groups):
        box = file.read_row_group(n, columns=["bbox"]).column("bbox").combine_chunks()
        x, y = np.asarray(box.field("xmin")), np.asarray(box.field("ymin"))
        widths.append((np.ptp(x) / 6.0) * (np.ptp(y) / 1.0))
    assert max(widths) < 0.6  # of all the ground, where a row group of the API's order has all of it


def test_the_same_again_is_opened_and_asks_nothing(
    make: Callable[..., rd.Collection], api: StacServer
) -> None:
    first = make()
    api.forget()
    second = make(name="another")
    assert not api.log
    assert second.to_table().equals(first.to_table())
    assert second.name == "another"


def test_headers_are_read_once_per_file(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rasteret_dask")
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as server:
        items = served(server, 20)
        with serving_stac(items) as api:
            made = build(ID, bbox=BOX, stac_api=api.url, progress=False)
            assert len(server.asked()) == 40
            assert set(server.attempts().values()) == {1}
            again = build(ID, bbox=BOX, stac_api=api.url, progress=False)
            assert len(server.asked()) == 40
    assert len(made) == len(again) == 20
    begun, done = (own.getMessage() for own in caplog.records if own.name == "rasteret_dask.building")
    assert begun == f"build {made.name}: reading items"
    assert (
        f"build {made.name}: 20 rows, 20 of them new, 0 items broken; headers of 40 files read, 0 failed"
        in done
    )
    asset = pickle.loads(pickle.dumps(made)).to_table().column("assets")[0].as_py()
    assert {dict(asset)[b]["size"] > 0 for b in ("B04", "B08")} == {True}


def test_chips_of_a_built_collection_are_those_of_its_files(small_world: World, own_cache: Path) -> None:
    folder = small_world.sentinel2.parent
    plain = build_from_stac(small_world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))
    documents = sorted(
        p for p in folder.rglob("*.json") if json.loads(p.read_text()).get("type") == "Feature"
    )
    with serving(folder.parent) as server:
        items = []
        for path in documents:
            item = json.loads(path.read_text())
            place = server.url(str(path.relative_to(folder.parent)))
            items.append({**item, "collection": S2, "links": [{"rel": "self", "href": place}]})
        with serving_stac(items) as api:
            dates = ("2024-04-01", "2024-06-30")
            made = build(ID, name="s2", date_range=dates, stac_api=api.url, progress=False)

        def chips(source: rd.Collection) -> Any:
            return source.harmonize(bands=["red", "nir"], time="1MS").chips(size=64, cell_km=0.64).load()

        assert ids(made) == ids(plain)
        xr.testing.assert_equal(chips(made), chips(plain))


# --- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dates", "count"),
    [
        (("2024-01-01", "2024-01-05"), 400),
        (("2024-01-01", "2024-01-06"), 800),  # the last day is included
        (("2024-01-06", None), 500),
        ((None, "2024-01-01"), 400),
        ("2024-01-06/..", 500),
        ("../2024-01-06", 800),
        ("2024-01", 900),
        (("2024-01-06T10:30:00Z", "2024-01-06T10:31:00Z"), 60),  # a time of day is exclusive
        (None, 900),
    ],
)
def test_ranges(make: Callable[..., rd.Collection], dates: Any, count: int) -> None:
    assert len(make(date_range=dates)) == count


def test_dates_in_wrong_order(make: Callable[..., rd.Collection], api: StacServer) -> None:
    with pytest.raises(PlanError, match="Swap the two dates"):
        make(date_range=("2024-02-01", "2024-01-01"))
    with pytest.raises(PlanError, match="ISO 8601"):
        make(date_range=("soon", None))
    assert not api.log


def test_query_filter_and_most(make: Callable[..., rd.Collection]) -> None:
    clear = [i["id"] for i in ITEMS[:800] if i["properties"]["eo:cloud_cover"] < 20]
    assert ids(make(query={"eo:cloud_cover": {"lt": 20}})) == sorted(clear)
    assert ids(make(filter="eo:cloud_cover < 20")) == sorted(clear)
    assert ids(make(max_items=7)) == sorted(i["id"] for i in ITEMS[:7])
    assert len(make(max_items=300)) == 300


@pytest.mark.parametrize(
    "options",
    [
        {"bbox": (6.0, 44.0, 6.0, 45.0)},
        {"bbox": (6.0, 45.0, 7.0, 44.0)},
        {"bbox": (6.0, 44.0, 7.0)},
        {"bbox": (6.0, -95.0, 7.0, 44.0)},
        {"max_items": 0},
        {"max_items": 2.5},
        {"bands": []},
        {"query": "eo:cloud_cover<20"},
        {"query": {"eo:cloud_cover": {"lt": float("nan")}}},
        {"on_error": "ignore"},
        {"name": ""},
        {"name": "a\0b"},
        {"cache_dir": "s3://bucket/tables"},
        {"cache_dir": "a\0b"},
    ],
)
def test_arguments_that_make_no_sense(
    make: Callable[..., rd.Collection], api: StacServer, options: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=next(iter(options))):
        make(**options)
    assert not api.log


def test_all_of_an_archive_is_not_asked_for(make: Callable[..., rd.Collection], api: StacServer) -> None:
    with pytest.raises(SourceError, match=r"all of the archive.*bbox="):
        make(bbox=None, date_range=None)
    assert not api.log


def test_unknown_names(make: Callable[..., rd.Collection], api: StacServer) -> None:
    with pytest.raises(SourceError, match="earthsearch/sentinel-2-l2a"):
        build("earthsearch/sentinel2-l2a", bbox=BOX)
    with pytest.raises(BandError, match="B05"):
        make(bands=["B04", "B99"])
    assert not api.log
    api.hold([{**i, "assets": {"red": i["assets"]["red"]}} for i in ITEMS])
    try:
        with pytest.raises(BandError, match="nir"):  # a band of the dataset, which none of its items has
            make(bands=["nir"])
    finally:
        api.hold(ITEMS)


def test_across_the_antimeridian(own_cache: Path) -> None:
    def at(name: str, west: float, east: float) -> Dict:
        box = shapely.box(west, -17, east if east > west else east + 360, -16)
        ring = [[x - 360 if x > 180 else x, y] for x, y in box.exterior.coords]
        shape = {"type": "Polygon", "coordinates": [ring]}  # written the long way round
        return changed(ITEMS[0], id=name, geometry=shape, bbox=[west, -17, east, -16], **{"grid:code": name})

    items = [at("west", 178, 179), at("over", 179.5, -179.5), at("east", -179, -178), at("greenwich", -1, 1)]
    with serving_stac(items) as api:
        options: dict[str, Any] = {"stac_api": api.url, "headers": False, "progress": False}
        made = build(ID, bbox=(177, -20, -177, -10), **options)
        assert ids(made) == ["east", "over", "west"]  # and no warning that "over" came twice
        assert ids(build(ID, bbox=(177, -20, 183, -10), **options)) == ["east", "over", "west"]
        assert ids(build(ID, bbox=(-2, -20, 2, -10), **options)) == ["greenwich"]
    rows = {r["id"]: r for r in made.to_table().to_pylist()}
    over = shapely.from_wkb(rows["over"]["geometry"])
    assert over.area == pytest.approx(1.0)
    assert rows["over"]["bbox"] == {"xmin": -180.0, "ymin": -17.0, "xmax": 180.0, "ymax": -16.0}
    assert rows["over"]["scene_bbox"] == [-180.0, -17.0, 180.0, -16.0]


# --- what is broken ------------------------------------------------------------------------------------------


def broken() -> dict[str, Any]:
    """Return {id: an item that cannot become a row}."""
    good = ITEMS[0]
    return {
        "no-time": changed(good, id="no-time", datetime=None),
        "bad-time": changed(good, id="bad-time", datetime="yesterday"),
        "no-assets": changed(good, id="no-assets", assets={}),
        "bad-assets": changed(good, id="bad-assets", assets={"red": {"href": "https://x/y.tif", "bands": ["x"]}}),
        "local": changed(good, id="local", assets={"red": {"href": "/etc/passwd", "type": "image/tiff"}}),
        "metadata": changed(good, id="metadata", assets={"red": {"href": "http://169.254.169.254/x.tif"}}),
        "bad-cloud": changed(good, id="bad-cloud", **{"eo:cloud_cover": "cloudy"}),
        "metres": changed(good, id="metres", geometry=mapping(shapely.box(5e5, 4.9e6, 6e5, 5e6))),
        "no-shape": changed(good, id="no-shape", geometry={"type": "Polygon"}),
        "nowhere": changed(good, id="nowhere", geometry=None, bbox=None, assets={
            "red": {"href": "https://nowhere.invalid/x.tif", "type": "image/tiff"}}),
        "no-properties": {**good, "id": "no-properties", "properties": None},
        "?": "a text",
    }  # fmt: skip


def test_broken_items_are_left_out_and_named(make: Callable[..., rd.Collection], api: StacServer) -> None:
    bad = broken()

    def change(n: int, page: Dict) -> Dict:
        return {**page, "features": [*page["features"], *bad.values()]} if n == 1 else page

    api.fault(ApiFault(change=change))
    with pytest.warns(UserWarning, match=f"{len(bad)} broken items are left out: 'no-time'") as told:
        made = make()
    assert ids(made) == sorted(i["id"] for i in ITEMS[:800])
    assert [w.filename for w in told] == [__file__]
    api.fault(ApiFault(change=change))
    with pytest.raises(SourceError, match="no-time"):
        make(on_error="raise", force=True)


@pytest.mark.parametrize("name", list(broken()))
def test_each_of_them_says_what_is_wrong(name: str, own_cache: Path) -> None:
    with serving_stac(ITEMS[:1]) as api:
        api.fault(ApiFault(change=lambda _n, page: {**page, "features": [broken()[name]]}))
        with pytest.raises(SourceError, match="all 1 of them broken") as told:
            build(ID, bbox=BOX, stac_api=api.url, headers=False, progress=False)
    assert repr(name) in str(told.value)
    assert not tables(own_cache)


def test_null_geometry_comes_from_the_header(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as server:
        items = served(server, 2)
        items[0] = changed(items[0], geometry=None, bbox=None)
        api = serving_stac(items)
        with api as running:
            running.fault(ApiFault(change=lambda _n, page: {**page, "features": items}))
            made = build(ID, date_range=DATES, stac_api=running.url, progress=False)
            away = build(ID, bbox=(6.1, 44.0, 6.3, 44.2), stac_api=running.url, progress=False)
    row = next(r for r in made.to_table().to_pylist() if r["id"] == items[0]["id"])
    assert shapely.from_wkb(row["geometry"]).bounds[0] == pytest.approx(7.75, abs=0.01)  # where its file lies
    assert items[0]["id"] not in ids(away)


def test_the_same_id_on_several_pages(make: Callable[..., rd.Collection], api: StacServer) -> None:
    old = changed(ITEMS[5], **{"s2:processing_baseline": "04.00", "eo:cloud_cover": 1.0})
    new = changed(ITEMS[600], **{"s2:processing_baseline": "10.00", "eo:cloud_cover": 2.0})

    def change(n: int, page: Dict) -> Dict:
        more = {0: [new, ITEMS[700]], 2: [old]}.get(n, [])
        return {**page, "features": [*page["features"], *more]}

    api.fault(ApiFault(change=change))
    with pytest.warns(UserWarning, match="3 items repeat the id"):
        made = make()
    rows = {r["id"]: r for r in made.to_table().to_pylist()}
    assert len(made) == len(rows) == 800
    assert rows[old["id"]]["baseline"] == "05.09"
    assert rows[new["id"]]["eo:cloud_cover"] == 2.0


def test_a_scene_that_was_reprocessed(own_cache: Path) -> None:
    later = {"s2:processing_baseline": "05.10", "s2:datatake_id": "GS2A_20240101T103000_000000_N05.10"}
    new = changed(ITEMS[3], id="S2A_new", **later)
    told = pytest.warns(UserWarning, match="1 items are left out, as their scene stands again")
    with serving_stac([*ITEMS[:10], new]) as api, told:
        made = build(ID, bbox=BOX, stac_api=api.url, headers=False, progress=False)
    assert ids(made) == sorted([*(i["id"] for i in ITEMS[:10] if i is not ITEMS[3]), "S2A_new"])


def test_nothing_found_is_no_table(make: Callable[..., rd.Collection], own_cache: Path) -> None:
    with pytest.raises(SourceError, match="none in the box and range"):
        make(bbox=(100, 0, 101, 1))
    assert not tables(own_cache)
    assert not list(own_cache.rglob("*.tmp"))


def test_an_api_that_fails_half_way_leaves_nothing(
    make: Callable[..., rd.Collection], api: StacServer, own_cache: Path
) -> None:
    api.fault(ApiFault(change=lambda n, page: page if n < 2 else {"features": 5}))
    with pytest.raises(SourceError, match="a page"):
        make()
    assert not tables(own_cache)
    api.fault(ApiFault(status=503, times=2, retry_after="0"))
    assert len(make()) == 800


def test_files_without_a_header(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as server:
        items = served(server, 5)
        lost = server.folder / items[2]["id"] / "nir.tif"
        kept = lost.read_bytes()
        lost.unlink()
        with serving_stac(items) as api:
            with pytest.warns(UserWarning, match="headers of 1 of 10 files could not be read") as told:
                made = build(ID, bbox=BOX, stac_api=api.url, progress=False)
            assert "refresh" in str(told[0].message)
            assert told[0].filename == __file__
            with pytest.warns(UserWarning, match="when this table was built"):
                build(ID, bbox=BOX, stac_api=api.url, progress=False)
            assert len(made.where(readable=True)) == 4
            lost.write_bytes(kept)
            server.forget()
            whole = refresh(made, progress=False)
            assert {a.path.split("/")[1] for a in server.asked()} == {items[2]["id"]}
            assert len(whole.where(readable=True)) == len(whole) == 5
            server.fault("*", Fault(status=404))
            with pytest.raises(SourceError, match=r"none of 10 files readable.*headers=False"):
                build(ID, bbox=BOX, stac_api=api.url, progress=False, force=True)
    assert len(whole) == 5


def test_hopeless_headers_end_it_early(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "GIVE_UP_AFTER", 20)
    monkeypatch.setattr(ingest, "ROWS", 10)
    with serving(tmp_path) as server:
        items = generated(400, href=server.url("{id}/{asset}.tif?key=secret"))
        with serving_stac(items) as api, pytest.raises(SourceError, match="none of 20 files") as told:
            build(ID, bbox=BOX, stac_api=api.url, progress=False)
        assert len(server.asked()) < 200
    assert "secret" not in str(told.value)


def test_tokens_of_planetary_computer_are_not_stored(own_cache: Path) -> None:
    href = "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/32/{id}/{asset}.tif?se=2024&sig=secret"
    with serving_stac(generated(3, href=href, assets=("B04", "B08"))) as api:
        made = build("pc/sentinel-2-l2a", bbox=BOX, stac_api=api.url, headers=False, progress=False)
    stored = [dict(a)[b]["href"] for a in made.to_table().column("assets").to_pylist() for b in dict(a)]
    assert stored
    assert all(h.endswith(".tif") for h in stored)
    assert b"secret" not in b"".join(p.read_bytes() for p in own_cache.rglob("*") if p.is_file())


# --- the cache -----------------------------------------------------------------------------------------------


def test_everything_that_decides_is_part_of_the_key(
    make: Callable[..., rd.Collection], own_cache: Path
) -> None:
    base = make()
    others: list[dict[str, Any]] = [
        {"bbox": (6.0, 44.0, 12.2, 45.2 + 1e-13)},
        {"date_range": ("2024-01-01", "2024-01-07")},
        {"query": {"eo:cloud_cover": {"lt": 20}}},
        {"filter": "eo:cloud_cover < 20"},
        {"max_items": 7},
        {"bands": ["red"]},
        {"on_error": "raise"},
    ]
    for n, options in enumerate(others, 2):
        make(**options)
        assert len(tables(own_cache)) == n, options
    assert len(base) == 800


def test_another_entry_of_the_same_name_is_another_table(
    make: Callable[..., rd.Collection], tmp_path: Path, own_cache: Path
) -> None:
    make()
    (tmp_path / "catalog.toml").write_text('[dataset.mine]\nlike = "sentinel-2-l2a"\nscale = 0.5\n'
                                           f'[entry."{ID}"]\ndataset = "mine"\n')  # fmt: skip
    again = make()
    assert len(tables(own_cache)) == 2
    rows = again.to_table().column("assets").to_pylist()
    assert {dict(a)["B04"]["dataset"] for a in rows} == {"mine"}


def test_force_leaves_nothing_of_the_old(
    make: Callable[..., rd.Collection], api: StacServer, own_cache: Path
) -> None:
    make()
    (before,) = tables(own_cache)
    api.hold(ITEMS[:10])
    try:
        assert len(make()) == 800
        made = make(force=True)
    finally:
        api.hold(ITEMS)
    assert ids(made) == sorted(i["id"] for i in ITEMS[:10])
    assert len(tables(own_cache)) == 1
    assert not (own_cache / before).exists()
    assert len(make()) == 10


def _make_in_process(url: str, cache: str, start: Any, results: Any) -> None:
    start.wait()
    made = build(ID, bbox=BOX, stac_api=url, headers=False, progress=False, cache_dir=cache)
    results.put((made.dataset.files, ids(made)))


def test_two_processes_end_with_one_good_table(api: StacServer, own_cache: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    start, results = context.Event(), context.Queue()
    arguments = (api.url, str(own_cache), start, results)
    both = [context.Process(target=_make_in_process, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    start.set()
    told = [results.get(timeout=PATIENCE_S) for _ in both]
    for process in both:
        process.join()
    assert told[0] == told[1]
    assert told[0][1] == sorted(i["id"] for i in ITEMS)
    assert len(tables(own_cache)) == 1
    assert not list(own_cache.rglob("*.tmp"))


def test_a_killed_build_never_looks_finished(
    make: Callable[..., rd.Collection], api: StacServer, own_cache: Path, tmp_path: Path
) -> None:
    gate = threading.Event()

    def wait(n: int, page: Dict) -> Dict:
        if n >= 3:
            gate.wait(PATIENCE_S)
        return page

    api.fault(ApiFault(change=wait))
    code = (
        "import sys; from rasteret_dask.building import build; "
        f"build({ID!r}, bbox={BOX!r}, date_range={DATES!r}, stac_api={api.url!r}, headers=False, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: list(own_cache.rglob("*.arrow")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    gate.set()
    left = list(own_cache.glob("*/.*.tmp"))
    assert len(left) == 1
    assert not tables(own_cache)
    api.fault(ApiFault())
    assert len(make()) == 800
    assert not list(own_cache.glob("*/.*.tmp"))


def test_names_stay_in_the_cache(make: Callable[..., rd.Collection], own_cache: Path, tmp_path: Path) -> None:
    for name in ("../../escaped", "/absolute", "x" * 5000, "..", "a b\nc"):
        assert make(name=name).name == name
    assert len(tables(own_cache)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}


def test_collection_ids_of_an_api_stay_in_the_cache(api: StacServer, own_cache: Path, tmp_path: Path) -> None:
    wild = ["../../escaped", "/absolute/path", "x" * 500, "a\x07b", ".hidden", "..", "ä/ö"]
    with serving_stac([{**ITEMS[0], "collection": c} for c in wild]) as other:
        for name in wild:
            made = build_from_stac(
                name="x", stac_api=other.url, collection=name, bbox=BOX, headers=False, progress=False
            )
            assert len(made) == 1
    assert len(tables(own_cache)) == len(wild)
    assert {p.parents[2] for p in own_cache.rglob(SEARCH_FILE)} == {own_cache}
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}


def test_cache_dir_and_its_rasteret_name(
    make: Callable[..., rd.Collection], api: StacServer, tmp_path: Path
) -> None:
    made = make(cache_dir=tmp_path / "mine")
    assert Path(made.dataset.files[0]).is_relative_to(tmp_path / "mine")
    other = build_from_stac(
        name="x", stac_api=api.url, collection=S2, data_source=ID, bbox=BOX, date_range=DATES,
        workspace_dir=tmp_path / "theirs", headers=False, progress=False,
    )  # fmt: skip
    assert Path(other.dataset.files[0]).is_relative_to(tmp_path / "theirs")
    assert other.to_table().equals(made.to_table())


def test_a_cache_that_cannot_be_written(make: Callable[..., rd.Collection], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="RASTERET_DASK_CACHE"):
        make(cache_dir=tmp_path / "file")


def test_no_secret_is_kept_or_told(api: StacServer, own_cache: Path) -> None:
    port = api.url.rpartition(":")[2]
    url = f"http://ann:secret@127.0.0.1:{port}?token=secret"
    made = build(ID, bbox=BOX, stac_api=url, headers=False, progress=False)
    assert b"secret" not in b"".join(p.read_bytes() for p in own_cache.rglob("*") if p.is_file())
    assert not any("secret" in str(p.relative_to(own_cache)) for p in own_cache.rglob("*"))
    said = json.loads((Path(made.dataset.files[0]).parent / SEARCH_FILE).read_text())
    assert said["stac_api"] == api.url
    assert said["corners"] == list(BOX)


# --- refresh -------------------------------------------------------------------------------------------------


def test_refresh_adds_new_items_only(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as server:
        items = served(server, 12)
        with serving_stac(items[:10]) as api:
            made = build(ID, name="s2", bbox=BOX, stac_api=api.url, progress=False)
            server.forget()
            assert refresh(made, progress=False).to_table().equals(made.to_table())
            assert not server.asked()
            assert len(tables(own_cache)) == 1
            newer = changed(items[4], updated="2025-01-01T00:00:00Z", **{"eo:cloud_cover": 77.0})
            older = changed(items[5], updated="2020-01-01T00:00:00Z", **{"eo:cloud_cover": 77.0})
            # 7 is gone from the API; 10 and 11 are new
            api.hold([*items[:4], newer, older, items[6], *items[8:]])
            later = refresh(made, progress=False)
            asked = {a.path.split("/")[1] for a in server.asked()}
    assert asked == {items[4]["id"], items[10]["id"], items[11]["id"]}
    assert ids(later) == sorted(i["id"] for i in items)
    cloud = {r["id"]: r["eo:cloud_cover"] for r in later.to_table(["id", "eo:cloud_cover"]).to_pylist()}
    assert cloud[items[4]["id"]] == 77.0
    assert cloud[items[5]["id"]] == items[5]["properties"]["eo:cloud_cover"]
    assert len(made) == 10  # as it was
    assert later.name == "s2"
    assert len(build(ID, bbox=BOX, stac_api=api.url, progress=False)) == 12


def test_refresh_of_what_was_not_built(make: Callable[..., rd.Collection]) -> None:
    made = make()
    with pytest.raises(PlanError, match="Refresh that one"):
        refresh(made.subset(cloud_cover_lt=20))
    with pytest.raises(PlanError, match="build"):
        refresh(rd.as_collection(made.to_table(), name="copy"))
    with pytest.raises(PlanError, match="a str"):
        refresh("s2")  # type: ignore[arg-type]


def test_refresh_keeps_the_range(make: Callable[..., rd.Collection], api: StacServer) -> None:
    made = make()
    api.hold(generated(1000))
    try:
        assert (
            refresh(made, progress=False).to_table().equals(made.to_table())
        )  # none of the new ones is in it
        open_end = make(date_range=("2024-01-06", None))
        api.hold(generated(1300))
        assert len(refresh(open_end, progress=False)) == len(open_end) + 300
    finally:
        api.hold(ITEMS)


# --- other sources -------------------------------------------------------------------------------------------


def test_a_static_catalog_by_name(small_world: World, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "catalog.toml").write_text(
        f'[entry."mine/s2"]\ndataset = "sentinel-2-l2a"\ncatalog = "{small_world.sentinel2}"\n'
    )
    dates = ("2024-04-01", "2024-06-30")
    made = build("mine/s2", date_range=dates)
    plain = build_from_stac(small_world.sentinel2, name="s2", date_range=dates)
    assert made.to_table().equals(plain.to_table())
    clear = build("mine/s2", date_range=dates, query={"eo:cloud_cover": {"lt": 20}})
    assert ids(clear) == ids(plain.subset(cloud_cover_lt=20))
    assert len(build("mine/s2", date_range=dates, max_items=2)) == 2
    with pytest.raises(SourceError, match="CQL2"):
        build("mine/s2", filter="eo:cloud_cover < 20")
    assert not tables(own_cache)
    with serving(Path(small_world.sentinel2).parent.parent) as server:
        place = server.url(f"{Path(small_world.sentinel2).parent.name}/collection.json")
        (tmp_path / "catalog.toml").write_text(
            f'[entry."mine/s2"]\ndataset = "sentinel-2-l2a"\ncatalog = "{place}"\n'
        )
        far = build("mine/s2", date_range=dates, progress=False)
    assert ids(far) == ids(plain)
    assert len(tables(own_cache)) == 1


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Return a table of files like AEF's, with rasters beside it."""
    folder = tmp_path / "aef"
    folder.mkdir()
    rows: list[Dict] = []
    for n in range(6):
        west, year = 6 + 0.5 * (n % 3), 2023 + n // 3
        with rasterio.open(
            folder / f"{n}.tif", "w", driver="GTiff", width=32, height=32, count=64, dtype="int8", crs="EPSG:32632",
            transform=Affine(10, 0, 399960, 0, 10, 4900020), interleave="band", nodata=-128, tiled=True,
            blockxsize=16, blockysize=16,
        ) as to:  # fmt: skip
            to.write(np.full((64, 32, 32), n, "int8"))
        shape = shapely.box(west, 44, west + 0.4, 45)
        rows.append({
            "fid": n, "geom": shapely.to_wkb(shape), "year": year, "path": f"{n}.tif", "crs": "EPSG:32632",
            "wgs84_west": west, "wgs84_south": 44.0, "wgs84_east": west + 0.4, "wgs84_north": 45.0,
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet", row_group_size=2)
    return folder


def _index_entry(catalog: Path, place: str) -> None:
    catalog.write_text(
        f'[entry."mine/aef"]\ndataset = "aef-v1-annual"\nindex = "{place}"\n'
        'columns = { id = "fid", geometry = "geom", year = "year", href = "path", xmin = "wgs84_west", '
        'ymin = "wgs84_south", xmax = "wgs84_east", ymax = "wgs84_north" }\n'
    )


def test_an_index_of_files(index: Path, tmp_path: Path, own_cache: Path) -> None:
    _index_entry(tmp_path / "catalog.toml", str(index / "index.parquet"))
    made = build(
        "mine/aef", bbox=(6.45, 44.1, 6.95, 44.2), date_range=("2024-01-01", "2024-06-30"), progress=False
    )
    (row,) = made.to_table().to_pylist()
    assert row["id"] == "aef-v1-annual-4"
    assert (row["start_datetime"].year, row["end_datetime"].year) == (2024, 2025)
    assets = dict(row["assets"])
    assert list(assets) == [f"A{i:02d}" for i in range(64)]
    assert [assets[b]["band_index"] for b in assets] == list(range(64))
    assert {a["nodata"] for a in assets.values()} == {-128.0}
    assert row["proj:epsg"] == 32632
    assert len(build("mine/aef", date_range="2023", progress=False)) == 3
    assert len(build("mine/aef", bbox=(0, 40, 10, 50), progress=False)) == 6


def test_a_changed_index_is_read_again(index: Path, tmp_path: Path, own_cache: Path) -> None:
    _index_entry(tmp_path / "catalog.toml", str(index / "index.parquet"))
    assert len(build("mine/aef", bbox=(0, 40, 10, 50), progress=False)) == 6
    table = pq.read_table(index / "index.parquet")
    pq.write_table(table.slice(0, 5), index / "index.parquet")
    assert len(build("mine/aef", bbox=(0, 40, 10, 50), progress=False)) == 5


def test_an_index_far_away(index: Path, tmp_path: Path, own_cache: Path) -> None:
    with serving(index) as server:
        _index_entry(tmp_path / "catalog.toml", server.url("index.parquet"))
        assert len(build("mine/aef", bbox=(6, 44.1, 6.3, 44.2), progress=False)) == 2
        (tmp_path / "catalog.toml").write_text(
            (tmp_path / "catalog.toml").read_text().replace("wgs84_west", "nothing")
        )
        with pytest.raises(rd.SchemaError, match="no column nothing"):
            build("mine/aef", bbox=(6, 44.1, 6.3, 44.2), progress=False)
        _index_entry(tmp_path / "catalog.toml", server.url("missing.parquet"))
        with pytest.raises(SourceError, match="nothing there"):
            build("mine/aef", bbox=(6, 44.1, 6.3, 44.2), progress=False)


# --- faces ---------------------------------------------------------------------------------------------------


def test_progress(make: Callable[..., rd.Collection], capsys: pytest.CaptureFixture[str]) -> None:
    make(progress=True)
    assert "800/800 items" in capsys.readouterr().err
    make(force=True, progress=False)
    make(progress=True)  # opened, not built
    assert capsys.readouterr().err == ""


def test_no_network(own_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Is the network there"):
        build(ID, bbox=BOX, stac_api="http://127.0.0.1:1", progress=False)
    assert not tables(own_cache)


def test_real_items_through_an_api(data: Path, own_cache: Path) -> None:
    items: list[Dict] = []
    for path in sorted((data / "stac_items").rglob("*.json")):
        document = json.loads(path.read_text())
        found = document if isinstance(document, list) else document.get("features", [document])
        items += [i for i in found if i.get("type") == "Feature"]
    earth = [i for i in items if i.get("collection") in (S2, "sentinel-2-c1-l2a", "landsat-c2-l2")]
    assert len(earth) > 10
    with serving_stac(earth) as api:
        for collection in sorted({i["collection"] for i in earth}):
            own = [i for i in earth if i["collection"] == collection]
            expected = items_to_table([remote_item(i) for i in own], name="x", headers=False)
            made = build_from_stac(
                name=collection,
                stac_api=api.url,
                collection=collection,
                max_items=1000,
                headers=False,
                progress=False,
            )
            assert (
                made.to_table().sort_by("id").column("assets").equals(expected.sort_by("id").column("assets"))
            )
