"""The manifests' own commands on several hosts: a job ends with a verified store, whatever is lost on its way."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from bucket_host import S3_PORT, WEB_PORT, Control, Rule
from hosts import NAMES, Command, Container, Network, network, obstacle
from pods import Cluster, Site, hosts_of, pods_of
from test_deploy import Document, needs_kubectl, rendered
from waiting import until

from rasteret_dask.demo.world import World

pytestmark = [pytest.mark.slow, needs_kubectl]

HERE = Path(__file__).parent
README = (HERE.parent / "deploy" / "README.md").read_text()

RECIPE = f"""
[collections.s2]
stac = "http://bucket:{WEB_PORT}/sentinel-2-l2a/collection.json"
date_range = ["2024-04-01", "2024-06-30"]
harmonize = {{ bands = ["red", "nir"], time = "1MS", mask = "clouds" }}

[chips]
size = 8
cell_km = 0.64

[split]
train = 0.7

[[outputs]]
zarr = "s3://mine/NAME"
"""
"""Some 12 shards, as a shard has 256 chips at most."""

KEYS = {
    "AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://bucket:{S3_PORT}",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _hosts_can_be_made() -> None:
    reason = obstacle()
    if reason:
        pytest.skip(reason)


@dataclass(frozen=True)
class LeftAlone:
    """The overlay ``standing``, which nobody uses."""

    document: Document
    hosts: Network
    folder: Path
    containers: dict[str, Container] = field(default_factory=dict)

    def start(self, name: str, environment: Mapping[str, str], replaced: Mapping[str, str]) -> None:
        """Start a pod, which is not started again, with more variables and other words."""
        (command,) = Site(self.folder).commands(name, pods_of(self.document)[name])
        assert set(replaced) <= set(command.words)
        words = tuple(replaced.get(word, word) for word in command.words)
        command = Command(words, {**command.environment, **environment}, command.folder)
        self.containers[name] = Container(self.hosts[name], command, self.folder / f"{name}.log", "Never")


@pytest.fixture(scope="module", autouse=True)
def left_alone(tmp_path_factory: pytest.TempPathFactory, _hosts_can_be_made: None) -> Iterator[LeftAlone]:
    """Start it before all other tests, so that nobody waits for its time."""
    document = of_kind("overlays/standing", "DaskCluster")
    assert document["spec"]["idleTimeout"] > 0
    with hosts_of(document) as hosts:
        cluster = LeftAlone(document, hosts, tmp_path_factory.mktemp("left-alone"))
        cluster.start("worker-1", {}, {})
        # long enough for the worker's start, on a busy machine too
        cluster.start("scheduler", {"DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT": "60s"}, {})
        yield cluster


def of_kind(folder: str, kind: str) -> Document:
    (document,) = [one for one in rendered(folder) if one["kind"] == kind]
    return document


def recipe_of(folder: str) -> str:
    (text,) = [
        one["data"]["recipe.toml"] for one in rendered(folder) if one["metadata"]["name"] == "rasteret-recipe"
    ]
    return str(text)


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    """Namespaces, what runs there, and the files of their names."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from hosts import Command, network
with network("a", "b") as hosts:
    sleeping = hosts["b"].start(Command(("sleep", "1000"), {{"PATH": os.defpath}}, Path("/")), Path("log"))
    print(sleeping.pid, hosts["b"].namespace, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    pid, namespace = done.stdout.split()
    assert psutil.pid_exists(int(pid))
    assert (NAMES / namespace).is_dir()
    with network("c") as hosts:
        until(
            lambda: (
                not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
            )
        )
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert namespace not in listed
        assert not (NAMES / namespace).exists()
        assert hosts["c"].namespace in listed
    assert not (NAMES / hosts["c"].namespace).exists()


def test_two_hosts_and_a_volume_by_the_commands_of_the_first_look(tmp_path: Path) -> None:
    """The overlay ``try`` as it is: scenes are made, two workers write a store, all of it ends, and is looked at."""
    assert "kubectl apply -k deploy/kubernetes/overlays/try\n" in README
    job, look = of_kind("overlays/try", "DaskJob"), of_kind("overlays/try", "Pod")
    assert job["spec"]["cluster"]["spec"]["worker"]["replicas"] == 2
    recipe = recipe_of("overlays/try").replace('"/data/', f'"{tmp_path}/rasteret-data/')
    site = Site(tmp_path, {"rasteret-recipe": {"recipe.toml": recipe}})
    with hosts_of(job) as hosts:
        cluster = Cluster(job, hosts, site)
        runner = cluster.run()
        assert runner.wait() == 0, runner.text
        assert re.search(r"^state +finished$", runner.text, flags=re.MULTILINE)
        assert set(cluster.delete().values()) == {0}
        assert not hosts.processes()
        (pod,) = site.commands("look", look["spec"])
        commands = re.findall(r"^kubectl exec rasteret-look -- (.*)", README, flags=re.MULTILINE)
        assert len(commands) == 2
        for command in commands:
            words = shlex.split(command.replace("/data/", f"{tmp_path}/rasteret-data/"))
            text = hosts["job"].output(replace(pod, words=tuple(words)))
            assert "train.zarr" in text
        assert "every object is what was written" in text


@dataclass(frozen=True)
class Lab:
    """A cluster of two workers by the overlay ``minimal``, beside a host with scenes and a bucket."""

    cluster: Cluster
    hosts: Network
    control: Control
    folder: Path

    def job(self, store: str, bucket: str = "mine", key: str = "old") -> Container:
        """Start a job that writes a store."""
        text = RECIPE.replace("s3://mine/NAME", f"s3://{bucket}/{store}")
        return self.cluster.run(
            Site(self.folder, {"rasteret-recipe": {"recipe.toml": text}}, {**KEYS, "AWS_ACCESS_KEY_ID": key})
        )

    def held(self, store: str) -> Container:
        """Start a job, and return it once three shards are done and each of four threads waits in mid-shard."""
        self.control.rule(store, Rule(after=3, hold=True))
        job = self.job(store)
        until(lambda: len(self.control.held(store)) == 4 or job.codes)
        assert not job.codes, job.text
        return job

    def let_go(self, store: str) -> None:
        """Answer what was held back, and all that follows."""
        self.control.rule(store, Rule())

    def shards(self, store: str, host: str) -> set[str]:
        """Return the shards that a host has in hand while all is held."""
        address = self.hosts[host].address
        puts = self.control.held(store)
        # "train/pixels/c/3/0/0/0/0": the split, and the number of the shard
        parts = [path.split("/") for path, sender in puts.items() if sender == address]
        return {f"{split}-{int(number):05}" for split, _, _, number, *_ in parts}

    def check(self, store: str) -> None:
        """Look whether a store is finished, and is what was written."""
        (command,) = re.findall(
            r"^(rasteret-dask verify s3://BUCKET/train.zarr)$", README, flags=re.MULTILINE
        )
        words = command.replace("BUCKET/train.zarr", f"mine/{store}").split()
        assert "every object is what was written" in self.cluster.output(*words)
        done = self.control.done(store)
        assert len(done) == SHARDS
        assert set(done.values()) == {1}

    def wait_for_workers(self) -> None:
        """Wait until the scheduler has two workers."""
        until(lambda: '"num_workers": 2' in self.ask("api/v1/get_workers"))

    def idle_since(self) -> float | None:
        """Return since when the scheduler is idle, as the operator asks for ``idleTimeout``."""
        idle_since: float | None = json.loads(self.ask("api/v1/check_idle"))["idle_since"]
        return idle_since

    def ask(self, page: str) -> str:
        """Ask the scheduler's web server as the operator does; "" where it does not answer."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.hosts["bucket"].namespace, sys.executable, "-c", ASK, page],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout


SHARDS = 12

ASK = """
import sys, urllib.request
with urllib.request.urlopen(f"http://scheduler:8787/{sys.argv[1]}", timeout=60) as answer:
    print(answer.read().decode())
"""


@pytest.fixture(scope="module")
def lab(
    small_world: World, tmp_path_factory: pytest.TempPathFactory, _hosts_can_be_made: None
) -> Iterator[Lab]:
    folder, job = tmp_path_factory.mktemp("lab"), of_kind("overlays/minimal", "DaskJob")
    (folder / "control").mkdir()
    site = Site(folder, {"rasteret-recipe": {"recipe.toml": ""}}, KEYS)
    with hosts_of(job, "bucket") as hosts:
        words = (
            sys.executable, str(HERE / "bucket_host.py"), str(small_world.sentinel2.parent.parent),
            str(folder / "control"), "mine",
        )  # fmt: skip
        environment = {"PATH": os.defpath, "PYTHONPATH": str(HERE.parent), "HOME": str(folder)}
        bucket = Container(hosts["bucket"], Command(words, environment, folder), folder / "bucket.log")
        cluster = Cluster(job, hosts, site)
        until(lambda: (folder / "control/ready").exists())
        yield Lab(cluster, hosts, Control(folder / "control"), folder)
        bucket.terminate()
        cluster.delete()
        bucket.wait()
        assert not hosts.processes()


def test_two_hosts_and_a_bucket(lab: Lab) -> None:
    job = lab.job("plain")
    assert job.wait() == 0, job.text
    lab.check("plain")
    assert set(lab.control.tries("plain").values()) == {1}
    senders = {put.host for put in lab.control.puts("plain", "pixels/c/")}
    assert senders == {lab.hosts[name].address for name in ("worker-1", "worker-2")}


def test_a_killed_worker_costs_its_unfinished_shards(lab: Lab) -> None:
    job = lab.held("killed")
    unfinished, before = lab.shards("killed", "worker-1"), lab.control.done("killed")
    assert len(unfinished) == 2
    assert lab.idle_since() is None  # whatever idleTimeout says, a cluster at work is kept
    lab.cluster.containers["worker-1"].kill()
    lab.let_go("killed")
    assert job.wait() == 0, job.text
    lab.check("killed")
    tries = lab.control.tries("killed")
    assert {shard for shard, count in tries.items() if count > 1} <= unfinished
    assert all(tries[shard] == 1 for shard in before)
    lab.wait_for_workers()


def test_a_cut_link_costs_the_shards_behind_it(lab: Lab) -> None:
    job = lab.held("cut")
    unfinished, worker = lab.shards("cut", "worker-2"), lab.cluster.containers["worker-2"]
    assert len(unfinished) == 2
    ended = len(worker.codes)
    lab.hosts["worker-2"].cut()
    lab.let_go("cut")
    try:
        assert job.wait() == 0, job.text  # without it
        until(lambda: len(worker.codes) > ended)  # it gives up, too
    finally:
        lab.hosts["worker-2"].join()
    assert "worker-0000000002" in job.text  # the line that says who has given no sign of life
    lab.check("cut")
    tries = lab.control.tries("cut")
    assert {shard for shard, count in tries.items() if count > 1} <= unfinished
    lab.wait_for_workers()  # it is started again


def test_a_scheduler_that_is_started_again_ends_the_job_with_one_message(lab: Lab) -> None:
    job = lab.held("restarted")
    before = lab.control.done("restarted")
    lab.cluster.containers["scheduler"].kill()
    lab.let_go("restarted")
    assert job.wait() == 1
    assert "Traceback" not in job.text
    (line,) = [line for line in job.text.splitlines() if line.startswith("rasteret-dask: ")]
    assert "scheduler" in line
    assert "lost" in line
    assert line.endswith("it does the rest.")
    again = lab.job("restarted")
    assert again.wait() == 0, again.text
    lab.check("restarted")
    assert all(lab.control.tries("restarted")[shard] == 1 for shard in before)
    lab.wait_for_workers()


def test_keys_that_expire_end_the_job_with_one_message_and_fresh_ones_go_on(lab: Lab) -> None:
    lab.control.rule("expired", Rule(after=4, status=400, code="ExpiredToken", key="old"))
    job = lab.job("expired")
    assert job.wait() == 1
    assert job.text.count("ExpiredToken") == 1, job.text
    assert "with fresh ones, then run the same again: what is written stays." in job.text
    before = lab.control.done("expired")
    assert 4 <= before.total() < SHARDS
    fresh = replace(lab.cluster.site, secret={**KEYS, "AWS_ACCESS_KEY_ID": "new"})
    lab.cluster.replace_workers(fresh)  # the Secret is changed, and the workers' pods are deleted
    again = lab.job("expired", key="new")
    assert again.wait() == 0, again.text
    lab.control.rule("expired", Rule())
    lab.check("expired")
    assert all(lab.control.tries("expired")[shard] == 1 for shard in before)


def test_buckets_that_cannot_be_written_are_told_at_once(lab: Lab) -> None:
    lab.control.rule("closed", Rule(status=403, code="AccessDenied", methods=("DELETE", "POST", "PUT")))
    missing, closed = lab.job("x", bucket="nobody"), lab.job("closed")
    assert missing.wait() == closed.wait() == 1
    assert "no such bucket (404); expected one that is there. Make it, or correct its name" in missing.text
    assert "access denied (401 or 403), AccessDenied; expected a place that may be written" in closed.text
    for job in (missing, closed):
        assert len(job.text.splitlines()) == 1, job.text


def test_a_cluster_that_nobody_uses_ends_by_itself(left_alone: LeftAlone) -> None:
    """The operator learns that it is idle; with Dask's own time-out it ends without an operator, workers too."""
    scheduler, worker = (left_alone.containers[name] for name in ("scheduler", "worker-1"))
    assert scheduler.wait() == 0
    assert "Register worker" in scheduler.text
    assert "closing after being idle" in scheduler.text
    assert worker.wait() == 0, worker.text
    # one that comes back finds no scheduler
    left_alone.start("worker-2", {}, {"120": "2"})
    assert left_alone.containers["worker-2"].wait() != 0
    assert not left_alone.hosts.processes()
