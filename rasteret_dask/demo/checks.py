# SPDX-License-Identifier: Apache-2.0
"""Checks the demo's result by other means: plain xarray opens it, rasterio alone reads the same pixels."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import hypot, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import rasterio
import shapely
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_geom
from rasterio.windows import Window

from rasteret_dask.demo.world import World
from rasteret_dask.show.audit import Audit

__all__ = [
    "MOST_CLOUD_PCT",
    "Check",
    "check_emptiest",
    "check_objects",
    "check_pixels",
    "check_splits",
    "check_store",
]

ASSETS = {"s2": {"nir": "nir"}, "l8": {"nir": "nir08"}}
"""Asset keys of the made-up catalogs where they are not the band's name."""

CLOUD_CLASSES = (3, 8, 9, 10)
CLOUD_BITS = 0b11010
"""SCL: shadow, cloud (2), cirrus. QA_PIXEL: dilated cloud, cloud, shadow."""

MOST_CLOUD_PCT = 30
"""Scenes with more are left out by the demo's job."""

LANDSAT_SLACK = 2.75e-5 + 1e-7
"""Reflectance of 1 DN, which a bilinear kernel may round either way, and float32's own rounding."""

Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold."""

    ok: bool
    what: str
    """What must hold, and the figures found."""

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.what}"


@dataclass(frozen=True, slots=True)
class _Scene:
    """A STAC item of the made-up world, read as plain JSON."""

    source: str
    item: Mapping[str, Any]
    folder: Path

    @property
    def acquisition(self) -> str:
        return str(self.item["properties"].get("s2:datatake_id", self.item["id"]))

    @property
    def cloud_pct(self) -> float:
        return float(self.item["properties"]["eo:cloud_cover"])

    @property
    def start(self) -> np.datetime64:
        return np.datetime64(self.item["properties"]["datetime"].removesuffix("Z"), "ns")

    def path(self, key: str) -> Path:
        return self.folder / str(self.item["assets"][key]["href"])

    def scale(self, key: str) -> tuple[float, float]:
        """Return scale and offset; the offset is not to be applied again where the item says it has been."""
        raster = self.item["assets"][key]["raster:bands"][0]
        applied = self.item["properties"].get("earthsearch:boa_offset_applied", False)
        return raster["scale"], 0.0 if applied else raster["offset"]


def check_splits(audit: Audit, least_chips: int) -> tuple[Check, ...]:
    """Check that splits share no ground, that their shares are as asked, and that there is enough to train on."""
    cells = sum(audit.cells.values())
    far = {n: abs(audit.ratios[n] - p) / sqrt(p * (1 - p) / cells) for n, p in audit.targets.items()}
    shares = ", ".join(f"{n} {audit.ratios[n]:.0%} of {p:.0%}" for n, p in audit.targets.items())
    return (
        Check(audit.ok, f"no ground shared between splits: {sum(audit.overlaps.values())} overlaps"),
        Check(max(far.values()) <= 3, f"shares within 3 standard deviations for {cells} cells: {shares}"),
        Check(
            min(audit.chips.values()) > 0 and audit.chips["train"] >= least_chips,
            f"every split has chips, train at least {least_chips}: "
            + ", ".join(f"{name} {count}" for name, count in audit.chips.items()),
        ),
    )


def check_objects(store: Path) -> Check:
    """Check every object against the size and checksum in the store's manifest."""
    manifest = pq.read_table(store / "manifest.parquet").to_pylist()
    objects = [o for shard in manifest for o in shard["objects"]]
    bad = [o["path"] for o in objects if not _as_written(store / o["path"], o["size"], o["crc32"])]
    found = f"{len(objects)} objects" if not bad else f"not {', '.join(bad[:3])}"
    return Check(not bad, f"the store's objects are those of its manifest: {found}")


def _as_written(path: Path, size: int, crc32: int) -> bool:
    return path.is_file() and path.stat().st_size == size and zlib.crc32(path.read_bytes()) == crc32


def check_store(tree: xr.DataTree, chip_ids: list[str], least_valid: float = 0.5) -> tuple[Check, ...]:
    """Check that an opened store has the chips asked for, and that their slots are filled.

    Parameters
    ----------
    tree
        The store, opened with xarray.
    chip_ids
        What it must hold, in order.
    least_valid
        The share of valid pixels that the median chip must have in every slot.
    """
    sources = [node.to_dataset() for node in tree.children.values()]
    same = all(source["chip_id"].values.tolist() == chip_ids for source in sources)
    only = {str(split) for source in sources for split in source["split"].values.tolist()}
    optical = tree["optical"].to_dataset()
    median, worst = (getattr(optical["valid_fraction"], name)("chip").values for name in ("median", "min"))
    slots = optical["time"].dt.strftime("%b").values.tolist()
    filled = ", ".join(
        f"{slot} {share:.0%} (the emptiest {least:.0%})"
        for slot, share, least in zip(slots, median, worst, strict=True)
    )
    return (
        Check(
            same and only == {"train"},
            f"plain xarray opens the store: {len(chip_ids)} chips, split {', '.join(sorted(only))}",
        ),
        Check(bool(np.all(median >= least_valid)), f"median valid fraction of a chip: {filled}"),
    )


def check_pixels(tree: xr.DataTree, world: World, n: int = 8) -> tuple[Check, ...]:
    """Compare chips with what rasterio reads from the original files: ``n``, evenly taken, and each slot's emptiest.

    Native pixels must be equal bit for bit, resampled ones to 1 DN. Masks, units and the filling of one
    granule's gaps from its neighbour are done anew here, from the STAC items' own figures; some must be filled.
    """
    optical, embeddings = tree["optical"].to_dataset(), tree["embeddings"].to_dataset()
    scenes = [*_scenes("s2", world.sentinel2), *_scenes("l8", world.landsat)]
    (annual,) = _scenes("aef", world.embeddings)
    compared, differ = {"s2": 0, "l8": 0, "aef": 0}, {"s2": 0, "l8": 0, "aef": 0}
    fractions, filled = True, 0
    even = np.linspace(0, optical.sizes["chip"] - 1, n).round().astype(int)
    for number in np.unique([*even, *_emptiest(optical)]):
        chip, beside = optical.isel(chip=int(number)).load(), embeddings.isel(chip=int(number)).load()
        for t in range(chip.sizes["time"]):
            source = str(chip["member"].values[t])
            found = chip["pixels"].values[t]
            feeding = _feeding(scenes, chip, t)
            layers = [_reflectance(scene, chip) for scene in feeding]
            wanted, layer = _first_valid(layers)
            filled += int(np.sum(np.isfinite(wanted) & (layer > 0)))
            compared[source] += 1
            slack = np.array([0.0 if scene.source == "s2" else LANDSAT_SLACK for scene in feeding])
            differ[source] += not _same(found, wanted, slack[layer])
            share = np.isfinite(wanted).all(axis=0).mean()
            fractions &= abs(float(chip["valid_fraction"].values[t]) - share) < 1e-6
        compared["aef"] += 1
        raw = _nearest(annual.path("data"), beside)
        differ["aef"] += not np.array_equal(beside["pixels"].values[0], raw)
        differ["aef"] += not np.array_equal(beside["valid"].values[0], (raw != -128).all(axis=0))
    names = {"s2": "Sentinel-2, bit for bit", "l8": "Landsat, to 1 DN", "aef": "embeddings, bit for bit"}
    checks = [
        Check(
            compared[k] > 0 and not differ[k],
            f"equal to rasterio ({name}): {compared[k] - differ[k]} of {compared[k]}",
        )
        for k, name in names.items()
    ]
    return (
        *checks,
        Check(fractions, "valid fractions are those of the same pixels"),
        Check(filled > 0, f"one scene's gaps are filled by another: {filled} values of these chips"),
    )


def check_emptiest(tree: xr.DataTree, world: World) -> Check:
    """Check that each slot's emptiest chip lacks only what no scene of its month sees clear.

    For stores whose slots are filled; where a slot is one acquisition, others may see what it does not.
    """
    optical = tree["optical"].to_dataset()
    scenes = [*_scenes("s2", world.sentinel2), *_scenes("l8", world.landsat)]
    figures, missed = [], 0
    for t, number in enumerate(_emptiest(optical)):
        chip = optical.isel(chip=number).load()
        lacking = ~np.isfinite(chip["pixels"].values[t])
        for scene in _of_month(scenes, chip, t):
            missed += int(np.sum(lacking & np.isfinite(_reflectance(scene, chip))))
        figures.append(f"{lacking[0].mean():.0%} of {chip['time'].dt.strftime('%b').values[t]}'s")
    return Check(
        not missed,
        f"no scene sees what the emptiest chips lack ({', '.join(figures)}): {missed} values could be filled",
    )


def _emptiest(optical: xr.Dataset) -> list[int]:
    """Return for each slot the number of the chip with the fewest valid pixels."""
    return [int(n) for n in optical["valid_fraction"].argmin("chip").values]


def _scenes(source: str, collection: Path) -> Iterator[_Scene]:
    for path in sorted(collection.parent.glob("*/*.json")):
        yield _Scene(source, json.loads(path.read_text(encoding="utf-8")), path.parent)


def _feeding(scenes: list[_Scene], chip: xr.Dataset, t: int) -> list[_Scene]:
    """Return the scenes of one slot: those of the pass that it names; in filled stores those of all others then.

    Scenes of one pass come by the distance of their middles from the chip's, passes by the mean cloud figure of their
    scenes that touch the chip.
    """
    source, when = str(chip["member"].values[t]), chip["datetime"].values[t]
    month = sorted(_of_month(scenes, chip, t), key=lambda s: _distance(s, chip))
    (main,) = {s.acquisition for s in month if s.source == source and s.start == when}
    passes: dict[str, list[_Scene]] = {main: [s for s in month if s.acquisition == main]}
    if "filled_fraction" in chip.coords:
        for scene in month:
            if scene.acquisition != main and _touches(scene, chip):
                passes.setdefault(scene.acquisition, []).append(scene)
    first, *others = passes.values()
    ranked = sorted(others, key=lambda p: sum(s.cloud_pct for s in p) / len(p))
    return [*first, *(scene for one in ranked for scene in one)]


def _of_month(scenes: list[_Scene], chip: xr.Dataset, t: int) -> list[_Scene]:
    """Return the scenes of a slot's month that are clear enough to be used at all."""
    month = chip["time"].values[t].astype("datetime64[M]")
    return [s for s in scenes if s.start.astype("datetime64[M]") == month and s.cloud_pct < MOST_CLOUD_PCT]


def _distance(scene: _Scene, chip: xr.Dataset) -> float:
    """Return how far a scene's middle is from a chip's, metres."""
    west, south, east, north = chip["bounds"].values.tolist()
    with rasterio.open(scene.path(ASSETS[scene.source].get("red", "red"))) as file:
        left, bottom, right, top = file.bounds
    return hypot((west + east - left - right) / 2, (south + north - bottom - top) / 2)


def _touches(scene: _Scene, chip: xr.Dataset) -> bool:
    outline = transform_geom(
        "EPSG:4326", f"EPSG:{scene.item['properties']['proj:epsg']}", scene.item["geometry"]
    )
    bounds = shapely.box(*chip["bounds"].values.tolist())
    return bool(shapely.geometry.shape(outline).intersection(bounds).area > 0)


def _first_valid(layers: list[Pixels]) -> tuple[Pixels, NDArray[np.int64]]:
    """Return each value of the first layer that has one, NaN where none has, and which layer that is."""
    result, number = layers[0], np.zeros(layers[0].shape, np.int64)
    for n, layer in enumerate(layers[1:], start=1):
        empty = np.isnan(result)
        number[empty & ~np.isnan(layer)] = n
        result = np.where(empty, layer, result)
    return result, number


def _reflectance(scene: _Scene, chip: xr.Dataset) -> Pixels:
    """Return a scene's reflectance on a chip, shape (band, y, x), NaN under clouds and outside the scene."""
    layers = []
    for band in chip["band"].values.tolist():
        key = ASSETS[scene.source].get(str(band), str(band))
        scale, offset = scene.scale(key)
        dn = _nearest(scene.path(key), chip)[0] if scene.source == "s2" else _warped(scene.path(key), chip)
        layers.append(np.where(dn == 0, np.nan, dn.astype(np.float64) * scale + offset))
    if scene.source == "s2":
        cloudy = np.isin(_nearest(scene.path("scl"), chip)[0], CLOUD_CLASSES)
    else:
        cloudy = (_nearest(scene.path("qa_pixel"), chip)[0] & CLOUD_BITS) != 0
    return np.where(cloudy, np.nan, np.stack(layers)).astype(np.float32)


def _nearest(path: Path, chip: xr.Dataset) -> NDArray[Any]:
    """Return the file's pixel under each of the chip's, shape (band, y, x); nodata outside the file."""
    to_chip, size = _grid(chip)
    with rasterio.open(path) as file:
        to_file = file.transform
        # On an edge between two pixels, the one to the east or south, as GDAL has it.
        cols = np.floor((to_chip.c + to_chip.a * (np.arange(size) + 0.5) - to_file.c) / to_file.a).astype(int)
        rows = np.floor((to_chip.f + to_chip.e * (np.arange(size) + 0.5) - to_file.f) / to_file.e).astype(int)
        result = np.full((file.count, size, size), file.nodata, dtype=file.dtypes[0])
        y, x = (rows >= 0) & (rows < file.height), (cols >= 0) & (cols < file.width)
        if not (y.any() and x.any()):
            return result
        rows, cols = rows[y], cols[x]
        low, left = int(rows.min()), int(cols.min())
        block = file.read(window=Window(left, low, int(cols.max()) - left + 1, int(rows.max()) - low + 1))
    result[np.ix_(range(len(result)), y, x)] = block[:, rows - low][:, :, cols - left]
    return result


def _warped(path: Path, chip: xr.Dataset) -> NDArray[Any]:
    """Return the only band of a coarser file on the chip's grid, bilinear, shape (y, x)."""
    to_chip, size = _grid(chip)
    with rasterio.open(path) as file:
        times = file.transform.a / to_chip.a
        with WarpedVRT(
            file, crs=file.crs, transform=to_chip, width=size, height=size, resampling=Resampling.bilinear,
            tolerance=1e-6, XSCALE=times, YSCALE=times,
        ) as warped:  # fmt: skip
            return np.asarray(warped.read(1))


def _grid(chip: xr.Dataset) -> tuple[Affine, int]:
    west, _, east, north = chip["bounds"].values.tolist()
    size = chip.sizes["x"]
    pixel = (east - west) / size
    return Affine(pixel, 0, west, 0, -pixel, north), size


def _same(pixels: Pixels, wanted: Pixels, slack: NDArray[np.float64]) -> bool:
    """Tell whether no value is further from the wanted one than its slack, and the same are NaN."""
    if not np.array_equal(np.isnan(pixels), np.isnan(wanted)):
        return False
    return bool(np.all(np.abs(pixels - wanted)[np.isfinite(wanted)] <= slack[np.isfinite(wanted)]))
