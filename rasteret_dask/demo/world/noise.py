# SPDX-License-Identifier: Apache-2.0
"""Smooth random fields over ground coordinates, the same for every grid they are sampled on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import Grid

__all__ = ["Noise", "NoiseAlong", "hash_unit", "make_noise", "mix"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """A smooth random field: octaves of random lattices, each interpolated by cubic B-splines."""

    x0: float
    """West edge of what it is defined for, metres."""
    y0: float
    """North edge, metres."""
    octaves: tuple[tuple[float, Floats], ...]
    """(lattice step in metres, lattice values), coarse to fine."""

    def along(self, x: NDArray[np.float64]) -> NoiseAlong:
        """Settle the eastings (metres) at which it is to be sampled."""
        weights = [_weights((x - self.x0) / step, lattice.shape[1]) for step, lattice in self.octaves]
        return NoiseAlong(self, np.ascontiguousarray(np.hstack(weights).T))


@dataclass(frozen=True, slots=True, eq=False)
class NoiseAlong:
    """A field whose eastings are settled, so that sampling it strip by strip costs one matrix product."""

    noise: Noise
    columns: Floats
    """Shape (lattice points of all octaves, x)."""

    def at(self, y: NDArray[np.float64]) -> Floats:
        """Sample at northings ``y``, metres.

        Returns
        -------
        Shape (len(y), x). Mean about 0, standard deviation about 1.
        """
        rows = [
            _weights((self.noise.y0 - y) / step, lattice.shape[0]) @ lattice
            for step, lattice in self.noise.octaves
        ]
        return np.hstack(rows) @ self.columns


def make_noise(
    rng: np.random.Generator, area: Grid, scales_m: tuple[float, ...], gain: float = 0.55
) -> Noise:
    """Draw a field for ``area`` and 2 km around it.

    Parameters
    ----------
    rng
        Where the lattices come from.
    area
        What it must cover.
    scales_m
        Lattice steps, coarse to fine, metres. Steps below 1/300 of the area make sampling slow.
    gain
        Amplitude of each octave relative to the coarser one before it.
    """
    spare = 2_000
    west, south, east, north = area.bounds
    amplitudes = gain ** np.arange(len(scales_m))
    # A cubic B-spline keeps 0.479 of the variance of its lattice in each axis, averaged over positions.
    amplitudes /= 0.479 * np.sqrt((amplitudes**2).sum())
    octaves = []
    for amplitude, step in zip(amplitudes, scales_m, strict=True):
        shape = (int((north - south + 2 * spare) / step) + 5, int((east - west + 2 * spare) / step) + 5)
        octaves.append((step, (amplitude * rng.standard_normal(shape)).astype(np.float32)))
    return Noise(west - spare, north + spare, tuple(octaves))


def mix(*keys: NDArray[np.integer[Any]] | int) -> NDArray[np.uint32]:
    """Hash integer arrays (or numbers) of one shape into 32 random-looking bits, element by element."""
    state: NDArray[np.uint32] = np.full((), 0x9E3779B9, np.uint32)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint32)) * np.uint32(0x85EBCA6B)
            state = state ^ (state >> np.uint32(15))
            state = state * np.uint32(0xC2B2AE35)
            state = state ^ (state >> np.uint32(13))
    return state


def hash_unit(*keys: NDArray[np.integer[Any]] | int) -> Floats:
    """Hash integer arrays (or numbers) of one shape to float32 in [0, 1), element by element."""
    return (mix(*keys) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _weights(position: NDArray[np.float64], count: int) -> Floats:
    """Return the B-spline weights of ``count`` lattice points at each position, shape (position, lattice)."""
    base = np.floor(position).astype(np.int64)
    t = (position - base).astype(np.float32)
    taps = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    weights = np.zeros((len(position), count), np.float32)
    where = np.arange(len(position))
    for offset, tap in enumerate(taps):
        weights[where, np.clip(base + offset, 0, count - 1)] += tap
    return weights
