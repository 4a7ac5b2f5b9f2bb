"""Stores with small shards, so that a few chips make several."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xarray as xr

import rasteret_dask as rd
from rasteret_dask.net.sums import Sums, closed, root_checksum
from rasteret_dask.store.encode import Compression
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.ledger import OBJECTS
from rasteret_dask.store.run import delayed_zarr
from rasteret_dask.tasks.context import ReadContext
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
    delayed_zarr(layout, str(store), ReadContext(chips.query.functions)).compute(scheduler="threads")
    return str(store)


def contents(store: Path) -> dict[str, bytes]:
    """Return path -> bytes of all that two runs of a job have in common: not who tried what, and how often."""
    found = {p.relative_to(store).as_posix(): p for p in store.rglob("*") if p.is_file()}
    own = ("_job/tried/", "_job/done/", "_job/pages/", "manifest.parquet")
    return {path: file.read_bytes() for path, file in sorted(found.items()) if not path.startswith(own)}


def rewrite_root(store: Path, change: Callable[[Any], None]) -> None:
    """Change the root's document as somebody would who knows its checksum."""
    document = json.loads((store / "zarr.json").read_bytes())
    change(document)
    document["attributes"]["rasteret_dask"]["checksum"] = root_checksum(document)
    (store / "zarr.json").write_text(json.dumps(document))


def vouch(store: Path, *paths: str) -> None:
    """Have the manifest vouch for some objects as they are now."""
    manifest = pq.read_table(store / "manifest.parquet")
    metadata = manifest.schema.metadata
    sums = json.loads(metadata[OBJECTS]) | {path: Sums.of((store / path).read_bytes()).text for path in paths}
    sink = io.BytesIO()
    pq.write_table(manifest.replace_schema_metadata(metadata | {OBJECTS: json.dumps(sums).encode()}), sink)
    (store / "manifest.parquet").write_bytes(closed(sink.getvalue()))


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
