"""rasteret's own tables, both ways; against real rasteret where Python 3.12 and the package are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import xarray as xr
from rasterio.windows import from_bounds

import rasteret_dask as rd
from rasteret_dask.table.rasteretio import header_columns

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import python312

ENVIRONMENT = Path(os.environ.get("RASTERET_DASK_PYTHON312", "/tmp/rasteret-dask-bench/python312"))
MARGIN_M = 1.0
"""rasteret widens an area to whole pixels: this much smaller, a box is exactly its own pixels."""


@pytest.fixture(scope="session")
def rasteret() -> Any:
    """Return a function that gives real rasteret a job (see ``rasteret_side``), or skip."""
    python, why = python312.environment(ENVIRONMENT, None)
    if python is None:
        pytest.skip(f"real rasteret needs Python 3.12 or newer and pip: {why}")

    def run(**job: Any) -> Path:
        side = Path(__file__).with_name("rasteret_side.py")
        done = subprocess.run(
            [str(python), str(side)], input=json.dumps(job), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return Path(job["out"])

    return run


def boxes(collection: rd.Collection, band: str) -> tuple[list[tuple[float, ...]], int]:
    """Return three boxes on whole pixels inside every record's raster, and their CRS."""
    records = [
        (dict(r["headers_metadata"])[band][0], r["proj:epsg"]) for r in collection.to_table().to_pylist()
    ]
    (epsg,) = {code for _, code in records}
    edges = []
    for level, _ in records:
        a, _, c, _, e, f = level["transform"]
        ys = sorted((f, f + e * level["height"]))
        edges.append((c, ys[0], c + a * level["width"], ys[1]))
    west, south = max(e[0] for e in edges), max(e[1] for e in edges)
    east, north = min(e[2] for e in edges), min(e[3] for e in edges)
    pixel = abs(records[0][0]["transform"][0])
    side = 12 * pixel
    assert east - west > 3 * side
    assert north - south > 3 * side
    return [
        (west + k * side, south + k * side, west + (k + 1) * side, south + (k + 1) * side) for k in range(3)
    ], epsg


def pixels_of(href: str, index: int, box: tuple[float, ...]) -> Any:
    with rasterio.open(href) as src:
        north_up = src.transform.e < 0
        found = src.read(index + 1, window=from_bounds(*box, transform=src.transform) if north_up else None)
        if north_up:
            return found
        rows = [round((y - src.transform.f) / src.transform.e) for y in (box[1], box[3])]
        cols = [round((x - src.transform.c) / src.transform.a) for x in (box[0], box[2])]
        return found[rows[0] : rows[1], cols[0] : cols[1]]  # in the file's order: south first


CASES = {
    "s2": ["B04", "B08", "SCL"],
    "l8": ["B4", "B5", "qa_pixel"],
    "aef": ["A00", "A63"],
}  # SCL has larger pixels, which get_numpy does not stack: it is read by itself


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
@pytest.mark.parametrize("by", [None, ("year", "month")], ids=["file", "directory"])
def test_rasteret_reads_what_we_export(
    which: str, by: Any, rasteret: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    collection: rd.Collection = request.getfixturevalue(which)
    table = tmp_path / ("table" if by else "table.parquet")
    collection.export(table, by, format="rasteret")
    records = {r["id"]: dict(r["assets"]) for r in collection.to_table().to_pylist()}
    for bands in ([b] for b in CASES[which]):
        found, epsg = boxes(collection, bands[0])
        inside = [(w + MARGIN_M, s + MARGIN_M, e - MARGIN_M, n - MARGIN_M) for w, s, e, n in found]
        out = rasteret(
            do="read", table=str(table), boxes=inside, bands=bands, epsg=epsg, out=str(tmp_path / "out.npz")
        )
        with np.load(out) as read:
            pixels, ids = read["pixels"], read["ids"].tolist()
            assert sorted(read["bands"].tolist()) == sorted(collection.bands)
        assert sorted(ids) == sorted(records)
        expected = [
            pixels_of(records[i][bands[0]]["href"], records[i][bands[0]]["band_index"], box)
            for i in ids
            for box in found
        ]
        np.testing.assert_array_equal(pixels.reshape(-1, *pixels.shape[-2:]), np.stack(expected))


@pytest.mark.slow
@pytest.mark.parametrize("vintage", ["bbox", "scene_bbox"])
@pytest.mark.parametrize("headers", [True, False])
def test_we_read_what_rasteret_built(
    vintage: str, headers: bool, rasteret: Any, s2: rd.Collection, tmp_path: Path
) -> None:
    """Records that real rasteret built from the same files give the same pixels, by either way of opening."""
    bands = ["B04", "B08"]
    rows = s2.to_table().to_pylist()
    box = pa.struct([(n, pa.float64()) for n in ("xmin", "ymin", "xmax", "ymax")])
    kind = pa.struct([(b, pa.struct([("href", pa.string()), ("band_index", pa.int64())])) for b in bands])
    given = pa.table(
        {
            "id": [r["id"] for r in rows],
            "datetime": pa.array([r["datetime"].replace(tzinfo=None) for r in rows], pa.timestamp("us")),
            "geometry": pa.array([r["geometry"] for r in rows], pa.binary()),
            "bbox": pa.array([r["bbox"] for r in rows], box),
            "proj:epsg": pa.array([r["proj:epsg"] for r in rows], pa.int32()),
            "eo:cloud_cover": [r["eo:cloud_cover"] for r in rows],
            "platform": [r["platform"] for r in rows],
            "collection": [r["collection"] for r in rows],
            "s2:processing_baseline": [r["baseline"] for r in rows],
            "earthsearch:boa_offset_applied": [
                json.loads(r["properties"])["earthsearch:boa_offset_applied"] for r in rows
            ],
            "assets": pa.array(
                [{b: {"href": dict(r["assets"])[b]["href"], "band_index": 0} for b in bands} for r in rows],
                kind,
            ),
        }
    )
    pq.write_table(given, tmp_path / "given.parquet")
    out = rasteret(
        do="build", table=str(tmp_path / "given.parquet"), folder=str(tmp_path / "w"), bands=bands,
        data_source="sentinel-2-l2a", out=str(tmp_path / "theirs"), partition_by=["year", "month"],
    )  # fmt: skip
    if vintage == "scene_bbox":  # as rasteret wrote it until 0.3.4
        theirs = pq.read_table(out)
        at = theirs.column_names.index("bbox")
        lists = [[b[n] for n in ("xmin", "ymin", "xmax", "ymax")] for b in theirs.column("bbox").to_pylist()]
        out = tmp_path / "older.parquet"
        pq.write_table(theirs.set_column(at, "scene_bbox", pa.array(lists)), out)
    if headers:
        loaded = rd.load(out, name="s2")
    else:
        with pytest.warns(UserWarning, match="full resolution only"):
            loaded = rd.load(out, name="s2", headers=False)
        with pytest.warns(UserWarning, match="full resolution only"):
            wrapped = rd.as_collection(pq.read_table(out), name="s2")
        assert wrapped.to_table().equals(loaded.to_table())
    assert len(loaded) == len(s2)
    ours = {r["id"]: r for r in rows}
    for row in loaded.to_table().to_pylist():
        own = ours[row["id"]]
        for column in ("datetime", "geometry", "bbox", "scene_bbox", "proj:epsg", "collection", "platform"):
            assert row[column] == own[column], column
        for band in bands:
            theirs, levels = dict(row["assets"])[band], dict(row["headers_metadata"])[band]
            expected = dict(own["headers_metadata"])[band]
            assert levels == (expected if headers else expected[:1])
            for field in ("href", "band_index", "scale", "offset", "nodata", "dtype", "role", "common_name"):
                assert theirs[field] == dict(own["assets"])[band][field], field
    got, expected = (
        c.harmonize(bands, units="raw", time="1MS").chips(32, cell_km=1.28).sample(8).load()
        for c in (loaded, s2)
    )
    assert isinstance(got, xr.Dataset)
    assert isinstance(expected, xr.Dataset)
    assert got.equals(expected)


def test_our_export_comes_back(s2: rd.Collection, l8: rd.Collection, tmp_path: Path) -> None:
    both = rd.merge(s2, l8)
    both.export(tmp_path / "t.parquet", format="rasteret")
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert set(header_columns(schema)) == {f"{b}_metadata" for b in both.bands}
    assert schema.metadata[b"data_source"] == b"sentinel-2-l2a+landsat-c2-l2"
    again = rd.load(tmp_path / "t.parquet")
    assert sorted(again.bands) == sorted(both.bands)
    want = {r["id"]: r for r in both.to_table().to_pylist()}
    for row in again.to_table().to_pylist():
        own = want[row["id"]]
        headers = [sorted(r["headers_metadata"], key=lambda pair: pair[0]) for r in (row, own)]
        assert headers[0] == headers[1]
        assert _but_keys(row, own)
        assert row["bbox"] == own["bbox"]


def _but_keys(row: Any, own: Any) -> bool:
    """Say whether assets are equal but for the provider's keys, and where the scale was found."""
    left, right = (
        {b: {k: v for k, v in a.items() if k not in ("asset", "rule")} for b, a in r["assets"]}
        for r in (row, own)
    )
    return left == right


def test_what_rasteret_would_read_wrongly_is_left_out(s2: rd.Collection, tmp_path: Path) -> None:
    rows = s2.to_table().to_pylist()
    changes: list[dict[str, Any]] = [{"byteorder": ">"}, {"tile_offsets": []}, {"driver": "JP2OpenJPEG"}]
    for n, change in enumerate(changes):
        headers = dict(rows[n]["headers_metadata"])
        headers["B04"] = [{**headers["B04"][0], **change}, *headers["B04"][1:]]
        rows[n]["headers_metadata"] = list(headers.items())
    odd = rd.as_collection(pa.Table.from_pylist(rows, schema=rd.RECORD_SCHEMA), name="odd")
    with pytest.warns(UserWarning, match="cannot read 3 of"):
        odd.export(tmp_path / "t.parquet", format="rasteret")
    written = pq.read_table(tmp_path / "t.parquet")
    assert written.column("B04_metadata").null_count == 3
    assert written.column("B08_metadata").null_count == 0
    lost = {r["id"] for r in written.to_pylist() if r["assets"]["B04"] is None}
    assert lost == {r["id"] for r in rows[:3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2.export(tmp_path / "u.parquet", format="rasteret")
