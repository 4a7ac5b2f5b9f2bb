# SPDX-License-Identifier: Apache-2.0
"""What keeps a DaskCluster from starting: the words of the API server and of its pods, as one error that helps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes, parse_bytes

from rasteret_dask.errors import JobError
from rasteret_dask.launching.kubespec import NANNY_BYTES, container_bytes
from rasteret_dask.tasks.workermemory import limit_bytes

__all__ = ["INSTALL", "Fault", "KubeFacts", "fault_of", "refusal"]

INSTALL = (
    "helm install --repo https://helm.dask.org --create-namespace -n dask-operator --generate-name "
    "dask-kubernetes-operator"
)

_IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ErrRegistryUnavailable",
)
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")
_CRASH = ("CrashLoopBackOff", "RunContainerError")
_TRANSIENT = ("ErrImagePull", "ErrRegistryUnavailable", "CreateContainerError", "RunContainerError")
"""Reasons that may pass: Kubernetes tries again, and calls it a back-off where it does not help."""

_ROOM = re.compile(r"exceeded quota: ([^,]+), requested: (.+), used: (.+), limited: (.+)")


@dataclass(frozen=True, slots=True)
class KubeFacts:
    """Which cluster, where, and how large its workers are."""

    name: str
    namespace: str
    threads: int
    memory_bytes: int
    image: str = ""

    @property
    def subject(self) -> str:
        """What messages call it."""
        return f"Kubernetes cluster {self.name} in namespace {self.namespace}"


@dataclass(frozen=True, slots=True)
class Fault:
    """What keeps the pods of a cluster from running."""

    error: JobError
    final: bool
    """False: it may pass by itself, as when nodes are added."""


def refusal(place: KubeFacts, status: int, message: str) -> JobError:
    """Return the error for what the API server refused.

    Parameters
    ----------
    place
        Whose cluster was to be made.
    status
        Of HTTP.
    message
        What the API server said.
    """
    namespace = place.namespace
    if "exceeded quota" in message:
        return _over_quota(place, message)
    if status == 401:
        return JobError(
            place.subject, f"no valid credentials for the API server ({message})", "those of a user of the cluster",
            "Log in to the cluster again, until kubectl get pods answers here.",
        )  # fmt: skip
    if status == 403:
        return JobError(
            place.subject, message, f"a user who may create and delete DaskClusters in {namespace}",
            f"Ask for a Role with create, get, list, patch and delete for daskclusters, daskworkergroups and "
            f"daskautoscalers, and get and list for pods, services and deployments (kubectl auth can-i create "
            f"daskclusters.kubernetes.dask.org -n {namespace}), or name another namespace: "
            "options={'namespace': ...}.",
        )  # fmt: skip
    if status == 404 and re.search(r'namespaces "[^"]*" not found', message):
        return JobError(
            place.subject, message, "a namespace that is there",
            f"Name another one, options={{'namespace': ...}} (kubectl get namespaces), or make it: "
            f"kubectl create namespace {namespace}.",
        )  # fmt: skip
    if status == 404:
        return JobError(
            place.subject, "no resource daskclusters.kubernetes.dask.org", "the dask-kubernetes operator",
            f"Have it installed, once for all namespaces: {INSTALL}; or use another kind of cluster.",
        )  # fmt: skip
    return JobError(
        place.subject, f"{message} (HTTP {status})", "an API server that takes the DaskCluster",
        "Try again; where it stays, compare the versions of the operator and of dask-kubernetes here.",
    )  # fmt: skip


def fault_of(
    place: KubeFacts, pods: Iterable[Mapping[str, Any]], deployments: Iterable[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]] = (),
) -> Fault | None:  # fmt: skip
    """Return what keeps pods from running, a final fault before one that may pass; None: nothing that is told.

    Parameters
    ----------
    place
        Whose pods they are.
    pods, deployments
        Documents of the API, of one component of the cluster.
    nodes
        Those of the cluster, where they may be listed: messages then tell the sizes that would do.
    """
    faults = [_of_pod(place, pod, nodes) for pod in pods]
    faults += [_of_deployment(place, one) for one in deployments]
    return min((fault for fault in faults if fault), key=lambda fault: not fault.final, default=None)


def _of_deployment(place: KubeFacts, deployment: Mapping[str, Any]) -> Fault | None:
    """Return why a Deployment has no pod: admission says it there, and in an event of its ReplicaSet."""
    for condition in deployment.get("status", {}).get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = condition.get("message", "")
            if "exceeded quota" in message:
                return Fault(_over_quota(place, message), final=True)
            error = JobError(
                place.subject, f"pods that are refused: {message}", "pods that the namespace admits",
                f"Change what is refused (size=, options=), or have the namespace's rules changed: "
                f"kubectl describe limitrange,resourcequota -n {place.namespace}.",
            )  # fmt: skip
            return Fault(error, final=True)
    return None


def _of_pod(place: KubeFacts, pod: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> Fault | None:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return Fault(_without_node(place, pod, condition.get("message", ""), nodes), final=False)
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE:
            error = JobError(
                place.subject, f"an image that nodes cannot pull: {place.image} ({reason}: {message})",
                "one that they can",
                "Correct its name and tag, size=rd.WorkerSize(image=...); a private registry wants "
                "options={'pull_secret': ...}.",
            )  # fmt: skip
        elif reason in _CONFIG:
            error = JobError(
                place.subject, f"{name} that cannot start ({reason}: {message})", "what its container names",
                f"Make it, as by kubectl create secret generic NAME --from-literal=... -n {place.namespace}, or leave "
                "the option out.",
            )  # fmt: skip
        elif reason in _CRASH:
            ended = container.get("lastState", {}).get("terminated") or {}
            why = ", ".join(
                str(ended[key]) for key in ("reason", "message", "exitCode") if ended.get(key) is not None
            )
            error = JobError(
                place.subject, f"{name} that ends again and again ({reason}: {why or message})",
                f"an image with this package, Dask and the command dask: {place.image}",
                f"Look at its last words: kubectl logs {name} --previous -n {place.namespace}.",
            )  # fmt: skip
        else:
            continue
        return Fault(error, final=reason not in _TRANSIENT)
    return None


def _over_quota(place: KubeFacts, message: str) -> JobError:
    """Return the error for a full quota, with how many more such workers it has room for."""
    room = ""
    if figures := _ROOM.search(message):
        requested, used, limited = (_amounts(figures[n]) for n in (2, 3, 4))
        left = {
            name: (limited[name] - used[name]) // wanted
            for name, wanted in requested.items()
            if wanted and name in limited and name in used
        }
        if left:
            scarce = min(left, key=lambda name: left[name])
            free = limited[scarce] - used[scarce]
            shown = format_bytes(int(free)) if "memory" in scarce else f"{free:g}"
            room = f" {shown} of {scarce} are left: {_that_fit(place, scarce, free)}."
    return JobError(
        place.subject, message, "room in the quota of the namespace",
        f"Ask for fewer or smaller workers (workers=, size=), end clusters that nobody needs (kubectl get daskclusters "
        f"-n {place.namespace}), or have the quota raised.{room}",
    )  # fmt: skip


def _that_fit(place: KubeFacts, scarce: str, free: float) -> str:
    """Say which workers have room in what is left of memory or cores."""
    if "memory" in scarce:
        return _largest(place, free)
    if "cpu" in scarce:
        return f"rd.WorkerSize(threads={int(free)}) would do" if free >= 1 else "no worker has room"
    return f"room for {int(free)} more"


def _largest(place: KubeFacts, free: float) -> str:
    """Say with how many threads a worker has room in so many bytes, by the rule that sizes workers."""
    if container_bytes(place.memory_bytes) <= free:
        return f"{int(free // container_bytes(place.memory_bytes))} such workers would do"
    for threads in range(place.threads, 0, -1):
        share = place.memory_bytes * limit_bytes(threads) // limit_bytes(place.threads)
        if container_bytes(share) <= free:
            return (
                f"rd.WorkerSize(threads={threads}, memory='{(int(free) - NANNY_BYTES) // 2**20}MiB') would do"
            )
    return "no worker has room"


def _without_node(
    place: KubeFacts, pod: Mapping[str, Any], message: str, nodes: Sequence[Mapping[str, Any]]
) -> JobError:
    """Return the error for a pod that fits on no node, with the sizes that would do."""
    requests = pod["spec"]["containers"][0].get("resources", {}).get("requests", {})
    wanted = " and ".join(f"{value} of {name}" for name, value in requests.items())
    rooms = [one.get("status", {}).get("allocatable", {}) for one in nodes]
    largest = max((_amount(room.get("memory", "0")) for room in rooms), default=0.0)
    cores = max((_amount(room.get("cpu", "0")) for room in rooms), default=0.0)
    remedy = (
        f"The largest node has {format_bytes(int(largest))} and {cores:g} cores: {_largest(place, largest)}."
        if rooms else
        f"Ask for smaller workers, such as size=rd.WorkerSize(threads=1), or add nodes: kubectl describe nodes tells "
        f"what they have, kubectl describe pod {pod['metadata']['name']} -n {place.namespace} what it waits for."
    )  # fmt: skip
    return JobError(
        place.subject, f"no node for {pod['metadata']['name']}: {message}",
        f"a node with room for {wanted or 'it'}", remedy,
    )  # fmt: skip


def _amounts(text: str) -> dict[str, float]:
    """Read ``requests.cpu=2,requests.memory=4Gi``."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name.strip(): _amount(value.strip()) for name, _, value in pairs if value}


def _amount(quantity: str) -> float:
    """Read a quantity of Kubernetes: ``4Gi``, ``500m``, ``2``."""
    if quantity.endswith("m"):
        return float(quantity[:-1]) / 1000
    return float(parse_bytes(quantity + "B" if quantity[-1].isalpha() else quantity))
