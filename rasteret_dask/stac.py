"""STAC items become records."""

from __future__ import annotations

import datetime as dt
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from shapely.errors import ShapelyError
from shapely.geometry import shape

from rasteret_dask.bands import DATASETS, Dataset, dataset_of
from rasteret_dask.describe import describe
from rasteret_dask.errors import SourceError
from rasteret_dask.headers import read_headers
from rasteret_dask.layers import Layer, check_bands, epsg_of, layers_of, restrict
from rasteret_dask.records import RECORD_SCHEMA, conform
from rasteret_dask.sources import Item, read_items
from rasteret_dask.trust import checked, resolve

__all__ = ["Item", "facts_of", "instant", "items_to_table", "known_dataset", "read_items"]

_LANDSATLOOK = "https://landsatlook.usgs.gov/data/"  # asks for a login; the same files lie in a public bucket
_IN_COLUMNS = (
    "datetime", "start_datetime", "end_datetime", "eo:cloud_cover", "platform", "eo:platform", "proj:epsg",
    "proj:code", "created", "eo:bands",
)  # fmt: skip

Range = tuple[dt.datetime | None, dt.datetime | None]


def items_to_table(
    items: Sequence[Item],
    *,
    name: str,
    bands: Sequence[str] | None = None,
    dataset: str | None = None,
    headers: bool = True,
    workers: int = 16,
    bbox: tuple[float, float, float, float] | None = None,
    date_range: Any = None,
) -> pa.Table:
    """Turn STAC items into a record table.

    Parameters
    ----------
    items
        As :func:`read_items` returns them.
    name
        What the table is called in messages.
    bands
        Keep only these, by code, common name or asset key.
    dataset
        Name of a known dataset, where the items' collection does not say it.
    headers
        Read the files' headers. Without, levels come from the items' ``proj:`` fields, and have no tile tables.
    workers
        Requests in flight.
    bbox
        (xmin, ymin, xmax, ymax) in lon/lat; items whose geometry does not meet it are left out.
    date_range
        (start, end) or "start/end", UTC; items whose time does not meet it are left out. A date without time
        counts as the whole day (month, year); an end with a time of day is exclusive.

    Returns
    -------
    pyarrow.Table
        Of RECORD_SCHEMA, in the order of the items. An asset whose header cannot be read keeps the reason in
        its ``error``.

    Raises
    ------
    SourceError
        When an item is broken, or none is left.
    TrustError
        When an item names a place that its origin must not name.
    BandError
        When no item has a band that was asked for.
    """
    within = _range(date_range)
    rows = [row for item in items if (row := _row(item)) and _meets(row, bbox, within)]
    if not rows:
        raise SourceError(
            f"items of {name!r}", f"none of {len(items)} in the box and range asked for", "at least one item"
        )
    rows = _newest(rows, name)
    layers = [layers_of(row["item"].data, known_dataset(dataset, row["collection"])) for row in rows]
    check_bands(layers, bands)
    placed = [_placed(row["item"], restrict(own, bands)) for row, own in zip(rows, layers, strict=True)]
    found = None
    if headers:
        found = read_headers([layer.href for own in placed for layer in own], workers)
    for row, own in zip(rows, placed, strict=True):
        described = describe(own, row.pop("item").data["properties"], found)
        row["assets"], row["headers_metadata"] = list(described.assets), list(described.levels)
        row["proj:epsg"] = described.epsg or row["proj:epsg"]
        row["geometry"] = row["geometry"] or described.footprint
        _fill_bbox(row)
    return conform(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), name)


def known_dataset(dataset: str | None, collection: str | None) -> Dataset | None:
    """Return the dataset asked for, or the one a collection id names, or None.

    Raises
    ------
    SourceError
        When ``dataset`` is given and not known.
    """
    if dataset is None:
        return dataset_of(collection)
    found = dataset_of(dataset)
    if found is None:
        raise SourceError(f"dataset {dataset!r}", "no such dataset", f"one of {', '.join(DATASETS)}")
    return found


def facts_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of RECORD_SCHEMA that STAC properties settle, except times and geometry."""
    uri = str(properties.get("s2:product_uri") or "")
    cloud = properties.get("eo:cloud_cover")
    platform = properties.get("platform") or properties.get("eo:platform")
    return {
        "eo:cloud_cover": None if cloud is None else float(cloud),
        "platform": str(platform).lower().replace("_", "-") if platform else None,
        "datatake": _datatake(properties, uri),
        "orbit": _orbit(properties, uri),
        "tile": _tile(properties),
        "baseline": _text(properties.get("s2:processing_baseline") or properties.get("processing:version")),
        "created": _created(properties),
        "proj:epsg": epsg_of(properties),
    }


def instant(value: Any) -> dt.datetime | None:
    """Return a time as an aware UTC datetime, None for None; text is RFC 3339 or a date.

    Raises
    ------
    ValueError
        When it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = dt.datetime.fromisoformat(value.strip())
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if not isinstance(value, dt.datetime):
        raise ValueError(f"no time: {value!r}")
    aware: dt.datetime = value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)
    return aware.astimezone(dt.UTC)


def _row(item: Item) -> dict[str, Any]:
    """Return one row without what headers tell, with the item itself under "item"."""
    data = item.data
    if not isinstance(data.get("id"), str) or not data["id"]:
        raise SourceError(f"an item of {item.base or 'memory'}", f"id {data.get('id')!r}", "a text id")
    properties = data.get("properties")
    if not isinstance(properties, Mapping):
        raise SourceError(f"item {item.id!r}", "no properties", "a STAC item")
    if not isinstance(data.get("assets"), Mapping) or not data["assets"]:
        raise SourceError(f"item {item.id!r}", "no assets", "at least one asset")
    try:
        row = {key: instant(properties.get(key)) for key in ("datetime", "start_datetime", "end_datetime")}
        facts = facts_of(properties)
        geometry = _geometry(data)
    except (ValueError, TypeError, KeyError, ShapelyError) as error:
        raise SourceError(f"item {item.id!r}", str(error), "valid times, numbers and geometry") from error
    row["datetime"] = row["datetime"] or row["start_datetime"]
    if row["datetime"] is None:
        raise SourceError(f"item {item.id!r}", "neither datetime nor start_datetime", "one of them")
    collection = data.get("collection")
    box = data.get("bbox")
    return {
        **row,
        **facts,
        "id": data["id"],
        "collection": collection if isinstance(collection, str) else None,
        "geometry": geometry,
        "scene_bbox": [float(v) for v in box]
        if isinstance(box, list | tuple) and len(box) in (4, 6)
        else None,
        "properties": json.dumps(
            {k: v for k, v in properties.items() if k not in _IN_COLUMNS}, default=str, sort_keys=True
        ),
        "item": item,
    }


def _geometry(data: Mapping[str, Any]) -> bytes | None:
    """Return WKB of an item's geometry, else of its bbox, else None."""
    geometry, box = data.get("geometry"), data.get("bbox")
    if isinstance(geometry, Mapping) and geometry.get("type"):
        outline = shapely.force_2d(shape(geometry))
        if not outline.is_empty:
            return bytes(shapely.to_wkb(outline))
    if isinstance(box, list | tuple) and len(box) in (4, 6):
        flat = [float(v) for v in (box if len(box) == 4 else (box[0], box[1], box[3], box[4]))]
        return bytes(shapely.to_wkb(_box(flat)))
    return None


def _box(bbox: Sequence[float]) -> Any:
    """Return a lon/lat box; west of its east across the antimeridian it is two."""
    xmin, ymin, xmax, ymax = bbox
    if xmin <= xmax:
        return shapely.box(xmin, ymin, xmax, ymax)
    return shapely.MultiPolygon([shapely.box(xmin, ymin, 180.0, ymax), shapely.box(-180.0, ymin, xmax, ymax)])


def _fill_bbox(row: dict[str, Any]) -> None:
    box = row["scene_bbox"]
    if box is not None and len(box) == 6:
        box = [box[0], box[1], box[3], box[4]]
    if box is None and row["geometry"] is not None:
        box = [float(v) for v in shapely.from_wkb(row["geometry"]).bounds]
    row["scene_bbox"] = box
    row["bbox"] = None if box is None else dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))


def _meets(row: Mapping[str, Any], bbox: Sequence[float] | None, within: Range) -> bool:
    start, end = within
    first = row["start_datetime"] or row["datetime"]
    last = row["end_datetime"] or row["datetime"]
    if (start is not None and last < start) or (end is not None and first >= end):
        return False
    if bbox is None or row["geometry"] is None:
        return True
    return bool(shapely.from_wkb(row["geometry"]).intersects(_box(bbox)))


def _range(date_range: Any) -> Range:
    if date_range is None:
        return None, None
    parts = date_range.split("/") if isinstance(date_range, str) else list(date_range)
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2:
        raise SourceError(f"date_range {date_range!r}", f"{len(parts)} parts", "(start, end)")
    try:
        start, end = (None if p in (None, "", "..") else p for p in parts)
        return _edge(start, 0), _edge(end, 1)
    except ValueError as error:
        raise SourceError(f"date_range {date_range!r}", str(error), "dates or RFC 3339 times") from error


def _edge(value: Any, after: int) -> dt.datetime | None:
    """Return the start (``after=0``) or the exclusive end (1) of what a time or a date names."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = value.isoformat()
    if isinstance(value, str) and (parts := re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", value.strip())):
        whole = np.datetime64(parts[0])  # of unit year, month or day, as it is written
        return instant((whole + np.timedelta64(after)).astype("datetime64[us]").item())
    return instant(value)


def _newest(rows: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Keep one row an id, of the newest baseline, then creation."""

    def age(row: Mapping[str, Any]) -> tuple[str, dt.datetime]:
        return row["baseline"] or "", row["created"] or dt.datetime.min.replace(tzinfo=dt.UTC)

    kept: dict[str, dict[str, Any]] = {}
    twice = 0
    for row in rows:
        before = kept.get(row["id"])
        twice += before is not None
        if before is None or age(row) > age(before):
            kept[row["id"]] = row
    if twice:
        warnings.warn(
            f"{name}: {twice} items repeat the id of another and are left out; of each id the one with the "
            "newest baseline and creation time is kept. Build them as two collections to keep both.",
            UserWarning,
            stacklevel=3,
        )
    return list(kept.values())


def _placed(item: Item, layers: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers with absolute hrefs that their origin may name."""
    placed = []
    for layer in layers.values():
        href = resolve(layer.href, item.base)
        subject = f"item {item.id!r}, asset {layer.asset!r}"
        # what is written counts too: joined to a base, VRT text or /vsi would look like a plain path
        checked(
            layer.href if layer.href.lstrip().startswith("<") else href, local=item.local, subject=subject
        )
        if href.startswith(_LANDSATLOOK):
            href = "s3://usgs-landsat/" + href.removeprefix(_LANDSATLOOK)
        placed.append(replace(layer, href=href))
    return placed


def _datatake(properties: Mapping[str, Any], uri: str) -> str | None:
    """Return e.g. ``GS2A_20240422T173911_046141``: Sentinel-2's datatake id without its baseline."""
    said = properties.get("s2:datatake_id")
    if said:
        return re.sub(r"_N\d\d\.?\d\d$", "", str(said))
    parts = re.match(r"(S2[A-D])_MSIL\w\w_(\d{8}T\d{6})_", uri)
    if parts is None:
        return None
    granule = str(properties.get("s2:granule_id") or properties.get("s2:tile_id") or "")
    absolute = re.search(r"_A(\d{6})_", granule)
    return f"G{parts[1]}_{parts[2]}" + (f"_{absolute[1]}" if absolute else "")


def _orbit(properties: Mapping[str, Any], uri: str) -> int | None:
    said = properties.get("sat:relative_orbit")
    if said is None and (found := re.search(r"_R(\d{3})_", uri)):
        said = found[1]
    said = properties.get("landsat:wrs_path") if said is None else said
    return None if said is None else int(said)


def _tile(properties: Mapping[str, Any]) -> str | None:
    """Return a grid code of the STAC grid extension, without leading zeros in MGRS zones."""
    code, mgrs = properties.get("grid:code"), properties.get("s2:mgrs_tile")
    parts = [properties.get(f"mgrs:{p}") for p in ("utm_zone", "latitude_band", "grid_square")]
    path, row = properties.get("landsat:wrs_path"), properties.get("landsat:wrs_row")
    if not code and mgrs:
        code = f"MGRS-{mgrs}"
    if not code and None not in parts:
        code = "MGRS-" + "".join(map(str, parts))
    if not code and path is not None and row is not None:
        code = f"WRS{properties.get('landsat:wrs_type') or 2}-{int(path):03d}{int(row):03d}"
    return re.sub(r"^MGRS-0", "MGRS-", str(code)) if code else None


def _created(properties: Mapping[str, Any]) -> dt.datetime | None:
    for key in ("created", "s2:generation_time", "landsat:product_generated"):
        if properties.get(key) is not None:
            return instant(properties[key])
    return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
