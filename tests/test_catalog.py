"""The catalog: its facts against real items, a user's own file, and that every process sees the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from waiting import PATIENCE_S

from rasteret_dask.catalogs import catalog
from rasteret_dask.catalogs.bands import Band, Dataset, radiometry
from rasteret_dask.catalogs.catalogfile import Entry, catalog_of, parse_toml
from rasteret_dask.catalogs.catalogwrite import register
from rasteret_dask.errors import RasteretDaskError, SourceError, StoreError
from rasteret_dask.ingest.sources import read_items
from rasteret_dask.ingest.stac import items_to_table
from rasteret_dask.table.layers import layers_of

IDS = {
    "earthsearch/sentinel-2-l2a", "earthsearch/sentinel-2-c1-l2a", "earthsearch/landsat-c2-l2", "earthsearch/naip",
    "earthsearch/cop-dem-glo-30", "earthsearch/cop-dem-glo-90", "pc/sentinel-2-l2a", "pc/landsat-c2-l2",
    "pc/esa-worldcover", "pc/io-lulc-annual-v02", "pc/nasadem", "aef/v1-annual", "demo/sentinel-2-l2a",
    "demo/landsat-c2-l2", "demo/aef-v1-annual", "earthsearch/sentinel-2-l1c", "earthsearch/sentinel-1-grd",
    "pc/sentinel-1-rtc", "pc/sentinel-1-grd", "pc/hls2-s30", "pc/hls2-l30", "pc/modis-09A1-061", "pc/modis-09Q1-061",
    "pc/modis-13Q1-061", "pc/modis-13A1-061", "cdse/sentinel-2-l2a",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the place of the user's own file, which is not there yet."""
    path = tmp_path / "settings" / "catalog.toml"
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(path))
    return path


def known(id_: str) -> Dataset:
    dataset = catalog.find(id_).dataset
    assert dataset is not None
    return dataset


def items(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    found = document if isinstance(document, list) else document.get("features", [document])
    assert found
    return list(found)


# --- the package's own ----------------------------------------------------------------------------------------------


def test_every_dataset_says_where_it_is_and_what_it_is() -> None:
    table = catalog.datasets()
    assert set(table.column("id").to_pylist()) == IDS
    for row in table.to_pylist():
        ways = [row[way] for way in ("stac_api", "catalog", "index") if row[way] is not None]
        assert len(ways) == 1, row["id"]
        assert (row["stac_api"] is None) == (row["collection"] is None)
        assert row["title"]
        assert row["licence"]
        assert row["bands"]
        assert row["resolution_m"] > 0
        assert row["time_start"] <= (row["time_end"] or "9999")
        assert row["source"] == "package"
        if row["bbox"] is not None:
            west, south, east, north = row["bbox"]
            assert -180 <= west < east <= 180
            assert -90 <= south < north <= 90


def test_endpoints_are_the_published_ones() -> None:
    rows = {row["id"]: row for row in catalog.datasets().to_pylist()}
    for id_, row in rows.items():
        provider, _, name = id_.partition("/")
        if provider == "earthsearch":
            assert row["stac_api"] == "https://earth-search.aws.element84.com/v1"
        if provider == "pc":
            assert row["stac_api"] == "https://planetarycomputer.microsoft.com/api/stac/v1"
            assert row["access"] == "planetary-computer"
        if provider in ("earthsearch", "pc"):
            assert row["collection"] == name
    paid = {id_ for id_, row in rows.items() if row["access"] == "requester-pays"}
    assert paid == {
        "earthsearch/landsat-c2-l2", "earthsearch/naip", "earthsearch/sentinel-2-l1c", "earthsearch/sentinel-1-grd",
    }  # fmt: skip


def test_the_finest_band_gives_the_resolution() -> None:
    for entry in catalog.catalog().entries.values():
        sizes = [band.gsd_m for band in (entry.dataset.bands if entry.dataset else ()) if band.gsd_m]
        assert not sizes or min(sizes) == entry.resolution_m, entry.id


def test_embeddings_are_an_index_of_files() -> None:
    entry = catalog.find("aef/v1-annual")
    assert entry.index is not None
    assert entry.index.startswith("s3://us-west-2.opendata.source.coop/")
    assert dict(entry.columns) == {
        "id": "fid", "geometry": "geom", "year": "year", "href": "path", "xmin": "wgs84_west", "ymin": "wgs84_south",
        "xmax": "wgs84_east", "ymax": "wgs84_north",
    }  # fmt: skip
    bands = known("aef/v1-annual").bands
    assert [band.code for band in bands] == [f"A{n:02d}" for n in range(64)]
    assert [band.band_index for band in bands] == list(range(64))
    assert {(band.asset, band.nodata, band.dtype, band.kind) for band in bands} == {
        ("data", -128.0, "int8", "embedding")
    }


def test_the_constant_is_the_package_s_file() -> None:
    text = (Path(catalog.__file__).parent / "catalog.toml").read_text()
    assert dict(catalog.DATASETS) == dict(catalog_of(parse_toml(text, "package")).datasets)


def test_every_process_sees_the_same(own: Path) -> None:
    register("me/s2", stac_api="http://127.0.0.1:1", collection="s2", like="sentinel-2-l2a")
    code = (
        "import json, sys; from rasteret_dask.catalogs import catalog;"
        "print(json.dumps(catalog.datasets().to_pylist())); print(repr(catalog.DATASETS))"
    )
    ran = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S
        ).stdout
        for _ in range(2)
    ]
    here = f"{json.dumps(catalog.datasets().to_pylist())}\n{catalog.DATASETS!r}\n"
    assert ran == [here, here]


# --- facts, held against real items ---------------------------------------------------------------------------------

REAL = [
    ("earthsearch/sentinel-2-l2a", "earthsearch_v1_31UDQ_4items/item_collection.json"),
    ("earthsearch/sentinel-2-l2a", "earthsearch_v1_31UDQ_4items/item.json"),
    ("earthsearch/sentinel-2-l2a", "earthsearch_v1_S2A_28QCH_20200714_baseline0214.json"),
    ("earthsearch/sentinel-2-c1-l2a", "earthsearch_c1_13TDE_10items.json"),
    ("pc/sentinel-2-l2a", "pc_S2B_T24XWR_20220612_baseline0400.json"),
    ("pc/landsat-c2-l2", "pc_landsat_c2_l2_4items.json"),
]


@pytest.mark.parametrize(("id_", "name"), REAL)
def test_bands_are_what_real_items_hold(data: Path, id_: str, name: str) -> None:
    entry, dataset = catalog.find(id_), known(id_)
    for item in items(data / "stac_items" / name):
        assert item["collection"] == entry.stac_collection
        assert entry.time_start is not None
        assert item["properties"]["datetime"] >= entry.time_start
        layers = layers_of(item, dataset)
        # what only Landsat 4, 5 and 7 have; the items are of 8 and 9
        older = {"lwir", "cloud_qa", "atmos_opacity"} if dataset.renumbered else set()
        assert set(layers) == {band.code for band in dataset.bands} - older
        for band in (band for band in dataset.bands if band.code not in older):
            assert layers[band.code].asset == band.asset
            asset = item["assets"][band.asset]
            said = asset.get("raster:bands", [{}])[0]
            for key, ours in (("nodata", band.nodata), ("data_type", band.dtype), ("scale", band.scale)):
                if band.role != "quality" or key == "data_type":
                    assert said.get(key) in (None, ours), (band.code, key)
            size = said.get("spatial_resolution", asset.get("gsd"))
            assert size in (None, band.gsd_m), (band.code, size)
            names = {b.get("common_name") for b in asset.get("eo:bands", [{}])}
            # STAC 1.0 calls all red edges alike; Planetary Computer counts B8A among them
            assert names <= {None, band.common_name, "rededge", "nir08"}, band.code


@pytest.mark.parametrize("name", ["pc_landsat_c2_l2_100items.parquet", "pc_sentinel_2_l2a_100items.parquet"])
def test_asset_keys_are_columns_of_the_provider_s_own_table(data: Path, name: str) -> None:
    table = pq.read_table(data / "stac_items" / name)
    id_ = f"pc/{table.column('collection')[0].as_py()}"
    keys = {field.name for field in table.schema.field("assets").type}
    assert {band.asset for band in known(id_).bands} <= keys


def test_planetary_computer_s_pixels_carry_the_offset(data: Path) -> None:
    (item,) = items(data / "stac_items" / "pc_S2B_T24XWR_20220612_baseline0400.json")
    dataset = known("pc/sentinel-2-l2a")
    red = next(band for band in dataset.bands if band.code == "B04")
    rule = radiometry(dataset, red, item["properties"], None, None)
    assert (rule.scale, rule.offset) == (1e-4, -0.1)
    before = {**item["properties"], "s2:processing_baseline": "03.01"}
    assert radiometry(dataset, red, before, None, None).offset == 0.0


@pytest.mark.parametrize(
    ("properties", "scale", "offset", "due"),
    [
        ({"s2:processing_baseline": "05.10", "earthsearch:boa_offset_applied": True}, 1e-4, -0.1, 0.0),
        ({"s2:processing_baseline": "05.10", "earthsearch:boa_offset_applied": False}, 1e-4, -0.1, -0.1),
        ({"s2:processing_baseline": "N0509"}, 1e-4, None, -0.1),
        ({"processing:version": "02.14"}, 1e-4, -0.1, 0.0),
        ({"s2:processing_baseline": "none"}, None, None, 0.0),
        ({}, 1e-4, -0.1, -0.1),
    ],
)
def test_sentinel_2_s_offset(
    properties: dict[str, Any], scale: float | None, offset: float | None, due: float
) -> None:
    dataset = catalog.DATASETS["sentinel-2-l2a"]
    assert radiometry(dataset, dataset.bands[0], properties, scale, offset).offset == due


def test_collection_1_takes_the_item_s_word() -> None:
    dataset = catalog.DATASETS["sentinel-2-c1-l2a"]
    told = radiometry(dataset, dataset.bands[0], {"earthsearch:boa_offset_applied": True}, 1e-4, -0.1)
    assert told.offset == -0.1
    assert radiometry(dataset, dataset.bands[0], {}, None, None).offset == -0.1


def test_the_demo_s_datasets_lead_to_its_catalogs(
    small_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    monkeypatch.chdir(tmp_path)
    for name, path in (("sentinel-2-l2a", small_world.sentinel2), ("landsat-c2-l2", small_world.landsat)):
        entry = catalog.find(f"demo/{name}")
        assert entry.catalog is not None
        assert Path(entry.catalog).samefile(path)
        first, last = str(entry.time_start), str(entry.time_end)
        times = [item.data["properties"]["datetime"] for item in read_items(entry.catalog)]
        assert all(first <= time[:10] <= last for time in times)


# --- a table that the catalog has helped to make needs it no more ---------------------------------------------------


def made(folder: Path, dtype: str, count: int, **profile: Any) -> str:
    path = folder / f"{dtype}{count}.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=count, dtype=dtype, tiled=True, blockxsize=32,
        blockysize=32, crs="EPSG:32631", transform=rasterio.Affine(10, 0, 6e5, 0, -10, 5.7e6), **profile,
    ):  # fmt: skip
        return str(path)


def item_of(collection: str, assets: dict[str, str], when: str = "2021-05-01T10:00:00Z") -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": f"a {collection}", "collection": collection, "links": [],
        "geometry": {"type": "Polygon", "coordinates": [[[4, 51], [5, 51], [5, 52], [4, 52], [4, 51]]]},
        "bbox": [4, 51, 5, 52], "properties": {"datetime": when},
        "assets": {k: {"href": href, "type": "image/tiff; application=geotiff"} for k, href in assets.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("id_", "dtype", "count", "codes", "kind", "nodata"),
    [
        ("earthsearch/naip", "uint8", 4, ["R", "G", "B", "NIR"], "continuous", None),
        ("earthsearch/cop-dem-glo-30", "float32", 1, ["DEM"], "continuous", None),
        ("pc/nasadem", "int16", 1, ["DEM"], "continuous", None),
        ("pc/esa-worldcover", "uint8", 1, ["MAP"], "class", "0"),
        ("pc/io-lulc-annual-v02", "uint8", 1, ["LULC"], "class", "0"),
    ],
)
def test_items_become_records_by_the_entry_s_rules(
    tmp_path: Path, id_: str, dtype: str, count: int, codes: list[str], kind: str, nodata: str | None
) -> None:
    entry, dataset = catalog.find(id_), known(id_)
    assert entry.stac_collection is not None
    item = item_of(entry.stac_collection, {dataset.bands[0].asset: made(tmp_path, dtype, count)})
    table = items_to_table(read_items([item]), name="a", dataset=id_)
    assets = dict(table.column("assets")[0].as_py())
    assert list(assets) == codes
    for n, asset in enumerate(assets.values()):
        assert (asset["band_index"], asset["kind"], asset["nodata"]) == (n, kind, nodata)
        assert (asset["scale"], asset["offset"], asset["dtype"], asset["error"]) == (1.0, 0.0, dtype, None)
    assert [asset["common_name"] for asset in assets.values()] == [b.common_name for b in dataset.bands]


def test_rules_of_a_user_s_own_dataset_are_in_the_table(tmp_path: Path, own: Path) -> None:
    register(
        "me/mosaic", catalog="x/catalog.json", scale=0.5, offset=-3, nodata=9, kind="reflectance",
        bands=[{"code": "red", "asset": "r", "common_name": "red"}, {"code": "SCL", "asset": "s", "role": "quality"}],
    )  # fmt: skip
    href = made(tmp_path, "uint16", 1)
    item = item_of("mosaics", {"r": href, "s": href})
    table = items_to_table(read_items([item]), name="a", dataset="me/mosaic")
    own.unlink()
    red, scl = dict(table.column("assets")[0].as_py()).values()
    assert (red["scale"], red["offset"], red["nodata"], red["kind"]) == (0.5, -3.0, "9", "reflectance")
    assert (scl["scale"], scl["offset"], scl["nodata"], scl["role"], scl["kind"]) == (
        1.0,
        0.0,
        None,
        "quality",
        "class",
    )


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("earthsearch/sentinel2-l2a", "earthsearch/sentinel-2-l2a"),
        ("EarthSearch/Landsat-C2-L2", "earthsearch/landsat-c2-l2"),
        ("sentinel-2-l2a", "pc/sentinel-2-l2a"),
        ("aef/v1", "aef/v1-annual"),
        ("something else", "pc/nasadem"),
    ],
)
def test_an_unknown_id_is_told_the_nearest(asked: str, told: str) -> None:
    with pytest.raises(SourceError) as caught:
        catalog.find(asked)
    assert told in caught.value.expected
    assert "rd.datasets()" in caught.value.remedy


def test_a_dataset_is_known_by_many_names() -> None:
    s2 = catalog.DATASETS["sentinel-2-l2a"]
    assert catalog.known_dataset(None, "sentinel-s2-l2a-cogs") == s2
    assert catalog.known_dataset(None, "unheard of") is None
    assert catalog.known_dataset(None, None) is None
    assert catalog.known_dataset("landsat-c2l2-sr") == catalog.DATASETS["landsat-c2-l2"]
    assert catalog.known_dataset("pc/sentinel-2-l2a") == known("pc/sentinel-2-l2a") != s2
    assert catalog.known_dataset(s2) is s2
    with pytest.raises(SourceError, match="one of sentinel-2-l2a"):
        catalog.known_dataset("sentinel")


# --- a user's own ---------------------------------------------------------------------------------------------------


def test_what_is_registered_is_found(own: Path) -> None:
    told = register(
        "me/s2", stac_api="http://127.0.0.1:8080", collection="s2", like="pc/sentinel-2-l2a", title="Mine",
        bbox=(4, 51, 5, 52), time_start="2020-01-01",
    )  # fmt: skip
    assert told == catalog.find("me/s2")
    assert told.source == str(own)
    assert told.dataset is not None
    assert [b.asset for b in told.dataset.bands][:2] == ["B01", "B02"]
    row = catalog.datasets().to_pylist()[-1]
    assert (row["id"], row["collection"], row["bbox"], row["source"]) == (
        "me/s2",
        "s2",
        [4, 51, 5, 52],
        str(own),
    )
    assert catalog.datasets().num_rows == len(IDS) + 1


def test_registering_again_replaces_and_keeps_the_rest(own: Path) -> None:
    own.parent.mkdir()
    own.write_text('# mine\n[entry."me/old"] # keep\ncatalog = "/data/catalog.json"\n')
    register("me/a", catalog="one.json", bands=["x"], scale=2)
    register("me/a", catalog="two.json", like="naip")
    text = own.read_text()
    assert "# mine" in text
    assert "# keep" in text
    found = tomllib.loads(text)
    assert list(found["entry"]) == ["me/old", "me/a"]
    assert not found.get("dataset")
    assert catalog.find("me/a").catalog == os.path.abspath("two.json")
    assert catalog.find("me/a").dataset == catalog.DATASETS["naip"]
    assert catalog.find("me/old").dataset is None


def test_a_user_s_file_overrides_an_endpoint(own: Path) -> None:
    before = catalog.find("earthsearch/sentinel-2-l2a")
    after = register("earthsearch/sentinel-2-l2a", stac_api="http://127.0.0.1:9", collection="mirror")
    assert (after.stac_api, after.stac_collection) == ("http://127.0.0.1:9", "mirror")
    assert (after.dataset, after.licence, after.bbox) == (before.dataset, before.licence, before.bbox)
    own.unlink()
    assert catalog.find("earthsearch/sentinel-2-l2a") == before


def test_a_rule_can_differ_in_one_field(own: Path) -> None:
    entry = register("me/s2", catalog="x.json", like="sentinel-2-l2a", offset=0)
    assert entry.dataset is not None
    like = catalog.DATASETS["sentinel-2-l2a"]
    for mine, theirs in zip(entry.dataset.bands, like.bands, strict=True):
        assert (mine.code, mine.asset, mine.scale, mine.nodata) == (
            theirs.code,
            theirs.asset,
            theirs.scale,
            theirs.nodata,
        )
        assert mine.offset == 0
    newer = {"s2:processing_baseline": "05.09"}
    assert radiometry(entry.dataset, entry.dataset.bands[0], newer, 1e-4, None).offset == 0.0


def test_a_path_is_another_file(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register("me/a", catalog="one.json", path=tmp_path / "other.toml")
    assert not own.exists()
    with pytest.raises(SourceError):
        catalog.find("me/a")
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "other.toml"))
    assert catalog.find("me/a").catalog == os.path.abspath("one.json")


def _register_some(start: Any, path: str, who: int) -> None:
    start.wait()
    for n in range(6):
        register(f"me/{who}-{n}", catalog=f"/data/{who}/{n}.json", path=path)


def test_processes_at_once_lose_nothing(own: Path) -> None:
    forks = multiprocessing.get_context("forkserver")
    with forks.Manager() as manager:
        start = manager.Barrier(3)
        writers = [forks.Process(target=_register_some, args=(start, str(own), who)) for who in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(PATIENCE_S)
            assert writer.exitcode == 0
    own_ids = set(catalog.catalog().entries) - IDS
    assert own_ids == {f"me/{who}-{n}" for who in range(3) for n in range(6)}
    assert {p.name for p in own.parent.iterdir()} <= {"catalog.toml", "catalog.toml.lock"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "stac_api and collection, catalog, or index"),
        ({"stac_api": "http://h"}, "stac_api and collection"),
        ({"stac_api": "ftp://h", "collection": "a"}, "http"),
        ({"stac_api": "http://ann:geheim@h", "collection": "a"}, "environment"),
        ({"stac_api": "http://h?key=geheim", "collection": "a"}, "environment"),
        ({"catalog": "https://h/c.json?sig=geheim"}, "environment"),
        ({"catalog": "c", "like": "sentinel"}, "rd.datasets"),
        ({"catalog": "c", "bands": []}, "none"),
        ({"catalog": "c", "bands": ["a", "a"]}, "'a' twice"),
        ({"catalog": "c", "bands": [{"name": "a"}]}, "code"),
        ({"catalog": "c", "bands": [{"code": "a", "color": "b"}]}, "'color'"),
        ({"catalog": "c", "bands": ["a"], "scale": "much"}, "'much'"),
        ({"catalog": "c", "bands": ["a"], "role": "picture"}, "one of data"),
        ({"catalog": "c", "bands": ["a"], "kind": "picture"}, "one of reflectance"),
        ({"catalog": "c", "scale": 2}, "without bands"),
        ({"catalog": "c", "titel": "a"}, "'titel'"),
        ({"catalog": "c", "access": "public"}, "one of anonymous"),
        ({"catalog": "c", "access": "requester-pays"}, "stores="),
        ({"catalog": "c", "stores": ["bucket"]}, "s3://bucket"),
        ({"catalog": "c", "access": "planetary-computer", "stores": ["s3://b"]}, "requester-pays for s3"),
        ({"catalog": "c", "bbox": [1, 2]}, "west, south"),
        ({"catalog": "c", "time_start": "last year"}, "a day"),
        ({"catalog": "c", "like": "naip", "assets": {"Q": "q"}}, "'Q'"),
    ],
)
def test_what_makes_no_sense_is_told_and_not_written(own: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SourceError) as caught:
        register("me/a", **fields)
    assert told in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert not own.exists()


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/", "a//b", "", "a b", "ä", "a\0b", "-a", "x" * 200, "a/../b"]
)
def test_an_id_is_a_plain_name(own: Path, name: str) -> None:
    with pytest.raises(SourceError, match="dataset id"):
        register(name, catalog="c")
    with pytest.raises(SourceError):
        catalog_of(
            catalog.package(), {"dataset": {}, "entry": {name: {"catalog": "c"}}, "store": {}, "alias": {}}
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[entry", "TOML"),
        ("[datasets.a]\nbands = ['x']\n", "table 'datasets'"),
        ("entry = 3\n", "table 'entry'"),
        ("[entry.a]\ncatalog = 3\n", "of type str"),
        ("[entry.a]\ncatalog = 'c'\ndataset = 'nope'\n", "one of sentinel-2-l2a"),
        ("[dataset.a]\nlike = 'b'\n[dataset.b]\nlike = 'a'\n", "a circle"),
        ("[dataset.naip]\nbands = ['x']\n", "which the package has"),
        ("[store]\n's3://a/b' = { access = 'anonymous' }\n", "without a path"),
    ],
)
def test_a_broken_file_is_named(own: Path, text: str, told: str) -> None:
    own.parent.mkdir()
    own.write_text(text)
    for call in (
        catalog.datasets,
        lambda: catalog.find("aef/v1-annual"),
        lambda: register("me/a", catalog="c"),
    ):
        with pytest.raises(SourceError) as caught:
            call()
        assert str(own) in str(caught.value)
        assert told in str(caught.value)
    assert own.read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="writing"):
        register("me/a", catalog="c", path=tmp_path / "file" / "catalog.toml")


def test_values_are_plain_and_errors_are_ours(own: Path) -> None:
    entry = catalog.find("aef/v1-annual")
    assert isinstance(entry, Entry)
    assert hash(entry) == hash(catalog.find("aef/v1-annual"))
    assert pa.table(catalog.datasets()) == catalog.datasets().arrow
    assert isinstance(known("earthsearch/naip").bands[0], Band)
    assert issubclass(SourceError, RasteretDaskError)
