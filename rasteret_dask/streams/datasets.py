# SPDX-License-Identifier: Apache-2.0
"""Batches as xarray Datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from rasteret_dask.errors import PlanError
from rasteret_dask.tasks.batches import Arrays

__all__ = ["as_xarray"]


def as_xarray(batch: Arrays, bands: Mapping[str, Sequence[str]] | None = None) -> dict[str, xr.Dataset]:
    """Return a batch as Datasets, source -> Dataset, with the names that ``to_xarray`` has.

    Parameters
    ----------
    batch
        Chips as arrays.
    bands
        Source -> names of its bands, as :attr:`Stream.bands` says; None leaves ``band`` without a coordinate.

    Raises
    ------
    PlanError
        When it is no batch, or has another number of bands.

    Examples
    --------
    >>> stream = chips.stream(batch_size=8)
    >>> datasets = rd.as_xarray(next(stream), stream.bands)
    >>> datasets["s2"]["pixels"].dims
    ('chip', 'time', 'band', 'y', 'x')
    """
    if np.ndim(batch.get("chip_id", "")) != 1:
        raise PlanError(
            "as_xarray", "no batch", "arrays with a chip axis", "A batch of one chip: chips.take([id])."
        )
    result = {}
    for name, pixels in batch.items():
        if pixels.ndim != 5:
            continue
        variables: dict[str, Any] = {"pixels": (("chip", "time", "band", "y", "x"), pixels)}
        coordinates: dict[str, Any] = {
            "chip_id": ("chip", batch["chip_id"]),
            "split": ("chip", batch["split"]),
            "epsg": ("chip", batch["epsg"]),
            "bounds": (("chip", "corner"), batch["bbox"]),
        }
        for key, values in batch.items():
            group, _, variable = key.partition("/")
            if group == "labels":
                coordinates[variable] = ("chip", values)
            elif group == name and variable:
                dims = {2: ("chip", "time"), 3: ("chip", "y", "x"), 4: ("chip", "time", "y", "x")}[
                    values.ndim
                ]
                (coordinates if dims == ("chip", "time") else variables)[variable] = (dims, values)
        if "padded" in batch:
            coordinates["padded"] = ("chip", batch["padded"])
        if bands is not None and name in bands:
            if len(bands[name]) != pixels.shape[2]:
                raise PlanError(
                    f"as_xarray(bands=) of source {name!r}", f"{len(bands[name])} names", f"{pixels.shape[2]}"
                )
            coordinates["band"] = ("band", np.array(bands[name], dtype=object))
        result[name] = xr.Dataset(variables, coordinates)
    return result
