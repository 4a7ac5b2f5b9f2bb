# SPDX-License-Identifier: Apache-2.0
"""Planned chips as a stream reads them: a job's shards, here or in Dask tasks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, ReadError
from rasteret_dask.net.lending import Lender
from rasteret_dask.planning.plan import digest
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Arrays, InMemory, MaskPixels, SourcePixels, arrays_of
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.tasks.shards import lower, read_chips, renamed
from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = ["kept_arrays", "planned"]


def planned(
    job: Job,
    outputs: Sequence[Output],
    context: ReadContext,
    sizes: tuple[int, ...] | None = None,
    only: tuple[str, ...] | None = None,
) -> ChipShards:
    """Return the kept chips of a job, in the order of its shards.

    Parameters
    ----------
    job
        The job.
    outputs
        What each source becomes.
    context
        What its shards are read with.
    sizes
        Kept chips of each shard; None: all, as in a job without rules on pixels.
    only
        The sources whose pixels tasks read and give; None: all.
    """
    shards = tuple(job.shards())
    classes = {own.name: tuple(own.attrs.get("classes", ())) for own in job.labels}
    pixels = {
        plan.name: SourcePixels(
            out.bands,
            out.dtype,
            dict(out.attrs).get("units", ""),
            tuple(MaskPixels(name, dtype, classes[name]) for name, dtype in out.masks),
            out.kinds,
            (out.times, len(out.bands), out.height, out.width),
        )
        for plan, out in zip(job.sources, outputs, strict=True)
        if only is None or plan.name in only
    }

    def read(number: int, _: Lender) -> InMemory:
        found = kept_arrays(read_chips(job, shards[number], context), None)
        if sizes is not None and len(found["chip_id"]) != sizes[number]:
            raise _other(shards[number].name, len(found["chip_id"]), str(sizes[number]))
        return InMemory(found)

    def tasks() -> tuple[Mapping[Hashable, Any], Sequence[tuple[str, Any]]]:
        tail = context.suffix if only is None else f"{context.suffix}-{digest(only)[:12]}"
        graph, named = renamed(lower(job, context, only=only), job, tail, "read")
        key_of = {shard.name: key for key, shard in named.items()}
        roots = {key: task for key, task in graph.items() if key not in named}
        return roots, [(key_of[s.name], graph[key_of[s.name]]) for s in shards]

    return ChipShards(
        sizes or tuple(s.stop - s.start for s in shards),
        job.digest,
        pixels,
        read,
        tasks,
        kept_arrays,
        job,
        memory=TaskMemory(job, tuple(outputs), together=True),
        column=None if job.pixel_rules else partial(_column, job),
    )


def _column(job: Job, name: str) -> pa.ChunkedArray:
    if name not in job.chips.column_names:
        raise PlanError(
            f"stream on chip column {name!r}", "no such column", f"one of {', '.join(job.chips.column_names)}"
        )  # fmt: skip
    return job.chosen_chips().column(name)


def kept_arrays(sources: Mapping[str, xr.Dataset], rows: NDArray[np.int64] | None) -> Arrays:
    """Return chips of a shard that are kept, as arrays: rows counted among those; None: all."""
    first = next(iter(sources.values()))
    if KEPT not in first.coords:
        return arrays_of(sources, rows)
    places = np.flatnonzero(first[KEPT].values)
    if rows is not None and len(rows) and rows.max() >= len(places):
        raise _other(f"of {first['chip_id'].values[0]}", len(places), f"at least {rows.max() + 1}")
    return arrays_of(sources, places if rows is None else places[rows])


def _other(shard: str, count: int, counted: str) -> ReadError:
    return ReadError(
        f"shard {shard}", f"{count} chips that filter_pixels() keeps", f"{counted}, as when they were counted",
        "Its rules must say the same each time: a function is random, or files changed or could not be read.",
    )  # fmt: skip
