# SPDX-License-Identifier: Apache-2.0
"""Where chips may lie: the grids that a plan can choose, each a value that knows which zone holds a place.

A zone is a part of the ground with one lattice of split cells: a CRS, an origin, an extent, and a name that ids begin
with. Zones are called by the number of their CRS (:mod:`rasteret_dask.crs`); no two zones of a grid have the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from rasteret_dask.crs import crs_of, number, spelled, text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.footprint import area_of
from rasteret_dask.grid import (
    UPS_NORTH,
    UPS_SOUTH,
    Bounds,
    bounds_in,
    northern,
    transformer,
    utm_zone,
    zone_epsg,
)

__all__ = [
    "UTM",
    "BoxGrid",
    "ChipGrid",
    "CrsGrid",
    "FileGrid",
    "TileGrid",
    "UtmGrid",
    "Zones",
    "chip_grid",
    "overlap",
    "shared_degrees",
    "tile_km",
]

UTM_LATITUDES = (-80.0, 84.0)
"""Degrees between which UTM has zones; both edges belong to UTM."""

ZONE_REACH = 6.5
"""Degrees from a zone's central meridian to its farthest cell: 6 in Svalbard, and half a wide cell's length."""

WIDE_CELLS = 56.0
"""Degrees north, where zones other than 6 degrees wide begin: those of Norway and Svalbard."""

AREA_REACH = 10.0
"""Degrees beyond the area of use of a CRS in which its lattice goes on: Greenland's south is outside of EPSG:3413's."""

PARALLEL_M = 660_000.0
"""Radius of the parallel where UTM ends, at least, on the polar maps; metres."""

METRIC = (
    "Choose a CRS in metres: grid='EPSG:3035' (Europe), 'EPSG:5070' (USA), 'EPSG:3413' (Arctic), 'EPSG:6933' "
    "(the world, equal area), or grid='utm'."
)

WORDS = "'utm', 'tiles', 'files', a CRS such as 'EPSG:3035', an odc-geo GridSpec, or a GeoBox with a CRS"


class Zones(Protocol):
    """A grid of split cells: zones, and which of them holds a place."""

    @property
    def origin(self) -> tuple[float, float]:
        """The corner (x, y) of a split cell, in every zone."""

    def codes(self, lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the zone that holds each place, in degrees; 0 where none does."""

    def has(self, code: int) -> bool:
        """Return whether a number is that of a zone."""

    def name(self, code: int) -> str:
        """Return what ids of a zone's chips begin with."""

    def cell_name(self, code: int) -> str:
        """Return what names of a zone's split cells begin with."""

    def near(self, ground: Bounds) -> list[int]:
        """Return the zones, ascending, that a box in degrees may touch; its east may lie beyond 180."""

    def box(self, ground: Bounds, code: int) -> Bounds | None:
        """Return bounds in a zone's CRS that hold what cells of the zone may have in a box in degrees.

        None where there is nothing. A zone of :class:`CrsGrid` has no such box: places may lie anywhere on its map.
        """

    def holds(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which cells, shape (cell, 4) as xmin, ymin, xmax, ymax, belong to a zone."""

    def ground(self, code: int) -> Any:
        """Return the places of a zone as a shape in degrees, from -180 to 180."""

    def touched(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return zones that windows of a CRS touch, shape (window, n): of corners and centre, and near them."""


@dataclass(frozen=True, slots=True)
class UtmGrid:
    """The zones of UTM, in EPSG:326zz on both hemispheres; beyond 84 N and 80 S those of UPS (EPSG:32661, 32761)."""

    def __str__(self) -> str:
        return "utm"

    @property
    def zones(self) -> Zones:
        """The zones whose split cells decide splits."""
        return self

    @property
    def origin(self) -> tuple[float, float]:
        """The corner (x, y) of a split cell, in every zone."""
        return 0.0, 0.0

    def codes(self, lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the zone that holds each place, in degrees."""
        y = np.asarray(lat, dtype=np.float64)
        low, high = UTM_LATITUDES
        zone = zone_epsg(0) + utm_zone(lon, np.clip(y, low, high))
        zone = np.where(y > high, UPS_NORTH, np.where(y < low, UPS_SOUTH, zone))
        return np.asarray(zone, dtype=np.int64)

    def has(self, code: int) -> bool:
        """Return whether a number is that of a zone."""
        return zone_epsg(1) <= code <= zone_epsg(60) or code in (UPS_NORTH, UPS_SOUTH)

    def name(self, code: int) -> str:
        """Return what ids of a zone's chips begin with: ``"33"``, ``"upsn"``, ``"upss"``."""
        return f"{self.cell_name(code):0>2}"

    def cell_name(self, code: int) -> str:
        """Return what names of a zone's split cells begin with: ``"7"``, ``"upsn"``."""
        return {UPS_NORTH: "upsn", UPS_SOUTH: "upss"}.get(code, f"{code - zone_epsg(0)}")

    def near(self, ground: Bounds) -> list[int]:
        """Return the zones, ascending, that a box in degrees may touch; a zone of UTM is at least 3 degrees wide."""
        west, south, east, north = ground
        low = UTM_LATITUDES[0]
        if south >= low and north < WIDE_CELLS:
            first, last = (int(np.floor((lon + 180.0) / 6.0)) for lon in (west, east))
            return [zone_epsg(zone) for zone in sorted({turn % 60 + 1 for turn in range(first, last + 1)})]
        lon = np.linspace(west, east, int(east - west) + 9)
        lat = np.linspace(south, north, int(north - south) + 9)
        lat = np.union1d(lat, [edge for edge in UTM_LATITUDES if south <= edge <= north])
        return [int(code) for code in np.unique(self.codes(*np.meshgrid(lon, lat)))]

    def box(self, ground: Bounds, code: int) -> Bounds | None:
        """Return bounds in a zone's CRS that hold what cells of the zone may have in a box in degrees."""
        if code in (UPS_NORTH, UPS_SOUTH):
            return _polar_box(ground, code)
        middle = 6.0 * (code - zone_epsg(0)) - 183.0
        near = shared_degrees((middle - ZONE_REACH, -81.0, middle + ZONE_REACH, 85.0), ground)
        return None if near is None else bounds_in(near, 4326, code)

    def holds(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which cells belong to a zone: those whose centre lies in it."""
        lon, lat = transformer(code, 4326).transform(bounds[:, [0, 2]].mean(1), bounds[:, [1, 3]].mean(1))
        return np.asarray(self.codes(lon, lat) == code)

    def ground(self, code: int) -> Any:
        """Return the places of a zone as a shape in degrees."""
        return _zone_ground(code)

    def touched(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return zones that windows touch, shape (window, n).

        A meridian that cuts a convex window always leaves one of its corners on the far side. The parallel at a pole
        may do without: where the window's corners lie as near to it as it bends, both sides are touched.
        """
        x = np.concatenate([bounds[:, [0, 2, 0, 2]], bounds[:, [0, 2]].mean(1, keepdims=True)], 1)
        y = np.concatenate([bounds[:, [1, 1, 3, 3]], bounds[:, [1, 3]].mean(1, keepdims=True)], 1)
        lon, lat = (np.reshape(v, x.shape) for v in transformer(code, 4326).transform(x.ravel(), y.ravel()))
        codes = self.codes(lon, lat)
        if not len(bounds) or (lat.max() < 83.0 and lat.min() > -79.0):
            return codes
        side = np.hypot(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1])
        bend = (2.0 * side**2 / (8.0 * PARALLEL_M) / 111_000.0)[:, None]
        return np.concatenate([codes, self.codes(lon, lat + bend), self.codes(lon, lat - bend)], axis=1)


UTM = UtmGrid()


@dataclass(frozen=True, slots=True)
class CrsGrid:
    """One lattice in one CRS, for all chips of a plan."""

    crs: str
    """``"EPSG:3035"``, or the WKT2 of a CRS that has no code."""
    origin: tuple[float, float] = (0.0, 0.0)
    """The corner (x, y) of a split cell, metres."""
    pixel: float | None = None
    """Pixel size that the reference source must have; None: any."""

    def __post_init__(self) -> None:
        _in_metres(self.code, "chips(grid=)")
        if not np.isfinite(self.origin).all():
            raise GridError("chips(grid=)", f"an origin at {self.origin}", "finite coordinates")

    def __str__(self) -> str:
        return text(self.code)

    @property
    def code(self) -> int:
        """The number of the CRS."""
        return number(self.crs)

    @property
    def zones(self) -> Zones:
        """The zones whose split cells decide splits."""
        return self

    def codes(self, lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the CRS for each place, in degrees, on its ground; 0 elsewhere."""
        west, south, east, north = _area_of(self.code)
        x, y = np.asarray(lon, dtype=np.float64), np.asarray(lat, dtype=np.float64)
        there = np.isfinite(x) & (np.mod(x - west, 360.0) <= east - west) & (y >= south) & (y <= north)
        return np.asarray(np.where(there, self.code, 0), dtype=np.int64)

    def has(self, code: int) -> bool:
        """Return whether a number is that of the CRS."""
        return code == self.code

    def name(self, code: int) -> str:
        """Return what ids of chips begin with: ``"epsg3035"``, with the origin where it is not (0, 0)."""
        name = f"epsg{code}" if code > 0 else f"crs{-code:x}"
        return name if self.origin == (0.0, 0.0) else f"{name}at{self.origin[0]:.12g}_{self.origin[1]:.12g}"

    def cell_name(self, code: int) -> str:
        """Return what names of split cells begin with."""
        return self.name(code)

    def near(self, ground: Bounds) -> list[int]:
        """Return the number of the CRS where a box in degrees touches its ground."""
        return [] if shared_degrees(_area_of(self.code), ground) is None else [self.code]

    def box(self, ground: Bounds, code: int) -> Bounds | None:
        """Return None: what is together in degrees may lie apart on the map."""
        return None

    def holds(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which cells lie on the map with all four corners: beyond its edge, places would come again."""
        x, y = bounds[:, [0, 2, 2, 0]], bounds[:, [3, 3, 1, 1]]
        lon, lat = transformer(code, 4326).transform(x, y)
        inside = self.codes(lon, lat) == code
        back_x, back_y = transformer(4326, code).transform(lon, lat)
        inside &= (np.abs(back_x - x) < 1.0) & (np.abs(back_y - y) < 1.0)
        return np.asarray(inside.all(axis=1))

    def ground(self, code: int) -> Any:
        """Return the ground of the CRS as a shape in degrees."""
        west, south, east, north = _area_of(code)
        if east - west >= 360.0:
            west, east = -180.0, 180.0
        return area_of([(west, south, east - 360.0 if east > 180.0 else east, north)])

    def touched(self, code: int, bounds: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the number of the CRS for each window, shape (window, 1)."""
        return np.full((len(bounds), 1), self.code, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The internal tiles of the reference source."""

    def __str__(self) -> str:
        return "tiles"

    @property
    def zones(self) -> Zones:
        """The zones whose split cells decide splits."""
        return UTM


@dataclass(frozen=True, slots=True)
class FileGrid:
    """The rasters of the reference source's records: each is a window, which records of the same chip alone feed."""

    def __str__(self) -> str:
        return "files"

    @property
    def zones(self) -> Zones:
        """The zones whose split cells decide splits."""
        return UTM


@dataclass(frozen=True, slots=True)
class BoxGrid:
    """A rectangle of pixels, with chips from its north-west corner on."""

    crs: str
    """``"EPSG:32633"``, or the WKT2 of a CRS that has no code."""
    x0: float
    """West edge, metres."""
    y0: float
    """North edge, metres."""
    pixel: float
    width: int
    """Pixels."""
    height: int
    """Pixels."""

    def __post_init__(self) -> None:
        _in_metres(self.code, "chips(grid=GeoBox)")

    def __str__(self) -> str:
        return f"GeoBox of {self.width} x {self.height} pixels in {text(self.code)}"

    @property
    def code(self) -> int:
        """The number of the CRS."""
        return number(self.crs)

    @property
    def zones(self) -> Zones:
        """The zones whose split cells decide splits."""
        return UTM


ChipGrid: TypeAlias = UtmGrid | CrsGrid | TileGrid | FileGrid | BoxGrid


def chip_grid(value: Any) -> ChipGrid:
    """Return what ``chips(grid=)`` was given as a value.

    Parameters
    ----------
    value
        ``"utm"`` (or ``"zone"``), ``"tiles"``, ``"files"``, a CRS in any form, an odc-geo GridSpec or GeoBox.

    Raises
    ------
    GridError
        For a CRS that PROJ does not know, or that does not count in metres.
    PlanError
        For anything else.
    """
    if isinstance(value, UtmGrid | CrsGrid | TileGrid | FileGrid | BoxGrid):
        return value
    if isinstance(value, str) and value in ("utm", "zone"):
        return UTM
    if isinstance(value, str) and value == "tiles":
        return TileGrid()
    if isinstance(value, str) and value == "files":
        return FileGrid()
    if all(hasattr(value, name) for name in ("crs", "transform", "shape")):
        return _box(value)
    if all(hasattr(value, name) for name in ("crs", "origin", "resolution", "tile_shape")):
        return _spec(value)
    if hasattr(value, "to_wkt") or (isinstance(value, str) and any(mark in value for mark in ":[{+")):
        return CrsGrid(_crs_text(value)[0])
    raise PlanError("chips(grid=)", repr(value), WORDS)


def tile_km(value: Any) -> float | None:
    """Return the side of a GridSpec's tile in kilometres of its map; None of any other grid."""
    if not hasattr(value, "tile_shape"):
        return None
    return round(int(value.tile_shape[0]) * abs(float(value.resolution.y)) / 1000.0, 9)


def _box(value: Any) -> BoxGrid:
    transform = value.transform
    if value.crs is None:
        raise PlanError("chips(grid=)", "a GeoBox without a CRS", WORDS)
    if transform.b or transform.d:
        raise PlanError(
            "chips(grid=)", f"a rotated GeoBox ({transform.a:g}, {transform.b:g}, {transform.d:g}, {transform.e:g})",
            "a north-up GeoBox", "Take its bounds: GeoBox.from_bbox(box.boundingbox, resolution=...).",
        )  # fmt: skip
    if abs(transform.a + transform.e) > 1e-12 * abs(transform.a) or transform.a <= 0:
        raise PlanError(
            "chips(grid=)",
            f"a GeoBox of pixels {transform.a:g} x {transform.e:g}",
            "a north-up GeoBox with square pixels",
        )
    crs, shift = _crs_text(value.crs)
    height, width = (int(v) for v in value.shape)
    return BoxGrid(crs, float(transform.c), float(transform.f) + shift, float(transform.a), width, height)


def _spec(value: Any) -> CrsGrid:
    x, y = (abs(float(v)) for v in (value.resolution.x, value.resolution.y))
    rows, columns = (int(v) for v in value.tile_shape)
    if x != y or rows != columns:
        raise PlanError(
            "chips(grid=)",
            f"a GridSpec of {columns} x {rows} pixels of {x:g} x {y:g}",
            "square tiles of square pixels",
        )
    crs, shift = _crs_text(value.crs)
    return CrsGrid(crs, (float(value.origin.x), float(value.origin.y) + shift), x)


def _crs_text(value: Any) -> tuple[str, float]:
    """Return a CRS as text that says all of it, and metres to add to northings: UTM south becomes its twin."""
    code, shift = northern(number(value))
    return spelled(code), shift


def _in_metres(code: int, subject: str) -> None:
    """Refuse a CRS whose units are no metres."""
    crs = crs_of(code)
    units = {axis.unit_name for axis in crs.axis_info[:2]}
    if not crs.is_projected or units != {"metre"}:
        raise GridError(subject, f"{text(code)} ({crs.name}), which counts in {' and '.join(sorted(units))}",
                        "a CRS that counts in metres, as sizes of chips and cells do", METRIC)  # fmt: skip


@lru_cache(maxsize=256)
def _area_of(code: int) -> Bounds:
    """Return the ground of a CRS, in degrees: its area of use and what lies near; east may be beyond 180."""
    area = crs_of(code).area_of_use
    if area is None:
        return -180.0, -90.0, 180.0, 90.0
    west, south, east, north = area.bounds
    east += 360.0 * (east < west)
    reach = min(AREA_REACH, (360.0 - (east - west)) / 2)
    return west - reach, max(south - AREA_REACH, -90.0), east + reach, min(north + AREA_REACH, 90.0)


@lru_cache(maxsize=64)
def _zone_ground(code: int) -> Any:
    """Return the places of a zone of UTM or UPS in degrees: zones change at multiples of 3 degrees only."""
    lon, lat = (
        np.arange(-180.0, 181.0, 3.0),
        np.array([-90.0, UTM_LATITUDES[0], 56.0, 64.0, 72.0, UTM_LATITUDES[1], 90.0]),
    )
    west, south = (edge.ravel() for edge in np.meshgrid(lon[:-1], lat[:-1]))
    east, north = (edge.ravel() for edge in np.meshgrid(lon[1:], lat[1:]))
    own = UTM.codes((west + east) / 2, (south + north) / 2) == code
    return shapely.union_all(shapely.box(west[own], south[own], east[own], north[own]))


def _polar_box(ground: Bounds, code: int) -> Bounds | None:
    """Return bounds on a polar map: circles reach farthest at quarters of a turn, rays at their ends."""
    polar = (-180.0, 83.0, 180.0, 90.0) if code == UPS_NORTH else (-180.0, -90.0, 180.0, -79.0)
    near = shared_degrees(ground, polar)
    if near is None:
        return None
    west, south, east, north = near
    quarters = [lon for lon in np.arange(-720.0, 721.0, 90.0).tolist() if west < lon < east]
    lon, lat = np.meshgrid([west, *quarters, east], [south, north])
    x, y = transformer(4326, code).transform(lon, lat)
    return float(np.min(x)), float(np.min(y)), float(np.max(x)), float(np.max(y))


def shared_degrees(a: Bounds, b: Bounds) -> Bounds | None:
    """Return what two boxes share, in the degrees of the first, whichever turn of the globe they are in."""
    turns = [overlap(a, (b[0] + turn, b[1], b[2] + turn, b[3])) for turn in (0.0, -360.0, 360.0)]
    boxes = [box for box in turns if box is not None]  # two where b is the whole circle, less a gap or none
    if not boxes:
        return None
    west, south, east, north = zip(*boxes, strict=True)
    return min(west), min(south), max(east), max(north)


def overlap(a: Bounds, b: Bounds) -> Bounds | None:
    """Return what two boxes share; None where that has no area."""
    box = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return box if box[0] < box[2] and box[1] < box[3] else None
