# SPDX-License-Identifier: Apache-2.0
"""Geometries in any form become windows of pixels: each its own, or squares of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.frame import BLOCK_PX, STRIP, Frame, Phase
from rasteret_dask.crs import number, text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.footprint import within_world
from rasteret_dask.geometries.areas import as_area
from rasteret_dask.grid import northern, transformer
from rasteret_dask.zones import UTM

__all__ = [
    "Geometries",
    "PixelGrids",
    "codes_of",
    "epsg_of",
    "frame_of",
    "geometries_of",
    "own_bounds",
    "square_bounds",
]

EDGE_PX = 1e-6
"""An edge this near to a pixel's is that pixel's: degrees and metres do not convert to the last digit."""

BEND_DEG = 0.01
"""Edges are straight in degrees; cut in pieces of this length they stray 3 cm from that in a zone, at most."""


@dataclass(frozen=True)
class Geometries:
    """What a user gave, in the user's order."""

    shape: NDArray[Any]
    """Shape (geometry,). Shapely, lon/lat."""
    labels: pa.Table
    """The user's further columns, a row a geometry; without columns where there are none."""

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def inside(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Longitude and latitude of a point in each, shape (geometry,) each."""
        points = shapely.point_on_surface(self.shape)
        return np.asarray(shapely.get_x(points)), np.asarray(shapely.get_y(points))

    def projected(self, codes: NDArray[np.int64]) -> NDArray[Any]:
        """Return each in a CRS of its own, edges bent as they are there; shape (geometry,)."""
        result = np.array(shapely.segmentize(self.shape, BEND_DEG), dtype=object)
        for code in np.unique(codes).tolist():
            own = np.flatnonzero(codes == code)
            move = transformer(4326, code).transform
            result[own] = shapely.transform(
                result[own], lambda xy, move=move: np.stack(move(xy[:, 0], xy[:, 1]), -1)
            )
        return result


@dataclass(frozen=True)
class PixelGrids:
    """The grids that windows lie on: one pixel size, and in each CRS a corner."""

    size: float
    """Side of a pixel, in units of the CRS."""
    phase: Phase
    """CRS -> (x, y) of a pixel's corner; (0, 0) for any other."""

    def corner(self, code: int) -> tuple[float, float]:
        """Return a pixel's corner in a CRS."""
        return self.phase.get(code, (0.0, 0.0))


def geometries_of(value: Any) -> Geometries:
    """Read geometries in lon/lat: a bbox, shapely, GeoJSON, WKB, (lon, lat) pairs, an array, a table or a frame.

    Raises
    ------
    PlanError
        When there is none, or one cannot be read or is empty.
    """
    if hasattr(value, "to_crs") and hasattr(value, "geometry"):
        return _of_frame(value)
    if isinstance(value, pa.Table) and "geometry" in value.column_names:
        wkb = value.column("geometry").to_numpy(zero_copy_only=False)
        return _checked(shapely.from_wkb(wkb), value.drop_columns(["geometry"]))
    found = _parts(value)
    shapes = np.empty(len(found), dtype=object)
    for index, part in enumerate(found):
        try:
            shapes[index] = _shape(part)
        except PlanError as error:
            raise PlanError(f"geometry {index}", error.found, error.expected, error.remedy) from error
    return _checked(shapes, pa.table({}))


def _of_frame(frame: Any) -> Geometries:
    """Take a GeoDataFrame or a GeoSeries."""
    if frame.crs is None:
        raise PlanError("geometries of a GeoDataFrame", "no CRS", "a CRS", "Set it: gdf.set_crs(4326).")
    labels = pa.table({})
    if hasattr(frame, "columns"):
        own = frame.drop(columns=frame.geometry.name)
        labels = pa.Table.from_pandas(own, preserve_index=False).replace_schema_metadata(None)
    return _checked(frame.to_crs(4326).geometry.to_numpy(), labels)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and value.get("type") == "FeatureCollection":
        return list(value["features"])
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return list(value.to_pylist())
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and not _is_numbers(value):
        return list(value)
    return [value]


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) in (2, 4)
        and all(isinstance(v, int | float | np.number) for v in value)
    )


def _shape(part: Any) -> Any:
    if isinstance(part, shapely.Geometry) and part.is_valid:
        return part
    if _is_numbers(part) and len(part) == 2:
        return shapely.Point(part)
    return shapely.from_wkb(as_area(part))


def _checked(shapes: NDArray[Any], labels: pa.Table) -> Geometries:
    if not len(shapes):
        raise PlanError("geometries", "none", "at least one")
    bad = np.flatnonzero(shapely.is_missing(shapes) | shapely.is_empty(shapes))
    if len(bad):
        raise PlanError(f"geometry {bad[0]}", "no geometry", "one that is not empty", "Leave it out.")
    box = shapely.bounds(shapes)
    far = np.flatnonzero(
        (np.abs(box[:, [0, 2]]) > 360).any(axis=1) | (np.abs(box[:, [1, 3]]) > 90).any(axis=1)
    )
    if len(far):
        west, south, east, north = box[far[0]]
        raise PlanError(
            f"geometry {far[0]}", f"bounds {west:g}, {south:g}, {east:g}, {north:g}",
            "degrees of lon/lat (EPSG:4326)", "Give it as a GeoDataFrame that knows its CRS.",
        )  # fmt: skip
    return Geometries(np.array([within_world(s) for s in shapes], dtype=object), labels)


def epsg_of(crs: Any) -> int:
    """Return the number of a CRS in any form; 327zz becomes its northern twin 326zz.

    Raises
    ------
    GridError
        When PROJ does not know it.
    """
    try:
        return northern(number(crs))[0]
    except GridError as error:
        raise GridError("target_crs=", f"{crs!r:.80}, {error.found}", "a CRS, such as 'EPSG:3035'") from error


def codes_of(
    geometries: Geometries, records: NDArray[Any], target: int | None, metric: bool
) -> NDArray[np.int64]:
    """Return the CRS that each geometry's window lies in, shape (geometry,).

    Parameters
    ----------
    geometries
        The geometries.
    records
        CRSs of the records.
    target
        The CRS asked for, or None: the UTM zone (326zz) that the geometry lies in; where records are not in UTM,
        their own CRS.
    metric
        Whether the pixel size is asked for, in metres: then always the zone.

    Raises
    ------
    GridError
        When records lie in several CRSs that are no UTM zones.
    """
    if target is not None:
        return np.full(len(geometries), target, dtype=np.int64)
    own = sorted({northern(int(code))[0] for code in np.unique(records)})
    if metric or all(UTM.has(code) for code in own):
        return UTM.codes(*geometries.inside)
    if len(own) > 1:
        raise GridError(
            "geometries", f"records in {', '.join(map(text, own))}", "one CRS, or UTM zones",
            "Choose one with target_crs= and resolution=.",
        )  # fmt: skip
    return np.full(len(geometries), own[0], dtype=np.int64)


def own_bounds(shapes: NDArray[Any], codes: NDArray[np.int64], pixels: PixelGrids) -> NDArray[np.float64]:
    """Return xmin, ymin, xmax, ymax of each geometry, snapped out to pixel edges; shape (geometry, 4).

    A point has the pixel that it lies in: that below and right of it where it lies on an edge, as in rasterio.
    """
    x0, y0 = np.array([pixels.corner(int(c)) for c in codes]).T
    box = shapely.bounds(shapes)
    left = np.floor((box[:, 0] - x0) / pixels.size + EDGE_PX)
    top = np.floor((y0 - box[:, 3]) / pixels.size + EDGE_PX)
    right = np.maximum(np.ceil((box[:, 2] - x0) / pixels.size - EDGE_PX), left + 1)
    bottom = np.maximum(np.ceil((y0 - box[:, 1]) / pixels.size - EDGE_PX), top + 1)
    edges = np.stack([x0 + left * pixels.size, y0 - bottom * pixels.size,
                      x0 + right * pixels.size, y0 - top * pixels.size], -1)  # fmt: skip
    return np.asarray(np.round(edges, 9), dtype=np.float64)


def square_bounds(
    geometries: Geometries, codes: NDArray[np.int64], pixels: PixelGrids, side: int
) -> NDArray[np.float64]:
    """Return squares of ``side`` pixels round a point in each geometry, as ``chips(at=)`` lays them; shape (n, 4)."""
    lon, lat = geometries.inside
    x, y = np.empty(len(geometries)), np.empty(len(geometries))
    for code in np.unique(codes).tolist():
        at = np.flatnonzero(codes == code)
        x[at], y[at] = transformer(4326, code).transform(lon[at], lat[at])
    x0, y0 = np.array([pixels.corner(int(c)) for c in codes]).T
    length = side * pixels.size
    west = x0 + np.round((x - length / 2 - x0) / pixels.size) * pixels.size
    north = y0 + np.round((y + length / 2 - y0) / pixels.size) * pixels.size
    return np.asarray(np.round(np.stack([west, north - length, west + length, north], -1), 9))


def frame_of(codes: NDArray[np.int64], bounds: NDArray[np.float64], pixel: float) -> Frame:
    """Return windows as the planner takes them: near each other in space, numbered by ``index``."""
    side = BLOCK_PX * pixel
    col = np.floor(bounds[:, [0, 2]].mean(1) / side)
    row = np.floor(-bounds[:, [1, 3]].mean(1) / side)
    order = np.lexsort((row, col, row // STRIP, codes))
    nothing = np.zeros(len(order), dtype=np.int64)
    names = pa.array([""] * len(order))
    return Frame(codes[order], bounds[order], nothing, nothing, None, order, names)
