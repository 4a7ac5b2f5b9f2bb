# SPDX-License-Identifier: Apache-2.0
"""The ground of a grid that none of its windows covers: strips of split cells, and what is left of a GeoBox."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from rasteret_dask.grid import Lattice
from rasteret_dask.planning.plan import MAX_CELL_KM, ChipSpec
from rasteret_dask.zones import BoxGrid

__all__ = ["Leftover", "leftover", "whole_cell_km"]

NOTHING = 1e-9
"""A share of ground below this is rounding."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What the windows of a grid leave out, wherever the records lie."""

    share: float
    """Of the ground, above 0."""
    text: str
    """The same in words, with what would do better."""
    cell_km: float | None = None
    """The nearest side of a split cell that chips cover whole; None where no cell does, or there are none."""


def leftover(spec: ChipSpec, resolution: float) -> Leftover | None:
    """Return the ground that no chip of a grid covers; None where there is none, or windows lie at places.

    Parameters
    ----------
    spec
        Size, stride, grid.
    resolution
        Pixel size of the reference source.
    """
    if spec.in_cells:
        return _of_cells(spec, resolution)
    if not spec.in_rows or spec.cover or not isinstance(spec.grid, BoxGrid):
        return None
    width, height = spec.grid.width, spec.grid.height
    covered = _covered(width, spec) * _covered(height, spec)
    share = 1.0 - covered / (width * height)
    if share < NOTHING:
        return None
    fits = [_fitting(side, spec) for side in (width, height)]
    return Leftover(
        share,
        f"{share:.1%} of the GeoBox ({width} x {height} pixels), right and below of the last chip of {spec.size} "
        f"pixels: one of {fits[0]} x {fits[1]} is covered whole; cover=True leaves nothing out",
    )


def whole_cell_km(length_m: float, stride_m: float, at_least_m: float) -> float | None:
    """Return the smallest side of a split cell, in km, that chips cover whole and that has a length.

    Parameters
    ----------
    length_m, stride_m
        Side of a chip, and from one chip to the next.
    at_least_m
        The length. None is returned where no cell may be so large.
    """
    steps = max(ceil((at_least_m - length_m) / stride_m - NOTHING), 0)
    side = round((length_m + steps * stride_m) / 1000.0, 9)
    return side if side <= MAX_CELL_KM else None


def _of_cells(spec: ChipSpec, resolution: float) -> Leftover | None:
    length, stride, cell = spec.size * resolution, spec.stride * resolution, spec.cell_km * 1000.0
    lattice = Lattice(cell, length, stride)
    covered = (lattice.per_side - 1) * min(stride, length) + length
    share = 1.0 - (covered / cell) ** 2
    if share < NOTHING:
        return None
    if stride > length:
        return Leftover(share, f"{share:.1%} of each split cell: the stride is longer than a chip")
    sides = (
        whole_cell_km(length, stride, cell),
        whole_cell_km(length, stride, length + _below(cell, length, stride)),
    )
    better = min((s for s in sides if s is not None), key=lambda s: abs(s - spec.cell_km))
    strip = f"a strip of {lattice.unused_m:g} m on two sides of it"
    advice = f"cell_km={better:g} has none; cover=True leaves nothing out, for maps"
    return Leftover(share, f"{share:.1%} of each split cell, {strip}: {advice}", better)


def _below(cell: float, length: float, stride: float) -> float:
    """Return how long the whole strides are that a cell has room for behind the first chip."""
    return floor((cell - length) / stride + NOTHING) * stride


def _covered(side: int, spec: ChipSpec) -> int:
    """Return how many pixels of a side of the GeoBox chips cover."""
    count = (side - spec.size) // spec.stride + 1
    return (count - 1) * min(spec.stride, spec.size) + spec.size if count > 0 else 0


def _fitting(side: int, spec: ChipSpec) -> int:
    """Return the side, at least as long, at which the last chip ends."""
    return spec.size + max(-(-(side - spec.size) // spec.stride), 0) * spec.stride
