"""How other processes of the suite are started: as forks of one that has imported everything."""

from __future__ import annotations

import dask
from distributed.utils import get_mp_context

__all__ = ["NEW_PROCESSES", "fork_from_one"]

PRELOADED = (
    "distributed", "distributed.nanny", "distributed.protocol.numpy", "distributed.worker", "pandas", "pyarrow.acero",
    "pystac", "stackstac", "xarray", "zarr", "zarr.storage", "rasteret_dask.building", "rasteret_dask.chipset",
    "rasteret_dask.store.appending", "rasteret_dask.store.run", "rasteret_dask.store.oncluster",
    "rasteret_dask.store.outputs", "rasteret_dask.storeset", "rasteret_dask.streamfrom",
    "rasteret_dask.streams.clustersource", "rasteret_dask.cubes.lazy", "rasteret_dask.geometries.reading",
    "rasteret_dask.torchdata",
)  # fmt: skip
"""Imported once, by the process that others are forked from; without torch, all but the last."""

NEW_PROCESSES = {"distributed.worker.multiprocessing-method": "spawn", "multiprocessing.context": "spawn"}
"""Dask's own defaults: a new interpreter for each worker.

For tests whose workers need the environment variables of the test, or have their memory measured: a fork has the
environment of the time when the first one was started, and counts what it was forked from as its own.
"""


def fork_from_one() -> None:
    """Let Dask's workers, and other users of Python's fork server, be forks rather than import for 4 s of CPU each."""
    dask.config.set(dict.fromkeys(NEW_PROCESSES, "forkserver"))
    get_mp_context().set_forkserver_preload(list(PRELOADED))
