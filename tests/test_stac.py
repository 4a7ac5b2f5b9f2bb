from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pystac
import pytest
import rasterio
import shapely
from rasterio.transform import Affine
from rasterio.warp import transform_bounds

from rasteret_dask.errors import BandError, SchemaError, SourceError, TrustError
from rasteret_dask.ingest.sources import read_items
from rasteret_dask.ingest.stac import items_to_table
from rasteret_dask.ingest.tables import table_to_records
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.table.records import RECORD_SCHEMA, Records

Serve = Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
LOCAL = ["red", "green", "blue", "nir", "SCL"]
S2_FOLDER = "s2_l2a_earthsearch_33TWM"


def build(source: Any, **options: Any) -> Records:
    return Records(items_to_table(read_items(source), name="test", **options))


def assets(records: Records, row: int = 0) -> dict[str, dict[str, Any]]:
    return dict(records.table.column("assets")[row].as_py())


def s2_files(data: Path) -> list[str]:
    return sorted(str(p) for p in (data / S2_FOLDER).glob("*/*.json"))


def raster(path: Path, bands: int = 1, crs: str = "EPSG:32631") -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=bands, dtype="uint16", crs=crs,
        transform=Affine(10, 0, 600000, 0, -10, 5700000), tiled=True, blockxsize=32, blockysize=32,
    ) as to:  # fmt: skip
        to.write(np.ones((bands, 64, 64), "uint16"))
    return path


def item(href: str, **changes: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "a", "links": [], "geometry": None,
        "properties": {"datetime": "2023-06-01T10:00:00Z"},
        "assets": {"data": {"href": href, "type": "image/tiff; application=geotiff"}},
    } | changes  # fmt: skip


# --- the sources of the data folder ------------------------------------------------------------------------


def test_static_catalog_with_missing_neighbours(data: Path) -> None:
    with pytest.warns(UserWarning, match="7 of its links"):
        records = build(data / S2_FOLDER / "collection.json", bands=LOCAL)
    assert len(records) == 3
    assert records.bands == ("B02", "B03", "B04", "B08", "SCL")
    for row in range(3):
        for band in records.bands:
            asset = records.asset(row, band)
            assert asset.image.width == 512  # the header's, not the item's 10980
            assert asset.resolution == (120, 120)
    assert records.column("proj:epsg") == [32633] * 3
    assert records.column("tile") == ["MGRS-33TWM"] * 3
    assert all(1 <= orbit <= 143 for orbit in records.column("orbit"))
    assert records.table.schema.names == RECORD_SCHEMA.names


def test_paths_dicts_and_pystac_give_the_same(data: Path) -> None:
    paths = s2_files(data)
    objects = [pystac.Item.from_file(p) for p in paths]
    by_path = build(paths, bands=LOCAL)
    by_object = build(objects, bands=LOCAL)
    by_collection = build(pystac.ItemCollection([o.clone() for o in objects]), bands=LOCAL, headers=False)
    columns = ["id", "datetime", "geometry", "scene_bbox", "proj:epsg", "datatake", "orbit", "tile", "assets"]
    assert by_path.table.select(columns).equals(by_object.table.select(columns))
    assert by_collection.ids == by_path.ids
    dicts = [json.loads(Path(p).read_text()) for p in paths]
    assert build(dicts, bands=LOCAL, headers=False).ids == by_path.ids


def test_openeo_catalog(data: Path) -> None:
    records = build(data / "static_catalog_openeo" / "collection.json")
    assert len(records) == 3
    found = assets(records)
    assert {band: a["band_index"] for band, a in found.items()} == {"B04": 0, "B03": 1, "B02": 2}
    assert records.asset(0, "B03").levels
    assert records.column("proj:epsg") == [32631] * 3


def test_greenland_before_stac_1(data: Path) -> None:
    folder = data / "landsat_c2l2_scene_greenland"
    documents = []
    for part in ("SR", "ST"):
        document = json.loads(next(folder.glob(f"*_{part}_stac.json")).read_text())
        document["links"] = []  # an item of a remote catalog, as its links tell, must not name local files
        for asset in document["assets"].values():
            beside = folder / asset["href"].rpartition("/")[2]
            asset["href"] = str(beside) if beside.is_file() else asset["href"]
        documents.append(document)
    surface = build(documents[0], bands=["red", "nir08", "qa_pixel", "B6"])
    assert surface.bands == ("B4", "B5", "B6", "qa_pixel")
    assert surface.asset(0, "B4").scale == 2.75e-5
    assert surface.asset(0, "B4").offset == -0.2
    assert surface.column("platform") == ["landsat-8"]
    assert surface.column("tile") == ["WRS2-005009"]
    assert surface.column("proj:epsg")[0] is not None
    assert build(documents[1], bands=["B10"]).asset(0, "B10").kind == "temperature"


def test_geoparquet_of_both_sensors(data: Path) -> None:
    names = ("pc_landsat_c2_l2_100items.parquet", "pc_sentinel_2_l2a_100items.parquet")
    landsat, sentinel = (build(data / "stac_items" / name, headers=False) for name in names)
    both = pa.concat_tables([landsat.table, sentinel.table])
    assert both.num_rows == 200
    assert landsat.bands[:3] == ("B1", "B2", "B3")
    assert "qa_pixel" in landsat.bands
    assert len(sentinel.bands) == 13
    assert sentinel.asset(0, "B04").image.width == 10980
    assert sentinel.asset(0, "B04").image.tile_offsets == ()
    assert sentinel.column("datatake")[0] == "GS2B_20241203T174629_040450"


@pytest.mark.parametrize(
    ("name", "band", "offset"),
    [
        ("earthsearch_v1_S2A_32TPS_projcode.json", "B04", 0.0),  # boa_offset_applied
        ("earthsearch_c1_13TDE_10items.json", "B04", -0.1),
        ("earthsearch_v1_S2A_28QCH_20200714_baseline0214.json", "B04", 0.0),
        ("pc_S2B_T24XWR_20220612_baseline0400.json", "B04", -0.1),
        ("pc_landsat_c2_l2_4items.json", "B4", -0.2),
        ("earthsearch_v1_13TDE_pair/S2A_13TDE_20231008_0_L2A.json", "SCL", 0.0),
        ("earthsearch_v1_13TDE_pair/LC08_L2SP_033032_20231008_02_T1.json", "B10", 149.0),
        ("earthsearch_v1_31UDQ_4items/item_collection.json", "B08", 0.0),
    ],
)
def test_radiometry_of_each_provider(data: Path, name: str, band: str, offset: float) -> None:
    records = build(data / "stac_items" / name, headers=False)
    assert assets(records)[band]["offset"] == offset
    assert None not in records.column("proj:epsg")
    # pystac moves proj:epsg to proj:code and raster:bands to bands
    document = json.loads((data / "stac_items" / name).read_text())
    features = document if isinstance(document, list) else document.get("features", [document])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pystac tells what it cannot move of the storage extension
        objects = [pystac.Item.from_dict(d) for d in features]
    migrated = build(objects, headers=False)
    assert migrated.table.select(["id", "assets", "proj:epsg", "headers_metadata"]).equals(
        records.table.select(["id", "assets", "proj:epsg", "headers_metadata"])
    )


def test_names_meet_across_providers(data: Path) -> None:
    folder = data / "stac_items"
    earthsearch = build(folder / "earthsearch_c1_13TDE_10items.json", headers=False, bands=["red", "B8A"])
    planetary = build(folder / "pc_sentinel_2_l2a_100items.parquet", headers=False, bands=["red", "nir08"])
    assert earthsearch.bands == planetary.bands == ("B04", "B8A")


# --- places and trust --------------------------------------------------------------------------------------


def test_catalog_over_http(data: Path, tmp_path: Path, serve: Serve) -> None:
    for source in (data / "static_catalog_openeo").iterdir():
        shutil.copyfile(source, tmp_path / source.name)
    (tmp_path / "catalog.json").write_text(
        json.dumps(
            {"type": "Catalog", "id": "root", "links": [{"rel": "child", "href": "./collection.json"}]}
        )
    )
    base, seen = serve(tmp_path)
    records = build(f"{base}/catalog.json")
    assert len(records) == 3
    assert records.asset(0, "B04").href == f"{base}/openEO_2023-06-01Z.tif"
    assert len(seen) == 1 + 1 + 3 + 3


@pytest.mark.parametrize(
    "href",
    [
        "/etc/passwd.tif",
        "file:///etc/passwd.tif",
        "/vsicurl/http://example.com/a.tif",
        "vrt:///data/a.tif?bands=1",
        "<VRTDataset/>",
        "http://169.254.169.254/latest/a.tif",
        "http://2852039166/latest/a.tif",
        "http://[fe80::1]/a.tif",
        "http://[::ffff:169.254.169.254]/a.tif",
        "http://metadata.google.internal/a.tif",
        "ftp://example.com/a.tif",
        "zip+https://example.com/a.zip!a.tif",
    ],
)
def test_remote_catalogs_name_remote_files_only(tmp_path: Path, serve: Serve, href: str) -> None:
    (tmp_path / "item.json").write_text(json.dumps(item(href)))
    base, _ = serve(tmp_path)
    with pytest.raises(TrustError, match=r"item 'a', asset 'data'"):
        build(f"{base}/item.json", headers=False)


@pytest.mark.parametrize("href", ["/vsicurl/http://x/a.tif", "vrt://a.tif", "http://169.254.169.254/a.tif"])
def test_local_items_may_name_no_virtual_files_either(href: str) -> None:
    with pytest.raises(TrustError):
        build(item(href), headers=False)


def test_remote_items_in_memory(tmp_path: Path) -> None:
    document = item(str(raster(tmp_path / "a.tif")))
    assert len(build(document)) == 1
    with pytest.raises(TrustError):
        items_to_table(read_items(document, remote=True), name="test")


def test_a_remote_catalog_links_to_no_local_item(tmp_path: Path, serve: Serve) -> None:
    links = [{"rel": "item", "href": "file:///etc/passwd"}]
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "c", "links": links}))
    with pytest.raises(TrustError, match="remote catalog"):
        read_items(f"{serve(tmp_path)[0]}/catalog.json")


@pytest.mark.parametrize(
    ("href", "base", "expected"),
    [
        ("b.tif", "/x/y/item.json", "/x/y/b.tif"),
        ("../b.tif", "/x/y/item.json", "/x/b.tif"),
        ("file:///x/a%20b.tif", None, "/x/a b.tif"),
        ("./b.tif", "https://h/x/item.json?sig=1", "https://h/x/b.tif"),
        ("../b.tif", "s3://bucket/x/y/item.json", "s3://bucket/x/b.tif"),
        ("s3://other/b.tif", "https://h/x/item.json", "s3://other/b.tif"),
    ],
)
def test_resolve(href: str, base: str | None, expected: str) -> None:
    assert resolve(href, base) == expected


def test_loopback_stays_allowed() -> None:
    assert checked("http://127.0.0.1:8000/a.tif", local=False, subject="x")


# --- rules -------------------------------------------------------------------------------------------------


def test_unreadable_assets_are_recorded(tmp_path: Path) -> None:
    document = item(str(raster(tmp_path / "a.tif")))
    document["assets"]["other"] = {"href": str(tmp_path / "nothing.tif"), "type": "image/tiff"}
    records = build(document)
    found = assets(records)
    assert found["data"]["error"] is None
    assert "404" in found["other"]["error"]


def test_a_file_in_another_crs_is_unreadable(tmp_path: Path) -> None:
    document = item(str(raster(tmp_path / "a.tif")))
    document["properties"]["proj:code"] = "EPSG:32632"
    assert "EPSG:32631" in assets(build(document))["data"]["error"]


def test_footprint_from_the_header(tmp_path: Path) -> None:
    records = build(item(str(raster(tmp_path / "a.tif"))))
    with rasterio.open(tmp_path / "a.tif") as source:
        bounds = transform_bounds(source.crs, "EPSG:4326", *source.bounds)
    outline = shapely.from_wkb(records.column("geometry")[0])
    assert outline.bounds == pytest.approx(bounds, abs=1e-6)
    assert records.column("scene_bbox")[0] == pytest.approx(bounds, abs=1e-6)


def test_files_with_bands_the_item_does_not_list(tmp_path: Path) -> None:
    records = build(item(str(raster(tmp_path / "a.tif", bands=3))))
    assert {b: a["band_index"] for b, a in assets(records).items()} == {"data_1": 0, "data_2": 1, "data_3": 2}


def test_embeddings_in_one_file(tmp_path: Path) -> None:
    records = build(
        item(str(raster(tmp_path / "a.tif", bands=64))), dataset="aef-v1-annual", bands=["A00", "A63"]
    )
    assert {b: a["band_index"] for b, a in assets(records).items()} == {"A00": 0, "A63": 63}
    with pytest.raises(SourceError, match="no such dataset"):
        build(item("a.tif"), dataset="nope", headers=False)


def test_real_embeddings(data: Path) -> None:
    path = next((data / "aef_annual_2024_16N").glob("*.tif"))
    times = {
        "datetime": None,
        "start_datetime": "2024-01-01T00:00:00Z",
        "end_datetime": "2025-01-01T00:00:00Z",
    }
    records = build(item(str(path), properties=times), dataset="aef/v1-annual")
    assert len(records.bands) == 64
    assert records.asset(0, "A63").nodata == -128
    assert records.column("datetime") == records.column("start_datetime")


def test_stac_1_1_bands(tmp_path: Path) -> None:
    document = item(str(raster(tmp_path / "a.tif", bands=2)))
    document["assets"]["data"]["bands"] = [
        {"name": "R", "eo:common_name": "red", "raster:scale": 0.5, "raster:offset": -1},
        {"name": "N", "eo:common_name": "nir", "nodata": 7},
    ]
    found = assets(build(document))
    assert (found["R"]["scale"], found["R"]["offset"], found["R"]["common_name"]) == (0.5, -1, "red")
    assert (found["N"]["nodata"], found["N"]["band_index"]) == ("7", 1)


def test_unknown_bands_say_what_exists(data: Path) -> None:
    with pytest.raises(BandError, match=r"B04, .*red"):
        build(s2_files(data), bands=["purple"], headers=False)


def test_box_and_range(data: Path) -> None:
    files = s2_files(data)

    def ids(**options: Any) -> list[str]:
        return sorted(i.split("_")[2] for i in build(files, headers=False, **options).ids)

    assert ids(date_range=("2023-08-13", "2023-08-15")) == ["20230813", "20230815"]
    assert ids(date_range="2023-08") == ["20230813", "20230815", "20230818"]
    assert ids(date_range="2023-08-15T00:00:00Z/..") == ["20230815", "20230818"]
    assert ids(bbox=(15.0, 46.0, 15.1, 46.1))
    with pytest.raises(
        SourceError, match=r"none of 3.*They are of 2023-08-13 to 2023-08-18, in 1\d\."
    ) as told:
        ids(bbox=(0.0, 0.0, 1.0, 1.0))
    box = tuple(float(edge) for edge in told.value.remedy.split(" in ")[1].split(" (")[0].split(", "))
    days = told.value.remedy.split("of ")[1].split(",")[0].split(" to ")
    assert ids(bbox=box, date_range=days) == ["20230813", "20230815", "20230818"]  # the remedy


def test_repeated_ids_keep_the_newest(tmp_path: Path) -> None:
    old = item(str(raster(tmp_path / "a.tif")))
    new = copy.deepcopy(old)
    old["properties"]["s2:processing_baseline"] = "02.14"
    new["properties"]["s2:processing_baseline"] = "05.00"
    with pytest.warns(UserWarning, match="1 items repeat"):
        records = build([new, old])
    assert records.column("baseline") == ["05.00"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"assets": {}},
        {"properties": None},
        {"properties": {"datetime": "yesterday"}},
        {"properties": {"datetime": None}},
        {"geometry": {"type": "Polygon", "coordinates": "x"}},
    ],
)
def test_broken_items_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="item"):
        build(item("/a.tif", **change), headers=False)


@pytest.mark.parametrize("text", ["", "[1]", '"x"', '{"type": "Catalog", "id": "c", "links": []}'])
def test_files_that_are_no_stac(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError):
        read_items(tmp_path / "a.json")
    with pytest.raises(SourceError, match="nothing there"):
        read_items(tmp_path / "b.json")


def test_datatake_without_its_own_property(data: Path) -> None:
    documents = [json.loads(Path(p).read_text()) for p in s2_files(data)]
    said = build(documents, headers=False).column("datatake")
    for document in documents:
        del document["properties"]["s2:datatake_id"]
    assert build(documents, headers=False).column("datatake") == said


# --- tables ------------------------------------------------------------------------------------------------


def rasteret_like(data: Path) -> pa.Table:
    """Return the table that rasteret would write of the 33TWM scenes."""
    rows = []
    for path in s2_files(data):
        document = json.loads(Path(path).read_text())
        rows.append(
            {
                "id": document["id"],
                "collection": "sentinel-2-l2a",
                "datetime": document["properties"]["datetime"],
                "geometry": shapely.to_wkb(shapely.geometry.shape(document["geometry"])),
                "assets": {
                    b: {"href": str(Path(path).parent / f"{b}.tif"), "band_index": None}
                    for b in ("B04", "SCL")
                },
                "earthsearch:boa_offset_applied": True,
                "proj:epsg": 32633,
                "B04_metadata": {
                    "image_width": 512,
                    "tile_offsets": [1],
                    "tile_byte_counts": [2],
                    "transform": [10.0, 0.0, -10.0, 0.0],
                },
                "mine": 1,
            }
        )
    return pa.Table.from_pylist(rows)


def test_a_table_as_rasteret_writes_it(data: Path) -> None:
    records = Records(table_to_records(rasteret_like(data), name="mine"))
    assert records.asset(0, "B04").image.tile_offsets
    assert records.asset(0, "B04").offset == 0.0
    assert records.table.column_names[-2:] == ["earthsearch:boa_offset_applied", "mine"]
    again = table_to_records(records.table, name="mine")
    assert again.equals(records.table)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    href = str(raster(tmp_path / "a.tif"))
    table = pa.table(
        {
            "scene": ["x"],
            "datetime": ["2023-01-02"],
            "geometry": ["POLYGON ((4 51, 5 51, 5 52, 4 51))"],
            "assets": pa.array(
                [[("dem", {"href": href})]], pa.map_(pa.string(), pa.struct([("href", pa.string())]))
            ),
        }
    )
    records = Records(table_to_records(table, name="mine", column_map={"scene": "id"}))
    assert records.ids == ["x"]
    assert records.asset(0, "dem").epsg == 32631
    assert records.column("scene_bbox")[0] == [4, 51, 5, 52]
    with pytest.raises(SchemaError, match="no column id"):
        table_to_records(table, name="mine")
    with pytest.raises(SchemaError, match="column_map"):
        table_to_records(table, name="mine", column_map={"nope": "id"})


def test_numbers_of_a_table_s_bands_are_those_of_records(tmp_path: Path) -> None:
    """Records call Landsat's bands by OLI's numbers, on Landsat 5 too: a table's B4 is red, as the table says."""
    path = str(raster(tmp_path / "a.tif"))
    bands = {"B4": 4, "lwir": 6, "my band_20m": 1}
    made = pa.table(
        {
            "id": ["a"], "datetime": ["2010-01-09T16:13:46Z"], "geometry": pa.array([None], pa.binary()),
            "platform": ["landsat-5"], "collection": ["landsat-c2-l2"],
            "assets": pa.array(
                [[(band, {"href": path}) for band in bands]],
                pa.map_(pa.string(), pa.struct([("href", pa.string())])),
            ),
        }
    )  # fmt: skip
    found = assets(Records(table_to_records(made, name="table")))
    assert {band: own["common_name"] for band, own in found.items()} == {
        "B4": "red", "lwir": "lwir", "my band_20m": None,
    }  # fmt: skip
    assert (found["lwir"]["kind"], found["lwir"]["scale"], found["lwir"]["offset"]) == (
        "temperature",
        0.00341802,
        149,
    )
