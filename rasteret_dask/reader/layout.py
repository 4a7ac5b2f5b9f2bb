# SPDX-License-Identifier: Apache-2.0
"""Where the windows of a read lie in the tiles of its level: worked out once for all bands of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from rasteret_dask.reader.levels import flipped, rect_tiles, tile_rect
from rasteret_dask.reader.pixelgrid import Rect, Window, union
from rasteret_dask.reader.readplan import ReadPlan, Request, plan_read
from rasteret_dask.table.records import Level

__all__ = ["Cut", "Layout", "Layouts", "TilePart", "layout"]


class Cut(NamedTuple):
    """What one window takes of a tile."""

    window: int
    """Number of the window."""
    tile: tuple[slice, slice]
    """Its pixels in ``TilePart.need``, rows in the file's order."""
    place: tuple[slice, slice]
    """The same pixels in the window, or in the block of source pixels that it is warped from, from the north."""


class TilePart(NamedTuple):
    """What some windows take of a tile."""

    rect: Rect
    """The tile's pixels in its level, rows in the file's order."""
    need: Rect
    """The part of them that the windows need."""
    cuts: tuple[Cut, ...]
    """One a window that touches the tile."""


_LIES = attrgetter("kind", "transform", "height", "width")

Layout: TypeAlias = Mapping[int, TilePart]
"""Number of a tile -> what windows take of it."""


def layout(plan: ReadPlan, windows: tuple[Window, ...], level: Level) -> Layout:
    """Cut the windows of a read into the tiles that they touch, in the order of the windows."""
    parts: dict[int, list[tuple[int, Rect]]] = {}
    rects = {}
    for number, rect in enumerate(plan.rects):
        for tile in rect_tiles(level, plan.frame, rect):
            if tile not in rects:
                rects[tile] = tile_rect(level, tile)
            parts.setdefault(tile, []).append((number, flipped(rect, plan.frame).cut(rects[tile])))
    made = {}
    for tile, pieces in parts.items():
        need = union(rect for _, rect in pieces)
        cuts = tuple(
            Cut(number, _within(rect, need.row0, need.col0), _place(plan, windows, number, rect))
            for number, rect in pieces
        )
        made[tile] = TilePart(rects[tile], need, cuts)
    return made


def _place(plan: ReadPlan, windows: tuple[Window, ...], number: int, rect: Rect) -> tuple[slice, slice]:
    row, col = plan.rects[number].row0, plan.rects[number].col0
    if plan.corner is not None:  # a window that reaches beyond the raster begins before its pixels do
        row, col = windows[number].row - plan.corner[0], windows[number].col - plan.corner[1]
    return _within(flipped(rect, plan.frame), row, col)


def _within(rect: Rect, row: int, col: int) -> tuple[slice, slice]:
    return slice(rect.row0 - row, rect.row1 - row), slice(rect.col0 - col, rect.col1 - col)


class Layouts:
    """Plans and layouts of one batch of requests: those of the same windows, grid and raster share them.

    Windows are the same where they are one tuple: bands of one record are asked for so.
    """

    def __init__(self) -> None:
        self._plans: dict[object, tuple[Request, ReadPlan]] = {}
        self._layouts: dict[object, tuple[ReadPlan, Layout]] = {}
        self._parts: dict[object, tuple[Request, ReadPlan, tuple[Window, ...], ReadPlan]] = {}

    def plan(self, request: Request) -> ReadPlan:
        """Return how a request is read."""
        asset = request.asset
        raster = (
            asset.epsg,
            asset.kind,
            asset.placement,
            asset.valid_range is None,
            *map(_LIES, asset.levels),
        )
        key = (raster, request.grid, id(request.windows), request.resampling, request.decode is None)
        made = self._plans.get(key)
        if made is None:
            # with the request, so that the id stays its own
            made = self._plans[key] = request, plan_read(request)
        return made[1]

    def part(self, request: Request, plan: ReadPlan, some: slice) -> tuple[Request, ReadPlan]:
        """Return some windows of a request that has a plan of this batch."""
        key = (id(request.windows), id(plan), some.start, some.stop)
        if key not in self._parts:
            rects = plan.rects[some]
            beyond = tuple(n - some.start for n in plan.beyond if 0 <= n - some.start < len(rects))
            part = replace(plan, rects=rects, beyond=beyond)
            self._parts[key] = request, plan, request.windows[some], part
        _, _, windows, part = self._parts[key]
        return replace(request, windows=windows), part

    def layout(self, request: Request, plan: ReadPlan) -> Layout:
        """Return where the windows of a request lie in the tiles of its level."""
        level = request.asset.levels[plan.level]
        key = (id(plan), level.tile_height, level.tile_width)
        made = self._layouts.get(key)
        if made is None:
            made = self._layouts[key] = plan, layout(plan, request.windows, level)
        return made[1]
