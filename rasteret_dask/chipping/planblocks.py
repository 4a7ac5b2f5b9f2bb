# SPDX-License-Identifier: Apache-2.0
"""Plans all blocks of a plan, on a Dask cluster or threads of this process, and commits what they add up to."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from dask._task_spec import DataNode, Task, TaskRef
from dask.system import CPU_COUNT

from rasteret_dask.chipping.blockfiles import BlockFacts, BlockFiles, added, write_block
from rasteret_dask.chipping.blocks import BlockPlan, PlanBlock, blocks_of
from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.splits import FEW_CELLS
from rasteret_dask.chipping.steps import none_left, warn_of_few
from rasteret_dask.net import remote, signatures
from rasteret_dask.net.clusters import using
from rasteret_dask.planning.plan import Split
from rasteret_dask.progress import Progress

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.net.clusters import ClientLike

__all__ = ["PlannedBlocks", "plan_blocks"]

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
    planned = plan.empty()
    facts = files.root()
    if facts is None:
        files.begin({"windows": windows})
        begun = time.monotonic()
        light = plan.light
        _ = (
            light.ground.phase,
            [outlines.degrees for outlines in light.ground.outlines],
        )  # here, once for all tasks
        blocks = blocks_of(plan.ground, windows)
        with Progress("blocks", progress) as shown, using(client) as cluster:
            signatures.send_place(cluster, files.url)
            run = _on_threads if cluster is None else partial(_on_cluster, cluster)
            made = list(_counted(run(light, files, blocks), shown))
        facts = sorted(made, key=lambda one: one.number)
        passed = time.monotonic() - begun
        chips = sum(one.chips for one in facts)
        _log.info(
            "plan %s: %d chips in %d blocks, %.1f s", remote.redact(files.url), chips, len(facts), passed
        )
    dropped = plan.ground.dropped | added(one.dropped for one in facts)
    _check(plan, facts, dropped)
    files.commit(facts)
    return PlannedBlocks(replace(planned, dropped=dropped), files, tuple(facts))


def _counted(made: Iterator[BlockFacts], shown: Progress) -> Iterator[BlockFacts]:
    chips = 0
    for facts in made:
        chips += facts.chips
        shown.step(1, f"{chips:,} chips")
        yield facts


def _on_threads(plan: BlockPlan, files: BlockFiles, blocks: Iterator[PlanBlock]) -> Iterator[BlockFacts]:
    with ThreadPoolExecutor(CPU_COUNT, thread_name_prefix="rasteret-plan") as pool:
        write = partial(write_block, plan, url=files.url, digest=files.digest)
        while some := list(islice(blocks, 4 * CPU_COUNT)):
            yield from pool.map(write, some)


def _on_cluster(
    client: Client, plan: BlockPlan, files: BlockFiles, blocks: Iterator[PlanBlock]
) -> Iterator[BlockFacts]:
    from rasteret_dask.net.awaiting import as_they_end  # it imports distributed

    root = f"block-plan-{files.digest[:12]}"
    while some := list(islice(blocks, AHEAD)):
        names = [f"plan-block-{block.number:06d}-{files.digest[:12]}" for block in some]
        graph: dict[Hashable, Any] = {root: DataNode(root, plan)}
        for name, block in zip(names, some, strict=True):
            graph[name] = Task(name, write_block, TaskRef(root), block, files.url, files.digest)
        for _, facts in as_they_end(client, graph, names, f"plan {remote.redact(files.url)}"):
            yield facts


def _check(plan: BlockPlan, facts: Sequence[BlockFacts], dropped: Mapping[str, int]) -> None:
    """Raise and warn as the same steps in one piece do."""
    steps = plan.light.steps
    counts = [added(one.counts[at] for one in facts) for at in range(len(steps) + 1)]
    if not sum(counts[0].values()):
        raise plan.ground.none_laid(sum(one.windows for one in facts), dropped)
    for step, before, after in zip(steps, counts[:-1], counts[1:], strict=True):
        if isinstance(step, Split) and step.spec.by == "ground":
            cells = {cell for one in facts for cell in one.cells}
            if len(cells) < FEW_CELLS:
                warn_of_few(len(cells), plan.ground, step.spec)
        if not sum(after.values()):
            splits = {name: count for name, count in before.items() if name}
            raise none_left(step, sum(before.values()), splits)
