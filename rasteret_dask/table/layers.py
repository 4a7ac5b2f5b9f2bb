# SPDX-License-Identifier: Apache-2.0
"""Which bands an item's assets hold, and what the item says of each."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Any

from rasteret_dask.catalogs.bands import TM_NUMBERS, Band, Dataset
from rasteret_dask.errors import BandError
from rasteret_dask.headers.nodata import text_of
from rasteret_dask.rules.kinds import REFLECTANCE, TEMPERATURE, KindName
from rasteret_dask.table.itemcrs import crs_fault, stated_crs
from rasteret_dask.table.itemkinds import Classes, classes_of, kind_said
from rasteret_dask.table.rasters import LeftAsset, raster_assets

__all__ = [
    "Layer", "Offer", "check_bands", "check_kinds", "is_telling", "layers_of", "offer_of", "restrict",
]  # fmt: skip

_PREFIX = re.compile(r"^(SR|ST|OLI|TIRS|TM|ETM)_", re.IGNORECASE)  # USGS's products and sensors
_TM_PREFIX = re.compile(r"^E?TM_", re.IGNORECASE)
_TM_PLATFORM = re.compile(r"landsat[-_ ]?[457]$", re.IGNORECASE)
_TM_SCENE = re.compile(r"^L[TE]0[457]_")
_RESOLUTION = re.compile(r"_(10|20|60)m$")  # Sentinel-2's copies; MODIS's _500m tells bands apart
_FILE_SUFFIX = re.compile(r"(-jp2|\.tiff?|\.jp2)$", re.IGNORECASE)
_S3_TWIN = re.compile(r"^s3_(?=.)")  # NASA's catalogs list each file by https and by s3
_COUNTED = re.compile(r"_\d+$")
_NAMELESS = re.compile(r"a|alpha|mask|opacity|transparency|(.*[_ -])?(b|band)?\d+", re.IGNORECASE)
_DTYPE = re.compile(r"u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_CLEAN = re.compile(r"^\w[\w.\-]*$")
_GENERIC = re.compile(
    r"^(band[\s_-]?\d*|\d+|gr[ae]y)$", re.IGNORECASE
)  # GDAL's words where nobody named a band

_OLD_COMMON_NAMES = {"tir11": "lwir11", "tir12": "lwir12"}
_THERMAL = ("lwir", "lwir11", "lwir12")
_SHORTEST_THERMAL_UM = 6.0  # STAC's lwir begins at 10.5, its longest other name ends at 2.4


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
    definition: Band | None = None
    """What the dataset says of the band."""
    common_name: str | None = None
    scale: float | None = None
    offset: float | None = None
    nodata: str | None = None
    """As the item spells it."""
    dtype: str | None = None
    epsg: int | None = None
    """The CRS, as :func:`rasteret_dask.crs.number` counts it."""
    crs_fault: str | None = None
    """Why PROJ knows no CRS that the item states."""
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
    thermal: bool = False
    """True where the item says that it is a temperature."""
    pixel: float = 0.0
    """Size of a pixel as far as the item tells, in any unit; 0 where it does not."""
    copies: tuple[Layer, ...] = ()
    """Other assets that hold the same band, the best first."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What an item's assets hold."""

    layers: Mapping[str, Layer]
    """{band: layer}."""
    left: tuple[LeftAsset, ...]
    """The assets that are not among them."""


def layers_of(item: Mapping[str, Any], dataset: Dataset | None) -> Mapping[str, Layer]:
    """Return {band: layer} of an item's raster assets; see :func:`offer_of`."""
    return offer_of(item, dataset).layers


def offer_of(item: Mapping[str, Any], dataset: Dataset | None) -> Offer:
    """Return the bands of an item's raster assets, and the assets that are left out.

    Parameters
    ----------
    item
        The STAC item: 0.7, 1.0 (``eo:bands``, ``raster:bands``) or 1.1 (``bands``).
    dataset
        Only its bands are kept, under their codes. Without it, all raster assets are kept, under the item's
        own band names where they tell one band from the others, else under the asset keys.

    Notes
    -----
    A band is what it measures: the sensor (of Landsat, whose numbers changed with OLI), the asset's key and the
    common name say it together. One band in several assets (``B04_10m`` and ``B04_20m``, ``B04`` and ``s3_B04``,
    ``red`` and ``red-jp2``) is one layer: the finest, then what is read fastest; the others are its ``copies``.
    """
    assets, left = raster_assets(item, () if dataset is None else {band.asset for band in dataset.bands})
    offered = [layer for key, asset in assets.items() for layer in _offered(item, key, asset)]
    groups = _by_item(offered) if dataset is None else _by_dataset(offered, dataset, _is_tm(item))
    layers = {band: _best(own) for band, own in groups.items()}
    taken = {layer.asset for layer in layers.values()}
    copies = {copy.asset: layer for layer in layers.values() for copy in layer.copies}
    for key in (key for key in assets if key not in taken):
        if key in copies:
            left.append((key, f"band {copies[key].band!r} is taken from asset {copies[key].asset!r}"))
        elif dataset is not None:
            left.append((key, f"no band that dataset {dataset.name!r} has"))
    return Offer(layers, tuple(left))


def restrict(layers: Mapping[str, Layer], bands: Sequence[str] | None) -> dict[str, Layer]:
    """Keep the layers whose band, common name or asset key is asked for; None: all but optional bands."""
    if bands is None:
        return {
            b: layer
            for b, layer in layers.items()
            if layer.definition is None or not layer.definition.optional
        }
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


def _names(layer: Layer) -> Iterator[str]:
    yield from (layer.band, layer.asset)
    if layer.common_name:
        yield layer.common_name
    if layer.definition:
        yield layer.definition.asset


def _properties(item: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = item.get("properties")
    return properties if isinstance(properties, Mapping) else {}


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
        name = band.get("name")
        common = _common_name(band)
        transform = _floats(_first(band, asset, properties, names=("proj:transform",)), (6, 9))
        yield (
            Layer(
                band=_plain(key) if len(said) <= 1 else f"{_plain(key)}_{n + 1}",
                href=str(asset["href"]),
                band_index=n,
                asset=key,
                common_name=common,
                scale=_number(_first(band, asset, names=("raster:scale", "scale"))),
                offset=_number(_first(band, asset, names=("raster:offset", "offset"))),
                nodata=text_of(_first(band, asset, names=("nodata",))),
                dtype=_dtype(_first(band, asset, names=("data_type",))),
                epsg=stated_crs(asset) or stated_crs(properties),
                crs_fault=crs_fault(asset) or crs_fault(properties),
                transform=transform,
                shape=_shape(_first(band, asset, properties, names=("proj:shape",))),
                samples=max(1, len(said)),
                kind=kind_said(key, asset, band, properties),
                classes=classes_of(asset, band),
                declared=bool(said),
                measured=frozenset(
                    i
                    for i, b in enumerate(said)
                    if b.get("eo:common_name") or b.get("common_name") or is_telling(b.get("name"))
                ),
                thermal=common in _THERMAL or TEMPERATURE.name in (asset.get("roles") or ()),
                pixel=_pixel(key, asset, transform),
            ),
            name if isinstance(name, str) and _CLEAN.match(name) else None,
        )


def _common_name(band: Mapping[str, Any]) -> str | None:
    """Return a band's common name, None where its wavelength says that it is another (MODIS's 1.24 um as lwir12)."""
    name = band.get("eo:common_name") or band.get("common_name")
    if not isinstance(name, str):
        return None
    name = _OLD_COMMON_NAMES.get(name, name)
    length = _number(_first(band, names=("eo:center_wavelength", "center_wavelength")))
    return None if name in _THERMAL and length is not None and 0 < length < _SHORTEST_THERMAL_UM else name


def _pixel(key: str, asset: Mapping[str, Any], transform: tuple[float, ...] | None) -> float:
    """Return the size of a pixel; the key's own figure before ``gsd``, which catalogs copy from another asset."""
    if transform is not None:
        return abs(transform[0])
    suffix = _RESOLUTION.search(_FILE_SUFFIX.sub("", key))
    return float(suffix.group(1)) if suffix else _number(asset.get("gsd")) or 0.0


@lru_cache(maxsize=4096)  # all items of a collection have the same few keys
def _plain(key: str) -> str:
    """Return an asset's key without what tells copies of one band apart: ``s3_B04_20m.jp2`` is ``B04``."""
    return _S3_TWIN.sub("", _RESOLUTION.sub("", _FILE_SUFFIX.sub("", key))) or key


def _best(layers: Sequence[Layer]) -> Layer:
    """Return the layer to read, the others as its copies; the order of assets does not matter."""
    if len(layers) == 1:
        return layers[0]
    first, *others = sorted(layers, key=_rank)
    return replace(first, copies=tuple(others))


def _rank(layer: Layer) -> tuple[Any, ...]:
    """Return what sorts copies of one band: the finest first, then TIFF, by http before what wants a bucket's keys.

    Where nothing tells the size of ``red``, it is taken before ``red_20m``.
    """
    place = layer.href.lower()
    return (
        layer.pixel,
        place.endswith((".jp2", ".j2k")),
        place.startswith(("s3://", "gs://", "az://")),
        len(layer.asset),
        layer.asset,
        layer.band_index,
    )


def _by_item(offered: Sequence[tuple[Layer, str | None]]) -> dict[str, list[Layer]]:
    """Return {band: its copies}, named as the item does, else by the asset's key."""
    groups: dict[tuple[str, bool], list[tuple[Layer, str | None]]] = defaultdict(list)
    for layer, name in offered:
        groups[layer.band, layer.samples > 1].append((layer, name))
    parted: list[tuple[str | None, list[Layer]]] = []
    for pairs in groups.values():
        names = {name for _, name in pairs if name is not None}
        if len(names) <= 1:
            parted.append((next(iter(names), None), [layer for layer, _ in pairs]))
        else:  # one key in two spellings for two bands
            parted += [(name, [replace(layer, band=_whole(layer))]) for layer, name in pairs]
    # files of one band keep the names that a picture of them repeats
    single = Counter(name for name, own in parted if own[0].samples == 1)
    many = Counter(name for name, own in parted if own[0].samples > 1)
    chosen: list[str] = []
    for name, own in parted:
        alone = single[name] == 1 if own[0].samples == 1 else many[name] == 1 and not single[name]
        key = own[0].band
        # VV of asset vv is vv, as in items that name no bands
        named = name is not None and alone and not _GENERIC.match(name) and name.casefold() != key.casefold()
        chosen.append(name if named and name is not None else key)
    twice = Counter(chosen)
    bands: dict[str, list[Layer]] = {}
    for choice, (_, own) in zip(chosen, parted, strict=True):
        band = choice if twice[choice] == 1 else _whole(own[0])
        bands[band] = own if own[0].band == band else [replace(layer, band=band) for layer in own]
    return bands


def _whole(layer: Layer) -> str:
    return layer.asset if layer.samples == 1 else f"{layer.asset}_{layer.band_index + 1}"


def _by_dataset(
    offered: Sequence[tuple[Layer, str | None]], dataset: Dataset, tm: bool
) -> dict[str, list[Layer]]:
    """Return {code: its copies} of a dataset's bands, in its order."""
    found: dict[str, list[tuple[bool, Layer]]] = defaultdict(list)
    for layer, name in offered:
        for sure, band, index in _matches(layer, name, dataset, tm):
            named = replace(
                layer, band=band.code, dataset=dataset, definition=band, band_index=index,
                common_name=band.common_name or layer.common_name,
            )  # fmt: skip
            found[band.code].append((sure, named))
    result = {}
    for band in dataset.bands:
        own = found.get(band.code, [])
        surest = any(sure for sure, _ in own)  # a common name decides only where no key or code does
        if own:
            result[band.code] = [layer for sure, layer in own if sure == surest]
    return result


def _matches(layer: Layer, name: str | None, dataset: Dataset, tm: bool) -> Iterator[tuple[bool, Band, int]]:
    """Yield (whether a key or code says so, band, band_index) of a dataset's bands that a layer is."""
    key = _plain(layer.asset)
    by_asset = [band for band in dataset.bands if layer.asset == band.asset]
    by_asset = by_asset or [band for band in dataset.bands if key == _plain(band.asset)]
    if len(by_asset) > 1:  # one file with many bands, in the dataset's order
        if layer.samples == 1:
            yield from ((True, band, band.band_index) for band in by_asset)
        elif name is None or name not in {b.code for b in by_asset}:
            yield from ((True, b, layer.band_index) for b in by_asset if b.band_index == layer.band_index)
        else:
            yield from ((True, b, layer.band_index) for b in by_asset if b.code == name)
        return
    if by_asset and layer.samples == 1:
        yield True, by_asset[0], by_asset[0].band_index
        return
    common = [b for b in dataset.bands if layer.common_name and layer.common_name in (b.common_name, b.asset)]
    told = common[0] if len(common) == 1 else None
    for text in ([key] if layer.samples == 1 else []) + ([name] if name else []):
        band = _by_code(text, dataset, tm)
        # B4 is near infrared on Landsat 4 to 7, and B6 is thermal: the common name tells
        band = told if dataset.renumbered and told is not None else band
        if band is not None and not (layer.thermal and band.kind == REFLECTANCE.name):
            yield True, band, layer.band_index
            return
    if told is not None:
        yield False, told, layer.band_index


def _by_code(text: str, dataset: Dataset, tm: bool) -> Band | None:
    """Return the band that a code names; ``tm``: in the numbers of Landsat 4, 5 and 7."""
    bare = _plain(text)
    prefix = _PREFIX.match(bare)
    tm = tm or _TM_PREFIX.match(bare) is not None
    surface_temperature = prefix is not None and prefix.group(1).upper() == "ST"
    bare = _PREFIX.sub("", bare)
    names = [TM_NUMBERS.get(bare.upper(), bare)] if dataset.renumbered and tm else [bare]
    if dataset.renumbered and surface_temperature:
        names.append(TM_NUMBERS.get(bare.upper(), bare))  # no other sensor has an ST_B6
    for one in names:
        for band in dataset.bands:
            if one.casefold() in (band.code.casefold(), band.asset.casefold()) and not (
                surface_temperature and band.kind == REFLECTANCE.name
            ):
                return band
    return None


def _is_tm(item: Mapping[str, Any]) -> bool:
    """Return whether Landsat 4, 5 or 7 made a scene: its platform says so, or its id."""
    properties = _properties(item)
    platform = properties.get("platform") or properties.get("eo:platform")
    if isinstance(platform, str):
        return _TM_PLATFORM.match(platform) is not None
    return _TM_SCENE.match(str(item.get("id"))) is not None


def _first(*places: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for place in places:
        for name in names:
            if place.get(name) is not None:
                return place[name]
    return None


def _dtype(name: Any) -> str | None:
    """Return the type of pixels that an item names, None where NumPy has none of that name: STAC's ``other``."""
    return name if isinstance(name, str) and _DTYPE.fullmatch(name) else None


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
