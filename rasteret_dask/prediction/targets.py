# SPDX-License-Identifier: Apache-2.0
"""Where what a model says goes: told by the type of ``to``, or by what its path ends in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from rasteret_dask.errors import PlanError
from rasteret_dask.prediction.cogtiles import CogTiles
from rasteret_dask.prediction.mapstore import MapZarr

__all__ = ["MapCog", "Target", "VectorTable", "target_of"]

Target: TypeAlias = "str | os.PathLike[str] | MapZarr | CogTiles"
"""What ``to`` takes: a path that ends in ``.zarr``, ``.tif`` or ``.parquet``, or a value with options."""


@dataclass(frozen=True, slots=True)
class MapCog:
    """One COG for each zone of a map."""

    path: str


@dataclass(frozen=True, slots=True)
class VectorTable:
    """One GeoParquet file with a row for each chip."""

    path: str


def target_of(to: Target) -> MapZarr | CogTiles | MapCog | VectorTable:
    """Return where something goes.

    Raises
    ------
    PlanError
        When a path ends in nothing that tells.
    """
    if isinstance(to, MapZarr | CogTiles):
        return to
    path = os.fspath(to) if isinstance(to, str | os.PathLike) else ""
    kinds: dict[str, Any] = {
        ".zarr": MapZarr,
        ".tif": MapCog,
        ".tiff": MapCog,
        ".parquet": VectorTable,
    }
    bare = path.rstrip("/").lower()
    for suffix, kind in kinds.items():
        if bare.endswith(suffix):
            target: MapZarr | MapCog | VectorTable = kind(path)
            return target
    raise PlanError(
        "predict(to=)", repr(to), "a path that ends in .zarr, .tif or .parquet, a MapZarr or a CogTiles",
        "A folder of COGs is CogTiles('folder').",
    )  # fmt: skip
