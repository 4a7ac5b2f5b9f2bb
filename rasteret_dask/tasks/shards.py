# SPDX-License-Identifier: Apache-2.0
"""The chip table becomes Dask tasks: one named Blockwise layer per step, fused to one task a shard."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import xarray as xr
from dask._task_spec import DataNode, Task
from dask.blockwise import blockwise, optimize_blockwise
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.layers import ArrayBlockIdDep

from rasteret_dask import activity
from rasteret_dask.errors import UnreadableTilesWarning
from rasteret_dask.planning.plan import Function, digest
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.filtering import filtered
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.jobfile import JobRef, opened
from rasteret_dask.tasks.mapping import mapped
from rasteret_dask.words import OnError

T = TypeVar("T")

__all__ = ["Graph", "Shipped", "lower", "read_chips", "read_sources", "renamed"]


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


@dataclass(frozen=True)
class Step:
    """One step of every shard: a layer of the graph, or a call."""

    name: str
    """``merge-s2``."""
    run: Callable[..., Any]
    """``run(job, block, *constants, *functions, *below)``, where a block is (split number, shard number)."""
    constants: tuple[Any, ...] = ()
    below: tuple[int, ...] = ()
    """Places of the steps whose results it takes."""
    functions: tuple[Function, ...] = ()
    """The user's functions that it calls."""
    memory: int | None = None
    """The source whose pixels it may write straight to memory that it is given."""


@dataclass(frozen=True)
class Steps:
    """What is done to every shard, in order: whatever runs it."""

    steps: tuple[Step, ...]
    sources: Mapping[str, int]
    """Source -> the place of its last step."""
    joined: int
    """The place of the step that has all sources."""

    @classmethod
    def of(cls, job: Job, on_error: OnError, warns: bool, only: Sequence[str] | None = None) -> Steps:
        """Return the steps of a job; ``warns`` tells whether tiles that cannot be read become warnings.

        With ``only`` these sources are joined; where rules decide which chips are kept, all are read.
        """
        steps: list[Step] = []

        def add(step: Step) -> int:
            steps.append(step)
            return len(steps) - 1

        sources = {}
        for number, plan in enumerate(job.sources):
            own = job.functions(number)
            cubes = tuple(
                add(Step(f"cube-{member.name}", _cube, (number, at)))
                for at, member in enumerate(plan.members)
            )
            memory = None if own else number  # a function gets memory of its own
            last = add(Step(f"merge-{plan.name}", _merge, (number, on_error, warns), cubes, memory=memory))
            for function in own:
                last = add(Step(f"map-{function.name}-{plan.name}", _map, (), (last,), (function,)))
            sources[plan.name] = last
        chosen = sources if only is None or job.pixel_rules else {name: sources[name] for name in only}
        joined = add(Step("join", _join, (tuple(chosen),), tuple(chosen.values())))
        if job.pixel_rules:
            named = tuple(r.function for r in job.pixel_rules if r.function is not None)
            joined = add(Step("filter_pixels", _filter_pixels, (on_error,), (joined,), named))
            sources = {name: add(Step(f"filtered-{name}", _one, (name,), (joined,))) for name in sources}
        return cls(tuple(steps), sources, joined)


def lower(
    job: Job,
    context: ReadContext,
    ref: JobRef | None = None,
    write: Callable[..., Any] | None = None,
    only: Sequence[str] | None = None,
) -> Graph:
    """Turn a job into a graph.

    Parameters
    ----------
    job
        The job.
    context
        What its shards are read with.
    ref
        Where the job was written; None puts its tables into one root task.
    write
        ``write(job, shard, url, datasets)``: the last step; None ends with the joined datasets.
    only
        The sources that are joined; None: all.
    """
    build = _Builder(job, ref, context.suffix)
    # where there is a store, its manifest lists what is unreadable
    todo = Steps.of(job, context.on_error, ref is None, only)
    names: list[str] = []
    for step in todo.steps:
        roots = [build.function(function, context) for function in step.functions]
        names.append(build.layer(step.name, step.run, step.constants, [names[n] for n in step.below], roots))
    sources, name = {source: names[at] for source, at in todo.sources.items()}, names[todo.joined]
    if write is not None:
        assert ref is not None
        name = build.layer("write", write, (ref.url,), [name])
    return Graph(HighLevelGraph(build.layers, build.needs), name, tuple(job.shards()), sources, build.tail)


def read_chips(
    job: Job,
    shard: Shard,
    context: ReadContext,
    into: Sequence[pixels.Into] | None = None,
    warns: bool = True,
) -> dict[str, xr.Dataset]:
    """Read all sources of one shard at once, and see which chips are kept: what its task does.

    Parameters
    ----------
    job, shard, context
        What to read, and with what.
    into
        Memory for the pixels and their validity, a source each; not taken where a function is called on them.
    warns
        Whether tiles that cannot be read become warnings.

    Returns
    -------
    dict
        Source -> its Dataset; see :func:`rasteret_dask.tasks.filtering.filtered`.
    """
    made = dict(read_sources(job, shard, context, into, warns))
    return {plan.name: made[plan.name] for plan in job.sources}


def read_sources(
    job: Job,
    shard: Shard,
    context: ReadContext,
    into: Sequence[pixels.Into] | None = None,
    warns: bool = True,
) -> Iterator[tuple[str, xr.Dataset]]:
    """Yield a shard's sources as :func:`read_chips` reads them, each as soon as it is there.

    Whoever takes them can let go of one before the next is read; where rules decide which chips are kept, all of them
    come at the end. Neighbouring shards begin with different sources: what one thread does in Python (masks, fills)
    then meets what another leaves to the threads that decode.
    """
    todo = Steps.of(job, context.on_error, warns)
    turn = int(job.running[shard.start])

    def result(at: int) -> Any:
        step = todo.steps[at]
        run = step.run if step.memory is None or into is None else partial(step.run, into=into[step.memory])
        calls = [Shipped(context.functions[function]) for function in step.functions]
        made = {n: result(n) for n in _turned(step.below, turn)}
        return run(
            job, (shard.hierarchy, shard.number), *step.constants, *calls, *(made[n] for n in step.below)
        )

    if job.pixel_rules:
        yield from result(todo.joined).items()
    else:
        for name in _turned(tuple(todo.sources), turn):
            yield name, result(todo.sources[name])


def _turned(items: tuple[T, ...], turn: int) -> tuple[T, ...]:
    """Return items in the same round, from another one on."""
    first = turn % max(len(items), 1)
    return items[first:] + items[:first]


class _Builder:
    """Adds layers over (split, shard) blocks."""

    def __init__(self, job: Job, ref: JobRef | None, tail: str) -> None:
        self.job, self.ref = job, ref
        whole = job.whole  # so that the graph of some splits is the culled graph of all
        self.blocks = (
            max(h.number for h in whole.hierarchies) + 1,
            max(h.first + h.shards for h in whole.hierarchies),
        )
        self.ids = ArrayBlockIdDep(tuple((1,) * n for n in self.blocks))
        self.layers: dict[str, Any] = {}
        self.needs: dict[str, set[str]] = {}
        # Of the rows too: blocks of other rows must not share names, or Dask takes one for the other.
        self.token = whole.digest[:12]
        self.root = None if ref is not None else self._add_root(f"job-{self.token}", whole)
        self.tail = tail
        self.token += tail

    def _add_root(self, name: str, value: Any) -> str:
        self.layers[name] = MaterializedLayer({(name,): DataNode((name,), value)})
        self.needs[name] = set()
        return name

    def function(self, function: Function, context: ReadContext) -> str:
        """Ship a user's function once."""
        name = f"function-{function.name}-{digest(function)[:12]}"
        return name if name in self.layers else self._add_root(name, Shipped(context.functions[function]))

    def layer(
        self,
        step: str,
        function: Callable[..., Any],
        constants: tuple[Any, ...],
        below: Sequence[str],
        roots: Sequence[str] = (),
    ) -> str:
        """Add ``function(job, shard, *constants, *roots, *below)``."""
        name = f"{step}-{self.token}"
        while name in self.layers:
            name += "x"
        pairs: list[Any] = [self.root, ""] if self.root is not None else [self.ref, None]
        pairs += [self.ids, "sn"]
        for constant in constants:
            pairs += [constant, None]
        for root in roots:
            pairs += [root, ""]
        for other in below:
            pairs += [other, "sn"]
        numblocks = dict.fromkeys(below, self.blocks) | dict.fromkeys(roots, ())
        if self.root is not None:
            numblocks[self.root] = ()
        self.layers[name] = blockwise(function, name, "sn", *pairs, numblocks=numblocks)
        self.needs[name] = set(numblocks)
        return name


@dataclass(frozen=True)
class Shipped:
    """A user's function as data, so that Dask does not take it for a task."""

    call: Callable[[xr.DataArray], xr.DataArray]


def _cube(job: Job | JobRef, block: tuple[int, int], source: int, member: int) -> pixels.MemberCubes:
    own = opened(job)
    return pixels.cubes(own, own.shard(*block), source, member)


def _merge(
    job: Job | JobRef,
    block: tuple[int, int],
    source: int,
    on_error: OnError,
    warns: bool,
    *members: pixels.MemberCubes,
    into: pixels.Into | None = None,
) -> xr.Dataset:
    own = opened(job)
    shard = own.shard(*block)
    merged = pixels.merged(own, shard, source, members, on_error, into)
    if warns:
        _warn(shard, merged)
    return merged


def _warn(shard: Shard, dataset: xr.Dataset) -> None:
    unreadable = dataset.attrs["unreadable"]
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} tiles of shard {shard.name} could not be read; their pixels are invalid:\n"
            + "\n".join(unreadable),
            UnreadableTilesWarning,
            stacklevel=2,
        )


def _map(job: Job | JobRef, block: tuple[int, int], function: Shipped, dataset: xr.Dataset) -> xr.Dataset:
    begun = time.perf_counter()
    return _timed("map", begun, mapped(function.call, dataset))


def _timed(stage: str, begun: float, dataset: xr.Dataset) -> xr.Dataset:
    """Add what a stage took since then to a Dataset's seconds, and tell Dask."""
    passed = time.perf_counter() - begun
    activity.spent(stage, passed)
    seconds = dict(dataset.attrs["seconds"])
    seconds[stage] = seconds.get(stage, 0.0) + passed
    return dataset.assign_attrs(seconds=seconds)


def _join(
    job: Job | JobRef, block: tuple[int, int], names: tuple[str, ...], *datasets: xr.Dataset
) -> dict[str, xr.Dataset]:
    return dict(zip(names, datasets, strict=True))


def _filter_pixels(
    job: Job | JobRef, block: tuple[int, int], on_error: OnError, *rest: Any
) -> dict[str, xr.Dataset]:
    own = opened(job)
    *shipped, joined = rest
    named = (r.function for r in own.pixel_rules if r.function is not None)
    functions = {function: one.call for function, one in zip(named, shipped, strict=True)}
    begun = time.perf_counter()
    kept = filtered(own, own.shard(*block), joined, ReadContext(functions, on_error))
    first = own.sources[0].name
    return {**kept, first: _timed("filter", begun, kept[first])}


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
