# SPDX-License-Identifier: Apache-2.0
"""A plan and its tables become sources whose records, bands, units, grid and time axis are settled."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.crs import text
from rasteret_dask.errors import BandError, EmptyError, GridError, PlanError, UnreadableAssetsError
from rasteret_dask.extent import unit_of
from rasteret_dask.grid import digits
from rasteret_dask.headers.nodata import INEXACT
from rasteret_dask.lists import first_of
from rasteret_dask.planning.bandkinds import BandKind, band_kinds, check_kernel, user_kinds, with_one_kind
from rasteret_dask.planning.bandpass import like_oli
from rasteret_dask.planning.calls import condition
from rasteret_dask.planning.chiptimes import ChipTimes
from rasteret_dask.planning.filechips import FileChips
from rasteret_dask.planning.meta import MASKED, Meta, with_meta
from rasteret_dask.planning.pixelsizes import alike, catalog_m, not_in_metres, pixels_m
from rasteret_dask.planning.plan import (
    LATER,
    STATIC,
    Filter,
    Function,
    Harmonize,
    HarmonizeSpec,
    Map,
    Merge,
    Node,
    Predicate,
    Sample,
    Source,
    step_name,
)
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.planning.scan import Table, filter_table, keep_whole, nothing_left, scan
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.rules.masks import QUALITY, Mask, quality_among, settled, words_of
from rasteret_dask.rules.picks import Closest, Pick, Scored, pick_named
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.units import UNITS, Raw, Unit, Units
from rasteret_dask.table.barehrefs import hosts_of, marked
from rasteret_dask.table.meanings import contradict, told_apart
from rasteret_dask.table.records import RECORD_SCHEMA, Records
from rasteret_dask.table.timing import Acquisitions, TimeAxis, acquisitions, intervals, narrowest, regular

__all__ = [
    "Member",
    "MemberTable",
    "ResolvedSource",
    "SourcePlan",
    "all_readable",
    "evaluate",
    "in_metres",
    "resolve_source",
]

MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Member:
    """One collection inside a merge."""

    name: str
    bands: tuple[str, ...]
    """The member's own code of each output band."""
    quality: tuple[str, ...] = ()
    """Its quality bands, as ``mask`` needs them; without one, the band by which acquisitions are scored."""
    mask: Mask | None = None
    """What hides its pixels."""
    clouds: Mask | None = None
    """What tells its clouds, where chips are dropped by them."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Every band that may be read, each once."""
        clouds = () if self.clouds is None else self.clouds.needs
        return tuple(dict.fromkeys((*self.bands, *self.quality, *clouds)))

    def hides(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where the mask hides, given the bands of ``quality``."""
        assert self.mask is not None
        return self.mask.hidden(*stored)


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Everything a task must know to make one source's pixels from records."""

    name: str
    members: tuple[Member, ...]
    bands: tuple[str, ...]
    """Names of the output bands."""
    rules: PixelRules
    """What the numbers of its bands mean."""
    resolution: float
    resampling: str | None
    masks: tuple[str, ...]
    """What is masked, in words."""
    slots: tuple[int, ...] | None
    """Start of each slot, ns since 1970 UTC; None: a chip is one acquisition."""
    maps: tuple[Function, ...] = ()
    kinds: tuple[BandKind, ...] = ()
    """Of each output band."""
    optional: bool = dataclasses.field(default=False, metadata=LATER)
    """Whether there are chips without it, as its join does not require it."""
    chip_slots: int = dataclasses.field(default=0, metadata=LATER)
    """How many slots each chip has of its own; 0: slots are the same for all chips, or there are none."""
    meta: Meta = dataclasses.field(default=(), metadata=LATER)
    """What chips carry of each slot beside its pixels."""
    by_file: bool = dataclasses.field(default=False, metadata=LATER)
    """Whether a chip's pixels are as large as those of its file: its bounds, divided by their number. ``resolution``
    then is that of the first file."""

    @property
    def sparse(self) -> bool:
        """Whether ``present`` tells which slots of which chips have a record."""
        return self.optional or self.chip_slots > 0

    @property
    def dtype(self) -> str:
        """NumPy name of the output's type."""
        return self.rules.store.dtype

    @property
    def fill(self) -> Any:
        """What invalid pixels hold, of the output's type; NaN for floats."""
        return self.rules.store.fill_value

    @property
    def units(self) -> tuple[str, ...]:
        """Per band, the name of its unit."""
        return tuple(unit.name for unit in self.rules.units)

    @property
    def unit(self) -> str:
        """The unit of all bands; "" where they differ."""
        return self.units[0] if len(set(self.units)) == 1 else ""

    @property
    def pick(self) -> Pick:
        """How the pixels of a slot are chosen; without a time axis there is nothing to choose."""
        return self.rules.pick

    @property
    def times(self) -> int:
        """Length of the time dimension."""
        return self.chip_slots or (1 if self.slots is None else len(self.slots))


@dataclass(frozen=True)
class MemberTable:
    """The records of one leaf of the plan, with what the steps above it ask for."""

    name: str
    table: pa.Table
    spec: HarmonizeSpec
    where: tuple[Any, ...]
    maps: tuple[Function, ...] = ()
    unreadable: int = 0
    """Records that ``where(readable=True)`` or ``where(has_bands=...)`` left out."""
    wanted: tuple[str, ...] | None = None
    """The bands that the steps above need; None: all."""
    why: str = ""
    """Why predicates leave no record, where they leave none."""


@dataclass(frozen=True)
class SourceRecords:
    """Records of a source that is settled."""

    plan: SourcePlan
    records: Records
    """Of all members, one behind the other."""
    member: NDArray[np.int64]
    """Shape (record,). Which member each record belongs to."""


@dataclass(frozen=True)
class ResolvedSource(SourceRecords):
    """One source with its records, and when they were taken."""

    passes: Acquisitions
    axis: TimeAxis | None
    unreadable: int = 0
    """Records that ``where(readable=True)`` or ``where(has_bands=...)`` left out."""
    native: bool = False
    """Whether the pixel size is that of the first member's files, in units of their CRS: nobody says another."""
    tolerance: np.timedelta64 | None = None
    """How far an interval may lie that stands in where none holds a moment; None: intervals have slots of their own."""
    chip_times: ChipTimes | None = None
    """Which slots each chip has of its own; None: all share ``axis``, or there are no slots."""

    files: FileChips | None = None
    """Which chips its records are files of; None: nobody says."""

    @property
    def has_slots(self) -> bool:
        """Whether chips have slots; else each is one acquisition."""
        return self.axis is not None or self.has_own_slots

    @property
    def has_own_slots(self) -> bool:
        """Whether each chip has slots of its own."""
        by_file = self.axis is None and self.files is not None and self.files.slot is not None
        return self.chip_times is not None or by_file

    @property
    def is_static(self) -> bool:
        """Whether all of its records hold at any time."""
        return self.passes.is_static

    def check_chipless(self, step: str) -> None:
        """Raise a PlanError where slots hang on chips' own dates, and a step has no chips."""
        if self.chip_times is not None and self.chip_times.edges:
            raise PlanError(
                f"{step} of source {self.plan.name!r}", f"time={list(self.chip_times.edges)}: dates of each chip",
                "slots that are the same everywhere",
                "Take chips(size, at=...), or say harmonize(time='1MS').",
            )  # fmt: skip

    @property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """When its records are, half-open."""
        return self.passes.record_start.min(), self.passes.record_end.max() + np.timedelta64(1, "us")

    @cached_property
    def id_rank(self) -> NDArray[np.int64]:
        """Shape (record,). Place of each record's id in alphabetical order; equal ids of two members by member."""
        order = np.lexsort((self.member, np.array(self.records.ids)))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return rank


def evaluate(node: Node, tables: Mapping[str, Table]) -> list[MemberTable]:
    """Carry out the steps that choose records, and gather what the others ask for."""
    match node:
        case Source():
            table = told_apart(scan(node, tables))
            why = "" if len(table) else nothing_left(tables[node.token], node.where, node.name)
            member = MemberTable(node.name, table, HarmonizeSpec(), node.where, wanted=node.bands, why=why)
            return [_readable_only(member, node.where)]
        case Filter(child, where):
            return [_readable_only(_filtered(m, where), where) for m in evaluate(child, tables)]
        case Sample(child, n, seed, by):
            return _sampled(evaluate(child, tables), n, seed, by)
        case Merge(below):
            found = [m for child in below for m in evaluate(child, tables)]
            names = [m.name for m in found]
            if len(set(names)) != len(names):
                raise PlanError("merge", f"members {', '.join(names)}", "a name of its own for each member")
            return found
        case Harmonize(child, spec):
            return [dataclasses.replace(m, spec=m.spec.under(spec)) for m in evaluate(child, tables)]
        case Map(child, function):
            return [dataclasses.replace(m, maps=(*m.maps, function)) for m in evaluate(child, tables)]
    raise PlanError(
        "plan", f"a {step_name(node)} below another step on records", "steps on records",
        "Harmonize, subset and merge each source before join.",
    )  # fmt: skip


def _filtered(member: MemberTable, where: tuple[Predicate, ...]) -> MemberTable:
    table = filter_table(member.table, where, member.name)
    why = (
        member.why if len(table) or not len(member.table) else nothing_left(member.table, where, member.name)
    )
    return dataclasses.replace(member, table=table, where=member.where + where, why=why)


def _readable_only(member: MemberTable, where: Sequence[Predicate]) -> MemberTable:
    table = keep_whole(member.table, where, member.wanted)
    lost = member.table.num_rows - table.num_rows
    return dataclasses.replace(member, table=table, unreadable=member.unreadable + lost)


def _sampled(members: list[MemberTable], n: int, seed: int, by: str | None) -> list[MemberTable]:
    for m in members:
        if by is not None and by not in m.table.column_names:
            known = ", ".join(m.table.column_names)
            raise PlanError("sample(by=)", repr(by), f"a column of {m.name!r}: {known}")
    keys = [m.table.select(["id"] if by in (None, "id") else ["id", by]) for m in members]
    rows = sample_rows(pa.concat_tables(keys), "id", n, seed, by)
    first = 0
    chosen = []
    for member in members:
        own = rows[(rows >= first) & (rows < first + member.table.num_rows)] - first
        chosen.append(dataclasses.replace(member, table=member.table.take(pa.array(own))))
        first += member.table.num_rows
    return chosen


def resolve_source(name: str, members: list[MemberTable]) -> ResolvedSource:
    """Settle one source.

    Raises
    ------
    PlanError
        When the selection is empty, or members differ in what cannot differ inside one source.
    BandError
        When a member lacks a band.
    UnreadableAssetsError
        When needed assets have no readable header; lists all of them.
    """
    _not_empty(name, members)
    spec = _common(name, "harmonize", [m.spec for m in members])
    maps = _common(name, "map", [m.maps for m in members])
    unreadable = sum(m.unreadable for m in members)
    members = [m for m in members if m.table.num_rows]
    tables = [Records(table) for table in user_kinds([m.table for m in members], spec)]
    bands = spec.bands or _default_bands(name, tables)
    resolved = tuple(_member(m, r, bands, spec) for m, r in zip(members, tables, strict=True))
    codes = [m.bands for m in resolved]
    kinds = band_kinds(name, tables, codes, bands)
    tables = [Records(table) for table in with_one_kind([r.table for r in tables], codes, kinds)]
    check_kernel(name, spec.resampling, kinds)
    _same_meaning(name, bands, tables, resolved)
    all_readable(tables, resolved)
    for table, one in zip(tables, resolved, strict=True):
        alike(one.name, table, one.bands)
    rules = _rules(name, spec, bands, kinds, tables, resolved)
    _check_pixels(
        name, bands, rules, [_distinct(tables, resolved, "dtype", band) for band in range(len(bands))]
    )
    tables = like_oli(name, bands, rules.units, tables, [m.bands for m in resolved])
    hosts = [host for r in tables for host in hosts_of(r.table.schema) or ()]
    meta, plain = with_meta(
        name, spec.meta or (), [m.table for m in members], [_plain(r.table) for r in tables]
    )
    if spec.mask is None and MASKED in dict(meta):
        raise PlanError(
            f"harmonize(meta={MASKED!r}) of source {name!r}", "no mask", "a mask, whose share it is",
            f"Say harmonize(mask='clouds', meta=[{MASKED!r}]).",
        )  # fmt: skip
    records = Records(marked(pa.concat_tables(plain), hosts))
    passes = acquisitions(records, spec.time == STATIC)
    _one_scale(name, bands, rules, tables, resolved, passes)
    chip_times = ChipTimes.of(name, spec)
    if chip_times is not None and passes.is_static:
        raise PlanError(
            f"harmonize(time={spec.time!r}) of source {name!r}", "records that hold at any time",
            "acquisitions, each with a time of its own", "Say time='static': one slot.",
        )  # fmt: skip
    files = FileChips.of(name, spec, [m.table for m in members])
    if files is not None and files.slot is not None:
        axis = files.axis
    else:
        axis = None if chip_times is not None else _axis(name, spec, members, passes)
    if axis is None and chip_times is None and rules.composes:
        raise PlanError(f"harmonize(pick={rules.pick.name!r}) of source {name!r}", "no time=: one acquisition a chip",
                        "slots with several acquisitions", "Add time=, such as time='1MS'.")  # fmt: skip
    plan = SourcePlan(
        name=name,
        members=resolved,
        bands=bands,
        rules=rules,
        resolution=spec.resolution or _native_resolution(tables[0], resolved[0]),
        resampling=spec.resampling,
        masks=words_of(spec.mask),
        slots=None if axis is None else tuple(int(t) for t in axis.start.astype(np.int64)),
        maps=maps,
        kinds=kinds,
        chip_slots=files.times if files is not None and axis is None else 0,
        meta=meta,
    )
    member = np.repeat(np.arange(len(tables)), [len(r) for r in tables])
    tolerance = _tolerance(name, spec, passes)
    return ResolvedSource(
        plan, records, member, passes, axis, unreadable, spec.resolution is None, tolerance, chip_times, files
    )


def in_metres(source: ResolvedSource, step: str) -> ResolvedSource:
    """Return a source whose pixel size is in metres, for windows on a map that counts in them.

    Where the files count in degrees or feet and nobody says a size, it is the catalog's, else the items' ``gsd``.

    Parameters
    ----------
    source
        The source.
    step
        What wants it, for messages.

    Raises
    ------
    GridError
        When nothing tells how many metres a pixel has.
    """
    if not source.native:
        return source
    rows = not_in_metres(source.records)
    rows = rows[source.member[rows] == 0]
    if not len(rows):
        return source
    plan, row = source.plan, int(rows[0])
    bands = plan.members[source.member[row]].bands
    size = catalog_m(source.records, bands)
    if size is None:
        about = float(pixels_m(source.records, bands[0])[row])
        raise GridError(
            f"{step} over record {source.records.ids[row]!r} of {plan.name!r}",
            f"pixels of {plan.resolution:g} {unit_of(int(source.records.epsg[row]))} "
            f"({text(int(source.records.epsg[row]))})",
            "a pixel size in metres",
            f"Set it by harmonize(resolution=...); pixels of the files are about {about:.3g} m wide at the equator.",
        )
    return dataclasses.replace(source, plan=dataclasses.replace(plan, resolution=size), native=False)


def _plain(table: pa.Table) -> pa.Table:
    return table.select(RECORD_SCHEMA.names)


def _not_empty(name: str, members: list[MemberTable]) -> None:
    if any(m.table.num_rows for m in members):
        return
    reasons = "; ".join(f"{m.name}: {m.why or _unreadable(m)}" for m in members)
    remedy = "Change the area, the dates or the filters: each of them has to leave a record."
    raise EmptyError(f"source {name!r}", f"no record left ({reasons})", "at least one", remedy)


def _unreadable(member: MemberTable) -> str:
    asked = next((condition(p) for p in member.where if p[0] in ("has_bands", "readable")), "a sample")
    return f"{asked} leaves none" + (f" of {member.unreadable:,} records" if member.unreadable else "")


def _common(name: str, step: str, values: Sequence[Any]) -> Any:
    if all(f == values[0] for f in values):
        return values[0]
    shown = " and ".join(str(f) for f in dict.fromkeys(values))
    raise PlanError(
        f"{step} in the members of source {name!r}",
        shown,
        "the same for every member",
        f"Put {step} after merge.",
    )


def _default_bands(name: str, tables: list[Records]) -> tuple[str, ...]:
    """Return the bands that every record has: by common name where members call them differently."""
    held: list[dict[str, tuple[str | None, int]]] = []
    for records in tables:
        held.append({})
        for band in records.bands:
            if "quality" not in records.distinct(band, "role"):
                commons = [c for c in records.distinct(band, "common_name") if c]
                count = len(records) - records.asset_field(band, "href").null_count
                held[-1][band] = (commons[0] if commons else None, count)
    first = held[0]
    if not first:
        raise PlanError(f"source {name!r}", "records without any band", "assets that are rasters")
    whole = [
        {b: c for b, (c, count) in own.items() if count == len(r)}
        for own, r in zip(held, tables, strict=True)
    ]
    if len(tables) == 1:
        shared = list(whole[0])
    else:
        shared = [c for c in whole[0].values() if c and all(c in own.values() for own in whole[1:])]
        shared = shared or [b for b in whole[0] if all(b in own for own in whole[1:])]
    if not shared:
        total = sum(map(len, tables))
        counts: Counter[str] = Counter()
        for own in held:
            for band, (common, count) in own.items():
                counts[common or band] += count
        shown = ", ".join(f"{band} in {count}" for band, count in counts.most_common(MAX_LISTED))
        raise PlanError(
            f"bands of source {name!r}", f"none that all {total} records have ({shown})", "harmonize(bands=[...])",
            "Choose bands, and the records that have them: .where(has_bands=[...]).harmonize(bands=[...]).",
        )  # fmt: skip
    return tuple(shared)


def _same_meaning(
    name: str, bands: tuple[str, ...], tables: list[Records], members: tuple[Member, ...]
) -> None:
    """Raise BandError where a code, which is no common name, means different bands in the members of a merge."""
    for at, band in enumerate(bands):
        commons = {
            m.name: {c for c in r.distinct(m.bands[at], "common_name") if c}
            for m, r in zip(members, tables, strict=True)
        }
        every = set().union(*commons.values())
        if contradict(every) and band not in every:
            shown = "; ".join(f"{', '.join(sorted(own)) or 'unknown'} in {m!r}" for m, own in commons.items())
            raise BandError(
                f"band {band!r} of source {name!r}", f"a code that means several bands: {shown}", "one band",
                f"Ask by common name: {' or '.join(map(repr, sorted(every)))}.",
            )  # fmt: skip


def _member(member: MemberTable, records: Records, bands: tuple[str, ...], spec: HarmonizeSpec) -> Member:
    codes = _codes(member, records, bands)
    mask = settled(spec.mask, records.bands)
    if mask is None and spec.mask is not None:
        raise PlanError(
            f"harmonize(mask=) for {member.name!r}",
            f"bands {', '.join(records.bands)}",
            f"a band {', '.join(q.band for q in QUALITY)}",
            "Build the collection with its quality band, give a mask of your own, or leave mask out.",
        )
    if mask is not None:
        return Member(member.name, codes, _codes(member, records, mask.needs), mask)
    quality = quality_among(records.bands) if isinstance(spec.pick, Scored) else None
    return Member(member.name, codes, () if quality is None else (quality.band,))


def _codes(member: MemberTable, records: Records, bands: Sequence[str]) -> tuple[str, ...]:
    """Return the member's own code of each band."""
    try:
        return tuple(records.band_names(b)[""] for b in bands)
    except BandError as error:
        raise BandError(
            f"{error.subject} of {member.name!r}", error.found, error.expected, error.remedy
        ) from error


def all_readable(tables: list[Records], members: tuple[Member, ...]) -> None:
    """Raise UnreadableAssetsError where the header of an asset that members read is not known."""
    bad: list[str] = []
    for records, member in zip(tables, members, strict=True):
        reads = member.reads
        missing = pc.is_null(records.asset_fields(reads, "href")).to_numpy()
        reasons = records.asset_fields(reads, "error")
        unknown = pc.is_null(records.level_fields(reads, "width")).to_numpy()
        for at in np.flatnonzero(missing | unknown | pc.is_valid(reasons).to_numpy()).tolist():
            band, row = divmod(at, len(records))
            why = "no such asset" if missing[at] else reasons[at].as_py() or "no cached header"
            bad.append(f"{records.ids[row]}/{reads[band]} ({why})")
    if bad:
        raise UnreadableAssetsError(
            "assets that the plan needs",
            f"{len(bad)} unreadable: {first_of(bad, MAX_LISTED)}",
            "headers read while the table was built",
            "Leave their records out with .where(readable=True) or .where(has_bands=[...]), or build the table again.",
        )


def _rules(
    name: str,
    spec: HarmonizeSpec,
    bands: tuple[str, ...],
    band_kinds: tuple[BandKind, ...],
    tables: list[Records],
    members: tuple[Member, ...],
) -> PixelRules:
    """Settle what the numbers of a source mean.

    Raises
    ------
    PlanError
        When units and dtype do not fit each other or the bands, or numbers of several scales would be mixed.
    """
    kinds, units = [], []
    for at, band in enumerate(bands):
        own = [(records, member.bands[at]) for records, member in zip(tables, members, strict=True)]
        kind = band_kinds[at].kind
        names = {band, *(code for _, code in own)}
        names |= {v for f in ("common_name", "asset") for v in _values(own, f) if v}
        scalings = {(1.0 if s is None else s, o or 0.0) for s, o in _pairs(own, "scale", "offset")}
        unit = (spec.units or Units(Raw())).of(names, kind_of(kind), scalings == {(1.0, 0.0)})
        kinds.append(kind)
        units.append(unit)
        _unit_fits(name, band, kind, unit)
    _known_bands(name, spec.units, bands, tables, members)
    pick = pick_named(spec.pick or Closest(), spec.fill)
    store = _store(name, spec, bands, kinds, units, tables, members)
    return PixelRules(tuple(units), tuple(kinds), pick, store)


_BandRecords: TypeAlias = "list[tuple[Records, str]]"
"""Each member's records, and its own code of a band."""


def _values(band_records: _BandRecords, field: str) -> set[Any]:
    """Return the distinct values of a field over all records of a band."""
    return {v for records, code in band_records for v in records.distinct(code, field)}


def _pairs(band_records: _BandRecords, *fields: str) -> set[tuple[Any, ...]]:
    """Return the distinct values of some fields together."""
    return {
        pair
        for records, code in band_records
        for pair in zip(*(records.asset_values(code, f) for f in fields), strict=True)
    }


def _unit_fits(name: str, band: str, kind: str | None, unit: Unit) -> None:
    """Raise PlanError where a unit makes no sense for a band."""
    if not unit.fits(kind_of(kind)):
        raise PlanError(
            f"harmonize(units={unit.name!r}) of source {name!r}", f"band {band!r}, of kind {kind}",
            f"bands that can be in {unit.name}",
            f"Say units='physical', or units by band without {band!r}, or join it as a source of its own.",
        )  # fmt: skip


def _known_bands(
    name: str, units: Units | None, bands: tuple[str, ...], tables: list[Records], members: tuple[Member, ...]
) -> None:
    """Raise PlanError where units are said of a band that the source does not have."""
    if units is None or not units.bands:
        return
    known = set(bands)
    for records, member in zip(tables, members, strict=True):
        known.update(member.bands)
        for code in member.bands:
            known |= {v for f in ("common_name", "asset") for v in _values([(records, code)], f) if v}
    unknown = [band for band, _ in units.bands if band not in known]
    if unknown:
        raise PlanError(
            f"harmonize(units=) of source {name!r}", f"no band {', '.join(map(repr, unknown))}",
            f"bands of the source: {', '.join(bands)}",
        )  # fmt: skip


def _store(
    name: str,
    spec: HarmonizeSpec,
    bands: tuple[str, ...],
    kinds: Sequence[str | None],
    units: Sequence[Unit],
    tables: list[Records],
    members: tuple[Member, ...],
) -> StoredForm:
    """Return the stored form of a source's values."""
    raw = [isinstance(unit, Raw) for unit in units]
    if all(raw):
        if spec.dtype is not None:
            raise PlanError(
                f"harmonize(dtype={spec.dtype!r}) of source {name!r}", "raw units",
                "a unit that can be stored so, such as units='reflectance'",
            )  # fmt: skip
        return _raw_store(name, tables, members)
    dtype = np.dtype(spec.dtype or "float32")
    if dtype.kind == "f":
        for at, own in enumerate(raw):
            stored = {np.dtype(d) for d in _distinct(tables, members, "dtype", at) if d} if own else set()
            if any(not np.can_cast(d, dtype) for d in stored):
                types = ", ".join(sorted(d.name for d in stored))
                raise PlanError(
                    f"source {name!r}",
                    f"band {bands[at]!r} of {types}, raw, beside {dtype.name} values",
                    f"numbers that {dtype.name} holds exactly",
                    "Join it as a source of its own.",
                )  # fmt: skip
        return StoredForm(dtype.name, None)
    if len({unit.name for unit in units}) > 1:
        shown = ", ".join(f"{band} in {unit.name}" for band, unit in zip(bands, units, strict=True))
        raise PlanError(
            f"harmonize(dtype={dtype.name!r}) of source {name!r}", f"bands of several units: {shown}",
            "one unit for all bands of an integer output",
            f"Join them as sources of their own: {_joined(bands, units, dtype.name)}",
        )  # fmt: skip
    steps = units[0].steps
    if steps is None or not units[0].elementwise:
        raise PlanError(
            f"harmonize(dtype={dtype.name!r}) of source {name!r}", f"values in {units[0].name}",
            "float32: there is no usual integer form of them", "Leave dtype out.",
        )  # fmt: skip
    limits = np.iinfo(dtype)
    return StoredForm(dtype.name, int(limits.max if dtype.kind == "u" else limits.min), steps)


def _joined(bands: Sequence[str], units: Sequence[Unit], dtype: str) -> str:
    """Return the line that makes a source of the bands of each unit; ``source`` stands for the collection."""
    parts = []
    for unit in dict.fromkeys(units):
        own = [band for band, other in zip(bands, units, strict=True) if other == unit]
        form = f", dtype={dtype!r}" if unit.steps is not None and unit.elementwise else ""
        word = repr(unit.name) if isinstance(unit, type(UNITS.get(unit.name))) else str(unit)
        parts.append(f"{unit.name}=source.harmonize({own!r}, units={word}{form})")
    return f"rd.join({', '.join(parts)})"


def _raw_store(name: str, tables: list[Records], members: tuple[Member, ...]) -> StoredForm:
    dtype = _common_dtype(name, _distinct(tables, members, "dtype"))
    if dtype.kind in "fc":
        return StoredForm(dtype.name, None)
    nodata = {
        v
        for records, member in zip(tables, members, strict=True)
        for band in member.bands
        for v in records.nodata_of(band)
        if v is not None
    }
    limits = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
    value = next(iter(nodata)) if len(nodata) == 1 else 0
    return StoredForm(dtype.name, int(value) if limits.min <= value <= limits.max else 0)


def _one_scale(
    name: str,
    bands: tuple[str, ...],
    rules: PixelRules,
    tables: list[Records],
    members: tuple[Member, ...],
    passes: Acquisitions,
) -> None:
    """Raise PlanError where raw numbers of several scales would be mixed in one output.

    Merged members, composites and fills mix all records; without them those of one acquisition fill each other.
    """
    mixed = len(tables) > 1 or rules.composes or rules.pick.fills
    for at, (band, unit) in enumerate(zip(bands, rules.units, strict=True)):
        if not isinstance(unit, Raw) or rules.kind(at).is_coded:
            continue
        scales = [
            (1.0 if scale is None else scale, offset or 0.0)
            for records, member in zip(tables, members, strict=True)
            for scale, offset in zip(
                *(records.asset_values(member.bands[at], f) for f in ("scale", "offset")),
                strict=True,
            )
        ]
        several = set(scales)
        if not mixed:
            own: dict[int, set[tuple[float, float]]] = {}
            for number, scale in zip(passes.of_record.tolist(), scales, strict=True):
                own.setdefault(number, set()).add(scale)
            several = next((s for number, s in own.items() if number >= 0 and len(s) > 1), set())
        if len(several) > 1:
            shown = ", ".join(f"{s} x DN + {o}" for s, o in sorted(several))
            raise PlanError(
                f"raw values of {'merged ' if len(tables) > 1 else ''}source {name!r}, band {band!r}",
                f"different radiometry: {shown}",
                "one scale and offset",
                "Use harmonize(units='physical'), which scales each record by its own.",
            )


def _common_dtype(name: str, dtypes: set[str]) -> np.dtype[Any]:
    """Return the type that holds the numbers of all bands; PlanError where 64-bit integers would be rounded."""
    dtype = np.result_type(*(np.dtype(d) for d in dtypes))
    if dtype.kind in "fc" and dtypes & INEXACT:
        raise PlanError(
            f"raw values of source {name!r}",
            f"bands of {', '.join(sorted(dtypes))}",
            f"one type that holds all of their numbers ({dtype} rounds integers beyond 2**53)",
            "Take them as sources of their own and join them: rd.join(a=..., b=...).",
        )
    return dtype


def _check_pixels(
    name: str, bands: tuple[str, ...], rules: PixelRules, dtypes: Sequence[Collection[str]]
) -> None:
    """Raise a PlanError where units or a composite would lose what a band's pixels say; ``dtypes`` are per band."""
    unordered = {d for of_band in dtypes for d in of_band if np.dtype(d).kind == "c"}
    if unordered and not all(isinstance(unit, Raw) for unit in rules.units):
        raise PlanError(
            f"units of source {name!r}", f"pixels of {', '.join(sorted(unordered))}", "real numbers",
            "Use units='raw', and map() for what is made of complex numbers.",
        )  # fmt: skip
    if not rules.composes:
        return
    for band, (title, of_band) in enumerate(zip(bands, dtypes, strict=True)):
        lost = unordered.intersection(of_band)
        if not rules.composite(band).chooses:  # what is chosen keeps its type
            lost |= INEXACT.intersection(of_band)
        if lost:
            raise PlanError(
                f"harmonize(pick={rules.pick.name!r}) of source {name!r}",
                f"band {title!r}: pixels of {', '.join(sorted(lost))}",
                "real numbers that floats hold",
                "Choose a pick that takes pixels as they are, such as 'closest' or 'clearest'; where the numbers are "
                f"classes, say so: harmonize(kinds={{{title!r}: 'class'}}).",
            )


def _distinct(
    tables: list[Records], members: tuple[Member, ...], field: str, at: int | None = None
) -> set[Any]:
    return {
        value
        for records, member in zip(tables, members, strict=True)
        for band in (member.bands if at is None else member.bands[at : at + 1])
        for value in records.distinct(band, field)
    }


def _native_resolution(records: Records, member: Member) -> float:
    """Return the finest pixel size among the bands, over the records of the first member.

    Of pixels that are no squares it is the shorter side: chips lose nothing of what they show.
    """
    finest = np.inf
    for band in dict.fromkeys(member.bands):
        transform = records.level_field(band, "transform")
        pixel = np.sort(np.abs(np.stack(transform.to_numpy())[:, [0, 4]]).min(axis=1))
        near = np.round(pixel, digits(pixel[0]))
        _, first, counts = np.unique(near, return_index=True, return_counts=True)
        value = float(pixel[first[np.argmax(counts)]])
        short = round(value, 6)  # 10.0 for 9.999999999999998, but 1/3600 of a degree stays what it is
        finest = min(finest, short if abs(short - value) <= 1e-9 * value else value)
    return finest


def _tolerance(name: str, spec: HarmonizeSpec, passes: Acquisitions) -> np.timedelta64 | None:
    if spec.tolerance is None:
        return None
    subject = f"harmonize(tolerance={spec.tolerance!r}) of source {name!r}"
    if not bool(passes.is_interval.all()):
        raise PlanError(
            subject, "records of instants", "records that are intervals, such as land cover of a year each",
            "Instants compete for slots: harmonize(time='1MS'), without tolerance.",
        )  # fmt: skip
    try:
        length = pd.Timedelta(spec.tolerance)
    except ValueError as error:
        raise PlanError(subject, str(error), "a length of time such as '400D'") from error
    if pd.isna(length) or length < pd.Timedelta(0):
        raise PlanError(subject, str(length), "a length of time such as '400D'")
    return length.to_timedelta64()


def _axis(
    name: str, spec: HarmonizeSpec, members: list[MemberTable], passes: Acquisitions
) -> TimeAxis | None:
    if passes.is_static:
        return intervals([passes])
    if spec.time is None:
        return None
    assert isinstance(spec.time, str)
    if bool(passes.is_interval.all()) and len(passes.start):
        return intervals([passes])
    start, end = _range(members)
    own = passes.record_start[passes.of_record >= 0]
    first = pd.Timestamp(own.min()).tz_localize("UTC")
    last = pd.Timestamp(own.max()).tz_localize("UTC") + pd.Timedelta(1, "us")
    return regular(spec.time, start if start is not None else first, end if end is not None else last)


def _range(members: list[MemberTable]) -> tuple[pd.Timestamp | None, pd.Timestamp | None]:
    """Return the range asked for: the narrowest of each member, all members' together; None: not said."""
    own = [[p[2] for p in m.where if p[1] == "overlaps"] for m in members]
    said = [narrowest(ranges) for ranges in own if ranges]
    starts, ends = [a for a, _ in said if a is not None], [b for _, b in said if b is not None]
    whole = len(said) if said else 1
    return min(starts) if len(starts) == whole else None, max(ends) if len(ends) == whole else None
