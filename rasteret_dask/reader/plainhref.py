# SPDX-License-Identifier: Apache-2.0
"""A user's own hrefs become assets; the header of each file is asked for once per process."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from rasteret_dask.catalogs.signing import keep_apart
from rasteret_dask.crs import travelling
from rasteret_dask.errors import RasteretDaskError, ReadError
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.net.remote import redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.table.records import Asset, Level

__all__ = ["HEADERS", "HeaderCache", "assets_at"]

KEPT_TILES = 1_000_000
"""Tiles whose places a process keeps for plain hrefs: about 80 MB, the headers of 5000 bands of Sentinel-2."""

_ONE_BAND = re.compile(r"vrt://(?P<href>.+)\?bands=(?P<band>[1-9]\d*)", re.IGNORECASE)


class HeaderCache:
    """Headers by href, each asked for once; those not used for longest are dropped.

    Parameters
    ----------
    tiles
        Tiles, over all levels and files, whose places are kept.

    Notes
    -----
    Why a header could not be read is not kept: another attempt may do better.
    """

    def __init__(self, tiles: int) -> None:
        self._limit = tiles
        self._held = 0
        self._kept: OrderedDict[str, Header] = OrderedDict()
        self._coming: dict[str, Future[Header | str]] = {}
        self._lock = threading.Lock()

    def headers(self, hrefs: Sequence[str]) -> dict[str, Header | str]:
        """Return {href: header, or why it cannot be read}; those not kept are asked for concurrently."""
        with self._lock:
            found: dict[str, Header | str] = {}
            for href in self._kept.keys() & set(hrefs):
                self._kept.move_to_end(href)
                found[href] = self._kept[href]
            others = {href: self._coming[href] for href in hrefs if href in self._coming}
            mine = [href for href in dict.fromkeys(hrefs) if href not in found and href not in others]
            self._coming |= {href: Future() for href in mine}
        read: Mapping[str, Header | str] = dict.fromkeys(
            mine, "that another thread gave up reading its header"
        )
        try:
            read = read_headers(mine)
        finally:
            self._keep(read)
        return {**found, **read, **{href: future.result() for href, future in others.items()}}

    def _keep(self, read: Mapping[str, Header | str]) -> None:
        with self._lock:
            for href, header in read.items():
                self._coming.pop(href).set_result(header)
                if isinstance(header, Header):
                    self._kept[href] = header
                    self._held += _tiles(header)
            while self._held > self._limit:
                self._held -= _tiles(self._kept.popitem(last=False)[1])

    def forget(self, href: str) -> None:
        """Drop a header, perhaps of a file that has changed since."""
        with self._lock:
            header = self._kept.pop(href, None)
            self._held -= 0 if header is None else _tiles(header)


HEADERS = HeaderCache(KEPT_TILES)
"""The process's own."""


def assets_at(hrefs: Sequence[str]) -> list[Asset | RasteretDaskError]:
    """Return what each href names, from headers read together, or why that cannot be read.

    Parameters
    ----------
    hrefs
        Local paths (also from remote catalogs: nothing tells here where an href comes from), URLs of scheme file,
        http, https, s3, gs or az, or ``vrt://<one of these>?bands=<n>``: band n, from 1, of a file of several.

    Returns
    -------
    list of Asset or RasteretDaskError
        In their order. TrustError for other VRT text, GDAL's virtual file systems, link-local and metadata
        addresses; ReadError for headers that cannot be read, for a band that is not there, and for a file of
        several bands none of which is named.
    """
    named: list[tuple[str, int | None] | RasteretDaskError] = []
    for href in hrefs:
        try:
            named.append(_named(href))
        except RasteretDaskError as error:
            named.append(error)
    headers = HEADERS.headers([name[0] for name in named if isinstance(name, tuple)])
    return [
        name if isinstance(name, RasteretDaskError) else _asset(*name, headers[name[0]]) for name in named
    ]


def _named(href: str) -> tuple[str, int | None]:
    """Return the file and the number of the band, None where only one is expected."""
    one = _ONE_BAND.fullmatch(href)
    file, band = (one["href"], int(one["band"])) if one else (href, None)
    return keep_apart(checked(resolve(file, None), local=True, subject=f"asset {redact(href)}")), band


def _asset(href: str, band: int | None, header: Header | str) -> Asset | ReadError:
    subject = f"asset {redact(href)}"
    if isinstance(header, str):
        return ReadError(subject, header, "a header that can be read")
    alone = header.samples == 2 and header.alpha is not None  # one band beside its alpha channel
    if band is None and header.samples > 1 and not alone:
        remedy = f"Name one as vrt://{redact(href)}?bands=1, or leave the asset out with assets=[...]."
        return ReadError(subject, f"{header.samples} bands in the file", "one band", remedy)
    index = int(header.alpha == 0) if band is None else band - 1
    if index >= header.samples:
        return ReadError(subject, f"{header.samples} bands in the file", f"band {band}, counted from 1")
    if header.epsg is None:
        remedy = "Build a collection of it: build_from_stac(..., crs=) gives it one."
        return ReadError(subject, "no CRS in the file", "a file that says where it lies", remedy)
    return Asset(
        record_id="plain href",
        band=f"band {index + 1}",
        href=href,
        band_index=index,
        epsg=travelling(header.epsg),
        scale=1.0,
        offset=0.0,
        rule="identity",
        nodata=header.nodata,
        dtype=header.dtype,
        role="data",
        kind=header.kind_of(index),
        size=header.size,
        etag=header.etag,
        levels=tuple(Level(**fields) for fields in header.levels_of(index)),
        alpha=None if header.alpha == index else header.alpha,
        placement=header.placement,
    )


def _tiles(header: Header) -> int:
    return sum(1 + len(page.tile_offsets) for page in header.pages)
