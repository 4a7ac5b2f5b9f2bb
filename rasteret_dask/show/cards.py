# SPDX-License-Identifier: Apache-2.0
"""What a prompt and a notebook show of collections and chips: only what is there already, or costs little to look up.

No pixels are read, nothing is requested, and no chips are planned. What cannot be told without that names the call
that tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import shapely

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.display.html import Markup, Outline, fold, markup, shares, svg_map, table
from rasteret_dask.errors import RasteretDaskError
from rasteret_dask.footprint import box_around
from rasteret_dask.grid import bounds_in
from rasteret_dask.lists import first_of, listed
from rasteret_dask.net.hrefs import redact
from rasteret_dask.planning import recordtable
from rasteret_dask.planning.calls import THEN, call, calls, chain, rows_in
from rasteret_dask.planning.names import in_order
from rasteret_dask.planning.plan import CutChips, Filter, Join, Node, Sample, children, leaves, spec_field
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.planning.scan import Table
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.rules.picks import Closest
from rasteret_dask.rules.units import Raw, Scaled, Units
from rasteret_dask.store.stored import Stored
from rasteret_dask.tasks.job import Job

__all__ = ["BlocksFacts", "blocks_card", "chips_card", "collection_card", "saved_card", "stored_card"]

MOST_RECORDS = 20_000
"""Records of a table, before any filter, up to which it is looked through: some 0.1 s."""

MOST_FILES = 32
"""Files of a table whose footers are read to count its records."""

MOST_DRAWN = 5_000
"""Shapes that become a map, evenly taken: some 50 ms."""

UNREADABLE = (RasteretDaskError, OSError, pa.ArrowException)
"""What looking may end with: a filter on a column that is not there, a file that somebody deleted."""


def collection_card(name: str, query: Query) -> Card:
    """Return what is shown of a collection.

    Parameters
    ----------
    name
        What it is called.
    query
        Its plan and tables.
    """
    joined = next((node for node in _nodes(query.plan) if isinstance(node, Join)), None)
    sides = {"": query.plan} if joined is None else dict(zip(joined.names, joined.children, strict=True))
    facts = {side: _RecordFacts.of(Query(plan, query.tables)) for side, plan in sides.items()}
    if joined is None:
        rows, count = list(facts[""].rows), facts[""].records
        title = f"Collection {name}" + ("" if count is None else f": {counted(count, 'record')}")
    else:
        rows = [Fact(side, own.line, own.markup) for side, own in facts.items()]
        title = f"Collection of {counted(len(sides), 'joined source')}: {listed(sides, 'sources')}"
    known = {side: own.looked_at for side, own in facts.items() if own.looked_at is not None and own.records}
    pictures = [partial(_record_map, known)] if known else []
    return Card(title, [*rows, *_steps(query)], pictures)


@dataclass(frozen=True, slots=True)
class _RecordFacts:
    """What is told of the records of a collection, or of one source of a join."""

    records: int | None
    """None: nobody has counted."""
    rows: tuple[Fact, ...]
    """Dates, platforms, bands and area; or why these are not told."""
    looked_at: pa.Table | None
    """The records' outlines and platforms; None: there are too many, or they cannot be read."""

    @classmethod
    def of(cls, query: Query) -> _RecordFacts:
        """Look at the records of a plan whose tables are small, and lie in memory or in files of this machine."""
        sizes = [_size(query.tables[token]) for token in {leaf.token for leaf in leaves(query.plan)}]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        if total is None or total > MOST_RECORDS:
            count = total if total is not None and _takes_all(query.plan) else None
            of = "" if total is None or count is not None else f" of {total:,}"
            text = f"records{of} not looked at: describe() tells dates, bands and area"
            return cls(count, (Fact("records", text),), None)
        names = ("datetime", "start_datetime", "end_datetime", "platform", "collection", "assets", "geometry")
        try:
            known = recordtable.schema(query).names
            records = recordtable.table(query, [name for name in names if name in known])
        except UNREADABLE as error:
            return cls(None, (Fact("records", f"cannot be told: {error}"),), None)
        return cls(len(records), tuple(_record_rows(records, spec_field(query.plan, "units"))), records)

    @property
    def line(self) -> str:
        """The facts in one line."""
        count = [] if self.records is None else [counted(self.records, "record")]
        return "; ".join([*count, *(row.text for row in self.rows)])

    def markup(self) -> Markup:
        """Return the facts as a table."""
        rows = [] if self.records is None else [("records", f"{self.records:,}")]
        lines = [(row.name, row.text if row.markup is None else row.markup()) for row in self.rows]
        return fold(self.line, table(["", ""], [*rows, *lines])) if self.records else markup(self.line)


def chips_card(query: Query, planned: PlannedChips | None, why: str = "") -> Card:
    """Return what is shown of chips.

    Parameters
    ----------
    query
        Their plan and tables.
    planned
        The planned chips; None: nobody has planned them yet.
    why
        Why they cannot be planned, where somebody tried.
    """
    if planned is None:
        spec = next(_specs(query.plan), None)
        size = "" if spec is None else f" of {spec.spec.size} px"
        state = Fact("chips", why or "not planned yet: len(chips) plans")
        return Card(f"Chips{size}", [state, *_steps(query)])
    rows = [*_splits(_split_counts(planned.table), planned.spec.cover), *_source_rows(planned)]
    rows += [Fact(one.name, f"of {counted(one.table.num_rows, one.what)}") for one in planned.labels]
    if planned.pixel_rules:
        text = "; ".join(rule.words for rule in planned.pixel_rules)
        rows.append(Fact("filter_pixels", f"{text} (decided while pixels are read)"))
    pictures = [partial(_chip_map, planned.table)] if planned.table.num_rows else []
    return Card(f"Chips: {_chips_title(planned, planned.table.num_rows)}", [*rows, *_steps(query)], pictures)


@dataclass(frozen=True, slots=True)
class BlocksFacts:
    """What is told of chips planned by blocks."""

    url: str
    splits: Mapping[str, int] | None
    """Chosen chips a split, ``""`` for none; None: nobody has counted them since the last step."""
    of_chips: int
    """Chips of all blocks."""
    bounds: Sequence[tuple[int, tuple[float, float, float, float]]]
    """CRS and bounds of each block that has chips."""


def blocks_card(query: Query, planned: PlannedChips, facts: BlocksFacts) -> Card:
    """Return what is shown of chips that are planned by blocks."""
    where = f"in {counted(len(facts.bounds), 'block')} at {redact(facts.url)}"
    rows = [Fact("chips", f"{facts.of_chips:,} {where}")]
    if facts.splits is None:
        rows.append(Fact("splits", "not counted since the last step: len(chips) counts"))
    else:
        rows += _splits(facts.splits)
    count = None if facts.splits is None else sum(facts.splits.values())
    title = f"ChipBlocks: {_chips_title(planned, count)}"
    pictures = [partial(_block_map, facts.bounds)] if facts.bounds else []
    return Card(title, [*rows, *_source_rows(planned), *_steps(query)], pictures)


def saved_card(url: str, job: Job, table: Callable[[], pa.Table]) -> Card:
    """Return what is shown of the chips of a saved plan.

    Parameters
    ----------
    url
        Its folder.
    job
        The chips.
    table
        Returns their table.
    """
    count, sides = sum(h.chips for h in job.hierarchies), ", ".join(map(str, sorted(set(job.size_px))))
    rows = _splits({h.split or "": h.chips for h in job.hierarchies})
    for plan in job.sources:
        kinds = [kind.kind for kind in plan.kinds] or [None] * len(plan.bands)
        named = list(zip(plan.bands, kinds, plan.units, strict=True))
        text = f"{_bands_text(named, plan.dtype)}; {counted(plan.times, 'slot')}"
        rows.append(Fact(plan.name, text, partial(_with_bands, text, named)))
    rows += [Fact("plan", redact(url)), Fact("digest", job.digest)]
    return Card(f"SavedPlan: {count:,} of {sides} px", rows, [lambda: _chip_map(table())])


def stored_card(stored: Stored, opened: bool) -> Card:
    """Return what is shown of stored chips.

    Parameters
    ----------
    stored
        The store, and the steps so far.
    opened
        Whether this process has opened the store already; else only one that lies on this machine is.
    """
    where = Fact("store" if len(stored.places) == 1 else "stores", first_of(map(redact, stored.places), 3))
    chosen = list(calls(stored.plan))[1:]
    steps = [Fact("steps", THEN.join(chosen))] if chosen else []
    local = "://" not in stored.url
    if not opened and not local:
        return Card("StoredChips, not opened yet", [where, Fact("", "len(chips) opens it"), *steps])
    try:
        rows = [*_splits(stored.splits), *_stored_sources(stored, local)]
        dropped = sum(len(shard.dropped) for shard in stored.map.shards)
    except UNREADABLE as error:
        return Card("StoredChips, which cannot be read", [where, Fact("because", str(error)), *steps])
    marks = [] if stored.parts is None else [mark for mark in stored.parts.columns if mark is not None]
    if marks:
        rows.append(Fact("columns", first_of((redact(mark.rpartition("#")[0]) for mark in marks), 3)))
    if dropped:
        rows.append(Fact("left out", f"{counted(dropped, 'chip')} of the store by filter_pixels: .dropped"))
    title = f"StoredChips: {counted(sum(stored.splits.values()), 'chip')}"
    return Card(title, [*rows, where, Fact("digest", stored.digest), *steps])


def _stored_sources(stored: Stored, local: bool) -> Iterator[Fact]:
    """Yield a row a source; names of bands are in objects of a store, which are read only where they are local."""
    pixels = stored.map.pixels if local or "pixels" in vars(stored.map) else None
    for group in stored.map.first:
        array = group.arrays["pixels"]
        times, bands, height, width = array.shape[1:]
        shape = f"(time, band, y, x) = ({times}, {bands}, {height}, {width})"
        if pixels is None:
            yield Fact(group.source, f"{counted(bands, 'band')}, {array.encoding.dtype}; {shape}")
            continue
        own = pixels[group.source]
        kinds = [kind.kind for kind in own.kinds] or [None] * bands
        named = [(band, kind, own.units) for band, kind in zip(own.bands, kinds, strict=True)]
        text = f"{_bands_text(named, own.dtype)}; {shape}"
        yield Fact(group.source, text, partial(_with_bands, text, named))


def _size(data: Table) -> int | None:
    """Return how many records a table has, where that takes no request; None: it would, or many files."""
    if isinstance(data, pa.Table):
        return int(data.num_rows)
    if isinstance(data, pads.InMemoryDataset):
        return int(data.count_rows())
    local = isinstance(data, pads.FileSystemDataset) and isinstance(data.filesystem, pafs.LocalFileSystem)
    if not local or len(data.files) > MOST_FILES:
        return None
    try:
        return int(data.count_rows())
    except UNREADABLE:
        return None


def _takes_all(node: Node) -> bool:
    """Whether no step of a plan leaves records out."""
    chosen = any(isinstance(one, Filter | Sample) for one in _nodes(node))
    return not chosen and not any(leaf.where for leaf in leaves(node))


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in children(node):
        yield from _nodes(child)


def _specs(node: Node) -> Iterator[CutChips]:
    return (one for one in _nodes(node) if isinstance(one, CutChips))


def _record_rows(records: pa.Table, units: Units | None) -> Iterator[Fact]:
    if not records.num_rows:
        yield Fact("records", "none: the filters leave nothing")
        return
    yield Fact("dates", _dates(records))
    platforms = _counts(records, "platform") or _counts(records, "collection")
    if platforms:
        shown = [f"{name} {count:,}" for name, count in platforms.items()]
        yield Fact("platforms", listed(shown, "platforms"))
    bands = _bands(records, units)
    yield Fact("bands", _bands_text(bands), partial(_with_bands, _bands_text(bands), bands))
    area = _area(records)
    if area:
        yield Fact("area", area)


def _dates(records: pa.Table) -> str:
    begins = _earliest(records, "start_datetime", "datetime")
    first, last = pc.min(begins).as_py(), pc.max(_earliest(records, "end_datetime", "datetime")).as_py()
    if first is None or last is None:
        return "none (static)"
    if first.year < 1700 or last.year > 2200:
        return "at any time (static)"
    return f"{first:%Y-%m-%d}" if first.date() == last.date() else f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"


def _earliest(records: pa.Table, *names: str) -> pa.ChunkedArray:
    columns = [records.column(name) for name in names if name in records.column_names]
    return pc.coalesce(*columns)


def _counts(records: pa.Table, column: str) -> dict[str, int]:
    if column not in records.column_names:
        return {}
    entries = pc.value_counts(records.column(column)).to_pylist()
    named = {str(e["values"]): int(e["counts"]) for e in entries if e["values"] is not None}
    return dict(sorted(named.items()))


def _bands(records: pa.Table, units: Units | None) -> list[tuple[str, str | None, str]]:
    """Return (name, kind, unit) of every band that some record has, quality bands last."""
    chunk = records.column("assets").combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0)
    keys = chunk.keys
    fields = {name: pc.struct_field(chunk.items, name) for name in ("common_name", "kind", "role")}
    flat = pa.table({"band": keys, **fields}).slice(
        chunk.offsets[0].as_py(), chunk.offsets[-1].as_py() - chunk.offsets[0].as_py()
    )
    found: dict[str, tuple[str, str | None, str]] = {}
    last: dict[str, tuple[str, str | None, str]] = {}
    for entry in (
        flat.group_by(["band", "common_name", "kind", "role"], use_threads=False).aggregate([]).to_pylist()
    ):
        name, kind = entry["common_name"] or entry["band"], kind_of(entry["kind"])
        names = {name, entry["band"]}
        unit = kind.unit if units is None else units.of(names, kind, False).name
        (last if entry["role"] == "quality" else found).setdefault(name, (name, kind.name, unit))
    return [*found.values(), *(one for name, one in last.items() if name not in found)]


def _bands_text(bands: Sequence[tuple[str, str | None, str]], dtype: str = "") -> str:
    """Return bands by what they are: ``red, nir (reflectance, float32); SCL (class, float32)``."""
    groups: dict[tuple[str | None, str], list[str]] = {}
    for name, kind, unit in bands:
        groups.setdefault((kind, unit), []).append(name)
    parts = [f"{listed(names, 'bands')} ({_what(*kind, dtype)})" for kind, names in groups.items()]
    return "; ".join(parts) or "none"


def _what(kind: str | None, unit: str, dtype: str) -> str:
    """Return what the numbers of bands are: ``reflectance, float32``, ``embedding, int8 as stored``."""
    name = kind or "unknown kind"
    if unit not in ("", kind, Raw.name, Scaled.name):
        name = f"{kind} in {unit}" if kind else unit
    stored = unit == Raw.name and not kind_of(kind).is_coded
    parts = [name, *([f"{dtype}{' as stored' if stored else ''}"] if dtype else ["as stored"] * stored)]
    return ", ".join(parts)


def _area(records: pa.Table) -> str:
    if "geometry" not in records.column_names:
        return ""
    shapes = shapely.from_wkb(records.column("geometry").to_numpy(zero_copy_only=False), on_invalid="ignore")
    shapes = shapes[~(shapely.is_missing(shapes) | shapely.is_empty(shapes))]
    if not len(shapes):
        return ""
    west, south, east, north = box_around(shapely.geometrycollections(shapely.get_parts(shapes)))
    return f"{west:.6g}, {south:.6g} to {east:.6g}, {north:.6g} (lon, lat)"


def _splits(counts: Mapping[str, int], cover: bool = False) -> list[Fact]:
    named = {name: count for name, count in counts.items() if name}
    if cover:
        return [Fact("splits", "none: chips cover the area, and overlap")]
    if not named:
        return [Fact("splits", "none: split() deals the chips out")]
    ordered = {name: named[name] for name in in_order(named)} | ({"": counts[""]} if counts.get("") else {})
    text = ", ".join(f"{name or 'none'} {count:,}" for name, count in ordered.items())
    return [Fact("splits", text, partial(shares, ordered))]


def _split_counts(chips: pa.Table) -> dict[str, int]:
    entries = pc.value_counts(chips.column("split")).to_pylist()
    return {entry["values"] or "": int(entry["counts"]) for entry in entries}


def _chips_title(planned: PlannedChips, count: int | None) -> str:
    many = "" if count is None else f"{count:,} of "
    slots = _slots(planned)
    return f"{many}{planned.spec.size} px ({planned.resolution:g} m)" + (f", {slots}" if slots else "")


def _slots(planned: PlannedChips) -> str:
    """Return the reference source's time axis, else the first that there is: ``3 slots 2024-04-01 to 2024-06-30``."""
    sources = [planned.sources[planned.reference], *planned.sources]
    axes = (_axis(source) for source in sources if source.axis is not None and not source.is_static)
    return next(axes, "")


def _axis(source: ResolvedSource) -> str:
    assert source.axis is not None
    first, last = source.axis.start.min(initial=source.axis.start[0]), source.axis.end.max()
    last = last - np.timedelta64(1, "ns")  # half-open: the last day is inside
    return f"{counted(len(source.axis), 'slot')} {_day(first)} to {_day(last)}"


def _day(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="D"))


def _source_rows(planned: PlannedChips) -> Iterator[Fact]:
    for source in planned.sources:
        plan = source.plan
        kinds = [kind.kind for kind in plan.kinds] or [None] * len(plan.bands)
        named = list(zip(plan.bands, kinds, plan.units, strict=True))
        parts = [" + ".join(member.name for member in plan.members)] if len(plan.members) > 1 else []
        if source.is_static:
            parts.append("static")
        elif source.chip_times is not None:
            parts.append(source.chip_times.words)
        elif source.axis is not None and (axis := _axis(source)) != _slots(planned):
            parts.append(axis)
        if plan.pick != Closest():
            parts.append(plan.pick.name)
        if plan.masks:
            parts.append(f"masked: {', '.join(plan.masks)}")
        parts += [f"map {function.name}" for function in plan.maps]
        text = ", ".join([_bands_text(named, plan.dtype), *parts])
        yield Fact(plan.name, text, partial(_with_bands, text, named))


def _with_bands(text: str, named: Sequence[tuple[str, str | None, str]]) -> Markup:
    """Return a line that opens into a table of bands."""
    if len(named) == 1:
        return Markup(markup(text))
    return fold(
        text, table(["band", "kind", "unit"], [(band, kind or "unknown", unit) for band, kind, unit in named])
    )


def _steps(query: Query) -> list[Fact]:
    """Return the steps as a user would type them: what was joined in rows of its own."""
    rows = rows_in(query.tables)
    joined = next((node for node in _nodes(query.plan) if isinstance(node, Join)), None)
    if joined is None:
        return [Fact("steps", chain(query.plan, rows), partial(_step_lines, list(calls(query.plan, rows))))]
    parts = list(calls(query.plan, rows))
    parts[0] = call(joined)
    below = [
        Fact("", f"{name} = {chain(child, rows)}", partial(_side, name, list(calls(child, rows))))
        for name, child in zip(joined.names, joined.children, strict=True)
    ]
    return [Fact("steps", THEN.join(parts), partial(_step_lines, parts)), *below]


def _step_lines(parts: Sequence[str]) -> Markup:
    lines = "<br>".join(
        f"<code>{'' if at == 0 else '.'}{markup(part)}</code>" for at, part in enumerate(parts)
    )
    return Markup(lines)


def _side(name: str, parts: Sequence[str]) -> Markup:
    return Markup(f"<code>{markup(name)} =</code> {_step_lines(parts)}")


def _record_map(sides: Mapping[str, pa.Table]) -> Markup:
    """Draw the outlines of records, coloured by platform; those of a join by source."""
    outlines = []
    for side, records in sides.items():
        own = _outlines(records, "platform")
        outlines += [Outline(one.shape, side) for one in own] if side else own
    return svg_map(outlines)


def _chip_map(chips: pa.Table) -> Markup:
    return svg_map(_outlines(chips, "split"))


def _outlines(rows: pa.Table, label: str) -> list[Outline]:
    """Return shapes of rows, evenly taken, with the value of a column each, where there is one."""
    count = min(rows.num_rows, MOST_DRAWN)
    at = np.unique(np.linspace(0, rows.num_rows - 1, count).astype(np.int64))
    some = rows.select([name for name in (label, "geometry") if name in rows.column_names]).take(pa.array(at))
    shapes = shapely.from_wkb(some.column("geometry").to_numpy(zero_copy_only=False), on_invalid="ignore")
    labels = some.column(label).to_pylist() if label in some.column_names else [""] * len(shapes)
    return [Outline(shape, name or "") for shape, name in zip(shapes, labels, strict=True)]


def _block_map(bounds: Sequence[tuple[int, tuple[float, float, float, float]]]) -> Markup:
    return svg_map([Outline(shapely.box(*bounds_in(box, epsg, 4326))) for epsg, box in bounds])
