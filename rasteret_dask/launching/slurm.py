# SPDX-License-Identifier: Apache-2.0
"""A cluster whose workers are jobs of Slurm, and whose scheduler runs in this process."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import dask.config
from dask.utils import parse_timedelta

from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.extras import needs
from rasteret_dask.launching.request import ClusterRequest

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import HasScheduler

__all__ = ["OPTIONS", "most_workers", "started"]

OPTIONS: Mapping[str, str] = MappingProxyType({
    "queue": "the partition (sbatch -p)",
    "account": "who pays (sbatch -A)",
    "walltime": "time limit of each job, such as '2h' or '1-12:00:00'; a worker ends before, another job takes over",
    "python": "the workers' Python; by default the one of this process",
    "interface": "the network of scheduler and workers, such as 'ib0'",
    "local_directory": "where workers spill to: a disk of the node, such as '$TMPDIR'",
    "log_directory": "a folder that all nodes see, for what jobs print; by default slurm-logs",
    "job_extra_directives": "a list of further options of sbatch, such as '--constraint=fast'",
    "job_directives_skip": "a list of texts: lines of the job's header that hold one are left out, such as '--mem'",
    "job_script_prologue": "a list of commands before the worker begins, such as 'module load python'",
    "security": "true: encrypted connections that only this cluster's workers and client open (the default)",
    "scheduler_options": "a mapping for the Dask scheduler, such as {'interface': 'eth0'}",
})  # fmt: skip
"""What only this kind takes -> what it is. What is left out comes from ``jobqueue.slurm`` in Dask's configuration."""

COMMANDS = ("sbatch", "squeue", "scancel")

LOGS = "slurm-logs"

LEAST_WALLTIME_S = 300.0

JOB_ROOM_BYTES = 512 * 2**20
"""What a job's memory has beyond its worker's limit: the nanny, and pages of files."""

_TEXTS = ("queue", "account", "python", "interface", "local_directory", "log_directory")
_LISTS = ("job_extra_directives", "job_directives_skip", "job_script_prologue")


def most_workers(threads: int, memory: int) -> int:
    """Return how many workers there may be: the queue decides."""
    return sys.maxsize


@contextmanager
def started(request: ClusterRequest) -> Iterator[HasScheduler]:
    """Start a scheduler in this process and submit the first job; all jobs are cancelled when the block ends.

    The first job is submitted here, so that a refusal of Slurm is an error of this call.

    Raises
    ------
    PlanError
        When an option has a value that no cluster can take.
    JobError
        When Slurm's commands are not on the PATH, or sbatch refuses the job.
    MissingExtraError
        When dask-jobqueue is not installed.
    """
    _check_options(request.options)
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        raise JobError(
            f"cluster {request.name}", f"no {missing[0]} on the PATH", "Slurm's commands",
            "Run this where jobs are submitted, such as a login node; module load slurm may be needed. "
            "Elsewhere give rd.cluster another place: 'local' or a scheduler's address.",
        )  # fmt: skip
    with needs("slurm", "a cluster of Slurm jobs"):
        import dask_jobqueue  # noqa: F401 - its defaults become part of Dask's configuration
    from rasteret_dask.launching.slurmjobs import SlurmJobs

    logs = os.path.abspath(request.options.get("log_directory") or _configured("log-directory") or LOGS)
    os.makedirs(logs, exist_ok=True)
    with SlurmJobs(**_arguments(request, logs)) as cluster:
        cluster.submit_first()
        yield cluster


def _arguments(request: ClusterRequest, logs: str) -> dict[str, Any]:
    options = dict(request.options)
    walltime = Walltime.of(options.pop("walltime", None) or _configured("walltime"))
    life_s, stagger_s = walltime.life(request.size.lifetime)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in request.environment.items()]
    prologue = options.pop("job_script_prologue", None) or _configured("job-script-prologue") or []
    scheduler = {
        "dashboard_address": ":0",
        **(options.pop("scheduler_options", None) or _configured("scheduler-options")),
    }
    return options | {
        "name": request.name,
        "job_name": request.name,
        "cores": request.size.threads,
        "processes": 1,
        "memory": request.memory_bytes,
        "job_mem": f"{-(-(request.memory_bytes + JOB_ROOM_BYTES) // 2**20)}M",
        "walltime": walltime.text,
        "death_timeout": round(request.death_timeout_s),
        "log_directory": logs,
        "shared_temp_directory": logs,
        "security": options.get("security", True) or None,
        "job_script_prologue": [*exports, *prologue],
        "worker_extra_args": ["--lifetime", f"{life_s:.0f}s", "--lifetime-stagger", f"{stagger_s:.0f}s"],
        "scheduler_options": scheduler | {"allowed_failures": request.allowed_failures},
        "idle_s": request.idle_timeout_s,
    }  # fmt: skip


def _configured(name: str) -> Any:
    return dask.config.get(f"jobqueue.slurm.{name}", None)


@dataclass(frozen=True, slots=True)
class Walltime:
    """The time limit of a job."""

    seconds: float

    @classmethod
    def of(cls, value: Any) -> Walltime:
        """Read a time: as Slurm writes it where there is a ``:`` or a ``-``, else with a unit (``2h``, ``90min``)."""
        seconds = _seconds(value) if isinstance(value, str) else None
        if seconds is None or seconds < LEAST_WALLTIME_S:
            raise PlanError(
                "cluster option walltime", repr(value), "at least 5 minutes, such as '2h', '90min' or '1-12:00:00'",
                "A number alone is ambiguous: Slurm takes it for minutes, Dask for seconds.",
            )  # fmt: skip
        return cls(seconds)

    @property
    def text(self) -> str:
        """As Slurm takes it."""
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"

    def life(self, lifetime: Any = None) -> tuple[float, float]:
        """Return after how many seconds a worker ends by itself, and by how many more or less, by chance.

        It ends before Slurm kills it, with time to hand over what it holds, and not all workers end together.
        """
        twentieth = self.seconds / 20
        latest = self.seconds - max(60.0, min(twentieth, 600.0))
        stagger = min(twentieth, 600.0)
        if lifetime is None:
            return latest - stagger, stagger
        if lifetime > latest:
            raise PlanError(
                "WorkerSize(lifetime=)", f"{lifetime:.0f} s", f"at most {latest:.0f} s",
                f"A job ends after {self.text}; leave lifetime out, or raise the option walltime.",
            )  # fmt: skip
        return lifetime, min(stagger, latest - lifetime)


_SLURM_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?"
    r"|(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+))"
)


def _seconds(text: str) -> float | None:
    if match := _SLURM_TIME.fullmatch(text.strip()):
        part = {name: int(value or 0) for name, value in match.groupdict().items()}
        hours = part["days"] * 24 + part["hours"] + part["h"]
        return float((hours * 60 + part["minutes"] + part["m"]) * 60 + part["seconds"] + part["s"])
    if re.fullmatch(r"[\d.\s]*", text):
        return None
    try:
        return float(parse_timedelta(re.sub(r"mins?\s*$", "minutes", text)))
    except (ValueError, KeyError, IndexError):
        return None


def _check_options(options: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        value = options.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip() or "\n" in value):
            raise PlanError(f"cluster option {name}", repr(value), "a text of one line")
    for name in _LISTS:
        value = options.get(name)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise PlanError(f"cluster option {name}", repr(value), "a list of texts")
    for text in options.get("job_extra_directives") or ():
        if not text.startswith("-"):
            raise PlanError(
                "cluster option job_extra_directives", repr(text), "options of sbatch, such as '--constraint=fast'",
                "Leave out #SBATCH: it is put before each.",
            )  # fmt: skip
    if not isinstance(options.get("security", True), bool):
        raise PlanError("cluster option security", repr(options["security"]), "true or false")
    if not isinstance(options.get("scheduler_options", {}), Mapping):
        raise PlanError("cluster option scheduler_options", repr(options["scheduler_options"]), "a mapping")
