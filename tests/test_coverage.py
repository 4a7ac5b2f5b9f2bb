"""Coverage against shapely: the union of footprints cut with rasters, one pixel of tolerance, in the raster's CRS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import boxes, collection, fed_by, project, record, table

import rasteret_dask as rd
from rasteret_dask.chipping.coverage import Windows, cover, outlines, union_cover
from rasteret_dask.table.records import Records

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

WEST, NORTH = 500_000.0, 5_400_000.0


def outline_of(row: dict[str, Any]) -> Any:
    """Cut the footprint with the raster's rectangle and let it grow by a pixel: what the definition says."""
    a, _, c, _, e, f = row["headers_metadata"][0][1][0]["transform"]
    size = row["headers_metadata"][0][1][0]
    raster = shapely.box(c, f + e * size["height"], c + a * size["width"], f)
    ground = project(shapely.from_wkb(row["geometry"]), 4326, row["proj:epsg"])
    grown = shapely.intersection(raster, ground).buffer(a, join_style="mitre")
    south = row["proj:epsg"] > 32700
    return shapely.transform(grown, lambda p: p - np.array([0, 1e7])) if south else grown


def raster_of(row: dict[str, Any]) -> Any:
    """Return the raster's own rectangle, in northern coordinates."""
    size = row["headers_metadata"][0][1][0]
    a, _, c, _, e, f = size["transform"]
    f -= 1e7 * (row["proj:epsg"] > 32700)
    return shapely.box(c, f + e * size["height"], c + a * size["width"], f)


def swath(cut: float) -> shapely.Polygon:
    """A footprint that ends inside its raster, along a slanted line."""
    return shapely.Polygon(
        [(WEST, NORTH), (WEST + cut, NORTH), (WEST + cut - 900, NORTH - 4000), (WEST, NORTH - 4000)]
    )


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1000, 4900),
    st.floats(-500, 4500),
    st.floats(-500, 4500),
    st.sampled_from([32633, 32632]),
    st.booleans(),
)
def test_shares_are_those_of_shapely(cut: float, x: float, y: float, epsg: int, two: bool) -> None:
    rows = [
        record("a", ground=swath(cut)),
        record("b", west=WEST + 2000, ground=shapely.box(*[0, 0, 1e6, 1e7])),
    ]
    rows = rows if two else rows[:1]
    records = Records(table(*rows))
    found = outlines(records, np.array(["B04"] * len(rows)))
    corner = project(shapely.Point(WEST + x, NORTH - y), 32633, epsg)
    box = np.array([[corner.x, corner.y - 640, corner.x + 640, corner.y]])
    windows = Windows(epsg, box)
    chip = project(shapely.box(*box[0]), epsg, 32633)  # compared in the raster's own CRS
    expected = [
        shapely.intersection(outline_of(r), chip).area / chip.area
        if shapely.box(*chip.bounds).intersection(raster_of(r)).area > 0  # beyond, there is nothing to read
        else 0.0
        for r in rows
    ]
    got = cover(windows, found, {n: np.array([0]) for n in range(len(found.shape))})
    shares = np.zeros(len(rows))
    shares[got.outline] = got.share
    np.testing.assert_allclose(shares, expected, atol=1e-9)
    together = shapely.union_all([outline_of(r) for r in rows]).intersection(chip).area / chip.area
    numbers = np.arange(len(rows))[None]
    assert union_cover(windows, found, np.array([0]), numbers) == pytest.approx([together], abs=1e-9)


def test_records_of_one_footprint_and_raster_share_an_outline() -> None:
    records = Records(table(record("a"), record("b"), record("c", west=WEST + 10)))
    found = outlines(records, np.array(["B04"] * 3))
    assert found.of_record.tolist() == [0, 0, 1]
    assert len(found.shape) == 2


def test_a_rotated_raster_is_refused() -> None:
    row = record("a")
    row["headers_metadata"][0][1][0]["transform"] = [10.0, 1.0, WEST, 1.0, -10.0, NORTH]
    with pytest.raises(rd.GridError, match=r"'a'.*rotated"):
        outlines(Records(table(row)), np.array(["B04"]))


def test_a_south_up_raster_covers_the_same() -> None:
    up = record("a")
    for _, levels in up["headers_metadata"]:
        levels[0]["transform"] = [10.0, 0.0, WEST, 0.0, 10.0, NORTH - 4000.0]
    down = collection("s2", record("a")).chips(32, cell_km=1.28)
    assert collection("s2", up).chips(32, cell_km=1.28).table.equals(down.table)


def covered_cells(chips: rd.Chips) -> set[tuple[int, int]]:
    t = chips.table
    return set(zip(t.column("row").to_pylist(), t.column("col").to_pylist(), strict=True))


@pytest.mark.parametrize("min_coverage", [1.0, 0.5, 0.01, 0.0])
def test_chips_are_the_cells_that_the_union_of_a_slot_covers(min_coverage: float) -> None:
    """Two tiles of one pass, both cut by a swath edge; neither alone covers the seam between them."""
    pass_: dict[str, Any] = {"datatake": "d1"}
    rows = [
        record("a", tile="1", px=(230, 400), **pass_),
        record("b", tile="2", west=WEST + 2290, px=(300, 400), ground=swath(4500), **pass_),
    ]
    union = shapely.union_all([outline_of(r) for r in rows])
    chips = collection("s2", *rows).chips(32, cell_km=1.28, min_coverage=min_coverage)
    everywhere = collection("s2", record("x", west=WEST - 9000, north=NORTH + 9000, px=(3000, 3000)))
    cells = everywhere.chips(32, cell_km=1.28)
    share = shapely.area(shapely.intersection(boxes(cells), union)) / shapely.area(boxes(cells))
    wanted = share >= min_coverage - 1e-9 if min_coverage else share > 1e-12
    rasters = shapely.union_all([raster_of(r) for r in rows])
    wanted &= shapely.area(shapely.intersection(boxes(cells), rasters)) > 0  # there must be something to read
    t = cells.table
    rowcol = list(zip(t.column("row").to_pylist(), t.column("col").to_pylist(), strict=True))
    assert covered_cells(chips) == {c for c, w in zip(rowcol, wanted, strict=True) if w}
    own = dict(zip(rowcol, share, strict=True))
    for r in chips.table.to_pylist():
        assert r["coverage"] == pytest.approx(own[r["row"], r["col"]], abs=1e-6)
    if min_coverage == 1.0:
        both = [f for f in fed_by(chips) if len(next(iter(f.values()))) == 2]
        assert both  # chips that only the two together cover


def test_one_pixel_is_forgiven_and_two_are_not() -> None:
    for missing, kept in ((9.9, True), (10.1, False)):
        cut = shapely.box(499_200.0, NORTH - 4000, 503_040.0 - missing, NORTH)
        chips = collection("s2", record("a", west=499_200.0, north=5_400_960.0, ground=cut)).chips(
            32, cell_km=1.28
        )
        east = max(chips.table.column("xmax").to_pylist())
        assert (east == 503_040.0) == kept


def test_a_slot_is_covered_by_several_acquisitions_together() -> None:
    rows = [
        record("a", px=(230, 400), datatake="1", when="2024-04-02T10:00:00"),
        record("b", west=WEST + 2290, px=(300, 400), datatake="2", when="2024-04-20T10:00:00"),
    ]
    own = collection("s2", *rows)
    apart = covered_cells(own.chips(32, cell_km=1.28))
    together = covered_cells(own.harmonize(["red"], time="1MS").chips(32, cell_km=1.28))
    weekly = covered_cells(own.harmonize(["red"], time="7D").chips(32, cell_km=1.28))
    assert apart == weekly < together


def test_records_of_a_neighbouring_zone_are_compared_in_their_own() -> None:
    """The same ground at 12 E in zones 32 and 33: chips belong to the zone of their centre, whoever feeds them."""
    here = project(shapely.Point(12.0, 48.0), 4326, 32633)
    there = project(shapely.Point(12.0, 48.0), 4326, 32632)
    rows = [
        record("z33", west=round(here.x, -2) - 3000, north=round(here.y, -2) + 3000, px=(600, 600)),
        record(
            "z32", epsg=32632, west=round(there.x, -2) - 3000, north=round(there.y, -2) + 3000, px=(600, 600)
        ),
    ]
    outline = {r["id"]: outline_of(r) for r in rows}
    epsg = {r["id"]: r["proj:epsg"] for r in rows}
    for r in rows:
        chips = collection("s2", r).chips(32, cell_km=1.28)
        assert set(chips.table.column("epsg").to_pylist()) == {32632, 32633}
        for row, shape in zip(chips.table.to_pylist(), boxes(chips), strict=True):
            moved = project(shape, row["epsg"], epsg[r["id"]])
            assert shapely.intersection(outline[r["id"]], moved).area / moved.area > 1 - 1e-6
            lon = project(shape.centroid, row["epsg"], 4326).x
            assert (lon >= 12) == (row["epsg"] == 32633)


def test_collections_may_span_the_globe() -> None:
    places = {
        "alps": (32633, 500_000.0, 5_400_000.0),
        "oregon": (32610, 500_000.0, 4_900_000.0),
        "minas": (32723, 600_000.0, 7_770_000.0),
        "fiji": (32701, 200_000.0, 8_000_000.0),
    }
    rows = [record(n, epsg=epsg, west=west, north=north) for n, (epsg, west, north) in places.items()]
    whole = collection("s2", *rows).chips(32, cell_km=1.28)
    parts = [collection("s2", row).chips(32, cell_km=1.28) for row in rows]
    assert len(whole) == sum(map(len, parts))
    assert covered_cells(whole) == set().union(*map(covered_cells, parts))
    audit = whole.split(0.5, 0.25, 0.25, seed=1, buffer_m=500).audit()
    assert audit.ok
    assert all(d >= 500 for pair, d in audit.distance_m.items() if "train" in pair)


def test_a_raster_in_degrees_feeds_chips_of_every_zone() -> None:
    degrees = record(
        "lc", epsg=4326, west=10.0, north=49.0, px=(400, 100), pixel=0.01, bands=("data",), tile_px=100
    )
    both = rd.join(
        s2=collection("s2", record("a"), record("b", epsg=32632, west=600_000.0)),
        lc=collection("lc", degrees).harmonize(["data"], resolution=10),
    )
    chips = both.chips(32, cell_km=1.28)
    assert set(chips.table.column("epsg").to_pylist()) <= {32632, 32633}
    inside = shapely.box(10, 48, 14, 49)
    for wkb in chips.table.column("geometry").to_pylist():
        assert shapely.from_wkb(wkb).within(inside.buffer(0.01))
