"""A script that writes a store on a cluster of its own, in a process that tests may end in any way."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import psutil
from part_processes import hold, planned, shrink

import rasteret_dask as rd

__all__ = ["clustered"]


def clustered(catalog: str, store: str, folder: str, how: str) -> None:
    """Start a cluster of two workers, note their processes in a folder, and write a store; ``how`` may be an error."""
    shrink()
    os.setsid()  # a terminal's Ctrl-C goes to all of a group
    warnings.filterwarnings("ignore", "only .* split cell")
    chips = planned(catalog)
    notes = Path(folder)
    try:
        with rd.cluster("local", chips=chips, workers=2, size=rd.WorkerSize(threads=1)) as client:
            client.wait_for_workers(2)
            client.run(shrink)
            client.run(hold, folder)
            pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
            (notes / "pids.new").write_text(json.dumps(pids))
            (notes / "pids.new").rename(notes / "pids.json")
            if how == "error":
                raise ValueError("of the script")
            chips.to_zarr(store, progress=False)
    finally:
        (notes / "left").touch()
