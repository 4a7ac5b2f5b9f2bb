"""Polygons with a class each, burned into masks on the pixels of chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import from_bounds

from rasteret_dask.errors import PlanError
from rasteret_dask.grid import transformer

__all__ = ["Labels"]

BACKGROUND = 0
"""What whole numbers and classes are where no polygon lies; NaN among floats."""

ZONE_REACH = 20.0
"""Degrees from a UTM zone's central meridian within which polygons are projected; a chip is at most 7 away."""

MANY_VERTICES = 256
"""Polygons of more are cut to a chip's surroundings before they are burned."""

_WHOLE = ("uint8", "int16", "uint16", "int32", "uint32")
_BURNING = Lock()
"""rasterio changes the process's warning filters while it burns: two threads would undo each other's change."""

_POLYGONAL = (3, 6)  # type ids of Polygon and MultiPolygon


@dataclass(frozen=True, eq=False)
class Labels:
    """Polygons, and what their pixels get.

    A pixel has the value of the last row whose polygon holds its centre (``all_touched=False``); edges are straight
    between vertices in the chip's CRS.
    """

    table: pa.Table
    """``geometry`` (WKB, lon/lat) and ``value``, of the mask's dtype, in the order of burning."""
    column: str
    """The user's column."""
    source: int
    """The source on whose pixels masks lie."""
    classes: tuple[str, ...] = ()
    """Of a column of text: class i is called classes[i - 1]."""

    @classmethod
    def of(cls, table: pa.Table, column: str, source: int = 0) -> Labels:
        """Settle values and dtype.

        Parameters
        ----------
        table
            ``geometry`` (WKB, lon/lat) and the column: whole numbers other than 0 (kept as they are), floats
            (become float32), booleans (1 and 0), or text (numbered from 1 in alphabetical order).
        column
            Its name.
        source
            The source on whose pixels masks lie.

        Raises
        ------
        PlanError
            When there is no such column, a row has no value or no polygon, or values are of another kind.
        """
        subject = f"chips(rasterize={column!r})"
        own = [n for n in table.column_names if n not in ("geometry", "__index__")]
        if column not in own:
            raise PlanError(
                subject, "no such column", f"one of {', '.join(own) or 'none: there are no columns'}"
            )
        values = table.column(column).combine_chunks()
        missing = np.flatnonzero(values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False))
        if len(missing):
            raise PlanError(
                subject, f"no value in row {missing[0]} ({len(missing)} such rows)", "a value for each polygon",
                f"Drop such rows: gdf.dropna(subset=[{column!r}]).",
            )  # fmt: skip
        _check_polygons(subject, table)
        numbers, classes = _values(subject, values)
        plain = pa.table({"geometry": table.column("geometry").combine_chunks(), "value": pa.array(numbers)})
        return cls(plain, column, source, classes)

    @classmethod
    def again(cls, table: pa.Table, said: Mapping[str, Any]) -> Labels:
        """Return what a table and :attr:`said` were taken from."""
        return cls(table, said["column"], said["source"], tuple(said["classes"]))

    @property
    def said(self) -> dict[str, Any]:
        """All but the table, as JSON values."""
        return {"column": self.column, "source": self.source, "classes": list(self.classes)}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The mask's dtype."""
        found: np.dtype[Any] = np.dtype(self.table.schema.field("value").type.to_pandas_dtype())
        return found

    @property
    def fill(self) -> float:
        """What pixels without a polygon get."""
        return float("nan") if self.dtype.kind == "f" else BACKGROUND

    @property
    def attrs(self) -> dict[str, Any]:
        """What the variable says of itself; ``classes`` has a name for each value, 0 included."""
        said: dict[str, Any] = {"long_name": self.column}
        return said | {"classes": ["", *self.classes]} if self.classes else said

    def burned(self, bounds: NDArray[np.float64], epsg: NDArray[np.int64], size: int) -> NDArray[Any]:
        """Return the masks of chips, shape (chip, y, x).

        Parameters
        ----------
        bounds
            Shape (chip, 4): xmin, ymin, xmax, ymax in ``epsg``.
        epsg
            Shape (chip,).
        size
            Side of a chip in pixels.
        """
        masks = np.full((len(bounds), size, size), self.fill, dtype=self.dtype)
        for code in np.unique(epsg).tolist():
            own = np.flatnonzero(epsg == code)
            values, shapes, tree = _projected(self, code)
            place, found = tree.query(shapely.box(*bounds[own].T))
            for at in np.unique(place).tolist():
                near = np.sort(found[place == at])  # in the order of rows: the last one wins
                _burn(masks[own[at]], bounds[own[at]], shapes[near], values[near])
        return masks


def _check_polygons(subject: str, table: pa.Table) -> None:
    shapes = _shapes(table)
    types = shapely.get_type_id(shapes)  # -1 where there is none
    bad = np.flatnonzero(~np.isin(types, _POLYGONAL) | shapely.is_empty(shapes))
    if len(bad):
        shape = shapes[bad[0]]
        raise PlanError(
            subject, f"{'no geometry' if shape is None else shape.geom_type} in row {bad[0]} ({len(bad)} such rows)",
            "a polygon in every row", "Give points their own polygons: gdf.set_geometry(gdf.buffer(...)).",
        )  # fmt: skip


def _shapes(table: pa.Table) -> NDArray[Any]:
    return np.asarray(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))


def _values(subject: str, values: pa.Array) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return what to burn, in the smallest dtype that holds it, and the names of classes."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        classes = sorted(values.unique().to_pylist())
        numbers = pc.index_in(values, pa.array(classes, kind)).to_numpy().astype(np.int64) + 1
        return numbers.astype(_smallest(subject, numbers)), tuple(classes)
    if pa.types.is_boolean(kind):
        return values.to_numpy(zero_copy_only=False).astype(np.uint8), ()
    if pa.types.is_floating(kind):
        return values.to_numpy().astype(np.float32), ()
    if not pa.types.is_integer(kind):
        raise PlanError(subject, f"values of type {kind}", "whole numbers, floats, booleans or text")
    numbers = values.to_numpy()
    zeros = int(np.count_nonzero(numbers == BACKGROUND))
    if zeros:
        raise PlanError(
            subject, f"class {BACKGROUND} in {zeros} rows", "other numbers: 0 is ground without a polygon",
            "Number classes from 1 on, or drop the rows if they mean the same.",
        )  # fmt: skip
    return numbers.astype(_smallest(subject, numbers)), ()


def _smallest(subject: str, numbers: NDArray[Any]) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    for name in _WHOLE:
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return name
    raise PlanError(subject, f"values from {low} to {high}", "values that 32 bits hold")


@lru_cache(maxsize=8)
def _projected(labels: Labels, epsg: int) -> tuple[NDArray[Any], NDArray[Any], shapely.STRtree]:
    """Return values and polygons in a chip's CRS, and a tree of their boxes: once a process and CRS.

    Far from a UTM zone its coordinates mean nothing, so there polygons are cut off; those on the other side of the
    antimeridian are near all the same.
    """
    shapes, values = _shapes(labels.table), labels.table.column("value").to_numpy()
    rows = np.arange(len(shapes))
    if 32601 <= epsg <= 32660:
        rows, shapes = _near_zone(shapes, 6.0 * (epsg - 32600) - 183.0)
    move = transformer(4326, epsg).transform
    moved = shapely.transform(shapes, lambda xy: np.stack(move(xy[:, 0], xy[:, 1]), -1))
    there = np.isfinite(shapely.bounds(moved)).all(axis=1)
    return values[rows[there]], moved[there], shapely.STRtree(moved[there])


def _near_zone(shapes: NDArray[Any], middle: float) -> tuple[NDArray[np.int64], NDArray[Any]]:
    bounds = shapely.bounds(shapes)
    rows, found = [], []
    for turn in (-360.0, 0.0, 360.0):
        west, east = middle - ZONE_REACH + turn, middle + ZONE_REACH + turn
        near = np.flatnonzero((bounds[:, 0] <= east) & (bounds[:, 2] >= west))
        some = shapes[near]
        over = (bounds[near, 0] < west) | (bounds[near, 2] > east)
        band = shapely.box(west, -90.0, east, 90.0)
        some[over] = shapely.intersection(shapely.make_valid(some[over]), band)
        rows.append(near)
        found.append(some)
    row, shape = np.concatenate(rows), np.concatenate(found)
    order = np.argsort(row, kind="stable")
    return row[order], shape[order]


def _burn(
    mask: NDArray[Any], bounds: NDArray[np.float64], shapes: NDArray[Any], values: NDArray[Any]
) -> None:
    xmin, ymin, xmax, ymax = bounds.tolist()
    room = (xmax - xmin) / 2
    pairs = []
    for shape, value in zip(shapes, values.tolist(), strict=True):
        if shapely.get_num_coordinates(shape) > MANY_VERTICES:
            shape = shapely.clip_by_rect(shape, xmin - room, ymin - room, xmax + room, ymax + room)
        parts = shapely.get_parts(shape)  # a cut may leave lines, which GDAL would burn too
        pairs += [(p, value) for p in parts if p.geom_type == "Polygon" and not p.is_empty]
    if pairs:
        height, width = mask.shape
        grid = from_bounds(xmin, ymin, xmax, ymax, width, height)
        with _BURNING:
            rasterize(pairs, out=mask, transform=grid)
