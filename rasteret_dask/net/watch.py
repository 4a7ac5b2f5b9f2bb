# SPDX-License-Identifier: Apache-2.0
"""Says what a job on a cluster waits for, and lets no worker have its tasks that cannot run them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from distributed import Client, Future

from rasteret_dask.errors import JobError
from rasteret_dask.lists import first_of
from rasteret_dask.net import probe
from rasteret_dask.net.clusters import address_of, workers_of
from rasteret_dask.net.readiness import Readiness, by_value, is_this_process
from rasteret_dask.progress import Progress, seconds

__all__ = ["Patience", "Watch", "watched"]

MAX_NAMED = 5
"""Shards and workers that a line names."""

LEAVE_S = 5.0
"""Seconds that the end of a job waits for the scheduler to take note of it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a job waits before it says what for, from Dask's configuration (see ``docs/clusters.md``)."""

    look_s: float
    """Between looks at the cluster: ``rasteret_dask.watch.look``."""
    workers_s: float
    """Without a worker: ``rasteret_dask.watch.no-workers``."""
    progress_s: float
    """Without a shard that begins or ends: ``rasteret_dask.watch.no-progress``."""
    heartbeat_s: float
    """Without a sign of life of a worker: ``rasteret_dask.watch.no-heartbeat``."""

    @classmethod
    def configured(cls) -> Patience:
        """Return what Dask's configuration says, and the defaults for the rest."""
        return cls(
            seconds("watch.look", "5s"),
            seconds("watch.no-workers", "30s"),
            seconds("watch.no-progress", "60s"),
            seconds("watch.no-heartbeat", "30s"),
        )


class MemoryCheck(Protocol):
    """Compares what tasks need with the memory limits of workers."""

    def check(self, subject: str, workers: Mapping[str, Mapping[str, Any]]) -> str:
        """Return a line about workers that may have too little; raise JobError where all certainly do."""


class Watch:
    """Looks at the tasks of one job on a cluster, from time to time.

    Parameters
    ----------
    client
        The cluster's client.
    subject
        What is being done: goes before each line.
    names
        Keys of the job's tasks -> what they are called in lines, such as their shards' names. It may change.
    progress
        Where lines go, beside the log.
    memory
        What the tasks need; None: so little that no worker is asked.
    """

    def __init__(
        self,
        client: Client,
        subject: str,
        names: Mapping[Any, str],
        progress: Progress,
        memory: MemoryCheck | None = None,
    ) -> None:
        self.client, self.subject, self._names, self._progress = client, subject, names, progress
        self._memory = memory
        self.patience = Patience.configured()
        self.workers: Mapping[str, Mapping[str, Any]] = {}
        """Address -> what the scheduler says of a worker, at the last look."""
        self._topic = f"rasteret-dask-{uuid4().hex[:12]}"
        self._guarded = False
        self._refused: dict[str, str] = {}
        self._since: dict[tuple[str, str], float] = {}  # (task, worker) -> when it was first seen there
        self._heard: dict[str, tuple[float, float]] = {}  # worker -> its last sign of life, when that came
        self._stage = ""  # what is done before the first task is sent
        self._moved = time.monotonic()
        self._bare: float | None = None  # since when there are no workers
        self._told: dict[str, float] = {}

    def admit(self, graph: Mapping[Hashable, Any]) -> None:
        """Ask scheduler and workers whether they can run a graph, and from now on every worker that joins.

        Raises
        ------
        JobError
            When one of those that are there cannot (see :meth:`rasteret_dask.net.readiness.Readiness.check`), none of
            them has the memory, or the scheduler is lost meanwhile.
        """
        if is_this_process(self.client):
            return
        scheduler = address_of(self.client)
        try:
            self._admit(graph)
        except OSError as error:  # of its connection
            raise JobError(
                self.subject, f"the scheduler {scheduler} lost while it was asked for its versions",
                "a scheduler that stays until the end", "Call this again once there is a scheduler.",
            ) from error  # fmt: skip

    def _admit(self, graph: Mapping[Hashable, Any]) -> None:
        self._stage = "asking scheduler and workers for their versions"
        self._look_for_memory(
            workers_of(self.client)
        )  # before one of them is killed because of what it imports
        readiness = Readiness.of(self.client, self.subject, graph)
        asked = readiness.check()
        by_value()
        meaning = str(probe.versions_here(())[1])
        gate = probe.HostGate(readiness.question, meaning, str(self.client.id), self._topic, asked)
        self._guarded = True
        self.client.register_plugin(gate, name=self._topic)
        self._stage = ""
        self.moved()

    def moved(self) -> None:
        """Note that something was done: nothing stands still."""
        self._moved = time.monotonic()

    def look(self) -> None:
        """Look at the cluster, and say what stands still for too long.

        Raises
        ------
        JobError
            When there are no workers, and those that came could not run the tasks, or the cluster knows that none will
            come; or none of those that are there has the memory.
        """
        now = time.monotonic()
        there = workers_of(self.client)
        self._look_for_lost(there)
        if there.keys() != self.workers.keys():
            self._look_for_memory(there)
        self.workers = there
        pairs = {
            (name, worker)
            for worker, keys in self.client.processing().items()
            for key in keys
            if (name := self._names.get(key)) is not None
        }
        if pairs != self._since.keys():
            self._moved = now
        self._since = {pair: self._since.get(pair, now) for pair in pairs}
        heard = {worker: float(own.get("last_seen") or 0.0) for worker, own in self.workers.items()}
        before = self._heard
        self._heard = {
            w: before[w] if w in before and before[w][0] == last else (last, now) for w, last in heard.items()
        }
        self._hear_of_refused()
        able = self.workers.keys() - self._refused.keys()
        # where some were refused, one that has just joined may be of the same kind
        self._look_for_workers(now, bool(able & before.keys() if self._refused else able))
        self._look_for_signs(now)
        if self.workers and now - self._moved >= self.patience.progress_s:
            self._say("progress", self._standing(now), now, self.patience.progress_s)
        running, workers = len({name for name, _ in pairs}), len(self.workers)
        on = f"{running} running on {workers} worker{'' if workers == 1 else 's'}"
        self._progress.running = self._stage or on

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look from time to time in the background, for the length of a block.

        Raises
        ------
        JobError
            As :meth:`look` does, after the tasks were cancelled, so that the block ends.
        """
        failed: list[JobError] = []
        done = threading.Event()

        def look() -> None:
            while not done.wait(self.patience.look_s):
                try:
                    if self.client.status == "running":
                        self.look()
                except JobError as error:
                    failed.append(error)
                    self.client.cancel([Future(key, self.client) for key in list(self._names)])
                    return
                except (OSError, RuntimeError, AttributeError, CancelledError):
                    continue  # the client is closed, or the scheduler lost: whoever waits for tasks hears of that

        thread = threading.Thread(target=look, name="rasteret-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(LEAVE_S)
            if failed:  # it cancelled the tasks: what they ended with says less
                raise failed[0]

    def leave(self) -> None:
        """Let the cluster forget this watch."""
        if not self._guarded or self.client.status != "running":
            return
        self._guarded = False
        loop: Any = self.client.loop
        scheduler: Any = self.client.scheduler
        leaving = asyncio.run_coroutine_threadsafe(
            scheduler.unregister_worker_plugin(name=self._topic), loop.asyncio_loop
        )
        # not for ever: a worker that stands still does not answer
        with suppress(TimeoutError, OSError, ValueError, CancelledError):
            leaving.result(LEAVE_S)

    def _hear_of_refused(self) -> None:
        if not self._guarded:
            return
        for _, event in self.client.get_events(self._topic):
            if event["worker"] not in self._refused:
                worker = self._refused[event["worker"]] = (
                    f"{event['worker']} ({event['host']}): {event['obstacle']}"
                )
                self._say(worker, f"a worker joined that cannot run these tasks, and was sent away: {worker}")

    def _look_for_memory(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        # threads of this process share what the machine has, whatever a limit says
        if self._memory is None or not workers or is_this_process(self.client):
            return
        line = self._memory.check(self.subject, workers)
        if line:
            self._say("memory", line)

    def _look_for_workers(self, now: float, any_able: bool) -> None:
        if any_able:
            self._bare = None
            return
        self._bare = now if self._bare is None else self._bare
        passed = now - self._bare
        if passed < self.patience.workers_s:
            return
        if self._refused:
            raise JobError(
                self.subject,
                f"no worker for {passed:.0f} s but {len(self._refused)} that cannot run its tasks:\n"
                + first_of(self._refused.values(), MAX_NAMED, "\n") + "\n",
                "workers with what this process has",
                "Start workers in the same environment or image as this process, then call this again.",
            )  # fmt: skip
        if now - self._told.get("workers", float("-inf")) >= self.patience.workers_s:
            scheduler = getattr(self.client.scheduler, "address", "")
            # a cluster whose workers come from a queue knows what they wait for, or that none will come: a JobError
            ask = getattr(self.client.cluster, "waiting_for", None)
            reason = f": {waits}" if ask is not None and (waits := ask()) else ""
            text = f"no workers for {passed:.0f} s at {scheduler}{reason}; it goes on once there are some"
            self._say("workers", text, now, self.patience.workers_s)

    def _look_for_lost(self, there: Mapping[str, Any]) -> None:
        """Say which workers are gone that had some of these tasks at the last look."""
        for worker in self.workers.keys() - there.keys():
            names = [name for name, where in self._since if where == worker]
            if names:
                self._say(
                    f"gone {worker}",
                    f"worker {self._name(worker)} is gone; it had {first_of(names, MAX_NAMED)}, which another one does",
                )

    def _look_for_signs(self, now: float) -> None:
        for worker, (_, came) in self._heard.items():
            if now - came >= self.patience.heartbeat_s:
                names = [name for name, where in self._since if where == worker]
                has = f"; it has {first_of(names, MAX_NAMED)}" if names else ""
                text = f"worker {self._name(worker)} has given no sign of life for {now - came:.0f} s{has}"
                self._say(f"silent {worker}", text, now, self.patience.heartbeat_s)

    def _standing(self, now: float) -> str:
        passed = f"nothing has begun or ended for {now - self._moved:.0f} s"
        if self._stage:
            return f"{passed}: {self._stage}"
        tasks = [
            f"{name} on {self._name(worker)} for {now - since:.0f} s"
            for (name, worker), since in sorted(self._since.items(), key=lambda item: item[1])
        ]
        return f"{passed}; running: {first_of(tasks, MAX_NAMED) if tasks else 'none, tasks wait on the scheduler'}"

    def _name(self, worker: str) -> str:
        said = self.workers.get(worker, {})
        return f"{worker} ({said.get('name')} at {said.get('host')})" if said else worker

    def _say(self, kind: str, text: str, now: float = 0.0, every_s: float = float("inf")) -> None:
        """Write a line, unless one of its kind was written not long ago."""
        if kind in self._told and now - self._told[kind] < every_s:
            return
        self._told[kind] = now
        _log.warning("%s: %s", self.subject, text)
        self._progress.note(f"{self.subject}: {text}")


@contextmanager
def watched(
    client: Client,
    graph: Mapping[Hashable, Any],
    names: Mapping[str, str],
    subject: str,
    progress: Progress | None = None,
    memory: MemoryCheck | None = None,
) -> Iterator[Watch]:
    """Check that a cluster can run a graph, then say in the background what it waits for, for the length of a block.

    Parameters
    ----------
    client
        The cluster's client.
    graph
        All tasks that are to be sent.
    names
        Keys that are waited for -> what they are called in lines.
    subject
        What is being done: goes before each line.
    progress, memory
        As of :class:`Watch`.

    Yields
    ------
    Watch
        What looks at the cluster.

    Raises
    ------
    JobError
        When a host cannot run the tasks or has too little memory, or all workers that come.
    """
    watch = Watch(client, subject, names, progress or Progress("tasks", shown=False), memory)
    with watch.looking():
        try:
            watch.admit(graph)
            yield watch
        finally:
            watch.leave()
