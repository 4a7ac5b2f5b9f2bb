# SPDX-License-Identifier: Apache-2.0
"""How much of each chip every class has: a column a class, made in one pass over masks or bands of classes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from dask._task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import MASK, PRESENT
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import digest
from rasteret_dask.rules.kinds import CLASS
from rasteret_dask.statistics.measuring import Pass, computed, on_shards
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Arrays, SourcePixels
from rasteret_dask.tasks.job import Job

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["ClassTarget", "burned_shares", "class_pixels", "class_shares", "class_target"]

MOST_CLASSES = 256
"""A target of more values would be a table of too many columns."""


@dataclass(frozen=True, slots=True)
class ClassTarget:
    """A mask, or a band of classes."""

    source: str
    band: int | None
    """None: the mask."""
    names: Mapping[int, str]
    """Value -> name, as far as names are known."""
    text: str
    """What the user called it."""
    mask: str = MASK
    """Which mask."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What some chips hold: ``share`` of ``value`` in the chip at the place ``chip`` of ``ids``."""

    ids: tuple[str, ...]
    chip: NDArray[np.int64]
    value: NDArray[np.int64]
    share: NDArray[np.float64]


def class_target(pixels: Mapping[str, SourcePixels], target: str) -> ClassTarget:
    """Return the mask or band that a target means, called as in ``Stats.classes``.

    Parameters
    ----------
    pixels
        Source -> what its pixels are.
    target
        ``"<source>/mask"``, a source with one band of classes, or ``"<source>/<band>"``.

    Raises
    ------
    PlanError
        When there is no such target, or its mask holds measured numbers.
    """
    known: dict[str, ClassTarget] = {}
    for name, own in pixels.items():
        bands = [at for at, kind in enumerate(own.kinds) if kind.kind == CLASS.name]
        for at in bands:
            text = f"{name}/{own.bands[at]}"
            known[text] = ClassTarget(name, at, dict(own.kinds[at].classes), text)
        if len(bands) == 1:
            known[name] = ClassTarget(name, bands[0], dict(own.kinds[bands[0]].classes), name)
        for mask in own.masks:
            if np.dtype(mask.dtype).kind != "f":
                text = f"{name}/{mask.name}"
                known[text] = ClassTarget(name, None, dict(enumerate(mask.classes[1:], 1)), text, mask.name)
    if target not in known:
        measured = target in {f"{name}/{mask.name}" for name, own in pixels.items() for mask in own.masks}
        raise PlanError(
            f"class_shares({target!r})", "a mask of floats" if measured else "no such target",
            f"one of {', '.join(known)}" if known else "a mask or a band of classes",
            "Burn a column of classes: chips(labels=, rasterize=); or say which bands hold classes: "
            "harmonize(kinds={'map': 'class'}).",
        )  # fmt: skip
    return known[target]


def class_shares(
    reading: ChipShards, target: ClassTarget, prefix: str, client: ClientLike = None, progress: bool = False
) -> pa.Table:
    """Return how much of each chip every class has, told by what is read.

    Parameters
    ----------
    reading
        The chips, with the target's source at least.
    target
        See :func:`class_target`.
    prefix
        Stands before the name of a class in the name of its column.
    client, progress
        As in :func:`rasteret_dask.statistics.measuring.measured`.
    """
    verb = f"shares-{digest(target.text)[:12]}"
    graph, keys = on_shards(reading, verb, _read, target)
    look = Pass("class_shares", reading.send_signatures, progress, reading.memory)
    return _table(computed(graph, {key: (key,) for key in keys}, client, look), target, prefix)


def burned_shares(
    job: Job, target: ClassTarget, prefix: str, client: ClientLike = None, progress: bool = False
) -> pa.Table:
    """Return the same of a mask that the job burns, without reading a pixel."""
    labels = next(one for one in job.labels if one.name == target.mask)
    size, tail = job.size_px[labels.source], job.digest[:16]
    root = f"labels-{digest(target.text)[:12]}-{tail}"
    graph: dict[Hashable, Any] = {root: DataNode(root, labels)}
    keys = []
    for shard in job.shards():
        own = slice(shard.start, shard.stop)
        ids = tuple(job.chips.column("chip_id")[own].to_pylist())
        keys.append(f"burn-shares-{shard.name}-{root}")
        graph[keys[-1]] = Task(keys[-1], _burn, TaskRef(root), ids, job.bounds[own], job.epsg[own], size)
    look = Pass("class_shares", progress=progress)
    return _table(computed(graph, {key: (key,) for key in keys}, client, look), target, prefix)


def class_pixels(arrays: Arrays, target: ClassTarget) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the values of a target, shape (chip, [time,] y, x), and where they are of a class."""
    if target.band is None:
        masks = arrays[f"{target.source}/{target.mask}"]
        return masks, masks != 0
    valid = arrays[f"{target.source}/valid"]
    if f"{target.source}/{PRESENT}" in arrays:
        valid = valid & arrays[f"{target.source}/{PRESENT}"][:, :, None, None]
    return arrays[target.source][:, :, target.band], valid


def _read(result: Any, part: Callable[[Any, NDArray[np.int64] | None], Arrays], target: ClassTarget) -> _Part:
    arrays = part(result, None)
    return _counted(arrays["chip_id"], *class_pixels(arrays, target))


def _burn(
    labels: Labels, ids: tuple[str, ...], bounds: NDArray[np.float64], epsg: NDArray[np.int64], size: int
) -> _Part:
    masks = labels.burned(bounds, epsg, size, ids)
    return _counted(ids, masks, masks != 0)


def _counted(ids: Iterable[str], values: NDArray[Any], valid: NDArray[np.bool_]) -> _Part:
    """Count the valid values of each chip, shape (chip, [time,] y, x); slots without any do not count."""
    chips, found, shares = [], [], []
    for at, (chip, seen) in enumerate(zip(values, valid, strict=True)):
        slots = np.count_nonzero(seen.any(axis=(-2, -1)))
        distinct, counts = np.unique(chip[seen], return_counts=True)
        chips.append(np.full(len(distinct), at, dtype=np.int64))
        found.append(distinct.astype(np.int64))
        shares.append(counts / max(slots * chip.shape[-2] * chip.shape[-1], 1))
    names = tuple(str(one) for one in ids)
    if not names:
        none = np.zeros(0, dtype=np.int64)
        return _Part((), none, none, np.zeros(0))
    return _Part(names, np.concatenate(chips), np.concatenate(found), np.concatenate(shares))


def _table(parts: Iterable[_Part], target: ClassTarget, prefix: str) -> pa.Table:
    parts = list(parts)
    ids = [name for part in parts for name in part.ids]
    values = sorted({*target.names, *(int(v) for part in parts for v in np.unique(part.value))})
    if len(values) > MOST_CLASSES:
        raise PlanError(
            f"class_shares({target.text!r})", f"{len(values):,} different values", f"at most {MOST_CLASSES} classes",
            "Group them: a column or band of fewer classes.",
        )  # fmt: skip
    shares = np.zeros((len(values), len(ids)))
    first = 0
    for part in parts:
        shares[np.searchsorted(values, part.value), first + part.chip] = part.share
        first += len(part.ids)
    columns = dict(zip(_columns(values, target.names, prefix), shares, strict=True))
    return pa.table({"chip_id": pa.array(ids, pa.string()), **columns})


def _columns(values: list[int], names: Mapping[int, str], prefix: str) -> list[str]:
    """Name a column for each value: after its class, or its number where classes have no name or share one."""
    said = [names.get(value) or str(value) for value in values]
    return [
        f"{prefix}{name if said.count(name) == 1 else value}"
        for name, value in zip(said, values, strict=True)
    ]
