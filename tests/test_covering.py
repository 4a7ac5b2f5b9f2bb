"""Chips that cover an area, painted pixel by pixel: no pixel is left out, and explain() tells the share of ground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made_records import collection, record
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.chipping.covering import map_extents

PIXEL = 10.0
EDGES = st.sampled_from(["shift", "pad"])
SOME = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Scene:
    """Rasters of 10 m pixels: EPSG code, west, north, width and height in pixels."""

    epsg: int
    west: float
    north: float
    px: tuple[int, int]

    @property
    def box(self) -> Any:
        """The raster's rectangle in its CRS."""
        return shapely.box(
            self.west, self.north - self.px[1] * PIXEL, self.west + self.px[0] * PIXEL, self.north
        )


def scenes_of(*scenes: Scene) -> rd.Collection:
    """Return a record a scene."""
    return collection(
        "s2",
        *(record(f"r{n}", west=s.west, north=s.north, px=s.px, epsg=s.epsg) for n, s in enumerate(scenes)),
    )


def to_degrees(epsg: int, x: Any, y: Any) -> tuple[Any, Any]:
    """Return longitudes and latitudes."""
    return pyproj.Transformer.from_crs(epsg, 4326, always_xy=True).transform(x, y)


@dataclass(frozen=True)
class Painted:
    """How many chips lie over each pixel of a map, and which pixels are asked for."""

    count: NDArray[np.int64]
    asked: NDArray[np.bool_]


def painted(
    chips: rd.Chips, code: int, scenes: list[Scene], area: Any, zone: int | None, margin: int = 90
) -> Painted:
    """Paint the chips of one map, and what of the area records lie on, by pyproj and NumPy alone."""
    rows = [r for r in chips.table.drop_columns(["feeds", "geometry"]).to_pylist() if r["epsg"] == code]
    own = [r for r in rows if r["epsg"] == code]
    west = min(r["xmin"] for r in own) - margin * PIXEL
    north = max(r["ymax"] for r in own) + margin * PIXEL
    width = round((max(r["xmax"] for r in own) - west) / PIXEL) + margin
    height = round((north - min(r["ymin"] for r in own)) / PIXEL) + margin
    count = np.zeros((height, width), dtype=np.int64)
    for r in own:
        row, col = (north - r["ymax"]) / PIXEL, (r["xmin"] - west) / PIXEL
        assert row == pytest.approx(round(row), abs=1e-6)
        assert col == pytest.approx(round(col), abs=1e-6)
        side = chips.planned.spec.size
        count[round(row) : round(row) + side, round(col) : round(col) + side] += 1
    x = west + (np.arange(width) + 0.5) * PIXEL
    y = north - (np.arange(height) + 0.5) * PIXEL
    x, y = np.meshgrid(x, y)
    lon, lat = to_degrees(code, x, y)
    asked = np.zeros(x.shape, dtype=bool)
    for scene in scenes:
        px, py = pyproj.Transformer.from_crs(4326, scene.epsg, always_xy=True).transform(lon, lat)
        left, low, right, high = scene.box.bounds
        asked |= (px > left) & (px < right) & (py > low) & (py < high)
    if area is not None:
        asked &= shapely.contains_xy(area, lon, lat)
    if zone is not None:
        asked &= np.floor((lon + 180) / 6) + 1 == zone
    return Painted(count, asked)


@st.composite
def areas(draw: st.DrawFn, scenes: list[Scene]) -> Any:
    """Draw nothing, a box or a triangle on the ground of scenes, in degrees."""
    kind = draw(st.sampled_from(["none", "box", "triangle"]))
    if kind == "none":
        return None
    corners = [
        to_degrees(
            s.epsg, s.west + draw(st.floats(-30, 330)) * PIXEL, s.north - draw(st.floats(-30, 330)) * PIXEL
        )
        for s in (scenes * 3)[:3]
    ]
    if kind == "box":
        (a, b), (c, d) = corners[:2]
        area = shapely.box(min(a, c), min(b, d), max(a, c), max(b, d))
    else:
        area = shapely.Polygon(corners)
    ground = shapely.union_all(
        [shapely.Polygon(np.stack(to_degrees(s.epsg, *shapely.get_coordinates(s.box).T), -1)) for s in scenes]
    )
    assume(shapely.intersection(area, ground).area > (20 * PIXEL / 111_000) ** 2)
    return area


@st.composite
def single(draw: st.DrawFn, epsg: int = 32633) -> list[Scene]:
    """Draw one or two scenes of one CRS."""
    north = 5_400_000.0 if epsg < 32700 else 6_200_000.0
    west = 500_000.0 + draw(st.sampled_from([0.0, 3.0, 1234.0]))
    px = st.tuples(st.integers(20, 300), st.integers(20, 300))
    first = Scene(epsg, west, north, draw(px))
    if draw(st.booleans()):
        return [first]
    return [first, Scene(epsg, west + 1500.0, north - 900.0, draw(px))]


@st.composite
def border(draw: st.DrawFn) -> list[Scene]:
    """Draw scenes on both sides of the border of zones 32 and 33."""
    x, y = pyproj.Transformer.from_crs(4326, 32632, always_xy=True).transform(12.0, 48.0)
    u, v = pyproj.Transformer.from_crs(4326, 32633, always_xy=True).transform(12.0, 48.0)
    across = draw(st.integers(20, 200))
    return [
        Scene(32632, round(x, -1) - 1500.0, round(y, -1), (150 + across, draw(st.integers(60, 250)))),
        Scene(
            32633,
            round(u, -1) - 10.0 * draw(st.integers(0, 150)),
            round(v, -1) - 300.0,
            (draw(st.integers(60, 300)), 200),
        ),
    ]


def check(chips: rd.Chips, scenes: list[Scene], area: Any, zones: bool = True) -> None:
    """Every pixel that is asked for lies in a chip; ids are distinct; the map holds the area, and no more."""
    ids = chips.table["chip_id"].to_pylist()
    assert len(ids) == len(set(ids))
    extents = map_extents(chips.planned)
    codes = sorted(set(chips.table["epsg"].to_pylist()))
    assert sorted(extents) == codes
    for code in codes:
        zone = code - 32600 if zones else None
        paint = painted(chips, code, scenes, area, zone)
        assert (paint.count[paint.asked] >= 1).all()


@SOME
@given(st.data(), st.integers(5, 80), EDGES)
def test_every_pixel_of_a_zone_is_in_a_chip(data: st.DataObject, size: int, edge: Any) -> None:
    scenes = data.draw(single(data.draw(st.sampled_from([32633, 32733]))))
    area = data.draw(areas(scenes))
    stride = data.draw(st.integers(max(size // 4, 1), size))
    chips = scenes_of(*scenes).chips(size, stride, cover=True, edge=edge, aoi=area)
    scenes = [
        Scene(32633, s.west, s.north - 10_000_000 * (s.epsg == 32733), s.px) if s.epsg == 32733 else s
        for s in scenes
    ]
    check(chips, scenes, area)


@SOME
@given(st.data(), st.integers(5, 80), EDGES)
def test_every_pixel_at_the_border_of_zones_is_in_a_chip(data: st.DataObject, size: int, edge: Any) -> None:
    scenes = data.draw(border())
    area = data.draw(areas(scenes))
    stride = data.draw(st.integers(max(size // 4, 1), size))
    chips = scenes_of(*scenes).chips(size, stride, cover=True, edge=edge, aoi=area)
    check(chips, scenes, area)
