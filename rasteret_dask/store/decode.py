# SPDX-License-Identifier: Apache-2.0
"""Zarr objects become arrays again: a shard as a whole, one of its chips, or a small chunk."""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net.lending import Lender
from rasteret_dask.net.sums import CHECKSUM
from rasteret_dask.store.encode import ABSENT, Encoding

__all__ = ["array_of", "body_into", "chip_into", "chunk_of", "finite_into", "index_nbytes", "index_of"]

_ENTRY = 16  # bytes of an inner chunk's offset and length
_BROKEN = (RuntimeError, ValueError, OSError, EOFError)  # what codecs raise for bytes that are not theirs


def array_of(encoding: Encoding, shape: tuple[int, ...], memory: Lender | None = None) -> NDArray[Any]:
    """Return memory, lent or new, for values of an encoding, shape (n, ...); text becomes objects."""
    dtype = np.dtype(object if encoding.dtype is None else encoding.dtype.str)
    return np.empty(shape, dtype) if memory is None else memory.array(shape, dtype)


def index_nbytes(chips: int) -> int:
    """Return the length of the index of a shard of so many chips, checksum included: its object's last bytes."""
    return _ENTRY * chips + CHECKSUM


def index_of(chips: int, tail: Any, size: int, subject: str) -> NDArray[np.uint64]:
    """Return the index that ends a shard: shape (chip, 2), offset and length of each chip's bytes.

    Both are 2**64 - 1 where a chip is not stored: all of it is fill.

    Parameters
    ----------
    chips
        Chips of a full shard.
    tail
        The object's last :func:`index_nbytes` bytes.
    size
        Bytes of the whole object.
    subject
        What is read, for errors.

    Raises
    ------
    StoreError
        When the index does not match its own checksum, or the object.
    """
    data = bytes(tail)
    entries, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if len(data) != index_nbytes(chips) or struct.pack("<I", google_crc32c.value(entries)) != checksum:
        raise StoreError(
            subject, "a shard whose index does not match its checksum", "what the manifest says",
            "The store was changed or damaged after it was written: write it again.",
        )  # fmt: skip
    index = np.frombuffer(entries, dtype="<u8").reshape(-1, 2)
    stored = index[index[:, 0] != ABSENT]
    if len(stored) and (stored.max() > size or (stored.sum(axis=1) > size - len(data)).any()):
        raise StoreError(subject, "a shard whose index points beyond it", "what the manifest says")
    return index


def chip_into(encoding: Encoding, data: Any, out: NDArray[Any], subject: object) -> None:
    """Decode one chip into its place.

    Parameters
    ----------
    encoding
        The array's encoding.
    data
        The chip's bytes, their checksum last, or None where it is not stored.
    out
        Shape ``encoding.chunk[1:]``, contiguous.
    subject
        What is read, for errors: its text is made only for one.

    Raises
    ------
    StoreError
        When the bytes are not of such a chip.
    """
    body_into(encoding, None if data is None else _checked(data, subject), out, subject)


def body_into(encoding: Encoding, body: Any, out: NDArray[Any], subject: object) -> None:
    """Do the same with bytes that were compared already, without the checksum behind them."""
    if body is None:
        out[...] = encoding.fill
        return
    flat = out.reshape(-1).view(np.uint8)
    try:
        if encoding.codec is None:
            flat[...] = np.frombuffer(body, np.uint8)
        else:
            encoding.codec.decode(body, out=flat)
    except _BROKEN as error:
        raise _damaged(subject, error) from error


def finite_into(pixels: NDArray[Any], valid: NDArray[np.bool_]) -> None:
    """Note where a chip's pixels are finite in all bands.

    Parameters
    ----------
    pixels
        Shape (time, band, y, x).
    valid
        Shape (time, y, x), written.
    """
    for values, out in zip(pixels, valid, strict=True):  # a slot at a time stays near the core
        np.logical_and.reduce(np.isfinite(values), axis=0, out=out)


def chunk_of(encoding: Encoding, data: Any, subject: object) -> NDArray[Any]:
    """Decode a chunk that is no shard.

    Parameters
    ----------
    encoding
        The array's encoding.
    data
        Its bytes, their checksum last, or None where it is not stored.
    subject
        What is read, for errors.

    Returns
    -------
    numpy.ndarray
        Shape ``encoding.chunk``, read-only; text as objects.
    """
    if data is None:
        values = array_of(encoding, encoding.chunk)
        values[...] = encoding.fill
    else:
        raw = _checked(data, subject)
        try:
            raw = raw if encoding.codec is None else encoding.codec.decode(raw)
            text = encoding.dtype is None
            values = VLenUTF8().decode(raw) if text else np.frombuffer(raw, encoding.dtype)
            values = values.reshape(encoding.chunk)
        except _BROKEN as error:
            raise _damaged(subject, error) from error
    values.flags.writeable = False
    return values


def _checked(data: Any, subject: object) -> NDArray[np.uint8]:
    """Return the bytes of a chunk without their checksum; StoreError where they do not match it."""
    stored = np.frombuffer(data, np.uint8)
    body, checksum = stored[:-CHECKSUM], stored[-CHECKSUM:].tobytes()
    if struct.pack("<I", google_crc32c.value(body)) != checksum:
        raise _damaged(subject, "they do not match their checksum")
    return body


def _damaged(subject: object, reason: Exception | str) -> StoreError:
    return StoreError(
        str(subject), f"bytes that do not decode ({reason})", "what the manifest says",
        "The store was changed or damaged after it was written: write it again.",
    )  # fmt: skip
