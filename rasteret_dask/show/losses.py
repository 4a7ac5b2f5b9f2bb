# SPDX-License-Identifier: Apache-2.0
"""Why there is no chip at a place: what each step of a plan leaves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyproj
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import ChipSources, PlannedChips, below_join, chip_sources
from rasteret_dask.chipping.chipslots import in_slots
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.coverage import FULL, Outlines
from rasteret_dask.chipping.distances import apart_m
from rasteret_dask.chipping.feeds import Feeds, covered, enough
from rasteret_dask.chipping.frame import Frame, concatenated, lattice_of, outline_wkb, zone_frame
from rasteret_dask.chipping.splits import TRAIN, SplitCells, cell_units, cells_touched, column_splits
from rasteret_dask.chipping.steps import carried_out, steps_of
from rasteret_dask.errors import PlanError, RasteretDaskError
from rasteret_dask.footprint import placed
from rasteret_dask.grid import transformer
from rasteret_dask.planning.calls import call, calls, condition
from rasteret_dask.planning.chiptimes import Dates
from rasteret_dask.planning.optimize import named_bands
from rasteret_dask.planning.plan import (
    KM_PER_DEGREE,
    TIME,
    ChipSpec,
    CutChips,
    Filter,
    FilterChips,
    FilterPixels,
    Join,
    Map,
    Node,
    Random,
    Sample,
    Select,
    Source,
    Split,
    SplitSpec,
    WithTable,
    children,
    is_number,
    leaves,
    step_name,
    with_children,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import MemberTable, ResolvedSource, evaluate
from rasteret_dask.planning.sampling import sample_unit
from rasteret_dask.planning.scan import Table, as_table, filter_table, keep_whole
from rasteret_dask.zones import BoxGrid, FileGrid, TileGrid

__all__ = ["Spot", "Stage", "Trace", "Tracer", "covered_slots", "slot_words", "split_lines", "uncovered"]

Staged = Callable[[Node], PlannedChips]
"""Returns the planned chips behind a step of the plan."""

NEAREST = 8
"""Records whose outlines are measured to find the nearest: those with the nearest boxes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a step of a plan leaves at a place."""

    step: str
    """``"chips"``, ``"filter(...)"``: as it was written."""
    unit: str
    """``"record"``, ``"window"`` or ``"chip"``: what is counted."""
    before: int
    left: int
    reasons: tuple[str, ...] = ()
    """Why it leaves fewer."""


@dataclass(frozen=True)
class Trace:
    """What all steps of a plan leave at a place, up to the first that leaves no chip."""

    stages: tuple[Stage, ...]
    removed_by: int | None = None
    """Place of that step among the stages; None: there is a chip."""
    chips: tuple[str, ...] = ()
    """Ids of the chips that are there."""
    windows: tuple[str, ...] = ()
    """What ids of the lattice's windows there begin with, whether they became chips or not."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in degrees."""

    lon: float
    lat: float

    def __post_init__(self) -> None:
        good = is_number(self.lon) and is_number(self.lat)
        if not (good and abs(self.lon) <= 360 and abs(self.lat) <= 90):
            raise PlanError(
                "chips.why(lon=, lat=)",
                f"{self.lon!r} and {self.lat!r}",
                "degrees: lon -360 to 360, lat -90 to 90",
            )

    def distance_m(self, shape: Any) -> float:
        """Return how far a shape in degrees is, metres on the WGS 84 ellipsoid; 0 inside of it."""
        narrow = np.array([max(np.cos(np.radians(self.lat)), 1e-3), 1.0])
        line = shapely.shortest_line(
            shapely.Point(*(narrow * (self.lon, self.lat))), shapely.transform(shape, lambda p: p * narrow)
        )
        (x0, y0), (x1, y1) = shapely.get_coordinates(line) / narrow
        return float(pyproj.Geod(ellps="WGS84").inv(x0, y0, x1, y1)[2])

    def in_crs(self, code: int) -> tuple[float, float]:
        """Return x and y; not finite where the CRS cannot show the place."""
        x, y = transformer(4326, code).transform(self.lon, self.lat)
        return float(x), float(y)


@dataclass(frozen=True)
class _Windows:
    """The windows that hold a place."""

    frame: Frame
    """Those in the area of interest."""
    everywhere: Frame
    """Those in it and elsewhere."""
    reason: str = ""
    """Why there is none anywhere."""


class Tracer:
    """Follows places and chips through a plan; what does not depend on the place is worked out once.

    Parameters
    ----------
    query
        The plan with its tables.
    staged
        Returns the chips behind a step, for what depends on all chips: samples, buffers, tables.
    """

    def __init__(self, query: Query, staged: Staged) -> None:
        self.query, self.staged = query, staged
        self.original, self.steps = steps_of(query.plan)
        self.node, _ = steps_of(named_bands(query.plan))
        self.choices = tuple(_choices(self.node.child))
        self._members: dict[int, list[MemberTable]] = {}
        self._grounds: dict[int, ChipSources | None] = {}

    def members(self, number: int) -> list[MemberTable]:
        """Return the records of every leaf that the first steps on records leave."""
        if number not in self._members:
            self._members[number] = _members(_with_first(self.node.child, [number]), self.query.tables)
        return self._members[number]

    @cached_property
    def ground(self) -> ChipSources:
        """What chips are laid out of."""
        return chip_sources(self.node, self.query.tables)

    def ground_of(self, number: int) -> ChipSources | None:
        """Return what chips would be laid out of after the first steps on records; None: that cannot be planned."""
        if number not in self._grounds:
            fewer = replace(self.node, child=_with_first(self.node.child, [number]))
            try:
                self._grounds[number] = chip_sources(fewer, self.query.tables)
            except RasteretDaskError:  # what the steps behind leave out is what stands in the way
                self._grounds[number] = None
        return self._grounds[number]

    def place(self, lon: float, lat: float) -> Trace:
        """Follow a place, in degrees."""
        place = Spot(lon, lat)
        members = self.members(len(self.choices))
        if not _has_records(self.node.child, members):
            stages = tuple(self._records(shapely.Point(lon, lat)))
            reason = _no_record(members)
            first = next(
                (n for n, stage in enumerate(stages) if stage.before and not stage.left), len(stages)
            )
            return Trace((*stages, Stage(call(self.original), "window", 0, 0, (reason,))), first)
        windows = _windows_at(self.ground, self.query.tables, place)
        part, stage = _laid(self.ground, self.query.tables, windows, place, self.original)
        if part.table.num_rows:
            return self._followed(part, stage, _ids(windows.everywhere))
        stages = tuple(self._records(_ground_of(windows.everywhere, place)))
        lost = self._lost_to(place) if len(windows.frame) else None
        return Trace((*stages, stage), len(stages) if lost is None else lost, (), _ids(windows.everywhere))

    def chip(self, chip: str) -> Trace | None:
        """Follow a chip that the plan does not have; None where no step ever had it."""
        try:
            whole = self.staged(self.original)
        except PlanError:  # no chip at all
            return None
        own = whole.table.filter(pc.equal(whole.table.column("chip_id"), chip))
        if not own.num_rows:
            return None
        return self._followed(replace(whole, table=own), Stage(call(self.original), "window", 1, 1), (chip,))

    def _followed(self, part: PlannedChips, stage: Stage, windows: tuple[str, ...]) -> Trace:
        trace = _followed(part, self.steps, self.query.tables, self.staged)
        at = None if trace.removed_by is None else trace.removed_by + 1
        return Trace((stage, *trace.stages), at, trace.chips, windows)

    def _records(self, ground: Any) -> Iterator[Stage]:
        """Yield what each step that chooses records leaves of those over some ground."""
        for number, choice in enumerate(self.choices):
            before = self.members(number)
            there, left = _over(before, ground), _over(self.members(number + 1), ground)
            counts = sum(t.num_rows for t in there), sum(t.num_rows for t in left)
            names = {source.name for source in leaves(choice)}
            own = [(m.name, t, m.wanted) for m, t in zip(before, there, strict=True) if m.name in names]
            reasons = () if counts[0] == counts[1] else tuple(_alone(choice, own))
            yield Stage(_choice_words(choice), "record", *counts, reasons)

    def _lost_to(self, place: Spot) -> int | None:
        """Return the step on records without which, and without those behind it, a chip would be there."""
        for number in range(len(self.choices) - 1, -1, -1):
            ground = self.ground_of(number)
            if ground is None:
                continue
            windows = _windows_at(ground, self.query.tables, place)
            points = _points(ground, self.query.tables)
            if len(windows.frame) and ground.lay(windows.frame, points).table.num_rows:
                return number
        return None


# Records


def _members(child: Node, tables: Mapping[str, Table]) -> list[MemberTable]:
    """Return the records of every leaf that the steps on records keep."""
    child = below_join(child)
    while isinstance(child, Map) and isinstance(child.child, Join):
        child = child.child
    if isinstance(child, Join):
        return [member for one in child.children for member in evaluate(one, tables)]
    return evaluate(child, tables)


def _has_records(child: Node, members: Sequence[MemberTable]) -> bool:
    """Tell whether every source has a record that chips may not lack."""
    child = below_join(child)
    while isinstance(child, Map) and isinstance(child.child, Join):
        child = child.child
    left = iter(members)
    for at, source in enumerate(child.children if isinstance(child, Join) else (child,)):
        count = sum(next(left).table.num_rows for _ in leaves(source))
        if not count and not (isinstance(child, Join) and child.may_lack(child.names[at])):
            return False
    return True


def _no_record(members: Sequence[MemberTable]) -> str:
    empty = ", ".join(member.name for member in members if not member.table.num_rows)
    return f"no record of {empty} is left anywhere, so the plan has no chip at all"


def _choices(node: Node) -> Iterator[Node]:
    """Yield the steps that choose records, in the order in which they are carried out."""
    for child in children(node):
        yield from _choices(child)
    if isinstance(node, Filter | Sample) or (isinstance(node, Source) and node.where):
        yield node


def _with_first(node: Node, left: list[int]) -> Node:
    """Return a plan with only the first steps that choose records; ``left`` holds how many."""
    below = tuple(_with_first(child, left) for child in children(node))
    match node:
        case Source() if node.where:
            left[0] -= 1
            return node if left[0] >= 0 else replace(node, where=())
        case Filter() | Sample():
            left[0] -= 1
            return with_children(node, below) if left[0] >= 0 else below[0]
    return with_children(node, below)


def _over(members: Sequence[MemberTable], ground: Any) -> list[pa.Table]:
    """Return the records of each member whose outline touches some ground; those without one count."""
    result = []
    for member in members:
        shapes = shapely.from_wkb(member.table.column("geometry").to_numpy(zero_copy_only=False))
        shapes = placed(shapes)
        touched = shapely.intersects(shapes, ground) | shapely.is_missing(shapes)
        result.append(member.table.filter(pa.array(np.asarray(touched, dtype=bool))))
    return result


def _alone(choice: Node, parts: Sequence[tuple[str, pa.Table, Sequence[str] | None]]) -> Iterator[str]:
    """Yield how many records each condition of a step would leave alone."""
    total = sum(table.num_rows for _, table, _ in parts)
    if isinstance(choice, Sample):
        yield f"{call(choice)} drew others"
    elif isinstance(choice, Filter | Source):
        for predicate in choice.where:
            left = sum(
                keep_whole(filter_table(table, (predicate,), name), (predicate,), wanted).num_rows
                for name, table, wanted in parts
            )
            yield f"{condition(predicate)} keeps {left} of {total}"


def _choice_words(choice: Node) -> str:
    """Return a step on records as it was written, and whose records it chooses."""
    if isinstance(choice, Source):
        return ".".join(calls(choice))
    names = ", ".join(dict.fromkeys(source.name for source in leaves(choice)))
    return f"{call(choice)} of {names}"


# Windows


def _windows_at(ground: ChipSources, tables: Mapping[str, Table], place: Spot) -> _Windows:
    """Return the windows of a plan that hold a place, whether any record covers them or not."""
    spec = ground.spec
    anywhere = spec if spec.cover else replace(spec, aoi=None)  # those that cover lie where their area ends
    if not spec.in_cells:
        points = _points(ground, tables)

        def holding(wanted: ChipSpec) -> Frame:
            return _holding(ground.frame(points, wanted), place)

        everywhere = holding(anywhere)
        frame = everywhere if anywhere == spec else holding(spec)
        return _Windows(frame, everywhere, "" if len(everywhere) else _no_free_window(ground, points, place))
    home = int(spec.grid.zones.codes([place.lon], [place.lat])[0])
    if not home:
        return _Windows(_nothing(), _nothing(), f"the place is not on the ground of {spec.grid}")
    reach = spec.size * ground.resolution / KM_PER_DEGREE / 1000.0
    wide = reach / max(np.cos(np.radians(place.lat)), 0.05)
    near = spec.grid.zones.near((place.lon - wide, place.lat - reach, place.lon + wide, place.lat + reach))
    frames = {
        own.aoi: concatenated(
            [_holding(_around(ground, own, zone, place), place) for zone in sorted({home, *near})]
        )
        for own in (anywhere, spec)
    }
    reason = "" if len(frames[None]) else _no_cell(ground, home, place)
    return _Windows(frames[spec.aoi], frames[None], reason)


def _points(ground: ChipSources, tables: Mapping[str, Table]) -> pa.Table | None:
    return None if ground.spec.at is None else as_table(tables[ground.spec.at])


def _nothing() -> Frame:
    return concatenated([])


def _around(ground: ChipSources, spec: Any, zone: int, place: Spot) -> Frame:
    """Return the windows of a zone's split cells round a place; a window lies up to a pixel beyond its cell."""
    x, y = place.in_crs(zone)
    if not (np.isfinite(x) and np.isfinite(y)):
        return _nothing()
    pixel = 2.0 * ground.resolution
    cells = lattice_of(spec, ground.resolution).split_cells((x - pixel, y - pixel, x + pixel, y + pixel))
    return zone_frame(spec, zone, cells, ground.resolution, ground.phase)


def _holding(frame: Frame, place: Spot) -> Frame:
    """Return the windows that hold a place: their west and north edges belong to them."""
    inside = np.zeros(len(frame), dtype=bool)
    for code in np.unique(frame.epsg).tolist():
        x, y = place.in_crs(code)
        xmin, ymin, xmax, ymax = frame.bounds.T
        there = (xmin <= x) & (x < xmax) & (ymin < y) & (y <= ymax)
        inside |= there & (frame.epsg == code)
    return frame.take(inside)


def _no_cell(ground: ChipSources, home: int, place: Spot) -> str:
    """Say why no window of the lattice holds a place."""
    spec, resolution = ground.spec, ground.resolution
    lattice = lattice_of(spec, resolution)
    x, y = place.in_crs(home)
    cell = lattice.split_cells_at(np.array([x]), np.array([y]))[0]
    name = f"{spec.grid.zones.cell_name(home)}/{cell[0]}/{cell[1]}"
    pixel = 2.0 * resolution
    cells = lattice.chip_cells(lattice.split_cells((x - pixel, y - pixel, x + pixel, y + pixel)))
    bounds = lattice.bounds(cells)
    holds = (bounds[:, 0] <= x) & (x < bounds[:, 2]) & (bounds[:, 1] < y) & (y <= bounds[:, 3])
    others = bounds[holds & ~spec.grid.zones.holds(home, bounds)]
    if len(others):
        lon, lat = transformer(home, 4326).transform(others[:, [0, 2]].mean(1), others[:, [1, 3]].mean(1))
        zone = spec.grid.zones.codes(lon, lat)[0]
        theirs = f"zone {spec.grid.zones.cell_name(int(zone))}" if zone else "no zone"
        return (
            f"the place lies at the edge of zone {spec.grid.zones.cell_name(home)}: the centre of its cell there is in "
            f"{theirs}, and no window of a neighbouring zone reaches it"
        )
    if spec.stride > spec.size:
        return f"the place lies between two windows of split cell {name}: the stride is longer than a chip"
    if lattice.unused_m > 0:
        return (
            f"the place lies in the strip of {lattice.unused_m:g} m of split cell {name} that no chip reaches: "
            f"{lattice.per_side} chips of {spec.size * resolution:g} m do not fill {spec.cell_km:g} km"
        )
    return f"the place lies between two windows of split cell {name}: windows begin on pixel edges of the records"


def _no_free_window(ground: ChipSources, points: pa.Table | None, place: Spot) -> str:
    """Say why no window of an area, at points, of a GeoBox or of tiles holds a place."""
    if ground.spec.cover:
        return "the place lies outside of the area that chips cover: aoi=, where records of the reference source lie"
    match ground.spec.grid:
        case FileGrid():
            return f"no file of {ground.sources[ground.reference].plan.name} lies there"
        case _ if points is not None:
            shapes = shapely.from_wkb(points.column("geometry").to_numpy(zero_copy_only=False))
            far = np.array([place.distance_m(shape) for shape in shapes])
            return (
                f"no window of at= holds the place: row {int(far.argmin())} of its table is the nearest, "
                f"{_far(far.min())} away"
            )
        case BoxGrid() as box:
            x, y = place.in_crs(box.code)
            right, below = box.x0 + box.width * box.pixel, box.y0 - box.height * box.pixel
            if box.x0 <= x < right and below < y <= box.y0:
                return f"the place lies right or below of the last chip of the {box}"
            return f"the place lies outside of the {box}"
        case TileGrid():
            return "no tile of the reference source's records lies there"
    raise AssertionError(ground.spec.grid)


def _ids(frame: Frame) -> tuple[str, ...]:
    return tuple(frame.prefix.to_pylist())


def _ground_of(frame: Frame, place: Spot) -> Any:
    """Return the ground of windows, in degrees; the place alone where there is none."""
    if not len(frame):
        return shapely.Point(place.lon, place.lat)
    return shapely.union_all(shapely.from_wkb(outline_wkb(frame).to_numpy(zero_copy_only=False)))


# Coverage


def _laid(
    ground: ChipSources, tables: Mapping[str, Table], windows: _Windows, place: Spot, node: CutChips
) -> tuple[PlannedChips, Stage]:
    """Return the chips that the windows become, and what the step leaves."""
    points = _points(ground, tables)
    part, dates = ground.lay(windows.frame, points), ground.dates(windows.frame, points)
    reasons: tuple[str, ...] = ()
    if not len(windows.everywhere):
        reasons = (windows.reason,)
    elif not len(windows.frame):
        assert ground.spec.aoi is not None
        area = shapely.from_wkb(bytes.fromhex(ground.spec.aoi))
        far = place.distance_m(area)
        where = f"{_far(far)} from" if far > 0 else "in a window that shares too little with"
        reasons = (f"outside of the area of interest (aoi=): {where} it",)
    elif not part.table.num_rows:
        each = [
            (windows.frame.take(np.array([n])), {c: t[n : n + 1] for c, t in dates.items()})
            for n in range(len(windows.frame))
        ]
        reasons = tuple(dict.fromkeys(reason for one in each for reason in uncovered(ground, *one)))
    left = part.table.num_rows
    return part, Stage(call(node), "window", len(windows.everywhere), left, reasons)


def covered_slots(source: ResolvedSource, footprints: Outlines, frame: Frame, dates: Dates) -> Feeds:
    """Return every record that covers a part of a window, in each slot that its time falls in.

    Where a slot is an acquisition, and where there is no slot, the slot is the acquisition's number.

    Parameters
    ----------
    source, footprints, frame
        A source, the outlines of its records, and the windows.
    dates
        Of each window, where the source asks for some.
    """
    touched = covered(source, footprints, frame)
    return in_slots(source, touched, dates) if source.has_slots else touched


def uncovered(
    ground: ChipSources | PlannedChips, frame: Frame, dates: Dates, only: int | None = None
) -> Iterator[str]:
    """Yield what each source that chips may not lack, or ``only`` one source, lacks for a chip in a window."""
    spec, complete = ground.spec, True
    wanted_share = f"min_coverage asks for {spec.min_coverage:.0%}"
    for number, (source, footprints) in enumerate(zip(ground.sources, ground.outlines, strict=True)):
        if source.plan.optional if only is None else number != only:
            continue
        name = source.plan.name
        touched = covered(source, footprints, frame)
        slotted = covered_slots(source, footprints, frame, dates)
        if not len(touched.record):
            complete = False
            count = len(source.records)
            which = f"all {count:,} records" if count > 1 else "the only record"
            yield f"outside of the footprints of {which} of {name}{_nearest(source, frame)}"
            continue
        if not len(slotted.record):
            complete = False
            yield f"the records of {name} that cover it lie in none of its slots{_dates(dates)}"
            continue
        _, key, share = enough(slotted, frame, footprints, 0.0)
        least = min(spec.min_coverage, FULL) if spec.min_coverage > 0 else 0.0
        good = int(np.sum(share >= least))
        best = int(np.argmax(share))
        when = _slot_name(source, int(key[best]))
        if not source.has_slots:
            if not good:
                complete = False
                yield f"covered to {_percent(share[best])} at most by an acquisition of {name} ({when}); {wanted_share}"
            continue
        wanted = min(max(spec.min_slots, 1), source.plan.times)
        if good >= wanted:
            continue
        complete = False
        if not good:
            yield f"covered to {_percent(share[best])} at most by {name}, in slot {when}; {wanted_share}"
        else:
            low = [
                f"{_percent(part)} in slot {_slot_name(source, int(slot))}"
                for slot, part in zip(key.tolist(), share.tolist(), strict=True)
                if part < least
            ]
            more = f" ({', '.join(low)}; {wanted_share})" if low else ""
            yield f"{good} of {source.plan.times} slots of {name} are covered{more}; min_slots asks for {wanted}"
    if complete:  # sources without slots: each has acquisitions, but not at the same time
        other = "every other source" if only is None else ground.sources[only].plan.name
        yield f"no acquisition of the reference source has one of {other} beside it"


def _nearest(source: ResolvedSource, frame: Frame) -> str:
    """Name the record whose footprint is nearest to a window."""
    window = shapely.from_wkb(outline_wkb(frame).to_numpy(zero_copy_only=False))[0]
    middle = shapely.centroid(window)
    place = Spot(float(middle.x), float(middle.y))
    shapes = placed(shapely.from_wkb(source.records.table.column("geometry").to_numpy(zero_copy_only=False)))
    known = np.flatnonzero(~shapely.is_missing(shapes))
    if not len(known):
        return ""
    west, south, east, north = shapely.bounds(shapes[known]).T
    gaps = np.maximum(np.maximum(west - place.lon, place.lon - east), 0) * np.cos(np.radians(place.lat))
    order = np.argsort(
        np.hypot(gaps, np.maximum(np.maximum(south - place.lat, place.lat - north), 0)), kind="stable"
    )
    tried = known[order[:NEAREST]]
    far = [place.distance_m(shapes[at]) for at in tried.tolist()]
    at = int(np.argmin(far))
    return f"; the nearest, {source.records.ids[int(tried[at])]}, is {_far(far[at])} away"


def _dates(dates: Dates) -> str:
    """Return the dates of one window."""
    shown = ", ".join(f"{name} {np.datetime_as_string(times[0], unit='D')}" for name, times in dates.items())
    return f" ({shown})" if shown else ""


def _slot_name(source: ResolvedSource, slot: int) -> str:
    if source.axis is not None or (source.chip_times is not None and not source.chip_times.most):
        return slot_words(source, slot)
    return f"{pd.Timestamp(source.passes.start[slot]):%Y-%m-%d %H:%M}"


def slot_words(source: ResolvedSource, slot: int) -> str:
    """Return what a slot is called: ``2024-05``, ``2024-05-11``, ``static``, or what edges or number it has.

    Without slots it has no name.
    """
    if source.chip_times is not None:
        edges = source.chip_times.edges
        return str(slot) if source.chip_times.most else f"{edges[slot]} to {edges[slot + 1]}"
    if source.axis is None:
        return ""
    if source.is_static:
        return "static"
    start = pd.Timestamp(source.axis.start[slot])
    return f"{start:%Y-%m}" if start.day == 1 and start == start.normalize() else f"{start:%Y-%m-%d}"


def _percent(share: float) -> str:
    """Return a share of less than all, which is never rounded up to 100%."""
    return f"{np.floor(share * 1000) / 10:g}%"


def _far(metres: float) -> str:
    return f"{metres:,.0f} m" if metres < 10_000 else f"{metres / 1000:,.0f} km"


# Steps on chips


def _followed(
    part: PlannedChips, steps: Sequence[Node], tables: Mapping[str, Table], staged: Staged
) -> Trace:
    """Carry out the steps on chips on those of one place, until none is left."""
    stages: list[Stage] = []
    for step in steps:
        if isinstance(step, Map):
            continue
        if isinstance(step, FilterPixels):
            told = ("told by pixels, when they are read: why(chip_id) reads them",)
            stages.append(Stage(call(step), "chip", part.table.num_rows, part.table.num_rows, told))
            continue
        after, reasons = _carried(part, step, tables, staged)
        alive = after.table
        if isinstance(step, Split):
            alive = alive.filter(pc.is_valid(alive.column("split")))
        gone = part.table.num_rows - alive.num_rows
        stages.append(
            Stage(call(step), "chip", part.table.num_rows, alive.num_rows, tuple(reasons) if gone else ())
        )
        if not alive.num_rows:
            return Trace(tuple(stages), len(stages) - 1)
        part = replace(after, table=alive)
    return Trace(tuple(stages), None, tuple(part.table.column("chip_id").to_pylist()))


def _carried(
    part: PlannedChips, step: Node, tables: Mapping[str, Table], staged: Staged
) -> tuple[PlannedChips, Iterator[str]]:
    """Return what a step leaves of some chips, and why it leaves no more."""
    match step:
        case FilterChips(_, where):
            return carried_out(part, step, tables), _failing(part.table, where)
        case Select(_, splits):
            own = ", ".join(dict.fromkeys(map(str, part.table.column("split").to_pylist())))
            words = f"its split is {own}, and select keeps {', '.join(splits)}"
            return carried_out(part, step, tables), iter((words,))
        case Split(_, spec) if spec.by_hash or (spec.by == "geometry" and spec.buffer_m <= 0):
            return carried_out(part, step, tables), iter(split_lines(part, spec))
    try:
        whole = staged(step)
    except PlanError as error:  # it leaves no chip anywhere
        return replace(part, table=part.table.slice(0, 0)), iter(
            (f"the step leaves no chip at all: {error.found}",)
        )
    known = pc.is_in(whole.table.column("chip_id"), value_set=part.table.column("chip_id").combine_chunks())
    after = replace(whole, table=whole.table.filter(known))
    match step:
        case Split(_, spec):
            return after, _of_split(part, after, whole, spec)
        case Sample(_, n, seed, by):
            return after, _not_drawn(part, staged(children(step)[0]), n, seed, by)
        case Random():
            over = _over_chips(whole, part)
            words = f"none of the {whole.table.num_rows:,} windows that {call(step)} drew lies on its ground"
            return over, iter((words,))
        case WithTable():
            return after, iter(("it is not in the table that with_table was given",))
    return after, iter((f"{step_name(step)} leaves it out",))


def _over_chips(whole: PlannedChips, part: PlannedChips) -> PlannedChips:
    """Return the chips that share ground with others."""
    hit = np.zeros(whole.table.num_rows, dtype=bool)
    theirs, codes = shapely.box(*bounds_of(whole.table).T), whole.table.column("epsg").to_numpy()
    for code, bounds in zip(part.table.column("epsg").to_pylist(), bounds_of(part.table), strict=True):
        hit |= (codes == code) & (shapely.area(shapely.intersection(theirs, shapely.box(*bounds))) > 0)
    return replace(whole, table=whole.table.filter(pa.array(hit)))


def _failing(table: pa.Table, where: Sequence[Any]) -> Iterator[str]:
    for predicate in where:
        column = predicate[0]
        if not filter_table(table, (predicate,), "chips").num_rows:
            own = ", ".join(dict.fromkeys(map(str, table.column(column).to_pylist())))
            yield f"{column} is {own}, and filter asks for {condition(predicate)}"


def _not_drawn(part: PlannedChips, whole: PlannedChips, n: int, seed: int, by: str | None) -> Iterator[str]:
    own = part.table
    table = whole.table
    if by is not None and by in table.column_names:
        table = table.filter(pc.equal(table.column(by), own.column(by)[0]))
    rank = int(
        np.sum(sample_unit(table.column("chip_id"), seed) < sample_unit(own.column("chip_id"), seed).min())
    )
    among = f" with its {by}" if by is not None else ""
    yield f"number {rank + 1:,} of {table.num_rows:,} chips{among} by the hash of its id, and the sample takes {n:,}"


def _of_split(part: PlannedChips, after: PlannedChips, whole: PlannedChips, spec: SplitSpec) -> Iterator[str]:
    """Yield why chips have no split: of two splits' ground, or too near to train."""
    if spec.by == TIME:
        lost = [why for why in whole.split_losses if " = " not in why]
        yield f"split by time: {'; '.join(lost)}"
        return
    if spec.regions is not None:
        names = dict.fromkeys(map(repr, after.table.column(spec.by).to_pylist()))
        yield f"it lies in {spec.by} {', '.join(names)}: None where no region holds the whole chip"
        return
    if spec.column is not None:
        whole_spec, number = column_splits(whole.table.column(spec.by), spec)
        there = pc.is_in(
            whole.table.column("chip_id"), value_set=part.table.column("chip_id").combine_chunks()
        )
        if np.all(number[there.to_numpy(zero_copy_only=False)] < 0):
            values = ", ".join(dict.fromkeys(map(repr, part.table.column(spec.by).to_pylist())))
            yield f"column {spec.by} is {values}, of none of the splits {', '.join(whole_spec.names)}"
            return
    else:
        table = {} if whole.cells is None else {"cells": whole.cells.table}
        plain = replace(spec, buffer_m=0.0, stratify=(), raster=None, cells=next(iter(table), None))
        bare = carried_out(part, Split(Source("", ""), plain), table)
        if bare.table.column("split").null_count == part.table.num_rows:
            yield from split_lines(replace(part, cells=whole.cells), spec)
            return
    lost = after.table.filter(pc.is_null(after.table.column("split")))
    code = lost.column("epsg")[0].as_py()
    train = whole.table.filter(
        pc.and_(pc.equal(whole.table.column("split"), TRAIN), pc.equal(whole.table.column("epsg"), code))
    )
    near = _nearest_train(replace(whole, table=lost), replace(whole, table=train), code)
    yield f"nearer than {spec.buffer_m:g} m (buffer_m) to train{near}"


def _nearest_train(lost: PlannedChips, train: PlannedChips, code: int) -> str:
    if not train.table.num_rows:
        return ""
    own, others = shapely.box(*lost.ground[0]), shapely.box(*train.ground.T)
    at = int(np.argmin(shapely.distance(own, others)))
    (far,) = apart_m(code, np.array([own]), others[[at]])
    return f": {train.table.column('chip_id')[at].as_py()} is {far:,.0f} m away"


def split_lines(chips: PlannedChips, spec: SplitSpec) -> list[str]:
    """Say which split each chip's ground has, and why.

    Parameters
    ----------
    chips
        Few chips.
    spec
        The split.
    """
    if spec.by == "geometry":
        return [
            "split by the records' footprints (md5): a chip that records of two splits feed is in neither"
        ]
    if spec.by == TIME:
        held = "all of its records" if spec.date is None else f"its date in column {spec.date}"
        return [f"split by time: a chip is in the split whose range holds {held}"]
    if spec.column is not None:
        values = dict.fromkeys(map(repr, chips.table.column(spec.by).to_pylist()))
        return [f"split by column {spec.by}: {', '.join(values)}"]
    cells = SplitCells(chips.spec.grid.zones, chips.spec.cell_km * 1000.0, chips.cells)
    ends = np.cumsum([share for _, share in spec.ratios])
    ranges = {
        name: f"{end - share:g} to {end:g}" for (name, share), end in zip(spec.ratios, ends, strict=True)
    }
    lines: dict[str, None] = {}
    for row, code in enumerate(chips.table.column("epsg").to_pylist()):
        bounds = chips.ground[row]
        for name, unit, split in _cells_of(chips, code, bounds, cells, spec):
            hashed = f"its hash with seed {spec.seed} is {unit:.4f}, in {split} ({ranges[split]})"
            lines[f"split cell {name}: {hashed if chips.cells is None else f'dealt to {split}'}"] = None
    return list(lines)


def _cells_of(
    chips: PlannedChips, code: int, bounds: NDArray[np.float64], cells: SplitCells, spec: SplitSpec
) -> Iterator[tuple[str, float, str]]:
    """Yield the split cells that a chip touches, with their hashes and splits."""
    for zone in sorted(set(cells.zones.touched(code, bounds[None])[0].tolist()) - {0}):
        inner = bounds + np.array([1, 1, -1, -1]) * (1.5 * chips.resolution if zone == code else 0.0)
        touched = cells_touched(
            code, inner if chips.spec.in_cells and not chips.reach_m else bounds, zone, cells
        )
        units = cell_units(cells.zones.cell_name(zone), touched, spec)
        splits = cells.splits(zone, touched, spec)
        for (row, col), unit, split in zip(touched.tolist(), units.tolist(), splits.tolist(), strict=True):
            yield f"{cells.zones.cell_name(zone)}/{row}/{col}", unit, spec.names[split]
