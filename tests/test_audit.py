"""What audit() says against brute force: ratios, cells, overlaps, distances."""

from __future__ import annotations

from itertools import combinations

import geopandas
import numpy as np
import pytest
import shapely
from made_records import boxes, collection, record

import rasteret_dask as rd

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cells:UserWarning")


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
        "fold": lambda: window_chips().split(0.5, 0.3, 0.2, by="fold"),
    }[kind]()
    found = chips.audit()
    rows, shapes = chips.table.to_pylist(), boxes(chips)
    own = {
        n: [s for r, s in zip(rows, shapes, strict=True) if r["split"] == n] for n in ("train", "val", "test")
    }
    assert found.chips == {n: len(s) for n, s in own.items()}
    total = sum(map(len, own.values()))
    assert found.ratios == pytest.approx({n: len(s) / total for n, s in own.items()})
    assert found.targets == {"train": 0.5, "val": 0.3, "test": 0.2}
    for n in own:
        assert found.cells[n] == len({r["cell"] for r in rows if r["split"] == n and r["cell"]})
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
