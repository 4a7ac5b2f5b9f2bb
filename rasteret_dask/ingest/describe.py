# SPDX-License-Identifier: Apache-2.0
"""Layers and file headers become the columns ``assets`` and ``headers_metadata`` of a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import numpy as np
import shapely

from rasteret_dask.catalogs.bands import Role, objection, radiometry
from rasteret_dask.crs import same, text
from rasteret_dask.errors import GridError
from rasteret_dask.extent import misplaced, north_up
from rasteret_dask.footprint import outline_of_ring
from rasteret_dask.grid import transformer
from rasteret_dask.headers.nodata import number_of, spelled, text_of
from rasteret_dask.headers.reader import Header
from rasteret_dask.lists import first_of
from rasteret_dask.rules.kinds import AMPLITUDE, BACKSCATTER, CLASS, KindName, quality_kind
from rasteret_dask.rules.masks import QUALITY
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.table.itemkinds import POLARIZATIONS
from rasteret_dask.table.layers import Layer, is_telling

__all__ = ["CRS_TAKEN", "Described", "contradictions", "contradictions_note", "describe"]

_QUALITY = frozenset(("qa_radsat", "qa_aerosol", *(quality.band.casefold() for quality in QUALITY)))
_SYNTHETIC_TILE = 512
_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_LISTED = 5

CRS_TAKEN = "no CRS in the file"
"""How the note of an asset begins whose file has no CRS."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a record says of its files."""

    assets: tuple[tuple[str, dict[str, Any]], ...]
    """(band, fields of ``records.ASSET_TYPE``)."""
    levels: tuple[tuple[str, tuple[dict[str, Any], ...]], ...]
    """(band, dicts of ``records.LEVEL_TYPE``, the image first); none for unreadable bands."""
    epsg: int | None
    """The CRS of all of them, as :func:`rasteret_dask.crs.number` counts it."""
    outline: tuple[tuple[float, float], ...] = ()
    """(x, y) of the first image's edges in that CRS, where they are no rectangle."""

    @property
    def footprint(self) -> bytes | None:
        """WKB in lon/lat of the first image's outline, None where no header is known or it lies beyond the Earth."""
        images = [levels[0] for _, levels in self.levels if levels]
        if not images or self.epsg is None:
            return None
        a, b, c, d, e, f = images[0]["transform"]
        w, h = images[0]["width"], images[0]["height"]
        corners = [(0, 0), (w, 0), (w, h), (0, h)]
        ring = shapely.Polygon(self.outline or [(a * x + b * y + c, d * x + e * y + f) for x, y in corners])
        ring = shapely.segmentize(ring, max(abs(a) * w, abs(e) * h) / 16)  # straight here, curved in lon/lat
        try:
            to_lonlat = transformer(self.epsg, 4326)
        except GridError:
            return None  # an unknown code, or another planet's
        lonlat = np.column_stack(to_lonlat.transform(*shapely.get_coordinates(ring).T))
        lonlat = lonlat[np.isfinite(lonlat).all(axis=1)]  # corners of a whole hemisphere lie beside the Earth
        return outline_of_ring(lonlat) if len(lonlat) >= 4 else None


def describe(
    layers: Sequence[Layer],
    properties: Mapping[str, Any],
    headers: Mapping[str, Header | str] | None,
    crs: int | None = None,
) -> Described:
    """Describe the bands of one record.

    Parameters
    ----------
    layers
        The bands; their hrefs are absolute.
    properties
        The STAC properties, for radiometric rules.
    headers
        {href: header or why it is unreadable}; None makes levels from the item's own ``proj:transform`` and
        ``proj:shape``, without tile tables.
    crs
        The CRS of files that have none, where the item states none either.

    Notes
    -----
    The file is right about size, transform and dtype, and about the nodata of a file of one band: a TIFF has one
    nodata for all of its bands, an item one for each. The item is right about scale and offset. What they say
    otherwise is noted. A file in another CRS than the item says is recorded as unreadable, and so is a band whose
    scale and offset cannot be meant. A file without a CRS lies in the item's, else in ``crs``, which is noted. The
    alpha channel of a file says which pixels of the others are valid, unless the item or the dataset calls it a band
    that is measured: many files of four bands call near infrared alpha.
    """
    if headers is not None:
        layers = list(_expanded(layers, headers))
    epsg = _epsg(layers, headers) or crs
    assets, levels = [], []
    for layer in layers:
        header = None if headers is None else headers.get(layer.href, "no header was read")
        error = _error(layer, header, epsg) if headers is not None else None
        file = header if isinstance(header, Header) and error is None else None
        if file is not None and _is_measured(file.alpha, layer, layers):
            file = replace(file, alpha=None)
        own = file.levels_of(layer.band_index) if file else ()
        if headers is None:
            error = _unplaced(layer, epsg)
            own = () if error else _synthetic(layer)
        fields = _fields(layer, file, properties, error)
        if file is not None and file.epsg is None and fields["error"] is None:
            source = "the item" if layer.epsg is not None else "the other files" if epsg != crs else "crs="
            note = f"{CRS_TAKEN}: it lies in {text(layer.epsg or epsg or 0)}, as {source} says"
            fields["note"] = "; ".join(filter(None, (note, fields["note"])))
        assets.append((layer.band, fields))
        levels.append((layer.band, own if fields["error"] is None else ()))
    first = next((layer.href for layer, (_, own) in zip(layers, levels, strict=True) if own), None)
    header = None if headers is None or first is None else headers[first]
    return Described(tuple(assets), tuple(levels), epsg, header.outline if isinstance(header, Header) else ())


def contradictions(assets: Iterable[tuple[str, Mapping[str, Any]]]) -> Counter[str]:
    """Count what files and items say otherwise, as ``"band 'red': nodata: ..."``."""
    return Counter(f"band {band!r}: {asset['note']}" for band, asset in assets if asset["note"] is not None)


def contradictions_note(name: str, counts: Counter[str]) -> str:
    """Return what a user should be told of contradictions, as a sentence."""
    first = first_of((f"{what} ({n} records)" for what, n in counts.most_common()), _LISTED, "; ")
    return f"{name}: files and items do not tell the same: {first}. The column assets keeps each as note"


def _expanded(layers: Sequence[Layer], headers: Mapping[str, Header | str]) -> Iterator[Layer]:
    """Yield a layer per band of a file whose item lists no bands, named ``<key>_1`` and so on.

    One band beside its alpha channel keeps the key.
    """
    for layer in layers:
        header = headers.get(layer.href)
        if layer.declared or layer.definition or not isinstance(header, Header) or header.samples == 1:
            yield layer
            continue
        alone = header.samples == 2 and header.alpha is not None
        for n in range(header.samples):
            name = layer.band if alone and n != header.alpha else f"{layer.band}_{n + 1}"
            yield replace(layer, band=name, band_index=n, samples=header.samples)


def _is_measured(position: int | None, layer: Layer, layers: Sequence[Layer]) -> bool:
    """Tell whether the item or the dataset says that a band of a layer's file is measured."""
    if position in layer.measured:
        return True
    if layer.dataset is not None and layer.definition is not None:
        same = [
            b for b in layer.dataset.bands if (b.asset, b.band_index) == (layer.definition.asset, position)
        ]
        if any(b.role != "quality" for b in same):
            return True
    return any(
        x.declared
        and (x.href, x.band_index) == (layer.href, position)
        and is_telling(x.common_name or x.band)
        for x in layers
    )


def _epsg(layers: Sequence[Layer], headers: Mapping[str, Header | str] | None) -> int | None:
    stated = Counter(layer.epsg for layer in layers if layer.epsg is not None)
    if stated:
        return stated.most_common(1)[0][0]
    of_files = [headers.get(layer.href) for layer in layers] if headers else []
    told = Counter(h.epsg for h in of_files if isinstance(h, Header) and h.epsg is not None)
    return told.most_common(1)[0][0] if told else None


def _error(layer: Layer, header: Header | str | None, epsg: int | None) -> str | None:
    if not isinstance(header, Header):
        return header
    if layer.band_index >= header.samples:
        return f"band {layer.band_index + 1} asked for, the file has {header.samples}"
    if header.epsg is None:
        return _unplaced_file(layer, header, epsg)
    for other, who in ((layer.epsg, "the item"), (epsg, "the record")):
        if other is not None and not _is_one(header.epsg, other):
            return f"the file is in {text(header.epsg)}, {who} says {text(other)}"
    return None


def _is_one(crs: int, other: int) -> bool:
    try:
        return same(crs, other)
    except GridError:  # the item's code is none that PROJ knows
        return False


def _unplaced_file(layer: Layer, header: Header, epsg: int | None) -> str | None:
    """Return why a file that has no CRS lies nowhere, None where the item or the user gives one."""
    if epsg is None:
        stated = layer.crs_fault or "the item states none"
        return f"no CRS in the file, and {stated}; give it one: crs= of the build"
    if layer.epsg is not None and not _is_one(layer.epsg, epsg):
        return f"the item says {text(layer.epsg)}, the record {text(epsg)}"
    image = header.pages[0]
    reason = misplaced(epsg, image.transform, image.width, image.height)
    return None if reason is None else f"refused: {reason}"


def _fields(
    layer: Layer, header: Header | None, properties: Mapping[str, Any], error: str | None
) -> dict[str, Any]:
    dtype = header.dtype if header else layer.dtype or _usual_dtype(layer)
    kind = _kind(layer, header, dtype)
    alpha = None if header is None else header.alpha
    scale, offset = layer.scale, layer.offset
    tag = None if header is None else header.scale_of(layer.band_index)
    if header is not None and layer.dataset is None:
        same = scale is None or tag is None or _is_near(scale, tag)
        scale = tag if scale is None else scale
        offset = header.offset_of(layer.band_index) if offset is None and same else offset
    rule = radiometry(layer.dataset, layer.definition, properties, scale, offset)
    absurd = objection(rule, layer.definition, layer.common_name is not None)
    if absurd is not None:
        error, rule = error or f"refused: {absurd}", Radiometry(1.0, 0.0, "none: refused")
    nodata, notes = _nodata(layer, header, dtype)
    if absurd is None and tag is not None and not _is_near(rule.scale, tag):
        notes.append(f"the file's scale tag is {tag:g}; {rule.scale:g} holds ({rule.rule})")
    return {
        "href": layer.href,
        "band_index": layer.band_index,
        "asset": layer.asset,
        "dataset": layer.dataset.name if layer.dataset else None,
        "common_name": layer.common_name,
        "scale": rule.scale,
        "offset": rule.offset,
        "rule": rule.rule,
        "nodata": nodata,
        "valid_min": None if layer.definition is None else layer.definition.valid_min,
        "valid_max": None if layer.definition is None else layer.definition.valid_max,
        "alpha": None if alpha == layer.band_index else alpha,
        "placement": _placement(layer, header),
        "dtype": dtype,
        "role": "quality" if alpha == layer.band_index else _role(layer),
        "kind": kind,
        "classes": _classes(layer, header) if kind == CLASS.name else None,
        "size": header.size if header else None,
        "etag": header.etag if header else None,
        "error": error,
        "note": "; ".join(notes) or None,
    }


def _placement(layer: Layer, header: Header | None) -> str | None:
    """Return how the file lies; where its header was not read, as the item says."""
    if header is not None:
        return header.placement
    turned = layer.transform is not None and (layer.transform[1] or layer.transform[3])
    return "rotated" if turned else None


def _is_near(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-6)


def _role(layer: Layer) -> Role:
    if layer.definition is not None:
        return layer.definition.role
    return "quality" if layer.band.casefold() in _QUALITY else "data"


def _kind(layer: Layer, header: Header | None, dtype: str | None) -> KindName | None:
    """Return what the numbers are: as the catalog says, else the item, else its name, else the file.

    A radar band is told by the item, or by the name of its polarization. Counts of a detector, which are amplitudes,
    are integers; power is not.
    """
    if layer.definition is not None and layer.definition.kind is not None:
        return layer.definition.kind
    kind = layer.kind or (BACKSCATTER.name if layer.band.casefold() in POLARIZATIONS else None)
    if kind == BACKSCATTER.name and dtype is not None:
        return AMPLITUDE.name if dtype in _INTEGERS else kind
    if kind is None and layer.definition is None and layer.thermal:
        return "temperature"
    if kind is None and _role(layer) == "quality":
        return quality_kind(layer.band)
    return header.kind_of(layer.band_index) if kind is None and header is not None else kind


def _classes(layer: Layer, header: Header | None) -> list[dict[str, Any]] | None:
    """Return what the codes of a class band stand for, None where nothing tells."""
    classes = layer.classes or (header.classes_of(layer.band_index) if header is not None else ())
    return [{"value": value, "name": name} for value, name in classes] or None


def _nodata(layer: Layer, header: Header | None, dtype: str | None) -> tuple[str | None, list[str]]:
    """Return nodata as tables keep it, and what is to be said of it."""
    file = None if header is None else header.nodata_tag
    usual = text_of(layer.definition.nodata) if layer.definition else None
    words = {"the file": file, "the item": layer.nodata, "the dataset": usual}
    if header is not None and header.samples > 1 and layer.nodata is not None:
        words = {"the item": layer.nodata, "the file": file, "the dataset": usual}
    texts = {who: text for who, text in words.items() if text is not None}
    if dtype is None:
        return next(iter(texts.values()), None), []
    numbers = {
        who: header.nodata if who == "the file" and header is not None else number_of(text, dtype)
        for who, text in texts.items()
    }
    fit = {who: spelled(number) for who, number in numbers.items() if number is not None}
    chosen = next(iter(fit.values()), None)
    notes = [
        f"nodata {texts[who]} of {who} is no number of {dtype}: no pixel is it"
        for who in texts
        if who not in fit and who != "the dataset"
    ]
    both = {"the file", "the item"} <= fit.keys()
    if both and len({spelled(number_of(texts[who], dtype)) for who in ("the file", "the item")}) > 1:
        notes.append(
            f"nodata is {fit['the file']} in the file, {fit['the item']} in the item; {chosen} holds"
        )
    return chosen, notes


def _usual_dtype(layer: Layer) -> str | None:
    """Return the type in which a known dataset stores a band, where the item is silent."""
    return layer.definition.dtype if layer.definition else None


def _unplaced(layer: Layer, epsg: int | None) -> str | None:
    """Return why the item's own words place no raster, None where they do."""
    if layer.transform is None or layer.shape is None:
        return "no header was read, and the item has no proj:transform and proj:shape"
    if epsg is None:
        stated = layer.crs_fault or "the item states no CRS"
        return f"no header was read, and {stated}"
    height, width = layer.shape
    reason = misplaced(epsg, layer.transform, width, height)
    return None if reason is None else f"refused: {reason}"


def _synthetic(layer: Layer) -> tuple[dict[str, Any], ...]:
    """Return the image level that the item's own words describe; of a turned raster, the north-up one around it."""
    assert layer.transform is not None
    assert layer.shape is not None
    (height, width), transform = layer.shape, layer.transform
    if transform[1] or transform[3]:
        place, (height, width) = north_up(transform, layer.shape)
        transform = tuple(place)[:6]
    return (
        {
            "kind": "image",
            "driver": "JP2OpenJPEG" if layer.href.lower().endswith((".jp2", ".j2k")) else "GTiff",
            "width": width,
            "height": height,
            "tile_width": min(_SYNTHETIC_TILE, width),
            "tile_height": min(_SYNTHETIC_TILE, height),
            "dtype": layer.dtype or _usual_dtype(layer),
            "byteorder": "<",
            "compression": 0,
            "predictor": 1,
            "planar": 1,
            "samples": layer.samples,
            "transform": transform,
            "tile_offsets": (),
            "tile_byte_counts": (),
        },
    )
