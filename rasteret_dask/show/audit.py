# SPDX-License-Identifier: Apache-2.0
"""Whether splits hold: achieved ratios, chips lost and why, ground shared between splits, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FeedTable, bounds_of
from rasteret_dask.chipping.distances import apart_m, measure, stretch
from rasteret_dask.chipping.leftover import leftover
from rasteret_dask.chipping.splits import SplitCells, cells_at, touch_area
from rasteret_dask.chipping.splittimes import split_spans, times_of
from rasteret_dask.chipping.steps import FEW_LABELS
from rasteret_dask.chipping.strata import classes_of, classes_of_raster
from rasteret_dask.display.card import counted
from rasteret_dask.display.html import card, markup, shares, table, verdict
from rasteret_dask.errors import PlanError
from rasteret_dask.extent import metres
from rasteret_dask.grid import bounds_in, transformer
from rasteret_dask.planning.plan import TIME

__all__ = ["Audit", "BlockGround", "Ground", "audit", "audit_blocks", "between"]

METRES_PER_DEGREE = 100_000.0
"""Less than a degree of latitude is long in any CRS of chips: their scale is within 10 % of the ground's."""

EDGE_M = 1000.0
"""Edges longer than this get vertices before they are brought to another map."""

FIRST_GUESS = 64
"""Chips that are asked first for their nearest one."""


@dataclass(frozen=True)
class Audit:
    """What :meth:`Chips.audit` found.

    Examples
    --------
    >>> audit = chips.audit()
    >>> audit.chips, audit.overlaps
    ({'train': 124, 'val': 9, 'test': 21}, {'train-val': 0, 'train-test': 0, 'val-test': 0})
    """

    chips: dict[str, int]
    """Chips per split."""
    ratios: dict[str, float]
    """Achieved share per split."""
    targets: dict[str, float]
    """Share that split() was asked for; empty where a column of the chip table is the split."""
    cells: dict[str, int]
    """Split cells per split: those that chips were laid out in, or that hold the centres of windows."""
    lost: dict[str, int]
    """Chips (or windows, or records) left out, by reason."""
    overlaps: dict[str, int]
    """Pairs of chips of two splits that share ground; must be 0."""
    distance_m: dict[str, float]
    """Smallest distance between chips of two splits, metres: see ``measured``."""
    measured: str = ""
    """What distances are measured in, and whether the chips' map is of equal area."""
    classes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Column -> class -> split -> how much of the class is there: chips, or what ``split(stratify=)`` counts. Of the
    columns that the split is stratified by, else of the user's own with few values."""
    uncovered: str = ""
    """The share of the ground that no chip of the grid covers, and what would do better; empty where there is none."""
    present: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> split -> chips that have it; only sources that ``join(require=)`` lets chips lack."""
    times: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Split -> first and last day of its chips; of splits by time only."""
    apart_days: dict[str, float] = field(default_factory=dict)
    """Smallest time between chips of two splits, days; of splits by time only."""

    @property
    def ok(self) -> bool:
        """No two splits share ground.

        Examples
        --------
        >>> chips.audit().ok
        True
        """
        return not any(self.overlaps.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values.

        Examples
        --------
        >>> chips.audit().to_dict()["targets"]
        {'train': 0.7, 'val': 0.15, 'test': 0.15}
        """
        return asdict(self) | {"ok": self.ok}

    @property
    def verdict(self) -> str:
        """What was found, in a sentence.

        Examples
        --------
        >>> chips.audit().verdict
        'no two splits share ground'
        """
        pairs = sum(self.overlaps.values())
        return "no two splits share ground" if self.ok else f"{counted(pairs, 'pair')} of chips share ground"

    def _share_with(self, counts: Mapping[str, int]) -> str:
        """Return in how many chips of each split a source is there."""
        return ", ".join(f"{counts[name]} of {n} {name}" for name, n in self.chips.items())

    @property
    def _days_apart(self) -> str:
        return ", ".join(f"{pair} {days:,.3g} days" for pair, days in self.apart_days.items())

    def shares(self, column: str) -> dict[str, dict[str, float]]:
        """Return class -> split -> the class's share of the split; ``"all"`` is its share of all splits together.

        Parameters
        ----------
        column
            One of :attr:`classes`.

        Examples
        --------
        >>> audit = chips.folds(2).split(by="fold", test=[0]).audit()
        >>> audit.classes
        {}
        """
        counts = self.classes[column]
        whole = {split: sum(row[split] for row in counts.values()) for split in self.chips}
        total = sum(whole.values())
        return {
            name: {
                **{s: row[s] / whole[s] if whole[s] else 0.0 for s in self.chips},
                "all": sum(row.values()) / total if total else 0.0,
            }
            for name, row in counts.items()
        }

    def deviation(self, column: str) -> float:
        """Return how far a class's share in any split is from its share of all, at most: 0.02 are 2 percentage points.

        Examples
        --------
        >>> audit = chips.audit()
        >>> {column: audit.deviation(column) for column in audit.classes}
        {}
        """
        rows = self.shares(column).values()
        filled = [split for split, count in self.chips.items() if count]
        return max((abs(row[s] - row["all"]) for row in rows for s in filled), default=0.0)

    def _target(self, split: str) -> str:
        return f"{self.targets[split]:.1%}" if split in self.targets else "-"

    def _repr_html_(self) -> str:
        named = [[name, count, f"{self.ratios.get(name, 0):.1%}", self._target(name),
                  self.cells.get(name)] for name, count in self.chips.items()]  # fmt: skip
        apart = [[pair, count, f"{self.distance_m[pair]:,.0f}"] for pair, count in self.overlaps.items()]
        rows = [
            ("splits", shares(self.chips)),
            ("", table(["split", "chips", "share", "asked", "cells"], named)),
        ]
        if apart:
            rows.append(("pairs", table(["splits", "pairs that share ground", "at least apart, m"], apart)))
            rows.append(("distances", markup(self.measured)))
        if self.times:
            days = [[name, first, last] for name, (first, last) in self.times.items()]
            rows.append(("times", table(["split", "from", "to"], days)))
            rows.append(("apart", markup(self._days_apart)))
        for source, own in self.present.items():
            rows.append((f"with {source}", markup(self._share_with(own))))
        for column in self.classes:
            head = [column, *self.chips, "all"]
            lines = [[c, *(f"{row[s]:.1%}" for s in head[1:])] for c, row in self.shares(column).items()]
            rows.append(("classes", table(head, lines)))
        if self.lost:
            lost = [[count, why] for why, count in self.lost.items()]
            rows.append(("lost", table(["chips", "reason"], lost)))
        if self.uncovered:
            rows.append(("not covered", markup(self.uncovered)))
        return card(verdict(self.ok, f"Audit: {self.verdict}"), rows)

    def __str__(self) -> str:
        wide = max([9, *(len(name) + 1 for name in self.chips)])
        lines = [
            f"{'ok' if self.ok else 'NOT ok'}: {self.verdict}",
            f"{'split':<{wide}}{'chips':>7}{'share':>8}{'asked':>8}{'cells':>8}",
        ]
        for name, count in self.chips.items():
            cells = self.cells.get(name, 0)
            lines.append(
                f"{name:<{wide}}{count:>7}{self.ratios.get(name, 0):>8.1%}{self._target(name):>8}{cells:>8}"
            )
        for pair, count in self.overlaps.items():
            far = self.distance_m[pair]
            lines.append(f"{pair}: {count} overlaps, at least {far:,.0f} m apart")
        lines += [f"distances: {self.measured}"] * bool(self.overlaps)
        lines += [f"{name}: {first} to {last}" for name, (first, last) in self.times.items()]
        lines += [f"apart in time: {self._days_apart}"] * bool(self.apart_days)
        lines += [f"with {source}: {self._share_with(own)}" for source, own in self.present.items()]
        for column in self.classes:
            lines += self._class_lines(column)
        lost = ", ".join(f"{n} ({why})" for why, n in self.lost.items())
        lines += [f"lost: {lost}"] * bool(lost)
        lines += [f"not covered: {self.uncovered}"] * bool(self.uncovered)
        return "\n".join(lines)

    def _class_lines(self, column: str) -> list[str]:
        shares = self.shares(column)
        wide = max(9, len(column) + 1, *(len(name) + 1 for name in shares))
        heads = [*self.chips, "all"]
        width = [max(8, len(head) + 1) for head in heads]
        lines = [f"{column:<{wide}}" + "".join(f"{h:>{w}}" for h, w in zip(heads, width, strict=True))]
        for name, row in shares.items():
            lines.append(
                f"{name:<{wide}}" + "".join(f"{row[h]:>{w}.1%}" for h, w in zip(heads, width, strict=True))
            )
        return [
            *lines,
            f"{column}: shares differ by {100 * self.deviation(column):.1f} percentage points at most",
        ]

    __repr__ = __str__


def audit(chips: PlannedChips) -> Audit:
    """Check the splits of a planned set of chips.

    Raises
    ------
    PlanError
        When the plan has no split step.
    """
    whole = chips.table.select
    result = _audited(chips, [whole], [(0.0, whole, whole)])
    return replace(result, classes=_classes(chips, list(result.chips)))


def _classes(chips: PlannedChips, splits: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return how much of each class each split has, for each column of classes."""
    spec, table = chips.split, chips.table
    assert spec is not None
    number = np.asarray(
        pc.fill_null(pc.index_in(table.column("split"), value_set=pa.array(splits, pa.string())), -1)
    )
    columns = bool(chips.labels) or set(spec.stratify) <= set(table.column_names)
    if spec.stratify and spec.raster is None and columns:
        strata = [classes_of(chips, spec.stratify)]
    else:
        strata = [
            classes_of(chips, [name])
            for name in table.column_names
            if name != spec.column and _is_class(table, name)
        ]
    for cells in (chips.cells, chips.fold_cells):
        if cells is not None and cells.classes is not None:
            strata.append(classes_of_raster(chips, cells.raster, cells.classes))
    result = {}
    for one in strata:
        sums = {at: one.amounts[number == at].sum(axis=0).tolist() for at in range(len(splits))}
        result[one.column] = {
            name: {split: sums[at][place] for at, split in enumerate(splits)}
            for place, name in enumerate(one.names)
        }
    return result


def _is_class(table: pa.Table, name: str) -> bool:
    """Tell whether a column of the user's holds few classes, one for each chip."""
    kind = table.schema.field(name).type
    plain = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if name in CHIP_SCHEMA.names or not plain or table.column(name).null_count:
        return False
    return 1 < int(pc.count_distinct(table.column(name)).as_py()) <= FEW_LABELS


@dataclass(frozen=True, slots=True)
class BlockGround:
    """A block of chips, looked at when it is needed."""

    epsg: int
    bounds: tuple[float, float, float, float]
    """Of all its chips: xmin, ymin, xmax, ymax."""
    table: Callable[[Sequence[str]], pa.Table]
    """Returns some columns of its chips."""

    def degrees(self) -> tuple[float, float, float, float]:
        """Return its bounds in degrees."""
        return bounds_in(self.bounds, self.epsg, 4326)


def audit_blocks(chips: PlannedChips, blocks: Sequence[BlockGround]) -> Audit:
    """Check the splits of chips that are planned by blocks, two neighbouring blocks at a time.

    Parameters
    ----------
    chips
        What the plan says of all of them.
    blocks
        The blocks that have chips.

    Raises
    ------
    PlanError
        When the plan has no split step.
    """
    pairs = ((gap, first.table, second.table) for gap, first, second in _by_gap(blocks))
    return _audited(chips, [block.table for block in blocks], pairs)


_Part: TypeAlias = Callable[[Sequence[str]], pa.Table]
"""Some chips: gives columns of theirs."""


def _audited(
    chips: PlannedChips, parts: Sequence[_Part], pairs_of_parts: Iterable[tuple[float, _Part, _Part]]
) -> Audit:
    """Check the splits of chips that are looked at in parts.

    Parameters
    ----------
    chips
        What the plan says of all of them.
    parts
        All chips.
    pairs_of_parts
        Each part with itself, then two of them, those nearest to each other first, with the gap between them, metres.
    """
    if chips.split is None:
        raise PlanError("audit", "no split step", "split(...) before audit()")
    names = chips.split.names
    count, cells = dict.fromkeys(names, 0), {name: set[str]() for name in names}
    optional = {s.plan.name: n for n, s in enumerate(chips.sources) if s.plan.optional}
    present = {source: dict.fromkeys(names, 0) for source in optional}
    codes, edges = set[int](), np.array([np.inf, np.inf, -np.inf, -np.inf])
    timed = "feeds" if chips.split.date is None else chips.split.date
    is_timed = chips.split.by == TIME and timed in chips.table.column_names  # stores keep no feeds
    moments = []
    for part in parts:
        if is_timed:
            batches = part(["split", timed]).to_batches()  # each with its own dictionary of ids
            moments += [split_spans(replace(chips, table=pa.Table.from_batches([b]))) for b in batches]
        rows = part(["split", "cell", "epsg", "xmin", "ymin", "xmax", "ymax"])
        for source, number in optional.items():
            _count_present(part(["split", "feeds"]), number, present[source])
        codes |= set(pc.unique(rows.column("epsg")).to_pylist())
        box = bounds_of(rows)
        edges[:2] = np.minimum(edges[:2], box[:, :2].min(axis=0, initial=np.inf))
        edges[2:] = np.maximum(edges[2:], box[:, 2:].max(axis=0, initial=-np.inf))
        for name in names:
            own = rows.filter(pc.equal(rows.column("split"), name)).column("cell")
            count[name] += len(own)
            cells[name] |= set(pc.unique(own.drop_null()).to_pylist())
        if rows.column("cell").null_count:
            for name, places in _cells_of_windows(chips, rows).items():
                cells[name] |= places
    pairs = list(combinations([name for name in names if count[name]], 2))
    overlaps, distance = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, np.inf)
    for gap, first, second in pairs_of_parts:
        wanted = [pair for pair in pairs if gap == 0.0 or gap < distance[pair]]
        if not wanted:
            break
        ground, split, before = _two(chips, first, second)
        for pair in wanted:
            a, b = (split.number == split.place(name) for name in pair)
            sides = [(a, b)] if before is None else [(a & before, b & ~before), (a & ~before, b & before)]
            for one, other in sides:
                near = _beside(ground, np.flatnonzero(one), np.flatnonzero(other), distance[pair])
                if near is not None:
                    shared, nearest = between(ground, *near)
                    overlaps[pair] += shared
                    distance[pair] = min(distance[pair], nearest)
    total = max(sum(count.values()), 1)
    left, when = leftover(chips.spec, chips.resolution), times_of(moments)
    return Audit(
        count, {n: c / total for n, c in count.items()}, {} if chips.split.column else dict(chips.split.ratios),
        {n: len(c) for n, c in cells.items()}, dict(chips.dropped), _named(overlaps), _named(distance),
        measure(sorted(codes), tuple(edges.tolist())) if codes else "", {}, "" if left is None else left.text, present,
        when.ends, when.apart_days,
    )  # fmt: skip


def _count_present(rows: pa.Table, source: int, counts: dict[str, int]) -> None:
    """Add how many chips of each split have records of a source."""
    for batch in rows.to_batches():  # each with its own dictionary of ids
        feeds = FeedTable.of(pa.Table.from_batches([batch]))
        there = np.unique(feeds.chip[feeds.source == source])
        for split in batch.column("split").take(pa.array(there)).to_pylist():
            if split in counts:
                counts[split] += 1


def _cells_of_windows(chips: PlannedChips, rows: pa.Table) -> dict[str, set[str]]:
    """Return the split cells that hold the centres of windows which were laid out freely, for each split."""
    assert chips.split is not None
    split_cells = SplitCells(chips.spec.grid.zones, chips.spec.cell_km * 1000.0)
    result = {name: set[str]() for name in chips.split.names}
    rows = rows.filter(pc.and_(pc.is_null(rows.column("cell")), pc.is_valid(rows.column("split"))))
    split, epsg = np.array(rows.column("split").to_pylist(), dtype=object), rows.column("epsg").to_numpy()
    for code in np.unique(epsg).tolist():
        here = np.flatnonzero(epsg == code)
        zones, places = cells_at(int(code), bounds_of(rows)[here], split_cells)
        for own, zone, place in zip(split[here].tolist(), zones.tolist(), places.tolist(), strict=True):
            if zone and own in result:
                result[own].add(f"{zone}/{place[0]}/{place[1]}")
    return result


def _named(values: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    return {f"{a}-{b}": value for (a, b), value in values.items()}


def _by_gap(blocks: Sequence[BlockGround]) -> Iterator[tuple[float, BlockGround, BlockGround]]:
    """Yield each block with itself, then pairs of blocks, those nearest to each other first; the gap in metres."""
    for block in blocks:
        yield 0.0, block, block
    degrees = np.array([block.degrees() for block in blocks]).reshape(-1, 4)
    first, second = np.triu_indices(len(blocks), 1)
    low = np.maximum(degrees[first, :2], degrees[second, :2]) - np.minimum(
        degrees[first, 2:], degrees[second, 2:]
    )
    turned = (
        np.abs(degrees[:, [0, 2]]).max() > 170.0
    )  # near 180 degrees, places may be near though their numbers are not
    north = np.cos(np.radians(np.abs(degrees[:, [1, 3]]).max(initial=0.0)))
    east = np.zeros(len(first)) if turned else np.maximum(low[:, 0], 0.0) * north
    gap = np.hypot(east, np.maximum(low[:, 1], 0.0)) * METRES_PER_DEGREE
    for at in np.argsort(gap, kind="stable").tolist():
        yield float(gap[at]), blocks[int(first[at])], blocks[int(second[at])]


def _two(
    chips: PlannedChips, first: _Part, second: _Part
) -> tuple[Ground, _Numbers, NDArray[np.bool_] | None]:
    """Return the ground of one or two parts, each chip's split, and which chips are of the first of two."""
    names = ["epsg", "xmin", "ymin", "xmax", "ymax", "geometry", "split"]
    tables = [part(names) for part in ([first] if first is second else [first, second])]
    table = pa.concat_tables(tables)
    before = None if len(tables) == 1 else np.arange(table.num_rows) < tables[0].num_rows
    return Ground.of(replace(chips, table=table)), _numbered(table.column("split")), before


def _beside(
    ground: Ground, first: NDArray[np.int64], second: NDArray[np.int64], limit: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return those chips of two sets that may lie within a distance of the other set; None where there are none."""
    for _ in range(2):
        if not len(first) or not len(second):
            return None
        codes = np.unique(ground.epsg[np.append(first, second)])
        if len(codes) == 1 and np.isfinite(limit):
            box = shapely.buffer(
                shapely.box(*shapely.total_bounds(ground.boxes[second])),
                limit * ground.stretch[int(codes[0])],
                join_style="mitre",
            )
            first = first[shapely.intersects(ground.boxes[first], box)]
        elif np.isfinite(limit):
            first = ground.near(second, first, limit)
        first, second = second, first
    return (first, second) if len(first) and len(second) else None


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A column of texts as numbers."""

    texts: list[str]
    number: NDArray[np.int64]
    """Shape (row,). The place of the row's text among ``texts``, -1 where there is none."""

    def place(self, text: str) -> int:
        """Return a number that rows of this text have, and no others."""
        return self.texts.index(text) if text in self.texts else len(self.texts)


def _numbered(column: pa.ChunkedArray) -> _Numbers:
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    return _Numbers(encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy().astype(np.int64))


@dataclass(frozen=True, slots=True)
class Ground:
    """Where chips lie: in their own CRS, and in degrees."""

    epsg: NDArray[np.int64]
    boxes: NDArray[Any]
    """Shape (chip,). In the chip's own CRS."""
    wkb: pa.ChunkedArray
    """Outlines in degrees."""
    centre: NDArray[np.float64]
    """Shape (chip, 2). Longitude and latitude; not asked for, thus zeros, where all chips are of one CRS."""
    radius_m: float
    """From the centre to the corner, of the largest chip."""
    stretch: Mapping[int, float]
    """Number of a CRS -> how long a metre of ground is on its map, at most."""

    @classmethod
    def of(cls, chips: PlannedChips) -> Ground:
        """Take the chip table apart."""
        epsg = chips.table.column("epsg").to_numpy().astype(np.int64)
        return cls.of_windows(epsg, chips.ground, chips.outlines_lonlat)

    @classmethod
    def of_windows(cls, epsg: NDArray[np.int64], bounds: NDArray[np.float64], wkb: pa.ChunkedArray) -> Ground:
        """Take windows: the CRS and bounds of each, shape (window, 4), and its outline in degrees."""
        middle = (bounds[:, :2] + bounds[:, 2:]) / 2
        centre, zones = np.zeros_like(middle), np.unique(epsg)
        for code in zones if len(zones) > 1 else ():
            here = epsg == code
            centre[here] = np.stack(transformer(int(code), 4326).transform(*middle[here].T), -1)
        unit = np.select([epsg == code for code in zones], [metres(int(code)) for code in zones], 1.0)
        radius = float((np.hypot(*(bounds[:, 2:] - middle).T) * unit).max(initial=0.0))
        boxes = np.asarray(shapely.box(*bounds.T), dtype=object)
        scale = {code: stretch(code, bounds[epsg == code]) for code in zones.tolist()}
        return cls(epsg, boxes, wkb, centre, radius, scale)

    @classmethod
    def of_shapes(cls, epsg: NDArray[np.int64], shapes: NDArray[Any]) -> Ground:
        """Take shapes, each in the CRS of its own number."""
        degrees = np.empty(len(shapes), dtype=object)
        for code in np.unique(epsg).tolist():
            here, to = epsg == code, transformer(code, 4326)
            dense = shapely.segmentize(shapes[here], EDGE_M)
            degrees[here] = shapely.transform(
                dense, lambda p, to=to: np.stack(to.transform(p[:, 0], p[:, 1]), -1)
            )
        box, own = shapely.bounds(degrees), shapely.bounds(shapes)
        centre = (box[:, :2] + box[:, 2:]) / 2
        radius = float(np.hypot(*((own[:, 2:] - own[:, :2]) / 2).T).max(initial=0.0))
        scale = {code: stretch(code, own[epsg == code]) for code in np.unique(epsg).tolist()}
        wkb = pa.chunked_array([pa.array(shapely.to_wkb(degrees), pa.binary())])
        return cls(epsg, shapes, wkb, centre, radius, scale)

    def on(self, code: int) -> NDArray[Any]:
        """Return all outlines on one map."""
        to = transformer(4326, code)
        shapes = shapely.from_wkb(self.wkb.to_numpy())
        return np.asarray(
            shapely.transform(shapes, lambda p: np.stack(to.transform(p[:, 0], p[:, 1]), -1)), dtype=object
        )

    def near(
        self, chips: NDArray[np.int64], others: NDArray[np.int64], distance_m: float
    ) -> NDArray[np.int64]:
        """Return those of other chips that may lie within a distance of any of some chips; never too few."""
        reach = (distance_m + 2 * self.radius_m) / METRES_PER_DEGREE
        low, high = self.centre[chips].min(axis=0), self.centre[chips].max(axis=0)
        north = max(abs(low[1]), abs(high[1])) + reach
        if not np.isfinite(reach) or north >= 90.0:
            return others
        lon, lat = self.centre[others].T
        wider = reach / np.cos(np.radians(north))
        beside = np.zeros(len(others), dtype=bool)
        for turn in (-360.0, 0.0, 360.0):
            beside |= (lon + turn >= low[0] - wider) & (lon + turn <= high[0] + wider)
        return np.asarray(others[beside & (lat >= low[1] - reach) & (lat <= high[1] + reach)])

    def moved(self, rows: NDArray[np.int64], code: int) -> NDArray[Any]:
        """Return the outlines of chips in another CRS, without those that it cannot show."""
        to = transformer(4326, code)
        shapes = shapely.from_wkb(self.wkb.take(pa.array(rows)).to_numpy(zero_copy_only=False))
        shapes = shapely.transform(shapes, lambda p: np.stack(to.transform(p[:, 0], p[:, 1]), -1))
        return np.asarray(shapes[np.isfinite(shapely.bounds(shapes)).all(axis=1)], dtype=object)


def between(ground: Ground, first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[int, float]:
    """Return how many pairs of chips share ground, and the smallest distance in metres.

    Chips of other zones are projected only where they are near enough to matter: to share ground, or to lie nearer
    than the nearest chips so far. Of chips that touch no distance is asked.
    """
    overlaps, nearest = 0, np.inf
    zones = [
        (int(code), first[ground.epsg[first] == code], ground.epsg[second] == code)
        for code in np.unique(ground.epsg[first])
    ]
    for code, chips, here in zones:
        if here.any():
            count, nearest = _apart(ground, code, chips, ground.boxes[second[here]], nearest)
            overlaps += count
    for code, chips, here in zones:
        there = ground.near(chips, second[~here], nearest)
        if len(there) and len(others := ground.moved(there, code)):
            count, nearest = _apart(ground, code, chips, others, nearest)
            overlaps += count
    return overlaps, nearest


def _apart(
    ground: Ground, code: int, rows: NDArray[np.int64], others: NDArray[Any], limit: float
) -> tuple[int, float]:
    """Return how many pairs of chips and shapes of their CRS share ground, and the smallest distance.

    That is ``limit`` where none is nearer.
    """
    chips = ground.boxes[rows]
    tree = shapely.STRtree(others)
    at, other = tree.query(chips, predicate="intersects")
    if len(at):
        least = touch_area(code)
        a, b = shapely.bounds(chips[at]), shapely.bounds(others[other])
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        more = np.flatnonzero(sides.prod(axis=1) > least)  # most neighbours only touch
        shared = shapely.area(shapely.intersection(chips[at[more]], others[other[more]]))
        return int(np.sum(shared > least)), 0.0
    for some in (chips[:: max(len(chips) // FIRST_GUESS, 1)], chips):  # a few tell how far all need to look
        if limit > 0:
            far = None if np.isinf(limit) else limit * ground.stretch[code]
            chip, other = tree.query_nearest(some, max_distance=far, all_matches=False)
            limit = min(limit, float(apart_m(code, some[chip], others[other]).min(initial=np.inf)))
    return 0, limit
