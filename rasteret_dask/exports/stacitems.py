# SPDX-License-Identifier: Apache-2.0
"""A STAC 1.1 Item for each chip, a Catalog for each split, and the Collection of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from shapely.geometry.polygon import orient

from rasteret_dask.chipping.frame import Frame, outline_wkb
from rasteret_dask.crs import spelled, wkt2
from rasteret_dask.exports.sheets import Box, MaskSheet, SourceSheet, box_of, iso_of
from rasteret_dask.footprint import box_around
from rasteret_dask.store.provenance import MemberOrigin, Provenance
from rasteret_dask.tasks.batches import Arrays

__all__ = [
    "CATALOG", "COLLECTION", "GEOTIFF", "ChipFacts", "Extent", "File", "catalog", "chip_facts", "collection",
    "document_bytes", "extent_of", "item", "item_links", "mask_asset", "pixel_asset", "validity_asset",
]  # fmt: skip

COLLECTION = "collection.json"
"""The root: what is put last."""

CATALOG = "catalog.json"
"""Of each split."""

STAC_VERSION = "1.1.0"

_PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_RASTER = "https://stac-extensions.github.io/raster/v2.0.0/schema.json"
_CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
_SCIENTIFIC = "https://stac-extensions.github.io/scientific/v1.0.0/schema.json"

GEOTIFF = "image/tiff; application=geotiff"

_DIGITS = 7
"""Of degrees: a centimetre."""

_LICENCE = re.compile(r"[\w\-.+]+")


@dataclass(frozen=True, slots=True)
class Extent:
    """Where and when chips lie."""

    boxes: tuple[Box, ...]
    """West, south, east, north: the first one around all of them; west of its east it crosses the antimeridian."""
    start: str
    """ISO 8601, UTC; what chips get of which nobody knows when they were taken."""
    end: str


@dataclass(frozen=True, slots=True)
class File:
    """A file of one chip: where it lies, and where its pixels lie."""

    href: str
    media: str
    """Its media type."""
    window: Box
    """xmin, ymin, xmax, ymax."""
    shape: tuple[int, int]
    """Rows and columns."""

    def facts(self, title: str, role: str, dtype: str) -> dict[str, Any]:
        """Return the fields that all assets have."""
        (west, south, east, north), (height, width) = self.window, self.shape
        return {
            "href": self.href,
            "type": self.media,
            "roles": [role],
            "title": title,
            "data_type": _data_type(dtype),
            "proj:bbox": list(self.window),
            "proj:shape": [height, width],
            "proj:transform": [(east - west) / width, 0.0, west, 0.0, (south - north) / height, north],
        }


@dataclass(frozen=True)
class ChipFacts:
    """What is known of one chip beside its pixels."""

    chip_id: str
    split: str
    """"" where there is none."""
    epsg: int
    bounds: Box
    outline: Any
    """Its ground, a shape in lon/lat."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""
    slots: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Source -> what is known of each slot, JSON values."""


def chip_facts(arrays: Arrays, sheets: Sequence[SourceSheet]) -> list[ChipFacts]:
    """Return what is known of each chip of a shard."""
    ids = arrays["chip_id"]
    n = len(ids)
    nothing = np.zeros(n, dtype=np.int64)
    epsg, bounds = arrays["epsg"].astype(np.int64), arrays["bbox"]
    frame = Frame(epsg, bounds, nothing, nothing, None, None, pa.array([""] * n, pa.string()))
    outlines = shapely.from_wkb(outline_wkb(frame).to_numpy(zero_copy_only=False))
    labels = {name.removeprefix("labels/"): v for name, v in arrays.items() if name.startswith("labels/")}
    slots = {sheet.name: _slots(arrays, sheet) for sheet in sheets}
    return [
        ChipFacts(
            str(ids[row]), str(arrays["split"][row]), int(epsg[row]), box_of(bounds[row]),
            outlines[row], {name: json_value(values[row]) for name, values in labels.items()},
            {name: own[row] for name, own in slots.items()},
        )
        for row in range(n)
    ]  # fmt: skip


def _slots(arrays: Arrays, sheet: SourceSheet) -> list[list[dict[str, Any]]]:
    """Return what is known of each slot of each chip."""
    valid = arrays[f"{sheet.name}/valid"]
    shares = valid.mean(axis=(2, 3), dtype=np.float64).round(6)
    when, present = arrays.get(f"{sheet.name}/datetime"), arrays.get(f"{sheet.name}/present")
    result = []
    for row in range(len(valid)):
        times: list[str | None] = [None] * valid.shape[1] if when is None else list(iso_of(when[row]))
        own = []
        for slot, time in enumerate(times):
            one: dict[str, Any] = {"datetime": time, "valid_fraction": float(shares[row, slot])}
            if sheet.slots is not None:
                one["slot"] = sheet.slots[slot]
            if present is not None:
                one["present"] = bool(present[row, slot])
            meta = {name: arrays.get(f"{sheet.name}/{name}") for name in sheet.meta}
            if there := {n: json_value(v[row, slot]) for n, v in meta.items() if v is not None}:
                one["meta"] = there
            own.append(one)
        result.append(own)
    return result


def json_value(value: Any) -> Any:
    """Return a NumPy scalar or text as a JSON value: NaN and NaT are null, times ISO 8601."""
    if isinstance(value, np.datetime64):
        return next(iso_of(np.array([value])))
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and not np.isfinite(plain):
        return None
    return plain


def item(
    chip: ChipFacts,
    sheets: Sequence[SourceSheet],
    assets: Mapping[str, Mapping[str, Any]],
    extent: Extent,
    links: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return the STAC Item of a chip.

    Parameters
    ----------
    chip
        What is known of it.
    sheets
        What its sources are.
    assets
        Its files: name -> what :func:`pixel_asset` and :func:`mask_asset` return.
    extent
        Of all chips: when this one was taken, if nobody knows more.
    links
        To the catalogs that hold it.
    """
    outline = _outlined(chip.outline)
    classes = any("classification:classes" in asset for asset in assets.values())
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [_PROJECTION, _RASTER, *([_CLASSIFICATION] if classes else [])],
        "id": chip.chip_id,
        "geometry": _geojson(outline),
        "bbox": [round(v, _DIGITS) for v in box_around(outline)],
        "properties": {
            **_times(chip, sheets, extent),
            **_crs(chip.epsg),
            **({"split": chip.split} if chip.split else {}),
            "labels": dict(chip.labels),
        },
        "links": [dict(link) for link in links],
        "assets": {name: dict(asset) for name, asset in assets.items()},
        **({"collection": "chips"} if links else {}),
    }


def pixel_asset(
    file: File,
    sheet: SourceSheet,
    slots: Sequence[Mapping[str, Any]],
    descriptions: Sequence[str],
    plain: bool,
) -> dict[str, Any]:
    """Return the asset of a source's pixels.

    Parameters
    ----------
    file
        Where it lies.
    sheet
        What its pixels are.
    slots
        What is known of each slot.
    descriptions
        What its bands are called.
    plain
        Whether nodata alone says which pixels are invalid.
    """
    classes = dict(sheet.classes)
    units = sheet.units if any(sheet.units) else ("",) * len(sheet.bands)
    bands: list[dict[str, Any]] = []
    for number, name in enumerate(descriptions):
        at = number % len(sheet.bands)
        bands.append({"name": name})
        if units[at]:
            bands[-1]["unit"] = units[at]
        if named := classes.get(sheet.bands[at]):
            bands[-1]["classification:classes"] = _classes(named)
    return {
        **file.facts(sheet.name, "data", sheet.dtype),
        **({"nodata": "nan" if sheet.fill is None else int(sheet.fill)} if plain else {}),
        **({"raster:scale": sheet.scale, "raster:offset": 0.0} if sheet.scale is not None else {}),
        "bands": bands,
        "slots": [dict(slot) for slot in slots],
    }


def mask_asset(file: File, sheet: MaskSheet) -> dict[str, Any]:
    """Return the asset of burned labels; arguments as :func:`pixel_asset`."""
    return {
        **file.facts(sheet.name, "labels", sheet.dtype),
        **({"classification:classes": _classes(sheet.named)} if sheet.classes else {}),
    }


def validity_asset(file: File, name: str) -> dict[str, Any]:
    """Return the asset that says where a source is valid; arguments as :func:`pixel_asset`."""
    return file.facts(f"{name} is valid", "validity", "uint8")


def catalog(split: str, items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the Catalog of a split.

    Parameters
    ----------
    split
        Its folder.
    items
        Id and file of each chip.
    """
    return {
        "type": "Catalog",
        "stac_version": STAC_VERSION,
        "id": split,
        "description": f"The chips of split {split}.",
        "links": [
            {"rel": "root", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "parent", "href": f"../{COLLECTION}", "type": "application/json"},
            *(
                {"rel": "item", "href": f"./{file}", "type": "application/geo+json", "title": chip}
                for chip, file in items
            ),
        ],
    }


def item_links() -> tuple[dict[str, str], ...]:
    """Return the links of every item: to its split's Catalog and to the Collection."""
    return (
        {"rel": "root", "href": f"../{COLLECTION}", "type": "application/json"},
        {"rel": "parent", "href": f"./{CATALOG}", "type": "application/json"},
        {"rel": "collection", "href": f"../{COLLECTION}", "type": "application/json"},
    )


def collection(
    sheets: Sequence[SourceSheet],
    labels: Mapping[str, str],
    splits: Mapping[str, int],
    extent: Extent,
    provenance: Provenance,
) -> dict[str, Any]:
    """Return the Collection: the root of the folder.

    Parameters
    ----------
    sheets
        What the sources are.
    labels
        Label column -> NumPy dtype.
    splits
        Folder -> chips, as planned.
    extent
        Where and when they lie.
    provenance
        Where they come from, and under which terms.
    """
    origins = provenance.by_member().origins
    citation = " ".join(dict.fromkeys(o.terms.attribution for o in origins if o.terms.attribution))
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [_PROJECTION, _RASTER, _CLASSIFICATION, *([_SCIENTIFIC] if citation else [])],
        "id": "chips",
        "title": "Chips of " + ", ".join(sheet.name for sheet in sheets),
        "description": _description(sheets, splits),
        "license": _licence(origins),
        **({"providers": providers} if (providers := _providers(origins)) else {}),
        **({"sci:citation": citation} if citation else {}),
        "extent": {
            "spatial": {"bbox": [[round(v, _DIGITS) for v in box] for box in extent.boxes]},
            "temporal": {"interval": [[extent.start, extent.end]]},
        },
        "summaries": {"split": list(splits)},
        "item_assets": _item_assets(sheets),
        "links": [
            {"rel": "root", "href": f"./{COLLECTION}", "type": "application/json"},
            *(
                {"rel": "child", "href": f"./{split}/{CATALOG}", "type": "application/json", "title": split}
                for split in splits
            ),
            *(
                {"rel": "license", "href": url}
                for url in dict.fromkeys(o.terms.licence_url for o in origins if o.terms.licence_url)
            ),
        ],
        "rasteret_dask": {
            "layout": {
                "sources": {sheet.name: sheet.facts for sheet in sheets},
                "labels": dict(labels),
                "splits": list(splits),
            },
            "steps": list(provenance.steps),
        },
    }


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON text, the same bytes on each run."""
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _description(sheets: Sequence[SourceSheet], splits: Mapping[str, int]) -> str:
    counts = ", ".join(f"{split} {count:,}" for split, count in splits.items())
    return (
        f"Training chips of {', '.join(sheet.name for sheet in sheets)}, written by rasteret_dask: {counts}."
    )


def _licence(origins: Sequence[MemberOrigin]) -> str:
    """Return the one licence of all, as an SPDX id; "other" where there are several, or none that has an id."""
    (licence, *others) = {o.terms.licence for o in origins} or {""}
    return licence if not others and _LICENCE.fullmatch(licence) and licence != "proprietary" else "other"


def _providers(origins: Sequence[MemberOrigin]) -> list[dict[str, Any]]:
    result = []
    for one in origins:
        hosts = ", ".join(one.hosts)
        text = " ".join(part for part in (one.terms.attribution, f"Files: {hosts}." if hosts else "") if part)
        name = one.terms.dataset or ", ".join(one.collections) or one.member
        licence = f" Licence: {one.terms.licence}." if one.terms.licence else ""
        result.append({"name": name, "description": text + licence, "roles": ["licensor", "producer"]})
    return result


def _item_assets(sheets: Sequence[SourceSheet]) -> dict[str, Any]:
    assets: dict[str, Any] = {}
    for sheet in sheets:
        assets[sheet.name] = {
            "title": sheet.name, "type": GEOTIFF, "roles": ["data"], "data_type": _data_type(sheet.dtype),
        }  # fmt: skip
        for mask in sheet.masks:
            assets[mask.name] = {
                "title": mask.name, "type": GEOTIFF, "roles": ["labels"], "data_type": _data_type(mask.dtype),
                **({"classification:classes": _classes(mask.named)} if mask.classes else {}),
            }  # fmt: skip
    return assets


def _times(chip: ChipFacts, sheets: Sequence[SourceSheet], extent: Extent) -> dict[str, Any]:
    """Return when a chip was taken: of slots that are composed of several acquisitions, when the slot begins."""
    times = set()
    for sheet in sheets:
        for slot in chip.slots.get(sheet.name, ()):
            when = slot["datetime"] or (slot.get("slot") if slot["valid_fraction"] else None)
            if when:
                times.add(when)
    first, last = (min(times), max(times)) if times else (extent.start, extent.end)
    if first == last:
        return {"datetime": first}
    return {"datetime": None, "start_datetime": first, "end_datetime": last}


def _crs(epsg: int) -> dict[str, Any]:
    return {"proj:code": spelled(epsg)} if epsg > 0 else {"proj:code": None, "proj:wkt2": wkt2(epsg)}


def _classes(named: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    return [
        {"value": value, "name": re.sub(r"[^0-9A-Za-z_-]", "_", name), "title": name} for value, name in named
    ]


def _data_type(dtype: str) -> str:
    """Return what STAC calls a dtype."""
    names = {"bool": "uint8", "complex64": "cfloat32", "complex128": "cfloat64"}
    return names.get(dtype, dtype)


def _outlined(outline: Any) -> Any:
    """Return a shape in rounded degrees, outer rings against the clock, as GeoJSON wants them."""
    parts = [
        orient(shapely.transform(part, lambda xy: np.round(xy, _DIGITS)))
        for part in shapely.get_parts(outline)
    ]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _geojson(outline: Any) -> dict[str, Any]:
    geometry: dict[str, Any] = json.loads(shapely.to_geojson(outline))
    return geometry


def extent_of(bounds: NDArray[np.float64], sheets: Sequence[SourceSheet], provenance: Provenance) -> Extent:
    """Return where and when chips lie.

    Parameters
    ----------
    bounds
        Shape (chip, 4): west, south, east, north of their outlines, degrees; west of its east across the antimeridian.
    sheets
        What their sources are.
    provenance
        Their records.
    """
    slots = [slot for sheet in sheets for slot in sheet.slots or ()]
    starts = [one.start for one in provenance.origins if one.start] or slots
    ends = [one.end for one in provenance.origins if one.end] or slots
    start = _utc(min(starts)) if starts else "1970-01-01T00:00:00Z"
    end = _utc(max(ends)) if ends else "9999-12-31T23:59:59Z"
    return Extent((_box(bounds),), start, end)


def _utc(text: str) -> str:
    when = np.datetime64(text.removesuffix("Z").removesuffix("+00:00"), "us")
    return str(next(iso_of(np.array([when]))))


def _box(bounds: NDArray[np.float64]) -> Box:
    """Return the box around boxes; where some cross the antimeridian, or that is the short way, so does it."""
    west, east = bounds[:, 0], bounds[:, 2]
    south, north = float(bounds[:, 1].min()), float(bounds[:, 3].max())
    spans = np.stack([west, np.where(east < west, east + 360, east)], -1)
    order = np.argsort(spans[:, 0])
    reach = np.maximum.accumulate(spans[order, 1])
    starts = spans[order, 0]
    gaps = [(b - a, b, a) for a, b in zip(reach[:-1], starts[1:], strict=True)]
    gaps.append((starts[0] + 360 - reach[-1], starts[0], reach[-1]))
    widest, begin, end = max(gaps)
    if widest <= 0:
        return -180.0, south, 180.0, north
    return float(begin), south, float((end + 180) % 360 - 180), north
