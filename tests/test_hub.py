"""The values of a JupyterHub with dask-gateway are what gateway, hub and Kubernetes accept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dask_gateway_server.backends.kubernetes.backend import KubeBackend, KubeClusterConfig
from dask_gateway_server.backends.kubernetes.controller import KubeController
from dask_gateway_server.models import User
from traitlets.config import Config

from rasteret_dask.launching.request import WORKER_ENVIRONMENT
from rasteret_dask.tasks.workermemory import limit_bytes

HUB = Path(__file__).parents[1] / "deploy" / "hub"
ADA = User("ada")
NANNY = 256 * 2**20


def values() -> Any:
    return yaml.safe_load((HUB / "values.yaml").read_text())


IMAGE = "REGISTRY/rasteret-dask-notebook:1"


def extra_config() -> str:
    """Return the Python of the values, behind what the chart writes before it: the image of clusters."""
    gateway = values()["dask-gateway"]["gateway"]
    image, blocks = gateway["backend"]["image"], gateway["extraConfig"]
    first = f"c.KubeClusterConfig.image = {image['name'] + ':' + image['tag']!r}"
    return "\n".join([first, *(blocks[name] for name in sorted(blocks))])


@pytest.fixture(scope="module")
def configuration() -> Config:
    c = Config()
    exec(compile(extra_config(), "values.yaml", "exec"), {"c": c})
    c.KubeBackend.gateway_instance = c.KubeController.gateway_instance = "hub-dask-gateway"
    c.KubeController.api_url = "http://api-hub-dask-gateway:8000/api"
    return c


@pytest.fixture(scope="module")
def backend(configuration: Config) -> Any:
    """Return the backend of the chart, which asks no API server before it is set up."""
    return KubeBackend(config=configuration, gateway_address="127.0.0.1:0")


def cluster(backend: Any, **options: Any) -> tuple[dict[str, Any], KubeClusterConfig]:
    """Return what a user's options become: as they are kept, and the settings of the cluster."""
    kept, settings = asyncio.run(backend.process_cluster_options(ADA, options))
    return kept, settings


def pod(configuration: Config, settings: KubeClusterConfig, *, worker: bool) -> Any:
    """Return the pod that the gateway's controller makes of a cluster's settings."""
    controller = KubeController.__new__(KubeController)
    super(KubeController, controller).__init__(config=configuration)
    made = controller.make_pod("hub", "abc", settings, is_worker=worker)
    kubernetes_validate.validate(made, kubernetes_validate.latest_version(), strict=True)
    return made


def test_defaults_make_pods_that_kubernetes_takes(backend: Any, configuration: Config) -> None:
    _, settings = cluster(backend)
    (worker,) = pod(configuration, settings, worker=True)["spec"]["containers"]
    (scheduler,) = pod(configuration, settings, worker=False)["spec"]["containers"]
    assert (worker["image"], scheduler["image"]) == (IMAGE, IMAGE)
    assert worker["args"][:2] == ["dask", "worker"]
    assert scheduler["args"][:2] == ["dask", "scheduler"]


@pytest.mark.parametrize("cores", [1, 2, 4, 16])
@pytest.mark.parametrize("memory_gib", [2, 3.5, 12])
def test_a_container_is_larger_than_dask_s_limit_and_has_a_core_a_thread(
    backend: Any, configuration: Config, cores: int, memory_gib: float
) -> None:
    _, settings = cluster(backend, worker_cores=cores, worker_memory=memory_gib)
    (worker,) = pod(configuration, settings, worker=True)["spec"]["containers"]
    given = dict(zip(worker["args"], worker["args"][1:], strict=False))
    resources = worker["resources"]
    assert given["--nthreads"] == str(cores)
    assert float(resources["requests"]["cpu"]) == float(resources["limits"]["cpu"]) == cores
    assert int(given["--memory-limit"]) == memory_gib * 2**30
    assert int(resources["limits"]["memory"]) >= int(given["--memory-limit"]) + NANNY
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_default_worker_is_large_enough_for_any_plan(backend: Any) -> None:
    _, settings = cluster(backend)
    assert settings.worker_memory >= limit_bytes(settings.worker_threads)


def test_workers_begin_with_the_variables_that_every_kind_of_cluster_has(backend: Any) -> None:
    assert cluster(backend)[1].environment.items() >= WORKER_ENVIRONMENT.items()


def test_a_user_s_variables_come_on_top(backend: Any, configuration: Config) -> None:
    _, settings = cluster(backend, environment={"AWS_REGION": "us-west-2", "GDAL_CACHEMAX": "64"})
    (worker,) = pod(configuration, settings, worker=True)["spec"]["containers"]
    variables = {v["name"]: v.get("value") for v in worker["env"]}
    assert variables["AWS_REGION"] == "us-west-2"
    assert variables["GDAL_CACHEMAX"] == "64"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["MALLOC_ARENA_MAX"] == "2"


def test_an_idle_cluster_ends_and_nobody_switches_that_off(backend: Any) -> None:
    assert cluster(backend)[1].idle_timeout == 600
    assert cluster(backend, idle_timeout=120)[1].idle_timeout == 120
    with pytest.raises(Exception, match="idle_timeout must be >= 60"):
        cluster(backend, idle_timeout=0)


def test_no_cluster_is_larger_than_its_limits(backend: Any) -> None:
    assert cluster(backend, worker_cores=16, worker_memory=16)[1].cluster_max_workers == 3  # 63 of 64 cores
    assert cluster(backend, worker_cores=1, worker_memory=64)[1].cluster_max_workers == 3  # of 256 GiB


@pytest.mark.parametrize("image", ["registry.lab/rasteret", "registry.lab:5000/rasteret", ""])
def test_an_image_without_a_tag_is_refused(backend: Any, image: str) -> None:
    with pytest.raises(Exception, match="has no tag: name it as REGISTRY/NAME:TAG"):
        cluster(backend, image=image)


@pytest.mark.parametrize("image", ["registry.lab:5000/rasteret:1.0", "rasteret@sha256:" + "0" * 64])
def test_an_image_with_a_tag_is_taken(backend: Any, image: str) -> None:
    assert cluster(backend, image=image)[1].image == image


def test_notebooks_and_clusters_run_one_image() -> None:
    user, gateway = values()["jupyterhub"]["singleuser"], values()["dask-gateway"]["gateway"]
    assert user["image"] == gateway["backend"]["image"]
    assert f"{user['image']['name']}:{user['image']['tag']}" == IMAGE
    assert user["extraEnv"]["DASK_GATEWAY__CLUSTER__OPTIONS__IMAGE"] == "{JUPYTER_IMAGE_SPEC}"


def test_every_value_of_the_environment_is_text() -> None:
    """Helm takes numbers here and Kubernetes does not."""
    assert {type(value) for value in values()["jupyterhub"]["singleuser"]["extraEnv"].values()} == {str}
