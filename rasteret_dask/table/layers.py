"""Which bands an item's assets hold, and what the item says of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any
from urllib.parse import urlsplit

from rasteret_dask.catalogs.bands import Band, Dataset
from rasteret_dask.errors import BandError
from rasteret_dask.headers.nodata import text_of
from rasteret_dask.net.remote import is_local
from rasteret_dask.rules.kinds import KindName
from rasteret_dask.table.itemkinds import Classes, classes_of, kind_said

__all__ = ["Layer", "check_bands", "check_kinds", "epsg_of", "is_telling", "layers_of", "restrict"]

_MEDIA_TYPES = ("image/tiff", "image/geotiff", "image/vnd.stac.geotiff", "image/jp2")
_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k")
_NOT_DATA = {"thumbnail", "overview", "visual", "metadata", "preview"}
_PREVIEW = re.compile(
    r"^(visual|preview|overview|thumbnail|rendered_preview|tci|pvi)([_-].*)?$", re.IGNORECASE
)
_PREFIX = re.compile(
    r"^(SR|ST|OLI|TIRS)_", re.IGNORECASE
)  # USGS's products and sensors; TM's B4 is not OLI's
_RESOLUTION = re.compile(r"_(\d+)m$")
_COUNTED = re.compile(r"_\d+$")
_NAMELESS = re.compile(r"a|alpha|mask|opacity|transparency|(.*[_ -])?(b|band)?\d+", re.IGNORECASE)
_CLEAN = re.compile(r"^\w[\w.\-]*$")


@dataclass(frozen=True, slots=True)
class Layer:
    """One band of one item: where it is, and what the item says of it (None where it is silent)."""

    band: str
    """The sensor's code, or the item's own name."""
    href: str
    """As the item gives it; see :func:`rasteret_dask.net.trust.resolve`."""
    band_index: int
    """Position in the file, from 0."""
    asset: str
    """The provider's key."""
    dataset: Dataset | None = None
    known: Band | None = None
    """What the dataset says of the band."""
    common_name: str | None = None
    scale: float | None = None
    offset: float | None = None
    nodata: str | None = None
    """As the item spells it."""
    dtype: str | None = None
    epsg: int | None = None
    transform: tuple[float, ...] | None = None
    """a, b, c, d, e, f."""
    shape: tuple[int, int] | None = None
    """Rows, columns."""
    samples: int = 1
    """Bands the asset is said to hold."""
    kind: KindName | None = None
    """What the item says the numbers are."""
    classes: Classes = ()
    """What the item says the codes of a class band stand for."""
    declared: bool = True
    """False where the item lists no bands: the file may have more of them."""
    measured: frozenset[int] = frozenset()
    """Positions of the asset's bands that the item names after what they measure: none of them is an alpha channel."""


def layers_of(item: Mapping[str, Any], dataset: Dataset | None) -> dict[str, Layer]:
    """Return {band: layer} of an item's raster assets.

    Parameters
    ----------
    item
        The STAC item: 0.7, 1.0 (``eo:bands``, ``raster:bands``) or 1.1 (``bands``).
    dataset
        Only its bands are kept, under their codes. Without it, all raster assets are kept, under the item's
        own band names where they are unique, else under the asset keys.
    """
    assets = _raster_assets(item)
    offered = [layer for key, asset in assets.items() for layer in _offered(item, key, asset)]
    if dataset is None:
        return _named_by_item(offered)
    best: dict[str, tuple[tuple[int, float], Layer]] = {}
    for layer, name in offered:
        for rank, band, index in _matches(layer, name, dataset):
            score = (rank, _gsd(assets[layer.asset], layer))
            if band.code not in best or score < best[band.code][0]:
                best[band.code] = score, _named(layer, band, dataset, index)
    return {band.code: best[band.code][1] for band in dataset.bands if band.code in best}


def restrict(layers: Mapping[str, Layer], bands: Sequence[str] | None) -> dict[str, Layer]:
    """Keep the layers whose band, common name or asset key is asked for."""
    if bands is None:
        return dict(layers)
    wanted = set(bands)
    return {band: layer for band, layer in layers.items() if wanted & set(_names(layer))}


def check_bands(all_layers: Sequence[Mapping[str, Layer]], bands: Sequence[str] | None) -> None:
    """Raise BandError when a band was asked for that no item has."""
    if bands is None or not all_layers:
        return
    names = {name for layers in all_layers for layer in layers.values() for name in _names(layer)}
    unknown = [band for band in bands if band not in names]
    if unknown:
        codes = dict.fromkeys(layer.band for layers in all_layers for layer in layers.values())
        others = sorted(names - set(codes))
        raise BandError(
            f"bands {', '.join(map(repr, unknown))}",
            "no item with such a band",
            f"one of {', '.join(codes)}" + (f" (or {', '.join(others)})" if others else ""),
            "Ask by code, common name or asset key.",
        )


def check_kinds(all_layers: Sequence[Mapping[str, Layer]], kinds: Sequence[tuple[str, str]]) -> None:
    """Raise BandError when a user names the kind of a band that no item has.

    ``map_2`` may be the second band of the file of an asset ``map`` whose item lists no bands.
    """
    listed = {name for layers in all_layers for layer in layers.values() for name in _names(layer)}
    names = [band for band, _ in kinds]
    check_bands(all_layers, [n if n in listed else _COUNTED.sub("", n) for n in names] if names else None)


def is_telling(name: Any) -> bool:
    """Tell whether a band's name may tell what it measures: ``NIR`` does, ``alpha``, ``band_4`` and ``4`` do not."""
    return isinstance(name, str) and bool(name) and not _NAMELESS.fullmatch(name)


def epsg_of(fields: Mapping[str, Any]) -> int | None:
    """Return the EPSG code of ``proj:code`` or ``proj:epsg``, None where there is none."""
    code = fields.get("proj:code")
    if isinstance(code, str) and code.upper().startswith("EPSG:") and code[5:].isdigit():
        return int(code[5:])
    number = fields.get("proj:epsg")
    return int(number) if isinstance(number, int | float) and number == number else None


def _names(layer: Layer) -> Iterator[str]:
    yield from (layer.band, layer.asset)
    if layer.common_name:
        yield layer.common_name
    if layer.known:
        yield layer.known.asset


def _properties(item: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = item.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _raster_assets(item: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the raster assets; JPEG 2000 twins of COGs are left out, and previews where there is more."""
    rasters = {k: a for k, a in item["assets"].items() if isinstance(a, Mapping) and _is_raster(a)}
    twins = {k for k in rasters if k.endswith("-jp2") and k.removesuffix("-jp2") in rasters}
    rasters = {k: a for k, a in rasters.items() if k not in twins}
    data = {
        k: a
        for k, a in rasters.items()
        if not _PREVIEW.match(k) and not _NOT_DATA & set(a.get("roles") or ())
    }
    return data or rasters


def _is_raster(asset: Mapping[str, Any]) -> bool:
    href, media = asset.get("href"), str(asset.get("type") or "").partition(";")[0].strip().lower()
    if not isinstance(href, str) or not href:
        return False
    if media:
        return media in _MEDIA_TYPES
    try:
        path = href if is_local(href) else urlsplit(href).path
    except ValueError:  # no URL: told where hrefs are looked at
        path = href
    return os.path.splitext(path)[1].lower() in _SUFFIXES


def _bands_said(item: Mapping[str, Any], asset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one dict per band of an asset: 1.1 ``bands``, or 1.0 ``eo:bands`` beside ``raster:bands``."""
    own = asset.get("bands") or ()
    eo, raster = asset.get("eo:bands") or (), asset.get("raster:bands") or ()
    table = _properties(item).get("eo:bands") or ()  # before 1.0 assets point into the item's list by number
    said: list[dict[str, Any]] = []
    for n in range(max(len(own), len(eo), len(raster))):
        fields: dict[str, Any] = {}
        for bands in (raster, eo, own):
            one = bands[n] if n < len(bands) else None
            if isinstance(one, int):
                one = table[one] if 0 <= one < len(table) else None
            fields.update((k, v) for k, v in (one or {}).items() if v is not None)
        said.append(fields)
    return said


def _offered(
    item: Mapping[str, Any], key: str, asset: Mapping[str, Any]
) -> Iterator[tuple[Layer, str | None]]:
    """Yield each band of an asset as a layer named by its key, with the item's own name for it."""
    said = _bands_said(item, asset)
    properties = _properties(item)
    for n, band in enumerate(said or [{}]):
        fields = {**properties, **asset, **band}
        name = band.get("name")
        yield (
            Layer(
                band=key if len(said) <= 1 else f"{key}_{n + 1}",
                href=str(asset["href"]),
                band_index=n,
                asset=key,
                common_name=band.get("eo:common_name") or band.get("common_name"),
                scale=_number(_first(band, asset, names=("raster:scale", "scale"))),
                offset=_number(_first(band, asset, names=("raster:offset", "offset"))),
                nodata=text_of(_first(band, asset, names=("nodata",))),
                dtype=_first(band, asset, names=("data_type",)),
                epsg=epsg_of(asset) or epsg_of(properties),
                transform=_floats(fields.get("proj:transform"), (6, 9)),
                shape=_shape(fields.get("proj:shape")),
                samples=max(1, len(said)),
                kind=kind_said(key, asset, band, properties),
                classes=classes_of(asset, band),
                declared=bool(said),
                measured=frozenset(
                    i
                    for i, b in enumerate(said)
                    if b.get("eo:common_name") or b.get("common_name") or is_telling(b.get("name"))
                ),
            ),
            name if isinstance(name, str) and _CLEAN.match(name) else None,
        )


def _named_by_item(offered: Sequence[tuple[Layer, str | None]]) -> dict[str, Layer]:
    names = [name or layer.band for layer, name in offered]
    by_item = [names.count(name) == 1 for name in names]
    layers = [
        _renamed(layer, name if unique else layer.band)
        for (layer, _), name, unique in zip(offered, names, by_item, strict=True)
    ]
    return {layer.band: layer for layer in layers}


def _renamed(layer: Layer, band: str) -> Layer:
    fields = {name: getattr(layer, name) for name in Layer.__slots__}
    return Layer(**{**fields, "band": band})


def _named(layer: Layer, band: Band, dataset: Dataset, index: int) -> Layer:
    fields = {name: getattr(layer, name) for name in Layer.__slots__}
    fields |= {"band": band.code, "dataset": dataset, "known": band, "band_index": index}
    return Layer(**{**fields, "common_name": band.common_name or layer.common_name})


def _matches(layer: Layer, name: str | None, dataset: Dataset) -> Iterator[tuple[int, Band, int]]:
    """Yield (rank, band, band_index) of a dataset's bands that a layer is; lower ranks are surer."""
    by_asset = [band for band in dataset.bands if band.asset == layer.asset]
    if len(by_asset) > 1:  # one file with many bands, in the dataset's order
        if layer.samples == 1:
            yield from ((0, band, band.band_index) for band in by_asset)
        elif name is None or name not in {b.code for b in by_asset}:
            yield from ((0, b, layer.band_index) for b in by_asset if b.band_index == layer.band_index)
        else:
            yield from ((0, b, layer.band_index) for b in by_asset if b.code == name)
        return
    if by_asset and layer.samples == 1:
        yield 0, by_asset[0], by_asset[0].band_index
        return
    common = [b for b in dataset.bands if layer.common_name and layer.common_name in (b.common_name, b.asset)]
    told = common[0] if len(common) == 1 else None
    keys = ([layer.asset] if layer.samples == 1 else []) + ([name] if name else [])
    for rank, text in enumerate(keys, 1):
        band = _by_code(text, dataset)
        if band is not None:
            # SR_B4 is near infrared on Landsat 4 to 7: the common name tells
            renumbered = told is not None and dataset.renumbered
            yield (rank, told if renumbered and told else band, layer.band_index)
            return
    if told is not None:
        yield 4, told, layer.band_index


def _by_code(text: str, dataset: Dataset) -> Band | None:
    bare = re.sub(r"(-jp2|\.tiff?|\.jp2)$", "", text, flags=re.IGNORECASE)
    bare = _RESOLUTION.sub("", bare)
    prefix = _PREFIX.match(bare)
    bare = _PREFIX.sub("", bare)
    for band in dataset.bands:
        if bare.casefold() in (band.code.casefold(), band.asset.casefold()):
            thermal = band.kind == "temperature"
            if prefix and prefix.group(1).upper() == "ST" and not thermal and band.role != "quality":
                return None
            return band
    return None


def _gsd(asset: Mapping[str, Any], layer: Layer) -> float:
    suffix = _RESOLUTION.search(layer.asset)
    found = _number(asset.get("gsd")) or (float(suffix.group(1)) if suffix else None)
    return found or (abs(layer.transform[0]) if layer.transform else 0.0)


def _first(*places: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for place in places:
        for name in names:
            if place.get(name) is not None:
                return place[name]
    return None


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except OverflowError:
        return inf if value > 0 else -inf  # told where it is used
    except (TypeError, ValueError):
        return None


def _floats(value: Any, lengths: tuple[int, ...]) -> tuple[float, ...] | None:
    if not isinstance(value, Sequence) or len(value) not in lengths:
        return None
    numbers = [_number(v) for v in value[:6]]
    return tuple(n for n in numbers if n is not None) if None not in numbers else None


def _shape(value: Any) -> tuple[int, int] | None:
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(v, int | float) for v in value)
    ):
        return None
    return (int(value[0]), int(value[1])) if min(value) >= 1 else None
