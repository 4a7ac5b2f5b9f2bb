# SPDX-License-Identifier: Apache-2.0
"""Polygons with a class each, burned into masks on the pixels of chips."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray
from pyproj import Geod

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.crs import crs_of
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import transformer
from rasteret_dask.lists import listed
from rasteret_dask.planning.plan import is_number

__all__ = ["Labels", "dense"]

BACKGROUND = 0
"""What whole numbers and classes are where no polygon lies; NaN among floats."""

REACH_DEG = 17.0
"""Degrees of longitude beyond a CRS's own ground within which polygons are projected: 20 from a UTM zone's meridian."""

POLE_DEG = 88.0
"""Latitude up to which polygons are projected, or the CRS's own: many CRSs have no finite place for a pole."""

EDGE_DEG = 0.01
EDGE_M = 1000.0
"""Edges longer than these get vertices before they are projected: straight lines of two CRSs between vertices so near
part by some 12 mm (a parallel's sag in UTM is its angle squared, / 8 * Earth's radius * sin * cos of the latitude)."""

MANY_VERTICES = 256
"""Polygons of more are cut to a chip's surroundings before they are burned."""

MAX_RADIUS_M = 100_000.0
"""Of the ground around a point label: a circle of more is no label of a place."""

VERTICES = 128
"""Of a circle on the ground: between two of them its edge lies 0.03 % of the radius inside."""

_ELLIPSOID = Geod(ellps="WGS84")
_WHOLE = ("uint8", "int16", "uint16", "int32", "uint32")
_BURNING = Lock()
"""rasterio 1.4 changes the process's warning filters while it burns (``catch_warnings`` around its raster in memory):
two threads would undo each other's change."""
_ITS_OWN = re.compile("Dataset has no geotransform", re.IGNORECASE), re.compile(r"rasterio\.features")
"""Message and module of what it warns of then, and hides; whoever else calls ``catch_warnings`` in a thread beside it
may bring it to light."""

_POINTS = (0, 4)  # type ids of Point and MultiPoint
_POLYGONAL = (3, 6)  # of Polygon and MultiPolygon


@dataclass(frozen=True, eq=False)
class Labels:
    """Polygons, and what their pixels get.

    A pixel has the value of the last row whose polygon holds its centre (``all_touched=False``; of a ring that crosses
    itself, what lies inside an odd number of times). Edges are straight in lon/lat; see :func:`dense` for others.
    """

    table: pa.Table
    """``geometry`` (WKB, lon/lat) and ``value``, of the mask's dtype, in the order of burning."""
    column: str
    """The user's column."""
    source: int
    """The source on whose pixels masks lie."""
    classes: tuple[str, ...] = ()
    """Of a column of text: class i is called classes[i - 1]."""
    name: str = MASK
    """What the variable is called: ``mask``, or of several columns ``mask_<column>``."""

    @classmethod
    def of_columns(
        cls,
        table: pa.Table,
        columns: str | tuple[str, ...],
        source: int = 0,
        classes: Sequence[Any] = (),
        radius_m: float | None = None,
    ) -> tuple[Labels, ...]:
        """Settle values and dtype of one column, or of each of several.

        Parameters
        ----------
        table, source, radius_m
            As in :meth:`of`.
        columns
            One column, which becomes ``mask``; or several: each becomes ``mask_<column>``, and a row counts for the
            columns in which it has a value.
        classes
            Of one column, its classes; of several, pairs of a column and its classes.

        Raises
        ------
        PlanError
            As :meth:`of`; or when a column is given twice, or its name is no name of an array.
        """
        if isinstance(columns, str):
            return (cls.of(table, columns, source, classes, radius_m),)
        subject = f"chips(rasterize={list(columns)!r})"
        wrong = [name for name in columns if not name or "/" in name or "\\" in name]
        if not columns or len(set(columns)) != len(columns) or wrong:
            found = f"{wrong[0]!r}" if wrong else "a column twice" if columns else "no column"
            raise PlanError(subject, found, "names of columns, each once, without a slash")
        if radius_m is not None:
            table = _with_circles(table, radius_m)
        own = dict(classes)
        return tuple(_of_several(cls, table, name, source, own.get(name, ())) for name in columns)

    @classmethod
    def of(
        cls,
        table: pa.Table,
        column: str,
        source: int = 0,
        classes: Sequence[str | int] = (),
        radius_m: float | None = None,
    ) -> Labels:
        """Settle values and dtype.

        Parameters
        ----------
        table
            ``geometry`` (WKB, lon/lat) and the column: whole numbers other than 0 (kept as they are), floats
            (become float32), booleans (1 and 0), or text (numbered from 1, by the alphabet or as ``classes`` says).
        column
            Its name.
        source
            The source on whose pixels masks lie.
        classes
            All texts or whole numbers that the column may hold: they settle numbers and dtype, whichever of them are
            there. None: those that are there.
        radius_m
            The geometries are points, and their pixels those whose centres lie so many metres around them, on the
            ellipsoid. None: they are polygons.

        Raises
        ------
        PlanError
            When there is no such column, a row has no value or no polygon (or point), or values are of another kind or
            class; when the radius is no length, or reaches a pole.
        """
        subject = f"chips(rasterize={column!r})"
        _check_column(subject, table, column)
        values = table.column(column).combine_chunks()
        missing = np.flatnonzero(values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False))
        if len(missing):
            raise PlanError(
                subject, f"no value in row {missing[0]} ({len(missing)} such rows)", "a value for each polygon",
                f"Drop such rows: gdf.dropna(subset=[{column!r}]).",
            )  # fmt: skip
        if radius_m is not None:
            table = _with_circles(table, radius_m)
        _check_polygons(subject, table)
        numbers, names = _values(subject, values, tuple(classes))
        plain = pa.table({"geometry": table.column("geometry").combine_chunks(), "value": pa.array(numbers)})
        return cls(plain, column, source, names)

    @classmethod
    def again(cls, table: pa.Table, note: Mapping[str, Any]) -> Labels:
        """Return what a table and :attr:`note` were taken from."""
        return cls(table, note["column"], note["source"], tuple(note["classes"]), note.get("name", MASK))

    @property
    def note(self) -> dict[str, Any]:
        """All but the table, as JSON values."""
        name = {} if self.name == MASK else {"name": self.name}
        return {"column": self.column, "source": self.source, "classes": list(self.classes), **name}

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

    @property
    def what(self) -> str:
        """What masks are made of, in a word."""
        return "polygon"

    def burned(
        self, bounds: NDArray[np.float64], epsg: NDArray[np.int64], size: int, chips: Sequence[str] = ()
    ) -> NDArray[Any]:
        """Return the masks of chips, shape (chip, y, x).

        Parameters
        ----------
        bounds
            Shape (chip, 4): xmin, ymin, xmax, ymax in ``epsg``.
        epsg
            Shape (chip,).
        size
            Side of a chip in pixels.
        chips
            Their ids, for masks that are files.
        """
        masks = np.full((len(bounds), size, size), self.fill, dtype=self.dtype)
        for code in np.unique(epsg).tolist():
            own = np.flatnonzero(epsg == code)
            found = _projected(self, code)
            place, near = found.tree.query(shapely.box(*bounds[own].T))
            for at in np.unique(place).tolist():
                rising = np.sort(near[place == at])  # in the order of rows: the last one wins
                _burn(masks[own[at]], bounds[own[at]], found, rising)
        return masks


def dense(frame: Any) -> Any:
    """Give a GeoDataFrame's long edges vertices, so that they stay where they are when its CRS becomes lon/lat.

    Anything else, and what is in lon/lat already, is returned as it is.
    """
    crs = getattr(frame, "crs", None)
    if crs is None or not crs.is_projected or not hasattr(frame, "set_geometry"):
        return frame
    step = EDGE_M / crs.axis_info[0].unit_conversion_factor
    return frame.set_geometry(_divided(np.asarray(frame.geometry.to_numpy()), step), crs=crs)


def _divided(shapes: NDArray[Any], step: float) -> NDArray[Any]:
    """Return shapes without edges longer than a step; by rings where GEOS would make an invalid polygon another one."""
    crossing = ~shapely.is_valid(shapes) & np.isin(shapely.get_type_id(shapes), _POLYGONAL)
    result = np.array(shapes)
    result[~crossing] = shapely.segmentize(shapes[~crossing], step)
    for at in np.flatnonzero(crossing):
        rings = [shapely.segmentize(shapely.get_rings(p), step) for p in shapely.get_parts(shapes[at])]
        result[at] = shapely.multipolygons([shapely.Polygon(r[0], r[1:]) for r in rings if len(r)])
    return result


def _check_column(subject: str, table: pa.Table, column: str) -> None:
    own = [n for n in table.column_names if n not in ("geometry", "__index__")]
    if column not in own:
        raise PlanError(subject, "no such column", f"one of {', '.join(own) or 'none: there are no columns'}")


def _of_several(
    kind: type[Labels], table: pa.Table, column: str, source: int, classes: Sequence[str | int]
) -> Labels:
    """Return the labels of one of several columns, of the rows that have a value in it."""
    subject = f"chips(rasterize={column!r})"
    _check_column(subject, table, column)
    own = table.filter(pc.invert(pc.is_null(table.column(column), nan_is_null=True)))
    if not own.num_rows:
        raise PlanError(
            subject, f"no value in any of {table.num_rows:,} rows", "a value in one row at least",
            "Leave the column out of rasterize=.",
        )  # fmt: skip
    return replace(kind.of(own, column, source, classes), name=f"{MASK}_{column}")


def _with_circles(table: pa.Table, radius_m: float) -> pa.Table:
    """Return points as the ground around them."""
    return table.set_column(
        table.column_names.index("geometry"), "geometry", pa.array(_circles(table, radius_m))
    )


def _circles(table: pa.Table, radius_m: float) -> list[bytes]:
    """Return WKB of the ground around points, in lon/lat; around the points of a multipoint together."""
    subject = f"chips(radius_m={radius_m!r})"
    if not (is_number(radius_m) and 0 < radius_m <= MAX_RADIUS_M):
        raise PlanError(subject, repr(radius_m), f"metres above 0 and at most {MAX_RADIUS_M:,.0f}")
    shapes = _shapes(table)
    types = shapely.get_type_id(shapes)
    bad = np.flatnonzero(~np.isin(types, _POINTS) | shapely.is_empty(shapes))
    if len(bad):
        shape = shapes[bad[0]]
        raise PlanError(
            subject, f"{'no geometry' if shape is None else shape.geom_type} in row {bad[0]} ({len(bad)} such rows)",
            "a point in every row", "Leave radius_m out for polygons; take gdf.representative_point() for points.",
        )  # fmt: skip
    points, row = shapely.get_parts(shapes, return_index=True)
    lon, lat = shapely.get_coordinates(points).T
    pole = np.where(lat < 0, -90.0, 90.0)
    near = np.flatnonzero(_ELLIPSOID.inv(lon, lat, lon, pole)[2] <= radius_m)
    if len(near):
        raise PlanError(
            subject, f"a pole within that distance of row {row[near[0]]}", "ground that holds no pole",
            "Choose a smaller radius, or drop such rows.",
        )  # fmt: skip
    turn = np.linspace(0, 360, VERTICES, endpoint=False)
    west, south, azimuth = (a.ravel() for a in np.broadcast_arrays(lon[:, None], lat[:, None], turn))
    x, y, _ = _ELLIPSOID.fwd(west, south, azimuth, np.full(len(azimuth), float(radius_m)))
    x = west + (x - west + 180) % 360 - 180  # across the antimeridian too
    rings = shapely.polygons(np.stack([x, y], -1).reshape(len(lon), VERTICES, 2))
    ends = np.searchsorted(row, np.arange(len(shapes) + 1))
    grounds = [shapely.union_all(rings[a:b]) if b - a > 1 else rings[a] for a, b in pairwise(ends.tolist())]
    return list(shapely.to_wkb(grounds))


def _check_polygons(subject: str, table: pa.Table) -> None:
    shapes = _shapes(table)
    types = shapely.get_type_id(shapes)  # -1 where there is none
    bad = np.flatnonzero(~np.isin(types, _POLYGONAL) | shapely.is_empty(shapes))
    if len(bad):
        shape = shapes[bad[0]]
        raise PlanError(
            subject, f"{'no geometry' if shape is None else shape.geom_type} in row {bad[0]} ({len(bad)} such rows)",
            "a polygon in every row", "Say how far points reach: radius_m=20; or give them polygons of their own.",
        )  # fmt: skip


def _shapes(table: pa.Table) -> NDArray[Any]:
    return np.asarray(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))


def _values(
    subject: str, values: pa.Array, classes: tuple[str | int, ...]
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return what to burn, in the smallest dtype that holds it, and the names of classes."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if classes:
        _check_classes(subject, values, classes)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = [str(name) for name in classes] or sorted(values.unique().to_pylist())
        numbers = pc.index_in(values, pa.array(names, kind)).to_numpy().astype(np.int64) + 1
        return numbers.astype(_smallest(subject, np.array([1, len(names)]))), tuple(names)
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
    return numbers.astype(_smallest(subject, np.array(classes) if classes else numbers)), ()


def _check_classes(subject: str, values: pa.Array, classes: tuple[str | int, ...]) -> None:
    """Refuse a list of classes that is none, or that lacks a value of the column."""
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    kind, word = (str, "texts") if is_text else (int, "whole numbers other than 0")
    if not is_text and not pa.types.is_integer(values.type):
        raise PlanError(
            subject, f"classes= for a column of {values.type}", "a column of text or whole numbers",
            "Leave classes out: such values are burned as they are.",
        )  # fmt: skip
    wrong = [one for one in classes if not isinstance(one, kind) or isinstance(one, bool) or one in (0, "")]
    if wrong or len(set(classes)) != len(classes):
        found = f"classes=[{', '.join(map(repr, classes))}]"
        raise PlanError(subject, found, f"{word}, each once, as column and classes are of one kind")
    there = values.to_pylist()
    others = sorted(set(there) - set(classes))
    if others:
        rows, column = sum(value in others for value in there), subject.split("'")[1]
        raise PlanError(
            subject, f"class {listed([repr(one) for one in others])} in {rows} rows",
            f"one of classes={list(classes)!r}",
            f"Add it to classes, or drop such rows: gdf[gdf[{column!r}].isin(classes)].",
        )  # fmt: skip


def _smallest(subject: str, numbers: NDArray[Any]) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    for name in _WHOLE:
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return name
    raise PlanError(subject, f"values from {low} to {high}", "values that 32 bits hold")


@dataclass(frozen=True, slots=True)
class _Projected:
    """Polygons in a chip's CRS, in the order of burning."""

    values: NDArray[Any]
    shapes: NDArray[Any]
    cuttable: NDArray[np.bool_]
    """Which have many vertices and are valid: a cut of others is an error, or another shape."""
    tree: shapely.STRtree
    """Of their boxes."""


@lru_cache(maxsize=8)
def _projected(labels: Labels, epsg: int) -> _Projected:
    """Return the polygons near a CRS's ground: once a process and CRS."""
    shapes, values = _shapes(labels.table), labels.table.column("value").to_numpy()
    row, near = _cut_to(shapes, _surroundings(epsg))
    move = transformer(4326, epsg).transform
    moved = shapely.transform(_divided(near, EDGE_DEG), lambda xy: np.stack(move(xy[:, 0], xy[:, 1]), -1))
    there = np.isfinite(shapely.bounds(moved)).all(axis=1)
    moved = moved[there]
    cuttable = shapely.get_num_coordinates(moved) > MANY_VERTICES
    cuttable[cuttable] = shapely.is_valid(moved[cuttable])
    return _Projected(values[row[there]], moved, cuttable, shapely.STRtree(moved))


def _surroundings(epsg: int) -> tuple[float, float, float, float]:
    """Return west, south, east, north of the ground on which a CRS's coordinates mean something, degrees."""
    area = crs_of(epsg).area_of_use
    west, south, east, north = area.bounds if area is not None else (-180.0, -90.0, 180.0, 90.0)
    east += 360.0 * (east < west)
    reach = min(REACH_DEG, (360.0 - (east - west)) / 2)
    return west - reach, min(south, -POLE_DEG), east + reach, max(north, POLE_DEG)


def _cut_to(
    shapes: NDArray[Any], ground: tuple[float, float, float, float]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return rows, rising, and their polygons on some ground, from wherever round the Earth they are written."""
    bounds = shapely.bounds(shapes)
    rows, found = [], []
    for turn in (-360.0, 0.0, 360.0):
        west, south, east, north = np.add(ground, (turn, 0.0, turn, 0.0))
        near = np.flatnonzero((bounds[:, 0] <= east) & (bounds[:, 2] >= west))
        some = shapes[near]
        beyond = (bounds[near, :2] < (west, south)).any(axis=1) | (bounds[near, 2:] > (east, north)).any(
            axis=1
        )
        for at in np.flatnonzero(beyond):
            some[at] = shapely.intersection(_valid(some[at]), shapely.box(west, south, east, north))
        rows.append(near)
        found.append(shapely.transform(some, lambda xy, turn=turn: xy - (turn, 0.0)) if turn else some)
    row, shape = np.concatenate(rows), np.concatenate(found)
    order = np.argsort(row, kind="stable")
    return row[order], shape[order]


def _valid(shape: Any) -> Any:
    """Return the same area as a valid shape, by the even-odd rule that GDAL burns by."""
    if shape.is_valid:
        return shape
    parts = shapely.get_parts(shapely.get_parts([shapely.make_valid(shape)]))
    return shapely.multipolygons(parts[shapely.get_type_id(parts) == _POLYGONAL[0]])


def _burn(
    mask: NDArray[Any], bounds: NDArray[np.float64], polygons: _Projected, near: NDArray[np.int64]
) -> None:
    """Burn some of the polygons into one chip, shape (y, x)."""
    xmin, ymin, xmax, ymax = bounds.tolist()
    room = (xmax - xmin) / 2
    pairs = []
    for at in near.tolist():
        shape, value = polygons.shapes[at], polygons.values[at].item()
        if polygons.cuttable[at]:
            shape = shapely.clip_by_rect(shape, xmin - room, ymin - room, xmax + room, ymax + room)
        parts = shapely.get_parts(shape)  # a cut may leave lines, which GDAL would burn too
        pairs += [(p, value) for p in parts if p.geom_type == "Polygon" and not p.is_empty]
    if pairs:
        # rasterio takes a while to load: only who has labels waits for it
        from rasterio.errors import NotGeoreferencedWarning
        from rasterio.features import rasterize
        from rasterio.transform import from_bounds

        height, width = mask.shape
        grid = from_bounds(xmin, ymin, xmax, ymax, width, height)
        with _BURNING:
            _hide_its_own()
            try:
                rasterize(pairs, out=mask, transform=grid)
            except (
                NotGeoreferencedWarning
            ):  # an error by the user's filters; a thread beside put them back right now
                _hide_its_own()
                rasterize(pairs, out=mask, transform=grid)


def _hide_its_own() -> None:
    """Ignore what rasterio says of its own raster in memory, from now on and in all threads."""
    from rasterio.errors import NotGeoreferencedWarning

    message, module = _ITS_OWN
    own = ("ignore", message, NotGeoreferencedWarning, module, 0)
    if next(iter(warnings.filters), None) != own:  # behind another one it might not count
        warnings.filterwarnings("ignore", message.pattern, NotGeoreferencedWarning, module.pattern)
