# SPDX-License-Identifier: Apache-2.0
"""GeoTIFFs of where predictions and labels differ, on the grid of the predictions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.crs import crs_of, text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.evaluation.passes import Beside, Patch
from rasteret_dask.evaluation.reading import PixelGrid
from rasteret_dask.grid import bounds_in

__all__ = ["write_errors"]

BLOCK = 512
"""Side of a tile of the file, pixels."""

RIGHT, WRONG = (0x2C, 0x8C, 0x74, 255), (0xC2, 0x28, 0x4B, 255)


def write_errors(beside: Beside, patches: Iterable[Patch], to: Path) -> tuple[Path, ...]:
    """Write the errors of every raster on which there are some.

    They are put together in files beside the target, so that memory does not grow with the map, and appear whole.

    Parameters
    ----------
    beside
        What is compared.
    patches
        See :func:`rasteret_dask.evaluation.passes.patches_of`.
    to
        A file where the map has one raster, else a folder.

    Raises
    ------
    PlanError
        When the map has several rasters, and ``to`` is a file's name.
    """
    rasters = beside.predictions.rasters
    is_file = to.suffix.lower() in (".tif", ".tiff")
    windows = dict(_windows(beside))
    if is_file and len(windows) > 1:
        raise PlanError(
            f"error_map({str(to)!r})", f"a map of {len(windows)} rasters", "the name of a folder",
            f"Say error_map({to.stem!r}): each raster has a file there.",
        )  # fmt: skip
    kind = np.dtype(np.uint8 if beside.predictions.is_class else np.float32)
    folder = to.parent if is_file else to
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".errors-", dir=folder) as temporary:
        canvases: dict[int, NDArray[Any]] = {}
        for patch in patches:
            if patch.raster not in canvases:
                canvases[patch.raster] = _canvas(
                    Path(temporary) / f"{patch.raster}.raw", windows[patch.raster], kind
                )
            _put(canvases[patch.raster], windows[patch.raster], patch)
        names = _names(beside, sorted(canvases))
        written = []
        for number, canvas in sorted(canvases.items()):
            target = to if is_file else folder / f"{names[number]}.tif"
            part = Path(temporary) / f"{number}.tif"
            _write(part, canvas, _cut(rasters[number].grid, windows[number]))
            os.replace(part, target)
            written.append(target)
        canvases.clear()  # before their files go
    return tuple(written)


_Window = tuple[slice, slice]


def _windows(beside: Beside) -> Iterator[tuple[int, _Window]]:
    """Yield each raster that chips touch, and the rows and columns that hold all of them."""
    job, rasters = beside.job, beside.predictions.rasters
    rows = np.concatenate([np.arange(h.start, h.stop) for h in job.hierarchies])
    edges: dict[tuple[int, int], NDArray[np.float64]] = {}
    for row in rows.tolist():
        code, box = int(job.epsg[row]), job.bounds[row]
        for number in beside.predictions.touching(code, box.tolist()):
            whole = edges.setdefault((number, code), box.copy())
            whole[:2], whole[2:] = np.minimum(whole[:2], box[:2]), np.maximum(whole[2:], box[2:])
    found: dict[int, list[_Window]] = {}
    for (number, code), box in sorted(edges.items()):
        found.setdefault(number, []).append(_window(rasters[number].grid, code, box))
    for number, parts in found.items():
        ends = [(min(p[a].start for p in parts), max(p[a].stop for p in parts)) for a in (0, 1)]
        yield number, (slice(*ends[0]), slice(*ends[1]))


def _window(grid: PixelGrid, code: int, box: NDArray[np.float64]) -> _Window:
    try:
        xmin, ymin, xmax, ymax = bounds_in(box, code, grid.epsg)
    except GridError:
        return slice(0, grid.height), slice(0, grid.width)
    if xmax < xmin:  # across the antimeridian
        xmin, xmax = grid.bounds[0], grid.bounds[2]
    columns = sorted(((xmin - grid.x) / grid.dx, (xmax - grid.x) / grid.dx))
    rows = sorted(((ymin - grid.y) / grid.dy, (ymax - grid.y) / grid.dy))
    return _within(rows, grid.height), _within(columns, grid.width)


def _within(ends: list[float], size: int) -> slice:
    low, high = int(np.clip(np.floor(ends[0]) - 1, 0, size)), int(np.clip(np.ceil(ends[1]) + 1, 0, size))
    return slice(low, max(high, low + 1))


def _cut(grid: PixelGrid, window: _Window) -> PixelGrid:
    rows, columns = window
    return PixelGrid(
        grid.epsg, grid.x + columns.start * grid.dx, grid.y + rows.start * grid.dy, grid.dx, grid.dy,
        rows.stop - rows.start, columns.stop - columns.start,
    )  # fmt: skip


def _canvas(path: Path, window: _Window, kind: np.dtype[Any]) -> NDArray[Any]:
    shape = tuple(side.stop - side.start for side in window)
    canvas = np.memmap(path, dtype=kind, mode="w+", shape=shape)
    if kind.kind == "f":
        for row in range(0, shape[0], BLOCK):
            canvas[row : row + BLOCK] = np.nan
    return canvas


def _put(canvas: NDArray[Any], window: _Window, patch: Patch) -> None:
    row, column = patch.row - window[0].start, patch.column - window[1].start
    height, width = patch.values.shape
    part = canvas[row : row + height, column : column + width]
    larger = ~(np.abs(patch.values) <= np.abs(part)) & ~np.isnan(patch.values.astype(np.float32))
    part[larger] = patch.values[larger]


def _names(beside: Beside, numbers: list[int]) -> dict[int, str]:
    """Return a file's name for each raster: that of its own file, or of its zone."""
    rasters = beside.predictions.rasters
    names = {n: os.path.splitext(os.path.basename(rasters[n].name))[0] for n in numbers}
    result: dict[int, str] = {}
    for n, name in names.items():
        plain = name or text(rasters[n].grid.epsg).replace(":", "-")
        result[n] = plain if list(names.values()).count(name) == 1 else f"{plain}-{n}"
    return result


def _write(path: Path, canvas: NDArray[Any], grid: PixelGrid) -> None:
    import rasterio
    from rasterio.transform import Affine
    from rasterio.windows import Window

    whole = canvas.dtype.kind == "u"
    profile = {
        "driver": "GTiff", "height": grid.height, "width": grid.width, "count": 1, "dtype": canvas.dtype.name,
        "crs": crs_of(grid.epsg).to_wkt(), "transform": Affine(grid.dx, 0, grid.x, 0, grid.dy, grid.y), "tiled": True,
        "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "nodata": 0 if whole else np.nan,
        "bigtiff": "if_safer",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        for row in range(0, grid.height, BLOCK):
            part = np.asarray(canvas[row : row + BLOCK])
            file.write(part, 1, window=Window(0, row, grid.width, len(part)))
        if whole:
            file.write_colormap(1, {0: (0, 0, 0, 0), 1: RIGHT, 2: WRONG})
            file.set_band_description(1, "1 right, 2 wrong")
        else:
            file.set_band_description(1, "predicted - true")
