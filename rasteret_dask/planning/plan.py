# SPDX-License-Identifier: Apache-2.0
"""What the user asked for, as small frozen values that can be compared, hashed and written as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeAlias, TypeVar

import shapely

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.functions import Function, plain
from rasteret_dask.planning.names import check_names, check_split_names
from rasteret_dask.planning.rules import Rule
from rasteret_dask.rules.masks import Mask
from rasteret_dask.rules.picks import Pick
from rasteret_dask.rules.units import Units
from rasteret_dask.rules.values import RuleValue
from rasteret_dask.rules.values import from_json as rule_from_json
from rasteret_dask.words import Choose, Edge
from rasteret_dask.zones import UTM, BoxGrid, ChipGrid, CrsGrid, FileGrid, TileGrid, UtmGrid, chip_grid

__all__ = [
    "ACQUISITIONS",
    "FILES",
    "LATER",
    "ChipSpec",
    "CutChips",
    "Filter",
    "FilterChips",
    "FilterPixels",
    "Folds",
    "Function",
    "Harmonize",
    "HarmonizeSpec",
    "Join",
    "Map",
    "Merge",
    "Node",
    "Predicate",
    "Random",
    "Rule",
    "STATIC",
    "TIME",
    "Sample",
    "Select",
    "Source",
    "Split",
    "SplitSpec",
    "WithTable",
    "changes",
    "check_apart",
    "children",
    "digest",
    "from_json",
    "is_filtered",
    "is_number",
    "leaves",
    "near_area",
    "predicates",
    "spec_field",
    "step_name",
    "to_json",
    "with_children",
    "without",
]


Scalar: TypeAlias = "str | int | float | bool | None"
Predicate: TypeAlias = "tuple[str, str, Scalar | tuple[Scalar, ...]]"
"""(column, operator, value): ``("eo:cloud_cover", "<", 20)``; datetimes as ISO 8601 text."""

OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in", "intersects", "overlaps")
CELL_KM = 15.36
"""Side of a split cell where nobody chooses: 64 to 512 pixels divide it, of 10 m and of 30 m."""
MAX_CELL_KM = 100
"""A split cell larger than a sixth of a zone's width would hold too few chips of one zone."""
KM_PER_DEGREE = 100.0
"""Of latitude, rounded down from 110.6 (WGS 84, at the equator) to leave room for a grid's turn against north."""
STATIC = "static"
"""``harmonize(time=)`` of what does not change: one slot that holds at any time."""
ACQUISITIONS = "acquisitions"
"""``harmonize(time=)`` of slots that are each one acquisition, chip by chip."""
FILES = "files"
"""``harmonize(time=)`` of slots that columns of the records tell: ``slot``, and ``slot_start`` where all share them."""
CHOICES = (None, "clearest", "spread", "latest", "nearest")
MAP_STRETCH = 4.0
"""Ground below a length of a map's metres, at most, to 75 degrees: 3.4 on EPSG:6933, of equal area and true at 30."""
TIME = "time"
"""``split(by=)`` of splits that have a range of time each."""
LATER = {"later": True}
"""Marks a field that plans did not have at first: JSON leaves it out where it is the default, so that digests stay."""
MAX_CONTEXT_M = 1_000_000
"""The side of windows of a source, at most, metres: beyond, the map of a zone is none."""
DTYPES = (None, "float32", "uint16", "int16")
MOST_ACQUISITIONS = 10_000
EDGES = ("shift", "pad")
RESAMPLINGS = (None, "nearest", "bilinear", "cubic", "average", "mode", "overview")


@dataclass(frozen=True, slots=True)
class HarmonizeSpec:
    """How a source's records become like each other. None: not said; an outer step may say it."""

    bands: tuple[str, ...] | None = None
    units: Units | None = None
    resolution: float | None = None
    """Metres (or the CRS's unit) a pixel."""
    resampling: str | None = None
    mask: Mask | None = None
    time: str | tuple[str, ...] | None = None
    """A pandas offset (``"1MS"``): the length of a slot; ``STATIC``, ``ACQUISITIONS``; or edges of windows of time."""
    tolerance: str | None = None
    """A length of time (``"400D"``): how far the interval may lie that stands in where none holds a moment."""
    pick: Pick | None = None
    fill: bool | None = None
    """Whether what is invalid in the picked acquisition comes from the next."""
    dtype: str | None = None
    kinds: tuple[tuple[str, str], ...] | None = None
    """(band, kind) pairs, by band: what the user says of bands, by any of their names."""
    max_acquisitions: int | None = dataclasses.field(default=None, metadata=LATER)
    """How many acquisitions a chip has at most, each a slot."""
    choose: Choose | None = dataclasses.field(default=None, metadata=LATER)
    """Which ones, where there are more."""
    relative_to: str | None = dataclasses.field(default=None, metadata=LATER)
    """The column of ``at=`` with the date that windows of time are counted from, or acquisitions are near to."""
    meta: tuple[str, ...] | None = dataclasses.field(default=None, metadata=LATER)
    """What chips carry of each slot: properties of its record, or names of ``meta.OF_SLOTS``."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("harmonize(choose)", self.choose, CHOICES)
        texts = self.time if isinstance(self.time, tuple) else (self.time or "",)
        if not all(isinstance(text, str) for text in texts):
            raise PlanError(
                "harmonize(time=)",
                repr(self.time),
                "the length of a slot such as '1MS', or edges of windows, as text",
            )
        most = self.max_acquisitions
        if most is not None and not (_is_whole(most) and 0 < most <= MOST_ACQUISITIONS):
            raise PlanError(
                "harmonize(max_acquisitions=)", repr(most), f"a whole number from 1 to {MOST_ACQUISITIONS:,}"
            )
        _one_of("resampling", self.resampling, RESAMPLINGS)
        if self.resolution is not None and not (is_number(self.resolution) and self.resolution > 0):
            raise PlanError("harmonize(resolution=)", repr(self.resolution), "a positive pixel size")
        if self.bands is not None and (not self.bands or len(set(self.bands)) != len(self.bands)):
            raise PlanError("harmonize(bands=)", repr(self.bands), "at least one band, none twice")
        names = self.meta
        if names is not None and not (
            names and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
        ):
            raise PlanError("harmonize(meta=)", repr(names), "at least one name, as text, none twice")

    def under(self, outer: HarmonizeSpec) -> HarmonizeSpec:
        """Return this with whatever ``outer`` says put over it."""
        said = {f.name: getattr(outer, f.name) for f in dataclasses.fields(outer)}
        kinds = {
            "kinds": tuple(sorted({**dict(self.kinds or ()), **dict(outer.kinds or ())}.items())) or None
        }
        return dataclasses.replace(self, **{k: v for k, v in said.items() if v is not None} | kinds)


@dataclass(frozen=True, slots=True)
class ChipSpec:
    """Which windows of the ground become chips."""

    size: int
    """Pixels of the reference source."""
    stride: int
    """Pixels from one chip to the next."""
    grid: ChipGrid = UTM
    """The lattices of zones or of one CRS, tiles, or a GeoBox."""
    cell_km: float = CELL_KM
    min_coverage: float = 1.0
    min_slots: int = 1
    reference: str | None = None
    """Name of the source whose pixels stay native; None: the first that chips may not lack."""
    aoi: str | None = None
    """WKB of an area in lon/lat, as hex; None: wherever there are records."""
    at: str | None = None
    """Token of a table of points or polygons that get one window each."""
    labels: str | None = None
    """Token of a table of polygons that become masks; None: no masks."""
    rasterize: str | tuple[str, ...] | None = None
    """The column of that table whose values masks hold; several: a mask for each."""
    classes: tuple[Any, ...] = field(default=(), metadata=LATER)
    """All values that it may have: they settle the numbers of classes; of several columns, pairs of a column and its
    values. Empty: those that it has."""
    radius_m: float | None = field(default=None, metadata=LATER)
    """The table has points: this many metres of ground around each get its value. None: it has polygons."""
    context_m: tuple[tuple[str, float], ...] = field(default=(), metadata=LATER)
    """(source, metres): the side of windows of that source, around the chips' centres; others have the chips' own."""
    drawn: bool = field(default=False, metadata=LATER)
    """Whether planned windows were drawn at random, on the ground of those that lie in rows and columns."""

    cover: bool = field(default=False, metadata=LATER)
    """Whether each pixel of the area is in a chip: windows lie across split cells."""
    edge: Edge = field(default="shift", metadata=LATER)
    """With ``cover``: the last window of a row or column ends at the area's edge, or reaches beyond it (``"pad"``)."""

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            pixels = getattr(self, name)
            if not (_is_whole(pixels) and pixels > 0):
                raise PlanError(f"chips({name}=)", repr(pixels), "a positive whole number of pixels")
        if not (is_number(self.min_coverage) and 0 <= self.min_coverage <= 1):
            raise PlanError("chips(min_coverage=)", repr(self.min_coverage), "a share from 0 to 1")
        if not (is_number(self.cell_km) and 0 < self.cell_km <= MAX_CELL_KM):
            raise PlanError("chips(cell_km=)", repr(self.cell_km), f"above 0 and at most {MAX_CELL_KM} km")
        if not (_is_whole(self.min_slots) and self.min_slots >= 0):
            raise PlanError("chips(min_slots=)", repr(self.min_slots), "0 or more slots")
        for name, side in self.context_m:
            if not (is_number(side) and 0 < side <= MAX_CONTEXT_M):
                raise PlanError(
                    f"chips(context_m=) of source {name!r}",
                    repr(side),
                    f"metres above 0, at most {MAX_CONTEXT_M:,}",
                )
        _one_of("chips(edge)", self.edge, EDGES)
        if self.cover:
            self._check_cover()
        elif self.edge != EDGES[0]:
            raise PlanError(
                f"chips(edge={self.edge!r})", "cover=False: no chip reaches beyond an edge", "cover=True",
                f"Say chips(cover=True, edge={self.edge!r}), or leave edge out.",
            )  # fmt: skip
        sides = sorted((name, float(side)) for name, side in self.context_m)
        object.__setattr__(self, "context_m", tuple(sides))
        object.__setattr__(self, "grid", chip_grid(self.grid))

    def _check_cover(self) -> None:
        if self.at is not None:
            raise PlanError(
                "chips(cover=True)", "at=, which says where each window lies", "windows in rows and columns",
                "Leave out at=, or cover: chips(size, aoi=places, cover=True) covers the ground of polygons.",
            )  # fmt: skip
        if self.stride > self.size:
            raise PlanError(
                f"chips(size={self.size}, stride={self.stride}, cover=True)",
                "a stride longer than a chip, which leaves ground between chips",
                f"a stride of at most {self.size}", "Shorten the stride, or leave out cover.",
            )  # fmt: skip

    @property
    def plain(self) -> ChipSpec:
        """What chips of this size are laid out by where nothing else is said."""
        return ChipSpec(self.size, self.size, min_coverage=0.0 if self.cover else 1.0)

    def reach_m(self, resolution: float, source: str | None = None) -> float:
        """Return how far beyond a chip the window of a source reaches on each side, metres; None: any source's.

        ``resolution`` is the reference source's pixel size.
        """
        sides = [side for name, side in self.context_m if source in (None, name)]
        return max([0.0, *((side - self.size * resolution) / 2 for side in sides)])

    @property
    def in_cells(self) -> bool:
        """Whether windows are laid out in split cells; elsewhere they lie freely."""
        return self.on_lattice and not self.cover

    @property
    def on_lattice(self) -> bool:
        """Whether windows lie on the lattices of zones, in split cells or across them."""
        return self.in_rows and isinstance(self.grid, UtmGrid | CrsGrid)

    @property
    def in_tiles(self) -> bool:
        """Whether windows are the parts of a source's tiles."""
        return self.in_rows and isinstance(self.grid, TileGrid) and not self.cover

    @property
    def in_rows(self) -> bool:
        """Whether windows lie in rows and columns, of a cell, a tile or a box; else at places of their own."""
        return self.at is None and not self.drawn and not self.by_file

    @property
    def by_file(self) -> bool:
        """Whether each window is the raster of a file."""
        return isinstance(self.grid, FileGrid)


@dataclass(frozen=True, slots=True)
class SplitSpec:
    """How the ground is shared out."""

    ratios: tuple[tuple[str, float], ...]
    """(split, share), in order; shares sum to 1. Empty where a column of the chip table is the split."""
    seed: int = 0
    by: str = "ground"
    """``"ground"``, ``"geometry"`` or the name of a column of the chip table."""
    buffer_m: float = 0.0
    boundary: str = "drop"
    values: tuple[tuple[str, tuple[Scalar, ...] | None], ...] = field(default=(), metadata=LATER)
    """(split, values of the column, or start and end of its time), in order; None: what no other split takes. Empty:
    each value of the column is a split of that name."""
    salt: str = field(default="ground", metadata=LATER)
    """What stands before the seed in the hash of a split cell: ``"folds"`` deals apart from ``"ground"``."""
    stratify: tuple[str, ...] = field(default=(), metadata=LATER)
    """Columns whose classes every split gets its share of; (): cells are dealt by a hash. With ``raster``: its name."""
    cells: str | None = field(default=None, metadata=LATER)
    """Token of a table of split cells that keep the split which they have there."""

    gap: str | None = field(default=None, metadata=LATER)
    """Of splits by time: a length of time that other splits keep away from train."""
    regions: str | None = field(default=None, metadata=LATER)
    """Token of a table of polygons that ``by`` names; the split is by their names."""
    raster: str | None = field(default=None, metadata=LATER)
    """Token of a table of how much of each class of a raster split cells hold; classes are those, not columns."""
    date: str | None = field(default=None, metadata=LATER)
    """Of splits by time: the column with each chip's own date; None: the time of its records."""
    moments: str | None = field(default=None, metadata=LATER)
    """Token of a table of train's times, which ``gap`` keeps away from, where not all chips are at hand."""

    def __post_init__(self) -> None:
        if not isinstance(self.by, str):
            raise PlanError("split(by=)", repr(self.by), "'ground', 'geometry' or the name of a column")
        if not _is_whole(self.seed):
            raise PlanError("split(seed=)", repr(self.seed), "a whole number; no split can be called seed")
        check_split_names(self.names, "split")
        if self.by in ("ground", "geometry"):
            self._check_shares()
        if self.gap is not None and self.by != TIME:
            raise PlanError(
                "split(gap=)", f"by={self.by!r}", "by='time'", "Around chips on the ground: buffer_m=."
            )
        if self.date is not None and (self.by != TIME or not isinstance(self.date, str)):
            raise PlanError(
                f"split(date={self.date!r})", f"by={self.by!r}", "by='time', and the name of a column of dates",
                f"Say split(by='time', date={str(self.date)!r}, test=('2024', None)).",
            )  # fmt: skip
        _one_of("boundary", self.boundary, ("drop", "centre"))
        if not (is_number(self.buffer_m) and self.buffer_m >= 0):
            raise PlanError("split(buffer_m=)", repr(self.buffer_m), "0 or more metres")
        for name in ("stratify", "cells"):
            if getattr(self, name) and self.by != "ground":
                raise PlanError(
                    f"{self.step}({name}=)", f"by={self.by!r}", "by='ground': only split cells are dealt",
                    f"Leave out by=, or {name}=.",
                )  # fmt: skip

    def _check_shares(self) -> None:
        shown = ", ".join(f"{name}={share!r}" for name, share in self.ratios)
        wanted = "shares of 0 or more that sum to 1"
        if not self.ratios or not all(is_number(share) and share >= 0 for _, share in self.ratios):
            raise PlanError("split ratios", shown or "none", wanted)
        total = sum(share for _, share in self.ratios)
        if abs(total - 1) > 1e-9:
            raise PlanError("split ratios", f"{shown} (sum {total:g})", wanted, self._rest(total))

    def _rest(self, total: float) -> str:
        """Return the call that would make the sum 1."""
        free = next((name for name in ("val", "test", "rest") if name not in self.names), None)
        shares = {name: f"{share:g}" for name, share in self.ratios}
        if total < 1 and free is not None:
            shares[free] = f"{1 - total:.10g}"
        else:
            shares = {name: f"{share / total:.10g}" for name, share in self.ratios}
        return f"Write split({', '.join(f'{name}={share}' for name, share in shares.items())})."

    @property
    def names(self) -> tuple[str, ...]:
        """The splits, in order; none where they are what a column holds, which planning looks at."""
        return tuple(name for name, _ in self.ratios or self.values)

    @property
    def step(self) -> str:
        """What deals the cells: ``"split"`` or ``"folds"``."""
        return "folds" if self.salt == "folds" else "split"

    @property
    def by_hash(self) -> bool:
        """Whether a chip's own ground is all that decides its split: no other chip, and no table."""
        return self.by == "ground" and self.buffer_m <= 0 and not self.stratify and self.cells is None

    @property
    def column(self) -> str | None:
        """The column of the chip table that is the split, if one is."""
        return None if self.by in ("ground", "geometry", TIME) else self.by


@dataclass(frozen=True, slots=True)
class Source:
    """Records of one table."""

    name: str
    token: str
    """Identity of the table; the table itself is held beside the plan."""
    where: tuple[Predicate, ...] = ()
    bands: tuple[str, ...] | None = None
    """Bands (any of their names) whose assets are needed; None: all. ``ANY_QUALITY``: its quality bands."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Only the records that fulfil all predicates."""

    child: Node
    where: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """The n records or chips with the smallest seeded hash of their id, per stratum of ``by``."""

    child: Node
    n: int
    seed: int
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Merge:
    """The union of several collections: one source with several members."""

    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Harmonize:
    """The same bands, units, grid and time axis for all records below."""

    child: Node
    spec: HarmonizeSpec


@dataclass(frozen=True, slots=True)
class Map:
    """A user's function over the chips of a group."""

    child: Node
    function: Function
    source: str | None = None
    """The joined source it applies to; None below a join."""


@dataclass(frozen=True, slots=True)
class Join:
    """Several sources over the same ground, each a variable of its own."""

    names: tuple[str, ...]
    children: tuple[Node, ...]
    require: tuple[str, ...] | None = dataclasses.field(default=None, metadata=LATER)
    """Sources without which there is no chip, in the order of ``names``; None: all."""

    def __post_init__(self) -> None:
        check_names(self.names, "join")
        if self.require is not None:
            object.__setattr__(self, "require", _required(self.require, self.names))

    def may_lack(self, name: str) -> bool:
        """Tell whether there are chips without a source."""
        return self.require is not None and name not in self.require


@dataclass(frozen=True, slots=True)
class CutChips:
    """Cells of the ground that every source covers."""

    child: Node
    spec: ChipSpec


@dataclass(frozen=True, slots=True)
class Split:
    """A split for each chip."""

    child: Node
    spec: SplitSpec

    def __post_init__(self) -> None:
        check_apart(self.child, "split")


@dataclass(frozen=True, slots=True)
class Folds:
    """A column that says which fold each chip is in."""

    child: Node
    spec: SplitSpec
    """A share for each fold: their names are 0, 1, ..."""

    def __post_init__(self) -> None:
        check_apart(self.child, "folds")


@dataclass(frozen=True, slots=True)
class FilterChips:
    """Only the chips that fulfil all predicates on columns of the chip table."""

    child: Node
    where: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """Only the chips of these splits."""

    child: Node
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FilterPixels:
    """Only the chips whose pixels fulfil a rule: the task that reads them tells."""

    child: Node
    spec: Rule


@dataclass(frozen=True, slots=True)
class WithTable:
    """Only the chips that stand in a user's table, with that table's further columns."""

    child: Node
    token: str


@dataclass(frozen=True, slots=True)
class Random:
    """Windows drawn at random on the ground of chips, in their place."""

    child: Node
    n: int
    seed: int = 0
    size: int | None = None
    """Pixels of the reference source; None: as large as the chips."""
    balance: tuple[str, ...] = ()
    """Columns whose classes get equally many windows; (): windows lie anywhere."""
    places: str | None = None
    """Token of a table of places of classes, which get equally many windows."""

    def __post_init__(self) -> None:
        if not (_is_whole(self.n) and self.n > 0):
            raise PlanError("random(n=)", repr(self.n), "1 or more windows")
        if not _is_whole(self.seed):
            raise PlanError("random(seed=)", repr(self.seed), "a whole number")
        if self.size is not None and not (_is_whole(self.size) and self.size > 0):
            raise PlanError("random(size=)", repr(self.size), "a positive whole number of pixels")


Node: TypeAlias = (
    "Source | Filter | Sample | Merge | Harmonize | Map | Join | CutChips | Split | Folds | FilterChips | Select"
    " | FilterPixels | WithTable | Random"
)

_NODES = {
    c.__name__: c
    for c in (
        Source, Filter, Sample, Merge, Harmonize, Map, Join, CutChips, Split, Folds, FilterChips, Select,
        FilterPixels, WithTable, Random, HarmonizeSpec, ChipSpec, SplitSpec, Function, Rule, UtmGrid, CrsGrid, TileGrid,
        FileGrid, BoxGrid,
    )
}  # fmt: skip

_STEP_NAMES = {
    "CutChips": "chips",
    "FilterChips": "filter",
}  # where the API's word is not the class's in snake case


def children(node: Node) -> tuple[Node, ...]:
    """Return the nodes directly below."""
    if isinstance(node, Merge | Join):
        return node.children
    return () if isinstance(node, Source) else (node.child,)


def check_apart(node: Node, step: str) -> None:
    """Refuse to deal chips that overlap to splits or folds.

    Raises
    ------
    PlanError
        When the chips below cover an area.
    """
    while not isinstance(node, CutChips):
        if isinstance(node, Source | Merge | Join):
            return
        node = node.child
    if node.spec.cover:
        raise PlanError(
            step, f"chips({node.spec.size}, cover=True), whose windows overlap across split cells",
            "chips of split cells: ground that two splits share leaks from one into the other",
            "Split chips without cover=True, and train on these; predict on chips that cover, without a split.",
        )  # fmt: skip


Spec = TypeVar("Spec", HarmonizeSpec, ChipSpec, SplitSpec)


def changes(spec: Spec, default: Spec) -> dict[str, Any]:
    """Return {name: value} of the fields of a step's arguments that are not the default's, in the fields' order."""
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def spec_field(node: Node, field: str) -> Any:
    """Return a field of the outermost ``harmonize`` step of a plan that sets it, or None where none does."""
    value = getattr(node.spec, field) if isinstance(node, Harmonize) else None
    below = (spec_field(child, field) for child in children(node))
    return value if value is not None else next((one for one in below if one is not None), None)


def with_children(node: Node, below: tuple[Node, ...]) -> Node:
    """Return ``node`` over other children."""
    if isinstance(node, Merge | Join):
        return dataclasses.replace(node, children=below)
    return node if isinstance(node, Source) else dataclasses.replace(node, child=below[0])


def leaves(node: Node) -> Iterator[Source]:
    """Yield the sources, left to right."""
    if isinstance(node, Source):
        yield node
    for child in children(node):
        yield from leaves(child)


def is_filtered(node: Node, predicate: Predicate) -> bool:
    """Tell whether every record below has to fulfil a predicate already."""
    if isinstance(node, Source | Filter) and predicate in node.where:
        return True
    return bool(children(node)) and all(is_filtered(child, predicate) for child in children(node))


def without(node: Node, predicate: Predicate) -> Node:
    """Return a plan on records that does not ask for a predicate."""
    if isinstance(node, Source | Filter):
        node = dataclasses.replace(node, where=tuple(one for one in node.where if one != predicate))
    return with_children(node, tuple(without(child, predicate) for child in children(node)))


def near_area(spec: ChipSpec) -> Predicate | None:
    """Return what records must fulfil to matter for the chips of an area of interest; None: all may matter.

    Records beyond it take no part in the plan: not in the range of a time axis, not in a grid's phase. A chip
    that reaches into the area is at most a split cell long. Where degrees say little (near the poles and the
    antimeridian), or chips may be of any length (grids other than the zone's), no record is left out.
    """
    if spec.aoi is None or not spec.on_lattice:
        return None
    west, south, east, north = shapely.from_wkb(bytes.fromhex(spec.aoi)).bounds
    stretch = MAP_STRETCH if isinstance(spec.grid, CrsGrid) else 1.0
    wide_km = spec.cell_km + max((side for _, side in spec.context_m), default=0.0) / 1000.0
    lat = 0.05 + stretch * wide_km / KM_PER_DEGREE
    lon = 4 * lat  # 1 / cos(75.5 degrees)
    if max(abs(north), abs(south)) + lat > 75 or west - lon < -180 or east + lon > 180:
        return None
    return ("bbox", "near", (west - lon, south - lat, east + lon, north + lat))


def to_json(value: Any) -> Any:
    """Return a node, spec or rule as plain JSON values."""
    if isinstance(value, RuleValue):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_json(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if _is_written(value, f)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def _is_written(value: Any, field: dataclasses.Field[Any]) -> bool:
    return not ("later" in field.metadata and getattr(value, field.name) == field.default)


def from_json(value: Any) -> Any:
    """Return what :func:`to_json` made; lists become tuples."""
    if isinstance(value, dict) and "rule" in value:
        return rule_from_json(value)
    if isinstance(value, dict):
        fields = {k: from_json(v) for k, v in value.items() if k != "type"}
        return _NODES[value["type"]](**fields)
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    return value


def step_name(node: Node) -> str:
    """Return what a step is called in the API: ``"filter"``, ``"filter_pixels"``, ``"chips"``."""
    name = type(node).__name__
    return _STEP_NAMES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def predicates(parts: tuple[Any, ...], equal: Mapping[str, Any]) -> tuple[Predicate, ...]:
    """Check what the user gave to ``where`` or ``filter``: triples (or the three parts of one) and equalities.

    Raises
    ------
    PlanError
        When one is not (column, operator, value).
    """
    if len(parts) == 3 and all(isinstance(part, str) for part in parts[:2]):
        parts = (parts,)
    for triple in parts:
        if not (isinstance(triple, tuple) and len(triple) == 3 and triple[1] in OPERATORS):
            raise PlanError(
                "filter",
                repr(triple),
                f"a triple (column, operator, value), operator one of {', '.join(OPERATORS)}",
                'Write it as ("eo:cloud_cover", "<", 20).',
            )
    triples = [(column, op, plain(value)) for column, op, value in parts]
    return (*triples, *(_equal(column, value) for column, value in equal.items()))


def _equal(column: str, value: Any) -> Predicate:
    wanted = plain(value)
    return (column, "in" if isinstance(wanted, tuple) else "==", wanted)


def digest(*values: Any) -> str:
    """Return 32 hex digits of the sha256 of values' JSON: the same in every process."""
    text = json.dumps([to_json(v) for v in values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number of any library; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _required(require: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the sources that a join requires, in its order; None where these are all."""
    unknown = [name for name in require if name not in names]
    if unknown or not require:
        raise PlanError(
            "join(require=)", ", ".join(map(repr, unknown)) or "an empty list",
            f"one or several of {', '.join(names)}",
            "Name the sources that every chip must have, or leave require out: then these are all.",
        )  # fmt: skip
    own = tuple(name for name in names if name in require)
    return None if own == names else own


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        shown = ", ".join(repr(a) for a in allowed if a is not None)
        raise PlanError(f"{name}=", repr(value), f"one of {shown}")
