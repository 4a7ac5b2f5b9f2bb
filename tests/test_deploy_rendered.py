"""What ``kubectl apply -k`` sends, and what the operator makes of it: the objects fit each other."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from deployment_rules import problems
from distributed import Client
from test_deploy import (
    FOLDERS,
    KUBERNETES,
    OVERLAYS,
    README,
    Document,
    asked_for,
    check_pods,
    cluster,
    cron,
    documents,
    job,
    needs_kubectl,
    ours,
    pods,
    rendered,
)
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.slow

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that the operator, or Kubernetes, makes of an object."""

    part: str
    """``scheduler``, ``worker``, ``job``, or who else is asked about."""
    labels: Labels


@cache
def operator() -> Any:
    """Return the operator's own module; it takes seconds to import."""
    return importlib.import_module("dask_kubernetes.operator.controller.controller")


def made_by_operator(document: Document) -> Iterator[Document]:
    """Yield the plain objects that the operator makes of a DaskCluster or a DaskJob, by its own functions."""
    name, spec = document["metadata"]["name"], ours(document)
    labels = document["metadata"].get("labels", {})

    def annotations(part: Document) -> Labels:
        return dict(part.get("metadata", {}).get("annotations", {}))

    scheduler, worker = spec["scheduler"], spec["worker"]
    yield operator().build_scheduler_deployment_spec(name, scheduler["spec"], annotations(scheduler), labels)
    yield operator().build_scheduler_service_spec(name, scheduler["service"], annotations(scheduler), labels)
    group = operator().build_default_worker_group_spec(name, worker, annotations(worker), labels)
    yield operator().build_worker_deployment_spec(
        group["metadata"]["name"], "lab", name, "0123456789", worker["spec"], {}, group["metadata"]["labels"]
    )
    if document["kind"] == "DaskJob":
        part = document["spec"]["job"]
        yield operator().build_job_pod_spec(name, name, "lab", part["spec"], annotations(part), labels)


def clusters(folder: str) -> list[Document]:
    return [one for one in rendered(folder) if one["kind"] in ("DaskCluster", "DaskJob")]


def made_pods(folder: str) -> list[Pod]:
    """Return all pods that come of a folder."""
    parts = {"scheduler": "scheduler", "worker": "worker", "job-runner": "job"}
    out = []
    for document in clusters(folder):
        for made in made_by_operator(document):
            if made["kind"] in ("Deployment", "Pod"):
                template = made if made["kind"] == "Pod" else made["spec"]["template"]
                labels = template["metadata"]["labels"]
                out.append(Pod(parts[labels["dask.org/component"]], labels))
    for document in rendered(folder):
        if document["kind"] == "CronJob":
            template = document["spec"]["jobTemplate"]["spec"]["template"]
            out.append(Pod("job", template["metadata"]["labels"]))
    return out


def selects(selector: Document, labels: Labels) -> bool:
    """Tell whether a selector of Kubernetes takes these labels."""
    for expression in selector.get("matchExpressions", ()):
        key, values = expression["key"], expression.get("values", ())
        if (labels.get(key) in values) is not (expression["operator"] == "In"):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_objects_are_accepted(folder: str) -> None:
    documents = rendered(folder)
    assert documents
    for document in documents:
        assert problems(document) == [], document["metadata"]["name"]
        check_pods(document)
    for document in clusters(folder):
        for made in made_by_operator(document):
            assert problems(made) == [], made["metadata"]["name"]


@needs_kubectl
def test_bases_are_what_their_files_say() -> None:
    """kustomize puts base/cluster's scheduler and workers into the DaskJob, and leaves the DaskCluster out."""
    assert rendered("base/cluster") == [cluster()]
    assert rendered("base/batch") == [job()]
    assert [one for one in rendered("base/weekly") if one["kind"] == "CronJob"] == [cron()]


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_name_is_there(name: str) -> None:
    """What pods mount, run as and take from, and what scales them, is made by the same folder, but for the Secret."""
    documents = rendered(f"overlays/{name}")
    there = {(one["kind"], one["metadata"]["name"]) for one in documents}
    for document in documents:
        for pod in pods(document).values():
            for kind, needed in needs(pod):
                assert (kind, needed) in there | {("Secret", "rasteret-object-store")}
            for part in (*pod["containers"], *pod.get("initContainers", ())):
                mounted = {mount["name"] for mount in part.get("volumeMounts", ())}
                assert mounted <= {volume["name"] for volume in pod.get("volumes", ())}
                # without a tag, or with `latest`, a node would ask the registry each time, and kind has none
                assert re.fullmatch(r"(\S+/)?rasteret-dask(-train)?:0\.1\.0", part["image"])
        if document["kind"] == "DaskAutoscaler":
            assert document["spec"]["cluster"] in {
                one["metadata"]["name"] for one in clusters(f"overlays/{name}")
            }
            assert document["spec"]["minimum"] <= document["spec"]["maximum"]


def needs(pod: Document) -> Iterator[tuple[str, str]]:
    """Yield kind and name of every object that a pod needs."""
    if "serviceAccountName" in pod:
        yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod.get("volumes", ()):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        for one in (volume, *volume.get("projected", {}).get("sources", ())):
            if "configMap" in one:
                yield "ConfigMap", one["configMap"]["name"]
    for part in pod["containers"]:
        for one in part.get("envFrom", ()):
            ((source, reference),) = one.items()
            yield {"secretRef": "Secret", "configMapRef": "ConfigMap"}[source], reference["name"]


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_who_reads_and_writes_has_credentials_and_nobody_else(name: str) -> None:
    for document in rendered(f"overlays/{name}"):
        for part, pod in pods(document).items():
            sources = [one for container in pod["containers"] for one in container.get("envFrom", ())]
            assert len(sources) == (0 if part == "scheduler" or name == "try" else 1)


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_a_suffix_renames_all_of_it(name: str, tmp_path: Path) -> None:
    """Two jobs in one namespace: the overlay of an overlay with a nameSuffix."""
    tree = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, tree)
    outer = tree / "overlays" / "outer"
    outer.mkdir()
    (outer / "kustomization.yaml").write_text(f"resources: [../{name}]\nnameSuffix: -alps\n")
    text = subprocess.run(["kubectl", "kustomize", outer], capture_output=True, text=True, check=True).stdout
    renamed = documents(text)
    there = {(one["kind"], one["metadata"]["name"]) for one in renamed}
    for document in renamed:
        assert document["metadata"]["name"].endswith("-alps")
        for pod in pods(document).values():
            for kind, needed in needs(pod):
                assert (kind, needed) in there | {("Secret", "rasteret-object-store")}
        if document["kind"] in ("DaskCluster", "DaskJob"):
            selector = ours(document)["scheduler"]["service"]["selector"]
            assert selector["dask.org/cluster-name"] == document["metadata"]["name"]
        if document["kind"] == "DaskAutoscaler":
            assert document["spec"]["cluster"].endswith("-alps")
        if document["kind"] == "PodDisruptionBudget":
            assert "rasteret-batch-alps" in str(document["spec"]["selector"])


@needs_kubectl
def test_drains_wait_for_scheduler_and_job() -> None:
    budgets = [one for one in rendered("overlays/aws-spot") if one["kind"] == "PodDisruptionBudget"]
    assert budgets
    for pod in made_pods("overlays/aws-spot"):
        holding = [one for one in budgets if selects(one["spec"]["selector"], pod.labels)]
        # where two select a pod, Kubernetes cannot evict it at all; workers are to go
        assert len(holding) == (0 if pod.part == "worker" else 1), pod.part
        # of a pod without a controller only minAvailable counts
        assert all(one["spec"]["minAvailable"] == 1 for one in holding)


@needs_kubectl
def test_the_readme_says_what_the_first_job_asks_for() -> None:
    amount, gib = asked_for(rendered("overlays/try"))
    assert f"ask for {amount:g} cores and {gib:g} GiB." in " ".join(README.split())


# -- who may talk to whom ---------------------------------------------------------------------------------

OPERATOR = Pod("operator", {"app.kubernetes.io/name": "dask-kubernetes-operator"})
"""In another namespace, with the label that the operator's chart gives it."""
NOTEBOOK = Pod("notebook", {"rasteret-dask/client": "true"})
STRANGER = Pod("stranger", {"app": "somebody-else"})


def peers(rule: Document, side: str, other: Pod | None) -> bool:
    """Tell whether a rule holds for a pod at the other end; None: an address outside of the cluster."""
    if side not in rule:
        return True
    for peer in rule[side]:
        elsewhere = "namespaceSelector" in peer
        if (
            other is not None
            and selects(peer["podSelector"], other.labels)
            and elsewhere is (other is OPERATOR)
        ):
            return True
    return False


def allowed(direction: str, pod: Pod, other: Pod | None, port: int, protocol: str = "TCP") -> bool:
    """Tell whether the policies of aws-spot let a pod talk (Egress), or be talked to (Ingress), at a port."""
    side, key = {"Ingress": ("from", "ingress"), "Egress": ("to", "egress")}[direction]
    policies = [
        one["spec"]
        for one in rendered("overlays/aws-spot")
        if one["kind"] == "NetworkPolicy"
        and direction in one["spec"]["policyTypes"]
        and selects(one["spec"]["podSelector"], pod.labels)
    ]
    assert policies or pod in (OPERATOR, NOTEBOOK, STRANGER), f"no policy holds for the {pod.part}"
    rules = [rule for policy in policies for rule in policy.get(key, ())]
    wanted = {"protocol": protocol, "port": port}
    return not policies or any(
        peers(rule, side, other) and wanted in rule.get("ports", [wanted]) for rule in rules
    )


def connects(one: Pod, other: Pod, port: int) -> bool:
    return allowed("Egress", one, other, port) and allowed("Ingress", other, one, port)


@needs_kubectl
def test_the_network_is_open_for_dask_and_closed_for_others() -> None:
    scheduler, worker, runner = made_pods("overlays/aws-spot")
    assert [scheduler.part, worker.part, runner.part] == ["scheduler", "worker", "job"]
    for pod in (worker, runner, NOTEBOOK, OPERATOR):
        assert connects(pod, scheduler, 8786), pod.part
    # the operator asks whether the cluster is idle and how many workers it wants
    assert connects(OPERATOR, scheduler, 8787)
    assert connects(NOTEBOOK, scheduler, 8787)
    # results, commands, and a worker's page: ports that workers choose
    for pod in (scheduler, worker):
        assert connects(pod, worker, 34567)
    for pod in (scheduler, worker, runner):
        assert not connects(STRANGER, pod, 8786)
        assert not connects(STRANGER, pod, 34567)
        assert not connects(pod, STRANGER, 8786)
        assert allowed("Egress", pod, None, 443)
        assert allowed("Egress", pod, None, 53, "UDP")
        assert not allowed("Egress", pod, None, 80)
    assert not connects(worker, runner, 34567)
    assert not connects(NOTEBOOK, worker, 34567)


@needs_kubectl
def test_the_weekly_pod_is_in_the_closed_network_too() -> None:
    (pod,) = made_pods("overlays/weekly")
    assert allowed("Egress", pod, None, 443)
    assert not allowed("Egress", pod, None, 80)
    assert not allowed("Ingress", pod, STRANGER, 8786)


# -- what the operator asks -------------------------------------------------------------------------------


def test_the_operator_gets_its_answers(tmp_path: Path) -> None:
    """The scheduler and a worker of base/cluster answer by HTTP, as idleTimeout, autoscaler and scale-down want it.

    By the scheduler's default routes they would not, and the operator would fall back to messages of its own Dask.
    """
    parts = {part: pods(cluster())[part]["containers"][0] for part in ("scheduler", "worker")}
    file = tmp_path / "scheduler.json"

    def started(part: str, replaced: Mapping[str, str], more: Mapping[str, str]) -> subprocess.Popen[bytes]:
        arguments = [replaced.get(argument, argument) for argument in parts[part]["args"]]
        values = {one["name"]: one["value"] for one in parts[part]["env"]}
        command = [sys.executable, "-m", *arguments, "--scheduler-file", str(file)]
        return subprocess.Popen(command, env=os.environ | values | dict(more), cwd=tmp_path)

    processes = []
    try:
        ports = {"0.0.0.0": "127.0.0.1", "8786": "0", ":8787": "127.0.0.1:0"}
        processes.append(started("scheduler", ports, {}))
        until(file.exists)
        name = "rasteret-default-worker-0123456789"
        folder = {"/scratch": str(tmp_path), ":8788": "127.0.0.1:0", "$(DASK_WORKER_NAME)": name}
        processes.append(started("worker", folder, {}))
        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(1, timeout=PATIENCE_S)
            port = client.scheduler_info()["services"]["dashboard"]
            ask = partial(asked, f"http://127.0.0.1:{port}/api/v1")
            assert client.submit(sum, [1, 2]).result() == 3
            until(lambda: ask("check_idle")["idle_since"])
            assert ask("adaptive_target") == {"workers": 0}
            # by this name the operator finds the Deployment that it deletes
            retired = ask("retire_workers", {"n": 1})
            assert [one["name"] for one in retired.values()] == [name]
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(PATIENCE_S)


def asked(url: str, path: str, body: Document | None = None) -> Document:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"{url}/{path}", data, timeout=PATIENCE_S) as answer:
        document: Document = json.load(answer)
    return document
