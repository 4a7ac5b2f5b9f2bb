from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from many_records import pages

from rasteret_dask.errors import SchemaError
from rasteret_dask.table.geoparquet import _hilbert, read, write, write_ordered

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


def test_ordered_rows_are_those_that_came(tmp_path: Path) -> None:
    whole = pa.concat_tables(pages(700, page=90))
    path = tmp_path / "deep" / "t.parquet"
    assert write_ordered(pages(700, page=90), path, metadata={b"a": b"b"}, rows_per_group=100) == 700
    again = read(path)
    assert again.schema.equals(whole.schema)
    assert again.schema.metadata[b"a"] == b"b"
    assert again.sort_by("id").equals(whole.sort_by("id"))
    assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(7)] == [100] * 7
    column = json.loads(again.schema.metadata[b"geo"])["columns"]["geometry"]
    assert column["bbox"] == list(
        shapely.total_bounds(shapely.from_wkb(whole.column("geometry").to_pylist()))
    )
    assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]


def test_rows_are_chosen_when_all_are_known(tmp_path: Path) -> None:
    """The newest of rows that share an id, wherever they came."""

    def newest(staged: pa.Table) -> Any:
        times = staged.column("datetime").to_pylist()
        place = {}
        for i in sorted(range(len(times)), key=lambda i: times[i]):
            place[staged.column("tile")[i].as_py()] = i
        return np.array(list(place.values()))

    assert write_ordered(pages(900, page=130), tmp_path / "t.parquet", choose=newest) == 250
    found = read(tmp_path / "t.parquet").to_pylist()
    latest: dict[str, Any] = {}
    for row in pa.concat_tables(pages(900)).select(["tile", "datetime"]).to_pylist():
        latest[row["tile"]] = max(latest.get(row["tile"], row["datetime"]), row["datetime"])
    assert {r["tile"]: r["datetime"] for r in found} == latest
    assert (
        write_ordered(pages(90), tmp_path / "t.parquet", choose=lambda _: np.array([], dtype=np.int64)) == 0
    )
    assert read(tmp_path / "t.parquet").num_rows == 0


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_ordered([table()], path)
    before = path.read_bytes()

    def broken() -> Iterator[pa.Table]:
        yield table()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_ordered(broken(), path)
    with pytest.raises(SchemaError, match="no table"):
        write_ordered([], path)
    with pytest.raises(SchemaError, match="differs from the first in split"):
        write_ordered([table(), table().drop_columns(["split"])], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_dictionaries_batches_and_empty_tables(tmp_path: Path) -> None:
    parts = [table().slice(0, 0), table().slice(0, 1), *table().slice(1).to_batches()]
    other = table().set_column(3, "split", pa.array(["never", "seen", "before"]).dictionary_encode())
    assert write_ordered([*parts, other], tmp_path / "t.parquet") == 6
    again = read(tmp_path / "t.parquet")
    assert again.schema.equals(table().schema)
    assert sorted(again.column("split").to_pylist()) == ["before", "never", "seen", "train", "train", "val"]


def test_wide_rows_make_small_row_groups(tmp_path: Path) -> None:
    wide = pa.array([[b"x" * 1000] * 1000] * 30, pa.list_(pa.binary()))  # 1 MB a row
    points = pa.array(shapely.to_wkb(shapely.points(range(30), [0] * 30)).tolist(), pa.binary())
    write_ordered([pa.table({"geometry": points, "wide": wide})], tmp_path / "t.parquet")
    groups = pq.ParquetFile(tmp_path / "t.parquet").metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 8
    assert read(tmp_path / "t.parquet").column("wide").to_pylist() == wide.to_pylist()


def test_the_curve_goes_from_neighbour_to_neighbour() -> None:
    """Each of the 64 x 64 cells of a grid follows one that touches it; unknown places come last."""
    side = 64
    row, col = (v.ravel() for v in np.meshgrid(np.arange(side), np.arange(side), indexing="ij"))
    x, y = (col + 0.5) / side * 360 - 180, (row + 0.5) / side * 180 - 90
    order = np.argsort(_hilbert(x, y))
    assert np.all(np.abs(np.diff(row[order])) + np.abs(np.diff(col[order])) == 1)
    assert _hilbert(np.array([np.nan, 180.0]), np.array([0.0, 90.0])).argmax() == 0
