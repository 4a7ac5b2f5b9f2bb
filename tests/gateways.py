"""A real dask-gateway-server with its local backend: clusters are processes of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask_gateway
import psutil
from left_processes import MARK, assert_none_left, environment_of, processes_of
from waiting import PATIENCE_S, until

__all__ = ["PASSWORD", "GatewayServer", "by_hand", "running_cluster", "serving_gateway"]

ROOT = Path(__file__).parents[1]
PASSWORD = "of-the-tests"
LISTENS = re.compile(r"HTTP routes listening at http://(?P<address>\S+)")

CONFIGURATION = """
from dask_gateway_server.backends.local import LocalClusterConfig, UnsafeLocalBackend
from traitlets import Dict, Float, Unicode


class Processes(LocalClusterConfig):
    '''What the options of a gateway on Kubernetes set besides: processes have no use for it.'''

    image = Unicode(config=True)
    worker_cores_limit = Float(config=True)
    worker_extra_container_config = Dict(config=True)


class Backend(UnsafeLocalBackend):
    def get_env(self, cluster):
        return {{**super().get_env(cluster), "IMAGE": cluster.config.image}}

    def get_scheduler_command(self, cluster):
        # what Kubernetes makes of an image that is not there, and of a quota that is used up
        others = {{"missing:1": ["false"], "pending:1": ["sleep", "3600"]}}
        return others.get(cluster.config.image) or super().get_scheduler_command(cluster)


c.DaskGateway.backend_class = Backend
c.DaskGateway.address = c.Proxy.address = "127.0.0.1:0"
c.SimpleAuthenticator.password = {password!r}
c.Backend.cluster_config_class = Processes
c.Backend.clusters_directory = {folder!r}
c.Backend.inherited_environment = ["PATH", "PYTHONPATH", "RASTERET_DASK_CACHE", "TMPDIR", {mark!r}]
c.SimpleAuthenticator.cache_max_age = 1  # so that a login is asked for again
c.Backend.cluster_start_timeout = c.Backend.worker_start_timeout = 300
c.Backend.check_timeouts_period = c.Backend.cluster_status_period = c.Backend.worker_status_period = 1
c.ClusterConfig.adaptive_period = 0.5
"""


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """A server that runs."""

    address: str
    """``http://127.0.0.1:PORT``."""
    process: subprocess.Popen[bytes]
    log: Path
    mark: str = field(repr=False)
    """Value of MARK."""

    @property
    def configuration(self) -> dict[str, object]:
        """Dask's configuration, as an administrator sets it for the users of a gateway."""
        return {
            "gateway.address": self.address,
            "gateway.auth.type": "basic",
            "gateway.auth.kwargs": {"username": "ada", "password": PASSWORD},
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, as a hub sets them for its users."""
        return {
            "DASK_GATEWAY__ADDRESS": self.address,
            "DASK_GATEWAY__AUTH__TYPE": "basic",
            "DASK_GATEWAY__AUTH__KWARGS__USERNAME": "ada",
            "DASK_GATEWAY__AUTH__KWARGS__PASSWORD": PASSWORD,
        }

    def clusters(self) -> list[psutil.Process]:
        """Return the processes of its clusters: schedulers, workers and nannies."""
        return [p for p in processes_of(self.mark) if "DASK_GATEWAY_CLUSTER_NAME" in environment_of(p)]


@contextlib.contextmanager
def by_hand() -> Iterator[Any]:
    """Connect to the gateway of Dask's configuration, as its own users do.

    The client is kept: one that is collected after its end prints an error (dask-gateway 2026.3).
    """
    with dask_gateway.Gateway() as gateway:
        yield gateway
    _CLOSED.append(gateway)


@contextlib.contextmanager
def running_cluster(gateway: Any, name: str) -> Iterator[Any]:
    """Connect to a cluster that runs, and leave it as it is."""
    with gateway.connect(name) as cluster:
        yield cluster
    _CLOSED.append(cluster.gateway)


_CLOSED: list[Any] = []


@contextlib.contextmanager
def serving_gateway(folder: Path, configuration: str = "", prefix: str = "") -> Iterator[GatewayServer]:
    """Run a server in a block; at its end nothing of it may be left.

    Parameters
    ----------
    folder
        For its configuration, its log and the folders of its clusters.
    configuration
        Python that follows the configuration of the tests, as ``extraConfig`` does in a Helm chart: ``c`` is there.
    prefix
        Path below which it answers, as a service of a hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clusters = folder / "clusters"
    clusters.mkdir()
    text = CONFIGURATION.format(password=PASSWORD, folder=str(clusters), mark=MARK)
    (folder / "configuration.py").write_text(f"{text}\nc.Proxy.prefix = {prefix!r}\n{configuration}")
    log, mark = folder / "server.log", uuid.uuid4().hex
    # the gateway starts `dask-scheduler` and `dask-worker`, unless it is told otherwise: the image's shims have them
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), str(ROOT / "deploy" / "bin"), os.environ["PATH"]]
    )
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), MARK: mark}
    with log.open("wb") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "dask_gateway_server", "-f", str(folder / "configuration.py")],
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        yield GatewayServer(f"http://{_listening(server, log, prefix)}{prefix}", server, log, mark)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE_S)
        assert_none_left(mark)


def _listening(server: subprocess.Popen[bytes], log: Path, prefix: str) -> str:
    """Return the address at which a server answers, once it does."""

    def ready() -> bool:
        assert server.poll() is None, f"the server ended:\n{log.read_text()}"
        return "Dask-Gateway server started" in log.read_text()

    until(ready)
    match = LISTENS.search(log.read_text())
    assert match, log.read_text()
    until(lambda: _answers(f"http://{match['address']}{prefix}/api/health"))
    return match["address"]


def _answers(url: str) -> bool:
    """Tell whether the server's proxy knows its way already."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
