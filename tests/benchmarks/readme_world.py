"""The files of the README's job, frozen: two granules a pass, Landsat-like scenes, quality bands, embeddings.

Results of years can be compared only on the same pixels, so this world shares nothing with the demo's. What it draws
has a digest here: pixels or items that differ end the benchmark. The files have checksums beside them.

Both granules of a pass see the ground through clouds and noise of their own. The least cloudy acquisition of a slot
covers the whole area, so that it is the one to take however coverage counts.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from pyproj import Transformer
from scenes import EPSG, ORIGIN, Kind, embedding, texture, write_cog, write_planar

FROZEN = "d7016907cee449b544da8dc5c33b50b2d4ba489dae1b8a5accc2ddf29b96570c"
"""Digest of all pixels and items."""

FOLDER = "readme"
"""Below the benchmark's own."""

GRANULE_PX, STEP_PX = 2040, 1020
"""Side of a granule, and how far the eastern one lies east of the western, pixels of 10 m."""

SIDES_M = (10.0 * (GRANULE_PX + STEP_PX), 10.0 * GRANULE_PX)
"""Of the ground that both granules of a pass cover: from west to east, from north to south."""

WIDE = (4, 2)
"""How often the ground lies side by side in the wide world: from west to east, from north to south."""

MARGIN_M = 1400.0
"""What chips of 1280 m that touch the area of interest stay within."""

CLEAR = {"s2": 4, "l8": 21824}
CLOUDY = {"s2": 9, "l8": 22280}
SHADOWED = {"s2": 3, "l8": 23888}
"""Values of SCL and QA_PIXEL."""

Raster = NDArray[Any]


@dataclass(frozen=True)
class Scene:
    """One item of an optical sensor."""

    id: str
    kind: Kind
    """Its 10 m or 30 m files; the quality band has pixels of ``quality.pixel_m``."""
    quality: Kind
    when: dt.datetime
    cloud_pct: int
    datatake: str
    offset_dn: int
    """What 0 reflectance is stored as."""

    @property
    def sensor(self) -> str:
        """``"s2"`` or ``"l8"``."""
        return "s2" if self.quality.pixel_m == 20 else "l8"


@dataclass(frozen=True)
class Sensor:
    """How a sensor stores reflectance, and what its assets are called."""

    collection: str
    platform: str
    assets: tuple[str, ...]
    """Keys of blue, green, red and near infrared, then of the quality band."""
    scale: float
    offset: float


SENSORS = {
    "s2": Sensor("sentinel-2-l2a", "sentinel-2a", ("blue", "green", "red", "nir", "scl"), 1e-4, -0.1),
    "l8": Sensor("landsat-c2-l2", "landsat-8", ("blue", "green", "red", "nir08", "qa_pixel"), 2.75e-5, -0.2),
}


def scenes() -> tuple[Scene, ...]:
    """Return all optical scenes: April and June twice by Sentinel-2, April to June by Landsat."""
    passes = ((4, 9, (6, 9), 1000), (4, 24, (35, 38), 0), (6, 8, (None, 14), 0), (6, 23, (5, 7), 0))
    found = []
    for month, day, clouds, offset in passes:
        for east, cloud_pct in enumerate(clouds):
            if cloud_pct is not None:
                found.append(_sentinel2(month, day, east, cloud_pct, offset))
    for month, day, cloud_pct in ((4, 15, 16), (5, 9, 5), (6, 18, 11)):
        corner = (ORIGIN[0] - 615.0, ORIGIN[1] + 615.0)
        kind = _kind("landsat", 1100, 256, 30.0, corner, "uint16")
        when = dt.datetime(2024, month, day, 9, 50, 12, tzinfo=dt.UTC)
        name = f"LC08_L2SP_191025_{when:%Y%m%d}_02_T1"
        found.append(Scene(name, kind, kind, when, cloud_pct, "", 7273))
    return tuple(found)


def embeddings() -> Kind:
    """Return the 64 bands that cover the optical area and 320 m around it."""
    corner = (ORIGIN[0] - 320.0, ORIGIN[1] + 320.0)
    names = tuple(f"A{i:02d}" for i in range(64))
    size = GRANULE_PX + STEP_PX + 64
    return Kind(f"{FOLDER}/aef", "aef-v1-annual", names, 1, size, 1024, 10.0, corner, "int8", -128, True)


def area(wide: bool = False) -> tuple[float, float, float, float]:
    """Return west, south, east, north of the area of interest, metres."""
    west, north = ORIGIN
    across, down = WIDE if wide else (1, 1)
    east, south = west + across * SIDES_M[0], north - down * SIDES_M[1]
    return west + MARGIN_M, south + MARGIN_M, east - MARGIN_M, north - MARGIN_M


def _sentinel2(month: int, day: int, east: int, cloud_pct: int, offset: int) -> Scene:
    corner = (ORIGIN[0] + east * 10.0 * STEP_PX, ORIGIN[1])
    when = dt.datetime(2024, month, day, 10, 4, 43 + 3 * east, tzinfo=dt.UTC)
    name = f"S2A_33U{'VW'[east]}R_{when:%Y%m%d}_0_L2A"
    return Scene(
        name,
        _kind("sentinel-2", GRANULE_PX, 1024, 10.0, corner, "uint16"),
        _kind("sentinel-2", GRANULE_PX // 2, 512, 20.0, corner, "uint8"),
        when,
        cloud_pct,
        f"GS2A_{when:%Y%m%d}T100031_045953_N05.10",
        offset,
    )


def _kind(name: str, size: int, tile: int, pixel_m: float, corner: tuple[float, float], dtype: str) -> Kind:
    return Kind(f"{FOLDER}/{name}", name, (), 1, size, tile, pixel_m, corner, dtype, 0)


def make(folder: Path) -> None:
    """Make the files where they are not there as they were made.

    Raises
    ------
    SystemExit
        Where this environment draws other pixels, or writes other items, than all results so far were measured on.
    """
    mark = folder / FOLDER / "done.json"
    if mark.exists() and _is_as_made(folder, json.loads(mark.read_text())):
        return
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    print(f"making the files of the README's job in {folder / FOLDER}", file=sys.stderr)
    digests = {"items": hashlib.sha256(json.dumps(items("")).encode()).hexdigest()}
    grounds = {
        "s2": texture(np.random.default_rng(400), GRANULE_PX + STEP_PX),
        "l8": texture(np.random.default_rng(401), 1100),
    }
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(lambda n: _write_scene(folder, n, grounds), range(len(scenes()))):
            digests |= made
    kind = embeddings()
    (folder / kind.name).mkdir(parents=True)
    ground = texture(np.random.default_rng(402), kind.size_px)
    digests["aef"] = write_planar(
        folder / kind.files(0)["data"], kind, lambda band: embedding(ground, 403, band)
    )
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    if digest != FROZEN:
        raise SystemExit(f"the README's job would be measured on other pixels: {digest}, not {FROZEN}")
    paths = sorted(p for p in (folder / FOLDER).rglob("*") if p.is_file())
    checksums = {str(p.relative_to(folder)): zlib.crc32(p.read_bytes()) for p in paths}
    mark.write_text(json.dumps({"digest": digest, "files": checksums}))


def _is_as_made(folder: Path, mark: dict[str, Any]) -> bool:
    return mark["digest"] == FROZEN and all(
        (folder / path).exists() and zlib.crc32((folder / path).read_bytes()) == checksum
        for path, checksum in mark["files"].items()
    )


def _write_scene(folder: Path, number: int, grounds: dict[str, Raster]) -> dict[str, str]:
    """Write the files of one scene; return the digest of each one's pixels."""
    scene = scenes()[number]
    sensor, size = SENSORS[scene.sensor], scene.kind.size_px
    rng = np.random.default_rng((404, number))
    clouds = texture(rng, scene.quality.size_px, CLOUD_SCALES)
    cloudy = clouds > np.quantile(clouds, 1 - scene.cloud_pct / 100)
    shadowed = np.roll(cloudy, (-40, 25), (0, 1)) & ~cloudy
    quality = np.full(cloudy.shape, CLEAR[scene.sensor], scene.quality.dtype)
    quality[shadowed], quality[cloudy] = SHADOWED[scene.sensor], CLOUDY[scene.sensor]
    times = size // scene.quality.size_px
    cloudy, shadowed = (np.repeat(np.repeat(m, times, 0), times, 1) for m in (cloudy, shadowed))
    west = round((scene.kind.origin[0] - ORIGIN[0]) / 10) if scene.sensor == "s2" else 0
    ground = grounds[scene.sensor][:size, west : west + size]
    digests = {}
    for band, key in enumerate(sensor.assets[:-1]):
        level = (0.05, 0.08, 0.09, 0.28)[band] + 0.01 * scene.when.month
        value = (
            level
            + ground * np.float32(0.05)
            + rng.standard_normal(ground.shape, np.float32) * np.float32(2.8e-3)
        )
        value = np.where(cloudy, value + np.float32(0.5), np.where(shadowed, value * np.float32(0.5), value))
        dn = np.clip(np.rint(value / np.float32(sensor.scale)) + scene.offset_dn, 1, 65535).astype(np.uint16)
        digests[f"{scene.id}/{key}"] = _write(folder / _path(scene, key), scene.kind, dn)
    digests[f"{scene.id}/quality"] = _write(folder / _path(scene, sensor.assets[-1]), scene.quality, quality)
    return digests


CLOUD_SCALES = ((256, 0.4), (64, 0.3), (16, 0.1))


def _write(path: Path, kind: Kind, pixels: Raster) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_cog(path, kind, pixels)
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _path(scene: Scene, key: str) -> str:
    return f"{FOLDER}/{SENSORS[scene.sensor].collection}/{scene.id}/{key}.tif"


def items(root: str) -> dict[str, list[dict[str, Any]]]:
    """Return the STAC items of each collection (``s2``, ``l8``, ``aef``) below a URL, as Earth Search has them."""
    found: dict[str, list[dict[str, Any]]] = {"s2": [], "l8": [], "aef": []}
    for scene in scenes():
        sensor = SENSORS[scene.sensor]
        bands = {
            key: _asset(f"{root}/{_path(scene, key)}", scene.kind)
            | {
                "raster:bands": [
                    {"nodata": 0, "data_type": "uint16", "scale": sensor.scale, "offset": sensor.offset}
                ]
            }
            | {"eo:bands": [{"name": key, "common_name": key}], "roles": ["data", "reflectance"]}
            for key in sensor.assets[:-1]
        }
        *_, quality = sensor.assets
        bands[quality] = _asset(f"{root}/{_path(scene, quality)}", scene.quality) | {
            "raster:bands": [{"nodata": 0, "data_type": scene.quality.dtype}], "roles": ["data"]
        }  # fmt: skip
        properties: dict[str, Any] = {
            "datetime": f"{scene.when:%Y-%m-%dT%H:%M:%SZ}",
            "platform": sensor.platform,
            "eo:cloud_cover": scene.cloud_pct,
        }
        if scene.sensor == "s2":
            properties |= {
                "s2:datatake_id": scene.datatake,
                "s2:processing_baseline": "05.10",
                "earthsearch:boa_offset_applied": scene.offset_dn == 0,
            }
        found[scene.sensor].append(_item(scene.id, sensor.collection, scene.kind, properties, bands))
    kind = embeddings()
    data = _asset(f"{root}/{kind.files(0)['data']}", kind) | {
        "roles": ["data"],
        "eo:bands": [{"name": name} for name in kind.bands],
        "raster:bands": [{"nodata": kind.nodata, "data_type": kind.dtype}] * len(kind.bands),
    }
    year = {
        "datetime": None,
        "start_datetime": "2024-01-01T00:00:00Z",
        "end_datetime": "2024-12-31T23:59:59Z",
    }
    found["aef"].append(_item("aef_2024_33N", kind.collection, kind, year, {"data": data}))
    return found


def widened(table: pa.Table) -> pa.Table:
    """Return the records of the wide world: the same files on other ground, under other URLs of the same server."""
    rows = []
    across, down = WIDE
    for number, (south, east) in enumerate(product(range(down), range(across))):
        by = np.array([east * SIDES_M[0], -south * SIDES_M[1]])
        for row in table.to_pylist():
            shape = _moved(shapely.from_wkb(row["geometry"]), by)
            bounds = [float(edge) for edge in shape.bounds]
            box = dict(zip(("xmin", "ymin", "xmax", "ymax"), bounds, strict=True))
            row |= {"id": f"{row['id']}_{number}", "geometry": shapely.to_wkb(shape), "bbox": box}
            row["scene_bbox"] = bounds
            for _, asset in row["assets"]:
                url = urlsplit(asset["href"])
                asset["href"] = url._replace(path=f"/copy{number}{url.path}").geturl()
            for level in chain.from_iterable(levels for _, levels in row["headers_metadata"]):
                if level["transform"]:
                    level["transform"][2] += by[0]
                    level["transform"][5] += by[1]
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=table.schema)


def _moved(shape: Any, by: NDArray[np.float64]) -> Any:
    """Move a shape in degrees by metres."""
    there, back = (
        Transformer.from_crs(a, b, always_xy=True).transform for a, b in ((4326, EPSG), (EPSG, 4326))
    )

    def move(x: Any, y: Any) -> tuple[Any, Any]:
        metres = np.add(there(x, y), by[:, None])
        return back(metres[0], metres[1])

    return shapely.transform(shape, move, interleaved=False)


def _asset(href: str, kind: Kind) -> dict[str, Any]:
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "gsd": kind.pixel_m,
        "proj:shape": [kind.size_px, kind.size_px],
        "proj:transform": list(kind.transform)[:6],
    }


def _item(
    name: str, collection: str, kind: Kind, properties: dict[str, Any], assets: dict[str, Any]
) -> dict[str, Any]:
    west, north = kind.origin
    east, south = west + kind.size_px * kind.pixel_m, north - kind.size_px * kind.pixel_m
    x, y = [west, west, east, east, west], [north, south, south, north, north]
    lon, lat = Transformer.from_crs(EPSG, 4326, always_xy=True).transform(x, y)
    ring = [[round(a, 7), round(b, 7)] for a, b in zip(lon, lat, strict=True)]
    lons, lats = [p[0] for p in ring], [p[1] for p in ring]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": name,
        "collection": collection,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "properties": {**properties, "proj:epsg": EPSG},
        "links": [],
        "assets": assets,
    }
