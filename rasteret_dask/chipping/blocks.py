# SPDX-License-Identifier: Apache-2.0
"""Split cells in blocks of about as many windows each, which are planned apart and add up to the whole plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import ChipSources, PlannedChips
from rasteret_dask.chipping.frame import (
    BLOCK_PX,
    STRIP,
    Frame,
    block_of,
    in_space,
    lattice_of,
    zone_cells,
    zone_frame,
)
from rasteret_dask.chipping.steps import carried_out
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import (
    TIME,
    ChipSpec,
    FilterChips,
    FilterPixels,
    Folds,
    Map,
    Node,
    Random,
    Sample,
    Select,
    Split,
    WithTable,
    step_name,
)
from rasteret_dask.table.records import Records

__all__ = ["WINDOWS", "PlanBlock", "BlockPlan", "blocks_of", "check_by_blocks"]

WINDOWS = 65_536
"""Candidate windows of a block, about, where nobody says how many."""

MOST_CELLS = 1_000_000_000
"""Candidate windows of a plan by blocks: beyond, even their split cells would not fit into memory."""


@dataclass(frozen=True, slots=True)
class PlanBlock:
    """A run of strip columns of a zone: all windows whose centres lie there, and no others."""

    number: int
    zone: int
    """Number of its CRS."""
    first: tuple[int, int]
    """Strip and column of its first squares: see :data:`rasteret_dask.chipping.frame.STRIP`."""
    last: tuple[int, int]
    """Strip and column behind its last ones."""
    corner: tuple[int, int]
    """Row and column that ``cells`` count from."""
    cells: NDArray[np.int16]
    """Shape (cell, 2). Split cells that may have windows there; those at its edges have others too."""

    def frame(self, ground: ChipSources) -> Frame:
        """Lay out its windows, in the order that all windows of the plan have."""
        cells = self.cells.astype(np.int64) + np.array(self.corner)
        frame = zone_frame(ground.spec, self.zone, cells, ground.resolution, ground.phase)
        row, col = block_of(frame, ground.resolution)
        strip = row // STRIP
        begun = (strip > self.first[0]) | ((strip == self.first[0]) & (col >= self.first[1]))
        ended = (strip > self.last[0]) | ((strip == self.last[0]) & (col >= self.last[1]))
        return in_space(frame.take(begun & ~ended), ground.resolution)


def blocks_of(ground: ChipSources, windows: int) -> Iterator[PlanBlock]:
    """Yield the blocks of a plan, in the order of its windows.

    Parameters
    ----------
    ground
        What the chips are laid out of.
    windows
        About how many windows a block has; a column of a strip is never cut.
    """
    spec, resolution = ground.spec, ground.resolution
    number = 0
    for zone, cells in zone_cells(spec, ground.outlines[ground.reference], resolution, MOST_CELLS).items():
        lattice = lattice_of(spec, resolution)
        strip, col, cell, share = _columns(lattice.split_bounds(cells), resolution)
        order = np.lexsort((col, strip))
        strip, col, cell = strip[order], col[order], cell[order]
        place = np.flatnonzero(np.append(True, (np.diff(strip) != 0) | (np.diff(col) != 0)))
        count = np.add.reduceat(share[order], place) * lattice.per_side**2
        block = ((np.cumsum(count) - count) // windows).astype(np.int64)
        first = np.flatnonzero(np.append(True, np.diff(block) != 0))
        begin = place[first]
        ends = [*begin[1:].tolist(), len(strip)]
        for start, stop in zip(begin.tolist(), ends, strict=True):
            own = cells[np.unique(cell[start:stop])]
            corner = own.min(0)
            last = (int(strip[stop - 1]), int(col[stop - 1]) + 1)
            yield PlanBlock(
                number, zone, (int(strip[start]), int(col[start])), last,
                (int(corner[0]), int(corner[1])), (own - corner).astype(np.int16),
            )  # fmt: skip
            number += 1


def _columns(
    bounds: NDArray[np.float64], resolution: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the strip columns that split cells may have windows in: strip, column, cell and the cell's share there.

    Windows lie up to a pixel east and south of their cells.
    """
    side = BLOCK_PX * resolution
    wide, high = side, STRIP * side
    xmin, ymin, xmax, ymax = (bounds + np.array([0.0, -1.0, 1.0, 0.0]) * resolution).T
    left, right = np.floor(xmin / wide).astype(np.int64), np.floor(xmax / wide).astype(np.int64)
    top, bottom = np.floor(-ymax / high).astype(np.int64), np.floor(-ymin / high).astype(np.int64)
    across, down = right - left + 1, bottom - top + 1
    cell = np.repeat(np.arange(len(bounds)), across * down)
    within = np.arange(len(cell)) - np.repeat(np.cumsum(across * down) - across * down, across * down)
    strip, col = top[cell] + within // across[cell], left[cell] + within % across[cell]
    x = np.minimum(xmax[cell], (col + 1) * wide) - np.maximum(xmin[cell], col * wide)
    y = np.minimum(-ymin[cell], (strip + 1) * high) - np.maximum(-ymax[cell], strip * high)
    area = (xmax - xmin) * (ymax - ymin)
    return strip, col, cell, np.maximum(x, 0.0) * np.maximum(y, 0.0) / area[cell]


def check_by_blocks(spec: ChipSpec, steps: tuple[Node, ...]) -> None:
    """Refuse what cannot be planned block by block.

    Raises
    ------
    PlanError
        When a step needs chips of other blocks, or there are no blocks.
    """
    if not spec.in_cells:
        asked = "chips(at=)" if spec.at is not None else f"chips(grid={str(spec.grid)!r})"
        raise PlanError(
            "by_blocks", asked, "chips(grid='utm') or a CRS, whose split cells are the same for any area",
            "Plan it in one piece: the same steps without by_blocks.",
        )  # fmt: skip
    for step in steps:
        match step:
            case Sample():
                raise PlanError(
                    "by_blocks", "a sample step before it", "steps that look at one chip at a time",
                    "Sample what it returns: chips.by_blocks(folder).sample(n).",
                )  # fmt: skip
            case Random():
                raise PlanError(
                    "by_blocks", "a random step before it", "steps that look at one chip at a time",
                    "Choose chips first: chips.by_blocks(folder).filter(...).to_chips().random(1000).",
                )  # fmt: skip
            case WithTable():
                raise PlanError(
                    "by_blocks", "a with_table step before it", "steps that look at one chip at a time",
                    "Choose chips first: chips.by_blocks(folder).filter(...).to_chips().with_table(table).",
                )  # fmt: skip
            case Folds():
                raise PlanError(
                    "by_blocks", "a folds step before it", "steps that add no column",
                    "Choose chips first: chips.by_blocks(folder).filter(...).to_chips().folds(5).",
                )  # fmt: skip
            case Split(_, split) if split.column is not None or split.by == TIME:
                raise PlanError(
                    "by_blocks", f"split(by={split.by!r})", "split(by='ground') or split(by='geometry')",
                    "Choose chips first: chips.by_blocks(folder).filter(...).to_chips().split(by=...).",
                )  # fmt: skip
            case Split(_, split) if split.stratify or split.cells is not None:
                raise PlanError(
                    "by_blocks", f"split({'stratify' if split.stratify else 'cells'}=)",
                    "cells that a hash deals, as no block knows the chips of others",
                    "Leave it out, or choose chips first: chips.by_blocks(folder).filter(...).to_chips().split(...).",
                )  # fmt: skip
            case Split(_, split) if split.buffer_m > 0:
                raise PlanError(
                    "by_blocks", f"split(buffer_m={split.buffer_m:g})",
                    "buffer_m=0, as no block knows the chips of others",
                    "Split without a buffer, or plan in one piece, an area at a time (aoi=).",
                )  # fmt: skip
            case Split() | FilterChips() | Select() | Map() | FilterPixels():
                continue
            case _:
                raise PlanError("by_blocks", f"a {step_name(step)} step", "steps on chips")


@dataclass(frozen=True)
class BlockPlan:
    """What every block is planned with."""

    ground: ChipSources
    steps: tuple[Node, ...]
    """Steps on chips, in the order in which they are carried out."""

    @property
    def light(self) -> BlockPlan:
        """The same without what only reading needs: what is sent to workers."""
        sources = tuple(
            replace(s, records=Records(s.records.table.select(["id", "geometry"])))
            for s in self.ground.sources
        )
        steps = tuple(s for s in self.steps if not isinstance(s, Map | FilterPixels))
        return BlockPlan(replace(self.ground, sources=sources), steps)

    def empty(self) -> PlannedChips:
        """Carry out all steps on no chips: what the plan says of every chip, and errors that need none."""
        nothing = np.zeros(0, dtype=np.int64)
        frame = Frame(
            nothing, np.zeros((0, 4)), nothing, nothing, np.zeros((0, 2), dtype=np.int64), None,
            pa.array([], pa.string()),
        )  # fmt: skip
        return self.carried_out(self.ground.lay(frame))[-1]

    def carried_out(self, laid: PlannedChips) -> list[PlannedChips]:
        """Return what is laid, and what each step makes of it; there may be no chip."""
        results = [laid]
        for step in self.steps:
            results.append(carried_out(results[-1], step, {}))
        return results
