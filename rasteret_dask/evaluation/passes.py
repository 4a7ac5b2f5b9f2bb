# SPDX-License-Identifier: Apache-2.0
"""One pass over the chips: predictions beside labels, a task a shard, counts that add up."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from dask._task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from rasteret_dask.evaluation.confusion import DifferenceSums, Pairs
from rasteret_dask.evaluation.ground import repeated, repeats_of
from rasteret_dask.evaluation.reading import INVALID, OUTSIDE, VALID, Rasters
from rasteret_dask.evaluation.truth import Truth
from rasteret_dask.statistics.measuring import Pass, computed, on_shards
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Output, Shard

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["LOST", "Beside", "ShardCounts", "Patch", "parts_of", "patches_of"]

LOST = ("repeated", "unlabelled", "unpredicted", "invalid")
"""Why a pixel is not compared: an earlier chip has it; it has no label; no map is there; the map has none there."""

AT_ONCE = 64
"""Shards whose errors are in this process's memory at the same time."""


@dataclass(frozen=True, eq=False)
class Beside:
    """Chips, what is true on them, and what is predicted."""

    job: Job
    outputs: tuple[Output, ...]
    context: ReadContext
    truth: Truth
    predictions: Rasters
    once: bool
    """Whether pixels of ground that several chips show are compared in the first of them only."""

    @property
    def reading(self) -> ChipShards | None:
        """What is read; None where labels need no pixels, and no rule decides on chips by theirs."""
        if self.truth.band is None and not self.job.pixel_rules:
            return None
        return planned(self.job, self.outputs, self.context, only=(self.truth.source,))


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What the chips of a shard came to."""

    ids: tuple[str, ...]
    lost: NDArray[np.int64]
    """Shape (chip, reason). Pixels that were not compared, in the order of LOST."""
    exact: NDArray[np.bool_]
    """Shape (chip,). Whether all predictions are of pixels that are the chip's own."""
    counts: Pairs | DifferenceSums


@dataclass(frozen=True, slots=True)
class Patch:
    """Where predictions and labels differ, on the grid of one raster of the predictions."""

    raster: int
    row: int
    column: int
    values: NDArray[Any]
    """Shape (y, x). Of classes uint8: 0 not compared, 1 right, 2 wrong; of numbers float32, NaN where not compared."""


Earlier = Mapping[str, NDArray[np.float64]]
"""Id of a chip -> bounds of the earlier chips whose pixels it shows too, shape (chip, 4)."""


def parts_of(beside: Beside, client: ClientLike, progress: bool) -> list[ShardCounts]:
    """Compare all chips: a part a shard, in their order, whoever computes them."""
    graph, keys, look = _tasks(beside, _part, client, progress)
    return list(computed(graph, {key: (key,) for key in keys}, client, look))


def patches_of(
    beside: Beside, codes: Mapping[int, int], client: ClientLike, progress: bool
) -> Iterator[Patch]:
    """Yield where predictions and labels differ.

    Parameters
    ----------
    beside
        What is compared.
    codes
        Predicted class -> the class of the labels that it means, where these differ.
    client, progress
        As in :func:`parts_of`.
    """
    graph, keys, look = _tasks(beside, _patches, client, progress, dict(codes))
    for at in range(0, len(keys), AT_ONCE):
        some = keys[at : at + AT_ONCE]
        own = {key: task for key, task in graph.items() if key not in keys or key in some}
        for patches in computed(own, {key: (key,) for key in some}, client, look):
            yield from patches


def _tasks(
    beside: Beside, function: Callable[..., Any], client: ClientLike, progress: bool, *constants: Any
) -> tuple[dict[Hashable, Any], list[str], Pass]:
    """Return a graph with a task a shard, the tasks' keys, and what the pass is called."""
    job, reading = beside.job, beside.reading
    token = uuid.uuid4().hex[:16]  # maps change: another call must not take the results of this one
    truth, predictions = f"labels-{token}", f"predictions-{token}"
    graph: dict[Hashable, Any] = {
        truth: DataNode(truth, beside.truth),
        predictions: DataNode(predictions, beside.predictions),
    }
    earlier = _earlier(beside, client, progress)
    shards = list(job.shards())
    keys = [f"evaluate-{shard.name}-{token}" for shard in shards]
    if reading is None:
        for key, shard in zip(keys, shards, strict=True):
            own = slice(shard.start, shard.stop)
            ids = np.array(job.chips.column("chip_id")[own].to_pylist(), dtype=object)
            ground = {"chip_id": ids, "epsg": job.epsg[own], "bbox": job.bounds[own]}
            graph[key] = Task(
                key, _of_ground, DataNode(None, ground), TaskRef(truth), TaskRef(predictions), earlier(shard), function,
                constants,
            )  # fmt: skip
        return graph, keys, Pass("evaluate", progress=progress)
    roots, tasks = reading.tasks()
    graph |= roots
    for key, shard, (read, task) in zip(keys, shards, tasks, strict=True):
        asks = Task(
            key, _of_pixels, TaskRef(read), reading.part, TaskRef(truth), TaskRef(predictions), earlier(shard),
            function, constants,
        )  # fmt: skip
        graph[key] = Task.fuse(task, asks, key=key)
    return graph, keys, Pass("evaluate", reading.send_signatures, progress, reading.memory)


def _earlier(beside: Beside, client: ClientLike, progress: bool) -> Callable[[Shard], Earlier]:
    """Return what tells the chips of a shard which pixels were compared before them."""
    job = beside.job
    rows = np.concatenate([np.arange(h.start, h.stop) for h in job.hierarchies])
    table = job.chips.select(["epsg", "xmin", "ymin", "xmax", "ymax"]).take(pa.array(rows))
    repeats = repeats_of(table) if beside.once else None
    reading = beside.reading
    if repeats is not None and len(repeats) and job.pixel_rules and reading is not None:
        graph, keys = on_shards(reading, "kept", _ids)
        look = Pass(
            "counting the chips that filter_pixels() keeps", reading.send_signatures, progress, reading.memory
        )
        kept = {one for ids in computed(graph, {key: (key,) for key in keys}, client, look) for one in ids}
        ids = job.chips.column("chip_id").take(pa.array(rows)).to_pylist()
        repeats = repeats_of(table, np.array([one in kept for one in ids]))
    place = np.full(job.chips.num_rows, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))

    def of_shard(shard: Shard) -> Earlier:
        if repeats is None or not len(repeats):
            return {}
        own = slice(shard.start, shard.stop)
        ids = job.chips.column("chip_id")[own].to_pylist()
        return {
            one: boxes for one, boxes in zip(ids, repeats.of_chips(place[own]), strict=True) if len(boxes)
        }

    return of_shard


def _ids(result: Any, part: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(part(result, None)["chip_id"].tolist())


def _of_ground(
    arrays: Arrays, truth: Truth, predictions: Rasters, earlier: Earlier, function: Callable[..., Any],
    constants: tuple[Any, ...],
) -> Any:  # fmt: skip
    return function(arrays, truth, predictions, earlier, *constants)


def _of_pixels(
    result: Any, part: Callable[..., Any], truth: Truth, predictions: Rasters, earlier: Earlier,
    function: Callable[..., Any], constants: tuple[Any, ...],
) -> Any:  # fmt: skip
    return function(part(result, None), truth, predictions, earlier, *constants)


@dataclass(frozen=True, slots=True)
class _Compared:
    """One chip: what is true, what is predicted, and which pixels are compared."""

    truth: NDArray[Any]
    """Shape (y, x), as all that follow."""
    predicted: NDArray[Any]
    raster: NDArray[np.int32]
    there: NDArray[np.bool_]
    lost: tuple[int, ...]
    exact: bool


def _compared(arrays: Arrays, at: int, truth: Truth, predictions: Rasters, earlier: Earlier) -> _Compared:
    true, valid = truth.on(arrays, at)
    box, shape = arrays["bbox"][at], (true.shape[0], true.shape[1])
    seen = predictions.on(int(arrays["epsg"][at]), box.tolist(), shape)
    before = earlier.get(str(arrays["chip_id"][at]))
    new = np.ones(shape, dtype=bool) if before is None else ~repeated(box, shape, before)
    labelled = new & valid
    reasons = (~new, new & ~valid, labelled & (seen.state == OUTSIDE), labelled & (seen.state == INVALID))
    lost = tuple(int(np.count_nonzero(one)) for one in reasons)
    return _Compared(true, seen.values, seen.raster, labelled & (seen.state == VALID), lost, seen.exact)


def _part(arrays: Arrays, truth: Truth, predictions: Rasters, earlier: Earlier) -> ShardCounts:
    ids = tuple(map(str, arrays["chip_id"].tolist()))
    lost, exact = np.zeros((len(ids), len(LOST)), dtype=np.int64), np.ones(len(ids), dtype=bool)
    pairs, sums = [], []
    for at in range(len(ids)):  # one chip at a time is in memory as 64-bit numbers
        look = _compared(arrays, at, truth, predictions, earlier)
        lost[at], exact[at] = look.lost, look.exact
        own = look.truth[look.there], look.predicted[look.there]
        if predictions.is_class:
            pairs.append(Pairs.of(*own))
        else:
            sums.append(DifferenceSums.of(*own))
    counts = Pairs.together(pairs, range(len(ids))) if predictions.is_class else DifferenceSums.together(sums)
    return ShardCounts(ids, lost, exact, counts)


def _patches(
    arrays: Arrays, truth: Truth, predictions: Rasters, earlier: Earlier, codes: Mapping[int, int]
) -> list[Patch]:
    found = []
    for at in range(len(arrays["chip_id"])):
        look = _compared(arrays, at, truth, predictions, earlier)
        if predictions.is_class:
            differs = np.where(_recoded(look.predicted, codes) == look.truth, 1, 2)
            errors = np.where(look.there, differs, 0).astype(np.uint8)
        else:
            errors = np.where(look.there, look.predicted - look.truth, np.nan).astype(np.float32)
        for number in np.unique(look.raster[look.there]).tolist():
            own = look.there & (look.raster == number)
            grid = predictions.rasters[number].grid
            places = grid.places(
                int(arrays["epsg"][at]), arrays["bbox"][at].tolist(), (own.shape[0], own.shape[1])
            )
            rows, columns = (np.broadcast_to(v, own.shape)[own] for v in (places.rows, places.columns))
            found.append(_patch(number, rows, columns, errors[own]))
    return found


def _patch(raster: int, rows: NDArray[np.int64], columns: NDArray[np.int64], errors: NDArray[Any]) -> Patch:
    """Put errors where they belong; of several of one pixel the largest is left."""
    top, left = int(rows.min()), int(columns.min())
    shape = (int(rows.max()) - top + 1, int(columns.max()) - left + 1)
    values = np.full(shape, 0 if errors.dtype == np.uint8 else np.nan, dtype=errors.dtype)
    order = np.argsort(np.abs(errors), kind="stable")
    values[rows[order] - top, columns[order] - left] = errors[order]
    return Patch(raster, top, left, values)


def _recoded(values: NDArray[Any], codes: Mapping[int, int]) -> NDArray[Any]:
    """Return predicted classes as the classes of the labels that they mean."""
    if not codes:
        return values
    own, place = np.unique(values, return_inverse=True)
    return np.array([codes.get(one, one) for one in own.tolist()], dtype=np.int64)[place].reshape(
        values.shape
    )
