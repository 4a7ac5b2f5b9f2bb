# SPDX-License-Identifier: Apache-2.0
"""What a stream reads: shards of chips, here or in Dask tasks, such as those of a store."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from dask._task_spec import Task
from numpy.typing import NDArray

from rasteret_dask.net.lending import Lender
from rasteret_dask.net.signatures import send, send_place
from rasteret_dask.planning.plan import digest
from rasteret_dask.store import stored
from rasteret_dask.store.holding import hold
from rasteret_dask.streams.weights import Column
from rasteret_dask.tasks.batches import Arrays, Held, SourcePixels, take

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.tasks.job import Job
    from rasteret_dask.tasks.workermemory import TaskMemory

__all__ = ["ChipShards", "PartReader", "stored_chips"]


class PartReader(Protocol):
    """Reads neighbouring chips of a shard without the others."""

    def read(self, shard: int, rows: slice, memory: Lender) -> Held:
        """Read them in this process, to make batches of them."""

    def task(self, shard: int, rows: slice) -> tuple[str, Any]:
        """Return the key and the task that read them, of whose result ``part`` makes arrays."""


@dataclass(frozen=True)
class ChipShards:
    """Shards of chips that can be read, in this process or on a cluster."""

    sizes: tuple[int, ...]
    """Chips of each shard, in the order of the chip table."""
    digest: str
    """Tells these chips from others; goes into states."""
    pixels: Mapping[str, SourcePixels]
    """Source -> what its pixels are."""
    read: Callable[[int, Lender], Held]
    """Reads a shard in this process, to make batches of it; its bytes may lie in memory that is lent."""
    tasks: Callable[[], tuple[Mapping[Hashable, Any], Sequence[tuple[str, Any]]]]
    """Returns root tasks, and each shard's key and task, of whose result ``part`` makes arrays."""
    part: Callable[[Any, NDArray[np.int64] | None], Arrays]
    """Takes rows (None: all) of a task's result, on the worker that has it."""
    job: Job | None = None
    """What its tasks read, where they read files of a catalog."""

    store: str | None = None
    """What its tasks read, where they read a store."""

    memory: TaskMemory | None = None
    """What its tasks need; None: so little that no cluster is asked."""

    parts: PartReader | None = None
    """Reads parts of a shard; None: a shard is read as a whole."""

    column: Column | None = None
    """Returns a column of the chip table; None: nobody knows which chips will be kept."""

    def send_signatures(self, client: Client) -> None:
        """Send a cluster's workers what they need to sign hrefs: see :func:`rasteret_dask.net.signatures.send`."""
        if self.job is not None:
            send(client, self.job.hrefs(), self.job.signed)
        if self.store is not None:
            send_place(client, self.store)

    @property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Source -> names of its bands."""
        return {name: own.bands for name, own in self.pixels.items()}


@dataclass(frozen=True, slots=True)
class _StoredParts:
    """Reads parts of the shards of a store: of each array one range of bytes, and the shard's index once."""

    chips: stored.Stored
    only: tuple[str, ...] | None
    """The sources to read; None: all."""

    def read(self, shard: int, rows: slice, memory: Lender) -> Held:
        return hold(self.chips, shard, memory, rows, self.only)

    def task(self, shard: int, rows: slice) -> tuple[str, Any]:
        key = f"read-stored-{shard:05d}-{rows.start}-{rows.stop}-{_tail(self.chips, self.only)}"
        return key, Task(key, stored.read_shard, self.chips, shard, rows, self.only)


def stored_chips(chips: stored.Stored, only: tuple[str, ...] | None = None) -> ChipShards:
    """Return the chosen and kept chips of a store, in the order of its shards.

    Parameters
    ----------
    chips
        The chips.
    only
        The sources that are read; None: all.
    """

    def tasks() -> tuple[Mapping[Hashable, Any], Sequence[tuple[str, Any]]]:
        tail = _tail(chips, only)
        keys = [f"read-stored-{number:05d}-{tail}" for number in range(len(chips.sizes))]
        return {}, [(key, Task(key, stored.read_shard, chips, n, None, only)) for n, key in enumerate(keys)]

    pixels = {name: own for name, own in chips.map.pixels.items() if only is None or name in only}
    return ChipShards(
        chips.sizes, chips.digest, pixels, partial(hold, chips, only=only), tasks, take, store=chips.url,
        parts=_StoredParts(chips, only), column=chips.column,
    )  # fmt: skip


def _tail(chips: stored.Stored, only: tuple[str, ...] | None) -> str:
    return digest(chips.url, chips.digest, only)[:16]
