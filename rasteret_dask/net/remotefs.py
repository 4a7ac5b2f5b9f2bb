# SPDX-License-Identifier: Apache-2.0
"""Objects at URLs as a pyarrow filesystem, by our own transport: its retries, signatures and catalog's rules."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from rasteret_dask.errors import ReadError
from rasteret_dask.net import remote

__all__ = ["filesystem", "version_of"]


def filesystem() -> pafs.FileSystem:
    """Return a filesystem whose paths are URLs (http, https, s3, gs, az), read-only; it pickles."""
    return pafs.PyFileSystem(_Remote())


def version_of(system: pafs.FileSystem, path: str) -> str:
    """Return what tells a file's content apart from an older one's: its ETag, or its time of change."""
    if isinstance(system, pafs.PyFileSystem) and isinstance(system.handler, _Remote):
        return str(remote.fetch(path, 0, 1).head.etag)
    return str(system.get_file_info(path).mtime_ns)


class _Object(io.RawIOBase):
    """An object that is read by ranges."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = remote.fetch(url, 0, 1).head.size  # a signature for GET may not allow HEAD
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        data = remote.get(self._url, self._at, length) if length else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Remote(pafs.FileSystemHandler):  # type: ignore[misc]
    """What pyarrow asks of a filesystem."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remote)

    def __hash__(self) -> int:
        return hash(_Remote)

    def get_type_name(self) -> str:
        return "rasteret_dask"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        try:
            return pafs.FileInfo(path, pafs.FileType.File, size=remote.fetch(path, 0, 1).head.size)
        except remote.MissingError:
            lists = not path.startswith("http") and remote.listing(path)
            return pafs.FileInfo(path, pafs.FileType.Directory if lists else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found = remote.listing(selector.base_dir)
        return [
            pafs.FileInfo(remote.join(selector.base_dir, name), pafs.FileType.File, size=size)
            for name, size in found.items()
        ]

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Object(path), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def _refuse(self, *_: Any) -> Any:
        raise ReadError("a remote table", "a request to write", "reading only")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refuse
