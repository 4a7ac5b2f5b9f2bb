"""The grid of a cube: where the records' own pixels lie, so that none is shifted."""

from __future__ import annotations

import numpy as np

from rasteret_dask.errors import GridError
from rasteret_dask.grid import northern, transformer
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.reader.pixelgrid import Grid

__all__ = ["native_grid"]


def native_grid(
    source: ResolvedSource,
    epsg: int | None,
    bounds: tuple[float, float, float, float] | None,
    bounds_latlon: tuple[float, float, float, float] | None,
) -> tuple[Grid, tuple[int, int]]:
    """Return the grid of a cube and its shape (height, width).

    Explicit ``bounds`` are taken exactly; otherwise the grid is that of the first member's records, so that no
    pixel is shifted.

    Raises
    ------
    GridError
        When the records have several CRSs and none is asked for, or bounds hold no whole number of pixels.
    """
    resolution = source.plan.resolution
    codes = np.unique(source.records.epsg)
    if epsg is None:
        if len(codes) > 1:
            raise GridError(
                f"cube of {source.plan.name!r}", f"records in {', '.join(f'EPSG:{c}' for c in codes)}", "one CRS",
                "Choose one with epsg=, or use cubes() for one cube a zone.",
            )  # fmt: skip
        epsg = int(codes[0])
    if bounds is not None:
        return _exact(epsg, bounds, resolution)
    first = int(np.flatnonzero(source.records.epsg == epsg)[0]) if epsg in codes else None
    corner = (0.0, 0.0)
    if first is not None:
        transform = source.records.level_field(
            source.plan.members[source.member[first]].bands[0], "transform"
        )
        _, _, x, _, _, y = transform[first].as_py()
        corner = (x, y)
    if bounds_latlon is not None:
        box = transformer(4326, epsg).transform_bounds(*bounds_latlon, densify_pts=21)
    else:
        box = _hull(source, epsg)
    x0 = corner[0] + np.floor((box[0] - corner[0]) / resolution + 1e-6) * resolution
    y0 = corner[1] + np.ceil((box[3] - corner[1]) / resolution - 1e-6) * resolution
    width = int(np.ceil((box[2] - x0) / resolution - 1e-6))
    height = int(np.ceil((y0 - box[1]) / resolution - 1e-6))
    return Grid(epsg, float(x0), float(y0), resolution, resolution), (height, width)


def _exact(
    epsg: int, bounds: tuple[float, float, float, float], resolution: float
) -> tuple[Grid, tuple[int, int]]:
    if len(bounds) != 4:
        raise GridError("cube(bounds=)", repr(bounds), "(xmin, ymin, xmax, ymax) in the cube's CRS")
    xmin, ymin, xmax, ymax = bounds
    if not (xmin < xmax and ymin < ymax):
        raise GridError("cube(bounds=)", repr(bounds), "xmin < xmax and ymin < ymax")
    width, height = (xmax - xmin) / resolution, (ymax - ymin) / resolution
    if max(abs(width - round(width)), abs(height - round(height))) > 1e-6:
        raise GridError(
            "cube(bounds=)", f"{width:.6g} x {height:.6g} pixels of {resolution:g}", "whole pixels"
        )
    return Grid(epsg, xmin, ymax, resolution, resolution), (round(height), round(width))


def _hull(source: ResolvedSource, epsg: int) -> tuple[float, float, float, float]:
    """Return the bounds of all records in a CRS: xmin, ymin, xmax, ymax."""
    boxes = []
    for row in range(len(source.records)):
        band = source.plan.members[source.member[row]].bands[0]
        level = source.records.asset(row, band).image
        a, _, c, _, e, f = level.transform
        own = int(source.records.epsg[row])
        x, y = sorted((c, c + a * level.width)), sorted((f, f + e * level.height))
        box = (x[0], y[0], x[1], y[1])
        if own != epsg:
            code, shift = northern(own)
            if code == epsg:
                box = (x[0], y[0] + shift, x[1], y[1] + shift)
            else:
                box = transformer(own, epsg).transform_bounds(*box, densify_pts=21)
        boxes.append(box)
    array = np.array(boxes)
    return (*array[:, :2].min(0).tolist(), *array[:, 2:].max(0).tolist())
