# SPDX-License-Identifier: Apache-2.0
"""A plan becomes its chip table, without looking for records of windows that a sample or a filter leaves out."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import (
    ChipSources,
    PlannedChips,
    chip_sources,
    labels_of,
    tell_of_coarse,
)
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, joined
from rasteret_dask.chipping.frame import (
    Frame,
    cell_names,
    chip_cells,
    concatenated,
    id_head,
    in_space,
    laid_out,
)
from rasteret_dask.chipping.steps import apply_step, carried_out, steps_of
from rasteret_dask.planning.optimize import named_bands, optimize
from rasteret_dask.planning.plan import CutChips, FilterChips, FilterPixels, Map, Node, Sample, Select, Split
from rasteret_dask.planning.sampling import salt_hash, sample_rows, sample_unit, text_hash, unit_of
from rasteret_dask.planning.scan import Table, as_table

__all__ = ["plan_chips", "plan_chosen"]

FEW_WINDOWS = 4096
"""Of so few windows all are planned, as if there were no sample: that costs next to nothing."""

MOST_SHARE = 0.25
"""A sample of more than this share of all windows is taken of the planned chips."""

SPARE = 1.1
"""Windows that are looked at for each chip that is missing, over the share of those before that became one."""

PROBED = 512
"""Windows that tell how many of them lie in their zone and in the area, before records of many are looked for."""

WINDOW_COLUMNS = ("epsg", "row", "col", "cell", "xmin", "ymin", "xmax", "ymax", "split")
"""Columns of the chip table that are known before records are looked for."""


_log = logging.getLogger(__name__)


def plan_chips(plan: Node, tables: Mapping[str, Table], *, optimized: bool = True) -> PlannedChips:
    """Turn a plan that has a ``chips`` step into its chip table.

    Parameters
    ----------
    plan
        The plan.
    tables
        The tables that its tokens name.
    optimized
        False carries the plan out as it is written (but for the bands each source needs, which decide what is
        ``readable``); the result is the same.

    Raises
    ------
    PlanError, GridError, BandError, UnreadableAssetsError
        Whatever cannot be carried out, before any pixel is read.
    """
    begun = time.monotonic()
    node, steps = steps_of(optimize(plan) if optimized else named_bands(plan))
    ground = chip_sources(node, tables)
    result = _chosen(ground, steps, tables) if optimized and _pays(node, steps) else None
    if result is None:
        result = _planned(_all_laid(ground, tables), steps, tables)
    passed = time.monotonic() - begun
    _log.info("plan: %d chips of %d sources, %.1f s", result.table.num_rows, len(result.sources), passed)
    return result


def plan_chosen(plan: Node, tables: Mapping[str, Table]) -> PlannedChips | None:
    """Plan what samples and filters of a plan keep, as :func:`plan_chips` does; None where that needs all chips.

    ``dropped`` counts windows that were looked at. Filters right behind ``chips`` that ask for columns of windows
    alone come before records are looked for; so do the hashes of a sample, see :func:`drawn`.
    """
    node, steps = steps_of(optimize(plan))
    return _chosen(chip_sources(node, tables), steps, tables) if _pays(node, steps) else None


def _chosen(ground: ChipSources, steps: Sequence[Node], tables: Mapping[str, Table]) -> PlannedChips | None:
    """Plan what is kept; None where that needs all chips."""
    frame = None if ground.spec.in_cells else ground.frame()
    sample = drawn(ground, steps, frame)
    if sample is not None:
        tell_of_coarse(ground)
        chips, rest = sample
        dropped = ground.dropped | dict(chips.dropped)
        return _planned(replace(chips, dropped=dropped, labels=labels_of(ground, tables)), rest, tables)
    frame = ground.frame() if frame is None else frame
    some = sifted(frame, steps, ground)
    if not 0 < len(some) < len(frame):
        return None
    laid = ground.lay(some)
    if not laid.table.num_rows:
        return None
    tell_of_coarse(ground)
    dropped = ground.dropped | dict(laid.dropped)
    return _planned(replace(laid, dropped=dropped, labels=labels_of(ground, tables)), steps, tables)


def _planned(chips: PlannedChips, steps: Sequence[Node], tables: Mapping[str, Table]) -> PlannedChips:
    for step in steps:
        chips = apply_step(chips, step, tables)
    return chips


def _all_laid(ground: ChipSources, tables: Mapping[str, Table]) -> PlannedChips:
    """Make chips of all windows that every source covers."""
    points = None if ground.spec.at is None else as_table(tables[ground.spec.at])
    frame = ground.frame(points)
    tell_of_coarse(ground)
    laid = ground.lay(frame, points)
    dropped = ground.dropped | dict(laid.dropped)
    if not laid.table.num_rows:
        raise ground.none_laid(len(frame), dropped)
    return replace(laid, dropped=dropped, labels=labels_of(ground, tables))


def _pays(node: CutChips, steps: Sequence[Node]) -> bool:
    """Tell whether steps may be carried out on some windows only."""
    if node.spec.at is not None:
        return False
    for step in steps:
        if isinstance(step, Sample):
            return step.by is None
        if isinstance(step, FilterChips) and _is_of_windows(step):
            return True
        if not _looks_at_one(step):
            return False
    return False


def sifted(frame: Frame, steps: Sequence[Node], ground: ChipSources) -> Frame:
    """Return the windows that filters right behind ``chips`` keep, as far as these look at windows alone.

    Parameters
    ----------
    frame
        Candidate windows.
    steps
        The steps on chips.
    ground
        What chips are laid out of.
    """
    first: list[Node] = []
    for step in steps:
        if isinstance(step, FilterChips) and _is_of_windows(step):
            first.append(step)
        elif not isinstance(step, Map | FilterPixels):
            break
    return _kept(frame, first, ground)[0] if first else frame


def drawn(
    ground: ChipSources, steps: Sequence[Node], frame: Frame | None
) -> tuple[PlannedChips, Sequence[Node]] | None:
    """Plan a sample of chips: windows are taken by the hash of their id until enough of them became chips.

    Parameters
    ----------
    ground
        What chips are laid out of.
    steps
        The steps on chips.
    frame
        All candidate windows; None: those of split cells, which are not laid out before they are drawn.

    Returns
    -------
    tuple or None
        The sample, and the steps behind it. None where it depends on chips that it leaves out, so that all have to
        be planned: per stratum, without a time axis (ids then name acquisitions), behind a split with a buffer or by
        a column, behind ``with_table``; or where it is no small part of them.

    Notes
    -----
    ``dropped`` counts what became of the windows that were looked at, and tells how many these are.
    """
    place = next((at for at, step in enumerate(steps) if isinstance(step, Sample)), None)
    if place is None or not ground.sources[ground.reference].has_slots:
        return None
    before, sample = steps[:place], steps[place]
    assert isinstance(sample, Sample)
    if sample.by is not None or sample.n < 1 or not all(map(_looks_at_one, before)):
        return None
    windows = _Cells.of(ground) if frame is None else _Laid(frame)
    if windows.count < FEW_WINDOWS or sample.n > MOST_SHARE * windows.count:
        return None
    unit = windows.unit(sample.seed)
    probe = np.flatnonzero(unit < min(PROBED, sample.n // 8) / windows.count)
    likely = max(len(_kept(windows.frame(probe), before, ground)[0]), 1) / max(len(probe), 1)
    parts: list[PlannedChips] = []
    dropped: Counter[str] = Counter()
    chips, looked, edge = 0, 0, 0.0
    while chips < sample.n and edge < 1.0:
        share = max(chips, 1) / looked if looked else likely
        more = (SPARE * (sample.n - chips) / share + np.sqrt(sample.n) + 64) / windows.count
        stop = edge + more if edge + more < 0.5 else 1.0
        at = np.flatnonzero((unit >= edge) & (unit < stop))
        left, lost = _kept(windows.frame(at), before, ground)
        part = ground.lay(left)
        for step in before:
            part = carried_out(part, step, {})
        dropped.update(part.dropped)
        dropped.update({f"{why}, covered or not": n for why, n in lost.items() if why not in part.dropped})
        chips, looked, edge = chips + part.table.num_rows, looked + len(at), stop
        parts.append(part)
    if not chips:
        return None
    table = pa.concat_tables([part.table for part in parts]).combine_chunks()
    if len(parts) > 1:
        at = np.flatnonzero(unit < edge)
        order = pc.index_in(table.column("chip_id"), value_set=windows.frame(at).prefix)
        table = table.take(pa.array(np.argsort(order.to_numpy())))
    table = table.take(pa.array(sample_rows(table, "chip_id", sample.n, sample.seed, None)))
    told = {
        f"{why}, of {looked:,} windows that were looked at": count for why, count in dropped.items() if count
    }
    return replace(parts[-1], table=table, dropped=told), steps[place + 1 :]


def _looks_at_one(step: Node) -> bool:
    """Tell whether what a step does with a chip depends on no other chip."""
    if isinstance(step, Split):
        return step.spec.by_hash
    return isinstance(step, FilterChips | Select | Map | FilterPixels)


def _is_of_windows(step: FilterChips) -> bool:
    return all(column in WINDOW_COLUMNS for column, *_ in step.where)


def _kept(frame: Frame, steps: Sequence[Node], ground: ChipSources) -> tuple[Frame, dict[str, int]]:
    """Return the windows that the first steps keep, as far as these look at windows alone, and what they lose."""
    count = len(frame)
    columns = {
        "epsg": pa.array(frame.epsg.astype(np.int32)),
        "row": pa.array(frame.row),
        "col": pa.array(frame.col),
        **{name: pa.array(frame.bounds[:, at]) for at, name in enumerate(("xmin", "ymin", "xmax", "ymax"))},
    }
    if frame.cell is not None:
        columns["cell"] = cell_names(ground.spec, frame)
    nothing = {field.name: pa.nulls(count, field.type) for field in CHIP_SCHEMA}
    table = pa.table({**nothing, **columns, "__window__": np.arange(count)})
    chips = PlannedChips(
        table,
        ground.sources,
        ground.reference,
        ground.spec,
        None,
        ground.resolution,
        outlines=ground.outlines,
    )
    for step in steps:
        if isinstance(step, FilterChips) and not _is_of_windows(step):
            break
        if isinstance(step, FilterChips | Select | Split):
            chips = carried_out(chips, step, {})
    lost = {why: count for why, count in chips.dropped.items() if "__window__" not in why}
    return frame.take(chips.table.column("__window__").to_numpy()), lost


@dataclass(frozen=True, slots=True)
class _Laid:
    """Windows that are laid out."""

    windows: Frame

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.windows)

    def unit(self, seed: int) -> NDArray[np.float64]:
        """Return the number in [0, 1) that each is drawn by."""
        return sample_unit(self.windows.prefix, seed)

    def frame(self, at: NDArray[np.int64]) -> Frame:
        """Return some of them, in their order of space."""
        return self.windows.take(at)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Chip cells of zones, which may become windows: those of the neighbouring zone or beyond the area do not."""

    ground: ChipSources
    zone: NDArray[np.int64]
    """Shape (cell,), rising."""
    cells: NDArray[np.int64]
    """Shape (cell, 2): row and column."""

    @classmethod
    def of(cls, ground: ChipSources) -> _Cells:
        """Return the cells that the reference source may touch."""
        cells = chip_cells(ground.spec, ground.outlines[ground.reference], ground.resolution)
        zone = np.repeat(np.array([*cells], dtype=np.int64), [len(c) for c in cells.values()])
        return cls(ground, zone, np.concatenate([*cells.values(), np.zeros((0, 2), dtype=np.int64)]))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.zone)

    def unit(self, seed: int) -> NDArray[np.float64]:
        """Return the number in [0, 1) that each is drawn by: that of its id, which is not made."""
        spec, parts = self.ground.spec, list[NDArray[np.float64]]()
        zones, begin = np.unique(self.zone, return_index=True)
        for zone, cells in zip(zones.tolist(), np.split(self.cells, begin[1:]), strict=True):
            head = text_hash(pa.array([id_head(spec, zone, self.ground.resolution)]), salt_hash(seed))
            parts.append(unit_of(_then(cells[:, 1], _then(cells[:, 0], head))))
        return np.concatenate(parts)

    def frame(self, at: NDArray[np.int64]) -> Frame:
        """Return the windows of some of them, in their order of space."""
        ground, zone = self.ground, self.zone[at]
        frames = [
            laid_out(ground.spec, number, self.cells[at[zone == number]], ground.resolution, ground.phase)
            for number in np.unique(zone).tolist()
        ]
        return in_space(concatenated(frames), ground.resolution)


def _then(numbers: NDArray[np.int64], before: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hashes of texts that go on with a ``_`` and a number of a cell; ``before``: one for all, or each."""
    least = int(numbers.min())
    texts = joined("", np.arange(least, int(numbers.max()) + 1))
    at = numbers - least
    if len(before) == 1:
        return np.asarray(text_hash(texts, before[0])[at])
    return text_hash(texts.take(pa.array(at)), before)
