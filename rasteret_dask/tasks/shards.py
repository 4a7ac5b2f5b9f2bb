"""The chip table becomes Dask tasks: one named Blockwise layer per step, fused to one task a shard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr
from dask._task_spec import DataNode, Task
from dask.blockwise import blockwise, optimize_blockwise
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.layers import ArrayBlockIdDep

from rasteret_dask.errors import PlanError, UnreadableTilesWarning
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.filtering import filtered
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, opened
from rasteret_dask.tasks.mapping import Functions, mapped

__all__ = ["Graph", "error_policy", "lower", "read_chips", "renamed"]


def error_policy(on_error: str) -> str:
    """Return ``on_error``, or raise PlanError where it is none."""
    if on_error not in ("raise", "mask"):
        raise PlanError("on_error=", repr(on_error), "'raise' or 'mask'")
    return on_error


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
        The user's functions that its maps and rules name.
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
        for function in job.functions(number):
            node = build.function(function, functions)
            last = build.layer(f"map-{function.name}-{plan.name}", _map, (), [last], [node])
        sources[plan.name] = last
    name = build.layer("join", _join, (tuple(sources),), list(sources.values()))
    if job.pixel_rules:
        roots = [build.function(r.function, functions) for r in job.pixel_rules if r.function is not None]
        name = build.layer("filter_pixels", _filter_pixels, (on_error,), [name], roots)
        sources = {source: build.layer(f"filtered-{source}", _one, (source,), [name]) for source in sources}
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


def _cube(job: Job | JobRef, block: tuple[int, int], source: int, member: int) -> pixels.MemberCubes:
    own = opened(job)
    return pixels.cubes(own, own.shard(*block), source, member)


def _cut(cubes: pixels.MemberCubes) -> pixels.Cut:
    return pixels.cut(cubes)


def _harmonize(job: Job | JobRef, block: tuple[int, int], source: int, cut: pixels.Cut) -> pixels.Harmonized:
    return pixels.harmonized(cut, opened(job).sources[source])


def _merge(
    job: Job | JobRef, block: tuple[int, int], source: int, on_error: str, *members: pixels.Harmonized
) -> xr.Dataset:
    own = opened(job)
    shard = own.shard(*block)
    found = pixels.merged(own, shard, source, members, on_error)
    if isinstance(job, Job):  # where there is a store, its manifest lists them
        _warn(shard, found)
    return found


def _read_source(
    job: Job, shard: Shard, source: int, functions: Functions, on_error: str, into: pixels.Into | None
) -> xr.Dataset:
    """Read one source of one shard at once: what its layers do one after another.

    Parameters
    ----------
    job, shard, source
        What to read.
    functions
        The user's functions that the job names.
    on_error
        ``"raise"`` or ``"mask"``.
    into
        Memory for the pixels and their validity, taken where no function is to be called on them; None: new.
    """
    own = job.functions(source)
    members = pixels.members_of(job, shard, source)
    found = pixels.merged(job, shard, source, members, on_error, None if own else into)
    _warn(shard, found)
    for function in own:
        found = mapped(functions[function], found)
    return found


def read_chips(
    job: Job,
    shard: Shard,
    functions: Functions,
    on_error: str,
    into: Sequence[pixels.Into] | None = None,
) -> dict[str, xr.Dataset]:
    """Read all sources of one shard at once, and see which chips are kept: what its task does.

    Parameters
    ----------
    job, shard, functions, on_error
        What to read, with what, and what becomes of tiles that cannot be read: ``"raise"`` or ``"mask"``.
    into
        Memory, a source each.

    Returns
    -------
    dict
        Source -> its Dataset; see :func:`rasteret_dask.tasks.filtering.filtered`.
    """
    joined = {
        plan.name: _read_source(job, shard, number, functions, on_error, into[number] if into else None)
        for number, plan in enumerate(job.sources)
    }
    return filtered(job, shard, joined, functions, on_error)


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


def _filter_pixels(
    job: Job | JobRef, block: tuple[int, int], on_error: str, *rest: Any
) -> dict[str, xr.Dataset]:
    own = opened(job)
    *shipped, joined = rest
    named = (r.function for r in own.pixel_rules if r.function is not None)
    functions = {function: one.call for function, one in zip(named, shipped, strict=True)}
    return filtered(own, own.shard(*block), joined, functions, on_error)


def _one(
    job: Job | JobRef, block: tuple[int, int], source: str, joined: Mapping[str, xr.Dataset]
) -> xr.Dataset:
    return joined[source]


def renamed(
    graph: Graph,
    job: Job,
    tail: str,
    verb: str = "write",
    look: Callable[[str], Any] | None = None,
) -> tuple[dict[Hashable, Any], dict[str, Shard]]:
    """Return the fused tasks under keys that say shard and content, and the shard of each key.

    Parameters
    ----------
    graph
        The lowered job.
    job
        The job.
    tail
        What the last step adds to a shard's identity (exit and store).
    verb
        What the keys begin with.
    look
        Called in the task with the shard's name, before anything is read: the shard's result where that is there
        already, else None. Dask runs a finished task again when the worker that holds its result is lost.
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
        name = f"{verb}-{shard.name}-{content[shard.name][:16]}{tail}"
        short = _abridged(task)
        if look is not None:
            short = Task(name, _unless_there, look, shard.name, short.func, *short.args)
        result[name] = short.substitute({}, key=name)
        shards[name] = shard
    return result, shards


def _unless_there(look: Callable[[str], Any], shard: str, work: Callable[..., Any], *args: Any) -> Any:
    there = look(shard)
    return work(*args) if there is None else there


def _abridged(task: Task) -> Task:
    """Return a fused task whose inner steps are numbered: their names would be half of its bytes."""
    if getattr(task.func, "__name__", "") != "_execute_subgraph":
        return task
    steps, last, inputs, *values = task.args
    short = {name: str(number) for number, name in enumerate((*inputs, *steps))}
    numbered = {short[name]: step.substitute(short, key=short[name]) for name, step in steps.items()}
    return Task(task.key, task.func, numbered, short[last], tuple(short[n] for n in inputs), *values)
