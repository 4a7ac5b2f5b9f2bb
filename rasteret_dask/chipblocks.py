# SPDX-License-Identifier: Apache-2.0
"""Chips that are planned by blocks: a chip table in files, chosen from lazily, of which little is ever in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.blockfiles import BlockFacts, BlockFiles, added, whole_feeds
from rasteret_dask.chipping.blocks import BlockPlan, check_by_blocks
from rasteret_dask.chipping.chips import PlannedChips, chip_sources, labels_of, tell_of_coarse
from rasteret_dask.chipping.chiptable import FeedTable
from rasteret_dask.chipping.planblocks import PlannedBlocks, plan_blocks
from rasteret_dask.chipping.steps import check_splits, none_left, steps_of
from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.formats import MEANING
from rasteret_dask.net import clusters, remote
from rasteret_dask.net.hrefs import redact
from rasteret_dask.net.places import Place
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import (
    FilterChips,
    Folds,
    Node,
    Predicate,
    Sample,
    Select,
    Split,
    digest,
    is_number,
    predicates,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.sampling import sample_unit
from rasteret_dask.planning.scan import as_table, filter_table
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.show import audit, explain
from rasteret_dask.store.encode import Compression, checked
from rasteret_dask.store.layout import COORDINATE_CHIPS, layout_of
from rasteret_dask.store.limits import begun
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import chips_per_shard, freeze_part, most_candidates, read_records
from rasteret_dask.tasks.job import Job, job_digest
from rasteret_dask.tasks.jobfile import JOB_FILE, JobRef, write_job
from rasteret_dask.tasks.jobkernels import warn_of_job
from rasteret_dask.tasks.jobparts import JobOfParts, JobPart, PartSpan, parts_of
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from rasteret_dask.display.card import Card
    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.store.jobreport import JobReport

__all__ = ["ChipBlocks", "planned_by_blocks"]

MOST_CHIPS = 2_000_000
"""Chips whose table is taken into memory, at some :data:`CHIP_BYTES` each."""

PART_CHIPS = 65_536
"""Chips of a part of a job, about: what a worker process holds of the chip table, twice or three times."""

PART_BYTES, TABLE_BYTES, SHARD_NOTES = 200e6, 300e6, 1_500
"""Bytes that writing a plan by blocks takes here: for a part, for a million chips' coordinates, for a shard."""

CHIP_BYTES = 1_700
"""What a chip takes in memory where the whole table is."""

CHIP_SECONDS = 15e-6
"""CPU seconds of the client for each chip that is written: freezing parts, putting coordinates and the chip table."""

EXPLAINED = 100_000
"""Chips that are looked at to estimate what is read."""

_ROW = "__row__"
_COORDINATES = ["chip_id", "split", "epsg", "xmin", "ymin", "xmax", "ymax"]
"""What a store's coordinates say of a chip."""


class _InMemory(Protocol):
    """Chips whose table is in memory."""

    def explain(
        self, workers: int | None, threads: int, *, probe: bool, rate: str | float | JobReport | None
    ) -> explain.Explanation:
        """Say what the job will do."""


ChipsT = TypeVar("ChipsT", bound=_InMemory)


class ChipBlocks(Generic[ChipsT]):
    """Chips whose table lies in Arrow files, a file a block of ground; made by :meth:`Chips.by_blocks`.

    Steps are lazy: a column that decides is read block by block, and the client keeps a bit a chip of it.

    Parameters
    ----------
    query
        The plan, with the tables and the user's functions that it names.
    blocks
        The planned blocks.
    small
        Makes chips of a plan and a chip table in memory.
    parent
        The chips that the plan's last step is applied to; None: those of all blocks.

    Examples
    --------
    >>> plan = chips.by_blocks("plan", progress=False)
    >>> some = plan.select("train").filter("coverage", ">", 0.99)
    >>> len(some) < len(plan)
    True
    >>> report = some.to_zarr("train.zarr", progress=False)
    >>> len(rd.open_chips("train.zarr")) == len(some)
    True
    >>> some.sample(10).to_chips().table.num_rows
    10
    """

    def __init__(
        self,
        query: Query,
        blocks: PlannedBlocks,
        small: Callable[[Query, PlannedChips], ChipsT],
        parent: ChipBlocks[ChipsT] | None = None,
    ) -> None:
        self.query, self._blocks, self._small, self._parent = query, blocks, small, parent

    # Steps

    def select(self, *splits: str) -> ChipBlocks[ChipsT]:
        """Keep the chips of these splits.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> len(plan.select("val")) == len(chips.select("val"))
        True
        """
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        check_splits(splits, self._blocks.planned.split)
        return self._then(Select(self.query.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> ChipBlocks[ChipsT]:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``; as :meth:`Chips.filter`.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> len(plan.filter(("ymax", "<", 5_558_000)))
        56
        """
        where = predicates(triples, columns)
        for column, *_rest in where:
            self._check_column(f"filter on chip column {column!r}", column)
        return self._then(FilterChips(self.query.plan, where))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> ChipBlocks[ChipsT]:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``: the same ones as :meth:`Chips.sample`.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> len(plan.sample(5, by="split"))
        15
        """
        if n < 0:
            raise PlanError("sample(n=)", repr(n), "0 or more")
        if by is not None:
            self._check_column("sample(by=)", by)
        return self._then(Sample(self.query.plan, n, seed, by))

    def _check_column(self, subject: str, column: str) -> None:
        names = self._blocks.planned.table.column_names
        if column not in names:
            raise PlanError(subject, "no such column", f"one of {', '.join(names)}")

    def _then(self, step: Node) -> ChipBlocks[ChipsT]:
        return ChipBlocks(self.query.then(step), self._blocks, self._small, self)

    # What it is

    def __len__(self) -> int:
        return sum(self._split_counts.values())

    @cached_property
    def _split_counts(self) -> dict[str, int]:
        """Split -> chosen chips, ``""`` for none."""
        return added(iter(self._block_splits))

    @cached_property
    def _block_splits(self) -> tuple[Mapping[str, int], ...]:
        """The same of each block; nothing is read where only splits are selected."""
        if self._parent is None:
            return tuple(facts.splits for facts in self._blocks.facts)
        if isinstance(step := self.query.plan, Select):
            return tuple(
                {name: count for name, count in splits.items() if name in step.splits}
                for splits in self._parent._block_splits
            )
        result: list[dict[str, int]] = [{} for _ in self._blocks.facts]
        for at, rows in self._chosen_at():
            column = self._blocks.files.columns(self._blocks.facts[at], ["split"]).column("split")
            for entry in pc.value_counts(column.take(pa.array(rows))).to_pylist():
                result[at][entry["values"] or ""] = int(entry["counts"])
        return tuple(result)

    @property
    def dataset(self) -> ds.Dataset:
        """The chip table of all blocks as a ``pyarrow.dataset``, before any step of this object.

        Whatever reads such a dataset (DuckDB, Polars, ``dataset.scanner()``) reads the plan.

        Examples
        --------
        >>> dataset = chips.by_blocks("plan", progress=False).dataset
        >>> dataset.count_rows() == len(chips)
        True
        """
        numbers = [one.number for one in self._blocks.facts if one.chips]
        return self._blocks.files.dataset(numbers, self._blocks.planned.table.schema)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the chosen rows of the chip table, a block at a time, in the order of shards.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> sum(table.num_rows for table in plan.tables()) == len(chips)
        True
        """
        names = self._blocks.planned.table.column_names
        for facts, rows in self._chosen():
            yield whole_feeds(self._rows_of(facts, rows, names), self._blocks.planned.sources)

    @property
    def table(self) -> pa.Table:
        """The chip table of the chosen chips, in memory.

        Raises
        ------
        PlanError
            When there are more than two million of them.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> plan.table["chip_id"].equals(chips.table["chip_id"])
        True
        """
        count = len(self)
        if count > MOST_CHIPS:
            raise PlanError(
                "chip table in memory", f"{count:,} chips, some {count * CHIP_BYTES / 1e9:.1f} GB",
                f"at most {MOST_CHIPS:,}",
                "Choose some: select, filter, sample; or take tables() one by one, or dataset; to_zarr needs no table.",
            )  # fmt: skip
        names = self._blocks.planned.table.column_names
        parts = [
            self._blocks.files.columns(facts, names).take(pa.array(rows)) for facts, rows in self._chosen()
        ]
        if not parts:
            return self._blocks.planned.table
        return whole_feeds(pa.concat_tables(parts), self._blocks.planned.sources)

    def to_chips(self) -> ChipsT:
        """Return the chosen chips as :class:`Chips`, whose table is in memory: for any exit, and any further step.

        Raises
        ------
        PlanError
            When no chip is left, or more than two million.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> plan.select("val").to_chips().load()["pixels"].sizes["chip"]
        9
        """
        self._check_some()
        table = self.table
        return self._small(self.query, replace(self._blocks.planned, table=table))

    def _check_some(self) -> None:
        if not len(self):
            assert self._parent is not None  # all blocks together have chips
            splits = {name: count for name, count in self._parent._split_counts.items() if name}
            raise none_left(self.query.plan, len(self._parent), splits)

    @property
    def _unselected(self) -> ChipBlocks[ChipsT]:
        """These chips before trailing selects."""
        blocks = self
        while isinstance(blocks.query.plan, Select) and blocks._parent is not None:
            blocks = blocks._parent
        return blocks

    def audit(self) -> audit.Audit:
        """Check the splits, as :meth:`Chips.audit`, two neighbouring blocks at a time.

        Examples
        --------
        >>> chips.by_blocks("plan", progress=False).audit().ok
        True
        """
        own = self._unselected
        grounds = [
            audit.BlockGround(facts.epsg, facts.bounds, partial(own._rows_of, facts, rows))
            for facts, rows in own._chosen()
            if facts.bounds is not None
        ]
        return audit.audit_blocks(self._blocks.planned, grounds)

    def explain(
        self,
        workers: int | None = None,
        threads: int = 1,
        *,
        probe: bool = False,
        rate: str | float | JobReport | None = None,
    ) -> explain.Explanation:
        """Say what the job will do, before anything is read.

        Of more than 100,000 chips, chips, splits, shards and bytes to write are counted; what is read, and how long
        that takes, is estimated from blocks that hold some 100,000, evenly taken. How much of the ground lies in a chip
        is not computed: ``["ground"]`` is None. ``client`` says what this process
        takes, beside its imports and the records.

        Parameters
        ----------
        workers, threads, probe, rate
            As in :meth:`Chips.explain`.

        Raises
        ------
        PlanError, ReadError
            As in :meth:`Chips.explain`.

        Examples
        --------
        >>> chips.by_blocks("plan", progress=False).explain()["chips"] == len(chips)
        True
        """
        count = len(self)
        if count <= EXPLAINED:
            return self.to_chips().explain(workers, threads, probe=probe, rate=rate)
        chosen = list(self._chosen())
        step = max(1, round(len(chosen) * EXPLAINED / count))
        some = [chosen[int((i + 0.5) * len(chosen) / step)] for i in range(step)]
        names = self._blocks.planned.table.column_names
        table = whole_feeds(
            pa.concat_tables([self._rows_of(facts, rows, names) for facts, rows in some]),
            self._blocks.planned.sources,
        )
        part = self._small(self.query, replace(self._blocks.planned, table=table))
        told = part.explain(workers, threads, probe=probe, rate=rate)
        whole = told.scaled(self._split_counts, self._per_shard, self._used())
        written = (
            PART_BYTES + TABLE_BYTES * min(count, COORDINATE_CHIPS) / 1e6 + SHARD_NOTES * whole["shards"]
        )
        client = {
            "to_zarr_bytes": round(written),
            "to_zarr_cpu_s": round(count * CHIP_SECONDS),
            "to_chips_bytes": round(count * CHIP_BYTES),
        }
        return explain.Explanation({**whole.facts, "client": client})

    def job_parts(self, chips: int = PART_CHIPS) -> Iterator[Job]:
        """Freeze the plan part by part: shards are numbered over all, and each is in one part, with its own key.

        Parameters
        ----------
        chips
            About how many chips a part has: what is in memory at a time.

        Raises
        ------
        PlanError
            When no chip is left.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> sum(job.chips.num_rows for job in plan.job_parts(chips=64)) == len(chips)
        True
        """
        for _, job in self._parts(chips):
            yield job

    def _parts(self, chips: int) -> Iterator[tuple[PlannedChips, Job]]:
        """Yield the chips of each part, and their job."""
        self._check_some()
        planned, per_shard = self._blocks.planned, self._per_shard
        for spans in parts_of(self._job_counts, per_shard, chips):
            table = whole_feeds(self._rows_in(spans, planned.table.column_names), planned.sources)
            part = replace(planned, table=table)
            yield part, freeze_part(part, per_shard, {span.split: span.first for span in spans})

    @property
    def _job_counts(self) -> dict[str | None, int]:
        """Split -> chips, of those splits that have some; None where there are no splits."""
        counts, split = self._split_counts, self._blocks.planned.split
        if split is None:
            return {None: sum(counts.values())}
        return {name: counts[name] for name in split.names if counts.get(name)}

    @cached_property
    def _ends(self) -> Mapping[str | None, NDArray[np.int64]]:
        """Split -> shape (block + 1,): how many of its chips lie before each block."""
        return {
            name: np.cumsum(
                [0, *(sum(s.values()) if name is None else s.get(name, 0) for s in self._block_splits)]
            )
            for name in self._job_counts
        }

    def _rows_in(self, spans: Sequence[PartSpan], names: Sequence[str]) -> pa.Table:
        """Return some columns of chosen chips, block by block; of each split those of its span, in their order."""
        tables = [self._blocks.planned.table.select(list(names))]
        base = self._unselected  # what is selected is left out by its split
        kept = (None,) * len(self._blocks.facts) if base._parent is None else base._kept
        first, last = (
            min(self._block_of(s, s.start) for s in spans),
            max(self._block_of(s, s.stop - 1) for s in spans),
        )
        for at in range(first, last + 1):
            within = [
                (span.split, *np.clip([span.start, span.stop] - self._ends[span.split][at], 0, None).tolist())
                for span in spans
                if span.start < self._ends[span.split][at + 1] and span.stop > self._ends[span.split][at]
            ]
            if not within:
                continue
            facts, bits = self._blocks.facts[at], kept[at]
            table = self._blocks.files.columns(facts, list(dict.fromkeys([*names, "split"])))
            if bits is not None:
                table = table.take(pa.array(np.flatnonzero(np.unpackbits(bits, count=facts.chips))))
            for name, start, stop in within:
                rows = table if name is None else table.filter(pc.equal(table.column("split"), name))
                tables.append(rows.slice(start, stop - start).select(list(names)))
        return pa.concat_tables(tables)

    def _block_of(self, span: PartSpan, chip: int) -> int:
        """Return the block that a chip of a span's split lies in."""
        at = int(np.searchsorted(self._ends[span.split], chip, side="right")) - 1
        return min(max(at, 0), len(self._blocks.facts) - 1)

    @cached_property
    def _per_shard(self) -> int:
        """Chips of a shard; feeds are read only where it depends on how many candidates the chosen chips have."""
        planned, most = self._blocks.planned, self._candidates
        per_shard = chips_per_shard(planned, most)
        base = self._unselected  # shards of a split are those of the plan with all splits
        if base._parent is None or per_shard == chips_per_shard(planned, [1] * len(most)):
            return per_shard
        found = [1] * len(most)
        for facts, rows in base._chosen():
            if any(count < here for count, here in zip(found, facts.candidates, strict=True)):
                table = whole_feeds(self._rows_of(facts, rows, ["feeds"]), planned.sources)
                found = [max(pair) for pair in zip(found, most_candidates(FeedTable.of(table)), strict=True)]
        return chips_per_shard(planned, found)

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chosen chips to a store, as :meth:`Chips.to_zarr` does; a rerun does what is missing.

        Tasks read parts of some 65,536 chips, which are frozen first, beside the plan: workers must reach its folder.
        The store is the one that ``to_chips().to_zarr(store)`` writes, byte for byte, for any number of chips: the
        client holds a part, or a million chips' coordinates, at a time.

        Parameters
        ----------
        store, client, progress, compression, on_error, limits
            As in :meth:`Chips.to_zarr`.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips.

        Raises
        ------
        PlanError
            When no chip is left.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> report = plan.select("val").to_zarr("val.zarr", progress=False)
        >>> len(rd.open_chips("val.zarr"))
        9
        """
        from rasteret_dask.store.run import run_zarr

        place = Place.of(store).folder("a folder, or nothing yet", "Choose another place.")
        with begun(limits) as bounds:
            job, used = self._frozen()
            planned = self._blocks.planned
            layout = layout_of(
                job, list(zip(planned.sources, used, strict=True)), self.query, planned.dropped
            )
            layout = replace(layout, compression=checked(compression))
            context = ReadContext(self.query.functions, on_error)
            return run_zarr(layout, place, context, client, progress, bounds)

    def _frozen(self) -> tuple[JobOfParts, list[NDArray[np.int64]]]:
        """Freeze all parts, beside the plan; return what they are together, and the records that feed each source."""
        files, planned = self._blocks.files, self._blocks.planned
        name = digest(self.query.plan, files.digest, self._per_shard, PART_CHIPS)
        folder = remote.join(files.url, f"job-{name[:12]}")
        keys: dict[str, str] = {}
        parts: list[JobPart] = []
        feeding = [np.zeros(len(source.records), dtype=bool) for source in planned.sources]
        last: Job | None = None
        for number, (chips, job) in enumerate(self._parts(PART_CHIPS)):
            if last is None:
                warn_of_job(job)
            last, url = job, remote.join(folder, f"{number:06d}")
            if not remote.exists(remote.join(url, JOB_FILE)):
                write_job(job, url)
            keys |= job.keys
            order = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
            parts.append(JobPart(JobRef(url, job.digest), tuple(order)))
            feeds = chips.feeds
            for source, rows in enumerate(feeding):
                rows[feeds.rows_of(source)] = True
        if last is None:
            raise PlanError("to_zarr", "no chip that has a split", "at least one", "Change the split.")
        counts, stop = self._job_counts, 0
        hierarchies = []
        for h in last.hierarchies:
            start, stop = stop, stop + counts[h.split]
            hierarchies.append(replace(h, start=start, stop=stop, first=0))
        used = [np.flatnonzero(rows) for rows in feeding]
        records, empty = read_records(planned, used)
        job = JobOfParts(
            last.sources, last.size_px, tuple(hierarchies), records, empty, last.maps, last.phase, (),
            last.pixel_rules, last.labels, last.split_cells, last.fold_cells, job_digest(last.phase, keys),
            last.reaches_m, parts=tuple(parts), part_keys=keys, tables=partial(self._whole_tables, used),
            rows=lru_cache(maxsize=1)(self._coordinates),
        )  # fmt: skip
        return job, used

    def _coordinates(self, split: str | None, start: int, stop: int) -> pa.Table:
        """Return what a store's coordinates say of some chips, counted within their split."""
        return self._rows_in([PartSpan(split, 0, start, stop)], _COORDINATES)

    def _whole_tables(self, used: Sequence[NDArray[np.int64]]) -> Iterator[pa.Table]:
        """Yield the table of chips split by split, as a store has it, a block at a time."""
        planned = self._blocks.planned
        for split, ends in self._ends.items():
            for start, stop in pairwise(ends.tolist()):
                if start < stop:
                    table = self._rows_in([PartSpan(split, 0, start, stop)], planned.table.column_names)
                    part = replace(planned, table=whole_feeds(table, planned.sources))
                    yield read_records(part, used)[1]

    @property
    def _candidates(self) -> list[int]:
        """For each source, how many acquisitions compete for a slot at most."""
        return [max(one) for one in zip(*(facts.candidates for facts in self._blocks.facts), strict=True)]

    def _used(self) -> dict[str, int]:
        """Return per source how many records feed a chip of any block."""
        result = {}
        for number, source in enumerate(self._blocks.planned.sources):
            used = np.zeros(len(source.records), dtype=bool)
            for facts in self._blocks.facts:
                used[list(facts.used[number])] = True
            result[source.plan.name] = int(used.sum())
        return result

    def _rows_of(self, facts: BlockFacts, rows: NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        return self._blocks.files.columns(facts, names).take(pa.array(rows))

    def _chosen(self) -> Iterator[tuple[BlockFacts, NDArray[np.int64]]]:
        """Yield the blocks that have chosen chips, and their rows."""
        for at, rows in self._chosen_at():
            yield self._blocks.facts[at], rows

    def _chosen_at(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for at, (facts, kept) in enumerate(zip(self._blocks.facts, self._kept, strict=True)):
            rows = (
                np.arange(facts.chips)
                if kept is None
                else np.flatnonzero(np.unpackbits(kept, count=facts.chips))
            )
            if len(rows):
                yield at, rows

    @cached_property
    def _kept(self) -> tuple[NDArray[np.uint8] | None, ...]:
        """For each block, a bit a chip: whether it is chosen; None: all are."""
        if self._parent is None:
            return (None,) * len(self._blocks.facts)
        rows: dict[int, NDArray[np.int64]] = {}
        match self.query.plan:
            case Sample(_, n, seed, by):
                rows = self._sampled(n, seed, by)
            case FilterChips(_, where):
                for facts, table in self._parent._columns(list(dict.fromkeys(c for c, *_ in where))):
                    rows[facts.number] = filter_table(table, where, "chips").column(_ROW).to_numpy()
            case Select(_, splits):
                names = pa.array(list(splits))
                for facts, table in self._parent._columns(["split"]):
                    chosen = pc.is_in(table.column("split"), value_set=names)
                    rows[facts.number] = table.column(_ROW).filter(chosen).to_numpy()
        bits = []
        for facts in self._blocks.facts:
            chosen = np.zeros(facts.chips, dtype=bool)
            chosen[rows.get(facts.number, [])] = True
            bits.append(np.packbits(chosen))
        return tuple(bits)

    def _columns(self, names: list[str]) -> Iterator[tuple[BlockFacts, pa.Table]]:
        """Yield some columns of the chosen chips, a block at a time, with their rows in the block."""
        for facts, rows in self._chosen():
            at = pa.array(rows)
            table = self._blocks.files.columns(facts, names)
            yield facts, (table if len(rows) == facts.chips else table.take(at)).append_column(_ROW, at)

    def _sampled(self, n: int, seed: int, by: str | None) -> dict[int, NDArray[np.int64]]:
        """Return the rows of the ``n`` smallest hashes of each stratum, per block, as ``sample_rows`` does."""
        assert self._parent is not None
        best: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
        for facts, table in self._parent._columns(["chip_id", *([] if by in (None, "chip_id") else [by])]):
            rank = sample_unit(table.column("chip_id"), seed)
            place = (np.int64(facts.number) << 32) + table.column(_ROW).to_numpy()
            values = np.array([""] if by is None else [str(v) for v in table.column(by).to_pylist()])
            strata, stratum = np.unique(values, return_inverse=True)
            for number, name in enumerate(strata.tolist()):
                own = slice(None) if by is None else stratum == number
                before = best.get(name, (np.zeros(0), np.zeros(0, dtype=np.int64)))
                ranks, places = np.append(before[0], rank[own]), np.append(before[1], place[own])
                order = np.argsort(ranks, kind="stable")[:n]
                best[name] = ranks[order], places[order]
        places = (
            np.sort(np.concatenate([p for _, p in best.values()])) if best else np.zeros(0, dtype=np.int64)
        )
        block, row = places >> 32, places & 0xFFFFFFFF
        return {int(number): row[block == number] for number in np.unique(block)}

    @property
    def _card(self) -> Card:
        from rasteret_dask.show.cards import BlocksFacts, blocks_card

        told = [one for one in self._blocks.facts if one.bounds is not None]
        facts = BlocksFacts(
            self._blocks.files.url,
            self._split_counts if self._is_counted else None,
            sum(one.chips for one in told),
            [(one.epsg, one.bounds) for one in told if one.bounds is not None],
        )
        return blocks_card(self.query, self._blocks.planned, facts)

    @property
    def _is_counted(self) -> bool:
        """Whether chips of each split can be told without reading a file."""
        if self._parent is None or "_block_splits" in vars(self):
            return True
        return isinstance(self.query.plan, Select) and self._parent._is_counted

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def planned_by_blocks(
    query: Query, folder: str | os.PathLike[str], windows: int, client: ClientLike, progress: bool
) -> PlannedBlocks:
    """Plan by blocks: see :meth:`Chips.by_blocks`."""
    if not is_number(windows) or windows < 1:
        raise PlanError("by_blocks(windows=)", repr(windows), "1 or more")
    clusters.check(client, "by_blocks(client=)")
    node, steps = steps_of(optimize(query.plan))
    check_by_blocks(node.spec, steps)
    url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
    if url.startswith(("http://", "https://")):  # before it is asked for what it will not take
        raise StoreError(
            f"plan {redact(url)}", "a web server", "a store: a local path, s3://, gs:// or az://",
            "Web servers are only read from; they neither list nor take files.",
        )  # fmt: skip
    ground = chip_sources(node, query.tables)
    tell_of_coarse(ground)
    labels = labels_of(ground, query.tables)
    specs = [step.spec for step in steps if isinstance(step, Split | Folds)]
    tokens = {
        token for spec in specs for token in (spec.cells, spec.raster, spec.regions) if token is not None
    }
    burned = any(spec.stratify == (one.column,) for spec in specs for one in labels)
    plan = BlockPlan(
        ground, steps, {token: as_table(query.tables[token]) for token in tokens}, labels if burned else ()
    )
    files = BlockFiles(url, digest(query.plan, MEANING, windows))
    blocks = plan_blocks(plan, files, windows, client, progress)
    dealt = next((step.spec for step in reversed(steps) if isinstance(step, Split)), None)
    split = dealt if dealt is not None and (dealt.stratify or dealt.gap) else blocks.planned.split
    return replace(blocks, planned=replace(blocks.planned, labels=labels, split=split))
