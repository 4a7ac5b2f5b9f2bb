# SPDX-License-Identifier: Apache-2.0
"""One pass over all chips: their statistics, or how many of each shard are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask.threaded
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.callbacks import Callback
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.net import clusters
from rasteret_dask.planning.plan import digest
from rasteret_dask.progress import Progress
from rasteret_dask.statistics.stats import Stats, measure, merged
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Arrays, SourcePixels

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = [
    "Pass",
    "chosen_sources",
    "computed",
    "kept_sizes",
    "measured",
    "measured_once",
    "on_shards",
    "recalled",
    "remember",
]

_log = logging.getLogger(__name__)

FAN = 16
"""Parts that one task puts together."""

REMEMBERED = 8
"""Statistics that a process keeps: those of 64 bands of floats take a few MB."""

_measured: dict[tuple[str, ...], Stats] = {}


def remember(stats: Stats, *key: str) -> None:
    """Keep what was measured, for :func:`recalled` in this process."""
    _measured.pop(key, None)
    _measured[key] = stats  # the latest last
    for old in list(_measured)[:-REMEMBERED]:
        _measured.pop(old, None)


def recalled(*key: str) -> Stats | None:
    """Return what this process measured last of the chips that the key names by all that decides them, or None."""
    return _measured.get(key)


def chosen_sources(names: Sequence[str], sources: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the sources that ``stats(sources=)`` names, in their order; None where these are all.

    Raises
    ------
    PlanError
        When there is no such source, or the list is empty.
    """
    if sources is None:
        return None
    said = (sources,) if isinstance(sources, str) else tuple(sources)
    unknown = [name for name in said if name not in names]
    if unknown or not said:
        found = ", ".join(map(repr, unknown)) or "an empty list"
        raise PlanError(
            "stats(sources=)", found, f"some of {', '.join(names)}", "Leave it out for all sources."
        )
    own = tuple(name for name in names if name in said)
    return None if own == tuple(names) else own


_Part = Callable[[Any, NDArray[np.int64] | None], Arrays]


def measured(reading: ChipShards, client: ClientLike = None, progress: bool = False) -> Stats:
    """Measure all chips of what can be read: a task a shard, and one that puts FAN of them together.

    What these say comes here at once, so that a worker that is lost later has not read in vain.

    Parameters
    ----------
    reading
        The chips.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
    progress
        Whether to show how far it is.

    Raises
    ------
    PlanError
        When no chip is kept, or ``client`` is none of these.
    JobError
        When no scheduler answers.
    ReadError
        When chips could not be read.
    """
    graph, level = on_shards(reading, "stats", _measure, dict(reading.pixels))
    if not level:
        raise _none()
    groups = [level[at : at + FAN] for at in range(0, len(level), FAN)]
    names = [f"stats-{digest(group)}" for group in groups]  # the shards' keys tell how they are read
    for name, group in zip(names, groups, strict=True):
        graph[name] = Task(name, _merge, *(TaskRef(key) for key in group))
    parts = dict(zip(names, groups, strict=True))
    found = merged(
        computed(graph, parts, client, Pass("stats", reading.send_signatures, progress, reading.memory))
    )
    if not found.chips:
        raise _none()
    return found


def measured_once(reading: ChipShards, on_error: str, client: ClientLike = None) -> Stats:
    """Return the statistics of all chips, measured where this process has not done so yet.

    Parameters
    ----------
    reading, client
        As in :func:`measured`.
    on_error
        What becomes of a tile that cannot be read.
    """
    known = recalled(reading.digest, on_error)
    if known is None:
        known = measured(reading, client, progress=True)
        remember(known, reading.digest, on_error)
    return known


def _none() -> PlanError:
    return PlanError("stats", "no chip", "at least one", "Ask for less in filter, filter_pixels or select.")


def kept_sizes(reading: ChipShards, client: ClientLike = None, progress: bool = False) -> tuple[int, ...]:
    """Return how many chips each shard has once its pixels are looked at.

    Parameters
    ----------
    reading
        Chips whose ``part`` leaves out those that are dropped.
    client, progress
        As in :func:`measured`.
    """
    graph, keys = on_shards(reading, "size", _size)
    look = Pass(
        "counting the chips that filter_pixels() keeps", reading.send_signatures, progress, reading.memory
    )
    return tuple(computed(graph, {key: (key,) for key in keys}, client, look))


def on_shards(
    reading: ChipShards, verb: str, function: Callable[..., Any], *constants: Any
) -> tuple[dict[Hashable, Any], list[str]]:
    """Return a graph with one task a shard, and these tasks' keys.

    Parameters
    ----------
    reading
        The chips.
    verb
        Goes before the key of each task: it tells this pass from others over the same chips.
    function
        ``function(result, part, *constants)``, where ``part`` makes arrays of what a shard's task returns.
    constants
        Its further arguments.
    """
    roots, tasks = reading.tasks()
    graph = dict(roots)
    names = [f"{verb}-{key}" for key, _ in tasks]
    for name, (key, task) in zip(names, tasks, strict=True):
        asks = Task(name, function, TaskRef(key), reading.part, *constants)
        graph[name] = Task.fuse(task, asks, key=name)
    return graph, names


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over all shards is called, and what belongs to it."""

    subject: str = "stats"
    """What is being done: goes before each line about a cluster that stands still."""
    sign: Callable[[Client], None] | None = None
    """Sends the workers what they need to sign what the tasks read; None: nothing is signed."""
    progress: bool = False
    """Whether to show how far it is."""
    memory: TaskMemory | None = None
    """What the tasks need; None: so little that no cluster is asked."""
    resource: str | None = None
    """The Dask resource that workers must declare; None: any worker computes."""


def computed(
    graph: Mapping[Hashable, Any],
    parts: Mapping[str, Sequence[str]],
    client: ClientLike,
    look: Pass,
) -> Sequence[Any]:
    """Return the results of some keys: by a cluster, or by threads of this process where there is none.

    Parameters
    ----------
    graph
        The tasks.
    parts
        Key whose result is wanted -> keys of the shards' tasks that it is made of.
    client
        As in :func:`measured`.
    look
        What the pass is called.
    """
    subject, total = look.subject, sum(map(len, parts.values()))
    clusters.check(client, "client=")
    begun = time.monotonic()
    _log.info("%s: %d tasks begin", subject, len(graph))
    with clusters.using(client) as cluster, Progress("shards", look.progress, total) as shown:
        found: Sequence[Any]
        if cluster is None:
            shards = {shard for some in parts.values() for shard in some}
            with Callback(posttask=lambda key, *_: shown.step(int(key in shards))):
                found = dask.threaded.get(dict(graph), list(parts))
        else:
            from rasteret_dask.net.awaiting import as_they_end  # these import distributed
            from rasteret_dask.net.watch import watched

            names = {key: key for key in graph if isinstance(key, str)}
            with watched(cluster, graph, names, subject, shown, look.memory):
                if look.sign is not None:
                    look.sign(cluster)
                ended = dict[str, Any]()
                for key, result in as_they_end(cluster, graph, list(parts), subject, look.resource):
                    ended[key] = result
                    shown.step(len(parts[key]))
                found = [ended[key] for key in parts]
    _log.info("%s: done in %.1f s", subject, time.monotonic() - begun)
    return found


def _measure(result: Any, part: _Part, pixels: Mapping[str, SourcePixels]) -> Stats:
    return measure(part(result, None), pixels)


def _merge(*parts: Stats) -> Stats:
    return merged(parts)


def _size(result: Any, part: _Part) -> int:
    return len(part(result, None)["chip_id"])
