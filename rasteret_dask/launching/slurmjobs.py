# SPDX-License-Identifier: Apache-2.0
"""Jobs of Slurm that are Dask workers: replaced when they end, and asked for what they wait for."""

from __future__ import annotations

import logging
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from distributed.deploy import adaptive, spec

from rasteret_dask.errors import JobError
from rasteret_dask.extras import needs

with needs("slurm", "a cluster of Slurm jobs"):
    from dask_jobqueue import slurm

__all__ = ["SlurmJobs"]

REFUSED_S = 60.0
"""Seconds after a refusal in which no further job is submitted."""

ASK_S = 30.0
"""Seconds that Slurm's controller has to answer a question."""

LOOK = "5s"
"""Between two looks at how many jobs there shall be: each submission is a process, and a request to the controller."""

LOG_LINES = 5

# none of these has types
ClusterBase: Any = slurm.SLURMCluster
JobBase: Any = slurm.SLURMJob
ProcessBase: Any = spec.ProcessInterface
AdaptiveBase: Any = adaptive.Adaptive

_log = logging.getLogger(__name__)


class WorkerJob(JobBase):  # type: ignore[misc]
    """One job: one worker."""

    def __init__(self, *args: Any, cluster: SlurmJobs | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._jobs = cluster

    @property
    def worker_process_memory(self) -> str:
        """The worker's limit, exactly: jobqueue's own has two decimals of a GiB, which may be less."""
        return str(self.worker_memory)

    async def start(self) -> None:
        """Submit the job; a refusal is noted by the cluster."""
        try:
            await super().start()
            if self._jobs is not None:
                self._jobs.submitted(str(self.name))
        except (RuntimeError, ValueError, OSError) as error:  # sbatch failed, said something else, or is gone
            await ProcessBase.start(self)
            if self._jobs is not None:
                self._jobs.refuse(str(self.name), _reason(error))

    async def close(self) -> None:
        """Cancel the job, and be closed."""
        await super().close()
        await ProcessBase.close(self)


class PatientAdaptive(AdaptiveBase):  # type: ignore[misc]
    """Asks for no more jobs for a while after one was refused, and for none where there was nothing to do for long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rests = False
        super().__init__(*args, **kwargs)

    async def safe_target(self) -> int:
        """Return how many workers there shall be: none from the idle time-out on, until there is a task."""
        scheduler = self.cluster.scheduler
        since = scheduler.check_idle()
        if since is None:
            self._rests = False
        elif (
            scheduler.workers and time.time() - since > self.cluster.idle_s
        ):  # jobs that wait in the queue are no rest
            self._rests = True
        return 0 if self._rests else int(await super().safe_target())

    async def scale_up(self, n: int) -> None:
        """Have n workers."""
        self.cluster.grow(n)

    async def recommendations(self, target: int) -> dict[str, Any]:
        """Return what to do so that there are as many workers as the target says."""
        advice: dict[str, Any] = await super().recommendations(target)  # waits for submissions under way
        return {"status": "same"} if advice["status"] == "up" and self.cluster.refused_lately else advice


class SlurmJobs(ClusterBase):  # type: ignore[misc]
    """A scheduler in this process, and jobs as its workers. A job that ends while it is needed is submitted again."""

    job_cls = WorkerJob

    def __init__(self, *, idle_s: float = float("inf"), **kwargs: Any) -> None:
        self.idle_s = idle_s
        """Seconds without tasks after which its jobs are cancelled; they are submitted again when there are some."""
        self._refusal = ""
        self._refused_at = float("-inf")
        self._arrived: set[str] = set()  # names of workers whose latest job has become one
        super().__init__(**kwargs, cluster=self)

    @property
    def refused_lately(self) -> bool:
        """Whether a job was refused not long ago."""
        return time.monotonic() - self._refused_at < REFUSED_S

    def submit_first(self) -> None:
        """Submit one job, and wait until Slurm has taken it.

        Raises
        ------
        JobError
            With what sbatch says, when it refuses the job.
        """
        self.worker_spec.update(self.new_worker_spec())
        self.sync(self._correct_state)
        if self._refusal:
            raise JobError(
                f"cluster {self.name}: sbatch", f"a refusal: {self._refusal}", "a job that Slurm takes",
                "Change the options: queue, account, walltime, job_extra_directives, or the workers' size. The job:\n"
                + self.job_header,
            )  # fmt: skip

    def refuse(self, name: str, reason: str) -> None:
        """Note that a job was refused; it is no longer expected."""
        self._refusal, self._refused_at = reason, time.monotonic()
        _log.warning("cluster %s: sbatch refuses a further job: %s", self.name, reason)
        self.worker_spec.pop(name, None)

    def submitted(self, name: str) -> None:
        """Note that Slurm has taken a job."""
        self._arrived.discard(name)

    async def _close(self) -> None:
        await super()._close()
        for key in (
            "ca_file",
            "cert",
            "key",
        ):  # jobqueue leaves these temporary files to the garbage collector
            if (file := getattr(self, f"_job_{key}", None)) is not None:
                file.close()

    def scale(self, n: int | None = None, jobs: int = 0, **kwargs: Any) -> Any:
        """Have so many workers; those that end, as at their time limit, are replaced."""
        count = jobs if n is None else n
        if self._adaptive is not None:
            self._adaptive.stop()
        if count and not kwargs:
            self.adapt(minimum=count, maximum=count)
        return super().scale(n, jobs, **kwargs)

    def grow(self, n: int) -> None:
        """Submit jobs until there are n workers; how many there shall be later stays as it is."""
        super().scale(n)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """Have as many workers as there is work for."""
        return super().adapt(*args, **({"Adaptive": PatientAdaptive, "interval": LOOK} | kwargs))

    def waiting_for(self) -> str:
        """Return what Slurm says of the jobs that are no workers yet; "" where there are none.

        Raises
        ------
        JobError
            When no job waits or runs, and those that were there ended before they became workers.
        """
        expected = {
            str(job.job_id): name
            for name, job in list(self.workers.items())
            if job.job_id and name not in self._arrived
        }
        states = self._states() if expected else {}
        if states is None:
            return "squeue does not answer"
        counts = Counter(
            f"PENDING ({reason})" if state == "PENDING" else state
            for number, (state, reason) in states.items()
            if number in expected
        )
        parts = [f"{count} job{'s' * (count > 1)} {state}" for state, count in sorted(counts.items())]
        ended = [number for number in expected if number not in states]
        if ended and not states:
            raise JobError(
                f"cluster {self.name}",
                f"no worker, as {_jobs(ended)} ended without becoming one. {self._log_of(ended[-1])}", "jobs that run",
                "Mend what the log names, then run this again. Nodes need this environment (options python, "
                "job_script_prologue) and a way to this host (option interface).",
            )  # fmt: skip
        if ended:
            parts.append(f"{_jobs(ended)} ended without becoming a worker. {self._log_of(ended[-1])}")
        if self.refused_lately:
            parts.append(f"sbatch refuses a further job: {self._refusal}")
        return "; ".join(parts)

    def _states(self) -> dict[str, tuple[str, str]] | None:
        """Return what squeue says of this cluster's jobs that wait or run; None where it does not answer."""
        command = ["squeue", "--noheader", f"--name={self.name}", "--format=%i|%T|%r"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        lines = (line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 2)
        return {number: (state, reason) for number, state, reason in lines}

    def _log_of(self, number: str) -> str:
        """Return the end of what a job has printed on its second stream."""
        folder = Path(self._dummy_job.log_directory)
        log = next(folder.glob(f"*-{number}.err"), folder / f"{self.job_name}-{number}.err")
        try:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        except FileNotFoundError:
            return f"There is no {log}"
        return f"{log} ends:\n" + "\n".join(lines[-LOG_LINES:]) + "\n" if lines else f"{log} is empty"

    def _update_worker_status(self, op: str, msg: Any) -> None:
        if op == "add":
            self._arrived |= {str(worker["name"]) for worker in msg["workers"].values()}
        super()._update_worker_status(op, msg)


def _jobs(numbers: list[str]) -> str:
    named = ", ".join(numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"job{'s' * (len(numbers) > 1)} {named}"


def _reason(error: Exception) -> str:
    """Return what sbatch has printed: jobqueue's error has it between other lines."""
    _, marker, stderr = str(error).partition("stderr:\n")
    return " ".join((stderr if marker else str(error)).split())
