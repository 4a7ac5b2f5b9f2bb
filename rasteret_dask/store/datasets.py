# SPDX-License-Identifier: Apache-2.0
"""Chips of a finished store as xarray, lazy or in memory."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import FILLED, META, PRESENT
from rasteret_dask.store.encode import CHIPS_PER_SHARD
from rasteret_dask.store.stored import Stored, facts
from rasteret_dask.store.storemap import StoredGroup
from rasteret_dask.store.union import read_variables

__all__ = ["to_xarray"]

_PIXELS = ("pixels", "valid")
_PER_CHIP = (*_PIXELS, "valid_fraction", FILLED, PRESENT, "datetime", "member")

_OF_STORE = ("coordinates", "kinds", "rasteret_dask", CHIPS_PER_SHARD, META)
"""Attributes of a group that say how it is stored, not what its chips are."""


def to_xarray(chips: Stored, lazy: bool) -> xr.Dataset | xr.DataTree:
    """Return chips as they are stored: a Dataset, or a DataTree with a node a source.

    Parameters
    ----------
    chips
        The chips.
    lazy
        Whether to leave reading to Dask, a chunk a shard.
    """
    opened = chips.map
    names = {
        g.source: [*(n for n in dict.fromkeys((*_PER_CHIP, *g.meta)) if n in g.arrays), *g.masks]
        for g in opened.first
    }
    read = {} if lazy else read_variables(opened, chips.rows, names)
    nodes = {}
    for group in opened.first:
        own = {n: _lazy(chips, group, n) if lazy else read[group.source, n] for n in names[group.source]}
        nodes[group.source] = _dataset(chips, group, own)
    if len(nodes) == 1:
        return next(iter(nodes.values()))
    return xr.DataTree.from_dict({f"/{name}": node for name, node in nodes.items()})


def _dataset(chips: Stored, group: StoredGroup, arrays: dict[str, Any]) -> xr.Dataset:
    own = {name: (group.arrays[name].dims, values) for name, values in arrays.items()}
    data = {name: own[name] for name in (*_PIXELS, *group.masks) if name in own}
    coordinates: dict[str, Any] = {name: v for name, v in own.items() if name not in data}
    known = facts(chips.table)
    coordinates["bounds"] = (("chip", "corner"), known.pop("bbox"))
    coordinates |= {name.removeprefix("labels/"): ("chip", values) for name, values in known.items()}
    known_pixels = chips.map.pixels[group.source]
    coordinates["band"] = ("band", np.array(known_pixels.bands, dtype=object))
    coordinates["band_kind"] = (
        "band",
        np.array([b.kind or "unknown" for b in known_pixels.kinds], dtype=object),
    )
    if "units" in group.arrays:
        coordinates["units"] = ("band", np.array(chips.map.values(group.arrays["units"]), dtype=object))
    stamps = chips.map.times(group.source)
    if stamps is not None:
        coordinates["time"] = ("time", stamps.view("datetime64[us]").astype("datetime64[ns]"))
    attrs = {k: v for k, v in group.attrs.items() if k not in _OF_STORE}
    dataset = xr.Dataset(data, coordinates, attrs)
    for name in ("pixels", *group.masks, *group.meta):
        if name in own:
            dataset[name].attrs = dict(group.arrays[name].attrs)
    return dataset


def _lazy(chips: Stored, group: StoredGroup, variable: str) -> da.Array:
    array = group.arrays[variable]
    name = f"{variable}-{group.source}-{chips.digest[:12]}"
    numbers = [n for n, size in enumerate(chips.sizes) if size]
    zeros = (0,) * (len(array.shape) - 1)
    tasks: dict[Any, Task] = {
        (name, i, *zeros): Task((name, i, *zeros), _block, chips, number, group.source, variable)
        for i, number in enumerate(numbers)
    }
    chunks = (tuple(chips.sizes[n] for n in numbers), *((n,) for n in array.shape[1:]))
    dtype = "datetime64[us]" if variable == "datetime" else array.encoding.dtype or object
    return da.Array(HighLevelGraph.from_collections(name, tasks), name, chunks, dtype=dtype)


def _block(chips: Stored, number: int, source: str, variable: str) -> NDArray[Any]:
    rows = chips.rows[chips.offsets[number] : chips.offsets[number + 1]]
    return read_variables(chips.map, rows, {source: [variable]})[source, variable]
