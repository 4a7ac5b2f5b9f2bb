"""The benchmark's files: Sentinel-2-like, Landsat-like and embeddings-like rasters with their STAC items."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.io import MemoryFile

EPSG = 32633
ORIGIN = (399960.0, 5700000.0)
"""North-west corner of the Sentinel-2-like scenes: a multiple of 60 m, of no chip size."""
FIRST = dt.datetime(2024, 6, 4, 10, 0, 31, tzinfo=dt.UTC)
STEP = dt.timedelta(days=10)
DATES = 6
VERSION = 2
"""Of the files' content: another one makes them anew."""


@dataclass(frozen=True)
class Kind:
    """One family of files."""

    name: str
    collection: str
    bands: tuple[str, ...]
    """Codes of the bands; one file each, or all in one where ``planar``."""
    dates: int
    size_px: int
    tile_px: int
    pixel_m: float
    origin: tuple[float, float]
    """North-west corner, metres."""
    dtype: str
    nodata: int
    planar: bool = False

    @property
    def transform(self) -> Affine:
        """Pixel to CRS; planar files are south-up."""
        x, y = self.origin
        if self.planar:
            return Affine(self.pixel_m, 0, x, 0, self.pixel_m, y - self.size_px * self.pixel_m)
        return Affine(self.pixel_m, 0, x, 0, -self.pixel_m, y)

    def files(self, date: int) -> dict[str, str]:
        """Return {asset key: path below the folder} of one date."""
        if self.planar:
            return {"data": f"{self.name}/{date}.tif"}
        return {band: f"{self.name}/{date}/{band}.tif" for band in self.bands}


def sentinel2(size_px: int = 5120) -> Kind:
    """Return 6 dates of 4 bands: uint16, tiles of 1024, deflate, predictor 2."""
    bands = ("B02", "B03", "B04", "B08")
    return Kind("s2", "sentinel-2-l2a", bands, DATES, size_px, 1024, 10.0, ORIGIN, "uint16", 0)


def landsat() -> Kind:
    """Return 6 dates of 4 bands over the same ground: 30 m, tiles of 256, origin at 15 m modulo 30."""
    origin = (ORIGIN[0] - 615.0, ORIGIN[1] + 615.0)
    return Kind("l8", "landsat-c2-l2", ("B2", "B3", "B4", "B5"), DATES, 1792, 256, 30.0, origin, "uint16", 0)


def embeddings() -> Kind:
    """Return one year of 64 int8 bands in one file: band-separate, ZSTD, south-up."""
    bands = tuple(f"A{i:02d}" for i in range(64))
    return Kind("aef", "aef-v1-annual", bands, 1, 3072, 1024, 10.0, ORIGIN, "int8", -128, True)


def make_files(folder: Path, kinds: tuple[Kind, ...]) -> None:
    """Make what is not there yet; a folder's ``done.json`` says what its files are."""
    for number, kind in enumerate(kinds):
        mark, said = folder / kind.name / "done.json", json.dumps([VERSION, repr(kind)])
        if mark.exists() and mark.read_text() == said:
            continue
        shutil.rmtree(folder / kind.name, ignore_errors=True)
        print(f"making {kind.dates * len(kind.files(0))} files in {folder / kind.name}", file=sys.stderr)
        _make(folder, kind, number)
        mark.write_text(said)


def _make(folder: Path, kind: Kind, seed: int) -> None:
    ground = texture(np.random.default_rng(seed), kind.size_px)
    for date in range(kind.dates):
        paths = [folder / path for path in kind.files(date).values()]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        if kind.planar:
            write_planar(paths[0], kind, lambda band: embedding(ground, seed, band))
            continue

        def put(band: int, date: int = date, paths: list[Path] = paths) -> None:
            write_cog(paths[band], kind, _reflectance(ground, (seed, date, band)))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(put, range(len(paths))))


FIELDS_AND_HILLS = ((512, 0.3), (128, 0.2), (48, 0.2), (16, 0.12), (6, 0.08), (3, 0.05))
"""Side of a block in pixels, and its height."""


def texture(
    rng: np.random.Generator, size: int, scales: tuple[tuple[int, float], ...] = FIELDS_AND_HILLS
) -> NDArray[np.float32]:
    """Return noise of several scales, shape (y, x), about -1 to 1; its blocks make borders of fields."""
    out = np.zeros((size, size), np.float32)
    for side, height in scales:
        coarse = rng.standard_normal((-(-size // side),) * 2, np.float32) * np.float32(height)
        out += np.repeat(np.repeat(coarse, side, 0), side, 1)[:size, :size]
    return out


def _reflectance(ground: NDArray[np.float32], seed: tuple[int, ...]) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    level, contrast = rng.uniform(1500, 3500), rng.uniform(700, 1100)
    pixels = rng.standard_normal(ground.shape, np.float32)
    pixels *= np.float32(SENSOR_NOISE_DN)
    pixels += ground * np.float32(contrast) + np.float32(level)
    return np.clip(np.rint(pixels, out=pixels), 1, 12000).astype(np.uint16)


SENSOR_NOISE_DN = 28
"""Makes a deflated tile of 1024 x 1024 about 1.4 MB, as Sentinel-2's 10 m bands are over land."""


def embedding(ground: NDArray[np.float32], seed: int, band: int) -> NDArray[np.int8]:
    """Return one band over the ground, north-up."""
    rng = np.random.default_rng((seed, band))
    pixels = rng.standard_normal(ground.shape, np.float32) * np.float32(6)
    pixels += ground * np.float32(rng.uniform(-60, 60)) + np.float32(rng.uniform(-30, 30))
    return np.asarray(np.clip(np.rint(pixels, out=pixels), -127, 127), np.int8)


def _profile(kind: Kind, count: int) -> dict[str, Any]:
    return {
        "driver": "GTiff",
        "width": kind.size_px,
        "height": kind.size_px,
        "count": count,
        "dtype": kind.dtype,
        "crs": f"EPSG:{EPSG}",
        "transform": kind.transform,
        "nodata": kind.nodata,
    }


def write_cog(path: Path, kind: Kind, pixels: NDArray[Any]) -> None:
    """Write one band; overviews of 8-bit rasters, which are classes, are nearest."""
    with MemoryFile() as memory:
        with memory.open(**_profile(kind, 1)) as file:
            file.write(pixels, 1)
        rasterio.shutil.copy(
            memory.name, path, driver="COG", blocksize=kind.tile_px, compress="DEFLATE", predictor="YES",
            overview_resampling="nearest" if pixels.dtype == np.uint8 else "average",
        )  # fmt: skip


def write_planar(path: Path, kind: Kind, plane: Callable[[int], NDArray[Any]]) -> str:
    """Write all bands, each given north-up, into one south-up file; return the sha256 of their pixels."""
    layout = {
        "tiled": True, "blockxsize": kind.tile_px, "blockysize": kind.tile_px, "interleave": "band",
        "compress": "ZSTD", "zstd_level": 3, "num_threads": 2,
    }  # fmt: skip
    digest = hashlib.sha256()
    with rasterio.open(path, "w", **_profile(kind, len(kind.bands)), **layout) as file:
        for band in range(len(kind.bands)):
            pixels = plane(band)
            digest.update(pixels.tobytes())
            file.write(pixels[::-1], band + 1)
    return digest.hexdigest()


def items(kind: Kind, root: str, copies: int = 1) -> list[dict[str, Any]]:
    """Return STAC items of the files below ``root``, one a date, in time order.

    Parameters
    ----------
    kind
        Which files.
    root
        URL of the folder given to :func:`make_files`.
    copies
        How often the dates are repeated, later each time, under other URLs (``<root>/copy1/...``) that a server
        answers with the same files.
    """
    found = []
    for number in range(kind.dates * copies):
        copy, date = divmod(number, kind.dates)
        base = root if copy == 0 else f"{root}/copy{copy}"
        assets = {key: _asset(kind, f"{base}/{path}", key) for key, path in kind.files(date).items()}
        found.append(_item(kind, number, assets))
    return found


def _asset(kind: Kind, href: str, key: str) -> dict[str, Any]:
    shape, transform = [kind.size_px, kind.size_px], list(kind.transform)[:6]
    names = kind.bands if kind.planar else (key,)
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": ["data"],
        "gsd": kind.pixel_m,
        "proj:epsg": EPSG,
        "proj:shape": shape,
        "proj:transform": transform,
        "raster:bands": [{"nodata": kind.nodata, "data_type": kind.dtype}] * len(names),
        "eo:bands": [{"name": name} for name in names],
    }


def _item(kind: Kind, number: int, assets: dict[str, Any]) -> dict[str, Any]:
    west, north = kind.origin
    side = kind.size_px * kind.pixel_m
    x = [west, west, west + side, west + side, west]
    y = [north, north - side, north - side, north, north]
    lon, lat = Transformer.from_crs(EPSG, 4326, always_xy=True).transform(x, y)
    when = FIRST + number * STEP
    time = {"datetime": f"{when:%Y-%m-%dT%H:%M:%SZ}"}
    if kind.planar:
        time |= {"start_datetime": "2024-01-01T00:00:00Z", "end_datetime": "2024-12-31T23:59:59Z"}
    platform = {"s2": "sentinel-2a", "l8": "landsat-8"}.get(kind.name)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": f"{kind.name}_{when:%Y%m%d}",
        "collection": kind.collection,
        "geometry": {
            "type": "Polygon",
            "coordinates": [[list(p) for p in zip(lon, lat, strict=True)]],
        },
        "bbox": [min(lon), min(lat), max(lon), max(lat)],
        "properties": {
            **time,
            **({"platform": platform} if platform else {}),
            "eo:cloud_cover": 0.0,
            "proj:epsg": EPSG,
            "proj:shape": [kind.size_px, kind.size_px],
            "proj:transform": list(kind.transform)[:6],
        },
        "links": [],
        "assets": assets,
    }
