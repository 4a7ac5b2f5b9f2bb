"""The bytes of a Zarr array's chunks and shards, made once from the pixels where they lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import google_crc32c
import numcodecs
import numpy as np
from numcodecs.vlen import VLenUTF8
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.dtype import parse_dtype

from rasteret_dask.errors import PlanError
from rasteret_dask.net.limits import workers

__all__ = ["Compression", "Encoding", "Piece", "checked", "codec_of", "crc32c"]

Piece: TypeAlias = "bytes | NDArray[np.uint8]"
"""Bytes of an object; an array (one axis, read-only) is pixels that are stored as they lie."""

Compression: TypeAlias = "BloscCodec | ZstdCodec | GzipCodec | str | None"
"""A codec of ``zarr.codecs``, None for none, or ``"auto"``: what was measured to serve each dtype best."""

ABSENT = 2**64 - 1  # offset and length of an inner chunk that is not there: all of it is fill


def checked(compression: Any) -> Compression:
    """Return a compression, or raise PlanError where it is none that shards are encoded with."""
    if (
        compression is None
        or compression == "auto"
        or isinstance(compression, BloscCodec | ZstdCodec | GzipCodec)
    ):
        return compression  # type: ignore[no-any-return]
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
    kind = np.dtype(dtype).kind
    if kind not in "iuf":
        return ZstdCodec(level=1)
    size = np.dtype(dtype).itemsize
    return BloscCodec(
        cname="lz4", clevel=5, typesize=size, shuffle="shuffle" if kind == "f" else "bitshuffle"
    )


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
    def of(cls, metadata: bytes) -> Encoding:
        """Read an array's ``zarr.json``, as :class:`rasteret_dask.store.layout.Layout` made it."""
        said = json.loads(metadata)
        chunk = tuple(said["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = said["codecs"]
        sharded = codecs[0]["name"] == "sharding_indexed"
        if sharded:
            inner = codecs[0]["configuration"]
            assert inner["chunk_shape"] == [1, *chunk[1:]], inner["chunk_shape"]
            assert inner["index_location"] == "end"
            codecs = inner["codecs"]
        codec = _codec(codecs[1]) if len(codecs) > 1 else None
        if said["data_type"] == "string":
            return cls(chunk, sharded, None, said["fill_value"], codec)
        known = parse_dtype(said["data_type"], zarr_format=3)
        dtype = known.to_native_dtype().newbyteorder("<")
        fill = known.from_json_scalar(said["fill_value"], zarr_format=3)
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
        """Encode each inner chunk on one of the process's threads."""
        return self.shard_of(list(workers().map(self._inner, values)))

    def shard_of(self, pieces: Sequence[Piece | None]) -> list[Piece]:
        """Return the shard of some inner chunks' bytes; the index with its checksum comes last.

        Parameters
        ----------
        pieces
            In the chips' order; None: all fill, not stored.

        Returns
        -------
        list of Piece
            Nothing where no chip is stored.
        """
        index = np.full((self.chunk[0], 2), ABSENT, dtype="<u8")
        at = 0
        for entry, piece in zip(index, pieces, strict=False):
            if piece is not None:
                entry[:] = at, len(piece)
                at += len(piece)
        if not at:
            return []
        tail = index.tobytes()
        return [*(p for p in pieces if p is not None), tail + struct.pack("<I", google_crc32c.value(tail))]

    def _inner(self, values: NDArray[Any]) -> Piece | None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        return None if self._is_fill(values) else self._compressed(values)

    def _chunk(self, values: NDArray[Any]) -> list[Piece]:
        if self.dtype is None:
            texts = np.full(self.chunk, self.fill, dtype=object)
            texts[: len(values)] = values
            text = np.frombuffer(VLenUTF8().encode(texts), np.uint8)
            return [self._compressed(text)] if (texts != self.fill).any() else []
        whole = np.full(self.chunk, self.fill, dtype=self.dtype)
        whole[: len(values)] = values
        return [] if self._is_fill(whole) else [self._compressed(whole)]

    def _compressed(self, values: NDArray[Any]) -> Piece:
        if self.codec is not None:
            return bytes(self.codec.encode(values))
        stored = values.reshape(-1).view(np.uint8)
        stored.flags.writeable = False
        return stored

    def _is_fill(self, values: NDArray[Any]) -> bool:
        """Tell whether all is fill, bit for bit, so that NaN is NaN and -0.0 is not 0.0."""
        assert self.dtype is not None
        bits = np.dtype(f"u{self.dtype.itemsize}")
        flat, fill = values.reshape(-1).view(bits), self.fill.view(bits)
        # nearly always the first pixels tell
        return bool((flat[:64] == fill).all() and (flat == fill).all())


def crc32c(pieces: Sequence[Piece]) -> int:
    """Return the CRC-32C of pieces that follow each other."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece)
    return int(value)


def _codec(codec: dict[str, Any]) -> Any:
    said = codec["configuration"]
    match codec["name"]:
        case "blosc":
            shuffle = ("noshuffle", "shuffle", "bitshuffle").index(said["shuffle"])
            return numcodecs.Blosc(
                said["cname"], said["clevel"], shuffle, said["blocksize"], said["typesize"]
            )
        case "zstd":
            return numcodecs.Zstd(said["level"], said["checksum"])
        case "gzip":
            return numcodecs.GZip(said["level"])
        case name:
            raise AssertionError(name)
