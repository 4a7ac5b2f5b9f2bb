"""What kustomize renders of ``deploy/``, made into pods by the operator's own functions, and run on hosts.

Replaced are only the paths where volumes are mounted, what comes from a Secret, and the image's folder of commands.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hosts import Command, Container, Network, network
from test_deploy import DEPLOY, Document

__all__ = ["Cluster", "Site", "hosts_of", "pods_of"]

NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class Site:
    """What pods find where they run."""

    folder: Path
    """Where their volumes and logs lie: all hosts share this disk."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """ConfigMap -> file -> text."""
    secret: Mapping[str, str] = field(default_factory=dict)
    """What the one Secret holds."""

    def commands(self, name: str, spec: Document) -> list[Command]:
        """Return what the containers of a pod run: those that begin it, then its one container."""
        mounts = {volume["name"]: self._volume(name, volume) for volume in spec.get("volumes", ())}
        return [
            self._command(name, container, mounts)
            for container in (*spec.get("initContainers", ()), *spec["containers"])
        ]

    def _volume(self, pod: str, volume: Document) -> Path:
        if "persistentVolumeClaim" in volume:
            folder = self.folder / str(volume["persistentVolumeClaim"]["claimName"])
        else:
            folder = self.folder / pod / str(volume["name"])
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            for file, text in self.files[volume["configMap"]["name"]].items():
                (folder / file).write_text(text)
        return folder

    def _command(self, pod: str, container: Document, volumes: Mapping[str, Path]) -> Command:
        image = image_environment()
        places = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", ())}
        home = places.setdefault(
            image["HOME"], self.folder / pod / "home"
        )  # the image's own, where nothing is mounted
        home.mkdir(parents=True, exist_ok=True)
        values = {**image, **{one["name"]: one["value"] for one in container.get("env", ())}}
        if any("secretRef" in source for source in container.get("envFrom", ())):
            values |= self.secret

        def here(text: str) -> str:
            for place, folder in places.items():
                text = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w.-])", str(folder), text)
            return text

        values = {name: here(value) for name, value in values.items()} | {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "PYTHONPATH": str(DEPLOY.parent),
        }
        words = [*container.get("command", ()), *container["args"]]
        expanded = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in words]
        return Command(
            tuple(map(here, expanded)), values, Path(here(container.get("workingDir", image["HOME"])))
        )


@cache
def image_environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    words = [
        word for line in re.findall(r"^ENV (.*)", text, flags=re.MULTILINE) for word in shlex.split(line)
    ]
    return dict(word.split("=", 1) for word in words if not word.startswith("PATH="))


def pods_of(job: Document, workers: int = 2) -> dict[str, Document]:
    """Return the pods that the operator makes of a DaskJob or a DaskCluster: names of hosts -> their specs."""
    operator: Any = importlib.import_module("dask_kubernetes.operator.controller.controller")
    name, is_job = job["metadata"]["name"], job["kind"] == "DaskJob"
    cluster = job["spec"]["cluster"]["spec"] if is_job else job["spec"]
    pods = {"scheduler": operator.build_scheduler_deployment_spec(name, cluster["scheduler"]["spec"], {}, {})}
    for number in range(1, workers + 1):
        pods[f"worker-{number}"] = operator.build_worker_deployment_spec(
            f"{name}-default", NAMESPACE, name, f"{number:010x}", cluster["worker"]["spec"], {}, {}
        )
    specs = {pod: deployment["spec"]["template"]["spec"] for pod, deployment in pods.items()}
    if is_job:
        job_pod = operator.build_job_pod_spec(name, name, NAMESPACE, job["spec"]["job"]["spec"], {}, {})
        specs["job"] = job_pod["spec"]
    return specs


@contextmanager
def hosts_of(job: Document, *others: str) -> Iterator[Network]:
    """Make a host for each pod of a DaskJob with two workers, and others; the scheduler's has its service's name."""
    service = f"{job['metadata']['name']}-scheduler.{NAMESPACE}.svc.cluster.local"
    with network(*pods_of(job), *others, aliases={service: "scheduler"}) as hosts:
        yield hosts


class Cluster:
    """A scheduler and its workers, each on a host of its own, started again whenever they end.

    Parameters
    ----------
    job
        The DaskJob, or the DaskCluster.
    hosts
        Where, as :func:`hosts_of` makes them.
    site
        What they find there.
    """

    def __init__(self, job: Document, hosts: Network, site: Site) -> None:
        self.pods, self.hosts, self.site = pods_of(job), hosts, site
        self._runs = 0
        self.containers = {name: self._start(name) for name in self.pods if name != "job"}

    def _start(self, name: str) -> Container:
        (command,) = self.site.commands(name, self.pods[name])
        return Container(self.hosts[name], command, self.site.folder / f"{name}.log")

    def replace_workers(self, site: Site) -> None:
        """Delete the workers' pods and make new ones, which find something else where they run."""
        self.site = site
        names = [name for name in self.containers if name.startswith("worker")]
        for name in names:
            self.containers[name].terminate()
        for name in names:
            self.containers[name].wait()
            self.containers[name] = self._start(name)

    @property
    def workers(self) -> list[Container]:
        """The workers' containers."""
        return [container for name, container in self.containers.items() if name.startswith("worker")]

    def run(self, site: Site | None = None) -> Container:
        """Start the job's pod once more."""
        self._runs += 1
        name, spec = f"job-{self._runs}", self.pods["job"]
        *first, last = (site or self.site).commands(name, spec)
        for command in first:
            self.hosts["job"].output(command)
        log = self.site.folder / f"{name}.log"
        return Container(self.hosts["job"], last, log, spec["restartPolicy"])

    def output(self, *words: str) -> str:
        """Run a command where the job runs, with what the job's container has, and return what it says."""
        command = self.site.commands("job-by-hand", self.pods["job"])[-1]
        return self.hosts["job"].output(Command(words, command.environment, command.folder))

    def delete(self) -> dict[str, int]:
        """End all of it at once, as the operator does when a DaskJob has ended; return what each pod ends with."""
        for container in self.containers.values():
            container.terminate()
        return {name: container.wait() for name, container in self.containers.items()}
