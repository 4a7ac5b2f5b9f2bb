# SPDX-License-Identifier: Apache-2.0
"""Streams and stores of chips as torch Datasets of plain tensors."""

from __future__ import annotations

import logging
import multiprocessing
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.context import BaseContext
from typing import Any, TypeAlias

import cloudpickle
import dask.config
import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.store import stored
from rasteret_dask.storeset import StoredChips
from rasteret_dask.streams.epochs import BatchOrder, Begun, Epoch
from rasteret_dask.streams.stream import Normalize, Stream, prepared
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.training.chipbatch import ChipBatch
from rasteret_dask.training.passes import Passes
from rasteret_dask.training.tensors import Sample, as_tensors, check_image

with needs("torch", "torch Datasets of chips"):
    import torch.distributed
    from torch.utils.data import Dataset, IterableDataset, get_worker_info

__all__ = ["ChipDataModule", "ChipDataset", "ChipStore", "as_tensors", "forkserver"]  # noqa: F822 (__getattr__)

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name == "ChipDataModule":  # lightning takes seconds to import
        from rasteret_dask.training.datamodule import ChipDataModule

        return ChipDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Transforms: TypeAlias = Callable[[Sample], Sample]


@dataclass(frozen=True)
class _Run(BatchOrder):
    """A run of neighbouring batches of a rank's epoch: those of one DataLoader worker."""

    worker: int = 0
    workers: int = 1

    @cached_property
    def rank_order(self) -> BatchOrder:
        """The order of all of the rank's batches."""
        return BatchOrder(**values_of(self))

    @cached_property
    def _ends(self) -> tuple[int, int]:
        return _run(self.rank_order.batches, self.worker, self.workers)

    @cached_property
    def batches(self) -> int:
        start, stop = self._ends
        return stop - start

    def left(self, begun: Begun) -> int:
        return self.batches - begun.offset // self.batch_size

    def arguments(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in ("batch_size", "drop_last", "rank", "world_size", "pad", "buffer")
        }
        return {**super().arguments(), **own, "worker": self.worker, "workers": self.workers}

    def epoch(
        self, number: int, first: int = 0, begun: Begun | None = None, until: int | None = None
    ) -> Epoch:
        start, stop = self._ends
        here = start + (0 if begun is None else begun.offset // self.batch_size)
        return self.rank_order.epoch(number, here + first, None, stop if until is None else here + until)


def values_of(order: BatchOrder) -> dict[str, Any]:
    """Return the fields that every order has."""
    return {name: getattr(order, name) for name in BatchOrder.__dataclass_fields__}


def _run(batches: int, worker: int, workers: int) -> tuple[int, int]:
    return batches * worker // workers, batches * (worker + 1) // workers


class ChipDataset(IterableDataset[Sample]):
    """A stream as a torch IterableDataset of whole batches: give it to ``DataLoader(dataset, batch_size=None)``.

    Each pass over it yields the stream's ``epochs``, and the next pass those that follow, with workers too; a pass
    counts once it has yielded a batch. Where ``torch.distributed`` is initialized by then and the stream is not
    divided, ranks divide it. A batch is a dictionary, which needs no ``collate_fn``.

    DataLoader workers divide each epoch's batches into runs: together they yield the same batches, whatever
    ``num_workers`` is; only their order differs. They open stores and read for themselves, from the Dask cluster whose
    address the stream was given, else on threads. A worker must be a process of its own, as a fork has locks of threads
    that it lacks. So where nothing has chosen how Python starts processes, the first dataset chooses ``"forkserver"``,
    as Python 3.14 does (a script then needs ``if __name__ == "__main__":``). Else
    ``multiprocessing_context=forkserver()`` or ``"spawn"`` says it for one DataLoader.

    ``state_dict`` and ``load_state_dict`` work as torchdata's ``StatefulDataLoader`` asks, with workers too; without
    workers, any DataLoader will do, and the state may be that of another number of ranks or another batch size.

    Parameters
    ----------
    stream
        What ``chips.stream(...)`` or ``rd.stream_from(...)`` returned, before its first batch.
    image
        As in :func:`as_tensors`.
    transforms
        Gets and returns each batch, a dictionary of tensors.

    Raises
    ------
    PlanError
        When the stream has begun; when a DataLoader puts whole batches together again; in a worker, when it is a fork,
        or the stream holds what no other process can have.

    Examples
    --------
    >>> from torch.utils.data import DataLoader
    >>> from rasteret_dask.torchdata import ChipDataset
    >>> stream = chips.select("train").stream(batch_size=32, shuffle=7)
    >>> for batch in DataLoader(ChipDataset(stream, image="s2"), batch_size=None):
    ...     images = batch["image"]  # (chip, time, band, y, x)
    >>> images.dtype
    torch.float32
    """

    def __init__(
        self, stream: Stream, *, image: str | None = None, transforms: Transforms | None = None
    ) -> None:
        if not isinstance(stream, Stream):
            raise PlanError(
                "ChipDataset",
                f"a {type(stream).__name__}",
                "a stream",
                "Give it chips.stream(batch_size=...).",
            )
        if image is not None:
            check_image(image, stream.bands)
        state = stream.state_dict()
        if state["epoch"] or state["batch"]:
            raise PlanError(
                "ChipDataset", f"a stream at epoch {state['epoch']}, batch {state['batch']}", "one that has not begun",
                "Load the state of the dataset itself: dataset.load_state_dict(...).",
            )  # fmt: skip
        self.image, self.transforms = image, transforms
        self._whole = stream
        self._process = os.getpid()
        choose_start()
        self._passes = Passes()
        self._resumed: Mapping[str, Any] | None = None
        self._running: tuple[Stream | None, int] | None = None

    @property
    def _stream(self) -> Stream:
        """The rank's part, once there are ranks: a Trainer starts them long after the dataset was made."""
        alone = self._whole.order.world_size == 1
        if alone and torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if ranks > 1:
                self._whole = self._whole.with_order(replace(self._whole.order, rank=rank, world_size=ranks))
        return self._whole

    def __len__(self) -> int:
        """Return the number of batches of a pass, over all workers."""
        return len(self._stream)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be the one of this number, as trainers that count passes call it.

        Passes count from 0 on: with ``stream(epochs=k)`` this one begins with epoch ``k * epoch``. Workers that stay
        alive between passes hear of it too. A loaded state stays where it stands in that very pass.

        Raises
        ------
        PlanError
            When it is not a whole number from 0 on.

        Examples
        --------
        >>> from rasteret_dask.torchdata import ChipDataset
        >>> dataset = ChipDataset(chips.stream(batch_size=32, shuffle=7))
        >>> dataset.set_epoch(3)
        >>> batch = next(iter(dataset))
        >>> dataset.state_dict()["stream"]["epoch"]
        3
        """
        if not _whole(epoch):
            raise PlanError("set_epoch", repr(epoch), "a whole number from 0 on")
        first = operator.index(epoch) * self._stream.epochs
        if self._resumed is None or self._resumed["stop"] != first + self._stream.epochs:
            self._resumed = None
            self._passes.jump(first)

    def __iter__(self) -> Iterator[Sample]:
        refuse_fork(self._process)
        # In a worker at once, as its DataLoader waits for that before it goes on; else with the first batch, as
        # torchdata's loader makes an iterator that it does not use.
        return self._batches(None if get_worker_info() is None else self._begun())

    def _batches(self, begun: tuple[Stream | None, int] | None) -> Iterator[Sample]:
        stream, _ = running = begun or self._begun()
        if stream is not None:
            yield from map(self._sample, stream)
        if self._running is running:
            self._running = None

    def _begun(self) -> tuple[Stream | None, int]:
        """Begin a pass, or go on with one: what there is to yield here, and the epoch that the pass ends before."""
        state, self._resumed, self._running = self._resumed, None, None
        if state is not None:
            stop = state["stop"]
            stream = None if state["stream"] is None else self._at(state)
        else:
            first = self._passes.begin(self._stream.epochs)
            stop = first + self._stream.epochs
            stream = self._part(stop)
            if stream is not None:
                stream.load_state_dict({**stream.state_dict(), "epoch": first, "batch": 0})
        self._running = stream, stop
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Return where this process's pass stands, as JSON values.

        Examples
        --------
        >>> from rasteret_dask.torchdata import ChipDataset
        >>> ChipDataset(chips.stream(batch_size=32)).state_dict()
        {'stop': 0, 'stream': None}
        """
        if self._resumed is not None:
            return dict(self._resumed)
        if self._running is None:
            return {"stop": self._passes.next, "stream": None}
        stream, stop = self._running
        return {"stop": stop, "stream": None if stream is None else stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the next batch, or with the next pass where this one was over.

        A loop that had all batches of a pass, but did not ask for one more, finds no further one first: the pass ends.

        Raises
        ------
        PlanError
            When it is none, or one of other chips, of a stream with other arguments, or of another worker.

        Examples
        --------
        >>> from rasteret_dask.torchdata import ChipDataset
        >>> dataset = ChipDataset(chips.stream(batch_size=32, shuffle=7))
        >>> batches = iter(dataset)
        >>> batch = next(batches)
        >>> again = ChipDataset(chips.stream(batch_size=32, shuffle=7))
        >>> again.load_state_dict(dataset.state_dict())
        >>> next(iter(again))["chip_id"] == next(batches)["chip_id"]
        True
        """
        given = state if isinstance(state, Mapping) else {}
        if given.keys() != {"stop", "stream"} or not _whole(given["stop"]):
            raise PlanError(
                "load_state_dict", f"{state!r:.100}", "what state_dict() of a ChipDataset returned"
            )
        if state["stream"] is not None:
            self._at(state)  # so that a mistake is told here
        # a worker that had done its part waits for the others: the rest of this pass has nothing for it
        inside = state["stream"] is not None or get_worker_info() is not None
        self._resumed, self._running = dict(state) if inside else None, None
        self._passes.jump(state["stop"])

    def _at(self, state: Mapping[str, Any]) -> Stream:
        """Return a stream that goes on where a state says."""
        stream = self._part(state["stop"])
        if stream is None or isinstance(stream.order, _Run) != ("workers" in state["stream"]):
            raise PlanError(
                "load_state_dict of a ChipDataset", "a state of another number of DataLoader workers",
                "one that was made in this worker",
                "Use torchdata's StatefulDataLoader with the same num_workers; in the main process, num_workers=0.",
            )  # fmt: skip
        stream.load_state_dict(state["stream"])
        return stream

    def _part(self, stop: int) -> Stream | None:
        """Return this worker's part of all epochs before ``stop``, or None where there is nothing for it."""
        order, worker = self._stream.order, get_worker_info()
        if worker is None:
            return self._stream.with_order(order, stop)
        if dask.config.get("num_workers", None) is None:
            dask.config.set(num_workers=max(1, CPU_COUNT // worker.num_workers))
        start, end = _run(order.batches, worker.id, worker.num_workers)
        if start == end:
            return None
        part = _Run(**values_of(order), worker=worker.id, workers=worker.num_workers)
        return self._stream.with_order(part, stop)

    def _sample(self, batch: Arrays) -> Sample:
        sample = as_tensors(batch, self.image)
        sample = sample if self.transforms is None else self.transforms(sample)
        return ChipBatch(sample) if isinstance(sample, dict) else sample

    def __getstate__(self) -> dict[str, Any]:
        try:
            stream = cloudpickle.dumps(self._stream)
        except TypeError as error:
            raise PlanError(
                "ChipDataset in DataLoader workers", f"a stream that other processes cannot have ({error})",
                "a stream made with an address",
                "Give stream(client=) the scheduler's address (client.scheduler.address), not a client.",
            ) from error  # fmt: skip
        return {**self.__dict__, "_whole": stream, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process, self._whole = os.getpid(), cloudpickle.loads(state["_whole"])


class ChipStore(Dataset[Sample]):
    """Chips of a finished store as a map-style torch Dataset: one sample a chip, in the order of the chip table.

    A DataLoader's batch is read at once, by concurrent gets of its chips alone. For a whole epoch in random order,
    :class:`ChipDataset` reads whole shards and is much faster; this is for samplers of your own.

    Parameters
    ----------
    chips
        What ``rd.open_chips(store)`` returned. Workers (started as for :class:`ChipDataset`) open it
        when they read.
    image
        As in :func:`as_tensors`.
    normalize
        What ``stats()`` of the chips that one trains on returned, a function of arrays with a chip axis, or True:
        ``chips.stats()``.
    ignore_index
        As in :meth:`StoredChips.stream`.
    transforms
        Gets and returns each sample.

    Examples
    --------
    >>> from torch.utils.data import DataLoader
    >>> from rasteret_dask.torchdata import ChipStore
    >>> dataset = ChipStore(rd.open_chips("train.zarr", split="train"), image="s2", normalize=True)
    >>> batch = next(iter(DataLoader(dataset, batch_size=8)))
    >>> batch["image"].shape
    torch.Size([8, 3, 2, 32, 32])
    """

    def __init__(
        self,
        chips: StoredChips,
        *,
        image: str | None = None,
        normalize: Normalize | bool | None = None,
        ignore_index: int | None = None,
        transforms: Transforms | None = None,
    ) -> None:
        if not isinstance(chips, StoredChips):
            raise PlanError(
                "ChipStore", f"a {type(chips).__name__}", "chips of a store: rd.open_chips(store)",
                "Chips that are not in a store have no random access: use ChipDataset.",
            )  # fmt: skip
        if image is not None:
            check_image(image, chips.stored.bands)
        self.chips, self.image, self.transforms = chips, image, transforms
        measured = chips.stats() if normalize is True else normalize or None
        self.normalize = prepared(measured, ignore_index, chips.stored.map.pixels)
        self._process = os.getpid()
        choose_start()

    def __len__(self) -> int:
        return len(self.chips)

    def __getitem__(self, number: int) -> Sample:
        """Return one chip's tensors, without a chip axis; text stays text.

        Raises
        ------
        IndexError
            When there is no such chip: so a loop over the dataset ends.
        """
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """Return several chips, read in one batch: what a DataLoader asks for."""
        refuse_fork(self._process)
        rows = self._rows(numbers)
        arrays = stored.take(self.chips.stored, rows)
        arrays = arrays if self.normalize is None else self.normalize(arrays)
        return [self._sample({k: v[at] for k, v in arrays.items()}) for at in range(len(rows))]

    def _rows(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        rows = np.array([operator.index(n) for n in numbers], dtype=np.int64)
        bad = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(bad):
            raise IndexError(f"chip {bad[0]}: the store has {len(self)}")
        return np.where(rows < 0, rows + len(self), rows)

    def _sample(self, chip: Mapping[str, Any]) -> Sample:
        sample = as_tensors(chip, self.image)
        return sample if self.transforms is None else self.transforms(sample)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = os.getpid()


def _whole(number: Any) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and bool(number >= 0)


def forkserver() -> BaseContext:
    """Return a context for ``DataLoader(multiprocessing_context=...)`` whose workers start with all modules imported.

    A spawned worker imports torch and this package for seconds; here one clean process does so once for all workers.

    Examples
    --------
    >>> from torch.utils.data import DataLoader
    >>> from rasteret_dask.torchdata import ChipStore, forkserver
    >>> loader = DataLoader(
    ...     ChipStore(stored), batch_size=8, num_workers=2, multiprocessing_context=forkserver()
    ... )
    >>> len(loader)
    20
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "rasteret_dask.torchdata"])  # the first is Python's default
    return context


def choose_start() -> None:
    """Let Python start processes by a fork server, where it would fork and nobody has chosen anything."""
    if multiprocessing.get_start_method(allow_none=True) is None and _forks_by_default():
        multiprocessing.set_start_method("forkserver")
        forkserver()  # whose preloaded modules are those of all
        _log.info(
            "multiprocessing starts processes by 'forkserver' from now on: a fork cannot read. "
            "multiprocessing.set_start_method() before the first dataset chooses otherwise."
        )


def _forks_by_default() -> bool:
    return multiprocessing.get_all_start_methods()[0] == "fork"  # the first is the default


def refuse_fork(process: int) -> None:
    """Raise PlanError in a fork of the process that made a dataset.

    A fork has its parent's locks but not its threads: object stores would wait for them for ever.
    """
    if os.getpid() != process:
        raise PlanError(
            "reading in a DataLoader worker", "a fork of the main process", "a process of its own",
            'Give DataLoader multiprocessing_context=rasteret_dask.torchdata.forkserver(), or "spawn".',
        )  # fmt: skip
