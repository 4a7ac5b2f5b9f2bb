"""A job's tasks on a Dask cluster: sent, watched, and each told of as it ends. It imports distributed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from distributed import Client, Future, as_completed
from distributed.scheduler import KilledWorker

from rasteret_dask.net import signatures
from rasteret_dask.net.awaiting import out_of_pool, why_cancelled
from rasteret_dask.net.clusters import address_of
from rasteret_dask.net.watch import watched
from rasteret_dask.progress import Progress
from rasteret_dask.tasks.job import Job

__all__ = ["ClusterTasks"]


class ClusterTasks:
    """A cluster that computes tasks.

    Parameters
    ----------
    client
        The cluster's client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._scheduler = address_of(client)
        self._futures: dict[str, Future[Any]] = {}
        self._waiting = as_completed(loop=client.loop)

    @contextmanager
    def watched(
        self, graph: Mapping[Hashable, Any], names: Mapping[str, str], subject: str, progress: Progress
    ) -> Iterator[None]:
        """Watch the cluster for the length of a block, at whose end it forgets all tasks."""
        try:
            with watched(self._client, graph, names, subject, progress), out_of_pool():
                yield
        finally:
            # A traceback that is looked at keeps futures alive, and the cluster then repeats their errors for ever.
            for future in self._futures.values():
                future.release()

    def sign(self, job: Job, url: str) -> None:
        """Send what workers need to read a job's files and to write below a URL."""
        signatures.send(self._client, job.hrefs(), job.signed)
        signatures.send_place(self._client, url)

    def send(self, tasks: Mapping[Hashable, Any], keys: Sequence[str]) -> None:
        """Have some keys computed, in this order, behind those that were sent before."""
        when: dict[Hashable, int] = dict.fromkeys(tasks, 0) | {key: -at for at, key in enumerate(keys)}
        futures: list[Future[Any]] = self._client.get(
            dict(tasks), list(keys), sync=False, priority=when.__getitem__
        )
        self._futures.update((str(future.key), future) for future in futures)
        self._waiting.update(futures)

    def ended(self) -> Iterator[tuple[str, BaseException | None]]:
        """Yield each key as it ends, with its error; CancelledError tells that the scheduler was lost."""
        for future in self._waiting:
            key = str(future.key)
            if future.status == "cancelled":
                yield key, CancelledError(why_cancelled(future, self._scheduler))
            elif future.status == "error":
                yield key, future.exception()
            else:  # finished; or lost since, with a worker that held the result
                yield key, None
            self._futures.pop(key).release()

    def may_pass(self, error: BaseException) -> bool:
        """Tell whether a task is worth another try; one that kills its workers, Dask has tried several times."""
        return not isinstance(error, KilledWorker)
