"""Tables of the benchmark, and the page that keeps them: docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import lines as code

if TYPE_CHECKING:
    from bench import Runs

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
SHOWN = (
    "rasteret-dask", "stackstac", "odc-stac", "odc-loader", "rasterio", "dask", "xarray", "zarr", "numpy", "obstore",
    "imagecodecs", "numcodecs",
)  # fmt: skip
SHOWN_312 = ("rasteret", "lazycogs", "async-geotiff", "rasterio", "numpy", "obstore")

_INTRO = """# Benchmarks

`make bench ARGS="--write"` wrote the tables below; everything in one table was measured in one run, in turn, each run
in a fresh process. Seconds are medians (minimum to maximum), CPU counts all threads, peak is the process's resident
memory when the work was done, requests and MB are what the file server (nginx on loopback) answered. The ratio
is wall time over that of rasteret_dask. Settings are those that were fastest in a round of trying that
is not counted. Every contender's pixels were compared: the same digest, or, where a warp is involved, at most
1 DN apart. rasteret_dask is timed from the exit's call on a loaded record table to its return, planning included.

The bare loop is the least that any reader must do: threads that fetch each tile by an offset known beforehand, decode
it with libdeflate (or zstd), and copy it into its place in one array. To Zarr, it also compresses the
chips and writes the same shards.
"""
_NOTES = """## What was tried and did not help

"""

_LOOP = "bare loop on the README's job"
_ONE = "rasteret_dask on 1 worker process"
"""What the others are compared with where no loop runs."""
_MORE = (" wall of the loop | CPU of the loop | MB of distinct MB | lines |", "---|---|---|---|")
"""Columns of the README's job: twice ratios to the bare loop, how often a byte was fetched, lines of code."""


def table(latency_ms: float, runs: Sequence[Runs], skipped: Mapping[str, str]) -> str:
    """Return one job at one latency as a Markdown table."""
    there = {r.contender.name: r for r in runs if r.found}
    loop = there.get(_LOOP, there.get(_ONE))
    who = "the loop" if _LOOP in there else "1 process"
    said = "0 ms" if not latency_ms else f"{latency_ms - 5:g} to {latency_ms + 5:g} ms"
    lines = [
        f"First byte after {said}:",
        "",
        "| contender | wall s | CPU s | peak MB | 1000 page faults | requests | MB | ratio | runs |"
        + (_MORE[0].replace("the loop", who) if loop else ""),
        "|---|---|---|---|---|---|---|---|---|" + (_MORE[1] if loop else ""),
    ]
    base = next((r.middle("wall") for r in runs if r.contender.name.startswith("rasteret_dask")), None)
    for entry in runs:
        if not entry.found:
            continue
        walls = [run["wall"] for run in entry.found]
        ratio = f"{entry.middle('wall') / base:.2f}" if base else ""
        spread = f"{entry.middle('wall'):.2f} ({min(walls):.2f} to {max(walls):.2f})"
        lines.append(
            f"| {_called(entry)} | {spread} | {entry.middle('cpu'):.2f} | {entry.middle('peak_mb'):.0f} "
            f"| {entry.middle('faults') / 1e3:.0f} "
            f"| {entry.middle('requests'):.0f} | {entry.middle('nbytes') / 1e6:.0f} | {ratio} | {len(walls)} |"
            + (_beside(entry, loop) if loop else "")
        )
    lines += [
        f"| {name} | not run: {why} | | | | | | | |{' | | | |' if loop else ''}"
        for name, why in skipped.items()
    ]
    return "\n".join(lines)


def _beside(entry: Runs, loop: Runs) -> str:
    wall, cpu = (entry.middle(key) / loop.middle(key) for key in ("wall", "cpu"))
    nbytes = entry.middle("nbytes") / entry.middle("distinct")
    return f" {wall:.2f} | {cpu:.2f} | {nbytes:.2f} | {code.count(entry.contender.code) or ''} |"


def _called(entry: Runs) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in entry.settings.items())
    return f"{entry.contender.name} ({settings})" if settings else entry.contender.name


def write(name: str, title: str, tables: Sequence[str], tuned: bool, python312: Path | None) -> None:
    """Put one job's tables into the page; its other jobs, and what a person wrote under them, stay.

    Parameters
    ----------
    name, title
        The job; the name marks its place in the page.
    tables
        One a latency.
    tuned
        Whether settings were tried in a round that does not count.
    python312
        The interpreter of the second environment, for its versions.
    """
    page = PAGE.read_text() if PAGE.exists() else f"{_INTRO}\n{_NOTES}"
    note = () if tuned else ("Everyone's first settings; no others were tried.",)
    body = "\n\n".join((f"## {title}", *note, *tables))
    page = _put(page, "machine", f"{_machine()}\n\n{_versions(python312)}")
    PAGE.write_text(_put(page, name, body))


def put(name: str, body: str) -> None:
    """Put a section that is no job's into the page."""
    PAGE.write_text(_put(PAGE.read_text(), name, body))


def _put(page: str, name: str, body: str) -> str:
    """Replace the section between two comments, or add it before the notes."""
    section = f"<!-- {name} -->\n{body}\n<!-- end of {name} -->"
    found = re.compile(rf"<!-- {re.escape(name)} -->.*<!-- end of {re.escape(name)} -->", re.DOTALL)
    if found.search(page):
        return found.sub(lambda _: section, page)
    before, notes, after = page.partition(_NOTES.splitlines()[0])
    return f"{before.rstrip()}\n\n{section}\n\n{notes}{after}"


def _machine() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = model.group(1) if model else platform.machine()
    return f"Machine: {os.cpu_count()} cores ({cpu}), {pages / 2**30:.0f} GiB of memory, Linux {platform.release()}."


def _versions(python312: Path | None) -> str:
    own = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    said = f"Versions: Python {platform.python_version()}, GDAL {_gdal()}, {own}."
    if python312 is None:
        return said
    code = (
        "import platform; from importlib.metadata import version; "
        f"print(platform.python_version(), *(n + ' ' + version(n) for n in {SHOWN_312}), sep=', ')"
    )
    other = subprocess.run([str(python312), "-c", code], capture_output=True, text=True, check=True).stdout
    return f"{said} In the second environment: Python {other.strip()}."


def _gdal() -> str:
    import rasterio

    return str(rasterio.__gdal_version__)
