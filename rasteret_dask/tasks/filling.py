"""A shard's chips while their pixels come: what is wanted, what has been seen, and the places that are filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import Member
from rasteret_dask.reader import harmonize
from rasteret_dask.reader.engine import Counts
from rasteret_dask.reader.readplan import Request
from rasteret_dask.table.records import Asset

__all__ = ["ChipPixels", "Into", "Place", "Seen", "Slot", "Wanted", "clear", "copied", "masked", "put"]

Into: TypeAlias = tuple[NDArray[Any], NDArray[np.bool_] | None]
"""Memory for a shard's pixels (chip, time, band, y, x), and for their validity (chip, time, y, x)."""


@dataclass
class ChipPixels:
    """What a source's shard is made of while slots are read."""

    values: NDArray[Any]
    """Shape (chip, time, band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (chip, time, y, x). True where every band has a value."""
    datetime: NDArray[np.datetime64]
    """Shape (chip, time). Start of the picked acquisition; NaT where empty or composed of several."""
    member: NDArray[Any]
    """Shape (chip, time). Name of the picked member, "" where empty; several are joined by +."""
    clipped: NDArray[np.int64]
    """Shape (band,). Pixels outside the range of an integer dtype."""
    counts: Counts = field(default_factory=Counts)
    unreadable: list[str] = field(default_factory=list)
    """One line a tile that could not be read and is masked instead."""


@dataclass(frozen=True)
class Wanted:
    """One request, and what its windows stand for."""

    request: Request
    member: Member
    bands: list[int]
    """Output bands it becomes; none for a quality band."""
    entries: list[int]
    """Per window, the feed entry."""

    @property
    def asset(self) -> Asset:
        """The band that is read."""
        return self.request.asset


@dataclass(frozen=True)
class Seen:
    """One band of one record over one chip, as it stands in the file."""

    wanted: Wanted
    values: NDArray[Any]
    """Shape (y, x)."""
    valid: NDArray[np.bool_]
    """Shape (y, x)."""
    lost: bool = False
    """Whether a part of it could not be read."""


@dataclass
class Place:
    """One chip in one slot."""

    values: NDArray[Any]
    """Shape (band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (band, y, x); where ``common``, (y, x): valid in all bands, True at first."""
    common: bool
    bands: set[int] = field(default_factory=set)
    """Those that have their pixels."""

    def written(self, bands: Sequence[int]) -> None:
        """Note that the first of some bands has its pixels; the others are the same."""
        for band in bands[1:]:
            self.values[band] = self.values[bands[0]]
            if not self.common:
                self.valid[band] = self.valid[bands[0]]
        self.bands.update(bands)

    def put(self, band: int, values: NDArray[Any], valid: NDArray[np.bool_], fill: float) -> None:
        """Write a band that was read apart."""
        self.values[band] = np.where(valid, values, self.values.dtype.type(fill))
        if self.common:
            self.valid &= valid
        else:
            self.valid[band] = valid
        self.bands.add(band)

    def complete(self, fill: float) -> None:
        """Make the bands invalid that the record does not have."""
        for band in set(range(len(self.values))) - self.bands:
            self.values[band] = fill
            if self.common:
                self.valid[...] = False


@dataclass(frozen=True)
class Slot:
    """The chips of one slot while acquisitions are read into it."""

    values: NDArray[Any]
    """Shape (chip, band, y, x). Holds ``fill`` where not valid."""
    valid: NDArray[np.bool_]
    """Shape (chip, band, y, x)."""
    fill: float
    dn: bool
    """Whether reflectance is stored as integers."""


def copied(window: Seen) -> Seen:
    """Return a window that does not hold its whole block in memory."""
    return Seen(window.wanted, window.values.copy(), window.valid.copy(), window.lost)


def masked(window: Seen, mask: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return where a quality band masks its record; everywhere where a part of it could not be read."""
    if window.lost:
        return np.ones_like(window.valid)
    return window.valid & ~clear(window, mask)


def clear(window: Seen, mask: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return where a record is valid and not masked, as far as one of its bands tells; shape (y, x)."""
    member = window.wanted.member
    if not mask or window.wanted.asset.band != member.quality or member.quality_kind is None:
        return window.valid
    return window.valid & ~harmonize.bad_pixels(window.values, member.quality_kind, mask)


def put(values: NDArray[Any], valid: NDArray[np.bool_], chip: int, target: Slot) -> NDArray[np.int64]:
    """Store what is valid in a chip's pixels that are not; return how many of each band were clipped."""
    take = valid & ~target.valid[chip]
    clipped = np.zeros(len(values), dtype=np.int64)
    if target.dn:
        values = np.where(take, values, np.nan)
        values, clipped = harmonize.to_dtype(values, target.values.dtype.name, target.fill)
    elif target.values.dtype.kind in "iu" and values.dtype.kind == "f":
        values = np.rint(np.where(take, values, 0))
    np.copyto(target.values[chip], values, where=take, casting="unsafe")
    np.logical_or(target.valid[chip], take, out=target.valid[chip])
    return clipped
