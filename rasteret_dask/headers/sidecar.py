# SPDX-License-Identifier: Apache-2.0
"""What GDAL's sidecar file (``.aux.xml``) of a local raster says of it: names of classes, attribute tables, a CRS."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import replace

from rasteret_dask.crs import number
from rasteret_dask.errors import GridError
from rasteret_dask.headers.page import Header
from rasteret_dask.net.remote import is_local, local_path

__all__ = ["with_sidecar"]

_MOST = 16 * 1024 * 1024  # bytes of a sidecar that are read: 65,536 names take 2 MB


def with_sidecar(header: Header, href: str) -> Header:
    """Return a header with the classes that a local file's sidecar names, and the CRS where the file has none.

    Parameters
    ----------
    header
        Of the file itself.
    href
        Where the file is. Sidecars far away are not asked for: each would be a request.

    Notes
    -----
    Bands with category names, or with an attribute table of type ``thematic``, hold classes (GDAL's PAM format).
    """
    place = f"{local_path(href)}.aux.xml" if is_local(href) else ""
    if not place or not os.path.isfile(place) or os.path.getsize(place) > _MOST:
        return header
    try:
        with open(place, "rb") as file:
            text = file.read()
        root = ElementTree.fromstring(b"<PAMDataset/>" if b"<!" in text else text)
    except (OSError, ElementTree.ParseError):
        return header  # GDAL, too, reads the raster then
    srs = root.findtext("SRS")
    if header.epsg is None and srs:
        with suppress(GridError):  # GDAL, too, has no CRS then
            header = replace(header, epsg=number(srs))
    thematic = list(header.thematic or (False,) * header.samples)
    categories = list(header.categories or ((),) * header.samples)
    for band in root.findall("PAMRasterBand"):
        index = band.get("band", "")
        if not index.isdigit() or not 1 <= int(index) <= header.samples:
            continue
        names = [item.text or "" for item in band.findall("CategoryNames/Category")]
        table = band.find("GDALRasterAttributeTable")
        at = int(index) - 1
        thematic[at] |= any(names) or (table is not None and table.get("tableType") == "thematic")
        categories[at] = tuple((n, name) for n, name in enumerate(names) if name) or categories[at]
    if not any(thematic):
        return header
    return replace(header, thematic=tuple(thematic), categories=tuple(categories))
