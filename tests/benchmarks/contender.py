"""Runs one contender on one job in this process and prints what it took: ``contender.py NAME JOB.json``.

With ``--profile FILE`` the timed part runs under cProfile (all threads) and its statistics go to FILE. Any other
profiler can start this script as well: nothing else runs in its process.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jobs import AnyJob, ReadmeJob, read_job
from numpy.typing import NDArray
from usage import Usage, forget_peak, usage


@dataclass(frozen=True)
class Prepared:
    """A contender that is ready to start."""

    run: Callable[[], Any]
    """The work that is timed."""
    chips: Callable[[Any], Iterator[NDArray[Any]]]
    """Its result as chips (time, band, y, x), in the order of ``Job.chips``; not timed."""
    resampled: Callable[[Any], Iterator[NDArray[Any]]] | None = None
    """What of its result is resampled, so that rounding may differ, where ``chips`` are not; not timed."""
    others: Callable[[], list[Usage]] | None = None
    """What other processes that work for it have used so far."""


Settings = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Who reads, and with which settings."""

    name: str
    module: str
    function: str
    """Takes the job and the settings, returns :class:`Prepared`."""
    tried: tuple[Settings, ...] = ({},)
    """Settings to choose from, likely ones first: the fastest on the job at hand is taken."""
    environment: str = ""
    """``"python312"``, ``"rslearn"`` or ``"torchgeo"``: whose packages it needs, in an environment of their own."""
    slow: bool = False
    """Takes so long that it runs less often."""
    code: tuple[str, ...] = ()
    """What its user has to write, as ``lines.count`` takes it."""


def _listed(*contenders: Contender) -> dict[str, Contender]:
    return {c.name: c for c in contenders}


_THREADS: tuple[Settings, ...] = ({"threads": 16}, {"threads": 8}, {"threads": 4})
_FEWER = _THREADS[1:]
_TILE = [1, 1, 1024, 1024]
_CHIP: tuple[Settings, ...] = ({"chunks": [1, 1, 256, 256], "threads": 8},)
_STACKSTAC: tuple[Settings, ...] = (
    {"chunks": _TILE, "threads": 16},
    {"chunks": _TILE, "threads": 8},
    {"chunks": _TILE, "threads": 4},
    {"chunks": [1, -1, 1024, 1024], "threads": 8},
)
_ODC: tuple[Settings, ...] = (
    {"chunks": 1024, "threads": 8},
    {"chunks": 1024, "threads": 16},
    {"chunks": 1024, "threads": 4},
    {"chunks": 0, "threads": 8},
)

_HAND_CODE = (
    "readme_peers:_written", "readme_by_hand", "readme_plan", "bare:reflectance", "bare:copy_metadata", "peers:tune",
)  # fmt: skip
"""What odc-stac and stackstac leave to their user: choosing, masks, units, filling, cutting, writing."""
_LOOP_CODE = (
    "readme_bare", "readme_plan",
    *(f"bare:{n}" for n in ("Tile", "Sharded", "placing", "tiles_of", "reflectance", "corners", "copy_metadata")),
)  # fmt: skip

CONTENDERS = _listed(
    Contender("rasteret_dask", "ours", "read"),
    Contender("rasteret_dask to Zarr", "ours", "write"),
    Contender("bare loop", "bare", "read", _THREADS),
    Contender("bare loop to Zarr", "bare", "write", _THREADS),
    Contender("rasteret_dask on the README's job", "readme_ours", "write", code=("README",)),
    Contender("bare loop on the README's job", "readme_bare", "write", _THREADS, code=_LOOP_CODE),
    Contender(
        "odc-stac on the README's job", "readme_peers", "write_odc", _FEWER, code=("readme_peers:odc", *_HAND_CODE)
    ),
    Contender(
        "stackstac on the README's job", "readme_peers", "write_stackstac", _FEWER, slow=True,
        code=("readme_peers:stackstac", "peers:one_band_assets", *_HAND_CODE),
    ),
    *(
        Contender(
            f"rasteret_dask on {n} worker process{'es' if n > 1 else ''}", "readme_ours", "write_on_workers",
            ({"workers": n},),
        )
        for n in (1, 2, 4)
    ),
    Contender("stackstac", "peers", "stackstac_boxes", _STACKSTAC),
    Contender("odc-stac", "peers", "odc_boxes", _ODC),
    Contender("lazycogs", "peers312", "lazycogs_boxes", ({"threads": 1}, {"threads": 2}),
        environment="python312", slow=True),
    Contender("rasteret by block", "peers312", "rasteret_blocks", environment="python312", slow=True),
    Contender("rasteret by chip", "peers312", "rasteret_chips", environment="python312", slow=True),
    Contender("rslearn to GeoTIFFs", "peers_rslearn", "windows", ({"processes": 2},), environment="rslearn", slow=True),
    *(
        Contender(f"rasteret_dask{what} to a map", "maps_ours", function)
        for what, function in (
            ("", "predict"), (", bands as they are,", "copy"), (", a band as it is,", "first")
        )
    ),
    Contender("rasteret_dask to Zarr without overlap", "maps_ours", "write"),
    Contender("sliding window over odc-stac", "maps_dull", "over_odc"),
    Contender("sliding window over stackstac", "maps_dull", "over_stackstac"),
    Contender(
        "TorchGeo to a map", "maps_torchgeo", "predict", ({"workers": 0, "torch_threads": 1},), environment="torchgeo"
    ),
    Contender("rslearn to a map", "maps_rslearn", "predict", ({"torch_threads": 1},), environment="rslearn"),
    Contender("stackstac, chunks of a chip", "peers", "stackstac_boxes", _CHIP, slow=True),
    Contender("stackstac, one compute a chip", "peers", "stackstac_chips", _STACKSTAC[1:2], slow=True),
    Contender("rasterio by chip", "peers", "rasterio_chips", slow=True),
)  # fmt: skip
"""All of them by name; rasterio by chip is one thread, exact where it warps: the oracle."""


def measure(
    contender: Contender, job: AnyJob, settings: Settings, profile: Path | None = None
) -> dict[str, Any]:
    """Run a contender once.

    Returns
    -------
    dict
        ``wall`` and ``cpu`` in seconds (children and other processes included), ``peak_mb`` of this process when the
        work was done, or of the largest of the others, ``faults``, pages touched for the first time, ``digest``,
        sha256 of the chips, and ``package``, where rasteret_dask was imported from.
    """
    function = getattr(import_module(contender.module), contender.function)
    prepared: Prepared = function(job, **settings)
    gc.collect()  # what imports and preparation leave behind is nobody's work
    bring_memory()
    others = prepared.others or (list)
    profiler = cProfile.Profile() if profile else None
    before = [usage(), *others()]
    wall = time.perf_counter()
    if profiler is not None:
        threading.setprofile(lambda *_: profiler.enable())
        result = profiler.runcall(prepared.run)
    else:
        result = prepared.run()
    wall = time.perf_counter() - wall
    after = [usage(), *others()]
    cpu = sum(u.cpu_s for u in after) - sum(u.cpu_s for u in before)
    faults = sum(u.faults for u in after) - sum(u.faults for u in before)
    peak = max(u.peak_mb for u in after[1:] or after)
    if profiler is not None and profile is not None:
        profiler.dump_stats(profile)
    digest = leave(job, prepared, result)
    package = getattr(sys.modules.get("rasteret_dask"), "__file__", "")
    return {
        "wall": wall, "cpu": cpu, "peak_mb": peak, "faults": faults, "digest": digest, "package": package
    }  # fmt: skip


def bring_memory(nbytes: int = 1 << 30) -> None:
    """Touch memory and give it back, so that every contender starts from pages which the machine has at hand.

    A virtual machine hands free memory back to its host some seconds after it was freed, and a page that has to come
    from there again costs several times as much. Without this, who imports less starts earlier after the process
    before, and takes that one's pages while they are still there: J1's ratio then measures the host.
    """
    np.ones(nbytes, np.uint8)
    forget_peak()


def run_whole(contender: Contender, job: ReadmeJob, settings: Settings) -> None:
    """Run a contender once in a process that whoever started it measures; its pixels stay in the store."""
    prepared: Prepared = getattr(import_module(contender.module), contender.function)(job, **settings)
    prepared.run()
    print(json.dumps({"package": getattr(sys.modules.get("rasteret_dask"), "__file__", "")}))


def leave(job: AnyJob, prepared: Prepared, result: Any) -> str:
    """Return the digest of what a contender made; leave its pixels where the job wants them."""
    digest = hashlib.sha256()
    for chip in prepared.chips(result):
        digest.update(np.ascontiguousarray(chip).data)
    if job.pixels:
        np.save(job.pixels, np.stack(list((prepared.resampled or prepared.chips)(result))))
    return digest.hexdigest()


def main() -> None:
    """Run the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("job", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--set", action="append", default=[], help="settings of its own, each as name=JSON")
    arguments = parser.parse_args()
    given = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in arguments.set)}
    contender = CONTENDERS[arguments.name]
    settings = given or contender.tried[0]
    job = read_job(arguments.job)
    if isinstance(job, ReadmeJob) and job.fresh:
        run_whole(contender, job, settings)
        return
    print(json.dumps(measure(contender, job, settings, arguments.profile)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
