# SPDX-License-Identifier: Apache-2.0
"""Streams for processes that did not make the plan: training workers, from a saved plan or a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.net.sums import document_of, sealed
from rasteret_dask.planning.functions import Function
from rasteret_dask.store.stored import Stored
from rasteret_dask.storeset import open_chips
from rasteret_dask.streams.augmenting import Augment
from rasteret_dask.streams.chipshards import ChipShards, stored_chips
from rasteret_dask.streams.planned import planned
from rasteret_dask.streams.stream import Batching, Normalize, Stream
from rasteret_dask.streams.weights import WeightsLike
from rasteret_dask.tasks.context import Functions, ReadContext
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.jobfile import JOB_FILE, open_job, read_note, write_job
from rasteret_dask.tasks.mapping import outputs_of
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.prediction.modelchips import HasJob, ModelChips

__all__ = ["save_plan", "saved_chips", "stream_from"]

_SIZES = "sizes.json"  # kept chips of each shard, where rules on pixels drop some
_GROUND = "ground.json"  # what a plan says of maps and times beside its job
_PROVENANCE = "provenance.json"


def save_plan(chips: HasJob, place: str | os.PathLike[str], sizes: tuple[int, ...] | None = None) -> None:
    """Write a plan, JSON and Arrow tables, to a new folder.

    Parameters
    ----------
    chips
        The planned chips.
    place
        A folder of its own: a local path or a URL.
    sizes
        Kept chips of each shard, where the job has rules on pixels.

    Raises
    ------
    StoreError
        When something else lies there.
    """
    from rasteret_dask.prediction.modelchips import chips_of

    folder, job = Place.of(place), chips.job
    url = folder.url
    names = set() if folder.is_file else set(remote.listing(url))
    note = read_note(url) if JOB_FILE in names else {}
    if note.get("digest") == job.digest:
        return
    if names or folder.is_file:
        raise StoreError(
            f"save_plan {remote.redact(url)}", "another plan" if note else "something else", "an empty place",
            "Choose another place, or delete what lies there.",
        )  # fmt: skip
    if sizes is not None:
        remote.put(remote.join(url, _SIZES), sealed({"digest": job.digest, "sizes": list(sizes)}))
    own = chips_of(chips)
    remote.put(remote.join(url, _GROUND), sealed({"digest": job.digest, **own.ground.to_json()}))
    remote.put(remote.join(url, _PROVENANCE), own.provenance.to_bytes())
    write_job(job, url)


def saved_chips(plan: str | os.PathLike[str], functions: Iterable[Callable[..., Any]] = ()) -> ModelChips:
    """Return the chips of a saved plan, as models and exports take them.

    Parameters
    ----------
    plan
        Where :meth:`Chips.save_plan` wrote it.
    functions
        As of :func:`stream_from`.

    Raises
    ------
    StoreError
        When there is no saved plan, it is damaged, or an earlier version wrote it.
    PlanError
        When the plan calls a function that is not among ``functions``.
    """
    from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
    from rasteret_dask.chipping.frame import frame_of, outline_wkb
    from rasteret_dask.prediction.modelchips import ChipGround, ModelChips
    from rasteret_dask.store.provenance import Provenance

    url = Place.of(plan).url
    job = open_job(url, str(read_note(url)["digest"]))
    job.check_signatures()
    ground, origins = (_beside(url, name) for name in (_GROUND, _PROVENANCE))
    if ground is None or origins is None or ground["digest"] != job.digest:
        raise StoreError(
            f"plan {remote.redact(url)}", "no account of maps and origins beside it", "what save_plan writes",
            "Save the plan again.",
        )  # fmt: skip
    outlines = outline_wkb(frame_of(job.chips))
    table = job.chips.append_column(CHIP_SCHEMA.field("geometry"), outlines)
    known = [name for name in CHIP_SCHEMA.names if name in table.column_names]
    table = table.select([*known, *(name for name in table.column_names if name not in known)])
    whole = replace(job, chips=table)
    return ModelChips(whole, _matched(job, tuple(functions)), ChipGround.of(ground), Provenance.of(origins))


def _beside(url: str, name: str) -> Mapping[str, Any] | None:
    """Return a document beside a plan; None where it is missing or damaged."""
    try:
        return document_of(remote.get(remote.join(url, name)))
    except remote.MissingError:
        return None


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
        The functions that the plan calls (those given to ``map`` and ``filter_pixels``): a saved plan holds their
        names and digests, never code, and nothing is imported or unpickled because a file says so.
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
        shards = _planned(url, tuple(functions), on_error)
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


def _planned(url: str, functions: tuple[Callable[..., Any], ...], on_error: OnError) -> ChipShards:
    job = open_job(url, str(read_note(url)["digest"]))
    job.check_signatures()
    known = _matched(job, functions)
    sizes = _sizes(url, job) if job.pixel_rules else None
    return planned(job, outputs_of(job, known), ReadContext(known, on_error), sizes)


def _sizes(url: str, job: Job) -> tuple[int, ...]:
    """Return how many chips of each shard are kept."""
    text = document_of(remote.get(remote.join(url, _SIZES)))
    if text is None or text["digest"] != job.digest:
        raise StoreError(
            f"plan {remote.redact(url)}", f"a {_SIZES} that does not match its checksum", "what save_plan wrote",
            "Save the plan again.",
        )  # fmt: skip
    return tuple(text["sizes"])


def _matched(job: Job, functions: tuple[Callable[..., Any], ...]) -> Functions:
    """Return the functions that a job names."""
    given = {(f.__module__, f.__qualname__): f for f in functions}
    wanted = {f: None for source in range(len(job.sources)) for f in job.functions(source)}
    wanted |= {rule.function: None for rule in job.pixel_rules if rule.function is not None}
    found = {}
    for function in wanted:
        call = given.get((function.module, function.name))
        if call is None:
            raise PlanError(
                "stream_from(functions=)", f"no {function.module}.{function.name}",
                "every function that the plan calls",
                f"Give it: stream_from(..., functions=[{function.name}]).",
            )  # fmt: skip
        if not function.source.startswith("version ") and Function.of(call) != function:
            raise PlanError(
                "stream_from(functions=)", f"a {function.module}.{function.name} that says something else",
                "the one that the plan was made with", "Save the plan again, or use the same version of your code.",
            )  # fmt: skip
        found[function] = call
    return found


def _exists(url: str, name: str) -> bool:
    return remote.exists(remote.join(url, name))
