"""What is kept of tiles is counted from runs of chips that are fed alike: the figures are those of every chip."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tilecount import job_of

from rasteret_dask.chipping.chiptable import FeedTable
from rasteret_dask.grid import transformer
from rasteret_dask.tasks import keptbytes
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.keptbytes import REACH_PX, shared_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning"),
    pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning"),
]

Tile = tuple[int, str, tuple[float, ...], int, int]
"""Source, record, lattice of its pixels, row and column of the tile."""


def under(job: Job, chip: int, epsg: int, level: Any) -> tuple[float, float, float, float] | None:
    """Return the pixels under a chip and its surroundings: row0, row1, col0, col1."""
    west, south, east, north = job.bounds[chip].tolist()
    move = transformer(int(job.epsg[chip]), epsg).transform
    places = [move(x, y) for x in (west, east) for y in (south, north)]
    a, _, c, _, e, f = level.transform
    cols, rows = [(x - c) / a for x, _ in places], [(y - f) / e for _, y in places]
    spans = []
    for values, size in ((rows, level.height), (cols, level.width)):
        spans += [min(max(edge, 0), size) for edge in (min(values) - REACH_PX, max(values) + REACH_PX)]
    return None if spans[0] == spans[1] or spans[2] == spans[3] else (spans[0], spans[1], spans[2], spans[3])


def chip_by_chip(job: Job, threads: int) -> tuple[list[int], list[int], int]:
    """Count what is kept while each shard is read, what both sides of each border need, and all tiles, in bytes."""
    shards = int(job.running.max()) + 1
    parts: dict[Tile, list[tuple[tuple[float, float, float, float], int]]] = {}
    facts: dict[tuple[int, str, tuple[float, ...]], tuple[int, int, bool]] = {}
    feeds = job.feeds
    for source, plan in enumerate(job.sources):
        filling = set()
        for chip in range(job.chips.num_rows):
            slots = set()
            for entry in range(int(feeds.offsets[chip]), int(feeds.offsets[chip + 1])):
                if feeds.source[entry] == source:
                    if int(feeds.slot[entry]) in slots:
                        filling.add(int(feeds.row[entry]))
                    slots.add(int(feeds.slot[entry]))
        records = job.records[source]
        for chip in np.flatnonzero(job.running >= 0).tolist():
            for entry in range(int(feeds.offsets[chip]), int(feeds.offsets[chip + 1])):
                row = int(feeds.row[entry])
                if feeds.source[entry] != source:
                    continue
                reads = plan.members[int(job.members[source][row])].reads
                asset = records.asset(row, reads[0])  # all of a record lie alike
                level = asset.image
                high, wide = level.tile_height, level.tile_width
                lattice: tuple[float, ...] = (*level.transform, level.width, level.height, wide, high)
                again = abs(abs(level.transform[0]) - plan.resolution) > 1e-4 * plan.resolution
                bytes_px = len(reads) * (np.dtype(level.dtype).itemsize + 1)
                facts[source, asset.record_id, lattice] = bytes_px, high * wide, again or row in filling
                span = under(job, chip, asset.epsg, level)
                if span is None:
                    continue
                row0, row1, col0, col1 = span
                for i in range(int(row0 // high), int(np.ceil(row1 / high))):
                    for j in range(int(col0 // wide), int(np.ceil(col1 / wide))):
                        part = (max(row0, i * high), min(row1, i * high + high),
                                max(col0, j * wide), min(col1, j * wide + wide))  # fmt: skip
                        tile = source, asset.record_id, lattice, i, j
                        parts.setdefault(tile, []).append((part, int(job.running[chip])))
    kept, shared, total = [0] * shards, [0] * (shards - 1), 0
    for (source, record, lattice, *_), needs in parts.items():
        bytes_px, pixels, again = facts[source, record, lattice]
        row0, row1, col0, col1 = (
            which(part[edge] for part, _ in needs) for edge, which in enumerate((min, max, min, max))
        )
        since, until = min(when for _, when in needs), max(when for _, when in needs)
        held = int((row1 - row0) * (col1 - col0)) * bytes_px if since != until or again else 0
        for shard in range(max(since - threads + 1, 0), until + 1):
            kept[shard] += held
        for border in range(since, until):
            shared[border] += pixels * bytes_px
        total += pixels * bytes_px
    return kept, shared, total


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    how=st.sampled_from(
        [
            {"resolution": 10.0}, {"resolution": 10.0, "time": "1MS"}, {"resolution": 20.0, "time": "1MS"},
            {"resolution": 10.0, "time": "2MS", "mask": "clouds", "fill": True}, {"resolution": 30.0},
        ]
    ),
    dates=st.integers(1, 2),
    threads=st.integers(1, 3),
    joined=st.booleans(),
    split=st.booleans(),
    part_chips=st.sampled_from([1, 40, 2**16]),
)  # fmt: skip
def test_figures_are_those_of_every_chip(
    how: dict[str, Any], dates: int, threads: int, joined: bool, split: bool, part_chips: int
) -> None:
    job = job_of(how=how, size=24, dates=dates, shard_bytes=400_000, joined=joined, split=split)
    if split:
        job = job.select({"train"})
    kept, shared, total = chip_by_chip(job, threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keptbytes, "PART_CHIPS", part_chips)
        counted = list(keptbytes._kept(job, threads))
        assert counted[-1].tolist() == pytest.approx(kept, abs=1)
        assert all((more >= less).all() for less, more in pairwise(counted))
        assert shared_bytes(job)[0].tolist() == shared
        assert shared_bytes(job)[1] == total
        for most in (max(kept) // 3, 2 * max(kept)):
            patch.setattr(keptbytes, "MOST_KEPT_BYTES", most)
            job.kept.clear()
            assert keptbytes.kept_bytes(job, threads) == pytest.approx(min(max(kept), most), abs=1)


entries = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(0, 2)), max_size=3
)


@settings(max_examples=200, deadline=None)
@given(st.lists(entries, max_size=8), st.data())
def test_runs_of_chips_that_are_fed_alike(
    chips: list[list[tuple[int, int, int, int]]], data: st.DataObject
) -> None:
    flat = np.array([entry for chip in chips for entry in chip], dtype=np.int64).reshape(-1, 4)
    offsets = np.cumsum([0, *map(len, chips)], dtype=np.int32)
    names = ("a", "b") if len(flat) == 0 or flat[:, 0].any() else ("a",)
    source, slot, order, row = flat.T
    feeds = FeedTable(offsets, source, slot, order, row, np.ones(len(flat), np.float32), names, ((), ()))
    begin = [at for at in range(len(chips)) if at == 0 or chips[at] != chips[at - 1]]
    assert feeds.alike.tolist() == [*begin, len(chips)]
    assert all(len({tuple(chips[at]) for at in range(*run)}) == 1 for run in pairwise(feeds.alike.tolist()))
    group = data.draw(st.lists(st.integers(0, 2), min_size=len(chips), max_size=len(chips)))
    for number in range(len(names)):
        first: dict[tuple[int, int], int] = {}
        for chip, of_chip in enumerate(chips):
            for entry in of_chip:
                if entry[0] == number:
                    first.setdefault((entry[3], group[chip]), chip)
        rows, places = feeds.wanted(number, np.array(group, dtype=np.int64))
        assert {
            (row, group[chip]): chip for row, chip in zip(rows.tolist(), places.tolist(), strict=True)
        } == first
        assert len(rows) == len(first)
        assert feeds.rows_of(number).tolist() == sorted({row for row, _ in first})


def test_records_are_told_apart_once_a_run_of_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips that the same records feed cost nothing of their own there, however many they are."""
    sizes: list[int] = []
    factorize = pd.factorize

    def counted(values: Any) -> Any:
        sizes.append(len(values))
        return factorize(values)

    monkeypatch.setattr(pd, "factorize", counted)
    told_apart = set()
    for size in (16, 32):
        job = job_of(
            how={"resolution": 10.0}, size=size, dates=1, shard_bytes=10**7, joined=False, split=False
        )
        sizes.clear()
        list(keptbytes._kept(job, 1))
        assert sizes[0] * 20 < len(job.feeds.row)
        told_apart.add(sizes[0])
    assert len(told_apart) == 1


def test_threads_that_ask_at_the_same_time_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shards of a process begin together, and each asks what the process keeps."""
    job = job_of(how={"resolution": 10.0}, size=24, dates=1, shard_bytes=10**6, joined=True, split=False)
    count, ready, counted = keptbytes._kept, Barrier(4), list[int]()

    def slowly(job: Job, threads: int) -> Any:
        counted.append(threads)
        time.sleep(0.05)  # the others ask meanwhile
        return count(job, threads)

    def ask(_: int) -> int:
        ready.wait()
        return keptbytes.kept_bytes(job, 4)

    monkeypatch.setattr(keptbytes, "_kept", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert counted == [4]


def test_no_more_is_counted_than_a_process_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of the first chips are enough where they fill it."""
    job = job_of(how={"resolution": 10.0}, size=24, dates=2, shard_bytes=10**5, joined=False, split=False)
    count, counted = keptbytes._spans_of, list[int]()

    def spans_of(job: Job, source: int, read: Any) -> Any:
        counted.append(len(read.run))
        return count(job, source, read)

    monkeypatch.setattr(keptbytes, "PART_CHIPS", 1)
    monkeypatch.setattr(keptbytes, "_spans_of", spans_of)
    *_, whole = keptbytes._kept(job, 4)
    every = counted.copy()
    counted.clear()
    monkeypatch.setattr(keptbytes, "MOST_KEPT_BYTES", int(whole.max()) // 10)
    assert keptbytes.kept_bytes(job, 4) == int(whole.max()) // 10
    assert 0 < len(counted) < len(every)
    assert counted == every[: len(counted)]
