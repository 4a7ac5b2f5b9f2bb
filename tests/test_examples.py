"""The examples run, on the small world, and keep what they promise."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from distributed import Client, LocalCluster
from waiting import PATIENCE_S, until

import rasteret_dask as rd

pytest.importorskip("torch", reason="needs the extra torch")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_ddp.py"
OVERLAY = ROOT / "deploy" / "kubernetes" / "overlays" / "train"
CHIPS, EPOCHS, BATCH_SIZE, EVERY = 60, 3, 8, 3
BATCHES = 4
"""Of a rank and epoch: 30 chips by 8."""
CHECKPOINTS = range(EVERY, EPOCHS * BATCHES, EVERY)
"""Batches before which a checkpoint is written."""
PR_SET_PDEATHSIG = 1
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class World:
    """The same chips, twice."""

    plan: Path
    store: Path
    ids: frozenset[str]


@pytest.fixture(scope="module")
def world(s2: rd.Collection, aef: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Write chips as a plan and as a store."""
    optical = s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds")
    chips = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(32, cell_km=0.64)
    chips = chips.sample(CHIPS)
    folder = tmp_path_factory.mktemp("ddp")
    chips.save_plan(folder / "train.plan")
    chips.to_zarr(folder / "train.zarr", progress=False)
    return World(folder / "train.plan", folder / "train.zarr", frozenset(chips.table["chip_id"].to_pylist()))


def of_the_manifest(scheduler: str, world: World, checkpoint: Path) -> list[str]:
    """Return the command of the DaskJob's pod, on the places of this machine."""
    patches = yaml.safe_load((OVERLAY / "train.yaml").read_text())
    (command,) = [patch["value"] for patch in patches if patch["path"].endswith("/args")]
    places = {
        "/opt/examples/train_ddp.py": SCRIPT, "/data/train.plan": world.plan, "/data/run": checkpoint,
        "$(DASK_SCHEDULER_ADDRESS)": scheduler,
    }  # fmt: skip
    assert set(places) <= set(command)
    assert command[0] == "torchrun"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(str(places.get(word, word)) for word in command[1:]),
    ]


def arguments(place: Path, **more: Any) -> list[str]:
    options = {"epochs": EPOCHS, "batch-size": BATCH_SIZE, **more}
    return [str(SCRIPT), str(place), *(f"--{name}={value}" for name, value in options.items())]


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command; its processes have ended, or are killed, when the block ends or this process is killed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=end_with_parent
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # it starts no others meanwhile
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
            process.kill()
        process.communicate()


def end_with_parent() -> None:
    """Have this process told to end when its parent has gone: torchrun then ends its ranks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def reports(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Return what the ranks of a run report, by rank, when it has ended well."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    found: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    return sorted(found, key=lambda report: int(report["rank"]))


def on_this_machine(*command: str) -> list[dict[str, Any]]:
    with running(command) as process:
        return reports(process)


def killed(command: Sequence[str], notes: Path, after: int) -> list[dict[str, Any]]:
    """Run a command, kill its second rank by SIGKILL when that has noted so many batches, and return the reports.

    Its notes go into a pipe that nobody reads any more: so it stands still in a batch that follows. On a busy machine
    several notes are read at once, and it is killed some batches later.
    """
    notes.mkdir()
    place = notes / "rank-1.jsonl"
    os.mkfifo(place)
    with running(command) as process:
        lines: list[str] = []
        while len(lines) < after:
            with open_pipe(place, process) as pipe:
                lines += pipe
        victim = json.loads(lines[-1])["process"]
        psutil.Process(victim).kill()
        (notes / "kept").write_text("".join(lines))
        os.replace(notes / "kept", place)
        return reports(process)


@contextmanager
def open_pipe(place: Path, process: subprocess.Popen[str]) -> Iterator[list[str]]:
    """Yield the lines that one writer writes into a pipe, as soon as it has closed it."""
    number = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    parts: list[bytes] = []

    def whole() -> bool:
        assert process.poll() is None, process.communicate()[1]
        try:
            parts.append(os.read(number, 1 << 20))
        except BlockingIOError:  # a writer, and nothing written yet
            return False
        return b"".join(parts).endswith(b"\n")

    try:
        until(whole)
    finally:
        os.close(number)
    yield b"".join(parts).decode().splitlines(keepends=True)


def noted(notes: Path, rank: int) -> dict[int, dict[str, Any]]:
    """Return what a rank has noted, by batch: of one that was repeated the last."""
    lines = [json.loads(line) for line in (notes / f"rank-{rank}.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def check_epochs(notes: Path, world: World) -> None:
    """Check that ranks saw each chip exactly once in each epoch, and no two epochs in the same order."""
    ranks = [noted(notes, rank) for rank in (0, 1)]
    assert [sorted(rank) for rank in ranks] == [list(range(EPOCHS * BATCHES))] * 2
    orders = []
    for epoch in range(EPOCHS):
        steps = range(epoch * BATCHES, (epoch + 1) * BATCHES)
        chips = [chip for rank in ranks for step in steps for chip in rank[step]["chips"]]
        assert Counter(chips) == Counter(world.ids)
        orders.append(tuple(chips))
    assert len(set(orders)) == EPOCHS


def check_ranks(both: Sequence[Mapping[str, Any]], firsts: Iterable[int] = (0,)) -> None:
    """Check that ranks began at one of these batches, were two processes, and ended with one model that has learnt."""
    assert [report["rank"] for report in both] == [0, 1]
    assert len({report["process"] for report in both}) == 2
    first = both[0]["first_batch"]
    assert first in firsts
    assert both[1]["first_batch"] == first
    assert [report["batches"] for report in both] == [EPOCHS * BATCHES - first] * 2
    assert both[0]["weights"] == both[1]["weights"]
    assert all(report["losses"][-1] < report["losses"][0] for report in both)


def check_nothing_runs() -> None:
    """Check that no process of the example is left."""

    def left() -> list[psutil.Process]:
        each = psutil.process_iter(["cmdline"])
        return [process for process in each if str(SCRIPT) in (process.info["cmdline"] or ())]

    until(lambda: not left())


def test_lightning_goes_on_in_the_middle_of_an_epoch(
    s2: rd.Collection, aef: rd.Collection, tmp_path: Path
) -> None:
    pytest.importorskip("lightning", reason="needs the extra lightning")
    optical = s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds")
    chips = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(32, cell_km=0.64)
    chips = chips.sample(CHIPS).split(0.6, 0.4, 0.0, seed=1)
    chips.to_zarr(tmp_path / "chips.zarr", progress=False)
    train = rd.open_chips(tmp_path / "chips.zarr", split="train")
    script = str(SCRIPT.with_name("train_lightning.py"))
    batches = -(-len(train) // BATCH_SIZE)
    assert batches >= 3
    reports = []
    for steps in (batches + 1, -1):
        command = [sys.executable, script, str(tmp_path / "chips.zarr"), "--epochs=3", f"--batch-size={BATCH_SIZE}",
                   f"--steps={steps}", f"--folder={tmp_path / 'run'}"]  # fmt: skip
        with running(command) as process:
            out, err = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, err
            reports.append(json.loads(out.splitlines()[-1]))
    first, second = reports
    assert (first["steps"], second["steps"]) == (batches + 1, 3 * batches)
    wanted = [chip for b in train.stream(BATCH_SIZE, shuffle=7, epochs=3) for chip in b["chip_id"].tolist()]
    assert first["chips"] + second["chips"] == wanted
    assert second["train"][-1] < first["train"][0]
    assert second["val"]


@pytest.fixture(scope="module")
def weights(world: World) -> str:
    """Train on two workers of a Dask cluster, undisturbed; return the hash of the weights."""
    both = on_this_machine(sys.executable, *arguments(world.plan))
    check_ranks(both)
    check_nothing_runs()
    return str(both[0]["weights"])


def test_a_killed_rank_goes_on_from_a_store_as_if_nothing_had_been(
    world: World, weights: str, tmp_path: Path
) -> None:
    """Torchrun starts both ranks again; the weights are those of ranks on Dask workers that nobody killed."""
    notes, checkpoint = tmp_path / "notes", tmp_path / "checkpoint"
    how = arguments(world.store, checkpoint=checkpoint, every=EVERY, notes=notes)
    both = killed([*TORCHRUN, "--max-restarts", "1", *how], notes, after=EVERY + 1)
    check_ranks(both, firsts=CHECKPOINTS)
    check_epochs(notes, world)
    assert both[0]["weights"] == weights
    check_nothing_runs()
    assert sorted(path.name for path in checkpoint.iterdir()) == ["latest.pt"]


def test_a_killed_rank_goes_on_beside_a_cluster_that_reads_for_it(
    world: World, weights: str, tmp_path: Path
) -> None:
    """By the DaskJob's own command. The cluster stays, and nothing of the ranks stays on it."""
    notes = tmp_path / "notes"
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        how = of_the_manifest(cluster.scheduler_address, world, tmp_path / "run")
        small = [f"--epochs={EPOCHS}", f"--batch-size={BATCH_SIZE}", f"--every={EVERY}", f"--notes={notes}"]
        both = killed([*how, *small], notes, after=EVERY + 1)
        check_ranks(both, firsts=CHECKPOINTS)
        check_epochs(notes, world)
        assert both[0]["weights"] == weights
        until(lambda: not cluster.scheduler.tasks)
        until(lambda: set(cluster.scheduler.clients) <= {client.id, "fire-and-forget"})
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
    check_nothing_runs()
