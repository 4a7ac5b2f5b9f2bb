# SPDX-License-Identifier: Apache-2.0
"""The bytes of a GeoTIFF's tile become its pixels, without GDAL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from rasteret_dask.table.records import Level

__all__ = ["BrokenTileError", "decode", "decodes", "tile_bytes"]

_DECODERS: dict[int, Callable[..., Any]] = {
    5: imagecodecs.lzw_decode,
    8: imagecodecs.deflate_decode,
    32946: imagecodecs.deflate_decode,
    50000: imagecodecs.zstd_decode,
}
"""TIFF tag 259 -> decoder; 8 and 32946 are both zlib streams."""

_UNCOMPRESSED = 1
_PREDICTORS = {1: "iufcb", 2: "iu", 3: "f"}
"""TIFF tag 317 -> kinds of NumPy types that it is defined for here."""


class BrokenTileError(Exception):
    """Bytes that are no tile of this level."""


def decodes(level: Level) -> bool:
    """Tell whether :func:`decode` serves a level: tiled, with a known tile table and a common codec."""
    return (
        level.driver == "GTiff"
        and len(level.tile_offsets) > 0
        and (level.compression == _UNCOMPRESSED or level.compression in _DECODERS)
        and np.dtype(level.dtype).kind in _PREDICTORS.get(_predictor(level), "")
    )


def tile_bytes(level: Level) -> int:
    """Return the bytes of a decoded tile: of one band where planes are apart, else of all bands."""
    if level.dtype == "bool":
        return level.tile_height * -(-level.tile_width // 8)
    samples = level.samples if level.planar == 1 else 1
    return level.tile_height * level.tile_width * samples * np.dtype(level.dtype).itemsize


def decode(level: Level, data: Any, scratch: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """Return a tile's pixels, shape (sample, tile_height, tile_width): one sample where planes are apart.

    Parameters
    ----------
    level
        What the tile belongs to; :func:`decodes` is true of it.
    data
        The tile's bytes as they stand in the file, any buffer.
    scratch
        Memory that the result may use, until the next call with it.

    Raises
    ------
    BrokenTileError
        When the bytes do not decode, or not to a whole tile.
    """
    due = tile_bytes(level)
    raw = _decompressed(level, data, due, scratch)
    if len(raw) < due:
        raise BrokenTileError(f"{len(raw)} bytes of pixels in the tile, expected {due}")
    if level.dtype == "bool":
        bits = np.frombuffer(raw, np.uint8, due).reshape(level.tile_height, -1)
        return np.unpackbits(bits, axis=1, count=level.tile_width).view(np.bool_)[np.newaxis]
    samples = level.samples if level.planar == 1 else 1
    dtype = np.dtype(level.dtype).newbyteorder(">" if level.byteorder == ">" else "<")
    pixels = np.frombuffer(raw, dtype, due // dtype.itemsize).reshape(
        level.tile_height, level.tile_width, samples
    )
    predictor = _predictor(level)
    if predictor == 3:
        pixels = imagecodecs.floatpred_decode(pixels, axis=-2)
    pixels = pixels.astype(dtype.newbyteorder("="), copy=False)
    if predictor == 2:
        imagecodecs.delta_decode(pixels, axis=-2, out=pixels)
    return pixels.transpose(2, 0, 1)


def _decompressed(level: Level, data: Any, due: int, scratch: NDArray[np.uint8] | None) -> Any:
    if level.compression == _UNCOMPRESSED:
        return data
    out = np.empty(due, np.uint8) if scratch is None or len(scratch) < due else scratch[:due]
    try:
        return _DECODERS[level.compression](data, out=out)
    except (RuntimeError, ValueError) as error:
        raise BrokenTileError(str(error)) from error


def _predictor(level: Level) -> int:
    return 1 if level.compression == _UNCOMPRESSED else level.predictor
