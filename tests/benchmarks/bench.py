"""Every contender on the same files, in turn, each time in a fresh process: ``make bench``.

Options go into ARGS: ``make bench ARGS="--runs 5 --jobs J1 J2 --latency 0 35 --write"``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ours
import report
from contender import CONTENDERS, Contender, Settings
from jobs import Box, Job
from nginx import Nginx
from python312 import environment
from scenes import EPSG, ORIGIN, Kind, embeddings, items, landsat, make_files, sentinel2

import rasteret_dask as rd

HERE = Path(__file__).parent
CHIP_PX = 256
TILES = (0, 4, 6, 8, 12, 16, 18, 24)
"""The 8 cells of 5 x 5, row by row: no two of them are neighbours in a file."""
JITTER_MS = 5.0
LONG = 10
"""How many times longer the long job is."""


@dataclass(frozen=True)
class Bench:
    """One table: a job and who runs it."""

    name: str
    title: str
    job: Job
    contenders: tuple[str, ...]


@dataclass
class Runs:
    """What one contender did on one job at one latency."""

    contender: Contender
    settings: Settings
    found: list[dict[str, Any]] = field(default_factory=list)
    """One a run: as ``contender.measure`` returns it, with ``requests`` and ``nbytes`` served."""

    def middle(self, key: str) -> float:
        """Return the median over the runs."""
        return float(np.median([run[key] for run in self.found]))


def main() -> None:
    """Make files, serve them, run the jobs, print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=["all"], help="J1 J1-zarr J1-zone J2 J3 memory, or all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=1, help="of contenders that take very long")
    parser.add_argument("--latency", nargs="+", type=float, default=[0.0, 35.0], help="ms, 5 more or less")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    parser.add_argument(
        "--untuned", action="store_true", help="take everyone's first settings, try no others"
    )
    parser.add_argument("--threads", type=int, default=2, help="Dask threads of rasteret_dask")
    parser.add_argument("--size", type=int, default=5120, help="pixels of a Sentinel-2-like scene, or 10980")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rasteret-dask-bench")
    parser.add_argument("--python312", help="a Python 3.12 or newer, for rasteret and lazycogs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument(
        "--serve", action="store_true", help="make jobs and serve their files until interrupted"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server stops too
    kinds = (sentinel2(arguments.size), landsat(), embeddings())
    make_files(arguments.folder, kinds)
    python, why = environment(arguments.folder / "python312", arguments.python312)
    with Nginx(arguments.folder) as server, _scratch(arguments.folder) as scratch:
        benches = _benches(kinds, server.url, scratch, python, arguments.threads, arguments.jobs)
        if arguments.serve:
            _serve(benches, server.url, scratch)
            return
        for bench in benches:
            latencies = arguments.latency if bench.name in ("J1", "J1-zarr") else arguments.latency[:1]
            section = []
            for latency in latencies:
                server.latency(max(latency - JITTER_MS, 0.0), latency + JITTER_MS if latency else 0.0)
                names = [n for n in bench.contenders if _is_asked(n, arguments.only)]
                runner = _Runner(bench, server, scratch, python, why)
                runs = runner.run(
                    [CONTENDERS[n] for n in names], arguments.runs, arguments.slow_runs, arguments.untuned
                )
                section.append(report.table(latency, runs, runner.skipped))
                print(f"\n{bench.title}\n\n{section[-1]}", flush=True)
            if arguments.write:
                report.write(bench.name, bench.title, section, not arguments.untuned, python)


def _is_asked(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name.startswith(o) for o in only)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _serve(benches: Sequence[Bench], url: str, scratch: Path) -> None:
    for bench in benches:
        print(bench.job.write(scratch / f"{bench.name}.json"))
    print(
        f"{url}/_latency?low=30&high=40 sets milliseconds, /_reset and /_counts count; Ctrl-C ends",
        flush=True,
    )
    with suppress(KeyboardInterrupt):
        signal.pause()


def _benches(
    kinds: tuple[Kind, ...], url: str, scratch: Path, python: Path | None, threads: int, asked: Sequence[str]
) -> list[Bench]:
    s2, l8, aef = kinds
    every = asked == ["all"]
    wanted = [n for n in ("J1", "J1-zarr", "J1-zone", "J2", "J3", "memory") if every or n in asked]
    unknown = set(asked) - {*wanted, "all"}
    if unknown:
        raise SystemExit(f"no job {', '.join(sorted(unknown))}: J1, J1-zarr, J1-zone, J2, J3, memory, or all")
    made: list[Bench] = []
    if {"J1", "J1-zarr", "J1-zone"} & set(wanted):
        per_row = 5
        boxes = tuple(_tile(ORIGIN, *divmod(n, per_row), s2.tile_px * s2.pixel_m) for n in TILES)
        j1 = _job("J1", s2, 1, url, scratch, python, boxes, grid="tiles", threads=threads)
        size = f"{len(boxes)} cells of 1024 px, {len(s2.bands)} bands, {s2.dates} dates of {s2.size_px} px scenes"
        if "J1" in wanted:
            peers = [n for n in CONTENDERS if "Zarr" not in n and n != "rasterio by chip"]
            made.append(Bench("J1", f"J1 to arrays: {j1.count} chips of 256 px, {size}", j1, tuple(peers)))
        if "J1-zarr" in wanted:
            two = ("rasteret_dask to Zarr", "bare loop to Zarr")
            store = j1.replace(name="J1-zarr", store=str(scratch / "store"), layout=str(scratch / "layout"))
            made.append(Bench("J1-zarr", "J1 to Zarr: the same shards, codec and threads", store, two))
        if "J1-zone" in wanted:
            zone = _on_zone(j1.replace(name="J1-zone", grid="zone"))
            title = f"J1 on the zone lattice: the whole scenes, {zone.count} chips of 256 px"
            made.append(Bench("J1-zone", title, zone, ("rasteret_dask", "bare loop")))
    if "J2" in wanted:
        boxes = tuple(_tile(ORIGIN, *divmod(n, 5), 10240.0) for n in TILES)
        j2 = _job("J2", l8, 1, url, scratch, python, boxes, grid="box", threads=threads)
        j2 = j2.replace(resolution=10.0, resampling="bilinear", tolerance_dn=1)
        title = (
            f"J2: Landsat-like, 30 m warped to 10 m (bilinear), {j2.count} chips of 256 px, {l8.dates} dates"
        )
        warpers = ("rasteret_dask", "stackstac", "odc-stac", "rasterio by chip")
        made.append(Bench("J2", title, j2, warpers))
    if "J3" in wanted:
        boxes = tuple(_tile(ORIGIN, row, col, 10240.0) for row, col in ((0, 0), (0, 2), (1, 1), (2, 0)))
        j3 = _job("J3", aef, 1, url, scratch, python, boxes, grid="tiles", threads=threads)
        title = f"J3: embeddings-like, {len(aef.bands)} bands of int8, {j3.count} chips of 256 px"
        readers = ("rasteret_dask", "bare loop", "stackstac", "odc-stac", "rasteret by block")
        made.append(Bench("J3", title, j3, readers))
    if "memory" in wanted:
        boxes = tuple(_tile(ORIGIN, *divmod(n, 5), 10240.0) for n in TILES)
        for copies in (1, LONG):
            job = _job(
                f"memory-{copies}", s2, copies, url, scratch, None, boxes, grid="tiles", threads=threads
            )
            job = job.replace(slot="", store=str(scratch / "store"))
            title = f"Memory, to Zarr, a chip an acquisition: {job.count * s2.dates * copies} chips"
            made.append(Bench(f"memory-{copies}", title, job, ("rasteret_dask to Zarr",)))
    return made


def _job(
    name: str,
    kind: Kind,
    copies: int,
    url: str,
    scratch: Path,
    python: Path | None,
    boxes: tuple[Box, ...],
    grid: str,
    threads: int,
) -> Job:
    """Write a job's items and tables, every header read from the server."""
    folder = scratch / name
    folder.mkdir()
    found = items(kind, url, copies)
    (folder / "items.json").write_text(json.dumps(found))
    rd.build_from_stac(found, name=kind.name, bands=list(kind.bands)).export(folder / "records.parquet")
    if python is not None and copies == 1:
        subprocess.run(
            [str(python), str(HERE / "peers312.py"), str(folder / "items.json"), str(folder)], check=True
        )
    dates = sorted(item["properties"]["datetime"][:10] for item in found)
    start = str(np.datetime64(dates[0]) - np.timedelta64(3, "D"))
    return Job(
        name=name,
        items=str(folder / "items.json"),
        table=str(folder / "records.parquet"),
        peers=str(folder),
        bands=kind.bands,
        dtype=kind.dtype,
        nodata=kind.nodata,
        epsg=EPSG,
        resolution=kind.pixel_m,
        origin=ORIGIN,
        boxes=boxes,
        chip_px=CHIP_PX,
        grid=grid,
        date_range=("2024-01-01", "2024-12-31") if kind.planar else (start, dates[-1]),
        slot="" if kind.planar else "10D",
        planar=kind.planar,
        threads=threads,
    )


def _tile(origin: tuple[float, float], row: int, col: int, side: float) -> Box:
    west, north = origin[0] + col * side, origin[1] - row * side
    return west, north - side, west + side, north


def _on_zone(job: Job) -> Job:
    """Return the job with the chips that our lattice lays over the whole scenes, each a box of its own."""
    table = ours.chips(job, ours.collection(job)).table
    columns = [table.column(n).to_pylist() for n in ("xmin", "ymin", "xmax", "ymax")]
    return job.replace(boxes=tuple(zip(*columns, strict=True)))


class _Runner:
    """Runs contenders on one job in turn, and compares their pixels."""

    def __init__(self, bench: Bench, server: Nginx, scratch: Path, python: Path | None, why: str) -> None:
        self.bench, self.server, self.scratch, self.python = bench, server, scratch, python
        self.why = why
        self.skipped: dict[str, str] = {}
        """Contender -> why it did not run."""
        self._first: dict[str, str] = {}
        """Digest -> the contender that had it first."""

    def run(self, contenders: Sequence[Contender], runs: int, slow_runs: int, untuned: bool) -> list[Runs]:
        """Choose settings in a first round that does not count, then run all in turn."""
        chosen = [found for c in contenders if (found := self._tune(c, untuned)) is not None]
        for number in range(runs):
            for entry in chosen:
                if number < (slow_runs if entry.contender.slow else runs):
                    entry.found.append(self._once(entry.contender, entry.settings))
        return chosen

    def _tune(self, contender: Contender, untuned: bool) -> Runs | None:
        if contender.python312 and self.python is None:
            self.skipped[contender.name] = self.why
            return None
        if untuned or (contender.slow and len(contender.tried) == 1):
            return Runs(contender, contender.tried[0])
        times = [(self._once(contender, s)["wall"], number) for number, s in enumerate(contender.tried)]
        return Runs(contender, contender.tried[min(times)[1]])

    def _once(self, contender: Contender, settings: Settings) -> dict[str, Any]:
        job = self.bench.job
        if job.store:
            shutil.rmtree(job.store, ignore_errors=True)
        pixels = self.scratch / f"{contender.name.replace(' ', '-')}.npy"
        if job.tolerance_dn:
            job = job.replace(pixels=str(pixels))
        path = job.write(self.scratch / "job.json")
        python = str(self.python) if contender.python312 else sys.executable
        given = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        self.server.reset()
        done = subprocess.run(
            [python, str(HERE / "contender.py"), contender.name, str(path), *given],
            capture_output=True,
            text=True,
        )
        served = self.server.served()
        if done.returncode:
            raise SystemExit(f"{contender.name} with {settings} failed on {job.name}:\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        found |= {"requests": served.requests, "nbytes": served.nbytes, "errors": served.errors}
        print(
            f"  {contender.name} {settings or ''}: {found['wall']:.2f} s, {found['cpu']:.2f} s CPU",
            file=sys.stderr,
        )
        if job.layout and not Path(job.layout).exists():
            shutil.copytree(job.store, job.layout)
        self._compare(contender, found["digest"], pixels)
        return found

    def _compare(self, contender: Contender, digest: str, pixels: Path) -> None:
        """End the benchmark where pixels differ from those of the first contender that ran."""
        self._first.setdefault(digest, contender.name)
        first = next(iter(self._first.values()))
        if len(self._first) == 1:
            return
        if self.bench.job.tolerance_dn:
            mine = np.load(pixels, mmap_mode="r")
            other = np.load(self.scratch / f"{first.replace(' ', '-')}.npy", mmap_mode="r")
            apart = max(int(np.abs(a.astype(np.int32) - b).max()) for a, b in zip(mine, other, strict=True))
            if apart <= self.bench.job.tolerance_dn:
                return
            raise SystemExit(f"{contender.name} and {first} differ by {apart} DN on {self.bench.name}")
        raise SystemExit(f"{contender.name} and {first} read different pixels on {self.bench.name}")


if __name__ == "__main__":
    main()
