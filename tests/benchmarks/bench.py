"""Every contender on the same files, in turn, each time in a fresh process: ``make bench``.

Options go into ARGS: ``make bench ARGS="--runs 5 --jobs J1 J2 --latency 0 35 --write"``. With ``--pairs 15`` two ways
run in turn instead, and ratios are told: the package and its bar, or, with ``--against CHECKOUT``, this checkout and
that one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ours
import pairs
import readme_world
import report
from contender import CONTENDERS, Contender, Settings
from jobs import Box, Job, ReadmeJob
from nginx import Nginx
from pairs import Pair, Side
from process import THIS, Process, apart, build_tables, started
from python312 import environment
from scenes import EPSG, ORIGIN, Kind, embeddings, items, landsat, make_files, sentinel2

NAMES = (
    "J1",
    "J1-u16",
    "J1-zarr",
    "J1-zone",
    "J2",
    "J3",
    "J4",
    "J4-u16",
    "J4-fresh",
    "J5",
    "J5-wide",
    "memory",
)
UNFILLED = ("J4-unfilled", "J4-u16-unfilled")
"""J4 with ``harmonize(fill=False)``; run where they are named."""
ABSENT = {
    "rslearn": "materialize composites by nodata alone: no quality band hides clouds before a scene is filled",
    "rasteret": "its mosaics take the first pixel that is not nodata: no quality band hides clouds before that",
    "lazycogs": "its mosaics know nodata alone, no quality band; it has no bilinear kernel",
}
"""Who cannot do the README's job, and why."""

_PACKAGE, _LOOP, _ODC, _STACKSTAC = (
    f"{who} on the README's job" for who in ("rasteret_dask", "bare loop", "odc-stac", "stackstac")
)
README_WAYS = {
    "J4": (_PACKAGE, _LOOP, _ODC, _STACKSTAC),
    "J4-fresh": (_PACKAGE, _LOOP, _ODC, _STACKSTAC),
    "J5": (_PACKAGE, _LOOP, *(n for n in CONTENDERS if "worker process" in n)),
    "J5-wide": tuple(n for n in CONTENDERS if "worker process" in n),
    "others": (_PACKAGE, _LOOP),
}
"""Job -> who runs it."""

CHIP_PX = 256
TILES = (0, 4, 6, 8, 12, 16, 18, 24)
"""The 8 cells of 5 x 5, row by row: no two of them are neighbours in a file."""
JITTER_MS = 5.0
DELAYED = ("J1", "J1-zarr", "J4", "J4-fresh")
"""Jobs that run at every latency, the others at the first."""
LONG = 10
"""How many times longer the long job is."""


@dataclass(frozen=True)
class Bench:
    """One table: a job and who runs it."""

    name: str
    title: str
    job: Job | ReadmeJob
    contenders: tuple[str, ...]
    """The package's way first, then its bar."""


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
    parser.add_argument("--jobs", nargs="+", default=["all"], help=f"{' '.join((*NAMES, *UNFILLED))}, or all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=1, help="of contenders that take very long")
    parser.add_argument("--latency", nargs="+", type=float, default=[0.0, 35.0], help="ms, 5 more or less")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    parser.add_argument(
        "--untuned", action="store_true", help="take everyone's first settings, try no others"
    )
    parser.add_argument(
        "--pairs", type=int, help="so many pairs of two ways in turn, told as ratios; 15 for a claim"
    )
    parser.add_argument("--against", type=Path, help="another checkout, to pair this one with")
    parser.add_argument("--threads", type=int, default=2, help="Dask threads of rasteret_dask")
    parser.add_argument("--size", type=int, default=5120, help="pixels of a Sentinel-2-like scene, or 10980")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rasteret-dask-bench")
    parser.add_argument("--python312", help="a Python 3.12 or newer, for rasteret and lazycogs")
    parser.add_argument("--rslearn", type=Path, help="the interpreter of an environment that has rslearn")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument(
        "--serve", action="store_true", help="make jobs and serve their files until interrupted"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server stops too
    kinds = (sentinel2(arguments.size), landsat(), embeddings())
    make_files(arguments.folder, kinds)
    readme_world.make(arguments.folder)
    python, why = None, "not in pairs"
    if arguments.pairs is None:
        python, why = environment(arguments.folder / "python312", arguments.python312)
    there = {"python312": python, "rslearn": arguments.rslearn}
    pythons = {name: path for name, path in there.items() if path is not None}
    missing = {"python312": why, "rslearn": "no --rslearn= was named"}
    with Nginx(arguments.folder) as server, _scratch(arguments.folder) as scratch:
        benches = _benches(kinds, server.url, scratch, python, arguments.threads, arguments.jobs)
        if arguments.serve:
            _serve(benches, server.url, scratch)
            return
        if arguments.pairs is not None:
            for pair in _pairs(benches, arguments.against, scratch):
                print(f"\n{pairs.run(pair, Process(server, scratch), arguments.pairs)}", flush=True)
            return
        for bench in benches:
            latencies = arguments.latency if bench.name in DELAYED else arguments.latency[:1]
            section = []
            for latency in latencies:
                server.latency(max(latency - JITTER_MS, 0.0), latency + JITTER_MS if latency else 0.0)
                names = [n for n in bench.contenders if _is_asked(n, arguments.only)]
                runner = _Runner(bench, Process(server, scratch, pythons), missing)
                if bench.name in ("J4", "J4-fresh"):
                    runner.skipped |= ABSENT
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
    wanted = [*(n for n in NAMES if every or n in asked), *(n for n in UNFILLED if n in asked)]
    unknown = set(asked) - {*wanted, "all"}
    if unknown:
        raise SystemExit(f"no job {', '.join(sorted(unknown))}: {', '.join((*NAMES, *UNFILLED))}, or all")
    made: list[Bench] = []
    if {"J1", "J1-u16", "J1-zarr", "J1-zone"} & set(wanted):
        per_row = 5
        boxes = tuple(_tile(ORIGIN, *divmod(n, per_row), s2.tile_px * s2.pixel_m) for n in TILES)
        j1 = _job("J1", s2, 1, url, scratch, python, boxes, grid="tiles", threads=threads)
        size = f"{len(boxes)} cells of 1024 px, {len(s2.bands)} bands, {s2.dates} dates of {s2.size_px} px scenes"
        if "J1" in wanted:
            others = ("Zarr", "README", "rasterio", "worker", "rslearn")
            peers = [n for n in CONTENDERS if not any(other in n for other in others)]
            made.append(Bench("J1", f"J1 to arrays: {j1.count} chips of 256 px, {size}", j1, tuple(peers)))
        if "J1-u16" in wanted:
            stored = j1.replace(name="J1-u16", units="reflectance")
            title = "J1 as reflectance x 1e4 in uint16: the same files and chips"
            made.append(Bench("J1-u16", title, stored, ("rasteret_dask", "bare loop")))
        if "J1-zarr" in wanted:
            three = ("rasteret_dask to Zarr", "bare loop to Zarr", "rslearn to GeoTIFFs")
            store = j1.replace(name="J1-zarr", store=str(scratch / "store"), layout=str(scratch / "layout"))
            made.append(Bench("J1-zarr", "J1 to Zarr: the same shards, codec and threads", store, three))
        if "J1-zone" in wanted:
            zone = _on_zone(j1.replace(name="J1-zone", grid="zone"))
            title = f"J1 on the zone lattice: the whole scenes, {zone.count} chips of 256 px"
            made.append(Bench("J1-zone", title, zone, ("rasteret_dask", "bare loop")))
    if "J2" in wanted:
        boxes = tuple(_tile(ORIGIN, *divmod(n, 5), 10240.0) for n in TILES)
        j2 = _job("J2", l8, 1, url, scratch, python, boxes, grid="box", threads=threads)
        j2 = j2.replace(resolution=10.0, resampling="bilinear")
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
    made += [_readme(name, url, scratch, threads) for name in wanted if name.startswith(("J4", "J5"))]
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
    if python is not None and copies == 1:
        started(THIS, str(python), "peers312.py", str(folder / "items.json"), str(folder))
    dates = sorted(item["properties"]["datetime"][:10] for item in found)
    start = str(np.datetime64(dates[0]) - np.timedelta64(3, "D"))
    job = Job(
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
    build_tables(job, scratch)
    return job


def _readme(name: str, url: str, scratch: Path, threads: int) -> Bench:
    """Write the items and tables of one variant of the README's job."""
    folder = scratch / name
    folder.mkdir()
    found = readme_world.items(url)
    (folder / "items.json").write_text(json.dumps(found))
    job = ReadmeJob(
        name=name,
        items=str(folder / "items.json"),
        tables=str(folder),
        epsg=EPSG,
        area=readme_world.area(name == "J5-wide"),
        dtype="uint16" if "u16" in name else "float32",
        fill="unfilled" not in name,
        fresh="fresh" in name,
        wide="wide" in name,
        store=str(scratch / "store"),
        layout=str(folder / "layout"),
        threads=threads,
    )
    build_tables(job, scratch)
    filled = ", filled from the next in rank" if job.fill else ""
    across, down = readme_world.WIDE
    measured = {
        "J4-fresh": ", a whole fresh process",
        "J5": ", on 1, 2 and 4 worker processes",
        "J5-wide": f", on 1, 2 and 4 worker processes, over {across * down} times the ground ({across} x {down})",
    }.get(name, "")
    title = (
        f"{name}: the README's job as {job.dtype}{filled}{measured}: Sentinel-2 and Landsat merged, masked, three "
        "months, joined with 64-band embeddings, train chips, to Zarr"
    )
    return Bench(name, title, job, README_WAYS[name if name in README_WAYS else "others"])


def _pairs(benches: Sequence[Bench], against: Path | None, scratch: Path) -> Iterator[Pair]:
    """Yield for each job the package and its bar: a bare loop, and raw numbers for J1 as uint16; or two checkouts."""
    if against is not None:
        other = against.resolve()
        for bench in benches:
            folder = scratch / f"{bench.name}-other"
            folder.mkdir()
            tables = (
                {"tables": str(folder)}
                if isinstance(bench.job, ReadmeJob)
                else {"table": str(folder / "records.parquet")}
            )
            job = bench.job.replace(**tables)
            build_tables(job, scratch, other)
            ours_way = bench.contenders[0]
            one = Side("this checkout", ours_way, bench.job, THIS)
            yield Pair(bench.name, one, Side("the other", ours_way, job, other))
        return
    raw = next((b for b in benches if b.name == "J1"), None)
    for bench in benches:
        ours_way, *others = bench.contenders
        one = Side(ours_way, ours_way, bench.job, THIS)
        if others:
            yield Pair(bench.name, one, Side(others[0], others[0], bench.job, THIS))
        if bench.name == "J1-u16" and raw is not None:
            yield Pair("J1-u16", one, Side("J1, raw", ours_way, raw.job, THIS), equal=False)


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

    def __init__(self, bench: Bench, process: Process, missing: Mapping[str, str]) -> None:
        self.bench, self.process = bench, process
        self.missing = missing
        """Name of an environment -> why it may not be there."""
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
        if contender.environment and contender.environment not in self.process.pythons:
            self.skipped[contender.name] = self.missing[contender.environment]
            return None
        if untuned or (contender.slow and len(contender.tried) == 1):
            return Runs(contender, contender.tried[0])
        times = [(self._once(contender, s)["wall"], number) for number, s in enumerate(contender.tried)]
        return Runs(contender, contender.tried[min(times)[1]])

    def _once(self, contender: Contender, settings: Settings) -> dict[str, Any]:
        job = self.bench.job
        if job.slack:
            job = job.replace(pixels=str(self._pixels(contender.name)))
        found = self.process.run(contender, job, settings)
        self._compare(contender, found["digest"])
        return found

    def _pixels(self, name: str) -> Path:
        return self.process.scratch / f"{name.replace(' ', '-')}.npy"

    def _compare(self, contender: Contender, digest: str) -> None:
        """End the benchmark where pixels differ from those of the first contender that ran."""
        job = self.bench.job
        self._first.setdefault(digest, contender.name)
        first = next(iter(self._first.values()))
        if len(self._first) > 1 and not (isinstance(job, Job) and job.slack):
            raise SystemExit(f"{contender.name} and {first} read different pixels on {self.bench.name}")
        if job.slack and contender.name != first:
            distance = apart(self._pixels(contender.name), self._pixels(first))
            print(f"  resampled pixels are {distance:g} apart", file=sys.stderr)
            if distance > job.slack:
                raise SystemExit(f"{contender.name} and {first} differ by {distance} on {self.bench.name}")


if __name__ == "__main__":
    main()
