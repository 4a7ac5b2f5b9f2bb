"""A cluster on Kubernetes: what is asked of the operator, and what a user reads where it cannot start.

The API server is one of loopback (kube_server.py). Where it says so, dask-kubernetes' own operator runs beside it, and
pods are real processes.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml
from dask.utils import parse_bytes
from deployment_rules import custom_schemas, problems
from kube_server import KubeServer, Waiting, operator, patched, served
from small_stores import contents
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.launching import kubernetes
from rasteret_dask.launching.kubespec import KubeOptions, dask_cluster
from rasteret_dask.launching.request import WORKER_ENVIRONMENT, ClusterRequest
from rasteret_dask.tasks.workermemory import limit_bytes

DEPLOY = Path(__file__).parents[1] / "deploy"
GIB = 2**30
IMAGE = "registry.example.com/rasteret-dask:1"
SIZE = rd.WorkerSize(image=IMAGE)

Document = dict[str, Any]


# -- what the operator is asked for -----------------------------------------------------------------------


def request(
    workers: tuple[int, int] = (4, 4), size: rd.WorkerSize = SIZE, memory: int = 7 * GIB // 2, **more: Any
) -> ClusterRequest:
    return ClusterRequest("rasteret", workers, size, memory, WORKER_ENVIRONMENT, {}, **more)


def asked(options: KubeOptions | None = None, request_: ClusterRequest | None = None) -> Document:
    return dask_cluster(request_ or request(), options or KubeOptions(), IMAGE)


def normal(cluster: Document) -> Document:
    """Return a DaskCluster without what is chosen for each: image, labels; sizes as numbers, variables by name."""
    cluster = yaml.safe_load(yaml.safe_dump(cluster))
    del cluster["metadata"]
    for component in ("scheduler", "worker"):
        (container,) = cluster["spec"][component]["spec"]["containers"]
        container["env"] = {one["name"]: one["value"] for one in container["env"]}
        for name in ("HTTP__ROUTES", "DEFAULT_TASK_DURATIONS"):
            if value := container["env"].get(f"DASK_DISTRIBUTED__SCHEDULER__{name}"):
                # as Dask reads it
                container["env"][f"DASK_DISTRIBUTED__SCHEDULER__{name}"] = ast.literal_eval(value)
        for resources in container["resources"].values():
            resources["memory"] = parse_bytes(resources["memory"] + "B")
        args = container["args"]
        if "--memory-limit" in args:
            at = args.index("--memory-limit") + 1
            args[at] = parse_bytes(args[at])
        del container["image"]
    return dict(cluster)


def manifest() -> Document:
    """Return the DaskCluster of ``deploy/``."""
    (path,) = DEPLOY.rglob("daskcluster.yaml")
    (cluster,) = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "DaskCluster"]
    return dict(cluster)


def test_the_cluster_is_that_of_the_manifests() -> None:
    """The same commands, variables, rights, probes, ports and sizes, whoever makes the cluster."""
    theirs = normal(manifest())
    mine = normal(
        asked(request_=request(idle_timeout_s=theirs["spec"]["idleTimeout"], memory=limit_bytes(2)))
    )
    failures = mine["spec"]["scheduler"]["spec"]["containers"][0]["env"].pop(
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"
    )
    assert failures == "3", "Dask's own default, which the manifest leaves unset"
    assert mine == theirs


@pytest.mark.parametrize("component", ["spot", "keys", "workload-identity"])
def test_options_are_the_components_of_the_manifests(component: str) -> None:
    options = {
        "spot": KubeOptions(spot=True),
        "keys": KubeOptions(secret="rasteret-object-store"),
        "workload-identity": KubeOptions(service_account="rasteret", config_map="rasteret-cloud"),
    }[component]
    (path,) = DEPLOY.rglob(f"components/{component}/kustomization.yaml")
    (patch,) = [
        yaml.safe_load(one["patch"])
        for one in yaml.safe_load(path.read_text())["patches"]
        if one["target"]["kind"] == "DaskCluster"
    ]
    theirs = asked()
    variables = theirs["spec"]["scheduler"]["spec"]["containers"][0]["env"]
    if any("ALLOWED_FAILURES" in str(change) for change in patch):
        variables[:] = [one for one in variables if "ALLOWED_FAILURES" not in one["name"]]
    assert patched(theirs, patch)
    assert normal(asked(options)) == normal(theirs)


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("rest", [{}, {"node_selector": {"pool": "dask"}, "pull_secret": "registry"}])
def test_the_operator_accepts_it(spot: bool, rest: dict[str, Any]) -> None:
    tolerations = ({"key": "gpu", "operator": "Exists"},)
    options = KubeOptions(spot=spot, secret="keys", service_account="reader", tolerations=tolerations, **rest)
    size = rd.WorkerSize(image=IMAGE, lifetime="55 minutes")
    cluster = asked(options, request(size=size))
    assert custom_schemas()
    assert problems(cluster) == []
    for component in ("scheduler", "worker"):
        pod = cluster["spec"][component]["spec"]
        pod_document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": component}, "spec": pod}
        assert problems(pod_document) == []


@pytest.mark.parametrize("threads", [1, 2, 4, 16])
def test_a_container_has_room_for_its_worker(threads: int) -> None:
    memory = limit_bytes(threads) + 1
    cluster = asked(request_=request(size=rd.WorkerSize(threads=threads, image=IMAGE), memory=memory))
    (container,) = cluster["spec"]["worker"]["spec"]["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"] == str(threads)
    assert parse_bytes(resources["limits"]["memory"] + "B") >= memory + 256 * 2**20


def test_the_lifetime_of_workers_is_one_that_dask_reads() -> None:
    from distributed.cli.dask_worker import main

    size = rd.WorkerSize(lifetime="55 minutes", image=IMAGE)
    (container,) = asked(request_=request(size=size))["spec"]["worker"]["spec"]["containers"]
    assert main.make_context("dask worker", container["args"][2:]).params["lifetime"] == "3300 s"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"namespace": "My Lab"}, "namespace"),
        ({"secret": 3}, "secret"),
        ({"spot": "yes"}, "spot"),
        ({"node_selector": ["pool"]}, "node_selector"),
        ({"tolerations": ["spot"]}, "tolerations"),
        ({"start_timeout": "soon"}, "start_timeout"),
        ({"namespce": "lab"}, "namespce"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(rd.PlanError, match=word), rd.cluster("kubernetes", size=SIZE, options=options):
        pass


@pytest.fixture(scope="module", autouse=True)
def _settings() -> None:
    """Have dask-kubernetes' settings in Dask's configuration from the start: each test puts that back as it was."""
    import dask_kubernetes.operator  # noqa: F401


# -- where it cannot start --------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """Serve an API with an operator that is played, and pods that are ready without a process."""
    monkeypatch.setattr(kubernetes, "LOOK_S", 0.01)
    with served(KubeServer(pretends=True)) as server:
        use(server, monkeypatch)
        yield server


def use(server: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log in to an API server, as ``kubectl`` is."""
    monkeypatch.setenv("KUBECONFIG", str(server.login()))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("JUPYTER_IMAGE", raising=False)


SOON = {"start_timeout": 0.05}
"""Of what is waited for in vain."""


def message(**arguments: Any) -> rd.JobError:
    """Return the error of a cluster that cannot start."""
    with (
        pytest.raises(rd.JobError) as caught,
        rd.cluster("kubernetes", **{"workers": 2, "size": SIZE, **arguments}),
    ):
        pass
    return caught.value


def test_without_access_to_any_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    error = message()
    assert error.found == "no kubeconfig, and no pod's service account"
    assert "KUBECONFIG" in error.remedy


def test_a_kubeconfig_that_names_what_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {"apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": [],
              "current-context": "lab"}  # fmt: skip
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert "a kubeconfig that cannot be used" in message().found


unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Where kr8s fails while it logs in, nobody has the connections that it leaves open."""


@unclosed
@pytest.mark.parametrize("silent", [False, True])
def test_an_api_server_that_does_not_answer(
    silent: bool, api: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if silent:
        monkeypatch.setattr(kubernetes, "ANSWER_S", 0.2)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if silent:
            door.listen()
        api.url = f"http://127.0.0.1:{door.getsockname()[1]}"
        use(api, monkeypatch)
        error = message()
    gc.collect()
    assert ("no answer" if silent else "no API server that answers") in error.found
    assert "kubectl cluster-info" in error.remedy


@unclosed
def test_a_token_that_has_expired(api: KubeServer) -> None:
    api.token = "a newer one"
    error = message()
    gc.collect()
    assert "401" in error.found
    assert "logged in" in error.remedy


def test_a_user_who_may_not_create_clusters(api: KubeServer) -> None:
    text = (
        'daskclusters.kubernetes.dask.org is forbidden: User "system:serviceaccount:lab:ada" cannot create resource '
        '"daskclusters" in API group "kubernetes.dask.org" in the namespace "lab"'
    )
    api.deny("POST", "daskclusters", 403, text)
    error = message()
    assert error.found == text
    assert "kubectl auth can-i create daskclusters.kubernetes.dask.org -n lab" in error.remedy
    assert "daskautoscalers" in error.remedy


def test_a_user_who_may_not_create_autoscalers(api: KubeServer) -> None:
    text = (
        'daskautoscalers.kubernetes.dask.org is forbidden: User "ada" cannot create resource "daskautoscalers" in API '
        'group "kubernetes.dask.org" in the namespace "lab"'
    )
    api.deny("POST", "daskautoscalers", 403, text)
    assert message(workers=(0, 4)).found == text
    assert not api.every("DaskCluster")


def test_a_namespace_that_is_not_there(api: KubeServer) -> None:
    error = message(options={"namespace": "attic"})
    assert error.found == 'namespaces "attic" not found'
    assert "kubectl create namespace attic" in error.remedy


def test_a_cluster_without_the_operator(api: KubeServer) -> None:
    api.without.add("kubernetes.dask.org/v1")
    error = message()
    assert error.expected == "the dask-kubernetes operator"
    assert "helm install" in error.remedy


def test_an_operator_that_does_nothing(api: KubeServer) -> None:
    api.pretends = False
    with dask.config.set({"kubernetes.resource-timeout": 0.05}):
        error = message()
    assert "no operator that looked at it" in error.found
    assert "dask-kubernetes-operator" in error.remedy
    assert not api.every("DaskCluster"), "it is deleted again"


def test_a_quota_of_clusters(api: KubeServer) -> None:
    text = (
        'daskclusters.kubernetes.dask.org "rasteret-1" is forbidden: exceeded quota: objects, requested: '
        "count/daskclusters.kubernetes.dask.org=1, used: count/daskclusters.kubernetes.dask.org=2, limited: "
        "count/daskclusters.kubernetes.dask.org=2"
    )
    api.deny("POST", "daskclusters", 403, text)
    error = message()
    assert error.expected == "room in the quota of the namespace"
    assert "kubectl get daskclusters -n lab" in error.remedy
    assert "room for 0 more" in error.remedy


def remedied(api: KubeServer, error: rd.JobError) -> None:
    """Follow a message that names a size: the worker of that size starts."""
    figures = re.search(r"rd\.WorkerSize\(threads=(\d+), memory='(\w+)'\)", error.remedy)
    assert figures, error.remedy
    size = rd.WorkerSize(threads=int(figures[1]), memory=figures[2], image=IMAGE)
    work = kubernetes_work(api, size)
    assert work.startswith("ready"), work


def kubernetes_work(api: KubeServer, size: rd.WorkerSize) -> str:
    """Ask for one worker; return how far it came: a played scheduler takes no client."""
    assert isinstance(size.memory, int)
    cluster = dask_cluster(request((1, 1), size, size.memory), KubeOptions(), IMAGE)
    for component in ("scheduler", "worker"):
        if why := api.refused(cluster["spec"][component]["spec"]) or api.without_node(
            cluster["spec"][component]["spec"]
        ):
            return f"{component}: {why}"
    return "ready"


def test_a_quota_without_room_for_the_scheduler(api: KubeServer) -> None:
    api.quota = {"requests.memory": "1Gi"}
    error = message()
    assert "exceeded quota: compute, requested: requests.memory=2048Mi" in error.found
    assert "no worker has room" in error.remedy
    assert not api.every("DaskCluster")


def test_a_quota_without_room_for_a_worker_names_the_size_that_has_it(api: KubeServer) -> None:
    api.quota = {"requests.memory": "5Gi"}
    error = message(size=rd.WorkerSize(threads=4, image=IMAGE))
    assert "used: requests.memory=2048Mi, limited: requests.memory=5120Mi" in error.found
    assert "3.00 GiB of requests.memory are left" in error.remedy
    remedied(api, error)


def test_a_quota_of_cores(api: KubeServer) -> None:
    api.quota = {"requests.cpu": "3"}
    assert "rd.WorkerSize(threads=2) would do" in message(size=rd.WorkerSize(threads=4, image=IMAGE)).remedy


def test_a_rule_of_the_namespace(api: KubeServer) -> None:
    api.limit = "maximum memory usage per Container is 1Gi, but limit is 2Gi"
    error = message()
    assert api.limit in error.found
    assert "kubectl describe limitrange,resourcequota -n lab" in error.remedy


PULL = (
    'Back-off pulling image "registry.example.com/rasteret-dask:1": ErrImagePull: failed to resolve reference: '
    "registry.example.com/rasteret-dask:1: not found"
)


@pytest.mark.parametrize("component", ["scheduler", "worker"])
def test_an_image_that_cannot_be_pulled(component: str, api: KubeServer) -> None:
    api.waiting = {component: Waiting("ImagePullBackOff", PULL)}
    error = message()
    assert IMAGE in error.found
    assert PULL in error.found
    assert "rd.WorkerSize(image=...)" in error.remedy
    assert "pull_secret" in error.remedy
    assert not api.every("DaskCluster")
    assert not api.every("Pod"), "what it had goes with it"


def test_a_first_pull_that_fails_may_pass(api: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries refuse for a moment: it is logged, and Kubernetes calls it a back-off where it does not help."""
    lines: list[str] = []

    def logged(line: str, *values: object) -> None:
        lines.append(line % values)
        for pod in api.objects.values():
            for status in pod.get("status", {}).get("containerStatuses", ()):
                status["state"] = {"waiting": {"reason": "ImagePullBackOff", "message": PULL}}

    monkeypatch.setattr(kubernetes._log, "warning", logged)
    api.waiting = {"worker": Waiting("ErrImagePull", "toomanyrequests: rate exceeded")}
    error = message()
    (line,) = lines
    assert "waits: " in line
    assert "ErrImagePull: toomanyrequests" in line
    assert "ImagePullBackOff" in error.found


def test_a_pull_that_fails_is_told_once_the_patience_is_over(api: KubeServer) -> None:
    api.waiting = {"worker": Waiting("ErrImagePull", "toomanyrequests: rate exceeded")}
    assert "ErrImagePull: toomanyrequests" in message(options=SOON).found


def test_a_secret_that_is_not_there(api: KubeServer) -> None:
    error = message(options={"secret": "rasteret-object-store"})
    assert 'secret "rasteret-object-store" not found' in error.found
    assert "kubectl create secret generic" in error.remedy


def test_an_image_without_dask(api: KubeServer) -> None:
    end = {
        "reason": "StartError",
        "exitCode": 128,
        "message": 'exec: "dask": executable file not found in $PATH',
    }
    api.waiting = {"scheduler": Waiting("CrashLoopBackOff", "back-off 20s restarting failed container", end)}
    error = message()
    assert 'exec: "dask": executable file not found in $PATH' in error.found
    assert "kubectl logs" in error.remedy


def node(memory: str, cores: str) -> Document:
    return {"status": {"allocatable": {"memory": memory, "cpu": cores}}}


def test_a_worker_that_fits_on_no_node_names_the_size_that_does(api: KubeServer) -> None:
    api.put("nodes", "small", node("3000Mi", "4"))
    error = message(size=rd.WorkerSize(threads=4, image=IMAGE), options=SOON)
    assert "0/1 nodes are available: 1 Insufficient memory" in error.found
    assert "of memory" in error.expected
    remedied(api, error)


def test_a_worker_that_fits_on_no_node_of_an_unknown_size(api: KubeServer) -> None:
    api.put("nodes", "small", node("3000Mi", "4"))
    api.deny(
        "GET",
        "nodes",
        403,
        'nodes is forbidden: User "ada" cannot list resource "nodes" at the cluster scope',
    )
    error = message(size=rd.WorkerSize(threads=4, image=IMAGE), options=SOON)
    assert "Insufficient memory" in error.found
    assert "kubectl describe nodes" in error.remedy


def test_pods_that_only_take_long(api: KubeServer) -> None:
    api.waiting = {"worker": Waiting("ContainerCreating")}
    error = message(options=SOON)
    assert error.found == "no worker that is ready after 0.05 s"
    assert "start_timeout" in error.remedy


def test_a_cluster_that_cannot_be_deleted_is_named(api: KubeServer) -> None:
    """The error of the start stays; a warning says what is left."""
    api.waiting = {"worker": Waiting("ImagePullBackOff", PULL)}
    api.deny("DELETE", "daskclusters", 403, 'daskclusters.kubernetes.dask.org "rasteret" is forbidden')
    with pytest.warns(UserWarning, match="kubectl delete daskcluster rasteret-[0-9a-f]+ -n lab"):
        assert "cannot pull" in message().found


def test_the_image_of_a_notebook_is_taken(api: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rd.PlanError, match="no image"), rd.cluster("kubernetes"):
        pass
    monkeypatch.setenv("JUPYTER_IMAGE", "hub/notebook:7")
    api.waiting = {"scheduler": Waiting("ImagePullBackOff")}
    assert "hub/notebook:7" in message(size=None).found


def test_a_pod_takes_its_own_namespace(
    api: KubeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a service account; kr8s would take the namespace ``default``."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "namespace").write_text("lab\n")
    monkeypatch.setattr(kubernetes, "POD_NAMESPACE", account / "namespace")

    class Account:
        active_context = ""

    class Api:
        auth, namespace = Account, "default"

    assert kubernetes._namespace(Api) == "lab"
    Account.active_context = "of a kubeconfig"
    assert kubernetes._namespace(Api) == "default"


# -- with the real operator, and real processes -----------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[KubeServer]:
    """Serve an API with dask-kubernetes' operator beside it, and a Secret."""
    with served() as server, operator(server):
        server.put("secrets", "rasteret-object-store", {"stringData": {"AWS_REGION": "eu-central-1"}})
        yield server


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    return s2.harmonize(["red", "nir"], time="1MS").chips(32, cell_km=0.32).split(0.8, 0.1, 0.1, seed=1)


@pytest.mark.slow
def test_a_store_written_on_kubernetes_is_the_plain_one(
    running: KubeServer, chips: rd.Chips, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(running, monkeypatch)
    train = chips.select("train")
    train.to_zarr(tmp_path / "plain.zarr", progress=False)
    options = {"secret": "rasteret-object-store", "idle_timeout": "20 minutes"}
    with rd.cluster("kubernetes", chips=train, workers=2, size=SIZE, options=options) as client:
        (cluster,) = running.every("DaskCluster")
        report = train.to_zarr(tmp_path / "kube.zarr", client=client, progress=False)
        client.wait_for_workers(2)
        seen = client.run(lambda: {**os.environ})
        # the operator, where it cannot ask over HTTP, sets 5 minutes in the scheduler
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.idle_timeout) is None
    assert report.committed
    assert contents(tmp_path / "kube.zarr") == contents(tmp_path / "plain.zarr")
    assert 1200 <= cluster["spec"]["idleTimeout"] <= 1800, "20 minutes, and what the start took"
    for values in seen.values():
        assert values["AWS_REGION"] == "eu-central-1"
        assert values.items() >= {**WORKER_ENVIRONMENT}.items()
    assert not running.every("DaskCluster")
    assert not running.every("Pod")
    assert [one for document in running.posted for one in problems(document)] == []


@pytest.mark.slow
def test_workers_come_as_there_is_work_for_them(
    running: KubeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(running, monkeypatch)
    scalers: list[Document] = []
    go = tmp_path / "go"

    def waiting(value: int) -> int:
        while not go.exists():
            time.sleep(0.05)
        return value

    def work() -> None:
        with rd.cluster("kubernetes", workers=(0, 2), size=SIZE) as client:
            scalers.extend(running.every("DaskAutoscaler"))
            assert not client.scheduler_info()["workers"]
            future = client.submit(waiting, 3)
            until(lambda: client.processing() and any(client.processing().values()))
            assert 1 <= len(client.scheduler_info()["workers"]) <= 2  # who is idle may go again at once
            go.touch()
            assert future.result() == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    (scaler,) = scalers
    spec = scaler["spec"]
    assert (spec["minimum"], spec["maximum"]) == (0, 2)
    assert not running.every("DaskCluster"), "an error ends it as well"
    rights = {(verb, resource) for who, verb, resource in running.asked if who != "operator"}
    assert rights - role() == set(), "what the Role of docs/clusters.md does not grant"
    assert not running.every("Pod")


def role() -> set[tuple[str, str]]:
    """Return what the Role of the page about clusters grants: (verb, resource)."""
    rights = set()
    for line in (DEPLOY.parent / "docs" / "clusters.md").read_text().replace("\\\n", " ").splitlines():
        if line.startswith("kubectl create role "):
            verbs, resources = re.findall(r"--(?:verb|resource)=(\S+)", line)
            rights |= {(v, r.partition(".")[0]) for v in verbs.split(",") for r in resources.split(",")}
    assert rights
    return rights


SCRIPT = """
import sys, time
import rasteret_dask as rd
with rd.cluster(
    "kubernetes", workers=1, size=rd.WorkerSize(image="an-image"), options={"idle_timeout": 20}
) as client:
    print("ready", flush=True)
    client.submit(time.sleep, 3600).result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_client_that_ends_leaves_nothing(
    how: signal.Signals, running: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SIGTERM it deletes its cluster; after SIGKILL the operator does, once the cluster is idle."""
    use(running, monkeypatch)
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert sorted(running.processes()) == ["scheduler", "worker"]
        process.send_signal(how)
        process.wait(PATIENCE_S)
        assert process.returncode == (143 if how is signal.SIGTERM else -9)
    if how is signal.SIGTERM:
        assert not running.every("DaskCluster"), "before the process ends"
    until(lambda: not running.every("DaskCluster") and not running.every("Pod"))
    until(lambda: not running.processes())
