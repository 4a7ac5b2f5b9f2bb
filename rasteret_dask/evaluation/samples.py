# SPDX-License-Identifier: Apache-2.0
"""Predictions of whole chips, a row each, beside a column of the chip table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.evaluation.confusion import DifferenceSums, Pairs
from rasteret_dask.evaluation.naming import class_codes
from rasteret_dask.evaluation.passes import LOST, ShardCounts
from rasteret_dask.lists import listed
from rasteret_dask.table import geoparquet

__all__ = ["Samples", "chip_predictions", "samples_of"]

SUBJECT = "evaluate(predictions=)"

VALUES = ("class", "prediction", "predicted", "value")
"""Columns that hold predictions, the first that there is."""

NAMES = "class_name"
"""The column with names of classes, of models of whole chips: what labels that are text are compared with."""

_TABLES = (".parquet", ".geoparquet", ".pq")


@dataclass(frozen=True, eq=False)
class Samples:
    """Predictions of chips beside what is true."""

    part: ShardCounts
    is_class: bool
    names: Mapping[int, str]
    codes: Mapping[int, int]
    """Predicted class -> the class of the labels, where these differ."""


def chip_predictions(predictions: Any) -> pa.Table | None:
    """Return predictions that are a table of chips; None where they are something else.

    Raises
    ------
    SchemaError
        When a table has no column chip_id.
    """
    table: Any = predictions
    if isinstance(predictions, str | os.PathLike):
        if not os.fspath(predictions).lower().endswith(_TABLES):
            return None
        table = geoparquet.read(predictions)
    elif hasattr(predictions, "arrow") and isinstance(predictions.arrow, pa.Table):
        table = predictions.arrow
    elif hasattr(predictions, "iloc"):  # pandas, GeoPandas
        frame = (
            predictions.drop(columns=predictions.geometry.name)
            if hasattr(predictions, "crs")
            else predictions
        )
        table = pa.Table.from_pandas(frame, preserve_index=False)
    if not isinstance(table, pa.Table):
        return None
    if "chip_id" not in table.column_names:
        raise SchemaError(
            SUBJECT, "a table without column chip_id", "a row a chip: chip_id, and its class or number"
        )
    return table


def samples_of(
    predictions: pa.Table, column: str | None, chips: pa.Table, label: str,
    classes: Mapping[int, str | int] | None,
) -> Samples:  # fmt: skip
    """Compare predictions of chips with a column of the chip table.

    Parameters
    ----------
    predictions
        A row a chip.
    column
        Its column with predictions; None: that of a usual name, or the only one.
    chips
        The chip table.
    label
        The column that is true.
    classes
        Predicted class -> the name or number of the labels' class.

    Raises
    ------
    PlanError
        When there is no such column, a chip stands twice, none is of these chips, or one side has numbers and the other
        names.
    """
    is_text = _kind(chips.column(label).type, label) == "text"
    named = column is None and is_text and NAMES in predictions.column_names
    predicted = predictions.column(NAMES if named else _column(predictions, column))
    ids = predictions.column("chip_id").cast(pa.string())
    if pc.count_distinct(ids).as_py() < len(ids):
        twice = pc.value_counts(ids)
        name = twice.field("values")[int(np.argmax(twice.field("counts").to_numpy()))].as_py()
        raise PlanError(SUBJECT, f"chip {name} twice", "each chip once", "Keep one row a chip.")
    place = pc.index_in(chips.column("chip_id"), value_set=ids.combine_chunks())
    if place.null_count == len(place):
        raise PlanError(SUBJECT, "no prediction of any of these chips", "predictions of chips of this plan")
    there = np.asarray(place.is_valid())
    guess, true = predicted.take(place), chips.column(label)
    kinds = _kind(true.type, label), _kind(guess.type, "predictions")
    if kinds == ("text", "number") and classes and not pa.types.is_floating(guess.type):
        guess = pa.chunked_array(
            [
                pa.array(
                    [None if v is None else classes.get(v, str(v)) for v in guess.to_pylist()], pa.string()
                )
            ]
        )
        kinds, classes = ("text", "text"), None
    if kinds[0] != kinds[1]:
        raise PlanError(
            f"evaluate(labels={label!r})", f"labels that are {kinds[0]}s, predictions that are {kinds[1]}s",
            "both the same",
            "Say what predicted numbers are called: classes={1: 'water'}.",
        )  # fmt: skip
    is_class = kinds[0] == "text" or not (pa.types.is_floating(true.type))
    names: dict[int, str] = {}
    if kinds[0] == "text":
        words = sorted({*true.to_pylist(), *guess.to_pylist()} - {None})
        names = dict(enumerate(words))
        true, guess = (
            pc.index_in(v.cast(pa.string()), value_set=pa.array(words, pa.string())) for v in (true, guess)
        )
    naming = class_codes(names, {}, classes)
    t, p = _numbers(true), _numbers(guess)
    if is_class and kinds[0] == "number" and not (_whole(t) and _whole(p)):
        raise PlanError(
            f"evaluate(labels={label!r})", "predictions that are no whole numbers", "classes", "Round them."
        )
    return Samples(_compared(chips, t, p, there, is_class), is_class, naming.names, naming.codes)


def _compared(
    chips: pa.Table,
    true: NDArray[np.float64],
    guess: NDArray[np.float64],
    there: NDArray[np.bool_],
    is_class: bool,
) -> ShardCounts:
    labelled, valid = np.isfinite(true), np.isfinite(guess)
    reasons = (np.zeros_like(there), ~labelled, labelled & ~there, labelled & there & ~valid)
    both = labelled & there & valid
    ids = tuple(chips.column("chip_id").to_pylist())
    lost = np.stack(reasons, -1).astype(np.int64)
    rows = np.flatnonzero(both)
    counts: Pairs | DifferenceSums
    if is_class:
        ones = np.ones(len(rows), dtype=np.int64)
        counts = Pairs(rows, true[rows].astype(np.int64), guess[rows].astype(np.int64), ones)
    else:
        apart = np.where(both, guess - true, 0.0)
        mean = np.where(both, true, 0.0)
        counts = DifferenceSums(
            both.astype(np.int64), apart, apart**2, np.abs(apart), mean, np.zeros(len(ids))
        )
    assert lost.shape[1] == len(LOST)
    return ShardCounts(ids, lost, np.ones(len(ids), dtype=bool), counts)


def _column(table: pa.Table, column: str | None) -> str:
    own = [name for name in table.column_names if name not in ("chip_id", "geometry", "bbox")]
    if column is not None and column not in own:
        raise PlanError("evaluate(column=)", repr(column), f"one of {listed(own)}")
    usual = [name for name in VALUES if name in own]
    found = column or (usual[0] if usual else own[0] if len(own) == 1 else None)
    if found is None:
        raise PlanError(
            SUBJECT, f"columns {listed(own) or 'none'}", f"one of predictions: {', '.join(VALUES)}",
            f"Name it: column={own[0]!r}." if own else "",
        )  # fmt: skip
    return found


def _kind(kind: pa.DataType, name: str) -> str:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    raise PlanError(f"evaluate: column {name}", f"values of type {kind}", "text or numbers")


def _numbers(values: Any) -> NDArray[np.float64]:
    """Return numbers, NaN where there is none."""
    return np.array([np.nan if v is None else float(v) for v in values.to_pylist()], dtype=np.float64)


def _whole(values: NDArray[np.float64]) -> bool:
    there = values[np.isfinite(values)]
    return bool((there == np.rint(there)).all())
