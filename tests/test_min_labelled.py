# SPDX-License-Identifier: Apache-2.0
"""``filter_pixels(min_labelled=)``: the chips that stay are those of whose mask enough has a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from small_stores import written

import rasteret_dask as rd
from rasteret_dask.planning.calls import call
from rasteret_dask.planning.plan import from_json, to_json
from rasteret_dask.planning.rules import Rule

SIZE = 32


@pytest.fixture(scope="module")
def red(s2: rd.Collection) -> rd.Collection:
    return s2.harmonize(["red"], time="3MS")


@pytest.fixture(scope="module")
def fields(red: rd.Collection) -> gpd.GeoDataFrame:
    ground = red.chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633).total_bounds
    west, south, east, north = ground.tolist()
    rng = np.random.default_rng(3)
    points = shapely.points(rng.uniform(west, east, 40), rng.uniform(south, north, 40))
    shapes = shapely.buffer(points, rng.uniform(50, 250, 40))
    return gpd.GeoDataFrame({"crop": ["a", "b"] * 20, "yield": rng.random(40)}, geometry=shapes, crs=32633)


def halved(chips: xr.DataArray) -> xr.DataArray:
    return chips[..., ::2, ::2]


@pytest.mark.parametrize("column", ["crop", "yield"])
def test_the_share_is_that_of_the_mask(
    red: rd.Collection, fields: gpd.GeoDataFrame, column: str, tmp_path: Path
) -> None:
    chips = red.chips(SIZE, cell_km=0.64, labels=fields, rasterize=column).sample(24)
    loaded: Any = chips.load()
    masks = loaded["mask"].values
    share = (~np.isnan(masks) if column == "yield" else masks > 0).mean(axis=(1, 2))
    limit = float(np.median(share))
    wanted = loaded["chip_id"].values[share >= limit].tolist()
    assert 0 < len(wanted) < len(chips)
    rule = chips.filter_pixels(min_labelled=limit)
    kept: Any = rule.load()
    assert kept["chip_id"].values.tolist() == wanted
    smaller: Any = chips.map(halved).filter_pixels(min_labelled=limit).load()  # which has no mask any more
    assert smaller["chip_id"].values.tolist() == wanted
    if column == "crop":
        stored = rd.open_chips(written(rule, tmp_path / "store.zarr"))
        assert sorted(stored) == sorted(wanted)
        assert set(stored.dropped.column("reason").to_pylist()) == {
            f"labelled {own:.3f}, below {limit:g}" for own in share if own < limit
        }
        streamed = [one for batch in rule.stream(batch_size=8) for one in batch["chip_id"].tolist()]
        assert streamed == wanted


def test_only_the_source_with_the_mask_is_judged(
    red: rd.Collection, s2: rd.Collection, fields: gpd.GeoDataFrame
) -> None:
    joined = rd.join(optical=red, cover=s2.harmonize(["scl"], time="3MS"))
    chips = joined.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop").sample(8)
    tree: Any = chips.load()
    share = (tree["optical"]["mask"].values > 0).mean(axis=(1, 2))
    for source in (None, "optical"):
        kept: Any = chips.filter_pixels(min_labelled=0.3, source=source).load()
        assert kept["cover"]["chip_id"].values.tolist() == (
            tree["optical"]["chip_id"].values[share >= 0.3].tolist()
        )
    with pytest.raises(rd.PlanError, match=r"source 'cover': found no mask; expected source='optical'"):
        _ = chips.filter_pixels(min_labelled=0.3, source="cover").planned


def test_plans_say_it_and_older_ones_stay(red: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    plain = red.chips(SIZE, cell_km=0.64)
    plan = plain.filter_pixels(min_labelled=0.25, min_valid=0.5).plan
    assert from_json(to_json(plan)) == plan
    assert call(plan) == "filter_pixels(min_valid=0.5, min_labelled=0.25)"
    assert "min_labelled" not in to_json(Rule(min_valid=0.5))
    with pytest.raises(rd.PlanError, match=r"chips without a mask; expected a mask of labels.*rasterize="):
        _ = plain.filter_pixels(min_labelled=0.25).planned
    masked = red.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop")
    _ = masked.filter_pixels(min_labelled=0.25).planned
    for wrong in (-0.1, 1.5, True, float("nan")):
        with pytest.raises(rd.PlanError, match=r"min_labelled=\)"):
            masked.filter_pixels(min_labelled=wrong)
