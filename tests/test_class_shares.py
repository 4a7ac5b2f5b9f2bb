# SPDX-License-Identifier: Apache-2.0
"""Class shares of chips: columns that equal what NumPy counts in the pixels, whatever they are read from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_stores import written

import rasteret_dask as rd
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.statistics import classshares
from rasteret_dask.statistics.classshares import class_target
from rasteret_dask.tasks.batches import SourcePixels

CROPS = ["wheat", "maize", "sugar beet", "oats"]
SIZE = 32


@pytest.fixture(scope="module")
def fields(s2: rd.Collection) -> gpd.GeoDataFrame:
    ground = s2.harmonize(["red"], time="3MS").chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633)
    west, south, east, north = ground.total_bounds
    rng = np.random.default_rng(8)
    points = shapely.points(rng.uniform(west, east, 40), rng.uniform(south, north, 40))
    return gpd.GeoDataFrame(
        {"crop": rng.choice(CROPS[:3], 40), "number": rng.integers(1, 5, 40), "yield": rng.random(40)},
        geometry=shapely.buffer(points, rng.uniform(50, 300, 40)),
        crs=32633,
    )


@pytest.fixture(scope="module")
def chips(s2: rd.Collection, fields: gpd.GeoDataFrame) -> rd.Chips:
    joined = rd.join(
        optical=s2.harmonize(["red"], time="3MS"), cover=s2.harmonize(["scl"], time="3MS", resolution=20)
    )
    return joined.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop", classes=CROPS).sample(30)


def of_mask(masks: NDArray[Any], value: int) -> list[float]:
    return [float((mask == value).mean()) for mask in masks]


def in_order(table: pa.Table, ids: list[str]) -> pa.Table:
    place = {one: at for at, one in enumerate(table.column("chip_id").to_pylist())}
    return table.take(pa.array([place[one] for one in ids]))


def test_shares_of_masks_are_those_of_their_pixels(chips: rd.Chips, tmp_path: Path) -> None:
    loaded: Any = chips.load()
    ids, masks = loaded["optical"]["chip_id"].values.tolist(), loaded["optical"]["mask"].values
    found = chips.class_shares("optical/mask", progress=False)
    assert found.column_names == ["chip_id", *(f"share_{crop}" for crop in CROPS)]
    assert found.num_rows == len(chips)
    stored = rd.open_chips(written(chips, tmp_path / "store.zarr"))
    kept = chips.filter_pixels(min_valid=0.0).class_shares("optical/mask", progress=False)  # read, not burned
    for table in (found, stored.class_shares("optical/mask", progress=False), kept):
        own = in_order(table, ids)
        for value, crop in enumerate(CROPS, 1):
            assert own.column(f"share_{crop}").to_pylist() == of_mask(masks, value)
    assert not any(found.column("share_oats").to_pylist())  # a class of the list, and nowhere here


def test_shares_of_a_band_count_valid_pixels_of_slots_that_have_some(chips: rd.Chips, tmp_path: Path) -> None:
    loaded: Any = chips.load()
    cover = loaded["cover"]
    ids, values, valid = (cover[name].values for name in ("chip_id", "pixels", "valid"))
    stored = rd.open_chips(written(chips, tmp_path / "store.zarr"))
    for table in (
        chips.class_shares("cover", prefix="scl ", progress=False),
        stored.class_shares("cover/scl", prefix="scl ", progress=False),
    ):
        own = in_order(table, ids.tolist()).to_pydict()
        del own["chip_id"]
        there = np.unique(values[valid[:, :, None]]).tolist()
        assert list(own) == [f"scl {value}" for value in there]
        for column, value in zip(own, there, strict=True):
            for at, share in enumerate(own[column]):
                slots = valid[at].any(axis=(1, 2)).sum() * valid[at, 0].size
                hits = ((values[at, :, 0] == value) & valid[at]).sum()
                assert share == pytest.approx(hits / max(slots, 1), abs=1e-12)


def test_a_cluster_counts_the_same(chips: rd.Chips) -> None:
    few = chips.sample(6)
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        for target in ("optical/mask", "cover"):
            there = few.class_shares(target, client=client, progress=False)
            assert there.equals(few.class_shares(target, progress=False))


def test_columns_choose_split_and_weigh(chips: rd.Chips) -> None:
    shares = chips.class_shares("optical/mask", progress=False)
    wide = chips.with_table(shares)
    wheat = np.array(shares.column("share_wheat"))
    assert len(wide.filter("share_wheat", ">", 0.1)) == int((wheat > 0.1).sum()) > 0
    names = ["share_wheat", "share_maize"]
    split = wide.split(train=0.5, val=0.5, stratify=names, seed=1)
    assert {"train", "val"} == set(split.table.column("split").drop_null().to_pylist())
    stream = wide.stream(batch_size=len(chips), weights="share_wheat", shuffle=1)
    batch = next(stream)
    stream.close()
    assert (batch["labels/share_wheat"] > 0).all()
    again = rd.planning.plan.from_json(rd.planning.plan.to_json(wide.plan))
    assert again == wide.plan


def test_numbers_name_columns_where_no_class_has_a_name(s2: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    red = s2.harmonize(["red"], time="3MS")
    chips = red.chips(SIZE, cell_km=0.64, labels=fields, rasterize="number").sample(12)
    loaded: Any = chips.load()
    there = [int(value) for value in np.unique(loaded["mask"].values) if value]
    found = chips.class_shares("s2/mask", progress=False)
    assert found.column_names == ["chip_id", *(f"share_{value}" for value in there)]
    for value in there:
        assert found.column(f"share_{value}").to_pylist() == of_mask(loaded["mask"].values, value)
    floats = red.chips(SIZE, cell_km=0.64, labels=fields, rasterize="yield")
    with pytest.raises(rd.PlanError, match=r"a mask of floats.*Burn a column of classes"):
        floats.class_shares("s2/mask")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_parts_make_the_table_of_the_whole(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    chips = sum(sizes)
    values = rng.integers(-2, 4, (chips, 2, 3, 3))
    valid = rng.random(values.shape) < rng.choice([0.0, 0.6], (chips, 2, 1, 1))
    ids = [f"chip {n}" for n in range(chips)]
    pixels = {
        "cover": SourcePixels(
            ("cover",), "int8", "", (), (BandKind("class", ((1, "a"), (2, "a"), (9, "b"))),)
        )
    }
    target = class_target(pixels, "cover")
    ends = np.cumsum([0, *sizes]).tolist()
    cut = [slice(a, b) for a, b in pairwise(ends)]
    parts = [classshares._counted(ids[own], values[own], valid[own]) for own in cut]
    table = classshares._table(parts, target, "").to_pydict()
    assert table.pop("chip_id") == ids
    there = sorted({1, 2, 9, *np.unique(values[valid]).tolist()})
    assert list(table) == ["b" if value == 9 else str(value) for value in there]
    for column, value in zip(table.values(), there, strict=True):
        for at, share in enumerate(column):
            slots = sum(bool(slot.any()) for slot in valid[at])
            assert share == pytest.approx(((values[at] == value) & valid[at]).sum() / max(9 * slots, 1))


def test_mistakes_name_the_targets(chips: rd.Chips, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rd.PlanError, match=r"no such target; expected one of optical/mask, cover/scl, cover"):
        chips.class_shares("optical")
    monkeypatch.setattr(classshares, "MOST_CLASSES", 2)
    with pytest.raises(rd.PlanError, match=r"4 different values; expected at most 2 classes"):
        chips.class_shares("optical/mask", progress=False)
