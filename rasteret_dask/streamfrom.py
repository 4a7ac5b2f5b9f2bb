# SPDX-License-Identifier: Apache-2.0
"""Streams for processes that did not make the plan: training workers, from a saved plan or a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planset import open_plan
from rasteret_dask.store.stored import Stored
from rasteret_dask.storeset import open_chips
from rasteret_dask.streams.augmenting import Augment
from rasteret_dask.streams.chipshards import stored_chips
from rasteret_dask.streams.stream import Batching, Normalize, Stream
from rasteret_dask.streams.weights import WeightsLike
from rasteret_dask.tasks.jobfile import JOB_FILE
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["stream_from"]


def stream_from(
    client: ClientLike,
    plan: str | os.PathLike[str],
    batch_size: int,
    shuffle: int | None = None,
    epochs: int = 1,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    pad: bool = False,
    prefetch: int = 2,
    normalize: Normalize | None = None,
    *,
    buffer: int = 4,
    ignore_index: int | None = None,
    weights: WeightsLike | None = None,
    balance: str | None = None,
    augment: Augment | None = None,
    functions: Iterable[Callable[..., Any]] = (),
    split: str | None = None,
    on_error: OnError = "raise",
) -> Stream:
    """Return one rank's batches in a process that has only an address and a path.

    All ranks give the same arguments but ``rank``. A training process may be a Dask worker itself: start such workers
    with the resource ``train=1`` (``dask worker --resources train=1``) and submit to them with
    ``resources={"train": 1}``; then shards are read on the other workers only.

    Parameters
    ----------
    client
        The Dask scheduler's address, a client or a cluster; None: the current client (in a task: its worker's), else
        threads of this process. A ``tls://`` address takes its certificates from Dask's configuration: see Notes.
    plan
        Where :meth:`Chips.save_plan` wrote the plan, or :meth:`Chips.to_zarr` a store.
    batch_size, shuffle, epochs, drop_last, rank, world_size, pad, prefetch
        As in :meth:`Chips.stream`.
    normalize, buffer, ignore_index, weights, balance, augment
        As in :meth:`Chips.stream`.
    functions
        As of :func:`open_plan`.
    split
        Of a store: only the chips of this split; a store of several must be asked for one. A saved plan has the chips
        that were selected when it was saved.
    on_error
        Of a saved plan: as in :meth:`Chips.stream`.

    Raises
    ------
    StoreError
        When neither a plan nor a finished store lies there.
    PlanError
        When the plan calls a function that is not among ``functions``, or one that says something else by now; when
        the store has several splits and none is named, or not this one.
    JobError
        At the first batch, when no scheduler answers, it wants other certificates than this process has, or no worker
        may read.

    Notes
    -----
    **Certificates.** A cluster with TLS wants a certificate of every process that connects, to the scheduler as to
    the workers. A process outside has its own in Dask's configuration (``distributed.comm.tls``: ``ca-file``,
    ``client.cert``, ``client.key``), as a YAML file or in the environment::

        DASK_DISTRIBUTED__COMM__TLS__CA_FILE=ca.pem
        DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT=cert.pem
        DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY=key.pem

    or gives a client: ``stream_from(Client(address, security=Security(...)), plan, ...)``. A task on a Dask worker
    gives None: its worker's client has the worker's certificates, those of ``Security.temporary()`` too.

    Examples
    --------
    >>> chips.select("train").save_plan("plan")
    >>> stream = rd.stream_from(None, "plan", batch_size=32, shuffle=7)  # None: no cluster, threads of this process
    >>> next(stream)["s2"].shape
    (32, 3, 2, 32, 32)
    >>> len(rd.stream_from(None, "train.zarr", batch_size=32, split="train"))
    4
    """
    batching = Batching(
        batch_size, shuffle, epochs, drop_last, rank, world_size, pad, client, prefetch, normalize, buffer,
        ignore_index, weights, balance, augment,
    )  # fmt: skip
    url = Place.of(plan).url
    if _exists(url, JOB_FILE):
        if split is not None:
            raise PlanError(
                "stream_from(split=)", f"{split!r} of a saved plan", "None",
                "Save the plan of one split: chips.select('train').save_plan(path).",
            )  # fmt: skip
        shards = open_plan(url, functions)._shards(on_error)
    elif _exists(url, "zarr.json"):
        shards = stored_chips(_of_one_split(url, split))
    else:
        raise StoreError(
            f"stream_from {remote.redact(url)}", "neither a saved plan nor a finished store", "one of them",
            "chips.save_plan(path) writes the one, chips.to_zarr(path) the other.",
        )  # fmt: skip
    return batching.stream(shards)


def _of_one_split(url: str, split: str | None) -> Stored:
    chips = open_chips(url, split=split).stored
    splits = [name for name in chips.map.groups if name]
    if split is None and len(splits) > 1:
        raise PlanError(
            "stream_from(split=)", f"a store of {', '.join(splits)}", "the split to train on",
            f"Say split={splits[0]!r}. For all of them together: open_chips(path).stream(...).",
        )  # fmt: skip
    return chips


def _exists(url: str, name: str) -> bool:
    return remote.exists(remote.join(url, name))
