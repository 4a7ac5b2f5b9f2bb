"""The deployment files are what the operator, Kubernetes, Dask and this package accept."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.metadata
import inspect
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from dask.utils import parse_bytes

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
ENVIRONMENT_BIN = Path(sys.executable).parent
SHARD = 128 * 2**20
NANNY = 256 * 2**20

Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def only(kind: str) -> Document:
    """Return the one document of a kind over all files."""
    (found,) = [d for path in MANIFESTS for d in documents(path) if d["kind"] == kind]
    return copy.deepcopy(found)


# -- schemas ----------------------------------------------------------------------------------------------


def closed(schema: Document) -> Document:
    """Turn a structural schema of Kubernetes into a JSON Schema that refuses unknown fields."""
    out: Document = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k != "nullable"}
    out.pop("format", None)  # int32 and the like: not JSON Schema's
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    elif schema.get("nullable") and "type" in schema:
        out["type"] = [schema["type"], "null"]
    if "properties" in schema:
        out["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for inner in ("items", "additionalProperties"):
        if isinstance(out.get(inner), dict):
            out[inner] = closed(out[inner])
    return out


@cache
def custom_schemas() -> dict[tuple[str, str], Document]:
    """Return the operator's schemas by (apiVersion, kind); its files are read, it is not imported.

    They are a megabyte of YAML: parsed by libyaml, and not before a test needs them.
    """
    schemas = {}
    for file in importlib.metadata.files("dask-kubernetes") or ():
        if file.parent.name != "crds" or file.suffix != ".yaml":
            continue
        crd = yaml.load(Path(str(file.locate())).read_text(), yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            # every object has these three, whatever its schema says
            schema["properties"] |= {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
            }
            key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            schemas[key] = schema
    return schemas


def problems(document: Document) -> list[str]:
    """Say what the API server would refuse."""
    schema = custom_schemas().get((document["apiVersion"], document["kind"]))
    if schema is not None:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        return sorted(f"{error.json_path}: {error.message}" for error in errors)
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


def made_by_operator() -> Iterator[Document]:
    """Yield the plain objects that the operator makes of the cluster."""
    cluster = only("DaskCluster")
    scheduler, worker = cluster["spec"]["scheduler"], cluster["spec"]["worker"]
    yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "scheduler"}, "spec": scheduler["spec"]}
    yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": worker["spec"]}
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "scheduler"},
        "spec": scheduler["service"],
    }


def test_schemas_of_the_operator_are_found() -> None:
    assert ("kubernetes.dask.org/v1", "DaskCluster") in custom_schemas()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_accepted(path: Path) -> None:
    found = {f"{d['kind']}/{d['metadata']['name']}": problems(d) for d in documents(path)}
    assert found
    assert not any(found.values()), found


def test_objects_made_by_the_operator_are_accepted() -> None:
    for document in made_by_operator():
        assert problems(document) == [], document["kind"]


def misspelt() -> Iterator[tuple[str, Document]]:
    """Yield documents with one mistake each, and the word that the complaint must contain."""
    cluster = only("DaskCluster")
    cluster["spec"]["worker"]["replica"] = cluster["spec"]["worker"].pop("replicas")
    yield "replica", cluster
    cluster = only("DaskCluster")
    container = cluster["spec"]["worker"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    yield "resource", cluster
    cluster = only("DaskCluster")
    cluster["spec"]["scheduler"]["spec"]["containers"][0]["readinessProbe"]["httpget"] = {}
    yield "httpget", cluster
    cluster = only("DaskCluster")
    del cluster["spec"]["scheduler"]["service"]
    yield "service", cluster
    cluster = only("DaskCluster")
    cluster["spec"]["scheduler"]["service"]["ports"][0]["targetPort"] = 8786
    yield "targetPort", cluster
    job = only("Job")
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    yield "backofLimit", job
    config = only("ConfigMap")
    config["dat"] = config.pop("data")
    yield "dat", config


@pytest.mark.parametrize(
    ("word", "document"), list(misspelt()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_misspelt_field_is_refused(word: str, document: Document) -> None:
    assert word in " ".join(problems(document))


# -- meaning ----------------------------------------------------------------------------------------------


def container(part: str) -> Document:
    (found,) = only("DaskCluster")["spec"][part]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def job_pod() -> Document:
    spec = only("Job")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def pods() -> list[Document]:
    cluster = only("DaskCluster")["spec"]
    return [cluster["scheduler"]["spec"], cluster["worker"]["spec"], job_pod()]


def nbytes(quantity: str) -> int:
    """Read a memory quantity of Kubernetes (``4Gi``)."""
    return int(parse_bytes(quantity + "B"))


def options(part: str) -> dict[str, Any]:
    """Parse the container's arguments with the installed Dask's own command; a wrong option raises."""
    program, name, *rest = container(part)["args"]
    assert (program, name) == ("dask", part), "the names dask-worker and dask-scheduler are gone"
    command = importlib.import_module(f"distributed.cli.dask_{part}").main
    context = command.make_context(f"dask {part}", rest)
    assert isinstance(context.params, dict)
    return dict(context.params)


def environment(part: Document) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in part["env"]}


def test_dask_accepts_the_commands() -> None:
    assert options("scheduler")["port"] == "8786"
    assert options("worker")["name"] == "$(DASK_WORKER_NAME)"


def test_worker_fits_its_container() -> None:
    worker, resources = options("worker"), container("worker")["resources"]
    limit = nbytes(resources["limits"]["memory"])
    assert parse_bytes(worker["memory_limit"]) + NANNY <= limit
    assert parse_bytes(worker["memory_limit"]) >= 800e6 + worker["nthreads"] * 3 * SHARD
    assert worker["nthreads"] <= int(resources["requests"]["cpu"])
    # more than was requested may be taken away at any time
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_every_pod_has_bounds_and_few_rights() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        # otherwise a service named dask-... would put DASK_... variables into Dask's configuration
        assert pod["enableServiceLinks"] is False
        for part in pod["containers"]:
            assert set(part["resources"]) == {"requests", "limits"}
            assert part["securityContext"]["allowPrivilegeEscalation"] is False


def test_ports_and_probes_meet() -> None:
    for part in ("scheduler", "worker"):
        numbers = {port["name"]: port["containerPort"] for port in container(part)["ports"]}
        assert options(part)["dashboard_address"] == f":{numbers['http-dashboard']}"
        for probe in ("readinessProbe", "livenessProbe"):
            assert container(part)[probe]["httpGet"]["port"] in numbers
    names = {port["name"] for port in container("scheduler")["ports"]}
    for port in only("DaskCluster")["spec"]["scheduler"]["service"]["ports"]:
        assert port["targetPort"] in names


def test_service_selects_the_scheduler() -> None:
    cluster = only("DaskCluster")
    # the labels that the operator gives to the scheduler's pod
    assert cluster["spec"]["scheduler"]["service"]["selector"] == {
        "dask.org/cluster-name": cluster["metadata"]["name"],
        "dask.org/component": "scheduler",
    }


def test_job_reaches_the_cluster() -> None:
    (part,) = job_pod()["containers"]
    cluster = only("DaskCluster")
    port = cluster["spec"]["scheduler"]["service"]["ports"][0]["port"]
    expected = f"tcp://{cluster['metadata']['name']}-scheduler:{port}"
    assert environment(part)["DASK_SCHEDULER_ADDRESS"] == expected
    assert part["image"] == container("worker")["image"] == container("scheduler")["image"] == "IMAGE"


def test_job_resumes_and_ends() -> None:
    job = only("Job")["spec"]
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert "selector" not in job, "Kubernetes makes a Job's selector itself"


def test_job_mounts_its_script() -> None:
    (part,) = job_pod()["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in part["volumeMounts"]}
    config = only("ConfigMap")
    (volume,) = [v for v in job_pod()["volumes"] if v.get("configMap")]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (script,) = config["data"]
    assert part["args"] == ["python", f"{mounts[volume['name']]}/{script}"]


def test_keys_come_from_one_secret() -> None:
    (part,) = job_pod()["containers"]
    secret = [{"secretRef": {"name": "rasteret-object-store"}}]
    assert part["envFrom"] == container("worker")["envFrom"] == secret
    assert "rasteret-object-store" in (DEPLOY / "README.md").read_text()
    for values in (environment(part), environment(container("worker")), environment(container("scheduler"))):
        assert not [name for name in values if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


def test_workers_settle_memory_and_threads() -> None:
    values = environment(container("worker"))
    assert values["OMP_NUM_THREADS"] == "1"
    assert int(values["MALLOC_TRIM_THRESHOLD_"]) <= 2**20
    assert values["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"


BODIES = """
import resource
from concurrent.futures import ThreadPoolExecutor

def fetch(number):
    held = []
    for i in range(60):
        held.append(b"x" * (400_000 + 40_000 * ((7 * i + number) % 13)))
        del held[:-4]

with ThreadPoolExecutor(4) as threads:
    list(threads.map(fetch, range(8)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
"""Four threads that hold four bodies of requests each, and drop the oldest: the page faults of the process."""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another allocator")
def test_workers_take_the_bodies_of_requests_from_memory_that_stays() -> None:
    """At most half the page faults of a worker that only gives freed blocks back at once, as Dask has it."""
    malloc = {name: value for name, value in environment(container("worker")).items() if "MALLOC" in name}
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    trim = "MALLOC_TRIM_THRESHOLD_"

    def faults(settings: dict[str, str]) -> int:
        done = subprocess.run(
            [sys.executable, "-c", BODIES], env=plain | settings, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert 2 * faults(malloc) < faults({trim: malloc[trim]})


def test_the_image_settles_the_allocator_as_the_workers_do() -> None:
    """For those who run it elsewhere than by these manifests."""
    image = dict(re.findall(r"(MALLOC_\w+)=(\d+)", (DEPLOY / "Dockerfile").read_text()))
    worker = {name: value for name, value in environment(container("worker")).items() if "MALLOC" in name}
    assert image
    assert image.items() <= worker.items()


# -- the job's script -------------------------------------------------------------------------------------


def script() -> ast.Module:
    (text,) = only("ConfigMap")["data"].values()
    return ast.parse(str(text))


def calls(tree: ast.Module) -> Iterator[tuple[bool, str, ast.Call]]:
    """Yield (called on the package itself, name, call) of every method-like call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield isinstance(owner, ast.Name) and owner.id == "rd", node.func.attr, node


def takes(function: Any, call: ast.Call, *, method: bool) -> bool:
    """Say whether the function's signature takes the call's arguments."""
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    try:
        inspect.signature(function).bind(*[None] * (method + len(call.args)), **keywords)
    except TypeError:
        return False
    return True


def test_script_reads_only_variables_that_the_job_sets() -> None:
    read = {
        node.slice.value
        for node in ast.walk(script())
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    (part,) = job_pod()["containers"]
    assert read
    assert read <= set(environment(part))


def test_script_calls_what_the_package_exports() -> None:
    rd = importlib.import_module("rasteret_dask")
    public = {name: getattr(rd, name) for name in getattr(rd, "__all__", ())}
    if "Collection" not in public:
        pytest.skip("rasteret_dask exports no Collection yet")
    classes = [value for value in public.values() if inspect.isclass(value)]
    for on_package, name, call in calls(script()):
        if on_package:
            assert name in public
            assert takes(public[name], call, method=False), f"rd.{name} does not take these arguments"
        else:
            methods = [getattr(kind, name) for kind in classes if hasattr(kind, name)]
            assert any(takes(method, call, method=True) for method in methods), (
                f".{name} does not take these arguments"
            )


# -- the image --------------------------------------------------------------------------------------------


def test_hadolint_has_no_complaint() -> None:
    linter = ENVIRONMENT_BIN / "hadolint"
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_copies_what_exists_and_is_not_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    kept = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (DEPLOY.parent / source).exists(), source
                assert any(source == path or source.startswith(f"{path}/") for path in kept), source
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert "ARG BASE=python:3.11-slim-bookworm" in lines


def test_image_installs_into_an_environment_of_its_own() -> None:
    """A distribution's own Python refuses pip (PEP 668) and has no command ``python``, which the Job runs."""
    text = (DEPLOY / "Dockerfile").read_text()
    made, path = text.index("python3 -m venv /opt/venv"), text.index("ENV PATH=/opt/venv/bin:${PATH}")
    assert made < path < text.index("pip install")
    assert "break-system-packages" not in text
    assert "PATH=" not in text[path + len("ENV PATH=") :]


@pytest.mark.parametrize("name", ["dask-worker", "dask-scheduler"])
def test_old_command_still_starts(name: str) -> None:
    shim = DEPLOY / "bin" / name
    assert shim.stat().st_mode & stat.S_IXUSR
    path = f"{ENVIRONMENT_BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shim, "--help"], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name.replace('-', ' ')} " in done.stdout
