"""chips.why() says why a chip is as it is, and which step of the plan leaves none at a place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from made_records import collection, project, record
from pyproj import Transformer

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import Node
from rasteret_dask.show import losses
from rasteret_dask.show.why import Why

pytestmark = pytest.mark.filterwarnings(
    "ignore:only .* split cell:UserWarning", "ignore:split.buffer_m:UserWarning"
)

TO_DEGREES = Transformer.from_crs(32633, 4326, always_xy=True).transform
"""Of places of the made-up world."""

SIDE = 640.0


def places(bounds: tuple[float, float, float, float], margin: float) -> list[tuple[float, float]]:
    """Return the middles of chips of 640 m in cells of 1.28 km, in and around some bounds, on the map."""
    xmin, ymin, xmax, ymax = bounds
    x = np.arange(math.floor((xmin - margin) / SIDE), math.ceil((xmax + margin) / SIDE)) * SIDE + SIDE / 2
    y = np.arange(math.floor((ymin - margin) / SIDE), math.ceil((ymax + margin) / SIDE)) * SIDE + SIDE / 2
    return [(float(a), float(b)) for a in x for b in y]


def ground(chips: rd.Chips) -> Callable[[float, float], bool]:
    """Return whether some chip that a job would read holds a place: by the chip table, nothing else."""
    try:
        table = chips.table
    except PlanError:  # no chip at all
        return lambda x, y: False
    if chips.planned.split is not None:
        table = table.filter(pc.is_valid(table["split"]))
    xmin, ymin, xmax, ymax = (table[name].to_numpy() for name in ("xmin", "ymin", "xmax", "ymax"))
    return lambda x, y: bool(((xmin <= x) & (x < xmax) & (ymin < y) & (y <= ymax)).any())


JUNE_IN_THE_WEST = ("S2A_33UVR_20240608_0_L2A", "S2B_33UVR_20240623_0_L2A")

WORDS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("subset", lambda c: c.subset(date_range=("2024-04-01", "2024-06-30"))),
    ("subset", lambda c: c.filter(("eo:cloud_cover", "<", 40))),
    ("filter", lambda c: c.filter(("id", "not in", JUNE_IN_THE_WEST))),
    ("chips", lambda c: c.harmonize(["red"], time="1MS").chips(
        64, cell_km=1.28, aoi=shapely.box(14.96, 50.15, 15.05, 50.185), min_slots=2)),
    ("split", lambda c: c.split(0.3, 0.35, 0.35, seed=13, buffer_m=100.0)),
    ("filter", lambda c: c.filter(("ymin", ">", 5_557_000.0))),
    ("select", lambda c: c.select("train", "val")),
    ("sample", lambda c: c.sample(3, seed=2)),
)  # fmt: skip


def test_every_cell_has_a_chip_or_the_first_step_that_leaves_none(
    s2: rd.Collection, small_world: Any
) -> None:
    """The oracle carries the steps out one by one and looks into the chip table after each."""
    cut = dict(WORDS)["chips"]
    base: Any = rd.as_collection(s2.to_table(), name="s2")
    there = [ground(cut(base))]
    for _, step in WORDS[:3]:
        base = step(base)
        there.append(ground(cut(base)))
    for _, step in WORDS[3:]:
        base = step(base)
        there.append(ground(base))
    assert isinstance(base, rd.Chips)
    seen: Counter[str] = Counter()
    for x, y in places(small_world.bounds, 400.0):
        told = base.why(lon=TO_DEGREES(x, y)[0], lat=TO_DEGREES(x, y)[1])
        met = [holds(x, y) for holds in there]
        if met[-1]:
            assert told.step is None, told
            assert len(told.chips) == 1
            seen["chip"] += 1
            continue
        first = next((at for at, yes in enumerate(met) if not yes and at >= 4), len(met)) - 1
        if not met[4]:  # a step on records is to blame where a chip was there without it
            first = max((at for at, yes in enumerate(met[:4]) if yes), default=3)
        assert told.step is not None, (x, y, met)
        assert told.step.startswith(WORDS[first][0]), (x, y, met, told)
        assert told.chips == ()
        assert all(told.reasons), told
        seen[f"{first} {WORDS[first][0]}"] += 1
    assert {"chip", "3 chips", "4 split", "5 filter", "6 select", "7 sample"} <= set(seen), seen
    assert seen.keys() & {"0 subset", "1 subset", "2 filter"}, seen


# One world for each reason


WIDE = {"px": (400, 400)}
"""4 km: 6 x 6 chips of 640 m and more."""


def chips_of(*rows: dict[str, Any], **arguments: Any) -> rd.Chips:
    source = collection("s2", *rows).harmonize(["B04"], time="1MS")
    return source.chips(64, cell_km=1.28, **arguments)


def at(chips: rd.Chips, x: float, y: float) -> Why:
    lon, lat = TO_DEGREES(x, y)
    return chips.why(lon=lon, lat=lat)


MIDDLE = (502_000.0, 5_398_000.0)


def test_outside_of_the_footprints() -> None:
    told = at(chips_of(record("a")), 509_000.0, 5_398_000.0)
    (reason,) = told.reasons
    assert told.step is not None
    assert told.step.startswith("chips")
    assert "outside of the footprints of the only record of s2; the nearest, a, is " in reason
    far = float(reason.split("nearest, a, is ")[1].split(" m")[0].replace(",", ""))
    window = math.floor(509_000.0 / SIDE) * SIDE + SIDE / 2
    assert far == pytest.approx(window - 504_000.0, rel=0.01)  # from the window's middle to the raster's edge


def test_outside_of_the_area_of_interest() -> None:
    ground = project(shapely.box(500_000, 5_396_000, 501_000, 5_400_000), 32633, 4326)
    told = at(chips_of(record("a"), aoi=ground), *MIDDLE)
    assert told.reasons[0].startswith("outside of the area of interest (aoi=): ")
    assert "1,000 m" in told.reasons[0] or "999 m" in told.reasons[0], told


def test_coverage_below_min_coverage() -> None:
    x, y = 503_000.0, 5_398_000.0
    west = math.floor(x / SIDE) * SIDE
    ground = shapely.box(500_000, 5_396_000, west + 0.75 * SIDE, 5_400_000)
    told = at(chips_of(record("a", ground=ground)), x, y)
    assert "covered to 7" in told.reasons[0]
    assert told.reasons[0].endswith("at most by s2, in slot 2024-04; min_coverage asks for 100%")
    assert at(chips_of(record("a", ground=ground), min_coverage=0.7), x, y).step is None


def test_too_few_slots() -> None:
    rows = [record("a"), record("b", when="2024-05-10T10:00:00", west=501_900.0)]
    told = at(chips_of(*rows, min_slots=2), 500_900.0, 5_398_000.0)
    assert told.reasons == ("1 of 2 slots of s2 are covered; min_slots asks for 2",)
    assert at(chips_of(*rows, min_slots=2), 503_000.0, 5_398_000.0).step is None


def test_a_filter_that_leaves_no_record_there() -> None:
    rows = [record("a", cloud=10.0), record("far", cloud=1.0, west=540_000.0), record("b", cloud=50.0)]
    source = collection("s2", *rows).filter(("eo:cloud_cover", "<", 5), ("id", "!=", "x"))
    told = at(source.harmonize(["B04"], time="1MS").chips(64, cell_km=1.28), *MIDDLE)
    assert told.step == 'subset(cloud_cover_lt=5).filter(("id", "!=", "x")) of s2'
    assert told.reasons[:2] == ("eo:cloud_cover < 5 keeps 0 of 2", 'id != "x" keeps 2 of 2')
    assert told.table.to_pylist()[0]["left"] == 0


def test_a_filter_that_leaves_no_record_anywhere() -> None:
    source = collection("s2", record("a", cloud=10.0)).filter(("eo:cloud_cover", "<", 5))
    told = at(source.harmonize(["B04"], time="1MS").chips(64, cell_km=1.28), *MIDDLE)
    assert told.step == "subset(cloud_cover_lt=5) of s2"
    assert "no record of s2 is left anywhere, so the plan has no chip at all" in told.reasons


def test_a_sample_of_records() -> None:
    rows = [record("a"), record("b", west=540_000.0)]
    sampled = [collection("s2", *rows).sample(1, seed=seed) for seed in range(8)]
    kept = {c.to_table(["id"])["id"][0].as_py(): c for c in sampled}
    told = at(kept["b"].harmonize(["B04"], time="1MS").chips(64, cell_km=1.28), *MIDDLE)
    assert told.step is not None
    assert told.step.startswith("sample(")
    assert told.reasons[0].endswith("drew others")


def test_the_unused_strip_of_a_split_cell() -> None:
    chips = collection("s2", record("a")).harmonize(["B04"], time="1MS").chips(60, cell_km=1.28)
    cell = math.floor(502_000.0 / 1280.0) * 1280.0
    told = at(chips, cell + 1250.0, 5_398_000.0)
    assert "strip of 80 m of split cell 33/" in told.reasons[0]
    apart = collection("s2", record("a")).harmonize(["B04"], time="1MS").chips(32, 64, cell_km=1.28)
    told = at(apart, cell + 500.0, 5_398_000.0)
    assert "between two windows of split cell" in told.reasons[0]


def test_a_split_s_boundary_and_buffer() -> None:
    points = geopandas.GeoDataFrame(
        geometry=[shapely.Point(*TO_DEGREES(500_100.0 + 320.0 * n, 5_398_000.0)) for n in range(12)], crs=4326
    )
    chips = collection("s2", record("a")).harmonize(["B04"], time="1MS").chips(64, at=points, cell_km=1.28)
    split = chips.split(0.5, 0.25, 0.25, seed=1)
    lost = [r for r in split.table.to_pylist() if r["split"] is None]
    assert lost
    told = split.why(lost[0]["chip_id"])
    assert told.step == "split"
    assert (
        len([r for r in told.reasons if "its hash with seed 1 is" in r]) >= 2
    )  # of two cells, of two splits
    laid = chips_of(record("a")).split(0.5, 0.25, 0.25, seed=3, buffer_m=200.0)
    gone = [r for r in laid.table.to_pylist() if r["split"] is None]
    assert gone
    told = at(laid, (gone[0]["xmin"] + gone[0]["xmax"]) / 2, (gone[0]["ymin"] + gone[0]["ymax"]) / 2)
    assert told.step is not None
    assert told.step.startswith("split(")
    train = [r for r in laid.table.to_pylist() if r["split"] == "train"]
    near = min(
        math.hypot(
            max(0.0, r["xmin"] - gone[0]["xmax"], gone[0]["xmin"] - r["xmax"]),
            max(0.0, r["ymin"] - gone[0]["ymax"], gone[0]["ymin"] - r["ymax"]),
        )
        for r in train
    )
    assert told.reasons[0].startswith("nearer than 200 m (buffer_m) to train: 33_")
    assert told.reasons[0].endswith(f"is {near:,.0f} m away")


def test_steps_that_choose_chips() -> None:
    chips = chips_of(record("a")).split(0.5, 0.25, 0.25, seed=3)
    rows = chips.table.to_pylist()
    val = next(r for r in rows if r["split"] == "val")
    middle = (val["xmin"] + 320.0, val["ymin"] + 320.0)
    assert at(chips.select("train"), *middle).reasons == ("its split is val, and select keeps train",)
    told = at(chips.filter(("xmin", ">", val["xmin"])), *middle)
    assert told.reasons == (f"xmin is {val['xmin']}, and filter asks for xmin > {val['xmin']}",)
    without = chips.table.filter(pa.array([r["chip_id"] != val["chip_id"] for r in rows]))
    assert at(chips.with_table(without), *middle).reasons == (
        "it is not in the table that with_table was given",
    )
    few = chips.sample(2, seed=1)
    lost = next(r for r in rows if r["chip_id"] not in few.table["chip_id"].to_pylist())
    assert "by the hash of its id, and the sample takes 2" in few.why(lost["chip_id"]).reasons[0]
    assert few.why(lost["chip_id"]).step == "sample(2, seed=1)"
    column = chips.with_table(
        chips.table.append_column("mine", pa.array(["train"] + ["none"] * (len(rows) - 1)))
    )
    told = column.split(by="mine", train=["train"], val=[]).why(
        lon=TO_DEGREES(*middle)[0], lat=TO_DEGREES(*middle)[1]
    )
    assert told.reasons == ("column mine is 'none', of none of the splits train, val",)


def test_places_between_zones() -> None:
    """Along the meridian between zones 32 and 33 every place has a chip, or it is said that its cell is the other's."""
    west = record("w", epsg=32632, west=930_000.0, north=5_404_000.0, px=(2000, 1000))
    chips = collection("s2", west).harmonize(["B04"], time="1MS").chips(64, cell_km=1.28)
    x, y = Transformer.from_crs(4326, 32632, always_xy=True).transform(12.0, 48.7)
    wide = record("w", epsg=32632, west=x - 5_000.0, north=y + 5_000.0, px=(1000, 1000))
    chips = collection("s2", wide).harmonize(["B04"], time="1MS").chips(64, cell_km=1.28)
    reasons = set()
    for lon in np.linspace(11.985, 12.015, 40):
        told = chips.why(lon=float(lon), lat=48.7)
        reasons |= {"chip"} if told.step is None else {told.reasons[0].split(":")[0]}
    assert "chip" in reasons
    assert reasons - {"chip"} <= {
        "the place lies at the edge of zone 32",
        "the place lies at the edge of zone 33",
    }


def test_other_grids() -> None:
    from odc.geo.geobox import GeoBox

    box = GeoBox.from_bbox((500_000, 5_396_000, 503_000, 5_399_000), "EPSG:32633", resolution=10)
    source = collection("s2", record("a")).harmonize(["B04"], time="1MS")
    chips = source.chips(64, grid=box)
    assert at(chips, 501_000.0, 5_398_000.0).step is None
    assert "outside of the GeoBox" in at(chips, 503_500.0, 5_398_000.0).reasons[0]
    assert "right or below of the last chip" in at(chips, 502_900.0, 5_398_000.0).reasons[0]
    tiles = source.chips(64, grid="tiles")
    assert at(tiles, 501_000.0, 5_398_000.0).step is None
    assert "no tile" in at(tiles, 520_000.0, 5_398_000.0).reasons[0]
    far = source.chips(64, grid="EPSG:3035").why(lon=-80.0, lat=0.0)
    assert far.reasons == ("the place is not on the ground of EPSG:3035",)
    points = geopandas.GeoDataFrame(geometry=[shapely.Point(*TO_DEGREES(*MIDDLE))], crs=4326)
    placed = source.chips(64, at=points)
    assert at(placed, *MIDDLE).step is None
    assert (
        at(placed, 503_000.0, 5_398_000.0)
        .reasons[0]
        .endswith("row 0 of its table is the nearest, 1,000 m away")
    )


# A chip


def test_a_chip_tells_each_record_s_own_pixels(s2: rd.Collection) -> None:
    """The oracle is the collection with that one record, and the quality band itself."""
    chips = (
        s2.harmonize(["red", "nir"], mask="clouds", time="1MS", fill=True)
        .chips(32, cell_km=0.96)
        .split(seed=1)
    )
    rows = chips.table.to_pylist()
    checked = 0
    for row in (rows[2], rows[100]):
        told = chips.why(row["chip_id"])
        assert told.step is None
        assert told.chips == (row["chip_id"],)
        fed = {(f["slot"], f["record"]) for f in row["feeds"]}
        used = [r for r in told.table.to_pylist() if r["role"] in ("picked", "fills")]
        assert {(r["slot"], r["record"]) for r in used} == fed
        for entry in told.table.to_pylist():
            one = s2.filter(id=entry["record"]).harmonize(["red", "nir"], mask="clouds", time="1MS")
            raw = s2.filter(id=entry["record"]).harmonize(["SCL"], units="raw", resolution=10, time="1MS")
            quality = raw.chips(32, cell_km=0.96, min_coverage=0.0).filter(chip_id=row["chip_id"]).load()
            alone = one.chips(32, cell_km=0.96, min_coverage=0.0)
            place = alone.table["chip_id"].to_pylist().index(row["chip_id"])
            made = alone.filter(chip_id=row["chip_id"]).load()
            assert alone.table["coverage"][place].as_py() == pytest.approx(entry["coverage"], abs=1e-6)
            assert entry["valid"] == pytest.approx(
                float(np.asarray(made["valid_fraction"])[0, entry["slot"]]), abs=1e-6
            )
            scl = np.asarray(quality["pixels"])[0, entry["slot"], 0]
            seen = scl != 0
            cloudy = np.isin(scl, (3, 8, 9, 10)) & seen
            assert entry["cloudy"] == pytest.approx(cloudy.sum() / max(seen.sum(), 1), abs=0.002)
            checked += 1
    assert checked >= 4


def test_who_won_and_why() -> None:
    rows = [
        record("a", when="2024-04-03T10:00:00", cloud=1.0),
        record("b", when="2024-04-14T10:00:00", cloud=9.0),
        record("c", when="2024-04-28T10:00:00", cloud=5.0),
    ]
    source = collection("s2", *rows)
    said = {}
    for word in ("closest", "first", "last", "least_cloudy"):
        chips = source.harmonize(["B04"], time="1MS", pick=word).chips(64, cell_km=1.28)
        planned = chips.planned
        from rasteret_dask.show import contenders

        frame = contenders._frame(planned.table.slice(0, 1))
        used = {(0, 0, 0): 0}
        entries = contenders._entries(planned, 0, frame, used)
        lead = contenders._lead(planned.sources[0], entries, np.datetime64("NaT"))
        assert [planned.sources[0].records.ids[e.record] for e in lead] == [
            chips.table["feeds"][0][0]["record"].as_py()
        ]
        said[word] = contenders._reason(planned.sources[0], entries, lead, {}, planned)
    assert said == {
        "closest": "1.6 days from the slot's middle, and the next 12.4",
        "first": "the earliest, and the next is of 2024-04-14",
        "last": "the latest, and the next is of 2024-04-14",
        "least_cloudy": "its scene has 1% clouds, that of the next 5% clouds",
    }


def test_other_picks_and_sources(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> None:
    scored = s2.harmonize(["red"], time="1MS", pick="clearest", mask="clouds").chips(32, cell_km=0.96)
    told = scored.why(scored.table["chip_id"][40].as_py())
    assert any("clearest: " in line for line in told.reasons)
    for slot in {r["slot"] for r in told.table.to_pylist()}:
        there = [r for r in told.table.to_pylist() if r["slot"] == slot]
        picked = [r for r in there if r["role"] == "picked"]
        assert len(picked) >= 1
        assert max(r["valid"] for r in there) == pytest.approx(max(r["valid"] for r in picked), abs=1e-6)
    median = s2.harmonize(["red"], time="1MS", pick="median").chips(32, cell_km=0.96)
    told = median.why(median.table["chip_id"][40].as_py())
    assert set(told.table["role"].to_pylist()) == {"composed"}
    single = rd.join(s2=s2.harmonize(["red"]), aef=aef).chips(32, cell_km=0.96)
    told = single.why(single.table["chip_id"][3].as_py())
    assert set(told.table["source"].to_pylist()) == {"s2", "aef"}
    assert [r["cloudy"] is None for r in told.table.to_pylist()] == [
        r["source"] == "aef" for r in told.table.to_pylist()
    ]
    both = rd.merge(s2, l8).harmonize(["red"], resolution=10, time="1MS", fill=True).chips(32, cell_km=0.96)
    assert both.why(both.table["chip_id"][30].as_py()).step is None


def test_a_chip_that_filter_pixels_drops(s2: rd.Collection) -> None:
    chips = (
        s2.harmonize(["red"], mask="clouds", time="1MS").chips(32, cell_km=0.96).filter_pixels(min_valid=0.9)
    )
    kept = set(np.asarray(chips.load()["chip_id"]).tolist())
    ids = chips.table["chip_id"].to_pylist()
    lost = next(i for i in ids if i not in kept)
    told = chips.why(lost)
    assert told.step == "filter_pixels"
    assert told.reasons[0].startswith("filter_pixels drops it: valid ")
    assert chips.why(next(iter(sorted(kept)))).reasons[0] == "filter_pixels keeps it"
    row = chips.table.to_pylist()[ids.index(lost)]
    lon, lat = TO_DEGREES((row["xmin"] + row["xmax"]) / 2, (row["ymin"] + row["ymax"]) / 2)
    place = chips.why(lon=lon, lat=lat)
    assert place.chips == (lost,)
    assert any("why(chip_id) reads them" in line for line in place.reasons)


def test_nothing_is_read_for_a_place(s2: rd.Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    from rasteret_dask.reader import engine

    chips = s2.harmonize(["red"], mask="clouds", time="1MS").chips(32, cell_km=0.96)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(engine.Session, "read_block", refuse)
    monkeypatch.setattr(engine.Session, "read_into", refuse)
    assert chips.why(lon=15.0, lat=50.17).step is None
    assert chips.why(lon=16.0, lat=50.17).step is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "a chip's id, or lon= and lat="),
        ({"lon": 15.0}, "a chip's id, or lon= and lat="),
        ({"chip_id": "x", "lon": 15.0, "lat": 50.0}, "a chip's id, or lon= and lat="),
        ({"lon": 15.0, "lat": 95.0}, "degrees"),
        ({"lon": "15", "lat": 50.0}, "degrees"),
        ({"chip_id": "33_1.28km_64px_10m_-8435_78"}, "such as '33_"),
    ],
)
def test_what_cannot_be_asked(arguments: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        chips_of(record("a")).why(**arguments)


def test_the_text_and_the_card(s2: rd.Collection) -> None:
    chips = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96)
    told = chips.why(lon=16.0, lat=50.17)
    lines = str(told).splitlines()
    assert lines[0] == "place 16, 50.17: no chip"
    assert lines[1].startswith("  left out by chips(")
    assert repr(told) == str(told)
    page = told._repr_html_()
    assert "<script" not in page
    assert "left out by" in page
    chip = chips.why(chips.table["chip_id"][0].as_py())
    assert "picked" in chip._repr_html_()
    assert str(chip).splitlines()[0] == f"chip {chip.chips[0]}"


def test_a_stage_is_planned_once() -> None:
    """Steps that look at all chips ask for the chips behind them, and no others."""
    chips = chips_of(record("a")).split(0.5, 0.25, 0.25, seed=3).sample(2, seed=1)
    asked: list[Node] = []

    def staged(plan: Node) -> Any:
        asked.append(plan)
        return chips._staged(plan)

    tracer = losses.Tracer(chips.query, staged)
    tracer.place(*TO_DEGREES(*MIDDLE))
    assert [type(node).__name__ for node in asked] in (["Sample"], ["Sample", "Split"])
