"""Partial passes over a few kilometres, drawn by a seed, and a dull interpreter of what becomes of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.pixels import members_of, merged

Array = NDArray[Any]

EPSG, WEST, NORTH, PIXEL = 32633, 500_000, 5_400_000, 10
SIDE = 24
"""Pixels of a chip."""
CELLS: dict[str, Any] = {"cell_km": 0.72}
SLOTS = [pd.Timestamp(f"2024-{month:02d}-01") for month in (4, 5, 6)]
BANDS = ("a", "b", "cls")
SCL = {"cloud": 8, "shadow": 3, "clear": 4, "water": 6}


@dataclass(frozen=True)
class Scene:
    """One record: what is in its files, and where it lies."""

    id: str
    member: str
    start: pd.Timestamp
    cloud: float | None
    col: int
    """Pixels from WEST."""
    row: int
    """Pixels from NORTH, southwards."""
    scaling: tuple[float, float]
    nodata: Mapping[str, float | None]
    paths: Mapping[str, Path]
    shape: tuple[int, int]

    @property
    def raster(self) -> shapely.Polygon:
        """The raster's rectangle."""
        west, north = WEST + self.col * PIXEL, NORTH - self.row * PIXEL
        return shapely.box(west, north - self.shape[0] * PIXEL, west + self.shape[1] * PIXEL, north)

    @property
    def box(self) -> shapely.Polygon:
        """The ground that counts as covered: one pixel larger."""
        return shapely.Polygon(self.raster.buffer(PIXEL, join_style="mitre"))

    def read(self, band: str, bounds: Sequence[float]) -> tuple[Array, Array]:
        """Return a band's stored numbers over a chip and where they are valid, by rasterio."""
        whole = _pixels(self.paths[band])
        left, top = (
            round((bounds[0] - WEST) / PIXEL) - self.col,
            round((NORTH - bounds[3]) / PIXEL) - self.row,
        )
        stored, inside = np.zeros((SIDE, SIDE), whole.dtype), np.zeros((SIDE, SIDE), bool)
        rows, cols = np.mgrid[top : top + SIDE, left : left + SIDE]
        inside = (rows >= 0) & (rows < whole.shape[0]) & (cols >= 0) & (cols < whole.shape[1])
        stored[inside] = whole[rows[inside], cols[inside]]
        nodata = self.nodata[band]
        valid = inside & ~np.isnan(stored.astype(np.float64))
        return stored, valid if nodata is None else valid & (stored != whole.dtype.type(nodata))


@cache
def _pixels(path: Path) -> Array:
    with rasterio.open(path) as file:
        return np.asarray(file.read(1))


@dataclass(frozen=True)
class Passing:
    """Scenes, and the collection of them."""

    scenes: tuple[Scene, ...]
    members: Mapping[str, rd.Collection]

    def __repr__(self) -> str:
        return f"Passing of {len(self.scenes)} scenes"

    @property
    def source(self) -> rd.Collection:
        """All of it."""
        return (
            rd.merge(*self.members.values()) if len(self.members) > 1 else next(iter(self.members.values()))
        )


def make(
    folder: Path, seed: int, *, dtype: str = "uint16", members: int = 2, one_scale: bool = False
) -> Passing:
    """Write a few passes of one or two overlapping granules each, partly clouded, in April and May."""
    draw = np.random.default_rng(seed)
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.iinfo("int16")
    low, high = max(limits.min, -3000), min(limits.max, 12000)
    scenes, items = [], {f"m{n}": list[Any]() for n in range(members)}
    scaling = (1e-4 if limits.bits > 8 else 0.01, 0.0)
    for number in range(7):
        member = f"m{number % members}"
        start = SLOTS[number % 2] + pd.Timedelta(int(draw.integers(0, 29)) * 24 + number, "h")
        cloud = None if draw.random() < 0.2 else float(draw.integers(0, 4)) * 10
        if not one_scale and draw.random() < 0.5:
            scaling = (scaling[0], float(draw.choice([0.0, -0.1, 0.3])))
        corner = draw.integers(0, 40, 2) * (draw.random() < 0.7)
        for granule in range(int(draw.integers(1, 3))):
            col, row = (corner + granule * draw.integers(10, 40, 2)).tolist()
            col, row = _unlike(col - 1, 16) + 1, _unlike(row - 1, 0) + 1
            south, east = np.array([row, col]) + draw.integers(40, 100, 2)
            shape = (_unlike(int(south) + 1, 0) - 1 - row, _unlike(int(east) + 1, 16) - 1 - col)
            name = f"{'zyxwvut'[number]}{granule}"
            fields = {
                "a": _spotted(draw, draw.integers(low, high, shape, endpoint=True), 0).astype(dtype),
                "b": _spotted(draw, draw.integers(low, high, shape, endpoint=True), 0).astype(dtype),
                "cls": _spotted(draw, draw.integers(1, 5, shape), 0).astype("uint8"),
                "scl": draw.choice([*SCL.values()], (shape[0] // 8 + 1, shape[1] // 8 + 1), p=[0.25, 0.1, 0.5, 0.15])
                .repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]].astype("uint8"),
            }  # fmt: skip
            nodata: dict[str, float | None] = {
                "a": 0.0,
                "b": None if draw.random() < 0.3 else 0.0,
                "cls": 0.0,
                "scl": None,
            }
            paths = {}
            for band, values in fields.items():
                paths[band] = folder / f"{seed}-{name}-{band}.tif"
                with rasterio.open(
                    paths[band], "w", driver="GTiff", width=shape[1], height=shape[0], count=1, dtype=values.dtype,
                    crs=EPSG, transform=Affine(PIXEL, 0, WEST + col * PIXEL, 0, -PIXEL, NORTH - row * PIXEL),
                    nodata=nodata[band], tiled=True, blockxsize=32, blockysize=32, compress="deflate",
                ) as file:  # fmt: skip
                    file.write(values, 1)
            scene = Scene(name, member, start, cloud, col, row, scaling, nodata, paths, shape)
            scenes.append(scene)
            items[member].append(_item(scene))
    return Passing(
        tuple(scenes), {name: rd.build_from_stac(own, name=name) for name, own in items.items() if own}
    )


def _unlike(edge: int, phase: int) -> int:
    """Return an edge that is none of a chip: whether it is touched would be a matter of rounding."""
    return edge + ((edge - phase) % SIDE == 0)


def _spotted(draw: np.random.Generator, values: Array, hole: int) -> Array:
    """Return values with some holes."""
    return np.where(draw.random(values.shape) < 0.1, hole, values)


def _item(scene: Scene) -> dict[str, Any]:
    scale, offset = scene.scaling
    assets: dict[str, Any] = {
        band: {"href": str(path), "type": "image/tiff"} for band, path in scene.paths.items()
    }
    for band in ("a", "b"):
        assets[band]["raster:bands"] = [{"scale": scale, "offset": offset}]
    assets["cls"]["classification:classes"] = [{"value": v, "name": f"class{v}"} for v in range(1, 6)]
    properties: dict[str, Any] = {"datetime": f"{scene.start.isoformat()}Z", "platform": "one"}
    if scene.cloud is not None:
        properties["eo:cloud_cover"] = scene.cloud
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": scene.id, "collection": f"of {scene.member}",
        "geometry": None, "properties": properties, "assets": assets,
    }  # fmt: skip


# What a package of fifteen lines would do


@dataclass(frozen=True)
class Asked:
    """What is asked of the pixels, and the plain functions that say it."""

    bands: tuple[str, ...]
    order: Callable[[Sequence[Scene], float], Any] | None = None
    """(records of a pass, its distance to the middle of the slot) -> what is compared; the smallest comes first."""
    score: Callable[[Array], float] | None = None
    blends: Mapping[str, Callable[[list[float], list[int]], float]] = field(default_factory=dict)
    """Band -> (valid values by start, their ranks) -> value."""
    fill: bool = False
    hidden: Callable[[Mapping[str, Array]], Array] | None = None
    """Stored numbers of all bands -> True where masked."""
    hidden_by: tuple[str, ...] = ("scl",)
    decode: Callable[[str, Array, Scene], Array] = lambda band, stored, scene: stored
    encode: Callable[[str, Array], tuple[Array, Array]] = lambda band, values: (
        values,
        np.zeros(values.shape, bool),
    )
    """(band, values) -> (what the output holds, which are clipped); NaN is invalid."""
    finish: Callable[[Array], Array] = lambda values: values
    """All bands, shape (band, y, x), NaN where invalid."""
    min_coverage: float = 0.0
    coverage_first: bool = True


@dataclass
class Pixels:
    """One chip in one slot."""

    values: Array
    valid: Array
    """Shape (band, y, x)."""
    member: str
    start: pd.Timestamp | None
    filled: float
    clipped: Array


def interpreted(scenes: Sequence[Scene], bounds: Sequence[float], slot: int, asked: Asked) -> Pixels | None:
    """Return one chip in one slot, by the sentences of the documentation; None: it stays empty."""
    chip, middle = shapely.box(*bounds), SLOTS[slot] + (SLOTS[slot + 1] - SLOTS[slot]) / 2
    near = [
        s for s in scenes if SLOTS[slot] <= s.start < SLOTS[slot + 1] and s.raster.intersection(chip).area > 0
    ]
    share = shapely.union_all([s.box for s in near]).intersection(chip).area / chip.area if near else 0.0
    if not near or share < asked.min_coverage - 1e-9:
        return None
    passes: dict[tuple[str, pd.Timestamp], list[Scene]] = {}
    for scene in sorted(near, key=lambda s: (round(s.box.centroid.distance(chip.centroid), 2), s.id)):
        passes.setdefault((scene.member, scene.start), []).append(scene)

    def preference(own: list[Scene]) -> tuple[Any, ...]:
        distance = abs((own[0].start - middle).value)
        covered = shapely.union_all([s.box for s in own]).intersection(chip).area / chip.area
        by_pick = asked.order(own, distance) if asked.order else distance
        covers = (
            covered >= (asked.min_coverage or 1.0) - 1e-9 if asked.order and asked.coverage_first else True
        )
        return not covers, by_pick, distance, min(s.id for s in own)

    ranked = sorted(passes.values(), key=preference)
    if asked.score is not None:
        seen = [np.any([_clear(s, bounds, asked) for s in own], axis=0) for own in ranked]
        best = sorted(range(len(ranked)), key=lambda n: -asked.score(seen[n]))  # type: ignore[misc]
        ranked = [ranked[n] for n in best]
    if asked.blends:
        return _blended(ranked, bounds, asked)
    main = ranked[0]
    values, valid = (
        np.full((len(asked.bands), SIDE, SIDE), np.nan),
        np.zeros((len(asked.bands), SIDE, SIDE), bool),
    )
    held, clipped, after_main = values.copy(), valid.copy(), valid.all(axis=0)
    for own in ranked if asked.fill else ranked[:1]:
        for scene in own:
            decoded, known = _decoded(scene, bounds, asked)
            finished = asked.finish(np.where(known, decoded, np.nan))
            for band, name in enumerate(asked.bands):
                stored, beyond = asked.encode(name, finished[band])
                take = ~np.isnan(finished[band]) & ~valid[band]
                held[band][take], clipped[band][take] = stored[take], beyond[take]
                valid[band] |= take
        if own is main:
            after_main = valid.all(axis=0)
    filled = float((valid.all(axis=0) & ~after_main).mean())
    return Pixels(held, valid, main[0].member, main[0].start, filled, clipped.sum(axis=(1, 2)))


def _decoded(scene: Scene, bounds: Sequence[float], asked: Asked) -> tuple[Array, Array]:
    read = {band: scene.read(band, bounds) for band in scene.paths}
    values = np.stack([asked.decode(band, read[band][0], scene).astype(np.float64) for band in asked.bands])
    valid = np.stack([read[band][1] for band in asked.bands])
    if asked.hidden is not None:
        known = np.all([read[band][1] for band in asked.hidden_by], axis=0)
        valid &= ~(known & asked.hidden({band: stored for band, (stored, _) in read.items()}))
    return values, valid & ~np.isnan(values)


def _clear(scene: Scene, bounds: Sequence[float], asked: Asked) -> Array:
    read = {band: scene.read(band, bounds) for band in scene.paths}
    known = np.all([read[band][1] for band in asked.hidden_by], axis=0)
    if asked.hidden is None:
        return np.asarray(known)
    return np.asarray(known & ~asked.hidden({band: stored for band, (stored, _) in read.items()}))


def _blended(ranked: list[list[Scene]], bounds: Sequence[float], asked: Asked) -> Pixels:
    stack, known = [], []
    by_start = sorted(range(len(ranked)), key=lambda n: ranked[n][0].start)
    for rank in by_start:
        values, valid = (
            np.full((len(asked.bands), SIDE, SIDE), np.nan),
            np.zeros((len(asked.bands), SIDE, SIDE), bool),
        )
        for scene in ranked[rank]:
            decoded, own = _decoded(scene, bounds, asked)
            take = own & ~valid
            values[take], valid = decoded[take], valid | take
        stack.append(values)
        known.append(valid)
    shape = (len(asked.bands), SIDE, SIDE)
    made = np.full(shape, np.nan)
    for at in np.ndindex(shape):
        some = [n for n in range(len(stack)) if known[n][at]]
        if some:
            made[at] = asked.blends[asked.bands[at[0]]](
                [float(stack[n][at]) for n in some], [by_start[n] for n in some]
            )
    finished = asked.finish(made)
    held, clipped = np.empty(shape), np.empty(shape, bool)
    for band, name in enumerate(asked.bands):
        held[band], clipped[band] = asked.encode(name, finished[band])
    names = "+".join(sorted({own[0].member for own in ranked}))
    start = ranked[0][0].start if len(ranked) == 1 else None
    valid = ~np.isnan(finished)
    return Pixels(held, valid, names, start, 0.0, (clipped & valid).sum(axis=(1, 2)))


def read(chips: rd.Chips, shard_bytes: int = 400_000) -> Iterator[Any]:
    """Yield each shard's Dataset as its task makes it, with what it counted."""
    job = freeze(chips._unselected.planned, shard_bytes)
    for shard in job.shards():
        yield merged(job, shard, 0, members_of(job, shard, 0))


def assert_interpreted(scenes: Sequence[Scene], chips: rd.Chips, asked: Asked, fill: Any) -> int:
    """Compare all chips with the interpreter; return how many pixels of how many slots were compared."""
    compared = 0
    for dataset in read(chips):
        clipped = np.zeros(len(asked.bands), dtype=np.int64)
        values = dataset["pixels"].values
        for chip, bounds in enumerate(dataset["bounds"].values.tolist()):
            for at in range(values.shape[1]):
                slot = SLOTS.index(pd.Timestamp(dataset["time"].values[at]))
                wanted = interpreted(scenes, bounds, slot, asked)
                here = f"{dataset['chip_id'].values[chip]} in slot {slot}"
                if wanted is None:
                    assert dataset["member"].values[chip, at] == "", here
                    assert dataset["valid_fraction"].values[chip, at] == 0, here
                    np.testing.assert_array_equal(values[chip, at], np.full_like(values[chip, at], fill))
                    continue
                assert dataset["member"].values[chip, at] == wanted.member, here
                start = dataset["datetime"].values[chip, at]
                assert (None if np.isnat(start) else pd.Timestamp(start)) == wanted.start, here
                together = wanted.valid.all(axis=0)
                assert dataset["valid_fraction"].values[chip, at] == np.float32(together.mean()), here
                if "filled_fraction" in dataset.coords:
                    share = dataset["filled_fraction"].values[chip, at]
                    np.testing.assert_allclose(share, wanted.filled, atol=1e-6, err_msg=here)
                if "valid" in dataset:
                    np.testing.assert_array_equal(dataset["valid"].values[chip, at], together, here)
                for band, name in enumerate(asked.bands):
                    shown = np.where(wanted.valid[band], wanted.values[band], fill).astype(values.dtype)
                    np.testing.assert_array_equal(values[chip, at, band], shown, f"{here}, band {name}")
                clipped += wanted.clipped
                compared += together.size
        assert list(dataset.attrs["clipped"].values()) == clipped.tolist()
    return compared
