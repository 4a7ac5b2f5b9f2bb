"""A cube keeps the file's own pixels, whatever their shape and the order of its rows."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

import rasteret_dask as rd

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")

HEIGHT, WIDTH = 60, 84


def write(path: Path, epsg: int, corner: tuple[float, float], size: tuple[float, float], values: Any) -> Path:
    """Write rows from the north, or from the south where ``size`` is positive upwards; ``corner`` is north-west."""
    north = corner[1] if size[1] < 0 else corner[1] - size[1] * len(values)
    with rasterio.open(
        path, "w", driver="GTiff", width=values.shape[1], height=values.shape[0], count=1, dtype=values.dtype,
        crs=f"EPSG:{epsg}", transform=Affine(size[0], 0, corner[0], 0, size[1], north), tiled=True, blockxsize=32,
        blockysize=32, nodata=0,
    ) as file:  # fmt: skip
        file.write(values if size[1] < 0 else values[::-1], 1)
    return path


def collection(path: Path) -> rd.Collection:
    kind = pa.map_(pa.string(), pa.struct([("href", pa.string())]))
    table = pa.table(
        {
            "id": ["r"],
            "datetime": pa.array([dt.datetime(2023, 7, 23, tzinfo=dt.UTC)], pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(1, pa.binary()),
            "assets": pa.array([[("data", {"href": str(path)})]], kind),
        }
    )
    return rd.build_from_table(table, name="own")


def pixels() -> Any:
    return np.random.default_rng(0).integers(1, 60_000, (HEIGHT, WIDTH)).astype(np.uint16)


PLACES = {
    "squares": (32633, (500_000.0, 5_540_000.0), (10.0, 10.0)),
    "wide": (32633, (500_000.0, 5_540_000.0), (10.0, 5.0)),
    "high": (32633, (500_003.0, 5_540_001.0), (5.0, 10.0)),
    "decimated": (32618, (300_000.0, 280_000.0), (444.7851562, 453.5742188)),
    "degrees, 1.5 to 1": (4326, (-115.0, 54.0), (1 / 2400, 1 / 3600)),
    "degrees, 10 to 1, at a pole": (4326, (-164.004, -89.95), (1 / 120, 1 / 1200)),
    "a quad in NAD83": (26911, (400_000.1, 3_600_000.2), (0.5998477444, 0.5985985294)),
}  # fmt: skip


@pytest.mark.parametrize("south_up", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_cube_holds_the_files_own_pixels(tmp_path: Path, place: str, south_up: bool) -> None:
    epsg, corner, (wide, high) = PLACES[place]
    values = pixels()
    if epsg == 4326 and corner[1] < -89:
        values = values[:50]
    made = collection(write(tmp_path / "a.tif", epsg, corner, (wide, high if south_up else -high), values))
    cube = made.cube()
    np.testing.assert_array_equal(cube.values[0, 0], values)
    for axis, start, step, count in (("x", corner[0], wide, WIDTH), ("y", corner[1], -high, len(values))):
        np.testing.assert_allclose(
            cube[axis].values, start + (np.arange(count) + 0.5) * step, atol=1e-6 * wide
        )
    inner = (
        corner[0] + 10.2 * wide,
        corner[1] - 30.1 * high,
        corner[0] + 19.9 * wide,
        corner[1] - 20.3 * high,
    )
    if epsg == 4326:
        part = made.cube(bounds_latlon=inner)
        np.testing.assert_array_equal(part.values[0, 0], values[20:31, 10:20])


def test_chips_of_other_shapes_say_that_they_are_resampled(tmp_path: Path) -> None:
    for place, shorter in (("wide", 5.0), ("high", 5.0), ("squares", 10.0)):
        epsg, corner, (wide, high) = PLACES[place]
        chips = collection(write(tmp_path / f"{place}.tif", epsg, corner, (wide, -high), pixels())).chips(
            16, cell_km=0.16
        )
        report = chips.explain()
        assert report["resolution"] == {"own": shorter}
        resampled = int(place != "squares")
        assert report["pixels"]["own"]["resampled"] == resampled
        assert report["pixel_shapes"] == ({"own": [[wide, high]]} if resampled else {})
        assert (f"pixels of {wide:g} x {high:g}" in str(report)) == bool(resampled)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[rd.Collection]:
    """One raster, its rows from the north and from the south; 60 rows are no whole number of most coarser pixels."""
    folder = tmp_path_factory.mktemp("twins")
    return [
        collection(write(folder / f"{n}.tif", 32633, (500_000.0, 5_540_000.0), (10.0, high), pixels()))
        for n, high in enumerate((-10.0, 10.0))
    ]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([5.0, 7.0, 10.0, 15.0, 20.0, 35.0, 70.0]))
def test_a_raster_and_its_south_up_twin_give_the_same(twins: list[rd.Collection], resolution: float) -> None:
    first, second = (made.cube(resolution=resolution).compute() for made in twins)
    for axis in ("x", "y"):
        np.testing.assert_array_equal(first[axis].values, second[axis].values)
    np.testing.assert_array_equal(first.values, second.values)
    for made in twins:
        assert made.cube(resolution=resolution).y.values[0] == 5_540_000.0 - resolution / 2
    chips = [
        made.harmonize(resolution=resolution).chips(4, cell_km=4 * resolution / 1000).load() for made in twins
    ]
    np.testing.assert_array_equal(chips[0].pixels.values, chips[1].pixels.values)
    np.testing.assert_array_equal(chips[0].bounds.values, chips[1].bounds.values)
