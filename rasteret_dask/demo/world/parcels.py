# SPDX-License-Identifier: Apache-2.0
"""How farmland is divided: regions with their own direction, cut into parcels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import Grid
from rasteret_dask.demo.world.noise import hash_unit, mix

__all__ = ["Land", "Regions", "make_regions", "parcels_at"]

_REGION_M = 2400
_WARP_M = 160

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Land:
    """The division of the land at some points; all arrays have shape (y, x)."""

    parcel: NDArray[np.uint32]
    """Hash of the parcel."""
    border_m: Floats
    """Distance to the region's border, metres, where roads run."""
    edge_m: Floats
    """Distance to the parcel's edge, metres."""


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Jittered points on a lattice; each is the heart of a region. Arrays have one value a point, row by row."""

    x0: float
    """West edge of the lattice, metres."""
    y0: float
    """South edge of the lattice, metres."""
    width: int
    """Points in a row of the lattice."""
    north: Floats
    """Metres from ``y0``."""
    east: Floats
    """Metres from ``x0``."""
    key: NDArray[np.uint32]
    """Hash of the region."""


def make_regions(seed: int, area: Grid) -> Regions:
    """Place the regions of an area; another seed places them otherwise."""
    west, south, east, north = area.bounds
    spare = 3  # cells that warped coordinates and their neighbours may reach
    x0, y0 = (west // _REGION_M - spare) * _REGION_M, (south // _REGION_M - spare) * _REGION_M
    width, height = (int(size // _REGION_M) + 2 * spare + 2 for size in (east - west, north - south))
    row, col = (index.ravel() for index in np.indices((height, width), np.int32))
    key = mix(seed, row, col)
    place_y = (row + 0.1 + 0.8 * hash_unit(key, 1)) * _REGION_M
    place_x = (col + 0.1 + 0.8 * hash_unit(key, 2)) * _REGION_M
    return Regions(x0, y0, width, place_y.astype(np.float32), place_x.astype(np.float32), key)


def parcels_at(regions: Regions, grid: Grid, warp: tuple[Floats, Floats]) -> Land:
    """Divide the land of a grid into parcels.

    Parameters
    ----------
    regions
        Of an area that contains the grid.
    grid
        Where to look.
    warp
        Two fields of the grid's shape, standard deviation 1, that bend all borders.
    """
    north = (grid.y - regions.y0).astype(np.float32)[:, None] + np.float32(_WARP_M) * warp[0]
    east = (grid.x - regions.x0).astype(np.float32) + np.float32(_WARP_M) * warp[1]
    nearest, border = _nearest(regions, north, east)
    angle = hash_unit(regions.key, 11) * np.float32(np.pi)
    length, width = 260 + 420 * hash_unit(regions.key, 12), 90 + 170 * hash_unit(regions.key, 13)
    cos, sin, long, wide = np.cos(angle)[nearest], np.sin(angle)[nearest], length[nearest], width[nearest]
    key = regions.key[nearest]

    along = (east * cos + north * sin) / long
    column = np.floor(along)
    along -= column
    shifted = mix(key, column.astype(np.int32))
    across = (north * cos - east * sin) / wide + hash_unit(shifted)
    across += np.float32(0.22) * np.sin(across * np.float32(2.1))  # parcels of unequal width
    row = np.floor(across)
    across -= row
    edge = np.minimum(np.minimum(along, 1 - along) * long, np.minimum(across, 1 - across) * wide)
    return Land(mix(shifted, row.astype(np.int32)), border, np.minimum(edge, border))


def _nearest(regions: Regions, north: Floats, east: Floats) -> tuple[NDArray[np.int32], Floats]:
    """Return the index of the nearest point (Voronoi), and the distance to its region's border in metres."""
    cell = (north * np.float32(1 / _REGION_M)).astype(np.int32) * np.int32(regions.width)
    cell += (east * np.float32(1 / _REGION_M)).astype(np.int32)
    nearest = cell
    first = second = np.full(north.shape, np.inf, np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            point = cell + np.int32(dy * regions.width + dx)
            away = (north - regions.north[point]) ** 2
            away += (east - regions.east[point]) ** 2
            closer = away < first
            second = np.where(closer, first, np.minimum(second, away))
            nearest = np.where(closer, point, nearest)
            first = np.where(closer, away, first)
    border = (np.sqrt(second) - np.sqrt(first)).astype(np.float32) * np.float32(0.5)
    return nearest.astype(np.int32), border
