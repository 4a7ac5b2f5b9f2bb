"""One pass over all chips: their statistics, or how many of each shard are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dask.threaded
import numpy as np
from dask._task_spec import Task, TaskRef
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.net import clusters
from rasteret_dask.planning.plan import digest
from rasteret_dask.statistics.stats import Stats, measure, merged
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Arrays, Kind

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.net.clusters import ClientLike

__all__ = ["computed", "kept_sizes", "measured", "recalled", "remember"]

_log = logging.getLogger(__name__)

FAN = 16
"""Parts that one task puts together."""

REMEMBERED = 8
"""Statistics that a process keeps: those of 64 bands of floats take a few MB."""

_known: dict[tuple[str, ...], Stats] = {}


def remember(found: Stats, *key: str) -> None:
    """Keep what was measured, for :func:`recalled` in this process."""
    _known.pop(key, None)
    _known[key] = found  # the latest last
    for old in list(_known)[:-REMEMBERED]:
        _known.pop(old, None)


def recalled(*key: str) -> Stats | None:
    """Return what this process measured last of the chips that the key names by all that decides them, or None."""
    return _known.get(key)


_Part = Callable[[Any, NDArray[np.int64] | None], Arrays]


def measured(reading: ChipShards, client: ClientLike = None) -> Stats:
    """Measure all chips of what can be read: a task a shard, and one that puts FAN of them together.

    What these say comes here at once, so that a worker that is lost later has not read in vain.

    Parameters
    ----------
    reading
        The chips.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.

    Raises
    ------
    PlanError
        When no chip is kept, or ``client`` is none of these.
    JobError
        When no scheduler answers.
    ReadError
        When chips could not be read.
    """
    graph, level = _on_shards(reading, "stats", _measure, dict(reading.kinds))
    if not level:
        raise _none()
    groups = [level[at : at + FAN] for at in range(0, len(level), FAN)]
    names = [f"stats-{digest(group)}" for group in groups]  # the shards' keys tell how they are read
    for name, group in zip(names, groups, strict=True):
        graph[name] = Task(name, _merge, *(TaskRef(key) for key in group))
    found = merged(computed(graph, names, client, "stats", reading.send_signatures))
    if not found.chips:
        raise _none()
    return found


def _none() -> PlanError:
    return PlanError("stats", "no chip", "at least one", "Loosen keep, filter or select.")


def kept_sizes(reading: ChipShards, client: ClientLike = None) -> tuple[int, ...]:
    """Return how many chips each shard has once its pixels are looked at.

    Parameters
    ----------
    reading
        Chips whose ``part`` leaves out those that are dropped.
    client
        As in :func:`measured`.
    """
    graph, keys = _on_shards(reading, "size", _size)
    subject = "counting the chips that filter_pixels() keeps"
    return tuple(computed(graph, keys, client, subject, reading.send_signatures))


def _on_shards(
    reading: ChipShards, verb: str, function: Callable[..., Any], *constants: Any
) -> tuple[dict[Hashable, Any], list[str]]:
    """Return a graph with one task a shard, ``function(result, part, *constants)``, and these tasks' keys."""
    roots, tasks = reading.tasks()
    graph = dict(roots)
    names = [f"{verb}-{key}" for key, _ in tasks]
    for name, (key, task) in zip(names, tasks, strict=True):
        asks = Task(name, function, TaskRef(key), reading.part, *constants)
        graph[name] = Task.fuse(task, asks, key=name)
    return graph, names


def computed(
    graph: Mapping[Hashable, Any],
    keys: Sequence[str],
    client: ClientLike,
    subject: str = "stats",
    sign: Callable[[Client], None] | None = None,
) -> Sequence[Any]:
    """Return the results of some keys: by a cluster, or by threads of this process where there is none.

    Parameters
    ----------
    graph, keys
        The tasks, and those whose results are wanted.
    client
        As in :func:`measured`.
    subject
        What is being done: goes before each line about a cluster that stands still.
    sign
        Sends the workers what they need to sign what the tasks read; None: nothing is signed.
    """
    clusters.check(client, "client=")
    begun = time.monotonic()
    _log.info("%s: %d tasks begin", subject, len(graph))
    with clusters.using(client) as cluster:
        found: Sequence[Any]
        if cluster is None:
            found = dask.threaded.get(dict(graph), list(keys))
        else:
            from rasteret_dask.net.awaiting import results  # these import distributed
            from rasteret_dask.net.watch import watched

            with watched(cluster, graph, {key: key for key in graph if isinstance(key, str)}, subject):
                if sign is not None:
                    sign(cluster)
                found = results(cluster, graph, keys, subject)
    _log.info("%s: done in %.1f s", subject, time.monotonic() - begun)
    return found


def _measure(result: Any, part: _Part, kinds: Mapping[str, Kind]) -> Stats:
    return measure(part(result, None), kinds)


def _merge(*parts: Stats) -> Stats:
    return merged(parts)


def _size(result: Any, part: _Part) -> int:
    return len(part(result, None)["chip_id"])
