"""Two ways to do one job, in turn: this checkout and another, or the package and its bar."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contender import CONTENDERS
from jobs import AnyJob, ReadmeJob
from process import Process, apart


@dataclass(frozen=True)
class Side:
    """One of the two."""

    title: str
    contender: str
    job: AnyJob
    checkout: Path
    """Whose code runs."""


@dataclass(frozen=True)
class Pair:
    """What is compared: ``one`` as a multiple of ``other``."""

    name: str
    one: Side
    other: Side
    equal: bool = True
    """Whether both must give the same pixels."""


MEASURES = (
    ("cpu", "CPU s", 1.0), ("wall", "wall s", 1.0), ("peak_mb", "peak MB", 1.0),
    ("faults", "1000 page faults", 1e3), ("requests", "requests", 1.0), ("nbytes", "MB", 1e6),
    ("distinct", "MB of the files", 1e6),
)  # fmt: skip

Found = list[tuple[dict[str, Any], dict[str, Any]]]


def run(pair: Pair, process: Process, pairs: int) -> str:
    """Run both in turn, each second time in the other order, and return a row for each measure.

    A first round, which warms the files' cache and makes stores that others copy, is not counted.
    """
    found: Found = []
    for number in range(pairs + 1):
        sides = (pair.one, pair.other) if number % 2 == 0 else (pair.other, pair.one)
        print(f"{pair.name}, pair {number} of {pairs}", file=sys.stderr)
        by = {side: _once(process, side, _pixels(pair, side, process)) for side in sides}
        one, other = by[pair.one], by[pair.other]
        if pair.equal and not _same(pair, process, one["digest"] == other["digest"]):
            raise SystemExit(f"{pair.name}: {pair.one.title} and {pair.other.title} differ in pixels")
        if number:
            found.append((one, other))
    return _table(pair, found)


def _once(process: Process, side: Side, pixels: Path) -> dict[str, Any]:
    contender, job = CONTENDERS[side.contender], side.job
    if job.slack:
        job = job.replace(pixels=str(pixels))
    return process.run(contender, job, contender.tried[0], side.checkout)


def _pixels(pair: Pair, side: Side, process: Process) -> Path:
    return process.scratch / ("one.npy" if side is pair.one else "other.npy")


def _same(pair: Pair, process: Process, exact: bool) -> bool:
    """Tell whether both gave the same pixels, resampled ones as far apart as rounding makes them."""
    slack = pair.one.job.slack
    if not slack:
        return exact
    near = apart(*(_pixels(pair, side, process) for side in (pair.one, pair.other))) <= slack
    return near and (exact or not isinstance(pair.one.job, ReadmeJob))


def _table(pair: Pair, found: Found) -> str:
    lines = [
        f"{pair.name}: {pair.one.title} as a multiple of {pair.other.title}, {len(found)} pairs in turn",
        "",
        "| measure | median ratio (quartiles) | " + f"{pair.one.title} | {pair.other.title} |",
        "|---|---|---|---|",
    ]
    for key, unit, scale in MEASURES:
        if not all(key in measured for both in found for measured in both):  # an older checkout's
            continue
        one, other = (np.array([f[side][key] for f in found]) / scale for side in (0, 1))
        ratio = "-"  # of what nobody served: files that were read from the disk
        if other.all():
            low, middle, high = np.percentile(one / other, [25, 50, 75])
            ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {unit} | {ratio} | {np.median(one):.2f} | {np.median(other):.2f} |")
    return "\n".join(lines)
