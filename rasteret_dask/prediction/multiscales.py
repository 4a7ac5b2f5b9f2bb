# SPDX-License-Identifier: Apache-2.0
"""Coarser levels of a map in Zarr, as the GeoZarr conventions describe them.

- :func:`levels`: the names and shapes of a map's levels, of half the size each;
- :func:`halve`: a block of one level -> the same ground in the next one; blocks whose corners are even need no
  neighbours;
- :func:`geozarr_attributes`: the attributes of the group that holds a map, with its levels or without.

The conventions are at version 0.1: https://github.com/zarr-conventions/multiscales,
https://github.com/zarr-conventions/spatial and https://github.com/zarr-conventions/proj. The finest level is the group
itself (``"."``), so that whoever knows no convention opens the map as if there were one level; each other level is a
group below it, ``2x``, ``4x`` and so on, with arrays of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from rasteret_dask.crs import spelled, wkt2

__all__ = ["Halving", "MapLevel", "geozarr_attributes", "halve", "levels"]

Halving: TypeAlias = Literal["mode", "average", "max"]
"""What 2 x 2 pixels become: the most frequent valid code, the mean of valid quantities, the largest count."""

LEAST_PX = 512
"""The coarsest level is the first that is no larger."""

_CONVENTIONS = (
    ("multiscales", "d35379db-88df-4056-af3a-620245f8e347", "Multiscale layout of zarr datasets"),
    ("proj", "f17cb550-5864-4468-aeb7-f3180cfb622f", "Coordinate reference system information for geospatial data"),
    ("spatial", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MapLevel:
    """One level of a map."""

    path: str
    """Of its group, below that of the map; ``"."`` is the map itself."""
    factor: int
    """Pixels of the finest level along a side of one of its own."""
    shape: tuple[int, int]
    """Pixels: y, x."""

    def transform(self, finest: Affine) -> Affine:
        """Return its transform, of the finest level's."""
        return finest @ Affine.scale(self.factor)


def levels(shape: tuple[int, int], least_px: int = LEAST_PX) -> tuple[MapLevel, ...]:
    """Return the levels of a map, the finest first; the last is the first that fits into ``least_px`` pixels a side.

    Examples
    --------
    >>> from rasteret_dask.prediction.multiscales import levels
    >>> [(level.path, level.shape) for level in levels((1500, 1025))]
    [('.', (1500, 1025)), ('2x', (750, 513)), ('4x', (375, 257))]
    """
    height, width = shape
    result = [MapLevel(".", 1, shape)]
    while max(result[-1].shape) > least_px:
        factor = 2 * result[-1].factor
        result.append(MapLevel(f"{factor}x", factor, (-(-height // factor), -(-width // factor))))
    return tuple(result)


def halve(pixels: NDArray[Any], how: Halving, nodata: float | None) -> NDArray[Any]:
    """Return pixels of half the size: each of 2 x 2, fewer at an odd southern or eastern edge.

    Parameters
    ----------
    pixels
        Shape (..., y, x).
    how
        ``"mode"``: the most frequent valid code, the least of equally frequent ones; ``"average"``: the mean of valid
        pixels, in float64, stored in the dtype of the pixels; ``"max"``: the largest.
    nodata
        What invalid pixels hold; a pixel is invalid where all of its 2 x 2 are. None: all are valid.

    Returns
    -------
    ndarray
        Shape (..., ceil(y / 2), ceil(x / 2)), of the same dtype.
    """
    four, valid = _quarters(pixels, nodata)
    if how == "max":
        return _highest(four, valid, nodata)
    if how == "average":
        return _mean(four, valid, nodata)
    order = np.argsort(four, axis=0, kind="stable")
    codes, there = np.take_along_axis(four, order, 0), np.take_along_axis(valid, order, 0)
    votes = np.zeros(codes.shape, np.uint8)
    for other, sure in zip(codes, there, strict=True):
        votes += (codes == other) & sure
    votes[~there] = 0
    winner = np.argmax(votes, axis=0)[None]  # the first of the most: codes ascend
    result: NDArray[Any] = np.take_along_axis(codes, winner, 0)[0]
    return result if nodata is None else np.where(there.any(axis=0), result, result.dtype.type(nodata))


def geozarr_attributes(
    crs: int,
    transform: Affine,
    shape: tuple[int, int],
    pyramid: tuple[MapLevel, ...] = (),
    how: Halving = "average",
) -> dict[str, Any]:
    """Return the attributes of the group that holds a map: JSON.

    Parameters
    ----------
    crs
        The number of its CRS.
    transform
        Pixel corner (column, row) -> (x, y) of the finest level.
    shape
        Pixels of the finest level: y, x.
    pyramid
        What :func:`levels` returned; empty for a map of one level, which says nothing of ``multiscales``.
    how
        How levels were made of each other.
    """
    spots = [transform @ corner for corner in ((0, 0), shape[::-1])]
    (west, east), (south, north) = (sorted(side) for side in zip(*spots, strict=True))
    result: dict[str, Any] = {
        "zarr_conventions": [
            {
                "name": name,
                "uuid": uuid,
                "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json",
                "spec_url": f"https://github.com/zarr-conventions/{name}/blob/v0.1/README.md",
                "description": text,
            }
            for name, uuid, text in _CONVENTIONS
            if pyramid or name != "multiscales"
        ],
        **({"proj:code": spelled(crs)} if crs > 0 else {}),
        "proj:wkt2": wkt2(crs),
        "spatial:dimensions": ["y", "x"],
        "spatial:shape": list(shape),
        "spatial:transform": [float(number) for number in tuple(transform)[:6]],
        "spatial:bbox": [float(number) for number in (west, south, east, north)],
        "spatial:registration": "pixel",
    }
    if pyramid:
        result["multiscales"] = {
            "layout": [_entry(pyramid[max(0, n - 1) : n + 1], transform) for n in range(len(pyramid))],
            "resampling_method": how,
        }
    return result


def _entry(steps: tuple[MapLevel, ...], transform: Affine) -> dict[str, Any]:
    """Return what is said of the last of these levels, which was made of the one before it."""
    level, before = steps[-1], steps[0]
    origin = {} if level is before else {"derived_from": before.path}
    step = level.factor / before.factor
    return {
        "asset": level.path,
        **origin,
        "transform": {"scale": [step, step], "translation": [0.0, 0.0]},
        "spatial:shape": list(level.shape),
        "spatial:transform": [float(number) for number in tuple(level.transform(transform))[:6]],
    }


def _quarters(pixels: NDArray[Any], nodata: float | None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the 2 x 2 pixels of each, and which are valid; both of shape (4, ..., y, x)."""
    height, width = (side + side % 2 for side in pixels.shape[-2:])
    even = np.zeros((*pixels.shape[:-2], height, width), pixels.dtype)
    valid = np.zeros(even.shape, bool)
    there = (..., slice(pixels.shape[-2]), slice(pixels.shape[-1]))
    even[there] = pixels
    if nodata is None:
        valid[there] = True
    else:
        valid[there] = ~np.isnan(pixels) if np.isnan(nodata) else pixels != pixels.dtype.type(nodata)
    corners = [(..., slice(y, None, 2), slice(x, None, 2)) for y in (0, 1) for x in (0, 1)]
    return np.stack([even[c] for c in corners]), np.stack([valid[c] for c in corners])


def _mean(four: NDArray[Any], valid: NDArray[np.bool_], nodata: float | None) -> NDArray[Any]:
    count = valid.sum(axis=0)
    total = np.where(valid, four, 0).sum(axis=0, dtype=np.float64)
    mean = total / np.maximum(count, 1)
    if four.dtype.kind != "f":
        mean = np.rint(mean)
    result: NDArray[Any] = mean.astype(four.dtype)
    return result if nodata is None else np.where(count > 0, result, four.dtype.type(nodata))


def _highest(four: NDArray[Any], valid: NDArray[np.bool_], nodata: float | None) -> NDArray[Any]:
    least = -np.inf if four.dtype.kind == "f" else np.iinfo(four.dtype).min
    result: NDArray[Any] = np.where(valid, four, four.dtype.type(least)).max(axis=0)
    return result if nodata is None else np.where(valid.any(axis=0), result, four.dtype.type(nodata))
