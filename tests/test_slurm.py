"""Clusters of Slurm jobs, by a Slurm of one machine: real submissions, real workers, real kills."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import part_processes
import pytest
from distributed import Client
from fake_slurm import FakeSlurm, Job
from hypothesis import given
from hypothesis import strategies as st
from pages import DOCS, run_page
from part_processes import FREE, SHRUNK, planned
from small_stores import contents
from waiting import until

import rasteret_dask as rd
from rasteret_dask.cli.app import main
from rasteret_dask.demo.world import World
from rasteret_dask.launching.slurm import OPTIONS, Walltime
from rasteret_dask.net import remote
from rasteret_dask.net.watch import Watch
from rasteret_dask.progress import Progress
from rasteret_dask.store import shardreports
from rasteret_dask.tasks import workermemory

pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue")

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning"),
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(), reason="the fake Slurm finds its jobs in /proc"
    ),
]

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Look often."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("rasteret_dask.launching.slurmjobs.LOOK", "200ms")
        yield


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    """Put a Slurm on the PATH, and a folder of its own under the test's feet."""
    running = FakeSlurm(tmp_path / "slurm")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{running.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
    yield running
    running.close()


@pytest.fixture(scope="module")
def shrunk() -> Iterator[None]:
    """Have many shards in a small world."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHRUNK.items():
            patch.setattr(f"rasteret_dask.{name}", value)
        yield


@pytest.fixture(scope="module")
def chips(small_world: World, shrunk: None) -> rd.Chips:
    return planned(str(small_world.sentinel2))


@pytest.fixture(scope="module")
def plain(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the store of one plain run."""
    store = tmp_path_factory.mktemp("plain") / "x.zarr"
    chips.to_zarr(store, progress=False)
    return store


def tries(store: Path) -> dict[str, int]:
    return {shard: len(marks) for shard, marks in shardreports.tries(remote.listing(str(store))).items()}


def written(store: Path) -> set[str]:
    return {path.stem for path in (store / "_job/done").glob("*.json")}


def jobs_of(client: Client) -> Any:
    """Return the cluster of a client."""
    return client.cluster


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Call something beside the test."""
    thread = ThreadPoolExecutor(1)
    future = thread.submit(call)
    thread.shutdown(wait=False)
    return future


def states(slurm: FakeSlurm) -> list[str]:
    return [job.state for job in slurm.jobs]


def ends(slurm: FakeSlurm) -> list[str]:
    """Return the states of all jobs once none waits or runs: who cancels one does not wait for its processes."""
    until(lambda: not slurm.active)
    return states(slurm)


# -- what is refused, and what is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("walltime", "30", "at least 5 minutes"),
        ("walltime", 30, "at least 5 minutes"),
        ("walltime", "4:00", "at least 5 minutes"),
        ("walltime", "soon", "at least 5 minutes"),
        ("queue", "", "one line"),
        ("queue", "a\nb", "one line"),
        ("account", 7, "one line"),
        ("job_script_prologue", "module load python", "a list"),
        ("job_extra_directives", ["#SBATCH --exclusive"], "Leave out #SBATCH"),
        ("security", "yes", "true or false"),
        ("scheduler_options", ["x"], "a mapping"),
        ("partition", "compute", "one of"),
    ],
)
def test_options_that_make_no_sense(slurm: FakeSlurm, option: str, value: Any, words: str) -> None:
    with pytest.raises(rd.PlanError, match=words) as caught, rd.cluster("slurm", options={option: value}):
        pass
    assert option in str(caught.value)
    assert not slurm.jobs
    assert set(OPTIONS) >= {option} or option == "partition"


@given(seconds=st.integers(300, 10**7))
def test_a_worker_ends_before_its_job(seconds: int) -> None:
    walltime = Walltime.of(f"{seconds}s")
    assert Walltime.of(walltime.text).seconds == seconds
    life_s, stagger_s = walltime.life()
    assert life_s - stagger_s >= 0
    assert life_s + stagger_s <= seconds - 60
    assert life_s - stagger_s >= seconds / 2, "most of the time is used"
    shorter_s, stagger_s = walltime.life(life_s / 2)
    assert shorter_s + stagger_s <= seconds - 60


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200), ("90min", 5400), ("90 minutes", 5400), ("1:30:00", 5400), ("90:00", 5400), ("1-00", 86400),
        ("1-12:00:00", 129600), ("1-12:30", 131400),
    ],
)  # fmt: skip
def test_times_with_a_colon_or_a_dash_are_slurm_s(text: str, seconds: int) -> None:
    assert Walltime.of(text).seconds == seconds


def test_a_lifetime_that_is_longer_than_the_job(slurm: FakeSlurm) -> None:
    size = rd.WorkerSize(lifetime="59 minutes")
    with (
        pytest.raises(rd.PlanError, match=r"3540 s; expected at most 3420 s"),
        rd.cluster("slurm", size=size, options={"walltime": "1h"}),
    ):
        pass


@pytest.mark.parametrize("command", ["sbatch", "squeue", "scancel"])
def test_commands_that_are_missing(slurm: FakeSlurm, command: str) -> None:
    slurm.without(command)
    with pytest.raises(rd.JobError, match=f"no {command} on the PATH.*login node"), rd.cluster("slurm"):
        pass


def test_the_extra_is_missing(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(rd.MissingExtraError, match=r"pip install .*'dask-jobqueue"), rd.cluster("slurm"):
        pass


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"queue": "gpu"}, rd.WorkerSize(), "invalid partition specified: gpu"),
        (
            {"account": "nobody"},
            rd.WorkerSize(),
            "Invalid account or account/partition combination specified",
        ),
        ({}, rd.WorkerSize(memory="2TiB"), "Memory specification can not be satisfied"),
        ({}, rd.WorkerSize(threads=500), "Requested node configuration is not available"),
        ({"job_extra_directives": ["--exclusve"]}, rd.WorkerSize(), "unrecognized option '--exclusve'"),
        ({"job_extra_directives": ["--mem=8Q"]}, rd.WorkerSize(), "Invalid --mem specification"),
    ],
)
def test_sbatch_refuses_the_job(
    slurm: FakeSlurm, tmp_path: Path, options: dict[str, Any], size: rd.WorkerSize, words: str
) -> None:
    with pytest.raises(rd.JobError) as caught, rd.cluster("slurm", size=size, options=options):
        pass
    assert words in str(caught.value)
    assert "#SBATCH --cpus-per-task" in caught.value.remedy, "the job's header is shown"
    assert not slurm.jobs
    assert not list((tmp_path / "work" / "slurm-logs").iterdir()), "keys are left"


def test_a_queue_that_stays_pending(
    slurm: FakeSlurm, chips: rd.Chips, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.hold("QOSMaxCpuPerUserLimit")
    with rd.cluster("slurm", workers=3, options={"account": "lab"}) as client:
        until(
            lambda: (
                [(job.state, job.facts["reason"]) for job in slurm.jobs]
                == [("PENDING", "QOSMaxCpuPerUserLimit")] * 3
            )
        )
        with dask.config.set({"rasteret_dask.watch.no-workers": "0s"}):
            watch = Watch(client, "to_zarr(x)", {}, Progress("tasks", shown=False))
        with caplog.at_level(logging.WARNING, logger="rasteret_dask"):
            watch.look()
        assert "3 jobs PENDING (QOSMaxCpuPerUserLimit); it goes on once there are some" in caplog.text
        slurm.without("squeue")
        assert jobs_of(client).waiting_for() == "squeue does not answer"
    assert ends(slurm) == ["CANCELLED"] * 3
    assert not slurm.processes()


def test_jobs_that_end_before_they_are_workers(slurm: FakeSlurm, chips: rd.Chips, tmp_path: Path) -> None:
    """As where the nodes lack the environment: nobody waits for ever."""
    with (
        dask.config.set({"rasteret_dask.watch.no-workers": "100ms", "rasteret_dask.watch.look": "50ms"}),
        rd.cluster("slurm", workers=1, options={"python": "/no/such/python"}) as client,
        pytest.raises(rd.JobError, match=r"(?s)job 1 ended without becoming one.*/no/such/python") as caught,
    ):
        chips.to_zarr(tmp_path / "x.zarr", client=client, progress=False)
    assert "job_script_prologue" in caught.value.remedy
    assert ends(slurm) == ["FAILED"]


def test_a_refusal_later_stops_nothing(slurm: FakeSlurm) -> None:
    """With a limit on submitted jobs, those that are there go on, and sbatch is not called over and over."""
    slurm.hold("Priority")
    slurm.allow(jobs=2)
    with rd.cluster("slurm", workers=4) as client:
        until(lambda: len(slurm.calls("sbatch")) == 4)
        until(lambda: len(jobs_of(client).plan) == 2)
        for _ in range(3):
            client.sync(jobs_of(client)._adaptive.adapt)
        waits = jobs_of(client).waiting_for()
        assert waits.startswith("2 jobs PENDING (Priority); sbatch refuses a further job: ")
        assert len(slurm.calls("sbatch")) == 4
    assert ends(slurm) == ["CANCELLED"] * 2


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        (
            "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0",
            "system.slice/slurmstepd.scope/job_7/memory.max",
        ),
        ("4:memory:/slurm/uid_1000/job_7/step_batch", "memory/slurm/uid_1000/job_7/memory.limit_in_bytes"),
        ("3:cpuset:/x\n2:cpu,memory:/job_7", "memory/job_7/memory.limit_in_bytes"),
        ("0::/", "memory.max"),
    ],
)
def test_threads_keep_to_the_memory_of_their_job(
    groups: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's limit is that of a group far down in the tree."""
    monkeypatch.setattr(workermemory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(workermemory, "GROUPS_HERE", tmp_path / "groups")
    machine = workermemory.memory_here()
    (tmp_path / "groups").write_text(groups + "\n")
    limit = tmp_path / "cgroup" / file
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n")
    assert workermemory.memory_here() == machine
    limit.write_text("1073741824\n")
    assert workermemory.memory_here() == 2**30


KILLED = """
import os, pathlib, signal, subprocess, sys
from fake_slurm import FakeSlurm
from waiting import until

slurm = FakeSlurm(pathlib.Path(sys.argv[1]))
slurm.allow(running=1)
for _ in range(2):
    subprocess.run([slurm.bin / "sbatch", "--output=/dev/null", sys.argv[2]], check=True)
until(slurm.processes)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_job_outlives_a_test_that_is_killed(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Of the fake Slurm: a job that runs, and one that waits."""
    script, folder = tmp_path / "script", tmp_path / "other"
    script.write_text("#!/bin/bash\nsleep 10000\n")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    jobs = [Job(path) for path in (folder / "jobs").iterdir()]
    until(lambda: [job.state for job in jobs] == ["CANCELLED"] * 2)
    assert not any(job.processes() for job in jobs)


# -- real workers ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_store_is_the_plain_one(slurm: FakeSlurm, chips: rd.Chips, plain: Path, tmp_path: Path) -> None:
    size = rd.WorkerSize(threads=3, environment={"GREETING": "it's two words"})
    options = {
        "queue": "long", "account": "lab", "walltime": "1-00:00:00", "job_extra_directives": ["--constraint=fast"],
        "job_script_prologue": ["export PROLOGUE=1"], "local_directory": str(tmp_path / "scratch"),
    }  # fmt: skip
    with rd.cluster("slurm", chips=chips, workers=2, size=size, options=options) as client:
        assert jobs_of(client).scheduler_address.startswith("tls://")
        report = chips.to_zarr(tmp_path / "x.zarr", client=client, progress=False)
        client.wait_for_workers(2)
        facts = client.scheduler_info(n_workers=-1)["workers"].values()
        memory = chips.explain().worker_bytes(3)
        assert {(own["nthreads"], own["memory_limit"]) for own in facts} == {(3, memory)}
        for name, value in {"GREETING": "it's two words", "PROLOGUE": "1", "MALLOC_ARENA_MAX": "2"}.items():
            assert set(client.run(os.getenv, name).values()) == {value}
    assert report.committed
    assert contents(tmp_path / "x.zarr") == contents(plain)
    assert ends(slurm) == ["CANCELLED"] * 2
    assert not slurm.processes()
    for job in slurm.jobs:
        asked = {
            "partition": "long",
            "account": "lab",
            "time": "1-00:00:00",
            "constraint": "fast",
            "cpus-per-task": "3",
        }
        assert job.options.items() >= asked.items()
        assert int(job.options["mem"].rstrip("M")) * 2**20 > memory, "room for the nanny"
        assert job.options["job-name"] in job.output, "the worker tells its name in the log"


@pytest.mark.slow
def test_a_job_that_is_killed_is_replaced(
    slurm: FakeSlurm, chips: rd.Chips, plain: Path, tmp_path: Path
) -> None:
    """As at the time limit: what was written stays, and only unfinished shards are computed twice."""
    notes, store = tmp_path / "notes", tmp_path / "x.zarr"
    notes.mkdir()
    with rd.cluster("slurm", workers=1, size=rd.WorkerSize(threads=2)) as client:
        client.wait_for_workers(1)
        client.run(part_processes.hold, str(notes))
        future = in_thread(lambda: chips.to_zarr(store, client=client, progress=False))
        until(lambda: len(written(store)) >= FREE and len(list(notes.glob("begun.*"))) > len(written(store)))
        before = written(store)
        slurm.jobs[0].end_time(at_once=True)
        report = future.result()
    assert ends(slurm) == ["TIMEOUT", "CANCELLED"]
    assert report.committed
    assert contents(store) == contents(plain)
    assert all(tries(store)[shard] == 1 for shard in before)
    assert sum(tries(store).values()) <= 17 + 2, "no more than what was under way on two threads"


@pytest.mark.slow
def test_as_many_jobs_as_there_is_work_for(
    slurm: FakeSlurm, chips: rd.Chips, plain: Path, tmp_path: Path
) -> None:
    with rd.cluster("slurm", workers=(0, 2)) as client:
        report = chips.to_zarr(tmp_path / "x.zarr", client=client, progress=False)
        until(lambda: not slurm.active)  # nothing is left to do
    assert report.committed
    assert contents(tmp_path / "x.zarr") == contents(plain)
    assert 1 <= slurm.most_wanted() <= 2  # one that was let go may have come again
    assert not slurm.processes()


@pytest.mark.slow
def test_jobs_that_nobody_uses_end_and_come_again(slurm: FakeSlurm) -> None:
    """As those of a notebook that is left open over a weekend."""
    with rd.cluster("slurm", workers=1, options={"idle_timeout": "1s"}) as client:
        until(lambda: slurm.jobs and not slurm.active)
        assert client.submit(abs, -1).result() == 1
        assert ends(slurm) == ["CANCELLED"] * 2
    assert not slurm.processes()


CLIENT = """
import sys
import part_processes, rasteret_dask as rd

if __name__ == "__main__":
    part_processes.shrink()
    chips = part_processes.planned(sys.argv[1])
    with rd.cluster("slurm", workers=2) as client:
        client.wait_for_workers(1)
        client.run(part_processes.hold, sys.argv[3])
        chips.to_zarr(sys.argv[2], client=client, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_job_stays_when_the_client_is_ended(
    slurm: FakeSlurm, small_world: World, chips: rd.Chips, plain: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """One job runs and one waits: the one that waits finds no scheduler when its turn comes."""
    notes, store = tmp_path / "notes", tmp_path / "x.zarr"
    notes.mkdir()
    slurm.allow(running=1)
    command = [sys.executable, "-c", CLIENT, str(small_world.sentinel2), str(store), str(notes)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as client:
        until(lambda: len(written(store)) >= FREE and len(list(notes.glob("begun.*"))) > len(written(store)))
        until(lambda: states(slurm) == ["RUNNING", "PENDING"])
        slurm.jobs[1].rewrite("--death-timeout 120", "--death-timeout 1")
        client.send_signal(number)
        (notes / "go").touch()  # shards under way end, those of workers without a client too
        _, stderr = client.communicate()
    assert client.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number], stderr
    how = ends(slurm)
    assert not slurm.processes()
    if number == signal.SIGTERM:
        assert how == ["CANCELLED"] * 2
        assert not list(Path("slurm-logs").glob(".dask-jobqueue*")), "keys are left"
    chips.to_zarr(store, progress=False)
    assert contents(store) == contents(plain)


# -- the scripts of deploy/slurm ----------------------------------------------------------------------------

SCRIPTS = TESTS.parent / "deploy" / "slurm"

RECIPE = """
[collections.s2]
stac = "{catalog}"
date_range = ["2024-04-01", "2024-06-30"]
harmonize = {{ bands = ["red"], time = "3MS" }}

[chips]
size = 32
cell_km = 0.96

[split]
train = 0.7

[[outputs]]
zarr = "train.zarr"
"""

CUSTOMIZED = """
import os, sys
if os.path.basename(sys.argv[0]) == "rasteret-dask" or "rasteret-dask" in " ".join(sys.orig_argv):
    import part_processes
    part_processes.shrink()
    if "HOLD" in os.environ:
        part_processes.hold(os.environ["HOLD"])
"""
"""Of the jobs' processes: small shards, and some held back."""


@pytest.fixture(scope="module")
def written_here(small_world: World, shrunk: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe's store, as one run of this process writes it."""
    folder = tmp_path_factory.mktemp("written-here")
    (folder / "train.toml").write_text(RECIPE.format(catalog=small_world.sentinel2))
    assert main(["run", str(folder / "train.toml"), "-q"]) == 0
    return folder / "train.zarr"


@pytest.fixture
def queue(
    slurm: FakeSlurm, small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that submits a script in a folder with a recipe."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sitecustomize.py").write_text(CUSTOMIZED)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv(
        "PATH",
        f"{os.environ['PATH'].replace(os.pathsep, f'{os.pathsep}{Path(sys.executable).parent}{os.pathsep}', 1)}",
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    Path("train.toml").write_text(RECIPE.format(catalog=small_world.sentinel2))

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)

    return submit


Submit = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = ("--cpus-per-task=2", "--mem=4G")


def until_held(job: Job, notes: Path) -> None:
    """Wait until a job is in the middle of its shards."""
    until(lambda: job.state == "FAILED" or (len(written(Path("train.zarr"))) >= FREE and begun(notes) > FREE))
    assert job.state == "RUNNING", job.output


def begun(notes: Path) -> int:
    return len(list(notes.glob("begun.*")))


def assert_finished(slurm: FakeSlurm, wanted: Path, tmp_path: Path) -> None:
    assert contents(Path("train.zarr")) == contents(wanted)
    assert rd.verify("train.zarr").verdict == "ok"
    assert not list((tmp_path / "scratch").glob("rasteret-*")), "scratch is left"
    assert not list(Path().glob(".rasteret*")), "keys are left"
    assert not slurm.processes()


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_slurm_takes_the_scripts(slurm: FakeSlurm, script: Path) -> None:
    slurm.hold("Priority")
    done = subprocess.run(["sbatch", str(script), "train.toml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Submitted batch job 1\n"), done.stderr
    assert "#!/bin/bash" in slurm.jobs[0].script
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_job_that_is_told_before_its_time_limit(
    slurm: FakeSlurm, queue: Submit, written_here: Path, tmp_path: Path
) -> None:
    """It stops at the end of the shards under way, and its next run, in the same job, does the rest."""
    notes = tmp_path / "notes"
    notes.mkdir()
    done = queue(f"--export=ALL,HOLD={notes}", *SMALL, str(SCRIPTS / "job.sbatch"), "train.toml")
    assert done.returncode == 0, done.stderr
    (job,) = slurm.jobs
    until_held(job, notes)
    job.signal_batch(signal.SIGUSR1)
    (notes / "go").touch()
    until(lambda: job.state not in ("PENDING", "RUNNING"))
    assert (job.state, job.facts["restarts"]) == ("COMPLETED", 1), job.output
    assert "the job goes back into the queue" in job.output
    assert set(tries(Path("train.zarr")).values()) == {1}, "a shard was computed twice"
    assert_finished(slurm, written_here, tmp_path)


@pytest.mark.slow
def test_a_job_that_is_cancelled_stays_so(
    slurm: FakeSlurm, queue: Submit, written_here: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    queue(f"--export=ALL,HOLD={notes}", *SMALL, str(SCRIPTS / "job.sbatch"), "train.toml")
    (job,) = slurm.jobs
    until_held(job, notes)
    subprocess.run(["scancel", "1"], check=True)
    (notes / "go").touch()
    until(lambda: job.state not in ("PENDING", "RUNNING"))
    assert (job.state, job.facts["restarts"]) == ("CANCELLED", 0), job.output
    assert not (Path("train.zarr") / "zarr.json").exists()
    done = queue("--wait", *SMALL, str(SCRIPTS / "job.sbatch"), "train.toml")
    assert done.returncode == 0, slurm.jobs[1].output
    assert set(tries(Path("train.zarr")).values()) == {1}, "a shard was computed twice"
    assert_finished(slurm, written_here, tmp_path)


@pytest.mark.slow
def test_a_part_of_an_array_then_all_of_them_then_the_end(
    slurm: FakeSlurm, queue: Submit, written_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, finish = str(SCRIPTS / "job.sbatch"), str(SCRIPTS / "finish.sbatch")
    done = queue("--wait", "--array=2", *SMALL, script, "train.toml")
    assert done.returncode == 2
    assert "say how many parts there are in all, as PARTS=20 sbatch" in slurm.jobs[0].output
    with monkeypatch.context() as patch:
        patch.setenv("PARTS", "2")
        done = queue("--wait", "--array=2", *SMALL, script, "train.toml")
    assert done.returncode == 0, slurm.jobs[1].output
    assert "not finished" in slurm.jobs[1].output
    done = queue("--wait", finish, "train.zarr")
    assert done.returncode != 0, "shards of the other part are missing"
    assert "missing" in slurm.jobs[2].output
    parts = queue("--parsable", "--array=1-2", *SMALL, script, "train.toml").stdout.strip()
    done = queue("--wait", f"--dependency=afterany:{parts}", finish, "train.zarr")
    assert done.returncode == 0, [job.output for job in slurm.jobs]
    assert ends(slurm)[3:] == ["COMPLETED"] * 3
    assert set(tries(Path("train.zarr")).values()) == {1}, "a shard was computed twice"
    assert_finished(slurm, written_here, tmp_path)


@pytest.mark.slow
def test_a_dask_cluster_over_the_nodes_of_a_job(
    slurm: FakeSlurm, queue: Submit, written_here: Path, tmp_path: Path
) -> None:
    done = queue("--wait", *SMALL, str(SCRIPTS / "cluster.sbatch"), "train.toml")
    (job,) = slurm.jobs
    assert done.returncode == 0, job.output
    assert job.output.count("Registered to:") == 2
    assert "tls://" in job.output
    assert_finished(slurm, written_here, tmp_path)


@pytest.mark.slow
def test_the_page_from_nothing_to_a_verified_store(
    slurm: FakeSlurm, small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of ``slurm.md`` as a user types them."""
    folder = tmp_path / "work"
    (folder / "demo").mkdir()
    (folder / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    (folder / "deploy").symlink_to(SCRIPTS.parent)
    run_page(DOCS / "slurm.md", folder, monkeypatch)
    for store in ("train.zarr", "array.zarr", "cluster.zarr", "cli.zarr"):
        assert rd.verify(folder / store).verdict == "ok"
    until(lambda: not slurm.active)
    assert not slurm.processes()
    assert not {path.name for path in folder.iterdir()} & {"slurm-logs", "slurm-1.out"}, (
        "it says how to clean up"
    )
