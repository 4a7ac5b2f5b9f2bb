"""What a process has used so far."""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """CPU and memory of one process."""

    cpu_s: float
    """Children that ended included."""
    peak_mb: float
    faults: int
    """Pages of memory touched for the first time, children included."""


def usage() -> Usage:
    """Return what this process has used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt + children.ru_minflt
    return Usage(time.process_time() + children.ru_utime + children.ru_stime, _peak_mb(), faults)


def forget_peak() -> None:
    """Let the peak of this process's memory be counted from here on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
