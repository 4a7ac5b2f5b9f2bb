"""Streams from a cluster that speaks TLS only: with a client, with Dask's configuration, and from its own workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.security import Security
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.errors import JobError

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SpecCluster]:
    """Return a cluster with certificates in memory: a worker that reads, and one that trains."""
    security = Security.temporary()
    common = {"security": security, "dashboard": False, "protocol": "tls://"}
    workers = {
        name: {"cls": Nanny, "options": {**common, "nthreads": 1, "resources": own}}
        for name, own in {"read": {}, "train": {"train": 1}}.items()
    }
    scheduler = {"cls": Scheduler, "options": {**common, "dashboard_address": ":0", "port": 0}}
    with SpecCluster(workers=workers, scheduler=scheduler, security=security) as running:
        assert running.scheduler_address.startswith("tls://")
        yield running


@pytest.fixture(scope="module")
def client(cluster: SpecCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as running:
        running.wait_for_workers(2, timeout=PATIENCE_S)
        yield running


@pytest.fixture(scope="module")
def certificates(cluster: SpecCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the configuration that names the cluster's certificates, in files."""
    return written(cluster.security, tmp_path_factory.mktemp("certificates"))


def written(security: Any, folder: Path) -> dict[str, str]:
    """Write certificates to files, and return the configuration that names them."""
    texts = {
        "ca-file": security.tls_ca_file,
        "client.cert": security.tls_client_cert,
        "client.key": security.tls_client_key,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {f"distributed.comm.tls.{name}": str(folder / name) for name in texts}


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    return s2.harmonize(bands=["red", "nir"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(30)


@pytest.fixture(scope="module")
def plan(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("plans") / "plan")
    chips.save_plan(place)
    return place


@pytest.fixture(scope="module")
def wanted(chips: rd.Chips) -> list[Any]:
    """Return the batches that threads make."""
    return said(chips.stream(4, shuffle=6))


def said(stream: Any) -> list[Any]:
    return [[b["chip_id"].tolist(), float(b["s2"].sum(dtype="float64"))] for b in stream]


def test_a_client_s_certificates_serve_the_workers_too(
    chips: rd.Chips, plan: str, client: Client, cluster: SpecCluster, wanted: list[Any]
) -> None:
    """Chips come straight from them: were they out of reach, there would be a warning."""
    asked: list[Any] = []
    scheduler: Any = cluster.scheduler
    handlers, gather = scheduler.handlers, scheduler.handlers["gather"]

    async def counting(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return await gather(*args, **kwargs)

    handlers["gather"] = counting
    try:
        assert said(chips.stream(4, shuffle=6, client=client)) == wanted
        assert said(rd.stream_from(client, plan, 4, shuffle=6)) == wanted
    finally:
        handlers["gather"] = gather
    assert not asked


OUTSIDE = """
import json, sys
import rasteret_dask as rd
sys.path.insert(0, sys.argv[1])
from test_stream_tls import said
if __name__ == "__main__":
    print(json.dumps(said(rd.stream_from(sys.argv[2], sys.argv[3], 4, shuffle=6))))
"""


def outside(address: str, plan: str, certificates: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Stream in another process, whose environment names certificates."""
    named = {f"DASK_{k.upper().replace('.', '__').replace('-', '_')}": v for k, v in certificates.items()}
    return subprocess.run(
        [sys.executable, "-c", OUTSIDE, HERE, address, plan],
        env={**os.environ, **named},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_outside_has_certificates_in_its_environment(
    plan: str, cluster: SpecCluster, certificates: dict[str, str], wanted: list[Any]
) -> None:
    done = outside(cluster.scheduler_address, plan, certificates)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


def test_a_process_without_them_is_told_what_to_set_and_ends(plan: str, cluster: SpecCluster) -> None:
    """A client that had begun to connect would wait for itself at the end, and complain."""
    done = outside(cluster.scheduler_address, plan, {})
    assert done.returncode != 0
    assert (
        done.stderr.rstrip()
        .rpartition("\n")[2]
        .startswith(
            f"rasteret_dask.errors.JobError: scheduler {cluster.scheduler_address}: found no certificate"
        )
    )
    assert "DASK_DISTRIBUTED__COMM__TLS__CA_FILE" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_every_exit_takes_the_configuration(
    chips: rd.Chips, cluster: SpecCluster, certificates: dict[str, str], wanted: list[Any], tmp_path: Path
) -> None:
    address = cluster.scheduler_address
    with dask.config.set(certificates):
        assert said(chips.stream(4, shuffle=6, client=address)) == wanted
        chips.to_zarr(tmp_path / "store", client=address, progress=False)
        opened = rd.open_chips(tmp_path / "store")
        assert said(opened.stream(4, shuffle=6, client=address)) == wanted
        assert opened.stats(client=address).chips == len(chips)


def test_who_cannot_be_let_in_is_told_so(
    chips: rd.Chips, cluster: SpecCluster, certificates: dict[str, str], tmp_path: Path
) -> None:
    address = cluster.scheduler_address
    with pytest.raises(JobError, match=r"no certificate.*ca-file.*gives None"):
        next(chips.stream(4, client=address))
    with pytest.raises(JobError, match="no certificate"):
        chips.to_zarr(tmp_path / "store", client=address, progress=False)
    with (
        dask.config.set({**certificates, "distributed.comm.tls.client.cert": str(tmp_path / "nowhere")}),
        pytest.raises(JobError, match=r"cannot be used: .*No such file"),
    ):
        next(chips.stream(4, client=address))
    with pytest.raises(JobError, match="a Dask scheduler that answers"):
        next(chips.stream(4, client=address.replace("tls://", "tcp://")))
    strange = written(Security.temporary(), tmp_path)
    with dask.config.set(strange), pytest.raises(JobError, match="TLS certificate does not match"):
        next(chips.stream(4, client=address))


def consume(plan: str) -> tuple[str, list[Any]]:
    from distributed import get_worker

    return get_worker().name, said(rd.stream_from(None, plan, 4, shuffle=6))


def test_a_worker_that_trains_has_its_own(plan: str, client: Client, wanted: list[Any]) -> None:
    """Its certificates are in memory only, so that an address would not do."""
    assert client.submit(consume, plan, resources={"train": 1}).result() == ("train", wanted)
