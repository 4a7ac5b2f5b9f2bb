"""Record tables of any size with real tile tables, without a file behind them."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import shapely

from rasteret_dask.grid import transformer
from rasteret_dask.records import RECORD_SCHEMA

SIDE_PX = 10980
TILE_PX = 1024


def sentinel2_records(
    tiles: int, dates: int, bands: tuple[str, ...] = ("B02", "B03", "B04", "B08")
) -> pa.Table:
    """Return ``tiles`` x ``dates`` records of full-size Sentinel-2 scenes in zones 32 and 33, overviews and all."""
    rng = np.random.default_rng(1)
    side = int(np.ceil(np.sqrt(tiles / 2)))
    places = [(zone, i, j) for zone in (32, 33) for i in range(side) for j in range(side)][:tiles]
    rows = []
    for zone, i, j in places:
        x0, y0 = 300000.0 + i * 99960.0, 5700000.0 - j * 99960.0
        rows += [_record(zone, x0, y0, i * side + j, day, bands, rng) for day in range(dates)]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def _record(
    zone: int, x0: float, y0: float, tile: int, day: int, bands: tuple[str, ...], rng: np.random.Generator
) -> dict[str, object]:
    extent = SIDE_PX * 10.0
    swath = float(rng.integers(0, 3)) * 8000.0  # some scenes end inside their tile
    x = np.array([x0, x0 + extent - swath, x0 + extent - swath, x0])
    y = np.array([y0, y0, y0 - extent, y0 - extent])
    lon, lat = transformer(32600 + zone, 4326).transform(x, y)
    when = dt.datetime(2024, 1, 1, 10, tzinfo=dt.UTC) + dt.timedelta(days=day * 365 / 40, seconds=tile)
    record = f"S2_{zone}_{tile}_{day}"
    box = [float(min(lon)), float(min(lat)), float(max(lon)), float(max(lat))]
    return {
        "id": record,
        "collection": "sentinel-2-l2a",
        "datetime": when,
        "geometry": shapely.to_wkb(shapely.Polygon(np.stack([lon, lat], -1))),
        "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
        "scene_bbox": box,
        "proj:epsg": 32600 + zone,
        "eo:cloud_cover": float(rng.integers(0, 100)),
        "platform": "sentinel-2a",
        "datatake": f"GS2A_{when:%Y%m%dT%H%M%S}_{zone}_{tile}",
        "tile": f"MGRS-{zone}{tile}",
        "assets": [(b, _asset(record, b)) for b in bands],
        "headers_metadata": [(b, _levels(x0, y0, rng)) for b in bands],
    }


def _asset(record: str, band: str) -> dict[str, object]:
    return {
        "href": f"s3://sentinel-cogs/sentinel-s2-l2a-cogs/2024/{record}/{band}.tif", "band_index": 0, "asset": band,
        "dataset": "sentinel-2-l2a", "common_name": None, "scale": 1e-4, "offset": 0.0, "rule": "item", "nodata": 0.0,
        "dtype": "uint16", "role": "reflectance", "size": 200_000_000, "etag": f"{record}{band}",
    }  # fmt: skip


def _levels(x0: float, y0: float, rng: np.random.Generator) -> list[dict[str, object]]:
    levels = []
    for n in range(5):
        size, pixel = -(-SIDE_PX // 2**n), 10.0 * SIDE_PX / -(-SIDE_PX // 2**n)
        count = (-(-size // TILE_PX)) ** 2
        sizes = rng.integers(900_000, 1_600_000, count)
        levels.append(
            {
                "kind": "image" if n == 0 else "overview",
                "driver": "GTiff",
                "width": size,
                "height": size,
                "tile_width": TILE_PX,
                "tile_height": TILE_PX,
                "dtype": "uint16",
                "byteorder": "<",
                "compression": 8,
                "predictor": 2,
                "planar": 1,
                "samples": 1,
                "transform": [pixel, 0.0, x0, 0.0, -pixel, y0],
                "tile_offsets": np.cumsum(sizes).tolist(),
                "tile_byte_counts": sizes.tolist(),
            }
        )
    return levels
