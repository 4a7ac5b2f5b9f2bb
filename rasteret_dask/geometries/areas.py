# SPDX-License-Identifier: Apache-2.0
"""Areas and points in whatever form the user has them, as WKB in lon/lat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
import shapely.geometry

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.errors import PlanError
from rasteret_dask.footprint import area_of, within_world

__all__ = ["as_area", "as_labels", "as_points", "as_regions", "bbox_of"]


def bbox_of(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """Check a (west, south, east, north) box in degrees; west of its east it crosses the antimeridian.

    Raises
    ------
    PlanError
        When it is not four finite numbers, or has no width or height.
    """
    try:
        west, south, east, north = (float(v) for v in bbox)
    except (TypeError, ValueError) as error:
        raise PlanError("bbox", repr(bbox), "(west, south, east, north) in degrees") from error
    across = -180 <= east < west <= 180
    inside = abs(west) <= 360 and abs(east) <= 360 and abs(south) <= 90 and abs(north) <= 90
    if not ((west < east or across) and south < north and inside):
        raise PlanError(
            "bbox", repr(tuple(bbox)), "(west, south, east, north) in degrees, south < north and west < east",
            "Only across the antimeridian west is larger than east: (177, -20, -177, -10).",
        )  # fmt: skip
    return west, south, east, north


def as_area(value: Any) -> str:
    """Return an area as hex WKB in lon/lat: bbox, shapely, GeoJSON, WKB, a GeoDataFrame, or a sequence of them."""
    try:
        shapes = _shapes(value)
        beyond = next((s for s in shapes if not _in_degrees(s)), None)
        area = (
            shapely.union_all([within_world(s) for s in shapes if not s.is_empty])
            if beyond is None
            else beyond
        )
    except (shapely.errors.ShapelyError, AttributeError, KeyError) as error:
        raise PlanError("area", f"{repr(value)[:200]} ({error})", "a geometry that can be read") from error
    if shapely.is_empty(area):
        raise PlanError("area", repr(value)[:200], "a geometry that is not empty")
    if beyond is not None:
        west, south, east, north = shapely.bounds(beyond)
        raise PlanError(
            "area", f"bounds {west:g}, {south:g}, {east:g}, {north:g}", "degrees of lon/lat (EPSG:4326)"
        )
    # in one order of parts and corners: the same area is the same plan, also when it is read from a recipe again
    return str(shapely.to_wkb(shapely.normalize(shapely.make_valid(area)), hex=True))


def _in_degrees(area: Any) -> bool:
    west, south, east, north = shapely.bounds(area)
    return not (abs(south) > 90 or abs(north) > 90 or abs(west) > 360 or abs(east) > 360)


def _shapes(value: Any) -> list[Any]:
    if hasattr(value, "to_crs") and hasattr(value, "geometry"):
        return list(_lonlat(value).geometry.to_numpy())
    if isinstance(value, shapely.Geometry):
        return [value]
    if isinstance(value, bytes):
        return [shapely.from_wkb(value)]
    if isinstance(value, Mapping):
        if value.get("type") == "FeatureCollection":
            return [s for f in value["features"] for s in _shapes(f["geometry"])]
        return [shapely.geometry.shape(value["geometry"] if value.get("type") == "Feature" else value)]
    if isinstance(value, np.ndarray):
        return _shapes(value.tolist())
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return [s for v in value.to_pylist() for s in _shapes(v)]
    if isinstance(value, pa.Table):
        return _shapes(value.column("geometry"))
    if (
        isinstance(value, Sequence)
        and len(value) == 4
        and all(isinstance(v, int | float | np.number) for v in value)
    ):
        return [area_of([bbox_of(value)])]
    if isinstance(value, Sequence) and len(value) and not isinstance(value, str):
        return [s for v in value for s in _shapes(v)]
    raise PlanError(
        "area", repr(value)[:200], "a bbox, shapely, GeoJSON, WKB, GeoDataFrame, or several of them"
    )


def _lonlat(frame: Any) -> Any:
    if frame.crs is None:
        raise PlanError("geometries of a GeoDataFrame", "no CRS", "a CRS", "Set it: gdf.set_crs(4326).")
    return frame.to_crs(4326)


def as_labels(value: Any) -> pa.Table:
    """Return a table of shapes with the user's columns: ``geometry`` is WKB in lon/lat.

    Raises
    ------
    PlanError
        When there is no geometry, or no row.
    """
    return _table_of(value, "chips(labels=)")[0]


def as_regions(value: Any) -> pa.Table:
    """Return a table of regions with the user's columns: ``geometry`` is WKB in lon/lat.

    Raises
    ------
    PlanError
        When there is no geometry, or no row.
    """
    return _table_of(value, "split(by=<regions>)")[0]


def as_points(value: Any) -> pa.Table:
    """Return a table of windows to come: ``geometry`` (WKB, lon/lat), ``__index__``, and the user's columns.

    Raises
    ------
    PlanError
        When there is no geometry, or no row.
    """
    table, index = _table_of(value, "chips(at=)")
    if "__index__" in table.column_names:  # it was such a table before
        index, table = table.column("__index__").to_pylist(), table.drop_columns(["__index__"])
    taken = [n for n in table.column_names if n in CHIP_SCHEMA.names and n != "geometry"]
    if taken:
        raise PlanError(
            "chips(at=)",
            f"columns {', '.join(taken)}, which every chip table has",
            "labels of other names",
            "Give them other names: gdf.rename(columns=...).",
        )
    if len(set(index)) != len(index):
        raise PlanError(
            "chips(at=)", "an index value that stands twice", "a unique index", "Call reset_index()."
        )
    return table.append_column("__index__", pa.array(index))


def _table_of(value: Any, subject: str) -> tuple[pa.Table, list[str]]:
    """Return shapes with their columns, and what each row is called."""
    if hasattr(value, "to_crs") and hasattr(value, "geometry"):
        frame = _lonlat(value)
        wkb = pa.array(shapely.to_wkb(np.asarray(frame.geometry.to_numpy())), pa.binary())
        plain = (
            frame.drop(columns=frame.geometry.name)
            if hasattr(frame, "columns")
            else frame.to_frame().iloc[:, :0]
        )
        own = pa.Table.from_pandas(plain, preserve_index=False)
        names = [*own.column_names, "geometry"]  # a table without columns would have no rows
        table = pa.Table.from_arrays([*own.columns, pa.chunked_array([wkb])], names=names)
        index = [str(i) for i in frame.index]
    elif isinstance(value, pa.Table) and "geometry" in value.column_names:
        table = value.replace_schema_metadata(None)
        index = [str(i) for i in range(value.num_rows)]
    elif isinstance(value, Sequence) and value and not isinstance(value, str):
        shapes = [shapely.Point(v) if _is_pair(v) else _shapes(v)[0] for v in value]
        table = pa.table({"geometry": pa.array(shapely.to_wkb(shapes), pa.binary())})
        index = [str(i) for i in range(len(shapes))]
    else:
        raise PlanError(subject, type(value).__name__, "a GeoDataFrame, a table with WKB geometry, or points")
    if not table.num_rows:
        raise PlanError(subject, "no row", "at least one")
    return table, index


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
