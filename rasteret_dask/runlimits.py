# SPDX-License-Identifier: Apache-2.0
"""What bounds one run of a job: which part of the shards it writes, and how long it may take."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

from dask.utils import parse_timedelta

from rasteret_dask.errors import PlanError

__all__ = ["NO_LIMITS", "RunLimits"]

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
"""As Slurm writes a time: ``1-12:00:00``."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What one run of ``to_zarr`` does of a job: for array jobs, queues with a time limit, and whoever watches it.

    Parameters
    ----------
    part
        ``(k, n)``: the k-th of n parts of the shards, counted from 1. Each part is a process of its own, without a
        cluster between them: all call ``to_zarr`` with the same chips and store. Whoever ends last commits the store.
        None: all shards.
    max_time
        Seconds, or a text such as ``"2h"``, ``"90min"`` or ``"1-12:00:00"``, counted from the moment when this value
        is made. No shard is begun that would not end in time if it took as long as the slowest one so far. None: no
        limit.
    heartbeat
        A local file that is renewed every 30 s, and after each shard, while the run is alive. JSON: ``time`` (seconds
        since 1970), ``done`` and ``total`` (shards; null while they are planned). None: no file.

    Raises
    ------
    PlanError
        When ``part`` is no pair of whole numbers with 1 <= k <= n, ``max_time`` is no time above 0, or ``heartbeat``
        lies in no folder.

    Examples
    --------
    >>> rd.RunLimits(part=(3, 20), max_time="2h").max_time
    7200.0
    >>> rd.RunLimits(part=(0, 20))
    Traceback (most recent call last):
    ...
    rasteret_dask.errors.PlanError: RunLimits(part=): found (0, 20); expected (k, n), 1 <= k <= n, such as ...
    """

    part: tuple[int, int] | None = None
    """Which part of the shards, of how many; counted from 1."""
    max_time: float | str | None = None
    """Seconds, once it is checked."""
    heartbeat: str | os.PathLike[str] | None = None
    """Path of a local file."""
    ends: float | None = field(init=False, repr=False, compare=False, default=None)
    """When the time is over, by ``time.monotonic``."""

    def __post_init__(self) -> None:
        if self.part is not None:
            object.__setattr__(self, "part", _part(self.part))
        if self.max_time is not None:
            seconds = _seconds(self.max_time)
            object.__setattr__(self, "max_time", seconds)
            object.__setattr__(self, "ends", time.monotonic() + seconds)
        if self.heartbeat is not None:
            object.__setattr__(self, "heartbeat", _file(self.heartbeat))

    def __bool__(self) -> bool:
        """Whether anything is bounded."""
        return self != NO_LIMITS

    @property
    def name(self) -> str:
        """What messages call the part: ``part 3/20``; empty where it is all.

        Examples
        --------
        >>> rd.RunLimits(part=(3, 20)).name
        'part 3/20'
        """
        return "" if self.part is None else f"part {self.part[0]}/{self.part[1]}"

    def check_computed(self, compute: bool) -> None:
        """Raise PlanError where nobody would keep to the limits, as Dask computes the job when it is asked to.

        Examples
        --------
        >>> rd.RunLimits().check_computed(False)  # no limits: PlanError where there are some
        """
        if self and not compute:
            raise PlanError(
                "to_zarr(compute=False, limits=)", "limits of a run", "no limits",
                "Leave compute out: then this call runs the job, within its limits.",
            )  # fmt: skip


NO_LIMITS = RunLimits()


def _part(value: Any) -> tuple[int, int]:
    whole = isinstance(value, tuple | list) and len(value) == 2 and all(type(n) is int for n in value)
    if not whole or not 1 <= value[0] <= value[1]:
        raise PlanError(
            "RunLimits(part=)", repr(value), "(k, n), 1 <= k <= n, such as (3, 20)",
            "Parts are counted from 1: of an array job that counts from 0, add 1.",
        )  # fmt: skip
    return int(value[0]), int(value[1])


def _seconds(value: Any) -> float:
    seconds = None
    if isinstance(value, str) and (parts := _CLOCK.fullmatch(value.strip())):
        days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
        seconds = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        text = re.sub(r"mins?\s*$", "minutes", str(value))
        try:
            seconds = float(parse_timedelta(text, default="s"))
        except (ValueError, KeyError, IndexError):
            seconds = None
    if seconds is None or not 0 < seconds < float("inf"):
        raise PlanError(
            "RunLimits(max_time=)", repr(value), "seconds, or a text such as '2h', '90min' or '1:30:00'",
            "Give it a little less than the queue's limit: shards under way end first, then the store is committed.",
        )  # fmt: skip
    return seconds


def _file(value: Any) -> str:
    path = os.path.abspath(os.fspath(value)) if isinstance(value, str | os.PathLike) else ""
    if not path or "://" in str(value) or os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
        raise PlanError(
            "RunLimits(heartbeat=)", repr(value), "the path of a file, in a local folder that is there",
            "Make the folder first.",
        )  # fmt: skip
    return path
