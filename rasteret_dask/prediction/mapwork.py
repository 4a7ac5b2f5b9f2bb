# SPDX-License-Identifier: Apache-2.0
"""One block of a map: its chips are read some at a time, the model sees them, and what it says is blended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.errors import ModelError
from rasteret_dask.net.lending import Lender
from rasteret_dask.planning.plan import Function
from rasteret_dask.prediction.blending import Blend, Canvas
from rasteret_dask.prediction.mapgrid import MapBlock, MapGrid, owned
from rasteret_dask.prediction.mapjob import shards_of
from rasteret_dask.prediction.mapstore import COUNT, INPUTS
from rasteret_dask.prediction.models import ModelParcel
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.streams.planned import kept_arrays
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.shards import Shipped, read_chips
from rasteret_dask.words import OnError

__all__ = ["BlockFigures", "BlockWork"]


@dataclass(frozen=True)
class BlockFigures:
    """A computed block, and what computing it took."""

    arrays: Mapping[str, NDArray[Any]]
    """Name -> pixels of the block: the output's variable, ``count`` and ``inputs``."""
    report: Mapping[str, Any]
    """As a unit's report has it."""


@dataclass(frozen=True)
class BlockWork:
    """How the blocks of a map are computed: what all tasks share beside the job."""

    grids: tuple[MapGrid, ...]
    output: ModelOutput
    blend: Blend
    least: int
    """Valid inputs (source, slot) that a pixel must have."""
    block_px: int
    on_error: OnError
    functions: tuple[Function, ...]
    """The user's, whose code comes as roots behind the model."""
    memory: Lender = field(default_factory=Lender, repr=False, compare=False)
    """Of canvases: one block's becomes the next one's."""

    def compute(
        self, job: Job, number: int, block: MapBlock, parcel: ModelParcel, *shipped: Shipped
    ) -> BlockFigures:
        """Compute one block.

        Parameters
        ----------
        job
            The map's job.
        number
            Of the block's hierarchy.
        block
            Where it lies.
        parcel
            The model.
        shipped
            The user's functions.

        Raises
        ------
        ModelError
            When the model raises, or says nothing (NaN) of a valid pixel.
        """
        calls = {function: one.call for function, one in zip(self.functions, shipped, strict=True)}
        context = ReadContext(calls, self.on_error)
        runner, grid = parcel.runner(), self.grids[block.grid]
        canvas = Canvas(self.blend, self.output.channels, (block.height, block.width), self.memory)
        north = grid.north - block.row * self.block_px * grid.pixel
        west = grid.west + block.col * self.block_px * grid.pixel
        hierarchy = job.hierarchies[number]
        rows = slice(hierarchy.start, hierarchy.stop)
        here = owned(grid, job.bounds[rows], block, self.block_px)
        ids_here = job.chips.column("chip_id").slice(hierarchy.start, hierarchy.chips).filter(pa.array(here))
        tally = _Tally([plan.name for plan in job.sources], set(ids_here.to_pylist()))
        with runner.reading():
            for shard in shards_of(hierarchy):
                sources = read_chips(job, shard, context, warns=False)
                tally.add(sources)
                arrays = kept_arrays(sources, None)
                del sources
                ids = arrays["chip_id"]
                if not len(ids):
                    continue
                inputs, bounds = valid_inputs(job, arrays, self.output.side or 1), arrays["bbox"]
                begin = time.perf_counter()
                for start, answer in runner.answers(arrays):
                    some = ids[start : start + len(answer)]
                    values = self.output.numbers(answer, some)
                    modelled = time.perf_counter()
                    for at, numbers in enumerate(values, start):
                        self._check(numbers, inputs[at], str(ids[at]))
                        row = round((north - bounds[at, 3]) / grid.pixel)
                        col = round((bounds[at, 0] - west) / grid.pixel)
                        canvas.put(numbers, inputs[at], self.least, row, col)
                    tally.spend("predict", modelled - begin)
                    activity.spent("predict", modelled - begin)
                    begin = time.perf_counter()
                    tally.spend("blend", begin - modelled)
                    del answer, values
                del arrays
        blended = self.output.stored(canvas.blended())
        arrays_out = {
            self.output.variable: blended[0] if blended.ndim == 3 and self.output.is_flat else blended,
            COUNT: canvas.count,
            INPUTS: canvas.inputs,
        }
        return BlockFigures(arrays_out, tally.report)

    def _check(self, values: NDArray[np.float32], inputs: NDArray[np.uint16], chip: str) -> None:
        if not np.isnan(values.min()):
            return
        missing = np.isnan(values).any(axis=0)
        if (missing & (inputs >= self.least)).any():
            count = int((missing & (inputs >= self.least)).sum())
            raise ModelError(
                f"chip {chip}", f"NaN from the model for {count:,} of {missing.size:,} pixels whose input is valid",
                "a number for each valid pixel",
                "Invalid pixels are Model(fill=) when the model sees them: choose a number that it knows; or ask for "
                "more valid inputs: predict(min_inputs=).",
            )  # fmt: skip


def valid_inputs(job: Job, arrays: Arrays, side: int) -> NDArray[np.uint16]:
    """Return how many valid inputs (source, slot) each pixel of a model's output has, shape (chip, y, x).

    A pixel of another size than a source's has the validity of the source's pixel under its centre; one as large as the
    chip is valid where any of the chip's is.

    Parameters
    ----------
    job
        Tells how far windows of a source reach beyond the chips.
    arrays
        The chips.
    side
        Side of the output of a chip, pixels.
    """
    total = np.zeros((len(arrays["chip_id"]), side, side), dtype=np.uint16)
    for number, plan in enumerate(job.sources):
        valid = arrays[f"{plan.name}/valid"]
        if side == 1:
            total += valid.any(axis=(2, 3)).sum(axis=1, dtype=np.uint16)[:, None, None]
            continue
        count = valid.sum(axis=1, dtype=np.uint16)
        edge = job.reach_m(number) / plan.resolution
        own = count.shape[1] - 2 * edge
        at = np.floor(edge + (np.arange(side) + 0.5) * own / side + 1e-9).astype(np.int64)
        if own == side and not edge:
            total += count
        else:
            total += count[:, at[:, None], at[None, :]]
    return total


class _Tally:
    """What the shards of a block took, summed up. Of a chip in several blocks, one tells that it was dropped."""

    def __init__(self, names: Sequence[str], chips: Collection[str]) -> None:
        self._names, self._chips = names, chips
        self._dropped: dict[str, str] = {}
        self._counts = {name: Counter[str]() for name in names}
        self._clipped = {name: Counter[str]() for name in names}
        self._unreadable: dict[str, list[str]] = {name: [] for name in names}
        self._valid: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
        self._seconds: dict[str, float] = {}

    def add(self, sources: Mapping[str, Any]) -> None:
        """Add what reading a shard took."""
        for name, dataset in sources.items():
            attrs = dataset.attrs
            self._counts[name].update(attrs.get("counts", {}))
            self._clipped[name].update(attrs.get("clipped", {}))
            self._unreadable[name] += attrs.get("unreadable", [])
            shares = dataset["valid_fraction"].values
            self._valid[name][0] += float(shares.sum(dtype=np.float64))
            self._valid[name][1] += float(shares.size)
            for stage, seconds in attrs.get("seconds", {}).items():
                self.spend(f"{stage}/{name}", seconds)
        dropped = sources[self._names[0]].attrs.get("dropped", {})
        self._dropped.update({chip: why for chip, why in dropped.items() if chip in self._chips})

    def spend(self, stage: str, seconds: float) -> None:
        """Add to what a stage took."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @property
    def report(self) -> dict[str, Any]:
        """The sums, as a unit's report has them."""
        result: dict[str, Any] = {"dropped": self._dropped, "seconds": self._seconds}
        for name in self._names:
            valid, shares = self._valid[name]
            result[f"counts/{name}"] = dict(self._counts[name])
            result[f"clipped/{name}"] = dict(self._clipped[name])
            result[f"unreadable/{name}"] = self._unreadable[name]
            result[f"masked/{name}"] = round(1.0 - valid / shares, 6) if shares else 0.0
        return result
