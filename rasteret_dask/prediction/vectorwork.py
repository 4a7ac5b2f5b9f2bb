# SPDX-License-Identifier: Apache-2.0
"""A shard's chips become rows of answers: a class, probabilities, a number or a vector each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.errors import ModelError
from rasteret_dask.prediction.models import ModelParcel
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.store.unitchips import ShardReader
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.shards import Shipped

__all__ = ["FIRST", "LAST", "ROW", "ShardAnswers", "VectorWork", "answer_fields"]

ROW, FIRST, LAST = "row", "first", "last"
"""Columns of a shard's answers: the chip's row in the job's table, and when its slots begin and end by the records."""


def answer_fields(output: ModelOutput, is_vector: bool) -> tuple[pa.Field, ...]:
    """Return the columns that a model's answers become.

    Parameters
    ----------
    output
        What the model gives for a chip.
    is_vector
        Whether one number is a vector as well.
    """
    if output.kind == "classes":
        names = [pa.field("class_name", pa.string())] if output.named else []
        return (pa.field("class", pa.int32()), *names)
    if output.kind == "values" and output.channels == 1 and not is_vector:
        return (pa.field("value", pa.float32()),)
    name = "vector" if output.kind == "values" else "probabilities"
    return (pa.field(name, pa.list_(pa.float32(), output.channels)),)


@dataclass(frozen=True)
class ShardAnswers:
    """What a model says of the chips of a shard."""

    table: pa.Table
    """:data:`ROW`, :data:`FIRST`, :data:`LAST`, then :func:`answer_fields`; dropped chips are left out."""
    report: Mapping[str, Any]
    """As a unit's report has it."""


@dataclass(frozen=True)
class VectorWork:
    """How shards become answers: what all tasks share beside the job."""

    output: ModelOutput
    is_vector: bool
    dated: tuple[str, ...]
    """The sources whose dates count: those that do not hold at any time."""

    def compute(
        self, chips: ShardReader, item: tuple[int, int], parcel: ModelParcel, *shipped: Shipped
    ) -> ShardAnswers:
        """Compute the answers to a shard's chips.

        Parameters
        ----------
        chips
            Who reads them.
        item
            Number of the hierarchy, and of the shard in it.
        parcel
            The model.
        shipped
            The user's functions.

        Raises
        ------
        ModelError
            When the model raises, or says NaN of a chip that has a valid pixel.
        """
        runner = parcel.runner()
        with runner.reading():
            read = chips.read(item, shipped)
            arrays, rows, report = read.arrays, read.rows, read.report
            begun = time.perf_counter()
            columns = self._columns(arrays, runner.predict(arrays)) if len(rows) else None
        seconds = time.perf_counter() - begun
        activity.spent("predict", seconds)
        report["seconds"]["predict"] = seconds
        begins, ends = _interval(arrays, self.dated)
        table = pa.table({ROW: pa.array(rows, pa.int64()), FIRST: begins, LAST: ends})
        for at, field in enumerate(answer_fields(self.output, self.is_vector)):
            table = table.append_column(field, pa.array([], field.type) if columns is None else columns[at])
        return ShardAnswers(table, report)

    def _columns(self, arrays: Arrays, answers: NDArray[Any]) -> list[pa.Array]:
        """Return the columns of :func:`answer_fields`; null for chips without a valid pixel."""
        ids = arrays["chip_id"]
        valid = np.zeros(len(ids), dtype=bool)
        for name, values in arrays.items():
            if name.endswith("/valid") and values.dtype.kind == "b":
                valid |= values.reshape(len(ids), -1).any(axis=1)
        numbers = self.output.numbers(answers, ids.tolist())
        missing = np.isnan(numbers).any(axis=1)
        if (missing & valid).any():
            at = int(np.flatnonzero(missing & valid)[0])
            raise ModelError(
                f"chip {ids[at]}", f"NaN from the model, in {int(np.isnan(numbers[at]).sum())} of {numbers.shape[1]} "
                "numbers, though the chip has valid pixels", "numbers",
                "Invalid pixels are Model(fill=) when the model sees them: choose a number that it knows.",
            )  # fmt: skip
        (field, *named), empty = answer_fields(self.output, self.is_vector), ~valid
        if field.name == "class":
            codes = self.output.stored(np.ascontiguousarray(numbers.T)).astype(np.int32)
            names = dict(self.output.classes)
            columns = [pa.array(codes, pa.int32(), mask=empty)]
            if named:
                texts = [None if no else names[code] for code, no in zip(codes.tolist(), empty, strict=True)]
                columns.append(pa.array(texts, pa.string()))
            return columns
        if field.name == "value":
            return [pa.array(numbers[:, 0], pa.float32(), mask=empty)]
        flat = pa.array(np.ascontiguousarray(numbers).reshape(-1), pa.float32())
        return [pa.FixedSizeListArray.from_arrays(flat, type=field.type, mask=pa.array(empty))]


def _interval(arrays: Arrays, dated: Sequence[str]) -> tuple[pa.Array, pa.Array]:
    """Return when the first and the last record of each chip were taken; null where no record says."""
    count = len(arrays["chip_id"])
    when = [arrays[f"{name}/datetime"] for name in dated if f"{name}/datetime" in arrays]
    every = np.concatenate([np.full((count, 1), np.datetime64("NaT", "us")), *when], axis=1)
    kind, none = pa.timestamp("us", tz="UTC"), np.isnat(every).all(axis=1)
    stamps = every.astype(np.int64)
    low = np.where(np.isnat(every), np.iinfo(np.int64).max, stamps).min(axis=1)
    high = np.where(np.isnat(every), np.iinfo(np.int64).min, stamps).max(axis=1)
    return pa.array(low, pa.int64(), mask=none).cast(kind), pa.array(high, pa.int64(), mask=none).cast(kind)
