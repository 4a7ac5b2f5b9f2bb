# SPDX-License-Identifier: Apache-2.0
"""Remote files as GDAL opens them: their bytes come through :mod:`rasteret_dask.net.remote`, as all others do.

No request leaves by GDAL's own network code (``/vsicurl``, ``/vsis3``), which knows nothing of the checks on hosts and
redirects, of signatures, and of the hosts' gates.

rasterio's ``opener=`` gives each call a file system of its own, adds it to a table that GDAL's other threads look at
without a lock, and keeps what is open in context variables: another thread that reads or closes it crashes. Here one
opener is registered for the whole process, by opening a tiny raster that stays open; every file is a path below it, and
calls into rasterio run in a context that holds rasterio's variables for all threads.
"""

from __future__ import annotations

import atexit
import io
import os
import re
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from itertools import count
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import rasterio
from rasterio.abc import FileContainer
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine

from rasteret_dask.errors import RasteretDaskError, ReadError
from rasteret_dask.net.remote import Head, fetch, public

T = TypeVar("T")

__all__ = ["GdalFile"]

_FIRST = 32 * 1024
"""Bytes of a request for less, and of the first one: the header of nearly every file."""
_MOST_AHEAD = 2**20
"""Bytes that requests grow to while a file is read from front to back, by doubling."""
_KEPT = 4 * 2**20
"""Bytes of a file that are kept, at most, and the longest read that is kept at all."""


class GdalFile:
    """A remote file under a path that GDAL opens.

    Parameters
    ----------
    href
        A URL of scheme http, https, s3, gs or az.
    """

    def __init__(self, href: str) -> None:
        self.failure: RasteretDaskError | None = None
        """What went wrong in the last call; GDAL itself only says that it got no bytes."""
        self._href = href
        self._head: Head | None = None
        self._spans: deque[tuple[int, memoryview]] = deque()
        self._end = 0
        self._ahead = _FIRST
        self._lock = Lock()
        self._datasets: list[DatasetReader] = []
        self._name = _added(self)

    def open(self, driver: str, **options: Any) -> DatasetReader:
        """Open it by one of GDAL's drivers; use the dataset inside of :meth:`call` only.

        Raises
        ------
        RasterioError
            When GDAL cannot, or got no bytes: see ``failure``.
        """
        dataset = self.call(lambda: rasterio.open(_prefix() + self._name, driver=driver, **options))
        self._datasets.append(dataset)
        return dataset

    def call(self, function: Callable[[], T]) -> T:
        """Call a function that may make rasterio read from the file, on this thread."""
        self.failure = None
        _prefix()
        context: Context = _CONTEXT[0]
        return context.copy().run(function)

    def close(self) -> None:
        """Close all datasets, and forget the file."""
        while self._datasets:
            self.call(self._datasets.pop().close)
        _FILES.pop(self._name, None)
        self._spans.clear()

    @property
    def size(self) -> int:
        """Bytes; a request, unless one was answered before."""
        with self._lock:
            if self._head is None:
                self._more(0, _FIRST)
            return 0 if self._head is None else self._head.size

    def read(self, start: int, length: int) -> bytes:
        """Return bytes from a place on, as far as the file has them; none where they do not come (see ``failure``)."""
        pieces: list[memoryview] = []
        size = self.size
        with self._lock:
            length = min(length, size - start)
            while length > 0:
                piece = self._piece(start, length)
                if piece is None:
                    return b""
                pieces.append(piece)
                start, length = start + len(piece), length - len(piece)
        return b"".join(pieces)

    def _piece(self, start: int, length: int) -> memoryview | None:
        for at, span in self._spans:
            if at <= start < at + len(span):
                return span[start - at : start - at + length]
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if start == self._end else _FIRST
        answer = self._more(start, max(length, self._ahead))
        return None if answer is None else answer[:length]

    def _more(self, start: int, length: int) -> memoryview | None:
        try:
            answer = fetch(self._href, start, length)
            if self._head is not None and answer.head != self._head:
                raise ReadError(f"reading {public(self._href)}", "another file than a moment ago", "the same file",
                                "The file was replaced while it was read: build its record anew.")  # fmt: skip
        except RasteretDaskError as error:
            # raised through GDAL it would only be printed
            self.failure = error.with_traceback(None)
            return None
        self._head, self._end = answer.head, start + len(answer.data)
        if len(answer.data) <= _KEPT:
            self._spans.append((start, answer.data))
            while sum(len(span) for _, span in self._spans) > _KEPT:
                self._spans.popleft()
        return answer.data or None


class _Handle(io.RawIOBase):
    """One of GDAL's handles of a file, with a place of its own."""

    def __init__(self, file: GdalFile) -> None:
        self._file, self._at = file, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._at, size if size >= 0 else self._file.size)
        self._at += len(data)
        return data


class _Files(FileContainer):  # type: ignore[misc]
    """What rasterio asks of a file system: the files that are registered, and nothing beside them."""

    def open(self, path: str, mode: str = "r", **_: Any) -> Any:
        if path == _ANCHOR:
            return io.BytesIO(_tiny())
        file = _FILES.get(path)
        if file is None or "w" in mode or "a" in mode or "+" in mode or not file.size:
            raise FileNotFoundError(path)
        return _Handle(file)

    def isfile(self, path: str) -> bool:
        return path in _FILES

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def rm(self, path: str) -> None:
        raise PermissionError(path)

    def size(self, path: str) -> int:
        file = _FILES.get(path)
        if file is None:
            raise FileNotFoundError(path)
        return file.size


_ANCHOR = "anchor.tif"
_FILES: dict[str, GdalFile] = {}
_NUMBERS = count()
_CONTEXT: list[Any] = []
"""The context that holds rasterio's variables, the path below which GDAL finds files, and the raster that keeps it."""
_LOCK = Lock()


def _added(file: GdalFile) -> str:
    # the name tells in GDAL's own messages which file is meant, and holds no secret
    last = re.sub(r"[^\w.-]", "_", urlsplit(public(file._href)).path.rpartition("/")[2])[-100:]
    name = f"{next(_NUMBERS)}/{last or 'file'}"
    _FILES[name] = file
    return name


def _prefix() -> str:
    """Return the path below which GDAL finds the files; the first call registers it."""
    with _LOCK:
        if not _CONTEXT:
            context = copy_context()
            anchor = context.run(lambda: rasterio.open(_ANCHOR, opener=_Files(), driver="GTiff"))
            _CONTEXT.extend((context, anchor.name.removesuffix(_ANCHOR), anchor))
            atexit.register(_close)
    return str(_CONTEXT[1])


def _close() -> None:
    """Close what is open before Python ends: GDAL closes what is left afterwards, when its callbacks are gone."""
    for file in list(_FILES.values()):
        file.close()
    _CONTEXT[0].run(_CONTEXT[2].close)


def _tiny() -> bytes:
    profile = {"width": 1, "height": 1, "count": 1, "dtype": "uint8", "transform": Affine(1, 0, 0, 0, -1, 1)}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", **profile):
            pass
        return bytes(memory.read())


def _renew() -> None:
    global _LOCK
    _LOCK = Lock()


os.register_at_fork(after_in_child=_renew)
