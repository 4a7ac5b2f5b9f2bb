"""One contender on one job in a fresh process, by this checkout's code or another's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contender import Contender, Settings
from jobs import AnyJob, ReadmeJob
from nginx import Nginx

HERE = Path(__file__).resolve().parent
THIS = HERE.parents[1]
"""The checkout that this file belongs to."""


@dataclass(frozen=True)
class Process:
    """Where contenders run."""

    server: Nginx
    scratch: Path
    pythons: Mapping[str, Path] = field(default_factory=dict)
    """Name of an environment -> its interpreter."""

    def run(
        self, contender: Contender, job: AnyJob, settings: Settings, checkout: Path = THIS
    ) -> dict[str, Any]:
        """Run it once; return what ``contender.measure`` returns, with ``requests``, ``nbytes``, ``distinct`` and
        ``errors`` served.

        A first store is kept as the job's layout, for others to write the same.
        """
        if job.store:
            shutil.rmtree(job.store, ignore_errors=True)
        path = job.write(self.scratch / "job.json")
        python = str(self.pythons[contender.environment]) if contender.environment else sys.executable
        options = [
            part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
        ]
        self.server.reset()
        start = time.perf_counter()
        output, usage = started(checkout, python, "contender.py", contender.name, str(path), *options)
        wall = time.perf_counter() - start
        served = self.server.served()
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        if found["package"] and not Path(found["package"]).resolve().is_relative_to(checkout):
            raise SystemExit(f"{found['package']} was measured, not {checkout}")
        if isinstance(job, ReadmeJob) and job.fresh:
            digest, _ = started(checkout, sys.executable, "readme_digest.py", str(path))
            found |= usage | {"wall": wall, "digest": digest.strip()}
        found |= {"requests": served.requests, "nbytes": served.nbytes, "errors": served.errors}
        found["distinct"] = served.distinct
        print(
            f"  {contender.name} {settings or ''}: {found['wall']:.2f} s, {found['cpu']:.2f} s CPU",
            file=sys.stderr,
        )
        if job.layout and not Path(job.layout).exists():
            shutil.copytree(job.store, job.layout)
        return found


def build_tables(job: AnyJob, scratch: Path, checkout: Path = THIS) -> None:
    """Build the record tables that a job names, by a checkout's own code."""
    started(checkout, sys.executable, "build_tables.py", str(job.write(scratch / "job.json")))


def started(checkout: Path, python: str, script: str, *arguments: str) -> tuple[str, dict[str, float]]:
    """Run a script of a checkout's benchmarks.

    Returns
    -------
    tuple
        What it printed, and what the whole process took: ``cpu`` in seconds, ``peak_mb`` and ``faults``.
    """
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(
            [python, str(checkout / "tests" / "benchmarks" / script), *arguments],
            stdout=printed,
            stderr=complained,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        complained.seek(0)
        if process.returncode:
            raise SystemExit(f"{script} {' '.join(arguments)} of {checkout} failed:\n{complained.read()}")
        usage = {
            "cpu": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss * 1024 / 1e6,
            "faults": used.ru_minflt,
        }  # fmt: skip
        return printed.read(), usage


def apart(one: Path, other: Path) -> float:
    """Return the largest difference between two files of pixels; infinite where not the same pixels are NaN."""
    largest = 0.0
    for a, b in zip(np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r"), strict=True):
        if a.dtype.kind == "f" and not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("inf")
        largest = max(largest, float(np.nanmax(np.abs(a.astype(np.float64) - b), initial=0.0)))
    return largest
