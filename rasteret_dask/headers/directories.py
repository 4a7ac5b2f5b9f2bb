# SPDX-License-Identifier: Apache-2.0
"""The directories of a TIFF (IFDs), and the values of their tags: TIFF 6.0, section 2, and BigTIFF."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rasteret_dask.headers.page import UnsupportedError
from rasteret_dask.headers.rangefile import RangeFile

__all__ = ["Directory", "directories"]

_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
"""Number of a tag's type -> the letter of :mod:`struct`."""
_REAL = {11: "f", 12: "d"}
"""The same of fractional numbers; without pairs of whole ones (5, 10), which no header of a raster needs."""
_TEXT = 2
_MOST_TAGS = 4096


@dataclass(frozen=True, slots=True)
class _Layout:
    """Widths of a file's fields: of classic TIFF, or of BigTIFF."""

    order: str
    """"<" or ">"."""
    count: str
    """How many tags a directory has."""
    tag: str
    """Code, type, number of values, and the values or their place."""
    place: str
    """A place in the file."""
    first: int
    """Where the place of the first directory stands."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The tags of one image of a file; their values are read when they are asked for."""

    file: RangeFile
    order: str
    """"<" or ">"."""
    place: str
    """How a place in the file is packed, for :mod:`struct`."""
    tags: Mapping[int, tuple[int, int, bytes]]
    """Code -> type, number of values, and the values themselves or their place. Of equal codes the first counts."""

    def numbers(self, code: int) -> tuple[float, ...]:
        """Return the numbers of a tag, none where the directory lacks it; UnsupportedError where it holds others."""
        return self._values(code, _WHOLE | _REAL)

    def integers(self, code: int) -> tuple[int, ...]:
        """Return the whole numbers of a tag, none where the directory lacks it; UnsupportedError as ``numbers``."""
        return self._values(code, _WHOLE)

    def integer(self, code: int, default: int) -> int:
        """Return the whole number of a tag, however often it is told; UnsupportedError where it tells several."""
        values = set(self.integers(code)) or {default}
        if len(values) > 1:
            raise UnsupportedError(f"tag {code}: {len(values)} numbers instead of one")
        return values.pop()

    def text(self, code: int) -> str | None:
        """Return the text of a tag, None where there is none."""
        kind, count, field = self.tags.get(code, (0, 0, b""))
        if kind != _TEXT:
            return None
        data = self._bytes(code, count, field).rstrip(b"\0")
        try:
            return data.decode().strip()
        except UnicodeDecodeError:  # as GDAL on Windows wrote it
            return data.decode("latin-1").strip()

    def _values(self, code: int, letters: Mapping[int, str]) -> tuple[Any, ...]:
        tag = self.tags.get(code)
        if tag is None:
            return ()
        kind, count, field = tag
        if kind not in letters:
            raise UnsupportedError(f"tag {code} of type {kind}")
        packed = f"{self.order}{count}{letters[kind]}"
        return struct.unpack(packed, self._bytes(code, struct.calcsize(packed), field))

    def _bytes(self, code: int, size: int, field: bytes) -> bytes:
        if size <= len(field):
            return field[:size]
        (start,) = struct.unpack(self.order + self.place, field)
        try:
            return self.file.read(start, size)
        except ValueError as error:
            raise UnsupportedError(f"tag {code}: {error}") from error


def directories(file: RangeFile) -> Iterator[Directory]:
    """Yield the directories of a file, for ever where they go in a circle.

    Raises
    ------
    UnsupportedError
        When a directory is none.
    ValueError
        When the file ends inside one. A directory that begins beyond the file's end ends the chain, as for libtiff.
    """
    layout = _layout(file)
    (at,) = struct.unpack(layout.order + layout.place, file.read(layout.first, struct.calcsize(layout.place)))
    count_size, place_size = struct.calcsize(layout.count), struct.calcsize(layout.place)
    tag_size = struct.calcsize("<" + layout.tag)
    while 0 < at < file.head.size:
        (count,) = struct.unpack(layout.order + layout.count, file.read(at, count_size))
        if count > _MOST_TAGS:
            raise UnsupportedError(f"{count} tags in one directory")
        data = file.read(at + count_size, count * tag_size + place_size)
        tags: dict[int, tuple[int, int, bytes]] = {}
        for code, *tag in struct.iter_unpack(layout.order + layout.tag, data[:-place_size]):
            tags.setdefault(code, tuple(tag))
        yield Directory(file, layout.order, layout.place, tags)
        (at,) = struct.unpack(layout.order + layout.place, data[-place_size:])


def _layout(file: RangeFile) -> _Layout:
    order = {b"II": "<", b"MM": ">"}[file.read(0, 2)]
    (version,) = struct.unpack(order + "H", file.read(2, 2))
    if version == 42:
        return _Layout(order, "H", "HHI4s", "I", 4)
    if struct.unpack(order + "HH", file.read(4, 4)) != (8, 0):
        raise UnsupportedError("a BigTIFF whose places are not of 8 bytes")
    return _Layout(order, "Q", "HHQ8s", "Q", 8)
