# SPDX-License-Identifier: Apache-2.0
"""The lattice that the internal tiles of a source's files lie on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.crs import text
from rasteret_dask.errors import GridError
from rasteret_dask.planning.plan import ChipSpec

__all__ = ["tile_lattice"]


def tile_lattice(
    epsg: int, reference: Outlines, rows: NDArray[np.int64], spec: ChipSpec, resolution: float
) -> tuple[float, float, float]:
    """Return the corner (x, y) of a tile and the side of tiles, in units of a CRS.

    Parameters
    ----------
    epsg
        The CRS.
    reference
        Outlines of the reference source's records.
    rows
        Those of this CRS.
    spec
        Size and stride.
    resolution
        Pixel size of the reference source.

    Raises
    ------
    GridError
        When there is no such lattice, or chips do not lie on it.
    """
    pixels = {int(v) for v in np.unique(reference.tile_px[rows])}
    if len(pixels) != 1:
        raise GridError(
            "chips(grid='tiles')", f"tiles of {sorted(pixels)} px in {text(epsg)}", "square tiles of one size"
        )
    tile = pixels.pop()
    if spec.cover and tile % spec.stride:
        raise GridError(
            "chips(grid='tiles', cover=True)", f"stride {spec.stride}, tiles of {tile} px",
            "a stride that divides the tile", "Use grid='utm', whose windows lie at multiples of any stride.",
        )  # fmt: skip
    if not spec.cover and (tile % spec.size or spec.stride != spec.size):
        raise GridError(
            "chips(grid='tiles')", f"size {spec.size}, stride {spec.stride}, tiles of {tile} px",
            "a size that divides the tile, and no stride",
        )  # fmt: skip
    native = np.abs(reference.transform[rows][:, [0, 4]])
    if not np.allclose(native, resolution, rtol=1e-9):
        raise GridError("chips(grid='tiles')", f"pixels of {native.min():g} to {native.max():g} m",
                        f"the source's own {resolution:g} m pixels")  # fmt: skip
    side = tile * resolution
    x0 = np.mod(reference.transform[rows][:, 2], side)
    y0 = np.mod(reference.transform[rows][:, 5], side)
    if np.ptp(x0) > 1e-6 or np.ptp(y0) > 1e-6:
        raise GridError(
            "chips(grid='tiles')", f"{len(np.unique(np.round(np.stack([x0, y0]), 6), axis=1).T)} tile lattices "
            f"in {text(epsg)}", "records of one CRS that share one tile lattice", "Use grid='utm'.",
        )  # fmt: skip
    return float(x0[0]), float(y0[0]), float(side)
