"""Units, masks and composites: what turns raw pixels of any sensor into comparable values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.catalogs.bands import Radiometry

__all__ = [
    "DN_PER_REFLECTANCE",
    "add",
    "bad_pixels",
    "composite",
    "composite_dtype",
    "dequantize",
    "divided",
    "to_dtype",
    "to_float",
    "unit_length",
]

DN_PER_REFLECTANCE = 1e4
"""Integer output stores reflectance x 1e4."""

SCL_CLASSES = {"clouds": (3, 8, 9, 10), "snow": (11,), "water": (6,)}
"""Sentinel-2 scene classes: 3 cloud shadow, 8 and 9 cloud, 10 thin cirrus, 11 snow, 6 water (L2A definition)."""

QA_PIXEL_BITS = {"clouds": (1, 3, 4), "snow": (5,), "water": (7,)}
"""Landsat Collection 2 bits: 1 dilated cloud, 3 cloud, 4 cloud shadow, 5 snow, 7 water (LSDS-1619)."""


def bad_pixels(quality: NDArray[Any], kind: str, mask: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return where a quality band says that a pixel is one of the things to mask; same shape.

    Parameters
    ----------
    quality
        Raw values of ``SCL`` or ``qa_pixel``.
    kind
        ``"scl"`` or ``"qa_pixel"``.
    mask
        Any of ``"clouds"`` (with their shadows), ``"snow"``, ``"water"``.
    """
    if kind == "scl":
        table = np.zeros(256, dtype=bool)
        table[[c for name in mask for c in SCL_CLASSES[name]]] = True
        return np.asarray(table[np.clip(quality, 0, 255).astype(np.uint8)])
    bits = sum(1 << b for name in mask for b in QA_PIXEL_BITS[name])
    return np.asarray((quality.astype(np.int64) & bits) != 0)


def to_float(
    raw: NDArray[Any], valid: NDArray[np.bool_] | None, radiometry: Radiometry
) -> NDArray[np.float32]:
    """Return float32(float64(DN) x scale + offset), NaN where not valid (None: all are); same shape."""
    result = raw.astype(np.float64)
    if radiometry.scale != 1.0:
        result *= radiometry.scale
    if radiometry.offset != 0.0:
        result += radiometry.offset
    return _blanked(result.astype(np.float32), valid)


def dequantize(raw: NDArray[Any], valid: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Return AlphaEarth's sign(v) x (|v| / 127.5)^2 as float32, NaN where not valid (None: all are); same shape."""
    v = raw.astype(np.float64) / 127.5
    return _blanked((np.sign(v) * v * v).astype(np.float32), valid)


def _blanked(values: NDArray[np.float32], valid: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    if valid is not None and not valid.all():
        values[~valid] = np.nan
    return values


def unit_length(vectors: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return vectors scaled to length 1 along ``axis``; NaN where any element is, or the length is 0.

    The squares are summed in the order of ``axis``, whatever the layout in memory, so that every caller gets the
    same last bit.
    """
    layers = np.moveaxis(vectors, axis, 0)
    square = np.zeros(layers.shape[1:], dtype=np.float64)
    for layer in layers:
        square += np.square(layer, dtype=np.float64)
    length = np.where(square > 0, np.sqrt(square), np.nan)
    result = np.empty_like(vectors)
    for layer, out in zip(layers, np.moveaxis(result, axis, 0), strict=True):
        out[...] = layer / length
    return result


def to_dtype(values: NDArray[np.float32], dtype: str, fill: float) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Store reflectance as integers.

    Parameters
    ----------
    values
        Shape (..., band, y, x). Reflectance, NaN where invalid.
    dtype
        ``"float32"`` (unchanged), ``"uint16"`` or ``"int16"``.
    fill
        Value of invalid pixels.

    Returns
    -------
    stored, clipped
        DN = round(reflectance x 1e4); and per band how many valid pixels lay outside the range and were clipped.
    """
    bands = values.shape[-3]
    if dtype == "float32":
        return values, np.zeros(bands, dtype=np.int64)
    low, high = {"uint16": (0, 65534), "int16": (-32767, 32767)}[dtype]
    dn = np.rint(values.astype(np.float64) * DN_PER_REFLECTANCE)
    valid = np.isfinite(dn)
    axes = tuple(i for i in range(dn.ndim) if i != dn.ndim - 3)
    clipped = np.sum(valid & ((dn < low) | (dn > high)), axis=axes)
    stored = np.where(valid, np.clip(dn, low, high), fill).astype(dtype)
    return stored, np.asarray(clipped, dtype=np.int64)


def composite_dtype(dtype: str) -> np.dtype[Any]:
    """Return the float type that values of ``dtype`` are composed in: it holds 16-bit integers exactly, at least."""
    return np.result_type(np.dtype(dtype), np.float32)


def add(values: NDArray[Any], total: NDArray[np.float64], count: NDArray[np.int32]) -> None:
    """Add what is not NaN to a running mean, in place; all of one shape."""
    known = ~np.isnan(values)
    np.add(total, values, out=total, where=known)
    count += known


def divided(total: NDArray[np.float64], count: NDArray[np.int32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the mean of what :func:`add` has summed up, NaN where nothing was."""
    return (total / np.where(count > 0, count, np.nan)).astype(dtype)


def composite(stack: NDArray[Any], how: str) -> NDArray[Any]:
    """Return the mean or median over the first axis, ignoring NaN; NaN where nothing is valid.

    Means are summed in the order of the axis, whatever the layout in memory.
    """
    if how == "mean":
        total, count = np.zeros(stack.shape[1:]), np.zeros(stack.shape[1:], dtype=np.int32)
        for layer in stack:
            add(layer, total, count)
        return divided(total, count, stack.dtype)
    ordered = np.sort(stack, axis=0)  # NaN comes last
    known = np.sum(~np.isnan(stack), axis=0, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(known - 1, 0) // 2, axis=0)[0]
    high = np.take_along_axis(ordered, np.minimum(known // 2, len(stack) - 1), axis=0)[0]
    middle = ((low.astype(np.float64) + high) / 2).astype(stack.dtype)
    return np.where(known[0] > 0, middle, np.nan).astype(stack.dtype, copy=False)
