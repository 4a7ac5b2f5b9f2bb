"""A map of what a model says equals a dull sliding window over the whole cube, whatever the blocks and workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.chipping.chiptable import bounds_of


def texture(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give two numbers a pixel that hang on the pixel's neighbours and on its place in the chip."""
    first = pixels[:, :, 0].mean(axis=1) if pixels.ndim == 5 else pixels[:, 0]
    side = first.shape[-1]
    ramp = np.linspace(0.0, 1.0, side, dtype=np.float32)
    blurred = first + np.roll(first, 1, axis=-1) + np.roll(first, -1, axis=-2)
    return np.stack([blurred * (1 + ramp), first * (2 - ramp[:, None])], axis=1)


def weight_of(blend: str, side: int) -> NDArray[np.float64]:
    if blend == "hann":
        line = np.array([np.sin(np.pi * (i + 0.5) / side) ** 2 for i in range(side)])
        return line[:, None] * line[None, :]
    return np.ones((side, side))


def dull_map(
    chips: rd.Chips, cube: Any, grid: Any, blend: str, least: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Slide over a cube that is in memory, chip by chip, and blend with float64: (channel, y, x), and chips a pixel."""
    height, width = grid["shape"]
    west, _, _, north = grid["bounds"]
    pixel = 10.0
    values = np.asarray(cube.values, dtype=np.float32)
    cube_north, cube_west = float(cube.y[0]) + pixel / 2, float(cube.x[0]) - pixel / 2
    side = chips.planned.spec.size
    total = np.full((2, height, width), -np.inf if blend == "max" else 0.0)
    weight, count = np.zeros((height, width)), np.zeros((height, width), dtype=np.int64)
    nearest = np.full((height, width), np.inf)
    weights = weight_of(blend, side)
    for west_m, _, _, north_m in bounds_of(chips.table):
        row, col = round((cube_north - north_m) / pixel), round((west_m - cube_west) / pixel)
        padded = np.full((*values.shape[:2], side, side), np.nan, dtype=np.float32)
        y0, x0 = max(row, 0), max(col, 0)
        y1, x1 = min(row + side, values.shape[2]), min(col + side, values.shape[3])
        if y0 < y1 and x0 < x1:
            padded[:, :, y0 - row : y1 - row, x0 - col : x1 - col] = values[:, :, y0:y1, x0:x1]
        valid = np.isfinite(padded).all(axis=1).sum(axis=0) >= least
        answer = texture(np.nan_to_num(padded, nan=0.0)[None])[0].astype(np.float64)
        top, left = round((north - north_m) / pixel), round((west_m - west) / pixel)
        for y, x in np.argwhere(valid).tolist():
            at = (top + y, left + x)
            if not (0 <= at[0] < height and 0 <= at[1] < width):
                continue
            count[at] += 1
            if blend == "max":
                total[:, at[0], at[1]] = np.maximum(total[:, at[0], at[1]], answer[:, y, x])
            elif blend == "centre":
                distance = (y - (side - 1) / 2) ** 2 + (x - (side - 1) / 2) ** 2
                if distance < nearest[at]:
                    nearest[at], total[:, at[0], at[1]] = distance, answer[:, y, x]
            else:
                total[:, at[0], at[1]] += answer[:, y, x] * weights[y, x]
                weight[at] += weights[y, x]
    if blend in ("hann", "mean"):
        total = total / np.where(count > 0, weight, 1.0)
    total[:, count == 0] = np.nan
    return total, count


@pytest.fixture(scope="module")
def optical(s2: rd.Collection) -> rd.Collection:
    """One tile, and a pick that looks at pixels only: of chips as of a cube."""
    return s2.where(tile="MGRS-33UVR").harmonize(["red", "nir"], time="3MS", pick="median")


@pytest.fixture(scope="module")
def cube(optical: rd.Collection) -> Any:
    """The whole ground as one cube in memory: (time, band, y, x)."""
    return optical.cube().load()


AREA = (0.1, 0.35, 0.75, 0.7)


def area_of(cube: Any, shares: tuple[float, float, float, float]) -> Any:
    """Return a part of a cube's ground as a polygon in degrees."""
    import geopandas as gpd
    from shapely.geometry import box

    left, bottom, right, top = (
        float(v) for v in (cube.x[0] - 5, cube.y[-1] - 5, cube.x[-1] + 5, cube.y[0] + 5)
    )
    wide, high = right - left, top - bottom
    w, s, e, n = shares
    shape = box(left + w * wide, bottom + s * high, left + e * wide, bottom + n * high)
    return gpd.GeoSeries([shape], crs=32633).to_crs(4326)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([16, 24, 32, 48]),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
    edge=st.sampled_from(["shift", "pad"]),
    blend=st.sampled_from(["hann", "mean", "max", "centre"]),
    block_px=st.sampled_from([None, 256]),
    batch_size=st.sampled_from([1, 5, 16]),
)
def test_a_map_is_a_sliding_window_over_the_cube(
    optical: rd.Collection,
    cube: Any,
    size: int,
    overlap: float,
    edge: Any,
    blend: Any,
    block_px: Any,
    batch_size: int,
) -> None:
    stride = max(int(size * (1 - overlap)), 1)
    chips = optical.chips(size, stride=stride, cover=True, edge=edge, aoi=area_of(cube, AREA))
    plan = chips.plan_map(texture, blend=blend, batch_size=batch_size, block_px=block_px)
    seen: Any = plan.load()
    (grid,) = plan.explain()["grids"].values()
    want, count = dull_map(chips, cube, grid, blend)
    np.testing.assert_array_equal(seen["count"].values, count)
    np.testing.assert_allclose(seen["values"].values, want, rtol=1e-6, atol=1e-6)
    assert (seen["count"].values > 0).mean() > 0.9
