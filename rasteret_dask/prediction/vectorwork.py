# SPDX-License-Identifier: Apache-2.0
"""A shard's chips become rows of answers: a class, probabilities, a number or a vector each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.errors import ModelError
from rasteret_dask.planning.plan import Function
from rasteret_dask.prediction.models import ModelParcel
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.prediction.storedjob import StoredJob
from rasteret_dask.store.stored import read_shard
from rasteret_dask.streams.planned import kept_arrays
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.shards import Shipped, read_chips
from rasteret_dask.words import OnError

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
    on_error: OnError
    functions: tuple[Function, ...]
    """The user's, whose code comes as roots behind the model."""

    def compute(
        self, job: Job | StoredJob, item: tuple[int, int], parcel: ModelParcel, *shipped: Shipped
    ) -> ShardAnswers:
        """Compute the answers to a shard's chips.

        Parameters
        ----------
        job
            The chips.
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
        calls = {function: one.call for function, one in zip(self.functions, shipped, strict=True)}
        shard, runner = job.shard(*item), parcel.runner()
        with runner.reading():
            if isinstance(job, StoredJob):
                arrays, rows, report = _stored_arrays(job, shard)
            else:
                arrays, rows, report = _planned_arrays(job, shard, ReadContext(calls, self.on_error))
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


_Read: TypeAlias = "tuple[Arrays, NDArray[np.int64], dict[str, Any]]"
"""Kept chips of a shard, their rows in the job's table, and what a unit's report says of reading them."""


def _planned_arrays(job: Job, shard: Shard, context: ReadContext) -> _Read:
    sources = read_chips(job, shard, context, warns=False)
    first = next(iter(sources.values()))
    kept = first[KEPT].values if KEPT in first.coords else np.ones(first.sizes["chip"], dtype=bool)
    return kept_arrays(sources, None), np.flatnonzero(kept) + shard.start, read_report(sources)


def _stored_arrays(job: StoredJob, shard: Shard) -> _Read:
    begun = time.perf_counter()
    arrays = read_shard(job.stored, shard.number)
    return arrays, np.arange(shard.start, shard.stop), {"seconds": {"read": time.perf_counter() - begun}}


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


def read_report(sources: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Return what reading a shard's sources took, as a unit's report has it."""
    first = next(iter(sources.values()))
    report: dict[str, Any] = {"dropped": first.attrs.get("dropped", {}), "seconds": {}}
    for name, dataset in sources.items():
        shares = dataset["valid_fraction"].values
        if KEPT in dataset.variables:
            shares = shares[dataset[KEPT].values]
        report[f"masked/{name}"] = round(1 - float(shares.mean(dtype=np.float64)), 6) if shares.size else 0.0
        for what, blank in (("counts", {}), ("clipped", {}), ("unreadable", [])):
            report[f"{what}/{name}"] = dataset.attrs.get(what, blank)
        for stage, seconds in dataset.attrs.get("seconds", {}).items():
            report["seconds"][f"{stage}/{name}"] = seconds
    return report
