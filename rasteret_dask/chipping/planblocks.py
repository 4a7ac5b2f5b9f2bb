# SPDX-License-Identifier: Apache-2.0
"""Plans all blocks of a plan, on a Dask cluster or threads of this process, and commits what they add up to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from dask._task_spec import DataNode, Task, TaskRef
from dask.system import CPU_COUNT

from rasteret_dask.chipping.blockfiles import BlockFacts, BlockFiles, added, write_block
from rasteret_dask.chipping.blocks import BlockPlan, Moments, PlanBlock, blocks_of
from rasteret_dask.chipping.celltable import CellTable
from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.chipping.splits import FEW_CELLS
from rasteret_dask.chipping.splittimes import none_in_range
from rasteret_dask.chipping.steps import check_fold_cells, none_left, warn_of_few
from rasteret_dask.chipping.strata import Holding
from rasteret_dask.errors import PlanError
from rasteret_dask.net import remote, signatures
from rasteret_dask.net.clusters import using
from rasteret_dask.planning.plan import TIME, ChipSpec, Folds, Split, SplitSpec
from rasteret_dask.progress import Progress

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.net.clusters import ClientLike

__all__ = ["PlannedBlocks", "plan_blocks"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

AHEAD = 256
"""Blocks that are sent to a cluster together: with their split cells some MB."""


@dataclass(frozen=True)
class PlannedBlocks:
    """A chip table in files, whole and committed."""

    planned: PlannedChips
    """What the plan says of every chip; its chip table has no rows."""
    files: BlockFiles
    facts: tuple[BlockFacts, ...]
    """What each block says of itself, in the order of their windows."""


def plan_blocks(
    plan: BlockPlan, files: BlockFiles, windows: int, client: ClientLike, progress: bool
) -> PlannedBlocks:
    """Plan what is missing of a plan's blocks.

    Parameters
    ----------
    plan
        What they are planned with.
    files
        Where they go.
    windows
        About how many candidate windows a block has.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
    progress
        Whether to show how far it is.

    Raises
    ------
    PlanError
        When a step cannot be carried out, or no chip is left.
    StoreError
        When the folder holds something else.

    Warns
    -----
    UserWarning
        When there are so few split cells that ratios are a matter of luck.
    """
    replace(plan, steps=plan.steps[: plan.pending]).empty()  # what goes wrong without any chip is told first
    facts = files.root()
    whole = facts is not None
    if not whole:
        files.begin({"windows": windows})
    with Progress("blocks", progress and not whole) as shown, using(client if not whole else None) as cluster:
        if cluster is not None:
            signatures.send_place(cluster, files.url)
        plan = _settled(plan, files, windows, cluster)
        planned = plan.empty()
        if facts is None:
            begun = time.monotonic()
            blocks = blocks_of(plan.ground, windows)
            write = partial(write_block, url=files.url, digest=files.digest)
            made = list(_counted(_run(_sent(plan), blocks, write, files, "plan", cluster), shown))
            facts = sorted(made, key=lambda one: one.number)
            passed = time.monotonic() - begun
            chips = sum(one.chips for one in facts)
            _log.info(
                "plan %s: %d chips in %d blocks, %.1f s", remote.redact(files.url), chips, len(facts), passed
            )
    dropped = plan.ground.dropped | added(one.dropped for one in facts)
    _check(plan, facts, dropped)
    files.commit(facts)
    nulls = {name for one in facts for name in one.nulls}
    schema = planned.table.schema
    for at, name in enumerate(schema.names):
        if name not in CHIP_SCHEMA.names:
            schema = schema.set(at, schema.field(at).with_nullable(name in nulls))
    planned = replace(
        planned,
        table=planned.table.cast(schema),
        dropped=dropped,
        cells=_with(planned.cells, planned.spec, (one.dealt for one in facts)),
        fold_cells=_with(planned.fold_cells, planned.spec, (one.dealt_folds for one in facts)),
    )
    return PlannedBlocks(planned, replace(files, schema=schema), tuple(facts))


def _settled(plan: BlockPlan, files: BlockFiles, windows: int, cluster: Client | None) -> BlockPlan:
    """Return the plan with what steps need to know of all chips: a pass over all blocks for each such step."""
    while (at := plan.pending) is not None:
        table = files.summary(at)
        if table is None:
            look = partial(_survey, at=at)
            surveys = list(_run(_sent(plan), blocks_of(plan.ground, windows), look, files, "survey", cluster))
            table = plan.summary(at, surveys)
            files.put_summary(at, table)
        plan = plan.settled(at, table)
    return plan


def _survey(plan: BlockPlan, block: PlanBlock, at: int) -> Holding | Moments:
    """Return what a block tells before a step: as a task."""
    return plan.survey(block, at)


def _sent(plan: BlockPlan) -> BlockPlan:
    """Return the part of a plan that is sent to workers, with what all blocks share worked out."""
    light = plan.light
    _ = (light.ground.phase, [outlines.degrees for outlines in light.ground.outlines])  # once for all tasks
    return light


def _with(cells: CellTable | None, spec: ChipSpec, blocks: Iterable[Mapping[str, str]]) -> CellTable | None:
    """Return a table of cells with those that blocks have dealt by a hash."""
    if cells is None:
        return None
    old = cells.table.to_pydict()
    names = dict(zip(old["cell"], old["split"], strict=True))
    for further in blocks:
        names |= further
    return replace(cells, table=CellTable.of(list(names), list(names.values()), spec).table)


def _counted(made: Iterator[BlockFacts], shown: Progress) -> Iterator[BlockFacts]:
    chips = 0
    for facts in made:
        chips += facts.chips
        shown.step(1, f"{chips:,} chips")
        yield facts


def _run(
    plan: BlockPlan,
    blocks: Iterator[PlanBlock],
    work: Callable[[BlockPlan, PlanBlock], T],
    files: BlockFiles,
    verb: str,
    cluster: Client | None,
) -> Iterator[T]:
    """Yield what work makes of each block, as far as a cluster or threads of this process are."""
    if cluster is None:
        yield from _on_threads(plan, blocks, work)
    else:
        yield from _on_cluster(cluster, plan, blocks, work, files, verb)


def _on_threads(
    plan: BlockPlan, blocks: Iterator[PlanBlock], work: Callable[[BlockPlan, PlanBlock], T]
) -> Iterator[T]:
    with ThreadPoolExecutor(CPU_COUNT, thread_name_prefix="rasteret-plan") as pool:
        while some := list(islice(blocks, 4 * CPU_COUNT)):
            yield from pool.map(partial(work, plan), some)


def _on_cluster(
    client: Client,
    plan: BlockPlan,
    blocks: Iterator[PlanBlock],
    work: Callable[[BlockPlan, PlanBlock], T],
    files: BlockFiles,
    verb: str,
) -> Iterator[T]:
    from rasteret_dask.net.awaiting import as_they_end  # it imports distributed

    root = f"block-{verb}-{files.digest[:12]}-{len(plan.tables)}"
    while some := list(islice(blocks, AHEAD)):
        names = [f"{verb}-block-{block.number:06d}-{files.digest[:12]}-{len(plan.tables)}" for block in some]
        graph: dict[Hashable, Any] = {root: DataNode(root, plan)}
        for name, block in zip(names, some, strict=True):
            graph[name] = Task(name, work, TaskRef(root), block)
        for _, result in as_they_end(client, graph, names, f"plan {remote.redact(files.url)}"):
            yield result


def _check(plan: BlockPlan, facts: Sequence[BlockFacts], dropped: Mapping[str, int]) -> None:
    """Raise and warn as the same steps in one piece do."""
    steps = plan.light.steps
    counts = [added(one.counts[at] for one in facts) for at in range(len(steps) + 1)]
    if not sum(counts[0].values()):
        raise plan.ground.none_laid(sum(one.windows for one in facts), dropped)
    cells = {cell for one in facts for cell in one.cells}
    for step, before, after in zip(steps, counts[:-1], counts[1:], strict=True):
        if isinstance(step, Folds):
            check_fold_cells(len(cells), step.spec, plan.ground.spec.cell_km)
        if isinstance(step, Split | Folds) and step.spec.by == "ground" and len(cells) < FEW_CELLS:
            warn_of_few(len(cells), plan.ground, step.spec)
        if isinstance(step, Split):
            _check_values(step.spec, after)
        if not sum(after.values()):
            splits = {name: count for name, count in before.items() if name}
            raise none_left(step, sum(before.values()), splits)


def _check_values(spec: SplitSpec, counts: Mapping[str, int]) -> None:
    """Raise PlanError where no chip is in any range, or none has a value that a split asks for."""
    if spec.by == TIME and not any(count for name, count in counts.items() if name):
        raise none_in_range(spec, np.zeros((0, 2), dtype=np.int64))
    for name, values in spec.values if spec.column is not None else ():
        if values is not None and not counts.get(name):
            raise PlanError(
                f"split(by={spec.by!r})", f"no chip of {name}={list(values)!r}", f"values of column {spec.by}"
            )
