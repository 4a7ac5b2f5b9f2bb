"""A real JupyterHub with a real dask-gateway: a user logs in, gets a server, and runs cells over the hub's proxy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import requests
import yaml
from gateways import GatewayServer, serving_gateway
from left_processes import MARK, assert_none_left
from ports import free_port
from test_hub import IMAGE, extra_config
from waiting import PATIENCE_S, until

from rasteret_dask.demo.world import World

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "01_first_steps.ipynb"
PASSWORD = "of-the-tests"

CONFIGURATION = """
import os

public, api = {ports!r}
c.JupyterHub.bind_url = f"http://127.0.0.1:{{public}}"
c.JupyterHub.hub_bind_url = {hub!r}
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{{api}}"
c.JupyterHub.services = [{{"name": "dask-gateway", "url": {gateway!r}, "api_token": "of-the-gateway"}}]
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {home!r}
c.Spawner.args = ["--allow-root"] if os.getuid() == 0 else []
c.Spawner.environment = {environment!r} | {{
    "DASK_GATEWAY__ADDRESS": f"{{c.JupyterHub.bind_url}}/services/dask-gateway",
    "DASK_GATEWAY__PROXY_ADDRESS": {gateway!r}.replace("http", "gateway"),
    "DASK_GATEWAY__PUBLIC_ADDRESS": "/services/dask-gateway/",
    "DASK_GATEWAY__AUTH__TYPE": "jupyterhub",
    "JUPYTER_IMAGE_SPEC": {image!r},
}}
c.Spawner.start_timeout = c.Spawner.http_timeout = 600
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 0}}
with open("address", "w") as file:
    file.write(c.JupyterHub.bind_url)
"""


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub that runs."""

    address: str
    home: Path
    """Of users: a folder for each."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the command of the hub's proxy, which npm installs."""
    installed = shutil.which("configurable-http-proxy")
    if installed:
        return installed
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("npm")
    if npm is None:
        pytest.skip("the hub's proxy, configurable-http-proxy, is not installed, and there is no npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "configurable-http-proxy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    if done.returncode:
        pytest.skip(
            f"npm cannot install the hub's proxy, configurable-http-proxy: {done.stderr.strip()[-200:]}"
        )
    return str(folder / "node_modules" / ".bin" / "configurable-http-proxy")


GATEWAY = """
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.JupyterHubAuthenticator"
c.JupyterHubAuthenticator.jupyterhub_api_url = "{hub}/hub/api"
c.JupyterHubAuthenticator.jupyterhub_api_token = "of-the-gateway"
"""


@pytest.fixture(scope="module")
def gateway(proxy: str, hub_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """Return a gateway that lets in whom the hub knows."""
    python = GATEWAY.format(hub=hub_url) + extra_config()
    with serving_gateway(tmp_path_factory.mktemp("gateway"), python, "/services/dask-gateway") as running:
        yield running


@pytest.fixture(scope="module")
def hub_url() -> str:
    """Return where the hub itself will listen, behind its proxy."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def hub(
    proxy: str, gateway: GatewayServer, hub_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub"), proxy, hub_url, gateway) as running:
        yield running


@pytest.fixture(scope="module")
def ada(hub: Hub) -> Iterator[User]:
    """Return a user who has a server."""
    user = User(hub, "ada")
    user.start_server()
    yield user
    user.ask("DELETE", "/hub/api/users/ada/server")


@contextmanager
def serving(folder: Path, proxy: str, hub_url: str, gateway: GatewayServer) -> Iterator[Hub]:
    """Run a hub in a block; at its end nothing of it may be left."""
    mark, home = uuid.uuid4().hex, folder / "home"
    values = yaml.safe_load((ROOT / "deploy" / "hub" / "values.yaml").read_text())
    environment = values["jupyterhub"]["singleuser"]["extraEnv"] | {
        MARK: mark,
        "PYTHONPATH": str(ROOT),
        "RASTERET_DASK_CACHE": str(folder / "cache"),
    }
    text = CONFIGURATION.format(
        ports=(free_port(), free_port()),
        proxy=proxy,
        password=PASSWORD,
        home=str(home / "{username}"),
        environment=environment,
        hub=hub_url,
        gateway=gateway.address.removesuffix("/services/dask-gateway"),
        image=IMAGE,
    )
    (folder / "jupyterhub_config.py").write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "hub.log").open("wb") as log:
        hub = subprocess.Popen(
            [sys.executable, "-m", "jupyterhub"],
            cwd=folder,
            env=os.environ | {"PATH": path, MARK: mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:

        def ready() -> bool:
            assert hub.poll() is None, (folder / "hub.log").read_text()
            return "JupyterHub is now running at" in (folder / "hub.log").read_text()

        until(ready)
        yield Hub((folder / "address").read_text(), home)
    finally:
        if hub.poll() is None:
            hub.send_signal(signal.SIGTERM)
        hub.wait(PATIENCE_S)
        assert_none_left(mark)


class User:
    """Somebody at a browser, logged in."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub, self.name, self.session = hub, name, requests.Session()
        login = f"{hub.address}/hub/login"
        self.session.get(login).raise_for_status()
        form = {"username": name, "password": PASSWORD, "_xsrf": self._token()}
        self.session.post(login, data=form, params={"_xsrf": self._token()}).raise_for_status()

    def _token(self) -> str:
        return next(cookie.value or "" for cookie in self.session.cookies if cookie.name == "_xsrf")

    def start_server(self) -> None:
        """Start a server of one's own, and wait until it runs."""
        made = self.session.post(
            f"{self.hub.address}/hub/api/users/{self.name}/tokens", params={"_xsrf": self._token()}, json={}
        )
        made.raise_for_status()
        self.session.headers["Authorization"] = f"token {made.json()['token']}"
        self.ask("POST", f"/hub/api/users/{self.name}/server")
        until(lambda: self.ask("GET", f"/hub/api/users/{self.name}")["servers"].get("", {}).get("ready"))

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Return what the hub or the server answers."""
        answer = self.session.request(method, f"{self.hub.address}{path}", json=body or None)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def run(self, cells: list[str]) -> list[list[dict[str, Any]]]:
        """Run cells in a kernel, as a notebook page does; return the outputs of each."""
        import websocket

        kernel = self.ask("POST", f"/user/{self.name}/api/kernels", name="python3")["id"]
        url = f"{self.hub.address.replace('http', 'ws', 1)}/user/{self.name}/api/kernels/{kernel}/channels"
        header = {"Authorization": self.session.headers["Authorization"]}
        with closing(websocket.create_connection(url, header=header, timeout=PATIENCE_S)) as channel:
            shown = [list(_outputs(channel, cell)) for cell in cells]
        self.ask("DELETE", f"/user/{self.name}/api/kernels/{kernel}")
        return shown


def _outputs(channel: Any, cell: str) -> Iterator[dict[str, Any]]:
    asked = uuid.uuid4().hex
    header = {
        "msg_id": asked,
        "msg_type": "execute_request",
        "session": asked,
        "username": "",
        "version": "5.3",
    }
    content = {
        "code": cell,
        "silent": False,
        "store_history": True,
        "allow_stdin": False,
        "stop_on_error": True,
    }
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    channel.send(json.dumps(message))
    while True:
        answer = json.loads(channel.recv())
        if answer["parent_header"].get("msg_id") != asked:
            continue
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            return
        if answer["channel"] == "iopub" and answer["msg_type"] not in ("status", "execute_input"):
            yield {"kind": answer["msg_type"], **answer["content"]}


def texts(outputs: list[dict[str, Any]]) -> str:
    return "".join(output.get("text") or "\n".join(output.get("traceback", ())) for output in outputs)


@pytest.mark.slow
def test_the_first_notebook_runs_on_a_hub(ada: User) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    shown = ada.run([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    outputs = [output for cell in shown for output in cell]
    assert not [output for output in outputs if output["kind"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert (ada.hub.home / "ada" / "first_steps").is_dir()


LOCAL = """
from distributed import LocalCluster
with LocalCluster(n_workers=0, dashboard_address=":0") as cluster:
    print(cluster.dashboard_link)
"""

PLAN = """
import rasteret_dask as rd
s2 = rd.build_from_stac({items!r}, name="s2")
chips = s2.harmonize(["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(20)
"""

CLUSTER = """
import os, urllib.request
with rd.cluster("gateway", chips=chips, workers=1) as client:
    print(chips.to_zarr("train.zarr", progress=False).committed)
    print(client.run_on_scheduler(lambda: os.environ["IMAGE"]))
    page = urllib.request.urlopen({address!r} + client.dashboard_link)
    print(client.dashboard_link, page.status, "Dask" in page.read().decode())
"""

EXPIRED = """
os.environ["JUPYTERHUB_API_TOKEN"] = "expired"
with rd.cluster("gateway", workers=1) as client:
    pass
"""


@pytest.mark.slow
def test_a_user_of_a_hub_starts_a_cluster_by_one_word(
    ada: User, gateway: GatewayServer, small_world: World
) -> None:
    """The hub's token is the login, its proxy leads to the dashboard, and clusters run the image of the notebook."""
    plan = PLAN.format(items=str(small_world.sentinel2))
    cells = [LOCAL, plan, CLUSTER.format(address=ada.hub.address), EXPIRED]
    local, planned, cluster, expired = map(texts, ada.run(cells))
    assert local.startswith("/user/ada/proxy/")
    assert not planned
    committed, image, dashboard = cluster.splitlines()
    assert (committed, image) == ("True", IMAGE)
    assert re.fullmatch(r"/services/dask-gateway/clusters/\w{32}/status 200 True", dashboard)
    assert re.search(r"JobError.*a login that it refuses.*Restart your server on the hub", expired, re.DOTALL)
    until(lambda: not gateway.clusters())
