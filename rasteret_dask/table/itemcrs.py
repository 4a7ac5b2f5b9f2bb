# SPDX-License-Identifier: Apache-2.0
"""Which CRS the fields of STAC's projection extension state, in any of their forms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rasteret_dask.crs import number, wkt2
from rasteret_dask.errors import GridError

__all__ = ["CRS_FIELDS", "crs_columns", "crs_fault", "stated_crs"]

CRS_FIELDS = ("proj:code", "proj:epsg", "proj:wkt2", "proj:projjson")
"""STAC's projection extension 2.0 and 1.x; the first that PROJ knows holds."""


def stated_crs(fields: Mapping[str, Any]) -> int | None:
    """Return the number of the CRS that fields state, None where they state none that PROJ knows.

    Parameters
    ----------
    fields
        Of an item's properties, an asset or a table's row. ``proj:wkt2`` may be WKT 1, as MODIS items have it, and
        ``proj:projjson`` text.
    """
    for _, crs in _statements(fields):
        try:
            return number(crs)
        except GridError:
            if isinstance(crs, int):  # whoever places rasters by it tells that PROJ does not know it
                return crs
    return None


def crs_columns(crs: int | None) -> dict[str, Any]:
    """Return the columns of a record that hold its CRS."""
    return {"proj:epsg": crs, "proj:wkt2": None if crs is None or crs >= 0 else wkt2(crs)}


def crs_fault(fields: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the CRS that fields state, None where they are silent or PROJ knows it."""
    for name, crs in _statements(fields):
        try:
            number(crs)
        except GridError as error:
            return f"{name}: {error.found}"
    return None


def _statements(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (field, its value as :func:`number` takes it) of those that state a CRS."""
    for name in CRS_FIELDS:
        crs = _value(fields.get(name))
        local = isinstance(crs, int) and crs < 0  # a number of ours: its WKT2 stands beside it
        if crs is not None and not local:
            yield name, crs


def _value(crs: Any) -> Any:
    """Return a field's value as :func:`number` takes it, None where there is nothing."""
    if isinstance(crs, float):
        return int(crs) if crs == crs and abs(crs) < 2**31 else None
    if isinstance(crs, Mapping):  # a column of structs has all fields that some row has
        return json.loads(
            json.dumps(crs), object_hook=lambda node: {k: v for k, v in node.items() if v is not None}
        )
    if isinstance(crs, str):
        return crs if crs.strip() else None
    return crs if isinstance(crs, int) and not isinstance(crs, bool) else None
