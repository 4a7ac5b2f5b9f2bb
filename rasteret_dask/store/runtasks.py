"""A run of neighbouring shards, and what is done to each: what a task is made of, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Run", "ShardNews", "Work"]


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
