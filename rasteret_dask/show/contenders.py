# SPDX-License-Identifier: Apache-2.0
"""Which records compete for the slots of one chip, and which of them won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips, chip_sources
from rasteret_dask.chipping.chipslots import chip_dates, slot_times
from rasteret_dask.chipping.chiptable import FILLED, bounds_of, replaced
from rasteret_dask.chipping.coverage import FULL
from rasteret_dask.chipping.feeds import Feeds, covered, enough, pick
from rasteret_dask.chipping.frame import Frame
from rasteret_dask.chipping.rulesteps import with_rule
from rasteret_dask.chipping.steps import steps_of
from rasteret_dask.errors import PlanError, UnreadableAssetsError
from rasteret_dask.planning.optimize import named_bands
from rasteret_dask.planning.plan import FilterPixels, Rule
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.rules.picks import Closest, Composed, First, Last, LeastCloudy, Newest, Ranked, Scored
from rasteret_dask.show.losses import covered_slots, slot_words, uncovered
from rasteret_dask.tasks.clouds import cloud_fractions, has_clouds
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.shards import read_chips

__all__ = ["CONTENDERS", "Contest", "contest"]

CONTENDERS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("slot", pa.int16()),
        pa.field("slot_name", pa.string()),
        pa.field("record", pa.string()),
        pa.field("datetime", pa.timestamp("us", "UTC")),
        pa.field("coverage", pa.float32()),
        pa.field("valid", pa.float32()),
        pa.field("cloudy", pa.float32()),
        pa.field("order", pa.int16()),
        pa.field("role", pa.string()),
        pa.field("why", pa.string()),
    ]
)
"""A row for each record, slot and source. ``coverage``: the share of the chip; ``valid``: the same after masks;
``cloudy``: the share of the pixels that the quality band knows, null where there is none. ``order``: the place of its
acquisition among the slot's."""

DAY_NS = 86_400 * 10**9

NO_SLOT = -1
"""The slot of acquisitions that are none of those that a chip has."""


@dataclass(frozen=True)
class Contest:
    """Who competed for the slots of a chip, and what came out."""

    table: pa.Table
    """CONTENDERS: by source, slot, order."""
    slots: tuple[str, ...]
    """A sentence for each slot: what was picked, how much is valid, how much of it filled."""
    dropped: str = ""
    """Which rule of filter_pixels drops the chip; empty: none."""
    unreadable: tuple[str, ...] = ()
    """A line for each tile that could not be read: its pixels count as invalid."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record in one slot of one source."""

    source: int
    slot: int
    record: int
    order: int
    """-1: not among those that may win."""
    share: float


def contest(query: Query, planned: PlannedChips, row: int) -> Contest:
    """Read the records that compete for one chip, each for itself, and the chip.

    Parameters
    ----------
    query
        The plan of the chips, with its tables and functions.
    planned
        The chips.
    row
        The chip's place among them.
    """
    chip = replace(planned, table=planned.table.slice(row, 1), split=None)
    frame = _frame(chip.table)
    used = {(int(s), int(t), int(r)): int(o) for s, t, r, o in _feeds(chip)}
    frames = [
        frame.grown(planned.spec.reach_m(planned.resolution, source.plan.name)) for source in planned.sources
    ]
    entries = [e for n, own in enumerate(frames) for e in _entries(planned, n, own, used)]
    shares, lost = _shares(query, chip, entries)
    job = freeze(chip)
    (shard,) = job.shards()
    made = read_chips(job, shard, ReadContext(query.functions, "mask"), warns=False)
    lines, rows, dropped = [], [], ""
    for number, source in enumerate(planned.sources):
        dataset = made[source.plan.name]
        lost += dataset.attrs["unreadable"]
        dropped = dropped or next(iter(dataset.attrs.get("dropped", {}).values()), "")
        own = [e for e in entries if e.source == number]
        if source.plan.optional and not any(feed[0] == number for feed in used):
            dates = chip_dates(chip.table, () if source.chip_times is None else source.chip_times.columns)
            reason = "; ".join(uncovered(planned, frame, dates, number))
            lines.append(f"{source.plan.name}: absent: {reason}; join(require=) lets chips lack it")
            rows += [_row(source, e, shares[e], "not used", "") for e in own]
            continue
        for slot in sorted({e.slot for e in own}):
            there = [e for e in own if e.slot == slot]
            start = dataset["datetime"].values[0, max(slot, 0)]
            lead = _lead(source, there, start)
            why = _reason(source, there, lead, shares, chip)
            at = {e: _role(source, e, lead, used) for e in there}
            rows += [_row(source, e, shares[e], at[e], why) for e in there]
            if slot == NO_SLOT:
                continue
            valid = float(dataset["valid_fraction"].values[0, slot])
            filled = float(dataset[FILLED].values[0, slot]) if FILLED in dataset else 0.0
            lines.append(_slot_line(source, slot, lead, why, valid, filled))
    table = pa.Table.from_pylist(rows, schema=CONTENDERS)
    return Contest(table, tuple(lines), dropped, tuple(dict.fromkeys(lost)))


def _frame(table: pa.Table) -> Frame:
    """Return the windows of chips."""
    nothing = np.zeros(table.num_rows, dtype=np.int64)
    return Frame(
        table.column("epsg").to_numpy().astype(np.int64), bounds_of(table), nothing, nothing, None, None,
        pa.array(table.column("chip_id").to_pylist(), pa.string()),
    )  # fmt: skip


def _feeds(chips: PlannedChips) -> Any:
    feeds = chips.feeds
    return zip(
        feeds.source.tolist(), feeds.slot.tolist(), feeds.row.tolist(), feeds.order.tolist(), strict=True
    )


def _entries(
    chips: PlannedChips, number: int, frame: Frame, used: dict[tuple[int, int, int], int]
) -> list[_Entry]:
    """Return the records of a source that compete for a chip, slot by slot, the best first."""
    source, footprints = chips.sources[number], chips.outlines[number]
    if not source.has_slots:
        touched = covered(source, footprints, frame)
        share = dict(zip(touched.record.tolist(), touched.share.tolist(), strict=True))
        own = {r: o for (s, _, r), o in used.items() if s == number}
        others = [] if number == chips.reference else [r for r in share if r not in own]
        return [_Entry(number, 0, r, own.get(r, -1), share[r]) for r in (*own, *others)]
    dates = chip_dates(chips.table, () if source.chip_times is None else source.chip_times.columns)
    slotted = covered_slots(source, footprints, frame, dates)
    if source.chip_times is not None and source.chip_times.most:
        share = dict(zip(slotted.record.tolist(), slotted.share.tolist(), strict=True))
        fed = {(s, r): o for (n, s, r), o in used.items() if n == number}
        result = [_Entry(number, s, r, o, share[r]) for (s, r), o in fed.items()]
        left = share.keys() - {r for _, r in fed}
        result += [_Entry(number, NO_SLOT, r, -1, share[r]) for r in left]
        return sorted(result, key=lambda e: (e.slot, e.order, source.passes.record_start[e.record]))
    good, _, _ = enough(slotted, frame, footprints, chips.spec.min_coverage)
    ordered = pick(
        _with_all(source), good, frame, footprints, slot_times(source, dates), chips.spec.min_coverage
    )
    result = [_Entry(number, s, r, o, c) for s, r, o, c in _columns(ordered)]
    there = {(e.slot, e.record) for e in result}
    result += [_Entry(number, s, r, -1, c) for s, r, _, c in _columns(slotted) if (s, r) not in there]
    return sorted(result, key=lambda e: (e.slot, e.order < 0, e.order))


def _columns(feeds: Feeds) -> Any:
    return zip(
        feeds.slot.tolist(), feeds.record.tolist(), feeds.order.tolist(), feeds.share.tolist(), strict=True
    )


def _with_all(source: ResolvedSource) -> ResolvedSource:
    """Return a source whose pick keeps all acquisitions of a slot, in its order."""
    rules = source.plan.rules
    if not isinstance(rules.pick, Ranked):
        return source
    kept: Any = rules.pick  # each pick of this kind is a dataclass with a field ``fill``
    rules = replace(rules, pick=replace(kept, fill=True))
    return replace(source, plan=replace(source.plan, rules=rules))


# Pixels


@dataclass(frozen=True, slots=True)
class _Shares:
    valid: float | None = None
    cloudy: float | None = None


def _shares(
    query: Query, chip: PlannedChips, entries: Sequence[_Entry]
) -> tuple[dict[_Entry, _Shares], list[str]]:
    """Read each record for itself over the chip: as if it were a chip's only one."""
    if not entries:
        return {}, []
    alone = _alone(chip, entries)
    job = freeze(alone)
    valid: list[NDArray[Any]] = []
    lost: list[str] = []
    for shard in job.shards():
        made = read_chips(job, shard, ReadContext(on_error="mask"), warns=False)
        lost += [line for dataset in made.values() for line in dataset.attrs["unreadable"]]
        valid.append(
            np.array([
                made[job.sources[e.source].name]["valid_fraction"].values[at, max(e.slot, 0)]
                for at, e in enumerate(entries[shard.start : shard.stop])
            ])
        )  # fmt: skip
    cloudy = _cloudy(query, chip, entries)
    shares = np.concatenate(valid)
    return {
        e: _Shares(float(shares[at]), None if cloudy is None or np.isnan(cloudy[at]) else float(cloudy[at]))
        for at, e in enumerate(entries)
    }, lost


def _alone(chip: PlannedChips, entries: Sequence[_Entry]) -> PlannedChips:
    """Return a chip of one record for each entry, on the same ground."""
    feeds = chip.feeds
    column = replace(
        feeds,
        offsets=np.arange(len(entries) + 1),
        source=np.array([e.source for e in entries], dtype=np.int8),
        slot=np.array([max(e.slot, 0) for e in entries]),
        order=np.zeros(len(entries), dtype=np.int64),
        row=np.array([e.record for e in entries], dtype=np.int32),
        share=np.array([e.share for e in entries], dtype=np.float32),
        names=tuple(s.plan.name for s in chip.sources),
        ids=tuple(tuple(s.records.ids) for s in chip.sources),
    ).to_arrow()
    table = chip.table.take(pa.array(np.zeros(len(entries), dtype=np.int64)))
    table = replaced(table, "chip_id", pa.array([f"{n}" for n in range(len(entries))], pa.string()))
    sources = tuple(
        replace(s, plan=replace(s.plan, maps=(), rules=replace(s.plan.rules, pick=Closest())))
        for s in chip.sources
    )
    return replace(
        chip, table=replaced(table, "feeds", column), sources=sources, maps=(), pixel_rules=(), labels=()
    )


def _cloudy(query: Query, chip: PlannedChips, entries: Sequence[_Entry]) -> NDArray[np.float64] | None:
    """Shape (entry,). Share of clouds by the quality band, NaN where a source has none; None: no source has one."""
    node, _ = steps_of(named_bands(FilterPixels(query.plan, Rule(max_cloud=1.0))))
    try:
        ground = chip_sources(node, query.tables)  # with the quality bands, which the plan may not need
        places = [{r: at for at, r in enumerate(_names(s))} for s in ground.sources]
        own = [_names(s) for s in chip.sources]
        moved = [replace(e, record=places[e.source][own[e.source][e.record]]) for e in entries]
        alone = _alone(replace(chip, sources=ground.sources, outlines=ground.outlines), moved)
        judged = with_rule(alone, Rule(max_cloud=1.0))
    except (PlanError, UnreadableAssetsError, KeyError):  # none, unreadable, or a record without one
        return None
    job = freeze(judged)
    result = np.full(len(entries), np.nan)
    for shard in job.shards():
        for number, plan in enumerate(job.sources):
            if has_clouds(plan):
                share, _ = cloud_fractions(job, shard, number, "mask")
                at = [n for n in range(shard.start, shard.stop) if entries[n].source == number]
                result[at] = share[np.array(at, dtype=np.int64) - shard.start]
    return result


def _names(source: ResolvedSource) -> list[tuple[int, str]]:
    return list(zip(source.member.tolist(), source.records.ids, strict=True))


# Words


def _lead(source: ResolvedSource, there: Sequence[_Entry], start: np.datetime64) -> list[_Entry]:
    """Return the records of the acquisition that was picked; of a composite none."""
    passes, choice = source.passes, source.plan.pick
    if isinstance(choice, Composed) and source.has_slots:
        return []
    if isinstance(choice, Scored) and source.has_slots:
        begun = {e: passes.start[passes.of_record[e.record]].astype("datetime64[us]") for e in there}
        return [e for e in there if e.order >= 0 and begun[e] == start]
    return [e for e in there if e.order == 0]


def _role(
    source: ResolvedSource, entry: _Entry, lead: Sequence[_Entry], used: dict[tuple[int, int, int], int]
) -> str:
    if entry.order < 0:
        return "not used"
    if isinstance(source.plan.pick, Composed) and source.has_slots:
        return "composed"
    if entry in lead:
        return "picked"
    if (entry.source, entry.slot, entry.record) in used and source.plan.pick.fills:
        return "fills"
    return "not used"


def _row(source: ResolvedSource, entry: _Entry, shares: _Shares, role: str, why: str) -> dict[str, Any]:
    start = source.passes.record_start[entry.record]
    return {
        "source": source.plan.name,
        "slot": None if entry.slot == NO_SLOT else entry.slot,
        "slot_name": "" if entry.slot == NO_SLOT else slot_words(source, entry.slot),
        "record": source.records.ids[entry.record],
        "datetime": None if source.is_static else pd.Timestamp(start, tz="UTC").floor("us").to_pydatetime(),
        "coverage": entry.share,
        "valid": shares.valid,
        "cloudy": shares.cloudy,
        "order": None if entry.order < 0 else entry.order,
        "role": role,
        "why": {"picked": why, "fills": "fills what is invalid in those before it"}.get(role, ""),
    }


def _slot_line(
    source: ResolvedSource, slot: int, lead: Sequence[_Entry], why: str, valid: float, filled: float
) -> str:
    name = source.plan.name + (f", slot {slot_words(source, slot)}" if source.has_slots else "")
    records = ", ".join(source.records.ids[e.record] for e in lead)
    part = f"{valid:.1%} valid" + (f", {filled:.1%} from others than the picked" if filled else "")
    return f"{name}: {records + ': ' if records else ''}{why}; {part}"


def _reason(
    source: ResolvedSource,
    there: Sequence[_Entry],
    lead: Sequence[_Entry],
    shares: dict[_Entry, _Shares],
    planned: PlannedChips,
) -> str:
    """Say why an acquisition was picked, beside the next one in order."""
    choice, passes = source.plan.pick, source.passes
    ready = [e for e in there if e.order >= 0]
    count = len({e.order for e in ready})
    if source.chip_times is not None and source.chip_times.most:
        return f"one of the chip's acquisitions ({source.chip_times.choice})"
    if not source.has_slots:
        return "the chip is this acquisition" if len(ready) == len(there) else "the nearest in time"
    if not ready:
        return "no records cover enough of the chip: the slot stays empty"
    if isinstance(choice, Composed):
        return f"{choice.name} of {count} acquisition{'s' * (count > 1)}"
    if count == 1:
        return (
            "the only acquisition that covers enough of the chip"
            if len(there) > len(ready)
            else "the only one"
        )
    if isinstance(choice, Scored):
        best, other = (_valid(shares, own) for own in (lead, [e for e in ready if e not in lead]))
        return f"{choice.name}: {best} of its pixels are valid, of another at most {other}"
    second = [e for e in ready if e.order == 1]
    mine, theirs = sum(e.share for e in lead), sum(e.share for e in second)
    if choice.coverage_first and mine >= FULL > theirs:  # type: ignore[attr-defined]  # all others are Ranked
        return f"it covers the chip, and the next {min(theirs, 1.0):.0%} of it"
    starts = [passes.record_start[own[0].record] for own in (lead, second)]
    middle = _middle(source, there[0].slot, planned.table)
    match choice:
        case First() | Last() | Newest():
            words = {First: "the earliest", Last: "the latest", Newest: "the newest"}[type(choice)]
            return f"{words}, and the next is of {pd.Timestamp(starts[1]):%Y-%m-%d}"
        case LeastCloudy():
            first, next_ = (passes.record_cloud[own[0].record] for own in (lead, second))
            return f"its scene has {_clouds(first)}, that of the next {_clouds(next_)}"
        case Closest():
            near, far = (abs((start - middle).astype(np.int64)) / DAY_NS for start in starts)
            return f"{near:.1f} days from the slot's middle, and the next {far:.1f}"
    return f"first in the order of {choice.name}"


def _middle(source: ResolvedSource, slot: int, chip: pa.Table) -> np.datetime64:
    """Return the middle of a slot of one chip."""
    dates = chip_dates(chip, () if source.chip_times is None else source.chip_times.columns)
    times = slot_times(source, dates)
    assert times is not None
    middle: np.datetime64 = times.middle(np.zeros(1, dtype=np.int64), np.array([slot])).astype(
        "datetime64[ns]"
    )[0]
    return middle


def _valid(shares: dict[_Entry, _Shares], entries: Sequence[_Entry]) -> str:
    best = max((shares[e].valid or 0.0 for e in entries), default=0.0)
    return f"{best:.1%}"


def _clouds(percent: float) -> str:
    return "no cloud figure" if np.isnan(percent) else f"{percent:.3g}% clouds"
