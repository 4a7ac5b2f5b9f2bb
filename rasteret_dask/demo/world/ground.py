# SPDX-License-Identifier: Apache-2.0
"""The ground of the made-up world: a procedural landscape of farmland, forest, water and towns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import Grid
from rasteret_dask.demo.world.noise import Noise, NoiseAlong, hash_unit, make_noise
from rasteret_dask.demo.world.parcels import Regions, make_regions, parcels_at
from rasteret_dask.demo.world.spectra import PHASES, Cover, bare
from rasteret_dask.demo.world.towns import build_towns

__all__ = ["Ground", "hills_of", "make_ground"]

_STRIP_ROWS = 256
_CROPS = (
    (0.34, Cover.WINTER_CEREAL),
    (0.52, Cover.RAPESEED),
    (0.68, Cover.MAIZE),
    (0.77, Cover.BEET),
    (0.95, Cover.MEADOW),
    (1.00, Cover.FALLOW),
)
"""Cumulative share of parcels, and what grows on them."""


_GRAIN = np.full(len(Cover), 1.6, np.float32)
"""Shape (cover,). Percent of brightness that differs from pixel to pixel: canopies and towns are grainy."""
_GRAIN[[Cover.BROADLEAF, Cover.CONIFER]] = (5.5, 6.5)
_GRAIN[[Cover.GARDEN, Cover.RED_ROOF, Cover.GREY_ROOF, Cover.HALL]] = 7


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What lies where, the same on every date; each array has the shape of the grid."""

    grid: Grid
    """10 m."""
    kind: NDArray[np.uint8]
    """``cover * PHASES + phase``: a row of :func:`rasteret_dask.demo.world.spectra.spectra_on`."""
    vigour: NDArray[np.uint8]
    """Percent: 100 is the full-grown cover, 0 bare soil; above 100 is lusher than usual."""
    light: NDArray[np.uint8]
    """Percent: brightness by slope and texture, 100 is flat ground."""

    @property
    def cover(self) -> NDArray[np.uint8]:
        """Values of :class:`rasteret_dask.demo.world.spectra.Cover`."""
        return self.kind // np.uint8(PHASES)

    def window(self, grid: Grid) -> Ground:
        """Return a view of the part that ``grid`` covers."""
        rows, cols = grid.within(self.grid)
        return Ground(grid, self.kind[rows, cols], self.vigour[rows, cols], self.light[rows, cols])

    def reflectance(self, spectra: NDArray[np.float32], band: int) -> NDArray[np.float32]:
        """Return one band on the day of ``spectra``: shape of the grid, surface reflectance, cloudless."""
        thin = bare(spectra)[:, band]
        value = (spectra[:, band] - thin)[self.kind]
        value *= self.vigour * np.float32(0.01)
        value += thin[self.kind]
        value *= self.light * np.float32(0.01)
        np.maximum(value, np.float32(0.002), out=value)
        return value


@dataclass(frozen=True, slots=True)
class _Relief:
    """The smooth fields the landscape follows."""

    hills: NoiseAlong
    woods: NoiseAlong
    moisture: NoiseAlong
    warp: tuple[NoiseAlong, NoiseAlong]
    regions: Regions
    bends: NDArray[np.float64]
    """Shape (3, 2). Phase of the river's and the brook's bends, radians."""


def hills_of(seed: int, grid: Grid) -> Noise:
    """Return the hills that the landscape of this seed on ``grid`` follows; about -3 to 3."""
    return _hills(np.random.default_rng([seed, 1]), grid)


def _hills(rng: np.random.Generator, grid: Grid) -> Noise:
    return make_noise(rng, grid, (9000, 4500, 2200, 1000, 500), 0.5)


def make_ground(seed: int, grid: Grid) -> Ground:
    """Paint the landscape of this seed on ``grid`` (10 m), strip by strip."""
    rng = np.random.default_rng([seed, 1])
    relief = _Relief(
        hills=_hills(rng, grid).along(grid.x),
        woods=make_noise(rng, grid, (5200, 2400, 1100, 500, 260), 0.6).along(grid.x),
        moisture=make_noise(rng, grid, (3000, 1100, 450, 220), 0.7).along(grid.x),
        warp=(
            make_noise(rng, grid, (2600, 900)).along(grid.x),
            make_noise(rng, grid, (2600, 900)).along(grid.x),
        ),
        regions=make_regions(seed, grid),
        bends=rng.uniform(0, 2 * np.pi, (3, 2)),
    )
    shape = (grid.height, grid.width)
    ground = Ground(grid, *(np.empty(shape, np.uint8) for _ in range(3)))
    strips = [grid.rows(start, start + _STRIP_ROWS) for start in range(0, grid.height, _STRIP_ROWS)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda strip: _paint(seed, relief, grid, ground.window(strip)), strips))
    build_towns(rng, grid, ground.kind, ground.vigour)
    return ground


def _paint(seed: int, relief: _Relief, area: Grid, strip: Ground) -> None:
    """Fill the arrays of one strip of ``area``."""
    y = strip.grid.y
    river, brook = _water_distance(relief.bends, area, strip.grid)
    hills = relief.hills.at(y) - np.float32(1.3) * np.exp(-((river / np.float32(2600)) ** 2))
    woods, moisture = relief.woods.at(y), relief.moisture.at(y)
    land = parcels_at(relief.regions, strip.grid, (relief.warp[0].at(y), relief.warp[1].at(y)))
    pick, tone = hash_unit(land.parcel, 1), hash_unit(land.parcel, 2)

    cover = np.full(strip.kind.shape, Cover.FALLOW, np.uint8)
    for share, crop in reversed(_CROPS):
        cover[pick < share] = crop
    cover[land.edge_m < 5] = Cover.TRACK
    hedge = (land.edge_m < 7) & (hash_unit(land.parcel, 5) < 0.3)
    cover[hedge] = Cover.BROADLEAF
    forest = 0.75 * hills + 0.8 * woods + 0.35 * (pick - 0.5) > 0.78
    cover[forest & (pick > 0.03)] = Cover.BROADLEAF
    cover[forest & (pick > 0.03) & (0.6 * hills - moisture + 1.2 * (tone - 0.5) > 0.1)] = Cover.CONIFER
    cover[(land.border_m < 7) & ~forest] = Cover.ASPHALT
    bank = np.minimum(river - 45, brook - 14)
    cover[(bank < 60 + 55 * moisture) & (bank < 190)] = Cover.MEADOW
    cover[(bank < 26 + 22 * woods) & (woods > -0.2)] = Cover.BROADLEAF
    cover[(moisture > 1.75) & (hills < -0.5) & (river < 3200)] = Cover.LAKE
    cover[bank < 0] = Cover.WATER

    phase = np.clip((tone * 11 + 2.5 + 1.2 * moisture), 0, PHASES - 1).astype(np.uint8)
    strip.kind[:] = cover * np.uint8(PHASES) + phase
    vigour = np.clip(84 + 22 * hash_unit(land.parcel, 3) + 7 * moisture, 40, 118)
    strip.vigour[:] = np.where((cover <= Cover.CONIFER), 100, vigour)
    grain = np.random.default_rng([seed, 2, strip.grid.y0]).standard_normal(cover.shape, np.float32)
    soil = np.where(cover <= Cover.CONIFER, 0, 10 * hash_unit(land.parcel, 4) - 5)
    strip.light[:] = np.clip(100 + soil + _relief(hills, cover) + _GRAIN[cover] * grain, 60, 140)


def _relief(hills: NDArray[np.float32], cover: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the percent by which slopes towards the morning sun in the south-east are brighter; water is flat."""
    slope = np.gradient(hills, axis=0) - np.gradient(hills, axis=1)
    return np.where(cover <= Cover.LAKE, np.float32(0), np.clip(slope * 300, -14, 14).astype(np.float32))


def _water_distance(
    bends: NDArray[np.float64], area: Grid, strip: Grid
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the distance (m) to the middle of the river (west to east) and of the brook (north to river)."""
    west, south, east, north = area.bounds
    lengths, sizes = np.array([9300.0, 3400.0, 1250.0]), np.array([900.0, 420.0, 130.0])

    def course(along: NDArray[np.float64], which: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        turns = 2 * np.pi * along[:, None] / lengths + bends[:, which]
        lean = (sizes * 2 * np.pi / lengths * np.cos(turns)).sum(axis=1)
        return (sizes * np.sin(turns)).sum(axis=1), (1 / np.hypot(1, lean)).astype(np.float32)

    bend, shrink = course(strip.x, 0)
    up = (strip.y - south).astype(np.float32)[:, None] - (0.47 * (north - south) + bend).astype(np.float32)
    river = np.abs(up) * shrink
    bend, shrink = course(strip.y, 1)
    middle = (0.58 * (east - west) + 0.7 * bend).astype(np.float32)
    off = (strip.x - west).astype(np.float32) - middle[:, None]
    brook = np.abs(off) * shrink[:, None]
    brook[up < 0] = 1e5  # it ends in the river
    return river, brook
