# SPDX-License-Identifier: Apache-2.0
"""A finished store grows: what it does not have yet of a plan is written as further parts, each committed by itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips, used_rows
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FeedTable, replaced
from rasteret_dask.chipping.splits import split_numbers, too_near
from rasteret_dask.errors import StoreError
from rasteret_dask.formats import MEANING
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.store import ledger
from rasteret_dask.store.addedtables import AddedColumns
from rasteret_dask.store.jobreport import JobReport, job_report
from rasteret_dask.store.law import read_law
from rasteret_dask.store.layout import Layout, layout_of
from rasteret_dask.store.ledger import part_path
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.run import run_zarr
from rasteret_dask.store.storemap import StoreMap
from rasteret_dask.store.union import Grown, StoreUnion, grown_store, open_parts, open_union
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import freeze

__all__ = ["Growth", "append_zarr"]


@dataclass(frozen=True)
class Growth:
    """What is to be in a store, and how it is written."""

    planned: PlannedChips
    """The chips, of all splits that are wanted."""
    query: Query
    layout: Layout
    """Of all of these chips, as if they were a store of their own."""
    context: ReadContext
    client: ClientLike
    progress: bool
    bounds: Bounds


def append_zarr(growth: Growth, url: str) -> JobReport:
    """Write to a store what it does not have of some chips; where nothing lies there, they become the store.

    Slots of a chip that the store has are not read again. What is new becomes a part of its own, ``part-0001`` and
    so on: one for all chips that lack the same slots. Where slots are each chip's own, new dates may change all of
    them: chips that are new, or have other records than in the store, are written whole, and stand in place of what
    earlier parts have of them. Each part is a whole store with its own ledger. Its number is taken by the conditional
    put that begins it, so that of two appends at a time one is refused.

    Parameters
    ----------
    growth
        The chips.
    url
        The store.

    Returns
    -------
    JobReport
        What was written, and what all of the store holds.

    Raises
    ------
    StoreError
        When the store is not finished, its plan differs in more than area, dates and labels, another append was
        begun and is not finished, or slots are each chip's own and the plan lacks records that the store's chips have.
    """
    if not _is_finished(url, growth):
        return run_zarr(growth.layout, url, growth.context, growth.client, growth.progress, growth.bounds)
    store = grown_store(url)
    _check_law(store.parts[0], growth.layout)
    _check_columns(store.parts[0], growth.planned)
    union = open_union(open_parts([store], version=0))
    _check_splits(union, growth.planned)
    _tell_of_dealt(store)
    written, seconds = 0, 0.0
    number = len(store.parts)
    for part in _parts(union, growth.planned):
        place = remote.join(url, part_path(number))
        job = freeze(part)
        layout = layout_of(job, used_rows(part), growth.query, part.dropped)
        layout = replace(
            layout,
            compression=growth.layout.compression,
            recipe=growth.layout.recipe,
            supersedes=_has_own_slots(part),
        )
        _check_begun(place, job.digest)
        report = run_zarr(layout, place, growth.context, growth.client, growth.progress, growth.bounds)
        written, seconds, number = (
            written + report.shards_written,
            seconds + (report.seconds or 0.0),
            number + 1,
        )
    if number == len(store.parts) and growth.progress:
        sys.stderr.write(f"store {remote.redact(url)} has all of these chips: nothing to do\n")
    return replace(job_report(url), shards_written=written, seconds=round(seconds, 3))


def _is_finished(url: str, growth: Growth) -> bool:
    """Tell whether a store is there to append to; raise where another plan's is not finished."""
    with suppress(remote.MissingError):
        ledger.root_of(url)
        return True
    mark, own = ledger.begun(url), growth.layout.job.digest
    if mark is not None and mark["digest"] != own:
        raise StoreError(
            f"to_zarr(append=True) to store {remote.redact(url)}", f"an unfinished store ({mark['digest'][:12]})",
            f"a finished one, or these very chips ({own[:12]})",
            "Call to_zarr with the plan that began it, which does what is missing; then append.",
        )  # fmt: skip
    return False


def _check_law(first: StoreMap, layout: Layout) -> None:
    """Raise StoreError where a plan differs from a store's in more than area, dates and labels."""
    subject = f"to_zarr(append=True) to store {remote.redact(first.url)}"
    elsewhere = (
        "Write these chips to a store of their own; rd.open_chips([a, b]) opens stores that are alike as one."
    )
    law = read_law(first.url)
    if law is None:
        raise StoreError(
            subject,
            "a store that does not say what its parts share",
            "one that this version wrote",
            elsewhere,
        )
    if first.note["meaning"] != MEANING:
        raise StoreError(
            subject, f"chips as rasteret_dask {first.note['version']} makes them (meaning {first.note['meaning']})",
            f"those of this version (meaning {MEANING}), whose pixels or layout differ", elsewhere,
        )  # fmt: skip
    found = [(name, new, there) for name, there, new in law.differences(layout.law)]
    if first.note["compression"] != layout.codec_text:
        found.append(("compression", layout.codec_text, first.note["compression"]))
    if found:
        more = "" if len(found) < 2 else f"; and {first_of((name for name, *_ in found[1:]), 4)}"
        name, new, there = found[0]
        raise StoreError(
            subject, f"{name} {new}{more}", f"{name} {there}, as in the store: only area, dates and labels may differ",
            f"Say it as the store's plan does. {elsewhere}",
        )  # fmt: skip


def _check_columns(first: StoreMap, planned: PlannedChips) -> None:
    """Raise StoreError where chips have other columns of the user's, or of other types."""

    def columns(schema: pa.Schema) -> dict[str, str]:
        return {one.name: str(one.type) for one in schema if one.name not in CHIP_SCHEMA.names}

    here, there = columns(planned.table.schema), columns(first.chips.table.schema)
    for name in dict.fromkeys([*there, *here]):
        if here.get(name) != there.get(name):
            raise StoreError(
                f"to_zarr(append=True) to store {remote.redact(first.url)}",
                f"{'no ' if name not in here else ''}column {name!r}" + (f" of {here[name]}" if name in here else ""),
                f"one of {there[name]}, as in the store" if name in there else "no such column, as in the store",
                "Give chips the store's columns; others are added to all chips by open_chips(store).with_table().",
            )  # fmt: skip


def _check_splits(union: StoreUnion, planned: PlannedChips) -> None:
    """Raise StoreError where a chip, or ground, has another split than in the store."""
    for name in ("chip_id", "cell"):
        if planned.split is None or (name == "cell" and planned.split.by != "ground"):
            continue
        there = _splits_by(union.chips.columns([name, "split"]), name)
        for key, split in _splits_by(planned.table.select([name, "split"]), name).items():
            if there.get(key, split) != split:
                raise StoreError(
                    f"to_zarr(append=True) to store {remote.redact(union.url)}",
                    f"{'chip' if name == 'chip_id' else 'split cell'} {key} in split {split!r}",
                    f"split {there[key]!r}, as in the store",
                    "split(stratify=, cells=<the store>) keeps the splits of its cells." if planned.split.stratify
                    else "Give the chips the splits that the store's plan gave them.",
                )  # fmt: skip


def _splits_by(table: pa.Table, name: str) -> dict[str, str]:
    """Return value of a column -> split, of chips that have both."""
    rows = table.drop_null().group_by([name, "split"]).aggregate([])
    return dict(zip(rows.column(name).to_pylist(), rows.column("split").to_pylist(), strict=True))


def _tell_of_dealt(store: Grown) -> None:
    """Warn where splits were dealt anew, which chips that come later have no part in."""
    (mark,) = open_parts([store]).columns
    if mark is not None and AddedColumns.at(mark).has("split"):
        warnings.warn(
            f"store {remote.redact(store.parts[0].url)}: its splits were dealt anew by split(), and chips that are "
            "appended have none of these: call open_chips(store).split(...) again, or open_chips(store, columns=0)",
            UserWarning,
            stacklevel=4,
        )


def _check_begun(place: str, digest: str) -> None:
    """Raise StoreError where a part was begun by other chips and is not finished, or another append came first."""
    mark = ledger.begun(place)
    if mark is None or mark["digest"] == digest:
        return
    name = place.rpartition("/")[2]
    if remote.exists(remote.join(place, "zarr.json")):
        raise StoreError(
            f"to_zarr(append=True) to store {remote.redact(place)}", "a part that another append has written meanwhile",
            "no such part", "Call to_zarr(append=True) again: it writes what is new by then.",
        )  # fmt: skip
    raise StoreError(
        f"to_zarr(append=True) to store {remote.redact(place)}",
        f"an append of other chips, which is not finished ({mark['digest'][:12]})", "one append at a time",
        f"Let it end, or where it was stopped, call it again with its plan: it goes on. If nobody needs it, delete "
        f"{name}, of which readers see nothing.",
    )  # fmt: skip


# What is new


def _parts(union: StoreUnion, planned: PlannedChips) -> Iterator[PlannedChips]:
    """Yield the chips that a store lacks slots of, those together that lack the same."""
    planned = _apart(union, planned)
    if _has_own_slots(planned):
        part = _differences(union, planned)
        if part.table.num_rows:
            yield part
        return
    table = planned.table
    ids = table.column("chip_id")
    there = [
        pc.is_in(ids, value_set=part.chips.table.column("chip_id").combine_chunks()) for part in union.parts
    ]
    pattern = np.stack([np.asarray(one.to_numpy()) for one in there], -1)
    kinds, number = np.unique(pattern, axis=0, return_inverse=True)
    rows: dict[tuple[tuple[int, ...], ...], list[NDArray[np.int64]]] = {}
    for at, kind in enumerate(kinds.tolist()):
        lacking = tuple(
            _lacking(
                source.plan.slots,
                [p for p, has in zip(union.parts, kind, strict=True) if has],
                source.plan.name,
            )
            for source in planned.sources
        )
        if any(lacking):
            rows.setdefault(lacking, []).append(np.flatnonzero(number.ravel() == at))
    # the new ground first; the rest in the order of their slots, so that a rerun comes to the same parts
    for lacking in sorted(rows, key=lambda slots: (-sum(map(len, slots)), slots)):
        part = _cut(planned, np.sort(np.concatenate(rows[lacking])), lacking)
        if part.table.num_rows:
            yield part


def _has_own_slots(planned: PlannedChips) -> bool:
    """Tell whether slots of some source are each chip's own."""
    return any(source.plan.chip_slots for source in planned.sources)


def _differences(union: StoreUnion, planned: PlannedChips) -> PlannedChips:
    """Return the chips that a store does not have, and those that it has with other records in their slots.

    Raises
    ------
    StoreError
        When a plan does not know records of such a chip: its slots would be chosen among fewer than there are.
    """
    ids = planned.table.column("chip_id").combine_chunks()
    feeds = planned.table.column("feeds")
    changed = np.ones(len(ids), dtype=bool)
    lost: dict[str, None] = {}
    for part in union.parts:  # the last one that has a chip says how it is
        at = pc.index_in(ids, value_set=part.chips.table.column("chip_id").combine_chunks())
        here = np.flatnonzero(np.asarray(at.is_valid()))
        if not len(here):
            continue
        stored = part.chips.columns(["feeds"]).column("feeds").take(at.take(pa.array(here)))
        there, unknown = _entries(stored, planned.sources)
        wanted, _ = _entries(feeds.take(pa.array(here)), planned.sources)
        rows, count = np.unique(np.concatenate([there, wanted]), axis=0, return_counts=True)
        changed[here] = False
        changed[here[rows[count == 1, 0]]] = True
        lost |= dict.fromkeys(unknown)
    if lost:
        raise StoreError(
            f"to_zarr(append=True) to store {remote.redact(union.url)}",
            f"a plan without {len(lost)} records that the store's chips are made of ({first_of(lost, 3)})",
            "all of them, and new ones: slots are each chip's own, chosen among all of its records",
            "Let the plan's dates begin where the store's begin.",
        )  # fmt: skip
    return replace(planned, table=planned.table.filter(pa.array(changed)))


def _entries(
    feeds: pa.ChunkedArray, sources: Sequence[ResolvedSource]
) -> tuple[NDArray[np.int64], list[str]]:
    """Return feed entries as numbers, and the ids of records that no source has.

    Returns
    -------
    entries
        Shape (entry, 5), int64: chip, source, slot, order, and the row of the source's record, -1 where it is unknown.
    unknown
        Ids of these.
    """
    names = pa.array([source.plan.name for source in sources])
    ids = [pa.array(source.records.ids, pa.string()) for source in sources]
    entries, unknown, begin = [np.zeros((0, 5), dtype=np.int64)], [], 0
    for chunk in feeds.chunks:  # each with dictionaries of its own
        flat = chunk.flatten()
        source, record = (_plain_text(flat.field(name)) for name in ("source", "record"))
        number = pc.index_in(source, value_set=names).to_numpy(zero_copy_only=False)
        row = np.full(len(flat), -1, dtype=np.int64)
        for place, known in enumerate(ids):
            own = np.flatnonzero(number == place)
            found = pc.index_in(record.take(pa.array(own)), value_set=known)
            row[own] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
        unknown += pc.unique(record.filter(pa.array(row < 0))).to_pylist()
        chip = begin + np.repeat(np.arange(len(chunk)), chunk.value_lengths().to_numpy(zero_copy_only=False))
        slot, order = (flat.field(name).to_numpy() for name in ("slot", "order"))
        entries.append(np.stack([chip, number, slot, order, row], -1).astype(np.int64))
        begin += len(chunk)
    return np.concatenate(entries), unknown


def _plain_text(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _lacking(slots: Sequence[int] | None, parts: Sequence[StoreMap], source: str) -> tuple[int, ...]:
    """Return the places of those slots of a source that none of some parts has."""
    if slots is None:
        return () if parts else (0,)
    had: set[int] = set()
    for part in parts:
        own = part.times(source)
        had.update(() if own is None else own.tolist())
    return tuple(place for place, slot in enumerate(slots) if slot // 1000 not in had)


def _cut(planned: PlannedChips, rows: NDArray[np.int64], lacking: Sequence[tuple[int, ...]]) -> PlannedChips:
    """Return some chips with some slots of each source; a source of which nothing is new keeps a slot, without records.

    Chips that no record feeds any more are left out.
    """
    table = planned.table.take(pa.array(rows))
    feeds = FeedTable.of(table)
    slot = np.full(len(feeds.slot), -1, dtype=np.int16)
    for number, source in enumerate(planned.sources):
        place = np.full(source.plan.times, -1, dtype=np.int16)
        place[list(lacking[number])] = np.arange(len(lacking[number]))
        own = feeds.source == number
        slot[own] = place[feeds.slot[own]]
    inside = slot >= 0
    count = np.bincount(feeds.chip[inside], minlength=len(rows))
    offsets = np.append(0, np.cumsum(count)).astype(np.int32)
    feeds = FeedTable(
        offsets, feeds.source[inside], slot[inside], feeds.order[inside], feeds.row[inside], feeds.share[inside],
        feeds.names, feeds.ids,
    )  # fmt: skip
    own = feeds.source == planned.reference
    pairs = np.unique(np.stack([feeds.chip[own], feeds.slot[own].astype(np.int64)], -1), axis=0)
    slots = np.bincount(pairs[:, 0], minlength=len(rows)).astype(np.int32)
    table = replaced(replaced(table, "feeds", feeds.to_arrow()), "slots", pa.array(slots))
    sources = tuple(
        source
        if source.plan.slots is None
        else replace(
            source, plan=replace(source.plan, slots=tuple(source.plan.slots[at] for at in places or (0,)))
        )
        for source, places in zip(planned.sources, lacking, strict=True)
    )
    return replace(planned, table=table.filter(pa.array(count > 0)), sources=sources)


def _apart(union: StoreUnion, planned: PlannedChips) -> PlannedChips:
    """Return the chips that are in a split, without those nearer to another split's than the buffer."""
    spec = planned.split
    if spec is None:
        return planned
    table = planned.table.filter(pa.array(split_numbers(planned.table.column("split"), spec) >= 0))
    planned = replace(planned, table=table)
    if spec.buffer_m <= 0:
        return planned
    names = ["chip_id", "epsg", "xmin", "ymin", "xmax", "ymax", "geometry", "split"]
    old, new = union.chips.columns(names).select(names), table.select(names)
    both = pa.concat_tables([old, new.cast(old.schema)])
    epsg = both.column("epsg").to_numpy().astype(np.int64)
    every, split = replace(planned, table=both), split_numbers(both.column("split"), spec)
    bounds, outlines = every.ground, every.outlines_lonlat
    is_new = np.arange(both.num_rows) >= old.num_rows
    # val and test near any train, then train near the val and test that are there
    sides = [split, np.where(is_new, np.where(split == 0, 1, -1), np.where(split > 0, 0, -1))]
    near = np.zeros(both.num_rows, dtype=bool)
    for side in sides:
        near |= too_near(epsg, bounds, side, spec, outlines)
    lost = near[is_new] & ~np.asarray(
        pc.is_in(new["chip_id"], value_set=old["chip_id"].combine_chunks()).to_numpy()
    )
    if not lost.any():
        return planned
    why = f"chip nearer than {spec.buffer_m:g} m to another split's in the store"
    dropped: Mapping[str, int] = {**planned.dropped, why: int(lost.sum())}
    return replace(planned, table=table.filter(pa.array(~lost)), dropped=dropped)
