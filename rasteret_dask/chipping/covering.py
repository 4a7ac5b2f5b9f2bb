# SPDX-License-Identifier: Apache-2.0
"""What ground planned chips cover, and how far a map of them reaches."""

from __future__ import annotations

import numpy as np

from rasteret_dask.chipping.chips import PlannedChips, phases
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.frame import cover_grids
from rasteret_dask.grid import Bounds

__all__ = ["map_extents"]


def map_extents(chips: PlannedChips) -> dict[int, Bounds]:
    """Return how far a map of chips reaches: number of the CRS -> xmin, ymin, xmax, ymax, on edges of pixels.

    Of chips that cover an area these are the area's edges, which chips may reach beyond, whichever chips were selected;
    of others, those of all chips together. Maps without a chip are left out.

    Parameters
    ----------
    chips
        The planned chips.
    """
    epsg, bounds = chips.table.column("epsg").to_numpy(), bounds_of(chips.table)
    codes = np.unique(epsg).tolist()
    if chips.spec.cover and not chips.spec.drawn:
        reference = chips.outlines[chips.reference]
        phase = phases(chips.sources[chips.reference], reference)
        grids = cover_grids(chips.spec, reference, chips.resolution, phase)
        return {grid.ground.code: grid.bounds for grid in grids if grid.ground.code in codes}
    result: dict[int, Bounds] = {}
    for code in codes:
        own = bounds[epsg == code]
        low, high = own[:, :2].min(0).tolist(), own[:, 2:].max(0).tolist()
        result[code] = (low[0], low[1], high[0], high[1])
    return result
