# SPDX-License-Identifier: Apache-2.0
"""How long a job may take: from a few of its tiles, from a job that is finished, or from a rate that is stated."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

from dask.system import CPU_COUNT

from rasteret_dask.errors import PlanError
from rasteret_dask.progress import nbytes_text, seconds_text
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.pixelgrid import Window
from rasteret_dask.reader.readplan import Request
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.runs import TILES_SHARE, Workforce

__all__ = [
    "PROBES",
    "Amounts",
    "Estimate",
    "Finished",
    "Measured",
    "Speed",
    "enlarged",
    "estimated",
    "probed",
    "rate_of",
]

PROBES = 12
"""Tiles that a probe reads, at most; a kernel at a tile's edge may need its neighbours."""

ALONE = 2
"""Tiles that are read one by one, to see how long an answer takes; the others are read together."""

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)B/s\s*")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, slots=True)
class Measured:
    """What reading a few tiles took."""

    tiles: int
    requests: int
    """Of ranges; 0 where GDAL reads the files, which counts none."""
    nbytes: int
    """Fetched."""
    latency_s: float
    """Until one tile alone was there, at best."""
    tiles_per_s: float
    """Of those read together."""
    bytes_per_s: float
    """The same in fetched bytes."""
    cpu_s_per_tile: float
    """CPU of this process: mostly for decoding."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished job took of a thread: reading goes by bytes, all else (masks, functions, writing) by chips."""

    shards: int
    chips: int
    read_s: float
    """For a byte that is fetched, and with ``by_bytes`` False for a chip."""
    other_s: float
    """For a chip."""
    by_bytes: bool
    """Whether bytes were counted; GDAL counts none."""


Speed: TypeAlias = Measured | Finished | float
"""What was measured here, what a finished job took, or the bytes that each process fetches in a second."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a job does, by all its processes together."""

    chips: int
    tiles: int
    nbytes: int | None
    """To fetch; None where headers do not tell."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a job may take."""

    seconds: float
    """By the clock."""
    fetch_s: float
    """What fetching alone takes all processes together."""
    decode_s: float | None
    """What decoding alone takes them; None where nothing was measured."""
    processes: int
    threads: int
    basis: str
    """What it is made from, in words."""

    def line(self) -> str:
        """Return it as a line for people."""
        duration = f"about {seconds_text(self.seconds)}" if self.seconds >= 1 else "less than a second"
        return f"{duration} for {self.processes} process{'es' * (self.processes > 1)}; {self.basis}"


def rate_of(rate: str | float | JobReport) -> Finished | float:
    """Return bytes a second of ``"50 MB/s"`` or a number; what shards took where it is a report.

    Raises
    ------
    PlanError
        When it is none of these, or the report of an earlier version's store, which has no times.
    """
    if isinstance(rate, JobReport):
        return _finished(rate)
    if isinstance(rate, str):
        match = _RATE.fullmatch(rate)
        value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    else:
        value = 0.0 if isinstance(rate, bool) or not isinstance(rate, int | float) else float(rate)
    if not 0 < value < float("inf"):
        raise PlanError(
            "explain(rate=)", f"{rate!r:.100}", "what one worker process fetches in a second, such as '50 MB/s'",
            "Or the report of a finished job of the same kind: rd.job_report(store).",
        )  # fmt: skip
    return value


def _finished(report: JobReport) -> Finished:
    if not report.stages or not report.chips:
        raise PlanError(
            "explain(rate=)", f"the report of {report.store}, which holds no times", "one that does",
            "Write a sample with this version: explain(rate=chips.sample(100).to_zarr(path)).",
        )  # fmt: skip
    seconds = sum(value or 0.0 for value in report.table["seconds"].to_pylist())
    reading = min(sum(s for stage, s in report.stages.items() if stage.startswith("read/")), seconds)
    by_bytes = report.bytes_fetched > 0
    return Finished(
        report.table.num_rows,
        report.chips,
        reading / (report.bytes_fetched if by_bytes else report.chips),
        (seconds - reading) / report.chips,
        by_bytes,
    )


def probed(job: Job) -> Measured:
    """Read a few tiles of a job, evenly taken, and measure that.

    Raises
    ------
    ReadError
        When one of them cannot be read.
    """
    job.check_signatures()
    requests = _chosen(job)
    with Session() as session:
        alone = [_timed(session, [request]) for request in requests[:ALONE]]
        first, cpu = session.counts.bytes_fetched, time.process_time()
        seconds = _timed(session, requests[ALONE:]) if requests[ALONE:] else sum(alone)
        together = len(requests) - ALONE if requests[ALONE:] else len(requests)
        return Measured(
            tiles=len(requests),
            requests=session.counts.requests,
            nbytes=session.counts.bytes_fetched,
            latency_s=min(alone),
            tiles_per_s=together / seconds,
            bytes_per_s=(session.counts.bytes_fetched - (first if requests[ALONE:] else 0)) / seconds,
            cpu_s_per_tile=(time.process_time() - cpu) / together,
        )


def _timed(session: Session, requests: Sequence[Request]) -> float:
    begun = time.perf_counter()
    session.read_block(requests)
    return max(time.perf_counter() - begun, 1e-6)


def _chosen(job: Job) -> list[Request]:
    """Return reads of a pixel each: of shards, sources and files evenly taken, each file's turn before a second."""
    shards = min(job.shard_count, PROBES)
    per_shard: list[list[Request]] = []
    for n in range(shards):
        shard = job.nth_shard(n * job.shard_count // shards)
        found = [r for source in range(len(job.sources)) for r in pixels.requests_of(job, shard, source)[0]]
        step = max(len(found) // PROBES, 1)
        per_shard.append([_pixel(request) for request in found[::step]])
    chosen: list[Request] = []
    for turn in range(PROBES):
        for own in per_shard:
            if turn < len(own) and len(chosen) < PROBES:
                chosen.append(own[turn])
    return chosen


def _pixel(request: Request) -> Request:
    """Return a read of the pixel in the middle of a read's first window."""
    first = request.windows[0]
    middle = Window(first.row + first.height // 2, first.col + first.width // 2, 1, 1)
    return replace(request, windows=(middle,))


def estimated(amounts: Amounts, force: Workforce | None, speed: Speed) -> dict[str, Any]:
    """Return an estimate as plain values, with what it is made from.

    Parameters
    ----------
    amounts
        What the job does.
    force
        The processes; None: this one.
    speed
        How fast they are.

    Raises
    ------
    PlanError
        When a rate is stated, and nobody knows how many bytes there are.
    """
    force = Workforce(1, CPU_COUNT) if force is None else force
    if isinstance(speed, Measured):
        made = _by_probe(amounts, force, speed)
        return asdict(made) | {"line": made.line(), "measured": asdict(speed)}
    made = _by_job(amounts, force, speed) if isinstance(speed, Finished) else _by_rate(amounts, force, speed)
    return asdict(made) | {"line": made.line()}


def enlarged(time: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Return what :func:`estimated` said of a part, for a job that is larger by a ratio."""
    made = Estimate(**{field.name: time[field.name] for field in fields(Estimate)})
    decode = None if made.decode_s is None else made.decode_s * ratio
    made = replace(made, seconds=made.seconds * ratio, fetch_s=made.fetch_s * ratio, decode_s=decode)
    return {**time, **asdict(made), "line": made.line()}


def _by_rate(amounts: Amounts, force: Workforce, rate: float) -> Estimate:
    if amounts.nbytes is None:
        raise PlanError(
            "explain(rate=)",
            "files whose headers do not tell the sizes of their tiles",
            "explain(probe=True)",
        )
    fetch = amounts.nbytes / rate / force.processes
    basis = f"estimated from a stated {nbytes_text(rate)}/s for each, and fetching alone"
    return Estimate(fetch, fetch, None, force.processes, force.threads, basis)


def _by_job(amounts: Amounts, force: Workforce, job: Finished) -> Estimate:
    if job.by_bytes and amounts.nbytes is None:
        raise PlanError(
            "explain(rate=)",
            "files whose headers do not tell the sizes of their tiles",
            "explain(probe=True)",
        )
    side_by_side = force.processes * force.threads
    fetch = job.read_s * ((amounts.nbytes or 0) if job.by_bytes else amounts.chips) / side_by_side
    basis = (
        f"estimated from {job.shards:,} written shard{'s' * (job.shards != 1)} of {job.chips:,} chips, "
        f"whose tasks took {job.other_s * 1e3:.3g} ms a chip beside reading"
    )
    seconds = fetch + job.other_s * amounts.chips / side_by_side
    return Estimate(seconds, fetch, None, force.processes, force.threads, basis)


def _by_probe(amounts: Amounts, force: Workforce, probe: Measured) -> Estimate:
    tiles, nbytes = amounts.tiles, amounts.nbytes
    fetch = tiles / probe.tiles_per_s / force.processes
    if nbytes is not None and probe.nbytes:
        fetch = max(nbytes / probe.bytes_per_s / force.processes, probe.latency_s * (tiles > 0))
    decode = tiles * probe.cpu_s_per_tile / (force.processes * force.threads)
    basis = (
        f"estimated from {probe.tiles} tiles read here ({probe.requests} requests, {nbytes_text(probe.nbytes)}, "
        f"{probe.latency_s * 1e3:.3g} ms for one alone, {nbytes_text(probe.bytes_per_s)}/s together, "
        f"{probe.cpu_s_per_tile * 1e3:.2g} ms of CPU each), and {1 / TILES_SHARE:g} times that CPU with masks, warping "
        "and compression; without functions"
    )
    return Estimate(max(fetch, decode / TILES_SHARE), fetch, decode, force.processes, force.threads, basis)
