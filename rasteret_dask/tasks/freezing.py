# SPDX-License-Identifier: Apache-2.0
"""Planned chips become a job: how many go into a shard, and what a task of them holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips, used_records
from rasteret_dask.chipping.chiptable import FeedTable, label_fields
from rasteret_dask.chipping.frame import BLOCK_PX
from rasteret_dask.chipping.splits import split_numbers
from rasteret_dask.crs import luggage
from rasteret_dask.errors import PlanError
from rasteret_dask.formats import MEANING
from rasteret_dask.planning.plan import digest, to_json
from rasteret_dask.planning.resolve import ResolvedSource, SourcePlan
from rasteret_dask.table.records import Records
from rasteret_dask.tasks.job import Hierarchy, Job, Output
from rasteret_dask.tasks.jobfile import plan_json

__all__ = [
    "SHARD_BYTES",
    "chips_per_shard",
    "freeze",
    "freeze_part",
    "most_candidates",
    "read_records",
    "task_bytes",
]

_log = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20
"""Output of one task over all sources, at most (a single chip may be larger)."""

SHARD_CHIPS = 256
"""Chips of one task, at most."""


def freeze(chips: PlannedChips, shard_bytes: int = SHARD_BYTES) -> Job:
    """Settle shards and keep only what tasks need.

    Parameters
    ----------
    chips
        The planned chips.
    shard_bytes
        Output of one task over all sources, at most; a single chip may be larger.
    """
    per_shard = chips_per_shard(chips, most_candidates(chips.feeds), shard_bytes)
    job = _frozen(chips, per_shard)
    _log.info(
        "plan: %d chips in %d shards of at most %d chips", job.chips.num_rows, job.shard_count, per_shard
    )
    return job


def freeze_part(chips: PlannedChips, per_shard: int, first: Mapping[str | None, int]) -> Job:
    """Freeze some of the shards of a plan, under the numbers that they have in the whole.

    Parameters
    ----------
    chips
        The chips of these shards.
    per_shard
        Chips of a shard of the whole.
    first
        Split -> the number of its first shard here, for each split of the whole.
    """
    job = _frozen(chips, per_shard)
    there = {h.split: h for h in job.hierarchies}
    names = chips.split.names if chips.split else (None,)
    hierarchies, stop = [], 0
    for number, split in enumerate(names):
        if split in first:
            h = there.get(split, Hierarchy(split, number, stop, stop, per_shard))
            hierarchies.append(replace(h, first=first[split]))
            stop = h.stop
    return replace(job, hierarchies=tuple(hierarchies))


def _frozen(chips: PlannedChips, per_shard: int) -> Job:
    _check_meta(chips)
    feeds = chips.feeds
    used = [feeds.rows_of(n) for n in range(len(chips.sources))]
    tasks_records, table = read_records(chips, used)
    size_px, plans = _sizes(chips), tuple(s.plan for s in chips.sources)
    table, parts = _by_split(chips, table)
    hierarchies = tuple(Hierarchy(s, n, a, b, per_shard) for s, n, a, b in parts)
    phase = digest(
        [plan_json(p) for p in plans],
        list(size_px),
        per_shard,
        [[s, to_json(f)] for s, f in chips.maps],
        MEANING,
        *chips.pixel_rules,
        *([chips.spec.labels, chips.spec.rasterize, chips.reference] if chips.labels else []),
        *([list(chips.spec.classes)] if chips.spec.classes else []),
        *([] if chips.spec.radius_m is None else [["radius_m", float(chips.spec.radius_m)]]),
    )
    _check_names(chips)
    reaches = tuple(chips.spec.reach_m(chips.resolution, plan.name) for plan in plans)
    wkts = luggage(pc.unique(table.column("epsg")).to_pylist())
    if wkts:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **wkts})
    return Job(
        plans, size_px, hierarchies, tasks_records, table, chips.maps, phase, (), chips.pixel_rules, chips.labels,
        None if chips.cells is None else chips.cells.table,
        None if chips.fold_cells is None else chips.fold_cells.folds,
        reaches_m=reaches if any(reaches) else (),
    )  # fmt: skip


def _check_meta(chips: PlannedChips) -> None:
    """Raise PlanError where chips have a column of the same name as what they carry of each slot."""
    columns = {field.name for field in label_fields(chips.table.schema)}
    for source in chips.sources:
        both = [name for name, _ in source.plan.meta if name in columns]
        if both:
            raise PlanError(
                f"harmonize(meta=) of source {source.plan.name!r}", f"{both[0]!r}, which is a column of the chips too",
                "names that no column of at= and with_table() has", "Rename the column.",
            )  # fmt: skip


def _check_names(chips: PlannedChips) -> None:
    """Refuse a column of the user's that is called like a mask."""
    twice = {labels.name for labels in chips.labels} & {own.name for own in label_fields(chips.table.schema)}
    if twice:
        name = min(twice)
        raise PlanError(
            f"chips(rasterize=) of column {name.partition('_')[2]!r}", f"a column {name!r}, as its mask is called",
            "another name for that column", f"Rename it: gdf.rename(columns={{{name!r}: 'own_{name}'}}).",
        )  # fmt: skip


def read_records(
    chips: PlannedChips, used: Sequence[NDArray[np.int64]]
) -> tuple[tuple[Records, ...], pa.Table]:
    """Return what tasks need of each source's records, and the chip table with rows counted in those.

    Parameters
    ----------
    chips
        The chips.
    used
        Per source, the rows of its records that feed a chip.
    """
    records, members, table = used_records(chips, used)
    parts = zip(records, members, chips.sources, used, strict=True)
    return tuple(_with_passes(*part) for part in parts), table


def chips_per_shard(chips: PlannedChips, candidates: Sequence[int], shard_bytes: int = SHARD_BYTES) -> int:
    """Return how many chips go into a shard.

    Parameters
    ----------
    chips
        What the plan says of all chips.
    candidates
        For each source, how many acquisitions compete for a slot at most.
    shard_bytes
        Output of one task over all sources, at most; a single chip may be larger.
    """
    plans = tuple(s.plan for s in chips.sources)
    return _whole_blocks(chips, _per_shard(plans, _sizes(chips), candidates, shard_bytes))


def _sizes(chips: PlannedChips) -> tuple[int, ...]:
    """Return the side of a chip's window in pixels, per source."""
    wide = dict(chips.spec.context_m)
    return tuple(round(wide.get(s.plan.name, chips.size_m) / s.plan.resolution) for s in chips.sources)


def _with_passes(
    records: Records, member: NDArray[np.int64], source: ResolvedSource, used: NDArray[np.int64]
) -> Records:
    """Add each record's member, its acquisition, and when that starts."""
    number = source.passes.of_record[used]
    start = source.passes.start[number].astype("datetime64[us]").astype(np.int64)
    table = records.table
    for name, values in (("__member__", member), ("__pass__", number), ("__start__", start)):
        table = table.append_column(name, pa.array(values))
    return Records(table)


def _by_split(
    chips: PlannedChips, table: pa.Table
) -> tuple[pa.Table, list[tuple[str | None, int, int, int]]]:
    if chips.split is None:
        return table, [(None, 0, 0, table.num_rows)]
    label = split_numbers(table.column("split"), chips.split)
    order = np.argsort(label, kind="stable")
    count = np.bincount(label[label >= 0], minlength=len(chips.split.names)).tolist()
    stop = np.cumsum(count).tolist()
    parts: list[tuple[str | None, int, int, int]] = [
        (name, i, stop[i] - count[i], stop[i]) for i, name in enumerate(chips.split.names) if count[i]
    ]
    return table.take(pa.array(order[len(order) - sum(count) :])), parts


def _per_shard(
    plans: tuple[SourcePlan, ...], size_px: tuple[int, ...], most: Sequence[int], budget: int
) -> int:
    cost = sum(Output.of(s, n).chip_bytes for s, n in zip(plans, size_px, strict=True))
    work = max(_working_bytes(s, n, c) for s, n, c in zip(plans, size_px, most, strict=True))
    return int(min(max(budget // max(cost, work), 1), SHARD_CHIPS))


def _whole_blocks(chips: PlannedChips, per_shard: int) -> int:
    """Round down to the chips of whole tiles, which one shard then reads, or of whole blocks; at most half is lost."""
    if not chips.spec.in_rows:
        return per_shard
    if not chips.spec.in_tiles:
        block = (BLOCK_PX // chips.spec.stride) ** 2
        return per_shard // block * block if per_shard >= block > 0 else per_shard
    side = int(chips.outlines[chips.reference].tile_px.max()) // chips.spec.size
    row, col = (chips.table.column(name).to_numpy() // side for name in ("row", "col"))
    when = chips.table.column("datetime").cast(pa.int64()).fill_null(0).to_numpy()
    tile = np.stack([chips.table.column("epsg").to_numpy(), row, col, when], -1)
    change = np.flatnonzero(np.diff(tile, axis=0, prepend=tile[:1] - 1).any(axis=1))
    most = int(np.diff(np.append(change, len(tile))).max())  # tiles at an edge have fewer
    return per_shard if per_shard < most else per_shard // most * most


def task_bytes(job: Job, outputs: tuple[Output, ...]) -> int:
    """Return the bytes a task holds at most, beside what its process holds anyway.

    Its output, and with it either one slot as it stands in the files (16-bit numbers and two masks a pixel) and
    what its pick needs, or the chunks that the output becomes.
    """
    n = max((min(h.per_shard, h.chips) for h in job.hierarchies), default=1)
    largest = n * sum(o.chip_bytes for o in outputs)
    most = most_candidates(job.feeds)
    slot = max(
        4 * size * size * len(plan.bands) + _working_bytes(plan, size, candidates)
        for plan, size, candidates in zip(job.sources, job.size_px, most, strict=True)
    )
    return largest + max(n * slot, largest)


def _working_bytes(source: SourcePlan, size: int, candidates: int) -> int:
    """Bytes that one slot of one chip needs beside its output, while its candidates are held or summed up."""
    rules = source.rules
    return rules.pick.bytes_held(candidates, len(source.bands), rules.work_dtype().itemsize) * size * size


def most_candidates(feeds: FeedTable) -> list[int]:
    """Return for each source how many acquisitions compete for a slot at most."""
    alone = len(feeds.names) == 1
    order = [feeds.order if alone else feeds.order[feeds.source == n] for n in range(len(feeds.names))]
    return [int(own.max(initial=0)) + 1 for own in order]
