# SPDX-License-Identifier: Apache-2.0
"""Whole batches, which a DataLoader must not put together again."""

from __future__ import annotations

from typing import Any

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs

with needs("torch", "batches of a DataLoader"):
    # where default_collate's documentation says that further types are to be registered
    from torch.utils.data._utils.collate import default_collate_fn_map

__all__ = ["ChipBatch"]


class ChipBatch(dict[str, Any]):
    """A batch of chips as tensors: a dictionary that needs no ``collate_fn``."""


def _refuse(batch: list[ChipBatch], *, collate_fn_map: Any = None) -> Any:
    """Refuse what would give each tensor one axis more; DataLoader's default, ``batch_size=1``, asks for it."""
    raise PlanError(
        "DataLoader(ChipDataset(...))", f"a DataLoader that puts {len(batch)} whole batches into one",
        "batch_size=None", "Say DataLoader(dataset, batch_size=None): the stream's batch_size has made the batches.",
    )  # fmt: skip


default_collate_fn_map.update({ChipBatch: _refuse})
