from __future__ import annotations

import json
from pathlib import Path

import geopandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from rasteret_dask.errors import SchemaError
from rasteret_dask.geoparquet import read, write

BOX = pa.struct([(c, pa.float64()) for c in ("xmin", "ymin", "xmax", "ymax")])


def table() -> pa.Table:
    shapes = [shapely.box(4, 51, 5, 52), None, shapely.MultiPolygon([shapely.box(-3, 7, -2, 8)])]
    levels = [[{"width": 3, "offsets": [1, 2]}], [], None]
    return pa.table(
        {
            "id": ["a", "b", "c"],
            "geometry": pa.array([None if s is None else shapely.to_wkb(s) for s in shapes], pa.binary()),
            "bbox": pa.array(
                [None if s is None else dict(zip(BOX.names, s.bounds, strict=True)) for s in shapes], BOX
            ),
            "split": pa.array(["train", "val", "train"]).dictionary_encode(),
            "levels": pa.array(
                levels, pa.list_(pa.struct([("width", pa.int32()), ("offsets", pa.list_(pa.int64()))]))
            ),
            "headers": pa.array(
                [[("B04", [1])], [], [("B08", None)]], pa.map_(pa.string(), pa.list_(pa.int64()))
            ),
        }
    ).replace_schema_metadata({"plan": "x"})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.parquet"
    write(table(), path)
    again = read(path)
    assert again.schema.equals(table().schema)
    assert again.equals(table())
    assert again.schema.metadata[b"plan"] == b"x"
    write(again.slice(0, 1), path)
    assert read(path).num_rows == 1
    assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]


def test_geo_metadata(tmp_path: Path) -> None:
    write(table(), tmp_path / "t.parquet")
    geo = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"geo"])
    column = geo["columns"]["geometry"]
    assert geo["version"] == "1.1.0"
    assert column["bbox"] == [-3, 7, 5, 52]
    assert column["geometry_types"] == ["MultiPolygon", "Polygon"]
    assert column["covering"]["bbox"]["xmax"] == ["bbox", "xmax"]


def test_geopandas_reads_it(tmp_path: Path) -> None:
    write(table(), tmp_path / "t.parquet")
    frame = geopandas.read_parquet(tmp_path / "t.parquet")
    assert frame.crs.to_string() == "OGC:CRS84"
    assert frame.geometry[0].equals(shapely.box(4, 51, 5, 52))
    assert len(geopandas.read_parquet(tmp_path / "t.parquet", bbox=(-10, 0, 0, 20))) == 1


def test_an_empty_table(tmp_path: Path) -> None:
    write(table().slice(0, 0), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").schema.equals(table().schema)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(table(), path)
    with pytest.raises(SchemaError, match="geometry"):
        write(table().drop_columns(["geometry"]), path)
    with pytest.raises(SchemaError, match="string"):
        write(pa.table({"geometry": ["POINT (1 2)"]}), path)
    assert read(path).num_rows == 3
    path.write_text("no parquet")
    with pytest.raises(SchemaError, match="GeoParquet"):
        read(path)
