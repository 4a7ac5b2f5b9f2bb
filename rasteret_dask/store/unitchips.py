# SPDX-License-Identifier: Apache-2.0
"""Chips of a plan or of a store, as whatever is written of them shard by shard asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.net import remote
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.store import ledger
from rasteret_dask.store.layout import JOB
from rasteret_dask.store.provenance import Provenance, provenance_of_parts
from rasteret_dask.store.stored import Stored, read_shard
from rasteret_dask.tasks.batches import Arrays, arrays_of
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.tasks.jobfile import JobRef, check_writable, job_objects, opened
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.shards import Shipped, read_chips
from rasteret_dask.tasks.workermemory import TaskMemory
from rasteret_dask.words import OnError

__all__ = [
    "PlannedShards",
    "ShardChips",
    "ShardReader",
    "StoredShards",
    "UnitChips",
    "planned_units",
    "stored_units",
]


@dataclass(frozen=True)
class ShardChips:
    """The kept chips of a shard."""

    arrays: Arrays
    rows: NDArray[np.int64]
    """Shape (chip,). Their rows in the chip table."""
    report: dict[str, Any]
    """What a unit's report says of reading them."""


class ShardReader(Protocol):
    """Reads shards in a task, with which it travels."""

    def read(self, item: tuple[int, int], shipped: Sequence[Shipped]) -> ShardChips:
        """Read a shard.

        Parameters
        ----------
        item
            Number of the hierarchy, and of the shard in it.
        shipped
            The user's functions.
        """


@dataclass(frozen=True)
class PlannedShards:
    """Reads shards of a plan."""

    job: Job | JobRef
    on_error: OnError
    functions: tuple[Function, ...]

    def read(self, item: tuple[int, int], shipped: Sequence[Shipped]) -> ShardChips:
        """Read a shard of the job."""
        job = opened(self.job)
        shard = job.shard(*item)
        calls = {function: one.call for function, one in zip(self.functions, shipped, strict=True)}
        sources = read_chips(job, shard, ReadContext(calls, self.on_error), warns=False)
        first = next(iter(sources.values()))
        kept = np.flatnonzero(first[KEPT].values) if KEPT in first.coords else None
        rows = np.arange(first.sizes["chip"]) if kept is None else kept
        return ShardChips(arrays_of(sources, kept), rows + shard.start, _report(sources, rows))


def _report(sources: Mapping[str, xr.Dataset], rows: NDArray[np.int64]) -> dict[str, Any]:
    first = next(iter(sources.values()))
    report: dict[str, Any] = {"dropped": first.attrs.get("dropped", {}), "seconds": {}}
    for name, dataset in sources.items():
        shares = dataset["valid_fraction"].values[rows]
        report[f"masked/{name}"] = round(1 - float(shares.mean(dtype=np.float64)), 6) if shares.size else 0.0
        for fact, nothing in (("counts", {}), ("clipped", {}), ("unreadable", [])):
            report[f"{fact}/{name}"] = dataset.attrs.get(fact, nothing)
        report["seconds"] |= {f"{kind}/{name}": s for kind, s in dataset.attrs.get("seconds", {}).items()}
    return report


@dataclass(frozen=True)
class StoredShards:
    """Reads shards of a store."""

    stored: Stored

    def read(self, item: tuple[int, int], shipped: Sequence[Shipped]) -> ShardChips:
        """Read a shard of the store; its hierarchy is 0."""
        begun, number = time.perf_counter(), item[1]
        arrays, offsets = read_shard(self.stored, number), self.stored.offsets
        rows = np.arange(offsets[number], offsets[number + 1])
        return ShardChips(arrays, rows, {"seconds": {"read": time.perf_counter() - begun}})


@dataclass(frozen=True)
class UnitChips:
    """Chips whose shards are the units of what is written: who reads them in a task, and what that needs."""

    reader: Callable[[str | None], ShardReader]
    """Returns what reads them, for the folder that is written; None: in memory, for a graph that holds it once."""
    provenance: Provenance
    functions: Mapping[str, Shipped]
    """Key -> a user's function, in the order in which they are shipped."""
    objects: Callable[[], Mapping[str, ledger.Maker]]
    """Returns what tasks need in the folder; raises PlanError where nobody could import a rule of the plan."""
    cuts: Callable[[], Cuts] | None = None
    """Returns where neighbours may be cut; None: they have nothing in common."""
    memory: TaskMemory | None = None
    """What tasks need; None: so little that no worker is asked."""
    hrefs: Callable[[], Iterable[str]] = tuple
    signed: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    """Stores that tasks read."""


def planned_units(
    job: Job, outputs: tuple[Output, ...], context: ReadContext, provenance: Provenance
) -> UnitChips:
    """Return the chips of a job.

    Parameters
    ----------
    job
        The job.
    outputs
        What its sources become.
    context
        What shards are read with.
    provenance
        Where they come from.
    """
    functions = job.all_functions

    def objects() -> dict[str, ledger.Maker]:
        check_writable(job)
        tables = {f"{JOB}/{name}": ledger.whole(data) for name, data in job_objects(job).items()}
        return tables | {ledger.PROVENANCE: ledger.whole(provenance.to_bytes())}

    def reader(url: str | None) -> PlannedShards:
        there = job if url is None else JobRef(remote.join(url, JOB), job.digest)
        return PlannedShards(there, context.on_error, functions)

    return UnitChips(
        reader, provenance,
        {f"function-{f.name}-{digest(f)[:12]}": Shipped(context.functions[f]) for f in functions},
        objects, partial(Cuts.of, job), TaskMemory(job, outputs, together=True), job.hrefs, job.signed,
    )  # fmt: skip


def stored_units(stored: Stored) -> UnitChips:
    """Return the chips of a finished store."""
    provenance = provenance_of_parts(stored.places)

    def objects() -> dict[str, ledger.Maker]:
        return {ledger.PROVENANCE: ledger.whole(provenance.to_bytes())}

    return UnitChips(lambda url: StoredShards(stored), provenance, {}, objects, stores=stored.places)
