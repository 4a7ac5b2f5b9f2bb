# SPDX-License-Identifier: Apache-2.0
"""Ranges of files: neighbours put together, fetched, and held against the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.net import remote
from rasteret_dask.table.records import Asset

T = TypeVar("T")

__all__ = [
    "Part",
    "Ranges",
    "Span",
    "check",
    "coalesced",
    "named",
    "subject",
]

GAP_BYTES = 32 * 1024
"""Bytes between two ranges that are rather read than asked for apart."""

SPAN_BYTES = 2 * 2**20
"""Of one request, at most, where it is for several tiles."""


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """The bytes of one thing in a file."""

    start: int
    length: int
    what: T

    @property
    def stop(self) -> int:
        """The first byte after it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Span(Generic[T]):
    """Neighbouring parts that one request brings."""

    start: int
    length: int
    parts: tuple[Part[T], ...]


def coalesced(parts: Sequence[Part[T]], gap: int = GAP_BYTES, most: int = SPAN_BYTES) -> Iterator[Span[T]]:
    """Put parts together that lie at most ``gap`` bytes apart, up to ``most`` bytes a request."""
    run: list[Part[T]] = []
    stop = 0
    for part in sorted(parts, key=lambda p: (p.start, p.length)):
        if run and (part.start - stop > gap or max(stop, part.stop) - run[0].start > most):
            yield Span(run[0].start, stop - run[0].start, tuple(run))
            run = []
        stop = max(stop, part.stop) if run else part.stop
        run.append(part)
    if run:
        yield Span(run[0].start, stop - run[0].start, tuple(run))


@dataclass(slots=True)
class Ranges:
    """The file of an asset, for the ranges that one batch takes of it: its host is looked at once, by the first."""

    asset: Asset
    """Names the file, with the size and ETag it had when its header was read."""
    _place: remote.Folder | None = None
    _looking: Lock = field(default_factory=Lock)

    def fetch(self, start: int, length: int) -> Any:
        """Return a range as a buffer, after a look whether the file is the one that was indexed.

        Parameters
        ----------
        start, length
            The range, bytes.

        Raises
        ------
        ReadError
            When the store refuses, the file has changed, or the range is not all there.
        """
        asset = self.asset

        def doing() -> str:
            return subject(asset, f"reading bytes {start}-{start + length - 1}")

        if asset.size is not None and start + length > asset.size:
            raise ReadError(doing(), f"a file of {asset.size} bytes", "a range inside of it", _ANEW)
        data, size, etag = _typed(partial(self._range, start, length), doing)
        _check(asset, size, etag, doing)
        if len(data) < length:
            raise ReadError(doing(), f"{len(data)} bytes, then the file's end", f"{length} bytes", _ANEW)
        return data

    def _range(self, start: int, length: int) -> tuple[Any, int, str | None]:
        href = self.asset.href
        try:
            with self._looking:
                if self._place is None:
                    self._place = remote.Folder.of(href)
            found = self._place.fetch("", start, length)
        except ReadError as error:
            if error.found != remote.NO_RANGE:
                raise
            return b"", *_head(href)  # its size says more than that
        return found.data, *_version(href, found.head)


def check(asset: Asset) -> None:
    """Raise a ReadError where an asset's file is not there, or not the one that was indexed."""

    def doing() -> str:
        return subject(asset, "opening it")

    if asset.size is not None or asset.etag is not None:
        _check(asset, *_typed(partial(_head, asset.href), doing), doing)


def _typed(ask: Callable[[], T], doing: Callable[[], str]) -> T:
    failure: ReadError
    try:
        return ask()
    except (remote.MissingError, FileNotFoundError, NotADirectoryError):
        remedy = "Restore the file, or leave the record out."
        failure = ReadError(doing(), "nothing there (404)", "the file that was indexed", remedy)
    except (ReadError, TrustError, OSError, ValueError) as error:
        found = error.found if isinstance(error, ReadError | TrustError) else _reason(error)
        remedy = "Check that this worker may read it; try again if the store was busy."
        failure = ReadError(doing(), found, "its bytes", _ANEW if found == remote.NO_RANGE else remedy)
    try:
        raise failure  # outside of the except block: what it would be chained to may name a signature
    finally:
        del failure  # a frame that holds its own error is a cycle, and this one leads to the output


def _reason(error: OSError | ValueError) -> str:
    """Return what went wrong, without the path."""
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _head(href: str) -> tuple[int, str | None]:
    return _version(href, remote.head(href))


def _version(href: str, head: remote.Head) -> tuple[int, str | None]:
    """Return what a file is held against; a local ETag is inode and time, which a copy does not keep."""
    return head.size, None if remote.is_local(href) else head.etag


def _check(asset: Asset, size: int, etag: str | None, doing: Callable[[], str]) -> None:
    if (asset.size is not None and size != asset.size) or (etag and asset.etag and etag != asset.etag):
        raise ReadError(
            doing(),
            _described(size, etag),
            f"{_described(asset.size, etag and asset.etag)}, as indexed",
            _ANEW,
        )


def _described(size: int | None, etag: str | None) -> str:
    return ", ".join([f"a file of {size} bytes"] * (size is not None) + [f"ETag {etag}"] * bool(etag))


_ANEW = "The file has changed since it was indexed: build its record anew."


def subject(asset: Asset, doing: str) -> str:
    """Name an asset and what is done with it, without what must stay secret."""
    return f"{named(asset)}, {doing}"


def named(asset: Asset) -> str:
    """Name an asset, its record and its file, without what must stay secret."""
    return f"asset {asset.band!r} of record {asset.record_id!r} ({remote.public(asset.href)})"
