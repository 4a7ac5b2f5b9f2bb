# SPDX-License-Identifier: Apache-2.0
"""What a cluster is asked for, as checked values: how large its workers are, how many, and what only its kind takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dask.utils import parse_bytes, parse_timedelta

from rasteret_dask.errors import PlanError

__all__ = ["WORKER_ENVIRONMENT", "ClusterRequest", "WorkerSize", "durations", "seconds_of"]

WORKER_ENVIRONMENT: Mapping[str, str] = MappingProxyType({
    # read by the allocator when a process starts: give freed blocks back at once
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # but take the bodies of requests, some MB each, from few blocks that stay: far fewer page faults
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    # Dask's threads are the parallelism; those of BLAS would multiply it
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # for the files that GDAL reads: no listing of folders, retries, a small cache
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_HTTP_TIMEOUT": "30",
    "GDAL_CACHEMAX": "128",
})  # fmt: skip
"""What every worker is started with; :attr:`WorkerSize.environment` changes and adds to it."""

SPLITS = ("train", "val", "test", "all")
"""What chips are mostly split into; ``all``: they are not."""

A_TASK = "60s"
"""About what a run of shards takes: long enough that each is counted as work for a thread."""

MIB = 2**20
LEAST_MEMORY = 256 * MIB


@dataclass(frozen=True, slots=True)
class WorkerSize:
    """How large each worker of a cluster is, for :func:`cluster`.

    Parameters
    ----------
    threads
        Tasks that a worker computes at the same time; as many cores are asked for.
    memory
        Its memory limit: bytes, or a text such as ``"4GiB"``. ``"auto"``: what the plan's tasks need, as
        ``explain(threads=)`` tells; without a plan what any job needs (unless a single chip is larger than 128 MiB).
    lifetime
        After so long (``"55 minutes"``, seconds) a worker hands its tasks over and ends, where its host is lent for a
        time only; None: it stays.
    image
        Where workers are containers (``"gateway"``, ``"kubernetes"``): their image; None: what the cluster's
        administrators chose.
    environment
        Environment variables of each worker, beside those of ``rasteret_dask.launching.request.WORKER_ENVIRONMENT``.

    Raises
    ------
    PlanError
        When there is no thread, or a size or time that is none.

    Examples
    --------
    >>> rd.WorkerSize(threads=4, memory="6GiB").memory
    6442450944
    """

    threads: int = 2
    """Tasks at the same time."""
    memory: int | str = "auto"
    """Bytes, once it is checked; or ``"auto"``."""
    lifetime: float | str | None = None
    """Seconds, once it is checked."""
    image: str | None = None
    """Name of a container image."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Name -> value."""

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise PlanError("WorkerSize(threads=)", repr(self.threads), "a whole number from 1 on")
        if self.memory != "auto":
            object.__setattr__(self, "memory", _bytes(self.memory))
        if self.lifetime is not None:
            object.__setattr__(self, "lifetime", seconds_of("WorkerSize(lifetime=)", self.lifetime))
        texts = {str(name): str(value) for name, value in self.environment.items()}
        object.__setattr__(self, "environment", MappingProxyType(texts))


@dataclass(frozen=True, slots=True)
class ClusterRequest:
    """What a kind of cluster is asked to start."""

    name: str
    """Of the cluster, such as ``rasteret-3f9a01``: letters, digits and ``-``, as Kubernetes takes it."""
    workers: tuple[int, int]
    """At least and at most so many; the same twice: a fixed number. Whoever asks scales the cluster, not its kind."""
    size: WorkerSize
    """Of each worker."""
    memory_bytes: int
    """Memory limit of each worker."""
    environment: Mapping[str, str]
    """Environment variables of each worker."""
    options: Mapping[str, Any]
    """What only this kind takes; each name is one of its module's ``OPTIONS``."""
    idle_timeout_s: float = 600.0
    """Seconds without tasks after which the cluster takes itself down: a client that was killed cannot."""
    allowed_failures: int = 3
    """How many lost workers a task survives (``distributed.scheduler.allowed-failures``)."""
    task_durations: Mapping[str, str] = field(default_factory=lambda: durations())
    """As :func:`durations` returns them."""
    death_timeout_s: float = 120.0
    """Seconds after which a worker without a scheduler ends."""

    @property
    def scheduler_environment(self) -> dict[str, str]:
        """Dask's settings, as variables of a scheduler in another process."""
        return {
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(self.allowed_failures),
            "DASK_DISTRIBUTED__SCHEDULER__DEFAULT_TASK_DURATIONS": repr(dict(self.task_durations)),
        }


def durations(splits: Iterable[str] = ()) -> Mapping[str, str]:
    """Return how long tasks take whose like has not ended yet: beginnings of their names -> a time.

    Dask's ``distributed.scheduler.default-task-durations``. By itself it takes half a second for each, and so starts
    one worker for ten of them, and the others once that one has begun to work.

    Parameters
    ----------
    splits
        Of the chips that are written, beside those that chips mostly have.
    """
    names = {"stats", *(f"write-{split}" for split in {*SPLITS, *splits})}
    return MappingProxyType(dict.fromkeys(sorted(names), A_TASK))


def _bytes(value: Any) -> int:
    try:
        nbytes = int(value) if isinstance(value, int | float) else parse_bytes(value)
    except (ValueError, TypeError, AttributeError):
        nbytes = -1
    if isinstance(value, bool) or nbytes < LEAST_MEMORY:
        raise PlanError(
            "WorkerSize(memory=)", repr(value), "at least 256 MiB: bytes, a text such as '4GiB', or 'auto'",
        )  # fmt: skip
    return nbytes


def seconds_of(subject: str, value: Any) -> float:
    """Return a time in seconds; PlanError where it is none."""
    try:
        seconds = float(parse_timedelta(value, default="s"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < float("inf"):
        raise PlanError(subject, repr(value), "seconds, or a text such as '10 minutes'")
    return seconds
