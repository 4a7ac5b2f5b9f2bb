"""A job written where its tasks find it, and opened once per worker process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_dask._version import __version__
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import from_json, to_json
from rasteret_dask.planning.resolve import Member, SourcePlan
from rasteret_dask.table.records import Records
from rasteret_dask.tasks.job import Hierarchy, Job, ipc_bytes

__all__ = ["JobRef", "open_job", "opened", "plan_json", "write_job"]

_OPENING = Lock()


@dataclass(frozen=True, slots=True)
class JobRef:
    """Where a written job lies: all that a task carries of it."""

    url: str
    digest: str


def opened(job: Job | JobRef) -> Job:
    """Return the job that a task was given, or the one that lies where it was told."""
    return job if isinstance(job, Job) else open_job(job.url, job.digest)


def write_job(job: Job, url: str) -> None:
    """Write a job's tables as Arrow IPC and the rest as JSON below ``url``."""
    for number, records in enumerate(job.records):
        remote.put(remote.join(url, f"records-{number}.arrow"), ipc_bytes(records.table))
    remote.put(remote.join(url, "chips.arrow"), ipc_bytes(job.chips.drop_columns(["geometry"])))
    if job.labels is not None:
        remote.put(remote.join(url, "labels.arrow"), ipc_bytes(job.labels.table))
    text = {
        "sources": [plan_json(s) for s in job.sources],
        "size_px": list(job.size_px),
        "hierarchies": [[h.split, h.number, h.start, h.stop, h.per_shard] for h in job.hierarchies],
        "maps": [[s, to_json(f)] for s, f in job.maps],
        "screens": [to_json(rule) for rule in job.screens],
        "labels": None if job.labels is None else job.labels.said,
        "phase": job.phase,
        "digest": job.digest,
        "version": __version__,
    }
    remote.put(remote.join(url, "job.json"), json.dumps(text).encode())


def open_job(url: str, digest: str) -> Job:
    """Open a job, once per process whatever the number of threads.

    Parameters
    ----------
    url
        Where :func:`write_job` put it.
    digest
        The job's digest: tells jobs apart that were written to the same place in turn.

    Raises
    ------
    StoreError
        When there is another job by now.
    """
    with _OPENING:
        return _read(url, digest)


@lru_cache(maxsize=8)
def _read(url: str, digest: str) -> Job:
    text = json.loads(remote.get(remote.join(url, "job.json")))
    if text["digest"] != digest:
        raise StoreError(
            f"job {url}",
            f"another plan ({text['digest'][:12]})",
            f"this one ({digest[:12]})",
            "Something else was written to this store meanwhile: choose another one.",
        )
    tables = [_table(url, f"records-{n}.arrow") for n in range(len(text["sources"]))]
    chips = _table(url, "chips.arrow")
    labels = text["labels"] and Labels.again(_table(url, "labels.arrow"), text["labels"])
    return Job(
        tuple(_plan(s) for s in text["sources"]),
        tuple(text["size_px"]),
        tuple(Hierarchy(*h) for h in text["hierarchies"]),
        tuple(Records(t) for t in tables),
        chips,
        tuple((s, from_json(f)) for s, f in text["maps"]),
        text["phase"],
        screens=tuple(from_json(rule) for rule in text["screens"]),
        labels=labels,
    )


def _table(url: str, name: str) -> pa.Table:
    return pa.ipc.open_file(pa.py_buffer(remote.get(remote.join(url, name)))).read_all()


def plan_json(plan: SourcePlan) -> Any:
    """Return a source's plan as JSON values: part of what a job is known by."""
    values = {k: getattr(plan, k) for k in plan.__slots__}
    values["fill"] = None if np.isnan(plan.fill) else plan.fill
    values["members"] = [{k: getattr(m, k) for k in m.__slots__} for m in plan.members]
    values["maps"] = [to_json(f) for f in plan.maps]
    return json.loads(json.dumps(values))


def _plan(values: dict[str, Any]) -> SourcePlan:
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    lists["fill"] = float("nan") if values["fill"] is None else values["fill"]
    lists["members"] = tuple(Member(**{**m, "bands": tuple(m["bands"])}) for m in values["members"])
    lists["maps"] = tuple(from_json(f) for f in values["maps"])
    return SourcePlan(**lists)
