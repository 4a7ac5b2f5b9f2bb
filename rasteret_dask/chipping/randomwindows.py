# SPDX-License-Identifier: Apache-2.0
"""Windows drawn at random on the ground of planned chips: on their pixels, each inside one split cell and one split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import cell_places
from rasteret_dask.chipping.chips import ChipSources, PlannedChips, check_context
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, FOLD, bounds_of, joined, replaced
from rasteret_dask.chipping.frame import Frame, in_space
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.chipping.strata import classes_of
from rasteret_dask.errors import EmptyError, GridError, PlanError
from rasteret_dask.grid import digits
from rasteret_dask.planning.plan import Random
from rasteret_dask.planning.sampling import unit_sequence
from rasteret_dask.zones import BoxGrid, TileGrid

__all__ = ["CENTRE_CLASS", "random_windows"]

CENTRE_CLASS = "centre_class"
"""The column with the class that a window was drawn for."""

ATTEMPTS = 16
"""Places that are tried for a window, before it is moved into the chip where the last one lies."""

MOST_TRIES = 64
"""Windows that are tried for each one that is wanted: then there are no more."""

TRIES_A_PLACE = 6
"""Windows that are tried for each place that there is, at most: by then all but 1 in 400 of them have come."""

SPARE = 1.25
"""Windows that are tried for each one that is missing."""

BURNED_BYTES = 64 * 2**20
"""Of masks that are burned at once."""

LANES = 3
"""Random numbers of an attempt: which chip, which pixel of it (row and column, or one of its class)."""


def random_windows(chips: PlannedChips, step: Random, places: pa.Table | None = None) -> PlannedChips:
    """Return chips at random places of the ground of others.

    Parameters
    ----------
    chips
        The planned chips.
    step
        How many, of which size, and of which classes.
    places
        Places of classes that it names: ``chip_id``, ``class``, ``y`` and ``x`` (shares of the chip's side, from its
        north-west corner on), ``pixels`` of that class in the chip.

    Raises
    ------
    PlanError
        When there are no such classes, or no window of that size lies on the ground of the chips.
    GridError
        When the size is no whole number of the pixels of every source.

    Warns
    -----
    UserWarning
        When there are fewer windows than are asked for.

    Notes
    -----
    Window ``i`` of a class follows from the seed, the class and ``i`` alone: a larger ``n`` contains the smaller one.
    Its place is a pixel of the ground (of the class) that is its middle; where the window then leaves the ground of
    its split cell and split, other places are tried, and the last one's window is moved into its chip.
    """
    size = chips.spec.size if step.size is None else step.size
    if chips.split is not None:  # what has no split is no ground of any
        chips = replace(chips, table=chips.table.filter(pc.is_valid(chips.table.column("split"))))
    if not chips.table.num_rows:
        return chips
    _check_reach(chips, size)
    ground = _Ground.of(chips, size)
    aims = _aims(chips, step) if places is None else _aims_at(chips, step, places)
    spec = replace(chips.spec, size=size, stride=size, drawn=True)
    wanted = [step.n // len(aims) + (place < step.n % len(aims)) for place in range(len(aims))]
    sources = ChipSources(spec, chips.sources, chips.reference, chips.outlines, chips.maps)
    queues = [_Queue(aim) for aim in aims]
    while True:
        chosen = _chosen(queues, wanted)
        short = [
            (queue, want - len(own))
            for queue, want, own in zip(queues, wanted, chosen, strict=True)
            if len(own) < want and queue.tries < ground.most_tries(want)
        ]
        if not short:
            break
        for queue, missing in short:
            queue.extend(
                ground, step.seed, min(int(missing * SPARE) + 32, TRIES_A_PLACE * ground.places + 1024)
            )
        _keep_covered(chips, ground, sources, [queue for queue, _ in short])
    _tell_of_few(step, aims, wanted, chosen, size)
    drawn = [
        queue.windows.take(np.array(own, dtype=np.int64)) for queue, own in zip(queues, chosen, strict=True)
    ]
    windows = _Windows.joined(drawn)
    names = [aim.name for aim, own in zip(aims, chosen, strict=True) for _ in own]
    frame = in_space(ground.frame(windows, np.arange(len(windows.chip))), chips.resolution)
    table = sources.lay(frame, _dates(sources, chips, windows.chip)).table.select(CHIP_SCHEMA.names)
    at = pc.index_in(table.column("chip_id"), value_set=ground.ids(windows)).to_numpy(zero_copy_only=False)
    table, at = table.filter(pa.array(~np.isnan(at))), at[~np.isnan(at)].astype(np.int64)
    made = _with_columns(table, chips.table, windows.chip[at])
    if aims[0].name:
        column = pa.array([names[place] for place in at.tolist()], pa.string())
        if CENTRE_CLASS in made.column_names:
            made = made.drop_columns([CENTRE_CLASS])
        made = made.append_column(pa.field(CENTRE_CLASS, pa.string(), nullable=False), column)
    return replace(chips, table=made, spec=spec)


@dataclass(frozen=True)
class _Windows:
    """Windows, each drawn on a chip. All arrays have one entry per window."""

    chip: NDArray[np.int64]
    """The chip that holds its middle."""
    corner: NDArray[np.int64]
    """Shape (window, 2). Row and column of its north-west pixel, counted from the CRS's anchor."""

    def take(self, at: NDArray[Any]) -> _Windows:
        return _Windows(self.chip[at], self.corner[at])

    @classmethod
    def joined(cls, parts: Sequence[_Windows]) -> _Windows:
        return cls(np.concatenate([p.chip for p in parts]), np.concatenate([p.corner for p in parts]))


@dataclass(frozen=True)
class _Aim:
    """What windows are drawn for."""

    name: str
    """A class; empty: anything."""
    chips: NDArray[np.int64]
    """The chips that have some of it; a chip may come again, with another place."""
    edges: NDArray[np.float64]
    """Shape (chip,). Cumulative weights of these."""
    labels: Labels | None = None
    """Where the middle has to be a pixel of a burned class."""
    value: float = 0.0
    """The class as it is burned."""
    places: NDArray[np.int64] | None = None
    """Shape (chip, 2). Row and column of the middle in each of the chips, where it is known."""


@dataclass
class _Queue:
    """The windows that were drawn for one aim, in order."""

    aim: _Aim
    tries: int = 0
    windows: _Windows = field(
        default_factory=lambda: _Windows(np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    )
    names: list[str] = field(default_factory=list)
    """The ids of the windows."""
    fresh: _Windows | None = None
    """Windows of which nobody knows yet whether they are covered."""

    def extend(self, ground: _Ground, seed: int, count: int) -> None:
        """Draw further windows."""
        self.fresh = ground.drawn(self.aim, seed, self.tries, count)
        self.tries += count


@dataclass(frozen=True)
class _Ground:
    """The ground of chips in whole pixels of the reference source, and the size of windows on it."""

    chips: PlannedChips
    size: int
    step: int
    """Pixels from one place of a window to the next: whole pixels of every source."""
    anchor: dict[int, tuple[float, float]]
    """CRS -> a corner (x, y) of its pixels."""
    epsg: NDArray[np.int64]
    corner: NDArray[np.int64]
    """Shape (chip, 2). Row and column of each chip's north-west pixel, counted from the anchor."""
    group: NDArray[np.int64]
    """Shape (chip,). A number for chips of one split cell, split, fold and acquisition."""
    cells: NDArray[np.int64] | None
    """Shape (chip, 2). Split cells that chips were laid out in."""
    shapes: dict[int, Any] = field(default_factory=dict)
    """Group -> its ground, once it was asked for."""

    @classmethod
    def of(cls, chips: PlannedChips, size: int) -> _Ground:
        step = _whole_pixels(chips, size)
        table, pixel = chips.table, chips.resolution
        epsg, bounds = table.column("epsg").to_numpy().astype(np.int64), bounds_of(table)
        anchor, corner = {}, np.empty((len(epsg), 2), dtype=np.int64)
        for code in np.unique(epsg).tolist():
            own = epsg == code
            x, y = np.round(np.mod(bounds[own][0, [0, 3]], pixel), digits(pixel)) % pixel
            anchor[code] = float(x), float(y)
            corner[own, 0] = np.round((y - bounds[own, 3]) / pixel)
            corner[own, 1] = np.round((bounds[own, 0] - x) / pixel)
        keys = [name for name in ("cell", "split", "acquisition", FOLD) if name in table.column_names]
        codes = [
            epsg,
            *(pd.factorize(np.array(table.column(key).to_pylist(), dtype=object))[0] for key in keys),
        ]
        _, group = np.unique(np.stack(codes, -1), axis=0, return_inverse=True)
        return cls(chips, size, step, anchor, epsg, corner, group.ravel(), cell_places(table))

    @property
    def places(self) -> int:
        """How many different windows there may be: one around each place of each chip."""
        return len(self.corner) * (self.chips.spec.size // self.step + 1) ** 2

    def most_tries(self, want: int) -> int:
        """Return how many windows are tried before there are taken to be no more."""
        return min(MOST_TRIES * want, TRIES_A_PLACE * self.places) + 1024

    def drawn(self, aim: _Aim, seed: int, first: int, count: int) -> _Windows:
        """Draw windows ``first`` to ``first + count``; those that lie nowhere are left out."""
        number = np.arange(first, first + count, dtype=np.uint64)
        chip, corner = np.zeros(count, dtype=np.int64), np.zeros((count, 2), dtype=np.int64)
        left = np.arange(count)
        for attempt in range(ATTEMPTS):
            lane = (number[left] * np.uint64(ATTEMPTS) + np.uint64(attempt)) * np.uint64(LANES)
            unit = [unit_sequence(f"random|{seed}|{aim.name}|", lane + np.uint64(n)) for n in range(LANES)]
            entry = np.searchsorted(aim.edges, unit[0] * aim.edges[-1], side="right")
            entry = np.minimum(entry, len(aim.chips) - 1)
            chip[left] = aim.chips[entry]
            middle = self._middles(aim, chip[left], unit) if aim.places is None else aim.places[entry]
            corner[left] = self.corner[chip[left]] + (middle - self.size // 2) // self.step * self.step
            left = left[~self.holds(chip[left], corner[left])]
            if not len(left):
                break
        room = self.chips.spec.size - self.size
        if len(left) and room >= 0:  # at the edge of the ground: into the chip
            home = self.corner[chip[left]]
            corner[left] = np.clip(corner[left], home, home + room)
            left = left[:0]
        kept = np.setdiff1d(np.arange(count), left)
        return _Windows(chip[kept], corner[kept])

    def _middles(
        self, aim: _Aim, chip: NDArray[np.int64], unit: Sequence[NDArray[np.float64]]
    ) -> NDArray[np.int64]:
        """Return row and column of a pixel of each chip, counted in the chip; shape (window, 2)."""
        side = self.chips.spec.size
        if aim.labels is None:
            return np.asarray(np.stack([(u * side).astype(np.int64) for u in unit[1:3]], -1))
        result = np.zeros((len(chip), 2), dtype=np.int64)
        once, back = np.unique(chip, return_inverse=True)
        bounds = bounds_of(self.chips.table)
        batch = max(BURNED_BYTES // (side * side * aim.labels.dtype.itemsize), 1)
        order = np.argsort(back, kind="stable")
        begin = np.searchsorted(back[order], np.arange(len(once) + 1))
        for start in range(0, len(once), batch):
            some = once[start : start + batch]
            for at, mask in enumerate(aim.labels.burned(bounds[some], self.epsg[some], side), start):
                own = order[begin[at] : begin[at + 1]]
                pixels = np.flatnonzero(mask.ravel() == aim.value)
                pixel = pixels[(unit[1][own] * len(pixels)).astype(np.int64)]
                result[own] = np.stack(np.divmod(pixel, side), -1)
        return result

    def holds(self, chip: NDArray[np.int64], corner: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which windows lie on the ground of chips that belong together with the one that they are drawn on."""
        home, side = self.corner[chip], self.chips.spec.size
        inside = np.asarray(((corner >= home) & (corner + self.size <= home + side)).all(axis=1))
        others = np.flatnonzero(~inside)
        if not len(others):
            return inside
        others = others[np.argsort(self.group[chip[others]], kind="stable")]
        groups, begin = np.unique(self.group[chip[others]], return_index=True)
        for group, own in zip(groups.tolist(), np.split(others, begin[1:]), strict=True):
            row, col = corner[own].T
            inside[own] = shapely.covers(
                self._shape(group), shapely.box(col, row, col + self.size, row + self.size)
            )
        return inside

    def _shape(self, group: int) -> Any:
        """Return the ground of a group: x counts columns, y rows, so that all is exact."""
        if group not in self.shapes:
            row, col = np.unique(self.corner[self.group == group], axis=0).T
            side = self.chips.spec.size
            self.shapes[group] = shapely.union_all(shapely.box(col, row, col + side, row + side))
            shapely.prepare(self.shapes[group])
        return self.shapes[group]

    def bounds(self, windows: _Windows) -> NDArray[np.float64]:
        """Return xmin, ymin, xmax, ymax of windows, shape (window, 4)."""
        pixel, length = self.chips.resolution, self.size * self.chips.resolution
        anchor = np.array([self.anchor[code] for code in self.epsg[windows.chip].tolist()]).reshape(-1, 2)
        west = anchor[:, 0] + windows.corner[:, 1] * pixel
        north = anchor[:, 1] - windows.corner[:, 0] * pixel
        return np.round(np.stack([west, north - length, west + length, north], -1), 9)

    def _prefix(self, windows: _Windows, bounds: NDArray[np.float64]) -> pa.StringArray:
        """Return what the id of each window begins with: it follows from its place alone."""
        spec = self.chips.spec
        plain = spec.at is None and isinstance(spec.grid, TileGrid | BoxGrid)
        codes = np.unique(self.epsg[windows.chip]).tolist()
        names = {code: str(code) if plain else spec.grid.zones.name(code) for code in codes}
        pixel = f"random_{self.size}px_{self.chips.resolution:g}m"
        pairs = zip(self.epsg[windows.chip].tolist(), bounds[:, [0, 3]].tolist(), strict=True)
        return pa.array((f"{names[code]}_{pixel}_{x:.3f}_{y:.3f}" for code, (x, y) in pairs), pa.string())

    def ids(self, windows: _Windows) -> pa.StringArray:
        """Return the ids of the chips that windows are to become: of the acquisition of the chip that they lie on."""
        acquisition = self.chips.table.column("acquisition").take(pa.array(windows.chip)).combine_chunks()
        return joined(self._prefix(windows, self.bounds(windows)), acquisition)

    def frame(self, windows: _Windows, index: NDArray[np.int64]) -> Frame:
        """Return windows as candidates, each once, with a number for each."""
        bounds = self.bounds(windows)
        prefix = self._prefix(windows, bounds)
        first = np.sort(np.unique(prefix.to_numpy(zero_copy_only=False).astype(str), return_index=True)[1])
        whole = np.round(bounds[first] / self.chips.resolution).astype(np.int64)
        chip = windows.chip[first]
        return Frame(
            self.epsg[chip], bounds[first], -whole[:, 3], whole[:, 0], None if self.cells is None else self.cells[chip],
            index[first], prefix.take(pa.array(first)),
        )  # fmt: skip


def _check_reach(chips: PlannedChips, size: int) -> None:
    """Refuse windows that reach beyond the ground of their split in a source with windows of its own size."""
    check_context(replace(chips.spec, size=size), [s.plan for s in chips.sources], chips.reference)
    dealt = chips.split is not None or FOLD in chips.table.column_names
    if chips.spec.context_m and dealt and size < chips.spec.size:
        raise PlanError(
            f"random(size={size})", f"chips(context_m=) of chips of {chips.spec.size} pixels that are dealt already",
            "windows of that size at least, as smaller ones may show ground beside that of the chips",
            f"Draw them before they are dealt: chips.random(n, size={size}).split(...).",
        )  # fmt: skip


def _whole_pixels(chips: PlannedChips, size: int) -> int:
    """Return the least number of the reference's pixels that is a whole number of each source's."""
    wider = dict(chips.spec.context_m)
    pixels = [s.plan.resolution for s in chips.sources if s.plan.name not in wider]
    ratios = [Fraction(chips.resolution / pixel).limit_denominator(10_000) for pixel in pixels]
    step = lcm(*(ratio.denominator for ratio in ratios))
    if size % step:
        near = sorted({max(size // step, 1) * step, (size // step + 1) * step})
        raise GridError(
            f"random(size={size})", f"{size * chips.resolution:g} m", "a whole number of every source's pixels",
            f"Nearest sizes that fit: {', '.join(map(str, near))}.",
        )  # fmt: skip
    return step


def _aims(chips: PlannedChips, step: Random) -> list[_Aim]:
    """Return what windows are drawn for: each class of a column, of burned labels or of columns of shares."""
    rows = chips.table.num_rows
    if not step.balance:
        return [_Aim("", np.arange(rows), np.arange(1.0, rows + 1))]
    subject = f"random(balance={step.balance[0] if len(step.balance) == 1 else list(step.balance)!r})"
    strata = classes_of(chips, step.balance, subject, most_px=chips.spec.size)
    aims = []
    for number, name in enumerate(strata.names):
        own = np.flatnonzero(strata.amounts[:, number] > 0)
        if len(own):
            edges = np.cumsum(strata.amounts[own, number].astype(np.float64))
            value = 0.0 if strata.labels is None else float(strata.values[number])
            aims.append(_Aim(name, own, edges, strata.labels, value))
    return _checked(step, aims, subject)


def _aims_at(chips: PlannedChips, step: Random, places: pa.Table) -> list[_Aim]:
    """Return the same for each class of a table of places."""
    place = pc.index_in(places.column("chip_id"), value_set=chips.table.column("chip_id").combine_chunks())
    chip = np.asarray(pc.fill_null(place, -1).to_numpy(), dtype=np.int64)
    side, table = chips.spec.size, places.select(["class", "y", "x", "pixels"])
    at = np.stack([table.column(name).to_numpy() for name in ("y", "x")], -1)
    at = np.clip((at * side).astype(np.int64), 0, side - 1)
    names, number = np.unique(np.array(table.column("class").to_pylist(), dtype=str), return_inverse=True)
    pixels, aims = table.column("pixels").to_numpy().astype(np.float64), []
    for each, name in enumerate(names.tolist()):
        own = np.flatnonzero((number == each) & (chip >= 0))
        if len(own):  # the places of a chip share its pixels
            alike = np.bincount(chip[own], minlength=chips.table.num_rows)[chip[own]]
            aims.append(_Aim(name, chip[own], np.cumsum(pixels[own] / alike), places=at[own]))
    return _checked(step, aims, "random(balance=<places>)")


def _checked(step: Random, aims: list[_Aim], subject: str) -> list[_Aim]:
    """Return what windows are drawn for, or refuse it."""
    if not aims:
        raise PlanError(
            subject, "no class on the ground of any chip", "at least one",
            "Give labels that lie on that ground, or columns of shares that are not all 0.",
        )  # fmt: skip
    if step.n < len(aims):
        raise PlanError(
            f"random({step.n})", f"{len(aims)} classes", "a window for each class at least",
            f"Say random({len(aims)}).",
        )  # fmt: skip
    return aims


def _keep_covered(
    chips: PlannedChips, ground: _Ground, sources: ChipSources, queues: Sequence[_Queue]
) -> None:
    """Move the fresh windows that become chips to those of their queue."""
    fresh = [queue.fresh for queue in queues if queue.fresh is not None]
    windows = _Windows.joined(fresh)
    names = ground.ids(windows)
    frame = in_space(ground.frame(windows, np.arange(len(windows.chip))), chips.resolution)
    laid = sources.lay(frame, _dates(sources, chips, windows.chip)).table.column("chip_id")
    there = pc.is_in(names, value_set=laid.combine_chunks()).to_numpy(zero_copy_only=False)
    first = 0
    for queue, own in zip(queues, fresh, strict=True):
        kept = first + np.flatnonzero(there[first : first + len(own.chip)])
        queue.names += names.take(pa.array(kept)).to_pylist()
        queue.windows = _Windows.joined([queue.windows, windows.take(kept)])
        queue.fresh = None
        first += len(own.chip)


def _dates(sources: ChipSources, chips: PlannedChips, chip: NDArray[np.int64]) -> pa.Table | None:
    """Return the dates of each window that sources ask for: those of the chip that it is drawn on."""
    asked = {c for s in sources.sources if s.chip_times is not None for c in s.chip_times.columns}
    return chips.table.select(sorted(asked)).take(pa.array(chip)) if asked else None


def _chosen(queues: Sequence[_Queue], wanted: Sequence[int]) -> list[list[int]]:
    """Return for each queue which of its windows are taken, in turns: none that another one has taken."""
    taken, result, place = set[str](), [list[int]() for _ in queues], [0] * len(queues)
    open_ = set(range(len(queues)))
    while open_:
        for number in sorted(open_):
            names = queues[number].names
            while place[number] < len(names) and names[place[number]] in taken:
                place[number] += 1
            if place[number] >= len(names) or len(result[number]) >= wanted[number]:
                open_.discard(number)
                continue
            taken.add(names[place[number]])
            result[number].append(place[number])
    return result


def _tell_of_few(
    step: Random, aims: Sequence[_Aim], wanted: Sequence[int], chosen: Sequence[Sequence[int]], size: int
) -> None:
    """Raise where there is no window at all, and warn where there are fewer than are asked for."""
    if not any(chosen):
        raise EmptyError(
            f"random(size={size})", "no window of that size on ground that chips of one split cell and split cover",
            "at least one", "Ask for smaller windows, larger cells (chips(cell_km=)), or drop fewer chips before.",
        )  # fmt: skip
    parts = zip(aims, wanted, chosen, strict=True)
    few = [(aim.name, len(own), want) for aim, want, own in parts if len(own) < want]
    if few:
        counted = ", ".join(
            f"{have:,} of {want:,}" + (f" for {name}" if name else "") for name, have, want in few
        )
        warnings.warn(
            f"random({step.n:,}): hardly any more different windows lie on the ground of the chips than {counted}. "
            + (f"stream(balance={CENTRE_CLASS!r}) makes up for it." if step.balance else "Ask for fewer."),
            UserWarning,
            stacklevel=5,
        )


def _with_columns(table: pa.Table, chips: pa.Table, chip: NDArray[np.int64]) -> pa.Table:
    """Return windows with the split and the further columns of the chips that they were drawn on."""
    own = chips.take(pa.array(chip))
    table = replaced(table, "split", own.column("split").combine_chunks())
    for column in chips.schema:
        if column.name not in CHIP_SCHEMA.names:
            table = table.append_column(column, own.column(column.name))
    return table
