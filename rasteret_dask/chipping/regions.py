# SPDX-License-Identifier: Apache-2.0
"""Regions by name, and which of them each chip lies in as a whole."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["check_regions", "names_of"]

WHOLE = 1e-6
"""Of a chip's area: less than this beyond a region's edge, or in another region, is rounding."""

_POLYGONAL = (3, 6)


def check_regions(table: pa.Table, subject: str = "split(by=<regions>)") -> str:
    """Return the column of a table of regions that names them; ``subject`` is what it is for, in messages.

    Raises
    ------
    PlanError
        When there is not exactly one column beside the geometry, a name is missing, or a geometry is no polygon.
    """
    own = [name for name in table.column_names if name not in ("geometry", "__index__")]
    if len(own) != 1:
        raise PlanError(
            subject, f"{len(own)} columns beside the geometry" + (f" ({', '.join(own[:10])})" if own else ""),
            "one, which names the regions", f"Choose it: regions[[{own[0] if own else 'name'!r}, 'geometry']].",
        )  # fmt: skip
    column = table.column(own[0])
    if column.null_count:
        raise PlanError(
            subject, f"{column.null_count} regions without a name", f"a value of {own[0]} in each row"
        )
    kinds = shapely.get_type_id(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))
    if not np.isin(kinds, _POLYGONAL).all():
        raise PlanError(subject, "geometries that are no polygons", "polygons")
    return str(own[0])


def names_of(table: pa.Table, column: str, wkb: pa.ChunkedArray) -> pa.Array:
    """Return the name of the region that holds each chip as a whole, null where none does or another one touches it.

    Parameters
    ----------
    table
        Regions: ``geometry`` (WKB, lon/lat) and their names; several rows of one name are one region.
    column
        The column with their names.
    wkb
        Shape (chip,). Outlines of chips in lon/lat.
    """
    encoded = table.column(column).combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    number = encoded.indices.to_numpy()
    shapes = shapely.make_valid(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))
    merged = np.array(
        [shapely.union_all(shapes[number == at]) for at in range(len(encoded.dictionary))], dtype=object
    )
    chips = shapely.from_wkb(wkb.to_numpy())
    area = shapely.area(chips)
    result = np.full(len(chips), -1, dtype=np.int64)
    chip, region = shapely.STRtree(merged).query(chips, predicate="intersects")
    shared = _shared(chips, merged, chip, region)
    real = shared > WHOLE * area[chip]
    touched = np.bincount(chip[real], minlength=len(chips))
    whole = real & (shared >= (1 - WHOLE) * area[chip]) & (touched[chip] == 1)
    result[chip[whole]] = region[whole]
    return encoded.dictionary.take(pa.array(result, mask=result < 0))


def _shared(
    chips: NDArray[np.object_], regions: NDArray[np.object_],
    chip: NDArray[np.int64], region: NDArray[np.int64],
) -> NDArray[np.float64]:  # fmt: skip
    """Return the area that pairs share: that of the chip where it lies inside, else of a part."""
    shapely.prepare(regions)
    inside = shapely.contains_properly(regions[region], chips[chip])
    result = shapely.area(chips[chip])
    result[~inside] = shapely.area(shapely.intersection(chips[chip[~inside]], regions[region[~inside]]))
    return np.asarray(result)
