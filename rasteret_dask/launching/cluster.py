# SPDX-License-Identifier: Apache-2.0
"""A Dask cluster by one word, for the length of a block: started, scaled, and always taken down again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args
from uuid import uuid4

import dask.config

from rasteret_dask.errors import PlanError
from rasteret_dask.launching.request import (
    WORKER_ENVIRONMENT,
    ClusterRequest,
    WorkerSize,
    durations,
    seconds_of,
)
from rasteret_dask.net import clusters, remote
from rasteret_dask.store.stopping import terminable
from rasteret_dask.tasks.workermemory import limit_bytes

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.show.explain import Explanation

__all__ = [
    "CONTAINERS",
    "KINDS",
    "MOST_WORKERS",
    "ClusterKind",
    "Explained",
    "check_place",
    "checked_options",
    "cluster",
    "is_address",
    "most_for",
]

ClusterKind: TypeAlias = Literal["local", "gateway", "kubernetes", "slurm"]

KINDS: tuple[ClusterKind, ...] = get_args(ClusterKind)
"""Words for clusters that are started; each is a module of this package with ``OPTIONS`` and ``started``."""

CONTAINERS: frozenset[str] = frozenset({"gateway", "kubernetes"})
"""Kinds whose workers are containers, and so have an image."""

IDLE_S = 600.0
"""Seconds without tasks after which a cluster takes itself down."""

MOST_WORKERS = 4
"""Workers that are started where nobody says how many, at most."""

_EVERY_KIND = {
    "idle_timeout": "how long it may have no tasks until it takes itself down, such as '10 minutes'",
    "allowed_failures": "how many lost workers a task survives",
}
"""Options that all kinds take."""


class Explained(Protocol):
    """Chips of any kind that tell what they cost."""

    def explain(self) -> Explanation:
        """Say what the job will do."""


def cluster(
    place: str,
    *,
    chips: Explained | Sequence[Explained] | None = None,
    workers: int | tuple[int, int] | None = None,
    size: WorkerSize | None = None,
    options: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Client]:
    """Start a Dask cluster by one word, or connect to one that runs; use it in a ``with`` block.

    At the end of the block everything that was started is taken down, also after an error, Ctrl-C and SIGTERM. If the
    process is killed, workers of this machine end at once, and other clusters once they have had no task for as long
    as the option ``idle_timeout`` says.

    Parameters
    ----------
    place
        ``"local"``: processes of this machine; ``"gateway"``: dask-gateway; ``"kubernetes"``: the dask-kubernetes
        operator; ``"slurm"``: jobs of a Slurm queue; or the address of a scheduler that runs (``"tcp://..."``,
        ``"tls://..."``), which is only connected to.
    chips
        The chips, or several, that are to be computed: they are planned before the cluster starts, workers get the
        memory that their tasks need, and there are no more workers than tasks. None: workers get the memory that any
        job needs, and a plan that takes longer than ``idle_timeout`` is best made before (``chips.explain()``).
    workers
        How many; or ``(least, most)``: as many as there is work for, within these limits. None: as many as the chips
        have tasks for, at most 4, and for ``"local"`` as many as the machine has cores and memory for.
    size
        Of each worker: 2 threads by default.
    options
        What only this kind takes, such as the queue of Slurm or the namespace of Kubernetes (see ``docs/clusters.md``);
        and for every kind ``idle_timeout`` (10 minutes) and ``allowed_failures`` (of Dask's configuration: 3).

    Returns
    -------
    context manager
        Of a ``distributed.Client``, which is the current client inside the block: calls without ``client=`` use it.

    Raises
    ------
    PlanError
        When ``place`` is no kind of cluster and no address, or an argument makes no sense for it.
    MissingExtraError
        When a package that starts this kind is not installed.
    JobError
        When the cluster cannot be started, or no scheduler answers.

    Examples
    --------
    >>> train = chips.select("train")
    >>> with rd.cluster("local", chips=train, workers=1) as client:
    ...     report = train.to_zarr("clustered.zarr", client=client, progress=False)
    >>> report.committed
    True
    """
    check_place(place)
    if is_address(place):
        _check_bare(place, workers=workers, size=size, options=options)
        return _connected(place)
    return _started(_module(place).started, _request(place, chips, workers, size or WorkerSize(), options))


def _request(
    place: str,
    chips: Explained | Sequence[Explained] | None,
    workers: int | tuple[int, int] | None,
    size: WorkerSize,
    options: Mapping[str, Any] | None,
) -> ClusterRequest:
    """Return what a kind of cluster is asked for; what makes no sense is refused before chips are planned."""
    idle_s, failures, rest = checked_options(place, options)
    if size.image is not None and place not in CONTAINERS:
        raise PlanError(
            f"cluster({place!r}, size=)", f"WorkerSize(image={size.image!r})",
            "no image: its workers are processes with the Python of this one, and no containers", "Leave image out.",
        )  # fmt: skip
    limits = None if workers is None else _limits(workers)
    explained = _explained(chips)
    memory = _memory(size, explained)
    if limits is None:
        limits = (min(_most_tasks(explained, size), _module(place).most_workers(size.threads, memory)),) * 2
    return ClusterRequest(
        name=f"rasteret-{uuid4().hex[:8]}",
        workers=limits,
        size=size,
        memory_bytes=memory,
        environment=MappingProxyType({**WORKER_ENVIRONMENT, **size.environment}),
        options=MappingProxyType(rest),
        idle_timeout_s=idle_s,
        allowed_failures=failures,
        task_durations=durations(split for one in explained for split in one["splits"]),
    )


def _memory(size: WorkerSize, explained: Sequence[Explanation]) -> int:
    """Return the memory limit of a worker, in bytes: as it is asked for, or what the tasks of all chips need."""
    if not isinstance(size.memory, str):
        return size.memory
    plans = [one.worker_bytes(size.threads) for one in explained]
    return max(plans, default=limit_bytes(size.threads))


def _most_tasks(explained: Sequence[Explanation], size: WorkerSize) -> int:
    """Return how many workers the tasks of the largest of the chips can use, where nobody says how many."""
    tasks = max((one["tasks"] for one in explained), default=MOST_WORKERS * size.threads)
    return most_for(tasks, size.threads)


def is_address(place: str) -> bool:
    """Tell whether a place is a scheduler's address, and no kind of cluster."""
    return "://" in place


def check_place(place: str) -> None:
    """Raise PlanError where a place is neither a kind of cluster nor an address."""
    if isinstance(place, str) and (is_address(place) or place in KINDS):
        return
    near = get_close_matches(str(place), KINDS, n=1)
    if re.fullmatch(r"[^/]+:\d+", str(place)):
        near = [f"tcp://{place}"]
    raise PlanError(
        "cluster", repr(place), f"one of {', '.join(map(repr, KINDS))}, or an address such as 'tcp://HOST:8786'",
        f"Did you mean {near[0]!r}?" if near else "",
    )  # fmt: skip


def most_for(tasks: int, threads: int) -> int:
    """Return how many workers are started for so many tasks, where nobody says how many."""
    return max(1, min(-(-tasks // threads), MOST_WORKERS))


def _explained(chips: Explained | Sequence[Explained] | None) -> list[Explanation]:
    several: Sequence[Any] = [] if chips is None else chips if isinstance(chips, list | tuple) else [chips]
    for one in several:
        if not hasattr(one, "explain"):
            raise PlanError("cluster(chips=)", f"{one!r:.100}", "chips, or a list of them")
    return [one.explain() for one in several]


def _limits(workers: int | tuple[int, int]) -> tuple[int, int]:
    pair: Any = (workers, workers) if type(workers) is int else workers
    whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(n) is int for n in pair)
    if not whole or not 0 <= pair[0] <= pair[1] or pair[1] < 1:
        raise PlanError(
            "cluster(workers=)", repr(workers), "how many, such as 4, or (least, most), such as (0, 20)",
        )  # fmt: skip
    return pair[0], pair[1]


def checked_options(place: str, options: Mapping[str, Any] | None) -> tuple[float, int, dict[str, Any]]:
    """Return the idle time-out in seconds, how many lost workers a task survives, and what only this kind takes.

    Parameters
    ----------
    place
        One of :data:`KINDS`.
    options
        As :func:`cluster` takes them.

    Raises
    ------
    PlanError
        When one is none of this kind's, or makes no sense.
    """
    module, rest, subject = _module(place), dict(options or {}), f"cluster({place!r}, options=)"
    names = {**_EVERY_KIND, **module.OPTIONS}
    for name in rest:
        if name not in names:
            near = get_close_matches(str(name), names, n=1)
            raise PlanError(
                subject,
                repr(name),
                f"one of {', '.join(names)}",
                f"Did you mean {near[0]!r}?" if near else "",
            )
    idle_s = seconds_of(f"{subject} idle_timeout", rest.pop("idle_timeout", IDLE_S))
    failures = rest.pop("allowed_failures", dask.config.get("distributed.scheduler.allowed-failures", 3))
    if type(failures) is not int or failures < 0:
        raise PlanError(f"{subject} allowed_failures", repr(failures), "a whole number from 0 on")
    return idle_s, failures, rest


def _module(place: str) -> Any:
    return import_module(f"rasteret_dask.launching.{place}")


def _check_bare(place: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise PlanError(
                f"cluster({remote.redact(place)!r}, {name}=)", f"{value!r:.100}",
                "nothing: the cluster at an address has its workers and stays as it is",
                f"Leave {name} out, or start a cluster: {', '.join(map(repr, KINDS))}.",
            )  # fmt: skip


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    with terminable(), clusters.using(address) as client:
        assert client is not None
        with client.as_current():
            yield client


@contextmanager
def _started(start: Callable[[ClusterRequest], Any], request: ClusterRequest) -> Iterator[Client]:
    with terminable(), _expecting(request.task_durations), start(request) as running:
        _scale(running, request.workers)
        with clusters.using(running) as client:
            assert client is not None
            with client.as_current():
                yield client


@contextmanager
def _expecting(durations: Mapping[str, str]) -> Iterator[None]:
    """Tell a scheduler of this process how long tasks take; what the user's configuration says of them stays."""
    import distributed  # noqa: F401 - its defaults are a part of the configuration, and stay after the block

    key = "distributed.scheduler.default-task-durations"
    with dask.config.set({key: {**durations, **dask.config.get(key)}}):
        yield


def _scale(running: Any, workers: tuple[int, int]) -> None:
    """Have workers started: a fixed number, or as many as there is work for."""
    least, most = workers
    if least == most:
        running.scale(most)
    else:
        running.adapt(minimum=least, maximum=most)
