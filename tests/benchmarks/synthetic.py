"""Record tables of any size with real tile tables, without a file behind them."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import shapely

from rasteret_dask.grid import transformer
from rasteret_dask.table.records import RECORD_SCHEMA

SIDE_PX = 10980
TILE_PX = 1024

STEP_M = 99_960.0
"""From one granule to the next; granules are 109.8 km wide, so they overlap."""

COLUMNS = 5
"""Granules side by side in a zone: at 45 N they reach a little into both neighbours, as the real ones do."""

BANDS = ("B02", "B03", "B04", "B08")


def sentinel2_records(
    tiles: int, dates: int, zones: int = 2, days: int = 365, side_px: int = SIDE_PX
) -> pa.Table:
    """Return scenes of ``tiles`` Sentinel-2 granules on ``dates`` days, four bands, overviews and all.

    Parameters
    ----------
    tiles
        Granules over all zones, in blocks of :data:`COLUMNS` columns south of 52 N.
    dates
        Acquisitions of each granule, evenly over ``days`` from 2024-01-01. All granules of a zone that are seen on
        one day are one datatake.
    zones
        UTM zones side by side, from 32 on.
    side_px
        Side of a granule in pixels of 10 m.
    """
    rng = np.random.default_rng(1)
    per_zone = -(-tiles // zones)
    places = [(32 + z, i % COLUMNS, i // COLUMNS) for z in range(zones) for i in range(per_zone)][:tiles]
    return pa.concat_tables(
        pa.Table.from_pylist(
            [_record(*place, n, day * days / dates, side_px, rng) for day in range(dates)],
            schema=RECORD_SCHEMA,
        )
        for n, place in enumerate(places)
    )


def _record(
    zone: int, col: int, row: int, tile: int, day: float, side_px: int, rng: np.random.Generator
) -> dict[str, object]:
    x0, y0 = 250_020.0 + col * STEP_M, 5_760_000.0 - row * STEP_M
    extent = side_px * 10.0
    swath = float(rng.integers(0, 3)) * 0.07 * extent  # some scenes end inside their tile
    x = np.array([x0, x0 + extent - swath, x0 + extent - swath, x0])
    y = np.array([y0, y0, y0 - extent, y0 - extent])
    lon, lat = transformer(32600 + zone, 4326).transform(x, y)
    when = dt.datetime(2024, 1, 1, 10, tzinfo=dt.UTC) + dt.timedelta(days=day, seconds=15 * row + zone)
    record = f"S2A_{zone}_{tile:04d}_{when:%Y%m%d}_0_L2A"
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
        "datatake": f"GS2A_{when:%Y%m%d}_{zone}",
        "tile": f"MGRS-{zone}{tile}",
        "assets": [(b, _asset(record, b)) for b in BANDS],
        "headers_metadata": [(b, _levels(x0, y0, side_px, rng)) for b in BANDS],
    }


def _asset(record: str, band: str) -> dict[str, object]:
    return {
        "href": f"s3://sentinel-cogs/sentinel-s2-l2a-cogs/2024/{record}/{band}.tif", "band_index": 0, "asset": band,
        "dataset": "sentinel-2-l2a", "common_name": None, "scale": 1e-4, "offset": 0.0, "rule": "item", "nodata": "0",
        "dtype": "uint16", "kind": "reflectance", "size": 200_000_000, "etag": f"{record}{band}",
    }  # fmt: skip


def _levels(x0: float, y0: float, side_px: int, rng: np.random.Generator) -> list[dict[str, object]]:
    levels = []
    for n in range(5):
        size, pixel = -(-side_px // 2**n), 10.0 * side_px / -(-side_px // 2**n)
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
