# SPDX-License-Identifier: Apache-2.0
"""Split cells in blocks of about as many windows each, which are planned apart and add up to the whole plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import CellTable
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
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.chipping.splits import TRAIN
from rasteret_dask.chipping.splittimes import split_spans
from rasteret_dask.chipping.steps import carried_out, ground_of
from rasteret_dask.chipping.strata import Holding, dealt_cells, holding_of
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
from rasteret_dask.planning.scan import token_of
from rasteret_dask.table.records import Records

__all__ = ["WINDOWS", "BlockPlan", "Moments", "PlanBlock", "blocks_of", "check_by_blocks"]

Moments: TypeAlias = "NDArray[np.int64]"
"""Shape (span, 2): start and end, ns since 1970."""

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
    if spec.cover:
        raise PlanError(
            "by_blocks", "chips(cover=True), whose windows lie across blocks", "chips of split cells",
            "Plan it in one piece, or an area at a time (aoi=): the same steps without by_blocks.",
        )  # fmt: skip
    if not spec.in_cells:
        asked = "chips(at=)" if spec.at is not None else f"chips(grid={str(spec.grid)!r})"
        raise PlanError(
            "by_blocks", asked, "chips(grid='utm') or a CRS, whose split cells are the same for any area",
            "Plan it in one piece: the same steps without by_blocks.",
        )  # fmt: skip
    if spec.context_m:
        raise PlanError(
            "by_blocks", "chips(context_m=)", "windows of one size, which need the records of their own block only",
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
            case Split(_, split) if split.column is not None and not split.values:
                raise PlanError(
                    "by_blocks", f"split(by={split.by!r}) without the values of each split",
                    f"lists of values, as split(by={split.by!r}, test=[...]): no block knows the values of others",
                    "Name them, or choose chips first: chips.by_blocks(folder).filter(...).to_chips().split(by=...).",
                )  # fmt: skip
            case Split(_, split) if split.buffer_m > 0:
                raise PlanError(
                    "by_blocks", f"split(buffer_m={split.buffer_m:g})",
                    "buffer_m=0, as no block knows the chips of others",
                    "Split without a buffer, or plan in one piece, an area at a time (aoi=).",
                )  # fmt: skip
            case Split() | Folds() | FilterChips() | Select() | Map() | FilterPixels():
                continue
            case _:
                raise PlanError("by_blocks", f"a {step_name(step)} step", "steps on chips")


def _needs_all(step: Node) -> bool:
    """Tell whether a step needs to know something of all chips: what cells hold, or when train is."""
    if not isinstance(step, Split | Folds):
        return False
    spec = step.spec
    return bool(spec.stratify) or (spec.gap is not None and spec.moments is None and TRAIN in spec.names)


@dataclass(frozen=True)
class BlockPlan:
    """What every block is planned with."""

    ground: ChipSources
    steps: tuple[Node, ...]
    """Steps on chips, in the order in which they are carried out."""
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    """The tables that steps name: of split cells, of classes counted in a raster, of regions."""
    labels: tuple[Labels, ...] = ()
    """Polygons whose classes decide a deal of split cells, if they do."""

    @property
    def light(self) -> BlockPlan:
        """The same without what only reading needs: what is sent to workers."""
        sources = tuple(
            replace(s, records=Records(s.records.table.select(["id", "geometry"])))
            for s in self.ground.sources
        )
        steps = tuple(s for s in self.steps if not isinstance(s, Map | FilterPixels))
        return replace(self, ground=replace(self.ground, sources=sources), steps=steps)

    @property
    def pending(self) -> int | None:
        """The place of the first step that needs to know something of all chips before it; None: there is none."""
        return next((at for at, step in enumerate(self.steps) if _needs_all(step)), None)

    def settled(self, at: int, table: pa.Table) -> BlockPlan:
        """Return the same plan with what a step needs to know of all chips, as :meth:`summary` returns it."""
        step, token = self.steps[at], token_of(table)
        assert isinstance(step, Split | Folds)
        spec = step.spec
        spec = (
            replace(spec, moments=token)
            if spec.by == TIME
            else replace(spec, stratify=(), raster=None, cells=token)
        )
        steps = (*self.steps[:at], replace(step, spec=spec), *self.steps[at + 1 :])
        return replace(self, steps=steps, tables={**self.tables, token: table})

    def survey(self, block: PlanBlock, at: int) -> Holding | Moments:
        """Return what a block tells before a step: what its split cells hold, or the times of its train chips."""
        step = self.steps[at]
        assert isinstance(step, Split | Folds)
        spec = step.spec
        before = replace(self, steps=self.steps[:at])
        chips = before.carried_out(self.ground.lay(block.frame(self.ground)))[-1]
        if spec.by == TIME:
            plain = replace(step, spec=replace(spec, gap=None))
            return split_spans(carried_out(chips, plain, self.tables))[TRAIN]
        cells, links = ground_of(chips, spec)
        raster = None if spec.raster is None else self.tables[spec.raster]
        return holding_of(replace(chips, labels=self.labels), spec, cells, links, raster)

    def summary(self, at: int, surveys: Sequence[Holding | Moments]) -> pa.Table:
        """Return what all blocks together tell: the table of split cells, dealt, or the times of all train chips.

        Raises
        ------
        PlanError
            When there is no chip, or strata cannot hold.
        """
        step = self.steps[at]
        assert isinstance(step, Split | Folds)
        spec = step.spec
        holdings = [survey for survey in surveys if isinstance(survey, Holding)]
        if spec.by == TIME:
            spans = [survey for survey in surveys if not isinstance(survey, Holding)]
            both = np.unique(np.concatenate([*spans, np.zeros((0, 2), dtype=np.int64)]), axis=0)
            return pa.table({"start": both[:, 0], "end": both[:, 1]})
        if not any(len(holding.places) for holding in holdings):
            raise self.ground.none_laid(0, self.ground.dropped)
        nothing = replace(self, steps=()).empty()
        cells, _ = ground_of(nothing, spec)
        earlier = None if spec.cells is None else CellTable.again(self.tables[spec.cells])
        raster = None if spec.raster is None else self.tables[spec.raster]
        whole = Holding.together(holdings)
        return dealt_cells(whole, spec, cells, replace(nothing, labels=self.labels), earlier, raster).table

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
            results.append(carried_out(results[-1], step, self.tables))
        return results
