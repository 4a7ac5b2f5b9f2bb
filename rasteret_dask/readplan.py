"""Which level, kernel and source pixels a window of a grid needs, from the cached header alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, hypot, inf, isfinite

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points

from rasteret_dask.errors import GridError, PlanError, ReadError
from rasteret_dask.records import Asset, Level

__all__ = ["Grid", "ReadPlan", "Rect", "Request", "Window", "is_aligned", "plan_read", "tiles_of"]

ALIGNED_PX = 1e-4
"""Pixel edges this close, at both ends of the raster, are the same edges."""

_UTM = frozenset({326, 327})
_FALSE_NORTHING = 10_000_000.0
_NEAREST_ROLES = frozenset({"quality", "class", "embedding"})
_KERNELS = frozenset(r.name for r in Resampling if r is not Resampling.gauss)
_RADIUS = {"nearest": 1, "bilinear": 1, "cubic": 2, "cubic_spline": 2, "lanczos": 3}
"""Source pixels a kernel reaches, GDAL's ``GWKGetFilterRadius``; the others use a pixel's own footprint."""

_OVERVIEW_SLACK = 1.01
"""GDAL's own slack (``vrtwarped.cpp``): 10980 / 1373 is 7.997, 5490 / 687 is 7.991."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A north-up pixel grid: its CRS, north-west corner and pixel size."""

    epsg: int
    x0: float
    """West edge of pixel column 0, in units of the CRS."""
    y0: float
    """North edge of pixel row 0, in units of the CRS."""
    xres: float
    """Width of a pixel, positive."""
    yres: float
    """Height of a pixel, positive."""

    def __post_init__(self) -> None:
        if not (self.xres > 0 and self.yres > 0 and isfinite(self.xres + self.yres + self.x0 + self.y0)):
            raise GridError(
                f"grid of EPSG:{self.epsg}",
                f"corner ({self.x0}, {self.y0}), pixel size ({self.xres}, {self.yres})",
                "finite numbers and a positive pixel size",
            )

    def transform(self, window: Window) -> Affine:
        """Return the affine transform (pixel -> CRS) of one window."""
        x, y = self.x0 + window.col * self.xres, self.y0 - window.row * self.yres
        return Affine(self.xres, 0.0, x, 0.0, -self.yres, y)


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of a grid's pixels; it may be negative or beyond any raster."""

    row: int
    """Counts southwards from the grid's corner."""
    col: int
    """Counts eastwards from the grid's corner."""
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise GridError("window", f"{self.height} x {self.width} pixels", "at least one pixel each way")


@dataclass(frozen=True, slots=True)
class Request:
    """Pixels wanted of one asset: windows of one shape on one grid."""

    asset: Asset
    grid: Grid
    windows: tuple[Window, ...]
    resampling: str | None = None
    """GDAL's name of a kernel. None: nearest for quality, class and embedding bands, else average where the
    grid is coarser than the image, else bilinear. Without effect where the grids are aligned."""
    decode: str | None = None
    """``"embedding"``: values are dequantized to float32 before any kernel, NaN where invalid. Overviews hold
    averages of quantized numbers, so the image itself is read."""

    def __post_init__(self) -> None:
        subject = f"request for asset {self.asset.band!r} of record {self.asset.record_id!r}"
        shapes = {(w.height, w.width) for w in self.windows}
        if len(shapes) != 1:
            raise GridError(
                subject, f"windows of shapes {sorted(shapes)}", "at least one window, of one shape"
            )
        if self.resampling is not None and self.resampling not in _KERNELS:
            raise PlanError(
                subject, f"resampling {self.resampling!r}", f"one of {', '.join(sorted(_KERNELS))}"
            )
        if self.decode not in (None, "embedding"):
            raise PlanError(subject, f"decode {self.decode!r}", "'embedding' or None")


@dataclass(frozen=True, slots=True)
class Rect:
    """Half-open rectangle of a level's pixels, rows counted from the north in unrotated files."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns); zero where the rectangle is empty."""
        return max(self.row1 - self.row0, 0), max(self.col1 - self.col0, 0)

    @property
    def empty(self) -> bool:
        """Whether no pixel is inside."""
        return 0 in self.shape

    def clip(self, height: int, width: int) -> Rect:
        """Return the part inside a raster of this size."""
        return self.cut(Rect(0, height, 0, width))

    def cut(self, other: Rect) -> Rect:
        """Return the part inside another rectangle."""
        return Rect(
            max(self.row0, other.row0),
            min(self.row1, other.row1),
            max(self.col0, other.col0),
            min(self.col1, other.col1),
        )

    def covers(self, other: Rect) -> bool:
        """Tell whether another rectangle lies inside."""
        return other.cut(self) == other


def flipped(rect: Rect, frame: Frame) -> Rect:
    """Turn a rectangle between rows from the north and rows in the file's order."""
    if not frame.flipped:
        return rect
    return Rect(frame.height - rect.row1, frame.height - rect.row0, rect.col0, rect.col1)


def union(rects: Iterable[Rect]) -> Rect:
    """Return the bounds of some rectangles."""
    found = list(rects)
    return Rect(
        min(r.row0 for r in found),
        max(r.row1 for r in found),
        min(r.col0 for r in found),
        max(r.col1 for r in found),
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """One level laid out northwards, in the grid's CRS where only a false northing lies between."""

    epsg: int
    transform: Affine
    """Pixel -> CRS; rows run southwards unless the file is rotated."""
    flipped: bool
    """Whether the file's first row is its southernmost."""
    height: int
    width: int

    @property
    def upright(self) -> bool:
        """Whether rows run due south and columns due east."""
        t = self.transform
        return bool(t.b == 0 and t.d == 0 and t.a > 0 and t.e < 0)


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How one request is read."""

    level: int
    """Index into ``asset.levels``."""
    frame: Frame
    kernel: str
    scale: tuple[float, float]
    """Grid pixels per pixel of the level, (x, y): GDAL's XSCALE and YSCALE."""
    corner: tuple[int, int] | None
    """Grid (row, col) of the level's north-west pixel where pixels are copied; None where they are warped."""
    rects: tuple[Rect, ...]
    """Per window, the level's pixels it needs, clipped to the raster."""


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


def is_aligned(asset: Asset, grid: Grid) -> bool:
    """Tell whether the image's own pixels are pixels of the grid: they are then copied, never resampled.

    True with the same CRS, or 326zz and 327zz of one zone (a translation by 10,000,000 m), the same pixel
    size and pixel edges that meet within 1e-4 pixel at both ends of the raster. South-up files can be aligned.

    Raises
    ------
    ReadError
        When the asset has no CRS or no usable transform.
    """
    return _corner(_frame(asset, 0, grid.epsg), grid) is not None


def plan_read(request: Request) -> ReadPlan:
    """Choose level and kernel, and find the source pixels of every window.

    Overviews are chosen as ``gdalwarp -ovr AUTO`` does: the coarsest whose reduction is at most the grid's
    (with GDAL's 1 %), unless the kernel is nearest. Nearest always takes the image itself: an overview's class
    is whatever its maker's kernel made of it. (A plain ``WarpedVRT`` never takes an overview; ours equals one
    over the file opened at the overview that was chosen.)
    """
    asset, grid = request.asset, request.grid
    image = _frame(asset, 0, grid.epsg)
    scale = _scale(image, grid)
    kernel = request.resampling or _default_kernel(asset, scale)
    level = 0
    if kernel != "nearest" and request.decode is None and _corner(image, grid) is None:
        level = _overview(asset.levels, 1.0 / max(scale))
    frame = image if level == 0 else _frame(asset, level, grid.epsg)
    scale = scale if level == 0 else _scale(frame, grid)
    corner = _corner(frame, grid)
    if corner is None:
        rects = _source_rects(frame, request, kernel, scale)
    else:
        row, col = corner
        rects = [
            Rect(w.row - row, w.row - row + w.height, w.col - col, w.col - col + w.width)
            for w in request.windows
        ]
    clipped = tuple(r.clip(frame.height, frame.width) for r in rects)
    return ReadPlan(level, frame, kernel, scale, corner, clipped)


def rect_tiles(level: Level, frame: Frame, rect: Rect) -> Iterable[int]:
    """Yield the numbers of the tiles that a rectangle touches, in file order."""
    if rect.empty:
        return
    row0, row1 = (
        (frame.height - rect.row1, frame.height - rect.row0) if frame.flipped else (rect.row0, rect.row1)
    )
    across = -(-level.width // level.tile_width)
    for i in range(row0 // level.tile_height, (row1 - 1) // level.tile_height + 1):
        for j in range(rect.col0 // level.tile_width, (rect.col1 - 1) // level.tile_width + 1):
            yield i * across + j


def tile_rect(level: Level, tile: int) -> Rect:
    """Return a tile's pixels in the file's own row order, cut at the raster's edge."""
    row, col = divmod(tile, -(-level.width // level.tile_width))
    row, col = row * level.tile_height, col * level.tile_width
    return Rect(row, row + level.tile_height, col, col + level.tile_width).clip(level.height, level.width)


def sparse_tiles(asset: Asset, level: int) -> set[int]:
    """Return the tiles that the header says are not in the file; none where a mask may call them valid."""
    if has_mask(asset):
        return set()
    offsets, counts = asset.levels[level].tile_offsets, asset.levels[level].tile_byte_counts
    return {i for i, (offset, count) in enumerate(zip(offsets, counts, strict=False)) if offset == count == 0}


def has_mask(asset: Asset) -> bool:
    """Tell whether the file carries a mask of its own."""
    return any(level.kind == "mask" for level in asset.levels)


def nodata_of(asset: Asset) -> float | None:
    """Return the asset's nodata, or None where its dtype cannot hold it (-9999 in a uint16)."""
    nodata, dtype = asset.nodata, np.dtype(asset.dtype)
    if nodata is None or dtype.kind not in "iu":
        beyond = (
            nodata is not None
            and dtype.kind == "f"
            and isfinite(nodata)
            and abs(nodata) > np.finfo(dtype).max
        )
        return None if beyond else nodata
    limits = np.iinfo(dtype)
    return nodata if nodata == nodata and limits.min <= nodata <= limits.max and nodata % 1 == 0 else None


def _default_kernel(asset: Asset, scale: tuple[float, float]) -> str:
    if asset.role in _NEAREST_ROLES:
        return "nearest"
    return "average" if min(scale) < 0.99 else "bilinear"


def _overview(levels: tuple[Level, ...], reduction: float) -> int:
    best, best_factor = 0, 1.0
    for i, level in enumerate(levels):
        factor = levels[0].width / level.width
        if level.kind == "overview" and best_factor < factor <= reduction * _OVERVIEW_SLACK:
            best, best_factor = i, factor
    return best


def _frame(asset: Asset, index: int, epsg: int) -> Frame:
    level = asset.levels[index]
    t = Affine(*level.transform)
    if asset.epsg <= 0 or t.determinant == 0:
        raise ReadError(
            f"asset {asset.band!r} of record {asset.record_id!r}",
            f"EPSG {asset.epsg} and transform {level.transform}",
            "a known CRS and a transform with an area",
            "Leave records without georeferencing out.",
        )
    shift = _northing(asset.epsg, epsg)
    if shift is not None:
        t = Affine(t.a, t.b, t.c, t.d, t.e, t.f + shift)
    flipped = bool(t.b == 0 and t.d == 0 and t.e > 0)
    if flipped:
        t = Affine(t.a, 0.0, t.c, 0.0, -t.e, t.f + t.e * level.height)
    return Frame(asset.epsg if shift is None else epsg, t, flipped, level.height, level.width)


def _northing(source: int, target: int) -> float | None:
    """Return what to add to y to come from one CRS to the other, or None where that is no translation."""
    if source == target:
        return 0.0
    if {source // 100, target // 100} == _UTM and source % 100 == target % 100 in range(1, 61):
        return _FALSE_NORTHING if target // 100 == 327 else -_FALSE_NORTHING
    return None


def _corner(frame: Frame, grid: Grid) -> tuple[int, int] | None:
    if frame.epsg != grid.epsg or not frame.upright:
        return None
    t = frame.transform
    west, east = (t.c - grid.x0) / grid.xres, (t.c + t.a * frame.width - grid.x0) / grid.xres
    north, south = (grid.y0 - t.f) / grid.yres, (grid.y0 - t.f - t.e * frame.height) / grid.yres
    if any(abs(edge - round(edge)) > ALIGNED_PX for edge in (west, east, north, south)):
        return None
    if (round(south) - round(north), round(east) - round(west)) != (frame.height, frame.width):
        return None
    return round(north), round(west)


def _scale(frame: Frame, grid: Grid) -> tuple[float, float]:
    """Grid pixels per source pixel: a ratio of sizes within UTM, else as measured at the raster's centre."""
    t = frame.transform
    x, y = hypot(t.a, t.d), hypot(t.b, t.e)
    if frame.epsg != grid.epsg and not {frame.epsg // 100, grid.epsg // 100} <= _UTM:
        cols = frame.width / 2 + np.array([0.0, 1.0, 0.0])
        rows = frame.height / 2 + np.array([0.0, 0.0, 1.0])
        places = (t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f)
        xs, ys = _transformed(frame.epsg, grid.epsg, *places)
        x, y = hypot(xs[1] - xs[0], ys[1] - ys[0]), hypot(xs[2] - xs[0], ys[2] - ys[0])
        if not (0 < x < inf and 0 < y < inf):
            raise GridError(
                f"pixel size of a raster in EPSG:{frame.epsg} on a grid in EPSG:{grid.epsg}",
                f"({x}, {y}) at the raster's centre",
                "a place where both systems are defined",
            )
    return x / grid.xres, y / grid.yres


def _source_rects(frame: Frame, request: Request, kernel: str, scale: tuple[float, float]) -> list[Rect]:
    """Bounds of each window's pixels in the source, with the kernel's reach round them."""
    grid, windows = request.grid, request.windows
    steps = np.linspace(0.0, 1.0, 9)
    down, across = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
    rows = np.array([w.row + w.height * down for w in windows])
    cols = np.array([w.col + w.width * across for w in windows])
    xs, ys = grid.x0 + cols * grid.xres, grid.y0 - rows * grid.yres
    bent = frame.epsg != grid.epsg
    if bent:
        flat_x, flat_y = _transformed(grid.epsg, frame.epsg, xs.ravel(), ys.ravel())
        xs, ys = flat_x.reshape(xs.shape), flat_y.reshape(ys.shape)
    inverse = ~frame.transform
    source_cols = inverse.a * xs + inverse.b * ys + inverse.c
    source_rows = inverse.d * xs + inverse.e * ys + inverse.f
    reach = [ceil(_RADIUS.get(kernel, 1) / min(s, 1.0)) + 2 for s in scale]
    return [
        Rect(*_span(r, reach[1], bent), *_span(c, reach[0], bent))
        for r, c in zip(source_rows, source_cols, strict=True)
    ]


def _span(values: NDArray[np.float64], reach: int, bent: bool) -> tuple[int, int]:
    values = values[np.isfinite(values)]
    if not values.size:
        return 0, 0
    low, high = float(values.min()), float(values.max())
    slack = reach + (0.002 * (high - low) if bent else 0.0)  # what nine points a side miss
    return floor(low - slack), ceil(high + slack)


def _transformed(
    source: int, target: int, xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        x, y = transform_points(crs_of(source), crs_of(target), xs.tolist(), ys.tolist())
    except (RasterioError, CPLE_BaseError) as error:
        failure = GridError(
            f"places of EPSG:{source} in EPSG:{target}", str(error), "places where both systems are defined"
        )
    else:
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    raise failure  # outside of the except block: what rasterio chains to its errors does not unpickle


@lru_cache(maxsize=256)
def crs_of(epsg: int) -> CRS:
    """Return the CRS of an EPSG code, parsed once per process.

    Raises
    ------
    GridError
        When PROJ does not know the code.
    """
    try:
        return CRS.from_epsg(epsg)
    except CRSError as error:
        raise GridError(f"EPSG:{epsg}", str(error), "a code that PROJ knows") from error
