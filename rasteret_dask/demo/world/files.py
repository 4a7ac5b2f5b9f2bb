# SPDX-License-Identifier: Apache-2.0
"""Writes the rasters and the static STAC catalogs of the made-up world."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray

from rasteret_dask.demo.world.layout import EPSG, Grid, lonlat_ring

__all__ = ["JSON", "CogStyle", "asset", "item", "write_cog", "write_collection", "write_json"]

JSON = dict[str, Any]

_STAC = "1.0.0"
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_EXTENSIONS = tuple(
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v1.1.0", "raster/v1.1.0", "eo/v1.1.0", "grid/v1.1.0")
)


@dataclass(frozen=True, slots=True)
class CogStyle:
    """How a COG is laid out; all are deflated with the predictor of their type."""

    tile_px: int
    """Side of an internal tile."""
    overviews: Literal["AVERAGE", "NEAREST"]
    """Resampling of the overviews."""
    nodata: int = 0
    """DN that means no data."""


def write_cog(path: Path, pixels: NDArray[np.generic], grid: Grid, style: CogStyle) -> None:
    """Write one band, shape (y, x) and north-up, as a cloud-optimized GeoTIFF on ``grid``."""
    profile = {
        "driver": "COG",
        "width": grid.width,
        "height": grid.height,
        "count": 1,
        "dtype": pixels.dtype.name,
        "crs": f"EPSG:{EPSG}",
        "transform": grid.transform,
        "nodata": style.nodata,
        "blocksize": style.tile_px,
        "compress": "DEFLATE",
        "predictor": "YES",
        "overview_resampling": style.overviews,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels, 1)


def asset(href: str, grid: Grid, raster: JSON, band: JSON | None, roles: Sequence[str]) -> JSON:
    """Describe a one-band COG.

    Parameters
    ----------
    href
        The file's name, relative to the item.
    grid
        Where it lies.
    raster
        The only entry of ``raster:bands``.
    band
        The only entry of ``eo:bands``, or None for a quality band.
    roles
        STAC asset roles.
    """
    described: JSON = {"href": f"./{href}", "type": _COG, "gsd": grid.pixel_m, "roles": list(roles)}
    described["proj:shape"] = [grid.height, grid.width]
    described["proj:transform"] = list(grid.transform)[:6]
    described["raster:bands"] = [{**raster, "spatial_resolution": grid.pixel_m}]
    if band is not None:
        described["eo:bands"] = [band]
    return described


def item(
    collection: str,
    name: str,
    corners: tuple[tuple[float, float], ...],
    properties: Mapping[str, Any],
    assets: Mapping[str, JSON],
) -> JSON:
    """Return a STAC item.

    Parameters
    ----------
    collection
        Id of its collection, whose ``collection.json`` lies one folder up.
    name
        The item's id.
    corners
        (x, y) of its footprint, metres.
    properties
        Its properties, with ``datetime``.
    assets
        Its assets by key.
    """
    ring = lonlat_ring(corners)
    lons, lats = [p[0] for p in ring], [p[1] for p in ring]
    up = {"href": "../collection.json", "type": "application/json"}
    return {
        "type": "Feature",
        "stac_version": _STAC,
        "stac_extensions": list(_EXTENSIONS),
        "id": name,
        "collection": collection,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "properties": {**properties, "proj:epsg": EPSG},
        "links": [{"rel": rel, **up} for rel in ("root", "parent", "collection")],
        "assets": dict(assets),
    }


def write_collection(folder: Path, name: str, description: str, items: Sequence[JSON]) -> Path:
    """Write each item into ``folder/<id>/<id>.json``, and ``folder/collection.json`` with links to them.

    Returns
    -------
    The path of ``collection.json``.
    """
    boxes = np.array([i["bbox"] for i in items])
    times = [i["properties"].get("datetime") or i["properties"]["start_datetime"] for i in items]
    ends = [i["properties"].get("datetime") or i["properties"]["end_datetime"] for i in items]
    collection = {
        "type": "Collection",
        "stac_version": _STAC,
        "stac_extensions": [],
        "id": name,
        "title": f"{name} of a made-up world",
        "description": description,
        "license": "CC0-1.0",
        "extent": {
            "spatial": {"bbox": [[*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]]},
            "temporal": {"interval": [[min(times), max(ends)]]},
        },
        "links": [
            {"rel": "root", "href": "./collection.json", "type": "application/json"},
            *(
                {"rel": "item", "href": f"./{i['id']}/{i['id']}.json", "type": "application/geo+json"}
                for i in items
            ),
        ],
    }
    for i in items:
        write_json(folder / i["id"] / f"{i['id']}.json", i)
    write_json(folder / "collection.json", collection)
    return folder / "collection.json"


def write_json(path: Path, content: JSON) -> None:
    """Write a JSON file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
