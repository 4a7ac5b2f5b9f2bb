# SPDX-License-Identifier: Apache-2.0
"""Clouds of the made-up world and the shadows they cast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import Grid
from rasteret_dask.demo.world.noise import NoiseAlong, make_noise

__all__ = ["Clouds", "add_clouds", "make_clouds"]

_SHADOW_EAST_M, _SHADOW_NORTH_M = -620.0, 980.0  # the sun stands in the south-south-east
_RIM = 0.55
# In the order of spectra.BANDS.
_CLOUD = (0.74, 0.73, 0.73, 0.77, 0.55)
_DARKENS = (0.48, 0.56, 0.60, 0.66, 0.68)

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Clouds:
    """The clouds of one overpass over the columns of one grid."""

    overhead: NoiseAlong
    sunwards: NoiseAlong
    """The same noise where the sun's rays to each pixel cross the clouds."""
    threshold: float
    """Where the noise is above this, there is cloud."""

    def opacity(self, y: NDArray[np.float64]) -> Floats:
        """Return how opaque the cloud is: shape (len(y), x), exactly 0 outside clouds, at most 1."""
        return _opacity(self.overhead.at(y), self.threshold)

    def shadow(self, y: NDArray[np.float64]) -> Floats:
        """Return how deep the shadow is: shape (len(y), x), exactly 0 outside shadows, at most 1."""
        depth = _opacity(self.sunwards.at(y - _SHADOW_NORTH_M), self.threshold)
        depth -= np.float32(0.1)  # the thin rim of a cloud casts none
        return np.maximum(depth, np.float32(0), out=depth)


def make_clouds(seed: tuple[int, ...], area: Grid, share: float) -> Clouds:
    """Draw clouds that cover this share (0..1) of an area; any rim counts as cloud."""
    noise = make_noise(np.random.default_rng(seed), area, (4200, 1900, 850, 400, 210), 0.62)
    step = max(1, 200 // area.pixel_m)
    sample = noise.along(area.x[::step]).at(area.y[::step])
    threshold = float(np.quantile(sample, 1 - share))
    return Clouds(noise.along(area.x), noise.along(area.x - _SHADOW_EAST_M), threshold)


def _opacity(noise: Floats, threshold: float) -> Floats:
    noise -= np.float32(threshold)
    noise *= np.float32(1 / _RIM)
    np.clip(noise, 0, 1, out=noise)
    noise *= noise * (3 - 2 * noise)
    return noise


def add_clouds(value: Floats, band: int, opacity: Floats, shadow: Floats) -> Floats:
    """Return one band's reflectance under clouds and shadows; all arrays have the same shape.

    Where ``opacity`` and ``shadow`` are 0, ``value`` comes back unchanged, bit for bit.
    """
    dimmed = value * (1 - _DARKENS[band] * shadow)
    white = _CLOUD[band] * (0.72 + 0.28 * opacity)
    dimmed *= 1 - opacity
    dimmed += white * opacity
    return dimmed
