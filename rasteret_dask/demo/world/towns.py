# SPDX-License-Identifier: Apache-2.0
"""Towns of the made-up world, and the roads between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import Grid
from rasteret_dask.demo.world.noise import hash_unit
from rasteret_dask.demo.world.spectra import PHASES, Cover

__all__ = ["build_towns"]

_AREA_PER_TOWN_M2 = 22e6
_HOUSE_M, _STREET_M, _YARD_M = 24, 96, 110


@dataclass(frozen=True, slots=True)
class _Town:
    y: float
    x: float
    radius: float
    angle: float
    number: int


def build_towns(
    rng: np.random.Generator, grid: Grid, kind: NDArray[np.uint8], vigour: NDArray[np.uint8]
) -> None:
    """Build towns and roads into the ground's arrays, in place, but not on water.

    Parameters
    ----------
    rng
        Where the places come from.
    grid
        The ground's grid, 10 m.
    kind, vigour
        The ground's arrays, see :class:`rasteret_dask.demo.world.ground.Ground`.
    """
    towns = _place(rng, grid)
    for i, town in enumerate(towns):
        near = sorted(towns, key=lambda t: np.hypot(t.y - town.y, t.x - town.x))[1:3]
        for other in near:
            _road(grid, kind, vigour, (town, other), 7 if i % 3 else 10)
    for town in towns:
        _town(grid, kind, vigour, town)


def _place(rng: np.random.Generator, grid: Grid) -> list[_Town]:
    west, south, east, north = grid.bounds
    count = max(2, round((north - south) * (east - west) / _AREA_PER_TOWN_M2))
    towns: list[_Town] = []
    for number in range(count):
        spots = np.column_stack([rng.uniform(south, north, 12), rng.uniform(west, east, 12)])
        apart = [min((np.hypot(y - t.y, x - t.x) for t in towns), default=0.0) for y, x in spots]
        y, x = spots[int(np.argmax(apart))]
        radius = 190 + 1300 * float(rng.uniform()) ** 4
        towns.append(_Town(float(y), float(x), radius, float(rng.uniform(0, np.pi)), number))
    return towns


def _window(grid: Grid, low: tuple[float, float], high: tuple[float, float]) -> tuple[slice, slice, Grid]:
    """Return the part of the grid between two corners (y, x), metres."""
    row0, row1 = (int(np.clip((grid.y0 - y) / 10, 0, grid.height)) for y in (high[0], low[0]))
    col0, col1 = (int(np.clip((x - grid.x0) / 10, 0, grid.width)) for x in (low[1], high[1]))
    part = Grid(grid.x0 + 10 * col0, grid.y0 - 10 * row0, 10, row1 - row0, col1 - col0)
    return slice(row0, row1), slice(col0, col1), part


def _town(grid: Grid, kind: NDArray[np.uint8], vigour: NDArray[np.uint8], town: _Town) -> None:
    reach = town.radius * 1.7
    rows, cols, part = _window(grid, (town.y - reach, town.x - reach), (town.y + reach, town.x + reach))
    y, x = part.y[:, None] - town.y, part.x[None, :] - town.x
    turn = np.arctan2(y, x)
    lobes = 1 + 0.22 * np.sin(3 * turn + town.angle * 5) + 0.14 * np.sin(7 * turn + town.angle * 11)
    depth = 1 - np.hypot(y, x) / (town.radius * lobes)  # 1 in the middle, 0 at the town's edge
    c, s = np.cos(town.angle), np.sin(town.angle)
    u, v = x * c + y * s + 1e5, y * c - x * s + 1e5

    def cells(side: float, salt: int) -> NDArray[np.float32]:
        return hash_unit((u // side).astype(np.int32), (v // side).astype(np.int32), town.number * 64 + salt)

    house, yard = cells(_HOUSE_M, 1), cells(_YARD_M, 2)
    cover = np.full(depth.shape, Cover.GARDEN, np.uint8)
    built = house < 0.34 + 0.4 * depth
    cover[built] = np.where(cells(_HOUSE_M, 3)[built] < 0.62, Cover.RED_ROOF, Cover.GREY_ROOF)
    cover[house > 0.9] = Cover.BROADLEAF
    works = (yard > 0.9) & (depth < 0.5) & (town.radius > 450)
    cover[works] = np.where(cells(_YARD_M / 2, 4)[works] < 0.6, Cover.HALL, Cover.ASPHALT)
    street = (u % _STREET_M < 11) | (v % (1.6 * _STREET_M) < 11)
    cover[street] = Cover.ASPHALT
    cover[(yard < 0.06) & ~street] = Cover.MEADOW
    _put(kind[rows, cols], vigour[rows, cols], depth > 0.04 * yard, cover)


def _road(
    grid: Grid, kind: NDArray[np.uint8], vigour: NDArray[np.uint8], ends: tuple[_Town, _Town], half_m: float
) -> None:
    a, b = ends
    low = (min(a.y, b.y) - 400, min(a.x, b.x) - 400)
    high = (max(a.y, b.y) + 400, max(a.x, b.x) + 400)
    rows, cols, part = _window(grid, low, high)
    length = np.hypot(b.y - a.y, b.x - a.x)
    dy, dx = (b.y - a.y) / length, (b.x - a.x) / length
    y, x = part.y[:, None] - a.y, part.x[None, :] - a.x
    along, across = x * dx + y * dy, y * dx - x * dy
    share = np.clip(along / length, 0, 1)
    bend = 0.05 * length * np.sin(np.pi * share) * np.sin(2 * np.pi * share + a.angle + b.angle)
    on_road = (np.abs(across - bend) < half_m) & (along > 0) & (along < length)
    cover = np.full(on_road.shape, Cover.ASPHALT, np.uint8)
    _put(kind[rows, cols], vigour[rows, cols], on_road, cover)


def _put(
    kind: NDArray[np.uint8], vigour: NDArray[np.uint8], where: NDArray[np.bool_], cover: NDArray[np.uint8]
) -> None:
    """Write covers where True, except on the river and lakes; bridges stay away from this world's lakes."""
    where = where & (kind // PHASES > Cover.LAKE)
    kind[where] = cover[where] * np.uint8(PHASES) + np.uint8(PHASES // 2)
    vigour[where] = 100
