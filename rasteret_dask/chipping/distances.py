# SPDX-License-Identifier: Apache-2.0
"""How far shapes of one map lie apart on the ground: maps other than UTM's stretch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from rasteret_dask.crs import crs_of, text
from rasteret_dask.extent import is_geographic, metres
from rasteret_dask.grid import Bounds, is_utm, transformer
from rasteret_dask.zones import UTM

__all__ = ["apart_m", "measure", "stretch"]

EQUAL_AREA = 1e-3
"""Of maps whose areas differ less from the ground's, everywhere, one says that they are of equal area."""

EDGE_DEG = 89.99
"""Scales are asked for at most at this latitude: at the pole itself PROJ has none."""


def stretch(code: int, bounds: NDArray[np.float64]) -> float:
    """Return how long a metre of ground is on a map where some windows lie, at most; in a UTM zone 1.

    Parameters
    ----------
    code
        The number of the map's CRS.
    bounds
        Shape (window, 4): xmin, ymin, xmax, ymax.
    """
    if is_utm(code) or not len(bounds):
        return 1.0
    lon, lat = _corners(code, bounds)
    if is_geographic(code):
        return float(np.max(1.0 / np.cos(np.radians(lat)))) / metres(code)
    scale = np.asarray(pyproj.Proj(crs_of(code)).get_factors(lon, lat).tissot_semimajor)
    return float(scale[np.isfinite(scale)].max(initial=0.0) or 1.0) / metres(code)


def apart_m(code: int, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Return the distance of pairs of shapes of one map, shape (pair,), metres.

    In a UTM zone that is the map's own, within a thousandth of the ground's; elsewhere the geodesic on the WGS 84
    ellipsoid between those points that are nearest on the map.
    """
    if is_utm(code):
        return np.asarray(shapely.distance(first, second), dtype=np.float64)
    if not len(first):
        return np.zeros(0)
    ends = shapely.get_coordinates(shapely.shortest_line(first, second)).reshape(-1, 2, 2)
    lon, lat = transformer(code, 4326).transform(ends[..., 0], ends[..., 1])
    _, _, far = pyproj.Geod(ellps="WGS84").inv(lon[:, 0], lat[:, 0], lon[:, 1], lat[:, 1])
    return np.asarray(far, dtype=np.float64)


def measure(codes: Sequence[int], box: Bounds) -> str:
    """Say what distances of chips are measured in, and whether a square of their map is as much ground everywhere.

    Parameters
    ----------
    codes
        The numbers of all CRSs of the chips.
    box
        xmin, ymin, xmax, ymax of all chips, where they are of one CRS.
    """
    if all(map(is_utm, codes)):
        return "metres on the map of a UTM zone, within 0.1% of the ground's"
    if all(map(UTM.has, codes)):
        return (
            "metres on the map of a UTM zone, within 0.1% of the ground's, and on the ground round the pole"
        )
    if len(codes) > 1 or is_geographic(codes[0]):
        return "metres on the ground"
    x, y = np.meshgrid(np.linspace(box[0], box[2], 9), np.linspace(box[1], box[3], 9))
    factors = pyproj.Proj(crs_of(codes[0])).get_factors(*_degrees(codes[0], x.ravel(), y.ravel()))
    scale = np.asarray(factors.areal_scale)
    scale = scale[np.isfinite(scale)]
    low, high = float(scale.min(initial=np.inf)), float(scale.max(initial=-np.inf))
    even = abs(low - 1.0) < EQUAL_AREA and abs(high - 1.0) < EQUAL_AREA
    areas = "of equal area" if even else f"whose areas are {low:.3g} to {high:.3g} times the ground's"
    return f"metres on the ground; {text(codes[0])} is a map {areas}"


def _corners(code: int, bounds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return degrees of places that windows lie between: corners of the extremes, and of up to 256 windows."""
    some = bounds[:: max(len(bounds) // 256, 1)]
    low, high = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    x = np.concatenate([some[:, 0], some[:, 2], [low[0], high[0], low[0], high[0]]])
    y = np.concatenate([some[:, 1], some[:, 3], [low[1], low[1], high[1], high[1]]])
    return _degrees(code, x, y)


def _degrees(
    code: int, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return places of a map in degrees, as far as they are on it, and not at a pole."""
    lon, lat = (np.asarray(v) for v in transformer(code, 4326).transform(x, y))
    there = np.isfinite(lon) & np.isfinite(lat)
    return lon[there], np.clip(lat[there], -EDGE_DEG, EDGE_DEG)
