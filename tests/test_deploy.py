"""The deployment files are what the operator, Kubernetes, Dask and this package accept."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import dask
import pytest
import typer
import yaml
from dask.utils import parse_bytes
from deployment_rules import custom_schemas, problems

import rasteret_dask as rd
from rasteret_dask.cli.app import app
from rasteret_dask.launching.request import WORKER_ENVIRONMENT
from rasteret_dask.recipes.placement import placement_of
from rasteret_dask.tasks.workermemory import limit_bytes, needed_bytes

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
BASES = sorted(path.name for path in (KUBERNETES / "base").iterdir())
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
FOLDERS = [*(f"base/{name}" for name in BASES), *(f"overlays/{name}" for name in OVERLAYS)]
ENVIRONMENT_BIN = Path(sys.executable).parent
NANNY = 256 * 2**20


Document = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not there, whose kustomize renders the overlays"
)


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


@cache
def _rendered(folder: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(folder: str) -> list[Document]:
    """Return what ``kubectl apply -k`` sends for a folder below deploy/kubernetes."""
    return documents(_rendered(folder))


def source(path: str) -> list[Document]:
    """Return the objects of a file below deploy/kubernetes, as they stand there."""
    return documents((KUBERNETES / path).read_text())


def cluster() -> Document:
    """Return the DaskCluster of base/cluster."""
    (document,) = source("base/cluster/daskcluster.yaml")
    return document


def job() -> Document:
    """Return the DaskJob of base/batch as kustomize makes it: with the scheduler and the workers of base/cluster."""
    (document,) = source("base/batch/daskjob.yaml")
    spec = cluster()["spec"]
    document["spec"]["cluster"]["spec"] = {part: spec[part] for part in ("scheduler", "worker")}
    document["spec"]["cluster"]["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] = (
        document["metadata"]["name"]
    )
    return document


def cron() -> Document:
    """Return the CronJob of base/weekly."""
    (document,) = source("base/weekly/cronjob.yaml")
    return document


def ours(document: Document) -> Document:
    """Return the specification of the cluster that a DaskCluster or a DaskJob has."""
    spec: Document = (
        document["spec"] if document["kind"] == "DaskCluster" else document["spec"]["cluster"]["spec"]
    )
    return spec


# -- schemas ----------------------------------------------------------------------------------------------


def plain_objects() -> list[Document]:
    """Return all objects that stand in the files, each as kustomize makes it before any component changes it."""
    files = sorted(KUBERNETES.glob("components/*/*.yaml"))
    parts = [file for file in files if file.name not in ("kustomization.yaml", "names.yaml")]
    return [cluster(), job(), cron(), *(one for file in parts for one in documents(file.read_text()))]


def pods(document: Document) -> dict[str, Document]:
    """Return the pods' specifications of an object, by what runs in them."""
    match document["kind"]:
        case "DaskCluster" | "DaskJob":
            spec = ours(document)
            parts = {part: spec[part]["spec"] for part in ("scheduler", "worker")}
            return parts | ({"job": document["spec"]["job"]["spec"]} if document["kind"] == "DaskJob" else {})
        case "Pod":
            return {document["metadata"]["name"]: document["spec"]}
        case "CronJob":
            return {"job": document["spec"]["jobTemplate"]["spec"]["template"]["spec"]}
        case _:
            return {}


def test_schemas_of_the_operator_are_found() -> None:
    assert {("kubernetes.dask.org/v1", kind) for kind in ("DaskCluster", "DaskJob", "DaskAutoscaler")} <= set(
        custom_schemas()
    )


@pytest.mark.parametrize(
    "document", plain_objects(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}"
)
def test_objects_are_accepted(document: Document) -> None:
    assert problems(document) == []
    for part, spec in pods(document).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part}, "spec": spec}
        assert problems(pod) == [], part
    if document["kind"] in ("DaskCluster", "DaskJob"):
        spec = ours(document)["scheduler"]["service"]
        assert (
            problems({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec}) == []
        )


def misspelt() -> Iterator[tuple[str, Document]]:
    """Yield documents with one mistake each, and the word that the complaint must contain."""
    document = cluster()
    document["spec"]["worker"]["replica"] = document["spec"]["worker"].pop("replicas")
    yield "replica", document
    document = cluster()
    document["spec"]["idleTimeOut"] = document["spec"].pop("idleTimeout")
    yield "idleTimeOut", document
    document = cluster()
    part = document["spec"]["worker"]["spec"]["containers"][0]
    part["resource"] = part.pop("resources")
    yield "resource", document
    document = cluster()
    document["spec"]["scheduler"]["spec"]["containers"][0]["readinessProbe"]["httpget"] = {}
    yield "httpget", document
    document = cluster()
    del document["spec"]["scheduler"]["service"]
    yield "service", document
    document = cluster()
    document["spec"]["scheduler"]["service"]["ports"][0]["targetPort"] = 8786
    yield "targetPort", document
    document = job()
    document["spec"]["job"]["spec"]["restartpolicy"] = document["spec"]["job"]["spec"].pop("restartPolicy")
    yield "restartpolicy", document
    document = cron()
    document["spec"]["concurencyPolicy"] = document["spec"].pop("concurrencyPolicy")
    yield "concurencyPolicy", document


@pytest.mark.parametrize(
    ("word", "document"), list(misspelt()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_misspelt_field_is_refused(word: str, document: Document) -> None:
    assert word in " ".join(problems(document))


@pytest.mark.parametrize("folder", [*FOLDERS, *(f"components/{name}" for name in COMPONENTS)])
def test_each_folder_names_files_that_are_there(folder: str) -> None:
    (here,) = source(f"{folder}/kustomization.yaml")
    kinds = {"base": "Kustomization", "overlays": "Kustomization", "components": "Component"}
    assert here["kind"] == kinds[folder.partition("/")[0]]
    files = [*here.get("resources", ()), *here.get("components", ()), *here.get("configurations", ())]
    for generator in here.get("configMapGenerator", ()):
        files += generator.get("files", ())
        # a DaskJob never looks at another ConfigMap, and the next week's run is to take the new one
        assert generator["options"] == {"disableNameSuffixHash": True}
    files += [patch["path"] for patch in here.get("patches", ()) if "path" in patch]
    for file in files:
        assert (KUBERNETES / folder / file).exists(), file
    named = {(KUBERNETES / folder / file).resolve() for file in files}
    there = {path for path in (KUBERNETES / folder).iterdir() if path.name != "kustomization.yaml"}
    assert {path for path in there if path.suffix != ".pyc" and path.name != "__pycache__"} <= named, (
        "a file that nothing takes"
    )


# -- meaning ----------------------------------------------------------------------------------------------


def container(part: str) -> Document:
    (found,) = pods(job())[part]["containers"]
    assert isinstance(found, dict)
    return found


def nbytes(quantity: str) -> int:
    """Read a memory quantity of Kubernetes (``4Gi``)."""
    return int(parse_bytes(quantity + "B"))


def cores(quantity: str) -> float:
    """Read a number of cores of Kubernetes (``500m``)."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def options(part: str, arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse a container's arguments with the installed Dask's own command; a wrong option raises."""
    program, name, *rest = arguments or container(part)["args"]
    assert (program, name) == ("dask", part), "the names dask-worker and dask-scheduler are gone"
    command = importlib.import_module(f"distributed.cli.dask_{part}").main
    context = command.make_context(f"dask {part}", rest)
    assert isinstance(context.params, dict)
    return dict(context.params)


def environment(part: Document) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in part["env"]}


def check_pods(document: Document) -> None:
    """Check that pods have bounds and few rights, and that workers fit their containers."""
    for part, pod in pods(document).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        # otherwise a service named dask-... would put DASK_... variables into Dask's configuration
        assert pod["enableServiceLinks"] is False
        for one in (*pod["containers"], *pod.get("initContainers", ())):
            assert set(one["resources"]) == {"requests", "limits"}
            # more than was requested may be taken away at any time
            assert one["resources"]["requests"]["memory"] == one["resources"]["limits"]["memory"]
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
            values = environment(one) if "env" in one else {}
            assert not [name for name in values if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
        if part == "worker":
            (one,) = pod["containers"]
            worker, limits = options("worker", one["args"]), one["resources"]["limits"]
            assert parse_bytes(worker["memory_limit"]) + NANNY <= nbytes(limits["memory"])
            assert parse_bytes(worker["memory_limit"]) == limit_bytes(worker["nthreads"])
            values = environment(one)
            assert {name: values.get(name) for name in WORKER_ENVIRONMENT} == dict(WORKER_ENVIRONMENT)
            assert worker["nthreads"] <= cores(limits["cpu"])


def test_dask_accepts_the_commands() -> None:
    assert options("scheduler")["port"] == "8786"
    assert options("worker")["name"] == "$(DASK_WORKER_NAME)"


@pytest.mark.parametrize("document", [cluster(), job(), cron()], ids=lambda one: str(one["kind"]))
def test_every_pod_has_bounds_and_few_rights(document: Document) -> None:
    check_pods(document)


def test_the_weekly_pod_has_memory_for_its_threads() -> None:
    (part,) = pods(cron())["job"]["containers"]
    limits = part["resources"]["limits"]
    planning = 1.5e9
    assert nbytes(limits["memory"]) >= needed_bytes(int(limits["cpu"])) + planning


def test_ports_and_probes_meet() -> None:
    for part in ("scheduler", "worker"):
        numbers = {port["name"]: port["containerPort"] for port in container(part)["ports"]}
        assert options(part)["dashboard_address"] == f":{numbers['http-dashboard']}"
        for probe in ("readinessProbe", "livenessProbe"):
            assert container(part)[probe]["httpGet"]["port"] in numbers
    names = {port["name"] for port in container("scheduler")["ports"]}
    for port in ours(job())["scheduler"]["service"]["ports"]:
        assert port["targetPort"] in names


@pytest.mark.parametrize("document", [cluster(), job()], ids=lambda one: str(one["kind"]))
def test_service_selects_the_scheduler(document: Document) -> None:
    # the labels that the operator gives to the scheduler's pod
    assert ours(document)["scheduler"]["service"]["selector"] == {
        "dask.org/cluster-name": document["metadata"]["name"],
        "dask.org/component": "scheduler",
    }


def test_a_cluster_and_a_job_can_be_in_one_namespace() -> None:
    """The operator takes a cluster of the job's name where there is one, and deletes it at the job's end."""
    names = [one["metadata"]["name"] for one in (cluster(), job(), cron())]
    assert len(set(names)) == 3


def test_what_nobody_uses_is_taken_down() -> None:
    assert 0 < cluster()["spec"]["idleTimeout"] <= 3600
    # of a DaskJob's cluster the operator takes no idleTimeout: the pod's end is the cluster's
    pod = pods(job())["job"]
    assert pod["activeDeadlineSeconds"] > 0
    assert pod["restartPolicy"] == "Never"


def test_a_job_that_fails_is_tried_again_but_not_for_ever() -> None:
    spec = cron()["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    one = spec["jobTemplate"]["spec"]
    assert one["backoffLimit"] > 0
    assert one["activeDeadlineSeconds"] > 0
    # Kubernetes takes a podFailurePolicy only with this one
    assert one["template"]["spec"]["restartPolicy"] == "Never"
    assert "selector" not in one, "Kubernetes makes a Job's selector itself"
    codes = [
        rule["onExitCodes"]["values"] for rule in one["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert codes == [[2]], "the code of a recipe that makes no sense, see docs/command-line.md"


def test_the_job_runs_on_the_operator_s_cluster(tmp_path: Path) -> None:
    """Whatever cluster its recipe names."""
    program, name, *rest = container("job")["args"]
    assert program == "rasteret-dask"
    address = "tcp://rasteret-batch-scheduler.lab.svc.cluster.local:8786"
    words = [word.replace("$(DASK_SCHEDULER_ADDRESS)", address) for word in rest]
    options = typer.main.get_command(app).commands[name].make_context(name, words).params  # type: ignore[attr-defined]
    assert options["recipe"] == Path("/job/recipe.toml")
    recipe = tmp_path / "recipe.toml"
    text = (KUBERNETES / "overlays" / "minimal" / "recipe.toml").read_text()
    recipe.write_text(f'{text}\n[cluster]\nkind = "local"\nworkers = 2\n')
    placement = placement_of(rd.load_recipe(recipe).source, options["cluster"])
    assert placement is not None
    assert placement.place == address
    assert placement.runs_already


@needs_kubectl
@pytest.mark.parametrize("base", ["cluster", "batch"])
def test_workers_with_a_gpu_declare_what_parts_of_maps_are_sent_to(base: str, tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes" / "overlays" / "maps"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        f"resources: [../../base/{base}]\ncomponents: [../../components/gpu-workers]\n"
    )
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True)
    (document,) = (one for one in documents(done.stdout) if one["kind"] in ("DaskCluster", "DaskJob"))
    assert problems(document) == []
    spec = ours(document)["worker"]["spec"]
    (worker,) = spec["containers"]
    assert {worker["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {"1"}
    assert [one["key"] for one in spec["tolerations"]] == ["nvidia.com/gpu"]
    config = dask.config.collect_env(environment(worker))
    assert config["distributed"]["worker"]["resources"] == {
        "GPU": options("worker", worker["args"])["nthreads"]
    }
    assert "nvidia.com/gpu" not in str(ours(document)["scheduler"])


@pytest.mark.parametrize("document", [job(), cron()], ids=lambda one: str(one["kind"]))
def test_the_recipe_is_mounted_where_it_is_read(document: Document) -> None:
    (part,) = pods(document)["job"]["containers"]
    volumes = {volume["name"]: volume for volume in pods(document)["job"]["volumes"]}
    (mount,) = [mount for mount in part["volumeMounts"] if mount["mountPath"] == "/job"]
    volume = volumes[mount["name"]]
    parts = [one["configMap"] for one in volume.get("projected", {}).get("sources", ())] or [
        volume["configMap"]
    ]
    assert "rasteret-recipe" in {one["name"] for one in parts}
    assert "/job/recipe.toml" in part["args"]


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


# -- recipes and scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("**/*.toml")), ids=lambda path: path.parent.name)
def test_recipes_are_recipes(path: Path) -> None:
    recipe = rd.load_recipe(path)
    assert [output.kind for output in recipe.outputs] == ["plan" if path.parent.name == "train" else "zarr"]
    for table in tomllib.loads(path.read_text())["collections"].values():
        assert table.get("dataset", "demo/") in {row["id"] for row in rd.datasets().to_pylist()} | {"demo/"}


SCRIPT = KUBERNETES / "overlays" / "script" / "main_job.py"


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


def test_script_reads_only_variables_that_the_operator_sets() -> None:
    read = {
        node.slice.value
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    assert read == {"DASK_SCHEDULER_ADDRESS"}


def test_script_calls_what_the_package_exports() -> None:
    public = {name: getattr(rd, name) for name in rd.__all__}
    classes = [value for value in public.values() if inspect.isclass(value)]
    for on_package, name, call in calls(ast.parse(SCRIPT.read_text())):
        if on_package:
            assert name in public
            assert takes(public[name], call, method=False), f"rd.{name} does not take these arguments"
        else:
            methods = [getattr(kind, name) for kind in classes if hasattr(kind, name)]
            assert any(takes(method, call, method=True) for method in methods), (
                f".{name} does not take these arguments"
            )


# -- deploy/README.md -------------------------------------------------------------------------------------

README = (DEPLOY / "README.md").read_text()
MIB = 2**20


def commands() -> list[list[str]]:
    """Return the words of each command of the README."""
    text = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).replace("\\\n", "")
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def made_names() -> set[str]:
    """Return kind/name of what the README's commands may name: objects, and what the operator makes of them."""
    names = {"secret/rasteret-object-store", "namespace/rasteret", "job/rasteret-now"}
    for document in [*plain_objects(), *source("overlays/try/look.yaml")]:
        kind, name = document["kind"].lower(), document["metadata"]["name"]
        names.add(f"{kind}/{name}")
        if kind in ("daskcluster", "daskjob"):
            names |= {f"service/{name}-scheduler", f"daskworkergroup/{name}-default"}
        if kind == "daskjob":
            names |= {f"pod/{name}-runner"}
    return names


COPIES = {"my-job": "minimal", "my-weeks": "weekly", "my-training": "train"}


def check_kubectl(verb: str, rest: list[str]) -> None:
    """Check a command of kubectl against what is there."""
    if "-k" in rest:
        folder = Path(rest[rest.index("-k") + 1])
        folder = folder.with_name(COPIES.get(folder.name, folder.name))
        assert (DEPLOY.parent / folder / "kustomization.yaml").is_file(), folder
        return
    named = {word for word in rest if re.fullmatch(r"[a-z]+/[a-z-]+", word)}
    named |= {word.removeprefix("--from=") for word in rest if word.startswith("--from=")}
    if verb in ("exec", "cp"):
        named |= {"pod/" + word.partition(":")[0] for word in rest[: 2 if verb == "exec" else 1]} - {"pod/--"}
    if verb in ("create", "delete") and rest[0] in ("namespace", "secret", "job"):
        kind, *words = (word for word in rest if not word.startswith("--") and word != "generic")
        named |= {f"{kind}/{words[0]}"}
    assert named <= made_names(), named - made_names()
    assert named or verb in ("get", "config"), "what is it about?"


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:70])
def test_commands_of_the_readme_name_what_is_there(words: list[str]) -> None:
    match words:
        case ["kubectl", verb, *rest]:
            check_kubectl(verb, rest)
        case ["docker", "build", "-f", file, "-t", image, *rest, "."]:
            assert (DEPLOY.parent / file).is_file()
            assert image.endswith(f":{rd.__version__}")
            assert not rest or (rest[0] == "--target" and rest[1] in stages())
        case ["docker", "run", *_, image] | ["kind", "load", "docker-image", image]:
            assert next(one for one in commands() if image in one)[:2] == ["docker", "build"]
        case ["rasteret-dask", name, *rest]:
            main = typer.main.get_command(app)
            main.commands[name].make_context(name, rest, resilient_parsing=True)  # type: ignore[attr-defined]
        case ["cp", "-r", folder, copied]:
            assert (DEPLOY.parent / folder).is_dir()
            assert COPIES[Path(copied).name] == Path(folder).name
        case _:
            assert words[:2] in (["helm", "install"], ["kind", "create"], ["kind", "delete"])


def test_what_runs_in_a_pod_by_the_readme_is_there() -> None:
    inside = [words[words.index("--") + 1 :] for words in commands() if "--" in words]
    assert inside
    for program, name, *_ in inside:
        assert program == "rasteret-dask"
        assert name in typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_links_of_the_readme_lead_somewhere() -> None:
    """From here, and from the site, which shows it as the page docs/kubernetes.md."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    assert targets
    for target in targets:
        assert (DEPLOY / target).is_file(), target
        assert re.fullmatch(r"\.\./docs/[a-z-]+\.md", target), target


def test_every_example_is_in_the_readme() -> None:
    for name in (*BASES, *OVERLAYS, *COMPONENTS):
        assert f"`{name}`" in README, name


def test_sizes_of_the_readme_are_those_of_the_rule() -> None:
    rows = re.findall(r"^\| (\d+)\S* [^|]*\| (\S+GiB) \| (\d+[GM]i) \|$", README, re.MULTILINE)
    assert [int(threads) for threads, _, _ in rows] == [1, 2, 4, 8]
    for threads, limit, memory in rows:
        assert parse_bytes(limit) == limit_bytes(int(threads))
        assert nbytes(memory) == parse_bytes(limit) + 512 * MIB


def asked_for(documents: list[Document]) -> tuple[float, float]:
    """Return cores and GiB that the pods of some objects ask for, all of them together."""
    total = [0.0, 0.0]
    for document in documents:
        for part, pod in pods(document).items():
            count = ours(document)["worker"]["replicas"] if part == "worker" else 1
            for one in pod["containers"]:
                requests = one["resources"]["requests"]
                total[0] += count * cores(requests["cpu"])
                total[1] += count * nbytes(requests["memory"]) / 2**30
    return total[0], total[1]


def test_the_readme_says_what_a_job_asks_for() -> None:
    amount, gib = asked_for([job()])
    assert f"ask for {amount:g} cores and {gib:g} GiB while the job runs" in " ".join(README.split())


def test_the_readme_says_when_things_end() -> None:
    assert cluster()["spec"]["idleTimeout"] == 1800
    assert "half an hour after its last task" in README
    assert pods(job())["job"]["activeDeadlineSeconds"] == 24 * 3600
    assert "after 24 hours at the latest" in README
    assert cron()["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 48 * 3600
    assert "after two days at the latest" in README


# -- the image --------------------------------------------------------------------------------------------


def test_hadolint_has_no_complaint() -> None:
    linter = ENVIRONMENT_BIN / "hadolint"
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def stages() -> dict[str, tuple[str, str]]:
    """Return the image's stages, in order: {name: (what it begins with, its lines)}."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return {name: (begin, text) for begin, name, text in zip(*(parts[i::3] for i in (1, 2, 3)), strict=True)}


def test_image_copies_what_exists() -> None:
    kept = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert (DEPLOY.parent / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in kept), source
    assert kept == {path for path in kept if any(one.startswith(path) for one in " ".join(copied).split())}


def test_images_are_no_root_s_and_workers_come_by_default() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "ARG BASE=python:3.11-slim-bookworm" in text
    assert list(stages())[-1] == "worker", "the last stage is what `docker build` makes without --target"
    for name in ("worker", "notebook", "train"):
        users: list[str] = []
        while name in stages():
            name, lines = stages()[name]
            users = re.findall(r"^USER (\S+)", lines, re.MULTILINE) + users
        assert users[-1] == "1000:1000"


def test_workers_and_notebooks_have_the_same_layers() -> None:
    """So a hub's kernel and its workers have the same versions, and a node pulls most of them once."""
    assert {stages()[name][0] for name in ("worker", "notebook", "train")} == {"runtime"}
    installs = re.findall(r"pip install [^&]+", (DEPLOY / "Dockerfile").read_text())
    assert installs
    assert all("--constraint /opt/constraints.txt" in install for install in installs)
    own = [install for install in installs if "rasteret-dask" in install or "$1[" in install]
    assert len(own) == 3
    assert not [install for install in own if "rasteret-dask" in install], (
        "an index may have one of that name"
    )


def test_image_installs_extras_that_are_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    extras = {extra for names in re.findall(r"\$1\[(.+?)\]", text) for extra in names.split(",")}
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert (
        {"gateway", "kubernetes", "hub", "notebook", "torch"}
        <= extras
        <= set(project["optional-dependencies"])
    )


def test_image_installs_into_an_environment_of_its_own() -> None:
    """A distribution's own Python refuses pip (PEP 668) and has no command ``python``, which jobs run."""
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
