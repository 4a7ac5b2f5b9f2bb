# SPDX-License-Identifier: Apache-2.0
"""A map that is planned: what it will be and take, and its exits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from dask._task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.errors import PlanError
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.planning.plan import digest
from rasteret_dask.prediction.blending import Blend, check_blend, pixel_bytes
from rasteret_dask.prediction.mapgrid import MapBlock
from rasteret_dask.prediction.mapjob import MapJob
from rasteret_dask.prediction.mapstore import StoreLayout, empty_blocks
from rasteret_dask.prediction.mapwork import BlockWork
from rasteret_dask.prediction.models import ModelParcel
from rasteret_dask.prediction.modelsending import root_of
from rasteret_dask.prediction.openmap import opened_map
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.progress import nbytes_text
from rasteret_dask.statistics.measuring import Pass, computed
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.layout import JOB
from rasteret_dask.store.ledger import PROVENANCE, Maker, whole
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.provenance import Provenance
from rasteret_dask.store.unitruns import Making, UnitJob, Visible, WorkUnit, write_units
from rasteret_dask.tasks.context import Functions
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.tasks.jobfile import JobRef, check_writable, job_objects, opened
from rasteret_dask.tasks.shards import Shipped
from rasteret_dask.tasks.workermemory import TaskMemory, limit_bytes

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["GPU", "MapPlan", "gpu_resource"]

GPU = "GPU"
"""The Dask resource that workers with a GPU declare: ``dask worker --resources GPU=1``."""


def _nothing(manifest: pa.Table) -> Mapping[str, bytes]:
    return {}


class Sink(Protocol):
    """Where the blocks of a map go; it travels with every task."""

    @property
    def form(self) -> str:
        """What it makes of the same pixels: part of what a folder is known by."""

    def objects(
        self, block: MapBlock, arrays: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and pieces of each object of a block."""


@dataclass(frozen=True)
class _Making:
    """What a task does with each block of its run."""

    ref: JobRef
    work: BlockWork
    sink: Sink

    def __call__(self, item: tuple[int, MapBlock], *roots: Any) -> Making:
        number, block = item
        figures = self.work.compute(opened(self.ref), number, block, *roots)
        yield from self.sink.objects(block, figures.arrays)
        return figures.report


@dataclass(frozen=True, repr=False)
class MapPlan:
    """A map that is planned, before any pixel is read: :meth:`Chips.plan_map` returns it.

    Examples
    --------
    >>> plan = chips.plan_map(lambda pixels: pixels[:, 0, 0])
    >>> plan.explain()["blocks"], plan.explain()["pixels"] > 0
    (1, True)
    """

    maps: MapJob
    output: ModelOutput
    outputs: tuple[Output, ...] = field(repr=False)
    parcel: ModelParcel
    work: BlockWork
    functions: Functions = field(repr=False)
    provenance: Provenance = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """What the map is known by: chips, model, outputs and how they are blended; not how it is cut into blocks.

        Examples
        --------
        >>> len(chips.plan_map(lambda pixels: pixels[:, 0, 0]).digest)
        64
        """
        return digest(
            "predict", self.maps.job.digest, self.note, [grid.transform for grid in self.maps.grids]
        )

    @property
    def note(self) -> dict[str, Any]:
        """What the map says of itself: the model, its outputs, and how overlaps were blended.

        Examples
        --------
        >>> chips.plan_map(lambda pixels: pixels[:, 0, 0]).note["blend"]
        'hann'
        """
        out = self.output
        return {
            "model": {"name": self.parcel.name, "digest": self.parcel.digest},
            "outputs": out.kind,
            "codes": list(out.codes),
            "names": list(out.names),
            "colors": [list(pair) for pair in out.colors],
            "blend": self.work.blend,
            "min_inputs": self.work.least,
        }

    @cached_property
    def memory(self) -> TaskMemory:
        """What its tasks need."""
        block, channels = self.maps.block_px**2, self.output.channels
        per_shard = max((h.per_shard for h in self.maps.job.hierarchies), default=1)
        most = min(per_shard, max((h.chips for h in self.maps.job.hierarchies), default=1))
        batch = min(most, self.parcel.batch_size)
        answers = 3 * 4 * batch * channels * (self.output.side or 1) ** 2
        canvas = block * pixel_bytes(channels, self.output.is_flat)
        return TaskMemory(self.maps.job, self.outputs, together=True, beside=canvas + answers)

    def explain(self) -> dict[str, Any]:
        """Return what the map will be and take, as JSON values.

        ``chips``, and ``chips_again``: those that are predicted once more, as they reach several blocks; ``blocks``,
        ``empty_blocks``, ``block_px``; ``grids``: CRS, shape and bounds of each; ``pixels`` of all grids;
        ``peak_task_bytes``, ``kept_bytes``, and ``worker_bytes``: the memory limit of a worker with two threads.

        Examples
        --------
        >>> facts = chips.plan_map(lambda pixels: pixels[:, 0, 0]).explain()
        >>> facts["chips"] == len(chips), facts["block_px"]
        (True, 2048)
        """
        maps = self.maps
        return {
            "model": self.parcel.name,
            "outputs": self.output.kind,
            "names": list(self.output.names),
            "blend": self.work.blend,
            "chips": maps.chips,
            "chips_again": maps.repeats,
            "blocks": len(maps.blocks),
            "empty_blocks": empty_blocks(maps.grids, maps.blocks, maps.block_px),
            "block_px": maps.block_px,
            "grids": {
                grid.name: {"crs": grid.code, "shape": [grid.height, grid.width], "bounds": list(grid.bounds)}
                for grid in maps.grids
            },
            "pixels": sum(grid.height * grid.width for grid in maps.grids),
            "dtype": self.output.dtype,
            "peak_task_bytes": self.memory.task,
            "kept_bytes": self.memory.kept,
            "worker_bytes": limit_bytes(2, self.memory.task, self.memory.kept),
        }

    @property
    def _card(self) -> Card:
        facts, out = self.explain(), self.output
        grids = [
            f"{name} {grid['shape'][0]:,} x {grid['shape'][1]:,} pixels"
            for name, grid in facts["grids"].items()
        ]
        what = f"{out.kind} of {counted(out.channels, 'channel')}" if out.kind != "classes" else "classes"
        again = facts["chips_again"]
        rows = [
            Fact("model", f"{facts['model']}, blend {facts['blend']}"),
            Fact("outputs", f"{what}, {facts['dtype']}"),
            Fact("chips", f"{facts['chips']:,}" + (f"; {again:,} of them once more" if again else "")),
            Fact("grids", "; ".join(grids)),
            Fact("blocks", f"{facts['blocks']:,} of {facts['block_px']:,} pixels a side, one task each"),
            Fact("peak per task", nbytes_text(facts["peak_task_bytes"])),
            Fact("worker", f"a memory limit of {nbytes_text(facts['worker_bytes'])} for 2 threads"),
        ]
        return Card("MapPlan", rows)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html

    # Exits

    def layout(self) -> StoreLayout:
        """Return where everything goes in a Zarr store."""
        note = {"rasteret_dask": {"map": self.note, "sources": [plan.name for plan in self.maps.job.sources]}}
        return StoreLayout(self.maps.grids, self.output, self.maps.block_px, note)

    def to_zarr(
        self,
        url: str,
        client: ClientLike = None,
        progress: bool = True,
        bounds: Bounds | None = None,
        multiscales: bool = False,
    ) -> JobReport:
        """Write the map as a Zarr store; a rerun does what is missing.

        Parameters
        ----------
        url
            The store.
        client, progress, bounds
            As of :func:`rasteret_dask.store.unitruns.write_job`.
        multiscales
            As of :class:`MapZarr`.

        Examples
        --------
        >>> plan = chips.plan_map(lambda pixels: pixels[:, 0, 0])
        >>> plan.to_zarr("planned.zarr", progress=False).committed
        True
        """
        layout = replace(self.layout(), multiscales=multiscales)
        objects, root = layout.documents()
        blocks = dict(zip(self.maps.names(), self.maps.blocks, strict=True))
        job = self.unit_job(url, layout, root, objects, lambda: layout.places(blocks), client)
        return write_units(url, job, client, progress, bounds)

    def unit_job(
        self,
        url: str,
        sink: Sink,
        root: Visible,
        objects: Mapping[str, Maker],
        places: Callable[[], Mapping[str, str]],
        client: ClientLike,
        more: Callable[[pa.Table], Mapping[str, bytes]] = _nothing,
    ) -> UnitJob:
        """Return the blocks as units of work that end in objects of a sink; other arguments as of :class:`UnitJob`."""
        job = self.maps.job
        check_writable(job)
        whole_digest = digest(self.digest, self.maps.block_px, sink.form)
        tables = {f"{JOB}/{name}": whole(data) for name, data in job_objects(job).items()}
        units = [
            WorkUnit(name, (at, block), first, digest(whole_digest, name), None, at)
            for at, (name, block, first) in enumerate(
                zip(self.maps.names(), self.maps.blocks, self.maps.firsts, strict=True)
            )
        ]
        with clusters.using(client) as cluster:
            resource = gpu_resource(cluster, self.parcel)
        # in the graph it would travel with every batch of tasks
        parcel, file, content = self.parcel.apart(remote.join(url, JOB))
        return UnitJob(
            "predict",
            whole_digest,
            units,
            _Making(JobRef(remote.join(url, JOB), job.digest), self.work, sink),
            root,
            {
                **tables,
                f"{JOB}/{file}": whole(content),
                **objects,
                PROVENANCE: whole(self.provenance.to_bytes()),
            },
            places,
            more,
            roots={f"model-{parcel.digest[:16]}": parcel, **self._shipped()},
            cuts=self.maps.cuts,
            memory=self.memory,
            resource=resource,
            hrefs=job.hrefs,
            signed=job.signed,
        )

    def _shipped(self) -> dict[str, Shipped]:
        """Return the user's functions, which tasks need behind the model."""
        return {
            f"function-{f.name}-{digest(f)[:12]}": Shipped(self.functions[f]) for f in self.work.functions
        }

    def load(self, client: ClientLike = None, progress: bool = False) -> xr.Dataset | xr.DataTree:
        """Compute the map into memory: what :func:`open_map` would open, loaded.

        Parameters
        ----------
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        progress
            Whether to show how far it is.

        Examples
        --------
        >>> plan = chips.plan_map(lambda pixels: pixels[:, 0, 0])
        >>> plan.load()["values"].dims
        ('band', 'y', 'x')
        """
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        layout, job = self.layout(), self.maps.job
        objects, root = layout.documents()
        shipped, token = self._shipped(), digest(self.digest, self.maps.block_px)[:16]
        at_root = f"job-{token}"
        keys = [f"predict-{name}-{token}" for name in self.maps.names()]
        with clusters.using(client) as cluster, root_of(self.parcel, cluster) as (graph, model):
            graph |= {key: DataNode(key, value) for key, value in {**shipped, at_root: job}.items()}
            refs = [model, *map(TaskRef, shipped)]
            for number, (key, block) in enumerate(zip(keys, self.maps.blocks, strict=True)):
                graph[key] = Task(key, _made, TaskRef(at_root), self.work, layout, (number, block), *refs)
            sign = partial(signatures.send, hrefs=job.hrefs(), hosts=job.signed)
            look = Pass("predict", sign, progress, self.memory, gpu_resource(cluster, self.parcel))
            parts = computed(graph, {key: (key,) for key in keys}, cluster or client, look)
        new = default_buffer_prototype().buffer.from_bytes
        data = {path: new(b"".join(make())) for path, make in objects.items()}
        data |= {path: new(text.encode()) for path, text in root.groups.items()}
        data[root.path] = new(json.dumps(root.document).encode())
        data |= {path: new(value) for part in parts for path, value in part}
        opened = opened_map(MemoryStore(data), [layout.group(n) for n in range(len(self.maps.grids))])
        return opened.load(
            scheduler="threads"
        )  # by default Dask would send all of it to the current client's cluster


def _made(
    job: Job, work: BlockWork, sink: Sink, item: tuple[int, MapBlock], *roots: Any
) -> list[tuple[str, bytes]]:
    """Return the objects of a block."""
    number, block = item
    figures = work.compute(job, number, block, *roots)
    return [(path, b"".join(map(bytes, pieces))) for path, pieces in sink.objects(block, figures.arrays)]


def gpu_resource(cluster: Any, parcel: ModelParcel) -> str | None:
    """Return the resource that workers must declare: :data:`GPU` where some do, and the model asks for no CPU."""
    if cluster is None or parcel.device == "cpu":
        return None
    workers = clusters.workers_of(cluster).values()
    if any(worker.get("resources", {}).get(GPU) for worker in workers):
        return GPU
    return None


def checked(blend: Blend, batch_size: int, least: int) -> None:
    """Raise PlanError where arguments of ``predict`` are none."""
    check_blend(blend)
    for name, value in (("batch_size", batch_size), ("min_inputs", least)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise PlanError(f"predict({name}=)", repr(value), "a whole number above 0")
