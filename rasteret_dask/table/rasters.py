# SPDX-License-Identifier: Apache-2.0
"""Which assets of a STAC item are rasters that become bands, and why each other one is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from rasteret_dask.net.remote import is_local

__all__ = ["SUFFIXES", "LeftAsset", "raster_assets"]

LeftAsset = tuple[str, str]
"""(asset key, why it is left out)."""

_MEDIA_TYPES = (
    "image/tiff", "image/geotiff", "image/x.geotiff", "image/x-geotiff", "image/vnd.stac.geotiff", "image/jp2",
    "image/jpeg2000", "application/geotiff", "application/x-geotiff",
)  # fmt: skip
_OTHER_FORMATS = re.compile(
    r"image/(png|jpe?g|gif|webp|svg\b)|text/|video/|.*[/+](json|xml|html|pdf|zip|x-hdf5?|hdf5?|netcdf|x-netcdf)$"
)
SUFFIXES = (".tif", ".tiff", ".gtiff", ".jp2", ".j2k")
_NOT_DATA = {"thumbnail", "overview", "visual", "metadata", "preview"}
_PREVIEW = re.compile(
    r"^(visual|preview|overview|thumbnail|rendered_preview|tci|pvi)([_-].*)?$", re.IGNORECASE
)


def raster_assets(
    item: Mapping[str, Any], bands: Collection[str] = ()
) -> tuple[dict[str, Mapping[str, Any]], list[LeftAsset]]:
    """Return the raster assets of an item, and the others with the reason of each.

    Parameters
    ----------
    item
        The STAC item.
    bands
        Asset keys that are no previews, whatever their roles.

    Notes
    -----
    A raster is what has a media type of TIFF or JPEG 2000, or an href that ends as one and no type of another format
    (``application/octet-stream``, an unknown type, none). Previews are taken only where there is nothing else.
    """
    rasters: dict[str, Mapping[str, Any]] = {}
    left: list[LeftAsset] = []
    for key, asset in item["assets"].items():
        reason = _no_raster(asset)
        if reason is None:
            rasters[key] = asset
        else:
            left.append((key, reason))
    for key in [key for key in rasters if key.endswith("-jp2") and key.removesuffix("-jp2") in rasters]:
        del rasters[key]  # Earth Search's originals, in a bucket whose reader pays
        left.append((key, f"the same pixels as asset {key.removesuffix('-jp2')!r}, in JPEG 2000"))
    previews = {
        key: why
        for key, asset in rasters.items()
        if key not in bands and (why := _preview(key, asset)) is not None
    }
    if len(previews) < len(rasters):
        left += previews.items()
        rasters = {key: asset for key, asset in rasters.items() if key not in previews}
    return rasters, left


def _no_raster(asset: Any) -> str | None:
    """Return why an asset is no raster, None where it is one."""
    if not isinstance(asset, Mapping):
        return "no asset: it has no fields"
    href, media = asset.get("href"), str(asset.get("type") or "").partition(";")[0].strip().lower()
    if not isinstance(href, str) or not href:
        return "it has no href"
    if media in _MEDIA_TYPES:
        return None
    if _OTHER_FORMATS.match(media):
        return f"{media} is neither TIFF nor JPEG 2000"
    if _suffix(href) in SUFFIXES:
        return None
    return f"its type is {media or 'unknown'}, and its href does not end with {', '.join(SUFFIXES)}"


def _suffix(href: str) -> str:
    try:
        path = href if is_local(href) else urlsplit(href).path
    except ValueError:  # no URL: told where hrefs are looked at
        path = href
    return os.path.splitext(path)[1].lower()


def _preview(key: str, asset: Mapping[str, Any]) -> str | None:
    """Return why a raster is a picture of the data or about it, None where it is data."""
    roles = sorted(_NOT_DATA & {str(role) for role in asset.get("roles") or ()})
    if roles:
        return f"its role is {roles[0]}"
    return "it is a preview, as its key says" if _PREVIEW.match(key) else None
