"""Train with Lightning from a store of chips, and go on where a run stopped.

The network learns to tell a source of embeddings from a source of reflectances, as in ``train_ddp.py``. Chips come
from a store with the splits train and val::

    chips = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(128).split(.8, .2, 0)
    chips.to_zarr("chips.zarr")

    python examples/train_lightning.py chips.zarr --epochs 2 --folder run1
    python examples/train_lightning.py chips.zarr --epochs 4 --folder run1      # goes on, at the next batch

A checkpoint holds where the stream stands, not only how many epochs there were. It may be written in the middle of an
epoch, and be loaded by another number of processes: what is left of the epoch is then dealt to those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import rasteret_dask as rd
from rasteret_dask.torchdata import ChipDataModule, ChipDataset


class Embedder(LightningModule):
    """Tells embeddings from reflectances, pixel by pixel."""

    def __init__(self, bands: int, vectors: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(bands, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, vectors, 1))
        self.losses: dict[str, list[float]] = {"train": [], "val": []}
        self.chips: list[str] = []

    def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        """Return the loss of a train batch."""
        self.chips += batch["chip_id"]
        return self._loss(batch, "train")

    def validation_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        """Return the loss of a val batch."""
        return self._loss(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def _loss(self, batch: dict[str, Any], split: str) -> torch.Tensor:
        """Return 1 - cosine similarity over the pixels where both sources are valid."""
        clear = batch["optical/valid"].any(1) & batch["embeddings/valid"][:, 0]
        told = self.network(batch["optical"].float().nan_to_num().mean(1))
        away = 1 - nn.functional.cosine_similarity(
            told, batch["embeddings"].float().nan_to_num()[:, 0], dim=1
        )
        loss: torch.Tensor = (away * clear).sum() / clear.sum().clamp(min=1)
        self.log(f"{split}_loss", loss, batch_size=len(clear), prog_bar=True, sync_dist=split == "val")
        self.losses[split].append(loss.item())
        return loss


def flipped(sample: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """Mirror all sources of a sample alike, half of the time along each axis."""
    for axis in (-1, -2):
        if random.random() < 0.5:
            pixels = ("optical", "optical/valid", "embeddings", "embeddings/valid")
            sample |= {name: np.flip(sample[name], axis) for name in pixels}
    return sample


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", help="what to_zarr wrote")
    parser.add_argument(
        "--epochs", type=int, default=2, help="of the whole training, with those of earlier calls"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=-1, help="stop after so many batches; -1: at the last epoch's end"
    )
    parser.add_argument("--folder", type=Path, default=Path("lightning"), help="where checkpoints go")
    options = parser.parse_args(arguments)
    seed_everything(0)
    stored = rd.open_chips(options.store)
    train = stored.select("train").stream(options.batch_size, shuffle=7, augment=flipped)
    val = stored.select("val").stream(options.batch_size)
    model = Embedder(len(train.bands["optical"]), len(train.bands["embeddings"]))
    last = options.folder / "last.ckpt"
    trainer = Trainer(
        max_epochs=options.epochs, max_steps=options.steps, accelerator="auto", logger=False,
        enable_progress_bar=False, default_root_dir=options.folder, num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(options.folder, save_last=True, every_n_train_steps=1)],
    )  # fmt: skip
    data = ChipDataModule(ChipDataset(train), ChipDataset(val))
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)
    report = {
        "steps": trainer.global_step,
        "epoch": trainer.current_epoch,
        "chips": model.chips,
        **model.losses,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
