"""A plan and its tables become sources whose records, bands, units, grid and time axis are settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import BandError, PlanError, UnreadableAssetsError
from rasteret_dask.grid import digits
from rasteret_dask.planning.pixelsizes import alike
from rasteret_dask.planning.plan import (
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
)
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.planning.scan import Table, filter_table, keep_readable, scan
from rasteret_dask.table.barehrefs import hosts_of, marked
from rasteret_dask.table.records import RECORD_SCHEMA, Records
from rasteret_dask.table.timing import Acquisitions, TimeAxis, acquisitions, intervals, narrowest, regular

__all__ = [
    "Member",
    "MemberTable",
    "ResolvedSource",
    "SourcePlan",
    "all_readable",
    "evaluate",
    "quality_band",
    "resolve_source",
]

MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Member:
    """One collection inside a merge."""

    name: str
    bands: tuple[str, ...]
    """The member's own code of each output band."""
    quality: str | None
    """Its quality band, where a mask or ``clearest`` asks for one."""
    quality_kind: str | None
    """``"scl"`` or ``"qa_pixel"``."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Everything a task must know to make one source's pixels from records."""

    name: str
    members: tuple[Member, ...]
    bands: tuple[str, ...]
    """Names of the output bands."""
    units: str
    """``"raw"``, ``"reflectance"`` or ``"embedding"``."""
    dtype: str
    """NumPy name of the output's type."""
    fill: float
    """Value of invalid pixels; NaN for floats."""
    resolution: float
    resampling: str | None
    mask: tuple[str, ...]
    pick: str
    slots: tuple[int, ...] | None
    """Start of each slot, ns since 1970 UTC; None: a chip is one acquisition."""
    maps: tuple[Function, ...] = ()

    @property
    def times(self) -> int:
        """Length of the time dimension."""
        return 1 if self.slots is None else len(self.slots)


@dataclass(frozen=True)
class MemberTable:
    """The records of one leaf of the plan, with what the steps above it ask for."""

    name: str
    table: pa.Table
    spec: HarmonizeSpec
    where: tuple[Any, ...]
    maps: tuple[Function, ...] = ()
    unreadable: int = 0
    """Records that ``where(readable=True)`` left out."""


@dataclass(frozen=True)
class ResolvedSource:
    """One source with its records."""

    plan: SourcePlan
    records: Records
    """Of all members, one behind the other."""
    member: NDArray[np.int64]
    """Shape (record,). Which member each record belongs to."""
    passes: Acquisitions
    axis: TimeAxis | None
    unreadable: int = 0
    """Records that ``where(readable=True)`` left out."""

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
            member = MemberTable(node.name, scan(node, tables), HarmonizeSpec(), node.where)
            return [_readable_only(member, node.where)]
        case Filter(child, where):
            found = [
                dataclasses.replace(m, table=filter_table(m.table, where, m.name), where=m.where + where)
                for m in evaluate(child, tables)
            ]
            return [_readable_only(m, where) for m in found]
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
        "plan", f"a {type(node).__name__.lower()} below another step on records", "steps on records",
        "Harmonize, subset and merge each source before join.",
    )  # fmt: skip


def _readable_only(member: MemberTable, where: Sequence[Predicate]) -> MemberTable:
    table = keep_readable(member.table, where)
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
    tables = [Records(m.table) for m in members if m.table.num_rows]
    members = [m for m in members if m.table.num_rows]
    bands = spec.bands or _default_bands(name, tables)
    resolved = tuple(_member(m, r, bands, spec) for m, r in zip(members, tables, strict=True))
    all_readable(tables, resolved)
    for table, one in zip(tables, resolved, strict=True):
        alike(one.name, table, one.bands)
    units, dtype, fill = _values(name, spec, tables, resolved)
    hosts = [host for r in tables for host in hosts_of(r.table.schema) or ()]
    records = Records(marked(pa.concat_tables([_plain(r.table) for r in tables]), hosts))
    passes = acquisitions(records)
    axis = _axis(name, spec, members, passes)
    if axis is None and spec.pick in ("mean", "median"):
        raise PlanError(f"harmonize(pick={spec.pick!r}) of source {name!r}", "no time=: one acquisition a chip",
                        "slots with several acquisitions", "Add time=, such as time='1MS'.")  # fmt: skip
    plan = SourcePlan(
        name=name,
        members=resolved,
        bands=bands,
        units=units,
        dtype=dtype,
        fill=fill,
        resolution=spec.resolution or _native_resolution(tables[0], resolved[0]),
        resampling=spec.resampling,
        mask=spec.mask or (),
        pick=spec.pick or "closest",
        slots=None if axis is None else tuple(int(t) for t in axis.start.astype(np.int64)),
        maps=maps,
    )
    member = np.repeat(np.arange(len(tables)), [len(r) for r in tables])
    return ResolvedSource(plan, records, member, passes, axis, unreadable)


def _plain(table: pa.Table) -> pa.Table:
    return table.select(RECORD_SCHEMA.names)


def _not_empty(name: str, members: list[MemberTable]) -> None:
    if any(m.table.num_rows for m in members):
        return
    filters = "; ".join(f"{m.name}: {m.where or 'no filter'}" for m in members)
    raise PlanError(f"source {name!r}", f"no record left ({filters})", "at least one", "Loosen the filters.")


def _common(name: str, step: str, found: Sequence[Any]) -> Any:
    if all(f == found[0] for f in found):
        return found[0]
    shown = " and ".join(str(f) for f in dict.fromkeys(found))
    raise PlanError(
        f"{step} in the members of source {name!r}",
        shown,
        "the same for every member",
        f"Put {step} after merge.",
    )


def _default_bands(name: str, tables: list[Records]) -> tuple[str, ...]:
    def of(records: Records) -> list[tuple[str, str | None]]:
        found = []
        for band in records.bands:
            roles = pc.unique(records.asset_field(band, "role")).to_pylist()
            if "quality" not in roles:
                common = [c for c in pc.unique(records.asset_field(band, "common_name")).to_pylist() if c]
                found.append((band, common[0] if common else None))
        return found

    first = of(tables[0])
    if not first:
        raise PlanError(f"source {name!r}", "records without any band", "assets that are rasters")
    if len(tables) == 1:
        return tuple(band for band, _ in first)
    shared = [c for _, c in first if c and all(c in {n for _, n in of(t)} for t in tables[1:])]
    same = [b for b, _ in first if all(b in {n for n, _ in of(t)} for t in tables[1:])]
    if not (shared or same):
        raise PlanError(f"source {name!r}", "members without a common band", "harmonize(bands=[...])")
    return tuple(shared or same)


def _member(member: MemberTable, records: Records, bands: tuple[str, ...], spec: HarmonizeSpec) -> Member:
    try:
        codes = tuple(records.band_names(b)[""] for b in bands)
    except BandError as error:
        raise BandError(
            f"{error.subject} of {member.name!r}", error.found, error.expected, error.remedy
        ) from error
    if not (spec.mask or spec.pick == "clearest"):
        return Member(member.name, codes, None, None)
    quality, kind = quality_band(records)
    if quality is None and spec.mask:
        raise PlanError(
            f"harmonize(mask=) for {member.name!r}",
            f"bands {', '.join(records.bands)}",
            "a band SCL or qa_pixel",
            "Build the collection with its quality band, or leave mask out.",
        )
    return Member(member.name, codes, quality, kind)


def quality_band(records: Records) -> tuple[str | None, str | None]:
    """Return the name of a member's quality band, and its kind: ``"scl"`` or ``"qa_pixel"``; None where it has none."""
    for band in records.bands:
        if band.lower() in ("scl", "qa_pixel"):
            return band, band.lower()
    return None, None


def all_readable(tables: list[Records], members: tuple[Member, ...]) -> None:
    """Raise UnreadableAssetsError where the header of an asset that members read is not known."""
    bad: list[str] = []
    for records, member in zip(tables, members, strict=True):
        for band in dict.fromkeys((*member.bands, member.quality)):
            if band is None:
                continue
            missing = pc.is_null(records.asset_field(band, "href")).to_numpy()
            reason = records.asset_field(band, "error").to_pylist()
            unknown = pc.is_null(records.level_field(band, "width")).to_numpy()
            for row in np.flatnonzero(missing | unknown | np.array([r is not None for r in reason])):
                why = "no such asset" if missing[row] else reason[row] or "no cached header"
                bad.append(f"{records.ids[row]}/{band} ({why})")
    if bad:
        more = f" and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        raise UnreadableAssetsError(
            "assets that the plan needs",
            f"{len(bad)} unreadable: {', '.join(bad[:MAX_LISTED])}{more}",
            "headers read while the table was built",
            "Leave their records out with .where(readable=True), or build the table again.",
        )


def _values(
    name: str, spec: HarmonizeSpec, tables: list[Records], members: tuple[Member, ...]
) -> tuple[str, str, float]:
    """Return (units, dtype, fill) of a source's output."""
    roles = _distinct(tables, members, "role")
    units = spec.units or "raw"
    if units == "auto":
        simple = {"reflectance": "reflectance", "embedding": "embedding"}
        units = simple.get(next(iter(roles)), "raw") if len(roles) == 1 else "raw"
    if units != "raw":
        if roles & {"quality", "class"}:
            raise PlanError(
                f"harmonize(units={units!r}) of source {name!r}",
                f"bands with roles {', '.join(sorted(roles))}",
                "bands that are measured, not classified",
                "Join class and quality bands as a source of their own.",
            )
        if units == "reflectance" and "embedding" in roles:
            raise PlanError(f"harmonize(units='reflectance') of source {name!r}", "embeddings", "measured bands",
                            "Use units='embedding', or join them as a source of their own.")  # fmt: skip
        if units == "embedding" and (spec.mask or spec.dtype not in (None, "float32")):
            raise PlanError(
                f"source {name!r}", "embeddings with a mask or an integer dtype", "float32, no mask"
            )
        dtype = spec.dtype or "float32"
        return units, dtype, {"float32": float("nan"), "uint16": 65535.0, "int16": -32768.0}[dtype]
    if spec.dtype is not None:
        raise PlanError(
            f"harmonize(dtype={spec.dtype!r}) of source {name!r}", "raw units", "units='reflectance'"
        )
    return _raw_values(name, tables, members)


def _raw_values(name: str, tables: list[Records], members: tuple[Member, ...]) -> tuple[str, str, float]:
    if len(tables) > 1:
        for at in range(len(members[0].bands)):
            own = [Member(m.name, (m.bands[at],), None, None) for m in members]
            scales = {
                (s, o)
                for records, member in zip(tables, own, strict=True)
                for s, o in zip(
                    records.asset_field(member.bands[0], "scale").to_pylist(),
                    records.asset_field(member.bands[0], "offset").to_pylist(),
                    strict=True,
                )
            }
            if len(scales) > 1:
                shown = ", ".join(f"{s} x DN + {o}" for s, o in sorted(scales))
                raise PlanError(
                    f"raw values of merged source {name!r}",
                    f"different radiometry: {shown}",
                    "one scale and offset",
                    "Use harmonize(units='reflectance').",
                )
    dtype = np.result_type(*(np.dtype(d) for d in _distinct(tables, members, "dtype")))
    nodata = {v for v in _distinct(tables, members, "nodata") if v is not None}
    fill = float("nan") if dtype.kind == "f" else 0.0
    if len(nodata) == 1 and dtype.kind in "iu":
        value = next(iter(nodata))
        limits = np.iinfo(dtype)
        fill = float(value) if limits.min <= value <= limits.max else 0.0
    return "raw", dtype.name, fill


def _distinct(tables: list[Records], members: tuple[Member, ...], field: str) -> set[Any]:
    return {
        value
        for records, member in zip(tables, members, strict=True)
        for band in member.bands
        for value in pc.unique(records.asset_field(band, field)).to_pylist()
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


def _axis(
    name: str, spec: HarmonizeSpec, members: list[MemberTable], passes: Acquisitions
) -> TimeAxis | None:
    if spec.time is None:
        return None
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
