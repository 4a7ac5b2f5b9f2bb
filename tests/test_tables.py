"""Tables that people use with the tools they know: Arrow's friends, files, directories, other processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import shapely
from distributed import Client, LocalCluster
from distributed.protocol import pickle as cloudpickle
from made_records import collection, record, table
from many_records import pages
from servers import Fault

import rasteret_dask as rd
from rasteret_dask.footprint import outline_of
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.scan import pushed_filter
from rasteret_dask.table.geoparquet import ROWS_PER_GROUP, write_ordered

ROWS = [
    record(f"r{i}", west=500_000.0 + 3000 * (i % 4), when=f"2024-{1 + i % 5:02d}-10T10:00:00", datatake=f"d{i}",
           label=i, cloud=i * 10.0, properties={"view": i % 3})
    for i in range(8)
]  # fmt: skip
COUNT = 4000
BOX = (3.1, 42.1, 3.3, 42.3)


def own(name: str = "s2") -> rd.Collection:
    return collection(name, *ROWS)


def names(c: rd.Collection) -> list[str]:
    return sorted(c.to_table(["id"]).column("id").to_pylist())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 4,000 records at 250 places, ordered."""
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    assert write_ordered(pages(COUNT), path) == COUNT
    return path


STEPS: dict[str, Callable[[rd.Collection], rd.Collection]] = {
    "all": lambda c: c,
    "cloud": lambda c: c.subset(cloud_cover_lt=35),
    "box": lambda c: c.subset(bbox=(15.0, 48.0, 15.05, 49.0)),
    "outline": lambda c: c.subset(geometries=shapely.box(15.0, 48.0, 15.02, 49.0)),
    "month": lambda c: c.subset(date_range=("2024-02", "2024-03")),
    "property": lambda c: c.where(view=1),
    "readable": lambda c: c.where(readable=True),
    "has bands": lambda c: c.where(has_bands=["red", "SCL"]),
    "nothing": lambda c: c.subset(cloud_cover_lt=0),
    "sample": lambda c: c.sample(3),
    "filtered sample": lambda c: c.sample(5).subset(cloud_cover_lt=55),
    "bands": lambda c: c.harmonize(["red"]),
    "merge": lambda c: rd.merge(c, collection("b", record("x", other="y"))),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "file"])
def test_every_way_out_tells_the_same(step: str, lazy: bool, tmp_path: Path) -> None:
    base = own()
    if lazy:
        write_ordered([base.to_table()], tmp_path / "t.parquet", rows_per_group=2)
        base = rd.load(tmp_path / "t.parquet")
    chosen = STEPS[step](base)
    whole = chosen.to_table()
    assert whole.schema == chosen.schema
    assert len(chosen) == whole.num_rows
    assert chosen.dataset.to_table().equals(whole)
    assert chosen.dataset.count_rows() == whole.num_rows
    assert pa.table(chosen).equals(whole)
    assert pa.Table.from_batches(chosen.to_batches(), chosen.schema).equals(whole)
    for n in (0, 1, 3, 100):
        assert chosen.head(n).equals(whole.slice(0, n))
    for columns in (["id"], ["label", "assets", "id"], ["headers_metadata"]):
        assert chosen.to_table(columns).equals(whole.select(columns))
    again = cloudpickle.loads(cloudpickle.dumps(chosen))
    assert again.plan == chosen.plan
    assert again.to_table().equals(whole)


@pytest.mark.parametrize("step", STEPS)
def test_a_file_and_a_table_choose_the_same(step: str, tmp_path: Path) -> None:
    write_ordered([own().to_table()], tmp_path / "t.parquet", rows_per_group=2)
    eager, lazy = STEPS[step](own()), STEPS[step](rd.load(tmp_path / "t.parquet", name="s2"))
    assert lazy.to_table().sort_by("id").equals(eager.to_table().sort_by("id"))


def test_row_groups_that_cannot_match_are_not_read(many: Path, tmp_path: Path) -> None:
    groups = pq.ParquetFile(many).metadata.num_row_groups
    assert groups == -(-COUNT // ROWS_PER_GROUP)
    lazy = rd.load(many)
    chosen = lazy.subset(bbox=BOX, date_range=("2019-01", "2019-01"), cloud_cover_lt=50)
    fragment = next(iter(lazy.dataset.get_fragments()))
    where = pushed_filter(optimize(chosen.plan).where, lazy.schema)  # type: ignore[union-attr]
    kept = fragment.split_by_row_group(where)
    assert 1 <= len(kept) <= 4 < groups
    whole = lazy.to_table(["id", "bbox", "datetime", "eo:cloud_cover"]).to_pylist()
    expected = [
        r["id"] for r in whole
        if r["bbox"]["xmin"] <= BOX[2] and r["bbox"]["xmax"] >= BOX[0]
        and r["bbox"]["ymin"] <= BOX[3] and r["bbox"]["ymax"] >= BOX[1]
        and r["datetime"].strftime("%Y-%m") == "2019-01" and r["eo:cloud_cover"] < 50
    ]  # fmt: skip
    assert 0 < len(expected) < 10
    assert chosen.to_table(["id"]).column("id").to_pylist() == expected


def test_wide_columns_are_read_of_chosen_rows_only(many: Path, server: Any) -> None:
    """Bytes over HTTP: 4,000 records of 7 kB each; a filter of few rows asks for a small part of them."""
    (server.folder / "many.parquet").write_bytes(many.read_bytes())
    size = many.stat().st_size
    lazy = rd.load(server.url("many.parquet"))
    opened = sum(a.nbytes for a in server.asked())
    assert opened < size / 10
    server.forget()
    few = lazy.subset(bbox=BOX, date_range=("2019-01", "2019-01"))
    found = few.to_table()
    local = rd.load(many).subset(bbox=BOX, date_range=("2019-01", "2019-01")).to_table()
    assert found.equals(local)
    assert sum(a.nbytes for a in server.asked()) < size / 4
    server.forget()
    assert len(lazy.subset(date_range=("2019-01", "2019-01"), cloud_cover_lt=20)) > 100  # of all groups
    assert sum(a.nbytes for a in server.asked()) < size / 50


def test_a_server_that_knows_no_ranges_sends_all(tmp_path: Path, server: Any) -> None:
    own().export(server.folder / "t.parquet")
    server.fault("*.parquet", Fault(whole=True))
    assert names(rd.load(server.url("t.parquet"))) == names(own())
    server.fault("*.parquet", Fault(status=403))
    with pytest.raises(rd.SourceError, match="denied"):
        rd.load(server.url("t.parquet"))
    server.heal()
    for url in ("nothing.parquet", "t.parquet/x"):
        with pytest.raises(rd.SourceError, match="nothing there"):
            rd.load(server.url(url))
    assert names(rd.load(server.url("t.parquet?key=secret"))) == names(own())


def test_neighbours_lie_together(many: Path) -> None:
    """Records of one place follow each other, in time; and the file does not depend on the order of arrival."""
    order = pq.read_table(many, columns=["id", "datetime", "tile"])
    tiles = order.column("tile").to_pylist()
    starts = [i for i, t in enumerate(tiles) if i == 0 or tiles[i - 1] != t]
    assert len(starts) == len(set(tiles)) == 250
    times = order.column("datetime").to_pylist()
    assert all(times[i - 1] < t for i, t in enumerate(times) if i not in starts)
    other = many.with_name("other.parquet")
    shuffled = pa.concat_tables(pages(COUNT)).take(pa.array(np.random.default_rng(3).permutation(COUNT)))
    write_ordered([shuffled.slice(i, 300) for i in range(0, COUNT, 300)], other)
    assert other.read_bytes() == many.read_bytes()


def test_polars_duckdb_and_geopandas_read_a_collection() -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    part = own().subset(cloud_cover_lt=45)
    frame = polars.DataFrame(part)
    assert frame["id"].to_list() == names(part)
    assert frame["geometry"].to_list() == part.to_table().column("geometry").to_pylist()
    again = rd.as_collection(frame, name="s2")  # Polars has no maps, yet nothing is lost
    assert again.to_table().equals(part.to_table())
    found = duckdb.sql('SELECT id, "eo:cloud_cover" AS cloud, assets FROM part WHERE label > 1').arrow()
    assert pa.table(found).column("id").to_pylist() == ["r2", "r3", "r4"]
    assert rd.as_collection(duckdb.sql("SELECT * FROM part"), name="s2").to_table().equals(part.to_table())
    drawn = geopandas.GeoDataFrame.from_arrow(part)
    assert drawn.crs.to_string() == "OGC:CRS84"
    assert list(drawn.geometry) == list(shapely.from_wkb(part.to_table().column("geometry").to_pylist()))


def test_geopandas_out_and_in() -> None:
    frame = own().to_geopandas()
    assert frame.crs.to_epsg() == 4326
    assert "headers_metadata" not in frame.columns
    assert frame[frame.label == 3].id.tolist() == ["r3"]
    whole = own().to_geopandas(own().schema.names)
    assert rd.as_collection(whole, name="s2").to_table().equals(own().to_table())
    moved = whole.to_crs(32633).rename_geometry("outline")
    back = rd.as_collection(moved, name="s2").to_table().column("geometry").to_pylist()
    was = own().to_table().column("geometry").to_pylist()
    assert shapely.hausdorff_distance(shapely.from_wkb(back), shapely.from_wkb(was)).max() < 1e-9
    with pytest.raises(rd.SchemaError, match="build_from_table"):
        rd.as_collection(frame, name="s2")
    with pytest.raises(rd.SchemaError, match="set_crs"):
        rd.as_collection(whole.set_crs(None, allow_override=True), name="s2")


def test_the_schema_crosses_alone() -> None:
    schema = pa.schema(own())
    assert schema.names == own().schema.names
    assert schema.field("geometry").metadata[b"ARROW:extension:name"] == b"geoarrow.wkb"


def test_describe() -> None:
    said = own().describe()
    assert (said.records, said.crs, said.bands, said.columns) == (
        8,
        ("EPSG:32633",),
        ("B04", "B08", "SCL"),
        ("label",),
    )
    assert (said.start, said.end) == ("2024-01-10T10:00:00+00:00", "2024-05-10T10:00:00+00:00")
    boxes = np.array([r["scene_bbox"] for r in ROWS])
    assert said.bounds == (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0))
    assert "sentinel-2-l2a" in str(said)
    assert own().subset(cloud_cover_lt=0).describe().records == 0
    mixed = rd.as_collection(own().to_table(), name="m", data_source="sentinel-2+landsat")
    assert mixed.describe().data_source == "sentinel-2+landsat"
    assert mixed.subset(cloud_cover_lt=20).describe().data_source == "sentinel-2+landsat"


@pytest.mark.parametrize("by", [("year", "month"), ("year",), ("month",), ("year", "month", "day")])
def test_a_directory_by_time(by: tuple[str, ...], tmp_path: Path) -> None:
    rows = [*ROWS, record("old", when="2023-02-10T10:00:00", label=99, cloud=1.0)]
    base = collection("s2", *rows)
    base.export(tmp_path / "t", by)
    again = rd.load(tmp_path / "t")
    plain = again.to_table().drop_columns(list(by)).sort_by("id")
    assert plain.equals(base.to_table().sort_by("id"))
    for row in again.to_table().to_pylist():
        assert all(row[p] == getattr(row["datetime"], p) for p in by)
    files = sorted(
        p.parent.relative_to(tmp_path / "t").as_posix() for p in (tmp_path / "t").rglob("*.parquet")
    )
    said = [{"year": w.year, "month": w.month, "day": w.day} for w in (r["datetime"] for r in rows)]
    assert files == sorted({"/".join(f"{p}={s[p]}" for p in by) for s in said})
    assert names(again.subset(date_range=("2024-02", "2024-02"))) == names(
        base.subset(date_range=("2024-02", "2024-02"))
    )
    assert pickle.loads(pickle.dumps(again)).to_table().equals(again.to_table())
    frame = geopandas.read_parquet(tmp_path / "t")
    assert len(frame) == len(rows)
    again.subset(cloud_cover_lt=15).export(tmp_path / "t", by)  # onto itself: nothing of the old is left
    assert names(rd.load(tmp_path / "t")) == ["old", "r0", "r1"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_export_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("years of work")
    with pytest.raises(rd.StoreError, match=r"thesis\.txt"):
        own().export(tmp_path / "t", ("year",))
    with pytest.raises(rd.StoreError, match="a directory"):
        own().export(tmp_path / "t")
    with pytest.raises(rd.StoreError, match="a file"):
        own().export(tmp_path / "t" / "thesis.txt", ("year",))
    with pytest.raises(rd.PlanError, match="'year', 'month'"):
        own().export(tmp_path / "u", ("month", "year"))
    with pytest.raises(rd.PlanError, match="platform"):
        own().export(tmp_path / "u", ("platform",))
    with pytest.raises(rd.PlanError, match="rasteret"):
        own().export(tmp_path / "u", format="shapefile")  # type: ignore[arg-type]
    with pytest.raises(rd.PlanError, match="nothing"):
        own().where(nothing=1).export(tmp_path / "u")
    with pytest.raises(rd.StoreError, match="can be written"):
        own().export(tmp_path / "t" / "thesis.txt" / "table.parquet")
    assert [p.name for p in tmp_path.rglob("*")] == ["t", "thesis.txt"]
    assert (tmp_path / "t" / "thesis.txt").read_text() == "years of work"


def test_an_export_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    for place, by in ((tmp_path / "t", ("year", "month")), (tmp_path / "f.parquet", None)):
        own().export(place, by)
        before = names(rd.load(place))
        with pytest.raises(rd.PlanError, match="nothing"):
            own().where(nothing=1).export(place, by)
        assert names(rd.load(place)) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet", "t"]


def test_empty_exports(tmp_path: Path) -> None:
    nothing = own().subset(cloud_cover_lt=0)
    nothing.export(tmp_path / "f.parquet")
    nothing.export(tmp_path / "t", ("year",))
    for name in ("f.parquet", "t"):
        again = rd.load(tmp_path / name)
        assert len(again) == 0
        assert again.schema.equals(own().schema)


def test_records_without_a_time_have_a_partition(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "datetime": None}]
    spanned = {
        **ROWS[2],
        "datetime": None,
        "start_datetime": ROWS[2]["datetime"],
        "end_datetime": ROWS[3]["datetime"],
    }
    collection("s2", *rows, spanned).export(tmp_path / "t", ("year", "month"))
    folders = sorted(p.parent.name for p in (tmp_path / "t").rglob("*.parquet"))
    assert folders == ["month=1", "month=3", "month=__HIVE_DEFAULT_PARTITION__"]
    assert names(rd.load(tmp_path / "t")) == ["r0", "r1", "r2"]


def test_a_bucket_takes_and_gives_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{key}", value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="tables")
        own().export("s3://tables/one.parquet")
        own().export("s3://tables/by time", ("year", "month"))
        for url in ("s3://tables/one.parquet", "s3://tables/by time"):
            again = rd.load(url)
            assert names(again.subset(cloud_cover_lt=35)) == ["r0", "r1", "r2", "r3"]
            assert names(pickle.loads(pickle.dumps(again))) == names(own())
        token = next(iter(rd.load("s3://tables/one.parquet").query.tables))
        own().subset(cloud_cover_lt=25).export("s3://tables/by time", ("year", "month"))
        assert names(rd.load("s3://tables/by time")) == ["r0", "r1", "r2"]
        own().where(("id", "!=", "r7")).export("s3://tables/one.parquet")
        assert next(iter(rd.load("s3://tables/one.parquet").query.tables)) != token
        client.put_object(Bucket="tables", Key="by time/thesis.txt", Body=b"x")
        with pytest.raises(rd.StoreError, match="thesis"):
            own().export("s3://tables/by time", ("year",))
        with pytest.raises(rd.SourceError, match="nothing there"):
            rd.load("s3://tables/nothing.parquet")
    finally:
        server.stop()


def test_a_table_from_elsewhere_names_no_local_files(server: Any) -> None:
    for n, href in enumerate(("/etc/passwd", "vrt:///x", "http://169.254.169.254/a.tif")):
        rows = [dict(r) for r in ROWS]
        band, asset = rows[-1]["assets"][0]
        rows[-1]["assets"] = [(band, {**asset, "href": href}), *rows[-1]["assets"][1:]]
        collection("s2", *rows).export(server.folder / f"{n}.parquet")
        with pytest.raises(rd.TrustError):
            rd.load(server.url(f"{n}.parquet"))
        with pytest.raises(rd.TrustError):
            rd.build_from_table(server.url(f"{n}.parquet"), name="x")


def test_dataset_backed_collections_cross_to_a_cluster(many: Path) -> None:
    part = rd.load(many).subset(bbox=BOX).where(("eo:cloud_cover", "<", 60))
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        found = client.submit(lambda c: (c.plan, c.to_table(["id"])), part).result()
    assert found[0] == part.plan
    assert found[1].equals(part.to_table(["id"]))


def test_a_filtered_dataset_is_another_table(many: Path) -> None:
    data = pads.dataset(many)
    some = rd.as_collection(data.filter(pads.field("eo:cloud_cover") < 50), name="s2")
    whole = rd.as_collection(data, name="s2")
    assert 0 < len(some) < len(whole) == COUNT
    assert some.plan != whole.plan
    assert pickle.loads(pickle.dumps(some)).plan == some.plan
    half = rd.as_collection(
        pads.dataset([data, data.replace_schema(data.schema)]).filter(pads.field("id") == ""), name="u"
    )
    assert len(half) == 0


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((170.0, -20.0, 179.0, -10.0), ["across", "east"]),
        ((-179.5, -20.0, -178.0, -10.0), ["across", "west"]),
        ((175.0, -20.0, 182.0, -10.0), ["across", "east", "west"]),
        ((-185.0, -20.0, -179.3, -10.0), ["across", "east", "west"]),
        ((175.0, -20.0, -178.0, -10.0), ["across", "east", "west"]),
        ((178.5, -20.0, 179.5, -10.0), ["across"]),
        ((0.0, -20.0, 10.0, -10.0), []),
        ((170.0, 10.0, 179.0, 20.0), []),
    ],
)
def test_boxes_across_the_antimeridian(box: tuple[float, ...], expected: list[str], tmp_path: Path) -> None:
    corners = {
        "across": (178.0, -179.0),
        "east": (176.0, 177.0),
        "west": (-179.4, -178.2),
        "far": (40.0, 41.0),
    }
    rows = [
        {
            **ROWS[0],
            "id": n,
            "bbox": {"xmin": w, "xmax": e, "ymin": -15.0, "ymax": -14.0},
            "geometry": outline_of(None, [w, -15.0, e, -14.0]),
        }
        for n, (w, e) in corners.items()
    ]
    base = rd.as_collection(table(*rows), name="s2")
    write_ordered([base.to_table()], tmp_path / "t.parquet", rows_per_group=1)
    assert names(base.subset(bbox=box)) == sorted(expected)
    assert names(rd.load(tmp_path / "t.parquet").subset(bbox=box)) == sorted(expected)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A process that stages and writes twice as many records needs no more memory of Arrow's, but for their keys."""
    code = (
        "import sys; import pyarrow as pa; from many_records import pages\n"
        "from rasteret_dask.table.geoparquet import write_ordered\n"
        "for count in (12_000, 22_000):\n"
        "    write_ordered(pages(count), sys.argv[1])\n"
        "    print(pa.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.parquet")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    few, many = map(
        int, done.stdout.split()
    )  # of a process: a page's, and those of the rows that are put in order
    staged = 10_000 * 15e3  # bytes that the further rows take in memory
    assert 0 <= many - few < staged / 4
