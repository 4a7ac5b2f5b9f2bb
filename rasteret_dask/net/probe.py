# SPDX-License-Identifier: Apache-2.0
"""What is sent to hosts that may lack this package, to ask them: standard library and Dask only, pickled by value."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import pickle
import platform
import sys
from collections.abc import Sequence
from typing import Any

from distributed import WorkerPlugin
from distributed.protocol.pickle import dumps

__all__ = ["HostGate", "look", "obstacle", "versions_here"]

HOME = "rasteret_dask"
"""The package, by name: where this runs it may be missing."""


async def look(tasks: Sequence[bytes], libraries: Sequence[str]) -> dict[str, Any]:
    """Return what this host is, which versions it has, and why tasks could not run here.

    Parameters
    ----------
    tasks
        Pickled tasks: to open them imports all that they need, as their first run would.
    libraries
        Distributions whose versions count.

    Returns
    -------
    dict
        ``host``; ``versions`` (distribution -> version or None); ``meaning`` of the pixels that it would make, None
        where there is no package; ``obstacle``: what opening the tasks ended with, or "".
    """
    # on a thread: an import of seconds must not keep a worker's or scheduler's event loop from its heartbeats
    (opened,) = await asyncio.gather(asyncio.to_thread(_open, tasks), return_exceptions=True)
    versions, meaning = await asyncio.to_thread(versions_here, libraries)
    obstacle = f"{type(opened).__name__}: {opened}" if isinstance(opened, BaseException) else ""
    return {"host": platform.node(), "versions": versions, "meaning": meaning, "obstacle": obstacle}


def _open(tasks: Sequence[bytes]) -> None:
    for task in tasks:
        pickle.loads(task)


def versions_here(libraries: Sequence[str]) -> tuple[dict[str, str | None], str | None]:
    """Return the versions in this process, and the meaning of its pixels (None: no package)."""
    found: dict[str, str | None] = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["gdal"] = getattr(sys.modules.get("rasterio"), "__gdal_version__", None)
    try:
        found[HOME] = importlib.import_module(f"{HOME}._version").__version__
    except ImportError:
        found[HOME] = None
        return found, None
    try:
        meaning = importlib.import_module(f"{HOME}.formats").MEANING
    except (ImportError, AttributeError):
        meaning = found[HOME]
    return found, str(meaning)


def obstacle(answer: dict[str, Any], meaning: str) -> str:
    """Return why a host that answered cannot do the job of a client whose pixels have a meaning, or ""."""
    if answer["obstacle"]:
        return str(answer["obstacle"])
    if answer["meaning"] != meaning:
        return (
            f"{HOME} {answer['versions'][HOME]}, which makes other pixels of the same plan "
            f"(version {answer['meaning']} of their meaning, here {meaning})"
        )
    return ""


class HostGate(WorkerPlugin):
    """Asks a worker that joins; one that cannot run the tasks says so and leaves before it is sent any.

    Without it such a worker ends at the first task that reaches it, and the shards that it had been sent count as
    shards that kill workers.

    Parameters
    ----------
    question
        The arguments of :func:`look`.
    meaning
        That of the client's pixels.
    client
        The id of the Dask client: once it is gone, all are let in.
    topic
        Where to say so: ``client.get_events(topic)``.
    seen
        Addresses of workers that have answered before.
    """

    def __init__(
        self, question: tuple[Any, Any], meaning: str, client: str, topic: str, seen: frozenset[str]
    ) -> None:
        self.question, self.meaning = question, meaning
        self.client, self.topic, self.seen = client, topic, seen

    async def setup(self, worker: Any) -> None:
        """Ask the worker; Dask waits for this before it opens the first task."""
        if worker.address in self.seen:
            return
        answer = await look(*self.question)
        trouble = obstacle(answer, self.meaning)
        scheduler = worker.scheduler
        if not trouble or not await _connected(scheduler, self.client):
            return
        said = {"worker": worker.address, "host": answer["host"], "obstacle": trouble}
        await scheduler.log_event(topic=self.topic, msg=said)
        # removed by the scheduler, its tasks go elsewhere without blame
        await scheduler.retire_workers(workers=[worker.address], close_workers=True, remove=True)


async def _connected(scheduler: Any, client: str) -> bool:
    answer = await scheduler.run_function(
        function=dumps(_has_client), args=dumps((client,)), kwargs=dumps({}), wait=True
    )
    return bool(answer.get("result", True))


def _has_client(client: str, dask_scheduler: Any = None) -> bool:
    return client in dask_scheduler.clients
