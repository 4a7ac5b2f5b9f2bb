"""What becomes no band is listed, and a copy stands in for a file that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from rasterio.transform import Affine
from rasterio.warp import transform_bounds

import rasteret_dask as rd
from rasteret_dask.ingest.pages import ItemBatch, TableSpec, ingest
from rasteret_dask.ingest.sources import read_items
from rasteret_dask.ingest.stac import Rules
from rasteret_dask.progress import Progress
from rasteret_dask.table.leftassets import LeftAssets, without_left_assets

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")


def raster(path: Path, pixel: float = 10, value: int = 1) -> Path:
    size = int(640 / pixel)
    with rasterio.open(
        path, "w", driver="GTiff", width=size, height=size, count=1, dtype="uint16", crs="EPSG:32633",
        transform=Affine(pixel, 0, 500000, 0, -pixel, 5540000), tiled=True, blockxsize=16, blockysize=16,
    ) as to:  # fmt: skip
        to.write(np.full((1, size, size), value, "uint16"))
    return path


def scene(name: str, box_of: Path, when: str = "2023-06-01T10:00:00Z", **assets: Any) -> dict[str, Any]:
    with rasterio.open(box_of) as source:
        box = transform_bounds(source.crs, 4326, *source.bounds)
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "links": [], "geometry": None, "bbox": list(box),
        "collection": "things", "properties": {"datetime": when},
        "assets": {k: {"href": str(v)} if isinstance(v, str | Path) else v for k, v in assets.items()},
    }  # fmt: skip


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    fine, coarse = raster(tmp_path / "fine.tif", 10, 10), raster(tmp_path / "coarse.tif", 20, 20)
    return [
        scene(name, fine, red=fine, red_20m=coarse, look={"href": "look.png", "type": "image/png"})
        for name in ("a", "b")
    ]


def test_left_out_is_listed_kept_and_no_part_of_the_identity(
    tmp_path: Path, items: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rasteret_dask")
    c = rd.build_from_stac(items, name="c")
    reasons = {
        "look": "image/png is neither TIFF nor JPEG 2000",
        "red_20m": "band 'red' is taken from asset 'red'",
    }
    expected = [
        {"member": "c", "asset": asset, "reason": reason, "records": 2, "example": "a"}
        for asset, reason in reasons.items()
    ]
    assert c.left_out().to_pylist() == expected
    assert any("look (image/png" in message and "left_out()" in message for message in caplog.messages)
    assert c.subset(date_range="2023").harmonize(bands=["red"]).left_out().to_pylist() == expected
    c.export(tmp_path / "c.parquet")
    assert rd.load(tmp_path / "c.parquet", name="c").left_out().to_pylist() == expected
    other = [{**item, "assets": {k: v for k, v in item["assets"].items() if k == "red"}} for item in items]
    plain = rd.build_from_stac(other, name="c")
    assert plain.plan == c.plan
    assert plain.left_out().num_rows == 0
    named = rd.build_from_stac(items, name="d", bands=["red"])
    assert rd.merge(c, named).left_out().column("member").to_pylist() == ["c", "c", "d", "d"]
    assert rd.as_collection(c.to_table(), name="c").left_out().num_rows == 2


def test_pages_count_what_they_leave_out(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    batches = [ItemBatch([item]) for item in read_items(items)]
    report = ingest(batches, TableSpec("c", Rules()), tmp_path / "t.parquet", Progress("items", False))
    assert {key: count for (key, _), (count, _) in report.left.counts.items()} == {"look": 2, "red_20m": 2}
    c = rd.load(tmp_path / "t.parquet")
    assert c.left_out().column("records").to_pylist() == [2, 2]


@pytest.mark.parametrize("paged", [False, True])
def test_a_copy_stands_in_for_a_file_that_cannot_be_read(tmp_path: Path, paged: bool) -> None:
    fine, coarse = raster(tmp_path / "fine.tif", 10, 10), raster(tmp_path / "coarse.tif", 20, 20)
    whole = scene("whole", fine, "2023-06-01T10:00:00Z", red=fine, red_20m=coarse)
    gone = scene(
        "gone", fine, "2023-06-02T10:00:00Z", red=tmp_path / "gone.tif", red_20m=coarse, red_60m="no.tif"
    )
    lost = scene(
        "lost", fine, "2023-06-03T10:00:00Z", red=tmp_path / "gone.tif", red_60m=tmp_path / "gone-too.tif"
    )
    if paged:
        ingest(
            [ItemBatch(read_items([whole, gone, lost]))], TableSpec("c", Rules()), tmp_path / "t.parquet",
            Progress("items", False),
        )  # fmt: skip
        c = rd.load(tmp_path / "t.parquet", name="c")
    else:
        c = rd.build_from_stac([whole, gone, lost], name="c")
    found = {r["id"]: dict(r["assets"])["red"] for r in c.to_table(["id", "assets"]).to_pylist()}
    assert {name: (a["asset"], a["error"] is None) for name, a in found.items()} == {
        "whole": ("red", True), "gone": ("red_20m", True), "lost": ("red", False),
    }  # fmt: skip
    pixels = c.where(readable=True).cube(["red"], resolution=20).compute()
    assert [float(p.max()) for p in pixels] == [10, 20]
    reasons = {(r["asset"], r["example"]): r["reason"] for r in c.left_out().to_pylist()}
    assert "taken from a copy" in reasons["red", "gone"]
    assert ("red_20m", "whole") in reasons
    assert ("red_20m", "gone") not in reasons


@pytest.mark.parametrize("media", ["image/x.geotiff", "application/octet-stream", None])
def test_any_media_type_of_a_tiff_is_read(tmp_path: Path, media: str | None) -> None:
    path = raster(tmp_path / "a.tif", value=7)
    c = rd.build_from_stac([scene("a", path, red={"href": str(path), "type": media})], name="a")
    assert float(c.cube(["red"]).compute().min()) == 7


def test_many_kinds_are_counted_under_one() -> None:
    class Row:
        def __init__(self, n: int) -> None:
            self.row: dict[str, object] = {"id": str(n)}
            self.left = ((f"key-{n}", "no"),)

    left = LeftAssets()
    left.add(Row(n) for n in range(1500))
    assert sum(count for count, _ in left.counts.values()) == 1500
    assert len(left.counts) == 1001
    table = left.marked(pa.table({"a": [1]}))
    assert LeftAssets.of(table.schema).counts == left.counts
    assert without_left_assets(table.schema).metadata in (None, {})


def test_records_that_lack_a_band_are_left_out(tmp_path: Path) -> None:
    path = raster(tmp_path / "a.tif")
    rgbn = scene("rgbn", path, red=path, nir=path)
    rgb = scene("rgb", path, "2023-07-01T10:00:00Z", red=path)
    bad = scene("bad", path, "2023-08-01T10:00:00Z", red=path, nir=tmp_path / "gone.tif")
    c = rd.build_from_stac([rgbn, rgb, bad], name="c")
    (tmp_path / "out").mkdir()
    c.export(tmp_path / "out" / "c.parquet")
    for own in (c, rd.load(tmp_path / "out" / "c.parquet", name="c")):
        with pytest.raises(rd.UnreadableAssetsError, match=r"readable=True.*has_bands"):
            own.cube(["nir"])
        for one in (
            own.where(readable=True),
            own.subset(readable=True),
            own.harmonize(bands=["nir"]).where(readable=True),
            own.where(has_bands=["nir"]).where(readable=True),
            own.sample(3).where(readable=True),
        ):
            cube = one.cube(["nir"])
            assert cube.sizes["time"] == 1
            told = one.harmonize(bands=["nir"]).chips(16, cell_km=0.16).explain()
            assert told["records"]["c"]["scanned"] == 1
            assert told["dropped"]["record that lacks a band or has an unreadable asset (c)"] == 2
        assert own.where(readable=True).cube(["red"]).sizes["time"] == 3
        for named in (own.where(has_bands=["nir", "red"]), own.subset(has_bands=["nir", "red"]),
                      own.where("has_bands", "==", "nir"), own.where(has_bands="nir")):  # fmt: skip
            assert sorted(named.to_table(["id"]).column(0).to_pylist()) == ["bad", "rgbn"]
            assert len(named) == 2
            assert len(named.head(1)) == 1
            assert named.cube(["red"]).sizes["time"] == 2
            assert sum(len(b) for b in named.to_batches(["id"])) == 2
            assert named.dataset.count_rows() == 2
        assert len(own.where(has_bands=["purple"])) == 0
        with pytest.raises(rd.PlanError, match="no record left"):
            own.where(has_bands=["purple"]).cube(["red"])
        with pytest.raises(rd.BandError, match="purple"):
            own.where(readable=True).cube(["purple"])
        with pytest.raises(rd.PlanError, match="has_bands"):
            own.where("has_bands", "!=", "nir").cube(["red"])
    with pytest.raises(rd.PlanError, match="no such column"):
        _ = c.chips(16, cell_km=0.16).filter(has_bands=["nir"]).table
