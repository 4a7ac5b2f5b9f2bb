# SPDX-License-Identifier: Apache-2.0
"""One answer a chip, planned: what the table will hold, and its exits."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from dask._task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.errors import ModelError, PlanError, StoreError
from rasteret_dask.formats import ANSWERS, MEANING
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.net.remotefs import filesystem
from rasteret_dask.planning.plan import digest
from rasteret_dask.prediction.maps import gpu_resource
from rasteret_dask.prediction.modelchips import ModelChips
from rasteret_dask.prediction.models import ModelParcel
from rasteret_dask.prediction.modelsending import root_of
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.prediction.storedjob import StoredJob
from rasteret_dask.prediction.vectorwork import FIRST, LAST, ROW, VectorWork, answer_fields
from rasteret_dask.statistics.measuring import Pass, computed
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.layout import JOB
from rasteret_dask.store.ledger import whole
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.smallobjects import requests
from rasteret_dask.store.stored import Stored
from rasteret_dask.store.unitchips import ShardReader, UnitChips, planned_units, stored_units
from rasteret_dask.store.unitruns import Making, UnitJob, Visible, WorkUnit, write_units
from rasteret_dask.table.geoparquet import GROUP_ROWS, joined_pieces
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import tally
from rasteret_dask.tasks.job import Output, Shard, ipc_bytes
from rasteret_dask.words import OnError

__all__ = ["VectorPlan", "answers_note", "remove_work", "stored_plan", "vector_plan"]

NOTE = b"rasteret_dask:answers"
"""Key of the file's metadata that says what it is."""

WORK = ".job"
"""What the name of the folder ends in that holds the parts until the file is there."""

GROUP_BYTES = 64 * 2**20
"""Bytes of answers in a row group, at most."""

AHEAD = 8
"""Parts that are read before their turn comes."""

_PLACE = ("geometry", "bbox", "datetime", "start_datetime", "end_datetime", "split")
_TIME = pa.timestamp("us", tz="UTC")
_BBOX = pa.struct([(corner, pa.float64()) for corner in ("xmin", "ymin", "xmax", "ymax")])


class _Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def bands(self) -> tuple[str, ...]: ...


class AnsweredJob(Protocol):
    """Chips that get a row each: those of a :class:`Job`, or of a :class:`StoredJob`."""

    @property
    def digest(self) -> str:
        """What they are known by."""

    @property
    def chips(self) -> pa.Table:
        """Their table."""

    @property
    def sources(self) -> Sequence[_Source]:
        """Names and bands."""

    @property
    def keys(self) -> Mapping[str, str]:
        """Shard -> what its chips are known by."""

    @property
    def running(self) -> NDArray[np.int64]:
        """Shape (chip,). When each chip's shard runs."""

    def shards(self) -> Iterator[Shard]:
        """Yield the shards."""

    def chosen_chips(self) -> pa.Table:
        """Return the rows of the table that shards hold."""


@dataclass(frozen=True)
class _Making:
    """What a task does with each shard of its run."""

    chips: ShardReader
    work: VectorWork

    def __call__(self, item: tuple[str, tuple[int, int]], *roots: Any) -> Making:
        name, place = item
        answers = self.work.compute(self.chips, place, *roots)
        yield _part(name), [ipc_bytes(answers.table)]
        return answers.report


def _part(shard: str) -> str:
    return f"answers/{shard}.arrow"


@dataclass(frozen=True, repr=False)
class VectorPlan:
    """One answer a chip, planned: nothing is read yet."""

    job: AnsweredJob
    parcel: ModelParcel
    work: VectorWork
    reading: UnitChips
    """Who reads the shards, and what that needs."""
    on_error: OnError = "raise"
    span: tuple[np.datetime64, np.datetime64] | None = None
    """Begin and end of the slots that all chips share; None: there are none, and records say when chips were taken."""

    @cached_property
    def digest(self) -> str:
        """What the table is known by: chips, model, and what its numbers are."""
        out = self.work.output
        return digest(
            "answers", self.job.digest, self.parcel.digest, out.kind, out.codes, out.names, out.named,
            self.work.is_vector, self.on_error,
        )  # fmt: skip

    @cached_property
    def schema(self) -> pa.Schema:
        """The table's columns: the chip, its ground, time and split, the user's columns, then the answer."""
        labels = [own for own in self.job.chips.schema if own.name not in CHIP_SCHEMA.names]
        return pa.schema(
            [
                CHIP_SCHEMA.field("chip_id"),
                CHIP_SCHEMA.field("geometry"),
                pa.field("bbox", _BBOX),
                pa.field("datetime", _TIME),
                pa.field("start_datetime", _TIME),
                pa.field("end_datetime", _TIME),
                CHIP_SCHEMA.field("split"),
                *(own.remove_metadata() for own in labels),
                *answer_fields(self.work.output, self.work.is_vector),
            ]
        )

    def note(self, report: JobReport) -> dict[str, Any]:
        """Return what the file says of itself, as JSON values: nothing that another run would tell otherwise."""
        out = self.work.output
        texts = report.table.column("dropped_chips").to_pylist()
        reasons = [why for text in texts for why in json.loads(text).values()]
        return {
            **ANSWERS.note,
            "meaning": MEANING,
            "digest": self.digest,
            "model": {"name": self.parcel.name, "digest": self.parcel.digest},
            "outputs": out.kind,
            "names": list(out.names),
            "codes": list(out.codes),
            "bands": {plan.name: list(plan.bands) for plan in self.job.sources},
            "chips": report.kept,
            "dropped": report.chips - report.kept,
            "why": tally(reasons),
        }

    def rows(self, part: pa.Table) -> pa.Table:
        """Return the rows of a shard's answers."""
        chips = self.job.chips.take(part.column(ROW))
        boxes = shapely.bounds(shapely.from_wkb(chips.column("geometry").to_numpy(zero_copy_only=False)))
        corners = [pa.array(boxes.reshape(-1, 4)[:, n], pa.float64()) for n in range(4)]
        begins, ends = self._times(part)
        moment = chips.column("datetime").combine_chunks()
        is_moment = pc.is_valid(moment)
        columns: dict[str, Any] = {
            "bbox": pa.StructArray.from_arrays(corners, fields=list(_BBOX)),
            "datetime": moment,
            "start_datetime": pc.if_else(is_moment, pa.scalar(None, _TIME), begins),
            "end_datetime": pc.if_else(is_moment, pa.scalar(None, _TIME), ends),
        }
        columns |= {name: part.column(name) for name in part.column_names if name not in (ROW, FIRST, LAST)}
        columns |= {name: chips.column(name) for name in self.schema.names if name not in columns}
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def _times(self, part: pa.Table) -> tuple[Any, Any]:
        if self.span is None:
            return tuple(part.column(name).combine_chunks() for name in (FIRST, LAST))
        return tuple(
            pa.repeat(pa.scalar(edge.astype("datetime64[us]").item(), _TIME), len(part)) for edge in self.span
        )

    # Exits

    def load(self, client: ClientLike = None, progress: bool = False) -> pa.Table:
        """Compute the answers into memory: the table that :meth:`to_parquet` would write.

        Parameters
        ----------
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        progress
            Whether to show how far it is.
        """
        token, at_root, own = self.digest[:16], f"job-{self.job.digest[:16]}", self.reading
        shards = list(self.job.shards())
        keys = [f"predict-{shard.name}-{token}" for shard in shards]
        with clusters.using(client) as cluster, root_of(self.parcel, cluster) as (graph, model):
            roots = {**own.functions, at_root: own.reader(None)}
            graph |= {key: DataNode(key, value) for key, value in roots.items()}
            refs = [model, *map(TaskRef, own.functions)]
            for key, shard in zip(keys, shards, strict=True):
                item = shard.hierarchy, shard.number
                graph[key] = Task(key, _answers, TaskRef(at_root), self.work, item, *refs)
            sign = partial(signatures.send, hrefs=own.hrefs(), hosts=own.signed)
            look = Pass("predict", sign, progress, own.memory, gpu_resource(cluster, self.parcel))
            parts = computed(graph, {key: (key,) for key in keys}, cluster or client, look)
        return pa.concat_tables([self.schema.empty_table(), *map(self.rows, parts)])

    def to_parquet(
        self, url: str, client: ClientLike = None, progress: bool = True, bounds: Bounds | None = None
    ) -> JobReport:
        """Write the answers as one GeoParquet file, which is there once it is whole; a rerun does what is missing.

        Parameters
        ----------
        url
            The file. Parts lie in the folder ``<url>.job`` until it is there.
        client, progress, bounds
            As of :func:`rasteret_dask.store.unitruns.write_job`.

        Raises
        ------
        StoreError
            When something else lies there.
        """
        work = Place.at(url).file("Choose another path.") + WORK
        if (report := self._finished(url)) is not None:
            remove_work(work)
            if progress:
                sys.stderr.write(f"{remote.redact(url)} is finished: nothing to do\n")
            return report
        report = replace(
            write_units(work, self._unit_job(work, client), client, progress, bounds),
            store=remote.redact(url),
        )
        if not report.committed:
            return report
        try:
            self._put(url, work, report)
        except remote.MissingError:  # another part of an array job has seen the end as well, and was faster
            if self._finished(url) is None:
                raise
        remove_work(work)
        return report

    def _finished(self, url: str) -> JobReport | None:
        """Return the report of a file that holds these answers; None where nothing lies there."""
        note = answers_note(url)
        if note is None:
            return None
        if note.get("digest") != self.digest:
            what = (
                f"answers of {note['model']['name']} to other chips, or of another model"
                if note
                else "something else"
            )
            raise StoreError(
                f"file {remote.redact(url)}", f"{what}", f"these answers ({self.digest[:12]}), or nothing",
                "Choose another place, or delete the file.",
            )  # fmt: skip
        manifest = pa.Table.from_pylist(
            [
                {"shard": own.name, "split": own.split, "number": own.number, "chips": own.stop - own.start}
                for own in self.job.shards()
            ]
        )
        return replace(JobReport.of_manifest(remote.redact(url), manifest), kept=note["chips"])

    def _unit_job(self, url: str, client: ClientLike) -> UnitJob:
        """Return the shards as units of work."""
        job, own = self.job, self.reading
        order = sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))
        units = [
            WorkUnit(
                shard.name, (shard.name, (shard.hierarchy, shard.number)), shard.stop - shard.start,
                digest(self.digest, job.keys[shard.name]), shard.split, shard.number,
            )
            for shard in order
        ]  # fmt: skip
        with clusters.using(client) as cluster:
            resource = gpu_resource(cluster, self.parcel)
        # in the graph it would travel with every batch of tasks
        parcel, file, content = self.parcel.apart(remote.join(url, JOB))
        return UnitJob(
            "predict",
            self.digest,
            units,
            _Making(own.reader(url), self.work),
            Visible("answers.json", {"answers": self.parcel.name}),
            {**own.objects(), f"{JOB}/{file}": whole(content)},
            lambda: {_part(unit.name): unit.name for unit in units},
            roots={f"model-{parcel.digest[:16]}": parcel, **own.functions},
            cuts=own.cuts,
            memory=own.memory,
            resource=resource,
            hrefs=own.hrefs,
            signed=own.signed,
            stores=own.stores,
        )

    def _put(self, url: str, work: str, report: JobReport) -> None:
        """Put the parts together, in the order of the chip table."""
        schema = self.schema.with_metadata({NOTE: json.dumps(self.note(report)).encode()})
        row_bytes = 64 + 4 * self.work.output.channels
        group = int(np.clip(GROUP_BYTES // row_bytes, 1024, GROUP_ROWS))
        texts = report.table.column("dropped_chips").unique().to_pylist()
        dropped = pa.array(sorted({chip for text in texts for chip in json.loads(text)}), pa.string())
        chips = self.job.chosen_chips().select(["chip_id", "geometry"])
        kept = chips.filter(pc.invert(pc.is_in(chips.column("chip_id"), dropped)))

        def tables() -> Iterator[pa.Table]:
            for part in self._parts(work):
                yield self.rows(part).replace_schema_metadata(schema.metadata)

        remote.put_stream(url, lambda: joined_pieces(schema, tables, group, lambda: [kept]))

    def _parts(self, work: str) -> Iterator[pa.Table]:
        """Yield what shards have written, some read before their turn."""
        names = (shard.name for shard in self.job.shards())
        read = [requests().submit(_read, work, name) for name in islice(names, AHEAD)]
        while read:
            part = read.pop(0).result()
            read += [requests().submit(_read, work, name) for name in islice(names, 1)]
            yield part


def _read(work: str, shard: str) -> pa.Table:
    return pa.ipc.open_file(pa.py_buffer(remote.get(remote.join(work, _part(shard))))).read_all()


def _answers(chips: ShardReader, work: VectorWork, item: tuple[int, int], *roots: Any) -> pa.Table:
    return work.compute(chips, item, *roots).table


def answers_note(url: str) -> Mapping[str, Any] | None:
    """Return what a file of answers says of itself; {} of any other file, None where there is none.

    Raises
    ------
    FormatError
        When a newer version of the package wrote it.
    """
    if not remote.exists(url):
        return None
    try:
        with filesystem().open_input_file(url) as file:
            text = (pq.ParquetFile(file).schema_arrow.metadata or {}).get(NOTE)
            note = {} if text is None else json.loads(text)
    except (pa.ArrowInvalid, ValueError):
        return {}
    if note:
        ANSWERS.check(f"file {remote.redact(url)}", note)
    return dict(note)


def remove_work(work: str) -> None:
    """Remove the folder of parts, once nobody needs it."""
    if remote.is_local(work):
        shutil.rmtree(remote.local_path(work), ignore_errors=True)
    else:
        remote.delete_all(work, list(remote.listing(work)))


def stored_plan(
    stored: Stored, parcel: ModelParcel, output: ModelOutput, is_vector: bool = False
) -> VectorPlan:
    """Return the plan of one answer a stored chip; parameters and errors as of :func:`vector_plan`."""
    job = StoredJob(stored)
    _check(job, parcel, output, is_vector)
    work = VectorWork(output, is_vector, tuple(own.name for own in job.sources))
    return VectorPlan(job, parcel, work, stored_units(stored))


def vector_plan(
    chips: ModelChips,
    parcel: ModelParcel,
    output: ModelOutput,
    outputs: tuple[Output, ...],
    on_error: OnError = "raise",
    is_vector: bool = False,
) -> VectorPlan:
    """Return the plan of one answer a chip.

    Parameters
    ----------
    chips
        The chips.
    parcel, output
        The model, and what it gives, as it was tried.
    outputs
        What each source becomes.
    on_error
        What becomes of a tile that cannot be read.
    is_vector
        Whether one number is a vector as well.

    Raises
    ------
    ModelError
        When the model gives numbers for pixels.
    PlanError
        When a column of the user's has the name of one of the table's.
    """
    job, ground = chips.job, chips.ground
    _check(job, parcel, output, is_vector)
    own = planned_units(job, outputs, ReadContext(chips.functions, on_error), chips.provenance)
    return VectorPlan(job, parcel, VectorWork(output, is_vector, ground.dated), own, on_error, ground.span)


def _check(job: AnsweredJob, parcel: ModelParcel, output: ModelOutput, is_vector: bool) -> None:
    """Raise where answers are no rows of a table, or a column of the user's has the name of one of these."""
    if output.side is not None:
        raise ModelError(
            f"model {parcel.name}", f"{output.side} x {output.side} numbers for a chip", "one answer for each chip",
            "Numbers of pixels make a map: predict(model, to='map.zarr'); or let the model return their mean.",
        )  # fmt: skip
    names = {own.name for own in answer_fields(output, is_vector)} | set(_PLACE)
    taken = [name for name in job.chips.column_names if name in names and name not in CHIP_SCHEMA.names]
    if taken:
        raise PlanError(
            "predict", f"a column {', '.join(taken)} of yours", "other names than those of the table's own columns",
            "Rename it in the table that with_table() was given.",
        )  # fmt: skip
