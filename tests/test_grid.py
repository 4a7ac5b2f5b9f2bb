"""The lattice: cell -> bounds -> cell, and what pyproj says of zones and edges."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_utm_crs_info

import rasteret_dask as rd
from rasteret_dask.grid import (
    FALSE_NORTHING_M,
    Lattice,
    bounds_in,
    is_utm,
    northern,
    snap,
    utm_zone,
    zone_epsg,
)


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    pixel = draw(st.sampled_from([10.0, 30.0, 0.5, 60.0]))
    size = draw(st.integers(1, 256))
    stride = draw(st.integers(1, 2 * size))
    cell = draw(st.sampled_from([640.0, 5120.0, 15360.0, 1000.0]))
    assume(size * pixel <= cell)
    assume(cell / (stride * pixel) < 300)
    return Lattice(cell, size * pixel, stride * pixel)


CELLS = st.tuples(st.integers(-1000, 1000), st.integers(0, 100))


@given(lattices(), st.lists(CELLS, min_size=1, max_size=5), st.data())
def test_cells_and_bounds_and_back(
    lattice: Lattice, split: list[tuple[int, int]], data: st.DataObject
) -> None:
    split_cells = np.unique(np.array(split), axis=0)
    n = lattice.per_side
    row, col = (data.draw(st.integers(0, n - 1)) for _ in range(2))
    cells = split_cells * n + [row, col]
    assert (lattice.split_cell_of(cells) == split_cells).all()
    bounds, outer = lattice.bounds(cells), lattice.split_bounds(split_cells)
    edge = 1e-6 * lattice.chip_m
    assert (bounds[:, :2] >= outer[:, :2] - edge).all()
    assert (bounds[:, 2:] <= outer[:, 2:] + edge).all()
    np.testing.assert_allclose(bounds[:, 2] - bounds[:, 0], lattice.chip_m, rtol=0, atol=1e-6)
    # From the north-west corner, by strides; south is down.
    np.testing.assert_allclose(bounds[:, 0], outer[:, 0] + col * lattice.stride_m, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bounds[:, 3], outer[:, 3] - row * lattice.stride_m, rtol=0, atol=1e-6)


@given(lattices())
def test_a_split_cell_holds_its_chips_and_a_strip(lattice: Lattice) -> None:
    n = lattice.per_side
    reach = (n - 1) * lattice.stride_m + lattice.chip_m
    assert reach + lattice.unused_m == pytest.approx(lattice.cell_m)
    assert lattice.unused_m >= 0
    assert reach + lattice.stride_m > lattice.cell_m - 1e-3  # one more would not fit
    if n < 40:
        cells = lattice.chip_cells(np.array([[3, 4], [-1, 0]]))
        assert cells.shape == (2 * n * n, 2)
        assert len(np.unique(cells, axis=0)) == len(cells)
        assert set(map(tuple, lattice.split_cell_of(cells).tolist())) == {(3, 4), (-1, 0)}


def test_sizes_of_the_default_cell() -> None:
    for pixel, size, strip in (
        (10, 64, 0),
        (10, 512, 0),
        (30, 64, 0),
        (30, 512, 0),
        (10, 224, 1920),
        (10, 1536, 0),
    ):
        assert Lattice(15360.0, size * pixel, size * pixel).unused_m == strip


@pytest.mark.parametrize(("chip", "stride"), [(0, 10), (101, 10), (10, 0)])
def test_a_lattice_that_cannot_be(chip: float, stride: float) -> None:
    with pytest.raises(rd.GridError):
        Lattice(100.0, chip, stride)


@given(
    st.floats(-1e6, 1e6),
    st.floats(-1e7, 1e7),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.sampled_from([10.0, 30.0, 0.3]),
)
def test_snapping_moves_east_and_south_by_less_than_a_pixel(
    x: float, y: float, px: float, py: float, pixel: float
) -> None:
    bounds = np.array([[x, y - 5 * pixel, x + 5 * pixel, y]])
    moved = snap(bounds, (px, py), pixel)[0]
    east, south = moved[0] - x, y - moved[3]
    assert -1e-5 * pixel <= east < pixel
    assert -1e-5 * pixel <= south < pixel
    for edge, phase in ((moved[0], px), (moved[3], py)):
        steps = (edge - phase) / pixel
        assert abs(steps - round(steps)) < 1e-5
    again = snap(moved[None], (px, py), pixel)[0]
    np.testing.assert_allclose(again, moved, rtol=0, atol=1e-5 * pixel)


def test_cells_lie_where_pixel_edges_are_already() -> None:
    bounds = np.array([[499200.0, 5180160.0, 501760.0, 5182720.0]])
    assert (snap(bounds, (300000.0, 5200020.0), 10.0) == bounds).all()
    landsat = snap(bounds, (15.0, 15.0), 30.0)  # 0 and 10 mod 30; edges are 15 mod 30
    assert (landsat - bounds).tolist() == [[15.0, -25.0, 15.0, -25.0]]


@given(st.floats(-180, 180, exclude_max=True), st.floats(-79.9, 83.9))
def test_zones_are_those_of_the_epsg_registry(lon: float, lat: float) -> None:
    assume(abs(lon / 6 - round(lon / 6)) > 1e-6)
    if 56 <= lat < 64 and 3 <= lon < 12:
        expected = 32
    elif lat >= 72 and 0 <= lon < 42:
        expected = 31 if lon < 9 else 33 if lon < 21 else 35 if lon < 33 else 37
    else:
        expected = int((lon + 180) // 6) + 1
    assert utm_zone(lon, lat) == expected
    assert utm_zone(lon + 360, lat) == expected


def test_zones_agree_with_proj_s_database() -> None:
    for lon, lat in ((14.9, 48.7), (-43.9, -20.1), (151.2, -33.9), (-179.9, 10.0), (179.9, -10.0)):
        found = query_utm_crs_info("WGS 84", AreaOfInterest(lon, lat, lon, lat))
        zones = {int(c.code) % 100 for c in found if c.name.startswith("WGS 84 / UTM zone")}
        assert int(utm_zone(lon, lat)) in zones


@pytest.mark.parametrize(("lat", "word"), [(84.1, "84"), (-80.5, "80")])
def test_there_are_no_zones_at_the_poles(lat: float, word: str) -> None:
    with pytest.raises(rd.GridError, match=word):
        utm_zone([0.0, 10.0], [0.0, lat])


@given(st.integers(1, 60), st.floats(-3, 3), st.floats(-79, -0.01))
def test_south_is_north_moved_by_ten_million(zone: int, off: float, lat: float) -> None:
    lon = 6 * zone - 183 + off
    code, shift = northern(32700 + zone)
    assert (code, shift) == (zone_epsg(zone), -FALSE_NORTHING_M)
    south = pyproj.Transformer.from_crs(4326, 32700 + zone, always_xy=True).transform(lon, lat)
    north = pyproj.Transformer.from_crs(4326, code, always_xy=True).transform(lon, lat)
    np.testing.assert_allclose((south[0], south[1] + shift), north, rtol=0, atol=1e-6)
    assert northern(code) == (code, 0.0)
    assert northern(4326) == (4326, 0.0)


def test_utm_zones_are_those_that_the_registry_calls_so() -> None:
    """326zz and 327zz have neighbours: UPS, and zones in feet (EPSG:32664 to 32667)."""
    for code in range(32600, 32800):
        try:
            name = pyproj.CRS.from_epsg(code).name
        except pyproj.exceptions.CRSError:
            name = ""
        assert is_utm(code) == name.startswith("WGS 84 / UTM zone"), (code, name)


def test_bounds_in_another_crs_hold_all_points() -> None:
    box = (300000.0, 5290200.0, 409800.0, 5400000.0)
    x, y = (g.ravel() for g in np.meshgrid(np.linspace(box[0], box[2], 50), np.linspace(box[1], box[3], 50)))
    lon, lat = pyproj.Transformer.from_crs(32633, 4326, always_xy=True).transform(x, y)
    west, south, east, north = bounds_in(box, 32633, 4326)
    assert west <= lon.min() + 1e-9
    assert south <= lat.min() + 1e-9
    assert east >= lon.max() - 1e-9
    assert north >= lat.max() - 1e-9
    assert bounds_in(box, 32633, 32633) == box


@given(st.floats(-1e6, 1e6), st.floats(-9e6, 9e6), st.floats(1, 40_000), st.floats(1, 40_000))
def test_split_cells_of_bounds_are_all_that_touch_them(
    x: float, y: float, width: float, height: float
) -> None:
    lattice = Lattice(15360.0, 2560.0, 2560.0)
    bounds = (x, y, x + width, y + height)
    own = lattice.split_bounds(lattice.split_cells(bounds))
    assert (own[:, 0] < bounds[2]).all()
    assert (own[:, 2] > bounds[0]).all()
    assert (own[:, 1] < bounds[3]).all()
    assert (own[:, 3] > bounds[1]).all()
    shared = np.minimum(own[:, 2:], bounds[2:]) - np.maximum(own[:, :2], bounds[:2])
    assert shared.prod(axis=1).sum() == pytest.approx(width * height, rel=1e-3)
