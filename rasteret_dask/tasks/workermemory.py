# SPDX-License-Identifier: Apache-2.0
"""How much memory a worker needs: the one rule of explain(), clusters, manifests and threads of one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rasteret_dask.errors import JobError
from rasteret_dask.progress import nbytes_text
from rasteret_dask.tasks.freezing import SHARD_BYTES, task_bytes
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.tasks.keptbytes import MOST_KEPT_BYTES, kept_bytes

__all__ = ["MOST_TASK_BYTES", "PROCESS_BYTES", "TaskMemory", "limit_bytes", "memory_here", "needed_bytes"]

PROCESS_BYTES = 800 * 10**6 - MOST_KEPT_BYTES
"""What a process holds beside its tasks and kept tiles: Python, the libraries that it has imported, and some room."""

MOST_TASK_BYTES = 3 * SHARD_BYTES
"""What a task holds at its peak, where no single chip is larger than a shard."""

LEAST_PROCESS_BYTES = 150 * 10**6
"""What a worker holds before its first task, at least: Python, Dask, NumPy, Arrow and this package."""

_FULL = 0.8
"""Share of its memory limit at which a Dask worker begins no further task (``distributed.worker.memory.pause``)."""

_STEP = 256 * 2**20

CGROUPS = Path("/sys/fs/cgroup")
GROUPS_HERE = Path("/proc/self/cgroup")


def needed_bytes(threads: int, task: int = MOST_TASK_BYTES, kept: int = MOST_KEPT_BYTES) -> int:
    """Return the bytes that a worker of so many threads holds at its peak.

    Without a plan that says less, 800 MB + threads x 3 x 128 MiB.

    Parameters
    ----------
    threads
        Tasks that it computes at the same time.
    task
        Bytes that a task holds at its peak: ``explain()["peak_task_bytes"]``.
    kept
        Bytes that its process keeps of tiles: ``explain()["kept_bytes"]``.
    """
    return PROCESS_BYTES + kept + threads * task


def limit_bytes(threads: int, task: int = MOST_TASK_BYTES, kept: int = MOST_KEPT_BYTES) -> int:
    """Return the memory limit that a worker is started with, in whole steps of 256 MiB.

    Dask lets a worker begin no further task beyond 80% of its limit, so that is what it needs at its peak.

    Parameters
    ----------
    threads, task, kept
        As in :func:`needed_bytes`.
    """
    return -int(-needed_bytes(threads, task, kept) / _FULL // _STEP) * _STEP


def memory_here() -> int:
    """Return the bytes that this machine has, or that this process's container, or job of a queue, may use."""
    limit = psutil.virtual_memory().total
    for path in _limit_files():
        try:
            limit = min(limit, int(path.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return int(limit)


def _limit_files() -> Iterator[Path]:
    """Yield the files that may hold a limit: of each group above this process, in both versions of cgroups.

    In a container the group is the root that it sees. A job of Slurm sees the whole tree, and is far down in it.
    """
    try:
        lines = GROUPS_HERE.read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    for line in ["0::/", "0:memory:/", *lines]:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        here = root / group.lstrip("/")
        yield from (folder / name for folder in (here, *here.parents) if folder.is_relative_to(root))


@dataclass(frozen=True, slots=True)
class TaskMemory:
    """What the tasks of a job need, compared with the workers of a cluster before the first task is sent."""

    job: Job
    outputs: tuple[Output, ...]
    together: bool
    """Whether the pixels of all sources are in memory at once, as for a stream; a store takes one after the other."""
    beside: int = 0
    """Bytes that a task holds besides: what is made of its pixels."""

    @property
    def least_bytes(self) -> int:
        """Bytes that the task of a full shard holds for sure: its pixels, before any of what else it holds at times."""
        chips = max((min(h.per_shard, h.chips) for h in self.job.hierarchies), default=0)
        sizes = [output.chip_bytes for output in self.outputs]
        return chips * (sum(sizes) if self.together or self.job.pixel_rules else max(sizes, default=0))

    def least_of(self, threads: int, workers: int) -> int:
        """Return the bytes that one of so many workers holds for sure while it computes as many shards as it may."""
        full = sum(h.chips // h.per_shard for h in self.job.hierarchies)
        return LEAST_PROCESS_BYTES + max(1, min(threads, full // workers)) * self.least_bytes

    def most_of(self, threads: int) -> int:
        """Return the bytes that a worker holds at most."""
        return needed_bytes(threads, self.task, self.kept)

    def limit_of(self, threads: int) -> int:
        """Return the memory limit that would do."""
        return limit_bytes(threads, self.task, self.kept)

    @property
    def task(self) -> int:
        """Bytes that a task holds at its peak."""
        return task_bytes(self.job, self.outputs) + self.beside

    @property
    def kept(self) -> int:
        """Bytes that a process keeps of tiles."""
        # chips that are planned by blocks are in no table
        return kept_bytes(self.job) if self.job.chips.num_rows else MOST_KEPT_BYTES

    def check(self, subject: str, workers: Mapping[str, Mapping[str, Any]]) -> str:
        """Return a line about workers that may have too little memory; "" where all have enough, or tell no limit.

        Parameters
        ----------
        subject
            What is to be done.
        workers
            What the scheduler says of each worker: ``nthreads``, and ``memory_limit`` in bytes, 0 or None where there
            is none.

        Raises
        ------
        JobError
            When no worker has as much memory as its tasks hold for sure. What they may need at most does not decide:
            estimates are never refused for.
        """
        sizes = Counter(
            (int(worker.get("memory_limit") or 0), int(worker["nthreads"])) for worker in workers.values()
        )
        small = {
            size: count for size, count in sizes.items() if 0 < size[0] < self.least_of(size[1], len(workers))
        }
        if small and len(small) == len(sizes):
            raise self._refusal(subject, small, len(workers))
        tight = {size: count for size, count in sizes.items() if 0 < size[0] < self.most_of(size[1])}
        if not tight:
            return ""
        threads = max(threads for _, threads in tight)
        return (
            f"{_workers(tight)} may run out of memory: a task needs up to {self._text}, and {self._would_do(threads)} "
            "would do in any case"
        )

    @property
    def _text(self) -> str:
        return nbytes_text(self.task)

    def _would_do(self, threads: int) -> str:
        each = dict.fromkeys((threads, 1))
        return " or ".join(f"{_limit(self.limit_of(n))} for {_threads(n)}" for n in each)

    def _refusal(self, subject: str, small: Mapping[tuple[int, int], int], workers: int) -> JobError:
        threads = max(threads for _, threads in small)
        least = self.least_of(threads, workers)
        limit = _limit(self.limit_of(1))
        return JobError(
            subject,
            f"{_workers(small)}, where a task holds at least {nbytes_text(self.least_bytes)} and up to {self._text}: "
            f"{nbytes_text(least)} in a worker at least",
            f"workers with a memory limit of {self._would_do(threads)}",
            f"Start such workers (dask worker --nthreads 1 --memory-limit {limit}, or rd.cluster(..., chips=chips), "
            "which sizes them), or make chips smaller. No shard was begun.",
        )  # fmt: skip


def _workers(sizes: Mapping[tuple[int, int], int]) -> str:
    """Return ``2 workers of 512MiB for 4 threads``."""
    return ", ".join(
        f"{count} worker{'s'[: count != 1]} of {_limit(memory)} for {_threads(threads)}"
        for (memory, threads), count in sorted(sizes.items())
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s'[: count != 1]}"


def _limit(nbytes: int) -> str:
    """Return a memory limit as Dask's command line takes it."""
    return f"{nbytes / 2**30:.6g}GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.6g}MiB"
