"""How many bytes of decoded pixels a process keeps at any time, so that no tile of a job is fetched twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from rasteret_dask.table.records import Records
from rasteret_dask.tasks.job import Job

__all__ = ["MOST_KEPT_BYTES", "kept_bytes", "spread"]

MOST_KEPT_BYTES = 512 * 2**20
"""A process keeps no more, as its worker's memory is counted with this: beyond it tiles are fetched again."""

REACH_PX = 6
"""Pixels that resampling reaches beyond a chip."""

ALIGNED_PX = 1e-4
"""Pixel edges nearer than this are the same edge."""

FIELDS = ("transform", "planar", "samples", "dtype", "width", "height", "tile_width", "tile_height")
"""Of a file's image."""


def kept_bytes(job: Job, threads: int = CPU_COUNT) -> int:
    """Return the bytes of pixels kept at most, while so many shards are read at a time in running order.

    A part of a tile is kept from its first shard to its last; a session keeps what it needs again, too.
    """
    if threads not in job.kept:
        most = [_kept(job, number, threads) for number in range(len(job.sources))]
        job.kept[threads] = min(int(np.sum(most, axis=0).max(initial=0)), MOST_KEPT_BYTES)
    return job.kept[threads]


def _kept(job: Job, source: int, threads: int) -> NDArray[np.int64]:
    """Return the bytes that are kept for one source while each shard is read; shape (shard,)."""
    feeds, shards = job.feeds, int(job.running.max(initial=-1)) + 1
    change = np.zeros(shards + 1, dtype=np.int64)
    of_source = feeds.source == source
    chip, row = feeds.chip[of_source].astype(np.int64), feeds.row[of_source].astype(np.int64)
    here = job.running[chip] >= 0
    slot = chip * job.sources[source].times + feeds.slot[of_source]
    later = np.ones(len(chip), dtype=bool)
    later[np.unique(slot, return_index=True)[1]] = False
    again = np.zeros(len(job.records[source]), dtype=bool)
    again[row[later]] = True  # records that fill others
    chip, row = chip[here], row[here]
    resolution = job.sources[source].resolution
    for number, member in enumerate(job.sources[source].members):
        of_member = job.members[source][row] == number
        for level, bytes_px in _levels(job.records[source], dict.fromkeys(member.reads)):
            own = of_member & (bytes_px[row] > 0)
            if own.any():
                warped = again | (np.abs(np.abs(level[:, 0]) - resolution) > ALIGNED_PX * resolution)
                epsg = job.records[source].epsg
                _add(change, job, threads, _Read(chip[own], row[own], level, epsg, warped, bytes_px))
    return np.cumsum(change)[:shards]


@dataclass(frozen=True, slots=True)
class _Read:
    """What is read of files whose pixels lie alike; one entry per chip and record."""

    chip: NDArray[np.int64]
    row: NDArray[np.int64]
    level: NDArray[np.float64]
    """Shape (record, 8): a, c, e, f of the transform, width, height, tile width, tile height."""
    epsg: NDArray[np.int32]
    """Shape (record,)."""
    again: NDArray[np.bool_]
    """Shape (record,). Whether one shard may read a tile more than once."""
    bytes_px: NDArray[np.int64]
    """Shape (record,). Bytes of a pixel over all these files."""


def _levels(
    records: Records, bands: dict[str, None]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Yield layouts of pixels and the bytes of a pixel of all files that have them; bands of one file count once."""
    layouts: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    files: list[NDArray[Any]] = []
    for band in bands:
        transform, planar, samples, dtype, *sizes = records.level_fields(band, FIELDS)
        flat = pc.list_flatten(_whole(transform.combine_chunks())).to_numpy()
        level = np.column_stack(
            [
                np.reshape(flat, (-1, 6))[:, [0, 2, 4, 5]],
                *(pc.fill_null(size, 0).to_numpy() for size in sizes),
            ]
        )
        href = np.array(records.asset_field(band, "href").to_pylist(), dtype=object)
        chunky = np.asarray(pc.fill_null(planar, 0).to_numpy()) == 1
        again = chunky & np.any([href == other for other in files] or [np.zeros(len(href), bool)], axis=0)
        files.append(href)
        samples = np.asarray(pc.fill_null(samples, 1).to_numpy())
        size = np.array([np.dtype(d).itemsize if d else 0 for d in dtype.to_pylist()])
        held = np.where(chunky, samples, 1) * (size + 1)  # a mask may lie beside
        held = np.where(again | (size == 0), 0, held).astype(np.int64)
        same = next((total for known, total in layouts if np.array_equal(known, level)), None)
        if same is None:
            layouts.append((level, held))
        else:
            same += held
    yield from layouts


def _whole(transforms: Any) -> Any:
    return pc.fill_null(transforms, pa.scalar([0.0] * 6, type=transforms.type))


def _add(change: NDArray[np.int64], job: Job, threads: int, read: _Read) -> None:
    """Add the parts that are kept: ``change`` is how many bytes come with each shard, and go."""
    # Records of one place's dates lie alike: what is under a chip is worked out once for all of them.
    layouts, example, layout = np.unique(
        np.column_stack([read.level, read.epsg]), axis=0, return_index=True, return_inverse=True
    )
    chips = job.chips.num_rows
    pair, pairs = pd.factorize(layout[read.row] * chips + read.chip)
    kind, chip = np.divmod(pairs, chips)
    tile = layouts[kind][:, [7, 6]]
    across = np.ceil(layouts[kind][:, 4] / tile[:, 1]).astype(np.int64)
    spans = _spans(job, replace(read, chip=chip, row=example[kind]))
    low, high = np.floor(spans[:, :, 0] / tile), np.ceil(spans[:, :, 1] / tile)
    count = np.maximum(high - low, 0).astype(np.int64)
    total = count.prod(axis=1)
    part, nth = spread(total)
    at = low[part].astype(np.int64) + np.stack(np.divmod(nth, np.maximum(count[part, 1], 1)), -1)
    corner = at * tile[part]
    begin = np.maximum(spans[part, :, 0], corner)
    end = np.minimum(spans[part, :, 1], corner + tile[part])
    number = at[:, 0] * across[part] + at[:, 1]
    entry, nth = spread(total[pair])
    if not len(entry):
        return
    part = (np.cumsum(total) - total)[pair][entry] + nth
    key, keys = pd.factorize(read.row[entry].astype(np.int64) * (int(number.max()) + 1) + number[part])
    first = [_extreme(np.minimum, begin[:, axis][part], key, len(keys)) for axis in (0, 1)]
    last = [_extreme(np.maximum, end[:, axis][part], key, len(keys)) for axis in (0, 1)]
    when = job.running[read.chip][entry]
    since, until = (_extreme(which, when, key, len(keys)) for which in (np.minimum, np.maximum))
    row = keys // (int(number.max()) + 1)
    held = ((last[0] - first[0]) * (last[1] - first[1])).astype(np.int64) * read.bytes_px[row]
    held[(since == until) & ~read.again[row]] = 0
    since = np.maximum(since - threads + 1, 0)
    np.add.at(change, since, held)
    np.add.at(change, until + 1, -held)


def spread(count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers 0, 1, ... as often as each is counted, and which of its own each is."""
    number = np.repeat(np.arange(len(count)), count)
    return number, np.arange(len(number)) - np.repeat(np.cumsum(count) - count, count)


def _extreme(which: np.ufunc, values: NDArray[Any], key: NDArray[np.int64], keys: int) -> NDArray[Any]:
    """Return the smallest or largest value of each key."""
    result = np.empty(keys, dtype=values.dtype)
    result[key] = values
    which.at(result, key, values)
    return result


def _spans(job: Job, read: _Read) -> NDArray[np.float64]:
    """Return the pixels of the file under each chip and its surroundings, shape (entry, 2, 2): row, col; from, to."""
    spans = np.zeros((len(read.row), 2, 2))
    epsg = read.epsg[read.row]
    for code in np.unique(epsg[epsg > 0]).tolist():
        own = np.flatnonzero(epsg == code)
        a, c, e, f, width, height = read.level[read.row[own], :6].T
        west, south, east, north = job.bounds_in(read.chip[own], code).T
        for axis, ends, size in ((0, ((north - f) / e, (south - f) / e), height),
                                 (1, ((west - c) / a, (east - c) / a), width)):  # fmt: skip
            low, high = np.minimum(*ends) - REACH_PX, np.maximum(*ends) + REACH_PX
            spans[own, axis] = np.stack([np.clip(low, 0, size), np.clip(high, 0, size)], -1)
    return spans
