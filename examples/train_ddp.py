"""Train with torch's DistributedDataParallel on several processes, from one stream of chips.

Every rank takes its own part of the same shuffled stream, and all of them have the same number of batches. The network
learns to tell a source of embeddings from a source of reflectances::

    plan = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(128).split().select("train")
    plan.to_zarr("train.zarr")       # to train from a store, or
    plan.save_plan("train.plan")     # to train from the scenes, which a Dask cluster reads

Under ``torchrun``, each process is a rank. From a store they read for themselves; with ``--scheduler`` the workers of
a Dask cluster read for them::

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py train.zarr --checkpoint run1
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py s3://bucket/train.plan --scheduler tcp://...

With ``--checkpoint`` they go on where they were, after ``--max-restarts`` as well as in a later call: parameters and
the stream's place are written together, so that no chip of an epoch counts twice and none is left out. Over several
nodes, with ``--nnodes``, set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` where torchrun runs: see ``meeting_point``.

Without ``torchrun``, ranks are tasks on those workers of a Dask cluster that hold the resource ``train``. Start these
by ``dask worker ADDRESS --nthreads 1 --resources train=1``, and readers by ``dask worker ADDRESS``::

    python examples/train_ddp.py train.plan                                       # a cluster of this machine
    python examples/train_ddp.py s3://bucket/train.plan --scheduler tcp://...     # a cluster of yours
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from distributed import Client, Nanny, Scheduler, SpecCluster
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rasteret_dask.streamfrom import stream_from
from rasteret_dask.streams.stream import Stream
from rasteret_dask.torchdata import as_tensors


@dataclass(frozen=True)
class Settings:
    """What all ranks have in common."""

    plan: str
    """A saved plan or a store: a path or URL that all who read see."""
    split: str = ""
    """Of a store with several splits: the one to train on."""
    ranks: int = 2
    """Ignored under torchrun, which says how many there are."""
    epochs: int = 2
    batch_size: int = 16
    source: str = "optical"
    target: str = "embeddings"
    checkpoint: str = ""
    """A folder that all ranks see; "" keeps nothing."""
    every: int = 10
    """Batches between two checkpoints; the last batch makes one anyway."""
    timeout_s: int = 600
    """Ranks that wait for each other for so long fail; under torchrun, all of them are then started again."""
    notes: str = ""
    """A folder for a line of JSON a batch: its number, its loss and its chips; "" writes none."""


def train(rank: int, ranks: int, scheduler: str | None, settings: Settings) -> dict[str, Any]:
    """Train one rank, whose process group is there; return what it has seen and where its weights ended."""
    torch.manual_seed(0)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    stream = stream_from(
        scheduler, settings.plan, settings.batch_size, shuffle=7, epochs=settings.epochs,
        rank=rank, world_size=ranks, split=settings.split or None,
    )  # fmt: skip
    bands, vectors = (len(stream.bands[name]) for name in (settings.source, settings.target))
    model = DistributedDataParallel(network(bands, vectors).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = resumed(model, optimizer, stream, settings)
    losses, chips = [], 0
    with stream:
        for step, arrays in enumerate(stream, first):
            batch = as_tensors(arrays)
            loss = distance(model, batch, settings, device)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # waits for all ranks: that is why each needs the same number of batches
            optimizer.step()
            losses.append(loss.item())
            chips += len(batch["chip_id"])
            note(rank, step, losses[-1], batch["chip_id"], settings)
            if rank == 0 and (step % settings.every == settings.every - 1 or step == len(stream) - 1):
                save(model, optimizer, stream, settings)
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return {
        "rank": rank, "process": f"{socket.gethostname()}:{os.getpid()}", "first_batch": first,
        "batches": len(losses), "chips": chips, "losses": losses[:1] + losses[-1:],
        "weights": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip


def save(model: nn.Module, optimizer: torch.optim.Optimizer, stream: Stream, settings: Settings) -> None:
    """Write what training goes on from, whole or not at all: who is killed meanwhile leaves the one before."""
    if settings.checkpoint:
        place = Path(settings.checkpoint) / "latest.pt"
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "stream": stream.state_dict(),
        }
        torch.save(state, part)
        os.replace(part, place)


def resumed(model: nn.Module, optimizer: torch.optim.Optimizer, stream: Stream, settings: Settings) -> int:
    """Load the checkpoint, where there is one; return the number of the batch that comes next."""
    place = Path(settings.checkpoint) / "latest.pt"
    if not settings.checkpoint or not place.exists():
        return 0
    state = torch.load(place, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    stream.load_state_dict(state["stream"])  # the same for all ranks, and for another number of them
    return int(state["stream"]["epoch"] * stream.order.batches + state["stream"]["batch"])


def note(rank: int, step: int, loss: float, chips: Sequence[str], settings: Settings) -> None:
    """Append a line about a batch; a batch that is repeated after a restart has a second line."""
    if settings.notes:
        Path(settings.notes).mkdir(parents=True, exist_ok=True)
        line = {"step": step, "loss": loss, "process": os.getpid(), "chips": list(chips)}
        with open(Path(settings.notes) / f"rank-{rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def network(bands: int, vectors: int) -> nn.Module:
    """Return a small network: (chip, band, y, x) -> (chip, vector, y, x)."""
    return nn.Sequential(nn.Conv2d(bands, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, vectors, 1))


def distance(
    model: nn.Module, batch: dict[str, Any], settings: Settings, device: torch.device
) -> torch.Tensor:
    """Return 1 - cosine similarity of told and true embeddings, over the pixels where both sources are valid."""
    names = (settings.source, f"{settings.source}/valid", settings.target, f"{settings.target}/valid")
    optical, clear, vectors, there = (batch[name].to(device) for name in names)
    pixels = optical.float().nan_to_num().mean(1)  # (chip, time, band, y, x): the mean over time
    wanted = vectors.float().nan_to_num()[:, 0]
    both = clear.any(1) & there[:, 0]
    away = 1 - nn.functional.cosine_similarity(model(pixels), wanted, dim=1)
    loss: torch.Tensor = (away * both).sum() / both.sum().clamp(min=1)
    return loss


def under_torchrun(scheduler: str | None, settings: Settings) -> dict[str, Any]:
    """Train the rank that this process is, as torchrun's environment says."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, ranks = meeting_point()
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=ranks,
        timeout=timedelta(seconds=settings.timeout_s),
    )  # fmt: skip
    try:
        return train(rank, ranks, scheduler, settings)
    finally:
        dist.destroy_process_group()


def meeting_point() -> tuple[dist.Store, int, int]:
    """Return where torchrun's ranks find each other, which of them this is, and how many there are.

    Torchrun's store stays when it starts all ranks again. By the same keys they would find the addresses of those that
    are gone, and wait for them until ``timeout_s`` is over. So each start has its own keys. Several nodes do not count
    starts alike; with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, torchrun has a new store for each start.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, ranks


def on_worker(rank: int, scheduler: str, meeting: str, settings: Settings) -> dict[str, Any]:
    """Train one rank, on the Dask worker where this runs."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=settings.ranks,
        timeout=timedelta(seconds=settings.timeout_s),
    )  # fmt: skip
    try:
        return train(rank, settings.ranks, scheduler, settings)
    finally:
        dist.destroy_process_group()


def on_workers(client: Client, settings: Settings) -> list[dict[str, Any]]:
    """Run all ranks on workers that hold ``train``; return their reports, by rank."""
    known = client.scheduler_info(n_workers=-1)
    trainers = sorted(address for address, w in known["workers"].items() if w["resources"].get("train"))
    if len(trainers) < settings.ranks:
        raise SystemExit(
            f"{settings.ranks} ranks, but {len(trainers)} workers hold the resource 'train': start more with "
            "dask worker ADDRESS --nthreads 1 --resources train=1"
        )
    port = client.submit(free_port, workers=trainers[:1], resources={"train": 1}, pure=False).result()
    meeting = f"tcp://{urlsplit(trainers[0]).hostname}:{port}"
    ranks = [
        client.submit(
            on_worker, rank, known["address"], meeting, settings,
            workers=[trainers[rank]], resources={"train": 1}, pure=False, retries=0,
        )
        for rank in range(settings.ranks)
    ]  # fmt: skip
    reports: list[dict[str, Any]] = client.gather(ranks)
    return reports


def free_port() -> int:
    """Return a port that nobody listens on, on the worker where this runs."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def local_cluster(ranks: int) -> SpecCluster:
    """Return a cluster on this machine: a worker that reads, and one that trains for each rank."""
    read = {"cls": Nanny, "options": {"nthreads": 2}}
    trains = {"cls": Nanny, "options": {"nthreads": 1, "resources": {"train": 1}}}
    workers = {"reads": read, **{f"trains-{rank}": trains for rank in range(ranks)}}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0", "host": "127.0.0.1"}}
    return SpecCluster(workers=workers, scheduler=scheduler)


def reports_of(scheduler: str | None, settings: Settings) -> list[dict[str, Any]]:
    """Train, and return the reports of the ranks that are this call's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [under_torchrun(scheduler, settings)]
    if scheduler is None:
        with local_cluster(settings.ranks) as cluster, Client(cluster) as client:
            client.wait_for_workers(settings.ranks + 1)
            return on_workers(client, settings)
    with Client(scheduler) as client:
        return on_workers(client, settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and print a line of JSON for each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="what save_plan or to_zarr wrote")
    parser.add_argument(
        "--scheduler",
        help="a Dask scheduler's address; without it, ranks read for themselves under torchrun, and else a cluster of "
        "this machine is started",
    )
    for name, value in asdict(Settings("")).items():
        if name != "plan":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if "://" not in settings.plan:
        settings = Settings(**{**asdict(settings), "plan": os.path.abspath(settings.plan)})
    for report in reports_of(options.scheduler, settings):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
