# SPDX-License-Identifier: Apache-2.0
"""Which level, kernel and source pixels a window of a grid needs, from the cached header alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling

from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.extent import is_geographic
from rasteret_dask.reader.levels import LevelFrame, rect_tiles, sparse_tiles
from rasteret_dask.reader.pixelgrid import Grid, Rect, Window, transformed
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.rules.units import Unit
from rasteret_dask.table.records import Asset, Level

__all__ = ["LevelChoice", "ReadPlan", "Request", "choose", "plan_read", "tiles_of"]

_KERNELS = frozenset(r.name for r in Resampling if r is not Resampling.gauss)
OVERVIEW = "overview"
"""Nearest pixel of an overview: of classes, as whoever made the overview thinned them out."""
_RADIUS = {"nearest": 1, "bilinear": 1, "cubic": 2, "cubic_spline": 2, "lanczos": 3}
"""Source pixels a kernel reaches, GDAL's ``GWKGetFilterRadius``; the others use a pixel's own footprint."""

FAR_PX = 2.0**52
"""Farther from a raster than any pixel is: PROJ may say that a place of the globe's far side is."""

_OVERVIEW_SLACK = 1.01
"""GDAL's own slack (``vrtwarped.cpp``): 10980 / 1373 is 7.997, 5490 / 687 is 7.991."""


@dataclass(frozen=True, slots=True)
class Request:
    """Pixels wanted of one asset: windows of one shape on one grid."""

    asset: Asset
    grid: Grid
    windows: tuple[Window, ...]
    resampling: str | None = None
    """GDAL's name of a kernel, taken where it makes sense for the asset's kind. None: the kind's own: nearest for
    classes, bit fields and embeddings, else average where the grid is coarser than the image, else bilinear. Without
    effect where the grids are aligned. ``"overview"``: the nearest pixel of the coarsest overview that is as fine as
    the grid, of classes too; of the image where there is none."""
    decode: Unit | None = None
    """Decodes stored numbers before any kernel, to float32, NaN where invalid. Overviews hold averages of stored
    numbers, so the image itself is read. None: the kernel sees stored numbers."""

    def __post_init__(self) -> None:
        subject = f"request for asset {self.asset.band!r} of record {self.asset.record_id!r}"
        shapes = {(w.height, w.width) for w in self.windows}
        if len(shapes) != 1:
            raise GridError(
                subject, f"windows of shapes {sorted(shapes)}", "at least one window, of one shape"
            )
        if self.resampling not in (None, OVERVIEW, *_KERNELS):
            raise PlanError(
                subject,
                f"resampling {self.resampling!r}",
                f"one of {', '.join(sorted([*_KERNELS, OVERVIEW]))}",
            )


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How one request is read."""

    level: int
    """Index into ``asset.levels``."""
    frame: LevelFrame
    kernel: str
    scale: tuple[float, float]
    """Grid pixels per pixel of the level, (x, y): GDAL's XSCALE and YSCALE."""
    corner: tuple[int, int] | None
    """Grid (row, col) of the level's north-west pixel where pixels are copied; None where they are warped."""
    rects: tuple[Rect, ...]
    """Per window, the level's pixels it needs, clipped to the raster."""
    beyond: tuple[int, ...] = ()
    """Windows that reach beyond the level, where pixels are copied."""


def tiles_of(request: Request) -> tuple[int, set[int]]:
    """Return the level and the numbers of its tiles that a request reads, from the cached header alone.

    Parameters
    ----------
    request
        What would be read.

    Returns
    -------
    tuple of int and set of int
        Index into ``asset.levels``, and tile numbers, row by row, as in ``tile_byte_counts`` of that level.
        Tiles the header knows to be sparse cost no request and are not among them.
    """
    plan = plan_read(request)
    level = request.asset.levels[plan.level]
    sparse = sparse_tiles(request.asset, plan.level)
    return plan.level, {t for r in plan.rects for t in rect_tiles(level, plan.frame, r)} - sparse


def plan_read(request: Request) -> ReadPlan:
    """Choose level and kernel, and find the source pixels of every window."""
    choice = choose(request.asset, request.grid, request.resampling, request.decode)
    windows = np.array([(w.row, w.col, w.height, w.width) for w in request.windows], dtype=np.int64)
    edges = choice.rects(request.grid, windows)
    if request.asset.placement is not None:  # which pixels of the file these are, GDAL works out
        edges[:] = 0
    beyond: tuple[int, ...] = ()
    if choice.corner is not None:
        cut = np.maximum(edges[:, [1, 3]] - edges[:, [0, 2]], 0) != windows[:, 2:]
        beyond = tuple(np.flatnonzero(cut.any(axis=1)).tolist())
    rects = tuple(Rect(*edge) for edge in edges.tolist())
    return ReadPlan(choice.level, choice.frame, choice.kernel, choice.scale, choice.corner, rects, beyond)


@dataclass(frozen=True, slots=True)
class LevelChoice:
    """Which level of an asset a grid is read from, and how: the same for all windows."""

    level: int
    """Index into ``asset.levels``."""
    frame: LevelFrame
    kernel: str
    scale: tuple[float, float]
    """As in :class:`ReadPlan`, and so is ``corner``."""
    corner: tuple[int, int] | None

    def rects(self, grid: Grid, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the level's pixels that windows need, clipped to the raster.

        Parameters
        ----------
        grid
            The grid that the level was chosen for.
        windows
            Shape (window, 4): row, col, height, width.

        Returns
        -------
        numpy.ndarray
            Shape (window, 4): row0, row1, col0, col1, as in :class:`Rect`.
        """
        if self.corner is None:
            spans = _source_spans(self, grid, windows)
        else:
            first = windows[:, :2] - np.array(self.corner)
            spans = np.stack([first, first + windows[:, 2:]], -1)
        low = np.maximum(spans[:, :, 0], 0)
        high = np.minimum(spans[:, :, 1], [self.frame.height, self.frame.width])
        return np.stack([low, high], -1).reshape(-1, 4)


def choose(asset: Asset, grid: Grid, resampling: str | None, decode: Unit | None) -> LevelChoice:
    """Choose level and kernel; parameters are those of :class:`Request`.

    Overviews are chosen as ``gdalwarp -ovr AUTO`` does: the coarsest whose reduction is at most the grid's
    (with GDAL's 1 %), unless the kernel is nearest or the band holds classes or bits, and nobody asked for
    ``"overview"``. These take the image itself,
    under ``mode`` too: an overview's class is whatever its maker's kernel made of it. So do bands with a valid range:
    whoever made their overviews took numbers beyond it for measurements. (A plain ``WarpedVRT`` never
    takes an overview; ours equals one over the file opened at the overview that was chosen.)
    """
    image = LevelFrame.of(asset, 0, grid.epsg)
    scale = image.scale(grid)
    kind = kind_of(asset.kind)
    thinned = resampling == OVERVIEW
    kernel = kind.kernel("nearest" if thinned else resampling, min(scale))
    if asset.placement is not None:  # no pixel of the file is one of the north-up raster
        return LevelChoice(0, image, kernel, scale, None)
    corner = image.corner(grid)
    as_stored = (kernel == "nearest" or not kind.averaged_overviews) and not thinned
    if as_stored or decode is not None or corner is not None or asset.valid_range is not None:
        return LevelChoice(0, image, kernel, scale, corner)
    level = _overview(asset.levels, 1.0 / max(scale))
    if level == 0:
        return LevelChoice(0, image, kernel, scale, corner)
    frame = LevelFrame.of(asset, level, grid.epsg)
    return LevelChoice(level, frame, kernel, frame.scale(grid), frame.corner(grid))


def _overview(levels: tuple[Level, ...], reduction: float) -> int:
    best, best_factor = 0, 1.0
    for i, level in enumerate(levels):
        factor = levels[0].width / level.width
        if level.kind == "overview" and best_factor < factor <= reduction * _OVERVIEW_SLACK:
            best, best_factor = i, factor
    return best


def _source_spans(choice: LevelChoice, grid: Grid, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each window's pixels in the source, with the kernel's reach round them, shape (window, 2, 2).

    Rows, then columns; from, to.
    """
    frame = choice.frame
    steps = np.linspace(0.0, 1.0, 9)
    down, across = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
    row, col, height, width = windows.T[:, :, None]
    xs, ys = grid.x0 + (col + width * across) * grid.xres, grid.y0 - (row + height * down) * grid.yres
    bent = frame.epsg != grid.epsg
    if bent:
        flat_x, flat_y = transformed(grid.epsg, frame.epsg, xs.ravel(), ys.ravel())
        xs, ys = flat_x.reshape(xs.shape), flat_y.reshape(ys.shape)
        if is_geographic(frame.epsg):  # the raster may count longitudes from 0 to 360
            middle = frame.transform.c + frame.transform.a * frame.width / 2
            xs = xs + 360.0 * np.round((middle - xs) / 360.0)
    inverse = ~frame.transform
    source_cols = inverse.a * xs + inverse.b * ys + inverse.c
    source_rows = inverse.d * xs + inverse.e * ys + inverse.f
    reach = [ceil(_RADIUS.get(choice.kernel, 1) / min(s, 1.0)) + 2 for s in choice.scale]
    return np.stack([_spans(source_rows, reach[1], bent), _spans(source_cols, reach[0], bent)], 1)


def _spans(values: NDArray[np.float64], reach: int, bent: bool) -> NDArray[np.int64]:
    """Return from where to where pixels reach, shape (window, 2), of their places, shape (window, place)."""
    there = np.isfinite(values)
    low = values.min(1, initial=np.inf, where=there)
    high = values.max(1, initial=-np.inf, where=there)
    nowhere = low > high
    low[nowhere] = high[nowhere] = 0.0
    slack = reach + (0.002 * (high - low) if bent else 0.0)  # what nine points a side miss
    spans = np.stack([np.floor(low - slack), np.ceil(high + slack)], -1)
    spans[nowhere] = 0.0
    return np.asarray(np.clip(spans, -FAR_PX, FAR_PX), dtype=np.int64)
