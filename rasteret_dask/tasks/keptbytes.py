"""How many bytes of decoded pixels a process keeps so that it fetches no tile twice, and what shards share."""

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

__all__ = ["MOST_KEPT_BYTES", "kept_bytes", "shared_bytes", "spread"]

MOST_KEPT_BYTES = 512 * 2**20
"""A process keeps no more, as its worker's memory is counted with this: beyond it tiles are fetched again."""

REACH_PX = 6
"""Pixels that resampling reaches beyond a chip."""

ALIGNED_PX = 1e-4
"""Pixel edges nearer than this are the same edge."""


def kept_bytes(job: Job, threads: int = CPU_COUNT) -> int:
    """Return the bytes of pixels kept at most, while so many shards are read at a time in running order.

    A part of a tile is kept from its first shard to its last; a session keeps what it needs again, too.
    """
    if threads not in job.kept:
        most = [_kept(job, number, threads) for number in range(len(job.sources))]
        job.kept[threads] = min(int(np.sum(most, axis=0).max(initial=0)), MOST_KEPT_BYTES)
    return job.kept[threads]


def shared_bytes(job: Job) -> tuple[NDArray[np.int64], int]:
    """Return the decoded bytes of tiles that are needed on both sides of each border of two shards, and of all tiles.

    Returns
    -------
    tuple
        Shape (shard - 1,), in running order: what is fetched once more where another process goes on at that border.
        Then the bytes of all tiles of the job.
    """
    shards = int(job.running.max(initial=-1)) + 1
    change, total = np.zeros(shards + 1, dtype=np.int64), 0
    for number in range(len(job.sources)):
        for spans in _tile_spans(job, number):
            np.add.at(change, spans.since, spans.whole)
            np.add.at(change, spans.until, -spans.whole)
            total += int(spans.whole.sum())
    return np.cumsum(change)[: max(shards - 1, 0)], total


def _kept(job: Job, source: int, threads: int) -> NDArray[np.int64]:
    """Return the bytes that are kept for one source while each shard is read; shape (shard,)."""
    shards = int(job.running.max(initial=-1)) + 1
    change = np.zeros(shards + 1, dtype=np.int64)
    for spans in _tile_spans(job, source):
        np.add.at(change, np.maximum(spans.since - threads + 1, 0), spans.held)
        np.add.at(change, spans.until + 1, -spans.held)
    return np.cumsum(change)[:shards]


@dataclass(frozen=True, slots=True)
class _Spans:
    """When the tiles of one source's files are needed; one entry per tile of files whose pixels lie alike."""

    since: NDArray[np.int64]
    """Shape (tile,). The first shard that needs it, in running order."""
    until: NDArray[np.int64]
    """Shape (tile,). The last one."""
    held: NDArray[np.int64]
    """Shape (tile,). Decoded bytes of the part that is kept meanwhile."""
    whole: NDArray[np.int64]
    """Shape (tile,). Decoded bytes of the tile."""


def _tile_spans(job: Job, source: int) -> Iterator[_Spans]:
    feeds = job.feeds
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
                yield from _spans_of(job, _Read(chip[own], row[own], level, epsg, warped, bytes_px))


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
    names, shape = tuple(bands), (len(bands), len(records))
    transform = pc.list_flatten(_whole(records.level_fields(names, "transform").combine_chunks()))
    sizes = [_numbers(records, names, field, 0) for field in ("width", "height", "tile_width", "tile_height")]
    level = np.concatenate(
        [np.reshape(transform.to_numpy(), (*shape, 6))[..., [0, 2, 4, 5]], np.stack(sizes, -1)], axis=-1
    )
    chunky = _numbers(records, names, "planar", 0) == 1
    hrefs = records.asset_fields(names, "href").combine_chunks().dictionary_encode().indices
    file = np.reshape(pc.fill_null(hrefs, -1).to_numpy(), shape).astype(np.int64)
    again = np.ones(shape, dtype=bool)  # files that a band before has brought
    again.ravel()[np.unique(file * shape[1] + np.arange(shape[1]), return_index=True)[1]] = False
    dtypes = np.array(records.level_fields(names, "dtype").to_pylist(), dtype=object).reshape(shape)
    size = np.zeros(shape, dtype=np.int64)
    for dtype in {d for d in dtypes.ravel() if d}:
        size[dtypes == dtype] = np.dtype(dtype).itemsize
    held = np.where(chunky, _numbers(records, names, "samples", 1), 1) * (size + 1)  # a mask may lie beside
    held = np.where((chunky & again) | (size == 0), 0, held).astype(np.int64)
    layouts: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    for one, nbytes in zip(level, held, strict=True):
        same = next((total for known, total in layouts if np.array_equal(known, one)), None)
        if same is None:
            layouts.append((one, nbytes))
        else:
            same += nbytes
    yield from layouts


def _numbers(records: Records, bands: tuple[str, ...], field: str, missing: int) -> NDArray[Any]:
    """Return a field of the full-resolution levels, shape (band, record)."""
    values = pc.fill_null(records.level_fields(bands, field), missing)
    return np.reshape(np.asarray(values.to_numpy()), (len(bands), len(records)))


def _whole(transforms: Any) -> Any:
    return pc.fill_null(transforms, pa.scalar([0.0] * 6, type=transforms.type))


def _spans_of(job: Job, read: _Read) -> Iterator[_Spans]:
    """Yield when each tile is needed, where any is."""
    # Records of one place's dates lie alike: what is under a chip is worked out once for all of them.
    layouts, example, layout = np.unique(
        np.column_stack([read.level, read.epsg]), axis=0, return_index=True, return_inverse=True
    )
    chips = job.chips.num_rows
    layout = np.ravel(layout)  # NumPy 2.0 gives it a second dimension
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
    tiles = int(number.max()) + 1
    key, keys = pd.factorize(read.row[entry].astype(np.int64) * tiles + number[part])
    first = [_extreme(np.minimum, begin[:, axis][part], key, len(keys)) for axis in (0, 1)]
    last = [_extreme(np.maximum, end[:, axis][part], key, len(keys)) for axis in (0, 1)]
    when = job.running[read.chip][entry]
    since, until = (_extreme(which, when, key, len(keys)) for which in (np.minimum, np.maximum))
    row = keys // tiles
    bytes_px = read.bytes_px[row]
    held = ((last[0] - first[0]) * (last[1] - first[1])).astype(np.int64) * bytes_px
    held[(since == until) & ~read.again[row]] = 0
    whole = read.level[row][:, 6:].prod(axis=1).astype(np.int64) * bytes_px
    yield _Spans(since, until, held, whole)


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
