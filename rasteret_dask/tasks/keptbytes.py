# SPDX-License-Identifier: Apache-2.0
"""How many bytes of decoded pixels a process keeps so that it fetches no tile twice, and what shards share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Lock
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


PART_CHIPS = 2**16
"""Chips and records that feed them whose tiles are counted at a time: memory stays near, and some may be enough."""

_COUNTING = Lock()


def _renew() -> None:
    global _COUNTING
    _COUNTING = Lock()


os.register_at_fork(after_in_child=_renew)


def kept_bytes(job: Job, threads: int = CPU_COUNT) -> int:
    """Return the bytes of pixels kept at most, while so many shards are read at a time in running order.

    A part of a tile is kept from its first shard to its last; a session keeps what it needs again, too.
    """
    if threads not in job.kept:
        with _COUNTING:  # the first shards of a process ask at the same time
            if threads not in job.kept:
                most = 0
                for kept in _kept(job, threads):
                    most = int(kept.max(initial=0))
                    if most >= MOST_KEPT_BYTES:  # more tiles make it no less
                        break
                job.kept[threads] = min(most, MOST_KEPT_BYTES)
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


def _kept(job: Job, threads: int) -> Iterator[NDArray[np.int64]]:
    """Yield the bytes that are kept while each shard is read, shape (shard,): of ever more tiles, of all in the end."""
    shards = int(job.running.max(initial=-1)) + 1
    change = np.zeros(shards + 1, dtype=np.int64)
    for source in range(len(job.sources)):
        for spans in _tile_spans(job, source):
            np.add.at(change, np.maximum(spans.since - threads + 1, 0), spans.held)
            np.add.at(change, spans.until + 1, -spans.held)
            yield np.cumsum(change)[:shards]


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
    feeds, runs = job.feeds, job.feeds.alike
    run, nth = spread(feeds.offsets[runs[:-1] + 1] - feeds.offsets[runs[:-1]])
    entry = feeds.offsets[runs[:-1]][run] + nth
    of_source = feeds.source[entry] == source
    run, row = run[of_source], feeds.row[entry[of_source]].astype(np.int64)
    slot = run * job.sources[source].times + feeds.slot[entry[of_source]]
    later = np.ones(len(run), dtype=bool)
    later[np.unique(slot, return_index=True)[1]] = False
    again = np.zeros(len(job.records[source]), dtype=bool)
    again[row[later]] = True  # records that fill others
    resolution = job.sources[source].resolution
    for number, member in enumerate(job.sources[source].members):
        of_member = job.members[source][row] == number
        for level, bytes_px in _levels(job.records[source], dict.fromkeys(member.reads)):
            own = of_member & (bytes_px[row] > 0)
            if own.any():
                warped = again | (np.abs(np.abs(level[:, 0]) - resolution) > ALIGNED_PX * resolution)
                epsg = job.records[source].epsg
                for part in _Read(run[own], row[own], level, epsg, warped, bytes_px).parts(runs):
                    yield from _spans_of(job, source, part)


@dataclass(frozen=True, slots=True)
class _Read:
    """What is read of files whose pixels lie alike; one entry per run of chips that are fed alike and record."""

    run: NDArray[np.int64]
    """Numbers among ``job.feeds.alike``."""
    row: NDArray[np.int64]
    level: NDArray[np.float64]
    """Shape (record, 8): a, c, e, f of the transform, width, height, tile width, tile height."""
    epsg: NDArray[np.int32]
    """Shape (record,)."""
    again: NDArray[np.bool_]
    """Shape (record,). Whether one shard may read a tile more than once."""
    bytes_px: NDArray[np.int64]
    """Shape (record,). Bytes of a pixel over all these files."""

    @property
    def lattices(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """How pixels and tiles of these records lie, shape (lattice, 9), and which lattice each entry's record has."""
        there = np.zeros(len(self.epsg), dtype=bool)
        there[self.row] = True
        facts = np.column_stack([self.level[there], self.epsg[there]])
        lattices, lattice = np.unique(facts, axis=0, return_inverse=True)
        return lattices, np.ravel(lattice)[(np.cumsum(there) - 1)[self.row]]  # NumPy 2.0: of two dimensions

    def parts(self, runs: NDArray[np.int64]) -> Iterator[_Read]:
        """Yield records that lie alike together, those of the first chips first, some at a time.

        Parameters
        ----------
        runs
            Where each run of chips begins, ``FeedTable.alike``.
        """
        place = pd.factorize(self.lattices[1])[0]
        order = np.argsort(
            place.astype(np.min_scalar_type(place.max())), kind="stable"
        )  # by radix, where few
        begin = np.flatnonzero(np.diff(place[order], prepend=-1))
        chips = np.add.reduceat((runs[self.run + 1] - runs[self.run])[order], begin)
        part = np.cumsum(chips) // PART_CHIPS
        for entries in np.split(order, begin[np.flatnonzero(np.diff(part)) + 1]):
            yield replace(self, run=self.run[entries], row=self.row[entries])


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


def _spans_of(job: Job, source: int, read: _Read) -> Iterator[_Spans]:
    """Yield when each tile is needed, where any is."""
    # Records of one place's dates lie alike: what is under a chip is worked out once for all of them, and chips that
    # the same records feed are put together before these are told apart.
    lattices, lattice = read.lattices
    runs = job.feeds.alike
    pair, pairs = pd.factorize(lattice * len(runs) + read.run)
    kind, run = np.divmod(pairs, len(runs))
    place, nth = spread(runs[run + 1] - runs[run])
    chip = runs[run][place] + nth
    here = job.running[chip] >= 0
    place, chip = place[here], chip[here]
    needs = _under(job, job.reach_m(source), lattices[kind], place, chip)
    if needs is None:
        return
    tiles = int(needs.tile.max()) + 1
    order = np.argsort(needs.place, kind="stable")
    count = np.bincount(needs.place, minlength=len(pairs))
    entry, nth = spread(count[pair])
    need = order[(np.cumsum(count) - count)[pair][entry] + nth]
    key, keys = pd.factorize(read.row[entry] * tiles + needs.tile[need])
    needs = needs.merged(key, len(keys), need)
    row = keys // tiles
    bytes_px = read.bytes_px[row]
    (top, left), (low, right) = needs.begin, needs.end
    held = ((low - top) * (right - left)).astype(np.int64) * bytes_px
    held[(needs.since == needs.until) & ~read.again[row]] = 0
    whole = read.level[row][:, 6:].prod(axis=1).astype(np.int64) * bytes_px
    yield _Spans(needs.since, needs.until, held, whole)


@dataclass(frozen=True, slots=True)
class _Needs:
    """What some chips need of tiles; one entry per place and tile."""

    place: NDArray[np.int64]
    tile: NDArray[np.int64]
    """Number of the tile in its file."""
    begin: tuple[NDArray[np.float64], NDArray[np.float64]]
    """First row and column of the pixels that are needed."""
    end: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Row and column behind the last ones."""
    since: NDArray[np.int64]
    """The first shard, in running order."""
    until: NDArray[np.int64]

    def merged(self, key: NDArray[np.int64], keys: int, at: NDArray[np.int64] | None = None) -> _Needs:
        """Return entries put together, one a key.

        Parameters
        ----------
        key, keys
            Shape (entry,). The number of each one's key, and how many keys there are.
        at
            Shape (entry,). Which entries, any of them any number of times; None: all, once.
        """
        some: Any = slice(None) if at is None else at
        first = np.empty(keys, dtype=np.int64)
        first[key] = np.arange(len(key)) if at is None else at
        top, left = (_extreme(np.minimum, edge[some], key, keys) for edge in self.begin)
        low, right = (_extreme(np.maximum, edge[some], key, keys) for edge in self.end)
        since = _extreme(np.minimum, self.since[some], key, keys)
        until = _extreme(np.maximum, self.until[some], key, keys)
        return _Needs(self.place[first], self.tile[first], (top, left), (low, right), since, until)


def _under(
    job: Job,
    reach_m: float,
    lattices: NDArray[np.float64],
    place: NDArray[np.int64],
    chip: NDArray[np.int64],
) -> _Needs | None:
    """Return what chips need of the tiles under them, chips of one place together; None: nothing.

    Parameters
    ----------
    job
        The job.
    reach_m
        How far windows reach beyond their chips.
    lattices
        Shape (place, 9): as ``_Read.level``, and the CRS.
    place, chip
        Shape (entry,). Chips, and the place that each is of.
    """
    sides = [np.ascontiguousarray(lattices[:, column])[place] for column in (7, 6)]
    spans = _spans(job, reach_m, lattices, place, chip)
    low = [np.floor(begin / side).astype(np.int64) for (begin, _), side in zip(spans, sides, strict=True)]
    high = [np.ceil(end / side).astype(np.int64) for (_, end), side in zip(spans, sides, strict=True)]
    down, wide = (np.maximum(b - a, 0) for a, b in zip(low, high, strict=True))
    part, nth = spread(down * wide)
    if not len(part):
        return None
    row, col = np.divmod(nth, wide[part])
    at = row + low[0][part], col + low[1][part]
    begin, end = [], []
    for (first, last), side, number in zip(spans, sides, at, strict=True):
        size = side[part]
        corner = number * size
        begin.append(np.maximum(first[part], corner))
        end.append(np.minimum(last[part], corner + size))
    place, across = place[part], np.ceil(lattices[:, 4] / lattices[:, 6]).astype(np.int64)
    tile, when = at[0] * across[place] + at[1], job.running[chip[part]]
    key, keys = pd.factorize(place * (int(tile.max()) + 1) + tile)
    return _Needs(place, tile, (begin[0], begin[1]), (end[0], end[1]), when, when).merged(key, len(keys))


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


def _spans(
    job: Job,
    reach_m: float,
    lattices: NDArray[np.float64],
    place: NDArray[np.int64],
    chip: NDArray[np.int64],
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return from where to where the pixels of files under chips and their surroundings lie: rows, and columns."""
    spans = [(np.zeros(len(chip)), np.zeros(len(chip))) for _ in range(2)]
    epsg = lattices[:, 8].astype(np.int64)
    for code in np.unique(epsg[epsg != 0]).tolist():
        own = np.flatnonzero((epsg == code)[place])
        a, c, e, f, width, height = (
            np.ascontiguousarray(lattices[:, column])[place[own]] for column in range(6)
        )
        west, south, east, north = job.bounds_in(chip[own], code, reach_m).T
        for (begin, end), ends, size in ((spans[0], ((north - f) / e, (south - f) / e), height),
                                         (spans[1], ((west - c) / a, (east - c) / a), width)):  # fmt: skip
            begin[own] = np.clip(np.minimum(*ends) - REACH_PX, 0, size)
            end[own] = np.clip(np.maximum(*ends) + REACH_PX, 0, size)
    return spans
