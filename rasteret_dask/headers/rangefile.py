# SPDX-License-Identifier: Apache-2.0
"""A file of which the first bytes are there, and others are fetched as they are asked for."""

from __future__ import annotations

from rasteret_dask.headers.page import HeaderRefusedError
from rasteret_dask.net.remote import fetch

__all__ = ["FIRST", "RangeFile"]

FIRST = 32 * 1024
"""Bytes of a first request: the header of nearly every COG (Landsat 15 kB, WorldCover 27 kB)."""

_CAP = 16 * 1024 * 1024  # bytes of header a file may make us fetch
_MAGIC = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "GTiff"),
    **dict.fromkeys((b"\0\0\0\x0c", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
}
"""First four bytes -> the one GDAL driver that may open the file, whatever its name says."""


class RangeFile:
    """The bytes of an href: one request brings the first of them, further ones what is asked for beyond."""

    def __init__(self, href: str, first_bytes: int = FIRST) -> None:
        self._href = href
        first = fetch(href, 0, first_bytes)
        self.head = first.head
        self._blocks: list[tuple[int, bytes]] = [(0, bytes(first.data))]
        self._fetched = len(first.data)
        self._end = 0

    @property
    def driver(self) -> str | None:
        """GDAL's name of the format that the first four bytes tell, None for any but TIFF and JPEG 2000."""
        return _MAGIC.get(self._blocks[0][1][:4])

    @property
    def needed(self) -> int:
        """Bytes, from the file's beginning, that one request would have had to bring; 0 where they lie apart."""
        return self._end if self._fetched >= self._end else 0

    def read(self, start: int, size: int) -> bytes:
        """Return some bytes.

        Raises
        ------
        ValueError
            When the file ends before them.
        HeaderRefusedError
            When more would have to be fetched than a header may take.
        ReadError
            When the store refuses.
        """
        end = start + size
        if end > self.head.size:
            raise ValueError(f"bytes {start} to {end} of a header in a file of {self.head.size}")
        self._end = max(self._end, end)
        while (block := self._held(start, end)) is None:
            self._fetch(start, end)
        return block

    def _held(self, start: int, end: int) -> bytes | None:
        """Return bytes that one block holds as a whole, or None."""
        for at, block in self._blocks:
            if at <= start and end <= at + len(block):
                return block[start - at : end - at]
        return None

    def _fetch(self, start: int, end: int) -> None:
        """Bring a block that holds these bytes and many after them; one that ends shortly before goes on with them.

        Values stand in the order of their tags, and are asked for in another: each must not be a request.
        """
        ahead = min(4 * self._fetched, 1024 * 1024)
        for n, (at, block) in enumerate(self._blocks):
            if at <= start <= at + len(block) + ahead:
                stop = at + len(block)
                added = self._more(stop, max(end - stop, ahead))
                self._blocks[n] = (at, block + added)
                return
        self._blocks.append((start, self._more(start, max(end - start, ahead))))

    def _more(self, start: int, size: int) -> bytes:
        wanted = min(size, self.head.size - start)
        if self._fetched + wanted > _CAP:
            raise HeaderRefusedError(f"a header of more than {_CAP >> 20} MiB")
        data = bytes(fetch(self._href, start, wanted).data)
        if not data:
            raise ValueError("the file ends before its header")
        self._fetched += len(data)
        return data
