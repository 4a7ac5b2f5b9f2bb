"""Stores with small shards, so that a few chips make several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xarray as xr

import rasteret_dask as rd
from rasteret_dask.store.encode import Compression
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.run import delayed_zarr
from rasteret_dask.tasks.freezing import freeze

SHARD_BYTES = 100_000


def small(chips: rd.Chips, nbytes: int = SHARD_BYTES, compression: Compression = "auto") -> Layout:
    """Return the layout of some chips in small shards."""
    job = freeze(chips._unselected.planned, nbytes).select({h.split for h in chips.job.hierarchies})
    return replace(chips._layout, job=job, compression=compression)


def written(
    chips: rd.Chips, store: Path, nbytes: int = SHARD_BYTES, compression: Compression = "auto"
) -> str:
    """Write chips in small shards by threads; return the store's path."""
    layout = small(chips, nbytes, compression)
    delayed_zarr(layout, str(store), chips._functions).compute(scheduler="threads")
    return str(store)


def nodes(found: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """Return the Datasets of what ``load`` gives, by source; "" where there is one."""
    if isinstance(found, xr.Dataset):
        return {"": found}
    return {name: node.to_dataset() for name, node in found.children.items()}


def assert_same(mine: xr.Dataset | xr.DataTree, theirs: xr.Dataset | xr.DataTree) -> None:
    """Compare every variable, dtype and attribute."""
    left, right = nodes(mine), nodes(theirs)
    assert list(left) == list(right)
    for name, dataset in left.items():
        xr.testing.assert_identical(dataset, right[name])
        assert {n: v.dtype for n, v in dataset.variables.items()} == {
            n: v.dtype for n, v in right[name].variables.items()
        }
