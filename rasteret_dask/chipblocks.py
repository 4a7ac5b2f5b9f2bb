"""Chips that are planned by blocks: a chip table in files, chosen from lazily, of which little is ever in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.blockfiles import BlockFacts, BlockFiles, added, whole_feeds
from rasteret_dask.chipping.blocks import BlockPlan, check_by_blocks
from rasteret_dask.chipping.chips import PlannedChips, chip_sources, labels_of, tell_of_coarse
from rasteret_dask.chipping.planblocks import PlannedBlocks, plan_blocks
from rasteret_dask.chipping.steps import check_splits, none_left, steps_of
from rasteret_dask.errors import PlanError
from rasteret_dask.formats import MEANING
from rasteret_dask.net import clusters, remote
from rasteret_dask.net.hrefs import redact
from rasteret_dask.net.places import Place
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import (
    FilterChips,
    Node,
    Predicate,
    Sample,
    Select,
    digest,
    is_number,
    outline,
    predicates,
    step_name,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.sampling import sample_unit
from rasteret_dask.planning.scan import filter_table
from rasteret_dask.show import audit, explain
from rasteret_dask.store.encode import Compression, checked
from rasteret_dask.store.layout import layout_of
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import chips_per_shard, freeze_part, read_records
from rasteret_dask.tasks.job import Job, job_digest
from rasteret_dask.tasks.jobfile import JOB_FILE, JobRef, write_job
from rasteret_dask.tasks.jobkernels import warn_of_job
from rasteret_dask.tasks.jobparts import JobOfParts, JobPart, parts_of
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from rasteret_dask.net.clusters import ClientLike

__all__ = ["ChipBlocks", "planned_by_blocks"]

MOST_CHIPS = 2_000_000
"""Chips whose table is taken into memory, at some 1.7 kB each."""

PART_CHIPS = 65_536
"""Chips of a part of a job, about: what a worker process holds of the chip table, twice or three times."""

EXPLAINED = 100_000
"""Chips that are looked at to estimate what is read."""

_ROW = "__row__"
_COORDINATES = ["chip_id", "split", "epsg", "xmin", "ymin", "xmax", "ymax"]
"""What a store's coordinates say of a chip."""


class _InMemory(Protocol):
    """Chips whose table is in memory."""

    def explain(self) -> explain.Explanation:
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
        """Keep the chips of these splits."""
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        check_splits(splits, self._blocks.planned.split)
        return self._then(Select(self.query.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> ChipBlocks[ChipsT]:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``; as :meth:`Chips.filter`."""
        where = predicates(triples, columns)
        for column, *_rest in where:
            self._check_column(f"filter on chip column {column!r}", column)
        return self._then(FilterChips(self.query.plan, where))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> ChipBlocks[ChipsT]:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``: the same ones as :meth:`Chips.sample`."""
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
        """Split -> chosen chips, ``""`` for none; nothing is read where only splits are selected."""
        if self._parent is None:
            return added(one.splits for one in self._blocks.facts)
        if isinstance(step := self.query.plan, Select):
            counts = self._parent._split_counts
            return {name: count for name, count in counts.items() if name in step.splits}
        total: dict[str, int] = {}
        for facts, rows in self._chosen():
            column = self._blocks.files.columns(facts, ["split"]).column("split").take(pa.array(rows))
            for entry in pc.value_counts(column).to_pylist():
                total[entry["values"] or ""] = total.get(entry["values"] or "", 0) + int(entry["counts"])
        return total

    @property
    def dataset(self) -> ds.Dataset:
        """The chip table of all blocks as a ``pyarrow.dataset``, before any step of this object.

        Whatever reads such a dataset (DuckDB, Polars, ``dataset.scanner()``) reads the plan.
        """
        numbers = [one.number for one in self._blocks.facts if one.chips]
        return self._blocks.files.dataset(numbers, self._blocks.planned.table.schema)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the chosen rows of the chip table, a block at a time, in the order of shards."""
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
        """
        count = len(self)
        if count > MOST_CHIPS:
            raise PlanError(
                "chip table in memory", f"{count:,} chips", f"at most {MOST_CHIPS:,}",
                "Choose some: select, filter, sample; or take tables() one by one, or dataset.",
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
        """
        table = self.table
        if not table.num_rows:
            assert self._parent is not None  # all blocks together have chips
            splits = {name: count for name, count in self._parent._split_counts.items() if name}
            raise none_left(self.query.plan, len(self._parent), splits)
        return self._small(self.query, replace(self._blocks.planned, table=table))

    @property
    def _unselected(self) -> ChipBlocks[ChipsT]:
        """These chips before trailing selects."""
        blocks = self
        while isinstance(blocks.query.plan, Select) and blocks._parent is not None:
            blocks = blocks._parent
        return blocks

    def audit(self) -> audit.Audit:
        """Check the splits, as :meth:`Chips.audit`, two neighbouring blocks at a time."""
        own = self._unselected
        grounds = [
            audit.BlockGround(facts.epsg, facts.bounds, partial(own._rows_of, facts, rows))
            for facts, rows in own._chosen()
            if facts.bounds is not None
        ]
        return audit.audit_blocks(self._blocks.planned, grounds)

    def explain(self) -> explain.Explanation:
        """Say what the job will do, before anything is read.

        Of more than 100,000 chips, chips, splits, shards and bytes to write are counted; what is read is estimated
        from blocks that hold some 100,000, evenly taken.
        """
        count = len(self)
        if count <= EXPLAINED:
            return self.to_chips().explain()
        chosen = list(self._chosen())
        step = max(1, round(len(chosen) * EXPLAINED / count))
        some = [chosen[int((i + 0.5) * len(chosen) / step)] for i in range(step)]
        names = self._blocks.planned.table.column_names
        table = whole_feeds(
            pa.concat_tables([self._rows_of(facts, rows, names) for facts, rows in some]),
            self._blocks.planned.sources,
        )
        told = self._small(self.query, replace(self._blocks.planned, table=table)).explain()
        candidates = [max(one) for one in zip(*(f.candidates for f in self._blocks.facts), strict=True)]
        return told.scaled(
            self._split_counts, chips_per_shard(self._blocks.planned, candidates), self._used()
        )

    def job_parts(self, chips: int = PART_CHIPS) -> Iterator[Job]:
        """Freeze the plan part by part: shards are numbered over all, and each is in one part, with its own key.

        Parameters
        ----------
        chips
            About how many chips a part has: what is in memory at a time.

        Raises
        ------
        PlanError
            When chips were chosen otherwise than by their splits.
        """
        if self._unselected._parent is not None:
            raise PlanError(
                "job_parts", "a filter or a sample after by_blocks", "all chips of the plan, or of some splits",
                "Filter before by_blocks; or take some into memory: to_chips().",
            )  # fmt: skip
        planned, names = self._blocks.planned, self._blocks.planned.table.column_names
        split = planned.split
        every = self._split_counts
        counts: dict[str | None, int] = (
            {None: sum(every.values())}
            if split is None
            else {n: every[n] for n in split.names if every.get(n)}
        )
        per_shard = chips_per_shard(planned, self._candidates)
        facts = self._blocks.facts
        ends = {
            name: np.cumsum([0, *(one.chips if name is None else one.splits.get(name, 0) for one in facts)])
            for name in counts
        }
        for spans in parts_of(counts, per_shard, chips):
            tables = []
            for at, one in enumerate(facts):
                within = [
                    (span.split, *np.clip([span.start, span.stop] - ends[span.split][at], 0, None).tolist())
                    for span in spans
                    if span.start < ends[span.split][at + 1] and span.stop > ends[span.split][at]
                ]
                if within:
                    table = self._blocks.files.columns(one, names)
                    for name, start, stop in within:
                        rows = table if name is None else table.filter(pc.equal(table.column("split"), name))
                        tables.append(rows.slice(start, stop - start))
            table = whole_feeds(pa.concat_tables(tables), planned.sources)
            yield freeze_part(replace(planned, table=table), per_shard, {s.split: s.first for s in spans})

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
    ) -> None:
        """Write all chips of the plan to a store, as :meth:`Chips.to_zarr` does; a rerun does what is missing.

        Tasks read parts of some 65,536 chips, which are frozen first, beside the plan: workers must reach its folder.
        The client holds what a store's coordinates say of a chip (some 500 bytes), but no part of its feeds.

        Parameters
        ----------
        store, client, progress, compression, on_error
            As in :meth:`Chips.to_zarr`.

        Raises
        ------
        PlanError
            When some of the chips were chosen: take them into memory, ``to_chips()``.
        """
        from rasteret_dask.store.run import run_zarr

        if self._parent is not None:
            raise PlanError(
                "to_zarr of a plan by blocks", f"a {step_name(self.query.plan)} after by_blocks",
                "all chips of the plan",
                "Put the step before by_blocks; or take some chips into memory: to_chips().to_zarr(...).",
            )  # fmt: skip
        place = Place.of(store).folder("a folder, or nothing yet", "Choose another place.")
        used = [
            np.unique(np.concatenate([np.array(one.used[n], dtype=np.int64) for one in self._blocks.facts]))
            for n in range(len(self._blocks.planned.sources))
        ]
        rows = list(zip(self._blocks.planned.sources, used, strict=True))
        layout = layout_of(self._frozen(used), rows, self.query)
        context = ReadContext(self.query.functions, on_error)
        run_zarr(replace(layout, compression=checked(compression)), place, context, client, progress)

    def _frozen(self, used: Sequence[NDArray[np.int64]]) -> JobOfParts:
        """Freeze all parts, beside the plan, and return what they are together."""
        folder = remote.join(self._blocks.files.url, f"job-{self._blocks.files.digest[:12]}")
        keys: dict[str, str] = {}
        parts: list[JobPart] = []
        light: dict[int, list[pa.Table]] = {}
        last: Job | None = None
        for number, job in enumerate(self.job_parts(PART_CHIPS)):
            if last is None:
                warn_of_job(job)
            last, url = job, remote.join(folder, f"{number:06d}")
            if not remote.exists(remote.join(url, JOB_FILE)):
                write_job(job, url)
            keys |= job.keys
            order = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
            parts.append(JobPart(JobRef(url, job.digest), tuple(order)))
            for h in job.hierarchies:
                light.setdefault(h.number, []).append(job.chips.select(_COORDINATES).slice(h.start, h.chips))
        if last is None:
            raise PlanError("to_zarr", "no chip that has a split", "at least one", "Change the split.")
        tables = {h.number: pa.concat_tables(light[h.number]) for h in last.hierarchies}
        stops = np.cumsum([table.num_rows for table in tables.values()]).tolist()
        hierarchies = tuple(
            replace(h, start=stop - tables[h.number].num_rows, stop=stop, first=0)
            for h, stop in zip(last.hierarchies, stops, strict=True)
        )
        planned = self._blocks.planned
        records, _ = read_records(planned, used)
        return JobOfParts(
            last.sources, last.size_px, hierarchies, records, pa.concat_tables(tables.values()), last.maps,
            last.phase, (), last.pixel_rules, last.labels, job_digest(last.phase, keys), tuple(parts), keys,
            partial(self._whole_tables, used),
        )  # fmt: skip

    def _whole_tables(self, used: Sequence[NDArray[np.int64]]) -> Iterator[pa.Table]:
        """Yield the table of chips split by split, as a store has it, a block at a time."""
        planned, names = self._blocks.planned, self._blocks.planned.table.column_names
        for split in planned.split.names if planned.split else (None,):
            for facts in self._blocks.facts:
                if not (facts.chips if split is None else facts.splits.get(split)):
                    continue
                table = self._blocks.files.columns(facts, names)
                if split is not None:
                    table = table.filter(pc.equal(table.column("split"), split))
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
        for facts, kept in zip(self._blocks.facts, self._kept, strict=True):
            rows = (
                np.arange(facts.chips)
                if kept is None
                else np.flatnonzero(np.unpackbits(kept, count=facts.chips))
            )
            if len(rows):
                yield facts, rows

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

    def __repr__(self) -> str:
        facts = self._blocks.facts
        chips, url = sum(one.chips for one in facts), redact(self._blocks.files.url)
        head = f"<ChipBlocks: {chips:,} chips in {len(facts):,} blocks at {url}>"
        return "\n".join((head, *outline(self.query.plan)))


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
    plan = BlockPlan(chip_sources(node, query.tables), steps)
    tell_of_coarse(plan.ground)
    files = BlockFiles(url, digest(query.plan, MEANING, windows))
    blocks = plan_blocks(plan, files, windows, client, progress)
    return replace(blocks, planned=replace(blocks.planned, labels=labels_of(plan.ground, query.tables)))
