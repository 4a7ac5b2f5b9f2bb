# SPDX-License-Identifier: Apache-2.0
"""Stored numbers with their validity, in stacks of one stored type each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rasteret_dask.cubes.cube import CubePlace, Form, Read, Stack, stack
from rasteret_dask.reader.cogreader import ValidityReader
from rasteret_dask.table.records import Records

__all__ = ["BandPixels", "Prefixes", "StoredPixels", "stored_pixels"]

Prefixes: TypeAlias = dict[tuple[Any, ...], int]
"""First part of the keys of some chunks, before their block (y, x) -> number among the arrays of a task."""


@dataclass(frozen=True, slots=True)
class BandPixels:
    """Where the pixels of one read lie among the arrays that a task gets."""

    dtype: str
    """NumPy name of what is stored."""
    array: int
    read: int
    """Number in the array."""
    validity: int | None = None
    """Array of their validity; None: the numbers themselves tell."""

    def of(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return stored numbers and their validity, shapes (y, x), of arrays of shape (1, read, y, x)."""
        held, dtype = arrays[self.array][0, self.read], np.dtype(self.dtype)
        if self.validity is not None:
            return held, arrays[self.validity][0, self.read] != 0
        if dtype.kind in "fc":
            return held, ~np.isnan(held)
        return held.astype(dtype), held != _form(dtype).fill


@dataclass(frozen=True)
class StoredPixels:
    """Reads of several stored types."""

    stacks: Mapping[str, tuple[Stack, Stack | None]]
    """Stored type -> numbers, and their validity where no number is left to tell it."""
    places: Mapping[tuple[int, Read], tuple[str, str]]
    """(record row, read) -> stored type and name in its stack."""

    def arrays(self) -> Iterator[da.Array]:
        """Yield all stacks."""
        for numbers, validity in self.stacks.values():
            yield from (one.pixels for one in (numbers, validity) if one is not None)

    def among(self, row: int, read: Read, prefixes: Prefixes) -> BandPixels | None:
        """Return where a read's pixels are among the arrays of a task, which are added to; None: nowhere."""
        dtype, name = self.places[row, read]
        numbers, validity = self.stacks[dtype]
        place = numbers.chunk(row, name)
        if place is None:
            return None
        array = prefixes.setdefault(place[0], len(prefixes))
        told_by = None if validity is None else validity.chunk(row, name)
        at = None if told_by is None else prefixes.setdefault(told_by[0], len(prefixes))
        return BandPixels(dtype, array, place[1], at)


def stored_pixels(
    records: Records, reads: Mapping[int, Sequence[Read]], place: CubePlace, together: bool
) -> StoredPixels:
    """Return the lazy pixels of some reads: one stack a stored type.

    Parameters
    ----------
    records
        All records.
    reads
        Record row -> what is read of it.
    place
        Where.
    together
        Whether the reads of one record and type make one chunk.
    """
    by_dtype: dict[str, dict[int, dict[str, Read]]] = {}
    places = {}
    for row, wanted in reads.items():
        for read in dict.fromkeys(wanted):
            dtype = read.dtype(records.asset(row, read.band)).name
            of_row = by_dtype.setdefault(dtype, {}).setdefault(row, {})
            name = str(len(of_row))
            of_row[name] = read
            places[row, read] = dtype, name
    stacks = {}
    for dtype, of_dtype in by_dtype.items():
        form, per_chunk = _form(np.dtype(dtype)), -1 if together else 1
        numbers = stack(records, of_dtype, place, form, per_chunk)
        is_full = form.dtype == np.dtype(dtype) and form.dtype.kind in "iu"
        validity = stack(records, of_dtype, place, _VALIDITY, per_chunk) if is_full else None
        stacks[dtype] = numbers, validity
    return StoredPixels(stacks, places)


_VALIDITY = Form(np.dtype(np.uint8), 0, ValidityReader)


def _form(dtype: np.dtype[Any]) -> Form:
    """Return how stored numbers are held: NaN says what is invalid, or a number of the next wider type.

    Integers of 64 bits have none: they are read twice, for their numbers and for their validity.
    """
    if dtype.kind in "fc":
        return Form(dtype, np.nan)
    if dtype.itemsize == 8:
        return Form(dtype, 0)
    wider = np.dtype(f"i{2 * dtype.itemsize}")
    return Form(wider, np.iinfo(wider).min)
