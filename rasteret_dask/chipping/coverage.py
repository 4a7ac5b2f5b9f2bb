# SPDX-License-Identifier: Apache-2.0
"""How much of each window of the ground each record covers, compared in the raster's own CRS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from rasteret_dask.crs import text
from rasteret_dask.errors import GridError
from rasteret_dask.extent import is_geographic, misplaced
from rasteret_dask.grid import bounds_in, northern, transformer
from rasteret_dask.table.records import Records

__all__ = ["Cover", "Outlines", "Windows", "cover", "outlines", "union_cover"]

FULL = 1.0 - 1e-9
"""A window covered to this share counts as covered whole (rounding of areas)."""


@dataclass(frozen=True)
class Windows:
    """Candidate chips: rectangles of one CRS."""

    epsg: int
    bounds: NDArray[np.float64]
    """Shape (window, 4): xmin, ymin, xmax, ymax."""

    def in_crs(self, epsg: int, at: NDArray[np.int64]) -> NDArray[Any]:
        """Return some windows as polygons of another CRS; edges stay straight between projected corners."""
        box = self.bounds[at]
        if epsg == self.epsg:
            return np.asarray(shapely.box(box[:, 0], box[:, 1], box[:, 2], box[:, 3]))
        x = box[:, [0, 2, 2, 0]]
        y = box[:, [3, 3, 1, 1]]
        px, py = transformer(self.epsg, epsg).transform(x.ravel(), y.ravel())
        corners = np.stack([np.reshape(px, x.shape), np.reshape(py, x.shape)], -1)
        return np.asarray(shapely.polygons(corners))


@dataclass(frozen=True)
class Outlines:
    """The covered ground of records; records with equal footprint and raster share one outline."""

    of_record: NDArray[np.int64]
    """Shape (record,). Number of each record's outline."""
    epsg: NDArray[np.int64]
    """Shape (outline,). CRS the shape is in: the raster's own; UTM south (327zz) translated to 326zz."""
    shape: NDArray[Any]
    """Shape (outline,). Footprint cut with the raster's rectangle, one pixel larger."""
    raster: NDArray[np.float64]
    """Shape (outline, 4). The raster's own rectangle in that CRS: xmin, ymin, xmax, ymax."""
    centre: NDArray[np.float64]
    """Shape (outline, 2). Centre (x, y) of the raster's rectangle in that CRS."""
    tile_px: NDArray[np.int64]
    """Shape (outline, 2). Width and height of the raster's internal tiles, pixels."""
    transform: NDArray[np.float64]
    """Shape (outline, 6). a, b, c, d, e, f of the raster in that CRS."""
    name: tuple[str, ...]
    """Shape (outline,). Id of one record of each."""

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """Shape (outline, 4): xmin, ymin, xmax, ymax of the shape; NaN where it is empty."""
        return np.asarray(shapely.bounds(self.shape), dtype=np.float64).reshape(-1, 4)

    @cached_property
    def degrees(self) -> NDArray[np.float64]:
        """Shape (outline, 4): west, south, east, north of the shape; all longitudes where it crosses 180 degrees."""
        result = np.full(self.bounds.shape, np.nan)
        for number in np.flatnonzero(~np.isnan(self.bounds[:, 0])):
            result[number] = bounds_in(self.bounds[number], int(self.epsg[number]), 4326)
        across = result[:, 2] < result[:, 0]
        beyond = (result[:, 0] < -180.0) | (result[:, 2] > 180.0)  # a raster that counts from 0 to 360
        turns = np.round((result[:, 0] + result[:, 2]) / 720.0)
        for edge in (0, 2):
            result[beyond, edge] -= 360.0 * turns[beyond]
        across |= (result[:, 0] < -180.0) | (result[:, 2] > 180.0)
        result[across, 0], result[across, 2] = -180.0, 180.0
        return result


@dataclass(frozen=True)
class Cover:
    """Which outline covers which window, and how much of it."""

    window: NDArray[np.int64]
    outline: NDArray[np.int64]
    share: NDArray[np.float64]
    """Covered share of the window's area, above 0 to 1. The three arrays have one entry per pair."""


def outlines(records: Records, band_of_record: NDArray[Any]) -> Outlines:
    """Make the outline of every record from its footprint and the cached header of one of its bands.

    Parameters
    ----------
    records
        The records.
    band_of_record
        Shape (record,). Name of the band whose raster counts, for each record.
    """
    n = len(records)
    transform = np.empty((n, 6))
    size = np.empty((n, 2), dtype=np.int64)
    tile = np.empty((n, 2), dtype=np.int64)
    for band in np.unique(band_of_record):
        at = np.flatnonzero(band_of_record == band)
        rows = records if len(at) == n else records.take(at)
        transform[at] = np.stack(rows.level_field(str(band), "transform").to_numpy())
        for column, (into, names) in enumerate((("width", size), ("height", size))):
            names[at, column] = rows.level_field(str(band), into).to_numpy()
        for column, name in enumerate(("tile_width", "tile_height")):
            tile[at, column] = rows.level_field(str(band), name).to_numpy()
    if np.any(transform[:, [1, 3]] != 0):
        bad = int(np.flatnonzero(np.any(transform[:, [1, 3]] != 0, axis=1))[0])
        raise GridError(
            f"record {records.ids[bad]!r}", "a rotated raster", "rows and columns along the CRS axes"
        )
    wkb = records.table.column("geometry").to_numpy(zero_copy_only=False)
    facts = np.column_stack([records.epsg, transform, size, tile]).astype(np.float64)
    keys: dict[tuple[Any, bytes], int] = {}
    places = [
        keys.setdefault(key, len(keys))
        for key in zip(wkb, facts.view(f"V{facts[:1].nbytes}").ravel().tolist(), strict=True)
    ]
    of_record = np.array(places, dtype=np.int64)
    first: list[int] = np.unique(of_record, return_index=True)[1].tolist()
    ids, own = tuple(records.ids[i] for i in first), records.epsg[first].astype(np.int64)
    epsg, shift = np.array([northern(int(code)) for code in own]).reshape(-1, 2).T
    edges = transform[first][:, [2, 5]]
    edges = np.sort(
        [edges, edges + transform[first][:, [0, 4]] * size[first]], axis=0
    )  # left and low, right and high
    raster = edges.transpose(1, 0, 2).reshape(-1, 4)
    for record, code, place, pixels in zip(
        ids, own.tolist(), transform[first], size[first].tolist(), strict=True
    ):
        reason = misplaced(code, place, *pixels)
        if reason is not None:
            raise GridError(f"record {record!r}", reason, "a raster on Earth", _leave_out(record))
    shapes = np.empty(len(first), dtype=object)
    for code in np.unique(own).tolist():
        at = np.flatnonzero(own == code)
        shapes[at] = _grounds([ids[i] for i in at], wkb[np.array(first)[at]], code, raster[at])
    pixel = np.abs(transform[first][:, [0, 4]]).max(axis=1, initial=0.0)
    shapes = shapely.buffer(shapes, pixel, join_style="mitre", cap_style="square")
    south = np.flatnonzero(shift)
    for metres in np.unique(shift[south]).tolist():
        at = np.flatnonzero(shift == metres)
        shapes[at] = shapely.transform(shapes[at], lambda p, metres=metres: p + np.array([0.0, metres]))
    raster[:, [1, 3]] += shift[:, None]
    moved = transform[first].copy()
    moved[:, 5] += shift
    centre = (raster[:, :2] + raster[:, 2:]) / 2
    return Outlines(of_record, epsg.astype(np.int64), shapes, raster, centre, tile[first], moved, ids)


def _grounds(names: Sequence[str], wkb: NDArray[Any], epsg: int, raster: NDArray[np.float64]) -> NDArray[Any]:
    """Return what rasters of one CRS and their records' outlines in lon/lat share; all of a raster without one.

    Parameters
    ----------
    names
        Ids of the records.
    wkb
        Shape (record,). Their outlines, or None.
    epsg
        The CRS.
    raster
        Shape (record, 4): xmin, ymin, xmax, ymax.
    """
    ground = shapely.box(*raster.T)
    lonlat = shapely.from_wkb(np.array([one or None for one in wkb], dtype=object))
    there = np.flatnonzero(~shapely.is_missing(lonlat))
    footprint = _projected(lonlat[there], epsg)
    if is_geographic(epsg):  # a raster may count from 0 to 360, an outline does not
        turns = [_turned(footprint, turn) for turn in (-360.0, 0.0, 360.0)]
        footprint = shapely.union_all(np.stack(turns, -1), axis=1)
    points, of_shape = shapely.get_coordinates(footprint, return_index=True)
    shown = np.ones(len(there), dtype=bool)
    shown[of_shape[~np.isfinite(points).all(axis=1)]] = False
    for number in there[~shown].tolist():
        if not _meets(raster[number], epsg, lonlat[number]):  # but the poles are nowhere on Mercator's map
            place = ", ".join(f"{v:.6g}" for v in shapely.bounds(lonlat[number]))
            raise GridError(
                f"record {names[number]!r}",
                f"an outline at ({place}) in lon/lat and a raster in {text(epsg)}",
                "a raster within its outline",
                _leave_out(names[number]),
            )
    at = there[shown]
    ground[at] = shapely.intersection(ground[at], shapely.make_valid(footprint[shown]))
    return np.asarray(ground)


def _turned(shape: Any, degrees: float) -> Any:
    return shapely.transform(shape, lambda p: p + np.array([degrees, 0.0]))


def _near(boxes: NDArray[Any], longitude: NDArray[np.float64]) -> NDArray[Any]:
    """Return polygons in degrees on that turn of the globe where some longitudes lie, their corners together."""
    west, _, east, _ = shapely.bounds(boxes).T
    far = np.flatnonzero((np.abs((west + east) / 2 - longitude) > 180.0) | (east - west > 180.0))
    result = boxes.copy()
    for number in far:

        def nearer(p: NDArray[np.float64], middle: float = float(longitude[number])) -> NDArray[np.float64]:
            return p + np.column_stack([360.0 * np.round((middle - p[:, 0]) / 360.0), np.zeros(len(p))])

        result[number] = shapely.transform(boxes[number], nearer)
    return result


def _leave_out(name: str) -> str:
    return f'Leave it out with .where("id", "!=", {name!r}), or build its table again.'


def _meets(box: NDArray[np.float64], epsg: int, lonlat: Any) -> bool:
    """Return whether a raster's rectangle may lie on an outline."""
    try:
        west, south, east, north = bounds_in(box, epsg, 4326)
    except GridError:
        return False
    return bool(shapely.intersects(lonlat, shapely.box(west, south, east if east > west else 180, north)))


def _projected(shape: Any, epsg: int) -> Any:
    return shapely.transform(shape, partial(_moved, transformer(4326, epsg)))


def cover(windows: Windows, footprints: Outlines, pairs: dict[int, NDArray[np.int64]]) -> Cover:
    """Measure the covered share of candidate pairs.

    Parameters
    ----------
    windows
        The windows.
    footprints
        The outlines.
    pairs
        For each outline, the numbers of the windows it may touch.
    """
    outline = np.repeat(np.array([*pairs], dtype=np.int64), [len(at) for at in pairs.values()])
    window = np.concatenate([*pairs.values(), np.zeros(0, dtype=np.int64)])
    share = np.zeros(len(outline))
    for epsg in np.unique(footprints.epsg[outline]):
        here = np.flatnonzero(footprints.epsg[outline] == epsg)
        some, place = np.unique(window[here], return_inverse=True)
        touched, number = np.unique(outline[here], return_inverse=True)
        # of this call alone: blocks are planned by several threads, and GEOS prepares a shape under whoever uses it
        prepared = shapely.from_wkb(shapely.to_wkb(footprints.shape[touched]))
        shapely.prepare(prepared)
        shape, box = prepared[number], windows.in_crs(int(epsg), some)[place]
        if is_geographic(int(epsg)):
            box = _near(box, footprints.centre[outline[here], 0])
        whole = shapely.covers(shape, box)
        share[here[whole]] = 1.0
        partly = np.flatnonzero(~whole)
        cut = shapely.intersection(shape[partly], box[partly])
        covered = np.minimum(shapely.area(cut) / shapely.area(box[partly]), 1.0)
        covered *= _shares_pixels(shapely.bounds(box[partly]), footprints.raster[outline[here[partly]]])
        share[here[partly]] = covered
    keep = share > 1e-12
    return Cover(window[keep], outline[keep], share[keep])


def _shares_pixels(boxes: NDArray[np.float64], raster: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which boxes overlap their rasters; within the pixel of tolerance around it there is nothing to read."""
    shared = np.minimum(boxes[:, 2:], raster[:, 2:]) - np.maximum(boxes[:, :2], raster[:, :2])
    return np.asarray((shared > 1e-6).all(axis=1))


def union_cover(
    windows: Windows, footprints: Outlines, window: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of windows that several outlines cover together.

    Parameters
    ----------
    windows, footprints
        The windows and the outlines.
    window
        Shape (n,). Numbers of windows.
    numbers
        Shape (n, outlines). The outlines that count for each; areas are measured in the CRS of the first.
    """
    result = np.zeros(len(window))
    crs = footprints.epsg[numbers]
    for epsg in np.unique(crs[:, 0]):
        here = np.flatnonzero(crs[:, 0] == epsg)
        shapes = footprints.shape[numbers[here]]
        for other in np.unique(numbers[here][crs[here] != epsg]):
            move = partial(_moved, transformer(int(footprints.epsg[other]), int(epsg)))
            shapes[numbers[here] == other] = shapely.transform(footprints.shape[other], move)
        box = windows.in_crs(int(epsg), window[here])
        parts = shapely.union_all(shapely.intersection(shapes, box[:, None]), axis=1)
        result[here] = np.minimum(shapely.area(parts) / shapely.area(box), 1.0)
    return result


def _moved(to: pyproj.Transformer, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack(to.transform(points[:, 0], points[:, 1]), -1)
