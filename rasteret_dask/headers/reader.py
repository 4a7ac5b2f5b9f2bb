# SPDX-License-Identifier: Apache-2.0
"""COG headers, parsed once, many at once."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from types import TracebackType
from urllib.parse import urlsplit

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.extent import misplaced
from rasteret_dask.headers.page import Header, HeaderRefusedError, UnsupportedError, unlisted_mask
from rasteret_dask.headers.rangefile import FIRST, RangeFile
from rasteret_dask.headers.sidecar import with_sidecar
from rasteret_dask.headers.tiff import BROKEN, from_tiff
from rasteret_dask.net.remote import is_local, local_path, redact

__all__ = ["Header", "HeaderReader", "read_headers"]

WORKERS = 48
"""Headers under way: at 30 ms to the first byte, 15 % more files a second than 32; 64 only get in each other's way."""

_FIRSTS = tuple(FIRST << n for n in range(6))
"""Bytes that a first request may ask for: up to 1 MiB."""
_ROUND_TRIP = 1024 * 1024
"""Bytes that come in the time of a further request: 30 ms at 35 MB/s."""


class HeaderReader:
    """Reads headers on threads of its own, many at once; each file is read once.

    Parameters
    ----------
    workers
        Requests in flight.
    keep_tiles
        Tiles, over all files, whose places are remembered: about 80 bytes each.

    Notes
    -----
    How much the first request of a file asks for follows from what the headers of that host's files have needed so
    far: files with large tile tables take one request each, too, but for the first few, and a single large header
    does not make the requests of all others large.
    """

    def __init__(self, workers: int = WORKERS, keep_tiles: int = 500_000) -> None:
        self._pool = ThreadPoolExecutor(max(1, workers), "header")
        self._limit = keep_tiles
        self._held = 0
        self._coming: dict[str, Future[Header | str]] = {}
        self._kept: OrderedDict[str, Future[Header | str]] = OrderedDict()
        self._needs: dict[str, Counter[int]] = {}
        self._lock = Lock()

    def __enter__(self) -> HeaderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after an error nobody waits for what has not begun
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def submit(self, href: str) -> Future[Header | str]:
        """Ask for a file's header, and do not wait.

        Parameters
        ----------
        href
            A local path, or a URL of scheme file, http, https, s3, gs or az.

        Returns
        -------
        Future
            Of the header, or of the reason (without query strings or keys) why it is unreadable. A file asked for
            again has the same one while it is remembered; failures are not, once they are known.
        """
        with self._lock:
            if href in self._kept:
                self._kept.move_to_end(href)
                return self._kept[href]
            if href in self._coming:
                return self._coming[href]
            future = self._coming[href] = self._pool.submit(self._read, href)
        future.add_done_callback(lambda done: self._remember(href, done))
        return future

    def read(self, hrefs: Iterable[str]) -> dict[str, Header | str]:
        """Return {href: its header, or why it is unreadable} of every distinct href."""
        coming = {href: self.submit(href) for href in dict.fromkeys(hrefs)}
        return {href: future.result() for href, future in coming.items()}

    def _read(self, href: str) -> Header | str:
        host = _host(href)
        with self._lock:
            first = _first_bytes(self._needs.get(host, Counter()))
        header, needed = _read_header(href, first)
        fitting = next((size for size in _FIRSTS if needed <= size), None)
        if fitting is not None and isinstance(header, Header):
            with self._lock:
                self._needs.setdefault(host, Counter())[fitting] += 1
        return header

    def _remember(self, href: str, done: Future[Header | str]) -> None:
        with self._lock:
            del self._coming[href]
            if done.cancelled() or done.exception() is not None or isinstance(done.result(), str):
                return
            self._kept[href] = done
            self._held += _tiles(done)
            while self._held > self._limit:
                self._held -= _tiles(self._kept.popitem(last=False)[1])


def read_headers(hrefs: Sequence[str], workers: int = WORKERS) -> dict[str, Header | str]:
    """Read the header of every distinct href.

    Parameters
    ----------
    hrefs
        Local paths, or URLs of scheme file, http, https, s3, gs or az.
    workers
        Requests in flight.

    Returns
    -------
    dict
        {href: its Header, or the reason why it is unreadable}. Reasons hold no query strings or keys.
    """
    distinct = list(dict.fromkeys(hrefs))
    if not distinct:
        return {}
    with HeaderReader(min(workers, len(distinct))) as reader:
        return reader.read(distinct)


def _first_bytes(needs: Mapping[int, int]) -> int:
    """Return how much to ask for at first: what costs least over headers like those before, by size.

    Each file costs its first request's bytes, and a round trip more where its header is larger.
    """
    beyond = sum(needs.values())
    if not beyond:
        return FIRST
    costs = {}
    for size in _FIRSTS:
        beyond -= needs.get(size, 0)
        costs[size] = size * sum(needs.values()) + beyond * _ROUND_TRIP
    return min(costs, key=lambda size: costs[size])


def _read_header(href: str, first: int) -> tuple[Header | str, int]:
    """Return the header, or why there is none, and how many bytes of the file's beginning it took."""
    try:
        file = RangeFile(href, first)
    except (ReadError, TrustError) as error:
        return error.found, 0
    return _parsed(href, file), file.needed


def _parsed(href: str, file: RangeFile) -> Header | str:
    if file.driver is None:
        return "neither a TIFF nor a JPEG 2000 file"
    header: Header | str
    try:
        if file.driver != "GTiff":
            raise UnsupportedError("not a TIFF file")
        header = from_tiff(file)
    except ReadError as error:
        return error.found
    except HeaderRefusedError as error:
        return f"refused: {error}"
    except (UnsupportedError, *BROKEN) as error:
        # a broken or georeferenceless TIFF may still be one to GDAL, with its sidecar files
        from rasteret_dask.headers.gdal import from_gdal  # it imports rasterio, which few files need here

        header = from_gdal(href, file.driver, redact(str(error)) or type(error).__name__)
        if isinstance(header, Header):
            header = replace(header, size=file.head.size, etag=file.head.etag)
    if isinstance(header, Header):
        header = with_sidecar(_with_mask(href, header), href)
        return _objection(header) or header
    return header


def _with_mask(href: str, header: Header) -> Header:
    """Return a local file's header with the mask beside it (``.msk``); far away nobody asks for one."""
    masked = any(page.kind == "mask" for page in header.pages)
    if masked or not is_local(href) or not os.path.exists(local_path(href) + ".msk"):
        return header
    return replace(header, pages=(*header.pages, unlisted_mask(header.pages[0])))


def _objection(header: Header) -> str | None:
    image = header.pages[0]
    if header.epsg is not None:  # else the record's CRS is held against it, once it is settled
        reason = misplaced(header.epsg, image.transform, image.width, image.height)
        if reason is not None:
            return f"refused: {reason}"
    return None


def _host(href: str) -> str:
    try:
        return urlsplit(href).netloc
    except ValueError:
        return ""


def _tiles(future: Future[Header | str]) -> int:
    header = future.result()
    return 0 if isinstance(header, str) else sum(1 + len(page.tile_offsets) for page in header.pages)
