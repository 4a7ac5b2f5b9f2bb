# SPDX-License-Identifier: Apache-2.0
"""Chips, predictions and labels put together: from what the user gives to an evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.chipping.regions import check_regions, names_of
from rasteret_dask.errors import EmptyError, GridError, PlanError
from rasteret_dask.evaluation.confusion import DifferenceSums, Pairs
from rasteret_dask.evaluation.errormap import write_errors
from rasteret_dask.evaluation.evaluation import REASONS, Evaluation, Note
from rasteret_dask.evaluation.ground import TRAIN, ChipBounds, TrainingPlan
from rasteret_dask.evaluation.naming import ClassCodes, class_codes
from rasteret_dask.evaluation.passes import LOST, Beside, ShardCounts, parts_of, patches_of
from rasteret_dask.evaluation.rasters import MapRequest, rasters_of
from rasteret_dask.evaluation.reading import Rasters
from rasteret_dask.evaluation.samples import chip_predictions, samples_of
from rasteret_dask.evaluation.truth import Truth, truth_of
from rasteret_dask.lists import listed
from rasteret_dask.planning.plan import is_number
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Output

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["Question", "ChipReading", "evaluate"]

MOST_CLASSES = 256
"""Of more, a map is no map of classes: its codes are measured numbers."""


@dataclass(frozen=True, eq=False)
class ChipReading:
    """The chips."""

    job: Job
    outputs: tuple[Output, ...]
    context: ReadContext
    reference: int
    """The number of the reference source."""


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of them: see :meth:`rasteret_dask.Chips.evaluate`."""

    predictions: Any
    labels: Any
    plan: TrainingPlan | None = None
    regions: pa.Table | str | None = None
    """A table of regions, or a column of the chip table."""
    distances_m: tuple[float, ...] = ()
    column: str | None = None
    classes: Mapping[int, str | int] | None = None
    band: int | str | None = None
    nodata: float | None = None
    once: bool = True


def evaluate(
    chips: ChipReading, question: Question, client: ClientLike = None, progress: bool = True
) -> Evaluation:
    """Compare predictions with labels on the ground of chips; see :meth:`rasteret_dask.Chips.evaluate`."""
    job = chips.job
    table = job.chosen_chips()
    if not table.num_rows:
        raise EmptyError("evaluate", "no chip", "at least one", "Ask for less in filter or select.")
    around = _around(table, question)  # what goes wrong is told before anything is read
    pixels = planned(job, chips.outputs, chips.context).pixels
    rows = chip_predictions(question.predictions)
    truth = truth_of(
        question.labels, None if rows is not None else question.column, job, pixels, chips.reference
    )
    if rows is not None or isinstance(truth, str):
        return _of_chips(rows, truth, table, around, question)
    known = {name: code for code, name in truth.names.items()}
    known |= {str(v): known.get(str(v), k) for k, v in (question.classes or {}).items()}
    request = MapRequest("evaluate(predictions=)", truth.is_class, question.nodata, question.band, known)
    predictions = rasters_of(question.predictions, request)
    _check_ground(predictions, table)
    _naming(truth, predictions, question)  # what is wrong with names is told before anything is read
    beside = Beside(job, chips.outputs, chips.context, truth, predictions, question.once)
    parts = parts_of(beside, client, progress)
    naming = _naming(truth, predictions, question, _predicted(parts))
    nearest = sum(int((~part.exact).sum()) for part in parts)
    note = Note(
        predictions.name, truth.text, truth.is_class, names=naming.names, distances_m=around.distances_m,
        has_regions=question.regions is not None, nearest=nearest,
    )  # fmt: skip

    def errors(to: Path, shown: bool) -> tuple[Path, ...]:
        return write_errors(beside, patches_of(beside, naming.codes, client, shown), to)

    return _evaluation(parts, naming.codes, around, note, errors)


@dataclass(frozen=True, eq=False)
class _Around:
    """What is known of the chips before predictions are looked at."""

    table: pa.Table
    """``chip_id``, ``split``, ``region``, ``distance_m``, then the columns of the chip table."""
    distances_m: tuple[float, ...]


def _around(table: pa.Table, question: Question) -> _Around:
    split = np.array(table.column("split").to_pylist(), dtype=object)
    distance: NDArray[np.float64] | None = None
    edges: tuple[float, ...] = ()
    if question.plan is not None:
        edges = _edges(question.distances_m)
        related = question.plan.relate(ChipBounds.of(table))
        distance = related.distance_m
        other = np.array([one is not None for one in split]) & (split != TRAIN) & (related.split == TRAIN)
        if other.any():
            first = int(np.flatnonzero(other)[0])
            raise PlanError(
                "evaluate(splits=)",
                f"{int(other.sum())} chips of split {split[first]!r} on ground of the plan's train chips "
                f"({table.column('chip_id')[first].as_py()})",
                "chips that are split as the training plan is",
                "Give the chips before split(), which get the plan's splits; or deal them as it is: split(cells=), "
                "or the same cell_km, seed and shares.",
            )  # fmt: skip
        split = np.array(
            [
                mine if mine is not None else theirs or None
                for mine, theirs in zip(split, related.split, strict=True)
            ],
            dtype=object,
        )
    region = _regions(table, question.regions)
    own = [name for name in table.column_names if name not in ("chip_id", "split", "feeds", "geometry")]
    return _Around(
        pa.table({
            "chip_id": table.column("chip_id"), "split": pa.array(split.tolist(), pa.string()), "region": region,
            "distance_m": pa.array([None] * table.num_rows if distance is None else distance, pa.float64()),
            **{name: table.column(name) for name in own if name not in _TAKEN}, "geometry": table.column("geometry"),
        }),
        edges,
    )  # fmt: skip


_TAKEN = (
    "region",
    "distance_m",
    "pixels",
    "errors",
    "accuracy",
    "bias",
    "rmse",
    "mae",
    "counts",
    "sums",
    *REASONS,
)


def _edges(distances_m: Sequence[float]) -> tuple[float, ...]:
    edges = tuple(distances_m)
    rising = all(is_number(one) and one >= 0 for one in edges) and all(a < b for a, b in pairwise(edges))
    if not edges or not rising:
        raise PlanError(
            "evaluate(distances_m=)", repr(distances_m), "metres from 0 on, each larger than the one before"
        )
    return tuple(float(one) for one in (edges if edges[0] == 0 else (0.0, *edges)))


def _regions(table: pa.Table, regions: pa.Table | str | None) -> Any:
    if regions is None:
        return pa.nulls(table.num_rows, pa.string())
    if isinstance(regions, str):
        if regions not in table.column_names:
            own = [name for name in table.column_names if name not in CHIP_SCHEMA.names]
            raise PlanError(
                "evaluate(regions=)", repr(regions),
                f"a column of the chip table ({listed(own) or 'none of yours'}), or polygons",
            )  # fmt: skip
        return table.column(regions).cast(pa.string())
    return names_of(regions, check_regions(regions, "evaluate(regions=)"), table.column("geometry")).cast(
        pa.string()
    )


def _check_ground(predictions: Rasters, table: pa.Table) -> None:
    """Raise PlanError where no raster of a map touches any chip."""
    columns = (table.column(name).to_pylist() for name in ("epsg", "xmin", "ymin", "xmax", "ymax"))
    if any(predictions.touching(code, box) for code, *box in zip(*columns, strict=True)):
        return
    raise GridError(
        "evaluate(predictions=)", f"{predictions.name} ({predictions.grids}), which lies on the ground of no chip",
        "a map of the ground of these chips", "Look at its CRS and bounds, and at chips.plot().",
    )  # fmt: skip


def _predicted(parts: Sequence[ShardCounts]) -> list[int]:
    """Return the predicted classes that there are."""
    codes = [part.counts.predicted for part in parts if isinstance(part.counts, Pairs)]
    return np.unique(np.concatenate(codes)).tolist() if codes else []


def _naming(truth: Truth, predictions: Rasters, question: Question, seen: Sequence[int] = ()) -> ClassCodes:
    if not truth.is_class:
        return ClassCodes({}, {})
    beside = truth.labels is not None and truth.text == truth.labels.column
    if beside and truth.names and not predictions.names and question.classes is None:
        raise PlanError(
            "evaluate(labels=<polygons>)",
            f"classes {listed(list(truth.names.values()))}, and a map whose classes have no names",
            "names on both sides", "Say what predicted classes are called: classes={1: 'water'}.",
        )  # fmt: skip
    return class_codes(truth.names, predictions.names, question.classes, seen)


def _of_chips(
    rows: pa.Table | None, truth: Truth | str, table: pa.Table, around: _Around, question: Question
) -> Evaluation:
    if rows is None:
        raise PlanError(
            f"evaluate(labels={truth!r})", "a class for each chip, and a map",
            "labels of pixels, or predictions of chips",
            "Burn the labels: chips(labels=, rasterize=); or give a table with chip_id and class.",
        )  # fmt: skip
    if not isinstance(truth, str):
        raise PlanError(
            f"evaluate(labels={truth.text!r})", "labels of pixels, and predictions of chips",
            "a column of the chip table",
            "Add one: chips.with_table(chips.class_shares(...)), or give a map.",
        )  # fmt: skip
    samples = samples_of(rows, question.column, table, truth, question.classes)
    name = (
        os.fspath(question.predictions) if isinstance(question.predictions, str | os.PathLike) else "a table"
    )
    note = Note(
        name, truth, samples.is_class, "chip", samples.names, around.distances_m, question.regions is not None
    )  # fmt: skip
    return _evaluation([samples.part], samples.codes, around, note, None)


def _evaluation(
    parts: Sequence[ShardCounts], codes: Mapping[int, int], around: _Around, note: Note, errors: Any
) -> Evaluation:
    ids = [one for part in parts for one in part.ids]
    place = {one: at for at, one in enumerate(around.table.column("chip_id").to_pylist())}
    table = around.table.take(pa.array([place[one] for one in ids], pa.int64()))
    if isinstance(parts[0].counts, Pairs):
        firsts = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1].tolist()
        pairs = Pairs.together([part.counts for part in parts], firsts)  # type: ignore[misc]
        columns = _class_columns(_merged(pairs, codes), len(ids), note)
    else:
        columns = _number_columns(DifferenceSums.together([part.counts for part in parts]))  # type: ignore[misc]
    lost = np.concatenate([part.lost for part in parts])
    more = {
        "pixels": columns.pop("pixels"),
        **{name: pa.array(lost[:, at]) for at, name in enumerate(LOST)},
        **columns,
    }
    for name, values in more.items():
        table = table.add_column(table.num_columns - 1, name, values)
    result = Evaluation(table, note, errors)
    if not result.pixels:
        why = ", ".join(f"{n:,} {REASONS[name]}" for name, n in result.left_out.items() if n)
        raise PlanError(
            f"evaluate: {note.predictions} against {note.labels}", f"nothing to compare ({why})",
            f"{note.unit}s that have both a label and a prediction", "Look at the ground and the nodata of both.",
        )  # fmt: skip
    return result


def _merged(pairs: Pairs, codes: Mapping[int, int]) -> Pairs:
    """Return pairs with the predicted classes as classes of the labels, in order of chip and classes."""
    own, place = np.unique(pairs.predicted, return_inverse=True)
    predicted = np.array([codes.get(one, one) for one in own.tolist()], dtype=np.int64)[place]
    keys, at = np.unique(np.stack([pairs.chip, pairs.truth, predicted], -1), axis=0, return_inverse=True)
    pixels = np.zeros(len(keys), dtype=np.int64)
    np.add.at(pixels, at.ravel(), pairs.pixels)
    merged = Pairs(keys[:, 0], keys[:, 1], keys[:, 2], pixels)
    many = len(np.unique(np.concatenate([merged.truth, merged.predicted])))
    if many > MOST_CLASSES:
        raise PlanError(
            "evaluate", f"{many:,} different classes", f"at most {MOST_CLASSES}",
            "Compare measured numbers with labels that are measured, or group classes: classes={1: 'water'}.",
        )  # fmt: skip
    return merged


def _class_columns(pairs: Pairs, chips: int, note: Note) -> dict[str, Any]:
    pixels, wrong = np.zeros(chips, dtype=np.int64), np.zeros(chips, dtype=np.int64)
    np.add.at(pixels, pairs.chip, pairs.pixels)
    np.add.at(wrong, pairs.chip, np.where(pairs.truth == pairs.predicted, 0, pairs.pixels))
    offsets = np.searchsorted(pairs.chip, np.arange(chips + 1)).astype(np.int32)
    struct = pa.StructArray.from_arrays(
        [pa.array(pairs.truth), pa.array(pairs.predicted), pa.array(pairs.pixels)],
        ["truth", "predicted", "pixels"],
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = (pixels - wrong) / pixels
    return {
        "pixels": pa.array(pixels), "errors": pa.array(wrong),
        "accuracy": pa.array(accuracy, mask=pixels == 0), "counts": pa.ListArray.from_arrays(pa.array(offsets), struct),
    }  # fmt: skip


def _number_columns(sums: DifferenceSums) -> dict[str, Any]:
    missing = sums.pixels == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        bias, rmse, mae = (
            sums.bias / sums.pixels,
            np.sqrt(sums.square / sums.pixels),
            sums.absolute / sums.pixels,
        )
    names = ("bias", "square", "absolute", "mean", "spread")
    struct = pa.StructArray.from_arrays([pa.array(getattr(sums, name)) for name in names], list(names))
    return {
        "pixels": pa.array(sums.pixels), "bias": pa.array(bias, mask=missing), "rmse": pa.array(rmse, mask=missing),
        "mae": pa.array(mae, mask=missing), "sums": struct,
    }  # fmt: skip
