"""The same ground, the same split: conservation, ratios, zone boundaries, buffers, and the other ways to split."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import boxes, collection, ids, project, record

import rasteret_dask as rd
from rasteret_dask.chipping.ground import by_ground
from rasteret_dask.chipping.splits import SplitCells, choose, split_of_cells
from rasteret_dask.planning.plan import Source, Split, SplitSpec, digest, from_json, to_json
from rasteret_dask.zones import UTM

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

CELLS: dict[str, Any] = {"cell_km": 1.28}
RATIOS = (("train", 0.7), ("val", 0.15), ("test", 0.15))


def splits(chips: rd.Chips) -> dict[str, str | None]:
    """Return {id without acquisition: split}."""
    t = chips.table
    cut = [i.rsplit("_", 1)[0] if chips.planned.sources[0].axis is None else i for i in ids(chips)]
    return dict(zip(cut, t.column("split").to_pylist(), strict=True))


def large(name: str = "s2", **more: Any) -> dict[str, Any]:
    return record(name, px=(2000, 2000), **more)


def test_the_rule_is_what_the_documentation_says() -> None:
    """An independent reader: sha256 of seed, zone, row and column, as a fraction, against cumulative ratios."""
    chips = collection("s2", large()).chips(32, **CELLS).split(seed=42)
    for row in chips.table.to_pylist():
        zone, r, c = row["cell"].split("/")
        digest = hashlib.sha256(f"ground|42|{zone}|{r}|{c}".encode()).digest()
        unit = int.from_bytes(digest[:8], "big") / 2**64
        assert row["split"] == ("train" if unit < 0.7 else "val" if unit < 0.85 else "test")


def test_the_same_ground_is_the_same_split_whatever_feeds_it() -> None:
    base = splits(collection("s2", large()).chips(32, **CELLS).split(seed=1))
    rows = [large("a", when="2023-01-01T00:00:00"), large("b", platform="x"), large("c", west=490_000.0)]
    random.Random(0).shuffle(rows)
    many = splits(collection("other", *rows).chips(32, **CELLS).split(seed=1))
    assert set(base) < set(many)
    assert all(many[i] == s for i, s in base.items())
    timed = collection("s2", *rows).harmonize(["red"], time="1MS").chips(32, **CELLS).split(seed=1)
    assert base.items() <= splits(timed).items()
    l8 = collection("l8", large("l8", pixel=30.0, bands=("B4", "B5")))
    joined = rd.join(s2=collection("s2", large()), l8=l8).chips(48, cell_km=1.44).split(seed=1)
    alone = l8.chips(16, cell_km=1.44).split(seed=1)
    cells = [{r["cell"]: r["split"] for r in c.table.to_pylist()} for c in (joined, alone)]
    assert all(cells[1][k] == v for k, v in cells[0].items())


def test_sizes_and_strides_do_not_move_the_ground() -> None:
    own = collection("s2", record("a", px=(1000, 1000)))
    cells: dict[str, str] = {}
    for size, stride in ((32, None), (16, 8), (128, None), (48, 20)):
        chips = own.chips(size, stride, **CELLS).split(seed=1)
        for row in chips.table.to_pylist():
            assert cells.setdefault(row["cell"], row["split"]) == row["split"]


def test_another_seed_deals_anew() -> None:
    own = collection("s2", large()).chips(128, **CELLS)
    first, again, other = (splits(own.split(seed=s)) for s in (1, 1, 2))
    assert first == again
    changed = np.mean([first[i] != other[i] for i in first])
    assert 0.2 < changed < 0.8


def test_ratios_hold_over_many_cells() -> None:
    cells = np.stack(np.meshgrid(np.arange(200), np.arange(200), indexing="ij"), -1).reshape(-1, 2)
    for ratios in (RATIOS, (("train", 0.5), ("val", 0.5), ("test", 0.0)), (("train", 1.0),)):
        number = split_of_cells("33", cells, SplitSpec(ratios, 7))
        for i, (_, share) in enumerate(ratios):
            sigma = np.sqrt(share * (1 - share) / len(cells))
            assert abs(np.mean(number == i) - share) <= 4 * sigma
    zones = [split_of_cells(z, cells, SplitSpec(RATIOS, 7)) for z in ("32", "33")]
    assert 0.3 < np.mean(zones[0] != zones[1]) < 0.6


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30))
def test_shares_are_cumulative(unit: list[float]) -> None:
    number = choose(np.array(unit), SplitSpec(RATIOS))
    assert number.tolist() == [0 if u < 0.7 else 1 if u < 0.85 else 2 for u in unit]


# The boundary of two zones


def at_12_east(lat: float, px: int = 1400, pixel: float = 10.0) -> list[dict[str, Any]]:
    """The same ground from zones 32 and 33, with the meridian through its middle; Landsat's odd origins."""
    rows = []
    for epsg in (32632, 32633):
        place = project(shapely.Point(12.0, lat), 4326, epsg)
        half = px * pixel / 2
        west, north = np.floor((place.x - half) / pixel) * pixel, np.ceil((place.y + half) / pixel) * pixel
        rows.append(
            record(
                f"z{epsg}",
                epsg=epsg,
                west=west + pixel / 2,
                north=north + pixel / 2,
                px=(px, px),
                pixel=pixel,
            )
        )
    return rows


@pytest.mark.parametrize(
    ("lat", "pixel", "stride"), [(48.0, 10.0, None), (67.0, 30.0, None), (5.0, 10.0, 20), (48.0, 30.0, 7)]
)
def test_no_ground_is_shared_across_the_zone_boundary(lat: float, pixel: float, stride: int | None) -> None:
    own = collection("s2", *at_12_east(lat, round(14_000 / pixel), pixel))
    chips = own.chips(round(960 / pixel), stride, cell_km=1.92).split(0.4, 0.3, 0.3, seed=3)
    lost = chips.planned.dropped["chip on the ground of two splits"]
    said = chips.table.column("split").to_pylist()
    assert said.count(None) == lost > 0
    assert chips.audit().overlaps == {"train-val": 0, "train-test": 0, "val-test": 0}
    epsg = chips.table.column("epsg").to_numpy()
    shapes = boxes(chips)
    one_crs = np.array([project(s, int(e), 32633) for s, e in zip(shapes, epsg, strict=True)])
    label = np.array([s or "" for s in said])
    a, b = shapely.STRtree(one_crs).query(one_crs, predicate="intersects")
    apart = (label[a] != label[b]) & (label[a] != "") & (label[b] != "") & (a < b)
    # Chips of one zone touch; projected edges bend by millimetres.
    shared = shapely.area(shapely.intersection(one_crs[a[apart]], one_crs[b[apart]]))
    assert shared.max(initial=0.0) < 0.5
    # Without the rule they do overlap: the test would notice.
    careless = own.chips(round(960 / pixel), stride, cell_km=1.92).split(
        0.4, 0.3, 0.3, seed=3, boundary="centre"
    )
    assert not careless.audit().ok
    kept = {i: s for i, s in splits(careless).items() if splits(chips)[i] is not None}
    assert kept.items() <= splits(chips).items()


@pytest.mark.parametrize(
    ("lat", "zone", "seed"),
    [(-62.54, 57, 1), (-57.35, 46, 0), (-53.32, 58, 0), (-51.07, 45, 5), (37.55, 18, 3)],
)
def test_chips_that_stick_out_of_their_cells_keep_apart_too(lat: float, zone: int, seed: int) -> None:
    """Chips moved by half a 60 m pixel leave their split cell; here a chip of the next zone touches only that strip."""
    rows = []
    for epsg in (32600 + zone, 32601 + zone):
        place = project(shapely.Point(6.0 * zone - 180.0, lat), 4326, epsg)
        west, north = (60.0 * np.round(v / 60.0) + 30.0 for v in (place.x - 6000, place.y + 6000))
        rows.append(record(f"z{epsg}", epsg=epsg, west=west, north=north, px=(200, 200), pixel=60.0))
    chips = collection("s2", *rows).chips(32, cell_km=1.92).split(0.5, 0.5, 0.0, seed=seed)
    assert len(set(chips.table.column("epsg").to_pylist())) == 2
    assert chips.audit().overlaps == {"train-val": 0}


@settings(max_examples=15, deadline=None)
@given(st.floats(-70, 78), st.sampled_from([10.0, 30.0]), st.integers(0, 5), st.integers(2, 59))
def test_chips_of_any_zone_boundary_keep_apart(lat: float, pixel: float, seed: int, zone: int) -> None:
    """Planned without records: all chips of both lattices near the meridian, each moved by its own phase."""
    from rasteret_dask.grid import Lattice, snap, transformer, utm_zone

    meridian = 6.0 * zone - 180.0
    epsg, bounds, inside = [], [], []
    for z, phase in ((zone, 0.0), (zone + 1, pixel / 2)):
        x, y = transformer(4326, 32600 + z).transform(meridian, lat)
        lattice = Lattice(1920.0, 32 * pixel, 32 * pixel)
        cells = lattice.chip_cells(lattice.split_cells((x - 3000, y - 3000, x + 3000, y + 3000)))
        box = lattice.bounds(cells)
        lon, la = transformer(32600 + z, 4326).transform(box[:, [0, 2]].mean(1), box[:, [1, 3]].mean(1))
        mine = utm_zone(lon, la) == z
        bounds.append(snap(box[mine], (phase, phase), pixel))
        inside.append(lattice.split_cell_of(cells[mine]))
        epsg.append(np.full(int(mine.sum()), 32600 + z))
    code, box, cell = np.concatenate(epsg), np.concatenate(bounds), np.concatenate(inside)
    spec = SplitSpec((("train", 0.5), ("val", 0.5)), seed)
    wider = np.array([-1, -1, 1, 1]) * 1.5 * pixel
    number = by_ground(code, box + wider, SplitCells(UTM, 1920.0), spec, cell)
    left, right = (code == 32600 + zone) & (number >= 0), (code == 32601 + zone) & (number >= 0)
    if not left.any() or not right.any():
        return
    one = shapely.box(*box[left].T)
    two = np.array([project(shapely.box(*b), 32601 + zone, 32600 + zone) for b in box[right]])
    a, b = shapely.STRtree(two).query(one, predicate="intersects")
    differ = number[left][a] != number[right][b]
    assert shapely.area(shapely.intersection(one[a[differ]], two[b[differ]])).max(initial=0.0) < 0.5


# Buffers


def test_a_buffer_keeps_val_and_test_away_from_train() -> None:
    own = collection("s2", *at_12_east(48.0, 800)).chips(32, **CELLS)
    plain = splits(own.split(0.3, 0.35, 0.35, seed=1))
    for metres in (100.0, 700.0):
        chips = own.split(0.3, 0.35, 0.35, seed=1, buffer_m=metres)
        found = splits(chips)
        here = np.array(
            [
                project(s, int(e), 32633)
                for s, e in zip(boxes(chips), chips.table["epsg"].to_pylist(), strict=True)
            ]
        )
        train = shapely.union_all(here[[s == "train" for s in plain.values()]])
        distance = dict(zip(plain, shapely.distance(here, train), strict=True))
        for chip, was in plain.items():
            if was in ("train", None):
                assert found[chip] == was
            elif abs(distance[chip] - metres) > 1.0:  # scales of two zones differ by less than that
                assert found[chip] == (was if distance[chip] > metres else None)
        lost = sum(plain[c] is not None and found[c] is None for c in plain)
        assert chips.audit().lost[f"val or test chip nearer than {metres:g} m to train"] == lost
        assert min(chips.audit().distance_m[p] for p in ("train-val", "train-test")) >= metres


# Windows at points


def windows(**more: Any) -> tuple[rd.Chips, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    xy = rng.uniform((500_500, 5_380_500), (519_500, 5_399_500), (300, 2))
    places = geopandas.GeoDataFrame({"n": range(300)}, geometry=shapely.points(xy), crs=32633)
    return collection("s2", large()).chips(32, at=places, cell_km=2.56).split(
        0.5, 0.25, 0.25, seed=5, **more
    ), xy


def test_windows_on_two_splits_belong_to_none() -> None:
    chips, _ = windows()
    for row in chips.table.to_pylist():
        touched = set()
        for r in range(int(-row["ymax"] // 2560), int(-row["ymin"] // 2560) + 1):
            for c in range(int(row["xmin"] // 2560), int(row["xmax"] // 2560) + 1):
                inside = row["xmax"] > c * 2560 and -row["ymin"] > r * 2560
                if inside:
                    touched.add(
                        int(
                            split_of_cells(
                                "33",
                                np.array([[r, c]]),
                                SplitSpec((("train", 0.5), ("val", 0.25), ("test", 0.25)), 5),
                            )[0]
                        )
                    )
        expected = ("train", "val", "test")[touched.pop()] if len(touched) == 1 else None
        assert row["split"] == expected
    assert chips.audit().ok
    assert chips.audit().lost["chip on the ground of two splits"] == chips.table["split"].null_count > 0


def test_windows_may_be_split_by_their_centre() -> None:
    chips, _ = windows(boundary="centre")
    spec = SplitSpec((("train", 0.5), ("val", 0.25), ("test", 0.25)), 5)
    for row in chips.table.to_pylist():
        x, y = (row["xmin"] + row["xmax"]) / 2, (row["ymin"] + row["ymax"]) / 2
        cell = np.array([[int(-y // 2560), int(x // 2560)]])
        assert row["split"] == spec.names[int(split_of_cells("33", cell, spec)[0])]
    dropped, _ = windows()
    for one, other in zip(chips.table["split"].to_pylist(), dropped.table["split"].to_pylist(), strict=True):
        assert other in (None, one)


def test_windows_and_cells_agree_on_the_ground() -> None:
    chips, _ = windows()
    lattice = {
        r["cell"]: r["split"]
        for r in collection("s2", large())
        .chips(64, cell_km=2.56)
        .split(0.5, 0.25, 0.25, seed=5)
        .table.to_pylist()
    }
    for row in chips.table.to_pylist():
        x, y = (row["xmin"] + row["xmax"]) / 2, (row["ymin"] + row["ymax"]) / 2
        name = f"33/{int(-y // 2560)}/{int(x // 2560)}"
        assert row["split"] in (None, lattice.get(name, row["split"]))


def test_tiles_and_geoboxes_are_split_by_the_same_ground() -> None:
    chips = (
        collection("s2", large(west=500_030.0))
        .chips(128, grid="tiles", cell_km=5.12)
        .split(0.5, 0.5, 0.0, seed=5)
    )
    said = chips.table.column("split").to_pylist()
    assert None in said
    assert {"train", "val"} <= set(said)
    assert chips.audit().ok


# Other ways


def test_by_geometry_is_the_guides_rule() -> None:
    rows = [record(f"r{i}", west=500_000.0 + i * 4480, datatake=f"{i}") for i in range(12)]
    chips = collection("s2", *rows).chips(32, **CELLS).split(0.5, 0.25, 0.25, by="geometry", seed=9)
    edges = (0.5, 0.75, 1.0)
    own = {}
    for r in rows:
        unit = int(hashlib.md5(r["geometry"]).hexdigest(), 16) / 2**128
        own[r["id"]] = next(n for n, e in zip(("train", "val", "test"), edges, strict=True) if unit < e)
    for row in chips.table.to_pylist():
        labels = {own[f["record"]] for f in row["feeds"]}
        assert row["split"] == (labels.pop() if len(labels) == 1 else None)
    other = collection("s2", *rows).chips(32, **CELLS).split(0.5, 0.25, 0.25, by="geometry", seed=10)
    assert splits(other) == splits(chips)  # the seed is not used


def test_chips_of_records_of_two_splits_belong_to_none() -> None:
    rows = [
        record("a", datatake="1", when="2024-04-02T10:00:00"),
        record("b", west=500_500.0, datatake="2", when="2024-05-02T10:00:00"),
    ]
    chips = (
        collection("s2", *rows)
        .harmonize(["red"], time="1MS")
        .chips(32, **CELLS)
        .split(0.5, 0.25, 0.25, by="geometry")
    )
    unit = {r["id"]: int(hashlib.md5(r["geometry"]).hexdigest(), 16) / 2**128 for r in rows}
    number = {k: np.searchsorted([0.5, 0.75], u, side="right") for k, u in unit.items()}
    for row in chips.table.to_pylist():
        labels = {int(number[f["record"]]) for f in row["feeds"]}
        assert row["split"] == (("train", "val", "test")[labels.pop()] if len(labels) == 1 else None)


def test_by_a_column_of_the_chip_table() -> None:
    names = ["train", "val", "test", None, "spare"]
    places = shapely.points([(501_000 + 500 * i, 5_398_000) for i in range(5)])
    at = geopandas.GeoDataFrame({"fold": names}, geometry=places, crs=32633)
    chips = collection("s2", record("a")).chips(16, at=at).split(by="fold")
    assert {r["fold"]: r["split"] for r in chips.table.to_pylist()} == {
        "train": "train", "val": "val", "test": "test", None: None, "spare": "spare",
    }  # fmt: skip
    why = "column fold names no split"
    assert chips.audit().lost == {why: 1, f"{why}, fold = None": 1}
    for by, word in (("nothing", "nothing"), ("feeds", "list<")):
        with pytest.raises(rd.PlanError, match=word):
            _ = collection("s2", record("a")).chips(16, at=at).split(by=by).table


# Conservation, select, warnings


def test_every_chip_is_in_one_split_or_counted() -> None:
    own = collection("s2", *at_12_east(48.0)).chips(32, **CELLS).split(0.4, 0.3, 0.3, seed=1, buffer_m=200)
    parts = [own.select(name) for name in ("train", "val", "test")]
    chosen = [i for part in parts for i in ids(part)]
    assert len(chosen) == len(set(chosen))
    none = [i for i, s in zip(ids(own), own.table["split"].to_pylist(), strict=True) if s is None]
    assert set(chosen) | set(none) == set(ids(own))
    assert len(none) == sum(
        v for k, v in own.planned.dropped.items() if k.startswith(("chip on", "val or test"))
    )
    assert sum(own.audit().chips.values()) == len(chosen)
    assert ids(own.select("train", "val")) == [
        i for i in ids(own) if i in set(ids(parts[0])) | set(ids(parts[1]))
    ]


def test_an_unknown_or_missing_split_is_told() -> None:
    chips = collection("s2", record("a")).chips(32, **CELLS)
    with pytest.raises(rd.PlanError, match="a split step before it"):
        _ = chips.select("train").table
    with pytest.raises(rd.PlanError, match=r"'trian'.*train, val, test"):
        _ = chips.split().select("trian").table
    with pytest.raises(rd.PlanError, match="at least one"):
        chips.split().select()
    with pytest.raises(rd.PlanError, match="no chip left"):
        _ = chips.split(1.0, 0.0, 0.0).select("val").table


def warned(cells: int, ratios: tuple[float, float, float], size: int = 128) -> str:
    row = record("a", west=1280.0 * 400, north=1280.0 * 4000, px=(128 * cells, 128))
    with pytest.warns(UserWarning, match="split cell") as caught:
        _ = collection("s2", row).chips(size, **CELLS).split(*ratios, seed=1).table
    return str(caught[0].message)


@pytest.mark.filterwarnings("default")
def test_few_split_cells_warn_with_the_chance_and_a_remedy() -> None:
    import itertools

    for cells, ratios in ((3, (0.7, 0.15, 0.15)), (9, (0.5, 0.25, 0.25)), (5, (0.6, 0.4, 0.0))):
        present = [r for r in ratios if r]
        full = sum(
            np.prod([present[i] for i in dealt])
            for dealt in itertools.product(range(len(present)), repeat=cells)
            if len(set(dealt)) == len(present)
        )
        text = warned(cells, ratios, size=16)
        assert text.startswith(f"only {cells} split cells of 1.28 km")
        assert f"is {1 - full:.0%}," in text
        assert "chips(cell_km=0." in text
    assert "smaller chips or a larger area" in warned(3, (0.7, 0.15, 0.15))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("pixel", "px", "size"), [(0.2, (1400, 1200), 128), (10.0, (1200, 900), 64), (0.5, (999, 400), 30)]
)
def test_the_cell_that_the_warning_names_is_enough_for_a_field_in_the_corner_of_a_cell(
    pixel: float, px: tuple[int, int], size: int
) -> None:
    days = ("2024-04-10", "2024-05-10", "2024-06-10")  # the same ground thrice is no more ground
    rows = [record(day, pixel=pixel, px=px, when=f"{day}T10:00:00") for day in days]
    source = collection("drone", *rows)
    with pytest.warns(UserWarning, match="split cell") as caught:
        _ = source.chips(size).split().table
    advice = float(str(caught[0].message).split("chips(cell_km=")[1].split(")")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(source.chips(size, cell_km=advice).split().table["split"].to_pylist()) == {
            "train",
            "val",
            "test",
        }


@pytest.mark.filterwarnings("error")
def test_enough_split_cells_do_not_warn() -> None:
    row = record("a", west=1280.0 * 400, north=1280.0 * 4000, px=(128 * 5, 128 * 4))
    assert len(collection("s2", row).chips(128, **CELLS).split().table) == 20


def test_a_buffer_that_empties_a_split_names_the_cell_that_would_do() -> None:
    own = collection("s2", record("a", px=(2000, 2000)))
    with pytest.warns(UserWarning, match=r"drops every chip of val \(.*\), test \(.*\).*cell_km=") as told:
        counts = own.chips(32, cell_km=0.64).split(0.7, 0.15, 0.15, seed=3, buffer_m=400).audit().chips
    assert counts["val"] == counts["test"] == 0 < counts["train"]
    (text,) = {str(w.message) for w in told}
    better = float(text.split("cell_km=")[1].split(")")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the remedy does
        done = own.chips(32, cell_km=better).split(0.7, 0.15, 0.15, seed=3, buffer_m=400).audit()
    assert min(done.chips.values()) > 0
    assert min(done.distance_m[f"train-{n}"] for n in ("val", "test")) >= 400
    assert done.uncovered == ""


# Any names, and folds

PLAIN = collection("s2", record("a", px=(700, 700))).chips(32, **CELLS)

NAMES = st.dictionaries(
    st.sampled_from(["train", "val", "test", "calibration", "a b", "10", "2", "été"]),
    st.integers(1, 9),
    min_size=1,
)


@settings(max_examples=15, deadline=None)
@given(NAMES, st.integers(0, 3), st.randoms(use_true_random=False))
def test_any_names_share_the_ground_in_one_order_however_they_are_written(
    weights: dict[str, int], seed: int, order: random.Random
) -> None:
    total = sum(weights.values())
    shares: dict[str, Any] = {name: weight / total for name, weight in weights.items()}
    turned = list(shares.items())
    order.shuffle(turned)
    chips = PLAIN.split(**shares, seed=seed)
    assert chips.table.equals(PLAIN.split(**dict(turned), seed=seed).table)
    first = [name for name in ("train", "val", "test") if name in shares]
    others = [name for name in ("2", "10", "a b", "calibration", "été") if name in shares]
    names = [*first, *others]
    edges = np.cumsum([shares[name] for name in names])
    for cell, split in zip(*(chips.table[name].to_pylist() for name in ("cell", "split")), strict=True):
        zone, row, col = cell.split("/")
        digest = hashlib.sha256(f"ground|{seed}|{zone}|{row}|{col}".encode()).digest()
        unit = int.from_bytes(digest[:8], "big") / 2**64
        assert split == names[min(int(np.searchsorted(edges, unit, side="right")), len(names) - 1)]
    assert chips.audit().ok


def test_shares_that_are_not_named() -> None:
    cases: tuple[tuple[dict[str, Any], dict[str, float]], ...] = (
        ({}, {"train": 0.7, "val": 0.15, "test": 0.15}),
        ({"train": 0.8}, {"train": 0.8, "val": 0.1, "test": 0.1}),
        ({"train": 1}, {"train": 1}),
        ({"train": 0.7, "val": 0.3}, {"train": 0.7, "val": 0.3}),
    )
    for given_shares, wanted in cases:
        step = PLAIN.split(**given_shares).plan
        assert isinstance(step, Split)
        assert dict(step.spec.ratios) == pytest.approx(wanted)


def test_the_remedy_of_shares_that_leave_some_is_a_call_that_works() -> None:
    cases: tuple[dict[str, Any], ...] = (
        {"train": 0.7, "val": 0.15}, {"a": 0.5, "b": 0.7}, {"train": 0.5, "val": 0.2, "test": 0.2},
    )  # fmt: skip
    for shares in cases:
        with pytest.raises(rd.PlanError, match="sum to 1") as told:
            PLAIN.split(**shares)
        call = str(told.value)[str(told.value).rindex("split(") :].rstrip(" .")
        assert eval(f"chips.{call}", {"chips": PLAIN}).audit().ok


def test_options_of_split_are_those_that_no_split_can_be_called() -> None:
    import inspect

    from rasteret_dask.planning.names import SPLIT_OPTIONS

    options = inspect.signature(rd.Chips.split).parameters.values()
    assert {o.name for o in options if o.kind is o.KEYWORD_ONLY} == set(SPLIT_OPTIONS)
    for name in (*SPLIT_OPTIONS, "", ".", "_job", "a/b", "zarr.json", "tab\t"):
        at = geopandas.GeoDataFrame({"own": [name]}, geometry=[shapely.Point(501_000, 5_398_000)], crs=32633)
        chips = collection("s2", record("a")).chips(16, at=at)
        with pytest.raises(rd.PlanError, match="a split called"):
            _ = chips.split(by="own").table
        assert chips.split(by="own", part=[name]).table["split"].to_pylist() == ["part"]  # the remedy


COLUMNS: dict[str, list[Any]] = {
    "whole": [0, 1, 2, 1, 0],
    "pandas": [0.0, 1.0, None, 1.0, 0.0],
    "words": ["a", "b", None, "a", "c"],
    "truth": [True, False, True, None, True],
}


def labelled(values: list[Any], **more: list[Any]) -> rd.Chips:
    places = shapely.points([(501_000 + 500 * i, 5_398_000) for i in range(len(values))])
    at = geopandas.GeoDataFrame({"own": values, **more}, geometry=places, crs=32633)
    return collection("s2", record("a")).chips(16, at=at)


@pytest.mark.parametrize("kind", COLUMNS)
def test_values_of_a_column_name_splits_and_lists_choose_them(kind: str) -> None:
    values = COLUMNS[kind]
    chips, first = labelled(values), values[0]

    def called(value: Any) -> str | None:
        return None if value is None else str(int(value) if isinstance(value, float) else value)

    rows = chips.split(by="own").table.to_pylist()
    assert len(rows) == len(values)
    assert [r["split"] for r in rows] == [called(None if r["own"] != r["own"] else r["own"]) for r in rows]
    lists = chips.split(by="own", test=[first]).table.to_pylist()
    assert {(r["own"], r["split"]) for r in lists} == {
        (v, None if v is None else "test" if v == first else "train") for v in values
    }
    for some in (chips.split(by="own"), chips.split(by="own", train=[first])):
        audit, none = some.audit(), some.table["split"].null_count
        assert (
            audit.lost.get("column own names no split", 0) == none == len(values) - sum(audit.chips.values())
        )
    with pytest.raises(rd.PlanError, match=r"test=\['spare'\].*values of column own"):
        _ = chips.split(by="own", test=["spare"]).table


def test_columns_of_lists_are_carried_and_losses_told_by_few_values_only() -> None:
    chips = labelled(
        ["a"] * 30, tags=[["x", "y"]] * 30, fact=[{"n": 1}] * 30, many=list(range(30)), few=["u", "v"] * 15
    )
    with pytest.warns(UserWarning, match="tags"):
        dealt = chips.split(0.5, 0.5, seed=1).planned
    assert dealt.table["tags"].to_pylist() == [["x", "y"]] * dealt.table.num_rows != []
    small = [record("a", px=(500, 200))]
    xy = np.random.default_rng(0).uniform((500_300, 5_398_300), (504_700, 5_399_700), (40, 2))
    at = geopandas.GeoDataFrame({"tags": [["a"]] * 40, "n": range(40), "k": ["u", "v"] * 20},
                                geometry=shapely.points(xy), crs=32633)  # fmt: skip
    with pytest.warns(UserWarning, match="tags"):
        lost = collection("s2", *small).chips(32, at=at, cell_km=0.64).split(seed=1).audit().lost
    why = "chip on the ground of two splits"
    assert lost[why] == lost[f"{why}, k = u"] + lost[f"{why}, k = v"] > 0
    assert not [key for key in lost if "tags" in key or ", n = " in key]
    with pytest.raises(rd.PlanError, match="type list"):
        _ = chips.split(by="tags").table


def test_folds_deal_each_ground_once() -> None:
    folds = PLAIN.folds(4, seed=2)
    number = folds.table["fold"].to_pylist()
    for cell, fold in zip(folds.table["cell"].to_pylist(), number, strict=True):
        zone, row, col = cell.split("/")
        digest = hashlib.sha256(f"folds|2|{zone}|{row}|{col}".encode()).digest()
        assert fold == int(int.from_bytes(digest[:8], "big") / 2**64 * 4)
    seen: list[str] = []
    for i in range(4):
        fold = folds.fold(i)
        assert fold.planned.split is not None
        assert fold.planned.split.names == ("train", "val")
        assert fold.audit().ok
        val = ids(fold.select("val"))
        assert val == [chip for chip, own in zip(ids(PLAIN), number, strict=True) if own == i]
        assert sorted([*val, *ids(fold.select("train"))]) == sorted(ids(PLAIN))
        seen += val
    assert sorted(seen) == sorted(ids(PLAIN))
    assert folds.split(by="fold", test=[0], val=[1]).audit().ok
    inner = (
        PLAIN.split(train=0.7, val=0.3).select("train").folds(3)
    )  # deals of splits and folds are independent
    assert set(inner.table["fold"].to_pylist()) == {0, 1, 2}


def test_folds_of_windows_leave_out_what_lies_on_two() -> None:
    chips = windows()[0].folds(5, seed=1)
    rows = chips.table.to_pylist()
    assert (
        chips.planned.dropped["chip on the ground of two folds"] == sum(r["fold"] is None for r in rows) > 0
    )
    for i in range(5):
        assert chips.fold(i).audit().ok
    centre = windows()[0].folds(5, seed=1, boundary="centre").table["fold"]
    assert centre.null_count == 0
    for one, other in zip((r["fold"] for r in rows), centre.to_pylist(), strict=True):
        assert one in (None, other)


def test_a_chip_is_lost_once() -> None:
    """Whatever deals follow each other: what is lost is what has no split at last, told by one reason."""
    chips = windows()[0]
    for made in (
        chips.folds(5, seed=1).fold(2),
        chips.folds(5, seed=1).fold(2).fold(3),
        chips.split(seed=3).folds(5, seed=1).fold(0),
        chips.folds(5, seed=1).split(seed=3),
        chips.split(seed=3).split(seed=4),
        chips.split(seed=3, buffer_m=200).split(by="epsg"),
    ):
        lost = made.audit().lost
        reasons = {why: n for why, n in lost.items() if " = " not in why and not why.startswith("window")}
        without = made.table["split"].null_count
        if made.plan.spec.by == "fold" or "chip on the ground of two folds" not in reasons:  # type: ignore[union-attr]
            assert sum(reasons.values()) == without
        else:  # folds that no split takes: counted apart
            assert sum(reasons.values()) - reasons["chip on the ground of two folds"] == without
    folded = chips.folds(5, seed=1)
    assert folded.fold(2).audit().lost == {"chip on the ground of two folds": folded.table["fold"].null_count}
    some = folded.filter("fold", "!=", None) if folded.table["fold"].null_count else folded
    assert "chip on the ground of two folds" not in some.fold(0).audit().lost


def test_folds_that_cannot_be_are_told_with_what_can() -> None:
    few = collection("s2", record("a", west=1280.0 * 400, north=1280.0 * 4000, px=(128 * 3, 128))).chips(
        32, **CELLS
    )
    with pytest.raises(rd.PlanError, match=r"3 split cells.*folds\(3\) or fewer"):
        _ = few.folds(4).table
    assert len(few.folds(3).table) == len(few)
    folds = PLAIN.folds(3)
    mistakes: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: folds.fold(3).table, "values of column fold: 0, 1, 2"),
        (lambda: PLAIN.fold(0).table, r"chips.folds\(5\) makes a column fold"),
        (lambda: folds.folds(2).table, "there already"),
    )
    for wrong, told in mistakes:
        with pytest.raises(rd.PlanError, match=told):
            wrong()


def test_a_plan_of_before_keeps_its_digest_and_a_new_one_comes_back_from_json() -> None:
    node = Split(Source("s2", "token"), SplitSpec((("train", 0.7), ("val", 0.15), ("test", 0.15)), 7))
    assert digest(node) == "c130ef5768da262a0bc629e1b0b87c7f"
    assert set(to_json(node)["spec"]) == {"type", "ratios", "seed", "by", "buffer_m", "boundary"}
    for plan in (
        PLAIN.split(train=0.6, rest=0.4), PLAIN.split(by="epsg", test=[32633], val=[True, "x", 0.5]),
        PLAIN.split(by="epsg"), PLAIN.folds(4, seed=1).fold(2, buffer_m=5.0),
    ):  # fmt: skip
        assert from_json(to_json(plan.plan)) == plan.plan
