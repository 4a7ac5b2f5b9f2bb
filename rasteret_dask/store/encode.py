# SPDX-License-Identifier: Apache-2.0
"""The bytes of a Zarr array's chunks and shards, made once from the pixels where they lie."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import google_crc32c
import numcodecs
import numpy as np
from numcodecs.vlen import VLenUTF8
from numpy.typing import DTypeLike, NDArray

from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net.limits import workers
from rasteret_dask.net.sums import crc32_of

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

__all__ = [
    "CHIPS_PER_SHARD",
    "MALFORMED",
    "Compression",
    "Encoding",
    "Piece",
    "checked",
    "codec_of",
    "compressors",
    "crc32",
    "shape_of",
]

Piece: TypeAlias = "bytes | NDArray[np.uint8]"
"""Bytes of an object; an array (one axis, read-only) is pixels that are stored as they lie."""

Compression: TypeAlias = "BloscCodec | ZstdCodec | GzipCodec | Literal['auto'] | None"
"""A codec of ``zarr.codecs``, None for none, or ``"auto"``: what was measured to serve each dtype best."""

MAX_NBYTES = 2**31 - 1
"""Bytes of one chip of an array, or of one chunk that is no shard: what Blosc takes at most."""

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError)
"""What a document raises where it is JSON, but not what was written."""

CHIPS_PER_SHARD = "chips_per_shard"
"""Attribute of a group: the Dask chunk, in chips, that reads each of its shards in one piece."""

ABSENT = 2**64 - 1  # offset and length of an inner chunk that is not there: all of it is fill


def checked(compression: Any) -> Compression:
    """Return a compression, or raise PlanError where it is none that shards are encoded with."""
    if compression is None or compression == "auto":
        return compression  # type: ignore[no-any-return]
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

    if isinstance(compression, BloscCodec | ZstdCodec | GzipCodec):
        return compression
    raise PlanError(
        "to_zarr(compression=)",
        repr(compression),
        "'auto', None, or a BloscCodec, ZstdCodec or GzipCodec of zarr.codecs",
    )


def codec_of(compression: Compression, dtype: DTypeLike) -> BloscCodec | ZstdCodec | GzipCodec | None:
    """Return the codec for an array of a dtype; ``"auto"`` is what ``tests/benchmarks/bench_write.py`` settled.

    Numbers: Blosc's lz4, which reads and writes 1 to 2 GB/s a core; integers after a bitshuffle, floats after a
    shuffle. zstd would store 5 to 15 % less at a third of the speed. Masks and text: zstd, level 1.
    """
    if not isinstance(compression, str):
        return compression
    from zarr.codecs import BloscCodec, ZstdCodec

    kind = np.dtype(dtype).kind
    if kind not in "iuf":
        return ZstdCodec(level=1)
    size = np.dtype(dtype).itemsize
    return BloscCodec(
        cname="lz4", clevel=5, typesize=size, shuffle="shuffle" if kind == "f" else "bitshuffle"
    )


def compressors(compression: Compression, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return the codecs behind an array's first one: its compression, if any, then a checksum of each chunk."""
    from zarr.codecs import Crc32cCodec

    codec = codec_of(compression, dtype)
    return (Crc32cCodec(),) if codec is None else (codec, Crc32cCodec())


@dataclass(frozen=True)
class Encoding:
    """How the chunks of one array become bytes, as its metadata says."""

    chunk: tuple[int, ...]
    """Shape of one stored object: a shard where ``sharded``."""
    sharded: bool
    """Whether an object is a shard whose inner chunks are one element of the first axis each."""
    dtype: np.dtype[Any] | None
    """Little-endian; None for text of variable length."""
    fill: Any
    codec: Any
    """What zarr-python itself would call, a codec of numcodecs; None where there is none."""

    @classmethod
    def of(cls, metadata: bytes, subject: str = "an array's zarr.json") -> Encoding:
        """Read an array's ``zarr.json``, as :class:`rasteret_dask.store.layout.Layout` made it.

        Parameters
        ----------
        metadata
            The document.
        subject
            What is read, for errors.

        Raises
        ------
        StoreError
            When it is another document, or a chip would not fit :data:`MAX_NBYTES`.
        """
        try:
            return cls._of(json.loads(metadata))
        except (*MALFORMED, RecursionError, OverflowError) as error:
            raise StoreError(
                subject, f"metadata that to_zarr does not write ({error!r:.200})",
                "the array as to_zarr wrote it",
                "It was changed or damaged: copy the store again, or write it again.",
            ) from error  # fmt: skip

    @classmethod
    def _of(cls, node: dict[str, Any]) -> Encoding:
        chunk = shape_of(node["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = node["codecs"]
        sharded = codecs[0]["name"] == "sharding_indexed"
        if sharded:
            inner = codecs[0]["configuration"]
            assert len(codecs) == 1, codecs
            assert inner["chunk_shape"] == [1, *chunk[1:]], inner["chunk_shape"]
            assert inner["index_location"] == "end"
            codecs = inner["codecs"]
        first, *between, last = codecs
        text = node["data_type"] == "string"
        assert first["name"] == ("vlen-utf8" if text else "bytes"), first
        assert last["name"] == "crc32c", last
        assert len(between) <= 1, between
        codec = _codec(between[0]) if between else None
        if text:
            _check_nbytes(chunk, 8)
            fill = node["fill_value"]
            assert isinstance(fill, str), fill
            return cls(chunk, sharded, None, fill, codec)
        from zarr.dtype import parse_dtype

        known = parse_dtype(node["data_type"], zarr_format=3)
        dtype = known.to_native_dtype().newbyteorder("<")
        _check_nbytes(chunk[1:] if sharded else chunk, dtype.itemsize)
        fill = known.from_json_scalar(node["fill_value"], zarr_format=3)
        return cls(chunk, sharded, dtype, np.asarray(fill, dtype), codec)

    def encode(self, values: NDArray[Any]) -> list[Piece]:
        """Return the object of one chunk or shard, in pieces that follow each other.

        Parameters
        ----------
        values
            Shape (n, *chunk[1:]) with n up to chunk[0]: what is missing at the end of the array is fill.

        Returns
        -------
        list of Piece
            Nothing where all is fill: such an object is left out, and read as fill. Without a codec the pieces are
            the values themselves.

        Raises
        ------
        PlanError
            When the values have another shape.
        """
        if values.shape[1:] != self.chunk[1:] or len(values) > self.chunk[0]:
            raise PlanError(
                "writing a shard",
                f"chips of shape {values.shape[1:]}",
                f"{self.chunk[1:]}, as the first chip had",
                "A function given to map must make chips of one shape.",
            )
        return self._shard(values) if self.sharded else self._chunk(values)

    def _shard(self, values: NDArray[Any]) -> list[Piece]:
        return self.shard_of(self.chips(values))

    def chips(self, values: Iterable[NDArray[Any]]) -> list[list[Piece]]:
        """Return the pieces of each inner chunk of a shard, encoded on the process's threads; none of fill alone."""
        return list(workers().map(self._inner, values))

    def shard_of(self, chips: Sequence[Sequence[Piece]]) -> list[Piece]:
        """Return the shard of some inner chunks' bytes; the index with its checksum comes last.

        Parameters
        ----------
        chips
            The pieces of each, its checksum among them, in the chips' order; none: all fill, not stored.

        Returns
        -------
        list of Piece
            Nothing where no chip is stored.
        """
        index = np.full((self.chunk[0], 2), ABSENT, dtype="<u8")
        at = 0
        for entry, pieces in zip(index, chips, strict=False):
            if pieces:
                nbytes = sum(map(len, pieces))
                entry[:] = at, nbytes
                at += nbytes
        if not at:
            return []
        tail = index.tobytes()
        stored = [piece for pieces in chips for piece in pieces]
        return [*stored, tail + struct.pack("<I", google_crc32c.value(tail))]

    def _inner(self, values: NDArray[Any]) -> list[Piece]:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        return [] if self._is_fill(values) else self._stored(values)

    def _chunk(self, values: NDArray[Any]) -> list[Piece]:
        if self.dtype is None:
            texts = np.full(self.chunk, self.fill, dtype=object)
            texts[: len(values)] = values
            text = np.frombuffer(VLenUTF8().encode(texts), np.uint8)
            return self._stored(text) if (texts != self.fill).any() else []
        whole = np.full(self.chunk, self.fill, dtype=self.dtype)
        whole[: len(values)] = values
        return [] if self._is_fill(whole) else self._stored(whole)

    def _stored(self, values: NDArray[Any]) -> list[Piece]:
        """Return the bytes of a chunk, and behind them their checksum."""
        data: Piece
        if self.codec is not None:
            data = bytes(self.codec.encode(values))
        else:
            data = values.reshape(-1).view(np.uint8)
            data.flags.writeable = False
        return [data, struct.pack("<I", google_crc32c.value(data))]

    def _is_fill(self, values: NDArray[Any]) -> bool:
        """Tell whether all is fill, bit for bit, so that NaN is NaN and -0.0 is not 0.0."""
        assert self.dtype is not None
        bits = np.dtype(f"u{self.dtype.itemsize}")
        flat, fill = values.reshape(-1).view(bits), self.fill.view(bits)
        # nearly always the first pixels tell
        return bool((flat[:64] == fill).all() and (flat == fill).all())


def crc32(pieces: Sequence[Piece]) -> int:
    """Return the CRC-32 of pieces that follow each other: see :func:`rasteret_dask.net.sums.crc32_of`."""
    value = 0
    for piece in pieces:
        value = crc32_of(piece, value)
    return value


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a shape of a document, or raise TypeError where it is none."""
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise TypeError(f"shape {value!r:.100}")
    if any(n < 0 for n in value):
        raise ValueError(f"shape {value!r:.100}")
    return tuple(value)


def _check_nbytes(shape: tuple[int, ...], itemsize: int) -> None:
    nbytes = math.prod(shape) * itemsize
    if nbytes > MAX_NBYTES:
        raise ValueError(f"{nbytes} bytes of shape {shape}, more than the {MAX_NBYTES} that can be one chunk")


def _codec(codec: dict[str, Any]) -> Any:
    configuration = codec["configuration"]
    match codec["name"]:
        case "blosc":
            shuffle = ("noshuffle", "shuffle", "bitshuffle").index(configuration["shuffle"])
            names = ("cname", "clevel", "blocksize", "typesize")
            cname, clevel, blocksize, typesize = (configuration[name] for name in names)
            return numcodecs.Blosc(cname, clevel, shuffle, blocksize, typesize)
        case "zstd":
            return numcodecs.Zstd(configuration["level"], configuration["checksum"])
        case "gzip":
            return numcodecs.GZip(configuration["level"])
        case name:
            raise AssertionError(name)
