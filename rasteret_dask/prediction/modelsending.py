# SPDX-License-Identifier: Apache-2.0
"""A model for the tasks of a graph: in the graph where it is small, else on the workers before that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask._task_spec import DataNode, TaskRef

from rasteret_dask.prediction.models import ModelParcel

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["root_of"]

SMALL = 2**20
"""Bytes of a model that may be part of a graph; Dask warns of graphs of ten times as many."""


@contextmanager
def root_of(parcel: ModelParcel, cluster: Client | None) -> Iterator[tuple[dict[Any, Any], TaskRef]]:
    """Give what a graph needs for a model, and what its tasks name it by, for the length of a block.

    Parameters
    ----------
    parcel
        The model.
    cluster
        Where the graph is computed; None: in this process.
    """
    key = f"model-{parcel.digest[:16]}"
    if cluster is None or len(parcel.content or b"") <= SMALL:
        yield {key: DataNode(key, parcel)}, TaskRef(key)
        return
    sent = cluster.scatter(parcel, broadcast=True, hash=False)
    yield {}, TaskRef(sent.key)
