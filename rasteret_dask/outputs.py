"""The same chips as lazy xarray objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from rasteret_dask import pixels
from rasteret_dask.job import Output
from rasteret_dask.shards import Functions, Graph, lower
from rasteret_dask.write import Layout

__all__ = ["to_xarray"]


def to_xarray(layout: Layout, functions: Functions) -> xr.Dataset | xr.DataTree:
    """Return a job's chips lazily, in the order of its shards: a Dataset, or a DataTree with a node a source."""
    job = layout.job
    graph = lower(job, functions)
    nodes = {}
    for plan, output in zip(job.sources, layout.outputs, strict=True):
        nodes[plan.name] = _dataset(layout, graph, plan.name, output)
    if len(nodes) == 1:
        return next(iter(nodes.values()))
    return xr.DataTree.from_dict({f"/{name}": node for name, node in nodes.items()})


def _dataset(layout: Layout, graph: Graph, source: str, out: Output) -> xr.Dataset:
    job = layout.job
    two = ("chip", "time")
    shapes: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
        "pixels": (
            ("chip", "time", "band", "y", "x"),
            (out.times, len(out.bands), out.height, out.width),
            np.dtype(out.dtype),
        ),
        "valid_fraction": (two, (out.times,), np.dtype("float32")),
        "datetime": (two, (out.times,), np.dtype("datetime64[us]")),
        "source": (two, (out.times,), np.dtype(object)),
    }
    if out.valid:
        shapes["valid"] = (("chip", "time", "y", "x"), (out.times, out.height, out.width), np.dtype(bool))
    of = _Blocks(graph, source, f"{source}-{job.digest[:12]}")
    arrays = {name: (dims, of.array(name, shape, dtype)) for name, (dims, shape, dtype) in shapes.items()}
    data = {n: arrays.pop(n) for n in ("pixels", "valid") if n in arrays}
    coordinates: dict[str, Any] = dict(arrays)
    parts = [pixels.chip_coordinates(job, s) for s in graph.shards]
    for name in parts[0]:
        coordinates[name] = (parts[0][name][0], np.concatenate([p[name][1] for p in parts]))
    coordinates["band"] = ("band", np.array(out.bands, dtype=object))
    if out.slots is not None:
        coordinates["time"] = ("time", np.array(out.slots, dtype="datetime64[ns]"))
    dataset = xr.Dataset(data, coordinates, dict(layout.attrs.get(source, {})))
    dataset["pixels"].attrs = out.pixel_attrs
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
