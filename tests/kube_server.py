"""A Kubernetes API server on loopback, with a node that starts real processes for its pods.

It serves the part of the API that dask-kubernetes, its operator and this package ask for: objects that are created,
read, listed, watched, patched and deleted; finalizers; children that go with their owners; ports of pods forwarded over
a websocket. Its node does what Kubernetes does with a Deployment: a pod each, whose command runs as a process of this
machine, on free ports of loopback, and is started again when it ends.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import WSMsgType, web
from dask.utils import parse_bytes
from deployment_rules import problems
from ports import free_port
from waiting import PATIENCE_S, until

__all__ = ["KubeServer", "Waiting", "operator", "patched", "served"]

Document = dict[str, Any]

GROUPS = {
    "v1": {
        "pods": "Pod", "services": "Service", "secrets": "Secret", "configmaps": "ConfigMap", "events": "Event",
        "namespaces": "Namespace", "nodes": "Node",
    },
    "apps/v1": {"deployments": "Deployment"},
    "apiextensions.k8s.io/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
    "kubernetes.dask.org/v1": {"daskclusters": "DaskCluster", "daskworkergroups": "DaskWorkerGroup",
                               "daskautoscalers": "DaskAutoscaler", "daskjobs": "DaskJob"},
}  # fmt: skip
WITHOUT_NAMESPACE = ("namespaces", "nodes", "customresourcedefinitions")
DASK = "kubernetes.dask.org/v1"


@dataclass(frozen=True, slots=True)
class Waiting:
    """How the container of a component's pods waits for ever, in the words of a kubelet."""

    reason: str
    message: str = ""
    ended: Document | None = None
    """Its last end, of a container that ended before."""


@dataclass
class KubeServer:
    """Objects of a small cluster, what was asked for, and what there is no room for."""

    namespaces: tuple[str, ...] = ("lab",)
    without: set[str] = field(default_factory=set)
    """Groups that are not installed, such as ``kubernetes.dask.org/v1``."""
    denied: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """{(method, plural): (status, message)}: what is answered instead."""
    token: str = "a-token"
    """Of the one user there is."""
    quota: dict[str, str] = field(default_factory=dict)
    """What the pods of the namespace may request together, such as ``{"requests.memory": "6Gi"}``."""
    limit: str = ""
    """What else admission says of every pod."""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    """By component (``scheduler``, ``worker``): pods whose container waits."""
    pretends: bool = False
    """Whether DaskClusters get their Deployments without an operator, and pods are ready without a process."""
    objects: dict[tuple[str, str, str], Document] = field(default_factory=dict)
    """By (plural, namespace, name)."""
    posted: list[Document] = field(default_factory=list)
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    """(who, verb, resource) of every request for objects, as a Role names them."""
    deleted: list[tuple[str, str]] = field(default_factory=list)
    """(kind, name) of objects that are gone, in turn."""

    def __post_init__(self) -> None:
        self.url = ""
        self.folder = Path(tempfile.mkdtemp(prefix="kube-"))
        self._version = 1
        self._changes: list[tuple[int, str, Document]] = []
        self._changed: asyncio.Event = asyncio.Event()
        self._containers: dict[str, _Container] = {}
        self._stopped: list[_Container] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = False
        for name in self.namespaces:
            self.objects["namespaces", "", name] = {"metadata": {"name": name, "uid": name}}

    # -- what tests look at --------------------------------------------------------------------------------

    def login(self, token: str = "a-token") -> Path:
        """Write a file for ``KUBECONFIG``, whose context has the first namespace."""
        path = self.folder / f"kubeconfig-{token}"
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.url}}],
            "users": [{"name": "ada", "user": {"token": token}}],
            "contexts": [
                {"name": "lab",
                 "context": {"cluster": "lab", "user": "ada", "namespace": self.namespaces[0]}}
            ],
        }))  # fmt: skip
        return path

    def every(self, kind: str) -> list[Document]:
        """Return the objects of a kind that are there now."""
        return [copy.deepcopy(one) for one in [*self.objects.values()] if one.get("kind") == kind]

    def processes(self) -> list[str]:
        """Return the component of each pod whose process runs, of deleted ones too."""
        return [each.component for each in [*self._containers.values(), *self._stopped] if each.running()]

    def put(self, plural: str, name: str, document: Document) -> None:
        """Place an object as someone else would have made it."""
        namespace = "" if plural in WITHOUT_NAMESPACE else self.namespaces[0]
        metadata = {"name": name, "namespace": namespace, "uid": str(uuid.uuid4())}
        self.objects[plural, namespace, name] = {"kind": _kind(plural), "metadata": metadata} | document

    def deny(self, method: str, plural: str, status: int, message: str) -> None:
        """Answer requests for a kind with a refusal."""
        self.denied[method, plural] = status, message

    # -- the API -------------------------------------------------------------------------------------------

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.strip("/")
        who = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if who not in (self.token, "operator"):
            return _failure(401, "Unauthorized", "Unauthorized")
        if path == "version":
            return web.json_response({"major": "1", "minor": "34", "gitVersion": "v1.34.1"})
        if path in ("api", "apis"):
            return web.json_response(self._groups(path))
        match path.split("/"):
            case ["api", version, *rest]:
                group = version
            case ["apis", name, version, *rest]:
                group = f"{name}/{version}"
            case _:
                group, rest = "", []
        if group in self.without or group not in GROUPS:
            return web.Response(status=404, text="404 page not found\n")
        if not rest:
            return web.json_response(self._resources(group))
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, *deeper = [*rest, ""]
        if plural not in GROUPS[group]:
            return web.Response(status=404, text="404 page not found\n")
        self.asked.add((who, _verb(request, name), "/".join(filter(None, [plural, *deeper]))))
        if refused := self.denied.get((request.method, plural)):
            return _failure(refused[0], "Forbidden", refused[1])
        if deeper[:1] == ["portforward"]:
            return await self._forward(request, name)
        if request.method == "POST":
            return await self._create(request, plural, namespace)
        if name:
            return await self._one(request, (plural, namespace, name))
        if request.query.get("watch") in ("true", "1"):
            return await self._watch(request, plural, namespace)
        items = list(self._chosen(request, plural, namespace))
        listed = {"kind": _kind(plural) + "List", "apiVersion": group, "items": items,
                  "metadata": {"resourceVersion": str(self._version)}}  # fmt: skip
        return web.json_response(listed)

    def _groups(self, path: str) -> Document:
        if path == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        groups = []
        for group in GROUPS.keys() - self.without - {"v1"}:
            version = {"groupVersion": group, "version": group.split("/")[1]}
            groups.append({"name": group.split("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "groups": groups}

    def _resources(self, group: str) -> Document:
        verbs = ["create", "delete", "get", "list", "patch", "watch"]
        rows = [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "verbs": verbs,
             "namespaced": plural not in WITHOUT_NAMESPACE}
            for plural, kind in GROUPS[group].items()
        ]  # fmt: skip
        if group == DASK:
            rows.append(rows[-1] | {"name": "daskjobs/status"})
        return {"kind": "APIResourceList", "groupVersion": group, "resources": rows}

    def _chosen(self, request: web.Request, plural: str, namespace: str) -> Iterator[Document]:
        for (kind, where, _), document in [*self.objects.items()]:
            if kind == plural and (not namespace or where == namespace) and _selected(document, request):
                yield document

    async def _create(self, request: web.Request, plural: str, namespace: str) -> web.Response:
        document = await request.json()
        if namespace and ("namespaces", "", namespace) not in self.objects:
            return _failure(404, "NotFound", f'namespaces "{namespace}" not found')
        if plural != "events":
            self.posted.append(copy.deepcopy(document))
        metadata = document.setdefault("metadata", {})
        if "name" not in metadata:
            metadata["name"] = metadata.get("generateName", "") + uuid.uuid4().hex[:5]
        key = plural, namespace, metadata["name"]
        if key in self.objects:
            return _failure(409, "AlreadyExists", f'{plural} "{metadata["name"]}" already exists')
        if plural != "events" and (complaints := problems(document)):
            return _failure(
                422, "Invalid", f'{document["kind"]} "{metadata["name"]}" is invalid: {complaints}'
            )
        metadata |= {"namespace": namespace, "uid": str(uuid.uuid4()),
                     "creationTimestamp": "2026-05-01T00:00:00Z"}  # fmt: skip
        if plural == "services":
            document["status"] = {"loadBalancer": {}}
        self._set("ADDED", key, document)
        if plural == "deployments":
            self._task(self._deploy(key))
        if plural == "daskclusters" and self.pretends:
            self._pretend(document)
        return web.json_response(document, status=201)

    async def _one(self, request: web.Request, key: tuple[str, str, str]) -> web.Response:
        document = self.objects.get(key)
        if document is None:
            return _failure(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        match request.method:
            case "GET":
                return web.json_response(document)
            case "DELETE":
                document["metadata"].setdefault("deletionTimestamp", "2026-05-01T01:00:00Z")
                self._set("MODIFIED", key, document)
            case "PATCH":
                changes = await request.json()
                document = copy.deepcopy(document)
                if isinstance(changes, list):
                    if not patched(document, changes):
                        return _failure(422, "Invalid", "the server rejected our request: test failed")
                else:
                    document = _merged(document, changes)
                self._set("MODIFIED", key, document)
        self._drop_if_over(key)
        return web.json_response(document)

    def _set(self, change: str, key: tuple[str, str, str], document: Document) -> None:
        self._version += 1
        document["metadata"]["resourceVersion"] = str(self._version)
        document.setdefault("apiVersion", next(g for g, rows in GROUPS.items() if key[0] in rows))
        document.setdefault("kind", _kind(key[0]))
        if change == "DELETED":
            self.objects.pop(key, None)
            self.deleted.append((document["kind"], document["metadata"]["name"]))
        else:
            self.objects[key] = document
        self._changes.append((self._version, change, copy.deepcopy(document)))
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop_if_over(self, key: tuple[str, str, str]) -> None:
        """Remove an object that is to be deleted and has no finalizer left, and its children after it."""
        document = self.objects.get(key)
        if document is None or "deletionTimestamp" not in document["metadata"]:
            return
        if document["metadata"].get("finalizers"):
            return
        self._set("DELETED", key, document)
        if container := self._containers.pop(key[2], None):
            container.stop()
            self._stopped.append(container)
        for child, other in [*self.objects.items()]:
            owners = other["metadata"].get("ownerReferences", ())
            if any(owner["uid"] == document["metadata"]["uid"] for owner in owners):
                other["metadata"].setdefault("deletionTimestamp", "2026-05-01T01:00:00Z")
                self._set("MODIFIED", child, other)
                self._drop_if_over(child)

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        async for change, document in self._changes_after(since):
            metadata = document["metadata"]
            if document["kind"] != _kind(plural) or namespace not in ("", metadata.get("namespace", "")):
                continue
            if _selected(document, request):
                line = json.dumps({"type": change, "object": document}) + "\n"
                try:
                    await response.write(line.encode())
                except ConnectionError:  # whoever watched is gone
                    break
        return response

    async def _changes_after(self, since: int) -> AsyncIterator[tuple[str, Document]]:
        while not self._gone:
            more = self._changed
            for version, change, document in self._changes[:]:
                if version > since:
                    since = version
                    yield change, document
            await more.wait()

    async def _forward(self, request: web.Request, pod: str) -> web.StreamResponse:
        """Carry one connection to a port of a pod: channel 0 is data, channel 1 errors."""
        port = int(request.query["ports"])
        socket_ = web.WebSocketResponse(max_msg_size=0)
        await socket_.prepare(request)
        for channel in (b"\x00", b"\x01"):
            await socket_.send_bytes(channel + port.to_bytes(2, "little"))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._containers[pod].ports[port])

        async def back() -> None:
            while block := await reader.read(2**20):
                await socket_.send_bytes(b"\x00" + block)
            await socket_.close()

        task = asyncio.ensure_future(back())
        try:
            async for message in socket_:
                if message.type == WSMsgType.BINARY:
                    writer.write(message.data[1:])
                    await writer.drain()
        finally:
            task.cancel()
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()
            with suppress(OSError, asyncio.CancelledError):
                await task
        return socket_

    # -- the node ------------------------------------------------------------------------------------------

    def _task(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deploy(self, key: tuple[str, str, str]) -> None:
        """Make the pod of a Deployment (one replica, as the operator has them), and keep it running."""
        deployment = self.objects[key]
        component = deployment["metadata"]["labels"]["dask.org/component"]
        name = f"{key[2]}-{uuid.uuid4().hex[:5]}"
        if refusal := self.refused(deployment["spec"]["template"]["spec"]):
            message = f'pods "{name}" is forbidden: {refusal}'
            condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
                         "message": message}  # fmt: skip
            deployment["status"] = {"conditions": [condition]}
            self._set("MODIFIED", key, deployment)
            return
        template = copy.deepcopy(deployment["spec"]["template"])
        owner = {"kind": "Deployment", "name": key[2], "uid": deployment["metadata"]["uid"]}
        pod = {
            "metadata": {"name": name, "namespace": key[1], "uid": str(uuid.uuid4()),
                         "labels": template["metadata"]["labels"], "ownerReferences": [owner]},
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }  # fmt: skip
        where = "pods", key[1], name
        if why := self.without_node(pod["spec"]):
            pod["status"]["conditions"] = [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
            ]
            self._set("ADDED", where, pod)
            return
        self._set("ADDED", where, pod)
        waiting = self.waiting.get(component)
        for kind, missing in self._sources(pod):
            if not self.objects.get((f"{kind}s", key[1], missing)):
                waiting = Waiting("CreateContainerConfigError", f'{kind} "{missing}" not found')
        if waiting is not None:
            state = {"waiting": {"reason": waiting.reason, "message": waiting.message}}
            ended = {"lastState": {"terminated": waiting.ended}} if waiting.ended else {}
            pod["status"]["containerStatuses"] = [
                {"name": component, "ready": False, "state": state, **ended}
            ]
            self._set("MODIFIED", where, pod)
            return
        if self.pretends:
            pod["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            self._set("MODIFIED", where, pod)
            return
        container = _Container(component, pod, self)
        self._containers[name] = container
        while where in self.objects and not self._gone:
            await asyncio.get_running_loop().run_in_executor(None, container.start)
            await self._follow(where, container)

    def _sources(self, pod: Document) -> Iterator[tuple[str, str]]:
        """Yield (kind, name) of what a pod takes environment variables from."""
        for source in pod["spec"]["containers"][0].get("envFrom", ()):
            for reference, one in source.items():
                yield reference.removesuffix("Ref").lower(), one["name"]

    def environment(self, pod: Document) -> dict[str, str]:
        """Return the environment variables of a pod's container."""
        values: dict[str, str] = {}
        for kind, name in self._sources(pod):
            source = self.objects[f"{kind}s", pod["metadata"]["namespace"], name]
            values.update(source.get("stringData") or source["data"])
        return values | {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}

    def _pretend(self, cluster: Document) -> None:
        """Make what the operator makes of a DaskCluster, as far as pods go."""
        name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        cluster["status"] = {"phase": "Running"}
        parts = {"scheduler": [f"{name}-scheduler"]}
        parts["worker"] = [f"{name}-default-worker-{n}" for n in range(cluster["spec"]["worker"]["replicas"])]
        for component, deployments in parts.items():
            labels = {"dask.org/cluster-name": name, "dask.org/component": component}
            for each in deployments:
                template = {"metadata": {"labels": labels}, "spec": cluster["spec"][component]["spec"]}
                owner = {"kind": "DaskCluster", "name": name, "uid": cluster["metadata"]["uid"]}
                metadata = {"name": each, "namespace": namespace, "labels": labels, "ownerReferences": [owner],
                            "uid": str(uuid.uuid4())}  # fmt: skip
                key = "deployments", namespace, each
                self._set("ADDED", key, {"metadata": metadata, "spec": {"template": template}})
                self._task(self._deploy(key))

    def refused(self, spec: Document) -> str:
        """Say what admission says of a pod: the namespace's quota, or another rule."""
        pods = self.every("Pod")
        for name, hard in self.quota.items():
            wanted = _request(spec, name)
            used = sum(_request(pod["spec"], name) for pod in pods)
            if wanted + used > _amount(hard):
                figures = [f"{name}={_quantity(name, each)}" for each in (wanted, used, _amount(hard))]
                return "exceeded quota: compute, requested: {}, used: {}, limited: {}".format(*figures)
        return self.limit

    def without_node(self, spec: Document) -> str:
        """Say what the scheduler says of a pod that fits on no node; without nodes, everything fits."""
        nodes = self.every("Node")
        lacks = {"memory": 0, "cpu": 0}
        for node in nodes:
            missing = [
                name
                for name in lacks
                if _request(spec, f"requests.{name}") > _amount(node["status"]["allocatable"][name])
            ]
            if not missing:
                return ""
            lacks[missing[0]] += 1
        why = ", ".join(f"{count} Insufficient {name}" for name, count in lacks.items() if count)
        tail = (
            f"0/{len(nodes)} nodes are available: {len(nodes)} No preemption victims found for incoming pod."
        )
        return f"0/{len(nodes)} nodes are available: {why}. preemption: {tail}" if nodes else ""

    async def _follow(self, where: tuple[str, str, str], container: _Container) -> None:
        """Keep a pod's status as its process is, until that ends."""
        phase = ""
        while where in self.objects and container.running() and not self._gone:
            ready = await asyncio.get_running_loop().run_in_executor(None, container.ready)
            new = "ready" if ready else "running"
            if new != phase and where in self.objects:
                phase, pod = new, self.objects[where]
                flag = "True" if ready else "False"
                pod["status"] = {
                    "phase": "Running",
                    "podIP": "127.0.0.1",
                    "conditions": [{"type": kind, "status": flag} for kind in ("Ready", "ContainersReady")],
                    "containerStatuses": [
                        {"name": container.component, "ready": ready, "state": {"running": {}},
                         "restartCount": container.starts - 1}
                    ],
                }  # fmt: skip
                self._set("MODIFIED", where, pod)
            await asyncio.sleep(0.1)

    def names(self) -> None:
        """Write down where the services of the cluster are reached, as a DNS server would know it."""
        services = {}
        for container in [*self._containers.values()]:
            if container.component == "scheduler":
                labels, namespace = (
                    container.pod["metadata"]["labels"],
                    container.pod["metadata"]["namespace"],
                )
                services[f"{labels['dask.org/cluster-name']}-scheduler.{namespace}"] = container.ports
        (self.folder / "names.json.new").write_text(json.dumps(services))
        (self.folder / "names.json.new").replace(self.folder / "names.json")

    def address(self, cluster: str) -> str:
        """Return where a cluster's scheduler listens on this machine."""
        ports = json.loads((self.folder / "names.json").read_text())[
            f"{cluster}-scheduler.{self.namespaces[0]}"
        ]
        return f"tcp://127.0.0.1:{ports['8786']}"

    def stop(self) -> None:
        """End every pod, and remove what they left on the disk."""
        self._gone = True
        for container in self._containers.values():
            container.stop()
        for container in [*self._containers.values(), *self._stopped]:
            container.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Container:
    """The one container of a pod: a command that runs as a process of this machine."""

    def __init__(self, component: str, pod: Document, server: KubeServer) -> None:
        self.component, self.pod, self.server = component, pod, server
        self.spec: Document = pod["spec"]["containers"][0]
        self.ports: dict[int, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.over = False

    def start(self) -> None:
        if self.over:
            return
        self.ports = {port["containerPort"]: free_port() for port in self.spec["ports"]}
        environment = self._environment()
        args = [self._local(arg, environment) for arg in self.spec["args"]]
        log = self.server.folder / f"{self.pod['metadata']['name']}.log"
        program = str(Path(sys.executable).parent / args[0])
        scratch = self.server.folder / self.pod["metadata"]["name"]
        scratch.mkdir(exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [program, *args[1:]],
                env=environment,
                stdout=out,
                stderr=out,
                cwd=scratch,
                start_new_session=True,
            )
        self.starts += 1
        if self.component == "scheduler":
            self.server.names()

    def _environment(self) -> dict[str, str]:
        values = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
        values |= self.server.environment(self.pod)
        if address := values.get("DASK_SCHEDULER_ADDRESS"):
            cluster, namespace = address.removeprefix("tcp://").split(".")[:2]
            until(lambda: f"{cluster}.{namespace}" in self._services() or self.over)
            port = self._services().get(f"{cluster}.{namespace}", {}).get("8786", 0)
            values["DASK_SCHEDULER_ADDRESS"] = f"tcp://127.0.0.1:{port}"
        return values

    def _services(self) -> dict[str, dict[str, int]]:
        with suppress(FileNotFoundError):
            services: dict[str, dict[str, int]] = json.loads((self.server.folder / "names.json").read_text())
            return services
        return {}

    def _local(self, arg: str, environment: dict[str, str]) -> str:
        """Turn an argument into one for this machine: loopback, a free port, a folder of its own."""
        for name, value in environment.items():
            arg = arg.replace(f"$({name})", value)
        for port, free in self.ports.items():
            if arg == str(port):
                return str(free)
            if arg == f":{port}":
                return f"127.0.0.1:{free}"
        if arg == "0.0.0.0":
            return "127.0.0.1"
        if arg == "/scratch":
            return str(self.server.folder / self.pod["metadata"]["name"])
        return arg

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ready(self) -> bool:
        probe = self.spec["readinessProbe"]["httpGet"]
        (port,) = [each["containerPort"] for each in self.spec["ports"] if each["name"] == probe["port"]]
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.ports[port]}{probe['path']}", timeout=5
            ) as got:
                return bool(got.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        self.over = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def wait(self) -> None:
        if self.process is not None:
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _kind(plural: str) -> str:
    return next(rows[plural] for rows in GROUPS.values() if plural in rows)


def _verb(request: web.Request, name: str) -> str:
    """Return the verb of a request, as a Role names it."""
    if request.method != "GET":
        return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[request.method]
    watched = request.query.get("watch") in ("true", "1")
    return "get" if name else "watch" if watched else "list"


def _amount(quantity: str) -> float:
    """Read a quantity of Kubernetes."""
    return float(parse_bytes(quantity + "B")) if quantity[-1].isalpha() else float(quantity)


def _request(spec: Document, name: str) -> float:
    """Return what a pod requests of a resource, such as ``requests.memory``."""
    part, _, resource = name.partition(".")
    return sum(_amount(one["resources"][part][resource]) for one in spec["containers"])


def _quantity(name: str, amount: float) -> str:
    return f"{int(amount) // 2**20}Mi" if "memory" in name else f"{amount:g}"


def _failure(code: int, reason: str, message: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message,
              "code": code}  # fmt: skip
    return web.json_response(status, status=code)


def _selected(document: Document, request: web.Request) -> bool:
    labels = document["metadata"].get("labels", {})
    for wanted in filter(None, request.query.get("labelSelector", "").split(",")):
        name, _, value = wanted.partition("=")
        if labels.get(name) != value:
            return False
    for wanted in filter(None, request.query.get("fieldSelector", "").split(",")):
        name, _, value = wanted.partition("=")
        value_there: Any = document
        for part in name.split("."):
            value_there = value_there.get(part, {})
        if value_there != value:
            return False
    return True


def _merged(document: Document, changes: Document) -> Document:
    """Apply a JSON merge patch (RFC 7396)."""
    out = dict(document)
    for name, value in changes.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, dict):
            inner = out.get(name)
            out[name] = _merged(inner if isinstance(inner, dict) else {}, value)
        else:
            out[name] = value
    return out


def patched(document: Document, changes: list[Document]) -> bool:
    """Apply a JSON patch (RFC 6902) of test, add, replace and remove; False where a test fails."""
    for change in changes:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in change["path"].split("/")[1:]]
        inner: Any = document
        for part in path:
            inner = inner[int(part)] if isinstance(inner, list) else inner.setdefault(part, {})
        at: Any = int(last) if isinstance(inner, list) and last != "-" else last
        match change["op"]:
            case "test":
                if inner[at] != change["value"]:
                    return False
            case "remove":
                del inner[at]
            case _ if isinstance(inner, list):
                inner.insert(len(inner) if at == "-" else at, change["value"])
            case _:
                inner[at] = change["value"]
    return True


@contextmanager
def served(server: KubeServer | None = None) -> Iterator[KubeServer]:
    """Serve an API in a thread, for the length of a block; every process of its pods is over at the end."""
    server = server or KubeServer()
    started, over = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", "/{path:.*}", server.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        loops.append(asyncio.get_running_loop())
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, over.wait)
        server._gone = True
        server._changed.set()
        for task in [*server._tasks]:
            task.cancel()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="kube-server")
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield server
    finally:
        server.stop()
        over.set()
        thread.join()


@contextmanager
def operator(server: KubeServer) -> Iterator[None]:
    """Run the real operator of dask-kubernetes beside an API, until the block ends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    environment |= {
        "KUBECONFIG": str(server.login("operator")),
        "KUBE_NAMES": str(server.folder / "names.json"),
    }
    log = server.folder / "operator.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "kube_operator.py"), server.namespaces[0]],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
