# SPDX-License-Identifier: Apache-2.0
"""A cluster of processes on this machine: they end with the process that started them, however that ends."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import dask.config
from dask.system import CPU_COUNT

from rasteret_dask.launching.request import ClusterRequest
from rasteret_dask.tasks.workermemory import memory_here

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import HasScheduler

__all__ = ["OPTIONS", "most_workers", "started"]

OPTIONS: Mapping[str, str] = MappingProxyType({
    "dashboard_address": "where the dashboard listens; by default a free port of 127.0.0.1",
    "local_directory": "where workers spill to; by default a temporary folder",
})  # fmt: skip
"""What only this kind takes -> what it is."""


_AT_START = re.compile(r"MALLOC_\w+|GLIBC_TUNABLES|LD_\w+|\w+_NUM_THREADS")
"""Variables that a process reads once, as it begins."""


@contextmanager
def _restored(names: Iterable[str]) -> Iterator[None]:
    """Leave variables of the environment as they were before the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def started(request: ClusterRequest) -> Iterator[HasScheduler]:
    """Start a scheduler in this process, which workers can join; all of them end with the block."""
    from distributed import LocalCluster

    # Dask puts what a process reads as it begins into the environment of this one, which other libraries here read too
    first = {name: value for name, value in request.environment.items() if _AT_START.fullmatch(name)}
    later = {name: value for name, value in request.environment.items() if name not in first}
    settings = {"distributed.nanny.pre-spawn-environ": first, "distributed.nanny.environ": later}
    # what the user's configuration says of them stays
    settings = {key: {**variables, **dask.config.get(key)} for key, variables in settings.items()}
    options = {"dashboard_address": "127.0.0.1:0", **request.options}
    with (
        _restored(first),
        dask.config.set(settings),
        LocalCluster(
            name=request.name,
            n_workers=0,
            threads_per_worker=request.size.threads,
            memory_limit=request.memory_bytes,
            env=dict(request.size.environment),  # these also where this process has others
            death_timeout=request.death_timeout_s,
            lifetime=request.size.lifetime,
            scheduler_kwargs={"allowed_failures": request.allowed_failures},
            **options,
        ) as cluster,
    ):
        yield cluster


def most_workers(threads: int, memory_bytes: int) -> int:
    """Return how many workers this machine has cores and memory for, where nobody says how many: at least one."""
    return max(1, min(CPU_COUNT // threads, memory_here() // memory_bytes))
