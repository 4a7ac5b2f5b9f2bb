"""Layers and file headers become the columns ``assets`` and ``headers_metadata`` of a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import numpy as np
import shapely
from pyproj import Transformer

from rasteret_dask.catalogs.bands import Role, objection, radiometry
from rasteret_dask.extent import misplaced
from rasteret_dask.footprint import outline_of_ring
from rasteret_dask.headers.nodata import number_of, spelled, text_of
from rasteret_dask.headers.reader import Header
from rasteret_dask.rules.kinds import CLASS, KindName, quality_kind
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.table.layers import Layer, is_telling

__all__ = ["Described", "contradictions", "contradictions_note", "describe"]

_QUALITY = ("scl", "qa_pixel", "qa_radsat", "qa_aerosol", "fmask")
_SYNTHETIC_TILE = 512
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Described:
    """What a record says of its files."""

    assets: tuple[tuple[str, dict[str, Any]], ...]
    """(band, fields of ``records.ASSET_TYPE``)."""
    levels: tuple[tuple[str, tuple[dict[str, Any], ...]], ...]
    """(band, dicts of ``records.LEVEL_TYPE``, the image first); none for unreadable bands."""
    epsg: int | None

    @property
    def footprint(self) -> bytes | None:
        """WKB in lon/lat of the first image's outline, None where no header is known or it lies beyond the Earth."""
        images = [levels[0] for _, levels in self.levels if levels]
        if not images or self.epsg is None:
            return None
        a, b, c, d, e, f = images[0]["transform"]
        w, h = images[0]["width"], images[0]["height"]
        corners = [(0, 0), (w, 0), (w, h), (0, h)]
        ring = shapely.Polygon([(a * x + b * y + c, d * x + e * y + f) for x, y in corners])
        ring = shapely.segmentize(ring, max(abs(a) * w, abs(e) * h) / 16)  # straight here, curved in lon/lat
        to_lonlat = Transformer.from_crs(self.epsg, 4326, always_xy=True)
        lonlat = np.column_stack(to_lonlat.transform(*shapely.get_coordinates(ring).T))
        lonlat = lonlat[np.isfinite(lonlat).all(axis=1)]  # corners of a whole hemisphere lie beside the Earth
        return outline_of_ring(lonlat) if len(lonlat) >= 4 else None


def describe(
    layers: Sequence[Layer],
    properties: Mapping[str, Any],
    headers: Mapping[str, Header | str] | None,
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

    Notes
    -----
    The file is right about size, transform and dtype, and about the nodata of a file of one band: a TIFF has one
    nodata for all of its bands, an item one for each. The item is right about scale and offset. What they say
    otherwise is noted. A file in another CRS than the item says is recorded as unreadable, and so is a band whose
    scale and offset cannot be meant. The alpha channel of a file says which pixels of the others are valid, unless
    the item or the dataset calls it a band that is measured: many files of four bands call near infrared alpha.
    """
    if headers is not None:
        layers = list(_expanded(layers, headers))
    epsg = _epsg(layers, headers)
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
        assets.append((layer.band, fields))
        levels.append((layer.band, own if fields["error"] is None else ()))
    return Described(tuple(assets), tuple(levels), epsg)


def contradictions(assets: Iterable[tuple[str, Mapping[str, Any]]]) -> Counter[str]:
    """Count what files and items say otherwise, as ``"band 'red': nodata: ..."``."""
    return Counter(f"band {band!r}: {asset['note']}" for band, asset in assets if asset["note"] is not None)


def contradictions_note(name: str, counts: Counter[str]) -> str:
    """Return what a user should be told of contradictions, as a sentence."""
    listed = "; ".join(f"{what} ({n} records)" for what, n in counts.most_common(_LISTED))
    more = f"; and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    return (
        f"{name}: files and items contradict each other: {listed}{more}. The column assets keeps each as note"
    )


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
    said = Counter(layer.epsg for layer in layers if layer.epsg is not None)
    if said:
        return said.most_common(1)[0][0]
    found = [headers.get(layer.href) for layer in layers] if headers else []
    told = Counter(header.epsg for header in found if isinstance(header, Header))
    return told.most_common(1)[0][0] if told else None


def _error(layer: Layer, header: Header | str | None, epsg: int | None) -> str | None:
    if not isinstance(header, Header):
        return header
    if layer.band_index >= header.samples:
        return f"band {layer.band_index + 1} asked for, the file has {header.samples}"
    for other, who in ((layer.epsg, "the item"), (epsg, "the record")):
        if other is not None and header.epsg != other:
            return f"the file is in EPSG:{header.epsg}, {who} says EPSG:{other}"
    return None


def _fields(
    layer: Layer, header: Header | None, properties: Mapping[str, Any], error: str | None
) -> dict[str, Any]:
    kind = _kind(layer, header)
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
    dtype = header.dtype if header else layer.dtype or _usual_dtype(layer)
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
        "alpha": None if alpha == layer.band_index else alpha,
        "dtype": dtype,
        "role": "quality" if alpha == layer.band_index else _role(layer),
        "kind": kind,
        "classes": _classes(layer, header) if kind == CLASS.name else None,
        "size": header.size if header else None,
        "etag": header.etag if header else None,
        "error": error,
        "note": "; ".join(notes) or None,
    }


def _is_near(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-6)


def _role(layer: Layer) -> Role:
    if layer.definition is not None:
        return layer.definition.role
    return "quality" if layer.band.casefold() in _QUALITY else "data"


def _kind(layer: Layer, header: Header | None) -> KindName | None:
    """Return what the numbers are: as the catalog says, else the item, else its name, else the file."""
    kind = (layer.definition.kind if layer.definition else None) or layer.kind
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
    height, width = layer.shape
    reason = None if epsg is None else misplaced(epsg, layer.transform, width, height)
    return None if reason is None else f"refused: {reason}"


def _synthetic(layer: Layer) -> tuple[dict[str, Any], ...]:
    """Return the image level that the item's own words describe."""
    assert layer.transform is not None
    assert layer.shape is not None
    height, width = layer.shape
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
            "transform": layer.transform,
            "tile_offsets": (),
            "tile_byte_counts": (),
        },
    )
