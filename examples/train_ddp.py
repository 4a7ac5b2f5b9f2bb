"""Train on several Dask workers with torch's DistributedDataParallel, from one stream of chips.

Some workers of a Dask cluster hold the resource ``train``: each runs one rank of the training. The others read
chips. Every rank takes its own part of the same shuffled stream, and all of them have the same number of batches.

The network learns to tell a source of embeddings from a source of reflectances::

    plan = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(128).split().select("train")
    plan.save_plan("train.plan")             # or plan.to_zarr("train.zarr"): a store streams as well

    python examples/train_ddp.py train.plan                                       # on this machine
    python examples/train_ddp.py s3://bucket/train.plan --scheduler tcp://...     # on a cluster of yours

On a cluster of yours, start readers with ``dask worker ADDRESS`` and trainers with
``dask worker ADDRESS --nthreads 1 --resources train=1``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from distributed import Client, Nanny, Scheduler, SpecCluster
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rasteret_dask.streamfrom import stream_from
from rasteret_dask.torchdata import ChipDataset


@dataclass(frozen=True)
class Settings:
    """What all ranks have in common."""

    plan: str
    """A saved plan or a store: a path or URL that all workers see."""
    ranks: int = 2
    epochs: int = 2
    batch_size: int = 16
    source: str = "optical"
    target: str = "embeddings"


def train(rank: int, scheduler: str, meeting: str, settings: Settings) -> dict[str, Any]:
    """Train one rank, on the Dask worker where this runs; return what it has seen and where its weights ended."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=settings.ranks)
    try:
        stream = stream_from(
            scheduler, settings.plan, settings.batch_size, shuffle=7, epochs=settings.epochs,
            rank=rank, world_size=settings.ranks,
        )  # fmt: skip
        bands, vectors = (len(stream.bands[name]) for name in (settings.source, settings.target))
        model = DistributedDataParallel(network(bands, vectors))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses, chips = [], []
        for batch in ChipDataset(stream):
            loss = distance(model, batch, settings)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # waits for all ranks: that is why each needs the same number of batches
            optimizer.step()
            losses.append(loss.item())
            chips += batch["chip_id"]
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        return {
            "rank": rank, "process": f"{socket.gethostname()}:{os.getpid()}", "batches": len(losses), "chips": chips,
            "first_loss": losses[0], "last_loss": losses[-1], "weights": hashlib.sha256(weights).hexdigest(),
        }  # fmt: skip
    finally:
        dist.destroy_process_group()


def network(bands: int, vectors: int) -> nn.Module:
    """Return a small network: (chip, band, y, x) -> (chip, vector, y, x)."""
    return nn.Sequential(nn.Conv2d(bands, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, vectors, 1))


def distance(model: nn.Module, batch: dict[str, Any], settings: Settings) -> torch.Tensor:
    """Return 1 - cosine similarity of told and true embeddings, over the pixels where both sources are valid."""
    pixels = (
        batch[settings.source].float().nan_to_num().mean(1)
    )  # (chip, time, band, y, x): the mean over time
    wanted = batch[settings.target].float().nan_to_num()[:, 0]
    both = batch[f"{settings.source}/valid"].any(1) & batch[f"{settings.target}/valid"][:, 0]
    away = 1 - nn.functional.cosine_similarity(model(pixels), wanted, dim=1)
    loss: torch.Tensor = (away * both).sum() / both.sum().clamp(min=1)
    return loss


def run(client: Client, settings: Settings) -> list[dict[str, Any]]:
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
            train, rank, known["address"], meeting, settings,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and print a line of JSON for each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="what save_plan or to_zarr wrote")
    parser.add_argument(
        "--scheduler", help="a Dask scheduler's address; without it, a cluster of this machine"
    )
    for name, value in asdict(Settings("")).items():
        if name != "plan":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    scheduler = given.pop("scheduler")
    if "://" not in given["plan"]:
        given["plan"] = os.path.abspath(given["plan"])
    settings = Settings(**given)
    if scheduler is None:
        with local_cluster(settings.ranks) as cluster, Client(cluster) as client:
            client.wait_for_workers(settings.ranks + 1)
            reports = run(client, settings)
    else:
        with Client(scheduler) as client:
            reports = run(client, settings)
    for report in reports:
        print(json.dumps({**report, "chips": len(report["chips"])}))


if __name__ == "__main__":
    main()
