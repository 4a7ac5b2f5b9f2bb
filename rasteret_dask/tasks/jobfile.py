# SPDX-License-Identifier: Apache-2.0
"""A job written where its tasks find it, and opened once per worker process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa

from rasteret_dask.chipping.celltable import Dealt
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.chipping.maskfiles import labels_again
from rasteret_dask.errors import RasteretDaskError, StoreError
from rasteret_dask.formats import MEANING, PLAN
from rasteret_dask.net import remote
from rasteret_dask.net.sums import crc32_of, document_of, sealed
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.planning.plan import from_json, to_json
from rasteret_dask.planning.resolve import Member, SourcePlan
from rasteret_dask.rules.values import check_importable
from rasteret_dask.table.records import Records
from rasteret_dask.tasks.job import Hierarchy, Job, ipc_bytes

__all__ = [
    "FOLD_CELLS", "JOB_FILE", "SPLIT_CELLS", "JobRef", "check_writable", "job_objects", "open_job", "opened",
    "plan_json", "read_cells", "read_note", "write_job",
]  # fmt: skip

JOB_FILE = "job.json"
"""What is put last: a folder with it is a whole plan."""

SPLIT_CELLS, FOLD_CELLS = "split_cells.arrow", "fold_cells.arrow"
"""The tables of split cells with their splits, and with their folds, where a plan dealt them by more than a hash."""

_OPENING = Lock()


@dataclass(frozen=True, slots=True)
class JobRef:
    """Where a written job lies: all that a task carries of it."""

    url: str
    digest: str


def opened(job: Job | JobRef) -> Job:
    """Return the job that a task was given, or the one that lies where it was told."""
    return job if isinstance(job, Job) else open_job(job.url, job.digest)


def job_objects(job: Job) -> dict[str, bytes]:
    """Return name -> bytes: a job's tables as Arrow IPC, then the rest as JSON, with their checksums."""
    objects = {f"records-{number}.arrow": ipc_bytes(r.table) for number, r in enumerate(job.records)}
    objects["chips.arrow"] = ipc_bytes(job.chips.drop_columns(["geometry"]))
    objects |= {_labels_file(n): ipc_bytes(labels.table) for n, labels in enumerate(job.labels)}
    if job.split_cells is not None:
        objects[SPLIT_CELLS] = ipc_bytes(job.split_cells)
    if job.fold_cells is not None:
        objects[FOLD_CELLS] = ipc_bytes(job.fold_cells)
    text = {
        **PLAN.note,
        "meaning": MEANING,
        "sources": [plan_json(s) for s in job.sources],
        "size_px": list(job.size_px),
        "hierarchies": [[h.split, h.number, h.start, h.stop, h.per_shard, h.first] for h in job.hierarchies],
        "maps": [[s, to_json(f)] for s, f in job.maps],
        "pixel_rules": [to_json(rule) for rule in job.pixel_rules],
        "labels": _labels_note(job),
        **({"reaches_m": list(job.reaches_m)} if job.reaches_m else {}),
        **({} if job.in_turn else {"in_turn": False}),
        "phase": job.phase,
        "digest": job.digest,
        "tables": {name: [len(data), crc32_of(data)] for name, data in objects.items()},
    }
    return {**objects, JOB_FILE: sealed(text)}


def check_writable(job: Job) -> None:
    """Raise PlanError where nobody who opens the job could import one of its rules."""
    check_importable([plan_json(s) for s in job.sources])


def write_job(job: Job, url: str) -> None:
    """Write a job below ``url``, so that :func:`open_job` opens it there; the JSON comes last."""
    for name, data in job_objects(job).items():
        remote.put(remote.join(url, name), data)


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


def read_note(url: str) -> dict[str, Any]:
    """Read the JSON of a job: its digest, its format, and everything but its tables.

    Raises
    ------
    StoreError
        When it is damaged, or something else.
    FormatError
        When it was written in a format that this version does not read.
    """
    subject = f"plan {remote.redact(url)}"
    data = remote.get(remote.join(url, JOB_FILE))
    text = document_of(data)
    if text is None:
        note = _note(data)
        if note is not None:
            PLAN.check(subject, note)
        raise _damaged(url, f"a {JOB_FILE} that does not match its checksum")
    PLAN.check(subject, text)
    if not isinstance(text.get("digest"), str):
        raise _damaged(url, f"a {JOB_FILE} that is none (no digest)")
    return text


def read_cells(url: str, what: Dealt = "split") -> pa.Table | None:
    """Read the table of split cells of a saved plan, with their splits or their folds; None where it has none.

    Raises
    ------
    StoreError, FormatError
        As :func:`read_note`; or when the table is damaged.
    """
    name = SPLIT_CELLS if what == "split" else FOLD_CELLS
    sums = read_note(url).get("tables", {}).get(name)
    return None if sums is None else _table(url, name, *sums)


def _note(data: bytes) -> dict[str, Any] | None:
    """Return a document whose checksum says nothing: another format may have none, or another one."""
    try:
        text = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, dict) and "digest" in text else None


def _damaged(url: str, damage: str) -> StoreError:
    return StoreError(
        f"plan {remote.redact(url)}", damage, "what save_plan or to_zarr wrote",
        "It was changed or damaged after it was written: delete it, and write it again.",
    )  # fmt: skip


@lru_cache(maxsize=8)
def _read(url: str, digest: str) -> Job:
    text = read_note(url)
    try:
        if text["digest"] != digest:
            raise StoreError(
                f"job {remote.redact(url)}",
                f"another plan ({text['digest'][:12]})",
                f"this one ({digest[:12]})",
                "Something else was written to this store meanwhile: choose another one.",
            )
        tables = {name: _table(url, name, *sums) for name, sums in text["tables"].items()}
        return Job(
            tuple(_plan(s) for s in text["sources"]),
            tuple(text["size_px"]),
            tuple(Hierarchy(*h) for h in text["hierarchies"]),
            tuple(Records(tables[f"records-{n}.arrow"]) for n in range(len(text["sources"]))),
            tables["chips.arrow"],
            tuple((s, from_json(f)) for s, f in text["maps"]),
            text["phase"],
            pixel_rules=tuple(from_json(rule) for rule in text["pixel_rules"]),
            split_cells=tables.get(SPLIT_CELLS),
            fold_cells=tables.get(FOLD_CELLS),
            labels=_labels(text["labels"], tables),
            reaches_m=tuple(text.get("reaches_m", ())),
            in_turn=text.get("in_turn", True),
        )
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        if isinstance(error, RasteretDaskError):
            raise
        raise _damaged(url, f"a {JOB_FILE} that is none ({error!r:.200})") from error


def _labels_file(number: int) -> str:
    return f"labels-{number}.arrow" if number else "labels.arrow"


def _labels_note(job: Job) -> Any:
    """Return what is noted of labels: nothing, a note, or a note for each of several."""
    notes = [labels.note for labels in job.labels]
    return notes if len(notes) > 1 else notes[0] if notes else None


def _labels(notes: Any, tables: dict[str, pa.Table]) -> tuple[Labels, ...]:
    """Return what :func:`_labels_note` noted."""
    notes = [] if notes is None else notes if isinstance(notes, list) else [notes]
    return tuple(labels_again(tables[_labels_file(n)], note) for n, note in enumerate(notes))


def _table(url: str, name: str, size: int, checksum: int) -> pa.Table:
    try:
        data = remote.get(remote.join(url, name))
    except remote.MissingError:
        raise _damaged(url, f"no {name} beside its {JOB_FILE}") from None
    if len(data) != size or crc32_of(data) != checksum:
        raise _damaged(url, f"a {name} that does not match its checksum")
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def plan_json(plan: SourcePlan) -> Any:
    """Return a source's plan as JSON values: part of what a job is known by."""
    return json.loads(json.dumps(to_json(plan)))


def _plan(values: dict[str, Any]) -> SourcePlan:
    own = {k: from_json(v) for k, v in values.items() if k not in ("type", "members", "kinds")}
    members = tuple(Member(**_fields(one)) for one in values["members"])
    kinds = tuple(BandKind(**_fields(one)) for one in values["kinds"])
    return SourcePlan(members=members, kinds=kinds, **own)


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {k: from_json(v) for k, v in values.items() if k != "type"}
