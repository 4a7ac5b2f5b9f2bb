# SPDX-License-Identifier: Apache-2.0
"""Where evaluated chips lie: how far from the train ground, on whose split, and which of them share pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.distances import apart_m
from rasteret_dask.chipping.frame import Frame, frame_of, outline_wkb
from rasteret_dask.chipping.splits import touch_area
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.planning.names import in_order
from rasteret_dask.show.audit import Ground

__all__ = ["Related", "Repeats", "TrainingPlan", "ChipBounds", "repeated", "repeats_of"]

TRAIN = "train"

_COLUMNS = ("chip_id", "epsg", "xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class ChipBounds:
    """Where some chips lie."""

    epsg: NDArray[np.int64]
    bounds: NDArray[np.float64]
    """Shape (chip, 4): xmin, ymin, xmax, ymax."""

    @classmethod
    def of(cls, table: pa.Table, reach_m: float = 0.0) -> ChipBounds:
        """Take a chip table, or windows that reach farther on each side."""
        frame = frame_of(table).grown(reach_m)
        return cls(frame.epsg.astype(np.int64), frame.bounds)

    def beside(self, other: ChipBounds) -> Ground:
        """Return the ground of these chips, then that of others."""
        frames = [_frame(one) for one in (self, other)]
        wkb = pa.chunked_array([outline_wkb(frame) for frame in frames], pa.binary())
        return Ground.of_windows(
            np.append(self.epsg, other.epsg), np.concatenate([self.bounds, other.bounds]), wkb
        )


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """The chips that a model was trained with: their ground, and the split of each."""

    windows: ChipBounds
    split: NDArray[np.object_]
    """Shape (chip,). ``""`` where there is none."""

    @classmethod
    def of(cls, table: pa.Table, reach_m: float = 0.0) -> TrainingPlan:
        """Take a chip table.

        Parameters
        ----------
        table
            With the columns of a chip table that say where chips lie, and their split. Without any split all are
            train.
        reach_m
            How far beyond its bounds a chip's widest window reaches.

        Raises
        ------
        SchemaError
            When it lacks such columns.
        PlanError
            When no chip is of split train.
        """
        lacking = [name for name in _COLUMNS if name not in table.column_names]
        if lacking:
            raise SchemaError(
                "evaluate(splits=)", f"a table without column {', '.join(lacking)}",
                "chips, a store, a saved plan, or a chip table as Chips.save writes it",
            )  # fmt: skip
        has = "split" in table.column_names and table.column("split").null_count < table.num_rows
        names = table.column("split").to_pylist() if has else [TRAIN] * table.num_rows
        split = np.array([name or "" for name in names], dtype=object)
        if TRAIN not in names:
            found = ", ".join(in_order({*split} - {""})) or "no chip"
            raise PlanError(
                "evaluate(splits=)", f"no chip of split {TRAIN!r} ({found})",
                "the chips that the model was trained with",
                "Give the training plan before select(), or select('train') of it.",
            )  # fmt: skip
        return cls(ChipBounds.of(table, reach_m), split)

    def relate(self, chips: ChipBounds) -> Related:
        """Return how chips lie to this plan: how far from its train chips, and on the ground of which split."""
        ground = chips.beside(self.windows)
        first = len(chips.epsg)
        many = np.arange(first)
        rows = {name: first + np.flatnonzero(self.split == name) for name in {*self.split.tolist()} - {""}}
        ranked = [TRAIN, *in_order(rows.keys() - {TRAIN})]
        best = np.full(first, len(ranked), dtype=np.int64)
        for rank, name in enumerate(ranked):
            left = many[best == len(ranked)]
            best[left[_shares(ground, left, rows[name])]] = rank
        split = np.array([*ranked, ""], dtype=object)[best]
        return Related(_distances_m(ground, many, rows[TRAIN]), split)


@dataclass(frozen=True, slots=True)
class Related:
    """How chips lie to a training plan."""

    distance_m: NDArray[np.float64]
    """Shape (chip,). To the nearest train chip, 0 where they touch. In a UTM zone that is measured on its map, which is
    the ground within a thousandth."""
    split: NDArray[np.object_]
    """Shape (chip,). The split of its ground: train where any train chip shares some, of several others the first of
    val, test and the others by name; ``""`` where the plan has no chip."""


def _frame(windows: ChipBounds) -> Frame:
    nothing = np.zeros(len(windows.epsg), dtype=np.int64)
    blank = pa.array([""] * len(nothing), pa.string())
    return Frame(windows.epsg, windows.bounds, nothing, nothing, None, None, blank)


def _distances_m(ground: Ground, chips: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.float64]:
    result = np.full(len(chips), np.inf)
    for code in np.unique(ground.epsg[chips]).tolist():
        own = np.flatnonzero(ground.epsg[chips] == code)
        boxes, here = ground.boxes[chips[own]], ground.epsg[train] == code
        result[own] = _nearest(code, boxes, ground.boxes[train[here]])
        near = _near(ground, chips[own], train[~here], float(result[own].max(initial=0.0)))
        if len(near):
            result[own] = np.minimum(result[own], _nearest(code, boxes, ground.moved(near, code)))
    return result


def _near(
    ground: Ground, chips: NDArray[np.int64], others: NDArray[np.int64], distance_m: float
) -> NDArray[np.int64]:
    """Return those of some chips that may lie within a distance of others; never too few."""
    return ground.near(chips, others, distance_m) if len(others) else others


def _shares(ground: Ground, chips: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which chips share ground with others."""
    result = np.zeros(len(chips), dtype=bool)
    for code in np.unique(ground.epsg[chips]).tolist():
        own = np.flatnonzero(ground.epsg[chips] == code)
        here = ground.epsg[others] == code
        near = _near(ground, chips[own], others[~here], 0.0)
        moved = ground.moved(near, code) if len(near) else np.zeros(0, dtype=object)
        shapes = np.concatenate([ground.boxes[others[here]], moved])
        boxes = ground.boxes[chips[own]]
        at, other = shapely.STRtree(shapes).query(boxes, predicate="intersects")
        common = shapely.area(shapely.intersection(boxes[at], shapes[other])) > touch_area(code)
        result[own[at[common]]] = True
    return result


def _nearest(code: int, boxes: NDArray[np.object_], others: NDArray[np.object_]) -> NDArray[np.float64]:
    """Return the distance of each of some boxes to the nearest of other shapes of their map; inf without any."""
    result = np.full(len(boxes), np.inf)
    if len(others):
        at, other = shapely.STRtree(others).query_nearest(boxes, all_matches=False)
        result[at] = apart_m(code, boxes[at], others[other])
    return result


@dataclass(frozen=True, eq=False)
class Repeats:
    """Which chips show pixels that an earlier chip shows too."""

    offsets: NDArray[np.int64]
    """Shape (chip + 1,). Entries of chip i are offsets[i] to offsets[i + 1]."""
    bounds: NDArray[np.float64]
    """Shape (entry, 4). Of the earlier chip: xmin, ymin, xmax, ymax, in the CRS of both."""

    def __len__(self) -> int:
        return len(self.bounds)

    def of_chips(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
        """Return the earlier chips' bounds of each of some chips, shape (entry, 4) each."""
        return tuple(self.bounds[self.offsets[row] : self.offsets[row + 1]] for row in rows.tolist())


def repeats_of(table: pa.Table, kept: NDArray[np.bool_] | None = None) -> Repeats:
    """Return which chips overlap earlier ones of their CRS, in the order of the table.

    Parameters
    ----------
    table
        A chip table.
    kept
        Shape (chip,). Which chips count; None: all.
    """
    epsg, bounds = table.column("epsg").to_numpy(), bounds_of(table)
    later, earlier = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    there = np.ones(len(epsg), dtype=bool) if kept is None else kept
    for code in np.unique(epsg).tolist():
        rows = np.flatnonzero((epsg == code) & there)
        windows, first, window = np.unique(bounds[rows], axis=0, return_index=True, return_inverse=True)
        window = window.ravel()
        boxes = shapely.box(*windows.T)
        one, other = shapely.STRtree(boxes).query(boxes)
        a, b = windows[one], windows[other]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        before = (sides > 0).all(axis=1) & (first[other] < first[one])
        # chips of one window: those behind its first chip show nothing new, and need no other reason
        again = np.flatnonzero(first[window] < np.arange(len(rows)))
        later += [rows[first[one[before]]], rows[again]]
        earlier += [rows[first[other[before]]], rows[first[window[again]]]]
    chip, seen = np.concatenate(later), np.concatenate(earlier)
    order = np.lexsort((seen, chip))
    offsets = np.searchsorted(chip[order], np.arange(len(epsg) + 1))
    return Repeats(offsets, bounds[seen[order]])


def repeated(
    bounds: NDArray[np.float64], shape: tuple[int, int], earlier: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Tell which pixels of a chip have their centres in one of the chips before it, shape (y, x).

    Parameters
    ----------
    bounds, shape
        Of the chip: xmin, ymin, xmax, ymax, and (height, width).
    earlier
        Shape (entry, 4). Bounds of the others.
    """
    (xmin, ymin, xmax, ymax), (height, width) = bounds, shape
    x = xmin + (np.arange(width) + 0.5) * ((xmax - xmin) / width)
    y = ymax - (np.arange(height) + 0.5) * ((ymax - ymin) / height)
    result = np.zeros(shape, dtype=bool)
    for west, south, east, north in earlier.tolist():
        rows, columns = np.flatnonzero((y > south) & (y <= north)), np.flatnonzero((x >= west) & (x < east))
        if len(rows) and len(columns):
            result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return result
