"""Outlines in lon/lat, also where the world is sewn together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import mapping

from rasteret_dask.footprint import corners_of, outline_of


def read(geometry: Any, bbox: Any = None, epsg: int | None = None) -> Any:
    found = outline_of(None if geometry is None else mapping(geometry), bbox, epsg)
    return None if found is None else shapely.from_wkb(found)


def at(shape: Any, lon: float, lat: float) -> bool:
    return bool(shapely.intersects(shape, shapely.Point(lon, lat)))


def test_an_ordinary_outline_is_itself() -> None:
    outline = shapely.Polygon([(6, 44), (7.1, 44.1), (7, 45), (6, 45)])
    assert read(outline, [6, 44, 7.1, 45], 32632).equals(outline)
    assert read(outline).equals(outline)
    assert read(shapely.force_3d(outline, 10)).equals(outline)


@pytest.mark.parametrize(
    ("ring", "bbox", "epsg"),
    [
        (
            [(179, -17), (-179, -17), (-179, -16), (179, -16)],
            [179, -17, -179, -16],
            None,
        ),  # the long way round
        ([(179, -17), (-179, -17), (-179, -16), (179, -16)], None, 32760),
        ([(179, -17), (-179, -17), (-179, -16), (179, -16)], None, None),
        ([(179, -17), (181, -17), (181, -16), (179, -16)], None, None),  # beyond 180
        ([(-181, -17), (-179, -17), (-179, -16), (-181, -16)], None, None),
    ],
)
def test_an_outline_across_the_antimeridian_is_in_two_parts(ring: Any, bbox: Any, epsg: int | None) -> None:
    found = read(shapely.Polygon(ring), bbox, epsg)
    assert found.geom_type == "MultiPolygon"
    assert math.isclose(found.area, 2.0)
    assert at(found, 179.5, -16.5)
    assert at(found, -179.5, -16.5)
    assert not at(found, 0, -16.5)
    again = outline_of(mapping(found), [179, -17, -179, -16], epsg)
    assert shapely.from_wkb(again).equals(found)


def test_the_whole_world_stays_the_whole_world() -> None:
    world = shapely.box(-180, -90, 180, 90)
    assert read(world, [-180, -90, 180, 90]).equals(world)
    belt = shapely.box(-170, -10, 170, 10)  # 340 degrees wide, and means it: it has corners everywhere
    assert read(shapely.segmentize(belt, 10), [-170, -10, 170, 10]).area == belt.area


def test_at_the_poles() -> None:
    cap = shapely.box(-180, 84, 180, 90)
    assert read(cap, [-180, 84, 180, 90], 3413).equals(cap)
    svalbard = shapely.Polygon([(10, 80), (20, 80.5), (22, 82), (9, 81.5)])
    assert read(svalbard, None, 32633).equals(svalbard)


def test_without_geometry_the_box_counts() -> None:
    assert read(None, [6, 44, 7, 45]).equals(shapely.box(6, 44, 7, 45))
    assert read(None, [6, 44, 100, 7, 45, 900]).equals(shapely.box(6, 44, 7, 45))
    assert math.isclose(read(None, [179, -17, -179, -16]).area, 2.0)
    assert read(shapely.Polygon(), [6, 44, 7, 45]).equals(shapely.box(6, 44, 7, 45))
    assert read(None) is None
    assert read(None, [1, 2]) is None
    assert corners_of([math.nan, 0, 1, 1]) is None


@pytest.mark.parametrize(
    "ring", [[(500000, 4900000), (600000, 4900000), (600000, 5000000)], [(0, 0), (1, 91), (1, 0)]]
)
def test_metres_are_no_degrees(ring: Any) -> None:
    with pytest.raises(ValueError, match="no degrees"):
        read(shapely.Polygon(ring))


@given(st.floats(-179, 179), st.floats(-89, 88), st.floats(0.01, 5), st.floats(0.01, 1))
def test_a_scene_keeps_its_size_wherever_it_lies(lon: float, lat: float, width: float, height: float) -> None:
    def wrapped(x: float) -> float:
        return x - 360 if x > 180 else x

    east, north = lon + width, lat + height
    ring = [(wrapped(x), y) for x, y in ((lon, lat), (east, lat), (east, north), (lon, north))]
    found = read(shapely.Polygon(ring), None, 32601)
    assert math.isclose(found.area, width * height, rel_tol=1e-6)
    west, _, east, _ = found.bounds
    assert -180 <= west < east <= 180
