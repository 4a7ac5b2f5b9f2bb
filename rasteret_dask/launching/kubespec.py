# SPDX-License-Identifier: Apache-2.0
"""The DaskCluster that the dask-kubernetes operator is asked for, by the rules of the manifests in ``deploy/``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from rasteret_dask.errors import PlanError
from rasteret_dask.launching.request import ClusterRequest, seconds_of

__all__ = ["OPTIONS", "NANNY_BYTES", "KubeOptions", "container_bytes", "dask_cluster"]

OPTIONS: Mapping[str, str] = MappingProxyType({
    "namespace": "where the cluster runs; by default that of this pod or of the current context of kubectl",
    "secret": "name of a Secret, whose values become environment variables of the workers, such as AWS_ACCESS_KEY_ID",
    "config_map": "name of a ConfigMap, whose values become environment variables of the workers, such as AWS_REGION",
    "service_account": "name of the ServiceAccount that workers run as, where a cloud gives it a role (no keys then)",
    "pull_secret": "name of the Secret with which nodes pull the image from a private registry",
    "spot": "True: workers run on spot nodes of EKS, Karpenter, GKE or AKS, the scheduler on others",
    "node_selector": "labels of the nodes that workers run on, such as {'pool': 'dask'}",
    "tolerations": "taints of nodes that workers tolerate: a list of mappings, as in a pod's specification",
    "port_forward": "True: the scheduler is reached through the API server; by default where this process is no pod",
    "start_timeout": "how long the scheduler and the first worker may take, such as '10 minutes', the default",
})  # fmt: skip
"""What only this kind takes -> what it is."""

MIB = 2**20
NANNY_BYTES = 512 * MIB
"""What a worker's container has beside Dask's memory limit, for the nanny and a peak that Dask sees too late."""

SPOT_FAILURES = 30
"""Lost workers that a task survives on spot nodes at least: it is not to blame for them."""

_SPOT_LABELS = {
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
_SPOT_TOLERATIONS = (
    {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "spot", "operator": "Exists"},
)
_SPOT_GRACE_S = 25
"""Google gives 30 s from the notice to the end."""

_STAYS = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""Annotations of a pod that nobody can replace while it runs."""

_POD = {
    "automountServiceAccountToken": False,
    # otherwise a service named dask-... would put DASK_... variables into Dask's configuration
    "enableServiceLinks": False,
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
_CONTAINER = {"securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}

_COMM = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "60s",
}

_ROUTES = (
    "distributed.http.scheduler.prometheus", "distributed.http.scheduler.info", "distributed.http.scheduler.json",
    "distributed.http.health", "distributed.http.proxy", "distributed.http.statics",
    # by it the operator asks whether the cluster is idle, and how many workers it wants; without it, it falls back to
    # messages of its own version of Dask, and sets an idle time-out of 5 minutes in the scheduler
    "distributed.http.scheduler.api",
)  # fmt: skip

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class KubeOptions:
    """The options of ``rd.cluster("kubernetes")``, checked."""

    namespace: str | None = None
    secret: str | None = None
    config_map: str | None = None
    service_account: str | None = None
    pull_secret: str | None = None
    spot: bool = False
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    port_forward: bool | None = None
    start_timeout: float = 600.0
    """Seconds, once it is checked."""

    def __post_init__(self) -> None:
        for name in ("namespace", "secret", "config_map", "service_account", "pull_secret"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and _NAME.fullmatch(value)):
                raise _wrong(name, value, "a name of Kubernetes: lower-case letters, digits, '-' and '.'")
        for name in ("spot", "port_forward"):
            if getattr(self, name) not in (True, False, None):
                raise _wrong(name, getattr(self, name), "True or False")
        if not isinstance(self.node_selector, Mapping):
            raise _wrong("node_selector", self.node_selector, "a mapping of labels, such as {'pool': 'dask'}")
        if not all(isinstance(one, Mapping) for one in self.tolerations):
            raise _wrong("tolerations", self.tolerations, "a list of mappings")
        object.__setattr__(self, "tolerations", tuple(self.tolerations))
        seconds = seconds_of("cluster('kubernetes', options=start_timeout)", self.start_timeout)
        object.__setattr__(self, "start_timeout", seconds)


def _wrong(name: str, value: Any, expected: str) -> PlanError:
    return PlanError(f"cluster('kubernetes', options={name})", f"{value!r:.100}", expected)


def container_bytes(memory_bytes: int) -> int:
    """Return the memory of the container of a worker that has such a memory limit of Dask."""
    return -(-(memory_bytes + NANNY_BYTES) // MIB) * MIB


def dask_cluster(request: ClusterRequest, options: KubeOptions, image: str) -> dict[str, Any]:
    """Return the DaskCluster for a request: its idle time-out, its scheduler and as many workers as it has at least."""
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": request.name, "labels": {"app.kubernetes.io/part-of": "rasteret-dask"}},
        "spec": {
            # the operator deletes the cluster then: a client that was killed cannot
            "idleTimeout": max(1, round(request.idle_timeout_s)),
            "scheduler": _scheduler(request, options, image),
            "worker": {"replicas": request.workers[0], "spec": _worker_pod(request, options, image)},
        },
    }


def _scheduler(request: ClusterRequest, options: KubeOptions, image: str) -> dict[str, Any]:
    if options.spot:
        request = replace(request, allowed_failures=max(request.allowed_failures, SPOT_FAILURES))
    environment = {
        **_COMM,
        "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": repr(list(_ROUTES)),
        **request.scheduler_environment,
    }
    container = {
        "name": "scheduler",
        "image": image,
        "args": ["dask", "scheduler", "--host", "0.0.0.0", "--port", "8786", "--dashboard-address", ":8787"],
        "ports": [
            {"name": "tcp-comm", "containerPort": 8786},
            {"name": "http-dashboard", "containerPort": 8787},
        ],
        "env": _variables(environment),
        "resources": {
            "requests": {"cpu": "1", "memory": "2Gi"},
            "limits": {"cpu": "2", "memory": "2Gi"},
        },
        # restarting the scheduler loses every task it knows, so it gets two minutes to answer
        **_probes(initial_s=15, period_s=20),
        **_CONTAINER,
    }
    pod = _pod(container, options)
    if options.spot:
        rules = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in _SPOT_LABELS.items()]
        pod["affinity"] = _affinity([{"matchExpressions": rules}])
    ports = [
        {"name": name, "protocol": "TCP", "port": port, "targetPort": name}
        for name, port in (("tcp-comm", 8786), ("http-dashboard", 8787))
    ]
    selector = {"dask.org/cluster-name": request.name, "dask.org/component": "scheduler"}
    annotations = {"metadata": {"annotations": _STAYS}} if options.spot else {}
    return {
        "spec": pod,
        "service": {"type": "ClusterIP", "selector": selector, "ports": ports},
        **annotations,
    }


def _worker_pod(request: ClusterRequest, options: KubeOptions, image: str) -> dict[str, Any]:
    lifetime = request.size.lifetime
    # the operator sets DASK_WORKER_NAME and DASK_SCHEDULER_ADDRESS
    args = [
        "dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", str(request.size.threads),
        "--memory-limit", str(request.memory_bytes), "--local-directory", "/scratch", "--dashboard-address", ":8788",
        "--death-timeout", f"{request.death_timeout_s:g}",
        *([] if lifetime is None else ["--lifetime", f"{lifetime:g} s" if isinstance(lifetime, float) else lifetime]),
    ]  # fmt: skip
    resources = {
        "cpu": str(request.size.threads),
        "memory": f"{container_bytes(request.memory_bytes) // MIB}Mi",
    }
    sources = [
        {kind: {"name": name}}
        for kind, name in (("secretRef", options.secret), ("configMapRef", options.config_map))
        if name
    ]
    container = {
        "name": "worker",
        "image": image,
        "args": args,
        "ports": [{"name": "http-dashboard", "containerPort": 8788}],
        "env": _variables({**request.environment, **_COMM}),
        **({"envFrom": sources} if sources else {}),
        # more than was requested may be taken away at any time
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        **_probes(initial_s=60, period_s=30),
        **_CONTAINER,
    }
    pod = _pod(container, options) | {
        "terminationGracePeriodSeconds": _SPOT_GRACE_S if options.spot else 60,
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "10Gi"}}],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    tolerations = [*options.tolerations, *(_SPOT_TOLERATIONS if options.spot else ())]
    if tolerations:
        pod["tolerations"] = [dict(one) for one in tolerations]
    if options.spot:  # one of these labels: those of EKS, Karpenter, GKE, AKS
        pod["affinity"] = _affinity([
            {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
            for key, value in _SPOT_LABELS.items()
        ])  # fmt: skip
    return pod


def _pod(container: dict[str, Any], options: KubeOptions) -> dict[str, Any]:
    pull = {"imagePullSecrets": [{"name": options.pull_secret}]} if options.pull_secret else {}
    return {**_POD, **pull, "containers": [container]}


def _probes(initial_s: int, period_s: int) -> dict[str, Any]:
    health = {"path": "/health", "port": "http-dashboard"}
    ready = {"httpGet": health, "initialDelaySeconds": 5, "periodSeconds": 10, "timeoutSeconds": 5}
    alive = {"httpGet": health, "initialDelaySeconds": initial_s, "periodSeconds": period_s, "timeoutSeconds": 10,
             "failureThreshold": 6}  # fmt: skip
    return {"readinessProbe": ready, "livenessProbe": alive}


def _affinity(terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _variables(environment: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in environment.items()]
