"""One part of an array job in a process of its own: what such a process imports is little, as many are started."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rasteret_dask as rd

__all__ = [
    "FREE", "SHRUNK", "append", "doom", "hold", "killed_in_the_middle", "planned", "reports", "shrink", "stoppable",
    "write",
]  # fmt: skip

FREE = 3
"""Shards that are not held back in a process."""

SHRUNK = {
    "tasks.freezing.BLOCK_PX": 96, "tasks.freezing.SHARD_CHIPS": 5, "chipping.frame.BLOCK_PX": 96,
    "chipping.blocks.BLOCK_PX": 96, "chipblocks.PART_CHIPS": 40,
}  # fmt: skip
"""So that a small world has several blocks, shards, and parts of a plan."""


def shrink() -> None:
    """Make shards small, for good: where a process is only for that."""
    for name, value in SHRUNK.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(f"rasteret_dask.{module}"), constant, value)


def planned(catalog: str) -> rd.Chips:
    """Return a plan of 17 shards, as each process makes it by itself."""
    s2 = rd.build_from_stac(catalog, name="s2", date_range=("2024-04-01", "2024-06-30"))
    s2 = s2.harmonize(["red"], time="3MS", dtype="uint16")
    return s2.chips(32, cell_km=0.96).split(0.6, 0.2, 0.2).filter("col", "<", 1564)


def write(
    catalog: str, store: str, number: int, count: int, folder: str | None, environment: dict[str, str]
) -> None:
    """Write one part; a warning ends it."""
    os.environ.update(environment)
    shrink()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "only .* split cell")
    limits = rd.RunLimits(part=(number, count))
    chips = planned(catalog)
    if folder is None:
        chips.to_zarr(store, progress=False, limits=limits)
    else:
        chips.by_blocks(folder, progress=False, windows=40).to_zarr(store, progress=False, limits=limits)


def hold(folder: str) -> None:
    """Have this process write a few shards, and begin others only to wait until a file ``go`` is there."""
    run: Any = importlib.import_module("rasteret_dask.store.run")
    real, number = run.write_sources, iter(range(1_000_000))

    def held(*args: Any) -> Any:
        here = Path(folder)
        (here / f"begun.{uuid.uuid4().hex}").touch()
        while next(number) >= FREE and not (here / "go").exists():
            time.sleep(0.01)
        return real(*args)

    run.write_sources = held


def reports(store: str | Path) -> dict[str, int]:
    """Return when each report of a shard was written."""
    return {path.stem: path.stat().st_mtime_ns for path in Path(store, "_job/done").glob("*.json")}


def doom(folder: str, store: str, least: int, dies: bool) -> None:
    """Have a worker die as it begins its second shard, once so many are in place; the others wait for that meanwhile.

    What is in place at that moment is noted in a folder.
    """
    marks: Any = importlib.import_module("rasteret_dask.store.shardreports")
    real, number, here = marks.tried, iter(range(1_000_000)), Path(folder)

    def tried(*args: Any) -> Any:
        mark, begun = real(*args), next(number)
        if begun == 0:
            return mark
        if dies:
            (here / "second").touch()
        while not (here / "second").exists() or (dies and len(reports(store)) < least):
            time.sleep(0.01)
        if dies:
            (here / "before.json").write_text(json.dumps(reports(store)))
            os.kill(os.getpid(), signal.SIGKILL)
        return mark

    marks.tried = tried


@contextmanager
def killed_in_the_middle(client: Any, folder: Path, store: Path, least: int) -> Iterator[tuple[int, Path]]:
    """Have a worker of a cluster die while a store is written; give its process, and where it notes what was there.

    However busy the machine: it is itself at a shard when it dies, and the others are not done by then.
    """
    folder.mkdir()
    victim, *others = client.run(os.getpid).items()
    for worker, _ in (victim, *others):
        client.run(doom, str(folder), str(store), least, worker == victim[0], workers=[worker])
    yield victim[1], folder / "before.json"


def append(catalog: str, store: str, size: int) -> None:
    """Append chips until a store has so many."""
    s2 = rd.build_from_stac(catalog, name="s2", date_range=("2024-04-01", "2024-06-30"))
    chips = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96)
    chips.sample(size).to_zarr(store, progress=False, append=True)


def stoppable(catalog: str, store: str, folder: str, address: str | None) -> None:
    """Write a store until a signal comes; note what is left of it then."""
    from rasteret_dask.store.oncluster import ClusterTasks
    from rasteret_dask.store.onthreads import ThreadTasks

    def noted(stop: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(tasks: Any) -> None:
            stop(tasks)
            (Path(folder) / "stopping").touch()

        return call

    kinds: list[Any] = [ThreadTasks, ClusterTasks]
    for kind in kinds:
        kind.stop = noted(kind.stop)
    shrink()
    if address is None:
        hold(folder)
    try:
        planned(catalog).to_zarr(store, client=address, progress=False)
    except BaseException as request:
        names = [t.name for t in threading.enumerate() if t.name.startswith("rasteret-")]
        end = {"type": type(request).__name__, "notes": request.__notes__, "threads": names}
        (Path(folder) / "end.json").write_text(json.dumps(end))
        raise
