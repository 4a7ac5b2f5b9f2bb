"""explain() estimates time from a stated rate, or from a few tiles that it reads when it is asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from servers import RangeServer

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import PlanError, ReadError
from rasteret_dask.show.probing import PROBES, Amounts, Finished, Measured, estimated, rate_of
from rasteret_dask.tasks.runs import TILES_SHARE, Workforce

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")


@pytest.fixture
def remote(small_world: World, server: RangeServer) -> rd.Chips:
    """Return chips of scenes that lie on a web server."""
    world = small_world.sentinel2.parent
    shutil.copytree(world, server.folder / world.name)
    items = []
    for path in sorted(world.glob("*/*.json")):
        item = json.loads(path.read_text())
        place = server.url(str(Path(world.name) / path.relative_to(world)))
        items.append({**item, "links": [{"rel": "self", "href": place}]})
    scenes = rd.build_from_stac([i for i in items if i["type"] == "Feature"], name="s2")
    server.forget()
    return scenes.harmonize(["red", "nir"], mask="clouds", time="1MS").chips(32, cell_km=0.96)


def test_a_probe_reads_few_tiles_and_nothing_is_read_without_one(
    remote: rd.Chips, server: RangeServer
) -> None:
    plain = remote.explain()
    stated = remote.explain(workers=4, threads=2, rate="50 MB/s")
    assert not server.asked()
    assert "time" not in plain.facts
    assert stated["time"]["fetch_s"] == pytest.approx(stated["workers"]["read_bytes"] / 50e6 / 4)
    assert stated["time"]["decode_s"] is None
    told = remote.explain(workers=2, threads=3, probe=True)
    count = len(server.asked())
    assert 1 <= count <= PROBES
    measured = told["time"]["measured"]
    assert measured["requests"] == count
    assert 1 <= measured["tiles"] <= PROBES
    assert (told["time"]["processes"], told["time"]["threads"]) == (2, 3)
    text = str(told)
    assert f"estimated from {measured['tiles']} tiles read here ({count} requests" in text
    assert "with masks, warping and compression; without functions" in text
    assert json.dumps(told.to_dict())


def test_a_probe_over_many_shards_reads_no_more(remote: rd.Chips, server: RangeServer) -> None:
    from small_stores import small

    from rasteret_dask.show import probing

    job = small(remote, 20_000).job
    assert job.shard_count > 2 * PROBES
    assert probing.probed(job).tiles == PROBES
    assert len(server.asked()) <= PROBES


def test_a_file_that_cannot_be_read_fails_the_probe(remote: rd.Chips, server: RangeServer) -> None:
    for path in server.folder.rglob("*.tif"):
        path.unlink()
    with pytest.raises(ReadError):
        remote.explain(probe=True)
    assert remote.explain(rate=1e6)["time"]["seconds"] > 0


def test_the_arithmetic() -> None:
    measured = Measured(12, 12, 6_000_000, 0.05, 100.0, 20e6, 0.004)
    job = Amounts(500, 10_000, 5_000_000_000)
    told = estimated(job, Workforce(5, 2), measured)
    assert told["fetch_s"] == pytest.approx(5e9 / 20e6 / 5)
    assert told["decode_s"] == pytest.approx(10_000 * 0.004 / 10)
    assert told["seconds"] == max(told["fetch_s"], told["decode_s"] / TILES_SHARE)
    slow = estimated(job, Workforce(500, 1), measured)
    assert slow["seconds"] == slow["fetch_s"]
    assert told["line"].startswith("about 50 s for 5 processes; ")
    assert slow["line"].startswith("less than a second for 500 processes; ")
    unknown = estimated(Amounts(500, 10_000, None), Workforce(5, 2), measured)
    assert unknown["fetch_s"] == pytest.approx(10_000 / 100.0 / 5)
    for more in (2, 4, 8):
        few, many = (estimated(job, Workforce(count, 1), measured)["seconds"] for count in (more - 1, more))
        assert many <= few
    with pytest.raises(PlanError, match="probe=True"):
        estimated(Amounts(5, 10, None), None, 1e6)


def test_a_finished_job_tells_what_reading_takes_by_bytes_and_the_rest_by_chips() -> None:
    counted = Finished(shards=2, chips=100, read_s=1e-8, other_s=0.02, by_bytes=True)
    told = estimated(Amounts(5_000, 10_000, 4_000_000_000), Workforce(5, 2), counted)
    assert told["seconds"] == pytest.approx((40 + 100) / 10)
    assert told["fetch_s"] == pytest.approx(4.0)
    by_chips = Finished(
        shards=2, chips=100, read_s=0.01, other_s=0.02, by_bytes=False
    )  # GDAL counts no bytes
    assert estimated(Amounts(5_000, 10_000, None), None, by_chips)["seconds"] > 0
    assert estimated(Amounts(5_000, 10_000, None), Workforce(1, 3), by_chips)["seconds"] == pytest.approx(
        50.0
    )
    with pytest.raises(PlanError, match="probe=True"):
        estimated(Amounts(5_000, 10_000, None), None, counted)


@pytest.mark.parametrize(
    ("rate", "value"), [("50 MB/s", 5e7), ("1.5GB/s", 1.5e9), ("800 kB/s", 8e5), (12, 12.0), ("7 B/s", 7.0)]
)
def test_rates(rate: Any, value: float) -> None:
    assert rate_of(rate) == value


@pytest.mark.parametrize("rate", ["fast", "50 Mbit/s", 0, -1, True, "0 MB/s", float("nan")])
def test_what_is_no_rate(rate: Any) -> None:
    with pytest.raises(PlanError, match="50 MB/s"):
        rate_of(rate)


def test_a_probe_and_a_rate_are_one_too_many(s2: rd.Collection) -> None:
    chips = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96)
    with pytest.raises(PlanError, match="measured, or stated"):
        chips.explain(probe=True, rate=5)
    assert chips.explain(probe=True)["time"]["measured"]["tiles"] <= PROBES  # local files
