# SPDX-License-Identifier: Apache-2.0
"""Freed blocks stay with the process for the next ones: settings of glibc's allocator, where nobody has made any."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache

import dask.config
from dask.system import CPU_COUNT

__all__ = ["settings", "settle"]

MMAP_THRESHOLD = 32 * 2**20
"""The most that glibc takes. By default a body of 1 MB is a mapping of its own: 256 page faults each time."""

TRIM_THRESHOLD = 64 * 2**20
"""Freed bytes that each arena keeps at its end, at most."""

_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_ARENA_MAX": -8}
"""Environment variable -> number of the parameter in ``malloc.h``."""

_TUNABLES = {
    "MALLOC_TRIM_THRESHOLD_": "glibc.malloc.trim_threshold",
    "MALLOC_MMAP_THRESHOLD_": "glibc.malloc.mmap_threshold",
    "MALLOC_ARENA_MAX": "glibc.malloc.arena_max",
}


def settings(environment: Mapping[str, str]) -> dict[int, int]:
    """Return what to tell ``mallopt``: parameter -> value, without those that the environment settles.

    An arena a core: the default of eight a core spreads the bodies of 32 requests over as many heaps.
    """
    values = {
        "MALLOC_TRIM_THRESHOLD_": TRIM_THRESHOLD,
        "MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD,
        "MALLOC_ARENA_MAX": max(2, CPU_COUNT),
    }
    tunables = environment.get("GLIBC_TUNABLES", "")
    return {
        _MALLOPT[name]: value
        for name, value in values.items()
        if name not in environment and _TUNABLES[name] not in tunables
    }


@cache
def settle() -> None:
    """Settle the allocator of this process, once: on glibc, unless ``rasteret_dask.malloc`` is False.

    It holds for all of the process, so at most TRIM_THRESHOLD an arena stays that would have gone back; peaks do not
    grow. Calls for more than MMAP_THRESHOLD, such as a shard's pixels, go back at once as before.
    """
    if not dask.config.get("rasteret_dask.malloc", True) or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in settings(os.environ).items():
            mallopt(parameter, value)
