# SPDX-License-Identifier: Apache-2.0
"""Areas, points and labels of a recipe: files, boxes, points and GeoJSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import shapely
import shapely.geometry

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.table import geoparquet

__all__ = ["shapes_of"]


def shapes_of(value: Any, place: Callable[[str], str]) -> Any:
    """Return what the API takes for an area, points or labels of a recipe.

    Parameters
    ----------
    value
        A file's path, a box, points, GeoJSON, or ``{"wkb": hexadecimal digits}``.
    place
        Returns the place that a path of the recipe names.

    Raises
    ------
    PlanError
        When a file is missing, or holds something else.
    """
    if isinstance(value, str):
        return _of_file(Path(place(value)))
    if isinstance(value, dict) and value.keys() == {"wkb"}:
        try:
            data = bytes.fromhex(value["wkb"])
            shapely.from_wkb(data)
        except (TypeError, ValueError, shapely.errors.ShapelyError) as error:
            raise PlanError(
                "shape in the recipe", f"wkb = {value['wkb']!r:.60} ({error})", "WKB in hexadecimal digits"
            ) from error
        return data
    if isinstance(value, dict):
        return _of_geojson(value, "GeoJSON in the recipe")
    return value


def _of_file(path: Path) -> Any:
    if not path.is_file():
        near = (
            sorted(one.name for one in path.parent.glob(f"*{path.suffix}"))[:5]
            if path.parent.is_dir()
            else []
        )
        remedy = f"There are {', '.join(near)}." if near else ""
        raise PlanError(
            f"shapes of {path}", "no such file", "GeoJSON, GeoParquet or another vector file", remedy
        )
    if path.suffix.lower() in (".geojson", ".json"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"shapes of {path}", f"no JSON ({error})", "GeoJSON") from error
        return _of_geojson(data, f"shapes of {path}")
    if path.suffix.lower() in (".parquet", ".geoparquet"):
        return geoparquet.read(path)
    with needs("geo", f"shapes of {path}"):
        import geopandas
    return geopandas.read_file(path)


def _of_geojson(data: Any, subject: str) -> pa.Table:
    """Return a table of shapes: ``geometry`` as WKB, and the features' properties."""
    kind = data.get("type") if isinstance(data, dict) else None
    features = data.get("features") if kind == "FeatureCollection" else [data]
    try:
        shapes = [
            shapely.geometry.shape(one["geometry"] if one["type"] == "Feature" else one) for one in features
        ]
    except (KeyError, TypeError, AttributeError, ValueError, shapely.errors.ShapelyError) as error:
        raise PlanError(
            subject, f"no geometries ({error!r:.100})", "GeoJSON: features or a geometry"
        ) from error
    names = dict.fromkeys(name for one in features for name in one.get("properties") or ())
    columns = {name: [(one.get("properties") or {}).get(name) for one in features] for name in names}
    return pa.table({**columns, "geometry": pa.array(shapely.to_wkb(shapes), pa.binary())})
