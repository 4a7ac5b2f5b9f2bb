"""Tiles are counted a layout at a time: the figures are those of every request, window and tile on its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import collection, project, record

import rasteret_dask as rd
from rasteret_dask.grid import northern, transformer
from rasteret_dask.reader import pixelgrid, readplan
from rasteret_dask.reader.readplan import plan_read, tiles_of
from rasteret_dask.show import tilecount
from rasteret_dask.show.explain import _less_whole
from rasteret_dask.show.tilecount import TileCount, tile_count
from rasteret_dask.table.records import Level, Records
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning"),
    pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning"),
]


def one_by_one(job: Job, most: int) -> TileCount:
    """Count every request of every shard that is looked at."""
    shards = list(job.shards())
    step = max(len(shards) / most, 1.0)
    chosen = [shards[int(i * step)] for i in range(min(len(shards), most))]
    whole, seen = len(chosen) == len(shards), set[Any]()
    once, nbytes, by_shard, read, used = 0.0, 0.0, 0, 0, 0
    for shard in chosen:
        for source in range(len(job.sources)):
            files: dict[Any, tuple[Any, set[int], list[Any]]] = {}
            for request in pixels.requests_of(job, shard, source)[0]:
                level, tiles = tiles_of(request)
                own = files.setdefault((request.asset.href, level), (request.asset, set(), []))
                own[1].update(tiles)
                own[2].extend(rect for rect in plan_read(request).rects if not rect.empty)
            for (href, number), (asset, tiles, rects) in files.items():
                level = asset.levels[number]
                for tile in tiles:
                    if whole:
                        weight = 1.0 if (href, number, tile) not in seen else 0.0
                        seen.add((href, number, tile))
                    else:
                        weight = 1 / max(len(sharing(job, source, asset, level)[tile]), 1)
                    once += weight
                    nbytes += weight * level.tile_byte_counts[tile]
                by_shard += len(tiles)
                held = len(tiles) * level.tile_width * level.tile_height
                boxes = [shapely.box(r.col0, r.row0, r.col1, r.row1) for r in rects]
                read += held
                used += min(round(shapely.union_all(boxes).area), held)
    scale = len(shards) / len(chosen)
    fit = round(used / read, 4) if read else None
    return TileCount(round(once * scale), round(by_shard * scale), round(nbytes * scale), len(chosen), fit)


def sharing(job: Job, source: int, asset: Any, level: Level) -> dict[int, set[str]]:
    """Return tile -> the shards with a chip on its ground that its record feeds."""
    result: dict[int, set[str]] = {n: set() for n in range(len(level.tile_byte_counts))}
    code, shift = northern(asset.epsg)
    a, _, c, _, e, f = level.transform
    across, down = -(-level.width // level.tile_width), -(-level.height // level.tile_height)
    fed = set(job.chips_of(source, asset.record_id).tolist())
    for shard in job.shards():
        for chip in fed & set(range(shard.start, shard.stop)):
            west, south, east, north = job.bounds[chip].tolist()
            move = transformer(int(job.epsg[chip]), code).transform
            places = [move(x, y) for x in (west, east) for y in (south, north)]
            cols = [(x - c) / a / level.tile_width for x, _ in places]
            rows = [(y - shift - f) / e / level.tile_height for _, y in places]
            for row in range(
                max(int(np.floor(min(rows) + 1e-4)), 0), min(int(np.ceil(max(rows) - 1e-4)), down)
            ):
                for col in range(
                    max(int(np.floor(min(cols) + 1e-4)), 0), min(int(np.ceil(max(cols) - 1e-4)), across)
                ):
                    result[row * across + col].add(shard.name)
    return result


def job_of(*, how: dict[str, Any], size: int, dates: int, shard_bytes: int, joined: bool, split: bool) -> Job:
    """Return a job over overlapping granules of two zones, one of them in the south's numbers."""
    places: list[dict[str, Any]] = [
        {}, {"west": 501_000.0}, {"west": 500_400.0, "north": 5_399_500.0, "px": (130, 90), "tile_px": 16},
        {"epsg": 32733, "north": 15_399_300.0}, {"pixel": 30.0, "px": (50, 50)},
    ]  # fmt: skip
    rows = [
        record(
            f"r{n}d{d}",
            when=f"2024-{4 + d:02d}-{10 + n:02d}T10:00:00",
            datatake=f"{n}{d}",
            **{"px": (150, 150), "tile_px": 32, **place},
        )
        for d in range(dates)
        for n, place in enumerate(places)
    ]
    own = collection("s2", *rows).harmonize(["red", "nir"], **how)
    if joined:
        year = record("y", epsg=32634, west=58_000.0, north=5_418_000.0, px=(900, 900), when="2024-01-01T00:00:00",
                      until="2025-01-01T00:00:00", bands=("data",))  # fmt: skip
        own = rd.join(s2=own, y=collection("y", year).harmonize(["data"], resolution=how["resolution"]))
    chips = own.chips(size, cell_km=4 * size * how["resolution"] / 1000, min_coverage=0.2)
    if split:
        chips = chips.split(0.5, 0.25, 0.25, seed=2)
    return freeze(chips.planned, shard_bytes)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    how=st.sampled_from(
        [
            {"resolution": 10.0}, {"resolution": 10.0, "time": "1MS"}, {"resolution": 20.0, "time": "1MS"},
            {"resolution": 10.0, "time": "2MS", "mask": "clouds", "fill": True},
            {"resolution": 7.5, "resampling": "cubic", "time": "1MS"}, {"resolution": 30.0, "units": "reflectance"},
        ]
    ),
    size=st.sampled_from([16, 24]),
    dates=st.integers(1, 2),
    most=st.sampled_from([1, 3, 500]),
    joined=st.booleans(),
    split=st.booleans(),
)  # fmt: skip
def test_figures_are_those_of_every_request(
    how: dict[str, Any], size: int, dates: int, most: int, joined: bool, split: bool
) -> None:
    job = job_of(how=how, size=size, dates=dates, shard_bytes=400_000, joined=joined, split=split)
    counted, plain = tile_count(job, most), one_by_one(job, most)
    assert (counted.by_shard, counted.shards, counted.fit) == (plain.by_shard, plain.shards, plain.fit)
    assert abs(counted.requests - plain.requests) <= 1  # of sums of 1 / n, which end in a half at times
    assert counted.nbytes == pytest.approx(plain.nbytes, rel=1e-9, abs=1)


def test_looking_grows_with_the_places_of_files_and_not_with_their_dates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once a layout, its places in a shard: whatever the dates and bands of it."""

    def calls(dates: int) -> Counter[str]:
        counted: Counter[str] = Counter()

        def counting(module: Any, name: str) -> None:
            plain = getattr(module, name)

            def function(*args: Any, **more: Any) -> Any:
                counted[name] += 1
                return plain(*args, **more)

            patch.setattr(module, name, function)

        job = job_of(how={"resolution": 20.0, "time": "1MS"}, size=16, dates=dates, shard_bytes=10**7,
                     joined=False, split=False)  # fmt: skip
        with monkeypatch.context() as patch:
            counting(tilecount, "choose")
            counting(readplan, "transformed")
            counting(pixelgrid, "transform_points")
            counting(Records, "_asset")
            tile_count(job, 100)
        return counted

    few, many = calls(1), calls(4)
    assert few["choose"] > 0
    assert few == many


def test_places_of_several_cubes_are_joined_once_for_all_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips far apart lie in cubes of their own, all over the same files."""

    def joined(dates: int) -> int:
        rows = [
            record(f"r{d}", px=(3000, 3000), when=f"2024-{4 + d:02d}-10T10:00:00", datatake=str(d))
            for d in range(dates)
        ]
        places = [
            project(shapely.Point(500_000.0 + x, 5_400_000.0 - x), 32633, 4326) for x in (1000.0, 28_000.0)
        ]
        own = collection("s2", *rows).harmonize(["red", "nir"], time="1MS")
        job = freeze(own.chips(32, at=places).planned, 10**7)
        counted, plain = list[int](), tilecount._area

        def area(rects: Any) -> int:
            counted.append(len(rects))
            return plain(rects)

        with monkeypatch.context() as patch:
            patch.setattr(tilecount, "_area", area)
            assert tile_count(job, 48).shards == 1
        return len(counted)

    assert joined(1) == joined(4) == 3  # of each cube, and of both


def test_what_a_header_says_is_not_there_is_not_counted() -> None:
    rows = [record("a", px=(256, 256)), record("b", px=(256, 256), when="2024-04-12T10:00:00", datatake="b")]
    levels = rows[0]["headers_metadata"][0][1][0]
    levels["tile_offsets"][0] = levels["tile_byte_counts"][0] = 0
    job = collection("s2", *rows).harmonize(["red"]).chips(128, grid="tiles").job
    assert tile_count(job, 48).requests == 2 * 4 - 1
    assert tile_count(job, 48).nbytes == 7000
    levels["tile_byte_counts"] = levels["tile_offsets"] = []
    job = collection("s2", *rows).harmonize(["red"]).chips(128, grid="tiles").job
    assert tile_count(job, 48).requests == 8
    assert tile_count(job, 48).nbytes is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.4, 0.999999, 1.0])), max_size=12))
def test_slots_that_a_record_covers_whole_are_not_looked_at_again(drawn: list[tuple[int, float]]) -> None:
    slot, share = np.array([s for s, _ in drawn], dtype=np.int64), np.array([c for _, c in drawn], np.float32)
    whole = {s for s, c in drawn if c == 1.0}
    entries, count = _less_whole(np.arange(len(drawn)) + 100, slot, share)
    assert entries.tolist() == [100 + at for at, (s, _) in enumerate(drawn) if s not in whole]
    assert count == len(whole)
