# SPDX-License-Identifier: Apache-2.0
"""What a STAC item says of an asset's numbers: their kind, and what class codes stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasteret_dask.rules.kinds import KindName

CLASSES = "classification:classes"
"""The field of STAC's classification extension."""

__all__ = ["CLASSES", "POLARIZATIONS", "Classes", "classes_of", "kind_said"]

Classes = tuple[tuple[int, str], ...]
"""(code, name) of each class."""

_ANGLES = frozenset({"azimuth", "incidence-angle", "sun-azimuth", "sun-elevation"})
"""Asset roles of STAC's best practices."""
POLARIZATIONS = frozenset({"hh", "hv", "vh", "vv"})
"""What radar bands are called after."""


def kind_said(
    key: str, asset: Mapping[str, Any], band: Mapping[str, Any], item: Mapping[str, Any]
) -> KindName | None:
    """Return the kind of one band of an asset, None where the item is silent.

    Parameters
    ----------
    key
        The asset's key.
    asset, band
        The asset, and what it says of this band (``bands``, ``raster:bands`` and ``eo:bands`` together).
    item
        The item's properties.

    Notes
    -----
    Classes are told by the classification extension (on the band or the asset) or by the file extension's ``values``;
    bits by ``classification:bitfields``. What has a unit, a scale or a place in the spectrum is measured.
    """
    for place in (band, asset):
        if place.get("classification:bitfields"):
            return "bitfield"
        if any(c.get("nodata") is not True for c in _dicts(place.get(CLASSES))):
            return "class"
    if _ANGLES & set(asset.get("roles") or ()):
        return "angle"
    if asset.get("sar:polarizations") or (item.get("sar:polarizations") and key.casefold() in POLARIZATIONS):
        return "backscatter"
    if str(band.get("unit") or "").casefold() in ("kelvin", "k"):
        return "temperature"
    common = band.get("eo:common_name") or band.get("common_name")
    scaled = any(place.get(n) not in (None, default) for n, default in _IDENTITY for place in (band, asset))
    if common or scaled or band.get("unit"):
        return "continuous"
    return "class" if band.get("file:values") or asset.get("file:values") else None


_IDENTITY = (("scale", 1), ("offset", 0), ("raster:scale", 1), ("raster:offset", 0))


def classes_of(asset: Mapping[str, Any], band: Mapping[str, Any]) -> Classes:
    """Return what the codes of a class band stand for; empty where the item does not tell.

    Parameters
    ----------
    asset, band
        As in :func:`kind_said`.
    """
    for place in (band, asset):
        stated = [c for c in _dicts(place.get(CLASSES)) if _is_code(c.get("value"))]
        if stated:
            return tuple((int(c["value"]), _name(c)) for c in stated)
        listed = [v for v in _dicts(place.get("file:values")) if isinstance(v.get("values"), list)]
        if listed:
            return tuple(
                (int(c), str(v.get("summary") or c)) for v in listed for c in v["values"] if _is_code(c)
            )
    return ()


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


def _is_code(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (isinstance(value, float) and value.is_integer())) and abs(value) < 2**63


def _name(fields: Mapping[str, Any]) -> str:
    """Return a class's name: version 1 of the extension had only a description."""
    return str(fields.get("name") or fields.get("title") or fields.get("description") or fields["value"])
