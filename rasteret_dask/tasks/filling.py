# SPDX-License-Identifier: Apache-2.0
"""A shard's chips while their pixels come: what is wanted, what has been seen, and the places that are filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import Member
from rasteret_dask.reader.engine import Counts
from rasteret_dask.reader.placing import Clipped
from rasteret_dask.reader.readplan import Request
from rasteret_dask.rules import composing
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.table.records import Asset

__all__ = [
    "ChipPixels",
    "Into",
    "ChipPlace",
    "Seen",
    "Wanted",
    "Windows",
    "clear",
    "copied",
    "hidden",
    "is_as_stored",
    "scored_by",
]

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
    row: NDArray[np.int64]
    """Shape (chip, time). The nearest record of the picked acquisition; -1 where empty or composed of several."""
    clipped: NDArray[np.int64]
    """Shape (band,). Pixels outside the range of an integer dtype."""
    filled: NDArray[np.float32] | None = None
    """Shape (chip, time). Share of the pixels, valid in all bands, that another acquisition than the picked one gave
    any band of; None: none may."""
    masked: NDArray[np.float32] | None = None
    """Shape (chip, time). Share of the pixels that are invalid and that a record's mask hides; None: nobody asks."""
    counts: Counts = field(default_factory=Counts)
    read_s: float = 0.0
    """Seconds of the calls that read; what the rest took is composing."""
    unreadable: list[str] = field(default_factory=list)
    """One line a tile that could not be read and is masked instead."""


@dataclass(frozen=True)
class Wanted:
    """One request, and what its windows stand for."""

    request: Request
    member: Member
    bands: list[int]
    """Output bands it becomes; none for a band that only masks."""
    entries: list[int]
    """Per window, the feed entry."""

    @property
    def asset(self) -> Asset:
        """The band that is read."""
        return self.request.asset


@dataclass(frozen=True)
class Seen:
    """One band of one record over one chip, as it stands in the file, or decoded before its kernel."""

    wanted: Wanted
    values: NDArray[Any]
    """Shape (y, x)."""
    valid: NDArray[np.bool_]
    """Shape (y, x)."""
    lost: bool = False
    """Whether a part of it could not be read."""


Windows: TypeAlias = "list[Seen]"
"""What has been read of one record over one chip."""


@dataclass
class ChipPlace:
    """One chip in one slot."""

    values: NDArray[Any]
    """Shape (band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (band, y, x); where ``common``, (y, x): valid in all bands, True at first."""
    common: bool
    bands: set[int] = field(default_factory=set)
    """Those that have their pixels."""
    clipped: list[tuple[int, Clipped]] = field(default_factory=list)
    """(band, what of it was clipped), before any mask."""

    def written(self, bands: Sequence[int]) -> None:
        """Note that the first of some bands has its pixels; the others are the same."""
        for band in bands[1:]:
            self.values[band] = self.values[bands[0]]
            if not self.common:
                self.valid[band] = self.valid[bands[0]]
        self.bands.update(bands)

    def put(self, band: int, values: NDArray[Any], valid: NDArray[np.bool_], fill: Any) -> None:
        """Write a band that was read apart."""
        self.values[band] = np.where(valid, values, fill)
        if self.common:
            self.valid &= valid
        else:
            self.valid[band] = valid
        self.bands.add(band)

    def complete(self, fill: Any) -> None:
        """Make the bands invalid that the record does not have."""
        for band in set(range(len(self.values))) - self.bands:
            self.values[band] = fill
            if self.common:
                self.valid[...] = False

    def finish(self, rules: PixelRules) -> None:
        """Finish the bands that only have a meaning together; the others came finished."""
        for unit, bands in rules.joint_groups:
            own = slice(None) if len(bands) == len(self.values) else list(bands)
            made = unit.finish(self.values[own])
            known = ~np.isnan(made).any(axis=0)
            self.values[own] = made
            if self.common:
                self.valid &= known
            else:
                self.valid[own] &= known

    def hide(self, where: NDArray[np.bool_], fill: Any) -> None:
        """Make pixels invalid; shape (y, x)."""
        self.valid &= ~where
        np.copyto(self.values, fill, where=where)

    def count_clipped(self, where: NDArray[np.bool_] | None, counts: NDArray[np.int64]) -> None:
        """Add what was clipped and is not hidden to the counts of each band."""
        for band, part in self.clipped:
            shown = part.pixels if where is None else part.pixels & ~where[part.rows, part.cols]
            counts[band] += np.count_nonzero(shown)


def copied(window: Seen) -> Seen:
    """Return a window that holds no part of a larger batch."""
    return replace(window, values=window.values.copy(), valid=window.valid.copy())


def hidden(member: Member, windows: Sequence[Seen]) -> NDArray[np.bool_] | None:
    """Return where a member's mask hides a record's pixels, shape (y, x); None: it has none, or no such bands here.

    Where a quality band could not be read everything is hidden: unknown is not clear.
    """
    quality = _quality(member, windows)
    if member.mask is None or quality is None:
        return None
    if any(window.lost for window in quality):
        return np.ones(quality[0].valid.shape, dtype=bool)
    return composing.hidden(member.mask, [w.values for w in quality], [w.valid for w in quality])


def clear(member: Member, windows: Sequence[Seen]) -> NDArray[np.bool_] | None:
    """Return where a record is valid and not hidden, as far as its quality bands tell; None: they are not here.

    A member without any is scored by its first band.
    """
    quality = _quality(member, windows)
    if quality is None:
        return None
    return composing.clear(member.mask, [w.values for w in quality], [w.valid for w in quality])


def scored_by(member: Member) -> tuple[str, ...]:
    """Return the bands by which a member's acquisitions are scored."""
    return member.quality or member.bands[:1]


def is_as_stored(request: Request) -> bool:
    """Tell whether a request gives stored numbers by their kind's own kernel, as masks want them."""
    return request.decode is None and request.resampling is None


def _quality(member: Member, windows: Sequence[Seen]) -> list[Seen] | None:
    by_band: Mapping[str, Seen] = {
        window.wanted.asset.band: window
        for window in windows
        if not member.quality or is_as_stored(window.wanted.request)
    }
    bands = scored_by(member)
    return [by_band[band] for band in bands] if all(band in by_band for band in bands) else None
