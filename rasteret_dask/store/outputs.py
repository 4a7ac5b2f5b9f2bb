# SPDX-License-Identifier: Apache-2.0
"""The same chips as xarray objects: lazy, or in this process's memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import dask.array as da
import dask.threaded
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, Task, TaskRef
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from rasteret_dask.chipping.chiptable import FILLED, PRESENT
from rasteret_dask.net.signatures import send_to_current
from rasteret_dask.planning.meta import TEXT, meta_attrs
from rasteret_dask.store.layout import Layout
from rasteret_dask.table.itemkinds import CLASSES
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import KEPT, tally
from rasteret_dask.tasks.job import Job, Output, Shard
from rasteret_dask.tasks.shards import Graph, lower, read_chips

__all__ = ["load", "to_xarray"]


def to_xarray(layout: Layout, context: ReadContext) -> xr.Dataset | xr.DataTree:
    """Return a job's chips lazily, in the order of its shards: a Dataset, or a DataTree with a node a source.

    Chips that a rule drops stay in their places, all fill, and a coordinate ``kept`` (chip,) tells which.

    Parameters
    ----------
    layout
        The job and its layout.
    context
        What its shards are read with.
    """
    job = layout.job
    send_to_current(job.hrefs(), job.signed)
    graph = lower(job, context)
    nodes = {}
    for plan, output in zip(job.sources, layout.outputs, strict=True):
        of = _Blocks(graph, plan.name, f"{plan.name}-{job.digest[:12]}{graph.tail}")
        arrays = {
            n: (dims, of.array(n, shape, dtype)) for n, (dims, shape, dtype) in _shapes(job, output).items()
        }
        nodes[plan.name] = _assembled(layout, plan.name, output, arrays)
    return _tree(nodes)


def load(layout: Layout, context: ReadContext) -> xr.Dataset | xr.DataTree:
    """Read a job's chips into memory, in the order of its shards, by Dask's threads in this process.

    Each tile goes to its place in one array a source; nothing is put together afterwards. Chips that a rule drops
    are left out: then what is kept is copied. A warning says so where that are all, and which rule took how many.

    Parameters
    ----------
    layout
        The job and its layout.
    context
        What its shards are read with.
    """
    job = layout.job
    shapes = [_shapes(job, output) for output in layout.outputs]
    arrays = [
        {
            name: np.empty((sum(h.chips for h in job.hierarchies), *shape), dtype)
            for name, (_, shape, dtype) in own.items()
        }
        for own in shapes
    ]
    tasks, start = {}, 0
    fallen: dict[str, str] = {}
    for shard in job.shards():
        stop = start + shard.stop - shard.start
        places = [{name: array[start:stop] for name, array in own.items()} for own in arrays]
        tasks[shard.name] = Task(
            shard.name,
            _fill,
            DataNode("job", job),
            shard,
            context,
            places,
            DataNode("fallen", fallen),
        )
        start = stop
    dask.threaded.get(tasks, list(tasks))
    kept = arrays[0].get(KEPT)
    if kept is not None:
        if not kept.any():
            warnings.warn(
                f"filter_pixels() dropped {len(kept):,} of {len(kept):,} chips ({tally(fallen.values())}): "
                "lower what it asks for, or remove it",
                UserWarning,
                stacklevel=3,
            )
        arrays = [{n: array[kept] for n, array in own.items() if n != KEPT} for own in arrays]
    nodes = {
        plan.name: _assembled(layout, plan.name, output, {n: (own[n][0], made[n]) for n in made}, kept)
        for plan, output, own, made in zip(job.sources, layout.outputs, shapes, arrays, strict=True)
    }
    return _tree(nodes)


def _fill(
    job: Job,
    shard: Shard,
    context: ReadContext,
    places: list[dict[str, Any]],
    fallen: dict[str, str],
) -> None:
    """Read one shard into its part of the arrays; ``fallen`` gets the chips that rules drop, with the reason."""
    into = [(place["pixels"], place.get("valid")) for place in places]
    read = read_chips(job, shard, context, into)
    fallen |= next(iter(read.values())).attrs.get("dropped", {})
    for dataset, place in zip(read.values(), places, strict=True):
        for name, array in place.items():
            if not np.may_share_memory(dataset[name].values, array):
                array[...] = dataset[name].values


def _tree(nodes: dict[str, xr.Dataset]) -> xr.Dataset | xr.DataTree:
    if len(nodes) == 1:
        return next(iter(nodes.values()))
    return xr.DataTree.from_dict({f"/{name}": node for name, node in nodes.items()})


def _shapes(job: Job, out: Output) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]]:
    """Return dims, shape behind the chips, and dtype of what a shard brings of one source."""
    two = ("chip", "time")
    shapes: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
        "pixels": (
            ("chip", "time", "band", "y", "x"),
            (out.times, len(out.bands), out.height, out.width),
            np.dtype(out.dtype),
        ),
        "valid_fraction": (two, (out.times,), np.dtype("float32")),
        "datetime": (two, (out.times,), np.dtype("datetime64[us]")),
        "member": (two, (out.times,), np.dtype(object)),
    }
    if out.filled:
        shapes[FILLED] = (two, (out.times,), np.dtype("float32"))
    if out.present:
        shapes[PRESENT] = (two, (out.times,), np.dtype(bool))
    for name, kind in out.meta_arrays:
        shapes[name] = (two, (out.times,), np.dtype(object if kind == TEXT else kind))
    if job.pixel_rules:
        shapes[KEPT] = (("chip",), (), np.dtype(bool))
    if out.valid:
        shapes["valid"] = (("chip", "time", "y", "x"), (out.times, out.height, out.width), np.dtype(bool))
    for name, dtype in out.masks:
        shapes[name] = (("chip", "y", "x"), (out.height, out.width), np.dtype(dtype))
    return shapes


def _assembled(
    layout: Layout, source: str, out: Output, arrays: dict[str, tuple[Any, Any]], kept: Any = None
) -> xr.Dataset:
    """Make one source's Dataset of its arrays, with what the plan knows of the chips, or of the ``kept`` ones."""
    job = layout.job
    data = {n: arrays[n] for n in ("pixels", "valid", *dict(out.masks)) if n in arrays}
    coordinates: dict[str, Any] = {n: array for n, array in arrays.items() if n not in data}
    parts = [pixels.chip_coordinates(job, s) for s in job.shards()]
    for name in parts[0]:
        values = np.concatenate([p[name][1] for p in parts])
        coordinates[name] = (parts[0][name][0], values if kept is None else values[kept])
    coordinates["band"] = ("band", np.array(out.bands, dtype=object))
    coordinates["band_kind"] = ("band", np.array(out.kind_names, dtype=object))
    if out.units:
        coordinates["units"] = ("band", np.array(out.units, dtype=object))
    if out.slots is not None:
        coordinates["time"] = ("time", np.array(out.slots, dtype="datetime64[ns]"))
    classes = {CLASSES: out.classes} if out.classes else {}
    dataset = xr.Dataset(data, coordinates, {**layout.attrs.get(source, {}), **classes})
    dataset["pixels"].attrs = out.pixel_attrs
    for name in out.meta_names:
        dataset[name].attrs = meta_attrs(name)
    for labels in job.labels:
        if labels.name in dict(out.masks):
            dataset[labels.name].attrs = labels.attrs
    return dataset


@dataclass(frozen=True)
class _Blocks:
    """The shards of one source, each a Dataset, of which Dask arrays take a variable."""

    graph: Graph
    source: str
    token: str
    """Tells these chips apart from others: arrays that share a name are one and the same to Dask."""

    def array(self, variable: str, shape: tuple[int, ...], dtype: Any) -> da.Array:
        """Return one variable of all shards, shape (chip, *shape)."""
        graph, layer = self.graph, self.graph.sources[self.source]
        name, zeros = f"{variable}-{self.token}", (0,) * len(shape)
        tasks = {
            (name, i, *zeros): Task(
                (name, i, *zeros), _take, TaskRef((layer, s.hierarchy, s.number)), variable
            )
            for i, s in enumerate(graph.shards)
        }
        layers = {**graph.graph.layers, name: MaterializedLayer(tasks)}
        needs = {**graph.graph.dependencies, name: {layer}}
        chips = tuple(s.stop - s.start for s in graph.shards)
        return da.Array(HighLevelGraph(layers, needs), name, (chips, *((n,) for n in shape)), dtype=dtype)


def _take(dataset: xr.Dataset, variable: str) -> Any:
    return dataset[variable].values
