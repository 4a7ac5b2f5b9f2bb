"""Plans by blocks in a bucket: planned, killed, continued, chosen from and written, as in a folder of this machine."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_jobparts import plan, rows, shrink
from waiting import until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.net import remote
from rasteret_dask.tasks import freezing

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")


SHARD_CHIPS = 20
"""Each shard is several requests to a server of this process, which has other things to do."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a bucket on a server of this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "REGION": "us-east-1",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/plans", method="PUT")):
        pass
    yield "s3://plans/some where"
    server.stop()


def stored(url: str) -> dict[str, bytes]:
    """Return path -> bytes of all that readers of a store see, but for the manifest."""
    paths = [
        path for path in remote.listing(url) if not path.startswith("_job/") and path != "manifest.parquet"
    ]
    return {path: remote.get(remote.join(url, path)) for path in paths}


def test_a_bucket_holds_a_plan_and_its_store_and_a_killed_client_is_gone_on_with(
    bucket: str,
    small_world: World,
    s2: rd.Collection,
    l8: rd.Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytest, rasteret_dask as rd
from part_processes import hold
from rasteret_dask.tasks import freezing
from test_jobparts import plan, shrink
shrink(pytest.MonkeyPatch())
freezing.SHARD_CHIPS = {SHARD_CHIPS}
hold({str(tmp_path / "notes")!r})  # after some shards, for ever
dates = ("2024-04-01", "2024-06-30")
s2 = rd.build_from_stac({str(small_world.sentinel2)!r}, name="s2", date_range=dates)
l8 = rd.build_from_stac({str(small_world.landsat)!r}, name="l8", date_range=dates)
blocks = plan(s2, l8).by_blocks({f"{bucket}/plan"!r}, progress=False, windows=120)
blocks.select("train").to_zarr({f"{bucket}/some.zarr"!r}, progress=False)
"""
    (tmp_path / "notes").mkdir()
    shrink(monkeypatch)
    monkeypatch.setattr(freezing, "SHARD_CHIPS", SHARD_CHIPS)
    chips = plan(s2, l8)
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command) as planner:
        until(lambda: sum(path.endswith(".arrow.json") for path in remote.listing(f"{bucket}/plan")) >= 2)
        planner.kill()
    whole = {
        path: seen for path, seen in remote.modified(f"{bucket}/plan").items() if path.endswith(".arrow.json")
    }
    blocks = chips.by_blocks(f"{bucket}/plan", progress=False, windows=120)
    after = remote.modified(f"{bucket}/plan")
    assert {path: after[path] for path in whole} == whole
    assert blocks.table.equals(chips.table)
    assert blocks.dataset.count_rows() == len(chips)
    assert blocks.select("train").sample(10).table.equals(chips.select("train").sample(10).table)
    with subprocess.Popen(command) as client:
        until(lambda: sum("/done/" in path for path in remote.listing(f"{bucket}/some.zarr")) >= 2)
        client.kill()
    assert not remote.exists(f"{bucket}/some.zarr/zarr.json")
    done = {path: seen for path, seen in remote.modified(f"{bucket}/some.zarr").items() if "/done/" in path}
    some = blocks.select("train")
    some.to_zarr(f"{bucket}/some.zarr", progress=False)
    after = remote.modified(f"{bucket}/some.zarr")
    assert {path: after[path] for path in done} == done
    chips.select("train").to_zarr(tmp_path / "one.zarr", progress=False)
    assert stored(f"{bucket}/some.zarr") == stored(str(tmp_path / "one.zarr"))
    (tmp_path / "manifest.parquet").write_bytes(remote.get(f"{bucket}/some.zarr/manifest.parquet"))
    assert rows(tmp_path) == rows(tmp_path / "one.zarr")
    assert rd.verify(f"{bucket}/some.zarr").ok


def test_a_web_server_takes_no_plan(s2: rd.Collection) -> None:
    chips = s2.harmonize(["red"], time="1MS").chips(16, cell_km=0.64)
    with pytest.raises(rd.StoreError, match=r"a web server; expected a store: a local path, s3://"):
        chips.by_blocks("http://127.0.0.1:9/plan", progress=False)
