# SPDX-License-Identifier: Apache-2.0
"""Splits and folds of chips that are stored already: columns that are put over those of the store."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.frame import grown
from rasteret_dask.chipping.ground import by_ground
from rasteret_dask.chipping.splits import SplitCells, choose, column_splits
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import SplitSpec
from rasteret_dask.planning.sampling import hash_unit
from rasteret_dask.zones import UTM

__all__ = ["NEEDED", "fold_column", "split_column"]

NEEDED = ("chip_id", "cell", "epsg", "xmin", "ymin", "xmax", "ymax")
"""Columns of the chip table that tell folds."""

_SIZES = re.compile(r"_(?P<cell_km>[0-9.e+-]+)km_(?P<size>\d+)px(s\d+)?_(?P<pixel>[0-9.e+-]+)m")
"""What an id says of the lattice: ``33_0.96km_32px_10m_-17375_1557``."""


def split_column(column: pa.ChunkedArray, spec: SplitSpec) -> pa.Array:
    """Return the split of each chip by its value in a column; null where it has none.

    Raises
    ------
    PlanError
        When a split asks for a value that is not there, or values are none that could name splits.
    """
    spec, number = column_splits(column, spec)
    return pa.array(spec.names, pa.string()).take(pa.array(number, mask=number < 0))


def fold_column(chips: pa.Table, spec: SplitSpec, context_m: float = 0.0) -> pa.Array:
    """Return the fold of each chip by the split cell that it was laid out in; null where its ground is in two.

    Parameters
    ----------
    chips
        The columns ``NEEDED``.
    spec
        A share for each fold.
    context_m
        The side of the largest windows of a source around the chips, metres; 0: windows are the chips.

    Raises
    ------
    PlanError
        When chips were laid freely, or there are fewer split cells than folds.
    """
    k, found = (
        len(spec.ratios),
        None if chips.num_rows == 0 else _SIZES.search(chips.column("chip_id")[0].as_py()),
    )
    if found is None or chips.column("cell").null_count:
        raise PlanError(
            f"folds({k})", "stored chips that were not laid out in split cells", "chips of a lattice",
            f"Fold them before they are written: chips.folds({k}).to_zarr(store).",
        )  # fmt: skip
    cells = chips.column("cell").combine_chunks().dictionary_encode()
    names = [name.split("/") for name in cells.dictionary.to_pylist()]
    if k > len(names):
        raise PlanError(
            f"folds({k})", f"{len(names)} split cells of {found['cell_km']} km", "a split cell for each fold at least",
            "Ask for fewer folds.",
        )  # fmt: skip
    number = _numbers(names, spec)[cells.indices.to_numpy()]
    in_zones = all(zone.isdecimal() or zone.startswith("ups") for zone, *_ in names)
    if context_m and not in_zones:
        raise PlanError(
            f"folds({k})", "stored chips of one CRS's lattice, with chips(context_m=)", "chips of zones",
            f"Fold them before they are written: chips.folds({k}).to_zarr(store).",
        )  # fmt: skip
    if in_zones:  # neighbouring zones overlap
        place = np.array([[int(row), int(col)] for _, row, col in names], dtype=np.int64)[
            cells.indices.to_numpy()
        ]
        wider = np.array([-1, -1, 1, 1]) * 1.5 * float(found["pixel"])
        side = SplitCells(UTM, 1000.0 * float(found["cell_km"]))
        epsg = chips.column("epsg").to_numpy().astype(np.int64)
        bounds = bounds_of(chips)
        reach = (context_m - (bounds[0, 2] - bounds[0, 0])) / 2 if context_m else 0.0
        ground = grown(bounds, reach) if reach > 0 else bounds + wider
        number = by_ground(epsg, ground, side, spec, place, reach > 0)
    return pa.array(number, pa.int64(), mask=number < 0)


def _numbers(names: Sequence[Sequence[str]], spec: SplitSpec) -> NDArray[np.int64]:
    return choose(hash_unit(["|".join(parts) for parts in names], spec.salt, spec.seed), spec)
