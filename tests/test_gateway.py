"""``rd.cluster("gateway")`` on a real dask-gateway-server with the options of ``deploy/hub/values.yaml``."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.config
import pytest
from conftest import digests
from gateways import PASSWORD, GatewayServer, by_hand, running_cluster, serving_gateway
from hypothesis import given
from hypothesis import strategies as st
from pages import DOCS, run_page
from test_hub import IMAGE, extra_config
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.launching.gateway import _sizes
from rasteret_dask.launching.request import ClusterRequest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """Return a server; an idle cluster may end sooner than on a hub."""
    python = extra_config().replace("min=60,", "min=2,")
    with serving_gateway(tmp_path_factory.mktemp("gateway"), python) as running:
        yield running


@pytest.fixture
def gateway(server: GatewayServer) -> Iterator[GatewayServer]:
    """Return the server that Dask's configuration names; the test leaves no cluster."""
    with dask.config.set(server.configuration):
        yield server
    until(lambda: not server.clusters())


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    return s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(20)


def refused(kind: type[Exception], match: str) -> AbstractContextManager[Any, bool]:
    return pytest.raises(kind, match=match)


def pixels(store: Path) -> dict[str, str]:
    return {path: digest for path, digest in digests(store).items() if path.startswith("pixels/c/")}


def ids(stream: Any) -> list[Any]:
    return [batch["chip_id"].tolist() for batch in stream]


# -- what works -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_exit_runs_on_a_gateway_s_cluster_and_nothing_is_left(
    gateway: GatewayServer, chips: rd.Chips, tmp_path: Path
) -> None:
    wanted = ids(chips.stream(4))
    chips.to_zarr(tmp_path / "threads", progress=False)
    chips.save_plan(tmp_path / "plan")
    size = rd.WorkerSize(
        memory="2GiB", lifetime="2 hours", image="registry.lab/rasteret:1", environment={"AWS_REGION": "eu"}
    )
    options = {"idle_timeout": "5 minutes", "allowed_failures": 9}
    with rd.cluster("gateway", chips=chips, workers=1, size=size, options=options) as client:
        report = chips.to_zarr(tmp_path / "store", progress=False)
        assert report.committed
        assert pixels(tmp_path / "store") == pixels(tmp_path / "threads") != {}
        assert ids(chips.stream(4)) == wanted
        assert ids(rd.stream_from(client, tmp_path / "plan", 4)) == wanted
        assert chips.stats(client=client).chips == 20

        (worker,) = client.scheduler_info()["workers"].values()
        assert (worker["nthreads"], worker["memory_limit"]) == (2, 2 * 2**30)
        (environment,) = client.run(lambda: dict(os.environ)).values()
        names = ("IMAGE", "AWS_REGION", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX")
        assert [environment[name] for name in names] == ["registry.lab/rasteret:1", "eu", "1", "2"]
        assert [*client.run(lambda dask_worker: dask_worker.lifetime).values()] == [7200]
        assert (
            client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.services["gateway"].idle_timeout)
            == 300
        )

        with by_hand() as other:
            (running,) = other.list_clusters()
            with running_cluster(other, running.name) as cluster:  # as a second notebook does
                chips.to_zarr(tmp_path / "second", client=cluster, progress=False)
                assert ids(rd.stream_from(cluster, tmp_path / "plan", 4)) == wanted
            with pytest.raises(
                JobError, match=rf"dask-gateway.*certificate.*Gateway\(\)\.connect\('{running.name}'\)"
            ):
                next(chips.stream(4, client=running.scheduler_address))
        assert client.scheduler_info()["workers"]
        assert gateway.clusters()
    until(lambda: not gateway.clusters())


@pytest.mark.slow
def test_workers_come_and_go_with_the_work(
    gateway: GatewayServer, chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of Dask's configuration hold: a hub has the image of the user's server there."""
    monkeypatch.setenv("JUPYTER_IMAGE_SPEC", "registry.lab/notebook:7")
    with (
        dask.config.set({"gateway.cluster.options": {"image": "{JUPYTER_IMAGE_SPEC}"}}),
        rd.cluster("gateway", chips=chips, workers=(0, 2)) as client,
    ):
        assert client.run_on_scheduler(lambda: os.environ["IMAGE"]) == "registry.lab/notebook:7"
        assert not client.scheduler_info()["workers"]
        assert chips.to_zarr(tmp_path / "store", progress=False).committed
        assert sum(len(batch) for batch in ids(chips.stream(4, client=client))) == 20
        until(lambda: not client.scheduler_info()["workers"])
        until(lambda: not [p for p in gateway.clusters() if "worker" in p.cmdline()])


ENDED = """
import sys, time
import rasteret_dask as rd

if __name__ == "__main__":
    with rd.cluster("gateway", workers=(0, 1), options={"idle_timeout": sys.argv[1]}):
        print("runs", flush=True)
        time.sleep(3600)
"""


@pytest.mark.slow
def test_a_client_that_is_ended_leaves_no_cluster(server: GatewayServer, tmp_path: Path) -> None:
    """By SIGTERM it shuts its cluster down; killed, it cannot, and the cluster ends by its idle time-out."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    environment = os.environ | server.environment
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    clients: list[subprocess.Popen[str]] = []
    try:
        for idle in ("2 h", "20 s"):  # one after another: the second is looked at while its time lasts
            client = subprocess.Popen([sys.executable, str(script), idle], env=environment, **pipes)
            clients.append(client)
            assert client.stdout is not None
            assert client.stdout.readline() == "runs\n", client.stderr and client.stderr.read()
        assert len([p for p in server.clusters() if "scheduler" in p.cmdline()]) == 2
        clients[0].terminate()
        clients[1].kill()
        for client, code in zip(clients, (143, -9), strict=True):
            _, printed = client.communicate(timeout=PATIENCE_S)
            assert client.returncode == code, printed
            assert not printed
        until(lambda: not server.clusters())
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
                client.communicate()


@pytest.mark.slow
def test_a_cluster_ends_though_the_block_fails_and_the_login_has_expired(gateway: GatewayServer) -> None:
    """Then the cluster's scheduler is asked, which takes the cluster's own certificate."""
    from dask_gateway.auth import BasicAuth

    auth = BasicAuth("ada", PASSWORD)
    with (
        refused(ZeroDivisionError, "of the job"),
        rd.cluster("gateway", workers=1, options={"auth": auth}) as client,
    ):
        client.wait_for_workers(1)
        auth.password = "expired"
        time.sleep(1.1)  # so long the gateway remembers a login
        raise ZeroDivisionError("of the job")
    until(lambda: not gateway.clusters())


@pytest.mark.slow
def test_a_cluster_that_cannot_be_shut_down_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told, serving_gateway(tmp_path / "gateway") as server:
        warnings.simplefilter("always")
        with dask.config.set(server.configuration), rd.cluster("gateway", workers=(0, 1)):
            server.process.terminate()
            server.process.wait(PATIENCE_S)
    (text,) = [str(one.message) for one in told if "may still run" in str(one.message)]
    assert re.search(r"Cluster \w{32} may still run: gateway http\S+: found no answer", text)
    assert re.search(r"stop_cluster\('\w{32}'\)", text)
    assert [one.filename for one in told if str(one.message) == text] == [__file__]


@pytest.mark.slow
def test_the_blocks_of_the_guide_run(
    gateway: GatewayServer, small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    printed = run_page(DOCS / "jupyterhub.md", tmp_path, monkeypatch, having="a dask-gateway")
    assert f"{gateway.address}/clusters/" in printed
    assert f"'image': {IMAGE!r}" in printed
    assert len(rd.open_chips(tmp_path / "train.zarr")) == len(rd.open_chips(tmp_path / "train-2.zarr")) > 0


# -- what is refused --------------------------------------------------------------------------------------


def starts(**arguments: Any) -> None:
    """Start a cluster that does not start."""
    with rd.cluster("gateway", workers=1, **arguments):
        raise AssertionError("it runs")


@pytest.mark.slow
def test_options_that_a_gateway_does_not_have_or_refuses_are_told_with_those_it_has(
    gateway: GatewayServer,
) -> None:
    has = f"worker_cores=2, worker_memory=3.5, image={IMAGE!r}, environment={{}}, idle_timeout=600.0"
    for name, value, reason in (
        ("worker_core", 4, "No option 'worker_core' available"),
        ("worker_cores", 400, "worker_cores must be <= 16"),
        ("worker_cores", "four", "worker_cores must be an integer, got 'four'"),
        (
            "image",
            "rasteret",
            "image 'rasteret' has no tag: name it as REGISTRY/NAME:TAG",
        ),  # the server says so
    ):
        with pytest.raises(PlanError) as raised:
            starts(options={"cluster_options": {name: value}})
        assert reason in raised.value.found
        assert has in raised.value.expected or "image='rasteret'" in raised.value.expected
        assert "cluster_options" in raised.value.remedy
    with (
        dask.config.set({"gateway.cluster.options": {"memory": 4}}),
        pytest.raises(
            PlanError, match=rf"gateway.cluster.options in Dask's configuration: .*'memory'.*{re.escape(has)}"
        ),
    ):
        starts()
    with (
        dask.config.set({"gateway.cluster.options": {"image": "{NO_SUCH_IMAGE}"}}),
        refused(PlanError, r"gateway.cluster.options in Dask's configuration: .*NO_SUCH_IMAGE"),
    ):
        starts()


@pytest.mark.slow
def test_workers_that_a_gateway_does_not_make_so_large_are_refused_before_they_start(
    gateway: GatewayServer,
) -> None:
    with refused(
        JobError, r"worker_memory must be <= 64.*workers of 2 threads and 80.00 GiB.*WorkerSize\(threads=1\)"
    ):
        starts(size=rd.WorkerSize(memory="80GiB"))
    with refused(JobError, r"worker_cores must be <= 16.*workers of 32 threads"):
        starts(size=rd.WorkerSize(threads=32, memory="4GiB"))


@pytest.mark.slow
def test_a_gateway_without_options_gives_workers_of_its_own_size(tmp_path: Path, chips: rd.Chips) -> None:
    with serving_gateway(tmp_path / "gateway") as server, dask.config.set(server.configuration):
        with refused(
            PlanError,
            r"WorkerSize\(image=\), which it lets nobody choose.*as it has no options",
        ):
            starts(size=rd.WorkerSize(image="registry.lab/rasteret:1"))
        with rd.cluster("gateway", chips=chips, workers=1) as client:
            client.wait_for_workers(1)
            (worker,) = client.scheduler_info()["workers"].values()
            assert (worker["nthreads"], worker["memory_limit"]) == (1, 2 * 2**30)
            assert chips.to_zarr(tmp_path / "store", progress=False).committed


@pytest.mark.slow
def test_a_cluster_that_does_not_start_is_told_and_taken_down(gateway: GatewayServer) -> None:
    where = "quota is used up.*The gateway's log names this cluster"
    with pytest.raises(
        JobError, match=rf"cluster \w{{32}} of gateway http.*status (FAILED|STOPPED); expected.*{where}"
    ):
        starts(size=rd.WorkerSize(image="missing:1"))
    with pytest.raises(
        JobError, match=rf"cluster \w{{32}} of gateway http.*status PENDING after 1 s; expected.*{where}"
    ):
        starts(size=rd.WorkerSize(image="pending:1"), options={"start_timeout": "1 s"})


def test_a_cluster_on_kubernetes_is_told_with_the_command_that_shows_why() -> None:
    from rasteret_dask.launching.gateway import where_to_look

    assert "kubectl --namespace hub describe pods --selector gateway.dask.org/cluster=9f3a" in where_to_look(
        "hub.9f3a"
    )


@pytest.mark.slow
@pytest.mark.parametrize("password", ["", "expired"])
def test_a_login_that_is_refused_is_told_with_how_to_log_in(server: GatewayServer, password: str) -> None:
    login = {"gateway.auth.type": "basic", "gateway.auth.kwargs": {"username": "ada", "password": password}}
    with (
        dask.config.set(login),
        refused(JobError, r"a login that it refuses \(401.*gateway.auth.kwargs"),
    ):
        starts(options={"address": server.address})


@pytest.mark.slow
def test_a_token_of_a_hub_that_is_missing_or_has_expired_is_renewed_by_a_restart(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"address": server.address, "auth": "jupyterhub"}
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN", raising=False)
    with refused(
        PlanError, r"JUPYTERHUB_API_TOKEN environment variable not found.*Restart your server on the hub"
    ):
        starts(options=options)
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "expired")
    with refused(JobError, r"a login that it refuses \(401.*Restart your server on the hub"):
        starts(options=options)


@given(
    memory=st.integers(2**28, 2**38 - 1),
    unit=st.sampled_from([2**30, 2**20, 1]),
    wanted=st.integers(2**28, 2**40),
)
def test_the_default_of_a_gateway_tells_what_it_counts_memory_in(memory: int, unit: int, wanted: int) -> None:
    """Whatever the unit: a worker of 256 MiB to 256 GiB is one in that unit only."""
    request = ClusterRequest("x", (1, 1), rd.WorkerSize(), wanted, {}, {})
    assert _sizes(request, {"worker_memory": memory / unit})["worker_memory"] * unit == wanted


def test_a_unit_that_is_not_clear_is_asked_for() -> None:
    request = ClusterRequest("x", (1, 1), rd.WorkerSize(), 2**31, {}, {})
    with refused(
        PlanError, r"worker_memory=0.01, in a unit that is not clear; .*options={'memory_unit': 'GiB'}"
    ):
        _sizes(request, {"worker_memory": 0.01})
    stated = replace(request, options={"memory_unit": "GiB"})  # the remedies
    assert _sizes(stated, {"worker_memory": 0.01})["worker_memory"] == 2
    chosen = replace(request, options={"cluster_options": {"worker_memory": 3.0}})
    assert "worker_memory" not in _sizes(chosen, {"worker_memory": 0.01})
    with refused(PlanError, r"'memory_unit': found 'GB'; expected one of 'GiB', 'MiB', 'B'"):
        starts(options={"memory_unit": "GB"})


def test_no_gateway_is_named() -> None:
    with refused(PlanError, r"no address of a gateway.*DASK_GATEWAY__ADDRESS"):
        starts()


def test_nobody_answers_at_the_address(serve: Callable[[Path], tuple[str, Any]], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with refused(JobError, rf"gateway {nobody}: found no answer: .*a dask-gateway server"):
            starts(options={"address": nobody})
    with refused(PlanError, r"gateway hub.lab: found no URL.*https://hub.lab"):
        starts(options={"address": "hub.lab"})
    (tmp_path / "api").mkdir()
    other, _ = serve(tmp_path)
    with refused(JobError, r"a server that is no dask-gateway.*/services/dask-gateway"):
        starts(options={"address": other})
    (tmp_path / "api" / "version").write_text("<html>Sign in</html>")
    with refused(JobError, r"a server that is no dask-gateway.*/services/dask-gateway"):
        starts(options={"address": other})


def test_a_login_that_makes_no_sense_is_refused_before_anything_is_asked() -> None:
    for auth in ("nobody.knows", 7):
        with refused(PlanError, r"no login.*'jupyterhub', 'basic', 'kerberos'"):
            starts(options={"address": "http://gateway.example", "auth": auth})
