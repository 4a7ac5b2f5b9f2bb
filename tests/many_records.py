"""Pages of realistic records, made fast: Sentinel-2 tiles over years, five bands of five levels each."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import shapely

from rasteret_dask.table.records import ASSET_TYPE, LEVEL_TYPE, RECORD_SCHEMA

BANDS = (("B02", "blue"), ("B03", "green"), ("B04", "red"), ("B08", "nir"), ("SCL", None))
SIDES = (10980, 5490, 2745, 1373, 687)
TILE_PX = 1024
TILES_PER_LEVEL = [(-(-side // TILE_PX)) ** 2 for side in SIDES]
FIRST_DAY = dt.datetime(2019, 1, 1, 10, tzinfo=dt.UTC)


def pages(count: int, page: int = 500, places: int = 250, seed: int = 5) -> Iterator[pa.Table]:
    """Yield ``count`` records in tables of ``page`` rows: every place once, then again five days later.

    Places are 100 km squares, 25 a row, from 0 E 40 N on; ids are ``tile-number``.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, count, page):
        yield _page(np.arange(start, min(count, start + page)), places, rng)


def _page(number: np.ndarray, places: int, rng: np.random.Generator) -> pa.Table:
    n = len(number)
    place, turn = number % places, number // places
    west, south = (place % 25) * 1.3, 40.0 + (place // 25) * 0.9
    boxes = np.stack([west, south, west + 1.35, south + 0.95], axis=1)
    when = [
        FIRST_DAY + dt.timedelta(days=int(5 * t), seconds=int(p)) for t, p in zip(turn, place, strict=True)
    ]
    ids = [f"S2_T{p:03d}_{i:06d}_L2A" for p, i in zip(place, number, strict=True)]
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids),
        "collection": pa.array(["sentinel-2-l2a"] * n),
        "datetime": pa.array(when, pa.timestamp("us", tz="UTC")),
        "geometry": pa.array(list(shapely.to_wkb(shapely.box(*boxes.T))), pa.binary()),
        "bbox": pa.StructArray.from_arrays(
            [pa.array(v) for v in boxes.T], names=["xmin", "ymin", "xmax", "ymax"]
        ),
        "scene_bbox": pa.array(list(boxes), pa.list_(pa.float64())),
        "proj:epsg": pa.array(32631 + place % 4, pa.int32()),
        "eo:cloud_cover": pa.array(rng.uniform(0, 100, n)),
        "platform": pa.array(np.where(turn % 2 == 0, "sentinel-2a", "sentinel-2b")),
        "tile": pa.array([f"MGRS-T{p:03d}" for p in place]),
        "assets": _map(n, _assets(ids, rng), ASSET_TYPE),
        "headers_metadata": _map(n, _levels(n * len(BANDS), rng), pa.list_(LEVEL_TYPE)),
    }
    arrays = [columns.get(f.name, pa.nulls(n, f.type)).cast(f.type) for f in RECORD_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=RECORD_SCHEMA)


def _map(n: int, items: pa.Array, kind: pa.DataType) -> pa.Array:
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * len(BANDS))
    keys = pa.array([b for b, _ in BANDS] * n)
    return pa.MapArray.from_arrays(offsets, keys, items, type=pa.map_(pa.string(), kind))


def _assets(ids: list[str], rng: np.random.Generator) -> pa.Array:
    n = len(ids) * len(BANDS)
    values = {
        "href": pa.array([f"https://sentinel-cogs.s3.us-west-2.amazonaws.com/sentinel-s2-l2a-cogs/{i}/{b}.tif"
                          for i in ids for b, _ in BANDS]),
        "band_index": pa.array(np.zeros(n, np.int32)),
        "asset": pa.array([c or b.lower() for _ in ids for b, c in BANDS]),
        "dataset": pa.array(["sentinel-2-l2a"] * n),
        "common_name": pa.array([c for _ in ids for _, c in BANDS], pa.string()),
        "scale": pa.array(np.full(n, 1e-4)),
        "offset": pa.array(np.zeros(n)),
        "rule": pa.array(["boa_offset_applied"] * n),
        "nodata": pa.array(["0"] * n),
        "dtype": pa.array(["uint16"] * n),
        "role": pa.array(["quality" if b == "SCL" else "data" for _ in ids for b, _ in BANDS]),
        "kind": pa.array(["class" if b == "SCL" else "reflectance" for _ in ids for b, _ in BANDS]),
        "classes": pa.nulls(n, ASSET_TYPE.field("classes").type),
        "size": pa.array(rng.integers(10**8, 2 * 10**8, n)),
        "etag": pa.array([f'"{v:032x}"' for v in rng.integers(0, 2**62, n)]),
    }  # fmt: skip
    arrays = [values.get(f.name, pa.nulls(n, f.type)) for f in ASSET_TYPE]
    return pa.StructArray.from_arrays(arrays, fields=list(ASSET_TYPE))


def _levels(files: int, rng: np.random.Generator) -> pa.Array:
    per, n = sum(TILES_PER_LEVEL), files * len(SIDES)
    counts = rng.integers(500_000, 2_000_000, (files, per))
    offsets = np.cumsum(counts, axis=1) + 20_000
    ends = np.concatenate([[0], np.cumsum(np.tile(TILES_PER_LEVEL, files))]).astype(np.int32)
    side = np.tile(np.array(SIDES, np.int32), files)
    pixel = 109800.0 / side
    transform = np.stack([pixel, 0 * pixel, 0 * pixel + 399960, 0 * pixel, -pixel, 0 * pixel + 5e6], axis=1)

    def same(value: object, kind: pa.DataType) -> pa.Array:
        return pa.repeat(pa.scalar(value, kind), n)

    values = {
        "kind": pa.array(["image", *["overview"] * (len(SIDES) - 1)] * files),
        "driver": same("GTiff", pa.string()),
        "width": pa.array(side),
        "height": pa.array(side),
        "tile_width": same(TILE_PX, pa.int32()),
        "tile_height": same(TILE_PX, pa.int32()),
        "dtype": same("uint16", pa.string()),
        "byteorder": same("<", pa.string()),
        "compression": same(8, pa.int32()),
        "predictor": same(2, pa.int32()),
        "planar": same(1, pa.int32()),
        "samples": same(1, pa.int32()),
        "transform": pa.FixedSizeListArray.from_arrays(transform.ravel(), 6).cast(LEVEL_TYPE.field("transform").type),
        "tile_offsets": pa.ListArray.from_arrays(ends, offsets.ravel()),
        "tile_byte_counts": pa.ListArray.from_arrays(ends, counts.ravel()),
    }  # fmt: skip
    levels = pa.StructArray.from_arrays(list(values.values()), fields=list(LEVEL_TYPE))
    return pa.ListArray.from_arrays(pa.array(np.arange(files + 1, dtype=np.int32) * len(SIDES)), levels)
