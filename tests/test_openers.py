"""Any table of scenes becomes a collection, or an error says what it is and who takes it; the guide's tables."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from made_records import collection, record, table

import rasteret_dask as rasteret
import rasteret_dask as rd

ROWS = [
    record(f"r{i}", west=500_000.0 + 2000 * i, datatake=f"d{i}", label=i, cloud=i * 10.0) for i in range(4)
]
GUIDE = ["id", "datetime", "geometry", "assets", "scene_bbox", "proj:epsg", "eo:cloud_cover", "source"]


def guided(coll: rd.Collection, source: str) -> pa.Table:
    """Return a collection's table as the guide's reader cuts it."""
    t = coll.dataset.to_table()
    t = t.append_column("source", pa.array([source] * t.num_rows))
    return t.select(GUIDE + [c for c in t.schema.names if c.endswith("_metadata")])


def test_the_guide_s_merged_table(s2: rd.Collection, l8: rd.Collection) -> None:
    merged_table = pa.concat_tables([guided(s2, "sentinel-2"), guided(l8, "landsat")])
    merged = rasteret.as_collection(merged_table, name="multi_source", data_source="sentinel-2+landsat")
    assert merged.dataset.count_rows() == len(s2) + len(l8)
    assert merged.describe().data_source == "sentinel-2+landsat"
    for source, own, bands in (
        ("sentinel-2", s2, ["B04", "B03", "B02", "B08"]), ("landsat", l8, ["B4", "B3", "B2", "B5"]),
    ):  # fmt: skip
        part = merged.subset(source=source)
        assert sorted(part.to_table(["id"]).column("id").to_pylist()) == sorted(
            own.to_table(["id"]).column("id").to_pylist()
        )
        for column in ("bbox", "assets", "headers_metadata", "collection"):  # dropped ones are derived again
            assert part.to_table([column]).equals(own.to_table([column])), column
        for mask in (None, "clouds"):
            got, expected = (
                c.harmonize(bands, units="reflectance", mask=mask, time="1MS")
                .chips(32, cell_km=1.28)
                .sample(6)
                .load()
                for c in (part, own)
            )
            assert got.chip_id.values.tolist() == expected.chip_id.values.tolist()
            assert got.drop_vars("member", errors="ignore").equals(
                expected.drop_vars("member", errors="ignore")
            )


@pytest.mark.parametrize("which", ["s2", "l8", "aef"])
def test_the_guide_s_splits(which: str, request: pytest.FixtureRequest) -> None:
    coll: rd.Collection = request.getfixturevalue(which)
    t = coll.dataset.to_table()
    splits = []
    for g in t.column("geometry").to_pylist():
        share = int(hashlib.md5(g).hexdigest(), 16) / 2**128
        splits.append("train" if share < 0.7 else "val" if share < 0.85 else "test")
    t = t.append_column("split", pa.array(splits))
    again = rasteret.as_collection(t, name=coll.name)
    assert again.name == coll.name
    for split in ("train", "val", "test"):
        part = again.subset(split=split)
        assert len(part) == splits.count(split)
        assert len(again.select_split(split)) == splits.count(split)
    assert len(again.subset(split=["train", "val"])) == len(splits) - splits.count("test")
    renamed = rasteret.as_collection(t.rename_columns([*t.column_names[:-1], "fold"]), name=coll.name)
    assert len(renamed.subset(split="train", split_column="fold")) == splits.count("train")


def test_every_sensor_has_one_schema(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> None:
    tables = [c.dataset.to_table() for c in (s2, l8, aef)]
    assert all(t.schema.equals(rd.RECORD_SCHEMA, check_metadata=True) for t in tables)
    assert pa.concat_tables(tables).num_rows == sum(len(t) for t in tables)


def test_what_other_columns_tell_is_derived() -> None:
    whole = table(*ROWS)
    for lost in (["bbox"], ["scene_bbox"], ["bbox", "scene_bbox"], ["collection"]):
        again = rd.as_collection(whole.drop_columns(lost), name="s2").to_table()
        if "collection" in lost:  # these assets name no dataset
            assert again.column("collection").null_count == len(whole)
            continue
        for column in ("bbox", "scene_bbox"):
            assert again.column(column).equals(whole.column(column))
    some = pa.concat_tables(
        [whole.slice(0, 2), whole.slice(2).drop_columns(["bbox"])], promote_options="default"
    )
    assert some.column("bbox").null_count == 2
    assert rd.as_collection(some, name="s2").to_table().column("bbox").equals(whole.column("bbox"))


def test_tables_in_other_hands() -> None:
    whole = table(*ROWS)
    reader = pa.RecordBatchReader.from_batches(whole.schema, whole.to_batches())
    for given in (reader, whole.to_batches()[0], rd.as_collection(whole, name="x")):
        assert rd.as_collection(given, name="s2").to_table().equals(whole)
    large = whole.set_column(0, "id", whole.column("id").cast(pa.large_string()))
    geometry = whole.column_names.index("geometry")
    large = large.set_column(geometry, "geometry", whole.column("geometry").cast(pa.large_binary()))
    assert rd.as_collection(large, name="s2").to_table().equals(whole)
    for wrong in ([1, 2], "a path", None):
        with pytest.raises(rd.SchemaError, match=r"rd\.load"):
            rd.as_collection(wrong, name="s2")


def test_as_collection_keeps_what_metadata_says(tmp_path: Path) -> None:
    base = rd.as_collection(table(*ROWS), name="s2", data_source="here")
    base.export(tmp_path / "t.parquet")
    assert rd.load(tmp_path / "t.parquet").describe().data_source == "here"
    again = rd.as_collection(pq.read_table(tmp_path / "t.parquet"))
    assert (again.name, again.describe().data_source) == ("s2", "here")
    assert rd.as_collection(table(*ROWS)).name == "table"


def test_one_file_a_row(small_world: Any, aef: rd.Collection, tmp_path: Path) -> None:
    """An index such as AlphaEarth's: numbers for ids, years for times, a file a row."""
    whole = aef.to_table()
    href = [next(iter(dict(a).values()))["href"] for a in whole.column("assets").to_pylist()]
    years = [t.year for t in whole.column("datetime").to_pylist()]
    index = pa.table(
        {"fid": list(range(len(href))), "year": years, "path": href, "geom": whole.column("geometry")}
    )
    names = {"fid": "id", "year": "datetime", "geom": "geometry", "path": "href"}
    bands = {f"A{i:02d}": i for i in range(64)}
    made = rd.build_from_files(index, name="aef", dataset="aef-v1-annual", column_map=names, bands=bands)
    assert made.bands == tuple(bands)
    again = made.to_table()
    assert again.column("start_datetime").equals(whole.column("start_datetime"))
    assert [(t.year, t.timetuple().tm_yday) for t in again.column("end_datetime").to_pylist()] == [
        (y + 1, 1) for y in years
    ]
    assert len(made.subset(date_range=str(years[0]))) == 1
    assert len(made.subset(date_range=str(years[0] + 1))) == 0
    for column in ("headers_metadata",):
        ours = [dict(v)["A07"] for v in whole.column(column).to_pylist()]
        assert [dict(v)["A07"] for v in again.column(column).to_pylist()] == ours
    pq.write_table(index, tmp_path / "index.parquet")
    with pytest.raises(
        rd.SchemaError, match=r"build_from_files\(path, name='index', column_map={'path': 'href'}\)"
    ):
        rd.load(tmp_path / "index.parquet")


def test_stac_geoparquet_loads(data: Path) -> None:
    for file, bands in (("pc_sentinel_2_l2a_100items", "B04"), ("pc_landsat_c2_l2_100items", "B4")):
        path = data / "stac_items" / f"{file}.parquet"
        loaded = rd.load(path, headers=False)
        assert loaded.name == file
        assert len(loaded) == pq.ParquetFile(path).metadata.num_rows
        assert bands in loaded.bands
        assert len(loaded.subset(date_range=("2000", "2100"), cloud_cover_lt=100)) >= 90


def test_what_is_no_table_of_scenes_is_told(tmp_path: Path) -> None:
    chips = collection("s2", *ROWS).harmonize(["red"]).chips(32, cell_km=1.28)
    chips.save(tmp_path / "chips.parquet")
    outline = pa.array([shapely.to_wkb(shapely.Point(1, 2))], pa.binary())
    pq.write_table(pa.table({"name": ["a"], "geometry": outline}), tmp_path / "areas.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "empty").mkdir()
    for name, said in (("chips", "with_table"), ("areas", "aoi="), ("numbers", "column_map")):
        with pytest.raises(rd.SchemaError, match=said):
            rd.load(tmp_path / f"{name}.parquet")
    with pytest.raises(rd.SourceError, match="nothing there"):
        rd.load(tmp_path / "nothing.parquet")
    with pytest.raises(rd.SourceError, match="no file"):
        rd.load(tmp_path / "empty")
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    with pytest.raises(rd.SourceError, match="Parquet"):
        rd.load(tmp_path / "items.json")
