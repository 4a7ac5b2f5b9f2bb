# SPDX-License-Identifier: Apache-2.0
"""Why a chip is as it is, and why there is none at a place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.display.html import Markup, card, table
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.query import Query
from rasteret_dask.show.contenders import contest
from rasteret_dask.show.losses import Stage, Trace, Tracer, split_lines

__all__ = ["Why", "why"]

STAGES = pa.schema(
    [
        pa.field("step", pa.string()),
        pa.field("unit", pa.string()),
        pa.field("before", pa.int64()),
        pa.field("left", pa.int64()),
        pa.field("reason", pa.string()),
    ]
)

MOST_ROWS = 24
"""Rows of the table that the text shows."""


@dataclass(frozen=True)
class Why:
    """What :meth:`Chips.why` found."""

    subject: str
    """The chip, or the place."""
    chips: tuple[str, ...]
    """Ids of the chips that it is about; none where there is no chip."""
    step: str | None
    """The first step of the plan that leaves no chip, as it was written; None where there is a chip."""
    reasons: tuple[str, ...]
    """Sentences, the most important first."""
    table: pa.Table
    """Of a chip: a row for each record that competes for a slot (source, slot, slot_name, record, datetime, coverage,
    valid, cloudy, order, role, why). Of a place: a row for each step (step, unit, before, left, reason)."""

    def __str__(self) -> str:
        head = f"{self.subject}: " + ("no chip" if self.step is not None else "chip " + ", ".join(self.chips))
        head = self.subject if self.chips == (self.subject.removeprefix("chip "),) else head
        rows = list(_lines(self.table))
        more = len(rows) - 1 - MOST_ROWS
        shown = rows[: MOST_ROWS + 1] + ([f"... {more} more rows in .table"] if more > 0 else [])
        removed = [] if self.step is None else [f"  left out by {self.step}"]
        return "\n".join(
            [head, *removed, *(f"  {line}" for line in self.reasons), *(f"  {r}" for r in shown)]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title = str(self).splitlines()[0]
        rows: list[tuple[str, str | Markup]] = [] if self.step is None else [("left out by", self.step)]
        rows += [("why" if number == 0 else "", reason) for number, reason in enumerate(self.reasons)]
        names = _shown(self.table)
        held = table(names, [[_cell(row[name]) for name in names] for row in self.table.to_pylist()])
        return card(title, [*rows, ("records" if "record" in names else "steps", held)])


def why(tracer: Tracer, chip_id: str | None, lon: float | None, lat: float | None) -> Why:
    """Say why a chip is as it is, or why there is none at a place; see :meth:`Chips.why`.

    Parameters
    ----------
    tracer
        Follows chips and places through the plan.
    chip_id
        The chip.
    lon, lat
        The place, degrees.
    """
    if (chip_id is None) == (lon is None) or (lon is None) != (lat is None):
        raise PlanError(
            "chips.why", f"chip_id={chip_id!r}, lon={lon!r}, lat={lat!r}", "a chip's id, or lon= and lat=",
            "chips.why('33_...') or chips.why(lon=15.0, lat=50.2).",
        )  # fmt: skip
    if chip_id is None:
        assert lon is not None
        assert lat is not None
        return _of_place(tracer.place(lon, lat), f"place {lon:g}, {lat:g}")
    try:
        planned = tracer.staged(tracer.query.plan)
    except PlanError:  # the plan has no chip; one of its steps may have had this one
        planned = None
    if planned is not None:
        at = np.flatnonzero(pc.equal(planned.table.column("chip_id"), chip_id).to_numpy())
        if len(at):
            return _of_chip(tracer.query, planned, chip_id, int(at[0]))
    trace = tracer.chip(chip_id)
    if trace is None:
        raise _unknown(chip_id, planned)
    return _of_place(trace, f"chip {chip_id}")


def _unknown(chip_id: str, planned: PlannedChips | None) -> PlanError:
    known = [] if planned is None else planned.table.column("chip_id").to_pylist()
    near = get_close_matches(str(chip_id), known, n=1, cutoff=0.5)
    return PlanError(
        "chips.why", f"chip {chip_id!r}", f"a chip of this plan{f', such as {near[0]!r}' if near else ''}",
        "Ids stand in column chip_id of .table; why(lon=, lat=) asks about a place.",
    )  # fmt: skip


def _of_chip(query: Query, planned: PlannedChips, chip_id: str, at: int) -> Why:
    found = contest(query, planned, at)
    row = planned.table.slice(at, 1)
    reasons: list[str] = []
    step = None
    if planned.split is not None:
        split = row.column("split")[0].as_py()
        why = "its ground is of two" if planned.split.column is None else "its value is of none"
        reasons.append(f"split {split}" if split else f"in no split: {why}, or it is too near to train")
        reasons += split_lines(replace(planned, table=row), planned.split)
        step = None if split else "split"
    if found.dropped:
        step = "filter_pixels"
        reasons.insert(0, f"filter_pixels drops it: {found.dropped}")
    elif planned.pixel_rules:
        reasons.insert(0, "filter_pixels keeps it")
    reasons += found.slots
    reasons += [f"could not be read: {line}" for line in found.unreadable]
    return Why(f"chip {chip_id}", () if step else (chip_id,), step, tuple(reasons), found.table)


def _of_place(trace: Trace, subject: str) -> Why:
    rows = [
        {"step": s.step, "unit": s.unit, "before": s.before, "left": s.left, "reason": "; ".join(s.reasons)}
        for s in trace.stages
    ]
    stages = pa.Table.from_pylist(rows, schema=STAGES)
    if trace.removed_by is None:
        told = tuple(f"chips.why({chip!r}) says which records feed it" for chip in trace.chips)
        pixels = tuple(
            f"{s.step}: {s.reasons[0]}" for s in trace.stages if s.step.startswith("filter_pixels")
        )
        return Why(subject, trace.chips, None, told + pixels, stages)
    stage: Stage = trace.stages[trace.removed_by]
    chips = trace.stages[-1].reasons if trace.stages[-1] is not stage else ()
    return Why(subject, (), stage.step, tuple(dict.fromkeys((*stage.reasons, *chips))), stages)


def _shown(table: pa.Table) -> list[str]:
    return [n for n in table.column_names if n not in ("slot", "order", "why", "reason")]


def _lines(table: pa.Table) -> Iterator[str]:
    """Yield the rows of a table as aligned text, below its head."""
    names = _shown(table)
    cells = [names, *([_cell(row[name]) for name in names] for row in table.to_pylist())]
    widths = [max(len(row[at]) for row in cells) for at in range(len(names))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:%Y-%m-%d %H:%M}" if hasattr(value, "strftime") else str(value)
