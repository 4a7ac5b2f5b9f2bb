"""A process that reads takes the bodies of requests from memory that stays with it, unless it is told not to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rasteret_dask.net.allocator import settings

glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another allocator")

BODIES = """
import resource
from concurrent.futures import ThreadPoolExecutor
from rasteret_dask.reader.engine import Session

def fetch(number):
    held = []
    for i in range(60):
        held.append(b"x" * (400_000 + 40_000 * ((7 * i + number) % 13)))
        del held[:-4]

with Session(), ThreadPoolExecutor(4) as threads:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(threads.map(fetch, range(8)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Four threads that hold four bodies of requests each while a session reads, and drop the oldest: page faults."""


def faults(**environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", BODIES], env=plain | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@glibc
def test_reading_touches_less_new_memory_unless_switched_off() -> None:
    assert 2 * faults() < faults(DASK_RASTERET_DASK__MALLOC="false")


@glibc
def test_what_the_environment_settles_stays() -> None:
    every = settings({})
    assert set(every) == {-1, -3, -8}
    for name, parameter in (
        ("MALLOC_TRIM_THRESHOLD_", -1),
        ("MALLOC_MMAP_THRESHOLD_", -3),
        ("MALLOC_ARENA_MAX", -8),
    ):
        left = {key: value for key, value in every.items() if key != parameter}
        assert settings({name: "65536"}) == left
    assert set(settings({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"})) == {-1, -3}
