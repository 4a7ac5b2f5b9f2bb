# SPDX-License-Identifier: Apache-2.0
"""A run of neighbouring shards, and what is done to each: what a task is made of, whoever computes it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasteret_dask.activity import NOTHING, Tally
from rasteret_dask.tasks.runs import Cuts
from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = ["Run", "ShardNews", "Shards", "Work"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring shards, which one task computes one after another."""

    key: str
    """Of its task."""
    names: tuple[str, ...]
    """Of its shards."""
    items: tuple[Any, ...]
    """What :attr:`Work.compute` is called with, one a shard."""
    places: tuple[int, ...]
    """Among all shards of the job, in running order."""
    whole: bool
    """Whether one process computes all shards of the job."""


@dataclass(frozen=True)
class Work:
    """What is done to each shard of a job."""

    compute: Callable[..., None]
    """``compute(item, *roots)``. It does nothing where the shard is written: Dask may call it again."""
    job: str
    """The job's digest."""
    roots: Mapping[str, Any]
    """Key -> a value that all tasks need, sent once: a user's function."""
    memory: TaskMemory | None = None
    """What its tasks need; None: so little that no cluster is asked."""
    resource: str | None = None
    """The Dask resource that workers must declare; None: any worker computes it."""


@dataclass(frozen=True, slots=True)
class ShardNews:
    """A shard that has ended."""

    name: str
    error: BaseException | None
    """What computing it ended with; None: it is written."""
    may_pass: bool = False
    """Whether it is worth another try."""
    killed: bool = False
    """Whether its worker was lost each time: because of it, or of another shard that the worker computed beside it."""
    tally: Tally = NOTHING
    """What was read and written for it, where somebody watches."""


@dataclass(frozen=True)
class Shards:
    """Shards that are to be written, in running order, and how."""

    work: Work
    names: Sequence[str]
    """Of the shards that are to be written."""
    items: Sequence[Any]
    """What ``work`` is called with, one a shard."""
    contents: Sequence[str]
    """A digest a shard, of what it will hold: part of its task's key."""
    places: Sequence[int]
    """Among all shards of the job, in running order."""
    cuts: Cuts
    tail: str
    """What the keys of the tasks end in: where, and how, they write."""
    verb: str = "write"
    """What the keys begin with."""
    chips: Sequence[int] = ()
    """How many chips each has; none: nobody counts them."""

    def run(self, at: Sequence[int], whole: bool, mark: str = "") -> Run:
        """Return the run of some of the shards."""
        names, contents = [self.names[n] for n in at], "".join(self.contents[n] for n in at)
        content = contents[:16] if len(at) == 1 else hashlib.sha256(contents.encode()).hexdigest()[:16]
        key = f"{self.verb}-{names[0]}-{content}-{self.tail}{mark}"
        return Run(
            key, tuple(names), tuple(self.items[n] for n in at), tuple(self.places[n] for n in at), whole
        )
