# SPDX-License-Identifier: Apache-2.0
"""Checksums: of documents, inside themselves, and of files of which only parts are read, block by block."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import imagecodecs
import pyarrow as pa

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote

__all__ = [
    "BLOCK",
    "Fault",
    "Summing",
    "Sums",
    "Whole",
    "changed",
    "checked_file",
    "closed",
    "crc32_of",
    "document_of",
    "fault_of",
    "is_closed",
    "root_checksum",
    "sealed",
]

BLOCK = 256 * 1024
"""Bytes that have one checksum. A part of this format: a chip table of a million chips has some thousand of them."""

READ_BLOCKS = 64
"""Blocks of an object that are read at once where all of it is compared: 16 MiB."""

Fault: TypeAlias = 'Literal["missing", "damaged"] | None'

CHECKSUM = 4
"""Bytes of a CRC-32."""

_CRC_MARK = b"CRC-32C:"
_CHECKSUM = "checksum"
_EDGES = 4  # blocks that are kept: Parquet's footer is asked for twice, and columns meet inside a block


@dataclass(frozen=True, slots=True)
class Sums:
    """What an object must be: its size, and the CRC-32C of each of its blocks."""

    size: int
    """Bytes."""
    crcs: tuple[int, ...]
    """CRC-32C of each :data:`BLOCK` bytes; the last block may be short."""

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.crcs) != -(-self.size // BLOCK):
            raise ValueError(f"{len(self.crcs)} checksums for {self.size} bytes")

    @classmethod
    def of(cls, data: bytes) -> Sums:
        """Return those of some bytes."""
        return cls(len(data), tuple(crc32_of(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)))

    @classmethod
    def again(cls, value: Any) -> Sums:
        """Return what :attr:`text` was made of; ValueError, TypeError or struct.error where it is none."""
        size, text = value
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"size {size!r}")
        data = bytes.fromhex(text)
        return cls(size, struct.unpack(f">{len(data) // 4}I", data))

    @property
    def text(self) -> list[int | str]:
        """As JSON values: the size, and eight hex digits a block."""
        return [self.size, "".join(f"{crc:08x}" for crc in self.crcs)]

    def match(self, data: Any, first: int = 0) -> bool:
        """Tell whether bytes are those of the object from block ``first`` on: some whole blocks, or all to its end."""
        view = memoryview(data)
        start = first * BLOCK
        if start + len(view) > self.size or (len(view) % BLOCK and start + len(view) != self.size):
            return False
        blocks = -(-len(view) // BLOCK)
        return all(crc32_of(view[n * BLOCK : (n + 1) * BLOCK]) == self.crcs[first + n] for n in range(blocks))

    def is_of(self, data: Any) -> bool:
        """Tell whether bytes are the whole object."""
        return len(memoryview(data)) == self.size and self.match(data)


class Summing:
    """The sums of an object whose bytes come piece by piece."""

    def __init__(self) -> None:
        self._size = 0
        self._crcs: list[int] = []

    def add(self, piece: Any) -> None:
        """Count further bytes."""
        view = memoryview(piece)
        while len(view):
            inside = self._size % BLOCK
            part = view[: BLOCK - inside]
            if inside:
                self._crcs[-1] = crc32_of(part, self._crcs[-1])
            else:
                self._crcs.append(crc32_of(part))
            self._size += len(part)
            view = view[len(part) :]

    @property
    def sums(self) -> Sums:
        """Those of all bytes so far."""
        return Sums(self._size, tuple(self._crcs))


@dataclass(frozen=True, slots=True)
class Whole:
    """What an object must be that is always read as a whole: its size, and one checksum."""

    size: int
    """Bytes."""
    crc32: int


def checked_file(url: str, sums: Sums) -> pa.NativeFile:
    """Open an object that is read by ranges, each widened to whole blocks and compared with their checksums.

    Parameters
    ----------
    url
        The object.
    sums
        What it must be; reading raises StoreError where it is not.
    """
    return pa.PythonFile(_Blocks(url, sums), mode="r")


class _Blocks(io.RawIOBase):
    def __init__(self, url: str, sums: Sums) -> None:
        self._url, self._sums, self._at = url, sums, 0
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._sums.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._sums.size

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._sums.size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        if not length:
            return b""
        first, last = self._at // BLOCK, (self._at + length - 1) // BLOCK
        if all(n in self._blocks for n in range(first, last + 1)):
            data = memoryview(b"".join(self._blocks[n] for n in range(first, last + 1)))
        else:
            data = self._fetched(first, last)
        start = self._at - first * BLOCK
        self._at += length
        return bytes(data[start : start + length])

    def _fetched(self, first: int, last: int) -> memoryview:
        length = min((last + 1) * BLOCK, self._sums.size) - first * BLOCK
        subject = f"reading {remote.redact(self._url)}"
        try:
            found = remote.fetch(self._url, first * BLOCK, length)
        except remote.MissingError as error:
            raise changed(subject, "nothing", self._sums.size) from error
        if found.head.size != self._sums.size:
            raise changed(subject, f"{found.head.size} bytes", self._sums.size)
        data = memoryview(found.data)
        if len(data) != length or not self._sums.match(data, first):
            raise changed(subject, "other bytes", self._sums.size)
        for n in dict.fromkeys((first, last)):
            self._blocks[n] = data[(n - first) * BLOCK : (n - first + 1) * BLOCK]
        while len(self._blocks) > _EDGES:
            self._blocks.popitem(last=False)
        return data


def changed(subject: str, content: str, size: int | None) -> StoreError:
    """Return the error of an object that is no longer what was written."""
    return StoreError(
        subject, content, "what was written" if size is None else f"the {size} bytes that were written",
        "The store was changed or damaged after it was written: copy it again, or write it again.",
    )  # fmt: skip


def closed(parquet: bytes) -> bytes:
    """Return a Parquet file with its own CRC-32C, in front of its footer.

    Readers find everything by the footer's offsets, which count from the file's start, and the footer from its end:
    what lies between the last row group and the footer is nobody's.
    """
    footer = _footer_nbytes(parquet)
    mark = _CRC_MARK + struct.pack("<I", crc32_of(parquet))
    return parquet[:-footer] + mark + parquet[-footer:]


def is_closed(data: Any) -> bool:
    """Tell whether bytes are what :func:`closed` returned."""
    view = memoryview(data)
    at = len(view) - _footer_nbytes(view)
    start = at - len(_CRC_MARK) - CHECKSUM
    if len(view) < 8 or start < 0 or view[start : start + len(_CRC_MARK)] != _CRC_MARK:
        return False
    crc = crc32_of(view[at:], crc32_of(view[:start]))
    return bool(view[at - CHECKSUM : at] == struct.pack("<I", crc))


def _footer_nbytes(parquet: Any) -> int:
    """Return the length of a footer, with the length itself and the magic number behind it."""
    return int.from_bytes(parquet[-8:-4], "little") + 8


def fault_of(url: str, wanted: Sums | Whole) -> Fault:
    """Read an object, some blocks at a time, and say what is wrong with it: None, "missing" or "damaged"."""
    crc, at = 0, 0
    try:
        while at < max(wanted.size, 1):
            found = remote.fetch(url, at, READ_BLOCKS * BLOCK) if wanted.size else remote.fetch(url)
            if found.head.size != wanted.size:
                return "damaged"
            if isinstance(wanted, Whole):
                crc = crc32_of(found.data, crc)
            elif not wanted.match(found.data, at // BLOCK):
                return "damaged"
            at += READ_BLOCKS * BLOCK
    except remote.MissingError:
        return "missing"
    return "damaged" if isinstance(wanted, Whole) and crc != wanted.crc32 else None


def sealed(document: Mapping[str, Any]) -> bytes:
    """Return a JSON document with its own checksum."""
    return json.dumps({**document, _CHECKSUM: _checksum(document)}).encode()


def document_of(data: bytes) -> dict[str, Any] | None:
    """Return a document that :func:`sealed` made; None where it is damaged, or something else."""
    try:
        document = json.loads(data)
        whole = isinstance(document, dict) and document.get(_CHECKSUM) == _checksum(document)
    except (ValueError, RecursionError):
        return None
    return document if whole else None


def root_checksum(root: Mapping[str, Any]) -> str:
    """Return the checksum of a store's root document: a digest of all but the place that holds it.

    Parameters
    ----------
    root
        A Zarr group's document, in whose attributes ``rasteret_dask`` is an object; another document, which has that
        object itself.
    """
    return _digest(_without_checksum(root))


def _without_checksum(root: Mapping[str, Any]) -> dict[str, Any]:
    if "attributes" in root:
        return {**root, "attributes": _without_checksum(root["attributes"])}
    note = {key: value for key, value in root["rasteret_dask"].items() if key != _CHECKSUM}
    return {**root, "rasteret_dask": note}


def _checksum(document: Mapping[str, Any]) -> str:
    return _digest({key: value for key, value in document.items() if key != _CHECKSUM})


def _digest(document: Mapping[str, Any]) -> str:
    """Digest JSON values, however they are spaced and ordered in a file."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def crc32_of(data: Any, before: int = 0) -> int:
    """Return the CRC-32 (of zlib) of some bytes, which follow others of a CRC-32 of ``before``.

    Not CRC-32C: what ends with its own CRC-32C, as Zarr's chunks do, has the same one whatever else it holds.
    """
    return int(imagecodecs.deflate_crc32(data, before))
