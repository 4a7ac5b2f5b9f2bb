"""A tile of a job is fetched once by a process, whatever joins, fills and splits; what is kept for that is planned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import rasteret_dask as rd
from rasteret_dask.reader import sharing
from rasteret_dask.reader.readplan import Request, tiles_of
from rasteret_dask.reader.sharing import SHARED, Flight, Key, Pixels, Sharing
from rasteret_dask.show.explain import explain
from rasteret_dask.tasks import pixels
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.keptbytes import kept_bytes
from rasteret_dask.tasks.mapping import outputs_of

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")


def readme_chips(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, fill: bool) -> rd.Chips:
    """Return two sensors joined with embeddings, resampled in part, in three splits."""
    optical = rd.merge(s2, l8).harmonize(
        ["red", "nir"], resolution=10, time="1MS", mask="clouds", pick="least_cloudy", fill=fill
    )
    joined = rd.join(optical=optical, embeddings=aef.harmonize(["A00", "A01"]))
    return joined.chips(32, cell_km=0.96).split(0.6, 0.2, 0.2, seed=4)


def readme_job(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, fill: bool) -> Job:
    """Return these chips in many shards."""
    chips = readme_chips(s2, l8, aef, fill)
    job = freeze(chips.planned, shard_bytes=600_000)
    assert len(list(job.shards())) > 8
    said = explain(chips.planned, job, outputs_of(job, {}))
    assert said["kept_bytes"] == kept_bytes(job)
    return job


class Landed:
    """What a process fetches, and keeps at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: Counter[Key] = Counter()
        self.held = 0
        SHARED.clear()
        monkeypatch.setattr(SHARED, "_least", 0)
        monkeypatch.setattr(SHARED, "nbytes", 0)
        land = Sharing.land

        def counted(shared: Sharing, flight: Flight, found: Pixels) -> None:
            self.tiles[flight.key] += 1
            land(shared, flight, found)
            self.held = max(self.held, shared._held)

        monkeypatch.setattr(sharing.Sharing, "land", counted)


def in_turn(job: Job) -> list[Any]:
    return sorted(job.shards(), key=lambda shard: int(job.running[shard.start]))


def wanted_of(job: Job) -> dict[tuple[str, int, int, int], int]:
    """Return every tile that a job may need, by file, plane, level and number, and its compressed bytes."""
    result: dict[tuple[str, int, int, int], int] = {}
    for shard in job.shards():
        for number in range(len(job.sources)):
            requests: list[Request] = pixels.requests_of(job, shard, number)[0]
            for request in requests:
                level, tiles = tiles_of(request)
                asset = request.asset
                plane = asset.band_index if asset.image.planar == 2 else 0
                counts = asset.levels[level].tile_byte_counts
                result |= {(asset.href, level, plane, tile): counts[tile] for tile in tiles}
    return result


@pytest.mark.parametrize("fill", [False, True])
def test_tiles_of_a_join_come_once_and_what_is_kept_was_planned(
    s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, fill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = readme_job(s2, l8, aef, fill)
    wanted, landed = wanted_of(job), Landed(monkeypatch)
    counted, fetched = 0, 0
    for shard in in_turn(job):
        for number in range(len(job.sources)):
            attrs = pixels.merged(job, shard, number, pixels.members_of(job, shard, number)).attrs
            counted += attrs["counts"]["tiles_read"]
            fetched += attrs["counts"]["bytes_fetched"]
    assert set(landed.tiles.values()) == {1}
    assert counted == len(landed.tiles) <= len(wanted)
    needed = sum(wanted[href, level, plane, tile] for href, _, _, level, plane, tile in landed.tiles)
    assert needed <= fetched <= sum(wanted.values())
    assert {(href, level, plane, tile) for href, _, _, level, plane, tile in landed.tiles} <= set(wanted)
    assert 0 < landed.held <= kept_bytes(job, 1) <= kept_bytes(job)
    assert not SHARED._kept
