"""The chip table becomes Dask tasks: one named Blockwise layer per step, fused to one task a shard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from dask._task_spec import DataNode, Task
from dask.blockwise import blockwise, optimize_blockwise
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.layers import ArrayBlockIdDep

from rasteret_dask import pixels
from rasteret_dask.errors import PlanError, UnreadableTilesWarning
from rasteret_dask.job import Job, Output, Shard, open_job
from rasteret_dask.plan import Function, digest

__all__ = ["Functions", "Graph", "JobRef", "lower", "mapped", "outputs_of", "read_shard", "renamed"]

Functions: TypeAlias = "Mapping[Function, Callable[[xr.DataArray], xr.DataArray]]"


@dataclass(frozen=True, slots=True)
class JobRef:
    """Where a written job lies: all that a task carries of it."""

    url: str
    digest: str


@dataclass(frozen=True)
class Graph:
    """A lowered job."""

    graph: HighLevelGraph
    name: str
    """The last layer; its keys are (name, split number, shard number)."""
    shards: tuple[Shard, ...]
    sources: Mapping[str, str]
    """Source -> the last layer of its own, with keys like those of ``name``."""
    tail: str = ""
    """What names of arrays made from these blocks end in, where they are not read as usual."""

    def key(self, shard: Shard) -> tuple[str, int, int]:
        """Return the key of a shard's last task."""
        return self.name, shard.hierarchy, shard.number

    @property
    def keys(self) -> list[tuple[str, int, int]]:
        """The keys of all shards."""
        return [self.key(s) for s in self.shards]

    def culled(self) -> HighLevelGraph:
        """Return the graph of these shards only."""
        return self.graph.cull(self.keys)

    def fused(self) -> dict[Hashable, Any]:
        """Return the tasks: one a shard, and the root tasks where there are any."""
        return dict(optimize_blockwise(self.graph, keys=self.keys).cull(self.keys))


def lower(
    job: Job,
    functions: Functions,
    ref: JobRef | None = None,
    write: Callable[..., Any] | None = None,
    on_error: str = "raise",
) -> Graph:
    """Turn a job into a graph.

    Parameters
    ----------
    job
        The job.
    functions
        The user's functions that its maps name.
    ref
        Where the job was written; None puts its tables into one root task.
    write
        ``write(job, shard, url, datasets)``: the last step; None ends with the joined datasets.
    on_error
        What becomes of a tile that cannot be read: an error (``"raise"``), or invalid pixels (``"mask"``).
    """
    build = _Builder(job, ref, on_error)
    sources = {}
    for number, plan in enumerate(job.sources):
        members = [build.member(number, at) for at in range(len(plan.members))]
        last = build.layer(f"merge-{plan.name}", _merge, (number, on_error), members)
        own = [f for s, f in job.maps if s in (None, plan.name)]
        for function in (*plan.maps, *own):
            node = build.function(function, functions)
            last = build.layer(f"map-{function.name}-{plan.name}", _map, (), [last], [node])
        sources[plan.name] = last
    name = build.layer("join", _join, (tuple(sources),), list(sources.values()))
    if write is not None:
        assert ref is not None
        name = build.layer("write", write, (ref.url,), [name])
    return Graph(HighLevelGraph(build.layers, build.needs), name, tuple(job.shards()), sources, build.tail)


class _Builder:
    """Adds layers over (split, shard) blocks."""

    def __init__(self, job: Job, ref: JobRef | None, on_error: str) -> None:
        self.job, self.ref = job, ref
        whole = job.whole  # so that the graph of some splits is the culled graph of all
        self.blocks = (
            max(h.number for h in whole.hierarchies) + 1,
            max(h.shards for h in whole.hierarchies),
        )
        self.ids = ArrayBlockIdDep(tuple((1,) * n for n in self.blocks))
        self.layers: dict[str, Any] = {}
        self.needs: dict[str, set[str]] = {}
        # Of the rows too: blocks of other rows must not share names, or Dask takes one for the other.
        self.token = whole.digest[:12]
        self.root = None if ref is not None else self._add_root(f"job-{self.token}", whole)
        self.tail = "" if on_error == "raise" else f"-{on_error}"
        self.token += self.tail

    def _add_root(self, name: str, value: Any) -> str:
        self.layers[name] = MaterializedLayer({(name,): DataNode((name,), value)})
        self.needs[name] = set()
        return name

    def function(self, function: Function, functions: Functions) -> str:
        """Ship a user's function once."""
        name = f"function-{function.name}-{digest(function)[:12]}"
        return name if name in self.layers else self._add_root(name, _Shipped(functions[function]))

    def member(self, source: int, member: int) -> str:
        """Add the layers from a member's cubes to its harmonized windows; return the last one's name."""
        tail = f"{self.job.sources[source].members[member].name}"
        cube = self.layer(f"cube-{tail}", _cube, (source, member), [])
        cut = self.layer(f"cut-{tail}", _cut, (), [cube], bare=True)
        return self.layer(f"harmonize-{tail}", _harmonize, (source,), [cut])

    def layer(
        self,
        step: str,
        function: Callable[..., Any],
        constants: tuple[Any, ...],
        below: Sequence[str],
        roots: Sequence[str] = (),
        bare: bool = False,
    ) -> str:
        """Add ``function(job, shard, *constants, *roots, *below)``; ``bare`` leaves out all but ``below``."""
        name = f"{step}-{self.token}"
        while name in self.layers:
            name += "x"
        pairs: list[Any] = []
        if not bare:
            pairs += [self.root, ""] if self.root is not None else [self.ref, None]
            pairs += [self.ids, "sn"]
            for constant in constants:
                pairs += [constant, None]
        for root in roots:
            pairs += [root, ""]
        for other in below:
            pairs += [other, "sn"]
        numblocks = dict.fromkeys(below, self.blocks) | dict.fromkeys(roots, ())
        if self.root is not None and not bare:
            numblocks[self.root] = ()
        self.layers[name] = blockwise(function, name, "sn", *pairs, numblocks=numblocks)
        self.needs[name] = set(numblocks)
        return name


@dataclass(frozen=True)
class _Shipped:
    """A user's function as data, so that Dask does not take it for a task."""

    call: Callable[[xr.DataArray], xr.DataArray]


def _open(job: Job | JobRef) -> Job:
    return job if isinstance(job, Job) else open_job(job.url, job.digest)


def _cube(job: Job | JobRef, block: tuple[int, int], source: int, member: int) -> pixels.MemberCubes:
    opened = _open(job)
    return pixels.cubes(opened, opened.shard(*block), source, member)


def _cut(cubes: pixels.MemberCubes) -> pixels.Cut:
    return pixels.cut(cubes)


def _harmonize(job: Job | JobRef, block: tuple[int, int], source: int, cut: pixels.Cut) -> pixels.Harmonized:
    return pixels.harmonized(cut, _open(job).sources[source])


def _merge(
    job: Job | JobRef, block: tuple[int, int], source: int, on_error: str, *members: pixels.Harmonized
) -> xr.Dataset:
    opened = _open(job)
    shard = opened.shard(*block)
    found = pixels.merged(opened, shard, source, members, on_error)
    if isinstance(job, Job):  # where there is a store, its manifest lists them
        _warn(shard, found)
    return found


def read_shard(job: Job, shard: Shard, source: int, on_error: str, into: pixels.Into | None) -> xr.Dataset:
    """Read one source of one shard, before any function of the user's.

    Parameters
    ----------
    job, shard, source
        What to read.
    on_error
        ``"raise"`` or ``"mask"``.
    into
        Memory for the pixels and their validity.
    """
    plan = job.sources[source]
    members = [
        pixels.harmonized(pixels.cut(pixels.cubes(job, shard, source, at)), plan)
        for at in range(len(plan.members))
    ]
    found = pixels.merged(job, shard, source, members, on_error, into)
    _warn(shard, found)
    return found


def _warn(shard: Shard, found: xr.Dataset) -> None:
    unreadable = found.attrs["unreadable"]
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} tiles of shard {shard.name} could not be read; their pixels are invalid:\n"
            + "\n".join(unreadable),
            UnreadableTilesWarning,
            stacklevel=2,
        )


def _map(job: Job | JobRef, block: tuple[int, int], function: _Shipped, dataset: xr.Dataset) -> xr.Dataset:
    return mapped(function.call, dataset)


def _join(
    job: Job | JobRef, block: tuple[int, int], names: tuple[str, ...], *datasets: xr.Dataset
) -> dict[str, xr.Dataset]:
    return dict(zip(names, datasets, strict=True))


def mapped(function: Callable[[xr.DataArray], xr.DataArray], dataset: xr.Dataset) -> xr.Dataset:
    """Put a user's function over a source's pixels; what no longer fits the result is dropped.

    Raises
    ------
    PlanError
        When the result is not a DataArray of the same chips with dims (chip, time, band, y, x).
    """
    before = dataset["pixels"]
    name = getattr(function, "__qualname__", repr(function))
    try:
        after = function(before)
    except Exception as error:  # the user's own: it goes on unchanged, but says where it came from
        error.add_note(f"raised by map({name}) on {before.sizes['chip']} chips")
        raise
    if not isinstance(after, xr.DataArray) or set(after.dims) != set(before.dims):
        found = f"dims {after.dims}" if isinstance(after, xr.DataArray) else type(after).__name__
        raise PlanError(
            f"map({name})", found, f"a DataArray with dims {before.dims}", "Keep all five dimensions."
        )
    after = after.transpose(*before.dims)
    if after.sizes["chip"] != before.sizes["chip"]:
        raise PlanError(
            f"map({name})",
            f"{after.sizes['chip']} chips",
            f"the same {before.sizes['chip']} chips",
            "Use filter.",
        )
    kept = {k: v for k, v in dataset.variables.items() if k != "pixels" and _fits(v, after)}
    coordinates = {k: v for k, v in kept.items() if k in dataset.coords}
    if "band" in after.coords:
        coordinates["band"] = after["band"].variable
    variables = {k: v for k, v in kept.items() if k not in dataset.coords}
    return xr.Dataset({"pixels": after.variable, **variables}, coordinates, dataset.attrs)


def _fits(variable: Any, after: xr.DataArray) -> bool:
    return all(after.sizes.get(d, n) == n for d, n in variable.sizes.items())


def outputs_of(job: Job, functions: Functions) -> tuple[Output, ...]:
    """Return what each source becomes; a user's functions are tried on one chip of zeros."""
    result = []
    for number, plan in enumerate(job.sources):
        output = Output.of(plan, job.size_px[number])
        own = [*plan.maps, *(f for s, f in job.maps if s in (None, plan.name))]
        if own:
            dataset = _blank(job, number)
            for function in own:
                dataset = mapped(functions[function], dataset)
            output = _described(dataset, output)
        result.append(output)
    return tuple(result)


def _blank(job: Job, source: int) -> xr.Dataset:
    plan, size = job.sources[source], job.size_px[source]
    shard = Shard(None, 0, 0, 0, 1)
    chips = pixels.Chips(
        np.zeros((1, plan.times, len(plan.bands), size, size), dtype=plan.dtype),
        np.ones((1, plan.times, size, size), dtype=bool),
        np.full((1, plan.times), np.datetime64("2000-01-01", "us")),
        np.full((1, plan.times), plan.members[0].name, dtype=object),
        np.zeros(len(plan.bands), dtype=np.int64),
    )
    return pixels._dataset(job, shard, source, chips)


def _described(dataset: xr.Dataset, before: Output) -> Output:
    array = dataset["pixels"]
    _, times, bands, height, width = array.shape
    names = array["band"].values.tolist() if "band" in array.coords else [str(i) for i in range(bands)]
    fill = float("nan") if array.dtype.kind == "f" else before.fill if np.isfinite(before.fill) else 0.0
    slots = before.slots if before.slots is not None and len(before.slots) == times else None
    same = (times, height, width) == (before.times, before.height, before.width)
    return Output(
        tuple(str(n) for n in names), array.dtype.name, fill, times, slots, height, width,
        before.valid and same, None, tuple(pair for pair in before.attrs if pair[0] != "units"),
    )  # fmt: skip


def renamed(graph: Graph, job: Job, tail: str) -> tuple[dict[Hashable, Any], dict[str, Shard]]:
    """Return the fused tasks under keys that say shard and content, and the shard of each key.

    Parameters
    ----------
    graph
        The lowered job.
    job
        The job.
    tail
        What the last step adds to a shard's identity (exit and store).
    """
    content = job.keys
    tasks = graph.fused()
    result: dict[Hashable, Any] = {}
    shards: dict[str, Shard] = {}
    last = {graph.key(s): s for s in graph.shards}
    for key, task in tasks.items():
        shard = last.get(key)  # type: ignore[call-overload]
        if shard is None:
            result[key] = task
            continue
        name = f"write-{shard.name}-{content[shard.name][:16]}{tail}"
        result[name] = _abridged(task).substitute({}, key=name)
        shards[name] = shard
    return result, shards


def _abridged(task: Task) -> Task:
    """Return a fused task whose inner steps are numbered: their names would be half of its bytes."""
    if getattr(task.func, "__name__", "") != "_execute_subgraph":
        return task
    steps, last, inputs, *values = task.args
    short = {name: str(number) for number, name in enumerate((*inputs, *steps))}
    numbered = {short[name]: step.substitute(short, key=short[name]) for name, step in steps.items()}
    return Task(task.key, task.func, numbered, short[last], tuple(short[n] for n in inputs), *values)
