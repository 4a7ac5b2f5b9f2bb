# SPDX-License-Identifier: Apache-2.0
"""An optimized plan and its records become the planned chips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import CellTable
from rasteret_dask.chipping.chiptable import (
    CHIP_SCHEMA,
    FeedTable,
    bounds_of,
    is_label,
    is_name,
    joined,
    replaced,
    with_columns,
)
from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.feeds import Feeds, source_outlines
from rasteret_dask.chipping.filewindows import file_windows, with_file_pixels
from rasteret_dask.chipping.frame import Frame, Phase, candidates, cell_names, frame_of, grown, outline_wkb
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.chipping.laying import Laid, lay
from rasteret_dask.chipping.maskfiles import MaskFiles
from rasteret_dask.errors import EmptyError, GridError, PlanError
from rasteret_dask.grid import Lattice, digits
from rasteret_dask.planning.chiptimes import Dates, dates_of
from rasteret_dask.planning.filechips import CHIP
from rasteret_dask.planning.meta import OF_SLOTS
from rasteret_dask.planning.names import check_names
from rasteret_dask.planning.pixelsizes import COARSE, pixels_m
from rasteret_dask.planning.plan import (
    ChipSpec,
    CutChips,
    Filter,
    Function,
    Join,
    Map,
    Node,
    Predicate,
    Rule,
    SplitSpec,
    is_filtered,
    near_area,
    without,
)
from rasteret_dask.planning.resolve import ResolvedSource, SourcePlan, evaluate, in_metres, resolve_source
from rasteret_dask.planning.scan import Table, as_table
from rasteret_dask.table.records import Records
from rasteret_dask.table.timing import TimeAxis
from rasteret_dask.zones import BoxGrid, CrsGrid, TileGrid

__all__ = [
    "ChipSources",
    "PlannedChips",
    "below_join",
    "check_context",
    "chip_sources",
    "labels_of",
    "phases",
    "tell_of_coarse",
    "used_records",
    "used_rows",
]


@dataclass(frozen=True)
class PlannedChips:
    """A planned set of chips."""

    table: pa.Table
    """CHIP_SCHEMA and the user's further columns, in the order of shards."""
    sources: tuple[ResolvedSource, ...]
    reference: int
    spec: ChipSpec
    split: SplitSpec | None
    resolution: float
    """Pixel size of the reference source."""
    maps: tuple[tuple[str | None, Function], ...] = ()
    """Functions over chips after the join, with the source each applies to."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many chips, windows or records were left out, by reason."""
    outlines: tuple[Outlines, ...] = ()
    """For each source, the covered ground of its records."""
    pixel_rules: tuple[Rule, ...] = ()
    """What pixels must fulfil for their chip to be kept."""
    labels: tuple[Labels, ...] = ()
    """Polygons that become masks of the reference source, a mask each."""
    cells: CellTable | None = None
    """The split of each split cell, where cells were dealt by more than a hash."""
    fold_cells: CellTable | None = None
    """The fold of each split cell, likewise."""
    split_losses: tuple[str, ...] = ()
    """Reasons of ``dropped`` that are the split's: another split that takes its place has losses of its own."""

    @cached_property
    def feeds(self) -> FeedTable:
        """The feed entries of all chips, flat."""
        return FeedTable.of(self.table)

    @property
    def size_m(self) -> float:
        """Side of a chip on the ground, metres."""
        return self.spec.size * self.resolution

    @property
    def reach_m(self) -> float:
        """How far beyond a chip the window of some source reaches on each side, metres."""
        return self.spec.reach_m(self.resolution)

    @property
    def ground(self) -> NDArray[np.float64]:
        """Shape (chip, 4). The ground that each chip shows in any source: xmin, ymin, xmax, ymax in its CRS."""
        return grown(bounds_of(self.table), self.reach_m)

    @property
    def outlines_lonlat(self) -> pa.ChunkedArray:
        """The same as WKB, in degrees."""
        if not self.reach_m:
            return self.table.column("geometry")
        return pa.chunked_array([outline_wkb(frame_of(self.table).grown(self.reach_m))])


@dataclass(frozen=True)
class ChipSources:
    """What a ``chips`` step is laid out of, settled before there is any window."""

    spec: ChipSpec
    sources: tuple[ResolvedSource, ...]
    reference: int
    outlines: tuple[Outlines, ...]
    """For each source, the covered ground of its records."""
    maps: tuple[tuple[str | None, Function], ...] = ()
    """Functions over chips after the join, with the source each applies to."""

    @property
    def resolution(self) -> float:
        """Pixel size of the reference source."""
        return self.sources[self.reference].plan.resolution

    @cached_property
    def phase(self) -> Phase:
        """For each EPSG code, a pixel corner of the reference source's grid."""
        return phases(self.sources[self.reference], self.outlines[self.reference])

    @property
    def dropped(self) -> dict[str, int]:
        """Records that were left out, by reason."""
        replaced = {
            f"record replaced by a newer baseline ({s.plan.name})": s.passes.replaced for s in self.sources
        }
        unreadable = {
            f"record that lacks a band or has an unreadable asset ({s.plan.name})": s.unreadable
            for s in self.sources
        }
        return {why: count for why, count in (replaced | unreadable).items() if count}

    def frame(self, points: pa.Table | None = None, spec: ChipSpec | None = None) -> Frame:
        """Return the candidate windows of the plan, or of another one over the same sources.

        Parameters
        ----------
        points
            The table of ``at=``.
        spec
            The other plan's.
        """
        own, reference = spec or self.spec, self.outlines[self.reference]
        if own.by_file:
            return file_windows(own, self.sources[self.reference], reference, points)
        return candidates(own, reference, self.resolution, self.phase, points)

    def lay(self, frame: Frame, points: pa.Table | None = None) -> PlannedChips:
        """Find what feeds each candidate window and keep those that every required source covers; there may be none.

        Parameters
        ----------
        frame
            The windows.
        points
            The table of ``at=``, whose columns chips get.
        """
        sources, ground = list(self.sources), list(self.outlines)
        laid = lay(self.spec, sources, self.reference, ground, frame, self.dates(frame, points))
        table = _table(self.spec, sources, sources[self.reference].passes.platform, frame, laid)
        if points is not None:
            assert frame.index is not None
            table = _with_facts(table, points, frame.index[laid.window], self.spec)
        dropped = {why: count for why, count in laid.lost.items() if count}
        return PlannedChips(
            table, self.sources, self.reference, self.spec, None, self.resolution, self.maps, dropped,
            self.outlines,
        )  # fmt: skip

    def dates(self, frame: Frame, points: pa.Table | None) -> Dates:
        """Return the dates of windows that sources ask for.

        Parameters
        ----------
        frame
            The windows.
        points
            The table of ``at=``.

        Raises
        ------
        PlanError
            When it has no such dates.
        """
        asked = {
            column: source.plan.name
            for source in reversed(self.sources)
            if source.chip_times is not None
            for column in source.chip_times.columns
        }
        found = dates_of(points, asked)
        for source in self.sources:
            if source.chip_times is not None:
                source.chip_times.check_dates(source.plan.name, found)
        rows = frame.index if found else None
        return {} if rows is None else {column: times[rows] for column, times in found.items()}

    def none_laid(self, windows: int, dropped: Mapping[str, int]) -> PlanError:
        """Return the error of a plan whose windows all are left out."""
        reasons = "; ".join(f"{count:,}: {why}" for why, count in dropped.items())
        grid, name = self.spec.grid, self.sources[self.reference].plan.name
        if not windows and isinstance(grid, CrsGrid):
            return PlanError(
                f"chips(grid={str(grid)!r})", f"no record of {name!r} on the ground of that CRS",
                "records within 10 degrees of its area of use",
                "Choose a CRS that is made for that ground, or grid='utm', which has a zone for any place.",
            )  # fmt: skip
        subject = f"chips(grid={str(grid)!r})" if isinstance(grid, BoxGrid) else "chips"
        return EmptyError(
            subject, f"no chip of {windows:,} candidate windows ({reasons or 'no record is there'})",
            "at least one chip", "Lower min_coverage, change the area, or check that the sources overlap in time.",
        )  # fmt: skip


def _with_facts(table: pa.Table, points: pa.Table, index: NDArray[np.int64], spec: ChipSpec) -> pa.Table:
    """Return chips with the columns of the table of ``at=``; of files, the column ``split`` says their split."""
    own = points.take(pa.array(index, mask=index < 0))
    if not spec.by_file:
        return with_columns(table, own)
    if "split" in own.column_names:
        table = replaced(table, "split", own.column("split").cast(pa.string()))
    return with_columns(table, own.drop_columns([n for n in (CHIP, "split") if n in own.column_names]))


def labels_of(ground: ChipSources, tables: Mapping[str, Table]) -> tuple[Labels, ...]:
    """Return the polygons of a ``chips`` step that become masks."""
    spec = ground.spec
    if spec.labels is None:
        return ()
    table = as_table(tables[spec.labels])
    if spec.rasterize is None:
        return MaskFiles.of_table(table, ground.reference, dict(spec.classes))
    return Labels.of_columns(table, spec.rasterize, ground.reference, spec.classes, spec.radius_m)


def chip_sources(node: CutChips, tables: Mapping[str, Table]) -> ChipSources:
    """Resolve the sources of a ``chips`` step.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out.
    """
    near = near_area(node.spec)
    settled = near is None or is_filtered(node.child, near)
    child: Node = below_join(node.child if settled or near is None else Filter(node.child, (near,)))
    maps: list[tuple[str | None, Function]] = []
    while isinstance(child, Map) and isinstance(child.child, Join):
        maps.append((child.source, child.function))
        child = child.child
    if isinstance(child, Join):
        required = child.names if child.require is None else child.require
        sources = [_joined(child, at, tables, near) for at in range(len(child.names))]
    else:
        members = evaluate(child, tables)
        sources = [resolve_source(members[0].name if len(members) == 1 else "merged", members)]
        required = (sources[0].plan.name,)
    names = [s.plan.name for s in sources]
    check_names(names, "chips")
    _check_meta(sources)
    if node.spec.reference is not None and node.spec.reference not in names:
        raise PlanError("chips(reference=)", repr(node.spec.reference), f"one of {', '.join(names)}")
    if node.spec.reference is not None and node.spec.reference not in required:
        raise PlanError(
            f"chips(reference={node.spec.reference!r})",
            f"a source that chips may lack: join(require={list(required)})", f"one of {', '.join(required)}",
            f"Say chips(reference={required[0]!r}), or join(require={[*required, node.spec.reference]}).",
        )  # fmt: skip
    reference = names.index(node.spec.reference or required[0])
    by_tiles = node.spec.at is None and isinstance(
        node.spec.grid, TileGrid
    )  # the only grid that may count in degrees
    sources = [
        source
        if node.spec.by_file or (by_tiles and n == reference)
        else in_metres(source, f"chips(size={node.spec.size})")
        for n, source in enumerate(sources)
    ]
    sources = _shared_time(sources, reference)
    if sources[reference].is_static and sources[reference].axis is None:
        moving = next(name for name, s in zip(names, sources, strict=True) if not s.is_static)
        raise PlanError(
            f"chips of {', '.join(names)}", f"source {names[reference]!r}, which holds at any time, as their reference",
            "one whose acquisitions become chips",
            (f"Say chips(reference={moving!r}), or give" if moving in required else "Give")
            + f" {moving!r} slots: harmonize(time='1MS').",
        )  # fmt: skip
    _check_slots(node.spec, sources)
    ground = tuple(source_outlines(s) for s in sources)
    if node.spec.by_file:
        sources = with_file_pixels(node.spec, sources, reference, ground)
    _check_sizes(node.spec, sources, reference)
    check_context(node.spec, [s.plan for s in sources], reference)
    return ChipSources(node.spec, tuple(sources), reference, ground, tuple(reversed(maps)))


def _joined(join: Join, at: int, tables: Mapping[str, Table], near: Predicate | None) -> ResolvedSource:
    """Resolve a source of a join.

    Of a source that chips may lack there may be no record near the area: what its bands are, records elsewhere tell.
    """
    name, node = join.names[at], join.children[at]
    members = evaluate(node, tables)
    if not join.may_lack(name):
        return resolve_source(name, members)
    if near is not None and not any(len(member.table) for member in members):
        members = evaluate(without(node, near), tables)
    source = resolve_source(name, members)
    return replace(source, plan=replace(source.plan, optional=True))


def below_join(node: Node) -> Node:
    """Return an equal plan whose filters of a join stand in each of its sources."""
    match node:
        case Filter(child, where) if isinstance(below := below_join(child), Join):
            return replace(below, children=tuple(Filter(c, where) for c in below.children))
        case Filter(child, where) if isinstance(below := below_join(child), Map):
            return replace(below, child=below_join(Filter(below.child, where)))
        case Map(child):
            return replace(node, child=below_join(child))
    return node


def _shared_time(sources: list[ResolvedSource], reference: int) -> list[ResolvedSource]:
    """Give sources of intervals their own slots where another source has a time axis; none where none has one.

    What holds at any time has one slot, beside slots as beside single acquisitions. Intervals with a tolerance take
    the slots of the reference, or of the first other source that has some.
    """
    sources = [
        replace(s, axis=None, plan=replace(s.plan, slots=None)) if s.tolerance is not None else s
        for s in sources
    ]
    sources = [
        s if s.chip_times is None else replace(s, plan=replace(s.plan, chip_slots=s.chip_times.count))
        for s in sources
    ]
    axes = [s.axis for s in sources if s.axis is not None and not s.is_static]
    spans = [axis.span for axis in axes] + [s.span for s in sources if s.has_own_slots]
    composed = [s.plan.name for s in sources if s.is_static and s.plan.rules.composes]
    if not spans and (composed or all(s.axis is not None for s in sources)):
        axes = [s.axis for s in sources if s.axis is not None]
        spans = [axis.span for axis in axes]
    if not spans:
        return [replace(s, axis=None, plan=replace(s.plan, slots=None)) for s in sources]
    start, end = min(first for first, _ in spans), max(last for _, last in spans)
    result = []
    for source in sources:
        if source.axis is None and source.tolerance is not None and source.chip_times is None:
            if not axes:
                raise PlanError(
                    f"harmonize(tolerance={str(pd.Timedelta(source.tolerance))!r}) of source {source.plan.name!r}",
                    "beside slots of each chip's own", "beside slots that all chips share, or single acquisitions",
                    "Leave tolerance out: intervals then have slots of their own.",
                )  # fmt: skip
            own = sources[reference]
            axis = axes[0] if own.axis is None or own.is_static else own.axis
            slots = tuple(int(t) for t in axis.start.astype(np.int64))
            source = replace(source, axis=axis, plan=replace(source.plan, slots=slots))
        elif not source.has_slots:
            if not bool(source.passes.is_interval.all()):
                raise PlanError(
                    f"source {source.plan.name!r}", "records of instants and no time=",
                    "a time axis of its own, since another joined source has one",
                    "Add harmonize(time=...) to it: an offset such as '1MS', or 'static' for what does not change.",
                )  # fmt: skip
            pairs = sorted(set(zip(source.passes.start.tolist(), source.passes.end.tolist(), strict=True)))
            stamps = np.array(pairs, dtype=np.int64).reshape(-1, 2).astype("datetime64[ns]")
            keep = (stamps[:, 0] < end) & (stamps[:, 1] > start)
            if not keep.any():
                raise PlanError(f"source {source.plan.name!r}", f"intervals {stamps.min()} to {stamps.max()}",
                                f"one that overlaps {start} to {end}",
                                "harmonize(time='static') lets it hold at any time.")  # fmt: skip
            axis = TimeAxis(stamps[keep, 0], stamps[keep, 1], (start, end))
            slots = tuple(int(t) for t in axis.start.astype(np.int64))
            source = replace(source, axis=axis, plan=replace(source.plan, slots=slots))
        result.append(source)
    return result


def _check_meta(sources: Sequence[ResolvedSource]) -> None:
    """Refuse names of what chips carry that no array can have beside those of chips."""
    for source in sources:
        for name, _ in source.plan.meta:
            if name not in OF_SLOTS and not (is_label(name) and is_name(name)):
                why = "a name that chips have of their own" if is_name(name) else "no name of an array"
                always = name == "datetime"
                raise PlanError(
                    f"harmonize(meta=) of source {source.plan.name!r}", f"{name!r}, {why}", "another name",
                    "Leave it out: chips always have it." if always else "Rename the column of the records.",
                )  # fmt: skip


def _check_slots(spec: ChipSpec, sources: list[ResolvedSource]) -> None:
    """Refuse to ask for more slots than there are: of each source with slots of its own, intervals fill theirs."""
    slots = {s.plan.name: s.plan.times for s in sources}
    needed = [s for s in sources if not s.plan.optional]
    own = [s.plan.name for s in needed if not bool(s.passes.is_interval.all())]
    own = own or [s.plan.name for s in needed]
    few = min(own, key=lambda name: slots[name])
    if spec.min_slots > slots[few]:
        raise PlanError(
            f"chips(min_slots={spec.min_slots})",
            f"{slots[few]} slot{'s' * (slots[few] > 1)} of source {few!r}",
            f"at most {slots[few]}",
            "Lower min_slots, or make more slots: harmonize(time='1MS'), a wider date_range, max_acquisitions.",
        )


def _check_sizes(spec: ChipSpec, sources: list[ResolvedSource], reference: int) -> None:
    resolution = sources[reference].plan.resolution
    length = spec.size * resolution
    if isinstance(spec.grid, CrsGrid) and spec.grid.pixel is not None:
        pixel = spec.grid.pixel
        if abs(pixel - resolution) > 1e-9 * pixel:
            raise GridError(
                "chips(grid=GridSpec)", f"pixels of {pixel:g} m", f"the reference source's {resolution:g} m",
                f"harmonize(resolution={pixel:g}) gives it these pixels.",
            )  # fmt: skip
    if spec.on_lattice:
        Lattice(spec.cell_km * 1000.0, length, spec.stride * resolution)
    wider = dict(spec.context_m)  # whose windows have a side of their own
    inside = [source for source in sources if source.plan.name not in wider]
    others = [s.plan.resolution for s in inside]
    for source in inside:
        pixels = length / source.plan.resolution
        if abs(pixels - round(pixels)) < 1e-6 and round(pixels) > 0:
            continue
        fits = [n for n in range(8, 4 * spec.size + 64, 8) if _fits(n * resolution, others)]
        below = [n for n in fits if n < spec.size][-1:]
        above = [n for n in fits if n > spec.size][:1]
        cell = spec.cell_km * 1000.0
        fills = [n for n in fits if abs(cell / (n * resolution) - round(cell / (n * resolution))) < 1e-9]
        best = [n for n in fills if n < spec.size][-1:] + [n for n in fills if n > spec.size][:1]
        raise GridError(
            f"chips(size={spec.size}) with source {source.plan.name!r}",
            f"{length:g} m = {pixels:.4g} pixels of {source.plan.resolution:g} m",
            "a whole number of every source's pixels",
            f"Nearest sizes that fit: {', '.join(map(str, below + above)) or 'none'}"
            + (f"; filling a split cell: {', '.join(map(str, best))}." if best else "."),
        )


def check_context(spec: ChipSpec, sources: Sequence[SourcePlan], reference: int) -> None:
    """Refuse windows of sources that cannot lie around a chip.

    Raises
    ------
    PlanError
        When a source is none of the plan's, or the reference.
    GridError
        When a side is no whole number of the source's pixels, or shorter than a chip.
    """
    own, names = sources[reference], [source.name for source in sources]
    length = spec.size * own.resolution
    for name, side in spec.context_m:
        subject = f"chips(context_m=) of source {name!r}"
        others = [one for one in names if one != own.name]
        if name == own.name:
            raise PlanError(
                subject, "the reference, whose windows are the chips themselves", "another source",
                f"Say chips(reference={others[0]!r})." if others else "Join it with a source of smaller windows.",
            )  # fmt: skip
        if name not in names:
            raise PlanError(
                subject, "no such source", f"one of {', '.join(others) or 'none: join another source'}"
            )
        pixel = sources[names.index(name)].resolution
        below, least = math.floor(side / pixel + 1e-6), math.ceil(length / pixel - 1e-6)
        if below >= least and abs(side / pixel - below) < 1e-6:
            continue
        near = sorted({max(below, least) * pixel, max(below + 1, least) * pixel})
        raise GridError(
            subject, f"{side:g} m = {side / pixel:.4g} pixels of {pixel:g} m",
            f"a whole number of its pixels, and at least the side of a chip, {length:g} m",
            f"Nearest sides that fit: {', '.join(f'{one:g}' for one in near)}.",
        )  # fmt: skip


def tell_of_coarse(ground: ChipSources) -> None:
    """Warn of pixels that are far larger than those they are resampled to: meant for weather, and else a slip."""
    if ground.spec.by_file or (ground.spec.at is None and not ground.spec.on_lattice):
        return
    for source in ground.sources:
        wanted = source.plan.resolution
        for number, member in enumerate(source.plan.members):
            own = source.member == number
            pixel = max(float(np.nanmedian(pixels_m(source.records, band)[own])) for band in member.bands)
            if pixel > COARSE * wanted:
                warnings.warn(
                    f"source {source.plan.name!r}: pixels of {pixel:.6g} m ({member.name}) are resampled to "
                    f"{wanted:g} m, {pixel / wanted:,.0f} times finer: one of them fills {pixel / wanted:,.0f} x "
                    f"{pixel / wanted:,.0f} pixels of chips",
                    UserWarning,
                    stacklevel=3,
                )


def _fits(length: float, resolutions: list[float]) -> bool:
    return all(abs(length / r - round(length / r)) < 1e-6 for r in resolutions)


def phases(source: ResolvedSource, footprints: Outlines) -> Phase:
    """Return a pixel corner in each CRS: the first member's that has records there, that of most of them."""
    resolution = source.plan.resolution
    corner = np.round(np.mod(footprints.raster[:, [0, 3]], resolution), digits(resolution)) % resolution
    facts = np.column_stack([footprints.epsg, corner])[footprints.of_record]
    result: Phase = {}
    for epsg in np.unique(footprints.epsg).tolist():
        own = np.flatnonzero(facts[:, 0] == epsg)
        if len(own):
            own = own[source.member[own] == source.member[own[0]]]
            corners, votes = np.unique(facts[own, 1:], axis=0, return_counts=True)
            x, y = corners[np.argmax(votes)].tolist()  # of equally many, the smallest
            result[epsg] = x, y
    return result


def _table(
    spec: ChipSpec, sources: list[ResolvedSource], platforms: tuple[str, ...], frame: Frame, laid: Laid
) -> pa.Table:
    frame = frame.take(laid.window)
    n = len(frame)
    names = _acquisition_names(laid, platforms)
    columns = {
        "chip_id": frame.prefix if spec.by_file else joined(frame.prefix, names),
        "epsg": pa.array(frame.epsg.astype(np.int32)),
        "row": pa.array(frame.row),
        "col": pa.array(frame.col),
        "cell": pa.nulls(n, pa.string()) if frame.cell is None else cell_names(spec, frame),
        **{name: pa.array(frame.bounds[:, i]) for i, name in enumerate(("xmin", "ymin", "xmax", "ymax"))},
        "datetime": pa.array(laid.start.astype("datetime64[us]")).cast(pa.timestamp("us", tz="UTC")),
        "acquisition": names,
        "slots": pa.array(laid.slots.astype(np.int32)),
        "coverage": pa.array(laid.share.astype(np.float32)),
        "split": pa.nulls(n, pa.string()),
        "geometry": outline_wkb(frame),
        "feeds": _feed_column(sources, laid.feeds, n),
    }
    return pa.table(columns, schema=CHIP_SCHEMA)


def _acquisition_names(laid: Laid, platforms: tuple[str, ...]) -> pa.StringArray:
    """Return platform and start of each chip's acquisition; a second one of that name in a window gets a number."""
    if (laid.acquisition < 0).all():
        return pa.nulls(len(laid.window), pa.string())
    called, platform = np.unique([p or "unknown" for p in platforms], return_inverse=True)
    seconds, second = np.unique(laid.start.astype("datetime64[s]"), return_inverse=True)
    pair, name = np.unique(platform[laid.acquisition] * len(seconds) + second, return_inverse=True)
    stamps = pd.DatetimeIndex(seconds[pair % len(seconds)])
    texts = [f"{called[p]}-{t:%Y%m%dT%H%M%S}" for p, t in zip(pair // len(seconds), stamps, strict=True)]
    order = np.lexsort((name, laid.window))  # stable: chips of one window and name stay in their order
    again = np.append(False, (np.diff(laid.window[order]) == 0) & (np.diff(name[order]) == 0))
    names = pa.array(texts).take(pa.array(name))
    if not again.any():
        return names
    place = np.arange(len(order))
    count = np.empty_like(place)
    count[order] = place - np.maximum.accumulate(np.where(again, 0, place)) + 1
    return joined(names, pa.array(count, mask=count == 1), by="-")


def _feed_column(sources: list[ResolvedSource], feeds: tuple[Feeds, ...], chips: int) -> pa.ListArray:
    source = np.repeat(np.arange(len(feeds), dtype=np.int8), [len(f.window) for f in feeds])
    window, slot, place, row, share = (
        np.concatenate([getattr(f, n) for f in feeds]) for n in ("window", "slot", "order", "record", "share")
    )
    if len(feeds) > 1:
        order = np.argsort(window, kind="stable")  # within a chip: by source, slot, order, nearness
        source, window, slot, place, row, share = (
            v[order] for v in (source, window, slot, place, row, share)
        )
    offsets = np.append(0, np.cumsum(np.bincount(window, minlength=chips)))
    names = tuple(s.plan.name for s in sources)
    ids = tuple(tuple(s.records.ids) for s in sources)
    return FeedTable(offsets, source, slot, place, row, share, names, ids).to_arrow()


def used_rows(chips: PlannedChips) -> list[tuple[ResolvedSource, NDArray[np.int64]]]:
    """Return each source with the rows of its records that feed a chip."""
    feeds = chips.feeds
    return [(s, feeds.rows_of(n)) for n, s in enumerate(chips.sources)]


def used_records(
    chips: PlannedChips, used: Sequence[NDArray[np.int64]] | None = None
) -> tuple[list[Records], list[NDArray[np.int64]], pa.Table]:
    """Return each source's records that feed a chip, their members, and the chip table with rows counted in those.

    Parameters
    ----------
    chips
        The chips.
    used
        Per source, the rows of its records that count; None: of those that feed one of these chips.
    """
    feeds = chips.feeds
    if used is None:
        used = [feeds.rows_of(n) for n in range(len(chips.sources))]
    if all(len(u) == len(s.records) for u, s in zip(used, chips.sources, strict=True)):
        return [s.records for s in chips.sources], [s.member for s in chips.sources], chips.table
    row = np.empty_like(feeds.row)
    for number, rows in enumerate(used):
        place = np.zeros(len(chips.sources[number].records), dtype=row.dtype)
        place[rows] = np.arange(len(rows))
        own = feeds.source == number
        row[own] = place[feeds.row[own]]
    kept = [s.records.take(u) for s, u in zip(chips.sources, used, strict=True)]
    members = [s.member[u] for s, u in zip(chips.sources, used, strict=True)]
    names = tuple(s.plan.name for s in chips.sources)
    column = replace(feeds, row=row, names=names, ids=tuple(tuple(r.ids) for r in kept)).to_arrow()
    return kept, members, replaced(chips.table, "feeds", column)
