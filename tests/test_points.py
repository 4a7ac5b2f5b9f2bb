"""A point's value is that of the file's own pixel that it lies in: rasterio's ``sample`` is the oracle."""

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
from rasterio.warp import transform

import rasteret_dask as rd

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")

SIDE = 96

PLACES = {
    "its own zone": (32620, 600_015.0, -340_995.0),
    "beyond its zone": (32620, 842_015.0, -340_995.0),
    "the southern twin": (32720, 842_015.0, 9_659_005.0),
    "Europe": (3035, 4_300_000.0, 3_000_000.0),
    "the United States": (5070, -106_095.0, 1_807_605.0),
    "the north pole": (3413, -1_500.0, 1_200.0),
    "the south pole": (3031, -1_500.0, 1_200.0),
    "degrees": (4326, 14.01, 50.02),
    "degrees near a pole": (4326, 14.01, 88.9),
    "degrees in the far south": (4326, -164.004, -85.2),
    "feet": (2264, 1_500_000.0, 600_000.0),
}
SHAPES = {
    "squares": (1.0, -1.0), "wide": (3.0, -1.0), "high": (1.0, -2.5), "odd": (20.0027, -20.0283),
    "south up": (1.0, 1.0), "south up and wide": (1.7, 0.6),
}  # fmt: skip


def write(
    path: Path, epsg: int, corner: tuple[float, float], pixel: tuple[float, float], seed: int = 0
) -> Path:
    values = np.random.default_rng(seed).integers(1, 60_000, (SIDE, SIDE)).astype(np.uint16)
    values[:3] = 0
    with rasterio.open(
        path, "w", driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint16", nodata=0, crs=f"EPSG:{epsg}",
        transform=Affine(pixel[0], 0, corner[0], 0, pixel[1], corner[1]), tiled=True, blockxsize=32, blockysize=32,
    ) as file:  # fmt: skip
        file.write(values, 1)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.average)
    return path


def collection(records: dict[str, dict[str, Path]]) -> rd.Collection:
    kind = pa.map_(pa.string(), pa.struct([("href", pa.string())]))
    table = pa.table(
        {
            "id": list(records),
            "datetime": pa.array([dt.datetime(2023, 7, 1 + n, 10, tzinfo=dt.UTC) for n in range(len(records))],
                                 pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(len(records), pa.binary()),
            "assets": pa.array([[(b, {"href": str(p)}) for b, p in own.items()] for own in records.values()], kind),
        }
    )  # fmt: skip
    return rd.build_from_table(table, name="own")


def sampled(path: Path, lon: Any, lat: Any) -> list[int | None]:
    with rasterio.open(path) as file:
        places = zip(*transform("EPSG:4326", file.crs, list(lon), list(lat)), strict=True)
        found = [int(v[0]) for v in file.sample(places)]
    return [v or None for v in found]


def inside(path: Path, rng: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Points anywhere in the raster, some on the edges and corners of pixels."""
    with rasterio.open(path) as file:
        at = rng.uniform(0.01, SIDE - 0.01, (count, 2))
        at[: count // 4] = np.round(at[: count // 4])
        at = np.clip(at, 0.01, SIDE - 0.01)
        lon, lat = transform(file.crs, "EPSG:4326", *file.transform @ at.T)
        return lon, lat


@pytest.mark.parametrize("place", PLACES)
def test_a_point_has_the_files_own_pixel(tmp_path: Path, place: str) -> None:
    epsg, west, north = PLACES[place]
    unit = 30.0 if epsg != 4326 else 1 / 3600
    paths = {
        shape: write(tmp_path / f"{shape}.tif", epsg, (west, north), (unit * wide, unit * high), seed)
        for seed, (shape, (wide, high)) in enumerate(SHAPES.items())
    }
    made = collection({shape: {"B04": path} for shape, path in paths.items()})
    for shape, path in paths.items():
        lon, lat = inside(path, np.random.default_rng(1), 40)
        with rasterio.open(path) as file:  # not on edges: degrees and metres do not convert to the last digit
            at = ~file.transform @ np.array(transform("EPSG:4326", file.crs, lon, lat))
        clear = np.abs(at - np.round(at)).min(0) > 1e-4
        lon, lat = np.array(lon)[clear], np.array(lat)[clear]
        found = made.where("id", "==", shape).sample_points(list(zip(lon, lat, strict=True)), ["B04"])
        assert found["value"].to_pylist() == sampled(path, lon, lat)
        assert set(found["raster_crs"].to_pylist()) == {32620 if epsg == 32720 else epsg}


def test_records_of_many_maps_are_sampled_together(tmp_path: Path) -> None:
    """One place, four maps and pixel shapes, two bands of other pixels each: every value is its own file's."""
    lon, lat = 17.98, 48.5  # where zones 33 and 34 meet
    records: dict[str, dict[str, Path]] = {}
    for number, (epsg, pixel) in enumerate(
        ((32633, (10.0, -10.0)), (32634, (20.0, -15.0)), (3035, (30.0, 30.0)), (4326, (1 / 3600, -1 / 5400)))
    ):
        (x,), (y,) = transform("EPSG:4326", f"EPSG:{epsg}", [lon], [lat])
        own = {}
        for band, factor in (("B04", 1.0), ("B11", 2.0)):
            size = (pixel[0] * factor, pixel[1] * factor)
            corner = (x - size[0] * 40.3, y - size[1] * 40.3)
            own[band] = write(
                tmp_path / f"{number}{band}.tif", epsg, corner, size, seed=2 * number + (factor > 1)
            )
        records[f"r{number}"] = own
    made = collection(records)
    rng = np.random.default_rng(5)
    lons, lats = lon + rng.uniform(-0.003, 0.003, 40), lat + rng.uniform(-0.002, 0.002, 40)
    found = made.sample_points(list(zip(lons, lats, strict=True)), ["B04", "B11"])
    for name, own in records.items():
        for band, path in own.items():
            part = found.filter((pa.compute.field("record_id") == name) & (pa.compute.field("band") == band))
            assert part["value"].to_pylist() == sampled(path, lons, lats)
    codes = found.filter(pa.compute.field("band") == "B04")["raster_crs"].to_pylist()
    assert codes[:4] == [32633, 32634, 3035, 4326]
    # what harmonize says of pixels is not what a point has
    coarse = made.harmonize(bands=["B04"], resolution=240, resampling="average").sample_points([(lon, lat)])
    assert coarse["value"].to_pylist() == [sampled(own["B04"], [lon], [lat])[0] for own in records.values()]
    nearest = made.harmonize(bands=["B04"], time="1MS").sample_points([(lon, lat)])
    assert nearest["value"].to_pylist()[0] in [
        sampled(own["B04"], [lon], [lat])[0] for own in records.values()
    ]


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rd.Collection]:
    path = write(tmp_path_factory.mktemp("edges") / "a.tif", 32633, (500_000.0, 5_540_000.0), (10.0, -10.0))
    return path, collection({"a": {"B04": path}})


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(4, SIDE - 1), st.integers(1, SIDE - 1)), min_size=1, max_size=20))
def test_on_an_edge_the_pixel_right_and_below_counts(
    edges: tuple[Path, rd.Collection], corners: list[tuple[int, int]]
) -> None:
    path, made = edges
    with rasterio.open(path) as file:
        values = file.read(1)
        places = [file.transform @ (col, row) for row, col in corners]
        lon, lat = transform(file.crs, "EPSG:4326", *map(list, zip(*places, strict=True)))
    found = made.sample_points(list(zip(lon, lat, strict=True)), ["B04"])
    assert found["value"].to_pylist() == [int(values[row, col]) for row, col in corners]


def test_points_on_the_far_side_have_no_value(edges: tuple[Path, rd.Collection]) -> None:
    path, made = edges
    lon, lat = inside(path, np.random.default_rng(2), 4)
    far = [(-165.0, -50.0), (15.0, -89.0), (195.0, 89.9), (0.0, 0.0)]
    found = made.sample_points([*far, *zip(lon, lat, strict=True)], ["B04"])
    assert found["value"].to_pylist() == [None] * 4 + sampled(path, lon, lat)
    assert found["record_id"].to_pylist() == [None] * 4 + ["a"] * 4


def test_a_raster_that_counts_from_0_to_360_is_where_it_is(tmp_path: Path) -> None:
    """Its pixels, chips and points are those of the same raster that counts from -180; so across 180 degrees."""
    pixel = (1 / 3600, -1 / 3600)
    twins = [collection({"a": {"B04": write(tmp_path / f"{n}.tif", 4326, (west, 10.0), pixel)}})
             for n, west in enumerate((190.0, -170.0))]  # fmt: skip
    at = [(190 + n / 3600, 10 - 20.5 / 3600) for n in (0.5, 40.5, 60.5, 95.5)]
    for counted in (at, [(x - 360, y) for x, y in at]):
        first, second = (made.sample_points(counted, ["B04"])["value"].to_pylist() for made in twins)
        assert first == second
        assert None not in first
    chips = [made.harmonize(resolution=30).chips(16, cell_km=0.48, min_coverage=0.5).load() for made in twins]
    np.testing.assert_array_equal(chips[0].pixels.values, chips[1].pixels.values)
    assert chips[0].sizes["chip"] > 20
    assert (chips[0].valid_fraction.values > 0.8).mean() > 0.8
    path = write(tmp_path / "across.tif", 4326, (179.99, 10.0), pixel)
    lon, lat = 179.99 + np.arange(0.5, SIDE) / 3600, np.full(SIDE, 10 - 30.5 / 3600)
    found = collection({"a": {"B04": path}}).sample_points(list(zip(lon, lat, strict=True)), ["B04"])
    with rasterio.open(path) as file:
        assert found["value"].to_pylist() == file.read(1)[30].tolist()
