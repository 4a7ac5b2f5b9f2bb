"""What audit() says against brute force: ratios, cells, overlaps, distances."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import geopandas
import numpy as np
import pyproj
import pytest
import shapely
from made_records import boxes, collection, record

import rasteret_dask as rd

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")


def lattice_chips() -> rd.Chips:
    return collection("s2", record("a", px=(1000, 1000))).chips(32, cell_km=1.28)


def window_chips() -> rd.Chips:
    xy = np.random.default_rng(3).uniform((500_500, 5_390_500), (509_500, 5_399_500), (120, 2))
    at = geopandas.GeoDataFrame(
        {"fold": np.array(["train", "val", "test"])[np.arange(120) % 3]},
        geometry=shapely.points(xy),
        crs=32633,
    )
    return collection("s2", record("a", px=(1000, 1000))).chips(64, at=at, cell_km=1.28)


@pytest.mark.parametrize("kind", ["lattice", "windows", "fold"])
def test_figures_are_those_of_brute_force(kind: str) -> None:
    chips = {
        "lattice": lambda: lattice_chips().split(0.5, 0.3, 0.2, seed=2),
        "windows": lambda: window_chips().split(0.5, 0.3, 0.2, seed=2, boundary="centre"),
        "fold": lambda: window_chips().split(by="fold"),
    }[kind]()
    found = chips.audit()
    rows, shapes = chips.table.to_pylist(), boxes(chips)
    own = {
        n: [s for r, s in zip(rows, shapes, strict=True) if r["split"] == n] for n in ("train", "val", "test")
    }
    assert found.chips == {n: len(s) for n, s in own.items()}
    total = sum(map(len, own.values()))
    assert found.ratios == pytest.approx({n: len(s) / total for n, s in own.items()})
    assert found.targets == ({} if kind == "fold" else {"train": 0.5, "val": 0.3, "test": 0.2})
    for text in (str(found), found._repr_html_()):  # a column asked for no shares
        assert ("50.0%" in text) == (kind != "fold")
    for n in own:
        centres = [(s.centroid.x // 1280, s.centroid.y // 1280) for s in own[n]]
        cells = {r["cell"] for r in rows if r["split"] == n} if kind == "lattice" else set(centres)
        assert found.cells[n] == len(cells)
    assert list(found.classes) == (["fold"] if kind == "windows" else [])
    for split in own if kind == "windows" else ():
        counted = {c: sum(r["split"] == split and r["fold"] == c for r in rows) for c in own}
        assert {c: row[split] for c, row in found.classes["fold"].items()} == counted
        assert found.shares("fold")["val"][split] == pytest.approx(counted["val"] / len(own[split]))
    for a, b in combinations(own, 2):
        pairs = [(x, y) for x in own[a] for y in own[b]]
        assert found.overlaps[f"{a}-{b}"] == sum(x.intersection(y).area > 1e-3 for x, y in pairs)
        assert found.distance_m[f"{a}-{b}"] == pytest.approx(min(x.distance(y) for x, y in pairs), abs=1e-6)
    assert found.ok == (not any(found.overlaps.values()))
    assert found.ok == (kind == "lattice")
    assert found.lost == dict(chips.planned.dropped)


def test_distances_across_zones_are_metres() -> None:
    rows = [record("w", epsg=32632, west=700_000.0), record("e", epsg=32633, west=300_000.0)]
    chips = collection("s2", *rows).chips(32, cell_km=1.28).split(0.5, 0.5, 0.0, seed=1)
    t = chips.table
    one = geopandas.GeoSeries(shapely.from_wkb(t["geometry"].to_pylist()), crs=4326).to_crs(
        3035
    )  # equal area
    said = np.array(t["split"].to_pylist())
    near = min(one[said == "train"].distance(g).min() for g in one[said == "val"])
    assert chips.audit().distance_m["train-val"] == pytest.approx(near, abs=5)


def test_an_audit_is_of_the_whole_plan_and_prints() -> None:
    chips = lattice_chips().split(0.5, 0.3, 0.2, seed=2)
    whole, part = chips.audit(), chips.select("train").audit()
    assert whole == part
    text = str(whole)
    for line in ("train-val: 0 overlaps", "lost:", "50.0%"):
        assert line in text
    assert whole.to_dict() | {"ok": True} == whole.to_dict()
    assert repr(whole) == text


def test_an_audit_needs_a_split() -> None:
    with pytest.raises(rd.PlanError, match="no split step"):
        lattice_chips().audit()


def test_an_empty_split_is_shown_and_has_no_pairs() -> None:
    found = lattice_chips().split(1.0, 0.0, 0.0).audit()
    assert found.chips == {"train": found.chips["train"], "val": 0, "test": 0}
    assert found.overlaps == {}
    assert found.ok


def dull(chips: rd.Chips, first: str, second: str) -> tuple[int, float]:
    """Return pairs that share ground and the smallest distance: all chips in the CRS of each of the first."""
    rows = [r for r in chips.table.to_pylist() if r["split"] in (first, second)]
    split = np.array([r["split"] for r in rows])
    epsg = np.array([r["epsg"] for r in rows])
    box = np.array([shapely.box(*(r[n] for n in ("xmin", "ymin", "xmax", "ymax"))) for r in rows])
    degrees = shapely.from_wkb([r["geometry"] for r in rows])
    overlaps, nearest = 0, np.inf
    for code in np.unique(epsg):
        to = pyproj.Transformer.from_crs(4326, int(code), always_xy=True)
        moved = shapely.transform(degrees, lambda p, to=to: np.stack(to.transform(p[:, 0], p[:, 1]), -1))
        here = np.where(epsg == code, box, moved)
        for one in here[(split == first) & (epsg == code)]:
            overlaps += int(np.sum(shapely.area(shapely.intersection(one, here[split == second])) > 1e-3))
            nearest = min(nearest, float(shapely.distance(one, here[split == second]).min()))
    return overlaps, nearest


def zones(west: tuple[int, float], east: tuple[int, float]) -> rd.Chips:
    rows = [
        record(f"{side}{i}", epsg=epsg, west=x, north=5_400_000.0 - i * 12_000.0)
        for side, (epsg, x) in (("w", west), ("e", east))
        for i in range(2)
    ]
    return collection("s2", *rows).chips(64, cell_km=2.56)


WORLDS = {
    "two zones": ((32632, 716_000.0), (32633, 276_000.0)),
    "far zones": ((32632, 500_000.0), (32634, 500_000.0)),
    "antimeridian": ((32660, 716_000.0), (32601, 276_000.0)),
}


@pytest.mark.parametrize("buffer", [0.0, 1_500.0])
@pytest.mark.parametrize("world", list(WORLDS))
def test_figures_across_zones_are_those_of_the_dull_way(world: str, buffer: float) -> None:
    chips = zones(*WORLDS[world]).split(0.5, 0.5, 0.0, seed=4, buffer_m=buffer)
    found = chips.audit()
    overlaps, nearest = dull(chips, "train", "val")
    assert found.overlaps["train-val"] == overlaps
    assert found.distance_m["train-val"] == pytest.approx(nearest, rel=1e-9, abs=1e-6)


def test_only_chips_beside_another_zone_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = zones(*WORLDS["far zones"]).split(0.5, 0.5, 0.0, seed=4)
    read: list[int] = []

    def counted(wkb: Any) -> Any:
        read.append(len(wkb))
        return from_wkb(wkb)

    from_wkb = shapely.from_wkb
    assert len(chips) == 100
    monkeypatch.setattr(shapely, "from_wkb", counted)
    chips.audit()
    assert sum(read) == 0  # all that touch a chip of the other split are of its own zone
