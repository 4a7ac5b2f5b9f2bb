# SPDX-License-Identifier: Apache-2.0
"""The chip table of a plan as Arrow files, one a block: written by whoever plans the block, read by column."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from rasteret_dask.chipping.blocks import BlockPlan, PlanBlock
from rasteret_dask.chipping.celltable import CellTable
from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FeedTable, bounds_of, replaced
from rasteret_dask.chipping.splits import FEW_CELLS
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.remotefs import filesystem
from rasteret_dask.net.sums import crc32_of, document_of, sealed
from rasteret_dask.planning.plan import Folds, Split
from rasteret_dask.planning.resolve import ResolvedSource

__all__ = ["BlockFacts", "BlockFiles", "whole_feeds", "write_block"]

BEGUN = "begun.json"
"""Which plan the folder holds: put before anything else."""
ROOT = "blocks.json"
"""What is put last: a folder with it is a whole plan."""
ROWS = 16_384
"""Rows that are read together, at least."""


@dataclass(frozen=True)
class BlockFacts:
    """What a planned block says of itself: all that is kept of it in memory."""

    number: int
    windows: int
    """Candidate windows."""
    counts: tuple[dict[str, int], ...]
    """Split -> chips, ``""`` for none: as they were laid, and after each step."""
    dropped: dict[str, int]
    """Windows and chips that were left out, by reason."""
    used: tuple[tuple[int, ...], ...]
    """For each source, the rows of its records that feed chips."""
    candidates: tuple[int, ...]
    """For each source, how many acquisitions compete for a slot at most."""
    cells: tuple[str, ...]
    """Split cells that were laid out, the first few."""
    epsg: int
    bounds: tuple[float, float, float, float] | None
    """xmin, ymin, xmax, ymax of its chips; None where there are none."""
    nbytes: int
    crc32: int
    dealt: dict[str, str] = field(default_factory=dict)
    """Split cell -> its split, where a table of cells decides, of cells that are not in it."""
    dealt_folds: dict[str, str] = field(default_factory=dict)
    """The same of folds."""
    nulls: tuple[str, ...] = ()
    """Columns that steps add, such as ``fold``, of which some chip has none."""

    @property
    def splits(self) -> dict[str, int]:
        """Split -> chips, ``""`` for none."""
        return self.counts[-1]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return sum(self.splits.values())

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> BlockFacts:
        """Return facts that were written as JSON."""
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        lists["used"] = tuple(map(tuple, values["used"]))
        return cls(**{**values, **lists})


def write_block(plan: BlockPlan, block: PlanBlock, url: str, digest: str) -> BlockFacts:
    """Plan a block and write its part of the chip table; one that is there already is only looked at.

    Parameters
    ----------
    plan
        What it is planned with.
    block
        The block.
    url
        The folder.
    digest
        What the plan is known by.
    """
    files = BlockFiles(url, digest)
    there = files.facts(block.number)
    if there is not None:
        return there
    frame = block.frame(plan.ground)
    made = plan.carried_out(plan.ground.lay(frame))
    before = next((at for at, step in enumerate(plan.steps) if isinstance(step, Split | Folds)), 0)
    few = max([FEW_CELLS, *(len(step.spec.ratios) for step in plan.steps if isinstance(step, Folds))])
    table = made[-1].table.combine_chunks()
    feeds = FeedTable.of(table)
    sources = range(len(plan.ground.sources))
    table = replaced(table, "feeds", _narrow(feeds))
    data = _ipc(table)
    box = bounds_of(table)
    facts = BlockFacts(
        block.number,
        len(frame),
        tuple(_by_split(step) for step in made),
        dict(made[-1].dropped),
        tuple(tuple(feeds.rows_of(n).tolist()) for n in sources),
        tuple(int(feeds.order[feeds.source == n].max(initial=0)) + 1 for n in sources),
        tuple(pc.unique(made[before].table.column("cell")).to_pylist()[:few]),
        block.zone,
        (*box[:, :2].min(0).tolist(), *box[:, 2:].max(0).tolist()) if len(box) else None,
        len(data),
        crc32_of(data),
        _further(made[-1].cells, plan, Split),
        _further(made[-1].fold_cells, plan, Folds),
        _with_nulls(made),
    )
    files.put(facts, data)
    return facts


def _further(cells: CellTable | None, plan: BlockPlan, kind: type[Split | Folds]) -> dict[str, str]:
    """Return the cells of a table, and what they were dealt to, that the table of the plan does not have."""
    tokens = [
        step.spec.cells for step in plan.steps if isinstance(step, kind) and step.spec.cells is not None
    ]
    if cells is None or not tokens:
        return {}
    fresh = pc.invert(
        pc.is_in(
            cells.table.column("cell"), value_set=plan.tables[tokens[-1]].column("cell").combine_chunks()
        )
    )
    rows = cells.table.filter(fresh)
    return dict(zip(rows.column("cell").to_pylist(), rows.column("split").to_pylist(), strict=True))


def _with_nulls(made: Sequence[PlannedChips]) -> tuple[str, ...]:
    """Return the columns that steps add of which some chip has none, as they were added."""
    names = [name for name in made[-1].table.column_names if name not in CHIP_SCHEMA.names]
    tables = [step.table for step in made]
    return tuple(n for n in names if any(t.column(n).null_count for t in tables if n in t.column_names))


def _by_split(chips: PlannedChips) -> dict[str, int]:
    counted = pc.value_counts(chips.table.column("split")).to_pylist()
    return {entry["values"] or "": int(entry["counts"]) for entry in counted}


def _narrow(feeds: FeedTable) -> pa.ListArray:
    """Return the column with the ids of those records only that feed a chip."""
    flat = feeds.to_arrow().flatten()
    record = flat.field("record").dictionary_decode().dictionary_encode()
    parts = (
        [flat.field(n) for n in ("source", "slot", "order")]
        + [record]
        + [flat.field(n) for n in ("row", "coverage")]
    )
    struct = pa.StructArray.from_arrays(parts, fields=list(flat.type))
    return pa.ListArray.from_arrays(pa.array(feeds.offsets.astype(np.int32)), struct)


def _ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=ROWS)
    return sink.getvalue()


def whole_feeds(table: pa.Table, sources: Sequence[ResolvedSource]) -> pa.Table:
    """Return rows of several blocks with one dictionary of record ids, that of a plan made in one piece."""
    chunks = [
        FeedTable.of(pa.table({"feeds": chunk})) for chunk in table.column("feeds").chunks if len(chunk)
    ]
    names = tuple(s.plan.name for s in sources)
    ids = tuple(tuple(s.records.ids) for s in sources)
    ends = np.cumsum([0, *(int(f.offsets[-1]) for f in chunks)])
    offsets = np.concatenate([[0], *(f.offsets[1:] + end for f, end in zip(chunks, ends, strict=False))])
    source, slot, order, row, share = (
        np.concatenate([*(getattr(f, n) for f in chunks), np.zeros(0, dtype=kind)])
        for n, kind in (("source", "i1"), ("slot", "i2"), ("order", "i2"), ("row", "i4"), ("share", "f4"))
    )
    return replaced(
        table, "feeds", FeedTable(offsets, source, slot, order, row, share, names, ids).to_arrow()
    )


@dataclass(frozen=True, slots=True)
class BlockFiles:
    """A folder of planned blocks."""

    url: str
    digest: str
    """What the plan is known by."""
    schema: pa.Schema | None = None
    """Of the whole chip table, which says whether a column has nulls in any block; None: it is not whole yet."""

    def name(self, number: int) -> str:
        """Return the name of a block's file."""
        return f"chips-{number:06d}.arrow"

    def begin(self, about: Mapping[str, Any]) -> None:
        """Take the folder for this plan.

        Raises
        ------
        StoreError
            When it holds another plan, or something else.
        """
        subject = f"plan {remote.redact(self.url)}"
        try:
            note = document_of(remote.get(remote.join(self.url, BEGUN)))
        except remote.MissingError:
            if remote.listing(self.url):
                raise StoreError(
                    subject, "a folder with something else", "an empty folder, or one of this plan",
                    "Choose another one.",
                ) from None  # fmt: skip
            remote.put(remote.join(self.url, BEGUN), sealed({**about, "digest": self.digest}))
            return
        if note is None or note.get("digest") != self.digest:
            other = (
                "a damaged begun.json" if note is None else f"another plan ({str(note.get('digest'))[:12]})"
            )
            raise StoreError(
                subject, other, f"this one ({self.digest[:12]})",
                "Choose another folder, or delete what lies in this one.",
            )  # fmt: skip

    def summary(self, step: int) -> pa.Table | None:
        """Return what a step needs to know of all chips, where that was settled; None where it was not."""
        try:
            note = document_of(remote.get(remote.join(self.url, f"summary-{step:02d}.json")))
        except remote.MissingError:
            return None
        if note is None or note.get("digest") != self.digest:
            return None
        return pa.table(note["columns"]).replace_schema_metadata(note["metadata"])

    def put_summary(self, step: int, table: pa.Table) -> None:
        """Keep what a step needs to know of all chips: a table of text and whole numbers, as of split cells."""
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        note = {"columns": table.to_pydict(), "metadata": metadata, "digest": self.digest}
        remote.put(remote.join(self.url, f"summary-{step:02d}.json"), sealed(note))

    def put(self, facts: BlockFacts, data: bytes) -> None:
        """Write a block: its rows, and then what they are, which makes it whole."""
        name = remote.join(self.url, self.name(facts.number))
        remote.put(name, data)
        remote.put(f"{name}.json", sealed({**asdict(facts), "digest": self.digest}))

    def facts(self, number: int) -> BlockFacts | None:
        """Return the facts of a block that is whole; None where it is not."""
        try:
            note = document_of(remote.get(remote.join(self.url, f"{self.name(number)}.json")))
        except remote.MissingError:
            return None
        if note is None or note.pop("digest", None) != self.digest:
            return None
        note.pop("checksum", None)
        return BlockFacts.of(note)

    def root(self) -> list[BlockFacts] | None:
        """Return the facts of all blocks of a whole plan; None where it is not finished."""
        try:
            note = document_of(remote.get(remote.join(self.url, ROOT)))
        except remote.MissingError:
            return None
        if note is None or note.get("digest") != self.digest:
            return None
        return [BlockFacts.of(facts) for facts in note["blocks"]]

    def commit(self, blocks: Sequence[BlockFacts]) -> None:
        """Finish the plan: what says of all blocks how large they are, and what their rows add up to."""
        note = {"digest": self.digest, "blocks": [asdict(facts) for facts in blocks]}
        remote.put(remote.join(self.url, ROOT), sealed(note))

    def dataset(self, numbers: Sequence[int], schema: pa.Schema) -> ds.Dataset:
        """Return blocks as a dataset, in their order."""
        system = pafs.LocalFileSystem() if remote.is_local(self.url) else filesystem()
        base = remote.local_path(self.url) if remote.is_local(self.url) else self.url
        names = [remote.join(base, self.name(number)) for number in numbers]
        return ds.dataset(names, schema=schema, format="ipc", filesystem=system)

    def columns(self, facts: BlockFacts, names: Sequence[str]) -> pa.Table:
        """Read some columns of a block.

        Raises
        ------
        StoreError
            When the file is missing or damaged.
        """
        path = remote.join(self.url, self.name(facts.number))
        try:
            with self._opened(path) as file:
                schema = pa.ipc.open_file(file).schema
                at = [schema.get_field_index(name) for name in names]
                options = pa.ipc.IpcReadOptions(included_fields=at)
                table = pa.ipc.open_file(file, options=options).read_all().select(list(names))
        except (pa.ArrowException, remote.MissingError, FileNotFoundError) as error:
            raise self._damaged(facts, repr(error)[:120]) from error
        if table.num_rows != facts.chips:
            raise self._damaged(facts, f"{table.num_rows} rows")
        if self.schema is None:
            return table
        whole = [one.with_nullable(self.schema.field(one.name).nullable) for one in table.schema]
        return pa.Table.from_arrays(table.columns, schema=pa.schema(whole, table.schema.metadata))

    def _opened(self, path: str) -> pa.NativeFile:
        if remote.is_local(path):
            return pa.memory_map(remote.local_path(path))
        return filesystem().open_input_file(path)

    def _damaged(self, facts: BlockFacts, content: str) -> StoreError:
        return StoreError(
            f"plan {remote.redact(self.url)}, {self.name(facts.number)}", content, f"its {facts.chips:,} rows",
            "It was changed or deleted meanwhile: plan again into another folder.",
        )  # fmt: skip


def added(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of counts by name, in the order in which names are first met."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
