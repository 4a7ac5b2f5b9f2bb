# SPDX-License-Identifier: Apache-2.0
"""Point labels with a radius: pixels whose centres lie so near on the ellipsoid have the value of the point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Geod, Transformer
from small_stores import written

import rasteret_dask as rd
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.planning.calls import call
from rasteret_dask.planning.plan import ChipSpec, from_json, to_json

SIZE = 32
INSIDE = 0.9995
"""A circle of 128 vertices holds all ground nearer than this part of the radius."""


def labels_of(points: list[Any], values: list[int], radius_m: float) -> Labels:
    return Labels.of(pa.table({"geometry": shapely.to_wkb(points), "v": values}), "v", radius_m=radius_m)


def distances(box: NDArray[np.float64], epsg: int, size: int, lon: float, lat: float) -> NDArray[np.float64]:
    """Return how far a chip's pixel centres lie from a point on the ellipsoid, shape (y, x)."""
    step = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(box[0] + step * (box[2] - box[0]), box[3] - step * (box[3] - box[1]))
    east, north = Transformer.from_crs(epsg, 4326, always_xy=True).transform(x.ravel(), y.ravel())
    there = np.full(len(east), lon), np.full(len(east), lat)
    return np.asarray(Geod(ellps="WGS84").inv(east, north, *there)[2]).reshape(size, size)


def check(
    burned: NDArray[Any], box: NDArray[np.float64], epsg: int, points: list[Any], radius_m: float
) -> None:
    """Hold a mask of the values 1, 2, ... against distances; what lies just at an edge may be either."""
    sure, least = np.zeros(burned.shape, dtype=int), np.zeros(burned.shape, dtype=bool)
    for value, point in enumerate(points, 1):
        far = distances(box, epsg, len(burned), point.x, point.y)
        sure[far < INSIDE * radius_m] = value
        least |= (far >= INSIDE * radius_m) & (far <= radius_m * (1 + 1e-6))
    np.testing.assert_array_equal(burned[~least], sure[~least])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(32633, 15.0, 0.01), (32633, 14.0, 62.0), (32601, -180.0, 10.0), (3857, 12.0, 50.0)]),
    st.floats(5, 3000),
    st.integers(0, 2**31),
)
def test_pixels_within_the_radius_on_the_ground_are_labelled(
    place: tuple[int, float, float], radius_m: float, seed: int
) -> None:
    epsg, lon, lat = place
    rng = np.random.default_rng(seed)
    x, y = Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    box = np.array([x - radius_m, y - 1.2 * radius_m, x + 1.4 * radius_m, y + 1.2 * radius_m])
    near = rng.uniform(-2e-6, 2e-6, (3, 2)) * radius_m
    points = [shapely.Point((lon + dx + 180) % 360 - 180, lat + dy) for dx, dy in near]
    burned = labels_of(points, [1, 2, 3], radius_m).burned(box[None], np.array([epsg]), SIZE)[0]
    check(burned, box, epsg, points, radius_m)
    assert burned.any()


def test_points_of_a_multipoint_have_one_value() -> None:
    box = np.array([500_000.0, 5_550_000.0, 500_640.0, 5_550_640.0])
    back = Transformer.from_crs(32633, 4326, always_xy=True)
    points = [shapely.Point(*back.transform(500_000 + at, 5_550_300)) for at in (200, 230, 500)]
    burned = labels_of([shapely.MultiPoint(points)], [1], 60.0).burned(box[None], np.array([32633]), 64)[0]
    each = labels_of(points, [1, 1, 1], 60.0).burned(box[None], np.array([32633]), 64)[0]
    np.testing.assert_array_equal(burned, each)


@pytest.fixture(scope="module")
def red(s2: rd.Collection) -> rd.Collection:
    return s2.harmonize(["red"], time="3MS")


@pytest.fixture(scope="module")
def samples(red: rd.Collection) -> gpd.GeoDataFrame:
    ground = red.chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633).total_bounds
    west, south, east, north = ground.tolist()
    rng = np.random.default_rng(4)
    points = shapely.points(rng.uniform(west, east, 30), rng.uniform(south, north, 30))
    return gpd.GeoDataFrame({"v": np.arange(1, 31)}, geometry=points, crs=32633)


def test_every_exit_has_the_mask(red: rd.Collection, samples: gpd.GeoDataFrame, tmp_path: Path) -> None:
    chips = red.chips(SIZE, cell_km=0.64, labels=samples, rasterize="v", radius_m=85).sample(12)
    points = samples.to_crs(4326).geometry.tolist()
    loaded: Any = chips.load()
    masks = loaded["mask"].values
    assert masks.any()
    for row, mask in zip(chips.table.to_pylist(), masks, strict=True):
        box = np.array([row[name] for name in ("xmin", "ymin", "xmax", "ymax")])
        check(mask, box, row["epsg"], points, 85)
    stored: Any = rd.open_chips(written(chips, tmp_path / "store.zarr")).load()
    np.testing.assert_array_equal(stored["mask"].values, masks)
    np.testing.assert_array_equal(next(chips.stream(batch_size=12))["s2/mask"], masks)
    windows: Any = red.chips(SIZE, at=samples, rasterize="v", radius_m=20, min_coverage=0.0).load()
    middle = windows["mask"].values[:, SIZE // 2, SIZE // 2]
    assert set(middle.tolist()) <= {0, *range(1, 31)}
    assert (windows["mask"].values > 0).any(axis=(1, 2)).all()


def test_plans_and_recipes_say_it(
    red: rd.Collection, s2: rd.Collection, samples: gpd.GeoDataFrame, tmp_path: Path
) -> None:
    def of(radius_m: float) -> rd.Chips:
        return red.chips(SIZE, cell_km=0.64, labels=samples, rasterize="v", radius_m=radius_m)

    chips = of(85)
    assert from_json(to_json(chips.plan)) == chips.plan
    assert "radius_m" not in to_json(ChipSpec(32, 32))
    assert call(chips.plan).endswith("radius_m=85)")
    digests = {of(radius).sample(3).job.digest for radius in (85, 85.0, 90)}
    assert len(digests) == 2
    s2.export(tmp_path / "s2.parquet")
    again = rd.load(tmp_path / "s2.parquet", name="s2").harmonize(["red"], time="3MS")
    there = again.chips(SIZE, cell_km=0.64, labels=samples, rasterize="v", radius_m=85)
    there.to_recipe(tmp_path / "job.toml")
    said: Any = rd.load_recipe(tmp_path / "job.toml").chips().plan
    assert said.spec.radius_m == 85


def test_mistakes_say_what_would_do(red: rd.Collection, samples: gpd.GeoDataFrame) -> None:
    def refused(message: str, **how: Any) -> None:
        with pytest.raises(rd.PlanError, match=message):
            red.chips(SIZE, cell_km=0.64, **how)

    points = samples.to_crs(4326)
    refused(r"Point in row 0 \(30 such rows\).*radius_m=20", labels=points, rasterize="v")
    for wrong in (0, -5.0, float("nan"), 1e6, True):
        refused(r"metres above 0 and at most 100,000", labels=points, rasterize="v", radius_m=wrong)
    refused(r"Add rasterize='<column>'", radius_m=20)
    ground = samples.set_geometry(samples.geometry.buffer(50))
    refused(
        r"Polygon in row 0 \(30 such rows\).*Leave radius_m out", labels=ground, rasterize="v", radius_m=20
    )
    polar = points.set_geometry([shapely.Point(10, 89.9999)] * 30)
    refused(r"a pole within that distance of row 0", labels=polar, rasterize="v", radius_m=20)
