# SPDX-License-Identifier: Apache-2.0
"""The candidate windows of a plan: lattice cells, the cells of a source's tiles or a GeoBox, or windows at points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyproj
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of, joined
from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.coverwindows import CoverGrid
from rasteret_dask.chipping.mapground import map_grounds
from rasteret_dask.chipping.tilelattice import tile_lattice
from rasteret_dask.crs import crs_of
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.extent import EQUATOR_M, is_geographic, metres
from rasteret_dask.footprint import box_around, outline_of_ring
from rasteret_dask.grid import Bounds, Lattice, bounds_in, snap, transformer
from rasteret_dask.planning.plan import KM_PER_DEGREE, ChipSpec
from rasteret_dask.zones import BoxGrid, CrsGrid, TileGrid, overlap, shared_degrees

__all__ = [
    "Frame",
    "block_of",
    "candidates",
    "cell_names",
    "chip_cells",
    "concatenated",
    "cover_grids",
    "frame_of",
    "grown",
    "id_head",
    "in_space",
    "laid_out",
    "lattice_of",
    "outline_wkb",
    "zone_cells",
    "space_order",
    "within_area",
    "zone_frame",
]

SHARED_WITH_AREA = 1e-3
"""A cell belongs to an area of interest when more than this share of it lies inside."""

POLAR_DEG = 84.5
"""Latitude beyond which windows are compared with an area on their own map."""

CAP_DEG = 60.0
"""Latitude down to which an area is brought onto that map: farther than any window there reaches."""

BLOCK_PX = 1536
"""Side of the squares of ground that windows are ordered by, in pixels of the reference source."""

STRIP = 4
"""Blocks from the north to the south edge of a strip."""

MOST_WINDOWS = 20_000_000
"""Candidate windows of a plan; more than fit into memory, at 2 kB a chip."""

Phase: TypeAlias = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """Candidate windows, neighbours near each other; all arrays have one entry per window."""

    epsg: NDArray[np.int64]
    bounds: NDArray[np.float64]
    """Shape (window, 4): xmin, ymin, xmax, ymax, on pixel edges of the reference source."""
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    cell: NDArray[np.int64] | None
    """Shape (window, 2). Split cell (row, col) the window was laid out in; None for windows laid out freely."""
    index: NDArray[np.int64] | None
    """Row of the table given to ``at=``; None otherwise."""
    prefix: pa.StringArray
    """What each id begins with."""

    def __len__(self) -> int:
        return len(self.epsg)

    def take(self, at: NDArray[Any]) -> Frame:
        """Return some windows."""
        at = np.flatnonzero(at) if at.dtype == bool else at
        return Frame(
            self.epsg[at],
            self.bounds[at],
            self.row[at],
            self.col[at],
            None if self.cell is None else self.cell[at],
            None if self.index is None else self.index[at],
            self.prefix.take(pa.array(at)),
        )

    def grown(self, reach_m: float) -> Frame:
        """Return windows that reach farther on each side."""
        return replace(self, bounds=grown(self.bounds, reach_m)) if reach_m else self


def grown(bounds: NDArray[np.float64], reach_m: float) -> NDArray[np.float64]:
    """Return boxes, shape (box, 4), that reach farther on each side."""
    return np.round(bounds + np.array([-1.0, -1.0, 1.0, 1.0]) * reach_m, 9) if reach_m else bounds


def frame_of(table: pa.Table) -> Frame:
    """Return where the chips of a table lie, as windows without rows, columns and ids."""
    nothing = np.zeros(table.num_rows, dtype=np.int64)
    epsg = table.column("epsg").to_numpy().astype(np.int64)
    blank = pa.array([""] * table.num_rows, pa.string())
    return Frame(epsg, bounds_of(table), nothing, nothing, None, None, blank)


def candidates(
    spec: ChipSpec, reference: Outlines, resolution: float, phase: Phase, points: pa.Table | None
) -> Frame:
    """Lay out the windows that the reference source may cover.

    Parameters
    ----------
    spec
        Size, stride, grid, area.
    reference
        Outlines of the reference source's records.
    resolution
        Its pixel size, metres.
    phase
        For each EPSG code, a pixel corner (x, y) of the reference source's grid.
    points
        The table of ``at=``, or None.

    Notes
    -----
    Windows come in an order of space that depends on nothing but themselves: CRS by CRS, in strips from north to
    south, :data:`STRIP` blocks high; in a strip column by column of blocks; in a block row by row. A block's
    neighbours are then the one before it and those one column back, so that a shard's tiles are used again soon
    or not at all. Blocks of ``grid="tiles"`` are whole tiles.
    """
    if points is not None:
        return in_space(_at_points(spec, points, resolution, phase), resolution)
    if spec.cover:
        return in_space(_covering(spec, reference, resolution, phase), resolution)
    match spec.grid:
        case TileGrid():
            return _tiles(spec, reference, resolution)
        case BoxGrid() as box:
            return in_space(_geobox(spec, box, resolution), resolution)
    return in_space(_zones(spec, reference, resolution, phase), resolution)


def blocks(frame: Frame, spec: ChipSpec, reference: Outlines, resolution: float) -> NDArray[np.int64]:
    """Return the number of each window's block, in their order; with ``grid="tiles"`` each tile is a block."""
    if spec.in_tiles:
        per_tile = max(int(reference.tile_px.max()) // spec.size, 1)
        place = np.stack([frame.epsg, frame.row // per_tile, frame.col // per_tile], -1)
    else:
        place = np.stack([frame.epsg, *block_of(frame, resolution)], -1)
    return np.cumsum(np.diff(place, axis=0, prepend=place[:1]).any(axis=1))


def block_of(frame: Frame, resolution: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return row and column of each window's block: squares of BLOCK_PX, southwards and eastwards."""
    return _block(frame.bounds, resolution)


def _block(bounds: NDArray[np.float64], resolution: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    side = BLOCK_PX * resolution
    col = np.floor(bounds[:, [0, 2]].mean(1) / side)
    row = np.floor(-bounds[:, [1, 3]].mean(1) / side)
    return row, col


def in_space(frame: Frame, resolution: float) -> Frame:
    """Return windows in their order of space: see :func:`candidates`."""
    return frame.take(space_order(frame.epsg, frame.bounds, frame.row, frame.col, resolution))


def space_order(
    epsg: NDArray[np.int64],
    bounds: NDArray[np.float64],
    row: NDArray[np.int64],
    col: NDArray[np.int64],
    resolution: float,
    when: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return the order of space of some windows: see :func:`candidates`; ``when`` comes first within a block."""
    block_row, block_col = _block(bounds, resolution)
    times = () if when is None else (when,)
    return np.lexsort((col, row, *times, block_row, block_col, block_row // STRIP, epsg))


def _label(spec: ChipSpec, resolution: float) -> str:
    return f"{spec.cell_km:g}km_{_pixels(spec, resolution)}"


def _pixels(spec: ChipSpec, resolution: float) -> str:
    stride = "" if spec.stride == spec.size else f"s{spec.stride}"
    return f"{spec.size}px{stride}_{resolution:g}m"


def _zones(spec: ChipSpec, reference: Outlines, resolution: float, phase: Phase) -> Frame:
    cells = zone_cells(spec, reference, resolution)
    return concatenated([zone_frame(spec, zone, cells[zone], resolution, phase) for zone in cells])


def zone_cells(
    spec: ChipSpec, reference: Outlines, resolution: float, most: int | None = None
) -> dict[int, NDArray[np.int64]]:
    """Return for each zone, rising, the split cells (row, col) that the reference source may touch.

    Parameters
    ----------
    spec
        Size, stride, grid, area.
    reference
        Outlines of the reference source's records.
    resolution
        Its pixel size, metres.
    most
        Candidate windows that the plan may have; None: as many as fit into memory.

    Raises
    ------
    GridError
        When there are more, before they are made.
    """
    zones, per_zone = spec.grid.zones, dict[int, list[NDArray[np.int64]]]()
    pending = 0
    lattice = lattice_of(spec, resolution)
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    limit = None if area is None else _around(_unwrapped(box_around(area)), 4 * spec.cell_km / KM_PER_DEGREE)
    boxes = shapely.bounds(reference.shape)
    for number in _widest(boxes, reference.epsg):
        name, box_of_record, own = reference.name[number], boxes[number], int(reference.epsg[number])
        ground: Bounds | None = _unwrapped(bounds_in(box_of_record, own, 4326))
        if limit is not None and ground is not None:
            ground = shared_degrees(ground, limit)
        if ground is None:
            continue
        for zone in zones.near(ground):
            if isinstance(spec.grid, CrsGrid):
                most_of_record = partial(_countable, spec=spec, resolution=resolution, record=name, most=most)
                cells = cells_under(spec.grid, lattice, _Piece(box_of_record, own, ground), most_of_record)
            else:
                box = zones.box(ground, zone)
                if box is not None and own == zone:
                    box = overlap(box_of_record, box)
                if box is None:
                    continue
                _countable(lattice.windows_in(box), spec, resolution, name, most)
                cells = lattice.split_cells(box)
            per_zone.setdefault(zone, []).append(cells)
            pending += len(cells) * lattice.per_side**2
        if pending > 4 * MOST_WINDOWS:  # of many records over the same ground: each cell once
            per_zone, pending = _once(per_zone, spec, resolution)
            _countable(pending, spec, resolution, None, most)
    per_zone, pending = _once(per_zone, spec, resolution)
    _countable(pending, spec, resolution, None, most)
    return {zone: per_zone[zone][0] for zone in sorted(per_zone)}


@dataclass(frozen=True, slots=True)
class _Piece:
    """The ground of a record."""

    box: Bounds
    """In its CRS."""
    epsg: int
    degrees: Bounds
    """What counts of it; east may lie beyond 180."""

    def places(self, step_m: float) -> NDArray[np.float64]:
        """Return places (lon, lat) of it, no two neighbours farther apart than a step, all edges with it."""
        box, step = self.box, step_m / metres(self.epsg)
        if is_geographic(self.epsg):
            turn = EQUATOR_M / metres(self.epsg) / 360.0  # grads
            west, south, east, north = self.degrees
            box = overlap(box, (west * turn, south * turn, east * turn, north * turn)) or box
        x, y = (np.linspace(box[at], box[at + 2], int((box[at + 2] - box[at]) / step) + 2) for at in (0, 1))
        places = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        lonlat = np.stack(transformer(self.epsg, 4326).transform(places[:, 0], places[:, 1]), -1)
        west, south, east, north = self.degrees
        high = step_m / KM_PER_DEGREE / 1000.0
        wide = high / max(np.cos(np.radians(min(max(abs(south), abs(north)) + high, 89.9))), 1e-3)
        near = np.mod(lonlat[:, 0] - (west - wide), 360.0) <= east - west + 2 * wide
        near &= (lonlat[:, 1] >= south - high) & (lonlat[:, 1] <= north + high)
        return np.asarray(lonlat[near & np.isfinite(lonlat).all(axis=1)])


def cells_under(
    grid: CrsGrid, lattice: Lattice, piece: _Piece, countable: Callable[[float], None]
) -> NDArray[np.int64]:
    """Return split cells of one CRS that a record may touch, shape (cell, 2) as row, col.

    What is together on the ground may lie apart on the map (across the antimeridian), so the record is asked place
    by place, and the neighbours of cells that hold one are looked at too.
    """
    corners = np.array(
        [[x, y] for x in piece.degrees[::2] for y in np.clip(piece.degrees[1::2], -89.9, 89.9)]
    )
    factors = pyproj.Proj(crs_of(grid.code)).get_factors(corners[:, 0], corners[:, 1])
    sizes = np.asarray(factors.tissot_semimajor)
    scale = float(sizes[np.isfinite(sizes)].max(initial=1.0))
    west, south, east, north = piece.box
    area = (east - west) * (north - south) * metres(piece.epsg) ** 2
    if not is_geographic(piece.epsg):
        countable(area / lattice.cell_m**2 * lattice.per_side**2)
    places = piece.places(lattice.cell_m / (2.0 * scale))
    places = places[grid.codes(*places.T) == grid.code]
    x, y = transformer(4326, grid.code).transform(*places.T)
    there = np.isfinite(x) & np.isfinite(y)
    cells = np.unique(lattice.split_cells_at(x[there], y[there]), axis=0)
    countable(float(len(cells)) * lattice.per_side**2)
    around = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(1, -1, 2)
    return np.unique((cells[:, None] + around).reshape(-1, 2), axis=0)


def _once(
    per_zone: dict[int, list[NDArray[np.int64]]], spec: ChipSpec, resolution: float
) -> tuple[dict[int, list[NDArray[np.int64]]], int]:
    """Return each zone's cells once, and how many windows they hold."""
    once = {zone: [_distinct(np.concatenate(cells))] for zone, cells in per_zone.items()}
    return once, sum(len(cells[0]) for cells in once.values()) * lattice_of(spec, resolution).per_side ** 2


def _distinct(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return distinct cells (row, col), rising."""
    numbers = np.sort(cells[:, 0] * 2**32 + cells[:, 1])  # a column is no more than 2**31 away
    numbers = numbers[np.append(True, np.diff(numbers) > 0)[: len(numbers)]]
    row = (numbers + 2**31) >> 32
    return np.stack([row, numbers - row * 2**32], -1)


def zone_frame(
    spec: ChipSpec, zone: int, split_cells: NDArray[np.int64], resolution: float, phase: Phase
) -> Frame:
    """Lay out the windows of some split cells of a zone, as far as they lie in the area, in the cells' order."""
    cells = lattice_of(spec, resolution).chip_cells(split_cells)
    return laid_out(spec, zone, cells, resolution, phase)


def laid_out(spec: ChipSpec, zone: int, cells: NDArray[np.int64], resolution: float, phase: Phase) -> Frame:
    """Lay out the windows of some chip cells of a zone, as far as they lie in it and in the area."""
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    return _within(_lay_out(zone, cells, spec, resolution, phase), area)


def chip_cells(spec: ChipSpec, reference: Outlines, resolution: float) -> dict[int, NDArray[np.int64]]:
    """Return for each zone, rising, the chip cells (row, col) that the reference source may touch."""
    return {
        zone: lattice_of(spec, resolution).chip_cells(cells)
        for zone, cells in zone_cells(spec, reference, resolution).items()
    }


def id_head(spec: ChipSpec, zone: int, resolution: float) -> str:
    """Return what the ids of a zone's windows begin with."""
    return f"{spec.grid.zones.name(zone)}_{_label(spec, resolution)}"


def cell_names(spec: ChipSpec, frame: Frame) -> pa.StringArray:
    """Return the name of the split cell that each window was laid out in: ``"33/-4000/120"``."""
    assert frame.cell is not None
    codes, place = np.unique(frame.epsg, return_inverse=True)
    names = pa.array([spec.grid.zones.cell_name(code) for code in codes.tolist()], pa.string())
    return joined(names.take(pa.array(place)), frame.cell[:, 0], frame.cell[:, 1], by="/")


def _countable(
    count: float, spec: ChipSpec, resolution: float, record: str | None = None, most: int | None = None
) -> None:
    """Refuse more windows than a plan can hold, before they are made."""
    most = MOST_WINDOWS if most is None else most
    if count > most:
        raise GridError(
            f"chips(size={spec.size})" + ("" if record is None else f" over record {record!r}"),
            f"{count:,.0f} windows of {spec.size * resolution:g} m",
            f"at most {most:,}",
            "Plan one area at a time (aoi=), with larger chips, or a coarser harmonize(resolution=...)"
            + ("; or by blocks: chips(...).by_blocks(folder)." if spec.in_cells else "."),
        )


def lattice_of(spec: ChipSpec, resolution: float) -> Lattice:
    """Return the lattice that chips have in every zone."""
    length, stride = spec.size * resolution, spec.stride * resolution
    return Lattice(spec.cell_km * 1000.0, length, stride, spec.grid.zones.origin)


def _lay_out(zone: int, cells: NDArray[np.int64], spec: ChipSpec, resolution: float, phase: Phase) -> Frame:
    zones, lattice = spec.grid.zones, lattice_of(spec, resolution)
    bounds = lattice.bounds(cells)
    inside = zones.holds(zone, bounds)
    cells, bounds = cells[inside], bounds[inside]
    bounds = snap(bounds, phase.get(zone, zones.origin), resolution)
    head = id_head(spec, zone, resolution)
    return Frame(
        np.full(len(cells), zone),
        bounds,
        cells[:, 0],
        cells[:, 1],
        lattice.split_cell_of(cells),
        None,
        joined(head, cells[:, 0], cells[:, 1]),
    )


def _unwrapped(lonlat: Bounds) -> Bounds:
    """Return degrees whose east is not west of the west: beyond 180 where the antimeridian lies between."""
    west, south, east, north = lonlat
    return (west, south, east + 360.0, north) if east < west else lonlat


def _around(lonlat: Bounds, degrees: float) -> Bounds:
    west, south, east, north = lonlat
    return west - degrees, south - degrees, east + degrees, north + degrees


def _widest(boxes: NDArray[np.float64], epsg: NDArray[np.int64]) -> list[int]:
    """Return the numbers, rising, of boxes that lie in no other of their CRS: what these touch, the others do."""
    sides = boxes[:, 2:] - boxes[:, :2]
    result: list[int] = []
    for code in np.unique(epsg).tolist():
        own = np.flatnonzero((epsg == code) & ~np.isnan(boxes).any(axis=1))  # an empty outline has no box
        own = own[np.argsort(-sides[own].prod(axis=1), kind="stable")]
        kept, count = np.empty((len(own), 4)), 0
        for number in own.tolist():
            box = boxes[number]
            inside = (kept[:count, :2] <= box[:2]) & (kept[:count, 2:] >= box[2:])
            if not inside.all(axis=1).any():
                kept[count], count = box, count + 1
                result.append(number)
    return sorted(result)


def within_area(frame: Frame, spec: ChipSpec) -> Frame:
    """Return the windows that lie in the plan's area of interest."""
    return _within(frame, None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi)))


def _within(frame: Frame, area: Any) -> Frame:
    if area is None or not len(frame):
        return frame
    corners = _lonlat_corners(frame)
    polar = np.abs(corners[..., 1]).max(axis=1) > POLAR_DEG
    if polar.any():  # degrees tell no shapes there
        inside = np.zeros(len(frame), dtype=bool)
        plain = np.flatnonzero(~polar)
        inside[plain[_inside(area, corners[plain])]] = True
        for code in np.unique(frame.epsg[polar]).tolist():
            at = np.flatnonzero(polar & (frame.epsg == code))
            box = frame.bounds[at]
            squares = np.stack([box[:, [0, 2, 2, 0]], box[:, [3, 3, 1, 1]]], -1)
            cap = _polar_area(area, code, bool(corners[at[0], 0, 1] > 0))
            inside[at[_inside(cap, squares)]] = True
        return frame.take(inside)
    if _across(corners).any():  # such windows lie beyond 180, and so does what they share with the area
        area = shapely.union(area, shapely.transform(area, lambda p: p + np.array([360.0, 0.0])))
    return frame.take(_inside(area, corners))


def _inside(area: Any, corners: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the numbers of windows, shape (window, 4, 2), that belong to an area."""
    west, south, east, north = shapely.bounds(area)
    low, high = corners.min(1), corners.max(1)
    near = (low[:, 0] <= east) & (high[:, 0] >= west) & (low[:, 1] <= north) & (high[:, 1] >= south)
    shapes = shapely.polygons(corners[near])
    shapely.prepare(area)
    inside = shapely.contains_properly(area, shapes)
    edge = np.flatnonzero(~inside & shapely.intersects(area, shapes))
    share = shapely.area(shapely.intersection(area, shapes[edge])) / shapely.area(shapes[edge])
    inside[edge[share > SHARED_WITH_AREA]] = True
    return np.asarray(np.flatnonzero(near)[inside])


def _polar_area(area: Any, code: int, north: bool) -> Any:
    """Return what of an area lies round a pole on the map of a CRS; parallels bend there."""
    cap = shapely.box(-180.0, CAP_DEG, 180.0, 90.0) if north else shapely.box(-180.0, -90.0, 180.0, -CAP_DEG)
    near = shapely.segmentize(shapely.intersection(area, cap), 0.1)
    move = transformer(4326, code).transform
    parts = shapely.get_parts(shapely.transform(near, lambda p: np.stack(move(p[:, 0], p[:, 1]), -1)))
    parts = parts[np.isfinite(shapely.bounds(parts)).all(axis=1)]
    return shapely.union_all(shapely.make_valid(shapely.buffer(parts, 0.01)))


def outline_wkb(frame: Frame) -> pa.BinaryArray:
    """Return each window as a lon/lat polygon in WKB, written as it lies in memory: a million shapes are slow."""
    corners = _lonlat_corners(frame)
    across = np.flatnonzero(_across(corners))
    layout = [("order", "u1"), ("kind", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))]
    polygons = np.empty(len(frame), dtype=layout)
    polygons["order"], polygons["kind"], polygons["rings"], polygons["points"] = 1, 3, 1, 5
    polygons["xy"][:, :4], polygons["xy"][:, 4] = corners, corners[:, 0]
    offsets = np.arange(len(frame) + 1, dtype=np.int32) * np.int32(polygons.itemsize)
    whole = pa.BinaryArray.from_buffers(
        pa.binary(), len(frame), [None, pa.py_buffer(offsets), pa.py_buffer(polygons)]
    )
    if not len(across):
        return whole
    at = np.arange(len(frame))
    at[across] = len(frame) + np.arange(len(across))
    halves = pa.array([outline_of_ring(ring) for ring in corners[across]], pa.binary())
    return pa.concat_arrays([whole, halves]).take(pa.array(at))


def _across(corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Shape (window,). True where a window reaches beyond 180 degrees."""
    return np.asarray(corners[:, :, 0].max(1, initial=-180.0) > 180.0)


def _lonlat_corners(frame: Frame) -> NDArray[np.float64]:
    """Shape (window, 4, 2). Corners from the north-west, clockwise, in degrees; beyond 180 across the antimeridian."""
    result = np.empty((len(frame), 4, 2))
    for epsg in np.unique(frame.epsg):
        at = np.flatnonzero(frame.epsg == epsg)
        box = frame.bounds[at]
        x, y = box[:, [0, 2, 2, 0]], box[:, [3, 3, 1, 1]]
        lon, lat = transformer(int(epsg), 4326).transform(x.ravel(), y.ravel())
        lon = np.reshape(lon, x.shape)
        across = np.ptp(lon, axis=1, keepdims=True) > 180.0
        result[at, :, 0] = np.where(across & (lon < 0), lon + 360.0, lon)
        result[at, :, 1] = np.reshape(lat, x.shape)
    return result


def cover_grids(spec: ChipSpec, reference: Outlines, resolution: float, phase: Phase) -> list[CoverGrid]:
    """Return the pixels of each map that chips cover, by rising number of its CRS.

    Parameters
    ----------
    spec
        Size, stride, grid, area.
    reference
        Outlines of the reference source's records.
    resolution
        Its pixel size.
    phase
        For each CRS, a pixel corner (x, y) of the reference source's grid.

    Raises
    ------
    GridError
        When the grid has other pixels.
    """
    shift = spec.edge == "shift"
    return [
        CoverGrid(
            ground,
            _anchor(spec, ground.code, reference, resolution, phase),
            resolution,
            spec.size,
            spec.stride,
            shift,
        )
        for ground in map_grounds(spec, reference)
    ]


def _anchor(
    spec: ChipSpec, code: int, reference: Outlines, resolution: float, phase: Phase
) -> tuple[float, float]:
    """Return the pixel corner that windows of a map lie at multiples of the stride from."""
    match spec.grid:
        case TileGrid():
            own = np.flatnonzero(reference.epsg == code)
            return tile_lattice(code, reference, own, spec, resolution)[:2]
        case BoxGrid() as box:
            _check_pixels(box, resolution)
            return box.x0, box.y0
    x, y = spec.grid.zones.origin
    corner = snap(np.array([[x, y, x, y]]), phase.get(code, (x, y)), resolution)[0]
    return float(corner[0]), float(corner[3])


def _covering(spec: ChipSpec, reference: Outlines, resolution: float, phase: Phase) -> Frame:
    """Lay windows over an area, map by map; rows and columns count pixels from the lattice's corner."""
    grids = cover_grids(spec, reference, resolution, phase)
    _countable(sum(grid.count() for grid in grids), spec, resolution)
    frames = []
    for grid in grids:
        code, corner = grid.ground.code, grid.windows()
        bounds = grid.boxes(corner, np.full_like(corner, spec.size))
        if isinstance(spec.grid, CrsGrid):
            inside = spec.grid.holds(code, bounds)
            corner, bounds = corner[inside], bounds[inside]
        x, y = grid.anchor
        match spec.grid:
            case TileGrid():
                name = f"{code}_tiles{x:.12g}_{y:.12g}"
            case BoxGrid():
                name = f"{code}_box{x:.12g}_{y:.12g}"
            case _:
                name = spec.grid.zones.name(code)
        head = f"{name}_cover_{_pixels(spec, resolution)}"
        ids = joined(head, corner[:, 0], corner[:, 1])
        frames.append(Frame(np.full(len(corner), code), bounds, corner[:, 0], corner[:, 1], None, None, ids))
    return concatenated(frames)


def _tiles(spec: ChipSpec, reference: Outlines, resolution: float) -> Frame:
    """Lay chips along the reference source's own internal tiles, one CRS at a time, whole tiles together."""
    frames = []
    for epsg in np.unique(reference.epsg):
        own = np.flatnonzero(reference.epsg == epsg)
        x0, y0, side = tile_lattice(int(epsg), reference, own, spec, resolution)
        step = spec.stride * resolution
        per_tile = round(side / step)
        boxes = shapely.bounds(reference.shape[own])
        extents = (boxes[:, 2:] - boxes[:, :2]) / step + 2 * per_tile
        for at, count in zip(own, extents.prod(axis=1), strict=True):
            _countable(float(count), spec, resolution, reference.name[at])
        tiles = _tiles_touched(boxes, x0, y0, side)
        _countable(len(tiles) * per_tile**2, spec, resolution)
        blocks = tiles // max(BLOCK_PX // round(side / resolution), 1)
        row, col = blocks.T
        tiles = tiles[np.lexsort((tiles[:, 1], tiles[:, 0], row, col, row // STRIP))]
        inner = np.stack(np.meshgrid(*[np.arange(per_tile)] * 2, indexing="ij"), -1).reshape(1, -1, 2)
        cells = (tiles[:, None] * per_tile + inner).reshape(-1, 2)
        west, north = x0 + cells[:, 1] * step, y0 - cells[:, 0] * step
        length = float(spec.size * resolution)
        bounds = _boxes(west, north, length)
        head = f"{int(epsg)}_tiles{x0:.12g}_{y0:.12g}_{spec.size}px_{resolution:g}m"
        prefix = joined(head, cells[:, 0], cells[:, 1])
        frames.append(Frame(np.full(len(cells), epsg), bounds, cells[:, 0], cells[:, 1], None, None, prefix))
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    return _within(concatenated(frames), area)


def _tiles_touched(bounds: NDArray[np.float64], x0: float, y0: float, side: float) -> NDArray[np.int64]:
    """Return the tiles (row, col), counted from (x0, y0), that any of some bounds touches; shape (tile, 2)."""
    found: list[NDArray[np.int64]] = []
    for xmin, ymin, xmax, ymax in np.unique(bounds[~np.isnan(bounds).any(axis=1)], axis=0):
        rows = np.arange(np.floor((y0 - ymax) / side), np.ceil((y0 - ymin) / side), dtype=np.int64)
        cols = np.arange(np.floor((xmin - x0) / side), np.ceil((xmax - x0) / side), dtype=np.int64)
        found.append(np.stack(np.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2))
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), dtype=np.int64)


def _geobox(spec: ChipSpec, box: BoxGrid, resolution: float) -> Frame:
    pixel, code = box.pixel, box.code
    _check_pixels(box, resolution)
    across, down = ((side - spec.size) // spec.stride + 1 for side in (box.width, box.height))
    _countable(float(across) * float(down), spec, resolution)
    cells = np.stack(np.meshgrid(np.arange(down), np.arange(across), indexing="ij"), -1).reshape(-1, 2)
    west = box.x0 + cells[:, 1] * spec.stride * pixel
    north = box.y0 - cells[:, 0] * spec.stride * pixel
    length = spec.size * pixel
    bounds = _boxes(west, north, length)
    head = f"{code}_box{box.x0:.12g}_{box.y0:.12g}_{_pixels(spec, pixel)}"
    prefix = joined(head, cells[:, 0], cells[:, 1])
    frame = Frame(np.full(len(cells), code), bounds, cells[:, 0], cells[:, 1], None, None, prefix)
    area = None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi))
    return _within(frame, area)


def _check_pixels(box: BoxGrid, resolution: float) -> None:
    if abs(box.pixel - resolution) > 1e-9 * box.pixel:
        raise GridError(
            "chips(grid=GeoBox)", f"pixels of {box.pixel:g}", f"the reference source's {resolution:g}",
            "Harmonize to the GeoBox's resolution, or give a GeoBox of the source's.",
        )  # fmt: skip


def _at_points(spec: ChipSpec, points: pa.Table, resolution: float, phase: Phase) -> Frame:
    shapes = shapely.from_wkb(points.column("geometry").to_numpy(zero_copy_only=False))
    if np.any(shapely.is_missing(shapes) | shapely.is_empty(shapes)):
        bad = int(np.flatnonzero(shapely.is_missing(shapes) | shapely.is_empty(shapes))[0])
        raise PlanError(f"chips(at=), row {bad}", "no geometry", "a point or polygon in every row")
    inside = shapely.point_on_surface(shapes)
    lon, lat = shapely.get_x(inside), shapely.get_y(inside)
    if np.any(np.abs(lon) > 360) or np.any(np.abs(lat) > 90):
        raise PlanError("chips(at=)", "coordinates beyond degrees", "geometries in lon/lat (EPSG:4326)")
    zones = spec.grid.zones
    codes = zones.codes(lon, lat)
    if not codes.all():
        bad = int(np.flatnonzero(codes == 0)[0])
        raise PlanError(
            f"chips(at=, grid={str(spec.grid)!r}), row {bad}", f"a place at ({lon[bad]:.5g}, {lat[bad]:.5g})",
            "places on the ground of that CRS", "Leave it out, or choose another grid.",
        )  # fmt: skip
    length = spec.size * resolution
    bounds = np.empty((len(points), 4))
    for epsg in np.unique(codes).tolist():
        at = np.flatnonzero(codes == epsg)
        x, y = transformer(4326, epsg).transform(lon[at], lat[at])
        px, py = phase.get(epsg, zones.origin)
        west = px + np.round((np.asarray(x) - length / 2 - px) / resolution) * resolution
        north = py + np.round((np.asarray(y) + length / 2 - py) / resolution) * resolution
        bounds[at] = _boxes(west, north, length)
    index = (
        points.column("__index__").to_pylist() if "__index__" in points.column_names else range(len(points))
    )
    prefix = pa.array(
        (
            f"{zones.name(code)}_{spec.size}px_{resolution:g}m_{box[0]:.3f}_{box[3]:.3f}_{name}"
            for code, box, name in zip(codes.tolist(), bounds.tolist(), index, strict=True)
        ),
        pa.string(),
    )
    whole = np.round(bounds / resolution).astype(np.int64)
    frame = Frame(
        codes, bounds, -whole[:, 3], whole[:, 0], None,
        np.arange(len(points), dtype=np.int64), prefix,
    )  # fmt: skip
    return _within(frame, None if spec.aoi is None else shapely.from_wkb(bytes.fromhex(spec.aoi)))


def _boxes(west: NDArray[Any], north: NDArray[Any], length: float) -> NDArray[np.float64]:
    box = np.stack([west, north - length, west + length, north], -1)
    return np.asarray(np.round(box.astype(np.float64), 9), dtype=np.float64)


def concatenated(frames: list[Frame]) -> Frame:
    """Return the windows of lattices, one behind the other."""
    frames = [f for f in frames if len(f)]
    if not frames:
        nothing = np.zeros(0, dtype=np.int64)
        return Frame(nothing, np.zeros((0, 4)), nothing, nothing, None, None, joined("", nothing))
    cells = [f.cell for f in frames if f.cell is not None]
    return Frame(
        np.concatenate([f.epsg for f in frames]),
        np.concatenate([f.bounds for f in frames]),
        np.concatenate([f.row for f in frames]),
        np.concatenate([f.col for f in frames]),
        np.concatenate(cells) if len(cells) == len(frames) else None,
        None,
        pa.concat_arrays([f.prefix for f in frames]),
    )
