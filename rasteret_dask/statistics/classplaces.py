# SPDX-License-Identifier: Apache-2.0
"""Where in each chip the pixels of every class lie: some places a class, for windows that are drawn around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import digest, is_number
from rasteret_dask.planning.sampling import unit_sequence
from rasteret_dask.statistics.classshares import ClassTarget, class_pixels
from rasteret_dask.statistics.measuring import Pass, computed, on_shards
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.tasks.batches import Arrays

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["class_places"]

PLACES = pa.schema(
    [
        pa.field("chip_id", pa.string(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("y", pa.float64(), nullable=False),  # share of the chip's side, from its north edge on
        pa.field("x", pa.float64(), nullable=False),  # from its west edge on
        pa.field("pixels", pa.int64(), nullable=False),  # of the class, in the chip
    ]
)
MOST_PLACES = 1_000


def class_places(
    reading: ChipShards,
    target: ClassTarget,
    per_chip: int,
    seed: int,
    client: ClientLike = None,
    progress: bool = False,
) -> pa.Table:
    """Return places of pixels of each class in each chip, as columns of ``PLACES``.

    Parameters
    ----------
    reading
        The chips, with the target's source at least.
    target
        See :func:`rasteret_dask.statistics.classshares.class_target`.
    per_chip
        Places of a class in a chip, at most.
    seed
        Another seed takes others.
    client, progress
        As in :func:`rasteret_dask.statistics.measuring.measured`.

    Raises
    ------
    PlanError
        When the number of places is none.
    """
    if not (is_number(per_chip) and int(per_chip) == per_chip and 0 < per_chip <= MOST_PLACES):
        raise PlanError("class_places(per_chip=)", repr(per_chip), f"1 to {MOST_PLACES:,} places")
    verb = f"places-{digest(target.text, int(per_chip), seed)[:12]}"
    graph, keys = on_shards(reading, verb, _read, target, int(per_chip), seed)
    look = Pass("class_places", reading.send_signatures, progress, reading.memory)
    parts = list(computed(graph, {key: (key,) for key in keys}, client, look))
    return pa.concat_tables([PLACES.empty_table(), *parts]).combine_chunks()


def _read(
    result: Any,
    part: Callable[[Any, NDArray[np.int64] | None], Arrays],
    target: ClassTarget,
    per_chip: int,
    seed: int,
) -> pa.Table:
    arrays = part(result, None)
    values, valid = class_pixels(arrays, target)
    rows: list[tuple[str, str, float, float, int]] = []
    for chip, pixels, seen in zip(arrays["chip_id"].tolist(), values, valid, strict=True):
        height, width = pixels.shape[-2:]
        for value in np.unique(pixels[seen]).tolist():
            there = np.flatnonzero((pixels == value) & seen)
            name = target.names.get(int(value)) or str(int(value))
            unit = unit_sequence(f"places|{seed}|{chip}|{name}|", np.arange(per_chip, dtype=np.uint64))
            at = there if len(there) <= per_chip else np.unique(there[(unit * len(there)).astype(np.int64)])
            row, col = np.divmod(np.unique(at % (height * width)), width)
            y, x = ((row + 0.5) / height).tolist(), ((col + 0.5) / width).tolist()
            rows += [(str(chip), name, *place, len(there)) for place in zip(y, x, strict=True)]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(PLACES)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PLACES, strict=True)], schema=PLACES)
