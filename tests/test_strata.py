# SPDX-License-Identifier: Apache-2.0
"""Splits stratified by ground: classes counted by plain loops, tables kept with plan and store, growth, bad input."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
from made_records import collection, record

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, StrataWarning
from rasteret_dask.planning.plan import from_json, to_json

PX = 3000
WEST, NORTH, PIXEL = 500_000.0, 5_600_000.0, 10.0
CELL_KM = 3.84
RATIOS: dict[str, Any] = {"train": 0.7, "val": 0.15, "test": 0.15}


def crops(seed: int, count: int, start: int = 0, classes: int = 6) -> gpd.GeoDataFrame:
    """Return points on 30 x 30 km, each crop around a few places of its own."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).uniform(0, PX * PIXEL, (classes * 6, 2))
    home = rng.integers(0, len(centres), count)
    xy = np.clip(centres[home] + rng.normal(0, 2500, (count, 2)), 400, PX * PIXEL - 400)
    names = np.array(["barley", "maize", "oats", "rape", "rye", "wheat"])[home % classes]
    points = gpd.points_from_xy(WEST + xy[:, 0], NORTH - xy[:, 1])
    return gpd.GeoDataFrame({"crop": names}, geometry=points, crs=32633, index=range(start, start + count))


@pytest.fixture(scope="module")
def scene() -> rd.Collection:
    return collection("s2", record("a", px=(PX, PX), west=WEST, north=NORTH)).harmonize(["red"], time="1MS")


def at(scene: rd.Collection, points: gpd.GeoDataFrame, **more: Any) -> rd.Chips:
    return scene.chips(16, at=points, cell_km=CELL_KM, **more)


def off(chips: rd.Chips, column: str = "crop") -> float:
    """Return the largest deviation of a class's share in any split from its share among all chips, by plain loops."""
    rows = [(r["split"], r[column]) for r in chips.table.select(["split", column]).to_pylist()]
    whole = Counter(c for _, c in rows)
    worst = 0.0
    for split in RATIOS:
        own = Counter(c for s, c in rows if s == split)
        for name, count in whole.items():
            worst = max(worst, abs(own[name] / max(sum(own.values()), 1) - count / len(rows)))
    return worst


def by_cell(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["cell"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_classes_hold_and_no_cell_moves_when_points_are_added(scene: rd.Collection) -> None:
    points = crops(1, 500)
    chips = at(scene, points).split(**RATIOS, seed=3, stratify="crop")
    hashed = at(scene, points).split(**RATIOS, seed=3)
    audit = chips.audit()
    assert 50 <= chips.split_cells.num_rows <= 90
    assert off(chips) <= 0.02 < 0.08 < off(hashed)
    assert audit.ok
    assert sum(audit.overlaps.values()) == 0
    more = gpd.GeoDataFrame(np.concatenate([points, crops(2, 50)]), columns=["crop", "geometry"], crs=32633)
    later = at(scene, more).split(**RATIOS, seed=3, stratify="crop", cells=chips)
    before, after = by_cell(chips.split_cells), by_cell(later.split_cells)
    assert before.items() <= after.items()
    assert off(later) <= 0.04
    assert later.audit().ok
    rows = zip(chips.table["chip_id"].to_pylist(), chips.table["split"].to_pylist(), strict=True)
    known = dict(zip(later.table["chip_id"].to_pylist(), later.table["split"].to_pylist(), strict=True))
    assert all(known[chip] == split for chip, split in rows if split is not None)


def fold_off(chips: rd.Chips, k: int) -> float:
    """Return the largest deviation of a class's share in any fold from its share among all chips, by plain loops."""
    rows = [(r["fold"], r["crop"]) for r in chips.table.select(["fold", "crop"]).to_pylist()]
    whole = Counter(c for _, c in rows)
    worst = 0.0
    for fold in range(k):
        own = Counter(c for f, c in rows if f == fold)
        for name, count in whole.items():
            worst = max(worst, abs(own[name] / max(sum(own.values()), 1) - count / len(rows)))
    return worst


def test_classes_hold_in_every_fold_and_no_cell_moves(scene: rd.Collection, tmp_path: Path) -> None:
    points = crops(1, 500)
    folds = at(scene, points).folds(5, seed=3, stratify="crop")
    assert fold_off(folds, 5) <= 0.03 < 0.08 < fold_off(at(scene, points).folds(5, seed=3), 5)
    for i in range(5):
        fold = folds.fold(i)
        assert fold.audit().ok
        assert fold.audit().deviation("crop") <= 0.03
    table = folds.fold_cells
    assert table.schema.field("fold").type == pa.int64()
    assert set(table["fold"].to_pylist()) == set(range(5))
    folds.save_plan(tmp_path / "plan")
    more = gpd.GeoDataFrame(np.concatenate([points, crops(2, 50)]), columns=["crop", "geometry"], crs=32633)
    before = dict(zip(table["cell"].to_pylist(), table["fold"].to_pylist(), strict=True))
    for cells in (folds, table, tmp_path / "plan"):
        later = at(scene, more).folds(5, seed=9, stratify="crop", cells=cells)
        after = dict(zip(*(later.fold_cells[name].to_pylist() for name in ("cell", "fold")), strict=True))
        assert before.items() <= after.items()
        assert fold_off(later, 5) <= 0.05
    both = at(scene, points).split(**RATIOS, seed=1, stratify="crop").folds(5, seed=3, stratify="crop")
    assert both.fold_cells.equals(table)  # a deal of its own beside that of splits
    assert set(both.split_cells["split"].to_pylist()) == set(RATIOS)
    with pytest.raises(PlanError, match=r"fold_cells.*folds\(stratify=\).*same fold again by the same seed"):
        _ = at(scene, points).folds(5).fold_cells


def test_a_recipe_keeps_the_folds(scene: rd.Collection, tmp_path: Path) -> None:
    folds = at(scene, crops(1, 300)).folds(3, seed=2, stratify="crop").fold(1)
    folds.to_recipe(tmp_path / "folds.toml")
    assert 'cells = "folds-fold-cells.parquet"' in (tmp_path / "folds.toml").read_text()
    again = rd.load_recipe(tmp_path / "folds.toml").chips()
    assert again.fold_cells.equals(folds.fold_cells)
    assert again.table["split"].equals(folds.table["split"])
    assert 'folds(3, seed=2, stratify="crop")' in repr(folds)


def test_rows_and_seeds(scene: rd.Collection) -> None:
    points = crops(4, 120)
    chips = at(scene, points).split(**RATIOS, seed=1, stratify="crop")
    turned = at(scene, points.iloc[::-1]).split(**RATIOS, seed=1, stratify="crop")
    assert turned.split_cells.equals(chips.split_cells)
    other = at(scene, points).split(**RATIOS, seed=2, stratify="crop")
    assert not other.split_cells.equals(chips.split_cells)


@pytest.mark.parametrize("more", [{"buffer_m": 500.0}, {"boundary": "centre"}])
def test_buffers_and_boundaries(scene: rd.Collection, more: dict[str, Any]) -> None:
    points = crops(5, 200)
    chips = at(scene, points).split(**RATIOS, seed=1, stratify="crop", **more)
    hashed = at(scene, points).split(**RATIOS, seed=1, **more)
    assert off(chips) < off(hashed)
    audit = chips.audit()
    if "buffer_m" in more:
        assert audit.ok
        assert min(audit.distance_m["train-val"], audit.distance_m["train-test"]) >= 500.0
    else:
        assert not chips.table["split"].null_count


def test_chips_on_a_grid_by_amounts_and_by_burned_labels(scene: rd.Collection) -> None:
    """Fields of two crops in stripes, burned: shares of pixels hold, not of chips; columns of numbers say the same."""
    left = np.arange(0, PX * PIXEL, 3000.0)
    fields = gpd.GeoDataFrame(
        {"crop": ["rye" if n % 3 else "oats" for n in range(len(left))]},
        geometry=shapely.box(WEST + left, NORTH - PX * PIXEL, WEST + left + 2000, NORTH - 9000 - left / 3),
        crs=32633,
    )
    chips = scene.chips(128, cell_km=CELL_KM, labels=fields, rasterize="crop")
    dealt = chips.split(**RATIOS, seed=2, stratify="crop")
    bounds = dealt.table.select(["xmin", "ymin", "xmax", "ymax"]).to_pandas().to_numpy()
    boxes = shapely.box(*bounds.T)
    parts = [fields.geometry[fields.crop == crop].union_all() for crop in ("oats", "rye")]
    area = np.array([shapely.area(shapely.intersection(boxes, part)) for part in parts])
    split = np.array(dealt.table["split"].to_pylist())
    shares = {s: area[:, split == s].sum(axis=1) / area[:, split == s].sum() for s in RATIOS}
    assert max(abs(own[0] - area[0].sum() / area.sum()) for own in shares.values()) <= 0.03
    named = chips.table.append_column("oats", pa.array(area[0])).append_column("rye", pa.array(area[1]))
    again = chips.with_table(named).split(**RATIOS, seed=2, stratify=["rye", "oats"])
    split = np.array(again.table["split"].to_pylist())
    assert (
        max(
            abs(area[0, split == s].sum() / area[:, split == s].sum() - area[0].sum() / area.sum())
            for s in RATIOS
        )
        <= 0.03
    )


@pytest.fixture
def kept(scene: rd.Collection, tmp_path: Path) -> tuple[rd.Chips, Path]:
    chips = at(scene, crops(6, 80)).split(**RATIOS, seed=3, stratify="crop")
    return chips, tmp_path


@pytest.mark.filterwarnings("ignore::rasteret_dask.errors.StrataWarning")
def test_a_saved_plan_keeps_the_table(kept: tuple[rd.Chips, Path], scene: rd.Collection) -> None:
    chips, folder = kept
    chips.save_plan(folder / "plan")
    again = at(scene, crops(6, 80)).split(**RATIOS, seed=99, cells=folder / "plan")
    assert again.split_cells.equals(chips.split_cells)
    assert again.table["split"].equals(chips.table["split"])
    assert chips.job.split_cells is not None
    assert chips.job.split_cells.equals(chips.split_cells)
    hashed = at(scene, crops(6, 80)).split(**RATIOS, seed=3)
    hashed.save_plan(folder / "hashed")
    with pytest.raises(PlanError, match=r"without a table of cells.*same seed"):
        at(scene, crops(6, 80)).split(cells=folder / "hashed")
    with pytest.raises(PlanError, match="without a table of cells"):
        _ = hashed.split_cells


@pytest.mark.filterwarnings("ignore::rasteret_dask.errors.StrataWarning")
def test_a_recipe_keeps_the_cells(kept: tuple[rd.Chips, Path]) -> None:
    chips, folder = kept
    text = chips.select("train").to_recipe(folder / "crops.toml")
    assert 'stratify = "crop"' in text
    assert 'cells = "crops-cells.parquet"' in text
    again = rd.load_recipe(folder / "crops.toml").chips()
    assert again.split_cells.equals(chips.split_cells)
    assert again.table["chip_id"].to_pylist() == chips.select("train").table["chip_id"].to_pylist()


def test_the_plan_says_it(kept: tuple[rd.Chips, Path]) -> None:
    chips, _ = kept
    assert from_json(to_json(chips.plan)) == chips.plan
    assert 'stratify="crop"' in repr(chips)
    row = chips.table.slice(0, 1).to_pylist()[0]
    assert "dealt to" in str(chips.why(row["chip_id"]))


def test_cells_without_strata_are_kept_and_others_hashed(scene: rd.Collection) -> None:
    chips = scene.chips(128, cell_km=CELL_KM).split(**RATIOS, seed=1)
    cells = sorted(set(chips.table["cell"].to_pylist()))
    own = pa.table({"cell": cells[:5], "split": ["val"] * 5})
    dealt = by_cell(scene.chips(128, cell_km=CELL_KM).split(**RATIOS, seed=1, cells=own).split_cells)
    hashed = by_cell(chips.table.select(["cell", "split"]))
    assert dealt == {cell: "val" if cell in cells[:5] else hashed[cell] for cell in cells}


def test_strata_that_cannot_hold(scene: rd.Collection) -> None:
    points = crops(8, 60)
    points.loc[0, "crop"] = "hops"
    with pytest.raises(
        PlanError, match=r"class 'hops' in one split cell.*filter\(\('crop', '!=', 'hops'\)\)"
    ):
        _ = at(scene, points).split(**RATIOS, stratify="crop").table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StrataWarning)
        rest = at(scene, points).filter(("crop", "!=", "hops")).split(**RATIOS, stratify="crop")
        assert len(rest) == 59  # the remedy
    few = crops(8, 60)
    few["crop"] = "rye"
    with pytest.raises(PlanError, match=r"1 split cell of 96 km.*chips\(cell_km=(.*)\)") as told:
        _ = scene.chips(16, at=few, cell_km=96).split(**RATIOS, stratify="crop").table
    smaller = float(str(told.value).split("cell_km=")[1].split(")")[0])
    assert set(
        scene.chips(16, at=few, cell_km=smaller)
        .split(**RATIOS, stratify="crop")
        .split_cells["split"]
        .to_pylist()
    ) == set(RATIOS)
    points = crops(8, 120)
    far = points.index[[points.geometry.x.argmin(), points.geometry.x.argmax()]]
    points.loc[far, "crop"] = "hops"
    with pytest.warns(StrataWarning, match=r"than there are splits \(3\): hops \(2\)"):
        _ = at(scene, points).split(**RATIOS, stratify="crop").table


def test_bad_input(scene: rd.Collection) -> None:
    points = crops(9, 60)
    chips = at(scene, points)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stratify": "soil"}, "no column 'soil'.*crop"),
        ({"stratify": "xmin"}, "a column of double.*pandas.cut"),
        ({"stratify": "chip_id", "by": "crop"}, "by='ground'"),
        ({"stratify": 3}, "name of a column"),
        ({"stratify": ["crop", "crop"]}, "different ones"),
        ({"stratify": ["crop", "xmin"]}, "'crop' of string among several"),
        ({"cells": 3}, "a int.*chips.split_cells"),
        ({"cells": "nowhere"}, "no saved plan, store or Parquet file"),
        ({"cells": pa.table({"cell": ["33/1/1"]})}, "without column split"),
        ({"cells": pa.table({"cell": ["33/1"], "split": ["val"]})}, "a cell that is none"),
        ({"cells": pa.table({"cell": ["33/1/1"] * 2, "split": ["val", "test"]})}, "'33/1/1' in two splits"),
        (
            {"cells": pa.table({"cell": ["33/1/1"], "split": ["holdout"]})},
            "'holdout'.*one of train, val, test",
        ),
    ]
    for arguments, words in cases:
        with pytest.raises(PlanError, match=words):
            _ = chips.split(**arguments).table
    points.loc[3, "crop"] = None
    with pytest.raises(PlanError, match=r"no value in 1 of 60 chips.*filter\(\('crop', '!=', None\)\)"):
        _ = at(scene, points).split(stratify="crop").table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StrataWarning)
        assert len(at(scene, points).filter(("crop", "!=", None)).split(stratify="crop")) == 59
        table = at(scene, crops(9, 60)).split(stratify="crop").split_cells
    with pytest.raises(PlanError, match=r"cells of 3.84 km on grid utm.*cell_km=3.84"):
        _ = scene.chips(16, at=crops(9, 60), cell_km=7.68).split(cells=table).table
    with pytest.raises(PlanError, match=r"folds\(stratify='soil'\).*no column 'soil'"):
        _ = chips.folds(3, stratify="soil").table
    with pytest.raises(PlanError, match=r"folds\(cells=\).*columns cell and fold"):
        _ = chips.folds(3, cells=table)
    folded = pa.table({"cell": table["cell"].slice(0, 1), "fold": [7]})
    with pytest.raises(PlanError, match=r"folds\(cells=\).*'7'.*one of 0, 1, 2"):
        _ = chips.folds(3, cells=folded).table
