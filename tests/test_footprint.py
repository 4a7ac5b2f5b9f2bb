"""Outlines in lon/lat, also where the world is sewn together."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import assume, given
from hypothesis import strategies as st
from shapely.geometry import mapping

from rasteret_dask.footprint import (
    area_of,
    box_around,
    box_of,
    corners_of,
    outline_of,
    placed_wkb,
    within_world,
)


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


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[tuple[float, float]], bool]:
    """Draw the corners of ground, longitudes counting on from the first; around a pole, or across the antimeridian."""
    corners = draw(st.integers(3, 8))
    turns = np.cumsum(draw(st.lists(st.floats(0.3, 1.0), min_size=corners, max_size=corners)))
    angle = (turns - turns[0]) / turns[-1] * 2 * math.pi
    around_pole = draw(st.booleans()) and corners >= 4
    if around_pole:
        assume(np.diff([*angle, 2 * math.pi]).max() < 3)  # an edge of half a turn goes round either way
        south = draw(st.booleans())
        lat = np.array(draw(st.lists(st.floats(60, 89), min_size=corners, max_size=corners)))
        lon = draw(st.floats(-180, 180)) + np.degrees(angle)
        return list(zip(lon.tolist(), np.where(south, -lat, lat).tolist(), strict=True)), True
    far = np.array(draw(st.lists(st.floats(1, 15), min_size=corners, max_size=corners)))
    east, north = draw(st.floats(165, 195)), draw(st.floats(-70, 70))
    if draw(st.booleans()):
        east, far = round(east), np.round(far)
    ring = zip((east + far * np.cos(angle)).tolist(), (north + far * np.sin(angle)).tolist(), strict=True)
    return list(ring), False


def spelled(draw: Any, ring: list[tuple[float, float]]) -> Any:
    """The same ring: counted from -180, from 0 or on and on, either way round, from any corner."""
    count = draw(st.sampled_from(["from -180", "from 0", "on", "from -360"]))
    low = {"from -180": -180.0, "from 0": 0.0, "from -360": -360.0}
    if count != "on":
        ring = [((x - low[count]) % 360 + low[count], y) for x, y in ring]
    if max(abs(x) for x, _ in ring) > 360:
        ring = [(x - 360, y) for x, y in ring]
    first = draw(st.integers(0, len(ring) - 1))
    ring = ring[first:] + ring[:first]
    return shapely.Polygon(ring[::-1] if draw(st.booleans()) else ring)


def true_ground(ring: list[tuple[float, float]], around_pole: bool) -> Any:
    """Longitudes from 0: an own plane for the antimeridian; around a pole the strip up to it, cut by hand."""
    if not around_pole:
        return shapely.make_valid(shapely.Polygon(ring))
    pole = math.copysign(90, ring[0][1])
    ring = [*ring, (ring[0][0] + 360, ring[0][1])]
    strips = [shapely.Polygon([a, b, (b[0], pole), (a[0], pole)]) for a, b in itertools.pairwise(ring)]
    return shapely.union_all(strips)


def on_a_turn(ground: Any, start: float) -> Any:
    """The ground with longitudes from ``start`` to 360 degrees beyond."""
    world = shapely.box(start, -90, start + 360, 90)
    turned = [
        shapely.intersection(shapely.transform(ground, lambda p, t=t: p + np.array([t, 0.0])), world)
        for t in (-720.0, -360.0, 0.0, 360.0, 720.0)
    ]
    return shapely.union_all(turned)


@given(rings(), st.data())
def test_the_same_ground_is_the_same_outline_however_it_is_spelled(ring: Any, data: st.DataObject) -> None:
    corners, around_pole = ring
    wanted = on_a_turn(true_ground(corners, around_pole), -180)
    assume(wanted.area > 0.5)
    polygon = spelled(data.draw, corners)
    for outline in (
        read(polygon),
        within_world(polygon),
        shapely.from_wkb(placed_wkb(shapely.to_wkb(polygon))),
    ):
        assert outline.is_valid
        assert -180 <= outline.bounds[0] <= outline.bounds[2] <= 180
        assert shapely.symmetric_difference(outline, wanted).area < 1e-6
        if around_pole:
            # off whole degrees, so that no seam between two parts, of 1e-60 degrees say, lies just there
            lon = data.draw(st.integers(-180, 179)) + 0.4321
            assert at(outline, lon, math.copysign(89.5, corners[0][1]))


@given(rings(), st.floats(0.2, 0.8))
def test_a_hole_stays_a_hole(ring: Any, share: float) -> None:
    corners, around_pole = ring
    pole = math.copysign(90, corners[0][1])
    middle = np.mean(corners, axis=0)
    hole = [
        (x, pole - (pole - y) * share) if around_pole else (middle[0] + (x - middle[0]) * share,
                                                            middle[1] + (y - middle[1]) * share)
        for x, y in corners
    ]  # fmt: skip
    assume(around_pole or shapely.Polygon(corners, [hole]).is_valid)
    wanted = shapely.difference(true_ground(corners, around_pole), true_ground(hole, around_pole))
    wanted = on_a_turn(wanted, -180)

    def counted(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x + 180) % 360 - 180, y) for x, y in points]

    polygon = shapely.Polygon(counted(corners), [counted(hole)])
    assume(wanted.area > 0.5)
    assert shapely.symmetric_difference(read(polygon), wanted).area < 1e-6


@pytest.mark.parametrize("south", [False, True])
def test_a_raster_over_a_pole_holds_the_pole(south: bool) -> None:
    # the four corners of a square of 2,000 km around the pole, as items give them
    lat = -80.9 if south else 80.9
    square = shapely.Polygon([(45, lat), (135, lat), (-135, lat), (-45, lat)])
    for way in (square, square.reverse()):
        outline = read(way, [-180, *sorted((lat, math.copysign(90, lat)))[:1], 180, max(lat, 90 if not south else lat)],
                       3031 if south else 3413)  # fmt: skip
        for lon in (-180, -90, 0, 5, 60, 179.99, 180):
            assert at(outline, lon, math.copysign(86, lat))
            assert not at(outline, lon, math.copysign(79, lat))


def test_areas_of_half_the_world_are_what_they_are() -> None:
    for area in (
        shapely.box(-179.9, -60, 179.9, 75),  # a rectangle is taken at its word
        shapely.Polygon([(-10, 35), (175, 40), (180, 75), (-10, 72)]),  # Eurasia, drawn by hand
        shapely.Point(3, 4),
        shapely.LineString([(-100, 3), (100, 4)]),
    ):
        assert within_world(area).equals(area)
    assert within_world(shapely.Point(185, 1)).equals(shapely.Point(-175, 1))
    both = within_world(shapely.GeometryCollection([shapely.Point(185, 1), shapely.box(179, 0, 181, 1)]))
    assert at(both, -175, 1)
    assert at(both, -179.5, 0.5)
    assert not at(both, 0, 0.5)


@given(st.floats(-180, 179.9), st.floats(0.1, 350), st.sampled_from([-360.0, 0.0, 360.0]), st.floats(-80, 80))
def test_a_box_is_the_same_in_every_count(west: float, width: float, turn: float, south: float) -> None:
    def counted(x: float) -> float:
        return (x + 180) % 360 - 180

    north, east = south + 1, west + width
    wanted = area_of([(counted(west), south, counted(east), north)])
    assume(counted(west) != counted(east) and abs(west + turn) <= 360 and abs(east + turn) <= 360)
    turned = area_of([(west + turn, south, east + turn, north)])
    assert shapely.symmetric_difference(turned, wanted).area < 1e-6
    around = area_of([box_around(turned)])
    assert shapely.area(shapely.difference(turned, around)) < 1e-6
    assert around.area < wanted.area + 1e-6 or width > 180


def test_a_records_box_lies_around_its_outline() -> None:
    outline = outline_of(mapping(shapely.box(10, 1, 12, 2)), None)
    assert box_of(outline, [9, 0, 13, 3]) == [9, 0, 13, 3]
    for beside in (None, [10.5, 1, 12, 2], [370, 1, 372, 2], [13, 0, 9, 3], [1, 2]):
        assert box_of(outline, beside) == [10, 1, 12, 2]
    assert box_of(None, (1, 2, 3, 4)) == [1, 2, 3, 4]
    assert box_of(None, None) is None
