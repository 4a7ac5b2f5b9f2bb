"""Made-up record tables for tests of planning: real-looking headers, and no file behind them."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyproj
import shapely

import rasteret_dask as rd
from rasteret_dask.rules.kinds import quality_kind

COMMON = {
    "B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "SCL": None,
    "B4": "red", "B5": "nir", "qa_pixel": None, "data": None,
}  # fmt: skip
QUALITY = ("SCL", "qa_pixel")


def utc(text: str) -> dt.datetime:
    """Return ISO 8601 text as a time in UTC."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def project(shape: shapely.Geometry, source: int, target: int) -> Any:
    """Return a shape's vertices in another CRS, with straight edges between them."""
    move = pyproj.Transformer.from_crs(source, target, always_xy=True).transform
    return shapely.transform(shape, lambda p: np.stack(move(p[:, 0], p[:, 1]), -1))


def record(
    name: str,
    *,
    west: float = 500_000.0,
    north: float = 5_400_000.0,
    px: tuple[int, int] = (400, 400),
    pixel: float = 10.0,
    epsg: int = 32633,
    when: str = "2024-04-10T10:00:00",
    until: str | None = None,
    ground: shapely.Geometry | None = None,
    bands: tuple[str, ...] = ("B04", "B08", "SCL"),
    unreadable: tuple[str, ...] = (),
    tile_px: int = 128,
    scale: float = 1e-4,
    properties: dict[str, Any] | None = None,
    cloud: float | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """Return one row of RECORD_SCHEMA.

    Parameters
    ----------
    west, north, px, pixel, epsg
        The raster: its corner, (width, height) and pixel size.
    until
        End of an interval that begins at ``when``.
    ground
        Footprint in ``epsg``; None: the raster's rectangle.
    **columns
        Any other column.
    """
    south, east = north - px[1] * pixel, west + px[0] * pixel
    rectangle = shapely.box(west, south, east, north)
    outline = project(rectangle if ground is None else ground, epsg, 4326)
    corners = [float(v) for v in outline.bounds]
    return {
        "id": name,
        "collection": "sentinel-2-l2a",
        "datetime": utc(when),
        "start_datetime": utc(when) if until else None,
        "end_datetime": utc(until) if until else None,
        "geometry": shapely.to_wkb(outline),
        "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)),
        "scene_bbox": corners,
        "proj:epsg": epsg,
        "eo:cloud_cover": cloud,
        "platform": "sentinel-2a",
        "assets": [(b, _asset(name, b, scale, b in unreadable)) for b in bands],
        "headers_metadata": [
            (b, [_level(west, north, px, pixel, tile_px)]) for b in bands if b not in unreadable
        ],
        "properties": json.dumps(properties) if properties else None,
        **columns,
    }


def _asset(name: str, band: str, scale: float, unreadable: bool) -> dict[str, Any]:
    return {
        "href": f"s3://bucket/{name}/{band}.tif", "band_index": 0, "asset": band.lower(),
        "dataset": None, "common_name": COMMON[band], "scale": scale, "offset": 0.0, "rule": "item",
        "nodata": "0", "dtype": "uint16", "role": "quality" if band in QUALITY else "data",
        "kind": quality_kind(band) if band in QUALITY else "reflectance",
        "size": 1000, "etag": name, "error": "truncated" if unreadable else None,
    }  # fmt: skip


def _level(west: float, north: float, px: tuple[int, int], pixel: float, tile_px: int) -> dict[str, Any]:
    tiles = -(-px[0] // tile_px) * -(-px[1] // tile_px)
    return {
        "kind": "image", "driver": "GTiff", "width": px[0], "height": px[1], "tile_width": tile_px,
        "tile_height": tile_px, "dtype": "uint16", "byteorder": "<", "compression": 8, "predictor": 2,
        "planar": 1, "samples": 1, "transform": [pixel, 0.0, west, 0.0, -pixel, north],
        "tile_offsets": [1000 * (i + 1) for i in range(tiles)], "tile_byte_counts": [1000] * tiles,
    }  # fmt: skip


def table(*rows: dict[str, Any]) -> pa.Table:
    """Return rows as a record table; columns beyond RECORD_SCHEMA stay behind it."""
    more = [n for n in rows[0] if n not in rd.RECORD_SCHEMA.names]
    own = pa.Table.from_pylist(list(rows), schema=rd.RECORD_SCHEMA)
    for name in more:
        own = own.append_column(name, pa.array([r.get(name) for r in rows]))
    return own


def collection(name: str, *rows: dict[str, Any]) -> rd.Collection:
    """Return rows as a collection."""
    return rd.as_collection(table(*rows), name=name)


def ids(chips: rd.Chips) -> list[str]:
    """Return the chips' ids, in their order."""
    return list(chips.table.column("chip_id").to_pylist())


def boxes(chips: rd.Chips) -> Any:
    """Return the chips as shapes of their CRS."""
    return shapely.box(*(chips.table.column(n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax")))


def fed_by(chips: rd.Chips) -> list[dict[tuple[str, int], list[str]]]:
    """Return for each chip {(source, slot): ids of its records in the order they are used}."""
    found = []
    for feeds in chips.table.column("feeds").to_pylist():
        own: dict[tuple[str, int], list[str]] = {}
        for f in feeds:
            own.setdefault((f["source"], f["slot"]), []).append(f["record"])
        found.append(own)
    return found
