# SPDX-License-Identifier: Apache-2.0
"""Which parts of the tiles that one session reads are kept, and for whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import count
from math import ceil, floor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.reader.layout import Layouts
from rasteret_dask.reader.levels import LevelFrame, flipped
from rasteret_dask.reader.pixelgrid import Rect, union
from rasteret_dask.reader.readplan import ReadPlan, Request
from rasteret_dask.reader.sharing import SHARED, Keep, Key
from rasteret_dask.reader.wants import Want, key_of

__all__ = ["Keeping", "Later", "needed_soon"]

TIE = 1e-4
"""Grounds that meet in less than this share of a pixel do not meet."""

_SESSIONS = count(1)


class Later(Protocol):
    """The ground that other tasks have still to read: parts of tiles that lie there are kept for them."""

    @property
    def number(self) -> int:
        """Number of the task that reads now: tasks of near numbers run one after another."""

    @property
    def finished(self) -> AbstractSet[int]:
        """Numbers of those that have read."""

    @property
    def kept_bytes(self) -> int:
        """Pixels that the process keeps at most for all of them."""

    def meeting(
        self, record: str, epsg: int, box: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return what they read of a record that meets a box: their numbers, and bounds of shape (number, 4)."""

    def finish(self) -> list[int]:
        """Note that this task has read; return the numbers for which nothing need be kept any more."""


class Keeping:
    """What one session has kept for itself and for later tasks.

    Parameters
    ----------
    later
        What other tasks of this process are going to read.
    """

    def __init__(self, later: Later | None) -> None:
        self._later = later
        self._number = -next(_SESSIONS)
        self._ground: dict[tuple[object, ...], Keep | None] = {}

    def keep(self, want: Want, soon: Rect | None) -> Keep | None:
        """Say which part of a tile is to be kept, and for whom.

        Parameters
        ----------
        want
            The tile.
        soon
            The part that this session needs again, rows in the file's order.
        """
        known = want.asset.size is not None or want.asset.etag is not None  # else it may change unseen
        found = self._needed_later(want, self._later) if self._later is not None and known else None
        if soon is None:
            return found
        if found is None:
            return Keep(soon, frozenset([self._number]))
        return Keep(union([found.rect, soon]), found.needs | {self._number}, found.done, found.now)

    @property
    def nbytes(self) -> int:
        """Pixels that the process is to keep, at most."""
        return 0 if self._later is None else self._later.kept_bytes

    def finish(self) -> None:
        """Note that the session has read; what was kept for it alone goes."""
        if self._later is not None:
            SHARED.finish(*self._later.finish())  # noted first: what lands meanwhile is not kept for it again
        SHARED.finish(self._number)

    def _needed_later(self, want: Want, later: Later) -> Keep | None:
        reading = want.readings[0][0]
        frame, record = reading.plan.frame, want.asset.record_id
        reach = 0 if not reading.bent else ceil(3 / min(*reading.plan.scale, 1.0)) + 2
        known = (record, frame, want.rect, reach)
        if known not in self._ground:
            self._ground[known] = None
            if frame.upright:
                self._ground[known] = _needed(later, record, frame, want.rect, reach)
        return self._ground[known]


def _needed(later: Later, record: str, frame: LevelFrame, tile: Rect, reach: int) -> Keep | None:
    """Return the part of a tile that later tasks need."""
    t, rect = frame.transform, flipped(tile, frame)
    west, east = t.c + t.a * (rect.col0 - reach), t.c + t.a * (rect.col1 + reach)
    north, south = t.f + t.e * (rect.row0 - reach), t.f + t.e * (rect.row1 + reach)
    numbers, boxes = later.meeting(record, frame.epsg, (west, south, east, north))
    if not len(numbers):
        return None
    cols = (boxes[:, [0, 2]] - t.c) / t.a
    rows = (boxes[:, [3, 1]] - t.f) / t.e
    part = Rect(
        floor(rows[:, 0].min() + TIE) - reach, ceil(rows[:, 1].max() - TIE) + reach,
        floor(cols[:, 0].min() + TIE) - reach, ceil(cols[:, 1].max() - TIE) + reach,
    )  # fmt: skip
    return Keep(flipped(part.cut(rect), frame), frozenset(numbers.tolist()), later.finished, later.number)


def needed_soon(
    requests: Iterable[tuple[Request, ReadPlan]], wants: Mapping[Key, Want], layouts: Layouts
) -> dict[Key, Rect]:
    """Return which part of the wanted tiles further requests need, rows in the file's order."""
    found: dict[Key, Rect] = {}
    for request, plan in requests:
        for tile, part in layouts.layout(request, plan).items():
            key = key_of(request.asset, plan.level, tile)
            if key in wants:
                found[key] = union([found[key], part.need]) if key in found else part.need
    return found
