# SPDX-License-Identifier: Apache-2.0
"""Datasets of chips as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs

with needs("torch", "ChipDataModule"):
    from torch.utils.data import DataLoader, IterableDataset
with needs("lightning", "ChipDataModule"):
    from lightning.pytorch import LightningDataModule

__all__ = ["ChipDataModule"]


class ChipDataModule(LightningDataModule):
    """Streams of chips for a Lightning Trainer: one dataset for each of its stages.

    Ranks divide the datasets of streams that are not divided. Each epoch of the Trainer is the next epoch of the
    stream. A checkpoint holds where the train dataset stands, so that ``fit(ckpt_path=...)`` goes on at the next batch,
    on other ranks too; with workers it goes on at the next epoch.

    Parameters
    ----------
    train, val, test, predict
        A ``ChipDataset`` each; None: the Trainer does without this stage.
    num_workers
        Processes of each DataLoader. A stream reads on threads of its own, so 0 is seldom slower.
    pin_memory
        As a DataLoader has it.

    Raises
    ------
    PlanError
        When one of them is no dataset of whole batches.

    Examples
    --------
    >>> from rasteret_dask.torchdata import ChipDataModule, ChipDataset
    >>> train, val = (chips.select(name).stream(batch_size=16, shuffle=7) for name in ("train", "val"))
    >>> data = ChipDataModule(ChipDataset(train, image="s2"), ChipDataset(val, image="s2"))
    >>> next(iter(data.train_dataloader()))["image"].shape
    torch.Size([16, 3, 2, 32, 32])
    """

    def __init__(
        self,
        train: IterableDataset[Any] | None = None,
        val: IterableDataset[Any] | None = None,
        test: IterableDataset[Any] | None = None,
        predict: IterableDataset[Any] | None = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.datasets = {"train": train, "val": val, "test": test, "predict": predict}
        for stage, dataset in self.datasets.items():
            if dataset is not None and not isinstance(dataset, IterableDataset):
                raise PlanError(
                    f"ChipDataModule({stage}=)", f"a {type(dataset).__name__}", "a ChipDataset",
                    "Give it ChipDataset(chips.stream(batch_size=...)).",
                )  # fmt: skip
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def train_dataloader(self) -> Any:
        """Return whole batches of the train dataset."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Return whole batches of the val dataset."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """Return whole batches of the test dataset."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Return whole batches of the predict dataset."""
        return self._loader("predict")

    def _loader(self, stage: str) -> Any:
        dataset = self.datasets[stage]
        if dataset is None:
            return []
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def state_dict(self) -> dict[str, Any]:
        """Return where the train dataset stands, for the Trainer's checkpoints."""
        train: Any = self.datasets["train"]
        return {} if train is None else {"train": train.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the train dataset go on where a checkpoint says."""
        train: Any = self.datasets["train"]
        if train is not None and "train" in state_dict:
            train.load_state_dict(state_dict["train"])
