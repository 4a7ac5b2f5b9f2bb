# SPDX-License-Identifier: Apache-2.0
"""Chips in memory as plain arrays: what a shard, a part of it and a batch are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import META, PRESENT, is_label
from rasteret_dask.net.lending import Lender
from rasteret_dask.net.limits import on_cores
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.rules.kinds import Kind, kind_of

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Arrays", "Held", "InMemory", "SourcePixels", "Part", "arrays_of", "assembled", "take"]

Arrays: TypeAlias = dict[str, NDArray[Any]]
"""Chips along axis 0 of every array.

=====================  ==============================  ==========================================================
``<source>``           (chip, time, band, y, x)        pixels
``<source>/valid``     (chip, time, y, x) bool         where they are valid: integers as the source says, floats
                                                       where all bands are finite
``<source>/datetime``  (chip, time) datetime64[us]     when they were taken, UTC; NaT where empty or composed
``<source>/present``   (chip, time) bool               whether any record feeds that slot; of sources that may be
                                                       empty somewhere, as those that ``join(require=)`` leaves out
``<source>/<meta>``    (chip, time)                    what ``harmonize(meta=)`` names: numbers, NaN where there is
                                                       none; text as str, ""
``<source>/<mask>``    (chip, y, x)                    further variables, such as rasterized labels
``chip_id``            (chip,) str
``bbox``               (chip, 4) float64               xmin, ymin, xmax, ymax in ``epsg``
``epsg``               (chip,) int32
``split``              (chip,) str                     "" where there is none
``labels/<column>``    (chip,)                         the user's own columns: text as str, null ""; numbers and bool;
                                                       float64 with NaN where integers or booleans have a null in any
                                                       row of the chip table; dates and times as datetime64[us] UTC
``padded``             (chip,) bool                    batches of ``pad=True`` only: True where a chip is repeated
=====================  ==============================  ==========================================================
"""


@dataclass(frozen=True, slots=True)
class MaskPixels:
    """What the pixels of burned labels are."""

    name: str
    """``<source>/<name>`` is what they are called in batches: ``mask``, or of several columns ``mask_<column>``."""
    dtype: str
    """NumPy's name."""
    classes: tuple[str, ...] = ()
    """Names of the values, from 0 on; () where these are numbers."""


@dataclass(frozen=True, slots=True)
class SourcePixels:
    """What the pixels of a source are."""

    bands: tuple[str, ...]
    """Names, in order."""
    dtype: str
    """NumPy's name."""
    units: str = ""
    """What they are measured in; "" where nobody knows, as after a user's function."""
    masks: tuple[MaskPixels, ...] = ()
    """The labels that are burned on them."""
    kinds: tuple[BandKind, ...] = ()
    """What the numbers of each band are; () where nobody knows."""
    shape: tuple[int, ...] = ()
    """Of a chip: (time, band, y, x); () where nobody knows."""

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Mask -> the names of its values, of masks whose values have names."""
        return {mask.name: mask.classes for mask in self.masks if mask.classes}

    def rules(self) -> tuple[Kind, ...]:
        """Return the kind of each band, as a value that says what it decides."""
        names = (band.kind for band in self.kinds) if self.kinds else (None for _ in self.bands)
        return tuple(kind_of(name) for name in names)


class Held(Protocol):
    """Chips of a shard that were read, as they are held until their batches are made."""

    def empty(self, size: int, memory: Lender) -> Arrays:
        """Return memory for a batch of so many such chips."""

    def put(
        self, rows: NDArray[np.int64] | None, out: Arrays, places: NDArray[np.int64]
    ) -> Sequence[Callable[[], None]]:
        """Put some chips (rows; None: all) at their places in a batch; return what is left to do, on any threads."""


Part: TypeAlias = tuple[Held, NDArray[np.int64] | None]
"""Some chips of those held: their rows, or None for all."""

SMALL = 4096
"""Bytes of a chip's values below which they are copied many at a time."""


def arrays_of(sources: Mapping[str, xr.Dataset], rows: NDArray[np.int64] | None = None) -> Arrays:
    """Return chips of a shard's Datasets as arrays; those that follow each other are views.

    Parameters
    ----------
    sources
        Source -> its Dataset in memory, as :func:`rasteret_dask.tasks.pixels.merged` makes them.
    rows
        Shape (n,). Which chips, in which order; None: all.
    """
    result: Arrays = {}
    for name, dataset in sources.items():
        pixels = _rows(dataset["pixels"].values, rows)
        result[name] = pixels
        if "valid" in dataset.variables:
            result[f"{name}/valid"] = _rows(dataset["valid"].values, rows)
        elif pixels.dtype.kind == "f":
            result[f"{name}/valid"] = np.isfinite(pixels).all(axis=2)
        else:  # a user's function left other pixels than their validity was for
            result[f"{name}/valid"] = np.ones((*pixels.shape[:2], *pixels.shape[3:]), dtype=bool)
        if "datetime" in dataset.variables:
            when = _rows(dataset["datetime"].values, rows)
            result[f"{name}/datetime"] = when.astype("datetime64[us]", copy=False)
        if PRESENT in dataset.variables:
            result[f"{name}/{PRESENT}"] = _rows(dataset[PRESENT].values, rows)
        for told in dataset.attrs.get(META, ()):
            if told in dataset.variables:
                result[f"{name}/{told}"] = _rows(dataset[told].values, rows)
        for more in dataset.data_vars:
            if more not in ("pixels", "valid") and dataset[more].dims[:1] == ("chip",):
                result[f"{name}/{more}"] = _rows(dataset[more].values, rows)
    first = next(iter(sources.values()))
    result["chip_id"] = _rows(first["chip_id"].values, rows)
    result["bbox"] = _rows(first["bounds"].values, rows)
    result["epsg"] = _rows(first["epsg"].values, rows)
    result["split"] = _rows(first["split"].values, rows)
    for column, values in first.coords.items():
        if values.dims == ("chip",) and is_label(str(column)):
            result[f"labels/{column}"] = _rows(values.values, rows)
    return result


def take(arrays: Arrays, rows: NDArray[np.int64] | None) -> Arrays:
    """Return some chips, in the order of ``rows`` (None: all); those that follow each other are views."""
    return {name: _rows(values, rows) for name, values in arrays.items()}


def assembled(parts: Sequence[tuple[NDArray[np.int64], Part]], size: int, memory: Lender) -> Arrays:
    """Return the chips of parts, each at its places, in contiguous arrays of their own.

    Parameters
    ----------
    parts
        (places, part): together the places are 0 to ``size`` - 1.
    size
        Number of chips.
    memory
        Where large arrays lie.
    """
    result = parts[0][1][0].empty(size, memory)
    on_cores([work for places, (held, rows) in parts for work in held.put(rows, result, places)])
    return result


@dataclass(frozen=True, slots=True)
class InMemory:
    """Chips held as arrays; pixels are copied once."""

    arrays: Arrays

    def empty(self, size: int, memory: Lender) -> Arrays:
        """Return memory for a batch of so many such chips."""
        return {name: memory.array((size, *v.shape[1:]), v.dtype) for name, v in self.arrays.items()}

    def put(
        self, rows: NDArray[np.int64] | None, out: Arrays, places: NDArray[np.int64]
    ) -> Sequence[Callable[[], None]]:
        """Copy some chips (rows; None: all) to their places in a batch."""
        for name, values in self.arrays.items():
            if rows is None:
                out[name][places] = values
            elif values[:1].nbytes < SMALL:
                out[name][places] = values[rows]
            else:  # one by one, as NumPy would first put them together elsewhere
                for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                    out[name][place] = values[row]
        return ()


def _rows(values: NDArray[Any], rows: NDArray[np.int64] | None) -> NDArray[Any]:
    """Return rows; those that follow each other without a copy, which costs as much as sending them."""
    if rows is None:
        return values
    if len(rows) and bool((np.diff(rows) == 1).all()):
        return values[rows[0] : rows[-1] + 1]
    return values[rows]
