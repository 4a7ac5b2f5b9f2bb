# SPDX-License-Identifier: Apache-2.0
"""A DaskCluster of the dask-kubernetes operator, for the length of a block.

The cluster is made and waited for here, where the API server's and the pods' own words become one error. What comes
after that (addresses, forwarded ports, scaling) is ``dask_kubernetes.operator.KubeCluster``, which would wait for ever
for a pod that cannot start.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config

from rasteret_dask.errors import JobError, PlanError, user_level
from rasteret_dask.extras import needs
from rasteret_dask.launching.kubefaults import Fault, KubeFacts, fault_of, refusal
from rasteret_dask.launching.kubespec import OPTIONS, KubeOptions, dask_cluster
from rasteret_dask.launching.request import ClusterRequest

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import HasScheduler

__all__ = ["OPTIONS", "most_workers", "started"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where a pod finds its namespace; kr8s 0.20 takes ``default`` instead (dask-kubernetes issue 921)."""

ANSWER_S = 30.0
"""Seconds that the API server has for its first answer: a wrong address may take the connection and say nothing."""

LOOK_S = 0.5
"""Seconds between two looks at what starts."""

REMOVAL_S = 60.0
"""Seconds that the operator has to let go of a deleted cluster."""


def started(request: ClusterRequest) -> AbstractContextManager[HasScheduler]:
    """Start a cluster, and delete it with everything that belongs to it at the end of the block.

    Raises
    ------
    MissingExtraError
        When dask-kubernetes is not installed.
    PlanError
        When an option makes no sense, or nobody says which image to run.
    JobError
        When the API server refuses the cluster, or its scheduler or first worker cannot start.
    """
    with needs("kubernetes", "a cluster on Kubernetes"):
        import dask_kubernetes.operator  # noqa: F401
    return _started(request, KubeOptions(**request.options), _image(request.size.image))


def most_workers(threads: int, memory_bytes: int) -> int:
    """Return how many workers there may be where nobody says how many: as many as the namespace's quota admits."""
    return sys.maxsize


def _image(image: str | None) -> str:
    """Return the image that is meant: a notebook's own, where a hub started it."""
    default = "ghcr.io/dask/dask:latest"  # dask-kubernetes' own, without this package
    configured = dask.config.get("kubernetes.image", default)
    for choice in (image, None if configured == default else configured, os.environ.get("JUPYTER_IMAGE")):
        if choice:
            return str(choice)
    raise PlanError(
        "cluster('kubernetes', size=)", "no image", "one that has this package, for the scheduler and the workers",
        "Name it, size=rd.WorkerSize(image='REGISTRY/NAME:TAG'), in a recipe image under [cluster]: deploy/Dockerfile "
        "builds one.",
    )  # fmt: skip


@contextmanager
def _started(request: ClusterRequest, options: KubeOptions, image: str) -> Iterator[HasScheduler]:
    from dask_kubernetes.operator import KubeCluster
    from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode
    from distributed.utils import LoopRunner

    runner = LoopRunner(asynchronous=False)
    runner.start()
    api = None
    try:
        api = runner.run_sync(_api)
        namespace = options.namespace or _namespace(api)
        place = KubeFacts(request.name, namespace, request.size.threads, request.memory_bytes, image)
        document = dask_cluster(request, options, image)
        idle_s = document["spec"]["idleTimeout"]
        # while it starts, it may wait for nodes for the whole of start_timeout
        document["spec"]["idleTimeout"] = idle_s + math.ceil(options.start_timeout)
        work = _Work(api, place, document, request.workers, idle_s)
        try:
            runner.run_sync(work.create)
            runner.run_sync(work.until_up, options.start_timeout)
            inside = "KUBERNETES_SERVICE_HOST" in os.environ
            with (
                dask.config.set({"kubernetes.custom-cluster-spec": None}),
                KubeCluster(
                    name=request.name,
                    namespace=namespace,
                    create_mode=CreateMode.CONNECT_ONLY,
                    shutdown_on_close=False,  # deleted below, also where it never came so far
                    port_forward_cluster_ip=not inside
                    if options.port_forward is None
                    else options.port_forward,
                    loop=runner.loop,
                    quiet=True,
                ) as cluster,
            ):
                yield cluster
        finally:
            runner.run_sync(work.delete)
    finally:
        runner.run_sync(_closed, api)
        runner.stop()


async def _api() -> Any:
    """Return the API server that is meant, once it has answered."""
    import httpx
    import kr8s.asyncio

    subject = "Kubernetes"
    try:
        return await asyncio.wait_for(kr8s.asyncio.api(), ANSWER_S)
    except TimeoutError:
        answer = f"no answer of the API server within {ANSWER_S:g} s"
    except kr8s.ServerError as error:
        status = error.response.status_code if error.response is not None else 0
        answer = f"an API server that answers {status}: {error}"
    except httpx.HTTPError as error:
        answer = f"no API server that answers: {error}"
    except ValueError as error:
        if "credentials" not in str(error):
            raise JobError(
                subject, f"a kubeconfig that cannot be used: {error}", "one that kubectl can use"
            ) from error
        raise JobError(
            subject, "no kubeconfig, and no pod's service account", "access to a cluster",
            "Log in to one, so that kubectl get pods answers, or set KUBECONFIG to its file; in a notebook of a hub, "
            "ask for a service account.",
        ) from error  # fmt: skip
    except (OSError, KeyError) as error:  # a file or a command of the kubeconfig that is missing
        raise JobError(
            subject, f"a kubeconfig that cannot be used: {error!r}", "one that kubectl can use"
        ) from error
    raise JobError(
        subject, answer, "one that answers here",
        "Look at kubectl cluster-info: the address, a VPN or proxy, and that you are logged in.",
    )  # fmt: skip


async def _closed(api: Any) -> None:
    """Close the connections to the API server: kr8s has no name for that."""
    session = getattr(api, "_session", None)
    if session is not None:
        await session.aclose()


def _namespace(api: Any) -> str:
    if configured := dask.config.get("kubernetes.namespace", None):
        return str(configured)
    if not api.auth.active_context and POD_NAMESPACE.exists():
        return POD_NAMESPACE.read_text().strip()
    return str(api.namespace)


@dataclass(frozen=True, slots=True)
class _Work:
    """One DaskCluster, from its creation to its end; every method runs on Dask's loop."""

    api: Any
    place: KubeFacts
    document: dict[str, Any]
    workers: tuple[int, int]
    idle_s: int

    async def create(self) -> None:
        """Ask for the cluster."""
        await self._answered(self._object("DaskCluster", self.document).create)

    async def until_up(self, patience_s: float) -> None:
        """Wait until the scheduler and a first worker are ready; JobError where that cannot be.

        A scheduler that waits for workers is idle from its start on, so the start's time is added to the idle time-out.
        """
        begin, last_line = time.monotonic(), ""
        operator_s = float(dask.config.get("kubernetes.resource-timeout", 60))
        while True:
            phase = await self._phase()
            waited = time.monotonic() - begin
            if not phase and waited > operator_s:
                raise self._ignored(operator_s)
            waits, fault = await self._missing()
            if not waits:
                break
            if fault is not None and fault.final:
                raise fault.error
            if waited > patience_s:
                raise fault.error if fault else self._late(waits, patience_s)
            if fault and (text := fault.error.found) != last_line:
                last_line = text
                _log.warning("%s: waits: %s", self.place.subject, text)
            await asyncio.sleep(LOOK_S)
        idle_s = self.idle_s + math.ceil(time.monotonic() - begin)
        cluster = self._object("DaskCluster")
        await self._answered(partial(cluster.patch, {"spec": {"idleTimeout": idle_s}}))
        if self.workers[0] < self.workers[1]:
            await self._scale()

    async def _scale(self) -> None:
        """Make the autoscaler here, where a refusal is told; ``KubeCluster.adapt`` then finds it."""
        least, most = self.workers
        name = self.place.name
        document = {
            "apiVersion": "kubernetes.dask.org/v1",
            "kind": "DaskAutoscaler",
            "metadata": {"name": name, "labels": {"dask.org/cluster-name": name}},
            "spec": {"cluster": name, "minimum": least, "maximum": most},
        }
        await self._answered(self._object("DaskAutoscaler", document).create)

    async def delete(self) -> None:
        """Delete the cluster, and wait until it is gone: its pods end with it."""
        import httpx
        import kr8s

        cluster = self._object("DaskCluster")
        try:
            await cluster.delete()
            end = time.monotonic() + REMOVAL_S
            while await cluster.exists():
                if time.monotonic() > end:
                    self._left(f"it is still there after {REMOVAL_S:g} s")
                    return
                await asyncio.sleep(LOOK_S)
        except kr8s.NotFoundError:
            return
        except (kr8s.ServerError, kr8s.APITimeoutError, httpx.HTTPError) as error:
            self._left(str(error))

    def _left(self, why: str) -> None:
        warnings.warn(
            f"{self.place.subject} may not be deleted: {why}. The operator deletes it "
            f"{self.idle_s} s after its last task; or do it yourself: kubectl delete "
            f"daskcluster {self.place.name} -n {self.place.namespace}.",
            stacklevel=user_level(),
        )

    def _object(self, kind: str, document: dict[str, Any] | None = None) -> Any:
        """Return an object of the operator's, this cluster by its name without a document."""
        from kr8s.asyncio.objects import new_class

        kind_of_operator = new_class(kind, "kubernetes.dask.org/v1")
        return kind_of_operator(
            document or {"metadata": {"name": self.place.name}}, namespace=self.place.namespace, api=self.api
        )

    async def _answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what the API server answers; JobError where it refuses."""
        import httpx
        import kr8s

        try:
            return await ask()
        except kr8s.ServerError as error:
            status = error.response.status_code if error.response is not None else 500
            raise refusal(self.place, status, str(error)) from error
        except (kr8s.APITimeoutError, httpx.HTTPError) as error:
            raise JobError(
                self.place.subject, f"an API server that is gone: {error}", "one that answers", "Try again."
            ) from error

    async def _phase(self) -> str:
        """Return what the operator says of the cluster; empty where it has not seen it."""
        import kr8s

        cluster = self._object("DaskCluster")
        try:
            await self._answered(cluster.refresh)
        except kr8s.NotFoundError as error:
            raise JobError(
                self.place.subject,
                "that it was deleted while it started",
                "a cluster that starts",
                "Try again.",
            ) from error
        return str(cluster.raw.get("status", {}).get("phase", ""))

    async def _missing(self) -> tuple[str, Fault | None]:
        """Return which component is not ready yet (empty: none), and what keeps it from that."""
        for component in ("scheduler", "worker")[: 1 + (self.workers[0] > 0)]:
            pods = await self._list("Pod", component)
            if any(_ready(pod) for pod in pods):
                continue
            return component, fault_of(
                self.place, pods, await self._list("Deployment", component), await self._nodes(pods)
            )
        return "", None

    async def _nodes(self, pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the nodes where a pod waits for one, and this user may list them."""
        waits = [one for pod in pods for one in pod.get("status", {}).get("conditions", ())]
        if any(one["type"] == "PodScheduled" and one["status"] == "False" for one in waits):
            return await self._list("Node")
        return []

    async def _list(self, kind: str, component: str = "") -> list[dict[str, Any]]:
        """Return documents of a kind; none where this user may not list them, which only makes messages poorer."""
        import kr8s
        from kr8s.asyncio.objects import Deployment, Node, Pod

        kinds = {"Deployment": Deployment, "Node": Node, "Pod": Pod}
        labels = {"dask.org/cluster-name": self.place.name, "dask.org/component": component}
        with suppress(kr8s.ServerError):
            return [
                one
                async for one in self.api.get(
                    kinds[kind],
                    namespace=self.place.namespace,
                    label_selector=labels if component else None,
                    raw=True,
                )
            ]
        return []

    def _ignored(self, operator_s: float) -> JobError:
        return JobError(
            self.place.subject, f"no operator that looked at it within {operator_s:g} s",
            "one that runs, and watches this namespace",
            "Look at it: kubectl get pods -A -l app.kubernetes.io/name=dask-kubernetes-operator, and its log; it may "
            "be limited to other namespaces.",
        )  # fmt: skip

    def _late(self, component: str, patience_s: float) -> JobError:
        return JobError(
            self.place.subject, f"no {component} that is ready after {patience_s:g} s", "one that starts",
            f"Look at kubectl get events -n {self.place.namespace} and kubectl describe pods -l "
            f"dask.org/component={component} -n {self.place.namespace}, or wait longer: "
            "options={'start_timeout': '30 minutes'}.",
        )  # fmt: skip


def _ready(pod: dict[str, Any]) -> bool:
    conditions = {one["type"]: one["status"] for one in pod.get("status", {}).get("conditions", ())}
    return conditions.get("Ready") == "True"
