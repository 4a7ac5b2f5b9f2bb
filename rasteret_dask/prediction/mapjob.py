# SPDX-License-Identifier: Apache-2.0
"""Chips become the job of a map: each block of the map has the chips that reach it, in shards of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.crs import text
from rasteret_dask.errors import EmptyError, PlanError
from rasteret_dask.grid import Bounds
from rasteret_dask.prediction.blending import pixel_bytes
from rasteret_dask.prediction.mapgrid import MapBlock, MapGrid, block_side, grid_of, owned, placed
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.tasks.job import Hierarchy, Job, Output, Shard
from rasteret_dask.tasks.runs import Cuts

__all__ = ["MapJob", "map_job", "shards_of"]

READ_BYTES = 32 * 2**20
"""Pixels that a task reads at a time. Larger arrays would be mappings of their own (``net.allocator``'s
MMAP_THRESHOLD): new memory each time."""


@dataclass(frozen=True)
class MapJob:
    """A map that is to be computed."""

    job: Job
    """Its hierarchies are blocks: a chip that reaches several blocks is in each of them."""
    grids: tuple[MapGrid, ...]
    blocks: tuple[MapBlock, ...]
    """One for each hierarchy, in running order."""
    block_px: int
    chips: int
    """Chips of the plan, each counted once."""
    firsts: tuple[int, ...]
    """For each block, how many chips count to it: each to the block of its north-west pixel."""

    @property
    def repeats(self) -> int:
        """Chips that are predicted once more, as they reach several blocks."""
        return int(self.job.chips.num_rows) - self.chips

    def names(self) -> list[str]:
        """Return the name of each block."""
        return [block.name(self.grids) for block in self.blocks]

    def cuts(self) -> Cuts:
        """Return where blocks in running order may be cut into runs, and what that costs."""
        of_shards = Cuts.of(self.job)
        last = np.cumsum([h.shards for h in self.job.hierarchies])[:-1] - 1
        return Cuts(of_shards.shared[last], of_shards.total)


def map_job(
    job: Job,
    outputs: Sequence[Output],
    output: ModelOutput,
    size: float,
    zones: Sequence[tuple[int, str, Bounds]],
    limits: tuple[int | None, int],
) -> MapJob:
    """Return the job of a map.

    Parameters
    ----------
    job
        The chips, of all splits that are selected.
    outputs
        What its sources become.
    output
        What the model gives.
    size
        Side of a chip, in the unit of the CRS.
    zones
        For each CRS of the chips: its number, its name, and the edges of its map.
    limits
        Side of a block in pixels, None: what fits into memory; and how many chips a batch has.

    Raises
    ------
    PlanError
        When several chips lie at the same place, or chips lie beside the map's pixels.
    EmptyError
        When there is no chip.
    """
    assert output.side is not None
    rows = np.concatenate(
        [np.arange(h.start, h.stop) for h in job.hierarchies] or [np.zeros(0, dtype=np.int64)]
    )
    rows.sort()
    if not len(rows):
        raise EmptyError("predict", "no chip", "at least one", "Ask for less in filter, select or chips().")
    chips = job.chips.take(pa.array(rows))
    bounds, codes = bounds_of(chips), job.epsg[rows]
    pixel = size / output.side
    _check_places(chips, codes, bounds / pixel)
    first = {code: bounds[np.argmax(codes == code)] for code, _, _ in zones}
    grids = tuple(
        grid_of(code, name, edges, (float(first[code][0]), float(first[code][3])), pixel)
        for code, name, edges in zones
    )
    block_px = limits[0] or block_side(pixel_bytes(output.channels, output.is_flat))
    placement = placed(grids, codes, bounds, output.side, block_px)
    per_shard = _per_shard(outputs, limits[1])
    names = [block.name(grids) for block in placement.blocks]
    offsets = placement.offsets.tolist()
    hierarchies = tuple(
        Hierarchy(name, at, start, stop, per_shard)
        for at, (name, start, stop) in enumerate(zip(names, offsets[:-1], offsets[1:], strict=True))
    )
    table = chips.take(pa.array(placement.chip)).combine_chunks()
    own = replace(
        job, chips=table, hierarchies=hierarchies, others=(), split_cells=None, fold_cells=None, in_turn=False
    )
    firsts = tuple(
        int(owned(grids[block.grid], own.bounds[h.start : h.stop], block, block_px).sum())
        for block, h in zip(placement.blocks, hierarchies, strict=True)
    )
    return MapJob(own, grids, placement.blocks, block_px, sum(firsts), firsts)


def shards_of(block: Hierarchy) -> list[Shard]:
    """Return the shards of a block."""
    per = block.per_shard
    return [
        Shard(
            block.split, block.number, n, block.start + n * per, min(block.start + (n + 1) * per, block.stop)
        )
        for n in range(block.shards)
    ]


def _per_shard(outputs: Sequence[Output], batch_size: int) -> int:
    return max(READ_BYTES // sum(own.chip_bytes for own in outputs), batch_size, 1)


def _check_places(chips: pa.Table, codes: NDArray[np.int64], pixels: NDArray[np.float64]) -> None:
    """Raise PlanError where several chips lie at one place: one map cannot say what each of them says.

    Bounds are in pixels of the map: of one in degrees a thousandth is many.
    """
    place = np.column_stack([codes, np.round(pixels[:, [0, 3]], 3)])
    _, first, count = np.unique(place, axis=0, return_index=True, return_counts=True)
    if (count > 1).any():
        at = int(first[np.argmax(count)])
        ids = chips.column("chip_id")
        same = np.flatnonzero((place == place[at]).all(axis=1))[:2]
        raise PlanError(
            "predict", f"{int(count.max()):,} chips at one place in {text(int(codes[at]))}: "
            f"{', '.join(ids[int(n)].as_py() for n in same)}", "one chip at each place",
            "Give the chips a time axis: harmonize(time='3MS'); or choose acquisitions: subset(date_range=).",
        )  # fmt: skip
